"""Encoders of nf_tables that a kernel is not needed for; the others are in tests/netns/test_nft.py."""

from __future__ import annotations

import errno

import pytest

from cni.net import conntrack, nft
from cni.net import nftexpr as expr
from cni.net.nlmsg import attr
from cni.plugins import masq
from cni.spec.address import parse_cidr


def test_types_as_nft_numbers_them() -> None:
    # `nft --debug=netlink` of a map of inet_proto . inet_service : ipv4_addr . inet_service
    assert expr.concatenation(expr.INET_PROTO, expr.INET_SERVICE) == 0x30D
    assert expr.concatenation(expr.IPV4_ADDR, expr.INET_PROTO, expr.INET_SERVICE) == 0x730D


@pytest.mark.parametrize(
    ("types", "length"),
    [
        ((expr.IPV4_ADDR,), 4),
        ((expr.ETHER_ADDR,), 6),
        ((expr.INET_PROTO, expr.INET_SERVICE), 8),
        ((expr.ETHER_ADDR, expr.IPV6_ADDR), 24),
    ],
)
def test_parts_of_a_concatenation_fill_words(types: tuple[int, ...], length: int) -> None:
    assert expr.type_bytes(expr.concatenation(*types)) == length


def test_keys() -> None:
    assert expr.key(b"\x06", expr.port(80)) == b"\x06\0\0\0\0\x50\0\0"
    assert expr.key(expr.port(80)) == b"\0\x50"
    assert expr.address(6, 1) == bytes(15) + b"\x01"


@pytest.mark.parametrize("comment", ["", "x", "ä" * 64])
def test_comments(comment: str) -> None:
    assert expr.read_comment(expr.rule_comment(comment)) == comment


def test_a_comment_behind_other_user_data() -> None:
    assert expr.read_comment(b"\x07\x02ab" + expr.element_comment("c")) == "c"
    assert expr.read_comment(b"\x07\x02ab") == ""
    assert expr.read_comment(b"\x00") == ""


def test_comments_are_counted_in_bytes() -> None:
    with pytest.raises(ValueError, match="longer than 128 bytes"):
        expr.rule_comment("ä" * 65)


def test_only_verdicts_lead_to_chains() -> None:
    def listed(*expressions: bytes) -> str:
        return expr.read_jump(b"".join(expressions))

    assert listed(expr.counter(), expr.jump("c")) == "c"
    assert listed(expr.immediate(b"c\0\0\0"), expr.accept()) == ""
    assert listed() == ""


def test_upstreams_names() -> None:
    """Vectors computed by Go's plugins."""
    assert masq.iptables_chain("cbr0", "c1") == "CNI-68f1f1eeb62cad3d0bdd579c"
    assert masq._identity("n", "c1", "eth0") == "917148ec47923f2e-f4d01f2ef4b92245"


@pytest.mark.parametrize("text", ["10.1.17.0/24", "0.0.0.0/0", "fd00:1::/64", "::/0", "fd00::1/128"])
def test_the_name_of_a_set_tells_its_subnet(text: str) -> None:
    name = masq._set_name(parse_cidr(text))
    assert masq._network(name) == parse_cidr(text)
    assert name[0].isalpha() and all(one.isalnum() or one in "-._" for one in name)


def test_the_comment_keeps_the_link_whatever_has_to_be_cut() -> None:
    comment = masq._comment("ä" * 200, "c" * 300, "i" * 15, "veth45678901234")
    assert len(comment.encode()) <= expr.LONGEST_COMMENT
    assert masq._veth(comment) == "veth45678901234"


@pytest.mark.parametrize(
    ("number", "losses", "wins"),
    [
        *((errno.ERESTART, 50, True), (errno.ERESTART, 1000, False)),
        *((errno.ENOENT, 3, True), (errno.EBUSY, 4, False), (errno.EPERM, 1, False)),
    ],
)
def test_only_refusals_that_cost_nothing_are_met_with_patience(number: int, losses: int, wins: bool) -> None:
    calls = []

    def attempt() -> str:
        calls.append(1)
        if len(calls) <= losses:
            raise nft.NftRefused("no", number)
        return "done"

    if wins:
        assert nft.retry(attempt) == "done"
        assert len(calls) == losses + 1
    else:
        with pytest.raises(nft.NftRefused):
            nft.retry(attempt)
        assert len(calls) <= losses


@pytest.mark.parametrize(
    ("protocol", "port", "address", "meant"),
    [
        *((17, 53, None, True), (17, 53, b"\x0a\0\0\1", True)),
        *((6, 53, None, False), (17, 54, None, False), (17, 53, b"\x0a\0\0\2", False)),
    ],
)
def test_flows_of_a_kernel_that_sends_all(
    protocol: int, port: int, address: bytes | None, meant: bool
) -> None:
    ip = expr.nested(1, attr(1, b"\x0a\0\0\x09"), attr(2, b"\x0a\0\0\1"))
    proto = expr.nested(2, attr(1, b"\x11"), attr(2, expr.port(53)), attr(3, expr.port(53)))
    assert conntrack._goes_to(ip + proto, 4, protocol, {(expr.port(port), address)}) is meant


def test_the_interface_that_a_rule_wants() -> None:
    def listed(*expressions: bytes) -> str:
        return expr.read_iifname(b"".join(expressions))

    port = expr.compare(expr.EQ, expr.ifname("veth1"))
    assert listed(expr.counter(), expr.meta(expr.META_IIFNAME), port, expr.jump("c")) == "veth1"
    assert listed(expr.meta(expr.META_OIFNAME), port) == ""
    assert listed(expr.meta(expr.META_IIFNAME), expr.compare(expr.NEQ, expr.ifname("veth1"))) == ""
    assert listed(expr.meta(expr.META_IIFNAME), expr.compare(expr.EQ, b"veth")) == "", "a pattern is no name"
    assert listed() == ""
