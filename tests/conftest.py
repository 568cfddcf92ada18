"""Labs with real daemons for end-to-end tests and benchmarks.

outside ── switch (br0) ──┬── node1: eth0, flannel.1, cni0 ── pods
                          └── node2: eth0, flannel.1, cni0 ── pods
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.cluster import NETWORK, Cluster
from tests.lab.net import Lab
from tests.lab.node import etcd_store, sqlite_store


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
