"""Namespaces for the firewall tests, and threads inside them."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_PR_CAPBSET_DROP = 24
_CAP_NET_ADMIN = 12
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
