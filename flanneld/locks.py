"""One daemon for each subnet file, and one for each device of a network namespace."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterable
from pathlib import Path

from cni.errors import ConfigError
from flanneld.log import logger

# How long a name that is taken by nobody who listens is asked for again.
_ATTEMPTS, _PAUSE_S = 10, 0.05


def lock_subnet_file(subnet_file: Path) -> int:
    """Take the lock beside the subnet file and return its descriptor, held until the process ends.

    Raises ConfigError naming the process that holds it. A lock, not a PID file: it cannot be stale.
    """
    path = subnet_file.with_name(f".{subnet_file.name}.lock")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as exc:
        raise ConfigError(
            f"cannot open {path}: {exc.strerror}; --subnet-file must be in a folder that flanneld may write"
        ) from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise ConfigError(
            f"another flanneld (PID {holder}) writes {subnet_file}; "
            "stop it, or give this one its own --subnet-file"
        ) from None
    # The PID is only for the message above; a full file system must not keep us from starting.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def lock_devices(devices: Iterable[str]) -> list[socket.socket]:
    """Claim the devices in this network namespace; the claims end when the sockets are closed.

    The claim is an abstract unix socket: its name belongs to the network namespace just as the device
    does, it vanishes with the process, and the kernel itself tells who holds it. Raises ConfigError
    naming that process. A name taken by a process that is not root is no claim, and is passed over.
    """
    claims = []
    with contextlib.ExitStack() as held:
        for device in devices:
            if claim := _claim(device):
                claims.append(held.enter_context(claim))
        held.pop_all()
    return claims


def _claim(device: str) -> socket.socket | None:
    """The claim, or None where somebody who may not claim has taken the name."""
    name = f"\0flanneld/{device}"
    for _attempt in range(_ATTEMPTS):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            claim.bind(name)
            # Nobody accepts: each start that was refused leaves its connection in this queue.
            claim.listen(socket.SOMAXCONN)
        except OSError:
            claim.close()
        else:
            return claim
        try:
            pid, uid = _holder(name)
        except ConnectionRefusedError:
            # It is about to listen, or has just gone; or it is no flanneld.
            time.sleep(_PAUSE_S)
            continue
        if uid == 0:
            raise _taken(device, pid)
        logger.warning("PID %d of user %d claims device %s without being root; ignored", pid, uid, device)
        return None
    logger.warning("a process that does not listen claims device %s; ignored", device)
    return None


def _taken(device: str, pid: int) -> ConfigError:
    who = f"PID {pid}" if pid else "whose PID cannot be seen from here"
    return ConfigError(
        f"another flanneld ({who}) runs device {device} in this network namespace; "
        "stop it, or give this one another Backend.VNI"
    )


def _holder(name: str) -> tuple[int, int]:
    """PID and user of the process that listens on an abstract socket, zeros if it does not answer.

    Raises ConnectionRefusedError if none listens. The PID is 0 also for one of another PID namespace.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(name)
        except ConnectionRefusedError:
            raise
        except OSError:
            return 0, 0
        raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _gid = struct.unpack("=iII", raw)
        return pid, uid
