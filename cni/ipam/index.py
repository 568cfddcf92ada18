"""What a store holds, kept in memory and exact by inotify(7), for who serves many calls.

Everybody changes a store with its lock held, and the kernel queues the event before the change's system call
returns. So whoever has the lock and has read the queue to its end knows of every change, and has to read the
files that others changed and no more: a step costs the same with ten reservations as with 65,000.

The whole store is read again when the queue ran over, when another directory took its place, and at each step
while it holds directories or links, whose contents are not watched.

Not for the cold path: a single call would read the store once in any case. Source: inotify(7).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
import struct
from termios import FIONREAD
from threading import Lock

from cni.ipam.store import LAST, LOCK, Holdings, read_owner, scan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Directory

_MODIFY, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x8, 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF, _UNMOUNT, _OVERFLOW, _IGNORED = 0x400, 0x800, 0x2000, 0x4000, 0x8000
_ONLY_DIRECTORY = 0x01000000
_CHANGES = _MODIFY | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_ENDS = _DELETE_SELF | _MOVE_SELF
_LOST = _ENDS | _UNMOUNT | _OVERFLOW | _IGNORED
# What the kernel tells of a file that `Held.take` made, and of one that `Held.remember` wrote, old or new.
# (An event that is the same as the one before is not told again.) Whatever else there is was somebody else.
_TAKEN = [_CREATE]
_REMEMBERED = [_MODIFY, _CLOSE_WRITE], [_CREATE, _MODIFY, _CLOSE_WRITE]
_NUMBER = struct.Struct("i")
_HEAD = struct.Struct("iIII")  # watch, mask, cookie, length of the name
_READ_BYTES, _LARGEST_EVENT_BYTES = 1 << 14, _HEAD.size + 256
_LIBC = ctypes.CDLL(None, use_errno=True)


class Indexes:
    """The indexes of all stores that a server works with; thread-safe."""

    __slots__ = ("_indexes", "_lock")

    def __init__(self) -> None:
        self._lock = Lock()
        self._indexes: dict[str, Index] = {}

    def of(self, path: str) -> Index:
        """The index of the store at `path`."""
        with self._lock:
            found = self._indexes.get(path)
            if found is None:
                found = self._indexes[path] = Index()
            return found

    def close(self) -> None:
        """Stop watching; an index that is used again begins anew."""
        with self._lock:
            for index in self._indexes.values():
                index.close()
            self._indexes.clear()


class Index:
    """One store's holdings. Who asks holds the store's lock; what it gets is its own until it lets go.

    `scans` counts how often the whole store was read. `settled`: see `cni.ipam.store.View`.
    """

    __slots__ = ("_guard", "_holdings", "_identity", "_watch", "scans", "settled")

    def __init__(self) -> None:
        self._guard = Lock()
        self._watch = -1
        self._identity = (0, 0)
        self._holdings = Holdings()
        self.scans = 0
        self.settled = False

    def holdings(self, directory: Directory) -> Holdings:
        """The reservations now; raises OSError if the directory cannot be read."""
        with self._guard:
            try:
                found = directory.lstat(".")
                identity = (found.st_dev, found.st_ino)
                if self._identity != identity or not self._caught_up(directory):
                    self._rebuild(directory, identity)
            except BaseException:
                self._forget()  # events may have been read and not minded
                raise
            return self._holdings

    def glance(self, directory: Directory) -> Holdings | None:
        """The reservations now, for who has not the store's lock and only looks; None if that takes it.

        Nothing has changed that is not known here as long as no event waits. Raises OSError.
        """
        with self._guard:
            found = directory.lstat(".")
            if self._watch < 0 or self._identity != (found.st_dev, found.st_ino) or not self._holdings.flat:
                return None
            (waiting,) = _NUMBER.unpack(fcntl.ioctl(self._watch, FIONREAD, bytes(_NUMBER.size)))
            return None if waiting else self._holdings

    def close(self) -> None:
        """Stop watching."""
        with self._guard:
            self._forget()

    def _forget(self) -> None:
        self._identity = (0, 0)
        if self._watch >= 0:
            os.close(self._watch)
            self._watch = -1

    def _rebuild(self, directory: Directory, identity: tuple[int, int]) -> None:
        """Watch first, then read: what changes in between is seen twice, and never missed."""
        self._forget()
        self.scans += 1
        try:
            self._watch = _watched(directory)
        except OSError:
            # The machine has no watch left to give: right and slow, and the next call tries again.
            self._holdings = scan(directory)
            return
        self._holdings = scan(directory)
        self._identity = identity

    def _caught_up(self, directory: Directory) -> bool:
        """Take in what changed since the last call; False if the store has to be read again."""
        changed = _changed(self._watch)
        if changed is None:
            return False
        written, self._holdings.written = self._holdings.written, set()
        for name, kinds in changed.items():
            if name.startswith(LAST):
                if name not in written or kinds not in _REMEMBERED:
                    self._holdings.last.pop(name, None)
            elif kinds[-1] & (_DELETE | _MOVED_FROM):
                self._holdings.drop(name)
            elif name not in written or kinds != _TAKEN:
                self._look_at(directory, name)
        return self._holdings.flat

    def _look_at(self, directory: Directory, name: str) -> None:
        try:
            mode = directory.lstat(name).st_mode
        except FileNotFoundError:
            self._holdings.drop(name)
            return
        owner = read_owner(directory, name)
        if not stat.S_ISREG(mode):
            self._holdings.flat = False
        elif owner is None:
            self._holdings.drop(name)
        else:
            self._holdings.put(name, owner)


def _changed(watch: int) -> dict[str, list[int]] | None:
    """The files that changed since the last call, by name, with the kinds of their events in order.

    None if that cannot be told.
    """
    found: dict[str, list[int]] = {}
    is_all = False
    while not is_all:
        chunk, offset = _queued(watch), 0
        # The kernel gives as many as have room; and nobody adds one while the store is locked.
        is_all = len(chunk) <= _READ_BYTES - _LARGEST_EVENT_BYTES
        while offset < len(chunk):
            _, mask, _, length = _HEAD.unpack_from(chunk, offset)
            offset += _HEAD.size + length
            if mask & _LOST:
                return None
            name = os.fsdecode(chunk[offset - length : offset].rstrip(b"\0"))
            if name != LOCK:
                found.setdefault(name, []).append(mask)
    return found


def _queued(watch: int) -> bytes:
    """Whole events that wait, none if there are no more."""
    try:
        return os.read(watch, _READ_BYTES)
    except BlockingIOError:
        return b""


def _watched(directory: Directory) -> int:
    """A descriptor that tells the changes in a directory; raises OSError."""
    watch = _call("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _call("inotify_add_watch", watch, os.fsencode(directory.at), _CHANGES | _ENDS | _ONLY_DIRECTORY)
    except OSError:
        os.close(watch)
        raise
    return watch


def _call(name: str, *arguments: object) -> int:
    answer: int = getattr(_LIBC, name)(*arguments)
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return answer
