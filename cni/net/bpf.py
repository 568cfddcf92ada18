"""Filters that the kernel applies before it wakes who listens: classic BPF programs for netlink sockets.

A pod's ADD and DEL cause some sixty notifications, of which the daemon needs none. Each would wake a thread
that takes Python's lock from the one that serves the pod: a third of an ADD's time.

Layouts: linux/filter.h, bpf_common.h; of messages: linux/netlink.h, rtnetlink.h, if_addr.h, neighbour.h.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from collections.abc import Collection, Iterable, Sequence

from cni.net import netlink, nlmsg

Instruction = tuple[int, int, int, int]  # code, skipped if true, skipped if false, constant

_SO_ATTACH_FILTER = 26
_LOAD_BYTE, _LOAD_HALF, _LOAD_WORD, _LOAD_NUMBER = 0x30, 0x28, 0x20, 0x00
_LOAD_BYTE_AT_X, _LOAD_HALF_AT_X, _LOAD_WORD_AT_X = 0x50, 0x48, 0x40
_NUMBER_TO_X, _TO_X = 0x01, 0x07
_GO, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x05, 0x15, 0x45, 0x06
# Looks for the first attribute of kind X from offset A on, and leaves its offset, or 0, in A.
_FIND_ATTRIBUTE = 0xFFFFF000 + 12
_ACCEPT: Instruction = (_RETURN, 0, 0, 0xFFFFFFFF)
_DROP: Instruction = (_RETURN, 0, 0, 0)

# From the start of a message: its type and flags; of a link its family; the index of a link, an address or a
# neighbour, in whose place a route has its table; a route's type; the attributes of a link, of a route.
_TYPE, _FLAGS, _FAMILY, _INDEX, _ROUTE_TYPE, _LINK_ATTRIBUTES, _ROUTE_ATTRIBUTES = 4, 6, 16, 20, 23, 32, 28
_PAYLOAD = 4
_IFLA_IFNAME, _RTA_OIF = 3, 4
_LINKS = (netlink.RTM_NEWLINK, netlink.RTM_DELLINK)
_ROUTES = (netlink.RTM_NEWROUTE, netlink.RTM_DELROUTE)
_OF_A_LINK = (netlink.RTM_NEWADDR, netlink.RTM_DELADDR, netlink.RTM_NEWNEIGH, netlink.RTM_DELNEIGH)


def attach(sock: socket.socket, program: Sequence[Instruction]) -> None:
    """Have the kernel pass over what `program` does not take, in the place of an earlier program."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    value = struct.pack("@HP", len(program), ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, value)


def of_type(kind: int) -> list[Instruction]:
    """Takes messages of one type."""
    return [(_LOAD_HALF, 0, 0, _TYPE), (_IF_EQUAL, 0, 1, _half(kind)), _ACCEPT, _DROP]


def of_links(indexes: Collection[int], names: Collection[str]) -> list[Instruction]:
    """Takes what route netlink tells of the links with these indexes, and of links with one of these names.

    Of routes those of the main table alone are taken, and also those without a link that may have taken the
    place of one of ours: blackholes that went, and whatever replaced another route or was appended to it.
    """
    ours = [instruction for index in sorted(indexes) for instruction in _if_equal(_word(index), [_ACCEPT])]
    named = [instruction for name in sorted(names) for instruction in _if_named(name.encode() + b"\0")]
    link: list[Instruction] = [
        (_LOAD_BYTE, 0, 0, _FAMILY),
        *_if_equal(socket.AF_BRIDGE, [_DROP]),
        (_LOAD_WORD, 0, 0, _INDEX),
        *ours,
        *_find(_LINK_ATTRIBUTES, _IFLA_IFNAME),
        *named,
        _DROP,
    ]
    replaces = _half(nlmsg.NLM_F_REPLACE | nlmsg.NLM_F_APPEND)
    is_blackhole = [(_LOAD_BYTE, 0, 0, _ROUTE_TYPE), *_if_equal(netlink.RTN_BLACKHOLE, [_ACCEPT])]
    route: list[Instruction] = [
        (_LOAD_BYTE, 0, 0, _INDEX),
        (_IF_EQUAL, 1, 0, netlink.RT_TABLE_MAIN),
        _DROP,
        (_LOAD_HALF, 0, 0, _FLAGS),
        (_IF_ANY_BIT, 0, 1, replaces),
        _ACCEPT,
        (_LOAD_HALF, 0, 0, _TYPE),
        *_if_equal(_half(netlink.RTM_DELROUTE), is_blackhole),
        *_find(_ROUTE_ATTRIBUTES, _RTA_OIF),
        (_LOAD_WORD_AT_X, 0, 0, _PAYLOAD),
        *ours,
        _DROP,
    ]
    program: list[Instruction] = [(_LOAD_HALF, 0, 0, _TYPE)]
    for kinds, block in ((_OF_A_LINK, [(_LOAD_WORD, 0, 0, _INDEX), *ours, _DROP]), (_LINKS, link)):
        program += _if_one_of(map(_half, kinds), block)
    return [*program, *_if_one_of(map(_half, _ROUTES), route), _ACCEPT]


def _if_equal(value: int, block: Sequence[Instruction]) -> list[Instruction]:
    return [(_IF_EQUAL, 0, len(block), value), *block]


def _if_one_of(values: Iterable[int], block: Sequence[Instruction]) -> list[Instruction]:
    """`block`, which ends with a return, if what was loaded is one of `values`."""
    listed = list(values)
    tests = [(_IF_EQUAL, len(listed) - place, 0, value) for place, value in enumerate(listed)]
    return [*tests, (_GO, 0, 0, len(block)), *block]


def _find(start: int, kind: int) -> list[Instruction]:
    """X becomes the offset of an attribute; a message without it is dropped."""
    look = [(_LOAD_NUMBER, 0, 0, start), (_NUMBER_TO_X, 0, 0, kind), (_LOAD_WORD, 0, 0, _FIND_ATTRIBUTE)]
    return [*look, *_if_equal(0, [_DROP]), (_TO_X, 0, 0, 0)]


def _if_named(text: bytes) -> list[Instruction]:
    """Takes the message if the attribute at X begins with `text`."""
    parts: list[tuple[int, int, int]] = []
    at = 0
    while at < len(text):
        code, size = next(
            (code, size)
            for code, size in ((_LOAD_WORD_AT_X, 4), (_LOAD_HALF_AT_X, 2), (_LOAD_BYTE_AT_X, 1))
            if at + size <= len(text)
        )
        parts.append((code, _PAYLOAD + at, int.from_bytes(text[at : at + size], "big")))
        at += size
    made: list[Instruction] = []
    for number, (code, offset, value) in enumerate(parts):
        left = 2 * (len(parts) - number - 1) + 1  # up to and with the acceptance
        made += [(code, 0, 0, offset), (_IF_EQUAL, 0, left, value)]
    return [*made, _ACCEPT]


def _half(value: int) -> int:
    """As the kernel loads 16 bits of the machine's byte order."""
    return int.from_bytes(value.to_bytes(2, sys.byteorder), "big")


def _word(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, sys.byteorder), "big")
