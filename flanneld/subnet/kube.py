"""Leases in Kubernetes: a node's podCIDR is its subnet, its annotations are the lease's attributes.

What a Node means is in `flanneld.subnet.nodes`, which does no IO; how the API server is spoken to in
`flanneld.subnet.kubeapi`. Here is what the subnet manager does with both. The nodes are listed once, for
`acquire` and for the first `watch`; from then on they are watched. Upstream: pkg/subnet/kube.

Decision: a watch that ends, in order or not, goes on from the last version that was seen, and so does
the next `watch` after StoreUnavailable: 5,000 nodes that each list 75 MB because one API server was
restarted would end the next one. A list is read again only where the history is lost: 410 in any form,
or a version that the server does not know yet, because its own store was put back. The latter makes no
error of a watch but silence, so it is asked for first, unless the last watch ended as it should.

Decision: a list read again within one `watch` is yielded as the changes that it makes, often none, so
that a lost history costs no reconcile; as a Snapshot only if our own lease is not in it any more. The
first update of each `watch` is a Snapshot; one that comes from memory is yielded only once the new watch
stands, for it says that the store answers.

Decision: our own lease is yielded as `acquire` returned it while our node says what we published. The
annotations may say less or something else (an overwritten public IP), and nobody has to write it again.

Decision: the Node must exist and have a podCIDR before anything is written; until then the daemon waits
and says so (upstream ends, and is started again). A podCIDR outside of the network is refused before
anything is written (upstream writes first).

Decision: a range or a public IP that another live node has published is refused, unless we published
ours before: then it is a warning, since ending would cost traffic and mend nothing. Live is a node whose
Ready condition is True; upstream does not look.

Decision: everything that is wrong with the API server, the credentials or the rights is
StoreUnavailable, with the remedy: the node keeps its network meanwhile (upstream ends).
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from threading import Event

from cni.errors import ConfigError, LeaseLost, StoreUnavailable
from flanneld.config import NetConf, parse_netconf
from flanneld.lease import Attributes, Change, Lease, Snapshot, Update
from flanneld.subnet import nodes
from flanneld.subnet.kubeapi import WATCH_LIMITS_S, Access, Api, Gone, Listing, Missing
from flanneld.subnet.nodes import Annotations, Folded, Node, Table

log = logging.getLogger("flanneld")

LISTS = 3
# While the right to patch is missing `acquire` is tried every few seconds; all nodes are listed less often.
RECENT_S = 60.0
# A watch that ends sooner and has brought nothing was refused in fact.
SHORT_S = 1.0
SHORT_WATCHES = 3
# A lost history costs a list of all nodes: each time after a longer pause, until a watch lived so long.
LIVED_S = 60.0
RELIST_FIRST_S, RELIST_LAST_S = 2.0, 120.0


class KubeManager:
    """Subnet manager over Node objects.

    Raises ConfigError for flags and variables that cannot be right; asks the API server nothing yet.
    """

    def __init__(
        self,
        *,
        api_url: str,
        kubeconfig: str,
        annotation_prefix: str,
        net_config_path: str,
        set_network_unavailable: bool,
        environ: Mapping[str, str],
    ) -> None:
        self._keys = nodes.annotation_keys(nodes.annotation_prefix(annotation_prefix))
        self._node = environ.get("NODE_NAME", "")
        self._pod = environ.get("POD_NAMESPACE", ""), environ.get("POD_NAME", "")
        if not self._node and not all(self._pod):
            raise ConfigError(
                "which node this is cannot be told: set NODE_NAME, or both POD_NAME and POD_NAMESPACE"
                " (a DaemonSet has them from fieldRef spec.nodeName, metadata.name and metadata.namespace)"
            )
        self._net_config_path = net_config_path
        self._set_network_unavailable = set_network_unavailable
        self._api = Api(Access(api_url, kubeconfig, environ), self._keys)
        self._config: NetConf | None = None
        self._session: _Session | None = None
        self._recent: tuple[float, Listing] | None = None
        self._mine: tuple[Lease | None, Lease | None] = (None, None)
        self._reported: dict[str, str] = {}

    @property
    def name(self) -> str:
        """Ends in the node's name, or in the pod's until `network_config` has found the node."""
        return f"Kubernetes Subnet Manager - {self._node or '/'.join(self._pod)}"

    def network_config(self) -> NetConf:
        """What the file --net-config-path says; subnet lengths and bounds mean nothing here.

        Finds out which node this is, for which it may have to ask the API server.
        """
        config = self._read_config()
        if not self._node:
            self._node = self._node_of_pod(*self._pod)
        self._config = config
        return config

    def public_ips(self) -> tuple[str, str]:
        """The annotations node-public-ip and node-public-ipv6 of our node, empty where there are none."""
        told = self._own().annotations
        return told.node_public_ip or "", told.node_public_ipv6 or ""

    def stored(self, public_ip: IPv4Address | IPv6Address) -> Lease | None:
        """What our node published at an earlier start, whatever its public IP."""
        return nodes.stored_lease(self._own())

    def acquire(self, config: NetConf, attrs: Attributes, previous: Lease | None) -> Lease:
        """Publish `attrs` for the podCIDR of our node; `previous` does not count, Kubernetes decides.

        Raises ConfigError for a podCIDR that does not fit `config`, and if another live node has what is
        ours. The lease has our own public IP even where an overwrite is published.
        """
        self._config = config
        own = self._own()
        lease = Lease(*nodes.own_subnets(own, config, self._net_config_path), attrs)
        wanted = nodes.published(own, attrs)
        recent, self._recent = self._recent, None
        if recent is None or time.monotonic() - recent[0] > RECENT_S:
            recent = time.monotonic(), self._list(None)
        listing = recent[1]
        self._check_rivals(own, lease, wanted, listing.nodes)
        self._recent = recent
        own = self._publish(own, wanted, lease)
        session = self._begin(config, listing)
        self._report(session.table.fold([nodes.Event(own.name, own)]))
        self._session, self._recent = session, None
        return lease

    def renew(self, lease: Lease) -> Lease:
        """Write our annotations again if they differ from the lease's, which itself never ends.

        Raises LeaseLost if our node has another podCIDR now.
        """
        own = self._own()
        if not own.pod_cidrs:
            raise StoreUnavailable(f"node {own.name} has no podCIDR at present; it was that of {lease.key}")
        try:
            subnet, subnet6 = nodes.subnets(own.pod_cidrs)
        except ValueError as exc:
            raise ConfigError(f"node {own.name}: {exc}") from None
        if (lease.subnet or subnet, lease.subnet6 or subnet6) != (subnet, subnet6):
            raise LeaseLost(f"node {own.name} has podCIDR {own.cidrs} now, no longer that of {lease.key}")
        self._publish(own, nodes.published(own, lease.attrs), lease)
        return lease

    def complete(self, lease: Lease) -> None:
        """Set the condition NetworkUnavailable of our node to False, unless it says just that already."""
        if not self._set_network_unavailable:
            return
        try:
            if self._api.condition(self._node, nodes.CONDITION) != ("False", nodes.REASON):
                now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                self._api.patch_status(self._node, nodes.condition_patch(now))
        except Missing:
            raise self._no_node() from None

    def watch(self, stop: Event) -> Iterator[Update]:
        """Yield a snapshot, then changes, also where the history was lost in between."""
        try:
            yield from self._updates(stop)
        except StoreUnavailable:
            if not self._api.ended(stop):
                raise

    def close(self) -> None:
        """Close the connections; a running `watch` ends, other calls fail with StoreUnavailable."""
        self._api.close()

    # ---- our own node

    def _read_config(self) -> NetConf:
        path = self._net_config_path
        try:
            text = Path(path).read_bytes()
        except OSError as exc:
            raise ConfigError(
                f"cannot read --net-config-path={path}: {exc.strerror}; in a DaemonSet it is net-conf.json of"
                " the ConfigMap kube-flannel-cfg, mounted at /etc/kube-flannel"
            ) from None
        config = parse_netconf(text, path)
        if not (config.enable_ipv4 or config.enable_ipv6):
            raise ConfigError(f"EnableIPv4 and EnableIPv6 in {path} are both false: set one of them to true")
        for key, switch, on, network in (
            ("Network", "EnableIPv4", config.enable_ipv4, config.network),
            ("IPv6Network", "EnableIPv6", config.enable_ipv6, config.ipv6_network),
        ):
            if on and network is None:
                raise ConfigError(
                    f"{key} in {path} is not set: give the range that kube-controller-manager has as"
                    f" --cluster-cidr, or set {switch} to false"
                )
        return config

    def _node_of_pod(self, namespace: str, pod: str) -> str:
        try:
            found = self._api.node_of_pod(namespace, pod)
        except Missing:
            found = ""
        if not found:
            raise StoreUnavailable(
                f"pod {namespace}/{pod} does not exist or is on no node;"
                " check POD_NAME and POD_NAMESPACE, or set NODE_NAME"
            )
        return found

    def _own(self) -> Node:
        try:
            return self._api.node(self._node)
        except Missing:
            raise self._no_node() from None

    def _no_node(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"node {self._node} does not exist; its kubelet makes it when it registers"
            " (if under another name, set NODE_NAME to that)"
        )

    def _check_rivals(self, own: Node, lease: Lease, wanted: Annotations, others: Iterable[Node]) -> None:
        for rival in nodes.rivals(own, lease, wanted, others):
            if rival.alive and not rival.published:
                raise ConfigError(
                    f"{rival.problem}, which is Ready; give one of the two another, or delete the one that is"
                    " no more"
                )
            reason = "this one had it before" if rival.published else "that one is not Ready"
            log.warning("%s; going on, since %s", rival.problem, reason)

    def _publish(self, own: Node, wanted: Annotations, lease: Lease) -> Node:
        """Patch what differs; returns our node as it is then."""
        if self._config is not None:
            self._mine = nodes.read_lease(nodes.told(own, wanted), self._config).lease, lease
        patch = nodes.annotations_patch(own.annotations, wanted, self._keys)
        if not patch:
            return own
        try:
            return self._api.patch_status(own.name, patch)
        except Missing:
            raise self._no_node() from None

    # ---- all nodes

    def _updates(self, stop: Event) -> Iterator[Update]:
        if self._api.ended(stop):
            return
        config = self._config or self.network_config()
        session, self._session = self._session, None
        known = session is not None and session.config == config
        if session is None or not known:
            session = self._begin(config, self._list(stop))
        try:
            if not known:
                yield self._snapshot(session)
            for update in self._follow(session, stop):
                if known:
                    known = False
                    yield self._snapshot(session)
                elif update:
                    yield update
        finally:
            self._session = session

    def _follow(self, session: _Session, stop: Event) -> Iterator[Update]:
        """Yield updates; empty ones as well, such as one whenever a watch stands."""
        short = 0
        while not self._api.ended(stop):
            began, version, lost = time.monotonic(), session.version, False
            try:
                if session.doubtful:
                    self._api.confirm(self._node, version, stop)
                session.doubtful = True
                cut = yield from self._one_watch(session, stop)
                # An end in order and in its time is one that we asked for.
                session.doubtful = cut or time.monotonic() - began < WATCH_LIMITS_S[0]
            except Gone:
                lost = True
            short = short + 1 if session.version == version and time.monotonic() - began < SHORT_S else 0
            if short == SHORT_WATCHES:
                raise StoreUnavailable(
                    f"the API server at {self._api.url} ended the watch of nodes {short} times at once"
                )
            if short > 1:
                stop.wait(random.uniform(0.5, 1.0) * SHORT_S)  # noqa: S311 - a pause, no secret
            if time.monotonic() - began > LIVED_S:
                session.losses = 0
            if lost:
                # Thousands of nodes lose their history at the same moment.
                longest_s = min(RELIST_FIRST_S * 2**session.losses, RELIST_LAST_S)
                stop.wait(random.uniform(0.0, longest_s))  # noqa: S311 - a pause, no secret
                session.losses += 1
                yield self._read_again(session, stop)

    def _one_watch(self, session: _Session, stop: Event) -> Generator[Update, None, bool]:
        """Yield what one watch brings; returns whether it was cut."""
        with closing(self._api.watch(session.version, session.table.nodes, self._node)) as watch:
            while not self._api.ended(stop):
                batch = watch.receive()
                if batch is None:
                    continue
                session.version = batch.version or session.version
                yield self._report(session.table.fold(batch.events)) or self._bare(batch.events)
                if batch.ended:
                    return batch.cut
        return True

    def _bare(self, events: Iterable[nodes.Event]) -> tuple[Change, ...]:
        """That our lease is gone, if our node shows itself without our annotations: it was made again."""
        _, used = self._mine
        bare = any(name == self._node and node and not node.managed for name, node in events)
        return (Change(used.key, None),) if bare and used is not None else ()

    def _read_again(self, session: _Session, stop: Event) -> Update:
        """List the nodes after a lost history; what has changed, or all if that took our own lease away.

        Then the store has lost its data, and the consumer may want to know all that it has left.
        """
        had = session.table.has_own
        listing = self._list(stop)
        changes = self._report(session.table.replace(listing.nodes))
        session.version, session.doubtful = listing.version, False
        log.info("The API server's history of nodes was lost; listed again: %d leases changed", len(changes))
        return self._snapshot(session) if had and not session.table.has_own else changes

    def _snapshot(self, session: _Session) -> Snapshot:
        return Snapshot(tuple(map(self._as_used, session.table.leases)))

    def _as_used(self, lease: Lease) -> Lease:
        """Our own lease as `acquire` returned it, as long as its node says just what we published."""
        said, used = self._mine
        return used if used is not None and lease == said else lease

    def _begin(self, config: NetConf, listing: Listing) -> _Session:
        session = _Session(config, Table(config, self._node), listing.version)
        self._report(session.table.replace(listing.nodes))
        return session

    def _list(self, stop: Event | None) -> Listing:
        """All nodes; begun anew if the history is lost between two pages."""
        for _ in range(LISTS):
            with suppress(Gone):
                return self._api.list(stop)
        raise StoreUnavailable(f"the API server at {self._api.url} lost the list of nodes {LISTS} times")

    def _report(self, folded: Folded) -> tuple[Change, ...]:
        """The changes; what is wrong with a node is logged when it is new."""
        for name, problem in folded.problems:
            if not problem:
                self._reported.pop(name, None)
            elif self._reported.get(name) != problem:
                self._reported[name] = problem
                log.warning("Node %s cannot be used as it is, all others are: %s", name, problem)
        return tuple(
            change if change.lease is None else Change(change.key, self._as_used(change.lease))
            for change in folded.changes
        )


@dataclass(slots=True)
class _Session:
    """What is known of all nodes, as of `version`; `doubtful` if the server may not know that version."""

    config: NetConf
    table: Table
    version: str
    doubtful: bool = False
    losses: int = 0
