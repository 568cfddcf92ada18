"""How long the daemon takes, beside iproute2 writing the same entries in the same run.

Peers are leases of nodes that do not exist. Prints; asserts only that all entries arrived.
"""

from __future__ import annotations

import json
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.cluster import Cluster
from tests.lab.net import Lab, Process, wait_for
from tests.lab.node import FROZEN, Node

NETWORK = {"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan"}}
HERE = Path(__file__).resolve().parent
CHANGES = 20


def peer(number: int) -> tuple[str, str, str]:
    """Subnet address, public IP and VTEP MAC of the peer with this number."""
    high, low = number >> 8, number & 255
    return f"10.{high + 1}.{low}.0", f"172.{16 + high}.{low}.9", f"02:00:00:01:{high:02x}:{low:02x}"


def value(number: int) -> str:
    _, public_ip, mac = peer(number)
    data = {"VNI": 1, "VtepMAC": mac}
    record = {"PublicIP": public_ip, "PublicIPv6": None, "BackendType": "vxlan", "BackendData": data}
    return json.dumps(record, separators=(",", ":"))


def write_leases(cluster: Cluster, numbers: range) -> None:
    """Put peers into the SQLite store behind the daemon's back."""
    ends_s = time.time() + 86400
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


def write_one(cluster: Cluster, number: int) -> float:
    """Put one peer into the store; returns the moment (monotonic seconds) of the request."""
    if not cluster.store.place.startswith("http"):
        began = time.monotonic()
        write_leases(cluster, range(number, number + 1))
        return began
    host, _, port = cluster.store.place.removeprefix("http://").partition(":")
    key = f"/coreos.com/network/subnets/{peer(number)[0]}-24"
    argv = (sys.executable, str(HERE / "etcd_put.py"), host, port, key, value(number))
    return float(cluster.lab.run(cluster.lab.switch, *argv))


def watch_routes(node: Node, name: str, count: int) -> Process:
    """Start to look for so many new routes."""
    argv = [sys.executable, str(HERE / "route_watch.py"), str(count)]
    watcher = node.lab.spawn(node.netns, f"watch-{name}", argv)
    watcher.wait_text("listening")
    return watcher


def seen(watcher: Process) -> list[float]:
    """Moments (monotonic seconds) at which the routes appeared."""
    return [float(line.split()[0]) for line in watcher.output(60).splitlines() if line[:1].isdigit()]


def floor(lab: Lab, netns: str, count: int) -> float:
    """Seconds that `ip -batch` and `bridge -batch` take for the same entries on a device of the same kind."""
    lab.ip(
        netns,
        "link add bench0 type vxlan id 9 local 192.168.77.12 dev eth0 dstport 8479 nolearning",
        "link set bench0 up",
    )
    files = {"ip": [], "bridge": []}  # type: dict[str, list[str]]
    for number in range(count):
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
        lab.run(netns, tool, "-batch", str(path))
    took = time.monotonic() - began
    lab.ip(netns, "link del bench0")
    return took


@pytest.mark.parametrize("count", [1000, 5000, 10000])
def test_start_with_many_peers(cluster_of: Callable[..., Cluster], count: int) -> None:
    cluster = cluster_of(2, "sqlite", NETWORK)
    node, other = cluster.nodes
    cluster.start(node)  # makes the database
    node.stop()
    node.lab.ip(node.netns, "link del flannel.1")
    write_leases(cluster, range(count))
    bottom = floor(node.lab, other.netns, count)
    watcher = watch_routes(node, "start", count)
    began = time.monotonic()
    node.start(FROZEN, cluster.store)
    node.wait_subnet()
    to_subnet_env = time.monotonic() - began
    to_last_route = max(seen(watcher)) - began
    pid = node.daemon.popen.pid
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    cpu_s = (int(fields[11]) + int(fields[12])) / 100
    print(
        f"\n{count} peers: subnet.env after {to_subnet_env:.2f} s, last route after {to_last_route:.2f} s, "
        f"floor (iproute2 batches) {bottom:.2f} s, ratio {to_last_route / bottom:.2f}, "
        f"CPU {cpu_s:.2f} s, peak RSS {status['VmHWM'].strip()}"
    )


@pytest.mark.parametrize("store", ["sqlite", "etcd"])
def test_one_lease_changed(cluster_of: Callable[..., Cluster], store: str) -> None:
    cluster = cluster_of(1, store, NETWORK)
    node = cluster.nodes[0]
    cluster.start()
    wait_for(lambda: "flannel is ready" in node.log.read_text(), 5.0, "the daemon")
    took = []
    for number in range(CHANGES):
        watcher = watch_routes(node, str(number), 1)
        written = write_one(cluster, number)
        took.append((seen(watcher)[0] - written) * 1000)
    print(
        f"\none lease, from the write request to {store} until its route is in the kernel: "
        f"median {statistics.median(took):.1f} ms, min {min(took):.1f}, max {max(took):.1f}"
    )
