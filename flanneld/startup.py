"""What happens once, between the flags and the loop: look, choose, claim a lease.

Nothing here changes the kernel. Each step takes values and returns a value; a step that cannot
succeed raises ConfigError with the cause and the remedy, and everything is as it was before.

Where the store does not answer, a node that has run before starts with what it knew then
(`Source`): the network of a rebooted node must not wait for an API server that may itself need it.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from threading import Event
from typing import TypeVar

from cni.errors import ConfigError, StoreUnavailable
from cni.net.entries import NetState
from cni.net.kernel import NetlinkKernel, as_link
from cni.net.netlink import RouteInfo
from flanneld import iface, metrics, overlap
from flanneld.backend import build
from flanneld.backend.protocol import Backend, existing_links
from flanneld.config import NetConf
from flanneld.flags import Options, Store
from flanneld.health import Readiness
from flanneld.iface import ExternalInterface
from flanneld.lease import Attributes, Lease, LeaseSet, Update
from flanneld.log import OncePerChange, logger
from flanneld.snapshot import NodeState
from flanneld.subnet import envfile
from flanneld.subnet.manager import LEASE_TTL_S, SubnetManager

T = TypeVar("T")

_RETRY_FIRST_S, _RETRY_LAST_S = 0.1, 10.0
# How long the store may stay silent before a node that has run before goes on without it.
RESTORE_AFTER_S = 3.0


class Stopped(Exception):
    """A signal came while waiting for the store."""


@dataclass(frozen=True, slots=True)
class Start:
    """What start-up found and chose; everything that the running daemon begins with.

    `restored` is the Unix time of the snapshot that the lease came from, 0 when it came from the store.
    `doubtful` are peers of an earlier run that the store may have lost together with our own lease.
    `updates` is the watch that `peers` came from, its first snapshot included; None when restored.
    """

    config: NetConf
    public_ips: tuple[str, str]
    origin: str
    external: ExternalInterface
    backend: Backend
    own: Lease
    peers: tuple[Lease, ...]
    existing: NetState
    restored: float = 0.0
    doubtful: tuple[Lease, ...] = ()
    updates: Iterator[Update] | None = None


def previous_lease(subnet_file: Path, saved: NodeState | None) -> Lease | None:
    """The subnets of an earlier start from the subnet file, with the attributes of the snapshot if it agrees.

    None without a good entry in the file; then the snapshot's lease counts, if there is one.
    """
    try:
        previous = envfile.parse(subnet_file.read_bytes())
    except OSError:
        return saved.own if saved else None
    for finding in previous.findings:
        logger.warning("%s: %s", subnet_file, finding)
    if saved and (saved.own.subnet, saved.own.subnet6) == (previous.subnet, previous.ipv6_subnet):
        return saved.own
    if previous.subnet or previous.ipv6_subnet:
        return Lease(previous.subnet, previous.ipv6_subnet, Attributes())
    return saved.own if saved else None


def origin(options: Options, kernel: NetlinkKernel, interface: str) -> str:
    """The machine, known by the address of its interface's hardware, and the store: see `NodeState`."""
    link = kernel.link(interface)
    place = {
        Store.KUBERNETES: options.kube_annotation_prefix,
        Store.ETCD: options.etcd_prefix,
        Store.SQLITE: options.lease_db_path,
    }
    return f"{link.mac if link else ''} {options.store.value} {place[options.store]}"


def subnet_manager(
    options: Options, previous: Lease | None, environ: Mapping[str, str], give_way: Callable[[], None]
) -> SubnetManager:
    """The store that the flags ask for; raises ConfigError. `give_way` is for the embedded one's leases."""
    if options.store is Store.KUBERNETES:
        from flanneld.subnet.kube import KubeManager

        return KubeManager(
            api_url=options.kube_api_url,
            kubeconfig=options.kubeconfig_file,
            annotation_prefix=options.kube_annotation_prefix,
            net_config_path=options.net_config_path,
            set_network_unavailable=options.set_node_network_unavailable,
            environ=environ,
        )
    if options.store is Store.ETCD:
        from flanneld.subnet.etcd import EtcdManager

        return EtcdManager(
            endpoints=options.etcd_endpoints,
            prefix=options.etcd_prefix,
            keyfile=options.etcd_keyfile,
            certfile=options.etcd_certfile,
            cafile=options.etcd_cafile,
            username=options.etcd_username,
            password=options.etcd_password,
            previous=previous,
        )
    from flanneld.subnet.sqlite import SqliteManager

    return SqliteManager(options.lease_db_path, options.net_config_path, give_way=give_way)


class Source:
    """The store's answers; once it has been silent for `RESTORE_AFTER_S`, those of the snapshot instead.

    Without a usable snapshot (`saved` None, or its lease does not suit the configuration) it waits for
    the store, for ever, and says so once per change. Raises Stopped when `stop` is set meanwhile.
    """

    def __init__(
        self, manager: SubnetManager, saved: NodeState | None, stop: Event, readiness: Readiness
    ) -> None:
        self._manager = manager
        self._saved = saved
        self._stop = stop
        self._readiness = readiness
        self._deadline = time.monotonic() + RESTORE_AFTER_S
        self._silent = False
        self.updates: Iterator[Update] | None = None

    @property
    def name(self) -> str:
        """The store's name, complete once `config` has been asked for."""
        return self._manager.name

    @property
    def restored(self) -> float:
        """Unix time of the snapshot, if the lease came from there, else 0."""
        return self._saved.written_s if self._saved and self._silent else 0.0

    def config(self) -> NetConf:
        """The network configuration."""
        return self._ask("reading the network configuration", self._manager.network_config, _config_of)

    def public_ips(self) -> tuple[str, str]:
        """The addresses that the operator keeps for this node in the store."""
        return self._ask(
            "reading the node's public IP", self._manager.public_ips, lambda saved: saved.public_ips
        )

    def own(
        self, backend: Backend, config: NetConf, existing: NetState, previous: Lease | None
    ) -> tuple[Lease, bool]:
        """Our lease, subnet and VTEP MAC kept wherever that is possible, and whether the store knew it."""
        published = backend.attributes(None, existing)
        public_ip = published.public_ip or published.public_ipv6
        if public_ip is None:
            raise ConfigError("the lease would name no public IP; enable IPv4 or IPv6")

        def remembered(saved: NodeState) -> Lease | None:
            return saved.own if suits(saved.own, config) else None

        stored = self._ask("reading our lease", lambda: self._manager.stored(public_ip), remembered)
        known = _better_known(stored, previous)
        attrs = backend.attributes(known, existing) if known else published
        lease = self._ask(
            "taking a lease",
            lambda: self._manager.acquire(config, attrs, previous),
            lambda saved: replace(saved.own, attrs=attrs) if suits(saved.own, config) else None,
        )
        how = "kept" if stored and stored.key == lease.key else "new"
        logger.info("Lease acquired: %s (%s), public IP %s", lease.key, how, public_ip)
        return lease, stored is not None

    def peers(self, own: Lease) -> tuple[Lease, ...]:
        """Every lease but ours; `updates` then goes on from there."""

        def from_store() -> tuple[Lease, ...]:
            updates = self._manager.watch(self._stop)
            first = next(updates, None)
            if first is None:
                raise Stopped
            self.updates = chain((first,), updates)
            return tuple(LeaseSet().fold(first).peers(own))

        return self._ask("reading leases", from_store, lambda saved: saved.peers)

    def _ask(self, what: str, call: Callable[[], T], remembered: Callable[[NodeState], T | None]) -> T:
        saved = self._saved
        kept = remembered(saved) if saved else None
        if saved is None or kept is None:
            return until_available(what, call, self._stop, self._readiness)
        if self._silent:
            return kept
        try:
            return until_available(what, call, self._stop, self._readiness, self._deadline)
        except StoreUnavailable as exc:
            self._silent = True
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved.written_s))
            logger.warning("The store is away; going on with what this node knew at %s: %s", moment, exc)
            return kept


def _better_known(stored: Lease | None, previous: Lease | None) -> Lease | None:
    """Whose VTEP MAC to keep: the lease of our public IP, unless it is another than the one that was ours."""
    if stored is None or previous is None:
        return stored or previous
    return previous if previous.attrs.backend_data and previous.key != stored.key else stored


def _config_of(saved: NodeState) -> NetConf:
    return saved.config


def suits(lease: Lease, config: NetConf) -> bool:
    """Whether the lease has a subnet inside the network in each family that `config` enables, no other."""
    pairs = (
        (config.enable_ipv4, lease.subnet, config.network),
        (config.enable_ipv6, lease.subnet6, config.ipv6_network),
    )
    for enabled, subnet, network in pairs:
        if enabled != (subnet is not None):
            return False
        if subnet is not None and (network is None or not subnet.subnet_of(network)):  # type: ignore[arg-type] # one family a pair
            return False
    return True


def until_available(
    what: str,
    call: Callable[[], T],
    stop: Event,
    readiness: Readiness,
    deadline: float | None = None,
) -> T:
    """Repeat `call` until the store answers, with back-off; says so once per change of state.

    Raises Stopped when `stop` is set first, and the last StoreUnavailable once `deadline` (monotonic
    seconds) is over. Whatever the kernel holds meanwhile stays in force.
    """
    trouble, delay_s = OncePerChange(), _RETRY_FIRST_S
    while not stop.is_set():
        try:
            result = call()
        except StoreUnavailable as exc:
            metrics.STORE_UP.set(0)
            metrics.STORE_FAILURES.inc()
            if deadline is not None and time.monotonic() >= deadline:
                raise
            readiness.waiting(f"waiting for the store ({what}): {exc}")
            trouble.trouble(f"Waiting for the store ({what}): {exc}")
            stop.wait(spread(delay_s))
            delay_s = min(delay_s * 2, _RETRY_LAST_S)
        else:
            metrics.STORE_UP.set(1)
            trouble.over(f"The store answers again ({what})")
            return result
    raise Stopped


def spread(delay_s: float) -> float:
    """A delay about as long, so that nodes that lost their store together do not come back together."""
    return delay_s * random.uniform(0.5, 1.5)  # noqa: S311 - no secret


def decide(
    options: Options,
    kernel: NetlinkKernel,
    source: Source,
    previous: Lease | None,
    saved: NodeState | None,
    claim: Callable[[Sequence[str]], None],
) -> Start:
    """Everything that the daemon begins with. `claim` locks the devices, before a lease is taken."""
    config = source.config()
    logger.info("Created subnet manager: %s", source.name)
    check_bridge_filter(config)
    public_ips = source.public_ips()
    external = external_interface(kernel, options, config, public_ips)
    logger.info("Found network config - Backend type: %s", config.backend_type)
    backend = build_backend(kernel, config, external)
    claim(backend.scope(config).links)
    check_underlay(kernel, config, external)
    existing = check_devices(kernel, backend)
    own, known = source.own(backend, config, existing, previous)
    peers = source.peers(own)
    check_routes(kernel, config, external, own, peers)
    doubtful: tuple[Lease, ...] = ()
    if saved and time.time() - saved.written_s < LEASE_TTL_S:
        doubtful = tuple(peer for peer in saved.peers if not known or peer.key in saved.doubtful)
    return Start(
        config=config,
        public_ips=public_ips,
        origin=origin(options, kernel, external.name),
        external=external,
        backend=backend,
        own=own,
        peers=peers,
        existing=existing,
        restored=source.restored,
        doubtful=doubtful,
        updates=source.updates,
    )


def build_backend(kernel: NetlinkKernel, config: NetConf, external: ExternalInterface) -> Backend:
    """The backend of the configuration on this host; raises ConfigError."""
    return build(
        config,
        external,
        "the network configuration",
        on_link=kernel.on_link(external.name),
        release=os.uname().release,
    )


def check_bridge_filter(config: NetConf) -> None:
    """Upstream's demand: with iptables, bridged traffic must be seen by it."""
    if config.enable_nftables:
        return
    for enabled, name in (
        (config.enable_ipv4, "bridge-nf-call-iptables"),
        (config.enable_ipv6, "bridge-nf-call-ip6tables"),
    ):
        path = f"/proc/sys/net/bridge/{name}"
        if enabled and not Path(path).exists():
            raise ConfigError(f"{path} does not exist: load the module with: modprobe br_netfilter")


def look_at_host(kernel: NetlinkKernel) -> iface.Host:
    """What the external interface is chosen from."""
    routes = kernel.routes(socket.AF_INET) + kernel.routes(socket.AF_INET6)
    return iface.Host(
        links=kernel.links(),
        addresses=kernel.addresses(),
        defaults=[route for route in routes if route.dst in ("0.0.0.0/0", "::/0")],
        route_to=kernel.route_to,
    )


def wanted_interface(options: Options, config: NetConf, public_ips: tuple[str, str]) -> iface.Wanted:
    """The criteria; public IPs from the store win over the flags, as upstream's annotations do."""
    return iface.Wanted(
        iface=options.iface,
        iface_regex=options.iface_regex,
        iface_can_reach=options.iface_can_reach,
        public_ip=public_ips[0] or options.public_ip,
        public_ipv6=public_ips[1] or options.public_ipv6,
        ipv4=config.enable_ipv4,
        ipv6=config.enable_ipv6,
    )


def external_interface(
    kernel: NetlinkKernel, options: Options, config: NetConf, public_ips: tuple[str, str]
) -> ExternalInterface:
    """Choose the external interface and log why."""
    chosen = iface.select(look_at_host(kernel), wanted_interface(options, config, public_ips))
    shown = " and ".join(str(a) for a in (chosen.address, chosen.address6) if a)
    public = " and ".join(str(a) for a in (chosen.public_ip, chosen.public_ipv6) if a)
    logger.info(
        "Using interface %s with address %s, MTU %d: %s; peers are told %s",
        chosen.name,
        shown,
        chosen.mtu,
        chosen.reason,
        public,
    )
    return chosen


def check_underlay(kernel: NetlinkKernel, config: NetConf, external: ExternalInterface) -> None:
    """Raise ConfigError if the cluster's network overlaps the underlay."""
    links, addresses = kernel.links(), kernel.addresses()
    for network in (config.network, config.ipv6_network):
        if network is not None:
            overlap.check_underlay(network, external, links, addresses)


def check_routes(
    kernel: NetlinkKernel, config: NetConf, external: ExternalInterface, own: Lease, peers: tuple[Lease, ...]
) -> None:
    """Raise ConfigError if a route of the host leads part of the cluster's network elsewhere."""
    names = {link.ifindex: link.name for link in kernel.links()}
    for network, family in ((config.network, socket.AF_INET), (config.ipv6_network, socket.AF_INET6)):
        if network is not None:
            routes: list[RouteInfo] = kernel.routes(family)
            overlap.check_routes(network, own, peers, routes, names, external.name)


def check_devices(kernel: NetlinkKernel, backend: Backend) -> NetState:
    """The backend's links as they are now; raises ConfigError if a link of that name is no VXLAN device."""
    links = kernel.links()
    names = {link.ifindex: link.name for link in links}
    existing = {}
    for link in links:
        if link.name not in backend.devices:
            continue
        if link.vxlan is None:
            raise ConfigError(
                f"link {link.name} exists but is a {link.kind or 'plain'} device, not vxlan; "
                f"remove it with: ip link del {link.name}"
            )
        entry = as_link(link, names)
        existing[entry.key] = entry
    return existing


def new_devices(start: Start) -> list[str]:
    """Which of the backend's devices do not exist yet: ours to remove should the start fail."""
    have = existing_links(start.existing)
    return [device for device in start.backend.devices if device not in have]
