"""Encoders of nf_tables: the expressions of a rule, data types, comments. No socket.

An expression is bytes, ready for `cni.net.nft.Transaction.add_rule`, which takes a list of them. They work on
registers: REG (which holds 16 bytes) and REG + 1 ... in steps of four bytes, so that a concatenated key of a
protocol and a port is loaded into REG and REG + 1. Numbers are as on the wire, addresses as plain integers
with a family of 4 or 6 (`cni.spec.address`).

Layouts: linux/netfilter/nf_tables.h. User data (comments): libnftnl/udata.h, as `nft` reads and writes it.
"""

from __future__ import annotations

import sys

from cni.net.nlmsg import NLA_F_NESTED, attr, attr_list, attrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.spec.address import Cidr

REG = 8  # NFT_REG32_00

# Data types of sets and maps, numbered by nft (datatype.h); the kernel only keeps the number.
IPV4_ADDR, IPV6_ADDR, ETHER_ADDR, INET_PROTO, INET_SERVICE, MARK, IFNAME = 7, 8, 9, 12, 13, 19, 41
VERDICT = 0xFFFFFF00
_BITS_PER_TYPE = 6
_TYPE_BYTES = {
    IPV4_ADDR: 4,
    IPV6_ADDR: 16,
    ETHER_ADDR: 6,
    INET_PROTO: 1,
    INET_SERVICE: 2,
    MARK: 4,
    IFNAME: 16,
}

EQ, NEQ = 0, 1  # of `compare`
NETWORK_HEADER, TRANSPORT_HEADER, LINK_HEADER = 1, 2, 0
META_MARK, META_IIFNAME, META_OIFNAME, META_NFPROTO, META_L4PROTO = 3, 6, 7, 15, 16
NFPROTO = {4: 2, 6: 10}

_ACCEPT, _DROP = 1, 0
_JUMP, _RETURN = -3, -5
_COMMENT_OF_RULE, _COMMENT_OF_ELEMENT = 0, 0
_IFNAME_BYTES = 16
LONGEST_COMMENT = 128  # bytes; what `nft` accepts when it is given its own listing
_RTN_LOCAL = 2
_FIB_ADDRTYPE, _FIB_DADDR = 3, 2
_NAT_DESTINATION = 1


def be32(value: int) -> bytes:
    """An integer as nf_tables wants it in attributes; verdicts are negative."""
    return (value & 0xFFFFFFFF).to_bytes(4, "big")


def text(value: str) -> bytes:
    """A name as the kernel's strings are: ended by NUL."""
    return value.encode() + b"\0"


def nested(kind: int, *parts: bytes) -> bytes:
    return attr(kind | NLA_F_NESTED, b"".join(parts))


def value(data: bytes) -> bytes:
    """The content of an attribute that holds data (NFTA_DATA_VALUE)."""
    return attr(1, data)


def verdict(code: int, chain: str = "") -> bytes:
    """The content of an attribute that holds a verdict; also the data of a verdict map."""
    target = attr(2, text(chain)) if chain else b""
    return nested(2, attr(1, be32(code)), target)


def jump_verdict(chain: str) -> bytes:
    """`jump chain`, as data of a verdict map."""
    return verdict(_JUMP, chain)


# --- data types


def concatenation(*types: int) -> int:
    """The data type `a . b . c`."""
    number = 0
    for one in types:
        number = number << _BITS_PER_TYPE | one
    return number


def type_bytes(number: int) -> int:
    """Length of a value of a data type; the parts of a concatenation fill whole words."""
    if number < 1 << _BITS_PER_TYPE:
        return _TYPE_BYTES[number]
    total = 0
    while number:
        total += (_TYPE_BYTES[number & (1 << _BITS_PER_TYPE) - 1] + 3) & ~3
        number >>= _BITS_PER_TYPE
    return total


def key(*parts: bytes) -> bytes:
    """A key or a datum of several parts, each filled up to whole words; one part alone is left as it is."""
    if len(parts) == 1:
        return parts[0]
    return b"".join(part + b"\0" * (-len(part) % 4) for part in parts)


def address(family: int, number: int) -> bytes:
    return number.to_bytes(4 if family == 4 else 16, "big")


def port(number: int) -> bytes:
    return number.to_bytes(2, "big")


def ifname(name: str) -> bytes:
    return name.encode().ljust(_IFNAME_BYTES, b"\0")


# --- comments


def rule_comment(comment: str) -> bytes:
    """User data of a rule that `nft` shows as its comment; raises ValueError if it is too long."""
    return _comment(_COMMENT_OF_RULE, comment)


def element_comment(comment: str) -> bytes:
    """`rule_comment` for an element of a set."""
    return _comment(_COMMENT_OF_ELEMENT, comment)


def read_comment(userdata: bytes) -> str:
    """The comment in the user data of a rule or an element; empty if there is none."""
    offset = 0
    while offset + 2 <= len(userdata):
        kind, length = userdata[offset], userdata[offset + 1]
        if kind == _COMMENT_OF_RULE:
            return userdata[offset + 2 : offset + 2 + length].rstrip(b"\0").decode("utf-8", "replace")
        offset += 2 + length
    return ""


def _comment(kind: int, comment: str) -> bytes:
    data = text(comment)
    if len(data) > LONGEST_COMMENT + 1:
        raise ValueError(f"comment longer than {LONGEST_COMMENT} bytes: {comment}")
    return bytes((kind, len(data))) + data


# --- expressions


def expression(name: str, *data: bytes) -> bytes:
    """Any expression, from its kernel name and its attributes."""
    return nested(1, attr(1, text(name)), nested(2, *data))


def payload(base: int, offset: int, length: int, register: int = REG) -> bytes:
    """Load bytes of the packet: a header (`NETWORK_HEADER` ...), offset and length in it."""
    return expression(
        "payload",
        attr(1, be32(register)),
        attr(2, be32(base)),
        attr(3, be32(offset)),
        attr(4, be32(length)),
    )


def meta(what: int, register: int = REG) -> bytes:
    """Load a property of the packet, `META_L4PROTO` ..."""
    return expression("meta", attr(2, be32(what)), attr(1, be32(register)))


def set_meta(what: int, register: int = REG) -> bytes:
    """Store a register into a property of the packet, `META_MARK`."""
    return expression("meta", attr(2, be32(what)), attr(3, be32(register)))


def compare(operator: int, data: bytes, register: int = REG) -> bytes:
    """Go on with the rule only if the register is equal (`EQ`) or not equal (`NEQ`) to `data`."""
    return expression("cmp", attr(1, be32(register)), attr(2, be32(operator)), nested(3, value(data)))


def bitwise(mask: bytes, xor: bytes, register: int = REG) -> bytes:
    """register = register & mask ^ xor."""
    return expression(
        "bitwise",
        attr(1, be32(register)),
        attr(2, be32(register)),
        attr(3, be32(len(mask))),
        nested(4, value(mask)),
        nested(5, value(xor)),
    )


def immediate(data: bytes, register: int = REG) -> bytes:
    """Load a constant."""
    return expression("immediate", attr(1, be32(register)), nested(2, value(data)))


def lookup(name: str, register: int = REG, *, into: int | None = None, invert: bool = False) -> bytes:
    """Go on only if the register is in a set, or, with `invert`, if it is not.

    `into` is for maps: the register that gets the datum; 0 executes the verdict of a verdict map.
    """
    destination = b"" if into is None else attr(3, be32(into))
    flags = attr(5, be32(1)) if invert else b""
    return expression("lookup", attr(1, text(name)), attr(2, be32(register)), destination, flags)


def _final(code: int, chain: str = "") -> bytes:
    return expression("immediate", attr(1, be32(0)), nested(2, verdict(code, chain)))


def accept() -> bytes:
    return _final(_ACCEPT)


def drop() -> bytes:
    return _final(_DROP)


def jump(chain: str) -> bytes:
    return _final(_JUMP, chain)


def return_() -> bytes:
    return _final(_RETURN)


def masquerade() -> bytes:
    return expression("masq")


def dnat(family: int, address_register: int = REG, port_register: int | None = None) -> bytes:
    """Rewrite the destination to the address, and port if given, in the registers; `family` is 4 or 6."""
    proto = b"" if port_register is None else attr(5, be32(port_register))
    return expression(
        "nat",
        attr(1, be32(_NAT_DESTINATION)),
        attr(2, be32(NFPROTO[family])),
        attr(3, be32(address_register)),
        proto,
    )


def counter() -> bytes:
    return expression("counter")


def fib_local_destination(register: int = REG) -> list[bytes]:
    """`fib daddr type local`: the packet is for an address of this host."""
    load = expression("fib", attr(1, be32(register)), attr(2, be32(_FIB_ADDRTYPE)), attr(3, be32(_FIB_DADDR)))
    return [load, compare(EQ, _RTN_LOCAL.to_bytes(4, sys.byteorder), register)]


# --- matches of several expressions


def is_family(family: int) -> list[bytes]:
    """`meta nfproto ipv4` or `ipv6`: needed in tables of the family inet before addresses are looked at."""
    return [meta(META_NFPROTO), compare(EQ, bytes((NFPROTO[family],)))]


def load_address(family: int, which: str, register: int = REG) -> bytes:
    """Load the packet's address, `saddr` or `daddr`."""
    first, length = (12, 4) if family == 4 else (8, 16)
    return payload(NETWORK_HEADER, first if which == "saddr" else first + length, length, register)


def in_network(which: str, network: Cidr, operator: int = EQ) -> list[bytes]:
    """`ip saddr 10.1.0.0/16`, `ip6 daddr != fd00::/64`."""
    network = network.network()
    data = address(network.family, network.value)
    load = load_address(network.family, which)
    bits = 8 * len(data)
    if network.prefix == bits:
        return [load, compare(operator, data)]
    mask = ((1 << bits) - (1 << bits - network.prefix)).to_bytes(len(data), "big")
    return [load, bitwise(mask, bytes(len(data))), compare(operator, data)]


def load_l4_protocol(register: int = REG) -> bytes:
    """Load the number of the transport protocol, one byte."""
    return meta(META_L4PROTO, register)


def load_destination_port(register: int = REG) -> bytes:
    """Load the destination port of TCP, UDP or SCTP, two bytes."""
    return payload(TRANSPORT_HEADER, 2, 2, register)


def read_jump(expressions: bytes) -> str:
    """The chain to which a rule, as the kernel lists its expressions, jumps or goes; empty if none."""
    for _, one in attr_list(expressions):
        found = attrs(one)
        if found.get(1, b"").rstrip(b"\0") == b"immediate":
            chain = attrs(attrs(attrs(found.get(2, b"")).get(2, b"")).get(2, b"")).get(2)
            if chain:
                return chain.rstrip(b"\0").decode("utf-8", "replace")
    return ""


def read_iifname(expressions: bytes) -> str:
    """The interface by which a rule wants its packets to come in; empty if it does not name one."""
    loaded = False
    for _, one in attr_list(expressions):
        found = attrs(one)
        name, data = found.get(1, b"").rstrip(b"\0"), attrs(found.get(2, b""))
        if loaded and name == b"cmp" and data.get(2) == be32(EQ):
            compared = attrs(data.get(3, b"")).get(1, b"")
            # Less than a whole name is a pattern as "veth*".
            return compared.rstrip(b"\0").decode("utf-8", "replace") if len(compared) == _IFNAME_BYTES else ""
        loaded = name == b"meta" and data.get(2) == be32(META_IIFNAME)
    return ""
