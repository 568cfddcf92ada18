"""Who gives way, and for how long."""

from __future__ import annotations

import time
from threading import Event, Thread

from flanneld.precedence import Precedence


def test_nobody_waits_for_nobody() -> None:
    precedence = Precedence()
    began = time.monotonic()
    for _ in range(1000):
        precedence.give_way()
    with precedence:
        pass
    precedence.give_way()
    assert time.monotonic() - began < 1.0


def test_one_who_gives_way_goes_on_when_the_last_call_ends() -> None:
    precedence, began, ended = Precedence(), Event(), Event()

    def serve() -> None:
        with precedence:
            with precedence:
                began.set()
            time.sleep(0.005)  # the call's work; less than anybody waits
            ended.set()

    server = Thread(target=serve)
    server.start()
    began.wait(5.0)
    precedence.give_way()
    assert ended.is_set()
    server.join()


def test_a_call_without_end_does_not_stop_everything() -> None:
    precedence = Precedence()
    with precedence:
        began = time.monotonic()
        precedence.give_way()
        assert 0.01 < time.monotonic() - began < 5.0


def test_who_was_kept_waiting_long_enough_gets_a_turn() -> None:
    """However often it gives way: thousands of leases are not decoded at one each 20 ms."""
    precedence = Precedence()
    with precedence:
        precedence.give_way()
        began = time.monotonic()
        turns = 0
        while time.monotonic() - began < 0.003:
            precedence.give_way()
            turns += 1
        assert turns > 10
        time.sleep(0.01)  # more than a turn
        began = time.monotonic()
        precedence.give_way()
        assert 0.01 < time.monotonic() - began < 5.0
