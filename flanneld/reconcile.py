"""The loop: leases and kernel notifications in, kernel state out.

Nothing here says "add this route". Leases give the desired state, the kernel gives the actual state,
`plan` gives the difference, one batch applies it. A lease that changed, a link event, a timer and
start-up all do the same thing: put a key on the work queue. A flushed table, a rebuilt device, a
restart after a week and the entries of nodes that left meanwhile need no code of their own.

Two kinds of key lead to the kernel. `NETWORK` reads the kernel and repairs everything. `("peer", KEY)`
handles one changed lease without a dump: the difference between what the old and the new lease ask
for. Should the kernel not have held what we thought, its notification or refusal brings a `NETWORK`.

One worker thread owns the kernel socket and all fields but `leases` and `wanted`. Those two are
values that are replaced, never changed: the watching threads read them without a lock.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network
from threading import Lock

from cni.errors import KernelError, NetworkError
from cni.net.entries import Blackhole, Entry, NetState, state
from cni.net.kernel import Change
from cni.net.plan import Kernel, Operation, Refused, plan
from flanneld import metrics
from flanneld.backend.protocol import Backend, Clash, merge
from flanneld.config import NetConf
from flanneld.lease import Change as LeaseChange
from flanneld.lease import Lease, LeaseSet, Snapshot, Update
from flanneld.log import OncePerChange, logger
from flanneld.workqueue import (
    Clock,
    ExponentialLimiter,
    RateLimitedQueue,
    ShutDown,
)

WorkKey = tuple[str, ...]
NETWORK: WorkKey = ("network",)

# Notifications come in bursts (a flushed table sends one for each entry): gather them this long.
_GATHER_S = 0.02
# A lost notification would otherwise go unnoticed for ever; upstream's informer resyncs as often.
RESYNC_S = 300.0
# How long a store that came back empty has time to be filled again by its clients.
GRACE_S = 60.0
_ADDRESS_RANK = 1
_Network = IPv4Network | IPv6Network
_RETRY_BASE_S, _RETRY_CAP_S = 0.05, 30.0


class Reconciler:
    """Keeps the kernel equal to what the leases ask for.

    `chores` are further keys and what to do for them (firewall, files); an error they raise on purpose
    is retried with back-off like a refused route.
    """

    def __init__(
        self,
        kernel: Kernel,
        backend: Backend,
        config: NetConf,
        own: Lease,
        clock: Clock,
        chores: Mapping[WorkKey, Callable[[], None]],
        blackholes: tuple[Blackhole, ...] = (),
    ) -> None:
        self.queue: RateLimitedQueue[WorkKey] = RateLimitedQueue(
            clock, ExponentialLimiter(_RETRY_BASE_S, _RETRY_CAP_S)
        )
        self.leases = LeaseSet()
        self.wanted: NetState = {}
        self._kernel = kernel
        self._backend = backend
        self._scope = backend.scope(config)._replace(blackholes=tuple(entry.dst for entry in blackholes))
        self._blackholes = blackholes
        self._own = own
        self._chores = chores
        self._programmed: dict[str, tuple[Entry, ...]] = {}
        # What each lease came to; most are the same at the next pass.
        self._made: dict[str, tuple[Lease, tuple[Entry, ...]]] = {}
        self._shared = False
        self._peers_known = False
        self._config = config
        # Guards the replacement of `leases`, which the store's thread and the worker both do.
        self._folding = Lock()
        self._suspects: dict[str, Lease] = {}
        self._doubtful: dict[str, Lease] = {}
        self._passed_over: set[str] = set()
        self._clashes: set[Clash] = set()
        self._trouble: dict[WorkKey, OncePerChange] = {}
        self.on_peers_programmed: Callable[[], None] = lambda: None
        self.on_network_refused: Callable[[str], None] = lambda why: None

    # ---- called by the watching threads

    def lease_update(self, update: Update) -> None:
        """Take in what the store reports; returns at once."""
        if isinstance(update, Snapshot):
            update = self._with_suspects(update)
        with self._folding:
            self.leases = self.leases.fold(update)
        metrics.LEASES.set(len(self.leases.by_key))
        if isinstance(update, Snapshot):
            self._peers_known = True
            self.queue.add(NETWORK)
        elif len({change.lease is None for change in update}) > 1:
            # A node's lease may have another key now. Seen as a whole, the new comes before the old goes.
            self.queue.add(NETWORK)
        else:
            for change in update:
                if change.key != self._own.key:
                    self.queue.add(("peer", change.key))

    def keep_doubtful(self, peers: Iterable[Lease]) -> None:
        """Peers of an earlier run that the store may have lost: the next snapshot does not end them."""
        self._doubtful = {lease.key: lease for lease in peers}

    def _with_suspects(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot without our own lease is of a store that lost its data: peers will write theirs again.

        Those it does not have are kept for a while, and then dropped unless the store named them again.
        """
        found = {lease.key for lease in snapshot.leases}
        lost = self._peers_known and self._own.key not in found
        waiting = {key: lease for key, lease in self.leases.by_key.items() if key in self._suspects}
        before = {**self._doubtful, **waiting, **(self.leases.by_key if lost else {})}
        self._doubtful = {}
        kept = {key: lease for key, lease in before.items() if key not in found and key != self._own.key}
        if kept.keys() - self._suspects.keys():
            logger.warning("The store lost our lease; %d peers it lost are kept for %d s", len(kept), GRACE_S)
        for key, lease in kept.items():
            if key not in self._suspects:
                self.queue.add_after(("suspect", key), GRACE_S)
            self._suspects[key] = lease
        return Snapshot((*snapshot.leases, *kept.values())) if kept else snapshot

    @property
    def suspects(self) -> frozenset[str]:
        """Keys of the peers that the store has lost and that are kept for a while."""
        return frozenset(self._suspects)

    def _drop_suspect(self, key: str) -> None:
        lease = self._suspects.pop(key, None)
        with self._folding:
            if lease is None or self.leases.by_key.get(key) is not lease:
                return
            self.leases = self.leases.fold((LeaseChange(key, None),))
        self.queue.add(("peer", key))

    def kernel_changes(self, changes: Sequence[Change]) -> None:
        """Take in kernel notifications; none at all means that some were lost."""
        if not changes or any(is_drift(change, self.wanted) for change in changes):
            self.queue.add_after(NETWORK, _GATHER_S)

    # ---- the worker

    def prepare(self) -> list[Refused]:
        """Bring our own device into shape, before any peer is known; removes nothing."""
        self.wanted = state(self._base())
        actual = self._kernel.snapshot(self._scope)
        operations = [op for op in plan(self.wanted, actual) if op.verb == "put" or op.entry.rank == 0]
        return self._kernel.apply(operations)

    def run(self) -> None:
        """Work until the queue is shut down."""
        self.queue.add_after(NETWORK, RESYNC_S)
        while True:
            try:
                key = self.queue.get()
            except ShutDown:
                return
            try:
                self._work(key)
            finally:
                self.queue.done(key)

    def _work(self, key: WorkKey) -> None:
        trouble = self._trouble.setdefault(key, OncePerChange())
        metrics.QUEUE_DEPTH.set(len(self.queue))
        try:
            self._handle(key)
        except NetworkError as exc:
            trouble.trouble(str(exc))
            metrics.QUEUE_RETRIES.inc()
            self.queue.add_rate_limited(key)
        else:
            trouble.over(f"{' '.join(key)}: in order again")
            self.queue.forget(key)
            del self._trouble[key]

    def _handle(self, key: WorkKey) -> None:
        if key == NETWORK:
            with metrics.RECONCILE_S.labels("network").time():
                self._network()
        elif key[0] == "peer":
            with metrics.RECONCILE_S.labels("peer").time():
                self._peer(key[1])
        elif key[0] == "suspect":
            self._drop_suspect(key[1])
        else:
            self._chores[key]()

    def _network(self) -> None:
        if not self._peers_known:
            # Without the store's word an unknown peer may be a live one: only mend what is ours alone.
            self._raise(self.prepare())
            return
        self.queue.add_after(NETWORK, RESYNC_S)
        peers = {lease.key: self._entries(lease) for lease in self.leases.peers(self._own)}
        self._made = {key: made for key, made in self._made.items() if key in peers}
        self._passed_over &= peers.keys()
        base = self._base()
        before = self.wanted
        self.wanted, clashes = merge(base, peers)
        self._report(clashes)
        self._programmed = peers
        self._shared = len(self.wanted) < len(base) + sum(map(len, peers.values()))
        operations = plan(self.wanted, self._kernel.snapshot(self._scope))
        drifted = [operation for operation in operations if is_foreign(operation, before)]
        for operation in drifted:
            metrics.DRIFT.labels(operation.entry.key[0]).inc()
        refused = self._apply(operations)
        metrics.DRIFT_REPAIRED.inc(max(0, len(drifted) - len(refused)))
        metrics.PEERS_PASSED_OVER.set(len(self._passed_over))
        # One peer that the kernel does not take must not keep the node from serving all others.
        if all(r.operation.entry.rank > _ADDRESS_RANK for r in refused):
            self.on_peers_programmed()
        else:
            self.on_network_refused(explain(refused))
        self._raise(refused)

    def _base(self) -> list[Entry]:
        return [*self._backend.base(self._own), *self._blackholes]

    def _report(self, clashes: Sequence[Clash]) -> None:
        """Say once of each lease that another has what it asks for."""
        for clash in clashes:
            if clash not in self._clashes:
                what = " ".join(clash.entry.key)
                logger.warning(
                    "Leases %s and %s ask for the same %s; %s has it",
                    clash.winner,
                    clash.loser,
                    what,
                    clash.winner,
                )
        self._clashes = set(clashes)

    def _entries(self, lease: Lease) -> tuple[Entry, ...]:
        """What reaches a peer, less a family whose subnet would take our own routes away (said once)."""
        made = self._made.get(lease.key)
        if made is not None and made[0] == lease and not self._backend.follows_routes:
            return made[1]
        entries = self._make(lease)
        self._made[lease.key] = lease, entries
        return entries

    def _make(self, lease: Lease) -> tuple[Entry, ...]:
        faults = misplaced(lease, self._own, self._config)
        if not faults:
            self._passed_over.discard(lease.key)
            return tuple(self._backend.peer(lease))
        if lease.key not in self._passed_over:
            self._passed_over.add(lease.key)
            said = " and ".join(faults.values())
            logger.warning("Lease %s of %s is passed over: %s", lease.key, lease.attrs.public_ip, said)
        usable = replace(
            lease,
            subnet=None if 4 in faults else lease.subnet,
            subnet6=None if 6 in faults else lease.subnet6,
        )
        return tuple(self._backend.peer(usable))

    def _peer(self, key: str) -> None:
        if not self._peers_known:
            return
        lease = self.leases.by_key.get(key)
        before = self._programmed.get(key, ())
        after = self._entries(lease) if lease else ()
        mine = {entry.key for entry in before}
        if self._shared or any(entry.key in self.wanted and entry.key not in mine for entry in after):
            # Two leases ask for the same entry: a node took another subnet and kept its VTEP, and its old
            # lease has not expired. Only a look at all leases tells what stays when one of them goes.
            self.queue.add(NETWORK)
            return
        if after:
            self._programmed[key] = after
        else:
            self._programmed.pop(key, None)
        wanted = dict(self.wanted)
        for entry in before:
            wanted.pop(entry.key, None)
        wanted.update(state(after))
        self.wanted = wanted
        if self._apply(plan(state(after), state(before))):
            # What the kernel holds is not what we thought: look at all of it, with back-off.
            self.queue.add_rate_limited(NETWORK)

    def _apply(self, operations: Sequence[Operation]) -> list[Refused]:
        if not operations:
            return []
        for operation in operations:
            logger.debug("%s %s", operation.verb, operation.entry)
        refused = self._kernel.apply(operations)
        puts = sum(op.verb == "put" for op in operations)
        metrics.OPERATIONS.labels("put").inc(puts)
        metrics.OPERATIONS.labels("drop").inc(len(operations) - puts)
        for refusal in refused:
            metrics.REFUSALS.labels(refusal.operation.verb).inc()
        if len(refused) < len(operations):
            logger.info(
                "Network reconciled: put=%d drop=%d refused=%d", puts, len(operations) - puts, len(refused)
            )
        return refused

    def _raise(self, refused: Sequence[Refused]) -> None:
        if refused:
            raise KernelError(explain(refused))


def misplaced(lease: Lease, own: Lease, config: NetConf) -> dict[int, str]:
    """For each address family (4, 6) in which a peer's subnet must not be routed to it, why not.

    A subnet outside of the network, or one that overlaps ours, would replace routes that are not flannel's.
    """
    pairs: tuple[tuple[_Network | None, _Network | None, _Network | None], ...] = (
        (lease.subnet, config.network, own.subnet),
        (lease.subnet6, config.ipv6_network, own.subnet6),
    )
    faults: dict[int, str] = {}
    for subnet, network, ours in pairs:
        if subnet is None or network is None:
            continue
        inside = network.network_address <= subnet.network_address and subnet.prefixlen > network.prefixlen  # type: ignore[operator] # one family a pair
        if not (inside and subnet.overlaps(network)):
            faults[subnet.version] = f"{subnet} is not inside the network {network}"
        elif ours is not None and subnet.overlaps(ours):
            faults[subnet.version] = f"{subnet} overlaps our own subnet {ours}"
    return faults


def is_drift(change: Change, wanted: NetState) -> bool:
    """Whether a notification tells of something that differs from what is wanted.

    The echo of our own work does not: what we wrote is wanted, what we dropped is not.
    """
    if change.entry is None:
        return not change.gone or ("link", change.link) in wanted
    if change.gone:
        return change.entry.key in wanted
    return wanted.get(change.entry.key) != change.entry


def is_foreign(operation: Operation, before: NetState) -> bool:
    """Whether an operation undoes what somebody else did to entries that were wanted `before` as now."""
    if not before:
        return False
    if operation.verb == "put":
        return before.get(operation.entry.key) == operation.entry
    return operation.entry.key not in before


_REMEDIES = {
    errno.EPERM: "flanneld needs CAP_NET_ADMIN; run it as root or add the capability",
    errno.EACCES: "IPv6 may be off for new devices; see: sysctl net.ipv6.conf.default.disable_ipv6",
    errno.EOPNOTSUPP: "the kernel lacks this kind of device; load its module: modprobe vxlan",
    errno.EADDRINUSE: "the UDP port is taken; find the owner with: ss -lunp, or set Backend.Port",
    errno.EEXIST: "another device has the same VNI and port; find it with: ip -d link show type vxlan",
}


def explain(refused: Sequence[Refused]) -> str:
    """One line for what the kernel refused: the first refusal, how many more, the remedy if known."""

    first = refused[0]
    name = errno.errorcode.get(first.errno, str(first.errno))
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    remedy = f"; {_REMEDIES[first.errno]}" if first.errno in _REMEDIES else ""
    what = " ".join(first.operation.entry.key)
    return f"the kernel refused to {first.operation.verb} {what}: {first.text} ({name}){more}{remedy}"
