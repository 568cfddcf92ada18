"""What is kept of pure functions, and what is not."""

from __future__ import annotations

import pytest

from cni.memo import Memo
from cni.spec import gojson


def test_the_same_arguments_give_the_same_object() -> None:
    memo = Memo()
    first = memo.known(gojson.load_object, b'{"a": 1}')
    assert memo.known(gojson.load_object, b'{"a": 1}') is first
    assert memo.known(gojson.load_object, b'{"a": 2}') is not first
    assert memo.known(len, b'{"a": 1}') == 8


def test_a_failure_is_met_anew() -> None:
    memo = Memo()
    for _ in range(2):
        with pytest.raises(gojson.GoJsonError):
            memo.known(gojson.load_object, b"{")


@pytest.mark.parametrize("data", [b'{"prevResult": {}}', b'{"a": "%s"}' % (b"x" * 20_000)])
def test_what_comes_once_or_is_large_is_not_kept(data: bytes) -> None:
    memo = Memo()
    assert memo.known(gojson.load_object, data) is not memo.known(gojson.load_object, data)


def test_it_does_not_grow_for_ever() -> None:
    memo = Memo()
    for number in range(1000):
        memo.known(gojson.load_object, b'{"a": %d}' % number)
    assert len(memo) <= 256
    assert memo.known(gojson.load_object, b'{"a": 999}') is memo.known(gojson.load_object, b'{"a": 999}')
