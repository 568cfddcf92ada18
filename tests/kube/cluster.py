"""The API double as the store of a lab's cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from itertools import islice

from tests.kube.control import Control, KubeServer
from tests.lab.net import Lab
from tests.lab.node import Store


def pod_cidrs(network: Mapping[str, object], number: int) -> list[str]:
    """What a controller-manager gives the node with this number: a /24 and a /64 of the networks."""
    cidrs = []
    if network.get("EnableIPv4", True):
        v4 = IPv4Network(str(network["Network"]))
        cidrs.append(str(next(islice(v4.subnets(new_prefix=24), number, None))))
    if network.get("EnableIPv6"):
        v6 = IPv6Network(str(network["IPv6Network"]))
        cidrs.append(str(next(islice(v6.subnets(new_prefix=64), number, None))))
    return cidrs


def kube_store(lab: Lab, network: Mapping[str, object]) -> Store:
    """Start the API double on the lab's switch, with a Node for each node of the lab."""
    server = KubeServer(lab.directory / "kube", lab).start()
    register(server.control, lab, network)
    return flags_of(lab, server, network)


def register(control: Control, lab: Lab, network: Mapping[str, object]) -> None:
    """Create the lab's nodes as their kubelets and the controller-manager would."""
    for number, (name, address) in enumerate(lab.nodes.items(), 1):
        control.add_node(name, *pod_cidrs(network, number), address=str(address))


def flags_of(lab: Lab, server: KubeServer, network: Mapping[str, object]) -> Store:
    """How daemons of the lab reach the server; `Node.start` sets NODE_NAME."""
    config = lab.directory / "net-conf.json"
    config.write_text(json.dumps(network))
    flags = (
        "--kube-subnet-mgr",
        f"--kubeconfig-file={server.kubeconfig}",
        f"--net-config-path={config}",
    )
    return Store(flags, server.url)


def control_of(lab: Lab) -> Control:
    """The control channel of the lab's API double."""
    return Control(lab.directory / "kube")
