"""What the CNI plugin's shim and the daemon say to each other. No socket.

    shim    REQUEST   "FCNI", mask of descriptors, why there is no namespace, length of name, environment
                      and stdin, the shim's patience, version; then the three texts
    daemon  HELLO     "FCNI", version, 0
    daemon  REPLY     "FCNI", answered or declined, exit status, length of stdout and stderr; then both texts

Numbers are in the machine's byte order. The descriptors travel with the first bytes of the request, in the
order of their bits. A declined request never was begun.

Decision: the daemon says hello once it has the whole request, and begins only if that could be said. A shim
that will not wait for it any longer closes its end; the kernel takes one or the other first, so both know
whether the request was begun. Version 1 greeted first, which cost each call two changes of the processor;
version 2 had descriptors of the container's settings a level higher, where the kernel keeps an entry for each
look from another namespace.
"""

from __future__ import annotations

import os
import struct

from cni.errors import ProtocolError

MAGIC = b"FCNI"
VERSION = 3
HELLO = struct.pack("=4sHH", MAGIC, VERSION, 0)

# Bits of the mask: the shim's namespace and root directory; then the container's namespace, and what was
# opened in it: a route netlink socket and, where there is one, /proc/sys/net/ipv6/conf. (What /proc/sys/net
# itself leads to depends on who looks; what is below that directory does not.)
OWN, ROOT, NETNS, ROUTE, SETTINGS = DESCRIPTORS = tuple(1 << bit for bit in range(5))
# The masks that make sense, with their bits in the order in which the descriptors come.
_MASKS: dict[int, tuple[int, ...]] = {
    sum(bits): bits for bits in (DESCRIPTORS[:2], DESCRIPTORS[:4], DESCRIPTORS)
}
NOT_A_NAMESPACE = -1

LARGEST_BYTES = 4 << 20  # name, environment and stdin together
_HEADER = struct.Struct("=4sIiIIIII")
_REPLY = struct.Struct("=4sIIII")
HEADER_BYTES = _HEADER.size
_ANSWERED, _DECLINED = 0, 1


class WireError(ProtocolError):
    """What the other end sent is no request."""


class Header:
    """The fixed part of a request. `patience_ms` is how long the shim waits for the reply.

    `descriptors` are the bits that are set, `total_bytes` is the length of the whole request.
    """

    __slots__ = ("_lengths", "descriptors", "netns_error", "patience_ms", "total_bytes")

    def __init__(self, data: bytes | bytearray) -> None:
        """Raises WireError if the first bytes of `data` are no header."""
        magic, mask, netns_error, *lengths, patience_ms, version = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise WireError("it does not begin as a request")
        if version != VERSION:
            raise WireError(f"it is of version {version} of the protocol, not {VERSION}")
        if mask not in _MASKS:
            raise WireError(f"its mask of descriptors is {mask:#x}")
        if netns_error < NOT_A_NAMESPACE or (netns_error and mask & NETNS):
            raise WireError(f"its error for the namespace is {netns_error}")
        announced = sum(lengths)
        if announced > LARGEST_BYTES:
            raise WireError(f"it announces {announced} bytes, more than {LARGEST_BYTES}")
        self.descriptors = _MASKS[mask]
        self.total_bytes: int = HEADER_BYTES + announced
        self.netns_error: int = netns_error
        self.patience_ms: int = patience_ms
        self._lengths: list[int] = lengths

    def texts(self, data: bytes) -> tuple[str, dict[str, str], bytes]:
        """Name, environment and stdin of a whole request; raises WireError.

        Bytes that are no UTF-8 are kept as in os.environ; of a variable that is repeated the first counts.
        """
        end_of_name = HEADER_BYTES + self._lengths[0]
        end_of_environment = end_of_name + self._lengths[1]
        environment: dict[str, str] = {}
        *variables, rest = os.fsdecode(data[end_of_name:end_of_environment]).split("\0")
        if rest:
            raise WireError("its environment ends within a variable")
        for variable in variables:
            name, equals, value = variable.partition("=")
            if not equals:
                raise WireError("its environment has a variable without '='")
            environment.setdefault(name, value)
        if bool(environment.get("CNI_NETNS")) != bool(self.netns_error or NETNS in self.descriptors):
            raise WireError("CNI_NETNS and the descriptors that came with it do not agree")
        return os.fsdecode(data[HEADER_BYTES:end_of_name]), environment, data[end_of_environment:]


def answer(exit_status: int, stdout: bytes, stderr: bytes) -> bytes:
    """The reply to a request that was served."""
    header = _REPLY.pack(MAGIC, _ANSWERED, exit_status, len(stdout), len(stderr))
    return b"".join((header, stdout, stderr))


def declined() -> bytes:
    """The reply to a request of which nothing was done."""
    return _REPLY.pack(MAGIC, _DECLINED, 0, 0, 0)
