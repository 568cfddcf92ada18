"""Laws of plans, on states drawn at random and a kernel in memory."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given

from cni.net.entries import (
    BLACKHOLE_METRIC,
    Address,
    Blackhole,
    Entry,
    FdbEntry,
    Key,
    Link,
    Neighbour,
    Route,
    Vxlan,
    state,
)
from cni.net.fake import FakeKernel
from cni.net.plan import Operation, Scope, plan
from tests.unit.states import kernel_states

State = dict[Key, Entry]

DEVICE = Link("flannel.1", 1450, "02:00:00:00:00:01", True, Vxlan(1, 8472, "192.0.2.1", "eth0"))
REBUILT = DEVICE._replace(vxlan=DEVICE.vxlan._replace(port=4789))
MAC = "02:00:00:00:00:02"
PEER: tuple[Entry, ...] = (
    Neighbour("flannel.1", "10.244.2.0", MAC),
    FdbEntry("flannel.1", MAC, "192.0.2.2"),
    Route("flannel.1", "10.244.2.0/24", "10.244.2.0", onlink=True),
)
NODE: tuple[Entry, ...] = (DEVICE, Address("flannel.1", "10.244.1.0/32"), *PEER)


@given(kernel_states())
def test_a_state_as_desired_needs_nothing(x: State) -> None:
    assert plan(x, x) == []


@given(kernel_states(), kernel_states())
def test_applying_the_plan_gives_the_desired_state(desired: State, actual: State) -> None:
    kernel = FakeKernel(actual)
    assert kernel.apply(plan(desired, actual)) == []
    assert kernel.entries == desired


@given(kernel_states(), kernel_states())
def test_puts_rise_through_the_ranks_before_drops_fall(desired: State, actual: State) -> None:
    operations = plan(desired, actual)
    rebuilt = [op for op in operations if op.verb == "drop" and op.entry.key in desired]
    assert operations[: len(rebuilt)] == rebuilt
    rest = operations[len(rebuilt) :]
    puts = [op.entry.rank for op in rest if op.verb == "put"]
    drops = [op.entry.rank for op in rest if op.verb == "drop"]
    assert [op.verb for op in rest] == ["put"] * len(puts) + ["drop"] * len(drops)
    assert puts == sorted(puts)
    assert drops == sorted(drops, reverse=True)


@given(kernel_states(), kernel_states())
def test_what_is_right_is_not_touched(desired: State, actual: State) -> None:
    rebuilt = {op.entry.link for op in plan(desired, actual) if op.verb == "drop" and op.entry.key in desired}
    for operation in plan(desired, actual):
        entry = operation.entry
        assert actual.get(entry.key) != desired.get(entry.key) or entry.link in rebuilt


@given(kernel_states(), kernel_states())
def test_only_a_link_that_the_kernel_cannot_change_is_rebuilt(desired: State, actual: State) -> None:
    for operation in plan(desired, actual):
        if operation.verb == "drop" and operation.entry.key in desired:
            old, new = operation.entry, desired[operation.entry.key]
            assert isinstance(old, Link) and isinstance(new, Link)
            assert old.vxlan != new.vxlan


def test_no_route_is_ever_without_the_entries_behind_it() -> None:
    put = [type(op.entry) for op in plan(state(NODE), {})]
    drop = [type(op.entry) for op in plan({}, state(NODE))]
    assert put == [Link, Address, Neighbour, FdbEntry, Route]
    assert drop == [Route, FdbEntry, Neighbour, Address, Link]


def test_a_rebuilt_link_gets_everything_back() -> None:
    operations = plan(state([REBUILT, *NODE[1:]]), state(NODE))
    assert operations == [Operation("drop", DEVICE), *(Operation("put", e) for e in (REBUILT, *NODE[1:]))]


def test_what_vanishes_with_a_rebuilt_link_is_not_dropped_one_by_one() -> None:
    assert plan(state([REBUILT]), state(NODE)) == [Operation("drop", DEVICE), Operation("put", REBUILT)]


@pytest.mark.parametrize(
    "changed",
    [
        DEVICE._replace(mtu=1400),
        DEVICE._replace(mac="02:00:00:00:00:09"),
        DEVICE._replace(up=False),
        DEVICE._replace(tx_checksum=True),
    ],
    ids=["mtu", "mac", "down", "offload"],
)
def test_what_a_link_can_change_is_changed_in_place(changed: Link) -> None:
    assert plan(state(NODE), state([changed, *NODE[1:]])) == [Operation("put", DEVICE)]


def test_a_moved_peer_is_reachable_at_one_place_at_any_moment() -> None:
    moved = FdbEntry("flannel.1", MAC, "192.0.2.99")
    desired = state([*NODE[:-2], moved, NODE[-1]])
    kernel = FakeKernel(state(NODE))
    for operation in plan(desired, state(NODE)):
        kernel.apply([operation])
        places = [e for e in kernel.entries.values() if isinstance(e, FdbEntry)]
        assert places == [moved]
    assert kernel.entries == desired


def test_a_moved_peer_is_one_operation() -> None:
    moved = FdbEntry("flannel.1", MAC, "192.0.2.99")
    assert plan(state([*NODE[:-2], moved, NODE[-1]]), state(NODE)) == [Operation("put", moved)]


@pytest.mark.parametrize(
    ("mac", "apart"),
    [(MAC, False), ("fe:ff:ff:ff:ff:ff", False), ("00:00:00:00:00:00", True), ("33:33:00:00:00:01", True)],
)
def test_only_a_mac_of_many_has_several_places(mac: str, apart: bool) -> None:
    """What the kernel appends for the one it replaces for the other: tests/netns/test_vxlan_features.py."""
    one, other = FdbEntry("flannel.1", mac, "192.0.2.2"), FdbEntry("flannel.1", mac, "192.0.2.3")
    assert (one.key != other.key) is apart


def test_a_peer_that_changes_its_way_is_never_without_a_route() -> None:
    direct = Route("eth0", "10.244.2.0/24", "192.0.2.2", marked=True)
    straight = state([*NODE[:2], direct])
    assert plan(straight, state(NODE)) == [
        Operation("put", direct),
        Operation("drop", PEER[1]),
        Operation("drop", PEER[0]),
    ]
    assert plan(state(NODE), straight) == [Operation("put", entry) for entry in PEER]


def test_a_blackhole_is_no_rival_of_a_route() -> None:
    hole, bridge = Blackhole("10.244.1.0/24"), Route("cni0", "10.244.1.0/24", "")
    assert hole.metric == BLACKHOLE_METRIC
    assert len({hole.key, bridge.key, bridge._replace(metric=hole.metric).key}) == 3
    assert plan(state([*NODE, hole]), state(NODE)) == [Operation("put", hole)]
    # It hangs on no link, so it outlives the device.
    assert plan(state([REBUILT, hole]), state([*NODE, hole])) == [
        Operation("drop", DEVICE),
        Operation("put", REBUILT),
    ]


def test_a_blackhole_with_another_metric_gives_way() -> None:
    ours, upstreams = Blackhole("10.244.1.0/24"), Blackhole("10.244.1.0/24", 0)
    assert plan(state([ours]), state([upstreams])) == [Operation("put", ours), Operation("drop", upstreams)]


# ---- the kernel in memory has the real one's manners; tests/netns/test_kernel.py asks the real one


def test_the_fake_refuses_an_entry_without_its_link() -> None:
    refused = FakeKernel().apply([Operation("put", entry) for entry in PEER])
    assert [r.errno for r in refused] == [errno.ENODEV] * 3


def test_the_fake_refuses_a_second_link_of_the_same_name() -> None:
    kernel = FakeKernel(state(NODE))
    [refused] = kernel.apply([Operation("put", REBUILT)])
    assert refused.errno == errno.EEXIST
    assert kernel.entries == state(NODE)


def test_the_fake_drops_what_is_absent_without_a_word() -> None:
    assert FakeKernel().apply([Operation("drop", entry) for entry in NODE]) == []


def test_the_fake_shows_only_what_is_in_scope() -> None:
    kernel = FakeKernel(state([*NODE, REBUILT._replace(name="flannel.7")]))
    assert kernel.snapshot(Scope(("flannel.1",))) == state(NODE)
    assert kernel.snapshot(Scope(())) == {}


def test_the_fake_knows_ours_on_other_links_by_their_mark() -> None:
    marked = Route("eth0", "10.244.7.0/24", "192.0.2.7", marked=True)
    foreign = Route("eth0", "10.244.8.0/24", "192.0.2.8")
    outside = Route("eth0", "10.245.7.0/24", "192.0.2.7", marked=True)
    kernel = FakeKernel(others=frozenset({"eth0"}))
    assert kernel.apply([Operation("put", entry) for entry in (marked, foreign, outside)]) == []
    assert kernel.snapshot(Scope((), ("10.244.0.0/16", "fd00::/48"))) == state([marked])
    [refused] = kernel.apply([Operation("put", marked._replace(link="eth1"))])
    assert refused.errno == errno.ENODEV


def test_the_fake_shows_the_blackholes_that_it_is_asked_for() -> None:
    ours, other = Blackhole("10.244.1.0/24"), Blackhole("10.244.1.0/25")
    kernel = FakeKernel()
    assert kernel.apply([Operation("put", entry) for entry in (ours, other)]) == []
    assert kernel.snapshot(Scope((), ("10.244.0.0/16",))) == {}
    assert kernel.snapshot(Scope((), blackholes=("10.244.1.0/24",))) == state([ours])


def test_the_fake_tells_of_the_offload_if_asked() -> None:
    kernel = FakeKernel(state([DEVICE._replace(tx_checksum=True)]))
    assert kernel.snapshot(Scope(("flannel.1",))) == state([DEVICE])
    assert kernel.snapshot(Scope(("flannel.1",), tx_checksum=False)) == kernel.entries
