"""Does the cluster's network collide with what the host already routes?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network

from cni.errors import ConfigError
from cni.net.netlink import RTN_UNICAST, RTPROT_FLANNEL, AddressInfo, LinkInfo, RouteInfo
from flanneld.iface import ExternalInterface
from flanneld.lease import Lease

DEFAULT_BRIDGE = "cni0"  # what the CNI plugin `bridge` makes unless it is told otherwise

Network = IPv4Network | IPv6Network


def check_underlay(
    network: Network, external: ExternalInterface, links: Sequence[LinkInfo], addresses: Iterable[AddressInfo]
) -> None:
    """Raise ConfigError if `network` overlaps the external interface's own subnets.

    Nodes would then be looked for behind each other's VTEPs, and the tunnel would swallow itself.
    """
    index = next((link.ifindex for link in links if link.name == external.name), 0)
    for info in addresses:
        if info.ifindex != index:
            continue
        underlay = ip_network(f"{info.address}/{info.length}", strict=False)
        if _overlap(network, underlay):
            raise ConfigError(
                f"Network {network} overlaps {underlay} of the external interface {external.name}: "
                "nodes could not reach each other; choose another Network, or another interface with --iface"
            )


def check_routes(
    network: Network,
    own: Lease,
    peers: Iterable[Lease],
    routes: Iterable[RouteInfo],
    names: Mapping[int, str],
    external: str,
) -> None:
    """Raise ConfigError if a route of the host leads part of `network` somewhere else.

    Not a collision: a default route, or a wider one through gateways (ours are more specific and win);
    what lies in our own subnet (the pods' bridge); the subnet of a lease (it is ours to take over);
    flannel's own links; the pods' bridge with the subnet of an earlier lease; a route that we marked
    on whatever was the external interface then; and a subnet as long as ours through a gateway on the
    external interface, as upstream leaves it behind (host-gw, DirectRouting).
    """
    mine = own.subnet if network.version == 4 else own.subnet6
    leased = {str(p.subnet if network.version == 4 else p.subnet6) for p in peers}
    for route in routes:
        name = names.get(route.ifindex, "")
        dst = ip_network(route.dst)
        if route.kind != RTN_UNICAST or not _overlap(network, dst) or name.startswith("flannel"):
            continue
        if route.protocol == RTPROT_FLANNEL:
            continue
        # A route of several next hops names no single gateway and no link.
        gatewayed = bool(route.via) or not name
        wider = dst.prefixlen < network.prefixlen and (gatewayed or dst.prefixlen == 0)
        if wider or str(dst) in leased or (mine and _within(dst, mine)) or name == DEFAULT_BRIDGE:
            continue
        if route.via and name == external and mine and dst.prefixlen == mine.prefixlen:
            continue
        where = f"{dst}{f' via {route.via}' if route.via else ''}{f' dev {name}' if name else ''}"
        raise ConfigError(
            f"Network {network} overlaps the host's route {where}: pods of other nodes with these "
            f"addresses would be unreachable; choose another Network, or run: ip route del {where}"
        )


def _overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)


def _within(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]
