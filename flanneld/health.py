"""/healthz says that the process runs, /readyz that the node's network is in order, /metrics how it fares.

Paths, codes and the first line of each answer are upstream's; where there is more to say (why the node is
not ready, that it runs on what it last knew), a second line says it. The server answers from the start on,
also while the daemon waits for its store; upstream's comes up late, and a liveness probe then restarts a
node that only waits.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Thread

from cni.errors import ConfigError
from flanneld import metrics

_TIMEOUT_S = 5.0
_TEXT = "text/plain; charset=utf-8"


class Readiness:
    """Whether the node's network is in order, and a remark. Replaced as one value, so any thread may look."""

    def __init__(self) -> None:
        self._state = (False, "")

    def waiting(self, why: str) -> None:
        """Not ready (any more)."""
        self._state = (False, why)
        metrics.READY.set(0)

    def ready(self, remark: str = "") -> None:
        """Peers are programmed; `remark` tells of what is nevertheless unusual."""
        self._state = (True, remark)
        metrics.READY.set(1)

    @property
    def is_ready(self) -> bool:
        return self._state[0]

    @property
    def text(self) -> str:
        """The answer to a probe, without a line end."""
        is_ready, remark = self._state
        return "\n".join(
            filter(None, ("flanneld is ready" if is_ready else "flanneld is not ready yet", remark))
        )


class HealthServer:
    """Serves until `close`. Raises ConfigError when the address cannot be listened on."""

    def __init__(self, address: str, port: int, readiness: Readiness) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _TIMEOUT_S

            def parse_request(self) -> bool:
                """Any method is answered alike, as upstream does."""
                if super().parse_request():
                    self._answer()
                return False

            def _answer(self) -> None:
                status, kind, body = _reply(self.path.partition("?")[0], readiness)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                self.close_connection = True

            def log_message(self, *_args: object) -> None:
                """A probe every few seconds is no news."""

        try:
            self._server = _listen(address, port, Handler)
        except (OSError, OverflowError) as exc:
            raise ConfigError(
                f"cannot listen on --healthz-ip={address} --healthz-port={port}: {exc}; choose another port"
            ) from exc
        self._thread = Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for our name: ten seconds on a node whose network is not up yet.
        TCPServer.server_bind(self)


class _BothFamilies(_Server):
    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def _listen(address: str, port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    """As Go listens: 0.0.0.0 means every address of both families, where the host has both."""
    if ":" in address:
        return _BothFamilies((address, port), handler)
    if address in ("", "0.0.0.0"):  # noqa: S104 - upstream's default
        with suppress(OSError):
            return _BothFamilies(("::", port), handler)
    return _Server((address, port), handler)


def _reply(path: str, readiness: Readiness) -> tuple[HTTPStatus, str, bytes]:
    if path == "/healthz":
        return HTTPStatus.OK, _TEXT, b"flanneld is running"
    if path == "/readyz":
        status = HTTPStatus.OK if readiness.is_ready else HTTPStatus.SERVICE_UNAVAILABLE
        return status, _TEXT, readiness.text.encode()
    if path == "/metrics":
        return HTTPStatus.OK, metrics.CONTENT_TYPE, metrics.render()
    return HTTPStatus.NOT_FOUND, _TEXT, b"404 page not found\n"
