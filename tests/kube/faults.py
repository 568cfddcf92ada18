"""What goes wrong on purpose, and what was asked: faults match requests by verb, until cleared or used up."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.kube import status
from tests.kube.access import Call
from tests.kube.status import ApiFailure

Json = dict[str, Any]

DROP, STALL, RESET, SLOW, REFUSE, GONE = "drop", "stall", "reset", "slow", "refuse", "gone"
KINDS = (DROP, STALL, RESET, SLOW, REFUSE, GONE)
VERBS = frozenset({"get", "list", "watch", "create", "update", "patch", "delete"})


@dataclass(slots=True)
class Fault:
    """One fault. No `verbs` means all; `left` None means until it is cleared.

    drop    the connection is closed without an answer
    stall   no answer and no watch event while it lasts; then the connection is closed, a watch goes on
    reset   the connection is reset in the middle of the answer, or of a watch line
    slow    the answer comes after `delay_s`, at most `bytes_per_s` bytes a second
    refuse  HTTP `code` 429, 500, 503 or 504; `retry_after_s` and `plain` are for 429
    gone    410: as an ERROR event of a watch, as the answer to anything else
    """

    kind: str
    verbs: frozenset[str] = frozenset()
    left: int | None = None
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    code: int = 500
    retry_after_s: int = 1
    plain: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault {self.kind!r}: must be one of {', '.join(KINDS)}")
        unknown = self.verbs - VERBS
        if unknown:
            raise ValueError(f"fault verbs {sorted(unknown)}: must be among {', '.join(sorted(VERBS))}")
        if self.kind == REFUSE:
            self.refusal()

    def refusal(self) -> ApiFailure:
        if self.code == 429:
            return status.too_many_requests(self.retry_after_s, self.plain)
        return status.server_error(self.code)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that came in: `what` is the resource with its subresource, or the path."""

    verb: str
    what: str
    name: str
    query: str
    agent: str


@dataclass(slots=True)
class Faults:
    """The faults of the moment and the count of requests; safe for threads."""

    on_change: Callable[[], None]
    _faults: list[Fault] = field(default_factory=list)
    _seen: list[Seen] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)
        self.on_change()

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
        self.on_change()

    def take(self, call: Call) -> Fault | None:
        """The first fault that hits this request, counted as used; a reset of a watch waits for a line."""
        return self._take(lambda one: not (one.kind == RESET and call.verb == "watch"), call.verb)

    def take_line(self, kind: str) -> Fault | None:
        """The fault of this kind that hits the next line of an open watch."""
        return self._take(lambda one: one.kind == kind, "watch")

    def stalls(self, fault: Fault) -> bool:
        """Whether this fault, once taken, still lasts."""
        with self._lock:
            return any(one is fault for one in self._faults)

    def watches_stall(self) -> bool:
        with self._lock:
            return any(one.kind == STALL and _hits(one, "watch") for one in self._faults)

    def _take(self, fits: Callable[[Fault], bool], verb: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if not _hits(fault, verb) or not fits(fault):
                    continue
                if fault.left is not None:
                    fault.left -= 1
                return fault
        return None

    def record(self, call: Call, query: str, agent: str) -> None:
        with self._lock:
            self._seen.append(Seen(call.verb, call.what, call.name, query, agent))

    def seen(self) -> list[Seen]:
        with self._lock:
            return list(self._seen)

    def counts(self) -> Counter[str]:
        """Requests since the start or the last `forget`, by `verb resource`."""
        with self._lock:
            return Counter(f"{one.verb} {one.what}" for one in self._seen)

    def forget(self) -> None:
        with self._lock:
            self._seen.clear()


def _hits(fault: Fault, verb: str) -> bool:
    return (not fault.verbs or verb in fault.verbs) and (fault.left is None or fault.left > 0)
