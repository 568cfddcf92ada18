"""Which external interface is chosen: upstream's table, and what each failure says."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from cni.errors import ConfigError
from cni.net.netlink import (
    IFA_F_DEPRECATED,
    IFA_F_PERMANENT,
    IFA_F_TEMPORARY,
    AddressInfo,
    LinkInfo,
    RouteInfo,
)
from flanneld.iface import ExternalInterface, Host, Wanted, select

LO = LinkInfo(1, "lo", 65536, "00:00:00:00:00:00", True, "", None, 0)
DUMMY = LinkInfo(2, "dummy0", 1500, "02:00:00:00:00:01", True, "dummy", None, 0)
ETH1 = LinkInfo(3, "eth1", 9000, "02:00:00:00:00:02", True, "", None, 0)

V4 = Wanted()
V6 = Wanted(ipv4=False, ipv6=True)
DUAL = Wanted(ipv4=True, ipv6=True)


def with_(base: Wanted, **flags: object) -> Wanted:
    """`base` with flags set; a single text stands for a list of one."""
    values = {slot: getattr(base, slot) for slot in base.__slots__}
    for name, value in flags.items():
        values[name] = (value,) if name in ("iface", "iface_regex") and isinstance(value, str) else value
    return Wanted(**values)


def address(link: LinkInfo, text: str, flags: int = IFA_F_PERMANENT) -> AddressInfo:
    plain, _, length = text.partition("/")
    return AddressInfo(link.ifindex, plain, int(length or ip_address(plain).max_prefixlen), 0, flags)


def route(dst: str, via: str, ifindex: int, source: str = "") -> RouteInfo:
    return RouteInfo(ifindex, dst, via, source, 254, 3, 1, 0, False)


# Upstream's test bed (pkg/ipmatch/match_test.go), with a loopback before it and a second link behind it.
ADDRESSES = [
    address(LO, "127.0.0.1/8"),
    address(LO, "::1/128"),
    address(DUMMY, "1.10.100.1/32"),
    address(DUMMY, "192.168.200.128/32"),
    address(DUMMY, "172.16.30.18/32"),
    address(DUMMY, "172.16.31.200/32"),
    address(DUMMY, "172.16.32.100/32"),
    address(DUMMY, "2001:db8::1/64"),
    address(ETH1, "10.9.0.5/24"),
    address(ETH1, "2001:db8:9::5/64"),
]
ROUTES = {"172.16.32.254": route("172.16.32.254/32", "172.16.32.100", 2, "172.16.32.100")}


def host(
    addresses: list[AddressInfo] | None = None,
    defaults: list[RouteInfo] | None = None,
    links: list[LinkInfo] | None = None,
    route_to: Callable[[str], RouteInfo | None] = ROUTES.get,
) -> Host:
    return Host(
        links=links or [LO, DUMMY, ETH1],
        addresses=ADDRESSES if addresses is None else addresses,
        defaults=[] if defaults is None else defaults,
        route_to=route_to,
    )


def brief(found: ExternalInterface) -> tuple[str, str, str]:
    return found.name, str(found.address or ""), str(found.address6 or "")


def failure(wanted: Wanted, where: Host | None = None) -> str:
    """The text of the refusal, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        select(where or host(), wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- upstream's vectors


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (with_(V4, iface_regex=r"192\.168\.200\.\d+"), ("dummy0", "192.168.200.128", "")),
        (with_(V4, iface_regex=r"dummy\d+"), ("dummy0", "1.10.100.1", "")),
        (with_(V4, iface="dummy0"), ("dummy0", "1.10.100.1", "")),
        (with_(V4, iface="172.16.30.18"), ("dummy0", "172.16.30.18", "")),
        (with_(DUAL, iface="172.16.30.18"), ("dummy0", "172.16.30.18", "2001:db8::1")),
        (with_(V4, iface_can_reach="172.16.32.254"), ("dummy0", "172.16.32.100", "")),
        (with_(V6, iface="2001:db8::1"), ("dummy0", "", "2001:db8::1")),
        (with_(V6, iface_regex="2001:db8:9:"), ("eth1", "", "2001:db8:9::5")),
        (with_(V4, public_ip="10.9.0.5"), ("eth1", "10.9.0.5", "")),
        (with_(V6, public_ipv6="2001:db8:9::5"), ("eth1", "", "2001:db8:9::5")),
        (with_(DUAL, iface="dummy0"), ("dummy0", "1.10.100.1", "2001:db8::1")),
        (with_(V6, iface="eth1"), ("eth1", "", "2001:db8:9::5")),
        (with_(V6, iface_regex="eth"), ("eth1", "", "2001:db8:9::5")),
        (with_(DUAL, iface_regex="eth"), ("eth1", "10.9.0.5", "2001:db8:9::5")),
        (with_(DUAL, iface_can_reach="172.16.32.254"), ("dummy0", "172.16.32.100", "2001:db8::1")),
        (with_(DUAL, public_ip="10.9.0.5"), ("eth1", "10.9.0.5", "2001:db8:9::5")),
        (with_(DUAL, public_ipv6="2001:db8:9::5"), ("eth1", "10.9.0.5", "2001:db8:9::5")),
        (
            with_(DUAL, public_ip="10.9.0.5", public_ipv6="2001:db8:9::5"),
            ("eth1", "10.9.0.5", "2001:db8:9::5"),
        ),
        # A literal of the other family names its owner here; upstream does not find it.
        (with_(V6, iface="10.9.0.5"), ("eth1", "", "2001:db8:9::5")),
        (with_(V4, iface="2001:db8:9::5"), ("eth1", "10.9.0.5", "")),
    ],
)
def test_criteria_choose_as_upstream(wanted: Wanted, expected: tuple[str, str, str]) -> None:
    assert brief(select(host(), wanted)) == expected


def test_a_public_ip_is_told_and_the_matched_address_used() -> None:
    found = select(host(), with_(V4, iface_regex=r"172\.16\.30\.\d+", public_ip="172.16.31.200"))
    assert found.address == IPv4Address("172.16.30.18")
    assert found.public_ip == IPv4Address("172.16.31.200")


def test_public_addresses_of_both_families_are_told_and_need_not_be_local_with_a_named_interface() -> None:
    found = select(host(), with_(DUAL, iface="eth1", public_ip="203.0.113.7", public_ipv6="2001:db8:77::7"))
    assert brief(found) == ("eth1", "10.9.0.5", "2001:db8:9::5")
    assert (found.public_ip, found.public_ipv6) == (IPv4Address("203.0.113.7"), IPv6Address("2001:db8:77::7"))


# ---- order of the criteria


def test_the_first_criterion_that_matches_wins() -> None:
    wanted = with_(V4, iface=("eth9", "eth1"), iface_regex="dummy", iface_can_reach="172.16.32.254")
    assert select(host(), wanted).name == "eth1"
    assert select(host(), with_(wanted, iface="eth9")).name == "dummy0"
    last = select(host(), with_(wanted, iface="eth9", iface_regex="wlan"))
    assert brief(last) == ("dummy0", "172.16.32.100", "")


def test_there_is_no_fall_back_to_the_default_route() -> None:
    where = host(defaults=[route("0.0.0.0/0", "10.9.0.1", 3)])
    text = failure(with_(V4, iface=("eth8", "eth9"), iface_regex="wlan", iface_can_reach="9.9.9.9"), where)
    for criterion in ("--iface=eth8", "--iface=eth9", "--iface-regex=wlan", "--iface-can-reach=9.9.9.9"):
        assert criterion in text
    assert "dummy0 (1.10.100.1, 192.168.200.128" in text
    assert "eth1 (10.9.0.5, 2001:db8:9::5)" in text
    assert " lo " not in text


def test_a_public_ip_given_with_an_interface_need_not_be_local() -> None:
    found = select(host(), with_(V4, iface="eth1", public_ip="203.0.113.7"))
    assert (found.address, found.public_ip) == (IPv4Address("10.9.0.5"), IPv4Address("203.0.113.7"))


def test_a_public_ip_alone_must_be_local() -> None:
    text = failure(with_(V4, public_ip="203.0.113.7"))
    assert "--public-ip=203.0.113.7" in text
    assert "needs --iface as well" in text


def test_a_public_ip_of_the_other_family_is_told_too() -> None:
    found = select(host(), with_(V4, iface="eth1", public_ipv6="2001:db8::77"))
    assert found.public_ipv6 == IPv6Address("2001:db8::77")
    assert found.address6 is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"public_ip": "node1"}, "--public-ip=node1 is not an IPv4 address"),
        ({"public_ip": "2001:db8::1"}, "--public-ip=2001:db8::1 is not an IPv4 address"),
        ({"public_ip": "10.9.0.05"}, "--public-ip=10.9.0.05 is not an IPv4 address"),
        ({"public_ipv6": "10.9.0.5"}, "--public-ipv6=10.9.0.5 is not an IPv6 address"),
    ],
)
def test_a_public_ip_that_is_none_is_refused(flags: dict[str, str], words: str) -> None:
    assert failure(with_(V4, iface="eth1", **flags)) == words


# ---- literal address, name


def test_a_literal_address_matches_whatever_kind_it_is() -> None:
    assert select(host(), with_(V4, iface="127.0.0.1")).name == "lo"
    old = [address(ETH1, "10.9.0.9/24", IFA_F_DEPRECATED), *ADDRESSES]
    assert brief(select(host(old), with_(V4, iface="10.9.0.9"))) == ("eth1", "10.9.0.9", "")


def test_a_literal_address_in_another_spelling_is_the_same() -> None:
    assert select(host(), with_(V6, iface="2001:DB8:9:0::5")).name == "eth1"


@pytest.mark.parametrize("name", ["10.9.0.77", "eth9", "dummy", "2001:db8::77"])
def test_what_names_nothing_is_told(name: str) -> None:
    assert f"--iface={name}" in failure(with_(V4, iface=name))


def test_dual_stack_needs_both_public_addresses_on_one_interface() -> None:
    good = with_(DUAL, iface="10.9.0.5", public_ipv6="2001:db8:9::5")
    assert brief(select(host(), good)) == ("eth1", "10.9.0.5", "2001:db8:9::5")
    text = failure(with_(good, public_ipv6="2001:db8::1"))
    assert "--iface=10.9.0.5 is on eth1" in text
    assert "2001:db8::1 is not" in text


def test_dual_stack_by_ipv6_literal_needs_the_public_ipv6() -> None:
    assert "--public-ipv6" in failure(with_(DUAL, iface="2001:db8:9::5"))
    good = with_(DUAL, iface="2001:db8:9::5", public_ipv6="2001:db8:9::5")
    assert brief(select(host(), good)) == ("eth1", "10.9.0.5", "2001:db8:9::5")


# ---- regex


def test_a_regex_tries_all_addresses_before_any_name() -> None:
    named = DUMMY._replace(name="net10.9")
    assert select(host(links=[LO, named, ETH1]), with_(V4, iface_regex=r"10\.9")).name == "eth1"


def test_a_regex_is_searched_anywhere_in_the_text() -> None:
    assert brief(select(host(), with_(V4, iface_regex="168.200"))) == ("dummy0", "192.168.200.128", "")
    assert "wlan" in failure(with_(V4, iface_regex="^wlan"))


def test_a_regex_in_dual_stack_fixes_the_address_of_each_family() -> None:
    """Where both families match on one interface, both matched addresses are used, not the first."""
    two = [*ADDRESSES, address(ETH1, "10.9.0.6/24"), address(ETH1, "fd00:9::6/64")]
    found = select(host(two), with_(DUAL, iface_regex=r"^10\.9\.0\.6$|^fd00:9:"))
    assert brief(found) == ("eth1", "10.9.0.6", "fd00:9::6")


def test_a_regex_in_dual_stack_passes_over_an_interface_where_one_family_matches() -> None:
    found = select(host(), with_(DUAL, iface_regex=r"^1\.10\.|^10\.9\.|^2001:db8:9:"))
    assert brief(found) == ("eth1", "10.9.0.5", "2001:db8:9::5")


def test_a_regex_sees_usable_addresses_only() -> None:
    assert "--iface-regex=127" in failure(with_(V4, iface_regex="127"))


@pytest.mark.parametrize("pattern", ["^eth[[:digit:]]$", "[[:^alpha:]]", "[a[:space:]]"])
def test_a_posix_class_is_refused(pattern: str) -> None:
    """Python would read it as a set of letters: the first would never match, and nobody would know why."""
    assert "is not supported; write a range" in failure(with_(V4, iface_regex=pattern))


def test_a_set_with_colons_is_no_posix_class() -> None:
    assert select(host(), with_(V6, iface_regex="^2001[:.]db8[:]9")).name == "eth1"


def test_a_regex_that_is_none_fails_alone() -> None:
    assert select(host(), with_(V4, iface_regex=("(", "eth"))).name == "eth1"
    assert "--iface-regex=(: not a regular expression" in failure(with_(V4, iface_regex="("))


# ---- reach


def test_reach_that_is_no_address_or_has_no_route() -> None:
    assert "--iface-can-reach=gateway: not an IP address" in failure(with_(V4, iface_can_reach="gateway"))
    assert "--iface-can-reach=9.9.9.9: no route" in failure(with_(V4, iface_can_reach="9.9.9.9"))


def test_reach_over_ipv6_chooses_the_address_as_usual() -> None:
    """The kernel may prefer a temporary address as source; peers must not be told that one."""
    two = [address(ETH1, "2001:db8:9::abcd/64", IFA_F_TEMPORARY), *ADDRESSES]
    where = host(two, route_to={"2001:db8::99": route("::/0", "fe80::1", 3, "2001:db8:9::abcd")}.get)
    assert brief(select(where, with_(V6, iface_can_reach="2001:db8::99"))) == ("eth1", "", "2001:db8:9::5")


# ---- default route


def test_the_default_route_chooses() -> None:
    where = host(defaults=[route("::/0", "fe80::1", 2), route("0.0.0.0/0", "10.9.0.1", 3)])
    assert brief(select(where, V4)) == ("eth1", "10.9.0.5", "")
    assert brief(select(where, V6)) == ("dummy0", "", "2001:db8::1")


def test_the_first_default_route_counts() -> None:
    where = host(defaults=[route("0.0.0.0/0", "1.10.100.9", 2), route("0.0.0.0/0", "10.9.0.1", 3)])
    assert select(where, V4).name == "dummy0"


def test_default_routes_of_both_families_must_agree() -> None:
    same = host(defaults=[route("::/0", "fe80::1", 3), route("0.0.0.0/0", "10.9.0.1", 3)])
    assert brief(select(same, DUAL)) == ("eth1", "10.9.0.5", "2001:db8:9::5")
    other = host(defaults=[route("::/0", "fe80::1", 2), route("0.0.0.0/0", "10.9.0.1", 3)])
    text = failure(DUAL, other)
    assert "eth1 (IPv4)" in text and "dummy0 (IPv6)" in text and "--iface" in text


@pytest.mark.parametrize(
    ("wanted", "defaults", "words"),
    [
        (V4, [], "no IPv4 default route"),
        (V6, [route("0.0.0.0/0", "10.9.0.1", 3)], "no IPv6 default route"),
        (DUAL, [route("0.0.0.0/0", "10.9.0.1", 3)], "no IPv6 default route"),
        (V4, [route("0.0.0.0/0", "", 0)], "names no single interface"),
    ],
)
def test_a_missing_or_multipath_default_route_is_told(
    wanted: Wanted, defaults: list[RouteInfo], words: str
) -> None:
    assert words in failure(wanted, host(defaults=defaults))


@pytest.mark.parametrize("wanted", [V6, DUAL])
def test_a_default_route_that_leads_nowhere_is_none(wanted: Wanted) -> None:
    """The kernel shows `unreachable default` with the loopback as its interface."""
    nowhere = route("::/0", "", LO.ifindex)._replace(kind=7)
    both = [route("0.0.0.0/0", "10.9.0.1", 3), nowhere]
    assert "no IPv6 default route" in failure(wanted, host(defaults=both))
    found = select(host(defaults=[*both, route("::/0", "fe80::1", 3)]), wanted)
    assert found.name == "eth1"


# ---- choice of the address


PERMANENT, DYNAMIC = IFA_F_PERMANENT, 0
TENTATIVE, DADFAILED = 0x40, 0x08  # linux/if_addr.h
DUPLICATE = PERMANENT | TENTATIVE | DADFAILED


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([("169.254.1.1", PERMANENT), ("10.9.0.5", DYNAMIC)], "10.9.0.5"),
        ([("10.9.0.5", DYNAMIC), ("10.9.0.6", PERMANENT)], "10.9.0.6"),
        ([("10.9.0.6", PERMANENT), ("10.9.0.5", PERMANENT)], "10.9.0.6"),
        ([("10.9.0.5", PERMANENT | IFA_F_DEPRECATED), ("10.9.0.6", DYNAMIC)], "10.9.0.6"),
        ([("127.0.0.2", PERMANENT), ("169.254.1.1", PERMANENT)], "169.254.1.1"),
        # The flag that means temporary for IPv6 means secondary for IPv4.
        ([("10.9.0.6", PERMANENT | IFA_F_TEMPORARY), ("10.9.0.5", PERMANENT)], "10.9.0.6"),
        ([("fe80::1", PERMANENT), ("2001:db8::5", DYNAMIC)], "2001:db8::5"),
        ([("2001:db8::5", DYNAMIC | IFA_F_TEMPORARY), ("2001:db8::6", DYNAMIC)], "2001:db8::6"),
        ([("2001:db8::5", DYNAMIC), ("fd00::6", PERMANENT)], "fd00::6"),
        ([("fe80::1", PERMANENT), ("ff02::1", PERMANENT)], "fe80::1"),
        ([("fd00::6", PERMANENT | TENTATIVE), ("fd00::5", PERMANENT)], "fd00::6"),
        ([("fe80::1", PERMANENT), ("fd00::6", PERMANENT | TENTATIVE)], "fd00::6"),
        ([("fd00::6", DUPLICATE), ("fd00::5", PERMANENT)], "fd00::5"),
        ([("fd00::6", DUPLICATE), ("fe80::1", PERMANENT)], "fe80::1"),
    ],
)
def test_the_best_address_is_chosen(found: list[tuple[str, int]], best: str) -> None:
    where = host([address(ETH1, text, flags) for text, flags in found])
    wanted = V6 if ":" in best else V4
    assert best in brief(select(where, with_(wanted, iface="eth1")))


@pytest.mark.parametrize(
    ("wanted", "addresses", "words"),
    [
        (V4, [("2001:db8::1", PERMANENT)], "eth1 (--iface=eth1 names it) has no usable IPv4 address"),
        (DUAL, [("10.9.0.5", PERMANENT)], "has no usable IPv6 address"),
        (V4, [("10.9.0.5", IFA_F_DEPRECATED)], "has no usable IPv4 address"),
        (V4, [], "has no usable IPv4 address"),
        (V6, [("fd00::6", IFA_F_TEMPORARY | IFA_F_DEPRECATED)], "has no usable IPv6 address"),
        (V6, [("fd00::6", DUPLICATE)], "has no usable IPv6 address; another host has fd00::6 too"),
        (DUAL, [("fd00::6", PERMANENT), ("fe80::1", PERMANENT)], "has no usable IPv4 address"),
        (DUAL, [("10.9.0.5", PERMANENT), ("fd00::6", DUPLICATE)], "another host has fd00::6 too"),
    ],
)
def test_no_usable_address_is_told(wanted: Wanted, addresses: list[tuple[str, int]], words: str) -> None:
    where = host([address(ETH1, text, flags) for text, flags in addresses])
    assert words in failure(with_(wanted, iface="eth1"), where)


def test_a_duplicate_address_is_refused_even_where_it_is_named() -> None:
    where = host([address(ETH1, "fd00::5"), address(ETH1, "fd00::6", DUPLICATE)])
    assert "eth1 has this address, but another host has it too" in failure(with_(V6, iface="fd00::6"), where)
    assert brief(select(where, with_(V6, iface="fd00::5"))) == ("eth1", "", "fd00::5")
    assert "no interface's address" in failure(with_(V6, iface_regex="^fd00::6$"), where)


def test_an_interface_without_an_mtu_is_refused() -> None:
    where = host(links=[LO, DUMMY, ETH1._replace(mtu=0)])
    assert "eth1" in failure(with_(V4, iface="eth1"), where)
    assert "MTU of 0" in failure(with_(V4, iface="eth1"), where)
    assert select(where, with_(V4, iface=("eth1", "dummy0"))).name == "dummy0"


def test_a_host_without_addresses_says_so() -> None:
    assert "none with an address" in failure(V4, host([]))
