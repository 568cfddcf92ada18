"""What the user asked for: refusals, and the way through the state file's JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    ip_address,
    ip_network,
)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import ConfigError
from launcher import settings as settings_
from launcher.binding import Wishes, plan_handover
from launcher.discover import PodInterface, PodRoute
from launcher.nat import Port
from launcher.settings import Settings

MAC = "0a:58:0a:f4:01:07"
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
ANY = st.builds(
    Settings,
    binding=st.sampled_from(["bridge", "masquerade"]),
    primary=st.booleans(),
    queues=st.integers(1, 256),
    mtu=st.integers(0, 9000),
    mac=TEXT,
    hostname=TEXT,
    dns=TEXTS,
    search=TEXTS,
    ntp=TEXTS,
    private=st.dictionaries(st.integers(224, 254), TEXT, max_size=3),
    boot_file=TEXT,
    tftp_server=TEXT,
    lease_s=st.integers(4, 0xFFFFFFFF),
    ports=st.lists(st.builds(Port, st.integers(1, 65535), st.sampled_from(["tcp", "udp"])), max_size=3).map(
        tuple
    ),
    network=TEXT,
    network6=TEXT,
    owner=st.integers(0, 0x7FFFFFFF),
)


@given(ANY)
def test_json_round_trip(value: Settings) -> None:
    text = json.dumps(settings_.to_json(value))
    assert settings_.from_json(json.loads(text)) == value


@pytest.mark.parametrize("name", ["private", "ports"])
@pytest.mark.parametrize("value", [None, 5, "x", [5]])
def test_json_of_another_shape(name: str, value: object) -> None:
    record = settings_.to_json(Settings()) | {name: value}
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        settings_.from_json(record)


def test_json_with_more_or_less() -> None:
    with pytest.raises(TypeError):
        settings_.from_json(settings_.to_json(Settings()) | {"new": 1})
    with pytest.raises(KeyError):
        settings_.from_json({})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"queues": 0}, ["--queues=0", "1 to 256"]),
        ({"queues": 257}, ["--queues=257"]),
        ({"mac": "abcd"}, ["--mac=abcd", "six"]),
        ({"mac": "01:00:5e:00:00:01"}, ["unicast"]),
        ({"mac": "00:00:00:00:00:00"}, ["not all zero"]),
        ({"mac": "0a:58-0a:f4:01:07"}, ["0a:58-0a:f4:01:07"]),
        ({"dns": ("10.0.0.1", "dns")}, ["--dns=dns", "IP address"]),
        ({"ntp": ("10.0.0.256",)}, ["--ntp=10.0.0.256"]),
        ({"search": ("ok.example", "foo,com")}, ["--search=foo,com"]),
        ({"search": ("10.0.0.1",)}, ["--search=10.0.0.1", "letter"]),
        ({"search": ("",)}, ["--search="]),
        ({"owner": -1}, ["--tap-owner=-1"]),
        ({"owner": 0x80000000}, ["--tap-owner=2147483648"]),
        ({"network": "10.0.2.0/33"}, ["--network=10.0.2.0/33", "IPv4"]),
        ({"network": "fd10::/64"}, ["--network=fd10::/64"]),
        ({"network6": "10.0.2.0/24"}, ["--network6=10.0.2.0/24", "IPv6"]),
        ({"binding": "passt"}, ["passt", "masquerade"]),
    ],
)
def test_what_cannot_be_right_is_refused(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(Settings(), **changes).check()  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mac": "DE-AD-00-00-BE-AF"},
        {"mac": "de:ad:00:00:be:af"},
        {"search": ("LoCaL", "a_b.example.", "x" * 63 + ".com")},
        {"dns": ("10.96.0.10", "fd00::a")},
        {"network": "10.11.12.77/24", "network6": "fd10:0:2::5/120"},
        {"owner": 0, "queues": 256},
        {"owner": 1000620000},
    ],
)
def test_what_is_right_is_taken(changes: dict[str, object]) -> None:
    replace(Settings(), **changes).check()  # type: ignore[arg-type]


def test_only_the_network_of_a_masquerade_network_counts() -> None:
    found = settings_.networks(Settings(network="10.11.12.77/24", network6="fd20::5/120"))
    assert tuple(map(str, found)) == ("10.11.12.0/24", "fd20::/120")


# ---- what follows for the guest


def pod(*routes: tuple[str, str], address: str = "10.244.1.7/24", address6: str = "") -> PodInterface:
    addresses: list[IPv4Interface | IPv6Interface] = [IPv4Interface(address)]
    addresses += [IPv6Interface(address6)] if address6 else []
    made = tuple(PodRoute(ip_network(dst), ip_address(via) if via else None) for dst, via in routes)
    return PodInterface("eth0", 2, MAC, 1450, tuple(addresses), made)


def lease_routes(made: PodInterface) -> list[tuple[str, str]]:
    lease = settings_.dhcp_lease(Settings(), made, plan_handover(made, Wishes("bridge")))
    assert lease is not None
    return [(str(dst), str(via or "")) for dst, via in lease.routes]


@pytest.mark.parametrize(
    ("made", "routes"),
    [
        (
            pod(("0.0.0.0/0", "10.244.1.1"), ("10.244.0.0/16", "10.244.1.1"), ("10.244.1.0/24", "")),
            [("0.0.0.0/0", "10.244.1.1"), ("10.244.0.0/16", "10.244.1.1")],
        ),
        (
            pod(("0.0.0.0/0", "169.254.1.1"), ("169.254.1.1/32", ""), address="10.244.1.7/32"),
            [("0.0.0.0/0", "169.254.1.1"), ("169.254.1.1/32", "")],
        ),
        (
            pod(("0.0.0.0/0", "169.254.1.1"), address="10.244.1.7/32"),
            [("169.254.1.1/32", ""), ("0.0.0.0/0", "169.254.1.1")],
        ),
        (pod(("10.244.1.0/24", "")), []),
        (pod(("10.128.0.0/14", ""), ("224.0.0.0/4", "")), [("10.128.0.0/14", ""), ("224.0.0.0/4", "")]),
        (pod(("192.0.2.0/24", "fe80::1"), ("fd00::/8", "fe80::1")), []),
    ],
    ids=["flannel", "Calico", "gateway without a route", "no gateway", "on-link", "IPv6 next hop"],
)
def test_routes_for_the_guest(made: PodInterface, routes: list[tuple[str, str]]) -> None:
    assert lease_routes(made) == routes


def test_no_gateway_is_a_normal_case() -> None:
    made = pod(("10.244.1.0/24", ""))
    lease = settings_.dhcp_lease(Settings(), made, plan_handover(made, Wishes("bridge")))
    assert lease is not None and lease.routers == ()
    assert lease.server_id == IPv4Address("169.254.75.10")


def test_each_family_gets_its_own_servers() -> None:
    made = pod(("0.0.0.0/0", "10.244.1.1"), ("::/0", "fd00:10:244:1::1"), address6="fd00:10:244:1::7/64")
    wanted = Settings(
        dns=("10.96.0.10", "fd00::a"),
        ntp=("fd00::b", "10.0.0.9"),
        search=("cluster.local",),
        hostname="vm1",
        lease_s=60,
    )
    handover = plan_handover(made, Wishes("bridge"))
    lease, lease6 = settings_.dhcp_lease(wanted, made, handover), settings_.dhcp6_lease(wanted, handover)
    advert = settings_.router(wanted, made, handover)
    assert lease is not None and lease6 is not None and advert is not None
    assert (lease.dns, lease.ntp) == ((IPv4Address("10.96.0.10"),), (IPv4Address("10.0.0.9"),))
    assert (lease6.dns, lease6.ntp) == ((IPv6Address("fd00::a"),), (IPv6Address("fd00::b"),))
    assert advert.dns == lease6.dns and advert.search == lease6.search == ("cluster.local",)
    assert (lease.lease_s, lease6.valid_s, lease6.preferred_s) == (60, 60, 60)
    assert (lease.hostname, lease6.hostname) == ("vm1", "vm1")
    assert lease6.address == IPv6Address("fd00:10:244:1::7")
    # In the bridge binding the gateway's MAC is found later.
    assert advert.mac is None


def test_without_an_ipv6_gateway_nobody_is_a_router() -> None:
    made = pod(address6="fd00:10:244:1::7/64")
    handover = plan_handover(made, Wishes("bridge"))
    assert settings_.router(Settings(), made, handover) is None
    assert settings_.dhcp6_lease(Settings(), handover) is not None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hostname": "a_b"}, "a_b"),
        ({"lease_s": 3}, "lease time 3"),
        ({"private": {223: "x"}}, "223"),
        ({"private": {224: "0xabc"}}, "0xabc"),
        ({"boot_file": "with blank"}, "with blank"),
        ({"tftp_server": "ü"}, "ü"),
        ({"dns": ("224.0.0.1",)}, "224.0.0.1"),
        ({"ntp": ("0.0.0.0",)}, "0.0.0.0"),
    ],
)
def test_what_cannot_be_told_to_a_guest(changes: dict[str, object], word: str) -> None:
    made = pod()
    wanted = replace(Settings(), **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=word):
        settings_.dhcp_lease(wanted, made, plan_handover(made, Wishes("bridge")))


def test_the_guest_must_not_have_the_bridges_mac() -> None:
    made = pod()
    for binding in ("bridge", "masquerade"):
        handover = plan_handover(made, Wishes(binding))
        mac = handover.bridge_mac
        for text in (mac, mac.upper(), mac.replace(":", "-")):
            with pytest.raises(ConfigError, match="k6t-eth0"):
                settings_.check_guest_mac(Settings(mac=text), handover)
        settings_.check_guest_mac(Settings(), handover)


def test_a_masquerade_network_is_what_the_guest_gets() -> None:
    made = pod()
    handover = plan_handover(made, Wishes("masquerade", network=IPv4Network("10.0.0.0/30")))
    lease = settings_.dhcp_lease(Settings(), made, handover)
    assert lease is not None
    assert (str(lease.address), str(lease.server_id), lease.mac) == ("10.0.0.2/30", "10.0.0.1", None)
