"""Labs with real daemons for end-to-end tests and benchmarks.

outside ── switch (br0) ──┬── node1: eth0, flannel.1, cni0 ── pods
                          └── node2: eth0, flannel.1, cni0 ── pods
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.kube.cluster import kube_store
from tests.lab.cluster import NETWORK, Cluster
from tests.lab.net import IPV4, Lab
from tests.lab.node import FROZEN, etcd_store, sqlite_store


@pytest.fixture
def lab_of(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """Make a lab: number of nodes, address families of the underlay. It is removed after the test."""
    labs: list[Lab] = []

    def make(nodes: int, families: Sequence[int] = IPV4) -> Lab:
        lab = Lab(tmp_path / "lab")
        labs.append(lab)
        lab.create(nodes, families)
        return lab

    yield make
    for lab in labs:
        lab.destroy()


@pytest.fixture
def cluster_of(lab_of: Callable[..., Lab]) -> Callable[..., Cluster]:
    """Make a cluster: number of nodes, kind of store, network, families of the underlay, the daemon."""

    def make(
        nodes: int,
        store: str = "sqlite",
        network: dict[str, object] | None = None,
        families: Sequence[int] = IPV4,
        command: Sequence[str] = FROZEN,
    ) -> Cluster:
        lab = lab_of(nodes, families)
        kinds = {"sqlite": sqlite_store, "etcd": etcd_store, "kube": kube_store}
        return Cluster(lab, kinds[store](lab, network or NETWORK), command)

    return make
