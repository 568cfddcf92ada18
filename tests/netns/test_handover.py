"""`virt-launcher` prepare, show, restore and serve in a pod's namespace, read back by iproute2 and nft.

Each test has a pod of its own (see `pod_fixtures`); the guest is a veth in the tap's place.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest

from launcher.dhcp.packet import Message, MessageType, build, parse
from tests.netns.firewall_fixtures import Namespace
from tests.netns.pod_fixtures import (
    CALICO,
    GATEWAY_MAC,
    POD_MAC,
    V4,
    V6,
    Pod,
    pod,
    view,
    wait_for,
)

ROUTES = (
    "route add 10.96.0.0/12 via 10.244.1.1 dev eth0 metric 50",
    "route add 10.96.0.0/12 via 10.244.1.2 dev eth0 metric 60",
    "route add 10.200.0.0/16 dev eth0 scope link",
    "route add 192.0.2.0/24 via 203.0.113.1 dev eth0 onlink",
    "route add default via 10.244.1.9 dev eth0 metric 900",
)
PODS: dict[str, tuple[str, ...]] = {
    "v4": V4,
    "v6": V6,
    "dual": (*V4, *V6),
    "calico": CALICO,
    "calico dual": (
        *CALICO,
        "addr add fd00:10:244:1::7/128 dev eth0 nodad",
        "-6 route add fd00:10:244:1::1 dev eth0",
        "-6 route add default via fd00:10:244:1::1 dev eth0",
    ),
    "many routes": (
        *V4,
        *V6,
        *ROUTES,
        "-6 route add 2001:db8:7::/48 via fd00:10:244:1::9 dev eth0 metric 77",
    ),
    "two addresses": (*V4, "addr add 10.244.1.8/24 dev eth0", "addr add 192.168.5.5/16 dev eth0"),
    "gateway behind a link-local": (
        "addr add fd00:10:244:1::7/64 dev eth0 nodad",
        "-6 route add default via fe80::1 dev eth0",
    ),
}
NO_IPAM: tuple[str, ...] = ()
BINDINGS = ("bridge", "masquerade")
BROADCAST = b"\xff" * 6
SERVER = "169.254.75.10"
_ETH_P_ALL = 3


@pytest.fixture
def pod_of(tmp_path: Path) -> Iterator[Callable[..., Pod]]:
    """Make a pod by `ip` commands; it is removed after the test."""
    with ExitStack() as stack:
        numbers = itertools.count()

        def make(*commands: str, **options: Any) -> Pod:
            return stack.enter_context(pod(tmp_path / f"pod{next(numbers)}", *commands, **options))

        yield make


@pytest.fixture
def dual(pod_of: Callable[..., Pod]) -> Pod:
    return pod_of(*V4, *V6)


def sysctls(of: Pod) -> list[str]:
    names = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.eth0.forwarding")
    return of.ns.run("sysctl " + " ".join(names)).splitlines()


# ---- prepare and restore


@pytest.mark.parametrize("binding", BINDINGS)
@pytest.mark.parametrize("kind", PODS)
def test_restore_gives_back_exactly_what_there_was(
    pod_of: Callable[..., Pod], kind: str, binding: str
) -> None:
    made = pod_of(*PODS[kind])
    before, settings = made.view(), sysctls(made)
    index = json.loads(made.ip("-j link show eth0"))[0]["ifindex"]
    made.ok("prepare", "--interface", "eth0", "--binding", binding)
    assert made.view() != before
    made.ok("restore")
    assert made.view() == before
    assert sysctls(made) == settings
    assert json.loads(made.ip("-j link show eth0"))[0]["ifindex"] == index
    assert not (made.state_dir / "state.json").exists()
    for chain in re.findall(r"chain (\w+)", made.ns.run("nft list ruleset")):
        pytest.fail(f"chain {chain} is left behind")


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_pod_without_addresses(pod_of: Callable[..., Pod], binding: str) -> None:
    made = pod_of(*NO_IPAM)
    before = made.view()
    done = made.launcher("prepare", "--interface", "eth0", "--binding", binding)
    if binding == "masquerade":
        assert done.code == 2
        assert "eth0 has no address" in done.err
        assert made.view() == before
        return
    assert done.code == 0, done.err
    links = made.view()["links"]
    assert (
        links["k6t-eth0"]["addresses"] == links["eth0"]["addresses"] == links["eth0-nic"]["addresses"] == []
    )
    assert links["tap0"]["master"] == "k6t-eth0"
    made.ok("restore")
    assert made.view() == before


def test_links_of_the_bridge_binding(dual: Pod) -> None:
    done = dual.launcher("prepare", "--queues", "4", "--tap-owner", "1234")
    assert done.code == 0, done.err
    shown = dual.view()
    links = shown["links"]
    bridge = links["k6t-eth0"]
    assert (bridge["kind"], bridge["mtu"], bridge["up"], bridge["arp"]) == ("bridge", 1450, True, False)
    assert (bridge["stp"], bridge["delay"], bridge["snooping"]) == (0, 0, 0)
    assert bridge["addresses"] == ["169.254.75.10/32 global"]
    nic = links["eth0-nic"]
    assert (nic["kind"], nic["mac"], nic["mtu"], nic["master"]) == ("veth", bridge["mac"], 1450, "k6t-eth0")
    assert (nic["up"], nic["learning"], nic["addresses"]) == (True, False, [])
    assert bridge["mac"] != POD_MAC and int(bridge["mac"][:2], 16) & 3 == 2
    tap = links["tap0"]
    assert (tap["mtu"], tap["master"], tap["up"], tap["learning"]) == (1450, "k6t-eth0", True, True)
    assert tap["tap"] == ["tap", 1234, 1234, True, True, True]
    holder = links["eth0"]
    assert (holder["mac"], holder["mtu"], holder["up"], holder["master"]) == (POD_MAC, 1450, False, None)
    assert holder["addresses"] == ["10.244.1.7/24 global", "fd00:10:244:1::7/64 global"]
    assert shown["routes"] == []
    # Nothing has the pod's address on a link that is up, and nothing of it is on the bridge's ports.
    fdb = dual.ns.run("bridge fdb show br k6t-eth0")
    assert POD_MAC not in fdb


def test_links_of_the_masquerade_binding(dual: Pod) -> None:
    before = dual.view()
    done = dual.launcher("prepare", "--binding", "masquerade")
    assert done.code == 0, done.err
    links = dual.view()["links"]
    assert links["eth0"] == before["links"]["eth0"]
    bridge = links["k6t-eth0"]
    assert (bridge["mac"], bridge["mtu"], bridge["up"]) == ("02:00:00:00:00:00", 1450, True)
    assert bridge["addresses"] == ["10.0.2.1/24 global", "fd10:0:2::1/120 global"]
    assert links["tap0"]["master"] == "k6t-eth0"
    values = [line.split(" = ")[1] for line in sysctls(dual)[:2]]
    assert values == ["1", "1"]
    assert dual.ns.run("sysctl -n net.ipv4.conf.k6t-eth0.route_localnet") == "1\n"
    assert "tentative" not in dual.ip("-6 addr show dev k6t-eth0 scope global")


@pytest.mark.parametrize(
    ("kind", "untouched"), [("v4", "net.ipv6.conf.all.forwarding"), ("v6", "net.ipv4.ip_forward")]
)
def test_masquerade_leaves_the_other_family_alone(
    pod_of: Callable[..., Pod], kind: str, untouched: str
) -> None:
    made = pod_of(*PODS[kind])
    made.ok("prepare", "--interface", "eth0", "--binding", "masquerade")
    assert made.ns.run(f"sysctl -n {untouched}") == "0\n"


def test_other_names_and_a_second_interface(pod_of: Callable[..., Pod], tmp_path: Path) -> None:
    made = pod_of(*V4)
    made.far.run(f"ip link add far1 type veth peer name net1 netns {made.ns.name}")
    made.far.run("ip link set far1 up")
    made.ip("link set net1 up")
    made.ip("addr add 192.168.9.2/24 dev net1")
    before = made.view()
    made.ok("prepare", "--interface", "eth0")
    second = Pod(made.ns, made.far, tmp_path / "second", "net1")
    second.ok("prepare", "--interface", "net1")
    assert {"k6t-eth0", "eth0-nic", "tap0", "k6t-net1", "net1-nic", "tap1"} <= set(made.view()["links"])
    # A state directory belongs to one interface.
    refused = made.forked("prepare", "--interface", "net1")
    assert refused.code == 2
    assert "eth0" in refused.err and "net1" in refused.err
    second.ok("restore")
    made.ok("restore")
    assert made.view() == before


@pytest.mark.parametrize("binding", BINDINGS)
def test_a_smaller_mtu_for_the_guest(dual: Pod, binding: str) -> None:
    before = dual.view()
    dual.ok("prepare", "--binding", binding, "--mtu", "1400")
    links = dual.view()["links"]
    assert links["tap0"]["mtu"] == 1400
    # A router's link must not take more than the guest's: it could not send "packet too big".
    assert links["k6t-eth0"]["mtu"] == 1400
    assert links["eth0-nic" if binding == "bridge" else "eth0"]["mtu"] == 1450
    again = dual.ok("prepare", "--binding", binding, "--mtu", "1400")
    assert "0 operations" in again.err
    dual.ok("restore")
    assert dual.view() == before


@pytest.mark.parametrize("binding", BINDINGS)
def test_prepare_twice_does_nothing(dual: Pod, binding: str) -> None:
    dual.ok("prepare", "--binding", binding)
    once = dual.view(), rules(dual), identities(dual)
    again = dual.ok("prepare", "--binding", binding)
    assert "0 operations" in again.err
    # Not even an index or the tap's own MAC has changed.
    assert (dual.view(), rules(dual), identities(dual)) == once


def identities(of: Pod) -> list[tuple[str, int, str]]:
    return [(link["ifname"], link["ifindex"], link["address"]) for link in of.links()]


@pytest.mark.parametrize("binding", BINDINGS)
def test_dry_run_changes_nothing_and_tells_everything(dual: Pod, binding: str) -> None:
    before = dual.view(), sysctls(dual)
    done = dual.ok("prepare", "--binding", binding, "--dry-run")
    assert (dual.view(), sysctls(dual)) == before
    assert not dual.state_dir.exists()
    assert rules(dual) == ""
    words = ["tap0", "k6t-eth0"]
    words += ["eth0-nic", "169.254.75.10/32"] if binding == "bridge" else ["10.0.2.1/24", "dnat to 10.0.2.2"]
    assert all(word in done.out for word in words)


def test_show_tells_what_is_missing(dual: Pod) -> None:
    assert dual.forked("show").code == 2
    dual.ok("prepare")
    shown = json.loads(dual.ok("show", "-o", "json").out)
    assert shown["interface"] == "eth0"
    assert shown["guestAddress"] == "10.244.1.7/24"
    assert shown["guestMAC"] == POD_MAC
    assert shown["leftToDo"] == []
    dual.ip("link set tap0 nomaster")
    dual.ip("addr del 169.254.75.10/32 dev k6t-eth0")
    dual.ip("link set eth0-nic down")
    left = json.loads(dual.ok("show", "-o", "json").out)["leftToDo"]
    assert len(left) == 3
    before = dual.view()
    dual.ok("show", "-o", "yaml")
    assert "tap0" in dual.ok("show").out
    assert dual.view() == before
    assert "3 operations" in dual.ok("prepare").err
    assert json.loads(dual.ok("show", "-o", "json").out)["leftToDo"] == []


DAMAGE = [
    "link del k6t-eth0",
    "link del tap0",
    "link del eth0",
    "link set eth0-nic address 0a:58:0a:f4:01:07",
    "link set eth0-nic nomaster",
    "link set k6t-eth0 down",
    "link set k6t-eth0 arp on",
    "link set tap0 mtu 1300",
    "link set eth0-nic type bridge_slave learning on",
    "addr add 10.244.1.7/24 dev eth0-nic",
    "addr flush dev eth0",
    "route add 10.9.0.0/16 dev eth0-nic",
    "link set eth0 up",
]


def test_damage_is_mended_by_prepare(dual: Pod) -> None:
    before = dual.view()
    dual.ok("prepare")
    right = dual.view()
    for damage in DAMAGE:
        dual.ip(damage)
        assert dual.view() != right, damage
        dual.ok("prepare")
        assert dual.view() == right, damage
    for damage in ("link del k6t-eth0", "link del eth0"):
        dual.ip(damage)
    dual.ok("restore")
    assert dual.view() == before


def test_a_link_that_took_the_taps_place_is_not_touched(dual: Pod) -> None:
    before = dual.view()
    dual.ok("prepare")
    dual.plug_guest()
    right = dual.view()
    done = dual.forked("prepare")
    assert done.code == 1
    assert "tap0 exists and is a veth link, not a tap" in done.err
    assert dual.view() == right
    # Nor does it stand in the way of the way back.
    dual.ok("restore")
    now = dual.view()
    assert now["links"].pop("tap0")["kind"] == "veth"
    assert now == before


# ---- killed at any operation


@pytest.mark.parametrize("binding", BINDINGS)
def test_killed_at_any_operation(pod_of: Callable[..., Pod], binding: str) -> None:
    """Prepare and restore are killed before each call that can leave a trace, one after the other."""
    made = pod_of(*PODS["calico dual"])
    before = made.view()
    prepare = ("prepare", "--interface", "eth0", "--binding", binding)
    made.ok(*prepare)
    after, listing = made.view(), rules(made)
    made.ok("restore")
    kills = 0
    alive = {"prepare", "restore"}
    for count in range(1, 400):
        # Forward: both are run to their end after the kill.
        killed = made.forked(*prepare, kill_at=count)
        made.ok(*prepare)
        assert (made.view(), rules(made)) == (after, listing), f"prepare killed at {count}"
        killed_too = made.forked("restore", kill_at=count)
        finish_restore(made)
        assert (made.view(), rules(made)) == (before, ""), f"restore killed at {count}"
        # Backward: the other one comes next.
        made.forked(*prepare, kill_at=count)
        finish_restore(made)
        assert (made.view(), rules(made)) == (before, ""), f"restore after prepare killed at {count}"
        made.ok(*prepare)
        made.forked("restore", kill_at=count)
        made.ok(*prepare)
        assert (made.view(), rules(made)) == (after, listing), f"prepare after restore killed at {count}"
        made.ok("restore")
        for name, done in (("prepare", killed), ("restore", killed_too)):
            kills += done.code == -9
            if done.code != -9:
                assert done.code == 0, done.err
                alive.discard(name)
        if not alive:
            break
    assert not alive
    assert kills > 25


def finish_restore(made: Pod) -> None:
    """Restore; it may have been finished or never begun, and then it says so."""
    done = made.forked("restore")
    assert done.code == 0 or (done.code == 2 and "nothing is handed over" in done.err), done.err


# ---- masquerade: nftables


def rules(made: Pod) -> str:
    """Chains and rules of all tables, without counters' values."""
    listing = made.ns.run("nft -j list ruleset")
    kept = []
    for item in json.loads(listing)["nftables"]:
        [(kind, what)] = item.items()
        if kind not in ("chain", "rule"):
            continue
        what.pop("handle")
        for part in what.get("expr", []):
            if isinstance(part.get("counter"), dict):
                part["counter"] = None
        kept.append(json.dumps(what))
    return "\n".join(kept)


def listed(made: Pod, family: str, chain: str) -> list[str]:
    text = made.ns.run(f"nft -s list chain {family} nat {chain}")
    lines = [line.strip() for line in text.splitlines()[2:]]
    return [line for line in lines if line not in ("}", "")]


FAMILIES = {
    "ip": ("127.0.0.1", "10.0.2.2", "10.0.2.1"),
    "ip6": ("::1", "fd10:0:2::2", "fd10:0:2::1"),
}


@pytest.mark.parametrize("twice", [False, True])
def test_rules_without_ports(dual: Pod, twice: bool) -> None:
    dual.ok("prepare", "--binding", "masquerade")
    if twice:
        dual.ok("prepare", "--binding", "masquerade")
    for family, (loopback, guest, gateway) in FAMILIES.items():
        assert listed(dual, family, "prerouting") == [
            "type nat hook prerouting priority dstnat; policy accept;",
            'iifname "eth0" counter jump KUBEVIRT_PREINBOUND',
        ]
        assert listed(dual, family, "input") == ["type nat hook input priority 100; policy accept;"]
        assert listed(dual, family, "output") == [
            "type nat hook output priority -100; policy accept;",
            f"{family} daddr {loopback} counter dnat to {guest}",
        ]
        assert listed(dual, family, "postrouting") == [
            "type nat hook postrouting priority srcnat; policy accept;",
            f"{family} saddr {guest} counter masquerade",
            'oifname "k6t-eth0" counter jump KUBEVIRT_POSTINBOUND',
        ]
        assert listed(dual, family, "KUBEVIRT_PREINBOUND") == [f"counter dnat to {guest}"]
        assert listed(dual, family, "KUBEVIRT_POSTINBOUND") == [
            f"{family} saddr {loopback} counter snat to {gateway}"
        ]


def test_rules_with_ports_and_what_is_foreign(dual: Pod) -> None:
    dual.ns.run("nft -f -", "add table ip nat\nadd chain ip nat mine\nadd table inet mine\n")
    dual.ok("prepare", "--binding", "masquerade", "--port", "80", "--port", "53/udp")
    for family, (loopback, guest, gateway) in FAMILIES.items():
        assert listed(dual, family, "KUBEVIRT_PREINBOUND") == [
            f"tcp dport 80 counter dnat to {guest}",
            f"udp dport 53 counter dnat to {guest}",
        ]
        assert listed(dual, family, "KUBEVIRT_POSTINBOUND") == [
            f"tcp dport 80 {family} saddr {loopback} counter snat to {gateway}",
            f"udp dport 53 {family} saddr {loopback} counter snat to {gateway}",
        ]
        assert listed(dual, family, "output")[1:] == [
            f"{family} daddr {loopback} tcp dport 80 counter dnat to {guest}",
            f"{family} daddr {loopback} udp dport 53 counter dnat to {guest}",
        ]
    # Other ports on a second run replace the first ones.
    dual.ok("prepare", "--binding", "masquerade", "--port", "22")
    assert listed(dual, "ip", "KUBEVIRT_PREINBOUND") == ["tcp dport 22 counter dnat to 10.0.2.2"]
    dual.ok("restore")
    assert "chain mine" in dual.ns.run("nft list table ip nat")
    assert "table inet mine" in dual.ns.run("nft list tables")
    assert "KUBEVIRT" not in dual.ns.run("nft list ruleset")


def test_rules_of_one_family_only(pod_of: Callable[..., Pod]) -> None:
    made = pod_of(*V4)
    made.ok("prepare", "--binding", "masquerade", "--network", "10.11.12.77/24")
    assert "10.11.12.1/24 global" in made.view()["links"]["k6t-eth0"]["addresses"]
    assert listed(made, "ip", "KUBEVIRT_PREINBOUND") == ["counter dnat to 10.11.12.2"]
    assert "ip6" not in made.ns.run("nft list ruleset")
    made.ok("restore")
    assert rules(made) == ""


# ---- refused


REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such interface": ("--interface eth7", ("eth7", "eth0")),
    "the loopback": ("--interface lo", ("lo", "Ethernet")),
    "MTU below 68": ("--mtu 67", ("MTU 67", "1280")),
    "MTU below 1280 with IPv6": ("--mtu 1279", ("MTU 1279", "1280")),
    "MTU above the pod's": ("--mtu 1451", ("MTU 1451", "1450")),
    "negative MTU": ("--mtu=-1", ("MTU -1",)),
    "MTU that is no number": ("--mtu=big", ("big",)),
    "short MAC": ("--mac abcd", ("abcd", "six")),
    "MAC of a group": ("--mac 01:00:5e:00:00:01", ("01:00:5e:00:00:01", "unicast")),
    "8 octets": ("--mac 0a:58:0a:f4:01:07:08:09", ("0a:58:0a:f4:01:07:08:09",)),
    "MAC of the bridge": ("--binding masquerade --mac 02:00:00:00:00:00", ("02:00:00:00:00:00", "bridge")),
    "private option's number": ("--private-option 223=x", ("223", "224")),
    "private option's form": ("--private-option 224", ("224", "N=VALUE")),
    "private option without value": ("--private-option 224=", ("224",)),
    "private option's digits": ("--private-option ²²⁴=x", ("²²⁴",)),
    "private option's hex": ("--private-option 224=0xabc", ("0xabc",)),
    "private option twice": ("--private-option 224=a --private-option 224=b", ("224",)),
    "hostname": ("--hostname -vm", ("-vm",)),
    "hostname with underscore": ("--hostname a_b", ("a_b",)),
    "search domain": ("--search foo,com", ("foo,com",)),
    "search domain that is an address": ("--search 10.0.0.1", ("10.0.0.1",)),
    "long search domain": (f"--search {'a' * 64}.com", ("a" * 64,)),
    "subdomain": ("--search x.svc.cluster.local --subdomain a,b", ("a,b",)),
    "DNS server": ("--dns dns.example", ("dns.example",)),
    "DNS group": ("--dns 224.0.0.1", ("224.0.0.1",)),
    "time server": ("--ntp 10.0.0.256", ("10.0.0.256",)),
    "lease time": ("--lease-seconds 0", ("lease time 0",)),
    "queues": ("--queues 0", ("--queues=0", "256")),
    "too many queues": ("--queues 257", ("--queues=257", "256")),
    "network without room": ("--binding masquerade --network 10.0.0.0/31", ("10.0.0.0/31",)),
    "IPv6 network without room": ("--binding masquerade --network6 fd10:0:2::/127", ("fd10:0:2::/127",)),
    "network of the other family": ("--network fd10::/64", ("fd10::/64", "IPv4")),
    "the pod's own network": (
        "--binding masquerade --network 10.244.1.0/28",
        ("10.244.1.0/28", "10.244.1.7"),
    ),
    "the gateway's network": (
        "--binding masquerade --network6 fd00:10:244:1::/125",
        ("fd00:10:244:1::/125",),
    ),
    "port": ("--binding masquerade --port 0", ("--port=0", "65535")),
    "port's digits": ("--binding masquerade --port ²", ("--port=²",)),
    "protocol": ("--binding masquerade --port 80/icmp", ("80/icmp", "udp")),
    "tap owner": ("--tap-owner=-1", ("--tap-owner=-1",)),
    "large tap owner": ("--tap-owner=4294967296", ("--tap-owner=4294967296",)),
    "boot file": (f"--boot-file {'x' * 256}", ("x" * 256,)),
    "network status": ("--network-status {", ("network status",)),
    "network status names another": (
        '--network-status [{"interface":"eth9","default":true}]',
        ("eth9", "eth0"),
    ),
    "binding": ("--binding passt", ("passt", "masquerade")),
    "file in a folder that is not there": ("--domain-xml /nonexistent/x.xml", ("/nonexistent/x.xml",)),
}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pod, Any]]:
    """One pod for all that is refused, and how it looks."""
    with pod(tmp_path_factory.mktemp("refused"), *V4, *V6) as made:
        yield made, (made.view(), sysctls(made))


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_and_changes_nothing(untouched: tuple[Pod, Any], case: str) -> None:
    made, before = untouched
    arguments, words = REFUSED[case]
    done = made.forked("prepare", *arguments.split())
    assert done.code == 2, done
    lines = done.err.splitlines()
    # click puts two lines of usage in front of its own message.
    assert len(lines) == 1 or lines[0].startswith("Usage:"), done.err
    assert all(word in lines[-1] for word in words), lines[-1]
    assert (made.view(), sysctls(made)) == before
    assert rules(made) == ""
    assert not (made.state_dir / "state.json").exists()


def test_odd_search_words_of_the_pod_are_no_reason_to_refuse(dual: Pod, tmp_path: Path) -> None:
    """resolv.conf is the cluster's, not the user's."""
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 10.96.0.10\nsearch DHCP 10.0.0.1 foo,com . a_b.example Cluster.Local\n")
    code = (
        "import sys; from pathlib import Path; from launcher import __main__ as m; "
        f"m._read = lambda path: Path({str(resolver)!r}).read_text(); m.main()"
    )
    run = dual.ns.call(
        lambda: subprocess.run(
            [sys.executable, "-c", code, "--state-dir", str(dual.state_dir), "prepare"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    )
    assert run.returncode == 0, run.stderr
    saved = json.loads((dual.state_dir / "state.json").read_text())["settings"]["search"]
    assert saved == ["dhcp", "a_b.example", "cluster.local"]
    for word in ("10.0.0.1", "foo,com"):
        assert word in run.stderr


def test_the_nodes_own_namespace_is_refused(tmp_path: Path) -> None:
    """Harmless even where this fails: no interface has that name, and nothing but the plan is asked for."""
    links = subprocess.run(["ip", "-j", "link"], capture_output=True, check=True, timeout=30).stdout
    for arguments in (["prepare", "--dry-run", "--interface", "pfl-none"], ["restore"], ["serve"]):
        run = subprocess.run(
            [sys.executable, "-m", "launcher", "--state-dir", str(tmp_path / "state"), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert run.returncode == 2
        assert "the node's own network namespace" in run.stderr and "--force" in run.stderr
        assert len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "state").exists()
    now = subprocess.run(["ip", "-j", "link"], capture_output=True, check=True, timeout=30).stdout
    assert [link["ifname"] for link in json.loads(now)] == [link["ifname"] for link in json.loads(links)]


def test_a_namespace_is_named_by_path(dual: Pod, tmp_path: Path) -> None:
    def launcher(netns: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launcher", "--netns", netns, "--state-dir", str(dual.state_dir)]
        return subprocess.run(
            [*command, "prepare", "--dry-run"], capture_output=True, text=True, timeout=30, check=False
        )

    done = launcher(f"/run/netns/{dual.ns.name}")
    assert done.returncode == 0 and "eth0-nic" in done.stdout
    wrong = tmp_path / "file"
    wrong.touch()
    for path in (str(wrong), str(tmp_path / "none")):
        done = launcher(path)
        assert done.returncode in (1, 2)
        assert path in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_lost_state_directory_is_explained(dual: Pod) -> None:
    dual.ok("prepare")
    right = dual.view()
    shutil.rmtree(dual.state_dir)
    for arguments in (
        ("prepare",),
        ("prepare", "--interface", "eth0"),
        ("prepare", "--interface", "eth0-nic"),
    ):
        done = dual.forked(*arguments)
        assert done.code == 2, done
        assert "already handed over" in done.err or "k6t-eth0" in done.err, done.err
        assert dual.view() == right
    for command in ("show", "restore", "serve"):
        done = dual.forked(command)
        assert done.code == 2
        assert str(dual.state_dir) in done.err


def test_the_state_of_another_pod_is_refused(dual: Pod, pod_of: Callable[..., Pod]) -> None:
    dual.ok("prepare")
    other = pod_of(*V4)
    shutil.copytree(dual.state_dir, other.state_dir, dirs_exist_ok=True)
    before = other.view()
    for command in ("prepare", "show", "restore", "serve"):
        done = other.forked(command)
        assert done.code == 2, done
        assert "another network namespace" in done.err
    assert other.view() == before


@pytest.mark.parametrize(
    "what",
    [
        "tuntap add tap0 mode tap",
        "link add tap0 type bridge",
        "link add eth0-nic type bridge",
        "link add k6t-eth0 type bridge",
    ],
)
def test_a_name_that_is_taken(dual: Pod, what: str) -> None:
    dual.ip(what)
    before = dual.view()
    done = dual.forked("prepare")
    assert done.code == 2, done
    assert len(done.err.splitlines()) == 1
    assert next(word for word in what.split() if word in ("tap0", "eth0-nic", "k6t-eth0")) in done.err
    assert dual.view() == before


def test_an_interface_that_is_a_port_already(dual: Pod) -> None:
    """As KubeVirt 0.4 did it: without the names of today."""
    dual.ip("link add br1 type bridge")
    dual.ip("link set eth0 master br1")
    before = dual.view()
    done = dual.forked("prepare", "--interface", "eth0")
    assert done.code == 2, done
    assert "br1" in done.err
    assert dual.view() == before


def test_a_second_prepare_is_checked_as_the_first(dual: Pod) -> None:
    dual.ok("prepare", "--hostname", "vm1")
    state, right = (dual.state_dir / "state.json").read_bytes(), dual.view()
    for arguments, word in (
        (("--hostname", "a_b"), "a_b"),
        (("--private-option", "223=x"), "223"),
        (("--mtu", "1300"), "mtu"),
        (("--binding", "masquerade"), "binding"),
        (("--interface", "eth9"), "eth9"),
    ):
        done = dual.forked("prepare", *arguments)
        assert done.code == 2, done
        assert word in done.err
        assert (dual.state_dir / "state.json").read_bytes() == state
    assert dual.view() == right
    dual.ok("prepare", "--hostname", "vm2")
    assert b'"vm2"' in (dual.state_dir / "state.json").read_bytes()


def test_unreachable_default_routes_do_not_choose_the_loopback(pod_of: Callable[..., Pod]) -> None:
    made = pod_of("addr add 10.244.1.7/24 dev eth0", "-6 route add unreachable default")
    done = made.forked("prepare", "--dry-run")
    assert done.code == 2
    assert "no interface has the default route" in done.err and "eth0" in done.err


def test_the_annotation_chooses_the_interface(pod_of: Callable[..., Pod]) -> None:
    made = pod_of("addr add 10.244.1.7/24 dev cust0", interface="cust0")
    made.ok("prepare", "--network-status", '[{"name":"x","interface":"cust0","default":true}]')
    assert {"k6t-cust0", "cust0-nic", "tap0", "cust0"} <= set(made.view()["links"])


def test_a_link_with_a_name_that_is_no_text(dual: Pod) -> None:
    dual.ns.call(
        lambda: subprocess.run([b"ip", b"link", b"add", b"\xff\xfe", b"type", b"bridge"], check=True)
    )
    dual.ok("prepare")
    dual.ok("restore")


def test_state_file_is_for_its_owner_alone(dual: Pod) -> None:
    old = os.umask(0)
    try:
        dual.ok("prepare")
    finally:
        os.umask(old)
    assert (dual.state_dir / "state.json").stat().st_mode & 0o777 == 0o600
    assert dual.state_dir.stat().st_mode & 0o777 == 0o700


# ---- the guest's side


class Wire:
    """A raw socket on a link of a namespace."""

    def __init__(self, ns: Namespace, link: str) -> None:
        self.socket = ns.call(
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        )
        self.socket.bind((link, 0))
        self.socket.settimeout(5)

    def close(self) -> None:
        self.socket.close()

    def send(self, frame: bytes) -> None:
        self.socket.send(frame)

    def until(self, wanted: Callable[[bytes], bool]) -> list[bytes]:
        """Frames that come in, up to the one that is waited for."""
        frames = []
        while True:
            frame, address = self.socket.recvfrom(65536)
            if address[2] == socket.PACKET_OUTGOING:
                continue
            frames.append(frame)
            if wanted(frame):
                return frames


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


GUEST = mac(POD_MAC)


def arp(sender: str, target: str, source: bytes = GUEST) -> bytes:
    head = BROADCAST + source + b"\x08\x06" + b"\x00\x01\x08\x00\x06\x04\x00\x01"
    return head + source + IPv4Address(sender).packed + bytes(6) + IPv4Address(target).packed


def is_arp_reply(target: str) -> Callable[[bytes], bool]:
    return lambda f: f[12:14] == b"\x08\x06" and f[21] == 2 and f[28:32] == IPv4Address(target).packed


def udp4(source: str, destination: str, ports: tuple[int, int], data: bytes, to: bytes = BROADCAST) -> bytes:
    datagram = struct.pack("!HHHH", *ports, 8 + len(data), 0) + data
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0)
    head += IPv4Address(source).packed + IPv4Address(destination).packed
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", 0xFFFF - total) + head[12:]
    return to + GUEST + b"\x08\x00" + head + datagram


def dhcp(kind: MessageType, options: dict[int, bytes] | None = None, ciaddr: str = "0.0.0.0") -> bytes:
    options = {53: bytes([kind]), **(options or {})}
    return build(Message(1, 0x11223344, GUEST, options, ciaddr=IPv4Address(ciaddr)))


def is_dhcp(frame: bytes) -> bool:
    return frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[36:38] == b"\x00\x44"


def reply(frame: bytes) -> Message:
    found = parse(frame[42:], op=2)
    assert isinstance(found, Message)
    return found


def exchange(wire: Wire, frame: bytes) -> tuple[bytes, Message]:
    wire.send(frame)
    answer = wire.until(is_dhcp)[-1]
    return answer, reply(answer)


@pytest.fixture
def served(dual: Pod) -> Iterator[tuple[Pod, Wire]]:
    """The bridge binding with the server running and the guest's raw socket."""
    dual.ok("prepare")
    guest = dual.plug_guest()
    with closing(Wire(guest, "eth0")) as wire:
        dual.serve()
        yield dual, wire


def test_a_guest_gets_renews_and_is_refused(served: tuple[Pod, Wire]) -> None:
    made, wire = served
    frame, offer = exchange(wire, udp4("0.0.0.0", "255.255.255.255", (68, 67), dhcp(MessageType.DISCOVER)))
    assert (offer.kind, str(offer.yiaddr)) == (MessageType.OFFER, "10.244.1.7")
    assert str(offer.address(54)) == SERVER
    assert offer.options[26] == b"\x05\xaa" and offer.options[3] == IPv4Address("10.244.1.1").packed
    assert frame[:6] == GUEST and frame[30:34] == IPv4Address("10.244.1.7").packed
    named = {50: IPv4Address("10.244.1.7").packed, 54: IPv4Address(SERVER).packed}
    _, ack = exchange(wire, udp4("0.0.0.0", "255.255.255.255", (68, 67), dhcp(MessageType.REQUEST, named)))
    assert (ack.kind, str(ack.yiaddr)) == (MessageType.ACK, "10.244.1.7")
    # The server's address is no neighbour by the guest's mask: a renewal goes to the gateway's MAC.
    renew = dhcp(MessageType.REQUEST, ciaddr="10.244.1.7")
    for to in (mac(GATEWAY_MAC), mac(made.view()["links"]["k6t-eth0"]["mac"])):
        frame, ack = exchange(wire, udp4("10.244.1.7", SERVER, (68, 67), renew, to))
        assert (ack.kind, str(ack.ciaddr)) == (MessageType.ACK, "10.244.1.7")
        assert frame[26:30] == IPv4Address(SERVER).packed
    rebind = udp4("10.244.1.7", "255.255.255.255", (68, 67), renew)
    assert exchange(wire, rebind)[1].kind is MessageType.ACK
    wrong = dhcp(MessageType.REQUEST, {50: IPv4Address("10.244.9.9").packed})
    frame, nak = exchange(wire, udp4("0.0.0.0", "255.255.255.255", (68, 67), wrong))
    assert (nak.kind, frame[:6]) == (MessageType.NAK, BROADCAST)


def test_who_has(served: tuple[Pod, Wire]) -> None:
    """Only the server's address is answered for, once; the probe for the guest's own is not (RFC 5227)."""
    made, wire = served
    for sender in ("0.0.0.0", "10.244.1.7"):
        for asked in ("10.244.1.7", "169.254.75.11", "10.0.2.1"):
            wire.send(arp(sender, asked))
        wire.send(arp(sender, SERVER))
        frames = wire.until(is_arp_reply(SERVER))
        # A question that came in behind it is answered behind it: a second answer would be in between.
        wire.send(arp(sender, "10.244.1.1"))
        frames += wire.until(is_arp_reply("10.244.1.1"))
        answers = [f for f in frames if f[12:14] == b"\x08\x06" and f[21] == 2]
        assert [str(IPv4Address(f[28:32])) for f in answers] == [SERVER, "10.244.1.1"]
        assert answers[0][22:28] == mac(made.view()["links"]["k6t-eth0"]["mac"])
        assert answers[0][:6] == answers[0][32:38] == GUEST


def test_the_pods_network_reaches_the_guest_and_nobody_else(served: tuple[Pod, Wire]) -> None:
    made, wire = served
    own, gateway = IPv4Address("10.244.1.7").packed, IPv4Address("10.244.1.1").packed
    claim = mac(GATEWAY_MAC) + GUEST + b"\x08\x06\x00\x01\x08\x00\x06\x04\x00\x02"
    claim += GUEST + own + mac(GATEWAY_MAC) + gateway
    with closing(Wire(made.far, "gw")) as far:
        question = arp("10.244.1.1", "10.244.1.7", mac(GATEWAY_MAC))
        far.send(question)
        assert wire.until(lambda f: f == question)
        far.send(arp("10.244.1.1", SERVER, mac(GATEWAY_MAC)))
        # The guest answers last; the pod would have answered before.
        wire.send(claim)
        frames = far.until(is_arp_reply("10.244.1.7"))
        replies = [f for f in frames if f[12:14] == b"\x08\x06" and f[21] == 2]
        assert len(replies) == 1 and replies[0][22:28] == GUEST
        # A client on the pod's network is not ours to serve.
        foreign = udp4("0.0.0.0", "255.255.255.255", (68, 67), dhcp(MessageType.DISCOVER))
        far.send(foreign[:6] + mac(GATEWAY_MAC) + foreign[12:])
        exchange(wire, udp4("0.0.0.0", "255.255.255.255", (68, 67), dhcp(MessageType.DISCOVER)))
        far.send(arp("10.244.1.1", "10.244.1.7", mac(GATEWAY_MAC)))
        wire.until(lambda f: f == question)
        wire.send(claim)
        assert not any(map(is_dhcp, far.until(is_arp_reply("10.244.1.7"))))


def is_icmp6(kind: int) -> Callable[[bytes], bool]:
    return lambda f: f[12:14] == b"\x86\xdd" and f[20] == 58 and f[54] == kind


def icmp6(source: IPv6Address, destination: IPv6Address, message: bytes, to: bytes) -> bytes:
    pseudo = source.packed + destination.packed + struct.pack("!II", len(message), 58)
    total = sum(struct.unpack(f"!{len(pseudo + message) // 2}H", pseudo + message))
    total = (total & 0xFFFF) + (total >> 16)
    total = 0xFFFF - ((total & 0xFFFF) + (total >> 16))
    head = struct.pack("!IHBB", 6 << 28, len(message), 58, 255) + source.packed + destination.packed
    return to + GUEST + b"\x86\xdd" + head + message[:2] + struct.pack("!H", total) + message[4:]


GUEST6 = IPv6Address("fe80::858:aff:fef4:107")


def test_the_advertised_router_is_the_pods_gateway_alone(served: tuple[Pod, Wire]) -> None:
    """Nobody else may answer who has the router's address: the guest would send into the pod."""
    _, wire = served
    all_routers, router_group = IPv6Address("ff02::2"), bytes.fromhex("333300000002")
    wire.send(icmp6(GUEST6, all_routers, bytes.fromhex("8500000000000000"), router_group))
    advert = wire.until(is_icmp6(134))[-1]
    assert bytes.fromhex("0101") + mac(GATEWAY_MAC) in advert[54:]
    router = IPv6Address(advert[22:38])
    group = IPv6Address(b"\xff\x02" + b"\0" * 9 + b"\x01\xff" + router.packed[13:])
    question = bytes.fromhex("8700000000000000") + router.packed + b"\x01\x01" + GUEST
    to = b"\x33\x33" + group.packed[12:]
    wire.send(icmp6(GUEST6, group, question, to))
    frames = wire.until(is_icmp6(136))
    wire.send(arp("10.244.1.7", "10.244.1.1"))
    frames += wire.until(is_arp_reply("10.244.1.1"))
    wire.send(icmp6(GUEST6, group, question, to))
    frames += wire.until(is_icmp6(136))
    wire.send(arp("10.244.1.7", SERVER))
    frames += wire.until(is_arp_reply(SERVER))
    answers = [f for f in frames if is_icmp6(136)(f) and f[62:78] == router.packed]
    assert {f[80:86].hex(":") for f in answers} == {GATEWAY_MAC}
    assert len(answers) == 2


def test_duplicate_address_detection_for_ipv6_is_not_answered(served: tuple[Pod, Wire]) -> None:
    _, wire = served
    own = IPv6Address("fd00:10:244:1::7")
    group = IPv6Address(b"\xff\x02" + b"\0" * 9 + b"\x01\xff" + own.packed[13:])
    question = bytes.fromhex("8700000000000000") + own.packed
    wire.send(icmp6(IPv6Address("::"), group, question, b"\x33\x33" + group.packed[12:]))
    wire.send(arp("10.244.1.7", SERVER))
    frames = wire.until(is_arp_reply(SERVER))
    wire.send(arp("10.244.1.7", "10.244.1.1"))
    frames += wire.until(is_arp_reply("10.244.1.1"))
    assert not [f for f in frames if is_icmp6(136)(f)]


def test_masquerade_serves_any_mac_and_advertises_itself(dual: Pod) -> None:
    dual.ok("prepare", "--binding", "masquerade")
    guest = dual.plug_guest()
    guest.run("ip link set eth0 address 0a:58:00:00:00:99")
    with closing(Wire(guest, "eth0")) as wire:
        dual.serve()
        discover = udp4("0.0.0.0", "255.255.255.255", (68, 67), dhcp(MessageType.DISCOVER))
        frame, offer = exchange(wire, discover)
        assert (str(offer.yiaddr), str(offer.address(54))) == ("10.0.2.2", "10.0.2.1")
        assert offer.options[3] == IPv4Address("10.0.2.1").packed
        # The kernel has the address and a closed port would say so to a renewal.
        renew = dhcp(MessageType.REQUEST, ciaddr="10.0.2.2")
        to = mac("02:00:00:00:00:00")
        wire.send(udp4("10.0.2.2", "10.0.2.1", (68, 67), renew, to))
        frames = wire.until(is_dhcp)
        assert reply(frames[-1]).kind is MessageType.ACK
        wire.send(arp("10.0.2.2", "10.0.2.1"))
        frames += wire.until(is_arp_reply("10.0.2.1"))
        assert not [f for f in frames if f[12:14] == b"\x08\x00" and f[23] == 1]
        group = bytes.fromhex("333300000002")
        wire.send(icmp6(GUEST6, IPv6Address("ff02::2"), bytes.fromhex("8500000000000000"), group))
        advert = wire.until(is_icmp6(134))[-1]
        assert IPv6Address(advert[22:38]) == IPv6Address("fe80::ff:fe00:0")
        assert b"\x01\x01" + to in advert[54:]
        assert frame[6:12] == advert[6:12] == to


# ---- the server as a process


def status(process: subprocess.Popen[str]) -> dict[str, str]:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("user", [None, "107", "0"])
def test_serve_gives_up_its_privileges(dual: Pod, user: str | None) -> None:
    dual.ok("prepare")
    process = dual.serve(*(["--user", user] if user else []))
    now = status(process)
    assert set(now["Uid"].split()) == set(now["Gid"].split()) == {user or "65534"}
    assert now["Groups"] == ""
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(now[name], 16) == 0, name
    assert now["NoNewPrivs"] == "1"


def test_serve_as_a_user_with_ambient_capabilities_gives_them_up(dual: Pod) -> None:
    """The usual container: a plain user that was given two capabilities."""
    # pytest's own folders are root's alone.
    with tempfile.TemporaryDirectory(prefix="pfl") as folder:
        dual.state_dir = Path(folder)
        dual.ok("prepare")
        for path in (dual.state_dir, dual.state_dir / "state.json"):
            os.chown(path, 107, 107)
        process = serve_as_plain_user(dual)
    assert process.stderr is not None
    now = status(process)
    assert now["Uid"].split() == ["107"] * 4
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(now[name], 16) == 0, name


def serve_as_plain_user(dual: Pod) -> subprocess.Popen[str]:
    caps = "+net_raw,+net_bind_service"
    command = ["setpriv", "--reuid=107", "--regid=107", "--clear-groups", f"--inh-caps={caps}"]
    command += [f"--ambient-caps={caps}", *dual.command("serve")]
    process = dual.ns.call(lambda: subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1))
    dual.processes.append(process)
    assert process.stderr is not None
    line = process.stderr.readline()
    if " serving " not in line:
        pytest.fail(line)
    return process


@pytest.mark.parametrize("user", ["-1", "4294967295", "99999999999"])
def test_serve_as_a_user_that_cannot_be(dual: Pod, user: str) -> None:
    dual.ok("prepare")
    done = dual.launcher("serve", f"--user={user}")
    assert done.code == 2, done
    assert user in done.err.splitlines()[-1]


def test_serve_outlives_the_guests_link_going_down_but_not_away(served: tuple[Pod, Wire]) -> None:
    made, wire = served
    process = made.processes[0]
    made.ip("link set tap0 down")
    made.ip("link set tap0 up")
    discover = udp4("0.0.0.0", "255.255.255.255", (68, 67), dhcp(MessageType.DISCOVER))
    assert made.guest is not None
    wait_for(lambda: "LOWER_UP" in made.guest.run("ip link show eth0"))  # type: ignore[union-attr]
    assert exchange(wire, discover)[1].kind is MessageType.OFFER
    made.ip("link del tap0")
    wait_for(lambda: process.poll() is not None)
    assert process.returncode == 1
    assert process.stderr is not None
    assert "the guest's link is gone" in process.stderr.read().splitlines()[-1]


@pytest.mark.parametrize(("link", "what"), [("tap0", "guest's link"), ("k6t-eth0", "bridge")])
def test_serve_ends_when_a_link_that_was_down_goes_away(
    served: tuple[Pod, Wire], link: str, what: str
) -> None:
    """The kernel tells a socket that is bound to it that the link goes down, and no more."""
    made, _wire = served
    process = made.processes[0]

    def waits() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    before = waits()
    made.ip(f"link set {link} down")
    wait_for(lambda: waits() > before)
    made.ip(f"link del {link}")
    wait_for(lambda: process.poll() is not None)
    assert process.stderr is not None
    assert f"the {what} is gone" in process.stderr.read().splitlines()[-1]


def test_serve_ends_on_sigterm_and_leaves_the_guest_its_route(served: tuple[Pod, Wire]) -> None:
    """The router that was advertised is the pod's gateway, which goes on without the server."""
    made, wire = served
    assert wire.until(is_icmp6(134))[-1][60:62] != b"\0\0"
    made.processes[0].terminate()
    assert made.processes[0].wait(10) == 0
    wire.send(arp("10.244.1.7", "10.244.1.1"))
    assert not any(map(is_icmp6(134), wire.until(is_arp_reply("10.244.1.1"))))


def test_serve_without_prepare(dual: Pod) -> None:
    done = dual.launcher("serve")
    assert done.code == 2
    assert "run prepare first" in done.err
    dual.ok("prepare")
    dual.ip("link del tap0")
    done = dual.launcher("serve")
    assert done.code == 1
    assert "tap0" in done.err and "prepare" in done.err


def test_a_killed_server_started_again_gives_the_same_lease(served: tuple[Pod, Wire]) -> None:
    made, wire = served
    discover = udp4("0.0.0.0", "255.255.255.255", (68, 67), dhcp(MessageType.DISCOVER))
    first = exchange(wire, discover)[0]
    made.processes[0].kill()
    made.processes[0].wait(10)
    # The launcher's `prepare` finds a veth where the tap was, so only `serve` is run again.
    made.serve()
    assert exchange(wire, discover)[0] == first


def test_view_tells_differences(dual: Pod) -> None:
    """The reader itself: what the tests above compare is not always the same."""
    before = view(dual.ns)
    dual.ip("route del default")
    assert view(dual.ns) != before
