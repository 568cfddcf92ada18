"""A DHCPv6 server for one client on one link (RFC 8415): bytes in, values out.

It holds no bindings. One address belongs to one client, so the answer to any message follows from the
message and the lease alone, and a server that was killed and started again gives the same one. In a
message with several IA_NAs the address goes to the one that names it, or else to the first.

Decision: CONFIRM succeeds for our address only. Another address of the same prefix would be "on link" by
the letter of RFC 8415 section 18.3.3, but no traffic reaches a guest that keeps it.

Decision: a REQUEST for another address is given ours, as the offer was; section 18.3.2's NotOnLink would
send the client through the same exchange again. A RENEW or REBIND of another address is given ours, and
the other one with lifetimes of 0, so that a guest moved to a new pod is right after one exchange.

Decision: option 7 (preference) is 255 when an address is offered. A client then takes the offer at once
instead of collecting others for a second (section 18.2.1).

Decision: without option 6 (option request) a client gets all that there is, as upstream's did, but for
39, which RFC 4704 section 6 allows only to those who ask. Messages that only check or give back an
address (CONFIRM, RELEASE, DECLINE) carry none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv6Address

from cni.errors import ConfigError
from launcher.ipv6.packet import (
    DUID_SIZES,
    IA_CODES,
    INFINITE_S,
    Code,
    Ia,
    IaAddress,
    Kind,
    Malformed,
    Message,
    Option,
    Status,
    addresses_option,
    duid_mac,
    encode_name,
    encode_search,
    format_mac,
    fqdn_option,
    ntp_option,
    parse_ia,
    parse_mac,
    parse_message,
    status_option,
)

SERVER_PORT = 547
CLIENT_PORT = 546
ALL_SERVERS = IPv6Address("ff02::1:2")  # All_DHCP_Relay_Agents_and_Servers, RFC 8415 section 7.1

# The answer to each IA and address is longer than what was asked, and must fit in one datagram.
_MAX_BINDINGS = 64


@dataclass(frozen=True, slots=True)
class Dhcp6Lease:
    """What the one client is given. Raises ConfigError for a value that cannot be sent.

    `mac` is the client's; None serves whoever is on the link. `server_duid` is best the DUID-LL of the
    bridge's MAC, which stays when the launcher is started again. `hostname` is a label or a full name.
    Lifetimes in seconds; the default is upstream's 999 days, `INFINITE_S` is for ever.
    """

    address: IPv6Address
    server_duid: bytes
    mac: str | None = None
    dns: tuple[IPv6Address, ...] = ()
    search: tuple[str, ...] = ()
    ntp: tuple[IPv6Address, ...] = ()
    hostname: str = ""
    preferred_s: int = 86_313_600
    valid_s: int = 86_313_600

    def __post_init__(self) -> None:
        one = self.address
        if one.is_multicast or one.is_unspecified or one.is_loopback or one.is_link_local:
            raise ConfigError(f"address {one} cannot be leased: give a global or unique local unicast one")
        if len(self.server_duid) not in DUID_SIZES:
            raise ConfigError(
                f"server DUID {self.server_duid.hex()!r} is not valid: {len(self.server_duid)} bytes, "
                f"right are 3 to 130"
            )
        if not 0 < self.preferred_s <= self.valid_s <= INFINITE_S:
            raise ConfigError(
                f"lifetimes preferred {self.preferred_s} s, valid {self.valid_s} s: right is "
                f"0 < preferred <= valid <= {INFINITE_S}"
            )
        if self.mac is not None:
            parse_mac(self.mac)
        if self.hostname:
            encode_name(self.hostname)
        for name in self.search:
            encode_search(name)

    @property
    def t1_s(self) -> int:
        """When the client asks this server again: half the preferred lifetime (RFC 8415 section 21.4)."""
        return INFINITE_S if self.preferred_s == INFINITE_S else self.preferred_s // 2

    @property
    def t2_s(self) -> int:
        """When the client asks any server: 0.8 of the preferred lifetime."""
        return INFINITE_S if self.preferred_s == INFINITE_S else self.preferred_s * 4 // 5


@dataclass(frozen=True, slots=True)
class Reply:
    """`data` goes to `destination`, port 546, from port 547 of the interface that the request came in by.

    `request` is what is answered: a DECLINE means that somebody else uses the address.
    """

    data: bytes
    destination: IPv6Address
    kind: Kind
    request: Kind


@dataclass(frozen=True, slots=True)
class Ignored:
    """No answer, and why: one line for the debug log."""

    reason: str


class Server6:
    """The server. `receive` has no state to change, so one object may be used from any thread."""

    def __init__(self, lease: Dhcp6Lease) -> None:
        self._lease = lease
        self._mac = parse_mac(lease.mac) if lease.mac is not None else None
        self._configuration = tuple(_configuration(lease))

    def receive(
        self, datagram: bytes, source: IPv6Address, multicast: bool, source_mac: str | None = None
    ) -> Reply | Ignored:
        """Answer one UDP payload that came to port 547 from `source`. Nothing in it raises.

        `multicast` tells whether it was sent to `ALL_SERVERS`. `source_mac` is the frame's source where
        the socket tells it. Of a lease with a MAC, it decides who the client is; without it the
        client's DUID must hold that MAC, and a client with another kind of DUID is not answered.
        """
        message = parse_message(datagram)
        if isinstance(message, Malformed):
            return Ignored(message.reason)
        ias = _identity_associations(message)
        if isinstance(ias, Malformed):
            return Ignored(f"{message.kind.name}: {ias.reason}")
        reason = (
            self._misplaced(message.kind, source, multicast)
            or self._misidentified(message, ias)
            or self._from_another_client(message, source_mac)
        )
        if reason:
            return Ignored(f"{message.kind.name}: {reason}")
        answer = self._answer(message, ias) if multicast else self._use_multicast(message)
        if isinstance(answer, Ignored):
            return answer
        return Reply(answer.encode(), source, answer.kind, message.kind)

    # --- what is not answered ---

    def _misplaced(self, kind: Kind, source: IPv6Address, multicast: bool) -> str:
        """Why no message of this kind is taken from there and in that way (section 16)."""
        if not source.is_link_local and (multicast or source != self._lease.address):
            return f"source {source} is not of this link"
        if not multicast and kind not in (Kind.REQUEST, Kind.RENEW, Kind.RELEASE, Kind.DECLINE):
            return "not sent to the multicast group"
        return ""

    def _misidentified(self, message: Message, ias: tuple[Ia, ...]) -> str:
        """Why the message's identifiers forbid an answer (sections 16.2 to 16.12)."""
        clients, servers = message.values(Code.CLIENT_ID), message.values(Code.SERVER_ID)
        information = message.kind == Kind.INFORMATION_REQUEST
        if len(clients) > 1 or len(servers) > 1:
            return "several identifiers of one kind"
        if not clients and not information:
            return "no client identifier"
        if clients and len(clients[0]) not in DUID_SIZES:
            return f"client identifier of {len(clients[0])} bytes"
        if servers and message.kind in (Kind.SOLICIT, Kind.CONFIRM, Kind.REBIND):
            return "names a server where it must not"
        if servers and servers[0] != self._lease.server_duid:
            return f"for the server {servers[0].hex()}"
        if not servers and message.kind in (Kind.REQUEST, Kind.RENEW, Kind.RELEASE, Kind.DECLINE):
            return "no server identifier"
        if information and ias:
            return f"contains {ias[0].code.name}"
        return ""

    def _from_another_client(self, message: Message, source_mac: str | None) -> str:
        """Why the message is not shown to come from the lease's client."""
        if self._mac is None:
            return ""
        if source_mac is not None:
            return (
                "" if source_mac.lower().replace("-", ":") == format_mac(self._mac) else f"from {source_mac}"
            )
        mac = duid_mac((*message.values(Code.CLIENT_ID), b"")[0])
        if mac is None:
            return "neither frame nor DUID tells the client's MAC"
        return "" if mac == self._mac else f"DUID of {format_mac(mac)}"

    # --- what is answered ---

    def _use_multicast(self, message: Message) -> Message:
        status = status_option(Status.USE_MULTICAST, "send to ff02::1:2")
        return self._message(Kind.REPLY, message, [status])

    def _answer(self, message: Message, ias: tuple[Ia, ...]) -> Message | Ignored:
        """The answer to a multicast message that passed all checks (section 18.3)."""
        match message.kind:
            case Kind.SOLICIT if message.values(Code.RAPID_COMMIT):
                options = [Option(Code.RAPID_COMMIT, b""), *self._assign(ias), *self._requested(message)]
            case Kind.SOLICIT:
                return self._advertise(message, ias)
            case Kind.REQUEST:
                options = [*self._assign(ias), *self._requested(message)]
            case Kind.RENEW | Kind.REBIND:
                options = [*self._assign(ias, withdraw=True), *self._requested(message)]
            case Kind.CONFIRM:
                addresses = [each.address for ia in ias for each in ia.addresses]
                if not addresses:
                    return Ignored("CONFIRM: no address to confirm")
                options = [self._confirm(addresses)]
            case Kind.RELEASE | Kind.DECLINE:
                options = [status_option(Status.SUCCESS, "noted"), *self._unbound(ias)]
            case Kind.INFORMATION_REQUEST:
                options = [*self._requested(message)]
            case _:
                return Ignored(f"{message.kind.name}: sent by servers only")
        return self._message(Kind.REPLY, message, options)

    def _advertise(self, message: Message, ias: tuple[Ia, ...]) -> Message:
        offered = any(ia.code == Code.IA_NA for ia in ias)
        options = [*([Option(Code.PREFERENCE, b"\xff")] if offered else []), *self._assign(ias)]
        return self._message(Kind.ADVERTISE, message, [*options, *self._requested(message)])

    def _message(self, kind: Kind, request: Message, options: Iterable[Option]) -> Message:
        client = [Option(Code.CLIENT_ID, duid) for duid in request.values(Code.CLIENT_ID)]
        server = Option(Code.SERVER_ID, self._lease.server_duid)
        return Message(kind, request.transaction, (*client, server, *options))

    def _assign(self, ias: tuple[Ia, ...], withdraw: bool = False) -> Iterator[Option]:
        """Each IA with what it gets: one of them the address, the others a status (section 18.3).

        `withdraw` returns addresses that are not the client's with lifetimes of 0.
        """
        candidates = [ia for ia in ias if ia.code == Code.IA_NA]
        holder = next((ia for ia in candidates if self._names_ours(ia)), (*candidates, None)[0])
        lease = self._lease
        ours = IaAddress(lease.address, lease.preferred_s, lease.valid_s)
        for ia in ias:
            others = [a for a in ia.addresses if a.address != lease.address] if withdraw else []
            void = [replace(a, preferred_s=0, valid_s=0) for a in others]
            if ia is holder:
                yield Ia(ia.code, ia.iaid, lease.t1_s, lease.t2_s, (ours, *void)).option()
            elif void:
                yield Ia(ia.code, ia.iaid, addresses=tuple(void)).option()
            elif ia.code == Code.IA_PD:
                yield _refused(ia, Status.NO_PREFIX_AVAIL, "no prefixes here")
            else:
                yield _refused(ia, Status.NO_ADDRS_AVAIL, "one address, and no temporary ones")

    def _names_ours(self, ia: Ia) -> bool:
        return any(each.address == self._lease.address for each in ia.addresses)

    def _confirm(self, addresses: list[IPv6Address]) -> Option:
        if all(address == self._lease.address for address in addresses):
            return status_option(Status.SUCCESS, "still yours")
        return status_option(Status.NOT_ON_LINK, f"only {self._lease.address} is yours")

    def _unbound(self, ias: tuple[Ia, ...]) -> Iterator[Option]:
        """The IAs that give back what they never had (sections 18.3.7 and 18.3.8)."""
        for ia in ias:
            if ia.code != Code.IA_NA or not self._names_ours(ia):
                yield _refused(ia, Status.NO_BINDING, "not given out here")

    def _requested(self, message: Message) -> Iterator[Option]:
        """The configuration that the client asked for, in ascending order of codes."""
        requests = message.values(Code.OPTION_REQUEST)
        wanted = {code for data in requests for (code,) in struct.iter_unpack("!H", data[: len(data) & ~1])}
        yield from (each for each in self._configuration if not requests or each.code in wanted)
        names = message.values(Code.CLIENT_FQDN)
        if self._lease.hostname and names and Code.CLIENT_FQDN in wanted:
            yield fqdn_option(names[0], self._lease.hostname)


def _identity_associations(message: Message) -> tuple[Ia, ...] | Malformed:
    """The message's IAs, in its order."""
    ias: list[Ia] = []
    for option in message.options:
        if option.code in IA_CODES:
            ia = parse_ia(Code(option.code), option.data)
            if isinstance(ia, Malformed):
                return ia
            ias.append(ia)
    count = sum(1 + len(ia.addresses) for ia in ias)
    if count > _MAX_BINDINGS:
        return Malformed(f"{count} identity associations and addresses, at most {_MAX_BINDINGS} are answered")
    return tuple(ias)


def _refused(ia: Ia, status: Status, text: str) -> Option:
    return Ia(ia.code, ia.iaid, options=(status_option(status, text),)).option()


def _configuration(lease: Dhcp6Lease) -> Iterator[Option]:
    """The options that do not depend on the client; an empty list is left out, never sent empty."""
    if lease.dns:
        yield addresses_option(Code.DNS_SERVERS, lease.dns)
    if lease.search:
        yield Option(Code.DOMAIN_LIST, b"".join(encode_search(name) for name in lease.search))
    if lease.ntp:
        yield addresses_option(Code.SNTP_SERVERS, lease.ntp)
        yield from (ntp_option(server) for server in lease.ntp)
