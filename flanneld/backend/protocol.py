"""The seam between the daemon and the ways in which pod traffic travels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from cni.errors import ConfigError
from cni.net.entries import Entry, Link, NetState, state
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


def desired(backend: Backend, own: Lease, peers: Iterator[Lease]) -> NetState:
    """The whole kernel state that reaches every peer from `own`."""
    entries: list[Entry] = list(backend.base(own))
    for peer in peers:
        entries += backend.peer(peer)
    return state(entries)


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
