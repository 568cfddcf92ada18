"""net-conf.json: parse, validate, fill in defaults."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeVar

from cni.errors import ConfigError
from cni.spec import gojson

DEFAULT_NETCONF = '{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}'


@dataclass(frozen=True, slots=True)
class NetConf:
    """The cluster's network configuration; `backend` holds the backend's own keys as parsed."""

    network: IPv4Network | None = None
    ipv6_network: IPv6Network | None = None
    enable_ipv4: bool = True
    enable_ipv6: bool = False
    enable_nftables: bool = False
    subnet_len: int = 0
    subnet_min: IPv4Address | None = None
    subnet_max: IPv4Address | None = None
    ipv6_subnet_len: int = 0
    ipv6_subnet_min: IPv6Address | None = None
    ipv6_subnet_max: IPv6Address | None = None
    backend_type: str = "udp"
    backend: Mapping[str, object] = field(default_factory=dict)


NetworkT = TypeVar("NetworkT", IPv4Network, IPv6Network)
AddressT = TypeVar("AddressT", IPv4Address, IPv6Address)

_CIDR = re.compile(r"([0-9A-Fa-f:.]+)/([0-9]{1,9})", re.ASCII)


def parse_cidr(text: str, version: type[NetworkT]) -> NetworkT:
    """Return the network that `text` names, host bits masked off; raises ValueError.

    As Go's `net.ParseCIDR`: a prefix length is required, a netmask or a zone is an error.
    """
    match = _CIDR.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not ADDRESS/LENGTH")
    return version(f"{match[1]}/{int(match[2])}", strict=False)


def parse_netconf(text: str | bytes, source: str) -> NetConf:
    """Return the configuration as written, nothing derived; `source` names the file or key in errors.

    Reads as upstream does (Go's encoding/json: keys in any case, unknown keys ignored), including
    the two values of the type: `udp` without a Backend, empty for a Backend without Type. An
    empty network (0.0.0.0/0) and an empty bound (0.0.0.0) are None. Raises ConfigError.
    """
    try:
        record = gojson.load_object(text)
    except gojson.GoJsonError as exc:
        raise ConfigError(
            f"{source} holds no network configuration: {_clipped(str(exc))}; "
            f"it must be one JSON object, such as {DEFAULT_NETCONF}"
        ) from None
    backend = _backend(record, source)
    return NetConf(
        network=_network(record, "Network", source, IPv4Network),
        ipv6_network=_network(record, "IPv6Network", source, IPv6Network),
        enable_ipv4=_switch(record, "EnableIPv4", source, True),
        enable_ipv6=_switch(record, "EnableIPv6", source, False),
        enable_nftables=_switch(record, "EnableNFTables", source, False),
        subnet_len=_length(record, _IPV4, source),
        subnet_min=_address(record, "SubnetMin", source, IPv4Address),
        subnet_max=_address(record, "SubnetMax", source, IPv4Address),
        ipv6_subnet_len=_length(record, _IPV6, source),
        ipv6_subnet_min=_nullable_address(record, "IPv6SubnetMin", source),
        ipv6_subnet_max=_nullable_address(record, "IPv6SubnetMax", source),
        backend_type="udp" if backend is None else _backend_type(backend, source),
        backend=backend or {},
    )


def backend_key(conf: NetConf) -> str:
    """The backend's name as it is looked up: the type as written, in lower case."""
    return conf.backend_type.lower()


def _clipped(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool | str):
        return _clipped(gojson.dumps(value))
    return _clipped(gojson.kind(value))


def _wrong(source: str, key: str, value: object, right: str) -> ConfigError:
    return ConfigError(f"{key} in {source} is {_shown(value)}: it must be {right}")


def _switch(record: gojson.Object, key: str, source: str, default: bool) -> bool:
    value = gojson.member(record, key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(source, key, value, "true or false")
    return value


def _network(record: gojson.Object, key: str, source: str, version: type[NetworkT]) -> NetworkT | None:
    if not gojson.has(record, key):
        return None
    value = gojson.member(record, key)
    family = _IPV4 if version is IPv4Network else _IPV6
    right = f'an {family.name} range such as "{family.example}"'
    if not isinstance(value, str):
        raise _wrong(source, key, value, right)
    try:
        network = parse_cidr(value, version)
    except ValueError:
        raise _wrong(source, key, value, right) from None
    return network if network.prefixlen or int(network.network_address) else None


def _nullable_address(record: gojson.Object, key: str, source: str) -> IPv6Address | None:
    """The IPv6 bounds are pointers in upstream's record, so null is "not set", unlike for IPv4."""
    if gojson.member(record, key) is None:
        return None
    return _address(record, key, source, IPv6Address)


def _address(record: gojson.Object, key: str, source: str, version: type[AddressT]) -> AddressT | None:
    if not gojson.has(record, key):
        return None
    value = gojson.member(record, key)
    family = _IPV4 if version is IPv4Address else _IPV6
    right = f'an {family.name} address such as "{family.example.partition("/")[0]}"'
    if not isinstance(value, str) or "%" in value:
        raise _wrong(source, key, value, right)
    try:
        address = version(value)
    except ValueError:
        raise _wrong(source, key, value, right) from None
    return address if int(address) else None


def _length(record: gojson.Object, family: _Family, source: str) -> int:
    """Any unsigned integer; whether it is a useful one is for `validate` to say, as in upstream."""
    key = family.key("SubnetLen")
    try:
        return gojson.integer(record, key, 0, 0, 2**64 - 1) or 0
    except gojson.GoJsonError:
        right = f"a whole number from 0 (automatic) to {family.longest}"
        raise _wrong(source, key, gojson.member(record, key), right) from None


def _backend(record: gojson.Object, source: str) -> gojson.Object | None:
    """The Backend object; None only when the key is absent, for null is as good as {}."""
    if not gojson.has(record, "Backend"):
        return None
    value = gojson.member(record, "Backend")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(source, "Backend", value, 'an object such as {"Type": "vxlan"}')
    return value


def _backend_type(backend: gojson.Object, source: str) -> str:
    value = gojson.member(backend, "Type")
    if value is not None and not isinstance(value, str):
        raise _wrong(source, "Backend.Type", value, 'a string such as "vxlan"')
    return value or ""


@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between the two: `usual` is the subnet length wanted when the network has room for it."""

    name: str
    prefix: str
    bits: int
    usual: int
    example: str

    @property
    def longest(self) -> int:
        """The longest subnet that still has an address for a gateway and one for a pod."""
        return self.bits - 2

    def key(self, name: str) -> str:
        return self.prefix + name


_IPV4 = _Family("IPv4", "", 32, 24, "10.244.0.0/16")
_IPV6 = _Family("IPv6", "IPv6", 128, 64, "fd00:10:244::/48")


def validate(conf: NetConf, source: str) -> NetConf:
    """Return `conf` with subnet lengths and bounds filled in for each enabled family; raises ConfigError.

    Upstream's checks and derived values for stores that allocate subnets (where Kubernetes does,
    lengths and bounds mean nothing). In addition, SubnetMin must not be above SubnetMax.
    """
    if not (conf.enable_ipv4 or conf.enable_ipv6):
        raise ConfigError(f"EnableIPv4 and EnableIPv6 in {source} are both false: set one of them to true")
    if conf.enable_ipv4:
        length, low, high = _subnets(
            _IPV4, source, conf.network, conf.subnet_len, conf.subnet_min, conf.subnet_max
        )
        conf = replace(conf, subnet_len=length, subnet_min=IPv4Address(low), subnet_max=IPv4Address(high))
    if conf.enable_ipv6:
        length, low, high = _subnets(
            _IPV6,
            source,
            conf.ipv6_network,
            conf.ipv6_subnet_len,
            conf.ipv6_subnet_min,
            conf.ipv6_subnet_max,
        )
        conf = replace(
            conf,
            ipv6_subnet_len=length,
            ipv6_subnet_min=IPv6Address(low),
            ipv6_subnet_max=IPv6Address(high),
        )
    return conf


def _subnets(
    family: _Family,
    source: str,
    network: IPv4Network | IPv6Network | None,
    length: int,
    low: IPv4Address | IPv6Address | None,
    high: IPv4Address | IPv6Address | None,
) -> tuple[int, int, int]:
    """Length, lowest and highest subnet address, given or derived."""
    if network is None:
        raise ConfigError(
            f"{family.key('Network')} in {source} is not set: give a range such as "
            f'"{family.example}", or set Enable{family.name} to false'
        )
    length = _subnet_length(family, source, network, length)
    size = 2 ** (family.bits - length)
    first = int(network.network_address)
    # The first subnet is left out: its network address is the network's own.
    lowest = _bound(family.key("SubnetMin"), source, network, low, first + size, length)
    highest = _bound(
        family.key("SubnetMax"), source, network, high, first + network.num_addresses - size, length
    )
    if lowest > highest:
        address = type(network.network_address)
        raise ConfigError(
            f"{family.key('SubnetMin')} {address(lowest)} in {source} is above "
            f"{family.key('SubnetMax')} {address(highest)}: no subnet lies between them; lower the one "
            f"or raise the other"
        )
    return length, lowest, highest


def _subnet_length(family: _Family, source: str, network: IPv4Network | IPv6Network, length: int) -> int:
    """At least four subnets must fit, since the first is not used and one alone makes no network."""
    shortest = network.prefixlen + 2
    if shortest > family.longest:
        raise ConfigError(
            f"{family.key('Network')} {network} in {source} is too small: it must be "
            f"/{family.longest - 2} or wider, to hold four subnets of /{family.longest}"
        )
    if length == 0:
        return max(family.usual, shortest)
    if not shortest <= length <= family.longest:
        raise ConfigError(
            f"{family.key('SubnetLen')} {length} in {source} does not suit {family.key('Network')} "
            f"{network}: it must be from {shortest} to {family.longest}, or 0 for automatic"
        )
    return length


def _bound(
    key: str,
    source: str,
    network: IPv4Network | IPv6Network,
    given: IPv4Address | IPv6Address | None,
    derived: int,
    length: int,
) -> int:
    if given is None:
        return derived
    if given not in network:
        raise ConfigError(f"{key} {given} in {source} is outside of the network: it must be in {network}")
    start = type(network)((given, length), strict=False).network_address
    if start != given:
        raise ConfigError(
            f"{key} {given} in {source} is not on a boundary of /{length}: {start} would be the nearest below"
        )
    return int(given)
