"""Masquerade and forward rules: the text, and the transactions against a naive iptables-restore."""

from __future__ import annotations

import shlex
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import ConfigError, KernelError
from cni.net import firewall
from cni.net.ruleset import Chain, ChainRules, Family, removal_payload, update_payload
from flanneld.masquerade import IPTABLES_CHAINS, NFT_TABLES, FamilyRanges, FirewallSpec, render

V4 = FamilyRanges(IPv4Network("10.42.0.0/16"), IPv4Network("10.42.1.0/24"))
V6 = FamilyRanges(IPv6Network("fd00:10:244::/56"), IPv6Network("fd00:10:244:1::/64"))
MASQ_V4, FWD_V4 = render(FirewallSpec(True, True, True, (V4,))).chains
JUMP = '-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG'
EMPTY = ["-P POSTROUTING ACCEPT"]
KUBE = '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING'
LATER = "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE"


def listing(*hook: str, rules: tuple[str, ...] = MASQ_V4.rules) -> list[str]:
    """`iptables -t nat -S` with our chain in place and `hook` as the rules of POSTROUTING."""
    return [*EMPTY, "-N FLANNEL-POSTRTG", "-N KUBE-POSTROUTING", *hook, *rules]


class NaiveTable:
    """One iptables table under `iptables-restore --noflush`: all of a payload, or an error."""

    def __init__(self, lines: list[str], builtin: str) -> None:
        self.chains: dict[str, list[str]] = {builtin: []}
        self.builtin = builtin
        for line in lines:
            verb, chain, *_ = line.split()
            if verb == "-N":
                self.chains[chain] = []
            elif verb == "-A":
                self.chains[chain].append(line.split(maxsplit=2)[2])

    def restore(self, payload: str) -> None:
        assert payload.startswith("*") and payload.endswith("\nCOMMIT\n")
        for line in payload.splitlines()[1:-1]:
            verb, rest = line[0] if line[0] == ":" else line[:2], line.lstrip(":")
            if verb == ":":
                name, policy, counters = rest.split()
                assert (policy, counters) == ("-", "[0:0]") and name != self.builtin
                self.chains[name] = []
            elif verb == "-X":
                name = line.split()[1]
                assert not self.chains.pop(name), f"{name} is not empty"
                assert not self._references(name), f"{name} is still referenced"
            else:
                _, chain, rule = line.split(maxsplit=2)
                if verb == "-D":
                    self.chains[chain].remove(rule)
                else:
                    assert verb == "-A"
                    self.chains[chain].append(rule)

    def _references(self, name: str) -> list[str]:
        rules = [rule for rules in self.chains.values() for rule in rules]
        return [rule for rule in rules if shlex.split(rule)[-2:] in (["-j", name], ["-g", name])]

    def listing(self) -> list[str]:
        names = [name for name in self.chains if name != self.builtin]
        rules = [f"-A {chain} {rule}" for chain, rules in self.chains.items() for rule in rules]
        return [f"-P {self.builtin} ACCEPT", *(f"-N {name}" for name in names), *rules]


def test_the_seven_masquerade_rules_of_upstreams_test_with_an_unmasked_network() -> None:
    ranges = FamilyRanges(ip_network("10.0.1.0/16", strict=False), ip_network("192.168.0.0/16"))
    (masquerade,) = render(FirewallSpec(True, False, True, (ranges,))).chains
    comment = '-m comment --comment "flanneld masq"'
    assert [masquerade.jump, *masquerade.rules] == [
        f"-A POSTROUTING {comment} -j FLANNEL-POSTRTG",
        f"-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG -s 192.168.0.0/16 -d 10.0.0.0/16 {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG -s 10.0.0.0/16 -d 192.168.0.0/16 {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG ! -s 10.0.0.0/16 -d 192.168.0.0/16 {comment} -j RETURN",
        f"-A FLANNEL-POSTRTG -s 10.0.0.0/16 ! -d 224.0.0.0/4 {comment} -j MASQUERADE --random-fully",
        f"-A FLANNEL-POSTRTG ! -s 10.0.0.0/16 -d 10.0.0.0/16 {comment} -j MASQUERADE --random-fully",
    ]


def test_forward_rules_lead_to_a_chain_of_their_own_in_filter() -> None:
    assert (FWD_V4.chain.table, FWD_V4.chain.family.value) == ("filter", "ip")
    assert [FWD_V4.jump, *FWD_V4.rules] == [
        '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
        '-A FLANNEL-FWD -s 10.42.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
        '-A FLANNEL-FWD -d 10.42.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
    ]


def test_ipv6_differs_in_program_addresses_and_multicast_range() -> None:
    masquerade, _ = render(FirewallSpec(True, True, False, (V6,))).chains
    assert masquerade.chain.family.value == "ip6"
    assert masquerade.rules[1] == (
        "-A FLANNEL-POSTRTG -s fd00:10:244:1::/64 -d fd00:10:244::/56"
        ' -m comment --comment "flanneld masq" -j RETURN'
    )
    assert masquerade.rules[4] == (
        "-A FLANNEL-POSTRTG -s fd00:10:244::/56 ! -d ff00::/8"
        ' -m comment --comment "flanneld masq" -j MASQUERADE'
    )


def test_nft_transaction_of_one_family_makes_both_tables() -> None:
    assert render(FirewallSpec(True, True, True, (V4,))).nft.splitlines() == [
        "add table ip flannel-ipv4",
        "delete table ip flannel-ipv4",
        'add table ip flannel-ipv4 { comment "rules for flannel-ipv4" ; }',
        "add table ip6 flannel-ipv6",
        "delete table ip6 flannel-ipv6",
        'add table ip6 flannel-ipv6 { comment "rules for flannel-ipv6" ; }',
        "add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority 100 ; policy accept ; "
        'comment "chain to manage traffic masquerading by flannel" ; }',
        "add rule ip flannel-ipv4 postrtg meta mark 0x00004000 return",
        "add rule ip flannel-ipv4 postrtg ip saddr 10.42.1.0/24 ip daddr 10.42.0.0/16 return",
        "add rule ip flannel-ipv4 postrtg ip saddr 10.42.0.0/16 ip daddr 10.42.1.0/24 return",
        "add rule ip flannel-ipv4 postrtg ip saddr != 10.42.1.0/24 ip daddr 10.42.0.0/16 return",
        "add rule ip flannel-ipv4 postrtg ip saddr 10.42.0.0/16 ip daddr != 224.0.0.0/4 "
        "masquerade fully-random",
        "add rule ip flannel-ipv4 postrtg ip saddr != 10.42.0.0/16 ip daddr 10.42.0.0/16 "
        "masquerade fully-random",
        "add chain ip flannel-ipv4 forward { type filter hook forward priority 0 ; policy accept ; "
        'comment "chain to accept flannel traffic" ; }',
        "add rule ip flannel-ipv4 forward ip saddr 10.42.0.0/16 accept",
        "add rule ip flannel-ipv4 forward ip daddr 10.42.0.0/16 accept",
    ]


def test_the_listing_to_recognise_is_of_both_tables_in_the_words_that_nft_prints() -> None:
    """The whole text, against the real nft, is in tests/netns/test_firewall_handover.py."""
    listing = render(FirewallSpec(True, False, False, (V4,))).nft_listing
    assert listing == (
        "table ip flannel-ipv4 {\n"
        '\tcomment "rules for flannel-ipv4"\n'
        "\tchain postrtg {\n"
        '\t\tcomment "chain to manage traffic masquerading by flannel"\n'
        "\t\ttype nat hook postrouting priority srcnat; policy accept;\n"
        "\t\tmeta mark 0x00004000 return\n"
        "\t\tip saddr 10.42.1.0/24 ip daddr 10.42.0.0/16 return\n"
        "\t\tip saddr 10.42.0.0/16 ip daddr 10.42.1.0/24 return\n"
        "\t\tip saddr != 10.42.1.0/24 ip daddr 10.42.0.0/16 return\n"
        "\t\tip saddr 10.42.0.0/16 ip daddr != 224.0.0.0/4 masquerade\n"
        "\t\tip saddr != 10.42.0.0/16 ip daddr 10.42.0.0/16 masquerade\n"
        "\t}\n"
        "}\n"
        "table ip6 flannel-ipv6 {\n"
        '\tcomment "rules for flannel-ipv6"\n'
        "}\n"
    )


def test_nft_rules_of_ipv6_use_ip6_and_go_to_the_ipv6_table() -> None:
    rules = [
        r for r in render(FirewallSpec(True, True, False, (V4, V6))).nft.splitlines() if "ip6 saddr" in r
    ]
    assert all(rule.startswith("add rule ip6 flannel-ipv6 ") for rule in rules)
    assert rules[3].endswith("ip6 saddr fd00:10:244::/56 ip6 daddr != ff00::/8 masquerade")
    assert len(rules) == 6


def test_what_is_switched_off_is_in_neither_form() -> None:
    neither = render(FirewallSpec(False, False, True, (V4, V6)))
    assert neither.chains == ()
    assert "chain" not in neither.nft
    assert neither.nft.count("add table ip6 flannel-ipv6 {") == 1
    forward = render(FirewallSpec(False, True, True, (V4, V6)))
    assert [c.chain.name for c in forward.chains] == ["FLANNEL-FWD", "FLANNEL-FWD"]
    assert "masquerade" not in forward.nft


def test_a_network_without_a_subnet_of_ours_gets_forward_rules_only() -> None:
    ruleset = render(FirewallSpec(True, True, True, (V4, FamilyRanges(V6.network, None))))
    assert [(c.chain.family.value, c.chain.table) for c in ruleset.chains] == [
        ("ip", "nat"),
        ("ip", "filter"),
        ("ip6", "filter"),
    ]
    assert "ip6 saddr fd00:10:244::/56 accept" in ruleset.nft
    assert "None" not in ruleset.nft


def test_every_chain_that_can_be_rendered_is_in_the_list_of_what_is_ours() -> None:
    chains = [c.chain for c in render(FirewallSpec(True, True, True, (V4, V6))).chains]
    assert chains == list(IPTABLES_CHAINS)


def test_an_empty_table_gets_chain_rules_and_jump_in_one_transaction() -> None:
    assert update_payload(MASQ_V4, [*EMPTY, KUBE]) == "\n".join(
        ["*nat", ":FLANNEL-POSTRTG - [0:0]", *MASQ_V4.rules, JUMP, "COMMIT", ""]
    )


def test_nothing_is_sent_when_nothing_differs() -> None:
    assert update_payload(MASQ_V4, listing(JUMP)) is None
    assert update_payload(MASQ_V4, listing(KUBE, JUMP, LATER)) is None


ONLY_RULES = ["*nat", ":FLANNEL-POSTRTG - [0:0]", *MASQ_V4.rules, "COMMIT", ""]


@pytest.mark.parametrize(
    "current",
    [
        pytest.param((*MASQ_V4.rules, "-A FLANNEL-POSTRTG -j ACCEPT"), id="foreign rule"),
        pytest.param((*MASQ_V4.rules, "-A FLANNEL-POSTRTG"), id="foreign rule without match and target"),
        pytest.param(MASQ_V4.rules[::-1], id="order"),
        pytest.param(MASQ_V4.rules[1:], id="rule missing"),
        pytest.param((*MASQ_V4.rules, MASQ_V4.rules[-1]), id="rule twice"),
        pytest.param(tuple(r.replace("10.42.", "10.9.") for r in MASQ_V4.rules), id="other network"),
        pytest.param(
            tuple(r.replace(" --random-fully", "") for r in MASQ_V4.rules), id="other target option"
        ),
        pytest.param((), id="flushed"),
    ],
)
def test_a_chain_that_differs_is_replaced_and_the_jump_stays(current: tuple[str, ...]) -> None:
    payload = update_payload(MASQ_V4, listing(KUBE, JUMP, LATER, rules=current))
    assert payload == "\n".join(ONLY_RULES)


BARE = "-A POSTROUTING -j FLANNEL-POSTRTG"
ON_LINK = '-A POSTROUTING -o eth0 -m comment --comment "flanneld masq" -g FLANNEL-POSTRTG'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param([KUBE], [KUBE, JUMP], id="jump missing"),
        pytest.param([JUMP, KUBE, JUMP], [KUBE, JUMP], id="jump twice"),
        pytest.param([BARE, KUBE], [KUBE, JUMP], id="other jump only"),
        pytest.param([BARE, JUMP, KUBE, ON_LINK], [JUMP, KUBE], id="other jumps as well"),
    ],
)
def test_there_is_one_jump_afterwards(before: list[str], after: list[str]) -> None:
    table = NaiveTable(listing(*before), "POSTROUTING")
    table.restore(update_payload(MASQ_V4, table.listing()) or "")
    assert table.listing() == [*EMPTY, "-N FLANNEL-POSTRTG", "-N KUBE-POSTROUTING", *after, *MASQ_V4.rules]


def test_a_comment_that_mentions_the_jump_is_no_jump() -> None:
    comment = '-A POSTROUTING -m comment --comment "before -j FLANNEL-POSTRTG"'
    assert update_payload(MASQ_V4, listing(comment, JUMP)) is None


def test_removal_takes_the_jumps_of_every_chain_and_the_chain_in_one_transaction() -> None:
    chain = MASQ_V4.chain
    foreign = "-A KUBE-POSTROUTING -o eth0 -j FLANNEL-POSTRTG"
    table = NaiveTable(listing(KUBE, JUMP, LATER, foreign), "POSTROUTING")
    table.restore(removal_payload(chain, table.listing()) or "")
    assert table.listing() == [*EMPTY, "-N KUBE-POSTROUTING", KUBE, LATER]
    assert removal_payload(chain, table.listing()) is None


# Upstream's own vectors (pkg/trafficmngr/iptables/iptables_test.go). Its rules stand in the built-in chain;
# ours, as the daemon's, in a chain that one jump of it leads to.


def vector(family: Family, table: str, hook: str, *rules: str) -> ChainRules:
    chain = Chain(family, table, "OURS", hook)
    return ChainRules(chain, f"-A {hook} -j OURS", tuple(f"-A OURS {rule}" for rule in rules))


LOCAL = (
    "-s 127.0.0.1/32 -d 127.0.0.1/32 -j RETURN",
    "-s 127.0.0.1/32 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully",
)
FOUR_OF_IPV6 = (
    '-s ::/0 -d ::/0 -m comment --comment "flanneld masq" -j RETURN',
    '-s ::/0 ! -d ff00::/8 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully',
    '! -s ::/0 -d fc00::/48 -m comment --comment "flanneld masq" -j RETURN',
    '! -s ::/0 -d ::/0 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully',
)
VECTORS = {
    "filter": vector(Family.IPV4, "filter", "INPUT", *LOCAL),
    "nat": vector(Family.IPV4, "nat", "POSTROUTING", *LOCAL),
    "IPv6": vector(Family.IPV6, "nat", "POSTROUTING", *FOUR_OF_IPV6),
    "masquerade": MASQ_V4,
}


@pytest.mark.parametrize("wanted", VECTORS.values(), ids=VECTORS)
def test_upstreams_vectors_bootstrap_ensure_and_teardown(wanted: ChainRules) -> None:
    hook = wanted.chain.hook
    other = f"-A {hook} -j KUBE-POSTROUTING"
    table = NaiveTable([f"-P {hook} ACCEPT", "-N KUBE-POSTROUTING", other], hook)
    untouched = table.listing()
    payload = update_payload(wanted, untouched) or ""
    assert payload == "\n".join(
        [
            f"*{wanted.chain.table}",
            f":{wanted.chain.name} - [0:0]",
            *wanted.rules,
            wanted.jump,
            "COMMIT",
            "",
        ]
    )
    table.restore(payload)
    assert update_payload(wanted, table.listing()) is None, "a second pass has nothing to send"

    teardown = removal_payload(wanted.chain, table.listing()) or ""
    assert (teardown.count("*"), teardown.count("COMMIT")) == (1, 1)
    table.restore(teardown)
    assert table.listing() == untouched


FOREIGN = st.sampled_from(
    [KUBE, LATER, '-A POSTROUTING -m comment --comment "x -j FLANNEL-POSTRTG" -j RETURN']
)
HOOK = st.lists(st.one_of(FOREIGN, st.sampled_from([JUMP, BARE, ON_LINK])), max_size=6)
OWN = st.lists(st.sampled_from([*MASQ_V4.rules, "-A FLANNEL-POSTRTG -j ACCEPT"]), max_size=8)


@given(HOOK, st.one_of(st.none(), OWN, st.just(list(MASQ_V4.rules))))
def test_law_one_transaction_reaches_the_wanted_state_from_any(
    hook: list[str], own: list[str] | None
) -> None:
    if own is None:  # without the chain there can be no jump to it
        hook, lines = [r for r in hook if r not in (JUMP, BARE, ON_LINK)], [*EMPTY]
    else:
        lines = [*EMPTY, "-N FLANNEL-POSTRTG"]
    table = NaiveTable([*lines, *hook, *(own or [])], "POSTROUTING")
    before = table.listing()
    payload = update_payload(MASQ_V4, before)
    if payload is not None:
        table.restore(payload)
        assert table.listing() != before
    assert update_payload(MASQ_V4, table.listing()) is None

    ours = [r for r in hook if r in (JUMP, BARE, ON_LINK)]
    foreign = [r for r in hook if r not in ours]
    kept = [r for r in hook if r in foreign or r == JUMP] if ours.count(JUMP) == 1 else [*foreign, JUMP]
    assert [f"-A POSTROUTING {r}" for r in table.chains["POSTROUTING"]] == kept
    assert tuple(f"-A FLANNEL-POSTRTG {r}" for r in table.chains["FLANNEL-POSTRTG"]) == MASQ_V4.rules


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_law_a_changed_network_leaves_no_rule_of_the_old_one(
    base: int, length: int, other: int, more: int, random_fully: bool
) -> None:
    def chain(address: int, subnet: int) -> ChainRules:
        ranges = FamilyRanges(
            IPv4Network((address, length), strict=False), IPv4Network((subnet, length + 1), strict=False)
        )
        return render(FirewallSpec(True, False, random_fully, (ranges,))).chains[0]

    old, new = chain(base, other), chain(other, more)
    table = NaiveTable([*EMPTY, LATER], "POSTROUTING")
    table.restore(update_payload(old, table.listing()) or "")
    payload = update_payload(new, table.listing())
    assert (payload is None) == (old == new)
    if payload is not None:
        table.restore(payload)
    assert table.listing() == [*EMPTY, "-N FLANNEL-POSTRTG", LATER, JUMP, *new.rules]


@pytest.mark.parametrize(
    ("text", "version", "nf_tables"),
    [
        ("iptables v1.8.9 (nf_tables)\n", (1, 8, 9), True),
        ("ip6tables v1.8.10 (legacy)\n", (1, 8, 10), False),
        ("iptables v1.6.2\n", (1, 6, 2), False),
        ("iptables v1.6\n", (1, 6, 0), False),
    ],
)
def test_versions_compare_as_numbers_and_only_a_new_iptables_writes_to_nf_tables(
    text: str, version: tuple[int, int, int], nf_tables: bool
) -> None:
    assert firewall.parse_version(text) == (version, nf_tables)


@pytest.mark.parametrize(
    ("version", "random_fully", "listing", "restore"),
    [
        ("v1.4.21", False, "-t nat", "--noflush"),
        ("v1.6.1", False, "--wait 10 -t nat", "--noflush"),
        ("v1.6.2", True, "--wait 10 -t nat", "--noflush --wait 10"),
        ("v1.8.9 (nf_tables)", True, "--wait 10 -t nat", "--noflush --wait 10"),
    ],
)
def test_what_an_iptables_is_asked_for_depends_on_its_version(
    version: str,
    random_fully: bool,
    listing: str,
    restore: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Upstream's limits: MASQUERADE --random-fully and iptables-restore --wait since 1.6.2."""
    for program in ("iptables", "iptables-restore"):
        script = tmp_path / program
        script.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/log-{program}\necho "{program} {version}"\n')
        script.chmod(0o755)
    monkeypatch.setattr(firewall, "_SBIN", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    manager = firewall.Iptables([MASQ_V4.chain])
    assert manager.supports_random_fully() == random_fully
    manager.ensure(render(FirewallSpec(True, False, random_fully, (V4,))))
    logs = [tmp_path.joinpath(f"log-{program}").read_text() for program in ("iptables", "iptables-restore")]
    assert logs[0].splitlines()[:2] == ["--version", f"{listing} -S POSTROUTING"]
    assert logs[1].splitlines() == [restore]


def test_a_version_that_is_none_is_refused() -> None:
    with pytest.raises(KernelError, match=r"printed 'usage:', expected"):
        firewall.parse_version("usage:")


def test_a_program_that_is_not_installed_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewall, "_SBIN", ())
    monkeypatch.setenv("PATH", "")
    ruleset = render(FirewallSpec(True, True, True, (V4,)))
    with pytest.raises(ConfigError, match=r"^iptables is neither in PATH .*\(Debian package: iptables\)$"):
        firewall.Iptables(IPTABLES_CHAINS).ensure(ruleset)
    with pytest.raises(ConfigError, match=r"^nft is neither in PATH .*\(Debian package: nftables\)$"):
        firewall.Nftables(NFT_TABLES).ensure(ruleset)
    assert not firewall.Iptables(IPTABLES_CHAINS).remove()
    assert not firewall.Nftables(NFT_TABLES).remove()


@pytest.mark.parametrize("path", ["", ".", ":/nowhere:"])
def test_programs_in_the_working_directory_are_not_run(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firewall, "_SBIN", ())
    monkeypatch.setenv("PATH", path)
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("nft").write_text("#!/bin/sh\n")
    tmp_path.joinpath("nft").chmod(0o755)
    with pytest.raises(ConfigError, match=r"^nft is neither in PATH"):
        firewall.Nftables(NFT_TABLES).supports_random_fully()
