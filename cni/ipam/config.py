"""The configuration of host-local: what stdin and CNI_ARGS hold, checked as upstream does.

Source: upstream host-local (keys, order of the checks, texts).

Decision: the words for a wrong JSON type are ours.
"""

from __future__ import annotations

from cni.errors import INTERNAL, CniError
from cni.ipam.ranges import Range, RangeError, RangeSet
from cni.spec import args, gojson, result, version
from cni.spec.address import Cidr, format_ip, parse_cidr, parse_ip
from cni.spec.netconf import HOST_LOCAL_DIR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.ipam.ranges import Address

_NO_ADDRESS = "IP <nil> not v4 nor v6"
ARGUMENTS = ("IP",)  # of CNI_ARGS
_DNS_LISTS = ("search", "options")


class Place:
    """Where the reservations of a network are: all that DEL and GC need to know.

    `store` is the path of the directory with the reservations.
    """

    __slots__ = ("data_dir", "network", "store")

    def __init__(self, record: gojson.Object) -> None:
        """Raises CniError 999."""
        try:
            ipam = _ipam(record)
            self.network = gojson.typed(record, "name", str, "")
            self.data_dir = gojson.typed(ipam, "dataDir", str, "") or HOST_LOCAL_DIR
        except gojson.GoJsonError as exc:
            raise CniError(INTERNAL, f"json: {exc}") from None
        self.store = f"{self.data_dir.rstrip('/')}/{self.network}"


class IpamConfig:
    """What ADD works with. `sets` give one address each, `requested` are wished for, without duplicates.

    `gateways` has the gateway of each set that has just one.
    """

    __slots__ = ("gateways", "place", "requested", "resolv_conf", "routes", "sets", "version")

    def __init__(self, record: gojson.Object, cni_args: str) -> None:
        """Raises CniError 999."""
        self.place = Place(record)
        try:
            ipam = _ipam(record)
            self.version = gojson.typed(record, "cniVersion", str, "") or version.ABSENT
            self.resolv_conf = gojson.typed(ipam, "resolvConf", str, "")
            self.routes = result.parse_routes(gojson.typed(ipam, "routes", list, []))
            written = _written_sets(record, ipam)
            self.requested = _requested(record, cni_args)
            self.sets = _sets(written, self.version)
            self.gateways = [cidr for one in self.sets for cidr in _only_gateway(one)]
        except gojson.GoJsonError as exc:
            raise CniError(INTERNAL, f"json: {exc}") from None
        except ValueError as exc:
            raise CniError(INTERNAL, str(exc)) from None


class _Written:
    """A range as it is written: `subnet` is None if it is left out."""

    __slots__ = ("first", "gateway", "last", "subnet")

    def __init__(self, record: gojson.Object) -> None:
        given = gojson.has(record, "subnet")
        text = gojson.typed(record, "subnet", str, "")
        self.subnet = (text, parse_cidr(text)) if given else None
        self.first = _optional_ip(record, "rangeStart")
        self.last = _optional_ip(record, "rangeEnd")
        self.gateway = _optional_ip(record, "gateway")

    def range(self) -> Range:
        """Raises RangeError."""
        if self.subnet is None:
            raise RangeError(_NO_ADDRESS)
        text, subnet = self.subnet
        if ":" in text and subnet.family == 4 and subnet.prefix <= 30:
            raise RangeError("IPNet IP and Mask version mismatch")
        return Range(subnet, self.first, self.last, self.gateway)


def count_sets(record: gojson.Object) -> int:
    """How many range sets are written, good or bad."""
    ipam, runtime = gojson.member(record, "ipam"), gojson.member(record, "runtimeConfig")
    lists = [gojson.member(ipam, "ranges")] if isinstance(ipam, dict) else []
    lists += [gojson.member(runtime, "ipRanges")] if isinstance(runtime, dict) else []
    single = isinstance(ipam, dict) and gojson.member(ipam, "subnet") is not None
    return single + sum(len(one) for one in lists if isinstance(one, list))


def resolver(text: str) -> gojson.Object:
    """The dns member of a result from the text of a resolv.conf file."""
    dns: dict[str, list[str]] = {"nameservers": [], "search": [], "options": []}
    domain = ""
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0][0] in "#;":
            continue
        if words[0] == "nameserver":
            dns["nameservers"].append(words[1])
        elif words[0] == "domain":
            domain = words[1]
        elif words[0] in _DNS_LISTS:
            dns[words[0]] += words[1:]
    found: gojson.Object = {name: words for name, words in dns.items() if words}
    return {**found, "domain": domain} if domain else found


def _ipam(record: gojson.Object) -> gojson.Object:
    if gojson.member(record, "ipam") is None:
        raise CniError(INTERNAL, "IPAM config missing 'ipam' key")
    return gojson.typed(record, "ipam", dict, {})


def _written_sets(record: gojson.Object, ipam: gojson.Object) -> list[list[_Written]]:
    """The sets in the order that the results, and the files with the last reserved addresses, are in."""
    runtime = gojson.typed(record, "runtimeConfig", dict, {})
    single = _Written(ipam)
    return [
        *_written_list(runtime, "ipRanges"),
        *([[single]] if single.subnet is not None else []),
        *_written_list(ipam, "ranges"),
    ]


def _written_list(record: gojson.Object, name: str) -> list[list[_Written]]:
    sets = []
    for entry in gojson.typed(record, name, list, []):
        if entry is not None and not isinstance(entry, list):
            raise gojson.GoJsonError(f"{name} must hold arrays of ranges, found {gojson.kind(entry)}")
        ranges = []
        for one in entry or ():
            if one is not None and not isinstance(one, dict):
                raise gojson.GoJsonError(f"a range of {name} must be an object, found {gojson.kind(one)}")
            ranges.append(_Written(one or {}))
        sets.append(ranges)
    return sets


def _sets(written: list[list[_Written]], declared_version: str) -> list[RangeSet]:
    if not written:
        raise RangeError("no IP ranges specified")
    sets = []
    for index, ranges in enumerate(written):
        try:
            sets.append(RangeSet([one.range() for one in ranges]))
        except RangeError as exc:
            raise RangeError(f"invalid range set {index}: {exc}") from None
    families = [one.family for one in sets]
    if max(families.count(4), families.count(6)) > 1 and not version.at_least(declared_version, "0.3.0"):
        text = f"CNI version {declared_version} does not support more than 1 address per family"
        raise RangeError(text)
    for index, one in enumerate(sets):
        for other in range(index + 1, len(sets)):
            if one.overlaps(sets[other]):
                raise RangeError(f"range set {index} overlaps with {other}")
    return sets


def _only_gateway(one: RangeSet) -> list[Cidr]:
    known = {(home.gateway, home.subnet.prefix) for home in one.ranges}
    gateway, prefix = next(iter(known))
    return [Cidr(*gateway, prefix)] if len(known) == 1 and gateway[0] == one.family else []


def _requested(record: gojson.Object, cni_args: str) -> list[Address]:
    texts = []
    wanted = args.load(cni_args, ARGUMENTS).get("IP", "")
    if wanted:
        try:
            _wish(wanted)
        except ValueError as exc:
            pair = gojson.dumps(f"IP={wanted}")
            raise CniError(INTERNAL, f"ARGS: error parsing value of pair {pair}: {exc}") from None
        texts.append(wanted)
    cni = gojson.typed(gojson.typed(record, "args", dict, {}), "cni", dict, {})
    texts += _strings(cni, "ips")
    texts += _strings(gojson.typed(record, "runtimeConfig", dict, {}), "ips")
    # A dict keeps the order and drops what is wished for twice.
    return list(dict.fromkeys(_wish(text) for text in texts))


def _strings(record: gojson.Object, name: str) -> list[str]:
    texts = []
    for value in gojson.typed(record, name, list, []):
        if not isinstance(value, str):
            raise gojson.GoJsonError(f"{name} must hold strings, found {gojson.kind(value)}")
        texts.append(value)
    return texts


def _wish(text: str) -> Address:
    """An address, with or without a prefix length, which is not looked at."""
    if not text:
        raise ValueError(f"cannot understand ip: {_NO_ADDRESS}")
    try:
        if "/" not in text:
            return parse_ip(text)
        found = parse_cidr(text)
    except ValueError:
        raise ValueError(f"invalid IP address {text}") from None
    return found.family, found.value


def _optional_ip(record: gojson.Object, name: str) -> Address | None:
    text = gojson.typed(record, name, str, "")
    return parse_ip(text) if text else None


def address_text(address: Address) -> str:
    """The address as it is printed, and as its file in the store is named."""
    return format_ip(*address)
