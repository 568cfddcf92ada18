"""The netconf of portmap and the arithmetic of claims, without a kernel."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cni.errors import CniError
from cni.plugins.portmapconf import (
    Claim,
    Owner,
    PortMapConf,
    claims_of,
    hairpins,
    host_interfaces,
    newer_than,
    read_claim,
    winners,
)
from cni.spec.request import Request

TCP, UDP, SCTP = 6, 17, 132
A, B = 0x0A011105, 0x0A011106  # 10.1.17.5 and .6
INTERFACES = [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "sandbox": "/run/netns/x"}]
PREVIOUS: dict[str, Any] = {
    "cniVersion": "1.0.0",
    "interfaces": INTERFACES,
    "ips": [{"interface": 2, "address": "10.1.17.5/24"}, {"interface": 2, "address": "fd00::5/64"}],
}


def conf(mappings: object = None, version: str = "1.0.0", **extra: object) -> PortMapConf:
    record: dict[str, Any] = {"cniVersion": version, "name": "cbr0", "type": "portmap", **extra}
    if mappings is not None:
        record["runtimeConfig"] = {"portMappings": mappings}
    environment = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}
    return PortMapConf(Request(environment, json.dumps(record).encode()))


def entry(**changes: object) -> dict[str, object]:
    return {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", **changes}


UPSTREAM: dict[str, tuple[dict[str, Any], str]] = {
    "host port 0": ({"mappings": [entry(hostPort=0)]}, "Invalid host port number: 0"),
    "host port below 0": ({"mappings": [entry(hostPort=-1)]}, "Invalid host port number: -1"),
    "no host port": ({"mappings": [{"containerPort": 80}]}, "Invalid host port number: 0"),
    "container port 0": ({"mappings": [entry(containerPort=0)]}, "Invalid container port number: 0"),
    "empty entry": ({"mappings": [None]}, "Invalid container port number: 0"),
    "bit 32": ({"markMasqBit": 32}, "MasqMarkBit must be between 0 and 31"),
    "bit -1": ({"markMasqBit": -1}, "MasqMarkBit must be between 0 and 31"),
    "both marks": (
        {"markMasqBit": 13, "externalSetMarkChain": "X"},
        "Cannot specify externalSetMarkChain and markMasqBit",
    ),
    "backend": ({"backend": "pf"}, 'unrecognized backend "pf"'),
    "chain for nftables": (
        {"backend": "nftables", "externalSetMarkChain": "X", "conditionsV6": ["-d", "::1"]},
        "nftables backend was requested but configuration contains iptables-specific options"
        " [externalSetMarkChain conditionsV6]",
    ),
    "nft words for iptables": (
        {"backend": "iptables", "conditionsV4": ["ip", "daddr"]},
        "iptables backend was requested but configuration contains nftables-specific options [conditionsV4]",
    ),
    "prevResult of another family": (
        {"prevResult": PREVIOUS, "version": "0.4.0"},
        "could not parse prevResult: could not parse prevResult: result type supports [0.3.0 0.3.1 0.4.0]"
        ' but unmarshalled CNIVersion is "1.0.0"',
    ),
    "prevResult that cannot be read": (
        {"prevResult": {"ips": [{"address": "x"}]}},
        "could not parse prevResult: could not parse prevResult: invalid CIDR address: x",
    ),
}


@pytest.mark.parametrize("case", UPSTREAM)
def test_what_upstream_refuses_is_refused_with_its_text(case: str) -> None:
    arguments, text = UPSTREAM[case]
    with pytest.raises(CniError) as caught:
        conf(**arguments)
    assert (caught.value.code, caught.value.msg) == (999, f"failed to parse config: {text}")


WRONG_TYPES: dict[str, dict[str, Any]] = {
    "mappings": {"mappings": "x"},
    "mapping": {"mappings": [1]},
    "port as text": {"mappings": [entry(hostPort="80")]},
    "port as fraction": {"mappings": [entry(hostPort=80.5)]},
    "protocol": {"mappings": [entry(protocol=6)]},
    "snat": {"snat": "true"},
    "masqAll": {"masqAll": 1},
    "conditions": {"conditionsV4": "-d"},
    "condition": {"conditionsV4": [1]},
    "bit": {"markMasqBit": "13"},
    "backend": {"backend": 1},
    "chain": {"externalSetMarkChain": []},
    "prevResult": {"prevResult": "x"},
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_wrong_types_are_refused_as_a_netconf_that_cannot_be_parsed(case: str) -> None:
    with pytest.raises(CniError) as caught:
        conf(**WRONG_TYPES[case])
    assert caught.value.code == 999
    assert caught.value.msg.startswith("failed to parse config: failed to parse network configuration: ")


@pytest.mark.parametrize(
    "changes",
    [{"hostPort": 65536}, {"containerPort": 65536}, {"protocol": "icmp"}, {"protocol": ""}, {"hostIP": "x"}],
)
def test_what_iptables_would_refuse_is_named(changes: dict[str, object]) -> None:
    with pytest.raises(CniError) as caught:
        conf([entry(**changes)])
    assert caught.value.code == 7
    [value] = changes.values()
    assert str(value) in caught.value.msg


def test_defaults() -> None:
    plain = conf(None, runtimeConfig=None, conditionsV4=[], conditionsV6=[""], backend=None)
    assert (plain.snat, plain.masq_all, plain.mark_bit, plain.mappings) == (True, False, 13, [])
    assert (plain.conditions, plain.prev_result, plain.addresses) == ({"conditionsV6": [""]}, None, [])
    given = conf([entry(protocol="UDP")], snat=False, masqAll=True, markMasqBit=0, prevResult=PREVIOUS)
    assert (given.snat, given.masq_all, given.mark_bit) == (False, True, 0)
    assert given.prev_result == PREVIOUS


def addresses(previous: dict[str, Any], version: str = "1.0.0") -> list[str]:
    return [str(cidr) for cidr in conf(prevResult=previous, version=version).addresses]


def test_the_containers_addresses_are_the_first_of_each_family_that_may_be_its_own() -> None:
    def of(*ips: dict[str, object]) -> list[str]:
        return addresses({"interfaces": INTERFACES, "ips": ips})

    assert addresses(PREVIOUS) == ["10.1.17.5/24", "fd00::5/64"]
    assert of({"address": "fd00::1/64"}, {"address": "10.0.0.1/8"}) == ["10.0.0.1/8", "fd00::1/64"]
    own = {"interface": 2, "address": "10.0.0.2/8"}
    assert of({"interface": 0, "address": "10.0.0.1/8"}, own) == ["10.0.0.2/8"]
    assert of({"interface": 1, "address": "10.0.0.1/8"}) == []
    assert of({"interface": 9, "address": "10.0.0.1/8"}, own) == ["10.0.0.1/8"]
    assert of({"interface": -1, "address": "10.0.0.1/8"}) == ["10.0.0.1/8"]
    unsandboxed = [{"name": "eth0"}]
    assert addresses({"interfaces": unsandboxed, "ips": [{"interface": 0, "address": "10.0.0.1/8"}]}) == []
    assert addresses({"ip4": {"ip": "10.0.0.1/8"}}, "0.2.0") == ["10.0.0.1/8"]


def test_host_interfaces_are_those_without_sandbox() -> None:
    previous = conf(prevResult=PREVIOUS).prev_result
    assert previous is not None
    assert host_interfaces(previous) == ["cni0", "veth1"]
    assert host_interfaces({"cniVersion": "0.2.0"}) == []


# ---- claims

OWNER = Owner("cbr0", "c1", "eth0", "veth1")


def ports(entries: list[dict[str, object]], family: int = 4, **extra: Any) -> list[tuple[object, ...]]:
    found = claims_of(conf(entries, prevResult=PREVIOUS, **extra), OWNER, family)
    return [(one.host, one.protocol, one.host_port, one.container_port) for one in found]


def test_an_entry_counts_in_the_families_of_its_host_ip() -> None:
    entries = [
        entry(),
        entry(hostPort=81, hostIP="192.0.2.1"),
        entry(hostPort=82, hostIP="::1"),
        entry(hostPort=83, hostIP="0.0.0.0"),
        entry(hostPort=84, hostIP="::", protocol="udp"),
        entry(hostPort=85, hostIP="::ffff:192.0.2.1", protocol="SCTP"),
    ]
    four = [(None, TCP, 8080, 80), (0xC0000201, TCP, 81, 80), (None, TCP, 83, 80)]
    assert ports(entries) == [*four, (0xC0000201, SCTP, 85, 80)]
    assert ports(entries, 6) == [(None, TCP, 8080, 80), (1, TCP, 82, 80), (None, UDP, 84, 80)]


def test_the_first_of_several_entries_for_a_port_counts() -> None:
    assert ports([entry(), entry(containerPort=81), entry(protocol="udp")]) == [
        (None, TCP, 8080, 80),
        (None, UDP, 8080, 80),
    ]


def test_without_an_address_of_the_family_there_is_no_claim() -> None:
    previous = {**PREVIOUS, "ips": [{"interface": 2, "address": "10.1.17.5/24"}]}
    assert claims_of(conf([entry()], prevResult=previous), OWNER, 6) == []


@pytest.mark.parametrize(
    ("extra", "prefix"),
    [({}, 24), ({"snat": False}, None), ({"masqAll": True}, 0), ({"snat": False, "masqAll": True}, None)],
)
def test_snat_says_which_sources_are_masqueraded(extra: dict[str, Any], prefix: int | None) -> None:
    [claim] = claims_of(conf([entry()], prevResult=PREVIOUS, markMasqBit=5, **extra), OWNER, 4)
    assert (claim.source_prefix, claim.mark_bit) == (prefix, 5)


def claim(owner: Owner = OWNER, address: int = A, order: int = 0, **changes: Any) -> Claim:
    port = (changes.get("host"), changes.get("protocol", TCP), changes.get("host_port", 8080))
    return Claim(owner, port, (4, address, 80), order, changes.get("prefix", 24), changes.get("bit", 13))


@pytest.mark.parametrize("changes", [{}, {"prefix": None}, {"prefix": 0, "bit": 31}, {"order": 12}])
def test_a_claim_is_read_back_from_its_comment(changes: dict[str, Any]) -> None:
    made = claim(**changes)
    read = read_claim(made.port, made.target, made.comment)
    assert read is not None
    for name in Claim.__slots__:
        if name not in ("owner", "mark_bit"):
            assert getattr(read, name) == getattr(made, name)
    assert read.mark_bit == made.mark_bit or made.source_prefix is None
    assert read.owner.same_attachment(made.owner)
    assert read.owner.veth == "veth1"


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "hello",
        "cbr0 c1 eth0 veth1 x -",
        "cbr0 c1 eth0 veth1 1 a/b",
        "a b c d 1 1/1 x",
        "a b c  1 -",
        f"a b c {16 * 'v'} 1 -",
    ],
)
def test_a_comment_of_somebody_else_is_no_claim(comment: str) -> None:
    assert read_claim((None, TCP, 80), (4, A, 80), comment) is None


def test_the_longest_comment_fits_and_tells_containers_apart() -> None:
    def longest(container_id: str) -> Owner:
        return Owner("n" * 300, container_id, "é" * 7, "v" * 15)

    owners = [longest("c" * 64), longest("c" * 65), longest("c" * 66), longest("d" * 64)]
    assert len({owner.key for owner in owners}) == len(owners)
    for owner in owners:
        made = claim(owner, order=999_999, prefix=128, bit=31)
        assert len(made.comment.encode()) <= 128
        read = read_claim(made.port, made.target, made.comment)
        assert read is not None
        assert read.owner.same_attachment(owner)
    assert longest("c" * 64).container_id == "c" * 64


def test_the_newest_claim_to_a_port_wins() -> None:
    others = [Owner("cbr0", f"c{number}", "eth0") for number in range(3)]
    claims: list[Claim] = []
    for owner in others:
        claims = newer_than(claims, [claim(owner), claim(owner, host=1)])
    assert [one.order for one in claims] == [1, 1, 2, 2, 3, 3]
    assert {port: one.owner for port, one in winners(claims).items()} == {
        (None, TCP, 8080): others[2],
        (1, TCP, 8080): others[2],
    }
    # The order in which the kernel lists them means nothing.
    assert winners(reversed(claims)) == winners(claims)
    left = [one for one in claims if one.owner is not others[2]]
    assert winners(left)[None, TCP, 8080].owner is others[1]


def test_hairpins_are_the_subnet_and_the_node() -> None:
    subnet, node = 0x0A011100, 0x7F000001
    assert hairpins([claim(), claim(address=B), claim(protocol=UDP, host=1)]) == {
        (24, 13): {(subnet, TCP, 8080), (subnet, UDP, 8080)},
        (32, 13): {(node, TCP, 8080), (node, UDP, 8080)},
    }
    assert hairpins([claim(prefix=0, bit=3)]) == {(0, 3): {(0, TCP, 8080)}}
    assert hairpins([claim(prefix=None)]) == {}
    six = Claim(OWNER, (None, TCP, 80), (6, 0xFD << 120 | 5, 80), 0, 64)
    assert hairpins([six]) == {(64, 13): {(0xFD << 120, TCP, 80)}}


def test_a_claim_describes_itself() -> None:
    assert str(claim()) == "tcp port 8080 of * to 10.1.17.5 port 80"
    assert str(claim(host=0xC0000201, protocol=UDP)) == "udp port 8080 of 192.0.2.1 to 10.1.17.5 port 80"
