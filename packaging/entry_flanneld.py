"""What PyInstaller freezes as `flanneld`."""

from flanneld.__main__ import main

main()
