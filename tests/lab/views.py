"""What the kernel of a node says, as rows and views to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.lab.net import LabError
from tests.lab.node import Node, Pod
from tests.lab.render import NodeView, PodView


def node_view(node: Node, pods: Sequence[Pod]) -> NodeView:
    """What the kernel of a node says about its VTEP and its pod bridge; raises LabError without a VTEP."""
    vteps = node.lab.show(node.netns, "ip", "-d", "link", "show", "type", "vxlan")
    if not vteps:
        raise LabError(f"{node.name} has no VXLAN device", node.log)
    vtep, bridge = vteps[0], "cni0"
    vxlan = vtep["linkinfo"]["info_data"]
    return NodeView(
        name=node.name,
        address=str(node.address),
        vtep=vtep["ifname"],
        vtep_address=_address(node, vtep["ifname"]).partition("/")[0],
        vtep_mac=vtep["address"],
        transport=f"VXLAN, UDP {vxlan['port']}, VNI {vxlan['id']}",
        bridge=bridge,
        gateway=_address(node, bridge),
        pods=tuple(
            PodView(pod.name, node.name, pod.endpoint.address, pod.endpoint.mac, pod.endpoint.host_veth)
            for pod in pods
        ),
    )


def _address(node: Node, link: str) -> str:
    """The first IPv4 address of a link with its prefix length, or a dash."""
    for record in node.lab.show(node.netns, "ip", "-4", "addr", "show", "dev", link):
        for address in record["addr_info"]:
            return f"{address['local']}/{address['prefixlen']}"
    return "-"


def kernel_tables(node: Node, vtep: str) -> dict[str, list[tuple[str, ...]]]:
    """Rows for routes, neighbours and FDB entries of a node, as its kernel holds them."""

    def cells(record: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
        values = (record.get(key, "-") for key in keys)
        return (node.name, *(" ".join(v) if isinstance(v, list) else str(v) for v in values))

    def show(tool: str, *words: str) -> list[dict[str, Any]]:
        return sorted(node.lab.show(node.netns, tool, *words), key=lambda record: str(record.get("dst")))

    return {
        "routes": [cells(r, "dst", "gateway", "dev", "flags") for r in show("ip", "route")],
        "neighbours": [
            cells({"dev": vtep, **r}, "dst", "lladdr", "dev", "state")
            for r in show("ip", "-4", "neigh", "show", "dev", vtep)
        ],
        "fdb": [
            cells({"ifname": vtep, **r}, "mac", "dst", "ifname", "state")
            for r in show("bridge", "fdb", "show", "dev", vtep)
            if "dst" in r
        ],
    }
