"""Router advertisements (RFC 4861): the guest's default route, and the word that DHCPv6 has its address.

The advertisement's values and bytes are here, and `Responder`, which says when to send one to whom. It
has neither clock nor chance of its own: the caller passes the time (seconds, of a clock that never goes
back) and random numbers.

Decision: a solicitation from a link-local address is answered to that address alone, which section 6.2.6
allows and which needs no 3 seconds between answers. All others are answered to all nodes.

Decision: names that do not fit are left out of the DNSSL option, the last ones first. Messages of
neighbour discovery must not be fragmented (RFC 6980), and DHCPv6 carries the whole list.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from ipaddress import IPv6Address, IPv6Network

from cni.errors import ConfigError
from launcher.ipv6.packet import INFINITE_S, Malformed, encode_search, parse_mac

HOP_LIMIT = 255  # of the IPv6 header, sent and demanded: no router can have forwarded the packet
ALL_NODES = IPv6Address("ff02::1")
ALL_ROUTERS = IPv6Address("ff02::2")
ROUTER_SOLICITATION = 133
ROUTER_ADVERTISEMENT = 134

_SOURCE_LINK_LAYER, _PREFIX, _MTU, _RDNSS, _DNSSL = 1, 3, 5, 25, 31
_MANAGED, _OTHER = 0x80, 0x40
_ON_LINK, _AUTONOMOUS = 0x80, 0x40
_MIN_LINK_MTU, _IPV6_HEADER = 1280, 40
_MAX_OPTION = 255 * 8  # bytes
_MAX_DNS = (_MAX_OPTION - 8) // 16


class Preference(IntEnum):
    """How this router ranks among several (RFC 4191 section 2.1)."""

    MEDIUM = 0
    HIGH = 1
    LOW = 3


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix of the link (RFC 4861 section 4.6.2). Raises ConfigError.

    `on_link`: its addresses are neighbours. `autonomous`: hosts make addresses of it themselves, which
    takes a /64 (RFC 4862 section 5.5.3).
    """

    network: IPv6Network
    on_link: bool = True
    autonomous: bool = False
    preferred_s: int = INFINITE_S
    valid_s: int = INFINITE_S

    def __post_init__(self) -> None:
        if self.autonomous and self.network.prefixlen != 64:
            raise ConfigError(
                f"prefix {self.network} cannot be autonomous: hosts make addresses of a /64 only"
            )
        if not 0 <= self.preferred_s <= self.valid_s <= INFINITE_S:
            raise ConfigError(
                f"prefix {self.network}: lifetimes preferred {self.preferred_s} s, valid {self.valid_s} s: "
                f"right is 0 <= preferred <= valid <= {INFINITE_S}"
            )

    def encode(self) -> bytes:
        flags = (_ON_LINK if self.on_link else 0) | (_AUTONOMOUS if self.autonomous else 0)
        head = struct.pack("!BBIII", self.network.prefixlen, flags, self.valid_s, self.preferred_s, 0)
        return _option(_PREFIX, head + self.network.network_address.packed)


@dataclass(frozen=True, slots=True)
class RouterAdvert:
    """What an advertisement says. Raises ConfigError for a value that cannot be sent.

    `lifetime_s` is the time for which the sender is a default router, 0 for not at all. `mac` is the
    sender's. `hop_limit` is what hosts are to put into their packets. `managed`: addresses come by
    DHCPv6; `other`: so does the rest. `dns_lifetime_s` is that of `dns` and `search` (RFC 8106), 3 times
    the longest time between two advertisements by default.
    """

    prefixes: tuple[Prefix, ...] = ()
    mac: str | None = None
    mtu: int | None = None
    dns: tuple[IPv6Address, ...] = ()
    search: tuple[str, ...] = ()
    lifetime_s: int = 1800
    dns_lifetime_s: int = 1800
    hop_limit: int = 64
    managed: bool = True
    other: bool = True
    preference: Preference = Preference.MEDIUM

    def __post_init__(self) -> None:
        if not 0 <= self.lifetime_s <= 9000:
            raise ConfigError(f"router lifetime {self.lifetime_s} s is not valid: give 0 to 9000")
        if not 0 <= self.dns_lifetime_s <= INFINITE_S:
            raise ConfigError(f"DNS lifetime {self.dns_lifetime_s} s is not valid: give 0 to {INFINITE_S}")
        if not 0 <= self.hop_limit <= 255:
            raise ConfigError(f"hop limit {self.hop_limit} is not valid: give 0 to 255")
        if self.mtu is not None and not _MIN_LINK_MTU <= self.mtu <= 0xFFFF:
            raise ConfigError(f"MTU {self.mtu} is not valid: IPv6 needs {_MIN_LINK_MTU} to 65535 bytes")
        if len(self.dns) > _MAX_DNS:
            raise ConfigError(f"{len(self.dns)} DNS servers are too many for one option: {_MAX_DNS} fit")
        room, size = self._room(), len(self._without_search())
        if size > room:
            raise ConfigError(
                f"advertisement of {size} bytes: {room} fit, give fewer prefixes or DNS servers"
            )
        for name in self.search:
            encode_search(name)

    def encode(self, source: IPv6Address | None = None, destination: IPv6Address | None = None) -> bytes:
        """The ICMPv6 message (RFC 4861 section 4.2).

        The checksum is filled in if both addresses are given. Otherwise it is 0: of an ICMPv6 raw socket
        the kernel writes it, always (RFC 3542 section 3.1).
        """
        body = self._without_search() + self._search()
        if source is None or destination is None:
            return body
        return body[:2] + checksum(body, source, destination).to_bytes(2, "big") + body[4:]

    def _room(self) -> int:
        return (self.mtu or _MIN_LINK_MTU) - _IPV6_HEADER

    def _without_search(self) -> bytes:
        flags = (_MANAGED if self.managed else 0) | (_OTHER if self.other else 0)
        if self.lifetime_s:  # RFC 4191 section 2.2: who is no default router has no rank among them
            flags |= self.preference << 3
        parts = [
            struct.pack("!BBHBBHII", ROUTER_ADVERTISEMENT, 0, 0, self.hop_limit, flags, self.lifetime_s, 0, 0)
        ]
        if self.mac is not None:
            parts.append(_option(_SOURCE_LINK_LAYER, parse_mac(self.mac)))
        if self.mtu is not None:
            parts.append(_option(_MTU, struct.pack("!HI", 0, self.mtu)))
        parts += [prefix.encode() for prefix in self.prefixes]
        if self.dns:
            servers = b"".join(server.packed for server in self.dns)
            parts.append(_option(_RDNSS, struct.pack("!HI", 0, self.dns_lifetime_s) + servers))
        return b"".join(parts)

    def _search(self) -> bytes:
        """The DNSSL option (RFC 8106 section 5.2) with as many names as fit; empty if none does."""
        names = b""
        room = min(self._room() - len(self._without_search()), _MAX_OPTION) - 8
        for wire in map(encode_search, self.search):
            if len(names + wire) > room - room % 8:
                break
            names += wire
        return _option(_DNSSL, struct.pack("!HI", 0, self.dns_lifetime_s) + names) if names else b""


def _option(kind: int, value: bytes) -> bytes:
    """An option of neighbour discovery, filled up to units of 8 bytes (RFC 4861 section 4.6)."""
    units = (2 + len(value) + 7) // 8
    return bytes([kind, units]) + value.ljust(units * 8 - 2, b"\0")


def checksum(message: bytes, source: IPv6Address, destination: IPv6Address) -> int:
    """The checksum of an ICMPv6 message of even length, whose own field is 0 (RFC 4443 section 2.3)."""
    pseudo = source.packed + destination.packed + struct.pack("!II", len(message), 58)
    total: int = sum(word for (word,) in struct.iter_unpack("!H", pseudo + message))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def check_solicitation(message: bytes, source: IPv6Address, hop_limit: int) -> Malformed | None:
    """What is wrong with a router solicitation (RFC 4861 section 6.1.1), None if nothing is. Never raises.

    `message` is the ICMPv6 message, `hop_limit` the IPv6 header's. The checksum is not looked at: the
    kernel hands an ICMPv6 raw socket only messages whose checksum is right; who reads frames checks it.
    """
    if len(message) < 8:
        return Malformed(f"{len(message)} bytes: a router solicitation has at least 8")
    if message[0] != ROUTER_SOLICITATION:
        return Malformed(f"ICMPv6 type {message[0]} is not a router solicitation")
    if message[1] != 0:
        return Malformed(f"code {message[1]}: it must be 0")
    if hop_limit != HOP_LIMIT:
        return Malformed(f"hop limit {hop_limit}: it must be {HOP_LIMIT}, so it comes from another link")
    if source.is_multicast or source.is_loopback:
        return Malformed(f"source {source} is not a host's")
    kinds = _option_kinds(message[8:])
    if isinstance(kinds, Malformed):
        return kinds
    if source.is_unspecified and _SOURCE_LINK_LAYER in kinds:
        return Malformed("a link-layer address without a source address")
    return None


def _option_kinds(options: bytes) -> frozenset[int] | Malformed:
    kinds = set()
    at = 0
    while at < len(options):
        size = options[at + 1] * 8 if at + 1 < len(options) else 0
        if size == 0 or size > len(options) - at:
            return Malformed(f"option {options[at]} of {size} bytes where {len(options) - at} are left")
        kinds.add(options[at])
        at += size
    return frozenset(kinds)


# RFC 4861 section 10, seconds.
_MAX_INITIAL_INTERVAL_S = 16.0
_INITIAL_COUNT = 3
_MIN_BETWEEN_MULTICASTS_S = 3.0
_MAX_ANSWER_DELAY_S = 0.5

# Sources that wait for an answer of their own; one more, and all get one together.
_MAX_WAITING = 16


@dataclass(frozen=True, slots=True)
class Send:
    """An advertisement to send now, from a link-local address with hop limit 255.

    The checksum in `data` is 0: of an ICMPv6 raw socket the kernel fills it in, who builds frames does.
    """

    data: bytes
    destination: IPv6Address


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A valid solicitation is answered at the time `at` to `destination`."""

    at: float
    destination: IPv6Address


class Responder:
    """When to advertise (RFC 4861 sections 6.2.4 to 6.2.6). For one thread.

    Wait until `due()` or a packet; give packets to `receive`, and then send what `send` returns. Times
    are seconds; each `chance` is a random number, at least 0 and below 1.
    """

    def __init__(
        self,
        advert: RouterAdvert,
        now: float,
        max_interval_s: float = 600.0,
        min_interval_s: float = 198.0,
    ) -> None:
        """Raises ConfigError for intervals outside section 6.2.1's ranges, or longer than the lifetime."""
        if not 4 <= max_interval_s <= 1800:
            raise ConfigError(f"advertisement interval {max_interval_s} s is not valid: give 4 to 1800")
        if not 3 <= min_interval_s <= 0.75 * max_interval_s:
            raise ConfigError(
                f"shortest advertisement interval {min_interval_s} s is not valid: "
                f"give 3 to {0.75 * max_interval_s:g}, three quarters of the longest"
            )
        if 0 < advert.lifetime_s < max_interval_s:
            raise ConfigError(
                f"router lifetime {advert.lifetime_s} s is shorter than the advertisement interval "
                f"{max_interval_s} s: give 0 or more than the interval"
            )
        self._advert = advert
        self._interval_s = (min_interval_s, max_interval_s)
        self._initial_left = _INITIAL_COUNT - 1  # the first goes out now
        self._next_multicast = now
        self._last_multicast: float | None = None
        self._waiting: dict[IPv6Address, float] = {}

    def due(self) -> float:
        """When `send` will have something."""
        return min([self._next_multicast, *self._waiting.values()])

    def receive(
        self, message: bytes, source: IPv6Address, hop_limit: int, now: float, chance: float
    ) -> Scheduled | Malformed:
        """Take an ICMPv6 message that came to `ALL_ROUTERS` or to us. Nothing in it raises."""
        wrong = check_solicitation(message, source, hop_limit)
        if wrong:
            return wrong
        if source in self._waiting:
            return Scheduled(self._waiting[source], source)
        at = now + chance * _MAX_ANSWER_DELAY_S
        if source.is_link_local and len(self._waiting) < _MAX_WAITING and at < self._next_multicast:
            self._waiting[source] = at
            return Scheduled(at, source)
        if self._last_multicast is not None and now - self._last_multicast < _MIN_BETWEEN_MULTICASTS_S:
            at += self._last_multicast + _MIN_BETWEEN_MULTICASTS_S - now
        self._next_multicast = min(self._next_multicast, at)
        return Scheduled(self._next_multicast, ALL_NODES)

    def send(self, now: float, chance: float) -> tuple[Send, ...]:
        """What is due at `now`; one message to all nodes stands for all that wait for one of their own."""
        if now >= self._next_multicast:
            self._waiting.clear()
            self._last_multicast = now
            self._next_multicast = now + self._interval(chance)
            return (Send(self._advert.encode(), ALL_NODES),)
        ready = [source for source, at in self._waiting.items() if now >= at]
        for source in ready:
            del self._waiting[source]
        return tuple(Send(self._advert.encode(), source) for source in ready)

    def stop(self) -> Send:
        """The last advertisement: no default router any more (section 6.2.5). It does not wait its turn."""
        return Send(replace(self._advert, lifetime_s=0).encode(), ALL_NODES)

    def _interval(self, chance: float) -> float:
        shortest, longest = self._interval_s
        chosen = shortest + chance * (longest - shortest)
        if self._initial_left > 0:
            self._initial_left -= 1
            return min(chosen, _MAX_INITIAL_INTERVAL_S)
        return chosen
