"""A pod's namespace for the launcher's tests, a guest on its tap, and the launcher as a process.

far namespace: gateway 10.244.1.1, fd00:10:244:1::1 ──(veth)── eth0 of the pod ── ... tap0 ── guest
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from cni.net import netns
from launcher.__main__ import main
from tests.netns.firewall_fixtures import Namespace, namespace

POD_MAC = "0a:58:0a:f4:01:07"
GATEWAY_MAC = "0a:58:0a:f4:01:01"
V4 = ("addr add 10.244.1.7/24 dev eth0", "route add default via 10.244.1.1 dev eth0")
V6 = (
    "addr add fd00:10:244:1::7/64 dev eth0 nodad",
    "-6 route add default via fd00:10:244:1::1 dev eth0",
)
CALICO = (
    "addr add 10.244.1.7/32 dev eth0",
    "route add 169.254.1.1 dev eth0 scope link",
    "route add default via 169.254.1.1 dev eth0",
)
_CRASHED = 70


def wait_for(predicate: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Return once `predicate` holds."""
    end = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < end, "did not happen in time"
        Event().wait(0.01)


class Done(NamedTuple):
    """How a launcher ended: exit code (negative: the signal), and what it wrote."""

    code: int
    out: str
    err: str


@dataclass
class Pod:
    """A pod with an interface eth0, its gateway's namespace and its own state directory."""

    ns: Namespace
    far: Namespace
    state_dir: Path
    interface: str = "eth0"
    guest: Namespace | None = None
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def ip(self, command: str) -> str:
        """Run `ip` in the pod."""
        return self.ns.run(f"ip {command}")

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "launcher", "--state-dir", str(self.state_dir), *arguments]

    def launcher(self, *arguments: str) -> Done:
        """Run the program in the pod's namespace."""
        run = self.ns.call(
            lambda: subprocess.run(
                self.command(*arguments), capture_output=True, text=True, timeout=30, check=False
            )
        )
        return Done(run.returncode, run.stdout, run.stderr)

    def forked(self, *arguments: str, kill_at: int = 0) -> Done:
        """The same in a fork of this process, which saves its start; see `KillAt`."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                _in_child(self, arguments, (out.fileno(), err.fileno()), kill_at)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            return Done(code, out.read(), err.read())

    def ok(self, *arguments: str) -> Done:
        """The launcher, which has to succeed."""
        done = self.forked(*arguments)
        assert done.code == 0, done.err
        return done

    def view(self) -> dict[str, Any]:
        """What iproute2 shows, without what changes by itself."""
        return view(self.ns)

    def plug_guest(self) -> Namespace:
        """Put a veth in the tap's place, whose other end is eth0 of the guest, with the pod's MAC."""
        assert self.guest is not None
        tap = next(link for link in self.links() if link["ifname"].startswith("tap"))
        name, bridge = tap["ifname"], tap["master"]
        self.ip(f"link del {name}")
        self.ip(
            f"link add {name} mtu {tap['mtu']} type veth peer name eth0 "
            f"address {POD_MAC} mtu {tap['mtu']} netns {self.guest.name}"
        )
        self.ip(f"link set {name} master {bridge} up")
        self.guest.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
        self.guest.run("ip link set eth0 up")
        return self.guest

    def links(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.ip("-j -d link"))
        return found

    def serve(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `serve` and return it once it answers."""
        process = self.ns.call(
            lambda: subprocess.Popen(
                self.command("serve", *arguments), stderr=subprocess.PIPE, text=True, bufsize=1
            )
        )
        self.processes.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert " serving " in line, line + process.stderr.read()
        return process

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
            process.wait(10)
            if process.stderr is not None:
                process.stderr.close()


class KillAt:
    """Profiler that kills its process with SIGKILL before the call number `count` that leaves a trace.

    Those are calls that change the kernel's tables or a file, or start a program, whoever makes them.
    """

    CALLS = frozenset({"send", "ioctl", "write", "replace", "mkdir", "unlink", "fsync", "fork_exec"})
    HARMLESS = frozenset({"dump", "emit"})  # callers: questions to the kernel, log lines

    def __init__(self, count: int) -> None:
        self._left = count

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or called.__name__ not in self.CALLS:
            return
        if isinstance(called.__self__, (str, bytes)) or frame.f_code.co_name in self.HARMLESS:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _in_child(pod: Pod, arguments: Sequence[str], descriptors: tuple[int, int], kill_at: int) -> NoReturn:
    os.dup2(descriptors[0], 1)
    os.dup2(descriptors[1], 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    code = _CRASHED
    try:
        netns.enter(Path(f"/run/netns/{pod.ns.name}"))
        sys.argv = ["virt-launcher", "--state-dir", str(pod.state_dir), *arguments]
        if kill_at:
            sys.setprofile(KillAt(kill_at))
        main()
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else _CRASHED
    finally:
        # Nothing of the test's own process must go on in here.
        if code == _CRASHED:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def view(ns: Namespace) -> dict[str, Any]:
    """Links, addresses and routes of a namespace as iproute2 tells them, made comparable."""
    links = json.loads(ns.run("ip -j -d addr"))
    ports = {port["ifname"]: port for port in json.loads(ns.run("bridge -j -d link"))}
    routes = json.loads(ns.run("ip -j route")) + json.loads(ns.run("ip -6 -j route"))
    return {
        "links": {link["ifname"]: _link(link, ports.get(link["ifname"], {})) for link in links},
        "routes": sorted(
            json.dumps({k: route.get(k) for k in ("dst", "gateway", "dev", "metric", "scope", "protocol")})
            + str("onlink" in route["flags"])
            for route in routes
            if route["dst"] != "fe80::/64"
        ),
    }


def _link(link: dict[str, Any], port: dict[str, Any]) -> dict[str, Any]:
    kind = link.get("linkinfo", {}).get("info_kind", "")
    data = link.get("linkinfo", {}).get("info_data", {})
    return {
        "kind": kind,
        "mac": link["address"] if kind != "tun" else "",
        "mtu": link["mtu"],
        "up": "UP" in link["flags"],
        "arp": "NOARP" not in link["flags"],
        "master": link.get("master"),
        "learning": port.get("learning"),
        "tap": [data.get(name) for name in ("type", "user", "group", "multi_queue", "persist", "vnet_hdr")],
        "stp": data.get("stp_state"),
        "delay": data.get("forward_delay"),
        "snooping": data.get("mcast_snooping"),
        "addresses": [
            f"{a['local']}/{a['prefixlen']} {a['scope']}"
            for a in link["addr_info"]
            if not a["local"].startswith("fe80:")
        ],
    }


@contextmanager
def pod(directory: Path, *commands: str, interface: str = "eth0", mtu: int = 1450) -> Iterator[Pod]:
    """A pod set up by these `ip` commands."""
    with ExitStack() as stack:
        ns, far, guest = (stack.enter_context(namespace()) for _ in range(3))
        far.run(
            f"ip link add gw address {GATEWAY_MAC} mtu {mtu} type veth "
            f"peer name {interface} address {POD_MAC} mtu {mtu} netns {ns.name}"
        )
        far.run("ip addr add 10.244.1.1/24 dev gw")
        far.run("ip addr add fd00:10:244:1::1/64 dev gw nodad")
        far.run("ip link set gw up")
        ns.run(f"ip link set {interface} up")
        for command in commands:
            ns.run(f"ip {command}")
        made = Pod(ns, far, directory / "state", interface, guest)
        try:
            yield made
        finally:
            with suppress(ProcessLookupError):
                made.stop()
