"""The links of a pod's namespace as entries, beside those of `cni.net.entries`.

The pod's own interface is found by its index, for it is renamed on the way; its addresses and routes
are entries of the link `POD_NIC`, whatever it is called at the moment.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from cni.net import netlink, nlmsg
from cni.net.entries import Key

POD_NIC = "pod-nic"

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 10, 18
_IFLA_EXT_MASK, _SKIP_STATS = 29, 1 << 3
_INFO_KIND, _INFO_DATA, _INFO_SLAVE_KIND, _INFO_SLAVE_DATA = 1, 2, 4, 5
_BR_FORWARD_DELAY, _BR_STP_STATE, _BR_MCAST_SNOOPING = 1, 5, 23
_BRPORT_LEARNING = 8
_TUN_MULTI_QUEUE = 7

_IFF_NOARP = 0x80

_IFINFO = struct.Struct("=BxHiII")


class Bridge(NamedTuple):
    """A bridge of ours. One that is never up, without ports, holds addresses and a name for others to see.

    Without `arp` the kernel neither asks nor answers who has an address on this bridge.
    """

    name: str
    mac: str
    mtu: int
    up: bool
    arp: bool = True

    @property
    def key(self) -> Key:
        return ("link", self.name)

    @property
    def rank(self) -> int:
        # The holder takes a name that the pod interface has to give up first.
        return -4 if self.up else -2

    @property
    def link(self) -> str:
        return self.name


class Nic(NamedTuple):
    """The pod's interface as it should be called and connected; never made, never deleted."""

    ifindex: int
    name: str
    mac: str
    up: bool
    master: str
    learning: bool

    @property
    def key(self) -> Key:
        return ("nic", str(self.ifindex))

    @property
    def rank(self) -> int:
        return -3

    @property
    def link(self) -> str:
        return POD_NIC


class Tap(NamedTuple):
    """A persistent tap for the virtual machine, owned by the user that runs it."""

    name: str
    mtu: int
    master: str
    up: bool
    multi_queue: bool

    @property
    def key(self) -> Key:
        return ("link", self.name)

    @property
    def rank(self) -> int:
        return -2

    @property
    def link(self) -> str:
        return self.name


class Foreign(NamedTuple):
    """A link that has a name we want and is none of ours."""

    name: str
    kind: str

    @property
    def key(self) -> Key:
        return ("link", self.name)

    @property
    def rank(self) -> int:
        return -2

    @property
    def link(self) -> str:
        return self.name


class Sysctl(NamedTuple):
    """A setting below /proc/sys, such as `net/ipv4/conf/all/arp_ignore`."""

    path: str
    value: str

    @property
    def key(self) -> Key:
        return ("sysctl", self.path)

    @property
    def rank(self) -> int:
        return 0

    @property
    def link(self) -> str:
        return ""


class PodScope(NamedTuple):
    """What to look at: the pod's interface by index, links of ours by name, settings by path."""

    nic: int
    links: tuple[str, ...]
    sysctls: tuple[str, ...]


class PodLink(NamedTuple):
    """A link as the kernel shows it, with what matters in a pod; `master` by index, 0 for none."""

    ifindex: int
    name: str
    mtu: int
    mac: str
    up: bool
    arp: bool
    kind: str
    master: int
    learning: bool
    multi_queue: bool


def get_links() -> tuple[int, bytes]:
    """Ask for every link, without statistics."""
    skip = nlmsg.attr_u32(_IFLA_EXT_MASK, _SKIP_STATS)
    return netlink.RTM_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0) + skip


def read_link(body: bytes) -> PodLink:
    """Decode one RTM_NEWLINK."""
    _af, _type, ifindex, flags, _change = _IFINFO.unpack_from(body)
    found = nlmsg.attrs(body, _IFINFO.size)
    info = nlmsg.attrs(found.get(_IFLA_LINKINFO, b""))
    kind = info.get(_INFO_KIND, b"").rstrip(b"\0").decode()
    data = nlmsg.attrs(info.get(_INFO_DATA, b"")) if kind == "tun" else {}
    port = nlmsg.attrs(info.get(_INFO_SLAVE_DATA, b""))
    return PodLink(
        ifindex=ifindex,
        # The kernel takes nearly any bytes as a name; a link of somebody else must not stop us.
        name=found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode("utf-8", "backslashreplace"),
        mtu=struct.unpack("=I", found.get(_IFLA_MTU, b"\0\0\0\0"))[0],
        mac=nlmsg.mac_text(found.get(_IFLA_ADDRESS, b"")),
        up=bool(flags & netlink.IFF_UP),
        arp=not flags & _IFF_NOARP,
        kind=kind,
        master=struct.unpack("=I", found.get(_IFLA_MASTER, b"\0\0\0\0"))[0],
        learning=port.get(_BRPORT_LEARNING, b"\1") != b"\0",
        multi_queue=data.get(_TUN_MULTI_QUEUE, b"\0") != b"\0",
    )


Request = tuple[int, int, bytes]


def make_bridge(bridge: Bridge) -> Request:
    """Create a bridge that forwards at once and to everybody: no spanning tree, no delay, no snooping."""
    data = nlmsg.attr_u32(_BR_FORWARD_DELAY, 0) + nlmsg.attr_u32(_BR_STP_STATE, 0)
    data += nlmsg.attr(_BR_MCAST_SNOOPING, b"\0")
    info = nlmsg.attr(_INFO_KIND, b"bridge\0") + nlmsg.attr(_INFO_DATA, data)
    body = _IFINFO.pack(0, 0, 0, 0, 0) + nlmsg.attr(_IFLA_IFNAME, bridge.name.encode() + b"\0")
    body += nlmsg.attr(_IFLA_ADDRESS, nlmsg.mac_bytes(bridge.mac))
    body += nlmsg.attr_u32(_IFLA_MTU, bridge.mtu) + nlmsg.attr(_IFLA_LINKINFO, info)
    return netlink.RTM_NEWLINK, nlmsg.NLM_F_CREATE | nlmsg.NLM_F_EXCL, body


def change(
    ifindex: int,
    *,
    name: str | None = None,
    mac: str | None = None,
    mtu: int | None = None,
    master: int | None = None,
    up: bool | None = None,
    arp: bool | None = None,
) -> Request:
    """Change a link in place; what is None stays."""
    mask = (netlink.IFF_UP if up is not None else 0) | (_IFF_NOARP if arp is not None else 0)
    flags = (netlink.IFF_UP if up else 0) | (_IFF_NOARP if arp is False else 0)
    body = _IFINFO.pack(0, 0, ifindex, flags, mask)
    if name is not None:
        body += nlmsg.attr(_IFLA_IFNAME, name.encode() + b"\0")
    if mac is not None:
        body += nlmsg.attr(_IFLA_ADDRESS, nlmsg.mac_bytes(mac))
    if mtu is not None:
        body += nlmsg.attr_u32(_IFLA_MTU, mtu)
    if master is not None:
        body += nlmsg.attr_u32(_IFLA_MASTER, master)
    return netlink.RTM_NEWLINK, 0, body


def set_learning(ifindex: int, learning: bool) -> Request:
    """Whether the bridge learns from frames that come in by this port."""
    data = nlmsg.attr(_BRPORT_LEARNING, bytes([learning]))
    info = nlmsg.attr(_INFO_SLAVE_KIND, b"bridge\0") + nlmsg.attr(_INFO_SLAVE_DATA, data)
    return netlink.RTM_NEWLINK, 0, _IFINFO.pack(0, 0, ifindex, 0, 0) + nlmsg.attr(_IFLA_LINKINFO, info)


def delete(ifindex: int) -> Request:
    return netlink.RTM_DELLINK, 0, _IFINFO.pack(0, 0, ifindex, 0, 0)
