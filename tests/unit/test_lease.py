"""Leases as values: keys and attributes as upstream writes them, and the folding of updates."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from etcd3.etcdrpc import kv_pb2, rpc_pb2
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it ships no types
from hypothesis import example, given
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
from flanneld.subnet import etcd

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


# ---- etcd's fast path, held against the general parsers


def outcome(parse: Callable[[bytes], object], data: bytes) -> object:
    try:
        return parse(data)
    except ValueError:
        return ValueError


def general_key(key: bytes) -> object:
    return parse_subnet_key(key.decode("utf-8", "replace"))


WRITTEN = [
    b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
    b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}',
    b'{"PublicIP":"1.2.3.4","PublicIPv6":"fd01::4","BackendType":"vxlan","BackendData":{"VNI":16777215,'
    b'"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"}}',
    b'{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"wireguard",'
    b'"BackendData":{"PublicKey":"YWJjZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXoxMjM0NTY=","Port":51820}}',
    b'{"PublicIP":"1.2.3.4","PublicIPv6":null,"BackendType":"host-gw"}',
    b'{"PublicIP":"0.0.0.0","PublicIPv6":null}',
]
KEYS = [b"/coreos.com/network/subnets/10.5.34.0-24", b"/p/10.12.13.0-24&fd00:12:13::-56", b"10.5.34.0-24"]


@st.composite
def damaged(draw: st.DrawFn, intact: list[bytes]) -> bytes:
    """One of `intact` with a few bytes removed, inserted or replaced by such as the format uses."""
    data = bytearray(draw(st.sampled_from(intact)))
    pieces = st.sampled_from(list(rb'"\{}[]:,.-/&0123456789abcdefnulxVNIP <>' + b"\x00\x7f\x80\xff")).map(
        lambda n: bytes([n])
    )
    pieces |= st.sampled_from(
        [b"null", b'""', b"01", b"1e3", b"-0", b"::", b"\\u0041", b"999999999999999999"]
    )
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(pieces | st.just(b""))
    return bytes(data)


@given(damaged(WRITTEN) | st.from_regex(etcd._VALUE, fullmatch=True))
@example(WRITTEN[0].replace(b":1,", b":01,"))
@example(WRITTEN[0].replace(b":1,", b":9007199254740993,"))
@example(WRITTEN[0].replace(b"vxlan", b"vx\\u006can"))
@example(WRITTEN[0].replace(b"192.", b"0192."))
@example(WRITTEN[0] + b"\n")
@example(WRITTEN[0] + b"x")
@example(WRITTEN[0].replace(b"c6:", b"<"))
@example(WRITTEN[0].replace(b"c6:", b">"))
@example(WRITTEN[0].replace(b"c6:", b"&"))
@example(WRITTEN[0].replace(b"c6:", b"\x7f"))
@example(WRITTEN[0].replace(b"c6:", b"\xc3\xa9"))
@example(WRITTEN[0].replace(b"c6:", b"\xff"))
def test_values_are_read_alike(value: bytes) -> None:
    assert outcome(etcd.parse_value, value) == outcome(Attributes.decode, value)


@given(damaged(KEYS) | st.from_regex(etcd._KEY, fullmatch=True))
@example(b"/9.9.9.9-8&/10.1.2.0-24")
@example(b"/1.10.1.2.0-24")
@example(b"/10.1.2.0-32")
@example(b"/10.1.2.7-24")
@example(b"/010.1.2.0-24")
@example(b"/10.1.2.0-24\n")
def test_keys_are_read_alike(key: bytes) -> None:
    assert outcome(etcd.parse_key, key) == outcome(general_key, key)


def test_what_flannel_writes_needs_no_general_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [Attributes.decode(value) for value in WRITTEN]

    def refuse(text: object) -> None:
        raise AssertionError(f"{text!r} came to the general parser")

    monkeypatch.setattr(Attributes, "decode", refuse)
    monkeypatch.setattr(etcd, "parse_subnet_key", refuse)
    assert [etcd.parse_value(value) for value in WRITTEN] == expected
    assert [attrs.encode().encode() for attrs in expected] == WRITTEN
    assert etcd.parse_key(KEYS[0]) == (IPv4Network("10.5.34.0/24"), None)


NUMBERS = st.integers(0, 2**63 - 1) | st.integers(0, 300)
REPLIES = st.builds(
    lambda revision, kvs, more: rpc_pb2.RangeResponse(
        header=rpc_pb2.ResponseHeader(cluster_id=2**64 - 1, member_id=5, revision=revision, raft_term=2),
        kvs=kvs,
        more=more,
        count=len(kvs),
    ),
    NUMBERS,
    st.lists(
        st.builds(
            kv_pb2.KeyValue,
            key=st.binary(max_size=300),
            create_revision=NUMBERS,
            mod_revision=NUMBERS,
            version=NUMBERS,
            value=st.binary(max_size=300),
            lease=NUMBERS,
        ),
        max_size=4,
    ),
    st.booleans(),
).map(lambda reply: bytes(reply.SerializeToString()))


def generated(data: bytes) -> etcd.RangeReply:
    """What the generated code makes of a reply."""
    try:
        reply = rpc_pb2.RangeResponse.FromString(data)
    except DecodeError:
        raise ValueError from None
    kvs = [etcd.KeyValue(kv.key, kv.value, kv.mod_revision, kv.lease) for kv in reply.kvs]
    return etcd.RangeReply(reply.header.revision, kvs)


@given(REPLIES, st.integers(0, 2000))
def test_replies_are_decoded_alike(data: bytes, cut: int) -> None:
    assert etcd.decode_range(data) == generated(data)
    assert outcome(etcd.decode_range, data[:cut]) == outcome(generated, data[:cut])


@pytest.mark.parametrize(
    "data", [b"\x09" + bytes(8), b"\x82\x01\x01x", b"\x80\x01\x08\x00", b"\x12", b"\x12\x85", b"\x12\x02\x0a"]
)
def test_a_reply_of_another_kind_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="etcd's answer"):
        etcd.decode_range(data)
