"""The host-local plugin where it does more than upstream's: GC, STATUS, undo, reports, earlier boots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cni.errors import CniError
from cni.ipam.index import Indexes
from cni.local import LocalHost
from cni.plugins.hostlocal import HostLocal
from cni.spec import gojson
from cni.spec.address import format_ip
from cni.spec.request import Request

ROOT = Path(__file__).parents[2]
SMALL = "10.0.0.0/30"  # one address beside the gateway
USUAL = "10.0.0.0/29"


class Rig:
    """A directory, and the plugin on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = root / "networks" / "net"
        self.notes: list[str] = []
        self.reports: list[tuple[str, int, int, int]] = []
        self.alive = {"10.0.0.6"}
        self.squatted: set[str] = set()
        self.indexes: Indexes | None = None
        self.reporting = True

    @property
    def plugin(self) -> HostLocal:
        host = LocalHost(self.notes.append, {})
        return HostLocal(
            host,
            self.indexes,
            (lambda *told: self.reports.append(told)) if self.reporting else None,
            self,
            str(self.root / "results"),
        )

    def have(self, addresses: list[str]) -> set[str]:
        return self.alive & set(addresses)

    def are_known_to_have(self, address: tuple[int, int]) -> bool:
        return format_ip(*address) in self.squatted

    def request(
        self, container: str = "c1", subnet: str = USUAL, top: dict[str, Any] | None = None
    ) -> Request:
        ipam = {
            "type": "host-local",
            "dataDir": str(self.root / "networks"),
            "ranges": [[{"subnet": subnet}]],
        }
        document = {"cniVersion": "1.1.0", "name": "net", "ipam": ipam, **(top or {})}
        variables = {"CNI_CONTAINERID": container, "CNI_IFNAME": "eth0"}
        return Request(variables, json.dumps(document).encode())

    def add(self, container: str = "c1", subnet: str = USUAL) -> str:
        made = self.plugin.add(self.request(container, subnet))
        [one] = gojson.typed(made, "ips", list, [])
        return str(one["address"])

    def leave(self, address: str, owner: str) -> None:
        """A reservation of an earlier boot."""
        self.store.mkdir(parents=True, exist_ok=True)
        (self.store / address).write_bytes(owner.encode())
        os.utime(self.store / address, (0, 0))

    @property
    def reserved(self) -> dict[str, str]:
        files = [one for one in self.store.iterdir() if one.name[0] != "l"]
        return {one.name: one.read_bytes().decode() for one in files}


@pytest.fixture(params=["scanning", "indexed"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    if request.param == "indexed":
        made.indexes = Indexes()
    yield made
    if made.indexes is not None:
        made.indexes.close()


def test_undo_takes_back_what_this_add_got(rig: Rig) -> None:
    plugin, request = rig.plugin, rig.request()
    made = plugin.add(request)
    rig.add("c2")
    (rig.store / "10.0.0.5").write_bytes(b"c1\r\neth0")  # the attachment's, but not of this ADD
    plugin.undo(request, made)
    assert rig.reserved == {"10.0.0.3": "c2\r\neth0", "10.0.0.5": "c1\r\neth0"}
    plugin.undo(request, made)
    assert len(rig.reserved) == 2


def test_undo_leaves_what_somebody_else_got_meanwhile(rig: Rig) -> None:
    plugin, request = rig.plugin, rig.request()
    made = plugin.add(request)
    (rig.store / "10.0.0.2").write_bytes(b"c2\r\neth0")
    plugin.undo(request, made)
    assert rig.reserved == {"10.0.0.2": "c2\r\neth0"}


def test_an_add_that_cannot_note_the_last_address_keeps_none(rig: Rig) -> None:
    (rig.store / "last_reserved_ip.0").mkdir(parents=True)
    with pytest.raises(CniError) as failure:
        rig.add()
    assert failure.value.msg == f"open {rig.store}/last_reserved_ip.0: is a directory"
    assert rig.reserved == {}


LEAN = """
import os, sys
before = set(sys.modules)
import cni.plugins.hostlocal
print(*sorted(set(sys.modules) - before))
"""


def test_the_cold_path_imports_little() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LEAN}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    foreign = {name.partition(".")[0] for name in done.stdout.split()} - {"cni", "__future__", "_json"}
    assert foreign <= {"errno", "fcntl", "time"}, "each more costs every pod start"


@pytest.mark.parametrize("key", ["cni.dev/valid-attachments", "cni.dev/attachments"])
def test_gc_frees_what_is_not_listed(key: str, rig: Rig) -> None:
    for container in ("c1", "c2"):
        rig.add(container)
    for name, owner in {
        "10.0.0.4": "c1\r\neth1",
        "10.0.0.5": "c1",
        "10.0.0.6": "old",
        "note": "c9\r\neth0",
    }.items():
        (rig.store / name).write_bytes(owner.encode())
    listed = [{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c7", "ifname": "eth0"}]
    rig.plugin.gc(rig.request(top={key: listed}))
    assert rig.reserved == {"10.0.0.2": "c1\r\neth0", "10.0.0.5": "c1", "note": "c9\r\neth0"}
    assert sum("no valid attachment" in note for note in rig.notes) == 3


@pytest.mark.parametrize("top", [{}, {"cni.dev/valid-attachments": None}])
def test_gc_without_a_list_frees_nothing(top: dict[str, Any], rig: Rig) -> None:
    rig.add()
    rig.plugin.gc(rig.request(top=top))
    assert rig.reserved == {"10.0.0.2": "c1\r\neth0"}


def test_gc_with_an_empty_list_frees_all(rig: Rig) -> None:
    rig.add()
    rig.plugin.gc(rig.request(top={"cni.dev/valid-attachments": []}))
    assert rig.reserved == {}


def test_gc_with_a_list_that_is_none_is_refused(rig: Rig) -> None:
    rig.add()
    with pytest.raises(CniError) as failure:
        rig.plugin.gc(rig.request(top={"cni.dev/valid-attachments": {"containerID": "c1"}}))
    assert failure.value.code == 999
    assert rig.reserved == {"10.0.0.2": "c1\r\neth0"}


def test_status_is_good_before_the_first_add_and_makes_nothing(rig: Rig) -> None:
    rig.plugin.status(rig.request())
    assert list(rig.root.iterdir()) == []


def test_status_is_good_though_no_address_is_left(rig: Rig) -> None:
    """The runtime would report the node as not ready, for the pods that have the addresses too."""
    rig.add(subnet=SMALL)
    rig.plugin.status(rig.request(subnet=SMALL))
    assert set(rig.reserved) == {"10.0.0.2"}


def test_status_tells_that_the_store_cannot_be_made(rig: Rig) -> None:
    (rig.root / "networks").write_text("a file")
    with pytest.raises(CniError) as failure:
        rig.plugin.status(rig.request())
    assert failure.value.code == 50
    assert "not a directory" in failure.value.msg and str(rig.root / "networks") in failure.value.msg


READ_ONLY = """
import sys
from pathlib import Path
from cni.errors import CniError
from tests.unit.test_ipam_hostlocal import Rig
rig = Rig(Path(sys.argv[1]))
for action in (rig.plugin.status, rig.plugin.add):
    try:
        action(rig.request())
    except CniError as exc:
        print(exc.code, exc.msg.replace(sys.argv[1], "ROOT"))
"""


@pytest.mark.parametrize("there", [True, False], ids=["a store", "no store yet"])
def test_status_tells_that_the_disk_cannot_be_written(there: bool, tmp_path: Path) -> None:
    if there:
        Rig(tmp_path).add("c0")
    command = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    python = [sys.executable, "-c", READ_ONLY, str(tmp_path)]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", command, "sh", str(tmp_path), *python],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stderr == ""
    status, add = done.stdout.splitlines()
    assert status.startswith("50 ") and "read-only file system" in status
    assert add.startswith("999 ") and "read-only file system" in add


def test_status_refuses_a_bad_configuration(rig: Rig) -> None:
    with pytest.raises(CniError) as failure:
        rig.plugin.status(rig.request(subnet="10.0.0.1/29"))
    assert (failure.value.code, "host bits" in failure.value.msg) == (999, True)


def test_use_is_reported_after_each_add(rig: Rig) -> None:
    for container in ("c1", "c2"):
        rig.add(container)
    assert rig.reports == [("net", 0, 1, 5), ("net", 0, 2, 5)]
    assert rig.notes == []


def test_a_set_that_is_nearly_used_up_is_noted_where_nobody_takes_reports(rig: Rig) -> None:
    rig.reporting = False
    subnet = "10.0.0.0/28"  # 13 addresses: 12 of them are more than nine tenths
    for number in range(13):
        assert (len(rig.notes) > 0) is (number > 11), rig.notes
        rig.add(f"c{number}", subnet)
    assert rig.notes[-1].startswith(
        "host-local: network net: 13 of 13 addresses of range set 10.0.0.1-10.0.0.14"
    )


def test_the_first_add_frees_what_an_earlier_boot_left(rig: Rig) -> None:
    for number in (2, 3, 6):
        rig.leave(f"10.0.0.{number}", f"old{number}\r\neth0")
    assert rig.add() == "10.0.0.2/29"
    assert rig.reserved == {"10.0.0.2": "c1\r\neth0", "10.0.0.6": "old6\r\neth0"}
    rig.leave("10.0.0.4", "old4\r\neth0")
    assert rig.add("c2") == "10.0.0.3/29"
    assert "10.0.0.4" in rig.reserved, "only a boot's first ADD looks"


def test_an_add_that_finds_nothing_looks_again(rig: Rig) -> None:
    rig.add()
    for number in (3, 4, 5, 6):
        rig.leave(f"10.0.0.{number}", f"old{number}\r\neth0")
    rig.plugin.status(rig.request())
    assert len(rig.reserved) == 5, "only an ADD frees"
    assert rig.add("c2") == "10.0.0.3/29"
    assert set(rig.reserved) == {"10.0.0.2", "10.0.0.3", "10.0.0.6"}


def test_what_is_in_use_is_not_freed_for_want_of_addresses(rig: Rig) -> None:
    rig.alive.add("10.0.0.2")
    rig.leave("10.0.0.2", "old\r\neth0")
    with pytest.raises(CniError, match=r"no IP addresses available in range set: 10\.0\.0\.1-10\.0\.0\.2"):
        rig.add(subnet=SMALL)
    assert rig.reserved == {"10.0.0.2": "old\r\neth0"}


def test_an_address_that_somebody_has_without_a_reservation_is_passed_over(rig: Rig) -> None:
    rig.squatted = {"10.0.0.2", "10.0.0.3"}
    made: Any = rig.plugin.add(rig.request())
    assert made["ips"][0]["address"] == "10.0.0.4/29"
    assert any("10.0.0.2 is not reserved here" in note for note in rig.notes)
    wish = {"runtimeConfig": {"ips": ["10.0.0.3"]}}
    with pytest.raises(CniError, match=r"requested IP address 10\.0\.0\.3 is not available"):
        rig.plugin.add(rig.request("c2", top=wish))


def test_gateways_are_told_before_an_address_is_reserved(rig: Rig) -> None:
    sets = [[{"subnet": "10.0.0.0/29"}], [{"subnet": "10.1.0.0/24"}, {"subnet": "10.2.0.0/24"}]]
    both = [*sets, [{"subnet": "fd00::/64", "gateway": "fd00::9"}]]
    request = rig.request(top={"ipam": {"type": "host-local", "ranges": both}})
    assert list(map(str, rig.plugin.gateways(request))) == ["10.0.0.1/29", "fd00::9/64"]
