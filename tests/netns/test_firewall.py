"""Masquerade and forward rules in the kernel, by the real iptables (both kinds) and the real nft."""

from __future__ import annotations

import os
import re
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from cni.errors import ConfigError, KernelError
from cni.net import firewall
from cni.net.firewall import Nftables
from cni.net.ruleset import NftTable
from flanneld.masquerade import NFT_TABLES, FamilyRanges, FirewallSpec, render
from tests.netns.firewall_fixtures import (
    FORWARD_JUMP,
    MASQ_JUMP,
    RULES,
    SPEC,
    V4,
    V6,
    Host,
    Namespace,
    iptables,
    namespace,
    nftables,
    recorded_host,
    recorded_programs,
)

# The four jumps that kube-proxy keeps at the head of FORWARD, and one rule of an operator in nat.
KUBE_FORWARD = [
    f'-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes {what}" -j {chain}'
    for what, chain in [
        ("load balancer firewall", "KUBE-PROXY-FIREWALL"),
        ("forwarding rules", "KUBE-FORWARD"),
        ("service portals", "KUBE-SERVICES"),
        ("externally-visible service portals", "KUBE-EXTERNAL-SERVICES"),
    ]
]
OPERATOR = "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE"
FOREIGN_FILTER = "".join(f":{rule.split()[-1]} - [0:0]\n" for rule in KUBE_FORWARD) + "\n".join(KUBE_FORWARD)
FOREIGN = f"*filter\n{FOREIGN_FILTER}\nCOMMIT\n*nat\n{OPERATOR}\nCOMMIT\n"


@pytest.fixture
def node() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture(params=["nf_tables", "legacy"])
def host(
    request: pytest.FixtureRequest, node: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Host:
    """A node where `iptables` is of either kind, with rules of others in it."""
    made = recorded_host(node, request.param, tmp_path, monkeypatch)
    node.run("iptables-restore --noflush", FOREIGN)
    made.forget()
    return made


def test_iptables_listing_is_the_one_of_upstream(host: Host) -> None:
    assert host.ensure(iptables())
    assert host.iptables("-t nat -S POSTROUTING") == ["-P POSTROUTING ACCEPT", OPERATOR, MASQ_JUMP]
    assert host.iptables("-t nat -S FLANNEL-POSTRTG") == [
        "-N FLANNEL-POSTRTG",
        '-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN',
        '-A FLANNEL-POSTRTG -s 10.42.1.0/24 -d 10.42.0.0/16 -m comment --comment "flanneld masq" -j RETURN',
        '-A FLANNEL-POSTRTG -s 10.42.0.0/16 -d 10.42.1.0/24 -m comment --comment "flanneld masq" -j RETURN',
        '-A FLANNEL-POSTRTG ! -s 10.42.0.0/16 -d 10.42.1.0/24 -m comment --comment "flanneld masq" -j RETURN',
        '-A FLANNEL-POSTRTG -s 10.42.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq"'
        " -j MASQUERADE --random-fully",
        '-A FLANNEL-POSTRTG ! -s 10.42.0.0/16 -d 10.42.0.0/16 -m comment --comment "flanneld masq"'
        " -j MASQUERADE --random-fully",
    ]
    assert host.iptables("-S FORWARD") == ["-P FORWARD ACCEPT", *KUBE_FORWARD, FORWARD_JUMP]
    assert host.iptables("-S FLANNEL-FWD") == [
        "-N FLANNEL-FWD",
        '-A FLANNEL-FWD -s 10.42.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
        '-A FLANNEL-FWD -d 10.42.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
    ]


def test_ip6tables_listing_is_the_one_of_upstream(host: Host) -> None:
    host.ensure(iptables())
    assert host.ns.run("ip6tables -t nat -S POSTROUTING").splitlines()[1:] == [MASQ_JUMP]
    masq = '-m comment --comment "flanneld masq"'
    assert host.ns.run("ip6tables -t nat -S FLANNEL-POSTRTG").splitlines() == [
        "-N FLANNEL-POSTRTG",
        f"-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} -j RETURN",
        f"-A FLANNEL-POSTRTG -s fd00:10:244:1::/64 -d fd00:10:244::/56 {masq} -j RETURN",
        f"-A FLANNEL-POSTRTG -s fd00:10:244::/56 -d fd00:10:244:1::/64 {masq} -j RETURN",
        f"-A FLANNEL-POSTRTG ! -s fd00:10:244::/56 -d fd00:10:244:1::/64 {masq} -j RETURN",
        '-A FLANNEL-POSTRTG -s fd00:10:244::/56 ! -d ff00::/8 -m comment --comment "flanneld masq"'
        " -j MASQUERADE --random-fully",
        '-A FLANNEL-POSTRTG ! -s fd00:10:244::/56 -d fd00:10:244::/56 -m comment --comment "flanneld masq"'
        " -j MASQUERADE --random-fully",
    ]
    assert host.ns.run("ip6tables -S FORWARD").splitlines()[1:] == [FORWARD_JUMP]
    assert host.ns.run("ip6tables -S FLANNEL-FWD").splitlines()[1:] == [
        '-A FLANNEL-FWD -s fd00:10:244::/56 -m comment --comment "flanneld forward" -j ACCEPT',
        '-A FLANNEL-FWD -d fd00:10:244::/56 -m comment --comment "flanneld forward" -j ACCEPT',
    ]


def test_iptables_without_random_fully(host: Host) -> None:
    host.ensure(iptables(), render(replace(SPEC, random_fully=False)))
    assert host.iptables("-t nat -S FLANNEL-POSTRTG")[-1].endswith('"flanneld masq" -j MASQUERADE')


def test_a_second_pass_and_a_restarted_daemon_start_no_restore(host: Host) -> None:
    manager = iptables()
    host.ensure(manager)
    assert len(host.writes()) == 4
    assert not host.ensure(manager)
    assert not host.ensure(iptables())
    assert len(host.writes()) == 4


REORDER = "-t nat -R FLANNEL-POSTRTG 1 -s 10.42.1.0/24 -d 10.42.0.0/16 -j RETURN"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("-t nat -D FLANNEL-POSTRTG 3", id="rule deleted"),
        pytest.param(REORDER, id="rule replaced"),
        pytest.param("-t nat -I FLANNEL-POSTRTG -j ACCEPT", id="rule of another inserted"),
        pytest.param("-t nat -F FLANNEL-POSTRTG", id="chain flushed"),
        pytest.param("-F FLANNEL-FWD", id="forward chain flushed"),
    ],
)
def test_damage_in_a_chain_of_ours_is_repaired_in_place(host: Host, damage: str) -> None:
    manager = iptables()
    host.ensure(manager)
    host.ns.run("iptables -t nat -A POSTROUTING -o lo -j ACCEPT")
    before = host.iptables("-t nat -S"), host.iptables("-S")
    host.iptables(damage)
    assert (host.iptables("-t nat -S"), host.iptables("-S")) != before
    assert host.ensure(manager)
    assert (host.iptables("-t nat -S"), host.iptables("-S")) == before
    assert len(host.writes()) == 5


def test_deleted_and_doubled_jumps_are_repaired(host: Host) -> None:
    manager = iptables()
    host.ensure(manager)
    host.iptables("-t nat -F POSTROUTING")
    host.ns.run("iptables-restore --noflush", f"*filter\n{FORWARD_JUMP}\n-A FORWARD -j FLANNEL-FWD\nCOMMIT\n")
    assert host.ensure(manager)
    assert host.iptables("-t nat -S POSTROUTING")[1:] == [MASQ_JUMP]
    assert host.iptables("-S FORWARD")[1:] == [*KUBE_FORWARD, FORWARD_JUMP]


def test_a_flushed_host_gets_everything_back(host: Host) -> None:
    manager = iptables()
    host.ensure(manager)
    host.iptables("-t nat -F")
    host.iptables("-t nat -X")
    assert host.ensure(manager)
    assert host.iptables("-t nat -S POSTROUTING")[1:] == [MASQ_JUMP]
    assert len(host.iptables("-t nat -S FLANNEL-POSTRTG")) == 7


def test_another_subnet_replaces_the_rules_of_the_one_before(host: Host) -> None:
    host.ensure(iptables())
    moved = FamilyRanges(IPv4Network("10.99.0.0/16"), IPv4Network("10.99.7.0/24"))
    assert host.ensure(iptables(), render(replace(SPEC, families=(moved, V6))))
    assert not [rule for rule in host.iptables("-t nat -S") + host.iptables("-S") if "10.42." in rule]
    assert host.iptables("-t nat -S")[-5].startswith("-A FLANNEL-POSTRTG -s 10.99.7.0/24 -d 10.99.0.0/16 ")


def test_what_is_switched_off_at_a_restart_goes_away(host: Host) -> None:
    host.ensure(iptables())
    manager, only_forward = iptables(), render(FirewallSpec(False, True, True, (V4,)))
    assert host.ensure(manager, only_forward)
    assert host.iptables("-t nat -S POSTROUTING")[1:] == [OPERATOR]
    assert not [r for r in host.ns.run("ip6tables-save").splitlines() if "FLANNEL" in r]
    assert host.iptables("-S FORWARD")[-1] == FORWARD_JUMP

    host.log.write_text("")
    assert not host.ensure(manager, only_forward)
    assert host.log.read_text().splitlines() == [
        "iptables --wait 10 -t filter -S FORWARD",
        "iptables --wait 10 -t filter -S FLANNEL-FWD",
    ]


@pytest.fixture
def without_ip6tables(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewall, "_SBIN", ())
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    for program in tmp_path.glob("ip6tables*"):
        program.unlink()


@pytest.mark.usefixtures("without_ip6tables")
def test_without_ip6tables_the_rest_is_loaded_and_removed(host: Host) -> None:
    manager = iptables()
    with pytest.raises(ConfigError, match=r"^ip6tables is neither in PATH .*Debian package: iptables"):
        host.ensure(manager)
    assert len(host.writes()) == 2
    assert not host.ensure(iptables(), render(replace(SPEC, families=(V4,))))
    assert host.remove(iptables())
    assert not host.remove(iptables())


def test_iptables_without_privilege_says_so_in_one_line(host: Host) -> None:
    with pytest.raises(KernelError) as caught:
        host.ns.call(lambda: iptables().ensure(RULES), privileged=False)
    text = str(caught.value)
    assert "cannot list chain POSTROUTING of table nat: /" in text
    assert "ermi" in text and text.endswith("; run as root with CAP_NET_ADMIN")
    assert "\n" not in text


def test_a_refused_restore_leaves_the_table_as_it_was(host: Host) -> None:
    wrong = replace(RULES.chains[0], rules=(*RULES.chains[0].rules, "-A FLANNEL-POSTRTG -j NO-SUCH-TARGET"))
    before = host.iptables("-t nat -S")
    with pytest.raises(KernelError, match=r"^cannot write chain FLANNEL-POSTRTG of table nat: .*: exit \d: "):
        host.ensure(iptables(), replace(RULES, chains=(wrong, *RULES.chains[1:])))
    assert host.iptables("-t nat -S") == before
    assert host.iptables("-S FORWARD")[-1] == FORWARD_JUMP, "the other chains are loaded all the same"


def test_from_iptables_to_nftables_and_back_leaves_nothing_of_the_other(host: Host) -> None:
    before = host.iptables("-t nat -S"), host.iptables("-S")
    by_iptables, by_nft = iptables(), nftables()
    host.ensure(by_iptables)

    assert host.remove(iptables())
    assert (host.iptables("-t nat -S"), host.iptables("-S")) == before
    assert not [r for r in host.ns.run("ip6tables-save").splitlines() if "FLANNEL" in r]
    assert host.ensure(by_nft)
    assert not host.remove(iptables())

    assert host.remove(nftables())
    assert "flannel" not in host.ns.run("nft list tables")
    assert host.ensure(by_iptables)
    assert not host.remove(nftables())
    assert (host.iptables("-t nat -S POSTROUTING"), host.iptables("-S FORWARD")[-1]) == (
        ["-P POSTROUTING ACCEPT", OPERATOR, MASQ_JUMP],
        FORWARD_JUMP,
    )


def test_removal_frees_a_chain_that_others_lead_to(host: Host) -> None:
    host.ensure(iptables())
    host.iptables("-A KUBE-FORWARD -j FLANNEL-FWD")
    assert host.remove(iptables())
    assert not [rule for rule in host.iptables("-S") if "FLANNEL" in rule]


def test_nft_listing_is_the_one_of_upstream(node: Namespace) -> None:
    assert node.call(lambda: nftables().ensure(RULES))
    assert node.run("nft list chain ip flannel-ipv4 postrtg") == (
        "table ip flannel-ipv4 {\n"
        "\tchain postrtg {\n"
        '\t\tcomment "chain to manage traffic masquerading by flannel"\n'
        "\t\ttype nat hook postrouting priority srcnat; policy accept;\n"
        "\t\tmeta mark 0x00004000 return\n"
        "\t\tip saddr 10.42.1.0/24 ip daddr 10.42.0.0/16 return\n"
        "\t\tip saddr 10.42.0.0/16 ip daddr 10.42.1.0/24 return\n"
        "\t\tip saddr != 10.42.1.0/24 ip daddr 10.42.0.0/16 return\n"
        "\t\tip saddr 10.42.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random\n"
        "\t\tip saddr != 10.42.0.0/16 ip daddr 10.42.0.0/16 masquerade fully-random\n"
        "\t}\n"
        "}\n"
    )
    assert node.run("nft list chain ip flannel-ipv4 forward") == (
        "table ip flannel-ipv4 {\n"
        "\tchain forward {\n"
        '\t\tcomment "chain to accept flannel traffic"\n'
        "\t\ttype filter hook forward priority filter; policy accept;\n"
        "\t\tip saddr 10.42.0.0/16 accept\n"
        "\t\tip daddr 10.42.0.0/16 accept\n"
        "\t}\n"
        "}\n"
    )


def test_nft_tables_carry_their_comments_and_ipv6_its_own_rules(node: Namespace) -> None:
    node.call(lambda: nftables().ensure(RULES))
    assert '\tcomment "rules for flannel-ipv4"\n' in node.run("nft list table ip flannel-ipv4")
    assert node.run("nft list table ip6 flannel-ipv6") == (
        "table ip6 flannel-ipv6 {\n"
        '\tcomment "rules for flannel-ipv6"\n'
        "\tchain postrtg {\n"
        '\t\tcomment "chain to manage traffic masquerading by flannel"\n'
        "\t\ttype nat hook postrouting priority srcnat; policy accept;\n"
        "\t\tmeta mark 0x00004000 return\n"
        "\t\tip6 saddr fd00:10:244:1::/64 ip6 daddr fd00:10:244::/56 return\n"
        "\t\tip6 saddr fd00:10:244::/56 ip6 daddr fd00:10:244:1::/64 return\n"
        "\t\tip6 saddr != fd00:10:244:1::/64 ip6 daddr fd00:10:244::/56 return\n"
        "\t\tip6 saddr fd00:10:244::/56 ip6 daddr != ff00::/8 masquerade fully-random\n"
        "\t\tip6 saddr != fd00:10:244::/56 ip6 daddr fd00:10:244::/56 masquerade fully-random\n"
        "\t}\n"
        "\n"
        "\tchain forward {\n"
        '\t\tcomment "chain to accept flannel traffic"\n'
        "\t\ttype filter hook forward priority filter; policy accept;\n"
        "\t\tip6 saddr fd00:10:244::/56 accept\n"
        "\t\tip6 daddr fd00:10:244::/56 accept\n"
        "\t}\n"
        "}\n"
    )


def test_nft_makes_both_tables_for_one_family(node: Namespace) -> None:
    node.call(lambda: nftables().ensure(render(replace(SPEC, families=(V4,)))))
    assert "chain" not in node.run("nft list table ip6 flannel-ipv6")


def test_a_second_nft_pass_writes_nothing(
    node: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = nftables()
    node.call(lambda: manager.ensure(RULES))
    log = recorded_programs(tmp_path, {"nft": "nft"})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert not node.call(lambda: manager.ensure(RULES))
    assert log.read_text().splitlines() == [f"nft --stateless list table {table}" for table in NFT_TABLES]


def test_tables_that_vanish_after_every_transaction_are_written_each_time(
    node: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = recorded_programs(tmp_path, {"nft": "nft"})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    manager = nftables()
    vanishing = replace(RULES, nft=RULES.nft + "delete table ip6 flannel-ipv6\n")
    for _ in range(2):
        node.call(lambda: manager.ensure(vanishing))
    assert log.read_text().splitlines().count("nft -f -") == 2


def test_an_nft_that_prints_rules_in_another_way_loads_them_once_more(
    node: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = recorded_host(node, "nf_tables", tmp_path, monkeypatch)
    host.ensure(nftables())
    host.forget()
    manager, foreign = nftables(), replace(RULES, nft_listing="table ip flannel-ipv4 { # of tomorrow\n}\n")
    assert not host.ensure(manager, foreign), "loaded, but nothing differs"
    assert not host.ensure(manager, foreign)
    assert host.writes() == ["nft -f -"]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("flush chain ip flannel-ipv4 postrtg", id="chain flushed"),
        pytest.param("insert rule ip flannel-ipv4 postrtg accept", id="rule inserted"),
        pytest.param("add rule ip6 flannel-ipv6 forward drop", id="rule appended"),
        pytest.param("add chain ip flannel-ipv4 another", id="chain added"),
        pytest.param("delete table ip6 flannel-ipv6", id="table deleted"),
        pytest.param("flush ruleset", id="everything deleted"),
        pytest.param(
            "delete chain ip flannel-ipv4 postrtg\n"
            "add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority 50 ; }",
            id="other priority",
        ),
    ],
)
def test_damage_in_a_table_of_ours_is_repaired(node: Namespace, damage: str) -> None:
    node.run("nft -f -", "add table inet other\nadd chain inet other c\nadd rule inet other c accept\n")
    manager = nftables()
    node.call(lambda: manager.ensure(RULES))
    before = [node.run(f"nft list table {table}") for table in NFT_TABLES]
    node.run("nft -f -", damage)
    foreign = "table inet other" in node.run("nft list tables")
    assert node.call(lambda: manager.ensure(RULES))
    assert [node.run(f"nft list table {table}") for table in NFT_TABLES] == before
    assert ("table inet other" in node.run("nft list tables")) == foreign
    assert not node.call(lambda: manager.ensure(RULES))


def test_tables_left_by_upstream_with_other_chains_are_taken_over(node: Namespace) -> None:
    node.run(
        "nft -f -",
        "add table ip flannel-ipv4\n"
        "add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority 90 ; policy accept ; }\n"
        "add rule ip flannel-ipv4 postrtg ip saddr 10.1.0.0/16 masquerade\n",
    )
    assert node.call(lambda: nftables().ensure(RULES))
    assert "10.1.0.0" not in node.run("nft list ruleset")
    assert "priority srcnat" in node.run("nft list chain ip flannel-ipv4 postrtg")


def test_nft_without_privilege_says_so_in_one_line(node: Namespace) -> None:
    with pytest.raises(KernelError) as caught:
        node.call(lambda: nftables().ensure(RULES), privileged=False)
    text = str(caught.value)
    assert text.startswith("cannot write tables ip flannel-ipv4, ip6 flannel-ipv6: /")
    assert "not permitted" in text and text.endswith("; run as root with CAP_NET_ADMIN")
    assert "\n" not in text


def test_a_refused_nft_transaction_leaves_the_tables_as_they_were(node: Namespace) -> None:
    manager = nftables()
    node.call(lambda: manager.ensure(RULES))
    before = node.run("nft list ruleset")
    wrong = replace(RULES, nft=RULES.nft + "add rule ip flannel-ipv4 no-such-chain accept\n", nft_listing="")
    with pytest.raises(KernelError, match=r"^cannot write tables .*: exit 1: .*No such file"):
        node.call(lambda: manager.ensure(wrong))
    assert node.run("nft list ruleset") == before


def test_full_randomisation_is_probed_without_a_trace(node: Namespace) -> None:
    assert node.call(nftables().supports_random_fully)
    assert node.run("nft list ruleset") == ""
    assert not node.call(nftables().supports_random_fully, privileged=False)
    assert not node.call(Nftables([NftTable(V4.family, "not a name")]).supports_random_fully)
    assert iptables().supports_random_fully()


@dataclass
class Topology:
    """`pod` behind `node`, and `outside` beyond it, which also stands for another node's pod."""

    pod: Namespace
    node: Namespace
    outside: Namespace


@pytest.fixture
def topology() -> Iterator[Topology]:
    """The namespaces and their links.

    pod                     node                        outside
    10.42.1.5       10.42.1.1  192.0.2.1        192.0.2.2, 10.42.2.5
    eth0 ------------- veth0    eth0 ------------------ eth0
    fd00:10:244:1::5    ...:1::1  2001:db8::1   2001:db8::2, fd00:10:244:2::5
    """
    with ExitStack() as stack:
        made = Topology(*(stack.enter_context(namespace()) for _ in range(3)))
        pod, node, outside = made.pod, made.node, made.outside
        node.run(f"ip link add veth0 type veth peer name eth0 netns {pod.name}")
        node.run(f"ip link add eth0 type veth peer name eth0 netns {outside.name}")
        addresses = [
            (pod, "eth0", "10.42.1.5/24", "fd00:10:244:1::5/64"),
            (node, "veth0", "10.42.1.1/24", "fd00:10:244:1::1/64"),
            (node, "eth0", "192.0.2.1/24", "2001:db8::1/64"),
            (outside, "eth0", "192.0.2.2/24", "2001:db8::2/64"),
            (outside, "lo", "10.42.2.5/32", "fd00:10:244:2::5/128"),
        ]
        for ns, link, v4, v6 in addresses:
            ns.run(f"ip link set {link} up")
            ns.run(f"ip address add {v4} dev {link}")
            ns.run(f"ip address add {v6} dev {link} nodad")
        routes = [(pod, "default", "10.42.1.1", "fd00:10:244:1::1")]
        routes += [(outside, "default", "192.0.2.1", "2001:db8::1")]
        for ns, target, v4, v6 in routes:
            ns.run(f"ip route add {target} via {v4}")
            ns.run(f"ip -6 route add {target} via {v6}")
        node.run("ip route add 10.42.2.0/24 via 192.0.2.2")
        node.run("ip route add fd00:10:244:2::/64 via 2001:db8::2")
        node.sysctl("net.ipv4.ip_forward", 1)
        node.sysctl("net.ipv6.conf.all.forwarding", 1)
        yield made


def seen_source(topology: Topology, target: str) -> str:
    """The source address that `target`, an address of `outside`, sees when it talks with the pod."""
    return talk(topology.pod, topology.outside, target)


def talk(caller: Namespace, callee: Namespace, target: str, source: str = "") -> str:
    """Send a datagram to `target`, an address of `callee`, and back; the source address that `callee` saw."""
    kind = socket.AF_INET6 if ":" in target else socket.AF_INET
    receiver = callee.call(lambda: socket.socket(kind, socket.SOCK_DGRAM))
    sender = caller.call(lambda: socket.socket(kind, socket.SOCK_DGRAM))
    with receiver, sender:
        for each in (receiver, sender):
            each.settimeout(5)
        receiver.bind((target, 0))
        sender.bind((source, 0))
        sender.sendto(b"x", (target, receiver.getsockname()[1]))
        _, seen = receiver.recvfrom(1)
        receiver.sendto(b"y", seen)
        assert sender.recv(1) == b"y"
        return str(seen[0])


@pytest.mark.parametrize("kind", ["nf_tables", "legacy", "nft"])
def test_pods_are_masqueraded_towards_the_world_only(
    topology: Topology, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = recorded_host(topology.node, "nf_tables" if kind == "nft" else kind, tmp_path, monkeypatch)
    manager = nftables() if kind == "nft" else iptables()
    assert seen_source(topology, "192.0.2.2") == "10.42.1.5", "no rules, no masquerading"
    assert seen_source(topology, "2001:db8::2") == "fd00:10:244:1::5"
    assert host.ensure(manager)
    assert seen_source(topology, "192.0.2.2") == "192.0.2.1"
    assert seen_source(topology, "2001:db8::2") == "2001:db8::1"
    assert seen_source(topology, "10.42.2.5") == "10.42.1.5"
    assert seen_source(topology, "fd00:10:244:2::5") == "fd00:10:244:1::5"
    assert host.remove(manager)
    assert seen_source(topology, "192.0.2.2") == "10.42.1.5"


# What Docker 25 keeps in a node with one bridge of its own, which stand before anything appended later.
DOCKER = """*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""


def dropped(node: Namespace, program: str) -> int:
    """Packets that fell to FORWARD's policy."""
    head = node.run(f"{program} -nvxL FORWARD").splitlines()[0]
    found = re.search(r"policy DROP (\d+) packets", head)
    assert found is not None, head
    return int(found[1])


def is_blocked(topology: Topology, target: str) -> bool:
    """Whether a datagram from the pod to `target` falls to FORWARD's policy, instead of arriving."""
    kind, program = (socket.AF_INET6, "ip6tables") if ":" in target else (socket.AF_INET, "iptables")
    before = dropped(topology.node, program)
    receiver = topology.outside.call(lambda: socket.socket(kind, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
    sender = topology.pod.call(lambda: socket.socket(kind, socket.SOCK_DGRAM))
    with receiver, sender:
        receiver.bind((target, 0))
        sender.sendto(b"x", (target, receiver.getsockname()[1]))
        arrived = select.select([receiver], [], [], 0)[0]
        while not arrived and dropped(topology.node, program) == before:
            arrived = select.select([receiver], [], [], 0.05)[0]
        return not arrived


WORLD, PEERS = ("192.0.2.2", "2001:db8::2"), ("10.42.2.5", "fd00:10:244:2::5")


@pytest.mark.parametrize("kind", ["nf_tables", "legacy"])
def test_pods_are_reached_behind_the_rules_of_docker(
    topology: Topology, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = recorded_host(topology.node, kind, tmp_path, monkeypatch)
    for program in ("iptables", "ip6tables"):
        host.ns.run(f"{program}-restore --noflush", DOCKER)
    assert [is_blocked(topology, target) for target in (*WORLD, *PEERS)] == [True] * 4

    host.ensure(iptables())
    assert [seen_source(topology, target) for target in WORLD] == ["192.0.2.1", "2001:db8::1"]
    assert [seen_source(topology, target) for target in PEERS] == ["10.42.1.5", "fd00:10:244:1::5"]
    for peer, pod in zip(PEERS, ("10.42.1.5", "fd00:10:244:1::5"), strict=True):
        assert talk(topology.outside, topology.pod, pod, source=peer) == peer
    assert host.iptables("-S FORWARD")[0] == "-P FORWARD DROP", "the policy is not ours"
    assert host.iptables("-S FORWARD")[-1] == FORWARD_JUMP

    host.remove(iptables())
    assert is_blocked(topology, "192.0.2.2")


def test_nft_rules_cannot_lift_the_policy_of_another_table(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel asks every base chain of a hook: an accept in ours is no accept in that of iptables."""
    host = recorded_host(topology.node, "nf_tables", tmp_path, monkeypatch)
    host.ns.run("iptables-restore --noflush", DOCKER)
    host.ensure(nftables())
    assert is_blocked(topology, "10.42.2.5")
    host.iptables("-P FORWARD ACCEPT")
    assert seen_source(topology, "10.42.2.5") == "10.42.1.5"
