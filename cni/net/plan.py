"""The difference between two kernel states, as operations in an order that is safe for traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from cni.net.entries import Entry, Link, NetState


class Operation(NamedTuple):
    """Write (`put`, create or replace) or delete (`drop`) one entry."""

    verb: Literal["put", "drop"]
    entry: Entry


class Refused(NamedTuple):
    """An operation that the kernel did not carry out: errno and the kernel's own words, if any."""

    operation: Operation
    errno: int
    text: str


class Scope(NamedTuple):
    """Which entries are ours to see and to drop.

    Every permanent neighbour, FDB entry and route on one of `links`; addresses on them that lie in
    one of `networks` (on a device with an IPv6 underlay all but link-local ones); marked routes into
    one of `networks`, whatever link they are on; every blackhole route of exactly one of `blackholes`.

    With `tx_checksum` None nobody asks what links do about checksums, and their entries say None too;
    else they say how it is, and a link that cannot tell counts as being as wanted.
    """

    links: tuple[str, ...]
    networks: tuple[str, ...] = ()
    blackholes: tuple[str, ...] = ()
    tx_checksum: bool | None = None


class Kernel(Protocol):
    """The kernel's tables as values. One instance per network namespace and thread."""

    def snapshot(self, scope: Scope) -> NetState:
        """Every entry in `scope`, and nothing else; an interrupted dump is read again."""
        ...

    def apply(self, operations: Sequence[Operation]) -> list[Refused]:
        """Send the operations in order, read every answer. A refusal is data, not an exception.

        Dropping what is not there is no refusal: it is what was wanted.
        """
        ...


def plan(desired: NetState, actual: NetState) -> list[Operation]:
    """Return what turns `actual` into `desired`, in an order safe for traffic.

    Make before break: puts rise through the ranks, so a route never precedes its neighbour; drops
    then fall through them. A link that the kernel cannot change in place is dropped first, and all
    that lived on it counts as gone. `plan(x, x)` is empty.
    """
    if desired == actual:
        return []
    rebuilt = {
        have.name: have
        for key, want in desired.items()
        if isinstance(want, Link) and isinstance(have := actual.get(key), Link) and not want.same_device(have)
    }
    if rebuilt:
        actual = {key: entry for key, entry in actual.items() if entry.link not in rebuilt}
    puts = [entry for key, entry in desired.items() if actual.get(key) != entry]
    drops = [entry for key, entry in actual.items() if key not in desired]
    puts.sort(key=lambda entry: entry.rank)
    drops.sort(key=lambda entry: -entry.rank)
    return [
        *(Operation("drop", link) for link in rebuilt.values()),
        *(Operation("put", entry) for entry in puts),
        *(Operation("drop", entry) for entry in drops),
    ]
