"""The loop between the guest's link and `launcher.host`, without privileges once its sockets are open."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import time
from threading import Event

from cni.errors import KernelError
from launcher.host import Frame, Host, Note
from launcher.log import logger

_ETH_P_ALL = 0x0003
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
_SO_ATTACH_FILTER = 26
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522
_LINKS = 1  # RTMGRP_LINK, linux/rtnetlink.h
_FRAME_BYTES = 65536
_BATCH = 64

# Keeps all but ARP, UDP to ports 67 and 547, and ICMPv6 out of this process, in the kernel: the machine's own
# traffic with the pod passes by this socket. Classic BPF: operation, jump if true, jump if false, operand.
_LOAD_HALF, _LOAD_BYTE, _LOAD_HALF_BEHIND_HEADER, _IP_HEADER = 0x28, 0x30, 0x48, 0xB1
_IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x15, 0x45, 0x06
_FILTER = (
    (_LOAD_HALF, 0, 0, 12),
    (_IF_EQUAL, 14, 0, 0x0806),  # ARP: keep
    (_IF_EQUAL, 0, 7, 0x0800),  # not IPv4: go to IPv6
    (_LOAD_BYTE, 0, 0, 23),
    (_IF_EQUAL, 0, 12, 17),  # not UDP: drop
    (_LOAD_HALF, 0, 0, 20),
    (_IF_ANY_BIT, 10, 0, 0x1FFF),  # a later fragment: drop
    (_IP_HEADER, 0, 0, 14),
    (_LOAD_HALF_BEHIND_HEADER, 0, 0, 16),
    (_IF_EQUAL, 6, 7, 67),
    (_IF_EQUAL, 0, 6, 0x86DD),  # not IPv6: drop
    (_LOAD_BYTE, 0, 0, 20),
    (_IF_EQUAL, 3, 0, 58),  # ICMPv6: keep
    (_IF_EQUAL, 0, 3, 17),
    (_LOAD_HALF, 0, 0, 56),
    (_IF_EQUAL, 0, 1, 547),
    (_RETURN, 0, 0, _FRAME_BYTES),
    (_RETURN, 0, 0, 0),
)


class Sockets:
    """The guest's tap, and the bridge towards the pod's network.

    On the tap we hear all that the guest says, a renewal that it sends to its gateway included, and talk to
    the guest alone; on the bridge we look for the gateway. Where the kernel has the server's address, a
    socket that nobody reads keeps it from answering renewals with "port unreachable".
    """

    def __init__(self, bridge: str, tap: str, kernel_has_address: bool) -> None:
        """Raises KernelError when a link is missing or a capability is."""
        try:
            self.tap = _packet_socket(tap)
            self.bridge = _packet_socket(bridge)
            self._sink = _sink(bridge) if kernel_has_address else None
            self.news = _news_of_links()
        except OSError as exc:
            hint = "run prepare first"
            if exc.errno in (errno.EPERM, errno.EACCES):
                hint = "it needs CAP_NET_RAW and CAP_NET_BIND_SERVICE"
            raise KernelError(f"cannot listen on {tap} and {bridge}: {exc.strerror}; {hint}") from exc

    def require_links(self) -> None:
        """Raise KernelError if the tap or the bridge is gone: it has no name any more."""
        for sock, what in ((self.tap, "guest's link"), (self.bridge, "bridge")):
            if not sock.getsockname()[0]:
                raise KernelError(f"the {what} is gone; run prepare again")

    def send(self, frame: Frame) -> None:
        """Send or drop: a guest that is not there yet asks again."""
        with contextlib.suppress(OSError):
            (self.tap if frame.to_guest else self.bridge).send(frame.data)


def _packet_socket(link: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        program = b"".join(struct.pack("=HBBI", *step) for step in _FILTER)
        buffer = ctypes.create_string_buffer(program, len(program))
        head = struct.pack("@HP", len(_FILTER), ctypes.addressof(buffer))
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, head)
        # What the guest is sent is not even copied for us.
        sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        sock.bind((link, _ETH_P_ALL))
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _sink(bridge: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, bridge.encode() + b"\0")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        sock.bind(("0.0.0.0", 67))  # noqa: S104 - of this one link
    except OSError:
        sock.close()
        raise
    return sock


def _news_of_links() -> socket.socket:
    """A socket that has something to read whenever a link of the namespace changes, or goes."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        sock.bind((0, _LINKS))
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def drop_privileges(user: int) -> None:
    """Become `user` for good: no groups, no capabilities, no way back through exec. Raises KernelError."""
    try:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
        libc = ctypes.CDLL(None, use_errno=True)
        # Also those of a user that was given some by its container, and of root where it stays root.
        header, none = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
        refused = libc.capset(header, none) or libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    except OSError as exc:
        raise KernelError(f"cannot become user {user}: {exc.strerror}") from exc
    if refused:
        raise KernelError(
            f"cannot give up capabilities and new privileges: {os.strerror(ctypes.get_errno())}"
        )


class Wake:
    """Lets a signal handler end a `select`."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.stop = Event()

    def __call__(self, _number: int, _frame: object) -> None:
        self.stop.set()
        with contextlib.suppress(OSError):
            os.write(self.write_end, b"\0")


def serve(host: Host, sockets: Sockets, wake: Wake) -> None:
    """Answer until `wake`. A frame that cannot be sent is dropped; the guest's link going away ends it.

    The guest is not told of the end: its router is the pod's gateway or the kernel, and both go on.
    """
    descriptors = [sockets.tap.fileno(), sockets.bridge.fileno(), sockets.news.fileno(), wake.read_end]
    while not wake.stop.is_set():
        due = host.due()
        timeout = None if due is None else max(0.0, due - time.monotonic())
        ready, _, _ = select.select(descriptors, [], [], timeout)
        for frame in host.tick(time.monotonic()):
            sockets.send(frame)
        for sock in (sockets.tap, sockets.bridge):
            if sock.fileno() in ready:
                _drain(host, sockets, sock)
        if sockets.news.fileno() in ready:
            _hear_news(sockets)


def _drain(host: Host, sockets: Sockets, sock: socket.socket) -> None:
    for _ in range(_BATCH):
        try:
            data = sock.recv(_FRAME_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            # A link that is down is still bound to, and comes back or goes: its socket says no more of that.
            if exc.errno not in (errno.ENETDOWN, errno.ENOBUFS):
                raise KernelError(f"cannot receive from {sock.getsockname()[0]}: {exc.strerror}") from exc
            sockets.require_links()
            return
        for answer in host.receive(data, time.monotonic(), from_guest=sock is sockets.tap):
            if isinstance(answer, Note):
                (logger.warning if answer.warning else logger.info)("%s", answer.text)
            else:
                sockets.send(answer)


def _hear_news(sockets: Sockets) -> None:
    """That there was a change is all that is asked; raises KernelError if one of the links is gone."""
    for _ in range(_BATCH):
        try:
            sockets.news.recv(_FRAME_BYTES)
        except BlockingIOError:
            break
        except OSError as exc:
            if exc.errno != errno.ENOBUFS:  # else: there was more than the kernel kept
                raise KernelError(f"cannot hear of links: {exc.strerror}") from exc
    sockets.require_links()
