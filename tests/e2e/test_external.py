"""The interface between the nodes changes under a running daemon, and the overlay follows."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.lab.cluster import Cluster
from tests.lab.net import wait_for
from tests.lab.node import CNI_BIN, FROZEN, UPSTREAM_CNI_BIN, Node, Pod

Clusters = Callable[..., Cluster]
PLUGINS = (CNI_BIN, UPSTREAM_CNI_BIN)
NEW = "192.168.77.111"


def device(node: Node) -> dict[str, object]:
    """flannel.1 as iproute2 shows it; empty if there is none."""
    links = node.lab.show(node.netns, "ip", "-d", "link")
    return next((link for link in links if link["ifname"] == "flannel.1"), {})


def local(node: Node) -> str:
    """The source address of the node's outer packets."""
    info = device(node).get("linkinfo", {})
    assert isinstance(info, dict)
    return str(info.get("info_data", {}).get("local", ""))


def peer_fdb(node: Node) -> str:
    return node.lab.run(node.netns, "bridge", "fdb", "show", "dev", "flannel.1")


def reaches(near: Pod, far: Pod) -> bool:
    """Whether three pings of three come back."""
    lab = near.node.lab
    argv = ("ping", "-n", "-c3", "-i0.05", "-W1", far.endpoint.address)
    return " 3 received" in lab.run(near.netns, "sh", "-c", " ".join(argv) + "; true")


def test_mtu_is_followed_up_and_down(cluster_of: Clusters) -> None:
    cluster = cluster_of(2)
    cluster.start()
    node = cluster.nodes[0]
    mac = device(node)["address"]
    for mtu in (1400, 1500):
        node.lab.ip(node.netns, f"link set eth0 mtu {mtu}")
        wait_for(lambda: device(node).get("mtu") == mtu - 50, 5.0, "the device's MTU", node.log)  # noqa: B023
        wait_for(
            lambda: node.environment.get("FLANNEL_MTU") == str(mtu - 50),  # noqa: B023
            5.0,
            "the MTU in subnet.env",
            node.log,
        )
    assert device(node)["address"] == mac
    node.daemon.require_running()


def test_an_mtu_that_leaves_no_room_is_said_and_not_followed(cluster_of: Clusters) -> None:
    cluster = cluster_of(1)
    cluster.start()
    node = cluster.nodes[0]
    node.lab.ip(node.netns, "link set eth0 mtu 100")
    node.daemon.wait_text("leaves 50 bytes for pods")
    node.daemon.require_running()
    assert node.environment["FLANNEL_MTU"] == "1450"
    node.lab.ip(node.netns, "link set eth0 mtu 1500")
    wait_for(lambda: device(node).get("mtu") == 1450, 5.0, "the device's MTU", node.log)


@pytest.mark.parametrize("store", ["sqlite", "etcd"])
def test_a_new_address_is_followed_and_the_subnet_stays(cluster_of: Clusters, store: str) -> None:
    cluster = cluster_of(2, store)
    cluster.start()
    node, other = cluster.nodes
    near, far = node.add_pod("near", PLUGINS), other.add_pod("far", PLUGINS)
    assert reaches(near, far)
    subnet, mac, text = node.subnet, device(node)["address"], node.subnet_file.read_text()
    node.lab.ip(
        node.netns,
        f"addr del {node.address}/24 dev eth0",
        f"addr add {NEW}/24 dev eth0",
        "route replace default via 192.168.77.1",
    )
    wait_for(lambda: local(node) == NEW, 10.0, "the device's source address", node.log)
    wait_for(lambda: f"dst {NEW} " in peer_fdb(other), 10.0, "the peer to know it", other.log)
    wait_for(lambda: reaches(near, far), 10.0, "traffic", node.log)
    assert (node.subnet, device(node)["address"], node.subnet_file.read_text()) == (subnet, mac, text)
    assert f"dst {node.address} " not in peer_fdb(other)
    node.daemon.require_running()


def test_a_new_address_after_a_reboot_keeps_the_subnet(cluster_of: Clusters) -> None:
    """DHCP gave the node another address while it was down."""
    cluster = cluster_of(2, "etcd")
    cluster.start()
    node, other = cluster.nodes
    subnet, mac = node.subnet, device(node)["address"]
    wait_for((node.directory / "state.json").exists, 5.0, "the state file")
    os.kill(node.daemon.popen.pid, signal.SIGKILL)
    node.daemon.popen.wait(5)
    node.subnet_file.unlink()
    node.lab.ip(
        node.netns,
        "link del flannel.1",
        f"addr del {node.address}/24 dev eth0",
        f"addr add {NEW}/24 dev eth0",
        "route replace default via 192.168.77.1",
    )
    node.start(FROZEN, cluster.store)
    assert node.wait_subnet() == subnet
    assert device(node)["address"] == mac
    wait_for(lambda: f"dst {NEW} " in peer_fdb(other), 10.0, "the peer to know it", other.log)


def test_another_address_beside_the_first_changes_nothing(cluster_of: Clusters) -> None:
    cluster = cluster_of(2)
    cluster.start()
    node = cluster.nodes[0]
    index = device(node)["ifindex"]
    node.lab.ip(node.netns, f"addr add {NEW}/24 dev eth0", "link set eth0 mtu 1400")
    wait_for(lambda: device(node).get("mtu") == 1350, 5.0, "the device's MTU", node.log)
    assert (local(node), device(node)["ifindex"]) == (str(node.address), index)


def test_the_interface_goes_and_comes_back(cluster_of: Clusters) -> None:
    cluster = cluster_of(2)
    cluster.start()
    node, other = cluster.nodes
    near, far = node.add_pod("near", PLUGINS), other.add_pod("far", PLUGINS)
    mac = device(node)["address"]
    node.lab.ip(node.netns, "link del eth0")
    wait_for(lambda: not device(node), 5.0, "the loss of the device", node.log)
    node.daemon.wait_text("eth0")
    node.lab.ip(
        node.netns,
        f"link add eth0 type veth peer name back netns {node.lab.switch}",
        f"addr add {node.address}/24 dev eth0",
        "link set eth0 up",
        "route add default via 192.168.77.1",
    )
    node.lab.ip(node.lab.switch, "link set back master br0 up")
    wait_for(lambda: local(node) == str(node.address), 5.0, "the device", node.log)
    wait_for(lambda: reaches(near, far), 5.0, "traffic", node.log)
    assert device(node)["address"] == mac
    node.daemon.require_running()
