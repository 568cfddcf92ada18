"""Print when routes appear: one line `MONOTONIC_SECONDS DESTINATION` for each new route of this namespace.

An own little netlink reader, so that what the daemon does is seen by something that shares no code with it.
Runs until it is ended; prints `listening` first. Usage: route_watch.py COUNT (then ends after so many).
"""

from __future__ import annotations

import socket
import struct
import sys
import time

RTMGRP_IPV4_ROUTE, RTM_NEWROUTE, RTA_DST = 0x40, 24, 1


def main() -> None:
    """Read notifications until COUNT new routes were seen."""
    left = int(sys.argv[1])
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
    sock.bind((0, RTMGRP_IPV4_ROUTE))
    print("listening", flush=True)
    lines = []
    while left > 0:
        data = sock.recv(1 << 18)
        now = time.monotonic()
        offset = 0
        while offset < len(data):
            length, kind = struct.unpack_from("=IH", data, offset)
            table, rtm_type = data[offset + 20], data[offset + 23]
            if kind == RTM_NEWROUTE and table == 254 and rtm_type == 1:
                destination = socket.inet_ntoa(data[offset + 32 : offset + 36])
                lines.append(f"{now:.6f} {destination}")
                left -= 1
            offset += (length + 3) & ~3
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
