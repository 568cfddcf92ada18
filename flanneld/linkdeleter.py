"""Deleting a link without waiting for the kernel's tidying up.

RTM_DELLINK returns 16 to 20 ms later than the link is gone: the kernel waits for all processors to let go of
its memory (rcu_barrier). The notification of the deletion, which the sender asks for with NLM_F_ECHO, comes
after 0.8 ms. So one thread sends and is held up, and the one that serves the pod reads.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import time
from concurrent.futures import Executor, Future

from cni.errors import KernelError
from cni.net import nlmsg

_RTM_DELLINK, _IFLA_IFNAME = 17, 3
_IFINFO_BYTES = 16
_LONGEST_S, _LOOK_MS = 10.0, 100
_RECEIVE_BYTES = 1 << 16
# Above what `cni.net.nlsocket` counts, so that it passes over an acknowledgement that comes late.
_FIRST_SEQUENCE, _SEQUENCES = 1 << 31, 1 << 30


class LinkDeleter:
    """Usable from any thread. `held_up` are the threads that send, and wait for the kernel."""

    def __init__(self, held_up: Executor) -> None:
        self._held_up = held_up
        self._numbers = itertools.count()

    def delete(self, descriptor: int, name: str) -> int:
        """Delete a link in the namespace of a route netlink socket, which nobody else reads meanwhile.

        Returns the errno as soon as the link cannot be seen any more (0), or the kernel refused; raises
        KernelError when the socket fails, or nothing is heard.
        """
        sequence = _FIRST_SEQUENCE + next(self._numbers) % _SEQUENCES
        body = bytes(_IFINFO_BYTES) + nlmsg.attr(_IFLA_IFNAME, os.fsencode(name) + b"\0")
        request = nlmsg.message(_RTM_DELLINK, nlmsg.NLM_F_ACK | nlmsg.NLM_F_ECHO, sequence, body)
        # A descriptor of its own: ours may be closed, and its number used anew, while the thread still sends.
        sent = self._held_up.submit(_send, os.dup(descriptor), request)
        try:
            return _outcome(descriptor, sequence, sent)
        except OSError as exc:
            raise KernelError(f"cannot delete link {name}: {exc.strerror}") from None


def _send(descriptor: int, request: bytes) -> None:
    try:
        os.write(descriptor, request)
    finally:
        os.close(descriptor)


def _outcome(descriptor: int, sequence: int, sent: Future[None]) -> int:
    deadline = time.monotonic() + _LONGEST_S
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while time.monotonic() < deadline:
        if not poll.poll(_LOOK_MS):
            if sent.done() and not poll.poll(0):
                sent.result()
            continue
        for message in nlmsg.messages(os.read(descriptor, _RECEIVE_BYTES)):
            if message.seq != sequence:
                continue
            if message.kind == nlmsg.NLMSG_ERROR:
                return nlmsg.error(message)[0]
            if message.kind == _RTM_DELLINK:
                return 0
    raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
