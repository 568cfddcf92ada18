"""virt-launcher's DHCP server beside dnsmasq, on the same machine in the same run.

namespace with the server ── tap0/srv0 ── (a veth) ── eth0: namespace "client"
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.lab.clients import plug
from tests.lab.dnsmasq import dnsmasq
from tests.lab.machine import LAUNCHER
from tests.lab.net import Lab, Process

MAC = "0a:58:0a:f4:01:07"
CLIENT = (sys.executable, "-I", str(Path(__file__).with_name("dhcp_client.py")))
ROUNDS = 1000


def status(process: Process, field: str) -> str:
    lines = Path(f"/proc/{process.child.pid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{field}:"))


def cpu_ms(process: Process) -> float:
    fields = Path(f"/proc/{process.child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 10.0


def measure(lab: Lab, client: str, start: Callable[[], Process]) -> dict[str, float | str]:
    """Start the server while a client asks, then exchange with it."""
    asking = lab.spawn(client, f"first-{client}", [*CLIENT, "first", MAC, "20"])
    asking.wait_text("asking")
    began = time.monotonic()
    server = start()
    moment = float(asking.output(25.0).split()[-1])
    ready_cpu = cpu_ms(server)
    rounds = json.loads(lab.run(client, *CLIENT, "rounds", MAC, str(ROUNDS), timeout_s=60.0))
    return {
        "first_answer_ms": (moment - began) * 1000,
        "ready_cpu_ms": ready_cpu,
        "rss": status(server, "VmRSS"),
        **rounds,
    }


def test_dhcp_beside_dnsmasq(lab_of: Callable[[int], Lab]) -> None:
    lab = lab_of(0)
    pod, ours, server, theirs = (lab.add_pod(name) for name in ("pod", "ours", "server", "theirs"))
    lab.ip(
        pod,
        f"link add eth0 address {MAC} type veth peer name v0",
        "addr add 10.244.1.7/24 dev eth0",
        "link set eth0 up",
        "link set v0 up",
        "route add default via 10.244.1.1",
    )
    launcher = (*LAUNCHER, f"--state-dir={lab.directory / 'state'}")
    lab.run(pod, *launcher, "prepare", "--lease-seconds=120", "--hostname=vm1")
    lab.ip(pod, "link del tap0")
    plug(lab, pod, ours, "tap0", MAC)
    lab.ip(pod, "link set tap0 master k6t-eth0")
    plug(lab, server, theirs, "srv0", MAC)
    lab.ip(server, "addr add 10.244.1.1/24 dev srv0")

    # dnsmasq probes an address by ping before it offers it, unless told not to.
    flags = ("--dhcp-range=10.244.1.7,10.244.1.7,255.255.255.0,120", "--no-ping", "--dhcp-authoritative")
    figures = {
        "virt-launcher": measure(lab, ours, lambda: lab.spawn(pod, "serve", [*launcher, "serve"])),
        "dnsmasq": measure(lab, theirs, lambda: dnsmasq(lab, server, "srv0", flags)),
    }
    print()
    for name, row in figures.items():
        shown = ", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{name}: {shown}")
    mine, peer = figures["virt-launcher"], figures["dnsmasq"]
    ratios = {key: float(mine[key]) / float(peer[key]) for key in ("offer_us", "ack_us", "requests_per_s")}
    print("ratios: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
