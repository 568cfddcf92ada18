"""The kernel of the current network namespace over route netlink."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import NamedTuple, TypeVar

from cni.errors import KernelError
from cni.net import netlink
from cni.net.entries import Address, Entry, FdbEntry, Link, Neighbour, NetState, Route, state
from cni.net.netlink import AddressInfo, LinkInfo, NeighbourInfo, RouteInfo
from cni.net.plan import Operation, Refused, Scope

T = TypeVar("T")

_SOL_NETLINK = 270
_CAP_ACK, _EXT_ACK, _STRICT = 10, 11, 12
_SO_RCVBUFFORCE = 33
_RECEIVE_BYTES = 4 << 20
# Messages sent in one system call. Only the last asks for an acknowledgement, refusals always
# answer: so an answer to each message of a batch fits the receive buffer many times over.
_BATCH = 256
_MAX_INTERRUPTED_DUMPS = 20
# What deleting something absent is answered with, by kind of object.
_ABSENT = frozenset({errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENODEV})


def _open(groups: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    # Older kernels lack strict checking; the filters below are then applied by us alone.
    for option in (_CAP_ACK, _EXT_ACK, _STRICT):
        with contextlib.suppress(OSError):
            sock.setsockopt(_SOL_NETLINK, option, 1)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
    sock.bind((0, groups))
    return sock


def _drain(sock: socket.socket) -> None:
    """Throw away what has arrived: after an overrun the kernel delivers nothing more until that is read."""
    while True:
        try:
            sock.recv(1 << 18, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:
                raise


class NetlinkKernel:
    """`cni.net.plan.Kernel` on the thread's network namespace at the time of construction.

    Not to be shared between threads. Raises KernelError when the socket itself fails.
    """

    def __init__(self) -> None:
        try:
            self._socket = _open()
        except OSError as exc:
            raise KernelError(f"cannot open a route netlink socket: {exc.strerror}") from exc
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    # ---- reading

    def links(self) -> list[LinkInfo]:
        """Every link, in index order as the kernel lists them."""
        return self.dump(netlink.get_links(), netlink.RTM_NEWLINK, netlink.read_link)

    def link(self, name: str) -> LinkInfo | None:
        """The link of that name, None if there is none."""
        message = self._ask(netlink.get_link(name))
        return None if message.kind == netlink.NLMSG_ERROR else netlink.read_link(message.body)

    def addresses(self) -> list[AddressInfo]:
        """Every address of both families."""
        return self.dump(netlink.get_addresses(), netlink.RTM_NEWADDR, netlink.read_address)

    def routes(self, family: int, index: int = 0) -> list[RouteInfo]:
        """Routes of the main table, of one link if `index` is given."""
        found = self.dump(netlink.get_routes(family, index), netlink.RTM_NEWROUTE, netlink.read_route)
        return [r for r in found if r.table == netlink.RT_TABLE_MAIN and index in (0, r.ifindex)]

    def route_to(self, address: str) -> RouteInfo | None:
        """The route the kernel would take to `address`, None if it has none."""
        message = self._ask(netlink.route_to(address))
        return None if message.kind == netlink.NLMSG_ERROR else netlink.read_route(message.body)

    def _ask(self, request: tuple[int, bytes]) -> netlink.Message:
        """Send one request and return its one answer."""
        self._sequence += 1
        self._socket.send(netlink.message(request[0], 0, self._sequence, request[1]))
        return next(self._answers())

    def snapshot(self, scope: Scope) -> NetState:
        """Every entry in `scope` and nothing else."""
        links = self.links()
        names = {link.ifindex: link.name for link in links}
        ours = [link for link in links if link.name in scope.links]
        inside = _inside(scope.networks)
        entries: list[Entry] = [as_link(link, names) for link in ours if link.vxlan is not None]
        indexes = {link.ifindex for link in ours}
        # Of an IPv6 device upstream takes every address for its own, of an IPv4 device only the network's.
        wholly = {link.ifindex for link in ours if link.vxlan and ":" in link.vxlan.local}
        if indexes:
            entries += [
                Address(names[a.ifindex], f"{a.address}/{a.length}")
                for a in self.addresses()
                if a.ifindex in indexes
                and (inside(a.address) or (a.ifindex in wholly and _routable(a.address)))
            ]
        for link in ours:
            entries += self._tables_of(link)
        for direct in (link for link in links if link.name == scope.direct_link):
            entries += [
                as_route(route, direct.name)
                for family in (socket.AF_INET, socket.AF_INET6)
                for route in self.routes(family, direct.ifindex)
                if route.via and _ours(route) and inside(route.dst)
            ]
        return state(entries)

    def _tables_of(self, link: LinkInfo) -> Iterator[Entry]:
        for family in (socket.AF_INET, socket.AF_INET6, netlink.AF_BRIDGE):
            request = netlink.get_neighbours(family, link.ifindex)
            for found in self.dump(request, netlink.RTM_NEWNEIGH, netlink.read_neighbour):
                if found.ifindex == link.ifindex and (entry := as_neighbour(found, link.name)):
                    yield entry
        for family in (socket.AF_INET, socket.AF_INET6):
            yield from (as_route(r, link.name) for r in self.routes(family, link.ifindex) if _ours(r))

    def dump(self, request: tuple[int, bytes], answer: int, read: Callable[[bytes], T]) -> list[T]:
        """Read a whole table; one that changed while it was read is read again."""
        for _attempt in range(_MAX_INTERRUPTED_DUMPS):
            found: list[T] = []
            interrupted = False
            self._sequence += 1
            self._socket.send(netlink.message(request[0], netlink.NLM_F_DUMP, self._sequence, request[1]))
            for message in self._answers():
                interrupted |= bool(message.flags & netlink.NLM_F_DUMP_INTR)
                if message.kind == netlink.NLMSG_DONE:
                    break
                if message.kind == netlink.NLMSG_ERROR:
                    code, text = netlink.error(message)
                    raise KernelError(f"cannot read kernel table {request[0]}: {text or os.strerror(code)}")
                if message.kind == answer:
                    found.append(read(message.body))
            if not interrupted:
                return found
        raise KernelError(f"kernel table {request[0]} changes faster than it can be read")

    def request(self, kind: int, flags: int, body: bytes) -> tuple[int, str]:
        """Send one message and return errno (0 when it was carried out) and the kernel's own words."""
        self._sequence += 1
        self._socket.send(netlink.message(kind, flags | netlink.NLM_F_ACK, self._sequence, body))
        return netlink.error(next(self._answers()))

    def _answers(self) -> Iterator[netlink.Message]:
        """Messages that answer the last request; endless, the caller stops at what it waits for."""
        while True:
            for message in netlink.messages(self._receive()):
                if message.seq == self._sequence:
                    yield message

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(1 << 18)
        except OSError as exc:
            if exc.errno == errno.ENOBUFS:
                _drain(self._socket)
            raise KernelError(f"route netlink socket failed: {exc.strerror}") from exc

    # ---- writing

    def apply(self, operations: Sequence[Operation]) -> list[Refused]:
        """Send the operations in order, links one by one, the rest in batches."""
        refused: list[Refused] = []
        run: list[Operation] = []
        for operation in operations:
            if not isinstance(operation.entry, Link):
                run.append(operation)
                continue
            refused += self._send(run)
            run = []
            if operation.verb == "drop" and (lacking := self._lacks_underlay(operation.entry, operations)):
                # A device that cannot be made again is better than none.
                refused.append(
                    Refused(operation, errno.ENODEV, f"no link named {lacking} to make it on again")
                )
                continue
            refusals = self._send([operation])
            if operation.verb == "put" and not refusals:
                _ignore_router_advertisements(operation.entry.name)
            refused += refusals
        return refused + self._send(run)

    def _lacks_underlay(self, link: Link, operations: Sequence[Operation]) -> str:
        """The underlay that is missing for the device to come in `link`'s place; empty if none is."""
        for operation in operations:
            entry = operation.entry
            if operation.verb == "put" and isinstance(entry, Link) and entry.name == link.name:
                return "" if self.link(entry.vxlan.underlay) else entry.vxlan.underlay
        return ""

    def _links_of(self, operations: Sequence[Operation]) -> dict[str, LinkInfo]:
        """The links that the operations speak of, those that exist."""
        names = {operation.entry.link for operation in operations}
        names |= {op.entry.vxlan.underlay for op in operations if isinstance(op.entry, Link)}
        return {name: link for name in names if (link := self.link(name))}

    def _send(self, operations: Sequence[Operation]) -> list[Refused]:
        refused: list[Refused] = []
        links = self._links_of(operations)
        for start in range(0, len(operations), _BATCH):
            refused += self._send_batch(operations[start : start + _BATCH], links)
        return refused

    def _send_batch(self, operations: Sequence[Operation], links: Mapping[str, LinkInfo]) -> list[Refused]:
        refused: list[Refused] = []
        sent: dict[int, Operation] = {}
        bodies: list[tuple[int, int, bytes]] = []
        indexes = {name: link.ifindex for name, link in links.items()}
        for operation in operations:
            try:
                request = _encode(operation, indexes, links)
            except KeyError as exc:
                if operation.verb == "put":
                    refused.append(Refused(operation, errno.ENODEV, f"no link named {exc.args[0]}"))
                continue
            bodies.append(request)
            sent[self._sequence + len(bodies)] = operation
        if not bodies:
            return refused
        last = self._sequence + len(bodies)
        buffer = b"".join(
            _padded(netlink.message(kind, flags | (netlink.NLM_F_ACK if seq == last else 0), seq, body))
            for seq, (kind, flags, body) in enumerate(bodies, self._sequence + 1)
        )
        # Before anything can fail: no later request may take this one's answers for its own.
        self._sequence = last
        self._socket.send(buffer)
        refused += self._collect(sent, last)
        return refused

    def _collect(self, sent: dict[int, Operation], last: int) -> list[Refused]:
        refused: list[Refused] = []
        while True:
            for message in netlink.messages(self._receive()):
                if message.kind != netlink.NLMSG_ERROR or message.seq not in sent:
                    continue
                code, text = netlink.error(message)
                operation = sent[message.seq]
                if code and not (operation.verb == "drop" and code in _ABSENT):
                    refused.append(Refused(operation, code, text or os.strerror(code)))
                if message.seq == last:
                    return refused


def _encode(
    operation: Operation, indexes: netlink.Indexes, links: Mapping[str, LinkInfo]
) -> tuple[int, int, bytes]:
    entry = operation.entry
    if operation.verb == "drop":
        return netlink.drop(entry, indexes)
    have = links.get(entry.link) if isinstance(entry, Link) else None
    # A device of another kind is not ours to change: asked for a new one, the kernel says EEXIST.
    return netlink.put(entry, indexes, have if have and have.vxlan else None)


def _ignore_router_advertisements(link: str) -> None:
    """As upstream after creating a device; what stands in the way (no IPv6, /proc read-only) is no matter."""
    with contextlib.suppress(OSError):
        Path(f"/proc/sys/net/ipv6/conf/{link}/accept_ra").write_text("0", encoding="ascii")


def _padded(message: bytes) -> bytes:
    return message + b"\0" * (-len(message) % 4)


# ---- from what the kernel shows to entries


def as_link(link: LinkInfo, names: dict[int, str]) -> Link:
    """A VXLAN link as an entry; `names` maps link indexes to names."""
    assert link.vxlan is not None  # noqa: S101 - the callers filter by it
    vxlan = link.vxlan._replace(underlay=names.get(link.underlay, ""))
    return Link(link.name, link.mtu, link.mac, link.up, vxlan)


def as_neighbour(found: NeighbourInfo, link: str) -> Entry | None:
    """A permanent neighbour or FDB entry; None for what the kernel learned by itself."""
    if not found.permanent or not found.address:
        return None
    if found.family == netlink.AF_BRIDGE:
        return FdbEntry(link, found.mac, found.address) if found.own_table else None
    return Neighbour(link, found.address, found.mac)


def as_route(route: RouteInfo, link: str) -> Route:
    return Route(link, route.dst, route.via, route.onlink, route.metric)


def _ours(route: RouteInfo) -> bool:
    """Routes that the kernel or a router advertisement made are nobody's to plan."""
    return route.kind == netlink.RTN_UNICAST and route.protocol not in (
        netlink.RTPROT_KERNEL,
        netlink.RTPROT_RA,
    )


def _inside(networks: tuple[str, ...]) -> Callable[[str], bool]:
    parsed = [ip_network(n) for n in networks]

    def inside(prefix: str) -> bool:
        found = ip_network(prefix, strict=False)
        return any(found.version == n.version and found.subnet_of(n) for n in parsed)  # type: ignore[arg-type]

    return inside


def _routable(address: str) -> bool:
    return not ip_address(address).is_link_local


# ---- notifications


class Change(NamedTuple):
    """A kernel notification: `gone` tells a deletion; `entry` is None when only the link is known.

    `link` is empty for a route that gave way to one on a link that is not watched.
    """

    gone: bool
    link: str
    entry: Entry | None


def _neighbour_change(kind: int, found: NeighbourInfo, link: str) -> Change | None:
    """A permanent neighbour that is deleted shows up as one that is no longer permanent."""
    gone = kind == netlink.RTM_DELNEIGH or not found.permanent
    entry = as_neighbour(found._replace(permanent=True), link)
    return Change(gone, link, entry) if entry else None


_GROUPS = (1, 3, 5, 7, 9, 11)  # RTNLGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
_NEIGH = struct.Struct("=Bxxxi")


class Monitor:
    """Kernel notifications about some links, as `Change`s. Raises KernelError when a socket fails."""

    def __init__(self, links: frozenset[str]) -> None:
        self._wanted = links
        self._socket = _open(sum(1 << (group - 1) for group in _GROUPS))
        self._socket.setblocking(False)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._kernel = NetlinkKernel()
        self._learn_names()

    def _learn_names(self) -> None:
        self._names = {link.ifindex: link.name for link in self._kernel.links() if link.name in self._wanted}

    def wake(self) -> None:
        """Make a waiting `read` return None. Callable from any thread."""
        os.write(self._wake_write, b"\0")

    def close(self) -> None:
        self._socket.close()
        self._kernel.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def read(self) -> list[Change] | None:
        """Wait for the next changes; None after `wake`, an empty list when some were lost."""
        while True:
            ready, _, _ = select.select([self._socket.fileno(), self._wake_read], [], [])
            if self._wake_read in ready:
                return None
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                continue
            except OSError as exc:
                if exc.errno == errno.ENOBUFS:
                    # Among what was lost may be a link of ours that was made anew.
                    _drain(self._socket)
                    self._learn_names()
                    return []
                raise KernelError(f"route netlink monitor failed: {exc.strerror}") from exc
            changes = [change for m in netlink.messages(data) if (change := self._change(m))]
            if changes:
                return changes

    def _change(self, message: netlink.Message) -> Change | None:
        kind, body = message.kind, message.body
        if kind in (netlink.RTM_NEWLINK, netlink.RTM_DELLINK):
            return self._link(kind, body)
        if kind in (netlink.RTM_NEWNEIGH, netlink.RTM_DELNEIGH):
            # The busiest kind on a node full of pods: look at the index before anything is parsed.
            name = self._names.get(_NEIGH.unpack_from(body)[1])
            if name is None:
                return None
            return _neighbour_change(kind, netlink.read_neighbour(body), name)
        if kind in (netlink.RTM_NEWADDR, netlink.RTM_DELADDR):
            address = netlink.read_address(body)
            name = self._names.get(address.ifindex)
            text = f"{address.address}/{address.length}"
            return Change(kind == netlink.RTM_DELADDR, name, Address(name, text)) if name else None
        if kind in (netlink.RTM_NEWROUTE, netlink.RTM_DELROUTE):
            return self._route(message)
        return None

    def _route(self, message: netlink.Message) -> Change | None:
        route = netlink.read_route(message.body)
        if route.table != netlink.RT_TABLE_MAIN:
            return None
        name = self._names.get(route.ifindex)
        if name is None:
            # A replaced route is told of by the new one alone: it may have taken the place of ours.
            replaced = message.kind == netlink.RTM_NEWROUTE and message.flags & netlink.NLM_F_REPLACE
            return Change(True, "", as_route(route, "")) if replaced else None
        return (
            Change(message.kind == netlink.RTM_DELROUTE, name, as_route(route, name))
            if _ours(route)
            else None
        )

    def _link(self, kind: int, body: bytes) -> Change | None:
        if body[0] == netlink.AF_BRIDGE:
            return None
        link = netlink.read_link(body)
        if link.name not in self._wanted:
            # A link of ours that was renamed away is a link of ours that is gone.
            lost = self._names.pop(link.ifindex, None)
            return Change(True, lost, None) if lost else None
        if kind == netlink.RTM_DELLINK:
            self._names.pop(link.ifindex, None)
            return Change(True, link.name, None)
        self._names[link.ifindex] = link.name
        return Change(False, link.name, None)
