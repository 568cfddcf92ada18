"""The DHCP message on the wire (RFC 2131 section 2): bytes to value and back.

    op htype hlen hops | xid | secs flags | ciaddr yiaddr siaddr giaddr | chaddr(16) | sname(64) |
    file(128) | magic cookie | options: code length value ... 255

What the network sends never raises: a datagram that is no DHCP message becomes `Malformed`.

Decision: options are a mapping from code to value. Several options of one code are one value
(RFC 3396), an overloaded `file` or `sname` (RFC 2132 section 9.3) is unfolded while reading and
folded while writing, so nothing above this module knows that an option can be split or displaced.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address
from typing import Final

from launcher.dhcp.options import (
    END,
    LEASE_TIME,
    MAX_MESSAGE_SIZE,
    MESSAGE_TYPE,
    OVERLOAD,
    PAD,
    RELAY_AGENT_INFORMATION,
    REQUESTED_ADDRESS,
    SERVER_ID,
)

BOOT_REQUEST: Final = 1
BOOT_REPLY: Final = 2
FLAG_BROADCAST: Final = 0x8000  # RFC 2131 section 2, figure 2

NO_ADDRESS: Final = IPv4Address(0)
# RFC 951 fixes 300 octets; relays and old clients drop what is shorter.
MIN_DATAGRAM: Final = 300
# Nobody sends more: clients stay below one Ethernet frame. It bounds the work that one datagram can cause.
MAX_DATAGRAM: Final = 4096

_HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")
_COOKIE = bytes((99, 130, 83, 99))
_MAX_HLEN, _SNAME_SIZE, _FILE_SIZE = 16, 64, 128
_MAX_PIECE = 255
# Options that this project reads as one value of fixed size; others are opaque.
_SIZES = {REQUESTED_ADDRESS: 4, MESSAGE_TYPE: 1, SERVER_ID: 4, MAX_MESSAGE_SIZE: 2}


class MessageType(IntEnum):
    """Values of option 53 (RFC 2132 section 9.6)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


_TYPES: Mapping[int, MessageType] = {kind.value: kind for kind in MessageType}


@dataclass(frozen=True, slots=True)
class Malformed:
    """A datagram that is no DHCP message, and why; the text is one line without bytes of the sender."""

    reason: str


@dataclass(frozen=True, slots=True)
class Message:
    """One DHCP message. Names are those of RFC 2131 figure 1; `chaddr` is the hlen octets that count.

    `options` has option 53 and never 0, 52 or 255. `sname` and `file` end before the first zero octet.
    """

    op: int
    xid: int
    chaddr: bytes
    options: Mapping[int, bytes]
    htype: int = 1
    hops: int = 0
    secs: int = 0
    flags: int = 0
    ciaddr: IPv4Address = NO_ADDRESS
    yiaddr: IPv4Address = NO_ADDRESS
    siaddr: IPv4Address = NO_ADDRESS
    giaddr: IPv4Address = NO_ADDRESS
    sname: bytes = b""
    file: bytes = b""

    @property
    def kind(self) -> MessageType:
        return _TYPES[self.options[MESSAGE_TYPE][0]]

    def address(self, code: int) -> IPv4Address | None:
        """The address in option `code` (50 or 54, four bytes since `parse` checked them); None without it."""
        value = self.options.get(code)
        return None if value is None else IPv4Address(value)


def parse(datagram: bytes, op: int = BOOT_REQUEST) -> Message | Malformed:
    """Return the message in `datagram` if it is one of kind `op`.

    The end option may be missing, as it is from some boot ROMs. Work is linear in the length.
    """
    if not _HEADER.size <= len(datagram) <= MAX_DATAGRAM:
        return Malformed(f"{len(datagram)} bytes; a message has {_HEADER.size} to {MAX_DATAGRAM}")
    fields = _HEADER.unpack_from(datagram)
    got, htype, hlen, hops, xid, secs, flags = fields[:7]
    chaddr, sname, file, cookie = fields[11:]
    if got != op:
        return Malformed(f"op is {got}, not {op}")
    if hlen > _MAX_HLEN:
        return Malformed(f"hlen is {hlen}, more than {_MAX_HLEN}")
    if cookie != _COOKIE:
        return Malformed(f"magic cookie is {cookie.hex()}, not {_COOKIE.hex()}")
    options = _read_options(datagram[_HEADER.size :], file, sname)
    if isinstance(options, Malformed):
        return options
    overload = options.pop(OVERLOAD, b"\0")[0]
    ciaddr, yiaddr, siaddr, giaddr = map(IPv4Address, fields[7:11])
    sname = b"" if overload & 2 else sname.partition(b"\0")[0]
    file = b"" if overload & 1 else file.partition(b"\0")[0]
    addresses = (ciaddr, yiaddr, siaddr, giaddr)
    return Message(op, xid, chaddr[:hlen], options, htype, hops, secs, flags, *addresses, sname, file)


def _read_options(area: bytes, file: bytes, sname: bytes) -> dict[int, bytes] | Malformed:
    """All options in the order that RFC 3396 section 5 gives: options, file, sname."""
    found: dict[int, bytearray] = {}
    flaw = _scan(area, found)
    overload = found.get(OVERLOAD, b"\0")
    if len(overload) != 1 or overload[0] > 3:
        return Malformed(f"option {OVERLOAD} has {len(overload)} bytes or a value other than 1, 2, 3")
    if overload[0] & 1:
        flaw = flaw or _scan(file, found)
    if overload[0] & 2:
        flaw = flaw or _scan(sname, found)
    if flaw or len(found.get(OVERLOAD, b"\0")) != 1:
        return Malformed(flaw or f"option {OVERLOAD} within an overloaded field")
    for code, size in _SIZES.items():
        if code in found and len(found[code]) != size:
            return Malformed(f"option {code} has {len(found[code])} bytes, not {size}")
    if MESSAGE_TYPE not in found:
        return Malformed(f"no option {MESSAGE_TYPE}: plain BOOTP")
    if found[MESSAGE_TYPE][0] not in _TYPES:
        return Malformed(f"option {MESSAGE_TYPE} is {found[MESSAGE_TYPE][0]}, an unknown message type")
    return {code: bytes(value) for code, value in found.items()}


def _scan(area: bytes, found: dict[int, bytearray]) -> str:
    """Add the options in `area` to `found`, joining those of one code; return what is wrong, if anything."""
    at, end = 0, len(area)
    while at < end:
        code = area[at]
        at += 1
        if code == PAD:
            continue
        if code == END:
            break
        stop = at + 1 + area[at] if at < end else end + 1
        if stop > end:
            return f"option {code} runs past the end"
        found.setdefault(code, bytearray()).extend(area[at + 1 : stop])
        at = stop
    return ""


def build(message: Message) -> bytes:
    """Return `message` as a datagram of at least 300 bytes; raises ValueError if it cannot be one."""
    datagram, left_out = fit(message, MAX_DATAGRAM)
    if left_out:
        raise ValueError(f"options {left_out} do not fit into {MAX_DATAGRAM} bytes")
    return datagram


def fit(message: Message, limit: int) -> tuple[bytes, tuple[int, ...]]:
    """Return `message` in at most `limit` bytes (300 or more), and the codes of the options left out.

    Options must come in order of importance, the most important first. Those that do not fit go to
    `file` and `sname` where both are unused, and are left out where they are not: each option takes
    the first place that has room. On the wire the order is fixed: 53, 54, 51, then ascending (so that
    1 comes before 3, RFC 2132 section 3.3), and 82 last (RFC 3046 section 2.1).
    """
    if len(message.chaddr) > _MAX_HLEN or len(message.sname) > _SNAME_SIZE or len(message.file) > _FILE_SIZE:
        raise ValueError("chaddr, sname or file is longer than its field")
    pieces = {code: _encode(code, value) for code, value in message.options.items()}
    room = limit - _HEADER.size - 1
    if sum(map(len, pieces.values())) <= room:
        return _assemble(message, _join(pieces), message.file, message.sname), ()
    return _squeeze(message, pieces, room)


def _squeeze(message: Message, pieces: dict[int, bytes], room: int) -> tuple[bytes, tuple[int, ...]]:
    # RFC 2131 table 3 leaves both fields of a NAK unused.
    spare = not message.file and not message.sname and message.kind is not MessageType.NAK
    # Room for option 52 (three bytes) is kept back, and one byte in each field for its end option.
    rooms = [room - 3, _FILE_SIZE - 1, _SNAME_SIZE - 1] if spare else [room]
    places: list[dict[int, bytes]] = [{} for _ in rooms]
    left_out = []
    for code, piece in pieces.items():
        where = next((i for i, free in enumerate(rooms) if len(piece) <= free), None)
        if where is None:
            left_out.append(code)
        else:
            places[where][code] = piece
            rooms[where] -= len(piece)
    file, sname = message.file, message.sname
    if spare and (used := bool(places[1]) | bool(places[2]) << 1):
        places[0][OVERLOAD] = bytes((OVERLOAD, 1, used))
        file, sname = (_join(place) + bytes((END,)) if place else b"" for place in places[1:])
    return _assemble(message, _join(places[0]), file, sname), tuple(left_out)


def _encode(code: int, value: bytes) -> bytes:
    """One option, or as many as its value needs (RFC 3396 section 6)."""
    if len(value) <= _MAX_PIECE:
        return bytes((code, len(value))) + value
    cuts = range(0, len(value), _MAX_PIECE)
    return b"".join(_encode(code, value[at : at + _MAX_PIECE]) for at in cuts)


_FIRST = {MESSAGE_TYPE: -3, SERVER_ID: -2, LEASE_TIME: -1, RELAY_AGENT_INFORMATION: 256}


def _join(pieces: Mapping[int, bytes]) -> bytes:
    return b"".join(pieces[code] for code in sorted(pieces, key=lambda code: _FIRST.get(code, code)))


def _assemble(message: Message, options: bytes, file: bytes, sname: bytes) -> bytes:
    header = _HEADER.pack(
        message.op,
        message.htype,
        len(message.chaddr),
        message.hops,
        message.xid,
        message.secs,
        message.flags,
        message.ciaddr.packed,
        message.yiaddr.packed,
        message.siaddr.packed,
        message.giaddr.packed,
        message.chaddr,
        sname,
        file,
        _COOKIE,
    )
    return (header + options + bytes((END,))).ljust(MIN_DATAGRAM, b"\0")
