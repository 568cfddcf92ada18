"""Running another CNI plugin: find it, feed it, and read its answer.

Source: CNI 1.1.0, "Plugin Delegation"; lookup, retry and the words "netplugin failed" are the Go library's.

Decision: `os.posix_spawn` and poll instead of `subprocess`, whose import costs 10 ms in every ADD and DEL.
The netconf travels in a memory file, so that nothing can block before the delegate's output is read.
"""

from __future__ import annotations

import errno
import os
import select
import time

from cni.errors import INTERNAL, CniError
from cni.spec import gojson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from cni.host import Host

_LARGEST_STDOUT_BYTES = 16 << 20
_LARGEST_STDERR_BYTES = 64 << 10
_LONGEST_QUOTE = 400
_BUSY_TRIES = 6  # an installer may be writing the executable, see ETXTBSY
_BUSY_PAUSE_S = 1.0
_SIGPIPE, _SIGXFSZ, _SIGKILL = 13, 25, 9


class DelegateMissing(CniError):
    """No executable of that type is in CNI_PATH."""


class CannotExecute(CniError):
    """The executable is there, but the kernel cannot start it."""


class DelegateRefused(CniError):
    """The delegate printed an error object; code, message and details are its own."""


class Outcome:
    """How a delegate ended: exit status (negative: number of the signal), stdout and the start of stderr."""

    __slots__ = ("status", "stderr", "stdout")

    def __init__(self, status: int, stdout: bytes, stderr: bytes) -> None:
        self.status = status
        self.stdout = stdout
        self.stderr = stderr


def find(kind: str, directories: list[str]) -> str:
    """Path of the first executable regular file named `kind`; raises CniError 999."""
    if not kind:
        raise CniError(INTERNAL, "no plugin name provided")
    if "/" in kind:
        raise CniError(INTERNAL, f"invalid plugin name: {kind}")
    for directory in directories:
        path = f"{directory}/{kind}" if directory else kind
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    places = " ".join(directories)
    raise DelegateMissing(INTERNAL, f"failed to find plugin {gojson.dumps(kind)} in path [{places}]")


def execute(host: Host, kind: str, path: str, environment: Mapping[str, str], stdin: bytes) -> bytes:
    """stdout of the plugin `kind` at `path`; its stderr goes to the log. Raises CniError."""
    try:
        outcome = run(path, environment, stdin)
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise CannotExecute(INTERNAL, f"netplugin failed: cannot execute {path}: {reason}") from None
    if outcome.stderr:
        host.note(outcome.stderr.decode("utf-8", "replace").rstrip("\n"))
    return answer(kind, path, outcome)


def run(path: str, environment: Mapping[str, str], stdin: bytes) -> Outcome:
    """Execute `path` and wait for its end; raises OSError if it cannot be started."""
    out, out_child = os.pipe()
    err, err_child = os.pipe()
    try:
        pid = _start(path, environment, stdin, out_child, err_child)
        try:
            stdout, stderr = _drain(pid, out, err)
        finally:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(out)
        os.close(err)
    return Outcome(status, stdout, stderr)


def answer(kind: str, path: str, outcome: Outcome) -> bytes:
    """The stdout of a delegate that succeeded; raises CniError for every other end."""
    if outcome.status == 0:
        return outcome.stdout
    how = f"exit status {outcome.status}" if outcome.status > 0 else f"killed by signal {-outcome.status}"
    who = f"delegate {gojson.dumps(kind)} ({path}), {how}"
    if not outcome.stdout.strip():
        said = f": {_quote(outcome.stderr)}" if outcome.stderr.strip() else ", no error message"
        raise CniError(INTERNAL, f"netplugin failed: {who}{said}")
    try:
        record = gojson.load_object(outcome.stdout)
        code = gojson.integer(record, "code", 0, 0, 2**32 - 1) or 0
        msg = gojson.typed(record, "msg", str, "")
        details = gojson.typed(record, "details", str, "")
    except gojson.GoJsonError as exc:
        said = _quote(outcome.stdout)
        text = f"netplugin failed but error parsing its diagnostic message {said}: {exc}; {who}"
        raise CniError(INTERNAL, text) from None
    if not code and not msg:
        raise CniError(INTERNAL, f"netplugin failed: {who}, no error object: {_quote(outcome.stdout)}")
    raise DelegateRefused(code, msg, details)


def _quote(text: bytes) -> str:
    return gojson.dumps(text.strip()[:_LONGEST_QUOTE].decode("utf-8", "replace"))


def _start(path: str, environment: Mapping[str, str], stdin: bytes, out: int, err: int) -> int:
    """The new process's id; the child's ends of its pipes are closed here in any case."""
    source = os.memfd_create("netconf")
    try:
        with open(source, "wb", closefd=False) as file:
            file.write(stdin)
        os.lseek(source, 0, os.SEEK_SET)
        actions = [(os.POSIX_SPAWN_DUP2, end, target) for target, end in enumerate((source, out, err))]
        return _spawn(path, environment, actions)
    finally:
        for descriptor in (source, out, err):
            os.close(descriptor)


def _spawn(path: str, environment: Mapping[str, str], actions: list[tuple[int, int, int]]) -> int:
    tries = 1
    while True:
        try:
            # Python ignores these signals, and what is ignored stays ignored across exec.
            return os.posix_spawn(
                path, [path], environment, file_actions=actions, setsigdef=(_SIGPIPE, _SIGXFSZ)
            )
        except OSError as exc:
            if exc.errno != errno.ETXTBSY or tries == _BUSY_TRIES:
                raise
        tries += 1
        time.sleep(_BUSY_PAUSE_S)


def _drain(pid: int, out: int, err: int) -> tuple[bytes, bytes]:
    """Both outputs to their ends; a delegate that floods stdout is killed, more of stderr is dropped."""
    texts = {out: bytearray(), err: bytearray()}
    poll = select.poll()
    poll.register(out, select.POLLIN)
    poll.register(err, select.POLLIN)
    live = 2
    while live:
        for descriptor, _ in poll.poll():
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                poll.unregister(descriptor)
                live -= 1
            elif descriptor == err:
                texts[err] += chunk[: _LARGEST_STDERR_BYTES - len(texts[err])]
            elif len(texts[out]) + len(chunk) <= _LARGEST_STDOUT_BYTES:
                texts[out] += chunk
            else:
                os.kill(pid, _SIGKILL)
    return bytes(texts[out]), bytes(texts[err])
