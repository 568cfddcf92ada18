"""The firewall under the limits of a pod: the lock that others hold, few capabilities, read-only files."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cni.errors import KernelError
from cni.net import firewall
from cni.net.ruleset import Ruleset
from tests.netns.firewall_fixtures import (
    FORWARD_JUMP,
    MASQ_JUMP,
    Host,
    iptables,
    namespace,
    nftables,
    recorded_host,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[2]
# What the pod of flannel's manifest has.
CAPABILITIES = 1 << 12 | 1 << 13


@pytest.fixture
def legacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A node with a legacy iptables, the only kind that takes the lock, and a short wait for it."""
    monkeypatch.setattr(firewall, "_LOCK_WAIT_S", 1)
    with namespace() as node:
        yield recorded_host(node, "legacy", tmp_path, monkeypatch)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of xtables, as another iptables would."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_of(host: Host) -> Path:
    return host.log.parent / "xtables.lock"


def test_a_held_lock_is_waited_for(legacy: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewall, "_LOCK_WAIT_S", 20)
    with ThreadPoolExecutor(1) as thread:
        with held(lock_of(legacy)):
            result = thread.submit(lambda: legacy.ensure(iptables()))
            wait_until(lambda: any("-S" in line for line in legacy.started()), "the first listing")
            assert not result.done()
        assert result.result(timeout=20)
    assert legacy.iptables("-S FORWARD")[-1] == FORWARD_JUMP


def test_a_lock_that_is_never_released_ends_the_check_after_one_wait(legacy: Host) -> None:
    manager = iptables()
    with held(lock_of(legacy)):
        began = time.monotonic()
        with pytest.raises(KernelError) as caught:
            legacy.ensure(manager)
        took = time.monotonic() - began
    assert str(caught.value).endswith(
        f"/iptables --wait 1 -t nat -S POSTROUTING waited 1 s for {lock_of(legacy)}, "
        "which another process holds; see which: lslocks"
    )
    assert len([line for line in legacy.started() if "--version" not in line]) == 1
    assert 0.9 < took < 10, "there are four chains, but one wait"
    assert legacy.ensure(manager)
    assert legacy.iptables("-S FORWARD")[-1] == FORWARD_JUMP


def test_a_lock_taken_between_reading_and_writing_ends_the_check_too(legacy: Host) -> None:
    directory = legacy.log.parent
    other = directory / "other.lock"
    restore = directory / "iptables-restore"
    restore.write_text(restore.read_text().replace("exec ", f"export XTABLES_LOCKFILE={other}\nexec "))
    with (
        held(other),
        pytest.raises(KernelError, match=r"iptables-restore --noflush --wait 1 waited 1 s for "),
    ):
        legacy.ensure(iptables())
    assert len(legacy.writes()) == 1
    assert "FLANNEL" not in "".join(legacy.iptables("-t nat -S"))


def test_removal_does_not_take_a_held_lock_for_an_empty_table(legacy: Host) -> None:
    manager = iptables()
    legacy.ensure(manager)
    with held(lock_of(legacy)), pytest.raises(KernelError, match="which another process holds"):
        legacy.remove(manager)
    assert legacy.remove(manager)


def test_what_is_not_wanted_is_not_forgotten_over_a_held_lock(legacy: Host) -> None:
    legacy.ensure(iptables())
    nothing = Ruleset((), "", "")
    manager = iptables()
    with held(lock_of(legacy)), pytest.raises(KernelError, match="which another process holds"):
        legacy.ensure(manager, nothing)
    assert legacy.ensure(manager, nothing)
    assert "FLANNEL" not in "".join(legacy.iptables("-t nat -S"))


def test_an_idle_check_needs_no_lock(legacy: Host) -> None:
    manager = iptables()
    for _ in range(2):
        legacy.ensure(manager)
    with held(lock_of(legacy)):
        assert not legacy.ensure(manager)


def test_a_lock_file_that_cannot_be_made_is_named(legacy: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTABLES_LOCKFILE", "/nowhere/xtables.lock")
    with pytest.raises(KernelError) as caught:
        legacy.ensure(iptables())
    text = str(caught.value)
    assert "can't open lock file /nowhere/xtables.lock" in text
    assert text.endswith("in a container mount /run/xtables.lock")


@pytest.mark.parametrize("kind", ["iptables", "nft"])
def test_a_program_that_hangs_is_ended_and_no_other_started(
    legacy: Host, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firewall, "_TIMEOUT_S", 1.0)
    for program in legacy.log.parent.glob("*t*"):
        if program.is_file() and "#!" in program.read_text():
            program.write_text(f'#!/bin/sh\necho "{program.name} $*" >>{legacy.log}\nexec sleep 60\n')
    manager = iptables() if kind == "iptables" else nftables()
    with pytest.raises(KernelError, match=rf"/{kind} .*did not finish within 1 s"):
        legacy.ensure(manager)
    assert len(legacy.started()) == 1


# Runs with the capabilities of the pod: each answer is a line of JSON.
CONFINED = """
import json, subprocess, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.netns.firewall_fixtures import RULES, iptables, nftables

def errno_of(action):
    try:
        action()
    except OSError as exc:
        return exc.errno
    return 0

log = Path({log!r})
def check():
    log.write_text("")
    return manager.ensure(RULES), bool(log.read_text())

manager = {manager}()
status = Path("/proc/self/status").read_text()
forwarding = Path("/proc/sys/net/ipv4/ip_forward")
answer = {{
    "capabilities": int(status.partition("CapEff:")[2].split()[0], 16),
    "sysctl": errno_of(lambda: forwarding.write_text("1")),
    "random fully": manager.supports_random_fully(),
    "checks": [check() for _ in range(3)],
}}
subprocess.run({damage!r}, shell=True, check=True)
answer["repair"] = check()[0]
answer["rules"] = subprocess.run({listing!r}, shell=True, capture_output=True, text=True).stdout
answer["removed"] = [manager.remove(), manager.remove()]
print(json.dumps(answer))
"""
CASES = {
    "nf_tables": ("iptables", "iptables -t nat -F", "iptables -t nat -S; ip6tables -S"),
    "legacy": ("iptables", "iptables -t nat -F", "iptables -t nat -S; ip6tables -S"),
    "nft": ("nftables", "nft flush ruleset", "nft list ruleset"),
}
EXPECTED = {
    "nf_tables": [MASQ_JUMP, FORWARD_JUMP],
    "legacy": [MASQ_JUMP, FORWARD_JUMP],
    "nft": ["table ip flannel-ipv4 {", "table ip6 flannel-ipv6 {"],
}


@pytest.mark.parametrize("kind", CASES)
def test_two_capabilities_and_read_only_sysctls_are_enough(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, damage, listing = CASES[kind]
    with namespace() as node:
        host = recorded_host(node, "nf_tables" if kind == "nft" else kind, tmp_path, monkeypatch)
        script = tmp_path / "confined.py"
        script.write_text(
            CONFINED.format(
                root=str(ROOT), log=str(host.log), manager=manager, damage=damage, listing=listing
            )
        )
        confine = (
            "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && "
            "exec setpriv --bounding-set -all,+net_admin,+net_raw --inh-caps -all "
            f"{sys.executable} {script}"
        )
        command = ["ip", "netns", "exec", node.name, "unshare", "--mount", "sh", "-c", confine]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["capabilities"] == CAPABILITIES
    assert answer["sysctl"] == errno.EROFS
    assert answer["random fully"]
    # Written; found in order by a full check; found in order without a program.
    assert answer["checks"] == [[True, True], [False, True], [False, False]]
    assert answer["repair"]
    assert [line for line in EXPECTED[kind] if line in answer["rules"].splitlines()] == EXPECTED[kind]
    assert answer["removed"] == [True, False]
