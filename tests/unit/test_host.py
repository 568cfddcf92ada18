"""The other end of the guest's link, frame by frame: what it answers, what it does not, when it speaks.

The frames of the guest are put together here, not by the code under test.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Network
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.dhcp.packet import BOOT_REPLY, BOOT_REQUEST, Message, MessageType, build, parse
from launcher.dhcp.server import DhcpLease, Server
from launcher.host import Frame, Host, Link, Note
from launcher.ipv6.advert import Prefix, RouterAdvert
from launcher.ipv6.packet import duid_ll
from launcher.ipv6.server import Dhcp6Lease, Server6
from tests.unit.capture import icmp6, tcpdump, udp

BRIDGE, GUEST = bytes.fromhex("ca84cbfaa9fd"), bytes.fromhex("0a580af40107")
GATEWAY, FOREIGN = bytes.fromhex("0a580af40101"), bytes.fromhex("0a58000000ff")
ALL = b"\xff" * 6
SERVER, OWN, OTHER = IPv4Address("169.254.75.10"), IPv4Address("10.244.1.7"), IPv4Address("10.244.9.9")
NOBODY, EVERYBODY = IPv4Address(0), IPv4Address("255.255.255.255")
# What the MACs give by EUI-64.
US6, GUEST6 = "fe80::c884:cbff:fefa:a9fd", "fe80::858:aff:fef4:107"
GATEWAY6 = "fd00:10:244:1::1"
ROUTERS, NODES, SERVERS6 = "ff02::2", "ff02::1", "ff02::1:2"
LEASE = DhcpLease(
    mac="0a:58:0a:f4:01:07",
    address=IPv4Interface("10.244.1.7/24"),
    server_id=SERVER,
    routers=(IPv4Address("10.244.1.1"),),
    mtu=1450,
)
LEASE6 = Dhcp6Lease(IPv6Address("fd00:10:244:1::7"), duid_ll("ca:84:cb:fa:a9:fd"))
ADVERT = RouterAdvert(prefixes=(Prefix(IPv6Network("fd00:10:244:1::/64")),), mtu=1450)
LINK = Link(BRIDGE, GUEST, SERVER, arp=True, gateway6=IPv6Address(GATEWAY6))
SOLICITATION = bytes.fromhex("8500000000000000")


def bridge(now: float = 0.0) -> Host:
    """As in the bridge binding, with both families."""
    return Host(LINK, Server(LEASE), Server6(LEASE6), ADVERT, now, Random(1))


def masquerade(now: float = 0.0) -> Host:
    server = IPv4Address("10.0.2.1")
    link = Link(BRIDGE, None, server, arp=False, gateway6=None)
    lease = replace(LEASE, mac=None, address=IPv4Interface("10.0.2.2/24"), server_id=server)
    advert = replace(ADVERT, mac="ca:84:cb:fa:a9:fd")
    return Host(link, Server(lease), Server6(LEASE6), advert, now, Random(1))


def frames(answers: Iterable[Frame | Note]) -> list[Frame]:
    return [answer for answer in answers if isinstance(answer, Frame)]


def notes(answers: Iterable[Frame | Note]) -> list[Note]:
    return [answer for answer in answers if isinstance(answer, Note)]


def heard(host: Host, frame: bytes, now: float = 1.0) -> list[Frame | Note]:
    return list(host.receive(frame, now, from_guest=True))


def only(answers: Iterable[Frame | Note]) -> bytes:
    [frame] = frames(answers)
    assert frame.to_guest
    return frame.data


# ---- frames of the guest


def ethernet(kind: int, body: bytes, to: bytes = ALL, source: bytes = GUEST) -> bytes:
    return to + source + struct.pack("!H", kind) + body


def dhcp(
    kind: MessageType,
    options: Mapping[int, bytes] | None = None,
    source: IPv4Address = NOBODY,
    destination: IPv4Address = EVERYBODY,
    to: bytes = ALL,
    **fields: object,
) -> bytes:
    message = Message(BOOT_REQUEST, 0x11223344, GUEST, {53: bytes([kind]), **(options or {})})
    data = build(replace(message, **fields))  # type: ignore[arg-type]
    datagram = struct.pack("!HHHH", 68, 67, 8 + len(data), 0) + data
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0)
    return ethernet(0x0800, head + source.packed + destination.packed + datagram, to)


def answer_of(frame: bytes) -> tuple[bytes, IPv4Address, IPv4Address, tuple[int, int], Message]:
    """Destination MAC, source and destination address, ports, and the message."""
    assert frame[6:14] == BRIDGE + b"\x08\x00"
    assert "[udp sum ok]" in tcpdump(frame[14:])
    message = parse(frame[42:], BOOT_REPLY)
    assert isinstance(message, Message)
    ports = (int.from_bytes(frame[34:36], "big"), int.from_bytes(frame[36:38], "big"))
    return frame[:6], IPv4Address(frame[26:30]), IPv4Address(frame[30:34]), ports, message


def arp(target: IPv4Address, sender: IPv4Address = OWN, operation: int = 1, source: bytes = GUEST) -> bytes:
    head = b"\x00\x01\x08\x00\x06\x04" + struct.pack("!H", operation)
    return ethernet(0x0806, head + source + sender.packed + bytes(6) + target.packed, source=source)


def ipv6(packet: bytes, source: bytes = GUEST) -> bytes:
    return ethernet(0x86DD, packet, bytes.fromhex("333300000001"), source)


def group_of(address: str) -> str:
    return str(IPv6Address(b"\xff\x02" + b"\0" * 9 + b"\x01\xff" + IPv6Address(address).packed[13:]))


def solicitation(target: str, source: str = GUEST6, to: str = "") -> bytes:
    message = bytes.fromhex("8700000000000000") + IPv6Address(target).packed
    if source != "::":
        message += b"\x01\x01" + GUEST
    return ipv6(icmp6(message, source, to or group_of(target)))


def advertisement(target: str, mac: bytes = GATEWAY, options: bytes | None = None) -> bytes:
    option = b"\x02\x01" + mac if options is None else options
    message = bytes.fromhex("88000000e0000000") + IPv6Address(target).packed + option
    return ipv6(icmp6(message, GATEWAY6, US6), GATEWAY)


def with_hop_limit(frame: bytes, hop_limit: int) -> bytes:
    return frame[:21] + bytes([hop_limit]) + frame[22:]


# ---- DHCP


@pytest.mark.parametrize(
    ("frame", "kind", "mac", "address"),
    [
        (dhcp(MessageType.DISCOVER), MessageType.OFFER, GUEST, OWN),
        (dhcp(MessageType.DISCOVER, flags=0x8000), MessageType.OFFER, ALL, EVERYBODY),
        (dhcp(MessageType.REQUEST, {50: OWN.packed}), MessageType.ACK, GUEST, OWN),
        (dhcp(MessageType.REQUEST, {50: OWN.packed}, flags=0x8000), MessageType.ACK, ALL, EVERYBODY),
        (
            dhcp(MessageType.REQUEST, source=OWN, destination=SERVER, to=GATEWAY, ciaddr=OWN),
            MessageType.ACK,
            GUEST,
            OWN,
        ),
        (dhcp(MessageType.REQUEST, source=OWN, ciaddr=OWN), MessageType.ACK, GUEST, OWN),
        (dhcp(MessageType.REQUEST, {50: OTHER.packed}), MessageType.NAK, ALL, EVERYBODY),
        (dhcp(MessageType.INFORM, source=OWN, ciaddr=OWN), MessageType.ACK, GUEST, OWN),
    ],
    ids=["discover", "broadcast flag", "reboot", "reboot, flag", "renew", "rebind", "wrong", "inform"],
)
def test_delivery(frame: bytes, kind: MessageType, mac: bytes, address: IPv4Address) -> None:
    got_mac, source, destination, ports, message = answer_of(only(heard(bridge(), frame)))
    assert (got_mac, source, destination, ports) == (mac, SERVER, address, (67, 68))
    assert (message.kind, message.xid, message.chaddr) == (kind, 0x11223344, GUEST)


@pytest.mark.parametrize(
    "frame",
    [
        dhcp(MessageType.DISCOVER, chaddr=FOREIGN),
        dhcp(MessageType.DISCOVER, giaddr=IPv4Address("10.244.1.1")),
        dhcp(MessageType.REQUEST, source=OWN, destination=IPv4Address("10.244.1.99"), to=FOREIGN, ciaddr=OWN),
        dhcp(MessageType.REQUEST, source=OWN, destination=IPv4Address("10.244.1.99"), ciaddr=OTHER),
        dhcp(MessageType.REQUEST, {54: IPv4Address("10.244.1.99").packed, 50: OWN.packed}),
        dhcp(MessageType.RELEASE, {54: SERVER.packed}, source=OWN, destination=SERVER, ciaddr=OWN),
        dhcp(MessageType.OFFER),
    ],
    ids=["other client", "relay", "renewal elsewhere", "wrong elsewhere", "other server", "release", "offer"],
)
def test_no_answer_over_ipv4(frame: bytes) -> None:
    assert heard(bridge(), frame) == []


def test_nobody_on_the_pods_network_is_served() -> None:
    for frame in (dhcp(MessageType.DISCOVER), arp(SERVER), ipv6(icmp6(SOLICITATION, GUEST6, ROUTERS))):
        host = bridge()
        assert list(host.receive(frame, 1.0, from_guest=False)) == []


def test_a_guest_of_any_mac_is_served_behind_masquerade() -> None:
    frame = only(heard(masquerade(), dhcp(MessageType.DISCOVER, chaddr=FOREIGN)))
    mac, source, destination, _, message = answer_of(frame)
    assert (mac, str(source), str(destination)) == (FOREIGN, "10.0.2.1", "10.0.2.2")
    assert message.chaddr == FOREIGN


def test_declines_are_told_at_powers_of_two() -> None:
    host = bridge()
    told = []
    for count in range(1, 10):
        answers = heard(host, dhcp(MessageType.DECLINE, {50: OWN.packed, 54: SERVER.packed}), float(count))
        assert frames(answers) == []
        if found := notes(answers):
            assert found[0].warning and "10.244.1.7" in found[0].text
            told.append(count)
    assert told == [1, 2, 4, 8]


def test_notes_of_a_guest_that_asks_all_the_time_are_few() -> None:
    host = bridge()
    request = dhcp(MessageType.REQUEST, {50: OWN.packed})
    answers = [heard(host, request, now / 100) for now in range(1000)]
    assert all(len(frames(answer)) == 1 for answer in answers)
    assert 9 <= sum(len(notes(answer)) for answer in answers) <= 11


def test_without_a_server_there_is_silence() -> None:
    host = Host(Link(BRIDGE, GUEST, None, arp=True, gateway6=None), None, None, None, 0.0, Random(1))
    for frame in (dhcp(MessageType.DISCOVER), arp(SERVER), arp(NOBODY), solicitation(US6)):
        assert heard(host, frame) == []
    assert host.due() is None
    assert host.tick(1e9) == []


# ---- ARP


@pytest.mark.parametrize("sender", [OWN, NOBODY])
def test_the_servers_address_is_answered_for(sender: IPv4Address) -> None:
    frame = only(heard(bridge(), arp(SERVER, sender)))
    assert frame[:14] == GUEST + BRIDGE + b"\x08\x06"
    assert frame[20:] == b"\x00\x02" + BRIDGE + SERVER.packed + GUEST + sender.packed


@pytest.mark.parametrize("target", [OWN, OTHER, NOBODY, IPv4Address("169.254.75.11")])
def test_no_other_address_is_answered_for(target: IPv4Address) -> None:
    """Above all not the guest's own, which it asks for to see whether it is free (RFC 5227)."""
    assert heard(bridge(), arp(target, NOBODY)) == []
    assert heard(bridge(), arp(target)) == []


def test_an_arp_answer_is_not_answered() -> None:
    assert heard(bridge(), arp(SERVER, operation=2)) == []


def test_where_the_kernel_has_the_address_it_answers_alone() -> None:
    assert heard(masquerade(), arp(IPv4Address("10.0.2.1"))) == []


# ---- the gateway's MAC, and the router we make of it


def test_the_gateway_is_asked_for_each_second_until_it_is_found() -> None:
    host = bridge(100.0)
    assert host.due() == 100.0
    [question] = host.tick(100.0)
    assert not question.to_guest
    text = tcpdump(question.data[14:])
    assert "neighbor solicitation" in text and f"who has {GATEWAY6}" in text and "[icmp6 sum ok]" in text
    assert question.data[6:12] == BRIDGE
    assert host.due() == 101.0
    assert host.tick(100.5) == []
    assert len(host.tick(101.0)) == 1
    # Before it is known, nothing is advertised, asked or not.
    assert heard(host, ipv6(icmp6(SOLICITATION, GUEST6, ROUTERS)), 101.0) == []
    assert heard(host, solicitation(US6), 101.0) == []
    [note] = host.receive(advertisement(GATEWAY6), 101.2, from_guest=False)
    assert isinstance(note, Note) and GATEWAY.hex(":") in note.text
    assert host.due() == 101.2
    [advert] = host.tick(101.2)
    assert advert.to_guest
    text = tcpdump(advert.data[14:])
    assert f"{US6} > {NODES}: [icmp6 sum ok] ICMP6, router advertisement" in text
    assert f"source link-address option (1), length 8 (1): {GATEWAY.hex(':')}" in text
    assert advert.data[:6] == bytes.fromhex("333300000001")
    due = host.due()
    assert due is not None and due > 101.2


def found(now: float = 1.0) -> Host:
    """A bridge binding's host that knows its gateway and has advertised it once."""
    host = bridge()
    assert len(list(host.receive(advertisement(GATEWAY6), now, from_guest=False))) == 1
    assert len(host.tick(now)) == 1
    return host


@pytest.mark.parametrize(
    "frame",
    [
        advertisement("fd00:10:244:1::2"),
        advertisement(GATEWAY6, options=b""),
        advertisement(GATEWAY6, mac=ALL),
        advertisement(GATEWAY6, mac=bytes(6)),
        with_hop_limit(advertisement(GATEWAY6), 254),
        solicitation(GATEWAY6),
    ],
    ids=["another", "no MAC", "group MAC", "zero MAC", "forwarded", "question"],
)
def test_what_does_not_tell_the_gateways_mac(frame: bytes) -> None:
    host = bridge()
    assert list(host.receive(frame, 1.0, from_guest=False)) == []
    assert not any(answer.to_guest for answer in host.tick(1.0))


def test_the_guest_cannot_tell_the_gateways_mac() -> None:
    host = bridge()
    assert heard(host, advertisement(GATEWAY6)) == []
    assert not any(answer.to_guest for answer in host.tick(1.0))


def test_a_gateway_that_moves_is_advertised_anew() -> None:
    host = found()
    assert list(host.receive(advertisement(GATEWAY6), 2.0, from_guest=False)) == []
    assert len(list(host.receive(advertisement(GATEWAY6, FOREIGN), 3.0, from_guest=False))) == 1
    [advert] = host.tick(3.0)
    assert FOREIGN.hex(":") in tcpdump(advert.data[14:])
    answer = only(heard(host, solicitation(US6), 3.0))
    assert FOREIGN.hex(":") in tcpdump(answer[14:])


def test_a_solicitation_is_answered_to_its_sender() -> None:
    host = found()
    assert heard(host, ipv6(icmp6(SOLICITATION, GUEST6, ROUTERS)), 2.0) == []
    due = host.due()
    assert due is not None and 2.0 <= due <= 2.5
    [advert] = host.tick(due)
    assert advert.data[:12] == GUEST + BRIDGE
    assert f"{US6} > {GUEST6}: [icmp6 sum ok]" in tcpdump(advert.data[14:])


def test_a_forwarded_solicitation_is_none() -> None:
    host = found()
    before = host.due()
    assert heard(host, with_hop_limit(ipv6(icmp6(SOLICITATION, GUEST6, ROUTERS)), 64), 2.0) == []
    assert host.due() == before


@pytest.mark.parametrize("to", ["", US6])
def test_who_has_the_router_is_answered_with_the_gateways_mac(to: str) -> None:
    frame = only(heard(found(), solicitation(US6, to=to)))
    assert frame[:12] == GUEST + BRIDGE
    text = tcpdump(frame[14:])
    assert f"{US6} > {GUEST6}: [icmp6 sum ok]" in text
    assert f"tgt is {US6}, Flags [router, solicited, override]" in text
    assert f"destination link-address option (2), length 8 (1): {GATEWAY.hex(':')}" in text


def test_a_probe_for_the_routers_address_is_answered_to_everybody() -> None:
    """RFC 4861 section 7.2.4: from no address, hence to all nodes and not "solicited"."""
    frame = only(heard(found(), solicitation(US6, source="::")))
    assert f"{US6} > {NODES}:" in tcpdump(frame[14:])
    assert "Flags [router, override]" in tcpdump(frame[14:])


@pytest.mark.parametrize(
    "frame",
    [
        solicitation("fd00:10:244:1::7", source="::"),
        solicitation("fd00:10:244:1::7"),
        solicitation(GATEWAY6),
        with_hop_limit(solicitation(US6), 64),
        advertisement(US6),
        ipv6(icmp6(b"\x80\x00\x00\x00" + bytes(4), GUEST6, US6)),
        ipv6(icmp6(b"", GUEST6, US6)),
        ipv6(icmp6(b"\x87", GUEST6, US6)),
    ],
    ids=["own, probe", "own", "gateway", "forwarded", "advertisement", "echo", "empty", "one byte"],
)
def test_no_answer_over_icmp6(frame: bytes) -> None:
    host = found()
    before = host.due()
    assert heard(host, frame) == []
    assert host.due() == before


def test_masquerade_advertises_itself_at_once_and_leaves_neighbours_to_the_kernel() -> None:
    host = masquerade(50.0)
    assert host.due() == 50.0
    [advert] = host.tick(50.0)
    assert BRIDGE.hex(":") in tcpdump(advert.data[14:])
    assert heard(host, solicitation(US6), 50.0) == []
    assert list(host.receive(advertisement(GATEWAY6), 51.0, from_guest=False)) == []
    assert heard(host, ipv6(icmp6(SOLICITATION, GUEST6, ROUTERS)), 60.0) == []
    [advert] = host.tick(60.5)
    assert advert.to_guest and f"{US6} > {GUEST6}:" in tcpdump(advert.data[14:])


def test_time_goes_on() -> None:
    """Each tick when it is due moves the next one on, so that no loop spins."""
    for host in (bridge(), masquerade(), found()):
        now = 0.0
        for _ in range(50):
            due = host.due()
            assert due is not None
            now = max(now, due)
            host.tick(now)
            later = host.due()
            assert later is not None and later > now


# ---- DHCPv6

CLIENT_ID = b"\x00\x01\x00\x0a\x00\x03\x00\x01" + GUEST
IA_NA = b"\x00\x03\x00\x0c" + bytes(12)
SERVER_ID = b"\x00\x02\x00\x0a\x00\x03\x00\x01" + BRIDGE


def dhcp6(kind: int, options: bytes = CLIENT_ID + IA_NA, source: str = GUEST6, to: str = SERVERS6) -> bytes:
    return ipv6(udp(bytes([kind, 1, 2, 3]) + options, source, to, (546, 547)))


def test_dhcp6_is_answered_from_our_link_local_address() -> None:
    frame = only(heard(bridge(), dhcp6(1)))
    assert frame[:12] == GUEST + BRIDGE
    text = tcpdump(frame[14:])
    assert f"{US6}.547 > {GUEST6}.546: [udp sum ok] dhcp6 advertise" in text
    assert "fd00:10:244:1::7" in text
    assert f"hwaddr type 1 {BRIDGE.hex()}" in text.replace("server-ID", "")


def test_a_dhcp6_decline_is_told() -> None:
    address = b"\x00\x05\x00\x18" + LEASE6.address.packed + bytes(8)
    ia = b"\x00\x03\x00\x28" + bytes(12) + address
    answers = heard(bridge(), dhcp6(9, CLIENT_ID + SERVER_ID + ia))
    assert len(frames(answers)) == 1
    [note] = notes(answers)
    assert note.warning and "declined" in note.text


@pytest.mark.parametrize(
    "frame",
    [
        dhcp6(1, IA_NA),
        dhcp6(12),
        dhcp6(1, source="fd00:10:244:1::9"),
        dhcp6(1, to=US6),
        dhcp6(5, CLIENT_ID + SERVER_ID + IA_NA, to="fe80::99"),
        ipv6(udp(b"", GUEST6, SERVERS6, (546, 547))),
    ],
    ids=["no client id", "relay", "not of this link", "solicit by unicast", "renewal elsewhere", "empty"],
)
def test_no_answer_over_dhcp6(frame: bytes) -> None:
    assert heard(bridge(), frame) == []


# ---- anything


@given(st.binary(max_size=400), st.booleans())
def test_no_frame_raises(frame: bytes, from_guest: bool) -> None:
    for host in (bridge(), masquerade()):
        list(host.receive(frame, 1.0, from_guest))


TEMPLATES = (
    dhcp(MessageType.DISCOVER),
    dhcp(MessageType.REQUEST, {50: OWN.packed, 61: b"\x01" + GUEST}),
    arp(SERVER),
    solicitation(US6),
    advertisement(GATEWAY6),
    ipv6(icmp6(SOLICITATION, GUEST6, ROUTERS)),
    dhcp6(1),
    dhcp6(5, CLIENT_ID + SERVER_ID + IA_NA),
)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(TEMPLATES),
            st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=4),
            st.booleans(),
        ),
        max_size=12,
    )
)
def test_no_sequence_of_nearly_right_frames_raises_or_leaves_the_link(
    steps: list[tuple[bytes, list[tuple[int, int]], bool]],
) -> None:
    for host in (bridge(), masquerade()):
        for number, (template, changes, from_guest) in enumerate(steps):
            frame = bytearray(template)
            for at, value in changes:
                frame[at % len(frame)] = value
            sent = frames(host.receive(bytes(frame), float(number), from_guest))
            sent += host.tick(float(number))
            for answer in sent:
                assert answer.data[6:12] == BRIDGE
                assert len(answer.data) <= 1450 + 14
                # Nothing but the question for the gateway goes to the pod's network.
                assert answer.to_guest or answer.data[54] == 135
