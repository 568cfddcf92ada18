"""DHCPv6 messages and options as values (RFC 8415), and names and MACs as they stand on the wire.

What comes from the network is parsed into a value or into `Malformed`, and never raises. What comes from
the user (a MAC, a name) raises ConfigError.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv6Address

from cni.errors import ConfigError

INFINITE_S = 0xFFFFFFFF  # RFC 8415 section 7.7; RFC 4861 section 4.6.2 says the same of prefixes


class Kind(IntEnum):
    """Message types (RFC 8415 section 7.3)."""

    SOLICIT = 1
    ADVERTISE = 2
    REQUEST = 3
    CONFIRM = 4
    RENEW = 5
    REBIND = 6
    REPLY = 7
    RELEASE = 8
    DECLINE = 9
    RECONFIGURE = 10
    INFORMATION_REQUEST = 11
    RELAY_FORW = 12
    RELAY_REPL = 13


class Code(IntEnum):
    """Options that we read or write."""

    CLIENT_ID = 1
    SERVER_ID = 2
    IA_NA = 3
    IA_TA = 4
    IA_ADDRESS = 5
    OPTION_REQUEST = 6
    PREFERENCE = 7
    STATUS = 13
    RAPID_COMMIT = 14
    DNS_SERVERS = 23  # RFC 3646
    DOMAIN_LIST = 24  # RFC 3646
    IA_PD = 25
    SNTP_SERVERS = 31  # RFC 4075
    CLIENT_FQDN = 39  # RFC 4704
    NTP_SERVER = 56  # RFC 5908


class Status(IntEnum):
    """Status codes (RFC 8415 section 21.13)."""

    SUCCESS = 0
    UNSPEC_FAIL = 1
    NO_ADDRS_AVAIL = 2
    NO_BINDING = 3
    NOT_ON_LINK = 4
    USE_MULTICAST = 5
    NO_PREFIX_AVAIL = 6


IA_CODES = (Code.IA_NA, Code.IA_TA, Code.IA_PD)


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are not what they should be, and the rule that they break."""

    reason: str


@dataclass(frozen=True, slots=True)
class Option:
    """One option, its value as it stands on the wire (RFC 8415 section 21.1)."""

    code: int
    data: bytes

    def encode(self) -> bytes:
        return _OPTION.pack(self.code, len(self.data)) + self.data


_OPTION = struct.Struct("!HH")


def parse_options(data: bytes) -> tuple[Option, ...] | Malformed:
    """The options that fill `data`, in their order."""
    options: list[Option] = []
    at = 0
    while at < len(data):
        if len(data) - at < _OPTION.size:
            return Malformed(f"{len(data) - at} stray bytes after the last option")
        code, length = _OPTION.unpack_from(data, at)
        at += _OPTION.size
        if length > len(data) - at:
            return Malformed(f"option {code} claims {length} bytes, {len(data) - at} are left")
        options.append(Option(code, data[at : at + length]))
        at += length
    return tuple(options)


@dataclass(frozen=True, slots=True)
class Message:
    """A message between client and server (RFC 8415 section 8). `transaction` has 3 bytes."""

    kind: Kind
    transaction: bytes
    options: tuple[Option, ...] = ()

    def values(self, code: Code) -> tuple[bytes, ...]:
        """The value of each option of this code, in the message's order."""
        return tuple(option.data for option in self.options if option.code == code)

    def encode(self) -> bytes:
        return bytes([self.kind]) + self.transaction + b"".join(option.encode() for option in self.options)


def parse_message(data: bytes) -> Message | Malformed:
    """The message in a UDP payload. Messages of relays have another form, and are refused."""
    if len(data) < 4:
        return Malformed(f"{len(data)} bytes: a message has at least 4")
    try:
        kind = Kind(data[0])
    except ValueError:
        return Malformed(f"unknown message type {data[0]}")
    if kind in (Kind.RELAY_FORW, Kind.RELAY_REPL):
        return Malformed(f"{kind.name}: no relay stands between this server and its client")
    options = parse_options(data[4:])
    if isinstance(options, Malformed):
        return options
    return Message(kind, data[1:4], options)


@dataclass(frozen=True, slots=True)
class IaAddress:
    """An address within an IA, lifetimes in seconds (RFC 8415 section 21.6)."""

    address: IPv6Address
    preferred_s: int
    valid_s: int

    def option(self) -> Option:
        return Option(Code.IA_ADDRESS, self.address.packed + _LIFETIMES.pack(self.preferred_s, self.valid_s))


@dataclass(frozen=True, slots=True)
class Ia:
    """An identity association: IA_NA, IA_TA or IA_PD (RFC 8415 sections 21.4, 21.5, 21.21).

    `code` says which; IA_TA has no T1 and T2; the prefixes of an IA_PD are among `options`.
    """

    code: Code
    iaid: int
    t1_s: int = 0
    t2_s: int = 0
    addresses: tuple[IaAddress, ...] = ()
    options: tuple[Option, ...] = ()

    def option(self) -> Option:
        header = _IAID.pack(self.iaid)
        if self.code != Code.IA_TA:
            header += _LIFETIMES.pack(self.t1_s, self.t2_s)
        inner = [*(address.option() for address in self.addresses), *self.options]
        return Option(self.code, header + b"".join(option.encode() for option in inner))


_IAID = struct.Struct("!I")
_LIFETIMES = struct.Struct("!II")
_IA_ADDRESS_SIZE = 16 + _LIFETIMES.size


def parse_ia(code: Code, data: bytes) -> Ia | Malformed:
    """The identity association in the value of an option of `code`, which is one of `IA_CODES`."""
    size = _IAID.size + (0 if code == Code.IA_TA else _LIFETIMES.size)
    if len(data) < size:
        return Malformed(f"{code.name} of {len(data)} bytes, it has at least {size}")
    (iaid,) = _IAID.unpack_from(data)
    t1_s, t2_s = (0, 0) if code == Code.IA_TA else _LIFETIMES.unpack_from(data, _IAID.size)
    inner = parse_options(data[size:])
    if isinstance(inner, Malformed):
        return Malformed(f"{code.name}: {inner.reason}")
    addresses: list[IaAddress] = []
    others: list[Option] = []
    for option in inner:
        if option.code != Code.IA_ADDRESS or code == Code.IA_PD:
            others.append(option)
        elif len(option.data) < _IA_ADDRESS_SIZE:
            size = len(option.data)
            return Malformed(f"{code.name}: address of {size} bytes, it has at least {_IA_ADDRESS_SIZE}")
        else:
            # What may follow the lifetimes are options from a server; a client has none to send.
            lifetimes = _LIFETIMES.unpack_from(option.data, 16)
            addresses.append(IaAddress(IPv6Address(option.data[:16]), *lifetimes))
    return Ia(code, iaid, t1_s, t2_s, tuple(addresses), tuple(others))


def status_option(status: Status, text: str) -> Option:
    """A status code with a text for people (RFC 8415 section 21.13)."""
    return Option(Code.STATUS, struct.pack("!H", status) + text.encode())


def addresses_option(code: Code, addresses: Iterable[IPv6Address]) -> Option:
    """A list of addresses: options 23 and 31."""
    return Option(code, b"".join(address.packed for address in addresses))


def ntp_option(server: IPv6Address) -> Option:
    """One NTP server; RFC 5908 section 4 has one option for each server, holding suboption 1."""
    return Option(Code.NTP_SERVER, Option(1, server.packed).encode())


_FQDN_S, _FQDN_O, _FQDN_N = 1, 2, 4


def fqdn_option(received: bytes, hostname: str) -> Option:
    """The answer to a client's option 39: the name it has here, and that nobody updates the DNS.

    RFC 4704 section 6: N is set, therefore S is not, and O tells a client that wanted S. A name of one
    label is partial (section 4.2), hence without the final zero.
    """
    override = _FQDN_O if received[:1] and received[0] & _FQDN_S else 0
    name = encode_name(hostname)
    return Option(Code.CLIENT_FQDN, bytes([_FQDN_N | override]) + (name if "." in hostname else name[:-1]))


# --- DUIDs and MACs ---------------------------------------------------------------------------------

_ETHERNET = 1
_DUID_LLT, _DUID_LL = 1, 3
DUID_SIZES = range(3, 131)  # RFC 8415 section 11.1: 2 bytes of type, then 1 to 128
_MAC = re.compile(r"[0-9a-f]{2}(?:([:-])[0-9a-f]{2})(?:\1[0-9a-f]{2}){4}")


def duid_ll(mac: str) -> bytes:
    """The DUID that is made of a MAC alone (RFC 8415 section 11.4). Raises ConfigError as `parse_mac`."""
    return struct.pack("!HH", _DUID_LL, _ETHERNET) + parse_mac(mac)


def duid_mac(duid: bytes) -> bytes | None:
    """The MAC that a DUID-LL or DUID-LLT of an Ethernet interface holds; None for any other DUID."""
    if len(duid) < 4 or duid[2:4] != _ETHERNET.to_bytes(2, "big"):
        return None
    mac = {_DUID_LLT: duid[8:], _DUID_LL: duid[4:]}.get(int.from_bytes(duid[:2], "big"), b"")
    return mac if len(mac) == 6 else None


def parse_mac(text: str) -> bytes:
    """The 6 bytes of a MAC, in either case, with colons or hyphens. Raises ConfigError for anything else."""
    if not _MAC.fullmatch(text.lower()):
        raise ConfigError(f"MAC {text!r} is not valid: give six bytes in hex, such as 0a:58:0a:f4:01:07")
    return bytes.fromhex(text.replace(text[2], ""))


def format_mac(mac: bytes) -> str:
    """A MAC as we print it: lower case, with colons."""
    return mac.hex(":")


# --- Names ------------------------------------------------------------------------------------------

_LABEL = re.compile(r"[_a-z0-9](?:[_a-z0-9-]{0,61}[_a-z0-9])?")
_MAX_NAME = 255  # RFC 1035 section 2.3.4: bytes on the wire


def encode_name(name: str) -> bytes:
    """A name in RFC 1035's form, in lower case, uncompressed, with the final zero.

    A trailing dot adds nothing. Raises ConfigError for a label that is not 1 to 63 letters, digits, inner
    hyphens and underscores, or a name of more than 255 bytes.
    """
    labels = name.lower().removesuffix(".").split(".")
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise ConfigError(
                f"name {name!r} is not valid at {label!r}: a label has 1 to 63 letters, digits, "
                f"underscores and inner hyphens"
            )
    wire = b"".join(bytes([len(label)]) + label.encode() for label in labels) + b"\0"
    if len(wire) > _MAX_NAME:
        raise ConfigError(f"name {name!r} is not valid: it has {len(wire)} bytes, at most {_MAX_NAME} fit")
    return wire


def encode_search(name: str) -> bytes:
    """A search domain as `encode_name` has it; ConfigError also where its last label starts with a digit.

    The rule keeps addresses out, which resolv.conf files do have in their search lines.
    """
    wire = encode_name(name)
    last = name.removesuffix(".").rpartition(".")[2]
    if not last[0].isalpha():
        raise ConfigError(f"search domain {name!r} is not valid: {last!r} must start with a letter")
    return wire
