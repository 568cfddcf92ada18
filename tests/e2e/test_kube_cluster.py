"""Daemons as built on nodes of a Kubernetes cluster: what the API holds, what pods and kubelet see."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from ipaddress import IPv4Network

import pytest

from tests.kube.cluster import control_of
from tests.kube.objects import flannel_annotations, vtep_mac
from tests.lab.cluster import Cluster
from tests.lab.net import LabError, Process, wait_for
from tests.lab.node import CNI_BIN, FROZEN, UPSTREAM_CNI_BIN, Node

Clusters = Callable[..., Cluster]
PLUGINS = (CNI_BIN, UPSTREAM_CNI_BIN)
PREFIX = "flannel.alpha.coreos.com/"
PROBES = "--healthz-port=8081"


def probe(node: Node, path: str) -> str:
    """What the health server of a node says; nothing while it does not listen yet."""
    try:
        return node.lab.run(node.netns, "curl", "-s", f"http://127.0.0.1:8081{path}")
    except LabError:
        node.daemon.require_running()
        return ""


def ready(node: Node) -> str:
    """The remark of /readyz; `ready` when there is nothing to remark."""
    first, _, remark = probe(node, "/readyz").partition("\n")
    return remark or {"flanneld is ready": "ready"}.get(first, first)


def mac(node: Node) -> str:
    return str(node.lab.show(node.netns, "ip", "link", "show", "flannel.1")[0]["address"])


def routes(node: Node) -> set[str]:
    shown = node.lab.show(node.netns, "ip", "route", "show", "dev", "flannel.1")
    return {str(route["dst"]) for route in shown}


def condition(cluster: Cluster, name: str) -> dict[str, str]:
    found = control_of(cluster.lab).get_node(name)["status"]["conditions"]
    return next((c for c in found if c["type"] == "NetworkUnavailable"), {})


def start(node: Node, cluster: Cluster, *flags: str) -> None:
    node.start(FROZEN, cluster.store, "--iptables-resync=1", PROBES, *flags)


def join(cluster: Cluster, number: int) -> None:
    """A node that does not exist registers and publishes its lease."""
    annotations = flannel_annotations(f"192.168.77.{number + 100}", vtep_mac(number))
    control_of(cluster.lab).add_node(f"peer{number}", f"10.244.{number}.0/24", annotations=annotations)


def value(lines: list[str], name: str) -> float:
    """The value of the metric whose name and labels end so."""
    [line] = [line for line in lines if line.rpartition(" ")[0].endswith(name)]
    return float(line.rpartition(" ")[2])


def crash(node: Node) -> None:
    os.kill(node.daemon.popen.pid, signal.SIGKILL)
    node.daemon.popen.wait(5)


def last_error(process: Process) -> str:
    return [line for line in process.log.read_text().splitlines() if line.startswith("E")][-1]


def test_nodes_of_a_cluster_find_each_other(cluster_of: Clusters) -> None:
    cluster = cluster_of(2, "kube")
    control = control_of(cluster.lab)
    cluster.start()
    node, other = cluster.nodes
    assert node.subnet_file.read_text() == (
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )
    for each in cluster.nodes:
        assert control.annotations(each.name) == {
            f"{PREFIX}backend-data": f'{{"VNI":1,"VtepMAC":"{mac(each)}"}}',
            f"{PREFIX}backend-type": "vxlan",
            f"{PREFIX}kube-subnet-manager": "true",
            f"{PREFIX}public-ip": str(each.address),
        }
        wait_for(lambda: bool(condition(cluster, each.name)), 5.0, "the condition", each.log)  # noqa: B023
        found = condition(cluster, each.name)
        assert (found["status"], found["reason"]) == ("False", "FlannelIsUp")
        assert found["message"] == "Flannel is running on this node"
    assert "Created subnet manager: Kubernetes Subnet Manager - node1" in node.log.read_text()
    near, far = node.add_pod("near", PLUGINS), other.add_pod("far", PLUGINS)
    node.lab.run(near.netns, "ping", "-n", "-c3", "-i0.1", "-W2", far.endpoint.address)


def test_a_restart_and_a_reboot_change_nothing(cluster_of: Clusters) -> None:
    """The second start writes nothing to the API; without its device it takes the MAC from the annotation."""
    cluster = cluster_of(2, "kube")
    control = control_of(cluster.lab)
    cluster.start()
    node = cluster.nodes[0]
    wait_for(lambda: bool(condition(cluster, "node1")), 5.0, "the condition", node.log)
    before, annotations = mac(node), control.annotations("node1")
    for reboot in (False, True):
        crash(node)
        if reboot:
            node.lab.ip(node.netns, "link del flannel.1")
            node.subnet_file.unlink()
            (node.directory / "state.json").unlink(missing_ok=True)
        control.forget()
        cluster.start(node)
        assert mac(node) == before
        assert control.annotations("node1") == annotations
        assert control.counts()["patch nodes/status"] == 0


def test_heartbeats_of_other_nodes_cost_no_work(cluster_of: Clusters) -> None:
    cluster = cluster_of(2, "kube")
    control = control_of(cluster.lab)
    node = cluster.nodes[0]
    start(node, cluster)
    wait_for(lambda: node.subnet_file.exists() and ready(node) == "ready", 10.0, "the node", node.log)

    def work() -> list[str]:
        names = ("flannel_reconcile_duration_seconds_count", "flannel_kernel_operations_total")
        return [line for line in probe(node, "/metrics").splitlines() if line.startswith(names)]

    join(cluster, 50)
    node.wait_routes([IPv4Network("10.244.50.0/24")])
    before = work()
    for _ in range(20):
        control.heartbeat("peer50")
        control.heartbeat("node2")
    # When the node has heard of what comes after them, it has heard them.
    join(cluster, 51)
    node.wait_routes([IPv4Network("10.244.51.0/24")])
    after = work()
    passes = 'duration_seconds_count{what="peer"}'
    assert value(after, passes) - value(before, passes) == 1
    looks = 'duration_seconds_count{what="network"}'
    assert value(after, looks) == value(before, looks)
    assert value(after, 'operations_total{verb="put"}') - value(before, 'operations_total{verb="put"}') == 3


def test_a_node_without_pod_cidr_waits_and_says_what_to_do(cluster_of: Clusters) -> None:
    cluster = cluster_of(1, "kube")
    control = control_of(cluster.lab)
    node = cluster.nodes[0]
    control.delete_node("node1")
    start(node, cluster)
    wait_for(lambda: "node node1 does not exist" in node.log.read_text(), 10.0, "the wait", node.log)
    control.add_node("node1", address=str(node.address))
    wait_for(lambda: "--allocate-node-cidrs" in ready(node), 10.0, "the remedy in /readyz", node.log)
    assert not node.subnet_file.exists()
    control.set_pod_cidrs("node1", "10.244.7.0/24")
    assert str(node.wait_subnet()) == "10.244.7.0/24"
    wait_for(lambda: ready(node) == "ready", 10.0, "readiness", node.log)


def test_a_right_that_is_missing_is_named_and_waited_for(cluster_of: Clusters) -> None:
    cluster = cluster_of(1, "kube")
    control = control_of(cluster.lab)
    node = cluster.nodes[0]
    control.forbid("patch", "nodes/status")
    start(node, cluster)
    wait_for(
        lambda: "patch" in ready(node) and "nodes/status" in ready(node), 10.0, "verb and resource", node.log
    )
    control.allow("patch", "nodes/status")
    wait_for(lambda: ready(node) == "ready", 15.0, "readiness", node.log)


@pytest.mark.parametrize("fault", ["expired token", "wrong CA", "internal error", "too many requests"])
def test_an_api_server_that_refuses_is_said_and_waited_for(cluster_of: Clusters, fault: str) -> None:
    cluster = cluster_of(1, "kube")
    control = control_of(cluster.lab)
    node = cluster.nodes[0]
    words = {
        "expired token": "401",
        "wrong CA": "ca.crt",
        "internal error": "500",
        "too many requests": "429",
    }
    match fault:
        case "expired token":
            control.expire_token(replace=False)
        case "wrong CA":
            control.wrong_ca()
        case "internal error":
            control.fail()
        case "too many requests":
            control.too_many()
    start(node, cluster)
    wait_for(lambda: words[fault] in node.log.read_text(), 10.0, f"{words[fault]} in the log", node.log)
    assert "Traceback" not in node.log.read_text()
    match fault:
        case "expired token":
            control.expire_token()
        case "wrong CA":
            control.wrong_ca(False)
        case _:
            control.clear()
    wait_for(lambda: ready(node) == "ready", 20.0, "readiness", node.log)


def test_a_pod_cidr_outside_of_the_network_is_refused_before_anything_is_written(
    cluster_of: Clusters,
) -> None:
    cluster = cluster_of(1, "kube")
    control = control_of(cluster.lab)
    node = cluster.nodes[0]
    control.delete_node("node1")
    control.add_node("node1", "10.99.1.0/24", address=str(node.address))
    start(node, cluster)
    assert node.daemon.popen.wait(15) == 1
    assert "10.99.1.0/24" in last_error(node.daemon)
    assert "10.244.0.0/16" in last_error(node.daemon)
    assert control.annotations("node1") == {}
    assert not node.subnet_file.exists()


@pytest.mark.parametrize("what", ["public IP", "podCIDR"])
def test_what_another_live_node_holds_is_refused_with_both_names(cluster_of: Clusters, what: str) -> None:
    cluster = cluster_of(2, "kube")
    control = control_of(cluster.lab)
    holder, late = cluster.nodes
    start(holder, cluster)
    holder.wait_subnet()
    flags = []
    if what == "podCIDR":
        control.delete_node("node2")
        control.add_node("node2", str(holder.subnet), address=str(late.address))
    else:
        flags = [f"--public-ip={holder.address}"]
    start(late, cluster, *flags)
    assert late.daemon.popen.wait(15) == 1
    said = last_error(late.daemon)
    assert "node1" in said
    assert "node2" in said
    assert (str(holder.subnet) if what == "podCIDR" else str(holder.address)) in said
    holder.daemon.require_running()
    assert control.annotations("node2") == {}


def test_rubbish_in_one_nodes_annotations_costs_only_that_node(cluster_of: Clusters) -> None:
    cluster = cluster_of(2, "kube")
    control = control_of(cluster.lab)
    rubbish = {
        "bad-ip": {"public-ip": "not an address", "backend-type": "vxlan", "backend-data": '{"VNI":1}'},
        "bad-data": {"public-ip": "192.168.77.50", "backend-type": "vxlan", "backend-data": "{{{"},
        "bad-type": {"public-ip": "192.168.77.51", "backend-type": "wormhole", "backend-data": "null"},
    }
    for number, (name, values) in enumerate(rubbish.items(), 50):
        annotations = {PREFIX + key: value for key, value in values.items()}
        annotations[f"{PREFIX}kube-subnet-manager"] = "true"
        control.add_node(name, f"10.244.{number}.0/24", annotations=annotations)
    control.add_node("without-annotations", "10.244.60.0/24")
    cluster.start()
    for node in cluster.nodes:
        assert len(routes(node)) == 1
        said = node.log.read_text()
        assert said.count("bad-ip") == said.count("bad-data") == 1, said
        node.daemon.require_running()


def test_a_node_that_is_deleted_and_comes_back(cluster_of: Clusters) -> None:
    """Its own network stays as it is; with the same podCIDR it goes on, with another it is set up anew."""
    cluster = cluster_of(2, "kube")
    control = control_of(cluster.lab)
    cluster.start()
    node, other = cluster.nodes
    before, text = mac(node), node.subnet_file.read_text()
    control.delete_node("node1")
    wait_for(lambda: routes(other) == set(), 5.0, "the peer's answer", other.log)
    wait_for(lambda: "is gone from the store" in node.log.read_text(), 5.0, "notice", node.log)
    assert routes(node) == {str(other.subnet)}
    control.add_node("node1", "10.244.1.0/24", address=str(node.address))
    wait_for(lambda: routes(other) == {"10.244.1.0/24"}, 15.0, "the route back", other.log)
    wait_for(lambda: bool(condition(cluster, "node1")), 15.0, "the condition again", node.log)
    assert (mac(node), node.subnet_file.read_text()) == (before, text)
    node.daemon.require_running()
    control.delete_node("node1")
    control.add_node("node1", "10.244.9.0/24", address=str(node.address))
    wait_for(lambda: str(node.subnet) == "10.244.9.0/24", 30.0, "the new subnet", node.log)
    wait_for(lambda: routes(other) == {"10.244.9.0/24"}, 10.0, "the new route", other.log)
    node.daemon.require_running()


def test_operators_annotations(cluster_of: Clusters) -> None:
    """node-public-ip chooses the interface's address, public-ip-overwrite is what peers are told."""
    cluster = cluster_of(2, "kube")
    control = control_of(cluster.lab)
    node, other = cluster.nodes
    node.lab.ip(node.netns, "addr add 192.168.77.60/24 dev eth0")
    control.set_annotations("node1", {f"{PREFIX}node-public-ip": "192.168.77.60"})
    control.set_annotations("node2", {f"{PREFIX}public-ip-overwrite": "203.0.113.77"})
    cluster.start()
    assert control.annotations("node1")[f"{PREFIX}public-ip"] == "192.168.77.60"
    assert control.annotations("node2")[f"{PREFIX}public-ip"] == "203.0.113.77"
    fdb = node.lab.run(node.netns, "bridge", "fdb", "show", "dev", "flannel.1")
    assert "dst 203.0.113.77 " in fdb
    local = node.lab.show(node.netns, "ip", "-d", "link", "show", "flannel.1")[0]["linkinfo"]["info_data"]
    assert local["local"] == "192.168.77.60"
    # What is told and what is our own differ for good: that is no reason to write again and again.
    assert "writing it again" not in other.log.read_text()


def test_dual_stack(cluster_of: Clusters) -> None:
    network = {
        "Network": "10.244.0.0/16",
        "EnableIPv6": True,
        "IPv6Network": "fd00:10:244::/48",
        "Backend": {"Type": "vxlan"},
    }
    cluster = cluster_of(2, "kube", network, families=(4, 6))
    control = control_of(cluster.lab)
    cluster.start()
    node, other = cluster.nodes
    annotations = control.annotations("node1")
    assert annotations[f"{PREFIX}public-ipv6"] == str(node.address6)
    assert annotations[f"{PREFIX}backend-v6-data"].startswith('{"VNI":1,"VtepMAC":"')
    near, far = node.add_pod("near", PLUGINS), other.add_pod("far", PLUGINS)
    for address in (far.endpoint.address, far.endpoint.address6):
        node.lab.run(near.netns, "ping", "-n", "-c3", "-i0.2", "-W5", str(address))
