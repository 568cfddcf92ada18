"""The state file: what is written is read, and what is not ours is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import ConfigError
from cni.net.podlinks import Sysctl
from launcher import state as state_
from launcher.binding import NAMESPACE_SYSCTLS
from launcher.discover import PodInterface, PodRoute
from launcher.nat import Port
from launcher.settings import Settings
from launcher.state import Place, State

PLACE = Place(4, 4026532000, "0c7b2f5e-1111-2222-3333-444444444444")
POD = PodInterface(
    "eth0",
    2,
    "0a:58:0a:f4:01:07",
    1450,
    (IPv4Interface("10.244.1.7/24"), IPv6Interface("fd00::7/64")),
    (
        PodRoute(IPv4Network("0.0.0.0/0"), IPv4Address("10.244.1.1"), 50, onlink=True),
        PodRoute(IPv4Network("10.244.1.0/24"), None, connected=True),
        PodRoute(IPv6Network("::/0"), IPv6Address("fe80::1"), 1024),
    ),
)
SETTINGS = Settings(
    "masquerade", mtu=1400, dns=("10.0.0.1",), private={224: "x"}, ports=(Port(80), Port(53, "udp"))
)
STATE = State(PLACE, SETTINGS, POD, (Sysctl("net/ipv4/ip_forward", "0"),))

V4 = st.builds(IPv4Address, st.integers(0, 2**32 - 1))
V6 = st.builds(IPv6Address, st.integers(0, 2**128 - 1))
V4_ROUTES = st.builds(
    PodRoute,
    st.builds(lambda a, n: IPv4Network((a, n), strict=False), V4, st.integers(0, 32)),
    st.none() | V4,
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
)
V6_ROUTES = st.builds(
    PodRoute,
    st.builds(lambda a, n: IPv6Network((a, n), strict=False), V6, st.integers(0, 128)),
    st.none() | V6,
    st.integers(0, 2**32 - 1),
    st.booleans(),
    st.booleans(),
)
STATES = st.builds(
    State,
    st.builds(Place, st.integers(0, 2**32), st.integers(0, 2**64), st.text(max_size=40)),
    st.just(SETTINGS) | st.just(Settings()),
    st.builds(
        PodInterface,
        st.text(max_size=15),
        st.integers(1, 2**31),
        st.just("0a:58:0a:f4:01:07"),
        st.integers(68, 65535),
        st.lists(
            st.builds(lambda a, n: IPv4Interface((a, n)), V4, st.integers(0, 32))
            | st.builds(lambda a, n: IPv6Interface((a, n)), V6, st.integers(0, 128)),
            max_size=4,
        ).map(tuple),
        st.lists(V4_ROUTES | V6_ROUTES, max_size=5).map(tuple),
    ),
    st.lists(
        st.builds(Sysctl, st.sampled_from(NAMESPACE_SYSCTLS), st.sampled_from(["0", "1"])), max_size=3
    ).map(tuple),
)


@given(STATES)
def test_what_is_written_is_read(value: State) -> None:
    with TemporaryDirectory() as folder:
        state_.save(Path(folder) / "a" / "b", value)
        assert state_.load(Path(folder) / "a" / "b", value.place) == value


def test_the_file_is_for_its_owner_alone_whatever_there_was(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    old = os.umask(0)
    try:
        folder.mkdir(mode=0o755)
        for name in ("state.json", ".state.json.tmp"):
            (folder / name).write_text("old")
            (folder / name).chmod(0o666)
        state_.save(folder, STATE)
        state_.save(tmp_path / "new", STATE)
    finally:
        os.umask(old)
    assert (folder / "state.json").stat().st_mode & 0o7777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o700
    assert [path.name for path in folder.iterdir()] == ["state.json"]
    assert state_.load(folder, PLACE) == STATE


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".state.json.tmp").symlink_to(victim)
    with pytest.raises(ConfigError, match=r"--state-dir=.*cannot write state.json"):
        state_.save(tmp_path, STATE)
    assert victim.read_text() == "mine"


def test_a_second_write_replaces_the_first(tmp_path: Path) -> None:
    state_.save(tmp_path, STATE)
    other = replace(STATE, settings=Settings(hostname="other"))
    state_.save(tmp_path, other)
    assert state_.load(tmp_path, PLACE) == other


def test_no_file_is_no_state(tmp_path: Path) -> None:
    assert state_.load(tmp_path, PLACE) is None
    assert state_.load(tmp_path / "none", PLACE) is None
    state_.remove(tmp_path)
    state_.save(tmp_path, STATE)
    state_.remove(tmp_path)
    assert state_.load(tmp_path, PLACE) is None


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (replace(PLACE, boot="other"), "another boot of this node"),
        (replace(PLACE, inode=1), "another network namespace"),
        (replace(PLACE, device=1), "another network namespace"),
        (replace(PLACE, device=1, boot="other"), "another boot"),
    ],
)
def test_a_foreign_state_is_refused_and_kept(tmp_path: Path, place: Place, words: str) -> None:
    state_.save(tmp_path, STATE)
    with pytest.raises(ConfigError, match=words) as caught:
        state_.load(tmp_path, place)
    assert str(tmp_path / "state.json") in str(caught.value)
    assert state_.load(tmp_path, PLACE) == STATE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "5",
        '"x"',
        "{}",
        '{"format": 2}',
        '{"format": "1"}',
        "[" * 100_000,
        "\0",
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    refused(tmp_path)


def refused(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        state_.load(folder, PLACE)
    assert str(folder / "state.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(b"\xff\xfe")
    refused(tmp_path)


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").mkdir()
    refused(tmp_path)


def test_every_shortened_file_is_refused(tmp_path: Path) -> None:
    state_.save(tmp_path, STATE)
    text = (tmp_path / "state.json").read_text().rstrip()
    for size in range(0, len(text), 7):
        (tmp_path / "state.json").write_text(text[:size])
        refused(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("netns", [1]),
        ("netns", "12"),
        ("netns", [float("inf"), 1]),
        ("pod", None),
        ("pod/mtu", float("inf")),
        ("pod/mtu", "x"),
        ("pod/addresses", ["10.0.0.1/33"]),
        ("pod/addresses", 5),
        ("pod/routes", [{}]),
        ("pod/routes", ["x"]),
        ("before", [{"path": "x"}]),
        ("settings", {}),
        ("settings/private", {"x": "y"}),
        ("settings/ports", [{"number": 80, "name": "x"}]),
        ("settings/binding", "passt"),
        ("settings/queues", "many"),
        ("settings/network", "10.0.2.0/99"),
    ],
)
def test_a_changed_field_is_refused(tmp_path: Path, path: str, value: Any) -> None:
    state_.save(tmp_path, STATE)
    record = json.loads((tmp_path / "state.json").read_text())
    target = record
    *parents, name = path.split("/")
    for parent in parents:
        target = target[parent]
    target[name] = value
    (tmp_path / "state.json").write_text(json.dumps(record))
    refused(tmp_path)


@pytest.mark.parametrize("name", ["format", "netns", "boot", "settings", "pod", "before"])
def test_a_missing_field_is_refused(tmp_path: Path, name: str) -> None:
    state_.save(tmp_path, STATE)
    record = json.loads((tmp_path / "state.json").read_text())
    del record[name]
    (tmp_path / "state.json").write_text(json.dumps(record))
    refused(tmp_path)


def test_the_boot_id_is_the_kernels() -> None:
    assert state_.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
