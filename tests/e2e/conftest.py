"""Labs with real daemons for the end-to-end tests.

outside ── switch (br0) ──┬── node1: eth0, flannel.1, cni0 ── pods
                          └── node2: eth0, flannel.1, cni0 ── pods
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.net import Lab
from tests.lab.node import FROZEN, Node, Store, etcd_store, sqlite_store

NETWORK = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}


class Cluster:
    """A lab whose nodes share one store; the daemons are started by the test."""

    def __init__(self, lab: Lab, store: Store) -> None:
        self.lab = lab
        self.store = store
        self.nodes = [Node(lab, name) for name in lab.nodes]

    def start(self, *nodes: Node) -> None:
        """Start these daemons (all of them by default) and wait until they know each other."""
        started = nodes or tuple(self.nodes)
        for node in started:
            node.start(FROZEN, self.store, "--iptables-resync=1")
        for node in started:
            node.wait_subnet()
        self.wait_meshed(*started)

    def wait_meshed(self, *nodes: Node) -> None:
        """Wait until each of these nodes has routes to all nodes that have a subnet."""
        subnets = {node.name: node.subnet for node in self.nodes if node.subnet_file.exists()}
        for node in nodes:
            node.wait_routes([subnet for name, subnet in subnets.items() if name != node.name])


@pytest.fixture
def lab_of(tmp_path: Path) -> Iterator[Callable[[int], Lab]]:
    """Make a lab with so many nodes; it is removed after the test."""
    labs: list[Lab] = []

    def make(nodes: int) -> Lab:
        lab = Lab(tmp_path / "lab")
        labs.append(lab)
        lab.create(nodes)
        return lab

    yield make
    for lab in labs:
        lab.destroy()


@pytest.fixture
def cluster_of(lab_of: Callable[[int], Lab]) -> Callable[..., Cluster]:
    """Make a cluster: number of nodes, and the kind of store."""

    def make(nodes: int, store: str = "sqlite", network: dict[str, object] | None = None) -> Cluster:
        lab = lab_of(nodes)
        kinds = {"sqlite": sqlite_store, "etcd": etcd_store}
        return Cluster(lab, kinds[store](lab, network or NETWORK))

    return make
