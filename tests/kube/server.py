"""The HTTPS server: connections, faults, chunked answers and watches, over `api.Api`.

One thread serves one connection. HTTP/1.1 with keep-alive; answers of more than 2 kB are chunked, as
Go's are, lists of more than 128 KiB compressed if the client takes gzip.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from itertools import chain, islice
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.kube import status
from tests.kube.api import Answer, Api, Refusal, Request, Stream, classify, refusal
from tests.kube.faults import DROP, GONE, REFUSE, RESET, SLOW, STALL, Fault, Faults
from tests.kube.schema import encode
from tests.kube.status import ApiFailure

GZIP_FROM_BYTES = 128 * 1024
CHUNK_FROM_BYTES = 2048
HANDSHAKE_S = 10.0
BOOKMARK_BEFORE_END_S = 2.0
LINES_AT_ONCE = 100
STALLED_S = 3600.0  # it is woken when the stall ends
PRETTY_AGENTS = ("curl", "Wget", "Mozilla/5.0")


class Broken(Exception):
    """The connection is to end here: closed, or (`reset`) with a reset."""

    def __init__(self, reset: bool = False) -> None:
        super().__init__("reset" if reset else "closed")
        self.reset = reset


class Server(socketserver.ThreadingTCPServer):
    """Listens on `address`; port 0 takes a free one. `contexts` are the true and the wrong certificate."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(
        self,
        address: tuple[str, int],
        contexts: tuple[ssl.SSLContext, ssl.SSLContext],
        api: Api,
        bookmark_s: float,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Connection)
        self.api = api
        self.faults = Faults(api.store.wake_watches)
        self.bookmark_s = bookmark_s
        self.bookmark_round = 0
        self.wrong_ca = False
        self.stopping = False
        self._contexts = contexts
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def secure(self, raw: socket.socket) -> ssl.SSLSocket:
        """TLS on a new connection, with the certificate of the moment."""
        raw.settimeout(HANDSHAKE_S)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secured = self._contexts[self.wrong_ca].wrap_socket(raw, server_side=True)
        secured.settimeout(None)
        with self._lock:
            self._open.add(secured)
        return secured

    def forget(self, secured: socket.socket) -> None:
        with self._lock:
            self._open.discard(secured)

    def close_connections(self) -> int:
        """Cut every connection of the moment, idle and busy; return how many there were."""
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            return len(self._open)

    def bookmark_now(self) -> None:
        """Send a bookmark on every watch that takes them."""
        self.bookmark_round += 1
        self.api.store.wake_watches()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is no error of ours; anything else is, and is shown."""
        if not isinstance(sys.exc_info()[1], (OSError, Broken)):
            super().handle_error(request, client_address)


class Connection(BaseHTTPRequestHandler):
    """Serves the requests of one client in turn."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    connection: ssl.SSLSocket

    def setup(self) -> None:
        self.request = self.server.secure(self.request)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.server.forget(self.connection)
        self.connection.close()

    def log_message(self, *_: object) -> None:
        """Not a word: the requests are counted instead."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except Broken as exc:
            self.close_connection = True
            if exc.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Not shutdown, which would send FIN first: closing with linger 0 sends the reset.
                os.close(self.connection.detach())
        except OSError:
            self.close_connection = True

    def _serve(self) -> None:
        request = self._read()
        if self.server.stopping:
            raise Broken
        call = classify(request)
        self.server.faults.record(call, urlsplit(self.path).query, self.headers.get("User-Agent", ""))
        fault = self.server.faults.take(call)
        if fault is not None:
            self._suffer(fault)
        try:
            if fault is not None and fault.kind == REFUSE:
                raise fault.refusal()
            if fault is not None and fault.kind == GONE:
                expired = status.watch_expired(1, self.server.api.store.version)
                result: Answer | Stream | Refusal = _gone(expired, call.verb == "watch")
            else:
                result = self.server.api.handle(request)
        except ApiFailure as exc:
            result = _failed(exc)
        match result:
            case Stream():
                self._stream(result)
            case Refusal():
                self._head(
                    200,
                    "application/json",
                    {"Transfer-Encoding": "chunked"},
                    _chunk(result.line) + b"0\r\n\r\n",
                )
            case Answer():
                self._answer(result, fault)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _serve

    def _read(self) -> Request:
        url = urlsplit(self.path)
        given = self.headers.get("Content-Length") or "0"
        if not (given.isascii() and given.isdigit()) or self.headers.get("Transfer-Encoding"):
            self._head(400, "text/plain; charset=utf-8", {"Connection": "close"}, b"400 Bad Request")
            raise Broken
        length = int(given)
        body = self.rfile.read(length) if length else b""
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in self.headers.items()}
        return Request(self.command, unquote(url.path), query, headers, body)

    def _suffer(self, fault: Fault) -> None:
        """The part of a fault that comes before any answer."""
        if fault.kind == DROP:
            raise Broken
        if fault.kind == STALL:
            while self.server.faults.stalls(fault):
                self._require_client(0.02)
            raise Broken
        if fault.kind == SLOW:
            time.sleep(fault.delay_s)

    def _require_client(self, timeout_s: float) -> None:
        """Wait so long; raises Broken if the client goes away meanwhile."""
        poller = select.poll()
        poller.register(self.connection, select.POLLIN | select.POLLRDHUP)
        if poller.poll(timeout_s * 1000):
            raise Broken

    def _head(self, code: int, content_type: str, headers: Mapping[str, str], rest: bytes = b"") -> None:
        """Status line and headers, and what follows in the same packet."""
        fixed = {
            "Audit-Id": str(uuid.uuid4()),
            "Cache-Control": "no-cache, private",
            "Content-Type": content_type,
            "Date": self.date_time_string(),
        }
        lines = [f"{name}: {value}\r\n" for name, value in {**fixed, **headers}.items()]
        head = f"HTTP/1.1 {code} {HTTPStatus(code).phrase}\r\n{''.join(lines)}\r\n"
        self.wfile.write(head.encode() + rest)

    def _answer(self, answer: Answer, fault: Fault | None) -> None:
        pieces = self._pretty(answer)
        first = _beginning(pieces)
        headers = dict(answer.headers)
        if fault is not None and fault.kind == RESET:
            headers["Content-Length"] = str(len(first) + 1)
            self._head(answer.code, answer.content_type, headers, first[: len(first) // 2])
            raise Broken(reset=True)
        if len(first) < CHUNK_FROM_BYTES:
            headers["Content-Length"] = str(len(first))
            self._head(answer.code, answer.content_type, headers)
            for piece in _paced(first, pieces, fault):
                self.wfile.write(piece)
            return
        headers["Transfer-Encoding"] = "chunked"
        if len(first) > GZIP_FROM_BYTES and "gzip" in self.headers.get("Accept-Encoding", ""):
            headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
            pieces = _gzip(chain([first], pieces))
            first = b""
        self._head(answer.code, answer.content_type, headers)
        for piece in _paced(first, pieces, fault):
            if piece:
                self.wfile.write(_chunk(piece))
        self.wfile.write(b"0\r\n\r\n")

    def _pretty(self, answer: Answer) -> Iterator[bytes]:
        """The body, indented for people: curl, browsers, ?pretty=true."""
        wanted = dict(parse_qsl(urlsplit(self.path).query)).get("pretty", "")
        agent = self.headers.get("User-Agent", "").startswith(PRETTY_AGENTS)
        if answer.content_type != "application/json" or wanted in ("0", "false") or not (wanted or agent):
            return iter(answer.body)
        shown = json.loads(b"".join(answer.body))
        return iter([json.dumps(shown, indent=2, ensure_ascii=False).encode() + b"\n"])

    def _stream(self, stream: Stream) -> None:
        try:
            self._head(200, "application/json", {"Transfer-Encoding": "chunked"})
            while lines := b"".join(islice(stream.first, LINES_AT_ONCE)):
                self._send(lines)
            self._follow(stream)
            self.wfile.write(b"0\r\n\r\n")
            self.close_connection |= self.server.stopping
        finally:
            self.server.api.store.unwatch(stream.resource, stream.watcher)

    def _follow(self, stream: Stream) -> None:
        """Send events and bookmarks until the watch ends or the client goes away (raises Broken)."""
        server, watcher = self.server, stream.watcher
        ends = time.monotonic() + stream.timeout_s
        bookmark_at = _next_bookmark(time.monotonic(), ends, server.bookmark_s)
        done_round = server.bookmark_round
        poller = select.poll()
        poller.register(watcher.descriptor, select.POLLIN)
        poller.register(self.connection, select.POLLIN | select.POLLRDHUP)
        while True:
            stalled = server.faults.watches_stall()
            while not stalled and watcher.pending():
                self._send(b"".join(map(stream.line, watcher.take())))
                stalled = server.faults.watches_stall()
            now = time.monotonic()
            if not stalled:
                forced = done_round != server.bookmark_round
                if stream.bookmarks and (forced or now >= bookmark_at):
                    self._bookmark(stream)
                    done_round = server.bookmark_round
                if now >= bookmark_at:
                    bookmark_at = _next_bookmark(now, ends, server.bookmark_s)
                if watcher.pending():
                    continue
                if watcher.ended or now >= ends:
                    return
            wait_s = STALLED_S if stalled else max(0.0, min(ends, bookmark_at) - now)
            ready = poller.poll(wait_s * 1000 + 1)
            if any(descriptor != watcher.descriptor for descriptor, _ in ready):
                raise Broken
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(watcher.descriptor)

    def _bookmark(self, stream: Stream) -> None:
        """Tell the version of the moment, unless events up to it are still waiting."""
        version = self.server.api.store.progress(stream.watcher)
        if version is not None and version >= stream.watcher.since:
            self._send(stream.bookmark(version))

    def _send(self, lines: bytes) -> None:
        """Send whole lines of a watch."""
        if not lines:
            return
        if self.server.faults.take_line(RESET) is not None:
            self.wfile.write(_chunk(lines)[: len(lines) // 2])
            raise Broken(reset=True)
        slow = self.server.faults.take_line(SLOW)
        if slow is not None:
            time.sleep(slow.delay_s)
        for piece in _paced(lines, iter(()), slow):
            self.wfile.write(_chunk(piece))


def _next_bookmark(now: float, ends: float, every_s: float) -> float:
    """Roughly every so often, and once shortly before the end."""
    regular, last = now + every_s, ends - BOOKMARK_BEFORE_END_S
    if now < last:
        return min(regular, last)
    return regular


def _failed(refused: ApiFailure) -> Answer:
    if refused.plain:
        headers = {**refused.headers, "X-Content-Type-Options": "nosniff"}
        return Answer(refused.code, [refused.plain.encode()], "text/plain; charset=utf-8", headers)
    return Answer(refused.code, [encode(refused.status) + b"\n"], headers=refused.headers)


def _gone(expired: ApiFailure, is_watch: bool) -> Answer | Refusal:
    return refusal(expired) if is_watch else _failed(expired)


def _beginning(pieces: Iterator[bytes]) -> bytes:
    """As many of the first pieces as it takes to decide how to send them; all of a short answer."""
    taken: list[bytes] = []
    size = 0
    for piece in pieces:
        taken.append(piece)
        size += len(piece)
        if size > GZIP_FROM_BYTES:
            break
    return b"".join(taken)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _paced(first: bytes, rest: Iterator[bytes], fault: Fault | None) -> Iterator[bytes]:
    """The pieces; with a slow fault in small parts and with time between them."""
    if fault is None or fault.kind != SLOW or not fault.bytes_per_s:
        yield first
        yield from rest
        return
    size = max(1, int(fault.bytes_per_s / 20))
    for piece in chain([first], rest):
        for start in range(0, len(piece), size):
            part = piece[start : start + size]
            yield part
            time.sleep(len(part) / fault.bytes_per_s)


def _gzip(pieces: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
    for piece in pieces:
        yield compressor.compress(piece)
    yield compressor.flush()
