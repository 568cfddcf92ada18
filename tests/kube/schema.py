"""The shapes of `Node` and `Pod`: field order, types, what is never left out, and how lists merge.

An object that a client sends passes `decode`, which drops unknown fields, refuses wrong types and
puts the rest into the order in which kube-apiserver writes it. After `k8s.io/api/core/v1`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast


class WrongType(ValueError):
    """A value does not fit its field; the message names the Go types."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A leaf. A `nullable` one without a value is written as null (a time), any other as its zero."""

    go: str
    types: tuple[type, ...]
    zero: Any = None


@dataclass(frozen=True, slots=True)
class Free:
    """Anything: kept as it is, maps merge, lists are replaced."""


@dataclass(frozen=True, slots=True)
class MapOf:
    of: Type


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list; `merge_key` (or `merge_set`, for scalars) lets a strategic patch merge it."""

    of: Type
    merge_key: str = ""
    merge_set: bool = False


@dataclass(frozen=True, slots=True)
class Struct:
    """Fields in Go's order; those in `always` are written even when empty."""

    fields: Mapping[str, Type]
    always: frozenset[str] = field(default_factory=frozenset)


Type = Scalar | Free | MapOf | ListOf | Struct

STRING = Scalar("string", (str,), "")
INT = Scalar("int64", (int,), 0)
BOOL = Scalar("bool", (bool,), False)
TIME = Scalar("time.Time", (str,))
QUANTITY = Scalar("resource.Quantity", (str, int, float))
FREE = Free()


def _struct(always: str = "", **fields: Type) -> Struct:
    return Struct(fields, frozenset(always.split()))


def _strings(names: str, always: bool = False) -> Struct:
    return Struct(dict.fromkeys(names.split(), STRING), frozenset(names.split() if always else ()))


METADATA = _struct(
    "creationTimestamp",
    name=STRING,
    generateName=STRING,
    namespace=STRING,
    selfLink=STRING,
    uid=STRING,
    resourceVersion=STRING,
    generation=INT,
    creationTimestamp=TIME,
    deletionTimestamp=TIME,
    deletionGracePeriodSeconds=INT,
    labels=MapOf(STRING),
    annotations=MapOf(STRING),
    ownerReferences=ListOf(
        _struct(
            "apiVersion kind name uid",
            apiVersion=STRING,
            kind=STRING,
            name=STRING,
            uid=STRING,
            controller=BOOL,
            blockOwnerDeletion=BOOL,
        ),
        merge_key="uid",
    ),
    finalizers=ListOf(STRING, merge_set=True),
    managedFields=ListOf(FREE),
)

_TAINT = _struct("key effect", key=STRING, value=STRING, effect=STRING, timeAdded=TIME)

NODE_SPEC = _struct(
    podCIDR=STRING,
    podCIDRs=ListOf(STRING, merge_set=True),
    providerID=STRING,
    unschedulable=BOOL,
    taints=ListOf(_TAINT),  # atomic: the merge key on Taint.Key is a mistake of the Go types, without effect
    configSource=FREE,
    externalID=STRING,
)

_CONDITION = _struct(
    "type status lastHeartbeatTime lastTransitionTime",
    type=STRING,
    status=STRING,
    lastHeartbeatTime=TIME,
    lastTransitionTime=TIME,
    reason=STRING,
    message=STRING,
)

NODE_STATUS = _struct(
    "daemonEndpoints nodeInfo",
    capacity=MapOf(QUANTITY),
    allocatable=MapOf(QUANTITY),
    phase=STRING,
    conditions=ListOf(_CONDITION, merge_key="type"),
    addresses=ListOf(_strings("type address", always=True), merge_key="type"),
    daemonEndpoints=_struct("kubeletEndpoint", kubeletEndpoint=_struct("Port", Port=INT)),
    nodeInfo=_strings(
        "machineID systemUUID bootID kernelVersion osImage containerRuntimeVersion kubeletVersion"
        " kubeProxyVersion operatingSystem architecture",
        always=True,
    ),
    images=ListOf(_struct(names=ListOf(STRING), sizeBytes=INT)),
    volumesInUse=ListOf(STRING),
    volumesAttached=ListOf(_strings("name devicePath", always=True)),
    config=FREE,
    runtimeHandlers=ListOf(FREE),
    features=FREE,
)

NODE = _struct("metadata spec status", metadata=METADATA, spec=NODE_SPEC, status=NODE_STATUS)
POD = _struct("metadata spec status", metadata=METADATA, spec=FREE, status=FREE)


def decode(value: object, shape: Type, path: str = "") -> Any:
    """`value` as the server would hold it; raises WrongType at the first field of another type."""
    match shape:
        case Free():
            return value
        case Scalar():
            return _scalar(value, shape, path)
        case MapOf(of):
            entries = _dict(value, path)
            return {key: decode(entries[key], of, f"{path}.{key}") for key in sorted(entries)}
        case ListOf(of):
            if not isinstance(value, list):
                raise WrongType(f"{path}: cannot restore slice from {_go_name(value)}")
            return [decode(each, of, f"{path}[{index}]") for index, each in enumerate(value)]
        case Struct():
            return _decode_struct(_dict(value, path), shape, path)


def _decode_struct(value: dict[str, Any], shape: Struct, path: str) -> dict[str, Any]:
    decoded: dict[str, Any] = {}
    for name, inner in shape.fields.items():
        given = value.get(name)
        kept = name in shape.always
        if given is None:
            if kept:
                decoded[name] = zero(inner)
            continue
        found = decode(given, inner, f"{path}.{name}" if path else name)
        if kept or found not in ("", 0, False, [], {}):
            decoded[name] = found
    return decoded


def zero(shape: Type) -> Any:
    """What an unset field that is never left out looks like."""
    match shape:
        case Scalar():
            return shape.zero
        case Struct():
            return _decode_struct({}, shape, "")
        case _:
            return {}


def _scalar(value: object, shape: Scalar, path: str) -> Any:
    if value is None:
        return shape.zero
    wrong_bool = isinstance(value, bool) and bool not in shape.types
    if wrong_bool or not isinstance(value, shape.types):
        raise WrongType(f"{path}: cannot convert {_go_name(value)} to {shape.go}")
    if shape is QUANTITY:
        return str(value)
    return value


def _dict(value: object, path: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise WrongType(f"{path or 'object'}: cannot restore struct from: {_go_name(value)}")
    return cast(dict[str, Any], value)


def _go_name(value: object) -> str:
    names = {bool: "bool", int: "int64", float: "float64", str: "string", list: "slice", dict: "map"}
    return names.get(type(value), "nil")


_ESCAPES = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def encode(value: object) -> bytes:
    """Compact JSON with the escapes of Go's encoder."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).translate(_ESCAPES).encode()
