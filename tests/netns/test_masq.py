"""Masquerading: what a far host sees of a pod's packets, and what is left after every kind of DEL.

Go's bridge plugin (Debian's 1.1.1), `nft` and `iptables` are the references.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cni.errors import CniError
from cni.net import nft
from cni.plugins import masq
from cni.spec.address import Cidr, parse_cidr
from tests.netns.firewall_fixtures import recorded_programs
from tests.netns.nft_fixtures import BOTH, FAR_ADDRESS, NODE_ADDRESS, POD, Wired, text, wired

CHAIN = "CNI-68f1f1eeb62cad3d0bdd579c"  # of cbr0 and c1
EMPTY = """\
table inet flannel_cni {
	set ip-10.1.17.0-24 {
		type ipv4_addr
%s	}

	set ip6-fd00_1_0_17__-64 {
		type ipv6_addr
%s	}

	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		ip daddr 224.0.0.0/4 return comment "multicast 224.0.0.0/4"
		ip6 daddr ff00::/8 return comment "multicast ff00::/8"
		ip saddr @ip-10.1.17.0-24 ip daddr != 10.1.17.0/24 masquerade comment "pods of 10.1.17.0/24"
		ip6 saddr @ip6-fd00_1_0_17__-64 ip6 daddr != fd00:1:0:17::/64 masquerade \
comment "pods of fd00:1:0:17::/64"
	}
}
"""
# What knftables writes for upstream's plugin of version 1.6 and newer.
UPSTREAM_NFT = """
add table inet cni_plugins_masquerade { comment "Masquerading for plugins" ; }
add chain inet cni_plugins_masquerade masq_checks
add chain inet cni_plugins_masquerade postrouting { type nat hook postrouting priority 100 ; }
add rule inet cni_plugins_masquerade postrouting ip daddr == 224.0.0.0/4 return
add rule inet cni_plugins_masquerade postrouting ip6 daddr == ff00::/8 return
add rule inet cni_plugins_masquerade postrouting goto masq_checks
add rule inet cni_plugins_masquerade masq_checks ip saddr == 10.1.17.5 ip daddr != 10.1.17.0/24 masquerade \
comment "{c1}, net: n, if: eth0, id: c1"
add rule inet cni_plugins_masquerade masq_checks ip6 saddr == fd00::5 ip6 daddr != fd00::/64 masquerade \
comment "{c1}, net: n, if: eth0, id: c1"
add rule inet cni_plugins_masquerade masq_checks ip saddr == 10.1.17.6 ip daddr != 10.1.17.0/24 masquerade \
comment "917148ec47923f2e-0000000000000000, net: n, if: eth0, id: c2"
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Wired]:
    with wired(tmp_path) as made:
        yield made


def add(
    lab: Wired,
    addresses: list[Cidr],
    container: str = "c1",
    *,
    veth: str = "wire",
    ifname: str = "eth0",
    backend: str = "",
) -> None:
    lab.on(lambda host: masq.add(host, "cbr0", container, ifname, veth, addresses, backend))


def remove(
    lab: Wired,
    addresses: list[Cidr] | None,
    container: str = "c1",
    *,
    ifname: str = "eth0",
    network: str = "cbr0",
) -> None:
    lab.on(lambda host: masq.remove(host, network, container, ifname, addresses))


def seen(lab: Wired, address: Cidr, to: str = "") -> str:
    return lab.source_seen(lab.netns, address.family, text(address), to)


def owners(lab: Wired) -> dict[str, str]:
    """Address to container of every element, as `nft` lists them."""
    listing = json.loads(lab.netns.run("nft -j list ruleset"))["nftables"]
    elements = [one["elem"] for entry in listing for one in entry.get("set", {}).get("elem", [])]
    return {one["val"]: one["comment"].rpartition("id: ")[2] for one in elements}


# --- packets


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("backend", ["", "nftables", "iptables"])
def test_the_far_host_sees_the_node_instead_of_the_pod(lab: Wired, family: int, backend: str) -> None:
    pod = POD[family]
    other = parse_cidr(str(pod).replace("5/", "6/"))
    lab.own(pod)
    lab.own(other)
    assert seen(lab, pod) == text(pod)
    add(lab, [pod], backend=backend)
    assert seen(lab, pod) == NODE_ADDRESS[family]
    assert seen(lab, other) == text(other)
    remove(lab, [pod])
    assert seen(lab, pod) == text(pod)


@pytest.mark.parametrize("family", [4, 6])
def test_nothing_is_changed_within_the_subnet(lab: Wired, family: int) -> None:
    pod = POD[family]
    elsewhere = str(pod).replace("5/", "77/").partition("/")[0]
    lab.own(pod)
    prefix = 32 if family == 4 else 128
    nodad = "" if family == 4 else "nodad"
    lab.far.run(f"ip address add {elsewhere}/{prefix} dev lo {nodad}")
    lab.netns.run(f"ip route add {elsewhere}/{prefix} via {FAR_ADDRESS[family]}")
    add(lab, BOTH)
    assert seen(lab, pod, elsewhere) == text(pod)
    assert seen(lab, pod) == NODE_ADDRESS[family]


@pytest.mark.parametrize(("family", "group"), [(4, "239.1.2.3"), (6, "ff05::123")])
def test_multicast_keeps_its_source(lab: Wired, family: int, group: str) -> None:
    pod = POD[family]
    lab.own(pod)
    add(lab, BOTH)
    assert lab.multicast_source_seen(family, text(pod), group) == text(pod)


def test_a_real_pod(lab: Wired) -> None:
    pod = lab.node.namespace()
    result = lab.bridge("ADD", "c1", pod)
    addresses = [parse_cidr(one["address"]) for one in result["ips"]]  # type: ignore[attr-defined]
    veth = next(
        one["name"]
        for one in result["interfaces"]  # type: ignore[attr-defined]
        if one["name"].startswith("veth")
    )
    for address in addresses:
        assert lab.source_seen(pod, address.family, text(address)) == text(address)
    add(lab, addresses, veth=veth)
    for address in addresses:
        assert lab.source_seen(pod, address.family, text(address)) == NODE_ADDRESS[address.family]
    exists = {name.split("@")[0] for name in lab.netns.links()}
    assert lab.on(lambda host: masq.sweep(host, exists.__contains__)) == 0
    lab.bridge("DEL", "c1", pod)
    exists = set(lab.netns.links())
    assert lab.on(lambda host: masq.sweep(host, exists.__contains__)) == 2
    assert lab.ruleset() == ""


# --- what is in the kernel


def test_rules_and_elements_as_nft_lists_them(lab: Wired) -> None:
    add(lab, BOTH, veth="veth12345678")
    comment = "cb6e746fae1a4d6c-f4d01f2ef4b92245, host: veth12345678, if: eth0, net: cbr0, id: c1"
    elements = [f'\t\telements = {{ {text(pod)} comment "{comment}" }}\n' for pod in BOTH]
    assert lab.ruleset() == EMPTY % tuple(elements)
    remove(lab, BOTH)
    assert lab.ruleset() == EMPTY % ("", "")


def test_no_program_is_started(lab: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.posix_spawn", pytest.fail)
    add(lab, BOTH)
    remove(lab, BOTH)
    remove(lab, None)


def test_adding_again_is_no_error(lab: Wired) -> None:
    add(lab, BOTH)
    before = lab.ruleset()
    add(lab, BOTH)
    assert lab.ruleset() == before


def test_a_long_name_and_id(lab: Wired) -> None:
    network, container = "n" * 100, "f" * 64
    lab.on(lambda host: masq.add(host, network, container, "eth0", "vethfedcba98", BOTH))
    assert "host: vethfedcba98" in lab.ruleset()
    lab.on(lambda host: masq.remove(host, network, container[:-1], "eth0"))
    assert len(owners(lab)) == 2
    lab.on(lambda host: masq.remove(host, network, container, "eth0"))
    assert owners(lab) == {}


@pytest.mark.parametrize("known", [True, False], ids=["addresses", "comments"])
def test_only_what_is_the_containers_own_is_removed(lab: Wired, known: bool) -> None:
    other = parse_cidr("10.1.17.6/24")
    add(lab, BOTH)
    add(lab, [other], "c2")
    add(lab, [parse_cidr("10.1.17.7/24")], ifname="net1")
    remove(lab, BOTH if known else None)
    assert owners(lab) == {"10.1.17.6": "c2", "10.1.17.7": "c1"}
    remove(lab, [other] if known else None)
    assert owners(lab) == {"10.1.17.6": "c2", "10.1.17.7": "c1"}
    remove(lab, None, network="cbr1")
    assert owners(lab) == {"10.1.17.6": "c2", "10.1.17.7": "c1"}


def test_an_address_that_was_passed_on_stays_with_its_new_owner(lab: Wired) -> None:
    add(lab, BOTH, "old", veth="vethold")
    add(lab, [POD[4]], "new")
    assert owners(lab) == {text(POD[4]): "new", text(POD[6]): "old"}
    remove(lab, BOTH, "old")
    assert owners(lab) == {text(POD[4]): "new"}


def test_an_address_that_is_passed_on_during_a_del_stays(lab: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    add(lab, [POD[4]], "old")
    find = nft.find_elements

    def find_too_early(*arguments: object) -> object:
        found = find(*arguments)  # type: ignore[arg-type]
        monkeypatch.undo()
        add(lab, [POD[4]], "new")
        return found

    monkeypatch.setattr(nft, "find_elements", find_too_early)
    remove(lab, [POD[4]], "old")
    assert owners(lab) == {text(POD[4]): "new"}


def test_a_subnet_that_comes_at_the_same_time_keeps_its_rule(
    lab: Wired, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = parse_cidr("10.9.1.5/16")
    names = nft.set_names

    def names_too_early(*arguments: object) -> object:
        found = names(*arguments)  # type: ignore[arg-type]
        monkeypatch.undo()
        add(lab, [other], "c2")
        return found

    monkeypatch.setattr(nft, "set_names", names_too_early)
    add(lab, [POD[4]])
    for pod in (other, POD[4]):
        lab.own(pod)
        assert seen(lab, pod) == NODE_ADDRESS[4]


@pytest.mark.parametrize(
    "damage",
    [
        "flush chain inet flannel_cni postrouting",
        "delete table inet flannel_cni",
        "insert rule inet flannel_cni postrouting accept",
        "flush ruleset",
        "flush chain inet flannel_cni postrouting; delete set inet flannel_cni ip6-fd00_1_0_17__-64",
    ],
)
def test_damage_is_repaired_by_the_next_add(lab: Wired, damage: str) -> None:
    for pod in BOTH:
        lab.own(pod)
    add(lab, [parse_cidr("10.1.17.6/24")], "c2")
    add(lab, BOTH)
    for command in damage.split("; "):
        lab.netns.run(f"nft {command}")
    assert {seen(lab, pod) for pod in BOTH} != set(NODE_ADDRESS.values())
    add(lab, BOTH)
    assert [seen(lab, pod) for pod in BOTH] == list(NODE_ADDRESS.values())
    assert lab.ruleset().count(" masquerade ") == 2 and "accept\n" not in lab.ruleset()


def test_another_subnet_keeps_its_rule(lab: Wired) -> None:
    other = parse_cidr("10.9.1.5/16")
    lab.own(other)
    add(lab, [other], "c2")
    add(lab, BOTH)
    assert seen(lab, other) == NODE_ADDRESS[4]


def test_what_others_put_into_the_table_is_passed_over(lab: Wired) -> None:
    add(lab, BOTH)
    lab.netns.run("nft add set inet flannel_cni foreign { type ipv4_addr ; elements = { 10.1.17.5 } ; }")
    lab.netns.run("nft insert rule inet flannel_cni postrouting ip saddr { 10.9.9.1, 10.9.9.2 } accept")
    lab.own(POD[4])
    add(lab, BOTH)
    assert seen(lab, POD[4]) == NODE_ADDRESS[4]
    assert lab.on(lambda host: masq.sweep(host, lambda _: True)) == 0
    remove(lab, None)
    assert seen(lab, POD[4]) == text(POD[4])
    assert "foreign" in lab.ruleset()


# --- CHECK


def check(lab: Wired, container: str = "c1") -> None:
    lab.on(lambda host: masq.check(host, "cbr0", container, "eth0", BOTH))


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_check(lab: Wired, kind: str, backend: str) -> None:
    with pytest.raises(CniError, match=r"^Masquerade rules for 10.1.17.5/24 on interface eth0 not found"):
        check(lab)
    add(lab, BOTH, backend=backend)
    check(lab)
    with pytest.raises(CniError, match="Masquerade"):
        check(lab, "c2")
    remove(lab, BOTH)
    add(lab, [POD[4]], backend=backend)
    with pytest.raises(CniError, match="Masquerade rules for fd00:1:0:17::5/64"):
        check(lab)


@pytest.mark.parametrize(
    "damage",
    [
        "flush chain inet flannel_cni postrouting",
        "insert rule inet flannel_cni postrouting accept",
        "flush set inet flannel_cni ip6-fd00_1_0_17__-64",
    ],
)
def test_check_finds_damage(lab: Wired, damage: str) -> None:
    add(lab, BOTH)
    lab.netns.run(f"nft {damage}")
    with pytest.raises(CniError, match="Masquerade"):
        check(lab)


def test_check_takes_upstreams_nftables_rules(lab: Wired) -> None:
    identity = masq._identity("cbr0", "c1", "eth0")
    lab.node.output(["nft", "-f", "-"], {}, UPSTREAM_NFT.replace("{c1}", identity))
    check(lab)
    with pytest.raises(CniError, match="Masquerade"):
        check(lab, "c2")


# --- what nobody deleted


def test_sweep(lab: Wired) -> None:
    add(lab, BOTH, "dead", veth="vethdead")
    add(lab, [parse_cidr("10.1.17.9/24")], "live", veth="wire")
    exists = set(lab.netns.links())
    assert lab.on(lambda host: masq.sweep(host, exists.__contains__)) == 2
    assert owners(lab) == {"10.1.17.9": "live"}
    assert "fd00" not in lab.ruleset(), "the set of an unused subnet stays, with its rule"
    assert lab.on(lambda host: masq.sweep(host, exists.__contains__)) == 0
    lab.own(POD[4])
    add(lab, [POD[4]])
    assert seen(lab, POD[4]) == NODE_ADDRESS[4]
    remove(lab, None)
    remove(lab, None, "live")
    assert lab.on(lambda host: masq.sweep(host, exists.__contains__)) == 0
    assert lab.ruleset() == ""
    assert lab.on(lambda host: masq.sweep(host, exists.__contains__)) == 0


def test_what_somebody_else_put_into_a_set_is_left_alone(lab: Wired) -> None:
    add(lab, BOTH, "dead", veth="vethdead")
    lab.netns.run("nft add element inet flannel_cni ip-10.1.17.0-24 {10.1.17.50}")
    foreign = ["something", "a, host: , b", f"a, host: {16 * 'v'}, b"]
    for number, comment in enumerate(foreign, 51):
        element = f'{{ 10.1.17.{number} comment "{comment}" }}'
        command = ["nft", "add", "element", "inet", "flannel_cni", "ip-10.1.17.0-24", element]
        lab.node.output(command, {}, "")

    def live(veth: str) -> bool:
        assert veth == "vethdead", "the kernel would refuse another as no name"
        return False

    assert lab.on(lambda host: masq.sweep(host, live)) == 2
    listed = lab.ruleset()
    assert "dead" not in listed and all(f"10.1.17.{number}" in listed for number in range(50, 54))
    assert "ip saddr @ip-10.1.17.0-24" in listed and "fd00" not in listed


def test_addresses_that_changed_are_removed_as_well(lab: Wired) -> None:
    """The link has an address that was never masqueraded, and not the one that was."""
    add(lab, BOTH)
    add(lab, [parse_cidr("10.1.17.9/24")], "c2")
    remove(lab, [POD[6], parse_cidr("10.1.17.77/24")])
    assert owners(lab) == {"10.1.17.9": "c2"}
    remove(lab, [parse_cidr("10.1.17.9/24")])
    assert owners(lab) == {"10.1.17.9": "c2"}, "is another container's"
    remove(lab, [], "c2")
    assert owners(lab) == {}


def test_a_pod_that_is_added_during_a_sweep_stays(lab: Wired) -> None:
    add(lab, [POD[4]], "dead", veth="vethdead")
    other = parse_cidr("10.1.17.9/24")

    def live(veth: str) -> bool:
        if veth == "vethdead":
            add(lab, [other], "new", veth="vethnew")
        return veth == "vethnew"

    assert lab.on(lambda host: masq.sweep(host, live)) == 1
    assert owners(lab) == {text(other): "new"}
    lab.own(other)
    assert seen(lab, other) == NODE_ADDRESS[4]


def test_many_at_once_beside_sweeps(lab: Wired) -> None:
    """Pods of three subnets come and go in four threads while another one sweeps."""
    stop = threading.Event()

    def sweep_on() -> None:
        while not stop.is_set():
            lab.on(lambda host: masq.sweep(host, "live".__eq__))

    def come_and_go(thread: int) -> None:
        for n in range(12):
            address = [parse_cidr(f"10.{n % 3}.{thread}.{n + 1}/16")]
            add(lab, address, f"t{thread}n{n}", veth="live")
            if n % 4:
                remove(lab, address if n % 2 else None, f"t{thread}n{n}")

    with ThreadPoolExecutor(5) as threads:
        sweeping = threads.submit(sweep_on)
        try:
            for done in [threads.submit(come_and_go, n) for n in range(4)]:
                done.result()
        finally:
            stop.set()
        sweeping.result()
    assert sorted(owners(lab).values()) == sorted(f"t{thread}n{n}" for thread in range(4) for n in (0, 4, 8))
    rules = lab.on(lambda host: nft.rules(host.netfilter, masq.TABLE, masq.CHAIN))
    used = {parse_cidr(f"{address}/16").network() for address in owners(lab)}
    assert {rule.comment for rule in rules[2:]} >= {f"pods of {network}" for network in used}


# --- upstream's


@pytest.fixture(params=["nf_tables", "legacy"])
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let `iptables` be of one kind."""
    chosen: str = request.param
    if chosen == "legacy":
        directory = tmp_path / "bin"
        directory.mkdir()
        names = [f"{ip}tables{what}" for ip in ("ip", "ip6") for what in ("", "-restore", "-save")]
        recorded_programs(directory, dict.fromkeys(names, "xtables-legacy-multi"))
        monkeypatch.setenv("PATH", f"{directory}:/usr/sbin:/usr/bin:/sbin:/bin")
        monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "xtables.lock"))
    return chosen


def iptables_rules(lab: Wired) -> list[str]:
    """The rules and chains of both nat tables, but for the built-in chains."""
    found = []
    for ip in ("ip", "ip6"):
        lines = lab.node.run([f"{ip}tables", "-t", "nat", "-S"], {}, "").stdout.splitlines()
        found += [f"{ip} {line}" for line in lines if not line.startswith("-P")]
    return found


def test_our_iptables_rules_are_those_of_go(lab: Wired, kind: str) -> None:
    pod = lab.node.namespace()
    result = lab.bridge("ADD", "c1", pod, ipMasq=True)
    addresses = [parse_cidr(one["address"]) for one in result["ips"]]  # type: ignore[attr-defined]
    wanted = iptables_rules(lab)
    assert len(wanted) == 8, wanted
    remove(lab, addresses)
    assert iptables_rules(lab) == []
    add(lab, addresses, backend="iptables")
    assert iptables_rules(lab) == wanted
    add(lab, addresses, backend="iptables")
    assert iptables_rules(lab) == wanted
    lab.bridge("DEL", "c1", pod, ipMasq=True)
    assert iptables_rules(lab) == []


def test_rules_of_gos_dead_container_are_removed_without_its_addresses(lab: Wired, kind: str) -> None:
    pods = [lab.node.namespace(), lab.node.namespace()]
    lab.bridge("ADD", "c1", pods[0], ipMasq=True)
    before = iptables_rules(lab)
    lab.bridge("ADD", "c2", pods[1], ipMasq=True)
    lab.bridge("DEL", "c2", pods[1])  # without ipMasq Go leaves the rules
    assert len(iptables_rules(lab)) == 16
    remove(lab, None, "c2")
    assert iptables_rules(lab) == before
    remove(lab, None, "c1")
    assert iptables_rules(lab) == []


def test_gos_nftables_rules_are_removed(lab: Wired) -> None:
    identity = "917148ec47923f2e-f4d01f2ef4b92245"
    lab.node.output(["nft", "-f", "-"], {}, UPSTREAM_NFT.replace("{c1}", identity))
    remove(lab, None, network="n", ifname="eth1")
    assert lab.ruleset().count(identity) == 2
    remove(lab, None, network="n")
    assert identity not in lab.ruleset() and "10.1.17.6" in lab.ruleset()


def test_a_chain_that_another_rule_leads_to_is_reported(lab: Wired) -> None:
    add(lab, [POD[4]], backend="iptables")
    lab.netns.run("iptables -t nat -N OTHER")
    lab.netns.run(f"iptables -t nat -A OTHER -j {CHAIN}")
    with pytest.raises(nft.NftRefused, match=f"cannot delete chain ip nat {CHAIN}: device or resource busy"):
        remove(lab, [POD[4]])


def test_a_kernel_without_nf_tables(lab: Wired, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DEL and sweep succeed there, and legacy rules go; the kernel answers so for a subsystem it has not."""
    add(lab, BOTH, backend="iptables")
    before = iptables_rules(lab)
    monkeypatch.setattr(nft, "_SUBSYSTEM", 15)
    remove(lab, None)
    remove(lab, BOTH)
    assert lab.on(lambda host: masq.sweep(host, lambda _: False)) == 0
    assert iptables_rules(lab) == (before if kind == "nf_tables" else [])
    with pytest.raises(nft.NftMissing, match="the kernel has no nf_tables: invalid argument"):
        lab.on(lambda host: nft.present(host.netfilter, [nft.table_query(masq.TABLE)]))


def test_unknown_backend(lab: Wired) -> None:
    with pytest.raises(CniError, match=r'^unknown ipmasq backend "foo"$'):
        add(lab, BOTH, backend="foo")
    assert lab.ruleset() == ""


def test_iptables_is_not_installed(lab: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cni.plugins.xtables._SBIN", ())
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(CniError, match=r"^failed to locate iptables: "):
        add(lab, BOTH, backend="iptables")
