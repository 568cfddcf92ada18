"""The API double's store against a naive twin: history, watches, and the journal on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kube import store as store_module
from tests.kube.store import DELETED, SLOW_S, Expired, Future, Item, Store, Watcher

State = dict[str, str]


def body(value: str) -> Callable[[Item | None], dict[str, Any]]:
    return lambda _: {"metadata": {"uid": "u", "resourceVersion": ""}, "value": value}


def put(store: Store, key: str, value: str) -> int:
    return store.write("nodes", key, body(value)).version


def delete(store: Store, key: str) -> int:
    return store.write("nodes", key, lambda _: None).version


def state(store: Store, version: int | None = None) -> State:
    return {key: json.loads(item.data)["value"] for key, item in store.listed("nodes", version)[1]}


def drain(watcher: Watcher) -> list[tuple[str, str, int]]:
    return [(event.kind, event.key, event.version) for event in watcher.take()]


operations = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["x", "y", None])), max_size=30)


@given(operations, st.integers(0, 12))
def test_every_version_in_history_can_be_listed_and_watched(
    changes: list[tuple[str, str | None]], window: int
) -> None:
    store = Store(["nodes", "pods"], window=window)
    twin: State = {}
    versions: dict[int, State] = {store.version: {}}
    for key, value in changes:
        if value is not None:
            put(store, key, value)
            twin[key] = value
        elif key in twin:
            delete(store, key)
            del twin[key]
        versions[store.version] = dict(twin)
    events = 0
    for version, then in sorted(versions.items(), reverse=True):
        if events > window:
            with pytest.raises(Expired):
                store.listed("nodes", version)
            with pytest.raises(Expired):
                store.watch("nodes", version)
            continue
        assert state(store, version) == then
        watcher, _ = store.watch("nodes", version)
        assert fold(then, watcher) == twin
        store.unwatch("nodes", watcher)
        events += 1
    assert list(state(store)) == sorted(twin)


def fold(then: State, watcher: Watcher) -> State:
    after, version = dict(then), watcher.since
    for event in watcher.take():
        assert event.version > version
        version = event.version
        assert json.loads(event.item.data)["metadata"]["resourceVersion"] == str(version)
        assert (event.kind == "ADDED") == (event.key not in after)
        if event.kind == DELETED:
            del after[event.key]
        else:
            after[event.key] = json.loads(event.item.data)["value"]
    return after


def test_a_write_without_a_change_is_no_write() -> None:
    store = Store(["nodes"])
    version = put(store, "a", "x")
    watcher, _ = store.watch("nodes", version)
    assert put(store, "a", "x") == version == store.version
    assert drain(watcher) == []
    assert put(store, "a", "y") == version + 1
    assert drain(watcher) == [("MODIFIED", "a", version + 1)]


def test_a_failing_change_leaves_everything_as_it_was() -> None:
    store = Store(["nodes"])
    version = put(store, "a", "x")

    def fail(_: Item | None) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        store.write("nodes", "a", fail)
    with pytest.raises(KeyError):
        delete(store, "b")
    assert store.version == version
    assert state(store) == {"a": "x"}


def test_kinds_share_the_counter_and_nothing_else() -> None:
    store = Store(["nodes", "pods"])
    first = put(store, "a", "x")
    watcher, _ = store.watch("nodes", first)
    second = store.write("pods", "ns/p", body("z")).version
    assert second == first + 1
    assert drain(watcher) == []
    assert state(store, second) == {"a": "x"}


def test_compaction_leaves_the_present_and_open_watches() -> None:
    store = Store(["nodes"])
    old = put(store, "a", "x")
    watcher, _ = store.watch("nodes", old)
    new = store.compact()
    assert new > old
    with pytest.raises(Expired) as refused:
        store.watch("nodes", old)
    assert (refused.value.requested, refused.value.oldest) == (old, new)
    assert state(store, new) == {"a": "x"}
    put(store, "b", "y")
    assert drain(watcher) == [("ADDED", "b", new + 1)]
    store.unwatch("nodes", store.watch("nodes", new)[0])


def test_a_watch_of_the_future_hears_nothing_before_it() -> None:
    store = Store(["nodes"])
    watcher, _ = store.watch("nodes", store.version + 2)
    start = store.version
    for number in range(4):
        put(store, "a", str(number))
    assert drain(watcher) == [("MODIFIED", "a", start + 3), ("MODIFIED", "a", start + 4)]
    with pytest.raises(Future):
        store.listed("nodes", store.version + 1)


def test_a_watcher_that_takes_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(store_module, "SLOW_EVENTS", 3)
    monkeypatch.setattr(store_module, "monotonic", lambda: clock[0])
    store = Store(["nodes"])
    reader, _ = store.watch("nodes", None)
    sleeper, _ = store.watch("nodes", None)
    clock[0] += 3600
    for number in range(6):
        put(store, "a", str(number))
        reader.take()
    assert not sleeper.ended  # a burst after an idle hour is no slowness
    clock[0] += SLOW_S + 1
    put(store, "a", "last")
    assert sleeper.ended
    assert not reader.ended
    assert len(drain(sleeper)) == 6


def test_progress_is_silent_while_events_wait() -> None:
    store = Store(["nodes"])
    watcher, _ = store.watch("nodes", None)
    assert store.progress(watcher) == store.version
    put(store, "a", "x")
    assert store.progress(watcher) is None
    watcher.take()
    assert store.progress(watcher) == store.advance(0)


def test_the_journal_keeps_objects_and_version(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    store = Store(["nodes", "pods"], journal)
    put(store, "b", "1")
    put(store, "a", "2")
    put(store, "b", "tab\tand\nline")
    store.write("pods", "ns/p", body("z"))
    delete(store, "a")
    version = store.advance(5)
    for _ in range(2):
        again = Store(["nodes", "pods"], journal)
        assert again.version == version
        assert state(again) == {"b": "tab\tand\nline"}
        assert [key for key, _ in again.listed("pods")[1]] == ["ns/p"]
    with pytest.raises(Expired):
        again.watch("nodes", version - 1)
    assert put(again, "c", "3") == version + 1


def test_a_torn_last_line_of_the_journal_was_never_answered(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    store = Store(["nodes"], journal)
    version = put(store, "a", "x")
    put(store, "b", "y")
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-5])
    again = Store(["nodes"], journal)
    assert state(again) == {"a": "x"}
    assert again.version == version


def test_many_at_once_are_as_many_writes() -> None:
    store = Store(["nodes"])
    watcher, _ = store.watch("nodes", None)
    made = [
        (key, lambda version: b'{"metadata":{"resourceVersion":"%d"},"value":"v"}' % version) for key in "ba"
    ]
    store.add_all("nodes", made)
    start = watcher.since
    assert drain(watcher) == [("ADDED", "b", start + 1), ("ADDED", "a", start + 2)]
    assert list(state(store)) == ["a", "b"]
    with pytest.raises(KeyError):
        store.add_all("nodes", made[:1])
