"""What Go's plugins set up, ours check and take down, and the other way round.

At the level of bridge (with its IPAM), and at that of flannel: there Go's side is bridge with the bytes of
the scratch file on stdin, which is all that Go's flannel does with them.
"""

from __future__ import annotations

import json
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
    Document,
    Rig,
    Subject,
    masquerades,
    new_rig,
    reset,
    traces,
)
from tests.netns.cni_fixtures import (
    DUAL_STACK,
    GO_PLUGINS,
    SUBNET_ENV,
    Node,
    attachment,
    new_node,
    pings,
    wait_for,
)

WAYS = pytest.mark.parametrize(
    ("first", "second"), [(GO, OURS), (OURS, GO)], ids=["ours takes over", "go takes over"]
)
FAMILIES = pytest.mark.parametrize("family", ["v4", "v6", "dual"])
MASQUERADE: dict[str, Document] = {
    "no masquerade": {},
    "default": {"ipMasq": True},
    "iptables": {"ipMasq": True, "ipMasqBackend": "iptables"},
    "nftables": {"ipMasq": True, "ipMasqBackend": "nftables"},
}
IPV6_ENV = "".join(
    line for line in DUAL_STACK.splitlines(True) if line not in SUBNET_ENV.splitlines(True)[:2]
)
ENVS = {"v4": SUBNET_ENV, "v6": IPV6_ENV, "dual": DUAL_STACK}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with new_rig(tmp_path, OURS) as rig:
        yield rig


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with new_node(tmp_path) as node:
        yield node


def element_stays(subject: Subject, masquerade: str) -> bool:
    """Go's DEL cannot know the set of ours that an address is an element of."""
    return subject is GO and masquerade in ("default", "nftables")


def delete_by_go(rig: Rig, conf: Document) -> None:
    """A DEL by Go of a pod that has no rules of Go's iptables backend.

    With `iptables` 1.8.9 it fails once on the chain that is not there, when link and address are gone
    already; the runtime's next DEL succeeds.
    """
    error = rig.call("DEL", conf, by=GO)
    assert error is None or "does not exist" in error["msg"]
    assert (rig.pod.links(), rig.node.veths(), rig.node.reservations()) == (["lo"], [], {})
    rig.delete(conf, by=GO)


@WAYS
@FAMILIES
@pytest.mark.parametrize("hairpin", [True, False], ids=["hairpin", "no hairpin"])
@pytest.mark.parametrize("masquerade", MASQUERADE)
def test_bridge(
    rig: Rig, first: Subject, second: Subject, family: str, hairpin: bool, masquerade: str
) -> None:
    conf = rig.conf(family, hairpinMode=hairpin, isDefaultGateway=True, mtu=1400, **MASQUERADE[masquerade])
    result = rig.add(conf, by=first)
    assert rig.check(conf, result, by=second) is None
    assert rig.check(conf, result, by=first) is None
    assert pings(rig.pod, GATEWAYS[family][0].split("/")[0])
    if not element_stays(second, masquerade):
        for _ in range(2):
            rig.delete({**conf, "prevResult": result}, by=second)
            assert rig.pod.links() == ["lo"] and rig.traces() == []
        return
    delete_by_go(rig, {**conf, "prevResult": result})
    rig.delete(conf, by=OURS)
    assert rig.traces() == []


def test_an_element_that_stayed_goes_with_our_next_gc(rig: Rig) -> None:
    conf = rig.conf("dual", "1.1.0", ipMasq=True)
    rig.add(conf)
    other = rig.node.namespace()
    rig.add(conf, "c2", netns=other)
    rig.call("DEL", {**conf, "cniVersion": "1.0.0"}, by=GO)
    assert masquerades(rig, "10.1.17.2")
    valid = [{"containerID": "c2", "ifname": "eth0"}]
    assert rig.call("GC", {**conf, "cni.dev/valid-attachments": valid}) is None
    assert not masquerades(rig, "10.1.17.2") and not masquerades(rig, "fd00:1:0:17::2")
    assert masquerades(rig, "10.1.17.3") and masquerades(rig, "fd00:1:0:17::3")


def test_an_element_that_stayed_passes_on_with_its_address(rig: Rig) -> None:
    """To the next pod that gets the address; and it goes with that one."""
    conf = rig.conf("dual", ipMasq=True)
    rig.add(conf)
    rig.call("DEL", conf, by=GO)
    assert masquerades(rig, "10.1.17.2")
    reset(rig)
    plain = rig.conf("dual")
    result = rig.add(conf, "c2")
    assert [one["address"] for one in result["ips"]] == ADDRESSES["dual"]
    rig.delete(conf, netns="")  # late, for the first container
    assert masquerades(rig, "10.1.17.2") and masquerades(rig, "fd00:1:0:17::2")
    assert rig.check(conf, result, "c2") is None
    rig.delete(conf, "c2")
    assert rig.traces() == []
    reset(rig)
    rig.add(plain, "c3")
    assert not masquerades(rig, "10.1.17.2")


@WAYS
@FAMILIES
@pytest.mark.parametrize("masquerade", ["no masquerade", "default", "iptables"])
def test_the_end_of_the_namespace_between_the_two(
    rig: Rig, first: Subject, second: Subject, family: str, masquerade: str
) -> None:
    conf = rig.conf(family, **MASQUERADE[masquerade])
    rig.add(conf, by=first)
    rig.node.forget(rig.pod)
    wait_for(lambda: rig.node.veths() == [])
    rig.delete(conf, netns="", by=second)
    assert rig.node.reservations() == {}
    if second is OURS or masquerade == "no masquerade":
        assert rig.traces() == []
        return
    # Go's DEL leaves every rule of a container whose namespace is gone; ours, if it is ever asked, none.
    rig.delete(conf, netns="", by=first)
    assert rig.traces() == []


@WAYS
def test_a_bridge_of_the_other(rig: Rig, first: Subject, second: Subject) -> None:
    """Same device, same MAC, no second address; pods of both kinds see each other."""
    conf = rig.conf("dual", isDefaultGateway=True, hairpinMode=True)
    rig.add(conf, by=first)
    before = rig.link("cni0")
    other = rig.node.namespace()
    result = rig.add(conf, "c2", netns=other, by=second)
    after = rig.link("cni0")
    assert (before["ifindex"], before["address"]) == (after["ifindex"], after["address"])
    assert result["interfaces"][0] == {"name": "cni0", "mac": after["address"]}
    assert rig.host.addresses("cni0") == GATEWAYS["dual"]
    for target in ("10.1.17.2", "fd00:1:0:17::2"):
        assert pings(other, target)
    rig.delete(conf, by=second)
    rig.delete(conf, "c2", netns=other, by=first)
    assert rig.link("cni0")["address"] == after["address"] and rig.traces() == []


@WAYS
def test_the_macspoof_check_of_the_other(rig: Rig, first: Subject, second: Subject) -> None:
    conf = rig.conf(macspoofchk=True)
    result = rig.add(conf, by=first)
    assert rig.check(conf, result, by=second) is None
    rig.delete({**conf, "prevResult": result}, by=second)
    assert rig.traces() == [] and "cni-br-iface" not in rig.firewall()


@WAYS
def test_the_address_after_the_last(rig: Rig, first: Subject, second: Subject) -> None:
    """Both walk through the range in the same order, each from where the other was."""
    conf = rig.conf("dual")
    given = []
    for number in range(6):
        by = (first, second)[number % 2]
        result = rig.add(conf, by=by)
        given.append([one["address"] for one in result["ips"]])
        rig.delete(conf, by=by)
    assert given == [[f"10.1.17.{n}/24", f"fd00:1:0:17::{n:x}/64"] for n in range(2, 8)]


@WAYS
def test_an_address_of_the_other_is_never_given_twice(rig: Rig, first: Subject, second: Subject) -> None:
    conf = rig.conf(ipam=rig.ipam([[{"subnet": "10.1.17.0/29"}]]))
    pods = [rig.node.namespace() for _ in range(6)]
    for number in range(5):
        rig.add(conf, f"x{number}", netns=pods[number], by=(first, second)[number % 2])
    assert sorted(rig.node.reservations()) == [f"10.1.17.{last}" for last in range(2, 7)]
    for by in (OURS, GO):
        error = rig.refused("ADD", conf, "x5", netns=pods[5], by=by)
        assert "no IP addresses available in range set: 10.1.17.1-10.1.17.6" in error["msg"]
    assert len(rig.node.reservations()) == 5


def test_24_adds_and_dels_of_both_kinds_at_once(rig: Rig) -> None:
    """Three rounds in one directory; each pod is taken down by the other kind than it was set up by."""
    conf = rig.conf("dual", ipMasq=True, ipMasqBackend="iptables", isDefaultGateway=True)
    pods = [rig.node.namespace() for _ in range(24)]

    def attach(number: int) -> list[str]:
        result = rig.add(conf, f"x{number}", netns=pods[number], by=BOTH[number % 2])
        given = [str(one["address"]) for one in result["ips"]]
        assert sorted(pods[number].addresses("eth0")) == sorted(given)
        return given

    def detach(number: int) -> None:
        rig.delete(conf, f"x{number}", netns=pods[number], by=BOTH[(number + 1) % 2])

    def replace(number: int) -> list[str]:
        detach(number)
        return attach(number)

    with ThreadPoolExecutor(len(pods)) as pool:
        for round_of in (attach, replace, replace):
            given = [one for some in pool.map(round_of, range(len(pods))) for one in some]
            assert len(set(given)) == 2 * len(pods)
            assert sorted(rig.node.reservations()) == sorted(one.split("/")[0] for one in given)
            assert len(rig.node.veths()) == len(pods) and rig.host.addresses("cni0") == GATEWAYS["dual"]
        list(pool.map(detach, range(len(pods))))
    assert rig.traces() == []
    assert all(pod.links() == ["lo"] for pod in pods)


# --- flannel


def flannel_keys(node: Node, masquerade: str) -> Document:
    return {"delegate": {"hairpinMode": True, "isDefaultGateway": True, **MASQUERADE[masquerade]}}


def delegate_config(node: Node, family: str, masquerade: str) -> str:
    """The bytes that upstream's flannel writes and passes on."""
    networks = {"v4": ["10.1.0.0/16"], "v6": ["fd00:1::/48"], "dual": ["10.1.0.0/16", "fd00:1::/48"]}
    conf: Document = {
        "cniVersion": "1.0.0",
        "hairpinMode": True,
        "ipMasq": False,
        "ipam": {
            "dataDir": f"{node.root}/networks",
            "ranges": RANGES[family],
            "routes": [{"dst": one} for one in networks[family]],
            "type": "host-local",
        },
        "isDefaultGateway": True,
        "isGateway": True,
        "mtu": 1450,
        "name": "cbr0",
        "type": "bridge",
        **MASQUERADE[masquerade],
    }
    return json.dumps(conf, sort_keys=True, separators=(",", ":"))


def go_bridge(node: Node, command: str, config: str, container: str, pod: Any) -> Any:
    code, document = node.execute([f"{GO_PLUGINS}/bridge"], command, attachment(container, pod), config)
    assert code == 0, document
    return document


@FAMILIES
@pytest.mark.parametrize("masquerade", ["no masquerade", "default"])
@pytest.mark.parametrize("end", ["there", "gone"])
def test_our_flannel_takes_down_what_go_set_up(node: Node, family: str, masquerade: str, end: str) -> None:
    (node.root / "subnet.env").write_text(ENVS[family])
    pod = node.namespace()
    config = delegate_config(node, family, masquerade)
    node.data.mkdir(mode=0o700)
    (node.data / "c1").write_text(config)
    result = go_bridge(node, "ADD", config, "c1", pod)
    keys = flannel_keys(node, masquerade)
    assert node.call("CHECK", "c1", pod, prevResult=result, **keys) is None
    if end == "gone":
        node.forget(pod)
        wait_for(lambda: node.veths() == [])
    for _ in range(2):
        assert node.call("DEL", "c1", pod if end == "there" else None, **keys) is None
        assert traces(node) == []


@FAMILIES
@pytest.mark.parametrize("masquerade", MASQUERADE)
def test_go_takes_down_what_our_flannel_set_up(node: Node, family: str, masquerade: str) -> None:
    (node.root / "subnet.env").write_text(ENVS[family])
    pod = node.namespace()
    keys = flannel_keys(node, masquerade)
    node.call("ADD", "c1", pod, **keys)
    saved = (node.data / "c1").read_text()
    assert json.loads(saved) == json.loads(delegate_config(node, family, masquerade))
    if masquerade != "nftables":
        assert saved == delegate_config(node, family, masquerade)
    code, error = node.execute([f"{GO_PLUGINS}/bridge"], "DEL", attachment("c1", pod), saved)
    assert code == 0 or (element_stays(GO, masquerade) and "does not exist" in error["msg"])
    (node.data / "c1").unlink()  # as upstream's flannel does, whatever bridge answers
    assert (pod.links(), node.veths(), node.reservations()) == (["lo"], [], {})
    # Of ours are left: a file that only we know, and perhaps an element of our set. Our next call ends that.
    assert node.call("DEL", "c1", None, **keys) is None
    assert traces(node) == []


@FAMILIES
def test_go_checks_what_our_flannel_set_up(node: Node, family: str) -> None:
    """Go's CHECK wants each route's gateway spelled out in prevResult."""
    (node.root / "subnet.env").write_text(ENVS[family])
    pod = node.namespace()
    result = node.call("ADD", "c1", pod, **flannel_keys(node, "no masquerade"))
    gateways = {":" in one["gateway"]: one["gateway"] for one in result["ips"]}
    routes = [{"gw": gateways[":" in route["dst"]], **route} for route in result["routes"]]
    config = json.loads((node.data / "c1").read_text())
    config["prevResult"] = {**result, "routes": routes}
    assert go_bridge(node, "CHECK", json.dumps(config), "c1", pod) is None


def test_pods_of_both_on_one_node_while_it_is_changed_over(node: Node) -> None:
    """From Go to ours and back, with pods that live through it."""
    (node.root / "subnet.env").write_text(DUAL_STACK)
    config = delegate_config(node, "dual", "no masquerade")
    node.data.mkdir(mode=0o700)
    pods = [node.namespace() for _ in range(4)]
    for number in (0, 3):
        (node.data / f"c{number}").write_text(config)
    go_bridge(node, "ADD", config, "c0", pods[0])
    node.call("ADD", "c1", pods[1])
    node.call("ADD", "c2", pods[2])
    go_bridge(node, "ADD", config, "c3", pods[3])
    assert [pod.addresses("eth0")[0] for pod in pods] == [f"10.1.17.{last}/24" for last in (2, 3, 4, 5)]
    for pod in pods:
        assert all(pings(pod, f"10.1.17.{last}") for last in (1, 2, 3, 4, 5))
    go_bridge(node, "DEL", (node.data / "c1").read_text(), "c1", pods[1])
    (node.data / "c1").unlink()
    for container, pod in (("c0", pods[0]), ("c2", pods[2]), ("c3", pods[3]), ("c1", pods[1])):
        assert node.call("DEL", container, pod) is None
    assert traces(node) == []
