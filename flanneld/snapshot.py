"""What the daemon last knew, on disk: for a start without the store, and for flannelctl.

The file `state.json` in the state directory holds the network configuration, the external interface,
our lease and those of all peers. It is replaced as a whole, never changed in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

from cni.errors import ConfigError
from cni.spec import gojson
from flanneld.config import NetConf, parse_netconf
from flanneld.iface import ExternalInterface
from flanneld.lease import Attributes, Lease
from flanneld.log import logger

FORMAT = 1
NAME = "state.json"


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node's view: everything from which its kernel state follows.

    `origin` names the machine and the store that it holds for: on another machine (a cloned disk), or
    with another store, it is somebody else's. `public_ips` are the store's, see `SubnetManager`. `doubtful`
    are the keys of peers that the store has lost, and that have some time to come back.
    """

    pid: int
    written_s: float
    origin: str
    public_ips: tuple[str, str]
    config: NetConf
    external: ExternalInterface
    own: Lease
    peers: tuple[Lease, ...]
    doubtful: frozenset[str] = frozenset()


def render(state: NodeState) -> str:
    """The file's text. Revisions of leases are left out: they mean something to the store alone."""
    external = state.external
    return gojson.dumps(
        {
            "format": FORMAT,
            "pid": state.pid,
            "written": state.written_s,
            "origin": state.origin,
            "publicIPs": list(state.public_ips),
            "config": _config(state.config),
            "external": {
                "name": external.name,
                "mtu": external.mtu,
                "reason": external.reason,
                "address": _text(external.address),
                "address6": _text(external.address6),
                "publicIP": _text(external.public_ip),
                "publicIPv6": _text(external.public_ipv6),
            },
            "own": _lease(state.own),
            "peers": [_lease(peer) for peer in state.peers],
            "doubtful": sorted(state.doubtful),
        },
        sort=False,
    )


def parse(text: str, source: str) -> NodeState:
    """Read the file's text; raises ConfigError if it is not what `render` writes."""
    try:
        record = gojson.load_object(text)
        if gojson.integer(record, "format", 0, 0, 1 << 31) != FORMAT:
            raise gojson.GoJsonError(f"format is not {FORMAT}")
        external = gojson.typed(record, "external", dict, {})
        return NodeState(
            pid=gojson.integer(record, "pid", 0, 0, 1 << 31) or 0,
            written_s=float(str(gojson.member(record, "written") or 0)),
            origin=gojson.typed(record, "origin", str, ""),
            public_ips=_pair(gojson.typed(record, "publicIPs", list, ["", ""])),
            config=parse_netconf(gojson.dumps(gojson.typed(record, "config", dict, {}), sort=False), source),
            external=_read_external(external),
            own=_read_lease(gojson.typed(record, "own", dict, {})),
            peers=tuple(_read_lease(peer) for peer in gojson.typed(record, "peers", list, [])),
            doubtful=frozenset(map(str, gojson.typed(record, "doubtful", list, []))),
        )
    except ValueError as exc:
        raise ConfigError(f"{source} was not written by this version of flanneld: {exc}") from None


def write(directory: Path, state: NodeState) -> None:
    """Replace the file atomically, mode 0600; raises OSError.

    Flushed to the disk first: it is what a node that reboots without its store starts from.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = directory / f".{NAME}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(temporary, flags, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)  # the file may be a leftover
        file.write(render(state))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / NAME)


def same_config(one: NetConf, other: NetConf) -> bool:
    """Whether two configurations are the same once both have been through the file."""
    return _config(one) == _config(other)


def last_known(directory: Path, origin: Callable[[str], str]) -> NodeState | None:
    """The state of an earlier run to start from if need be.

    None, with a warning, if it cannot be read or is of another `origin`, which is told for the name of the
    external interface.
    """
    if not (directory / NAME).exists():
        return None
    try:
        state = load(directory)
    except ConfigError as exc:
        logger.warning("%s; starting without it", exc)
        return None
    if state.origin != origin(state.external.name):
        logger.warning("%s is of another machine or store; starting without it", directory / NAME)
        return None
    return state


def load(directory: Path) -> NodeState:
    """The node's last state; raises ConfigError with the remedy if there is none."""
    path = directory / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: no flanneld has run with this state directory; name it with --state-dir"
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    return parse(text, str(path))


def _pair(found: list[object]) -> tuple[str, str]:
    if len(found) != 2 or not all(isinstance(text, str) for text in found):
        raise gojson.GoJsonError("publicIPs must be two strings")
    return str(found[0]), str(found[1])


def _text(address: IPv4Address | IPv6Address | None) -> str:
    return str(address) if address else ""


def _lease(lease: Lease) -> dict[str, object]:
    return {
        "subnet": str(lease.subnet or ""),
        "ipv6Subnet": str(lease.subnet6 or ""),
        "expires": lease.expires_s,
        "attributes": gojson.loads(lease.attrs.encode()),
    }


def _read_lease(record: object) -> Lease:
    if not isinstance(record, dict):
        raise gojson.GoJsonError(f"a lease must be an object, found {gojson.kind(record)}")
    subnet, subnet6 = gojson.typed(record, "subnet", str, ""), gojson.typed(record, "ipv6Subnet", str, "")
    if not (subnet or subnet6):
        raise gojson.GoJsonError("a lease names neither subnet nor ipv6Subnet")
    attributes = gojson.dumps(gojson.typed(record, "attributes", dict, {}), sort=False)
    expires_s = float(str(gojson.member(record, "expires") or 0))
    return Lease(
        IPv4Network(subnet) if subnet else None,
        IPv6Network(subnet6) if subnet6 else None,
        Attributes.decode(attributes),
        expires_s,
    )


def _read_external(record: dict[str, object]) -> ExternalInterface:
    def v4(name: str) -> IPv4Address | None:
        text = gojson.typed(record, name, str, "")
        return IPv4Address(text) if text else None

    def v6(name: str) -> IPv6Address | None:
        text = gojson.typed(record, name, str, "")
        return IPv6Address(text) if text else None

    return ExternalInterface(
        name=gojson.typed(record, "name", str, ""),
        mtu=gojson.integer(record, "mtu", 0, 0, 1 << 31) or 0,
        address=v4("address"),
        address6=v6("address6"),
        public_ip=v4("publicIP"),
        public_ipv6=v6("publicIPv6"),
        reason=gojson.typed(record, "reason", str, ""),
    )


def _config(config: NetConf) -> dict[str, object]:
    """net-conf.json text from which `parse_netconf` makes the same NetConf."""
    out: dict[str, object] = {
        "EnableIPv4": config.enable_ipv4,
        "EnableIPv6": config.enable_ipv6,
        "EnableNFTables": config.enable_nftables,
        "SubnetLen": config.subnet_len,
        "IPv6SubnetLen": config.ipv6_subnet_len,
        "Backend": {**config.backend, "Type": config.backend_type},
    }
    optional: Iterable[tuple[str, object]] = (
        ("Network", config.network),
        ("IPv6Network", config.ipv6_network),
        ("SubnetMin", config.subnet_min),
        ("SubnetMax", config.subnet_max),
        ("IPv6SubnetMin", config.ipv6_subnet_min),
        ("IPv6SubnetMax", config.ipv6_subnet_max),
    )
    return out | {name: str(value) for name, value in optional if value is not None}
