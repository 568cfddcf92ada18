"""Strategic merge patch, merge patch (RFC 7396) and JSON patch (RFC 6902) on decoded JSON.

Strategic merge after `k8s.io/apimachinery/pkg/util/strategicpatch`, with its visible habits: an element
that a patch adds to a keyed list comes before those that only the server has, so the condition that
flannel adds is the first of a node.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from tests.kube.schema import FREE, ListOf, MapOf, Struct, Type

Json = dict[str, Any]

DIRECTIVE = "$patch"
ORDER = "$setElementOrder/"
DELETE_PRIMITIVE = "$deleteFromPrimitiveList/"
RETAIN = "$retainKeys"


class BadPatch(ValueError):
    """The patch cannot be applied; `code` is the HTTP status it gets."""

    def __init__(self, message: str, code: int = 400) -> None:
        super().__init__(message)
        self.code = code


def strategic(original: Json, patch: Json, shape: Type) -> Json:
    """`original` with `patch` merged in; neither is changed. Raises BadPatch."""
    return _merge_map(copy.deepcopy(original), copy.deepcopy(patch), shape)


def _field(shape: Type, name: str) -> Type:
    match shape:
        case Struct(fields):
            return fields.get(name, FREE)
        case MapOf(of):
            return of
        case _:
            return FREE


def _merge_map(original: Json, patch: Json, shape: Type) -> Json:
    if DIRECTIVE in patch:
        match patch.pop(DIRECTIVE):
            case "replace":
                return patch
            case "delete":
                return {}
            case other:
                raise BadPatch(f"unknown patch type found: {other} in map {patch}", 500)
    _retain_keys(original, patch)
    orders = {name.removeprefix(ORDER): patch.pop(name) for name in list(patch) if name.startswith(ORDER)}
    before = {name: original[name] for name in orders if isinstance(original.get(name), list)}
    for name, value in patch.items():
        _merge_field(original, name, value, shape)
    for name, order in orders.items():
        _set_order(original, name, order, before.get(name, []), shape)
    return original


def _retain_keys(original: Json, patch: Json) -> None:
    retained = patch.pop(RETAIN, None)
    if retained is None:
        return
    if not isinstance(retained, list):
        raise BadPatch("invalid patch format of retainKeys")
    for name in list(original):
        if name not in retained:
            del original[name]


def _merge_field(original: Json, name: str, value: Any, shape: Type) -> None:
    if value is None:
        original.pop(name, None)
        return
    if name.startswith(DELETE_PRIMITIVE):
        target = name.removeprefix(DELETE_PRIMITIVE)
        if not isinstance(value, list):
            raise BadPatch("invalid patch format of primitive list")
        if isinstance(original.get(target), list):
            original[target] = [each for each in original[target] if each not in value]
        return
    inner = _field(shape, name)
    present = original.get(name)
    if isinstance(value, dict):
        original[name] = _merge_map(present if isinstance(present, dict) else {}, value, inner)
    elif isinstance(value, list) and isinstance(inner, ListOf):
        original[name] = _merge_list(present if isinstance(present, list) else [], value, inner)
    else:
        original[name] = value


def _merge_list(original: list[Any], patch: list[Any], shape: ListOf) -> list[Any]:
    if shape.merge_set:
        if not all(isinstance(each, str) for each in patch):
            raise BadPatch(f"list element types are not identical: {[original, patch]}", 500)
        merged = list(dict.fromkeys([*original, *patch]))
        return _in_order(merged, patch, original, lambda each: each)
    if not shape.merge_key:
        return patch
    return _merge_keyed(original, patch, shape)


def _merge_keyed(original: list[Any], patch: list[Any], shape: ListOf) -> list[Any]:
    key = shape.merge_key
    plain: list[Json] = []
    replaced = False
    for each in patch:
        if not isinstance(each, dict):
            raise BadPatch(f"expected a map in a list merged by {key}, got {each!r}", 500)
        directive = each.get(DIRECTIVE)
        if not isinstance(each.get(key), str) and directive != "replace":
            raise BadPatch(f"map: {each} does not contain declared merge key: {key}", 500)
        match directive:
            case None:
                plain.append(each)
            case "delete":
                original = [one for one in original if one.get(key) != each[key]]
            case "replace":
                replaced = True
            case other:
                raise BadPatch(f"unknown patch type found: {other} in list {patch}", 500)
    if replaced:
        return plain
    merged = list(original)
    for each in plain:
        at = next((i for i, one in enumerate(merged) if one.get(key) == each[key]), None)
        if at is None:
            merged.append(_merge_map({}, each, shape.of))
        else:
            merged[at] = _merge_map(dict(merged[at]), each, shape.of)
    return _in_order(merged, plain, original, lambda one: one.get(key))


def _set_order(original: Json, name: str, order: Any, before: list[Any], shape: Type) -> None:
    inner = _field(shape, name)
    live = original.get(name)
    key = inner.merge_key if isinstance(inner, ListOf) else ""
    if not isinstance(order, list) or not all(_is_element(one, key) for one in order):
        raise BadPatch("invalid patch format of setElementOrder list")
    if not isinstance(live, list) or not isinstance(inner, ListOf):
        return
    identity: Callable[[Any], Any] = (lambda one: one.get(key)) if key else (lambda one: one)
    original[name] = _in_order(live, order, before, identity)


def _is_element(one: Any, key: str) -> bool:
    return (
        isinstance(one.get(key), str) if key and isinstance(one, dict) else isinstance(one, str) and not key
    )


def _in_order(
    merged: list[Any], wanted: Sequence[Any], server: Sequence[Any], identity: Callable[[Any], Any]
) -> list[Any]:
    """`merged` in the order of `wanted`, with the elements that only the server has woven in.

    One of those goes first only if the server has it in front of the next wanted one.
    """
    rank = {identity(one): index for index, one in enumerate(wanted)}
    place = {identity(one): index for index, one in enumerate(server)}
    patched = sorted((one for one in merged if identity(one) in rank), key=lambda one: rank[identity(one)])
    only_server = [one for one in merged if identity(one) not in rank]
    only_server.sort(key=lambda one: place.get(identity(one), len(place)))
    result: list[Any] = []
    while only_server and patched:
        left, right = place.get(identity(only_server[0])), place.get(identity(patched[0]))
        first_is_left = left is not None and right is not None and left < right
        result.append((only_server if first_is_left else patched).pop(0))
    return result + only_server + patched


def merge(original: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    target = dict(original) if isinstance(original, dict) else {}
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        else:
            target[name] = merge(target.get(name), value)
    return target


def json_patch(original: Json, operations: Any) -> Json:
    """RFC 6902; raises BadPatch, with code 422 for an operation that does not apply."""
    if not isinstance(operations, list):
        raise BadPatch(
            "error decoding patch: json: cannot unmarshal object into Go value of type []jsonPatchOp"
        )
    document: Any = copy.deepcopy(original)
    for operation in operations:
        document = _operate(document, operation)
    if not isinstance(document, dict):
        raise BadPatch("the result of the JSON patch is not an object", 422)
    return document


def _operate(document: Any, operation: Any) -> Any:
    try:
        path, kind = _pointer(operation["path"]), operation["op"]
        match kind:
            case "add" | "replace":
                return _put(document, path, operation["value"], replace=kind == "replace")
            case "remove":
                return _take(document, path)[0]
            case "move":
                document, value = _take(document, _pointer(operation["from"]))
                return _put(document, path, value)
            case "copy":
                return _put(document, path, copy.deepcopy(_look(document, _pointer(operation["from"]))))
            case "test":
                if _look(document, path) != operation["value"]:
                    raise BadPatch(f"testing value {operation['path']} failed: test failed", 422)
                return document
            case other:
                raise BadPatch(f"Unexpected kind: {other}", 422)
    except (KeyError, IndexError, TypeError, AttributeError) as exc:
        raise BadPatch(
            f"the server rejected our request due to an error in our request: {exc!r} in {operation!r}", 422
        ) from exc


def _pointer(text: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _look(document: Any, path: list[str]) -> Any:
    for part in path:
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def _put(document: Any, path: list[str], value: Any, replace: bool = False) -> Any:
    if not path:
        return value
    parent, last = _look(document, path[:-1]), path[-1]
    if replace:
        _look(parent, [last])
    if not isinstance(parent, list):
        parent[last] = value
    elif replace:
        parent[int(last)] = value
    else:
        parent.insert(len(parent) if last == "-" else int(last), value)
    return document


def _take(document: Any, path: list[str]) -> tuple[Any, Any]:
    parent, last = _look(document, path[:-1]), path[-1]
    return document, parent.pop(int(last) if isinstance(parent, list) else last)
