"""Mutated DHCP packets against the single-client server: `python -m tests.fuzz.dhcp [COUNT] [SEED]`.

What must hold for any datagram: no exception; no reply unless the datagram itself carries the client's
hardware address in a request that came straight from its link; no reply longer than the client takes; a
reply that reads back option by option, to the client's own address or to everybody on its link. The reply
is checked with a decoder of its own, so a fault in the server's cannot hide itself.

With atheris installed the same check runs under coverage guidance, and the arguments are libFuzzer's.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from time import perf_counter

from launcher.dhcp.packet import BOOT_REQUEST, Message, MessageType, build
from launcher.dhcp.server import BROADCAST, DhcpLease, Reply, Server

MAC = bytes.fromhex("0a580af40107")
OWN = IPv4Address("10.244.1.7")
SERVER_ID = IPv4Address("169.254.75.10")
GATEWAY = IPv4Address("10.244.1.1")
LEASE = DhcpLease(
    mac=MAC.hex(":"),
    address=IPv4Interface(f"{OWN}/24"),
    server_id=SERVER_ID,
    routers=(GATEWAY,),
    dns=(IPv4Address("10.96.0.10"),),
    search=("default.svc.cluster.local", "svc.cluster.local", "cluster.local"),
    hostname="vm1",
    mtu=9000,
    routes=((IPv4Network("0.0.0.0/0"), GATEWAY), (IPv4Network("10.244.0.0/16"), GATEWAY)),
    private={224: "x" * 300, 240: "0x0102"},
)

_COOKIE = bytes((99, 130, 83, 99))
_OPTIONS = 240
# What a client may rely on: exact sizes, or the size of one element.
_EXACT = {1: 4, 26: 2, 28: 4, 51: 4, 53: 1, 54: 4, 58: 4, 59: 4, 80: 0}
_MULTIPLE = {3: 4, 6: 4, 42: 4}
_LISTS = (b"", bytes(range(1, 255)), bytes((1, 3, 6, 12, 15, 26, 28, 42, 119, 121)), bytes((1, 121, 249)))


def seeds() -> list[bytes]:
    """Sound requests of every state, from the client and from others."""
    own, other = OWN.packed, bytes((192, 0, 2, 9))
    us, them = SERVER_ID.packed, bytes((192, 0, 2, 1))
    states: list[tuple[MessageType, IPv4Address, dict[int, bytes]]] = [
        (MessageType.DISCOVER, IPv4Address(0), {}),
        (MessageType.DISCOVER, IPv4Address(0), {50: other, 80: b"", 57: b"\x05\xdc"}),
        (MessageType.REQUEST, IPv4Address(0), {54: us, 50: own}),
        (MessageType.REQUEST, IPv4Address(0), {54: them, 50: other}),
        (MessageType.REQUEST, IPv4Address(0), {50: own, 82: b"\1\4vlan"}),
        (MessageType.REQUEST, IPv4Address(0), {50: other}),
        (MessageType.REQUEST, OWN, {57: b"\x23\x28", 61: b"\1" + MAC}),
        (MessageType.DECLINE, IPv4Address(0), {54: us, 50: own}),
        (MessageType.RELEASE, OWN, {54: us}),
        (MessageType.INFORM, OWN, {61: b"\xff" + bytes(18)}),
    ]
    return [
        build(
            Message(BOOT_REQUEST, 0x11223344, mac, {53: bytes((kind,)), 55: wanted, **options}, ciaddr=ciaddr)
        )
        for mac in (MAC, MAC, MAC, b"\x02" + bytes(4) + b"\x01")
        for wanted in _LISTS
        for kind, ciaddr, options in states
    ]


def mutate(rng: random.Random, seed: bytes) -> bytes:
    """Return `seed` with some bytes set, an area cut, repeated or replaced; mostly within the options."""
    raw = bytearray(seed)
    for _ in range(rng.getrandbits(2)):
        where = _OPTIONS + rng.getrandbits(6) if rng.random() < 0.7 else rng.randrange(len(raw))
        raw[where % len(raw)] = rng.getrandbits(8)
    choice = rng.getrandbits(4)
    at = rng.randrange(len(raw))
    if choice == 0:
        del raw[at:]
    elif choice == 1:
        raw[at:at] = rng.randbytes(rng.getrandbits(9))
    elif choice == 2:
        raw[_OPTIONS:] = raw[_OPTIONS:].rstrip(b"\0\xff") * (1 + rng.getrandbits(3))
    elif choice == 3:
        raw[108:236] = bytes((rng.choice((12, 50, 54, 55, 61)), rng.getrandbits(7))) * 64
        raw[_OPTIONS:_OPTIONS] = bytes((52, 1, 1 + rng.getrandbits(1)))
    elif choice == 4:
        raw = bytearray(rng.randbytes(at))
    return bytes(raw)


def check(server: Server, datagram: bytes) -> str:
    """Give `datagram` to the server, check what comes back, and return what kind of answer it was."""
    answer = server.receive(datagram)
    if not isinstance(answer, Reply):
        assert answer.reason and answer.reason.isprintable() and len(answer.reason) < 200, answer
        return "ignored" if answer.kind is None else f"ignored {answer.kind.name}"
    assert datagram[0] == 1 and datagram[2] == len(MAC) and datagram[28:34] == MAC, "a reply to somebody else"
    assert datagram[24:28] == bytes(4), "a reply to a relay"
    assert datagram[236:_OPTIONS] == _COOKIE, "a reply to what is not DHCP"
    check_reply(answer, datagram)
    return answer.kind.name


def check_reply(reply: Reply, request: bytes) -> None:
    """Check header, sizes and destination of a reply to a request from `MAC`."""
    raw = reply.datagram
    assert raw[0] == 2 and raw[3] == 0 and raw[4:8] == request[4:8] and raw[8:10] == bytes(2)
    assert raw[10:12] == request[10:12] and raw[28:34] == MAC and raw[24:28] == bytes(4)
    options = decode(raw)
    assert options[53] == bytes((reply.kind,)) and options[54] == SERVER_ID.packed
    assert 300 <= len(raw) <= longest(request)
    yiaddr, nak = raw[16:20], reply.kind is MessageType.NAK
    if nak:
        assert yiaddr == raw[12:16] == raw[20:24] == bytes(4) and reply.address == BROADCAST
        assert set(options) <= {53, 54, 56, 61, 82}
    elif 51 in options:
        assert (
            yiaddr == OWN.packed
            and raw[12:16] in (bytes(4), OWN.packed)
            and reply.address in (OWN, BROADCAST)
        )
    else:
        assert yiaddr == bytes(4) and not {58, 59} & set(options)
        assert reply.address in LEASE.address.network or reply.address == BROADCAST
    assert reply.mac == (b"\xff" * 6 if reply.address == BROADCAST else MAC)


def longest(request: bytes) -> int:
    """The size of DHCP message that option 57 of `request` allows; without it 576 less both headers."""
    size = int.from_bytes(decode(request).get(57, b""), "big")
    return max(size, 576) - 28


def decode(raw: bytes) -> dict[int, bytes]:
    """Options by code in a well-formed message: the fields that are named in option 52 included."""
    found: dict[int, bytes] = {}
    _walk(raw[_OPTIONS:], found)
    overload = found.get(52, b"\0")[0]
    if overload & 1:
        _walk(raw[108:236], found)
    if overload & 2:
        _walk(raw[44:108], found)
    if raw[0] == 2:
        for code, size in _EXACT.items():
            assert len(found.get(code, bytes(size))) == size, f"option {code} has a wrong size"
        for code, size in _MULTIPLE.items():
            assert code not in found or (found[code] and len(found[code]) % size == 0), f"option {code}"
    return found


def _walk(area: bytes, found: dict[int, bytes]) -> None:
    at = 0
    while at < len(area) and area[at] != 255:
        if area[at] == 0:
            at += 1
            continue
        size = area[at + 1]
        value = area[at + 2 : at + 2 + size]
        assert len(value) == size
        found[area[at]] = found.get(area[at], b"") + value
        at += 2 + size


def run(count: int, seed: int) -> Counter[str]:
    """Check `count` mutated packets; an AssertionError or an exception of the server carries the datagram."""
    rng, server, pool = random.Random(seed), Server(LEASE), seeds()
    found: Counter[str] = Counter()
    for number in range(count):
        datagram = mutate(rng, pool[number % len(pool)])
        try:
            found[check(server, datagram)] += 1
        except Exception as error:
            error.add_note(f"packet {number} of seed {seed}: {datagram.hex()}")
            raise
    return found


def main() -> None:
    try:
        import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        pass
    else:
        server = Server(LEASE)
        atheris.Setup(sys.argv, lambda data: check(server, data))
        atheris.Fuzz()
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    started = perf_counter()
    found = run(count, seed)
    spent = perf_counter() - started
    print(f"{count} packets, seed {seed}: {spent:.1f} s, {spent / count * 1e6:.1f} µs each; nothing broken")
    for answer, times in sorted(found.items()):
        print(f"{times:>9}  {answer}")


if __name__ == "__main__":
    main()
