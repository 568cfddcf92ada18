"""`make demo`: a cluster of three nodes on this machine, real packets through it, and a look at it all.

    python -m tests.lab.demo          run it (as root); everything is removed at the end
    python -m tests.lab.demo down     remove a lab that KEEP=1 has left

Environment:

    STORE=sqlite|etcd   where leases live; sqlite unless told otherwise
    KEEP=1              leave the lab running, and print how to look around in it

    PFL_FLANNELD        command of the daemon, for tests; default dist/bin/flanneld
    PFL_CNI_BIN         folder of the flannel plugin, for tests; default dist/cni-bin
    PFL_DEMO_DIR        state of the lab, for tests; default /tmp/pyflannel-demo

Exit status: 0 all shown and checked, 1 something failed, 2 a wrong argument or variable, 128 + N ended by
signal N.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tests.lab import net
from tests.lab.net import ENDING_SIGNALS, Lab, LabError, Record
from tests.lab.node import CNI_BIN, FROZEN, UPSTREAM_CNI_BIN
from tests.lab.steps import STORES, Demo, Screen

PROGRAMS = ("ip", "bridge", "sysctl", "ping", "tcpdump")
STORE_PROGRAMS: Mapping[str, tuple[str, ...]] = {"sqlite": (), "etcd": ("etcd", "etcdctl")}
PLUGINS = ("flannel", "portmap")
TAIL_LINES = 15

BUILD = "build it first: make build"
DOWN = "make demo-down"


class UsageError(Exception):
    """A wrong argument or variable; the text says which and what would be right."""


class Interrupted(BaseException):
    """A signal asks the demo to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass(frozen=True, slots=True)
class Options:
    """What the arguments and the environment ask for."""

    down: bool
    store: str
    keep: bool
    daemon: tuple[str, ...]
    cni_path: tuple[Path, ...]
    directory: Path

    @classmethod
    def read(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
        """Raises UsageError."""
        if list(arguments) not in ([], ["down"]):
            raise UsageError(f"{shlex.join(arguments)}: the only argument is down")
        store = environment.get("STORE") or "sqlite"
        if store not in STORES:
            raise UsageError(f"STORE={store}: must be {' or '.join(STORES)}")
        keep = environment.get("KEEP") or "0"
        if keep not in ("0", "1"):
            raise UsageError(f"KEEP={keep}: must be 0 or 1")
        daemon = shlex.split(environment.get("PFL_FLANNELD", "")) or FROZEN
        plugins = Path(environment.get("PFL_CNI_BIN") or CNI_BIN)
        cni_path = (plugins, plugins / "optional", UPSTREAM_CNI_BIN)
        directory = Path(environment.get("PFL_DEMO_DIR") or "/tmp/pyflannel-demo")
        return cls(bool(arguments), store, keep == "1", tuple(daemon), cni_path, directory)


def require(options: Options) -> None:
    """Raise LabError, one line, if something that the demo needs is not there."""
    if os.geteuid() != 0:
        raise LabError("must run as root, since it makes network namespaces: sudo make demo")
    for name in (*PROGRAMS, *STORE_PROGRAMS[options.store]):
        net.program(name)
    if not shutil.which(options.daemon[0]):
        raise LabError(f"{options.daemon[0]}: no such program; {BUILD}")
    for name in PLUGINS:
        if not any(Path(folder, name).is_file() for folder in options.cni_path):
            remedy = (
                "build it first: make build" if name == "flannel" else "install containernetworking-plugins"
            )
            raise LabError(f"no CNI plugin {name} in {' or '.join(map(str, options.cni_path))}; {remedy}")


def claim(directory: Path) -> None:
    """Make an empty directory of ours, mode 0700; raises LabError if it is anything else or in use.

    What a killed demo has left is removed.
    """
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise LabError(f"{directory}: must be a directory of root with mode 0700; move it away")
    record = Record.load(directory)
    if record is not None and record.kept:
        raise LabError(
            f"a lab is kept in {directory}; remove it first: {sys.executable} -m tests.lab.demo down"
        )
    if record is not None and net.running(record.owner):
        raise LabError(f"another demo runs, PID {record.owner.pid}, in {directory}; wait for its end")
    net.remove(directory)
    shutil.rmtree(directory)
    directory.mkdir(mode=0o700)


def down(directory: Path) -> None:
    """Remove a kept lab, or what a killed demo has left; raises LabError if a demo is running there."""
    record = Record.load(directory)
    if record is None:
        print(f"no lab in {directory}")
        return
    if not record.kept and net.running(record.owner):
        raise LabError(f"a demo runs, PID {record.owner.pid}; end it with Ctrl-C or SIGTERM")
    with net.uninterrupted():
        net.remove(directory)
        shutil.rmtree(directory)
    print(f"removed {record.prefix}* and {directory}")


def up(options: Options) -> int:
    """Run the demo and return the exit status; a failure is reported while the logs still exist."""
    require(options)
    claim(options.directory)
    begin, screen = time.monotonic(), Screen()
    with contextlib.ExitStack() as stack:
        lab = Lab(options.directory)
        stack.callback(discard, options.directory)
        stack.enter_context(lab)
        demo = Demo(lab, screen, store=options.store, daemon=options.daemon, cni_path=options.cni_path)
        try:
            demo.run()
            demo.show()
            if options.keep:
                lab.keep()
                screen.section("Kept. Look around:", look_around(demo))
            else:
                demo.release()
        except LabError as exc:
            report(exc, exc.logs or demo.logs())
            return 1
    took = f"{time.monotonic() - begin:.1f} s"
    end = "the lab is kept" if lab.kept else "everything is removed"
    print(f"\n{screen.paint('All checks passed', 32)} in {took}; {end}.")
    return 0


def look_around(demo: Demo) -> str:
    """Commands for whoever has asked to keep the lab."""
    first, last = demo.pods[0], demo.pods[-1]
    node = first.node
    lines = [
        f"ip netns exec {first.netns} ping {last.endpoint.address}",
        f"ip netns exec {node.netns} tcpdump -Tvxlan -ni eth0 udp port 8472",
        f"ip -n {node.netns} route",
        f"less {node.log}",
        f"cat {demo.lab.directory}/lab.json",
        f"{DOWN}   # removes it all",
    ]
    flannelctl = Path(FROZEN[0]).with_name("flannelctl")
    if flannelctl.exists():
        lines.insert(0, f"ip netns exec {node.netns} {flannelctl} get leases --state-dir {node.directory}")
    return "\n".join(f"  {line}" for line in lines)


def discard(directory: Path) -> None:
    """Delete the directory of a lab that is removed; one with a record still tells what is left."""
    if Record.load(directory) is None:
        shutil.rmtree(directory)


def report(failure: LabError, logs: Sequence[Path] = ()) -> None:
    """Print the reason of a failure on stderr, with the last lines of the logs."""
    print(f"demo: {failure}", file=sys.stderr)
    for log in logs:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        print(f"--- last lines of {log.name}", *lines[-TAIL_LINES:], sep="\n", file=sys.stderr)


def interrupt(signum: int, _frame: FrameType | None) -> None:
    """Signal handler: unwind to `main`, and clean up on the way."""
    raise Interrupted(signum)


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Exit status as the module's docstring lists it."""
    for signum in ENDING_SIGNALS:
        signal.signal(signum, interrupt)
    try:
        options = Options.read(arguments, environment)
        if not options.down:
            return up(options)
        down(options.directory)
    except UsageError as exc:
        print(f"demo: {exc}", file=sys.stderr)
        return 2
    except LabError as exc:
        report(exc)
        return 1
    except Interrupted as exc:
        print(f"demo: ended by {exc}", file=sys.stderr)
        return 128 + exc.signum
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
