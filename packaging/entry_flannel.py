"""What PyInstaller freezes as `flannel`."""

from cni.__main__ import main

main()
