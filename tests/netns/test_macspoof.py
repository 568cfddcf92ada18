"""Rules against forged sources: frames on a bridge, and interchange with Go's bridge plugin."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.errors import CniError
from cni.local import LocalHost
from cni.net import nlsocket
from cni.net.nlsocket import ProtocolMissing
from cni.plugins import macspoof
from tests.netns.cni_fixtures import Namespace
from tests.netns.firewall_fixtures import Namespace as Inside
from tests.netns.nft_fixtures import Wired, wired

FORGED = "02:00:00:00:be:ef"
ETHERTYPE = 0x88B5  # for local experiments


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Wired]:
    with wired(tmp_path) as made:
        yield made


class Pod:
    """A pod that Go's bridge has attached, and its link as the result tells."""

    def __init__(self, lab: Wired, container: str, **conf: object) -> None:
        self.ns: Namespace = lab.node.namespace()
        result = lab.bridge("ADD", container, self.ns, **conf)
        interfaces: list[dict[str, str]] = result["interfaces"]  # type: ignore[assignment]
        self.veth = next(one["name"] for one in interfaces if one["name"].startswith("veth"))
        self.mac = next(one["mac"] for one in interfaces if one["name"] == "eth0")

    def send(self, source: str, payload: bytes) -> None:
        """Broadcast a frame."""
        frame = b"\xff" * 6 + bytes.fromhex(source.replace(":", "")) + ETHERTYPE.to_bytes(2, "big") + payload

        def inside() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
                sender.bind(("eth0", 0))
                sender.send(frame.ljust(60, b"\0"))

        Inside(self.ns.name).call(inside)

    def receiver(self) -> socket.socket:
        """A socket that gets the frames of our type."""

        def inside() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
            made.settimeout(5)
            return made

        return Inside(self.ns.name).call(inside)


def received(sender: Pod, receiver: Pod, source: str) -> bool:
    """Whether a frame from `source` comes through; one that surely does tells when to stop waiting."""
    with receiver.receiver() as frames:
        sender.send(source, b"probe")
        sender.send(sender.mac, b"last")
        first = frames.recv(2000)[14:]
        if first.startswith(b"probe"):
            assert frames.recv(2000)[14:].startswith(b"last")
            return True
        assert first.startswith(b"last")
        return False


def add(lab: Wired, pod: Pod, container: str = "c1", ifname: str = "eth0") -> None:
    lab.on(lambda host: macspoof.add(host, container, ifname, pod.veth, pod.mac))


def remove(lab: Wired, container: str = "c1", ifname: str = "eth0") -> None:
    lab.on(lambda host: macspoof.remove(host, container, ifname))


def test_forged_frames_are_dropped(lab: Wired) -> None:
    sender, other = Pod(lab, "c1"), Pod(lab, "c2")
    assert received(sender, other, FORGED)
    add(lab, sender)
    assert not received(sender, other, FORGED)
    assert received(sender, other, sender.mac)
    assert received(other, sender, FORGED), "another pod's port is concerned"
    remove(lab)
    assert received(sender, other, FORGED)


def normal(ruleset: str, pod: Pod) -> str:
    """A listing without the names that differ from pod to pod."""
    return ruleset.replace(pod.veth, "VETH").replace(pod.mac, "MAC")


def test_rules_are_those_of_go(lab: Wired) -> None:
    first = Pod(lab, "c1", macspoofchk=True)
    wanted = normal(lab.ruleset(), first)
    assert len(re.findall("macspoofchk-c1-eth0", wanted)) == 4
    lab.bridge("DEL", "c1", first.ns, macspoofchk=True)
    left = lab.ruleset()
    assert "-c1-" not in left
    second = Pod(lab, "c1")
    add(lab, second)
    assert normal(lab.ruleset(), second) == wanted
    lab.bridge("DEL", "c1", second.ns, macspoofchk=True)
    assert lab.ruleset() == left


def test_rules_of_go_are_removed(lab: Wired) -> None:
    Pod(lab, "c10", macspoofchk=True)
    before = lab.ruleset()
    Pod(lab, "c1", macspoofchk=True)
    remove(lab)
    assert lab.ruleset() == before
    remove(lab, "c10")
    assert "-c1-" not in lab.ruleset()


def test_adding_again_replaces(lab: Wired) -> None:
    first, second = Pod(lab, "c1"), Pod(lab, "c2")
    add(lab, first)
    wanted = normal(lab.ruleset(), first)
    add(lab, first)
    assert normal(lab.ruleset(), first) == wanted
    add(lab, second)
    assert normal(lab.ruleset(), second) == wanted


def check(lab: Wired, veth: str, mac: str) -> None:
    lab.on(lambda host: macspoof.check(host, "c1", "eth0", veth, mac))


def test_check_of_gos_rules(lab: Wired) -> None:
    pod = Pod(lab, "c1", macspoofchk=True)
    check(lab, pod.veth, pod.mac)
    for veth, mac in ((pod.veth, FORGED), ("vethother", pod.mac)):
        with pytest.raises(CniError, match=rf"^Rules against MAC spoofing on {veth} \(table bridge nat\)"):
            check(lab, veth, mac)


@pytest.mark.parametrize("chain", ["PREROUTING", "cni-br-iface-c1-eth0", "cni-br-iface-c1-eth0-mac"])
def test_check_finds_damage(lab: Wired, chain: str) -> None:
    pod = Pod(lab, "c1")
    add(lab, pod)
    check(lab, pod.veth, pod.mac)
    lab.netns.run(f"nft flush chain bridge nat {chain}")
    with pytest.raises(CniError, match="Rules against MAC spoofing"):
        check(lab, pod.veth, pod.mac)


def test_removing_nothing(lab: Wired) -> None:
    remove(lab)
    assert lab.ruleset() == ""


def test_an_id_of_64_digits(lab: Wired) -> None:
    pod = Pod(lab, "c1")
    container = "0123456789abcdef" * 8
    add(lab, pod, container, "eth0")
    assert container[:100] in lab.ruleset()
    remove(lab, container, "eth0")
    assert container[:100] not in lab.ruleset()


def sweep(lab: Wired, *live: str) -> int:
    return lab.on(lambda host: macspoof.sweep(host, live.__contains__))


def test_sweep_removes_the_rules_of_ports_that_are_gone(lab: Wired) -> None:
    live, ours = Pod(lab, "c1"), Pod(lab, "c2")
    add(lab, live)
    wanted = lab.ruleset()
    gos = Pod(lab, "c3", macspoofchk=True)
    add(lab, ours, "c2")
    foreign = f"add rule bridge nat PREROUTING iifname {ours.veth} ether type arp accept"
    lab.netns.run(f"nft {foreign}")
    assert sweep(lab, live.veth, ours.veth, gos.veth) == 0
    assert sweep(lab, live.veth) == 2
    assert sweep(lab, live.veth) == 0
    left = lab.ruleset()
    assert left.count("ether type arp accept") == 1 and "-c2-" not in left and "-c3-" not in left
    assert [one for one in left.splitlines() if "ether type arp" not in one] == wanted.splitlines()
    assert not received(live, gos, FORGED)


def test_sweep_of_nothing(lab: Wired) -> None:
    assert sweep(lab) == 0
    assert lab.ruleset() == ""


def test_rules_that_are_made_during_a_sweep_stay(lab: Wired) -> None:
    """The container is attached again, by another port, between the look and the change."""
    first, second = Pod(lab, "c1"), Pod(lab, "c2")
    add(lab, first)

    def live(veth: str) -> bool:
        if veth == first.veth:
            add(lab, second)
        return veth == second.veth

    assert lab.on(lambda host: macspoof.sweep(host, live)) == 0
    assert not received(second, first, FORGED)


@pytest.mark.parametrize("protocol", [nlsocket.ROUTE, 31])
def test_a_kernel_without_nf_tables(protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Route netlink knows nothing of it, and there is no protocol 31."""
    monkeypatch.setattr("cni.local.NETFILTER", protocol)
    host = LocalHost(lambda _: None, {})
    try:
        macspoof.remove(host, "c1", "eth0")
        assert macspoof.sweep(host, lambda _: False) == 0
        with pytest.raises(ProtocolMissing):
            macspoof.add(host, "c1", "eth0", "veth1", FORGED)
    finally:
        if host._netfilter is not None:
            host._netfilter.close()
