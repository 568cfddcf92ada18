"""What is wanted beside what is there, as rows for a person or a program."""

from __future__ import annotations

import datetime
from collections.abc import Mapping

from cni.net.entries import Blackhole, Entry, FdbEntry, Neighbour, NetState, Route
from cni.spec import gojson
from flanneld.lease import Lease
from flanneld.snapshot import NodeState

Row = dict[str, object]

KINDS: Mapping[str, tuple[type[Entry], ...]] = {
    "routes": (Route, Blackhole),
    "neighbours": (Neighbour,),
    "fdb": (FdbEntry,),
}


def compare(kind: str, wanted: NetState, actual: NetState) -> list[Row]:
    """One row for each entry of a kind that is wanted, there, or both, in key order.

    `state` is `ok`, `missing` (wanted, not there), `differs` (there, but not as wanted; the row shows
    what is there and `wanted` what should be) or `unexpected` (there, and nobody wants it).
    """
    types = KINDS[kind]
    keys = {key for state in (wanted, actual) for key, entry in state.items() if isinstance(entry, types)}
    return [_row(wanted.get(key), actual.get(key)) for key in sorted(keys)]


def _row(wanted: Entry | None, actual: Entry | None) -> Row:
    if actual is None:
        return {**_fields(wanted), "state": "missing"}
    if wanted is None:
        return {**_fields(actual), "state": "unexpected"}
    if wanted == actual:
        return {**_fields(actual), "state": "ok"}
    return {**_fields(actual), "state": "differs", "wanted": _fields(wanted)}


def _fields(entry: Entry | None) -> Row:
    match entry:
        case Route():
            row: Row = {"subnet": entry.dst, "via": entry.via, "link": entry.link, "onlink": entry.onlink}
            return row | ({"metric": entry.metric} if entry.metric else {})
        case Blackhole():
            return {"subnet": entry.dst, "type": "blackhole", "metric": entry.metric}
        case Neighbour():
            return {"address": entry.address, "mac": entry.mac, "link": entry.link}
        case FdbEntry():
            return {"mac": entry.mac, "publicIP": entry.dst, "link": entry.link}
        case _:
            return {}


def leases(node: NodeState) -> list[Row]:
    """One row for each lease, in subnet order, our own marked."""
    found = sorted((node.own, *node.peers), key=lambda lease: (lease.subnet is None, lease.subnet))
    return [_lease(lease, lease == node.own) for lease in found]


def _lease(lease: Lease, own: bool) -> Row:
    attrs = lease.attrs
    row: Row = {"subnet": str(lease.subnet) if lease.subnet else ""}
    if lease.subnet6:
        row["ipv6Subnet"] = str(lease.subnet6)
    row["publicIP"] = str(attrs.public_ip or attrs.public_ipv6 or "")
    row["backend"] = attrs.backend_type
    if attrs.backend_data:
        row["backendData"] = _plain(gojson.loads(attrs.backend_data))
    if lease.expires_s:
        moment = datetime.datetime.fromtimestamp(lease.expires_s, datetime.UTC)
        row["expires"] = moment.isoformat(timespec="seconds").replace("+00:00", "Z")
    row["own"] = own
    return row


def _plain(value: object) -> object:
    """The same value with ordinary numbers, which every writer knows."""
    match value:
        case dict():
            return {key: _plain(inner) for key, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case gojson.Number():
            return int(value) if value.is_integer() else float(value)
        case _:
            return value


HEADERS: Mapping[str, Mapping[str, str]] = {
    "leases": {
        "subnet": "SUBNET",
        "ipv6Subnet": "IPV6 SUBNET",
        "publicIP": "PUBLIC IP",
        "backend": "BACKEND",
        "backendData": "BACKEND DATA",
        "expires": "EXPIRES",
        "own": "OWN",
    },
    "routes": {
        "subnet": "SUBNET",
        "type": "TYPE",
        "via": "VIA",
        "link": "LINK",
        "onlink": "ONLINK",
        "state": "STATE",
    },
    "neighbours": {"address": "ADDRESS", "mac": "MAC", "link": "LINK", "state": "STATE"},
    "fdb": {"mac": "MAC", "publicIP": "PUBLIC IP", "link": "LINK", "state": "STATE"},
}


def cells(kind: str, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table; a column that no row fills is left out."""
    columns = [c for c in HEADERS[kind] if not rows or any(c in row for row in rows)]
    body = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    for row, line in zip(rows, body, strict=True):
        if isinstance(wanted := row.get("wanted"), dict):
            differing = (f"{k}={_cell(v)}" for k, v in wanted.items() if row.get(k) != v)
            line[-1] += f" (wanted {', '.join(differing)})"
    return [HEADERS[kind][column] for column in columns], body


def _cell(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else ""
        case dict():
            return " ".join(f"{key}={inner}" for key, inner in value.items())
        case _:
            return str(value)
