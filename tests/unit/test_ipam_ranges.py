"""Range sets against a model that counts one by one: order of the candidates, sizes, gaps in long runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.ipam.ranges import Occupied, Range, RangeError, RangeSet
from cni.spec.address import parse_cidr, parse_ip

BASE = parse_ip("10.0.0.0")[1]
BLOCK = 4096


def make(subnet: str, first: str = "", last: str = "", gateway: str = "") -> Range:
    given = [parse_ip(text) if text else None for text in (first, last, gateway)]
    return Range(parse_cidr(subnet), *given)


@pytest.mark.parametrize(
    ("subnet", "text", "gateway", "size"),
    [
        ("10.1.2.0/24", "10.1.2.1-10.1.2.254", "10.1.2.1", 253),
        ("10.1.2.0/25", "10.1.2.1-10.1.2.126", "10.1.2.1", 125),
        ("10.1.2.128/30", "10.1.2.129-10.1.2.130", "10.1.2.129", 1),
        ("0.0.0.0/0", "0.0.0.1-255.255.255.254", "0.0.0.1", 2**32 - 3),
        ("fd00::/126", "fd00::1-fd00::3", "fd00::1", 2),
        ("fd00::/64", "fd00::1-fd00::ffff:ffff:ffff:ffff", "fd00::1", 2**64 - 2),
    ],
)
def test_defaults(subnet: str, text: str, gateway: str, size: int) -> None:
    made = make(subnet)
    assert (str(made), made.gateway) == (text, parse_ip(gateway))
    assert RangeSet([made]).size == size


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        (make("10.0.0.0/24"), make("10.0.0.0/24"), True),
        (make("10.0.0.0/24"), make("10.0.0.128/25"), True),
        (make("10.0.0.0/24", last="10.0.0.9"), make("10.0.0.0/24", first="10.0.0.9"), True),
        (make("10.0.0.0/24", last="10.0.0.9"), make("10.0.0.0/24", first="10.0.0.10"), False),
        (make("10.0.0.0/24"), make("10.0.1.0/24"), False),
        # The same number in the other family.
        (make("10.0.0.0/24"), make("::a00:0/120"), False),
    ],
)
def test_overlaps(one: Range, other: Range, overlap: bool) -> None:
    assert one.overlaps(other) is overlap
    assert other.overlaps(one) is overlap
    assert RangeSet([one]).overlaps(RangeSet([other])) is overlap


def test_an_address_of_the_other_family_is_in_no_range() -> None:
    family, value = parse_ip("10.0.0.3")
    one = RangeSet([make("10.0.0.0/24")])
    assert (family, value) in one
    assert (6, value) not in one
    assert not RangeSet([make("10.0.0.0/24")]).is_gateway((6, parse_ip("10.0.0.1")[1]))


def test_the_gateway_of_another_range_is_not_handed_out() -> None:
    one = RangeSet(
        [
            make("10.0.0.0/28", last="10.0.0.4", gateway="10.0.0.6"),
            make("10.0.0.0/28", first="10.0.0.5", last="10.0.0.7", gateway="10.0.0.2"),
        ]
    )
    values = [value - BASE for value, _ in one.candidates(Occupied(), None)]
    assert values == [1, 3, 4, 5, 7]
    assert one.size == 5


def test_a_set_needs_ranges_of_one_family() -> None:
    with pytest.raises(RangeError, match=r"^empty range set$"):
        RangeSet([])
    with pytest.raises(RangeError, match=r"^mixed address families$"):
        RangeSet([make("10.0.0.0/24"), make("fd00::/64")])


@st.composite
def sets(draw: st.DrawFn) -> tuple[RangeSet, list[tuple[int, int, int]]]:
    """A set in 10.0.0.0/26, and its (first, last, gateway) as offsets, in the order of the set."""
    cuts = sorted(draw(st.lists(st.integers(1, 63), min_size=2, max_size=8, unique=True)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    spans = draw(st.permutations(spans))
    gateway = draw(st.integers(0, 66))
    ranges = [
        Range(parse_cidr("10.0.0.0/26"), (4, BASE + low), (4, BASE + high), (4, BASE + gateway))
        for low, high in spans
    ]
    return RangeSet(ranges), [(low, high, gateway) for low, high in spans]


@given(made=sets(), taken=st.sets(st.integers(0, 63)), last=st.one_of(st.none(), st.integers(0, 70)))
def test_candidates_are_those_of_a_walk_round_the_set(
    made: tuple[RangeSet, list[tuple[int, int, int]]], taken: set[int], last: int | None
) -> None:
    one, spans = made
    wheel = [(value, gateway) for low, high, gateway in spans for value in range(low, high + 1)]
    values = [value for value, _ in wheel]
    turn = values.index(last) + 1 if last in values else 0
    expected = [v for v, gateway in wheel[turn:] + wheel[:turn] if v != gateway and v not in taken]
    occupied = Occupied()
    for value in taken:
        occupied.add(BASE + value)
    found = list(one.candidates(occupied, None if last is None else (4, BASE + last)))
    assert [value - BASE for value, _ in found] == expected
    assert all((4, value) in home for value, home in found)
    assert one.size - one.used(occupied) == len(expected)
    assert one.size == sum(value != gateway for value, gateway in wheel)


VALUES = st.one_of(
    st.integers(0, 12), st.integers(BLOCK - 4, BLOCK + 4), st.integers(2 * BLOCK - 3, 2 * BLOCK + 3)
)


@given(added=st.sets(VALUES), removed=st.sets(VALUES), low=VALUES, high=VALUES)
def test_gaps_and_counts_are_those_of_a_set(added: set[int], removed: set[int], low: int, high: int) -> None:
    occupied = Occupied()
    for value in added:
        occupied.add(value)
    for value in removed:
        occupied.discard(value)
    model = added - removed
    assert occupied.first_free(low, high) == next((v for v in range(low, high + 1) if v not in model), None)
    assert occupied.count(low, high) == sum(low <= value <= high for value in model)
    assert all((value in occupied) == (value in model) for value in added | removed)


def test_a_gap_behind_full_blocks_is_found() -> None:
    occupied = Occupied()
    for value in range(10, 3 * BLOCK + 5):
        occupied.add(value)
    assert occupied.first_free(10, 2**128 - 1) == 3 * BLOCK + 5
    assert occupied.first_free(10, 3 * BLOCK + 4) is None
    assert occupied.count(0, 2**128 - 1) == 3 * BLOCK - 5
