"""Frames: what is built is what is parsed and what tcpdump reads; nothing that is sent to us raises."""

from __future__ import annotations

import struct
import subprocess
from ipaddress import IPv4Address, IPv6Address
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import wire
from launcher.wire import ArpRequest, Icmp6, Sender, Udp

US, GUEST = bytes.fromhex("ca84cbfaa9fd"), bytes.fromhex("0a580af40107")
SENDER = Sender(US)
MACS = st.binary(min_size=6, max_size=6)
V4 = st.builds(IPv4Address, st.integers(0, 2**32 - 1))
V6 = st.builds(IPv6Address, st.integers(0, 2**128 - 1))
PORTS = st.tuples(st.integers(0, 65535), st.integers(0, 65535))
DATA = st.binary(max_size=600)
SERVER4, CLIENT4 = IPv4Address("169.254.75.10"), IPv4Address("10.244.1.7")
SERVER6, CLIENT6 = IPv6Address("fe80::1"), IPv6Address("fe80::858:aff:fef4:107")


def decoded(*frames: bytes) -> list[str]:
    """What `tcpdump -vv` tells about each frame, blanks run together."""
    capture = struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    for frame in frames:
        capture += struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame
    # -# numbers the packets, which tells where one begins.
    run = subprocess.run(
        ["tcpdump", "-vv", "-e", "-n", "-t", "-#", "-r", "-"],
        input=capture,
        capture_output=True,
        check=True,
        timeout=30,
    )
    lines: list[str] = []
    for line in run.stdout.decode().splitlines():
        number, _, rest = line.strip().partition("  ")
        if number.isdecimal() and int(number) == len(lines) + 1:
            lines.append(rest)
        else:
            lines[-1] += " " + line.strip()
    return [" ".join(line.split()) for line in lines]


def ethernet(kind: int, body: bytes, mac: bytes = GUEST) -> bytes:
    return wire.BROADCAST_MAC + mac + struct.pack("!H", kind) + body


# ---- round trips


@given(MACS, V4, V4, PORTS, DATA)
def test_udp_over_ipv4_round_trip(
    to: bytes, source: IPv4Address, destination: IPv4Address, ports: tuple[int, int], data: bytes
) -> None:
    frame = SENDER.udp4(to, source, destination, ports, data)
    assert frame[:6] == to
    assert wire.parse(frame) == Udp(US, source, destination, ports[1], data)
    # A short frame is filled up to 60 bytes on its way.
    assert wire.parse(frame + bytes(46)) == Udp(US, source, destination, ports[1], data)


@given(MACS, V6, V6, PORTS, DATA)
def test_udp_over_ipv6_round_trip(
    to: bytes, source: IPv6Address, destination: IPv6Address, ports: tuple[int, int], data: bytes
) -> None:
    frame = SENDER.udp6(to, source, destination, ports, data)
    assert frame[:6] == to
    assert wire.parse(frame + bytes(3)) == Udp(US, source, destination, ports[1], data)


@given(MACS, V6, V6, st.binary(min_size=4, max_size=300))
def test_icmp6_round_trip(to: bytes, source: IPv6Address, destination: IPv6Address, message: bytes) -> None:
    message = message[:2] + bytes(2) + message[4:]
    parsed = wire.parse(SENDER.icmp6(to, source, destination, message))
    assert isinstance(parsed, Icmp6)
    assert (parsed.mac, parsed.source, parsed.destination) == (US, source, destination)
    assert parsed.hop_limit == 255
    assert parsed.message[:2] + bytes(2) + parsed.message[4:] == message


@given(MACS, V4, V4)
def test_arp_is_asked_and_answered(mac: bytes, sender: IPv4Address, target: IPv4Address) -> None:
    body = b"\x00\x01\x08\x00\x06\x04\x00\x01" + mac + sender.packed + bytes(6) + target.packed
    request = wire.parse(ethernet(0x0806, body, mac))
    assert request == ArpRequest(mac, sender, target)
    assert isinstance(request, ArpRequest)
    reply = SENDER.arp_reply(request)
    assert reply[:14] == mac + US + b"\x08\x06"
    assert reply[20:] == b"\x00\x02" + US + target.packed + mac + sender.packed
    # An answer is no question.
    assert wire.parse(reply) is None


@given(V6, V6, MACS)
def test_neighbour_messages_round_trip(source: IPv6Address, target: IPv6Address, mac: bytes) -> None:
    question = wire.parse(SENDER.solicit(source, target))
    assert isinstance(question, Icmp6)
    assert wire.neighbour_target(question.message, wire.NEIGHBOUR_SOLICITATION) == target
    assert wire.neighbour_target(question.message, wire.NEIGHBOUR_ADVERTISEMENT) is None
    answer = wire.parse(SENDER.advertise(GUEST, source, target, mac))
    assert isinstance(answer, Icmp6)
    assert wire.neighbour_target(answer.message, wire.NEIGHBOUR_ADVERTISEMENT) == target
    assert wire.target_mac(answer.message) == mac


# ---- what another decoder says


def test_checksums_are_right() -> None:
    """Of payloads of every length, odd ones included; in one run of tcpdump."""
    chance = Random(1)
    frames = []
    for size in range(300):
        source, destination = IPv4Address(chance.getrandbits(32)), IPv4Address(chance.getrandbits(32))
        source6, destination6 = IPv6Address(chance.getrandbits(128)), IPv6Address(chance.getrandbits(128))
        data = b"\xff" * size if size % 3 == 0 else chance.randbytes(size)
        # No ports and no ICMPv6 type that tcpdump knows how to read further.
        frames.append(SENDER.udp4(GUEST, source, destination, (40000, 40001), data))
        frames.append(SENDER.udp6(GUEST, source6, destination6, (40000, 40001), data))
        frames.append(SENDER.icmp6(GUEST, source6, destination6, b"\xc8\x00\x00\x00" + data))
    for number, text in enumerate(decoded(*frames)):
        assert "bad cksum" not in text and "invalid" not in text, text
        assert ("[icmp6 sum ok]" if number % 3 == 2 else "[udp sum ok]") in text, text


def test_a_udp_checksum_is_never_zero() -> None:
    """0 means "none", which IPv6 forbids (RFC 768, RFC 8200 section 8.1)."""
    found = set()
    for value in range(65536):
        frame = SENDER.udp6(GUEST, SERVER6, CLIENT6, (1, 2), struct.pack("!H", value))
        found.add(frame[60:62])
    assert b"\0\0" not in found
    assert b"\xff\xff" in found


def test_neighbour_discovery_as_tcpdump_reads_it() -> None:
    target = IPv6Address("fd00:10:244:1::1")
    question, answer, unasked = decoded(
        SENDER.solicit(SERVER6, target),
        SENDER.advertise(GUEST, CLIENT6, SERVER6, bytes.fromhex("0a580af40101")),
        SENDER.advertise(wire.multicast_mac(IPv6Address("ff02::1")), IPv6Address("ff02::1"), SERVER6, GUEST),
    )
    assert "ca:84:cb:fa:a9:fd > 33:33:ff:00:00:01" in question
    assert "hlim 255" in question and "fe80::1 > ff02::1:ff00:1: [icmp6 sum ok]" in question
    assert "who has fd00:10:244:1::1" in question
    assert "source link-address option (1), length 8 (1): ca:84:cb:fa:a9:fd" in question
    assert "tgt is fe80::1, Flags [router, solicited, override]" in answer
    assert "destination link-address option (2), length 8 (1): 0a:58:0a:f4:01:01" in answer
    assert "tgt is fe80::1, Flags [router, override]" in unasked
    assert "> 33:33:00:00:00:01" in unasked


def test_arp_as_tcpdump_reads_it() -> None:
    [text] = decoded(SENDER.arp_reply(ArpRequest(GUEST, CLIENT4, SERVER4)))
    assert "ca:84:cb:fa:a9:fd > 0a:58:0a:f4:01:07" in text
    assert "Reply 169.254.75.10 is-at ca:84:cb:fa:a9:fd" in text


@pytest.mark.parametrize(
    ("mac", "address"),
    [
        ("020000000000", "fe80::ff:fe00:0"),
        ("0a580af40107", "fe80::858:aff:fef4:107"),
        ("34567890abcd", "fe80::3656:78ff:fe90:abcd"),
    ],
)
def test_link_local_address_of_a_mac(mac: str, address: str) -> None:
    """RFC 4291 appendix A; the kernel's own for these MACs."""
    assert wire.link_local(bytes.fromhex(mac)) == IPv6Address(address)


# ---- nothing raises, and what is broken is nothing


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_raise(frame: bytes) -> None:
    wire.parse(frame)
    wire.neighbour_target(frame, wire.NEIGHBOUR_ADVERTISEMENT)
    wire.target_mac(frame)


@given(st.sampled_from([0x0800, 0x0806, 0x86DD]), st.binary(max_size=120))
def test_arbitrary_bytes_behind_a_known_type_never_raise(kind: int, body: bytes) -> None:
    wire.parse(ethernet(kind, body))


GOOD = (
    SENDER.udp4(GUEST, SERVER4, CLIENT4, (67, 68), b"12345678" * 8),
    SENDER.udp6(GUEST, SERVER6, CLIENT6, (547, 546), b"12345678" * 8),
    SENDER.solicit(SERVER6, CLIENT6),
)


@given(st.sampled_from(GOOD), st.integers(0, 200), st.integers(0, 255))
def test_one_changed_byte_never_raises(frame: bytes, at: int, value: int) -> None:
    at %= len(frame)
    wire.parse(frame[:at] + bytes([value]) + frame[at + 1 :])


@pytest.mark.parametrize("frame", GOOD, ids=["IPv4", "IPv6", "ICMPv6"])
def test_no_part_of_a_frame_is_a_frame(frame: bytes) -> None:
    assert wire.parse(frame) is not None
    for size in range(len(frame)):
        assert wire.parse(frame[:size]) is None, size


def changed(frame: bytes, at: int, data: bytes) -> bytes:
    return frame[:at] + data + frame[at + len(data) :]


@pytest.mark.parametrize(
    "frame",
    [
        changed(GOOD[0], 12, b"\x81\x00"),
        changed(GOOD[0], 14, b"\x65"),
        changed(GOOD[0], 14, b"\x44"),
        changed(GOOD[0], 16, b"\x00\x1b"),
        changed(GOOD[0], 20, b"\x20\x00"),
        changed(GOOD[0], 20, b"\x00\x01"),
        changed(GOOD[0], 23, b"\x06"),
        changed(GOOD[0], 38, b"\x00\x07"),
        changed(GOOD[0], 38, b"\xff\xff"),
        changed(GOOD[1], 14, b"\x45"),
        changed(GOOD[1], 20, b"\x06"),
        changed(GOOD[1], 58, b"\x00\x07"),
        changed(GOOD[1], 58, b"\xff\xff"),
    ],
    ids=[
        "VLAN",
        "IPv4 with version 6",
        "header of 16 bytes",
        "total length below the datagram",
        "first fragment",
        "later fragment",
        "TCP",
        "UDP length 7",
        "UDP longer than the packet",
        "IPv6 with version 4",
        "TCP over IPv6",
        "UDP length 7 over IPv6",
        "UDP longer than the IPv6 packet",
    ],
)
def test_what_is_none_of_ours(frame: bytes) -> None:
    assert wire.parse(frame) is None


def test_ip_options_are_skipped_and_dont_fragment_is_no_fragment() -> None:
    frame = GOOD[0]
    longer = frame[:14] + b"\x46" + frame[15:16] + struct.pack("!H", 20 + 4 + 72) + frame[18:20] + b"\x40\x00"
    longer += frame[22:34] + b"\x94\x04\x00\x00" + frame[34:]
    assert wire.parse(longer) == Udp(US, SERVER4, CLIENT4, 68, b"12345678" * 8)


@pytest.mark.parametrize(
    ("options", "mac"),
    [
        ("", None),
        ("02010a580af40101", "0a580af40101"),
        ("0101aaaaaaaaaaaa02010a580af40101", "0a580af40101"),
        ("0e02" + "00" * 14 + "02010a580af40101", "0a580af40101"),
        ("0200aaaaaaaaaaaa", None),
        ("0202aaaaaaaaaaaa" + "00" * 8, None),
        ("02010a580af401", None),
    ],
)
def test_the_target_mac_of_an_advertisement(options: str, mac: str | None) -> None:
    message = bytes.fromhex("88000000e0000000") + SERVER6.packed + bytes.fromhex(options)
    assert wire.target_mac(message) == (bytes.fromhex(mac) if mac else None)
