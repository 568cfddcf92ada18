"""A DHCP server that knows one client: a datagram in, a reply or the reason for silence out (RFC 2131).

It has no socket, no clock and no log, and remembers nothing about the client but a count of its
DECLINEs: there is one address, it belongs to the client for as long as the pod lives, and every answer
follows from the lease and the request alone. So a server started anew goes on where the last one ended.

Decision: the client is whoever uses the lease's MAC address, whatever client identifier (option 61) it
sends. A boot ROM, the boot loader and the system of one guest each choose their own identifier, and all
of them are the one client. The identifier is echoed as it came (RFC 6842).

Decision: the parameter request list (option 55) selects options, not their order. Options 1 and 3 are
sent regardless, also beside 121 (a client that takes 121 ignores 3, RFC 3442), and so are private
options, which somebody asked for explicitly. A client without the list gets everything. What does not
fit into the client's message size is left out from the least important option upwards.

Decision: a wrong address is refused with NAK at once. The server is the authority for its client, so it
need not stay silent for another server's sake (RFC 2131 section 4.3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Final

from launcher.dhcp import options as opt
from launcher.dhcp.packet import (
    BOOT_REPLY,
    FLAG_BROADCAST,
    MAX_DATAGRAM,
    NO_ADDRESS,
    Malformed,
    Message,
    MessageType,
    fit,
    parse,
)

SERVER_PORT: Final = 67
CLIENT_PORT: Final = 68
BROADCAST: Final = IPv4Address("255.255.255.255")
BROADCAST_MAC: Final = b"\xff" * 6
# KubeVirt's value: 999 days.
DEFAULT_LEASE_S: Final = 86_313_600

_IP_UDP_HEADERS = 28
_MIN_MAX_MESSAGE = 576  # RFC 2132 section 9.10
_ETHERNET_MTU = 1500
_MAX_CLIENT_ID = 255
_FILE_ROOM, _SNAME_ROOM = 127, 63  # RFC 2131 figure 1, without the terminating zero
_DEFAULT_ROUTE = IPv4Network("0.0.0.0/0")

_TIMES = (opt.LEASE_TIME, opt.RENEWAL_TIME, opt.REBINDING_TIME)


@dataclass(frozen=True, slots=True)
class DhcpLease:
    """Everything that the client is told. Raises ValueError naming the value and the rule it breaks.

    `mac` None serves whoever asks, as KubeVirt does on the bridge of a masquerade binding. `search` is
    taken as found: names no client would understand are dropped (`Server.dropped_search`). If
    there are `routes` but no default route among them, the first of `routers` becomes it, since clients
    ignore `routers` then. `private` maps 224 to 254 to text, or to bytes written as 0x0a0b.
    """

    mac: str | None
    address: IPv4Interface
    server_id: IPv4Address
    routers: tuple[IPv4Address, ...] = ()
    dns: tuple[IPv4Address, ...] = ()
    search: tuple[str, ...] = ()
    hostname: str | None = None
    mtu: int | None = None
    ntp: tuple[IPv4Address, ...] = ()
    routes: tuple[opt.ClasslessRoute, ...] = ()
    lease_s: int = DEFAULT_LEASE_S
    tftp_server: str | None = None
    boot_file: str | None = None
    private: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mac is not None:
            opt.mac_address(self.mac)
        address = self.address.ip
        if address.is_multicast or address.is_loopback or not 0 < int(address) < int(BROADCAST):
            raise ValueError(f"address {self.address}: must be a unicast address other than loopback")
        if self.server_id == address:
            raise ValueError(f"server id {self.server_id}: must differ from the client's address")
        lease_options(self)


class Delivery(Enum):
    """How a reply reaches the client. The destination port is 68 in each case."""

    BROADCAST = "broadcast"  # to 255.255.255.255 and ff:ff:ff:ff:ff:ff
    LINK = "link"  # unicast, but the client cannot answer ARP for the address yet
    ADDRESS = "address"  # unicast to an address that the client uses


@dataclass(frozen=True, slots=True)
class Reply:
    """A datagram for port 68 of `address`, in a frame to `mac` (six octets).

    A sender with a packet socket needs no more than that. One with a plain UDP socket sends BROADCAST and
    ADDRESS as they are and for LINK puts `mac` into the neighbour table, or broadcasts.
    `left_out` are options that did not fit; `reason` says why a NAK is one.
    """

    kind: MessageType
    datagram: bytes
    delivery: Delivery
    address: IPv4Address
    mac: bytes
    left_out: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ignored:
    """Why a datagram gets no reply, in one line of printable text.

    `declines` is 0 but for a DECLINE of our address: then somebody else on the link uses it, which
    is worth a warning. It counts them since the start; warning at powers of two limits the rate.
    """

    reason: str
    kind: MessageType | None = None
    declines: int = 0


class Server:
    """Serves one `DhcpLease`. Not for use by several threads at a time."""

    def __init__(self, lease: DhcpLease) -> None:
        self.lease = lease
        self.dropped_search = opt.valid_search_domains(lease.search)[1]
        self._mac = None if lease.mac is None else opt.mac_address(lease.mac)
        self._ip = lease.address.ip
        self._options = lease_options(lease)
        self._always = frozenset((opt.SUBNET_MASK, opt.ROUTER, *lease.private))
        # What may be asked for: Windows' own number for 121 is sent to nobody who does not name it.
        self._on_request = dict(self._options)
        if opt.CLASSLESS_ROUTES in self._options:
            self._on_request.setdefault(opt.MS_CLASSLESS_ROUTES, self._options[opt.CLASSLESS_ROUTES])
        self._largest = min(max(lease.mtu or _ETHERNET_MTU, _MIN_MAX_MESSAGE) - _IP_UDP_HEADERS, MAX_DATAGRAM)
        self._siaddr, self._sname, self._file = _boot_fields(lease)
        self._declines = 0

    def receive(self, datagram: bytes, source: IPv4Address = NO_ADDRESS) -> Reply | Ignored:
        """Answer one datagram that came to port 67 from the address `source`; never raises.

        `source` matters to an INFORM without ciaddr only; a source port is of no interest at all.
        """
        message = parse(datagram)
        if isinstance(message, Malformed):
            return Ignored(message.reason)
        kind = message.kind
        if refusal := self._refusal(message):
            return Ignored(refusal, kind)
        match kind:
            case MessageType.DISCOVER:
                return self._discover(message)
            case MessageType.REQUEST:
                return self._request(message)
            case MessageType.INFORM:
                return self._inform(message, source)
            case MessageType.DECLINE:
                return self._decline(message)
            case MessageType.RELEASE:
                return Ignored(f"RELEASE of {message.ciaddr}: the address stays with its client", kind)
            case _:
                return Ignored(f"{kind.name} is a server's message", kind)

    def _refusal(self, message: Message) -> str:
        if message.giaddr != NO_ADDRESS:
            return f"relayed by {message.giaddr}: the client is on this very link"
        if self._mac is None:
            if not opt.is_unicast_mac(message.chaddr):
                return f"chaddr {message.chaddr.hex(':')} is no unicast Ethernet address"
        elif message.chaddr != self._mac:
            return f"chaddr {message.chaddr.hex(':')} is not the client's, {self._mac.hex(':')}"
        if len(message.options.get(opt.CLIENT_ID, b"")) > _MAX_CLIENT_ID:
            return f"client identifier is longer than {_MAX_CLIENT_ID} bytes"
        return ""

    def _discover(self, message: Message) -> Reply:
        """RFC 2131 section 4.3.1; the address the client would like (option 50) changes nothing."""
        rapid = opt.RAPID_COMMIT in message.options
        kind = MessageType.ACK if rapid else MessageType.OFFER
        head = {opt.RAPID_COMMIT: b""} if rapid else {}
        return self._grant(message, kind, head)

    def _request(self, message: Message) -> Reply | Ignored:
        """RFC 2131 section 4.3.2. All four states come down to: which server, and which address?"""
        chosen = message.address(opt.SERVER_ID)
        if chosen is not None and chosen != self.lease.server_id:
            return Ignored(f"REQUEST to another server, {chosen}", message.kind)
        requested = message.address(opt.REQUESTED_ADDRESS) or NO_ADDRESS
        claims = [claim for claim in (requested, message.ciaddr) if int(claim)]
        if not claims:
            return Ignored("REQUEST names no address", message.kind)
        wrong = next((claim for claim in claims if claim != self._ip), None)
        if wrong is not None:
            return self._nak(message, f"{wrong} is not this client's address, {self._ip} is")
        return self._grant(message, MessageType.ACK, {})

    def _decline(self, message: Message) -> Ignored:
        """RFC 2131 section 4.3.3. There is no second address, so the same one will be offered again."""
        server, address = message.address(opt.SERVER_ID), message.address(opt.REQUESTED_ADDRESS)
        if address != self._ip or server not in (None, self.lease.server_id):
            return Ignored(f"DECLINE of {address} from server {server} does not concern us", message.kind)
        self._declines += 1
        reason = f"DECLINE: the client found {address} in use by another station on its link"
        return Ignored(reason, message.kind, self._declines)

    def _inform(self, message: Message, source: IPv4Address) -> Reply:
        """RFC 2131 section 4.3.5: options without an address or times, to wherever the client is.

        An address outside of the lease's network is answered by broadcast: no request must make us
        send anywhere but to our client.
        """
        address = next((a for a in (message.ciaddr, source) if int(a)), BROADCAST)
        chosen = self._selected(message)
        for code in _TIMES:
            chosen.pop(code, None)
        head = {opt.MESSAGE_TYPE: bytes((MessageType.ACK,)), opt.SERVER_ID: self._options[opt.SERVER_ID]}
        options = head | _echo(message) | chosen
        to = (Delivery.ADDRESS, address) if self._near(address) else (Delivery.BROADCAST, BROADCAST)
        return self._reply(message, MessageType.ACK, options, to)

    def _near(self, address: IPv4Address) -> bool:
        """Whether `address` can be the client's: it lies in the lease's network and is nobody else's."""
        network = self.lease.address.network
        others = (self.lease.server_id, network.network_address, network.broadcast_address)
        return address == self._ip or (address in network and address not in others)

    def _grant(self, message: Message, kind: MessageType, head: dict[int, bytes]) -> Reply:
        options = {
            opt.MESSAGE_TYPE: bytes((kind,)),
            opt.SERVER_ID: self._options[opt.SERVER_ID],
            opt.LEASE_TIME: self._options[opt.LEASE_TIME],
            **head,
            **_echo(message),
            **self._selected(message),
        }
        # A DISCOVER has no ciaddr (RFC 2131 table 5); one that came with rapid commit could be anything.
        if message.kind is MessageType.REQUEST and int(message.ciaddr):
            to = (Delivery.ADDRESS, message.ciaddr)
        elif message.flags & FLAG_BROADCAST:
            to = (Delivery.BROADCAST, BROADCAST)
        else:
            to = (Delivery.LINK, self._ip)
        return self._reply(message, kind, options, to, self._ip)

    def _nak(self, message: Message, reason: str) -> Reply:
        """RFC 2131 section 4.3.2 and table 3: to everybody on the link, and no other option."""
        options = {opt.MESSAGE_TYPE: bytes((MessageType.NAK,)), opt.SERVER_ID: self._options[opt.SERVER_ID]}
        options |= _echo(message) | {opt.MESSAGE: reason.encode("ascii")}
        return self._reply(message, MessageType.NAK, options, (Delivery.BROADCAST, BROADCAST), reason=reason)

    def _reply(
        self,
        message: Message,
        kind: MessageType,
        options: dict[int, bytes],
        to: tuple[Delivery, IPv4Address],
        yiaddr: IPv4Address = NO_ADDRESS,
        reason: str = "",
    ) -> Reply:
        relay = message.options.get(opt.RELAY_AGENT_INFORMATION)
        if relay is not None:
            # RFC 3046 section 2.2: comes back unchanged. Last in order, so the first to be left out.
            options[opt.RELAY_AGENT_INFORMATION] = relay
        nak = kind is MessageType.NAK
        echoes_ciaddr = kind is MessageType.ACK and message.kind is not MessageType.DISCOVER
        answer = Message(
            BOOT_REPLY,
            message.xid,
            message.chaddr,
            options,
            message.htype,
            flags=message.flags,
            ciaddr=message.ciaddr if echoes_ciaddr else NO_ADDRESS,
            yiaddr=yiaddr,
            siaddr=NO_ADDRESS if nak else self._siaddr,
            sname=b"" if nak else self._sname,
            file=b"" if nak else self._file,
        )
        datagram, left_out = fit(answer, self._limit(message))
        delivery, address = to
        mac = BROADCAST_MAC if delivery is Delivery.BROADCAST else message.chaddr
        return Reply(kind, datagram, delivery, address, mac, left_out, reason)

    def _selected(self, message: Message) -> dict[int, bytes]:
        wanted = message.options.get(opt.PARAMETER_REQUEST_LIST)
        if not wanted:
            return dict(self._options)
        return {
            code: value for code, value in self._on_request.items() if code in wanted or code in self._always
        }

    def _limit(self, message: Message) -> int:
        """Bytes of DHCP message that the client takes: option 57 counts IP and UDP headers."""
        asked = int.from_bytes(message.options.get(opt.MAX_MESSAGE_SIZE, b""), "big")
        return min(max(asked, _MIN_MAX_MESSAGE) - _IP_UDP_HEADERS, self._largest)


def _echo(message: Message) -> dict[int, bytes]:
    """Option 61 as it came (RFC 6842 section 3)."""
    client_id = message.options.get(opt.CLIENT_ID)
    return {} if client_id is None else {opt.CLIENT_ID: client_id}


def _boot_fields(lease: DhcpLease) -> tuple[IPv4Address, bytes, bytes]:
    """siaddr, sname and file, which boot ROMs read instead of options 66 and 67.

    siaddr is set if the server is given as an address; a name or a path that is too long for its field
    is in its option alone.
    """
    server, file = lease.tftp_server or "", lease.boot_file or ""
    try:
        siaddr = IPv4Address(server)
    except ValueError:
        siaddr = NO_ADDRESS
    sname = server.encode("ascii") if len(server) <= _SNAME_ROOM else b""
    return siaddr, sname, file.encode("ascii") if len(file) <= _FILE_ROOM else b""


def lease_options(lease: DhcpLease) -> dict[int, bytes]:
    """Return the options of an OFFER that follow from `lease`, the most important first.

    Last come those that a client works out by itself: broadcast address, T1 and T2.
    """
    search, _ = opt.valid_search_domains(lease.search)
    routes = lease.routes
    if routes and lease.routers and not any(network == _DEFAULT_ROUTE for network, _ in routes):
        routes = (*routes, (_DEFAULT_ROUTE, lease.routers[0]))
    found = {
        opt.SERVER_ID: opt.server_id(lease.server_id),
        opt.SUBNET_MASK: opt.subnet_mask(lease.address),
        opt.LEASE_TIME: opt.lease_time(lease.lease_s),
        opt.ROUTER: opt.routers(lease.routers),
        opt.CLASSLESS_ROUTES: opt.classless_routes(routes),
        opt.INTERFACE_MTU: b"" if lease.mtu is None else opt.interface_mtu(lease.mtu),
        opt.DOMAIN_SERVER: opt.domain_servers(lease.dns),
        opt.BOOT_FILE_NAME: b"" if lease.boot_file is None else opt.boot_file_name(lease.boot_file),
        opt.TFTP_SERVER_NAME: b"" if lease.tftp_server is None else opt.tftp_server_name(lease.tftp_server),
        opt.HOST_NAME: b"" if lease.hostname is None else opt.host_name(lease.hostname),
        opt.DOMAIN_NAME: opt.domain_name(search),
        opt.DOMAIN_SEARCH: opt.search_list(search),
        opt.NTP_SERVERS: opt.ntp_servers(lease.ntp),
        **{code: opt.private_option(code, value) for code, value in sorted(lease.private.items())},
        opt.BROADCAST_ADDRESS: opt.broadcast_address(lease.address),
        opt.RENEWAL_TIME: opt.renewal_time(lease.lease_s),
        opt.REBINDING_TIME: opt.rebinding_time(lease.lease_s),
    }
    return {code: value for code, value in found.items() if value}
