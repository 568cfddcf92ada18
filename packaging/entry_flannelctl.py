"""What PyInstaller freezes as `flannelctl`."""

from flanneld.ctl import main

main()
