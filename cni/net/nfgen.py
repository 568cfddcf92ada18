"""Marks of the packet filter: small values that differ once somebody has changed a rule.

A mark is read without starting a program: some microseconds instead of a process for each listing.
Equal marks prove that nothing changed. Different ones prove nothing, as a mark covers the rules of
others as well; and None means only that it cannot be told.

nf_tables numbers its transactions, in each network namespace, and names the last one on request. Both
`nft` and `iptables` of the nf_tables kind write by transactions. x_tables (`iptables` of the legacy
kind) numbers nothing: there the mark is a digest of the table, without its counters.

Everything here is about the network namespace of the calling thread and needs CAP_NET_ADMIN.
Layouts: linux/netfilter/nfnetlink.h and nf_tables.h; linux/netfilter_ipv4/ip_tables.h, ip6_tables.h.
"""

from __future__ import annotations

import os
import socket
import struct
from hashlib import blake2b
from typing import NamedTuple

from cni.net import nlmsg
from cni.net.ruleset import Family

_NETLINK_NETFILTER = 12
# The subsystem stands in the upper byte of the message type.
_GET_GENERATION, _NEW_GENERATION = 10 << 8 | 16, 10 << 8 | 15
_GENERATION_ID = 1
_NFGENMSG_BYTES = 4

_GET_INFO, _GET_ENTRIES = 64, 65
# struct ipt_getinfo: name, valid hooks, entry and underflow of five hooks, number of entries, bytes.
_INFO = struct.Struct("@32s 11I II")
_HEADER = struct.Struct("@32s I 0Q")
# struct xt_counters: packets and bytes.
_NO_COUNTERS = bytes(16)


class _Tables(NamedTuple):
    """How one family's tables are asked for, and where a rule's counters are.

    `counters` is struct ipt_entry (or ip6t_entry) up to its counters; its one value is next_offset.
    """

    domain: int
    level: int
    counters: struct.Struct


# What is matched, nfcache, target_offset; next_offset; comefrom; the counters are aligned as 64 bits are.
_TABLES = {
    Family.IPV4: _Tables(socket.AF_INET, socket.IPPROTO_IP, struct.Struct("@84x 4x 2x H 4x 0Q")),
    Family.IPV6: _Tables(socket.AF_INET6, socket.IPPROTO_IPV6, struct.Struct("@136x 4x 2x H 4x 0Q")),
}


def nftables_generation() -> int | None:
    """The number of the last nf_tables transaction; None without permission or without nf_tables."""
    request = nlmsg.message(_GET_GENERATION, 0, 1, bytes(_NFGENMSG_BYTES))
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    try:
        with socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER) as sock:
            sock.send(request)
            # The kernel has answered before `send` returns.
            answer = sock.recv(1 << 12, socket.MSG_DONTWAIT)
    except OSError:
        return None
    return read_generation(answer)


def read_generation(answer: bytes) -> int | None:
    """The number in the kernel's answer; None if the answer is a refusal."""
    for message in nlmsg.messages(answer):
        number = nlmsg.attrs(message.body, _NFGENMSG_BYTES).get(_GENERATION_ID, b"")
        if message.kind == _NEW_GENERATION and len(number) == 4:
            return int.from_bytes(number, "big")
    return None


def xtables_digest(family: Family, table: str) -> bytes | None:
    """A digest of everything in a legacy table but its counters; None if the table cannot be read.

    Costs 50 us, and 1.5 us more for each rule, chain and policy, those of others included: the kernel
    copies the whole table. /run/xtables.lock is not taken, as a table is handed out in one piece.
    """
    tables = _TABLES[family]
    info = bytearray(_INFO.pack(table.encode(), *bytes(13)))
    try:
        with socket.socket(tables.domain, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            _ask(sock, tables.level, _GET_INFO, info)
            size: int = _INFO.unpack(info)[-1]
            answer = bytearray(_HEADER.size + size)
            _HEADER.pack_into(answer, 0, table.encode(), size)
            # The kernel says EAGAIN here if the table has got another size since.
            _ask(sock, tables.level, _GET_ENTRIES, answer)
    except OSError:
        return None
    blank_counters(answer, _HEADER.size, family)
    digest = blake2b(info, digest_size=16)
    digest.update(answer)
    return digest.digest()


def blank_counters(buffer: bytearray, start: int, family: Family) -> None:
    """Set the counters of a legacy table's rules to zero; the first struct ipt_entry is at `start`.

    Ends at what is no rule: what is left as it was makes a digest differ once too often, never too seldom.
    """
    counters = _TABLES[family].counters
    while start + counters.size + len(_NO_COUNTERS) <= len(buffer):
        length: int = counters.unpack_from(buffer, start)[0]
        if length < counters.size + len(_NO_COUNTERS):
            return
        buffer[start + counters.size : start + counters.size + len(_NO_COUNTERS)] = _NO_COUNTERS
        start += length


def _ask(sock: socket.socket, level: int, option: int, buffer: bytearray) -> None:
    """getsockopt(2) with a question in the buffer, which Python's own does not pass on."""
    import ctypes  # here, as a daemon beside nf_tables never needs it

    libc = ctypes.CDLL(None, use_errno=True)
    shared = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    length = ctypes.c_uint32(len(buffer))
    if libc.getsockopt(sock.fileno(), level, option, shared, ctypes.byref(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
