"""IP addresses and CIDRs, read and printed as Go's net package does.

Accepted: IPv4 octets without leading zeros, IPv6 by RFC 4291 section 2.2, never a zone. Printed: IPv6 by
RFC 5952; an IPv4-mapped IPv6 address is an IPv4 address (and a mask of it loses its first 96 bits).

Decision: plain integers instead of `ipaddress`, whose import costs the CNI plugin 5 ms in every pod's ADD.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    K = TypeVar("K")
    V = TypeVar("V")

_DIGITS = frozenset("0123456789")
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_MAPPED = 0xFFFF << 32  # ::ffff:0:0/96, RFC 4291 section 2.5.5.2

# One ADD reads and prints the same few addresses a dozen times, and those of the next differ by one.
_MOST_KNOWN = 256
_parsed: dict[str, tuple[int, int]] = {}
_formatted: dict[tuple[int, int], str] = {}
_cidrs: dict[str, Cidr] = {}


class Cidr:
    """An address and its prefix length; host bits are kept. `family` is 4 or 6. Nobody changes one."""

    __slots__ = ("family", "prefix", "value")

    def __init__(self, family: int, value: int, prefix: int) -> None:
        self.family = family
        self.value = value
        self.prefix = prefix

    def network(self) -> Cidr:
        """The same CIDR with its host bits cleared."""
        host_bits = (32 if self.family == 4 else 128) - self.prefix
        value = self.value >> host_bits << host_bits
        return self if value == self.value else Cidr(self.family, value, self.prefix)

    def __str__(self) -> str:
        return f"{format_ip(self.family, self.value)}/{self.prefix}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Cidr):
            return False
        return self.value == other.value and self.prefix == other.prefix and self.family == other.family

    def __hash__(self) -> int:
        return hash((self.family, self.value, self.prefix))


def _kept(known: dict[K, V], key: K, value: V) -> V:
    """`value`, which is known from now on."""
    if len(known) >= _MOST_KNOWN:
        known.clear()
    known[key] = value
    return value


def parse_cidr(text: str) -> Cidr:
    """Parse `address/prefix`; raises ValueError with Go's words."""
    found = _cidrs.get(text)
    return _kept(_cidrs, text, _parse_cidr(text)) if found is None else found


def _parse_cidr(text: str) -> Cidr:
    address, slash, mask = text.partition("/")
    try:
        family, value = parse_ip(address)
    except ValueError:
        raise ValueError(f"invalid CIDR address: {text}") from None
    bits = 128 if ":" in address else 32
    if not slash or not mask or not _DIGITS.issuperset(mask) or len(mask) > 6 or int(mask) > bits:
        raise ValueError(f"invalid CIDR address: {text}")
    prefix = int(mask)
    return Cidr(family, value, max(0, prefix - 96) if family == 4 and bits == 128 else prefix)


def parse_ip(text: str) -> tuple[int, int]:
    """The address as (family, integer); raises ValueError with Go's words."""
    found = _parsed.get(text)
    return _kept(_parsed, text, _parse_ip(text)) if found is None else found


def _parse_ip(text: str) -> tuple[int, int]:
    value = _parse_v6(text) if ":" in text else _parse_v4(text)
    if value is None:
        raise ValueError(f"invalid IP address: {text}")
    if ":" not in text:
        return 4, value
    return (4, value & 0xFFFFFFFF) if value >> 32 == _MAPPED >> 32 else (6, value)


def format_ip(family: int, value: int) -> str:
    """The address as Go prints it."""
    found = _formatted.get((family, value))
    return _kept(_formatted, (family, value), _format_ip(family, value)) if found is None else found


def _format_ip(family: int, value: int) -> str:
    if family == 4:
        return f"{value >> 24 & 0xFF}.{value >> 16 & 0xFF}.{value >> 8 & 0xFF}.{value & 0xFF}"
    groups = [value >> shift & 0xFFFF for shift in range(112, -1, -16)]
    start, length = _longest_zeros(groups)
    if length < 2:
        return ":".join(f"{group:x}" for group in groups)
    head = ":".join(f"{group:x}" for group in groups[:start])
    tail = ":".join(f"{group:x}" for group in groups[start + length :])
    return f"{head}::{tail}"


def _longest_zeros(groups: list[int]) -> tuple[int, int]:
    """Start and length of the first longest run of zero groups."""
    best = (0, 0)
    length = 0
    for index, group in enumerate(groups):
        length = 0 if group else length + 1
        if length > best[1]:
            best = (index - length + 1, length)
    return best


def _parse_v4(text: str) -> int | None:
    octets = text.split(".")
    if len(octets) != 4:
        return None
    value = 0
    for octet in octets:
        if not octet or len(octet) > 3 or not _DIGITS.issuperset(octet):
            return None
        if int(octet) > 255 or (octet[0] == "0" and len(octet) > 1):
            return None
        value = value << 8 | int(octet)
    return value


def _parse_v6(text: str) -> int | None:
    head, gap, tail = text.partition("::")
    front, back = _groups(head, ends=not gap), _groups(tail, ends=True)
    if front is None or back is None:
        return None
    missing = 8 - len(front) - len(back)
    if missing < 1 if gap else missing != 0:
        return None
    value = 0
    for group in front + [0] * missing + back:
        value = value << 16 | group
    return value


def _groups(text: str, ends: bool) -> list[int] | None:
    """The 16-bit groups of one side of `::`; only the side that ends the address may hold an IPv4 tail."""
    if not text:
        return []
    parts = text.split(":")
    dotted = None
    if ends and "." in parts[-1]:
        dotted = _parse_v4(parts.pop())
        if dotted is None:
            return None
    if any(not 0 < len(part) <= 4 or not _HEX_DIGITS.issuperset(part) for part in parts):
        return None
    groups = [int(part, 16) for part in parts]
    return groups if dotted is None else [*groups, dotted >> 16, dotted & 0xFFFF]
