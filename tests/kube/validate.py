"""What kube-apiserver refuses in a node or pod that is otherwise well-formed, and what it fills in."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Any

from tests.kube.status import go_quote, invalid
from tests.kube.view import KINDS

Json = dict[str, Any]
Cause = tuple[str, str, str]

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_ANNOTATION_LIMIT = 256 * 1024


def settle(resource: str, made: Json) -> None:
    """Make podCIDR and podCIDRs of a node agree: podCIDR is the first of podCIDRs."""
    if resource != "nodes":
        return
    spec = made["spec"]
    single, several = spec.get("podCIDR"), spec.get("podCIDRs")
    if single and (not several or several[0] != single):
        several = [single]
    if several:
        rest = {key: value for key, value in spec.items() if key not in ("podCIDR", "podCIDRs")}
        made["spec"] = {"podCIDR": several[0], "podCIDRs": several, **rest}


def check(resource: str, old: Json | None, new: Json) -> None:
    """Raise ApiFailure (422) with every reason for which `new` cannot replace `old`, or be created."""
    causes = [*_metadata_causes(new["metadata"])]
    if resource == "nodes":
        causes += _cidr_causes(old["spec"] if old else {}, new["spec"])
    if causes:
        raise invalid(KINDS[resource], new["metadata"].get("name", ""), causes)


def _metadata_causes(metadata: Json) -> list[Cause]:
    causes: list[Cause] = []
    name = metadata.get("name", "")
    if not name:
        text = "Required value: name or generateName is required"
        causes.append(("metadata.name", "FieldValueRequired", text))
    elif len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        text = (
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', "
            "and must start and end with an alphanumeric character (e.g. 'example.com', regex used for "
            f"validation is '{_SUBDOMAIN.pattern}')"
        )
        causes.append(_invalid_value("metadata.name", name, text))
    annotations = metadata.get("annotations", {})
    causes += [_key_cause(key) for key in annotations if not _is_qualified(key.lower())]
    if sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items()) > _ANNOTATION_LIMIT:
        text = f"Too long: may not be more than {_ANNOTATION_LIMIT} bytes"
        causes.append(("metadata.annotations", "FieldValueTooLong", text))
    return causes


def _is_qualified(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    if slash and not (prefix and len(prefix) <= 253 and _SUBDOMAIN.fullmatch(prefix)):
        return False
    return len(name) <= 63 and _QUALIFIED.fullmatch(name) is not None


def _key_cause(key: str) -> Cause:
    text = (
        "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an "
        "alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
        f"'{_QUALIFIED.pattern}')"
    )
    return _invalid_value("metadata.annotations", key, text)


def _cidr_causes(old: Json, new: Json) -> list[Cause]:
    had, cidrs = old.get("podCIDRs", []), new.get("podCIDRs", [])
    if had and had != cidrs:
        text = 'Forbidden: node updates may not change podCIDR except from "" to valid'
        return [("spec.podCIDRs", "FieldValueForbidden", text)]
    causes: list[Cause] = []
    versions: list[int] = []
    for index, cidr in enumerate(cidrs):
        version = _cidr_version(cidr)
        if version:
            versions.append(version)
        else:
            text = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"
            causes.append(_invalid_value(f"spec.podCIDRs[{index}]", cidr, text))
    if len(cidrs) > 2 or len(set(versions)) < len(versions):
        shown = "[" + ",".join(go_quote(cidr) for cidr in cidrs) + "]"
        text = f"Invalid value: {shown}: may specify no more than one CIDR for each IP family"
        causes.append(("spec.podCIDRs", "FieldValueInvalid", text))
    return causes


def _cidr_version(cidr: str) -> int:
    """4 or 6, 0 if it is no CIDR; bits beyond the prefix are no fault, as upstream."""
    try:
        return ip_network(cidr, strict=False).version if "/" in cidr else 0
    except ValueError:
        return 0


def _invalid_value(field: str, value: str, text: str) -> Cause:
    return field, "FieldValueInvalid", f"Invalid value: {go_quote(value)}: {text}"
