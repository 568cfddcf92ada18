"""A kernel in memory with the real one's manners, to state laws about plans without one."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from ipaddress import ip_network

from cni.net.entries import Blackhole, Entry, Key, Link, NetState, Route
from cni.net.plan import Operation, Refused, Scope


class FakeKernel:
    """Keeps entries in a dict and refuses what the kernel refuses.

    An entry on a link that does not exist is refused with ENODEV; a link that exists with other
    fixed attributes with EEXIST; dropping a link takes everything on it along. `others` are the links
    that exist and are not ours. `refuse` maps keys to an errno to answer with.
    """

    def __init__(self, entries: NetState | None = None, others: frozenset[str] = frozenset()) -> None:
        self.entries: dict[Key, Entry] = dict(entries or {})
        self.others = others
        self.refuse: dict[Key, int] = {}

    def snapshot(self, scope: Scope) -> NetState:
        return {key: _shown(entry, scope) for key, entry in self.entries.items() if _seen(entry, scope)}

    def apply(self, operations: Sequence[Operation]) -> list[Refused]:
        refused = []
        for operation in operations:
            number = self._carry_out(operation)
            if number:
                refused.append(Refused(operation, number, errno.errorcode[number]))
        return refused

    def _carry_out(self, operation: Operation) -> int:
        entry = operation.entry
        if number := self.refuse.get(entry.key):
            return number
        if operation.verb == "drop":
            self.entries.pop(entry.key, None)
            if isinstance(entry, Link):
                self.entries = {k: e for k, e in self.entries.items() if e.link != entry.name}
            return 0
        if isinstance(entry, Link):
            have = self.entries.get(entry.key)
            if isinstance(have, Link) and not entry.same_device(have):
                return errno.EEXIST
        elif entry.link and entry.link not in self.others and ("link", entry.link) not in self.entries:
            return errno.ENODEV
        self.entries[entry.key] = entry
        return 0


def _seen(entry: Entry, scope: Scope) -> bool:
    match entry:
        case Blackhole():
            return entry.dst in scope.blackholes
        case Route() if entry.link not in scope.links:
            return entry.marked and _inside(entry.dst, scope.networks)
        case _:
            return entry.link in scope.links


def _shown(entry: Entry, scope: Scope) -> Entry:
    if isinstance(entry, Link) and scope.tx_checksum is None:
        return entry._replace(tx_checksum=None)
    return entry


def _inside(dst: str, networks: tuple[str, ...]) -> bool:
    subnet = ip_network(dst)
    parsed = [ip_network(network) for network in networks]
    return any(subnet.version == n.version and subnet.subnet_of(n) for n in parsed)  # type: ignore[arg-type]
