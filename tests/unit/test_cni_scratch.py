"""Scratch files: what is on disk after each step, also next to files that upstream flannel wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.errors import CniError
from cni.local import LocalHost
from cni.plugins.scratch import Scratch, reservations
from flanneld.rootfiles import RootFiles

HOST, OPENED = LocalHost(print, {}), LocalHost(print, {})
OPENED.files = RootFiles(os.open("/", os.O_PATH | os.O_DIRECTORY))  # type: ignore[assignment]  # as the daemon's


def files(directory: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in directory.iterdir()}


def test_save_writes_upstreams_file_and_ours(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    Scratch(HOST, str(directory)).save("c1", "eth0", b"{}")
    assert files(directory) == {"c1": b"{}", "c1@eth0": b"{}"}
    assert {oct(one.stat().st_mode) for one in directory.iterdir()} == {"0o100600"}
    assert {oct(one.stat().st_mode) for one in (directory, tmp_path / "a")} == {"0o40700"}


def test_upstreams_file_may_come_later(tmp_path: Path) -> None:
    """Two interfaces of one container that are attached at the same time, and one more when that is over."""
    scratch = Scratch(HOST, str(tmp_path))
    scratch.begin("c1", "eth0", b"first")
    scratch.begin("c1", "net1", b"second")
    assert files(tmp_path) == {"c1@eth0": b"first", "c1@net1": b"second"}
    assert (scratch.load("c1", "eth0"), scratch.load("c1", "net1")) == (b"first", b"second")
    assert scratch.load("c1", "net2") is None
    scratch.complete("c1", "net1", b"second")
    scratch.complete("c1", "eth0", b"first")
    assert files(tmp_path) == {"c1": b"first", "c1@eth0": b"first", "c1@net1": b"second"}


def test_one_that_upstreams_file_never_came_of_is_removed(tmp_path: Path) -> None:
    scratch = Scratch(HOST, str(tmp_path))
    scratch.begin("c1", "eth0", b"first")
    scratch.save("c1", "net1", b"second")
    scratch.remove("c1", "net1")
    assert files(tmp_path) == {"c1": b"first", "c1@eth0": b"first"}
    scratch.remove("c1", "eth0")
    assert files(tmp_path) == {}


@pytest.mark.parametrize("by_then", [None, b"other"])
def test_upstreams_file_does_not_come_of_what_is_gone_by_then(tmp_path: Path, by_then: bytes | None) -> None:
    """The attachment is detached by the cold path, say; or attached anew."""
    scratch = Scratch(HOST, str(tmp_path))
    scratch.begin("c1", "eth0", b"first")
    scratch.remove("c1", "eth0")
    if by_then is not None:
        scratch.begin("c1", "eth0", by_then)
    scratch.complete("c1", "eth0", b"first")
    assert "c1" not in files(tmp_path)


def test_an_existing_directory_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    Scratch(HOST, str(tmp_path)).save("c1", "eth0", b"{}")
    assert oct(tmp_path.stat().st_mode) == "0o40755"


def test_files_are_replaced_not_written_in_place(tmp_path: Path) -> None:
    scratch = Scratch(HOST, str(tmp_path))
    scratch.save("c1", "eth0", b"old")
    with (tmp_path / "c1@eth0").open("rb") as reader:
        scratch.save("c1", "eth0", b"new")
        assert reader.read() == b"old"
    assert scratch.load("c1", "eth0") == b"new"


def test_load_prefers_the_interfaces_own_file(tmp_path: Path) -> None:
    scratch = Scratch(HOST, str(tmp_path))
    scratch.save("c1", "eth0", b"first")
    scratch.save("c1", "net1", b"second")
    assert (tmp_path / "c1").read_bytes() == b"second"
    assert scratch.load("c1", "eth0") == b"first"
    assert scratch.load("c1", "net1") == b"second"
    assert scratch.load("c1", "net2") is None
    assert scratch.load("c", "eth0") is None


def test_load_takes_what_upstream_wrote(tmp_path: Path) -> None:
    (tmp_path / "c1").write_bytes(b"upstream")
    scratch = Scratch(HOST, str(tmp_path))
    assert scratch.load("c1", "eth0") == b"upstream"
    assert scratch.load("c11", "eth0") is None


def test_the_plain_file_passes_on_to_the_interface_that_is_left(tmp_path: Path) -> None:
    scratch = Scratch(HOST, str(tmp_path))
    scratch.save("c1", "eth0", b"first")
    scratch.save("c1", "net1", b"second")
    scratch.save("c1x", "eth0", b"other")
    scratch.remove("c1", "net1")
    assert files(tmp_path) == {"c1": b"first", "c1@eth0": b"first", "c1x": b"other", "c1x@eth0": b"other"}
    scratch.remove("c1", "eth0")
    assert files(tmp_path) == {"c1x": b"other", "c1x@eth0": b"other"}


def test_remove_of_upstreams_file_and_of_nothing(tmp_path: Path) -> None:
    scratch = Scratch(HOST, str(tmp_path / "absent"))
    scratch.remove("c1", "eth0")
    assert scratch.saved() == []
    (tmp_path / "c1").write_bytes(b"upstream")
    Scratch(HOST, str(tmp_path)).remove("c1", "eth0")
    assert files(tmp_path) == {}


def test_somebodys_directory_inherits_nothing(tmp_path: Path) -> None:
    (tmp_path / "c1@net1").mkdir()
    scratch = Scratch(HOST, str(tmp_path))
    scratch.save("c1", "eth0", b"1")
    scratch.remove("c1", "eth0")
    assert [one.name for one in tmp_path.iterdir()] == ["c1@net1"]


def test_directories_of_somebody_else_are_passed_over(tmp_path: Path) -> None:
    """As where dataDir is /var/lib/cni."""
    for name in ("networks", "c1@net1"):
        (tmp_path / name).mkdir()
    (tmp_path / "c1").write_bytes(b"upstream")
    scratch = Scratch(HOST, str(tmp_path))
    assert scratch.load("c1", "eth0") == b"upstream"
    scratch.save("c2", "eth0", b"2")
    assert scratch.saved() == [("c1", "", b"upstream"), ("c2", "eth0", b"2")]


def test_upstreams_file_is_written_where_ours_was(tmp_path: Path) -> None:
    """The path leads elsewhere by then."""
    with Scratch(OPENED, str(tmp_path / "data")) as scratch:
        scratch.begin("c1", "eth0", b"1")
    (tmp_path / "data").rename(tmp_path / "aside")
    (tmp_path / "data").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    scratch.complete("c1", "eth0", b"1")
    assert files(tmp_path / "aside") == {"c1": b"1", "c1@eth0": b"1"}
    assert files(tmp_path / "data") == {}
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_saved_lists_each_attachment_once(tmp_path: Path) -> None:
    scratch = Scratch(HOST, str(tmp_path))
    scratch.save("c1", "eth0", b"1")
    scratch.save("c1", "net1", b"2")
    (tmp_path / "c2").write_bytes(b"3")
    (tmp_path / ".1f-left-behind").write_bytes(b"half")
    assert scratch.saved() == [("c1", "eth0", b"1"), ("c1", "net1", b"2"), ("c2", "", b"3")]


def test_what_the_disk_refuses_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "c1").mkdir()
    with pytest.raises(
        CniError, match=f"cannot read the scratch file {tmp_path}/c1: is a directory"
    ) as caught:
        Scratch(HOST, str(tmp_path)).load("c1", "eth0")
    assert caught.value.code == 999
    (tmp_path / "file").touch()
    with pytest.raises(CniError, match=f"cannot write the scratch file {tmp_path}/file/c1: "):
        Scratch(HOST, f"{tmp_path}/file").save("c1", "eth0", b"")
    with pytest.raises(CniError, match="file name too long"):
        Scratch(HOST, str(tmp_path)).save("c" * 300, "eth0", b"")
    with pytest.raises(CniError, match="dataDir is empty"):
        Scratch(HOST, "").save("c1", "eth0", b"")
    assert sorted(files_and_directories(tmp_path)) == ["c1", "file"]


def files_and_directories(directory: Path) -> list[str]:
    return os.listdir(directory)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "c1@eth0").mkdir()
    with pytest.raises(CniError, match="cannot write"):
        Scratch(HOST, str(tmp_path)).save("c1", "eth0", b"x")
    assert files_and_directories(tmp_path) == ["c1@eth0"]


@settings(deadline=None)  # each step syncs the disk
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["save", "remove"]), st.sampled_from("ab"), st.sampled_from(["e0", "e1", "e2"])
        )
    )
)
def test_the_plain_file_always_equals_one_of_the_containers_own(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str, str]]
) -> None:
    directory = tmp_path_factory.mktemp("scratch")
    scratch = Scratch(HOST, str(directory))
    model: dict[tuple[str, str], bytes] = {}
    for number, (step, container_id, ifname) in enumerate(steps):
        if step == "save":
            model[container_id, ifname] = str(number).encode()
            scratch.save(container_id, ifname, model[container_id, ifname])
        else:
            model.pop((container_id, ifname), None)
            scratch.remove(container_id, ifname)
        found = files(directory)
        for owner in "ab":
            own = {value for (one, _), value in model.items() if one == owner}
            assert (found.pop(owner) in own) if own else (owner not in found)
        assert found == {f"{owner}@{name}": value for (owner, name), value in model.items()}


def test_reservations_are_told_by_content(tmp_path: Path) -> None:
    (tmp_path / "10.1.2.3").write_bytes(b"c1\r\neth0")
    (tmp_path / "10.1.2.4").write_bytes(b" c2\r\nnet1\n")
    (tmp_path / "10.1.2.5").write_bytes(b"c3")
    (tmp_path / "lock").write_bytes(b"")
    (tmp_path / "last_reserved_ip.0").write_bytes(b"10.1.2.5")
    (tmp_path / "sub").mkdir()
    assert sorted(reservations(HOST.files, str(tmp_path))) == [("c1", "eth0"), ("c2", "net1"), ("c3", "")]
    assert reservations(HOST.files, f"{tmp_path}/absent") == []


def test_what_a_killed_writer_began_goes_with_the_attachment(tmp_path: Path) -> None:
    scratch = Scratch(HOST, str(tmp_path))
    scratch.save("c1", "eth0", b"{}")
    for name in (".c1 eth0", ".c1@eth0 eth0"):
        (tmp_path / name).write_bytes(b"{")
    scratch.remove("c1", "eth0")
    assert files(tmp_path) == {}
