"""The loopback plugin in real namespaces, beside Go's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.cni_fixtures import GO_PLUGINS, Namespace, Node, attachment, new_node, plugin_command

PREVIOUS = {
    "interfaces": [{"name": "eth0", "sandbox": "/run/netns/x"}],
    "ips": [{"version": "4", "interface": 0, "address": "10.1.17.5/24", "gateway": "10.1.17.1"}],
}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with new_node(tmp_path) as made:
        yield made


@pytest.fixture
def pod(node: Node) -> Namespace:
    """A namespace whose loopback is down, as a runtime makes it."""
    pod = node.namespace()
    pod.run("ip link set lo down")
    return pod


def conf(version: str = "1.0.0", **extra: object) -> str:
    return json.dumps({"cniVersion": version, "name": "cni-loopback", "type": "loopback", **extra})


def call(node: Node, command: str, path: str, stdin: str) -> Any:
    environment = {**attachment("c1", None, "lo"), "CNI_NETNS": path, "FLANNEL_CNI_PLUGIN": "loopback"}
    return node.execute(plugin_command(), command, environment, stdin)[1]


def is_up(pod: Namespace) -> bool:
    [link] = pod.ip("link show dev lo")
    return "UP" in link["flags"]


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0"])
def test_add_passes_on_a_previous_result_as_go_does(node: Node, pod: Namespace, version: str) -> None:
    previous = PREVIOUS if version >= "0.3.0" else {"ip4": {"ip": "10.1.17.5/24"}}
    stdin = conf(version, prevResult={"cniVersion": version, **previous})
    environment = {**attachment("c1", pod, "lo"), "CNI_COMMAND": "ADD", "CNI_PATH": GO_PLUGINS}
    ours = node.output(plugin_command(), {**environment, "FLANNEL_CNI_PLUGIN": "loopback"}, stdin)
    assert is_up(pod)
    pod.run("ip link set lo down")
    assert ours == node.output([f"{GO_PLUGINS}/loopback"], environment, stdin)


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_add_brings_the_link_up(node: Node, pod: Namespace, version: str) -> None:
    """Go's prints its newest form under every version; ours is that of the version."""
    addresses = [{"interface": 0, "address": "127.0.0.1/8"}, {"interface": 0, "address": "::1/128"}]
    expected: dict[str, object] = {
        "cniVersion": version,
        "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": pod.path}],
        "ips": addresses,
    }
    if version < "1.0.0":
        expected["dns"] = {}
        expected["ips"] = [{"version": "4", **addresses[0]}, {"version": "6", **addresses[1]}]
    assert call(node, "ADD", pod.path, conf(version)) == expected
    assert pod.succeeds("ping -c 1 -W 1 127.0.0.1")
    assert pod.succeeds("ping -c 1 -W 1 ::1")


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_add_of_the_first_versions_has_one_address_of_each_family(
    node: Node, pod: Namespace, version: str
) -> None:
    assert call(node, "ADD", pod.path, conf(version)) == {
        "cniVersion": version,
        "ip4": {"ip": "127.0.0.1/8"},
        "ip6": {"ip": "::1/128"},
        "dns": {},
    }


def test_add_without_ipv6_lists_none(node: Node, pod: Namespace) -> None:
    pod.run("sysctl -q -w net.ipv6.conf.lo.disable_ipv6=1")
    assert call(node, "ADD", pod.path, conf())["ips"] == [{"interface": 0, "address": "127.0.0.1/8"}]


def test_add_refuses_an_address_that_is_no_loopback(node: Node, pod: Namespace) -> None:
    pod.run("ip address add 192.0.2.9/32 dev lo")
    found = call(node, "ADD", pod.path, conf())
    assert found == {
        "code": 999,
        "msg": 'loopback interface found with non-loopback address "192.0.2.9"',
    }


def test_add_needs_a_namespace(node: Node, pod: Namespace) -> None:
    assert call(node, "ADD", f"{pod.path}-gone", conf())["code"] == 999


def test_a_previous_result_of_another_kind_is_refused(node: Node, pod: Namespace) -> None:
    found = call(node, "ADD", pod.path, conf("0.4.0", prevResult={"cniVersion": "1.0.0", **PREVIOUS}))
    assert found["msg"].startswith("failed to parse prevResult: could not parse prevResult: result type")
    assert not is_up(pod)


def test_check_sees_the_link(node: Node, pod: Namespace) -> None:
    down = {"code": 999, "msg": "loopback interface is down"}
    assert call(node, "CHECK", pod.path, conf()) == down
    call(node, "ADD", pod.path, conf())
    assert call(node, "CHECK", pod.path, conf()) is None


def test_del_brings_the_link_down_and_succeeds_without_a_namespace(
    node: Node, pod: Namespace, tmp_path: Path
) -> None:
    call(node, "ADD", pod.path, conf())
    for _ in range(2):
        assert call(node, "DEL", pod.path, conf()) is None
        assert not is_up(pod)
    assert call(node, "DEL", "", conf()) is None
    assert call(node, "DEL", f"{pod.path}-gone", conf()) is None
    (tmp_path / "left").touch()
    assert call(node, "DEL", f"{tmp_path}/left", conf()) is None


def test_status_and_gc_succeed(node: Node) -> None:
    for command in ("STATUS", "GC"):
        assert call(node, command, "", conf("1.1.0")) is None
