"""The forms in which a client can ask for objects: whole, metadata only, or as rows of a table.

A view turns stored items into the bytes of an answer. Whole objects are never parsed for that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from tests.kube.schema import NODE, decode, encode
from tests.kube.status import bad_request, not_acceptable
from tests.kube.store import Item

Json = dict[str, Any]

KINDS = {"nodes": "Node", "pods": "Pod"}
META = "meta.k8s.io/v1"


class View(Protocol):
    """One client's wish; a view of a watch is used by that watch alone."""

    def one(self, item: Item) -> bytes:
        """An object, without a newline at the end."""
        ...

    def listing(self, metadata: Json, items: Iterable[Item]) -> Iterator[bytes]:
        """A list, in pieces that end with a newline."""
        ...


class Whole:
    def __init__(self, resource: str) -> None:
        self._kind = KINDS[resource]
        self._head = f'{{"kind":"{self._kind}","apiVersion":"v1",'.encode()

    def one(self, item: Item) -> bytes:
        return self._head + item.data[1:]

    def listing(self, metadata: Json, items: Iterable[Item]) -> Iterator[bytes]:
        head = f'{{"kind":"{self._kind}List","apiVersion":"v1","metadata":'.encode()
        return _list(head, metadata, (item.data for item in items))


class Metadata:
    """PartialObjectMetadata."""

    def one(self, item: Item) -> bytes:
        return encode(partial(json.loads(item.data)))

    def listing(self, metadata: Json, items: Iterable[Item]) -> Iterator[bytes]:
        head = f'{{"kind":"PartialObjectMetadataList","apiVersion":"{META}","metadata":'.encode()
        return _list(head, metadata, map(self.one, items))


class Table:
    """`kubectl get`: the columns are named in the first answer of a watch only."""

    def __init__(self, resource: str, include: str) -> None:
        if include not in ("", "None", "Metadata", "Object"):
            raise bad_request(f'unrecognized includeObject value: "{include}"')
        self._resource = resource
        self._include = include or "Metadata"
        self._named = False

    def one(self, item: Item) -> bytes:
        version = str(item.version)
        return b"".join(self._pieces({"resourceVersion": version}, [item]))

    def listing(self, metadata: Json, items: Iterable[Item]) -> Iterator[bytes]:
        yield from self._pieces(metadata, items)
        yield b"\n"

    def _pieces(self, metadata: Json, items: Iterable[Item]) -> Iterator[bytes]:
        columns = [] if self._named else [_column(*each) for each in _COLUMNS[self._resource]]
        self._named = True
        yield (
            f'{{"kind":"Table","apiVersion":"{META}","metadata":'.encode()
            + encode(metadata)
            + b',"columnDefinitions":'
            + encode(columns)
            + b',"rows":['
        )
        yield b",".join(map(self._row, items))
        yield b"]}"

    def _row(self, item: Item) -> bytes:
        found = json.loads(item.data)
        shown: Json | None = None
        if self._include == "Object":
            shown = {"kind": KINDS[self._resource], "apiVersion": "v1", **found}
        elif self._include == "Metadata":
            shown = partial(found)
        cells = _node_cells(found) if self._resource == "nodes" else _pod_cells(found)
        return encode({"cells": cells, "object": shown})


def choose(resource: str, accept: str, query: Mapping[str, str], is_list: bool) -> View:
    """The first form in the Accept header that exists; raises ApiFailure (406)."""
    for clause in (accept or "*/*").split(","):
        media, *parameters = (part.strip() for part in clause.split(";"))
        if media not in ("application/json", "application/*", "*/*"):
            continue
        options = dict(part.split("=", 1) for part in parameters if "=" in part)
        wanted = options.get("as", "")
        if wanted and (options.get("g"), options.get("v")) != ("meta.k8s.io", "v1"):
            continue
        match wanted:
            case "":
                return Whole(resource)
            case "Table":
                return Table(resource, query.get("includeObject", ""))
            case "PartialObjectMetadataList" if is_list:
                return Metadata()
            case "PartialObjectMetadata" if not is_list:
                return Metadata()
    raise not_acceptable()


def bookmark(resource: str, version: int, initial_end: bool) -> Item:
    """The empty object that carries only a version."""
    metadata: Json = {"resourceVersion": str(version)}
    if initial_end:
        metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
    made = decode({"metadata": metadata}, NODE)
    if resource == "pods":
        made |= {"spec": {"containers": None}, "status": {}}
    return Item(version, encode(made))


def partial(found: Json) -> Json:
    return {"kind": "PartialObjectMetadata", "apiVersion": META, "metadata": found["metadata"]}


def _list(head: bytes, metadata: Json, items: Iterable[bytes]) -> Iterator[bytes]:
    """Join with commas, in pieces of about a megabyte."""
    piece = [head + encode(metadata) + b',"items":[']
    size, first = 0, True
    for data in items:
        if not first:
            piece.append(b",")
        first = False
        piece.append(data)
        size += len(data)
        if size > 1 << 20:
            yield b"".join(piece)
            piece, size = [], 0
    piece.append(b"]}\n")
    yield b"".join(piece)


_AGE = "CreationTimestamp is a timestamp representing the server time when this object was created."
_NAME = "Name must be unique within a namespace."
_ADDRESSES = "List of addresses reachable to the node."
_OS = "OS Image reported by the node from /etc/os-release (e.g. Debian GNU/Linux 7 (wheezy))."
_KERNEL = "Kernel Version reported by the node from 'uname -r' (e.g. 3.16.0-0.bpo.4-amd64)."
_RUNTIME = "ContainerRuntime Version reported by the node through runtime remote API."

_COLUMNS = {
    "nodes": (
        ("Name", "name", 0, _NAME),
        ("Status", "", 0, "The status of the node"),
        ("Roles", "", 0, "The roles of the node"),
        ("Age", "", 0, _AGE),
        ("Version", "", 0, "Kubelet Version reported by the node."),
        ("Internal-IP", "", 1, _ADDRESSES),
        ("External-IP", "", 1, _ADDRESSES),
        ("OS-Image", "", 1, _OS),
        ("Kernel-Version", "", 1, _KERNEL),
        ("Container-Runtime", "", 1, _RUNTIME),
    ),
    "pods": (
        ("Name", "name", 0, _NAME),
        ("Ready", "", 0, "The aggregate readiness state of this pod for accepting traffic."),
        ("Status", "", 0, "The aggregate status of the containers in this pod."),
        ("Restarts", "", 0, "The number of times the containers in this pod have been restarted."),
        ("Age", "", 0, _AGE),
    ),
}


def _column(name: str, form: str, priority: int, description: str) -> Json:
    return {"name": name, "type": "string", "format": form, "description": description, "priority": priority}


def _node_cells(found: Json) -> list[str]:
    status, info = found["status"], found["status"]["nodeInfo"]
    return [
        found["metadata"].get("name", ""),
        _node_state(found),
        _roles(found["metadata"].get("labels", {})),
        _age(found["metadata"]["creationTimestamp"]),
        info["kubeletVersion"],
        _address(status, "InternalIP"),
        _address(status, "ExternalIP"),
        info["osImage"] or "<unknown>",
        info["kernelVersion"] or "<unknown>",
        info["containerRuntimeVersion"] or "<unknown>",
    ]


def _pod_cells(found: Json) -> list[str]:
    containers = found["spec"].get("containers") or []
    statuses = found["status"].get("containerStatuses", [])
    ready = sum(bool(each.get("ready")) for each in statuses)
    restarts = sum(int(each.get("restartCount", 0)) for each in statuses)
    return [
        found["metadata"].get("name", ""),
        f"{ready}/{len(containers)}",
        found["status"].get("phase", ""),
        str(restarts),
        _age(found["metadata"]["creationTimestamp"]),
    ]


def _node_state(found: Json) -> str:
    ready = [each for each in found["status"].get("conditions", []) if each["type"] == "Ready"]
    words = ["Unknown"]
    if ready:
        words = ["Ready" if ready[0]["status"] == "True" else "NotReady"]
    if found["spec"].get("unschedulable"):
        words.append("SchedulingDisabled")
    return ",".join(words)


def _roles(labels: Mapping[str, str]) -> str:
    prefix = "node-role.kubernetes.io/"
    roles = {key.removeprefix(prefix) for key in labels if key.startswith(prefix)}
    roles |= {labels["kubernetes.io/role"]} if labels.get("kubernetes.io/role") else set()
    return ",".join(sorted(roles - {""})) or "<none>"


def _address(status: Json, kind: str) -> str:
    found = (each["address"] for each in status.get("addresses", []) if each["type"] == kind)
    return next(found, "<none>")


def _age(born: str | None) -> str:
    """As `duration.HumanDuration` of apimachinery."""
    if born is None:
        return "<unknown>"
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(born)).total_seconds())
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    steps = (
        (seconds < 0, "0s" if seconds > -2 else "<invalid>"),
        (seconds < 120, f"{seconds}s"),
        (minutes < 10, f"{minutes}m{seconds % 60}s" if seconds % 60 else f"{minutes}m"),
        (minutes < 180, f"{minutes}m"),
        (hours < 8, f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"),
        (hours < 48, f"{hours}h"),
        (hours < 192, f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"),
        (days < 730, f"{days}d"),
        (True, f"{days // 365}y{days % 365}d" if days < 2920 and days % 365 else f"{days // 365}y"),
    )
    return next(text for holds, text in steps if holds)
