"""The sweep of firewall entries whose pod went by a way that does not know of them: Go's DEL, or no DEL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import pytest

from tests.netns.bridge_fixtures import GO, OURS, Document, Rig, new_rig
from tests.netns.cni_fixtures import GO_PLUGINS, ROOT, Namespace, attachment, plugin_command, wait_for

# Half a second but for tests beside this one: a namespace full of links goes in seconds, and all others wait.
SOON_S, TIMEOUT_S = 10.0, 20.0
FIRST, SECOND = "10.1.17.2", "10.1.17.3"  # the addresses of the first two pods
TABLES = ["flannel_cni", "flannel_hostport"]  # of masquerading, and of ports
# With an argument: so many descriptors may be open beside those that are, until somebody allows more.
PROGRAM = """
import os, resource, signal, sys, threading
from flanneld import log
from flanneld.cnisweep import Sweeper
log.setup(0)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
if len(sys.argv) > 1:
    room = len(os.listdir("/proc/self/fd")) - 1 + int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (room, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sweeper = Sweeper()
print("started", flush=True)
signal.sigwait({signal.SIGTERM})
sweeper.close()
print(threading.active_count(), flush=True)
"""


class Program:
    """A process in a node's namespace. A context manager; `said` is what it has written up to now."""

    def __init__(self, node: Namespace, place: Path, *argv: str) -> None:
        self._log = place
        with place.open("wb") as out:
            self.process = subprocess.Popen(
                node.wrap([sys.executable, *argv]), stdout=out, stderr=subprocess.STDOUT, cwd=ROOT
            )

    def said(self) -> str:
        return self._log.read_text()

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(TIMEOUT_S)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with new_rig(tmp_path, OURS) as made:
        yield made


@contextmanager
def sweeping(rig: Rig, *arguments: str) -> Iterator[Program]:
    with Program(rig.host, rig.node.root / "sweep.log", "-c", PROGRAM, *arguments) as program:
        wait_for(lambda: "started" in program.said() or program.process.poll() is not None, TIMEOUT_S)
        assert program.process.poll() is None, program.said()
        yield program


class Pod:
    """A container with masquerading and a port of the node, both made by our plugins."""

    def __init__(self, rig: Rig, container: str, port: int) -> None:
        self.rig, self.container, self.netns = rig, container, rig.node.namespace()
        self.conf = rig.conf(ipMasq=True)
        result = rig.add(self.conf, container, netns=self.netns)
        mapping = {"hostPort": port, "containerPort": 80, "protocol": "tcp"}
        self.portmap = {
            "cniVersion": "1.0.0",
            "name": "cbr0",
            "type": "portmap",
            "capabilities": {"portMappings": True},
            "runtimeConfig": {"portMappings": [mapping]},
            "prevResult": result,
        }
        self._call("ADD", plugin_command(), {"FLANNEL_CNI_PLUGIN": "portmap"}, self.portmap)

    def leave_by_go(self) -> None:
        """DEL as a node that runs the Go plugins again does it."""
        self._call("DEL", [f"{GO_PLUGINS}/portmap"], {}, self.portmap)
        # With iptables 1.8.9 it fails once on a chain that is not there, when the link is gone already.
        error = self.rig.call("DEL", self.conf, self.container, netns=self.netns, by=GO)
        assert error is None or "does not exist" in error["msg"]
        self.rig.delete(self.conf, self.container, netns=self.netns, by=GO)

    def vanish(self) -> None:
        """The namespace is removed, and nobody is told."""
        self.rig.node.forget(self.netns)

    def _call(self, command: str, argv: list[str], extra: dict[str, str], conf: Document) -> None:
        environment = {**attachment(self.container, self.netns), **extra}
        code, document = self.rig.node.execute(argv, command, environment, json.dumps(conf))
        assert code == 0, document


def tables_with(rig: Rig, address: str) -> list[str]:
    """Our tables with an element that names the address, as `nft` lists them."""
    listing = json.loads(rig.host.run("nft -j list ruleset"))["nftables"]
    sets = [one.get("set") or one.get("map") for one in listing]
    return sorted({one["table"] for one in sets if one and f'"{address}"' in json.dumps(one.get("elem"))})


def wait_swept(rig: Rig, address: str) -> None:
    wait_for(lambda: tables_with(rig, address) == [], SOON_S)


@pytest.mark.parametrize("way", [Pod.leave_by_go, Pod.vanish])
def test_entries_of_a_pod_that_went_are_dropped_and_others_stay(rig: Rig, way: object) -> None:
    with sweeping(rig) as program:
        first, _second = Pod(rig, "c1", 8080), Pod(rig, "c2", 8081)
        assert tables_with(rig, FIRST) == tables_with(rig, SECOND) == TABLES
        way(first)  # type: ignore[operator]
        wait_swept(rig, FIRST)
        assert tables_with(rig, SECOND) == TABLES
        wait_for(lambda: "Dropped 2 firewall entries of pods that are gone" in program.said())


def test_entries_left_from_before_are_dropped_at_the_start(rig: Rig) -> None:
    first, _second = Pod(rig, "c1", 8080), Pod(rig, "c2", 8081)
    first.leave_by_go()
    assert tables_with(rig, FIRST) == tables_with(rig, SECOND) == TABLES
    with sweeping(rig):
        wait_swept(rig, FIRST)
        assert tables_with(rig, SECOND) == TABLES


def test_the_sets_wait_for_the_next_pod_until_a_start(rig: Rig) -> None:
    """Of the last pod that goes the entry is dropped; what any pod needs is spared the next one."""
    pod = Pod(rig, "c1", 8080)
    with sweeping(rig) as program:
        wait_for(lambda: asleep(program.process.pid))
        pod.vanish()
        wait_swept(rig, FIRST)
        assert "set ip-10.1.17.0-24" in rig.host.run("nft list table inet flannel_cni")
    with sweeping(rig):
        wait_for(lambda: "flannel_cni\n" not in rig.host.run("nft list tables"))


def test_many_pods_that_go_at_once(rig: Rig) -> None:
    """More news than the socket holds: what was lost is made up for."""
    pod = Pod(rig, "c1", 8080)
    with sweeping(rig) as program:
        wait_for(lambda: asleep(program.process.pid))
        os.kill(program.process.pid, signal.SIGSTOP)
        batch = "".join(f"link add pfl{n} group 42 type bridge\n" for n in range(200))
        subprocess.run(rig.host.wrap(["ip", "-batch", "-"]), input=batch, text=True, check=True, timeout=60)
        rig.host.run("ip link del group 42")
        pod.vanish()
        rows = rig.host.run("cat /proc/net/netlink").splitlines()
        drops = [row.split()[8] for row in rows[1:] if row.split()[3] == "00000001"]
        assert len(drops) == 1 and int(drops[0]) > 0, rows
        os.kill(program.process.pid, signal.SIGCONT)
        wait_swept(rig, FIRST)


def asleep(pid: int) -> bool:
    """Whether all threads of a process wait for something."""
    states = [
        one.read_text().rpartition(")")[2].split()[0] for one in Path(f"/proc/{pid}/task").glob("*/stat")
    ]
    return set(states) == {"S"}


def test_links_that_come_wake_nobody(rig: Rig) -> None:
    """Who adds a pod is not to be held up."""
    with sweeping(rig) as program:
        wait_for(lambda: asleep(program.process.pid))
        before = switches(program.process.pid)
        rig.host.run("ip link add pfl-a type bridge")
        rig.host.run("ip link set pfl-a up")
        assert switches(program.process.pid) == before
        rig.host.run("ip link del pfl-a")
        wait_for(lambda: switches(program.process.pid) > before)


def switches(pid: int) -> int:
    """How often threads of a process went to sleep."""
    texts = [one.read_text() for one in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for text in texts)


def test_close_ends_it(rig: Rig) -> None:
    pod = Pod(rig, "c1", 8080)
    with sweeping(rig) as program:
        assert program.end() == 0
        assert program.said() == "started\n1\n"
    pod.vanish()
    assert tables_with(rig, FIRST) == TABLES


def test_a_sweep_that_fails_is_logged_and_made_up_for(rig: Rig) -> None:
    """Without descriptors for the packet filter's socket."""
    first, second = Pod(rig, "c1", 8080), Pod(rig, "c2", 8081)
    first.vanish()
    with sweeping(rig, "3") as program:
        wait_for(lambda: "Firewall entries of pods that are gone may stay: " in program.said())
        assert tables_with(rig, FIRST) == TABLES
        argv = ["prlimit", f"--pid={program.process.pid}", "--nofile=100:"]
        subprocess.run(argv, check=True, timeout=30)
        second.vanish()
        wait_swept(rig, FIRST)
        wait_swept(rig, SECOND)
        assert "entries of pods that are gone can be dropped again" in program.said()
        assert program.end() == 0


@pytest.mark.parametrize("has_socket", [True, False])
def test_the_daemon_sweeps(rig: Rig, tmp_path: Path, has_socket: bool) -> None:
    """Also when the socket for CNI calls cannot be made: the plugin then makes the entries by itself."""
    path = tmp_path / ("cni.sock" if has_socket else "x" * 108)
    with daemon(rig, tmp_path, f"--cni-socket={path}") as program:
        Pod(rig, "c1", 8080).leave_by_go()
        wait_swept(rig, FIRST)
        assert path.exists() == has_socket
        assert program.end() == 0, program.said()


def test_a_daemon_without_cni_leaves_the_entries_alone(rig: Rig, tmp_path: Path) -> None:
    Pod(rig, "c1", 8080).vanish()
    with daemon(rig, tmp_path, "--cni-socket=") as program:
        wait_for(lambda: "flannel is ready" in program.said(), TIMEOUT_S)
        assert tables_with(rig, FIRST) == TABLES
        assert program.end() == 0, program.said()


@contextmanager
def daemon(rig: Rig, place: Path, *flags: str) -> Iterator[Program]:
    """flanneld in the node, with a store of its own, once it has its subnet."""
    rig.host.run("ip link add up0 type veth peer name up1")
    rig.host.run("ip addr add 192.0.2.1/24 dev up0")
    rig.host.run("ip link set up0 up")
    argv: Sequence[str] = [
        f"--subnet-file={place}/given.env",
        f"--state-dir={place}/state",
        f"--net-config-path={place}/none",
        "--iface=up0",
        "--iptables-forward-rules=false",
        *flags,
    ]
    with Program(rig.host, place / "flanneld.log", "-m", "flanneld", *argv) as program:
        wait_for((place / "given.env").exists, TIMEOUT_S)
        yield program
