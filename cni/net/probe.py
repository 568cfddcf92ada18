"""Asking the pods of a bridge which of some addresses they have.

An ARP probe (RFC 5227, section 2.1.1) or a neighbour solicitation from nowhere (RFC 4862, section 5.4.2):
whoever has the address answers, and nobody's neighbour tables change.
"""

from __future__ import annotations

import select
import struct
import time
from _socket import htons
from _socket import socket as Socket

from cni.net.nlmsg import mac_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cni.spec.address import Cidr

_AF_PACKET, _SOCK_RAW, _SOCK_CLOEXEC = 17, 3, 0o2000000
_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_ARP_REQUEST = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
_ARP_SENDER = slice(28, 32)  # of an Ethernet frame
_ICMPV6, _SOLICITATION, _ADVERTISEMENT = 58, 135, 136
_NA_TYPE, _NA_TARGET = 54, slice(62, 78)
_READ_EVERY, _MOMENT_S = 64, 0.002


def answering(link: str, mac: str, addresses: Sequence[Cidr], wait_s: float) -> set[Cidr]:
    """Those of `addresses` that somebody behind `link`, whose MAC is `mac`, has. Raises OSError."""
    found: set[Cidr] = set()
    for family, kind in ((4, _ETH_P_ARP), (6, _ETH_P_IPV6)):
        wanted = {one.value: one for one in addresses if one.family == family}
        if wanted:
            found |= {wanted[value] for value in _ask(link, mac, family, kind, wanted.keys(), wait_s)}
    return found


def _ask(link: str, mac: str, family: int, kind: int, values: Collection[int], wait_s: float) -> set[int]:
    socket = Socket(_AF_PACKET, _SOCK_RAW | _SOCK_CLOEXEC, htons(kind))
    try:
        socket.bind((link, kind))
        found: set[int] = set()
        for number, value in enumerate(values, 1):
            socket.send(_arp(mac, value) if family == 4 else _solicitation(mac, value))
            if number % _READ_EVERY == 0:  # their answers would not all fit the socket's buffer
                found |= _hear(socket, family, values, _MOMENT_S)
        return found | _hear(socket, family, values, wait_s, len(values) - len(found))
    finally:
        socket.close()


def _hear(socket: Socket, family: int, values: Collection[int], wait_s: float, most: int = -1) -> set[int]:
    """Those of `values` for which somebody answers within a time, or until there are `most`."""
    found: set[int] = set()
    poll, deadline = select.poll(), time.monotonic() + wait_s
    poll.register(socket.fileno(), select.POLLIN)
    while len(found) != most and (left := deadline - time.monotonic()) > 0:
        if poll.poll(left * 1000):
            value = _answered(socket.recv(2048), family)
            if value in values:
                found.add(value)
    return found


def _arp(mac: str, value: int) -> bytes:
    sender = mac_bytes(mac)
    target = value.to_bytes(4, "big")
    head = b"\xff" * 6 + sender + struct.pack("!H", _ETH_P_ARP)
    return head + _ARP_REQUEST + sender + bytes(4) + bytes(6) + target


def _solicitation(mac: str, value: int) -> bytes:
    target = value.to_bytes(16, "big")
    group = bytes.fromhex("ff02" + "00" * 9 + "01ff") + target[-3:]
    body = bytes(4) + target
    pseudo = bytes(16) + group + struct.pack("!II", 4 + len(body), _ICMPV6)
    code = _checksum(pseudo + bytes([_SOLICITATION, 0, 0, 0]) + body)
    icmp = struct.pack("!BBH", _SOLICITATION, 0, code) + body
    head = b"\x33\x33" + group[-4:] + mac_bytes(mac) + struct.pack("!H", _ETH_P_IPV6)
    return head + struct.pack("!IHBB", 6 << 28, len(icmp), _ICMPV6, 255) + bytes(16) + group + icmp


def _answered(frame: bytes, family: int) -> int:
    """The address whose holder sent the frame, -1 if it is none that says so."""
    if family == 4:
        return int.from_bytes(frame[_ARP_SENDER], "big")
    if frame[_NA_TYPE : _NA_TYPE + 1] != bytes([_ADVERTISEMENT]):
        return -1
    return int.from_bytes(frame[_NA_TARGET], "big")


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
