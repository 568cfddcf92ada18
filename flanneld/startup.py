"""What happens once, between the flags and the loop: look, choose, claim a lease.

Nothing here changes the kernel. Each step takes values and returns a value; a step that cannot
succeed raises ConfigError with the cause and the remedy, and everything is as it was before.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TypeVar

from cni.errors import ConfigError, StoreUnavailable
from cni.net.entries import NetState
from cni.net.kernel import NetlinkKernel, as_link
from cni.net.netlink import RouteInfo
from flanneld import iface, overlap
from flanneld.backend import build
from flanneld.backend.protocol import Backend, existing_links
from flanneld.config import NetConf
from flanneld.flags import Options, Store
from flanneld.iface import ExternalInterface
from flanneld.lease import Attributes, Lease, LeaseSet
from flanneld.log import OncePerChange, logger
from flanneld.subnet import envfile
from flanneld.subnet.manager import SubnetManager

T = TypeVar("T")

_RETRY_FIRST_S, _RETRY_LAST_S = 0.1, 5.0


class Stopped(Exception):
    """A signal came while waiting for the store."""


def previous_lease(subnet_file: Path) -> Lease | None:
    """The subnets of an earlier start, from the subnet file; None without a good IPv4 entry."""
    try:
        previous = envfile.parse(subnet_file.read_bytes())
    except OSError:
        return None
    for finding in previous.findings:
        logger.warning("%s: %s", subnet_file, finding)
    return Lease(previous.subnet, previous.ipv6_subnet, Attributes()) if previous.subnet else None


def subnet_manager(options: Options, previous: Lease | None) -> SubnetManager:
    """The store that the flags ask for; raises ConfigError."""
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

    return SqliteManager(options.lease_db_path, options.net_config_path)


def until_available(what: str, call: Callable[[], T], stop: Event) -> T:
    """Repeat `call` until the store answers, with back-off; says so once per change of state.

    Raises Stopped when `stop` is set first. Whatever the kernel holds meanwhile stays in force.
    """
    trouble, delay_s = OncePerChange(), _RETRY_FIRST_S
    while not stop.is_set():
        try:
            result = call()
        except StoreUnavailable as exc:
            trouble.trouble(f"Waiting for the store ({what}): {exc}")
            stop.wait(delay_s)
            delay_s = min(delay_s * 2, _RETRY_LAST_S)
        else:
            trouble.over(f"The store answers again ({what})")
            return result
    raise Stopped


def external_interface(kernel: NetlinkKernel, options: Options, config: NetConf) -> ExternalInterface:
    """Choose the external interface and log why."""
    routes = kernel.routes(socket.AF_INET) + kernel.routes(socket.AF_INET6)
    host = iface.Host(
        links=kernel.links(),
        addresses=kernel.addresses(),
        defaults=[route for route in routes if route.dst in ("0.0.0.0/0", "::/0")],
        route_to=kernel.route_to,
    )
    wanted = iface.Wanted(
        iface=options.iface,
        iface_regex=options.iface_regex,
        iface_can_reach=options.iface_can_reach,
        public_ip=options.public_ip,
        public_ipv6=options.public_ipv6,
        ipv4=config.enable_ipv4,
        ipv6=config.enable_ipv6,
    )
    chosen = iface.select(host, wanted)
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
    kernel: NetlinkKernel, config: NetConf, external: ExternalInterface, own: Lease, peers: list[Lease]
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


def acquire(
    manager: SubnetManager,
    backend: Backend,
    config: NetConf,
    existing: NetState,
    previous: Lease | None,
    stop: Event,
) -> Lease:
    """Take our lease, keeping subnet and VTEP MAC of an earlier start wherever that is possible."""
    published = backend.attributes(None, existing)
    public_ip = published.public_ip or published.public_ipv6
    if public_ip is None:
        raise ConfigError("the lease would name no public IP; enable IPv4 or IPv6")
    stored = until_available("reading our lease", lambda: manager.stored(public_ip), stop)
    attrs = backend.attributes(stored, existing) if stored else published
    lease = until_available("taking a lease", lambda: manager.acquire(config, attrs, previous), stop)
    how = "kept" if stored and stored.key == lease.key else "new"
    logger.info("Lease acquired: %s (%s), public IP %s", lease.key, how, public_ip)
    return lease


def peers(manager: SubnetManager, own: Lease, stop: Event) -> list[Lease]:
    """Every lease but ours, as the store has them now."""
    for update in manager.watch(stop):
        return list(LeaseSet().fold(update).peers(own))
    raise Stopped


def build_backend(config: NetConf, external: ExternalInterface) -> Backend:
    """The backend of the configuration, logged as upstream does."""
    logger.info("Found network config - Backend type: %s", config.backend_type)
    return build(config, external, "the network configuration")


def new_devices(backend: Backend, existing: NetState) -> list[str]:
    """Which of the backend's devices do not exist yet: ours to remove should the start fail."""
    have = existing_links(existing)
    return [device for device in backend.devices if device not in have]
