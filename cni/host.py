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
    from collections.abc import Callable
    from typing import Protocol, TypeVar

    from cni.ipam.index import Indexes
    from cni.net.nlsocket import NetlinkSocket
    from cni.plugins.bridgeport import KnownBridge
    from cni.plugins.hostlocal import Report

    T = TypeVar("T")

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
            """Take a descriptor over, and close it once what was written by it will outlive a power failure.

            Perhaps a moment later. Raises OSError.
            """

        @property
        def indexes(self) -> Indexes | None:
            """What host-local's stores hold, kept from call to call; None: each call reads the store."""

        @property
        def bridges(self) -> dict[str, KnownBridge]:
            """What earlier calls saw of bridges, by name."""

        @property
        def report(self) -> Report | None:
            """Takes how full the ranges of host-local are, for whoever counts."""

        def afterwards(self, step: Callable[[], object]) -> None:
            """Do what the runtime need not wait for; that it fails is noted."""

        def known(self, make: Callable[..., T], *arguments: bytes | str) -> T:
            """`make(*arguments)` of a pure function, perhaps from an earlier call: not to be changed."""

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
    """A directory: `path` as the netconf names it, for messages; `at` for who needs a path that leads there.

    They differ where the directory is of another mount namespace: there `descriptor` is what was opened, and
    is closed with this object. A context manager. Methods take names of what is below, and raise OSError.
    """

    __slots__ = ("_above", "_base", "at", "path")

    def __init__(self, path: str, at: str, descriptor: int = -1) -> None:
        self.path = path
        self.at = at
        # By way of a descriptor the kernel looks up a name in half the time of /proc/self/fd/N/name.
        self._above = descriptor if descriptor >= 0 else None
        self._base = "" if descriptor >= 0 else f"{at}/"

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._above is not None and self._above >= 0:
            os.close(self._above)
            self._above = -1  # not None, which would stand for the working directory

    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        """A descriptor; the name `.` is the directory itself."""
        return os.open(self._base + name, flags | os.O_CLOEXEC, mode, dir_fd=self._above)

    def lstat(self, name: str) -> os.stat_result:
        return os.stat(self._base + name, dir_fd=self._above, follow_symlinks=False)

    def stat(self, name: str) -> os.stat_result:
        """Of what a link leads to."""
        return os.stat(self._base + name, dir_fd=self._above)

    def unlink(self, name: str) -> None:
        os.unlink(self._base + name, dir_fd=self._above)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._base + old, self._base + new, src_dir_fd=self._above, dst_dir_fd=self._above)

    def link_open(self, file: int, name: str) -> None:
        """Give an open file, which may have none, a name."""
        # Without a directory's descriptor Python would call link(2), which links the link in /proc.
        source = f"/proc/self/fd/{file}"
        os.link(source, self._base + name, src_dir_fd=file, dst_dir_fd=self._above, follow_symlinks=True)

    def names(self) -> list[str]:
        """What is in it."""
        return os.listdir(self.at)  # of a descriptor Python makes another first, and asks what it is


class Sysctl:
    """One setting below /proc/sys/net; `path` leads to it, from the directory `above` if it is relative."""

    __slots__ = ("_above", "_path", "name")

    def __init__(self, name: str, path: str, above: int | None = None) -> None:
        self.name = name
        self._path = path
        self._above = above

    def read(self) -> str:
        """Its value; raises OSError, FileNotFoundError if the kernel has no such setting."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._above)
        try:
            return os.read(descriptor, 256).decode("ascii", "replace").strip()
        finally:
            os.close(descriptor)

    def write(self, value: str) -> None:
        """Set it; raises OSError."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._above)
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
    `settings` a descriptor of its /proc/sys/net/ipv6/conf, None where the kernel has no IPv6. (What
    /proc/sys/net itself leads to depends on who looks.)
    """

    __slots__ = ("descriptor", "route", "settings")

    def __init__(self, descriptor: int, route: NetlinkSocket, settings: int | None) -> None:
        self.descriptor = descriptor
        self.route = route
        self.settings = settings

    def ipv6_setting(self, ifname: str, name: str) -> Sysctl:
        """A setting of a link in the namespace, as `accept_dad`."""
        # The empty path leads nowhere: there is no such setting.
        path = f"{ifname}/{name}" if self.settings is not None else ""
        return Sysctl(f"ipv6/conf/{ifname}/{name}", path, self.settings)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: equal for the same namespace."""
        found = os.fstat(self.descriptor)
        return found.st_dev, found.st_ino
