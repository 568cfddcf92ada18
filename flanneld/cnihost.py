"""`cni.host.Host` in the daemon: the warm path of a CNI call.

Files are those below the runtime's root directory, the container's namespace is what the shim opened in it,
and netlink sockets of the host's namespace are kept by the thread that serves.
"""

from __future__ import annotations

import array
import errno
import fcntl
import itertools
import os
import select
import socket
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import BoundedSemaphore
from types import TracebackType
from typing import Self

from cni.errors import KernelError
from cni.host import Declined, Netns, Sysctl
from cni.ipam.index import Indexes
from cni.local import netns_error
from cni.net.nlmsg import Message, Request
from cni.net.nlsocket import NETFILTER, ROUTE, Answer, NetlinkSocket
from flanneld import cniwire, metrics
from flanneld.cniwire import WireError
from flanneld.linkdeleter import LinkDeleter
from flanneld.log import logger
from flanneld.rootfiles import RootFiles

# ioctl(2) on a namespace: which kind it is, and the kind that it has to be.
_NS_GET_NSTYPE, _CLONE_NEWNET = 0xB703, 0x40000000

# The kernel sends what it says about a veth's end to the socket that asked for it in the namespace of that
# end, found by its port alone. Left to itself it gives one port to the sockets of all namespaces, and the
# host's would fill with what the containers' asked for. Neither libraries nor the kernel choose one of these.
_FIRST_PORT, _PORTS = 0xC0000000, 1 << 24
_PORT_TRIES = 16

# Threads for system calls that the kernel holds up for 20 ms: enough for 1,600 of them per second.
_HELD_UP = 32
_LONGEST_END_MS = 250  # of a shim that has its answer
# The disk is a resource of its own. When it falls behind so far, who writes has to wait for it.
_SYNCERS, _MOST_UNSYNCED = 4, 256
_ports = itertools.count(int.from_bytes(os.urandom(3), "big"))


class OwnSocket(NetlinkSocket):
    """A netlink socket with a port of its own; `failed` when it is to be replaced.

    `descriptor` is as for NetlinkSocket, and which one it is can be asked.
    """

    __slots__ = ("descriptor", "failed")

    def __init__(self, protocol: int, descriptor: int | None = None) -> None:
        try:
            self.descriptor = _bound(protocol, descriptor)
        except OSError as exc:
            raise KernelError(f"cannot open a netlink socket: {exc.strerror}") from None
        self.failed = False
        super().__init__(protocol, self.descriptor)

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


def _bound(protocol: int, descriptor: int | None) -> int:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    sock = socket.socket(socket.AF_NETLINK, kind, protocol, descriptor)
    for _try in range(_PORT_TRIES):
        # It fails if the port is taken, and always if the shim has used its socket.
        with suppress(OSError):
            sock.bind((_FIRST_PORT + next(_ports) % _PORTS, 0))
            break
    return sock.detach()


class Sockets:
    """A thread's netlink sockets of the daemon's own namespace. A context manager."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[int, OwnSocket] = {}

    def get(self, protocol: int) -> OwnSocket:
        """The socket of a protocol, another one after it has failed; raises KernelError."""
        found = self._open.get(protocol)
        if found is None or found.failed:
            if found is not None:
                found.close()
            found = self._open[protocol] = OwnSocket(protocol)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for each in self._open.values():
            each.close()


class Passed:
    """The descriptors that came with a request, closed with this object. A context manager.

    All but the packet socket, which `later` is given.
    """

    __slots__ = ("_by_bit", "_later", "_numbers")

    def __init__(self, later: Callable[[int], object]) -> None:
        self._later = later
        self._numbers: list[int] = []
        self._by_bit: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        packet = self._by_bit.get(cniwire.PACKET)
        for number in self._numbers:
            if number == packet:
                self._later(number)
            else:
                os.close(number)

    def adopt(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        """Take over what recvmsg(2) gave."""
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found = array.array("i")
                found.frombytes(data[: len(data) - len(data) % found.itemsize])
                self._numbers += found

    def name(self, bits: Sequence[int]) -> None:
        """Say which they are, in their order; raises WireError unless each is of its kind."""
        if len(bits) != len(self._numbers):
            raise WireError(f"it came with {len(self._numbers)} descriptors, not {len(bits)}")
        self._by_bit = dict(zip(bits, self._numbers, strict=True))
        for bit, number in self._by_bit.items():
            if not _KINDS[bit](number):
                raise WireError(f"descriptor {bit:#x} is not what it must be")

    def __getitem__(self, bit: int) -> int:
        return self._by_bit[bit]

    def __contains__(self, bit: int) -> bool:
        return bit in self._by_bit

    def take(self, bit: int) -> int:
        """The descriptor, which is the caller's from now on."""
        number = self._by_bit[bit]
        self._numbers.remove(number)
        return number


def _is_netns(descriptor: int) -> bool:
    try:
        return fcntl.ioctl(descriptor, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False


def _is_directory(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def _is_socket(*wanted: int) -> Callable[[int], bool]:
    """A check for family, type and protocol of a socket."""

    def check(descriptor: int) -> bool:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor)
        try:
            found = (socket.SO_DOMAIN, socket.SO_TYPE, socket.SO_PROTOCOL)
            return tuple(sock.getsockopt(socket.SOL_SOCKET, option) for option in found) == wanted
        finally:
            sock.detach()

    return check


_KINDS: dict[int, Callable[[int], bool]] = {
    cniwire.OWN: _is_netns,
    cniwire.ROOT: _is_directory,
    cniwire.NETNS: _is_netns,
    cniwire.ROUTE: _is_socket(socket.AF_NETLINK, socket.SOCK_RAW, ROUTE),
    cniwire.PACKET: _is_socket(socket.AF_PACKET, socket.SOCK_RAW, 0),
    cniwire.IPV4: _is_directory,
    cniwire.IPV6: _is_directory,
}


class Shared:
    """What the calls of all threads work with; `close` it after the last."""

    __slots__ = ("_held_up", "_room", "_syncers", "deleter", "indexes")

    def __init__(self) -> None:
        self._held_up = ThreadPoolExecutor(_HELD_UP, thread_name_prefix="cni-held-up")
        self._syncers = ThreadPoolExecutor(_SYNCERS, thread_name_prefix="cni-sync")
        self._room = BoundedSemaphore(_MOST_UNSYNCED)
        self.deleter = LinkDeleter(self._held_up)
        self.indexes = Indexes()

    def close(self) -> None:
        """Waits for the kernel and the disk."""
        self._held_up.shutdown()
        self._syncers.shutdown()
        self.indexes.close()

    def close_after(self, connection: socket.socket, descriptor: int) -> None:
        """Close a packet socket, once the other end of the connection has gone.

        The kernel takes 5 to 16 ms to let go of one (synchronize_net), and whoever closes it last has to wait
        for that: the shim, at its end, if we were faster, and with it the runtime.
        """
        self._held_up.submit(_close_after, os.dup(connection.fileno()), descriptor)

    def sync_later(self, descriptor: int) -> None:
        """fsync(2) a moment later; raises OSError if it is done at once and fails."""
        if not self._room.acquire(blocking=False):
            os.fsync(descriptor)
            return
        self._syncers.submit(self._sync, os.dup(descriptor))

    def _sync(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as exc:
            logger.error("What a CNI call wrote may be lost in a power failure: %s", exc.strerror)
        finally:
            os.close(descriptor)
            self._room.release()


def _close_after(connection: int, descriptor: int) -> None:
    poll = select.poll()
    poll.register(connection, 0)  # that it hangs up is told in any case
    poll.poll(_LONGEST_END_MS)
    os.close(connection)
    os.close(descriptor)


class WarmHost:
    """`cni.host.Host` for one request; `close` it.

    `path` is the request's CNI_NETNS and `error` says why the shim could not open it (0: it is in `passed`).
    `indexes` and `report` are what `cni.plugins.hostlocal` takes from a daemon.
    """

    __slots__ = ("_error", "_netns", "_passed", "_path", "_shared", "_sockets", "files", "indexes", "report")

    def __init__(self, shared: Shared, sockets: Sockets, passed: Passed, path: str, error: int) -> None:
        self.files = RootFiles(passed[cniwire.ROOT])
        self.indexes: Indexes | None = shared.indexes
        self.report: Callable[[str, int, int, int], None] | None = metrics.cni_addresses
        self._shared = shared
        self._sockets = sockets
        self._passed = passed
        self._path = path
        self._error = error
        self._netns: Netns | None = None

    def close(self) -> None:
        if self._netns is not None:
            self._netns.route.close()

    @property
    def route(self) -> NetlinkSocket:
        return self._sockets.get(ROUTE)

    @property
    def netfilter(self) -> NetlinkSocket:
        return self._sockets.get(NETFILTER)

    def sysctl(self, name: str) -> Sysctl:
        # /proc/sys/net shows the namespace of the thread that looks, wherever /proc is mounted.
        return Sysctl(f"/proc/self/fd/{self._passed[cniwire.ROOT]}/proc/sys/net", name)

    def netns(self, path: str) -> Netns:
        if not path or path != self._path:
            raise netns_error(path, errno.ENOENT)
        if self._error:
            raise netns_error(path, self._error)
        if self._netns is None:
            passed = self._passed
            families = (("ipv4", cniwire.IPV4), ("ipv6", cniwire.IPV6))
            sysctls = {name: f"/proc/self/fd/{passed[bit]}" for name, bit in families if bit in passed}
            route = OwnSocket(ROUTE, passed.take(cniwire.ROUTE))
            self._netns = Netns(passed[cniwire.NETNS], route, passed[cniwire.PACKET], sysctls)
        return self._netns

    def shares_netns(self, path: str) -> bool:
        """Whether `path` is the namespace of the runtime, which is the daemon's own too."""
        if not path or path != self._path or cniwire.NETNS not in self._passed:
            return False
        return same_file(self._passed[cniwire.NETNS], self._passed[cniwire.OWN])

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
        self._shared.sync_later(descriptor)

    def note(self, text: str) -> None:
        logger.info("%s", text)


def same_file(first: int, second: int) -> bool:
    """Whether two descriptors are of one file, or one namespace."""
    one, other = os.fstat(first), os.fstat(second)
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
