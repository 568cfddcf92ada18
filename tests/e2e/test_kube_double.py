"""The API double over real HTTPS: lightkube, curl and kubectl as clients, faults, restarts, a namespace."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest
from lightkube import ApiError, Client, KubeConfig
from lightkube.resources.core_v1 import Node, NodeStatus, Pod

from tests.kube.control import KubeServer, Refused
from tests.lab.net import SWITCH, Lab, wait_for

Json = dict[str, Any]

NODES = "/api/v1/nodes"
SOON_S = 10.0


@pytest.fixture
def kube(tmp_path: Path) -> Iterator[KubeServer]:
    with KubeServer(tmp_path / "kube") as server:
        yield server


@pytest.fixture
def client(kube: KubeServer) -> Iterator[Client]:
    with Client(config=KubeConfig.from_file(str(kube.kubeconfig))) as made:
        yield made


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Connect]:
    """Open a connection to the server of this test; all are closed at its end."""
    opened: list[Raw] = []

    def make(token: str | None = None) -> Raw:
        opened.append(Raw(KubeServer(tmp_path / "kube"), token))
        return opened[-1]

    yield make
    for raw in opened:
        raw.http.close()


class Raw:
    """One connection with flannel's token: what goes over it is seen as it is."""

    def __init__(self, kube: KubeServer, token: str | None = None) -> None:
        context = ssl.create_default_context(cafile=str(kube.ca))
        self.http = http.client.HTTPSConnection(*kube.address, context=context, timeout=SOON_S)
        self.token = (kube.service_account / "token").read_text() if token is None else token

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> http.client.HTTPResponse:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        self.http.request("GET", path, headers={"Authorization": f"Bearer {self.token}", **given})
        return self.http.getresponse()

    def json(self, path: str) -> Json:
        found: Json = json.loads(self.ask(path).read())
        return found

    def event(self, answer: http.client.HTTPResponse) -> Json:
        """The next line of a watch; fails after SOON_S seconds, and at the end."""
        line = answer.readline()
        assert line.endswith(b"\n"), line
        found: Json = json.loads(line)
        return found

    def is_silent(self, seconds: float) -> bool:
        """Whether no data arrive for so long (session tickets of TLS are none)."""
        self.http.sock.settimeout(seconds)
        try:
            return self.http.sock.recv(1) is None
        except TimeoutError:
            return True
        finally:
            self.http.sock.settimeout(SOON_S)


Connect = Callable[..., Raw]


@contextmanager
def watching(raw: Raw, query: str = "") -> Iterator[http.client.HTTPResponse]:
    answer = raw.ask(f"{NODES}?watch=true&allowWatchBookmarks=true{query}")
    assert answer.status == 200
    try:
        yield answer
    finally:
        raw.http.close()
        answer.close()


def name_of(found: Node) -> str | None:
    return found.metadata.name if found.metadata else None


def soon(holds: Callable[[], bool], what: str) -> None:
    wait_for(holds, SOON_S, what)


# Clients


def test_lightkube_reads_and_writes(kube: KubeServer, client: Client) -> None:
    kube.control.fill(25)
    kube.control.add_node("own", "10.244.1.0/24", "fd00:1::/64", address="192.0.2.1")
    listed = client.list(Node, chunk_size=10)
    assert [name_of(each) for each in listed][:2] == ["own", "peer-00000"]
    assert listed.resourceVersion == str(kube.control.version())
    assert kube.control.counts()["list nodes"] == 3
    own = client.get(Node, "own")
    assert own.spec is not None
    assert own.spec.podCIDRs == ["10.244.1.0/24", "fd00:1::/64"]
    client.patch(NodeStatus, "own", {"metadata": {"annotations": {"a.b/c": '{"VNI":1}'}}})
    assert kube.control.annotations("own") == {"a.b/c": '{"VNI":1}'}
    with pytest.raises(ApiError, match='nodes "nobody" not found') as failed:
        client.get(Node, "nobody")
    assert (failed.value.status.code, failed.value.status.reason) == (404, "NotFound")
    kube.control.add_pod("kube-flannel", "kube-flannel-ds-x", "own")
    found = client.get(Pod, "kube-flannel-ds-x", namespace="kube-flannel")
    assert found.spec is not None
    assert found.spec.nodeName == "own"
    kube.control.forbid("get", "pods")
    with pytest.raises(
        ApiError, match='cannot get resource "pods" in API group "" in the namespace "kube-flannel"'
    ):
        client.get(Pod, "kube-flannel-ds-x", namespace="kube-flannel")


def test_lightkube_watches(kube: KubeServer, client: Client) -> None:
    kube.control.add_node("a")
    version = str(kube.control.version())
    seen: list[tuple[str, str | None]] = []

    def follow() -> None:
        for kind, found in client.watch(Node, resource_version=version):
            seen.append((kind, name_of(found)))
            if kind == "DELETED":
                return

    thread = Thread(target=follow)
    thread.start()
    soon(lambda: len(kube.control.watches()) == 1, "a watch")
    kube.control.heartbeat("a")
    kube.control.add_node("b")
    kube.control.delete_node("a")
    thread.join(SOON_S)
    assert seen == [("MODIFIED", "a"), ("ADDED", "b"), ("DELETED", "a")]


def test_lightkube_sees_an_old_version_as_410(kube: KubeServer, client: Client) -> None:
    version = kube.control.version()
    new = kube.control.compact()
    with pytest.raises(ApiError) as failed:
        next(iter(client.watch(Node, resource_version=str(version))))
    assert (failed.value.status.code, failed.value.status.reason) == (410, "Expired")
    assert failed.value.status.message == f"too old resource version: {version} ({new})"


def test_lightkube_in_the_cluster_follows_its_token(
    kube: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in kube.environment.items():
        monkeypatch.setenv(name, value)
    config = KubeConfig.from_service_account(str(kube.service_account))
    with Client(config=config) as client:
        assert client.namespace == "kube-flannel"
        assert list(client.list(Node)) == []
        kube.control.expire_token()
        assert list(client.list(Node)) == []
        kube.control.expire_token(replace=False)
        with pytest.raises(ApiError, match="Unauthorized"):
            list(client.list(Node))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl(kube: KubeServer, tmp_path: Path) -> None:
    kube.control.add_node("a", "10.244.1.0/24", address="192.0.2.1")

    def kubectl(*words: str) -> str:
        command = ["kubectl", f"--kubeconfig={kube.admin_kubeconfig}", f"--cache-dir={tmp_path}", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout

    rows = [line.split() for line in kubectl("get", "nodes").splitlines()]
    assert rows[0] == ["NAME", "STATUS", "ROLES", "AGE", "VERSION"]
    assert rows[1][:3] == ["a", "Ready", "<none>"]
    assert kubectl("get", "nodes", "-o", "jsonpath={.items[*].spec.podCIDR}") == "10.244.1.0/24"
    kubectl("annotate", "node", "a", "x=y")
    kubectl("cordon", "a")
    kubectl("taint", "node", "a", "k=v:NoSchedule")
    found = kube.control.get_node("a")
    assert found["metadata"]["annotations"] == {"x": "y"}
    assert found["spec"]["unschedulable"] is True
    assert {"key": "k", "value": "v", "effect": "NoSchedule"} in found["spec"]["taints"]
    kubectl("delete", "node", "a")
    assert kube.control.nodes() == []


def test_curl_gets_a_readable_answer(kube: KubeServer) -> None:
    token = (kube.service_account / "token").read_text()
    command = ["curl", "--silent", "--cacert", str(kube.ca), "--include", f"{kube.url}{NODES}/x"]
    text = subprocess.run(
        [*command, "-H", f"Authorization: Bearer {token}"], capture_output=True, text=True, check=True
    )
    head, _, body = text.stdout.partition("\n\n")
    assert head.startswith("HTTP/1.1 404 Not Found")
    assert "Content-Type: application/json" in head
    assert body.startswith('{\n  "kind": "Status",\n')
    assert json.loads(body)["code"] == 404


# Answers


def test_a_large_list_is_compressed_for_who_takes_it(kube: KubeServer, connect: Connect) -> None:
    kube.control.fill(300)
    raw = connect()
    plain = raw.ask(NODES)
    assert plain.headers["Content-Encoding"] is None
    assert plain.headers["Transfer-Encoding"] == "chunked"
    whole = plain.read()
    squeezed = raw.ask(NODES, Accept_Encoding="gzip")
    assert squeezed.headers["Content-Encoding"] == "gzip"
    data = squeezed.read()
    assert len(data) < len(whole) / 4
    assert gzip.decompress(data) == whole
    assert raw.ask(f"{NODES}/peer-00000", Accept_Encoding="gzip").read().endswith(b"}\n")
    small = raw.ask(f"{NODES}?limit=50", Accept_Encoding="gzip")
    assert small.headers["Content-Encoding"] is None
    assert len(json.loads(small.read())["items"]) == 50


@pytest.mark.parametrize("token", ["", "wrong"])
def test_the_wrong_token_over_the_wire(kube: KubeServer, token: str, connect: Connect) -> None:
    answer = connect(token).ask(NODES)
    assert answer.status == 401
    assert json.loads(answer.read())["reason"] == "Unauthorized"


def test_requests_are_counted_and_connections_kept(kube: KubeServer, connect: Connect) -> None:
    raw = connect()
    raw.ask(f"{NODES}?limit=7", User_Agent="flannel/test").read()
    connection = raw.http.sock
    raw.ask(f"{NODES}/x").read()
    raw.ask("/readyz").read()
    assert raw.http.sock is connection
    assert kube.control.counts() == {"list nodes": 1, "get nodes": 1, "get /readyz": 1}
    first = kube.control.seen()[0]
    assert (first.verb, first.what, first.query, first.agent) == ("list", "nodes", "limit=7", "flannel/test")
    kube.control.forget()
    assert kube.control.counts() == {}


def test_rubbish_on_the_wire_harms_nobody(kube: KubeServer, connect: Connect) -> None:
    host, port = kube.address
    context = ssl.create_default_context(cafile=str(kube.ca))
    for rubbish in (b"\x00" * 100 + b"\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with context.wrap_socket(_connect(host, port), server_hostname=host) as secured:
            secured.sendall(rubbish)
            secured.settimeout(SOON_S)
            while secured.recv(4096):
                pass
    with _connect(host, port) as plain, suppress(ConnectionResetError):
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        plain.recv(100)
    assert connect().json(NODES)["items"] == []


def _connect(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port), timeout=SOON_S)


# Watches


def test_a_watch_over_the_wire(kube: KubeServer, connect: Connect) -> None:
    kube.control.add_node("a")
    raw = connect()
    with watching(raw) as answer:
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Content-Encoding"] is None
        first = raw.event(answer)
        assert (first["type"], first["object"]["metadata"]["name"]) == ("ADDED", "a")
        kube.control.set_condition("a", "Ready", "False", "KubeletNotReady")
        changed = raw.event(answer)
        assert changed["type"] == "MODIFIED"
        assert changed["object"]["status"]["conditions"][0]["status"] == "False"
        kube.control.set_condition("a", "Ready", "False", "KubeletNotReady")
        kube.control.advance(3)
        kube.control.bookmark()
        bookmark = raw.event(answer)
        while bookmark["type"] == "MODIFIED":  # the second heartbeat may fall into another second
            bookmark = raw.event(answer)
        assert bookmark["type"] == "BOOKMARK"
        assert bookmark["object"]["metadata"]["resourceVersion"] == str(kube.control.version())
    soon(lambda: kube.control.watches() == [], "the end of the watch")


def test_bookmarks_come_by_themselves_and_before_the_end(tmp_path: Path, connect: Connect) -> None:
    with KubeServer(tmp_path / "kube", bookmark_s=0.1) as kube:
        raw = connect()
        version = kube.control.advance()
        with watching(raw, f"&resourceVersion={version}&timeoutSeconds=1") as answer:
            kinds = {json.loads(line)["type"] for line in answer}  # until the end, in order
            assert kinds == {"BOOKMARK"}
        raw = connect()
        without = raw.ask(f"{NODES}?watch=true&resourceVersion={version}&timeoutSeconds=1")
        assert without.read() == b""
        soon(lambda: kube.control.watches() == [], "the end of the watch")


def test_watches_end_in_order(kube: KubeServer, connect: Connect) -> None:
    raw = connect()
    with watching(raw) as answer:
        assert kube.control.end_watches() == 1
        assert answer.read() == b""
        assert raw.json(NODES)["items"] == []
    raw = connect()
    with watching(raw) as answer:
        kube.stop()
        assert answer.read() == b""


def test_events_of_a_burst_arrive_in_order(kube: KubeServer, connect: Connect) -> None:
    raw = connect()
    with watching(raw) as answer:
        start = kube.control.version()
        kube.control.fill(3000)
        versions = [int(raw.event(answer)["object"]["metadata"]["resourceVersion"]) for _ in range(3000)]
    assert versions == list(range(start + 1, start + 3001))


# Faults


def test_drop(kube: KubeServer, connect: Connect) -> None:
    kube.control.drop("list", count=1)
    raw = connect()
    with pytest.raises(http.client.RemoteDisconnected):
        raw.ask(NODES)
    raw.http.close()
    assert raw.ask(NODES).status == 200


def test_stall(kube: KubeServer, connect: Connect) -> None:
    kube.control.add_node("a")
    watcher, other = connect(), connect()
    with watching(watcher, f"&resourceVersion={kube.control.version()}") as answer:
        kube.control.stall("watch", "list")
        kube.control.heartbeat("a")
        assert watcher.is_silent(0.3)
        other.http.request("GET", NODES, headers={"Authorization": f"Bearer {other.token}"})
        assert other.is_silent(0.3)
        assert connect().ask(f"{NODES}/a").status == 200
        kube.control.clear()
        assert watcher.event(answer)["type"] == "MODIFIED"
        with pytest.raises(http.client.RemoteDisconnected):
            other.http.getresponse()


def test_a_client_may_leave_a_stalled_request(kube: KubeServer, connect: Connect) -> None:
    kube.control.stall()
    raw = connect()
    raw.http.request("GET", NODES, headers={"Authorization": f"Bearer {raw.token}"})
    soon(lambda: kube.control.counts()["list nodes"] == 1, "the request")
    raw.http.close()
    soon(lambda: kube.control.close_connections() == 0, "the end of the connection")


@pytest.mark.parametrize("query", ["", "?watch=true"])
def test_reset_in_the_middle_of_the_answer_or_of_a_watch_line(kube: KubeServer, query: str) -> None:
    kube.control.fill(20)
    kube.control.reset("list", "watch", count=1)
    begun, end = _until_the_end(kube, f"{NODES}{query}")
    assert isinstance(end, ConnectionResetError)
    assert begun.startswith(b"HTTP/1.1 200 OK")
    assert b"peer-00000" in begun
    assert b"peer-00019" not in begun


def test_reset_of_an_open_watch(kube: KubeServer, connect: Connect) -> None:
    kube.control.add_node("a")
    raw = connect()
    with watching(raw, f"&resourceVersion={kube.control.version()}") as answer:
        kube.control.reset("watch", count=1)
        kube.control.heartbeat("a")
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
    with watching(connect()) as answer:
        assert json.loads(answer.readline())["type"] == "ADDED"


def test_a_dropped_request_is_no_reset(kube: KubeServer) -> None:
    kube.control.drop()
    assert _until_the_end(kube, NODES) == (b"", None)


def _until_the_end(kube: KubeServer, path: str) -> tuple[bytes, OSError | None]:
    """What is answered until the server ends the connection, and the error of the socket at that moment.

    TLS over memory: Python's own TLS sockets show a reset as an ordinary end.
    """
    received, to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context(cafile=str(kube.ca)).wrap_bio(
        received, to_send, server_hostname="127.0.0.1"
    )
    token = (kube.service_account / "token").read_text()
    answer = b""
    with _connect(*kube.address) as plain:
        steps: list[Callable[[], object]] = [
            tls.do_handshake,
            lambda: tls.write(f"GET {path} HTTP/1.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()),
        ]
        while True:
            try:
                if steps:
                    steps[0]()
                    del steps[0]
                else:
                    answer += tls.read()
            except ssl.SSLWantReadError:
                try:
                    plain.sendall(to_send.read())
                    data = plain.recv(65536)
                except OSError as exc:
                    return answer, exc
                if not data:
                    return answer, None
                received.write(data)


def test_refusals(kube: KubeServer, connect: Connect) -> None:
    raw = connect()
    kube.control.too_many("list", retry_after_s=7, count=1)
    answer = raw.ask(NODES)
    assert (answer.status, answer.headers["Retry-After"]) == (429, "7")
    assert json.loads(answer.read())["reason"] == "TooManyRequests"
    kube.control.too_many("list", plain=True, count=1)
    answer = raw.ask(NODES)
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert answer.read() == b"Too many requests, please try again later.\n"
    for code in (500, 503, 504):
        kube.control.fail(code=code, count=2)
        assert [raw.json(NODES)["code"], raw.json(f"{NODES}/x")["code"]] == [code, code]
    assert raw.json(NODES)["kind"] == "NodeList"
    with pytest.raises(ValueError, match="418"):
        kube.control.fail(code=418)
    with pytest.raises(ValueError, match="brew"):
        kube.control.drop("brew")


def test_gone(kube: KubeServer, connect: Connect) -> None:
    kube.control.gone(count=1)
    raw = connect()
    with watching(raw) as answer:
        event = json.loads(answer.read())
        assert (event["type"], event["object"]["code"], event["object"]["reason"]) == (
            "ERROR",
            410,
            "Expired",
        )
    kube.control.gone("list", count=1)
    assert connect().ask(NODES).status == 410


def test_slow(kube: KubeServer, connect: Connect) -> None:
    kube.control.fill(20)
    raw = connect()
    size = len(raw.ask(NODES).read())
    kube.control.slow("list", bytes_per_s=size * 2, count=1)
    kube.control.slow("get", delay_s=0.2)
    assert _took(lambda: raw.ask(NODES).read()) >= 0.4
    assert _took(lambda: raw.ask(NODES).read()) < 0.4
    assert _took(lambda: raw.ask(f"{NODES}/peer-00000").read()) >= 0.2


def _took(act: Callable[[], object]) -> float:
    start = time.monotonic()
    act()
    return time.monotonic() - start


def test_the_wrong_ca(kube: KubeServer, connect: Connect) -> None:
    before = connect()
    assert before.ask(NODES).read()
    kube.control.wrong_ca()
    with pytest.raises(ssl.SSLCertVerificationError):
        connect().ask(NODES)
    assert before.ask(NODES).read()
    assert kube.control.close_connections() >= 1
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError, ssl.SSLError)):
        before.ask(NODES)
    kube.control.wrong_ca(on=False)
    assert connect().ask(NODES).status == 200


def test_a_refusal_of_the_control_channel_names_the_reason(kube: KubeServer) -> None:
    kube.control.add_node("a", "10.244.1.0/24")
    with pytest.raises(Refused, match="node updates may not change podCIDR"):
        kube.control.set_pod_cidrs("a", "10.244.2.0/24")
    with pytest.raises(Refused, match='nodes "b" not found'):
        kube.control.delete_node("b")


# The process


def test_objects_survive_a_crash_and_can_be_lost(kube: KubeServer, client: Client, connect: Connect) -> None:
    kube.control.fill(50, fat=True)
    kube.control.add_node("own", "10.244.1.0/24")
    kube.control.delete_node("peer-00007")
    version, url, token = kube.control.version(), kube.url, (kube.service_account / "token").read_text()
    before = kube.control.nodes()
    kube.kill()
    with pytest.raises(httpx2.TransportError):
        list(client.list(Node))
    kube.start()
    assert (kube.url, (kube.service_account / "token").read_text()) == (url, token)
    assert kube.control.nodes() == before
    assert kube.control.version() == version
    assert len(list(client.list(Node))) == 50
    kube.stop()
    kube.start(lose_data=True)
    assert list(client.list(Node)) == []
    assert kube.control.version() < version
    raw = connect()
    with watching(raw, f"&resourceVersion={version}"):
        kube.control.add_node("own", "10.244.1.0/24")
        assert raw.is_silent(0.3)


def test_a_frozen_server_takes_connections_and_says_nothing(kube: KubeServer, connect: Connect) -> None:
    kube.control.add_node("a")
    raw = connect()
    with watching(raw, "&resourceVersion=1") as answer:
        assert raw.event(answer)["type"] == "ADDED"
        kube.pause()
        assert raw.is_silent(0.2)
        kube.resume()
        kube.control.heartbeat("a")
        assert raw.event(answer)["type"] == "MODIFIED"


def test_a_server_that_cannot_start_says_why(kube: KubeServer, tmp_path: Path) -> None:
    other = KubeServer(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "admin.token").mkdir()
    with pytest.raises(RuntimeError, match=r"admin\.token"):
        other.start()


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_in_a_lab_the_nodes_reach_it_and_the_host_does_not(tmp_path: Path) -> None:
    with Lab(tmp_path / "lab") as lab:
        lab.create(1)
        kube = KubeServer(lab.directory / "kube", lab).start()
        assert kube.url == f"https://{SWITCH.ip}:6443"
        kube.control.add_node("node1", "10.244.1.0/24")
        token = (kube.service_account / "token").read_text()
        curl = ["curl", "--silent", "--max-time", "10", "--cacert", str(kube.ca)]
        curl += ["-H", f"Authorization: Bearer {token}", f"{kube.url}{NODES}/node1"]
        found = json.loads(lab.run(lab.netns("node1"), *curl))
        assert found["spec"]["podCIDR"] == "10.244.1.0/24"
        kube.kill()
        kube.start()
        assert json.loads(lab.run(lab.netns("node1"), *curl)) == found
        assert subprocess.run([*curl, "--max-time", "0.3"], check=False, capture_output=True).returncode
