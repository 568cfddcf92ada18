"""The kernel of the current network namespace over route netlink."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import NamedTuple, TypeVar

from cni.errors import KernelError
from cni.net import bpf, ethtool, netlink, nlmsg
from cni.net.entries import Address, Blackhole, Entry, FdbEntry, Link, Neighbour, NetState, Route, state
from cni.net.netlink import AddressInfo, LinkInfo, NeighbourInfo, RouteInfo
from cni.net.plan import Operation, Refused, Scope

T = TypeVar("T")

_SOL_NETLINK = 270
_CAP_ACK, _EXT_ACK, _STRICT = 10, 11, 12
_SO_RCVBUFFORCE = 33
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_RECEIVE_BYTES = 4 << 20
# Messages sent in one system call. Only the last asks for an acknowledgement, refusals always
# answer: so an answer to each message of a batch fits the receive buffer many times over.
_BATCH = 64
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

    Not to be shared between threads. Raises KernelError when the socket itself fails. `give_way` is called
    before each batch that is written: who has more urgent business with the kernel goes first.
    """

    def __init__(self, give_way: Callable[[], None] = lambda: None) -> None:
        self._give_way = give_way
        try:
            self._socket = _open()
            # For ioctls; a netlink socket takes none before Linux 4.7.
            self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        except OSError as exc:
            raise KernelError(f"cannot open a socket to the kernel: {exc.strerror}") from exc
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()
        self._control.close()

    # ---- reading

    def links(self) -> list[LinkInfo]:
        """Every link, in index order as the kernel lists them."""
        return self.dump(netlink.get_links(), netlink.RTM_NEWLINK, netlink.read_link)

    def link(self, name: str) -> LinkInfo | None:
        """The link of that name, None if there is none."""
        message = self._ask(netlink.get_link(name))
        return None if message.kind == nlmsg.NLMSG_ERROR else netlink.read_link(message.body)

    def addresses(self) -> list[AddressInfo]:
        """Every address of both families."""
        return self.dump(netlink.get_addresses(), netlink.RTM_NEWADDR, netlink.read_address)

    def routes(self, family: int, index: int = 0, protocol: int = 0, kind: int = 0) -> list[RouteInfo]:
        """Routes of the main table; of one link, protocol or type if that is given (not 0)."""
        request = netlink.get_routes(family, index, protocol, kind)
        return [
            route
            for route in self.dump(request, netlink.RTM_NEWROUTE, netlink.read_route)
            if route.table == netlink.RT_TABLE_MAIN
            and index in (0, route.ifindex)
            and protocol in (0, route.protocol)
            and kind in (0, route.kind)
        ]

    def route_to(self, address: str) -> RouteInfo | None:
        """The route the kernel would take to `address`, None if it has none."""
        message = self._ask(netlink.route_to(netlink.packed(address)))
        return None if message.kind == nlmsg.NLMSG_ERROR else netlink.read_route(message.body)

    def on_link(self, link: str) -> Callable[[IPv4Address | IPv6Address], bool]:
        """Whether the kernel reaches an address over `link` without a gateway; it is asked at each call.

        An IPv6 link-local address is not: without the link, which no lease names, it means nothing.
        """
        index = 0

        def asked(address: IPv4Address | IPv6Address) -> bool:
            nonlocal index
            if address.version == 6 and address.is_link_local:
                return False
            message = self._ask(netlink.route_to(address.packed))
            if message.kind == nlmsg.NLMSG_ERROR:
                return False
            leaves_by, gateway = netlink.read_hop(message.body)
            if gateway:
                return False
            if leaves_by != index:
                found = self.link(link)
                index = found.ifindex if found else 0
            return leaves_by == index

        return asked

    def _ask(self, request: tuple[int, bytes]) -> nlmsg.Message:
        """Send one request and return its one answer."""
        self._sequence += 1
        self._socket.send(nlmsg.message(request[0], 0, self._sequence, request[1]))
        return next(self._answers())

    def snapshot(self, scope: Scope) -> NetState:
        """Every entry in `scope` and nothing else."""
        links = self.links()
        names = {link.ifindex: link.name for link in links}
        ours = [link for link in links if link.name in scope.links]
        entries: list[Entry] = [self._link_entry(link, names, scope) for link in ours if link.vxlan]
        if ours:
            entries += self._addresses_of(ours, scope)
        for link in ours:
            entries += self._tables_of(link)
        entries += self._marked_routes(scope, names)
        for family in _FAMILIES if scope.blackholes else ():
            entries += [
                Blackhole(route.dst, route.metric)
                for route in self.routes(family, kind=netlink.RTN_BLACKHOLE)
                if route.dst in scope.blackholes
            ]
        return state(entries)

    def _link_entry(self, link: LinkInfo, names: dict[int, str], scope: Scope) -> Link:
        entry = as_link(link, names)
        if scope.tx_checksum is None:
            return entry
        try:
            found = ethtool.tx_checksum(self._control, link.name)
        except OSError as exc:
            raise KernelError(f"cannot read the checksum offload of {link.name}: {exc.strerror}") from exc
        return entry._replace(tx_checksum=scope.tx_checksum if found is None else found)

    def _addresses_of(self, ours: Sequence[LinkInfo], scope: Scope) -> Iterator[Entry]:
        inside = _inside(scope.networks)
        by_index = {link.ifindex: link for link in ours}
        for found in self.addresses():
            link = by_index.get(found.ifindex)
            if link is None:
                continue
            # Of an IPv6 device upstream takes every address for its own, of an IPv4 device the network's.
            wholly = link.vxlan is not None and ":" in link.vxlan.local
            if inside(found.address) or (wholly and _routable(found.address)):
                yield Address(link.name, f"{found.address}/{found.length}")

    def _tables_of(self, link: LinkInfo) -> Iterator[Entry]:
        for family in (*_FAMILIES, netlink.AF_BRIDGE):
            request = netlink.get_neighbours(family, link.ifindex)
            for found in self.dump(request, netlink.RTM_NEWNEIGH, netlink.read_neighbour):
                if found.ifindex == link.ifindex and (entry := as_neighbour(found, link.name)):
                    yield entry
        for family in _FAMILIES:
            yield from (as_route(r, link.name) for r in self.routes(family, link.ifindex) if _ours(r))

    def _marked_routes(self, scope: Scope, names: dict[int, str]) -> Iterator[Entry]:
        """Routes with our protocol number into our networks, on links that are not ours."""
        inside = _inside(scope.networks)
        for family in _FAMILIES if scope.networks else ():
            for route in self.routes(family, protocol=netlink.RTPROT_FLANNEL):
                name = names.get(route.ifindex, "")
                if _ours(route) and name and name not in scope.links and inside(route.dst):
                    yield as_route(route, name)

    def dump(self, request: tuple[int, bytes], answer: int, read: Callable[[bytes], T]) -> list[T]:
        """Read a whole table; one that changed while it was read is read again."""
        for _attempt in range(_MAX_INTERRUPTED_DUMPS):
            self._sequence += 1
            self._socket.send(nlmsg.message(request[0], nlmsg.NLM_F_DUMP, self._sequence, request[1]))
            found: list[T] = []
            interrupted = False
            for message in self._answers():
                interrupted |= bool(message.flags & nlmsg.NLM_F_DUMP_INTR)
                if message.kind == answer:
                    found.append(read(message.body))
                elif message.kind == nlmsg.NLMSG_DONE:
                    break
                elif message.kind == nlmsg.NLMSG_ERROR:
                    code, text = nlmsg.error(message)
                    raise KernelError(f"cannot read kernel table {request[0]}: {text or os.strerror(code)}")
            if not interrupted:
                return found
        raise KernelError(f"kernel table {request[0]} changes faster than it can be read")

    def request(self, kind: int, flags: int, body: bytes) -> tuple[int, str]:
        """Send one message and return errno (0 when it was carried out) and the kernel's own words."""
        self._sequence += 1
        self._socket.send(nlmsg.message(kind, flags | nlmsg.NLM_F_ACK, self._sequence, body))
        return nlmsg.error(next(self._answers()))

    def _answers(self) -> Iterator[nlmsg.Message]:
        """Messages that answer the last request; endless, the caller stops at what it waits for."""
        while True:
            for message in nlmsg.messages(self._receive()):
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
            if isinstance(operation.entry, Link):
                refused += self._send(run)
                run = []
                refused += self._send_link(operation, operation.entry, operations)
            else:
                run.append(operation)
        return refused + self._send(run)

    def _send_link(
        self, operation: Operation, link: Link, operations: Sequence[Operation]
    ) -> Sequence[Refused]:
        if operation.verb == "drop":
            lacking = self._lacks_underlay(link, operations)
            # A device that cannot be made again is better than none.
            text = f"no link named {lacking} to make it on again"
            return [Refused(operation, errno.ENODEV, text)] if lacking else self._send([operation])
        refused = self._send([operation])
        if refused:
            return refused
        _ignore_router_advertisements(link.name)
        if link.tx_checksum is None:
            return []
        try:
            ethtool.set_tx_checksum(self._control, link.name, link.tx_checksum)
        except OSError as exc:
            text = f"cannot set the checksum offload: {exc.strerror}"
            return [Refused(operation, exc.errno or errno.EIO, text)]
        return []

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
        return {name: link for name in names if name and (link := self.link(name))}

    def _send(self, operations: Sequence[Operation]) -> list[Refused]:
        links = self._links_of(operations)
        refused = self._send_batches(operations, links)
        blocked = [r.operation for r in refused if _blocked(r)]
        if not blocked:
            return refused
        # Without its gateway the route is taken, in place of what stood in the way; then so is the gateway.
        stones = [Operation("put", _without_gateway(operation.entry)) for operation in blocked]
        self._send_batches(stones, links)
        again = self._send_batches(blocked, links)
        self._send_batches([Operation("drop", r.operation.entry) for r in again], links)
        return [r for r in refused if not _blocked(r)] + again

    def _send_batches(self, operations: Sequence[Operation], links: Mapping[str, LinkInfo]) -> list[Refused]:
        refused: list[Refused] = []
        for start in range(0, len(operations), _BATCH):
            self._give_way()
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
            nlmsg.message(kind, flags | (nlmsg.NLM_F_ACK if seq == last else 0), seq, body)
            for seq, (kind, flags, body) in enumerate(bodies, self._sequence + 1)
        )
        self._give_way()  # to who came while all that was put into bytes
        # Before anything can fail: no later request may take this one's answers for its own.
        self._sequence = last
        self._socket.send(buffer)
        refused += self._collect(sent, last)
        return refused

    def _collect(self, sent: dict[int, Operation], last: int) -> list[Refused]:
        refused: list[Refused] = []
        while True:
            for message in nlmsg.messages(self._receive()):
                if message.kind != nlmsg.NLMSG_ERROR or message.seq not in sent:
                    continue
                code, text = nlmsg.error(message)
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


def _blocked(refused: Refused) -> bool:
    """Whether a route was refused because another one leads its gateway elsewhere.

    IPv6 alone: an on-link gateway must not be routed over another link (the default route apart), be it
    by the very route that is to be replaced (host-gw's, or a direct one) or by a wider one.
    """
    entry = refused.operation.entry
    put = refused.operation.verb == "put" and refused.errno == errno.EINVAL
    return put and isinstance(entry, Route) and entry.onlink and ":" in entry.dst


def _without_gateway(route: Entry) -> Route:
    assert isinstance(route, Route)  # noqa: S101 - `_blocked` lets nothing else through
    return route._replace(via="", onlink=False)


def _ignore_router_advertisements(link: str) -> None:
    """As upstream after creating a device; what stands in the way (no IPv6, /proc read-only) is no matter."""
    with contextlib.suppress(OSError):
        Path(f"/proc/sys/net/ipv6/conf/{link}/accept_ra").write_text("0", encoding="ascii")


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
    marked = route.protocol == netlink.RTPROT_FLANNEL
    return Route(link, route.dst, route.via, route.onlink, route.metric, marked)


def _ours(route: RouteInfo) -> bool:
    """Routes that the kernel or a router advertisement made are nobody's to plan."""
    return route.kind == netlink.RTN_UNICAST and route.protocol not in (
        netlink.RTPROT_KERNEL,
        netlink.RTPROT_RA,
    )


def _inside(networks: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether an address or prefix, `10.244.2.0/24`, lies in one of the networks."""
    parsed = [_bits(network) for network in networks]

    def inside(prefix: str) -> bool:
        number, width, length = _bits(prefix)
        return any(
            width == w and length >= n and (number ^ network) >> (width - n) == 0 for network, w, n in parsed
        )

    return inside


def _bits(prefix: str) -> tuple[int, int, int]:
    """The number that an address is, its width in bits, and the length of the prefix, by default all."""
    address, _, length = prefix.partition("/")
    raw = netlink.packed(address)
    width = len(raw) * 8
    return int.from_bytes(raw, "big"), width, int(length or width)


def _routable(address: str) -> bool:
    return not ip_address(address).is_link_local


# ---- notifications


class Change(NamedTuple):
    """A kernel notification: `gone` tells a deletion; `entry` is None when only the link is known.

    `link` is empty for a route on no link, and for one that gave way to one on a link that is not watched.
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
    """Kernel notifications as `Change`s. Raises KernelError when a socket fails.

    Of `links` everything is told. Of the `underlay` what others than we decide on: its addresses and
    unicast routes, and as `Change(gone, name, None)` that it came, went, or has another MTU or is
    switched on or off. The two sets of names have none in common, so `Change.link` tells which it is.
    """

    def __init__(self, links: frozenset[str], underlay: frozenset[str] = frozenset()) -> None:
        self._links = links
        self._underlay = underlay
        self._socket = _open(sum(1 << (group - 1) for group in _GROUPS))
        self._socket.setblocking(False)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._kernel = NetlinkKernel()
        self._learn_names()

    def _learn_names(self) -> None:
        wanted = self._links | self._underlay
        # What is known of the watched links by index, to tell what of a notification is news.
        self._known = {link.ifindex: link for link in self._kernel.links() if link.name in wanted}
        self._listen()

    def _listen(self) -> None:
        """Hear of the links that are known, and of what is given one of the names, and of nothing else."""
        self._heard = frozenset(self._known)
        self._missed = False
        bpf.attach(self._socket, bpf.of_links(self._heard, self._links | self._underlay))

    def _name(self, index: int) -> str:
        known = self._known.get(index)
        return known.name if known else ""

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
        if self._missed:
            self._missed = False
            return []
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
            changes = [change for m in nlmsg.messages(data) if (change := self._change(m))]
            if not self._known.keys() <= self._heard:
                self._listen()
                self._missed = True  # what was told of the new link before it could be heard
            if changes:
                return changes

    def _change(self, message: nlmsg.Message) -> Change | None:
        kind, body = message.kind, message.body
        if kind in (netlink.RTM_NEWLINK, netlink.RTM_DELLINK):
            return self._link(kind, body)
        if kind in (netlink.RTM_NEWNEIGH, netlink.RTM_DELNEIGH):
            # The busiest kind on a node full of pods: look at the index before anything is parsed.
            name = self._name(_NEIGH.unpack_from(body)[1])
            return (
                _neighbour_change(kind, netlink.read_neighbour(body), name) if name in self._links else None
            )
        if kind in (netlink.RTM_NEWADDR, netlink.RTM_DELADDR):
            return self._address(kind, netlink.read_address(body))
        if kind in (netlink.RTM_NEWROUTE, netlink.RTM_DELROUTE):
            return self._route(message)
        return None

    def _address(self, kind: int, found: AddressInfo) -> Change | None:
        name = self._name(found.ifindex)
        # Each device of ours gets a link-local address from the kernel, which is nobody's to plan.
        if not name or (name in self._links and not _routable(found.address)):
            return None
        return Change(kind == netlink.RTM_DELADDR, name, Address(name, f"{found.address}/{found.length}"))

    def _route(self, message: nlmsg.Message) -> Change | None:
        route = netlink.read_route(message.body)
        if route.table != netlink.RT_TABLE_MAIN:
            return None
        gone = message.kind == netlink.RTM_DELROUTE
        if gone and route.kind == netlink.RTN_BLACKHOLE:
            return Change(True, "", Blackhole(route.dst, route.metric))
        name = self._name(route.ifindex)
        if not name:
            # A replaced route is told of by the new one alone: it may have taken the place of ours. Likewise
            # one that is now one of several, as IPv6 makes of routes that are added to one another.
            replaced = not gone and message.flags & (nlmsg.NLM_F_REPLACE | nlmsg.NLM_F_APPEND)
            return Change(True, "", as_route(route, "")) if replaced else None
        told = route.kind == netlink.RTN_UNICAST if name in self._underlay else _ours(route)
        return Change(gone, name, as_route(route, name)) if told else None

    def _link(self, kind: int, body: bytes) -> Change | None:
        if body[0] == netlink.AF_BRIDGE:
            return None
        link = netlink.read_link(body)
        if link.name not in self._links and link.name not in self._underlay:
            # A watched link that was renamed away is a watched link that is gone.
            lost = self._known.pop(link.ifindex, None)
            return Change(True, lost.name, None) if lost else None
        if kind == netlink.RTM_DELLINK:
            self._known.pop(link.ifindex, None)
            return Change(True, link.name, None)
        before = self._known.get(link.ifindex)
        self._known[link.ifindex] = link
        same = before and (before.name, before.mtu, before.up) == (link.name, link.mtu, link.up)
        return None if same and link.name in self._underlay else Change(False, link.name, None)
