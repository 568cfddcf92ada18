"""The Kubernetes store against an API server that behaves, and against one that does not."""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pytest

from cni.errors import ConfigError, LeaseLost, StoreUnavailable
from flanneld.lease import Attributes, Change, Lease, LeaseSet, Snapshot, Update
from flanneld.subnet import kube, kubeapi
from flanneld.subnet.kube import KubeManager
from tests.e2e.watching import Watching, wait_for
from tests.kube.control import REPOSITORY, Control, KubeServer, Refused

PREFIX = "flannel.alpha.coreos.com/"
MAC = '{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}'
OWN = Attributes(IPv4Address("192.168.64.3"), None, "vxlan", MAC)
OWN_KEY = "10.244.1.0-24"
DUAL = '{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/56"}'


class Cluster:
    """One API server, and managers of its nodes."""

    def __init__(self, server: KubeServer, directory: Path) -> None:
        self.server = server
        self.control: Control = server.control
        self.net_conf = directory / "net-conf.json"
        self.net_conf.write_text('{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}')
        self._open = ExitStack()

    def manager(
        self,
        node: str = "n1",
        *,
        api_url: str = "",
        kubeconfig: str | Path | None = None,
        prefix: str = "flannel.alpha.coreos.com",
        set_network_unavailable: bool = True,
        environ: Mapping[str, str] | None = None,
    ) -> KubeManager:
        made = KubeManager(
            api_url=api_url,
            kubeconfig=str(self.server.kubeconfig if kubeconfig is None else kubeconfig),
            annotation_prefix=prefix,
            net_config_path=str(self.net_conf),
            set_network_unavailable=set_network_unavailable,
            environ={"NODE_NAME": node} if environ is None else environ,
        )
        return self._open.enter_context(closing(made))

    def joined(self, node: str = "n1", cidr: str = "10.244.1.0/24") -> KubeManager:
        """A manager whose node exists and has its lease."""
        self.control.add_node(node, cidr)
        manager = self.manager(node)
        manager.acquire(manager.network_config(), OWN, None)
        return manager

    def peer(self, name: str, cidr: str, **annotations: str) -> None:
        self.control.add_node(name, cidr, annotations=peer_annotations(name, **annotations))

    def told(self, node: str = "n1") -> dict[str, str]:
        """Flannel's annotations without their prefix."""
        found = self.control.annotations(node)
        return {key.removeprefix(PREFIX): text for key, text in found.items() if key.startswith(PREFIX)}

    def lists(self) -> int:
        return self.control.counts()["list nodes"]

    def close(self) -> None:
        """Close the managers."""
        self._open.close()

    def clean(self) -> None:
        """Make the server as it was before the test."""
        self.control.clear()
        self.control.wrong_ca(False)
        for each in self.control.nodes():
            self.control.delete_node(each["metadata"]["name"])


def peer_annotations(name: str, **changed: str) -> dict[str, str]:
    """What a Go flanneld has written on a node."""
    usual = {
        "backend-data": MAC,
        "backend-type": "vxlan",
        "kube-subnet-manager": "true",
        "public-ip": f"192.168.0.{sum(name.encode()) % 250}",
    }
    more = {key.replace("_", "-"): text for key, text in changed.items()}
    return {PREFIX + key: text for key, text in {**usual, **more}.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeServer]:
    with KubeServer(tmp_path_factory.mktemp("kube")) as running:
        yield running


@pytest.fixture
def cluster(server: KubeServer, tmp_path: Path) -> Iterator[Cluster]:
    server.control.forget()
    found = Cluster(server, tmp_path)
    yield found
    found.close()
    found.clean()


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A server of the test's own, to be ill-treated."""
    with KubeServer(tmp_path / "kube") as running:
        found = Cluster(running, tmp_path)
        yield found
        found.close()


class Seen(NamedTuple):
    """One request as it came over the wire."""

    method: str
    path: str
    content_type: str
    body: bytes


class Front:
    """A plain HTTP server before the API server: shows bytes, and says what that would never say.

    Requests whose path contains the key of `answers` get the next of these answers: status, headers, body.
    """

    def __init__(self, control: Control) -> None:
        self.seen: list[Seen] = []
        self.answers: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}
        front = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                front.seen.append(Seen(self.command, self.path, self.headers.get("Content-Type", ""), body))
                status, headers, answer = front.answer(control, front.seen[-1])
                self.send_response(status)
                for name, text in {"Content-Length": str(len(answer)), **headers}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PATCH = _serve

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, control: Control, seen: Seen) -> tuple[int, dict[str, str], bytes]:
        for part, answers in self.answers.items():
            if part in seen.path and answers:
                return answers.pop(0)
        url = urlsplit(seen.path)
        body = json.loads(seen.body) if seen.body else None
        query = dict(parse_qsl(url.query))
        try:
            found = control.request(
                seen.method, url.path, body, seen.content_type or "application/json", query
            )
        except Refused as exc:
            found = exc.status
        return int(found.get("code", 200)), {"Content-Type": "application/json"}, json.dumps(found).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def front(cluster: Cluster) -> Iterator[Front]:
    found = Front(cluster.control)
    yield found
    found.close()


# Flags and variables


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({}, "set NODE_NAME, or both POD_NAME and POD_NAMESPACE"),
        ({"NODE_NAME": "", "POD_NAME": "p"}, "POD_NAMESPACE"),
        ({"POD_NAMESPACE": "kube-flannel"}, "NODE_NAME"),
    ],
)
def test_a_node_must_have_a_name(cluster: Cluster, environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cluster.manager(environ=environ)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        "\tx: y",
        "{}",
        "clusters: []\ncontexts: []\nusers: []\ncurrent-context: x\n",
        "clusters: []\ncontexts: []\nusers: []\n",
        "clusters: [{name: c, cluster: {server: 7}}]\ncontexts: []\n",
        "contexts: [{name: x, context: {cluster: c}}]\nclusters: []\ncurrent-context: x\n",
        "contexts: [{name: x, context: {cluster: c}}]\nclusters: [{name: c, cluster: {server: 'https://'}}]\n"
        "current-context: x\n",
        "contexts: [{name: x, context: {cluster: c}}]\ncurrent-context: x\n"
        "clusters: [{name: c, cluster: {server: 'https://h', certificate-authority: /nowhere/ca.crt}}]\n",
        "contexts: [{name: x, context: {cluster: c}}]\ncurrent-context: x\n"
        "clusters: [{name: c, cluster: {server: 'https://h', certificate-authority-data: eHg=}}]\n",
    ],
)
def test_a_kubeconfig_that_cannot_be_right(cluster: Cluster, tmp_path: Path, text: str | None) -> None:
    kubeconfig = tmp_path / "config"
    if text is not None:
        kubeconfig.write_text(text)
    with pytest.raises(ConfigError, match=rf"^--kubeconfig-file={kubeconfig}") as caught:
        cluster.manager(kubeconfig=kubeconfig)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://", "ftp://h", "https://h:port", "://", "http://[::1"])
def test_a_url_that_cannot_be_right(cluster: Cluster, url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--kube-api-url="):
        cluster.manager(api_url=url, kubeconfig="")


def test_neither_flags_nor_a_pod(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"KUBERNETES_SERVICE_HOST .* --kubeconfig-file or --kube-api-url"):
        cluster.manager(kubeconfig="")
    monkeypatch.setattr(kubeapi, "SERVICE_ACCOUNT", tmp_path / "account")
    environ = {"NODE_NAME": "n1", **cluster.server.environment}
    with pytest.raises(ConfigError, match=r"account/ca.crt does not exist: .*serviceAccountName"):
        cluster.manager(kubeconfig="", environ=environ)


def test_the_prefix_is_checked_and_nothing_is_asked(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"--kube-annotation-prefix=org"):
        cluster.manager(prefix="org")
    cluster.manager()
    assert not cluster.control.counts()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read --net-config-path=.*kube-flannel-cfg"),
        ("{", "net-conf.json holds no network configuration"),
        ('{"EnableIPv4": false}', "EnableIPv4 and EnableIPv6 in .* are both false"),
        ("{}", "^Network in .* is not set: .*--cluster-cidr, or set EnableIPv4 to false"),
        ('{"Network": "10.0.0.0/8", "EnableIPv6": true}', "^IPv6Network in .* set EnableIPv6 to false"),
    ],
)
def test_a_network_configuration_that_cannot_be_right(cluster: Cluster, text: str | None, says: str) -> None:
    if text is None:
        cluster.net_conf.unlink()
    else:
        cluster.net_conf.write_text(text)
    with pytest.raises(ConfigError, match=says):
        cluster.manager().network_config()


def test_subnet_lengths_mean_nothing_here(cluster: Cluster) -> None:
    cluster.net_conf.write_text('{"Network": "10.244.0.0/30", "SubnetLen": 31, "SubnetMin": "1.2.3.4"}')
    config = cluster.manager().network_config()
    assert (config.network, config.subnet_max) == (IPv4Network("10.244.0.0/30"), None)


# Which node this is, and how the API server is reached


def test_the_pod_names_the_node(cluster: Cluster) -> None:
    environ = {"POD_NAME": "kube-flannel-ds-1", "POD_NAMESPACE": "kube-flannel"}
    manager = cluster.manager(environ=environ)
    assert manager.name == "Kubernetes Subnet Manager - kube-flannel/kube-flannel-ds-1"
    with pytest.raises(
        StoreUnavailable, match=r"pod kube-flannel/kube-flannel-ds-1 does not exist .*NODE_NAME"
    ):
        manager.network_config()
    cluster.control.add_pod("kube-flannel", "kube-flannel-ds-1")
    with pytest.raises(StoreUnavailable, match=r"is on no node"):
        manager.network_config()
    path = "/api/v1/namespaces/kube-flannel/pods/kube-flannel-ds-1"
    cluster.control.request("DELETE", path)
    cluster.control.add_pod("kube-flannel", "kube-flannel-ds-1", "n1")
    manager.network_config()
    assert manager.name == "Kubernetes Subnet Manager - n1"
    cluster.control.request("DELETE", path)
    # Found once is enough, and a given name needs no pod.
    manager.network_config()
    cluster.manager(environ={**environ, "NODE_NAME": "n7"}).network_config()
    assert cluster.control.counts() == {"get pods": 3}


def in_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> KubeManager:
    monkeypatch.setattr(kubeapi, "SERVICE_ACCOUNT", cluster.server.service_account)
    return cluster.manager(kubeconfig="", environ={"NODE_NAME": "n1", **cluster.server.environment})


def test_in_a_pod_and_its_token_is_replaced(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.control.add_node("n1", "10.244.1.0/24")
    manager = in_cluster(cluster, monkeypatch)
    manager.acquire(manager.network_config(), OWN, None)
    with Watching(manager) as watching:
        cluster.control.expire_token()
        assert manager.public_ips() == ("", "")
        cluster.control.end_watches()
        cluster.peer("b", "10.244.2.0/24")
        watching.wait_until(lambda now: "10.244.2.0-24" in now)
        assert watching.error is None and cluster.lists() == 1


def test_a_token_that_is_not_accepted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.control.add_node("n1", "10.244.1.0/24")
    manager = in_cluster(cluster, monkeypatch)
    cluster.control.expire_token(replace=False)
    token = cluster.server.service_account / "token"
    with pytest.raises(
        StoreUnavailable, match=rf"does not accept our credentials \(401 .*the token file {token}"
    ):
        manager.public_ips()
    cluster.control.expire_token()
    assert manager.public_ips() == ("", "")
    text = token.read_text()
    for bad in ("", "ä", "a\nb"):
        token.write_text(bad)
        with pytest.raises(StoreUnavailable):
            manager.public_ips()
    token.unlink()
    with pytest.raises(StoreUnavailable, match=rf"cannot read the token file {token}"):
        manager.public_ips()
    token.write_text(text + "\n")
    assert manager.public_ips() == ("", "")


def test_a_kubeconfig_that_is_repaired_counts(cluster: Cluster, tmp_path: Path) -> None:
    cluster.control.add_node("n1")
    good = cluster.server.kubeconfig.read_text()
    token = re.search(r"tokenFile: (.*)", good)
    assert token is not None
    kubeconfig = tmp_path / "config"
    kubeconfig.write_text(good.replace(token[0], "token: stale"))
    manager = cluster.manager(kubeconfig=kubeconfig)
    for text in ("rubbish", "clusters: []", ""):
        with pytest.raises(StoreUnavailable, match=rf"--kubeconfig-file={kubeconfig}"):
            manager.public_ips()
        kubeconfig.write_text(text)
    # A path in it is relative to the file.
    shutil.copy(token[1], tmp_path / "token")
    kubeconfig.write_text(good.replace(token[0], "tokenFile: token"))
    assert manager.public_ips() == ("", "")


def test_a_kubeconfig_with_everything_in_it(cluster: Cluster, tmp_path: Path) -> None:
    cluster.control.add_node("n1")
    server = cluster.server

    def encoded(file: str) -> str:
        return b64encode((server.directory / file).read_bytes()).decode()

    shutil.copy(server.directory / "server.crt", tmp_path / "client.crt")
    shutil.copy(server.directory / "server.key", tmp_path / "client.key")
    user = {"token": (server.service_account / "token").read_text()}
    files = {"client-certificate": "client.crt", "client-key": "client.key"}
    data = {"client-certificate-data": encoded("server.crt"), "client-key-data": encoded("server.key")}
    authority: dict[str, object] = {"server": server.url, "certificate-authority-data": encoded("ca.crt")}
    careless: dict[str, object] = {"server": server.url, "insecure-skip-tls-verify": True}
    kubeconfig = tmp_path / "config"

    def write(found: dict[str, object], who: dict[str, str]) -> None:
        config = {
            "clusters": [{"name": "c", "cluster": found}],
            "users": [{"name": "u", "user": who}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        kubeconfig.write_text(json.dumps(config))

    for found, who in ((careless, user | data), (authority, user), (authority, user | files)):
        write(found, who)
        assert cluster.manager(kubeconfig=kubeconfig).public_ips() == ("", "")
    cluster.control.wrong_ca()
    with pytest.raises(StoreUnavailable, match=rf"the CA in --kubeconfig-file={kubeconfig} must be"):
        cluster.manager(kubeconfig=kubeconfig).public_ips()
    write(careless, user)
    assert cluster.manager(kubeconfig=kubeconfig).public_ips() == ("", "")
    write(authority, user | files)
    (tmp_path / "client.key").unlink()
    with pytest.raises(ConfigError, match=rf"No such file or directory: .*{tmp_path}/client.key"):
        cluster.manager(kubeconfig=kubeconfig)


def test_the_wrong_certificate(cluster: Cluster) -> None:
    cluster.control.add_node("n1")
    manager = cluster.manager()
    cluster.control.wrong_ca()
    server = cluster.server
    says = rf"certificate of the API server at {server.url} is not trusted: .*; the CA file {server.ca}"
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=says):
            manager.public_ips()
    cluster.control.wrong_ca(False)
    assert manager.public_ips() == ("", "")


def test_a_ca_file_that_is_repaired_counts(cluster: Cluster, tmp_path: Path) -> None:
    cluster.control.add_node("n1")
    ca, kubeconfig = tmp_path / "ca.crt", tmp_path / "config"
    shutil.copy(cluster.server.directory / "wrong-ca.crt", ca)
    kubeconfig.write_text(cluster.server.kubeconfig.read_text().replace(str(cluster.server.ca), "ca.crt"))
    manager = cluster.manager(kubeconfig=kubeconfig)
    with pytest.raises(StoreUnavailable, match=rf"is not trusted: .*{ca}"):
        manager.public_ips()
    shutil.copy(cluster.server.ca, ca)
    assert manager.public_ips() == ("", "")


def test_a_name_that_the_certificate_does_not_have(cluster: Cluster) -> None:
    url = cluster.server.url.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(StoreUnavailable, match=r"does not answer|is not trusted"):
        cluster.manager(api_url=url).public_ips()


def test_the_url_replaces_that_of_the_kubeconfig(cluster: Cluster, tmp_path: Path) -> None:
    cluster.control.add_node("n1")
    kubeconfig = tmp_path / "config"
    wrong = cluster.server.kubeconfig.read_text().replace(cluster.server.url, "https://127.0.0.1:1")
    kubeconfig.write_text(wrong)
    with pytest.raises(
        StoreUnavailable, match=r"https://127.0.0.1:1 does not answer to get nodes: .*refused"
    ):
        cluster.manager(kubeconfig=kubeconfig).public_ips()
    for url in (cluster.server.url, f"{cluster.server.url}/", cluster.server.url.removeprefix("https://")):
        assert cluster.manager(api_url=url, kubeconfig=kubeconfig).public_ips() == ("", "")


def test_the_url_alone(cluster: Cluster, front: Front) -> None:
    """No credentials, no TLS; a path before the API's."""
    cluster.control.add_node("n1")
    for url in (front.url, front.url.removeprefix("http://")):
        assert cluster.manager(api_url=url, kubeconfig="").public_ips() == ("", "")
    answer = json.dumps(cluster.control.get_node("n1")).encode()
    front.answers["/k8s/clusters/c1/api/v1/nodes/n1"] = [(200, {}, answer)]
    assert cluster.manager(api_url=f"{front.url}/k8s/clusters/c1", kubeconfig="").public_ips() == ("", "")


def test_through_a_proxy(cluster: Cluster) -> None:
    """The proxy alone knows where `kubernetes` is."""
    cluster.control.add_node("n1")
    asked: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client, socket.create_connection(cluster.server.address) as upstream:
            asked.append(client.recv(65536).split(b"\r\n")[0])
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            other = Thread(target=pump, args=(upstream, client), daemon=True)
            other.start()
            pump(client, upstream)
            other.join(5)

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the other direction has ended

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        environ = {"NODE_NAME": "n1", "HTTPS_PROXY": f"127.0.0.1:{listener.getsockname()[1]}"}
        manager = cluster.manager(api_url="https://kubernetes:6443", environ=environ)
        assert manager.public_ips() == ("", "")
        manager.close()
        thread.join(5)
    assert asked == [b"CONNECT kubernetes:6443 HTTP/1.1"]


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "gopher://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used(cluster: Cluster, proxy: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot use what it names: "):
        cluster.manager(api_url="https://kubernetes", environ={"NODE_NAME": "n1", "HTTPS_PROXY": proxy})


@pytest.mark.parametrize(
    ("verb", "what", "use"),
    [
        ("get", "pods", lambda manager: manager.network_config()),
        ("get", "nodes", lambda manager: manager.public_ips()),
        ("list", "nodes", lambda manager: next(manager.watch(Event()))),
        ("watch", "nodes", lambda manager: list(manager.watch(Event()))),
        ("patch", "nodes/status", lambda manager: manager.complete(Lease(None, None, OWN))),
    ],
)
def test_rights_that_are_missing_are_named(
    cluster: Cluster, verb: str, what: str, use: Callable[[KubeManager], object]
) -> None:
    cluster.control.add_node("n1", "10.244.1.0/24")
    cluster.control.add_pod("kube-flannel", "p", "n1")
    manager = cluster.manager(environ={"POD_NAME": "p", "POD_NAMESPACE": "kube-flannel"})
    if what != "pods":
        manager.network_config()
    cluster.control.forbid(verb, what)
    try:
        says = rf"does not allow flanneld to {verb} {what} \(403 .*; the ClusterRole flannel .*{what}"
        with pytest.raises(StoreUnavailable, match=says):
            use(manager)
    finally:
        cluster.control.allow(verb, what)
        cluster.control.request("DELETE", "/api/v1/namespaces/kube-flannel/pods/p")


def test_all_nodes_are_not_listed_for_each_attempt(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.control.add_node("n1", "10.244.1.0/24")
    manager = cluster.manager()
    config = manager.network_config()
    cluster.control.forbid("patch", "nodes/status")
    try:
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match=r"patch nodes/status"):
                manager.acquire(config, OWN, None)
        assert cluster.lists() == 1
        monkeypatch.setattr(kube, "RECENT_S", 0.0)
        with pytest.raises(StoreUnavailable):
            manager.acquire(config, OWN, None)
        assert cluster.lists() == 2
    finally:
        cluster.control.allow("patch", "nodes/status")
    cluster.peer("b", "10.244.2.0/24")
    manager.acquire(config, OWN, None)
    assert snapshot_of(manager) == {OWN_KEY, "10.244.2.0-24"}


# The lease


def test_the_bytes_on_the_wire(cluster: Cluster, front: Front) -> None:
    cluster.control.add_node("n1", "10.244.1.0/24", annotations={"other.io/x": "kept"})
    manager = cluster.manager(api_url=front.url, kubeconfig="")
    lease = manager.acquire(manager.network_config(), OWN, None)
    assert lease == Lease(IPv4Network("10.244.1.0/24"), None, OWN)
    patch = Seen(
        "PATCH",
        "/api/v1/nodes/n1/status",
        "application/strategic-merge-patch+json",
        b'{"metadata":{"annotations":{'
        b'"flannel.alpha.coreos.com/backend-data":"{\\"VNI\\":1,\\"VtepMAC\\":\\"c6:d2:32:6f:8f:44\\"}",'
        b'"flannel.alpha.coreos.com/backend-type":"vxlan",'
        b'"flannel.alpha.coreos.com/kube-subnet-manager":"true",'
        b'"flannel.alpha.coreos.com/public-ip":"192.168.64.3"}}}',
    )
    assert [seen for seen in front.seen if seen.method == "PATCH"] == [patch]
    assert cluster.control.annotations("n1") == {
        **json.loads(patch.body)["metadata"]["annotations"],
        "other.io/x": "kept",
    }

    # Nothing has changed: nothing is written.
    front.seen.clear()
    assert manager.acquire(manager.network_config(), OWN, None) == lease
    assert manager.renew(lease) == lease
    assert not [seen for seen in front.seen if seen.method == "PATCH"]

    # Somebody changed one: that one is written.
    cluster.control.set_annotations("n1", {PREFIX + "public-ip": "1.1.1.1"}, remove=[PREFIX + "backend-type"])
    assert manager.renew(lease) == lease
    body = (
        b'{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-type":"vxlan",'
        b'"flannel.alpha.coreos.com/public-ip":"192.168.64.3"}}}'
    )
    assert [seen.body for seen in front.seen if seen.method == "PATCH"] == [body]


def test_the_condition(cluster: Cluster, front: Front) -> None:
    cluster.control.add_node("n1", "10.244.1.0/24")
    lease = Lease(None, None, OWN)
    manager = cluster.manager(api_url=front.url, kubeconfig="")
    manager.complete(lease)
    patches = [seen for seen in front.seen if seen.method == "PATCH"]
    moment = rb'"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"'
    assert [(seen.path, seen.content_type) for seen in patches] == [
        ("/api/v1/nodes/n1/status", "application/strategic-merge-patch+json")
    ]
    assert re.fullmatch(
        rb'{"status":{"conditions":\[{"type":"NetworkUnavailable","status":"False",'
        rb'"lastHeartbeatTime":' + moment + rb',"lastTransitionTime":' + moment
        + rb',"reason":"FlannelIsUp","message":"Flannel is running on this node"}\]}}',
        patches[0].body,
    )  # fmt: skip
    conditions = {c["type"]: c["status"] for c in cluster.control.get_node("n1")["status"]["conditions"]}
    assert conditions == {"NetworkUnavailable": "False", "Ready": "True"}
    front.seen.clear()
    manager.complete(lease)
    assert [seen.method for seen in front.seen] == ["GET"]
    # A cloud's route controller, or a restarted kubelet.
    for status, reason in (("False", "RouteCreated"), ("True", "NoRouteCreated")):
        cluster.control.set_condition("n1", "NetworkUnavailable", status, reason)
        manager.complete(lease)
        found = cluster.control.get_node("n1")["status"]["conditions"]
        assert ("False", "FlannelIsUp") in [(c["status"], c["reason"]) for c in found]
    front.seen.clear()
    cluster.manager(api_url=front.url, kubeconfig="", set_network_unavailable=False).complete(lease)
    assert not front.seen
    cluster.control.delete_node("n1")
    with pytest.raises(StoreUnavailable, match=r"node n1 does not exist"):
        manager.complete(lease)


def test_another_prefix(cluster: Cluster) -> None:
    cluster.control.add_node("n1", "10.244.1.0/24")
    manager = cluster.manager(prefix="example.org/blue")
    manager.acquire(manager.network_config(), OWN, None)
    assert set(cluster.control.annotations("n1")) == {
        f"example.org/blue-{key}"
        for key in ("backend-data", "backend-type", "kube-subnet-manager", "public-ip")
    }
    stored = manager.stored(IPv4Address("9.9.9.9"))
    assert stored is not None and stored.attrs == OWN
    assert cluster.manager().stored(IPv4Address("9.9.9.9")) is None


def test_a_prefix_that_the_api_server_does_not_take(cluster: Cluster) -> None:
    cluster.control.add_node("n1", "10.244.1.0/24")
    manager = cluster.manager(prefix="X Y.org.com")
    with pytest.raises(ConfigError, match=r"will never patch nodes/status like this: 422"):
        manager.acquire(manager.network_config(), OWN, None)


def test_dual_stack(cluster: Cluster) -> None:
    cluster.net_conf.write_text(DUAL)
    cluster.control.add_node("n1", "10.244.1.0/24", "fd00:10:244:1::/64")
    cluster.peer("b", "10.244.2.0/24")
    manager = cluster.manager()
    attrs = Attributes(IPv4Address("192.168.64.3"), IPv6Address("fd01::3"), "vxlan", MAC, MAC)
    lease = manager.acquire(manager.network_config(), attrs, None)
    assert lease == Lease(IPv4Network("10.244.1.0/24"), IPv6Network("fd00:10:244:1::/64"), attrs)
    assert cluster.told() == {
        "backend-data": MAC,
        "backend-type": "vxlan",
        "backend-v6-data": MAC,
        "kube-subnet-manager": "true",
        "public-ip": "192.168.64.3",
        "public-ipv6": "fd01::3",
    }
    assert manager.stored(IPv4Address("9.9.9.9")) == lease
    assert snapshot_of(manager) == {lease.key, "10.244.2.0-24"}


def snapshot_of(manager: KubeManager) -> set[str]:
    with closing(manager.watch(Event())) as updates:  # type: ignore[type-var]  # it is a generator
        first = next(updates)
    assert isinstance(first, Snapshot)
    return {lease.key for lease in first.leases}


def test_the_operators_annotations(cluster: Cluster) -> None:
    """`node-public-ip` is for the choice of the interface, `public-ip-overwrite` for what is published."""
    given = {"node-public-ip": "10.0.0.1", "node-public-ipv6": "fd01::1", "public-ip-overwrite": "172.18.0.2"}
    cluster.control.add_node("n1", "10.244.1.0/24", annotations={PREFIX + key: given[key] for key in given})
    manager = cluster.manager()
    assert manager.public_ips() == ("10.0.0.1", "fd01::1")
    assert manager.stored(IPv4Address("9.9.9.9")) is None
    lease = manager.acquire(manager.network_config(), OWN, None)
    assert lease.attrs == OWN
    assert cluster.told()["public-ip"] == "172.18.0.2"
    with Watching(manager) as watching:
        # Nobody has to wonder who changed it.
        assert watching.leases == {lease.key: lease}
        manager.renew(lease)
        cluster.control.set_annotations("n1", {PREFIX + "public-ip": "5.6.7.8"})
        watching.wait_until(lambda now: now[lease.key] != lease)
        assert watching.leases[lease.key].attrs.public_ip == IPv4Address("5.6.7.8")
        manager.renew(lease)
        watching.wait_until(lambda now: now == {lease.key: lease})
    assert cluster.told()["public-ip"] == "172.18.0.2"


def test_a_node_that_is_not_ready_for_us_yet(cluster: Cluster) -> None:
    manager = cluster.manager()
    config = manager.network_config()
    for use in (
        manager.public_ips,
        lambda: manager.stored(IPv4Address("9.9.9.9")),
        lambda: manager.acquire(config, OWN, None),
    ):
        with pytest.raises(StoreUnavailable, match=r"node n1 does not exist; its kubelet .*NODE_NAME"):
            use()
    cluster.control.add_node("n1")
    with pytest.raises(StoreUnavailable, match=r"node n1 has no podCIDR: .*--allocate-node-cidrs=true"):
        manager.acquire(config, OWN, None)
    assert cluster.lists() == 0  # while it waits it asks for one node, not for all
    cluster.control.set_pod_cidrs("n1", "10.244.1.0/24")
    assert manager.acquire(config, OWN, None).key == OWN_KEY


@pytest.mark.parametrize("cidr", ["10.245.1.0/24", "fd00:10:244:1::/64"])
def test_a_range_that_does_not_fit_is_refused_before_anything_is_written(cluster: Cluster, cidr: str) -> None:
    cluster.control.add_node("n1", cidr)
    manager = cluster.manager()
    with pytest.raises(ConfigError, match=re.escape(cidr)):
        manager.acquire(manager.network_config(), OWN, None)
    assert cluster.told() == {}


@pytest.mark.parametrize(
    ("cidr", "public_ip", "says"),
    [
        (
            "10.244.1.0/24",
            "1.1.1.1",
            "podCIDR 10.244.1.0/24 of node n1 overlaps podCIDR 10.244.1.0/24 of node b",
        ),
        ("10.244.2.0/24", "192.168.64.3", "public IP 192.168.64.3 of node n1 is already that of node b"),
    ],
)
def test_what_another_live_node_has_is_refused(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, cidr: str, public_ip: str, says: str
) -> None:
    cluster.control.add_node("n1", "10.244.1.0/24")
    cluster.peer("b", cidr, public_ip=public_ip)
    manager = cluster.manager()
    config = manager.network_config()
    with pytest.raises(ConfigError, match=rf"^{says}, which is Ready"):
        manager.acquire(config, OWN, None)
    assert cluster.told() == {} and not caplog.records

    cluster.control.set_condition("b", "Ready", "Unknown", "NodeStatusUnknown")
    manager.acquire(config, OWN, None)
    assert first_of(caplog) == f"{says}; going on, since that one is not Ready"

    # It comes back; we were here.
    caplog.clear()
    cluster.control.set_condition("b", "Ready", "True")
    manager.acquire(config, OWN, None)
    assert first_of(caplog) == f"{says}; going on, since this one had it before"


def first_of(caplog: pytest.LogCaptureFixture) -> str:
    return caplog.records[0].getMessage()


def test_a_new_address_that_another_node_has_is_refused(cluster: Cluster) -> None:
    manager = cluster.joined()
    cluster.peer("b", "10.244.2.0/24", public_ip="192.168.64.4")
    moved = Attributes(IPv4Address("192.168.64.4"), None, "vxlan", MAC)
    with pytest.raises(ConfigError, match=r"public IP 192.168.64.4 .* node b"):
        manager.acquire(manager.network_config(), moved, None)
    assert cluster.told()["public-ip"] == "192.168.64.3"


def test_renewal(cluster: Cluster) -> None:
    manager = cluster.joined()
    lease = Lease(IPv4Network("10.244.1.0/24"), None, OWN)
    moved = Lease(lease.subnet, None, Attributes(IPv4Address("192.168.64.9"), None, "vxlan", MAC))
    assert manager.renew(moved) == moved
    assert cluster.told()["public-ip"] == "192.168.64.9"
    cluster.control.delete_node("n1")
    with pytest.raises(StoreUnavailable, match=r"node n1 does not exist"):
        manager.renew(lease)
    cluster.control.add_node("n1")
    with pytest.raises(StoreUnavailable, match=r"node n1 has no podCIDR at present"):
        manager.renew(lease)
    cluster.control.set_pod_cidrs("n1", "10.244.1.0/24")
    assert manager.renew(lease) == lease
    assert cluster.told()["public-ip"] == "192.168.64.3"
    cluster.control.delete_node("n1")
    cluster.control.add_node("n1", "10.244.8.0/24")
    with pytest.raises(
        LeaseLost, match=r"node n1 has podCIDR 10.244.8.0/24 now, no longer that of 10.244.1.0-24"
    ):
        manager.renew(lease)
    assert cluster.told() == {}


# The watch


def test_a_snapshot_and_then_changes(cluster: Cluster) -> None:
    cluster.peer("b", "10.244.2.0/24")
    cluster.control.add_node("bare", "10.244.9.0/24")
    cluster.control.add_node("waiting")
    with Watching(cluster.joined()) as watching:
        assert set(watching.leases) == {OWN_KEY, "10.244.2.0-24"}
        assert watching.leases[OWN_KEY].attrs == OWN
        cluster.peer("c", "10.244.3.0/24", backend_data='{"VNI":7}')
        watching.wait_until(lambda now: "10.244.3.0-24" in now)
        assert watching.leases["10.244.3.0-24"].attrs.backend_data == '{"VNI":7}'
        cluster.control.delete_node("b")
        watching.wait_until(lambda now: "10.244.2.0-24" not in now)
        cluster.control.set_annotations("c", {}, remove=[PREFIX + "kube-subnet-manager"])
        watching.wait_until(lambda now: "10.244.3.0-24" not in now)
        cluster.control.set_annotations("bare", peer_annotations("bare"))
        watching.wait_until(lambda now: "10.244.9.0-24" in now)
        assert watching.snapshots == 1 and watching.error is None
    assert cluster.control.counts()["watch nodes"] == cluster.lists() == 1


def test_a_heartbeat_is_no_update(cluster: Cluster) -> None:
    cluster.peer("b", "10.244.2.0/24")
    with Watching(cluster.joined()) as watching:
        for name in ("b", "n1", "b"):
            cluster.control.heartbeat(name)
        cluster.control.add_node("bare", "10.244.9.0/24")
        cluster.control.delete_node("bare")
        cluster.control.bookmark()
        cluster.control.set_annotations("b", {PREFIX + "public-ip": "9.9.9.9"})
        watching.wait_until(lambda now: str(now["10.244.2.0-24"].attrs.public_ip) == "9.9.9.9")
        assert len(watching.updates) == 2
        # Also one that comes first after another watch has begun.
        cluster.control.end_watches()
        wait_for(lambda: cluster.control.counts()["watch nodes"] == 2)
        cluster.control.heartbeat("b")
        cluster.control.delete_node("b")
        watching.wait_until(lambda now: "10.244.2.0-24" not in now)
        assert len(watching.updates) == 3


def test_there_and_back(cluster: Cluster) -> None:
    cluster.peer("b", "10.244.2.0/24")
    with Watching(cluster.joined()) as watching:
        before = watching.leases
        for number in range(1, 6):
            for address in (f"9.9.9.{number}", str(before["10.244.2.0-24"].attrs.public_ip)):
                cluster.control.set_annotations("b", {PREFIX + "public-ip": address})
                watching.wait_until(lambda now: str(now["10.244.2.0-24"].attrs.public_ip) == address)  # noqa: B023
        cluster.control.delete_node("b")
        watching.wait_until(lambda now: "10.244.2.0-24" not in now)
        cluster.peer("b", "10.244.2.0/24")
        watching.wait_until(lambda now: now == before)


def test_one_list_serves_all(cluster: Cluster) -> None:
    cluster.peer("b", "10.244.2.0/24")
    manager = cluster.joined()
    assert cluster.lists() == 1
    for _ in range(3):
        assert snapshot_of(manager) == {OWN_KEY, "10.244.2.0-24"}
    cluster.peer("c", "10.244.3.0/24")
    cluster.control.delete_node("b")
    with Watching(manager) as watching:
        watching.wait_until(lambda now: set(now) == {OWN_KEY, "10.244.3.0-24"})
        assert watching.snapshots == 1
    assert cluster.lists() == 1


def changes(update: Update) -> tuple[Change, ...]:
    assert isinstance(update, tuple)
    return update


def test_another_configuration_makes_another_table(cluster: Cluster) -> None:
    cluster.peer("b", "10.244.2.0/24")
    cluster.peer("c", "10.99.2.0/24")
    manager = cluster.joined()
    assert snapshot_of(manager) == {OWN_KEY, "10.244.2.0-24"}
    cluster.net_conf.write_text('{"Network": "10.0.0.0/8"}')
    manager.network_config()
    assert snapshot_of(manager) == {OWN_KEY, "10.244.2.0-24", "10.99.2.0-24"}


def test_pages(cluster: Cluster) -> None:
    cluster.control.fill(1200, subnet="10.244.0.0/28")
    cluster.net_conf.write_text('{"Network": "10.244.0.0/15"}')
    assert len(snapshot_of(cluster.manager())) == 1200
    assert [seen.query.partition("&")[0] for seen in cluster.control.seen()][:3] == ["limit=500"] * 3
    assert cluster.lists() == 3


def test_rubbish_costs_its_own_node_only(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.peer("good", "10.244.2.0/24")
    cluster.peer("bad-ip", "10.244.3.0/24", public_ip="rubbish")
    cluster.peer("bad-data", "10.244.4.0/24", backend_data="{")
    cluster.peer("outside", "10.99.4.0/24")
    cluster.peer("twin", "10.244.2.0/24")
    manager = cluster.manager()
    manager.network_config()
    with Watching(manager) as watching:
        assert set(watching.leases) == {"10.244.2.0-24"}
        for name in ("bad-ip", "bad-data"):
            cluster.control.heartbeat(name)
        cluster.peer("late", "10.244.5.0/24", public_ip="")
        cluster.peer("c", "10.244.6.0/24")
        watching.wait_until(lambda now: "10.244.6.0-24" in now)
        cluster.control.delete_node("good")
        twin = IPv4Address(peer_annotations("twin")[PREFIX + "public-ip"])
        watching.wait_until(lambda now: now["10.244.2.0-24"].attrs.public_ip == twin)
    cluster.control.compact()
    assert snapshot_of(manager) == {"10.244.2.0-24", "10.244.6.0-24"}
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 5
    for name, what in (
        ("bad-ip", "public-ip is 'rubbish'"),
        ("bad-data", "not JSON"),
        ("outside", "outside of the network"),
        ("late", "no complete IPv4 lease"),
        ("twin", "overlaps that of node good"),
    ):
        assert sum(text.startswith(f"Node {name} ") and what in text for text in said) == 1


def test_our_own_node_is_deleted_and_comes_back(cluster: Cluster) -> None:
    manager = cluster.joined()
    lease = Lease(IPv4Network("10.244.1.0/24"), None, OWN)
    with Watching(manager) as watching:
        cluster.control.delete_node("n1")
        watching.wait_until(lambda now: not now)
        assert watching.updates[-1] == (Change(OWN_KEY, None),)
        cluster.peer("thief", "10.244.1.0/24")
        cluster.control.add_node("n1", "10.244.1.0/24")
        manager.renew(lease)
        watching.wait_until(lambda now: now == {OWN_KEY: lease})
        told = [change.lease for update in watching.updates[1:] for change in changes(update)]
        assert all(found in (None, lease) for found in told)  # never that of the thief


# Trouble on the way


@pytest.mark.parametrize("how", ["cut", "ended", "reset"])
def test_a_watch_that_ends_goes_on_where_it_was(cluster: Cluster, how: str) -> None:
    cluster.peer("b", "10.244.2.0/24")
    with Watching(cluster.joined()) as watching:
        wait_for(lambda: len(cluster.control.watches()) == 1)
        if how == "reset":
            cluster.control.reset("watch", count=1)  # in the middle of the next line
        elif how == "cut":
            cluster.control.close_connections()
        else:
            cluster.control.end_watches()
        cluster.peer("c", "10.244.3.0/24")
        cluster.control.delete_node("b")
        watching.wait_until(lambda now: set(now) == {OWN_KEY, "10.244.3.0-24"})
        assert watching.snapshots == 1 and watching.error is None
        seen = [change for update in watching.updates[1:] for change in changes(update)]
        assert sorted(change.key for change in seen) == ["10.244.2.0-24", "10.244.3.0-24"]
    assert cluster.lists() == 1


def test_bookmarks_and_heartbeats_move_the_version_on(cluster: Cluster) -> None:
    cluster.peer("b", "10.244.2.0/24")
    with Watching(cluster.joined()) as watching:
        cluster.control.heartbeat("b")
        version = cluster.control.version()
        cluster.control.end_watches()
        wait_for(lambda: cluster.control.watches() == [version])
        version = cluster.control.advance(1000)
        cluster.control.bookmark()
        cluster.control.end_watches()
        wait_for(lambda: cluster.control.watches() == [version])
        assert len(watching.updates) == 1
    assert cluster.lists() == 1


def test_bookmarks_outlast_a_short_history(tmp_path: Path) -> None:
    """The nodes are quiet, all else is not: without bookmarks the version of the watch would be too old."""
    with KubeServer(tmp_path / "kube", window=20) as running, closing(Cluster(running, tmp_path)) as cluster:
        with Watching(cluster.joined()) as watching:
            wait_for(lambda: len(cluster.control.watches()) == 1)
            for number in range(30):
                cluster.control.add_pod("default", f"p{number}")
            cluster.control.bookmark()
            cluster.control.end_watches()
            wait_for(lambda: cluster.control.watches() == [cluster.control.version()])
            cluster.peer("c", "10.244.3.0/24")
            watching.wait_until(lambda now: "10.244.3.0-24" in now)
        assert cluster.lists() == 1


GONE = (
    b'{"kind":"Status","status":"Failure","reason":"Expired","code":410,"message":"too old resource version"}'
)


def event(kind: str, name: str = "", version: str = "9", **more: object) -> bytes:
    found = {"metadata": {"name": name, "resourceVersion": version}, **more}
    return json.dumps({"type": kind, "object": found}).encode() + b"\n"


def fronted(cluster: Cluster, front: Front, *watches: tuple[int, dict[str, str], bytes]) -> KubeManager:
    """A manager with its lease whose watches get these answers."""
    cluster.control.add_node("n1", "10.244.1.0/24")
    cluster.control.advance(20)  # past the versions that the answers name
    manager = cluster.manager(api_url=front.url, kubeconfig="")
    manager.acquire(manager.network_config(), OWN, None)
    front.answers["watch=true"] = list(watches)
    return manager


LOST: dict[str, tuple[int, dict[str, str], bytes]] = {
    "status": (410, {}, GONE),
    "event": (200, {}, b'{"type":"ERROR","object":' + GONE + b"}\n"),
    "unreadable": (200, {}, b"{nonsense}\n"),
    "unknown": (200, {}, b'{"type":"ADDED"}\n'),
    "too new": (
        504,
        {},
        b'{"kind":"Status","code":504,"message":"Timeout: Too large resource version: 9, current: 3",'
        b'"details":{"causes":[{"reason":"ResourceVersionTooLarge","message":"Too large"}]}}',
    ),
}


@pytest.mark.parametrize("how", LOST)
def test_a_lost_history_in_every_form(
    cluster: Cluster, front: Front, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One list, and no update, for nothing has changed."""
    monkeypatch.setattr(kube, "RELIST_FIRST_S", 0.0)
    manager = fronted(
        cluster, front, LOST[how], (200, {}, event("BOOKMARK")), (200, {}, event("BOOKMARK", version="10"))
    )
    stop = Event()
    updates = manager.watch(stop)
    assert isinstance(next(updates), Snapshot)
    front.answers["watch=true"].append((200, {}, event("DELETED", "n1", version="11")))
    assert next(updates) == (Change(OWN_KEY, None),)
    assert sum("limit=" in seen.path for seen in front.seen) == 2
    stop.set()
    assert list(updates) == []


def test_a_page_whose_history_is_lost(cluster: Cluster) -> None:
    cluster.control.fill(600, subnet="10.244.0.0/28")
    cluster.net_conf.write_text('{"Network": "10.244.0.0/15"}')
    cluster.control.gone("list", count=2)
    assert len(snapshot_of(cluster.manager())) == 600
    assert cluster.lists() == 4
    cluster.control.gone("list")
    with pytest.raises(StoreUnavailable, match=r"lost the list of nodes 3 times"):
        next(cluster.manager().watch(Event()))


def test_after_a_lost_history_only_the_difference_is_yielded(own_cluster: Cluster) -> None:
    """Changes that nobody told: compacted while the watch was away."""
    cluster = own_cluster
    for number in (2, 3):
        cluster.peer(f"b{number}", f"10.244.{number}.0/24")
    updates = cluster.manager().watch(Event())
    assert isinstance(next(updates), Snapshot)
    cluster.control.delete_node("b2")
    cluster.peer("b4", "10.244.4.0/24")
    cluster.control.compact()
    assert [(change.key, change.lease is None) for change in changes(next(updates))] == [
        ("10.244.2.0-24", True),
        ("10.244.4.0-24", False),
    ]
    assert cluster.lists() == 2


def test_a_server_that_is_killed_and_started_again(own_cluster: Cluster) -> None:
    cluster = own_cluster
    cluster.peer("b", "10.244.2.0/24")
    manager = cluster.joined()
    with Watching(manager) as watching:
        cluster.server.kill()
        wait_for(lambda: watching.error is not None)
    assert f"{cluster.server.url} does not answer to get nodes" in str(watching.error)
    with pytest.raises(StoreUnavailable, match=r"does not answer to get nodes: .*refused"):
        manager.renew(Lease(IPv4Network("10.244.1.0/24"), None, OWN))
    cluster.server.start()
    with Watching(manager) as watching:
        cluster.peer("c", "10.244.3.0/24")
        watching.wait_until(lambda now: len(now) == 3)
        assert watching.snapshots == 1 and watching.error is None


def test_a_server_that_lost_its_data(own_cluster: Cluster) -> None:
    """Its versions begin anew, and a watch from an old one would be silent for ever."""
    cluster = own_cluster
    cluster.peer("b", "10.244.2.0/24")
    cluster.control.advance(100_000)
    manager = cluster.joined()
    assert snapshot_of(manager) == {OWN_KEY, "10.244.2.0-24"}
    cluster.server.kill()
    cluster.server.start(lose_data=True)
    cluster.peer("c", "10.244.3.0/24")
    assert snapshot_of(manager) == {"10.244.3.0-24"}


def test_a_store_put_back_under_a_running_watch(cluster: Cluster, front: Front) -> None:
    """Without our own lease it is told whole, so that the consumer may doubt it."""
    cluster.peer("b", "10.244.2.0/24")
    manager = fronted(cluster, front, (200, {}, event("BOOKMARK")), LOST["event"])
    updates = manager.watch(Event())
    assert isinstance(next(updates), Snapshot)
    cluster.control.delete_node("n1")
    again = next(updates)
    assert isinstance(again, Snapshot)
    assert [lease.key for lease in again.leases] == ["10.244.2.0-24"]


def test_a_watch_that_always_ends_at_once(cluster: Cluster, front: Front) -> None:
    manager = fronted(cluster, front, *[(200, {}, b"")] * 3)
    began = time.monotonic()
    updates = manager.watch(Event())
    assert isinstance(next(updates), Snapshot)
    with pytest.raises(StoreUnavailable, match=r"ended the watch of nodes 3 times at once"):
        next(updates)
    assert time.monotonic() - began > 0.4


def test_an_error_in_a_watch(cluster: Cluster, front: Front) -> None:
    status = (
        b'{"type":"ERROR","object":{"kind":"Status","code":500,"message":"etcdserver: leader changed"}}\n'
    )
    manager = fronted(cluster, front, (200, {}, event("DELETED", "n1") + status))
    seen: list[Update] = []

    def consume() -> None:
        for update in manager.watch(Event()):
            seen.append(update)
            time.sleep(0.3)  # so that what follows has come before it is asked for

    with pytest.raises(
        StoreUnavailable, match=r"refuses to watch nodes at present \(500 etcdserver: leader changed"
    ):
        consume()
    # What came before it counts.
    found = LeaseSet()
    for update in seen:
        found = found.fold(update)
    assert isinstance(seen[0], Snapshot) and not found.by_key


def test_too_many_requests(cluster: Cluster) -> None:
    cluster.control.add_node("n1")
    manager = cluster.manager()
    cluster.control.too_many("get", retry_after_s=1, count=1)
    began = time.monotonic()
    while time.monotonic() < began + 0.9:
        with pytest.raises(StoreUnavailable, match=r"refuses to get nodes at present \(429 "):
            manager.public_ips()
        time.sleep(0.02)
    time.sleep(0.2)
    assert manager.public_ips() == ("", "")
    assert cluster.control.counts() == {"get nodes": 2}
    cluster.control.too_many("list", plain=True)
    with pytest.raises(StoreUnavailable, match=r"refuses to list nodes at present"):
        next(manager.watch(Event()))


@pytest.mark.parametrize("code", [500, 503, 504])
def test_a_server_with_an_error(cluster: Cluster, code: int) -> None:
    manager = cluster.joined()
    cluster.control.fail(code=code)
    with pytest.raises(StoreUnavailable, match=rf"refuses to get nodes at present \({code} "):
        manager.public_ips()
    with pytest.raises(StoreUnavailable, match=rf"refuses to watch nodes at present \({code} "):
        list(manager.watch(Event()))
    cluster.control.clear()
    assert snapshot_of(manager) == {OWN_KEY}
    assert cluster.lists() == 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((502, {"Content-Type": "text/html"}, b"<html>Bad Gateway"), r"502 <html>Bad Gateway"),
        ((404, {}, b"404 page not found"), "node n1 does not exist"),
        ((302, {"Location": "/login"}, b""), r"at present \(302\)"),
        ((200, {}, b"<html>"), "answered to get nodes with something else"),
        ((200, {}, b'{"metadata":{"name":"\xff"}}'), "answered to get nodes with something else"),
        ((200, {}, b'{"x":' + b"[" * 100_000), "answered to get nodes with something else"),
        ((503, {"Retry-After": "\xb2"}, b"\xff" * 1000), r"at present \(503 "),
        ((200, {}, b"[]"), "answered to get nodes with something else"),
        ((200, {}, b'{"metadata":{"name":7}}'), "something else"),
        ((200, {"Content-Length": "100"}, b"{"), "does not answer to get nodes"),
        ((200, {"Content-Encoding": "gzip"}, b"{}"), "does not answer to get nodes"),
    ],
)
def test_answers_of_something_else(
    cluster: Cluster, front: Front, answer: tuple[int, dict[str, str], bytes], says: str
) -> None:
    front.answers["/api/v1/nodes/n1"] = [answer]
    with pytest.raises(StoreUnavailable, match=says):
        cluster.manager(api_url=front.url, kubeconfig="").public_ips()


def test_null_where_a_list_or_an_object_may_be(cluster: Cluster, front: Front) -> None:
    """Go writes an empty list or map that was never made as null."""
    bare = {
        "metadata": {"name": "n1", "resourceVersion": "1", "annotations": None},
        "spec": {"podCIDRs": None},
    }
    told = {
        "metadata": {"name": "n2", "annotations": peer_annotations("n2")},
        "spec": {"podCIDR": "10.244.2.0/24"},
    }
    nothing: dict[str, object] = {"metadata": {"name": "n3"}, "spec": None, "status": {"conditions": None}}
    pages = [{"metadata": {"continue": "x"}, "items": None}, {"metadata": {}, "items": [bare, told, nothing]}]
    front.answers["limit="] = [(200, {}, json.dumps(page).encode()) for page in pages]
    front.answers["/api/v1/nodes/n1"] = [(200, {}, json.dumps(bare).encode())]
    manager = cluster.manager(api_url=front.url, kubeconfig="")
    assert manager.public_ips() == ("", "")
    assert snapshot_of(manager) == {"10.244.2.0-24"}


@pytest.mark.parametrize(("verb", "again"), [("get", True), ("patch", False)])
def test_connections_that_break(cluster: Cluster, verb: str, again: bool) -> None:
    """What only reads is sent once more if it may have been on an old connection; a write is not."""
    cluster.control.add_node("n1")
    manager = cluster.manager()
    cluster.control.drop(verb, count=1)
    with pytest.raises(StoreUnavailable, match=rf"does not answer to {verb} nodes"):
        manager.complete(Lease(None, None, OWN))
    assert manager.public_ips() == ("", "")
    cluster.control.drop(verb, count=1)
    if again:
        manager.complete(Lease(None, None, OWN))
        cluster.control.drop(verb, count=2)
    with pytest.raises(StoreUnavailable, match=rf"does not answer to {verb} nodes"):
        manager.complete(Lease(None, None, OWN))
    manager.complete(Lease(None, None, OWN))


def test_an_idle_connection_that_the_server_has_closed(cluster: Cluster) -> None:
    manager = cluster.joined()
    for _ in range(50):
        assert manager.public_ips() == ("", "")
        cluster.control.close_connections()


def test_an_answer_that_breaks_off(cluster: Cluster) -> None:
    cluster.control.add_node("n1")
    manager = cluster.manager()
    cluster.control.reset("get", count=1)
    with pytest.raises(StoreUnavailable, match=r"does not answer to get nodes"):
        manager.public_ips()
    assert manager.public_ips() == ("", "")


def test_a_list_that_breaks_is_begun_anew_by_the_next_watch(cluster: Cluster) -> None:
    cluster.control.fill(600, subnet="10.244.0.0/28")
    cluster.net_conf.write_text('{"Network": "10.244.0.0/15"}')
    cluster.control.reset("list", count=1)
    manager = cluster.manager()
    with pytest.raises(StoreUnavailable, match=r"does not answer to list nodes"):
        next(manager.watch(Event()))
    assert len(snapshot_of(manager)) == 600


def test_a_slow_server(cluster: Cluster) -> None:
    manager = cluster.joined()
    cluster.control.slow(delay_s=0.3)
    with Watching(manager) as watching:
        cluster.peer("c", "10.244.3.0/24")
        watching.wait_until(lambda now: "10.244.3.0-24" in now)
        assert manager.public_ips() == ("", "")
        assert watching.error is None


# A server that says nothing


def test_a_call_has_an_end(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.control.add_node("n1")
    monkeypatch.setattr(kubeapi, "CALL_LIMIT_S", 0.5)
    monkeypatch.setattr(kubeapi, "PAGE_LIMIT_S", 0.5)
    manager = cluster.manager()
    cluster.control.stall()
    for use, what in (
        (manager.public_ips, "get nodes"),
        (lambda: manager.complete(Lease(None, None, OWN)), "get nodes"),
        (lambda: next(manager.watch(Event())), "list nodes"),
    ):
        began = time.monotonic()
        with pytest.raises(
            StoreUnavailable, match=rf"gave no answer to {what} within 0.5 s|does not answer to {what}"
        ):
            use()
        assert time.monotonic() - began < 2


def sockets() -> set[str]:
    """The sockets that this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the directory itself is gone by now
            found.add(str(link.readlink()))
    return {each for each in found if each.startswith("socket:")}


def test_a_socket_is_not_closed_under_a_call_left_behind(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call's thread would go on to read from whatever gets the descriptor next."""
    cluster.control.add_node("n1")
    monkeypatch.setattr(kubeapi, "CALL_LIMIT_S", 0.1)
    before = sockets()
    manager = cluster.manager()
    cluster.control.stall("get")
    with pytest.raises(StoreUnavailable, match=r"gave no answer"):
        manager.public_ips()
    held = sockets() - before
    manager.close()
    assert held and held <= sockets()
    cluster.control.clear()  # ends the connection
    wait_for(lambda: not held & sockets())


def test_bytes_that_trickle_have_an_end(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read succeeds; the whole never comes."""
    cluster.control.add_node("n1")
    monkeypatch.setattr(kubeapi, "CALL_LIMIT_S", 1.0)
    cluster.control.slow("get", bytes_per_s=20)
    with pytest.raises(StoreUnavailable, match=r"gave no answer to get nodes within 1 s"):
        cluster.manager().public_ips()


def test_a_watch_that_does_not_begin(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubeapi, "CALL_LIMIT_S", 0.5)
    manager = cluster.joined()
    assert snapshot_of(manager) == {OWN_KEY}
    cluster.control.stall("watch")
    with pytest.raises(StoreUnavailable, match=r"began no watch of nodes within 0.5 s"):
        next(manager.watch(Event()))


def test_a_watch_that_falls_silent_is_opened_anew(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubeapi, "SILENCE_S", 0.6)
    manager = cluster.joined()
    with Watching(manager) as watching:
        wait_for(lambda: cluster.control.counts()["watch nodes"] >= 3)
        cluster.peer("c", "10.244.3.0/24")
        watching.wait_until(lambda now: "10.244.3.0-24" in now)
        assert watching.snapshots == 1 and watching.error is None
    assert cluster.lists() == 1


def test_the_kernel_looks_after_a_silent_connection(cluster: Cluster) -> None:
    """A partition: no bytes and no reset. The kernel asks the peer, and ends the connection after 30 s."""
    with Watching(cluster.joined()):
        wait_for(lambda: len(cluster.control.watches()) == 1)
        command = ["ss", "-Htno", "state", "established", f"dport = :{cluster.server.address[1]}"]

        def guarded() -> bool:
            """Not at once: first the timer is that of what was sent last."""
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            return re.search(r"timer:\(keepalive,(?:1[0-5]|[1-9]\.\d)", shown) is not None

        wait_for(guarded)


def test_heartbeats_are_signs_of_life(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubeapi, "SILENCE_S", 1.0)
    with Watching(cluster.joined()):
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            cluster.control.heartbeat("n1")
            time.sleep(0.05)
        assert cluster.control.counts()["watch nodes"] == 1


def test_a_server_that_stands_still(own_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP: connections stay open, the kernel acknowledges, nobody answers."""
    cluster = own_cluster
    monkeypatch.setattr(kubeapi, "SILENCE_S", 0.6)
    monkeypatch.setattr(kubeapi, "CALL_LIMIT_S", 0.6)
    monkeypatch.setattr(kubeapi, "CONNECT_LIMIT_S", 0.6)
    manager = cluster.joined()
    with Watching(manager) as watching:
        cluster.server.pause()
        wait_for(lambda: watching.error is not None)
        cluster.server.resume()
    with Watching(manager) as watching:
        cluster.peer("c", "10.244.3.0/24")
        watching.wait_until(lambda now: "10.244.3.0-24" in now)
    assert cluster.lists() == 1


@pytest.mark.parametrize("verb", ["list", "watch", "get", None])
@pytest.mark.parametrize("how", ["stop", "close"])
def test_the_end_comes_at_once(cluster: Cluster, verb: str | None, how: str) -> None:
    """Whatever it is that the server does not answer."""
    manager = cluster.joined() if verb != "list" else cluster.manager()
    manager.network_config()
    if verb == "get":  # asked before a watch that goes on
        assert snapshot_of(manager) == {OWN_KEY}
    began = threading.active_count()
    stop, ended = Event(), Event()
    updates: list[Update] = []

    def run() -> None:
        updates.extend(manager.watch(stop))
        ended.set()

    if verb:
        cluster.control.stall(verb)
    cluster.control.forget()
    Thread(target=run, daemon=True).start()
    wait_for(lambda: cluster.control.counts()[f"{verb} nodes"] > 0 if verb else bool(updates))
    at = time.monotonic()
    if how == "stop":
        stop.set()
    else:
        manager.close()
    assert ended.wait(2)
    assert time.monotonic() - at < 1.0
    cluster.control.clear()
    wait_for(lambda: threading.active_count() <= began)


def test_a_call_ends_with_close(cluster: Cluster) -> None:
    cluster.control.add_node("n1")
    manager = cluster.manager()
    cluster.control.stall()
    errors: list[Exception] = []

    def run() -> None:
        try:
            manager.public_ips()
        except StoreUnavailable as exc:
            errors.append(exc)

    thread = Thread(target=run, daemon=True)
    thread.start()
    wait_for(lambda: bool(cluster.control.counts()))
    manager.close()
    thread.join(1)
    assert [str(exc) for exc in errors] == ["the connection to the API server was closed"]
    with pytest.raises(StoreUnavailable, match=r"was closed"):
        manager.public_ips()
    assert list(manager.watch(Event())) == []


def test_a_stop_that_came_before(cluster: Cluster) -> None:
    manager = cluster.joined()
    stop = Event()
    stop.set()
    assert list(manager.watch(stop)) == []
    assert list(cluster.manager().watch(stop)) == []


# Many nodes


def test_five_thousand_fat_nodes(tmp_path: Path) -> None:
    """In a process of its own, whose peak is that of this test."""
    with KubeServer(tmp_path / "kube") as running, closing(Cluster(running, tmp_path)) as cluster:
        cluster.net_conf.write_text('{"Network": "10.0.0.0/8"}')
        cluster.control.fill(5000, fat=True)
        cluster.control.add_node("n1", "10.200.0.0/24")
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(running.kubeconfig), str(cluster.net_conf)],
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
            text=True,
        )
    measured = json.loads(done.stdout)
    print(measured)
    assert measured["leases"] == 5001
    assert measured["peak_mb"] < 90


MEASURE = """
import json, sys, time
from pathlib import Path
from ipaddress import IPv4Address
from threading import Event
from flanneld.lease import Attributes
from flanneld.subnet.kube import KubeManager

manager = KubeManager(
    api_url="", kubeconfig=sys.argv[1], annotation_prefix="flannel.alpha.coreos.com",
    net_config_path=sys.argv[2], set_network_unavailable=True, environ={"NODE_NAME": "n1"},
)
began, cpu = time.monotonic(), time.process_time()
attrs = Attributes(IPv4Address("192.168.64.3"), None, "vxlan", '{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}')
manager.acquire(manager.network_config(), attrs, None)
snapshot = next(manager.watch(Event()))
print(json.dumps({
    "leases": len(snapshot.leases),
    "seconds": round(time.monotonic() - began, 3),
    "cpu_seconds": round(time.process_time() - cpu, 3),
    "peak_mb": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024,
}))
"""
