"""Rows and tables of flannelctl: wanted beside actual."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Address, IPv6Network

import pytest
import yaml
from hypothesis import given

from cni.net.entries import Blackhole, Entry, FdbEntry, Key, Link, Neighbour, Route, Vxlan, state
from flanneld import view
from flanneld.lease import Attributes, Lease
from flanneld.table import table
from tests.unit.states import kernel_states
from tests.unit.test_snapshot import NODE

MAC, OTHER = "02:00:00:00:00:02", "02:00:00:00:00:03"
ROUTE = Route("flannel.1", "10.244.2.0/24", "10.244.2.0", onlink=True)
NEIGHBOUR = Neighbour("flannel.1", "10.244.2.0", MAC)
FDB = FdbEntry("flannel.1", MAC, "192.0.2.2")
PEER = replace(
    NODE.own,
    subnet=IPv4Network("10.244.2.0/24"),
    attrs=replace(NODE.own.attrs, backend_data='{"VNI":1,"VtepMAC":"02:00:00:00:00:02"}'),
)


def one(kind: str, wanted: list[Entry], actual: list[Entry]) -> view.Row:
    [row] = view.compare(kind, state(wanted), state(actual))
    return row


@pytest.mark.parametrize(
    ("kind", "entry", "fields"),
    [
        (
            "routes",
            ROUTE,
            {"subnet": "10.244.2.0/24", "via": "10.244.2.0", "link": "flannel.1", "onlink": True},
        ),
        ("neighbours", NEIGHBOUR, {"address": "10.244.2.0", "mac": MAC, "link": "flannel.1"}),
        ("fdb", FDB, {"mac": MAC, "publicIP": "192.0.2.2", "link": "flannel.1"}),
        (
            "routes",
            Route("eth0", "10.244.2.0/24", "192.0.2.2", marked=True),
            {"subnet": "10.244.2.0/24", "via": "192.0.2.2", "link": "eth0", "onlink": False},
        ),
        (
            "routes",
            Blackhole("10.244.1.0/24", 1024),
            {"subnet": "10.244.1.0/24", "type": "blackhole", "metric": 1024},
        ),
    ],
)
def test_the_three_states_of_an_entry(kind: str, entry: Entry, fields: view.Row) -> None:
    assert one(kind, [entry], [entry]) == {**fields, "state": "ok"}
    assert one(kind, [entry], []) == {**fields, "state": "missing"}
    assert one(kind, [], [entry]) == {**fields, "state": "unexpected"}


def test_an_entry_that_differs_is_shown_as_it_is_and_as_it_should_be() -> None:
    row = one("neighbours", [NEIGHBOUR], [NEIGHBOUR._replace(mac=OTHER)])
    assert (row["state"], row["mac"]) == ("differs", OTHER)
    assert row["wanted"] == {"address": "10.244.2.0", "mac": MAC, "link": "flannel.1"}
    _, [cells] = view.cells("neighbours", [row])
    assert cells == ["10.244.2.0", OTHER, "flannel.1", f"differs (wanted mac={MAC})"]


def test_an_fdb_entry_of_a_moved_peer_differs() -> None:
    row = one("fdb", [FDB], [FDB._replace(dst="192.0.2.99")])
    assert (row["publicIP"], row["state"]) == ("192.0.2.99", "differs")
    assert row["wanted"] == {"mac": MAC, "publicIP": "192.0.2.2", "link": "flannel.1"}


def test_a_blackhole_beside_routes_has_its_own_column() -> None:
    hole = Blackhole("10.244.1.0/24")
    rows = view.compare("routes", state([ROUTE, hole]), state([ROUTE, hole]))
    header, cells = view.cells("routes", rows)
    assert header == ["SUBNET", "TYPE", "VIA", "LINK", "ONLINK", "STATE"]
    assert cells == [
        ["10.244.1.0/24", "blackhole", "", "", "", "ok"],
        ["10.244.2.0/24", "", "10.244.2.0", "flannel.1", "yes", "ok"],
    ]
    assert view.cells("routes", view.compare("routes", state([ROUTE]), {}))[0] == [
        *("SUBNET", "VIA", "LINK", "ONLINK", "STATE")
    ]


@given(kernel_states(), kernel_states())
def test_every_entry_is_in_one_row_of_its_kind(wanted: dict[Key, Entry], actual: dict[Key, Entry]) -> None:
    rows = [row for kind in view.KINDS for row in view.compare(kind, wanted, actual)]
    both = {**actual, **wanted}
    shown = [entry for entry in both.values() if isinstance(entry, Route | Neighbour | FdbEntry)]
    assert len(rows) == len(shown)
    right = [entry for entry in shown if wanted.get(entry.key) == actual.get(entry.key)]
    assert sum(row["state"] == "ok" for row in rows) == len(right)


@given(kernel_states())
def test_a_network_in_order_is_all_ok(x: dict[Key, Entry]) -> None:
    assert all(row["state"] == "ok" for kind in view.KINDS for row in view.compare(kind, x, x))


def test_links_and_addresses_are_no_rows() -> None:
    link = Link("flannel.1", 1450, MAC, True, Vxlan(1, 8472, "192.0.2.1", "eth0"))
    assert [view.compare(kind, state([link]), {}) for kind in view.KINDS] == [[], [], []]


# ---- leases


def test_leases_are_listed_by_subnet_with_our_own_marked() -> None:
    later = replace(PEER, subnet=IPv4Network("10.244.10.0/24"))
    rows = view.leases(replace(NODE, own=PEER, peers=(later, NODE.own)))
    assert [(row["subnet"], row["own"]) for row in rows] == [
        ("10.244.1.0/24", False),
        ("10.244.2.0/24", True),
        ("10.244.10.0/24", False),
    ]
    assert rows[0] == {
        "subnet": "10.244.1.0/24",
        "publicIP": "192.0.2.1",
        "backend": "vxlan",
        "backendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:01"},
        "expires": "2025-06-30T14:34:26Z",
        "own": False,
    }


def test_leases_without_an_ipv4_subnet_are_listed_too() -> None:
    def lease(number: int) -> Lease:
        attrs = Attributes(public_ipv6=IPv6Address(f"2001:db8::{number}"), backend_type="vxlan")
        return Lease(None, IPv6Network(f"fd00:10:244:{number}::/64"), attrs)

    rows = view.leases(replace(NODE, own=lease(1), peers=(lease(2), NODE.own)))
    assert [row.get("ipv6Subnet") for row in rows] == [None, "fd00:10:244:1::/64", "fd00:10:244:2::/64"]
    assert [row["publicIP"] for row in rows] == ["192.0.2.1", "2001:db8::1", "2001:db8::2"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [('{"VNI":1}', {"VNI": 1}), ("1.5", 1.5), ('[1,"a",null,true]', [1, "a", None, True]), ('"x"', "x")],
)
def test_backend_data_is_plain_for_every_writer(data: str, expected: object) -> None:
    own = replace(NODE.own, attrs=replace(NODE.own.attrs, backend_data=data))
    [row] = view.leases(replace(NODE, own=own))
    assert row["backendData"] == expected
    assert json.loads(json.dumps(row)) == row
    assert yaml.safe_load(yaml.safe_dump(row))["backendData"] == expected


# ---- tables


def test_a_column_that_no_row_fills_is_left_out() -> None:
    header, rows = view.cells("leases", view.leases(replace(NODE, peers=(PEER,))))
    assert header == ["SUBNET", "PUBLIC IP", "BACKEND", "BACKEND DATA", "EXPIRES", "OWN"]
    assert [row[-1] for row in rows] == ["yes", ""]
    assert rows[0][3] == "VNI=1 VtepMAC=02:00:00:00:00:01"


@pytest.mark.parametrize("kind", ["leases", *view.KINDS])
def test_an_empty_table_has_its_header(kind: str) -> None:
    header, rows = view.cells(kind, [])
    assert header == list(view.HEADERS[kind].values())
    assert table(header, rows) == "   ".join(header) + "\n"


def test_columns_are_aligned_and_nothing_trails() -> None:
    text = table(["A", "LONG", "C"], [["wide cell", "x", ""], ["y", "", "last"]])
    assert text == "A           LONG   C\nwide cell   x\ny                  last\n"
