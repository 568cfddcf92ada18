"""Many pods at once through the built plugin: up and down again, and with the daemon killed in between.

The runtime never repeats a call here; every ADD and DEL has to succeed by itself.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from tests.lab.burst import Crowd, Outcomes, go_plugins, our_plugins, wait_served, warm_only
from tests.lab.cluster import Cluster
from tests.lab.cni import Endpoint
from tests.lab.net import Lab, LabError, program
from tests.lab.node import FROZEN, Node

UP, DOWN = (1, 2, 4, 8, 16, 24), (12, 3, 0)
COLD_UP, COLD_DOWN = (1, 4, 12), (0,)
PODS = 48
FEW = 6  # pods that are done when the daemon is killed
MOMENT_S = 20.0


@pytest.fixture
def cluster(cluster_of: Callable[..., Cluster]) -> Cluster:
    """One node with its daemon."""
    made = cluster_of(1)
    start(made)
    return made


def start(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    node.start(FROZEN, cluster.store)
    node.wait_subnet()
    wait_served(node)


def test_burst_up_and_down(cluster: Cluster) -> None:
    """Served by the daemon alone: there is no frozen plugin that could stand in for it."""
    node = cluster.nodes[0]
    plugins = our_plugins(node, warm_only(cluster.lab))
    with closing(Crowd(node, plugins, "pod", chain=True, mapped=2)) as crowd:
        for size in (*UP, *DOWN):
            crowd.scale(size)
        assert crowd.leftovers() == []
        assert len(crowd.seen) == max(UP)


def test_burst_without_the_daemon(cluster: Cluster) -> None:
    """Served by the frozen plugin, process by process, in the same store and firewall."""
    node = cluster.nodes[0]
    node.stop()
    with closing(Crowd(node, our_plugins(node), "pod", chain=True, mapped=2)) as crowd:
        for size in (*COLD_UP, *COLD_DOWN):
            crowd.scale(size)
        assert crowd.leftovers() == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_daemon_restarted_in_a_burst(cluster: Cluster, signum: signal.Signals) -> None:
    node = cluster.nodes[0]
    with closing(Crowd(node, our_plugins(node), "pod", chain=True, mapped=2)) as crowd:
        members = crowd.create(PODS)
        crowd.begin("ADD", members)
        await_reservations(node, lambda held: held >= FEW)
        hit = restart(cluster, signum)
        added = crowd.finish_add(members)
        assert crowd.unreachable() == []
        assert in_flight(added, hit), "no ADD was under way when the signal came"
        assert ownerless(crowd) == {}

        wait_served(node)
        crowd.begin("DEL", members)
        await_reservations(node, lambda held: held <= PODS - FEW)
        hit = restart(cluster, signum)
        deleted = crowd.finish_delete(members)
        assert in_flight(deleted, hit), "no DEL was under way when the signal came"
        assert crowd.leftovers() == []
        wait_served(node)
        crowd.delete_without_netns(members)
        assert crowd.leftovers() == []


def await_reservations(node: Node, enough: Callable[[int], bool]) -> None:
    """Return at once when as many addresses are held; a burst is over in tenths of a second."""
    deadline = time.monotonic() + MOMENT_S
    while not enough(len(node.reservations())):
        if time.monotonic() > deadline:
            raise LabError(f"{len(node.reservations())} reservations after {MOMENT_S:g} s", node.log)


def ownerless(crowd: Crowd) -> dict[str, bytes]:
    """Reservations that no pod's result names, with what is in the files."""
    store = crowd.node.directory / "cni-networks" / "cbr0"
    held = {address for member in crowd.members for address in member.addresses}
    return {name: (store / name).read_bytes() for name in set(crowd.node.reservations()) - held}


def restart(cluster: Cluster, signum: signal.Signals) -> int:
    """End the daemon with a signal and start it again at once; when the signal was sent, in nanoseconds."""
    node = cluster.nodes[0]
    sent_ns = time.monotonic_ns()
    os.kill(node.daemon.popen.pid, signum)
    node.daemon.popen.wait(MOMENT_S)
    node.start(FROZEN, cluster.store)
    return sent_ns


def in_flight(outcomes: Outcomes, moment_ns: int) -> int:
    """How many plugins ran at that moment."""
    return sum(step.began_ns < moment_ns < step.ended_ns for job in outcomes for step in job)


def test_rig_sees_what_is_wrong(lab_of: Callable[..., Lab]) -> None:
    """Pods of the Go plugins that stay, fall silent or are given one address twice do not pass unnoticed."""
    node = Node(lab_of(1), "node1")
    plugins = go_plugins(node, ("10.244.7.0/24",), ("10.244.0.0/16",))
    with closing(Crowd(node, plugins, "pod", chain=True, mapped=1)) as crowd:
        for size in (1, 2, 3):  # so that the first pod has the first address
            crowd.scale(size)
        first, second, third = crowd.members
        addresses = [member.addresses[0] for member in crowd.members]
        left = crowd.leftovers()
        assert {f"reservation {address}" for address in addresses} <= set(left)
        assert {f"rule with {address}" for address in addresses} <= set(left)
        assert sum(line.startswith("link veth") for line in left) == 3

        node.lab.ip(node.netns, f"link set {Endpoint.of(json.loads(second.result)).host_veth} down")
        silent = f"{addresses[1]} from {node.netns}", f"{addresses[1]} from {first.netns}"
        assert {*silent, f"{addresses[2]} from {second.netns}"} == set(crowd.unreachable())

        crowd.delete([third])
        assert addresses[2] not in " ".join(crowd.leftovers())
        (node.directory / "cni-networks" / "cbr0" / addresses[0]).unlink()
        (node.directory / "cni-networks" / "cbr0" / "last_reserved_ip.0").unlink()
        with pytest.raises(LabError, match=f"given twice: {addresses[0]}"):
            crowd.add([third])


def test_rig_sees_elements_that_stay(lab_of: Callable[..., Lab]) -> None:
    node = Node(lab_of(1), "node1")
    plugins = go_plugins(node, ("10.244.7.0/24",), ("10.244.0.0/16",))
    with closing(Crowd(node, plugins, "pod")) as crowd:
        node.lab.run(node.netns, program("nft"), "add table ip t; add set ip t s { type inet_service; }")
        assert crowd.leftovers() == []
        node.lab.run(node.netns, program("nft"), "add element ip t s { 80 }")
        assert crowd.leftovers() == ["element ip t s: 80"]
