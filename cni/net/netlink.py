"""Route netlink messages: bytes in, entries out, and back. No socket.

Decision: own code instead of pyroute2, because this is the path that every peer, pod and start-up
goes through: a message is built with one `struct` call and a dump of ten thousand routes is read in
a tenth of a second, without loading a package that takes longer to import than the work takes.
pyroute2 stands on the other side, in the tests, as the independent reader of what we did.

Layouts: linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h, neighbour.h; RFC 3549.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Mapping
from ipaddress import IPv6Address
from typing import NamedTuple

from cni.net.entries import Address, Blackhole, Entry, FdbEntry, Link, Neighbour, Route, Vxlan
from cni.net.nlmsg import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    attr,
    attr_u32,
    attrs,
    mac_bytes,
    mac_text,
)

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30

AF_BRIDGE = 7
IFF_UP = 0x1
NUD_PERMANENT = 0x80
NTF_SELF = 0x02
RT_TABLE_MAIN, RTPROT_KERNEL, RTPROT_BOOT, RTPROT_RA, RTNH_F_ONLINK = 254, 2, 3, 9, 4
RTN_UNICAST, RTN_BLACKHOLE = 1, 6
# Routes on links that are not ours carry this number, which nobody else uses (/etc/iproute2/rt_protos).
RTPROT_FLANNEL = 241
RTPROT_UNSPEC, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 0, 253, 255
IFA_F_TEMPORARY, IFA_F_NODAD, IFA_F_DEPRECATED, IFA_F_PERMANENT = 0x01, 0x02, 0x20, 0x80

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_TXQLEN, _IFLA_LINKINFO = 1, 3, 4, 13, 18
_IFLA_EXT_MASK, _SKIP_STATS = 29, 1 << 3
_INFO_KIND, _INFO_DATA = 1, 2
_VX_ID, _VX_LINK, _VX_LOCAL, _VX_TTL, _VX_TOS, _VX_LEARNING = 1, 3, 4, 5, 6, 7
_VX_PROXY, _VX_RSC, _VX_L2MISS, _VX_L3MISS, _VX_PORT, _VX_LOCAL6 = 11, 12, 13, 14, 15, 17
_VX_ZERO_CSUM6_TX, _VX_ZERO_CSUM6_RX, _VX_GBP = 19, 20, 23
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX = 1, 2, 8
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE, _RTA_VIA = (
    1,
    4,
    5,
    6,
    7,
    15,
    18,
)

_LOOPBACK = 1  # the index of `lo`, in every namespace

_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBi")
_NDMSG = struct.Struct("=BxxxiHBB")
_RTMSG = struct.Struct("=BBBBBBBBI")
# The bodies that are written by the thousand, whole; by the length of the address they hold.
_NEIGHBOUR = {n: struct.Struct(f"={_NDMSG.format[1:]}HH{n}sHH6s2x") for n in (4, 16)}
_ROUTE = {n: struct.Struct(f"={_RTMSG.format[1:]}HH{n}sHHI") for n in (4, 16)}

Attrs = Mapping[int, bytes]


# ---- addresses and MACs


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def packed(address: str) -> bytes:
    """The 4 or 16 bytes of an address; raises OSError for text that is none."""
    return socket.inet_pton(_family(address), address)


def address_text(raw: bytes) -> str:
    """RFC 5952 text of 4 or 16 bytes."""
    if len(raw) == 4:
        return socket.inet_ntop(socket.AF_INET, raw)
    text = socket.inet_ntop(socket.AF_INET6, raw)
    # The C library writes some addresses with an IPv4 address at their end; Python's form is ours.
    return str(IPv6Address(raw)) if "." in text else text


# ---- encoding of operations

Indexes = Mapping[str, int]


def put(entry: Entry, indexes: Indexes, have: LinkInfo | None = None) -> tuple[int, int, bytes]:
    """Message type, flags and body that create or replace `entry`. Unknown links raise KeyError.

    `have` is the VXLAN device of that name which a link is to be changed in place.
    """
    match entry:
        case Link():
            return _put_link(entry, indexes, have)
        case Address():
            # EXCL is left out: an address that is there is what was wanted.
            return RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, _address(entry, indexes)
        case Neighbour() | FdbEntry():
            return RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, _neighbour(entry, indexes)
        case Route():
            return RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, _route(entry, indexes)
        case Blackhole():
            return RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, _blackhole(entry)
    raise TypeError(entry)


def drop(entry: Entry, indexes: Indexes) -> tuple[int, int, bytes]:
    """Message type, flags and body that delete `entry`. Unknown links raise KeyError."""
    match entry:
        case Link():
            return RTM_DELLINK, 0, _IFINFO.pack(0, 0, indexes[entry.name], 0, 0)
        case Address():
            return RTM_DELADDR, 0, _address(entry, indexes)
        case Neighbour() | FdbEntry():
            return RTM_DELNEIGH, 0, _neighbour(entry, indexes)
        case Route():
            return RTM_DELROUTE, 0, _dropped_route(entry, indexes)
        case Blackhole():
            return RTM_DELROUTE, 0, _blackhole(entry)
    raise TypeError(entry)


def _put_link(link: Link, indexes: Indexes, have: LinkInfo | None) -> tuple[int, int, bytes]:
    """Create the link, already up, in one message: if it cannot come up nothing is left behind."""
    up = IFF_UP if link.up else 0
    body = _IFINFO.pack(0, 0, have.ifindex if have else 0, up, IFF_UP)
    body += attr(_IFLA_IFNAME, link.name.encode() + b"\0")
    if have is None or link.mtu != have.mtu:
        body += attr_u32(_IFLA_MTU, link.mtu)
    # Setting a MAC, even the same one, flushes the neighbours of the device, permanent ones included.
    if link.mac and (have is None or link.mac != have.mac):
        body += attr(_IFLA_ADDRESS, mac_bytes(link.mac))
    if have:
        # Without LINKINFO: the kernel takes no MTU together with attributes of the kind.
        return RTM_NEWLINK, 0, body
    info = attr(_INFO_KIND, b"vxlan\0") + attr(_INFO_DATA, _vxlan(link.vxlan, indexes))
    body += attr_u32(_IFLA_TXQLEN, 0) + attr(_IFLA_LINKINFO, info)
    return RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body


def _vxlan(vxlan: Vxlan, indexes: Indexes) -> bytes:
    """The attributes upstream sends (pkg/backend/vxlan/device.go); others keep the kernel's defaults."""
    local6 = ":" in vxlan.local
    data = attr_u32(_VX_ID, vxlan.vni) + attr_u32(_VX_LINK, indexes[vxlan.underlay])
    data += attr(_VX_LOCAL6 if local6 else _VX_LOCAL, packed(vxlan.local))
    data += attr(_VX_LEARNING, bytes([vxlan.learning]))
    for flag in (_VX_TTL, _VX_TOS, _VX_PROXY, _VX_RSC, _VX_L2MISS, _VX_L3MISS):
        data += attr(flag, b"\0")
    data += attr(_VX_ZERO_CSUM6_TX, b"\0") + attr(_VX_ZERO_CSUM6_RX, b"\0")
    data += attr(_VX_PORT, struct.pack("!H", vxlan.port))
    return data + (attr(_VX_GBP, b"") if vxlan.gbp else b"")


def _address(entry: Address, indexes: Indexes) -> bytes:
    address, _, length = entry.address.partition("/")
    raw = packed(address)
    # Nobody else can have an address that we are told to put, and one that waits for proof is of no use yet.
    flags = IFA_F_PERMANENT | (IFA_F_NODAD if ":" in address else 0)
    header = _IFADDR.pack(_family(address), int(length), flags, 0, indexes[entry.link])
    return header + attr(_IFA_LOCAL, raw) + attr(_IFA_ADDRESS, raw)


def _neighbour(entry: Neighbour | FdbEntry, indexes: Indexes) -> bytes:
    if isinstance(entry, FdbEntry):
        raw, family, flags = packed(entry.dst), AF_BRIDGE, NTF_SELF
    else:
        raw, family, flags = packed(entry.address), _family(entry.address), 0
    return _NEIGHBOUR[len(raw)].pack(
        *(family, indexes[entry.link], NUD_PERMANENT, flags, RTN_UNICAST),
        *(4 + len(raw), _NDA_DST, raw),
        *(4 + 6, _NDA_LLADDR, mac_bytes(entry.mac)),
    )


def _route(entry: Route, indexes: Indexes) -> bytes:
    protocol = RTPROT_FLANNEL if entry.marked else RTPROT_BOOT
    scope = RT_SCOPE_UNIVERSE if entry.via else RT_SCOPE_LINK
    body = _route_on(entry, indexes, protocol, scope, RTNH_F_ONLINK if entry.onlink else 0)
    if entry.via:
        body += attr(_RTA_GATEWAY, packed(entry.via))
    return body + (attr_u32(_RTA_PRIORITY, entry.metric) if entry.metric else b"")


def _dropped_route(entry: Route, indexes: Indexes) -> bytes:
    """Names a route on a link of ours whoever made it (any protocol, any scope), elsewhere a marked one."""
    protocol = RTPROT_FLANNEL if entry.marked else RTPROT_UNSPEC
    body = _route_on(entry, indexes, protocol, RT_SCOPE_NOWHERE, 0)
    return body + (attr_u32(_RTA_PRIORITY, entry.metric) if entry.metric else b"")


def _route_on(entry: Route, indexes: Indexes, protocol: int, scope: int, flags: int) -> bytes:
    dst, _, length = entry.dst.partition("/")
    raw = packed(dst)
    return _ROUTE[len(raw)].pack(
        *(_family(dst), int(length), 0, 0, RT_TABLE_MAIN, protocol, scope, RTN_UNICAST, flags),
        *(4 + len(raw), _RTA_DST, raw),
        *(4 + 4, _RTA_OIF, indexes[entry.link]),
    )


def _blackhole(entry: Blackhole) -> bytes:
    dst, _, length = entry.dst.partition("/")
    raw, family = packed(dst), _family(dst)
    body = _RTMSG.pack(family, int(length), 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_BLACKHOLE, 0)
    body += attr(_RTA_DST, raw) + (attr_u32(_RTA_PRIORITY, entry.metric) if entry.metric else b"")
    # IPv6 hangs such a route on `lo`, and does not look at the type of one that is to be deleted.
    return body + (attr_u32(_RTA_OIF, _LOOPBACK) if family == socket.AF_INET6 else b"")


# ---- dump requests


def get_links() -> tuple[int, bytes]:
    return RTM_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0) + attr_u32(_IFLA_EXT_MASK, _SKIP_STATS)


def get_link(name: str) -> tuple[int, bytes]:
    body = _IFINFO.pack(0, 0, 0, 0, 0) + attr_u32(_IFLA_EXT_MASK, _SKIP_STATS)
    return RTM_GETLINK, body + attr(_IFLA_IFNAME, name.encode() + b"\0")


def get_addresses() -> tuple[int, bytes]:
    return RTM_GETADDR, _IFADDR.pack(0, 0, 0, 0, 0)


def get_neighbours(family: int, index: int) -> tuple[int, bytes]:
    """Neighbours of one link; for AF_BRIDGE its forwarding database (strict checking filters both)."""
    if family == AF_BRIDGE:
        return RTM_GETNEIGH, _NDMSG.pack(family, index, 0, 0, 0)
    return RTM_GETNEIGH, _NDMSG.pack(family, 0, 0, 0, 0) + attr_u32(_NDA_IFINDEX, index)


def get_routes(family: int, index: int = 0, protocol: int = 0, kind: int = 0) -> tuple[int, bytes]:
    """Routes of the main table; of one link, protocol or type if that is given (not 0)."""
    body = _RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, protocol, 0, kind, 0)
    return RTM_GETROUTE, body + (attr_u32(_RTA_OIF, index) if index else b"")


def route_to(raw: bytes) -> tuple[int, bytes]:
    """Ask which route the kernel would take to an address of 4 or 16 bytes."""
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return RTM_GETROUTE, _RTMSG.pack(family, len(raw) * 8, 0, 0, 0, 0, 0, 0, 0) + attr(_RTA_DST, raw)


# ---- decoding


class LinkInfo(NamedTuple):
    """A link as the kernel shows it; `vxlan` only for VXLAN devices (underlay named by index)."""

    ifindex: int
    name: str
    mtu: int
    mac: str
    up: bool
    kind: str
    vxlan: Vxlan | None
    underlay: int


class AddressInfo(NamedTuple):
    """An address as the kernel shows it; `flags` are IFA_F_*."""

    ifindex: int
    address: str
    length: int
    scope: int
    flags: int


class RouteInfo(NamedTuple):
    """A route as the kernel shows it; `ifindex` 0 for a multipath or device-less route."""

    ifindex: int
    dst: str
    via: str
    source: str
    table: int
    protocol: int
    kind: int
    metric: int
    onlink: bool


class NeighbourInfo(NamedTuple):
    """A neighbour or FDB entry as the kernel shows it; `own_table` of a device's own, not a bridge's."""

    family: int
    ifindex: int
    address: str
    mac: str
    permanent: bool
    own_table: bool


def read_link(body: bytes) -> LinkInfo:
    _af, _type, index, flags, _change = _IFINFO.unpack_from(body)
    found = attrs(body, _IFINFO.size)
    info = attrs(found.get(_IFLA_LINKINFO, b""))
    kind = info.get(_INFO_KIND, b"").rstrip(b"\0").decode()
    vxlan, underlay = _read_vxlan(attrs(info.get(_INFO_DATA, b""))) if kind == "vxlan" else (None, 0)
    return LinkInfo(
        ifindex=index,
        # The kernel takes nearly any bytes as a name; a link of somebody else must not stop us.
        name=found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "backslashreplace"),
        mtu=int.from_bytes(found.get(_IFLA_MTU, b""), sys.byteorder),
        mac=mac_text(found.get(_IFLA_ADDRESS, b"")),
        up=bool(flags & IFF_UP),
        kind=kind,
        vxlan=vxlan,
        underlay=underlay,
    )


def _read_vxlan(data: Attrs) -> tuple[Vxlan, int]:
    local = data.get(_VX_LOCAL) or data.get(_VX_LOCAL6) or b""
    vxlan = Vxlan(
        vni=int.from_bytes(data.get(_VX_ID, b""), sys.byteorder),
        port=int.from_bytes(data.get(_VX_PORT, b""), "big"),
        local=address_text(local) if local else "",
        underlay="",
        gbp=_VX_GBP in data,
        learning=data.get(_VX_LEARNING, b"\0") != b"\0",
    )
    return vxlan, int.from_bytes(data.get(_VX_LINK, b""), sys.byteorder)


def read_address(body: bytes) -> AddressInfo:
    _af, length, flags, scope, index = _IFADDR.unpack_from(body)
    found = attrs(body, _IFADDR.size)
    raw = found.get(_IFA_LOCAL) or found[_IFA_ADDRESS]
    flags = int.from_bytes(found[_IFA_FLAGS], sys.byteorder) if _IFA_FLAGS in found else flags
    return AddressInfo(index, address_text(raw), length, scope, flags)


def read_neighbour(body: bytes) -> NeighbourInfo:
    family, index, state, flags, _kind = _NDMSG.unpack_from(body)
    found = attrs(body, _NDMSG.size)
    raw = found.get(_NDA_DST, b"")
    return NeighbourInfo(
        family,
        index,
        address_text(raw) if raw else "",
        found.get(_NDA_LLADDR, b"").hex(":"),
        bool(state & NUD_PERMANENT),
        bool(flags & NTF_SELF),
    )


def read_route(body: bytes) -> RouteInfo:
    family, length, _src, _tos, table, protocol, _scope, kind, flags = _RTMSG.unpack_from(body)
    found = attrs(body, _RTMSG.size)
    number, order = int.from_bytes, sys.byteorder
    dst = found.get(_RTA_DST) or bytes(4 if family == socket.AF_INET else 16)
    # An IPv4 route with an IPv6 gateway has it in VIA, behind two bytes that name the family.
    via, source = found.get(_RTA_GATEWAY) or found.get(_RTA_VIA, b"")[2:], found.get(_RTA_PREFSRC)
    return RouteInfo(
        number(found.get(_RTA_OIF, b""), order),
        f"{address_text(dst)}/{length}",
        address_text(via) if via else "",
        address_text(source) if source else "",
        number(found[_RTA_TABLE], order) if _RTA_TABLE in found else table,
        protocol,
        kind,
        number(found.get(_RTA_PRIORITY, b""), order),
        bool(flags & RTNH_F_ONLINK),
    )


def read_hop(body: bytes) -> tuple[int, bool]:
    """Of the answer to `route_to`: the index of the link that it leaves by, and whether to a gateway."""
    found = attrs(body, _RTMSG.size)
    index = int.from_bytes(found.get(_RTA_OIF, b""), sys.byteorder)
    return index, _RTA_GATEWAY in found or _RTA_VIA in found
