"""What the CNI plugin learns from subnet.env, which flanneld writes: networks, this node's subnet, MTU.

Read as upstream does: one `KEY=value` per line, keys compared exactly, unknown lines ignored, the last of
repeated keys wins. A known key without `=` is a half-written file here (upstream panics).
"""

from __future__ import annotations

from cni.errors import INVALID_CONFIG, TRY_AGAIN_LATER, CniError
from cni.spec import gojson
from cni.spec.address import Cidr, parse_cidr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Files

_KEYS = (
    "FLANNEL_NETWORK",
    "FLANNEL_IPV6_NETWORK",
    "FLANNEL_SUBNET",
    "FLANNEL_IPV6_SUBNET",
    "FLANNEL_MTU",
    "FLANNEL_IPMASQ",
)
_NETWORK, _IPV6_NETWORK, _SUBNET, _IPV6_SUBNET, _MTU, _IPMASQ = _KEYS
_HIGHEST_MTU = 2**32 - 1
_LARGEST_FILE_BYTES = 1 << 20


class SubnetEnv:
    """`networks` and `subnets` hold IPv4 before IPv6, host bits cleared. `mtu` is in bytes."""

    __slots__ = ("ipmasq", "mtu", "networks", "subnets")

    def __init__(self, networks: list[Cidr], subnets: list[Cidr], mtu: int, ipmasq: bool) -> None:
        self.networks = networks
        self.subnets = subnets
        self.mtu = mtu
        self.ipmasq = ipmasq


def load(files: Files, path: str) -> SubnetEnv:
    """Read and parse the file; raises CniError as `read` and `parsed`."""
    return parsed(read(files, path), path)


def read(files: Files, path: str) -> bytes:
    """The file's bytes; raises CniError 11 (7 if `path` is empty): flanneld may not have written it yet."""
    if not path:
        raise CniError(INVALID_CONFIG, "subnetFile is empty, it must be the path of flanneld's subnet.env")
    try:
        return files.read(path, _LARGEST_FILE_BYTES)
    except OSError as exc:
        raise _refusal(f"open {path}: {(exc.strerror or str(exc)).lower()}") from None


def parsed(data: bytes, path: str) -> SubnetEnv:
    """What the bytes of the file say; raises CniError 11 if they are not all there yet, or wrong."""
    try:
        return parse(data.decode("utf-8", "replace"))
    except ValueError as exc:
        raise _refusal(f"{path} {exc}") from None


def parse(text: str) -> SubnetEnv:
    """Parse the file's text; raises ValueError whose text continues a sentence that begins with its name."""
    values: dict[str, str] = {}
    for line in text.split("\n"):
        key, equals, value = line.removesuffix("\r").partition("=")
        if key not in _KEYS:
            continue
        if not equals:
            raise ValueError(f"is half-written: {key} has no '='")
        values[key] = value
    missing = _missing(values)
    if missing:
        raise ValueError(f"is missing {', '.join(missing)}")
    networks = _networks(values, _NETWORK) + _networks(values, _IPV6_NETWORK)
    subnets = [_network(key, values[key]) for key in (_SUBNET, _IPV6_SUBNET) if key in values]
    return SubnetEnv(networks, subnets, _parse_mtu(values[_MTU]), values[_IPMASQ] == "true")


def _missing(values: dict[str, str]) -> list[str]:
    missing: list[str] = []
    for alternatives in ((_NETWORK, _IPV6_NETWORK), (_SUBNET, _IPV6_SUBNET), (_MTU,), (_IPMASQ,)):
        if not any(key in values for key in alternatives):
            missing += alternatives
    return missing


def _networks(values: dict[str, str], key: str) -> list[Cidr]:
    if key not in values:
        return []
    # Through a dict: the order stays, and the same network twice would be the same route twice.
    return list(dict.fromkeys(_network(key, text) for text in values[key].split(",")))


def _network(key: str, text: str) -> Cidr:
    try:
        return parse_cidr(text).network()
    except ValueError as exc:
        raise ValueError(f"has a bad {key}: {exc}") from None


def _parse_mtu(text: str) -> int:
    quoted = gojson.dumps(text)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"has a bad {_MTU}: strconv.ParseUint: parsing {quoted}: invalid syntax")
    digits = text.lstrip("0") or "0"
    if len(digits) > 10 or int(digits) > _HIGHEST_MTU:
        raise ValueError(f"has a bad {_MTU}: strconv.ParseUint: parsing {quoted}: value out of range")
    return int(digits)


def _refusal(reason: str) -> CniError:
    """Upstream's wording and hint, for those who look for it, and who writes the file."""
    return CniError(
        TRY_AGAIN_LATER,
        f"failed to load flannel 'subnet.env' file: {reason}. "
        "flanneld writes this file once it holds a lease. Check the flannel pod log for this node.",
    )
