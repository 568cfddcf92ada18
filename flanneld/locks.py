"""One daemon for each subnet file, and one for each device of a network namespace."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from cni.errors import ConfigError
from flanneld.log import logger


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
    for device in devices:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = f"\0flanneld/{device}"
        try:
            claim.bind(name)
        except OSError:
            claim.close()
            _refuse(device, *_holder(name))
            continue
        claim.listen(1)
        claims.append(claim)
    return claims


def _refuse(device: str, pid: int, uid: int) -> None:
    if uid != 0:
        logger.warning("PID %d of user %d claims device %s without being root; ignored", pid, uid, device)
        return
    who = f"PID {pid}" if pid else "a process of another PID namespace"
    raise ConfigError(
        f"another flanneld ({who}) runs device {device} in this network namespace; "
        "stop it, or give this one another Backend.VNI"
    )


def _holder(name: str) -> tuple[int, int]:
    """PID and user of the process that listens on an abstract socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(name)
        except OSError:
            return 0, 0
        raw = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _gid = struct.unpack("=iII", raw)
        return pid, uid
