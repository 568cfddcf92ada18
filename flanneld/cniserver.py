"""Serves calls of the CNI plugin: the daemon's end of the warm path.

The plugin's shim connects for each call, hands over what the daemon could not open by itself, and prints what
comes back. Whatever goes wrong before a call is begun is answered with "declined" or a closed connection, and
the plugin carries it out in its own process.

Decision: threads that block in accept(2), no event loop. The kernel wakes one for each call, so that nothing
stands between a call and the thread that serves it; and netlink answers within the system call that asks.
A few do, as one at a time runs Python, and more would only take turns. There are more of them when all have
been waiting for something: another process's lock on a store, or a client that sends nothing.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import socket
import struct
import sys
import time
from _socket import socket as Socket
from contextlib import closing
from threading import Event, Lock, Thread, current_thread
from typing import TYPE_CHECKING

from cni.errors import INTERNAL, ConfigError, Declined
from cni.handler import Response, handle
from cni.plugins import registry
from cni.spec import gojson
from cni.spec.request import Request
from flanneld import cniwire, metrics, rootfiles
from flanneld.cnihost import Passed, Shared, Sockets, WarmHost, identity
from flanneld.cnisocket import Place, Reading, receive_head, receive_rest, send
from flanneld.cniwire import Header, WireError
from flanneld.log import V2, logger
from flanneld.precedence import Precedence

if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.handler import Plugin
    from cni.host import Host

    Find = Callable[[str], Callable[[Host], Plugin] | None]

_FEW_WORKERS, _MOST_WORKERS = 4, 16
_STUCK_S = 0.01  # a call takes 2 ms
_REQUEST_S, _STOP_S = 10.0, 10.0
_SELDOM_S = 60.0
# Who waits for a turn is told that it was in vain once he has given up by himself, and no sooner: he would go
# and do it, beside the one whose turn it still is.
_LONGER_S = 1.0
_PAUSE_S = 0.1  # after accept(2) failed, for want of descriptors
# Python's own 5 ms are how long a thread that computes may keep another from going on. A call does some
# eighty system calls, after each of which it would wait that long while thousands of peers are programmed.
_SWITCH_S = 0.00005
# Python looks through everything, for what only refers to itself, when there is a quarter more of it: a few
# times at a start with thousands of peers, 30 ms each in which no other thread goes on. Neither peers nor
# pods leave anything of that kind, so seldom is enough here; at what is new it looks as often as ever.
_FULL_COLLECTION = 100  # for as many collections of the middle kind; Python's own number is 10
# glibc gives each thread that finds its memory in use by another an arena of its own, 8 for each processor in
# all, and none is ever given back. One thread at a time runs Python: two arenas do for fifty threads.
_M_ARENA_MAX, _ARENAS = -8, 2  # malloc.h


class Call:
    """One request as it came. `received_s` is the monotonic clock's."""

    __slots__ = ("environment", "name", "netns_error", "patience_s", "received_s", "stdin")

    def __init__(self, header: Header, data: bytes) -> None:
        """Raises WireError."""
        self.name, self.environment, self.stdin = header.texts(data)
        self.netns_error = header.netns_error
        self.patience_s = header.patience_ms / 1000
        self.received_s = time.monotonic()

    @property
    def command(self) -> str:
        return self.environment.get("CNI_COMMAND", "")

    @property
    def container_id(self) -> str:
        return self.environment.get("CNI_CONTAINERID", "")


class CniServer:
    """Serves from construction to `close`; raises ConfigError when the socket cannot be made.

    `find` gives the plugin for a name. `precedence` hears of each call.
    """

    def __init__(self, path: str, find: Find = registry.find, precedence: Precedence | None = None) -> None:
        if not rootfiles.supported():
            raise ConfigError("the kernel has no openat2 (Linux 5.6), or a filter of system calls forbids it")
        self._find = find
        self._precedence = precedence or Precedence()
        metrics.CNI_IN_FLIGHT.set_function(self._precedence.calls)
        self._own_netns = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._own_identity = identity(self._own_netns)
        try:
            self._place = Place(path)
        except OSError as exc:
            os.close(self._own_netns)
            reason = f"{exc.strerror}: {exc.filename}" if exc.filename else exc.strerror or exc
            raise ConfigError(f"cannot make --cni-socket={path}: {reason}") from None
        for name in registry.NAMES:
            find(name)  # imported now, not while the first pod waits
        sys.setswitchinterval(_SWITCH_S)
        gc.set_threshold(*gc.get_threshold()[:2], _FULL_COLLECTION)
        _limit_arenas()
        self._shared = Shared()
        self._turns = Turns()
        self._stopping = Event()
        self._reading = Reading()
        self._refused, self._broken, self._failing = Seldom(), Seldom(), Seldom()
        self._mutex = Lock()
        self._workers: set[Thread] = set()
        self._idle = self._accepted = 0
        self._all_busy = Event()
        for _ in range(_FEW_WORKERS):
            self._hire()
        self._foreman = Thread(target=self._oversee, name="cni-foreman", daemon=True)
        self._foreman.start()
        logger.info("Serving CNI calls at %s", path)

    def close(self) -> None:
        """Take no further call, and wait for those that are being served; 10 seconds at most."""
        deadline = time.monotonic() + _STOP_S
        self._stopping.set()
        self._place.close()
        self._reading.stop()
        self._all_busy.set()
        self._foreman.join()
        workers = list(self._workers)
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        left = sum(worker.is_alive() for worker in workers)
        if left:
            logger.warning(
                "%d CNI calls are not done after %.0f s; the plugin will see to them", left, _STOP_S
            )
            return
        self._shared.close()
        os.close(self._own_netns)

    def _hire(self) -> None:
        """Start another thread, if the system has one to give."""
        worker = Thread(target=self._work, name="cni", daemon=True)
        with self._mutex:
            try:
                worker.start()
            except RuntimeError as exc:
                self._failing.warn("Cannot start a thread for CNI calls: %s", exc)
                return
            self._workers.add(worker)
            self._idle += 1

    def _oversee(self) -> None:
        """Start more threads while all are busy and none gets done."""
        while not self._stopping.is_set():
            self._all_busy.wait()
            before = self._accepted
            self._stopping.wait(_STUCK_S)
            with self._mutex:
                if self._idle:
                    self._all_busy.clear()
                    continue
                is_stuck = self._accepted == before and len(self._workers) < _MOST_WORKERS
            if is_stuck and not self._stopping.is_set():
                self._hire()

    def _work(self) -> None:
        with Sockets() as sockets:
            while (connection := self._accept()) is not None:
                with self._mutex:
                    self._accepted += 1
                    self._idle -= 1
                    if not self._idle:
                        self._all_busy.set()
                try:
                    with self._precedence:
                        self._serve(connection, sockets)
                except Exception:  # noqa: BLE001 - our bug must cost one call, not the thread
                    logger.exception("A CNI call failed in the daemon itself")
                finally:
                    connection.close()
                with self._mutex:
                    if self._idle and len(self._workers) > _FEW_WORKERS and not self._stopping.is_set():
                        self._workers.remove(current_thread())
                        return
                    self._idle += 1

    def _accept(self) -> Socket | None:
        """The next connection, None at the end."""
        while not self._stopping.is_set():
            try:
                return self._place.accept()
            except OSError as exc:
                if not self._stopping.is_set():
                    self._failing.warn("Cannot accept CNI calls: %s", exc)
                    self._stopping.wait(_PAUSE_S)
        return None

    def _serve(self, connection: Socket, sockets: Sockets) -> None:
        """From request to reply; whatever the runtime need not wait for comes after that."""
        if not self._is_root(connection):
            return
        with Passed() as passed:
            try:
                call = self._receive(connection, passed)
            except (WireError, OSError) as exc:
                metrics.cni_broken()
                self._broken.warn("A request for the CNI plugin is refused: %s", exc)
                send(connection, cniwire.HELLO + cniwire.declined())
                return
            if call is None or not send(connection, cniwire.HELLO):
                return  # it has found another way meanwhile
            netns = call.environment.get("CNI_NETNS", "")
            # One at a time of a container, with what comes after the answer.
            with (
                self._turns.of(call.container_id, call.patience_s, lambda: not _has_gone(connection)) as ours,
                closing(WarmHost(self._shared, sockets, passed, netns, call.netns_error)) as host,
            ):
                reply, outcome = self._carry_out(call, passed, host, ours)
                heard = send(connection, reply)
                took_s = time.monotonic() - call.received_s
        metrics.cni_served(call.name, call.command, outcome, took_s)
        _log(call, outcome, took_s, heard)

    def _is_root(self, connection: Socket) -> bool:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _gid = struct.unpack("=iII", raw)
        if uid == 0:
            return True
        self._refused.warn("PID %d of user %d may not call the CNI plugin here: only root may", pid, uid)
        return False

    def _receive(self, connection: Socket, passed: Passed) -> Call | None:
        """The whole request, None from one who only looked in; raises WireError or OSError."""
        deadline = time.monotonic() + _REQUEST_S
        self._reading.begin(connection)
        try:
            data = receive_head(connection, passed, deadline)
            if not data:
                return None
            header = Header(data)
            passed.name(header.descriptors, self._own_identity)
            receive_rest(connection, data, header.total_bytes, deadline)
        except ConnectionResetError:
            return None  # it has found another way meanwhile
        except (BlockingIOError, TimeoutError):
            raise WireError("it did not arrive in time") from None
        finally:
            self._reading.end(connection)
        return Call(header, bytes(data))

    def _carry_out(self, call: Call, passed: Passed, host: WarmHost, ours: bool) -> tuple[bytes, str | int]:
        """The reply, and the outcome for the statistics. `ours`: its turn has come."""
        try:
            response = self._response(call, passed, host, ours)
        except Declined as exc:
            logger.log(V2, "CNI %s of %s is left to the plugin: %s", *_called(call), exc)
            return cniwire.declined(), "declined"
        stderr = response.stderr.encode("utf-8", "replace")
        return cniwire.answer(response.exit_code, response.stdout, stderr), _outcome(response)

    def _response(self, call: Call, passed: Passed, host: WarmHost, ours: bool) -> Response:
        """What the plugin says; raises Declined if it was not begun."""
        if passed.identity(cniwire.OWN) != self._own_identity:
            raise Declined("the runtime lives in another network namespace than flanneld")
        make = self._find(call.name)
        if make is None:
            raise Declined("there is no such plugin")
        if not ours:
            raise Declined("the runtime has given up waiting")
        if self._stopping.is_set():
            raise Declined("flanneld stops")
        return handle(Request(call.environment, call.stdin, self._load), make(host))

    def _load(self, stdin: bytes) -> gojson.Object:
        return self._shared.memo.known(gojson.load_object, stdin)


def _limit_arenas() -> None:
    """For the whole process; without effect where malloc is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


class Seldom:
    """Says the same kind of thing once a minute, however often it happens."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def warn(self, text: str, *arguments: object) -> None:
        """Log a warning, unless one was logged within the last minute."""
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + _SELDOM_S
            logger.warning(text, *arguments)


class Turns:
    """One at a time of each key, any number of keys. Nothing is kept of a key that nobody asks for."""

    def __init__(self) -> None:
        self._mutex = Lock()
        self._waiting: dict[str, tuple[Lock, int]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def of(self, key: str, patience_s: float, is_wanted: Callable[[], bool]) -> _Turn:
        """Wait for one's turn: False if it has not come in time, or is not wanted when it comes.

        In time is a little later than `patience_s`. No key, no waiting.
        """
        return _Turn(self, key, patience_s, is_wanted)

    def line_up(self, key: str) -> Lock:
        """The lock of a key; `leave` must follow."""
        with self._mutex:
            lock, users = self._waiting.get(key) or (Lock(), 0)
            self._waiting[key] = lock, users + 1
        return lock

    def leave(self, key: str) -> None:
        with self._mutex:
            lock, users = self._waiting.pop(key)
            if users > 1:
                self._waiting[key] = lock, users - 1


class _Turn:
    """See `Turns.of`. (Written out, as each call waits for what a generator takes.)"""

    __slots__ = ("_is_wanted", "_key", "_lock", "_ours", "_patience_s", "_turns")

    def __init__(self, turns: Turns, key: str, patience_s: float, is_wanted: Callable[[], bool]) -> None:
        self._turns = turns
        self._key = key
        self._patience_s = patience_s
        self._is_wanted = is_wanted
        self._ours = False

    def __enter__(self) -> bool:
        if not self._key:
            return True
        self._lock = self._turns.line_up(self._key)
        self._ours = self._lock.acquire(blocking=False)
        if self._ours:
            return True
        try:
            self._ours = self._lock.acquire(timeout=self._patience_s + _LONGER_S)
            return self._ours and self._is_wanted()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_exc: object) -> None:
        if self._ours:
            self._lock.release()
        if self._key:
            self._turns.leave(self._key)


def _has_gone(connection: Socket) -> bool:
    poll = select.poll()
    poll.register(connection, 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))


def _outcome(response: Response) -> str | int:
    if not response.exit_code:
        return "ok"
    try:
        return gojson.integer(gojson.load_object(response.stdout), "code", INTERNAL, 0, 2**32 - 1) or INTERNAL
    except gojson.GoJsonError:
        return INTERNAL


def _called(call: Call) -> tuple[str, str]:
    """Command and plugin, container and interface, fit for one line of a log."""
    environment = call.environment
    what = f"{call.command} {call.name}"
    who = f"{call.container_id} {environment.get('CNI_IFNAME', '')}"
    return json.dumps(what)[1:-1], json.dumps(who)[1:-1]


def _log(call: Call, outcome: str | int, took_s: float, heard: bool) -> None:
    if not heard:
        logger.info("CNI %s of %s: the runtime did not wait for the answer (%s)", *_called(call), outcome)
    elif isinstance(outcome, int):
        logger.info("CNI %s of %s failed with code %d", *_called(call), outcome)
    elif logger.isEnabledFor(V2):
        logger.log(V2, "CNI %s of %s: %s after %.1f ms", *_called(call), outcome, took_s * 1000)
