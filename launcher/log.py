"""Log lines on stderr: `time LEVEL message`."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("virt-launcher")


def setup(verbose: bool) -> None:
    """Log changes and trouble; with `verbose` each operation."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
