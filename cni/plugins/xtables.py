"""The iptables rules of a container: loaded for those who ask for them, removed wherever upstream left some.

What `iptables` wrote by nf_tables is removed over netlink, as chains of the tables `ip nat` and `ip6 nat`,
with no process started. What a legacy `iptables` wrote is looked for in the kernel's own copy of its table,
and only if it is there the program is run.

A program is run without a shell, by absolute path, in the network namespace of the calling thread.
"""

from __future__ import annotations

import errno
import os
import sys
from _socket import socket as Socket

from cni.errors import INTERNAL, CniError
from cni.net import nft, nlmsg
from cni.net.nlsocket import ProtocolMissing
from cni.spec import gojson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni.host import Host
    from cni.net.nlmsg import Request

_FAMILIES = {4: nft.IP, 6: nft.IP6}
_PREFIXES = {4: "ip", 6: "ip6"}
# A service manager's or a container's PATH often lacks the directories of system administration.
_SBIN = ("/usr/sbin", "/sbin")
_LOCK_WAIT_S = 10
_LONGEST_QUOTE = 200
_NAMES_BYTES = 4096  # there are five tables
_IGNORED_BY_PYTHON = (13, 25)  # SIGPIPE, SIGXFSZ: what is ignored would stay ignored across exec
_SOCK_DGRAM, _SOCK_CLOEXEC = 2, 0o2000000
_LEGACY_SOCKETS = {
    4: (2, 0),
    6: (10, 41),
}  # domain and level of linux/netfilter_ipv4/ip_tables.h, ip6_tables.h
_GET_INFO, _GET_ENTRIES = 64, 65


def restore(family: int, payload: str) -> None:
    """Load `payload` with `iptables-restore --noflush` or `ip6tables-restore`; raises CniError 999.

    The commands of the payload are carried out all or none, for each table.
    """
    path = _find(f"{_PREFIXES[family]}tables-restore")
    if path is None:
        program = f"{_PREFIXES[family]}tables"
        raise CniError(
            INTERNAL, f'failed to locate iptables: exec: "{program}": executable file not found in $PATH'
        )
    _run([path, "--noflush", f"--wait={_LOCK_WAIT_S}"], payload)


def remove_chains(
    host: Host, table: str, chains: Sequence[str], parents: Sequence[str], *, may_be_native: bool = True
) -> bool:
    """Delete chains of an iptables table, and the rules in `parents` that lead to them, of both families.

    What is not there is passed over; who has asked nf_tables for them already says so by `may_be_native`.
    True if there was any of it. Raises KernelError if a chain stays, as when a rule of another chain leads to
    it, and CniError 999 if a legacy iptables is needed and fails.
    """
    found = False
    if may_be_native:
        try:
            found = nft.retry(lambda: _remove_native(host, table, chains, parents))
        except ProtocolMissing:
            found = False
    return _remove_legacy(host, table, chains, parents) or found


def is_reached(host: Host, family: int, table: str, chain: str, parent: str) -> bool:
    """Whether a rule of `parent` leads to `chain`; of a legacy table, whether `chain` is there."""
    rules = nft.rules(host.netfilter, nft.Table(_FAMILIES[family], table), parent)
    if any(rule.jump == chain for rule in rules):
        return True
    return table in _legacy_tables(_PREFIXES[family]) and _legacy_holds(family, table, chain)


# --- by nf_tables


def chain_queries(table: str, chains: Sequence[str]) -> list[Request]:
    """What to ask `nft.present` for: each chain, of both families."""
    return [nft.chain_query(*place) for place in _places(table, chains)]


def _places(table: str, chains: Sequence[str]) -> list[tuple[nft.Table, str]]:
    return [(nft.Table(family, table), chain) for family in _FAMILIES.values() for chain in chains]


def _remove_native(host: Host, table: str, chains: Sequence[str], parents: Sequence[str]) -> bool:
    places = _places(table, chains)
    there = nft.present(host.netfilter, chain_queries(table, chains))
    doomed = [place for place, exists in zip(places, there, strict=True) if exists]
    _deletion(host, doomed, parents).commit(host.netfilter)
    return bool(doomed)


def _deletion(host: Host, doomed: Sequence[tuple[nft.Table, str]], parents: Sequence[str]) -> nft.Transaction:
    change = nft.Transaction()
    for table in dict.fromkeys(table.family for table, _ in doomed):
        mine = [place for place in doomed if place[0].family == table]
        names = {chain for _, chain in mine}
        for parent in parents:
            for rule in nft.rules(host.netfilter, mine[0][0], parent):
                if rule.jump in names:
                    change.delete_rule(mine[0][0], rule)
        # Emptied first, as they may lead to each other.
        for place in mine:
            change.flush_chain(*place)
        for place in mine:
            change.delete_chain(*place)
    return change


# --- by the legacy iptables


def _remove_legacy(host: Host, table: str, chains: Sequence[str], parents: Sequence[str]) -> bool:
    found = False
    for family, prefix in _PREFIXES.items():
        if table not in _legacy_tables(prefix):
            continue
        there = [chain for chain in chains if _legacy_holds(family, table, chain)]
        if there:
            _remove_by_program(host, prefix, table, there, parents)
            found = True
    return found


def _legacy_tables(prefix: str) -> list[str]:
    """The tables that exist in this network namespace; none where the kernel has no legacy iptables."""
    try:
        # Python's own files take five system calls more.
        file = os.open(f"/proc/thread-self/net/{prefix}_tables_names", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(file, _NAMES_BYTES).decode().split()
        finally:
            os.close(file)
    except OSError:
        return []


def _legacy_holds(family: int, table: str, chain: str) -> bool:
    # A chain begins with an entry of the target "ERROR" (struct xt_error_target), which holds its name.
    return b"ERROR".ljust(30, b"\0") + f"{chain}\0".encode() in _legacy_table(family, table)


def _legacy_table(family: int, table: str) -> bytes:
    """The rules of a table as the kernel keeps them, all in one piece; empty if they cannot be read."""
    import ctypes  # here, as hosts without a legacy table never need it

    domain, level = _LEGACY_SOCKETS[family]
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        sock = Socket(domain, _SOCK_DGRAM | _SOCK_CLOEXEC)
    except OSError:
        return b""
    try:
        # Struct ipt_getinfo: name, eleven numbers, number of entries, bytes of them.
        size, option, room = 0, _GET_INFO, 84
        while True:
            buffer = ctypes.create_string_buffer(table.encode().ljust(32, b"\0") + nlmsg.u32(size), room)
            length = ctypes.c_uint32(room)
            if libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(length)):
                if option == _GET_ENTRIES and ctypes.get_errno() == errno.EAGAIN:
                    option, room = _GET_INFO, 84  # it has got another size since
                    continue
                return b""
            if option == _GET_ENTRIES:
                return buffer.raw
            size = int.from_bytes(buffer.raw[80:84], sys.byteorder)
            # Struct ipt_get_entries: name, bytes, then the entries, aligned as 64 bits are.
            option, room = _GET_ENTRIES, 40 + size
    finally:
        sock.close()


def _remove_by_program(
    host: Host, prefix: str, table: str, chains: Sequence[str], parents: Sequence[str]
) -> None:
    path = _find(f"{prefix}tables-legacy") or _find(f"{prefix}tables")
    wait = f"--wait={_LOCK_WAIT_S}"
    listing = _run([path, wait, "-t", table, "-S"], "").splitlines() if path else []
    there = [chain for chain in chains if f"-N {chain}" in listing]
    if not there:
        # No reason to refuse a DEL for ever.
        host.note(
            f"{chains[0]} stays in the legacy table {table}: no {prefix}tables-legacy to delete it with"
        )
        return
    endings = tuple(f" -{how} {chain}" for chain in there for how in "jg")
    jumps = [f"-D {line[3:]}" for line in listing if line.endswith(endings) and line.split()[1] in parents]
    lines = [*(f":{chain} - [0:0]" for chain in there), *jumps, *(f"-X {chain}" for chain in there)]
    payload = "\n".join([f"*{table}", *lines, "COMMIT", ""])
    _run([f"{path}-restore", "--noflush", wait], payload)


def _find(program: str) -> str | None:
    for directory in (*os.environ.get("PATH", "").split(":"), *_SBIN):
        path = f"{directory}/{program}"
        if directory.startswith("/") and os.access(path, os.X_OK):
            return path
    return None


def _run(argv: list[str], stdin: str) -> str:
    """stdout of a program that must succeed; raises CniError 999."""
    ends = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
    try:
        os.write(ends[0], stdin.encode())
        os.lseek(ends[0], 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, end, target) for target, end in enumerate(ends)]
        pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=actions, setsigdef=_IGNORED_BY_PYTHON)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            said = _content(ends[2])[:_LONGEST_QUOTE].strip()
            raise CniError(INTERNAL, f"{' '.join(argv)}: exit {status}: {gojson.dumps(said)}")
        return _content(ends[1])
    except OSError as exc:
        raise CniError(INTERNAL, f"{argv[0]} cannot be run: {(exc.strerror or str(exc)).lower()}") from None
    finally:
        for end in ends:
            os.close(end)


def _content(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0).decode("utf-8", "replace")
