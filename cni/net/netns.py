"""Network namespaces: enter one, tell one from another."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from cni.errors import KernelError

_CLONE_NEWNET = 0x40000000
_OURS = Path("/proc/thread-self/ns/net")


def enter(path: Path) -> None:
    """Move the calling thread into the network namespace at `path` (setns(2)).

    Raises KernelError; the errno tells "no such path" from "that path is no namespace" (EINVAL).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise KernelError(f"cannot open the network namespace {path}: {exc.strerror}") from exc
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET):
            number = ctypes.get_errno()
            hint = ": it is no network namespace" if number == 22 else f": {os.strerror(number)}"
            raise KernelError(f"cannot enter {path}{hint}")
    finally:
        os.close(descriptor)


def identity(path: Path = _OURS) -> tuple[int, int]:
    """Device and inode of a namespace file: equal for the same namespace, for as long as it lives."""
    try:
        found = path.stat()
    except OSError as exc:
        raise KernelError(f"cannot look at the network namespace {path}: {exc.strerror}") from exc
    return found.st_dev, found.st_ino
