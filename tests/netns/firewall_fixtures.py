"""Namespaces for the firewall tests, and threads inside them."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import TypeVar

import pytest

from cni.net.firewall import Iptables, Nftables
from cni.net.ruleset import Firewall, Ruleset
from flanneld.masquerade import IPTABLES_CHAINS, NFT_TABLES, FamilyRanges, FirewallSpec, render

T = TypeVar("T")

V4 = FamilyRanges(IPv4Network("10.42.0.0/16"), IPv4Network("10.42.1.0/24"))
V6 = FamilyRanges(IPv6Network("fd00:10:244::/56"), IPv6Network("fd00:10:244:1::/64"))
SPEC = FirewallSpec(masquerade=True, forward=True, random_fully=True, families=(V4, V6))
RULES = render(SPEC)

MASQ_JUMP = '-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG'
FORWARD_JUMP = '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD'

# The program that both kinds of iptables are names of.
KINDS = {"nf_tables": "xtables-nft-multi", "legacy": "xtables-legacy-multi"}

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_PR_CAPBSET_DROP = 24
_CAP_NET_ADMIN = 12
_CAPABILITY_VERSION = 0x20080522
_COUNTER = itertools.count()


class Namespace:
    """A network namespace of this test; what `call` runs, and every program it starts, is inside."""

    def __init__(self, name: str) -> None:
        self.name = name

    def call(self, function: Callable[[], T], *, privileged: bool = True) -> T:
        """Run `function` in a thread inside the namespace; its children lack CAP_NET_ADMIN if asked."""

        def inside() -> T:
            with open(f"/run/netns/{self.name}", "rb") as netns:
                _checked(_LIBC.setns(netns.fileno(), _CLONE_NEWNET))
            if not privileged:
                _checked(_LIBC.prctl(_PR_CAPBSET_DROP, _CAP_NET_ADMIN, 0, 0, 0))
            return function()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(inside).result()

    def call_beside_privileged_children(self, function: Callable[[], T]) -> T:
        """Run `function` in a thread inside the namespace without CAP_NET_ADMIN, which its children have."""

        def inside() -> T:
            _give_up(_CAP_NET_ADMIN)
            return function()

        return self.call(inside)

    def run(self, command: str, stdin: str = "") -> str:
        """The output of a command (split at spaces) that must succeed."""
        return self.call(
            lambda: (
                subprocess.run(
                    command.split(), input=stdin, capture_output=True, text=True, check=True, timeout=30
                ).stdout
            )
        )

    def sysctl(self, name: str, value: int) -> None:
        path = Path("/proc/sys") / name.replace(".", "/")
        self.call(lambda: path.write_text(str(value)))


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _give_up(capability: int) -> None:
    """Take one capability from the calling thread; a program that root executes has it again."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then those above 31
    _checked(_LIBC.capget(header, data))
    data[0] &= ~(1 << capability)
    data[1] &= ~(1 << capability)
    _checked(_LIBC.capset(header, data))


@dataclass
class Host:
    """A namespace that stands for a node, and the log of the programs of iptables or nft started in it."""

    ns: Namespace
    log: Path

    def iptables(self, arguments: str) -> list[str]:
        return self.ns.run(f"iptables {arguments}").splitlines()

    def ip6tables(self, arguments: str) -> list[str]:
        return self.ns.run(f"ip6tables {arguments}").splitlines()

    def started(self) -> list[str]:
        return self.log.read_text().splitlines()

    def writes(self) -> list[str]:
        """The programs started that could have changed a rule."""
        return [line for line in self.started() if "-restore" in line or line == "nft -f -"]

    def forget(self) -> None:
        self.log.write_text("")

    def ensure(self, manager: Firewall, rules: Ruleset = RULES) -> bool:
        return self.ns.call(lambda: manager.ensure(rules))

    def remove(self, manager: Firewall) -> bool:
        return self.ns.call(manager.remove)


def recorded_host(ns: Namespace, kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A node whose `iptables` is of `kind`, a key of KINDS, and which logs each start of it and of nft."""
    names = [f"{ip}tables{what}" for ip in ("ip", "ip6") for what in ("", "-restore", "-save")]
    log = recorded_programs(directory, {**dict.fromkeys(names, KINDS[kind]), "nft": "nft"})
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(directory / "xtables.lock"))
    return Host(ns, log)


def iptables() -> Iptables:
    return Iptables(IPTABLES_CHAINS)


def nftables() -> Nftables:
    return Nftables(NFT_TABLES)


def wait_until(predicate: Callable[[], bool], what: str) -> None:
    """Return once `predicate` holds, which it must within ten seconds."""
    deadline = time.monotonic() + 10
    while not predicate():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.005)


@contextmanager
def namespace() -> Iterator[Namespace]:
    """A fresh namespace with its loopback up, removed with everything in it."""
    name = f"pfl{os.getpid()}-fw{next(_COUNTER)}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=30)
    try:
        made = Namespace(name)
        made.run("ip link set lo up")
        yield made
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=30)


def recorded_programs(directory: Path, programs: Mapping[str, str]) -> Path:
    """Fill `directory` with wrappers that note each start in the log, and return the log.

    Each runs the installed program that is its value, under its own name: one binary of iptables is many
    programs and goes by the name it is called by.
    """
    log = directory / "log"
    log.touch()
    directory.joinpath("real").mkdir()
    for name, installed in programs.items():
        found = shutil.which(installed)
        assert found is not None, f"{installed} is not installed"
        real = directory / "real" / name
        real.symlink_to(found)
        wrapper = directory / name
        wrapper.write_text(f'#!/bin/sh\necho "{name} $*" >>{log}\nexec {real} "$@"\n')
        wrapper.chmod(0o755)
    return log
