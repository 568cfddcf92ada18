"""Reservations of an earlier boot: which are freed, which are not, and when anybody looks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cni.host import Directory
from cni.ipam.config import Place
from cni.ipam.reclaim import Boot, Reclaimer, this_boot
from cni.ipam.store import Store
from cni.local import LocalFiles

SECOND = 10**9
NOW = Boot("this-boot", 1_000_000 * SECOND)
BEFORE, AFTER = NOW.began - SECOND, NOW.began + SECOND
ALIVE = "/proc/self/ns/net"
GONE = "/run/netns/cni-00000000-gone"


def nobody(_addresses: list[str]) -> set[str]:
    return set()


class Machine:
    """A store with one reservation, `10.0.0.2` of container c1's eth0, and what can be asked about it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = root / "networks" / "net"
        self.store.mkdir(parents=True)
        self.results = root / "results"
        self.results.mkdir()
        self.notes: list[str] = []
        self.reserve("10.0.0.2", b"c1\r\neth0", BEFORE)

    def reserve(self, name: str, owner: bytes, modified: int) -> None:
        (self.store / name).write_bytes(owner)
        os.utime(self.store / name, ns=(modified, modified))

    def saved(self, record: dict[str, Any] | bytes, name: str = "net-c1-eth0") -> None:
        data = record if isinstance(record, bytes) else json.dumps(record).encode()
        (self.results / name).write_bytes(data)

    def look(
        self, moment: str, in_use: Callable[[list[str]], set[str]] | None = None, boot: Boot = NOW
    ) -> bool | None:
        place = Place({"name": "net", "ipam": {"dataDir": str(self.root / "networks")}})
        made = Reclaimer(LocalFiles(), self.notes.append, place, in_use, str(self.results), lambda: boot)
        with Store(Directory(str(self.store), str(self.store))) as store, store.held() as held:
            if moment == "exhausted":
                return made.when_exhausted(held)
            made.at_first_add(held)
            return None

    @property
    def reserved(self) -> set[str]:
        return {one.name for one in self.store.iterdir()} - {"lock"}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def saved_sandbox(path: str) -> dict[str, Any]:
    return {
        "kind": "cniCacheV1",
        "result": {"interfaces": [{"name": "br"}, {"name": "eth0", "sandbox": path}]},
    }


SAVED: dict[str, dict[str, Any] | bytes | None] = {
    "nothing": None,
    "broken": b"{",
    "no namespace": {"kind": "cniCacheV1", "result": {}},
    "gone": {"netns": GONE},
    "gone, of an older libcni": saved_sandbox(GONE),
    "gone, a process": {"netns": "/proc/4194305/ns/net"},
    "alive": {"netns": ALIVE},
    "alive, of an older libcni": saved_sandbox(ALIVE),
    "one of two alive": {"netns": GONE, **saved_sandbox(ALIVE)},
    "a file that umount left": {"netns": "/etc/passwd"},
}
# What the saved result says, what the kernel says (None: not asked), and whether the reservation goes.
UNKNOWN = ("nothing", "broken", "no namespace")
CERTAIN = ("gone", "gone, of an older libcni", "gone, a process", "a file that umount left")
CASES = [
    *((case, kernel, kernel is False) for case in UNKNOWN for kernel in (None, False, True)),
    *((case, kernel, kernel is not True) for case in CERTAIN for kernel in (None, False, True)),
    *((case, kernel, False) for case in SAVED if "alive" in case for kernel in (None, False, True)),
]


@pytest.mark.parametrize("moment", ["first ADD", "exhausted"])
@pytest.mark.parametrize(("case", "kernel", "freed"), CASES)
def test_it_is_freed_only_if_nobody_can_be_using_it(
    moment: str, case: str, kernel: bool | None, freed: bool, machine: Machine
) -> None:
    asked = []

    def in_use(addresses: list[str]) -> set[str]:
        asked.extend(addresses)
        return set(addresses) if kernel else set()

    record = SAVED[case]
    if record is not None:
        machine.saved(record)
    machine.look(moment, None if kernel is None else in_use)
    assert machine.reserved == (set() if freed else {"10.0.0.2"})
    assert set(asked) <= {"10.0.0.2"}
    assert len(machine.notes) == freed
    if freed:
        assert "freed 10.0.0.2" in machine.notes[0] and "c1 eth0" in machine.notes[0]


@pytest.mark.parametrize("moment", ["first ADD", "exhausted"])
def test_a_reservation_of_this_boot_stays(moment: str, machine: Machine) -> None:
    machine.saved({"netns": GONE})
    machine.reserve("10.0.0.2", b"c1\r\neth0", AFTER)
    machine.look(moment, nobody)
    assert machine.reserved == {"10.0.0.2"}


def test_a_boots_first_add_looks_and_the_next_does_not(machine: Machine) -> None:
    machine.look("first ADD", set)
    assert machine.reserved == {"10.0.0.2"}
    machine.look("first ADD", nobody)
    assert machine.reserved == {"10.0.0.2"}
    machine.look("first ADD", nobody, Boot("next-boot", NOW.began))
    assert machine.reserved == set()
    [mark] = [one for one in machine.store.parent.iterdir() if one.is_file()]
    assert (mark.name, mark.read_text()) == (".flannel-boot-net", f"next-boot {NOW.began}\n")


def test_at_exhaustion_it_looks_each_time(machine: Machine) -> None:
    assert machine.look("exhausted", set) is False
    assert machine.look("exhausted", nobody) is True
    assert machine.look("exhausted", nobody) is False


def test_a_clock_that_was_set_since_does_not_make_this_boots_file_old(machine: Machine) -> None:
    machine.reserve("10.0.0.2", b"c1\r\neth0", AFTER)
    machine.look("first ADD", nobody)
    later = Boot(NOW.identity, NOW.began + 10**6 * SECOND)  # the clock went forward by eleven days
    assert machine.look("exhausted", nobody, later) is False
    assert machine.reserved == {"10.0.0.2"}
    machine.reserve("10.0.0.3", b"c2\r\neth0", BEFORE)
    assert machine.look("exhausted", nobody, later) is True
    assert machine.reserved == {"10.0.0.2"}


@pytest.mark.parametrize("text", ["", "x", "x y", "x 1 2", "\xff 1"])
def test_a_broken_mark_counts_as_none(text: str, machine: Machine) -> None:
    (machine.store.parent / ".flannel-boot-net").write_text(text, encoding="latin-1")
    machine.look("first ADD", nobody)
    assert machine.reserved == set()


def test_files_that_are_no_reservations_stay(machine: Machine) -> None:
    for name in ("note", "last_reserved_ip.0"):
        machine.reserve(name, b"c1\r\neth0", BEFORE)
    machine.reserve("fd00::2", b"c9", BEFORE)
    machine.reserve("10.0.0.9", b"", BEFORE)
    machine.look("first ADD", lambda addresses: {"fd00::2"} & set(addresses))
    assert machine.reserved == {"note", "last_reserved_ip.0", "fd00::2"}
    assert any("10.0.0.9" in note and "for nobody" in note for note in machine.notes)


def test_a_mark_that_cannot_be_read_is_noted_and_the_add_goes_on(machine: Machine) -> None:
    (machine.store.parent / ".flannel-boot-net").mkdir()
    assert not machine.look("first ADD", nobody)
    assert not machine.look("exhausted", nobody)
    assert [("cannot look" in note, "flannel-boot-net" in note) for note in machine.notes] == [
        (True, True)
    ] * 2
    assert machine.reserved == {"10.0.0.2"}


def test_this_boot_is_the_kernels(tmp_path: Path) -> None:
    boot = this_boot()
    assert boot.identity == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    [line] = [one for one in Path("/proc/stat").read_text().splitlines() if one.startswith("btime")]
    assert abs(boot.began - int(line.split()[1]) * SECOND) <= 2 * SECOND
