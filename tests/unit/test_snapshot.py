"""The node's state on disk: what was written is read, and anything else is refused with the remedy."""

from __future__ import annotations

import stat
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import ConfigError
from cni.spec import gojson
from flanneld import snapshot
from flanneld.config import NetConf, parse_netconf, validate
from flanneld.iface import ExternalInterface
from flanneld.lease import Attributes, Lease
from flanneld.snapshot import NodeState, last_known, parse, render, write

words = st.text(max_size=12)
numbers = st.one_of(st.integers(-(1 << 31), 1 << 31), st.floats(allow_nan=False, allow_infinity=False))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
# Absent and null are the same to a reader of leases.
backend_data = st.one_of(
    st.just(""), json_values.filter(lambda v: v is not None).map(lambda v: gojson.dumps(v, sort=False))
)
v4 = st.ip_addresses(v=4).filter(lambda address: int(address) != 0)
v6 = st.ip_addresses(v=6)
moments = st.floats(0, 1e12)


@st.composite
def subnets4(draw: st.DrawFn) -> IPv4Network:
    return IPv4Network((draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 32))), strict=False)


@st.composite
def subnets6(draw: st.DrawFn) -> IPv6Network:
    return IPv6Network((draw(st.integers(0, 2**128 - 1)), draw(st.integers(1, 128))), strict=False)


attributes = st.builds(
    Attributes,
    st.none() | v4,
    st.none() | v6,
    st.sampled_from(["", "vxlan", "host-gw"]),
    backend_data,
    backend_data,
)
leases = st.one_of(
    st.builds(Lease, subnets4(), st.none() | subnets6(), attributes, moments),
    st.builds(Lease, st.none(), subnets6(), attributes, moments),
)
externals = st.builds(
    ExternalInterface,
    words,
    st.integers(0, 65535),
    st.none() | v4,
    st.none() | v6,
    st.none() | v4,
    st.none() | v6,
    words,
)


@st.composite
def configs(draw: st.DrawFn) -> NetConf:
    """A configuration as it is parsed: whatever is written in it, with a backend type."""
    keys = draw(st.dictionaries(words.filter(lambda key: key.lower() != "type"), json_values, max_size=3))
    members: dict[str, object] = {"Backend": {**keys, "Type": draw(words)}}
    for name, values in (
        ("Network", subnets4().map(str)),
        ("IPv6Network", subnets6().map(str)),
        ("SubnetLen", st.integers(0, 128)),
        ("SubnetMin", v4.map(str)),
        ("IPv6SubnetMax", v6.map(str)),
        ("EnableIPv4", st.booleans()),
        ("EnableIPv6", st.booleans()),
        ("EnableNFTables", st.booleans()),
    ):
        if draw(st.booleans()):
            members[name] = draw(values)
    return parse_netconf(gojson.dumps(members), "net-conf.json")


nodes = st.builds(
    NodeState,
    st.integers(0, 1 << 22),
    moments,
    words,
    st.tuples(words, words),
    configs(),
    externals,
    leases,
    st.lists(leases, max_size=3).map(tuple),
    st.frozensets(words, max_size=2),
)

NODE = NodeState(
    pid=4711,
    written_s=1751207666.25,
    origin="02:00:00:00:00:aa etcd /coreos.com/network",
    public_ips=("", ""),
    config=validate(parse_netconf('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}', "x"), "x"),
    external=ExternalInterface(
        "eth0", 1500, IPv4Address("192.0.2.1"), None, IPv4Address("192.0.2.1"), None, "--iface=eth0 names it"
    ),
    own=Lease(
        IPv4Network("10.244.1.0/24"),
        None,
        Attributes(IPv4Address("192.0.2.1"), None, "vxlan", '{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}'),
        1751294066.5,
    ),
    peers=(),
)


@given(nodes)
def test_what_was_written_is_read(node: NodeState) -> None:
    assert parse(render(node), "state.json") == node


def test_a_node_with_ipv6_alone_is_read_back() -> None:
    own = Lease(
        None, IPv6Network("fd00:10:244:1::/64"), Attributes(None, IPv6Address("2001:db8::1"), "vxlan")
    )
    node = replace(NODE, own=own, peers=(replace(own, subnet6=IPv6Network("fd00:10:244:2::/64")),))
    assert parse(render(node), "state.json") == node


def test_the_revision_of_a_lease_stays_with_the_store() -> None:
    node = replace(NODE, own=replace(NODE.own, revision=7))
    assert parse(render(node), "state.json") == NODE


def test_of_backend_keys_in_different_case_the_same_one_wins() -> None:
    """The last one counts, in the file as in net-conf.json."""
    text = '{"Network": "10.244.0.0/16", "Backend": {"type": "vxlan", "vni": 2, "VNI": 1}}'
    node = replace(NODE, config=parse_netconf(text, "x"))
    read = parse(render(node), "state.json").config
    assert read.backend_type == "vxlan"
    assert gojson.integer(dict(read.backend), "VNI", 0, 0, 9) == 1


# ---- what was not written by us


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^state\.json "):
        parse(text, "state.json")


@given(json_values.filter(lambda value: value is not None), st.data())
def test_any_member_replaced_is_read_or_refused(value: object, data: st.DataObject) -> None:
    record = gojson.load_object(render(NODE))
    where = record
    name = data.draw(st.sampled_from(sorted(where)))
    if isinstance(inner := where[name], dict) and data.draw(st.booleans()):
        where = inner
        name = data.draw(st.sampled_from(sorted(where)))
    where[name] = value
    try:
        parse(gojson.dumps(record), "state.json")
    except ConfigError as exc:
        complaint = str(exc)
    else:
        complaint = "state.json"
    assert "state.json" in complaint


@pytest.mark.parametrize("member", ["format", "own"])
def test_a_file_without_an_essential_member_is_refused(member: str) -> None:
    record = gojson.load_object(render(NODE))
    del record[member]
    with pytest.raises(ConfigError, match=r"^state\.json was not written by this version"):
        parse(gojson.dumps(record), "state.json")


# ---- the file


def test_the_file_is_replaced_as_a_whole_and_for_root_alone(tmp_path: Path) -> None:
    directory = tmp_path / "lib" / "flannel"
    snapshot.write(directory, NODE)
    path = directory / "state.json"
    first = path.stat()
    assert stat.S_IMODE(first.st_mode) == 0o600
    later = replace(NODE, written_s=NODE.written_s + 1)
    with path.open(encoding="utf-8") as reader:
        snapshot.write(directory, later)
        assert parse(reader.read(), "state.json") == NODE
    assert snapshot.load(directory) == later
    assert path.stat().st_ino != first.st_ino
    assert [p.name for p in directory.iterdir()] == ["state.json"]


def test_a_left_over_of_a_killed_writer_does_not_hinder(tmp_path: Path) -> None:
    (tmp_path / ".state.json.tmp").write_text("{" * 100_000)
    snapshot.write(tmp_path, NODE)
    assert snapshot.load(tmp_path) == NODE


def test_the_writer_follows_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".state.json.tmp").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        snapshot.write(tmp_path, NODE)
    assert victim.read_text() == "precious"


def test_a_missing_file_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        snapshot.load(tmp_path)
    assert str(tmp_path / "state.json") in str(caught.value)
    assert "--state-dir" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b'{"format": 2}', render(NODE).encode()[:-40]])
def test_a_broken_file_is_told_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        snapshot.load(tmp_path)
    assert str(tmp_path / "state.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_a_state_of_this_machine_and_store_is_started_from(tmp_path: Path) -> None:
    """A cloned disk, a new network card, another etcd: what the file says is not ours."""
    assert last_known(tmp_path, lambda name: "x") is None
    write(tmp_path, NODE)
    assert last_known(tmp_path, lambda name: NODE.origin if name == "eth0" else "") == NODE
    assert last_known(tmp_path, lambda name: "02:00:00:00:00:bb etcd /coreos.com/network") is None
    (tmp_path / "state.json").write_text("{")
    assert last_known(tmp_path, lambda name: NODE.origin) is None
