"""The index against the directory: whatever anybody does there, it says what a scan would say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni.host import Directory
from cni.ipam import store
from cni.ipam.index import Index, Indexes
from cni.ipam.store import Holdings, Store, owner_of, scan
from cni.spec.address import parse_ip

ROOT = Path(__file__).parents[2]
OWNER = owner_of("c1", "eth0")
NAMES = ("10.0.0.2", "10.0.0.3", "fd00::2", "note", "lock", "last_reserved_ip.0")


def at(path: Path) -> Directory:
    return Directory("/the/store", str(path))


def content(holdings: Holdings) -> tuple[list[tuple[str, bytes]], list[int]]:
    owners = sorted(holdings.reservations())
    taken = [n for n in range(16) if parse_ip(f"10.0.0.{n}")[1] in holdings.taken[4]]
    return owners, taken


@pytest.fixture
def index() -> Iterator[Index]:
    made = Index()
    yield made
    made.close()


def make_and_remove(store: Path) -> None:
    (store / "10.0.0.3").write_bytes(b"")
    (store / "10.0.0.3").unlink()


def remove_and_make(store: Path) -> None:
    (store / "10.0.0.2").unlink()
    (store / "10.0.0.2").write_bytes(b"c2")


CHANGES: dict[str, Callable[[Path], object]] = {
    "made": lambda store: (store / "10.0.0.3").write_bytes(b"c2\r\neth0"),
    "made and gone": make_and_remove,
    "gone": lambda store: (store / "10.0.0.2").unlink(),
    "gone and made": remove_and_make,
    "written over": lambda store: (store / "10.0.0.2").write_bytes(b"c2\r\neth0"),
    "cut": lambda store: os.truncate(store / "10.0.0.2", 2),
    "renamed": lambda store: (store / "10.0.0.2").rename(store / "10.0.0.5"),
    "moved in": lambda store: (store.parent / "outside").rename(store / "10.0.0.5"),
    "moved out": lambda store: (store / "10.0.0.2").rename(store.parent / "10.0.0.2"),
    "linked": lambda store: os.link(store.parent / "outside", store / "10.0.0.5"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_seen_without_a_scan(case: str, tmp_path: Path, index: Index) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "outside").write_bytes(b"c9\r\neth0")
    (store / "10.0.0.2").write_bytes(OWNER)
    before = content(index.holdings(at(store)))
    CHANGES[case](store)
    after = content(index.holdings(at(store)))
    assert after == content(scan(at(store)))
    assert (after == before) is (case == "made and gone")
    assert index.scans == 1


@pytest.mark.parametrize("case", [None, *CHANGES])
def test_a_glance_tells_what_is_there_or_nothing(case: str | None, tmp_path: Path, index: Index) -> None:
    """Who does not hold the lock is not told what was there before a change."""
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "outside").write_bytes(b"c9\r\neth0")
    assert index.glance(at(store)) is None
    (store / "10.0.0.2").write_bytes(OWNER)
    index.holdings(at(store))
    if case is not None:
        CHANGES[case](store)
        assert index.glance(at(store)) is None
        index.holdings(at(store))
    known = index.glance(at(store))
    assert known is not None and content(known) == content(scan(at(store)))
    assert known.has(OWNER) is any(owner in (OWNER, b"c1") for _name, owner in known.reservations())
    store.rename(tmp_path / "aside")
    store.mkdir()
    assert index.glance(at(store)) is None


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_after_our_own_is_seen(case: str, tmp_path: Path, index: Index) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (tmp_path / "outside").write_bytes(b"c9\r\neth0")
    with Store(at(store), index) as ours:
        with ours.held() as held:
            assert held.take(parse_ip("10.0.0.2"), OWNER)
        CHANGES[case](store)
        with ours.held() as held:
            assert content(held.holdings) == content(scan(at(store)))
    assert index.scans == 1


def test_what_we_did_ourselves_is_not_read_again(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_directory: Directory, name: str) -> bytes:
        raise AssertionError(name)

    first, second = parse_ip("10.0.0.200"), parse_ip("10.0.0.3")
    with Store(at(tmp_path), index) as ours, ours.held():
        pass
    monkeypatch.setattr(store, "_read", read)
    with Store(at(tmp_path), index) as ours:
        for address in (first, second, first):  # the file of the last one is made, cut, and made longer
            with ours.held() as held:
                assert held.take(address, OWNER)
                held.remember(0, address)
            with ours.held() as held:
                assert held.last(0) == address
                assert held.holdings.addresses(OWNER) == [address]
                assert held.free(address, OWNER)


OTHERS: dict[str, Callable[[Path], object]] = {
    "written over": lambda file: file.write_bytes(b"10.0.0.9"),
    "the same": lambda file: file.write_bytes(b"10.0.0.2"),
    "cut": lambda file: os.truncate(file, 0),
    "gone": lambda file: file.unlink(),
    "replaced": lambda file: (
        file.with_name("new").write_bytes(b"10.0.0.8"),
        file.with_name("new").rename(file),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("seen", [True, False])
def test_the_last_address_is_what_is_in_the_file(case: str, seen: bool, tmp_path: Path, index: Index) -> None:
    file, second = tmp_path / "last_reserved_ip.0", parse_ip("10.0.0.2")
    with Store(at(tmp_path), index) as ours:
        with ours.held() as held:
            held.remember(0, second)
        if seen:  # else what it did and what others did is heard in one
            with ours.held() as held:
                assert held.last(0) == second
        OTHERS[case](file)
        text = file.read_text() if file.exists() else ""
        with ours.held() as held:
            assert held.last(0) == (parse_ip(text) if text else None)


def test_a_writer_that_has_not_closed_its_file_is_seen(tmp_path: Path, index: Index) -> None:
    index.holdings(at(tmp_path))
    with (tmp_path / "10.0.0.2").open("wb", buffering=0) as writer:
        assert content(index.holdings(at(tmp_path)))[0] == [("10.0.0.2", b"")]
        writer.write(OWNER)
        assert content(index.holdings(at(tmp_path)))[0] == [("10.0.0.2", OWNER)]
    assert index.scans == 1


def test_a_directory_that_was_replaced_is_read_anew(tmp_path: Path, index: Index) -> None:
    store = tmp_path / "store"
    for turn in range(20):  # sooner or later the new directory has the number of the old one
        shutil.rmtree(store, ignore_errors=True)
        store.mkdir()
        (store / f"10.0.0.{turn % 4}").write_bytes(OWNER)
        assert content(index.holdings(at(store))) == ([(f"10.0.0.{turn % 4}", OWNER)], [turn % 4])


def test_another_directory_under_the_same_path_is_read_anew(tmp_path: Path, index: Index) -> None:
    for name in ("10.0.0.2", "10.0.0.3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(OWNER)
        (tmp_path / "new").symlink_to(tmp_path / name)
        (tmp_path / "new").rename(tmp_path / "store")  # no event in either directory tells this
        assert index.holdings(at(tmp_path / "store")).names(OWNER) == [name]


def test_a_queue_that_ran_over_is_made_up_for(tmp_path: Path, index: Index) -> None:
    index.holdings(at(tmp_path))
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for number in range(limit // 2 + 10):
        # Names in turn, as equal events that follow each other are one.
        path = tmp_path / f"x{number % 2}"
        path.write_bytes(b"")
        path.unlink()
    (tmp_path / "10.0.0.2").write_bytes(OWNER)
    assert content(index.holdings(at(tmp_path)))[0] == [("10.0.0.2", OWNER)]
    assert index.scans == 2


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_what_cannot_be_watched_is_read_each_time(kind: str, tmp_path: Path, index: Index) -> None:
    store, outside = tmp_path / "store", tmp_path / "outside"
    store.mkdir()
    outside.write_bytes(b"")
    index.holdings(at(store))
    if kind == "directory":
        (store / "below").mkdir()
        target = store / "below" / "10.0.0.3"
        target.write_bytes(b"")
    else:
        target = outside
        (store / "10.0.0.3").symlink_to(outside)
    assert index.holdings(at(store)).names(OWNER) == []
    target.write_bytes(OWNER)  # no event in the store tells this
    assert index.holdings(at(store)).addresses(OWNER) == [parse_ip("10.0.0.3")]
    assert content(index.holdings(at(store))) == content(scan(at(store)))


WITHOUT_WATCHES = """
import sys
from pathlib import Path
from cni.host import Directory
from cni.ipam.index import Index
index = Index()
store = Path(sys.argv[1])
for name in ("10.0.0.2", "10.0.0.3"):
    (store / name).write_bytes(b"c1")
    print(*index.holdings(Directory(str(store), str(store))).names(b"c1"))
print(index.scans)
"""


def test_a_machine_that_has_no_watch_left_is_served_by_scans(tmp_path: Path) -> None:
    # A user namespace has a limit of its own.
    command = 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"'
    python = [sys.executable, "-c", WITHOUT_WATCHES, str(tmp_path)]
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", command, "sh", *python],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("10.0.0.2\n10.0.0.2 10.0.0.3\n2\n", "")


def test_a_directory_that_is_gone_is_an_error_and_not_an_empty_store(tmp_path: Path, index: Index) -> None:
    store = tmp_path / "store"
    store.mkdir()
    index.holdings(at(store))
    store.rmdir()
    with pytest.raises(FileNotFoundError):
        index.holdings(at(store))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "unlink", "rename", "mkdir", "look", "look"]),
        st.sampled_from(NAMES),
        st.sampled_from(NAMES),
        st.sampled_from([b"", b"c1", OWNER, b"c2\r\neth0"]),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_changes_are_followed(steps: list[tuple[str, str, str, bytes]], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    index = Index()
    try:
        for action, name, other, data in steps:
            try:
                if action == "write":
                    (tmp_path / name).write_bytes(data)
                elif action == "unlink":
                    (tmp_path / name).unlink()
                elif action == "rename":
                    (tmp_path / name).rename(tmp_path / other)
                elif action == "mkdir":
                    (tmp_path / "directory").mkdir()
            except (FileNotFoundError, FileExistsError):
                continue  # not possible now: the next step may be
            if action == "look":
                assert content(index.holdings(at(tmp_path))) == content(scan(at(tmp_path)))
        assert content(index.holdings(at(tmp_path))) == content(scan(at(tmp_path)))
    finally:
        index.close()


def test_threads_share_an_index(tmp_path: Path) -> None:
    indexes = Indexes()
    taken: list[tuple[int, int]] = []

    def serve(number: int) -> None:
        for turn in range(40):
            with Store(at(tmp_path), indexes.of("store")) as store, store.held() as held:
                value = held.holdings.taken[4].first_free(parse_ip("10.0.0.0")[1], parse_ip("10.0.255.0")[1])
                assert value is not None
                assert held.take((4, value), owner_of(f"c{number}-{turn}", "eth0"))
                taken.append((4, value))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == len(taken) == 320
    assert indexes.of("store").scans == 1
    indexes.close()


def test_closing_gives_the_descriptors_back(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    indexes = Indexes()
    index = indexes.of("store")
    index.holdings(at(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    indexes.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert indexes.of("store") is not index
