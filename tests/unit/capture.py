"""What tcpdump reads in an IPv6 packet: a decoder that shares nothing with the code under test."""

from __future__ import annotations

import struct
import subprocess
from ipaddress import IPv6Address

_RAW_IP = 101  # LINKTYPE_RAW
_ICMP6, _UDP = 58, 17


def udp(payload: bytes, source: str, destination: str, ports: tuple[int, int]) -> bytes:
    """An IPv6 packet with a UDP datagram in it, checksums right."""
    length = 8 + len(payload)
    datagram = struct.pack("!HHHH", *ports, length, 0) + payload
    source_bytes, destination_bytes = IPv6Address(source).packed, IPv6Address(destination).packed
    data = source_bytes + destination_bytes + struct.pack("!II", length, _UDP) + datagram
    data += bytes(len(data) % 2)
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    checksum = 0xFFFF - total % 0xFFFF
    datagram = datagram[:6] + checksum.to_bytes(2, "big") + payload
    return _ipv6(_UDP, datagram, source_bytes, destination_bytes, 64)


def icmp6(message: bytes, source: str, destination: str) -> bytes:
    """An IPv6 packet with hop limit 255 and `message` as it is."""
    return _ipv6(_ICMP6, message, IPv6Address(source).packed, IPv6Address(destination).packed, 255)


def _ipv6(protocol: int, payload: bytes, source: bytes, destination: bytes, hop_limit: int) -> bytes:
    return struct.pack("!IHBB", 6 << 28, len(payload), protocol, hop_limit) + source + destination + payload


def tcpdump(packet: bytes) -> str:
    """Everything that `tcpdump -vv` prints about the packet, on one line, blanks run together."""
    header = struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, _RAW_IP)
    capture = header + struct.pack("<IIII", 0, 0, len(packet), len(packet)) + packet
    run = subprocess.run(
        ["tcpdump", "-vv", "-n", "-t", "-r", "-"], input=capture, capture_output=True, check=True, timeout=30
    )
    return " ".join(run.stdout.decode().split())
