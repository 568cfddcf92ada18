"""Log lines as klog writes them, so that what reads flannel's log reads ours.

`I0629 14:28:35.866793    5522 reconcile.py:86] message`: severity, month and day, local time, process,
place. Errors with the remedy are E, things that go on worse are W, changes in the world are I.

Verbosity is klog's too: `-v=2` adds each change of a lease (`V2`), `-v=4` each operation on the kernel (`V4`,
which is `logger.debug`). `--vmodule` raises it by file: `reconcile=4,etc*=2`. `--log_backtrace_at` adds
the stack to what one line of the program logs: `reconcile.py:86`.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

logger = logging.getLogger("flanneld")

V2 = logging.INFO - 2
V4 = logging.DEBUG
_VERBOSITY = {V2: 2, V4: 4}
_LETTERS = ((logging.ERROR, "E"), (logging.WARNING, "W"), (logging.NOTSET, "I"))


class KlogFormatter(logging.Formatter):
    """klog's text format; `backtrace_at` is the `file.py:N` whose lines are followed by a stack trace."""

    def __init__(self, backtrace_at: str = "") -> None:
        super().__init__()
        self._backtrace_at = backtrace_at

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%m%d %H:%M:%S", time.localtime(record.created))
        micros = int(record.created % 1 * 1_000_000)
        severity = next(letter for level, letter in _LETTERS if record.levelno >= level)
        place = f"{record.filename}:{record.lineno}"
        line = f"{severity}{moment}.{micros:06d} {record.process:7d} {place}] {record.getMessage()}"
        if place == self._backtrace_at:
            line += "\n" + "".join(_stack(record)).rstrip("\n")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _stack(record: logging.LogRecord) -> list[str]:
    """The calls that led to the record, the one that logs it last; without the log library's own."""
    frames = traceback.extract_stack()
    own = [n for n, f in enumerate(frames) if (f.filename, f.lineno) == (record.pathname, record.lineno)]
    return traceback.format_list(frames[: own[-1] + 1] if own else frames)


def setup(verbosity: int, vmodule: Sequence[tuple[str, int]] = (), backtrace_at: str = "") -> None:
    """Log to stderr. `vmodule` pairs patterns of file names (without `.py`) with the level each raises to."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KlogFormatter(backtrace_at))
    handler.addFilter(_shown(verbosity, vmodule))
    logger.handlers[:] = [handler]
    most = max([verbosity, *(level for _, level in vmodule)])
    logger.setLevel(min((level for level, v in _VERBOSITY.items() if v <= most), default=logging.INFO))
    logger.propagate = False


def _shown(verbosity: int, vmodule: Sequence[tuple[str, int]]) -> Callable[[logging.LogRecord], bool]:
    """klog's rule: the first pattern that matches the file counts, and can only raise the verbosity."""

    def shown(record: logging.LogRecord) -> bool:
        level = _VERBOSITY.get(record.levelno, 0)
        if level <= max(verbosity, 0):
            return True
        raised = (n for pattern, n in vmodule if fnmatchcase(record.module, pattern.replace("[^", "[!")))
        return level <= next(raised, 0)

    return shown


class OncePerChange:
    """Says a thing when it changes, not each time it is true."""

    def __init__(self) -> None:
        self._said = ""

    def trouble(self, text: str) -> None:
        """Log `text` as a warning unless it was the last thing said."""
        if text != self._said:
            logger.warning("%s", text)
            self._said = text

    def over(self, text: str) -> None:
        """Log `text` if there was trouble before."""
        if self._said:
            logger.info("%s", text)
            self._said = ""
