"""The executable `flannel`: one CNI call from the environment and stdin to stdout and the exit status.

A runtime starts this program for every pod, so the time until it is ready is part of each pod's start. It
imports small modules of the standard library only: dataclasses, typing, enum, re, json, argparse, subprocess
and ipaddress would together cost more than everything else.
"""

from __future__ import annotations

import os
import sys

from cni.errors import IO_FAILURE, CniError
from cni.handler import Response, failure, handle
from cni.plugins.flannel import Flannel
from cni.spec.request import Request, check_environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_LARGEST_STDIN_BYTES = 16 << 20


def main() -> int:
    """Serve the call that this process was started for, and return its exit status."""
    _open_standard_streams()
    response = _respond(dict(os.environ))
    _write(2, response.stderr.encode("utf-8", "replace"))
    _write(1, response.stdout)
    return response.exit_code


def _respond(environment: Mapping[str, str]) -> Response:
    stdin = b""
    if environment.get("CNI_COMMAND", "") not in ("", "VERSION"):
        try:
            # `handle` does it too, but a person who tries this by hand is to get an answer, not a wait.
            check_environment(environment)
            stdin = _read_stdin()
        except CniError as exc:
            return failure(exc)
    return handle(Request(environment, stdin), Flannel(note=_note))


def _read_stdin() -> bytes:
    chunks = []
    size = 0
    try:
        while chunk := os.read(0, 1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if size > _LARGEST_STDIN_BYTES:
                text = f"error reading from stdin: more than {_LARGEST_STDIN_BYTES} bytes"
                raise CniError(IO_FAILURE, text)
    except OSError as exc:
        raise CniError(
            IO_FAILURE, f"error reading from stdin: {(exc.strerror or str(exc)).lower()}"
        ) from None
    return b"".join(chunks)


def _note(text: str) -> None:
    _write(2, f"{text}\n".encode("utf-8", "replace"))


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _open_standard_streams() -> None:
    """A closed stdin, stdout or stderr would lend its number to a delegate's pipe."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
