"""Requests in, answers out: the REST surface of kube-apiserver for nodes and pods, without a socket."""

from __future__ import annotations

import base64
import json
import random
import uuid
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.kube import status
from tests.kube.access import Access, Call
from tests.kube.patch import BadPatch, json_patch, merge, strategic
from tests.kube.schema import METADATA, NODE, POD, Struct, WrongType, decode, encode
from tests.kube.selectors import Predicate, required_name, selector
from tests.kube.status import ApiFailure
from tests.kube.store import ADDED, DELETED, MODIFIED, Event, Expired, Future, Item, Store, Watcher
from tests.kube.validate import check, settle
from tests.kube.view import KINDS, View, bookmark, choose

Json = dict[str, Any]

SHAPES: Mapping[str, Struct] = {"nodes": NODE, "pods": POD}
SUBRESOURCES = ("", "status")
NAMESPACED = {"pods"}

# Without timeoutSeconds a watch lasts between this and twice as long, as with --min-request-timeout=1800.
WATCH_S = 1800.0

VERSION = {
    "major": "1",
    "minor": "33",
    "gitVersion": "v1.33.2",
    "gitCommit": "a57b6f7709f6c2722b92f07b8b4c48210a51fc40",
    "gitTreeState": "clean",
    "buildDate": "2025-06-17T18:32:31Z",
    "goVersion": "go1.24.4",
    "compiler": "gc",
    "platform": "linux/amd64",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request: header names in lower case, of a query key that comes twice the last value."""

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer; `body` comes in pieces, a list of nodes can be large."""

    code: int
    body: Iterable[bytes]
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Stream:
    """A watch to be served for `timeout_s` seconds; `first` are the lines that are due at once."""

    resource: str
    watcher: Watcher
    first: Iterator[bytes]
    view: View
    matches: Predicate | None
    bookmarks: bool
    timeout_s: float

    def line(self, event: Event) -> bytes:
        """The event as this client sees it; empty if it is none of its business."""
        kind, item = event.kind, event.item
        if self.matches is not None:
            now = kind != DELETED and self.matches(json.loads(item.data))
            then = event.before is not None and self.matches(json.loads(event.before.data))
            if not now and not then:
                return b""
            kind = MODIFIED if now and then else ADDED if now else DELETED
            if kind == DELETED and event.before is not None:
                item = event.before.at(event.version)
        return watch_line(kind, self.view.one(item))

    def bookmark(self, version: int) -> bytes:
        return watch_line("BOOKMARK", self.view.one(bookmark(self.resource, version, initial_end=False)))


@dataclass(frozen=True, slots=True)
class Refusal:
    """A watch that begins and ends with an ERROR event: HTTP 200, as upstream."""

    line: bytes


def watch_line(kind: str, shown: bytes) -> bytes:
    return b'{"type":"' + kind.encode() + b'","object":' + shown + b"}\n"


def refusal(refused: ApiFailure) -> Refusal:
    return Refusal(watch_line("ERROR", encode(refused.status)))


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def classify(request: Request) -> Call:
    """What the request wants; for an unknown path a call without a resource."""
    parts = request.path.strip("/").split("/")
    verb = request.method.lower()
    if parts[:2] != ["api", "v1"] or len(parts) < 3:
        return Call(verb, request.path)
    parts, namespace = parts[2:], ""
    if parts[0] == "namespaces" and len(parts) > 2:
        namespace, parts = parts[1], parts[2:]
    resource, name, subresource = (*parts, "", "")[:3]
    verb = {"post": "create", "put": "update"}.get(verb, verb)
    if not name and request.method == "DELETE":
        verb = "deletecollection"
    if not name and request.method == "GET":
        verb = "watch" if _is_true(request.query.get("watch", "")) else "list"
        name = required_name(request.query.get("fieldSelector", ""))
    return Call(verb, request.path, resource, subresource, namespace, name)


class Api:
    """The API over one store."""

    def __init__(self, store: Store, access: Access) -> None:
        self.store = store
        self.access = access

    def handle(self, request: Request) -> Answer | Stream | Refusal:
        """Answer the request; raises ApiFailure for everything that is refused."""
        user = self.access.user(request.headers.get("authorization", ""))
        return self.serve(request, user)

    def serve(self, request: Request, user: str) -> Answer | Stream | Refusal:
        """As `handle`, for a user who is known already."""
        call = classify(request)
        self.access.authorize(user, call)
        if not call.resource:
            return _page(request)
        known = call.resource in SHAPES and call.subresource in SUBRESOURCES
        if not known or (call.namespace != "" and call.resource not in NAMESPACED):
            raise status.no_such_path()
        handlers = {
            "get": self._get,
            "list": self._list,
            "watch": self._watch,
            "create": self._create,
            "update": self._update,
            "patch": self._patch,
            "delete": self._delete,
        }
        on_item = call.verb in ("get", "update", "patch", "delete")
        needs_namespace = call.resource in NAMESPACED and (on_item or call.verb == "create")
        on_status = call.subresource == "status"
        if (
            call.verb not in handlers
            or (needs_namespace and not call.namespace)
            or (on_status and call.verb not in ("get", "update", "patch"))
            or (call.verb == "create" and call.name)
        ):
            raise status.method_not_allowed()
        try:
            return handlers[call.verb](request, call)
        except Future as exc:
            raise status.too_large_version(exc.requested, exc.current) from exc

    def _get(self, request: Request, call: Call) -> Answer:
        view = _view(request, call.resource, is_list=False)
        wanted = _version(request.query.get("resourceVersion", ""))
        self._reached(wanted or 0)
        item = self.store.get(call.resource, _key(call))
        if item is None:
            raise status.not_found(call.resource, call.name)
        return _one(200, view, item)

    def _reached(self, version: int) -> None:
        if version > self.store.version:
            raise Future(version, self.store.version)

    def _list(self, request: Request, call: Call) -> Answer:
        view = _view(request, call.resource, is_list=True)
        query, resource = request.query, call.resource
        matches = selector(resource, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        limit = _number(query.get("limit", ""))
        start, version, exact = _start(query, limit)
        if version is not None and not exact:
            self._reached(version)
            version = None
        try:
            version, found = self.store.listed(resource, version)
        except Expired as exc:
            if query.get("continue"):
                raise status.continue_expired(_continue_token(-1, start)) from exc
            raise status.list_expired() from exc
        if call.namespace:
            prefix = f"{call.namespace}/"
            found = [each for each in found if each[0].startswith(prefix)]
        if start:
            found = found[bisect_left(found, start, key=lambda each: each[0]) :]
        if matches is not None:
            found = [each for each in found if matches(json.loads(each[1].data))]
        metadata: Json = {"resourceVersion": str(version)}
        if 0 < limit < len(found) and query.get("resourceVersion") != "0":
            metadata["continue"] = _continue_token(version, found[limit - 1][0] + "\0")
            if matches is None:
                metadata["remainingItemCount"] = len(found) - limit
            found = found[:limit]
        return Answer(200, view.listing(metadata, (item for _, item in found)))

    def _watch(self, request: Request, call: Call) -> Stream | Refusal:
        view = _view(request, call.resource, is_list=False)
        query, resource = request.query, call.resource
        matches = self._watch_predicate(call, query)
        bookmarks = _is_true(query.get("allowWatchBookmarks", ""))
        initial = _initial_events(query)
        version = _version(query.get("resourceVersion", ""))
        timeout_s = float(_number(query.get("timeoutSeconds", "")))
        since = version or None
        if initial:
            if version is not None and version > self.store.version:
                refused = status.too_large_version(version, self.store.version)
                return refusal(refused)
            since = None
        elif initial is False and since is None:
            since = self.store.version
        try:
            watcher, state = self.store.watch(resource, since)
        except Expired as exc:
            return refusal(status.watch_expired(exc.requested, exc.oldest))
        first = _state_lines(view, matches, state)
        if initial and bookmarks:
            end = watch_line("BOOKMARK", view.one(bookmark(resource, watcher.since, initial_end=True)))
            first = _then(first, end)
        lasts_s = timeout_s or random.uniform(WATCH_S, 2 * WATCH_S)
        return Stream(resource, watcher, first, view, matches, bookmarks, lasts_s)

    def _watch_predicate(self, call: Call, query: Mapping[str, str]) -> Predicate | None:
        wanted = selector(call.resource, query.get("labelSelector", ""), query.get("fieldSelector", ""))
        if not call.namespace:
            return wanted
        return lambda one: (
            one["metadata"].get("namespace") == call.namespace and (wanted is None or wanted(one))
        )

    def _create(self, request: Request, call: Call) -> Answer:
        view = _view(request, call.resource, is_list=False)
        given = _object(request, call)
        made = _decoded(given, call.resource)
        metadata = made["metadata"]
        if metadata.get("resourceVersion"):
            raise status.failure(500, "", "resourceVersion should not be set on objects to be created")
        if metadata.get("namespace", call.namespace) != call.namespace:
            raise status.bad_request(
                "the namespace of the provided object does not match the namespace sent on the request"
            )
        if call.namespace:
            metadata["namespace"] = call.namespace
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        settle(call.resource, made)
        check(call.resource, None, made)
        name = metadata["name"]

        def change(before: Item | None) -> Json:
            if before is not None:
                raise status.already_exists(call.resource, name)
            return _ordered(made, call.resource)

        key = f"{call.namespace}/{name}" if call.namespace else name
        return _one(201, view, self.store.write(call.resource, key, change))

    def _update(self, request: Request, call: Call) -> Answer:
        view = _view(request, call.resource, is_list=False)
        given = _object(request, call)

        def change(before: Item | None) -> Json:
            old = _existing(before, call)
            return _replaced(old, _decoded(given, call.resource), call)

        return _one(200, view, self.store.write(call.resource, _key(call), change))

    def _patch(self, request: Request, call: Call) -> Answer:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind not in status.PATCH_TYPES or kind == "application/apply-patch+yaml":
            raise status.unsupported_media_type(status.PATCH_TYPES)
        view = _view(request, call.resource, is_list=False)
        try:
            patch = _parse(request.body)
        except ValueError as exc:
            raise status.bad_request(f"error decoding patch: {exc}") from exc

        def change(before: Item | None) -> Json:
            old = _existing(before, call)
            try:
                merged = _patched(kind, old, patch, SHAPES[call.resource])
                new = decode(merged, SHAPES[call.resource])
            except BadPatch as exc:
                reason = {400: "BadRequest", 422: "Invalid"}.get(exc.code, "")
                raise status.failure(exc.code, reason, str(exc)) from exc
            except WrongType as exc:
                raise status.undecodable_patch(encode(patch).decode(), str(exc)) from exc
            return _replaced(old, new, call)

        return _one(200, view, self.store.write(call.resource, _key(call), change))

    def _delete(self, request: Request, call: Call) -> Answer:
        gone: list[Json] = []

        def change(before: Item | None) -> None:
            gone.append(_existing(before, call))

        item = self.store.write(call.resource, _key(call), change)
        if call.resource == "pods":
            return _one(200, _view(request, call.resource, is_list=False), item)
        done = status.success(call.resource, call.name, gone[0]["metadata"]["uid"])
        return Answer(200, [encode(done) + b"\n"])


def _replaced(old: Json, new: Json, call: Call) -> Json:
    """`new` as it may replace `old` on this path: the part that the path does not govern stays."""
    was, metadata = old["metadata"], new["metadata"]
    if metadata.get("name", was["name"]) != was["name"]:
        raise status.bad_request(
            f"the name of the object ({metadata['name']}) does not match the name on the URL ({was['name']})"
        )
    if metadata.get("namespace", call.namespace) != call.namespace:
        raise status.bad_request(
            "the namespace of the provided object does not match the namespace sent on the request"
        )
    if metadata.get("resourceVersion", was["resourceVersion"]) != was["resourceVersion"]:
        raise status.modified(call.resource, call.name)
    if metadata.get("uid", was["uid"]) != was["uid"]:
        why = f"Precondition failed: UID in precondition: {metadata['uid']}, UID in object meta: {was['uid']}"
        raise status.conflict(call.resource, call.name, why)
    fixed = ("name", "namespace", "uid", "creationTimestamp", "resourceVersion")
    metadata |= {key: was[key] for key in fixed if key in was}
    kept = "spec" if call.subresource == "status" else "status"
    new[kept] = old[kept]
    settle(call.resource, new)
    check(call.resource, old, new)
    return _ordered(new, call.resource)


def _patched(kind: str, old: Json, patch: Any, shape: Struct) -> Any:
    if kind == "application/json-patch+json":
        return json_patch(old, patch)
    if not isinstance(patch, dict):
        raise BadPatch("json: cannot unmarshal array into Go value of type map[string]interface {}")
    if kind == "application/merge-patch+json":
        return merge(old, patch)
    return strategic(old, patch, shape)


def _existing(before: Item | None, call: Call) -> Json:
    if before is None:
        raise status.not_found(call.resource, call.name)
    found: Json = json.loads(before.data)
    return found


def _object(request: Request, call: Call) -> Json:
    """The object in the body; raises ApiFailure if it is none of this kind."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    if kind != "application/json":
        raise status.unsupported_media_type(("application/json",))
    try:
        given = _parse(request.body)
    except ValueError as exc:
        raise status.bad_request(f"couldn't get version/kind; json parse error: {exc}") from exc
    if not isinstance(given, dict):
        raise status.bad_request("couldn't get version/kind; json parse error: not an object")
    wanted = KINDS[call.resource]
    if given.get("kind", wanted) != wanted:
        raise status.bad_request(f'{given["kind"]} in version "v1" cannot be handled as a {wanted}')
    return given


def _parse(body: bytes) -> Any:
    """JSON without Python's additions; raises ValueError."""

    def refuse(word: str) -> None:
        raise ValueError(f"invalid character {word[0]!r} looking for beginning of value")

    return json.loads(body, parse_constant=refuse)


def _decoded(given: Json, resource: str) -> Json:
    try:
        decoded: Json = decode(given, SHAPES[resource])
    except WrongType as exc:
        kind = KINDS[resource]
        raise status.bad_request(f'{kind} in version "v1" cannot be handled as a {kind}: {exc}') from exc
    return decoded


def _ordered(made: Json, resource: str) -> Json:
    """Every field in its place, the ones added here and the version, which the store fills in, too."""
    ordered: Json = decode(made, SHAPES[resource])
    metadata = ordered["metadata"] | {"resourceVersion": ""}
    ordered["metadata"] = {name: metadata[name] for name in METADATA.fields if name in metadata}
    return ordered


def _key(call: Call) -> str:
    return f"{call.namespace}/{call.name}" if call.namespace else call.name


def _view(request: Request, resource: str, is_list: bool) -> View:
    return choose(resource, request.headers.get("accept", ""), request.query, is_list)


def _one(code: int, view: View, item: Item) -> Answer:
    return Answer(code, [view.one(item) + b"\n"])


def _start(query: Mapping[str, str], limit: int) -> tuple[str, int | None, bool]:
    """First key, version (None: now) that a list asks for, and whether exactly that; raises ApiFailure."""
    token, given = query.get("continue", ""), query.get("resourceVersion", "")
    match = query.get("resourceVersionMatch", "")
    if token:
        if given not in ("", "0"):
            raise status.bad_request("specifying resource version is not allowed when using continue")
        return (*_read_token(token), True)
    version = _version(given)
    if match not in ("", "Exact", "NotOlderThan") or (match and version is None):
        text = "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided"
        raise status.invalid(
            "ListOptions", "", [("resourceVersionMatch", "FieldValueForbidden", text)], "meta.k8s.io"
        )
    return "", version or None, match == "Exact" or (match == "" and limit > 0)


def _read_token(token: str) -> tuple[str, int | None]:
    try:
        raw = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        version, start = int(raw["rv"]), str(raw["start"])
    except (ValueError, KeyError, TypeError) as exc:
        raise status.bad_request(f"continue key is not valid: {exc}") from exc
    return start, None if version == -1 else version


def _continue_token(version: int, start: str) -> str:
    raw = {"v": "meta.k8s.io/v1", "rv": version, "start": start}
    return base64.urlsafe_b64encode(encode(raw)).decode().rstrip("=")


def _initial_events(query: Mapping[str, str]) -> bool | None:
    """sendInitialEvents, None if it is not given; raises ApiFailure (422)."""
    given = query.get("sendInitialEvents", "")
    if not given:
        return None
    if query.get("resourceVersionMatch") != "NotOlderThan":
        text = "Forbidden: sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
        raise status.invalid(
            "ListOptions", "", [("resourceVersionMatch", "FieldValueForbidden", text)], "meta.k8s.io"
        )
    return _is_true(given)


def _state_lines(view: View, matches: Predicate | None, state: Iterable[tuple[str, Item]]) -> Iterator[bytes]:
    for _, item in state:
        if matches is None or matches(json.loads(item.data)):
            yield watch_line(ADDED, view.one(item))


def _then(lines: Iterator[bytes], last: bytes) -> Iterator[bytes]:
    yield from lines
    yield last


def _version(text: str) -> int | None:
    if text == "":
        return None
    if not text.isascii() or not text.isdigit():
        raise status.bad_request(
            f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax'
        )
    return int(text)


def _number(text: str) -> int:
    if text == "":
        return 0
    if not text.removeprefix("-").isdigit():
        raise status.bad_request(f'strconv.ParseInt: parsing "{text}": invalid syntax')
    return int(text)


def _is_true(text: str) -> bool:
    return text in ("true", "1", "True", "TRUE", "t", "T")


def _page(request: Request) -> Answer:
    """Version, health and discovery; raises ApiFailure (404) for anything else."""
    if request.method != "GET":
        raise status.method_not_allowed()
    path = request.path.rstrip("/")
    if path in ("/healthz", "/livez", "/readyz"):
        return Answer(200, [b"ok"], "text/plain; charset=utf-8")
    pages: dict[str, Json] = {
        "/version": VERSION,
        "/api": {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
        "/api/v1": _resources(),
    }
    if path not in pages:
        raise status.no_such_page()
    return Answer(200, [encode(pages[path]) + b"\n"])


def _resources() -> Json:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    names = {"nodes": ("node", "no"), "pods": ("pod", "po")}
    found: list[Json] = []
    for name, (singular, short) in names.items():
        entry = {
            "name": name,
            "singularName": singular,
            "namespaced": name in NAMESPACED,
            "kind": KINDS[name],
        }
        found.append({**entry, "verbs": verbs, "shortNames": [short]})
        part = {"name": f"{name}/status", "singularName": "", "namespaced": name in NAMESPACED}
        found.append({**part, "kind": KINDS[name], "verbs": ["get", "patch", "update"]})
    return {"kind": "APIResourceList", "groupVersion": "v1", "resources": found}
