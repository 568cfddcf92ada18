"""What happens to the store, and what the pods' traffic and the node notice of it.

Pods on two nodes ping each other all the time, whatever is done to the store. After each fault the node
must hear of changes again by itself, with its subnet kept. A table of all faults is printed at the end
(`pytest -s`): fault, pings sent and lost, how long the store was away, how long recovery took.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from tests.e2e.faults import HurtEtcd, HurtKube, HurtStore
from tests.lab.cluster import NETWORK
from tests.lab.net import SWITCH, Lab, Process, wait_for
from tests.lab.node import CNI_BIN, FROZEN, UPSTREAM_CNI_BIN, Node

PLUGINS = (CNI_BIN, UPSTREAM_CNI_BIN)
STORES: dict[str, Callable[[Lab], HurtStore]] = {
    "etcd": lambda lab: HurtEtcd(lab, NETWORK),
    "kube": lambda lab: HurtKube(lab, NETWORK),
}
CLOCK = Path(__file__).with_name("clock.c")
PING_S = 0.05
AWAY = "The store is away"
CUT = f"""table inet pflcut {{
  chain in {{ type filter hook input priority -300; ip saddr {SWITCH.ip} drop; }}
  chain out {{ type filter hook output priority -300; ip daddr {SWITCH.ip} drop; }}
}}"""


@dataclass
class Ground:
    """Two nodes with a pod each that ping each other, and the store they share."""

    kind: str
    store: HurtStore
    nodes: list[Node]
    pings: Process
    clock: Path
    rows: list[str] = field(default_factory=list)
    joined: int = 0

    @property
    def node(self) -> Node:
        return self.nodes[0]

    def sent_and_lost(self) -> tuple[int, int]:
        """So far; what is still under way counts as lost."""
        text = self.pings.log.read_text(errors="replace")
        seen = {int(number) for number in re.findall(r"icmp_seq=(\d+)", text)}
        return max(seen), max(seen) - len(seen)

    def cut(self) -> None:
        """No packet passes between the first node and the store, and nobody is told so."""
        path = self.node.directory / "cut.nft"
        path.write_text(CUT)
        self.node.lab.run(self.node.netns, "nft", "-f", str(path))

    def mend(self) -> None:
        self.node.lab.run(self.node.netns, "nft", "delete", "table", "inet", "pflcut")

    def wait_noticed(self, mark: int) -> None:
        """Wait until the first node has said, after `mark` bytes of its log, that its store is away."""
        wait_for(lambda: AWAY in self.said(mark), 40.0, "notice that the store is away", self.node.log)

    def said(self, mark: int) -> str:
        return self.node.log.read_text(errors="replace")[mark:]

    def routed(self, node: Node) -> set[str]:
        return {route["dst"] for route in node.lab.show(node.netns, "ip", "route")}


@pytest.fixture(scope="module", params=list(STORES))
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    kind = request.param
    with Lab(tmp_path_factory.mktemp(kind) / "lab", f"pfl{os.getpid()}f-") as lab:
        lab.create(2)
        with closing(STORES[kind](lab)) as store:
            found = set_up(kind, lab, store)
            yield found
        print(f"\n{kind}: fault | sent | lost | away s | recovered s")
        print("\n".join(found.rows))


def set_up(kind: str, lab: Lab, store: HurtStore) -> Ground:
    """Start the daemons, the first with a clock that can be set, and the pings."""
    clock, library = lab.directory / "clock", lab.directory / "clock.so"
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, CLOCK], check=True)
    clock.write_text("0")
    nodes = [Node(lab, name) for name in lab.nodes]
    settable = ["env", f"LD_PRELOAD={library}", f"SET_CLOCK={clock}"]
    nodes[0].start([*settable, *FROZEN], store.flags(nodes[0]), "--iptables-resync=1", "--healthz-port=8081")
    nodes[1].start(FROZEN, store.flags(nodes[1]), "--iptables-resync=1")
    for node in nodes:
        node.wait_subnet()
    nodes[0].wait_routes([nodes[1].subnet])
    nodes[1].wait_routes([nodes[0].subnet])
    near, far = nodes[0].add_pod("near", PLUGINS), nodes[1].add_pod("far", PLUGINS)
    pings = lab.spawn(near.netns, "ping", ["ping", "-n", "-i", str(PING_S), far.endpoint.address])
    pings.wait_text("icmp_seq=3 ")
    return Ground(kind, store, nodes, pings, clock)


def kill(ground: Ground) -> None:
    mark = len(ground.said(0))
    ground.store.kill()
    ground.wait_noticed(mark)
    ground.store.start()


def stop(ground: Ground) -> None:
    mark, sent = len(ground.said(0)), ground.sent_and_lost()[0]
    ground.store.pause()
    try:
        if ground.store.notices_silence:
            ground.wait_noticed(mark)
        else:
            wait_for(lambda: ground.sent_and_lost()[0] > sent + 100, 20.0, "pings", ground.pings.log)
    finally:
        ground.store.resume()


def partition(ground: Ground) -> None:
    mark = len(ground.said(0))
    ground.cut()
    try:
        ground.wait_noticed(mark)
    finally:
        ground.mend()


def lost_data(ground: Ground) -> None:
    mark = len(ground.said(0))
    ground.store.kill()
    ground.store.lose_data()
    ground.wait_noticed(mark)
    ground.store.start()


def lost_history(ground: Ground) -> None:
    """While the node cannot see it, peers come and the history is compacted."""
    mark = len(ground.said(0))
    ground.cut()
    try:
        ground.joined += 1
        ground.store.join(ground.joined)
        ground.store.forget_history()
        if ground.store.notices_silence:
            ground.wait_noticed(mark)
        else:
            ground.store.hang_up()
    finally:
        ground.mend()


def lost_lease(ground: Ground) -> None:
    """The node's lease is deleted while its daemon cannot see it: its peer withdraws the route meanwhile."""
    daemon = ground.node.daemon.popen.pid
    os.kill(daemon, signal.SIGSTOP)
    try:
        subnet = str(ground.node.subnet)
        ground.store.forget(ground.node)
        peer = ground.nodes[1]
        wait_for(lambda: subnet not in ground.routed(peer), 5.0, "the peer's answer to the loss", peer.log)
    finally:
        os.kill(daemon, signal.SIGCONT)


def clock_forward(ground: Ground) -> None:
    set_clock(ground, 26)


def clock_back(ground: Ground) -> None:
    set_clock(ground, -26)


def set_clock(ground: Ground, hours: int) -> None:
    """Put the daemon's wall clock forward or back; its own Date header tells that it saw that."""
    ground.clock.write_text(str(hours * 3600))
    node = ground.node
    head = node.lab.run(node.netns, "curl", "-sI", "http://127.0.0.1:8081/healthz")
    [date] = [line.partition(": ")[2] for line in head.splitlines() if line.startswith("Date: ")]
    assert abs(parsedate_to_datetime(date).timestamp() - time.time() - hours * 3600) < 60


FAULTS = (kill, stop, partition, lost_data, lost_history, lost_lease, clock_forward, clock_back)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_traffic_flows_and_the_node_recovers(ground: Ground, fault: Callable[[Ground], None]) -> None:
    store, node = ground.store, ground.node
    subnets = [n.subnet for n in ground.nodes]
    sent, lost = ground.sent_and_lost()
    began = time.monotonic()
    fault(ground)
    away_s = time.monotonic() - began
    began = time.monotonic()
    ground.joined += 1
    peer = store.join(ground.joined)
    for each in ground.nodes:
        each.wait_routes([peer], 30.0)
    recovered_s = time.monotonic() - began
    for each in ground.nodes:
        wait_for(lambda: store.holds(each), 30.0, f"the lease of {each.name} in the store", each.log)  # noqa: B023
        each.daemon.require_running()
    assert [n.subnet for n in ground.nodes] == subnets
    wait_for(lambda: ground.sent_and_lost()[0] > sent + 20, 10.0, "more pings", ground.pings.log)
    now_sent, now_lost = ground.sent_and_lost()
    ground.rows.append(
        f"{fault.__name__} | {now_sent - sent} | {now_lost - lost} | {away_s:.1f} | {recovered_s:.1f}"
    )
    # One may be on its way; a lease that is gone is gone for its peers as well, until it is written again.
    allowed = 1 + (round((away_s + recovered_s) / PING_S) if fault is lost_lease else 0)
    assert now_lost - lost <= allowed, ground.rows[-1]
    status = node.lab.run(node.netns, "curl", "-s", "http://127.0.0.1:8081/readyz")
    assert status == "flanneld is ready"
