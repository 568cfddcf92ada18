"""NetlinkKernel and Monitor against the kernel, read back by iproute2 and pyroute2.

Each test has a namespace of its own that stands for a node:

    far ──(veth)── eth0  192.168.77.1/24, fd77::1/64
                     │
                 flannel.1, flannel-v6.1
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from pyroute2 import IPRoute

from cni.errors import KernelError
from cni.net.entries import Address, Entry, FdbEntry, Link, Neighbour, NetState, Route, Vxlan, state
from cni.net.kernel import Change, Monitor, NetlinkKernel
from cni.net.plan import Operation, Refused, Scope, plan
from flanneld.backend import build
from flanneld.backend.protocol import desired
from flanneld.config import parse_netconf
from flanneld.iface import ExternalInterface
from flanneld.lease import Attributes, Lease, Snapshot
from flanneld.reconcile import Reconciler
from flanneld.workqueue import MonotonicClock
from tests.netns.firewall_fixtures import Namespace, namespace

V4 = Link("flannel.1", 1450, "02:00:00:00:00:01", True, Vxlan(1, 8472, "192.168.77.1", "eth0"))
V6 = Link("flannel-v6.1", 1430, "02:00:00:00:00:61", True, Vxlan(1, 8472, "fd77::1", "eth0"))
MAC, MAC6, OTHER = "02:00:00:00:00:02", "02:00:00:00:00:62", "02:00:00:00:00:99"
BASE: tuple[Entry, ...] = (
    V4,
    Address("flannel.1", "10.244.1.0/32"),
    V6,
    Address("flannel-v6.1", "fd00:10:244:1::/128"),
)
NEIGHBOUR = Neighbour("flannel.1", "10.244.2.0", MAC)
FDB = FdbEntry("flannel.1", MAC, "192.168.77.2")
ROUTE = Route("flannel.1", "10.244.2.0/24", "10.244.2.0", onlink=True)
NEIGHBOUR6 = Neighbour("flannel-v6.1", "fd00:10:244:2::", MAC6)
FDB6 = FdbEntry("flannel-v6.1", MAC6, "fd77::2")
ROUTE6 = Route("flannel-v6.1", "fd00:10:244:2::/64", "fd00:10:244:2::", onlink=True, metric=1024)
PEER: tuple[Entry, ...] = (NEIGHBOUR, FDB, ROUTE, NEIGHBOUR6, FDB6, ROUTE6)
DESIRED = state([*BASE, *PEER])
SCOPE = Scope(("flannel.1", "flannel-v6.1"), ("10.244.0.0/16", "fd00:10:244::/48"))


class Node:
    """The namespace and a kernel that belongs to it."""

    def __init__(self, ns: Namespace, kernel: NetlinkKernel) -> None:
        self.ns, self.kernel = ns, kernel

    def run(self, command: str) -> str:
        return self.ns.run(command)

    def shown(self, command: str) -> list[str]:
        """Lines of output, blanks at their ends removed."""
        return [line.strip() for line in self.run(command).splitlines()]

    def snapshot(self) -> NetState:
        return self.kernel.snapshot(SCOPE)

    def reach(self, wanted: NetState) -> list[Refused]:
        """Plan and apply once."""
        return self.kernel.apply(plan(wanted, self.snapshot()))

    def put(self, *entries: Entry) -> list[Refused]:
        return self.kernel.apply([Operation("put", entry) for entry in entries])

    def drop(self, *entries: Entry) -> list[Refused]:
        return self.kernel.apply([Operation("drop", entry) for entry in entries])

    def index(self, name: str) -> int:
        link = self.kernel.link(name)
        assert link is not None
        return link.ifindex

    def pyroute2(self, query: Callable[[IPRoute], Any]) -> Any:
        """Ask the independent reader."""

        def inside() -> Any:
            with IPRoute() as reader:
                return query(reader)

        return self.ns.call(inside)


@pytest.fixture
def node() -> Iterator[Node]:
    with namespace() as ns:
        ns.run("ip link add eth0 type veth peer name far")
        ns.run("ip addr add 192.168.77.1/24 dev eth0")
        ns.run("ip addr add fd77::1/64 dev eth0 nodad")
        ns.run("ip link set eth0 up")
        ns.run("ip link set far up")
        with closing(ns.call(NetlinkKernel)) as kernel:
            yield Node(ns, kernel)


@pytest.fixture
def up(node: Node) -> Node:
    """A node with both devices and one dual-stack peer."""
    assert node.reach(DESIRED) == []
    return node


def wait_for(predicate: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Wait until `predicate` holds and return how long that took, in seconds."""
    start = time.monotonic()
    while not predicate():
        assert time.monotonic() - start < timeout_s
        threading.Event().wait(0.005)
    return time.monotonic() - start


# ---- devices


def test_devices_have_upstreams_attributes(node: Node) -> None:
    assert node.put(V4, V6) == []
    expected = {
        "flannel.1": (
            "vxlan id 1 local 192.168.77.1 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto "
            "ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx"
        ),
        "flannel-v6.1": (
            "vxlan id 1 local fd77::1 dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto "
            "ageing 300 udpcsum noudp6zerocsumtx noudp6zerocsumrx"
        ),
    }
    for link in (V4, V6):
        lines = node.shown(f"ip -d link show {link.name}")
        assert "UP,LOWER_UP" in lines[0] and f"mtu {link.mtu} " in lines[0]
        assert lines[1].startswith(f"link/ether {link.mac} ")
        assert lines[2].startswith(f"{expected[link.name]} addrgenmode")


def test_what_iproute2_does_not_show_is_upstreams_too(node: Node) -> None:
    node.put(V4)
    [link] = node.pyroute2(lambda ipr: ipr.get_links(ifname="flannel.1"))
    data = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    assert link.get("txqlen") == 0
    for name in ("tos", "ttl", "proxy", "rsc", "l2miss", "l3miss", "learning"):
        assert data.get_attr(f"IFLA_VXLAN_{name.upper()}") == 0, name
    assert data.get_attr("IFLA_VXLAN_LINK") == node.index("eth0")
    assert data.get_attr("IFLA_VXLAN_UDP_CSUM") == 1
    assert data.get_attr("IFLA_VXLAN_GROUP") is None


@pytest.mark.parametrize(
    ("vxlan", "words"),
    [
        (V4.vxlan._replace(gbp=True), (" gbp ",)),
        (V4.vxlan._replace(learning=True), (" ttl auto ageing 300 ",)),
        (V4.vxlan._replace(vni=0xFFFFFF, port=4789), (" id 16777215 ", " dstport 4789 ")),
        (V4.vxlan._replace(local="203.0.113.9"), (" local 203.0.113.9 ",)),
    ],
    ids=["gbp", "learning", "vni and port", "address that is not here"],
)
def test_options_of_a_device_are_set_and_read_back(node: Node, vxlan: Vxlan, words: tuple[str, ...]) -> None:
    link = V4._replace(vxlan=vxlan)
    assert node.put(link) == []
    shown = node.run("ip -d link show flannel.1")
    assert all(word in shown for word in words)
    assert ("nolearning" in shown) is not vxlan.learning
    assert node.snapshot()[link.key] == link


def test_a_taken_udp_port_leaves_no_device_behind(node: Node) -> None:
    with closing(node.ns.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))) as taken:
        taken.bind(("0.0.0.0", 8472))
        refused = node.put(*BASE[:2], NEIGHBOUR)
        assert refused[0].errno == errno.EADDRINUSE
        assert [r.errno for r in refused[1:]] == [errno.ENODEV] * 2
        assert node.kernel.link("flannel.1") is None
        assert node.snapshot() == {}
    assert node.put(*BASE[:2], NEIGHBOUR) == []


def test_a_device_of_another_kind_is_not_touched(node: Node) -> None:
    node.run("ip link add flannel.1 type bridge")
    before = node.run("ip -d link show flannel.1")
    [refused] = node.put(V4)
    assert refused.errno == errno.EEXIST
    assert node.run("ip -d link show flannel.1") == before


def test_a_second_device_with_the_same_vni_is_refused(node: Node) -> None:
    node.put(V4)
    [refused] = node.put(V4._replace(name="flannel.2"))
    assert refused.errno == errno.EEXIST
    assert node.kernel.link("flannel.2") is None


def test_a_device_without_its_underlay_is_refused_by_name(node: Node) -> None:
    [refused] = node.put(V4._replace(vxlan=V4.vxlan._replace(underlay="eth7")))
    assert (refused.errno, refused.text) == (errno.ENODEV, "no link named eth7")


# Each differs from V4 in one thing that the kernel cannot change.
OTHER_DEVICES = {
    "vni": "vxlan id 9 local 192.168.77.1 dev eth0 dstport 8472 nolearning",
    "port": "vxlan id 1 local 192.168.77.1 dev eth0 dstport 4789 nolearning",
    "source": "vxlan id 1 local 192.168.77.9 dev eth0 dstport 8472 nolearning",
    "underlay": "vxlan id 1 local 192.168.77.1 dev far dstport 8472 nolearning",
    "gbp": "vxlan id 1 local 192.168.77.1 dev eth0 dstport 8472 nolearning gbp",
}


@pytest.mark.parametrize("what", OTHER_DEVICES)
def test_a_device_that_cannot_be_kept_is_rebuilt(node: Node, what: str) -> None:
    node.run(f"ip link add flannel.1 type {OTHER_DEVICES[what]}")
    node.run("ip link set flannel.1 up")
    node.run("ip route add 10.244.9.0/24 via 10.244.9.0 dev flannel.1 onlink")
    old = node.index("flannel.1")
    assert node.reach(DESIRED) == []
    assert node.index("flannel.1") != old
    assert node.snapshot() == DESIRED


def test_a_device_that_is_right_but_for_its_mtu_keeps_its_peers(up: Node) -> None:
    index = up.index("flannel.1")
    up.run("ip link set flannel.1 mtu 1400")
    up.run("ip link set flannel-v6.1 mtu 1300")
    assert up.reach(DESIRED) == []
    assert up.index("flannel.1") == index
    # In one pass: setting more than the MTU would have flushed the neighbours unseen.
    assert up.snapshot() == DESIRED


@pytest.mark.parametrize("change", ["address 02:00:00:00:00:77", "down"])
def test_a_device_is_mended_in_place(up: Node, change: str) -> None:
    index = up.index("flannel.1")
    up.run(f"ip link set flannel.1 {change}")
    assert up.reach(DESIRED) == []
    assert up.index("flannel.1") == index
    assert up.snapshot() == DESIRED


def test_a_device_is_not_given_up_for_one_that_cannot_be_made(up: Node) -> None:
    elsewhere = V4._replace(vxlan=V4.vxlan._replace(underlay="eth7"))
    [refused] = up.reach({**DESIRED, elsewhere.key: elsewhere})
    assert (refused.operation.verb, refused.errno) == ("drop", errno.ENODEV)
    assert "eth7" in refused.text
    assert up.snapshot() == DESIRED


def test_an_existing_device_of_upstream_is_kept_as_it_is(node: Node) -> None:
    """As the Go daemon leaves it behind, made here by iproute2."""
    node.run(
        "ip link add flannel.1 address 02:00:00:00:00:01 mtu 1450 txqueuelen 0 type vxlan id 1 "
        "local 192.168.77.1 dev eth0 dstport 8472 nolearning ttl 0"
    )
    node.run("ip link set flannel.1 up")
    node.run("ip addr add 10.244.1.0/32 dev flannel.1")
    node.run(f"ip neigh add 10.244.2.0 lladdr {MAC} dev flannel.1 nud permanent")
    node.run(f"bridge fdb add {MAC} dev flannel.1 dst 192.168.77.2 self permanent")
    node.run("ip route add 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink")
    assert plan(state([*BASE[:2], NEIGHBOUR, FDB, ROUTE]), node.snapshot()) == []


# ---- entries


def test_entries_look_as_upstreams(up: Node) -> None:
    assert "10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink" in up.shown("ip route show")
    assert up.shown("ip neigh show dev flannel.1 nud permanent") == [f"10.244.2.0 lladdr {MAC} PERMANENT"]
    assert up.shown("bridge fdb show dev flannel.1") == [f"{MAC} dst 192.168.77.2 self permanent"]
    assert up.shown("ip -4 -o addr show dev flannel.1")[0].split()[2:6] == [
        *("inet", "10.244.1.0/32", "scope", "global")
    ]
    assert (
        "fd00:10:244:2::/64 via fd00:10:244:2:: dev flannel-v6.1 metric 1024 onlink pref medium"
        in up.shown("ip -6 route show")
    )
    assert f"fd00:10:244:2:: lladdr {MAC6} PERMANENT" in up.shown("ip -6 neigh show dev flannel-v6.1")
    assert up.shown("bridge fdb show dev flannel-v6.1") == [f"{MAC6} dst fd77::2 self permanent"]
    assert "fd00:10:244:1::/128" in up.run("ip -6 -o addr show dev flannel-v6.1 scope global")


def test_routes_have_upstreams_fields(up: Node) -> None:
    [route] = up.pyroute2(lambda ipr: [r for r in ipr.get_routes(family=2) if r.get("dst") == "10.244.2.0"])
    assert (route["proto"], route["scope"], route["table"], route["type"]) == (3, 0, 254, 1)
    assert route["flags"] & 4  # onlink
    names = {name for name, _ in route["attrs"]}
    assert names.isdisjoint({"RTA_PRIORITY", "RTA_PREFSRC", "RTA_METRICS"})


def test_a_route_without_a_gateway_is_of_link_scope(up: Node) -> None:
    route = Route("flannel.1", "10.244.50.0/24", "")
    assert up.put(route) == []
    assert "10.244.50.0/24 dev flannel.1 scope link" in up.shown("ip route show")
    assert up.snapshot() == {**DESIRED, route.key: route}


def test_what_was_put_is_what_is_read(up: Node) -> None:
    assert up.snapshot() == DESIRED
    assert plan(DESIRED, up.snapshot()) == []
    # Putting it all again is no error and changes nothing.
    assert up.put(*DESIRED.values()) == []
    assert up.snapshot() == DESIRED


def test_what_was_dropped_is_gone_and_dropping_it_again_is_no_error(up: Node) -> None:
    assert up.drop(*PEER) == []
    assert up.snapshot() == state(BASE)
    assert up.drop(*PEER) == []
    assert up.drop(*BASE) == []
    assert up.snapshot() == {}
    assert up.drop(*BASE, *PEER) == []


def test_an_entry_without_its_link_is_refused_by_name(node: Node) -> None:
    refused = node.put(*PEER)
    assert [r.operation.entry for r in refused] == list(PEER)
    assert {r.text for r in refused} == {"no link named flannel.1", "no link named flannel-v6.1"}


def test_one_refusal_does_not_hinder_the_rest(up: Node) -> None:
    unreachable = Route("flannel.1", "10.244.5.0/24", "172.31.0.1")
    fine = Route("flannel.1", "10.244.6.0/24", "10.244.6.0", onlink=True)
    [refused] = up.put(unreachable, fine)
    assert refused.operation.entry == unreachable
    assert refused.errno == errno.ENETUNREACH
    assert refused.text
    assert up.snapshot() == {**DESIRED, fine.key: fine}
    [refused] = up.put(fine, unreachable)
    assert refused.operation.entry == unreachable


MANY = 3000


def many() -> NetState:
    entries: list[Entry] = list(BASE)
    for number in range(MANY):
        subnet = IPv4Network((int(IPv4Address("10.0.0.0")) + (number << 8), 24))
        mac = f"02:01:00:00:{number >> 8:02x}:{number & 255:02x}"
        vtep = str(subnet.network_address)
        entries += [
            Neighbour("flannel.1", vtep, mac),
            FdbEntry("flannel.1", mac, f"192.168.{128 + (number >> 8)}.{number & 255}"),
            Route("flannel.1", str(subnet), vtep, onlink=True),
        ]
    return state(entries)


def test_thousands_of_peers_in_one_go(node: Node) -> None:
    wanted = many()
    assert node.reach(wanted) == []
    assert len(node.shown("ip route show dev flannel.1")) == MANY
    assert len(node.shown("ip neigh show dev flannel.1 nud permanent")) == MANY
    assert len(node.shown("bridge fdb show dev flannel.1")) == MANY
    assert node.snapshot() == wanted
    assert node.reach(state(BASE)) == []
    assert node.shown("ip route show dev flannel.1") == []
    assert node.shown("ip neigh show dev flannel.1 nud permanent") == []
    assert node.shown("bridge fdb show dev flannel.1") == []


# ---- replacing


def test_a_changed_mac_replaces_the_neighbour_and_leaves_no_fdb_entry(up: Node) -> None:
    moved = (NEIGHBOUR._replace(mac=OTHER), FDB._replace(mac=OTHER))
    wanted = state([*(e for e in DESIRED.values() if e not in (NEIGHBOUR, FDB)), *moved])
    assert up.reach(wanted) == []
    assert up.shown("bridge fdb show dev flannel.1") == [f"{OTHER} dst 192.168.77.2 self permanent"]
    assert up.snapshot() == wanted


def test_a_changed_public_ip_replaces_the_destination(up: Node) -> None:
    moved = (FDB._replace(dst="192.168.77.9"), FDB6._replace(dst="fd77::9"))
    wanted = state([*(e for e in DESIRED.values() if e not in (FDB, FDB6)), *moved])
    assert up.reach(wanted) == []
    assert up.shown("bridge fdb show dev flannel.1") == [f"{MAC} dst 192.168.77.9 self permanent"]
    assert up.snapshot() == wanted


def test_the_route_of_another_backend_is_taken_over(node: Node) -> None:
    node.run("ip route add 10.244.2.0/24 via 192.168.77.2 dev eth0")
    assert node.reach(DESIRED) == []
    assert node.shown("ip route show 10.244.2.0/24") == ["10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink"]
    assert node.snapshot() == DESIRED


@pytest.mark.parametrize(
    "leftover",
    [
        "ip route add 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink metric 5",
        "ip route add 10.244.9.0/24 dev flannel.1 scope link",
        "ip route add 10.244.9.0/24 via 10.244.9.0 dev flannel.1 onlink proto static",
        "ip -6 route add fd00:10:244:9::/64 via fd00:10:244:9:: dev flannel-v6.1 onlink metric 7",
        "ip neigh add 10.244.9.0 lladdr 02:00:00:00:00:09 dev flannel.1 nud permanent",
        "ip neigh add fd00:9:: lladdr 02:00:00:00:00:09 dev flannel-v6.1 nud permanent",
        "bridge fdb add 02:00:00:00:00:09 dev flannel.1 dst 192.168.77.9 self permanent",
        "bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 192.168.77.9 self permanent",
        "bridge fdb append 33:33:00:00:00:01 dev flannel.1 dst 192.168.77.9 self permanent",
        "ip addr add 10.244.9.0/32 dev flannel.1",
        "ip addr add 10.244.9.1/8 dev flannel.1 noprefixroute",
        "ip addr add fd00:9::/128 dev flannel-v6.1",
        "ip addr add fd00:10:244:9::/128 dev flannel.1",
    ],
)
def test_a_leftover_on_our_links_is_seen_and_dropped(up: Node, leftover: str) -> None:
    up.run(leftover)
    assert len(up.snapshot()) == len(DESIRED) + 1
    assert up.reach(DESIRED) == []
    assert up.snapshot() == DESIRED


# ---- what is not ours


def test_foreign_entries_are_neither_seen_nor_dropped(up: Node) -> None:
    for command in (
        "ip link add cni0 type bridge",
        "ip addr add 10.244.1.1/24 dev cni0",
        "ip link set cni0 up",
        "ip route add 10.99.0.0/16 via 192.168.77.9 dev eth0",
        "ip route add 10.244.128.0/24 via 192.168.77.9 dev eth0",
        "ip route add 10.244.129.0/24 via 10.244.2.0 dev flannel.1 onlink table 100",
        "ip route add blackhole 10.244.0.0/16",
        "ip -6 route add fd99::/64 via fd77::9 dev eth0",
        f"ip neigh add 192.168.77.9 lladdr {OTHER} dev eth0 nud permanent",
        f"ip neigh add 10.244.7.7 lladdr {OTHER} dev flannel.1 nud reachable",
        f"ip neigh add 10.244.7.8 lladdr {OTHER} dev flannel.1 nud noarp",
        f"bridge fdb add {OTHER} dev flannel.1 dst 192.168.77.9 self dynamic",
        "ip addr add 172.30.0.1/32 dev flannel.1",
        "ip addr add fd99::1/128 dev flannel.1 nodad",
    ):
        up.run(command)
    commands = ("ip route show table all", "ip -6 route show table all", "ip -o addr", "ip -o neigh")
    before = {command: set(up.shown(command)) for command in (*commands, "bridge fdb")}
    assert up.snapshot() == DESIRED
    assert up.reach(state(BASE)) == []
    assert up.reach(DESIRED) == []
    for command, lines in before.items():
        lost = {line for line in lines - set(up.shown(command)) if " used " not in line}
        assert lost == set(), command


def test_elsewhere_only_marked_routes_into_the_networks_are_ours(up: Node) -> None:
    for command in (
        "ip route add 10.244.7.0/24 via 192.168.77.7 dev eth0 proto 241",
        "ip route add 10.244.8.0/24 dev far proto 241",
        "ip -6 route add fd00:10:244:7::/64 via fd77::7 dev eth0 proto 241",
        # By their words any of these could be the daemon's, but somebody else made them.
        "ip route add 10.244.9.0/24 via 192.168.77.9 dev eth0",
        "ip route add 10.244.10.0/24 via 192.168.77.9 dev eth0 proto static",
        "ip -6 route add fd00:10:244:9::/64 via fd77::9 dev eth0",
        # Marked, and not in our network.
        "ip route add 10.245.7.0/24 via 192.168.77.7 dev eth0 proto 241",
        "ip route add 10.244.0.0/15 via 192.168.77.7 dev eth0 proto 241",
        "ip route add blackhole 10.244.11.0/24 proto 241",
        "ip -6 route add blackhole fd00:10:244:11::/64 proto 241",
        "ip route add 10.244.12.0/24 via 192.168.77.7 dev eth0 proto 241 table 100",
    ):
        up.run(command)
    assert up.kernel.snapshot(Scope((), SCOPE.networks)) == state(
        [
            Route("eth0", "10.244.7.0/24", "192.168.77.7", marked=True),
            Route("far", "10.244.8.0/24", "", marked=True),
            Route("eth0", "fd00:10:244:7::/64", "fd77::7", metric=1024, marked=True),
        ]
    )
    assert up.reach(DESIRED) == []
    shown = up.run("ip route show") + up.run("ip -6 route show")
    assert all(f"{gone} " not in shown for gone in ("10.244.7.0/24", "10.244.8.0/24", "fd00:10:244:7::/64"))
    kept = (
        "10.244.9.0/24",
        "10.244.10.0/24",
        "fd00:10:244:9::/64",
        "10.245.7.0/24",
        "10.244.11.0/24",
        "10.244.0.0/15",
    )
    assert all(f"{stays} " in shown for stays in kept)


def test_an_fdb_entry_of_a_bridge_port_belongs_to_the_bridge(up: Node) -> None:
    up.run("ip link add br0 type bridge")
    up.run("ip link set flannel.1 master br0")
    up.run(f"bridge fdb add {OTHER} dev flannel.1 master static")
    assert {e for e in up.snapshot().values() if isinstance(e, FdbEntry)} == {FDB, FDB6}


def test_a_link_whose_name_is_no_utf8_is_listed(up: Node) -> None:
    before = [link.name for link in up.kernel.links()]
    argv: list[str | bytes] = ["ip", "link", "add", b"\xff\xfe", "type", "bridge"]
    up.ns.call(lambda: subprocess.run(argv, check=True, timeout=30))
    assert [link.name for link in up.kernel.links()] == [*before, "\\xff\\xfe"]
    assert up.snapshot() == DESIRED


# ---- reading


def test_links_addresses_and_routes_are_read_as_iproute2_reads_them(up: Node) -> None:
    up.run("ip route add default via 192.168.77.254 dev eth0")
    eth0 = up.kernel.link("eth0")
    assert eth0 is not None
    assert (eth0.mtu, eth0.up, eth0.kind) == (1500, True, "veth")
    assert f"link/ether {eth0.mac} " in up.run("ip link show eth0")
    assert [link.name for link in up.kernel.links()] == [
        line.split()[1].partition("@")[0].rstrip(":") for line in up.shown("ip -o link")
    ]
    found = {(a.ifindex, ipaddress.ip_interface(f"{a.address}/{a.length}")) for a in up.kernel.addresses()}
    shown = (line.split() for line in up.shown("ip -o addr"))
    assert found == {(int(w[0].rstrip(":")), ipaddress.ip_interface(w[3])) for w in shown}
    routes = up.kernel.routes(socket.AF_INET)
    assert [(r.dst, r.via) for r in routes if r.dst == "0.0.0.0/0"] == [("0.0.0.0/0", "192.168.77.254")]
    assert len(routes) == len(up.shown("ip route show"))
    assert {r.dst for r in up.kernel.routes(socket.AF_INET, up.index("flannel.1"))} == {"10.244.2.0/24"}


def test_an_ipv4_route_through_an_ipv6_gateway_and_one_of_several_gateways(up: Node) -> None:
    up.run("ip route add 10.50.0.0/16 via inet6 fd77::9 dev eth0")
    up.run("ip route add 10.51.0.0/16 nexthop via 192.168.77.8 dev eth0 nexthop via 192.168.77.9 dev eth0")
    found = {r.dst: (r.via, r.ifindex) for r in up.kernel.routes(socket.AF_INET)}
    assert found["10.50.0.0/16"] == ("fd77::9", up.index("eth0"))
    assert found["10.51.0.0/16"] == ("", 0)


def test_a_route_look_up_names_interface_and_source(up: Node) -> None:
    found = up.kernel.route_to("192.168.77.9")
    assert found is not None
    assert (found.ifindex, found.source) == (up.index("eth0"), "192.168.77.1")
    assert up.kernel.route_to("9.9.9.9") is None
    assert up.kernel.route_to("2001:db8::9") is None
    through = up.kernel.route_to("10.244.2.7")
    assert through is not None and through.via == "10.244.2.0"


def test_absent_links_are_none(node: Node) -> None:
    for name in ("flannel.1", "a-name-of-many-letters", ""):
        assert node.kernel.link(name) is None


@contextmanager
def meddling(node: Node, meddle: Callable[[], object]) -> Iterator[list[int]]:
    """Call `meddle` after every part of a table that is read; counts the parts."""
    parts: list[int] = []
    receive = node.kernel._receive

    def received() -> bytes:
        data = receive()
        parts.append(len(data))
        meddle()
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node.kernel, "_receive", received)
        yield parts


@pytest.fixture
def crowded(node: Node) -> Iterator[tuple[Node, NetlinkKernel]]:
    """A node with so many addresses that the kernel tells them in parts, and a second hand in it."""
    assert (
        node.put(*BASE[:2], *(Address("flannel.1", f"10.244.{n // 250}.{n % 250}/32") for n in range(1500)))
        == []
    )
    with closing(node.ns.call(NetlinkKernel)) as other:
        yield node, other


def test_a_table_that_changed_while_it_was_read_is_read_again(crowded: tuple[Node, NetlinkKernel]) -> None:
    node, other = crowded
    before = node.kernel.addresses()
    with meddling(node, lambda: None) as parts:
        assert node.kernel.addresses() == before
    undisturbed = len(parts)
    assert undisturbed > 2
    todo = [Operation("drop", Address("flannel.1", f"10.244.0.{n}/32")) for n in (3, 1, 2)]
    with meddling(node, lambda: todo and other.apply([todo.pop()])) as parts:
        found = node.kernel.addresses()
    gone = {f"10.244.0.{n}" for n in (1, 2, 3)}
    assert found == [a for a in before if a.address not in gone]
    assert len(parts) > undisturbed


def test_a_table_that_never_stands_still_is_given_up(crowded: tuple[Node, NetlinkKernel]) -> None:
    node, other = crowded
    address = Address("flannel.1", "10.244.200.1/32")
    operations = itertools.cycle((Operation("put", address), Operation("drop", address)))
    with (
        meddling(node, lambda: other.apply([next(operations)])),
        pytest.raises(KernelError, match="changes faster than it can be read"),
    ):
        node.kernel.addresses()
    assert node.kernel.link("eth0") is not None
    assert len(node.kernel.addresses()) > 1500


def test_a_failed_batch_leaves_no_answers_for_the_next(up: Node) -> None:
    """Answers that overflow the socket's buffer are an error, and the next request gets its own answer."""
    bad: list[Entry] = [Route("flannel.1", f"10.244.{n}.0/24", "172.31.0.1") for n in range(250)]
    receive = up.kernel._socket
    receive.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    with pytest.raises(KernelError, match="socket failed"):
        up.put(*bad)
    receive.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    receive.settimeout(5)
    for _ in range(3):
        link = up.kernel.link("eth0")
        assert link is not None and link.name == "eth0"
    assert up.put(ROUTE) == []
    assert up.snapshot() == DESIRED


# ---- notifications


def quiet(node: Node) -> None:
    """Wait until the kernel has told of the IPv6 addresses that were put: it does so a little later."""
    wait_for(lambda: node.run("ip -6 addr show tentative scope global") == "")
    node.run("ip link set lo up")  # waits for the lock under which the kernel does that, up to the telling


@pytest.fixture
def monitor(up: Node) -> Iterator[Monitor]:
    quiet(up)
    with closing(up.ns.call(lambda: Monitor(frozenset(SCOPE.links)))) as made:
        yield made


def told(monitor: Monitor, wanted: Change) -> list[Change]:
    """Read until `wanted` is told, for at most five seconds; returns everything that was told."""
    timer = threading.Timer(5, monitor.wake)
    timer.start()
    everything: list[Change] = []
    try:
        while (changes := monitor.read()) is not None:
            everything += changes
            if wanted in changes:
                return everything
    finally:
        timer.cancel()
    raise AssertionError(f"{wanted} was not told, but {everything}")


def silent(monitor: Monitor, node: Node) -> list[Change]:
    """Everything told until a mark that is set now."""
    mark = Neighbour("flannel.1", "10.244.250.250", OTHER)
    node.run(f"ip neigh add {mark.address} lladdr {mark.mac} dev flannel.1 nud permanent")
    everything = told(monitor, Change(False, "flannel.1", mark))
    return [change for change in everything if change.entry != mark]


NEW_ROUTE = Route("flannel.1", "10.244.3.0/24", "10.244.3.0", onlink=True)
NEW_ROUTE6 = Route("flannel-v6.1", "fd00:10:244:3::/64", "fd00:10:244:3::", onlink=True, metric=1024)
CHANGES: dict[str, tuple[str, Change]] = {
    "route added": (
        "ip route add 10.244.3.0/24 via 10.244.3.0 dev flannel.1 onlink",
        Change(False, "flannel.1", NEW_ROUTE),
    ),
    "route deleted": ("ip route del 10.244.2.0/24", Change(True, "flannel.1", ROUTE)),
    "route changed": (
        "ip route replace 10.244.2.0/24 via 10.244.2.9 dev flannel.1 onlink",
        Change(False, "flannel.1", ROUTE._replace(via="10.244.2.9")),
    ),
    "route taken over": (
        "ip route replace 10.244.2.0/24 via 192.168.77.9 dev eth0",
        Change(True, "", Route("", "10.244.2.0/24", "192.168.77.9")),
    ),
    "IPv6 route added": (
        "ip -6 route add fd00:10:244:3::/64 via fd00:10:244:3:: dev flannel-v6.1 onlink",
        Change(False, "flannel-v6.1", NEW_ROUTE6),
    ),
    "IPv6 route deleted": ("ip -6 route del fd00:10:244:2::/64", Change(True, "flannel-v6.1", ROUTE6)),
    "IPv6 route taken over": (
        "ip -6 route replace fd00:10:244:2::/64 via fd77::9 dev eth0",
        Change(True, "", Route("", "fd00:10:244:2::/64", "fd77::9", metric=1024)),
    ),
    # IPv6 makes one route with two gateways of it.
    "IPv6 route joined by another": (
        "ip -6 route append fd00:10:244:2::/64 via fd77::9 dev eth0",
        Change(True, "", Route("", "fd00:10:244:2::/64", "", metric=1024)),
    ),
    # The kernel tells a deleted neighbour without its MAC; the key is the same.
    "neighbour deleted": (
        "ip neigh del 10.244.2.0 dev flannel.1",
        Change(True, "flannel.1", NEIGHBOUR._replace(mac="")),
    ),
    "neighbour changed": (
        f"ip neigh replace 10.244.2.0 lladdr {OTHER} dev flannel.1 nud permanent",
        Change(False, "flannel.1", NEIGHBOUR._replace(mac=OTHER)),
    ),
    "neighbour no longer permanent": (
        f"ip neigh replace 10.244.2.0 lladdr {MAC} dev flannel.1 nud stale",
        Change(True, "flannel.1", NEIGHBOUR),
    ),
    "IPv6 neighbour deleted": (
        "ip neigh del fd00:10:244:2:: dev flannel-v6.1",
        Change(True, "flannel-v6.1", NEIGHBOUR6._replace(mac="")),
    ),
    "FDB entry deleted": (
        f"bridge fdb del {MAC} dev flannel.1 dst 192.168.77.2 self",
        Change(True, "flannel.1", FDB),
    ),
    "FDB entry added": (
        f"bridge fdb add {OTHER} dev flannel.1 dst 192.168.77.66 self permanent",
        Change(False, "flannel.1", FdbEntry("flannel.1", OTHER, "192.168.77.66")),
    ),
    "FDB entry changed": (
        f"bridge fdb replace {MAC} dev flannel.1 dst 192.168.77.66 self permanent",
        Change(False, "flannel.1", FDB._replace(dst="192.168.77.66")),
    ),
    "address deleted": (
        "ip addr del 10.244.1.0/32 dev flannel.1",
        Change(True, "flannel.1", Address("flannel.1", "10.244.1.0/32")),
    ),
    "IPv6 address deleted": (
        "ip addr del fd00:10:244:1::/128 dev flannel-v6.1",
        Change(True, "flannel-v6.1", Address("flannel-v6.1", "fd00:10:244:1::/128")),
    ),
    "MTU changed": ("ip link set flannel.1 mtu 1400", Change(False, "flannel.1", None)),
    "MAC changed": ("ip link set flannel.1 address 02:00:00:00:00:77", Change(False, "flannel.1", None)),
    "device down": ("ip link set flannel.1 down", Change(False, "flannel.1", None)),
    "device deleted": ("ip link del flannel.1", Change(True, "flannel.1", None)),
    "device renamed": ("ip link set flannel.1 name other", Change(True, "flannel.1", None)),
    "underlay deleted": ("ip link del eth0", Change(True, "flannel-v6.1", None)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_kind_of_change_is_told(monitor: Monitor, up: Node, what: str) -> None:
    command, change = CHANGES[what]
    up.run(command)
    assert change in told(monitor, change)


def test_a_device_that_comes_back_is_watched_again(monitor: Monitor, up: Node) -> None:
    up.run("ip link del flannel.1")
    told(monitor, Change(True, "flannel.1", None))
    assert up.reach(DESIRED) == []
    told(monitor, Change(False, "flannel.1", None))
    while monitor.read() != []:  # what was told before the kernel knew that the new device is to be heard
        pass
    up.run("ip route del 10.244.2.0/24")
    told(monitor, Change(True, "flannel.1", ROUTE))
    up.run("ip link set flannel.1 name gone")
    told(monitor, Change(True, "flannel.1", None))
    up.run("ip link set gone name flannel.1")
    told(monitor, Change(False, "flannel.1", None))
    up.run("ip neigh del 10.244.2.0 dev flannel.1")
    told(monitor, Change(True, "flannel.1", NEIGHBOUR._replace(mac="")))


def test_what_is_not_ours_is_not_told(monitor: Monitor, up: Node) -> None:
    for command in (
        "ip link add cni0 type bridge",
        "ip addr add 10.244.1.1/24 dev cni0",
        "ip link set cni0 up",
        "ip link set far master cni0",
        "ip link set eth0 mtu 1600",
        "ip route add 10.99.0.0/16 via 192.168.77.9 dev eth0",
        "ip route del 10.99.0.0/16",
        "ip route add 10.99.0.0/16 via 10.244.2.0 dev flannel.1 onlink table 100",
        f"ip neigh add 192.168.77.9 lladdr {OTHER} dev eth0 nud permanent",
        "ip link del cni0",
        "ip addr add fe80::7/64 dev flannel.1",
    ):
        up.run(command)
    assert silent(monitor, up) == []


def test_a_pod_that_comes_and_goes_wakes_nobody(monitor: Monitor, up: Node) -> None:
    up.run("ip link add cni0 type bridge")
    up.run("ip addr add 10.244.1.1/24 dev cni0")
    for command in (
        "ip link add veth0 up master cni0 type veth peer name flannel.10",  # begins as ours
        "ip link set flannel.10 up",
        "ip link set cni0 up",
        f"ip neigh add 10.244.1.2 lladdr {OTHER} dev cni0",
        f"bridge fdb add {OTHER} dev veth0 master",
        "ip link del veth0",
        "ip link del cni0",
    ):
        up.run(command)
        # The kernel has told by the time that the command ends.
        assert select.select([monitor._socket], [], [], 0)[0] == [], command


def test_changes_before_the_monitor_are_not_told_again(monitor: Monitor, up: Node) -> None:
    assert silent(monitor, up) == []


def test_lost_notifications_are_told_as_an_empty_list_and_no_later_ones_are_lost(
    monitor: Monitor, up: Node
) -> None:
    monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    routes = [Route("flannel.1", f"10.244.{n}.0/24", f"10.244.{n}.0", onlink=True) for n in range(10, 250)]
    assert up.put(*routes) == []
    # The device that is watched from here on was made while nobody could hear of it.
    up.run("ip link del flannel.1")
    assert up.reach(DESIRED) == []
    monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    reads = 0
    while monitor.read() != []:
        reads += 1
        assert reads < 300
    up.run("ip route del 10.244.2.0/24")
    assert told(monitor, Change(True, "flannel.1", ROUTE)) == [Change(True, "flannel.1", ROUTE)]


def test_wake_ends_a_read_that_waits(monitor: Monitor) -> None:
    results: list[object] = []
    reader = threading.Thread(target=lambda: results.append(monitor.read()))
    reader.start()
    assert reader.is_alive()
    monitor.wake()
    reader.join(5)
    assert results == [None]


# ---- the loop on top of both


@contextmanager
def kept(node: Node) -> Iterator[NetState]:
    """A reconciler and a monitor at work as in the daemon; yields what they keep."""
    address, address6 = IPv4Address("192.168.77.1"), ipaddress.IPv6Address("fd77::1")
    external = ExternalInterface("eth0", 1500, address, address6, address, address6, "--iface=eth0 names it")
    text = (
        '{"Network": "10.244.0.0/16", "IPv6Network": "fd00:10:244::/48", "EnableIPv6": true, '
        '"Backend": {"Type": "vxlan"}}'
    )
    config = parse_netconf(text, "net-conf.json")
    backend = build(config, external, "net-conf.json")
    own = lease(1, "02:00:00:00:00:01", "02:00:00:00:00:61")
    peers = [lease(2, MAC, MAC6)]
    clock = MonotonicClock()
    reconciler = Reconciler(node.kernel, backend, config, own, clock, {})
    assert reconciler.prepare() == []
    watch = node.ns.call(lambda: Monitor(frozenset(backend.devices)))

    def listen() -> None:
        while (changes := watch.read()) is not None:
            reconciler.kernel_changes(changes)

    threads = [threading.Thread(target=reconciler.run), threading.Thread(target=listen)]
    for thread in threads:
        thread.start()
    try:
        reconciler.lease_update(Snapshot((own, *peers)))
        yield desired(backend, own, iter(peers))
    finally:
        reconciler.queue.shut_down()
        watch.wake()
        for thread in threads:
            thread.join(10)
        watch.close()


def lease(number: int, mac: str, mac6: str) -> Lease:
    return Lease(
        IPv4Network(f"10.244.{number}.0/24"),
        ipaddress.IPv6Network(f"fd00:10:244:{number}::/64"),
        Attributes(
            public_ip=IPv4Address(f"192.168.77.{number}"),
            public_ipv6=ipaddress.IPv6Address(f"fd77::{number}"),
            backend_type="vxlan",
            backend_data=f'{{"VNI":1,"VtepMAC":"{mac}"}}',
            backend_v6_data=f'{{"VNI":1,"VtepMAC":"{mac6}"}}',
        ),
    )


DAMAGE = [
    "ip route del 10.244.2.0/24",
    "ip route replace 10.244.2.0/24 via 192.168.77.9 dev eth0",
    "ip route replace blackhole 10.244.2.0/24",
    "ip -6 route replace fd00:10:244:2::/64 via fd77::9 dev eth0",
    "ip -6 route append fd00:10:244:2::/64 via fd77::9 dev eth0",
    "ip route flush dev flannel.1",
    "ip neigh flush dev flannel.1 nud permanent",
    f"bridge fdb del {MAC} dev flannel.1 dst 192.168.77.2 self",
    f"bridge fdb replace {MAC} dev flannel.1 dst 192.168.77.66 self permanent",
    "ip addr flush dev flannel.1",
    "ip addr flush dev flannel-v6.1 scope global",
    "ip link set flannel.1 down",
    "ip link set flannel-v6.1 down",
    "ip link set flannel.1 mtu 1300",
    "ip link set flannel-v6.1 address 02:00:00:00:00:77",
    "ip link del flannel.1",
    "ip link del flannel-v6.1",
    "ip link set flannel.1 name other",
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_repaired_within_a_second(node: Node, damage: str) -> None:
    with kept(node) as wanted, closing(node.ns.call(NetlinkKernel)) as eyes:
        wait_for(lambda: eyes.snapshot(SCOPE) == wanted)
        node.run(damage)
        if " name other" in damage:
            node.run("ip link del other")
        assert wait_for(lambda: eyes.snapshot(SCOPE) == wanted) < 1
