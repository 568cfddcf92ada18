"""What PyInstaller freezes as `virt-launcher`."""

from launcher.__main__ import main

main()
