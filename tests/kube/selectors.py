"""labelSelector and fieldSelector as predicates over an object's JSON."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.kube.status import bad_request

Json = dict[str, Any]
Predicate = Callable[[Json], bool]

_SET = re.compile(r"^\s*(\S+)\s+(in|notin)\s*\(([^)]*)\)\s*$")
_TERMS = re.compile(r",(?![^(]*\))")

_FIELDS: dict[str, dict[str, Callable[[Json], str]]] = {
    "nodes": {
        "metadata.name": lambda one: str(one["metadata"]["name"]),
        "spec.unschedulable": lambda one: str(bool(one["spec"].get("unschedulable"))).lower(),
    },
    "pods": {
        "metadata.name": lambda one: str(one["metadata"]["name"]),
        "metadata.namespace": lambda one: str(one["metadata"]["namespace"]),
        "spec.nodeName": lambda one: str(one["spec"].get("nodeName", "")),
        "status.phase": lambda one: str(one["status"].get("phase", "")),
    },
}


def selector(resource: str, labels: str, fields: str) -> Predicate | None:
    """What both selectors ask for, None if they ask for nothing; raises ApiFailure (400)."""
    terms = [_label_term(text) for text in _TERMS.split(labels) if text.strip()]
    terms += [_field_term(resource, text) for text in fields.split(",") if text.strip()]
    if not terms:
        return None
    return lambda one: all(term(one) for term in terms)


def required_name(fields: str) -> str:
    """The name that a fieldSelector asks for, empty if it does not: the request is then about one object."""
    for text in fields.split(","):
        path, found, value = text.replace("==", "=").partition("=")
        if found and path.strip() == "metadata.name":
            return value.strip()
    return ""


def _label_term(text: str) -> Predicate:
    in_set = _SET.match(text)
    if in_set:
        key, operator, values = in_set.groups()
        wanted = {value.strip() for value in values.split(",")}
        return lambda one: (_labels(one).get(key) in wanted) == (operator == "in")
    if "!=" in text:
        key, value = (part.strip() for part in text.split("!=", 1))
        return lambda one: _labels(one).get(key) != value
    if "=" in text:
        key, value = (part.strip() for part in text.replace("==", "=").split("=", 1))
        return lambda one: _labels(one).get(key) == value
    key = text.strip()
    if key.startswith("!"):
        return lambda one: key[1:].strip() not in _labels(one)
    if " " in key:
        raise bad_request(f"unable to parse requirement: {text!r}")
    return lambda one: key in _labels(one)


def _field_term(resource: str, text: str) -> Predicate:
    negated = "!=" in text
    path, found, value = text.replace("!=", "=").replace("==", "=").partition("=")
    path, value = path.strip(), value.strip()
    if not found:
        raise bad_request(f"invalid selector: '{text}'; can't understand '{text}'")
    read = _FIELDS[resource].get(path)
    if read is None:
        raise bad_request(f'field label not supported: "{path}"' if resource == "nodes" else
                          f"field label not supported: {path}")  # fmt: skip
    return lambda one: (read(one) == value) != negated


def _labels(one: Json) -> dict[str, str]:
    found: dict[str, str] = one["metadata"].get("labels", {})
    return found
