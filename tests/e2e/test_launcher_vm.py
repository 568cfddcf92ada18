"""A real VM in a pod of a two-node flannel.

outside ── node1 ── cni0 ── pod "vm": k6t-eth0 ── tap0 ── [ QEMU: guest ]
    └───── node2 ── cni0 ── pod "far"
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.lab import net, traffic
from tests.lab.cluster import Cluster
from tests.lab.machine import DNS, Machine
from tests.lab.net import wait_for
from tests.lab.node import CNI_BIN, UPSTREAM_CNI_BIN

PLUGINS = (CNI_BIN, UPSTREAM_CNI_BIN)
PORT = 7007


@pytest.mark.parametrize("binding", ["bridge", "masquerade"])
def test_a_machine_has_the_pods_network(cluster_of: Callable[..., Cluster], binding: str) -> None:
    cluster = cluster_of(2)
    cluster.start()
    lab, (near, away) = cluster.lab, cluster.nodes
    pod, far = near.add_pod("vm", PLUGINS), away.add_pod("far", PLUGINS)
    address = pod.endpoint.address
    traffic.ping(lab, far.netns, address)  # the pod itself, before

    machine = Machine(pod, binding)
    machine.hand_over()
    began = time.monotonic()
    guest = machine.boot()
    booted = time.monotonic() - began
    acquired = machine.acquire()
    print(f"\n{binding}: guest up after {booted:.1f} s, {acquired.address} from {acquired.server_id}")

    bridge = binding == "bridge"
    assert str(acquired.address) == (f"{address}/24" if bridge else "10.0.2.2/24")
    assert acquired.mtu_bytes == 1450
    assert [str(server) for server in acquired.dns] == [DNS]
    assert acquired.search == ("default.svc.cluster.local", "cluster.local")
    assert acquired.lease_s == machine.lease_s
    assert acquired.reported["hostname"] == "vm"
    gateway = f"{near.subnet[1]}" if bridge else "10.0.2.1"
    assert [str(router) for router in acquired.routers] == [gateway]
    if bridge:
        assert {str(r) for r in acquired.static_routes} == {
            f"10.244.0.0/16 via {gateway}",
            f"0.0.0.0/0 via {gateway}",
        }
        assert f"link/ether {pod.endpoint.mac}" in guest.run("ip link show eth0")
    assert "mtu 1450" in guest.run("ip link show eth0")

    # From the other node, across VXLAN, to the guest.
    traffic.ping(lab, far.netns, address)
    guest.run("mkdir -p /www; echo the guest itself >/www/index.html; httpd -h /www -p 80")
    assert lab.run(far.netns, "curl", "-sf", f"http://{address}/") == "the guest itself\n"

    # From the guest to the other node's pod, and to the outside.
    traffic.answering(lab, far.netns, PORT, "far").wait_text("listening")
    assert f'"peer": "{address}"' in guest.run(f"nc {far.endpoint.address} {PORT} </dev/null")
    traffic.answering(lab, lab.outside, PORT, "world").wait_text("listening")
    assert f'"peer": "{near.address}"' in guest.run(f"nc {net.WORLD} {PORT} </dev/null")

    # The launcher dies and comes back: the guest's traffic goes on, and so do its renewals.
    machine.wait_renewed(1)
    machine.kill_launcher()
    traffic.ping(lab, far.netns, address)
    machine.hand_over()
    done = sum("DHCP renew" in line for line in guest.console_lines())
    renewed = machine.wait_renewed(done + 1)
    assert renewed == acquired
    assert lab.run(far.netns, "curl", "-sf", f"http://{address}/") == "the guest itself\n"

    guest.stop()
    machine.restore()
    traffic.ping(lab, far.netns, address)  # the pod itself, again
    near.runtime(PLUGINS).delete(pod.attachment)
    assert near.reservations() == []


@pytest.mark.parametrize("binding", ["bridge", "masquerade"])
def test_a_machines_pod_can_be_deleted_as_it_is(cluster_of: Callable[..., Cluster], binding: str) -> None:
    cluster = cluster_of(1)
    cluster.start()
    node = cluster.nodes[0]
    pod = node.add_pod("vm", PLUGINS)
    machine = Machine(pod, binding)
    machine.hand_over()
    machine.kill_launcher()
    node.runtime(PLUGINS).delete(pod.attachment)
    assert node.reservations() == []
    node.lab.ip(pod.netns, "link show k6t-eth0")
    node.lab.run(node.netns, "ip", "netns", "del", pod.netns)
    wait_for(
        lambda: (
            not any(link["ifname"].startswith("veth") for link in node.lab.show(node.netns, "ip", "link"))
        ),
        5.0,
        "removal of the pod's link",
    )
