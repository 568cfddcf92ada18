"""subnet.env: what the CNI plugin reads to build its delegate, and what the next start takes up again."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from cni.errors import ConfigError
from flanneld.config import NetConf, NetworkT, parse_cidr
from flanneld.lease import Lease


def render(conf: NetConf, lease: Lease, mtu_bytes: int, ip_masq: bool) -> str:
    """Return the file's text: upstream's keys, in its order, for the enabled families.

    A subnet is written as its first host address with the subnet's length, which is the address of
    the bridge. IPv6 text is that of RFC 5952. Raises ConfigError when an enabled family lacks its
    network or subnet, or when the subnet has no room for that address.
    """
    lines = []
    if conf.enable_ipv4:
        network, subnet = _both("IPv4", conf.network, lease.subnet)
        lines += [f"FLANNEL_NETWORK={network}", f"FLANNEL_SUBNET={subnet}"]
    if conf.enable_ipv6:
        network, subnet = _both("IPv6", conf.ipv6_network, lease.subnet6)
        lines += [f"FLANNEL_IPV6_NETWORK={network}", f"FLANNEL_IPV6_SUBNET={subnet}"]
    lines += [f"FLANNEL_MTU={mtu_bytes}", f"FLANNEL_IPMASQ={'true' if ip_masq else 'false'}"]
    return "\n".join(lines) + "\n"


def _both(family: str, network: NetworkT | None, subnet: NetworkT | None) -> tuple[str, str]:
    prefix = family.replace("IPv4", "")
    if network is None:
        raise ConfigError(f"{prefix}Network is not set: give it, or set Enable{family} to false")
    if subnet is None:
        raise ConfigError(
            f"the lease has no {family} subnet: give this node one, or set Enable{family} to false"
        )
    if subnet.num_addresses < 2:
        raise ConfigError(
            f"the leased subnet {subnet} is a single address: it must be "
            f"/{subnet.max_prefixlen - 1} or wider, to have a first host address"
        )
    return str(network), f"{subnet.network_address + 1}/{subnet.prefixlen}"


def write(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file in one step, mode 0644 whatever the umask, on disk when this returns.

    A missing directory is made with 0755. On failure the old file stands, no temporary one is left,
    and ConfigError names the file and the cause.
    """
    target = Path(path)
    try:
        _make_directory(target.parent)
        _replace(target, text.encode())
    except OSError as exc:
        raise ConfigError(
            f"subnet file {target} cannot be written: {exc.strerror or exc}; "
            f"name a place that can be with --subnet-file"
        ) from exc


def _make_directory(directory: Path) -> None:
    missing = [d for d in (directory, *directory.parents) if not d.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o755, exist_ok=True)


def _replace(target: Path, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Without this a power loss may bring the old name's content back.
        os.fsync(directory)
    finally:
        os.close(directory)


@dataclass(frozen=True, slots=True)
class Previous:
    """What an earlier start wrote. None where the file has no entry, no good one, or more than one.

    `findings` says what was passed over, one line each, for the log.
    """

    network: IPv4Network | None = None
    subnet: IPv4Network | None = None
    ipv6_network: IPv6Network | None = None
    ipv6_subnet: IPv6Network | None = None
    findings: tuple[str, ...] = ()


def parse(text: str | bytes) -> Previous:
    """Read a subnet file in dotenv syntax; never fails, for a bad file only means a new subnet."""
    content = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    values, findings = _variables(content)
    return Previous(
        network=_single(values, "FLANNEL_NETWORK", IPv4Network, findings),
        subnet=_single(values, "FLANNEL_SUBNET", IPv4Network, findings),
        ipv6_network=_single(values, "FLANNEL_IPV6_NETWORK", IPv6Network, findings),
        ipv6_subnet=_single(values, "FLANNEL_IPV6_SUBNET", IPv6Network, findings),
        findings=tuple(findings),
    )


_LINE = re.compile(r"(?:export\s+)?([A-Za-z0-9_.]+)\s*=\s*(.*)", re.ASCII)
_VALUE = re.compile(
    r"""  "(?P<double>[^"]*)" \s* (?:\#.*)?
        | '(?P<single>[^']*)' \s* (?:\#.*)?
        | (?P<bare>(?!["']).*?) (?:\s+\#.*)?
    """,
    re.VERBOSE,
)


def _variables(text: str) -> tuple[dict[str, str], list[str]]:
    """The assignments (of one name, the last) and a line about each line that is none."""
    values: dict[str, str] = {}
    findings = []
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        assignment = _LINE.fullmatch(stripped)
        value = _VALUE.fullmatch(assignment[2]) if assignment else None
        if assignment is None or value is None:
            findings.append(f"line {number} {stripped[:60]!r} is ignored: it must be KEY=VALUE")
        else:
            values[assignment[1]] = value["double"] or value["single"] or value["bare"] or ""
    return values, findings


def cidr_list(key: str, value: str, version: type[NetworkT]) -> tuple[tuple[NetworkT, ...], list[str]]:
    """The good entries of a comma list, host bits masked off, and a line about each bad one."""
    networks, findings = [], []
    for part in value.split(","):
        try:
            networks.append(parse_cidr(part, version))
        except ValueError:
            example = "10.244.1.1/24" if version is IPv4Network else "fd00:10:244:1::1/64"
            findings.append(f"{key} entry {part!r} is ignored: it must be a range such as {example}")
    return tuple(networks), findings


def _single(
    values: Mapping[str, str], key: str, version: type[NetworkT], findings: list[str]
) -> NetworkT | None:
    if key not in values:
        return None
    networks, bad = cidr_list(key, values[key], version)
    findings += bad
    if len(networks) > 1:
        findings.append(f"{key} {values[key]!r} is ignored: it must be one range, found {len(networks)}")
    return networks[0] if len(networks) == 1 else None
