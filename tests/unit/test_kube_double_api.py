"""The API double's answers, word for word as kube-apiserver gives them, without a socket."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kube.access import ADMIN, FLANNEL, Access
from tests.kube.api import SHAPES, WATCH_S, Answer, Api, Refusal, Request, Stream
from tests.kube.objects import node, peers, pod
from tests.kube.schema import NODE, decode, encode
from tests.kube.status import PATCH_TYPES, ApiFailure
from tests.kube.store import Store

Json = dict[str, Any]
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"


class Client:
    """Speaks to an Api as the administrator, or as somebody else."""

    def __init__(self, tmp_path: Path, window: int = 100) -> None:
        self.account, self.admin = tmp_path / "token", tmp_path / "admin"
        self.store = Store(SHAPES, window=window)
        self.access = Access(self.account, self.admin)
        self.api = Api(self.store, self.access)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        user: str = ADMIN,
        headers: Mapping[str, str] | None = None,
        **query: Any,
    ) -> Answer | Stream | Refusal:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        given = {name.lstrip("_"): value for name, value in query.items()}
        return self.api.serve(Request(method, path, given, headers or {}, data), user)

    def ok(self, method: str, path: str, body: object = None, **more: Any) -> Json:
        answer = self.ask(method, path, body, **more)
        assert isinstance(answer, Answer)
        assert answer.code == (201 if method == "POST" else 200)
        found: Json = json.loads(b"".join(answer.body))
        return found

    def refused(self, method: str, path: str, body: object = None, **more: Any) -> Json:
        with pytest.raises(ApiFailure) as failed:
            self.ask(method, path, body, **more)
        return failed.value.status

    def watch(self, path: str = "/api/v1/nodes", **query: Any) -> tuple[Stream, list[Json]]:
        stream = self.ask("GET", path, watch="true", **query)
        assert isinstance(stream, Stream)
        return stream, [json.loads(line) for line in stream.first]

    def add(self, name: str, *cidrs: str, **labels: str) -> Json:
        return self.ok("POST", "/api/v1/nodes", node(name, cidrs, labels=labels))

    def strategic(self, path: str, patch: object, **more: Any) -> Json:
        return self.ok("PATCH", path, patch, headers={"content-type": STRATEGIC}, **more)


STRATEGIC = "application/strategic-merge-patch+json"


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


def lines(stream: Stream) -> list[Json]:
    found = [stream.line(event) for event in stream.watcher.take()]
    return [json.loads(line) for line in found if line]


# Who may do what


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", "Basic YTpi", "Bearer  "])
def test_no_valid_token(client: Client, given: str) -> None:
    with pytest.raises(ApiFailure) as failed:
        client.api.handle(Request("GET", "/healthz", headers={"authorization": given}))
    assert failed.value.status == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "Unauthorized",
        "reason": "Unauthorized",
        "code": 401,
    }


def test_tokens_of_the_files_are_taken_until_they_expire(client: Client) -> None:
    old = client.account.read_text()
    request = Request("GET", "/api/v1/nodes", headers={"authorization": f"Bearer {old}"})
    assert isinstance(client.api.handle(request), Answer)
    client.access.expire(replace=True)
    with pytest.raises(ApiFailure, match="Unauthorized"):
        client.api.handle(request)
    new = client.account.read_text()
    assert new != old
    client.api.handle(Request("GET", "/api/v1/nodes", headers={"authorization": f"Bearer {new}"}))
    client.access.expire(replace=False)
    assert client.account.read_text() == new
    with pytest.raises(ApiFailure, match="Unauthorized"):
        client.api.handle(Request("GET", "/api/v1/nodes", headers={"authorization": f"Bearer {new}"}))


WHO = 'User "system:serviceaccount:kube-flannel:flannel" cannot'


CLUSTER, SPACE = "at the cluster scope", 'in the namespace "ns"'


@pytest.mark.parametrize(
    ("method", "path", "query", "what", "verb", "resource", "where"),
    [
        ("DELETE", "/api/v1/nodes/n", {}, 'nodes "n"', "delete", "nodes", CLUSTER),
        ("PATCH", "/api/v1/nodes/n", {}, 'nodes "n"', "patch", "nodes", CLUSTER),
        ("PUT", "/api/v1/nodes/n/status", {}, 'nodes "n"', "update", "nodes/status", CLUSTER),
        ("POST", "/api/v1/nodes", {}, "nodes", "create", "nodes", CLUSTER),
        ("DELETE", "/api/v1/nodes", {}, "nodes", "deletecollection", "nodes", CLUSTER),
        ("GET", "/api/v1/namespaces/ns/pods", {}, "pods", "list", "pods", SPACE),
        ("GET", "/api/v1/pods", {"watch": "1"}, "pods", "watch", "pods", CLUSTER),
        ("GET", "/api/v1/secrets", {}, "secrets", "list", "secrets", CLUSTER),
        ("GET", "/api/v1/pods", {"fieldSelector": "metadata.name=p"}, 'pods "p"', "list", "pods", CLUSTER),
    ],
)
def test_what_flannel_may_not_do(
    client: Client, method: str, path: str, query: Json, what: str, verb: str, resource: str, where: str
) -> None:
    refused = client.refused(method, path, user=FLANNEL, **query)
    assert (refused["code"], refused["reason"]) == (403, "Forbidden")
    assert (
        refused["message"]
        == f'{what} is forbidden: {WHO} {verb} resource "{resource}" in API group "" {where}'
    )


def test_paths_that_are_not_for_everybody(client: Client) -> None:
    refused = client.refused("GET", "/metrics", user=FLANNEL)
    assert (refused["code"], refused["message"]) == (403, f'forbidden: {WHO} get path "/metrics"')


def test_what_flannel_may_do_and_how_it_is_taken_away(client: Client) -> None:
    client.add("n", "10.0.0.0/24")
    client.ok("POST", "/api/v1/namespaces/ns/pods", pod("ns", "p", "n"))
    rights: list[tuple[str, str, str, Json | None, dict[str, str]]] = [
        ("get pods", "GET", "/api/v1/namespaces/ns/pods/p", None, {}),
        ("get nodes", "GET", "/api/v1/nodes/n", None, {}),
        ("list nodes", "GET", "/api/v1/nodes", None, {}),
        ("watch nodes", "GET", "/api/v1/nodes", None, {"watch": "true"}),
        ("patch nodes/status", "PATCH", "/api/v1/nodes/n/status", {}, {}),
    ]
    for right, method, path, body, query in rights:
        verb, resource = right.split()
        headers = {"content-type": STRATEGIC}
        client.ask(method, path, body, user=FLANNEL, headers=headers, **query)
        client.access.set_rule(verb, resource, granted=False)
        refused = client.refused(method, path, body, user=FLANNEL, headers=headers, **query)
        assert f'cannot {verb} resource "{resource}"' in refused["message"]
        client.access.set_rule(verb, resource, granted=True)
        client.ask(method, path, body, user=FLANNEL, headers=headers, **query)


# Objects


def test_a_node_from_birth_to_death(client: Client) -> None:
    made = client.add("n", "10.0.0.0/24", x="y")
    assert list(made) == ["kind", "apiVersion", "metadata", "spec", "status"]
    assert made["metadata"]["resourceVersion"] == str(client.store.version)
    assert client.ok("GET", "/api/v1/nodes/n") == made
    assert client.refused("POST", "/api/v1/nodes", node("n"))["message"] == 'nodes "n" already exists'
    done = client.ok("DELETE", "/api/v1/nodes/n")
    assert done["details"] == {"name": "n", "kind": "nodes", "uid": made["metadata"]["uid"]}
    refused = client.refused("GET", "/api/v1/nodes/n")
    assert refused == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": 'nodes "n" not found',
        "reason": "NotFound",
        "details": {"name": "n", "kind": "nodes"},
        "code": 404,
    }
    for method in ("DELETE", "PATCH"):
        assert client.refused(method, "/api/v1/nodes/n", {}, headers={"content-type": STRATEGIC}) == refused
    assert client.add("n")["metadata"]["uid"] != made["metadata"]["uid"]


def test_flannels_patch_of_the_status(client: Client) -> None:
    before = client.add("n", "10.0.0.0/24")
    patch = {
        "metadata": {"annotations": {"a.b/c": "d"}},
        "spec": {"unschedulable": True},
        "status": {"conditions": [{"type": "NetworkUnavailable", "status": "False"}]},
    }
    after = client.strategic("/api/v1/nodes/n/status", patch, user=FLANNEL)
    assert after["metadata"]["annotations"] == {"a.b/c": "d"}
    assert after["spec"] == before["spec"]
    assert [each["type"] for each in after["status"]["conditions"]] == ["NetworkUnavailable", "Ready"]
    assert int(after["metadata"]["resourceVersion"]) == int(before["metadata"]["resourceVersion"]) + 1
    assert client.strategic("/api/v1/nodes/n/status", patch) == after
    assert client.store.version == int(after["metadata"]["resourceVersion"])


def test_a_patch_of_the_node_leaves_the_status(client: Client) -> None:
    before = client.add("n")
    patch = {"spec": {"podCIDR": "10.0.0.0/24"}, "status": {"phase": "nonsense"}}
    after = client.strategic("/api/v1/nodes/n", patch)
    assert after["spec"] == {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"]}
    assert after["status"] == before["status"]


def test_optimistic_locking(client: Client) -> None:
    made = client.add("n")
    stale = made["metadata"]["resourceVersion"]
    client.strategic("/api/v1/nodes/n/status", {"metadata": {"annotations": {"a": "b"}}})
    patch = {"metadata": {"resourceVersion": stale, "annotations": {"a": "c"}}}
    refused = client.refused("PATCH", "/api/v1/nodes/n/status", patch, headers={"content-type": STRATEGIC})
    assert refused["message"] == (
        'Operation cannot be fulfilled on nodes "n": the object has been modified; '
        "please apply your changes to the latest version and try again"
    )
    assert (refused["code"], refused["reason"]) == (409, "Conflict")
    assert client.refused("PUT", "/api/v1/nodes/n", made)["code"] == 409
    del made["metadata"]["resourceVersion"]
    made["metadata"]["labels"] = {"a": "b"}
    assert client.ok("PUT", "/api/v1/nodes/n", made)["metadata"]["labels"] == {"a": "b"}
    made["metadata"]["uid"] = "other"
    assert "Precondition failed: UID" in client.refused("PUT", "/api/v1/nodes/n", made)["message"]


def test_other_patches(client: Client) -> None:
    client.add("n")
    merged = client.ok(
        "PATCH",
        "/api/v1/nodes/n",
        {"metadata": {"labels": {"a": "b"}}},
        headers={"content-type": "application/merge-patch+json; charset=utf-8"},
    )
    assert merged["metadata"]["labels"]["a"] == "b"
    operations = [{"op": "remove", "path": "/metadata/labels/a"}]
    changed = client.ok(
        "PATCH", "/api/v1/nodes/n", operations, headers={"content-type": "application/json-patch+json"}
    )
    assert "a" not in changed["metadata"]["labels"]
    refused = client.refused("PATCH", "/api/v1/nodes/n", {}, headers={"content-type": "application/json"})
    assert (refused["code"], refused["reason"]) == (415, "UnsupportedMediaType")
    assert refused["message"] == (
        "the body of the request was in an unknown format - accepted media types include: "
        "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, "
        "application/apply-patch+yaml"
    )


@pytest.mark.parametrize(
    ("patch", "code"),
    [
        (b"{", 400),
        ([], 400),
        ({"metadata": {"annotations": {"a": 1}}}, 422),
        ({"metadata": {"annotations": {"a b": "c"}}}, 422),
        ({"metadata": {"annotations": {"a": "x" * (256 * 1024)}}}, 422),
        ({"metadata": {"name": "other"}}, 400),
        ({"metadata": {"uid": "other"}}, 409),
        ({"status": {"conditions": [{"status": "True"}]}}, 500),
    ],
)
def test_patches_that_are_refused_change_nothing(client: Client, patch: object, code: int) -> None:
    before = client.add("n")
    path, headers = "/api/v1/nodes/n/status", {"content-type": STRATEGIC}
    assert client.refused("PATCH", path, patch, headers=headers)["code"] == code
    assert client.ok("GET", "/api/v1/nodes/n") == before


def test_pod_cidrs_are_set_once(client: Client) -> None:
    client.add("n")
    both = ["10.0.0.0/24", "fd00::/64"]
    assert client.strategic("/api/v1/nodes/n", {"spec": {"podCIDRs": both}})["spec"]["podCIDR"] == both[0]
    refused = client.refused(
        "PATCH",
        "/api/v1/nodes/n",
        {"spec": {"podCIDR": "10.0.1.0/24"}},
        headers={"content-type": "application/merge-patch+json"},
    )
    assert refused["message"] == (
        'Node "n" is invalid: spec.podCIDRs: Forbidden: '
        'node updates may not change podCIDR except from "" to valid'
    )


@pytest.mark.parametrize("cidrs", [("10.0.0.0/33",), ("10.0.0.0",), ("10.0.0.0/24", "10.0.1.0/24"), ("no",)])
def test_pod_cidrs_that_are_none(client: Client, cidrs: tuple[str, ...]) -> None:
    refused = client.refused("POST", "/api/v1/nodes", node("n", cidrs))
    assert (refused["code"], refused["reason"]) == (422, "Invalid")
    assert refused["message"].startswith('Node "n" is invalid: spec.podCIDRs')


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"rubbish", 400),
        ([], 400),
        ({"kind": "Pod"}, 400),
        ({}, 422),
        ({"metadata": {"name": "Not A Name"}}, 422),
        ({"metadata": {"name": "n\ttab"}}, 422),
        ({"metadata": {"name": "n", "resourceVersion": "5"}}, 500),
        ({"metadata": {"name": "n", "labels": {"a": 5}}}, 400),
    ],
)
def test_objects_that_are_refused(client: Client, body: object, code: int) -> None:
    assert client.refused("POST", "/api/v1/nodes", body)["code"] == code
    assert client.ok("GET", "/api/v1/nodes")["items"] == []


NO_METHOD = "the server does not allow this method on the requested resource"
NO_RESOURCE = "the server could not find the requested resource"


@pytest.mark.parametrize(
    ("method", "path", "code", "message"),
    [
        ("GET", "/nowhere", 404, "404 page not found"),
        ("GET", "/api/v1/tomatoes", 404, NO_RESOURCE),
        ("GET", "/api/v1/nodes/n/scale", 404, NO_RESOURCE),
        ("GET", "/api/v1/namespaces/ns/nodes", 404, NO_RESOURCE),
        ("POST", "/api/v1/nodes/n", 405, NO_METHOD),
        ("DELETE", "/api/v1/nodes", 405, NO_METHOD),
        ("DELETE", "/api/v1/nodes/n/status", 405, NO_METHOD),
        ("OPTIONS", "/api/v1/nodes", 405, NO_METHOD),
        ("POST", "/api/v1/pods", 405, NO_METHOD),
        ("PUT", "/version", 405, NO_METHOD),
    ],
)
def test_paths_and_methods_that_are_none(
    client: Client, method: str, path: str, code: int, message: str
) -> None:
    refused = client.refused(method, path)
    assert (refused["code"], refused["message"]) == (code, message)


def test_pages_around_the_resources(client: Client) -> None:
    assert client.ok("GET", "/version")["gitVersion"].startswith("v1.")
    assert client.ok("GET", "/api", user=FLANNEL)["versions"] == ["v1"]
    resources = {each["name"] for each in client.ok("GET", "/api/v1")["resources"]}
    assert resources == {"nodes", "nodes/status", "pods", "pods/status"}
    health = client.ask("GET", "/readyz")
    assert isinstance(health, Answer)
    assert list(health.body) == [b"ok"]


def test_pods_live_in_namespaces(client: Client) -> None:
    for namespace, name in (("a", "p"), ("b", "p"), ("a", "q")):
        client.ok("POST", f"/api/v1/namespaces/{namespace}/pods", pod(namespace, name, f"node-{name}"))
    names = [each["metadata"]["name"] for each in client.ok("GET", "/api/v1/namespaces/a/pods")["items"]]
    assert names == ["p", "q"]
    assert len(client.ok("GET", "/api/v1/pods")["items"]) == 3
    on_node = client.ok("GET", "/api/v1/pods", fieldSelector="spec.nodeName=node-p")["items"]
    assert {each["metadata"]["namespace"] for each in on_node} == {"a", "b"}
    _, first = client.watch("/api/v1/namespaces/b/pods")
    assert [each["object"]["metadata"]["namespace"] for each in first] == ["b"]
    gone = client.ok("DELETE", "/api/v1/namespaces/a/pods/p")
    assert (gone["kind"], gone["metadata"]["namespace"]) == ("Pod", "a")
    assert client.refused("GET", "/api/v1/namespaces/a/pods/p")["message"] == 'pods "p" not found'
    assert client.refused("POST", "/api/v1/namespaces/a/pods", pod("b", "x"))["code"] == 400


# Lists


def fill(client: Client, count: int, first: int = 0) -> None:
    client.store.add_all("nodes", peers(count, first=first))


def names(listed: Json) -> list[str]:
    return [each["metadata"]["name"] for each in listed["items"]]


def test_a_list_has_items_without_kind(client: Client) -> None:
    client.add("b")
    client.add("a")
    listed = client.ok("GET", "/api/v1/nodes")
    assert list(listed) == ["kind", "apiVersion", "metadata", "items"]
    assert (listed["kind"], listed["metadata"]) == (
        "NodeList",
        {"resourceVersion": str(client.store.version)},
    )
    assert names(listed) == ["a", "b"]
    assert list(listed["items"][0]) == ["metadata", "spec", "status"]


def test_pages_show_the_state_of_the_first(client: Client) -> None:
    fill(client, 7)
    page = client.ok("GET", "/api/v1/nodes", limit="3")
    version = page["metadata"]["resourceVersion"]
    assert page["metadata"]["remainingItemCount"] == 4
    found = names(page)
    client.ok("DELETE", "/api/v1/nodes/peer-00004")
    client.strategic("/api/v1/nodes/peer-00005", {"metadata": {"labels": {"new": "x"}}})
    fill(client, 3, first=90)
    while page["metadata"].get("continue"):
        page = client.ok("GET", "/api/v1/nodes", limit="3", _continue=page["metadata"]["continue"])
        assert page["metadata"]["resourceVersion"] == version
        assert not any("new" in each["metadata"]["labels"] for each in page["items"])
        found += names(page)
    assert found == [f"peer-{number:05d}" for number in range(7)]
    assert "remainingItemCount" not in page["metadata"]


def test_a_continue_token_grows_old(client: Client) -> None:
    fill(client, 5)
    token = client.ok("GET", "/api/v1/nodes", limit="2")["metadata"]["continue"]
    client.store.compact()
    refused = client.refused("GET", "/api/v1/nodes", limit="2", _continue=token)
    assert (refused["code"], refused["reason"]) == (410, "Expired")
    assert refused["message"].startswith(
        "The provided continue parameter is too old to display a consistent list"
    )
    rest = client.ok("GET", "/api/v1/nodes", _continue=refused["metadata"]["continue"])
    assert names(rest) == ["peer-00002", "peer-00003", "peer-00004"]


def test_versions_of_lists(client: Client) -> None:
    fill(client, 3)
    version = client.store.version
    client.ok("DELETE", "/api/v1/nodes/peer-00000")
    zero = client.ok("GET", "/api/v1/nodes", limit="1", resourceVersion="0")
    assert len(zero["items"]) == 2
    assert "continue" not in zero["metadata"]
    exact = client.ok("GET", "/api/v1/nodes", resourceVersion=str(version), resourceVersionMatch="Exact")
    assert (len(exact["items"]), exact["metadata"]["resourceVersion"]) == (3, str(version))
    assert len(client.ok("GET", "/api/v1/nodes", limit="9", resourceVersion=str(version))["items"]) == 3
    newer = client.ok("GET", "/api/v1/nodes", resourceVersion=str(version))
    assert newer["metadata"]["resourceVersion"] == str(version + 1)
    client.store.compact()
    old = {"resourceVersion": str(version), "resourceVersionMatch": "Exact"}
    assert client.refused("GET", "/api/v1/nodes", **old)["message"] == (
        "The resourceVersion for the provided list is too old."
    )
    for path in ("/api/v1/nodes", "/api/v1/nodes/peer-00001"):
        future = client.refused("GET", path, resourceVersion="999999")
        assert (future["code"], future["reason"]) == (504, "Timeout")
        assert future["message"] == f"Timeout: Too large resource version: 999999, current: {version + 2}"
        assert future["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "many"},
        {"resourceVersion": "new"},
        {"_continue": "rubbish"},
        {"_continue": base64.urlsafe_b64encode(b'{"v":"meta.k8s.io/v1"}').decode()},
        {"_continue": "e30", "resourceVersion": "7"},
        {"resourceVersionMatch": "Exact"},
        {"resourceVersionMatch": "Nonsense", "resourceVersion": "1"},
        {"fieldSelector": "status.nonsense=1"},
        {"fieldSelector": "nonsense"},
        {"labelSelector": "a b"},
        {"watch": "true", "sendInitialEvents": "true"},
    ],
)
def test_questions_that_are_none(client: Client, query: dict[str, str]) -> None:
    assert client.refused("GET", "/api/v1/nodes", **query)["code"] in (400, 422)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({"labelSelector": "zone=x"}, ["a", "c"]),
        ({"labelSelector": "zone==x,special"}, ["c"]),
        ({"labelSelector": "zone!=x"}, ["b", "d"]),
        ({"labelSelector": "!zone"}, ["d"]),
        ({"labelSelector": "zone in (x, y)"}, ["a", "b", "c"]),
        ({"labelSelector": "zone notin (x,y),kubernetes.io/os=linux"}, ["d"]),
        ({"fieldSelector": "metadata.name=b"}, ["b"]),
        ({"fieldSelector": "metadata.name!=b", "labelSelector": "zone"}, ["a", "c"]),
        ({"fieldSelector": "spec.unschedulable=true"}, ["d"]),
    ],
)
def test_selectors(client: Client, query: dict[str, str], wanted: list[str]) -> None:
    client.add("a", zone="x")
    client.add("b", zone="y")
    client.add("c", zone="x", special="")
    client.add("d")
    client.strategic("/api/v1/nodes/d", {"spec": {"unschedulable": True}})
    listed = client.ok("GET", "/api/v1/nodes", limit="1", **query)
    found = names(listed)
    while listed["metadata"].get("continue"):
        assert "remainingItemCount" not in listed["metadata"]
        token = listed["metadata"]["continue"]
        listed = client.ok("GET", "/api/v1/nodes", limit="1", _continue=token, **query)
        found += names(listed)
    assert found == wanted


# Forms


def test_a_table(client: Client) -> None:
    client.ok(
        "POST", "/api/v1/nodes", node("n", address="10.9.9.9", labels={"node-role.kubernetes.io/worker": ""})
    )
    table = client.ok("GET", "/api/v1/nodes", headers={"accept": TABLE})
    assert (table["kind"], table["apiVersion"]) == ("Table", "meta.k8s.io/v1")
    shown = [each["name"] for each in table["columnDefinitions"] if each["priority"] == 0]
    assert shown == ["Name", "Status", "Roles", "Age", "Version"]
    cells = table["rows"][0]["cells"]
    assert (cells[:3], cells[4:6]) == (["n", "Ready", "worker"], ["v1.33.2", "10.9.9.9"])
    about = table["rows"][0]["object"]
    assert about["kind"] == "PartialObjectMetadata"
    assert set(about) == {"kind", "apiVersion", "metadata"}
    whole = client.ok("GET", "/api/v1/nodes", headers={"accept": TABLE}, includeObject="Object")
    assert whole["rows"][0]["object"] == client.ok("GET", "/api/v1/nodes/n")
    none = client.ok("GET", "/api/v1/nodes/n", headers={"accept": TABLE}, includeObject="None")
    assert none["rows"][0]["object"] is None
    assert (
        client.refused("GET", "/api/v1/nodes", headers={"accept": TABLE}, includeObject="All")["code"] == 400
    )


def test_metadata_only(client: Client) -> None:
    client.add("n")
    form = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
    listed = client.ok("GET", "/api/v1/nodes", headers={"accept": form})
    assert listed["kind"] == "PartialObjectMetadataList"
    assert set(listed["items"][0]) == {"kind", "apiVersion", "metadata"}


def test_forms_that_do_not_exist(client: Client) -> None:
    accept = "application/vnd.kubernetes.protobuf"
    assert client.refused("GET", "/api/v1/nodes", headers={"accept": accept})["code"] == 406
    assert (
        client.ok("GET", "/api/v1/nodes", headers={"accept": f"{accept}, application/json"})["kind"]
        == "NodeList"
    )


# Watches


def test_a_watch_from_a_version(client: Client) -> None:
    client.add("a")
    version = client.store.version
    client.add("b")
    stream, first = client.watch(resourceVersion=str(version))
    assert first == []
    client.strategic("/api/v1/nodes/b/status", {"metadata": {"annotations": {"x": "y"}}})
    client.ok("DELETE", "/api/v1/nodes/a")
    found = lines(stream)
    assert [(each["type"], each["object"]["metadata"]["name"]) for each in found] == [
        ("ADDED", "b"),
        ("MODIFIED", "b"),
        ("DELETED", "a"),
    ]
    versions = [int(each["object"]["metadata"]["resourceVersion"]) for each in found]
    assert versions == [version + 1, version + 2, version + 3]
    assert {(each["object"]["kind"], each["object"]["apiVersion"]) for each in found} == {("Node", "v1")}


@pytest.mark.parametrize("query", [{}, {"resourceVersion": "0"}, {"resourceVersion": ""}])
def test_a_watch_without_a_version_begins_with_the_state(client: Client, query: dict[str, str]) -> None:
    client.add("b")
    client.add("a")
    stream, first = client.watch(**query)
    assert [(each["type"], each["object"]["metadata"]["name"]) for each in first] == [
        ("ADDED", "a"),
        ("ADDED", "b"),
    ]
    client.add("c")
    assert [each["object"]["metadata"]["name"] for each in lines(stream)] == ["c"]
    assert stream.timeout_s >= WATCH_S


def test_a_watch_from_too_long_ago(client: Client) -> None:
    client.add("a")
    old = client.store.version
    new = client.store.compact()
    answer = client.ask("GET", "/api/v1/nodes", watch="true", resourceVersion=str(old))
    assert isinstance(answer, Refusal)
    assert json.loads(answer.line) == {
        "type": "ERROR",
        "object": {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": f"too old resource version: {old} ({new})",
            "reason": "Expired",
            "code": 410,
        },
    }


NODE_INFO = (
    "machineID",
    "systemUUID",
    "bootID",
    "kernelVersion",
    "osImage",
    "containerRuntimeVersion",
    "kubeletVersion",
    "kubeProxyVersion",
    "operatingSystem",
    "architecture",
)


def test_a_bookmark_is_an_empty_object(client: Client) -> None:
    stream, _ = client.watch(allowWatchBookmarks="true", timeoutSeconds="77")
    assert stream.timeout_s == 77
    assert stream.bookmarks
    assert json.loads(stream.bookmark(120)) == {
        "type": "BOOKMARK",
        "object": {
            "kind": "Node",
            "apiVersion": "v1",
            "metadata": {"resourceVersion": "120", "creationTimestamp": None},
            "spec": {},
            "status": {
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
                "nodeInfo": dict.fromkeys(NODE_INFO, ""),
            },
        },
    }
    pods, _ = client.watch("/api/v1/pods", allowWatchBookmarks="true")
    assert json.loads(pods.bookmark(5))["object"]["spec"] == {"containers": None}


def test_a_watch_list_ends_its_state_with_a_bookmark(client: Client) -> None:
    client.add("a")
    asked: dict[str, Any] = {
        "sendInitialEvents": "true",
        "resourceVersionMatch": "NotOlderThan",
        "allowWatchBookmarks": "true",
    }
    _, first = client.watch(**asked)
    assert [each["type"] for each in first] == ["ADDED", "BOOKMARK"]
    metadata = first[1]["object"]["metadata"]
    assert metadata["annotations"] == {"k8s.io/initial-events-end": "true"}
    assert metadata["resourceVersion"] == str(client.store.version)
    stream, first = client.watch(**asked | {"sendInitialEvents": "false"})
    assert first == []
    assert stream.watcher.since == client.store.version
    future = client.ask("GET", "/api/v1/nodes", watch="true", resourceVersion="9999", **asked)
    assert isinstance(future, Refusal)
    assert json.loads(future.line)["object"]["code"] == 504


def test_a_selector_turns_changes_into_arrivals_and_departures(client: Client) -> None:
    client.add("a", zone="x")
    stream, first = client.watch(labelSelector="zone=x")
    assert len(first) == 1
    move = {"metadata": {"labels": {"zone": "y"}}}
    version = client.strategic("/api/v1/nodes/a", move)["metadata"]["resourceVersion"]
    client.strategic("/api/v1/nodes/a", {"metadata": {"labels": {"more": "z"}}})
    client.strategic("/api/v1/nodes/a", {"metadata": {"labels": {"zone": "x"}}})
    client.ok("DELETE", "/api/v1/nodes/a")
    found = lines(stream)
    assert [each["type"] for each in found] == ["DELETED", "ADDED", "DELETED"]
    left = found[0]["object"]["metadata"]
    assert (left["labels"]["zone"], left["resourceVersion"]) == ("x", version)


def test_a_watch_of_a_table_names_its_columns_once(client: Client) -> None:
    client.add("a")
    client.add("b")
    stream = client.ask("GET", "/api/v1/nodes", headers={"accept": TABLE}, watch="true")
    assert isinstance(stream, Stream)
    first = [json.loads(line) for line in stream.first]
    assert [len(each["object"]["columnDefinitions"]) for each in first] == [10, 0]
    assert [each["object"]["rows"][0]["cells"][0] for each in first] == ["a", "b"]


# Rubbish

vocabulary = (
    "metadata,name,annotations,labels,spec,podCIDRs,taints,status,conditions,type,addresses,$patch,delete,"
    "replace,$setElementOrder/conditions,$retainKeys,n,op,path,resourceVersion,finalizers,"
    "$deleteFromPrimitiveList/finalizers,,/spec/taints/-,add,images,nodeInfo,kind,from,value,uid"
)
words = st.sampled_from(vocabulary.split(","))
rubbish = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words, st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
parts = st.dictionaries(
    st.sampled_from(
        [
            "conditions",
            "addresses",
            "podCIDRs",
            "taints",
            "annotations",
            "name",
            "images",
            "uid",
            "capacity",
            "$patch",
        ]
    ),
    rubbish,
    max_size=3,
)
bodies = rubbish | st.dictionaries(
    st.sampled_from(["metadata", "spec", "status"]), parts | rubbish, max_size=3
)
paths = st.builds(
    lambda parts: "/" + "/".join(parts),
    st.lists(
        st.sampled_from(
            ["api", "v1", "nodes", "pods", "namespaces", "n", "status", "", "healthz", "%00", "ä"]
        ),
        max_size=7,
    ),
) | st.sampled_from(
    ["/api/v1/nodes", "/api/v1/nodes/n", "/api/v1/nodes/n/status", "/api/v1/namespaces/n/pods"]
)
options = (
    "watch,limit,continue,resourceVersion,resourceVersionMatch,labelSelector,fieldSelector,sendInitialEvents,"
    "timeoutSeconds,allowWatchBookmarks,includeObject"
)
values = ("true", "0", "5", "-1", "Exact", "NotOlderThan", "a in (b", "!", "=", "metadata.name=n", "e30")
queries = st.dictionaries(
    st.sampled_from(options.split(",")), st.text(max_size=6) | st.sampled_from(values), max_size=4
)
kinds = st.sampled_from([*PATCH_TYPES, "application/json", "", "text/plain; x"])
accepts = st.sampled_from(["", "*/*", TABLE, "application/json;as=Table", ";;,=", "text/html"])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"]),
    paths,
    queries,
    bodies,
    kinds,
    accepts,
)
def test_rubbish_is_answered(
    client: Client, method: str, path: str, query: dict[str, str], body: object, kind: str, accept: str
) -> None:
    """Every request has an answer, and what it leaves behind is a node that can still be read and watched."""
    if client.store.get("nodes", "n") is None:
        client.add("n", "10.0.0.0/24")
    request = Request(
        method, path, query, {"content-type": kind, "accept": accept}, json.dumps(body).encode()
    )
    try:
        answer = client.api.serve(request, ADMIN)
    except ApiFailure as exc:
        encode(exc.status)
        return
    if isinstance(answer, Stream):
        for line in answer.first:
            json.loads(line)
        client.store.unwatch(answer.resource, answer.watcher)
    elif isinstance(answer, Answer):
        b"".join(answer.body)
    for item in client.ok("GET", "/api/v1/nodes")["items"]:
        assert encode(decode(item, NODE)) == encode(item)
    client.ok("GET", "/api/v1/nodes", headers={"accept": TABLE})


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATCH_TYPES[:3]), bodies, st.sampled_from(["/status", ""]))
def test_a_rubbish_patch_is_answered_and_leaves_a_node(
    client: Client, kind: str, body: object, subresource: str
) -> None:
    if client.store.get("nodes", "n") is None:
        client.add("n", "10.0.0.0/24")
    path, version = f"/api/v1/nodes/n{subresource}", client.store.version
    try:
        client.ask("PATCH", path, body, headers={"content-type": kind})
    except ApiFailure:
        assert client.store.version == version
        return
    found = client.ok("GET", path)
    del found["kind"], found["apiVersion"]
    assert encode(decode(found, NODE)) == encode(found)
    client.ok("GET", "/api/v1/nodes", headers={"accept": TABLE})
