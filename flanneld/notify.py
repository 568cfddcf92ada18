"""Tell systemd that the service is up (sd_notify(3))."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from flanneld.log import logger


def ready(environ: Mapping[str, str]) -> None:
    """Send READY=1 to `NOTIFY_SOCKET`, if there is one; a failure is logged, as it harms nobody else."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(b"READY=1", address)
    except OSError as exc:
        logger.warning("cannot notify %s: %s", path, exc.strerror)
