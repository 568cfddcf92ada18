"""The bridge plugin's netconf: defaults, order of precedence, and upstream's words for what is wrong."""

from __future__ import annotations

import json

import pytest

from cni.errors import CniError
from cni.plugins.bridgeconf import BridgeConf
from cni.spec.request import Request


def conf(**keys: object) -> BridgeConf:
    """`cni_args` is CNI_ARGS."""
    cni_args = keys.pop("cni_args", "")
    record = {"cniVersion": "1.0.0", "name": "n", "type": "bridge", **keys}
    return BridgeConf(Request({"CNI_ARGS": str(cni_args)}, json.dumps(record).encode()))


def refusal(**keys: object) -> tuple[int, str]:
    with pytest.raises(CniError) as caught:
        conf(**keys).check_for_add()
    return caught.value.code, caught.value.msg


def test_defaults() -> None:
    found = conf()
    assert (found.bridge, found.mtu, found.vlan, found.trunk, found.mac) == ("cni0", 0, 0, (), "")
    assert not (found.gateway or found.hairpin or found.promiscuous or found.masquerade or found.isolated)
    assert not (found.preserve_default_vlan or found.vlan_filtering)
    assert not (found.interface_down or found.detect_duplicates)


def test_a_default_gateway_is_a_gateway() -> None:
    assert conf(isDefaultGateway=True).gateway and not conf(isGateway=True).default_gateway


def test_keys_match_in_any_case() -> None:
    assert conf(HAIRPINMODE=True).hairpin


@pytest.mark.parametrize(("given", "mtu"), [(-1, 0), (0, 0), (1400, 1400)])
def test_mtu(given: int, mtu: int) -> None:
    assert conf(mtu=given).mtu == mtu


def test_the_macs_order_of_precedence() -> None:
    in_args = {"cni": {"mac": "02:00:00:00:00:02"}}
    in_runtime = {"mac": "02:00:00:00:00:03"}
    assert conf(cni_args="MAC=02:00:00:00:00:01").mac == "02:00:00:00:00:01"
    assert conf(cni_args="MAC=02:00:00:00:00:01", args=in_args).mac == "02:00:00:00:00:02"
    assert (
        conf(cni_args="MAC=02:00:00:00:00:01", args=in_args, runtimeConfig=in_runtime).mac
        == "02:00:00:00:00:03"
    )


def test_a_trunk_of_ranges_and_single_vlans() -> None:
    found = conf(vlanTrunk=[{"minID": 200, "maxID": 203}, {"id": 101}, {"minID": 5, "maxID": 5, "id": 7}])
    assert found.trunk == (5, 7, 101, 200, 201, 202, 203) and found.vlan_filtering


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vlan": 5000}, "invalid VLAN ID 5000 (must be between 0 and 4094)"),
        ({"vlan": -1}, "invalid VLAN ID -1 (must be between 0 and 4094)"),
        ({"vlanTrunk": [{"minID": 0, "maxID": 5}]}, "incorrect trunk minID parameter"),
        ({"vlanTrunk": [{"minID": 1, "maxID": 4095}]}, "incorrect trunk maxID parameter"),
        ({"vlanTrunk": [{"id": 4095}]}, "incorrect trunk id parameter"),
        ({"vlanTrunk": [{"minID": 6, "maxID": 5}]}, "minID is greater than maxID in trunk parameter"),
        (
            {"vlanTrunk": [{"maxID": 5}]},
            "minID and maxID should be configured simultaneously, minID is missing",
        ),
        (
            {"vlanTrunk": [{"minID": 5}]},
            "minID and maxID should be configured simultaneously, maxID is missing",
        ),
        (
            {"hairpinMode": True, "promiscMode": True},
            "cannot set hairpin mode and promiscuous mode at the same time",
        ),
        (
            {"disableContainerInterface": True, "ipam": {"type": "host-local"}},
            "cannot use IPAM when DisableContainerInterface flag is set",
        ),
        ({"ipMasqBackend": "foo"}, 'unknown ipmasq backend "foo"'),
        ({"mtu": "1450"}, "failed to load netconf: json: mtu must be an integer"),
        ({"mtu": 1450.5}, "failed to load netconf: json: mtu must be an integer"),
        ({"ipam": []}, "failed to load netconf: json: ipam must be an object, found array"),
        ({"args": {"cni": {"mac": 5}}}, "failed to load netconf: json: mac must be a string"),
    ],
)
def test_refusals(keys: dict[str, object], message: str) -> None:
    code, text = refusal(**keys)
    assert code == 999 and text.startswith(message)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a:b", "x" * 16, "ü" * 8])
def test_a_bridge_has_the_name_of_a_link(name: str) -> None:
    code, text = refusal(bridge=name)
    assert code == 7 and "bridge must be the name of a link" in text


@pytest.mark.parametrize(("mtu", "fits"), [(0, True), (1279, False), (1280, True)])
def test_ipv6_needs_its_mtu(mtu: int, fits: bool) -> None:
    found = conf(mtu=mtu)
    found.check_mtu(has_ipv6=False)
    if fits:
        found.check_mtu(has_ipv6=True)
        return
    with pytest.raises(CniError, match="IPv6 needs at least 1280") as caught:
        found.check_mtu(has_ipv6=True)
    assert caught.value.code == 7
