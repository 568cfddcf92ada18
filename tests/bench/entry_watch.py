"""Print when the entries of peers appear in this namespace's kernel.

An own little netlink reader, so that what the daemon does is seen by something that shares no code with it.
Prints `listening` first; ends after COUNT new routes, COUNT permanent neighbours and COUNT permanent FDB
entries, and prints for each kind `KIND FIRST LAST` in monotonic seconds. With `routes` as second word only
routes are waited for. Usage: entry_watch.py COUNT [routes]
"""

from __future__ import annotations

import socket
import struct
import sys
import time

RTMGRP_NEIGH, RTMGRP_IPV4_ROUTE = 0x4, 0x40
RTM_NEWROUTE, RTM_NEWNEIGH = 24, 28
AF_BRIDGE, NUD_PERMANENT, RT_TABLE_MAIN, RTN_UNICAST = 7, 0x80, 254, 1
SO_RCVBUFFORCE = 33


def kind_of(data: bytes, offset: int) -> str:
    """Which kind of entry a message tells of; empty for anything else."""
    (kind,) = struct.unpack_from("=H", data, offset + 4)
    if kind == RTM_NEWROUTE:
        table, rtm_type = data[offset + 20], data[offset + 23]
        return "route" if (table, rtm_type) == (RT_TABLE_MAIN, RTN_UNICAST) else ""
    if kind == RTM_NEWNEIGH:
        family, (state,) = data[offset + 16], struct.unpack_from("=H", data, offset + 24)
        if not state & NUD_PERMANENT:
            return ""
        return "fdb" if family == AF_BRIDGE else "neighbour"
    return ""


def main() -> None:
    """Read notifications until all have been seen."""
    count = int(sys.argv[1])
    kinds = ("route",) if sys.argv[2:] == ["routes"] else ("route", "neighbour", "fdb")
    left = dict.fromkeys(kinds, count)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 128 << 20)
    sock.bind((0, RTMGRP_IPV4_ROUTE | RTMGRP_NEIGH))
    print("listening", flush=True)
    while any(n > 0 for n in left.values()):
        data = sock.recv(1 << 18)
        now = time.monotonic()
        offset = 0
        while offset < len(data):
            (length,) = struct.unpack_from("=I", data, offset)
            kind = kind_of(data, offset)
            if kind in left:
                left[kind] -= 1
                first.setdefault(kind, now)
                last[kind] = now
            offset += (length + 3) & ~3
    for kind in kinds:
        print(kind, f"{first[kind]:.6f} {last[kind]:.6f}", flush=True)


if __name__ == "__main__":
    main()
