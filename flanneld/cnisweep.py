"""Removes firewall entries of pods whose link is gone, however it went.

Our own DEL takes its entries with it. Others do not know of them: a DEL by upstream's plugins, a namespace
that was removed without any DEL, a runtime that crashed. An entry that outlives its pod would act on the next
one that gets the address, so each names the host's end of its pod's link, and goes when that does.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from threading import Event, Thread

from cni.errors import KernelError, NetworkError
from cni.local import LocalHost
from cni.net import bpf, rtlink
from cni.plugins import macspoof, masq, portmap
from cni.plugins.links import find
from flanneld.log import OncePerChange, logger

_RTMGRP_LINK = 1
_RECEIVE_BYTES = 1 << 18
# Links come and go by the dozen; and a DEL of ours is given the time to finish by itself.
_SETTLE_S = 0.5
_JOIN_S = 5.0


class Sweeper:
    """A thread that sweeps at the start and after links have gone. Raises KernelError without a socket.

    What masquerading needs in any case goes at the start alone, if no pod needs it.
    """

    def __init__(self) -> None:
        try:
            kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
            # The end of links alone: who is woken for more keeps the thread that adds a pod from going on.
            bpf.attach(self._socket, bpf.of_type(rtlink.RTM_DELLINK))
            self._socket.bind((0, _RTMGRP_LINK))
        except OSError as exc:
            raise KernelError(f"cannot hear of links that go: {exc.strerror}") from exc
        self._host = LocalHost(lambda text: logger.info("%s", text), {})
        self._failures = OncePerChange()
        self._stop = Event()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        self._thread = Thread(target=self._run, name="cni-sweep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        os.write(self._wake_write, b"\0")
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            logger.warning("The sweep of the firewall does not end; it is left behind")
            return
        self._socket.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        gone = is_first = True
        while not self._stop.is_set():
            if gone:
                is_first = not self._sweep(keep_sets=not is_first) and is_first
            poll.poll()
            self._stop.wait(_SETTLE_S)
            gone = self._hear()

    def _hear(self) -> bool:
        """Take in what has arrived; whether a link has gone, or may have."""
        gone = False
        while True:
            try:
                self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return gone
            except OSError as exc:
                if exc.errno != errno.ENOBUFS:
                    raise
            gone = True  # or: some messages were lost

    def _sweep(self, *, keep_sets: bool) -> bool:
        """Whether it could be done."""
        try:
            dropped = masq.sweep(self._host, self._is_there, keep_sets=keep_sets)
            dropped += sum(plugin.sweep(self._host, self._is_there) for plugin in (macspoof, portmap))
        except NetworkError as exc:
            self._failures.trouble(f"Firewall entries of pods that are gone may stay: {exc}")
            return False
        self._failures.over("Firewall entries of pods that are gone can be dropped again")
        if dropped:
            logger.info("Dropped %d firewall entries of pods that are gone", dropped)
        return True

    def _is_there(self, link: str) -> bool:
        return find(self._host.route, link) is not None
