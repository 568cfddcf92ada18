"""The socket that the CNI plugin's shim connects to: its file, and what comes and goes over a connection.

A connection is a `_socket.socket`, the C half of the standard module's: the other half looks up enumerations
for each connection, which takes as long as receiving a request.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from _socket import socket as Socket
from contextlib import ExitStack, suppress
from threading import Lock

from flanneld import cniwire
from flanneld.cnihost import Passed
from flanneld.cniwire import WireError

_BACKLOG = 1024
_REPLY_S = 10.0
_TIMEVAL = struct.Struct("@ll")
_LONGEST_PATH_BYTES = 107  # of a unix socket: 108 with the final NUL
_CHUNK_BYTES = 1 << 16
# As plain numbers, which are quicker to reckon with.
_CLOEXEC, _TRUNCATED, _AT_ONCE = map(int, (socket.MSG_CMSG_CLOEXEC, socket.MSG_CTRUNC, socket.MSG_DONTWAIT))
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * len(cniwire.DESCRIPTORS))


class Reading:
    """The connections whose request is still on its way, which a stop does not wait for."""

    def __init__(self) -> None:
        self._mutex = Lock()
        self._stopped = False
        self._connections: set[Socket] = set()

    def begin(self, connection: Socket) -> None:
        """`end` must follow. Without the lock: it sees that all is stopped, or is seen by who stops."""
        self._connections.add(connection)
        if self._stopped:
            _end_of_input(connection)

    def end(self, connection: Socket) -> None:
        """It may be closed then."""
        with self._mutex:
            self._connections.discard(connection)

    def stop(self) -> None:
        """Nothing more arrives: who waits for the rest of a request finds its end."""
        self._stopped = True
        with self._mutex:
            for connection in list(self._connections):
                _end_of_input(connection)


class Place:
    """The listening socket and its file, which is root's alone from its first moment. Raises OSError."""

    def __init__(self, path: str) -> None:
        self._path = path
        directory = os.path.dirname(path) or "."
        os.makedirs(directory, 0o755, exist_ok=True)
        _require_free(path)
        # Connecting works as soon as the name is there, so it is given to a socket that listens.
        temporary = os.path.join(directory, f".{os.urandom(3).hex()}")
        longest = max(len(os.fsencode(name)) for name in (path, temporary))
        if longest > _LONGEST_PATH_BYTES:
            raise OSError(f"a path of {longest} bytes is too long for a socket, {_LONGEST_PATH_BYTES} fit")
        with ExitStack() as undo:
            self.listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            os.fchmod(self.listener.fileno(), 0o600)  # bind(2) takes the file's mode from it
            self.listener.bind(temporary)
            undo.callback(os.unlink, temporary)
            self.listener.listen(_BACKLOG)
            self._identity = _identity(temporary)
            os.rename(temporary, path)
            undo.pop_all()

    def accept(self) -> Socket:
        """The next connection. Raises OSError."""
        descriptor, _address = self.listener._accept()  # type: ignore[attr-defined]  # C half of accept()
        return Socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor)

    def close(self) -> None:
        """Who has not been served yet sees the connection closed; the file goes if it is still ours."""
        with suppress(OSError):
            if _identity(self._path) == self._identity:
                os.unlink(self._path)
        # accept(2) returns in every thread; a close alone would leave them waiting.
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _require_free(path: str) -> None:
    """Raise OSError if another process listens at `path`, or something other than a socket is there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError("there is something that is no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return  # left by one that was killed
        except BlockingIOError:
            pass  # it listens, and has much to do
    raise OSError("another process listens there; stop it, or give this flanneld its own --cni-socket")


def receive_head(connection: Socket, passed: Passed, deadline: float) -> bytearray:
    """The header and what came with it, nothing from one who closed at once; raises WireError or OSError."""
    data = bytearray()
    while len(data) < cniwire.HEADER_BYTES:
        _limit(connection, socket.SO_RCVTIMEO, deadline)
        chunk, ancillary, flags, _ = connection.recvmsg(_CHUNK_BYTES, _ANCILLARY_BYTES, _CLOEXEC)
        passed.adopt(ancillary)
        if flags & _TRUNCATED:
            raise WireError("it came with more descriptors than there are, or than we may open")
        if not chunk and not data:
            return data
        if not chunk:
            raise WireError(f"it ends after {len(data)} bytes")
        data += chunk
    return data


def receive_rest(connection: Socket, data: bytearray, total: int, deadline: float) -> None:
    """Add to `data` what is missing; raises WireError or OSError."""
    while len(data) < total:
        _limit(connection, socket.SO_RCVTIMEO, deadline)
        # Descriptors that came with these bytes are dropped by the kernel, as no room is given for them.
        chunk = connection.recv(min(_CHUNK_BYTES, total - len(data)))
        if not chunk:
            raise WireError(f"it ends after {len(data)} of {total} bytes")
        data += chunk
    if len(data) > total:
        raise WireError(f"it is longer than the {total} bytes that it announces")


def _limit(connection: Socket, option: int, deadline: float) -> None:
    """Let the next call wait until the deadline, to raise BlockingIOError then; TimeoutError if that is over.

    Python's own way, settimeout, takes two system calls more.
    """
    left_us = int((deadline - time.monotonic()) * 1e6)
    if left_us <= 0:
        raise TimeoutError
    connection.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(left_us, 1_000_000)))


def send(connection: Socket, reply: bytes) -> bool:
    """Whether the other end was still there to take the reply."""
    try:
        sent = connection.send(reply, _AT_ONCE)
        if sent == len(reply):
            return True
        rest = memoryview(reply)[sent:]
        deadline = time.monotonic() + _REPLY_S
        while rest:
            _limit(connection, socket.SO_SNDTIMEO, deadline)
            rest = rest[connection.send(rest) :]
    except OSError:
        return False
    return True


def _end_of_input(connection: Socket) -> None:
    with suppress(OSError):  # the other end has gone
        connection.shutdown(socket.SHUT_RD)
