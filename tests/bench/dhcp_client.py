"""A DHCP client that only measures: raw frames on `eth0`, no library of ours, times in microseconds.

first MAC SECONDS    send a DISCOVER every 2 ms until an OFFER comes; print its MONOTONIC time
rounds MAC COUNT     DISCOVER, OFFER, REQUEST, ACK so many times; print JSON: both medians, requests a second
"""

from __future__ import annotations

import json
import socket
import statistics
import struct
import sys
import time

MAGIC = b"\x63\x82\x53\x63"


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def frame(mac: bytes, xid: int, options: bytes) -> bytes:
    """A broadcast from 0.0.0.0 with these options; the UDP checksum is left out, as IPv4 allows."""
    body = struct.pack("!BBBBIHH", 1, 1, 6, 0, xid, 0, 0) + b"\0" * 16 + mac + b"\0" * 202
    body += MAGIC + options + b"\xff"
    body = body.ljust(300, b"\0")
    udp = struct.pack("!HHHH", 68, 67, 8 + len(body), 0) + body
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + b"\0" * 4 + b"\xff" * 4
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return b"\xff" * 6 + mac + b"\x08\x00" + head + udp


def answer(sock: socket.socket, xid: int, kind: int) -> bytes | None:
    """The options of a reply of this kind, None if none comes in time."""
    while True:
        try:
            data = sock.recv(4096)
        except (TimeoutError, BlockingIOError):
            return None
        if data[12:14] != b"\x08\x00" or data[23] != 17 or data[36:38] != b"\x00\x44":
            continue
        body = data[42:]
        if body[4:8] == struct.pack("!I", xid) and bytes([53, 1, kind]) in body[240:]:
            return body


def opened() -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
    sock.bind(("eth0", 0x0800))
    return sock


def first(mac: bytes, seconds: float) -> None:
    """Print the moment of the first OFFER."""
    sock = opened()
    sock.settimeout(0.002)
    print("asking", flush=True)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        sock.send(frame(mac, 1, bytes([53, 1, 1])))
        if answer(sock, 1, 2) is not None:
            print(f"{time.monotonic():.6f}", flush=True)
            return
    sys.exit("no OFFER")


def rounds(mac: bytes, count: int) -> None:
    """Print how long each half of an exchange takes."""
    sock = opened()
    sock.settimeout(2.0)
    offers, acks = [], []
    began = time.monotonic()
    for xid in range(2, count + 2):
        start = time.monotonic()
        sock.send(frame(mac, xid, bytes([53, 1, 1])))
        offer = answer(sock, xid, 2)
        if offer is None:
            sys.exit("no OFFER")
        offers.append(time.monotonic() - start)
        server = offer[offer.index(bytes([54, 4]), 240) :][:6]
        start = time.monotonic()
        sock.send(frame(mac, xid, bytes([53, 1, 3, 50, 4]) + offer[16:20] + server))
        if answer(sock, xid, 5) is None:
            sys.exit("no ACK")
        acks.append(time.monotonic() - start)
    took = time.monotonic() - began
    figures = {
        "offer_us": statistics.median(offers) * 1e6,
        "ack_us": statistics.median(acks) * 1e6,
        "requests_per_s": 2 * count / took,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    hardware = bytes.fromhex(sys.argv[2].replace(":", ""))
    if sys.argv[1] == "first":
        first(hardware, float(sys.argv[3]))
    else:
        rounds(hardware, int(sys.argv[3]))
