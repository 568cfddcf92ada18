"""How the virtual machine gets at the pod's network: as values, nothing is touched here.

*bridge*: the machine takes over the pod's address and MAC.

    CNI bridge ── X-nic (the pod's interface, other MAC, no address) ┐
                  tap0 ── the machine: pod's MAC, pod's address by DHCP ├─ k6t-X (169.254.75.10)
                  X  (holder: the old name, MAC and addresses, never up) ┘ not on the bridge

*masquerade*: the machine has a private address; what the pod receives is translated to it.

    CNI bridge ── X (untouched) ── NAT ── k6t-X (10.0.2.1, fd10:0:2::1) ── tap0 ── the machine (10.0.2.2)

The holder keeps the name and the addresses for CNI's CHECK and DEL and for whoever looks at the pod. It
makes the pod's address a local one, so the pod would answer the machine's duplicate-address probe, and would
drop what the machine sends to it (a DHCP renewal) as having a local source.

Decision: the bridge of the bridge binding has ARP switched off and everything it says to the machine (DHCP,
the answer to who has the server's address) is said by our server through a packet socket, which sees frames
before the kernel judges their source. Upstream's arp_ignore=1 keeps the probe unanswered too, but loses
renewals; and settings below /proc/sys cannot be written in an ordinary pod, a link's flags can.

Decision: the holder is a bridge without ports, not a dummy link. The effect is the same and a kernel that
can do the bridge binding has it; the dummy module may be missing.

Decision: one server address for every bridge, 169.254.75.10, instead of one that counts interfaces in two
places which do not always agree. No kernel answers for it, so it may be there more than once.

Source: KubeVirt pkg/network/setup/netpod (v1.9).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from typing import Literal

from cni.errors import ConfigError
from cni.net.entries import Address, Entry, NetState, Route, state
from cni.net.podlinks import POD_NIC, Bridge, Nic, PodScope, Sysctl, Tap
from launcher.discover import PodInterface

Binding = Literal["bridge", "masquerade"]

SERVER = IPv4Interface("169.254.75.10/32")
FORWARD4, FORWARD6 = "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"
NAMESPACE_SYSCTLS = (FORWARD4, FORWARD6)
MASQUERADE_MAC = "02:00:00:00:00:00"
MASQUERADE_NETWORK = IPv4Network("10.0.2.0/24")
MASQUERADE_NETWORK6 = IPv6Network("fd10:0:2::/120")
MTU_MIN, MTU_MIN_IPV6 = 68, 1280
_NAME_MAX = 15


@dataclass(frozen=True, slots=True)
class Names:
    """What the links are called (KubeVirt's rules)."""

    bridge: str
    nic: str
    tap: str

    @classmethod
    def of(cls, interface: str, primary: bool) -> Names:
        """For a pod interface; raises ConfigError when its name leaves no room for ours."""
        base = interface.removeprefix("pod")
        names = cls(f"k6t-{base}", f"{base}-nic", "tap0" if primary else f"tap{interface[3:]}")
        for name in (names.bridge, names.nic, names.tap):
            if len(name) > _NAME_MAX:
                raise ConfigError(
                    f"--interface={interface}: {name} would be longer than {_NAME_MAX} characters"
                )
        return names


@dataclass(frozen=True, slots=True)
class Handover:
    """One interface's plan: what the namespace shall hold, and what it held before."""

    binding: Binding
    names: Names
    scope: PodScope
    desired: NetState
    undo: NetState
    guest4: IPv4Interface | None
    guest6: IPv6Interface | None
    guest_mac: str
    server4: IPv4Interface | None
    server6: IPv6Interface | None
    bridge_mac: str
    mtu: int


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user may ask of a plan. `before` are the settings as they were, for the way back."""

    binding: Binding
    primary: bool = True
    mtu: int = 0
    queues: int = 1
    network: IPv4Network = MASQUERADE_NETWORK
    network6: IPv6Network = MASQUERADE_NETWORK6
    before: tuple[Sysctl, ...] = ()


def plan_handover(pod: PodInterface, wishes: Wishes) -> Handover:
    """Plan the hand-over of `pod`; raises ConfigError for what cannot be done."""
    mtu = wishes.mtu or pod.mtu
    smallest = MTU_MIN_IPV6 if pod.ipv6 else MTU_MIN
    if not smallest <= mtu <= pod.mtu:
        raise ConfigError(f"MTU {mtu}: it must be from {smallest} to {pod.mtu}, the MTU of {pod.name}")
    names = Names.of(pod.name, wishes.primary)
    tap = Tap(names.tap, mtu, names.bridge, up=True, multi_queue=wishes.queues > 1)
    if wishes.binding == "bridge":
        return _bridge(pod, wishes, names, tap)
    return _masquerade(pod, wishes, names, tap)


def sysctls(binding: Binding, bridge: str, pod: PodInterface) -> tuple[Sysctl, ...]:
    """The settings that a binding needs for the pod's families; those that name the bridge vanish with it."""
    needed: list[Sysctl] = []
    if binding == "masquerade" and pod.ipv4:
        needed.append(Sysctl(FORWARD4, "1"))
        needed.append(Sysctl(f"net/ipv4/conf/{bridge}/route_localnet", "1"))
    if binding == "masquerade" and pod.ipv6:
        needed.append(Sysctl(FORWARD6, "1"))
    return tuple(needed)


def dispensable(setting: Sysctl) -> bool:
    """Whether the hand-over is of use without it: only the pod's own loopback is then not passed on."""
    return setting.path.endswith("/route_localnet")


def _bridge(pod: PodInterface, wishes: Wishes, names: Names, tap: Tap) -> Handover:
    server = SERVER if pod.ipv4 else None
    mac = derived_mac(pod.mac)
    desired: list[Entry] = [
        # Until it is told otherwise a bridge takes the smallest MTU of its ports, which is the tap's.
        Bridge(names.bridge, mac, tap.mtu, up=True, arp=False),
        # Not learning: the machine's own broadcasts, reflected by a hairpin port of the CNI bridge, would
        # move its MAC to the wrong port.
        Nic(pod.ifindex, names.nic, mac, up=True, master=names.bridge, learning=False),
        Bridge(pod.name, pod.mac, pod.mtu, up=False),
        tap,
        *(Address(pod.name, str(address)) for address in pod.addresses),
    ]
    if server:
        desired.append(Address(names.bridge, str(server)))
    return Handover(
        binding="bridge",
        names=names,
        scope=PodScope(pod.ifindex, (names.bridge, pod.name, names.tap), ()),
        desired=state(desired),
        undo=state(_untouched(pod)),
        guest4=pod.ipv4,
        guest6=pod.ipv6,
        guest_mac=pod.mac,
        server4=server,
        server6=None,
        bridge_mac=mac,
        mtu=tap.mtu,
    )


def _masquerade(pod: PodInterface, wishes: Wishes, names: Names, tap: Tap) -> Handover:
    if pod.ipv4 is None and pod.ipv6 is None:
        raise ConfigError(
            f"{pod.name} has no address to masquerade with; use --binding=bridge for a pod without one"
        )
    for network in (wishes.network, wishes.network6):
        if network.prefixlen > network.max_prefixlen - 2:
            raise ConfigError(f"network {network} has no room for a gateway and a machine; use a wider one")
        for taken in (pod.ipv4, pod.ipv6, pod.gateway(4), pod.gateway(6)):
            if taken is not None and taken in network:
                raise ConfigError(f"network {network} holds {taken}, which the pod uses; choose another one")
    server4 = IPv4Interface((wishes.network[1], wishes.network.prefixlen)) if pod.ipv4 else None
    server6 = IPv6Interface((wishes.network6[1], wishes.network6.prefixlen)) if pod.ipv6 else None
    settings = sysctls("masquerade", names.bridge, pod)
    desired: list[Entry] = [Bridge(names.bridge, MASQUERADE_MAC, tap.mtu, up=True), tap, *settings]
    desired += [Address(names.bridge, str(server)) for server in (server4, server6) if server]
    return Handover(
        binding="masquerade",
        names=names,
        scope=PodScope(0, (names.bridge, names.tap), tuple(setting.path for setting in settings)),
        desired=state(desired),
        undo=state(list(wishes.before)),
        guest4=IPv4Interface((wishes.network[2], wishes.network.prefixlen)) if pod.ipv4 else None,
        guest6=IPv6Interface((wishes.network6[2], wishes.network6.prefixlen)) if pod.ipv6 else None,
        guest_mac=pod.mac,
        server4=server4,
        server6=server6,
        bridge_mac=MASQUERADE_MAC,
        mtu=tap.mtu,
    )


def _untouched(pod: PodInterface) -> Iterator[Entry]:
    """The pod's interface as it was found."""
    yield Nic(pod.ifindex, pod.name, pod.mac, up=True, master="", learning=True)
    for address in pod.addresses:
        yield Address(POD_NIC, str(address))
    # A gateway can be named once there is a route to it: those without one come first.
    for route in sorted(pod.routes, key=lambda route: route.via is not None):
        if not route.connected:
            via = str(route.via) if route.via else ""
            yield Route(POD_NIC, str(route.dst), via, route.onlink, route.metric)


def derived_mac(mac: str) -> str:
    """A locally administered unicast MAC that follows from the pod's: the same after a restart."""
    digest = bytearray(hashlib.sha256(mac.encode()).digest()[:6])
    digest[0] = (digest[0] & 0xFC) | 0x02
    return digest.hex(":")
