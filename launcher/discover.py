"""The pod's interface as the CNI plugins left it: what the virtual machine is going to be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)

from cni.errors import ConfigError
from cni.net import netlink
from cni.net.netlink import AddressInfo, RouteInfo
from cni.net.podlinks import PodLink
from launcher.dhcp.options import mac_address

Interface = IPv4Interface | IPv6Interface
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class PodRoute:
    """A route of the main table over the pod's interface; `via` None is on-link.

    `connected` ones come and go with an address; the kernel made them.
    """

    dst: Network
    via: Address | None
    metric: int = 0
    onlink: bool = False
    connected: bool = False


@dataclass(frozen=True, slots=True)
class PodInterface:
    """Name, index, MAC, MTU in bytes, addresses (kernel order, no IPv6 link-local ones) and routes."""

    name: str
    ifindex: int
    mac: str
    mtu: int
    addresses: tuple[Interface, ...]
    routes: tuple[PodRoute, ...]

    @property
    def ipv4(self) -> IPv4Interface | None:
        """The first global IPv4 address; None in a pod without IPAM."""
        return next((a for a in self.addresses if isinstance(a, IPv4Interface) and _global(a)), None)

    @property
    def ipv6(self) -> IPv6Interface | None:
        """The first global IPv6 address."""
        return next((a for a in self.addresses if isinstance(a, IPv6Interface) and _global(a)), None)

    def gateway(self, version: int) -> Address | None:
        """The next hop of the default route; None without one, or when it is on-link."""
        for route in self.routes:
            if route.dst.version == version and route.dst.prefixlen == 0:
                return route.via
        return None


def _global(address: Interface) -> bool:
    """Go's "global unicast", by which upstream decides whether a pod has an address: private ones count."""
    ip = address.ip
    return not (ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified)


def find(links: Sequence[PodLink], routes: Iterable[RouteInfo], name: str) -> PodLink:
    """The pod's interface: the one called `name`, or the one with the default route if that is empty.

    Raises ConfigError naming what is there instead.
    """
    candidates = ", ".join(link.name for link in links if link.name != "lo") or "none but lo"
    if name:
        for link in links:
            if link.name == name:
                return _suitable(link, links)
        raise ConfigError(f"--interface={name}: no such interface in this namespace; there is {candidates}")
    defaults = (r for r in routes if r.dst in ("0.0.0.0/0", "::/0") and r.kind == netlink.RTN_UNICAST)
    index = next((r.ifindex for r in defaults if r.ifindex), 0)
    for link in links:
        if link.ifindex == index:
            return _suitable(link, links)
    raise ConfigError(f"no interface has the default route; name one with --interface ({candidates})")


def _suitable(link: PodLink, links: Sequence[PodLink]) -> PodLink:
    try:
        mac_address(link.mac)
    except ValueError:
        raise ConfigError(
            f"{link.name} has the MAC {link.mac or '(none)'}: only an Ethernet interface can be handed over"
        ) from None
    if link.master:
        master = next((other.name for other in links if other.ifindex == link.master), "another link")
        raise ConfigError(f"{link.name} is a port of {master} already: another program handed it over")
    return link


def discover(link: PodLink, addresses: Iterable[AddressInfo], routes: Iterable[RouteInfo]) -> PodInterface:
    """The record of one interface from what the kernel shows."""
    kept = []
    for info in addresses:
        ip = ip_address(info.address)
        if info.ifindex == link.ifindex and not (ip.version == 6 and ip.is_link_local):
            kept.append(ip_interface(f"{info.address}/{info.length}"))
    return PodInterface(
        name=link.name,
        ifindex=link.ifindex,
        mac=link.mac,
        mtu=link.mtu,
        addresses=tuple(kept),
        routes=tuple(_route(r) for r in routes if r.ifindex == link.ifindex and _usable(r)),
    )


def _usable(route: RouteInfo) -> bool:
    network = ip_network(route.dst)
    own_affair = network.version == 6 and (network.is_link_local or network.is_multicast)
    return route.kind == netlink.RTN_UNICAST and not own_affair and route.protocol != netlink.RTPROT_RA


def _route(info: RouteInfo) -> PodRoute:
    return PodRoute(
        dst=ip_network(info.dst),
        via=ip_address(info.via) if info.via else None,
        metric=info.metric,
        onlink=info.onlink,
        connected=info.protocol == netlink.RTPROT_KERNEL,
    )


@dataclass(frozen=True, slots=True)
class NetworkStatus:
    """One entry of the annotation `k8s.v1.cni.cncf.io/network-status`, as far as it matters here."""

    name: str
    interface: str
    default: bool


def network_status(text: str) -> tuple[NetworkStatus, ...]:
    """Read the annotation; raises ConfigError if it is not a JSON list of objects."""
    try:
        entries = json.loads(text)
        return tuple(
            NetworkStatus(str(e.get("name", "")), str(e.get("interface", "")), e.get("default") is True)
            for e in entries
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as exc:
        raise ConfigError(
            f"the network status {text[:60]!r} is not a JSON list such as "
            f'[{{"name": "cbr0", "interface": "eth0", "default": true}}]: {exc}'
        ) from None


def primary(status: Iterable[NetworkStatus]) -> str:
    """The interface of the network marked as default; empty if none is."""
    return next((entry.interface for entry in status if entry.default), "")
