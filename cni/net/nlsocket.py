"""A netlink socket: requests in one system call, their answers in order.

The kernel carries out what is sent before `send` returns, so that nothing here waits: the answers are there.

Decision: `_socket`, the C half of the standard module. `import socket` takes 4 ms of the CNI plugin's cold
start, for enumerations that are not needed here.
"""

from __future__ import annotations

import os
from _socket import socket as Socket

from cni.errors import KernelError
from cni.net import nlmsg
from cni.net.nlmsg import NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from cni.net.nlmsg import Request

_AF_NETLINK, _SOCK_RAW, _SOCK_CLOEXEC = 16, 3, 0o2000000
ROUTE, NETFILTER = 0, 12  # protocols
_SOL_NETLINK, _CAP_ACK, _EXT_ACK, _STRICT = 270, 10, 11, 12
_SOL_SOCKET, _SEND_BUFFER, _SEND_BUFFER_FORCE = 1, 7, 32
_MESSAGE_TOO_LONG = 90  # EMSGSIZE
_RECEIVE_BYTES, _LEFT_OVER_BYTES = 1 << 18, 1 << 15
_MSG_DONTWAIT, _ENOBUFS = 0x40, 105
_KIND_OF_REQUEST, _GET = 3, 2  # of route netlink: the last two bits of a type
_NO_SUCH_PROTOCOL = (93, 94, 97)  # EPROTONOSUPPORT, ESOCKTNOSUPPORT, EAFNOSUPPORT
_MAX_INTERRUPTED_DUMPS = 20


class ProtocolMissing(KernelError):
    """The kernel has no such netlink protocol, and nothing that is reached by it."""


class Answer:
    """How a request ended: errno (0: carried out), and the messages that came besides."""

    __slots__ = ("_refusal", "errno", "messages")

    def __init__(self) -> None:
        self._refusal: Message | None = None
        self.errno = 0
        self.messages: list[Message] = []

    def end(self, message: Message) -> None:
        """Take an NLMSG_ERROR; of several that the kernel sends the first that is a refusal counts."""
        if not self.errno:
            self._refusal, self.errno = message, nlmsg.error_number(message)

    @property
    def text(self) -> str:
        """The kernel's own words."""
        return "" if self._refusal is None else nlmsg.error_text(self._refusal)

    @property
    def reason(self) -> str:
        """Why the kernel refused, in words."""
        why = os.strerror(self.errno).lower()
        return f"{why} ({self.text})" if self.text else why


class NetlinkSocket:
    """Not to be shared between threads. Methods raise KernelError when the socket itself fails.

    `descriptor` is a netlink socket that somebody else opened, perhaps in another network namespace, to
    which it belongs wherever it is used; it is closed with this object. Without it a socket of the calling
    thread's namespace is opened.
    """

    __slots__ = ("_is_route", "_is_strict", "_sequence", "_socket")

    def __init__(self, protocol: int, descriptor: int | None = None) -> None:
        try:
            self._socket = Socket(_AF_NETLINK, _SOCK_RAW | _SOCK_CLOEXEC, protocol, descriptor)
        except OSError as exc:
            kind = ProtocolMissing if exc.errno in _NO_SUCH_PROTOCOL else KernelError
            raise kind(f"cannot open a netlink socket: {exc.strerror}") from None
        self._is_route = protocol == ROUTE
        self._sequence = 0
        self._is_strict = False
        self._set(_CAP_ACK)
        self._set(_EXT_ACK)

    def _set(self, option: int) -> None:
        try:
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        except OSError:
            return  # an older kernel: more is sent to us, and is passed over

    def start_afresh(self) -> None:
        """Who had the socket before may have left answers unread, to numbers that we would use as well."""
        self._sequence = int.from_bytes(os.urandom(3), "big")
        while True:
            try:
                self._socket.recv(_LEFT_OVER_BYTES, _MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno != _ENOBUFS:  # else: more was left than the kernel kept
                    raise KernelError(f"cannot receive from the kernel: {exc.strerror}") from None

    def close(self) -> None:
        self._socket.close()

    def transact(self, requests: Sequence[Request]) -> list[Answer]:
        """Send all, then read one answer for each. A request that is refused does not keep back the next.

        Refusals are always told, in the order of the requests. So the last request alone asks for an
        acknowledgement: what is not refused by then was carried out. A question of route netlink needs none,
        its answer comes as a message.
        """
        if not requests:
            return []
        first = self._sequence + 1
        self._sequence = last = self._sequence + len(requests)
        is_question = self._is_route and requests[-1][0] & _KIND_OF_REQUEST == _GET
        acknowledged = 0 if is_question else last
        data = [
            nlmsg.message(kind, flags | NLM_F_ACK if seq == acknowledged else flags, seq, body)
            for seq, (kind, flags, body) in enumerate(requests, first)
        ]
        self._send(b"".join(data))
        answers = [Answer() for _ in requests]
        is_over = False
        while not is_over:
            for message in nlmsg.messages(self._receive()):
                if not first <= message.seq <= last:
                    continue
                answer = answers[message.seq - first]
                if message.kind != NLMSG_ERROR:
                    answer.messages.append(message)
                    is_over |= is_question and message.seq == last
                    continue
                answer.end(message)
                is_over |= message.seq == last
        return answers

    def request(self, kind: int, flags: int, body: bytes) -> Answer:
        """`transact` for one."""
        return self.transact([(kind, flags, body)])[0]

    def batch(self, begin: Request, requests: Sequence[Request], end: Request) -> list[tuple[int, Answer]]:
        """Send requests that are carried out together or not at all, between the messages that say so.

        Answers by place: 0 is the batch as a whole, the requests are counted from 1. Only the last request
        asks for an acknowledgement, which the kernel sends behind all refusals; of the messages around the
        requests new kernels alone send one (linux/netfilter/nfnetlink.h).
        """
        first = self._sequence + 1
        last = first + len(requests)
        self._sequence = last + 1
        data = [nlmsg.message(begin[0], begin[1], first, begin[2])]
        for seq, (kind, flags, body) in enumerate(requests, first + 1):
            data.append(nlmsg.message(kind, flags | (NLM_F_ACK if seq == last else 0), seq, body))
        data.append(nlmsg.message(end[0], end[1], last + 1, end[2]))
        self._send(b"".join(data))
        found: list[tuple[int, Answer]] = []
        while not (found and found[-1][0] in (0, len(requests))):
            for message in nlmsg.messages(self._receive()):
                place = message.seq - first
                if message.kind == NLMSG_ERROR and 0 <= place <= len(requests):
                    answer = Answer()
                    answer.end(message)
                    found.append((place, answer))
        return found

    def dump(self, kind: int, body: bytes) -> list[Message]:
        """A whole table; one that changed while it was read is read again. Raises KernelError."""
        if not self._is_strict:  # dumps alone are filtered by what the request says
            self._is_strict = True
            self._set(_STRICT)
        for _attempt in range(_MAX_INTERRUPTED_DUMPS):
            self._sequence += 1
            self._send(nlmsg.message(kind, NLM_F_DUMP, self._sequence, body))
            found: list[Message] = []
            while not (found and found[-1].kind in (NLMSG_DONE, NLMSG_ERROR)):
                found += [m for m in nlmsg.messages(self._receive()) if m.seq == self._sequence]
            last = found.pop()
            if last.kind == NLMSG_ERROR:
                code, text = nlmsg.error(last)
                raise KernelError(f"cannot read kernel table {kind}: {text or os.strerror(code)}")
            if not any(message.flags & NLM_F_DUMP_INTR for message in (*found, last)):
                return found
        raise KernelError(f"kernel table {kind} changes faster than it can be read")

    def _send(self, data: bytes) -> None:
        try:
            try:
                self._socket.send(data)
            except OSError as exc:
                if exc.errno != _MESSAGE_TOO_LONG:
                    raise
                self._make_room(len(data))
                self._socket.send(data)
        except OSError as exc:
            raise KernelError(f"cannot send to the kernel: {exc.strerror}") from None

    def _make_room(self, size: int) -> None:
        """Let that much be sent at once, or as much of it as we may; the kernel takes twice the number."""
        try:
            self._socket.setsockopt(_SOL_SOCKET, _SEND_BUFFER_FORCE, size)
        except PermissionError:
            self._socket.setsockopt(_SOL_SOCKET, _SEND_BUFFER, size)

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE_BYTES)
        except OSError as exc:
            raise KernelError(f"cannot receive from the kernel: {exc.strerror}") from None
