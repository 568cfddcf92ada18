"""Which proxy leads to a server: the variables that Go programs heed, by Go's rules.

The standard library and httpx know no ranges in NO_PROXY, where clusters have their service range.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address, ip_network


def proxy_for(scheme: str, host: str, port: int | None, environ: Mapping[str, str]) -> str | None:
    """The proxy through which `scheme://host:port` is reached; None for none (Go: http.ProxyFromEnvironment).

    HTTPS_PROXY or HTTP_PROXY, unless the host is this one or in NO_PROXY: a list of names (with all below
    them), of addresses and of ranges, each with a port if wanted; `*` is everything.
    """
    found = _variable(environ, f"{scheme}_proxy")
    exceptions = _variable(environ, "no_proxy").lower().split(",")
    shown = str(port or (443 if scheme == "https" else 80))
    if (
        not found
        or _is_local(host)
        or any(_excepts(each.strip(), host.lower(), shown) for each in exceptions)
    ):
        return None
    return found if "://" in found else f"http://{found}"


def _variable(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name.upper()) or environ.get(name) or ""


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _excepts(entry: str, host: str, port: str) -> bool:
    """Whether one entry of NO_PROXY is about `host`."""
    with suppress(ValueError):
        network = ip_network(entry, strict=False)
        with suppress(ValueError):
            return ip_address(host) in network
        return False
    name, _, entry_port = entry.rpartition(":")
    if name and entry_port.isdigit():
        return entry_port == port and _excepts(name.strip("[]"), host, port)
    if entry in ("*", host):
        return True
    tail = entry.removeprefix("*").removeprefix(".")
    return tail != "" and host.endswith(f".{tail}")
