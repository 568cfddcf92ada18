"""The runtime's file system, through a descriptor of its root directory.

The daemon may live in a container, where `/var/lib/cni` is another directory, or none. Every path that a
netconf names is looked up below the descriptor, symbolic links included: openat2(2), RESOLVE_IN_ROOT.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct

from cni.host import Directory

_OPENAT2 = 437  # on every architecture
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
_HOW = struct.Struct("=QQQ")
_AT_FDCWD = -100
# Somebody renames a directory above while ".." is followed: the kernel cannot tell then where it leads.
_RACES = 64
_CHUNK_BYTES = 1 << 14  # Python takes memory for all that it may read

_libc = ctypes.CDLL(None, use_errno=True)


def supported() -> bool:
    """Whether the kernel, and what filters our system calls, knows openat2 (Linux 5.6)."""
    try:
        os.close(_openat2(_AT_FDCWD, "/", os.O_PATH))
    except OSError:
        return False
    return True


class RootFiles:
    """`cni.host.Files` below the directory `root`, a descriptor that stays the caller's.

    A relative path begins at the root too, which is the working directory of every runtime.
    """

    __slots__ = ("_root",)

    def __init__(self, root: int) -> None:
        self._root = root

    def directory(self, path: str, mode: int | None = None) -> Directory:
        """Open a directory; with `mode` every missing level is made with it. Raises OSError."""
        descriptor = self._directory(path) if mode is None else self._made(path, mode)
        return Directory(path, f"/proc/self/fd/{descriptor}", descriptor)

    def read(self, path: str, limit: int) -> bytes:
        """The first `limit` bytes of a file; raises OSError. A pipe without a writer is empty."""
        descriptor = _openat2(self._root, path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            data = bytearray()
            while len(data) < limit and (chunk := os.read(descriptor, min(_CHUNK_BYTES, limit - len(data)))):
                data += chunk
        finally:
            os.close(descriptor)
        return bytes(data)

    def _directory(self, path: str) -> int:
        return _openat2(self._root, path, os.O_RDONLY | os.O_DIRECTORY)

    def _made(self, path: str, mode: int) -> int:
        """`mkdir -p`; the last directory's descriptor."""
        above, missing = path, []
        while True:
            try:
                parent = self._directory(above)
                break
            except FileNotFoundError:
                if not above.strip("/"):
                    raise
            missing.append(above)
            above = above.rstrip("/").rpartition("/")[0] or "/"
        for level in reversed(missing):
            try:
                # One that exists was made by another pod's ADD at this moment, or leads nowhere.
                with contextlib.suppress(FileExistsError):
                    os.mkdir(level.rstrip("/").rpartition("/")[2], mode, dir_fd=parent)
            finally:
                os.close(parent)
            parent = self._directory(level)
        return parent


def _openat2(directory: int, path: str, flags: int) -> int:
    """A descriptor of what `path` is below `directory`; raises OSError."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        name = b"\0"
    if b"\0" in name:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    how = _HOW.pack(flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    for _race in range(_RACES):
        descriptor: int = _libc.syscall(_OPENAT2, directory, name, how, _HOW.size)
        if descriptor >= 0:
            return descriptor
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    raise _last_error(path)


def _last_error(path: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)
