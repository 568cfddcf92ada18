"""The bridge plugin, ours beside Go's, against the kernel.

    node namespace                    pod namespace
cni0 10.1.17.1/24 ---- vethXXXXXXXX ---- eth0 10.1.17.2/24

A test with the parameter `ours` only asks for what Debian's bridge 1.1.1 is too old for.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.bridge_fixtures import (
    ADDRESSES,
    BOTH,
    EACH_VERSION,
    EACH_WITH_CHECK,
    GATEWAYS,
    GO,
    OURS,
    RANGES,
    V4,
    V6,
    VERSIONS,
    Document,
    Rig,
    changed,
    masquerades,
    new_rig,
    normal_text,
    outside,
    reset,
    text_of,
)
from tests.netns.cni_fixtures import Namespace, pings, wait_for

OLD = ("0.1.0", "0.2.0")
MAC = "c2:11:22:33:44:55"
only_ours = pytest.mark.parametrize("subject", [OURS], ids=repr)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a rig runs with both plugins unless it says otherwise."""
    marked = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "rig" in metafunc.fixturenames and not any("subject" in names for names in marked):
        metafunc.parametrize("subject", BOTH, ids=repr)


@pytest.fixture
def rig(tmp_path: Path, subject: Any) -> Iterator[Rig]:
    with new_rig(tmp_path, subject) as rig:
        yield rig


# --- ADD and DEL in every version


@pytest.mark.parametrize("family", ["v4", "v6", "dual"])
@pytest.mark.parametrize(("subject", "version"), EACH_VERSION)
def test_add_and_del(rig: Rig, version: str, family: str) -> None:
    conf = rig.conf(family, version, mtu=1400, isDefaultGateway=True)
    result = rig.add(conf)
    assert result["cniVersion"] == version
    assert rig.pod.addresses("eth0") == ADDRESSES[family]
    assert rig.host.addresses("cni0") == GATEWAYS[family]
    ways = [(one["dst"], one["gateway"], one["dev"], one["protocol"]) for one in rig.routes()]
    assert ways == [("default", gateway.split("/")[0], "eth0", "boot") for gateway in GATEWAYS[family]]
    assert all(pings(rig.pod, gateway.split("/")[0]) for gateway in GATEWAYS[family])
    addresses_of_the_result(result, version, family)
    if version not in OLD:
        interfaces_of_the_result(result, rig)

    mac = rig.link("cni0")["address"]
    for _ in range(2):
        rig.delete(conf)
        assert (rig.pod.links(), rig.node.veths(), rig.node.reservations()) == (["lo"], [], {})
    assert (rig.link("cni0")["address"], rig.host.addresses("cni0")) == (mac, GATEWAYS[family])


def addresses_of_the_result(result: Document, version: str, family: str) -> None:
    default = {"v4": "0.0.0.0/0", "v6": "::/0"}
    keys = {"v4": "ip4", "v6": "ip6"}
    routes, ips = [], []
    for one in ("v4", "v6"):
        if one in (family, family.replace("dual", one)):
            gateway = GATEWAYS[one][0].split("/")[0]
            route = {"dst": default[one], "gw": gateway}
            ip: Document = {"interface": 2, "address": ADDRESSES[one][0], "gateway": gateway}
            if version in OLD:
                assert result[keys[one]] == {"ip": ip["address"], "gateway": gateway, "routes": [route]}
            routes.append(route)
            ips.append({"version": one[1], **ip} if version.startswith("0.") else ip)
    if version not in OLD:
        assert (result["ips"], result["routes"]) == (ips, routes)


def interfaces_of_the_result(result: Document, rig: Rig) -> None:
    assert result["interfaces"] == [
        {"name": "cni0", "mac": rig.link("cni0")["address"]},
        {"name": rig.veth(), "mac": rig.link(rig.veth())["address"]},
        {"name": "eth0", "mac": rig.link("eth0", rig.pod)["address"], "sandbox": rig.pod.path},
    ]


def variety(rig: Rig) -> dict[str, Document]:
    """Configurations whose results show all that a result can hold."""
    routes = [{"dst": "10.1.0.0/16"}, {"dst": "10.9.0.0/16", "gw": "10.1.17.20"}, {"dst": "fd00:1::/48"}]
    return {
        "plain": {},
        "no gateway": {"isGateway": False},
        "default gateway": {"isDefaultGateway": True, "isGateway": False},
        "routes": {"ipam": rig.ipam([V4, V6], routes=routes), "isDefaultGateway": True},
        "default route of one's own": {
            "ipam": rig.ipam([V4], routes=[{"dst": "0.0.0.0/0", "gw": "10.1.17.9"}]),
            "isDefaultGateway": True,
        },
        "gateway of one's own": {"ipam": rig.ipam([[{"subnet": "10.1.17.0/24", "gateway": "10.1.17.77"}]])},
        "dns": {"dns": {"nameservers": ["1.1.1.1"], "search": ["x", "y"], "options": ["ndots:2"]}},
        "dns of empty lists": {"dns": {"nameservers": [], "domain": "", "search": ["x"]}},
        "other case, null, unknown": {"ISGATEWAY": True, "Mtu": 1400, "vlan": None, "future": {"a": [1]}},
        "name of the bridge": {"bridge": "br-x.1", "hairpinMode": True},
    }


@pytest.mark.parametrize("version", GO.versions)
def test_results_are_those_of_go(tmp_path: Path, version: str) -> None:
    """Printed to the byte; from 1.0.0 on the order of keys and an empty dns depend on Go's release."""
    with new_rig(tmp_path, OURS) as rig:
        for name, keys in variety(rig).items():
            conf = {**rig.conf("dual", version), **keys}
            texts = []
            for by in BOTH:
                texts.append(normal_text(rig.printed(conf, by, rig.pod), rig.pod))
                rig.delete(conf, by=by)
                for file in rig.node.store.iterdir():
                    file.unlink()
                rig.host.run(f"ip link delete {conf.get('bridge', 'cni0')}")
            if version == "1.0.0":
                theirs, ours = (without_empty_dns(rig, text) for text in texts)
                assert ours == theirs, name
            else:
                assert texts[1] == texts[0], name


def without_empty_dns(rig: Rig, text: str) -> Document:
    return {key: value for key, value in json.loads(text).items() if (key, value) != ("dns", {})}


RESOLV_CONF = (
    "# a comment\nnameserver 10.96.0.10\nsearch a.example b.example\ndomain example\noptions ndots:5\n"
)


OF_RESOLV_CONF = {
    "nameservers": ["10.96.0.10"],
    "domain": "example",
    "search": ["a.example", "b.example"],
    "options": ["ndots:5"],
}


@only_ours
@pytest.mark.parametrize(
    ("dns", "expected"),
    [
        (None, OF_RESOLV_CONF),
        ({}, OF_RESOLV_CONF),
        ({"nameservers": None}, OF_RESOLV_CONF),
        ({"nameservers": ["1.1.1.1"]}, {"nameservers": ["1.1.1.1"]}),
        ({"domain": "x"}, {"domain": "x"}),
        ({"search": []}, {}),
    ],
)
@pytest.mark.parametrize("version", ["0.2.0", "0.4.0", "1.1.0"])
def test_dns_of_the_netconf_replaces_that_of_resolvconf(
    rig: Rig, version: str, dns: Document | None, expected: Document
) -> None:
    """As a whole, if any of its members is given. Go's 1.1.1 drops IPAM's in any case."""
    resolv_conf = rig.node.root / "resolv.conf"
    resolv_conf.write_text(RESOLV_CONF)
    ipam = rig.ipam([V4], resolvConf=str(resolv_conf))
    result = rig.add(rig.conf(version=version, ipam=ipam, dns=dns))
    assert result.get("dns", {}) == expected
    assert ("dns" in result) is (version != "1.1.0" or expected != {})


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_newer_results_have_their_keys_sorted(tmp_path: Path, version: str) -> None:
    with new_rig(tmp_path, OURS) as rig:
        for keys in variety(rig).values():
            conf = {**rig.conf("dual", version), **keys}
            text = rig.printed(conf, OURS, rig.pod)
            assert text == json.dumps(json.loads(text), indent=4, sort_keys=True)
            rig.delete(conf)


ATTRIBUTES = {"dst": "10.1.0.0/16", "gw": "10.1.17.9", "mtu": 1400, "priority": 7, "table": 254, "scope": 0}


@only_ours
@pytest.mark.parametrize("version", VERSIONS)
def test_attributes_of_routes(rig: Rig, version: str) -> None:
    """Only destination and gateway before 0.3.0; from there on all, also a 0 that was given."""
    result = rig.add(rig.conf(version=version, ipam=rig.ipam([V4], routes=[ATTRIBUTES])))
    routes = result["ip4"]["routes"] if version in OLD else result["routes"]
    first_two = {"dst": "10.1.0.0/16", "gw": "10.1.17.9"}
    assert routes == ([first_two] if version in OLD else [ATTRIBUTES])


@pytest.mark.parametrize(("subject", "version"), EACH_VERSION)
def test_three_ranges(rig: Rig, version: str) -> None:
    """One IPv4 and two IPv6 addresses, which results before 0.3.0 cannot hold."""
    second = "fd00:2::/64"
    conf = rig.conf(version=version, ipam=rig.ipam([V4, V6, [{"subnet": second}]]))
    if version in OLD:
        text = f"CNI version {version} does not support more than 1 address per family"
        assert text_of(rig.refused("ADD", conf)) == text
        if rig.subject is GO:
            assert text_of(rig.refused("DEL", conf)) == text
        else:
            rig.delete(conf)  # what was never added can be taken down
        assert rig.node.reservations() == {}
        return
    result = rig.add(conf)
    wanted = [*ADDRESSES["dual"], "fd00:2::2/64"]
    assert [one["address"] for one in result["ips"]] == wanted
    assert sorted(rig.pod.addresses("eth0")) == sorted(wanted)
    assert sorted(rig.host.addresses("cni0")) == sorted([*GATEWAYS["dual"], "fd00:2::1/64"])
    rig.delete(conf)
    assert rig.node.reservations() == {}


@pytest.mark.parametrize(("subject", "version"), EACH_VERSION)
def test_layer_2(rig: Rig, version: str) -> None:
    conf = rig.conf(version=version, ipam=None, isGateway=None)
    if version in OLD:
        assert text_of(rig.refused("ADD", conf)) == "cannot convert: no valid IP addresses"
    else:
        result = rig.add(conf)
        assert "ips" not in result and "routes" not in result
        interfaces_of_the_result(result, rig)
        assert (rig.pod.addresses("eth0"), rig.host.addresses("cni0"), rig.routes()) == ([], [], [])
        assert "UP" in rig.link("eth0", rig.pod)["flags"]
    rig.delete(conf)
    assert (rig.pod.links(), rig.node.veths()) == (["lo"], [])


# --- what ADD does to the kernel


def test_the_links(rig: Rig) -> None:
    result = rig.add(rig.conf("dual", mtu=1400))
    inner, outer, bridge = rig.link("eth0", rig.pod), rig.link(rig.veth()), rig.link("cni0")
    assert [one["mtu"] for one in (inner, outer, bridge)] == [1400, 1400, 1400]
    assert [one["linkinfo"]["info_kind"] for one in (inner, outer, bridge)] == ["veth", "veth", "bridge"]
    assert (inner["link_index"], outer["link_index"]) == (outer["ifindex"], inner["ifindex"])
    assert outer["master"] == "cni0" and outer.get("txqlen", 0) == 0
    assert [one["operstate"] for one in (inner, outer, bridge)] == ["UP", "UP", "UP"]
    assert rig.port(rig.veth())["state"] == "forwarding"
    assert (bridge["promiscuity"], bridge["linkinfo"]["info_data"]["vlan_filtering"]) == (0, 0)
    assert rig.veth() == result["interfaces"][1]["name"] and len(rig.veth()) == 12


@pytest.mark.parametrize("mtu", [None, 0, -1])
def test_without_an_mtu_the_kernel_chooses(rig: Rig, mtu: int | None) -> None:
    rig.add(rig.conf(mtu=mtu))
    assert [rig.link("eth0", rig.pod)["mtu"], rig.link("cni0")["mtu"]] == [1500, 1500]


def test_the_addresses(rig: Rig) -> None:
    rig.add(rig.conf("dual"))
    both = {
        netns.name: [
            (one["local"], one.get("broadcast"), one.get("label"), one["valid_life_time"] == 2**32 - 1)
            for link in netns.ip(f"address show dev {device} scope global")
            for one in link.get("addr_info", [])
            if one
        ]
        for netns, device in ((rig.pod, "eth0"), (rig.host, "cni0"))
    }
    assert both[rig.pod.name] == [
        ("10.1.17.2", "10.1.17.255", "eth0", True),
        ("fd00:1:0:17::2", None, None, True),
    ]
    assert both[rig.host.name] == [
        ("10.1.17.1", "10.1.17.255", "cni0", True),
        ("fd00:1:0:17::1", None, None, True),
    ]


def test_no_address_of_the_pod_is_tentative(rig: Rig) -> None:
    rig.add(rig.conf("dual"))
    assert rig.pod.ip("-6 address show dev eth0 scope global tentative") in ([], [{}])


@only_ours
def test_enabledad_waits_until_the_address_is_settled(rig: Rig) -> None:
    rig.add(rig.conf("dual", enabledad=True))
    assert rig.pod.ip("-6 address show dev eth0 scope global tentative") in ([], [{}])
    names = ("accept_dad", "enhanced_dad")
    assert [rig.sysctl(f"ipv6/conf/eth0/{name}", rig.pod) for name in names] == ["1", "1"]


@only_ours
def test_enabledad_finds_a_duplicate(rig: Rig) -> None:
    other = rig.node.namespace()
    rig.add(rig.conf("v6", ipam=None), "c0", netns=other)
    other.run("ip address add fd00:1:0:17::2/64 dev eth0 nodad")
    error = text_of(rig.refused("ADD", rig.conf("v6", enabledad=True)))
    text = "link eth0 has address fd00:1:0:17::2 in DADFAILED state"
    assert error == f'failed to settle addresses for "eth0": {text}'
    assert rig.node.reservations() == {}


def test_the_sysctls_of_the_pod(rig: Rig) -> None:
    rig.add(rig.conf("v4"))
    assert rig.sysctl("ipv6/conf/eth0/accept_dad", rig.pod) == "0"
    assert rig.sysctl("ipv4/conf/eth0/arp_notify", rig.pod) == "1"


@only_ours
def test_ipv6_is_switched_on_in_the_pod(rig: Rig) -> None:
    for name in ("lo", "all", "default"):
        rig.pod.run(f"sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1")
    rig.add(rig.conf("dual"))
    assert rig.sysctl("ipv6/conf/eth0/disable_ipv6", rig.pod) == "0"
    assert rig.sysctl("ipv6/conf/lo/disable_ipv6", rig.pod) == "0"
    assert rig.sysctl("ipv6/conf/eth0/keep_addr_on_down", rig.pod) == "1"
    assert rig.pod.addresses("eth0") == ADDRESSES["dual"]


def test_the_sysctls_of_the_node(rig: Rig) -> None:
    for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        rig.host.run(f"sysctl -qw {name}=0")
    rig.add(rig.conf("v4", isGateway=False))
    assert rig.sysctl("ipv4/ip_forward") == "0"
    assert rig.sysctl("ipv6/conf/cni0/accept_ra") == "0"
    assert rig.sysctl(f"ipv6/conf/{rig.veth()}/accept_ra") == "0"
    assert rig.host.addresses("cni0") == []


@pytest.mark.parametrize(("family", "forwarding"), [("v4", "10"), ("v6", "01"), ("dual", "11")])
def test_a_gateway_forwards(rig: Rig, family: str, forwarding: str) -> None:
    for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        rig.host.run(f"sysctl -qw {name}=0")
    rig.add(rig.conf(family))
    assert rig.sysctl("ipv4/ip_forward") + rig.sysctl("ipv6/conf/all/forwarding") == forwarding


def test_routes(rig: Rig) -> None:
    routes = [
        {"dst": "10.1.0.0/16"},
        {"dst": "10.9.0.0/16", "gw": "10.1.17.20"},
        {"dst": "fd00:1::/48"},
        {"dst": "fd00:9::/48", "gw": "fd00:1:0:17::20"},
    ]
    rig.add(rig.conf(ipam=rig.ipam([V4, V6], routes=routes)))
    found = [(one["dst"], one["gateway"], one["table"], one["scope"], one["type"]) for one in rig.routes()]
    assert found == [
        ("10.1.0.0/16", "10.1.17.1", "main", "global", "unicast"),
        ("10.9.0.0/16", "10.1.17.20", "main", "global", "unicast"),
        ("fd00:1::/48", "fd00:1:0:17::1", "main", "global", "unicast"),
        ("fd00:9::/48", "fd00:1:0:17::20", "main", "global", "unicast"),
    ]


def test_a_route_without_any_gateway_is_on_the_link(rig: Rig) -> None:
    """host-local always names one, so this is asked of another IPAM plugin."""
    stub = rig.node.root / "bin"
    stub.mkdir()
    answer = '{"cniVersion":"1.0.0","ips":[{"address":"10.1.17.5/24"}],"routes":[{"dst":"10.1.0.0/16"}]}'
    (stub / "stub").write_text(
        f"#!/bin/sh\necho $CNI_COMMAND >> {stub}/calls\ncat > {stub}/stdin\necho '{answer}'\n"
    )
    (stub / "stub").chmod(0o755)
    rig.node.path = str(stub)
    conf = rig.conf(isGateway=False, ipam={"type": "stub", "its": "own"})
    result = rig.add(conf)
    assert result["ips"] == [{"interface": 2, "address": "10.1.17.5/24"}]
    (route,) = rig.routes()
    assert (route["dst"], "gateway" in route, route["dev"]) == ("10.1.0.0/16", False, "eth0")
    rig.delete(conf)
    assert (stub / "calls").read_text().split() == ["ADD", "DEL"]


@only_ours
def test_routes_with_priority_table_and_scope(rig: Rig) -> None:
    routes = [
        {"dst": "10.1.0.0/16", "priority": 77},
        {"dst": "10.2.0.0/16", "table": 99},
        {"dst": "10.3.0.0/16", "scope": 200},
        {"dst": "10.4.0.0/16", "mtu": 1300, "advmss": 1200},
        {"dst": "fd00:1::/48", "priority": 78, "table": 98},
    ]
    result = rig.add(rig.conf(version="1.1.0", ipam=rig.ipam([V4, V6], routes=routes)))
    found = {
        one["dst"]: (one.get("metric", 0), one["table"], one["scope"], "metrics" in one)
        for one in rig.routes()
    }
    assert found == {
        "10.1.0.0/16": (77, "main", "global", False),
        "10.2.0.0/16": (0, "99", "global", False),
        "10.3.0.0/16": (0, "main", "site", False),
        "10.4.0.0/16": (0, "main", "global", False),
        "fd00:1::/48": (78, "98", "global", False),
    }
    assert result["routes"] == routes


@only_ours
def test_neighbours_hear_of_the_pod(rig: Rig) -> None:
    """So that they forget who had the addresses before. Go's 1.1.1 sets arp_notify too late."""
    conf = rig.conf("dual")
    rig.add(conf, "c0", netns=rig.node.namespace())
    said = rig.node.root / "said"
    with said.open("w") as out:
        argv = rig.host.wrap(["tcpdump", "-i", "cni0", "-lnpvv", "arp or icmp6"])
        listener = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "listening on" in said.read_text())
        result = rig.add(conf)
        assert result["ips"][0]["address"] == "10.1.17.3/24"
        wait_for(lambda: "who-has 10.1.17.3 tell 10.1.17.3" in said.read_text())
        wait_for(lambda: "[icmp6 sum ok] ICMP6, neighbor advertisement" in said.read_text())
        assert "tgt is fd00:1:0:17::3, Flags [override]" in said.read_text()
    finally:
        listener.terminate()
        listener.wait(timeout=10)


def test_the_host_forgets_who_had_the_address(rig: Rig) -> None:
    """Its neighbour table holds the new MAC, or none, but not that of the pod before."""
    conf = rig.conf("dual")
    rig.add(conf)
    for address in ("10.1.17.2", "fd00:1:0:17::2"):
        assert pings(rig.host, address)
    rig.delete(conf)
    reset(rig)
    other = rig.node.namespace()
    rig.add(conf, "c2", netns=other)
    for address in ("10.1.17.2", "fd00:1:0:17::2"):
        assert pings(rig.host, address)
    known = {one["dst"]: one.get("lladdr") for one in rig.host.ip("neighbour show dev cni0")}
    mac = rig.link("eth0", other)["address"]
    assert (known["10.1.17.2"], known["fd00:1:0:17::2"]) == (mac, mac)


# --- the bridge


def test_an_existing_bridge_is_used_as_it_is(rig: Rig) -> None:
    rig.host.run(f"ip link add cni0 address {MAC} type bridge stp_state 0 ageing_time 12300")
    before = rig.link("cni0")
    assert before["flags"] == ["BROADCAST", "MULTICAST"]
    rig.add(rig.conf())
    after = rig.link("cni0")
    assert (after["ifindex"], after["address"], "UP" in after["flags"]) == (before["ifindex"], MAC, True)
    assert after["linkinfo"]["info_data"]["ageing_time"] == 12300


def test_the_bridges_address_stays_with_the_ports(rig: Rig) -> None:
    conf = rig.conf()
    rig.add(conf)
    bridge = rig.link("cni0")
    pods = [rig.node.namespace() for _ in range(3)]
    for number, pod in enumerate(pods):
        rig.add(conf, f"x{number}", netns=pod)
    for number, pod in enumerate(pods):
        rig.delete(conf, f"x{number}", netns=pod)
    rig.delete(conf)
    assert (rig.link("cni0")["address"], rig.link("cni0")["ifindex"]) == (
        bridge["address"],
        bridge["ifindex"],
    )


@pytest.mark.parametrize("mode", [True, False, None])
def test_hairpin(rig: Rig, mode: bool | None) -> None:
    rig.add(rig.conf(hairpinMode=mode))
    assert rig.port(rig.veth())["hairpin"] is bool(mode)
    assert rig.port(rig.veth())["isolated"] is False


@only_ours
@pytest.mark.parametrize("mode", [True, False])
def test_port_isolation(rig: Rig, mode: bool) -> None:
    conf = rig.conf(portIsolation=mode)
    rig.add(conf)
    other = rig.node.namespace()
    rig.add(conf, "c2", netns=other)
    assert [rig.port(name)["isolated"] for name in rig.node.veths()] == [mode, mode]
    assert pings(rig.pod, "10.1.17.1")
    assert pings(rig.pod, "10.1.17.3") is not mode


def test_promiscuous_mode(rig: Rig) -> None:
    rig.add(rig.conf(promiscMode=True))
    assert rig.link("cni0")["promiscuity"] == 1
    assert "PROMISC" in rig.link("cni0")["flags"]


def another(rig: Rig, subnet: str, **keys: Any) -> Document:
    return rig.conf(ipam=rig.ipam([[{"subnet": subnet}]]), **keys)


@pytest.mark.parametrize(
    ("family", "subnet", "gateway"),
    [("v4", "10.1.18.0/24", "10.1.18.1/24"), ("v6", "fd00:1:0:16::/63", "fd00:1:0:16::1/63")],
)
def test_a_second_gateway_address(rig: Rig, family: str, subnet: str, gateway: str) -> None:
    """Refused while a pod depends on the first; the bridge stays as it was."""
    rig.add(rig.conf(family))
    pod = rig.node.namespace()
    conf = another(rig, subnet)
    error = rig.refused("ADD", conf, "c2", netns=pod)
    text = f'failed to set bridge addr: "cni0" already has an IP address different from {gateway}'
    assert (error["code"], error["msg"]) == (999, text)
    assert rig.host.addresses("cni0") == GATEWAYS[family]
    assert set(rig.node.reservations().values()) == {"c1\r\neth0"}
    rig.delete(conf, "c2", netns=pod)
    rig.add({**conf, "forceAddress": True}, "c2", netns=pod)
    assert rig.host.addresses("cni0") == [gateway]


def test_a_second_gateway_of_another_ipv6_network(rig: Rig) -> None:
    rig.add(rig.conf("v6"))
    rig.add(another(rig, "fd00:2::/64"), "c2", netns=rig.node.namespace())
    assert sorted(rig.host.addresses("cni0")) == sorted([*GATEWAYS["v6"], "fd00:2::1/64"])


# --- MAC addresses


def macs(number: int) -> Document:
    """Sources of the container's MAC, the later ones win."""
    sources: Document = {"args": f"IgnoreUnknown=1;MAC={MAC[:-1]}1"}
    keys: Document = {}
    if number >= 2:
        keys["args"] = {"cni": {"mac": f"{MAC[:-1]}2"}}
    if number >= 3:
        keys["runtimeConfig"] = {"mac": f"{MAC[:-1]}3"}
    return {"keys": keys, **sources}


@pytest.mark.parametrize("version", ["0.3.0", "1.0.0"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_mac_that_was_asked_for(rig: Rig, version: str, number: int) -> None:
    sources = macs(number)
    result = rig.add(rig.conf(version=version, **sources["keys"]), args=sources["args"])
    assert rig.link("eth0", rig.pod)["address"] == result["interfaces"][2]["mac"] == f"{MAC[:-1]}{number}"


# --- masquerade and spoofing


@pytest.mark.parametrize("family", ["v4", "v6", "dual"])
@pytest.mark.parametrize(
    ("subject", "backend"),
    [
        pytest.param(GO, None, id="go"),
        *(pytest.param(OURS, one, id=f"ours-{one}") for one in (None, "iptables", "nftables")),
    ],
)
def test_masquerade(rig: Rig, family: str, backend: str | None) -> None:
    """The world outside has no route to the pods, so an answer proves it; pods see each other unchanged."""
    conf = rig.conf(family, ipMasq=True, ipMasqBackend=backend, isDefaultGateway=True)
    with outside(rig):
        plain = {key: value for key, value in conf.items() if not key.startswith("ipMasq")}
        rig.add(plain)
        targets = {"v4": ["192.0.2.2"], "v6": ["2001:db8::2"], "dual": ["192.0.2.2", "2001:db8::2"]}[family]
        assert not any(rig.pod.succeeds(f"ping -c 1 -W 1 {target}") for target in targets)
        rig.delete(plain)
        reset(rig)

        result = rig.add(conf)
        assert all(pings(rig.pod, target) for target in targets)
        assert all(masquerades(rig, address.split("/")[0]) for address in ADDRESSES[family])
        rig.delete({**conf, "prevResult": result})
        assert rig.traces() == []


def test_rules_of_the_iptables_backend(rig: Rig) -> None:
    backend = None if rig.subject is GO else "iptables"
    conf = rig.conf("dual", ipMasq=True, ipMasqBackend=backend)
    rig.add(conf)
    comment = '-m comment --comment "name: \\"cbr0\\" id: \\"c1\\""'
    chain = "CNI-68f1f1eeb62cad3d0bdd579c"
    for program, address, subnet, multicast in (
        ("iptables-save", "10.1.17.2/32", "10.1.17.0/24", "224.0.0.0/4"),
        ("ip6tables-save", "fd00:1:0:17::2/128", "fd00:1:0:17::/64", "ff00::/8"),
    ):
        lines = [line for line in rig.host.run(f"{program} -t nat").splitlines() if "CNI-" in line]
        assert lines == [
            f":{chain} - [0:0]",
            f"-A POSTROUTING -s {address} {comment} -j {chain}",
            f"-A {chain} -d {subnet} {comment} -j ACCEPT",
            f"-A {chain} ! -d {multicast} {comment} -j MASQUERADE",
        ]
    rig.delete(conf)
    assert rig.traces() == []


def test_no_masquerade_unasked(rig: Rig) -> None:
    rig.add(rig.conf("dual"))
    assert not any(masquerades(rig, address.split("/")[0]) for address in ADDRESSES["dual"])


def test_the_macspoof_check(rig: Rig) -> None:
    conf = rig.conf(macspoofchk=True)
    rig.add(conf)
    assert pings(rig.pod, "10.1.17.1")
    assert rig.firewall().count("macspoofchk-c1-eth0") == 4
    rig.pod.run(f"ip link set eth0 address {MAC}")
    rig.pod.run("ip neigh flush dev eth0")
    assert not rig.pod.succeeds("ping -c 1 -W 1 10.1.17.1")
    rig.delete(conf)
    assert "macspoofchk" not in rig.firewall() and "cni-br-iface" not in rig.firewall()


def test_the_macspoof_checks_of_two_pods_are_their_own(rig: Rig) -> None:
    conf = rig.conf(macspoofchk=True)
    other = rig.node.namespace()
    rig.add(conf)
    rig.add(conf, "c2", netns=other)
    rig.delete(conf)
    assert "macspoofchk-c1-eth0" not in rig.firewall()
    assert rig.firewall().count("macspoofchk-c2-eth0") == 4 and pings(other, "10.1.17.1")


# --- disableContainerInterface


@only_ours
def test_the_containers_link_stays_down_if_asked(rig: Rig) -> None:
    conf = rig.conf(ipam={}, isGateway=None, disableContainerInterface=True)
    rig.add(conf)
    assert "UP" not in rig.link("eth0", rig.pod)["flags"]
    rig.delete(conf)
    assert (rig.pod.links(), rig.node.veths()) == (["lo"], [])


# --- wrong input

IPAM_ROUTE = {"dst": "10.5.0.0/16", "gw": "10.99.1.1"}
NO_MAC = "failed to make veth pair: address zz: invalid MAC address"
# name: keys of the netconf, how it is called, the text (Go's 1.1.1 where that is another one).
WRONG: dict[str, tuple[Document, Document, str, str | None]] = {
    "hairpin and promisc": (
        {"hairpinMode": True, "promiscMode": True},
        {},
        "cannot set hairpin mode and promiscuous mode at the same time",
        "cannot set hairpin mode and promiscuous mode at the same time.",
    ),
    "vlan": ({"vlan": 5000}, {}, "invalid VLAN ID 5000 (must be between 0 and 4094)", None),
    "negative vlan": ({"vlan": -1}, {}, "invalid VLAN ID -1 (must be between 0 and 4094)", None),
    "no netns": (
        {},
        {"netns": "/nonexistent"},
        'failed to open netns "/nonexistent": failed to Statfs "/nonexistent": no such file or directory',
        None,
    ),
    "not a netns": (
        {},
        {"netns": "/usr"},
        'failed to open netns "/usr": unknown FS magic on "/usr": ef53',
        None,
    ),
    "not a bridge": (
        {"bridge": "lo"},
        {},
        'failed to create bridge "lo": "lo" already exists but is not a bridge',
        None,
    ),
    "unknown IPAM": (
        {"ipam": {"type": "nope"}},
        {},
        'failed to find plugin "nope" in path [/usr/lib/cni]',
        None,
    ),
    "unknown argument": ({}, {"args": "FOO=bar"}, 'ARGS: unknown args ["FOO=bar"]', None),
    "broken argument": ({}, {"args": "A=b=c"}, 'ARGS: invalid pair "A=b=c"', None),
    "trailing semicolon": ({}, {"args": "IgnoreUnknown=1;"}, 'ARGS: invalid pair ""', None),
    "MAC of CNI_ARGS": ({}, {"args": "MAC=zz;IgnoreUnknown=1"}, NO_MAC, None),
    "MAC of runtimeConfig": ({"runtimeConfig": {"mac": "zz"}}, {}, NO_MAC, None),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("subject", BOTH, ids=repr)
def test_wrong_input(rig: Rig, name: str) -> None:
    keys, how, text, older = WRONG[name]
    error = text_of(rig.refused("ADD", rig.conf(**keys), **how))
    if rig.subject is GO:
        assert error == (older or text)
    else:
        # Which file system it is on is not known where the shim opened it.
        assert error == text.removesuffix(": ef53")
    assert rig.node.reservations() == {}
    if rig.subject is OURS:
        assert (rig.pod.links(), rig.node.veths()) == (["lo"], [])


WRONG_FOR_US: dict[str, tuple[Document, str]] = {
    "IPAM without interface": (
        {"disableContainerInterface": True},
        "cannot use IPAM when DisableContainerInterface flag is set",
    ),
    "minID 0": ({"vlanTrunk": [{"minID": 0, "maxID": 5}]}, "incorrect trunk minID parameter"),
    "maxID": ({"vlanTrunk": [{"minID": 1, "maxID": 4095}]}, "incorrect trunk maxID parameter"),
    "id": ({"vlanTrunk": [{"id": 4095}]}, "incorrect trunk id parameter"),
    "order": ({"vlanTrunk": [{"minID": 6, "maxID": 5}]}, "minID is greater than maxID in trunk parameter"),
    "no minID": (
        {"vlanTrunk": [{"maxID": 5}]},
        "minID and maxID should be configured simultaneously, minID is missing",
    ),
    "no maxID": (
        {"vlanTrunk": [{"minID": 5}]},
        "minID and maxID should be configured simultaneously, maxID is missing",
    ),
    "backend": ({"ipMasq": True, "ipMasqBackend": "foo"}, 'unknown ipmasq backend "foo"'),
}


@only_ours
@pytest.mark.parametrize("name", WRONG_FOR_US)
def test_wrong_values_of_newer_keys(rig: Rig, name: str) -> None:
    keys, text = WRONG_FOR_US[name]
    assert text_of(rig.refused("ADD", rig.conf(**keys))) == text
    assert (rig.node.reservations(), rig.pod.links(), rig.node.veths()) == ({}, ["lo"], [])


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"mtu": 1450.5}, "mtu"),
        ({"mtu": "1450"}, "mtu"),
        ({"ipam": []}, "ipam"),
        ({"dns": {"nameservers": "x"}}, "nameservers"),
    ],
)
def test_wrong_types(rig: Rig, keys: Document, named: str) -> None:
    error = text_of(rig.refused("ADD", rig.conf(**keys)))
    assert error.startswith("failed to load netconf: ") and named in error
    assert "cni0" not in rig.host.links()


@pytest.mark.parametrize("name", ["", "abcdefghijklmnopqrst"])
def test_a_name_that_no_bridge_can_have(rig: Rig, name: str) -> None:
    error = rig.refused("ADD", rig.conf(bridge=name))
    assert error["code"] == (999 if rig.subject is GO else 7)
    assert error["msg"].startswith(f'failed to create bridge "{name}": ')


def test_an_unreachable_gateway_of_a_route(rig: Rig) -> None:
    """Found after IPAM: the address is released."""
    error = text_of(rig.refused("ADD", rig.conf(ipam=rig.ipam([V4], routes=[IPAM_ROUTE]))))
    assert error.startswith("failed to add route '")
    assert "via 10.99.1.1 dev eth0': network is unreachable" in error
    assert rig.node.reservations() == {}


def test_the_containers_link_exists(rig: Rig) -> None:
    conf = rig.conf()
    rig.add(conf)
    error = text_of(rig.refused("ADD", conf, "c2"))
    assert "container veth name" in error and error.endswith("already exists")
    assert set(rig.node.reservations().values()) == {"c1\r\neth0"}
    assert pings(rig.pod, "10.1.17.1")


def test_a_version_that_nobody_knows(rig: Rig) -> None:
    error = rig.refused("ADD", rig.conf(version="9.9.9"))
    supported = " ".join(f'"{one}"' for one in rig.subject.versions)
    details = f'config is "9.9.9", plugin supports [{supported}]'
    assert error == {"code": 1, "msg": "incompatible CNI versions", "details": details}


def test_vlan_without_the_kernels_help(rig: Rig) -> None:
    """This kernel has no VLAN filtering: a clear no, and nothing left behind once the runtime gave up."""
    conf = rig.conf(vlan=100)
    text_of(rig.refused("ADD", conf))
    rig.delete(conf)
    assert (rig.pod.links(), rig.node.veths(), rig.node.reservations()) == (["lo"], [], {})


@pytest.mark.parametrize("answer", ["", "{}", "[]", '{"cniVersion":"1.0.0","ips":[{"address":"no"}]}'])
def test_an_ipam_plugin_with_a_useless_answer(rig: Rig, answer: str) -> None:
    stub = rig.node.root / "bin"
    stub.mkdir()
    (stub / "stub").write_text(
        f"#!/bin/sh\necho $CNI_COMMAND >> {stub}/calls\ncat > /dev/null\necho '{answer}'\n"
    )
    (stub / "stub").chmod(0o755)
    rig.node.path = str(stub)
    error = rig.refused("ADD", rig.conf(ipam={"type": "stub"}))
    if answer == "{}":
        assert text_of(error) == "IPAM plugin returned missing IP config"
        assert (stub / "calls").read_text().split() == ["ADD", "DEL"]
    assert rig.pod.links() in (["lo"], ["eth0", "lo"] if rig.subject is GO else ["lo"])


# --- CHECK

# Go's CHECK takes a route without gateway for one that has none in the kernel either, and misses it.
ROUTES = [{"dst": "10.1.0.0/16", "gw": "10.1.17.1"}, {"dst": "fd00:1::/48", "gw": "fd00:1:0:17::1"}]


@pytest.mark.parametrize("family", ["v4", "v6", "dual"])
@pytest.mark.parametrize(("subject", "version"), EACH_WITH_CHECK)
def test_check_passes_after_add(rig: Rig, version: str, family: str) -> None:
    ipam = rig.ipam(RANGES[family], routes=ROUTES[1:] if family == "v6" else ROUTES[:1])
    conf = rig.conf(
        family, version, ipam=ipam, isDefaultGateway=True, ipMasq=True, hairpinMode=True, mtu=1400
    )
    result = rig.add(conf)
    assert rig.check(conf, result) is None
    rig.delete({**conf, "prevResult": result})
    assert rig.traces() == []


@only_ours
def test_check_passes_with_a_route_that_has_no_gateway_of_its_own(rig: Rig) -> None:
    """As flannel's configuration has it. ADD chose the gateway; Go's CHECK wants it spelled out."""
    conf = rig.conf("dual", ipam=rig.ipam([V4, V6], routes=[{"dst": "10.1.0.0/16"}, {"dst": "fd00:1::/48"}]))
    result = rig.add(conf)
    assert rig.check(conf, result) is None
    rig.pod.run("ip route delete 10.1.0.0/16")
    assert "10.1.0.0" in text_of(rig.check(conf, result))


def test_check_needs_a_version_that_has_it(rig: Rig) -> None:
    conf = rig.conf(version="0.3.1")
    error = rig.refused("CHECK", {**conf, "prevResult": rig.add(conf)})
    assert error == {"code": 1, "msg": "config version does not allow CHECK"}


def test_check_needs_a_prev_result(rig: Rig) -> None:
    conf = rig.conf()
    rig.add(conf)
    assert text_of(rig.refused("CHECK", conf)) == "Required prevResult missing"


POD, HOST = "pod", "host"
# What somebody does behind our back: where, the commands (VETH is the host end), part of the message.
DEVIATIONS: dict[str, tuple[str, list[str], str]] = {
    "no bridge": (HOST, ["ip link delete cni0"], "cni0"),
    "bridge is none": (HOST, ["ip link delete cni0", "ip link add cni0 type veth peer name x"], "cni0"),
    "MAC of the bridge": (
        HOST,
        [f"ip link set cni0 address {MAC}"],
        "Bridge interface cni0 Mac doesn't match: ",
    ),
    "promiscuous": (HOST, ["ip link set cni0 promisc on"], "cni0"),
    "no link": (POD, ["ip link delete eth0"], "eth0"),
    "link is no veth": (POD, ["ip link delete eth0", "ip link add eth0 type bridge"], "eth0"),
    "MAC of the link": (
        POD,
        ["ip link set eth0 down", f"ip link set eth0 address {MAC}", "ip link set eth0 up"],
        "Interface eth0 Mac ",
    ),
    "MAC of the host end": (HOST, [f"ip link set VETH address {MAC}"], "VETH"),
    "no master": (HOST, ["ip link set VETH nomaster"], ""),
    "other master": (
        HOST,
        ["ip link add other type bridge", "ip link set VETH master other"],
        "",
    ),
    "name of the host end": (
        HOST,
        ["ip link set VETH down", "ip link set VETH name renamed", "ip link set renamed up"],
        "",
    ),
    "no address": (
        POD,
        ["ip address delete 10.1.17.2/24 dev eth0", "ip address add 10.1.17.9/24 dev eth0"],
        "Failed to match addr 10.1.17.2/24 on interface eth0",
    ),
    "mask": (
        POD,
        ["ip address delete 10.1.17.2/24 dev eth0", "ip address add 10.1.17.2/25 dev eth0"],
        "Failed to match addr 10.1.17.2/24 on interface eth0",
    ),
    "no IPv6 address": (
        POD,
        ["ip address delete fd00:1:0:17::2/64 dev eth0"],
        "Failed to match addr fd00:1:0:17::2/64 on interface eth0",
    ),
    "no route of the prefix": (POD, ["ip route delete 10.1.17.0/24"], "eth0"),
    "no route": (POD, ["ip route delete 10.1.0.0/16"], "10.1.0.0"),
    "no IPv6 route": (POD, ["ip -6 route delete fd00:1::/48"], "fd00:1::"),
    "gateway of a route": (POD, ["ip route replace 10.1.0.0/16 via 10.1.17.9"], "10.1.0.0"),
    "no default route": (POD, ["ip route delete default"], ""),
}


def checked(rig: Rig, **keys: Any) -> tuple[Document, Document]:
    """A configuration with a bit of everything, and the result of its ADD."""
    conf = rig.conf(ipam=rig.ipam([V4, V6], routes=ROUTES), isDefaultGateway=True, mtu=1400, **keys)
    result = rig.add(conf)
    assert rig.check(conf, result) is None
    return conf, result


def damage(rig: Rig, where: str, commands: list[str]) -> str:
    """Run the commands, and return the name of the host end before."""
    veth = rig.veth()
    for command in commands:
        (rig.pod if where == POD else rig.host).run(command.replace("VETH", veth))
    return veth


@pytest.mark.parametrize("name", DEVIATIONS)
@pytest.mark.parametrize("subject", BOTH, ids=repr)
def test_check_finds(rig: Rig, name: str) -> None:
    conf, result = checked(rig)
    where, commands, text = DEVIATIONS[name]
    veth = damage(rig, where, commands)
    error = rig.check(conf, result)
    assert error is not None, "the deviation was not noticed"
    assert text.replace("VETH", veth) in text_of(error)


# The same for what upstream does not look at.
MORE: dict[str, tuple[str, list[str], str]] = {
    "no address of the bridge": (HOST, ["ip address delete 10.1.17.1/24 dev cni0"], "10.1.17.1/24"),
    "no IPv6 address of the bridge": (
        HOST,
        ["ip address delete fd00:1:0:17::1/64 dev cni0"],
        "fd00:1:0:17::1/64",
    ),
    "bridge down": (HOST, ["ip link set cni0 down"], "cni0"),
    "no forwarding": (HOST, ["sysctl -qw net.ipv4.ip_forward=0"], "forward"),
    "no IPv6 forwarding": (HOST, ["sysctl -qw net.ipv6.conf.all.forwarding=0"], "forward"),
    "no hairpin": (HOST, ["bridge link set dev VETH hairpin off"], "hairpin"),
    "isolated": (HOST, ["bridge link set dev VETH isolated on"], "solation"),
    "MTU": (POD, ["ip link set eth0 mtu 1500"], "1500"),
    "MTU of the host end": (HOST, ["ip link set VETH mtu 1300"], "1300"),
    "host end down": (HOST, ["ip link set VETH down"], "VETH"),
    "no masquerade": (HOST, ["nft flush ruleset"], "asquerade"),
}


@only_ours
@pytest.mark.parametrize(
    ("name", "backend"), [*((name, None) for name in MORE), ("no masquerade", "iptables")]
)
def test_check_also_finds(rig: Rig, name: str, backend: str | None) -> None:
    conf, result = checked(rig, hairpinMode=True, ipMasq=True, ipMasqBackend=backend)
    where, commands, text = MORE[name]
    veth = damage(rig, where, commands)
    error = rig.check(conf, result)
    assert error is not None, "the deviation was not noticed"
    assert text.replace("VETH", veth) in text_of(error)


@only_ours
def test_check_finds_that_the_link_is_down(rig: Rig) -> None:
    """Without routes: those go with the link."""
    conf = rig.conf(ipam=rig.ipam([V4]))
    result = rig.add(conf)
    rig.pod.run("ip link set eth0 down")
    error = rig.check(conf, result)
    assert error is not None and "eth0" in text_of(error)


@only_ours
def test_check_finds_that_the_macspoof_rules_are_gone(rig: Rig) -> None:
    conf, result = checked(rig, macspoofchk=True)
    rig.host.run("nft delete table bridge nat")
    error = rig.check(conf, result)
    assert error is not None and "spoof" in text_of(error)


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("interfaces.0.mac", MAC, "Bridge interface cni0 Mac doesn't match: "),
        ("interfaces.0.name", "br7", "Interface name missing "),
        ("interfaces.2.mac", MAC, "Interface eth0 Mac "),
        ("interfaces.2.sandbox", "/run/netns/other", "Sandbox in prevResult "),
        ("interfaces.2.name", "eth7", "Sandbox in prevResult "),
        ("interfaces.1.name", "veth00000000", ""),
        ("ips.0.address", "10.1.2.99/24", "Failed to match addr 10.1.2.99/24 on interface eth0"),
        ("routes.0.dst", "10.77.0.0/16", "10.77.0.0"),
    ],
)
def test_check_finds_that_prev_result_is_of_something_else(
    rig: Rig, path: str, value: str, text: str
) -> None:
    conf, result = checked(rig)
    error = rig.check(conf, changed(result, path, value))
    assert error is not None and text in text_of(error)


def test_check_asks_ipam(rig: Rig) -> None:
    conf, result = checked(rig)
    reset(rig)
    error = rig.check(conf, result)
    assert text_of(error) == "host-local: Failed to find address added by container c1"


def test_check_tolerates_what_chained_plugins_do(rig: Rig) -> None:
    """bandwidth lists a device of its own; tuning adds settings, addresses and routes come from others."""
    conf, result = checked(rig)
    rig.pod.run("ip address add 192.168.9.2/24 dev eth0")
    rig.pod.run("ip route add 172.30.0.0/16 via 192.168.9.1")
    rig.pod.run("ip link set eth0 promisc on")
    rig.pod.run("ip link add other type bridge")
    rig.host.run("ip address add 169.254.1.1/32 dev cni0")
    rig.host.run("ip link add ifb7 type bridge")
    mac = rig.link("ifb7")["address"]
    more = [*result["interfaces"], {"name": "ifb7", "mac": mac}]
    assert rig.check(conf, {**result, "interfaces": more}) is None


def test_check_needs_prev_result_of_the_same_kind(rig: Rig) -> None:
    conf, result = checked(rig)
    error = rig.check(conf, {**result, "cniVersion": "0.4.0"})
    assert error is not None and "could not parse prevResult" in text_of(error)


@only_ours
def test_check_tolerates_a_link_that_tuning_changed(rig: Rig) -> None:
    """It sets a MAC, and says so in its result; it sets a smaller MTU, and up to 1.0.0 says nothing."""
    conf, result = checked(rig)
    rig.pod.run(f"ip link set eth0 address {MAC}")
    rig.pod.run("ip link set eth0 mtu 1300")
    assert rig.check(conf, changed(result, "interfaces.2.mac", MAC)) is None


# --- STATUS and GC


@only_ours
def test_status(rig: Rig) -> None:
    conf = rig.conf(version="1.1.0")
    assert rig.call("STATUS", conf) is None
    no_directory = {**rig.ipam([V4]), "dataDir": f"{rig.node.root}/subnet.env"}
    assert rig.refused("STATUS", {**conf, "ipam": no_directory})["code"] == 50
    assert rig.refused("STATUS", {**conf, "ipam": rig.ipam([[]])})["code"] == 999


def test_status_and_gc_need_a_version_that_has_them(rig: Rig) -> None:
    for command in ("STATUS", "GC"):
        error = rig.refused(command, rig.conf())
        text = (
            "unknown CNI_COMMAND: " + command
            if rig.subject is GO
            else f"config version does not allow {command}"
        )
        assert error == {"code": 4 if rig.subject is GO else 1, "msg": text}


def other_pods(rig: Rig, count: int, conf: Document) -> list[Namespace]:
    pods = [rig.node.namespace() for _ in range(count)]
    for number, pod in enumerate(pods, 2):
        rig.add(conf, f"c{number}", netns=pod)
    return pods


@only_ours
def test_gc_frees_what_is_of_no_valid_attachment(rig: Rig) -> None:
    conf = rig.conf(version="1.1.0", ipMasq=True)
    rig.add(conf)
    lost, live = other_pods(rig, 2, conf)
    rig.node.forget(lost)
    wait_for(lambda: len(rig.node.veths()) == 2)
    valid = [{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c3", "ifname": "eth0"}]
    assert rig.call("GC", {**conf, "cni.dev/valid-attachments": valid}) is None
    assert sorted(rig.node.reservations()) == ["10.1.17.2", "10.1.17.4"]
    assert [masquerades(rig, f"10.1.17.{last}") for last in (2, 3, 4)] == [True, False, True]
    assert pings(live, "10.1.17.1") and pings(rig.pod, "10.1.17.1")


@only_ours
def test_gc_without_a_list_frees_nothing(rig: Rig) -> None:
    conf = rig.conf(version="1.1.0", ipMasq=True)
    rig.add(conf)
    assert rig.call("GC", conf) is None
    assert list(rig.node.reservations()) == ["10.1.17.2"] and masquerades(rig, "10.1.17.2")
