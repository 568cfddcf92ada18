"""Kubernetes nodes as leases: what podCIDRs and flannel's annotations of Node objects say.

Keys, values and the bytes of patches are upstream's (pkg/subnet/kube), so that nodes of both kinds are
each other's peers. Nothing here talks to the API; `flanneld.subnet.kube` does.

Decision: a range belongs to one node. Of two nodes whose podCIDRs overlap, the one in the table keeps
its range; of two new ones the older, by creation time and then by name. The other is reported with
both names and gets the range when the holder goes. Our own node never yields. Upstream lets the last
event win, so that two nodes take each other's traffic in turn.

Decision: podCIDRs must be one range per family, which is also what the API server enforces. Upstream
takes the last of a family for its own node and the first for its peers: two answers for one node.

Decision: with both families enabled, a peer that publishes only one is reached by that one (upstream
skips it), and a family that cannot be read does not cost the other.

Decision: a change of either family, of the podCIDR, or the loss of the annotation is a change of the
lease. Upstream sees a dual-stack change only when both families changed, and the others not at all.

Decision: a peer's range must lie within the cluster's network, as our own must: a podCIDR of 0.0.0.0/0
would take the traffic of the whole node.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Generic, NamedTuple, TypeVar

from cni.errors import ConfigError, StoreUnavailable
from cni.spec import gojson
from flanneld.config import NetConf, parse_cidr
from flanneld.lease import Attributes, Change, Lease

NetworkT = TypeVar("NetworkT", IPv4Network, IPv6Network)
AddressT = TypeVar("AddressT", IPv4Address, IPv6Address)

_PREFIX = re.compile(r"(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?\Z")


def annotation_prefix(flag: str) -> str:
    """What the keys of all annotations begin with, for a value of --kube-annotation-prefix.

    Upstream's rule (newAnnotations), which looks at the end of the prefix only. Raises ConfigError.
    """
    prefix = flag if "/" in flag else f"{flag}/"
    if not prefix.endswith(("/", "-")):
        prefix += "-"
    if prefix.count("/") > 1 or not _PREFIX.search(prefix):
        raise ConfigError(
            f"--kube-annotation-prefix={flag} makes no annotation keys: it must be a domain of at least two"
            " lower-case labels, with one more word after a slash if wanted, such as"
            " flannel.alpha.coreos.com or flannel.alpha.coreos.com/blue"
        )
    return prefix


class Annotations(NamedTuple):
    """Flannel's annotations of one node, as written; None where there is none."""

    kube_subnet_manager: str | None = None
    backend_type: str | None = None
    backend_data: str | None = None
    backend_v6_data: str | None = None
    public_ip: str | None = None
    public_ipv6: str | None = None
    node_public_ip: str | None = None
    node_public_ipv6: str | None = None
    public_ip_overwrite: str | None = None
    public_ipv6_overwrite: str | None = None


NO_ANNOTATIONS = Annotations()


def annotation_keys(prefix: str) -> Mapping[str, str]:
    """The key of each field of `Annotations`."""
    return {name: prefix + name.replace("_", "-") for name in Annotations._fields}


@dataclass(frozen=True, slots=True)
class Node:
    """What is kept of a Node object. Equal nodes make equal leases.

    `created` is the API's time stamp (RFC 3339, UTC, so that its text sorts), `ready` whether the
    condition Ready is True.
    """

    name: str
    created: str = ""
    pod_cidrs: tuple[str, ...] = ()
    annotations: Annotations = NO_ANNOTATIONS
    ready: bool = field(default=False, compare=False)

    @property
    def managed(self) -> bool:
        """Whether a flannel daemon publishes this node's subnet."""
        return self.annotations.kube_subnet_manager == "true"

    @property
    def cidrs(self) -> str:
        return ", ".join(self.pod_cidrs)


def subnets(pod_cidrs: Sequence[str]) -> tuple[IPv4Network | None, IPv6Network | None]:
    """The ranges of a node, one per family at most, host bits masked off; raises ValueError."""
    v4: IPv4Network | None = None
    v6: IPv6Network | None = None
    for text in pod_cidrs:
        known, version = (v6, IPv6Network) if ":" in text else (v4, IPv4Network)
        if known is not None:
            raise ValueError(f"podCIDRs {', '.join(pod_cidrs)} hold two ranges of one family")
        if version is IPv6Network:
            v6 = parse_cidr(text, IPv6Network)
        else:
            v4 = parse_cidr(text, IPv4Network)
    return v4, v6


# ---- peers


class Reading(NamedTuple):
    """A node's lease, if it has one, and what is wrong with the node, empty if nothing is."""

    lease: Lease | None
    problem: str


@dataclass(frozen=True, slots=True)
class _Half(Generic[NetworkT, AddressT]):
    """One family of a lease."""

    subnet: NetworkT | None = None
    public_ip: AddressT | None = None
    data: str = ""


def read_lease(node: Node, config: NetConf) -> Reading:
    """The lease that a node publishes for the enabled families; never raises."""
    if not node.managed:
        return Reading(None, "")
    told = node.annotations
    problems: list[str] = []
    try:
        subnet, subnet6 = subnets(node.pod_cidrs)
    except ValueError as exc:
        return Reading(None, str(exc))
    v4: _Half[IPv4Network, IPv4Address] = _Half()
    v6: _Half[IPv6Network, IPv6Address] = _Half()
    if config.enable_ipv4:
        try:
            v4 = _half(subnet, config.network, told.public_ip, told.backend_data, IPv4Address)
        except ValueError as exc:
            problems.append(str(exc))
    if config.enable_ipv6:
        try:
            v6 = _half(subnet6, config.ipv6_network, told.public_ipv6, told.backend_v6_data, IPv6Address)
        except ValueError as exc:
            problems.append(str(exc))
    if v4.subnet is None and v6.subnet is None:
        return Reading(None, "; ".join(problems) or _nothing(node, config))
    attrs = Attributes(v4.public_ip, v6.public_ip, told.backend_type or "", v4.data, v6.data)
    return Reading(Lease(v4.subnet, v6.subnet, attrs), "; ".join(problems))


def _half(
    subnet: NetworkT | None,
    network: NetworkT | None,
    public_ip: str | None,
    data: str | None,
    version: type[AddressT],
) -> _Half[NetworkT, AddressT]:
    """One family; without a range or without a public IP it is not there. Raises ValueError."""
    if subnet is None or not public_ip:
        return _Half()
    address = _public_ip(public_ip, version)
    if address is None:
        return _Half()
    if network is None or not _within(subnet, network):
        raise ValueError(f"podCIDR {subnet} is outside of the network {network}")
    return _Half(subnet, address, _data(data))


def _public_ip(text: str, version: type[AddressT]) -> AddressT | None:
    """The address; None for upstream's "unset", 0.0.0.0. Raises ValueError for what no packet can reach."""
    name = "public-ip" if version is IPv4Address else "public-ipv6"
    try:
        # A zone, as in fe80::1%eth0, means something on one host only.
        address = version(text if "%" not in text else "")
    except ValueError:
        raise ValueError(f"annotation {name} is {_clipped(text)}, which is no such address") from None
    if address.is_multicast or address.is_loopback or address == IPv4Address("255.255.255.255"):
        raise ValueError(f"annotation {name} is {address}, which is no node's address")
    return None if address.is_unspecified else address


# What nests deeper may be read, but not written again.
_SHALLOW = 50


def _data(text: str | None) -> str:
    """Backend data as published, empty when there is none; raises ValueError unless it is JSON."""
    if not text or text == "null":
        return ""
    try:
        value = gojson.loads(text)
        if text.count("[") + text.count("{") > _SHALLOW:
            gojson.dumps(value)
    except gojson.GoJsonError as exc:
        raise ValueError(f"its backend data {_clipped(text)} is not JSON: {_clipped(str(exc))}") from None
    return text


def _clipped(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _nothing(node: Node, config: NetConf) -> str:
    families = [name for name, on in (("IPv4", config.enable_ipv4), ("IPv6", config.enable_ipv6)) if on]
    ip, ip6 = (_clipped(text or "") for text in (node.annotations.public_ip, node.annotations.public_ipv6))
    return (
        f"podCIDRs [{node.cidrs}], public-ip {ip} and public-ipv6 {ip6} make no complete"
        f" {' or '.join(families)} lease"
    )


def _within(inner: NetworkT, outer: NetworkT) -> bool:
    shift = outer.max_prefixlen - outer.prefixlen
    return (
        inner.prefixlen >= outer.prefixlen
        and int(inner.network_address) >> shift == int(outer.network_address) >> shift
    )


# ---- our own node


def stored_lease(node: Node) -> Lease | None:
    """What our own node published at an earlier start; None if nothing. What cannot be read is left out."""
    told = node.annotations
    if not (told.backend_data or told.backend_v6_data or told.public_ip or told.public_ipv6):
        return None
    attrs = Attributes(
        _lenient(told.public_ip, IPv4Address),
        _lenient(told.public_ipv6, IPv6Address),
        told.backend_type or "",
        _lenient_data(told.backend_data),
        _lenient_data(told.backend_v6_data),
    )
    try:
        return Lease(*subnets(node.pod_cidrs), attrs)
    except ValueError:
        return Lease(None, None, attrs)


def _lenient(text: str | None, version: type[AddressT]) -> AddressT | None:
    try:
        return _public_ip(text or "", version)
    except ValueError:
        return None


def _lenient_data(text: str | None) -> str:
    try:
        return _data(text)
    except ValueError:
        return ""


def own_subnets(node: Node, config: NetConf, source: str) -> tuple[IPv4Network | None, IPv6Network | None]:
    """The ranges of our own node for the enabled families; `source` names the network configuration.

    Raises StoreUnavailable while there is no podCIDR, and ConfigError for one that does not fit `config`.
    """
    if not node.pod_cidrs:
        raise StoreUnavailable(
            f"node {node.name} has no podCIDR: run kube-controller-manager with --allocate-node-cidrs=true"
            " and --cluster-cidr=RANGE (kubeadm init --pod-network-cidr=RANGE does both), or give it one"
            f" with: kubectl patch node {node.name} -p '{_example(config)}'"
        )
    try:
        subnet, subnet6 = subnets(node.pod_cidrs)
    except ValueError as exc:
        raise ConfigError(f"node {node.name}: {exc}; one range per enabled family is needed") from None
    return (
        _own_range(node, subnet, config.network, "", source) if config.enable_ipv4 else None,
        _own_range(node, subnet6, config.ipv6_network, "IPv6", source) if config.enable_ipv6 else None,
    )


def _own_range(
    node: Node, subnet: NetworkT | None, network: NetworkT | None, family: str, source: str
) -> NetworkT:
    if subnet is None:
        family = family or "IPv4"
        raise ConfigError(
            f"Enable{family} is true in {source}, but node {node.name} has only {node.cidrs} as podCIDRs:"
            f" give kube-controller-manager an {family} --cluster-cidr as well and let the node register"
            f" again, or set Enable{family} to false"
        )
    if network is None or not _within(subnet, network):
        raise ConfigError(
            f"podCIDR {subnet} of node {node.name} is outside of {family}Network {network} in {source}:"
            f" {family}Network must be what kube-controller-manager has as --cluster-cidr"
            " (kubeadm: --pod-network-cidr)"
        )
    return subnet


def _example(config: NetConf) -> str:
    """A patch that gives a node the second range of the network."""
    ranges = []
    for network, usual in ((config.network, 24), (config.ipv6_network, 64)):
        if network is not None:
            length = min(max(usual, network.prefixlen), network.max_prefixlen)
            size = 1 << (network.max_prefixlen - length)
            second = network.network_address + (size if length > network.prefixlen else 0)
            ranges.append(f"{second}/{length}")
    return gojson.dumps({"spec": {"podCIDR": ranges[0] if ranges else "RANGE", "podCIDRs": ranges}})


# Where upstream writes IPv6 annotations at all; ipip, udp and the rest know only IPv4.
_DUAL_STACK = ("vxlan", "wireguard", "host-gw", "extension")


def published(node: Node, attrs: Attributes) -> Annotations:
    """What the annotations of our own node must say; None for those that are left as they are.

    As upstream (AcquireLease): an overwrite takes the place of the public IP as it is written, a
    backend without data says `null`. Raises ConfigError for an overwrite that is no address.
    """
    told, kind = node.annotations, attrs.backend_type
    v4 = kind != "vxlan" or attrs.backend_data != ""
    v6 = attrs.public_ipv6 is not None and kind in _DUAL_STACK
    v6 = v6 and (attrs.backend_v6_data != "" or kind in ("host-gw", "extension"))
    # An extension without a start-up command has said nothing, which is not JSON's null.
    no_data = "" if kind == "extension" else "null"
    ip, ip6 = str(attrs.public_ip or IPv4Address(0)), str(attrs.public_ipv6)
    wanted = Annotations(kube_subnet_manager="true", backend_type=kind)
    if v4:
        overwrite = _overwrite(node, "public-ip-overwrite", told.public_ip_overwrite, IPv4Address)
        wanted = wanted._replace(backend_data=attrs.backend_data or no_data, public_ip=overwrite or ip)
    if v6:
        overwrite = _overwrite(node, "public-ipv6-overwrite", told.public_ipv6_overwrite, IPv6Address)
        wanted = wanted._replace(
            backend_v6_data=attrs.backend_v6_data or "null", public_ipv6=overwrite or ip6
        )
    return wanted


def _overwrite(node: Node, suffix: str, text: str | None, version: type[AddressT]) -> str:
    if text and _lenient(text, version) is None:
        family = "IPv4" if version is IPv4Address else "IPv6"
        raise ConfigError(
            f"annotation {suffix} of node {node.name} is {_clipped(text)}: it must be an {family} address,"
            " since it becomes the public IP that all peers send to"
        )
    return text or ""


def told(node: Node, wanted: Annotations) -> Node:
    """Our own node as it is once `wanted` is published."""
    pairs = zip(node.annotations, wanted, strict=True)
    return replace(node, annotations=Annotations(*(have if text is None else text for have, text in pairs)))


def annotations_patch(have: Annotations, wanted: Annotations, keys: Mapping[str, str]) -> str:
    """The strategic merge patch with the keys that differ, sorted; empty if none does."""
    changed = {
        keys[name]: text
        for name, text, old in zip(Annotations._fields, wanted, have, strict=True)
        if text is not None and text != old
    }
    return gojson.dumps({"metadata": {"annotations": changed}}) if changed else ""


CONDITION = "NetworkUnavailable"
REASON = "FlannelIsUp"
MESSAGE = "Flannel is running on this node"


def condition_patch(now: str) -> str:
    """The strategic merge patch that says the node's network is up; `now` is RFC 3339 in UTC."""
    condition = {
        "type": CONDITION,
        "status": "False",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
        "reason": REASON,
        "message": MESSAGE,
    }
    return gojson.dumps({"status": {"conditions": [condition]}}, sort=False)


class Rival(NamedTuple):
    """Another node that has published what is ours.

    It counts as `alive` while its kubelet says Ready. `published` tells whether we had published it, too.
    """

    problem: str
    alive: bool
    published: bool


def rivals(own: Node, lease: Lease, wanted: Annotations, others: Iterable[Node]) -> Iterator[Rival]:
    """The nodes whose podCIDR overlaps ours, or that publish our public IP; both names are in the text."""
    for node in others:
        if node.name == own.name or not node.managed:
            continue
        for ip, theirs, before in (
            (wanted.public_ip, node.annotations.public_ip, own.annotations.public_ip),
            (wanted.public_ipv6, node.annotations.public_ipv6, own.annotations.public_ipv6),
        ):
            if ip and ip == theirs and ip != "0.0.0.0":  # noqa: S104 - upstream's "none"
                text = f"public IP {ip} of node {own.name} is already that of node {node.name}"
                yield Rival(text, node.ready, own.managed and before == ip)
        try:
            theirs4, theirs6 = subnets(node.pod_cidrs)
        except ValueError:
            continue
        for ours, other in ((lease.subnet, theirs4), (lease.subnet6, theirs6)):
            if ours is not None and other is not None and _overlap(ours, other):
                text = f"podCIDR {ours} of node {own.name} overlaps podCIDR {other} of node {node.name}"
                yield Rival(text, node.ready, own.managed)


# ---- the table


class Event(NamedTuple):
    """One node written (`node` given) or gone (`node` is None)."""

    name: str
    node: Node | None


class Folded(NamedTuple):
    """What a fold changed: leases, and for whom `problem` is new (empty when one is over)."""

    changes: tuple[Change, ...]
    problems: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Known:
    """One node of the table. `lease` is what it publishes; `rival` is who holds its range, if not itself."""

    node: Node
    lease: Lease | None
    unreadable: str
    rival: str = ""

    @property
    def problem(self) -> str:
        if self.rival and self.lease is not None:
            return f"its podCIDR {self.node.cidrs} overlaps that of node {self.rival}, which had it first"
        return self.unreadable


class Table:
    """All nodes of a cluster, folded into leases whose ranges never overlap.

    A node that changes in nothing that matters to a lease costs one comparison; one that does costs
    log n. Only nodes that a flannel daemon manages are kept.
    """

    def __init__(self, config: NetConf, own: str) -> None:
        self._config = config
        self._own = own
        self._nodes: dict[str, _Known] = {}
        self._leases: dict[str, Lease] = {}
        self._ranges = (_Ranges(), _Ranges())
        self._waiting: set[str] = set()
        self._before: dict[str, Lease | None] = {}
        self._problems: dict[str, str] = {}

    @property
    def leases(self) -> tuple[Lease, ...]:
        return tuple(self._leases.values())

    @property
    def has_own(self) -> bool:
        """Whether our own node has a lease now."""
        known = self._nodes.get(self._own)
        return known is not None and known.lease is not None

    @property
    def nodes(self) -> dict[str, Node]:
        """The managed nodes by name, as a copy."""
        return {name: known.node for name, known in self._nodes.items()}

    def fold(self, events: Iterable[Event]) -> Folded:
        """Take in events, in order."""
        self._before, self._problems = {}, {}
        for name, node in events:
            self._take(name, node)
        return Folded(tuple(self._changes()), tuple(self._problems.items()))

    def replace(self, nodes: Iterable[Node]) -> Folded:
        """Take in a list of all nodes; those that are not in it are gone."""
        listed = {node.name: node for node in nodes}
        gone = [Event(name, None) for name in self._nodes if name not in listed]
        # Who holds a range keeps it, whatever its age; this is about the others.
        ordered = sorted(listed.values(), key=lambda node: (node.created, node.name))
        return self.fold([*gone, *(Event(node.name, node) for node in ordered)])

    def _changes(self) -> Iterator[Change]:
        """What differs from before."""
        for key, before in self._before.items():
            now = self._leases.get(key)
            if now != before:
                yield Change(key, now)

    def _take(self, name: str, node: Node | None) -> None:
        known = self._nodes.get(name)
        if node is not None and not node.managed:
            node = None
        if node == (known.node if known else None):
            return
        told = known.problem if known else ""
        freed = self._release(name, known)
        if node is None:
            del self._nodes[name]
            problem = ""
        else:
            known = self._nodes[name] = _Known(node, *read_lease(node, self._config))
            self._claim(known)
            problem = known.problem
        if problem != told:
            self._problems[name] = problem
        if self._waiting and (freed or name == self._own):
            self._promote()

    def _set(self, key: str, lease: Lease | None) -> None:
        self._before.setdefault(key, self._leases.get(key))
        if lease is None:
            self._leases.pop(key, None)
        else:
            self._leases[key] = lease

    def _release(self, name: str, known: _Known | None) -> bool:
        """Take a node's lease back; returns whether others may have its ranges now."""
        self._waiting.discard(name)
        if known is None or known.lease is None or known.rival:
            return False
        self._set(known.lease.key, None)
        if name == self._own:
            # Ours stay ours while our node is away: pods still use them.
            return False
        for ranges, subnet in self._parts(known.lease):
            ranges.remove(subnet)
        return True

    def _claim(self, known: _Known) -> None:
        lease, name = known.lease, known.node.name
        if lease is None:
            return
        if name == self._own:
            self._clear_way(lease)
        holder = next((held for ranges, subnet in self._parts(lease) for held in ranges.holders(subnet)), "")
        known.rival = holder
        if holder:
            self._waiting.add(name)
            return
        for ranges, subnet in self._parts(lease):
            ranges.add(subnet, name)
        self._set(lease.key, lease)

    def _clear_way(self, lease: Lease) -> None:
        """Give up the ranges that we had, and take from others what is ours now."""
        for ranges in self._ranges:
            ranges.discard(self._own)
        for ranges, subnet in self._parts(lease):
            for name in ranges.holders(subnet):
                loser = self._nodes[name]
                self._release(name, loser)
                loser.rival = self._own
                self._waiting.add(name)
                self._problems[name] = loser.problem

    def _promote(self) -> None:
        """Let the nodes that wait try again, in the order of their age."""
        waiting = [self._nodes[name] for name in self._waiting]
        for known in sorted(waiting, key=lambda k: (k.node.created, k.node.name)):
            told = known.problem
            self._waiting.discard(known.node.name)
            self._claim(known)
            if known.problem != told:
                self._problems[known.node.name] = known.problem

    def _parts(self, lease: Lease) -> Iterator[tuple[_Ranges, IPv4Network | IPv6Network]]:
        for ranges, subnet in zip(self._ranges, (lease.subnet, lease.subnet6), strict=True):
            if subnet is not None:
                yield ranges, subnet


class _Ranges:
    """Ranges of one family that do not overlap, and who holds each; looking one up takes log n."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._names: list[str] = []

    def holders(self, subnet: IPv4Network | IPv6Network) -> list[str]:
        """Who holds any part of `subnet`."""
        low, high = _bounds(subnet)
        return self._names[bisect_left(self._ends, low) : bisect_right(self._starts, high)]

    def add(self, subnet: IPv4Network | IPv6Network, name: str) -> None:
        low, high = _bounds(subnet)
        at = bisect_left(self._starts, low)
        self._starts.insert(at, low)
        self._ends.insert(at, high)
        self._names.insert(at, name)

    def remove(self, subnet: IPv4Network | IPv6Network) -> None:
        self._drop(bisect_left(self._starts, _bounds(subnet)[0]))

    def discard(self, name: str) -> None:
        """Remove what `name` holds, if it holds anything; linear."""
        if name in self._names:
            self._drop(self._names.index(name))

    def _drop(self, at: int) -> None:
        del self._starts[at], self._ends[at], self._names[at]


def _overlap(one: IPv4Network | IPv6Network, other: IPv4Network | IPv6Network) -> bool:
    """Whether two ranges of one family share an address."""
    (low, high), (other_low, other_high) = _bounds(one), _bounds(other)
    return low <= other_high and other_low <= high


def _bounds(subnet: IPv4Network | IPv6Network) -> tuple[int, int]:
    low = int(subnet.network_address)
    return low, low + (1 << (subnet.max_prefixlen - subnet.prefixlen)) - 1
