"""Marks of the packet filter: what the kernel answers, and answers that no kernel would give."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.net import nlmsg
from cni.net.nfgen import blank_counters, read_generation
from cni.net.ruleset import Family

# What a 6.18 kernel sent: NFT_MSG_NEWGEN with NFTA_GEN_ID 0x3e8f, NFTA_GEN_PROC_PID and _PROC_NAME.
ANSWER = bytes.fromhex(
    "300000000f0a0000010000008f3e0000000000010800010000003e8f080002000000 3e8f0c000300707974686f6e3300"
)
# An NLMSG_ERROR with -EPERM.
REFUSAL = nlmsg.message(nlmsg.NLMSG_ERROR, 0, 1, struct.pack("=i", -1) + bytes(16))

# Bytes before next_offset, before the counters, and in all, of struct ipt_entry and ip6t_entry.
LAYOUT = {Family.IPV4: (90, 96, 112), Family.IPV6: (142, 152, 168)}


def test_the_generation_is_read_from_the_kernels_answer() -> None:
    assert read_generation(ANSWER) == 0x3E8F


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(REFUSAL, id="refusal"),
        pytest.param(ANSWER[:20], id="cut"),
        pytest.param(nlmsg.message(10 << 8 | 15, 0, 1, bytes(4)), id="no attribute"),
        pytest.param(nlmsg.message(10 << 8 | 15, 0, 1, bytes(4) + nlmsg.attr(1, b"\1")), id="short number"),
        pytest.param(ANSWER[:4] + b"\x10\x0a" + ANSWER[6:], id="another message"),
    ],
)
def test_any_other_answer_is_no_generation(answer: bytes) -> None:
    assert read_generation(answer) is None


def rule(family: Family, body: bytes, counters: bytes) -> bytes:
    """One entry whose matches and target are `body`; everything else in it is 0xAA."""
    length_at, counters_at, size = LAYOUT[family]
    entry = bytearray(b"\xaa" * size + body)
    struct.pack_into("=H", entry, length_at, size + len(body))
    entry[counters_at:size] = counters
    return bytes(entry)


FAMILIES = st.sampled_from(Family)
BODIES = st.lists(st.binary(max_size=40), max_size=5)
COUNTERS = st.binary(min_size=16, max_size=16)


@given(FAMILIES, BODIES, COUNTERS, st.integers(0, 40))
def test_law_counters_and_nothing_else_are_blanked(
    family: Family, bodies: list[bytes], counters: bytes, start: int
) -> None:
    buffer = bytearray(b"\x55" * start + b"".join(rule(family, body, counters) for body in bodies))
    blank_counters(buffer, start, family)
    assert buffer == b"\x55" * start + b"".join(rule(family, body, bytes(16)) for body in bodies)


@given(FAMILIES, st.binary(max_size=600), st.integers(0, 700))
def test_law_rubbish_keeps_its_length_and_ends(family: Family, rubbish: bytes, start: int) -> None:
    buffer = bytearray(rubbish)
    blank_counters(buffer, start, family)
    assert len(buffer) == len(rubbish)


def test_a_rule_that_claims_no_length_does_not_stop_the_reader() -> None:
    for family, (length_at, _, _) in LAYOUT.items():
        for length in (0, 1, 111):
            entry = bytearray(rule(family, b"", b"\1" * 16))
            struct.pack_into("=H", entry, length_at, length)
            before = bytes(entry)
            blank_counters(entry, 0, family)
            assert entry == before
