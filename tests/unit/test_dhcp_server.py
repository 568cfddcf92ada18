"""The DHCP server of one client: RFC 2131's tables, row by row, and what must never happen."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from statistics import median
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.dhcp import options as opt
from launcher.dhcp.packet import BOOT_REPLY, BOOT_REQUEST, Message, MessageType, build, parse
from launcher.dhcp.server import (
    BROADCAST,
    BROADCAST_MAC,
    DEFAULT_LEASE_S,
    Delivery,
    DhcpLease,
    Ignored,
    Reply,
    Server,
)
from tests.fuzz import dhcp as fuzz

GOLDEN = Path(__file__).parents[1] / "golden" / "dhcp"
MAC = bytes.fromhex("0a580af40107")
OTHER_MAC = bytes.fromhex("0a580af40108")
NOBODY = IPv4Address(0)
OWN = IPv4Address("10.244.1.7")
WRONG = IPv4Address("10.244.9.9")
US = IPv4Address("169.254.75.10")
THEM = IPv4Address("169.254.75.11")
GATEWAY = IPv4Address("10.244.1.1")
CLIENT_ID = b"\x01" + MAC
FLANNEL_ROUTES: tuple[opt.ClasslessRoute, ...] = (
    (IPv4Network("0.0.0.0/0"), GATEWAY),
    (IPv4Network("10.244.0.0/16"), GATEWAY),
)
LEASE = DhcpLease(
    mac=MAC.hex(":"),
    address=IPv4Interface("10.244.1.7/24"),
    server_id=US,
    routers=(GATEWAY,),
    dns=(IPv4Address("10.96.0.10"),),
    search=("default.svc.cluster.local", "svc.cluster.local", "cluster.local"),
    hostname="vm1",
    mtu=1450,
    routes=FLANNEL_ROUTES,
)
DISCOVER, OFFER, REQUEST, ACK, NAK = (
    MessageType.DISCOVER,
    MessageType.OFFER,
    MessageType.REQUEST,
    MessageType.ACK,
    MessageType.NAK,
)


def request(
    kind: MessageType, options: Mapping[int, bytes | IPv4Address] | None = None, **fields: object
) -> bytes:
    """A datagram of the client; addresses among the options are packed."""
    values = {
        code: value.packed if isinstance(value, IPv4Address) else value
        for code, value in (options or {}).items()
    }
    message = Message(BOOT_REQUEST, 0x11223344, MAC, {53: bytes((kind,))} | values)
    return build(replace(message, **fields))  # type: ignore[arg-type]


def answered(
    datagram: bytes, lease: DhcpLease = LEASE, source: IPv4Address = NOBODY
) -> tuple[Reply, Message]:
    reply = Server(lease).receive(datagram, source)
    assert isinstance(reply, Reply), reply
    message = parse(reply.datagram, BOOT_REPLY)
    assert isinstance(message, Message), message
    assert message.kind is reply.kind
    return reply, message


def ignored(datagram: bytes, lease: DhcpLease = LEASE) -> Ignored:
    found = Server(lease).receive(datagram)
    assert isinstance(found, Ignored), found
    return found


def test_a_whole_offer_byte_by_byte() -> None:
    discover = bytes.fromhex(
        "01010600 11223344 0000 8000 00000000 00000000 00000000 00000000 0a580af40107 00000000000000000000"
        + "00" * 192
        + "63825363 350101 3d07010a580af40107 39020240 370a0103060c0f1a1c2a7779 ff"
    ).ljust(300, b"\0")
    offer = bytes.fromhex(
        "02010600 11223344 0000 8000 00000000 0af40107 00000000 00000000 0a580af40107 00000000000000000000"
        + "00" * 192
        + "63825363 350102 3604a9fe4b0a 330405250a80 0104ffffff00 03040af40101 06040a60000a 0c03766d31"
        + "0f19"
        + b"default.svc.cluster.local".hex()
        + "1a0205aa 1c040af401ff 3d07010a580af40107"
        + "771f 0764656661756c740373766307636c7573746572056c6f63616c00 c008 c00c"
        + "790c 100af40af40101 000af40101 ff"
    )
    reply, _ = answered(discover)
    assert reply == Reply(OFFER, offer, Delivery.BROADCAST, BROADCAST, BROADCAST_MAC)


SELECT = {54: US, 50: OWN}


@pytest.mark.parametrize(
    ("datagram", "kind", "delivery"),
    [
        (request(DISCOVER), OFFER, Delivery.LINK),
        (request(DISCOVER, {50: WRONG}), OFFER, Delivery.LINK),
        (request(DISCOVER, flags=0x8000), OFFER, Delivery.BROADCAST),
        (request(DISCOVER, {80: b""}), ACK, Delivery.LINK),
        # A DISCOVER has no ciaddr: what stands there must not decide where the answer goes.
        (request(DISCOVER, {80: b""}, ciaddr=WRONG), ACK, Delivery.LINK),
        (request(REQUEST, SELECT), ACK, Delivery.LINK),
        (request(REQUEST, SELECT, flags=0x8000), ACK, Delivery.BROADCAST),
        (request(REQUEST, {54: US, 50: WRONG}), NAK, Delivery.BROADCAST),
        (request(REQUEST, {50: OWN}), ACK, Delivery.LINK),
        (request(REQUEST, {50: OWN}, flags=0x8000), ACK, Delivery.BROADCAST),
        (request(REQUEST, {50: WRONG}), NAK, Delivery.BROADCAST),
        (request(REQUEST, {50: IPv4Address("192.168.1.7")}), NAK, Delivery.BROADCAST),
        (request(REQUEST, ciaddr=OWN), ACK, Delivery.ADDRESS),
        # RFC 2131 section 4.1: ciaddr comes before the broadcast bit.
        (request(REQUEST, ciaddr=OWN, flags=0x8000), ACK, Delivery.ADDRESS),
        (request(REQUEST, ciaddr=WRONG), NAK, Delivery.BROADCAST),
        (request(REQUEST, {54: US}, ciaddr=OWN), ACK, Delivery.ADDRESS),
        (request(REQUEST, {50: OWN}, ciaddr=WRONG), NAK, Delivery.BROADCAST),
        (request(REQUEST, {50: WRONG}, ciaddr=OWN), NAK, Delivery.BROADCAST),
    ],
)
def test_each_state_gets_its_answer(datagram: bytes, kind: MessageType, delivery: Delivery) -> None:
    reply, message = answered(datagram)
    asked = parse(datagram)
    assert isinstance(asked, Message)
    assert (reply.kind, reply.delivery) == (kind, delivery)
    assert (reply.address, reply.mac) == (
        (BROADCAST, BROADCAST_MAC) if delivery is Delivery.BROADCAST else (OWN, MAC)
    )
    assert (message.xid, message.flags, message.chaddr) == (asked.xid, asked.flags, MAC)
    assert (message.secs, message.hops, message.giaddr, message.siaddr) == (0, 0, NOBODY, NOBODY)
    assert message.options[54] == US.packed
    if kind is NAK:
        assert set(message.options) == {53, 54, 56}
        assert message.yiaddr == message.ciaddr == NOBODY
        assert reply.reason.encode() == message.options[56]
    else:
        assert message.yiaddr == OWN
        assert message.ciaddr == (OWN if delivery is Delivery.ADDRESS else NOBODY)
        assert message.options[51] == DEFAULT_LEASE_S.to_bytes(4, "big")
        assert (80 in message.options) == (80 in asked.options)


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (request(REQUEST, {54: THEM, 50: OWN}), f"another server, {THEM}"),
        (request(REQUEST, {54: THEM, 50: WRONG}), f"another server, {THEM}"),
        (request(REQUEST), "names no address"),
        (request(REQUEST, {54: US}), "names no address"),
        (request(REQUEST, {50: NOBODY}), "names no address"),
        (request(MessageType.RELEASE, {54: US}, ciaddr=OWN), f"RELEASE of {OWN}"),
        (request(OFFER), "OFFER is a server's message"),
        (request(ACK), "ACK is a server's message"),
        (request(NAK), "NAK is a server's message"),
        (request(DISCOVER, op=BOOT_REPLY), "op is 2"),
        (request(DISCOVER, chaddr=OTHER_MAC), "0a:58:0a:f4:01:08 is not the client's, 0a:58:0a:f4:01:07"),
        (request(DISCOVER, chaddr=MAC + b"\0"), "is not the client's"),
        (request(DISCOVER, chaddr=MAC[:5]), "is not the client's"),
        (request(DISCOVER, chaddr=b""), "is not the client's"),
        (request(REQUEST, SELECT, chaddr=OTHER_MAC), "is not the client's"),
        (request(MessageType.INFORM, chaddr=OTHER_MAC, ciaddr=OWN), "is not the client's"),
        (request(DISCOVER, giaddr=GATEWAY), f"relayed by {GATEWAY}"),
        (request(REQUEST, ciaddr=OWN, giaddr=GATEWAY), f"relayed by {GATEWAY}"),
        (request(DISCOVER, {61: bytes(256)}), "client identifier is longer than 255"),
        (b"", "0 bytes"),
    ],
)
def test_what_gets_no_answer(datagram: bytes, reason: str) -> None:
    found = ignored(datagram)
    assert reason in found.reason
    assert found.declines == 0


def test_declines_are_counted_and_change_nothing() -> None:
    server = Server(LEASE)
    decline = request(MessageType.DECLINE, SELECT)
    for count in (1, 2, 3):
        found = server.receive(decline)
        assert isinstance(found, Ignored)
        assert (found.kind, found.declines) == (MessageType.DECLINE, count)
        assert str(OWN) in found.reason
        assert isinstance(server.receive(request(DISCOVER)), Reply)
    for options in ({54: THEM, 50: OWN}, {54: US, 50: WRONG}, {54: US}):
        foreign = server.receive(request(MessageType.DECLINE, options))
        assert isinstance(foreign, Ignored) and foreign.declines == 0
    last = server.receive(decline)
    assert isinstance(last, Ignored) and last.declines == 4


@pytest.mark.parametrize(
    ("ciaddr", "source", "delivery", "address"),
    [
        (OWN, OWN, Delivery.ADDRESS, OWN),
        # An address that the guest was given by hand, in the network of the lease.
        (IPv4Address("10.244.1.20"), NOBODY, Delivery.ADDRESS, IPv4Address("10.244.1.20")),
        # RFC 2131 wants ciaddr; where it lacks, the packet's source does as well.
        (NOBODY, OWN, Delivery.ADDRESS, OWN),
        (NOBODY, NOBODY, Delivery.BROADCAST, BROADCAST),
        # Nobody makes us send anywhere else.
        (IPv4Address("192.0.2.1"), OWN, Delivery.BROADCAST, BROADCAST),
        (IPv4Address("10.244.1.255"), OWN, Delivery.BROADCAST, BROADCAST),
        (IPv4Address("224.0.0.1"), OWN, Delivery.BROADCAST, BROADCAST),
        (US, US, Delivery.BROADCAST, BROADCAST),
    ],
)
def test_inform_gets_options_and_no_address(
    ciaddr: IPv4Address, source: IPv4Address, delivery: Delivery, address: IPv4Address
) -> None:
    reply, message = answered(request(MessageType.INFORM, ciaddr=ciaddr), source=source)
    assert (reply.kind, reply.delivery, reply.address) == (ACK, delivery, address)
    assert (message.ciaddr, message.yiaddr) == (ciaddr, NOBODY)
    assert not {51, 58, 59} & set(message.options)
    assert {1, 3, 6, 12, 15, 26, 54, 119, 121} <= set(message.options)


def test_inform_never_makes_the_server_answer_itself() -> None:
    """In a masquerade binding the server lies in the client's network."""
    server_id = IPv4Address("10.0.2.1")
    lease = DhcpLease(None, IPv4Interface("10.0.2.2/24"), server_id, (server_id,))
    for ciaddr, delivery in (("10.0.2.2", Delivery.ADDRESS), ("10.0.2.1", Delivery.BROADCAST)):
        reply, _ = answered(request(MessageType.INFORM, ciaddr=IPv4Address(ciaddr)), lease)
        assert reply.delivery is delivery


@pytest.mark.parametrize("kind", [DISCOVER, REQUEST, MessageType.INFORM])
@pytest.mark.parametrize("client_id", [CLIENT_ID, b"\xff" + bytes(18), b"\0vm", bytes(255)])
def test_a_client_identifier_comes_back_as_it_was(kind: MessageType, client_id: bytes) -> None:
    _, message = answered(request(kind, {61: client_id, 50: OWN, 82: b"\1\4vlan"}))
    assert message.options[61] == client_id
    assert message.options[82] == b"\1\4vlan"
    _, nak = answered(request(REQUEST, {61: client_id, 50: WRONG}))
    assert nak.kind is NAK and nak.options[61] == client_id
    _, without = answered(request(kind, {50: OWN}))
    assert not {61, 82} & set(without.options)


def test_the_identifier_does_not_tell_clients_apart() -> None:
    """A boot ROM and the system it starts use one MAC address and two identifiers."""
    server = Server(LEASE)
    for client_id in (b"\0rom", CLIENT_ID):
        for datagram in (request(DISCOVER, {61: client_id}), request(REQUEST, SELECT | {61: client_id})):
            assert isinstance(server.receive(datagram), Reply)


def test_a_lease_without_mac_serves_any_station() -> None:
    lease = replace(LEASE, mac=None)
    for mac in (MAC, OTHER_MAC):
        reply, message = answered(request(DISCOVER, chaddr=mac), lease)
        assert (reply.mac, reply.address, message.chaddr) == (mac, OWN, mac)
    for nobody in (b"", MAC[:5], MAC + b"\0\0", bytes(6), b"\xff" * 6, b"\x01\0\x5e\0\0\1"):
        assert "no unicast Ethernet address" in ignored(request(DISCOVER, chaddr=nobody), lease).reason


ALL = {1, 3, 6, 12, 15, 26, 28, 51, 53, 54, 58, 59, 119, 121}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, ALL),
        (b"", ALL),
        (b"\x06", {1, 3, 6, 51, 53, 54}),
        # 3 beside 121, for those that ask for both and read one.
        (b"\x79\x77", {1, 3, 51, 53, 54, 119, 121}),
        (b"\xf9", {1, 3, 51, 53, 54, 249}),
        (
            bytes((1, 3, 6, 15, 31, 33, 43, 44, 46, 47, 119, 121, 249, 252)),
            {1, 3, 6, 15, 51, 53, 54, 119, 121, 249},
        ),
        (bytes(range(1, 255)), ALL | {249}),
    ],
)
def test_the_request_list_selects_options(wanted: bytes | None, expected: set[int]) -> None:
    options = {} if wanted is None else {55: wanted}
    reply, message = answered(request(DISCOVER, options))
    assert set(message.options) == expected
    codes = list(message.options)
    assert codes[:3] == [53, 54, 51] and codes[3:] == sorted(codes[3:])
    assert message.options.get(249, b"") in (
        b"",
        message.options.get(121) or opt.classless_routes(FLANNEL_ROUTES),
    )
    assert reply.left_out == ()


def test_private_options_are_sent_to_clients_that_do_not_ask() -> None:
    lease = replace(LEASE, private={249: "own use", 240: "private.options.kubevirt.io", 224: "0x0102"})
    for options in ({}, {55: b"\x01\x03"}, {55: b"\xf9"}):
        _, message = answered(request(DISCOVER, options), lease)
        assert message.options[224] == b"\x01\x02"
        assert message.options[240] == b"private.options.kubevirt.io"
        assert message.options[249] == b"own use"


def test_what_the_lease_lacks_is_not_sent() -> None:
    """Windows drops a whole reply for an option without bytes."""
    bare = DhcpLease(None, IPv4Interface("10.244.1.7/32"), US)
    _, message = answered(request(DISCOVER), bare)
    assert set(message.options) == {1, 51, 53, 54, 58, 59}
    _, forever = answered(request(DISCOVER), replace(bare, lease_s=opt.INFINITE_LEASE_S))
    assert set(forever.options) == {1, 51, 53, 54}


def test_routes_carry_the_default_route_of_the_router() -> None:
    """Clients that take option 121 ignore option 3 (RFC 3442)."""
    lease = replace(LEASE, routes=((IPv4Network("10.0.0.0/8"), GATEWAY),))
    _, message = answered(request(DISCOVER), lease)
    assert message.options[121] == bytes.fromhex("080a0af40101 000af40101")
    _, routerless = answered(request(DISCOVER), replace(lease, routers=()))
    assert routerless.options[121] == bytes.fromhex("080a0af40101")


@pytest.mark.parametrize(
    ("server", "file", "siaddr", "sname", "field"),
    [
        ("192.0.2.5", "pxelinux.0", IPv4Address("192.0.2.5"), b"192.0.2.5", b"pxelinux.0"),
        ("tftp.kubevirt.io", "config", NOBODY, b"tftp.kubevirt.io", b"config"),
        (None, "http://192.0.2.5/boot.ipxe", NOBODY, b"", b"http://192.0.2.5/boot.ipxe"),
        ("192.0.2.5", None, IPv4Address("192.0.2.5"), b"192.0.2.5", b""),
        ("s" * 64, "f" * 128, NOBODY, b"", b""),
        ("s" * 63, "f" * 127, NOBODY, b"s" * 63, b"f" * 127),
    ],
)
def test_boot_roms_find_server_and_file_in_the_header(
    server: str | None, file: str | None, siaddr: IPv4Address, sname: bytes, field: bytes
) -> None:
    lease = replace(LEASE, tftp_server=server, boot_file=file)
    for datagram in (request(DISCOVER, {57: b"\x05\xc0"}), request(REQUEST, SELECT | {57: b"\x05\xc0"})):
        _, message = answered(datagram, lease)
        assert (message.siaddr, message.sname, message.file) == (siaddr, sname, field)
        assert message.options.get(66, b"").decode() == (server or "")
        assert message.options.get(67, b"").decode() == (file or "")
    _, nak = answered(request(REQUEST, {50: WRONG}), lease)
    assert (nak.siaddr, nak.sname, nak.file) == (NOBODY, b"", b"")


LONG = replace(LEASE, mtu=9000, private={240: "x" * 100, 241: "y" * 100, 242: "z" * 700})


@pytest.mark.parametrize(
    ("asked", "mtu", "limit"),
    [
        (None, 9000, 548),
        (0, 9000, 548),
        (300, 9000, 548),
        (576, 9000, 548),
        (700, 9000, 672),
        (1500, 9000, 1472),
        (1500, 1450, 1422),
        (65535, 9000, 4096),
        (65535, None, 1472),
        (1500, 68, 548),
    ],
)
def test_no_reply_is_longer_than_the_client_takes(asked: int | None, mtu: int | None, limit: int) -> None:
    lease = replace(LONG, mtu=mtu, private={code: "x" * 250 for code in range(224, 249)})
    options = {} if asked is None else {57: asked.to_bytes(2, "big")}
    reply, message = answered(request(DISCOVER, options | {82: bytes(255), 61: bytes(255)}), lease)
    assert len(reply.datagram) <= limit
    assert len(reply.datagram) > limit - 252
    assert {1, 3, 51, 53, 54, 61} <= set(message.options)
    assert set(reply.left_out).isdisjoint(message.options) and reply.left_out


def test_the_least_important_option_is_left_out_first() -> None:
    reply, message = answered(request(DISCOVER, {57: b"\x02\x40"}), LONG)
    assert reply.left_out == (242,)
    assert message.options[240] == b"x" * 100 and message.options[241] == b"y" * 100
    reply, message = answered(request(DISCOVER, {57: b"\x05\xdc"}), LONG)
    assert reply.left_out == () and message.options[242] == b"z" * 700


def test_names_that_no_client_understands_are_dropped() -> None:
    server = Server(replace(LEASE, search=("DHCP", "10.0.0.1", "Example.com.", "x,y")))
    assert server.dropped_search == ("10.0.0.1", "x,y")
    reply = server.receive(request(DISCOVER))
    assert isinstance(reply, Reply)
    message = parse(reply.datagram, BOOT_REPLY)
    assert isinstance(message, Message)
    assert message.options[15] == b"example.com"
    assert message.options[119] == b"\4dhcp\0\7example\3com\0"


@pytest.mark.parametrize(
    ("change", "value", "rule"),
    [
        ({"mac": "abcd"}, "abcd", "six hexadecimal octets"),
        ({"address": IPv4Interface("127.0.0.1/8")}, "127.0.0.1/8", "loopback"),
        ({"address": IPv4Interface("0.0.0.0/0")}, "0.0.0.0/0", "unicast"),
        ({"address": IPv4Interface("224.0.0.1/4")}, "224.0.0.1/4", "unicast"),
        ({"server_id": OWN}, str(OWN), "differ"),
        ({"server_id": NOBODY}, "0.0.0.0", "unicast"),
        ({"routers": (NOBODY,)}, "0.0.0.0", "unicast"),
        ({"mtu": 67}, "67", "68 to 65535"),
        ({"hostname": "a_b"}, "a_b", "letters, digits"),
        ({"hostname": ""}, "''", "letters, digits"),
        ({"lease_s": 0}, "0", "4 to 4294967295"),
        ({"tftp_server": ""}, "''", "printable"),
        ({"boot_file": "a b"}, "a b", "printable"),
        ({"private": {200: "x"}}, "200", "224 to 254"),
        ({"private": {240: "0x1"}}, "0x1", "even number"),
    ],
)
def test_a_lease_that_cannot_be_sent_is_refused(change: dict[str, object], value: str, rule: str) -> None:
    with pytest.raises(ValueError, match="must") as caught:
        replace(LEASE, **change)  # type: ignore[arg-type]
    text = str(caught.value)
    assert value in text and rule in text and "\n" not in text


def test_a_server_started_anew_goes_on() -> None:
    """Whatever state the client is in, the next server answers as the last one did."""
    for datagram in (request(DISCOVER), request(REQUEST, SELECT), request(REQUEST, ciaddr=OWN)):
        old = Server(LEASE)
        for _ in range(3):
            old.receive(request(MessageType.DECLINE, SELECT))
            old.receive(request(MessageType.RELEASE, {54: US}, ciaddr=OWN))
        assert old.receive(datagram) == Server(LEASE).receive(datagram)


def captured(name: str) -> dict[str, tuple[IPv4Address, bytes]]:
    lines = [line.split() for line in (GOLDEN / name).read_text().splitlines() if not line.startswith("#")]
    return {
        state: (IPv4Address(source), bytes.fromhex(raw).ljust(300, b"\0")) for state, source, raw in lines
    }


def test_what_udhcpc_sends_is_understood() -> None:
    exchange = captured("udhcpc-1.35.0.txt")
    expected = {
        "discover": (OFFER, Delivery.LINK),
        "request-selecting": (ACK, Delivery.LINK),
        "request-renewing": (ACK, Delivery.ADDRESS),
        "discover-hint": (OFFER, Delivery.LINK),
        "request-selecting-after-hint": (ACK, Delivery.LINK),
    }
    for state, (kind, delivery) in expected.items():
        source, datagram = exchange.pop(state)
        reply, message = answered(datagram, source=source)
        assert (reply.kind, reply.delivery, reply.address) == (kind, delivery, OWN), state
        assert message.options[61] == CLIENT_ID
        assert len(reply.datagram) <= 548
    assert list(exchange) == ["release"]
    assert ignored(exchange["release"][1]).kind is MessageType.RELEASE


def tcpdump(reply: Reply) -> str:
    """What tcpdump reads in `reply`, sent as one frame."""
    udp = struct.pack("!4H", 67, 68, 8 + len(reply.datagram), 0) + reply.datagram
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, US.packed, reply.address.packed
    )
    frame = reply.mac + bytes.fromhex("020000000001 0800") + ip + udp
    capture = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    capture += struct.pack("=4I", 0, 0, len(frame), len(frame)) + frame
    done = subprocess.run(
        ["tcpdump", "-nvvr", "-"], input=capture, capture_output=True, timeout=20, check=True
    )
    return done.stdout.decode()


def test_tcpdump_reads_an_offer_as_it_was_meant() -> None:
    lease = replace(LEASE, ntp=(US,), tftp_server="192.0.2.5", boot_file="pxelinux.0", lease_s=3600)
    reply, _ = answered(request(DISCOVER, {61: CLIENT_ID}), lease)
    text = tcpdump(reply)
    for line in (
        "169.254.75.10.67 > 10.244.1.7.68",
        "BOOTP/DHCP, Reply",
        "Your-IP 10.244.1.7",
        "Server-IP 192.0.2.5",
        "Client-Ethernet-Address 0a:58:0a:f4:01:07",
        'sname "192.0.2.5"',
        'file "pxelinux.0"',
        "DHCP-Message (53), length 1: Offer",
        "Server-ID (54), length 4: 169.254.75.10",
        "Lease-Time (51), length 4: 3600",
        "Subnet-Mask (1), length 4: 255.255.255.0",
        "Default-Gateway (3), length 4: 10.244.1.1",
        "Domain-Name-Server (6), length 4: 10.96.0.10",
        'Hostname (12), length 3: "vm1"',
        'Domain-Name (15), length 25: "default.svc.cluster.local"',
        "MTU (26), length 2: 1450",
        "BR (28), length 4: 10.244.1.255",
        "NTP (42), length 4: 169.254.75.10",
        "RN (58), length 4: 1800",
        "RB (59), length 4: 3150",
        "Client-ID (61), length 7: ether 0a:58:0a:f4:01:07",
        'TFTP (66), length 9: "192.0.2.5"',
        'BF (67), length 10: "pxelinux.0"',
        "Classless-Static-Route (121), length 12: (10.244.0.0/16:10.244.1.1),(default:10.244.1.1)",
    ):
        assert line in text
    assert "[|" not in text and "invalid" not in text


def test_tcpdump_reads_options_that_were_moved_to_the_spare_fields() -> None:
    lease = replace(LONG, private={240: "x" * 120, 241: "y" * 100})
    reply, _ = answered(request(DISCOVER), lease)
    assert reply.left_out == () and len(reply.datagram) <= 548
    text = tcpdump(reply)
    assert "OO (52), length 1: " in text
    assert "DHCP-Message (53), length 1: Offer" in text


@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_raise_or_make_it_talk_to_somebody_else(raw: bytes, framed: bool) -> None:
    head = build(Message(BOOT_REQUEST, 7, OTHER_MAC, {53: b"\x01"}))[:240]
    found = Server(LEASE).receive(head + raw if framed else raw)
    assert isinstance(found, Ignored) or raw[28:34] == MAC


values = st.binary(max_size=40)
some_addresses = st.sampled_from([OWN, WRONG, US, NOBODY, GATEWAY, BROADCAST, IPv4Address("10.244.1.50")])


@given(
    kind=st.sampled_from([DISCOVER, REQUEST, MessageType.INFORM, MessageType.DECLINE, MessageType.RELEASE]),
    ciaddr=some_addresses,
    flags=st.integers(0, 65535),
    source=some_addresses,
    options=st.fixed_dictionaries(
        {},
        optional={
            50: some_addresses.map(lambda a: a.packed),
            54: some_addresses.map(lambda a: a.packed),
            55: values,
            57: st.binary(min_size=2, max_size=2),
            61: st.binary(max_size=255),
            80: values,
            82: st.binary(max_size=255),
        },
    ),
)
def test_every_reply_keeps_the_rules(
    kind: MessageType, ciaddr: IPv4Address, flags: int, source: IPv4Address, options: dict[int, bytes]
) -> None:
    datagram = request(kind, options, ciaddr=ciaddr, flags=flags)
    reply = Server(fuzz.LEASE).receive(datagram, source)
    if isinstance(reply, Reply):
        fuzz.check_reply(reply, datagram)
        sent = fuzz.decode(reply.datagram)
        assert sent.get(61) == options.get(61)
        assert 82 in reply.left_out or sent.get(82) == options.get(82)


def test_mutated_packets() -> None:
    found = fuzz.run(20_000, seed=2131)
    # The mutations leave enough intact to reach every branch, and break enough to be refused.
    for answer in ("OFFER", "ACK", "NAK", "ignored", "ignored REQUEST", "ignored DECLINE", "ignored RELEASE"):
        assert found[answer] > 100, found


def test_an_answer_costs_far_less_than_a_millisecond() -> None:
    server, datagram, spent = Server(LEASE), request(DISCOVER, {61: CLIENT_ID, 55: bytes(range(1, 122))}), []
    for _ in range(300):
        started = process_time()
        server.receive(datagram)
        spent.append(process_time() - started)
    assert median(spent) < 0.0005
