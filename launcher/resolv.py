"""The pod's resolver configuration, as the guest gets it: text in, values out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

# KubeVirt's values for a pod that names no server or no domain.
DEFAULT_NAMESERVER = IPv4Address("8.8.8.8")
DEFAULT_SEARCH = "cluster.local"


@dataclass(frozen=True, slots=True)
class Resolver:
    """Name servers by family, and the search list in lower case; names are not checked further."""

    ipv4: tuple[IPv4Address, ...]
    ipv6: tuple[IPv6Address, ...]
    search: tuple[str, ...]


def parse(text: str) -> Resolver:
    """Return what resolv.conf(5) says in `text`. Lines that say nothing usable are skipped.

    Several `search` lines add up. Without any name server it is 8.8.8.8, without any search
    domain cluster.local. `domain` and `options` have no place in DHCP and are ignored.
    """
    servers: list[IPv4Address | IPv6Address] = []
    search: list[str] = []
    for line in text.splitlines():
        match line.split():
            case ["nameserver", word, *_]:
                servers += _server(word)
            case ["search", *names]:
                search += (name.lower() for name in names)
    ipv4 = tuple(server for server in servers if isinstance(server, IPv4Address))
    ipv6 = tuple(server for server in servers if isinstance(server, IPv6Address))
    if not servers:
        ipv4 = (DEFAULT_NAMESERVER,)
    return Resolver(ipv4, ipv6, tuple(search) or (DEFAULT_SEARCH,))


def _server(word: str) -> list[IPv4Address | IPv6Address]:
    """The address in `word`, if it is one that means the same to the guest as to the pod."""
    try:
        server = ip_address(word)
    except ValueError:
        return []
    if isinstance(server, IPv6Address):
        # A zone names an interface of the pod; the guest has none of this name.
        return [] if server.scope_id else [server.ipv4_mapped or server]
    return [server]


def with_subdomain(search: Sequence[str], subdomain: str) -> tuple[str, ...]:
    """Return `search` with the pod's own subdomain in front (pod.spec.subdomain; empty for none).

    It is put before the longest domain that holds `.svc.`, the one of the pod's namespace; nothing
    changes if there is no such domain or it is the subdomain's already.
    """
    services = max((name for name in search if ".svc." in name), key=len, default="")
    if not subdomain or not services or services.startswith(f"{subdomain}."):
        return tuple(search)
    return (f"{subdomain}.{services}", *search)
