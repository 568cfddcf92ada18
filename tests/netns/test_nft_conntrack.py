"""Forgetting flows, with the kernel's own listing of them as the reference."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.net import conntrack, nlsocket
from cni.net.nlsocket import NetlinkSocket
from cni.spec.address import parse_ip
from tests.netns.cni_fixtures import wait_for
from tests.netns.firewall_fixtures import Namespace, namespace

V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture
def ns() -> Iterator[Namespace]:
    """A namespace whose packets are tracked."""
    with namespace() as made:
        made.run("nft add table inet t")
        made.run("nft -f -", "add chain inet t c { type filter hook output priority 0; }")
        made.run("nft add rule inet t c ct state new counter")
        yield made


def send(ns: Namespace, address: str, port: int, times: int = 1, at_least: int = 1) -> None:
    """Begin flows of UDP, and return once there are `at_least` so many more.

    Under load the kernel receives a moment later; and some of many have the port of one before.
    """

    def inside() -> None:
        for _ in range(times):
            with socket.socket(V6 if ":" in address else V4, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"x", (address, port))

    before = len(flows(ns))
    ns.call(inside)
    wait_for(lambda: len(flows(ns)) >= before + at_least)


def add_fd00_9(ns: Namespace) -> None:
    """The kernel adds the address at once, and receives for it a moment later."""
    ns.run("ip address add fd00::9/128 dev lo nodad")
    wait_for(lambda: "local fd00::9" in ns.run("ip -6 route show table local"))


def flows(ns: Namespace) -> list[tuple[str, str]]:
    """(protocol, destination) of the flows, by what their first packets held."""
    lines = ns.call(lambda: Path("/proc/thread-self/net/nf_conntrack").read_text()).splitlines()
    found = [re.search(r"(tcp|udp) .*? dst=(\S+) sport=\d+ dport=(\d+)", line) for line in lines]
    return sorted((one[1], f"{one[2]} {one[3]}") for one in found if one)


def delete(ns: Namespace, family: int, port: int, to: str = "", protocol: int = conntrack.UDP) -> int:
    return delete_all(ns, family, [(port, to)], protocol)


def delete_all(
    ns: Namespace, family: int, destinations: list[tuple[int, str]], protocol: int = conntrack.UDP
) -> int:
    def inside() -> int:
        netlink = NetlinkSocket(nlsocket.NETFILTER)
        try:
            wanted = {(port, parse_ip(to)[1] if to else None) for port, to in destinations}
            return conntrack.delete_flows(netlink, family, protocol, wanted)
        finally:
            netlink.close()

    return ns.call(inside)


def test_flows_to_a_port(ns: Namespace) -> None:
    for address in ("127.0.0.1", "127.0.0.2", "::1"):
        for port in (5000, 5001):
            send(ns, address, port)
    assert delete(ns, 4, 5000) == 2
    left = [one for _, one in flows(ns)]
    assert left == ["0000:0000:0000:0000:0000:0000:0000:0001 5000", *left[1:]]
    assert len(left) == 4 and not any(one.endswith("5000") and one.startswith("127") for one in left)
    assert delete(ns, 4, 5000) == 0


@pytest.mark.parametrize(("family", "kept", "gone"), [(4, "127.0.0.1", "127.0.0.2"), (6, "::1", "fd00::9")])
def test_flows_to_a_port_of_one_address(ns: Namespace, family: int, kept: str, gone: str) -> None:
    add_fd00_9(ns)
    for address in (kept, gone):
        send(ns, address, 5000)
    assert delete(ns, family, 5000, gone) == 1
    assert delete(ns, family, 5000, gone) == 0
    assert delete(ns, family, 5000, kept) == 1
    assert flows(ns) == []


def test_other_protocols_stay(ns: Namespace) -> None:
    def connect() -> None:
        with socket.socket(V4) as server, socket.socket(V4) as client:
            server.bind(("127.0.0.1", 5000))
            server.listen()
            client.connect(("127.0.0.1", 5000))

    ns.call(connect)
    send(ns, "127.0.0.1", 5000)
    assert delete(ns, 4, 5000) == 1
    assert flows(ns) == [("tcp", "127.0.0.1 5000")]
    assert delete(ns, 4, 5000, protocol=6) == 1
    assert flows(ns) == []


def test_more_than_a_socket_buffer_of_flows(ns: Namespace) -> None:
    send(ns, "127.0.0.1", 5000, times=1500, at_least=1001)
    send(ns, "127.0.0.1", 5001)
    there = len(flows(ns)) - 1
    assert there > 1000
    assert delete(ns, 4, 5000) == there
    assert flows(ns) == [("udp", "127.0.0.1 5001")]


def test_the_port_is_that_before_translation(ns: Namespace) -> None:
    ns.run("nft -f -", "add chain inet t d { type nat hook output priority -100; }")
    ns.run("nft add rule inet t d udp dport 5000 redirect to :6000")
    send(ns, "127.0.0.1", 5000)
    assert delete(ns, 4, 6000) == 0
    assert delete(ns, 4, 5000) == 1


@pytest.mark.parametrize(("family", "one", "other"), [(4, "127.0.0.1", "127.0.0.2"), (6, "::1", "fd00::9")])
def test_flows_to_several_ports(ns: Namespace, family: int, one: str, other: str) -> None:
    add_fd00_9(ns)
    for port in (5000, 5001, 5002):
        for address in (one, other):
            send(ns, address, port)
    assert delete_all(ns, family, []) == 0
    assert delete_all(ns, family, [(5000, ""), (5001, other), (5003, "")]) == 3
    left = [found.rpartition(" ") for _, found in flows(ns)]
    assert sorted(port for _, _, port in left) == ["5001", "5002", "5002"]
    assert delete_all(ns, family, [(5001, one), (5002, ""), (5002, one)]) == 3
    assert flows(ns) == []
