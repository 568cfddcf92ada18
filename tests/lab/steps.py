"""What the demo does and shows, step by step."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.lab import net, traffic
from tests.lab.net import Lab, LabError
from tests.lab.node import Node, Pod, Store, etcd_store, sqlite_store
from tests.lab.render import WIDTH, table, topology
from tests.lab.views import kernel_tables, node_view

NODES = 3
NETWORK_CONFIG = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}
POD_PORT = 8080
HOST_PORT = 18080
WORLD_PORT = 9000
TRANSFER_BYTES = 200_000_000

STORES: Mapping[str, Callable[[Lab, Mapping[str, object]], Store]] = {
    "sqlite": sqlite_store,
    "etcd": etcd_store,
}


class Screen:
    """Progress lines and headings on stdout; colours only for a terminal."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty()
        self._steps = 0

    def paint(self, text: str, code: int) -> str:
        """`text` with an SGR attribute, where there is a terminal."""
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print `title`, and the milliseconds the block took behind it."""
        self._steps += 1
        print(f"{self._steps:2}  {title}".ljust(WIDTH - 11), end="", flush=True)
        begin = time.monotonic()
        try:
            yield
        except BaseException:
            print(self.paint("failed".rjust(11), 31))
            raise
        print(self.paint(f"{(time.monotonic() - begin) * 1000:8.0f} ms", 32), flush=True)

    def details(self, lines: Sequence[str]) -> None:
        """Print what a step has found, indented and folded."""
        for line in lines:
            print(textwrap.fill(line, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 6))

    def section(self, heading: str, text: str) -> None:
        """Print a table or a drawing under its heading."""
        print(f"\n{self.paint(heading, 1)}\n{text}", flush=True)


class Demo:
    """The steps, in order. Each returns the lines that tell what it found, or raises LabError."""

    def __init__(
        self, lab: Lab, screen: Screen, *, store: str, daemon: Sequence[str], cni_path: Sequence[Path]
    ) -> None:
        self.lab = lab
        self.screen = screen
        self.store_name = store
        self.daemon = daemon
        self.cni_path = cni_path
        self.nodes: list[Node] = []
        self.pods: list[Pod] = []
        self.store = Store((), "")

    def run(self) -> None:
        """Build everything, send traffic through it, and check what arrives."""
        steps: Sequence[tuple[str, Callable[[], list[str]]]] = (
            (f"Build the lab: {NODES} nodes, a switch, an outside host, as network namespaces", self.build),
            (f"Set up the store ({self.store_name}): it remembers who owns which subnet", self.open_store),
            ("Start flanneld on each node: it leases a pod subnet and writes subnet.env", self.start_daemons),
            ("Wait for the overlay: a route on each node to each other node's subnet", self.wait_overlay),
            ("Add two pods per node through the CNI plugins, as a container runtime does", self.add_pods),
            ("Ping from every pod to every other: the network is flat", self.ping),
            ("Capture a ping between nodes on eth0: pods' packets travel in VXLAN", self.capture),
            ("Send a TCP stream from pod to pod across nodes", self.transfer),
            ("Connect to the outside and to pods: only what leaves is masqueraded", self.masquerade),
            ("Connect from outside to a pod through its node's host port", self.host_port),
        )
        for title, action in steps:
            self._step(title, action)

    def release(self) -> None:
        """The last step: every pod leaves its network."""
        print()
        self._step("Delete the pods through the CNI plugins: nothing of theirs stays", self.delete_pods)

    def _step(self, title: str, action: Callable[[], list[str]]) -> None:
        with self.screen.step(title):
            found = action()
        self.screen.details(found)

    def build(self) -> list[str]:
        """Namespaces and links."""
        self.lab.create(NODES)
        self.nodes = [Node(self.lab, name) for name in self.lab.nodes]
        nodes = ", ".join(f"{node.name} {node.address}" for node in self.nodes)
        return [f"namespaces {self.lab.prefix}*: {nodes}, outside {net.OUTSIDE} and {net.WORLD}"]

    def open_store(self) -> list[str]:
        """The store, with the network configuration in it."""
        self.store = STORES[self.store_name](self.lab, NETWORK_CONFIG)
        return [f"{self.store.place}, network {NETWORK_CONFIG['Network']}"]

    def start_daemons(self) -> list[str]:
        """All daemons at once; every subnet must be another one."""
        for node in self.nodes:
            node.start(self.daemon, self.store)
        subnets = [node.wait_subnet() for node in self.nodes]
        if len(set(subnets)) < len(subnets):
            raise LabError(f"two nodes lease the same subnet: {', '.join(map(str, subnets))}", *self.logs())
        return [", ".join(f"{node.name} {node.subnet}" for node in self.nodes)]

    def wait_overlay(self) -> list[str]:
        """Every node can reach every other's pods."""
        for node in self.nodes:
            node.wait_routes(peer.subnet for peer in self.nodes if peer is not node)
        mtu = self.nodes[0].environment["FLANNEL_MTU"]
        return [f"MTU for pods {mtu}: {net.MTU_BYTES} of the underlay, less the headers of VXLAN"]

    def add_pods(self) -> list[str]:
        """Nodes work at the same time, one pod after the other on each, so that addresses are predictable."""
        mapping = {"hostPort": HOST_PORT, "containerPort": POD_PORT, "protocol": "tcp"}
        took: list[float] = []

        def add(node: Node) -> list[Pod]:
            pods = []
            for letter, ports in (("a", [mapping]), ("b", [])):
                begin = time.monotonic()
                name = node.name.replace("node", "pod") + letter
                pods.append(node.add_pod(name, self.cni_path, *ports))
                took.append(time.monotonic() - begin)
            return pods

        with ThreadPoolExecutor(NODES) as workers:
            self.pods = [pod for pods in workers.map(add, self.nodes) for pod in pods]
        self._start_servers()
        fastest, slowest = min(took) * 1000, max(took) * 1000
        return [f"{len(self.pods)} ADDs, one ADD {fastest:.0f} to {slowest:.0f} ms"]

    def _start_servers(self) -> None:
        servers = [traffic.answering(self.lab, pod.netns, POD_PORT, pod.name) for pod in self.pods]
        servers.append(traffic.answering(self.lab, self.lab.outside, WORLD_PORT, "outside"))
        for server in servers:
            server.wait_text("listening")

    def ping(self) -> list[str]:
        """All ordered pairs of pods."""
        trips = traffic.ping_all(self.lab, self.pods)
        return [f"{trips.pairs} of {trips.pairs} pairs, min {trips.min_ms:.3f} ms, avg {trips.avg_ms:.3f} ms"]

    def capture(self) -> list[str]:
        """The first VXLAN packet of a ping from node1's pod to node2's, taken on node2."""
        source, target = self.pods[0], self.pods[2]
        lines = traffic.capture(
            self.lab,
            target.node.netns,
            f"udp port 8472 and src host {source.node.address}",
            lambda: traffic.ping(self.lab, source.netns, target.endpoint.address),
        )
        ends = (str(source.node.address), str(target.node.address))
        inner = f"{source.endpoint.address} > {target.endpoint.address}"
        if not lines or not all(end in lines[0] for end in ends) or inner not in lines[-1]:
            raise LabError(f"expected a packet {inner} inside one {' > '.join(ends)}, captured {lines}")
        return lines

    def transfer(self) -> list[str]:
        """One stream from node1 to the last node."""
        source, target = self.pods[1], self.pods[-1]
        done = traffic.transfer(self.lab, source, target, TRANSFER_BYTES)
        return [
            f"{source.name} on {source.node.name} to {target.name} on {target.node.name}: "
            f"{done.size_bytes / 1e6:.0f} MB in {done.seconds:.2f} s, {done.mbit_per_s:.0f} Mbit/s"
        ]

    def masquerade(self) -> list[str]:
        """The outside sees nodes, pods see pods."""
        lines = []
        for pod in self.pods[::2]:
            seen = traffic.ask(self.lab, pod.netns, str(net.WORLD), WORLD_PORT).peer
            if seen != str(pod.node.address):
                raise LabError(
                    f"{net.WORLD} sees {pod.name} as {seen}, not as its node {pod.node.address}", pod.node.log
                )
            lines.append(f"{net.WORLD} sees {pod.name} ({pod.endpoint.address}) as {seen}, its node")
        source = self.pods[0]
        for target in (self.pods[1], self.pods[-1]):
            seen = traffic.ask(self.lab, source.netns, target.endpoint.address, POD_PORT).peer
            if seen != source.endpoint.address:
                raise LabError(
                    f"{target.name} sees {source.name} as {seen}, not as {source.endpoint.address}",
                    source.node.log,
                    target.node.log,
                )
            lines.append(f"{target.name} on {target.node.name} sees {source.name} as {seen}, itself")
        return lines

    def host_port(self) -> list[str]:
        """The outside reaches a pod at its node's address."""
        pod = self.pods[0]
        answer = traffic.ask(self.lab, self.lab.outside, str(pod.node.address), HOST_PORT)
        if answer.name != pod.name:
            raise LabError(f"{pod.node.address}:{HOST_PORT} is answered by {answer.name}, not by {pod.name}")
        return [f"{pod.node.address}:{HOST_PORT} is answered by {answer.name}, which sees {answer.peer}"]

    def delete_pods(self) -> list[str]:
        """DEL for every pod; no veth and no reservation may be left."""

        def delete(node: Node) -> None:
            mine = [pod for pod in self.pods if pod.node is node]
            for pod in mine:
                node.runtime(self.cni_path).delete(pod.attachment)
            links = {link["ifname"] for link in self.lab.show(node.netns, "ip", "link")}
            left = sorted(links & {pod.endpoint.host_veth for pod in mine}) + node.reservations()
            if left:
                raise LabError(f"DEL on {node.name} has left {', '.join(left)}")

        with ThreadPoolExecutor(NODES) as workers:
            list(workers.map(delete, self.nodes))
        return [f"{len(self.pods)} DELs; no veth and no reserved address is left on any node"]

    def show(self) -> None:
        """Print the tables and the drawing, from what the nodes' kernels hold now."""
        views = [node_view(node, [pod for pod in self.pods if pod.node is node]) for node in self.nodes]
        leases = [
            (node.name, node.subnet, node.address, view.vtep_address, view.vtep_mac)
            for node, view in zip(self.nodes, views, strict=True)
        ]
        pods = [
            (pod.name, pod.node, pod.address, pod.mac, pod.host_veth) for view in views for pod in view.pods
        ]
        self.screen.section("Leases", table(("node", "subnet", "public IP", "VTEP", "VTEP MAC"), leases))
        self.screen.section("Pods", table(("pod", "node", "address", "MAC", "host veth"), pods))
        tables = [kernel_tables(node, view.vtep) for node, view in zip(self.nodes, views, strict=True)]
        for heading, columns, kind in (
            ("Routes", ("node", "destination", "via", "device", "flags"), "routes"),
            ("Neighbours", ("node", "address", "MAC", "device", "state"), "neighbours"),
            ("FDB entries", ("node", "MAC", "destination", "device", "state"), "fdb"),
        ):
            rows = [row for kernel in tables for row in kernel[kind]]
            self.screen.section(heading, table(columns, rows))
        underlay = f"underlay {net.SWITCH.network}"
        self.screen.section("Topology", topology([str(net.OUTSIDE), str(net.WORLD)], underlay, views))

    def logs(self) -> list[Path]:
        """The logs of all daemons, for a failure that may be anybody's."""
        return [node.log for node in self.nodes if node.log.exists()]
