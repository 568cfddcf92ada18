"""Nodes as kubelet, controller manager and flannel write them, made from a number.

Node `i` (from 0) of `fill` is called `peer-00000`, has the pod subnet 10.i.0/24 counted from
`first_subnet`, a public IP counted from `first_address` and a VTEP MAC made of `i`; everything is the
same in every run. Lean nodes have about 1.4 kB of JSON, fat ones about 15 kB.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from tests.kube.schema import NODE, decode, encode

Json = dict[str, Any]

PREFIX = "flannel.alpha.coreos.com/"
BORN = "2026-01-05T08:00:00Z"
HEARTBEAT = "2026-01-05T09:30:00Z"

_SPACE = uuid.UUID("5f7f6a3c-0d5e-4b0e-9f5a-6a1f0c1d2e3f")

FIRST_SUBNET = IPv4Network("10.0.0.0/24")
FIRST_ADDRESS = IPv4Address("172.16.0.1")


def vtep_mac(index: int) -> str:
    """A locally administered MAC for peer `index`."""
    return "0a:00:" + ":".join(f"{byte:02x}" for byte in index.to_bytes(4, "big"))


def flannel_annotations(
    public_ip: str, mac: str, backend: str = "vxlan", prefix: str = PREFIX, vni: int = 1
) -> dict[str, str]:
    """What flanneld writes on its node for vxlan over IPv4, byte for byte."""
    return {
        f"{prefix}backend-data": f'{{"VNI":{vni},"VtepMAC":"{mac}"}}',
        f"{prefix}backend-type": backend,
        f"{prefix}kube-subnet-manager": "true",
        f"{prefix}public-ip": public_ip,
    }


def node(
    name: str,
    pod_cidrs: Sequence[str] = (),
    annotations: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    address: str = "",
) -> Json:
    """A lean Ready node as a kubelet registers it; without `pod_cidrs` none was assigned yet."""
    well_known = {
        "beta.kubernetes.io/arch": "amd64",
        "beta.kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
    }
    addresses = [{"type": "InternalIP", "address": address}] if address else []
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {**well_known, **(labels or {})},
            "annotations": dict(annotations or {}),
        },
        "spec": {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)} if pod_cidrs else {},
        "status": {
            "capacity": {"cpu": "4", "memory": "16384000Ki", "pods": "110"},
            "allocatable": {"cpu": "4", "memory": "16281600Ki", "pods": "110"},
            "conditions": [_condition("Ready", "True", "KubeletReady", "kubelet is posting ready status")],
            "addresses": [*addresses, {"type": "Hostname", "address": name}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "nodeInfo": _node_info(name),
        },
    }


def pod(namespace: str, name: str, node_name: str = "") -> Json:
    """A pod of the flannel DaemonSet."""
    spec: Json = {"containers": [{"name": "kube-flannel", "image": "flannel"}], "hostNetwork": True}
    if node_name:
        spec["nodeName"] = node_name
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": {}}


def fat_node(
    name: str,
    pod_cidrs: Sequence[str] = (),
    annotations: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    address: str = "",
) -> Json:
    """A node of a cluster in use: all conditions, 46 images, managedFields of four writers."""
    made = node(name, pod_cidrs, {**_FAT_ANNOTATIONS, **(annotations or {})}, labels, address)
    status, metadata = made["status"], made["metadata"]
    metadata["labels"] |= _FAT_LABELS
    metadata["managedFields"] = _managed_fields(metadata, status)
    made["spec"]["providerID"] = f"aws:///eu-central-1a/i-{uuid.uuid5(_SPACE, name).hex[:17]}"
    status["capacity"] |= {"ephemeral-storage": "83873772Ki", "hugepages-1Gi": "0", "hugepages-2Mi": "0"}
    status["allocatable"] |= {"ephemeral-storage": "76224326324", "hugepages-1Gi": "0", "hugepages-2Mi": "0"}
    status["conditions"] = [
        _condition("NetworkUnavailable", "False", "FlannelIsUp", "Flannel is running on this node"),
        _condition("MemoryPressure", "False", "KubeletHasSufficientMemory",
                   "kubelet has sufficient memory available"),
        _condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        _condition("PIDPressure", "False", "KubeletHasSufficientPID",
                   "kubelet has sufficient PID available"),
        *status["conditions"],
    ]  # fmt: skip
    status["images"] = [_image(number) for number in range(46)]
    status["runtimeHandlers"] = [{"name": "", "features": {"recursiveReadOnlyMounts": True}}]
    return made


def peers(
    count: int,
    fat: bool = False,
    first: int = 0,
    annotated: bool = True,
    first_subnet: IPv4Network = FIRST_SUBNET,
    first_address: IPv4Address = FIRST_ADDRESS,
) -> Iterator[tuple[str, Callable[[int], bytes]]]:
    """Names of `count` nodes from number `first` on, and what gives their stored bytes for a version."""
    marks = ("@name@", "@uid@", "@version@", "@subnet@", "@address@", "@mac@", "@machine@")
    annotations = flannel_annotations("@address@", "@mac@") if annotated else {}
    made = (fat_node if fat else node)("@name@", ["@subnet@"], annotations, address="@address@")
    made["metadata"] |= {"uid": "@uid@", "resourceVersion": "@version@", "creationTimestamp": BORN}
    info = made["status"]["nodeInfo"]
    info |= {"machineID": "@machine@", "systemUUID": "@uid@", "bootID": "@uid@"}
    template = encode(decode(made, NODE)).decode()
    for index in range(first, first + count):
        subnet = (
            f"{first_subnet.network_address + index * first_subnet.num_addresses}/{first_subnet.prefixlen}"
        )
        uid = str(uuid.uuid5(_SPACE, str(index)))
        name = f"peer-{index:05d}"
        values = (
            name,
            uid,
            "@version@",
            subnet,
            str(first_address + index),
            vtep_mac(index),
            uid.replace("-", ""),
        )
        yield name, _filler(template, dict(zip(marks, values, strict=True)))


def _filler(template: str, values: dict[str, str]) -> Callable[[int], bytes]:
    def fill(version: int) -> bytes:
        text = template
        for mark, value in values.items():
            text = text.replace(mark, str(version) if mark == "@version@" else value)
        return text.encode()

    return fill


def _condition(kind: str, status: str, reason: str, message: str) -> Json:
    return {
        "type": kind,
        "status": status,
        "lastHeartbeatTime": HEARTBEAT,
        "lastTransitionTime": BORN,
        "reason": reason,
        "message": message,
    }


def _node_info(name: str) -> Json:
    uid = uuid.uuid5(_SPACE, name)
    return {
        "machineID": uid.hex,
        "systemUUID": str(uid),
        "bootID": str(uid),
        "kernelVersion": "6.1.0-28-amd64",
        "osImage": "Debian GNU/Linux 12 (bookworm)",
        "containerRuntimeVersion": "containerd://1.7.24",
        "kubeletVersion": "v1.33.2",
        "kubeProxyVersion": "v1.33.2",
        "operatingSystem": "linux",
        "architecture": "amd64",
    }


_FAT_LABELS = {
    "node.kubernetes.io/instance-type": "m6i.xlarge",
    "failure-domain.beta.kubernetes.io/region": "eu-central-1",
    "failure-domain.beta.kubernetes.io/zone": "eu-central-1a",
    "topology.kubernetes.io/region": "eu-central-1",
    "topology.kubernetes.io/zone": "eu-central-1a",
    "node-role.kubernetes.io/worker": "",
    "example.com/pool": "general-purpose",
    "example.com/owner": "platform-team",
}

_FAT_ANNOTATIONS = {
    "kubeadm.alpha.kubernetes.io/cri-socket": "unix:///var/run/containerd/containerd.sock",
    "node.alpha.kubernetes.io/ttl": "0",
    "volumes.kubernetes.io/controller-managed-attach-detach": "true",
    "csi.volume.kubernetes.io/nodeid": '{"ebs.csi.aws.com":"i-0f3a5c7e9b1d2f4a6"}',
}

_WORDS = ("ingress", "prometheus", "registry", "billing", "frontend", "search", "mailer", "cache")


def _image(number: int) -> Json:
    digest = uuid.uuid5(_SPACE, f"image {number}").hex * 2
    name = f"registry.example.com/platform/{_WORDS[number % len(_WORDS)]}-{number:02d}"
    return {
        "names": [f"{name}@sha256:{digest}", f"{name}:v1.{number}.{number % 7}"],
        "sizeBytes": 314_572_800 - number * 7_000_001,
    }


def _managed_fields(metadata: Json, status: Json) -> list[Json]:
    """Who set what, as server-side apply records it."""

    def names(keys: Iterable[str]) -> Json:
        return {f"f:{key}": {} for key in sorted(keys)}

    fields = {
        ".": {},
        **names(("lastHeartbeatTime", "lastTransitionTime", "message", "reason", "status", "type")),
    }
    kinds = ("DiskPressure", "MemoryPressure", "PIDPressure", "Ready")
    by_kubelet = {
        "f:allocatable": names(status["capacity"]),
        "f:capacity": names(status["capacity"]),
        "f:conditions": {f'k:{{"type":"{kind}"}}': fields for kind in kinds},
        "f:images": {},
        "f:nodeInfo": names(status["nodeInfo"]),
    }
    labels = {"f:annotations": {".": {}}, "f:labels": {".": {}, **names(metadata["labels"])}}
    ours = {
        "f:metadata": {"f:annotations": names(metadata["annotations"])},
        "f:status": {"f:conditions": {'k:{"type":"NetworkUnavailable"}': fields}},
    }
    writers: list[tuple[str, str, Json]] = [
        ("kube-controller-manager", "", {"f:spec": {"f:podCIDR": {}, "f:podCIDRs": {".": {}, "v:": {}}}}),
        ("kubelet", "", {"f:metadata": labels, "f:spec": {"f:providerID": {}}}),
        ("flanneld", "status", ours),
        ("kubelet", "status", {"f:status": by_kubelet}),
    ]
    return [
        {
            "manager": manager,
            "operation": "Update",
            "apiVersion": "v1",
            "time": BORN,
            "fieldsType": "FieldsV1",
            "fieldsV1": written,
            **({"subresource": subresource} if subresource else {}),
        }
        for manager, subresource, written in writers
    ]
