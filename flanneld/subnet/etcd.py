"""Leases in etcd v3, key for key and byte for byte as flannel keeps them.

    <prefix>/config                              the network configuration, written by the operator
    <prefix>/subnets/10.5.34.0-24                one lease: JSON attributes, attached to an etcd lease
    <prefix>/subnets/10.5.34.0-24&fd00:5:34::-64 one lease, dual stack

A lease lives 24 hours. Each renewal attaches the key to a new etcd lease; the old one is left to
expire with nothing on it (upstream does the same, and a Go flanneld on the next node sees no
difference). A key without an etcd lease is a reservation: it never expires.

Decision: of the etcd3 package only the generated stubs are used, on channels of our own. Its client
has one deadline for everything or none, no keepalive (a watch on a dead peer hangs for ever), does not
ask for a leader on watches, does not renew an expired token, and fails over between endpoints only
where it thinks fit.

Decision: calls fail over, watches do not. A broken watch raises StoreUnavailable and the next call of
`watch` begins with a fresh snapshot, by then on the next endpoint; the only thing recovered inside
is a compacted history, because there etcd itself is well.

Decision: a lost race is run again (upstream ends the daemon), and an unreadable key or value is
reported once and skipped (upstream treats it as "all peers are gone"). The subnet of an unreadable
value still counts as taken.

Decision: a reservation stays a reservation. Upstream documents that, but its code writes the key back
with a TTL, so that a fixed subnet is lost when its node is down for a day.

Decision: every write is a transaction on the revision that was read (0: the key does not exist; the
same as upstream's version 0). After an unknown outcome the new etcd lease is not revoked: had the write
been applied, that would delete our key under our peers' feet. It expires by itself.

Decision: `expires_s` is known for leases that `acquire` and `renew` return; in `stored` and `watch` it
is 0, because etcd wants a query per key for it and nobody needs it: etcd itself deletes what expires.

Decision: the scheme of an endpoint decides about TLS: `https` verifies against the CA file, or against
gRPC's built-in roots without one, and shows the client certificate if there is one; `http` never does
TLS; without a scheme it is TLS if any of the three files is given. Upstream ignores a CA file alone.
"""

from __future__ import annotations

import logging
import os
import posixpath
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from queue import Empty, SimpleQueue
from random import SystemRandom
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

# gRPC reads these when it is loaded. Its fork handlers would make every child that we start wait for
# its threads; its C core writes to stderr what we raise as errors.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from etcd3.etcdrpc import kv_pb2, rpc_pb2, rpc_pb2_grpc

from cni.errors import ConfigError, LeaseLost, StoreUnavailable
from flanneld.config import DEFAULT_NETCONF, NetConf, parse_netconf, validate
from flanneld.lease import Attributes, Change, Lease, Snapshot, Update, parse_subnet_key, subnet_key
from flanneld.subnet import allocate
from flanneld.subnet.manager import LEASE_TTL_S

log = logging.getLogger("flanneld")

CALL_DEADLINE_S = 5.0
POLL_S = 0.3  # how soon a blocked call or watch notices `stop`
# etcd refuses clients that ping more often than every 5 s; a dead peer is noticed after the sum.
KEEPALIVE_S = 6.0
KEEPALIVE_TIMEOUT_S = 4.0
# etcd sends a progress notice every 10 min by default; a watch that is silent for two is read anew.
SILENCE_S = 1300.0
RACES = 20
RACE_PAUSE_S = 0.1

_UNREACHABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
_REFUSALS = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
}
_CLOSED = "the connection to etcd was closed"
_STALE_TOKEN = ("invalid auth token", "user name is empty", "revision of auth store is old")

_CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    # Else 60 s, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", int(CALL_DEADLINE_S * 1000)),  # in fact how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.max_receive_message_length", -1),  # all leases come in one answer
    ("grpc.enable_http_proxy", 0),
]


class _Refused(StoreUnavailable):
    """etcd answered, and the answer is no: the request had no effect."""


class EtcdManager:
    """Subnet manager over etcd v3. Raises ConfigError for endpoints or TLS files that cannot be right."""

    def __init__(
        self,
        endpoints: Sequence[str],
        prefix: str,
        keyfile: str = "",
        certfile: str = "",
        cafile: str = "",
        username: str = "",
        password: str = "",
        previous: Lease | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        credentials = _Credentials.load(keyfile, certfile, cafile)
        self._client = _Client(endpoints, credentials, username, password)
        self._config_key = join(prefix, "config")
        self._subnets = join(prefix, "subnets") + "/"
        self._previous = previous
        self._clock = clock
        self._rng = SystemRandom()
        self._reported: set[bytes] = set()

    @property
    def name(self) -> str:
        previous = str(self._previous.subnet) if self._previous and self._previous.subnet else "None"
        return f"Etcd Local Manager with Previous Subnet: {previous}"

    def network_config(self) -> NetConf:
        """The validated value of `<prefix>/config`; StoreUnavailable while the key does not exist."""
        reply = self._client.call("range", rpc_pb2.RangeRequest(key=self._config_key.encode()))
        if not reply.kvs:
            raise StoreUnavailable(
                f"etcd key {self._config_key} does not exist (was it written with the v3 API?);"
                f" write it with: ETCDCTL_API=3 etcdctl --endpoints={self._client.urls} put"
                f" {self._config_key} '{DEFAULT_NETCONF}'"
            )
        source = f"etcd key {self._config_key}"
        return validate(parse_netconf(bytes(reply.kvs[0].value), source), source)

    def stored(self, public_ip: IPv4Address | IPv6Address) -> Lease | None:
        """The lease of this public IP; its `expires_s` is 0."""
        leases = self._list().leases
        return next((lease for lease in leases if allocate.holds(lease, public_ip)), None)

    def acquire(self, config: NetConf, attrs: Attributes, previous: Lease | None) -> Lease:
        """Take or take over a lease; a race lost to another node is run again, with a short random pause."""
        if not config.enable_ipv4:
            raise ConfigError(
                f"etcd key {self._config_key}: EnableIPv4 is false, but leases in etcd are named by their"
                " IPv4 subnet; enable IPv4 or use the Kubernetes subnet manager"
            )
        for _ in range(RACES):
            listing = self._list()
            decision = allocate.choose(config, listing.taken, allocate.owner(attrs), previous, self._rng)
            lease = self._carry_out(decision, attrs)
            if lease is not None:
                return lease
            self._client.closed.wait(self._rng.uniform(0, RACE_PAUSE_S))
        raise StoreUnavailable(
            f"lost the race for a subnet under {self._subnets} {RACES} times; many nodes start at once"
        )

    def renew(self, lease: Lease) -> Lease:
        """Write the lease again with a new expiration; one that is gone is made again if still free."""
        for _ in range(RACES):
            written = self._rewrite(lease)
            if written is not None:
                return written
        raise StoreUnavailable(f"etcd key {self._path(lease)} changed {RACES} times while it was renewed")

    def watch(self, stop: Event) -> Iterator[Update]:
        """Yield a snapshot, then changes; a further snapshot when the history was compacted."""
        try:
            while not self._ended(stop):
                listing = self._list(stop)
                yield Snapshot(listing.leases)
                yield from self._follow(listing.revision + 1, stop)
        except StoreUnavailable:
            if not self._ended(stop):
                raise

    def close(self) -> None:
        """Close the connections; a running `watch` ends, other calls fail with StoreUnavailable."""
        self._client.close()

    def _ended(self, stop: Event) -> bool:
        return stop.is_set() or self._client.closed.is_set()

    def _path(self, lease: Lease) -> str:
        return self._subnets + lease.key

    def _list(self, stop: Event | None = None) -> _Listing:
        first = self._subnets.encode()
        reply = self._client.call("range", rpc_pb2.RangeRequest(key=first, range_end=_after(first)), stop)
        leases: list[Lease] = []
        unreadable: list[Lease] = []
        for kv in reply.kvs:
            lease, readable = self._lease(kv)
            if lease is not None:
                (leases if readable else unreadable).append(lease)
        return _Listing(reply.header.revision, tuple(leases), tuple(unreadable))

    def _lease(self, kv: Any) -> tuple[Lease | None, bool]:
        """The lease of one key, and whether its value could be read (if not, it has no attributes).

        A key that names no subnet is no lease. What cannot be read is reported once.
        """
        try:
            subnet, subnet6 = parse_subnet_key(kv.key.decode("utf-8", "replace"))
        except ValueError as exc:
            self._report(kv.key, exc)
            return None, False
        try:
            attrs = Attributes.decode(kv.value)
        except ValueError as exc:
            self._report(kv.key, exc)
            return Lease(subnet, subnet6, Attributes(), revision=kv.mod_revision), False
        self._reported.discard(kv.key)
        return Lease(subnet, subnet6, attrs, revision=kv.mod_revision), True

    def _report(self, key: bytes, problem: Exception) -> None:
        if key not in self._reported:
            self._reported.add(key)
            log.warning("lease-unreadable key=%r problem=%r remedy='delete or repair it'", key, str(problem))

    def _carry_out(self, decision: allocate.Decision, attrs: Attributes) -> Lease | None:
        """The lease as stored, or None if another node was faster."""
        match decision:
            case allocate.Keep(lease):
                try:
                    return self._rewrite(replace(lease, attrs=attrs))
                except LeaseLost:
                    return None
            case allocate.Create(subnet, subnet6, drop, note):
                if note:
                    log.warning("previous-subnet-unused store=etcd reason=%s", note)
                return self._write(Lease(subnet, subnet6, attrs), 0, False, drop)

    def _rewrite(self, lease: Lease) -> Lease | None:
        """Write our lease over what is there now; None if that changed meanwhile. Raises LeaseLost."""
        kvs = self._client.call("range", rpc_pb2.RangeRequest(key=self._path(lease).encode())).kvs
        others: tuple[Lease, ...] = ()
        if kvs:
            found, readable = self._lease(kvs[0])
            if found is not None and readable:
                others = (found,)
            revision, reserved = kvs[0].mod_revision, kvs[0].lease == 0
        else:
            others, revision, reserved = self._list().taken, 0, False
        allocate.require_ours(lease, others, f"etcd under {self._subnets}")
        return self._write(lease, revision, reserved)

    def _write(self, lease: Lease, revision: int, reserved: bool, drop: Sequence[Lease] = ()) -> Lease | None:
        """Put the lease if its key still has `revision`, and delete those in `drop`; None if it has not."""
        key, now = self._path(lease).encode(), self._clock()
        etcd_lease, ttl_s = 0, 0
        if not reserved:
            grant = self._client.call("grant", rpc_pb2.LeaseGrantRequest(TTL=LEASE_TTL_S))
            etcd_lease, ttl_s = grant.ID, grant.TTL
        put = rpc_pb2.PutRequest(key=key, value=lease.attrs.encode().encode(), lease=etcd_lease)
        old = [(self._path(unfit).encode(), unfit.revision) for unfit in drop]
        deletes = [rpc_pb2.DeleteRangeRequest(key=path) for path, _ in old]
        request = rpc_pb2.TxnRequest(
            compare=[_at_revision(path, expected) for path, expected in [(key, revision), *old]],
            success=[
                *(rpc_pb2.RequestOp(request_delete_range=delete) for delete in deletes),
                rpc_pb2.RequestOp(request_put=put),
            ],
            failure=[rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=key))],
        )
        try:
            reply = self._client.call("txn", request)
        except _Refused:
            self._revoke(etcd_lease)
            raise
        lease = replace(lease, expires_s=0.0 if reserved else now + ttl_s)
        if reply.succeeded:
            return replace(lease, revision=reply.header.revision)
        found = reply.responses[0].response_range.kvs
        if etcd_lease and found and found[0].lease == etcd_lease:
            # An attempt on another endpoint had no answer in time, but was applied.
            return replace(lease, revision=found[0].mod_revision)
        self._revoke(etcd_lease)
        return None

    def _revoke(self, etcd_lease: int) -> None:
        if etcd_lease:
            with suppress(StoreUnavailable):  # nothing hangs on it, and it ends by itself
                self._client.call("revoke", rpc_pb2.LeaseRevokeRequest(ID=etcd_lease))

    def _follow(self, revision: int, stop: Event) -> Iterator[Update]:
        """Yield changes from `revision` on; ends when the leases must be listed again."""
        first = self._subnets.encode()
        create = rpc_pb2.WatchCreateRequest(
            key=first, range_end=_after(first), start_revision=revision, progress_notify=True
        )
        with closing(self._client.stream(rpc_pb2.WatchRequest(create_request=create), stop)) as stream:
            deadline = time.monotonic() + CALL_DEADLINE_S
            created = False
            while not self._ended(stop):
                try:
                    response = stream.receive(POLL_S)
                except Empty:
                    if time.monotonic() < deadline:
                        continue
                    if not created:
                        raise StoreUnavailable(
                            f"etcd at {self._client.urls} began no watch within {CALL_DEADLINE_S:.0f} s"
                        ) from None
                    return
                created, deadline = True, time.monotonic() + SILENCE_S
                if response.compact_revision:
                    return
                if response.canceled:
                    raise StoreUnavailable(f"etcd ended the watch: {response.cancel_reason or 'no reason'}")
                changes = self._changes(response.events)
                if changes:
                    yield changes

    def _changes(self, events: Sequence[Any]) -> tuple[Change, ...]:
        changes: list[Change] = []
        for event in events:
            if event.type == kv_pb2.Event.DELETE:
                self._reported.discard(event.kv.key)
                with suppress(ValueError):  # a key that named no subnet was no lease either
                    subnets = parse_subnet_key(event.kv.key.decode("utf-8", "replace"))
                    changes.append(Change(subnet_key(*subnets), None))
                continue
            lease, readable = self._lease(event.kv)
            if lease is not None and readable:
                changes.append(Change(lease.key, lease))
        return tuple(changes)


@dataclass(frozen=True, slots=True)
class _Listing:
    """All leases at one revision; `unreadable` are those whose value could not be read."""

    revision: int
    leases: tuple[Lease, ...]
    unreadable: tuple[Lease, ...]

    @property
    def taken(self) -> tuple[Lease, ...]:
        return self.leases + self.unreadable


def join(prefix: str, name: str) -> str:
    """The key `name` under `prefix`, cleaned as Go's path.Join does."""
    path = posixpath.normpath("/".join(part for part in (prefix, name) if part))
    return "/" + path.lstrip("/") if path.startswith("/") else path


def _after(prefix: bytes) -> bytes:
    """The end of the range of keys that begin with `prefix` (which does not end in 0xff)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _at_revision(key: bytes, revision: int) -> Any:
    return rpc_pb2.Compare(
        key=key, target=rpc_pb2.Compare.MOD, result=rpc_pb2.Compare.EQUAL, mod_revision=revision
    )


@dataclass(frozen=True, slots=True)
class _Credentials:
    """TLS material, read and checked once."""

    given: bool
    channel: Any

    @classmethod
    def load(cls, keyfile: str, certfile: str, cafile: str) -> _Credentials:
        if bool(keyfile) != bool(certfile):
            have, lack = ("keyfile", "certfile") if keyfile else ("certfile", "keyfile")
            raise ConfigError(
                f"--etcd-{have}={keyfile or certfile} is given without --etcd-{lack}; give both or neither"
            )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if cafile:
                context.load_verify_locations(cafile)
            if certfile:
                context.load_cert_chain(certfile, keyfile, password="")
            ca, key, certificate = (Path(f).read_bytes() if f else None for f in (cafile, keyfile, certfile))
        except (OSError, ssl.SSLError) as exc:
            files = ", ".join(f for f in (cafile, keyfile, certfile) if f)
            raise ConfigError(f"cannot use the etcd TLS files {files}: {exc}; PEM files are needed") from exc
        return cls(bool(cafile or certfile), grpc.ssl_channel_credentials(ca, key, certificate))


class _Member:
    """One etcd endpoint: its channel and the calls that we make."""

    def __init__(self, url: str, credentials: _Credentials) -> None:
        self.url = url
        self.channel = _channel(url, credentials)
        kv = rpc_pb2_grpc.KVStub(self.channel)
        leases = rpc_pb2_grpc.LeaseStub(self.channel)
        self.range = kv.Range
        self.txn = kv.Txn
        self.grant = leases.LeaseGrant
        self.revoke = leases.LeaseRevoke
        self.watch = rpc_pb2_grpc.WatchStub(self.channel).Watch
        self.authenticate = rpc_pb2_grpc.AuthStub(self.channel).Authenticate


def _channel(url: str, credentials: _Credentials) -> Any:
    parts = urlsplit(url if "://" in url else f"//{url}")
    try:
        usable = parts.scheme in ("", "http", "https") and parts.hostname and parts.port
    except ValueError:
        usable = False
    if not usable or parts.path not in ("", "/"):
        raise ConfigError(f"--etcd-endpoints: {url!r} is no endpoint, such as http://127.0.0.1:2379")
    if parts.scheme == "https" or (not parts.scheme and credentials.given):
        return grpc.secure_channel(parts.netloc, credentials.channel, _CHANNEL_OPTIONS)
    return grpc.insecure_channel(parts.netloc, _CHANNEL_OPTIONS)


class _Client:
    """Calls with a deadline on whichever endpoint answers, with a token if there is a user."""

    def __init__(
        self, endpoints: Sequence[str], credentials: _Credentials, username: str, password: str
    ) -> None:
        if not endpoints:
            raise ConfigError("--etcd-endpoints is empty; give at least one, such as http://127.0.0.1:2379")
        self.urls = ",".join(endpoints)
        self.closed = Event()
        self._members = [_Member(url, credentials) for url in endpoints]
        self._first = 0
        self._username, self._password = username, password
        self._token: str | None = None

    def close(self) -> None:
        self.closed.set()
        for member in self._members:
            member.channel.close()

    def call(self, what: str, request: Any, stop: Event | None = None) -> Any:
        """The answer to a `_Member` call from the first endpoint that gives one.

        Takes at most `CALL_DEADLINE_S` per endpoint, and ends soon after `stop` is set. Raises
        StoreUnavailable.
        """
        first = self._first
        for member in self._members[first:] + self._members[:first]:
            try:
                return self._ask(member, what, request, stop)
            except grpc.RpcError as exc:
                error = exc
            if error.code() not in _UNREACHABLE:
                break
            self._leave(member)
        raise self._explained(error)

    def stream(self, request: Any, stop: Event) -> _Stream:
        """Open a watch on the endpoint that answered last."""
        member = self._members[self._first]
        try:
            metadata = self._metadata(member, stop)
        except grpc.RpcError as exc:
            raise self._explained(exc) from exc

        def failed(exc: grpc.RpcError) -> StoreUnavailable:
            self._leave(member)
            return self._explained(exc)

        try:
            return _Stream(member, request, metadata, failed)
        except ValueError:  # gRPC's answer to a call on a closed channel
            raise StoreUnavailable(_CLOSED) from None

    def _leave(self, member: _Member) -> None:
        """Begin with the next endpoint from now on, unless another thread saw to that."""
        if self._members[self._first] is member:
            self._first = (self._first + 1) % len(self._members)

    def _ask(self, member: _Member, what: str, request: Any, stop: Event | None) -> Any:
        try:
            return self._send(member, what, request, stop, self._metadata(member, stop))
        except grpc.RpcError as exc:
            if not self._username or not any(text in (exc.details() or "") for text in _STALE_TOKEN):
                raise
        self._token = None
        return self._send(member, what, request, stop, self._metadata(member, stop))

    def _metadata(self, member: _Member, stop: Event | None) -> tuple[tuple[str, str], ...]:
        if not self._username:
            return ()
        token = self._token
        if token is None:
            request = rpc_pb2.AuthenticateRequest(name=self._username, password=self._password)
            try:
                token = str(self._send(member, "authenticate", request, stop, ()).token)
            except grpc.RpcError as exc:
                if "authentication is not enabled" not in (exc.details() or ""):
                    raise
                token = ""
            self._token = token
        return (("token", token),) if token else ()

    def _send(
        self,
        member: _Member,
        what: str,
        request: Any,
        stop: Event | None,
        metadata: tuple[tuple[str, str], ...],
    ) -> Any:
        try:
            future = getattr(member, what).future(request, timeout=CALL_DEADLINE_S, metadata=metadata)
            while True:
                try:
                    return future.result(timeout=POLL_S)
                except grpc.FutureTimeoutError:
                    if stop is not None and stop.is_set():
                        future.cancel()
        except (grpc.FutureCancelledError, ValueError) as exc:
            if isinstance(exc, ValueError) and not self.closed.is_set():
                raise  # else it is gRPC's answer to a call on a closed channel
            raise StoreUnavailable(_CLOSED) from None

    def _explained(self, exc: grpc.RpcError) -> StoreUnavailable:
        code, details = exc.code(), " ".join((exc.details() or "").split())
        answer = f"{code.name}: {details}"
        if code in _UNREACHABLE:
            return StoreUnavailable(f"etcd at {self.urls} does not answer: {answer}")
        if "authentication failed" in details:
            return _Refused(
                f"etcd at {self.urls} refuses user {self._username!r}: {answer};"
                " check --etcd-username and --etcd-password"
            )
        kind = _Refused if code in _REFUSALS else StoreUnavailable
        return kind(f"etcd at {self.urls} refuses the request: {answer}")


class _Stream:
    """One watch. A thread reads it into a queue, because gRPC's iterator cannot be waited on with a limit."""

    def __init__(
        self,
        member: _Member,
        request: Any,
        metadata: tuple[tuple[str, str], ...],
        failed: Callable[[grpc.RpcError], StoreUnavailable],
    ) -> None:
        self._failed = failed
        self._requests: SimpleQueue[Any] = SimpleQueue()
        self._requests.put(request)
        self._responses: SimpleQueue[Any] = SimpleQueue()
        # The stream of requests stays open until `close`: etcd ends a watch whose client has nothing to say.
        self._call = member.watch(iter(self._requests.get, None), metadata=(("hasleader", "true"), *metadata))
        self._reader = Thread(target=self._read, name="etcd-watch", daemon=True)
        self._reader.start()

    def receive(self, timeout_s: float) -> Any:
        """The next response; raises queue.Empty after `timeout_s`, StoreUnavailable at the stream's end."""
        response = self._responses.get(timeout=timeout_s)
        if response is None:
            raise StoreUnavailable("etcd closed the watch")
        if isinstance(response, grpc.RpcError):
            raise self._failed(response)
        return response

    def close(self) -> None:
        self._call.cancel()
        self._requests.put(None)
        self._reader.join()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._responses.put(response)
            self._responses.put(None)
        except grpc.RpcError as exc:
            self._responses.put(exc)
