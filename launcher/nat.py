"""The masquerade binding's address translation, as one nftables transaction (KubeVirt's rules and names).

Decision: the transaction flushes our chains before it fills them, so that applying it twice is applying
it once; upstream appends, and a second run doubles every rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from launcher.binding import Handover

_PRE, _POST = "KUBEVIRT_PREINBOUND", "KUBEVIRT_POSTINBOUND"
_BASE = (
    ("prerouting", "prerouting", -100),
    ("input", "input", 100),
    ("output", "output", -100),
    ("postrouting", "postrouting", 100),
)


@dataclass(frozen=True, slots=True)
class Port:
    """A port of the machine that the pod passes on; without any, everything is passed on."""

    number: int
    protocol: str = "tcp"


def transaction(handover: Handover, interface: str, ports: tuple[Port, ...]) -> str:
    """Text for `nft -f -` that brings both families' chains to the wanted state."""
    families = [
        (family, guest.ip, server.ip)
        for family, guest, server in (
            ("ip", handover.guest4, handover.server4),
            ("ip6", handover.guest6, handover.server6),
        )
        if guest and server
    ]
    lines: list[str] = []
    for family, guest, gateway in families:
        lines += _chains(family)
        lines += _rules(family, guest, gateway, interface, handover.names.bridge, ports)
    return "".join(f"{line}\n" for line in lines)


def removal(family: str) -> str:
    """Text for `nft -f -` that removes our chains from a family's table `nat`; the table must exist."""
    names = [*(name for name, _, _ in _BASE), _PRE, _POST]
    lines = [f"flush chain {family} nat {name}" for name in names]
    lines += [f"delete chain {family} nat {name}" for name in names]
    return "".join(f"{line}\n" for line in lines)


def _chains(family: str) -> Iterator[str]:
    yield f"add table {family} nat"
    for name, hook, priority in _BASE:
        yield f"add chain {family} nat {name} {{ type nat hook {hook} priority {priority} ; }}"
    for name in (_PRE, _POST):
        yield f"add chain {family} nat {name}"
    for name in (*(name for name, _, _ in _BASE), _PRE, _POST):
        yield f"flush chain {family} nat {name}"


def _rules(
    family: str,
    guest: IPv4Address | IPv6Address,
    gateway: IPv4Address | IPv6Address,
    interface: str,
    bridge: str,
    ports: tuple[Port, ...],
) -> Iterator[str]:
    loopback = "127.0.0.1" if family == "ip" else "::1"
    rule = f"add rule {family} nat"
    yield f"{rule} postrouting {family} saddr {guest} counter masquerade"
    yield f'{rule} prerouting iifname "{interface}" counter jump {_PRE}'
    yield f'{rule} postrouting oifname "{bridge}" counter jump {_POST}'
    if not ports:
        yield f"{rule} {_PRE} counter dnat to {guest}"
        yield f"{rule} {_POST} {family} saddr {{ {loopback} }} counter snat to {gateway}"
        yield f"{rule} output {family} daddr {{ {loopback} }} counter dnat to {guest}"
    for port in ports:
        match = f"{port.protocol} dport {port.number}"
        yield f"{rule} {_PRE} {port.protocol} dport {{ {port.number} }} counter dnat to {guest}"
        yield f"{rule} {_POST} {match} {family} saddr {{ {loopback} }} counter snat to {gateway}"
        yield f"{rule} output {family} daddr {{ {loopback} }} {match} counter dnat to {guest}"
