"""Upstream's vectors of address arithmetic (pkg/ip), put to the code that needs it.

Upstream has types of its own for addresses. Here they are `ipaddress`'s, so what is asked is what reads and
writes them: leases, the configuration, the choice of a subnet, subnet.env. The vectors of each of these
(keys, net-conf.json, interface choice, ...) are in its own tests.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Address, IPv6Network

import pytest

from cni.errors import ConfigError
from flanneld.config import NetConf, parse_cidr, parse_netconf, validate
from flanneld.lease import Attributes, Lease
from flanneld.subnet import allocate, envfile


def test_an_ipv4_address_in_json() -> None:
    text = '{"PublicIP":"1.2.3.4","PublicIPv6":null}'
    attrs = Attributes.decode(text)
    assert attrs.public_ip is not None
    assert list(attrs.public_ip.packed) == [1, 2, 3, 4]
    assert attrs.encode() == text
    with pytest.raises(ValueError, match="2001:db8::1"):
        Attributes.decode('{"PublicIP":"2001:db8::1"}')


@pytest.mark.parametrize(
    "text",
    [
        "fc00::1",
        "2001:db8::",
        # Upstream keeps these as big integers, and prints the first two as IPv4 addresses.
        "::102:304",
        "::ffff:102:304",
        "::1",
    ],
)
def test_an_ipv6_address_in_json(text: str) -> None:
    value = f'{{"PublicIP":"0.0.0.0","PublicIPv6":"{text}"}}'
    attrs = Attributes.decode(value)
    assert attrs.public_ipv6 == IPv6Address(text)
    assert attrs.encode() == value


def test_networks_in_text() -> None:
    assert str(parse_cidr("1.2.3.0/24", IPv4Network)) == "1.2.3.0/24"
    assert str(parse_cidr("fc00:1::/64", IPv6Network)) == "fc00:1::/64"
    with pytest.raises(ValueError, match="2001:db8"):
        parse_cidr("2001:db8::/64", IPv4Network)


@pytest.mark.parametrize(("text", "empty"), [("::/0", True), ("::/64", False), ("fc00:1::/64", False)])
def test_an_empty_ipv6_network(text: str, empty: bool) -> None:
    conf = parse_netconf(f'{{"EnableIPv6": true, "IPv6Network": "{text}"}}', "test")
    assert (conf.ipv6_network is None) is empty
    assert parse_netconf("{}", "test").ipv6_network is None


@pytest.mark.parametrize(
    ("one", "other", "overlaps"),
    [
        ("1.2.3.0/24", "1.2.3.0/24", True),
        ("1.2.3.0/24", "1.2.0.0/16", True),
        ("1.2.3.0/24", "1.2.4.0/24", False),
        ("1.2.3.0/24", "7.2.4.0/22", False),
        ("fc00:1::/64", "fc00:1::/64", True),
        ("fc00:1::/64", "fc00::/16", True),
        ("fc00:1::/64", "fc00:2::/64", False),
        ("fc00:1::/64", "fb00:2::/48", False),
    ],
)
def test_overlap(one: str, other: str, overlaps: bool) -> None:
    def lease(text: str) -> Lease:
        if ":" in text:
            return Lease(None, IPv6Network(text), Attributes())
        return Lease(IPv4Network(text), None, Attributes())

    assert bool(allocate.taker(lease(one), [lease(other)])) is overlaps
    assert bool(allocate.taker(lease(other), [lease(one)])) is overlaps


@pytest.mark.parametrize(
    ("keys", "contained"),
    [
        ('"Network": "1.2.3.0/24", "SubnetLen": 30, "SubnetMin": "1.2.3.4"', True),
        ('"Network": "1.2.3.0/24", "SubnetLen": 30, "SubnetMin": "1.2.4.0"', False),
        ('"Network": "1.2.3.0/24", "SubnetLen": 30, "SubnetMin": "1.2.3.0"', True),
        ('"IPv6Network": "fc00:1::/64", "IPv6SubnetLen": 126, "IPv6SubnetMin": "fc00:1::"', True),
        ('"IPv6Network": "fc00:1::/64", "IPv6SubnetLen": 126, "IPv6SubnetMin": "fc00:1::4"', True),
        ('"IPv6Network": "fc00:1::/64", "IPv6SubnetLen": 126, "IPv6SubnetMin": "fc00:2::"', False),
    ],
)
def test_a_network_contains_an_address(keys: str, contained: bool) -> None:
    family = '"EnableIPv4": false, "EnableIPv6": true, ' if "IPv6" in keys else ""
    conf = parse_netconf(f"{{{family}{keys}}}", "test")
    if contained:
        assert validate(conf, "test").enable_ipv6 is bool(family)
    else:
        with pytest.raises(ConfigError, match="is outside of the network"):
            validate(conf, "test")


def test_the_address_after_the_first() -> None:
    conf = NetConf(network=IPv4Network("1.2.0.0/16"), ipv6_network=IPv6Network("fc00::/16"), enable_ipv6=True)
    lease = Lease(IPv4Network("1.2.3.0/24"), IPv6Network("fc00:1::/64"), Attributes())
    lines = envfile.render(conf, lease, 1450, False).splitlines()
    assert "FLANNEL_SUBNET=1.2.3.1/24" in lines
    assert "FLANNEL_IPV6_SUBNET=fc00:1::1/64" in lines
