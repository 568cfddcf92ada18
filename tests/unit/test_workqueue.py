"""The work queue's promises, one by one with real threads, then all at once against a naive model."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cni.errors import InternalError
from flanneld.workqueue import (
    BucketLimiter,
    Clock,
    DelayingQueue,
    ExponentialLimiter,
    FakeClock,
    FastSlowLimiter,
    Limiter,
    MaxLimiter,
    MonotonicClock,
    RateLimitedQueue,
    ShutDown,
    WorkQueue,
    default_limiter,
)

R = TypeVar("R")
LONG_S = 20.0


class Call(Generic[R]):
    """A function running in a thread of its own."""

    def __init__(self, function: Callable[[], R]) -> None:
        self._function = function
        self._outcome: list[R] = []
        self._error: list[Exception] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome.append(self._function())
        except Exception as exc:  # noqa: BLE001 - the top of the thread; result() raises it
            self._error.append(exc)

    def result(self) -> R:
        """What the function returned or raised; fails when it is not over in good time."""
        self._thread.join(LONG_S)
        assert not self._thread.is_alive(), "the call still blocks"
        if self._error:
            raise self._error[0]
        return self._outcome[0]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(now=1000.0)


@pytest.fixture
def queue(clock: FakeClock) -> DelayingQueue[str]:
    return DelayingQueue(clock)


def rest(queue: WorkQueue[str]) -> list[str]:
    """Hand out, without waiting, everything that is ready, and report it done."""
    keys: list[str] = []
    while True:
        try:
            keys.append(queue.get(0))
        except (TimeoutError, ShutDown):
            return keys
        queue.done(keys[-1])


# Fair and stingy


def test_keys_leave_in_the_order_in_which_they_came(queue: WorkQueue[str]) -> None:
    for key in ("b", "a", "c", "a", "b"):
        queue.add(key)
    assert rest(queue) == ["b", "a", "c"]


def test_length_counts_what_is_ready(queue: DelayingQueue[str]) -> None:
    queue.add("a")
    queue.add("b")
    queue.add("a")
    queue.add_after("later", 5)
    assert len(queue) == 2
    queue.get(0)
    assert len(queue) == 1


def test_a_key_in_processing_is_not_handed_out_again_before_it_is_done(queue: WorkQueue[str]) -> None:
    queue.add("a")
    assert queue.get(0) == "a"
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0
    with pytest.raises(TimeoutError):
        queue.get(0)
    queue.done("a")
    assert rest(queue) == ["a"]


def test_a_key_added_again_while_processed_goes_to_the_end(queue: WorkQueue[str]) -> None:
    queue.add("a")
    queue.get(0)
    queue.add("a")
    queue.add("b")
    queue.done("a")
    assert rest(queue) == ["b", "a"]


@pytest.mark.parametrize("added", [False, True])
def test_done_without_get_is_refused(queue: WorkQueue[str], added: bool) -> None:
    if added:
        queue.add("a")
    with pytest.raises(InternalError, match="'a'"):
        queue.done("a")
    assert rest(queue) == ["a"] * added


def test_the_queue_keeps_no_reference_to_a_key_that_is_done(clock: FakeClock) -> None:
    class Key:
        pass

    keys: RateLimitedQueue[Key] = RateLimitedQueue(clock, default_limiter(clock))
    key = Key()
    trace = weakref.ref(key)
    keys.add_after(key, 5)
    keys.add_after(key, 3)
    keys.add_rate_limited(key)
    keys.add(key)
    clock.advance(5)
    for _ in range(len(keys)):
        keys.done(keys.get(0))
    keys.forget(key)
    del key
    gc.collect()
    assert trace() is None


# Waiting in get


def test_get_waits_for_a_key(queue: WorkQueue[str], clock: FakeClock) -> None:
    call = Call(queue.get)
    clock.await_sleepers(1)
    queue.add("a")
    assert call.result() == "a"


def test_done_wakes_a_worker_for_a_key_added_again(queue: WorkQueue[str], clock: FakeClock) -> None:
    queue.add("a")
    queue.get(0)
    queue.add("a")
    call = Call(queue.get)
    clock.await_sleepers(1)
    queue.done("a")
    assert call.result() == "a"


def test_get_gives_up_when_its_time_is_over_and_not_before(queue: WorkQueue[str], clock: FakeClock) -> None:
    early, late = Call(lambda: queue.get(2)), Call(lambda: queue.get(3))
    clock.await_sleepers(2)
    clock.advance(2)
    with pytest.raises(TimeoutError):
        early.result()
    queue.add("a")
    assert late.result() == "a"


# Patient


def test_a_key_comes_when_it_is_due_and_not_before(queue: DelayingQueue[str], clock: FakeClock) -> None:
    queue.add_after("a", 0.05)
    clock.advance(0.04)
    assert rest(queue) == []
    clock.advance(0.02)
    assert len(queue) == 1
    assert rest(queue) == ["a"]
    clock.advance(10)
    assert rest(queue) == []


@pytest.mark.parametrize("delays", [(5, 7), (7, 5)])
def test_a_key_waits_once_and_the_earlier_time_wins(
    queue: DelayingQueue[str], clock: FakeClock, delays: tuple[float, float]
) -> None:
    for delay_s in delays:
        queue.add_after("a", delay_s)
    clock.advance(5)
    assert rest(queue) == ["a"]
    clock.advance(10)
    assert rest(queue) == []


def test_keys_come_in_the_order_of_their_times(queue: DelayingQueue[str], clock: FakeClock) -> None:
    for key, delay_s in (("d", 3), ("b", 1), ("c", 2), ("a", 0), ("c2", 2)):
        queue.add_after(key, delay_s)
    clock.advance(3)
    queue.add("e")
    assert rest(queue) == ["a", "b", "c", "c2", "d", "e"]


def test_a_key_keeps_its_place_when_the_same_time_is_asked_for_again(
    queue: DelayingQueue[str], clock: FakeClock
) -> None:
    for key in ("a", "b", "a"):
        queue.add_after(key, 5)
    clock.advance(5)
    assert rest(queue) == ["a", "b"]


def test_a_key_due_before_another_is_done_goes_first(queue: DelayingQueue[str], clock: FakeClock) -> None:
    queue.add("a")
    queue.get(0)
    queue.add("a")
    queue.add_after("b", 1)
    clock.advance(1)
    queue.done("a")
    assert rest(queue) == ["b", "a"]


@pytest.mark.parametrize("delay_s", [0, -1])
def test_no_delay_is_an_add(queue: DelayingQueue[str], delay_s: float) -> None:
    queue.add_after("a", delay_s)
    assert rest(queue) == ["a"]


def test_add_leaves_a_wait_alone(queue: DelayingQueue[str], clock: FakeClock) -> None:
    queue.add_after("a", 5)
    queue.add("a")
    assert rest(queue) == ["a"]
    clock.advance(5)
    assert rest(queue) == ["a"]


def test_a_key_that_became_due_unseen_does_not_swallow_the_next_wait(
    queue: DelayingQueue[str], clock: FakeClock
) -> None:
    queue.add_after("a", 1)
    clock.advance(2)
    queue.add_after("a", 1)
    assert rest(queue) == ["a"]
    clock.advance(1)
    assert rest(queue) == ["a"]


def test_a_key_due_while_processed_is_processed_again(queue: DelayingQueue[str], clock: FakeClock) -> None:
    queue.add("a")
    queue.get(0)
    queue.add_after("a", 1)
    clock.advance(1)
    assert len(queue) == 0
    queue.done("a")
    assert rest(queue) == ["a"]


def test_sleeping_workers_wake_for_keys_that_become_due(queue: DelayingQueue[str], clock: FakeClock) -> None:
    calls = [Call(queue.get), Call(queue.get)]
    clock.await_sleepers(2)
    queue.add_after("slow", 10)
    queue.add_after("fast", 1)
    clock.advance(1)
    clock.advance(9)
    assert {call.result() for call in calls} == {"slow", "fast"}


def test_a_nearer_key_shortens_the_sleep() -> None:
    asked: list[float | None] = []
    shortened = threading.Event()

    class Watched(FakeClock):
        def wait_until(self, condition: threading.Condition, when: float | None) -> None:
            asked.append(when)
            if when == 1:
                shortened.set()
            super().wait_until(condition, when)

    clock = Watched()
    queue: DelayingQueue[str] = DelayingQueue(clock)
    queue.add_after("slow", 10)
    call = Call(lambda: queue.get(7))
    clock.await_sleepers(1)
    queue.add_after("fast", 1)
    assert shortened.wait(LONG_S)
    assert asked == [7, 1]
    clock.advance(1)
    assert call.result() == "fast"


def test_the_real_clock_keeps_a_delay() -> None:
    clock = MonotonicClock()
    queue: DelayingQueue[str] = DelayingQueue(clock)
    start = clock.now()
    queue.add_after("a", 0.02)
    assert queue.get(LONG_S) == "a"
    assert 0.02 <= clock.now() - start < LONG_S / 2
    with pytest.raises(TimeoutError):
        queue.get(0.001)


# Shutdown


def test_shutdown_hands_out_what_is_queued_and_refuses_the_rest(clock: FakeClock) -> None:
    queue: RateLimitedQueue[str] = RateLimitedQueue(clock, default_limiter(clock))
    queue.add("a")
    queue.add("b")
    queue.add_after("due", 1)
    queue.add_after("waits", 5)
    clock.advance(1)
    assert not queue.shutting_down
    queue.shut_down()
    assert queue.shutting_down
    queue.add("late")
    queue.add_after("late", 0)
    queue.add_after("late", 1)
    queue.add_rate_limited("late")
    clock.advance(10)
    assert rest(queue) == ["a", "b", "due"]
    with pytest.raises(ShutDown):
        queue.get()


def test_shutdown_wakes_every_worker(queue: WorkQueue[str], clock: FakeClock) -> None:
    calls = [Call(queue.get) for _ in range(5)]
    clock.await_sleepers(5)
    queue.shut_down()
    for call in calls:
        with pytest.raises(ShutDown):
            call.result()


def test_a_drain_of_an_idle_queue_is_over_at_once(queue: DelayingQueue[str]) -> None:
    queue.add_after("waits", 5)
    assert queue.shut_down_with_drain()
    assert queue.shutting_down


def test_a_drain_waits_for_the_last_key_to_be_done(queue: WorkQueue[str], clock: FakeClock) -> None:
    for key in ("a", "b", "c"):
        queue.add(key)
    queue.get(0)
    drain = Call(lambda: queue.shut_down_with_drain(60))
    clock.await_sleepers(1)
    queue.done("a")  # nothing is in processing now, but b and c are still queued
    for key in ("b", "c"):
        assert queue.get() == key
        queue.done(key)
    assert drain.result()
    with pytest.raises(ShutDown):
        queue.get()


def test_a_drain_includes_keys_added_again_before_it(queue: WorkQueue[str], clock: FakeClock) -> None:
    queue.add("a")
    queue.get(0)
    queue.add("a")
    drain = Call(queue.shut_down_with_drain)
    clock.await_sleepers(1)
    with pytest.raises(ShutDown):
        queue.get()
    queue.add("b")
    queue.done("a")
    assert queue.get() == "a"
    queue.add("a")
    queue.done("a")
    assert drain.result()
    with pytest.raises(ShutDown):
        queue.get()


def test_shutdown_ends_a_drain(queue: WorkQueue[str], clock: FakeClock) -> None:
    queue.add("a")
    queue.get(0)
    drain = Call(queue.shut_down_with_drain)
    clock.await_sleepers(1)
    queue.shut_down()
    assert not drain.result()


def test_a_drain_gives_up_when_its_time_is_over(queue: WorkQueue[str], clock: FakeClock) -> None:
    queue.add("a")
    queue.get(0)
    drain = Call(lambda: queue.shut_down_with_drain(3))
    clock.await_sleepers(1)
    clock.advance(3)
    assert not drain.result()
    queue.done("a")
    assert queue.shut_down_with_drain(0)


# Many producers and consumers


class Crowd:
    """Workers that check, for each key, that it is theirs alone and that its last version was seen."""

    def __init__(self, queue: DelayingQueue[int], keys: int, workers: int) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._busy: set[int] = set()
        self._seen = [0] * keys
        self._written = [0] * keys
        self._caught_up = threading.Condition(self._lock)
        self.handed_out = Counter[int]()
        self._workers = [Call(self._work) for _ in range(workers)]

    def write(self, key: int) -> None:
        """Change what `key` stands for; the caller adds the key afterwards."""
        with self._lock:
            self._written[key] += 1

    def _work(self) -> None:
        while True:
            try:
                key = self._queue.get()
            except ShutDown:
                return
            with self._lock:
                assert key not in self._busy, f"two workers process {key}"
                self._busy.add(key)
                self.handed_out[key] += 1
                version = self._written[key]
            with self._lock:
                self._busy.remove(key)
                self._seen[key] = max(self._seen[key], version)
                self._caught_up.notify_all()
            self._queue.done(key)

    def await_caught_up(self) -> None:
        with self._caught_up:
            assert self._caught_up.wait_for(lambda: self._seen == self._written, LONG_S), "a key was lost"

    def join(self) -> None:
        for worker in self._workers:
            worker.result()


def produce(queue: DelayingQueue[int], crowd: Crowd, keys: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        key = rng.randrange(keys)
        crowd.write(key)
        queue.add_after(key, rng.choice((0, 0, 0.0005, 0.003)))


@pytest.mark.parametrize(("producers", "workers"), [(1, 1), (1, 8), (8, 1), (8, 8)])
def test_no_key_is_lost_or_shared_among_threads(producers: int, workers: int) -> None:
    keys = 20
    queue: DelayingQueue[int] = DelayingQueue(MonotonicClock())
    crowd = Crowd(queue, keys, workers)
    sources = [Call(partial(produce, queue, crowd, keys, seed)) for seed in range(producers)]
    for source in sources:
        source.result()
    crowd.await_caught_up()
    assert queue.shut_down_with_drain(LONG_S)
    crowd.join()
    assert sum(crowd.handed_out.values()) <= producers * 300


def test_workers_drain_everything_that_was_queued() -> None:
    queue: DelayingQueue[int] = DelayingQueue(MonotonicClock())
    for key in range(500):
        queue.add(key)
    crowd = Crowd(queue, 500, 8)
    assert queue.shut_down_with_drain(LONG_S)
    assert crowd.handed_out == Counter(range(500))
    crowd.join()


# Limiters


def test_exponential_doubles_per_key_and_forgets() -> None:
    limiter = ExponentialLimiter(base_s=0.001, cap_s=1)
    assert [limiter.when("one") for _ in range(5)] == [0.001, 0.002, 0.004, 0.008, 0.016]
    assert limiter.num_requeues("one") == 5
    assert [limiter.when("two") for _ in range(2)] == [0.001, 0.002]
    assert limiter.num_requeues("two") == 2
    limiter.forget("one")
    limiter.forget("unknown")
    assert limiter.num_requeues("one") == 0
    assert limiter.when("one") == 0.001


@pytest.mark.parametrize(
    ("base_s", "cap_s", "attempts", "wait_s"),
    [
        (0.001, 1000, 5, 0.032),
        (0.001, 1000, 1000, 1000),
        (0.001, 1000, 5000, 1000),
        (60, 3_600_000, 2, 240),
        (60, 3_600_000, 5000, 3_600_000),
        (5, 2, 0, 2),
    ],
)
def test_exponential_is_capped_and_never_overflows(
    base_s: float, cap_s: float, attempts: int, wait_s: float
) -> None:
    limiter = ExponentialLimiter(base_s, cap_s)
    for _ in range(attempts):
        limiter.when("one")
    assert limiter.when("one") == wait_s


def test_fast_slow() -> None:
    limiter = FastSlowLimiter(fast_s=0.005, slow_s=10, fast_attempts=3)
    assert [limiter.when("one") for _ in range(5)] == [0.005, 0.005, 0.005, 10, 10]
    assert limiter.num_requeues("one") == 5
    assert [limiter.when("two") for _ in range(2)] == [0.005, 0.005]
    assert limiter.num_requeues("two") == 2
    limiter.forget("one")
    limiter.forget("unknown")
    assert limiter.num_requeues("one") == 0
    assert limiter.when("one") == 0.005


def test_maximum_of_several() -> None:
    limiter = MaxLimiter(FastSlowLimiter(0.005, 3, 3), ExponentialLimiter(0.001, 1))
    assert [limiter.when("one") for _ in range(5)] == [0.005, 0.005, 0.005, 3, 3]
    assert limiter.num_requeues("one") == 5
    assert [limiter.when("two") for _ in range(2)] == [0.005, 0.005]
    assert limiter.num_requeues("two") == 2
    limiter.forget("one")
    assert limiter.num_requeues("one") == 0
    assert limiter.when("one") == 0.005


def test_bucket_spends_its_burst_then_reserves_and_refills(clock: FakeClock) -> None:
    limiter = BucketLimiter(clock, rate=2, burst=3)
    assert [limiter.when(key) for key in "abcab"] == [0, 0, 0, 0.5, 1.0]
    clock.advance(0.25)
    assert limiter.when("a") == 1.25
    limiter.forget("a")
    assert limiter.num_requeues("a") == 0
    clock.advance(1.75)
    assert limiter.when("a") == 0
    clock.advance(1000)  # refills to the burst and no further
    assert [limiter.when("a") for _ in range(4)] == [0, 0, 0, 0.5]


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0)])
def test_a_bucket_that_lets_nothing_through_is_refused(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at least 1"):
        BucketLimiter(FakeClock(), rate, burst)


def earliest(acts: list[float], now: float, rate: float, burst: int) -> float:
    """The first moment from `now` on at which no window holds more than its `burst + rate * length`."""
    count = len(acts)
    return max([now, *(act + (count - i + 1 - burst) / rate for i, act in enumerate(acts))])


@settings(deadline=None)
@given(
    rate=st.sampled_from([0.25, 1.0, 2.0, 8.0]),
    burst=st.integers(1, 5),
    gaps=st.lists(st.integers(0, 40).map(lambda n: n / 8), max_size=40),
)
def test_bucket_lets_each_attempt_through_as_early_as_the_rate_allows(
    rate: float, burst: int, gaps: list[float]
) -> None:
    clock = FakeClock()
    limiter = BucketLimiter(clock, rate, burst)
    acts: list[float] = []
    for gap in gaps:
        clock.advance(gap)
        expected = earliest(acts, clock.now(), rate, burst)
        acts.append(clock.now() + limiter.when("any"))
        assert acts[-1] == expected


def test_default_limiter(clock: FakeClock) -> None:
    limiter = default_limiter(clock)
    assert [limiter.when("one") for _ in range(3)] == [0.005, 0.01, 0.02]
    for n in range(97):
        assert limiter.when(n) == 0.005
    assert [limiter.when(key) for key in ("x", "y")] == pytest.approx([0.1, 0.2])
    assert limiter.num_requeues("one") == 3
    for _ in range(20):
        limiter.when("one")
    assert limiter.when("one") == 1000


def test_a_failed_key_comes_back_later_each_time_until_it_is_forgotten(clock: FakeClock) -> None:
    queue: RateLimitedQueue[str] = RateLimitedQueue(clock, ExponentialLimiter(1, 60))
    for wait_s in (1, 2, 4):
        queue.add_rate_limited("a")
        clock.advance(wait_s - 0.5)
        assert rest(queue) == []
        clock.advance(0.5)
        assert rest(queue) == ["a"]
    assert queue.num_requeues("a") == 3
    queue.forget("a")
    assert queue.num_requeues("a") == 0
    queue.add_rate_limited("a")
    clock.advance(1)
    assert rest(queue) == ["a"]


# Both clocks


def let_pass(clock: Clock, seconds: float) -> None:
    """Help a clock that does not move by itself."""
    if isinstance(clock, FakeClock):
        clock.await_sleepers(1)
        clock.advance(seconds)


def wait_once(
    clock: Clock, condition: threading.Condition, ready: threading.Event, when: float | None
) -> float:
    with condition:
        ready.set()
        clock.wait_until(condition, when)
    return clock.now()


@pytest.mark.parametrize("make", [MonotonicClock, FakeClock])
class TestClocks:
    def test_a_moment_that_is_past_is_not_waited_for(self, make: Callable[[], Clock]) -> None:
        clock, condition = make(), threading.Condition()
        for when in (clock.now(), clock.now() - 1000):
            Call(partial(wait_once, clock, condition, threading.Event(), when)).result()

    def test_a_wait_ends_at_its_moment(self, make: Callable[[], Clock]) -> None:
        clock, condition = make(), threading.Condition()
        when = clock.now() + 0.02
        call = Call(lambda: wait_once(clock, condition, threading.Event(), when))
        let_pass(clock, 0.02)
        assert call.result() >= when

    @pytest.mark.parametrize("when", [None, 1e9, float("inf")])
    def test_a_wait_ends_when_the_condition_is_notified(
        self, make: Callable[[], Clock], when: float | None
    ) -> None:
        clock, condition, ready = make(), threading.Condition(), threading.Event()
        call = Call(lambda: wait_once(clock, condition, ready, when))
        assert ready.wait(LONG_S)
        with condition:  # free only once the other thread waits
            condition.notify()
        call.result()


# Everything at once

KEYS = st.sampled_from("abcd")
# Binary fractions, so that sums and differences of times are exact.
SECONDS = st.integers(-1, 24).map(lambda n: n / 4)
BASE_S, CAP_S, RATE, BURST = 0.25, 4.0, 2.0, 3


class Model:
    """What the queue promises, in lists: time is passed to it, and keys move at the moment they are due."""

    def __init__(self) -> None:
        self.now = 0.0
        self.closed = False
        self.queued: list[str] = []
        self.processing: list[str] = []
        self.again: list[str] = []
        self.waiting: list[tuple[float, str]] = []
        self.attempts: list[str] = []
        self.acts: list[float] = []

    def add(self, key: str) -> None:
        if self.closed or key in self.queued or key in self.again:
            return
        (self.again if key in self.processing else self.queued).append(key)

    def add_after(self, key: str, delay_s: float) -> None:
        if delay_s <= 0:
            self.add(key)
        elif not self.closed:
            due = self.now + delay_s
            if any(other == key and when <= due for when, other in self.waiting):
                return
            self.waiting = [entry for entry in self.waiting if entry[1] != key] + [(due, key)]

    def add_rate_limited(self, key: str) -> None:
        wait_s = BASE_S
        for _ in range(self.attempts.count(key)):
            wait_s = min(CAP_S, 2 * wait_s)
        self.attempts.append(key)
        self.acts.append(earliest(self.acts, self.now, RATE, BURST))
        self.add_after(key, max(wait_s, self.acts[-1] - self.now))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for due, key in sorted(self.waiting, key=lambda entry: entry[0]):
            if due <= self.now:
                self.waiting.remove((due, key))
                self.add(key)

    def get(self) -> str | type[Exception]:
        if not self.queued:
            return ShutDown if self.closed else TimeoutError
        key = self.queued.pop(0)
        self.processing.append(key)
        return key

    def done(self, key: str) -> None:
        self.processing.remove(key)
        if key in self.again:
            self.again.remove(key)
            self.queued.append(key)

    def close(self) -> None:
        self.closed = True
        self.waiting = []


class QueueAgainstModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        limiter: Limiter = MaxLimiter(
            ExponentialLimiter(BASE_S, CAP_S), BucketLimiter(self.clock, RATE, BURST)
        )
        self.queue: RateLimitedQueue[str] = RateLimitedQueue(self.clock, limiter)
        self.model = Model()

    @rule(key=KEYS)
    def add(self, key: str) -> None:
        self.queue.add(key)
        self.model.add(key)

    @rule(key=KEYS, delay_s=SECONDS)
    def add_after(self, key: str, delay_s: float) -> None:
        self.queue.add_after(key, delay_s)
        self.model.add_after(key, delay_s)

    @rule(key=KEYS)
    def add_rate_limited(self, key: str) -> None:
        self.queue.add_rate_limited(key)
        self.model.add_rate_limited(key)

    @rule(key=KEYS)
    def forget(self, key: str) -> None:
        self.queue.forget(key)
        self.model.attempts = [other for other in self.model.attempts if other != key]

    @rule(seconds=SECONDS.filter(lambda s: s > 0))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.advance(seconds)

    @rule()
    def get(self) -> None:
        expected = self.model.get()
        if isinstance(expected, str):
            assert self.queue.get(0) == expected
        else:
            with pytest.raises(expected):
                self.queue.get(0)

    @rule(key=KEYS)
    def done(self, key: str) -> None:
        if key in self.model.processing:
            self.queue.done(key)
            self.model.done(key)
        else:
            with pytest.raises(InternalError):
                self.queue.done(key)

    @rule()
    def length(self) -> None:
        # Not an invariant: asking moves due keys, and most steps should find them unmoved.
        assert len(self.queue) == len(self.model.queued)

    @rule(key=KEYS)
    def num_requeues(self, key: str) -> None:
        assert self.queue.num_requeues(key) == self.model.attempts.count(key)

    @invariant()
    def both_are_open_or_closed(self) -> None:
        assert self.queue.shutting_down == self.model.closed

    # Shutdown comes late, or little would happen in most runs.
    @precondition(lambda self: self.model.now > 8)
    @rule()
    def shut_down(self) -> None:
        self.queue.shut_down()
        self.model.close()

    @precondition(lambda self: self.model.now > 8)
    @rule()
    def shut_down_with_drain(self) -> None:
        drained = self.queue.shut_down_with_drain(0)
        self.model.close()
        assert drained == (not self.model.queued and not self.model.processing)

    def teardown(self) -> None:
        assert rest(self.queue) == self.model.queued


TestQueueAgainstModel = QueueAgainstModel.TestCase
TestQueueAgainstModel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
