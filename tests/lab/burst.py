"""Many pods of one node attached and detached at once, as a container runtime does it after a scale-up.

    test ── unix socket ── runner (in the node's namespace) ── plugins, one process for each step

The runner is a small C program, so that what is measured are the plugins and not this interpreter.
`Crowd` is the node's pods and all that a runtime keeps of them; it says what is wrong with them, too.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cni.net import netns
from tests.lab.cni import Endpoint, Json
from tests.lab.net import COMMAND_S, ENVIRONMENT, Lab, LabError, program, wait_for
from tests.lab.node import CNI_BIN, READY_S, UPSTREAM_CNI_BIN, Node

RUNNER_SOURCE = Path(__file__).parents[1] / "bench" / "runner.c"
BATCH_S = 180.0
PING_S, PING_AGAIN_S = 5.0, 0.5

# The links that a node of the lab has without any pod.
OWN_LINKS = frozenset({"lo", "eth0", "flannel.1", "cni0"})
FIRST_HOST_PORT = 20000

Command = Literal["ADD", "DEL"]
ECHO_REPLY, ECHO_REQUEST = 0, 8
SOL_RAW, ICMP_FILTER = 255, 1
_ADDRESS = re.compile(r"\d+(?:\.\d+){3}|[0-9a-f]*:[0-9a-f:]+")
_ANSWER = struct.Struct("=iIIIQQ")


@dataclass(frozen=True, slots=True)
class Step:
    """One start of a plugin. Its stdin is `head`, the stdout of the job's step `splice`, and `tail`."""

    path: str
    environment: Mapping[str, str]
    head: str
    splice: int = -1
    tail: str = ""

    def encode(self) -> bytes:
        environment = b"".join(f"{key}={value}\0".encode() for key, value in self.environment.items())
        texts = (self.path.encode(), environment, self.head.encode(), self.tail.encode())
        return struct.pack("=i4I", self.splice, *map(len, texts)) + b"".join(texts)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended. `status` is the exit code, minus the signal, or None if it was not started."""

    step: Step
    status: int | None
    began_ns: int
    ended_ns: int
    stdout: str
    stderr: str

    @property
    def took_ms(self) -> float:
        return (self.ended_ns - self.began_ns) / 1e6

    def require(self) -> None:
        """Raise LabError, with the plugin's own words, unless it succeeded."""
        if self.status != 0:
            what = f"{self.step.path} {self.step.environment['CNI_COMMAND']}"
            pod = self.step.environment["CNI_CONTAINERID"]
            raise LabError(f"{what} of {pod}: exit status {self.status}: {self.stdout} {self.stderr}")


Job = Sequence[Step]
Outcomes = list[list[Outcome]]


def wall_ms(outcomes: Outcomes) -> float:
    """From the start of the first step to the end of the last."""
    steps = [outcome for job in outcomes for outcome in job]
    return (max(step.ended_ns for step in steps) - min(step.began_ns for step in steps)) / 1e6


class Runner:
    """The C program in the node's namespace. It is ended by the lab, and plugins that still run with it."""

    def __init__(self, lab: Lab, namespace: str, name: str) -> None:
        binary = lab.directory / "runner"
        if not binary.exists():
            compiler = [program("gcc"), "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(binary)]
            subprocess.run([*compiler, str(RUNNER_SOURCE)], check=True, timeout=COMMAND_S)
        place = lab.directory / f"runner-{name}.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place))
            listener.listen(1)
            listener.settimeout(COMMAND_S)
            self.process = lab.spawn(namespace, f"runner-{name}", [str(binary), str(place)])
            self._connection, _ = listener.accept()
        self._connection.settimeout(BATCH_S)
        self._stream = self._connection.makefile("rb")
        self._jobs: Sequence[Job] = ()

    def run(self, jobs: Sequence[Job]) -> Outcomes:
        """Start all jobs at once and return once the last has ended; `Outcome.require` tells of failures."""
        self.begin(jobs)
        return self.finish()

    def begin(self, jobs: Sequence[Job]) -> None:
        """Start all jobs at once, and do not wait."""
        self._jobs = jobs
        parts = [struct.pack("=I", len(jobs))]
        for job in jobs:
            parts += [struct.pack("=I", len(job)), *(step.encode() for step in job)]
        self._connection.sendall(b"".join(parts))

    def finish(self) -> Outcomes:
        """Wait for the end of what `begin` started."""
        return [[self._outcome(step) for step in job] for job in self._jobs]

    def close(self) -> None:
        """End the runner."""
        self._stream.close()
        self._connection.close()
        self.process.popen.wait(COMMAND_S)

    def _outcome(self, step: Step) -> Outcome:
        status, out, err, _, began_ns, ended_ns = _ANSWER.unpack(self._read(_ANSWER.size))
        stdout, stderr = self._read(out).decode(), self._read(err).decode(errors="replace")
        code = None if status == -1 else os.waitstatus_to_exitcode(status)
        return Outcome(step, code, began_ns, ended_ns, stdout, stderr)

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) != size:
            raise LabError("the runner has ended", self.process.log)
        return data


@dataclass(frozen=True, slots=True)
class Plugins:
    """Which executables attach a pod: `network` is the path of the first, `config` its netconf.

    `folder` has `portmap` and `loopback`; `environment` is what the runtime has besides CNI_*.
    """

    network: Path
    config: Json
    folder: Path
    cni_path: str
    environment: Mapping[str, str] = field(default_factory=dict)


def wait_served(node: Node) -> None:
    """Wait until the node's daemon accepts connections of the plugin."""

    def accepted() -> bool:
        node.daemon.require_running()
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(node.cni_socket)) == 0

    wait_for(accepted, READY_S, str(node.cni_socket), node.log)


def warm_only(lab: Lab) -> Path:
    """A folder like `dist/cni-bin` without the frozen plugin: there the daemon serves, or the call fails."""
    folder = lab.directory / "warm-bin"
    (folder / "optional").mkdir(parents=True)
    shutil.copy2(CNI_BIN / "flannel", folder)
    for name in ("bridge", "host-local", "portmap", "loopback"):
        (folder / "optional" / name).symlink_to("../flannel")
    return folder


def our_plugins(
    node: Node, folder: Path = CNI_BIN, subnet_file: Path | None = None, delegate: Mapping[str, object] = {}
) -> Plugins:
    """The stock netconf for our plugin, which reaches the node's daemon, and nobody else's plugins."""
    config = {key: value for key, value in node.conflist().items() if key != "plugins"}
    config |= node.conflist()["plugins"][0]
    config["subnetFile"] = str(subnet_file or node.subnet_file)
    config["delegate"] |= delegate
    return Plugins(
        network=folder / "flannel",
        config=config,
        folder=folder / "optional",
        cni_path=f"{folder}:{folder / 'optional'}",
        environment={"FLANNEL_CNI_SOCKET": str(node.cni_socket)},
    )


def go_plugins(
    node: Node, subnets: Sequence[str], networks: Sequence[str], delegate: Mapping[str, object] = {}
) -> Plugins:
    """Debian's `bridge` with what flannel makes of the same netconf (contract, section 2.4)."""
    stock = node.conflist()
    config: Json = {"ipMasq": False, "mtu": 1450, "isGateway": True}
    config |= {**stock["plugins"][0]["delegate"], **delegate}
    config |= {"name": stock["name"], "cniVersion": stock["cniVersion"], "type": "bridge"}
    config["ipam"] = {
        "type": "host-local",
        "dataDir": str(node.directory / "cni-networks"),
        "ranges": [[{"subnet": subnet}] for subnet in subnets],
        "routes": [{"dst": network} for network in networks],
    }
    return Plugins(UPSTREAM_CNI_BIN / "bridge", config, UPSTREAM_CNI_BIN, str(UPSTREAM_CNI_BIN))


@dataclass(slots=True)
class Member:
    """A pod of a crowd; `result` is what a runtime caches, the stdout of its last plugin's ADD.

    It outlives the DEL, which may have to be called again; `attached` tells how things are.
    """

    number: int
    name: str
    netns: str
    host_port: int
    result: str = ""
    attached: bool = False

    @property
    def addresses(self) -> tuple[str, ...]:
        return Endpoint.of(json.loads(self.result)).addresses


class Crowd:
    """The pods of one node. `chain` adds what a runtime runs beside the network plugin.

    With it `loopback` runs at the same time and `portmap` afterwards; every pod whose number can be
    divided by `mapped` has one host port.
    """

    def __init__(
        self, node: Node, plugins: Plugins, name: str, *, chain: bool = False, mapped: int = 0
    ) -> None:
        self.node = node
        self.plugins = plugins
        self.name = name
        self.runner = Runner(node.lab, node.netns, name)
        self.seen: set[str] = set()
        self.members: list[Member] = []
        self._chain = chain
        self._mapped = mapped
        self._pings: dict[str, socket.socket] = {}
        self._elements = elements(node)

    def create(self, count: int) -> list[Member]:
        """Make so many namespaces; nothing is attached yet."""
        made = []
        for number in range(len(self.members), len(self.members) + count):
            name = f"{self.name}{number}"
            port = FIRST_HOST_PORT + number if self._mapped and number % self._mapped == 0 else 0
            made.append(Member(number, name, self.node.lab.netns(name), port))
        batch("netns add", [member.netns for member in made])
        self.members += made
        return made

    def remove(self, members: Collection[Member]) -> None:
        """Delete the namespaces of pods that are the last of the crowd."""
        for member in members:
            ping = self._pings.pop(member.netns, None)
            if ping is not None:  # a socket would keep the namespace alive
                ping.close()
        batch("netns del", [member.netns for member in members])
        del self.members[len(self.members) - len(members) :]

    def close(self) -> None:
        """End the runner and give back the sockets; the namespaces are the lab's to delete."""
        self.runner.close()
        for ping in self._pings.values():
            ping.close()
        self._pings.clear()

    def add(self, members: Iterable[Member]) -> Outcomes:
        """ADD all at once. Raises LabError if one fails, or is given an address that another one has."""
        self.begin("ADD", members := list(members))
        return self.finish_add(members)

    def delete(self, members: Iterable[Member]) -> Outcomes:
        """DEL all at once. Raises LabError if one fails."""
        self.begin("DEL", members := list(members))
        return self.finish_delete(members)

    def begin(self, command: Command, members: Iterable[Member]) -> None:
        """Start ADD or DEL of all and do not wait."""
        self.runner.begin([job for member in members for job in self._jobs(command, member)])

    def finish_add(self, members: Sequence[Member]) -> Outcomes:
        """Wait for what `begin` started, and keep the results."""
        outcomes = self._finish()
        width = len(outcomes) // len(members)
        for number, member in enumerate(members):
            member.result = outcomes[number * width][-1].stdout
            member.attached = True
        held = [address for member in self.members if member.attached for address in member.addresses]
        twice = sorted({address for address in held if held.count(address) > 1})
        if twice:
            raise LabError(f"given twice: {', '.join(twice)}")
        self.seen.update(held)
        return outcomes

    def finish_delete(self, members: Iterable[Member]) -> Outcomes:
        """Wait for what `begin` started."""
        outcomes = self._finish()
        for member in members:
            member.attached = False
        return outcomes

    def _finish(self) -> Outcomes:
        outcomes = self.runner.finish()
        for job in outcomes:
            for outcome in job:
                outcome.require()
        return outcomes

    def _jobs(self, command: Command, member: Member) -> list[Job]:
        """What a runtime starts for one pod: the conflist, backwards on DEL, and its own loopback."""
        network = self._step(command, member, self.plugins.network, self.plugins.config)
        if not self._chain:
            return [[network]]
        portmap: Json = {"type": "portmap", "capabilities": {"portMappings": True}}
        portmap |= {key: self.plugins.config[key] for key in ("name", "cniVersion")}
        if member.host_port:
            mapping = {"hostPort": member.host_port, "containerPort": 80, "protocol": "tcp"}
            portmap["runtimeConfig"] = {"portMappings": [mapping]}
        mapped = self._step(command, member, self.plugins.folder / "portmap", portmap, after=0)
        lo = {"name": "cni-loopback", "cniVersion": "0.3.1", "type": "loopback"}
        loopback = self._step(command, member, self.plugins.folder / "loopback", lo, ifname="lo")
        return [[network, mapped] if command == "ADD" else [mapped, network], [loopback]]

    def _step(
        self,
        command: Command,
        member: Member,
        path: Path,
        config: Json,
        ifname: str = "eth0",
        after: int = -1,
        netns: str | None = None,
    ) -> Step:
        """A start of a plugin with prevResult: on ADD that of the step `after`, on DEL the cached one."""
        environment = {
            **ENVIRONMENT,
            **self.plugins.environment,
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": member.netns,
            "CNI_NETNS": f"/run/netns/{member.netns}" if netns is None else netns,
            "CNI_IFNAME": ifname,
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={member.name}",
            "CNI_PATH": self.plugins.cni_path,
        }
        text = json.dumps(config)
        if command == "ADD" and after >= 0:
            return Step(str(path), environment, text[:-1] + ', "prevResult": ', after, "}")
        if command == "DEL" and member.result and ifname == "eth0":
            text = f'{text[:-1]}, "prevResult": {member.result}}}'
        return Step(str(path), environment, text)

    def delete_without_netns(self, members: Sequence[Member]) -> Outcomes:
        """DEL with an empty CNI_NETNS of the network plugin, as kubelet has it done once more.

        Without prevResult: libcni forgets the result with the first DEL that succeeds.
        """
        for member in members:
            member.result = ""
        steps = [
            self._step("DEL", member, self.plugins.network, self.plugins.config, netns="")
            for member in members
        ]
        self.runner.begin([[step] for step in steps])
        return self._finish()

    def scale(self, size: int) -> float:
        """Grow or shrink to `size` pods in one step; the milliseconds that its ADDs or DELs took.

        Raises LabError if one fails, or if a pod that is there then does not answer.
        """
        if size > len(self.members):
            took = wall_ms(self.add(self.create(size - len(self.members))))
        else:
            going = self.members[size:]
            took = wall_ms(self.delete(going))
            self.remove(going)
        if silent := self.unreachable():
            raise LabError(f"no answer with {size} pods: {', '.join(silent)}", self.node.log)
        return took

    def unreachable(self) -> list[str]:
        """Pods that do not answer a ping from the node, or one from the pod before them; each as a phrase."""
        present = [member for member in self.members if member.attached]
        node = self._ping_socket(self.node.netns)
        pairs = [(node, member.addresses[0]) for member in present]
        for before, member in zip([*present[-1:], *present[:-1]], present, strict=True):
            if before is not member:
                pairs.append((self._ping_socket(before.netns), member.addresses[0]))
        names = {ping: namespace for namespace, ping in self._pings.items()}
        return [f"{address} from {names[ping]}" for ping, address in unanswered(pairs)]

    def _files(self) -> Iterator[str]:
        """Names of all files that plugins made for pods: scratch files, reservations, what was cut short."""
        for folder in (self.node.directory / "cni-flannel", self.node.directory / "cni-networks" / "cbr0"):
            for path in folder.iterdir() if folder.exists() else ():
                if path.name != "lock" and not path.name.startswith("last_reserved_ip."):
                    yield path.name

    def _ping_socket(self, namespace: str) -> socket.socket:
        if namespace not in self._pings:
            self._pings[namespace] = ping_socket(namespace)
        return self._pings[namespace]

    def leftovers(self) -> list[str]:
        """What is left on the node of pods that are all gone: links, reservations, files, firewall."""
        node = self.node
        links = [link["ifname"] for link in node.lab.show(node.netns, "ip", "link")]
        found = [f"link {name}" for name in links if name not in OWN_LINKS]
        found += [f"reservation {address}" for address in node.reservations()]
        found += [f"file {path}" for path in sorted(self._files()) if path not in node.reservations()]
        found += [f"element {element}" for element in elements(node) - self._elements]
        ruleset = node.lab.run(node.netns, program("nft"), "list", "ruleset")
        words = set(_ADDRESS.findall(ruleset))
        return found + [f"rule with {address}" for address in sorted(self.seen & words)]


def batch(command: str, names: Collection[str]) -> None:
    """Carry out `ip <command> NAME` for each name, in one process."""
    script = "".join(f"{command} {name}\n" for name in names)
    subprocess.run([program("ip"), "-batch", "-"], input=script, text=True, check=True, timeout=COMMAND_S)


def elements(node: Node) -> set[str]:
    """All elements of all nf_tables sets and maps of the node's namespace, each as a line of text."""
    listing = json.loads(node.lab.run(node.netns, program("nft"), "-j", "list", "ruleset"))
    found: set[str] = set()
    for record in listing["nftables"]:
        for kind in record.keys() & {"set", "map"}:
            holder: dict[str, Any] = record[kind]
            name = f"{holder['family']} {holder['table']} {holder['name']}"
            found.update(f"{name}: {json.dumps(element)}" for element in holder.get("elem", ()))
    return found


def ping_socket(namespace: str) -> socket.socket:
    """A raw socket for ICMP echo in a namespace; nothing but echo replies arrives at it."""

    def inside() -> socket.socket:
        netns.enter(Path("/run/netns", namespace))
        made = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        made.setsockopt(SOL_RAW, ICMP_FILTER, struct.pack("=I", ~(1 << ECHO_REPLY) & 0xFFFFFFFF))
        made.setblocking(False)
        return made

    with ThreadPoolExecutor(1) as thread:  # it ends in there, and this thread stays where it is
        return thread.submit(inside).result()


def echo_request(identifier: int, sequence: int) -> bytes:
    """An ICMP echo request without data (RFC 792), with its checksum."""
    checksum = (ECHO_REQUEST << 8) + identifier + sequence
    checksum = (checksum & 0xFFFF) + (checksum >> 16)
    checksum = (checksum & 0xFFFF) + (checksum >> 16)
    return struct.pack("!BBHHH", ECHO_REQUEST, 0, ~checksum & 0xFFFF, identifier, sequence)


def unanswered(pairs: Collection[tuple[socket.socket, str]]) -> set[tuple[socket.socket, str]]:
    """Ping each address from its socket, all at once and again if need be; those that never answered."""
    waiting = set(pairs)
    identifier = threading.get_native_id() & 0xFFFF
    deadline, sequence = time.monotonic() + PING_S, 0
    while waiting and time.monotonic() < deadline:
        for sock, address in waiting:
            sock.sendto(echo_request(identifier, sequence & 0xFFFF), (address, 0))
        sequence += 1
        again = time.monotonic() + PING_AGAIN_S
        while waiting and (left := again - time.monotonic()) > 0:
            ready, _, _ = select.select({sock for sock, _ in waiting}, (), (), left)
            for sock in ready:
                packet, (address, _) = sock.recvfrom(2048)
                header = (packet[0] & 15) * 4
                if struct.unpack_from("!H", packet, header + 4) == (identifier,):
                    waiting.discard((sock, address))
    return waiting
