"""A node that changes between upstream's daemon and ours, or from one traffic manager to the other.

What upstream does is done here by the programs that it runs, with the lines that it gives them
(flannel v0.28, pkg/trafficmngr/iptables and nftables; its library knftables v0.0.18).
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from flanneld.masquerade import NFT_TABLES, FamilyRanges, render
from tests.netns.firewall_fixtures import (
    FORWARD_JUMP,
    MASQ_JUMP,
    RULES,
    SPEC,
    V4,
    V6,
    Host,
    iptables,
    namespace,
    nftables,
    recorded_host,
)

MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}
KUBE_PROXY = '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING'
FOREIGN = f"*nat\n:KUBE-POSTROUTING - [0:0]\n{KUBE_PROXY}\nCOMMIT\n"


@pytest.fixture
def make_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Host]]:
    with namespace() as node:

        def make(kind: str) -> Host:
            host = recorded_host(node, kind, tmp_path, monkeypatch)
            for program in ("iptables", "ip6tables"):
                host.ns.run(f"{program}-restore --noflush", FOREIGN)
            host.forget()
            return host

        yield make


@pytest.fixture(params=["nf_tables", "legacy"])
def host(request: pytest.FixtureRequest, make_host: Callable[[str], Host]) -> Host:
    """A node where `iptables` is of either kind, with a rule of kube-proxy in it."""
    return make_host(request.param)


class UpstreamIptables:
    """Upstream's iptables manager, of one family: bootstrap, periodic check, cleanup."""

    def __init__(self, host: Host, ranges: FamilyRanges) -> None:
        self.host = host
        self.program = f"{ranges.family.value}tables"
        network, subnet = ranges.network, ranges.subnet
        multicast = MULTICAST[network.version]
        masq, forward = '-m comment --comment "flanneld masq"', '-m comment --comment "flanneld forward"'
        own, fwd = "-A FLANNEL-POSTRTG", "-A FLANNEL-FWD"
        self.rules = {
            "nat": [
                f"-A POSTROUTING {masq} -j FLANNEL-POSTRTG",
                f"{own} -m mark --mark 0x4000/0x4000 {masq} -j RETURN",
                f"{own} -s {subnet} -d {network} {masq} -j RETURN",
                f"{own} -s {network} -d {subnet} {masq} -j RETURN",
                f"{own} ! -s {network} -d {subnet} {masq} -j RETURN",
                f"{own} -s {network} ! -d {multicast} {masq} -j MASQUERADE --random-fully",
                f"{own} ! -s {network} -d {network} {masq} -j MASQUERADE --random-fully",
            ],
            "filter": [
                f"-A FORWARD {forward} -j FLANNEL-FWD",
                f"{fwd} -s {network} {forward} -j ACCEPT",
                f"{fwd} -d {network} {forward} -j ACCEPT",
            ],
        }

    def start(self) -> None:
        for table, chain in (("nat", "FLANNEL-POSTRTG"), ("filter", "FLANNEL-FWD")):
            if not self.works(f"-t {table} -N {chain}"):
                self.host.ns.run(f"{self.program} -t {table} -F {chain}")
            self.bootstrap(table)

    def bootstrap(self, table: str) -> None:
        lines = []
        for rule in self.rules[table]:
            if self.has(table, rule):
                lines.append(rule.replace("-A", "-D", 1))
            lines.append(rule)
        payload = "\n".join([f"*{table}", *lines, "COMMIT", ""])
        self.host.ns.run(f"{self.program}-restore --noflush --wait", payload)

    def is_content(self) -> bool:
        """Upstream's periodic check of both rule sets; it looks for each rule by itself."""
        return all(self.has(table, rule) for table, rules in self.rules.items() for rule in rules)

    def clean_up(self) -> None:
        """What upstream does when it starts in nftables mode: both chains are looked for in `nat`."""
        for chain in ("FLANNEL-POSTRTG", "FLANNEL-FWD"):
            if self.works(f"-t nat -F {chain}"):
                self.works(f"-t nat -X {chain}")

    def has(self, table: str, rule: str) -> bool:
        return self.works(f"-t {table} {rule.replace('-A', '-C', 1)}")

    def works(self, arguments: str) -> bool:
        command = [self.program, *shlex.split(arguments)]
        run = self.host.ns.call(lambda: subprocess.run(command, capture_output=True, timeout=30, check=False))
        return run.returncode == 0


def upstreams(host: Host) -> list[UpstreamIptables]:
    return [UpstreamIptables(host, ranges) for ranges in SPEC.families]


def everything(host: Host) -> list[str]:
    return [
        line
        for program in ("iptables", "ip6tables")
        for table in ("nat", "filter")
        for line in host.ns.run(f"{program} -t {table} -S").splitlines()
    ]


def test_rules_of_upstream_are_adopted_without_a_write(host: Host) -> None:
    for upstream in upstreams(host):
        upstream.start()
    before = everything(host)
    assert sum("FLANNEL" in line for line in before) == 24, "2 chains, 10 rules, for both families"
    host.forget()
    assert not host.ensure(iptables())
    assert host.writes() == []
    assert everything(host) == before


def test_upstream_is_content_with_our_rules_and_we_with_them_after_it_started(host: Host) -> None:
    host.ensure(iptables())
    ours = everything(host)
    for upstream in upstreams(host):
        assert upstream.is_content()
        upstream.start()
    assert everything(host) == ours
    host.forget()
    assert not host.ensure(iptables())
    assert host.writes() == []


def test_a_second_bootstrap_of_upstream_keeps_what_it_is_about(host: Host) -> None:
    """It deletes each rule and appends it at once: nothing is lost and nothing doubled."""
    host.ensure(iptables())
    ours = everything(host)
    for upstream in upstreams(host):
        for table in upstream.rules:
            upstream.bootstrap(table)
    assert everything(host) == ours


def test_what_upstreams_cleanup_leaves_behind_goes_in_nftables_mode(host: Host) -> None:
    before = everything(host)
    for upstream in upstreams(host):
        upstream.start()
        upstream.clean_up()
    left = [line for line in everything(host) if "FLANNEL" in line]
    assert MASQ_JUMP in left, "upstream leaves the jump to the emptied chain"
    assert FORWARD_JUMP in left, "and everything in filter"

    host.ensure(nftables())
    assert host.remove(iptables())
    assert everything(host) == before
    assert not host.remove(iptables())


def test_what_upstreams_cleanup_leaves_behind_is_completed_in_iptables_mode(host: Host) -> None:
    host.ensure(iptables())
    whole = everything(host)
    for upstream in upstreams(host):
        upstream.clean_up()
    assert everything(host) != whole
    assert host.ensure(iptables())
    assert everything(host) == whole


def test_rules_of_an_earlier_network_of_upstream_go(host: Host) -> None:
    old = (
        FamilyRanges(IPv4Network("10.9.0.0/16"), IPv4Network("10.9.3.0/24")),
        FamilyRanges(IPv6Network("fd00:9::/48"), IPv6Network("fd00:9:0:3::/64")),
    )
    for ranges in old:
        UpstreamIptables(host, ranges).start()
    assert host.ensure(iptables())
    assert not [line for line in everything(host) if "10.9." in line or "fd00:9:" in line]
    assert all(upstream.is_content() for upstream in upstreams(host))


def test_a_family_that_is_no_longer_configured_loses_its_rules(host: Host) -> None:
    host.ensure(iptables())
    assert host.ensure(iptables(), render(replace(SPEC, families=(V6,))))
    assert "FLANNEL" not in "".join(host.iptables("-t nat -S") + host.iptables("-S"))
    assert host.ip6tables("-t nat -S POSTROUTING")[-1] == MASQ_JUMP
    assert len(host.ip6tables("-t nat -S FLANNEL-POSTRTG")) == 7
    assert host.ip6tables("-S FORWARD")[-1] == FORWARD_JUMP


def upstream_nft(ranges: FamilyRanges) -> list[str]:
    """The transactions of upstream's nftables manager for one family, in its order."""
    ip = ranges.family.value
    table = f"{ip} flannel-ipv{ranges.network.version}"
    n, p, multicast = ranges.network, ranges.subnet, MULTICAST[ranges.network.version]
    postrtg = [
        f"add chain {table} postrtg {{ type nat hook postrouting priority 100 ; "
        'comment "chain to manage traffic masquerading by flannel" ; }',
        f"flush chain {table} postrtg",
        f"add rule {table} postrtg meta mark 0x4000 return",
        f"add rule {table} postrtg {ip} saddr {p} {ip} daddr {n} return",
        f"add rule {table} postrtg {ip} saddr {n} {ip} daddr {p} return",
        f"add rule {table} postrtg {ip} saddr != {p} {ip} daddr {n} return",
        f"add rule {table} postrtg {ip} saddr {n} {ip} daddr != {multicast} masquerade fully-random",
        f"add rule {table} postrtg {ip} saddr != {n} {ip} daddr {n} masquerade fully-random",
    ]
    forward = [
        f"add chain {table} forward {{ type filter hook forward priority 0 ; "
        'comment "chain to accept flannel traffic" ; }',
        f"flush chain {table} forward",
        f"add rule {table} forward {ip} saddr {n} accept",
        f"add rule {table} forward {ip} daddr {n} accept",
    ]
    return ["\n".join([*lines, ""]) for lines in (postrtg, forward)]


def start_upstream_nft(host: Host, families: tuple[FamilyRanges, ...] = SPEC.families) -> None:
    for version in (4, 6):
        name = f"flannel-ipv{version}"
        family = "ip" if version == 4 else "ip6"
        host.ns.run("nft -f -", f'add table {family} {name} {{ comment "rules for {name}" ; }}\n')
    for step in (0, 1):
        for ranges in families:
            host.ns.run("nft -f -", upstream_nft(ranges)[step])


FAMILIES = {"dual stack": (V4, V6), "IPv4": (V4,), "IPv6": (V6,)}


def nft_tables(host: Host) -> str:
    return "".join(host.ns.run(f"nft list table {table}") for table in NFT_TABLES)


@pytest.mark.parametrize("families", FAMILIES.values(), ids=FAMILIES)
def test_nft_tables_of_upstream_are_adopted_without_a_write(
    make_host: Callable[[str], Host], families: tuple[FamilyRanges, ...]
) -> None:
    host = make_host("nf_tables")
    start_upstream_nft(host, families)
    before = nft_tables(host)
    assert before.count("fully-random") == 2 * len(families)
    host.forget()
    manager, rules = nftables(), render(replace(SPEC, families=families))
    assert not host.ensure(manager, rules)
    assert host.writes() == []
    host.ns.run("nft flush ruleset")
    assert host.ensure(manager, rules)
    assert nft_tables(host) == before


def test_upstream_starts_on_our_nft_tables_and_changes_nothing(make_host: Callable[[str], Host]) -> None:
    host = make_host("nf_tables")
    host.ensure(nftables())
    ours = nft_tables(host)
    start_upstream_nft(host)
    assert nft_tables(host) == ours
    host.forget()
    assert not host.ensure(nftables())
    assert host.writes() == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("delete rule ip flannel-ipv4 postrtg handle {handle}", id="rule missing"),
        pytest.param("insert rule ip flannel-ipv4 postrtg accept", id="rule of another"),
        pytest.param("add chain ip6 flannel-ipv6 another", id="chain of another"),
        pytest.param("add table ip flannel-ipv4 {{ flags dormant ; }}", id="dormant"),
    ],
)
def test_nft_tables_that_are_not_quite_upstreams_are_not_adopted(
    make_host: Callable[[str], Host], change: str
) -> None:
    host = make_host("nf_tables")
    start_upstream_nft(host)
    intact = nft_tables(host)
    listing = host.ns.run("nft --handle list chain ip flannel-ipv4 postrtg").splitlines()
    (mark,) = [line for line in listing if "mark" in line]
    host.ns.run("nft -f -", change.format(handle=mark.split()[-1]))
    assert nft_tables(host) != intact
    assert host.ensure(nftables())
    assert nft_tables(host) == intact


def test_a_changed_network_leaves_no_nft_rule_of_the_old_one(make_host: Callable[[str], Host]) -> None:
    host = make_host("nf_tables")
    old = FamilyRanges(IPv4Network("10.9.0.0/16"), IPv4Network("10.9.3.0/24"))
    start_upstream_nft(host, (old, V6))
    assert host.ensure(nftables())
    assert nft_tables(host) == RULES.nft_listing


def test_nft_tables_of_upstream_go_in_iptables_mode(host: Host) -> None:
    start_upstream_nft(host)
    host.ns.run("nft add table ip flannel-ipv4-of-another")
    assert host.remove(nftables())
    left = host.ns.run("nft list tables").splitlines()
    assert [line for line in left if "flannel" in line] == ["table ip flannel-ipv4-of-another"]
    assert not host.remove(nftables())


@pytest.mark.parametrize("table", ["ip flannel-ipv4", "ip6 flannel-ipv6"])
def test_one_nft_table_that_is_left_alone_goes_too(host: Host, table: str) -> None:
    start_upstream_nft(host)
    host.ns.run(f"nft delete table {table}")
    assert host.remove(nftables())
    assert "flannel" not in host.ns.run("nft list tables")
