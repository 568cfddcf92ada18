"""The seam between the daemon and whatever remembers which node owns which subnet."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from threading import Event
from typing import Protocol

from flanneld.config import NetConf
from flanneld.lease import Attributes, Lease, Update

LEASE_TTL_S = 24 * 3600


class SubnetManager(Protocol):
    """A store of leases. Every method may raise StoreUnavailable; none retries on its own.

    Methods may be called from different threads at once.
    """

    @property
    def name(self) -> str:
        """What the log calls it, e.g. `Etcd Local Manager with Previous Subnet: None`."""
        ...

    def network_config(self) -> NetConf:
        """The validated network configuration; raises ConfigError when it is wrong.

        One that does not exist yet, where somebody may still write it, is StoreUnavailable.
        """
        ...

    def public_ips(self) -> tuple[str, str]:
        """The IPv4 and IPv6 address that the operator keeps in the store for this node, empty where none.

        They win over `--public-ip` and `--public-ipv6`, as upstream's node annotations do.
        """
        ...

    def stored(self, public_ip: IPv4Address | IPv6Address) -> Lease | None:
        """The lease that this node holds now, so that a restart can keep its VTEP's MAC."""
        ...

    def acquire(self, config: NetConf, attrs: Attributes, previous: Lease | None) -> Lease:
        """Take or take over a lease for `attrs.public_ip` and return it as stored.

        The lease this public IP already holds is kept if it fits `config`, else replaced; then the
        subnets of `previous` are tried; then a free one is chosen. A race lost to another node is run
        again. A lease that carries the backend data of `previous` is ours whatever its public IP: the
        node's address has changed. Raises OutOfSubnets.
        """
        ...

    def renew(self, lease: Lease) -> Lease:
        """Write the lease again with a new expiration; raises LeaseLost if another node holds it."""
        ...

    def complete(self, lease: Lease) -> None:
        """Tell whoever schedules pods that this node's network is up (upstream: CompleteLease)."""
        ...

    def watch(self, stop: Event) -> Iterator[Update]:
        """Yield a snapshot of all leases (own included), then changes as they happen.

        Further snapshots may come between changes, and an `expires_s` of 0 may mean "not asked for".

        Ends when `stop` is set or `close` is called. After StoreUnavailable a new call starts afresh
        with a snapshot, which is also how a compacted history is recovered from.
        """
        ...

    def close(self) -> None:
        """Release connections and end a running `watch`. The leases stay."""
        ...
