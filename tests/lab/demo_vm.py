"""`make demo-vm`: two virtual machines in pods of a two-node cluster, one for each binding.

    outside ── node1 ── cni0 ──┬── pod vm1: bridge binding ────── [ guest has the pod's own address ]
        │                      └── pod vm2: masquerade binding ── [ guest has 10.0.2.2 ]
        └───── node2 ── cni0 ───── pod far

Run as root; everything is removed at the end. Exit status as that of `make demo`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.lab import net, traffic, vm
from tests.lab.demo import Interrupted, claim, discard, interrupt, report
from tests.lab.machine import LAUNCHER, Machine
from tests.lab.net import ENDING_SIGNALS, Lab, LabError
from tests.lab.node import CNI_BIN, FROZEN, Node, Pod, sqlite_store
from tests.lab.steps import Screen

DIRECTORY = Path("/tmp/pyflannel-demo-vm")
NETWORK_CONFIG = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
PLUGINS = (CNI_BIN, CNI_BIN / "optional")
PORT = 7007
BINDINGS = {"vm1": "bridge", "vm2": "masquerade"}


class VmDemo:
    """The steps, in order; each returns the lines that tell what it found."""

    def __init__(self, lab: Lab, screen: Screen) -> None:
        self.lab = lab
        self.screen = screen
        self.nodes: list[Node] = []
        self.machines: list[Machine] = []
        self.pods: dict[str, Pod] = {}

    def run(self) -> None:
        """Build, boot, talk, kill, restore."""
        steps: Sequence[tuple[str, Callable[[], list[str]]]] = (
            ("Build two nodes, start flanneld on each, add pods vm1, vm2 and far", self.build),
            ("Hand the pods' interfaces over with virt-launcher run", self.hand_over),
            ("Boot a machine in each pod: QEMU without KVM, Debian's kernel", self.boot),
            ("The guests ask for their addresses by DHCP", self.acquire),
            ("Pod far, on the other node, pings and fetches from the guests across VXLAN", self.reach),
            ("The guests connect to pod far and to the outside", self.leave),
            ("Kill the launchers, start them again, and wait for the guests to renew", self.renew),
            ("Switch the guests off, give the interfaces back, ping the pods themselves", self.restore),
        )
        for title, action in steps:
            with self.screen.step(title):
                found = action()
            self.screen.details(found)

    def build(self) -> list[str]:
        """Two nodes and three pods."""
        self.lab.create(2)
        self.nodes = [Node(self.lab, name) for name in self.lab.nodes]
        store = sqlite_store(self.lab, NETWORK_CONFIG)
        for node in self.nodes:
            node.start(FROZEN, store)
        subnets = [node.wait_subnet() for node in self.nodes]
        for node, other in zip(self.nodes, reversed(subnets), strict=True):
            node.wait_routes([other])
        near, away = self.nodes
        self.pods = {name: near.add_pod(name, PLUGINS) for name in BINDINGS}
        self.pods["far"] = away.add_pod("far", PLUGINS)
        self.machines = [Machine(self.pods[name], binding) for name, binding in BINDINGS.items()]
        ends = ((name, pod.endpoint, pod.node.name) for name, pod in self.pods.items())
        return [f"{name} {end.address} {end.mac} on {node}" for name, end, node in ends]

    def hand_over(self) -> list[str]:
        """virt-launcher in each pod."""
        for machine in self.machines:
            machine.hand_over()
        return [f"{m.pod.name} ({m.binding}): {' '.join(m.qemu_arguments)}" for m in self.machines]

    def boot(self) -> list[str]:
        """Both at once."""
        with ThreadPoolExecutor() as workers:
            guests = list(workers.map(Machine.boot, self.machines))
        return [f"{guest.name} console: {guest.wait_text(vm.READY)}" for guest in guests]

    def acquire(self) -> list[str]:
        """DHCP."""
        found = []
        for machine in self.machines:
            machine.acquire()
            found.append(f"{machine.pod.name} console: {machine.guest.wait_text('DHCP bound')}")
            found.append(
                f"{machine.pod.name}: {' '.join(machine.guest.run('ip -o -4 addr show eth0').split())}"
            )
        return found

    def reach(self) -> list[str]:
        """Ping and TCP from the other node."""
        found = []
        for machine in self.machines:
            name, address = machine.pod.name, machine.pod.endpoint.address
            trips = traffic.ping(self.lab, self.pods["far"].netns, address)
            page = f"this is the guest of {name}"
            machine.guest.run(f"mkdir -p /www; echo {page} >/www/index.html; httpd -h /www -p 80")
            got = self.lab.run(self.pods["far"].netns, "curl", "-sf", f"http://{address}/").strip()
            if got != page:
                raise LabError(f"http://{address}/ says {got!r}, not {page!r}", machine.guest.console)
            found.append(f"far pings {address} in {trips.avg_ms:.2f} ms and fetches: {got}")
        return found

    def leave(self) -> list[str]:
        """TCP from the guests; the server tells whom it sees."""
        far = self.pods["far"]
        traffic.answering(self.lab, far.netns, PORT, "far").wait_text("listening")
        traffic.answering(self.lab, self.lab.outside, PORT, "world").wait_text("listening")
        found = []
        for machine in self.machines:
            for target in (far.endpoint.address, str(net.WORLD)):
                said = machine.guest.run(f"nc {target} {PORT} </dev/null").strip()
                found.append(f"{machine.pod.name} asks {target}: {said}")
        return found

    def renew(self) -> list[str]:
        """A killed launcher goes on where it was."""
        found = []
        for machine in self.machines:
            machine.kill_launcher()
            traffic.ping(self.lab, self.pods["far"].netns, machine.pod.endpoint.address)
            machine.hand_over()
        for machine in self.machines:
            done = sum("DHCP renew" in line for line in machine.guest.console_lines())
            machine.wait_renewed(done + 1)
            line = machine.guest.wait_text("DHCP renew", count=done + 1)
            found.append(f"{machine.pod.name} console: {line}")
        return found

    def restore(self) -> list[str]:
        """The pods have their addresses again."""
        for machine in self.machines:
            machine.guest.stop()
            machine.restore()
            traffic.ping(self.lab, self.pods["far"].netns, machine.pod.endpoint.address)
        return [f"{m.pod.name} answers on {m.pod.endpoint.address} itself" for m in self.machines]


def require() -> None:
    """Raise LabError, one line, if something that the demo needs is not there."""
    if os.geteuid() != 0:
        raise LabError("must run as root, since it makes network namespaces: sudo make demo-vm")
    for path in (FROZEN[0], LAUNCHER[0], str(CNI_BIN / "flannel")):
        if not Path(path).is_file():
            raise LabError(f"{path}: no such program; build it first: make build")
    for name in ("ip", "ping", "curl", "qemu-system-x86_64"):
        net.program(name)


def main() -> int:
    """Run it; a failure is reported while the logs still exist."""
    for signum in ENDING_SIGNALS:
        signal.signal(signum, interrupt)
    begin, screen = time.monotonic(), Screen()
    try:
        require()
        claim(DIRECTORY)
        with contextlib.ExitStack() as stack:
            lab = Lab(DIRECTORY)
            stack.callback(discard, DIRECTORY)
            stack.enter_context(lab)
            try:
                VmDemo(lab, screen).run()
            except LabError as exc:
                report(exc, exc.logs or sorted(DIRECTORY.glob("launcher-*.log")))
                return 1
    except LabError as exc:
        report(exc)
        return 1
    except Interrupted as exc:
        print(f"demo: ended by {exc}", file=sys.stderr)
        return 128 + exc.signum
    took = f"{time.monotonic() - begin:.1f} s"
    print(f"\n{screen.paint('All checks passed', 32)} in {took}; everything is removed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
