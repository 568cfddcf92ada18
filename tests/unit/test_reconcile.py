"""The reconciler on a kernel in memory and a clock that stands still until it is moved."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.errors import ConfigError
from cni.net.entries import Address, Entry, Link, Neighbour, NetState, Route, state
from cni.net.fake import FakeKernel
from cni.net.kernel import Change as KernelChange
from cni.net.plan import Operation, Refused, Scope
from flanneld.backend import build
from flanneld.backend.protocol import desired
from flanneld.config import parse_netconf
from flanneld.iface import ExternalInterface
from flanneld.lease import Attributes, Change, Lease, Snapshot
from flanneld.reconcile import GRACE_S, RESYNC_S, Reconciler, WorkKey, explain, is_drift
from flanneld.workqueue import FakeClock

CONFIG = parse_netconf('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}', "net-conf.json")
DUAL = parse_netconf(
    '{"Network": "10.244.0.0/16", "IPv6Network": "fd00:10:244::/48", "EnableIPv6": true, '
    '"Backend": {"Type": "vxlan"}}',
    "net-conf.json",
)
EXTERNAL = ExternalInterface(
    "eth0",
    1500,
    IPv4Address("192.0.2.1"),
    IPv6Address("2001:db8::1"),
    IPv4Address("192.0.2.1"),
    IPv6Address("2001:db8::1"),
    "--iface=eth0 names it",
)
SYNC: WorkKey = ("sync",)


def lease(subnet: int, node: int | None = None, mac: int | None = None, subnet6: int = 0) -> Lease:
    """10.244.SUBNET.0/24 (with SUBNET6, fd00:10:244:SUBNET6::/64 too) held by node 192.0.2.NODE."""
    node = subnet if node is None else node
    mac = node if mac is None else mac
    attrs = Attributes(
        public_ip=IPv4Address(f"192.0.2.{node}"),
        public_ipv6=IPv6Address(f"2001:db8::{node:x}") if subnet6 else None,
        backend_type="vxlan",
        backend_data=f'{{"VNI":1,"VtepMAC":"02:00:00:00:00:{mac:02x}"}}',
        backend_v6_data=f'{{"VNI":1,"VtepMAC":"02:00:00:00:06:{mac:02x}"}}' if subnet6 else "",
    )
    return Lease(
        IPv4Network(f"10.244.{subnet}.0/24"),
        IPv6Network(f"fd00:10:244:{subnet6:x}::/64") if subnet6 else None,
        attrs,
    )


OWN = lease(1)
BACKEND = build(CONFIG, EXTERNAL, "net-conf.json")


def put(changed: Lease) -> tuple[Change, ...]:
    return (Change(changed.key, changed),)


def gone(lost: Lease) -> tuple[Change, ...]:
    return (Change(lost.key, None),)


def wanted(*peers: Lease) -> NetState:
    return desired(BACKEND, OWN, iter(peers))


class Watched(FakeKernel):
    """Notes what it was asked for."""

    def __init__(self, entries: NetState | None = None) -> None:
        super().__init__(entries)
        self.dumps = 0
        self.applied: list[list[Operation]] = []

    def snapshot(self, scope: Scope) -> NetState:
        self.dumps += 1
        return super().snapshot(scope)

    def apply(self, operations: Sequence[Operation]) -> list[Refused]:
        self.applied.append(list(operations))
        return super().apply(operations)


class Node:
    """A reconciler at work in a thread of its own."""

    def __init__(
        self,
        kernel: Watched,
        own: Lease = OWN,
        chores: dict[WorkKey, Callable[[], None]] | None = None,
        dual: bool = False,
    ) -> None:
        self.kernel, self.clock = kernel, FakeClock()
        config = DUAL if dual else CONFIG
        backend = build(config, EXTERNAL, "net-conf.json")
        self._reached = threading.Event()
        every = {**(chores or {}), SYNC: self._reached.set}
        self.reconciler = Reconciler(kernel, backend, config, own, self.clock, every)
        self.ready = 0
        self.reconciler.on_peers_programmed = self._count

    def _count(self) -> None:
        self.ready += 1

    def settle(self) -> None:
        """Return when all that is due has been worked on; work may itself queue work."""
        for _ in range(3):
            self._reached.clear()
            self.reconciler.queue.add(SYNC)
            assert self._reached.wait(10)

    def update(self, *updates: Snapshot | tuple[Change, ...]) -> None:
        for update in updates:
            self.reconciler.lease_update(update)
        self.settle()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.settle()

    def echo(self) -> None:
        """Report everything that was written to the kernel, as the kernel does."""
        told = [
            KernelChange(op.verb == "drop", op.entry.link, None if isinstance(op.entry, Link) else op.entry)
            for operations in self.kernel.applied
            for op in operations
        ]
        self.reconciler.kernel_changes(told)

    def drifted(self, *entries: Entry) -> None:
        """Somebody deletes entries behind our back, and the kernel says so."""
        for entry in entries:
            del self.kernel.entries[entry.key]
            self.reconciler.kernel_changes([KernelChange(True, entry.link, entry)])


@contextmanager
def working(node: Node) -> Iterator[Node]:
    worker = threading.Thread(target=node.reconciler.run)
    worker.start()
    try:
        node.settle()
        yield node
    finally:
        node.reconciler.queue.shut_down()
        worker.join(10)
        assert not worker.is_alive()


@pytest.fixture
def node() -> Iterator[Node]:
    """A node that is up, with peers 2 and 3 programmed; its kernel's notes start afterwards."""
    with working(Node(Watched())) as made:
        assert made.reconciler.prepare() == []
        made.update(Snapshot((OWN, lease(2), lease(3))))
        made.kernel.applied.clear()
        made.kernel.dumps = 0
        yield made


# ---- start


def test_a_start_makes_the_device_and_a_snapshot_of_leases_the_rest() -> None:
    with working(Node(Watched())) as node:
        assert node.reconciler.prepare() == []
        assert node.kernel.entries == state(BACKEND.base(OWN))
        assert node.ready == 0
        node.update(Snapshot((OWN, lease(2), lease(3))))
        assert node.kernel.entries == wanted(lease(2), lease(3))
        assert node.ready == 1


STALE = wanted(lease(2), lease(9))
OLD_ADDRESS = Address("flannel.1", "10.244.77.0/32")


def test_nothing_is_dropped_before_the_peers_are_known() -> None:
    before = {**STALE, OLD_ADDRESS.key: OLD_ADDRESS}
    with working(Node(Watched(before))) as node:
        assert node.reconciler.prepare() == []
        node.reconciler.kernel_changes([])
        node.advance(1)
        node.update(put(lease(4)))
        assert node.kernel.dumps > 1
        assert node.kernel.entries == before
        node.update(Snapshot((OWN, lease(2))))
        assert node.kernel.entries == wanted(lease(2))


def test_our_own_device_is_mended_before_the_peers_are_known() -> None:
    with working(Node(Watched(STALE))) as node:
        assert node.reconciler.prepare() == []
        address = Address("flannel.1", "10.244.1.0/32")
        node.drifted(address)
        node.advance(1)
        assert node.kernel.entries == STALE


def test_what_is_already_right_is_not_written_at_a_restart() -> None:
    with working(Node(Watched(wanted(lease(2), lease(3))))) as node:
        assert node.reconciler.prepare() == []
        node.update(Snapshot((OWN, lease(2), lease(3))))
        assert [op for operations in node.kernel.applied for op in operations] == []
        assert node.ready == 1


def test_a_device_that_cannot_be_kept_is_rebuilt_at_the_start() -> None:
    link = next(entry for entry in STALE.values() if isinstance(entry, Link))
    old = link._replace(vxlan=link.vxlan._replace(port=4789))
    node = Node(Watched({**STALE, old.key: old}))
    assert node.reconciler.prepare() == []
    assert node.kernel.entries == state(BACKEND.base(OWN))


def test_a_refused_device_is_reported_by_the_start() -> None:
    node = Node(Watched())
    node.kernel.refuse["link", "flannel.1"] = errno.EADDRINUSE
    refused = node.reconciler.prepare()
    assert refused[0].errno == errno.EADDRINUSE
    assert "ss -lunp" in explain(refused)


# ---- leases


def test_a_new_lease_is_written_without_reading_the_kernel(node: Node) -> None:
    node.update(put(lease(4)))
    assert node.kernel.entries == wanted(lease(2), lease(3), lease(4))
    [operations] = node.kernel.applied
    assert operations == [Operation("put", entry) for entry in BACKEND.peer(lease(4))]
    assert node.kernel.dumps == 0


def test_a_lease_that_is_gone_is_dropped_route_first(node: Node) -> None:
    node.update(gone(lease(2)))
    assert node.kernel.entries == wanted(lease(3))
    [operations] = node.kernel.applied
    assert [op.entry for op in operations] == list(BACKEND.peer(lease(2)))[::-1]
    assert node.kernel.dumps == 0


@pytest.mark.parametrize(
    "changed",
    [lease(2, node=22, mac=2), lease(2, mac=22), lease(2, node=22)],
    ids=["public ip", "mac", "both"],
)
def test_a_lease_that_changed_leaves_nothing_behind(node: Node, changed: Lease) -> None:
    node.update(put(changed))
    assert node.kernel.entries == wanted(changed, lease(3))
    [operations] = node.kernel.applied
    assert not any(isinstance(op.entry, Route) for op in operations)


def test_a_lease_that_is_renewed_is_no_work(node: Node) -> None:
    node.update(put(replace(lease(2), expires_s=99.0, revision=8)), put(OWN), gone(OWN))
    assert node.kernel.applied == []
    assert node.kernel.entries == wanted(lease(2), lease(3))


def test_a_lease_of_another_backend_takes_its_entries_away(node: Node) -> None:
    other = replace(lease(2), attrs=replace(lease(2).attrs, backend_type="host-gw"))
    node.update(put(other))
    assert node.kernel.entries == wanted(lease(3))
    node.update(put(lease(2)))
    assert node.kernel.entries == wanted(lease(2), lease(3))


def test_an_unknown_lease_that_is_gone_is_no_work(node: Node) -> None:
    node.update(gone(lease(99)))
    assert node.kernel.applied == []


def test_a_second_snapshot_counts_as_a_whole(node: Node) -> None:
    """Changed leases are changed, missing ones dropped."""
    node.update(Snapshot((lease(1), lease(3, mac=33), lease(4))))
    assert node.kernel.entries == wanted(lease(3, mac=33), lease(4))


def test_a_store_that_lost_its_data_takes_no_peer_away_at_once(node: Node) -> None:
    """A snapshot without even our own lease: the others are kept for a while, unless they come back."""
    node.update(Snapshot(()))
    assert node.kernel.entries == wanted(lease(2), lease(3))
    node.update(put(lease(3)))
    node.advance(GRACE_S + 1)
    assert node.kernel.entries == wanted(lease(3))


def test_a_lease_outside_of_the_network_or_over_our_subnet_is_passed_over(node: Node) -> None:
    before = dict(node.kernel.entries)
    for subnet in ("192.168.77.0/24", "0.0.0.0/0", "10.244.0.0/16", "10.244.1.0/25"):
        misplaced = replace(lease(9), subnet=IPv4Network(subnet))
        node.update(put(misplaced))
        assert node.kernel.entries == before


# ---- leases that share entries


def test_the_old_lease_of_a_node_that_moved_does_not_take_its_vtep_along(node: Node) -> None:
    """A node took subnet 8 and kept MAC and public IP; its old lease ends a day later."""
    node.update(put(lease(8, node=2)))
    node.update(gone(lease(2)))
    assert node.kernel.entries == wanted(lease(3), lease(8, node=2))


def test_the_old_lease_of_a_node_that_became_dual_stack_does_not_take_its_route_along() -> None:
    with working(Node(Watched(), lease(1, subnet6=1), dual=True)) as node:
        assert node.reconciler.prepare() == []
        node.update(Snapshot((lease(2), lease(3))))
        node.update(put(lease(2, mac=22, subnet6=2)))
        node.update(gone(lease(2)))
        backend = build(DUAL, EXTERNAL, "net-conf.json")
        peers = iter([lease(3), lease(2, mac=22, subnet6=2)])
        assert node.kernel.entries == desired(backend, lease(1, subnet6=1), peers)


# Few subnets and nodes, so that leases meet; a node's MAC follows from its public IP.
some_leases = st.builds(
    lease, st.integers(2, 5), node=st.integers(2, 4), subnet6=st.sampled_from((0, 0, 2, 3))
)
some_updates = st.one_of(
    st.lists(some_leases, max_size=4).map(lambda found: Snapshot(tuple(found))),
    st.lists(
        st.builds(lambda found, lost: Change(found.key, None if lost else found), some_leases, st.booleans()),
        min_size=1,
        max_size=3,
    ).map(tuple),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(some_leases, max_size=3), st.lists(some_updates, max_size=8), st.booleans())
def test_after_any_updates_the_kernel_holds_what_the_leases_ask_for(
    first: list[Lease], updates: list[Snapshot | tuple[Change, ...]], one_by_one: bool
) -> None:
    own = lease(1, subnet6=1)
    backend = build(DUAL, EXTERNAL, "net-conf.json")
    with working(Node(Watched(wanted(lease(9))), own, dual=True)) as node:
        assert node.reconciler.prepare() == []
        node.update(Snapshot(tuple(first)))
        for update in updates:
            node.reconciler.lease_update(update)
            if one_by_one:
                node.settle()
        node.settle()
        expected = desired(backend, own, iter(node.reconciler.leases.peers(own)))
        assert node.kernel.entries == expected
        assert node.reconciler.wanted == expected


# ---- the kernel's notifications


def test_the_echo_of_our_own_work_is_no_drift(node: Node) -> None:
    node.update(put(lease(4)), gone(lease(2)))
    node.echo()
    node.advance(1)
    assert node.kernel.dumps == 0


def test_drift_is_repaired_soon_and_in_one_pass(node: Node) -> None:
    entries = [*BACKEND.peer(lease(2)), *BACKEND.peer(lease(3))]
    node.drifted(*entries)
    node.advance(0.005)
    assert node.kernel.dumps == 0
    node.advance(0.2)
    assert node.kernel.dumps == 1
    assert node.kernel.entries == wanted(lease(2), lease(3))
    node.echo()
    node.advance(1)
    assert node.kernel.dumps == 1


def test_an_entry_that_nobody_wants_is_removed(node: Node) -> None:
    foreign = Route("flannel.1", "10.244.200.0/24", "10.244.200.0", onlink=True)
    node.kernel.entries[foreign.key] = foreign
    node.reconciler.kernel_changes([KernelChange(False, "flannel.1", foreign)])
    node.advance(0.2)
    assert node.kernel.entries == wanted(lease(2), lease(3))


def test_an_entry_that_was_changed_is_put_back(node: Node) -> None:
    changed = Neighbour("flannel.1", "10.244.2.0", "02:00:00:00:00:ee")
    node.kernel.entries[changed.key] = changed
    node.reconciler.kernel_changes([KernelChange(False, "flannel.1", changed)])
    node.advance(0.2)
    assert node.kernel.entries == wanted(lease(2), lease(3))


def test_a_deleted_device_comes_back_with_everything_on_it(node: Node) -> None:
    node.kernel.entries.clear()
    node.reconciler.kernel_changes([KernelChange(True, "flannel.1", None)])
    node.advance(0.2)
    assert node.kernel.entries == wanted(lease(2), lease(3))


def test_lost_notifications_are_reason_to_look(node: Node) -> None:
    del node.kernel.entries["route", "10.244.2.0/24", "0"]
    node.reconciler.kernel_changes([])
    node.advance(0.2)
    assert node.kernel.entries == wanted(lease(2), lease(3))


def test_what_no_notification_told_is_found_by_the_next_look(node: Node) -> None:
    del node.kernel.entries["route", "10.244.2.0/24", "0"]
    node.advance(RESYNC_S - 1)
    assert node.kernel.dumps == 0
    node.advance(2)
    assert node.kernel.entries == wanted(lease(2), lease(3))
    node.advance(RESYNC_S + 1)
    assert node.kernel.dumps == 2


WANTED = wanted(lease(2))
ROUTE = Route("flannel.1", "10.244.2.0/24", "10.244.2.0", onlink=True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (KernelChange(False, "flannel.1", ROUTE), False),
        (KernelChange(True, "flannel.1", ROUTE), True),
        (KernelChange(False, "flannel.1", ROUTE._replace(via="10.244.2.9")), True),
        (KernelChange(False, "flannel.1", ROUTE._replace(dst="10.244.9.0/24")), True),
        (KernelChange(True, "flannel.1", ROUTE._replace(dst="10.244.9.0/24")), False),
        # A route on a link of somebody else that has taken the place of ours, or of another.
        (KernelChange(True, "", ROUTE._replace(link="", via="192.0.2.9", onlink=False)), True),
        (KernelChange(True, "", ROUTE._replace(link="", dst="10.9.0.0/24")), False),
        (KernelChange(False, "flannel.1", None), True),
        (KernelChange(True, "flannel.1", None), True),
        (KernelChange(True, "flannel.9", None), False),
    ],
)
def test_drift_is_what_differs_from_the_wanted_state(change: KernelChange, expected: bool) -> None:
    assert is_drift(change, WANTED) is expected


# ---- refusals


def test_a_refusal_is_tried_again_with_growing_pauses(node: Node) -> None:
    key = ("route", "10.244.4.0/24", "0")
    node.kernel.refuse[key] = errno.EINVAL
    node.update(put(lease(4)))
    assert len(node.kernel.applied) == 1
    for pause_s in (0.05, 0.1, 0.2, 0.4):
        tries = len(node.kernel.applied)
        node.advance(pause_s * 0.9)
        assert len(node.kernel.applied) == tries
        node.advance(pause_s * 0.2)
        assert len(node.kernel.applied) == tries + 1
    others = {k: v for k, v in wanted(lease(2), lease(3), lease(4)).items() if k != key}
    assert node.kernel.entries == others


def test_the_pause_has_an_end_and_starts_anew_after_success(node: Node) -> None:
    key = ("route", "10.244.4.0/24", "0")
    node.kernel.refuse[key] = errno.EINVAL
    node.update(put(lease(4)))
    for _ in range(20):
        node.advance(30)
    tries = len(node.kernel.applied)
    node.advance(30)
    assert len(node.kernel.applied) == tries + 1
    del node.kernel.refuse[key]
    node.advance(30)
    assert node.kernel.entries == wanted(lease(2), lease(3), lease(4))
    node.kernel.refuse["route", "10.244.5.0/24", "0"] = errno.EINVAL
    node.update(put(lease(5)))
    tries = len(node.kernel.applied)
    node.advance(0.06)
    assert len(node.kernel.applied) == tries + 1


def test_drift_during_a_pause_is_repaired_at_once(node: Node) -> None:
    node.kernel.refuse["route", "10.244.4.0/24", "0"] = errno.EINVAL
    node.update(put(lease(4)))
    for _ in range(12):
        node.advance(30)
    node.drifted(ROUTE)
    node.advance(0.2)
    assert ROUTE.key in node.kernel.entries


def test_trouble_is_said_once_and_its_end_too(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flanneld")
    key = ("route", "10.244.4.0/24", "0")
    node.kernel.refuse[key] = errno.EINVAL
    node.update(put(lease(4)))
    for _ in range(10):
        node.advance(30)
    del node.kernel.refuse[key]
    node.advance(31)
    texts = [(r.levelname, r.getMessage()) for r in caplog.records if "reconciled" not in r.getMessage()]
    assert [level for level, _ in texts] == ["WARNING", "INFO"]
    assert "refused to put route 10.244.4.0/24 0" in texts[0][1] and "EINVAL" in texts[0][1]
    assert texts[1][1] == "network: in order again"


def test_an_idle_node_logs_nothing(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "flanneld")
    node.update(put(lease(2)), put(OWN))
    node.echo()
    node.advance(RESYNC_S + 1)
    assert node.kernel.dumps == 1
    assert caplog.records == []


def test_a_device_lost_unseen_is_noticed_by_the_next_lease(node: Node) -> None:
    node.kernel.entries.clear()
    node.update(put(lease(4)))
    node.advance(0.06)
    assert node.kernel.entries == wanted(lease(2), lease(3), lease(4))


# ---- other work of the queue


def test_a_chore_that_fails_is_tried_again_and_hinders_nobody() -> None:
    failures = [ConfigError("disk full"), ConfigError("disk full")]
    done: list[float] = []

    def chore() -> None:
        done.append(made.clock.now())
        if failures:
            raise failures.pop()

    made = Node(Watched(), chores={("files",): chore})
    with working(made) as node:
        assert node.reconciler.prepare() == []
        node.reconciler.queue.add(("files",))
        node.update(Snapshot((OWN, lease(2))))
        assert node.kernel.entries == wanted(lease(2))
        node.advance(0.06)
        node.advance(0.11)
        node.advance(60)
        assert done == pytest.approx([0, 0.06, 0.17])


# ---- words


def test_a_refusal_is_explained_in_one_line() -> None:
    operation = Operation("put", ROUTE)
    text = explain([Refused(operation, errno.EPERM, "Operation not permitted")] * 3)
    assert "refused to put route 10.244.2.0/24 0: Operation not permitted (EPERM) (and 2 more)" in text
    assert "CAP_NET_ADMIN" in text
    assert "\n" not in text


def test_an_errno_without_a_name_or_a_remedy_is_explained_too() -> None:
    assert explain([Refused(Operation("drop", ROUTE), 9999, "odd")]).endswith("odd (9999)")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EOPNOTSUPP, "modprobe vxlan"), (errno.EPERM, "CAP_NET_ADMIN"), (errno.EADDRINUSE, "ss -lunp")],
)
def test_a_device_that_cannot_be_made_names_the_remedy(number: int, remedy: str) -> None:
    kernel = Watched()
    kernel.refuse[("link", "flannel.1")] = number
    refused = Node(kernel).reconciler.prepare()
    text = explain(refused)
    assert "put link flannel.1" in text and remedy in text and "\n" not in text
