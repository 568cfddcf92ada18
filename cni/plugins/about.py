"""What a plugin says of itself when it is called without a command."""

from __future__ import annotations

import os

from cni import __version__

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


def about(plugin: str) -> str:
    """Name, version and platform in one line, as the Go plugins' about text."""
    machine = os.uname().machine
    return f"CNI Plugin {plugin} version {__version__} (linux/{_ARCHITECTURES.get(machine, machine)})"
