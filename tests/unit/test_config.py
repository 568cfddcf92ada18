"""net-conf.json: upstream's vectors, its boundaries, and an independent look at the derived ranges."""

import json
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import islice
from typing import Any

import netaddr  # type: ignore[import-untyped]  # it ships no types; used here alone
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cni.errors import ConfigError
from flanneld.config import DEFAULT_NETCONF, NetConf, backend_key, parse_cidr, parse_netconf, validate

SOURCE = "/etc/kube-flannel/net-conf.json"


def parsed(**keys: object) -> NetConf:
    return parse_netconf(json.dumps(keys), SOURCE)


def valid(**keys: object) -> NetConf:
    return validate(parsed(**keys), SOURCE)


def v6(**keys: object) -> NetConf:
    return valid(EnableIPv4=False, EnableIPv6=True, **keys)


def refusal(text: str | bytes, check: bool = False) -> str:
    conf = parse_netconf(text, SOURCE) if check else NetConf()
    with pytest.raises(ConfigError) as caught:
        validate(conf, SOURCE) if check else parse_netconf(text, SOURCE)
    message = str(caught.value)
    assert SOURCE in message
    assert "\n" not in message
    return message


# --- upstream's vectors -----------------------------------------------------------------------------


def test_upstream_ipv4_defaults() -> None:
    conf = valid(network="10.3.0.0/16")
    assert conf.network == IPv4Network("10.3.0.0/16")
    assert conf.subnet_min == IPv4Address("10.3.1.0")
    assert conf.subnet_max == IPv4Address("10.3.255.0")
    assert conf.subnet_len == 24
    assert (conf.enable_ipv4, conf.enable_ipv6, conf.enable_nftables) == (True, False, False)


def test_upstream_ipv6_defaults() -> None:
    conf = valid(enableIPv6=True, ipv6Network="fc00::/48", enableIPv4=False)
    assert conf.ipv6_network == IPv6Network("fc00::/48")
    assert conf.ipv6_subnet_min == IPv6Address("fc00:0:0:1::")
    assert conf.ipv6_subnet_max == IPv6Address("fc00:0:0:ffff::")
    assert conf.ipv6_subnet_len == 64
    assert conf.subnet_len == 0


def test_upstream_override() -> None:
    conf = parsed(Network="10.3.0.0/16", SubnetMin="10.3.5.0", SubnetMax="10.3.8.0", SubnetLen=28)
    assert conf.subnet_min == IPv4Address("10.3.5.0")
    assert conf.subnet_max == IPv4Address("10.3.8.0")
    assert conf.subnet_len == 28
    assert validate(conf, SOURCE) == conf


def test_upstream_ipv6_override() -> None:
    conf = parsed(
        EnableIPv6=True,
        IPv6Network="fc00::/48",
        IPv6SubnetMin="fc00:0:0:1::",
        IPv6SubnetMax="fc00:0:0:f::",
        IPv6SubnetLen=124,
        enableIPv4=False,
    )
    assert conf.ipv6_subnet_min == IPv6Address("fc00:0:0:1::")
    assert conf.ipv6_subnet_max == IPv6Address("fc00:0:0:f::")
    assert conf.ipv6_subnet_len == 124
    assert validate(conf, SOURCE) == conf


@pytest.mark.parametrize("text", ["", b"", "  \n"])
def test_empty_text_is_refused(text: str | bytes) -> None:
    assert "unexpected end" in refusal(text)


@pytest.mark.parametrize("text", ["{}", "null", b"{}"])
def test_empty_object_parses(text: str | bytes) -> None:
    assert parse_netconf(text, SOURCE) == NetConf(backend_type="udp")


def test_default_text() -> None:
    conf = validate(parse_netconf(DEFAULT_NETCONF, SOURCE), SOURCE)
    assert conf.network == IPv4Network("10.244.0.0/16")
    assert (conf.backend_type, conf.subnet_len) == ("vxlan", 24)


# --- boundaries of the derived values ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "length"), [(8, 24), (16, 24), (21, 24), (22, 24), (23, 25), (27, 29), (28, 30), (29, None)]
)
def test_ipv4_automatic_length(prefix: int, length: int | None) -> None:
    network = str(IPv4Network((IPv4Address("10.0.0.0"), prefix)))
    if length is None:
        message = refusal(json.dumps({"Network": network}), check=True)
        assert f"Network {network}" in message
        assert "too small: it must be /28 or wider" in message
    else:
        assert valid(Network=network).subnet_len == length


@pytest.mark.parametrize(
    ("prefix", "length"), [(48, 64), (61, 64), (62, 64), (63, 65), (124, 126), (125, None), (128, None)]
)
def test_ipv6_automatic_length(prefix: int, length: int | None) -> None:
    network = f"fd00::/{prefix}"
    if length is None:
        message = refusal(
            json.dumps({"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": network}), check=True
        )
        assert f"IPv6Network {network}" in message
        assert "/124 or wider" in message
    else:
        assert v6(IPv6Network=network).ipv6_subnet_len == length


@pytest.mark.parametrize(
    ("network", "length", "good"),
    [
        ("10.0.0.0/16", 31, False),
        ("10.0.0.0/16", 30, True),
        ("10.0.0.0/16", 17, False),
        ("10.0.0.0/16", 18, True),
        ("10.0.0.0/28", 30, True),
        ("10.0.0.0/28", 29, False),
        ("10.0.0.0/29", 30, False),
        ("10.0.0.0/16", 2**64 - 1, False),
    ],
)
def test_ipv4_given_length(network: str, length: int, good: bool) -> None:
    if good:
        assert valid(Network=network, SubnetLen=length).subnet_len == length
    else:
        assert network in refusal(json.dumps({"Network": network, "SubnetLen": length}), check=True)


@pytest.mark.parametrize(("length", "good"), [(127, False), (126, True), (49, False), (50, True)])
def test_ipv6_given_length(length: int, good: bool) -> None:
    keys = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00::/48", "IPv6SubnetLen": length}
    if good:
        assert valid(**keys).ipv6_subnet_len == length
    else:
        assert f"IPv6SubnetLen {length}" in refusal(json.dumps(keys), check=True)


def test_the_top_of_the_address_space() -> None:
    """Upstream's arithmetic wraps there; the result is the same."""
    conf = valid(Network="255.255.0.0/16")
    assert conf.subnet_max == IPv4Address("255.255.255.0")
    top = v6(IPv6Network="ffff:ffff:ffff::/48")
    assert top.ipv6_subnet_max == IPv6Address("ffff:ffff:ffff:ffff::")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "Network in"),
        ({"Network": "0.0.0.0/0"}, "is not set"),
        ({"EnableIPv6": True, "Network": "10.3.0.0/16"}, "IPv6Network in"),
        ({"EnableIPv6": True, "Network": "10.3.0.0/16", "IPv6Network": "::/0"}, "EnableIPv6 to false"),
        ({"EnableIPv4": False}, "both false"),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.2.0.0"}, "SubnetMin 10.2.0.0 in"),
        ({"Network": "10.3.0.0/16", "SubnetMax": "10.4.0.0"}, "must be in 10.3.0.0/16"),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.3.1.128"}, "10.3.1.0 would be the nearest"),
        ({"Network": "10.3.0.0/16", "SubnetMax": "10.3.1.1"}, "SubnetMax 10.3.1.1 in"),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.3.9.0", "SubnetMax": "10.3.8.0"}, "is above"),
        ({"Network": "10.3.0.0/16", "SubnetMax": "10.3.0.0"}, "SubnetMin 10.3.1.0 in"),
    ],
)
def test_refused_by_validation(keys: dict[str, object], words: str) -> None:
    assert words in refusal(json.dumps(keys), check=True)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ("fe00::", None, "IPv6SubnetMin fe00:: in"),
        (None, "fd00:0:1::", "IPv6SubnetMax fd00:0:1:: in"),
        ("fd00::1", None, "fd00:: would be the nearest"),
        ("fd00:0:0:2::", "fd00:0:0:1::", "is above"),
    ],
)
def test_refused_ipv6_bounds(low: str | None, high: str | None, words: str) -> None:
    keys: dict[str, object] = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00::/48"}
    keys |= {"IPv6SubnetMin": low, "IPv6SubnetMax": high}
    assert words in refusal(json.dumps(keys), check=True)


def test_one_subnet_between_equal_bounds() -> None:
    conf = valid(Network="10.3.0.0/16", SubnetMin="10.3.7.0", SubnetMax="10.3.7.0")
    assert conf.subnet_min == conf.subnet_max == IPv4Address("10.3.7.0")


@given(
    address=st.integers(2**24, 2**32 - 1),
    prefix=st.integers(1, 28),
    extra=st.integers(2, 30),
    auto=st.booleans(),
)
def test_ipv4_bounds_agree_with_netaddr(address: int, prefix: int, extra: int, auto: bool) -> None:
    length = 0 if auto else min(prefix + extra, 30)
    conf = valid(Network=f"{IPv4Address(address)}/{prefix}", SubnetLen=length)
    whole = netaddr.IPNetwork(f"{IPv4Address(address)}/{prefix}").cidr
    second = next(islice(whole.subnet(conf.subnet_len), 1, 2))
    last = netaddr.IPNetwork(f"{whole[-1]}/{conf.subnet_len}").cidr
    assert str(conf.network) == str(whole)
    assert (str(conf.subnet_min), str(conf.subnet_max)) == (str(second.network), str(last.network))
    if auto:
        assert len(list(islice(whole.subnet(conf.subnet_len), 4))) == 4


@given(
    address=st.integers(2**124, 2**128 - 1),
    prefix=st.integers(1, 124),
    extra=st.integers(2, 126),
    auto=st.booleans(),
)
def test_ipv6_bounds_agree_with_netaddr(address: int, prefix: int, extra: int, auto: bool) -> None:
    length = 0 if auto else min(prefix + extra, 126)
    conf = v6(IPv6Network=f"{IPv6Address(address)}/{prefix}", IPv6SubnetLen=length)
    whole = netaddr.IPNetwork(f"{IPv6Address(address)}/{prefix}").cidr
    second = next(islice(whole.subnet(conf.ipv6_subnet_len), 1, 2))
    last = netaddr.IPNetwork((whole.last, 128), version=6).supernet(conf.ipv6_subnet_len)[0]
    assert conf.ipv6_subnet_min is not None
    assert conf.ipv6_subnet_max is not None
    assert int(conf.ipv6_subnet_min) == int(second.network)
    assert int(conf.ipv6_subnet_max) == int(last.network)


# --- JSON as Go reads it ----------------------------------------------------------------------------


def test_keys_in_any_case_last_wins_unknown_ignored() -> None:
    text = (
        '{"NETWORK": "10.1.0.0/16", "network": "10.2.0.0/16", "Networks": 5, "enableipv6": true, '
        '"ipv6NETWORK": "fd00::1/48", "ENABLENFTABLES": true, "EnableNFTables": null, "subnetlen": 20, '
        '"backend": {"type": "VXLAN", "VNI": 7}}'
    )
    conf = parse_netconf(text, SOURCE)
    assert conf.network == IPv4Network("10.2.0.0/16")
    assert conf.ipv6_network == IPv6Network("fd00::/48")
    assert (conf.enable_ipv6, conf.enable_nftables, conf.subnet_len) == (True, True, 20)
    assert conf.backend_type == "VXLAN"
    assert backend_key(conf) == "vxlan"
    assert conf.backend["VNI"] == 7


def test_host_bits_are_masked() -> None:
    assert parsed(Network="10.3.9.9/16").network == IPv4Network("10.3.0.0/16")


def test_zero_addresses_mean_automatic() -> None:
    conf = parsed(SubnetMin="0.0.0.0", SubnetMax="0.0.0.0", IPv6SubnetMin="::", SubnetLen=0)
    assert conf == NetConf()


@pytest.mark.parametrize(
    ("backend", "name"),
    [({}, ""), (None, ""), ({"Type": None}, ""), ({"VNI": 1}, ""), ({"Type": "host-gw"}, "host-gw")],
)
def test_backend_type(backend: object, name: str) -> None:
    assert parsed(Backend=backend).backend_type == name


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("Network", "fd00::/48", "an IPv4 range"),
        ("Network", None, "an IPv4 range"),
        ("Network", "10.3.0.0", "an IPv4 range"),
        ("Network", "10.3.0.0/255.255.0.0", "an IPv4 range"),
        ("Network", "10.3.0.0/33", "an IPv4 range"),
        ("Network", "10.03.0.0/16", "an IPv4 range"),
        ("Network", "", "an IPv4 range"),
        ("Network", " 10.3.0.0/16", "an IPv4 range"),
        ("Network", 10, "an IPv4 range"),
        ("Network", ["10.3.0.0/16"], "an IPv4 range"),
        ("IPv6Network", None, "an IPv6 range"),
        ("IPv6Network", "10.3.0.0/16", "an IPv6 range"),
        ("IPv6Network", "fe80::%eth0/64", "an IPv6 range"),
        ("SubnetMin", None, "an IPv4 address"),
        ("SubnetMin", "fd00::", "an IPv4 address"),
        ("SubnetMax", None, "an IPv4 address"),
        ("SubnetMax", "", "an IPv4 address"),
        ("IPv6SubnetMin", "10.3.0.0", "an IPv6 address"),
        ("IPv6SubnetMax", "fe80::1%eth0", "an IPv6 address"),
        ("SubnetLen", "24", "a whole number"),
        ("SubnetLen", 24.0, "a whole number"),
        ("SubnetLen", -1, "a whole number"),
        ("SubnetLen", 2**64, "a whole number"),
        ("IPv6SubnetLen", True, "to 126"),
        ("EnableIPv4", "true", "true or false"),
        ("EnableIPv6", 1, "true or false"),
        ("EnableNFTables", [], "true or false"),
        ("Backend", "vxlan", "an object"),
        ("Backend", [], "an object"),
    ],
)
def test_wrong_values_are_named(key: str, value: object, right: str) -> None:
    message = refusal(json.dumps({key: value}))
    assert message.startswith(f"{key} in {SOURCE} is ")
    assert right in message
    if isinstance(value, str):
        assert json.dumps(value) in message


def test_wrong_backend_type_is_named() -> None:
    assert refusal('{"Backend": {"Type": 5}}').startswith(f"Backend.Type in {SOURCE} is number 5: ")


@pytest.mark.parametrize(
    "key", ["SubnetLen", "EnableIPv4", "EnableNFTables", "IPv6SubnetMin", "IPv6SubnetMax"]
)
def test_null_leaves_the_default(key: str) -> None:
    assert parsed(**{key: None}) == NetConf()


@pytest.mark.parametrize(
    "text",
    ['{"Network": "10.3.0.0/16"} x', '{"a": 1,}', "// c\n{}", "[]", '"x"', "{'a': 1}", '{"a": NaN}', "{"],
)
def test_not_a_json_object(text: str) -> None:
    assert "JSON" in refusal(text)


def test_a_huge_value_does_not_fill_the_log() -> None:
    assert len(refusal(json.dumps({"Network": "1" * 100000}))) < 300
    assert len(refusal('{"SubnetLen": ' + "1" * 300 + "}")) < 300
    assert len(refusal("[" * 100000)) < 300


def test_parse_cidr() -> None:
    assert parse_cidr("1.2.3.4/24", IPv4Network) == IPv4Network("1.2.3.0/24")
    assert parse_cidr("fc00:1::5/64", IPv6Network) == IPv6Network("fc00:1::/64")
    for text in ("2001:db8::/64", "1.2.3.0/24\n", "1.2.3.0/٢٤", "1.2.3.0/", "/24", "1.2.3.0/-1", "1.2.3/24"):
        with pytest.raises(ValueError, match=r".+"):
            parse_cidr(text, IPv4Network)


KEYS = ["Network", "IPv6Network", "SubnetLen", "SubnetMin", "SubnetMax", "IPv6SubnetLen", "IPv6SubnetMin"]
KEYS += ["IPv6SubnetMax", "EnableIPv4", "EnableIPv6", "EnableNFTables", "Backend", "Type"]
SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=10),
    st.sampled_from(
        ["10.3.0.0/16", "10.3.0.0/29", "10.3.4.0", "fd00::/48", "fd00:0:0:4::", "::/0", "0.0.0.0/0"]
    ),
    st.integers(0, 130),
)
NAMES = st.sampled_from(KEYS) | st.sampled_from(KEYS).map(str.lower) | st.text(max_size=4)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
TEXTS = st.text() | st.binary() | VALUES.map(json.dumps) | st.dictionaries(NAMES, VALUES).map(json.dumps)


@given(TEXTS)
@example('{"Network": "\\ud800"}')
@example('{"Network": ' + "[" * 500 + "]" * 500 + "}")
@example('{"EnableIPv4": "\\u2028"}')
@example("9" * 5000)
@example("\ufeff{}")
def test_only_config_errors(text: str | bytes) -> None:
    message = ""
    try:
        checked = validate(parse_netconf(text, SOURCE), SOURCE)
    except ConfigError as exc:
        message = str(exc)
    else:
        assert validate(checked, SOURCE) == checked
    assert "\n" not in message
