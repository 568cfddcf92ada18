"""Which external interface carries the overlay, and why (upstream: pkg/ipmatch/match.go)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address

from cni.errors import ConfigError
from cni.net.netlink import (
    IFA_F_DEPRECATED,
    IFA_F_PERMANENT,
    IFA_F_TEMPORARY,
    RTN_UNICAST,
    AddressInfo,
    LinkInfo,
    RouteInfo,
)

IPAddress = IPv4Address | IPv6Address

_IFA_F_DADFAILED = 0x08  # linux/if_addr.h: another host on the link has this IPv6 address


@dataclass(frozen=True, slots=True)
class Host:
    """What the choice is made from: links, addresses, default routes, and a route look-up."""

    links: Sequence[LinkInfo]
    addresses: Sequence[AddressInfo]
    defaults: Sequence[RouteInfo]
    route_to: Callable[[str], RouteInfo | None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The flags that steer the choice, and the families that are enabled."""

    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    iface_can_reach: str = ""
    public_ip: str = ""
    public_ipv6: str = ""
    ipv4: bool = True
    ipv6: bool = False


@dataclass(frozen=True, slots=True)
class ExternalInterface:
    """The choice. `public_*` is what peers are told, `address*` what the interface has."""

    name: str
    mtu: int
    address: IPv4Address | None
    address6: IPv6Address | None
    public_ip: IPv4Address | None
    public_ipv6: IPv6Address | None
    reason: str


class _NoMatch(Exception):
    """One criterion found nothing; the text says what it looked for."""


def select(host: Host, wanted: Wanted) -> ExternalInterface:
    """Choose the external interface; raises ConfigError with every criterion that failed.

    `--iface` in order, then `--iface-regex` in order, then `--iface-can-reach`; with none of them the
    owner of the public IP, or the interface of the default route. There is no fall-back.
    """
    public_ip, public_ipv6 = _public(wanted)
    failures = []
    for look in _criteria(wanted):
        try:
            found = look(host, wanted)
            return _finish(host, wanted, found, public_ip, public_ipv6)
        except _NoMatch as exc:
            failures.append(str(exc))
    shown = ", ".join(_describe(host)) or "none with an address"
    raise ConfigError(f"no external interface: {'; '.join(failures)}. Interfaces here: {shown}")


def refresh(host: Host, wanted: Wanted, current: ExternalInterface) -> ExternalInterface:
    """The choice to hold on to while the daemon runs; raises ConfigError as `select`.

    As long as the interface keeps the addresses chosen at first, only its MTU is followed: an address
    that was added in front of them is no reason to tell peers another one.
    """
    link = next((link for link in host.links if link.name == current.name), None)
    if link is not None and link.mtu:
        # One that is deprecated meanwhile still serves.
        there = {a.address for a in host.addresses if a.ifindex == link.ifindex}
        if all(a is None or str(a) in there for a in (current.address, current.address6)):
            return replace(current, mtu=link.mtu)
    found = select(host, wanted)
    for have, new in ((current.address, found.address), (current.address6, found.address6)):
        if have and new and new.is_link_local and not have.is_link_local:
            raise ConfigError(
                f"{found.name} has lost {have} and has only {new}, which means nothing to other nodes"
            )
    return current if replace(found, reason=current.reason) == current else found


@dataclass(frozen=True, slots=True)
class _Found:
    link: LinkInfo
    reason: str
    addresses: tuple[IPAddress, ...] = ()


_Look = Callable[[Host, Wanted], _Found]


def _criteria(wanted: Wanted) -> Iterable[_Look]:
    if not (wanted.iface or wanted.iface_regex or wanted.iface_can_reach):
        name = wanted.public_ip or wanted.public_ipv6
        yield _by_name("--public-ip", name) if name else _by_default_route
        return
    for name in wanted.iface:
        yield _by_name("--iface", name)
    for pattern in wanted.iface_regex:
        yield _by_regex(pattern)
    if wanted.iface_can_reach:
        yield _by_reach(wanted.iface_can_reach)


def _by_name(flag: str, name: str) -> _Look:
    def look(host: Host, wanted: Wanted) -> _Found:
        literal = _parse(name)
        if literal is None:
            for named in host.links:
                if named.name == name:
                    return _Found(named, f"{flag}={name} names it")
            raise _NoMatch(f"{flag}={name}: no interface has this name")
        link = _owner(host, literal)
        if link is None:
            hint = "; a NATed public IP needs --iface as well" if flag == "--public-ip" else ""
            raise _NoMatch(f"{flag}={name}: no interface has this address{hint}")
        if literal in _duplicates(host, link):
            raise _NoMatch(f"{flag}={name}: {link.name} has this address, but another host has it too")
        if wanted.ipv4 and wanted.ipv6:
            _same_owner(host, wanted, literal, link, flag)
        return _Found(link, f"it has the address {flag}={name}", (literal,))

    return look


def _same_owner(host: Host, wanted: Wanted, literal: IPAddress, link: LinkInfo, flag: str) -> None:
    """Dual stack: the other family's public address must sit on the same interface."""
    other = _parse(wanted.public_ipv6)
    if other is None and literal.version == 6:
        raise _NoMatch(f"{flag}={literal}: an IPv6 address in dual stack needs --public-ipv6 as well")
    if other is not None and _owner(host, other) != link:
        raise _NoMatch(f"{flag}={literal} is on {link.name}, --public-ipv6={other} is not")


# RE2 (Go's syntax) has these, Python's `re` reads them as something else without a word.
_POSIX_CLASS = re.compile(r"\[:\^?[a-z]+:\]")


def _by_regex(pattern: str) -> _Look:
    def look(host: Host, wanted: Wanted) -> _Found:
        if unknown := _POSIX_CLASS.search(pattern):
            raise _NoMatch(
                f"--iface-regex={pattern}: {unknown[0]} is not supported; write a range such as a-z"
            )
        try:
            matches = re.compile(pattern).search
        except re.error as exc:
            raise _NoMatch(f"--iface-regex={pattern}: not a regular expression: {exc}") from None
        for link in host.links:
            found = [a for a in _usable(host, link) if matches(str(a))]
            by_version: dict[int, IPAddress] = {a.version: a for a in reversed(found)}
            if all(by_version.get(version) for version in _versions(wanted)):
                addresses = tuple(by_version[version] for version in _versions(wanted))
                shown = " and ".join(map(str, addresses))
                return _Found(link, f"its address {shown} matches --iface-regex={pattern}", addresses)
        for link in host.links:
            if matches(link.name):
                return _Found(link, f"its name matches --iface-regex={pattern}")
        raise _NoMatch(f"--iface-regex={pattern}: no interface's address or name matches")

    return look


def _by_reach(target: str) -> _Look:
    def look(host: Host, wanted: Wanted) -> _Found:
        if _parse(target) is None:
            raise _NoMatch(f"--iface-can-reach={target}: not an IP address")
        route = host.route_to(target)
        link = next((x for x in host.links if route and x.ifindex == route.ifindex), None)
        if route is None or link is None:
            raise _NoMatch(f"--iface-can-reach={target}: no route leads there")
        # An IPv6 source may be a temporary address, which peers must not be told: it is chosen as usual.
        source = _parse(route.source)
        fixed = (source,) if isinstance(source, IPv4Address) else ()
        return _Found(link, f"the route to --iface-can-reach={target} leaves by it", fixed)

    return look


def _by_default_route(host: Host, wanted: Wanted) -> _Found:
    links = []
    for version in _versions(wanted):
        any_address = "0.0.0.0/0" if version == 4 else "::/0"
        # The kernel shows `unreachable default` as a route by lo in IPv6; it leads nowhere.
        route = next((r for r in host.defaults if r.dst == any_address and r.kind == RTN_UNICAST), None)
        if route is None:
            raise _NoMatch(
                f"there is no IPv{version} default route in the main table; name the interface with --iface"
            )
        link = next((x for x in host.links if x.ifindex == route.ifindex), None)
        if link is None:
            raise _NoMatch(f"the IPv{version} default route names no single interface; name one with --iface")
        links.append(link)
    if links[0] != links[-1]:
        raise _NoMatch(
            f"the default routes leave by {links[0].name} (IPv4) and {links[-1].name} (IPv6), "
            "dual stack needs one interface; name it with --iface"
        )
    return _Found(links[0], "the default route leaves by it")


def _finish(
    host: Host,
    wanted: Wanted,
    found: _Found,
    public_ip: IPv4Address | None,
    public_ipv6: IPv6Address | None,
) -> ExternalInterface:
    link = found.link
    usable = [*found.addresses, *_usable(host, link)]
    address = next((a for a in usable if isinstance(a, IPv4Address)), None) if wanted.ipv4 else None
    address6 = next((a for a in usable if isinstance(a, IPv6Address)), None) if wanted.ipv6 else None
    for enabled, have, version in ((wanted.ipv4, address, 4), (wanted.ipv6, address6, 6)):
        if enabled and have is None:
            taken = ", ".join(str(a) for a in _duplicates(host, link) if a.version == version)
            why = f"; another host has {taken} too" if taken else ""
            raise _NoMatch(f"{link.name} ({found.reason}) has no usable IPv{version} address{why}")
    if link.mtu == 0:
        raise _NoMatch(f"{link.name} ({found.reason}) has an MTU of 0")
    return ExternalInterface(
        name=link.name,
        mtu=link.mtu,
        address=address,
        address6=address6,
        public_ip=public_ip or address,
        public_ipv6=public_ipv6 or address6,
        reason=found.reason,
    )


def _public(wanted: Wanted) -> tuple[IPv4Address | None, IPv6Address | None]:
    public_ip, public_ipv6 = _parse(wanted.public_ip), _parse(wanted.public_ipv6)
    if wanted.public_ip and not isinstance(public_ip, IPv4Address):
        raise ConfigError(f"--public-ip={wanted.public_ip} is not an IPv4 address")
    if wanted.public_ipv6 and not isinstance(public_ipv6, IPv6Address):
        raise ConfigError(f"--public-ipv6={wanted.public_ipv6} is not an IPv6 address")
    return (
        public_ip if isinstance(public_ip, IPv4Address) else None,
        public_ipv6 if isinstance(public_ipv6, IPv6Address) else None,
    )


def _versions(wanted: Wanted) -> list[int]:
    return [version for version, on in ((4, wanted.ipv4), (6, wanted.ipv6)) if on]


def _owner(host: Host, address: IPAddress) -> LinkInfo | None:
    indexes = {a.ifindex for a in host.addresses if a.address == str(address)}
    return next((link for link in host.links if link.ifindex in indexes), None)


def _duplicates(host: Host, link: LinkInfo) -> list[IPAddress]:
    """Addresses for which duplicate address detection failed: packets to them go to somebody else."""
    infos = (info for info in host.addresses if info.ifindex == link.ifindex)
    return [ip_address(info.address) for info in infos if info.flags & _IFA_F_DADFAILED]


def _usable(host: Host, link: LinkInfo) -> list[IPAddress]:
    """Usable addresses, best first: global before link-local, permanent before dynamic,
    non-temporary before temporary, else as the kernel lists them (upstream: pkg/ip/iface.go).

    Decision: an IPv6 address whose uniqueness is still being proven counts as any other. It will be in
    order a second later, and a choice that depends on the moment of the start would tell peers another
    address after each boot. One that was found to be a duplicate does not count.
    """
    duplicates = _duplicates(host, link)
    found = []
    for info in host.addresses:
        address = ip_address(info.address)
        unfit = address.is_loopback or address.is_multicast or address.is_unspecified
        if info.ifindex != link.ifindex or unfit or info.flags & IFA_F_DEPRECATED or address in duplicates:
            continue
        rank = (
            address.is_link_local,
            not info.flags & IFA_F_PERMANENT,
            address.version == 6 and bool(info.flags & IFA_F_TEMPORARY),
        )
        found.append((rank, address))
    found.sort(key=lambda pair: pair[0])
    return [address for _, address in found]


def _parse(text: str) -> IPAddress | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _describe(host: Host) -> list[str]:
    found = ((link.name, _usable(host, link)) for link in host.links)
    return [f"{name} ({', '.join(map(str, usable))})" for name, usable in found if usable]
