"""Results of every version, their printed form, and every conversion between them."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.spec import gojson, result
from cni.spec.result import ResultError
from cni.spec.version import SUPPORTED

LEGACY, MIDDLE, CURRENT = SUPPORTED[:2], SUPPORTED[2:5], SUPPORTED[5:]

INTERFACES = [
    {"name": "cni0", "mac": "0a:00:00:00:00:01"},
    {"name": "eth0", "mac": "0a:00:00:00:00:02", "sandbox": "/run/netns/x"},
]
DNS = {"nameservers": ["10.96.0.10"], "domain": "d", "search": ["s"], "options": ["ndots:5"]}

# One dual-stack attachment in each form: what converts without a loss.
FORMS: dict[str, dict[str, object]] = {
    "legacy": {
        "ip4": {"ip": "10.1.2.3/24", "gateway": "10.1.2.1", "routes": [{"dst": "10.1.0.0/16"}]},
        "ip6": {"ip": "fd00::3/64", "routes": [{"dst": "fd00::/48", "gw": "fd00::1"}]},
        "dns": DNS,
    },
    "middle": {
        "ips": [
            {"version": "4", "address": "10.1.2.3/24", "gateway": "10.1.2.1"},
            {"version": "6", "address": "fd00::3/64"},
        ],
        "routes": [{"dst": "10.1.0.0/16"}, {"dst": "fd00::/48", "gw": "fd00::1"}],
        "dns": DNS,
    },
    "current": {
        "ips": [{"address": "10.1.2.3/24", "gateway": "10.1.2.1"}, {"address": "fd00::3/64"}],
        "routes": [{"dst": "10.1.0.0/16"}, {"dst": "fd00::/48", "gw": "fd00::1"}],
        "dns": DNS,
    },
}


def form_of(version: str) -> str:
    return "legacy" if version in LEGACY else "middle" if version in MIDDLE else "current"


def parsed(body: object, version: str) -> gojson.Object:
    return result.parse(json.dumps(body).encode(), version)


def plain(document: gojson.Object) -> object:
    return json.loads(gojson.dumps(document))


@pytest.mark.parametrize(("source", "target"), list(itertools.product(SUPPORTED, SUPPORTED)))
def test_what_all_forms_can_say_survives_every_conversion(source: str, target: str) -> None:
    made = parsed({"cniVersion": source, **FORMS[form_of(source)]}, "9.9.9")
    assert plain(result.convert(made, target)) == {"cniVersion": target, **FORMS[form_of(target)]}


FULL_CURRENT: dict[str, object] = {
    "interfaces": [
        {
            "name": "cni0",
            "mac": "0a:00:00:00:00:01",
            "mtu": 1450,
            "socketPath": "/s",
            "pciID": "0000:00:1f.6",
        },
        INTERFACES[1],
    ],
    "ips": [
        {"interface": 1, "address": "10.1.2.3/24", "gateway": "10.1.2.1"},
        {"interface": 0, "address": "10.1.2.4/24"},
        {"address": "fd00::3/64"},
        {"address": "fd00::4/64"},
    ],
    "routes": [
        {
            "dst": "0.0.0.0/0",
            "gw": "10.1.2.1",
            "mtu": 1400,
            "advmss": 9,
            "priority": 7,
            "table": 0,
            "scope": 0,
        },
        {"dst": "::/0"},
    ],
}


@pytest.mark.parametrize("source", CURRENT)
@pytest.mark.parametrize("target", MIDDLE)
def test_from_current_to_middle_loses_what_came_with_1_1_in_interfaces(source: str, target: str) -> None:
    converted = plain(result.convert(parsed(FULL_CURRENT, source), target))
    addresses = [{**one, "version": "46"[":" in one["address"]]} for one in list_of(FULL_CURRENT, "ips")]
    assert converted == {
        "cniVersion": target,
        "interfaces": INTERFACES,
        "ips": addresses,
        "routes": FULL_CURRENT["routes"],
        "dns": {},
    }


def list_of(body: dict[str, object], name: str) -> list[dict[str, str]]:
    value = body[name]
    assert isinstance(value, list)
    return value


@pytest.mark.parametrize("source", MIDDLE + CURRENT)
@pytest.mark.parametrize("target", LEGACY)
def test_to_legacy_keeps_the_first_address_of_each_family(source: str, target: str) -> None:
    body = copy.deepcopy(FULL_CURRENT)
    if source in MIDDLE:
        for one in list_of(body, "ips"):
            one["version"] = "6" if ":" in one["address"] else "4"
    assert plain(result.convert(parsed(body, source), target)) == {
        "cniVersion": target,
        "ip4": {
            "ip": "10.1.2.3/24",
            "gateway": "10.1.2.1",
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.2.1"}],
        },
        "ip6": {"ip": "fd00::3/64", "routes": [{"dst": "::/0"}]},
        "dns": {},
    }


@pytest.mark.parametrize("source", MIDDLE + CURRENT)
def test_legacy_drops_routes_of_a_family_without_address(source: str) -> None:
    body = {"ips": [{"address": "fd00::3/64"}], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}
    assert plain(result.convert(parsed(body, source), "0.2.0")) == {
        "cniVersion": "0.2.0",
        "ip6": {"ip": "fd00::3/64", "routes": [{"dst": "::/0"}]},
        "dns": {},
    }


@pytest.mark.parametrize(("source", "target"), list(itertools.product(MIDDLE + CURRENT, LEGACY)))
def test_legacy_needs_an_address(source: str, target: str) -> None:
    with pytest.raises(ResultError, match=r"^cannot convert: no valid IP addresses$"):
        result.convert(parsed({"interfaces": INTERFACES}, source), target)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(CURRENT, CURRENT)))
def test_within_current_nothing_is_lost(source: str, target: str) -> None:
    assert plain(result.convert(parsed(FULL_CURRENT, source), target)) == {
        "cniVersion": target,
        **FULL_CURRENT,
    }


@given(st.permutations(SUPPORTED))
def test_any_chain_of_conversions_ends_where_the_lossless_one_does(path: list[str]) -> None:
    made = parsed(FORMS[form_of(path[0])], path[0])
    for version in path[1:]:
        made = result.convert(made, version)
    assert plain(made) == {"cniVersion": path[-1], **FORMS[form_of(path[-1])]}


def test_routes_without_gateway_take_the_first_one_of_their_family() -> None:
    body = {
        "ips": [
            {"address": "10.1.2.3/24", "gateway": "10.1.2.1"},
            {"address": "10.1.3.3/24", "gateway": "10.1.3.1"},
            {"address": "fd00::3/64"},
        ],
        "routes": [
            {"dst": "10.0.0.0/8"},
            {"dst": "0.0.0.0/0", "gw": "10.1.2.9"},
            {"dst": "fd00::/48", "mtu": 1400},
        ],
    }
    assert plain(result.with_gateways(parsed(body, "1.0.0"))) == {
        "cniVersion": "1.0.0",
        "ips": body["ips"],
        "routes": [
            {"dst": "10.0.0.0/8", "gw": "10.1.2.1"},
            {"dst": "0.0.0.0/0", "gw": "10.1.2.9"},
            {"dst": "fd00::/48", "mtu": 1400},
        ],
    }


class TestPrintedForm:
    def test_current_is_sorted_and_leaves_an_empty_dns_out(self) -> None:
        body = {"ips": [{"interface": 0, "address": "10.1.2.3/24"}], "interfaces": [INTERFACES[1]], "dns": {}}
        assert result.write(parsed(body, "1.0.0")).decode() == (
            '{\n    "cniVersion": "1.0.0",\n    "interfaces": [\n        {\n'
            '            "mac": "0a:00:00:00:00:02",\n            "name": "eth0",\n'
            '            "sandbox": "/run/netns/x"\n        }\n    ],\n'
            '    "ips": [\n        {\n            "address": "10.1.2.3/24",\n            "interface": 0\n'
            "        }\n    ]\n}"
        )

    def test_middle_has_the_order_of_the_go_struct_and_always_a_dns(self) -> None:
        body = {
            "routes": [{"gw": "10.1.2.1", "dst": "0.0.0.0/0"}],
            "ips": [{"address": "10.1.2.3/24", "gateway": "10.1.2.1", "version": "4", "interface": 0}],
            "interfaces": [{"sandbox": "/x", "mac": "m", "name": "eth0"}],
        }
        text = result.write(parsed(body, "0.4.0")).decode()
        assert json.dumps(json.loads(text)) == (
            '{"cniVersion": "0.4.0", "interfaces": [{"name": "eth0", "mac": "m", "sandbox": "/x"}], '
            '"ips": [{"version": "4", "interface": 0, "address": "10.1.2.3/24", "gateway": "10.1.2.1"}], '
            '"routes": [{"dst": "0.0.0.0/0", "gw": "10.1.2.1"}], "dns": {}}'
        )

    def test_legacy_has_ip4_before_ip6_and_always_a_dns(self) -> None:
        body = {"ip6": {"ip": "fd00::1/64"}, "ip4": {"routes": [], "gateway": "10.0.0.1", "ip": "10.0.0.2/8"}}
        text = result.write(parsed(body, "0.2.0")).decode()
        assert json.dumps(json.loads(text)) == (
            '{"cniVersion": "0.2.0", "ip4": {"ip": "10.0.0.2/8", "gateway": "10.0.0.1"}, '
            '"ip6": {"ip": "fd00::1/64"}, "dns": {}}'
        )

    def test_names_are_always_there_and_zero_is_left_out_where_go_does(self) -> None:
        body = {
            "interfaces": [{"mac": "", "mtu": 0}],
            "ips": [{"interface": 0, "address": "10.0.0.2/8", "gateway": ""}],
            "routes": [{"dst": "10.0.0.0/8", "mtu": 0, "priority": 0, "table": 0, "scope": 0}],
        }
        assert plain(parsed(body, "1.1.0")) == {
            "cniVersion": "1.1.0",
            "interfaces": [{"name": ""}],
            "ips": [{"interface": 0, "address": "10.0.0.2/8"}],
            "routes": [{"dst": "10.0.0.0/8", "table": 0, "scope": 0}],
        }

    def test_addresses_are_printed_canonically_with_their_host_bits(self) -> None:
        body = {
            "ips": [{"address": "FD00:0::3/64", "gateway": "::ffff:10.0.0.1"}],
            "routes": [{"dst": "10.1.2.3/8"}],
        }
        assert plain(parsed(body, "1.0.0")) == {
            "cniVersion": "1.0.0",
            "ips": [{"address": "fd00::3/64", "gateway": "10.0.0.1"}],
            "routes": [{"dst": "10.1.2.3/8"}],
        }


class TestReading:
    def test_a_missing_index_stays_missing_and_zero_survives(self) -> None:
        body = {"ips": [{"interface": 0, "address": "10.0.0.2/8"}, {"address": "10.0.0.3/8"}]}
        for version in MIDDLE + CURRENT:
            ips = plain(result.convert(parsed(body, version), "1.0.0"))
            assert ips == {"cniVersion": "1.0.0", **body}

    @pytest.mark.parametrize("document", [b"{}", b"null", b'{"cniVersion":""}'])
    def test_a_result_without_version_has_that_of_the_netconf(self, document: bytes) -> None:
        assert result.parse(document, "0.3.1") == {"cniVersion": "0.3.1", "dns": {}}

    def test_keys_match_in_any_case_and_unknown_ones_are_dropped(self) -> None:
        document = b'{"CNIVersion":"1.0.0","IPs":[{"Address":"10.0.0.2/8","foo":1}],"bar":{}}'
        assert plain(result.parse(document, "0.2.0")) == {
            "cniVersion": "1.0.0",
            "ips": [{"address": "10.0.0.2/8"}],
        }

    @pytest.mark.parametrize(
        ("document", "reason"),
        [
            (b"", "unexpected end of JSON input"),
            (b"hello", "failed to unmarshal raw result: "),
            (b'{"cniVersion":"1.0.0"}{"code":8}', "data after the top-level value"),
            (b'{"cniVersion":"9.9.9"}', 'unsupported CNI result version "9.9.9"'),
            (b'{"cniVersion":1}', "cniVersion must be a string"),
            (b'{"ips":{}}', "ips must be an array"),
            (b'{"ips":[1]}', "ips must hold objects, found number 1"),
            (b'{"ips":[{}]}', "ips has an entry without address"),
            (b'{"ips":[{"address":"10.0.0.2"}]}', "invalid CIDR address: 10.0.0.2"),
            (b'{"ips":[{"address":"10.0.0.2/8","gateway":"x"}]}', "invalid IP address: x"),
            (b'{"ips":[{"address":"10.0.0.2/8","interface":"0"}]}', "interface must be an integer"),
            (b'{"ips":[{"address":"10.0.0.2/8","interface":1.0}]}', "interface must be an integer"),
            (b'{"routes":[{"gw":"10.0.0.1"}]}', "routes has an entry without dst"),
            (b'{"dns":{"search":[1]}}', "search must hold strings"),
            (b'{"cniVersion":"0.2.0","ip4":{}}', "ip4 has an entry without ip"),
            (b'{"cniVersion":"0.2.0","ip4":[]}', "ip4 must be an object"),
        ],
    )
    def test_what_is_no_result_is_refused(self, document: bytes, reason: str) -> None:
        with pytest.raises(ResultError, match=reason.replace(".", r"\.")):
            result.parse(document, "1.0.0")
