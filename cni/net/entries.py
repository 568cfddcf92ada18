"""Kernel objects as values: link, address, neighbour, FDB entry, route, blackhole.

Equal entries need no work; equal keys mean "replace". Addresses, prefixes and MACs are text in the
form the kernel's tools print (RFC 5952, lower case), so that two entries compare without parsing.

Decision: these are named tuples, not dataclasses. A node of a large cluster holds tens of thousands
of them; tuples are made, compared and hashed in C, and the CNI plugin can import this module
without paying for `dataclasses`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

Key = tuple[str, ...]

# Above the metric of any other route, so that a blackhole never stands in the way of one that leads
# somewhere: the pods' bridge has a route of the very same prefix, with the lowest metric there is.
BLACKHOLE_METRIC = 0x7FFFFFFF


class Entry(Protocol):
    """One kernel object."""

    @property
    def key(self) -> Key:
        """Identity within the kernel: an entry with the same key takes this one's place."""
        ...

    @property
    def rank(self) -> int:
        """Dependency order: links 0, addresses 1, neighbours 2, FDB entries 3, routes 4."""
        ...

    @property
    def link(self) -> str:
        """Name of the link the entry lives on, empty for none."""
        ...


NetState = Mapping[Key, Entry]


class Vxlan(NamedTuple):
    """What makes a VXLAN device; fixed once the device exists.

    `port` is the UDP destination port, `local` the source address of outer packets, `underlay` the
    name of the link they leave by.
    """

    vni: int
    port: int
    local: str
    underlay: str
    gbp: bool = False
    learning: bool = False


class Link(NamedTuple):
    """A link of ours. `mtu` in bytes; `mac` empty leaves the choice to the kernel.

    `tx_checksum` is whether the stack leaves the checksums of what is sent through the link to the
    hardware below it; None leaves it as it is.
    """

    name: str
    mtu: int
    mac: str
    up: bool
    vxlan: Vxlan
    tx_checksum: bool | None = None

    @property
    def key(self) -> Key:
        return ("link", self.name)

    @property
    def rank(self) -> int:
        return 0

    @property
    def link(self) -> str:
        return self.name

    def same_device(self, other: Link) -> bool:
        """Whether the kernel can turn `other` into this link without making a new one."""
        return self.vxlan == other.vxlan


class Address(NamedTuple):
    """An address of a link, `10.244.1.0/32`."""

    link: str
    address: str

    @property
    def key(self) -> Key:
        return ("address", self.link, self.address)

    @property
    def rank(self) -> int:
        return 1


class Neighbour(NamedTuple):
    """A permanent neighbour: `address` is reached at `mac`."""

    link: str
    address: str
    mac: str

    @property
    def key(self) -> Key:
        return ("neighbour", self.link, self.address)

    @property
    def rank(self) -> int:
        return 2


_ANY_MAC = "00:00:00:00:00:00"


class FdbEntry(NamedTuple):
    """A permanent entry of a VXLAN device's own forwarding database: `mac` sits behind `dst`.

    A unicast MAC sits behind one address; a multicast one, and the zeros that stand for every unknown
    MAC, behind any number.
    """

    link: str
    mac: str
    dst: str

    @property
    def key(self) -> Key:
        if self.mac[1] in "13579bdf" or self.mac == _ANY_MAC:
            return ("fdb", self.link, self.mac, self.dst)
        return ("fdb", self.link, self.mac)

    @property
    def rank(self) -> int:
        return 3


class Route(NamedTuple):
    """A unicast route of the main table; `via` empty means on-link, `metric` 0 is the IPv4 default.

    `marked` routes carry our protocol number: so they are known for ours on a link that is not.
    """

    link: str
    dst: str
    via: str
    onlink: bool = False
    metric: int = 0
    marked: bool = False

    @property
    def key(self) -> Key:
        return ("route", self.dst, str(self.metric))

    @property
    def rank(self) -> int:
        return 4


class Blackhole(NamedTuple):
    """A route of the main table that drops what no better route takes."""

    dst: str
    metric: int = BLACKHOLE_METRIC

    @property
    def key(self) -> Key:
        return ("blackhole", self.dst, str(self.metric))

    @property
    def rank(self) -> int:
        return 4

    @property
    def link(self) -> str:
        return ""


def state(entries: Iterable[Entry]) -> dict[Key, Entry]:
    """Index entries by key; of two with the same key the later one stays."""
    return {entry.key: entry for entry in entries}
