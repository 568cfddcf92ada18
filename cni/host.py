"""The machine as a plugin call sees it: its files, its kernel, the container's namespace.

A call is served in the plugin's own process (cold path), where all this is at hand, or by the daemon (warm
path), which may live in a container of its own: there the shim hands over descriptors of everything that
the daemon could not open itself. The plugins see no difference.
"""

from __future__ import annotations

import os

from cni.errors import CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from cni.ipam.index import Indexes
    from cni.net.nlsocket import NetlinkSocket
    from cni.plugins.hostlocal import Report

    class Files(Protocol):
        """The file system of the runtime. Methods raise OSError."""

        def directory(self, path: str, mode: int | None = None) -> Directory:
            """Open a directory; with `mode` every missing level is made with it."""

        def read(self, path: str, limit: int) -> bytes:
            """The first `limit` bytes of a file."""

    class Host(Protocol):
        """What a call works with. Valid for one call, in one thread."""

        @property
        def files(self) -> Files: ...

        @property
        def route(self) -> NetlinkSocket:
            """Route netlink of the host's network namespace."""

        @property
        def netfilter(self) -> NetlinkSocket:
            """Netfilter netlink of the host's network namespace."""

        def sysctl(self, name: str) -> Sysctl:
            """A setting of the host's network namespace, as `ipv4/ip_forward`."""

        def netns(self, path: str) -> Netns:
            """The container's namespace; raises NetnsMissing, NetnsInvalid."""

        def shares_netns(self, path: str) -> bool:
            """Whether `path` is the namespace of the runtime itself; False if it cannot be told."""

        def find_program(self, name: str, directories: list[str]) -> str:
            """Path of the plugin to execute; raises CniError, and Declined where none can be executed."""

        def delete_link(self, route: NetlinkSocket, name: str) -> int:
            """Delete a link by name; the errno, once nobody can see the link any more."""

        def sync(self, descriptor: int) -> None:
            """Make what was written by `descriptor` outlive a power failure, perhaps a moment later."""

        @property
        def indexes(self) -> Indexes | None:
            """What host-local's stores hold, kept from call to call; None: each call reads the store."""

        @property
        def report(self) -> Report | None:
            """Takes how full the ranges of host-local are, for whoever counts."""

        def note(self, text: str) -> None:
            """A line for the log of whoever runs the plugin."""


class NetnsMissing(CniError):
    """The container's namespace is gone: the path is absent, empty, or a file left by umount(8)."""


class NetnsInvalid(CniError):
    """The path leads to something that is no network namespace, or that cannot be entered.

    `is_gone`: there is a file, but no namespace behind it (any more), as umount(8) leaves it.
    """

    is_gone = False


class Directory:
    """An open directory: `path` as the netconf names it, for messages; `at` for system calls.

    They differ where the directory is of another mount namespace. A context manager.
    """

    __slots__ = ("_descriptor", "at", "path")

    def __init__(self, path: str, at: str, descriptor: int = -1) -> None:
        self.path = path
        self.at = at
        self._descriptor = descriptor

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Sysctl:
    """One setting below /proc/sys/net, of the namespace that `base` was opened in.

    `base` is a path, or the descriptor of a directory as `/proc/self/fd/N`.
    """

    __slots__ = ("_path", "name")

    def __init__(self, base: str, name: str) -> None:
        self._path = f"{base}/{name}"
        self.name = name

    def read(self) -> str:
        """Its value; raises OSError, FileNotFoundError if the kernel has no such setting."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(descriptor, 256).decode("ascii", "replace").strip()
        finally:
            os.close(descriptor)

    def write(self, value: str) -> None:
        """Set it; raises OSError."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)

    def ensure(self, value: str) -> None:
        """Set it unless it has that value; raises OSError."""
        if self.read() != value:
            self.write(value)


class Netns:
    """The container's network namespace, by what was opened in it.

    `descriptor` is the namespace itself (where the peer of a veth is born), `route` its route netlink,
    `sysctls` the paths of its /proc/sys/net/ipv4 and, where the kernel has it, ipv6. (What /proc/sys/net
    itself leads to depends on who looks.)
    """

    __slots__ = ("descriptor", "route", "sysctls")

    def __init__(self, descriptor: int, route: NetlinkSocket, sysctls: dict[str, str]) -> None:
        self.descriptor = descriptor
        self.route = route
        self.sysctls = sysctls

    def sysctl(self, name: str) -> Sysctl:
        """A setting of the namespace, as `ipv6/conf/eth0/accept_dad`."""
        family, _, rest = name.partition("/")
        # Of a kernel without IPv6 the place that is looked in does not exist.
        return Sysctl(self.sysctls.get(family, f"{self.sysctls['ipv4']}/none"), rest)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: equal for the same namespace."""
        found = os.fstat(self.descriptor)
        return found.st_dev, found.st_ino
