"""A lab whose nodes share one store."""

from __future__ import annotations

from collections.abc import Sequence

from tests.lab.net import Lab
from tests.lab.node import FROZEN, Node, Store

NETWORK = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}


class Cluster:
    """A lab whose nodes share one store; the daemons, run by `command`, are started by the test."""

    def __init__(self, lab: Lab, store: Store, command: Sequence[str] = FROZEN) -> None:
        self.lab = lab
        self.store = store
        self.command = command
        self.nodes = [Node(lab, name) for name in lab.nodes]

    def start(self, *nodes: Node) -> None:
        """Start these daemons (all of them by default) and wait until they know each other."""
        started = nodes or tuple(self.nodes)
        for node in started:
            node.start(self.command, self.store, "--iptables-resync=1")
        for node in started:
            node.wait_written()
        self.wait_meshed(*started)

    def wait_meshed(self, *nodes: Node) -> None:
        """Wait until each of these nodes has routes to all nodes that have a subnet, in its own families."""
        subnets = {node.name: node.subnets for node in self.nodes if node.subnet_file.exists()}
        for node in nodes:
            versions = {subnet.version for subnet in subnets[node.name]}
            others = (subnet for name, both in subnets.items() if name != node.name for subnet in both)
            node.wait_routes([subnet for subnet in others if subnet.version in versions])
