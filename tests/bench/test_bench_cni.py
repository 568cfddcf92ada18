"""How long ADD and DEL of the frozen plugin take, beside the Go chain bridge -> host-local in the same run.

No Go flannel is to be had from Debian, so the peer is what flannel would run: `bridge` with the configuration
that flannel makes. Both are executed the same way, in turns, on one node with one pod namespace each.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from ipaddress import IPv4Network

from tests.lab.net import ENVIRONMENT, Lab, program
from tests.lab.node import CNI_BIN, UPSTREAM_CNI_BIN, Node

ROUNDS = 30


class Chain:
    """One way to attach a pod: an executable, its configuration, and the pod."""

    def __init__(self, node: Node, name: str, plugin: str, config: dict[str, object]) -> None:
        self.node, self.name, self.plugin = node, name, plugin
        self.netns = node.lab.add_pod(name)
        self.stdin = json.dumps(config)
        self.took: dict[str, list[float]] = {"ADD": [], "DEL": []}

    def run(self, command: str) -> None:
        """Execute the plugin and note the milliseconds."""
        environment = {
            **ENVIRONMENT,
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.name,
            "CNI_NETNS": f"/run/netns/{self.netns}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": f"{CNI_BIN}:{UPSTREAM_CNI_BIN}",
        }
        argv = [program("ip"), "netns", "exec", self.node.netns, self.plugin]
        began = time.monotonic()
        done = subprocess.run(
            argv, input=self.stdin, env=environment, capture_output=True, text=True, check=False, timeout=30
        )
        self.took[command].append((time.monotonic() - began) * 1000)
        assert done.returncode == 0, f"{self.plugin} {command}: {done.stdout} {done.stderr}"

    def median(self, command: str) -> float:
        return statistics.median(self.took[command])


def test_add_and_del_beside_the_go_chain(lab_of: Callable[[int], Lab]) -> None:
    lab = lab_of(1)
    node = Node(lab, "node1")
    subnet = IPv4Network("10.244.5.0/24")
    node.subnet_file.write_text(
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.5.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )
    store = str(node.directory / "networks")
    base: dict[str, object] = {"name": "cbr0", "cniVersion": "1.0.0"}
    go: dict[str, object] = base | {
        "type": "bridge",
        "ipMasq": False,
        "isGateway": True,
        "mtu": 1450,
        "ipam": {
            "type": "host-local",
            "dataDir": store,
            "ranges": [[{"subnet": str(subnet)}]],
            "routes": [{"dst": "10.244.0.0/16"}],
        },
    }
    ours: dict[str, object] = base | {
        "type": "flannel",
        "subnetFile": str(node.subnet_file),
        "dataDir": str(node.directory / "flannel"),
        "ipam": {"dataDir": store},
    }
    chains = [
        Chain(node, "frozen-flannel", str(CNI_BIN / "flannel"), ours),
        Chain(node, "go-bridge", str(UPSTREAM_CNI_BIN / "bridge"), go),
    ]
    for _ in range(ROUNDS):
        for chain in chains:
            chain.run("ADD")
            chain.run("DEL")
    flannel, bridge = chains
    for command in ("ADD", "DEL"):
        mine, peer = flannel.median(command), bridge.median(command)
        print(
            f"\n{command}: frozen flannel -> bridge -> host-local {mine:.1f} ms, Go bridge -> host-local "
            f"{peer:.1f} ms, ratio {mine / peer:.2f} (medians of {ROUNDS}, `ip netns exec` included in both)"
        )
