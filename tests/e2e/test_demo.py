"""The demo as a user runs it: real daemons, plugins and packets, and nothing left behind.

Run with the built programs (dist/, needs `make build`), and with the source tree.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab.cni import Attachment, PluginError, Runtime
from tests.lab.net import Lab, Record, namespaces, running, wait_for
from tests.lab.node import CNI_BIN, FROZEN, REPOSITORY, SOURCE
from tests.lab.render import WIDTH

BUILT = pytest.mark.skipif(
    not (Path(FROZEN[0]).exists() and (CNI_BIN / "flannel").exists()), reason="dist/ is not built: make build"
)
DEMO_S = 120.0


@dataclass(frozen=True, slots=True)
class Demo:
    """How to run the demo in one test: its environment, and the directory of its state."""

    environment: dict[str, str]
    directory: Path

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.lab.demo", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        with self.start(*arguments, **variables) as process:
            out, err = process.communicate(timeout=DEMO_S)
        return process.returncode, out, err

    def record(self) -> Record:
        record = Record.load(self.directory)
        assert record is not None
        return record


@pytest.fixture(params=["source", pytest.param("built", marks=BUILT)])
def demo(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Demo]:
    environment = {"PFL_DEMO_DIR": str(tmp_path / "demo"), "STORE": "", "KEEP": ""}
    if request.param == "source":
        plugins = tmp_path / "plugins"
        plugins.mkdir()
        plugin = plugins / "flannel"
        plugin.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m cni "$@"\n')
        plugin.chmod(0o755)
        environment |= {"PFL_FLANNELD": " ".join(SOURCE), "PFL_CNI_BIN": str(plugins)}
    demo = Demo(environment, tmp_path / "demo")
    yield demo
    if demo.directory.exists():
        demo.run("down")


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Read stdout up to the line that contains `text`, which must come."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    pytest.fail(f"no line with {text!r} in:\n{''.join(lines)}")


def section(out: str, heading: str) -> list[list[str]]:
    """The cells of the rows of a table, without its headings."""
    lines = out.split(f"\n{heading}\n", 1)[1].split("\n\n", 1)[0].splitlines()
    return [line.split() for line in lines[1:]]


def host_state() -> list[str]:
    """The host's own links, routes, firewall and forwarding."""
    commands = (
        ("ip", "-j", "link"),
        ("ip", "-j", "route", "show", "table", "all"),
        ("nft", "list", "ruleset"),
        ("sysctl", "-a", "--pattern", r"^net\.(ipv4|ipv6)\.(conf\..*forwarding|ip_forward)"),
    )
    return [subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands]


@pytest.mark.parametrize("store", ["sqlite", "etcd"])
def test_demo_shows_a_working_network_and_removes_it(demo: Demo, store: str) -> None:
    before = host_state()
    status, out, err = demo.run(STORE=store)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= WIDTH
    assert "\x1b" not in out

    assert "30 of 30 pairs" in out
    leases = section(out, "Leases")
    assert [row[0] for row in leases] == ["node1", "node2", "node3"]
    assert len({row[1] for row in leases}) == 3
    pods = {row[0]: row for row in section(out, "Pods")}
    assert len(pods) == len({row[2] for row in pods.values()}) == 6

    outer = r"IP 192\.168\.77\.11\.\d+ > 192\.168\.77\.12\.8472: VXLAN, .*vni 1"
    inner = rf"IP {re.escape(pods['pod1a'][2])} > {re.escape(pods['pod2a'][2])}: ICMP echo request"
    assert re.search(rf"{outer}\n\s+{inner}", out)
    for number in (1, 2, 3):
        address = pods[f"pod{number}a"][2]
        assert f"203.0.113.1 sees pod{number}a ({address}) as 192.168.77.1{number}, its node" in out
    assert f"pod3b on node3 sees pod1a as {pods['pod1a'][2]}, itself" in out
    assert "192.168.77.11:18080 is answered by pod1a" in out
    assert re.search(r"200 MB in [\d.]+ s, [1-9]\d* Mbit/s", out)

    subnets = {row[0]: row[1] for row in leases}
    routes = section(out, "Routes")
    for name in subnets:
        over_vtep = {row[1] for row in routes if row[0] == name and row[3] == "flannel.1"}
        assert over_vtep == {subnet for peer, subnet in subnets.items() if peer != name}
    macs = {row[4]: row[2] for row in leases}
    fdb = section(out, "FDB entries")
    assert len(fdb) == 6
    assert all(macs[row[1]] == row[2] for row in fdb)
    assert "All checks passed" in out.splitlines()[-1]

    prefix = re.search(r"namespaces (pfl\d+-)\*", out)
    assert prefix is not None
    assert namespaces(prefix[1]) == []
    assert not demo.directory.exists()
    assert host_state() == before


def test_kept_lab_stays_usable_until_down(demo: Demo) -> None:
    status, out, err = demo.run(KEEP="1")
    assert (status, err) == (0, "")
    record = demo.record()
    assert record.kept
    assert not running(record.owner)
    assert {child.what for child in record.children} >= {f"flanneld-node{n}" for n in (1, 2, 3)}
    ping = re.search(r"^  (ip netns exec .* ping [\d.]+)$", out, re.MULTILINE)
    assert ping is not None
    subprocess.run([*ping[1].split(), "-c1", "-w5"], check=True, capture_output=True)

    status, out, err = demo.run()
    assert (status, out) == (1, "")
    assert "a lab is kept" in err
    assert len(err.splitlines()) == 1
    assert demo.record() == record

    status, out, err = demo.run("down")
    assert (status, err) == (0, "")
    assert namespaces(record.prefix) == []
    assert not any(map(running, record.children))
    assert not demo.directory.exists()
    assert demo.run("down")[0] == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["Build the lab", "Ping from every pod"])
def test_signal_ends_the_demo_and_removes_everything(demo: Demo, signum: signal.Signals, moment: str) -> None:
    with demo.start() as process:
        read_until(process, moment)
        record = demo.record()
        process.send_signal(signum)
        _, err = process.communicate(timeout=DEMO_S)
    assert process.returncode == 128 + signum
    assert err == f"demo: ended by {signum.name}\n"
    assert namespaces(record.prefix) == []
    assert not any(map(running, record.children))
    assert not demo.directory.exists()


def test_leftovers_of_a_killed_demo_are_removed_by_the_next(demo: Demo) -> None:
    with demo.start() as process:
        read_until(process, "Ping from every pod")
        record = demo.record()
        process.kill()
        process.communicate()
    assert namespaces(record.prefix)
    assert any(map(running, record.children))
    status, out, err = demo.run()
    assert (status, err) == (0, "")
    assert "30 of 30 pairs" in out
    assert namespaces(record.prefix) == []
    assert not any(map(running, record.children))


@pytest.fixture
def broken(tmp_path: Path) -> Demo:
    """A demo whose daemon gives up at once; needs nothing built."""
    daemon = tmp_path / "flanneld"
    daemon.write_text("#!/bin/sh\necho no lease today >&2\nexit 3\n")
    daemon.chmod(0o755)
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "flannel").touch()
    directory = tmp_path / "demo"
    environment = {
        "PFL_FLANNELD": str(daemon),
        "PFL_CNI_BIN": str(plugins),
        "PFL_DEMO_DIR": str(directory),
        "STORE": "",
        "KEEP": "",
    }
    return Demo(environment, directory)


def test_failing_daemon_is_named_with_its_last_words(broken: Demo) -> None:
    status, out, err = broken.run()
    assert status == 1
    assert "All checks passed" not in out
    assert err.splitlines() == [
        "demo: flanneld-node1 ended with status 3",
        "--- last lines of flanneld-node1.log",
        "no lease today",
    ]
    prefix = re.search(r"namespaces (pfl\d+-)\*", out)
    assert prefix is not None
    assert namespaces(prefix[1]) == []
    assert not broken.directory.exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "status", "message"),
    [
        ((), {"STORE": "consul"}, 2, "STORE=consul: must be sqlite or etcd"),
        ((), {"KEEP": "yes"}, 2, "KEEP=yes: must be 0 or 1"),
        (("up",), {}, 2, "up: the only argument is down"),
        (
            (),
            {"PFL_FLANNELD": "/nonexistent/flanneld"},
            1,
            "/nonexistent/flanneld: no such program; build it",
        ),
        ((), {"PFL_CNI_BIN": "/nonexistent"}, 1, "no CNI plugin flannel in /nonexistent or"),
        ((), {"PFL_DEMO_DIR": "/tmp"}, 1, "/tmp: must be a directory of root with mode 0700"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    broken: Demo, arguments: tuple[str, ...], variables: dict[str, str], status: int, message: str
) -> None:
    found, out, err = broken.run(*arguments, **variables)
    assert (found, out) == (status, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"demo: {message}")


# A plugin that records what it was given and answers as the test wants.
PLUGIN = """#!{python} -I
import json, os, pathlib, sys
here = pathlib.Path(sys.argv[0])
config = json.load(sys.stdin)
call = {{"env": {{k: v for k, v in os.environ.items() if k.startswith("CNI_")}}, "path": os.environ["PATH"],
         "config": config, "netns": os.stat("/proc/self/ns/net").st_ino}}
with open(here.parent / "calls", "a") as calls:
    calls.write(json.dumps(call) + "\\n")
if config.get("refuse") == os.environ["CNI_COMMAND"]:
    print(json.dumps({{"code": 11, "msg": "try again", "details": "busy"}}))
    sys.exit(1)
if os.environ["CNI_COMMAND"] == "ADD":
    before = config.get("prevResult", {{}}).get("by", [])
    print(json.dumps({{"cniVersion": "1.0.0", "by": [*before, here.name]}}))
"""


@dataclass(frozen=True, slots=True)
class Chain:
    """Two recording plugins in one list, run in a node of a small lab."""

    folder: Path
    lab: Lab

    def runtime(self, second: dict[str, Any]) -> Runtime:
        first = {"type": "one", "capabilities": {"portMappings": True, "mac": False}}
        conflist = {"name": "net", "cniVersion": "1.0.0", "plugins": [first, {"type": "two", **second}]}
        return Runtime(conflist, [self.folder], self.folder / "cache", self.lab.netns("node1"))

    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls"
        calls = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        return calls


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    for name in ("one", "two"):
        plugin = tmp_path / name
        plugin.write_text(PLUGIN.format(python=sys.executable))
        plugin.chmod(0o755)
    with Lab(tmp_path / "lab") as lab:
        lab.create(1)
        yield Chain(tmp_path, lab)


ATTACHMENT = Attachment(
    "c1",
    "/run/netns/c1",
    args="IgnoreUnknown=1",
    capability_args={"portMappings": [1], "mac": "x", "dns": {}},
)


def test_runtime_speaks_to_plugins_as_libcni_does(chain: Chain) -> None:
    runtime = chain.runtime({})
    result = runtime.add(ATTACHMENT)
    assert result == {"cniVersion": "1.0.0", "by": ["one", "two"]}
    first, second = chain.calls()
    assert first["config"] == {
        "type": "one",
        "capabilities": {"portMappings": True, "mac": False},
        "name": "net",
        "cniVersion": "1.0.0",
        "runtimeConfig": {"portMappings": [1]},
    }
    assert second["config"] == {
        "type": "two",
        "name": "net",
        "cniVersion": "1.0.0",
        "prevResult": {"cniVersion": "1.0.0", "by": ["one"]},
    }
    assert first["env"] == {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/run/netns/c1",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": "IgnoreUnknown=1",
        "CNI_PATH": str(chain.folder),
    }
    assert first["path"] == "/usr/sbin:/usr/bin:/sbin:/bin"
    assert first["netns"] == Path(f"/run/netns/{chain.lab.netns('node1')}").stat().st_ino

    runtime.check(ATTACHMENT)
    assert [call["config"]["type"] for call in calls_with(chain, result)] == ["one", "two"]
    runtime.delete(ATTACHMENT)
    assert [call["config"]["type"] for call in calls_with(chain, result)] == ["two", "one"]
    runtime.delete(ATTACHMENT)
    assert all("prevResult" not in call["config"] for call in chain.calls())


def calls_with(chain: Chain, result: dict[str, Any]) -> list[dict[str, Any]]:
    calls = chain.calls()
    assert all(call["config"]["prevResult"] == result for call in calls)
    return calls


def test_refusal_carries_the_plugins_own_words_and_stops_the_chain(chain: Chain) -> None:
    with pytest.raises(
        PluginError, match=r'plugin type="two" failed \(add\), code 11: try again; busy'
    ) as caught:
        chain.runtime({"refuse": "ADD"}).add(ATTACHMENT)
    assert (caught.value.plugin, caught.value.code, caught.value.msg) == ("two", 11, "try again")
    assert [call["env"]["CNI_COMMAND"] for call in chain.calls()] == ["ADD", "ADD"]

    runtime = chain.runtime({"refuse": "DEL"})
    runtime.add(ATTACHMENT)
    chain.calls()
    with pytest.raises(PluginError):
        runtime.delete(ATTACHMENT)
    assert [call["config"]["type"] for call in chain.calls()] == ["two"]
    cached = chain.folder / "cache" / "results" / "net-c1-eth0"
    assert json.loads(cached.read_text())["result"]["by"] == ["one", "two"]


def test_lab_removes_what_a_crashed_one_left(tmp_path: Path) -> None:
    """A process ended by nobody, an unfinished build, a record: the next lab starts from nothing."""
    crashed = Lab(tmp_path, prefix=f"pfl{os.getpid()}x-")
    crashed.create(1)
    crashed.add_pod("orphan")
    process = crashed.spawn(crashed.netns("orphan"), "sleep", ["sleep", "600"])
    with Lab(tmp_path) as lab:
        lab.create(1)
        wait_for(lambda: process.popen.poll() is not None, 5.0, "end of the orphan")
        assert namespaces(crashed.prefix) == []
        assert lab.run(lab.netns("node1"), "ping", "-c1", "-w5", "203.0.113.1")
    assert namespaces(lab.prefix) == []
