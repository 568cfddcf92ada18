"""Netlink messages of any protocol: header, attributes, acknowledgements. No socket.

Imports next to nothing, as the CNI plugin's cold path loads it for every pod.

Layouts: linux/netlink.h; RFC 3549, section 2.3.
"""

from __future__ import annotations

import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_ECHO, NLM_F_DUMP_INTR = 0x1, 0x4, 0x8, 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLM_F_ACK_TLVS, NLM_F_CAPPED = 0x200, 0x100
NLA_F_NESTED = 0x8000

_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_ATTR_U32 = struct.Struct("=HHI")
_CODE = struct.Struct("=i")


Request = tuple[int, int, bytes]  # message type, flags, body


class Message:
    """One netlink message; `body` starts behind the header."""

    __slots__ = ("body", "flags", "kind", "seq")

    def __init__(self, kind: int, flags: int, seq: int, body: bytes) -> None:
        self.kind = kind
        self.flags = flags
        self.seq = seq
        self.body = body


def messages(buffer: bytes) -> Iterator[Message]:
    """Split what one `recv` gave; ends at the first message that is not there as a whole."""
    offset, end, unpack = 0, len(buffer), _HEADER.unpack_from
    while offset + 16 <= end:
        length, kind, flags, seq, _pid = unpack(buffer, offset)
        if length < 16 or offset + length > end:
            return
        yield Message(kind, flags, seq, buffer[offset + 16 : offset + length])
        offset += (length + 3) & ~3


def message(kind: int, flags: int, seq: int, body: bytes) -> bytes:
    """One message with its header; the body is a whole number of words."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags | NLM_F_REQUEST, seq, 0) + body


def attr(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    length = _ATTR.size + len(payload)
    return _ATTR.pack(length, kind) + payload + b"\0" * (-length % 4)


def attr_u32(kind: int, value: int) -> bytes:
    """One attribute that is a number of 32 bits."""
    return _ATTR_U32.pack(_ATTR_U32.size, kind, value)


def attrs(body: bytes, offset: int = 0) -> dict[int, bytes]:
    """Read attributes, up to the first that is not there as a whole; of repeated ones the last stays.

    The nested and byte-order flags are cut off.
    """
    return dict(_each_attr(body, offset))


def first_attr(body: bytes, offset: int, wanted: int) -> bytes:
    """The first attribute of a kind, without a look at those behind it; empty if there is none."""
    # Not by `_each_attr`: a pod waits while two answers are searched, where it stands behind thirty others.
    end, unpack = len(body), _ATTR.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(body, offset)
        stop = offset + length
        if length < 4 or stop > end:
            break
        if kind & 0x3FFF == wanted:
            return body[offset + 4 : stop]
        offset = (stop + 3) & ~3
    return b""


def attr_list(body: bytes, offset: int = 0) -> list[tuple[int, bytes]]:
    """`attrs` for a nested list, in which the same kind comes again and again."""
    return list(_each_attr(body, offset))


def _each_attr(body: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    end, unpack = len(body), _ATTR.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(body, offset)
        stop = offset + length
        if length < 4 or stop > end:
            return
        yield kind & 0x3FFF, body[offset + 4 : stop]
        offset = (stop + 3) & ~3


def u32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def error(message_: Message) -> tuple[int, str]:
    """The errno (0 for an acknowledgement) and the kernel's own words of an NLMSG_ERROR."""
    return error_number(message_), error_text(message_)


def error_number(message_: Message) -> int:
    """The errno of an NLMSG_ERROR, 0 for an acknowledgement."""
    (code,) = _CODE.unpack_from(message_.body)
    return -int(code)


def error_text(message_: Message) -> str:
    """The kernel's own words of an NLMSG_ERROR, if it has any."""
    if not message_.flags & NLM_F_ACK_TLVS:
        return ""
    (echoed,) = struct.unpack_from("=I", message_.body, 4)
    offset = 4 + (_HEADER.size if message_.flags & NLM_F_CAPPED else (echoed + 3) & ~3)
    return first_attr(message_.body, offset, 1).rstrip(b"\0").decode("utf-8", "replace")


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def mac_text(raw: bytes) -> str:
    return raw.hex(":")
