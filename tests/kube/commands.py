"""The control channel's server side: a unix socket in the directory, one JSON object a line each way.

A command is `{"do": name, ...arguments}`; the answer `{"result": ...}` or `{"error": text}`. The network
side of the server knows nothing of it.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from tests.kube.access import ADMIN, FLANNEL
from tests.kube.api import Answer, Request
from tests.kube.faults import Fault
from tests.kube.objects import FIRST_ADDRESS, FIRST_SUBNET, peers
from tests.kube.server import Server
from tests.kube.status import ApiFailure

SOCKET = "control.sock"


@contextmanager
def socket_path(directory: Path) -> Iterator[str]:
    """A short name for the socket: the kernel takes 107 bytes, a test's directory may be longer."""
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)


class Commands:
    """What a test can tell the server; each public name of `table` is a command."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._api = server.api
        self._store = server.api.store
        self._faults = server.faults
        access = server.api.access
        self.table: dict[str, Callable[..., object]] = {
            "request": self._request,
            "fill": self._fill,
            "fault": lambda **given: self._faults.add(Fault(**given | {"verbs": frozenset(given["verbs"])})),
            "clear": self._faults.clear,
            "expire_token": access.expire,
            "set_rule": access.set_rule,
            "wrong_ca": self._wrong_ca,
            "close_connections": server.close_connections,
            "end_watches": self._store.end_watches,
            "compact": self._store.compact,
            "advance": self._store.advance,
            "bookmark": server.bookmark_now,
            "version": lambda: self._store.version,
            "watches": lambda: [watcher.since for watcher in self._store.watchers()],
            "counts": self._faults.counts,
            "seen": lambda: [asdict(one) for one in self._faults.seen()],
            "forget": self._faults.forget,
        }

    def run(self, line: bytes) -> bytes:
        """Do what one line says and return the line that answers it."""
        try:
            arguments = json.loads(line)
            result = self.table[arguments.pop("do")](**arguments)
        except (KeyError, TypeError, ValueError) as exc:
            return json.dumps({"error": f"{type(exc).__name__}: {exc}"}).encode() + b"\n"
        return json.dumps({"result": result}).encode() + b"\n"

    def _request(
        self, method: str, path: str, query: dict[str, str], content_type: str, body: Any, admin: bool
    ) -> dict[str, Any]:
        """One API request without the network; it is not counted and no fault hits it."""
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"content-type": content_type, "accept": "application/json"}
        try:
            answer = self._api.serve(Request(method, path, query, headers, data), ADMIN if admin else FLANNEL)
        except ApiFailure as exc:
            return {"code": exc.code, "body": exc.status}
        if not isinstance(answer, Answer):
            raise ValueError(f"{method} {path}: a watch needs the network")  # noqa: TRY004, it is a bad value
        return {"code": answer.code, "body": json.loads(b"".join(answer.body))}

    def _fill(self, count: int, fat: bool, first: int, annotated: bool, subnet: str, address: str) -> int:
        first_subnet = IPv4Network(subnet) if subnet else FIRST_SUBNET
        first_address = IPv4Address(address) if address else FIRST_ADDRESS
        made = peers(count, fat, first, annotated, first_subnet, first_address)
        self._store.add_all("nodes", made)
        return self._store.version

    def _wrong_ca(self, on: bool) -> None:
        self._server.wrong_ca = on


class ControlServer(socketserver.ThreadingUnixStreamServer):
    """Serves `Commands` on the unix socket in `directory`, in threads of its own."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, directory: Path, commands: Commands) -> None:
        self.commands = commands
        (directory / SOCKET).unlink(missing_ok=True)
        with socket_path(directory) as path:
            super().__init__(path, _Session)
        self.socket.set_inheritable(False)
        threading.Thread(target=self.serve_forever, name="control", daemon=True).start()


class _Session(socketserver.StreamRequestHandler):
    server: ControlServer
    request: socket.socket

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(self.server.commands.run(line))
