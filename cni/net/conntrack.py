"""Forgetting flows: entries of connection tracking are deleted over netlink, without `conntrack`.

A UDP flow that goes on keeps the translation that it began with, to a pod that may be gone.

Layouts: linux/netfilter/nfnetlink_conntrack.h. The kernel (5.8) sends only what is asked for; an older one
sends all flows of the family, and what is not wanted is left out here.
"""

from __future__ import annotations

import errno

from cni.errors import KernelError
from cni.net.nftexpr import NFPROTO, address, nested, port
from cni.net.nlmsg import attr, attr_u32, attrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from cni.net.nlsocket import NetlinkSocket

UDP = 17

_SUBSYSTEM = 1
_GET, _DELETE = 1, 2
_NFGENMSG_BYTES = 4
_DELETIONS_AT_ONCE = 100  # the acknowledgements of some hundreds would not fit into the socket's buffer
_ORIGINAL, _ZONE, _ID, _FILTER = 1, 18, 12, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUMBER, _PROTO_SOURCE, _PROTO_DESTINATION = 1, 2, 3
_IP_DESTINATION = {4: 2, 6: 4}
# What of the given flow has to be equal, CTA_FILTER_F_*.
_EQUAL_PROTOCOL, _EQUAL_DESTINATION_PORT = 1 << 3, 1 << 5


def delete_flows(
    socket: NetlinkSocket, family: int, protocol: int, destinations: Collection[tuple[int, int | None]]
) -> int:
    """Delete the flows whose first packet went to one of some destinations; returns how many.

    `family` is 4 or 6. A destination is a port and an address as an integer, or None for all addresses, as
    they were before translation. The flows are read once. Raises KernelError.
    """
    if not destinations:
        return 0
    wanted = {(port(number), None if to is None else address(family, to)) for number, to in destinations}
    ports = {number for number, _ in wanted}
    # The ports have to be there, though they are not compared if there are several.
    proto = attr(_PROTO_NUMBER, bytes((protocol,))) + attr(_PROTO_SOURCE, port(0))
    proto += attr(_PROTO_DESTINATION, min(ports))
    # Addresses are compared here only: kernels send just the flows to other IPv6 addresses (6.18 does).
    query = nested(_ORIGINAL, nested(_TUPLE_PROTO, proto))
    compared = _EQUAL_PROTOCOL | (_EQUAL_DESTINATION_PORT if len(ports) == 1 else 0)
    query += nested(_FILTER, attr_u32(1, compared))
    header = bytes((NFPROTO[family], 0, 0, 0))
    doomed = []
    for message in socket.dump(_SUBSYSTEM << 8 | _GET, header + query):
        flow = attrs(message.body, _NFGENMSG_BYTES)
        if _goes_to(flow[_ORIGINAL], family, protocol, wanted):
            zone = attr(_ZONE, flow[_ZONE]) if _ZONE in flow else b""
            doomed.append(header + nested(_ORIGINAL, flow[_ORIGINAL]) + attr(_ID, flow[_ID]) + zone)
    for start in range(0, len(doomed), _DELETIONS_AT_ONCE):
        part = doomed[start : start + _DELETIONS_AT_ONCE]
        for answer in socket.transact([(_SUBSYSTEM << 8 | _DELETE, 0, body) for body in part]):
            if answer.errno not in (0, errno.ENOENT):  # the latter: it has ended
                raise KernelError(f"cannot delete a flow: {answer.reason}")
    return len(doomed)


def _goes_to(tuple_: bytes, family: int, protocol: int, wanted: set[tuple[bytes, bytes | None]]) -> bool:
    parts = attrs(tuple_)
    proto, ip = attrs(parts.get(_TUPLE_PROTO, b"")), attrs(parts.get(_TUPLE_IP, b""))
    number, to = proto.get(_PROTO_DESTINATION, b""), ip.get(_IP_DESTINATION[family])
    if proto.get(_PROTO_NUMBER) != bytes((protocol,)):
        return False
    return (number, None) in wanted or (number, to) in wanted
