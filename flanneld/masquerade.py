"""The rules that let pods reach the world and the world's firewalls pass pods, built as text.

*Masquerade*: a packet from the cluster's network to anywhere else leaves with the node's address,
one from elsewhere into the network as well; between pods and towards our own subnet addresses stay.
Packets that kube-proxy has marked (0x4000) are left to its own masquerade rule. *Forward*: whatever
comes from or goes to the network is accepted, where a host's FORWARD policy would drop it.

Chains, tables, comments and order are upstream's, for iptables and for nftables alike, so that a node
may change between the two implementations and tools that look for these names find them. The two
variants differ in small ways (mask of the mark, fourth rule); this too is kept as upstream has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from cni.net.ruleset import Chain, ChainRules, Family, NftTable, Ruleset

Network = IPv4Network | IPv6Network

_MULTICAST = {Family.IPV4: "224.0.0.0/4", Family.IPV6: "ff00::/8"}
_MASQUERADE = {f: Chain(f, "nat", "FLANNEL-POSTRTG", "POSTROUTING") for f in Family}
_FORWARD = {f: Chain(f, "filter", "FLANNEL-FWD", "FORWARD") for f in Family}
_TABLES = {
    Family.IPV4: NftTable(Family.IPV4, "flannel-ipv4"),
    Family.IPV6: NftTable(Family.IPV6, "flannel-ipv6"),
}

IPTABLES_CHAINS = (*_MASQUERADE.values(), *_FORWARD.values())
NFT_TABLES = tuple(_TABLES.values())


@dataclass(frozen=True, slots=True)
class FamilyRanges:
    """One family's cluster network and this node's subnet of it.

    `subnet` is None when the network is configured but the lease has no subnet in this family. Forward
    rules hold then too; masquerade rules do not, as upstream's (with 0.0.0.0/0) never match.
    """

    network: Network
    subnet: Network | None

    @property
    def family(self) -> Family:
        return Family.IPV4 if self.network.version == 4 else Family.IPV6


@dataclass(frozen=True, slots=True)
class FirewallSpec:
    """What is wanted: `--ip-masq`, `--iptables-forward-rules`, and the families that have a network."""

    masquerade: bool
    forward: bool
    random_fully: bool
    families: tuple[FamilyRanges, ...]


def render(spec: FirewallSpec) -> Ruleset:
    """The rules of `spec`, for iptables and for nftables; masquerade before forward, IPv4 first."""
    masquerade = [
        _masquerade_chain(r, spec.random_fully) for r in spec.families if r.subnet and spec.masquerade
    ]
    forward = [_forward_chain(r) for r in spec.families if spec.forward]
    by_family = {ranges.family: _nft_chains(spec, ranges) for ranges in spec.families}
    tables = {table: by_family.get(table.family, []) for table in NFT_TABLES}
    return Ruleset((*masquerade, *forward), _nft_transaction(tables), _nft_listing(tables))


def _masquerade_chain(ranges: FamilyRanges, random_fully: bool) -> ChainRules:
    chain = _MASQUERADE[ranges.family]
    network, subnet, multicast = ranges.network, ranges.subnet, _MULTICAST[ranges.family]
    comment = '-m comment --comment "flanneld masq"'
    masquerade = "MASQUERADE --random-fully" if random_fully else "MASQUERADE"
    return ChainRules(
        chain,
        jump=f"-A {chain.hook} {comment} -j {chain.name}",
        rules=(
            f"-A {chain.name} -m mark --mark 0x4000/0x4000 {comment} -j RETURN",
            f"-A {chain.name} -s {subnet} -d {network} {comment} -j RETURN",
            f"-A {chain.name} -s {network} -d {subnet} {comment} -j RETURN",
            f"-A {chain.name} ! -s {network} -d {subnet} {comment} -j RETURN",
            f"-A {chain.name} -s {network} ! -d {multicast} {comment} -j {masquerade}",
            f"-A {chain.name} ! -s {network} -d {network} {comment} -j {masquerade}",
        ),
    )


def _forward_chain(ranges: FamilyRanges) -> ChainRules:
    chain = _FORWARD[ranges.family]
    comment = '-m comment --comment "flanneld forward"'
    return ChainRules(
        chain,
        jump=f"-A {chain.hook} {comment} -j {chain.name}",
        rules=(
            f"-A {chain.name} -s {ranges.network} {comment} -j ACCEPT",
            f"-A {chain.name} -d {ranges.network} {comment} -j ACCEPT",
        ),
    )


@dataclass(frozen=True, slots=True)
class _NftChain:
    """A base chain in the words of nft; its priority is set as a number and printed as a word."""

    name: str
    hook: str
    priority: int
    priority_word: str
    comment: str
    rules: tuple[str, ...]


_NftTables = Mapping[NftTable, Sequence[_NftChain]]


def _nft_chains(spec: FirewallSpec, ranges: FamilyRanges) -> list[_NftChain]:
    chains = []
    if spec.masquerade and ranges.subnet is not None:
        chains.append(_nft_masquerade(ranges, spec.random_fully))
    if spec.forward:
        chains.append(_nft_forward(ranges))
    return chains


def _nft_masquerade(ranges: FamilyRanges, random_fully: bool) -> _NftChain:
    ip, network, subnet = ranges.family.value, ranges.network, ranges.subnet
    masquerade = "masquerade fully-random" if random_fully else "masquerade"
    return _NftChain(
        "postrtg",
        "type nat hook postrouting",
        100,
        "srcnat",
        "chain to manage traffic masquerading by flannel",
        (
            "meta mark 0x00004000 return",
            f"{ip} saddr {subnet} {ip} daddr {network} return",
            f"{ip} saddr {network} {ip} daddr {subnet} return",
            f"{ip} saddr != {subnet} {ip} daddr {network} return",
            f"{ip} saddr {network} {ip} daddr != {_MULTICAST[ranges.family]} {masquerade}",
            f"{ip} saddr != {network} {ip} daddr {network} {masquerade}",
        ),
    )


def _nft_forward(ranges: FamilyRanges) -> _NftChain:
    ip, network = ranges.family.value, ranges.network
    return _NftChain(
        "forward",
        "type filter hook forward",
        0,
        "filter",
        "chain to accept flannel traffic",
        (f"{ip} saddr {network} accept", f"{ip} daddr {network} accept"),
    )


def _nft_transaction(tables: _NftTables) -> str:
    """Both tables, made anew: created (so that they can be deleted), deleted, filled.

    Replacing the table also repairs what flushing cannot: a chain with another hook or priority.
    """
    lines: list[str] = []
    for table in tables:
        lines += [
            f"add table {table}",
            f"delete table {table}",
            f'add table {table} {{ comment "rules for {table.name}" ; }}',
        ]
    for table, chains in tables.items():
        for chain in chains:
            head = f'{chain.hook} priority {chain.priority} ; policy accept ; comment "{chain.comment}" ;'
            lines.append(f"add chain {table} {chain.name} {{ {head} }}")
            lines += [f"add rule {table} {chain.name} {rule}" for rule in chain.rules]
    return "\n".join([*lines, ""])


def _nft_listing(tables: _NftTables) -> str:
    """What nft prints of both tables."""
    return "".join(
        f'table {table} {{\n\tcomment "rules for {table.name}"\n' + "\n".join(map(_nft_block, chains)) + "}\n"
        for table, chains in tables.items()
    )


def _nft_block(chain: _NftChain) -> str:
    head = (f'comment "{chain.comment}"', f"{chain.hook} priority {chain.priority_word}; policy accept;")
    inside = "".join(f"\t\t{line}\n" for line in (*head, *chain.rules))
    return f"\tchain {chain.name} {{\n{inside}\t}}\n"
