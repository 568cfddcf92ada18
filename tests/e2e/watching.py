"""A watch that runs in a thread, for tests: collects what comes and folds it."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Thread

from cni.errors import StoreError
from flanneld.lease import Lease, LeaseSet, Snapshot, Update
from flanneld.subnet.manager import SubnetManager


def wait_for(predicate: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return once `predicate` holds; AssertionError after `timeout_s`."""
    limit = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < limit, f"condition did not come true within {timeout_s} s"
        time.sleep(0.01)


class Watching:
    """Runs `manager.watch` until it ends; use as a context manager, which waits for the first snapshot."""

    def __init__(self, manager: SubnetManager) -> None:
        self.updates: list[Update] = []
        self.error: StoreError | None = None
        self.stop = Event()
        self._manager = manager
        self._folded = LeaseSet()
        self.thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watching:
        self.thread.start()
        wait_for(lambda: bool(self.updates) or not self.thread.is_alive())
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(5)
        assert not self.thread.is_alive()

    @property
    def leases(self) -> dict[str, Lease]:
        """All leases as of now, by key."""
        return dict(self._folded.by_key)

    @property
    def snapshots(self) -> int:
        return sum(isinstance(update, Snapshot) for update in self.updates)

    def wait_until(self, predicate: Callable[[dict[str, Lease]], bool], timeout_s: float = 10.0) -> None:
        wait_for(lambda: predicate(self.leases), timeout_s)

    def _run(self) -> None:
        try:
            for update in self._manager.watch(self.stop):
                self._folded = self._folded.fold(update)
                self.updates.append(update)
        except StoreError as exc:
            self.error = exc
