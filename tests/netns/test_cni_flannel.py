"""flannel in front of the real bridge, host-local and portmap, in the kernel.

    node namespace                    pod namespaces
cni0 10.1.17.1/24 ---- vethXXXXXXXX ---- eth0 10.1.17.2/24
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cni.spec.version import SUPPORTED
from tests.netns.cni_fixtures import (
    DUAL_STACK,
    FROZEN_PLUGIN,
    GO_PLUGINS,
    Namespace,
    Node,
    attachment,
    http_server,
    new_node,
    pings,
    plugin_command,
)

WITH_CHECK = ("0.4.0", "1.0.0", "1.1.0")


@pytest.fixture(params=["source builtin", "frozen exec", "frozen builtin"])
def node(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """Run each test with the plugin as written and as shipped, and with either delegate."""
    how, mode = request.param.split()
    with _node(how, mode, tmp_path, monkeypatch) as node:
        yield node


@pytest.fixture(params=["source", "frozen"])
def exec_node(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Node]:
    """A node whose delegates are executed: for what only a delegate of somebody else does."""
    with _node(request.param, "exec", tmp_path, monkeypatch) as node:
        yield node


@contextmanager
def _node(how: str, mode: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    if how == "frozen":
        assert FROZEN_PLUGIN.exists(), "run `make build` first"
        monkeypatch.setenv("PFL_CNI_PLUGIN", str(FROZEN_PLUGIN))
    with new_node(root) as node:
        node.mode = mode
        yield node


def failing_bridge(node: Node, script: str) -> None:
    """Put a script in front of the real bridge; it may exec the real one."""
    directory = node.root / "bin"
    directory.mkdir(exist_ok=True)
    path = directory / "bridge"
    path.write_text(f"#!/bin/sh\n{script}\nexec {GO_PLUGINS}/bridge\n")
    path.chmod(0o755)
    node.path = f"{directory}:{GO_PLUGINS}"


def addresses(result: dict[str, Any]) -> list[str]:
    """The addresses of a result of any version."""
    if "ips" in result:
        return [one["address"] for one in result["ips"]]
    return [result[name]["ip"] for name in ("ip4", "ip6") if name in result]


@pytest.mark.parametrize("version", SUPPORTED)
def test_add_check_and_del_in_every_version(node: Node, version: str) -> None:
    (node.root / "subnet.env").write_text(DUAL_STACK)
    pod = node.namespace()
    result = node.call("ADD", "c1", pod, version=version)
    assert result["cniVersion"] == version
    assert sorted(addresses(result)) == ["10.1.17.2/24", "fd00:1:0:17::2/64"]
    assert sorted(pod.addresses("eth0")) == sorted(addresses(result))
    assert pod.ip("link show eth0")[0]["mtu"] == 1450
    assert pings(pod, "10.1.17.1")
    check_shape(result, version, pod)
    assert set(node.reservations().values()) == {"c1\r\neth0"}
    assert list(node.scratch()) == ["c1", "c1@eth0"]

    if version in WITH_CHECK:
        assert node.call("CHECK", "c1", pod, version=version, prevResult=result) is None
        pod.run("ip address flush dev eth0")
        error = node.call("CHECK", "c1", pod, version=version, prevResult=result)
        assert error == {"code": 999, "msg": "Failed to match addr 10.1.17.2/24 on interface eth0"}

    for _ in range(2):
        assert node.call("DEL", "c1", pod, version=version) is None
        assert pod.links() == ["lo"] and node.clean()


def check_shape(result: dict[str, Any], version: str, pod: Namespace) -> None:
    """Keys, their order, and what bridge says about interfaces."""
    if version in ("0.1.0", "0.2.0"):
        assert list(result) == ["cniVersion", "ip4", "ip6", "dns"]
        assert {"dst": "10.1.0.0/16"} in result["ip4"]["routes"]
        return
    keys = ["cniVersion", "interfaces", "ips", "routes"]
    assert list(result) == ([*keys, "dns"] if version.startswith("0.") else keys)
    names = [one["name"] for one in result["interfaces"]]
    assert (names[0], names[1][:4], names[2]) == ("cni0", "veth", "eth0")
    assert result["interfaces"][2]["sandbox"] == pod.path
    assert result["interfaces"][2]["mac"] == pod.ip("link show eth0")[0]["address"]
    first = result["ips"][0]
    expected = {"interface": 2, "address": "10.1.17.2/24", "gateway": "10.1.17.1"}
    assert first == ({**expected, "version": "4"} if version.startswith("0.") else expected)
    assert {"dst": "fd00:1::/48"} in result["routes"]


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0"])
def test_results_are_printed_to_the_byte_as_bridge_prints_them(exec_node: Node, version: str) -> None:
    node = exec_node
    """From 1.0.0 on the order of the keys depends on the release of the Go plugins, and is not compared."""
    pod = node.namespace()
    failing_bridge(
        node, f"""[ $CNI_COMMAND = ADD ] && {GO_PLUGINS}/bridge | tee {node.root}/answer && exit 0"""
    )
    environment = {"CNI_COMMAND": "ADD", "CNI_PATH": node.path, **attachment("c1", pod)}
    stdin = json.dumps(node.conf(version))
    assert node.output(plugin_command(), environment, stdin) == (node.root / "answer").read_text()


def test_the_pod_reaches_its_gateway_and_other_pods(node: Node) -> None:
    first, second = node.namespace(), node.namespace()
    node.call("ADD", "c1", first)
    node.call("ADD", "c2", second)
    assert pings(first, "10.1.17.1") and pings(first, "10.1.17.3") and pings(second, "10.1.17.2")
    assert first.ip("route show default")[0]["gateway"] == "10.1.17.1"


def test_two_interfaces_of_one_container(node: Node) -> None:
    pod = node.namespace()
    node.call("ADD", "c1", pod, ifname="eth0")
    node.call("ADD", "c1", pod, ifname="net1", delegate={"bridge": "cni1", "isGateway": False})
    assert sorted(node.reservations().values()) == ["c1\r\neth0", "c1\r\nnet1"]
    eth0 = node.scratch()["c1@eth0"]
    assert node.call("DEL", "c1", pod, ifname="net1") is None
    assert pod.links() == ["eth0", "lo"]
    assert list(node.reservations().values()) == ["c1\r\neth0"]
    assert node.scratch() == {"c1": eth0, "c1@eth0": eth0}
    assert pings(pod, "10.1.17.1")
    assert node.call("DEL", "c1", pod, ifname="eth0") is None
    assert pod.links() == ["lo"] and node.clean()


def test_a_failed_del_keeps_the_scratch_file_and_the_retry_cleans_up(exec_node: Node) -> None:
    node = exec_node
    pod = node.namespace()
    node.call("ADD", "c1", pod)
    broken = node.root / "broken"
    broken.touch()
    failing_bridge(node, f"""[ -e {broken} ] && echo '{{"code":11,"msg":"busy"}}' && exit 1""")
    assert node.call("DEL", "c1", pod) == {"code": 11, "msg": "busy"}
    assert list(node.scratch()) == ["c1", "c1@eth0"] and node.reservations()
    broken.unlink()
    assert node.call("DEL", "c1", pod) is None
    assert pod.links() == ["lo"] and node.clean()


def test_a_failed_add_leaves_nothing_behind(exec_node: Node) -> None:
    node = exec_node
    pod = node.namespace()
    fail = f"""{GO_PLUGINS}/bridge > {node.root}/answer && echo '{{"code":100,"msg":"late"}}' && exit 1"""
    failing_bridge(node, f"if [ $CNI_COMMAND = ADD ]; then {fail}; fi")
    assert node.call("ADD", "c1", pod) == {"code": 100, "msg": "late"}
    assert "10.1.17.2" in (node.root / "answer").read_text()
    assert pod.links() == ["lo"] and node.clean()


def test_a_second_add_fails_and_the_first_goes_on(node: Node) -> None:
    pod = node.namespace()
    node.call("ADD", "c1", pod)
    before = node.scratch()
    assert "code" in node.call("ADD", "c1", pod)
    assert pings(pod, "10.1.17.1")
    assert node.scratch() == before
    assert node.call("DEL", "c1", pod) is None
    assert pod.links() == ["lo"] and node.clean()


def without_empty_dns(result: dict[str, Any]) -> dict[str, Any]:
    """Old Go plugins print it in every version, new ones up to 0.4.0."""
    return {name: value for name, value in result.items() if (name, value) != ("dns", {})}


# What upstream flannel writes for `conf` in a 1.0.0 netconf, but for the directory of the addresses.
UPSTREAM = (
    '{"cniVersion":"1.0.0","hairpinMode":true,"ipMasq":false,"ipam":{"dataDir":"DIR",'
    '"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},'
    '"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}'
)


def test_we_take_down_what_upstream_set_up(node: Node) -> None:
    pod = node.namespace()
    config = UPSTREAM.replace("DIR", f"{node.root}/networks")
    node.data.mkdir()
    (node.data / "c1").write_text(config)
    code, _ = node.execute([f"{GO_PLUGINS}/bridge"], "ADD", attachment("c1", pod), config)
    assert code == 0 and pings(pod, "10.1.17.1")
    assert node.call("DEL", "c1", pod) is None
    assert pod.links() == ["lo"] and node.clean()


def test_upstream_takes_down_what_we_set_up(node: Node) -> None:
    pod = node.namespace()
    node.call("ADD", "c1", pod)
    config = (node.data / "c1").read_text()
    assert config == UPSTREAM.replace("DIR", f"{node.root}/networks")
    code, _ = node.execute([f"{GO_PLUGINS}/bridge"], "DEL", attachment("c1", pod), config)
    assert (code, pod.links(), node.veths(), node.reservations()) == (0, ["lo"], [], {})


def test_del_without_namespace_releases_the_address(node: Node) -> None:
    pod, gone = node.namespace(), node.namespace()
    node.call("ADD", "c1", pod)
    node.call("ADD", "c2", gone)
    assert node.call("DEL", "c1", None) is None
    node.forget(gone)
    assert node.call("DEL", "c2", gone) is None
    assert (node.reservations(), node.scratch()) == ({}, {})


@pytest.mark.parametrize("damage", ["lost", "empty", "half"])
@pytest.mark.parametrize("with_env", [True, False])
def test_a_damaged_scratch_file_leaks_nothing(node: Node, damage: str, with_env: bool) -> None:
    pod = node.namespace()
    node.call("ADD", "c1", pod)
    for path in node.data.iterdir():
        if damage == "lost":
            path.unlink()
        else:
            path.write_text("" if damage == "empty" else path.read_text()[:50])
    if not with_env:
        (node.root / "subnet.env").unlink()
    assert node.call("DEL", "c1", pod) is None
    assert pod.links() == ["lo"] and node.clean()


def test_the_nodes_own_namespace_is_refused_and_nothing_changes(node: Node) -> None:
    before = node.netns.links()
    assert node.call("ADD", "c1", node.netns)["code"] == 8
    assert node.call("DEL", "c1", node.netns) is None
    assert node.netns.links() == before and node.clean()


def test_parallel_adds_get_distinct_addresses(node: Node) -> None:
    pods = [node.namespace() for _ in range(10)]
    with ThreadPoolExecutor(len(pods)) as pool:
        results = list(pool.map(lambda one: node.call("ADD", f"c{one[0]}", one[1]), enumerate(pods)))
        given = [one for result in results for one in addresses(result)]
        assert len(set(given)) == len(pods)
        assert sorted(given) == sorted(one for pod in pods for one in pod.addresses("eth0"))
        assert len(node.reservations()) == len(pods)
        done = list(pool.map(lambda one: node.call("DEL", f"c{one[0]}", one[1]), enumerate(pods)))
    assert done == [None] * len(pods) and node.clean()


def test_gc_releases_what_is_not_valid(node: Node) -> None:
    live, stale = node.namespace(), node.namespace()
    node.call("ADD", "c1", live, version="1.1.0")
    node.call("ADD", "c2", stale, version="1.1.0")
    node.call("ADD", "c1", live, ifname="net1", version="1.1.0", delegate={"bridge": "cni1"})
    node.forget(stale)
    upstream = UPSTREAM.replace("DIR", f"{node.root}/networks")
    (node.data / "c3").write_text(upstream)
    gone = node.namespace()
    node.execute([f"{GO_PLUGINS}/bridge"], "ADD", attachment("c3", gone), upstream)
    node.forget(gone)
    assert len(node.reservations()) == 4
    valid: dict[str, Any] = {"cni.dev/valid-attachments": [{"containerID": "c1", "ifname": "eth0"}]}
    assert node.call("GC", "c9", None, version="1.1.0", **valid) is None
    assert node.reservations() == {"10.1.17.2": "c1\r\neth0"}
    assert list(node.scratch()) == ["c1", "c1@eth0"]
    assert pings(live, "10.1.17.1")


def test_status_asks_for_subnet_env_and_the_delegate(node: Node) -> None:
    assert node.call("STATUS", "c1", None, version="1.1.0") is None
    node.path = "/nonexistent"
    missing = node.call("STATUS", "c1", None, version="1.1.0", delegateMode="exec")
    assert missing["code"] == 50 and "CNI_PATH" in missing["msg"]
    assert node.call("STATUS", "c1", None, version="1.1.0", delegateMode="builtin") is None
    (node.root / "subnet.env").unlink()
    assert node.call("STATUS", "c1", None, version="1.1.0")["code"] == 50
    assert node.call("ADD", "c1", node.namespace(), version="1.1.0")["code"] == 11


@pytest.mark.parametrize("version", ["0.3.1", "1.0.0"])
def test_portmap_after_flannel_makes_a_host_port_reachable(node: Node, version: str) -> None:
    """outside 192.0.2.2 ---- 192.0.2.1 node, port 8080 ---- pod 10.1.17.2, port 80"""
    outside, pod = node.namespace("outside"), node.namespace()
    node.netns.run(f"ip link add out0 type veth peer name eth0 netns {outside.name}")
    for netns, link, address in ((node.netns, "out0", "192.0.2.1/24"), (outside, "eth0", "192.0.2.2/24")):
        netns.run(f"ip address add {address} dev {link}")
        netns.run(f"ip link set {link} up")
    ports = {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}
    chained: dict[str, Any] = {"capabilities": {"portMappings": True}, "runtimeConfig": ports}

    result = node.call("ADD", "c1", pod, version=version, **chained)
    portmap = {"cniVersion": version, "name": "cbr0", "type": "portmap", **chained, "prevResult": result}
    environment = attachment("c1", pod)
    argv = [f"{GO_PLUGINS}/portmap"]
    code, final = node.execute(argv, "ADD", environment, json.dumps(portmap))
    assert code == 0 and without_empty_dns(final) == without_empty_dns(result)
    (node.root / "web").mkdir()
    (node.root / "web" / "index.html").write_text("hello from the pod")
    fetch = "curl --silent --max-time 5 http://192.0.2.1:8080/"
    with http_server(pod, 80, node.root / "web"):
        assert outside.run(fetch) == "hello from the pod"
    if version == "1.0.0":
        assert node.call("CHECK", "c1", pod, version=version, prevResult=final, **chained) is None
    assert node.execute(argv, "DEL", environment, json.dumps(portmap)) == (0, None)
    assert node.call("DEL", "c1", pod, version=version, prevResult=final, **chained) is None
    assert not outside.succeeds(fetch)
    assert pod.links() == ["lo"] and node.clean()


def test_a_failed_add_does_not_take_away_an_interface_that_was_there(node: Node) -> None:
    pod = node.namespace()
    pod.run("ip link add eth0 type veth peer name other")
    error = node.call("ADD", "c1", pod)
    assert "already exists" in error["msg"]
    assert "eth0" in pod.run("ip -br link show eth0")
