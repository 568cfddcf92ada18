"""cni.spec.address against the standard library's ipaddress, and against Go's own rules."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.spec.address import Cidr, format_ip, parse_cidr, parse_ip


def _go_text(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


@given(st.ip_addresses())
def test_every_address_prints_as_rfc_5952_has_it(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    for text in (str(address), address.exploded, address.exploded.upper()):
        assert format_ip(*parse_ip(text)) == _go_text(address)


@given(st.lists(st.sampled_from([0, 0, 0, 1, 0xFFFF]), min_size=8, max_size=8))
def test_runs_of_zeros_are_shortened_once(groups: list[int]) -> None:
    text = ":".join(f"{group:x}" for group in groups)
    assert format_ip(*parse_ip(text)) == _go_text(ipaddress.IPv6Address(text))


@given(st.text(alphabet="0123456789abcdefF:./%", max_size=24))
def test_what_ipaddress_refuses_is_refused(text: str) -> None:
    try:
        expected = None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        expected = None
    if expected is None:
        with pytest.raises(ValueError, match=r"^invalid IP address: "):
            parse_ip(text)
    else:
        assert format_ip(*parse_ip(text)) == _go_text(expected)


@given(st.ip_addresses(), st.integers(0, 128))
def test_networks_have_their_host_bits_cleared(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, prefix: int
) -> None:
    prefix = min(prefix, address.max_prefixlen)
    if _go_text(address) != str(address):
        return  # IPv4-mapped: a case of its own below
    text = f"{address}/{prefix}"
    assert str(parse_cidr(text)) == text
    assert str(parse_cidr(text).network()) == str(ipaddress.ip_network(text, strict=False))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "10.1.17.1",
        "10.1.17.1/",
        "10.1.17.1/33",
        "10.1.17.1/-1",
        "10.1.17.1/+8",
        "10.1.17.1/8 ",
        "10.1.17.1/255.0.0.0",
        "010.1.17.1/24",
        "10.1.17/24",
        "10.1.17.256/24",
        " 10.1.17.1/24",
        "10.1.17.1/24/24",
        "fc00::1/129",
        "fe80::1%eth0/64",
        "1::2::3/64",
        "::12345/64",
        "1:2:3:4:5:6:7::8/64",
        "1.2.3.4::/64",
        "\u0661.1.1.1/8",
        "1.1.1.1/\u00b2",
    ],
)
def test_what_is_no_cidr_is_refused_in_gos_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"^invalid CIDR address: ") as caught:
        parse_cidr(text)
    assert str(caught.value).endswith(text)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("10.1.2.3/024", "10.1.2.3/24"),
        ("::ffff:10.1.2.3/120", "10.1.2.3/24"),
        ("::ffff:a01:203/128", "10.1.2.3/32"),
        ("::ffff:10.1.2.3/64", "10.1.2.3/0"),
        ("::10.1.2.3/128", "::a01:203/128"),
        ("FC00:0:0::1/64", "fc00::1/64"),
        ("0:0::/0", "::/0"),
    ],
)
def test_what_go_prints_differently(text: str, printed: str) -> None:
    assert str(parse_cidr(text)) == printed


def test_equal_cidrs_are_one_key() -> None:
    assert len({parse_cidr("fc00::/64"), parse_cidr("FC00:0::/64"), Cidr(6, 0xFC << 120, 64)}) == 1
    assert parse_cidr("10.0.0.0/8") != parse_cidr("10.0.0.0/16")
    assert parse_cidr("0.0.0.0/0") != parse_cidr("::/0")
