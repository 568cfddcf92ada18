"""Which subnet a node takes: the arithmetic that the stores without a central allocator share.

The rules are upstream's (pkg/subnet/etcd/local_manager.go): a lease that this public IP already holds
is kept if it fits the configuration; else the previous subnet is taken if it is free and fits; else one
of the first 100 free subnets, at random, so that nodes that start together rarely collide.

Decision: free subnets are found by walking the gaps between the sorted leases, never by testing each
subnet against each lease: n log n in the number of leases, independent of the size of the network.

Decision: a lease is also ours if it is the previous one and carries our backend data (the VTEP's MAC,
46 random bits): the node's address has changed, and its pods need not move for that.

Decision: each family's subnet is kept on its own. Upstream gives up both when one does not fit, so that
a node which gets IPv6 beside IPv4 also gets another IPv4 subnet: its pods are cut off, and the bridge,
which has the old gateway address, takes no new ones.

Decision: where upstream asks whether somebody holds exactly the previous subnet, we ask whether
anybody's subnet overlaps it, since after a change of SubnetLen the two differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from random import Random
from typing import TypeVar

from cni.errors import InternalError, LeaseLost, OutOfSubnets
from flanneld.config import NetConf
from flanneld.lease import Attributes, Lease

CANDIDATES = 100

Network = IPv4Network | IPv6Network
N = TypeVar("N", IPv4Network, IPv6Network)


@dataclass(frozen=True, slots=True)
class Keep:
    """Write the attributes into this lease, which is ours already."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Create:
    """Delete our leases in `drop`, which do not fit, and create one with these subnets.

    `note` says which previous subnet is not used and why, empty when there is no such thing.
    """

    subnet: IPv4Network | None
    subnet6: IPv6Network | None
    drop: tuple[Lease, ...] = ()
    note: str = ""


Decision = Keep | Create


@dataclass(frozen=True, slots=True)
class _Pool:
    """The subnets of one family that may be handed out: `first`, `first + size`, ... up to `last`."""

    label: str
    network: Network
    length: int
    first: int
    last: int

    @property
    def size(self) -> int:
        return 1 << (self.network.max_prefixlen - self.length)

    def holds(self, subnet: Network) -> bool:
        return subnet.prefixlen == self.length and self.first <= int(subnet.network_address) <= self.last

    def describe(self) -> str:
        lowest, highest = (type(self.network.network_address)(n) for n in (self.first, self.last))
        return f"{self.label}SubnetLen {self.length} from {lowest} to {highest}"


def _pool4(config: NetConf) -> _Pool | None:
    if not config.enable_ipv4:
        return None
    return _pool("", config.network, config.subnet_len, config.subnet_min, config.subnet_max)


def _pool6(config: NetConf) -> _Pool | None:
    if not config.enable_ipv6:
        return None
    return _pool(
        "IPv6", config.ipv6_network, config.ipv6_subnet_len, config.ipv6_subnet_min, config.ipv6_subnet_max
    )


def _pool(
    label: str,
    network: Network | None,
    length: int,
    lowest: IPv4Address | IPv6Address | None,
    highest: IPv4Address | IPv6Address | None,
) -> _Pool:
    if network is None or not length or lowest is None or highest is None:
        raise InternalError(f"{label}Network was not validated before a subnet was chosen in it")
    return _Pool(label, network, length, int(lowest), int(highest))


def owner(attrs: Attributes) -> IPv4Address | IPv6Address:
    """The address that stands for the node in a store: its public IP, IPv6 only where there is no IPv4."""
    address = attrs.public_ip or attrs.public_ipv6
    if address is None:
        raise InternalError("a lease needs a public IP to be owned by")
    return address


def owner_text(lease: Lease) -> str:
    """Whom the lease belongs to, for messages; a lease that others wrote may name nobody."""
    return str(lease.attrs.public_ip or lease.attrs.public_ipv6 or "a node without public IP")


def holds(lease: Lease, public_ip: IPv4Address | IPv6Address) -> bool:
    """Whether the lease belongs to the node with this public IP."""
    attrs = lease.attrs
    return public_ip == (attrs.public_ip if isinstance(public_ip, IPv4Address) else attrs.public_ipv6)


def fits(config: NetConf, lease: Lease) -> bool:
    """Whether the lease has exactly the subnets that `config` hands out: family, length and range."""
    return _fits(_pool4(config), lease.subnet) and _fits(_pool6(config), lease.subnet6)


def _fits(pool: _Pool | None, subnet: Network | None) -> bool:
    if pool is None or subnet is None:
        return pool is None and subnet is None
    return pool.holds(subnet)


def candidates(config: NetConf, leases: Iterable[Lease], limit: int = CANDIDATES) -> list[IPv4Network]:
    """The first `limit` IPv4 subnets of `config` that overlap no lease, in order; empty without IPv4."""
    pool = _pool4(config)
    if pool is None:
        return []
    taken = (lease.subnet for lease in leases if lease.subnet is not None)
    return [IPv4Network((n, pool.length)) for n in _free(pool, taken, limit)]


def candidates6(config: NetConf, leases: Iterable[Lease], limit: int = CANDIDATES) -> list[IPv6Network]:
    """The first `limit` IPv6 subnets of `config` that overlap no lease, in order; empty without IPv6."""
    pool = _pool6(config)
    if pool is None:
        return []
    taken = (lease.subnet6 for lease in leases if lease.subnet6 is not None)
    return [IPv6Network((n, pool.length)) for n in _free(pool, taken, limit)]


def _free(pool: _Pool, taken: Iterable[Network], limit: int) -> list[int]:
    """Start addresses of the first free subnets: one walk over the sorted gaps between those taken."""
    size, end = pool.size, pool.last + pool.size
    ranges = sorted((int(n.network_address), int(n.broadcast_address) + 1) for n in taken)
    found: list[int] = []
    at = pool.first
    for start, stop in [*ranges, (end, end)]:
        gap_end = min(start, end)
        while at + size <= gap_end and len(found) < limit:
            found.append(at)
            at += size
        if len(found) == limit:
            break
        if stop > at:
            at = pool.first + -(-(stop - pool.first) // size) * size
    return found


def choose(
    config: NetConf,
    leases: Sequence[Lease],
    own_public_ip: IPv4Address | IPv6Address,
    previous: Lease | None,
    rng: Random,
) -> Decision:
    """What the node with `own_public_ip` must do to have a lease that fits the validated `config`.

    `leases` are all that are in force. Raises OutOfSubnets.
    """
    # What we wrote ourselves comes before what only names the address that is ours now.
    mine = tuple(
        sorted(
            (x for x in leases if holds(x, own_public_ip) or _same_node(x, previous)),
            key=lambda x: not _same_node(x, previous),
        )
    )
    for lease in mine:
        if fits(config, lease):
            return Keep(lease)
    others = [lease for lease in leases if lease not in mine]
    pool4, pool6 = _pool4(config), _pool6(config)
    before = (previous, *mine) if previous else mine
    subnet = _kept(pool4, [lease.subnet for lease in before], others)
    subnet6 = _kept(pool6, [lease.subnet6 for lease in before], others)
    if subnet is None:
        subnet = _pick(pool4, candidates(config, others), len(others), rng)
    if subnet6 is None:
        subnet6 = _pick(pool6, candidates6(config, others), len(others), rng)
    return Create(subnet, subnet6, mine, _objections(config, others, previous) if previous else "")


def _same_node(lease: Lease, previous: Lease | None) -> bool:
    """Whether `lease` is `previous`, written by this node under another public IP."""
    if previous is None or lease.key != previous.key:
        return False
    ours, found = previous.attrs, lease.attrs
    identity = (ours.backend_type, ours.backend_data, ours.backend_v6_data)
    return any(identity[1:]) and identity == (found.backend_type, found.backend_data, found.backend_v6_data)


def _kept(pool: _Pool | None, before: Iterable[N | None], others: Sequence[Lease]) -> N | None:
    """The first subnet of `before` that can be had again."""
    for subnet in before:
        if pool is not None and subnet is not None and not _objection(pool, subnet, others):
            return subnet
    return None


def _objections(config: NetConf, others: Sequence[Lease], previous: Lease) -> str:
    """Why subnets of `previous` in enabled families cannot be had again; empty when they can."""
    pairs = ((_pool4(config), previous.subnet), (_pool6(config), previous.subnet6))
    found = (_objection(pool, subnet, others) for pool, subnet in pairs if pool and subnet)
    return "; ".join(filter(None, found))


def _objection(pool: _Pool, subnet: Network, others: Sequence[Lease]) -> str:
    if not pool.holds(subnet):
        return f"previous subnet {subnet} does not fit {pool.describe()}"
    v4, v6 = (subnet, None) if isinstance(subnet, IPv4Network) else (None, subnet)
    holder = taker(Lease(v4, v6, Attributes()), others)
    if holder is not None:
        return f"previous subnet {subnet} is taken: {holder.key} belongs to {owner_text(holder)}"
    return ""


def taker(lease: Lease, others: Iterable[Lease]) -> Lease | None:
    """The first of `others` with a subnet that overlaps one of `lease`'s."""
    for other in others:
        if lease.subnet and other.subnet and lease.subnet.overlaps(other.subnet):
            return other
        if lease.subnet6 and other.subnet6 and lease.subnet6.overlaps(other.subnet6):
            return other
    return None


def require_ours(lease: Lease, leases: Iterable[Lease], place: str) -> None:
    """Raise LeaseLost if one of `leases`, those in force, shows that `lease` is no longer its owner's.

    That is another node's lease that overlaps it, or one that the owner holds instead. `place` names
    the store in the message.
    """
    public_ip = owner(lease.attrs)
    for other in leases:
        mine = holds(other, public_ip)
        if (mine and other.key != lease.key) or (not mine and taker(lease, (other,))):
            raise LeaseLost(
                f"lease {lease.key} of {public_ip} in {place} is lost:"
                f" {other.key} belongs to {owner_text(other)}"
            )


def _pick(pool: _Pool | None, free: list[N], leases: int, rng: Random) -> N | None:
    if pool is None:
        return None
    if not free:
        raise OutOfSubnets(
            f"no free subnet is left in {pool.network} ({pool.describe()}, {leases} leases); widen"
            f" {pool.label}Network or the range {pool.label}SubnetMin to {pool.label}SubnetMax, raise"
            f" {pool.label}SubnetLen, or delete leases of nodes that are gone"
        )
    return rng.choice(free)
