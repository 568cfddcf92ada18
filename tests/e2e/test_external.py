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


def test_an_address_that_is_away_for_a_moment_is_not_given_up(cluster_of: Clusters) -> None:
    """A DHCP client drops and takes its lease again, with a second address beside it all the time."""
    cluster = cluster_of(1)
    cluster.start()
    node = cluster.nodes[0]
    index = device(node)["ifindex"]
    node.lab.ip(node.netns, f"addr add {NEW}/24 dev eth0", f"addr del {node.address}/24 dev eth0")
    # Its own address vanishes with the first look at the interface, which is a second later at most.
    mark = len(node.log.read_text())
    node.lab.run(node.netns, "sleep", "2")
    node.lab.ip(node.netns, f"addr add {node.address}/24 dev eth0")
    node.lab.run(node.netns, "sleep", "5")
    assert (local(node), device(node)["ifindex"]) == (str(node.address), index)
    assert "anew" not in node.log.read_text()[mark:]


def test_routes_of_others_on_the_interface_cost_no_work(cluster_of: Clusters) -> None:
    cluster = cluster_of(1)
    node = cluster.nodes[0]
    node.start(FROZEN, cluster.store, "--healthz-port=8081")
    node.wait_subnet()
    wait_for(lambda: "flannel is ready" in node.log.read_text(), 5.0, "the daemon", node.log)

    def passes() -> float:
        text = node.lab.run(node.netns, "curl", "-s", "http://127.0.0.1:8081/metrics")
        return float(text.partition('duration_seconds_count{what="network"} ')[2].split()[0])

    before = passes()
    for number in range(50):
        node.lab.ip(node.netns, f"route add 172.20.{number}.0/24 via 192.168.77.1")
    # What comes after them has been seen: so have they.
    node.lab.ip(node.netns, "link set flannel.1 alias seen")
    wait_for(lambda: passes() == before + 1, 5.0, "one pass, for the device", node.log)


def test_a_set_up_that_fails_later_does_not_end_the_daemon(cluster_of: Clusters) -> None:
    """The node moves to another address while a program holds the VXLAN port, and then gives it back."""
    cluster = cluster_of(1)
    cluster.start()
    node = cluster.nodes[0]
    holder = """if True:
        import signal, socket, time
        while True:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                sock.bind(("", 8472))
                break
            except OSError:
                time.sleep(0.001)
        print("held", flush=True)
        signal.pause()
    """
    thief = node.lab.spawn(node.netns, "thief", ["/usr/bin/python3", "-c", holder])
    os.kill(node.daemon.popen.pid, signal.SIGSTOP)
    node.lab.ip(node.netns, "link del flannel.1")
    thief.wait_text("held")
    node.lab.ip(
        node.netns,
        f"addr del {node.address}/24 dev eth0",
        f"addr add {NEW}/24 dev eth0",
        "route replace default via 192.168.77.1",
    )
    os.kill(node.daemon.popen.pid, signal.SIGCONT)
    node.daemon.wait_text("cannot be set up anew, and is tried again", 30.0)
    thief.end()
    wait_for(lambda: local(node) == NEW, 30.0, "the device", node.log)
    node.daemon.require_running()
