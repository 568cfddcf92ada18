"""What PyInstaller freezes as `flannel`."""

import sys

from cni.__main__ import main

sys.exit(main())
