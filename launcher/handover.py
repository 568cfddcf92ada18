"""Discover, plan, apply, undo: one pod interface in the calling thread's network namespace."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv6Address
from pathlib import Path
from random import SystemRandom

from cni.errors import ConfigError, KernelError
from cni.net import netns
from cni.net.firewall import run_nft
from cni.net.kernel import NetlinkKernel
from cni.net.plan import Operation, plan
from cni.net.podkernel import PodKernel, read_sysctl
from cni.net.podlinks import Foreign, Sysctl
from launcher import nat, settings, state
from launcher.binding import Handover, Names, Wishes, dispensable, plan_handover, sysctls
from launcher.dhcp.server import Server
from launcher.discover import PodInterface, discover, find
from launcher.host import Host, Link
from launcher.ipv6.server import Server6
from launcher.log import logger
from launcher.settings import Settings
from launcher.state import Place, State

# Only the initial namespace has these: whatever the node's own processes use, no pod does.
_HOST_ONLY = Path("/proc/sys/net/core/netdev_budget")
_MAX_PASSES = 3


@dataclass(frozen=True, slots=True)
class Pod:
    """A hand-over that is planned: what was found and wanted, and what follows from it."""

    state: State
    handover: Handover

    @property
    def nat(self) -> str:
        """The nftables transaction of a masquerade binding, empty for others."""
        if self.handover.binding != "masquerade":
            return ""
        return nat.transaction(self.handover, self.state.pod.name, self.state.settings.ports)


def refuse_host(force: bool) -> None:
    """Raise ConfigError in the node's own namespace, whose interface no machine may have."""
    if _HOST_ONLY.exists() and not force:
        raise ConfigError(
            "this is the node's own network namespace: handing its interface over would cut the node off; "
            "run inside the pod, or name its namespace with --netns (--force does it all the same)"
        )


def here() -> Place:
    """This namespace and boot."""
    device, inode = netns.identity()
    return Place(device, inode, state.boot_id())


def recall(directory: Path) -> Pod | None:
    """What an earlier launcher planned here, None if none did. Raises ConfigError for a foreign state."""
    known = state.load(directory, here())
    return Pod(known, _plan(known.pod, known.settings, known.before)) if known else None


def look(interface: str, wanted: Settings) -> Pod:
    """Discover the pod's interface and plan; changes nothing. Raises ConfigError."""
    kernel = NetlinkKernel()
    pods = PodKernel(0, wanted.owner)
    try:
        routes = kernel.routes(socket.AF_INET) + kernel.routes(socket.AF_INET6)
        links = pods.links()
        taken = [other.name for other in links if other.name.startswith("k6t-")]
        names = Names.of(interface, wanted.primary) if interface else None
        if taken and (names is None or names.bridge in taken):
            raise ConfigError(
                f"the interface is already handed over ({taken[0]} exists) and --state-dir does not know of "
                "it: its state is lost or another program did it; start the pod anew"
            )
        link = find(links, routes, interface)
        names = Names.of(link.name, wanted.primary)
        pod = discover(link, kernel.addresses(), routes)
    finally:
        kernel.close()
        pods.close()
    before = tuple(
        Sysctl(setting.path, value)
        for setting in sysctls(wanted.binding, names.bridge, pod)
        if names.bridge not in setting.path and (value := read_sysctl(setting.path)) is not None
    )
    planned = Pod(State(here(), wanted, pod, before), _plan(pod, wanted, before))
    services(planned)  # what cannot be told to the guest is refused before anything is changed
    _check_names(planned, {other.name: other.kind for other in links})
    return planned


def _check_names(pod: Pod, links: dict[str, str]) -> None:
    tap = pod.handover.names.tap
    if tap in links:
        raise ConfigError(f"{tap} exists already ({links[tap] or 'plain'} link): something else uses it here")
    if pod.handover.binding == "bridge" and pod.handover.names.nic in links:
        raise ConfigError(f"{pod.handover.names.nic} exists already: the interface was handed over before")


def _plan(pod: PodInterface, wanted: Settings, before: tuple[Sysctl, ...]) -> Handover:
    network, network6 = settings.networks(wanted)
    wishes = Wishes(
        binding=wanted.binding,
        primary=wanted.primary,
        mtu=wanted.mtu,
        queues=wanted.queues,
        network=network,
        network6=network6,
        before=before,
    )
    return plan_handover(pod, wishes)


def operations(pod: Pod) -> list[Operation]:
    """What is left to do."""
    kernel = _kernel(pod)
    try:
        return plan(pod.handover.desired, kernel.snapshot(pod.handover.scope))
    finally:
        kernel.close()


def apply(pod: Pod, directory: Path) -> int:
    """Bring the namespace to the plan, from wherever an earlier run got to; returns how much was to do.

    The state is on disk before the first change. Raises KernelError with what the kernel refused.
    """
    state.save(directory, pod.state)
    done = _carry_out(pod, operations)
    if pod.nat:
        run_nft(pod.nat)
    return done


def restore(pod: Pod, directory: Path) -> int:
    """Give the pod its interface back as it was found, and forget the state; returns how much was to do."""
    done = _carry_out(pod, _way_back)
    if pod.nat:
        _remove_nat()
    state.remove(directory)
    return done


def _way_back(pod: Pod) -> list[Operation]:
    kernel = _kernel(pod)
    try:
        todo = plan(pod.handover.undo, kernel.snapshot(pod.handover.scope))
    finally:
        kernel.close()
    todo = [op for op in todo if not isinstance(op.entry, Foreign)]
    # The names and addresses have to be free before the interface can have them again.
    return [op for op in todo if op.verb == "drop"] + [op for op in todo if op.verb == "put"]


def _remove_nat() -> None:
    for family in ("ip", "ip6"):
        try:
            run_nft(nat.removal(family))
        except KernelError as exc:
            logger.debug("no translation of family %s to remove: %s", family, exc)


def _kernel(pod: Pod) -> PodKernel:
    return PodKernel(pod.handover.scope.nic, pod.state.settings.owner)


def _carry_out(pod: Pod, remaining: Callable[[Pod], list[Operation]]) -> int:
    """Do what remains until nothing does: a link that is put down takes IPv6 addresses with it."""
    done = 0
    todo = remaining(pod)
    for _ in range(_MAX_PASSES):
        if not todo:
            return done
        _once(pod, todo)
        done += len(todo)
        todo = [operation for operation in remaining(pod) if not _dispensable(operation)]
    if todo:
        raise KernelError(f"the namespace does not hold the plan: {describe(todo[0])} is still to do")
    return done


def _once(pod: Pod, todo: Sequence[Operation]) -> None:
    kernel = _kernel(pod)
    try:
        for operation in todo:
            logger.debug("%s", describe(operation))
        refused = kernel.apply(todo)
    finally:
        kernel.close()
    for passed_over in (r for r in refused if _dispensable(r.operation)):
        logger.warning("%s was refused: %s", describe(passed_over.operation), passed_over.text)
    refused = [r for r in refused if not _dispensable(r.operation)]
    if refused:
        first = refused[0]
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise KernelError(
            f"{describe(first.operation)} was refused: {first.text}{more}; "
            "it needs CAP_NET_ADMIN, /dev/net/tun, and settings below /proc/sys that are set or can be"
        )


def _dispensable(operation: Operation) -> bool:
    return isinstance(operation.entry, Sysctl) and dispensable(operation.entry)


def describe(operation: Operation) -> str:
    """One operation as a line for a person."""
    fields = operation.entry._asdict() if hasattr(operation.entry, "_asdict") else {}
    shown = " ".join(f"{name}={value}" for name, value in fields.items() if value not in ("", None))
    return f"{operation.verb} {type(operation.entry).__name__.lower()} {shown}"


def services(pod: Pod) -> tuple[Server | None, Server6 | None]:
    """The servers that the plan calls for. Raises ConfigError for what cannot be told to a guest."""
    settings.check_guest_mac(pod.state.settings, pod.handover)
    lease = settings.dhcp_lease(pod.state.settings, pod.state.pod, pod.handover)
    lease6 = settings.dhcp6_lease(pod.state.settings, pod.handover)
    settings.router(pod.state.settings, pod.state.pod, pod.handover)
    return Server(lease) if lease else None, Server6(lease6) if lease6 else None


def host(pod: Pod) -> Host:
    """The other end of the guest's link."""
    plan_, found = pod.handover, pod.state.pod
    dhcp, dhcp6 = services(pod)
    bridge = plan_.binding == "bridge"
    gateway = found.gateway(6) if bridge else None
    guest = settings.guest_mac(pod.state.settings, plan_)
    return Host(
        Link(
            mac=bytes.fromhex(plan_.bridge_mac.replace(":", "")),
            guest_mac=bytes.fromhex(guest.replace(":", "").replace("-", "")) if bridge else None,
            server4=plan_.server4.ip if plan_.server4 else None,
            arp=bridge,
            gateway6=gateway if isinstance(gateway, IPv6Address) else None,
        ),
        dhcp,
        dhcp6,
        settings.router(pod.state.settings, found, plan_),
        time.monotonic(),
        SystemRandom(),
    )


def with_settings(pod: Pod, wanted: Settings) -> Pod:
    """The same hand-over with what the guest is told taken from `wanted`.

    Raises ConfigError if `wanted` asks for another shape of the namespace.
    """
    have = pod.state.settings
    for name in ("binding", "primary", "queues", "mtu", "owner", "network", "network6"):
        if getattr(have, name) != getattr(wanted, name):
            raise ConfigError(
                f"{pod.state.pod.name} is already handed over with {name}={getattr(have, name)}, "
                f"not {getattr(wanted, name)}; give it back first: virt-launcher restore"
            )
    changed = Pod(replace(pod.state, settings=wanted), pod.handover)
    services(changed)
    return changed
