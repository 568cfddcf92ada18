"""What the CNI plugin's shim and the daemon say to each other, whose turn it is, and what is counted."""

from __future__ import annotations

import struct
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from flanneld import cniwire, metrics
from flanneld.cniserver import Turns
from flanneld.cniwire import Header, WireError

LAYOUT = struct.Struct("=4sIiIIIII")
ALL = 0b11111
WITHOUT_IPV6 = 0b1111
BASE = 0b11


def request(
    name: bytes = b"flannel",
    environment: bytes = b"CNI_COMMAND=ADD\0CNI_NETNS=/run/netns/a\0",
    stdin: bytes = b"{}",
    mask: int = ALL,
    error: int = 0,
) -> bytes:
    texts = (name, environment, stdin)
    return LAYOUT.pack(b"FCNI", mask, error, *map(len, texts), 60000, 3) + b"".join(texts)


def test_the_greeting() -> None:
    assert struct.unpack("=4sHH", cniwire.HELLO) == (b"FCNI", 3, 0)


def test_a_request_is_read() -> None:
    data = request()
    header = Header(data)
    assert (header.total_bytes, header.patience_ms, header.netns_error) == (len(data), 60000, 0)
    assert header.descriptors == (1, 2, 4, 8, 16)
    assert header.texts(data) == ("flannel", {"CNI_COMMAND": "ADD", "CNI_NETNS": "/run/netns/a"}, b"{}")


def test_one_without_a_namespace() -> None:
    for error, environment in (
        (0, b"CNI_NETNS=\0"),
        (0, b""),
        (2, b"CNI_NETNS=/a\0"),
        (-1, b"CNI_NETNS=/a\0"),
    ):
        data = request(environment=environment, mask=BASE, error=error)
        header = Header(data)
        assert header.descriptors == (1, 2)
        assert header.netns_error == error
        header.texts(data)


def test_a_kernel_without_ipv6() -> None:
    assert Header(request(mask=WITHOUT_IPV6)).descriptors == (1, 2, 4, 8)


def test_variables_as_a_process_would_see_them() -> None:
    data = request(environment=b"A=1\0A=2\0B=x=y\0C=\0D=\xff\0CNI_NETNS=/a\0", stdin=b"\0\xff")
    _, environment, stdin = Header(data).texts(data)
    assert environment == {"A": "1", "B": "x=y", "C": "", "D": "\udcff", "CNI_NETNS": "/a"}
    assert stdin == b"\0\xff"


@pytest.mark.parametrize("mask", [mask for mask in range(256) if mask not in (BASE, WITHOUT_IPV6, ALL)])
def test_masks_that_make_no_sense(mask: int) -> None:
    with pytest.raises(WireError, match="mask of descriptors is"):
        Header(request(mask=mask))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"FCNX" + request()[4:], "does not begin as a request"),
        (request()[:28] + struct.pack("=I", 0), "is of version 0 of the protocol, not 3"),
        (request()[:28] + struct.pack("=I", 2), "is of version 2 of the protocol, not 3"),
        (request(error=2), "error for the namespace is 2"),
        (request(mask=BASE, error=-2), "error for the namespace is -2"),
        (LAYOUT.pack(b"FCNI", BASE, 0, 1 << 22, 0, 1, 0, 3), "announces 4194305 bytes, more than 4194304"),
        (LAYOUT.pack(b"FCNI", BASE, 0, *[2**32 - 1] * 3, 0, 3), "announces 12884901885 bytes"),
    ],
)
def test_headers_that_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        Header(data)


def test_the_largest_request() -> None:
    assert Header(LAYOUT.pack(b"FCNI", BASE, 0, 0, 0, 1 << 22, 0, 3)).total_bytes == (1 << 22) + 32


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (request(environment=b"CNI_NETNS=/a"), "ends within a variable"),
        (request(environment=b"CNI_NETNS=/a\0BARE\0"), "without '='"),
        (request(environment=b"CNI_NETNS=/a\0\0"), "without '='"),
        (request(environment=b"CNI_NETNS=\0"), "do not agree"),
        (request(environment=b""), "do not agree"),
        (request(mask=BASE), "do not agree"),
        (request(environment=b"", mask=BASE, error=2), "do not agree"),
    ],
)
def test_texts_that_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        Header(data).texts(data)


@given(
    st.binary(min_size=32, max_size=80),
    st.sampled_from([b"", b"FCNI", b"FCNI\3\0\0\0", b"FCNI\3\0\0\0\0\0\0\0"]),
)
@example(request(), b"")
def test_any_bytes_are_a_request_or_refused(tail: bytes, start: bytes) -> None:
    data = start + tail[len(start) :]
    try:
        header = Header(data)
        name, environment, stdin = header.texts(data.ljust(header.total_bytes, b"\0")[: header.total_bytes])
    except WireError:
        return
    assert len(header.descriptors) in (2, 4, 5)
    texts = [name, *environment, *environment.values()]
    assert sum(map(len, texts)) + len(stdin) <= header.total_bytes - 32 <= cniwire.LARGEST_BYTES


def test_replies() -> None:
    assert cniwire.declined() == struct.pack("=4sIIII", b"FCNI", 1, 0, 0, 0)
    assert cniwire.answer(1, b"out", b"error") == struct.pack("=4sIIII", b"FCNI", 0, 1, 3, 5) + b"outerror"


# ---- turns


def always() -> bool:
    return True


def test_turns_are_taken_and_nothing_is_kept() -> None:
    turns = Turns()
    with (
        turns.of("a", 1.0, always) as first,
        turns.of("b", 1.0, always) as other,
        turns.of("", 0.0, always),
        turns.of("", 0.0, always),
    ):
        assert first and other
        assert len(turns) == 2
        with turns.of("a", 0.01, always) as late:
            assert not late
        with turns.of("a", 0.0, always) as later:
            assert not later
    assert len(turns) == 0
    with turns.of("a", 0.0, always) as again:
        assert again


def test_a_turn_that_nobody_wants_any_more_goes_to_the_next() -> None:
    turns = Turns()
    seen: list[bool] = []

    def late() -> None:
        with turns.of("a", 30.0, lambda: False) as ours:
            seen.append(ours)

    with turns.of("a", 1.0, lambda: False) as first:
        assert first, "who need not wait is not asked"
        thread = threading.Thread(target=late)
        thread.start()
        while len(turns._waiting) == 0 or turns._waiting["a"][1] < 2:
            thread.join(0.001)
    thread.join(30)
    assert seen == [False]
    with turns.of("a", 0.0, always) as again:
        assert again
    assert len(turns) == 0


def test_an_exception_ends_a_turn() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="x"), turns.of("a", 1.0, always):
        raise ValueError("x")
    with turns.of("a", 0.0, always) as ours:
        assert ours
    assert len(turns) == 0


def test_many_threads_take_turns() -> None:
    turns = Turns()
    inside: dict[str, int] = dict.fromkeys("abc", 0)
    done: list[str] = []

    def work(key: str) -> None:
        for _ in range(300):
            with turns.of(key, 30.0, always) as ours:
                assert ours
                inside[key] += 1
                assert inside[key] == 1
                inside[key] -= 1
        done.append(key)

    threads = [threading.Thread(target=work, args=(key,)) for key in "abcabcabc"]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert sorted(done) == sorted("abcabcabc")
    assert len(turns) == 0


# ---- metrics


def count(**labels: str) -> float:
    return REGISTRY.get_sample_value("flannel_cni_requests_total", labels) or 0.0


def test_calls_are_counted_by_what_they_are() -> None:
    before = count(plugin="flannel", command="ADD", outcome="ok")
    metrics.cni_served("flannel", "ADD", "ok", 0.003)
    assert count(plugin="flannel", command="ADD", outcome="ok") == before + 1
    metrics.cni_served("bridge", "DEL", 11, 0.003)
    assert count(plugin="bridge", command="DEL", outcome="11") == 1
    duration = 'flannel_cni_duration_seconds_bucket{command="ADD",le="0.005"}'
    assert duration in metrics.render().decode()


def test_callers_cannot_make_up_labels() -> None:
    before = len(metrics.render().splitlines())
    for number in range(100):
        metrics.cni_served(f"p{number}", f"C{number}", 100 + number, 0.1)
    assert count(plugin="other", command="other", outcome="other") == 100
    assert len(metrics.render().splitlines()) - before < 20


def test_networks_are_shown_up_to_a_number() -> None:
    metrics.cni_addresses("net", 1, 3, 254)
    metrics.cni_addresses("net", 1, 4, 254)
    labels = {"network": "net", "set": "1"}
    assert REGISTRY.get_sample_value("flannel_cni_addresses_used", labels) == 4
    assert REGISTRY.get_sample_value("flannel_cni_addresses", labels) == 254
    for number in range(100):
        metrics.cni_addresses(f"n{number}", 0, 1, 2)
    shown = metrics.render().decode().count("\nflannel_cni_addresses_used{")
    assert shown == 64
