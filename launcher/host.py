"""The other end of the guest's link: DHCP, DHCPv6, router advertisements, and who has the server's address.

Sans-IO: frames in, frames out, the time passed in as seconds of a clock that never goes back. Frames for
the guest go to its tap alone; frames for the pod's network (to find the gateway's MAC) to the bridge.

IPv6 in the bridge binding. The guest has the pod's address by DHCPv6, but a default route comes only from
a router's advertisement, and the CNI bridge sends none. We advertise a link-local address of our own and
answer who has it with the MAC of the pod's gateway: the guest's packets go straight to the gateway. Should
a real router advertise on the pod's network, both are default routers, which RFC 4861 provides for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from random import Random

from launcher import wire
from launcher.dhcp.options import is_unicast_mac
from launcher.dhcp.packet import MessageType
from launcher.dhcp.server import BROADCAST, Delivery, Server
from launcher.dhcp.server import Ignored as Ignored4
from launcher.ipv6 import advert
from launcher.ipv6.advert import Responder, RouterAdvert
from launcher.ipv6.packet import Kind
from launcher.ipv6.server import ALL_SERVERS, CLIENT_PORT, SERVER_PORT, Server6
from launcher.ipv6.server import Ignored as Ignored6

DHCP_SERVER, DHCP_CLIENT = 67, 68
_ASK_EVERY_S = 1.0
_NOTE_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame to send: on the guest's tap, or on the bridge (to the pod's network)."""

    data: bytes
    to_guest: bool = True


@dataclass(frozen=True, slots=True)
class Note:
    """Something that a person may want to know; `warning` if it needs looking at."""

    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """What the host answers for. `guest_mac` None: not known, whoever is on the tap is the guest.

    `arp`: the kernel does not answer for `server4`, so we do. `gateway6`: the pod's IPv6 gateway, whose MAC
    must be found before it can be advertised; None when we are the router.
    """

    mac: bytes
    guest_mac: bytes | None
    server4: IPv4Address | None
    arp: bool
    gateway6: IPv6Address | None


class Host:
    """One link's services; each may be missing. For one thread."""

    def __init__(
        self,
        link: Link,
        dhcp: Server | None,
        dhcp6: Server6 | None,
        router: RouterAdvert | None,
        now: float,
        random: Random,
    ) -> None:
        self._link = link
        self._send = wire.Sender(link.mac)
        self._local = wire.link_local(link.mac)
        self._dhcp = dhcp
        self._dhcp6 = dhcp6
        self._router = router
        self._random = random
        self._gateway_mac: bytes | None = None
        self._ask_at = now
        self._quiet_until = now
        self._gateway_again = now
        self._responder = Responder(router, now) if router and link.gateway6 is None else None

    def due(self) -> float | None:
        """When `tick` has something to do; None if it never will."""
        if self._responder is not None:
            return self._responder.due()
        return self._ask_at if self._router and self._link.gateway6 else None

    def tick(self, now: float) -> list[Frame]:
        """What is due: an advertisement, or the question who has the gateway."""
        if self._responder is not None:
            return [self._advert(s) for s in self._responder.send(now, self._random.random())]
        if self._router is None or self._link.gateway6 is None or now < self._ask_at:
            return []
        self._ask_at = now + _ASK_EVERY_S
        return [Frame(self._send.solicit(self._local, self._link.gateway6), to_guest=False)]

    def receive(self, frame: bytes, now: float, from_guest: bool) -> Iterator[Frame | Note]:
        """Take a frame that the guest sent, or one that reached the bridge; nothing in it raises."""
        parsed = wire.parse(frame)
        if not from_guest:
            if isinstance(parsed, wire.Icmp6) and parsed.hop_limit == advert.HOP_LIMIT:
                yield from self._gateway_found(parsed.message, now)
            return
        match parsed:
            case wire.ArpRequest() as request:
                if self._link.arp and request.target == self._link.server4:
                    yield Frame(self._send.arp_reply(request))
            case wire.Udp(port=67) as datagram:
                yield from self._answer4(datagram, now)
            case wire.Udp(port=547) as datagram:
                yield from self._answer6(datagram, now)
            case wire.Icmp6() as message:
                yield from self._neighbour(message, now)

    def _answer4(self, datagram: wire.Udp, now: float) -> Iterator[Frame | Note]:
        if self._dhcp is None or self._link.server4 is None or not isinstance(datagram.source, IPv4Address):
            return
        if datagram.destination not in (self._link.server4, BROADCAST):
            return  # on its way to another server, through our tap
        reply = self._dhcp.receive(datagram.payload, datagram.source)
        if isinstance(reply, Ignored4):
            if reply.declines and reply.declines & (reply.declines - 1) == 0:
                address = self._dhcp.lease.address.ip
                times = f"{reply.declines} times"
                yield Note(f"the guest declined {address} ({times}): another machine uses it", True)
            return
        broadcast = reply.delivery is Delivery.BROADCAST
        mac = wire.BROADCAST_MAC if broadcast else reply.mac
        data = self._send.udp4(
            mac, self._link.server4, reply.address, (DHCP_SERVER, DHCP_CLIENT), reply.datagram
        )
        yield Frame(data)
        # A guest that asks all the time must not fill the log.
        if reply.kind in (MessageType.ACK, MessageType.NAK) and now >= self._quiet_until:
            self._quiet_until = now + _NOTE_EVERY_S
            why = f": {reply.reason}" if reply.reason else ""
            yield Note(f"DHCP {reply.kind.name} {self._dhcp.lease.address.ip} to {reply.mac.hex(':')}{why}")

    def _answer6(self, datagram: wire.Udp, now: float) -> Iterator[Frame | Note]:
        if self._dhcp6 is None or not isinstance(datagram.source, IPv6Address):
            return
        if datagram.destination not in (ALL_SERVERS, self._local):
            return
        reply = self._dhcp6.receive(datagram.payload, datagram.source, datagram.destination == ALL_SERVERS)
        if isinstance(reply, Ignored6):
            return
        ports = (SERVER_PORT, CLIENT_PORT)
        yield Frame(self._send.udp6(datagram.mac, self._local, reply.destination, ports, reply.data))
        if reply.request is Kind.DECLINE and now >= self._quiet_until:
            self._quiet_until = now + _NOTE_EVERY_S
            yield Note("the guest declined its IPv6 address: another machine uses it", True)

    def _neighbour(self, message: wire.Icmp6, now: float) -> Iterator[Frame | Note]:
        body = message.message
        if body[:1] == bytes([advert.ROUTER_SOLICITATION]):
            if self._responder is not None:
                chance = self._random.random()
                self._responder.receive(body, message.source, message.hop_limit, now, chance)
            return
        asked = wire.neighbour_target(body, wire.NEIGHBOUR_SOLICITATION)
        # RFC 4861 section 7.1.1: another hop limit tells of another link.
        if asked == self._local and self._gateway_mac and message.hop_limit == advert.HOP_LIMIT:
            to = wire.BROADCAST_MAC if message.source.is_unspecified else message.mac
            destination = advert.ALL_NODES if message.source.is_unspecified else message.source
            yield Frame(self._send.advertise(to, destination, self._local, self._gateway_mac))

    def _gateway_found(self, body: bytes, now: float) -> Iterator[Note]:
        target = wire.neighbour_target(body, wire.NEIGHBOUR_ADVERTISEMENT)
        mac = wire.target_mac(body) if target == self._link.gateway6 else None
        if mac is None or mac == self._gateway_mac or self._router is None or not is_unicast_mac(mac):
            return
        # The bridge carries the guest's own advertisements too: it is not its gateway, nor may it flood us.
        if mac == self._link.guest_mac or now < self._gateway_again:
            return
        self._gateway_again = now + _NOTE_EVERY_S
        self._gateway_mac = mac
        self._responder = Responder(replace(self._router, mac=mac.hex(":")), now)
        yield Note(f"the gateway {target} is at {mac.hex(':')}; advertising it to the guest")

    def _advert(self, send: advert.Send) -> Frame:
        to = wire.multicast_mac(send.destination)
        if not send.destination.is_multicast:
            to = self._link.guest_mac or wire.multicast_mac(advert.ALL_NODES)
        return Frame(self._send.icmp6(to, self._local, send.destination, send.data))
