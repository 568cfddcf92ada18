"""Asking the pods of a bridge whether one of them has an address.

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
    from cni.spec.address import Cidr

_AF_PACKET, _SOCK_RAW, _SOCK_CLOEXEC = 17, 3, 0o2000000
_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_ARP_REQUEST = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
_ARP_SENDER = slice(28, 32)  # of an Ethernet frame
_ICMPV6, _SOLICITATION, _ADVERTISEMENT = 58, 135, 136
_NA_TYPE, _NA_TARGET = 54, slice(62, 78)


def answers(link: str, mac: str, address: Cidr, wait_s: float) -> bool:
    """Whether somebody behind `link`, whose MAC is `mac`, has `address`. Raises OSError."""
    kind = _ETH_P_ARP if address.family == 4 else _ETH_P_IPV6
    socket = Socket(_AF_PACKET, _SOCK_RAW | _SOCK_CLOEXEC, htons(kind))
    try:
        socket.bind((link, kind))
        socket.send(_arp(mac, address) if address.family == 4 else _solicitation(mac, address))
        poll, deadline = select.poll(), time.monotonic() + wait_s
        poll.register(socket.fileno(), select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(left * 1000) and _is_answer(socket.recv(2048), address):
                return True
        return False
    finally:
        socket.close()


def _arp(mac: str, address: Cidr) -> bytes:
    sender = mac_bytes(mac)
    target = address.value.to_bytes(4, "big")
    head = b"\xff" * 6 + sender + struct.pack("!H", _ETH_P_ARP)
    return head + _ARP_REQUEST + sender + bytes(4) + bytes(6) + target


def _solicitation(mac: str, address: Cidr) -> bytes:
    target = address.value.to_bytes(16, "big")
    group = bytes.fromhex("ff02" + "00" * 9 + "01ff") + target[-3:]
    body = bytes(4) + target
    pseudo = bytes(16) + group + struct.pack("!II", 4 + len(body), _ICMPV6)
    code = _checksum(pseudo + bytes([_SOLICITATION, 0, 0, 0]) + body)
    icmp = struct.pack("!BBH", _SOLICITATION, 0, code) + body
    head = b"\x33\x33" + group[-4:] + mac_bytes(mac) + struct.pack("!H", _ETH_P_IPV6)
    return head + struct.pack("!IHBB", 6 << 28, len(icmp), _ICMPV6, 255) + bytes(16) + group + icmp


def _is_answer(frame: bytes, address: Cidr) -> bool:
    if address.family == 4:
        return frame[_ARP_SENDER] == address.value.to_bytes(4, "big")
    return frame[_NA_TYPE : _NA_TYPE + 1] == bytes([_ADVERTISEMENT]) and frame[
        _NA_TARGET
    ] == address.value.to_bytes(16, "big")


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
