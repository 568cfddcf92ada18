"""Frames on the guest's link: bytes in, values out, and back: ARP, IPv4 and IPv6 with UDP, ICMPv6.

The guest's own frames come straight from its driver: checksums may be left to a network card that is not
there, so they are not looked at. Ours are complete.

Layouts: RFC 894, 826, 791, 768, 8200, 4443, 4861.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

BROADCAST_MAC = b"\xff" * 6
NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 135, 136

_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD
_UDP, _ICMPV6 = 17, 58
_HOP_LIMIT = 255
_ROUTER, _SOLICITED, _OVERRIDE = 0x80, 0x40, 0x20


@dataclass(frozen=True, slots=True)
class Udp:
    """A UDP datagram, of either family."""

    mac: bytes
    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    port: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Icmp6:
    """An ICMPv6 message."""

    mac: bytes
    source: IPv6Address
    destination: IPv6Address
    hop_limit: int
    message: bytes


@dataclass(frozen=True, slots=True)
class ArpRequest:
    """Who has `target`? asks `sender` at `mac`."""

    mac: bytes
    sender: IPv4Address
    target: IPv4Address


def parse(frame: bytes) -> Udp | Icmp6 | ArpRequest | None:
    """What a frame carries, None if it is nothing of interest or broken. Never raises."""
    try:
        kind = int.from_bytes(frame[12:14], "big")
        if kind == _ARP:
            return _arp(frame)
        if kind == _IPV4:
            return _ipv4(frame)
        return _ipv6(frame) if kind == _IPV6 else None
    except struct.error:
        return None


def _arp(frame: bytes) -> ArpRequest | None:
    head = frame[14:22]
    if head != b"\x00\x01\x08\x00\x06\x04\x00\x01" or len(frame) < 42:
        return None
    return ArpRequest(frame[22:28], IPv4Address(frame[28:32]), IPv4Address(frame[38:42]))


def _ipv4(frame: bytes) -> Udp | None:
    version, total, fragment, protocol = struct.unpack_from("!BxHxxHxB", frame, 14)
    size = (version & 15) * 4
    if version >> 4 != 4 or size < 20 or protocol != _UDP or fragment & 0x3FFF:
        return None
    start = 14 + size
    _source_port, port, length = struct.unpack_from("!HHH", frame, start)
    if length < 8 or size + length > total or start + length > len(frame):
        return None
    source, destination = IPv4Address(frame[26:30]), IPv4Address(frame[30:34])
    return Udp(frame[6:12], source, destination, port, frame[start + 8 : start + length])


def _ipv6(frame: bytes) -> Udp | Icmp6 | None:
    version, length, following, hop_limit = struct.unpack_from("!BxxxHBB", frame, 14)
    if version >> 4 != 6 or 54 + length > len(frame):
        return None
    source, destination = IPv6Address(frame[22:38]), IPv6Address(frame[38:54])
    body = frame[54 : 54 + length]
    if following == _ICMPV6:
        return Icmp6(frame[6:12], source, destination, hop_limit, body)
    if following != _UDP:
        return None
    _source_port, port, size = struct.unpack_from("!HHH", body)
    if not 8 <= size <= len(body):
        return None
    return Udp(frame[6:12], source, destination, port, body[8:size])


def _ones_complement(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@dataclass(frozen=True, slots=True)
class Sender:
    """Builds frames from one MAC."""

    mac: bytes

    def udp4(
        self, to: bytes, source: IPv4Address, destination: IPv4Address, ports: tuple[int, int], data: bytes
    ) -> bytes:
        """A UDP datagram over IPv4; `ports` are source and destination."""
        datagram = _udp(source.packed + destination.packed, ports, data)
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, _UDP, 0)
        head += source.packed + destination.packed
        head = head[:10] + struct.pack("!H", _ones_complement(head)) + head[12:]
        return self._frame(to, _IPV4, head + datagram)

    def udp6(
        self, to: bytes, source: IPv6Address, destination: IPv6Address, ports: tuple[int, int], data: bytes
    ) -> bytes:
        """A UDP datagram over IPv6."""
        datagram = _udp(source.packed + destination.packed, ports, data)
        return self._frame(to, _IPV6, _ipv6_head(source, destination, _UDP, len(datagram)) + datagram)

    def icmp6(self, to: bytes, source: IPv6Address, destination: IPv6Address, message: bytes) -> bytes:
        """An ICMPv6 message, whose checksum (0 in `message`) is filled in."""
        pseudo = source.packed + destination.packed + struct.pack("!II", len(message), _ICMPV6)
        total = _ones_complement(pseudo + message)
        message = message[:2] + struct.pack("!H", total) + message[4:]
        return self._frame(to, _IPV6, _ipv6_head(source, destination, _ICMPV6, len(message)) + message)

    def arp_reply(self, request: ArpRequest) -> bytes:
        """We have the target."""
        body = b"\x00\x01\x08\x00\x06\x04\x00\x02" + self.mac + request.target.packed
        return self._frame(request.mac, _ARP, body + request.mac + request.sender.packed)

    def solicit(self, source: IPv6Address, target: IPv6Address) -> bytes:
        """Who has `target`? (RFC 4861 section 4.3)"""
        group = IPv6Address(b"\xff\x02" + b"\0" * 9 + b"\x01\xff" + target.packed[13:])
        message = struct.pack("!BBHI", NEIGHBOUR_SOLICITATION, 0, 0, 0) + target.packed
        return self.icmp6(multicast_mac(group), source, group, message + b"\x01\x01" + self.mac)

    def advertise(self, to: bytes, destination: IPv6Address, target: IPv6Address, target_mac: bytes) -> bytes:
        """The router `target` is at `target_mac` (RFC 4861 section 4.4)."""
        flags = _ROUTER | _OVERRIDE | (0 if destination.is_multicast else _SOLICITED)
        message = struct.pack("!BBHBxxx", NEIGHBOUR_ADVERTISEMENT, 0, 0, flags) + target.packed
        return self.icmp6(to, target, destination, message + b"\x02\x01" + target_mac)

    def _frame(self, to: bytes, kind: int, body: bytes) -> bytes:
        return to + self.mac + struct.pack("!H", kind) + body


def _udp(addresses: bytes, ports: tuple[int, int], data: bytes) -> bytes:
    length = 8 + len(data)
    pseudo = addresses + struct.pack("!II", length, _UDP)
    total = _ones_complement(pseudo + struct.pack("!HHHH", *ports, length, 0) + data)
    return struct.pack("!HHHH", *ports, length, total or 0xFFFF) + data


def _ipv6_head(source: IPv6Address, destination: IPv6Address, following: int, length: int) -> bytes:
    head = struct.pack("!IHBB", 0x60000000, length, following, _HOP_LIMIT)
    return head + source.packed + destination.packed


def multicast_mac(group: IPv6Address) -> bytes:
    """RFC 2464 section 7."""
    return b"\x33\x33" + group.packed[12:]


def link_local(mac: bytes) -> IPv6Address:
    """The link-local address that a MAC gives by modified EUI-64 (RFC 4291 appendix A)."""
    interface = bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    return IPv6Address(b"\xfe\x80" + b"\0" * 6 + interface)


def neighbour_target(message: bytes, kind: int) -> IPv6Address | None:
    """Whom a neighbour solicitation or advertisement is about, None if it is neither or too short."""
    return IPv6Address(message[8:24]) if len(message) >= 24 and message[0] == kind else None


def target_mac(message: bytes) -> bytes | None:
    """The target's MAC in a neighbour advertisement, None if it says none."""
    at = 24
    while at + 8 <= len(message):
        units = message[at + 1]
        if units == 0:
            return None
        if message[at] == 2 and units == 1:
            return message[at + 2 : at + 8]
        at += units * 8
    return None
