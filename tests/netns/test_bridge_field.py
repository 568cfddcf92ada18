"""What goes wrong with bridge in the field: each test is named after the problem.

Upstream's bridge has most of them, so most run with ours only. What the end of a container looks like to
DEL (netns gone, link gone, rules left) is here as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.netns.bridge_fixtures import (
    ADDRESSES,
    BOTH,
    GATEWAYS,
    GO,
    OURS,
    RANGES,
    V4,
    V6,
    Document,
    Rig,
    masquerades,
    new_rig,
    reset,
    text_of,
    traces,
)
from tests.netns.cni_fixtures import DUAL_STACK, Namespace, Node, attachment, new_node, pings, wait_for

MAC = "c2:11:22:33:44:55"
both = pytest.mark.parametrize("subject", BOTH, ids=repr)
BACKENDS = pytest.mark.parametrize("backend", [None, "iptables", "nftables"])


@pytest.fixture
def subject() -> Any:
    return OURS


@pytest.fixture
def rig(tmp_path: Path, subject: Any) -> Iterator[Rig]:
    with new_rig(tmp_path, subject) as rig:
        yield rig


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node for flannel; no other plugin is in its CNI_PATH, so bridge and host-local are ours."""
    with new_node(tmp_path) as node:
        (tmp_path / "bin").mkdir()
        node.path = str(tmp_path / "bin")
        yield node


def gone(rig: Rig) -> None:
    """The end of the pod's namespace, and of the links in it."""
    rig.node.forget(rig.pod)
    wait_for(lambda: rig.node.veths() == [])


# --- DEL, by the state in which it finds the container


@both
def test_del_of_what_was_never_added(rig: Rig) -> None:
    for version in rig.subject.versions:
        rig.delete(rig.conf(version=version), "never")
    assert rig.traces() == [] and rig.pod.links() == ["lo"]


@both
@pytest.mark.parametrize("netns", ["", "/run/netns/pfl-no-such"])
def test_del_without_namespace_releases_the_address(rig: Rig, netns: str) -> None:
    conf = rig.conf("dual")
    rig.add(conf)
    gone(rig)
    for _ in range(3):
        rig.delete(conf, netns=netns)
        assert rig.traces() == []


def mount_point_left_by_umount(rig: Rig) -> str:
    path = rig.node.root / "left-by-umount"
    path.touch()
    return str(path)


NETNS_ENDS = {
    "empty": lambda _: "",
    "absent": lambda _: "/run/netns/pfl-no-such",
    "a plain file": mount_point_left_by_umount,
}


@BACKENDS
@pytest.mark.parametrize("end", NETNS_ENDS)
def test_masquerade_rules_leak_when_the_namespace_is_gone(rig: Rig, end: str, backend: str | None) -> None:
    conf = rig.conf("dual", ipMasq=True, ipMasqBackend=backend)
    rig.add(conf)
    gone(rig)
    rig.delete(conf, netns=NETNS_ENDS[end](rig))
    assert rig.traces() == []


@pytest.mark.parametrize("end", NETNS_ENDS)
def test_masquerade_rules_that_go_left_when_the_namespace_is_gone(rig: Rig, end: str) -> None:
    conf = rig.conf("dual", ipMasq=True)
    rig.add(conf, by=GO)
    gone(rig)
    rig.delete(conf, netns=NETNS_ENDS[end](rig))
    assert rig.traces() == []


@pytest.mark.parametrize("end", NETNS_ENDS)
def test_macspoof_rules_leak_when_the_namespace_is_gone(rig: Rig, end: str) -> None:
    conf = rig.conf(macspoofchk=True)
    rig.add(conf)
    gone(rig)
    rig.delete(conf, netns=NETNS_ENDS[end](rig))
    assert rig.traces() == []


def test_del_fails_for_ever_on_a_plain_file(rig: Rig) -> None:
    conf = rig.conf()
    path = mount_point_left_by_umount(rig)
    error = rig.refused("DEL", conf, netns=path, by=GO)
    assert "unknown FS magic" in error["msg"]
    rig.delete(conf, netns=path)


@BACKENDS
def test_masquerade_rules_leak_when_the_link_is_gone(rig: Rig, backend: str | None) -> None:
    conf = rig.conf("dual", ipMasq=True, ipMasqBackend=backend)
    rig.add(conf)
    rig.pod.run("ip link delete eth0")
    rig.delete(conf)
    assert rig.traces() == []


@BACKENDS
def test_masquerade_rules_leak_when_del_has_a_netconf_without_ipmasq(rig: Rig, backend: str | None) -> None:
    rig.add(rig.conf("dual", ipMasq=True, ipMasqBackend=backend))
    rig.delete(rig.conf("dual"))
    assert rig.traces() == []


def test_rules_of_both_backends_go(rig: Rig) -> None:
    """Somebody changed ipMasqBackend, or the plugin, between two pods of one ID."""
    conf = rig.conf("dual", ipMasq=True)
    rig.add(conf, by=GO)
    rig.pod.run("ip link delete eth0")
    reset(rig)
    rig.add({**conf, "ipMasqBackend": "nftables"})
    assert "CNI-" in rig.firewall()
    rig.delete(conf)
    assert rig.traces() == []


@both
def test_del_without_link_releases_the_address(rig: Rig) -> None:
    conf = rig.conf("dual")
    rig.add(conf)
    rig.pod.run("ip link delete eth0")
    rig.delete(conf)
    assert rig.traces() == []


@both
def test_del_without_bridge(rig: Rig) -> None:
    conf = rig.conf("dual")
    rig.add(conf)
    rig.host.run("ip link delete cni0")
    rig.delete(conf)
    assert rig.traces() == [] and rig.pod.links() == ["lo"]


@both
def test_del_with_other_ranges_than_add(rig: Rig) -> None:
    rig.add(rig.conf("dual"))
    rig.delete(rig.conf(ipam=rig.ipam([[{"subnet": "172.30.0.0/24"}]])))
    assert rig.traces() == []


@both
def test_del_leaves_the_other_interface_alone(rig: Rig) -> None:
    first, second = rig.conf(), rig.conf(bridge="cni1", ipam=rig.ipam([[{"subnet": "10.1.18.0/24"}]]))
    rig.add(first)
    rig.add(second, ifname="net1")
    rig.delete(second, ifname="net1")
    assert rig.pod.links() == ["eth0", "lo"] and pings(rig.pod, "10.1.17.1")
    assert rig.node.reservations() == {"10.1.17.2": "c1\r\neth0"}
    rig.delete(first)
    assert rig.pod.links() == ["lo"] and rig.traces() == []


@both
def test_del_takes_the_link_even_if_ipam_fails(rig: Rig) -> None:
    """And a retry, once IPAM works again, ends the work."""
    stub = rig.node.root / "bin"
    stub.mkdir()
    result = '{"cniVersion":"1.0.0","ips":[{"address":"10.1.17.2/24","gateway":"10.1.17.1"}]}'
    (stub / "stub").write_text(
        f"#!/bin/sh\ncat > /dev/null\n[ $CNI_COMMAND = ADD ] && echo '{result}' && exit 0\n"
        f'[ -e {stub}/works ] || {{ echo \'{{"code":100,"msg":"busy"}}\'; exit 1; }}\n'
    )
    (stub / "stub").chmod(0o755)
    rig.node.path = str(stub)
    keys: Document = {} if rig.subject is GO else {"ipMasq": True}
    conf = rig.conf(ipam={"type": "stub"}, **keys)
    rig.add(conf)
    assert rig.refused("DEL", conf) == {"code": 100, "msg": "busy"}
    assert rig.pod.links() == ["lo"]
    assert rig.traces() == []
    (stub / "works").touch()
    rig.delete(conf)


# --- whose link is it


def test_a_reused_pid_loses_the_link_of_another_container(rig: Rig) -> None:
    """/proc/<pid>/ns/net is by now another container's namespace, with an eth0 of its own."""
    sleeper = subprocess.Popen(rig.pod.wrap(["sleep", "60"]))
    try:
        path = f"/proc/{sleeper.pid}/ns/net"
        inside = Path("/run/netns") / rig.pod.name
        wait_for(lambda: Path(path).exists() and Path(path).stat().st_ino == inside.stat().st_ino)
        conf = rig.conf("dual", ipMasq=True)
        result = rig.add(conf, netns=path)
        rig.pod.run("ip link delete eth0")
        rig.add(conf, "c2")
        rig.delete({**conf, "prevResult": result}, netns=path)
    finally:
        sleeper.kill()
        sleeper.wait(timeout=10)
    assert set(rig.node.reservations().values()) == {"c2\r\neth0"}
    assert rig.pod.links() == ["eth0", "lo"] and pings(rig.pod, "10.1.17.1")
    assert not masquerades(rig, "10.1.17.2") and masquerades(rig, "10.1.17.3")


@pytest.mark.parametrize("kind", ["veth", "bridge"])
def test_a_foreign_link_of_the_same_name_stays(rig: Rig, kind: str) -> None:
    conf = rig.conf()
    result = rig.add(conf)
    rig.pod.run("ip link delete eth0")
    rig.pod.run(f"ip link add eth0 type {kind}")
    rig.delete({**conf, "prevResult": result})
    assert "eth0" in rig.pod.links() and rig.node.reservations() == {}


@both
def test_without_prev_result_whatever_has_the_name_goes(rig: Rig) -> None:
    conf = rig.conf()
    rig.add(conf)
    rig.pod.run("ip link delete eth0")
    rig.pod.run("ip link add eth0 type veth peer name other")
    rig.delete(conf)
    assert rig.pod.links() == ["lo"]


def test_a_link_whose_mac_was_changed_is_still_ours(rig: Rig) -> None:
    """By tuning, or in the pod. The host end tells whose it is."""
    conf = rig.conf()
    result = rig.add(conf)
    rig.pod.run(f"ip link set eth0 address {MAC}")
    rig.delete({**conf, "prevResult": result})
    assert rig.pod.links() == ["lo"] and rig.traces() == []


@pytest.mark.parametrize("netns", ["", "/run/netns/pfl-no-such"])
def test_a_namespace_that_lives_on_without_a_path(rig: Rig, netns: str) -> None:
    """A process holds it. prevResult names the host end, so that goes, and the container's with it."""
    conf = rig.conf("dual", ipMasq=True)
    result = rig.add(conf)
    rig.delete({**conf, "prevResult": result}, netns=netns)
    assert (rig.pod.links(), rig.traces()) == (["lo"], [])


def test_a_host_end_whose_name_was_taken_over_stays(rig: Rig) -> None:
    conf = rig.conf()
    result = rig.add(conf)
    veth = rig.veth()
    rig.pod.run("ip link delete eth0")
    rig.host.run(f"ip link add {veth} type veth peer name x")
    rig.delete({**conf, "prevResult": result}, netns="")
    assert rig.node.veths() == [veth] and rig.node.reservations() == {}


FIRST_NAME = """
import os
_random, _first = os.urandom, [bytes.fromhex("deadbeef")]
os.urandom = lambda size: _first.pop() if size == 4 and _first else _random(size)
"""


@pytest.mark.skipif(
    "PFL_CNI_PLUGIN" in os.environ, reason="a frozen plugin cannot be told its random numbers"
)
def test_veth_name_collision(rig: Rig) -> None:
    """The name that comes up first exists on the node already: another one is taken."""
    rig.host.run("ip link add vethdeadbeef type veth peer name x")
    before = rig.link("vethdeadbeef")["ifindex"]
    (rig.node.root / "sitecustomize.py").write_text(FIRST_NAME)
    environment = {
        **attachment("c1", rig.pod),
        **OURS.environment(),
        "PYTHONPATH": str(rig.node.root),
    }
    argv = OURS.command(rig.node.root)
    code, result = rig.node.execute(argv, "ADD", environment, json.dumps(rig.conf()))
    assert code == 0, result
    assert rig.link("vethdeadbeef")["ifindex"] == before
    assert len(rig.node.veths()) == 2 and pings(rig.pod, "10.1.17.1")


def test_the_nodes_own_namespace_is_refused_before_anything_is_done(rig: Rig) -> None:
    rig.host.run("ip link add eth0 type bridge")
    before = rig.host.links()
    assert rig.refused("ADD", rig.conf(), netns=rig.host)["code"] == 8
    assert rig.host.links() == before and rig.node.reservations() == {}


def test_a_pid_of_the_host_takes_over_the_number_of_a_container(rig: Rig) -> None:
    """DEL with a path that is the host's own namespace now: none of its links goes, the address does."""
    rig.add(rig.conf())
    rig.host.run("ip link add eth0 type bridge")
    assert rig.call("DEL", rig.conf(), netns=rig.host) is None
    assert "eth0" in rig.host.links() and rig.node.reservations() == {}


# --- rows of the table of field problems


def last_reserved(rig: Rig) -> str:
    return (rig.node.store / "last_reserved_ip.0").read_text()


def test_cni0_already_has_an_ip_address_different_from(rig: Rig) -> None:
    """After a change of the node's subnet. With no pod left the address is replaced."""
    old = rig.conf("dual")
    rig.add(old)
    rig.delete(old)
    reset(rig)
    new = rig.conf(ipam=rig.ipam([[{"subnet": "10.1.18.0/24"}], V6]))
    result = rig.add(new)
    assert [one["address"] for one in result["ips"]] == ["10.1.18.2/24", *ADDRESSES["v6"]]
    assert sorted(rig.host.addresses("cni0")) == ["10.1.18.1/24", *GATEWAYS["v6"]]
    assert pings(rig.pod, "10.1.18.1")


def test_each_failed_add_consumes_an_address_of_the_new_subnet(rig: Rig) -> None:
    """With a pod attached it fails, says what to do, and allocates nothing."""
    rig.add(rig.conf())
    pod = rig.node.namespace()
    new = rig.conf(ipam=rig.ipam([[{"subnet": "10.1.18.0/24"}]]))
    before = last_reserved(rig)
    for _ in range(3):
        error = rig.refused("ADD", new, "c2", netns=pod)
        wanted = 'failed to set bridge addr: "cni0" already has an IP address different from 10.1.18.1/24'
        assert (error["code"], error["msg"]) == (999, wanted)
        assert "10.1.17.1/24" in error["details"] and "forceAddress" in error["details"]
        assert (last_reserved(rig), list(rig.node.reservations())) == (before, ["10.1.17.2"])
        assert pod.links() == ["lo"] and len(rig.node.veths()) == 1
    assert pings(rig.pod, "10.1.17.1")


@both
@pytest.mark.parametrize("masquerade", [False, True])
@pytest.mark.parametrize("family", ["v4", "dual"])
def test_concurrent_adds_on_a_fresh_node(rig: Rig, family: str, masquerade: bool) -> None:
    conf = rig.conf(family, ipMasq=masquerade, isDefaultGateway=True)
    pods = [rig.node.namespace() for _ in range(24)]

    def attach(number: int) -> list[str]:
        result = rig.add(conf, f"x{number}", netns=pods[number])
        assert sorted(pods[number].addresses("eth0")) == sorted(one["address"] for one in result["ips"])
        return [str(one["address"]) for one in result["ips"]]

    with ThreadPoolExecutor(len(pods)) as pool:
        given = [one for some in pool.map(attach, range(len(pods))) for one in some]
        assert len(set(given)) == len(given) == len(pods) * len(RANGES[family])
        assert rig.host.addresses("cni0") == GATEWAYS[family]
        assert len(rig.node.veths()) == len(pods)
        assert all(pings(pod, "10.1.17.1") for pod in pods)
        list(pool.map(lambda one: rig.delete(conf, f"x{one}", netns=pods[one]), range(len(pods))))
    assert rig.traces() == []
    assert all(pod.links() == ["lo"] for pod in pods)


def test_duplicate_ip(rig: Rig) -> None:
    """Two stores share a subnet (podman beside kubelet): an address that answers on the bridge is skipped."""
    other = rig.node.namespace()
    elsewhere = {**rig.ipam([V4]), "dataDir": f"{rig.node.root}/other"}
    rig.add(rig.conf(ipam=elsewhere), "podman", netns=other, by=GO)
    assert other.addresses("eth0") == ADDRESSES["v4"] and pings(other, "10.1.17.1")
    rig.add(rig.conf())
    assert rig.pod.addresses("eth0") == ["10.1.17.3/24"]


def test_addresses_leak_when_the_node_reboots(rig: Rig) -> None:
    """All reservations are of an earlier boot, and one of them is nobody's: that one is given, no other."""
    conf = rig.conf(ipam=rig.ipam([[{"subnet": "10.1.17.0/29"}]]))
    pods = [rig.node.namespace() for _ in range(5)]
    for number, pod in enumerate(pods):
        rig.add(conf, f"x{number}", netns=pod)
    lost = pods.pop(2)
    rig.node.forget(lost)
    wait_for(lambda: len(rig.node.veths()) == 4)
    for address in rig.node.reservations():
        os.utime(rig.node.store / address, (1, 1))
    result = rig.add(conf)
    assert [one["address"] for one in result["ips"]] == ["10.1.17.4/29"]
    assert all(pings(pod, "10.1.17.4") for pod in pods)
    assert set(rig.node.reservations().values()) == {
        f"{one}\r\neth0" for one in ("x0", "x1", "c1", "x3", "x4")
    }
    assert "no IP addresses available" in text_of(rig.refused("ADD", conf, "c9", netns=rig.node.namespace()))


@both
@pytest.mark.parametrize("family", ["v4", "dual"])
def test_a_failed_second_add_frees_live_addresses(rig: Rig, family: str) -> None:
    conf = rig.conf(family)
    rig.add(conf)
    before = rig.node.reservations()
    for _ in range(2):
        rig.refused("ADD", conf)
        assert rig.node.reservations() == before
        assert rig.pod.addresses("eth0") == ADDRESSES[family] and pings(rig.pod, "10.1.17.1")
    rig.delete(conf)
    assert rig.traces() == []


@both
def test_eth0_exists_already(rig: Rig) -> None:
    """The spec demands the error; a DEL clears the way."""
    rig.pod.run("ip link add eth0 type veth peer name other")
    conf = rig.conf()
    assert text_of(rig.refused("ADD", conf)).endswith("already exists")
    assert rig.node.reservations() == {}
    rig.delete(conf)
    rig.add(conf)


def test_the_link_that_was_there_survives_a_failed_add(rig: Rig) -> None:
    rig.pod.run("ip link add eth0 type veth peer name other")
    rig.refused("ADD", rig.conf())
    assert rig.pod.links() == ["eth0", "lo", "other"] and rig.node.veths() == []


def mac_of_cni0(rig: Rig) -> tuple[str, str]:
    """The bridge's MAC, and whether it is pinned: 3 is NET_ADDR_SET, 1 random."""
    return rig.link("cni0")["address"], rig.host.run("cat /sys/class/net/cni0/addr_assign_type").strip()


def test_cni0_has_a_mac_that_changes_with_its_ports(rig: Rig) -> None:
    """A bridge that never had an address, and lost its last port, used to show 00:00:00:00:00:00."""
    layer2 = rig.conf(ipam=None, isGateway=None)
    rig.add(layer2)
    mac, kind = mac_of_cni0(rig)
    assert (mac != "00:00:00:00:00:00", kind) == (True, "3")
    rig.delete(layer2)
    assert mac_of_cni0(rig) == (mac, "3")
    rig.add(rig.conf())
    assert mac_of_cni0(rig) == (mac, "3")


def test_cni0_of_go_has_a_mac_that_is_not_pinned(rig: Rig) -> None:
    layer2 = rig.conf(ipam=None, isGateway=None)
    rig.add(layer2, by=GO)
    rig.delete(layer2, by=GO)
    result = rig.add(rig.conf())
    mac, kind = mac_of_cni0(rig)
    assert (mac != "00:00:00:00:00:00", kind) == (True, "3")
    assert result["interfaces"][0]["mac"] == mac
    other = rig.node.namespace()
    rig.add(rig.conf(), "c2", netns=other)
    rig.delete(rig.conf())
    assert mac_of_cni0(rig) == (mac, "3")


def test_ipv6_duplicate_address_detection(rig: Rig) -> None:
    """The pod's addresses are of use at once, whatever the node's default is."""
    for scope in ("all", "default"):
        rig.host.run(f"sysctl -qw net.ipv6.conf.{scope}.accept_dad=1")
    rig.add(rig.conf("dual"), "c0", netns=rig.node.namespace())
    began = time.monotonic()
    rig.add(rig.conf("dual"))
    assert time.monotonic() - began < 1.5  # of which DAD alone would take more
    (address,) = [one for one in rig.pod.ip("-6 address show dev eth0 scope global")[0]["addr_info"] if one]
    assert (address.get("nodad"), address.get("tentative", False)) == (True, False)


def test_ipv6_is_disabled_on_the_node(rig: Rig) -> None:
    for scope in ("all", "default"):
        rig.host.run(f"sysctl -qw net.ipv6.conf.{scope}.disable_ipv6=1")
    error = rig.refused("ADD", rig.conf("dual"))
    assert "IPv6" in error["msg"] and "disable" in error["msg"]
    assert (rig.pod.links(), rig.traces()) == (["lo"], [])
    rig.add(rig.conf("v4"))


def test_ipv6_is_disabled_in_the_pod(rig: Rig) -> None:
    for scope in ("all", "default"):
        rig.pod.run(f"sysctl -qw net.ipv6.conf.{scope}.disable_ipv6=1")
    rig.add(rig.conf("dual"))
    assert rig.pod.addresses("eth0") == ADDRESSES["dual"] and pings(rig.pod, "fd00:1:0:17::1")


@pytest.mark.parametrize("family", ["v6", "dual"])
def test_an_mtu_below_1280_with_ipv6(rig: Rig, family: str) -> None:
    error = rig.refused("ADD", rig.conf(family, mtu=1279))
    assert error["code"] == 7 and "1279" in error["msg"] and "1280" in error["msg"]
    assert (rig.pod.links(), rig.traces()) == (["lo"], [])
    rig.add(rig.conf("v4", mtu=1279))


@pytest.mark.parametrize("backend", [None, "iptables"])
def test_a_failed_add_leaves_its_veth(rig: Rig, backend: str | None) -> None:
    routes = [{"dst": "10.5.0.0/16", "gw": "10.99.1.1"}]
    conf = rig.conf(
        ipam=rig.ipam([V4, V6], routes=routes), ipMasq=True, ipMasqBackend=backend, macspoofchk=True
    )
    assert "network is unreachable" in text_of(rig.refused("ADD", conf))
    assert (rig.pod.links(), rig.traces()) == (["lo"], [])


@pytest.mark.parametrize(
    ("family", "routes"),
    [
        ("v4", [{"dst": "0.0.0.0/0"}]),
        ("dual", [{"dst": "::/0"}, {"dst": "0.0.0.0/0"}]),
        ("v4", [{"dst": "10.1.0.0/16"}, {"dst": "10.1.0.0/16"}]),
    ],
)
def test_a_second_default_route(rig: Rig, family: str, routes: list[dict[str, str]]) -> None:
    conf = rig.conf(family, ipam=rig.ipam(RANGES[family], routes=routes), isDefaultGateway=True)
    result = rig.add(conf)
    assert {"dst": "0.0.0.0/0", "gw": "10.1.17.1"} in result["routes"]
    found = [one["dst"] for one in rig.routes()]
    assert found.count("default") == len(RANGES[family]) and found.count("10.1.0.0/16") <= 1
    assert pings(rig.pod, "10.1.17.1")


def test_a_route_that_the_kernel_has_already(rig: Rig) -> None:
    """That of the pod's own subnet."""
    rig.add(rig.conf(ipam=rig.ipam([V4], routes=[{"dst": "10.1.17.0/24"}])))
    assert pings(rig.pod, "10.1.17.1")


@both
@pytest.mark.parametrize("hairpin", [True, False])
def test_hairpin(rig: Rig, hairpin: bool) -> None:
    """So a pod reaches itself by way of a service: the bridge returns frames to the port they came from."""
    conf = rig.conf(hairpinMode=hairpin, isDefaultGateway=True)
    rig.add(conf)
    # What the pod sends to a MAC that only the bridge knows behind the pod's own port comes back.
    rig.host.run(f"bridge fdb replace {MAC} dev {rig.veth()} master static")
    rig.pod.run(f"ip neigh replace 10.1.17.99 lladdr {MAC} dev eth0")
    sent = rig.node.root / "seen"
    with sent.open("w") as out:
        argv = rig.pod.wrap(["tcpdump", "-i", "eth0", "-lnQ", "in", "icmp"])
        listener = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "listening on" in sent.read_text())
        rig.pod.succeeds("ping -c 1 -W 1 10.1.17.99")
        rig.pod.run("ping -c 1 -W 1 10.1.17.1")
        wait_for(lambda: "10.1.17.1 > 10.1.17.2" in sent.read_text())
    finally:
        listener.terminate()
        listener.wait(timeout=10)
    assert ("10.1.17.2 > 10.1.17.99" in sent.read_text()) is hairpin


@both
def test_del_when_files_are_missing(rig: Rig) -> None:
    conf = rig.conf("dual")
    rig.add(conf)
    for file in [*rig.node.store.iterdir()]:
        file.unlink()
    rig.node.store.rmdir()
    rig.delete(conf)
    assert rig.pod.links() == ["lo"] and rig.traces() == []


# --- with flannel in front

MASQ: Document = {"delegate": {"isDefaultGateway": True, "hairpinMode": True, "ipMasq": True}}


@pytest.mark.parametrize("damage", ["lost", "empty", "half"])
@pytest.mark.parametrize("end", ["there", "gone"])
def test_scratch_file_lost_or_truncated_by_power_loss(node: Node, damage: str, end: str) -> None:
    (node.root / "subnet.env").write_text(DUAL_STACK)
    pod = node.namespace()
    node.call("ADD", "c1", pod, **MASQ)
    for path in node.data.iterdir():
        if damage == "lost":
            path.unlink()
        else:
            path.write_text("" if damage == "empty" else path.read_text()[:50])
    if end == "gone":
        node.forget(pod)
        wait_for(lambda: node.veths() == [])
    assert node.call("DEL", "c1", pod if end == "there" else None, **MASQ) is None
    assert traces(node) == []
    assert end == "gone" or pod.links() == ["lo"]


def test_a_lost_scratch_file_and_a_lost_reservation(node: Node) -> None:
    """Nothing on disk knows of the container any more; its link and its rules are still there."""
    pod = node.namespace()
    result = node.call("ADD", "c1", pod, **MASQ)
    for path in [*node.data.iterdir(), *node.store.iterdir()]:
        path.unlink()
    assert node.call("DEL", "c1", pod, prevResult=result, **MASQ) is None
    assert pod.links() == ["lo"] and traces(node) == []


def test_two_interfaces_one_scratch_file(node: Node) -> None:
    pod = node.namespace()
    node.call("ADD", "c1", pod, **MASQ)
    node.call("ADD", "c1", pod, ifname="net1", delegate={"bridge": "cni1", "isGateway": False})
    assert node.call("DEL", "c1", pod, ifname="net1") is None
    assert pod.links() == ["eth0", "lo"] and pings(pod, "10.1.17.1")
    assert list(node.reservations().values()) == ["c1\r\neth0"]
    assert node.call("DEL", "c1", pod) is None
    assert pod.links() == ["lo"] and traces(node) == []


def failing_ipam(node: Node) -> Path:
    """An IPAM plugin that cannot release until a file appears."""
    directory = node.root / "bin"
    result = '{"cniVersion":"1.0.0","ips":[{"address":"10.1.17.2/24","gateway":"10.1.17.1"}]}'
    (directory / "stub").write_text(
        f"#!/bin/sh\ncat > /dev/null\n[ $CNI_COMMAND = ADD ] && echo '{result}' && exit 0\n"
        f"echo $CNI_COMMAND >> {directory}/calls\n"
        f'[ -e {directory}/works ] || {{ echo \'{{"code":100,"msg":"busy"}}\'; exit 1; }}\n'
    )
    (directory / "stub").chmod(0o755)
    return directory


def test_del_failed_once_and_the_scratch_file_is_gone(node: Node) -> None:
    directory = failing_ipam(node)
    pod = node.namespace()
    keys: Document = {**MASQ, "ipam": {"type": "stub"}}
    node.call("ADD", "c1", pod, **keys)
    assert node.call("DEL", "c1", pod, **keys) == {"code": 100, "msg": "busy"}
    assert node.scratch() and pod.links() == ["lo"]
    (directory / "works").touch()
    assert node.call("DEL", "c1", None, **keys) is None
    assert (directory / "calls").read_text().split() == ["DEL", "DEL"] and traces(node) == []


def test_del_three_times_twice_with_an_empty_netns(node: Node) -> None:
    """As containerd does it."""
    pod = node.namespace()
    node.call("ADD", "c1", pod, **MASQ)
    for netns in (pod, None, None):
        assert node.call("DEL", "c1", netns, **MASQ) is None
        assert traces(node) == []


@pytest.mark.parametrize(
    "text", [None, "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET\n", "FLANNEL_NETWORK=10.1"]
)
def test_subnet_env_is_missing_or_half_written(node: Node, text: str | None) -> None:
    env = node.root / "subnet.env"
    env.unlink() if text is None else env.write_text(text)
    pod = node.namespace()
    assert node.call("ADD", "c1", pod)["code"] == 11
    assert node.call("STATUS", "c1", None, version="1.1.0")["code"] == 50
    assert "cni0" not in node.netns.links() and node.clean()


def test_check_says_nothing(node: Node) -> None:
    (node.root / "subnet.env").write_text(DUAL_STACK)
    pod = node.namespace()
    result = node.call("ADD", "c1", pod, **MASQ)
    assert node.call("CHECK", "c1", pod, prevResult=result, **MASQ) is None
    for netns, damage, repair in (
        (pod, "ip route delete 10.1.0.0/16", "ip route add 10.1.0.0/16 via 10.1.17.1"),
        (node.netns, "ip address delete 10.1.17.1/24 dev cni0", "ip address add 10.1.17.1/24 dev cni0"),
        (node.netns, "nft flush ruleset", ""),
    ):
        netns.run(damage)
        error = node.call("CHECK", "c1", pod, prevResult=result, **MASQ)
        assert error is not None and error["code"] == 999, damage
        if repair:
            netns.run(repair)
            assert node.call("CHECK", "c1", pod, prevResult=result, **MASQ) is None


def test_a_reused_pid_with_flannel_in_front(node: Node) -> None:
    pod = node.namespace()
    result = node.call("ADD", "c1", pod, **MASQ)
    pod.run("ip link delete eth0")
    pod.run("ip link add eth0 type veth peer name other")
    assert node.call("DEL", "c1", pod, prevResult=result, **MASQ) is None
    assert pod.links() == ["eth0", "lo", "other"] and traces(node) == []


def test_gc_frees_what_no_runtime_knows(node: Node) -> None:
    (node.root / "subnet.env").write_text(DUAL_STACK)
    pods: list[Namespace] = [node.namespace() for _ in range(3)]
    for number, pod in enumerate(pods):
        node.call("ADD", f"c{number}", pod, version="1.1.0", **MASQ)
    for pod in pods[1:]:
        node.forget(pod)
    wait_for(lambda: len(node.veths()) == 1)
    for path in node.data.glob("c2*"):
        path.unlink()  # of this one only the addresses and the rules are left
    valid: Document = {"cni.dev/valid-attachments": [{"containerID": "c0", "ifname": "eth0"}]}
    assert node.call("GC", "c9", None, version="1.1.0", **MASQ, **valid) is None
    assert set(node.reservations().values()) == {"c0\r\neth0"} and list(node.scratch()) == ["c0", "c0@eth0"]
    rules = node.netns.run("nft -j list ruleset")
    assert [f'"10.1.17.{last}"' in rules for last in (2, 3, 4)] == [True, False, False]
    assert pings(pods[0], "10.1.17.1")


def test_results_of_flannel_with_builtin_delegates(node: Node) -> None:
    """No executable is in CNI_PATH, and the scratch file is upstream's."""
    pod = node.namespace()
    result = node.call("ADD", "c1", pod)
    assert result["ips"] == [{"interface": 2, "address": "10.1.17.2/24", "gateway": "10.1.17.1"}]
    assert list(node.scratch()) == ["c1", "c1@eth0"]
    saved = json.loads(node.scratch()["c1"])
    assert (saved["type"], saved["mtu"], saved["isGateway"]) == ("bridge", 1450, True)
    assert pings(pod, "10.1.17.1")
