"""Values of DHCP options: each function returns the bytes of one option, b"" where the option is left out.

Every function checks what it is given and raises ValueError, whose text names the value and the rule.
Lengths are exact by construction: clients drop a whole reply for an address option of 16 bytes or of none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Final

PAD: Final = 0  # RFC 2132 section 3.1
SUBNET_MASK: Final = 1  # RFC 2132 section 3.3
ROUTER: Final = 3  # RFC 2132 section 3.5
DOMAIN_SERVER: Final = 6  # RFC 2132 section 3.8
HOST_NAME: Final = 12  # RFC 2132 section 3.14
DOMAIN_NAME: Final = 15  # RFC 2132 section 3.17
INTERFACE_MTU: Final = 26  # RFC 2132 section 5.1
BROADCAST_ADDRESS: Final = 28  # RFC 2132 section 5.3
NTP_SERVERS: Final = 42  # RFC 2132 section 8.3
REQUESTED_ADDRESS: Final = 50  # RFC 2132 section 9.1
LEASE_TIME: Final = 51  # RFC 2132 section 9.2
OVERLOAD: Final = 52  # RFC 2132 section 9.3
MESSAGE_TYPE: Final = 53  # RFC 2132 section 9.6
SERVER_ID: Final = 54  # RFC 2132 section 9.7
PARAMETER_REQUEST_LIST: Final = 55  # RFC 2132 section 9.8
MESSAGE: Final = 56  # RFC 2132 section 9.9
MAX_MESSAGE_SIZE: Final = 57  # RFC 2132 section 9.10
RENEWAL_TIME: Final = 58  # RFC 2132 section 9.11
REBINDING_TIME: Final = 59  # RFC 2132 section 9.12
CLIENT_ID: Final = 61  # RFC 2132 section 9.14, RFC 6842
TFTP_SERVER_NAME: Final = 66  # RFC 2132 section 9.4
BOOT_FILE_NAME: Final = 67  # RFC 2132 section 9.5
RAPID_COMMIT: Final = 80  # RFC 4039
RELAY_AGENT_INFORMATION: Final = 82  # RFC 3046
DOMAIN_SEARCH: Final = 119  # RFC 3397
CLASSLESS_ROUTES: Final = 121  # RFC 3442
PRIVATE: Final = range(224, 255)  # RFC 3942: site-specific use
MS_CLASSLESS_ROUTES: Final = 249  # Windows before Vista asks for 121 under this number
END: Final = 255  # RFC 2132 section 3.2

INFINITE_LEASE_S: Final = 0xFFFFFFFF  # RFC 2131 section 3.3
# The shortest lease for which T1 < T2 < lease holds in whole seconds (RFC 2131 section 4.4.5).
MIN_LEASE_S: Final = 4
MIN_MTU: Final = 68  # RFC 2132 section 5.1, after RFC 791

# A route: where to, and the router; None (or 0.0.0.0) means that the destination is on the link.
ClasslessRoute = tuple[IPv4Network, IPv4Address | None]

_HOST_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_MAC = re.compile(r"[0-9a-f]{2}(?:(:[0-9a-f]{2}){5}|(-[0-9a-f]{2}){5})", re.IGNORECASE)
# Service names start with an underscore; the last label starts with a letter, so no address passes.
_SEARCH_DOMAIN = re.compile(r"(?:[_a-z0-9](?:[_a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
_HEXADECIMAL = re.compile(r"0x(?:[0-9a-f]{2})+", re.IGNORECASE)
_PRINTABLE = re.compile(r"[!-~]+")
_MAX_NAME = 253
_MAX_POINTER = 0x3FFF


def mac_address(text: str) -> bytes:
    """Return the six octets of a unicast MAC address such as 0a:58:0a:f4:01:07 or 0A-58-0A-F4-01-07."""
    if not _MAC.fullmatch(text):
        raise ValueError(f"MAC address {text!r}: must be six hexadecimal octets such as 0a:58:0a:f4:01:07")
    raw = bytes.fromhex(text.replace(":", "").replace("-", ""))
    if not is_unicast_mac(raw):
        raise ValueError(f"MAC address {text!r}: must be a unicast address and not all zero")
    return raw


def is_unicast_mac(raw: bytes) -> bool:
    """Whether `raw` can be the address of one Ethernet station."""
    return len(raw) == 6 and not raw[0] & 1 and any(raw)


def subnet_mask(address: IPv4Interface) -> bytes:
    """Option 1, RFC 2132 section 3.3."""
    return address.netmask.packed


def routers(values: Iterable[IPv4Address]) -> bytes:
    """Option 3, RFC 2132 section 3.5: in order of preference."""
    return _addresses("router", values)


def domain_servers(values: Iterable[IPv4Address]) -> bytes:
    """Option 6, RFC 2132 section 3.8: in order of preference."""
    return _addresses("DNS server", values)


def ntp_servers(values: Iterable[IPv4Address]) -> bytes:
    """Option 42, RFC 2132 section 8.3: in order of preference."""
    return _addresses("NTP server", values)


def server_id(value: IPv4Address) -> bytes:
    """Option 54, RFC 2132 section 9.7: the address to which the client sends its renewals."""
    return _address("server id", value)


def host_name(text: str) -> bytes:
    """Option 12, RFC 2132 section 3.14: labels as RFC 1123 section 2.1 has them, no terminator."""
    if len(text) > _MAX_NAME or not all(_HOST_LABEL.fullmatch(label) for label in text.split(".")):
        raise ValueError(
            f"hostname {text!r}: must be labels of 1 to 63 letters, digits and inner hyphens, "
            f"joined by dots, {_MAX_NAME} characters at most"
        )
    return text.encode("ascii")


def search_domain(text: str) -> str:
    """Return `text` as it goes into a search list: lower case, without the root's dot."""
    name = text.lower().removesuffix(".")
    # Lower case alone would turn the Kelvin sign into a letter k.
    if not text.isascii() or len(name) > _MAX_NAME or not _SEARCH_DOMAIN.fullmatch(name):
        raise ValueError(
            f"search domain {text!r}: must be labels of 1 to 63 letters, digits, underscores and inner "
            f"hyphens, joined by dots, the last one starting with a letter, {_MAX_NAME} characters at most"
        )
    return name


def valid_search_domains(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names fit for a search list as they are sent, and those that were dropped, unchanged."""
    good, dropped = [], []
    for name in names:
        try:
            good.append(search_domain(name))
        except ValueError:
            dropped.append(name)
    return tuple(good), tuple(dropped)


def domain_name(search: Sequence[str]) -> bytes:
    """Option 15, RFC 2132 section 3.17: the longest search domain, the first of equals.

    The longest one belongs to the pod's own namespace, so a guest that knows no search list still finds
    its neighbours.
    """
    return max(search, key=len).encode("ascii") if search else b""


def search_list(search: Iterable[str]) -> bytes:
    """Option 119, RFC 3397: names of `valid_search_domains`, compressed as RFC 1035 section 4.1.4 has it.

    Pointers count from the start of the option's data, even where the data is later split in several
    options (RFC 3397 section 2).
    """
    out = bytearray()
    seen: dict[str, int] = {}
    for rest in search:
        while rest and rest not in seen:
            if len(out) <= _MAX_POINTER:
                seen[rest] = len(out)
            label, _, rest = rest.partition(".")
            out += bytes((len(label),)) + label.encode("ascii")
        out += (0xC000 | seen[rest]).to_bytes(2, "big") if rest else b"\0"
    return bytes(out)


def interface_mtu(mtu_bytes: int) -> bytes:
    """Option 26, RFC 2132 section 5.1."""
    if not MIN_MTU <= mtu_bytes <= 0xFFFF:
        raise ValueError(f"MTU {mtu_bytes}: must be {MIN_MTU} to 65535 bytes")
    return mtu_bytes.to_bytes(2, "big")


def broadcast_address(address: IPv4Interface) -> bytes:
    """Option 28, RFC 2132 section 5.3; a /31 and a /32 have no broadcast address."""
    network = address.network
    return network.broadcast_address.packed if network.prefixlen < 31 else b""


def lease_time(lease_s: int) -> bytes:
    """Option 51, RFC 2132 section 9.2."""
    if not MIN_LEASE_S <= lease_s <= INFINITE_LEASE_S:
        raise ValueError(f"lease time {lease_s}: must be {MIN_LEASE_S} to {INFINITE_LEASE_S} seconds")
    return lease_s.to_bytes(4, "big")


def renewal_time(lease_s: int) -> bytes:
    """Option 58, T1: half of the lease (RFC 2131 section 4.4.5); an infinite lease is not renewed."""
    return b"" if lease_s == INFINITE_LEASE_S else (lease_s // 2).to_bytes(4, "big")


def rebinding_time(lease_s: int) -> bytes:
    """Option 59, T2: seven eighths of the lease (RFC 2131 section 4.4.5)."""
    return b"" if lease_s == INFINITE_LEASE_S else (lease_s * 7 // 8).to_bytes(4, "big")


def tftp_server_name(text: str) -> bytes:
    """Option 66, RFC 2132 section 9.4: a name or an address, no terminator."""
    return _text("TFTP server", text)


def boot_file_name(text: str) -> bytes:
    """Option 67, RFC 2132 section 9.5: a path or a URL, no terminator."""
    return _text("boot file", text)


def classless_routes(routes: Iterable[ClasslessRoute]) -> bytes:
    """Option 121, RFC 3442.

    Decision: host routes on the link come first, default routes last, the others keep their order. Some
    clients program the routes in the order sent, and a router outside of the subnet can be used only
    after the host route that leads to it.
    """
    return b"".join(_route(*route) for route in sorted(routes, key=_route_rank))


def private_option(code: int, value: str) -> bytes:
    """Options 224 to 254 (RFC 3942): text as UTF-8, or bytes written as 0x and hexadecimal digits."""
    if code not in PRIVATE:
        raise ValueError(f"private option {code}: must be {PRIVATE[0]} to {PRIVATE[-1]}")
    if not value:
        raise ValueError(f"private option {code}: must have a value; text, or bytes such as 0x0a0b")
    if value[:2].lower() != "0x":
        return value.encode()
    if not _HEXADECIMAL.fullmatch(value):
        raise ValueError(
            f"private option {code}={value!r}: must be text, or 0x and an even number of hexadecimal digits"
        )
    return bytes.fromhex(value[2:])


def _text(what: str, text: str) -> bytes:
    if len(text) > 255 or not _PRINTABLE.fullmatch(text):
        raise ValueError(f"{what} {text!r}: must be 1 to 255 printable ASCII characters without blanks")
    return text.encode("ascii")


def _addresses(what: str, values: Iterable[IPv4Address]) -> bytes:
    return b"".join(_address(what, value) for value in values)


def _address(what: str, value: IPv4Address) -> bytes:
    # The type is checked as well: the 16 bytes of an IPv6 address would spoil the whole reply.
    if not isinstance(value, IPv4Address) or value.is_multicast or not 0 < int(value) < 0xFFFFFFFF:
        raise ValueError(f"{what} {value}: must be a unicast IPv4 address")
    return value.packed


def _route(network: IPv4Network, router: IPv4Address | None) -> bytes:
    octets = (network.prefixlen + 7) // 8
    hop = _address(f"router of route {network}:", router) if router and int(router) else bytes(4)
    return bytes((network.prefixlen,)) + network.network_address.packed[:octets] + hop


def _route_rank(route: ClasslessRoute) -> int:
    network, router = route
    if network.prefixlen == 0:
        return 2
    return 0 if network.prefixlen == 32 and not (router and int(router)) else 1
