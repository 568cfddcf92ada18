"""How long the daemon takes with thousands of peers, beside iproute2 writing the same entries in one run.

Peers are leases of nodes that do not exist, in SQLite, in a real etcd, and as Node objects of the API
double, lean and of a realistic 15 kB. Prints; asserts only that all entries arrived.
"""

from __future__ import annotations

import json
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kube.cluster import control_of
from tests.lab.cluster import Cluster
from tests.lab.net import SWITCH, Lab, Process, wait_for
from tests.lab.node import ETCD_PREFIX, FROZEN, Node

NETWORK = {"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan"}}
HERE = Path(__file__).resolve().parent
CHANGES = 20
LOOK_S, SETTLE_S, IDLE_S = 0.5, 8.0, 60.0
# Peers get the subnets from here on; what is below is for the lab's own nodes.
FIRST_PEER = 256
PROBES = "--healthz-port=8081"


def peer(number: int) -> tuple[str, str, str]:
    """Subnet address, public IP and VTEP MAC of the peer with this number, as the API double makes them."""
    subnet, address = (10 << 24) + (number << 8), (172 << 24) + (16 << 16) + 1 + number
    mac = "0a:00:" + ":".join(f"{byte:02x}" for byte in number.to_bytes(4, "big"))
    return dotted(subnet), dotted(address), mac


def dotted(address: int) -> str:
    return ".".join(str(byte) for byte in address.to_bytes(4, "big"))


def value(number: int) -> str:
    _, public_ip, mac = peer(number)
    data = {"VNI": 1, "VtepMAC": mac}
    record = {"PublicIP": public_ip, "PublicIPv6": None, "BackendType": "vxlan", "BackendData": data}
    return json.dumps(record, separators=(",", ":"))


def write_sqlite(cluster: Cluster, numbers: range) -> float:
    """Put peers into the SQLite store behind the daemon's back; returns when (monotonic seconds)."""
    began, ends_s = time.monotonic(), time.time() + 86400
    with sqlite3.connect(cluster.store.place) as db:
        (revision,) = db.execute("SELECT revision FROM counter").fetchone()
        rows = []
        for number in numbers:
            subnet, public_ip, _ = peer(number)
            revision += 1
            rows.append((f"{subnet}-24", f"{subnet}/24", public_ip, value(number), ends_s, revision))
        columns = "key, subnet, public_ip, attributes, expires_s, revision"
        db.executemany(f"INSERT INTO lease ({columns}) VALUES (?, ?, ?, ?, ?, ?)", rows)  # noqa: S608
        db.execute("UPDATE counter SET revision = ?", (revision,))
    db.close()
    return began


def write_etcd(cluster: Cluster, numbers: range) -> float:
    """Put peers into etcd; returns when the last request was sent."""
    file = cluster.lab.directory / "peers.txt"
    file.write_text("".join(f"{ETCD_PREFIX}/subnets/{peer(n)[0]}-24 {value(n)}\n" for n in numbers))
    argv = (sys.executable, str(HERE / "etcd_put.py"), str(SWITCH.ip), "2379", str(file))
    return float(cluster.lab.run(cluster.lab.switch, *argv))


def write_kube(cluster: Cluster, numbers: range, fat: bool = False) -> float:
    """Create Nodes; returns when the request was sent."""
    control, began = control_of(cluster.lab), time.monotonic()
    control.fill(len(numbers), fat=fat, first=numbers.start)
    return began


STORES: dict[str, tuple[str, Callable[[Cluster, range], float]]] = {
    "sqlite": ("sqlite", write_sqlite),
    "etcd": ("etcd", write_etcd),
    "kube lean": ("kube", write_kube),
    "kube fat": ("kube", lambda cluster, numbers: write_kube(cluster, numbers, fat=True)),
}


def watch_entries(node: Node, name: str, count: int, *only: str) -> Process:
    """Start to look for so many new entries of each kind."""
    argv = [sys.executable, str(HERE / "entry_watch.py"), str(count), *only]
    watcher = node.lab.spawn(node.netns, f"watch-{name}", argv)
    watcher.wait_text("listening")
    return watcher


def last_seen(watcher: Process) -> dict[str, float]:
    """For each kind of entry the moment (monotonic seconds) at which the last one appeared."""
    lines = (line.split() for line in watcher.output(120).splitlines())
    return {words[0]: float(words[2]) for words in lines if len(words) == 3}


def floor(lab: Lab, netns: str, count: int) -> float:
    """Seconds that `ip -batch` and `bridge -batch` take for the same entries on a device of the same kind."""
    lab.ip(
        netns,
        "link add bench0 type vxlan id 9 local 192.168.77.12 dev eth0 dstport 8479 nolearning",
        "link set bench0 up",
    )
    files: dict[str, list[str]] = {"ip": [], "bridge": []}
    for number in range(FIRST_PEER, FIRST_PEER + count):
        subnet, public_ip, mac = peer(number)
        files["ip"].append(f"neigh replace {subnet} lladdr {mac} dev bench0 nud permanent")
        files["bridge"].append(f"fdb replace {mac} dev bench0 dst {public_ip} self permanent")
        files["ip"].append(f"route replace {subnet}/24 via {subnet} dev bench0 onlink")
    paths = {}
    for tool, lines in files.items():
        paths[tool] = lab.directory / f"floor.{tool}"
        paths[tool].write_text("\n".join(lines) + "\n")
    began = time.monotonic()
    for tool, path in paths.items():
        lab.run(netns, tool, "-batch", str(path), timeout_s=120)
    took = time.monotonic() - began
    lab.ip(netns, "link del bench0")
    return took


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used: CPU seconds, its children's included, and peak memory in MiB."""

    cpu_s: float
    peak_mib: float

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return cls(sum(map(int, fields[11:15])) / 100, int(status["VmHWM"].split()[0]) / 1024)


def prepare(cluster: Cluster, store: str, count: int) -> float:
    """Fill the store with peers; returns the floor."""
    node, other = cluster.nodes
    if store == "sqlite":
        cluster.start(node)  # makes the database
        node.stop()
        node.lab.ip(node.netns, "link del flannel.1")
        (node.directory / "state.json").unlink(missing_ok=True)
    STORES[store][1](cluster, range(FIRST_PEER, FIRST_PEER + count))
    return floor(node.lab, other.netns, count)


CASES = [
    *((store, count) for store in ("sqlite", "etcd", "kube lean") for count in (1000, 5000, 10000)),
    ("kube fat", 5000),
    ("kube lean", 20000),
]


@pytest.mark.parametrize(("store", "count"), CASES)
def test_start_with_many_peers(cluster_of: Callable[..., Cluster], store: str, count: int) -> None:
    cluster = cluster_of(2, STORES[store][0], NETWORK)
    node = cluster.nodes[0]
    bottom = prepare(cluster, store, count)
    watcher = watch_entries(node, "start", count)
    began = time.monotonic()
    node.start(FROZEN, cluster.store)
    node.wait_subnet(120)
    to_subnet_env = time.monotonic() - began
    seen = {kind: moment - began for kind, moment in last_seen(watcher).items()}
    used = Usage.of(node.daemon.popen.pid)
    print(
        f"\n{store}, {count} peers: subnet.env after {to_subnet_env:.2f} s, last route {seen['route']:.2f}, "
        f"neighbour {seen['neighbour']:.2f}, FDB entry {seen['fdb']:.2f}; floor (iproute2 batches) "
        f"{bottom:.2f} s, ratio {max(seen.values()) / bottom:.2f}; "
        f"CPU {used.cpu_s:.2f} s, peak RSS {used.peak_mib:.0f} MiB"
    )


@pytest.mark.parametrize("store", ["etcd", "kube lean"])
def test_at_rest_with_5000_peers(cluster_of: Callable[..., Cluster], store: str) -> None:
    count = 5000
    cluster = cluster_of(2, STORES[store][0], NETWORK)
    node = cluster.nodes[0]
    prepare(cluster, store, count)
    node.start(FROZEN, cluster.store, PROBES)
    wait_for(lambda: "flannel is ready" in node.log.read_text(), 60.0, "the daemon", node.log)
    pid = node.daemon.popen.pid

    def passes() -> float:
        text = node.lab.run(node.netns, "curl", "-s", "http://127.0.0.1:8081/metrics")
        name = 'flannel_reconcile_duration_seconds_count{what="network"} '
        return float(text.partition(name)[2].split()[0])

    wait_for((node.directory / "state.json").exists, 10.0, "the state file")
    time.sleep(SETTLE_S)
    before, done = Usage.of(pid), passes()
    rounds = 10
    for number in range(rounds):
        # Any news of the device makes the daemon look at everything; nothing differs.
        node.lab.ip(node.netns, f"link set flannel.1 alias look{number}")
        time.sleep(LOOK_S)  # asking the daemon whether it has looked would cost more than looking
    looked = Usage.of(pid)
    assert passes() == done + rounds
    time.sleep(SETTLE_S)
    settled = Usage.of(pid)
    time.sleep(IDLE_S)
    idle = Usage.of(pid).cpu_s - settled.cpu_s
    each = (looked.cpu_s - before.cpu_s) / rounds
    print(
        f"\n{store}, {count} peers at rest: one look at everything {each:.2f} CPU s; "
        f"idle {idle:.2f} CPU s in {IDLE_S:.0f} s, "
        f"{100 * (idle / IDLE_S + each / 300):.3f} % of one core with a look each 300 s"
    )


@pytest.mark.parametrize("store", ["sqlite", "etcd", "kube lean"])
def test_one_lease_changed(cluster_of: Callable[..., Cluster], store: str) -> None:
    kind, write = STORES[store]
    cluster = cluster_of(1, kind, NETWORK)
    node = cluster.nodes[0]
    cluster.start()
    wait_for(lambda: "flannel is ready" in node.log.read_text(), 5.0, "the daemon")
    took = []
    for number in range(FIRST_PEER, FIRST_PEER + CHANGES):
        watcher = watch_entries(node, str(number), 1, "routes")
        written = write(cluster, range(number, number + 1))
        took.append((last_seen(watcher)["route"] - written) * 1000)
    print(
        f"\none lease, from the write request to {store} until its route is in the kernel: "
        f"median {statistics.median(took):.1f} ms, min {min(took):.1f}, max {max(took):.1f}"
    )
