"""Translation rules: the cases of KubeVirt's own tests that have no service mesh, line by line."""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network

import pytest

from launcher import nat
from launcher.binding import Handover, Wishes, plan_handover
from launcher.discover import PodInterface
from launcher.nat import Port

V4, V6 = IPv4Interface("10.222.222.1/30"), IPv6Interface("fd00:10:244:1::7/64")
LOOPBACK = {"ip": "127.0.0.1", "ip6": "::1"}
GUEST = {"ip": "10.0.2.2", "ip6": "fd10:0:2::2"}
GATEWAY = {"ip": "10.0.2.1", "ip6": "fd10:0:2::1"}
BASE_CHAINS = {
    "prerouting": "{ type nat hook prerouting priority -100 ; }",
    "input": "{ type nat hook input priority 100 ; }",
    "output": "{ type nat hook output priority -100 ; }",
    "postrouting": "{ type nat hook postrouting priority 100 ; }",
}
OUR_CHAINS = {*BASE_CHAINS, "KUBEVIRT_PREINBOUND", "KUBEVIRT_POSTINBOUND"}


def handover(*addresses: IPv4Interface | IPv6Interface, **wishes: object) -> Handover:
    pod = PodInterface("eth0", 2, "12:34:56:78:90:ab", 1500, addresses, ())
    return plan_handover(pod, Wishes("masquerade", **wishes))  # type: ignore[arg-type]


def rules(text: str, family: str) -> list[str]:
    start = f"add rule {family} nat "
    return [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]


def jumps(family: str) -> list[str]:
    return [
        f"postrouting {family} saddr {GUEST[family]} counter masquerade",
        'prerouting iifname "eth0" counter jump KUBEVIRT_PREINBOUND',
        'postrouting oifname "k6t-eth0" counter jump KUBEVIRT_POSTINBOUND',
    ]


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_without_ports_everything_is_passed_on(family: str) -> None:
    text = nat.transaction(handover(V4, V6), "eth0", ())
    assert rules(text, family) == [
        *jumps(family),
        f"KUBEVIRT_PREINBOUND counter dnat to {GUEST[family]}",
        f"KUBEVIRT_POSTINBOUND {family} saddr {{ {LOOPBACK[family]} }} counter snat to {GATEWAY[family]}",
        f"output {family} daddr {{ {LOOPBACK[family]} }} counter dnat to {GUEST[family]}",
    ]


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_with_ports_only_they_are(family: str) -> None:
    text = nat.transaction(handover(V4, V6), "eth0", (Port(80), Port(8080, "udp")))
    expected = jumps(family)
    for match, short in (("tcp dport 80", "tcp dport { 80 }"), ("udp dport 8080", "udp dport { 8080 }")):
        loopback = f"{{ {LOOPBACK[family]} }}"
        expected += [
            f"KUBEVIRT_PREINBOUND {short} counter dnat to {GUEST[family]}",
            f"KUBEVIRT_POSTINBOUND {match} {family} saddr {loopback} counter snat to {GATEWAY[family]}",
            f"output {family} daddr {loopback} {match} counter dnat to {GUEST[family]}",
        ]
    assert rules(text, family) == expected


@pytest.mark.parametrize(
    ("addresses", "families"), [((V4,), {"ip"}), ((V6,), {"ip6"}), ((V4, V6), {"ip", "ip6"})]
)
def test_a_family_that_the_pod_does_not_have_is_left_alone(
    addresses: tuple[IPv4Interface | IPv6Interface, ...], families: set[str]
) -> None:
    text = nat.transaction(handover(*addresses), "eth0", ())
    assert {line.split()[2] for line in text.splitlines()} == families


def test_other_networks() -> None:
    planned = handover(V4, V6, network=IPv4Network("10.0.0.0/30"), network6=IPv6Network("fd20::/64"))
    text = nat.transaction(planned, "cust-iface", ())
    assert "KUBEVIRT_PREINBOUND counter dnat to 10.0.0.2" in rules(text, "ip")
    assert "KUBEVIRT_POSTINBOUND ip6 saddr { ::1 } counter snat to fd20::1" in rules(text, "ip6")
    assert 'prerouting iifname "cust-iface" counter jump KUBEVIRT_PREINBOUND' in rules(text, "ip")


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_every_chain_is_made_and_emptied_before_its_first_rule(family: str) -> None:
    lines = [line.split(" ", 4) for line in nat.transaction(handover(V4, V6), "eth0", ()).splitlines()]
    ours = [line for line in lines if line[2] == family]
    assert ours[0] == ["add", "table", family, "nat"]
    state: dict[str, str] = {}
    for verb, what, _, table, rest in ours[1:]:
        assert table == "nat"
        chain, _, definition = rest.partition(" ")
        if what == "chain":
            assert verb in ("add", "flush")
            if verb == "add":
                assert definition == BASE_CHAINS.get(chain, "")
            state[chain] = f"{state.get(chain, '')} {verb}".strip()
        else:
            assert state[chain] == "add flush"
    assert set(state) == OUR_CHAINS


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_removal_takes_our_chains_and_no_table(family: str) -> None:
    lines = nat.removal(family).splitlines()
    names = [line.split()[-1] for line in lines]
    assert [line.split()[:4] for line in lines[:6]] == [["flush", "chain", family, "nat"]] * 6
    assert [line.split()[:4] for line in lines[6:]] == [["delete", "chain", family, "nat"]] * 6
    assert set(names[:6]) == set(names[6:]) == OUR_CHAINS
