"""The answers of the health server, over a real socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cni.errors import ConfigError
from flanneld import metrics
from flanneld.health import HealthServer, Readiness


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def served() -> Iterator[tuple[Readiness, int]]:
    readiness, port = Readiness(), free_port()
    server = HealthServer("127.0.0.1", port, readiness)
    yield readiness, port
    server.close()


def ask(port: int, path: str, method: str = "GET") -> tuple[int, str, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path)
    reply = connection.getresponse()
    answer = reply.status, reply.getheader("Content-Type") or "", reply.read().decode()
    connection.close()
    return answer


def test_ready_says_why_not_and_what_is_unusual(served: tuple[Readiness, int]) -> None:
    readiness, port = served
    assert ask(port, "/readyz")[::2] == (503, "flanneld is not ready yet")
    readiness.waiting("node n1 has no podCIDR")
    assert ask(port, "/readyz")[::2] == (503, "flanneld is not ready yet\nnode n1 has no podCIDR")
    readiness.ready()
    assert ask(port, "/readyz")[::2] == (200, "flanneld is ready")
    readiness.ready("restored")
    assert ask(port, "/readyz?verbose")[::2] == (200, "flanneld is ready\nrestored")


def test_healthy_whatever_the_readiness_and_the_method(served: tuple[Readiness, int]) -> None:
    _, port = served
    assert ask(port, "/healthz")[::2] == (200, "flanneld is running")
    assert ask(port, "/healthz", "POST")[::2] == (200, "flanneld is running")
    assert ask(port, "/healthz", "HEAD")[::2] == (200, "")
    assert ask(port, "/other")[0] == 404


def test_metrics_are_what_prometheus_reads(served: tuple[Readiness, int]) -> None:
    readiness, port = served
    readiness.ready()
    repaired = metrics.DRIFT_REPAIRED._value.get()
    metrics.DRIFT_REPAIRED.inc(3)
    status, kind, text = ask(port, "/metrics")
    assert status == 200
    assert kind == metrics.CONTENT_TYPE
    found = {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}
    assert found["flannel_ready"] == 1.0
    assert found["flannel_drift_repaired_total"] == repaired + 3
    assert found["process_resident_memory_bytes"] > 1e6
    readiness.waiting("")
    assert "\nflannel_ready 0.0\n" in ask(port, "/metrics")[2]


def test_a_taken_port_is_an_error_that_names_it(served: tuple[Readiness, int]) -> None:
    _, port = served
    with pytest.raises(ConfigError, match=rf"--healthz-ip=127.0.0.1 --healthz-port={port}.*choose another"):
        HealthServer("127.0.0.1", port, Readiness())
