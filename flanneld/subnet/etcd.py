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

Decision: a new lease is looked at together with all others that appeared since the subnets were chosen,
in the very transaction that writes it. Its key guards both subnets of a dual-stack lease only as a pair:
another node that chose one of them beside another companion wrote another key. The later of the two
takes its lease back and chooses again; upstream routes one subnet to two nodes.

Decision: `expires_s` is known for leases that `acquire` and `renew` return; in `stored` and `watch` it
is 0, because etcd wants a query per key for it and nobody needs it: etcd itself deletes what expires.

Decision: the scheme of an endpoint decides about TLS: `https` verifies against the CA file, or against
gRPC's built-in roots without one, and shows the client certificate if there is one; `http` never does
TLS; without a scheme it is TLS if any of the three files is given. Upstream ignores a CA file alone.

Decision: what comes once per lease has a fast path of its own: the answer to a range request is decoded
here (the generated code takes four times as long, in pure Python), and a key and a value that are exactly
as flannel writes them are taken apart by a pattern. Everything else goes through the general parsers, and
a test holds the two against each other. With 5,000 leases a listing costs 0.06 CPU seconds instead of 0.17.
"""

from __future__ import annotations

import os
import posixpath
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from queue import Empty, SimpleQueue
from random import SystemRandom
from socket import AF_INET, inet_pton
from threading import Event, Thread
from typing import Any, NamedTuple
from urllib.parse import urlsplit

# gRPC reads these when it is loaded. Its fork handlers would make every child that we start wait for
# its threads; its C core writes to stderr what we raise as errors.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc._common
from etcd3.etcdrpc import kv_pb2, rpc_pb2, rpc_pb2_grpc

from cni.errors import ConfigError, LeaseLost, StoreUnavailable
from flanneld.config import DEFAULT_NETCONF, NetConf, parse_netconf, validate
from flanneld.lease import Attributes, Change, Lease, Snapshot, Update, parse_subnet_key, subnet_key
from flanneld.log import V2, logger
from flanneld.subnet import allocate
from flanneld.subnet.manager import LEASE_TTL_S

# gRPC's waits look up ten times a second, for signals that only the main thread gets; ours wait in others.
grpc._common.MAXIMUM_WAIT_TIMEOUT = 10.0

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

    def public_ips(self) -> tuple[str, str]:
        """Nothing: only Kubernetes keeps addresses of nodes for the operator."""
        return "", ""

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
            lease = self._carry_out(decision, attrs, listing.revision)
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

    def complete(self, lease: Lease) -> None:
        """Nothing: nobody asks this store whether the node is up."""

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
        return _Listing(reply.revision, tuple(leases), tuple(unreadable))

    def _lease(self, kv: Any) -> tuple[Lease | None, bool]:
        """The lease of one key, and whether its value could be read (if not, it has no attributes).

        A key that names no subnet is no lease. What cannot be read is reported once.
        """
        try:
            subnet, subnet6 = parse_key(kv.key)
        except ValueError as exc:
            self._report(kv.key, exc)
            return None, False
        try:
            attrs = parse_value(kv.value)
        except ValueError as exc:
            self._report(kv.key, exc)
            return Lease(subnet, subnet6, Attributes(), revision=kv.mod_revision), False
        self._reported.discard(kv.key)
        return Lease(subnet, subnet6, attrs, revision=kv.mod_revision), True

    def _report(self, key: bytes, problem: Exception) -> None:
        if key not in self._reported:
            self._reported.add(key)
            logger.warning(
                "lease-unreadable key=%r problem=%r remedy='delete or repair it'", key, str(problem)
            )

    def _carry_out(self, decision: allocate.Decision, attrs: Attributes, since: int) -> Lease | None:
        """The lease as stored, or None if another node was faster. The decision is as of revision `since`."""
        match decision:
            case allocate.Keep(lease):
                try:
                    return self._rewrite(replace(lease, attrs=attrs), lease.attrs)
                except LeaseLost:
                    return None
            case allocate.Create(subnet, subnet6, drop, note):
                if note:
                    logger.warning("previous-subnet-unused store=etcd reason=%s", note)
                return self._write(Lease(subnet, subnet6, attrs), 0, False, drop, since)

    def _rewrite(self, lease: Lease, before: Attributes | None = None) -> Lease | None:
        """Write our lease over what is there now; None if that changed meanwhile. Raises LeaseLost.

        What is there is ours if it names our public IP, or says what we know to have written `before`.
        """
        kvs = self._client.call("range", rpc_pb2.RangeRequest(key=self._path(lease).encode())).kvs
        others: tuple[Lease, ...] = ()
        since = 0
        if kvs:
            found, readable = self._lease(kvs[0])
            if found is not None and readable and found.attrs != before:
                others = (found,)
            revision, reserved = kvs[0].mod_revision, kvs[0].lease == 0
        else:
            listing = self._list()
            others, revision, reserved, since = listing.taken, 0, False, listing.revision
        allocate.require_ours(lease, others, f"etcd under {self._subnets}")
        return self._write(lease, revision, reserved, (), since)

    def _write(
        self, lease: Lease, revision: int, reserved: bool, drop: Sequence[Lease], since: int
    ) -> Lease | None:
        """Put the lease if its key still has `revision`, and delete those in `drop`; None if it has not.

        None as well if another node took one of the subnets after revision `since` (0: it was ours before).
        """
        key, now = self._path(lease).encode(), self._clock()
        etcd_lease, ttl_s = 0, 0
        if not reserved:
            grant = self._client.call("grant", rpc_pb2.LeaseGrantRequest(TTL=LEASE_TTL_S))
            etcd_lease, ttl_s = grant.ID, grant.TTL
        put = rpc_pb2.PutRequest(key=key, value=lease.attrs.encode().encode(), lease=etcd_lease)
        old = [(self._path(unfit).encode(), unfit.revision) for unfit in drop]
        first = self._subnets.encode()
        newer = rpc_pb2.RangeRequest(key=first, range_end=_after(first), min_create_revision=since + 1)
        look = [rpc_pb2.RequestOp(request_range=newer)] if since else []
        request = rpc_pb2.TxnRequest(
            compare=[_at_revision(path, expected) for path, expected in [(key, revision), *old]],
            success=[*(_delete(path) for path, _ in old), rpc_pb2.RequestOp(request_put=put), *look],
            failure=[rpc_pb2.RequestOp(request_range=rpc_pb2.RangeRequest(key=key)), *look],
        )
        try:
            reply = self._client.call("txn", request)
        except _Refused:
            self._revoke(etcd_lease)
            raise
        revision = _revision_written(reply, etcd_lease)
        if not revision:
            self._revoke(etcd_lease)
            return None
        lease = replace(lease, expires_s=0.0 if reserved else now + ttl_s, revision=revision)
        if since and self._overtaken(lease, reply.responses[-1].response_range.kvs):
            # The key goes with its etcd lease; should that fail, the caller must hear of it.
            self._client.call("revoke", rpc_pb2.LeaseRevokeRequest(ID=etcd_lease))
            return None
        return lease

    def _overtaken(self, lease: Lease, newer: Sequence[Any]) -> bool:
        """Whether one of the `newer` keys, created before ours, has a subnet of our lease."""
        earlier = (self._lease(kv)[0] for kv in newer if kv.create_revision < lease.revision)
        return allocate.taker(lease, (found for found in earlier if found is not None)) is not None

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
                    changes.append(Change(subnet_key(*parse_key(event.kv.key)), None))
                continue
            lease, readable = self._lease(event.kv)
            if lease is not None and readable:
                changes.append(Change(lease.key, lease))
        for change in changes:
            logger.log(V2, "lease-%s key=%s", "written" if change.lease else "gone", change.key)
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


class KeyValue(NamedTuple):
    """What we need of a key; `lease` is 0 where it has no etcd lease."""

    key: bytes
    value: bytes
    mod_revision: int
    lease: int


class RangeReply(NamedTuple):
    """The answer to a range request: the keys, and the store's revision at that moment."""

    revision: int
    kvs: list[KeyValue]


def decode_range(data: bytes) -> RangeReply:
    """Decode etcd's RangeResponse (api/etcdserverpb/rpc.proto, api/mvccpb/kv.proto); raises ValueError."""
    revision, kvs = 0, []
    try:
        for number, field in _fields(data):
            if number == 1:
                revision = dict(_fields(field)).get(3, 0)
            elif number == 2:
                kv = dict(_fields(field))
                kvs.append(KeyValue(kv.get(1, b""), kv.get(5, b""), kv.get(3, 0), kv.get(6, 0)))
    except IndexError:
        raise ValueError("etcd's answer ends in the middle of a field") from None
    return RangeReply(revision, kvs)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number (below 16) and value of each field of a protobuf message: an unsigned integer, or bytes."""
    at, end = 0, len(data)
    while at < end:
        tag, at = data[at], at + 1
        value, at = data[at], at + 1
        if value > 127:
            value, at = _varint(data, at - 1)
        if tag & 0x87 == 2 and at + value <= end:
            yield tag >> 3, data[at : at + value]
            at += value
        elif tag & 0x87 == 0:
            yield tag >> 3, value
        else:
            raise ValueError(f"etcd's answer has a field with tag {tag}, of unknown type or beyond its end")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer that begins at `at`, seven bits to a byte, the lowest first; and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


_KEY = re.compile(rb".*/([0-9.]+)-([0-9]{1,2})", re.DOTALL)
# Strings without escapes, and whole numbers that a float64 holds: the general parser leaves them as they are.
_TEXT = rb'[^"\\<>&\x00-\x1f\x80-\xff]*'
_NUMBER = rb"(?:0|[1-9][0-9]{0,14})"
_DATA = rb'\{"VNI":%b,"VtepMAC":"%b"\}|\{"PublicKey":"%b","Port":%b\}' % (_NUMBER, _TEXT, _TEXT, _NUMBER)
_VALUE = re.compile(
    rb'\{"PublicIP":"([0-9.]+)","PublicIPv6":(?:null|"([0-9a-f:]+)")(?:,"BackendType":"(%b)")?'
    rb'(?:,"BackendData":(%b))?(?:,"BackendV6Data":(%b))?\}' % (_TEXT, _DATA, _DATA)
)


def parse_key(key: bytes) -> tuple[IPv4Network, IPv6Network | None]:
    """The subnets that a key names; raises ValueError."""
    plain = _KEY.fullmatch(key)
    if plain is not None and int(plain[2]) <= 31:
        with suppress(OSError):  # not four numbers: the general parser says what is wrong
            address = inet_pton(AF_INET, plain[1].decode())
            return IPv4Network((address, int(plain[2])), strict=False), None
    return parse_subnet_key(key.decode("utf-8", "replace"))


def parse_value(value: bytes) -> Attributes:
    """The attributes that a value holds; raises ValueError."""
    plain = _VALUE.fullmatch(value)
    if plain is not None:
        public_ip, public_ipv6, kind, data, v6_data = (text.decode() for text in plain.groups(b""))
        with suppress(OSError):
            v4 = IPv4Address(inet_pton(AF_INET, public_ip))
            v6 = IPv6Address(public_ipv6) if public_ipv6 else None
            return Attributes(v4 if int(v4) else None, v6, kind, data, v6_data)
    return Attributes.decode(value)


def join(prefix: str, name: str) -> str:
    """The key `name` under `prefix`, cleaned as Go's path.Join does."""
    path = posixpath.normpath("/".join(part for part in (prefix, name) if part))
    return "/" + path.lstrip("/") if path.startswith("/") else path


def _after(prefix: bytes) -> bytes:
    """The end of the range of keys that begin with `prefix` (which does not end in 0xff)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _revision_written(reply: Any, etcd_lease: int) -> int:
    """At which revision a transaction has put our key; 0 if it has not."""
    if reply.succeeded:
        return int(reply.header.revision)
    found = reply.responses[0].response_range.kvs
    if etcd_lease and found and found[0].lease == etcd_lease:
        # An attempt on another endpoint had no answer in time, but was applied.
        return int(found[0].mod_revision)
    return 0


def _delete(key: bytes) -> Any:
    return rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key))


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
        self.range = self.channel.unary_unary(
            "/etcdserverpb.KV/Range",
            request_serializer=rpc_pb2.RangeRequest.SerializeToString,
            response_deserializer=decode_range,
        )
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
