"""`cni.host.Host` for the plugin's own process: the cold path.

The shim, where there is one, has opened the container's namespace already and leaves the descriptors in
FLANNEL_CNI_FDS, as `own=3 root=4 netns=5 route=6 settings=7 error=0`. Otherwise they are opened here.
"""

from __future__ import annotations

import errno
import fcntl
import os
from _stat import S_ISDIR

from cni.errors import INTERNAL, CniError, KernelError
from cni.host import Directory, Netns, NetnsInvalid, NetnsMissing, Sysctl
from cni.net.nlsocket import NETFILTER, ROUTE, NetlinkSocket
from cni.plugins import delegate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    from cni.plugins.bridgeport import KnownBridge

    T = TypeVar("T")

DESCRIPTORS = "FLANNEL_CNI_FDS"
_SYSCTLS = "/proc/sys/net"
_LEFT = frozenset({"own", "root", "netns", "route", "settings", "error"})
_OWN_NETNS = "/proc/thread-self/ns/net"
_CLONE_NEWNET, _NS_GET_NSTYPE = 0x40000000, 0xB703  # ioctl_ns(2)
_NOT_A_NAMESPACE = -1
_RTM_DELLINK, _IFLA_IFNAME = 17, 3


class LocalFiles:
    """`cni.host.Files` where the runtime's file system is our own."""

    __slots__ = ()

    def directory(self, path: str, mode: int | None = None) -> Directory:
        try:
            if mode is not None:
                make_directories(path, mode)
            if S_ISDIR(os.stat(path).st_mode):
                return Directory(path, path)
            number = errno.ENOTDIR
        except ValueError:  # no path can hold a NUL
            number = errno.EINVAL
        except OSError as exc:
            number = exc.errno or errno.EIO
        raise OSError(number, os.strerror(number), path)

    def read(self, path: str, limit: int) -> bytes:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except ValueError:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path) from None
        try:
            data = bytearray()
            while len(data) < limit and (chunk := os.read(descriptor, limit - len(data))):
                data += chunk
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, path) from None
        finally:
            os.close(descriptor)
        return bytes(data)


def make_directories(path: str, mode: int) -> None:
    """`mkdir -p` that gives every missing level `mode`, which os.makedirs does for the last one only."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path.rstrip("/"))
    if parent:
        make_directories(parent, mode)
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        return  # made by another pod's ADD at this moment, or no directory: whoever opens it is told


class LocalHost:
    """One call's view of this machine. `note` takes lines for the runtime's log."""

    __slots__ = (
        "_inherited",
        "_netfilter",
        "_netns",
        "_note",
        "_passed_for",
        "_route",
        "bridges",
        "files",
        "indexes",
        "report",
    )

    def __init__(self, note: Callable[[str], None], environment: Mapping[str, str]) -> None:
        self.files = LocalFiles()
        self.indexes = None
        self.bridges: dict[str, KnownBridge] = {}
        self.report = None
        self._note = note
        self._inherited = _inherited(environment.get(DESCRIPTORS, ""))
        self._passed_for = environment.get("CNI_NETNS", "")
        self._route: NetlinkSocket | None = None
        self._netfilter: NetlinkSocket | None = None
        self._netns: tuple[str, Netns] | None = None

    def afterwards(self, step: Callable[[], object]) -> None:
        try:
            step()
        except (CniError, KernelError) as exc:
            self._note(str(exc))

    def known(self, make: Callable[..., T], *arguments: bytes | str) -> T:
        return make(*arguments)

    def note(self, text: str) -> None:
        self._note(text)

    def sync(self, descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @property
    def route(self) -> NetlinkSocket:
        if self._route is None:
            self._route = NetlinkSocket(ROUTE)
        return self._route

    @property
    def netfilter(self) -> NetlinkSocket:
        if self._netfilter is None:
            self._netfilter = NetlinkSocket(NETFILTER)
        return self._netfilter

    def sysctl(self, name: str) -> Sysctl:
        return Sysctl(name, f"{_SYSCTLS}/{name}")

    def netns(self, path: str) -> Netns:
        if self._netns is None or self._netns[0] != path:
            self._netns = path, self._adopted(path) if self._inherited else _opened(path)
        return self._netns[1]

    def shares_netns(self, path: str) -> bool:
        try:
            theirs, ours = os.stat(path), os.stat(_OWN_NETNS)
        except OSError:
            return False
        return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)

    def find_program(self, name: str, directories: list[str]) -> str:
        return delegate.find(name, directories)

    def delete_link(self, route: NetlinkSocket, name: str) -> int:
        body = bytes(16) + nlmsg_name(name)
        return route.request(_RTM_DELLINK, 0, body).errno

    def _adopted(self, path: str) -> Netns:
        """The namespace as the shim opened it; GC detaches containers that have another, or none any more."""
        given = self._inherited
        if not path or path != self._passed_for:
            raise netns_error(path, errno.ENOENT)
        if "netns" in given:
            route = NetlinkSocket(ROUTE, given["route"])
            route.start_afresh()
            return Netns(given["netns"], route, given.get("settings"))
        raise netns_error(path, given.get("error", 0))


def nlmsg_name(name: str) -> bytes:
    """The attribute that names a link."""
    from cni.net.nlmsg import attr

    return attr(_IFLA_IFNAME, os.fsencode(name) + b"\0")


def netns_error(path: str, number: int) -> CniError:
    """The error for a namespace that was not opened: `number` is an errno, -1 for what is no namespace.

    Wording is that of the Go library (pkg/ns).
    """
    if not path or number == errno.ENOENT:
        text = f'failed to open netns "{path}": failed to Statfs "{path}": no such file or directory'
        return NetnsMissing(INTERNAL, text)
    if number == _NOT_A_NAMESPACE:
        invalid = NetnsInvalid(INTERNAL, f'failed to open netns "{path}": unknown FS magic on "{path}"')
        invalid.is_gone = True
        return invalid
    return NetnsInvalid(INTERNAL, f'failed to open netns "{path}": {os.strerror(number).lower()}')


def _inherited(text: str) -> dict[str, int]:
    """What the shim left, by name; none of it is passed on to a program that is executed.

    Of a shim that is of another build, and leaves something else, nothing is taken.
    """
    found = {}
    for word in text.split():
        name, _, number = word.partition("=")
        found[name] = int(number)
        if name != "error":
            os.set_inheritable(int(number), False)
    return found if _LEFT.issuperset(found) else {}


def _opened(path: str) -> Netns:
    """Open the namespace, and what is needed in it; raises NetnsMissing or NetnsInvalid."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise netns_error(path, exc.errno or errno.EIO) from None
    own = os.open(_OWN_NETNS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not _is_netns(descriptor):
            raise netns_error(path, _NOT_A_NAMESPACE)
        _enter(descriptor, path)
        try:
            return Netns(descriptor, NetlinkSocket(ROUTE), _open_settings())
        finally:
            _enter(own, _OWN_NETNS)
    finally:
        os.close(own)


def _open_settings() -> int | None:
    """IPv6's settings of the namespace that this thread is in, for later, when it is in another."""
    try:
        return os.open(f"{_SYSCTLS}/ipv6/conf", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _is_netns(descriptor: int) -> bool:
    try:
        return fcntl.ioctl(descriptor, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False


def _enter(descriptor: int, path: str) -> None:
    """setns(2), which Python has from 3.12 on."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise KernelError(f"cannot enter the network namespace {path}: {os.strerror(ctypes.get_errno())}")
