"""A folder with the shim and a cold plugin, a daemon that speaks the shim's protocol, and calls between them.

The protocol is written down here a second time, on purpose: `flanneld.cniwire` is not asked.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "cni" / "shim" / "shim.c"
WARNINGS = ("-Wall", "-Wextra", "-Werror")
RELEASE = (*WARNINGS, "-O2", "-static")

VERSION = 3
HELLO = struct.pack("=4sHH", b"FCNI", VERSION, 0)
BITS = ("own", "root", "netns", "route", "settings")
LARGEST = 4 << 20
_HEADER = struct.Struct("=4sIiIIIII")
_REPLY = struct.Struct("=4sIIII")

# The cold plugin tells what it was given. A program that starts the script, as a script has no argv[0].
_LAUNCHER = """
#include <unistd.h>
int main(int argc, char **argv)
{
	(void)argc;
	return execl("%s", "python", "-IS", "%s", argv[0], (char *)0);
}
"""
_REPORT = """
import json, os, sys
fds = {}
for name in os.listdir("/proc/self/fd"):
    try:
        fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        pass  # the listing's own
stdin, kind = b"", fds.get(0, "")
if not kind.startswith("/dev/pts"):
    with open(0, "rb", buffering=0) as file:
        stdin = file.read()
json.dump({
    "cold": True, "name": sys.argv[1], "fds": fds, "stdin": stdin.decode("latin-1"), "stdin_kind": kind,
    "netns": os.stat("/proc/self/ns/net").st_ino,
    "environment": {os.fsdecode(k): os.fsdecode(v) for k, v in os.environb.items()},
}, sys.stdout)
"""


def build(folder: Path, *flags: str) -> Path:
    """Compile the shim with `flags`, a static one as it is delivered with musl; its path."""
    target = folder / "flannel"
    compiler = "musl-gcc" if "-static" in flags else "gcc"
    subprocess.run([compiler, *flags, "-o", str(target), str(SOURCE)], check=True, timeout=120)
    return target


def install_report(folder: Path) -> None:
    """Put a cold plugin beside the shim in `folder` that prints as JSON what it was given."""
    library = folder / "flannel-lib"
    library.mkdir()
    script = library / "report.py"
    script.write_text(_REPORT)
    text = _LAUNCHER % (sys.executable, script)
    command = ["gcc", "-x", "c", "-", "-o", str(library / "flannel")]
    subprocess.run(command, input=text, text=True, check=True, timeout=60)


@dataclass(frozen=True)
class Request:
    """What the shim sent, taken apart; `descriptors` are closed by `close`."""

    name: bytes
    environment: list[bytes]
    stdin: bytes
    netns_error: int
    deadline_ms: int
    descriptors: dict[str, int]

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)


class Incomplete(Exception):
    """The shim hung up before it had sent a whole request; the argument is what came."""


def receive(connection: socket.socket, chunk: int = 1 << 16, pause: Callable[[], object] = int) -> Request:
    """Read one request, at most `chunk` bytes at a time with `pause()` in between; raises Incomplete."""
    data, descriptors, size = b"", array.array("i"), _HEADER.size
    while len(data) < size:
        try:
            part, ancillary, _flags, _address = connection.recvmsg(min(chunk, size - len(data)), 256)
        except ConnectionResetError:  # it went without reading what we had sent
            part, ancillary = b"", []
        for _level, _kind, content in ancillary:
            descriptors.frombytes(content)
        if not part:
            for descriptor in descriptors:
                os.close(descriptor)
            raise Incomplete(data)
        data += part
        if len(data) == _HEADER.size:
            size += sum(_HEADER.unpack(data)[3:6])
        pause()
    magic, mask, netns_error, name_len, env_len, _stdin_len, deadline_ms, version = _HEADER.unpack_from(data)
    assert magic == b"FCNI" and version == VERSION
    names = [name for bit, name in enumerate(BITS) if mask >> bit & 1]
    assert mask < 1 << len(BITS) and len(names) == len(descriptors)
    body = data[_HEADER.size :]
    environment = body[name_len : name_len + env_len]
    assert not environment or environment.endswith(b"\0")
    return Request(
        body[:name_len],
        environment.split(b"\0")[:-1],
        body[name_len + env_len :],
        netns_error,
        deadline_ms,
        dict(zip(names, descriptors, strict=True)),
    )


def reply(stdout: bytes = b"", stderr: bytes = b"", code: int = 0, kind: int = 0, **lengths: int) -> bytes:
    """A reply; `out` and `err` announce other lengths than those of the texts."""
    out, err = lengths.get("out", len(stdout)), lengths.get("err", len(stderr))
    return _REPLY.pack(b"FCNI", kind, code, out, err) + stdout + stderr


DECLINED = reply(kind=1)


class Daemon:
    """Listens at `path` and serves each connection with `serve`, in a thread of its own.

    What `serve` raises is raised again when this context manager ends.
    """

    def __init__(self, path: Path, serve: Callable[[socket.socket], object]) -> None:
        self._serve = serve
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self.failures: list[BaseException] = []
        self.served = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _exc: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._thread.join(20)
        self._listener.close()
        if self.failures and kind is None:
            raise self.failures[0]

    def settle(self) -> None:
        """Wait until all connections that were made up to now have been served."""
        with socket.socket(socket.AF_UNIX) as last:
            last.settimeout(20)
            last.connect(self._listener.getsockname())
            assert last.recv(1) == b""

    def _run(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            with connection:
                if _peer(connection) == os.getpid():
                    continue
                try:
                    self._serve(connection)
                except BaseException as exc:  # noqa: BLE001 - raised again in the test's thread
                    self.failures.append(exc)
                self.served += 1


def gone(connection: socket.socket) -> bool:
    """Wait until the shim goes, or sends something that is no part of the request; whether it went."""
    try:
        sent = connection.recv(1)
    except ConnectionResetError:  # it went without reading what we had sent
        return True
    return sent == b""


def _peer(connection: socket.socket) -> int:
    """The process at the other end."""
    pid: int = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def answering(
    answer: bytes | Callable[[Request], bytes], requests: list[Request] | None = None
) -> Callable[[socket.socket], None]:
    """A daemon that keeps to the protocol. Each request goes to `requests`, with its descriptors if asked."""

    def serve(connection: socket.socket) -> None:
        request = receive(connection)
        connection.sendall(HELLO)
        try:
            connection.sendall(answer if isinstance(answer, bytes) else answer(request))
        except BrokenPipeError:
            assert not isinstance(answer, bytes) or len(answer) > 1 << 16, "the shim did not wait"
        if requests is None:
            request.close()
        else:
            requests.append(request)

    return serve


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def report(self) -> dict[str, Any]:
        """What the cold plugin of `install_report` was given; fails unless it alone has answered."""
        assert self.code == 0, self
        found: dict[str, Any] = json.loads(self.stdout)
        assert found["cold"] is True
        return found

    @property
    def undo(self) -> bool:
        """Whether the cold plugin was told to undo first."""
        flag = self.report["environment"].get("FLANNEL_CNI_UNDO")
        assert flag in (None, "1")
        return flag is not None

    @property
    def error(self) -> str:
        """The message of the CNI error 11 that is all of stdout."""
        assert self.code == 1 and not self.stderr, self
        found = json.loads(self.stdout)
        head, tail = b'{\n    "code": 11,\n    "msg": "', b'"\n}'
        assert self.stdout.startswith(head) and self.stdout.endswith(tail), "not as Go prints it"
        assert list(found) == ["code", "msg"] and found["code"] == 11
        return str(found["msg"])


def call(
    command: Sequence[str | Path],
    environment: Mapping[str, str | bytes],
    stdin: bytes = b"",
    argv0: str | None = None,
    timeout_s: float = 30,
) -> Outcome:
    """Run the shim (`command`, as its executable or below another program) to its end."""
    argv = [str(word) for word in command]
    executable = argv[0]
    if argv0 is not None:
        argv[0] = argv0
    done = subprocess.run(
        argv,
        executable=executable,
        input=stdin,
        env={key: os.fsdecode(value) for key, value in environment.items()},
        capture_output=True,
        check=False,
        timeout=timeout_s,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
