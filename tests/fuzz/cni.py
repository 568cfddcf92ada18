"""The CNI plugins warm against cold with mutated input: `python -m tests.fuzz.cni [COUNT] [SEED]`.

Two processes, each with a machine of its own (`cni_world`), make the same calls: one has the daemon serve
them, the other calls the plugins as the cold path does; one case of 500 goes through the real shim, and a
real process. What must hold for any input: both answer the same; with JSON, and no traceback; what an ADD
left is gone after the DEL with the same input, which succeeds; an ADD that failed leaves nothing; what others
have in the same directories is untouched; and both machines are in the same state at the end of each case.

`python -m tests.fuzz.cni 1 SEED NUMBER` shows the calls of one case.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import IO, Any

from tests.fuzz import cni_inputs as inputs
from tests.fuzz import shim_rig
from tests.fuzz.cni_inputs import Case, Step
from tests.fuzz.cni_world import SOCKET, TIMEOUT_S, Said, State, World, normal

_BLOCK = 100  # cases between two resets of the machine
_SAMPLE = 500
_WORLDS = ("cold", "warm")
_COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS")
_SHOWN = 100


class Hung(Exception):
    """A call does not return."""


# ---- one world


class Runner:
    """One of the two processes."""

    def __init__(self, kind: str, shim: str) -> None:
        self._warm = kind == "warm"
        self._shim = shim
        self._world = World()
        if self._warm:
            from flanneld.cniserver import CniServer

            self._server = CniServer(SOCKET)
        signal.signal(signal.SIGALRM, _hung)

    def run(self, seed: int, index: int) -> dict[str, Any]:
        """The record of one case."""
        if index % _BLOCK == 0:
            self._reset()
        case = inputs.case(seed, index)
        if case.fresh:
            self._world.clear_files()
        record: dict[str, Any] = {"index": index, "said": [], "faults": [], "paths": [], "slow": 0.0}
        try:
            self._run(case, record, real=index % _SAMPLE == 0)
        except Exception:  # noqa: BLE001 - a finding, of the plugins or of this program
            record["faults"].append(traceback.format_exc())
            self._reset()
        return record

    def _reset(self) -> None:
        """Begin anew; the daemon too, which would not make a bridge for an ADD that fails after all."""
        self._world.reset()
        if self._warm:
            self._server._shared.bridges.clear()

    def _run(self, case: Case, record: dict[str, Any], real: bool) -> None:
        if case.fresh:
            self._world.clear_files()
        for change in case.changes:
            inputs.apply(change)
        before = self._world.state()
        live: set[tuple[object, ...]] = set()
        result: bytes | None = None
        for step in case.steps:
            for change in step.damage:
                inputs.apply(change)
            stdin = inputs.insert_previous(step.stdin, result) if step.chained else step.stdin
            began = time.monotonic()
            signal.alarm(TIMEOUT_S)
            said = self._call(step, stdin, real)
            record["slow"] = max(record["slow"], time.monotonic() - began)
            self._finish()
            signal.alarm(0)
            record["paths"].append(said.path)
            record["said"].append([step.plugin, step.environment.get("CNI_COMMAND"), said.code, _text(said)])
            record["faults"] += [f"{one}: {said}" for one in _faults(step, said)]
            result = said.stdout if _added(step, said) else result
            if case.orderly:
                record["faults"] += self._remember(step, said, live, before)
        after = self._world.state()
        record["state"] = _comparable(after)
        if after.links != before.links or after.nft:
            self._reset()
        elif not case.orderly:
            self._world.clear_files()

    def _remember(self, step: Step, said: Said, live: set[tuple[object, ...]], before: State) -> list[str]:
        """Note what is attached, and complain of what is left when nothing is."""
        key = step.plugin, step.stdin, *map(step.environment.get, ("CNI_CONTAINERID", "CNI_IFNAME"))
        command = step.environment.get("CNI_COMMAND")
        found = []
        if _added(step, said):
            live.add(key)
        elif command == "DEL" and key in live:
            if said.code:
                found.append(f"DEL of what was added failed: {said}")
            live.discard(key)
        if not live:
            found += [
                f"{one} (after {command} of {step.plugin})" for one in _left(before, self._world.state())
            ]
        return found

    def _finish(self) -> None:
        """Return once the daemon has done what comes after the answer."""
        while self._warm and self._server._precedence.calls():
            self._server._precedence.give_way()

    def _call(self, step: Step, stdin: bytes, real: bool) -> Said:
        if real and step.environment.get("CNI_COMMAND"):
            argv = [self._shim] if self._warm else [sys.executable, "-m", "cni"]
            return self._world.process(argv, step, stdin, "shim" if self._warm else "process")
        if not self._warm:
            return self._world.cold(step, stdin)
        said = self._world.warm(step, stdin)
        return said or self._world.cold(step, stdin)._replace(path="declined")


def _hung(*_arguments: object) -> None:
    raise Hung(f"no answer within {TIMEOUT_S} s")


def _added(step: Step, said: Said) -> bool:
    return step.environment.get("CNI_COMMAND") == "ADD" and said.code == 0


def _text(said: Said) -> str:
    return normal(said.stdout).decode("utf-8", "replace")


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _faults(step: Step, said: Said) -> list[str]:
    """What is wrong with an answer, whatever was asked."""
    command = step.environment.get("CNI_COMMAND", "")
    if "Traceback" in said.stderr:
        return [f"traceback {said.stderr}"]
    if said.code not in (0, 1):
        return [f"exit status {said.code}"]
    if said.code == 0 and command not in ("ADD", "VERSION"):
        return ["it prints something"] if said.stdout else []
    try:
        record = json.loads(said.stdout.decode(), parse_constant=_no_constant)
    except ValueError as exc:
        return [f"no JSON: {exc}"]
    if not isinstance(record, dict):
        return ["no object"]
    if said.code == 0:
        return [] if isinstance(record.get("cniVersion"), str) else ["a result without version"]
    if type(record.get("code")) is not int or not record["code"] or not record.get("msg"):
        return ["no error object"]
    return ["internal error"] if "internal error" in record["msg"] else []


def _left(before: State, after: State) -> list[str]:
    """What was not there before, and what is not there any more."""
    found = [f"left: {one}" for one in sorted(after.links - before.links)]
    found += [f"left: {one}" for one in sorted(after.nft - before.nft)]
    for path, content in after.files.items():
        own = path.rpartition("/")[2].startswith(("lock", "last_reserved_ip.", ".flannel-boot-"))
        if path not in before.files and not own and not content.endswith(" directory"):
            found.append(f"left: {path}")
    for path, content in before.files.items():
        if inputs.FOREIGN in path + content and after.files.get(path) != content:
            found.append(f"somebody else's: {path}")
    return found


def _comparable(state: State) -> list[str]:
    """A state as text, without what is made up anew in each call."""
    links = sorted(normal(os.fsencode(link)).decode("utf-8", "replace") for link in state.links)
    # The daemon remembers that it has left this mark, which also tells the time.
    kept = [item for item in sorted(state.files.items()) if "/.flannel-boot-" not in item[0]]
    # Of a path that cannot be made as a whole the cold path may have made the first directories.
    full = {
        path[:end] for path, content in kept for end in _slashes(path) if not content.endswith(" directory")
    }
    kept = [item for item in kept if not item[1].endswith(" directory") or item[0] in full]
    files = [f"{path} {content}" for path, content in kept]
    return [
        *links,
        *sorted(state.nft),
        *(normal(os.fsencode(one)).decode("utf-8", "replace") for one in files),
    ]


def _slashes(path: str) -> list[int]:
    return [place for place, letter in enumerate(path) if letter == "/"]


def serve(kind: str, numbers: list[int], shim: str) -> None:
    """Print the record of each case; the whole life of one of the two processes."""
    seed, first, count = numbers
    out = os.fdopen(os.dup(1), "w", buffering=1 << 16)
    os.dup2(2, 1)
    runner = Runner(kind, shim)
    for index in range(first, first + count):
        out.write(json.dumps(runner.run(seed, index)) + "\n")
        out.flush()
    out.close()
    os._exit(0)  # the server's threads may hang in what was found


# ---- both


def compare(cold: dict[str, Any], warm: dict[str, Any]) -> list[str]:
    """What is wrong with the two records of a case."""
    found = [f"cold: {one}" for one in cold["faults"]] + [f"warm: {one}" for one in warm["faults"]]
    for one, other in zip(cold["said"], warm["said"], strict=False):
        if one != other:
            found.append(f"cold says {one}\n  warm says {other}")
    ours, theirs = cold.get("state", []), warm.get("state", [])
    if ours != theirs:
        only = [f"cold has {one}" for one in ours if one not in theirs]
        only += [f"warm has {one}" for one in theirs if one not in ours]
        found.append("states differ: " + "; ".join(only))
    return found


def run(count: int, seed: int, first: int = 0, stop_after: int = 200) -> tuple[Counter[str], list[str]]:
    """Statistics and findings of that many cases; of each block the first finding."""
    statistics: Counter[str] = Counter()
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        shim = shim_rig.build(Path(folder), *shim_rig.RELEASE)
        _install_cold(Path(folder))
        worlds = [_start(kind, seed, first, count, str(shim)) for kind in _WORLDS]
        try:
            spoilt = -1
            for index in range(first, first + count):
                records = [_next(world.stdout) for world in worlds]
                _count(statistics, *records)
                found = compare(*records)
                if found and spoilt != index // _BLOCK:
                    spoilt = index // _BLOCK
                    findings.append(f"case {index} of seed {seed}:\n  " + "\n  ".join(found))
                    if len(findings) >= stop_after:
                        break
        finally:
            for world in worlds:
                world.kill()
                world.communicate()
    return statistics, findings


def _install_cold(folder: Path) -> None:
    """The plugin beside the shim, for what the daemon declines."""
    library = folder / "flannel-lib"
    library.mkdir()
    plugin = library / "flannel"
    root = Path(__file__).parents[2]
    plugin.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m cni "$@"\n')
    plugin.chmod(0o700)


def _start(kind: str, seed: int, first: int, count: int, shim: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "tests.fuzz.cni", "--world", kind, str(seed), str(first), str(count), shim]
    return subprocess.Popen(argv, stdout=subprocess.PIPE)


def _next(stream: IO[bytes] | None) -> dict[str, Any]:
    line = stream.readline() if stream else b""
    if not line:
        raise RuntimeError("a world has come to an end")
    found: dict[str, Any] = json.loads(line)
    return found


def _count(statistics: Counter[str], cold: dict[str, Any], warm: dict[str, Any]) -> None:
    statistics["cases"] += 1
    for path in (*cold["paths"], *warm["paths"]):
        statistics[f"calls {path}"] += 1
    for plugin, command, code, _ in warm["said"]:
        called = command if command in _COMMANDS else "other"
        statistics[f"{plugin} {called} {'failed' if code else 'ok'}"] += 1
    statistics["slower than 1 s"] += warm["slow"] > 1 or cold["slow"] > 1


def show(seed: int, index: int) -> None:
    """Print the calls of one case."""
    case = inputs.case(seed, index)
    print(f"fresh {case.fresh}, orderly {case.orderly}")
    for change in case.changes:
        print(f"  {change}")
    for step in case.steps:
        print(f"{step.plugin} {step.environment}\n  chained {step.chained} damage {step.damage}")
        print(f"  {step.stdin[:3000]!r}")


def main(arguments: list[str]) -> int:
    """Returns 1 if anything was found."""
    if arguments[:1] == ["--world"]:
        kind, *numbers, shim = arguments[1:]
        serve(kind, [int(one) for one in numbers], shim)
    given = [int(one) for one in arguments]
    count, seed, first = given + [2000, 1, 0][len(given) :]
    if len(arguments) == 3:
        show(seed, first)
        first = first // _BLOCK * _BLOCK
        count += given[2] - first
    began = time.monotonic()
    statistics, findings = run(count, seed, first)
    for finding in findings[:_SHOWN]:
        print(finding[:6000])
    print(", ".join(f"{name}: {number}" for name, number in sorted(statistics.items())))
    print(f"{statistics['cases']} cases in {time.monotonic() - began:.0f} s, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
