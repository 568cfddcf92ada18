"""Traffic between pods, nodes and the outside, and what can be learned from it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import fmean

from tests.lab.net import Lab, LabError, Process, program
from tests.lab.node import Pod

PEER = (sys.executable, "-I", str(Path(__file__).with_name("peer.py")))

_RTT = re.compile(r"= ([\d.]+)/([\d.]+)/")


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """How long the replies of one or more pings took, in milliseconds."""

    pairs: int
    min_ms: float
    avg_ms: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answering server told: its own name, and the client's address as it saw it."""

    name: str
    peer: str


@dataclass(frozen=True, slots=True)
class Transfer:
    """One TCP stream, as the receiver counted it."""

    size_bytes: int
    seconds: float

    @property
    def mbit_per_s(self) -> float:
        """Throughput in 10^6 bits a second."""
        return self.size_bytes * 8 / self.seconds / 1e6


def ping(lab: Lab, netns: str, address: str) -> RoundTrips:
    """Ping `address` three times from `netns`; raises LabError unless every reply arrives."""
    said = lab.run(netns, program("ping"), "-nqc3", "-i0.02", "-w5", address)
    found = _RTT.search(said)
    if found is None:
        raise LabError(f"ping {address} from {netns} gave no times: {said!r}")
    return RoundTrips(1, float(found[1]), float(found[2]))


def ping_all(lab: Lab, pods: Sequence[Pod]) -> RoundTrips:
    """Ping from every pod to every other, many at a time; raises LabError naming the first that fails."""
    pairs = list(permutations(pods, 2))

    def one(pair: tuple[Pod, Pod]) -> RoundTrips:
        source, target = pair
        try:
            return ping(lab, source.netns, target.endpoint.address)
        except LabError as exc:
            logs = dict.fromkeys((source.node.log, target.node.log))
            raise LabError(f"{source.name} does not reach {target.name}: {exc}", *logs) from exc

    with ThreadPoolExecutor(16) as workers:
        trips = list(workers.map(one, pairs))
    return RoundTrips(len(trips), min(t.min_ms for t in trips), fmean(t.avg_ms for t in trips))


def capture(lab: Lab, netns: str, expression: str, trigger: Callable[[], object]) -> list[str]:
    """The lines tcpdump prints for the first packet on `eth0` that matches, while `trigger` runs."""
    argv = [program("tcpdump"), "-ni", "eth0", "-tc1", "-Tvxlan", "--immediate-mode", *expression.split()]
    process = lab.spawn(netns, "tcpdump", argv)
    process.wait_text("listening on")
    trigger()
    # tcpdump's own remarks go to the same file; a packet, and the one it carries, begin with the protocol.
    return [line.strip() for line in process.output(5.0).splitlines() if line.strip().startswith("IP")]


def answering(lab: Lab, netns: str, port: int, name: str) -> Process:
    """Start a TCP server in `netns` that answers until the lab ends; `Answer` is what it says."""
    return lab.spawn(netns, f"answer-{name}", [*PEER, "answer", str(port), name])


def ask(lab: Lab, netns: str, address: str, port: int) -> Answer:
    """Connect from `netns` to an answering server; raises LabError if nobody answers."""
    try:
        said = lab.run(netns, *PEER, "ask", address, str(port))
    except LabError as exc:
        raise LabError(f"{netns} gets no answer from {address} port {port}: {exc}") from exc
    return Answer(**json.loads(said))


def transfer(
    lab: Lab, source: Pod, target: Pod, size_bytes: int, port: int = 5001, address: str = ""
) -> Transfer:
    """Send one TCP stream of `size_bytes` from one pod to the other, to the `address` of it if given."""
    receiver = lab.spawn(target.netns, "sink", [*PEER, "sink", str(port)])
    receiver.wait_text("listening")
    where = address or target.endpoint.address
    lab.run(source.netns, *PEER, "pour", where, str(port), str(size_bytes))
    counted = json.loads(receiver.output().splitlines()[-1])
    if counted["bytes"] != size_bytes:
        raise LabError(f"{target.name} received {counted['bytes']} of {size_bytes} bytes")
    return Transfer(counted["bytes"], counted["seconds"])
