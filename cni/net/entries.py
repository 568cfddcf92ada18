"""Kernel objects as values: link, address, neighbour, FDB entry, route.

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
        """Name of the link the entry lives on."""
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
    """A link of ours. `mtu` in bytes; `mac` empty leaves the choice to the kernel."""

    name: str
    mtu: int
    mac: str
    up: bool
    vxlan: Vxlan

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


class FdbEntry(NamedTuple):
    """A permanent entry of a VXLAN device's own forwarding database: `mac` sits behind `dst`."""

    link: str
    mac: str
    dst: str

    @property
    def key(self) -> Key:
        return ("fdb", self.link, self.mac, self.dst)

    @property
    def rank(self) -> int:
        return 3


class Route(NamedTuple):
    """A unicast route of the main table; `via` empty means on-link, `metric` 0 is the IPv4 default."""

    link: str
    dst: str
    via: str
    onlink: bool = False
    metric: int = 0

    @property
    def key(self) -> Key:
        return ("route", self.dst, str(self.metric))

    @property
    def rank(self) -> int:
        return 4


def state(entries: Iterable[Entry]) -> dict[Key, Entry]:
    """Index entries by key; of two with the same key the later one stays."""
    return {entry.key: entry for entry in entries}
