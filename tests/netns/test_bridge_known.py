"""The daemon's bridge plugin takes a bridge for what the last pod's ADD saw, until the kernel says otherwise.

Whatever somebody does to the bridge between two ADDs, the second does what it would have done as the first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import pytest

from cni.errors import CniError
from cni.local import LocalHost
from cni.plugins.bridge import Bridge
from cni.plugins.bridgeport import KnownBridge
from cni.spec.request import Request
from tests.fuzz import shim_rig
from tests.netns import firewall_fixtures
from tests.netns.bridge_fixtures import GATEWAYS, Document, Rig, Subject, new_rig, text_of
from tests.netns.cni_fixtures import Namespace, attachment, pings, wait_for
from tests.netns.cniserver_fixtures import Server

T = TypeVar("T")


class Warm(Subject):
    """Ours by way of the shim, which finds no cold plugin."""

    def __init__(self, shim: Path, path: Path) -> None:
        super().__init__("ours", ("1.0.0",))
        self._shim = shim
        self._path = path

    def command(self, root: Path) -> list[str]:
        return [str(self._shim)]

    def environment(self) -> dict[str, str]:
        return {"FLANNEL_CNI_SOCKET": str(self._path)}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = shim_rig.build(tmp_path_factory.mktemp("shim"), "-O1")
    return built.rename(built.with_name("bridge"))


@pytest.fixture(params=["v4", "dual"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rig(tmp_path: Path, shim: Path, family: str) -> Iterator[Rig]:
    """A node whose daemon knows the bridge: container c1 is attached."""
    socket = tmp_path / "run" / "cni.sock"
    socket.parent.mkdir()
    with new_rig(tmp_path, Warm(shim, socket)) as made, Server(made.host, socket, str(socket), "bridge"):
        made.add(made.conf(family))
        yield made


def second(rig: Rig, family: str) -> Document:
    """The result of the ADD of container c2, which works."""
    pod = rig.node.namespace("second")
    result = rig.add(rig.conf(family), "c2", netns=pod)
    assert gateways(rig) == sorted(GATEWAYS[family])
    for gateway in GATEWAYS[family]:
        await_ping(pod, gateway.partition("/")[0])
    port = result["interfaces"][1]["name"]
    assert rig.link("cni0")["address"] == result["interfaces"][0]["mac"]
    assert rig.link(port)["master"] == "cni0"
    await_setting(rig, f"ipv6/conf/{port}/accept_ra", "0")
    return result


def await_ping(pod: Namespace, address: str) -> None:
    wait_for(lambda: pings(pod, address))


def await_setting(rig: Rig, name: str, value: str) -> None:
    """What comes after the answer."""
    wait_for(lambda: rig.sysctl(name) == value)


def gateways(rig: Rig) -> list[str]:
    (link,) = rig.host.ip("address show dev cni0")
    shown = [one for one in link["addr_info"] if one["scope"] == "global"]
    return sorted(f"{one['local']}/{one['prefixlen']}" for one in shown)


def test_nothing_has_changed(rig: Rig, family: str) -> None:
    before = rig.link("cni0")
    second(rig, family)
    after = rig.link("cni0")
    assert {key: before[key] for key in ("ifindex", "address")} == {
        key: after[key] for key in ("ifindex", "address")
    }


CHANGES = {
    "bridge deleted": ["ip link delete cni0"],
    "bridge down": ["ip link set cni0 down"],
    "another MAC": ["ip link set cni0 address 02:00:00:00:00:77"],
    "IPv4 address deleted": ["ip address delete 10.1.17.1/24 dev cni0"],
    "all addresses deleted": ["ip address flush dev cni0 scope global"],
    "another address besides": ["ip address add 198.51.100.1/24 dev cni0"],
    "another bridge of that name": [
        *("ip link set cni0 down", "ip link set cni0 name old0", "ip address flush dev old0"),
        *("ip link add cni0 type bridge", "ip link set cni0 up"),
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_put_right(rig: Rig, family: str, change: str) -> None:
    for command in CHANGES[change]:
        rig.host.run(command)
    if change == "another address besides":
        rig.add(rig.conf(family), "c2", netns=rig.node.namespace("second"))
        assert gateways(rig) == sorted([*GATEWAYS[family], "198.51.100.1/24"])
    else:
        second(rig, family)


def test_a_gateway_that_another_took_the_place_of(rig: Rig, family: str) -> None:
    """Beside the port of another pod it is not replaced; the address that was tried is not there either."""
    rig.host.run("ip address delete 10.1.17.1/24 dev cni0")
    rig.host.run("ip address add 10.9.9.1/24 dev cni0")
    before = rig.traces()
    error = rig.refused("ADD", rig.conf(family), "c2", netns=rig.node.namespace("second"))
    assert '"cni0" already has an IP address different from 10.1.17.1/24' in error["msg"]
    assert "10.1.17.1/24" not in gateways(rig)
    assert "10.9.9.1/24" in gateways(rig)
    assert rig.traces() == before


def test_another_kind_of_link_has_the_name(rig: Rig, family: str) -> None:
    rig.host.run("ip link delete cni0")
    rig.host.run("ip link add cni0 type veth peer name other0")
    before = rig.traces()
    error = rig.refused("ADD", rig.conf(family), "c2", netns=rig.node.namespace("second"))
    assert text_of(error) == 'failed to create bridge "cni0": "cni0" already exists but is not a bridge'
    assert rig.traces() == before


def test_forwarding_that_was_switched_off_comes_back(rig: Rig, family: str) -> None:
    settings = ["ipv4/ip_forward"] + ["ipv6/conf/all/forwarding"] * (family == "dual")
    for setting in settings:
        rig.host.run(f"sysctl -qw net.{setting.replace('/', '.')}=0")
    second(rig, family)
    for setting in settings:
        await_setting(rig, setting, "1")


def test_another_network_on_the_same_bridge(rig: Rig, family: str) -> None:
    """What was seen for one network is not taken for what another needs."""
    conf = rig.conf(family, name="other", forceAddress=True)
    conf["ipam"]["ranges"] = [[{"subnet": "10.1.18.0/24"}]]
    rig.add(conf, "c2", netns=rig.node.namespace("second"))
    assert "10.1.18.1/24" in gateways(rig)
    rig.add(rig.conf(family, forceAddress=True), "c3", netns=rig.node.namespace("third"))
    assert set(GATEWAYS[family]) <= set(gateways(rig))


def test_the_name_in_the_container_is_taken(rig: Rig, family: str) -> None:
    pod = rig.node.namespace("second")
    pod.run("ip link add eth0 type bridge")
    before = rig.traces()
    text = text_of(rig.refused("ADD", rig.conf(family), "c2", netns=pod))
    assert text.startswith('container veth name ("eth0") peer provided ("veth')
    assert rig.traces() == before
    assert gateways(rig) == sorted(GATEWAYS[family])


@pytest.mark.parametrize("setting", ["arp_notify", "accept_dad"])
def test_settings_of_the_container_are_there_with_the_answer(rig: Rig, family: str, setting: str) -> None:
    """A plugin that comes next in the chain may set them as it likes."""
    pod = rig.node.namespace("second")
    rig.add(rig.conf(family), "c2", netns=pod)
    name, value = ("ipv4", "1") if setting == "arp_notify" else ("ipv6", "0")
    assert rig.sysctl(f"{name}/conf/eth0/{setting}", pod) == value
    pod.run(f"sysctl -qw net.{name}.conf.eth0.{setting}=7")
    rig.check(rig.conf(family), {}, "c2", netns=pod)  # has its turn when what comes after the answer is done
    assert rig.sysctl(f"{name}/conf/eth0/{setting}", pod) == "7"


def test_another_network_is_not_forwarded_for_ipv4_alone(rig: Rig, family: str) -> None:
    """What was switched on for one pod is nothing that the next one needs."""
    rig.host.run("sysctl -qw net.ipv6.conf.all.forwarding=0")
    pod = rig.node.namespace("second")
    conf = rig.conf("v4")
    rig.add(conf, "c2", netns=pod)
    rig.delete(conf, "c2", netns=pod)
    assert rig.sysctl("ipv6/conf/all/forwarding") == "0"


def test_a_vlan_has_a_gateway_of_its_own(rig: Rig, family: str) -> None:
    """Without the bridge, and without VLANs in the kernel, the error is about the bridge."""
    rig.host.run("ip link delete cni0")
    error = rig.refused("ADD", rig.conf(family, vlan=100), "c2", netns=rig.node.namespace("second"))
    assert text_of(error).startswith('failed to create bridge "cni0": could not add "cni0": ')


class Late(LocalHost):
    """The plugin's host in this process, which keeps what comes after the answer for `finish`."""

    def __init__(self, bridges: dict[str, KnownBridge]) -> None:
        super().__init__(print, {})
        self.bridges = bridges
        self._later: list[Callable[[], object]] = []

    def afterwards(self, step: Callable[[], object]) -> None:
        self._later.append(step)

    def finish(self) -> None:
        for step in self._later:
            step()

    def close(self) -> None:
        for opened in (self._route, self._netns and self._netns[1].route):
            if opened:
                opened.close()
        if self._netns:
            for number in (self._netns[1].descriptor, self._netns[1].settings):
                if number is not None:
                    os.close(number)


@pytest.fixture
def attached(rig: Rig, family: str) -> Iterator[tuple[Late, Namespace, Document]]:
    """A second pod of a bridge that is known, whose ADD has answered and no more: host, namespace, result."""
    known: dict[str, KnownBridge] = {}
    pod = rig.node.namespace("second")
    pod.run("sysctl -qw net.ipv6.conf.lo.disable_ipv6=1")
    stdin = json.dumps(rig.conf(family)).encode()

    def call(container: str, netns: Namespace) -> tuple[Late, Document]:
        host = Late(known)
        environment = {"CNI_COMMAND": "ADD", "CNI_PATH": "/none", **attachment(container, netns)}
        return host, Bridge(host).add(Request(environment, stdin))

    def both() -> tuple[Late, Document]:
        with closing(call("c8", rig.node.namespace("first"))[0]) as first:
            first.finish()
        assert known
        return call("c9", pod)

    host, result = inside(rig, both)
    with closing(host):
        yield host, pod, result


def inside(rig: Rig, step: Callable[[], T]) -> T:
    return firewall_fixtures.Namespace(rig.host.name).call(step)


def test_the_settings_of_ipv6_are_there_with_the_answer(
    rig: Rig, family: str, attached: tuple[Late, Namespace, Document]
) -> None:
    _host, pod, _result = attached
    names = ("eth0/accept_dad", "eth0/ndisc_notify", "eth0/keep_addr_on_down", "lo/disable_ipv6")
    found = [rig.sysctl(f"ipv6/conf/{name}", pod) for name in names]
    assert found == (["0", "0", "0", "1"] if family == "v4" else ["0", "1", "1", "0"])


def test_a_mac_that_another_plugin_gave_stays(rig: Rig, attached: tuple[Late, Namespace, Document]) -> None:
    """As `tuning` does, which may come before what comes after the answer."""
    host, pod, result = attached
    assert rig.link("eth0", pod)["address"] == result["interfaces"][2]["mac"]
    pod.run("ip link set eth0 address 02:00:00:00:be:ef")
    inside(rig, host.finish)
    assert rig.link("eth0", pod)["address"] == "02:00:00:00:be:ef"


def test_a_gateway_that_another_add_only_tried(
    rig: Rig, family: str, attached: tuple[Late, Namespace, Document]
) -> None:
    """It was there when the kernel confirmed it, and is put back."""
    host, _pod, _result = attached
    for gateway in GATEWAYS[family]:
        rig.host.run(f"ip address delete {gateway} dev cni0")
    inside(rig, host.finish)
    assert gateways(rig) == sorted(GATEWAYS[family])
    assert "cni0" in host.bridges


def test_a_gateway_that_is_lost_is_not_known_any_more(
    rig: Rig, attached: tuple[Late, Namespace, Document]
) -> None:
    host, _pod, _result = attached
    rig.host.run("ip address delete 10.1.17.1/24 dev cni0")
    rig.host.run("ip address add 10.9.9.1/24 dev cni0")
    with pytest.raises(CniError, match="already has an IP address different from"):
        inside(rig, host.finish)
    assert "cni0" not in host.bridges


def test_a_pod_that_is_gone_by_then(rig: Rig, attached: tuple[Late, Namespace, Document]) -> None:
    host, pod, _result = attached
    pod.run("ip link delete eth0")
    inside(rig, host.finish)
