"""Log lines as klog writes them, so that what reads flannel's log reads ours.

`I0629 14:28:35.866793    5522 reconcile.py:86] message`: severity, month and day, local time, process,
place. Errors with the remedy are E, things that go on worse are W, changes in the world are I.
"""

from __future__ import annotations

import logging
import sys
import time

logger = logging.getLogger("flanneld")

_SEVERITY = {logging.DEBUG: "I", logging.INFO: "I", logging.WARNING: "W", logging.ERROR: "E"}


class KlogFormatter(logging.Formatter):
    """klog's text format."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%m%d %H:%M:%S", time.localtime(record.created))
        micros = int(record.created % 1 * 1_000_000)
        severity = _SEVERITY.get(record.levelno, "E")
        place = f"{record.filename}:{record.lineno}"
        line = f"{severity}{moment}.{micros:06d} {record.process:7d} {place}] {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def setup(verbosity: int) -> None:
    """Log to stderr; `verbosity` 0 shows changes and trouble, 4 and more each operation."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KlogFormatter())
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbosity >= 4 else logging.INFO)
    logger.propagate = False


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
