"""What counts as a collision of the cluster's network with the host, and what does not."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network

import pytest

from cni.errors import ConfigError
from cni.net.netlink import AddressInfo, LinkInfo, RouteInfo
from flanneld.iface import ExternalInterface
from flanneld.lease import Attributes, Lease
from flanneld.overlap import check_routes, check_underlay

NETWORK = IPv4Network("10.244.0.0/16")
NETWORK6 = IPv6Network("fd00:10:244::/48")
EXTERNAL = ExternalInterface(
    "eth0", 1500, IPv4Address("192.0.2.1"), None, IPv4Address("192.0.2.1"), None, "--iface=eth0 names it"
)
NAMES = {1: "lo", 2: "eth0", 3: "eth1", 4: "cni0", 5: "flannel.1", 6: "flannel-v6.1"}
LINKS = [LinkInfo(index, name, 1500, "", True, "", None, 0) for index, name in NAMES.items()]
INDEX = {name: index for index, name in NAMES.items()}
OWN = Lease(IPv4Network("10.244.1.0/24"), IPv6Network("fd00:10:244:1::/64"), Attributes())
PEERS = [Lease(IPv4Network("10.244.2.0/24"), IPv6Network("fd00:10:244:2::/64"), Attributes())]


def address(dev: str, text: str) -> AddressInfo:
    plain, _, length = text.partition("/")
    return AddressInfo(INDEX[dev], plain, int(length), 0, 0)


def route(dst: str, dev: str = "", via: str = "", kind: int = 1, protocol: int = 3) -> RouteInfo:
    return RouteInfo(INDEX.get(dev, 0), dst, via, "", 254, protocol, kind, 0, False)


def underlay(network: IPv4Network | IPv6Network, *addresses: AddressInfo) -> None:
    check_underlay(network, EXTERNAL, LINKS, addresses)


def routes(network: IPv4Network | IPv6Network, *found: RouteInfo) -> None:
    check_routes(network, OWN, PEERS, found, NAMES, "eth0")


@pytest.mark.parametrize("text", ["10.244.7.1/24", "10.244.0.1/16", "10.9.9.9/8", "10.244.255.255/32"])
def test_the_underlay_must_lie_outside_of_the_network(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        underlay(NETWORK, address("eth0", text))
    for word in (str(NETWORK), str(ip_network(text, strict=False)), "eth0", "--iface"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_collision_with_the_underlay() -> None:
    underlay(NETWORK, address("eth0", "10.243.255.1/24"), address("eth0", "10.245.0.1/24"))
    underlay(NETWORK, address("eth0", "fd00:10:244::1/48"), address("eth0", "192.0.2.1/24"))
    # An earlier start's device, and the pods' bridge.
    underlay(NETWORK, address("flannel.1", "10.244.1.0/32"), address("cni0", "10.244.1.1/24"))
    underlay(NETWORK6, address("eth0", "fe80::1/64"), address("eth0", "2001:db8::1/64"))


def test_the_underlay_must_lie_outside_of_the_ipv6_network() -> None:
    with pytest.raises(ConfigError, match="fd00:10:244:7::/64"):
        underlay(NETWORK6, address("eth0", "fd00:10:244:7::1/64"))


COLLISIONS = {
    "part of it, on a link": route("10.244.7.0/24", "eth1"),
    "part of it, through a gateway": route("10.244.7.0/24", "eth1", "192.0.2.9"),
    "all of it": route("10.244.0.0/16", "eth1", "192.0.2.9"),
    "one host": route("10.244.7.9/32", "eth1"),
    "a wider link": route("10.0.0.0/8", "eth1"),
    "the kernel's own route of a link": route("10.244.7.0/24", "eth1", protocol=2),
    "around our own subnet": route("10.244.0.0/23", "eth1"),
    "the half of a lease": route("10.244.2.0/25", "eth1"),
    "several gateways": route("10.244.7.0/24"),
}


@pytest.mark.parametrize("case", COLLISIONS)
def test_a_route_into_the_network_is_a_collision(case: str) -> None:
    found = COLLISIONS[case]
    with pytest.raises(ConfigError) as caught:
        routes(NETWORK, found)
    text = str(caught.value)
    assert f"{NETWORK} overlaps the host's route {found.dst}" in text
    remedy = text.partition("run: ")[2]
    expected = f"ip route del {found.dst}"
    expected += f" via {found.via}" if found.via else ""
    expected += f" dev {NAMES[found.ifindex]}" if found.ifindex else ""
    assert remedy == expected


HARMLESS = {
    "elsewhere": route("192.0.2.0/24", "eth0"),
    "a wider one through a gateway": route("10.0.0.0/8", "eth1", "192.0.2.9"),
    "the default route": route("0.0.0.0/0", "eth0", "192.0.2.254"),
    "the default route of a point-to-point link": route("0.0.0.0/0", "eth1"),
    "the default route of several gateways": route("0.0.0.0/0"),
    "a wider one of several gateways": route("10.0.0.0/8"),
    "our own subnet": route("10.244.1.0/24", "cni0"),
    "in our own subnet": route("10.244.1.7/32", "cni0"),
    "the subnet of a lease, by another backend": route("10.244.2.0/24", "eth0", "192.0.2.2"),
    "an earlier start's": route("10.244.9.0/24", "flannel.1", "10.244.9.0"),
    "a direct route by an earlier external interface": route(
        "10.244.9.0/24", "eth1", "198.51.100.9", protocol=241
    ),
    "a subnet that host-gw left behind": route("10.244.9.0/24", "eth0", "192.0.2.9"),
    "the pods' bridge with an earlier lease": route("10.244.9.0/24", "cni0", protocol=2),
    "a blackhole": route("10.244.0.0/16", kind=6),
    "of the other family": route("fd00:10:244::/48", "eth1"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_no_collision(case: str) -> None:
    routes(NETWORK, HARMLESS[case])


def test_ipv6_is_judged_by_the_same_rules() -> None:
    routes(NETWORK6, route("::/0", "eth1"), route("fd00::/8", "eth1", "fe80::1"))
    routes(NETWORK6, route("fd00:10:244:1::/64", "cni0"), route("fd00:10:244:2::/64", "eth0", "fe80::2"))
    routes(NETWORK6, route("fd00:10:244:9::/64", "flannel-v6.1"), route("10.244.7.0/24", "eth1"))
    with pytest.raises(ConfigError, match="fd00:10:244:7::/64 dev eth1"):
        routes(NETWORK6, route("fd00:10:244:7::/64", "eth1"))
