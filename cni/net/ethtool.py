"""Whether a device leaves checksums to the hardware: ethtool's ioctl, on a UDP socket of its namespace.

Layout: linux/ethtool.h, `struct ethtool_value`; SIOCETHTOOL in linux/sockios.h. The two commands take all
checksum features of a device as one, which for a tunnel is `tx-checksum-ip-generic`:
`ethtool -K flannel.1 tx off`.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from array import array
from socket import socket

_SIOCETHTOOL = 0x8946
_GTXCSUM, _STXCSUM = 0x16, 0x17
_IFREQ = struct.Struct("16sP16x")


def tx_checksum(sock: socket, link: str) -> bool | None:
    """Whether the offload is on; None if the link cannot tell. Raises OSError (ENODEV: no such link)."""
    try:
        return bool(_call(sock, link, _GTXCSUM, 0))
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return None
        raise


def set_tx_checksum(sock: socket, link: str, on: bool) -> None:
    """Switch the offload; a link that has none stays as it is. Raises OSError."""
    try:
        _call(sock, link, _STXCSUM, int(on))
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise


def _call(sock: socket, link: str, command: int, value: int) -> int:
    words = array("I", (command, value))
    fcntl.ioctl(sock, _SIOCETHTOOL, _IFREQ.pack(link.encode(), words.buffer_info()[0]))
    return words[1]
