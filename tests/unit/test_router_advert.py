"""Router advertisements: known bytes, an independent decoder, and who is answered when."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import ConfigError
from launcher.ipv6.advert import (
    ALL_NODES,
    Preference,
    Prefix,
    Responder,
    RouterAdvert,
    Scheduled,
    Send,
    check_solicitation,
    checksum,
)
from launcher.ipv6.packet import INFINITE_S, Malformed
from tests.unit.capture import icmp6, tcpdump

ROUTER, GUEST = IPv6Address("fe80::ff:fe00:0"), IPv6Address("fe80::858:aff:fef4:107")
NOBODY, NEIGHBOUR = IPv6Address("::"), IPv6Address("fd10:0:2::2")
ON_LINK = Prefix(IPv6Network("fd10:0:2::/120"))
ADVERT = RouterAdvert(
    prefixes=(ON_LINK,), mac="02:00:00:00:00:00", mtu=1450, dns=(IPv6Address("fd00:10:96::a"),)
)
WIRE = bytes.fromhex(
    "86 00 91 20 40 c0 07 08 00 00 00 00 00 00 00 00 01 01 02 00 00 00 00 00 05 01 00 00 00 00 05 aa"
    "03 04 78 80 ff ff ff ff ff ff ff ff 00 00 00 00 fd 10 00 00 00 02 00 00 00 00 00 00 00 00 00 00"
    "19 03 00 00 00 00 07 08 fd 00 00 10 00 96 00 00 00 00 00 00 00 00 00 0a"
)
SOLICITATION = bytes.fromhex("85 00 12 34 00 00 00 00")
SOURCE_LINK_LAYER = bytes.fromhex("01 01 0a 58 0a f4 01 07")

# --- bytes ------------------------------------------------------------------------------------------


def test_known_advertisement() -> None:
    assert ADVERT.encode(ROUTER, ALL_NODES) == WIRE


@pytest.mark.parametrize("addresses", [(), (ROUTER,), (None, ALL_NODES)])
def test_without_both_addresses_the_checksum_is_left_to_the_kernel(
    addresses: tuple[IPv6Address | None, ...],
) -> None:
    assert ADVERT.encode(*addresses) == WIRE[:2] + b"\0\0" + WIRE[4:]


def test_an_independent_decoder_reads_every_part() -> None:
    advert = replace(
        ADVERT,
        prefixes=(ON_LINK, Prefix(IPv6Network("fd10:0:3::/64"), False, True, 3600, 7200)),
        search=("default.svc.cluster.local", "cluster.local"),
        preference=Preference.LOW,
        managed=False,
        hop_limit=32,
        lifetime_s=900,
        dns_lifetime_s=600,
    )
    text = tcpdump(icmp6(advert.encode(ROUTER, GUEST), str(ROUTER), str(GUEST)))
    for words in (
        "[icmp6 sum ok] ICMP6, router advertisement, length 176",
        "hop limit 32, Flags [other stateful], pref low, router lifetime 900s, reachable time 0ms",
        "source link-address option (1), length 8 (1): 02:00:00:00:00:00",
        "mtu option (5), length 8 (1): 1450",
        "prefix info option (3), length 32 (4): fd10:0:2::/120, Flags [onlink], valid time infinity, "
        "pref. time infinity",
        "prefix info option (3), length 32 (4): fd10:0:3::/64, Flags [auto], valid time 7200s, "
        "pref. time 3600s",
        "rdnss option (25), length 24 (3): lifetime 600s, addr: fd00:10:96::a",
        "dnssl option (31), length 56 (7): lifetime 600s, domain(s): default.svc.cluster.local. "
        "cluster.local.",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("preference", "lifetime_s", "flags"),
    [
        (Preference.MEDIUM, 1800, 0xC0),
        (Preference.HIGH, 1800, 0xC8),
        (Preference.LOW, 1800, 0xD8),
        (Preference.LOW, 0, 0xC0),  # RFC 4191 section 2.2
    ],
)
def test_flags(preference: Preference, lifetime_s: int, flags: int) -> None:
    assert replace(ADVERT, preference=preference, lifetime_s=lifetime_s).encode()[5] == flags


def test_nothing_is_sent_empty() -> None:
    assert RouterAdvert().encode() == bytes.fromhex("86 00 00 00 40 c0 07 08 00 00 00 00 00 00 00 00")


def options(wire: bytes) -> dict[int, list[bytes]]:
    """The options behind an advertisement's header, read by RFC 4861 section 4.6's rules."""
    found: dict[int, list[bytes]] = {}
    at = 16
    while at < len(wire):
        size = wire[at + 1] * 8
        assert 0 < size <= len(wire) - at
        found.setdefault(wire[at], []).append(wire[at + 2 : at + size])
        at += size
    return found


def names(value: bytes) -> list[str]:
    """The names in an option 31, up to the zeros that fill it."""
    found, at, labels = [], 6, list[str]()
    while at < len(value):
        size = value[at]
        if size:
            labels.append(value[at + 1 : at + 1 + size].decode())
        elif labels:
            found.append(".".join(labels))
            labels = []
        at += 1 + size
    assert not labels
    return found


SECONDS = st.integers(0, INFINITE_S)
PREFIXES = st.builds(
    lambda address, length, on_link, lifetimes: Prefix(
        IPv6Network((int(address) >> (128 - length) << (128 - length), length)),
        on_link,
        length == 64,
        *sorted(lifetimes),
    ),
    st.ip_addresses(v=6),
    st.integers(1, 128),
    st.booleans(),
    st.tuples(SECONDS, SECONDS),
)
NAMES = st.from_regex(r"[a-z0-9]{1,20}\.[a-z]{1,20}", fullmatch=True)
ADVERTS = st.builds(
    RouterAdvert,
    prefixes=st.lists(PREFIXES, max_size=4).map(tuple),
    mac=st.none() | st.binary(min_size=6, max_size=6).map(lambda mac: mac.hex(":")),
    mtu=st.none() | st.integers(1280, 0xFFFF),
    dns=st.lists(st.ip_addresses(v=6), max_size=8).map(tuple),
    search=st.lists(NAMES, max_size=6).map(tuple),
    lifetime_s=st.integers(0, 9000),
    dns_lifetime_s=SECONDS,
    hop_limit=st.integers(0, 255),
    managed=st.booleans(),
    other=st.booleans(),
    preference=st.sampled_from(Preference),
)


@given(ADVERTS)
def test_every_value_is_found_in_the_bytes(advert: RouterAdvert) -> None:
    wire = advert.encode()
    kind, code, _, hop_limit, flags, lifetime_s, reachable, retransmit = struct.unpack_from("!BBHBBHII", wire)
    assert (kind, code, reachable, retransmit) == (134, 0, 0, 0)
    assert (hop_limit, lifetime_s) == (advert.hop_limit, advert.lifetime_s)
    assert (flags & 0x80 > 0, flags & 0x40 > 0) == (advert.managed, advert.other)
    found = options(wire)
    assert [mac.hex(":") for mac in found.pop(1, [])] == ([advert.mac] if advert.mac else [])
    assert [int.from_bytes(mtu[2:], "big") for mtu in found.pop(5, [])] == (
        [advert.mtu] if advert.mtu else []
    )
    prefixes = []
    for value in found.pop(3, []):
        length, bits, valid_s, preferred_s, _ = struct.unpack_from("!BBIII", value)
        network = IPv6Network((value[14:], length))
        prefixes.append(Prefix(network, bits & 0x80 > 0, bits & 0x40 > 0, preferred_s, valid_s))
    assert tuple(prefixes) == advert.prefixes
    servers = [value[6:] for value in found.pop(25, [])]
    assert servers == ([b"".join(each.packed for each in advert.dns)] if advert.dns else [])
    assert [name for value in found.pop(31, []) for name in names(value)] == list(advert.search)
    assert found == {}


@given(ADVERTS, st.ip_addresses(v=6), st.ip_addresses(v=6))
def test_the_checksum_proves_itself(
    advert: RouterAdvert, source: IPv6Address, destination: IPv6Address
) -> None:
    # RFC 1071: over a message with its checksum in place the sum is all ones.
    assert checksum(advert.encode(source, destination), source, destination) == 0


@pytest.mark.parametrize("mtu", [*range(1280, 1288), 9000])
@pytest.mark.parametrize("length", [1, 2, 5, 7, 10, 40, 63])
def test_names_that_do_not_fit_are_left_out_from_the_end(mtu: int, length: int) -> None:
    search = [f"{'x' * length}.d{number:03}" for number in range(400)]
    wire = replace(ADVERT, search=tuple(search), mtu=mtu).encode()
    assert len(wire) <= mtu - 40
    [option] = options(wire)[31]
    kept = names(option)
    assert kept == search[: len(kept)]
    # One name more takes the option over what is left of the packet, or over 255 units of 8 bytes.
    one_more = 8 + (len(kept) + 1) * (length + 7)
    units = -(-one_more // 8)
    assert units > 255 or len(replace(ADVERT, mtu=mtu).encode()) + 8 * units > mtu - 40


def test_no_room_for_a_name() -> None:
    full = replace(ADVERT, dns=(NEIGHBOUR,) * 72, mtu=1280)
    assert len(full.encode()) == 1240 - 16
    assert replace(full, search=("a.long.name",)).encode() == full.encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lifetime_s": 9001}, "router lifetime 9001 s"),
        ({"lifetime_s": -1}, "router lifetime -1 s"),
        ({"dns_lifetime_s": INFINITE_S + 1}, "DNS lifetime"),
        ({"hop_limit": 256}, "hop limit 256"),
        ({"mtu": 1279}, "MTU 1279 is not valid: IPv6 needs 1280"),
        ({"mtu": 65536}, "MTU 65536"),
        ({"mac": "abcd"}, "MAC 'abcd' is not valid"),
        ({"search": ("a,b",)}, "name 'a,b' is not valid"),
        ({"dns": (NEIGHBOUR,) * 128, "mtu": 9000}, "128 DNS servers are too many for one option: 127 fit"),
        ({"prefixes": (ON_LINK,) * 50}, "advertisement of 1656 bytes: 1410 fit"),
    ],
)
def test_an_advertisement_that_cannot_be_sent_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(ADVERT, **change)  # type: ignore[arg-type]  # each value is right for its field


@pytest.mark.parametrize("length", [63, 65, 120])
def test_hosts_make_addresses_of_a_64_only(length: int) -> None:
    with pytest.raises(ConfigError, match=f"prefix fd10::/{length} cannot be autonomous"):
        Prefix(IPv6Network(f"fd10::/{length}"), autonomous=True)


def test_an_address_is_not_preferred_longer_than_it_is_valid() -> None:
    with pytest.raises(ConfigError, match="preferred 2 s, valid 1 s"):
        Prefix(IPv6Network("fd10::/64"), preferred_s=2, valid_s=1)


# --- solicitations ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "source"),
    [
        (SOLICITATION, GUEST),
        (SOLICITATION, NOBODY),
        (SOLICITATION + SOURCE_LINK_LAYER, GUEST),
        (SOLICITATION + SOURCE_LINK_LAYER, NEIGHBOUR),
        (SOLICITATION + bytes.fromhex("fd 01 00 00 00 00 00 00"), NOBODY),  # unknown options are ignored
    ],
)
def test_valid_solicitations(message: bytes, source: IPv6Address) -> None:
    assert check_solicitation(message, source, 255) is None


@pytest.mark.parametrize(
    ("message", "source", "hop_limit", "why"),
    [
        (SOLICITATION, GUEST, 254, "hop limit 254"),
        (SOLICITATION[:7], GUEST, 255, "7 bytes"),
        (b"", GUEST, 255, "0 bytes"),
        (b"\x86" + SOLICITATION[1:], GUEST, 255, "type 134"),
        (b"\x85\x01" + SOLICITATION[2:], GUEST, 255, "code 1"),
        (SOLICITATION, ALL_NODES, 255, "source ff02::1"),
        (SOLICITATION, IPv6Address("::1"), 255, "source ::1"),
        (SOLICITATION + SOURCE_LINK_LAYER, NOBODY, 255, "link-layer address without a source"),
        (SOLICITATION + b"\x01\x00" + bytes(6), GUEST, 255, "option 1 of 0 bytes"),
        (SOLICITATION + b"\x01\x02" + bytes(6), GUEST, 255, "option 1 of 16 bytes where 8 are left"),
        (SOLICITATION + b"\x01", GUEST, 255, "option 1 of 0 bytes where 1 are left"),
    ],
)
def test_invalid_solicitations_get_nothing(
    message: bytes, source: IPv6Address, hop_limit: int, why: str
) -> None:
    responder = started(ADVERT)
    before = responder.due()
    answer = responder.receive(message, source, hop_limit, 10.0, 0.0)
    assert isinstance(answer, Malformed)
    assert why in answer.reason
    assert responder.due() == before


@given(
    st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(lambda tail: SOLICITATION + tail)),
    st.one_of(st.sampled_from([GUEST, NOBODY]), st.ip_addresses(v=6)),
    st.sampled_from([255, 64]),
)
def test_any_bytes_are_a_solicitation_or_malformed(
    message: bytes, source: IPv6Address, hop_limit: int
) -> None:
    answer = started(ADVERT).receive(message, source, hop_limit, 10.0, 0.5)
    assert isinstance(answer, Malformed) or (
        hop_limit == 255 and message[:2] == b"\x85\x00" and answer.destination in (source, ALL_NODES)
    )


# --- when -------------------------------------------------------------------------------------------


def started(advert: RouterAdvert, initial: int = 3) -> Responder:
    """A responder whose initial advertisements went out in time, the last at 0.0."""
    responder = Responder(advert, now=-16.0 * (initial - 1))
    for _ in range(initial):
        [sent] = responder.send(responder.due(), 0.5)
        assert sent.destination == ALL_NODES
    return responder


def test_unsolicited_three_at_the_start_and_then_at_random() -> None:
    responder = Responder(ADVERT, now=100.0, max_interval_s=600, min_interval_s=200)
    times = []
    for chance in (0.0, 0.999, 0.0, 0.25, 0.999999):
        times.append(responder.due())
        assert responder.send(times[-1] - 0.001, chance) == ()
        assert responder.send(times[-1], chance) == (Send(ADVERT.encode(), ALL_NODES),)
    assert times == pytest.approx([100, 116, 132, 332, 632])
    assert responder.due() == pytest.approx(632 + 600, abs=0.01)


def test_an_initial_interval_may_be_shorter() -> None:
    responder = Responder(ADVERT, now=0.0, max_interval_s=10, min_interval_s=4)
    responder.send(0.0, 0.5)
    assert responder.due() == pytest.approx(7)


def test_an_overslept_advertisement_goes_out_once() -> None:
    responder = started(ADVERT)
    assert len(responder.send(100_000.0, 0.0)) == 1
    assert responder.send(100_000.0, 0.0) == ()
    assert responder.due() == pytest.approx(100_198)


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.999])
def test_a_solicitation_of_a_host_with_an_address_is_answered_to_it(chance: float) -> None:
    responder = started(ADVERT)
    at = 10 + chance * 0.5
    assert responder.receive(SOLICITATION, GUEST, 255, 10.0, chance) == Scheduled(at, GUEST)
    assert responder.due() == at
    assert responder.send(at, 0.5) == (Send(ADVERT.encode(), GUEST),)
    assert responder.send(at, 0.5) == ()


def test_a_unicast_answer_needs_no_three_seconds() -> None:
    responder = started(ADVERT)
    responder.receive(SOLICITATION, GUEST, 255, 0.1, 0.0)
    assert responder.send(0.1, 0.5) == (Send(ADVERT.encode(), GUEST),)


def test_one_answer_for_what_a_host_asks_twice() -> None:
    responder = started(ADVERT)
    first = responder.receive(SOLICITATION, GUEST, 255, 10.0, 0.9)
    assert responder.receive(SOLICITATION, GUEST, 255, 10.1, 0.0) == first
    assert len(responder.send(10.6, 0.0)) == 1
    assert responder.send(10.6, 0.0) == ()


@pytest.mark.parametrize("source", [NOBODY, NEIGHBOUR])
@pytest.mark.parametrize(("now", "at"), [(10.0, 10.25), (3.0, 3.25), (2.9, 3.25), (0.0, 3.25)])
def test_all_others_are_answered_to_all_nodes_three_seconds_after_the_last(
    source: IPv6Address, now: float, at: float
) -> None:
    responder = started(ADVERT)
    answer = responder.receive(SOLICITATION, source, 255, now, 0.5)
    assert isinstance(answer, Scheduled)
    assert answer.destination == ALL_NODES
    assert answer.at == pytest.approx(at)
    assert responder.send(answer.at, 0.0) == (Send(ADVERT.encode(), ALL_NODES),)
    assert responder.due() == pytest.approx(at + 198), "the interval counts from this one"


def test_an_advertisement_that_is_due_anyway_is_the_answer() -> None:
    responder = started(ADVERT)
    due = responder.due()
    for source in (GUEST, NOBODY):
        assert responder.receive(SOLICITATION, source, 255, due - 0.1, 0.9) == Scheduled(due, ALL_NODES)
    assert responder.send(due, 0.5) == (Send(ADVERT.encode(), ALL_NODES),)
    assert responder.send(due + 1, 0.5) == ()


def test_a_multicast_answer_serves_those_who_wait() -> None:
    responder = started(ADVERT)
    responder.receive(SOLICITATION, GUEST, 255, 10.0, 0.9)
    responder.receive(SOLICITATION, NOBODY, 255, 10.0, 0.1)
    assert responder.send(10.45, 0.5) == (Send(ADVERT.encode(), ALL_NODES),)
    assert responder.send(11.0, 0.5) == ()


def test_a_crowd_is_answered_together() -> None:
    responder = started(ADVERT)
    for host in range(1000):
        responder.receive(SOLICITATION, IPv6Address(f"fe80::{host + 1:x}"), 255, 10.0, 0.9)
    assert [sent.destination for sent in responder.send(10.5, 0.5)] == [ALL_NODES]


@given(
    st.lists(
        st.tuples(
            st.floats(0, 2), st.sampled_from([GUEST, NOBODY, NEIGHBOUR]), st.floats(0, 1, exclude_max=True)
        ),
        max_size=40,
    )
)
def test_nobody_waits_long_and_multicasts_keep_their_distance(
    asked: list[tuple[float, IPv6Address, float]],
) -> None:
    responder = Responder(ADVERT, now=0.0)
    now, multicasts, waiting = 0.0, list[float](), dict[IPv6Address, float]()

    def run_until(end: float) -> None:
        while responder.due() <= end:
            at = responder.due()
            for sent in responder.send(at, 0.5):
                served = list(waiting) if sent.destination == ALL_NODES else [sent.destination]
                if sent.destination == ALL_NODES:
                    multicasts.append(at)
                for source in served:
                    asked_at = waiting.pop(source, at)
                    assert at - asked_at <= (0.501 if source == GUEST else 3.501)

    for pause, source, chance in asked:
        run_until(now)
        now += pause
        run_until(now)
        assert isinstance(responder.receive(SOLICITATION, source, 255, now, chance), Scheduled)
        waiting.setdefault(source, now)
    run_until(now + 4)
    assert waiting == {}
    assert all(later - earlier >= 2.999 for earlier, later in pairwise(multicasts))


def test_the_last_advertisement_ends_the_router_alone() -> None:
    last = started(ADVERT).stop()
    assert last.destination == ALL_NODES
    assert last.data == WIRE[:2] + b"\0\0" + WIRE[4:6] + b"\0\0" + WIRE[8:]


@pytest.mark.parametrize(
    ("longest", "shortest", "lifetime_s", "words"),
    [
        (3.9, 3, 1800, "advertisement interval 3.9 s"),
        (1801, 600, 1800, "advertisement interval 1801 s"),
        (600, 2.9, 1800, "shortest advertisement interval 2.9 s"),
        (600, 451, 1800, "give 3 to 450"),
        (600, 198, 599, "router lifetime 599 s is shorter than the advertisement interval 600 s"),
    ],
)
def test_intervals_out_of_range(longest: float, shortest: float, lifetime_s: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Responder(replace(ADVERT, lifetime_s=lifetime_s), 0.0, longest, shortest)


def test_who_is_no_default_router_advertises_all_the_same() -> None:
    assert Responder(replace(ADVERT, lifetime_s=0), now=5.0).due() == 5.0
