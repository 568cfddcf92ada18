"""A node on a wire to a far host, for tests of packet filter rules, and calls of our functions on the node.

node: wire 192.0.2.1/24 and 2001:db8::1/64 ──── far: wire 192.0.2.2/24 and 2001:db8::2/64

What the far host sees of a packet is the address of the peer that its socket reports.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cni.local import LocalHost
from cni.spec.address import Cidr, parse_cidr
from tests.netns.cni_fixtures import GO_PLUGINS, Namespace, Node, attachment, new_node
from tests.netns.firewall_fixtures import Namespace as Inside

T = TypeVar("T")

NODE_ADDRESS = {4: "192.0.2.1", 6: "2001:db8::1"}
FAR_ADDRESS = {4: "192.0.2.2", 6: "2001:db8::2"}
DOMAINS = {4: socket.AF_INET, 6: socket.AF_INET6}
# Level; option to join a group (struct ip_mreqn, ipv6_mreq); option for the interface to send from.
_MULTICAST_OPTIONS = {
    4: (socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.IP_MULTICAST_IF),
    6: (socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, socket.IPV6_MULTICAST_IF),
}
POD = {4: parse_cidr("10.1.17.5/24"), 6: parse_cidr("fd00:1:0:17::5/64")}
BOTH = [POD[4], POD[6]]


def text(address: Cidr) -> str:
    return str(address).partition("/")[0]


class Wired:
    """The node and the far host. `node` makes calls of plugins, `on` those of our functions."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.netns = node.netns
        self.far = node.namespace("far")
        self.notes: list[str] = []
        # Else IPv6 is of no use for the first second or two.
        for end in (self.netns, self.far):
            for scope in ("all", "default"):
                end.run(f"sysctl -qw net.ipv6.conf.{scope}.accept_dad=0")
        self.netns.run(f"ip link add wire type veth peer name wire netns {self.far.name}")
        for end, addresses in ((self.netns, NODE_ADDRESS), (self.far, FAR_ADDRESS)):
            end.run(f"ip address add {addresses[4]}/24 dev wire")
            end.run(f"ip address add {addresses[6]}/64 dev wire nodad")
            end.run("ip link set wire up")
        # So that answers come back to pods whose packets are not masqueraded.
        self.far.run(f"ip route add 10.0.0.0/8 via {NODE_ADDRESS[4]}")
        self.far.run(f"ip route add fd00::/8 via {NODE_ADDRESS[6]}")
        for scope in ("ipv4", "ipv6"):
            self.netns.run(f"sysctl -qw net.{scope}.conf.all.forwarding=1")

    def on(self, function: Callable[[LocalHost], T]) -> T:
        """Call `function` in a thread inside the node's namespace."""

        def inside() -> T:
            host = LocalHost(self.notes.append, {})
            try:
                return function(host)
            finally:
                host.netfilter.close()

        return Inside(self.netns.name).call(inside)

    def own(self, address: Cidr) -> None:
        """Give the node a pod's address, so that packets of the pod begin and end there."""
        nodad = " nodad" if address.family == 6 else ""
        self.netns.run(f"ip address add {text(address)}/{128 if address.family == 6 else 32} dev lo{nodad}")

    def source_seen(self, client: Namespace, family: int, source: str, to: str = "") -> str:
        """Connect over TCP from `source` in `client` to the far host; the address that it sees."""
        domain = DOMAINS[family]
        with Inside(self.far.name).call(lambda: socket.socket(domain)) as server:
            server.settimeout(10)
            server.bind(("", 0))
            server.listen()
            with Inside(client.name).call(lambda: socket.socket(domain)) as connection:
                connection.settimeout(10)
                connection.bind((source, 0))
                connection.connect((to or FAR_ADDRESS[family], server.getsockname()[1]))
                accepted, peer = server.accept()
                accepted.close()
        seen: str = peer[0]
        return seen

    def multicast_source_seen(self, family: int, source: str, group: str) -> str:
        """Send a datagram from the node to a group that the far host has joined; the sender that it sees."""
        domain = DOMAINS[family]
        level, join, out = _MULTICAST_OPTIONS[family]
        there, here = (int(end.ip("link show wire")[0]["ifindex"]) for end in (self.far, self.netns))

        def receiver() -> socket.socket:
            made = socket.socket(domain, socket.SOCK_DGRAM)
            made.bind(("", 0))
            request = socket.inet_pton(domain, group) + bytes(4 if family == 4 else 0)
            made.setsockopt(level, join, request + struct.pack("=I", there))
            return made

        with Inside(self.far.name).call(receiver) as server:
            server.settimeout(10)
            with Inside(self.netns.name).call(lambda: socket.socket(domain, socket.SOCK_DGRAM)) as sender:
                sender.bind((source, 0))
                sender.setsockopt(level, out, bytes(8 if family == 4 else 0) + struct.pack("=I", here))
                sender.sendto(b"x", (group, server.getsockname()[1]))
                seen: str = server.recvfrom(16)[1][0]
        return seen

    def ruleset(self) -> str:
        return self.netns.run("nft --stateless list ruleset")

    def bridge(self, command: str, container: str, pod: Namespace, **conf: object) -> dict[str, object]:
        """Call Go's bridge for a container; its result. Conf keys are added to those of an own network."""
        config = {
            "cniVersion": "1.0.0",
            "name": "cbr0",
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "dataDir": f"{self.node.root}/networks",
                "ranges": [[{"subnet": "10.1.17.0/24"}], [{"subnet": "fd00:1:0:17::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
            **conf,
        }
        status, document = self.node.execute(
            [f"{GO_PLUGINS}/bridge"], command, attachment(container, pod), json.dumps(config)
        )
        assert status == 0, document
        found: dict[str, object] = document or {}
        return found


@contextmanager
def wired(root: Path) -> Iterator[Wired]:
    with new_node(root) as node:
        yield Wired(node)
