"""Leases as values: who owns which subnet, and how to reach it.

A lease names a subnet (IPv4, IPv6 or both) and carries the attributes that peers need to send
packets there. `LeaseSet` is the folded view of the store: a snapshot or a list of changes in, the
next value out. Encodings are upstream's, to the byte (etcd value and key, see `flanneld.subnet.etcd`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from cni.spec import gojson


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a node tells its peers. `backend_data` is JSON text as published, empty when there is none."""

    public_ip: IPv4Address | None = None
    public_ipv6: IPv6Address | None = None
    backend_type: str = ""
    backend_data: str = ""
    backend_v6_data: str = ""

    def encode(self) -> str:
        """The etcd value: compact JSON in upstream's field order."""
        out: dict[str, object] = {
            "PublicIP": str(self.public_ip or IPv4Address(0)),
            "PublicIPv6": str(self.public_ipv6) if self.public_ipv6 else None,
        }
        if self.backend_type:
            out["BackendType"] = self.backend_type
        if self.backend_data:
            out["BackendData"] = gojson.loads(self.backend_data)
        if self.backend_v6_data:
            out["BackendV6Data"] = gojson.loads(self.backend_v6_data)
        return gojson.dumps(out, sort=False)

    @classmethod
    def decode(cls, text: str | bytes) -> Attributes:
        """Parse an etcd value; raises ValueError. Member names match without regard to case."""
        record = gojson.load_object(text)
        if gojson.has(record, "PublicIP") and gojson.member(record, "PublicIP") is None:
            raise ValueError("PublicIP must not be null")
        public_ip = gojson.typed(record, "PublicIP", str, "0.0.0.0")  # noqa: S104 - upstream's "unset"
        public_ipv6 = gojson.typed(record, "PublicIPv6", str, "")
        v4 = IPv4Address(public_ip)
        return cls(
            public_ip=v4 if int(v4) else None,
            public_ipv6=IPv6Address(public_ipv6) if public_ipv6 else None,
            backend_type=gojson.typed(record, "BackendType", str, ""),
            backend_data=_raw(gojson.member(record, "BackendData")),
            backend_v6_data=_raw(gojson.member(record, "BackendV6Data")),
        )


def _raw(value: object) -> str:
    return "" if value is None else gojson.dumps(value, sort=False)


@dataclass(frozen=True, slots=True)
class Lease:
    """One node's subnet. `expires_s` is Unix time, 0 when the lease never ends; `revision` the store's."""

    subnet: IPv4Network | None
    subnet6: IPv6Network | None
    attrs: Attributes
    expires_s: float = 0.0
    revision: int = 0
    key: str = field(init=False, compare=False, repr=False)
    """The lease's name in every store: `10.5.34.0-24`, or `10.5.34.0-24&fd00:5:34::-64`."""

    def __post_init__(self) -> None:
        # Asked for many times in each pass over all leases, so it is made once.
        object.__setattr__(self, "key", subnet_key(self.subnet, self.subnet6))


_KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([a-f0-9:]+)-(\d+))?\Z")


def subnet_key(subnet: IPv4Network | None, subnet6: IPv6Network | None) -> str:
    """Encode subnets as upstream does in etcd keys."""
    parts = [f"{n.network_address}-{n.prefixlen}" for n in (subnet, subnet6) if n is not None]
    return "&".join(parts)


def parse_subnet_key(key: str) -> tuple[IPv4Network, IPv6Network | None]:
    """Read the subnets at the end of a store key; raises ValueError when it names none.

    As upstream, the IPv4 prefix length must fit five bits (0..31), the IPv6 one seven (0..127).
    """
    match = _KEY.search(key)
    if match is None:
        raise ValueError(f"{key!r} does not end in SUBNET-LEN, such as 10.5.34.0-24")
    address, length, address6, length6 = match.groups()
    if int(length) > 31 or int(length6 or 0) > 127:
        raise ValueError(f"{key!r} has a prefix length out of range")
    subnet = IPv4Network(f"{address}/{length}", strict=False)
    return subnet, IPv6Network(f"{address6}/{length6}", strict=False) if address6 else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every lease of the store at one moment."""

    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """One lease written (`lease` given) or gone (`lease` is None)."""

    key: str
    lease: Lease | None


Update = Snapshot | tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class LeaseSet:
    """All known leases by key, own included."""

    by_key: Mapping[str, Lease] = field(default_factory=dict)

    def fold(self, update: Update) -> LeaseSet:
        """The set after a snapshot (which replaces everything) or a list of changes, in order."""
        if isinstance(update, Snapshot):
            return LeaseSet({lease.key: lease for lease in update.leases})
        leases = dict(self.by_key)
        for change in update:
            if change.lease is None:
                leases.pop(change.key, None)
            else:
                leases[change.key] = change.lease
        return LeaseSet(leases)

    def peers(self, own: Lease) -> Iterable[Lease]:
        """Every lease but our own."""
        return (lease for key, lease in self.by_key.items() if key != own.key)
