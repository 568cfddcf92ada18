"""The shim among mutated daemons, environments and inputs: `python -m tests.fuzz.shim [COUNT] [SEED]`.

What must hold whatever it gets: it ends in time and by no signal; it prints the answer of the daemon that is
whole and sound, or else the output of the cold plugin, or else one CNI error; never two of them, never a part
of one; and the cold plugin is told to undo when the daemon has had an ADD as a whole, and only then.

Half of the calls run a shim built with the sanitizers of gcc.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

from tests.fuzz import shim_rig as rig

_SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_TIMEOUT_MS = 1000
_COMMANDS = ("ADD", "ADD", "ADD", "DEL", "CHECK", "GC", "VERSION", "", "add", "ADD\n")
_NETNS = (
    "",
    "/proc/self/ns/net",
    "/proc/self/ns/mnt",
    "/nonexistent",
    "/etc/passwd",
    "/dev/null",
    "x" * 5000,
)
# Says what it was told, and how much came on stdin.
_COLD = '#!/bin/sh\nprintf "cold %s " "$FLANNEL_CNI_UNDO"\nexec wc -c\n'


class Script:
    """What one fake daemon sends, where it breaks off, and whether it then hangs instead of hanging up."""

    def __init__(self, rng: random.Random) -> None:
        self.hello = _mutated(rng, rig.HELLO) if rng.random() < 0.1 else rig.HELLO
        self.reply = _mutated(rng, _reply(rng)) if rng.random() < 0.5 else _reply(rng)
        self.reads_all = rng.random() < 0.9
        self.hangs = rng.random() < 0.003
        self.piecewise = rng.random() < 0.2
        self.served = False  # the request came as a whole, and was taken

    def __call__(self, connection: socket.socket) -> None:
        try:
            if not self.reads_all:
                connection.recv(20)
            else:
                rig.receive(connection).close()
                # The last two bytes of the hello say nothing.
                self.served = len(self.hello) >= len(rig.HELLO) and self.hello.startswith(rig.HELLO[:6])
                self._send(connection, self.hello)
                if self.served:
                    self._send(connection, self.reply)
            if self.hangs:
                connection.settimeout(_TIMEOUT_MS / 1000 * 20)
                while connection.recv(1 << 16):
                    continue
        except (BrokenPipeError, ConnectionResetError, rig.Incomplete):
            return  # the shim had enough

    def _send(self, connection: socket.socket, data: bytes) -> None:
        step = 3 if self.piecewise and len(data) < 300 else len(data)
        for at in range(0, len(data), step or 1):
            connection.sendall(data[at : at + step])

    @property
    def after_hello(self) -> bytes:
        """What the shim has to take for the reply."""
        return self.hello[len(rig.HELLO) :] + self.reply

    def header(self) -> tuple[int, int, int, int] | None:
        """Kind, exit status and lengths of the reply that was given, if that is sound so far."""
        if not self.served or len(self.after_hello) < 20:
            return None
        magic, *fields = struct.unpack_from("=4sIIII", self.after_hello)
        kind, code, out, err = fields
        sound = magic == b"FCNI" and kind <= 1 and code <= 255 and max(out, err) <= 64 << 20
        return (kind, code, out, err) if sound else None

    def answer(self) -> rig.Outcome | None:
        """The sound answer that was given, by a reader of its own; None for anything else."""
        header = self.header()
        if header is None or header[0]:
            return None
        _kind, code, out, err = header
        end = 20 + out + err
        if len(self.after_hello) < end:
            return None
        return rig.Outcome(code, self.after_hello[20 : 20 + out], self.after_hello[20 + out : end])

    @property
    def declined(self) -> bool:
        header = self.header()
        return header is not None and header[0] == 1


def _reply(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return rig.DECLINED
    size = rng.choice((0, 1, 40, 40, 2000, 65516, 65536, 65537, 300_000))
    return rig.reply(rng.randbytes(size), rng.randbytes(rng.choice((0, 0, 9, 70_000))), rng.getrandbits(8))


def _mutated(rng: random.Random, data: bytes) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.getrandbits(2)):
        raw[rng.randrange(min(len(raw), 24))] = rng.choice((0, 1, 255, rng.getrandbits(8)))
    if rng.random() < 0.5:
        del raw[rng.randrange(len(raw) + 1) :]
    elif rng.random() < 0.3:
        raw += rng.randbytes(rng.getrandbits(5))
    return bytes(raw)


def _environment(rng: random.Random, path: Path) -> dict[str, str | bytes]:
    environment: dict[str, str | bytes] = {
        "PATH": "/usr/bin:/bin",
        "CNI_COMMAND": rng.choice(_COMMANDS),
        "CNI_NETNS": rng.choice(_NETNS),
        "FLANNEL_CNI_SOCKET": str(path) if rng.random() < 0.95 else rng.choice(("", "/x\n", "é" * 200)),
        "FLANNEL_CNI_TIMEOUT_MS": str(_TIMEOUT_MS),
    }
    for _ in range(rng.getrandbits(2)):
        value = rng.randbytes(rng.choice((0, 5, 300, 60_000))).replace(b"\0", b"")
        environment[
            rng.choice(("CNI_ARGS", "CNI_", "CNI_PATH", "FLANNEL_CNI_UNDO", "FLANNEL_CNI_FDS", "A"))
        ] = value
    for name in ("PATH", "CNI_COMMAND", "CNI_NETNS"):
        if rng.random() < 0.03:
            environment.pop(name)
    environment["ASAN_OPTIONS"] = "detect_leaks=0"  # it ends by _exit
    return environment


def _stdin(rng: random.Random) -> bytes:
    size = rng.choice(
        (0, 2, 300, 300, 300, 5000, 70_000, 1 << 20) if rng.random() < 0.99 else ((4 << 20) + 1,)
    )
    return rng.randbytes(size)


def check(outcome: rig.Outcome, script: Script, command: str, *, has_cold: bool) -> str:
    """Check how a call ended, and return what kind of end it was."""
    assert 0 <= outcome.code <= 255, f"ended by signal {-outcome.code}: {outcome.stderr.decode()}"
    answer = script.answer()
    if answer is not None:
        assert outcome == answer
        return "answer"
    if outcome.code == 1:
        message = outcome.error
        late = "did not answer within" in message
        taken = script.served or not script.reads_all  # as much as there was may have been all
        assert (taken and script.hangs) if late else not has_cold, message
        return "error"
    assert has_cold and outcome.code == 0 and not outcome.stderr
    word, *rest = outcome.stdout.split()
    assert word == b"cold" and outcome.stdout.count(b"cold") == 1
    undo = len(rest) == 2
    if script.reads_all or not undo:  # what is left unread may well have been sent as a whole
        assert undo is (command == "ADD" and script.served and not script.declined), outcome
    assert command == "ADD" or not undo
    return "undo" if undo else "cold"


def run(count: int, seed: int, folder: Path, sanitized: bool) -> Counter[str]:
    """Check `count` calls; what fails carries its number, which with the seed makes it again."""
    for name in ("whole", "alone"):
        (folder / name).mkdir()
        rig.build(folder / name, *rig.WARNINGS, *(_SANITIZERS if sanitized else ("-O2", "-static")))
    cold = folder / "whole" / "flannel-lib" / "flannel"
    cold.parent.mkdir()
    cold.write_text(_COLD)
    cold.chmod(0o755)
    path = folder / "cni.sock"
    current: list[Script] = []
    found: Counter[str] = Counter()
    with rig.Daemon(path, lambda connection: current[-1](connection)) as daemon:  # noqa: PLW0108
        for number in range(count):
            rng = random.Random(f"{seed}.{number}")
            script = Script(rng)
            current.append(script)
            environment = _environment(rng, path)
            has_cold = rng.random() < 0.95
            shim = folder / ("whole" if has_cold else "alone") / "flannel"
            command = os.fsdecode(environment.get("CNI_COMMAND", ""))
            try:
                outcome = rig.call([shim], environment, _stdin(rng))
                daemon.settle()
                found[check(outcome, script, command, has_cold=has_cold)] += 1
            except Exception as error:
                error.add_note(f"call {number} of seed {seed}, sanitized {sanitized}")
                raise
    return found


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    found: Counter[str] = Counter()
    started = perf_counter()
    for sanitized in (False, True):
        with tempfile.TemporaryDirectory(prefix="pfl") as folder:
            found += run(count // 2, seed, Path(folder), sanitized)
    spent = perf_counter() - started
    print(f"{count} calls, seed {seed}: {spent:.1f} s, {spent / count * 1e3:.2f} ms each; nothing broken")
    for answer, times in sorted(found.items()):
        print(f"{times:>9}  {answer}")


if __name__ == "__main__":
    main()
