"""The store on disk: what is in the files, what a full disk leaves, and what is known of it."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.host import Directory
from cni.ipam.store import Holdings, Store, StoreFault, attachment_of, owner_of, scan
from cni.spec.address import parse_ip

OWNER = owner_of("c1", "eth0")


def opened(path: Path) -> Store:
    return Store(Directory("/the/store", str(path)))


def files(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in path.iterdir()}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: as a full disk, which would take a file system of our own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_format_on_disk(tmp_path: Path) -> None:
    with opened(tmp_path) as store, store.held() as held:
        assert held.take(parse_ip("10.0.0.100"), OWNER)
        held.remember(0, parse_ip("10.0.0.100"))
        assert held.take(parse_ip("FD00::0:2"), owner_of(" c1\n", "eth1"))
        held.remember(1, parse_ip("fd00::2"))
        held.remember(0, parse_ip("10.0.0.9"))
    assert files(tmp_path) == {
        "lock": b"",
        "10.0.0.100": b"c1\r\neth0",
        "last_reserved_ip.0": b"10.0.0.9",
        "fd00::2": b"c1\r\neth1",
        "last_reserved_ip.1": b"fd00::2",
    }


def test_an_address_is_taken_once_whatever_is_known(tmp_path: Path) -> None:
    with opened(tmp_path) as store, store.held() as held:
        (tmp_path / "10.0.0.2").write_bytes(b"")
        assert not held.take(parse_ip("10.0.0.2"), OWNER)
        assert held.holdings.names(OWNER) == []
    assert files(tmp_path)["10.0.0.2"] == b""


def test_the_lock_excludes_other_descriptors_and_ends_with_the_step(tmp_path: Path) -> None:
    with opened(tmp_path) as store, open(tmp_path / "lock") as other:
        with store.held(), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_disk_that_is_full_leaves_no_reservation(tmp_path: Path) -> None:
    with opened(tmp_path) as store, store.held() as held:
        for size in (0, 3):  # nothing is written, a part is written
            with largest_file(size), pytest.raises(StoreFault, match=r"^write /the/store/10\.0\.0\.2: "):
                held.take(parse_ip("10.0.0.2"), OWNER)
            assert set(files(tmp_path)) == {"lock"}
            assert held.holdings.names(OWNER) == []


def test_faults_name_the_path_of_the_netconf(tmp_path: Path) -> None:
    with pytest.raises(StoreFault, match=r"^open /the/store/lock: no such file or directory$"):
        opened(tmp_path / "absent")
    (tmp_path / "last_reserved_ip.0").mkdir()
    with opened(tmp_path) as store, store.held() as held:
        assert held.last(0) is None
        with pytest.raises(StoreFault, match=r"^open /the/store/last_reserved_ip\.0: is a directory$"):
            held.remember(0, parse_ip("10.0.0.2"))


def test_free_takes_only_what_the_owner_has(tmp_path: Path) -> None:
    with opened(tmp_path) as store, store.held() as held:
        held.take(parse_ip("10.0.0.2"), OWNER)
        assert not held.free(parse_ip("10.0.0.2"), owner_of("c1", "eth1"))
        assert not held.free(parse_ip("10.0.0.3"), OWNER)
        assert held.free(parse_ip("10.0.0.2"), OWNER)
        assert set(files(tmp_path)) == {"lock"}


def test_release_goes_on_after_what_cannot_be_removed(tmp_path: Path) -> None:
    for name in ("10.0.0.2", "10.0.0.3", "10.0.0.4"):
        (tmp_path / name).write_bytes(OWNER)
    with opened(tmp_path) as store, store.held() as held:
        (tmp_path / "10.0.0.2").unlink()
        (tmp_path / "10.0.0.2").mkdir()
        (tmp_path / "10.0.0.3").unlink()
        assert held.release(OWNER)
        assert held.holdings.names(OWNER) == ["10.0.0.2"]
    assert set(files_and_directories(tmp_path)) == {"lock", "10.0.0.2"}


def files_and_directories(path: Path) -> list[str]:
    return [one.name for one in path.iterdir()]


def test_a_scan_reads_all_but_what_belongs_to_no_attachment(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    os.mkfifo(tmp_path / "10.0.0.9")  # must not stop the scan
    (tmp_path / "link").symlink_to("/nonexistent")
    for name in ("lock", "last_reserved_ip.0", "10.0.0.2", "below/10.0.0.3", "note"):
        (tmp_path / name).write_bytes(b" c1\r\neth0\n")
    found = scan(Directory("/the/store", str(tmp_path)))
    assert found.names(OWNER) == ["10.0.0.2", "below/10.0.0.3", "note"]
    assert not found.flat
    assert found.addresses(OWNER) == [parse_ip("10.0.0.2"), parse_ip("10.0.0.3")]
    # Only what bears the name itself is in the way of a reservation.
    values = [parse_ip(f"10.0.0.{n}")[1] for n in (2, 3, 9)]
    assert [value in found.taken[4] for value in values] == [True, False, True]


@pytest.mark.parametrize(
    ("content", "attachment"),
    [(b"c1\r\neth0", ("c1", "eth0")), (b"c1", ("c1", "")), (b"", ("", "")), (b"c1\neth0", ("c1\neth0", ""))],
)
def test_owners(content: bytes, attachment: tuple[str, str]) -> None:
    assert attachment_of(content) == attachment


NAMES = st.sampled_from(["10.0.0.2", "10.0.0.3", "fd00::2", "FD00::2", "note", "a/10.0.0.2"])
OWNERS = st.sampled_from([b"", b"c1", b"c1\r\neth0", b"c2\r\neth0"])


@given(changes=st.lists(st.tuples(NAMES, st.one_of(st.none(), OWNERS))))
def test_holdings_follow_any_changes(changes: list[tuple[str, bytes | None]]) -> None:
    model: dict[str, bytes] = {}
    known = Holdings()
    for name, owner in changes:
        if owner is None:
            model.pop(name, None)
            known.drop(name)
        else:
            model[name] = owner
            known.put(name, owner)
    for owner in (b"", b"c1", b"c1\r\neth0", b"c2\r\neth0"):
        assert known.names(owner) == sorted(name for name, other in model.items() if other == owner)
    for text in ("10.0.0.2", "10.0.0.3", "fd00::2"):
        family, value = parse_ip(text)
        assert (value in known.taken[family]) == (text in model)
    addressed = {name for name in model if name != "note"}
    assert {name for name, _ in known.reservations()} == addressed
