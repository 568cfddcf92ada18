"""The objects, their history and who watches them: what etcd and the watch cache are to kube-apiserver.

One counter gives every write its resource version, whatever the kind. Objects are held as the bytes
that a list shows, so that a list is a join; a watch event adds the kind in front. The history of a kind
reaches back to `oldest` and serves old watches as well as the later pages of a list: the state at an
earlier version is today's with the events since undone.

With a journal every write is on disk (in the page cache: it survives SIGKILL) before it is answered.
History does not survive a restart, as the watch cache does not.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from tests.kube.schema import encode

Json = dict[str, Any]

ADDED, MODIFIED, DELETED = "ADDED", "MODIFIED", "DELETED"

# A watcher this far behind that has not taken anything for this long is cut off, as a slow reader is.
SLOW_EVENTS = 1000
SLOW_S = 2.0


@dataclass(frozen=True, slots=True)
class Item:
    """One object at one version: `data` is its JSON without kind and apiVersion."""

    version: int
    data: bytes

    def at(self, version: int) -> Item:
        """The same object with another version, as it is shown when it is gone."""
        old, new = (f'"resourceVersion":"{each}"'.encode() for each in (self.version, version))
        return Item(version, self.data.replace(old, new, 1))


@dataclass(frozen=True, slots=True)
class Event:
    """A change; `item` of a DELETED one is the last state with the version of the deletion."""

    kind: str
    key: str
    item: Item
    before: Item | None

    @property
    def version(self) -> int:
        return self.item.version


class Watcher:
    """The events of one watch that were not yet sent; `descriptor` becomes readable when there are any.

    `ended` tells that no more will come: the client was too slow, or all watches were ended.
    """

    def __init__(self, since: int) -> None:
        self.since = since
        self.ended = False
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events: deque[Event] = deque()
        self._taken_at = monotonic()

    def offer(self, event: Event) -> None:
        """Queue `event` unless this watch has seen it; called under the store's lock."""
        if self.ended or event.version <= self.since:
            return
        if not self._events:
            self._taken_at = monotonic()  # it had nothing to take until now
        elif len(self._events) >= SLOW_EVENTS and monotonic() - self._taken_at > SLOW_S:
            self.end()
            return
        self._events.append(event)
        self.wake()

    def take(self, limit: int = 500) -> list[Event]:
        """The next events, at most `limit`."""
        self._taken_at = monotonic()
        return [self._events.popleft() for _ in range(min(limit, len(self._events)))]

    def pending(self) -> bool:
        return bool(self._events)

    def end(self) -> None:
        self.ended = True
        self.wake()

    def wake(self) -> None:
        os.eventfd_write(self.descriptor, 1)

    def close(self) -> None:
        os.close(self.descriptor)


class Expired(Exception):
    """History does not reach back to `requested`; `oldest` is the first version it can serve."""

    def __init__(self, requested: int, oldest: int) -> None:
        super().__init__(f"too old resource version: {requested} ({oldest})")
        self.requested = requested
        self.oldest = oldest


class Future(Exception):
    """A version that was not yet given."""

    def __init__(self, requested: int, current: int) -> None:
        super().__init__(f"Too large resource version: {requested}, current: {current}")
        self.requested = requested
        self.current = current


class Collection:
    """The objects of one kind by key (`name`, or `namespace/name`), sorted, with their history."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        self.keys: list[str] = []
        self.history: deque[Event] = deque()
        self.oldest = 0
        self.watchers: set[Watcher] = set()
        self._listed: tuple[int, list[tuple[str, Item]]] | None = None

    def apply(self, event: Event) -> None:
        key = event.key
        if event.kind == DELETED:
            del self.items[key]
            self.keys.pop(bisect_left(self.keys, key))
            return
        if key not in self.items:
            insort(self.keys, key)
        self.items[key] = event.item

    def forget(self, keep: int) -> None:
        """Drop the oldest history beyond `keep` events."""
        while len(self.history) > keep:
            self.oldest = self.history.popleft().version

    def at(self, version: int) -> list[tuple[str, Item]]:
        """Every object as it was at `version`, in order of keys; raises Expired.

        The last answer is kept: the pages of one list ask for the same version again and again.
        """
        if version < self.oldest:
            raise Expired(version, self.oldest)
        if self._listed is None or self._listed[0] != version:
            self._listed = version, self._rebuild(version)
        return self._listed[1]

    def _rebuild(self, version: int) -> list[tuple[str, Item]]:
        undone: dict[str, Item | None] = {}
        for event in reversed(self.history):
            if event.version <= version:
                break
            undone[event.key] = event.before
        if not undone:
            return [(key, self.items[key]) for key in self.keys]
        state = {**self.items, **undone}
        return [(key, item) for key in sorted(state) if (item := state[key]) is not None]


class Store:
    """All objects. Every method may be called from any thread."""

    def __init__(self, resources: Iterable[str], journal: Path | None = None, window: int = 10_000) -> None:
        self._lock = threading.RLock()
        self._collections = {resource: Collection() for resource in resources}
        self._window = window
        self.version = 1
        self._journal: int | None = None
        if journal is not None:
            self._load(journal)

    def get(self, resource: str, key: str) -> Item | None:
        with self._lock:
            return self._collections[resource].items.get(key)

    def listed(self, resource: str, version: int | None = None) -> tuple[int, list[tuple[str, Item]]]:
        """The objects at `version` (None: now) and that version; raises Expired or Future."""
        with self._lock:
            if version is not None and version > self.version:
                raise Future(version, self.version)
            at = self.version if version is None else version
            return at, self._collections[resource].at(at)

    def write(self, resource: str, key: str, change: Callable[[Item | None], Json | None]) -> Item:
        """Replace an object by what `change` makes of it, None deletes it; return the item as stored.

        `change` runs under the lock and may raise. A result equal to what is there is no write.
        """
        with self._lock:
            before = self._collections[resource].items.get(key)
            after = change(before)
            if after is None:
                if before is None:
                    raise KeyError(key)
                return self._delete(resource, key, before)
            version = before.version if before else self.version + 1
            after["metadata"]["resourceVersion"] = str(version)
            data = encode(after)
            if before is not None and data == before.data:
                return before
            item = Item(version, data).at(self.version + 1)
            self._commit(resource, [Event(MODIFIED if before else ADDED, key, item, before)])
            return item

    def add_all(self, resource: str, objects: Iterable[tuple[str, Callable[[int], bytes]]]) -> None:
        """Add many new objects in one step; each gives its bytes for the version it gets."""
        with self._lock:
            collection = self._collections[resource]
            events = []
            for version, (key, data) in enumerate(objects, self.version + 1):
                if key in collection.items:
                    raise KeyError(f"{resource} {key} already exists")
                events.append(Event(ADDED, key, Item(version, data(version)), None))
            self._commit(resource, events)

    def advance(self, count: int = 1) -> int:
        """Count versions up as writes of other kinds do; return the new one."""
        with self._lock:
            self.version += count
            self._record(f"{self.version}\t\t\t\n".encode())
            return self.version

    def compact(self) -> int:
        """Make every version before a new one too old; return that one."""
        with self._lock:
            version = self.advance()
            for collection in self._collections.values():
                collection.history.clear()
                collection.oldest = version
            return version

    def watch(self, resource: str, since: int | None) -> tuple[Watcher, list[tuple[str, Item]]]:
        """Follow the changes after `since`; None: from now, with the state of now. Raises Expired.

        A version in the future is accepted and hears nothing until the counter has passed it, as
        upstream; a server that lost its data therefore has deaf clients.
        """
        with self._lock:
            collection = self._collections[resource]
            start = self.version if since is None else since
            if start < collection.oldest:
                raise Expired(start, collection.oldest)
            watcher = Watcher(start)
            state = collection.at(start) if since is None else []
            for event in collection.history:
                watcher.offer(event)
            collection.watchers.add(watcher)
            return watcher, state

    def progress(self, watcher: Watcher) -> int | None:
        """The version up to which `watcher` has taken everything; None while events wait for it."""
        with self._lock:
            return None if watcher.pending() else self.version

    def unwatch(self, resource: str, watcher: Watcher) -> None:
        with self._lock:
            self._collections[resource].watchers.discard(watcher)
            watcher.close()

    def watchers(self, resource: str | None = None) -> list[Watcher]:
        """The open watches of one kind, or of all."""
        with self._lock:
            kinds = self._collections.values() if resource is None else [self._collections[resource]]
            return [watcher for collection in kinds for watcher in collection.watchers]

    def end_watches(self) -> int:
        """End every watch in order; return how many there were."""
        with self._lock:
            watchers = self.watchers()
            for watcher in watchers:
                watcher.end()
            return len(watchers)

    def wake_watches(self) -> None:
        """Let every watch look around: a fault was set or cleared."""
        with self._lock:
            for watcher in self.watchers():
                watcher.wake()

    def _delete(self, resource: str, key: str, before: Item) -> Item:
        item = before.at(self.version + 1)
        self._commit(resource, [Event(DELETED, key, item, before)])
        return item

    def _commit(self, resource: str, events: list[Event]) -> None:
        if not events:
            return
        collection = self._collections[resource]
        self._record(b"".join(_line(resource, event) for event in events))
        for event in events:
            collection.apply(event)
            collection.history.append(event)
        self.version = events[-1].version
        collection.forget(self._window)
        for watcher in collection.watchers:
            for event in events:
                watcher.offer(event)

    def _record(self, lines: bytes) -> None:
        if self._journal is not None:
            view = memoryview(lines)
            while view:
                view = view[os.write(self._journal, view) :]

    def _load(self, journal: Path) -> None:
        """Take over what an earlier run wrote; a last line that was cut off is a write never answered."""
        lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
        for line in lines:
            version, resource, name, data = line.split(b"\t", 3)
            key = name.decode()
            self.version = int(version)
            if not resource:
                continue
            items = self._collections[resource.decode()].items
            if data:
                items[key] = Item(self.version, data)
            else:
                del items[key]
        fresh = journal.with_suffix(".new")
        with fresh.open("wb") as out:
            for kind, collection in self._collections.items():
                collection.keys = sorted(collection.items)
                collection.oldest = self.version
                by_age = sorted(collection.items.items(), key=lambda entry: entry[1].version)
                out.writelines(_line(kind, Event(ADDED, key, item, None)) for key, item in by_age)
            out.write(f"{self.version}\t\t\t\n".encode())
        fresh.replace(journal)
        self._journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)


def _line(resource: str, event: Event) -> bytes:
    data = b"" if event.kind == DELETED else event.item.data
    return f"{event.version}\t{resource}\t{event.key}\t".encode() + data + b"\n"
