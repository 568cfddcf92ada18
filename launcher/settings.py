"""What the user asked for, checked, and as JSON for the state file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, Literal

from cni.errors import ConfigError
from launcher.binding import MASQUERADE_NETWORK, MASQUERADE_NETWORK6, Binding, Handover
from launcher.dhcp.options import ClasslessRoute, mac_address, search_domain
from launcher.dhcp.server import DEFAULT_LEASE_S, DhcpLease
from launcher.discover import PodInterface
from launcher.ipv6.advert import Prefix, RouterAdvert
from launcher.ipv6.packet import duid_ll
from launcher.ipv6.server import Dhcp6Lease
from launcher.nat import Port

MAX_QUEUES = 256
MAX_USER = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of one hand-over. Text where the user wrote text; `check` refuses what cannot be right.

    `mac` is the guest's, empty for the pod's; `dns`, `search` are the pod's unless given; `lease_s` seconds.
    """

    binding: Binding = "bridge"
    primary: bool = True
    queues: int = 1
    mtu: int = 0
    mac: str = ""
    hostname: str = ""
    dns: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    ntp: tuple[str, ...] = ()
    private: Mapping[int, str] = field(default_factory=dict)
    boot_file: str = ""
    tftp_server: str = ""
    lease_s: int = DEFAULT_LEASE_S
    ports: tuple[Port, ...] = ()
    network: str = str(MASQUERADE_NETWORK)
    network6: str = str(MASQUERADE_NETWORK6)
    owner: int = 107

    def check(self) -> None:
        """Raise ConfigError naming the option, its value and the rule."""
        if self.binding not in ("bridge", "masquerade"):
            raise ConfigError(f"--binding={self.binding}: it must be bridge or masquerade")
        if not 1 <= self.queues <= MAX_QUEUES:
            raise ConfigError(f"--queues={self.queues}: it must be from 1 to {MAX_QUEUES}")
        if self.mac:
            try:
                mac_address(self.mac)
            except ValueError as exc:
                raise ConfigError(f"--mac={self.mac}: {exc}") from None
        for flag, values in (("--dns", self.dns), ("--ntp", self.ntp)):
            for value in values:
                _address(flag, value)
        for name in self.search:
            try:
                search_domain(name)
            except ValueError as exc:
                raise ConfigError(f"--search={name}: {exc}") from None
        if not 0 <= self.owner <= MAX_USER:
            raise ConfigError(f"--tap-owner={self.owner}: it must be from 0 to {MAX_USER}")
        _network("--network", self.network, 4)
        _network("--network6", self.network6, 6)


def _address(flag: str, text: str) -> IPv4Address | IPv6Address:
    try:
        return ip_address(text)
    except ValueError:
        raise ConfigError(f"{flag}={text}: it is no IP address") from None


def _network(flag: str, text: str, version: Literal[4, 6]) -> IPv4Network | IPv6Network:
    try:
        return IPv4Network(text, strict=False) if version == 4 else IPv6Network(text, strict=False)
    except ValueError:
        raise ConfigError(f"{flag}={text}: it is no IPv{version} network such as 10.0.2.0/24") from None


def networks(settings: Settings) -> tuple[IPv4Network, IPv6Network]:
    """The masquerade binding's networks."""
    return IPv4Network(settings.network, strict=False), IPv6Network(settings.network6, strict=False)


def guest_mac(settings: Settings, handover: Handover) -> str:
    """The guest's MAC: the one asked for, else the pod's."""
    return settings.mac.lower() or handover.guest_mac


def check_guest_mac(settings: Settings, handover: Handover) -> None:
    """Raise ConfigError if the guest would have the bridge's MAC: frames to it would end there."""
    mac = guest_mac(settings, handover)
    if mac.replace("-", ":") == handover.bridge_mac:
        raise ConfigError(f"--mac={mac}: the bridge {handover.names.bridge} has this MAC; give another one")


def dhcp_lease(settings: Settings, pod: PodInterface, handover: Handover) -> DhcpLease | None:
    """What the guest is told over IPv4; None without an address. Raises ConfigError."""
    if handover.guest4 is None or handover.server4 is None:
        return None
    bridge = handover.binding == "bridge"
    gateway = pod.gateway(4) if bridge else handover.server4.ip
    try:
        return DhcpLease(
            # On a masquerade bridge there is nobody but the guest, whatever its MAC.
            mac=guest_mac(settings, handover) if bridge else None,
            address=handover.guest4,
            server_id=handover.server4.ip,
            routers=(gateway,) if isinstance(gateway, IPv4Address) else (),
            dns=tuple(a for a in map(ip_address, settings.dns) if isinstance(a, IPv4Address)),
            search=settings.search,
            hostname=settings.hostname or None,
            mtu=handover.mtu,
            ntp=tuple(a for a in map(ip_address, settings.ntp) if isinstance(a, IPv4Address)),
            routes=_routes(pod) if bridge else (),
            lease_s=settings.lease_s,
            tftp_server=settings.tftp_server or None,
            boot_file=settings.boot_file or None,
            private=settings.private,
        )
    except ValueError as exc:
        raise ConfigError(str(exc)) from None


def _routes(pod: PodInterface) -> tuple[ClasslessRoute, ...]:
    """The pod's IPv4 routes but that of its own subnet, which follows from the mask."""
    own = pod.ipv4.network if pod.ipv4 else None
    routes: list[ClasslessRoute] = []
    for route in pod.routes:
        if isinstance(route.dst, IPv4Network) and route.dst != own and not isinstance(route.via, IPv6Address):
            routes.append((route.dst, route.via))
    gateway = pod.gateway(4)
    if own and isinstance(gateway, IPv4Address) and gateway not in own:
        # A gateway outside of the subnet (Calico's 169.254.1.1) is a neighbour all the same.
        host: ClasslessRoute = (IPv4Network(gateway), None)
        if host not in routes:
            routes.insert(0, host)
    return tuple(routes)


def dhcp6_lease(settings: Settings, handover: Handover) -> Dhcp6Lease | None:
    """What the guest is told over IPv6; None without an address. Raises ConfigError."""
    if handover.guest6 is None:
        return None
    return Dhcp6Lease(
        address=handover.guest6.ip,
        server_duid=duid_ll(handover.bridge_mac),
        # DHCPv6 clients make DUIDs of any MAC they ever had; who asks is told by the frame.
        mac=None,
        dns=tuple(a for a in map(ip_address, settings.dns) if isinstance(a, IPv6Address)),
        search=settings.search,
        ntp=tuple(a for a in map(ip_address, settings.ntp) if isinstance(a, IPv6Address)),
        hostname=settings.hostname,
        preferred_s=settings.lease_s,
        valid_s=settings.lease_s,
    )


def router(settings: Settings, pod: PodInterface, handover: Handover) -> RouterAdvert | None:
    """How the guest gets its IPv6 default route; None without an address or a gateway."""
    if handover.guest6 is None:
        return None
    bridge = handover.binding == "bridge"
    if bridge and pod.gateway(6) is None:
        return None
    return RouterAdvert(
        prefixes=(Prefix(handover.guest6.network),),
        mac=None if bridge else handover.bridge_mac,
        mtu=handover.mtu,
        dns=tuple(a for a in map(ip_address, settings.dns) if isinstance(a, IPv6Address)),
        search=settings.search,
    )


def to_json(settings: Settings) -> dict[str, object]:
    """The record for the state file."""
    record = asdict(settings)
    record["private"] = {str(code): value for code, value in settings.private.items()}
    return record


def from_json(record: Mapping[str, Any]) -> Settings:
    """Read `to_json`'s record; raises ValueError, TypeError or KeyError for anything else."""
    fields = dict(record)  # Any: names and types are those that `to_json` wrote, or the constructor refuses
    private, ports = fields.pop("private"), fields.pop("ports")
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return Settings(
        **(fields | lists),
        private={int(code): str(value) for code, value in private.items()},
        ports=tuple(Port(**port) for port in ports),
    )
