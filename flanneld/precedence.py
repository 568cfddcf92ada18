"""Pods before peers: who reads or programs thousands of peers lets the calls of the CNI plugin through.

Both need the kernel's one lock for its network configuration, which is not given in the order of asking, and
Python's own: a pod would wait for most of the peers. Peers that come some milliseconds later harm nobody.
"""

from __future__ import annotations

import time
from threading import Condition, Lock

# Under a steady stream of pods the peers still get on: after so long for so long.
_LONGEST_S, _TURN_S = 0.02, 0.005


class Precedence:
    """A context manager within which a call is served that others are to let through. For any thread."""

    def __init__(self) -> None:
        self._mutex = Lock()
        self._condition = Condition(self._mutex)
        self._calls = 0
        self._waited_s = self._turn_ends_s = 0.0

    def __enter__(self) -> None:
        with self._mutex:
            self._calls += 1

    def __exit__(self, *_exc: object) -> None:
        with self._mutex:
            self._calls -= 1
            if not self._calls:
                self._condition.notify_all()

    def calls(self) -> int:
        """How many are being served."""
        return self._calls

    def give_way(self) -> None:
        """Return once no call is being served, or after some time. It costs nothing if there is none."""
        began_s = time.monotonic() if self._calls else 0.0
        if began_s <= self._turn_ends_s:
            return
        with self._condition:
            self._condition.wait_for(lambda: not self._calls, _LONGEST_S)
            now_s = time.monotonic()
            self._waited_s += now_s - began_s
            if self._waited_s >= _LONGEST_S:
                self._waited_s, self._turn_ends_s = 0.0, now_s + _TURN_S
