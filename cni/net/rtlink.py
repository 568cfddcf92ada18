"""Route netlink as the pods' bridge needs it: requests as bytes, answers as values. No socket.

Decision: apart from `cni.net.netlink`, which is the daemon's: that one reads tables of ten thousand entries
into comparable values and imports what that takes; this one is loaded by the plugin for every pod.

Layouts: linux/rtnetlink.h, if_link.h, if_addr.h, if_bridge.h, veth.h.
"""

from __future__ import annotations

import struct
import sys

from cni.net.nlmsg import (
    NLM_F_CREATE,
    NLM_F_ECHO,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    attr,
    attr_list,
    attr_u32,
    attrs,
    first_attr,
    mac_bytes,
    mac_text,
)
from cni.spec.address import Cidr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.net.nlmsg import Request

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
_RTM_NEWNEIGH, _RTM_DELNEIGH, _RTM_GETNEIGH = 28, 29, 30

AF_INET, AF_INET6, AF_BRIDGE = 2, 10, 7
FAMILIES = {4: AF_INET, 6: AF_INET6}
_IFF_UP, _IFF_PROMISC = 0x1, 0x100
_IFINFO, _IFADDR, _RTMSG = struct.Struct("=BxHiII"), struct.Struct("=BBBBi"), struct.Struct("=BBBBBBBBI")
_NDMSG = struct.Struct("=BxxxiHBB")

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_TXQLEN = 1, 3, 4, 5, 10, 13
_IFLA_OPERSTATE, _IFLA_LINKINFO, _IFLA_AF_SPEC, _IFLA_NET_NS_FD, _IFLA_EXT_MASK = 16, 18, 26, 28, 29
_IFLA_PROMISCUITY, _IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 30, 31, 32
_SKIP_STATS, _BRIDGE_VLANS = 1 << 3, 1 << 1
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 1, 2, 4, 5
_VETH_PEER, _BR_VLAN_FILTERING = 1, 7
_BRPORT_HAIRPIN, _BRPORT_ISOLATED = 4, 33
_BRIDGE_VLAN_INFO = 2
_VLAN_PVID, _VLAN_UNTAGGED = 1 << 1, 1 << 2
_OPER_UP = 6
_INET_CONF, _CONF_ARP_NOTIFY = 1, 22  # linux/ip.h

# What many messages have in common, made once: it is a good part of the time that making one takes.
_ANY_LINK, _ANY_LINK_UP = _IFINFO.pack(0, 0, 0, 0, 0), _IFINFO.pack(0, 0, 0, _IFF_UP, _IFF_UP)
_WITHOUT_STATS = attr_u32(_IFLA_EXT_MASK, _SKIP_STATS)
_ONE_QUEUE = attr_u32(_IFLA_NUM_TX_QUEUES, 1) + attr_u32(_IFLA_NUM_RX_QUEUES, 1)
_ONE_QUEUE_OF_NO_LENGTH = _ONE_QUEUE + attr_u32(_IFLA_TXQLEN, 0)
_KIND_BRIDGE, _KIND_VETH = attr(_INFO_KIND, b"bridge\0"), attr(_INFO_KIND, b"veth\0")
_KIND_PORT = attr(_INFO_SLAVE_KIND, b"bridge\0")
_NOTIFY_BY_ARP = attr(_IFLA_AF_SPEC, attr(AF_INET, attr(_INET_CONF, attr_u32(_CONF_ARP_NOTIFY, 1))))

_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
IFA_F_NODAD, IFA_F_DADFAILED, IFA_F_TENTATIVE, _IFA_F_PERMANENT = 0x02, 0x08, 0x40, 0x80

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_TABLE = 1, 4, 5, 6, 15
RT_TABLE_MAIN, _RTPROT_BOOT, _RTN_UNICAST, _RT_SCOPE_LINK = 254, 3, 1, 253
_NDA_DST, _NDA_LLADDR = 1, 2
_NUD_INCOMPLETE, _NUD_STALE, _NUD_FAILED = 0x01, 0x04, 0x20


class LinkState:
    """A link as the kernel shows it. `peer` is the index of a veth's other end, `promiscuity` a counter."""

    __slots__ = (
        *("_info", "ifindex", "mac", "master", "mtu", "name"),
        *("peer", "promiscuity", "up"),
    )

    def __init__(self, body: bytes) -> None:
        _af, _type, self.ifindex, flags, _change = _IFINFO.unpack_from(body)
        found = attrs(body, _IFINFO.size)
        self._info = found.get(_IFLA_LINKINFO, b"")
        self.name = found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "backslashreplace")
        self.mac = mac_text(found.get(_IFLA_ADDRESS, b""))
        self.mtu = _number(found, _IFLA_MTU)
        self.up = bool(flags & _IFF_UP)
        self.master = _number(found, _IFLA_MASTER)
        self.peer = _number(found, _IFLA_LINK)
        self.promiscuity = _number(found, _IFLA_PROMISCUITY)

    @property
    def kind(self) -> str:
        return attrs(self._info).get(_INFO_KIND, b"").rstrip(b"\0").decode("ascii", "replace")

    @property
    def hairpin(self) -> bool:
        return self._port_flag(_BRPORT_HAIRPIN)

    @property
    def isolated(self) -> bool:
        return self._port_flag(_BRPORT_ISOLATED)

    def _port_flag(self, kind: int) -> bool:
        return attrs(attrs(self._info).get(_INFO_SLAVE_DATA, b"")).get(kind) == b"\1"


def mac_of(body: bytes) -> str:
    """`LinkState(body).mac`, for who wants nothing else."""
    return mac_text(first_attr(body, _IFINFO.size, _IFLA_ADDRESS))


def is_still(body: bytes, link: LinkState) -> bool:
    """Whether an answer is about that link, which is up and has the name and the MAC that it had."""
    _af, _type, ifindex, flags, _change = _IFINFO.unpack_from(body)
    if ifindex != link.ifindex or not flags & _IFF_UP:
        return False
    name = first_attr(body, _IFINFO.size, _IFLA_IFNAME)
    return name == link.name.encode() + b"\0" and mac_of(body) == link.mac


def ends_of(body: bytes) -> tuple[int, int]:
    """The indexes of a veth, and of its other end."""
    ifindex: int = _IFINFO.unpack_from(body)[2]
    return ifindex, int.from_bytes(first_attr(body, _IFINFO.size, _IFLA_LINK), sys.byteorder)


def is_oper_up(body: bytes) -> bool:
    """Whether a link's operational state is up (RFC 2863, as the kernel keeps it)."""
    return first_attr(body, _IFINFO.size, _IFLA_OPERSTATE) == bytes([_OPER_UP])


def _number(found: dict[int, bytes], kind: int) -> int:
    raw = found.get(kind)
    number: int = struct.unpack("=I", raw)[0] if raw is not None and len(raw) == 4 else 0
    return number


# ---- links


def get_link(name: str = "", ifindex: int = 0) -> Request:
    """Ask for one link."""
    body = _IFINFO.pack(0, 0, ifindex, 0, 0) + _WITHOUT_STATS
    return RTM_GETLINK, 0, body + (_name(name) if name else b"")


def get_links(master: int = 0) -> tuple[int, bytes]:
    """Dump the links, or the ports of one bridge."""
    body = _ANY_LINK + _WITHOUT_STATS
    return RTM_GETLINK, body + (attr_u32(_IFLA_MASTER, master) if master else b"")


def make_bridge(name: str, mac: str, mtu: int, vlan_filtering: bool) -> Request:
    """Create a bridge that is up. With a MAC of its own from the start it never takes one of its ports'."""
    body = _ANY_LINK_UP + _name(name) + _mac(mac) + _mtu(mtu)
    info = _KIND_BRIDGE
    if vlan_filtering:
        info += attr(_INFO_DATA, attr(_BR_VLAN_FILTERING, b"\1"))
    return RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body + attr(_IFLA_LINKINFO, info)


def make_veth(
    name: str, mac: str, peer: str, peer_mac: str, mtu: int, master: int, netns: int | None
) -> Request:
    """Create a veth pair: `name` up and a port of `master` (an index), `peer` in the namespace `netns`.

    `netns` is a descriptor, None for the same namespace. The new link comes with the answer. Each end has one
    queue; left to itself the kernel makes one for each possible processor, and each costs it 15 us.
    """
    other = _ANY_LINK + _name(peer) + _mac(peer_mac) + _mtu(mtu) + _ONE_QUEUE
    if netns is not None:
        other += attr_u32(_IFLA_NET_NS_FD, netns)
    body = _ANY_LINK_UP + _name(name) + _mac(mac) + _mtu(mtu)
    body += _ONE_QUEUE_OF_NO_LENGTH + attr_u32(_IFLA_MASTER, master)
    data = _KIND_VETH + attr(_INFO_DATA, attr(_VETH_PEER, other))
    return RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO, body + attr(_IFLA_LINKINFO, data)


def set_port(name: str, hairpin: bool, isolated: bool) -> Request:
    """Set the flags of a bridge's port."""
    port = attr(_BRPORT_HAIRPIN, bytes([hairpin])) + attr(_BRPORT_ISOLATED, bytes([isolated]))
    info = _KIND_PORT + attr(_INFO_SLAVE_DATA, port)
    return RTM_NEWLINK, 0, _ANY_LINK + _name(name) + attr(_IFLA_LINKINFO, info)


def set_link(ifindex: int, *, up: bool = False, mac: str = "", promiscuous: bool = False) -> Request:
    """Bring a link up, give it a MAC, let it take every frame; what is not named stays."""
    flags = (_IFF_UP if up else 0) | (_IFF_PROMISC if promiscuous else 0)
    return RTM_NEWLINK, 0, _IFINFO.pack(0, 0, ifindex, flags, flags) + _mac(mac)


def start(ifindex: int) -> Request:
    """Bring a link up that has addresses; of IPv4 ones the kernel tells the others on it when its MAC is set.

    That is sysctl net.ipv4.conf.NAME.arp_notify, which takes the way through /proc otherwise.
    """
    return RTM_NEWLINK, 0, _IFINFO.pack(0, 0, ifindex, _IFF_UP, _IFF_UP) + _NOTIFY_BY_ARP


def set_down(ifindex: int) -> Request:
    return RTM_NEWLINK, 0, _IFINFO.pack(0, 0, ifindex, 0, _IFF_UP)


def get_vlans() -> tuple[int, bytes]:
    """Dump the VLANs of all bridge ports."""
    return RTM_GETLINK, _IFINFO.pack(AF_BRIDGE, 0, 0, 0, 0) + attr_u32(_IFLA_EXT_MASK, _BRIDGE_VLANS)


def read_vlans(body: bytes) -> tuple[int, list[int]]:
    """A port's index, and its VLANs."""
    ifindex: int = _IFINFO.unpack_from(body)[2]
    spec = attrs(body, _IFINFO.size).get(_IFLA_AF_SPEC, b"")
    vlans = [struct.unpack("=HH", raw)[1] for kind, raw in attr_list(spec) if kind == _BRIDGE_VLAN_INFO]
    return ifindex, vlans


def add_vlan(ifindex: int, vlan: int, *, untagged: bool) -> Request:
    """Make a port a member of a VLAN; untagged: what comes in without a tag belongs to it as well."""
    return RTM_SETLINK, 0, _vlan(ifindex, vlan, _VLAN_PVID | _VLAN_UNTAGGED if untagged else 0)


def drop_vlan(ifindex: int, vlan: int) -> Request:
    return RTM_DELLINK, 0, _vlan(ifindex, vlan, 0)


def _vlan(ifindex: int, vlan: int, flags: int) -> bytes:
    spec = attr(_IFLA_AF_SPEC, attr(_BRIDGE_VLAN_INFO, struct.pack("=HH", flags, vlan)))
    return _IFINFO.pack(AF_BRIDGE, 0, ifindex, 0, 0) + spec


def _name(name: str) -> bytes:
    return attr(_IFLA_IFNAME, name.encode("utf-8", "surrogateescape") + b"\0")


def _mac(mac: str) -> bytes:
    return attr(_IFLA_ADDRESS, mac_bytes(mac)) if mac else b""


def _mtu(mtu: int) -> bytes:
    return attr_u32(_IFLA_MTU, mtu) if mtu else b""


# ---- addresses


class AddressState:
    """An address of a link as the kernel shows it; `flags` are IFA_F_*."""

    __slots__ = ("cidr", "flags", "ifindex", "is_link_local")

    def __init__(self, body: bytes) -> None:
        family, prefix, flags, scope, self.ifindex = _IFADDR.unpack_from(body)
        found = attrs(body, _IFADDR.size)
        raw = found.get(_IFA_LOCAL) or found[_IFA_ADDRESS]
        self.cidr = Cidr(4 if family == AF_INET else 6, int.from_bytes(raw, "big"), prefix)
        self.flags = _number(found, _IFA_FLAGS) if _IFA_FLAGS in found else flags
        self.is_link_local = scope == _RT_SCOPE_LINK


def get_addresses(family: int, ifindex: int) -> tuple[int, bytes]:
    """Dump the addresses of one link; `family` is 4, 6 or 0 for both."""
    return RTM_GETADDR, _IFADDR.pack(FAMILIES.get(family, 0), 0, 0, 0, ifindex)


def add_address(ifindex: int, cidr: Cidr, *, detect_duplicates: bool = False) -> Request:
    """Give a link an address; an IPv4 one with the broadcast address of its network."""
    raw = _packed(cidr.family, cidr.value)
    flags = _IFA_F_PERMANENT
    if cidr.family == 6 and not detect_duplicates:
        flags |= IFA_F_NODAD
    body = _IFADDR.pack(FAMILIES[cidr.family], cidr.prefix, flags, 0, ifindex)
    body += attr(_IFA_LOCAL, raw) + attr(_IFA_ADDRESS, raw)
    if cidr.family == 4 and cidr.prefix < 31:
        hosts = (1 << 32 - cidr.prefix) - 1
        body += attr(_IFA_BROADCAST, _packed(4, cidr.value | hosts))
    return RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, body


def drop_address(ifindex: int, cidr: Cidr) -> Request:
    raw = _packed(cidr.family, cidr.value)
    body = _IFADDR.pack(FAMILIES[cidr.family], cidr.prefix, 0, 0, ifindex)
    return RTM_DELADDR, 0, body + attr(_IFA_LOCAL, raw) + attr(_IFA_ADDRESS, raw)


def _packed(family: int, value: int) -> bytes:
    return value.to_bytes(4 if family == 4 else 16, "big")


# ---- routes and neighbours


class RouteState:
    """A unicast route as the kernel shows it; `gateway` is (family, value), None without one."""

    __slots__ = ("dst", "gateway", "ifindex", "priority", "scope", "table")

    def __init__(self, body: bytes) -> None:
        family, prefix, _src, _tos, table, _protocol, self.scope, _type, _flags = _RTMSG.unpack_from(body)
        found = attrs(body, _RTMSG.size)
        version = 4 if family == AF_INET else 6
        self.dst = Cidr(version, int.from_bytes(found.get(_RTA_DST, b""), "big"), prefix)
        via = found.get(_RTA_GATEWAY)
        self.gateway = None if via is None else (version, int.from_bytes(via, "big"))
        self.ifindex = _number(found, _RTA_OIF)
        self.priority = _number(found, _RTA_PRIORITY)
        self.table = _number(found, _RTA_TABLE) or table


def get_routes(family: int) -> tuple[int, bytes]:
    """Dump the routes of a family, all tables."""
    return RTM_GETROUTE, _RTMSG.pack(FAMILIES[family], 0, 0, 0, 0, 0, 0, 0, 0)


def add_route(
    ifindex: int,
    dst: Cidr,
    gateway: tuple[int, int] | None,
    priority: int = 0,
    table: int = 0,
    scope: int = 0,
) -> Request:
    """A route by a link; `gateway` is (family, value). Refused if there is the very same one."""
    number = table or RT_TABLE_MAIN
    header = (FAMILIES[dst.family], dst.prefix, 0, 0, number if number < 256 else 0)
    body = _RTMSG.pack(*header, _RTPROT_BOOT, scope, _RTN_UNICAST, 0)
    body += attr(_RTA_DST, _packed(dst.family, dst.value)) + attr_u32(_RTA_OIF, ifindex)
    if gateway:
        body += attr(_RTA_GATEWAY, _packed(*gateway))
    if priority:
        body += attr_u32(_RTA_PRIORITY, priority)
    if number >= 256:
        body += attr_u32(_RTA_TABLE, number)
    return RTM_NEWROUTE, NLM_F_CREATE, body


def get_neighbour(ifindex: int, address: Cidr) -> Request:
    """Ask what a link knows of an address (Linux 5.0); refused if it knows nothing."""
    return _RTM_GETNEIGH, 0, _neighbour(ifindex, address, 0)


def is_reached(body: bytes) -> bool:
    """Whether a neighbour has answered some time, and not failed to since."""
    state: int = _NDMSG.unpack_from(body)[2]
    return not state & (_NUD_INCOMPLETE | _NUD_FAILED)


def drop_neighbour(ifindex: int, address: Cidr) -> Request:
    """Have a link forget what it knows of an address."""
    return _RTM_DELNEIGH, 0, _neighbour(ifindex, address, 0)


def _neighbour(ifindex: int, address: Cidr, state: int) -> bytes:
    body = _NDMSG.pack(FAMILIES[address.family], ifindex, state, 0, 0)
    return body + attr(_NDA_DST, _packed(address.family, address.value))


def put_neighbour(ifindex: int, address: Cidr, mac: str) -> Request:
    """Correct what a link knows of an address's MAC; refused if it knows nothing, and then all is well."""
    body = _neighbour(ifindex, address, _NUD_STALE) + attr(_NDA_LLADDR, mac_bytes(mac))
    return _RTM_NEWNEIGH, NLM_F_REPLACE, body
