"""The plugins as an executable: one CNI call from the environment and stdin to stdout and the exit status.

The name that it is called by says which plugin it is: flannel, bridge, host-local, portmap or loopback.
The shim calls it when the daemon does not serve (cold path), and then leaves in the environment

    FLANNEL_CNI_PLUGIN   that name
    FLANNEL_CNI_FDS      descriptors that it has opened, see `cni.local`
    FLANNEL_CNI_UNDO     1: the daemon was lost in the middle of this very ADD, which has to be undone first

A runtime starts this program for every pod, so the time until it is ready is part of each pod's start. It
imports small modules of the standard library only: dataclasses, typing, enum, re, json, argparse, subprocess
and ipaddress would together cost more than everything else.
"""

from __future__ import annotations

import os
import sys

from cni.errors import INTERNAL, IO_FAILURE, CniError
from cni.handler import Response, failure, handle
from cni.local import LocalHost
from cni.plugins import registry
from cni.spec.request import Request, check_environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_LARGEST_STDIN_BYTES = 16 << 20
_OWN_VARIABLES = "FLANNEL_CNI_"
_USUAL_PLUGIN = "flannel"


def main() -> int:
    """Serve the call that this process was started for, and return its exit status."""
    _open_standard_streams()
    response = _respond(dict(os.environ))
    _write(2, response.stderr.encode("utf-8", "replace"))
    _write(1, response.stdout)
    return response.exit_code


def _respond(environment: Mapping[str, str]) -> Response:
    # A delegate that is executed is to see what the runtime said, and nothing of ours.
    given = {key: value for key, value in environment.items() if not key.startswith(_OWN_VARIABLES)}
    stdin = b""
    if given.get("CNI_COMMAND", "") not in ("", "VERSION"):
        try:
            # `handle` does it too, but a person who tries this by hand is to get an answer, not a wait.
            check_environment(given)
            stdin = _read_stdin()
        except CniError as exc:
            return failure(exc)
    host = LocalHost(_note, environment)
    name = _name(environment)
    make = registry.find(name)
    if make is None:
        known = ", ".join(registry.NAMES)
        return failure(CniError(INTERNAL, f"there is no plugin {name}, only {known}"))
    plugin = make(host)
    if environment.get("FLANNEL_CNI_UNDO") == "1" and given.get("CNI_COMMAND") == "ADD":
        undone = handle(Request({**given, "CNI_COMMAND": "DEL"}, stdin), plugin)
        if undone.exit_code:
            return undone
    return handle(Request(given, stdin), plugin)


def _name(environment: Mapping[str, str]) -> str:
    """Which plugin this is: what the shim says, or else the name that the program was started by."""
    called = os.path.basename(sys.argv[0])
    usual = called if called in registry.NAMES else _USUAL_PLUGIN
    return environment.get("FLANNEL_CNI_PLUGIN") or usual


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
