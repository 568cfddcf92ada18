"""What the guest is told of the pod's resolv.conf."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import resolv

GOOGLE, OTHER = IPv4Address("8.8.8.8"), IPv4Address("8.8.4.4")
DOCUMENTATION, LOOPBACK = IPv6Address("2001:db8::1"), IPv6Address("::1")


@pytest.mark.parametrize(
    ("text", "ipv4", "ipv6"),
    [
        ("nameserver 8.8.8.8\nnameserver 8.8.4.4\n", (GOOGLE, OTHER), ()),
        ("nameserver 2001:db8::1\nnameserver ::1\n", (), (DOCUMENTATION, LOOPBACK)),
        ("nameserver 8.8.8.8\nnameserver 2001:db8::1", (GOOGLE,), (DOCUMENTATION,)),
        ("search example.com\nnameserver 8.8.4.4\nnameserver mynameserver\n", (OTHER,), ()),
        ("", (GOOGLE,), ()),
        ("nameserver mynameserver\nnameserver\n", (GOOGLE,), ()),
        ("\t nameserver\t  8.8.4.4 \r\n", (OTHER,), ()),
        ("nameserver 8.8.4.4 # office\n#nameserver 8.8.8.8\n; nameserver 8.8.8.8\n", (OTHER,), ()),
        ("nameserver ::ffff:8.8.4.4\n", (OTHER,), ()),
        ("nameserver fe80::1%eth0\nnameserver ::1\n", (), (LOOPBACK,)),
        ("nameserver 8.8.8.256\nnameserver 08.8.8.8\nnameserver 8.8.4.4\n", (OTHER,), ()),
        ("nameservers 8.8.4.4\n", (GOOGLE,), ()),
    ],
)
def test_name_servers_are_sorted_by_family(
    text: str, ipv4: tuple[IPv4Address, ...], ipv6: tuple[IPv6Address, ...]
) -> None:
    found = resolv.parse(text)
    assert (found.ipv4, found.ipv6) == (ipv4, ipv6)


@pytest.mark.parametrize(
    ("text", "search"),
    [
        ("", ("cluster.local",)),
        ("search\n", ("cluster.local",)),
        (
            "search cluster.local svc.cluster.local example.com",
            ("cluster.local", "svc.cluster.local", "example.com"),
        ),
        ("search one.example\nnameserver 8.8.8.8\nsearch two.example\n", ("one.example", "two.example")),
        ("search\t one.example  \t two.example \n", ("one.example", "two.example")),
        ("search LoCaL\n", ("local",)),
        ("searchfoo one.example\ndomain two.example\noptions ndots:5\n", ("cluster.local",)),
    ],
)
def test_search_lines_add_up(text: str, search: tuple[str, ...]) -> None:
    assert resolv.parse(text).search == search


@given(st.text())
def test_any_text_yields_a_server_and_a_domain(text: str) -> None:
    found = resolv.parse(text)
    assert found.ipv4 or found.ipv6
    assert found.search


SERVICES = ("default.svc.cluster.local", "svc.cluster.local", "cluster.local")


@pytest.mark.parametrize(
    "search",
    [
        SERVICES,
        SERVICES[::-1],
        ("this.is.a.very.very.very.long.entry", *SERVICES),
    ],
)
def test_the_subdomain_goes_before_the_domain_of_the_namespace(search: tuple[str, ...]) -> None:
    found = resolv.with_subdomain(search, "subdomain")
    assert found == ("subdomain.default.svc.cluster.local", *search)


@pytest.mark.parametrize(
    ("search", "subdomain"),
    [
        (("subdomain.default.svc.cluster.local", *SERVICES), "subdomain"),
        (SERVICES, ""),
        (("example.com",), "subdomain"),
        ((), "subdomain"),
    ],
)
def test_the_subdomain_is_added_once_and_only_to_a_service_domain(
    search: tuple[str, ...], subdomain: str
) -> None:
    assert resolv.with_subdomain(search, subdomain) == search
