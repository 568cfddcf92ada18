"""The delegate's configuration, byte for byte as captured from upstream flannel."""

from __future__ import annotations

import json

import pytest

from cni.errors import CniError
from cni.plugins import subnetenv
from cni.plugins.flannel import delegate_config
from cni.spec import gojson
from cni.spec.netconf import NetConf

ENV_A = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
ENV_V6 = "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\n"
ONLY_V6 = f"{ENV_V6}FLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
UNMASQUERADED = ENV_A.replace("true", "false")
THREE_NETWORKS = ENV_A.replace("10.1.0.0/16", "10.1.0.0/16,192.168.0.0/16,10.1.0.0/16").replace(
    "1472", "1450"
)


def built(conf: str, env: str = ENV_A) -> str:
    record = gojson.load_object(conf)
    return gojson.dumps(delegate_config(NetConf(record), subnetenv.parse(env)))


def conf(extra: str = "", version: str = "1.0.0") -> str:
    head = f'"cniVersion":"{version}",' if version else ""
    return f'{{{head}"name":"cbr0","type":"flannel"{"," if extra else ""}{extra}}}'


# Captured: standard input of the delegate under upstream flannel.
V4_IPAM = (
    '"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"}'
)
MINIMAL = (
    f'{{"cniVersion":"1.0.0","ipMasq":false,{V4_IPAM},'
    '"isGateway":true,"mtu":1472,"name":"cbr0","type":"bridge"}'
)
EXAMPLES = {
    "minimal": (conf(), ENV_A, MINIMAL),
    "no version": (
        conf(version=""),
        ENV_A,
        f'{{"ipMasq":false,{V4_IPAM},"isGateway":true,"mtu":1472,"name":"cbr0","type":"bridge"}}',
    ),
    "dual stack": (
        conf(),
        ENV_A + ENV_V6,
        '{"cniVersion":"1.0.0","ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}],'
        '[{"subnet":"fc00::/64"}]],"routes":[{"dst":"10.1.0.0/16"},{"dst":"fc00::/48"}],"type":"host-local"},'
        '"isGateway":true,"mtu":1472,"name":"cbr0","type":"bridge"}',
    ),
    "IPv6 only": (
        conf(),
        ONLY_V6,
        '{"cniVersion":"1.0.0","ipMasq":false,"ipam":{"ranges":[[{"subnet":"fc00::/64"}]],'
        '"routes":[{"dst":"fc00::/48"}],"type":"host-local"},'
        '"isGateway":true,"mtu":1472,"name":"cbr0","type":"bridge"}',
    ),
    "stock Kubernetes": (
        conf('"delegate":{"hairpinMode":true,"isDefaultGateway":true}', version="0.3.1"),
        ENV_A,
        f'{{"cniVersion":"0.3.1","hairpinMode":true,"ipMasq":false,{V4_IPAM},"isDefaultGateway":true,'
        '"isGateway":true,"mtu":1472,"name":"cbr0","type":"bridge"}',
    ),
    "no masquerade by flanneld": (
        conf(),
        UNMASQUERADED,
        MINIMAL.replace('"ipMasq":false', '"ipMasq":true'),
    ),
    "masquerade by the delegate": (
        conf('"delegate":{"ipMasq":true}'),
        ENV_A,
        MINIMAL.replace('"ipMasq":false', '"ipMasq":true'),
    ),
    "another delegate": (
        conf('"delegate":{"type":"ipvlan","master":"eth0"}'),
        ENV_A,
        f'{{"cniVersion":"1.0.0","ipMasq":false,{V4_IPAM},"master":"eth0","mtu":1472,"name":"cbr0","type":"ipvlan"}}',
    ),
    "ipam base": (
        conf(
            '"ipam":{"type":"my-ipam","subnet":"1.2.3.0/24","ranges":[[{"subnet":"9.9.9.0/24"}]],"dataDir":"/x",'
            '"routes":[{"dst":"10.96.0.0/12"},{"dst":"192.168.244.0/24","gw":"10.1.17.20","mtu":1400,"foo":1}],'
            '"unknown":"v"}'
        ),
        ENV_A,
        '{"cniVersion":"1.0.0","ipMasq":false,"ipam":{"dataDir":"/x","ranges":[[{"subnet":"10.1.17.0/24"}]],'
        '"routes":[{"dst":"10.96.0.0/12"},{"dst":"192.168.244.0/24","gw":"10.1.17.20","mtu":1400},'
        '{"dst":"10.1.0.0/16"}],"subnet":"1.2.3.0/24","type":"my-ipam","unknown":"v"},'
        '"isGateway":true,"mtu":1472,"name":"cbr0","type":"bridge"}',
    ),
    "capabilities": (
        conf(
            '"capabilities":{"portMappings":true,"mac":true},"args":{"a":1},"dns":{"domain":"x"},'
            '"prevResult":{"cniVersion":"1.0.0"},"unknown":1,"runtimeConfig":{"portMappings":'
            '[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}],"mac":"c2:11:22:33:44:55"}'
        ),
        ENV_A,
        f'{{"cniVersion":"1.0.0","ipMasq":false,{V4_IPAM},"isGateway":true,"mtu":1472,"name":"cbr0",'
        '"runtimeConfig":{"mac":"c2:11:22:33:44:55","portMappings":[{"containerPort":80,"hostPort":8080,'
        '"protocol":"tcp"}]},"type":"bridge"}',
    ),
    "overrides": (
        conf(
            '"delegate":{"mtu":1400,"bridge":"mynet0","cniVersion":"0.3.1","isGateway":false,'
            '"args":{"cni":{"mac":"c2:11:22:33:44:55"}},"dns":{"domain":"x"},"capabilities":{"mac":true},'
            '"runtimeConfig":{"a":1}}'
        ),
        ENV_A,
        '{"args":{"cni":{"mac":"c2:11:22:33:44:55"}},"bridge":"mynet0","capabilities":{"mac":true},'
        f'"cniVersion":"1.0.0","dns":{{"domain":"x"}},"ipMasq":false,{V4_IPAM},"isGateway":false,"mtu":1400,'
        '"name":"cbr0","runtimeConfig":{"a":1},"type":"bridge"}',
    ),
    "several networks": (
        conf(),
        THREE_NETWORKS,
        '{"cniVersion":"1.0.0","ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],'
        '"routes":[{"dst":"10.1.0.0/16"},{"dst":"192.168.0.0/16"}],"type":"host-local"},'
        '"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}',
    ),
    "version in the delegate alone": (
        conf('"delegate":{"cniVersion":"0.3.1"}', version=""),
        ENV_A,
        MINIMAL.replace('"1.0.0"', '"0.3.1"'),
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_captured_examples(name: str) -> None:
    given, env, expected = EXAMPLES[name]
    assert built(given, env) == expected


@pytest.mark.parametrize(
    ("extra", "member", "value"),
    [
        # A key that is there counts as there, even as null.
        ('"delegate":{"mtu":null}', "mtu", None),
        ('"delegate":{"ipMasq":null}', "ipMasq", None),
        ('"delegate":{"isGateway":null}', "isGateway", None),
        ('"delegate":{"runtimeConfig":{"a":1}},"runtimeConfig":{"b":2}', "runtimeConfig", {"b": 2}),
        ('"delegate":{"runtimeConfig":{"a":1}},"runtimeConfig":null', "runtimeConfig", {"a": 1}),
        # Inside the delegate keys are exact, outside they are not.
        ('"delegate":{"MTU":1,"Type":"x"}', "mtu", 1472),
        ('"Delegate":{"mtu":1}', "mtu", 1),
        ('"delegate":null', "type", "bridge"),
        ('"delegate":{"big":12345678901234567890}', "big", 12345678901234567000),
        ('"delegate":{"one":1.0}', "one", 1),
    ],
)
def test_corners_of_the_delegate(extra: str, member: str, value: object) -> None:
    assert json.loads(built(conf(extra)))[member] == value


@pytest.mark.parametrize(
    ("ipam", "member", "value"),
    [
        ('{"type":1}', "type", 1),
        ('{"type":null}', "type", None),
        ('{"routes":null}', "routes", [{"dst": "10.1.0.0/16"}]),
        ('{"routes":[]}', "routes", [{"dst": "10.1.0.0/16"}]),
        (
            '{"routes":[{"Dst":"FC00::1/64","table":0,"scope":253,"advmss":0,"priority":5}]}',
            "routes",
            [{"dst": "fc00::1/64", "priority": 5, "table": 0, "scope": 253}, {"dst": "10.1.0.0/16"}],
        ),
    ],
)
def test_corners_of_the_ipam_base(ipam: str, member: str, value: object) -> None:
    assert json.loads(built(conf(f'"ipam":{ipam}')))["ipam"][member] == value


ROUTES = "failed to assemble Delegate IPAM: failed to read IPAM routes: failed to parse ipam.routes: "


@pytest.mark.parametrize(
    ("extra", "msg"),
    [
        (
            '"delegate":{"type":1,"name":"x"}',
            "'delegate' dictionary, if present, must have (string) 'type' field",
        ),
        ('"delegate":{"type":null}', "'delegate' dictionary, if present, must have (string) 'type' field"),
        (
            '"delegate":{"name":"x","ipam":{}}',
            "'delegate' dictionary must not have 'name' field, it'll be set by flannel",
        ),
        (
            '"delegate":{"ipam":null},"ipam":{"routes":1}',
            "'delegate' dictionary must not have 'ipam' field, it'll be set by flannel",
        ),
        ('"ipam":{"routes":{}}', f"{ROUTES}routes must be an array, found object"),
        ('"ipam":{"routes":[{"dst":"10.0.0.0"}]}', f"{ROUTES}invalid CIDR address: 10.0.0.0"),
        (
            '"ipam":{"routes":[{"gw":"10.0.0.1"}]}',
            f"{ROUTES}routes has an entry without dst, an address with its prefix length",
        ),
    ],
)
def test_what_upstream_refuses(extra: str, msg: str) -> None:
    with pytest.raises(CniError) as caught:
        built(conf(extra))
    assert (caught.value.code, caught.value.msg) == (999, msg)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ('"delegate":[]', "delegate must be an object, found array"),
        ('"ipam":"x"', "ipam must be an object, found string"),
        ('"runtimeConfig":1', "runtimeConfig must be an object, found number 1"),
        ('"subnetFile":{}', "subnetFile must be a string, found object"),
        ('"dataDir":7', "dataDir must be a string, found number 7"),
        ('"dns":[]', "dns must be an object, found array"),
        ('"capabilities":{"mac":"yes"}', "capabilities.mac must be true or false, found string"),
        ('"prevResult":"x"', "prevResult must be an object, found string"),
        ('"cni.dev/valid-attachments":{}', "cni.dev/valid-attachments must be an array, found object"),
        ('"cni.dev/attachments":[1]', "cni.dev/attachments must hold objects, found number 1"),
    ],
)
def test_keys_of_wrong_type(extra: str, reason: str) -> None:
    with pytest.raises(gojson.GoJsonError) as caught:
        NetConf(gojson.load_object(conf(extra)))
    assert str(caught.value) == reason


def test_defaults_hold_for_absent_and_null_keys() -> None:
    for text in (conf(), conf('"subnetFile":null,"dataDir":null,"ipam":null')):
        parsed = NetConf(gojson.load_object(text))
        assert (parsed.subnet_file, parsed.data_dir) == ("/run/flannel/subnet.env", "/var/lib/cni/flannel")
        assert (parsed.store, parsed.valid_attachments) == ("/var/lib/cni/networks/cbr0", None)
    parsed = NetConf(gojson.load_object(conf('"subnetFile":"/a","dataDir":"/b","ipam":{"dataDir":"/c"}')))
    assert (parsed.subnet_file, parsed.data_dir, parsed.store) == ("/a", "/b", "/c/cbr0")
    assert NetConf(gojson.load_object(conf('"ipam":{"type":"dhcp"}'))).store == ""
