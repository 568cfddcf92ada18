"""The seam between the daemon and the ways in which pod traffic travels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

from cni.errors import ConfigError
from cni.net.entries import Blackhole, Entry, Key, Link, NetState, state
from cni.net.plan import Scope
from flanneld.config import NetConf
from flanneld.lease import Attributes, Lease

# Upstream's table of backends, and which of them exist here.
KNOWN = ("vxlan", "host-gw", "udp", "ipip", "wireguard", "ipsec", "extension", "alloc", "tencent-vpc")
AVAILABLE = ("vxlan",)


class Backend(Protocol):
    """One way to carry pod traffic between nodes: computes, never acts."""

    @property
    def kind(self) -> str:
        """As written in net-conf.json and in leases: `vxlan`."""
        ...

    @property
    def mtu(self) -> int:
        """MTU for pods, in bytes, as published in subnet.env."""
        ...

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the links that this backend owns."""
        ...

    @property
    def follows_routes(self) -> bool:
        """Whether the host's routes decide how a peer is reached."""
        ...

    def scope(self, config: NetConf) -> Scope:
        """Which kernel entries are this backend's to see and to drop."""
        ...

    def attributes(self, stored: Lease | None, existing: NetState) -> Attributes:
        """What to publish, given our lease in the store and what the kernel holds now.

        Identity survives restarts: an existing device keeps its MAC, else the published one is kept.
        """
        ...

    def base(self, own: Lease) -> Iterator[Entry]:
        """Links and addresses that this node needs whoever its peers are."""
        ...

    def peer(self, peer: Lease) -> Iterator[Entry]:
        """What reaches one peer; nothing for a lease that this backend cannot use."""
        ...


class Clash(NamedTuple):
    """An entry that a lease asks for and does not get: another lease has its place, with other words."""

    entry: Entry
    loser: str
    winner: str


def merge(
    base: Sequence[Entry], peers: Mapping[str, Sequence[Entry]]
) -> tuple[dict[Key, Entry], list[Clash]]:
    """One state out of what the node itself and each peer (by lease key) ask for.

    Where two ask for the same entry in different words (two nodes with one VTEP MAC), the lease with the
    lower key gets it: the same one at every pass and on every node.
    """
    entries = [*base, *chain.from_iterable(peers.values())]
    wanted = state(entries)
    if len(wanted) == len(entries):
        return wanted, []
    wanted, owners, clashes = {}, dict[Key, str](), list[Clash]()
    for lease, asked in [("", base), *sorted(peers.items())]:
        for entry in asked:
            key = entry.key
            if wanted.setdefault(key, entry) != entry:
                clashes.append(Clash(entry, lease, owners[key]))
            owners.setdefault(key, lease)
    return wanted, clashes


def desired(backend: Backend, own: Lease, peers: Iterable[Lease]) -> NetState:
    """The whole kernel state that reaches every peer from `own`."""
    return merge(list(backend.base(own)), {peer.key: tuple(backend.peer(peer)) for peer in peers})[0]


def blackholes(config: NetConf, own: Lease) -> tuple[Blackhole, ...]:
    """For --ip-blackhole-route: what drops packets to our own subnets that no better route takes."""
    families = ((config.enable_ipv4, own.subnet), (config.enable_ipv6, own.subnet6))
    return tuple(Blackhole(str(subnet)) for enabled, subnet in families if enabled and subnet)


def existing_links(existing: NetState) -> dict[str, Link]:
    """The links of a kernel state by name."""
    return {entry.name: entry for entry in existing.values() if isinstance(entry, Link)}


def check_kind(kind: str, source: str) -> None:
    """Raise ConfigError unless the backend type is one that exists here."""
    if kind in AVAILABLE:
        return
    hint = f"use {' or '.join(AVAILABLE)}"
    if kind in KNOWN:
        raise ConfigError(f"{source}: Backend.Type {kind!r} is not available in this version yet; {hint}")
    example = "" if kind else ', as in "Backend": {"Type": "vxlan"}'
    raise ConfigError(f"{source}: unknown Backend.Type {kind!r}; {hint}{example}")
