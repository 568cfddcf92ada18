"""The log: klog's line format and its three flags."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flanneld import log
from flanneld.log import V2, V4, OncePerChange, logger

HERE = Path(__file__).name
# <I|W|E|F>mmdd hh:mm:ss.uuuuuu <7-wide right-aligned pid> file:line] message
LINE = re.compile(r"([IWEF])\d{4} \d\d:\d\d:\d\d\.\d{6} ([ \d]{6}\d) ([\w.]+\.py):(\d+)\] (.*)")


@pytest.fixture(autouse=True)
def logger_as_found() -> Iterator[None]:
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_lines_have_klogs_format(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(4)
    for level in (logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL, V2, V4):
        logger.log(level, "%s of %d", "one", 2)
    found = [LINE.fullmatch(line) for line in said(capsys)]
    assert [match[1] for match in found if match] == ["I", "W", "E", "E", "I", "I"]
    for match in found:
        assert match is not None
        assert int(match[2]) == os.getpid()
        assert match[3] == HERE
        assert match[5] == "one of 2"


def test_the_process_is_right_aligned() -> None:
    record = logging.LogRecord("x", logging.INFO, "/a/b.py", 7, "m", (), None)
    record.process, record.created = 55, 1719671315.000001
    assert re.fullmatch(
        r"I06\d\d \d\d:\d\d:35\.00000[01]      55 b\.py:7\] m", log.KlogFormatter().format(record)
    )


def test_a_traceback_follows_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(0)
    try:
        int("seven")
    except ValueError:
        logger.exception("failed")
    lines = said(capsys)
    assert lines[0].endswith("] failed")
    assert (lines[1], lines[-1]) == (
        "Traceback (most recent call last):",
        "ValueError: invalid literal for int() with base 10: 'seven'",
    )


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [(-1, ["info"]), (0, ["info"]), (1, ["info"]), (2, ["info", "lease"]), (3, ["info", "lease"])]
    + [(v, ["info", "lease", "kernel"]) for v in (4, 6, 99)],
)
def test_verbosity(capsys: pytest.CaptureFixture[str], verbosity: int, shown: list[str]) -> None:
    log.setup(verbosity)
    for level, text in ((logging.INFO, "info"), (V2, "lease"), (V4, "kernel")):
        logger.log(level, text)
    assert [line.rpartition("] ")[2] for line in said(capsys)] == shown


@pytest.mark.parametrize(
    ("verbosity", "vmodule", "shown"),
    [
        (0, [("test_log", 4)], "VW"),
        (0, [("test_log", 2)], "V"),
        (0, [("test_log", 1)], ""),
        (2, [("test_log", 4)], "VW"),
        (4, [("test_log", 1)], "VW"),  # only ever more
        (0, [("test_*", 2)], "V"),
        (0, [("test_?og", 2)], "V"),
        (0, [("test_[k-m]og", 2)], "V"),
        (0, [("test_[^x]og", 2)], "V"),
        (0, [("test_[^l]og", 2)], ""),
        (0, [("test", 4), ("log", 4), ("test_log.py", 4), ("TEST_LOG", 4), ("[", 4)], ""),
        (0, [("test_*", 2), ("test_log", 4)], "V"),  # the first that matches
        (0, [("other", 4), ("test_log", 2)], "V"),
    ],
)
def test_verbosity_by_file(
    capsys: pytest.CaptureFixture[str], verbosity: int, vmodule: list[tuple[str, int]], shown: str
) -> None:
    log.setup(verbosity, vmodule)
    logger.log(V2, "V")
    logger.debug("W")
    assert "".join(line[-1] for line in said(capsys)) == shown


def test_a_stack_trace_at_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def inner(number: int) -> None:
        logger.info("here %d", number)

    log.setup(0, (), f"{HERE}:{inner.__code__.co_firstlineno + 1}")
    inner(1)
    logger.info("elsewhere")
    first, *trace, last = said(capsys)
    assert first.endswith("] here 1")
    assert last.endswith("] elsewhere")
    assert trace[-2:] == [
        f'  File "{__file__}", line {inner.__code__.co_firstlineno + 1}, in inner',
        '    logger.info("here %d", number)',
    ]
    assert any("test_a_stack_trace_at_one_line" in line for line in trace)


def test_a_later_setup_replaces_the_earlier(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log.setup(4)
    log.setup(0)
    logger.info("once")
    logger.debug("never")
    assert len(said(capsys)) == 1
    assert caplog.records == []  # and nobody else prints it


def test_trouble_is_said_when_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(0)
    once = OncePerChange()
    once.over("never in trouble")
    for text in ("a", "a", "b", "b", "a"):
        once.trouble(text)
    once.over("well again")
    once.over("well again")
    once.trouble("a")
    lines = [(line[0], line.rpartition("] ")[2]) for line in said(capsys)]
    assert lines == [("W", "a"), ("W", "b"), ("W", "a"), ("I", "well again"), ("W", "a")]
