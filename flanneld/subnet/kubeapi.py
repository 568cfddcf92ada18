"""The Kubernetes API server: the few calls that flanneld makes, with limits in time and clear errors.

    get   /api/v1/namespaces/NAMESPACE/pods/POD
    get   /api/v1/nodes/NODE
    patch /api/v1/nodes/NODE/status
    list  /api/v1/nodes                             in pages
    watch /api/v1/nodes                             with bookmarks

This is the only module that knows lightkube and the libraries below it. It takes and returns values of
`flanneld.subnet.nodes`; what to do about an error is for `flanneld.subnet.kube`.

Decision: of lightkube its configuration, credentials and requests are used, and neither its watch nor
its decoding. That watch has no limit in time, so a dead peer hangs it for ever; it decodes objects whole,
which at 5,000 nodes of 15 kB costs seconds; and it knows a lost history only from the HTTP status.
Our decoder reads some dozen members of a Node and skips the rest.

Decision: reading happens in threads of their own. A read of TLS can neither be waited for together with
`stop` nor be interrupted from outside; a thread left behind ends with its time limit.

Decision: after Retry-After no request is made until that time; until then every call fails at once with
the same text. The waiting is done by whoever tries again, who can be stopped.

Decision: what is wrong with credentials is StoreUnavailable, not the end: token files are replaced while
we run, and RBAC can be granted. The token is read anew for each request (client-go: once a minute), and
after a refusal or a TLS error the kubeconfig and the certificates are, too.

Decision: HTTPS_PROXY and NO_PROXY count as they do for upstream (Go's rules, with addresses and ranges).
"""

from __future__ import annotations

import random
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from types import GenericAlias
from typing import Any, NamedTuple, TypeVar

import httpx2
import msgspec
import yaml
from lightkube.config.client_adapter import ConnectionParams, user_auth, verify_cluster
from lightkube.config.kubeconfig import KubeConfig, SingleConfig
from lightkube.config.models import Cluster, User
from lightkube.core.exceptions import ConfigError as LightkubeError
from lightkube.core.generic_client import GenericSyncClient
from lightkube.core.resource import ApiInfo, NamespacedResource, ResourceDef
from lightkube.types import PatchType

from cni.errors import ConfigError, StoreUnavailable
from flanneld.subnet import nodes, proxy
from flanneld.subnet.nodes import Annotations, Node

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
R = TypeVar("R", Cluster, User)

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

CONNECT_LIMIT_S = 5.0
CALL_LIMIT_S = 10.0  # one answer; also the beginning of a watch
PAGE_LIMIT_S = 60.0  # 500 nodes of 15 kB are 7.5 MB
POLL_S = 0.4  # how soon a blocked call notices `stop`
PAGE = 500
PAGE_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)  # before a page is asked for again
# The server ends a watch by itself after a time within these bounds (client-go's).
WATCH_LIMITS_S = (300, 600)
# Bookmarks come about once a minute; a watch without a sign of life for longer is over.
SILENCE_S = 150.0
RETRY_AFTER_S = (1, 60)  # what the server may ask for
_QUEUE = 256  # events; beyond that the connection has to wait
_BACKLOG_S = 0.05
_BATCH = 256

_SOCKET_OPTIONS = [
    # A peer that is gone without a word is noticed after 30 s, also while we only read.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
]
# What the libraries raise for a request; the last two where they did not foresee it.
_BROKEN = (httpx2.HTTPError, LightkubeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_UNREADABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
# Keys of a kubeconfig that lightkube passes over.
_UNSUPPORTED = frozenset({"tls-server-name", "proxy-url", "as", "as-uid", "as-groups", "as-user-extra"})
# What lightkube raises for a kubeconfig in which something is missing or is of another type.
_MISSHAPEN = (msgspec.MsgspecError, AttributeError, LookupError, TypeError, ValueError)
_BEARER = re.compile(r"(Bearer )[^\s'\"]+")
_CLOSED = "the connection to the API server was closed"
_NEEDED = "the ClusterRole flannel must allow: pods get; nodes get, list, watch; nodes/status patch"


class Gone(Exception):
    """The history that was asked for is lost; only a new list helps."""


class Missing(StoreUnavailable):
    """The object does not exist."""


class Listing(NamedTuple):
    """All nodes as of one version."""

    version: str
    nodes: list[Node]


class Batch(NamedTuple):
    """Events of a watch in order, and the last version among them (empty if none was named).

    With `ended` it is the last one, and `cut` tells whether the end came otherwise than in order.
    """

    events: list[nodes.Event]
    version: str = ""
    ended: bool = False
    cut: bool = False


# ---- objects: of each only the members that count


class _Condition(msgspec.Struct, gc=False):
    type: str = ""
    status: str = ""


class _Status(msgspec.Struct, gc=False):
    conditions: list[_Condition] | None = None


class _Spec(msgspec.Struct, gc=False):
    podCIDR: str = ""
    podCIDRs: list[str] | None = None


class _ListMeta(msgspec.Struct, gc=False):
    resourceVersion: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _Cause(msgspec.Struct, gc=False):
    reason: str = ""


class _Details(msgspec.Struct, gc=False):
    causes: list[_Cause] | None = None
    retryAfterSeconds: int = 0


class _Failure(msgspec.Struct, gc=False):
    """The kind Status: what the API server says when it refuses."""

    message: str = ""
    code: int = 0
    details: _Details | None = None

    @property
    def gone(self) -> bool:
        """Whether a version is too old, or newer than the server's own, whose store was put back."""
        causes = (self.details.causes if self.details else None) or ()
        return self.code == 410 or any(cause.reason == "ResourceVersionTooLarge" for cause in causes)

    def __str__(self) -> str:
        return f"{self.code} {' '.join(self.message.split())[:300]}".strip()


class _ErrorEvent(msgspec.Struct, gc=False):
    object: _Failure


class _PodSpec(msgspec.Struct, gc=False):
    nodeName: str = ""


class _Pod(NamespacedResource, msgspec.Struct):
    spec: _PodSpec | None = None

    _api_info = ApiInfo(ResourceDef("", "v1", "Pod"), "pods", ["get"])


_NODE = ResourceDef("", "v1", "Node")
_NODE_INFO = ApiInfo(_NODE, "nodes", ["get", "list", "watch"])
_STATUS_INFO = ApiInfo(_NODE, "nodes", ["patch"], parent=_NODE, action="status")


class _FullCondition(msgspec.Struct, gc=False):
    type: str = ""
    status: str = ""
    reason: str = ""


class _FullStatus(msgspec.Struct, gc=False):
    conditions: list[_FullCondition] | None = None


class _Conditions(msgspec.Struct, gc=False):
    """A Node of which only the conditions are wanted."""

    status: _FullStatus | None = None

    _api_info = _NODE_INFO


_pod = msgspec.json.Decoder(_Pod)
_conditions = msgspec.json.Decoder(_Conditions)
_failure = msgspec.json.Decoder(_Failure)
_error = msgspec.json.Decoder(_ErrorEvent)


class _Types:
    """Node and lists of it as structs that name our annotations, so that no other annotation is decoded."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        told = msgspec.defstruct(
            "Told",
            [(name, str | None, msgspec.field(name=key, default=None)) for name, key in keys.items()],
            gc=False,
        )
        metadata = msgspec.defstruct(
            "Metadata",
            [
                ("name", str, ""),
                ("creationTimestamp", str | None, None),
                ("resourceVersion", str, ""),
                ("annotations", told | None, None),
            ],
            gc=False,
        )
        empty = msgspec.field(default_factory=metadata)
        fields: list[Any] = [("metadata", metadata, empty), ("spec", _Spec | None, None)]
        more: list[Any] = [("status", _Status | None, None)]
        self.node: Any = msgspec.defstruct(
            "Node", fields + more, namespace={"_api_info": _NODE_INFO}, gc=False
        )
        self.status: Any = msgspec.defstruct("Status", fields, namespace={"_api_info": _STATUS_INFO})
        items: Any = GenericAlias(list, self.node) | None
        page: Any = msgspec.defstruct("Page", [("metadata", _ListMeta), ("items", items, None)])
        # Most events are heartbeats: what a lease does not depend on is not even looked at.
        lean: Any = msgspec.defstruct("Lean", fields, gc=False)
        event: Any = msgspec.defstruct("Event", [("type", str), ("object", lean)], gc=False)
        self.one: msgspec.json.Decoder[Any] = msgspec.json.Decoder(self.node)
        self.page: msgspec.json.Decoder[Any] = msgspec.json.Decoder(page)
        self.event: msgspec.json.Decoder[Any] = msgspec.json.Decoder(event)


def _node(record: Any) -> Node:
    """The Node as a value; what most nodes have alike is kept once."""
    metadata, spec = record.metadata, record.spec or _Spec()
    told = nodes.NO_ANNOTATIONS
    if metadata.annotations is not None:
        managed, kind, *rest = msgspec.structs.astuple(metadata.annotations)
        told = Annotations(managed and sys.intern(managed), kind and sys.intern(kind), *rest)
    cidrs = tuple(spec.podCIDRs or ((spec.podCIDR,) if spec.podCIDR else ()))
    return Node(metadata.name, metadata.creationTimestamp or "", cidrs, told)


def _node_and_state(record: Any) -> Node:
    conditions = (record.status.conditions if record.status else None) or ()
    ready = any(condition.type == "Ready" and condition.status == "True" for condition in conditions)
    return replace(_node(record), ready=ready)


# ---- credentials


class _Client(GenericSyncClient):
    """lightkube's requests, over a transport with our socket options."""

    def __init__(self, config: SingleConfig, through: str | None) -> None:
        user = config.user or User()
        self.cluster = config.cluster
        # A token that was pasted from a file ends in a line break, which no header may hold.
        self.user = msgspec.structs.replace(user, token=user.token.strip() or None) if user.token else user
        self.users = 0  # calls that go on; see `Api`
        self.answered = False  # so there may be a connection from earlier
        self._verify = verify_cluster(self.cluster, self.user, config.abs_file, trust_env=False)
        super().__init__(ConnectionParams(timeout=_timeout(CALL_LIMIT_S), proxy=through), config)

    def AdapterClient(self, config: SingleConfig, params: ConnectionParams) -> httpx2.Client:
        return httpx2.Client(
            base_url=self.cluster.server,
            auth=_TokenFile(self.user.token_file) if self.user.token_file else user_auth(self.user),
            transport=httpx2.HTTPTransport(
                verify=self._verify, proxy=params.proxy, socket_options=_SOCKET_OPTIONS
            ),
            timeout=params.timeout,
            trust_env=False,
            headers={"Accept": "application/json", "User-Agent": "flanneld"},
        )


class _TokenFile(httpx2.Auth):
    """Sends the token that the file holds now: the kubelet replaces it long before it ends."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        try:
            token = self._path.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as exc:
            raise StoreUnavailable(f"cannot read the token file {self._path}: {exc}") from exc
        request.headers["Authorization"] = f"Bearer {token}"
        yield request


def _timeout(read_s: float) -> httpx2.Timeout:
    return httpx2.Timeout(CONNECT_LIMIT_S, read=read_s)


@dataclass(frozen=True, slots=True)
class Access:
    """Where the API server is and what it is shown; the flags, and the environment of the process."""

    api_url: str
    kubeconfig: str
    environ: Mapping[str, str]

    @property
    def source(self) -> str:
        """What says so, for messages."""
        if self.kubeconfig:
            return f"--kubeconfig-file={self.kubeconfig}"
        return (
            f"--kube-api-url={self.api_url}" if self.api_url else f"the service account in {SERVICE_ACCOUNT}"
        )

    def connect(self) -> _Client:
        """Read what is there now and make a client of it; raises ConfigError.

        The choice is client-go's: with neither flag the pod's service account, else the kubeconfig, whose
        server the URL replaces; the URL alone means no credentials.
        """
        config = self._load()
        server = _with_scheme(self.api_url or config.cluster.server, config)
        config = config._replace(cluster=msgspec.structs.replace(config.cluster, server=server))
        try:
            url = httpx2.URL(server)
            if url.scheme in ("http", "https") and url.host:
                return _Client(config, proxy.proxy_for(url.scheme, url.host, url.port, self.environ))
            problem = f"{server!r} is no URL of an API server, such as https://HOST:PORT"
        except OSError as exc:
            problem = f"{exc.strerror or _said(exc)}: {_files(config)}"
        except (ValueError, ImportError, LightkubeError, httpx2.InvalidURL) as exc:
            problem = _said(exc)  # ImportError: for a proxy that is spoken to in SOCKS
        raise ConfigError(f"{self.source}: cannot use what it names: {problem}")

    def _load(self) -> SingleConfig:
        if not self.kubeconfig:
            return _only(KubeConfig.from_server(self.api_url)) if self.api_url else self._in_cluster()
        try:
            config = _only(KubeConfig.from_file(self.kubeconfig))
            _require_known(yaml.safe_load(Path(self.kubeconfig).read_bytes()), config)
        except (LightkubeError, OSError, yaml.YAMLError, *_MISSHAPEN) as exc:
            raise ConfigError(
                f"{self.source} is no kubeconfig with a current-context, its cluster and its user:"
                f" {_said(exc)}"
            ) from None
        return config._replace(
            cluster=_absolute(config, config.cluster, "certificate_auth"),
            user=_absolute(config, config.user or User(), "token_file", "client_cert", "client_key"),
        )

    def _in_cluster(self) -> SingleConfig:
        host, port = (self.environ.get(f"KUBERNETES_SERVICE_{part}", "") for part in ("HOST", "PORT"))
        if not host or not port:
            raise ConfigError(
                "no API server is named: outside of a pod (KUBERNETES_SERVICE_HOST and"
                " KUBERNETES_SERVICE_PORT are not set) --kubeconfig-file or --kube-api-url is needed"
            )
        ca, token = SERVICE_ACCOUNT / "ca.crt", SERVICE_ACCOUNT / "token"
        for file in (ca, token):
            if not file.is_file():
                raise ConfigError(
                    f"{file} does not exist: the pod has no service account; set serviceAccountName: flannel"
                    " in the DaemonSet, or name a --kubeconfig-file"
                )
        server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        cluster = Cluster(server=server, certificate_auth=str(ca))
        return _only(KubeConfig.from_one(cluster=cluster, user=User(token_file=str(token))))


def _absolute(config: SingleConfig, record: R, *names: str) -> R:
    """The record with the files that it names looked for beside the kubeconfig."""
    files = {name: getattr(record, name) for name in names}
    found = {name: str(config.abs_file(file)) for name, file in files.items() if file}
    return msgspec.structs.replace(record, **found)


def _files(config: SingleConfig) -> str:
    """The files it names; of what is no path, such as a key that was pasted there, only the beginning."""
    user = config.user or User()
    named = filter(None, (config.cluster.certificate_auth, user.client_cert, user.client_key))
    return ", ".join(
        name if name.startswith("/") and "\n" not in name else f"{name[:8]}..." for name in named
    )


def _only(config: KubeConfig) -> SingleConfig:
    """The current context."""
    found = config.get()
    if found is None:
        raise LightkubeError("no current-context")
    return found


def _require_known(record: Any, config: SingleConfig) -> None:
    """Raise ValueError for what our libraries would pass over: acting as another user, above all."""
    for kind, name in (("cluster", config.context.cluster), ("user", config.context.user)):
        [entry] = [e for e in record.get(f"{kind}s") or () if e.get("name") == name] or [{}]
        unknown = sorted(_UNSUPPORTED & (entry.get(kind) or {}).keys())
        if unknown:
            raise ValueError(f"{unknown[0]} of {kind} {name} is not supported")


def _with_scheme(server: str, config: SingleConfig) -> str:
    """As client-go: HOST:PORT alone is plain HTTP, unless something of TLS is configured."""
    if "://" in server:
        return server
    cluster, user = config.cluster, config.user or User()
    tls = cluster.certificate_auth or cluster.certificate_auth_data or cluster.insecure
    return f"{'https' if tls or user.client_cert or user.client_cert_data else 'http'}://{server}"


def _said(exc: BaseException) -> str:
    return _BEARER.sub(r"\1***", " ".join(str(exc).split())) or type(exc).__name__


# ---- requests


@dataclass(frozen=True, slots=True)
class _Call:
    """One request: what is done to which kind of object."""

    verb: str
    kind: Any
    name: str | None = None
    namespace: str | None = None
    params: Mapping[str, str | None] | None = None
    body: bytes | None = None

    @property
    def limit_s(self) -> float:
        """How long the whole of an answer may take."""
        return PAGE_LIMIT_S if self.verb == "list" else CALL_LIMIT_S

    @property
    def silence_s(self) -> float:
        """How long a read may wait: longer than the one who waits for it, whose words are always the same."""
        limits = {"list": CALL_LIMIT_S, "watch": SILENCE_S + CALL_LIMIT_S}
        return limits.get(self.verb, CALL_LIMIT_S + 5.0)

    @property
    def about_all(self) -> bool:
        return self.verb in ("list", "watch")

    def __str__(self) -> str:
        """As RBAC has it: `patch nodes/status`."""
        info: ApiInfo = self.kind._api_info
        return f"{self.verb} {info.plural}{f'/{info.action}' if info.action else ''}"


class Api:
    """One API server. Raises ConfigError for access that cannot be right; asks nothing before it is told to.

    Every method raises StoreUnavailable, with the remedy if there is one, and may be called from any
    thread. There are two clients, one for calls about one object and one for list and watch: a refused
    one is thrown away with its connections, which must not cost the other its watch.

    A client that is given up is closed by the last call that uses it: a socket closed under a thread
    that reads TLS from it would have that thread read from whatever gets its descriptor next.
    """

    def __init__(self, access: Access, annotation_keys: Mapping[str, str]) -> None:
        self._access = access
        self._types = _Types(annotation_keys)
        self._lock = Lock()
        self._clients: dict[bool, _Client] = {False: access.connect()}
        self.url: str = self._clients[False].cluster.server
        self._watch: Watch | None = None
        self._closed = Event()
        self._until = 0.0
        self._why = ""

    def node_of_pod(self, namespace: str, name: str) -> str:
        """The pod's `spec.nodeName`, empty if it has none yet; raises Missing."""
        pod = self._ask(_Call("get", _Pod, name, namespace), _pod.decode)
        return str(pod.spec.nodeName) if pod.spec else ""

    def node(self, name: str) -> Node:
        """Raises Missing."""
        return _node_and_state(self._ask(_Call("get", self._types.node, name), self._types.one.decode))

    def confirm(self, name: str, version: str, stop: Event) -> None:
        """Raise Gone if the server's own history does not reach up to `version`: its store was put back.

        A watch from such a version would be silent, and no error. Any object will do, found or not.
        """
        call = _Call("get", self._types.node, name, params={"resourceVersion": version})
        with suppress(Missing):
            self._ask(call, self._types.one.decode, stop)

    def condition(self, name: str, kind: str) -> tuple[str, str]:
        """Status and reason of a node's condition, empty if it has none of that kind; raises Missing."""
        found = self._ask(_Call("get", _Conditions, name), _conditions.decode)
        for condition in (found.status.conditions if found.status else None) or ():
            if condition.type == kind:
                return condition.status, condition.reason
        return "", ""

    def patch_status(self, name: str, patch: str) -> Node:
        """Apply a strategic merge patch to the node's status subresource; the node as it is then.

        Raises Missing, and ConfigError for what the API server will never accept.
        """
        call = _Call("patch", self._types.status, name, body=patch.encode())
        return _node_and_state(self._ask(call, self._types.one.decode))

    def list(self, stop: Event | None = None) -> Listing:
        """All nodes, in pages. Raises Gone if the server forgets between two of them what it was asked."""
        found: list[Node] = []
        version, token = "", ""
        while True:
            page = self._page(token, stop)
            found.extend(map(_node_and_state, page.items or ()))
            version, token = version or page.metadata.resourceVersion, page.metadata.continue_
            if not token:
                return Listing(version, found)

    def _page(self, token: str, stop: Event | None) -> Any:
        """One page. After the first it is asked for again: to begin anew is harder on a busy server."""
        call = _Call("list", self._types.node, params={"limit": str(PAGE), "continue": token or None})
        pauses_s = iter(PAGE_PAUSES_S if token else ())
        while True:
            try:
                return self._ask(call, self._types.page.decode, stop)
            except StoreUnavailable:
                pause_s = next(pauses_s, None)
                if pause_s is None or self.ended(stop):
                    raise
                self._pause(max(pause_s, self._until - time.monotonic()) * random.uniform(1.0, 1.5), stop)  # noqa: S311 - no secret

    def _pause(self, seconds: float, stop: Event | None) -> None:
        until = time.monotonic() + seconds
        while not self.ended(stop) and (left := until - time.monotonic()) > 0:
            self._closed.wait(min(left, POLL_S))

    def watch(self, version: str, known: dict[str, Node], own: str) -> Watch:
        """Begin to watch all nodes from `version` on, at which the managed ones were those in `known`.

        There is one watch at a time. Of the node `own` everything is told.
        """
        params = {
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(random.randint(*WATCH_LIMITS_S)),  # noqa: S311 - spreads the load
        }
        call = _Call("watch", self._types.node, params=params)
        with self._lock:
            watch = self._watch = Watch(self, lambda: self.open(call), self._reader(call), known, own)
        return watch

    def ended(self, stop: Event | None = None) -> bool:
        return self._closed.is_set() or (stop is not None and stop.is_set())

    def close(self) -> None:
        """Close the connections; calls that wait for an answer fail soon."""
        self._closed.set()
        with self._lock:
            watch, clients = self._watch, list(self._clients.values())
            self._clients.clear()
        if watch is not None:
            watch.close()
        for client in clients:
            if not client.users:
                _close(client)

    def _ask(self, call: _Call, decode: Callable[[bytes], T], stop: Event | None = None) -> T:
        """The decoded answer, within `call.limit_s`; ends soon after `stop` is set or `close` called."""
        limit = time.monotonic() + call.limit_s
        future = _in_thread(f"kube-{call.verb}", lambda: self._answer(call, decode))
        while True:
            try:
                return future.result(timeout=POLL_S)
            except TimeoutError:
                if self.ended(stop):
                    raise StoreUnavailable(_CLOSED) from None
                if time.monotonic() > limit:
                    raise self.silent(f"gave no answer to {call}", call.limit_s) from None

    def silent(self, what: str, limit_s: float) -> StoreUnavailable:
        return StoreUnavailable(f"the API server at {self.url} {what} within {limit_s:g} s")

    def _answer(self, call: _Call, decode: Callable[[bytes], T]) -> T:
        try:
            with self.open(call) as response:
                return decode(self._attempt(call, response.read))
        except _UNREADABLE as exc:
            raise StoreUnavailable(
                f"the API server at {self.url} answered to {call} with something else: {exc}"
            ) from None

    @contextmanager
    def open(self, call: _Call) -> Iterator[httpx2.Response]:
        """The beginning of a good answer; raises Gone, Missing and ConfigError as well."""
        if time.monotonic() < self._until:
            raise StoreUnavailable(self._why)
        client = self._enter(call.about_all)
        try:
            with closing(self._attempt(call, lambda: _send(client, call), client)) as response:
                if response.status_code != 200:
                    failure = _read_failure(self._attempt(call, response.read), response)
                    raise self._refused(call, failure, client)
                yield response
        finally:
            self._leave(client)

    def _attempt(self, call: _Call, step: Callable[[], T], client: _Client | None = None) -> T:
        """One step of a request; what the libraries raise becomes StoreUnavailable."""
        try:
            return step()
        except _BROKEN as exc:
            if self._closed.is_set():
                raise StoreUnavailable(_CLOSED) from None
            tls = _cause(exc, ssl.SSLError)
            if tls is not None and client is not None:
                self._drop(call.about_all, client)
            if client is not None and isinstance(tls, ssl.SSLCertVerificationError):
                raise StoreUnavailable(
                    f"the certificate of the API server at {self.url} is not trusted: {tls.verify_message};"
                    f" {self._authority(client)} must be the cluster's"
                ) from exc
            raise StoreUnavailable(
                f"the API server at {self.url} does not answer to {call}: {_said(exc)}"
            ) from exc

    def _refused(self, call: _Call, failure: _Failure, client: _Client) -> Exception:
        if failure.gone:
            return Gone(str(failure))
        match failure.code:
            case 401:
                self._drop(call.about_all, client)
                shown = (
                    f"the token file {client.user.token_file}"
                    if client.user.token_file
                    else self._access.source
                )
                return StoreUnavailable(
                    f"the API server at {self.url} does not accept our credentials ({failure}):"
                    f" {shown} must have some that are valid now"
                )
            case 403:
                return StoreUnavailable(
                    f"the API server at {self.url} does not allow flanneld to {call} ({failure}); {_NEEDED}"
                )
            case 404 if call.name:
                return Missing(str(failure))
            case 422:
                return ConfigError(f"the API server at {self.url} will never {call} like this: {failure}")
        return self._busy(call, failure)

    def _busy(self, call: _Call, failure: _Failure) -> StoreUnavailable:
        """The error for what may go well later; remembers how much later."""
        self._why = f"the API server at {self.url} refuses to {call} at present ({failure})"
        if failure.details and failure.details.retryAfterSeconds > 0:
            least, most = RETRY_AFTER_S
            self._until = time.monotonic() + min(max(failure.details.retryAfterSeconds, least), most)
        return StoreUnavailable(self._why)

    def _reader(self, call: _Call) -> Callable[[bytes], tuple[nodes.Event | None, str]]:
        """How a line of a watch is read: an event, none from a bookmark, and the version.

        Raises Gone, and StoreUnavailable for any other ERROR.
        """

        def read(line: bytes) -> tuple[nodes.Event | None, str]:
            try:
                event = self._types.event.decode(line)
                if event.type == "ERROR":
                    failure = _error.decode(line).object
                    raise Gone(str(failure)) if failure.gone else self._busy(call, failure)
            except _UNREADABLE as exc:
                # To go on after it would be to miss what it says.
                raise Gone(str(exc)) from None
            metadata = event.object.metadata
            if event.type == "BOOKMARK":
                return None, metadata.resourceVersion
            node = None if event.type == "DELETED" else _node(event.object)
            return nodes.Event(metadata.name, node), metadata.resourceVersion

        return read

    def _enter(self, about_all: bool) -> _Client:
        with self._lock:
            if self._closed.is_set():
                raise StoreUnavailable(_CLOSED)
            client = self._clients.get(about_all)
            if client is None:
                try:
                    client = self._clients[about_all] = self._access.connect()
                except ConfigError as exc:  # it was good once, and may be so again
                    raise StoreUnavailable(str(exc)) from exc
                self.url = client.cluster.server
            client.users += 1
            return client

    def _leave(self, client: _Client) -> None:
        with self._lock:
            client.users -= 1
            unused = client not in self._clients.values() and not client.users
        if unused:
            _close(client)

    def _drop(self, about_all: bool, client: _Client) -> None:
        """Have the next call read the credentials again; called by one that uses the client."""
        with self._lock:
            if self._clients.get(about_all) is client:
                del self._clients[about_all]

    def _authority(self, client: _Client) -> str:
        cluster = client.cluster
        if cluster.certificate_auth:
            return f"the CA file {cluster.certificate_auth}"
        return (
            f"the CA in {self._access.source}" if cluster.certificate_auth_data else "one of the system's CAs"
        )


def _send(client: _Client, call: _Call) -> httpx2.Response:
    """Send the request, and what only reads a second time if a connection from earlier breaks at once.

    As Go's client: most likely the server has closed it meanwhile.
    """
    again, client.answered = client.answered and call.body is None, False
    try:
        response: httpx2.Response = client.send(_request(client, call), stream=True)
    except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
        if not again:
            raise
        response = client.send(_request(client, call), stream=True)
    client.answered = True
    return response


def _request(client: _Client, call: _Call) -> httpx2.Request:
    prepared = client.prepare_request(
        "list" if call.verb == "watch" else call.verb,
        call.kind,
        msgspec.Raw(call.body) if call.body is not None else None,
        call.name,
        call.namespace,
        watch=call.verb == "watch",
        params=dict(call.params or {}),
        headers={"Content-Type": PatchType.STRATEGIC.value} if call.body is not None else None,
    )
    prepared.timeout = _timeout(call.silence_s)
    return client.build_adapter_request(prepared)


def _close(client: _Client) -> None:
    client.close()  # type: ignore[no-untyped-call]


def _read_failure(body: bytes, response: httpx2.Response) -> _Failure:
    """What the server says; what stands between us may say something else than Status."""
    try:
        failure = _failure.decode(body)
    except _UNREADABLE:
        failure = _Failure(message=body[:200].decode("utf-8", "replace"))
    failure.code = response.status_code
    retry_after = response.headers.get("Retry-After", "")
    if retry_after.isascii() and retry_after.isdigit():
        failure.details = _Details(failure.details.causes if failure.details else None, int(retry_after))
    return failure


def _cause(exc: BaseException, kind: type[E]) -> E | None:
    """The exception of that kind from which `exc` came."""
    seen: BaseException | None = exc
    while seen is not None and not isinstance(seen, kind):
        seen = seen.__cause__ or seen.__context__
    return seen


def _in_thread(name: str, work: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as exc:  # noqa: BLE001 - a thread's top; raised again where the result is awaited
            future.set_exception(exc)

    Thread(target=run, name=name, daemon=True).start()
    return future


class Watch:
    """One watch of all nodes. A thread reads it into a queue, where it can be waited for with a limit.

    An event that leaves a node as it was ends in that thread; its version comes with what follows.
    """

    def __init__(
        self,
        api: Api,
        begin: Callable[[], AbstractContextManager[httpx2.Response]],
        read: Callable[[bytes], tuple[nodes.Event | None, str]],
        known: dict[str, Node],
        own: str,
    ) -> None:
        self._own = own
        self._api, self._begin, self._read, self._known = api, begin, read, known
        self._items: SimpleQueue[Batch | Exception] = SimpleQueue()
        self._over = Event()
        self._guard = Lock()  # of the socket, which its thread may close
        self._socket: socket.socket | None = None
        self._begun = self._heard = time.monotonic()
        self._stands = self._cut = False
        self._thread = Thread(target=self._run, name="kube-watch", daemon=True)
        self._thread.start()

    def receive(self) -> Batch | None:
        """What has come, at first an empty batch when the watch stands; None if nothing came for a moment.

        However it ends then, it may be begun again after the last version. Raises Gone, and
        StoreUnavailable where there was no watch.
        """
        try:
            item = self._items.get(timeout=POLL_S)
        except Empty:
            return self._nothing()
        self._stands = True
        events: list[nodes.Event] = []
        version = ""
        while isinstance(item, Batch):
            events += item.events
            version = item.version or version
            if item.ended or len(events) >= _BATCH or self._items.empty():
                return Batch(events, version, item.ended, item.cut)
            item = self._items.get_nowait()
        if events or version:
            # What came before the error counts; the error is the last to come, so it is next.
            self._items.put(item)
            return Batch(events, version)
        raise item

    def _nothing(self) -> Batch | None:
        now = time.monotonic()
        if not self._stands and now - self._begun > CALL_LIMIT_S:
            raise self._api.silent("began no watch of nodes", CALL_LIMIT_S)
        return Batch([], ended=True, cut=True) if now - self._heard > SILENCE_S else None

    def close(self) -> None:
        """End the watch. A reader that waits for an answer to begin is left to its time limit."""
        with self._guard:
            self._over.set()
            if self._socket is not None:
                with suppress(OSError):
                    # Below TLS, whose own shutdown would take its state from under the reader.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
        self._thread.join(POLL_S)

    def _put(self, item: Batch | Exception) -> None:
        while self._items.qsize() >= _QUEUE:
            if self._over.wait(_BACKLOG_S):
                break
        self._items.put(item)

    def _run(self) -> None:
        try:
            with self._begin() as response:
                self._take_socket(response.extensions["network_stream"].get_extra_info("socket"))
                try:
                    self._put(Batch([]))
                    version = self._read_events(response)
                finally:
                    self._take_socket(None)
            self._put(Batch([], version, ended=True, cut=self._cut))
        except Exception as exc:  # noqa: BLE001 - a thread's top; raised again where the events are awaited
            self._put(exc)

    def _take_socket(self, found: socket.socket | None) -> None:
        """Let `close` end the connection from now on, or no longer."""
        with self._guard:
            self._socket = found
            if self._over.is_set() and found is not None:  # `close` came before
                raise StoreUnavailable(_CLOSED)

    def _read_events(self, response: httpx2.Response) -> str:
        version = ""
        for line in self._lines(response):
            event, version = self._read(line)
            if event is None or self._is_new(event):
                self._put(Batch([event] if event else [], version))
        return version

    def _lines(self, response: httpx2.Response) -> Iterator[bytes]:
        """The whole lines that come, until the connection ends in some way."""
        begun = b""
        try:
            for chunk in response.iter_bytes():
                self._heard = time.monotonic()
                *lines, begun = (begun + chunk).split(b"\n")
                yield from filter(None, lines)
        except _BROKEN:
            self._cut = True

    def _is_new(self, event: nodes.Event) -> bool:
        name, node = event
        if node is not None and not node.managed:
            node = None
        if self._known.get(name) == node:
            return name == self._own
        if node is None:
            del self._known[name]
        else:
            self._known[name] = node
        return True
