"""`cni.host.Host` in the daemon: the warm path of a CNI call.

Files are those below the runtime's root directory, the container's namespace is what the shim opened in it,
and netlink sockets of the host's namespace are kept by the thread that serves.
"""

from __future__ import annotations

import array
import errno
import itertools
import os
import socket
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from mmap import mmap
from threading import BoundedSemaphore
from types import TracebackType
from typing import Self, TypeVar

from cni.errors import Declined, KernelError, NetworkError
from cni.host import Netns, Sysctl
from cni.ipam.index import Indexes
from cni.local import netns_error
from cni.memo import Memo
from cni.net.nlmsg import Message, Request
from cni.net.nlsocket import NETFILTER, ROUTE, Answer, NetlinkSocket
from cni.plugins.bridgeport import KnownBridge
from flanneld import cniwire, metrics
from flanneld.cniwire import WireError
from flanneld.linkdeleter import LinkDeleter
from flanneld.log import logger
from flanneld.rootfiles import RootFiles

# The kernel sends what it says about a veth's end to the socket that asked for it in the namespace of that
# end, found by its port alone. Left to itself it gives one port to the sockets of all namespaces, and the
# host's would fill with what the containers' asked for. Neither libraries nor the kernel choose one of these.
_FIRST_PORT, _PORTS = 0xC0000000, 1 << 24
_PORT_TRIES = 16
_RECEIVE_BYTES = 1 << 18

# Threads for system calls that the kernel holds up for 20 ms: enough for 1,600 of them per second.
_HELD_UP = 32
# The disk is a resource of its own. When it falls behind so far, who writes has to wait for it.
_SYNCERS, _MOST_UNSYNCED = 4, 256

T = TypeVar("T")
Identity = tuple[int, int]
_ports = itertools.count(int.from_bytes(os.urandom(3), "big"))


class OwnSocket(NetlinkSocket):
    """A netlink socket with a port of its own; `failed` when it is to be replaced.

    `descriptor` is as for NetlinkSocket, and which one it is can be asked. `buffer` is the thread's. (malloc
    would have each of 256 KiB from mmap, and give it back: three system calls for every answer.)
    """

    __slots__ = ("_buffer", "descriptor", "failed")

    def __init__(self, protocol: int, buffer: mmap, descriptor: int | None = None) -> None:
        super().__init__(protocol, descriptor)
        self._buffer = memoryview(buffer)
        self.descriptor = self._socket.fileno()
        self.failed = False
        for _try in range(_PORT_TRIES):
            try:
                self._socket.bind((_FIRST_PORT + next(_ports) % _PORTS, 0))
            except OSError:
                continue  # the port is taken; or, each time, the shim has used its socket
            break

    def transact(self, requests: Sequence[Request]) -> list[Answer]:
        try:
            return super().transact(requests)
        except KernelError:
            self.failed = True
            raise

    def dump(self, kind: int, body: bytes) -> list[Message]:
        try:
            return super().dump(kind, body)
        except KernelError:
            self.failed = True
            raise

    def _receive(self) -> bytes:
        try:
            return bytes(self._buffer[: self._socket.recv_into(self._buffer)])
        except OSError as exc:
            raise KernelError(f"cannot receive from the kernel: {exc.strerror}") from None


class Sockets:
    """A thread's netlink sockets of the daemon's own namespace. A context manager.

    `buffer` is for what any of the thread's sockets receives.
    """

    __slots__ = ("_open", "buffer")

    def __init__(self) -> None:
        self.buffer = mmap(-1, _RECEIVE_BYTES)  # of which the pages that are never used cost nothing
        self._open: dict[int, OwnSocket] = {}

    def get(self, protocol: int) -> OwnSocket:
        """The socket of a protocol, another one after it has failed; raises KernelError."""
        found = self._open.get(protocol)
        if found is None or found.failed:
            if found is not None:
                found.close()
            found = self._open[protocol] = OwnSocket(protocol, self.buffer)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for each in self._open.values():
            each.close()


class Passed:
    """The descriptors that came with a request, closed with this object. A context manager."""

    __slots__ = ("_by_bit", "_identities", "_numbers")

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._by_bit: dict[int, int] = {}
        self._identities: dict[int, Identity] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for number in self._numbers:
            os.close(number)

    def adopt(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        """Take over what recvmsg(2) gave."""
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found = array.array("i")
                found.frombytes(data[: len(data) - len(data) % found.itemsize])
                self._numbers += found

    def name(self, bits: Sequence[int], own: Identity) -> None:
        """Say which they are, in their order; raises WireError unless each is of its kind.

        `own` is the identity of any namespace. That one is of a network is left to the kernel, when a link
        is to be born in it; that a socket is of route netlink, when it is sent the first request.
        """
        if len(bits) != len(self._numbers):
            raise WireError(f"it came with {len(self._numbers)} descriptors, not {len(bits)}")
        self._by_bit = dict(zip(bits, self._numbers, strict=True))
        for bit, number in self._by_bit.items():
            found = os.fstat(number)
            self._identities[bit] = found.st_dev, found.st_ino
            if bit in (cniwire.OWN, cniwire.NETNS):
                fits = found.st_dev == own[0]
            elif bit == cniwire.ROUTE:
                fits = stat.S_ISSOCK(found.st_mode)
            else:
                fits = stat.S_ISDIR(found.st_mode)
            if not fits:
                raise WireError(f"descriptor {bit:#x} is not what it must be")

    def __getitem__(self, bit: int) -> int:
        return self._by_bit[bit]

    def get(self, bit: int) -> int | None:
        """None if it did not come."""
        return self._by_bit.get(bit)

    def identity(self, bit: int) -> Identity | None:
        """Of a namespace or directory; None if it did not come."""
        return self._identities.get(bit)

    def take(self, bit: int) -> int:
        """The descriptor, which is the caller's from now on."""
        number = self._by_bit[bit]
        self._numbers.remove(number)
        return number


def identity(descriptor: int) -> Identity:
    """Device and inode: equal for the same file, or namespace."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


class Shared:
    """What the calls of all threads work with; `close` it after the last."""

    __slots__ = ("_held_up", "_room", "_settings", "_syncers", "bridges", "deleter", "indexes", "memo")

    def __init__(self) -> None:
        self._held_up = ThreadPoolExecutor(_HELD_UP, thread_name_prefix="cni-held-up")
        self._syncers = ThreadPoolExecutor(_SYNCERS, thread_name_prefix="cni-sync")
        self._room = BoundedSemaphore(_MOST_UNSYNCED)
        self._settings: dict[str, int] = {}
        self.deleter = LinkDeleter(self._held_up)
        self.indexes = Indexes()
        self.memo = Memo()
        self.bridges: dict[str, KnownBridge] = {}

    def close(self) -> None:
        """Waits for the kernel and the disk."""
        self._held_up.shutdown()
        self._syncers.shutdown()
        self.indexes.close()
        for descriptor in self._settings.values():
            os.close(descriptor)

    def settings(self, family: str, root: int) -> int | None:
        """The directory of the settings of `ipv4` or `ipv6` in this namespace; None if it cannot be had.

        That of the first runtime which may write there, as it is not said that we may; `root` is the root of
        this one. (What /proc/sys/net shows is the namespace of the thread that looks, wherever /proc is
        mounted.) It is kept: a runtime's mounts may be gone when it has its answer.
        """
        found = self._settings.get(family)
        if found is None:
            with suppress(OSError):
                path = f"proc/sys/net/{family}"
                opened = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
                if os.fstatvfs(opened).f_flag & os.ST_RDONLY:
                    os.close(opened)
                    return None
                found = self._settings.setdefault(family, opened)
                if found != opened:  # by another thread
                    os.close(opened)
        return found

    def sync_later(self, descriptors: list[int]) -> None:
        """fsync(2) a moment later, in their order, and close them."""
        if self._room.acquire(blocking=False):
            with suppress(RuntimeError):  # no thread can be started, and another one does it then
                self._syncers.submit(self._sync, descriptors)
        else:
            _sync(descriptors)

    def _sync(self, descriptors: list[int]) -> None:
        try:
            _sync(descriptors)
        finally:
            self._room.release()


def _sync(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        try:
            os.fsync(descriptor)
        except OSError as exc:
            logger.error("What a CNI call wrote may be lost in a power failure: %s", exc.strerror)
        finally:
            os.close(descriptor)


class WarmHost:
    """`cni.host.Host` for one request; `close` it, best after the answer: what can wait is done then.

    `path` is the request's CNI_NETNS and `error` says why the shim could not open it (0: it is in `passed`).
    `indexes` and `report` are what `cni.plugins.hostlocal` takes from a daemon.
    """

    __slots__ = (
        "_error",
        "_later",
        "_netns",
        "_passed",
        "_path",
        "_shared",
        "_sockets",
        "_unsynced",
        "bridges",
        "files",
        "indexes",
    )

    def __init__(self, shared: Shared, sockets: Sockets, passed: Passed, path: str, error: int) -> None:
        self.files = RootFiles(passed[cniwire.ROOT])
        self.indexes: Indexes | None = shared.indexes
        self.bridges = shared.bridges
        self._shared = shared
        self._sockets = sockets
        self._passed = passed
        self._path = path
        self._error = error
        self._netns: Netns | None = None
        # Another thread that is woken during a call takes turns with it, at 0.2 ms each.
        self._unsynced: list[int] = []
        self._later: list[Callable[[], object]] = []

    def close(self) -> None:
        # Nothing may be left that refers to this object and that it refers to: it would stay, with all that
        # the call made, until Python looks for such things, and then hold up another call.
        while self._later:  # a step may have something to note
            later, self._later = self._later, []
            for each in later:
                try:
                    each()
                except NetworkError as exc:
                    logger.warning("After a CNI call: %s", exc)
                except Exception:  # noqa: BLE001 - our bug must cost one step, not those behind it
                    logger.exception("What comes after a CNI call failed in the daemon itself")
        if self._netns is not None:
            self._netns.route.close()
        if self._unsynced:
            self._shared.sync_later(self._unsynced)

    @property
    def route(self) -> NetlinkSocket:
        return self._sockets.get(ROUTE)

    @property
    def netfilter(self) -> NetlinkSocket:
        return self._sockets.get(NETFILTER)

    def sysctl(self, name: str) -> Sysctl:
        root = self._passed[cniwire.ROOT]
        family, _, rest = name.partition("/")
        above = self._shared.settings(family, root)
        return Sysctl(name, f"proc/sys/net/{name}", root) if above is None else Sysctl(name, rest, above)

    def netns(self, path: str) -> Netns:
        if not path or path != self._path:
            raise netns_error(path, errno.ENOENT)
        if self._error:
            raise netns_error(path, self._error)
        if self._netns is None:
            passed = self._passed
            route = OwnSocket(ROUTE, self._sockets.buffer, passed.take(cniwire.ROUTE))
            self._netns = Netns(passed[cniwire.NETNS], route, passed.get(cniwire.SETTINGS))
        return self._netns

    def shares_netns(self, path: str) -> bool:
        """Whether `path` is the namespace of the runtime, which is the daemon's own too."""
        if not path or path != self._path:
            return False
        return self._passed.identity(cniwire.NETNS) == self._passed.identity(cniwire.OWN)

    def find_program(self, name: str, directories: list[str]) -> str:
        """Declined: the programs are the runtime's, and its environment is not here."""
        raise Declined(f"plugin {name} would have to be executed, from one of {':'.join(directories)}")

    def delete_link(self, route: NetlinkSocket, name: str) -> int:
        if not isinstance(route, OwnSocket):
            raise TypeError("that socket is not of this host")
        try:
            return self._shared.deleter.delete(route.descriptor, name)
        except KernelError:
            route.failed = True
            raise

    def sync(self, descriptor: int) -> None:
        self._unsynced.append(descriptor)

    def afterwards(self, step: Callable[[], object]) -> None:
        self._later.append(step)

    def known(self, make: Callable[..., T], *arguments: bytes | str) -> T:
        return self._shared.memo.known(make, *arguments)

    def note(self, text: str) -> None:
        self._later.append(partial(logger.info, "%s", text))

    def report(self, network: str, range_set: int, used: int, size: int) -> None:
        """How full a range set of host-local is, for the metrics."""
        self._later.append(partial(metrics.cni_addresses, network, range_set, used, size))
