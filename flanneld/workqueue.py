"""A queue of keys that need work, with the semantics of client-go's `util/workqueue`.

Promises:

* Fair: keys are handed out in the order in which they were added or became due.
* Stingy: a key is processed by one worker at a time; a key added many times before it is processed is
  processed once; a key added while it is processed is processed once more afterwards.
* Many producers and many consumers: every method may be called from any thread, and a key may be added
  by its own worker.
* Patient: a key can be added for later. It waits at most once, and the earliest time asked for wins.
  `add` does not cancel a wait.
* Shutdown: no key is accepted any more, keys still waiting for their time are dropped, queued keys are
  handed out, and then every `get` raises `ShutDown`. A drain also waits until the last key is done.

A worker is a loop:

    while True:
        try:
            key = queue.get()
        except ShutDown:
            return
        try:
            ...
        finally:
            queue.done(key)

Decision: no thread of its own. Every call first moves the keys whose time has come, so the order is the
one a timer thread would give, and an idle worker sleeps exactly until the next key is due.

Decision: a drain waits for queued keys too, as client-go documents; its code looks only at the keys in
processing and can return between one key and the next.

Decision: `done` for a key that is not in processing raises. client-go lets it pass, and then may queue
a key twice.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

from cni.errors import InternalError

K = TypeVar("K", bound=Hashable)


class ShutDown(Exception):
    """The queue is shut down and holds nothing more to hand out: the worker should end."""


class Clock(Protocol):
    """Where the queue's time comes from."""

    def now(self) -> float:
        """Seconds since some fixed moment; never goes back."""
        ...

    def wait_until(self, condition: threading.Condition, when: float | None) -> None:
        """Wait, holding `condition`, until it is notified or `now()` reaches `when`; None is never.

        May return early; the caller looks at the clock and at its own state again.
        """
        ...


class MonotonicClock:
    """The system's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()

    def wait_until(self, condition: threading.Condition, when: float | None) -> None:
        if when is None:
            condition.wait()
        else:
            condition.wait(min(when - self.now(), threading.TIMEOUT_MAX))


class _Ready(Generic[K]):
    """The keys to work on now. Pure: holds no lock and no clock."""

    def __init__(self) -> None:
        # In the order of handing out. Every key here is in _dirty and none is in _processing.
        self._queue: deque[K] = deque()
        # Keys that need processing: exactly those in _queue, and those added again while in _processing.
        self._dirty: set[K] = set()
        # Keys handed out and not yet done. One that is also in _dirty is queued again when it is done.
        self._processing: set[K] = set()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued and nothing is in processing (then nothing is dirty either)."""
        return not self._queue and not self._processing

    def add(self, key: K) -> None:
        if key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._processing:
            self._queue.append(key)

    def take(self) -> K:
        key = self._queue.popleft()
        self._dirty.remove(key)
        self._processing.add(key)
        return key

    def done(self, key: K) -> None:
        if key not in self._processing:
            raise InternalError(f"done({key!r}): this key is not in processing; call done once for each get")
        self._processing.remove(key)
        if key in self._dirty:
            self._queue.append(key)


class _Waiting(Generic[K]):
    """The keys to work on later. Pure: holds no lock and no clock.

    A sorted list rather than a heap: a key whose time moves forward leaves nothing stale behind, and with
    some thousand keys shifting the list costs about a microsecond.
    """

    def __init__(self) -> None:
        # (due, number, key), sorted; one per key. Numbers are unique, so keys are never compared.
        self._order: list[tuple[float, int, K]] = []
        # The same entries by key.
        self._entries: dict[K, tuple[float, int, K]] = {}
        # Of the next entry; keys due at the same moment leave in the order in which they came.
        self._number = 0

    def put(self, key: K, due: float) -> None:
        """Let `key` wait until `due`, or until the earlier time for which it waits already."""
        known = self._entries.get(key)
        if known is not None:
            if known[0] <= due:
                return
            del self._order[bisect_left(self._order, known)]
        self._entries[key] = entry = (due, self._number, key)
        self._number += 1
        insort(self._order, entry)

    def pop_due(self, now: float) -> list[K]:
        """Remove the keys whose time has come and return them, earliest first."""
        keys: list[K] = []
        while self._order and self._order[0][0] <= now:
            key = self._order.pop(0)[2]
            del self._entries[key]
            keys.append(key)
        return keys

    @property
    def next_due(self) -> float | None:
        """When the first key is due; None when none waits."""
        return self._order[0][0] if self._order else None

    def clear(self) -> None:
        self._order.clear()
        self._entries.clear()


class WorkQueue(Generic[K]):
    """A fair and stingy queue; see the module's text for its promises."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Guards every field of the queue and of its subclasses. Workers and drains wait on it for
        # different things, so every change wakes all.
        self._changed = threading.Condition()
        self._ready: _Ready[K] = _Ready()
        # Once true, it stays true and no key is accepted.
        self._shutting_down = False
        # Whether a drain may go on waiting. True only while _shutting_down.
        self._draining = False

    def add(self, key: K) -> None:
        """Mark `key` as needing work; ignored after shutdown."""
        with self._changed:
            self._advance(self._clock.now())
            if not self._shutting_down:
                self._ready.add(key)
                self._changed.notify_all()

    def get(self, timeout_s: float | None = None) -> K:
        """Hand out the next key, waiting for one if need be; the caller owes a `done` for it.

        Raises ShutDown when the queue is shut down and nothing is queued, TimeoutError when no key came
        within `timeout_s` (None waits for ever, 0 does not wait).
        """
        with self._changed:
            deadline = self._deadline(timeout_s)
            while True:
                now = self._clock.now()
                next_due = self._advance(now)
                if len(self._ready):
                    return self._ready.take()
                if self._shutting_down:
                    raise ShutDown
                if deadline is not None and deadline <= now:
                    raise TimeoutError(f"no key within {timeout_s} s")
                moments = [when for when in (next_due, deadline) if when is not None]
                self._clock.wait_until(self._changed, min(moments, default=None))

    def done(self, key: K) -> None:
        """Say that the work on `key` is over; if it was added meanwhile, it is queued again.

        Raises InternalError when the key is not in processing.
        """
        with self._changed:
            self._advance(self._clock.now())
            self._ready.done(key)
            self._changed.notify_all()

    def __len__(self) -> int:
        """How many keys are ready to be handed out; for information, it may change at any moment."""
        with self._changed:
            self._advance(self._clock.now())
            return len(self._ready)

    def shut_down(self) -> None:
        """Accept no more keys and let workers end once the queue is empty; ends a drain in another thread."""
        self._stop(draining=False)

    def shut_down_with_drain(self, timeout_s: float | None = None) -> bool:
        """Shut down and wait until every queued key has been handed out and is done.

        Returns whether that came true; False after `timeout_s` (None is no limit) or when `shut_down` was
        called meanwhile. Workers must go on calling `get` and `done`, or this waits for the whole time.
        """
        with self._changed:
            self._stop(draining=True)
            deadline = self._deadline(timeout_s)
            while self._draining and not self._ready.idle:
                if deadline is not None and deadline <= self._clock.now():
                    break
                self._clock.wait_until(self._changed, deadline)
            return self._ready.idle

    @property
    def shutting_down(self) -> bool:
        """Whether the queue has stopped accepting keys."""
        with self._changed:
            return self._shutting_down

    def _deadline(self, timeout_s: float | None) -> float | None:
        return None if timeout_s is None else self._clock.now() + timeout_s

    def _stop(self, draining: bool) -> None:
        with self._changed:
            # What became due before the shutdown was added before it.
            self._advance(self._clock.now())
            self._shutting_down = True
            self._draining = draining
            self._changed.notify_all()

    def _advance(self, now: float) -> float | None:
        """Queue the keys due at `now` and return when the next one is; here, keys do not wait."""
        return None


class DelayingQueue(WorkQueue[K]):
    """A work queue that also takes keys for later."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        # Keys to add when their time comes, whether or not they are also queued or in processing now.
        # Empty once _shutting_down.
        self._waiting: _Waiting[K] = _Waiting()

    def add_after(self, key: K, delay_s: float) -> None:
        """Add `key` in `delay_s` seconds, or sooner if it waits for less already; at once if not positive.

        Ignored after shutdown.
        """
        with self._changed:
            if delay_s <= 0:
                self.add(key)
            elif not self._shutting_down:
                now = self._clock.now()
                # A key that is due no longer waits, and must not swallow this one.
                self._advance(now)
                self._waiting.put(key, now + delay_s)
                self._changed.notify_all()

    def _advance(self, now: float) -> float | None:
        for key in self._waiting.pop_due(now):
            self._ready.add(key)
        return self._waiting.next_due

    def _stop(self, draining: bool) -> None:
        with self._changed:
            super()._stop(draining)
            self._waiting.clear()


class Limiter(Protocol):
    """Decides how long a key that failed has to wait.

    A limiter belongs to one queue, which calls it under its lock; limiters need no lock of their own.
    """

    def when(self, key: Hashable) -> float:
        """Count one more attempt for `key` and return how many seconds it must wait."""
        ...

    def forget(self, key: Hashable) -> None:
        """Stop tracking `key`, whether its work succeeded or was given up."""
        ...

    def num_requeues(self, key: Hashable) -> int:
        """How many attempts were counted since `key` was last forgotten."""
        ...


class RateLimitedQueue(DelayingQueue[K]):
    """A work queue that takes keys that failed, for as late as a limiter says.

    `done` does not forget: call `forget` when the work succeeded, `add_rate_limited` when it failed.
    """

    def __init__(self, clock: Clock, limiter: Limiter) -> None:
        super().__init__(clock)
        self._limiter = limiter

    def add_rate_limited(self, key: K) -> None:
        """Add `key` once the limiter allows it. After shutdown the key is counted but not added."""
        with self._changed:
            self.add_after(key, self._limiter.when(key))

    def forget(self, key: K) -> None:
        """Let the limiter treat the next failure of `key` as its first. Does not remove it from the queue."""
        with self._changed:
            self._limiter.forget(key)

    def num_requeues(self, key: K) -> int:
        """How often `key` was added with a rate limit since it was last forgotten."""
        with self._changed:
            return self._limiter.num_requeues(key)


class BucketLimiter:
    """A token bucket over all keys together; waits as the reservations of golang.org/x/time/rate do.

    `burst` attempts (at least 1) pass at once, then `rate` a second (above 0). An attempt that has to wait
    reserves its token, so that the next one waits longer.
    """

    def __init__(self, clock: Clock, rate: float, burst: int) -> None:
        if rate <= 0 or burst < 1:
            raise ValueError(f"token bucket of rate {rate} and burst {burst}: must be above 0 and at least 1")
        self._clock = clock
        self._rate = rate
        self._burst = burst
        # Tokens at the moment _last, at most _burst; negative when tokens of the future are reserved.
        self._tokens = float(burst)
        self._last = clock.now()

    def when(self, key: Hashable) -> float:
        now = self._clock.now()
        self._tokens = min(self._burst, self._tokens + (now - self._last) * self._rate) - 1
        self._last = now
        return max(0.0, -self._tokens / self._rate)

    def forget(self, key: Hashable) -> None:
        """Does nothing: a token is spent, whoever it was for."""

    def num_requeues(self, key: Hashable) -> int:
        """Always 0: keys are not told apart."""
        return 0


class ExponentialLimiter:
    """For each key `base_s`, then twice as long at each further attempt, up to `cap_s`."""

    def __init__(self, base_s: float, cap_s: float) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        # Attempts of each key since it was last forgotten; no entry is none.
        self._attempts: Counter[Hashable] = Counter()

    def when(self, key: Hashable) -> float:
        attempts = self._attempts[key]
        self._attempts[key] += 1
        # 2.0 ** 1024 raises OverflowError; a product too large is infinite, and then the cap holds.
        return min(self._cap_s, self._base_s * 2.0 ** min(attempts, 1023))

    def forget(self, key: Hashable) -> None:
        del self._attempts[key]

    def num_requeues(self, key: Hashable) -> int:
        return self._attempts[key]


class FastSlowLimiter:
    """For each key `fast_s` for the first `fast_attempts` attempts, then `slow_s`."""

    def __init__(self, fast_s: float, slow_s: float, fast_attempts: int) -> None:
        self._fast_s = fast_s
        self._slow_s = slow_s
        self._fast_attempts = fast_attempts
        # Attempts of each key since it was last forgotten; no entry is none.
        self._attempts: Counter[Hashable] = Counter()

    def when(self, key: Hashable) -> float:
        self._attempts[key] += 1
        return self._fast_s if self._attempts[key] <= self._fast_attempts else self._slow_s

    def forget(self, key: Hashable) -> None:
        del self._attempts[key]

    def num_requeues(self, key: Hashable) -> int:
        return self._attempts[key]


class MaxLimiter:
    """The longest wait that any of `limiters` asks for; each of them counts every attempt."""

    def __init__(self, *limiters: Limiter) -> None:
        self._limiters = limiters

    def when(self, key: Hashable) -> float:
        return max(limiter.when(key) for limiter in self._limiters)

    def forget(self, key: Hashable) -> None:
        for limiter in self._limiters:
            limiter.forget(key)

    def num_requeues(self, key: Hashable) -> int:
        return max(limiter.num_requeues(key) for limiter in self._limiters)


def default_limiter(clock: Clock) -> Limiter:
    """As client-go's for controllers: each key 5 ms to 1000 s; all keys a burst of 100, then 10 a second."""
    return MaxLimiter(
        ExponentialLimiter(base_s=0.005, cap_s=1000.0), BucketLimiter(clock, rate=10.0, burst=100)
    )


class FakeClock:
    """A clock for tests: time stands still until `advance` moves it and wakes whoever waits."""

    def __init__(self, now: float = 0.0) -> None:
        # Guards the fields below. May be taken while a waiter's condition is held, never the other way.
        self._changed = threading.Condition()
        self._now = now
        # The condition of each thread in wait_until; one condition may stand here several times.
        self._sleepers: list[threading.Condition] = []

    def now(self) -> float:
        with self._changed:
            return self._now

    def wait_until(self, condition: threading.Condition, when: float | None) -> None:
        # The clock is read and the sleeper noted under one lock, so that no advance falls in between.
        with self._changed:
            if when is not None and when <= self._now:
                return
            self._sleepers.append(condition)
            self._changed.notify_all()
        try:
            condition.wait()
        finally:
            with self._changed:
                self._sleepers.remove(condition)

    def advance(self, seconds: float) -> None:
        """Move the time forward and wake every thread in `wait_until`."""
        with self._changed:
            self._now += seconds
            conditions = set(self._sleepers)
        for condition in conditions:
            with condition:
                condition.notify_all()

    def await_sleepers(self, count: int, timeout_s: float = 10.0) -> None:
        """Block until at least `count` threads are in `wait_until`.

        Raises TimeoutError after `timeout_s` of real time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._sleepers) >= count, timeout_s):
                raise TimeoutError(f"{len(self._sleepers)} threads wait, not {count}, after {timeout_s} s")
