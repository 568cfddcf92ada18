"""Packet filter rules as values and text: what is wanted, and the transaction that brings it about.

Rules are kept in the words of the program that loads them. For iptables a rule is the line that
`iptables -S` prints, so that comparing what is wanted with what is there is comparing text; the same
line is what `iptables-restore` reads. For nftables the whole transaction is text, see `Ruleset.nft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Family(Enum):
    """An address family, spelled as nft does; `iptables` and `ip6tables` are this word and `tables`."""

    IPV4 = "ip"
    IPV6 = "ip6"


@dataclass(frozen=True, slots=True)
class Chain:
    """An iptables chain of ours, and the built-in chain (`hook`) that leads to it."""

    family: Family
    table: str
    name: str
    hook: str

    @property
    def place(self) -> tuple[Family, str]:
        """The table that the chain is in."""
        return self.family, self.table


@dataclass(frozen=True, slots=True)
class ChainRules:
    """The wanted content of one chain: the one rule that leads to it and its own, as `-A` lines."""

    chain: Chain
    jump: str
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NftTable:
    """An nftables table of ours."""

    family: Family
    name: str

    def __str__(self) -> str:
        return f"{self.family.value} {self.name}"


@dataclass(frozen=True, slots=True)
class Ruleset:
    """The same rules for either program.

    `nft` is one transaction for `nft -f -`. It brings every table of ours to the wanted state whatever
    the state before, the tables' absence included. `nft_listing` is what `nft --stateless list table`
    prints of that state, table after table, in the words of nft 1.0.1 to 1.1.
    """

    chains: tuple[ChainRules, ...]
    nft: str
    nft_listing: str


class Firewall(Protocol):
    """One program that keeps our rules in the kernel."""

    def supports_random_fully(self) -> bool:
        """Whether masquerading can choose source ports at random without a hash in between."""
        ...

    def ensure(self, rules: Ruleset) -> bool:
        """Make the kernel hold exactly `rules` in our chains; True if something had to change."""
        ...

    def remove(self) -> bool:
        """Delete everything of ours that this program could have loaded; True if there was anything."""
        ...


def update_payload(wanted: ChainRules, listing: Sequence[str]) -> str | None:
    """What `iptables-restore --noflush` needs to bring one chain to `wanted`; None if nothing differs.

    `listing` is `iptables -S` of the table, or of the hook and our chain. The chain is replaced as a
    whole, so rules of an earlier network go as well. A jump that is there exactly once stays in its
    place; otherwise it is appended. Any other rule of the hook that leads to our chain is deleted.
    """
    chain = wanted.chain
    jumps = [line for line in _jumps(chain, listing) if _chain_of(line) == chain.hook]
    in_place = jumps.count(wanted.jump) == 1
    current = tuple(line for line in listing if _chain_of(line) == chain.name)
    if jumps == [wanted.jump] and current == wanted.rules:
        return None
    deleted = [_deletion(line) for line in jumps if not (in_place and line == wanted.jump)]
    appended = [] if in_place else [wanted.jump]
    return _transaction(chain.table, [_flush(chain), *deleted, *wanted.rules, *appended])


def removal_payload(chain: Chain, listing: Sequence[str]) -> str | None:
    """What `iptables-restore --noflush` needs to delete `chain`; None if it is not there.

    `listing` is `iptables -S` of the whole table: the kernel refuses to delete a chain that any rule,
    of whichever chain, leads to.
    """
    if f"-N {chain.name}" not in listing:
        return None
    deleted = [_deletion(line) for line in _jumps(chain, listing)]
    return _transaction(chain.table, [_flush(chain), *deleted, f"-X {chain.name}"])


def _jumps(chain: Chain, listing: Sequence[str]) -> list[str]:
    # A jump to a user chain takes no options, so iptables prints the target last. A comment that
    # happens to hold the same words ends in a quotation mark.
    targets = (f" -j {chain.name}", f" -g {chain.name}")
    return [line for line in listing if line.endswith(targets)]


def _chain_of(line: str) -> str:
    """The chain that an `-A` line belongs to, empty for `-P` and `-N` lines."""
    words = line.split(maxsplit=2)
    return words[1] if len(words) > 1 and words[0] == "-A" else ""


def _deletion(line: str) -> str:
    return "-D" + line.removeprefix("-A")


def _flush(chain: Chain) -> str:
    return f":{chain.name} - [0:0]"


def _transaction(table: str, lines: Sequence[str]) -> str:
    return "\n".join([f"*{table}", *lines, "COMMIT", ""])
