"""Leases as values: keys and attributes as upstream writes them, and the folding of updates."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld.lease import (
    Attributes,
    Change,
    Lease,
    LeaseSet,
    Snapshot,
    Update,
    parse_subnet_key,
    subnet_key,
)

V4 = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(0, 31),
)
V6 = st.builds(
    lambda address, length: IPv6Network((address, length), strict=False),
    st.integers(0, 2**128 - 1),
    st.integers(0, 127),
)


@pytest.mark.parametrize(
    ("key", "subnet", "subnet6"),
    [
        ("10.12.13.0-24", "10.12.13.0/24", None),
        ("10.12.13.0-24&fd00:12:13::-56", "10.12.13.0/24", "fd00:12:13::/56"),
    ],
)
def test_keys_that_name_subnets(key: str, subnet: str, subnet6: str | None) -> None:
    parsed = parse_subnet_key(key)
    assert parsed == (IPv4Network(subnet), IPv6Network(subnet6) if subnet6 else None)
    assert subnet_key(*parsed) == key
    assert parse_subnet_key(f"/coreos.com/network/subnets/{key}") == parsed


@pytest.mark.parametrize(
    "key",
    [
        "",
        "10",
        "10.12.13.0",
        "10.12.13-24",
        "10.12.13.300-24",
        "10.12.13.0-24hi",
        "10.12.13.0-24\n",
        "&2001::-56",
        "10.12.13.0-24&:12:13:-56",
        "10.12.13.0-24&20011::-56",
        "10.12.13.0-24&2001-56",
        "10.12.13.0-24&2001::",
        "10.12.13.0-24&2001::-56hi",
        "10.12.13.0-24&FD00::-56",
        "10.12.13.0-24&2001::-128",
        "255.255.255.255-32",
    ],
)
def test_keys_that_name_none(key: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_subnet_key(key)


@given(V4, st.none() | V6)
def test_keys_come_back(subnet: IPv4Network, subnet6: IPv6Network | None) -> None:
    assert parse_subnet_key(subnet_key(subnet, subnet6)) == (subnet, subnet6)


@pytest.mark.parametrize(
    ("attrs", "text"),
    [
        (Attributes(IPv4Address("1.2.3.4")), '{"PublicIP":"1.2.3.4","PublicIPv6":null}'),
        (Attributes(None, IPv6Address("fd00::1")), '{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::1"}'),
        (
            Attributes(
                IPv4Address("192.168.64.3"), None, "vxlan", '{"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}'
            ),
            '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
            '"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}',
        ),
        (
            Attributes(IPv4Address("1.2.3.4"), IPv6Address("fd00::1"), "wireguard", "", '{"PublicKey":"k<"}'),
            '{"PublicIP":"1.2.3.4","PublicIPv6":"fd00::1","BackendType":"wireguard",'
            '"BackendV6Data":{"PublicKey":"k\\u003c"}}',
        ),
    ],
)
def test_attributes_are_written_as_upstream_does(attrs: Attributes, text: str) -> None:
    assert attrs.encode() == text
    assert Attributes.decode(text).encode() == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        '{"PublicIP":null}',
        '{"publicip":null}',
        '{"PublicIP":"1.2.3"}',
        '{"PublicIP":"fd00::1"}',
        '{"PublicIP":7}',
        '{"PublicIPv6":"1.2.3.4"}',
        '{"BackendType":1}',
        '{"PublicIP":"1.2.3.4"} x',
    ],
)
def test_attributes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Attributes.decode(text)


def test_member_names_match_in_any_case() -> None:
    text = '{"publicip":"1.2.3.4","BACKENDTYPE":"udp","backendData":{"b":1,"a":2}}'
    assert Attributes.decode(text) == Attributes(IPv4Address("1.2.3.4"), None, "udp", '{"b":1,"a":2}')


def lease(number: int, mark: str = "") -> Lease:
    return Lease(IPv4Network(f"10.0.{number}.0/24"), None, Attributes(IPv4Address("1.1.1.1"), None, mark))


CHANGES = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["", "a", "b"])), max_size=12).map(
    lambda steps: tuple(
        Change(lease(number).key, lease(number, mark) if mark else None) for number, mark in steps
    )
)


@given(CHANGES, st.integers(0, 12))
def test_changes_may_come_in_any_batches(changes: tuple[Change, ...], cut: int) -> None:
    at_once = LeaseSet().fold(changes)
    assert LeaseSet().fold(changes[:cut]).fold(changes[cut:]) == at_once
    assert at_once.fold(Snapshot(tuple(at_once.by_key.values()))) == at_once


def test_a_snapshot_replaces_everything() -> None:
    known = LeaseSet().fold(Snapshot((lease(1), lease(2))))
    updates: list[Update] = [Snapshot((lease(2, "new"), lease(3))), ()]
    for update in updates:
        known = known.fold(update)
    assert dict(known.by_key) == {"10.0.2.0-24": lease(2, "new"), "10.0.3.0-24": lease(3)}
    assert list(known.peers(lease(3))) == [lease(2, "new")]
