"""Our rules in the kernel, by iptables or by nftables: read, compare, replace in one transaction.

Decision: the programs are run, not the kernel's interface spoken. Only they know which of two
incompatible kernel interfaces the host uses for its iptables rules (`nf_tables` or legacy), and
upstream, kube-proxy and the operator see the rules through the same programs.

Every program runs without a shell, by absolute path, with a time limit. It runs in the network
namespace of the calling thread.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from cni.errors import ConfigError, KernelError, NetworkError
from cni.net.ruleset import Chain, ChainRules, NftTable, Ruleset, removal_payload, update_payload

# A service manager's or a container's PATH often lacks the directories of system administration.
_SBIN = ("/usr/sbin", "/sbin")
_TIMEOUT_S = 30.0
_LONGEST_QUOTE = 200

Version = tuple[int, int, int]
_WAIT_SINCE: Version = (1, 4, 20)
_RESTORE_WAIT_SINCE: Version = (1, 6, 2)
_RANDOM_FULLY_SINCE: Version = (1, 6, 2)


class Iptables:
    """Our chains, through `iptables` and `ip6tables`, each with its `-restore`. Not for several threads."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        """`chains` are all that may ever be ours, in the order in which they are removed."""
        self._chains = tuple(chains)
        self._versions: dict[str, Version] = {}
        self._swept = False

    def supports_random_fully(self) -> bool:
        """Whether this iptables knows `--random-fully`; raises ConfigError if it is not installed."""
        return self._version("iptables") >= _RANDOM_FULLY_SINCE

    def ensure(self, rules: Ruleset) -> bool:
        """Bring every chain of `rules` to its wanted state; True if one had to change.

        The first call that succeeds also removes those of our chains that are not wanted (any more).
        Each chain is tried; after that the first failure is raised: ConfigError for a program that is not
        installed, KernelError for one that failed. Costs two short processes per chain while nothing
        differs.
        """
        wanted = {desired.chain for desired in rules.chains}
        unwanted = [] if self._swept else [chain for chain in self._chains if chain not in wanted]
        updates = [partial(self._update, desired) for desired in rules.chains]
        changed = _run_all([*updates, *(partial(self._delete, chain) for chain in unwanted)])
        self._swept = True
        return changed

    def remove(self) -> bool:
        """Delete our chains and every rule that leads to them; True if there was one.

        A program that is not installed or a table that it cannot list holds nothing of ours. Raises
        KernelError if a chain is there and cannot be deleted.
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
        if _find(_program(chain)) is None:
            return False
        listing = self._list(chain)
        lines = listing.stdout.splitlines() if listing.returncode == 0 else []
        return self._restore(chain, removal_payload(chain, lines))

    def _list(self, chain: Chain, *names: str) -> subprocess.CompletedProcess[str]:
        program = _program(chain)
        wait = ["--wait"] if self._version(program) >= _WAIT_SINCE else []
        return _run(program, [*wait, "-t", chain.table, "-S", *names], "iptables")

    def _restore(self, chain: Chain, payload: str | None) -> bool:
        if payload is None:
            return False
        program = _program(chain)
        wait = ["--wait"] if self._version(program) >= _RESTORE_WAIT_SINCE else []
        done = _run(f"{program}-restore", ["--noflush", *wait], "iptables", payload)
        if done.returncode != 0:
            raise _failure(done, f"write chain {chain.name} of table {chain.table}")
        return True

    def _version(self, program: str) -> Version:
        if program not in self._versions:
            self._versions[program] = parse_version(_run(program, ["--version"], "iptables").stdout)
        return self._versions[program]


class Nftables:
    """Our tables, through `nft` (1.0.1 or newer: chains with comments). Not for several threads.

    Decision: what is there is compared with what `nft` printed right after our last transaction, not
    with the text we sent, as each version prints rules in its own way.
    """

    def __init__(self, tables: Sequence[NftTable]) -> None:
        """`tables` are the ones that the transactions given to `ensure` replace."""
        self._tables = tuple(tables)
        self._applied: tuple[str, str | None] | None = None

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

        The first call always loads the rules. Raises ConfigError if nft is not installed, KernelError if
        the transaction failed; then nothing of it was done. Costs one process per table while nothing
        differs.
        """
        before = self._listing()
        # A listing that cannot be had is never proof that nothing changed.
        if before is not None and (rules.nft, before) == self._applied:
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


def parse_version(text: str) -> Version:
    """The version in `iptables v1.8.9 (nf_tables)`; raises KernelError if there is none."""
    match = re.search(r"v(\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None:
        raise KernelError(
            f"iptables --version printed {text[:_LONGEST_QUOTE]!r}, expected such as 'iptables v1.8.9'"
        )
    major, minor, patch = match.groups(default="0")
    return int(major), int(minor), int(patch)


def _run_all(steps: Iterable[Callable[[], bool]]) -> bool:
    """Run every step whatever the others do; True if one of them changed something."""
    changed, failures = False, list[NetworkError]()
    for step in steps:
        try:
            changed |= step()
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


def _program(chain: Chain) -> str:
    return f"{chain.family.value}tables"


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
        return subprocess.run(
            command,
            input=payload,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise KernelError(
            f"{' '.join(command)} did not finish within {_TIMEOUT_S:.0f} s; "
            "see whether another program holds /run/xtables.lock"
        ) from exc
    except OSError as exc:
        raise KernelError(f"{path} cannot be run: {exc.strerror}; reinstall the package {package}") from exc


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
    return "see whether the kernel has it (modules nf_tables, nft_chain_nat, nft_masq; legacy: iptable_nat)"
