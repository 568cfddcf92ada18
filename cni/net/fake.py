"""A kernel in memory with the real one's manners, to state laws about plans without one."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from cni.net.entries import Entry, FdbEntry, Key, Link, NetState
from cni.net.plan import Operation, Refused, Scope


class FakeKernel:
    """Keeps entries in a dict and refuses what the kernel refuses.

    An entry on a link that does not exist is refused with ENODEV; a link that exists with other
    fixed attributes with EEXIST; dropping a link takes everything on it along; a unicast FDB entry
    replaces the one with the same MAC. `refuse` maps keys to an errno to answer with.
    """

    def __init__(self, entries: NetState | None = None) -> None:
        self.entries: dict[Key, Entry] = dict(entries or {})
        self.refuse: dict[Key, int] = {}

    def snapshot(self, scope: Scope) -> NetState:
        return {k: e for k, e in self.entries.items() if e.link in (*scope.links, scope.direct_link)}

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
        elif ("link", entry.link) not in self.entries:
            return errno.ENODEV
        if isinstance(entry, FdbEntry):
            self.entries = {
                k: e
                for k, e in self.entries.items()
                if not (isinstance(e, FdbEntry) and (e.link, e.mac) == (entry.link, entry.mac))
            }
        self.entries[entry.key] = entry
        return 0
