"""What a check costs while nothing has changed, and that every change is found by the next one."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cni.net import firewall
from cni.net.nfgen import nftables_generation, xtables_digest
from cni.net.ruleset import Family, Firewall
from flanneld.masquerade import FirewallSpec, render
from tests.netns.firewall_fixtures import (
    FORWARD_JUMP,
    MASQ_JUMP,
    RULES,
    SPEC,
    V4,
    Host,
    iptables,
    namespace,
    nftables,
    recorded_host,
)


@pytest.fixture
def make_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Host]]:
    with namespace() as node:
        yield lambda kind: recorded_host(node, kind, tmp_path, monkeypatch)


@pytest.fixture(params=["nf_tables", "legacy"])
def host(request: pytest.FixtureRequest, make_host: Callable[[str], Host]) -> Host:
    """A node where `iptables` is of either kind."""
    return make_host(request.param)


@dataclass
class Node:
    """A host and what keeps the rules there."""

    host: Host
    manager: Firewall

    def check(self) -> tuple[bool, int]:
        """Whether a check had to change something, and how many programs it started."""
        self.host.forget()
        changed = self.host.ensure(self.manager)
        return changed, len(self.host.started())


@pytest.fixture(params=["nf_tables", "legacy", "nft"])
def node(request: pytest.FixtureRequest, make_host: Callable[[str], Host]) -> Node:
    """A node whose rules are in place: written by the first check, found in order by the second."""
    by_nft = request.param == "nft"
    made = Node(make_host("nf_tables" if by_nft else request.param), nftables() if by_nft else iptables())
    assert made.check()[0]
    changed, programs = made.check()
    assert not changed
    assert programs, "our own change is a change: the check after it must be a full one"
    return made


def settled(host: Host, manager: Firewall) -> Node:
    """The same for a manager of the caller's choice."""
    made = Node(host, manager)
    made.check()
    made.check()
    assert made.check() == (False, 0)
    return made


def test_while_nothing_changes_no_program_is_started(node: Node) -> None:
    for _ in range(3):
        assert node.check() == (False, 0)


def test_a_restarted_daemon_needs_one_full_check(node: Node) -> None:
    restarted = iptables() if "-S" in node.host.started()[0] else nftables()
    again = Node(node.host, restarted)
    changed, programs = again.check()
    assert not changed
    assert programs
    assert not node.host.writes()
    assert again.check() == (False, 0)


def test_an_idle_check_costs_a_fraction_of_a_millisecond(node: Node) -> None:
    def seconds() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    def cost(checks: int) -> float:
        before = seconds()
        for _ in range(checks):
            assert not node.manager.ensure(RULES)
        return (seconds() - before) / checks

    idle_s = node.host.ns.call(lambda: min(cost(50) for _ in range(4)))
    print(f"{idle_s * 1e6:.0f} us of CPU for each check")
    # A thousandth of a core is 5 ms for the 5 s between two checks; a single program takes 1.5 ms.
    assert idle_s < 0.001


def test_one_request_covers_every_chain_of_both_families(
    make_host: Callable[[str], Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = settled(make_host("nf_tables"), iptables())
    asked = []

    def counted() -> int | None:
        asked.append(nftables_generation())
        return asked[-1]

    monkeypatch.setattr(firewall, "nftables_generation", counted)
    assert node.check() == (False, 0)
    assert len(asked) == 1
    assert asked[0]


SWAP = "-I FLANNEL-POSTRTG 2 -s 10.42.0.0/16 -d 10.42.1.0/24"
SAME_SIZE = "-R FLANNEL-POSTRTG 2 -s 10.42.1.0/24 -d 10.43.0.0/16"
COMMENT = '-m comment --comment "flanneld masq"'

# Lines for `iptables-restore --noflush`, by table.
DAMAGE = {
    "rule deleted": ("ip", "nat", "-D FLANNEL-POSTRTG 3"),
    "rule of IPv6 deleted": ("ip6", "nat", "-D FLANNEL-POSTRTG 3"),
    "forward rule deleted": ("ip", "filter", "-D FLANNEL-FWD 1"),
    "forward rule of IPv6 deleted": ("ip6", "filter", "-D FLANNEL-FWD 1"),
    "chain flushed": ("ip", "nat", "-F FLANNEL-POSTRTG"),
    "chain deleted": (
        "ip",
        "nat",
        f"{MASQ_JUMP.replace('-A', '-D')}\n-F FLANNEL-POSTRTG\n-X FLANNEL-POSTRTG",
    ),
    "rule of another inserted": ("ip", "nat", "-I FLANNEL-POSTRTG -s 10.1.0.0/16 -j RETURN"),
    "rule of another appended": ("ip6", "filter", "-A FLANNEL-FWD -j DROP"),
    "one address in a rule": ("ip", "nat", f"{SAME_SIZE} {COMMENT} -j RETURN"),
    "order": ("ip", "nat", f"-D FLANNEL-POSTRTG 3\n{SWAP} {COMMENT} -j RETURN"),
    "jump deleted": ("ip", "nat", MASQ_JUMP.replace("-A", "-D")),
    "jump twice": ("ip", "nat", MASQ_JUMP),
    "forward jump twice": ("ip6", "filter", FORWARD_JUMP.replace("-A FORWARD", "-I FORWARD 1")),
    "another jump": ("ip", "nat", "-I POSTROUTING 1 -o lo -j FLANNEL-POSTRTG"),
}


def iptables_state(host: Host) -> list[str]:
    return [
        line
        for program in ("iptables", "ip6tables")
        for table in ("nat", "filter")
        for line in host.ns.run(f"{program} -t {table} -S").splitlines()
    ]


@pytest.mark.parametrize("what", DAMAGE)
def test_every_change_of_our_iptables_rules_is_found_by_the_next_check(host: Host, what: str) -> None:
    node = settled(host, iptables())
    before = iptables_state(host)
    family, table, lines = DAMAGE[what]
    host.ns.run(f"{family}tables-restore --noflush", f"*{table}\n{lines}\nCOMMIT\n")
    assert iptables_state(host) != before
    assert node.check()[0]
    assert iptables_state(host) == before
    assert node.check()[1] > 0
    assert node.check() == (False, 0)


NFT_DAMAGE = {
    "rule deleted": "delete rule ip flannel-ipv4 forward handle {handle}",
    "chain flushed": "flush chain ip flannel-ipv4 postrtg",
    "chain deleted": "delete chain ip6 flannel-ipv6 forward",
    "rule of another": "insert rule ip6 flannel-ipv6 postrtg accept",
    "one address in a rule": "replace rule ip flannel-ipv4 forward handle {handle} "
    "ip saddr 10.43.0.0/16 accept",
    "order": "delete rule ip flannel-ipv4 forward handle {handle}\n"
    "add rule ip flannel-ipv4 forward ip saddr 10.42.0.0/16 accept",
    "chain of another": "add chain ip flannel-ipv4 another",
    "policy": "add chain ip flannel-ipv4 forward {{ policy drop ; }}",
    "table deleted": "delete table ip flannel-ipv4",
    "table dormant": "add table ip flannel-ipv4 {{ flags dormant ; }}",
    "everything flushed": "flush ruleset",
}


@pytest.mark.parametrize("what", NFT_DAMAGE)
def test_every_change_of_our_nft_rules_is_found_by_the_next_check(
    make_host: Callable[[str], Host], what: str
) -> None:
    host = make_host("nf_tables")
    node = settled(host, nftables())
    before = host.ns.run("nft list ruleset")
    listing = host.ns.run("nft --handle list chain ip flannel-ipv4 forward").splitlines()
    (rule,) = [line for line in listing if "ip saddr 10.42.0.0/16 accept" in line]
    host.ns.run("nft -f -", NFT_DAMAGE[what].format(handle=rule.split()[-1]))
    assert host.ns.run("nft list ruleset") != before
    assert node.check()[0]
    assert host.ns.run("nft list ruleset") == before
    assert node.check()[1] > 0
    assert node.check() == (False, 0)


def test_nft_deletes_the_table_of_our_iptables_rules(make_host: Callable[[str], Host]) -> None:
    host = make_host("nf_tables")
    node = settled(host, iptables())
    before = iptables_state(host)
    host.ns.run("nft delete table ip nat")
    assert node.check()[0]
    assert iptables_state(host) == before


def test_a_jump_that_was_moved_is_looked_at_and_left_where_it_is(host: Host) -> None:
    host.iptables("-A FORWARD -s 192.0.2.1 -j ACCEPT")
    node = settled(host, iptables())
    first = FORWARD_JUMP.replace("-A FORWARD", "-I FORWARD 1")
    host.ns.run(
        "iptables-restore --noflush", f"*filter\n{FORWARD_JUMP.replace('-A', '-D')}\n{first}\nCOMMIT\n"
    )
    assert node.check()[1] > 0
    assert host.iptables("-S FORWARD")[1] == FORWARD_JUMP
    assert node.check() == (False, 0)


def test_a_rule_of_somebody_else_costs_one_full_check(node: Node) -> None:
    node.host.iptables("-A INPUT -s 192.0.2.1 -j ACCEPT")
    if isinstance(node.manager, firewall.Nftables):
        node.host.ns.run("nft add table inet other")
    changed, programs = node.check()
    assert not changed
    assert programs
    assert node.check() == (False, 0)


def test_traffic_changes_counters_and_no_mark(node: Node) -> None:
    for program in ("iptables", "ip6tables"):
        node.host.ns.run(f"{program} -A INPUT -i lo -j ACCEPT")
        node.host.ns.run(f"{program} -t nat -A POSTROUTING -o lo -j ACCEPT")
    node.check()
    assert node.check() == (False, 0)
    node.host.ns.run("ping -n -c 2 -i 0.01 127.0.0.1")
    node.host.ns.run("ping -n -c 2 -i 0.01 ::1")
    assert "      0        0" not in node.host.ns.run("iptables -nvxL INPUT").splitlines()[2]
    assert node.check() == (False, 0)


def test_other_rules_wanted_are_written_although_nobody_changed_any(node: Node) -> None:
    assert node.check() == (False, 0)
    without = render(replace(SPEC, random_fully=False))
    assert node.host.ensure(node.manager, without)
    assert not node.host.ensure(node.manager, without)
    assert node.host.ensure(node.manager)


def test_rules_of_one_family_are_checked_in_their_tables_only(make_host: Callable[[str], Host]) -> None:
    host = make_host("legacy")
    only = render(FirewallSpec(True, False, True, (V4,)))
    manager = iptables()
    for _ in range(2):
        host.ensure(manager, only)
    host.ip6tables("-A FORWARD -j ACCEPT")
    host.iptables("-A FORWARD -j ACCEPT")
    host.forget()
    assert not host.ensure(manager, only)
    assert host.started() == []


AFTER_LISTING = """#!/bin/sh
real/{program} "$@"
status=$?
case "$*" in *"{listed}"*) if rm {armed}; then {damage}; fi 2>/dev/null ;; esac
exit $status
"""


def change_right_after(host: Host, program: str, listed: str, damage: str) -> Callable[[], None]:
    """Make `damage` happen, once it is armed by a call, when `program` has just printed what it `listed`."""
    directory = host.log.parent
    armed, real = directory / "armed", directory / "real"
    text = AFTER_LISTING.format(program=program, listed=listed, armed=armed, damage=f"{real}/{damage}")
    directory.joinpath(program).write_text(text.replace("real/", f"{real}/", 1))
    return armed.touch


def test_a_change_between_two_reads_of_one_check_is_found_by_the_next(host: Host) -> None:
    node = settled(host, iptables())
    arm = change_right_after(host, "iptables", "-S FLANNEL-POSTRTG", "iptables -t nat -F FLANNEL-POSTRTG")
    host.ns.run("ip6tables -A INPUT -j ACCEPT")
    host.iptables("-t nat -A OUTPUT -j ACCEPT")
    intact = iptables_state(host)
    arm()
    assert not node.check()[0], "the chain was still whole when it was listed"
    assert iptables_state(host) != intact
    assert node.check()[0]
    assert iptables_state(host) == intact


def test_a_change_between_two_reads_of_one_nft_check_is_found_by_the_next(
    make_host: Callable[[str], Host],
) -> None:
    host = make_host("nf_tables")
    node = settled(host, nftables())
    arm = change_right_after(
        host, "nft", "list table ip flannel-ipv4", "nft flush chain ip flannel-ipv4 forward"
    )
    host.ns.run("nft add table inet other")
    intact = host.ns.run("nft list table ip flannel-ipv4")
    arm()
    assert not node.check()[0], "the chain was still whole when it was listed"
    assert host.ns.run("nft list table ip flannel-ipv4") != intact
    assert node.check()[0]
    assert host.ns.run("nft list table ip flannel-ipv4") == intact


def test_without_a_mark_every_check_is_a_full_one(node: Node) -> None:
    """The thread may not ask the kernel for marks, the programs it starts may do everything."""

    def checks() -> list[bool]:
        assert nftables_generation() is None
        assert xtables_digest(Family.IPV4, "nat") is None
        return [node.manager.ensure(RULES) for _ in range(2)]

    assert node.check() == (False, 0)
    node.host.forget()
    assert node.host.ns.call_beside_privileged_children(checks) == [False, False]
    once = len(node.host.started()) // 2
    assert node.host.started() == node.host.started()[:once] * 2
    assert once
    if isinstance(node.manager, firewall.Nftables):
        node.host.ns.run("nft flush ruleset")
    else:
        node.host.iptables("-t nat -F")
    assert node.host.ns.call_beside_privileged_children(lambda: node.manager.ensure(RULES))


def test_the_marks_of_a_namespace_are_its_own(host: Host) -> None:
    node = settled(host, iptables())
    with namespace() as other:
        other.run("iptables -t nat -A POSTROUTING -j ACCEPT")
        other.run("nft add table inet other")
        assert node.check() == (False, 0)


def test_an_unknown_table_has_no_mark(host: Host) -> None:
    assert host.ns.call(lambda: xtables_digest(Family.IPV4, "no-such-table")) is None
    assert host.ns.call(lambda: xtables_digest(Family.IPV6, "n" * 40)) is None
