"""Our rules in the kernel, by iptables or by nftables: read, compare, replace in one transaction.

Decision: the programs are run, not the kernel's interface spoken. Only they know which of two
incompatible kernel interfaces the host uses for its iptables rules (`nf_tables` or legacy), and
upstream, kube-proxy and the operator see the rules through the same programs.

Every program runs without a shell, by absolute path, with a time limit. It runs in the network
namespace of the calling thread; an object here is for one namespace.

Decision: once a check has found everything in order, the next ones start no program as long as the
kernel's own mark of its rules stays the same (`cni.net.nfgen`). The mark is read before the rules are:
a change in between makes the next check a full one. Where there is no mark, every check is full.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from cni.errors import ConfigError, KernelError, NetworkError
from cni.net.nfgen import nftables_generation, xtables_digest
from cni.net.ruleset import Chain, ChainRules, Family, NftTable, Ruleset, removal_payload, update_payload

# A service manager's or a container's PATH often lacks the directories of system administration.
_SBIN = ("/usr/sbin", "/sbin")
_TIMEOUT_S = 30.0
# How long a legacy iptables waits for the lock; kube-proxy holds it for seconds when it writes thousands
# of services. Without a bound one stopped process would stop the node.
_LOCK_WAIT_S = 10
_LOCK_FILE = "/run/xtables.lock"
_LONGEST_QUOTE = 200

Version = tuple[int, int, int]
Marks = tuple[int | bytes, ...]
_WAIT_SINCE: Version = (1, 4, 22)
_RESTORE_WAIT_SINCE: Version = (1, 6, 2)
_RANDOM_FULLY_SINCE: Version = (1, 6, 2)


class Edition(NamedTuple):
    """Which iptables is installed: its version, and whether it writes to nf_tables or to x_tables."""

    version: Version
    nf_tables: bool


class _Stuck(KernelError):
    """A program got nowhere in the time it had; the next one would fare no better."""


class Iptables:
    """Our chains, through `iptables` and `ip6tables`, each with its `-restore`. Not for several threads."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        """`chains` are all that may ever be ours, in the order in which they are removed."""
        self._chains = tuple(chains)
        self._editions: dict[str, Edition] = {}
        self._swept = False
        self._in_order: tuple[Ruleset, Marks] | None = None

    def supports_random_fully(self) -> bool:
        """Whether this iptables knows `--random-fully`; raises ConfigError if it is not installed."""
        return self._edition("iptables").version >= _RANDOM_FULLY_SINCE

    def ensure(self, rules: Ruleset) -> bool:
        """Bring every chain of `rules` to its wanted state; True if one had to change.

        The first call that succeeds also removes those of our chains that are not wanted (any more).
        Each chain is tried; after that the first failure is raised: ConfigError for a program that is not
        installed, KernelError for one that failed. What got stuck (the lock of xtables is held by another
        process) is raised at once, after 10 s for the lock and 30 s for anything else.

        Costs one netlink request while nobody has changed a rule, `xtables_digest` of each table for the
        legacy kind; otherwise two short processes per chain.
        """
        marks = self._marks(rules)
        if self._in_order == (rules, marks):
            return False
        changed = self._check(rules)
        self._in_order = None if marks is None or changed else (rules, marks)
        return changed

    def _check(self, rules: Ruleset) -> bool:
        wanted = {desired.chain for desired in rules.chains}
        unwanted = [] if self._swept else [chain for chain in self._chains if chain not in wanted]
        updates = [partial(self._update, desired) for desired in rules.chains]
        changed = _run_all([*updates, *(partial(self._delete, chain) for chain in unwanted)])
        self._swept = True
        return changed

    def _marks(self, rules: Ruleset) -> Marks | None:
        """What changes whenever somebody changes one of the tables of `rules`; None if it cannot be told."""
        places = dict.fromkeys(desired.chain.place for desired in rules.chains)
        try:
            legacy = [place for place in places if not self._edition(_program(place[0])).nf_tables]
        except _Stuck:
            raise
        except NetworkError:
            return None  # the full check says so, of each chain
        marks: list[int | bytes | None] = [xtables_digest(*place) for place in legacy]
        if len(legacy) < len(places):
            marks.append(nftables_generation())
        known = tuple(mark for mark in marks if mark is not None)
        return known if len(known) == len(marks) else None

    def remove(self) -> bool:
        """Delete our chains and every rule that leads to them; True if there was one.

        A program that is not installed or a table that it cannot list holds nothing of ours. Raises
        KernelError if a chain is there and cannot be deleted, or if a program got stuck.
        """
        return _run_all([partial(self._delete, chain) for chain in self._chains])

    def _update(self, wanted: ChainRules) -> bool:
        chain = wanted.chain
        listing = self._list(chain, chain.hook)
        if listing.returncode != 0:
            raise _failure(listing, f"list chain {chain.hook} of table {chain.table}")
        # Our own chain may not exist yet, and not every version of iptables says so in the same way.
        # A listing that failed for another reason does no harm: the payload replaces the chain anyhow.
        own = self._list(chain, chain.name)
        lines = listing.stdout.splitlines() + (own.stdout.splitlines() if own.returncode == 0 else [])
        return self._restore(chain, update_payload(wanted, lines))

    def _delete(self, chain: Chain) -> bool:
        if _find(_program(chain.family)) is None:
            return False
        listing = self._list(chain)
        lines = listing.stdout.splitlines() if listing.returncode == 0 else []
        return self._restore(chain, removal_payload(chain, lines))

    def _list(self, chain: Chain, *names: str) -> subprocess.CompletedProcess[str]:
        program = _program(chain.family)
        wait = _wait(self._edition(program), _WAIT_SINCE)
        return _run(program, [*wait, "-t", chain.table, "-S", *names], "iptables")

    def _restore(self, chain: Chain, payload: str | None) -> bool:
        if payload is None:
            return False
        program = _program(chain.family)
        wait = _wait(self._edition(program), _RESTORE_WAIT_SINCE)
        done = _run(f"{program}-restore", ["--noflush", *wait], "iptables", payload)
        if done.returncode != 0:
            raise _failure(done, f"write chain {chain.name} of table {chain.table}")
        return True

    def _edition(self, program: str) -> Edition:
        if program not in self._editions:
            self._editions[program] = parse_version(_run(program, ["--version"], "iptables").stdout)
        return self._editions[program]


class Nftables:
    """Our tables, through `nft` (1.0.1 or newer: chains with comments). Not for several threads.

    Decision: what is there is compared with what `nft` printed right after our last transaction, not
    with the text we sent, as each version prints rules in its own way. Before the first transaction it is
    compared with what the versions known to us print: so rules that upstream or an earlier run of ours
    left are adopted as they are. A version that prints otherwise loads them once more, no harm done.
    """

    def __init__(self, tables: Sequence[NftTable]) -> None:
        """`tables` are the ones that the transactions given to `ensure` replace."""
        self._tables = tuple(tables)
        self._applied: tuple[str, str | None] | None = None
        self._in_order: tuple[Ruleset, int] | None = None

    def supports_random_fully(self) -> bool:
        """Whether nft and kernel accept `masquerade fully-random`; raises ConfigError if nft is missing.

        Asked with `nft --check`, which commits nothing.
        """
        chain = f"{self._tables[0]} masqueradeTest"
        probe = (
            f"add table {self._tables[0]}\n"
            f"add chain {chain} {{ type nat hook postrouting priority 100 ; }}\n"
            f"add rule {chain} masquerade fully-random\n"
        )
        return _run("nft", ["--check", "-f", "-"], "nftables", probe).returncode == 0

    def ensure(self, rules: Ruleset) -> bool:
        """Bring our tables to the state of `rules`; True if they differed.

        Raises ConfigError if nft is not installed, KernelError if the transaction failed; then nothing of
        it was done. Costs one netlink request while nobody has changed a rule, otherwise one process per
        table.
        """
        generation = nftables_generation()
        if self._in_order == (rules, generation):
            return False
        changed = self._check(rules)
        self._in_order = None if generation is None or changed else (rules, generation)
        return changed

    def _check(self, rules: Ruleset) -> bool:
        before = self._listing()
        # A listing that cannot be had is never proof that nothing changed.
        if before is not None and (before == rules.nft_listing or (rules.nft, before) == self._applied):
            return False
        done = _run("nft", ["-f", "-"], "nftables", rules.nft)
        if done.returncode != 0:
            raise _failure(done, "write " + self._names())
        after = self._listing()
        self._applied = (rules.nft, after)
        return before != after

    def remove(self) -> bool:
        """Delete our tables; True if there was one. Where nft is missing or cannot list, there is none.

        Raises KernelError if a table is there and cannot be deleted.
        """
        if _find("nft") is None:
            return False
        present = _run("nft", ["list", "tables"], "nftables").stdout.splitlines()
        ours = [table for table in self._tables if f"table {table}" in present]
        if not ours:
            return False
        payload = "".join(f"delete table {table}\n" for table in ours)
        done = _run("nft", ["-f", "-"], "nftables", payload)
        if done.returncode != 0:
            raise _failure(done, "delete " + self._names())
        return True

    def _listing(self) -> str | None:
        """All our tables without counters, or None if one is missing (or cannot be read)."""
        # One process per table: nft 1.0.6, asked for two in one run, reads the last one alone from the
        # kernel and takes the other for missing.
        texts: list[str] = []
        for table in self._tables:
            done = _run("nft", ["--stateless", "list", "table", table.family.value, table.name], "nftables")
            if done.returncode != 0:
                return None
            texts.append(done.stdout)
        return "".join(texts)

    def _names(self) -> str:
        return "tables " + ", ".join(map(str, self._tables))


def parse_version(text: str) -> Edition:
    """What `iptables v1.8.9 (nf_tables)` says; raises KernelError if there is no version in it.

    Before 1.8 there was only the legacy kind, and no word for it.
    """
    match = re.search(r"v(\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise KernelError(
            f"iptables --version printed {text[:_LONGEST_QUOTE]!r}, expected such as 'iptables v1.8.9'"
        )
    major, minor, patch = match.groups(default="0")
    return Edition((int(major), int(minor), int(patch)), nf_tables="(nf_tables)" in text)


def _run_all(steps: Iterable[Callable[[], bool]]) -> bool:
    """Run every step whatever the others do, but none after one that got stuck; True if one had to change.

    Raises the first failure at the end.
    """
    changed, failures = False, list[NetworkError]()
    for step in steps:
        try:
            changed |= step()
        except _Stuck as exc:
            raise failures[0] if failures else exc from None
        except NetworkError as exc:
            failures.append(exc)
    if failures:
        raise failures[0]
    return changed


def run_nft(transaction: str) -> None:
    """Carry out one `nft -f -` transaction, whole or not at all; raises KernelError or ConfigError."""
    done = _run("nft", ["-f", "-"], "nftables", transaction)
    if done.returncode:
        raise _failure(done, "apply an nftables transaction")


def _program(family: Family) -> str:
    return f"{family.value}tables"


def _wait(edition: Edition, since: Version) -> list[str]:
    return ["--wait", str(_LOCK_WAIT_S)] if edition.version >= since else []


def _find(program: str) -> str | None:
    # An empty or relative element of PATH means the working directory; a daemon must not look there.
    inherited = filter(os.path.isabs, os.environ.get("PATH", "").split(os.pathsep))
    return shutil.which(program, path=os.pathsep.join([*inherited, *_SBIN]))


def _run(program: str, args: list[str], package: str, payload: str = "") -> subprocess.CompletedProcess[str]:
    path = _find(program)
    if path is None:
        places = ", ".join(_SBIN)
        raise ConfigError(
            f"{program} is neither in PATH nor in {places}; install it (Debian package: {package})"
        )
    command = [path, *args]
    try:
        done = subprocess.run(
            command,
            input=payload,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise _Stuck(
            f"{' '.join(command)} did not finish within {_TIMEOUT_S:.0f} s; see the kernel's log"
        ) from exc
    except OSError as exc:
        raise KernelError(f"{path} cannot be run: {exc.strerror}; reinstall the package {package}") from exc
    if done.returncode and "holding the xtables lock" in done.stderr:
        lock = os.environ.get("XTABLES_LOCKFILE", _LOCK_FILE)
        waited = f"{_LOCK_WAIT_S} s" if "--wait" in args else "no time"
        raise _Stuck(
            f"{' '.join(command)} waited {waited} for {lock}, which another process holds; see which: lslocks"
        )
    return done


def _failure(done: subprocess.CompletedProcess[str], attempt: str) -> KernelError:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("#")]
    reason = lines[0][:_LONGEST_QUOTE] if lines else "no message"
    command = " ".join(done.args)
    return KernelError(
        f"cannot {attempt}: {command}: exit {done.returncode}: {reason}; {_remedy(done.stderr)}"
    )


def _remedy(stderr: str) -> str:
    if re.search("permi", stderr, re.IGNORECASE):
        return "run as root with CAP_NET_ADMIN"
    if "syntax error" in stderr:
        return "nft 1.0.1 or newer is needed"
    if "lock file" in stderr:
        return "iptables must be able to write there: in a container mount /run/xtables.lock"
    return "see whether the kernel has it (modules nf_tables, nft_chain_nat, nft_masq; legacy: iptable_nat)"
