"""A node whose store is away or has forgotten it: it keeps, or restores, the network that it had."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from tests.lab.cluster import Cluster
from tests.lab.net import LabError, Process, wait_for
from tests.lab.node import CNI_BIN, ETCD_PREFIX, UPSTREAM_CNI_BIN, Node, Store, etcdctl

Clusters = Callable[..., Cluster]
PLUGINS = (CNI_BIN, UPSTREAM_CNI_BIN)


def etcd_of(cluster: Cluster) -> Process:
    """The etcd that serves the cluster."""
    return next(p for p in cluster.lab._processes if p.child.what == "etcd")


def overlay(node: Node) -> list[str]:
    """Everything that makes the node's overlay, as iproute2 shows it."""
    show = (
        ("ip", "-4", "-o", "addr", "show", "flannel.1"),
        ("ip", "-o", "link", "show", "flannel.1"),
        ("ip", "route", "show", "dev", "flannel.1"),
        ("ip", "neigh", "show", "dev", "flannel.1", "nud", "permanent"),
        ("bridge", "fdb", "show", "dev", "flannel.1"),
    )
    try:
        lines = [line for argv in show for line in node.lab.run(node.netns, *argv).splitlines()]
    except LabError:
        return []
    # The kernel counts its links anew, and shows the time an address is valid for.
    return sorted(line.partition(": ")[2] or line for line in lines)


def wait_known(node: Node, macs: int) -> None:
    """Wait until the node's state file knows so many VTEPs, its own included."""
    state = node.directory / "state.json"
    wait_for(
        lambda: state.exists() and state.read_bytes().count(b'"VtepMAC"') == macs, 5.0, "state", node.log
    )


def start(node: Node, cluster: Cluster, *flags: str) -> None:
    """Start the daemon with a log of its own."""
    node.log.unlink()
    node.start(cluster.command, cluster.store, "--iptables-resync=1", *flags)


def reboot(node: Node) -> None:
    """What a reboot takes away: the process, the devices, the firewall, /run. What is on the disk stays."""
    os.kill(node.daemon.popen.pid, signal.SIGKILL)
    node.daemon.popen.wait(5)
    node.lab.ip(node.netns, "link del flannel.1")
    for table in ("nat", "filter"):
        node.lab.run(node.netns, "iptables", "-t", table, "-F")
        node.lab.run(node.netns, "iptables", "-t", table, "-X")
    node.subnet_file.unlink()


def said(node: Node) -> str:
    """The node's log."""
    return node.log.read_text()


def probe(node: Node, path: str) -> str:
    """Status code and body that the health server of a node gives."""
    return node.lab.run(node.netns, "curl", "-s", "-w", " %{http_code}", f"http://127.0.0.1:8081{path}")


def test_a_node_that_boots_without_its_store_has_the_network_it_had(cluster_of: Clusters) -> None:
    cluster = cluster_of(2, "etcd")
    cluster.start()
    node, other = cluster.nodes
    far = other.add_pod("far", PLUGINS)
    wait_known(node, 2)
    before, text = overlay(node), node.subnet_file.read_text()
    reboot(node)
    etcd = etcd_of(cluster)
    os.kill(etcd.popen.pid, signal.SIGSTOP)
    try:
        start(node, cluster, "--healthz-port=8081")
        wait_for(lambda: "flannel is ready" in said(node), 20.0, "start without the store", node.log)
        assert node.subnet_file.read_text() == text
        wait_for(lambda: overlay(node) == before, 1.0, "the same overlay", node.log)
        near = node.add_pod("near", PLUGINS)
        node.lab.run(near.netns, "ping", "-n", "-c3", "-i0.1", "-W2", far.endpoint.address)
        assert "flanneld is ready\nrestored from what was known at " in probe(node, "/readyz")
        assert probe(node, "/readyz").endswith(" 200")
        assert "flannel_restored 1.0" in probe(node, "/metrics")
        assert said(node).count("going on with what this node knew") == 1
    finally:
        os.kill(etcd.popen.pid, signal.SIGCONT)
    wait_for(lambda: probe(node, "/readyz") == "flanneld is ready 200", 15.0, "the store's word", node.log)
    assert "is confirmed" in said(node)
    assert overlay(node) == before
    assert node.subnet_file.read_text() == text
    assert "anew" not in said(node)


def test_what_was_restored_gives_way_to_what_the_store_says(cluster_of: Clusters) -> None:
    """The configuration was changed while the node could not see it."""
    cluster = cluster_of(2, "etcd")
    cluster.start()
    node = cluster.nodes[0]
    wait_known(node, 2)
    reboot(node)
    network = '{"Network": "10.99.0.0/16", "Backend": {"Type": "vxlan"}}'
    etcdctl(cluster.lab, "put", f"{ETCD_PREFIX}/config", network)
    etcd = etcd_of(cluster)
    os.kill(etcd.popen.pid, signal.SIGSTOP)
    try:
        start(node, cluster)
        wait_for(lambda: "flannel is ready" in said(node), 20.0, "start without the store", node.log)
        assert "FLANNEL_NETWORK=10.244.0.0/16\n" in node.subnet_file.read_text()
    finally:
        os.kill(etcd.popen.pid, signal.SIGCONT)
    wait_for(
        lambda: "FLANNEL_NETWORK=10.99.0.0/16\n" in node.subnet_file.read_text(), 15.0, "the change", node.log
    )
    node.daemon.require_running()
    assert "setting the node up anew" in said(node)
    addresses = node.lab.show(node.netns, "ip", "-4", "addr", "show", "flannel.1")[0]["addr_info"]
    assert str(node.subnet.network_address) in [address["local"] for address in addresses]


def test_a_store_that_lost_its_data_costs_nobody_subnet_or_peers(cluster_of: Clusters) -> None:
    """etcd comes back empty while all daemons are down; they come back one after the other."""
    cluster = cluster_of(3, "etcd")
    cluster.start()
    before = {node.name: (overlay(node), node.subnet_file.read_text()) for node in cluster.nodes}
    for node in cluster.nodes:
        wait_known(node, 3)
        os.kill(node.daemon.popen.pid, signal.SIGKILL)
        node.daemon.popen.wait(5)
    etcdctl(cluster.lab, "del", "--prefix", f"{ETCD_PREFIX}/subnets")
    node = cluster.nodes[0]
    start(node, cluster)
    wait_for(lambda: "flannel is ready" in said(node), 10.0, "start", node.log)
    assert "2 peers it lost are kept" in said(node)
    assert (overlay(node), node.subnet_file.read_text()) == before[node.name]
    cluster.start(*cluster.nodes[1:])
    for node in cluster.nodes:
        assert (overlay(node), node.subnet_file.read_text()) == before[node.name]


def test_a_state_file_that_cannot_be_read_is_said_and_passed_over(cluster_of: Clusters) -> None:
    cluster = cluster_of(1, "sqlite")
    node = cluster.nodes[0]
    (node.directory / "state.json").write_text('{"format": 1, "own": ')
    cluster.start()
    assert "state.json was not written by this version" in said(node)
    assert "starting without it" in said(node)


def test_without_a_state_file_it_waits_for_the_store(cluster_of: Clusters) -> None:
    cluster = cluster_of(1, "etcd")
    node = cluster.nodes[0]
    etcd = etcd_of(cluster)
    os.kill(etcd.popen.pid, signal.SIGSTOP)
    try:
        node.start(cluster.command, cluster.store, "--healthz-port=8081")
        wait_for(lambda: "Waiting for the store" in said(node), 15.0, "the wait", node.log)
        answer = probe(node, "/readyz")
        assert answer.startswith("flanneld is not ready yet\nwaiting for the store (")
        assert answer.endswith(" 503")
        assert not node.subnet_file.exists()
    finally:
        os.kill(etcd.popen.pid, signal.SIGCONT)
    node.wait_subnet()


def test_a_lost_lease_is_replaced_without_a_restart(cluster_of: Clusters) -> None:
    """Another node took our subnet while the store had forgotten us."""
    cluster = cluster_of(2, "etcd")
    cluster.start()
    node, other = cluster.nodes
    key = f"{node.subnet.network_address}-{node.subnet.prefixlen}"
    taken = '{"PublicIP":"192.168.77.99","PublicIPv6":null,"BackendType":"vxlan","BackendData":null}'
    etcdctl(cluster.lab, "put", f"{ETCD_PREFIX}/subnets/{key}", taken)
    before = node.subnet
    wait_for(lambda: node.subnet != before, 10.0, "another subnet", node.log)
    wait_for(lambda: f"Lease acquired: {node.subnet.network_address}" in said(node), 5.0, "a lease", node.log)
    wait_for(lambda: str(node.subnet) in str(overlay(other)), 5.0, "the new route", other.log)
    node.daemon.require_running()


def test_a_cloned_disk_takes_nobodys_subnet(cluster_of: Clusters) -> None:
    """A node that boots from a copy of another's disk is known by its network card for another machine."""
    cluster = cluster_of(2, "etcd")
    node, clone = cluster.nodes
    cluster.start(node)
    wait_known(node, 1)
    before = overlay(node)
    (clone.directory / "state.json").write_bytes((node.directory / "state.json").read_bytes())
    cluster.start(clone)
    assert "state.json is of another machine or store" in said(clone)
    assert clone.subnet != node.subnet
    assert set(before) <= set(overlay(node))
    assert "anew" not in said(node)


def test_the_state_of_another_store_is_not_believed(cluster_of: Clusters) -> None:
    cluster = cluster_of(1, "sqlite")
    node = cluster.nodes[0]
    cluster.start()
    wait_known(node, 1)
    os.kill(node.daemon.popen.pid, signal.SIGKILL)
    node.daemon.popen.wait(5)
    node.log.unlink()
    node.start(cluster.command, Store(("--etcd-endpoints=http://192.168.77.2:1",), ""), "--healthz-port=8081")
    wait_for(lambda: "Waiting for the store" in said(node), 15.0, "the wait", node.log)
    assert "state.json is of another machine or store" in said(node)
    assert probe(node, "/readyz").endswith(" 503")
