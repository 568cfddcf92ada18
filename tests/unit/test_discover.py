"""The pod's interface from what the kernel shows, and the annotation that names it."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import ConfigError
from cni.net import netlink
from cni.net.netlink import AddressInfo, RouteInfo
from cni.net.podlinks import PodLink
from launcher.discover import NetworkStatus, PodRoute, discover, find, network_status, primary

MAC = "12:34:56:78:90:ab"
UNREACHABLE, BOOT = 7, 3


def link(index: int, name: str, mac: str = MAC, master: int = 0) -> PodLink:
    return PodLink(index, name, 1450, mac, True, True, "veth", master, True, False)


LO = link(1, "lo", "00:00:00:00:00:00")
ETH0, NET1 = link(2, "eth0"), link(3, "net1")


def route(dst: str, via: str = "", index: int = 2, **fields: object) -> RouteInfo:
    made = RouteInfo(index, dst, via, "", 254, BOOT, netlink.RTN_UNICAST, 0, onlink=False)
    return made._replace(**fields)  # type: ignore[arg-type]


def address(text: str, index: int = 2) -> AddressInfo:
    ip, _, length = text.partition("/")
    return AddressInfo(index, ip, int(length), 0, 0x80)


# ---- which interface


def test_the_interface_with_the_default_route() -> None:
    routes = [route("10.0.0.0/8", index=2), route("0.0.0.0/0", "10.0.0.1", 3)]
    assert find([LO, ETH0, NET1], routes, "") == NET1
    assert find([LO, ETH0, NET1], [route("::/0", "fe80::1", 2)], "") == ETH0
    assert find([LO, ETH0, NET1], [], "eth0") == ETH0


@pytest.mark.parametrize(
    "routes",
    [
        [],
        [route("10.0.0.0/8")],
        [route("::/0", index=1, kind=UNREACHABLE)],
        [route("0.0.0.0/0", index=0)],
        [route("0.0.0.0/0", "10.0.0.1", index=9)],
    ],
    ids=["none", "no default", "unreachable over lo", "several next hops", "index of no link"],
)
def test_without_a_default_route_one_has_to_be_named(routes: list[RouteInfo]) -> None:
    with pytest.raises(ConfigError, match=r"--interface \(eth0, net1\)"):
        find([LO, ETH0, NET1], routes, "")


def test_a_default_route_that_leads_nowhere_is_passed_over() -> None:
    routes = [route("0.0.0.0/0", index=1, kind=UNREACHABLE), route("0.0.0.0/0", "10.0.0.1", 3)]
    assert find([LO, ETH0, NET1], routes, "") == NET1


@pytest.mark.parametrize(
    ("links", "name", "words"),
    [
        ([LO, ETH0], "eth7", ["--interface=eth7", "there is eth0"]),
        ([LO], "eth0", ["none but lo"]),
        ([LO, ETH0], "lo", ["lo", "00:00:00:00:00:00", "Ethernet"]),
        ([LO, link(4, "tun0", "")], "tun0", ["tun0", "(none)"]),
        ([LO, link(4, "ib0", "80:00:00:00:fe:80:00:00:01:02")], "ib0", ["ib0", "Ethernet"]),
        ([LO, link(2, "eth0", master=5), link(5, "br1")], "eth0", ["eth0 is a port of br1"]),
        ([LO, link(2, "eth0", master=9)], "eth0", ["eth0 is a port of another link"]),
    ],
)
def test_an_interface_that_will_not_do(links: list[PodLink], name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        find(links, [], name)
    assert all(word in str(caught.value) for word in words)


# ---- what it has


def test_everything_of_one_interface_and_nothing_of_others() -> None:
    addresses = [
        address("127.0.0.1/8", 1),
        address("10.244.1.7/24"),
        address("10.244.1.8/24"),
        address("192.168.1.1/24", 3),
        address("fd00::7/64"),
        address("fe80::1/64"),
    ]
    routes = [
        route("0.0.0.0/0", "10.244.1.1"),
        route("10.244.1.0/24", protocol=netlink.RTPROT_KERNEL),
        route("10.96.0.0/12", "10.244.1.2", metric=50, onlink=True),
        route("192.168.0.0/16", "192.168.1.2", 3),
        route("fe80::/64"),
        route("ff00::/8"),
        route("2001:db8::/32", kind=UNREACHABLE),
        route("::/0", "fe80::99", protocol=netlink.RTPROT_RA),
        route("fd01::/64", "fe80::5", metric=1024),
    ]
    pod = discover(ETH0, addresses, routes)
    assert (pod.name, pod.ifindex, pod.mac, pod.mtu) == ("eth0", 2, MAC, 1450)
    assert list(map(str, pod.addresses)) == ["10.244.1.7/24", "10.244.1.8/24", "fd00::7/64"]
    assert pod.routes == (
        PodRoute(ip_network("0.0.0.0/0"), ip_address("10.244.1.1")),
        PodRoute(ip_network("10.244.1.0/24"), None, connected=True),
        PodRoute(ip_network("10.96.0.0/12"), ip_address("10.244.1.2"), 50, onlink=True),
        PodRoute(ip_network("fd01::/64"), ip_address("fe80::5"), 1024),
    )
    assert pod.gateway(4) == IPv4Address("10.244.1.1")
    # A router that advertises reaches the guest itself.
    assert pod.gateway(6) is None


@pytest.mark.parametrize(
    ("addresses", "ipv4", "ipv6"),
    [
        ([], None, None),
        (["fe80::1/64"], None, None),
        (["169.254.1.1/16"], None, None),
        (["127.0.0.5/8", "::1/128"], None, None),
        (["169.254.1.1/16", "10.0.0.5/32"], "10.0.0.5/32", None),
        (["192.168.0.5/24", "10.0.0.5/8"], "192.168.0.5/24", None),
        (["fd00::5/64", "2001:db8::5/64"], None, "fd00::5/64"),
        (["100.64.0.5/10", "2001:db8::5/128"], "100.64.0.5/10", "2001:db8::5/128"),
    ],
)
def test_the_first_global_address_counts(addresses: list[str], ipv4: str | None, ipv6: str | None) -> None:
    pod = discover(ETH0, [address(text) for text in addresses], [])
    assert pod.ipv4 == (IPv4Interface(ipv4) if ipv4 else None)
    assert pod.ipv6 == (IPv6Interface(ipv6) if ipv6 else None)


@pytest.mark.parametrize(
    ("routes", "gateways"),
    [
        ([], (None, None)),
        ([route("0.0.0.0/0")], (None, None)),
        ([route("0.0.0.0/0", "169.254.1.1"), route("169.254.1.1/32")], ("169.254.1.1", None)),
        ([route("10.0.0.0/8", "10.0.0.1"), route("::/0", "fe80::1")], (None, "fe80::1")),
        ([route("0.0.0.0/0", "10.0.0.1"), route("0.0.0.0/0", "10.0.0.2", metric=9)], ("10.0.0.1", None)),
    ],
)
def test_gateways(routes: list[RouteInfo], gateways: tuple[str | None, str | None]) -> None:
    pod = discover(ETH0, [], routes)
    expected = tuple(ip_address(text) if text else None for text in gateways)
    assert (pod.gateway(4), pod.gateway(6)) == expected
    assert not isinstance(pod.gateway(4), IPv6Address)


# ---- the annotation


def test_network_status() -> None:
    text = """[
      {"name": "kube-system/cni", "interface": "cust0", "ips": ["10.1.1.1"], "default": true, "dns": {}},
      {"name": "red", "interface": "podb1f51a511f1"},
      {"name": "odd", "default": "true"}
    ]"""
    found = network_status(text)
    assert found == (
        NetworkStatus("kube-system/cni", "cust0", default=True),
        NetworkStatus("red", "podb1f51a511f1", default=False),
        NetworkStatus("odd", "", default=False),
    )
    assert primary(found) == "cust0"
    assert primary(found[1:]) == ""
    assert network_status("[]") == ()


@pytest.mark.parametrize("text", ["", "{", "null", "5", '{"a": 1}', "[1]", '["x"]', "[null]", "[" * 100_000])
def test_an_annotation_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        network_status(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@given(st.text(max_size=80))
def test_any_text_is_a_status_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        network_status(text)
