"""The DHCPv6 server: each row of RFC 8415's rules for one client, and silence towards all others."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import ConfigError
from launcher.ipv6.packet import (
    INFINITE_S,
    Code,
    Ia,
    IaAddress,
    Kind,
    Malformed,
    Message,
    Option,
    Status,
    duid_ll,
    parse_ia,
    parse_message,
)
from launcher.ipv6.server import Dhcp6Lease, Ignored, Reply, Server6
from tests.unit.capture import tcpdump, udp

OURS, FOREIGN = IPv6Address("fd10:0:2::2"), IPv6Address("fd10:0:2::5")
GUEST = IPv6Address("fe80::858:aff:fef4:107")
GUEST_MAC, OTHER_MAC = "0a:58:0a:f4:01:07", "0a:58:0a:f4:01:08"
CLIENT, SERVER = duid_ll(GUEST_MAC), duid_ll("02:00:00:00:00:00")
LIFETIME = 86_313_600

LEASE = Dhcp6Lease(OURS, SERVER)
FULL = replace(
    LEASE,
    dns=(IPv6Address("fd00:10:96::a"),),
    search=("default.svc.cluster.local", "cluster.local"),
    ntp=(IPv6Address("fd00::123"), IPv6Address("fd00::124")),
    hostname="vm1",
)
ONE_CLIENT = replace(FULL, mac=GUEST_MAC)

WITH_SERVER = (Kind.REQUEST, Kind.RENEW, Kind.RELEASE, Kind.DECLINE)
WITHOUT_SERVER = (Kind.SOLICIT, Kind.CONFIRM, Kind.REBIND)
ANSWERED = (*WITH_SERVER, *WITHOUT_SERVER, Kind.INFORMATION_REQUEST)


def ia_na(iaid: int = 1, *addresses: IPv6Address) -> Option:
    return Ia(Code.IA_NA, iaid, addresses=tuple(IaAddress(each, 0, 0) for each in addresses)).option()


def option_request(*codes: int) -> Option:
    return Option(Code.OPTION_REQUEST, struct.pack(f"!{len(codes)}H", *codes))


def message(
    kind: Kind, *options: Option, client: bytes | None = CLIENT, server: bytes | None = None
) -> Message:
    """A message with its identifiers; those kinds that must name a server name ours."""
    if server is None and kind in WITH_SERVER:
        server = SERVER
    identifiers = [(Code.CLIENT_ID, client), (Code.SERVER_ID, server)]
    head = [Option(code, duid) for code, duid in identifiers if duid is not None]
    return Message(kind, b"\x11\x22\x33", (*head, *options))


def typical(kind: Kind) -> Message:
    """A message of this kind that is answered when it is multicast."""
    return message(kind, *([] if kind == Kind.INFORMATION_REQUEST else [ia_na(1, OURS)]))


def ask(
    request: Message,
    lease: Dhcp6Lease = LEASE,
    *,
    source: IPv6Address = GUEST,
    multicast: bool = True,
    source_mac: str | None = None,
) -> Message | Ignored:
    """The answer as a message; the reply's own fields are compared with it."""
    reply = Server6(lease).receive(request.encode(), source, multicast, source_mac)
    if isinstance(reply, Ignored):
        return reply
    answer = parse_message(reply.data)
    assert isinstance(answer, Message)
    assert (reply.destination, reply.kind, reply.request) == (source, answer.kind, request.kind)
    assert answer.transaction == request.transaction
    assert answer.values(Code.CLIENT_ID) == request.values(Code.CLIENT_ID)
    assert answer.values(Code.SERVER_ID) == (lease.server_duid,)
    return answer


def answered(request: Message, lease: Dhcp6Lease = LEASE, **how: object) -> Message:
    answer = ask(request, lease, **how)  # type: ignore[arg-type]  # passed on as it is
    assert isinstance(answer, Message), answer
    return answer


def reason(request: Message, lease: Dhcp6Lease = LEASE, **how: object) -> str:
    answer = ask(request, lease, **how)  # type: ignore[arg-type]  # passed on as it is
    assert isinstance(answer, Ignored), answer
    return answer.reason


def codes(answer: Message) -> list[int]:
    return [each.code for each in answer.options if each.code not in (Code.CLIENT_ID, Code.SERVER_ID)]


def status(options: tuple[Option, ...]) -> Status | None:
    values = [each.data for each in options if each.code == Code.STATUS]
    assert len(values) <= 1
    assert all(value[2:].decode() for value in values), "a status has a text for people"
    return Status(int.from_bytes(values[0][:2], "big")) if values else None


def associations(answer: Message) -> list[Ia]:
    found = [
        parse_ia(Code(each.code), each.data)
        for each in answer.options
        if each.code in (Code.IA_NA, Code.IA_TA, Code.IA_PD)
    ]
    return [ia for ia in found if isinstance(ia, Ia)]


def outcome(answer: Message) -> list[tuple[int, list[tuple[str, int]] | Status | None]]:
    """Of each IA its number, and its addresses with their lifetime, or its status."""
    return [
        (ia.iaid, [(str(a.address), a.valid_s) for a in ia.addresses] or status(ia.options))
        for ia in associations(answer)
    ]


GIVEN = (1, [(str(OURS), LIFETIME)])


# --- must discard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in ANSWERED if kind != Kind.INFORMATION_REQUEST])
def test_no_client_identifier_no_answer(kind: Kind) -> None:
    without = message(kind, ia_na(1, OURS), client=None)
    assert reason(without) == f"{kind.name}: no client identifier"


@pytest.mark.parametrize("kind", WITHOUT_SERVER)
def test_a_server_identifier_where_none_may_be(kind: Kind) -> None:
    assert reason(message(kind, ia_na(1, OURS), server=SERVER)).endswith("names a server where it must not")


@pytest.mark.parametrize("kind", WITH_SERVER)
def test_no_server_identifier_where_one_must_be(kind: Kind) -> None:
    bare = Message(kind, b"\x11\x22\x33", (Option(Code.CLIENT_ID, CLIENT), ia_na(1, OURS)))
    assert reason(bare) == f"{kind.name}: no server identifier"


@pytest.mark.parametrize("kind", [*WITH_SERVER, Kind.INFORMATION_REQUEST])
@pytest.mark.parametrize("multicast", [True, False])
def test_a_message_for_another_server(kind: Kind, multicast: bool) -> None:
    other = duid_ll("02:00:00:00:00:01")
    options = typical(kind).options[-1:] if kind in WITH_SERVER else ()
    assert isinstance(ask(message(kind, *options, server=other), multicast=multicast), Ignored)


@pytest.mark.parametrize("code", [Code.IA_NA, Code.IA_TA, Code.IA_PD])
def test_an_information_request_with_an_ia(code: Code) -> None:
    asked = message(Kind.INFORMATION_REQUEST, Ia(code, 1).option())
    assert reason(asked) == f"INFORMATION_REQUEST: contains {code.name}"


@pytest.mark.parametrize("kind", [Kind.ADVERTISE, Kind.REPLY, Kind.RECONFIGURE])
@pytest.mark.parametrize("multicast", [True, False])
def test_what_servers_send(kind: Kind, multicast: bool) -> None:
    assert isinstance(ask(message(kind, server=SERVER), multicast=multicast), Ignored)


@pytest.mark.parametrize("kind", [Kind.RELAY_FORW, Kind.RELAY_REPL])
@pytest.mark.parametrize("multicast", [True, False])
def test_what_relays_send_is_dropped(kind: Kind, multicast: bool) -> None:
    inner = Option(9, typical(Kind.SOLICIT).encode()).encode()
    wire = bytes([kind, 0]) + FOREIGN.packed + GUEST.packed + inner
    assert isinstance(Server6(LEASE).receive(wire, GUEST, multicast), Ignored)


@pytest.mark.parametrize("size", [0, 2, 131])
def test_a_client_identifier_of_a_wrong_length(size: int) -> None:
    assert "client identifier of" in reason(message(Kind.SOLICIT, ia_na(), client=bytes(size)))


def test_two_client_identifiers() -> None:
    twice = message(Kind.SOLICIT, Option(Code.CLIENT_ID, CLIENT), ia_na())
    assert reason(twice) == "SOLICIT: several identifiers of one kind"


def test_a_broken_ia_drops_the_message() -> None:
    assert reason(message(Kind.SOLICIT, Option(Code.IA_NA, bytes(11)))).startswith(
        "SOLICIT: IA_NA of 11 bytes"
    )


# --- must be multicast ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*WITHOUT_SERVER, Kind.INFORMATION_REQUEST])
def test_unicast_that_is_dropped(kind: Kind) -> None:
    assert reason(typical(kind), multicast=False) == f"{kind.name}: not sent to the multicast group"


@pytest.mark.parametrize("kind", WITH_SERVER)
@pytest.mark.parametrize("source", [GUEST, OURS])
def test_unicast_that_is_told_to_use_multicast(kind: Kind, source: IPv6Address) -> None:
    answer = answered(typical(kind), FULL, multicast=False, source=source)
    assert answer.kind == Kind.REPLY
    assert codes(answer) == [Code.STATUS]
    assert status(answer.options) == Status.USE_MULTICAST


@pytest.mark.parametrize("source", ["::", "::1", "ff02::1", "fd10:0:2::5", "2001:db8::1"])
@pytest.mark.parametrize("multicast", [True, False])
def test_sources_that_are_not_of_the_link(source: str, multicast: bool) -> None:
    assert "is not of this link" in reason(
        typical(Kind.REQUEST), source=IPv6Address(source), multicast=multicast
    )


def test_the_leased_address_itself_may_send_by_unicast_only() -> None:
    assert reason(typical(Kind.RENEW), source=OURS) == f"RENEW: source {OURS} is not of this link"


def test_the_zone_of_the_source_is_kept() -> None:
    reply = Server6(LEASE).receive(typical(Kind.SOLICIT).encode(), IPv6Address("fe80::1%k6t-eth0"), True)
    assert isinstance(reply, Reply)
    assert str(reply.destination) == "fe80::1%k6t-eth0"


# --- SOLICIT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hint", [(), (OURS,), (FOREIGN,)])
def test_solicit_is_offered_the_address_whatever_it_hints(hint: tuple[IPv6Address, ...]) -> None:
    answer = answered(message(Kind.SOLICIT, ia_na(0x05060708, *hint)))
    assert answer.kind == Kind.ADVERTISE
    assert outcome(answer) == [(0x05060708, [(str(OURS), LIFETIME)])]
    assert answer.values(Code.PREFERENCE) == (b"\xff",)
    assert answer.values(Code.RAPID_COMMIT) == ()


def test_solicit_with_rapid_commit_is_a_whole_exchange() -> None:
    answer = answered(message(Kind.SOLICIT, Option(Code.RAPID_COMMIT, b""), ia_na()))
    assert answer.kind == Kind.REPLY
    assert answer.values(Code.RAPID_COMMIT) == (b"",)
    assert answer.values(Code.PREFERENCE) == ()
    assert outcome(answer) == [GIVEN]


def test_solicit_for_a_prefix_alone_is_no_offer_to_prefer() -> None:
    answer = answered(message(Kind.SOLICIT, Ia(Code.IA_PD, 3).option()))
    assert outcome(answer) == [(3, Status.NO_PREFIX_AVAIL)]
    assert answer.values(Code.PREFERENCE) == ()


# --- REQUEST ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hint", [(), (OURS,), (FOREIGN,), (FOREIGN, OURS)])
def test_request_is_given_the_address_alone(hint: tuple[IPv6Address, ...]) -> None:
    answer = answered(message(Kind.REQUEST, ia_na(1, *hint)))
    assert answer.kind == Kind.REPLY
    assert outcome(answer) == [GIVEN]
    assert status(answer.options) is None


def test_further_ias_get_a_status() -> None:
    options = [ia_na(1), ia_na(2), Ia(Code.IA_TA, 3).option(), Ia(Code.IA_PD, 4).option()]
    answer = answered(message(Kind.REQUEST, *options))
    assert outcome(answer) == [
        GIVEN,
        (2, Status.NO_ADDRS_AVAIL),
        (3, Status.NO_ADDRS_AVAIL),
        (4, Status.NO_PREFIX_AVAIL),
    ]
    assert [ia.code for ia in associations(answer)] == [Code.IA_NA, Code.IA_NA, Code.IA_TA, Code.IA_PD]


def test_the_ia_that_names_the_address_keeps_it() -> None:
    answer = answered(message(Kind.REQUEST, ia_na(2), ia_na(1, OURS), ia_na(3, OURS)))
    assert outcome(answer) == [(2, Status.NO_ADDRS_AVAIL), GIVEN, (3, Status.NO_ADDRS_AVAIL)]


def test_an_ia_ta_never_holds_the_address() -> None:
    ta = Ia(Code.IA_TA, 9, addresses=(IaAddress(OURS, 0, 0),)).option()
    assert outcome(answered(message(Kind.REQUEST, ta))) == [(9, Status.NO_ADDRS_AVAIL)]


def test_offers_and_leases_agree_through_an_exchange() -> None:
    offer = answered(message(Kind.SOLICIT, ia_na(4), ia_na(5)))
    again = [ia.option() for ia in associations(offer)]
    assert outcome(answered(message(Kind.REQUEST, *again))) == outcome(offer)


@pytest.mark.parametrize(
    ("preferred", "timers"),
    [(LIFETIME, (43_156_800, 69_050_880)), (100, (50, 80)), (INFINITE_S, (INFINITE_S,) * 2)],
)
def test_t1_and_t2(preferred: int, timers: tuple[int, int]) -> None:
    lease = replace(LEASE, preferred_s=preferred, valid_s=INFINITE_S)
    [ia] = associations(answered(message(Kind.REQUEST, ia_na()), lease))
    assert (ia.t1_s, ia.t2_s) == timers
    assert ia.addresses == (IaAddress(OURS, preferred, INFINITE_S),)


# --- CONFIRM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addresses", "verdict"),
    [
        ((OURS,), Status.SUCCESS),
        ((FOREIGN,), Status.NOT_ON_LINK),
        ((IPv6Address("2001:db8::1"),), Status.NOT_ON_LINK),
        ((OURS, FOREIGN), Status.NOT_ON_LINK),
    ],
)
def test_confirm(addresses: tuple[IPv6Address, ...], verdict: Status) -> None:
    answer = answered(message(Kind.CONFIRM, *(ia_na(n, each) for n, each in enumerate(addresses))), FULL)
    assert answer.kind == Kind.REPLY
    assert status(answer.options) == verdict
    assert codes(answer) == [Code.STATUS]


@pytest.mark.parametrize("options", [(), (ia_na(),), (Ia(Code.IA_PD, 1).option(),)])
def test_confirm_without_an_address_is_not_answered(options: tuple[Option, ...]) -> None:
    assert reason(message(Kind.CONFIRM, *options)) == "CONFIRM: no address to confirm"


# --- RENEW and REBIND -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.RENEW, Kind.REBIND])
def test_refresh(kind: Kind) -> None:
    assert outcome(answered(message(kind, ia_na(1, OURS)))) == [GIVEN]


@pytest.mark.parametrize("kind", [Kind.RENEW, Kind.REBIND])
def test_an_unknown_address_is_taken_back_and_ours_given(kind: Kind) -> None:
    answer = answered(message(kind, ia_na(1, FOREIGN)))
    assert outcome(answer) == [(1, [(str(OURS), LIFETIME), (str(FOREIGN), 0)])]


@pytest.mark.parametrize("kind", [Kind.RENEW, Kind.REBIND])
def test_the_unknown_address_of_a_further_ia_is_taken_back(kind: Kind) -> None:
    answer = answered(message(kind, ia_na(2, FOREIGN), ia_na(1, OURS), ia_na(3)))
    assert outcome(answer) == [(2, [(str(FOREIGN), 0)]), GIVEN, (3, Status.NO_ADDRS_AVAIL)]


@pytest.mark.parametrize("kind", [Kind.RENEW, Kind.REBIND])
def test_an_unknown_binding_is_assigned(kind: Kind) -> None:
    assert outcome(answered(message(kind, ia_na(77)))) == [(77, [(str(OURS), LIFETIME)])]


# --- RELEASE and DECLINE ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.RELEASE, Kind.DECLINE])
def test_giving_back_succeeds_without_addresses(kind: Kind) -> None:
    answer = answered(message(kind, ia_na(1, OURS)), FULL)
    assert (answer.kind, status(answer.options)) == (Kind.REPLY, Status.SUCCESS)
    assert codes(answer) == [Code.STATUS]


@pytest.mark.parametrize("kind", [Kind.RELEASE, Kind.DECLINE])
def test_giving_back_what_was_never_had(kind: Kind) -> None:
    temporary = Ia(Code.IA_TA, 4, addresses=(IaAddress(OURS, 0, 0),)).option()
    options = [ia_na(1, OURS), ia_na(2, FOREIGN), Ia(Code.IA_PD, 3).option(), temporary]
    answer = answered(message(kind, *options))
    assert status(answer.options) == Status.SUCCESS
    assert outcome(answer) == [(iaid, Status.NO_BINDING) for iaid in (2, 3, 4)]


@pytest.mark.parametrize("kind", [Kind.RELEASE, Kind.DECLINE])
def test_the_address_is_there_again_after_it_was_given_back(kind: Kind) -> None:
    server = Server6(LEASE)
    request = message(Kind.REQUEST, ia_na(1, OURS)).encode()
    before = server.receive(request, GUEST, True)
    assert isinstance(server.receive(typical(kind).encode(), GUEST, True), Reply)
    assert server.receive(request, GUEST, True) == before


# --- INFORMATION-REQUEST and options ----------------------------------------------------------------


@pytest.mark.parametrize("client", [CLIENT, None])
@pytest.mark.parametrize("server", [SERVER, None])
def test_information_request(client: bytes | None, server: bytes | None) -> None:
    answer = answered(message(Kind.INFORMATION_REQUEST, client=client, server=server), FULL)
    assert answer.kind == Kind.REPLY
    assert codes(answer) == [23, 24, 31, 56, 56]


VALUES = {
    23: (IPv6Address("fd00:10:96::a").packed,),
    24: (b"\x07default\x03svc\x07cluster\x05local\0\x07cluster\x05local\0",),
    31: (IPv6Address("fd00::123").packed + IPv6Address("fd00::124").packed,),
    56: (
        b"\0\x01\0\x10" + IPv6Address("fd00::123").packed,
        b"\0\x01\0\x10" + IPv6Address("fd00::124").packed,
    ),
}


@given(st.lists(st.sampled_from([*VALUES, 21, 32, 59, 82, 0xFFFF]), unique=True))
def test_the_option_request_is_honoured(wanted: list[int]) -> None:
    for kind in (Kind.SOLICIT, Kind.REQUEST, Kind.RENEW, Kind.REBIND, Kind.INFORMATION_REQUEST):
        request = typical(kind)
        answer = answered(replace(request, options=(*request.options, option_request(*wanted))), FULL)
        for code, values in VALUES.items():
            assert answer.values(Code(code)) == (values if code in wanted else ())
        assert set(codes(answer)) <= {Code.IA_NA, Code.PREFERENCE, *wanted}


def test_nothing_is_sent_empty() -> None:
    answer = answered(message(Kind.REQUEST, ia_na(), option_request(*VALUES, 39), Option(39, b"\0\0")))
    assert codes(answer) == [Code.IA_NA]


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ([option_request(39), Option(39, b"\x01\0")], True),
        ([option_request(23), Option(39, b"\x01\0")], False),
        ([option_request(39)], False),
        ([Option(39, b"\x01\0")], False),
    ],
)
def test_the_name_is_for_a_client_that_sent_and_asked_for_one(options: list[Option], sent: bool) -> None:
    answer = answered(message(Kind.REQUEST, ia_na(), *options), FULL)
    assert answer.values(Code.CLIENT_FQDN) == ((b"\x06\x03vm1",) if sent else ())


def test_an_option_request_of_odd_length_counts_as_far_as_it_goes() -> None:
    answer = answered(message(Kind.REQUEST, ia_na(), Option(Code.OPTION_REQUEST, b"\0\x17\0")), FULL)
    assert codes(answer) == [Code.IA_NA, Code.DNS_SERVERS]


# --- other clients ----------------------------------------------------------------------------------


LLT = b"\0\x01\0\x01\x2b\xc4\x2d\x5a"
UUID = b"\0\x04" + b"\x11" * 16
GUEST_BYTES, OTHER_BYTES = (
    bytes.fromhex(GUEST_MAC.replace(":", "")),
    bytes.fromhex(OTHER_MAC.replace(":", "")),
)


@pytest.mark.parametrize(
    ("duid", "source_mac", "served"),
    [
        (CLIENT, None, True),
        (LLT + GUEST_BYTES, None, True),
        (duid_ll(OTHER_MAC), None, False),
        (LLT + OTHER_BYTES, None, False),
        (UUID, None, False),  # nothing shows that it is our client
        (UUID, GUEST_MAC, True),
        (UUID, OTHER_MAC, False),
        (LLT + OTHER_BYTES, GUEST_MAC, True),  # a cloned disk keeps the DUID of the first machine
        (CLIENT, OTHER_MAC, False),
        (CLIENT, GUEST_MAC.upper().replace(":", "-"), True),
        (CLIENT, "nonsense", False),
        (None, GUEST_MAC, True),
        (None, None, False),
    ],
)
def test_which_client_is_served(duid: bytes | None, source_mac: str | None, served: bool) -> None:
    kinds = [Kind.INFORMATION_REQUEST] if duid is None else ANSWERED
    for kind in kinds:
        request = message(kind, *typical(kind).options[2 if kind in WITH_SERVER else 1 :], client=duid)
        assert isinstance(ask(request, ONE_CLIENT, source_mac=source_mac), Message) is served
        if kind in WITH_SERVER:
            told = ask(request, ONE_CLIENT, source_mac=source_mac, multicast=False)
            assert isinstance(told, Message) is served


def test_without_a_mac_everybody_on_the_link_is_served() -> None:
    for duid in (CLIENT, duid_ll(OTHER_MAC), UUID):
        assert outcome(answered(message(Kind.REQUEST, ia_na(), client=duid), source_mac=OTHER_MAC)) == [GIVEN]


# --- what a fuzzer sends ----------------------------------------------------------------------------

FRAGMENTS = st.one_of(
    st.builds(Option, st.integers(0, 90), st.binary(max_size=40)),
    st.builds(
        Option, st.sampled_from([Code.CLIENT_ID]), st.sampled_from([CLIENT, duid_ll(OTHER_MAC), UUID, b""])
    ),
    st.just(Option(Code.SERVER_ID, SERVER)),
    st.just(Option(Code.RAPID_COMMIT, b"")),
    st.builds(ia_na, st.integers(0, 3), st.sampled_from([OURS, FOREIGN])),
    st.builds(Option, st.sampled_from([3, 4, 25]), st.binary(max_size=60)),
    st.builds(option_request, st.sampled_from([23, 24, 31, 39, 56])),
    st.just(Option(Code.CLIENT_FQDN, b"\x01")),
)
DATAGRAMS = st.one_of(
    st.binary(max_size=300),
    st.builds(
        lambda kind, options: bytes([kind]) + b"\x11\x22\x33" + b"".join(o.encode() for o in options),
        st.integers(0, 14),
        st.lists(FRAGMENTS, max_size=8),
    ),
)
SOURCES = st.one_of(st.sampled_from([GUEST, OURS, IPv6Address("::")]), st.ip_addresses(v=6))


@given(DATAGRAMS, SOURCES, st.booleans(), st.sampled_from([None, GUEST_MAC, OTHER_MAC]))
def test_any_datagram_is_answered_to_our_client_or_not_at_all(
    datagram: bytes, source: IPv6Address, multicast: bool, source_mac: str | None
) -> None:
    reply = Server6(ONE_CLIENT).receive(datagram, source, multicast, source_mac)
    if isinstance(reply, Ignored):
        assert reply.reason and "\n" not in reply.reason
        return
    request, answer = parse_message(datagram), parse_message(reply.data)
    assert isinstance(request, Message) and isinstance(answer, Message)
    assert source_mac != OTHER_MAC
    assert source_mac == GUEST_MAC or GUEST_BYTES in request.values(Code.CLIENT_ID)[0]
    assert reply.destination == source and (source.is_link_local or source == OURS)
    assert answer.transaction == request.transaction
    given_out = [a for ia in associations(answer) for a in ia.addresses if a.valid_s]
    assert all(a.address == OURS for a in given_out) and len(given_out) <= 1
    assert not any(isinstance(ia, Malformed) for ia in associations(answer))


def test_an_answer_fits_in_a_datagram_whatever_is_asked() -> None:
    fits = Server6(FULL).receive(message(Kind.RENEW, *(ia_na(n) for n in range(64))).encode(), GUEST, True)
    assert isinstance(fits, Reply) and len(fits.data) < 8192
    assert "at most 64 are answered" in reason(message(Kind.RENEW, *(ia_na(n) for n in range(65))))
    assert "at most 64 are answered" in reason(message(Kind.RENEW, ia_na(1, *[FOREIGN] * 64)))


# --- an independent decoder, and bad leases ---------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (
            message(Kind.SOLICIT, ia_na(1), option_request(23, 24)),
            "dhcp6 advertise (xid=112233 (client-ID hwaddr type 1 0a580af40107) "
            "(server-ID hwaddr type 1 020000000000) (preference 255) "
            "(IA_NA IAID:1 T1:43156800 T2:69050880 "
            "(IA_ADDR fd10:0:2::2 pltime:86313600 vltime:86313600)) "
            "(DNS-server fd00:10:96::a) (DNS-search-list default.svc.cluster.local. cluster.local.))",
        ),
        (
            message(Kind.SOLICIT, Option(Code.RAPID_COMMIT, b""), ia_na(1), ia_na(2), option_request(56)),
            "dhcp6 reply (xid=112233 (client-ID hwaddr type 1 0a580af40107) "
            "(server-ID hwaddr type 1 020000000000) (rapid-commit) "
            "(IA_NA IAID:1 T1:43156800 T2:69050880 "
            "(IA_ADDR fd10:0:2::2 pltime:86313600 vltime:86313600)) "
            "(IA_NA IAID:2 T1:0 T2:0 (status-code NoAddrsAvail)) "
            "(NTP-server subopt:1 fd00::123) (NTP-server subopt:1 fd00::124))",
        ),
        (
            message(Kind.CONFIRM, ia_na(1, FOREIGN)),
            "dhcp6 reply (xid=112233 (client-ID hwaddr type 1 0a580af40107) "
            "(server-ID hwaddr type 1 020000000000) (status-code NotOnLink))",
        ),
    ],
)
def test_what_tcpdump_reads(request_: Message, text: str) -> None:
    wire = answered(request_, FULL).encode()
    assert tcpdump(udp(wire, "fe80::ff:fe00:0", str(GUEST), (547, 546))).endswith(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"address": IPv6Address("fe80::1")}, "address fe80::1 cannot be leased"),
        ({"address": IPv6Address("::")}, "address :: cannot be leased"),
        ({"address": IPv6Address("ff02::1")}, "address ff02::1 cannot be leased"),
        ({"server_duid": b"\0\x03"}, "server DUID '0003' is not valid: 2 bytes"),
        ({"mac": "abcd"}, "MAC 'abcd' is not valid"),
        ({"preferred_s": 0}, "lifetimes preferred 0 s"),
        ({"preferred_s": 2, "valid_s": 1}, "lifetimes preferred 2 s, valid 1 s"),
        ({"valid_s": INFINITE_S + 1}, "lifetimes"),
        ({"hostname": "a b"}, "name 'a b' is not valid"),
        ({"search": ("ok.com", "10.0.0.1")}, "search domain '10.0.0.1' is not valid"),
    ],
)
def test_a_lease_that_cannot_be_sent_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(LEASE, **change)  # type: ignore[arg-type]  # each value is right for its field
