"""Probes for a supervisor: /healthz says that the process runs, /readyz that the node's network is in order.

Texts, codes and paths are upstream's. It answers from the start on, also while the daemon waits for its
store; upstream's server comes up late, and a liveness probe then restarts a node that only waits.
"""

from __future__ import annotations

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

from cni.errors import ConfigError

_TIMEOUT_S = 5.0


class HealthServer:
    """Serves until `close`. Raises ConfigError when the address cannot be listened on."""

    def __init__(self, address: str, port: int, ready: Event) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _TIMEOUT_S

            def parse_request(self) -> bool:
                """Any method is answered alike, as upstream does."""
                if super().parse_request():
                    self._answer()
                return False

            def _answer(self) -> None:
                status, text = _reply(self.path.partition("?")[0], ready.is_set())
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                self.close_connection = True

            def log_message(self, *_args: object) -> None:
                """A probe every few seconds is no news."""

        try:
            self._server = ThreadingHTTPServer((address, port), Handler)
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


def _reply(path: str, ready: bool) -> tuple[HTTPStatus, str]:
    if path == "/healthz":
        return HTTPStatus.OK, "flanneld is running"
    if path == "/readyz" and ready:
        return HTTPStatus.OK, "flanneld is ready"
    if path == "/readyz":
        return HTTPStatus.SERVICE_UNAVAILABLE, "flanneld is not ready yet"
    return HTTPStatus.NOT_FOUND, "404 page not found\n"
