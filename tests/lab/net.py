"""Namespaces, links and processes of a lab, and their complete removal.

Decision: what a lab made is written to `lab.json` in its directory before it is made (the prefix of
all its namespaces) or as soon as it runs (each process, with its start time). So a lab whose program
was killed is removed by the next one that uses the same directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# The environment of every process in the lab: no FLANNELD_* and no CNI_* of the caller may leak in.
ENVIRONMENT: Mapping[str, str] = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

UNDERLAY_PREFIX = 24
SWITCH = IPv4Interface("192.168.77.2/24")
OUTSIDE = IPv4Address("192.168.77.1")
WORLD = IPv4Address("203.0.113.1")
FIRST_NODE = IPv4Address("192.168.77.11")
UNDERLAY6_PREFIX = 64
SWITCH6 = IPv6Interface("fd77::2/64")
OUTSIDE6 = IPv6Address("fd77::1")
WORLD6 = IPv6Address("2001:db8:113::1")
FIRST_NODE6 = IPv6Address("fd77::11")
IPV4, DUAL, IPV6 = (4,), (4, 6), (6,)  # the address families of an underlay
MTU_BYTES = 1500

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

POLL_S = 0.01
COMMAND_S = 30.0
END_S = 5.0


class LabError(Exception):
    """What the lab needed did not happen; `logs` are the files that tell why."""

    def __init__(self, message: str, *logs: Path) -> None:
        super().__init__(message)
        self.logs = logs


def wait_for(predicate: Callable[[], bool], timeout_s: float, what: str, *logs: Path) -> None:
    """Return once `predicate` holds; raise LabError naming `what` after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            raise LabError(f"no {what} after {timeout_s:g} s", *logs)
        time.sleep(POLL_S)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold the signals that end a program back until the block is done; they are delivered then.

    In a thread other than the main one nothing is to be done: Python runs no signal handler there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handlers = {signum: signal.signal(signum, lambda got, _: held.append(got)) for signum in ENDING_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        for got in held:
            signal.raise_signal(got)


def program(name: str) -> str:
    """The absolute path of a program of the system; raises LabError if it is not installed."""
    found = shutil.which(name, path=ENVIRONMENT["PATH"])
    if found is None:
        raise LabError(f"{name}: no such program in {ENVIRONMENT['PATH']}; install it")
    return found


@dataclass(frozen=True, slots=True)
class Child:
    """A process of the lab. `started` is field 22 of /proc/PID/stat, which tells a reused PID."""

    pid: int
    started: int
    what: str


@dataclass(frozen=True, slots=True)
class Record:
    """What `lab.json` holds; `kept` means that the program which made the lab left it on purpose."""

    prefix: str
    owner: Child
    kept: bool
    children: tuple[Child, ...]

    @classmethod
    def load(cls, directory: Path) -> Record | None:
        """The record of the lab in `directory`, None if there is none; raises LabError if it is damaged."""
        path = directory / "lab.json"
        try:
            raw = json.loads(path.read_text())
            return cls(
                prefix=str(raw["prefix"]),
                owner=Child(**raw["owner"]),
                kept=bool(raw["kept"]),
                children=tuple(Child(**child) for child in raw["children"]),
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as exc:
            raise LabError(f"{path}: not a record of a lab: {exc!r}; remove the file") from exc

    def save(self, directory: Path) -> None:
        """Replace `lab.json` in one step; lists the namespaces of the moment for a human reader."""
        path = directory / "lab.json"
        text = json.dumps({**asdict(self), "namespaces": namespaces(self.prefix)}, indent=1)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        temporary.replace(path)


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time of a process, None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    return fields[0], int(fields[19])


def child_of(pid: int, what: str) -> Child:
    """The record of a process that has just been started."""
    stat = _stat(pid)
    return Child(pid, stat[1] if stat else 0, what)


def running(child: Child) -> bool:
    """Whether exactly this process, not a later one with its PID, still runs."""
    stat = _stat(child.pid)
    return stat is not None and stat[0] != "Z" and stat[1] == child.started


def end(children: Iterable[Child]) -> None:
    """Terminate these processes and their process groups, kill what is left after `END_S` seconds."""
    left = [child for child in children if running(child)]
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for child in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signum)
        deadline = time.monotonic() + END_S
        while (left := [child for child in left if running(child)]) and time.monotonic() < deadline:
            time.sleep(POLL_S)
    if left:
        raise LabError("cannot end " + ", ".join(f"{child.what} (PID {child.pid})" for child in left))


def namespaces(prefix: str) -> list[str]:
    """Names of the network namespaces that begin with `prefix`."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(name for name in os.listdir("/run/netns") if name.startswith(prefix))
    return []


def remove(directory: Path) -> bool:
    """End and delete all that the record in `directory` names; False if there is no record.

    Raises LabError if something stays. Logs and state files in the directory are left to the caller.
    """
    record = Record.load(directory)
    if record is None:
        return False
    end(record.children)
    script = "".join(f"netns del {name}\n" for name in namespaces(record.prefix))
    _command([program("ip"), "-force", "-batch", "-"], script)
    (directory / "lab.json").unlink()
    return True


def _command(argv: Sequence[str], stdin: str = "", timeout_s: float = COMMAND_S) -> str:
    """Run to the end and return stdout; raises LabError with the command's own words.

    A session of its own keeps Ctrl-C at the terminal from ending it half way.
    """
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            text=True,
            env=dict(ENVIRONMENT),
            timeout=timeout_s,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise LabError(f"{' '.join(argv)}: no end after {timeout_s:g} s") from exc
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise LabError(f"{' '.join(argv)}: exit status {done.returncode}: {said}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Process:
    """A running process of the lab and the file that takes its stdout and stderr.

    `begins` is where its own output starts: the log may hold that of an earlier process.
    """

    popen: subprocess.Popen[bytes]
    log: Path
    child: Child
    begins: int = 0

    def require_running(self) -> None:
        """Raise LabError if the process has ended."""
        status = self.popen.poll()
        if status is not None:
            raise LabError(f"{self.child.what} ended with status {status}", self.log)

    def wait_text(self, text: str, timeout_s: float = 10.0) -> None:
        """Return once the process has written `text`; raises LabError when it ends before."""

        def seen() -> bool:
            found = text in self.log.read_bytes()[self.begins :].decode(errors="replace")
            if not found:
                self.require_running()
            return found

        wait_for(seen, timeout_s, f"{text!r} in the log of {self.child.what}", self.log)

    def output(self, timeout_s: float = COMMAND_S) -> str:
        """Wait for the end of the process and return what it wrote; raises LabError if it failed."""
        try:
            status = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise LabError(f"{self.child.what} has not ended after {timeout_s:g} s", self.log) from exc
        if status:
            raise LabError(f"{self.child.what} ended with status {status}", self.log)
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Terminate the process, and kill it if that does not help."""
        end([self.child])
        self.popen.wait(END_S)


class Lab:
    """The namespaces and processes of one lab; as a context manager it removes them at the end.

    `directory` takes `lab.json` and the logs. What an earlier lab left there is removed by `create`.
    """

    def __init__(self, directory: Path, prefix: str | None = None) -> None:
        self.directory = directory
        self.prefix = prefix or f"pfl{os.getpid()}-"
        self.switch = f"{self.prefix}net"
        self.outside = f"{self.prefix}out"
        self.nodes: dict[str, IPv4Address] = {}
        self.nodes6: dict[str, IPv6Address] = {}
        self.kept = False
        self._owner = child_of(os.getpid(), "owner")
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.kept:
            self.destroy()

    def netns(self, name: str) -> str:
        """The namespace of the node or pod called `name`."""
        return self.prefix + name

    def create(self, nodes: int, families: Sequence[int] = IPV4) -> None:
        """Build the underlay, the outside host and `nodes` nodes called node1, node2, ...

        Each has an address and a default route in each of `families`; `nodes` and `nodes6` name both
        addresses whether they are given or not.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove(self.directory)
        self._save()
        self.nodes = {f"node{i + 1}": FIRST_NODE + i for i in range(nodes)}
        self.nodes6 = {f"node{i + 1}": FIRST_NODE6 + i for i in range(nodes)}
        self._add_namespaces([self.switch, self.outside, *map(self.netns, self.nodes)])
        self._build_switch(families)
        self._build_host(
            self.outside,
            {4: (OUTSIDE, f"addr add {WORLD}/32 dev lo"), 6: (OUTSIDE6, f"addr add {WORLD6}/128 dev lo")},
            families,
        )
        for name, address in self.nodes.items():
            defaults: dict[int, tuple[IPv4Address | IPv6Address, str]] = {
                4: (address, f"route add default via {OUTSIDE}"),
                6: (self.nodes6[name], f"route add ::/0 via {OUTSIDE6}"),
            }
            self._build_host(self.netns(name), defaults, families)
            forwarding = {4: "net.ipv4.ip_forward=1", 6: "net.ipv6.conf.all.forwarding=1"}
            self.run(self.netns(name), "sysctl", "-qw", *(forwarding[family] for family in families))
        self._save()

    def _add_namespaces(self, names: Sequence[str]) -> None:
        _command([program("ip"), "-batch", "-"], "".join(f"netns add {name}\n" for name in names))
        for name in names:
            self.ip(name, "link set lo up")

    def _build_switch(self, families: Sequence[int]) -> None:
        addresses = {4: f"addr add {SWITCH} dev br0", 6: f"addr add {SWITCH6} dev br0 nodad"}
        lines = [
            f"link add br0 mtu {MTU_BYTES} type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            *(addresses[family] for family in families),
            "link set br0 up",
        ]
        ports = {"out": self.outside} | {name: self.netns(name) for name in self.nodes}
        for port, netns in ports.items():
            # Both ends are born inside the lab: the host never sees the pair.
            lines += [
                f"link add {port} mtu {MTU_BYTES} type veth peer name eth0 mtu {MTU_BYTES} netns {netns}",
                f"link set {port} master br0 up",
            ]
        self.ip(self.switch, *lines)

    def _build_host(
        self,
        netns: str,
        by_family: Mapping[int, tuple[IPv4Address | IPv6Address, str]],
        families: Sequence[int],
    ) -> None:
        """Give a host, for each family, its address and carry out one more line that needs it."""
        chosen = [by_family[family] for family in families]
        addresses = [
            f"addr add {address}/{UNDERLAY_PREFIX} dev eth0"
            if address.version == 4
            # Without the second that proving the address takes: nobody else here has it.
            else f"addr add {address}/{UNDERLAY6_PREFIX} dev eth0 nodad"
            for address, _ in chosen
        ]
        self.ip(netns, *addresses, "link set eth0 up", *(line for _, line in chosen))

    def add_pod(self, name: str) -> str:
        """Make an empty pod, a namespace with `lo` up, and return its namespace."""
        netns = self.netns(name)
        self._add_namespaces([netns])
        return netns

    def ip(self, netns: str, *lines: str) -> None:
        """Run these `ip` command lines in `netns`, in one process."""
        _command([program("ip"), "-n", netns, "-batch", "-"], "".join(f"{line}\n" for line in lines))

    def show(self, netns: str, tool: str, *words: str) -> list[dict[str, Any]]:
        """What `ip -j` or `bridge -j` (the `tool`) shows in `netns`, as parsed JSON records."""
        text = _command([program(tool), "-n", netns, "-j", *words])
        records: list[dict[str, Any]] = json.loads(text or "[]")
        return [record for record in records if record]  # ip prints {} for each link it filtered out

    def run(self, netns: str, *argv: str, timeout_s: float = COMMAND_S) -> str:
        """Run a command in `netns` and return its stdout; raises LabError if it fails."""
        return _command([program("ip"), "netns", "exec", netns, *argv], timeout_s=timeout_s)

    def spawn(self, netns: str, what: str, argv: Sequence[str], cwd: Path | None = None) -> Process:
        """Start a process in `netns`; the lab ends it. Its output is appended to `<what>.log`."""
        log = self.directory / f"{what}.log"
        with uninterrupted(), log.open("ab") as out:
            begins = out.tell()
            popen = subprocess.Popen(
                [program("ip"), "netns", "exec", netns, *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(ENVIRONMENT),
                cwd=cwd,
                start_new_session=True,
            )
            process = Process(popen, log, child_of(popen.pid, what), begins)
            self._processes.append(process)
            self._save()
        return process

    def keep(self) -> None:
        """Leave everything running when the program ends; `remove` takes it away later."""
        self.kept = True
        self._save()

    def destroy(self) -> None:
        """End every process and delete every namespace of this lab; a second call does nothing."""
        with uninterrupted():
            remove(self.directory)
            for process in self._processes:
                process.popen.wait(END_S)
            self._processes.clear()

    def _save(self) -> None:
        children = tuple(process.child for process in self._processes)
        Record(self.prefix, self._owner, self.kept, children).save(self.directory)
