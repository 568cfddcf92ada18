"""The netconf of the bridge plugin, read and checked as upstream does. Errors carry upstream's words.

Source: containernetworking/plugins, plugins/main/bridge; CNI 1.1.0, "Plugin configuration objects".
"""

from __future__ import annotations

from cni.errors import INTERNAL, INVALID_CONFIG, CniError
from cni.spec import args, gojson
from cni.spec.request import Request
from cni.spec.result import ResultError, parse_dns

_INT64 = 2**63 - 1
_HIGHEST_VLAN = 4094
_HIGHEST_MTU = 2**31 - 1  # a signed number in the kernel
_HEX = frozenset("0123456789abcdefABCDEF")
_LONGEST_NAME = 15  # the kernel's IFNAMSIZ less the final NUL
_LARGEST_MTU = 2**31 - 1  # the kernel's own is less for most kinds of links; it says so itself
_SMALLEST_IPV6_MTU = 1280  # RFC 8200, section 5

ARGUMENTS = ("MAC",)  # of CNI_ARGS

# Every key that this plugin knows, besides those that any netconf has.
KEYS = frozenset(
    {
        *("bridge", "isgateway", "isdefaultgateway", "forceaddress", "ipmasq", "ipmasqbackend", "mtu"),
        *("hairpinmode", "promiscmode", "vlan", "vlantrunk", "preservedefaultvlan", "macspoofchk"),
        *("enabledad", "disablecontainerinterface", "portisolation", "ipam", "dns", "args", "runtimeconfig"),
        *("cniversion", "name", "type", "capabilities", "prevresult"),
        *("cni.dev/valid-attachments", "cni.dev/attachments"),
    }
)


def bridge_conf(stdin: bytes, cni_args: str) -> BridgeConf:
    """The netconf of an ADD, checked; raises CniError."""
    conf = BridgeConf(Request({"CNI_ARGS": cni_args}, stdin))
    conf.check_for_add()
    return conf


class BridgeConf:
    """The keys of the netconf with their defaults; `mac` is the one that is asked for, or empty.

    `dns` takes the place of what IPAM says, None does not.
    """

    __slots__ = (
        "bridge",
        "default_gateway",
        "detect_duplicates",
        "dns",
        "force_address",
        "gateway",
        "hairpin",
        "interface_down",
        "ipam_type",
        "isolated",
        "mac",
        "mac_spoof_check",
        "masquerade",
        "masquerade_backend",
        "mtu",
        "name",
        "preserve_default_vlan",
        "prev_result",
        "promiscuous",
        "trunk",
        "vlan",
        "vlan_filtering",
    )

    def __init__(self, request: Request) -> None:
        """Raises CniError 999 with upstream's words, as every other mistake in the netconf."""
        try:
            self._read(request.config)
        except (gojson.GoJsonError, ResultError) as exc:
            raise CniError(INTERNAL, f"failed to load netconf: json: {exc}") from None
        self.mac = args.load(request.environment.get("CNI_ARGS", ""), ARGUMENTS).get("MAC", "")
        try:
            self.mac = _requested_mac(request.config) or self.mac
        except gojson.GoJsonError as exc:
            raise CniError(INTERNAL, f"failed to load netconf: json: {exc}") from None

    def _read(self, record: gojson.Object) -> None:
        self.name = gojson.typed(record, "name", str, "")
        self.bridge = gojson.typed(record, "bridge", str, "cni0")
        self.default_gateway = gojson.typed(record, "isDefaultGateway", bool, False)
        self.gateway = gojson.typed(record, "isGateway", bool, False) or self.default_gateway
        self.force_address = gojson.typed(record, "forceAddress", bool, False)
        self.masquerade = gojson.typed(record, "ipMasq", bool, False)
        self.masquerade_backend = gojson.typed(record, "ipMasqBackend", str, "")
        self.mtu = max(0, gojson.integer(record, "mtu", 0, -_INT64, _HIGHEST_MTU) or 0)
        self.hairpin = gojson.typed(record, "hairpinMode", bool, False)
        self.promiscuous = gojson.typed(record, "promiscMode", bool, False)
        self.preserve_default_vlan = gojson.typed(record, "preserveDefaultVlan", bool, False)
        self.mac_spoof_check = gojson.typed(record, "macspoofchk", bool, False)
        self.detect_duplicates = gojson.typed(record, "enabledad", bool, False)
        self.interface_down = gojson.typed(record, "disableContainerInterface", bool, False)
        self.isolated = gojson.typed(record, "portIsolation", bool, False)
        ipam: gojson.Object = gojson.typed(record, "ipam", dict, {})
        self.ipam_type = gojson.typed(ipam, "type", str, "")
        self.dns = _dns(record)
        self.prev_result: gojson.Object | None = None
        if gojson.member(record, "prevResult") is not None:
            self.prev_result = gojson.typed(record, "prevResult", dict, {})
        self.vlan = gojson.integer(record, "vlan", 0, -_INT64, _INT64) or 0
        if not 0 <= self.vlan <= _HIGHEST_VLAN:
            text = f"invalid VLAN ID {self.vlan} (must be between 0 and {_HIGHEST_VLAN})"
            raise CniError(INTERNAL, text)
        trunk: list[object] = gojson.typed(record, "vlanTrunk", list, [])
        self.trunk = _trunk(trunk)
        self.vlan_filtering = bool(self.vlan) or gojson.member(record, "vlanTrunk") is not None

    def check_for_add(self) -> None:
        """Raise CniError for keys that exclude one another, or that no kernel can carry out."""
        if self.hairpin and self.promiscuous:
            text = "cannot set hairpin mode and promiscuous mode at the same time"
            raise CniError(INTERNAL, text)
        if self.interface_down and self.ipam_type:
            text = "cannot use IPAM when DisableContainerInterface flag is set"
            raise CniError(INTERNAL, text)
        name = self.bridge
        if not name or len(name.encode()) > _LONGEST_NAME or name in (".", "..") or _unfit(name):
            shown = gojson.dumps(name)
            raise CniError(
                INVALID_CONFIG,
                f"failed to create bridge {shown}: bridge must be the name of a link, "
                f"1 to {_LONGEST_NAME} bytes without '/', ':', '%' and white space",
            )
        if self.mac:
            self.mac = _parse_mac(self.mac)
        if self.mtu > _LARGEST_MTU:
            raise CniError(INVALID_CONFIG, f"mtu is {self.mtu}, no link can have more than {_LARGEST_MTU}")
        if self.masquerade_backend not in ("", "iptables", "nftables"):
            raise CniError(INTERNAL, f"unknown ipmasq backend {gojson.dumps(self.masquerade_backend)}")

    def check_mtu(self, has_ipv6: bool) -> None:
        """Raise CniError 7 for an MTU that the kernel gives no IPv6 on; upstream fails on a sysctl then."""
        if has_ipv6 and 0 < self.mtu < _SMALLEST_IPV6_MTU:
            raise CniError(
                INVALID_CONFIG, f"mtu is {self.mtu}, IPv6 needs at least {_SMALLEST_IPV6_MTU} (RFC 8200)"
            )


def _unfit(name: str) -> bool:
    # The kernel puts a number for %d, and ends a name at a NUL.
    return any(c in "/:%\0" or c.isspace() for c in name)


def _requested_mac(record: gojson.Object) -> str:
    """The MAC of runtimeConfig, or else of args."""
    arguments: gojson.Object = gojson.typed(record, "args", dict, {})
    cni: gojson.Object = gojson.typed(arguments, "cni", dict, {})
    runtime: gojson.Object = gojson.typed(record, "runtimeConfig", dict, {})
    from_args = gojson.typed(cni, "mac", str, "")
    return gojson.typed(runtime, "mac", str, "") or from_args


def _dns(record: gojson.Object) -> gojson.Object | None:
    """What the netconf says of DNS, None if nothing: upstream takes an empty list for something."""
    given: gojson.Object = gojson.typed(record, "dns", dict, {})
    parsed = parse_dns(record)
    lists = any(gojson.member(given, name) is not None for name in ("nameservers", "search", "options"))
    return parsed if lists or parsed else None


def _parse_mac(text: str) -> str:
    """A MAC in one of the forms that Go reads, as the kernel's tools print it; raises CniError 999."""
    for separator, length in ((":", 2), ("-", 2), (".", 4)):
        parts = text.split(separator)
        digits = "".join(parts)
        if len(digits) == 12 and all(len(part) == length for part in parts) and _HEX.issuperset(digits):
            return bytes.fromhex(digits).hex(":")
    raise CniError(INTERNAL, f"failed to make veth pair: address {text}: invalid MAC address")


def _trunk(entries: list[object]) -> tuple[int, ...]:
    """The VLANs of a trunk, sorted; raises CniError with upstream's words."""
    found: set[int] = set()
    for entry in entries:
        record = entry if entry is not None else {}
        if not isinstance(record, dict):
            raise gojson.GoJsonError(f"vlanTrunk must hold objects, found {gojson.kind(record)}")
        low, high, one = (
            gojson.integer(record, key, None, -_INT64, _INT64) for key in ("minID", "maxID", "id")
        )
        if low is not None and high is not None:
            _check_vlan(low, "minID")
            _check_vlan(high, "maxID")
            if high < low:
                raise CniError(INTERNAL, "minID is greater than maxID in trunk parameter")
            found.update(range(low, high + 1))
        elif low is not None or high is not None:
            missing = "maxID" if high is None else "minID"
            text = f"minID and maxID should be configured simultaneously, {missing} is missing"
            raise CniError(INTERNAL, text)
        if one is not None:
            _check_vlan(one, "id")
            found.add(one)
    return tuple(sorted(found))


def _check_vlan(vlan: int, key: str) -> None:
    if not 0 < vlan <= _HIGHEST_VLAN:
        raise CniError(INTERNAL, f"incorrect trunk {key} parameter")
