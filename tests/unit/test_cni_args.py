"""CNI_ARGS, against what the Go library says to the same text (contract, section 1.9)."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import CniError
from cni.spec import args


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("IgnoreUnknown=1", {}),
        ("MAC=c2:11:22:33:44:55", {"MAC": "c2:11:22:33:44:55"}),
        ("IP=", {"IP": ""}),
        ("IgnoreUnknown=true;K8S_POD_NAME=a;IP=10.1.2.50/16", {"IP": "10.1.2.50/16"}),
        ("K8S_POD_NAME=a;IgnoreUnknown=TRUE", {}),
        ("IP=10.0.0.1;IP=10.0.0.2", {"IP": "10.0.0.2"}),
    ],
)
def test_pairs(text: str, found: dict[str, str]) -> None:
    assert args.load(text, ("MAC", "IP")) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A=b=c", 'ARGS: invalid pair "A=b=c"'),
        ("IgnoreUnknown=1;", 'ARGS: invalid pair ""'),
        ("FOO=bar", 'ARGS: unknown args ["FOO=bar"]'),
        ("FOO=bar;X=y;IgnoreUnknown=0", 'ARGS: unknown args ["FOO=bar" "X=y"]'),
        ("mac=c2:11:22:33:44:55", 'ARGS: unknown args ["mac=c2:11:22:33:44:55"]'),
        (
            "IgnoreUnknown=yes",
            'ARGS: error parsing value of pair "IgnoreUnknown=yes": '
            "boolean unmarshal error: invalid input yes",
        ),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(CniError) as caught:
        args.load(text, ("MAC",))
    assert (caught.value.code, caught.value.msg) == (999, message)


@given(st.text())
def test_any_text_gives_pairs_or_a_refusal(text: str) -> None:
    with suppress(CniError):
        assert set(args.load(text, ("IP",))) <= {"IP"}
