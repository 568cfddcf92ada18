"""Nodes as leases: the annotation keys, what peers publish, what we publish, and the table of all nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni.errors import ConfigError, StoreUnavailable
from flanneld.config import NetConf, parse_netconf
from flanneld.lease import Attributes, Change, Lease, LeaseSet, Snapshot
from flanneld.subnet.nodes import (
    Annotations,
    Event,
    Node,
    Table,
    annotation_keys,
    annotation_prefix,
    annotations_patch,
    condition_patch,
    own_subnets,
    published,
    read_lease,
    rivals,
    stored_lease,
    subnets,
)

MAC = '{"VNI":1,"VtepMAC":"aa:bb:cc:dd:ee:ff"}'
V4 = parse_netconf('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}', "test")
V6 = parse_netconf('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "2001:db8:1234::/48"}', "test")
DUAL = parse_netconf(
    '{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "2001:db8:1234::/48"}', "test"
)
SOURCE = "/etc/kube-flannel/net-conf.json"


def node(
    name: str, *pod_cidrs: str, created: str = "", ready: bool = True, **annotations: str | None
) -> Node:
    """A node that flannel manages, with IPv4 vxlan annotations unless others are given."""
    number = sum(name.encode()) % 250
    usual: dict[str, str | None] = {
        "kube_subnet_manager": "true",
        "backend_type": "vxlan",
        "backend_data": MAC,
        "public_ip": f"192.168.0.{number}",
    }
    return Node(name, created, pod_cidrs, Annotations(**{**usual, **annotations}), ready)


def with_(of: Node, **annotations: str | None) -> Node:
    return dataclasses.replace(of, annotations=of.annotations._replace(**annotations))


def dual(name: str, number: int, **annotations: str | None) -> Node:
    plain = node(name, f"10.244.{number}.0/24", f"2001:db8:1234:{number:x}::/64")
    return with_(plain, **{"public_ipv6": f"fd00::{number:x}", "backend_v6_data": MAC, **annotations})


A, B = node("a", "10.244.1.0/24"), node("b", "10.244.2.0/24")
A_IP = "192.168.0.97"


# The annotation prefix


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/backend-type"),
        ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/backend-type"),
        ("flannel.alpha.coreos.com/prefix", "flannel.alpha.coreos.com/prefix-backend-type"),
        ("flannel.alpha.coreos.com/prefix-", "flannel.alpha.coreos.com/prefix-backend-type"),
        ("org.com", "org.com/backend-type"),
        ("org9.com", "org9.com/backend-type"),
        ("org.com/9", "org.com/9-backend-type"),
        ("X.org.com/a_b", "X.org.com/a_b-backend-type"),  # upstream looks at the end only
    ],
)
def test_prefixes(flag: str, key: str) -> None:
    assert annotation_keys(annotation_prefix(flag))["backend_type"] == key


@pytest.mark.parametrize(
    "flag", ["org", "org/", "org/prefix", "org.COM", "org.com/PREFIX", "a.b/c/d", "a.b/c/", "", "/", "a.b\n"]
)
def test_prefixes_that_make_no_keys(flag: str) -> None:
    with pytest.raises(ConfigError, match="--kube-annotation-prefix="):
        annotation_prefix(flag)


def test_every_key() -> None:
    assert sorted(annotation_keys("a.b/").values()) == [
        "a.b/backend-data",
        "a.b/backend-type",
        "a.b/backend-v6-data",
        "a.b/kube-subnet-manager",
        "a.b/node-public-ip",
        "a.b/node-public-ipv6",
        "a.b/public-ip",
        "a.b/public-ip-overwrite",
        "a.b/public-ipv6",
        "a.b/public-ipv6-overwrite",
    ]


# podCIDRs

CONTAINED = [
    ("10.244.0.0/16", "10.244.0.0/16", True),
    ("10.244.0.0/16", "10.244.0.0/24", True),
    ("10.244.0.0/16", "10.244.255.0/24", True),
    ("10.244.0.0/16", "10.244.0.0/15", False),
    ("10.244.0.0/16", "192.168.0.0/24", False),
    ("2001:db8:1234::/48", "2001:db8:1234::/48", True),
    ("2001:db8:1234::/48", "2001:db8:1234::/64", True),
    ("2001:db8:1234::/48", "2001:db8:1234:ffff::/64", True),
    ("2001:db8:1234::/48", "2001:db8:1234::/47", False),
    ("2001:db8:1234::/48", "fe02::/32", False),
]


@pytest.mark.parametrize(("outer", "inner", "contained"), CONTAINED)
def test_containment_of_our_own_range_and_of_peers(outer: str, inner: str, contained: bool) -> None:
    config = V6 if ":" in outer else V4
    own = node("n1", inner, public_ipv6="fd00::1", backend_v6_data=MAC)
    lease, problem = read_lease(own, config)
    if contained:
        assert str(next(n for n in own_subnets(own, config, SOURCE) if n)) == inner
        assert lease is not None and not problem
        return
    wanted = rf"podCIDR .* of node n1 is outside of (IPv6)?Network {outer} in {SOURCE}: .*--cluster-cidr"
    with pytest.raises(ConfigError, match=wanted):
        own_subnets(own, config, SOURCE)
    assert lease is None and problem.endswith(f"outside of the network {outer}")


@pytest.mark.parametrize(
    ("cidrs", "expected"),
    [
        ((), (None, None)),
        (("10.1.2.0/24",), ("10.1.2.0/24", None)),
        (("10.1.2.7/24", "fd00::7/64"), ("10.1.2.0/24", "fd00::/64")),
        (("fd00::/64", "10.1.2.0/24"), ("10.1.2.0/24", "fd00::/64")),
    ],
)
def test_ranges_of_a_node(cidrs: tuple[str, ...], expected: tuple[str | None, str | None]) -> None:
    v4, v6 = expected
    assert subnets(cidrs) == (IPv4Network(v4) if v4 else None, IPv6Network(v6) if v6 else None)


BAD_RANGES = [
    ("10.1.2.0/24", "10.1.3.0/24"),
    ("fd00::/64", "fd01::/64"),
    ("10.1.2.0/24", "fd00::/64", "10.1.3.0/24"),
    ("10.1.2.0",),
    ("10.1.2.0/33",),
    ("10.1.2.0/255.255.255.0",),
    ("",),
    ("rubbish",),
    (":",),
]


@pytest.mark.parametrize("cidrs", BAD_RANGES)
def test_ranges_that_are_none(cidrs: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="node n1"):
        own_subnets(node("n1", *cidrs), V4, SOURCE)
    lease, problem = read_lease(node("n1", *cidrs), V4)
    assert lease is None and problem


def test_a_node_without_a_range_is_waited_for_and_told_how() -> None:
    with pytest.raises(StoreUnavailable) as caught:
        own_subnets(node("n1"), DUAL, SOURCE)
    text = str(caught.value)
    for part in (
        "node n1 has no podCIDR",
        "--allocate-node-cidrs=true",
        "--cluster-cidr",
        "--pod-network-cidr",
        """kubectl patch node n1 -p '{"spec":{"podCIDR":"10.244.1.0/24","""
        """"podCIDRs":["10.244.1.0/24","2001:db8:1234:1::/64"]}}'""",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("config", "cidr", "lacks"),
    [(V4, "fd00::/64", "IPv4"), (V6, "10.244.1.0/24", "IPv6"), (DUAL, "10.244.1.0/24", "IPv6")],
)
def test_an_enabled_family_without_a_range(config: NetConf, cidr: str, lacks: str) -> None:
    with pytest.raises(ConfigError, match=rf"Enable{lacks} is true in {SOURCE}, but node n1 has only {cidr}"):
        own_subnets(node("n1", cidr), config, SOURCE)


def test_a_range_of_a_disabled_family_is_left_alone() -> None:
    assert own_subnets(dual("n1", 1), V4, SOURCE) == (IPv4Network("10.244.1.0/24"), None)
    assert own_subnets(dual("n1", 1), V6, SOURCE) == (None, IPv6Network("2001:db8:1234:1::/64"))


# Peers


@pytest.mark.parametrize(
    ("config", "peer", "key", "attrs"),
    [
        (V4, A, "10.244.1.0-24", (A_IP, None, "vxlan", MAC, "")),
        (V4, dual("a", 1), "10.244.1.0-24", (A_IP, None, "vxlan", MAC, "")),
        (V6, dual("a", 1), "2001:db8:1234:1::-64", (None, "fd00::1", "vxlan", "", MAC)),
        (DUAL, dual("a", 1), "10.244.1.0-24&2001:db8:1234:1::-64", (A_IP, "fd00::1", "vxlan", MAC, MAC)),
        # One family is enough, whatever the other lacks.
        (DUAL, A, "10.244.1.0-24", (A_IP, None, "vxlan", MAC, "")),
        (DUAL, dual("a", 1, public_ip=None), "2001:db8:1234:1::-64", (None, "fd00::1", "vxlan", "", MAC)),
        (
            DUAL,
            dual("a", 1, backend_type="host-gw", backend_data="null", public_ip="0.0.0.0"),
            "2001:db8:1234:1::-64",
            (None, "fd00::1", "host-gw", "", MAC),
        ),
        # What upstream's other backends write.
        (V4, with_(A, backend_type="", backend_data="null"), "10.244.1.0-24", (A_IP, None, "", "", "")),
        (V4, with_(A, backend_type=None, backend_data=None), "10.244.1.0-24", (A_IP, None, "", "", "")),
        (V4, with_(A, backend_type="ipip", backend_data=""), "10.244.1.0-24", (A_IP, None, "ipip", "", "")),
        (V4, with_(A, backend_data='{ "a" : 1 }'), "10.244.1.0-24", (A_IP, None, "vxlan", '{ "a" : 1 }', "")),
    ],
)  # fmt: skip
def test_what_a_peer_publishes(
    config: NetConf, peer: Node, key: str, attrs: tuple[str | None, str | None, str, str, str]
) -> None:
    lease, problem = read_lease(peer, config)
    assert lease is not None and not problem
    assert lease.key == key
    ip, ip6, *rest = attrs
    assert lease.attrs == Attributes(
        IPv4Address(ip) if ip else None, IPv6Address(ip6) if ip6 else None, *rest
    )
    assert (lease.expires_s, lease.revision) == (0, 0)


@pytest.mark.parametrize("value", [None, "", "True", "TRUE", "1", "false", " true"])
def test_only_true_is_true(value: str | None) -> None:
    assert read_lease(node("a", "10.244.1.0/24", kube_subnet_manager=value), V4) == (None, "")


RUBBISH = [
    (V4, node("a", "10.244.1.0/24", public_ip="rubbish"), "public-ip is 'rubbish'"),
    (V4, node("a", "10.244.1.0/24", public_ip="fd00::1"), "public-ip is 'fd00::1'"),
    (V4, node("a", "10.244.1.0/24", public_ip="224.0.0.1"), "public-ip is 224.0.0.1"),
    (V4, node("a", "10.244.1.0/24", public_ip="255.255.255.255"), "255.255.255.255"),
    (V4, node("a", "10.244.1.0/24", public_ip="127.0.0.1"), "127.0.0.1"),
    (V4, node("a", "10.244.1.0/24", public_ip=""), "no complete IPv4 lease"),
    (V4, node("a", "10.244.1.0/24", public_ip=None), "no complete IPv4 lease"),
    (V4, node("a", "10.244.1.0/24", public_ip="0.0.0.0"), "no complete IPv4 lease"),
    (V4, node("a"), "podCIDRs [], "),
    (V4, node("a", "2001:db8:1234::/64"), "podCIDRs [2001:db8:1234::/64]"),
    (V4, node("a", "0.0.0.0/0"), "outside of the network"),
    (V4, node("a", "10.244.1.0/24", backend_data="{"), "is not JSON"),
    (V4, node("a", "10.244.1.0/24", backend_data="x" * 1000), "is not JSON"),
    (V4, node("a", "10.244.1.0/24", backend_data='{"VNI":NaN}'), "is not JSON"),
    (V4, node("a", "10.244.1.0/24", backend_data="[" * 700 + "]" * 700), "nested too deeply"),
    (V4, node("a", "10.244.1.0/24", backend_data="[" * 5000 + "]" * 5000), "is not JSON"),
    (V6, node("a", "2001:db8:1234::/64", public_ipv6="1.2.3.4"), "public-ipv6 is '1.2.3.4'"),
    (V6, node("a", "2001:db8:1234::/64", public_ipv6="fe80::1%eth0"), "public-ipv6 is 'fe80::1%eth0'"),
    (DUAL, node("a", "10.244.1.0/24", public_ip="x"), "public-ip is 'x'"),
]


@pytest.mark.parametrize(("config", "peer", "says"), RUBBISH)
def test_rubbish_is_no_lease_and_says_why(config: NetConf, peer: Node, says: str) -> None:
    lease, problem = read_lease(peer, config)
    assert lease is None
    assert says in problem
    assert len(problem) < 400


@pytest.mark.parametrize(
    ("peer", "key", "says"),
    [
        (dual("a", 1, public_ipv6="x"), "10.244.1.0-24", "public-ipv6 is 'x'"),
        (dual("a", 1, backend_data="x"), "2001:db8:1234:1::-64", "is not JSON"),
        (node("a", "10.244.1.0/24", "fd00::/64", public_ipv6="fd00::1"), "10.244.1.0-24", "fd00::/64"),
    ],
)  # fmt: skip
def test_a_bad_family_does_not_cost_the_other(peer: Node, key: str, says: str) -> None:
    lease, problem = read_lease(peer, DUAL)
    assert lease is not None and lease.key == key
    assert says in problem


SEEDS = [
    ("192.168.0.1", "10.244.1.0/24"),
    ("", "2001:db8:1234::/64"),
    ("garbage", "garbage"),
    ("192.168.0.1", "2001:db8:1234::/64"),
    ("fd00::1", "10.244.1.0/24"),
]
ANY = st.none() | st.text(max_size=40) | st.sampled_from([text for seed in SEEDS for text in seed] + [MAC])


@given(
    st.sampled_from([V4, V6, DUAL]),
    st.lists(st.text(max_size=20) | st.sampled_from([seed[1] for seed in SEEDS]), max_size=4),
    st.tuples(*[ANY] * 6),
)
def test_no_text_in_a_node_breaks_anything(
    config: NetConf, cidrs: list[str], texts: tuple[str | None, ...]
) -> None:
    """Whatever is let through is a lease that the other stores could hold as well."""
    peer = Node("a", "", tuple(cidrs), Annotations("true", *texts[1:]))
    stored_lease(peer)
    lease, problem = read_lease(peer, config)
    assert lease is not None or problem
    if lease is not None:
        assert lease.key
        again = Attributes.decode(lease.attrs.encode())
        assert (again.public_ip, again.public_ipv6) == (lease.attrs.public_ip, lease.attrs.public_ipv6)
        assert again.backend_type == lease.attrs.backend_type


# Our own node

PREFIX = "flannel.alpha.coreos.com/"
KEYS = annotation_keys(PREFIX)
BARE = Node("n1", "", ("10.244.1.0/24",))
IP, IP6 = IPv4Address("192.168.64.3"), IPv6Address("fd01::3")
WG = '{"PublicKey":"<base64>","Port":51820}'


@pytest.mark.parametrize(
    ("attrs", "expected"),
    [
        (
            Attributes(IP, None, "vxlan", MAC),
            {"backend-type": "vxlan", "backend-data": MAC, "public-ip": "192.168.64.3"},
        ),
        (
            Attributes(IP, IP6, "vxlan", MAC, MAC),
            {
                "backend-type": "vxlan",
                "backend-data": MAC,
                "backend-v6-data": MAC,
                "public-ip": "192.168.64.3",
                "public-ipv6": "fd01::3",
            },
        ),
        (
            Attributes(None, IP6, "vxlan", "", MAC),
            {"backend-type": "vxlan", "backend-v6-data": MAC, "public-ipv6": "fd01::3"},
        ),
        # --public-ipv6 in an IPv4 cluster.
        (
            Attributes(IP, IP6, "vxlan", MAC),
            {"backend-type": "vxlan", "backend-data": MAC, "public-ip": "192.168.64.3"},
        ),
        (
            Attributes(IP, None, "host-gw"),
            {"backend-type": "host-gw", "backend-data": "null", "public-ip": "192.168.64.3"},
        ),
        (
            Attributes(None, IP6, "host-gw"),
            {
                "backend-type": "host-gw",
                "backend-data": "null",
                "backend-v6-data": "null",
                "public-ip": "0.0.0.0",
                "public-ipv6": "fd01::3",
            },
        ),
        (
            Attributes(None, IP6, "wireguard", "", WG),
            {
                "backend-type": "wireguard",
                "backend-data": "null",
                "backend-v6-data": WG,
                "public-ip": "0.0.0.0",
                "public-ipv6": "fd01::3",
            },
        ),
        (
            Attributes(IP, IP6, "wireguard", WG),
            {"backend-type": "wireguard", "backend-data": WG, "public-ip": "192.168.64.3"},
        ),
        (
            Attributes(IP, IP6, "ipip"),
            {"backend-type": "ipip", "backend-data": "null", "public-ip": "192.168.64.3"},
        ),
        (Attributes(IP), {"backend-type": "", "backend-data": "null", "public-ip": "192.168.64.3"}),
        (
            Attributes(IP, None, "extension"),
            {"backend-type": "extension", "backend-data": "", "public-ip": "192.168.64.3"},
        ),
        (
            Attributes(IP, IP6, "extension", '"out\\n"'),
            {
                "backend-type": "extension",
                "backend-data": '"out\\n"',
                "backend-v6-data": "null",
                "public-ip": "192.168.64.3",
                "public-ipv6": "fd01::3",
            },
        ),
    ],
)
def test_what_each_backend_publishes(attrs: Attributes, expected: dict[str, str]) -> None:
    wanted = published(BARE, attrs)
    told = {KEYS[name]: text for name, text in wanted._asdict().items() if text is not None}
    assert told == {PREFIX + key: text for key, text in expected.items()} | {
        PREFIX + "kube-subnet-manager": "true"
    }


def test_the_bytes_of_the_patch() -> None:
    """As Go's encoder writes a map: sorted keys, no spaces, `<`, `>` and `&` escaped."""
    wanted = published(BARE, Attributes(IP, None, "wireguard", WG))
    assert annotations_patch(BARE.annotations, wanted, KEYS) == (
        '{"metadata":{"annotations":{'
        r'"flannel.alpha.coreos.com/backend-data":"{\"PublicKey\":\"\u003cbase64\u003e\",\"Port\":51820}",'
        '"flannel.alpha.coreos.com/backend-type":"wireguard",'
        '"flannel.alpha.coreos.com/kube-subnet-manager":"true",'
        '"flannel.alpha.coreos.com/public-ip":"192.168.64.3"}}}'
    )


def test_the_patch_holds_what_differs_and_nothing_else() -> None:
    wanted = published(BARE, Attributes(IP, None, "vxlan", MAC))
    assert annotations_patch(wanted, wanted, KEYS) == ""
    # What somebody else wrote beside it is left as it is.
    have = wanted._replace(backend_v6_data="old", node_public_ip="1.1.1.1", public_ip="192.168.64.9")
    assert annotations_patch(have, wanted, KEYS) == (
        '{"metadata":{"annotations":{"flannel.alpha.coreos.com/public-ip":"192.168.64.3"}}}'
    )
    spaced = wanted._replace(backend_data=MAC.replace(",", ", "))
    assert annotations_patch(spaced, wanted, KEYS) == (
        r'{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-data":'
        r'"{\"VNI\":1,\"VtepMAC\":\"aa:bb:cc:dd:ee:ff\"}"}}}'
    )


def test_an_overwrite_is_published_in_place_of_the_public_ip() -> None:
    own = dataclasses.replace(
        BARE, annotations=Annotations(public_ip_overwrite="172.18.0.2", public_ipv6_overwrite="FD02::0:1")
    )
    wanted = published(own, Attributes(IP, IP6, "vxlan", MAC, MAC))
    assert (wanted.public_ip, wanted.public_ipv6) == ("172.18.0.2", "FD02::0:1")
    # Not used, so not looked at.
    assert published(own, Attributes(IP, None, "vxlan", MAC)).public_ipv6 is None


@pytest.mark.parametrize(
    ("overwrite", "says"),
    [
        (
            {"public_ip_overwrite": "nonsense"},
            "annotation public-ip-overwrite of node n1 is 'nonsense'.*IPv4",
        ),
        ({"public_ip_overwrite": "0.0.0.0"}, "public-ip-overwrite"),
        ({"public_ip_overwrite": "fd00::1"}, "public-ip-overwrite"),
        ({"public_ipv6_overwrite": "1.2.3.4"}, "annotation public-ipv6-overwrite of node n1.*IPv6"),
    ],
)
def test_an_overwrite_that_no_peer_could_use(overwrite: dict[str, str], says: str) -> None:
    own = dataclasses.replace(BARE, annotations=Annotations(**overwrite))
    with pytest.raises(ConfigError, match=says):
        published(own, Attributes(IP, IP6, "vxlan", MAC, MAC))


def test_the_condition() -> None:
    assert condition_patch("2024-06-29T14:28:35Z") == (
        '{"status":{"conditions":[{"type":"NetworkUnavailable","status":"False",'
        '"lastHeartbeatTime":"2024-06-29T14:28:35Z","lastTransitionTime":"2024-06-29T14:28:35Z",'
        '"reason":"FlannelIsUp","message":"Flannel is running on this node"}]}}'
    )


def test_a_new_address_was_not_published_before() -> None:
    """Nor does the address make the range a new one."""
    attrs = Attributes(IP, None, "vxlan", MAC)
    lease = Lease(IPv4Network("10.244.1.0/24"), None, attrs)
    own = dataclasses.replace(BARE, annotations=published(BARE, attrs)._replace(public_ip="1.1.1.1"))
    both = node("b", "10.244.1.0/24", public_ip=str(IP))
    found = rivals(own, lease, published(own, attrs), [both])
    assert [(rival.problem.partition(" ")[0], rival.published) for rival in found] == [
        ("public", False),
        ("podCIDR", True),
    ]


def test_no_address_is_nobodys() -> None:
    """Upstream's backends other than vxlan publish 0.0.0.0 on nodes that have IPv6 alone."""
    attrs = Attributes(None, IP6, "host-gw")
    lease = Lease(None, IPv6Network("2001:db8:1234:1::/64"), attrs)
    other = node("b", "2001:db8:1234:2::/64", public_ip="0.0.0.0")
    assert not list(rivals(BARE, lease, published(BARE, attrs), [other]))


def test_what_an_earlier_start_published() -> None:
    assert stored_lease(BARE) is None
    attrs = Attributes(IP, None, "vxlan", MAC)
    own = dataclasses.replace(BARE, annotations=published(BARE, attrs))
    assert stored_lease(own) == Lease(IPv4Network("10.244.1.0/24"), None, attrs)
    # The MAC outlives a node that has lost its range, and an address that cannot be read.
    odd = dataclasses.replace(own, pod_cidrs=(), annotations=own.annotations._replace(public_ip="x"))
    assert stored_lease(odd) == Lease(None, None, dataclasses.replace(attrs, public_ip=None))
    assert stored_lease(dataclasses.replace(own, pod_cidrs=("rubbish",))) == Lease(None, None, attrs)


@pytest.mark.parametrize(
    ("other", "says", "alive"),
    [
        (node("b", "10.244.1.0/24"), "of node n1 overlaps podCIDR 10.244.1.0/24 of node b", True),
        (node("b", "10.244.1.0/24", ready=False), "of node b", False),
        (node("b", "10.244.0.0/23"), "podCIDR 10.244.0.0/23 of node b", True),
        (node("b", "10.244.1.128/25"), "podCIDR 10.244.1.128/25 of node b", True),
        (node("b", "10.244.2.0/24", public_ip="192.168.64.3"), "of node n1 is already that of node b", True),
        (node("b", "10.244.2.0/24", public_ipv6="fd01::3"), "public IP fd01::3 of node n1", True),
        (node("b", "10.244.2.0/24", "2001:db8:1234:1::/64"), "podCIDR 2001:db8:1234:1::/64 of node n1", True),
    ],
)  # fmt: skip
def test_who_else_has_what_is_ours(other: Node, says: str, alive: bool) -> None:
    attrs = Attributes(IP, IP6, "vxlan", MAC, MAC)
    lease = Lease(IPv4Network("10.244.1.0/24"), IPv6Network("2001:db8:1234:1::/64"), attrs)
    own = dataclasses.replace(BARE, annotations=published(BARE, attrs))
    found = list(
        rivals(own, lease, own.annotations, [own, other, node("c", "10.244.3.0/24"), node("d", "x")])
    )
    assert [(rival.alive, rival.published) for rival in found] == [(alive, True)]
    assert says in found[0].problem
    again = list(rivals(with_(own, kube_subnet_manager=None), lease, own.annotations, [other]))
    assert [(rival.alive, rival.published) for rival in again] == [(alive, False)]
    unmanaged = with_(other, kube_subnet_manager=None)
    assert not list(rivals(own, lease, own.annotations, [unmanaged]))


# The table


class Seen:
    """A table, and what a consumer of its changes knows."""

    def __init__(self, config: NetConf = V4, own: str = "own") -> None:
        self.table = Table(config, own)
        self.leases = LeaseSet()
        self.problems: dict[str, str] = {}

    def put(self, *nodes: Node) -> tuple[Change, ...]:
        return self._taken(*self.table.fold(Event(n.name, n) for n in nodes))

    def drop(self, *names: str) -> tuple[Change, ...]:
        return self._taken(*self.table.fold(Event(name, None) for name in names))

    def list(self, nodes: Iterable[Node]) -> tuple[Change, ...]:
        return self._taken(*self.table.replace(nodes))

    def holders(self) -> dict[str, str]:
        """The public IP by key."""
        return {key: str(lease.attrs.public_ip) for key, lease in self.leases.by_key.items()}

    def _taken(
        self, changes: tuple[Change, ...], problems: tuple[tuple[str, str], ...]
    ) -> tuple[Change, ...]:
        self.leases = self.leases.fold(changes)
        self.problems.update(problems)
        assert dict(self.leases.by_key) == {lease.key: lease for lease in self.table.leases}
        return changes


def address(of: Node) -> str:
    return str(of.annotations.public_ip)


def test_a_heartbeat_changes_nothing() -> None:
    seen = Seen()
    assert len(seen.list([A, B])) == 2
    beat = dataclasses.replace(A, ready=False)
    assert seen.put(beat) == ()
    assert seen.put(A, B) == ()
    assert seen.list([B, beat]) == ()
    assert seen.put(Node("other", "", ("10.244.9.0/24",))) == ()
    assert seen.drop("other", "nobody") == ()


def test_changes() -> None:
    seen = Seen()
    seen.list([A, B])
    moved = with_(A, backend_data='{"VNI":2}')
    changes = seen.put(moved)
    assert [(change.key, change.lease is None) for change in changes] == [("10.244.1.0-24", False)]
    assert changes[0].lease is not None and changes[0].lease.attrs.backend_data == '{"VNI":2}'

    # Another podCIDR: the old key is gone before the new one comes.
    changes = seen.put(dataclasses.replace(moved, pod_cidrs=("10.244.7.0/24",)))
    assert [(change.key, change.lease is None) for change in changes] == [
        ("10.244.1.0-24", True),
        ("10.244.7.0-24", False),
    ]
    unmanaged = with_(B, kube_subnet_manager=None)
    assert seen.put(unmanaged) == (Change("10.244.2.0-24", None),)
    assert seen.drop("a") == (Change("10.244.7.0-24", None),)
    assert not seen.leases.by_key
    # There and back within one batch is nothing.
    seen.put(A)
    assert seen.table.fold([Event("a", moved), Event("a", None), Event("a", A)]).changes == ()


@pytest.mark.parametrize("changed", [{"backend_data": '{"VNI":2}'}, {"public_ipv6": "fd00::9"}])
def test_a_change_of_one_family_is_a_change(changed: dict[str, str]) -> None:
    seen = Seen(DUAL)
    seen.put(dual("a", 1))
    changes = seen.put(dual("a", 1, **changed))
    assert [change.key for change in changes] == ["10.244.1.0-24&2001:db8:1234:1::-64"]


def test_a_second_family_makes_another_key() -> None:
    seen = Seen(DUAL)
    seen.put(dual("a", 1, public_ipv6=None))
    assert seen.put(dual("a", 1))[0] == Change("10.244.1.0-24", None)
    assert list(seen.leases.by_key) == ["10.244.1.0-24&2001:db8:1234:1::-64"]


def test_rubbish_is_reported_once_and_the_rest_works() -> None:
    seen = Seen()
    bad = node("bad", "10.244.9.0/24", public_ip="x")
    folded = seen.table.fold([Event("a", A), Event("bad", bad), Event("b", B)])
    assert [name for name, _ in folded.problems] == ["bad"]
    assert len(folded.changes) == 2
    assert seen.table.fold([Event("bad", dataclasses.replace(bad, ready=False))]).problems == ()
    assert seen.table.fold([Event("bad", dataclasses.replace(bad, created="2"))]).problems == ()
    assert seen.table.replace([A, B, bad]).problems == ()
    good = node("bad", "10.244.9.0/24")
    assert seen.table.fold([Event("bad", good)]).problems == (("bad", ""),)
    assert seen.table.fold([Event("bad", bad)]).changes == (Change("10.244.9.0-24", None),)
    assert seen.table.fold([Event("bad", None)]).problems == (("bad", ""),)


# Two nodes with one range

OLD = node("old", "10.244.1.0/24", created="2024-01-01T00:00:00Z")
NEW = node("new", "10.244.1.0/24", created="2024-02-01T00:00:00Z")


@pytest.mark.parametrize("listed", [[OLD, NEW], [NEW, OLD]])
def test_of_two_new_nodes_the_older_has_the_range(listed: list[Node]) -> None:
    seen = Seen()
    seen.list(listed)
    assert seen.holders() == {"10.244.1.0-24": address(OLD)}
    assert seen.problems == {"new": "its podCIDR 10.244.1.0/24 overlaps that of node old, which had it first"}


def test_of_two_nodes_as_old_the_first_by_name_has_it() -> None:
    seen = Seen()
    seen.list([node("y", "10.244.1.0/24"), node("x", "10.244.1.0/24")])
    assert set(seen.problems) == {"y"}


def test_who_has_the_range_keeps_it() -> None:
    seen = Seen()
    seen.list([NEW])
    assert seen.put(OLD) == ()
    assert seen.list([OLD, NEW]) == ()
    assert seen.put(with_(NEW, backend_data="{}"))
    assert seen.holders() == {"10.244.1.0-24": address(NEW)}
    assert set(seen.problems) == {"old"}


def test_when_the_holder_goes_the_other_gets_it() -> None:
    seen = Seen()
    seen.list([OLD, NEW])
    changes = seen.drop("old")
    assert [change.key for change in changes] == ["10.244.1.0-24"]
    assert seen.holders() == {"10.244.1.0-24": address(NEW)}
    assert seen.problems["new"] == ""
    seen.put(OLD)
    # One that waits in vain changes nothing by going.
    assert seen.drop("old") == ()
    # Not by deletion alone: a change of the range, too.
    seen.put(OLD)
    changes = seen.put(dataclasses.replace(NEW, pod_cidrs=("10.244.5.0/24",)))
    assert seen.holders() == {"10.244.1.0-24": address(OLD), "10.244.5.0-24": address(NEW)}
    assert len(changes) == 2


def test_one_that_waits_may_go_as_well() -> None:
    seen = Seen()
    seen.list([OLD, NEW, node("newer", "10.244.1.0/24", created="9")])
    seen.drop("new")
    seen.put(node("newer", "10.244.1.0/24", created="9", kube_subnet_manager=None))
    assert seen.drop("old") == (Change("10.244.1.0-24", None),)


def test_several_wait_and_the_oldest_is_next() -> None:
    seen = Seen()
    first = node("first", "10.244.0.0/23")
    seen.list([first])
    seen.put(NEW, node("beside", "10.244.0.0/24"), OLD)
    assert set(seen.problems) == {"new", "beside", "old"}
    seen.drop("first")
    assert seen.holders() == {"10.244.0.0-24": address(node("beside")), "10.244.1.0-24": address(OLD)}
    assert seen.problems == {"new": seen.problems["new"], "beside": "", "old": ""}
    assert "of node old," in seen.problems["new"]


def test_ranges_of_other_sizes_overlap() -> None:
    seen = Seen()
    seen.list([A, B])
    seen.put(node("wide", "10.244.0.0/16"), node("part", "10.244.2.128/25"))
    assert set(seen.problems) == {"wide", "part"}
    assert len(seen.leases.by_key) == 2


def test_half_of_a_dual_stack_range_is_enough_to_wait_for() -> None:
    seen = Seen(DUAL)
    seen.put(dual("a", 1))
    other = dataclasses.replace(dual("b", 2), pod_cidrs=("10.244.2.0/24", "2001:db8:1234:1::/64"))
    assert seen.put(other) == ()
    assert "of node a," in seen.problems["b"]
    # The other half is free for others.
    assert len(seen.put(dual("c", 2))) == 1
    seen.drop("a")
    assert "of node c," in seen.problems["b"]


def test_our_own_node_yields_to_nobody() -> None:
    seen = Seen()
    own = node("own", "10.244.1.0/24", created="9999")
    seen.list([OLD, own])
    assert seen.holders() == {"10.244.1.0-24": address(own)}
    assert set(seen.problems) == {"old"}

    late = Seen()
    late.list([OLD, node("wide", "10.244.4.0/23")])
    changes = late.put(own)
    assert [change.lease is None for change in changes] == [False]
    assert late.holders() == {"10.244.1.0-24": address(own), "10.244.4.0-23": address(node("wide"))}
    assert "of node own," in late.problems["old"]
    # It moves, and what it leaves is free again.
    late.put(dataclasses.replace(own, pod_cidrs=("10.244.5.0/24",)))
    assert late.holders() == {"10.244.1.0-24": address(OLD), "10.244.5.0-24": address(own)}
    assert "of node own," in late.problems["wide"]


def test_our_own_range_stays_ours_while_our_node_is_away() -> None:
    """Its pods still run here; a newcomer with the range must not take their traffic."""
    seen = Seen()
    own = node("own", "10.244.1.0/24")
    seen.list([own])
    assert seen.drop("own") == (Change("10.244.1.0-24", None),)
    assert seen.put(NEW) == ()
    assert "of node own," in seen.problems["new"]
    assert [change.lease is not None for change in seen.put(own)] == [True]
    # Back with another range, it gives the old one up.
    seen.drop("own")
    changes = seen.put(node("own", "10.244.8.0/24"))
    assert len(changes) == 2
    assert seen.holders() == {"10.244.1.0-24": address(NEW), "10.244.8.0-24": address(own)}


# Laws

NAMES = ("own", "a", "b", "c", "d")
DATA = st.sampled_from([MAC, "{}", "x"])
MANAGED = st.sampled_from(["true", "true", "true", None])


@st.composite
def distinct_nodes(draw: st.DrawFn) -> Node:
    """A node in one of several states; its ranges are never those of another."""
    name = draw(st.sampled_from(NAMES))
    number = NAMES.index(name) * 10 + draw(st.integers(0, 2))
    return dual(
        name,
        number,
        backend_data=draw(DATA),
        public_ipv6=draw(st.sampled_from([None, "fd00::1", "y"])),
        kube_subnet_manager=draw(MANAGED),
    )


@given(st.lists(distinct_nodes() | st.sampled_from(NAMES), max_size=30), st.lists(st.integers(1, 5)))
def test_folding_events_gives_what_a_fresh_list_gives(steps: list[Node | str], cuts: list[int]) -> None:
    seen = Seen(DUAL)
    now: dict[str, Node] = {}
    events = [Event(step, None) if isinstance(step, str) else Event(step.name, step) for step in steps]
    for name, found in events:
        now.pop(name, None)
        if found is not None:
            now[name] = found
    while events:
        size = cuts.pop() if cuts else len(events)
        seen._taken(*seen.table.fold(events[:size]))
        events = events[size:]
    fresh = Table(DUAL, "own")
    fresh.replace(now.values())
    assert dict(seen.leases.by_key) == {lease.key: lease for lease in fresh.leases}
    assert seen.leases.by_key == LeaseSet().fold(Snapshot(fresh.leases)).by_key
    assert seen.list(now.values()) == ()


RANGES = st.sampled_from(
    ["10.244.0.0/24", "10.244.1.0/24", "10.244.0.0/23", "10.244.0.128/25", "10.244.2.0/24", "10.244.0.0/16"]
)
CLASHING = st.builds(
    lambda name, cidr, created, data, managed: node(
        name, cidr, created=created, backend_data=data, kube_subnet_manager=managed
    ),
    *(st.sampled_from(NAMES), RANGES, st.sampled_from(["1", "2"]), DATA, MANAGED),
)


@settings(max_examples=300)
@given(st.lists(CLASHING | st.sampled_from(NAMES), max_size=40))
def test_nobody_shares_a_range_and_nobody_waits_in_vain(steps: list[Node | str]) -> None:
    """Against all pairs, the slow way."""
    seen = Seen()
    now: dict[str, Node] = {}
    ours: IPv4Network | None = None
    for step in steps:
        name = step if isinstance(step, str) else step.name
        before = {lease.attrs.public_ip: lease for lease in seen.leases.by_key.values()}
        now.pop(name, None)
        if isinstance(step, str):
            seen.drop(step)
        else:
            seen.put(step)
            now[name] = step
        readable = {n: lease for n, x in now.items() if (lease := read_lease(x, V4).lease) is not None}
        held = {n: lease for n, lease in readable.items() if seen.leases.by_key.get(lease.key) == lease}
        assert len(held) == len(seen.leases.by_key)
        if "own" in readable:
            assert "own" in held
            ours = readable["own"].subnet
        taken = [(n, lease.subnet) for n, lease in held.items()]
        if ours is not None and "own" not in held:
            taken.append(("own", ours))
        pairs = [(one, two) for one in taken for two in taken if one[0] < two[0]]
        assert not any(_overlap(one[1], two[1]) for one, two in pairs)
        for waiting in readable.keys() - held.keys():
            assert any(_overlap(readable[waiting].subnet, subnet) for _, subnet in taken)
        # Who held a range and was not touched holds it still, unless it is ours now.
        for other, lease in readable.items():
            if other not in (name, "own") and lease.attrs.public_ip in before and name != "own":
                assert other in held


def _overlap(one: IPv4Network | None, two: IPv4Network | None) -> bool:
    return one is not None and two is not None and one.overlaps(two)
