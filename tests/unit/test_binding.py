"""What a hand-over plans, in the cases of KubeVirt's own tests.

Where it is meant to differ: the holder of the pod's name and addresses is a bridge without ports, not a
dummy; the bridge has ARP switched off instead of arp_ignore; the server's address is always 169.254.75.10;
an IPv6 link-local address is the kernel's affair and not held.
"""

from __future__ import annotations

from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_network,
)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import ConfigError
from cni.net.entries import Address, Entry, NetState, Route
from cni.net.plan import plan
from cni.net.podlinks import POD_NIC, Bridge, Nic, Sysctl, Tap
from launcher.binding import Handover, Names, Wishes, derived_mac, dispensable, plan_handover, sysctls
from launcher.discover import PodInterface, PodRoute
from launcher.settings import Settings, dhcp6_lease, dhcp_lease, guest_mac, router

MAC = "12:34:56:78:90:ab"
V4, V6 = IPv4Interface("10.222.222.1/30"), IPv6Interface("fd00:10:244:1::7/64")
GATEWAY = IPv4Address("10.222.222.254")


def route(dst: str, via: str = "", **fields: object) -> PodRoute:
    return PodRoute(ip_network(dst), ip_address(via) if via else None, **fields)  # type: ignore[arg-type]


D1_ROUTES = (
    route("0.0.0.0/0", "10.222.222.254"),
    route("10.222.222.0/30", connected=True),
    route("192.168.1.0/24", "10.222.222.254"),
    route("10.222.0.0/16"),
)
D1 = PodInterface("eth0", 7, MAC, 1500, (V4, V6), D1_ROUTES)


def planned(pod: PodInterface, binding: str = "bridge", **wishes: object) -> Handover:
    return plan_handover(pod, Wishes(binding, **wishes))  # type: ignore[arg-type]


def addresses(state: NetState) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in state.values():
        if isinstance(entry, Address):
            found.setdefault(entry.link, []).append(entry.address)
    return found


def settings_of(state: NetState) -> set[Sysctl]:
    return {entry for entry in state.values() if isinstance(entry, Sysctl)}


# ---- names


@pytest.mark.parametrize(
    ("interface", "primary", "names"),
    [
        ("eth0", True, Names("k6t-eth0", "eth0-nic", "tap0")),
        ("net1", False, Names("k6t-net1", "net1-nic", "tap1")),
        ("net12", False, Names("k6t-net12", "net12-nic", "tap12")),
        ("cust-iface", True, Names("k6t-cust-iface", "cust-iface-nic", "tap0")),
        ("pod16477688c0e", False, Names("k6t-16477688c0e", "16477688c0e-nic", "tap16477688c0e")),
        ("podb1f51a511f1", False, Names("k6t-b1f51a511f1", "b1f51a511f1-nic", "tapb1f51a511f1")),
        ("abcdefghijk", True, Names("k6t-abcdefghijk", "abcdefghijk-nic", "tap0")),
    ],
)
def test_names(interface: str, primary: bool, names: Names) -> None:
    assert Names.of(interface, primary) == names


@pytest.mark.parametrize("interface", ["abcdefghijkl", "abcdefghijklmno"])
def test_a_name_without_room_is_refused(interface: str) -> None:
    with pytest.raises(ConfigError, match=f"--interface={interface}: k6t-{interface} .*15 characters"):
        Names.of(interface, primary=True)


# ---- bridge


def test_d1_bridge_with_addresses() -> None:
    made = planned(D1)
    mac = derived_mac(MAC)
    assert made.desired[("link", "k6t-eth0")] == Bridge("k6t-eth0", mac, 1500, up=True, arp=False)
    assert made.desired[("nic", "7")] == Nic(7, "eth0-nic", mac, True, "k6t-eth0", learning=False)
    assert made.desired[("link", "tap0")] == Tap("tap0", 1500, "k6t-eth0", True, multi_queue=False)
    assert made.desired[("link", "eth0")] == Bridge("eth0", MAC, 1500, up=False)
    assert addresses(made.desired) == {"k6t-eth0": ["169.254.75.10/32"], "eth0": [str(V4), str(V6)]}
    assert len(made.desired) == 7
    assert made.guest_mac == MAC
    lease = dhcp_lease(Settings(), D1, made)
    assert lease is not None
    assert (lease.mac, lease.address, lease.mtu) == (MAC, V4, 1500)
    assert lease.server_id == IPv4Address("169.254.75.10")
    assert lease.routers == (GATEWAY,)
    # The gateway is outside of the /30: a host route leads to it.
    assert lease.routes == (
        (IPv4Network("10.222.222.254/32"), None),
        (IPv4Network("0.0.0.0/0"), GATEWAY),
        (IPv4Network("192.168.1.0/24"), GATEWAY),
        (IPv4Network("10.222.0.0/16"), None),
    )


def test_d2_another_name() -> None:
    made = planned(PodInterface("cust-iface", 7, MAC, 1500, (V4,), D1_ROUTES))
    assert {key[1] for key in made.desired if key[0] == "link"} == {"k6t-cust-iface", "tap0", "cust-iface"}
    assert made.desired[("nic", "7")].name == "cust-iface-nic"  # type: ignore[attr-defined]


def test_d3_no_addresses_no_server() -> None:
    pod = PodInterface("eth0", 7, MAC, 1500, (), ())
    made = planned(pod)
    assert addresses(made.desired) == {}
    assert {key for key in made.desired} == {
        ("link", "k6t-eth0"),
        ("nic", "7"),
        ("link", "tap0"),
        ("link", "eth0"),
    }
    assert (made.guest4, made.guest6, made.server4) == (None, None, None)
    assert dhcp_lease(Settings(), pod, made) is None
    assert dhcp6_lease(Settings(), made) is None
    assert router(Settings(), pod, made) is None


def test_d3_only_addresses_that_are_not_global() -> None:
    pod = PodInterface("eth0", 7, MAC, 1500, (IPv4Interface("169.254.9.9/16"),), ())
    made = planned(pod)
    assert made.guest4 is None
    assert addresses(made.desired) == {"eth0": ["169.254.9.9/16"]}


def test_d4_the_mac_asked_for_comes_before_the_pods() -> None:
    pod = PodInterface("eth0", 7, "aa:bb:cc:dd:ee:ff", 1500, (V4,), D1_ROUTES)
    made = planned(pod)
    for asked, expected in (("", "aa:bb:cc:dd:ee:ff"), (MAC, MAC), (MAC.upper(), MAC)):
        assert guest_mac(Settings(mac=asked), made) == expected
        lease = dhcp_lease(Settings(mac=asked), pod, made)
        assert lease is not None and lease.mac == expected


def test_the_bridge_has_the_guests_mtu() -> None:
    """Told nothing, a bridge takes its smallest port's; told more, it would take what the guest cannot."""
    for binding in ("bridge", "masquerade"):
        made = planned(D1, binding, mtu=1400)
        bridge, tap = made.desired[("link", "k6t-eth0")], made.desired[("link", "tap0")]
        assert isinstance(bridge, Bridge) and isinstance(tap, Tap)
        assert bridge.mtu == tap.mtu == made.mtu == 1400
    holder = planned(D1, mtu=1400).desired[("link", "eth0")]
    assert isinstance(holder, Bridge) and holder.mtu == 1500


@pytest.mark.parametrize(("queues", "multi"), [(1, False), (2, True), (256, True)])
def test_several_queues(queues: int, multi: bool) -> None:
    tap = planned(D1, queues=queues).desired[("link", "tap0")]
    assert isinstance(tap, Tap) and tap.multi_queue is multi


def test_the_way_back_starts_with_routes_that_need_no_gateway() -> None:
    """Calico's order in the kernel's dump: the default route comes before the one to its gateway."""
    routes = (
        route("0.0.0.0/0", "169.254.1.1"),
        route("10.5.0.0/16", "169.254.1.1", metric=7),
        route("169.254.1.1/32"),
        route("192.0.2.0/24", "203.0.113.1", onlink=True),
        route("10.222.222.0/30", connected=True),
    )
    undo = planned(PodInterface("eth0", 7, MAC, 1450, (V4, V6), routes)).undo
    expected: list[Entry] = [
        Nic(7, "eth0", MAC, True, "", learning=True),
        Address(POD_NIC, str(V4)),
        Address(POD_NIC, str(V6)),
        Route(POD_NIC, "169.254.1.1/32", ""),
        Route(POD_NIC, "0.0.0.0/0", "169.254.1.1"),
        Route(POD_NIC, "10.5.0.0/16", "169.254.1.1", metric=7),
        Route(POD_NIC, "192.0.2.0/24", "203.0.113.1", onlink=True),
    ]
    assert [op.entry for op in plan(undo, {})] == expected


def test_the_pods_interface_gives_its_name_away_before_the_holder_takes_it() -> None:
    order = [op.entry.key for op in plan(planned(D1).desired, {})]
    assert order.index(("link", "k6t-eth0")) < order.index(("nic", "7")) < order.index(("link", "eth0"))
    assert order.index(("link", "k6t-eth0")) < order.index(("link", "tap0"))
    assert order.index(("link", "eth0")) < order.index(("address", "eth0", str(V4)))


# ---- masquerade


def test_d5_masquerade_with_both_families() -> None:
    made = planned(D1, "masquerade")
    bridge = Bridge("k6t-eth0", "02:00:00:00:00:00", 1500, up=True)
    assert made.desired[("link", "k6t-eth0")] == bridge
    assert addresses(made.desired) == {"k6t-eth0": ["10.0.2.1/24", "fd10:0:2::1/120"]}
    assert settings_of(made.desired) == {
        Sysctl("net/ipv4/ip_forward", "1"),
        Sysctl("net/ipv4/conf/k6t-eth0/route_localnet", "1"),
        Sysctl("net/ipv6/conf/all/forwarding", "1"),
    }
    assert not any(key[0] == "nic" for key in made.desired)
    assert made.scope.nic == 0 and "eth0" not in made.scope.links


@pytest.mark.parametrize(("address", "other"), [(V4, "ipv6"), (V6, "ipv4")])
def test_masquerade_changes_no_setting_of_a_family_that_the_pod_does_not_have(
    address: IPv4Interface | IPv6Interface, other: str
) -> None:
    pod = PodInterface("eth0", 7, MAC, 1500, (address,), ())
    for setting in sysctls("masquerade", "k6t-eth0", pod):
        assert other not in setting.path
    assert sysctls("bridge", "k6t-eth0", pod) == ()


def test_only_the_pods_own_loopback_can_be_done_without() -> None:
    can = [setting.path for setting in sysctls("masquerade", "k6t-eth0", D1) if dispensable(setting)]
    assert can == ["net/ipv4/conf/k6t-eth0/route_localnet"]


@pytest.mark.parametrize("kept", [(V4,), (V6,), (V4, V6)])
def test_d10_what_the_guest_is_told(kept: tuple[IPv4Interface | IPv6Interface, ...]) -> None:
    pod = PodInterface("eth0", 7, MAC, 1410, kept, D1_ROUTES)
    made = planned(pod, "masquerade")
    lease, lease6 = dhcp_lease(Settings(), pod, made), dhcp6_lease(Settings(), made)
    advert = router(Settings(), pod, made)
    assert (lease is not None, lease6 is not None, advert is not None) == (V4 in kept, V6 in kept, V6 in kept)
    if lease:
        assert (lease.mac, lease.address, lease.mtu) == (None, IPv4Interface("10.0.2.2/24"), 1410)
        assert (lease.server_id, lease.routers) == (IPv4Address("10.0.2.1"), (IPv4Address("10.0.2.1"),))
        assert lease.routes == ()
    if lease6 and advert:
        assert lease6.address == IPv6Address("fd10:0:2::2")
        assert made.server6 == IPv6Interface("fd10:0:2::1/120")
        # RFC 4862: addresses are made of a /64 only, this one comes by DHCPv6.
        assert [(p.network, p.on_link, p.autonomous) for p in advert.prefixes] == [
            (IPv6Network("fd10:0:2::/120"), True, False)
        ]
        assert advert.mac == "02:00:00:00:00:00" and advert.managed and advert.mtu == 1410


@pytest.mark.parametrize(
    ("network", "server", "guest"),
    [
        ("10.0.0.0/30", "10.0.0.1/30", "10.0.0.2/30"),
        ("10.11.12.0/24", "10.11.12.1/24", "10.11.12.2/24"),
        ("fd10:0:2::/120", "fd10:0:2::1/120", "fd10:0:2::2/120"),
        ("fd10:0:2::/126", "fd10:0:2::1/126", "fd10:0:2::2/126"),
    ],
)
def test_networks(network: str, server: str, guest: str) -> None:
    name = "network6" if ":" in network else "network"
    made = planned(D1, "masquerade", **{name: ip_network(network)})
    found = (made.server6, made.guest6) if ":" in network else (made.server4, made.guest4)
    assert tuple(map(str, found)) == (server, guest)


@pytest.mark.parametrize("network", ["10.0.0.0/31", "10.0.0.0/32", "fd10:0:2::/127", "fd10:0:2::/128"])
def test_a_network_without_room_is_refused(network: str) -> None:
    name = "network6" if ":" in network else "network"
    with pytest.raises(ConfigError, match=network):
        planned(D1, "masquerade", **{name: ip_network(network)})


@pytest.mark.parametrize("network", ["10.222.222.0/24", "10.222.222.252/30", "fd00:10:244:1::/120"])
def test_a_network_that_the_pod_lives_in_is_refused(network: str) -> None:
    name = "network6" if ":" in network else "network"
    with pytest.raises(ConfigError, match=f"{network} holds"):
        planned(D1, "masquerade", **{name: ip_network(network)})


def test_masquerade_needs_an_address() -> None:
    with pytest.raises(ConfigError, match=r"eth0 has no address.*--binding=bridge"):
        planned(PodInterface("eth0", 7, MAC, 1500, (), ()), "masquerade")


def test_the_way_back_of_masquerade_is_the_settings_as_they_were() -> None:
    before = (Sysctl("net/ipv4/ip_forward", "0"), Sysctl("net/ipv6/conf/all/forwarding", "1"))
    assert set(planned(D1, "masquerade", before=before).undo.values()) == set(before)


# ---- MTU and MAC


@pytest.mark.parametrize(
    ("kept", "mtu", "smallest"),
    [((V4,), 67, 68), ((V4,), 1501, 68), ((V4,), -1, 68), ((V4, V6), 1279, 1280), ((V6,), 68, 1280)],
)
@pytest.mark.parametrize("binding", ["bridge", "masquerade"])
def test_mtu_out_of_range(
    kept: tuple[IPv4Interface | IPv6Interface, ...], mtu: int, smallest: int, binding: str
) -> None:
    pod = PodInterface("eth0", 7, MAC, 1500, kept, ())
    with pytest.raises(ConfigError, match=f"MTU {mtu}: it must be from {smallest} to 1500, the MTU of eth0"):
        planned(pod, binding, mtu=mtu)


@pytest.mark.parametrize(("kept", "mtu"), [((V4,), 68), ((V4,), 1500), ((V4, V6), 1280), ((), 68)])
def test_mtu_at_its_limits(kept: tuple[IPv4Interface | IPv6Interface, ...], mtu: int) -> None:
    assert planned(PodInterface("eth0", 7, MAC, 1500, kept, ()), mtu=mtu).mtu == mtu


@given(st.binary(min_size=6, max_size=6))
def test_the_derived_mac_is_local_unicast_and_stays(raw: bytes) -> None:
    mac = derived_mac(raw.hex(":"))
    first = int(mac[:2], 16)
    assert first & 1 == 0 and first & 2 == 2
    assert len(bytes.fromhex(mac.replace(":", ""))) == 6
    assert mac == derived_mac(raw.hex(":"))
    assert mac != raw.hex(":")
