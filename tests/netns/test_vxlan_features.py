"""Direct routes, blackholes, checksum offload and the underlay's changes, on the real kernel.

Each test has a namespace of its own that stands for a node:

    far ──(veth)── eth0  192.168.77.1/24, fd77::1/64
                     │       198.51.100.0/24 and fd99::/64 through the gateways 192.168.77.254, fd77::254
                 flannel.1, flannel-v6.1
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import pytest
from pyroute2 import Ethtool

from cni.errors import KernelError
from cni.net import ethtool
from cni.net.entries import Address, Blackhole, Entry, FdbEntry, Link, NetState, Route, state
from cni.net.kernel import Change, Monitor, NetlinkKernel
from cni.net.plan import Refused, Scope, plan
from flanneld.backend import build
from flanneld.backend.protocol import Backend, blackholes, merge
from flanneld.config import parse_netconf
from flanneld.iface import ExternalInterface
from flanneld.lease import Attributes, Lease
from tests.netns.firewall_fixtures import Namespace, namespace
from tests.netns.test_kernel import Node, quiet, told, wait_for

ADDRESS, ADDRESS6 = IPv4Address("192.168.77.1"), IPv6Address("fd77::1")
EXTERNAL = ExternalInterface("eth0", 1500, ADDRESS, ADDRESS6, ADDRESS, ADDRESS6, "--iface=eth0 names it")
NETWORKS = '"Network": "10.244.0.0/16", "IPv6Network": "fd00:10:244::/48", "EnableIPv6": true'
TUNNEL = Route("flannel.1", "10.244.2.0/24", "10.244.2.0", onlink=True)
TUNNEL6 = Route("flannel-v6.1", "fd00:10:244:2::/64", "fd00:10:244:2::", onlink=True, metric=1024)
DIRECT = Route("eth0", "10.244.2.0/24", "192.168.77.2", marked=True)
DIRECT6 = Route("eth0", "fd00:10:244:2::/64", "fd77::2", metric=1024, marked=True)


def lease(number: int, mac: str = "") -> Lease:
    """Subnets 10.244.N.0/24 and fd00:10:244:N::/64 of the node 192.168.77.N, fd77::N."""
    mac = mac or f"02:00:00:00:00:{number:02x}"
    return Lease(
        IPv4Network(f"10.244.{number}.0/24"),
        IPv6Network(f"fd00:10:244:{number}::/64"),
        Attributes(
            public_ip=IPv4Address(f"192.168.77.{number}"),
            public_ipv6=IPv6Address(f"fd77::{number}"),
            backend_type="vxlan",
            backend_data=f'{{"VNI":1,"VtepMAC":"{mac}"}}',
            backend_v6_data=f'{{"VNI":1,"VtepMAC":"06{mac[2:]}"}}',
        ),
    )


OWN, PEER = lease(1), lease(2)


class Host(Node):
    """A node with the daemon's backend on it."""

    def __init__(self, ns: Namespace, kernel: NetlinkKernel) -> None:
        super().__init__(ns, kernel)
        self.configure('"DirectRouting": true')

    def configure(self, keys: str) -> None:
        text = f'{{{NETWORKS}, "Backend": {{"Type": "vxlan", {keys}}}}}'
        self.config = parse_netconf(text, "net-conf.json")
        on_link = self.kernel.on_link("eth0")
        self.backend: Backend = build(self.config, EXTERNAL, "net-conf.json", on_link=on_link)
        self.scope = self.backend.scope(self.config)

    def wanted(self, *peers: Lease) -> NetState:
        return merge(list(self.backend.base(OWN)), {p.key: tuple(self.backend.peer(p)) for p in peers})[0]

    def snapshot(self) -> NetState:
        return self.kernel.snapshot(self.scope)

    def settle(self, *peers: Lease) -> NetState:
        """One pass; what is there afterwards is what was wanted, and a second pass finds no work."""
        wanted = self.wanted(*peers)
        assert self.reach(wanted) == []
        assert plan(wanted, self.snapshot()) == []
        return wanted

    def routes(self, dst: str = "10.244.2.0/24") -> list[str]:
        family = "-6" if ":" in dst else "-4"
        return self.shown(f"ip {family} route show {dst}")


@pytest.fixture
def host() -> Iterator[Host]:
    with namespace() as ns:
        ns.run("ip link add eth0 type veth peer name far")
        # Link-local addresses would be told of when they have proved their own, seconds later.
        ns.run("ip link set eth0 addrgenmode none")
        ns.run("ip link set far addrgenmode none")
        ns.run("ip addr add 192.168.77.1/24 dev eth0")
        ns.run("ip addr add fd77::1/64 dev eth0 nodad")
        ns.run("ip link set eth0 up")
        ns.run("ip link set far up")
        ns.run("ip route add 198.51.100.0/24 via 192.168.77.254")
        ns.run("ip -6 route add fd99::/64 via fd77::254")
        with closing(ns.call(NetlinkKernel)) as kernel:
            yield Host(ns, kernel)


# ---- who is on the link

REACHED = {
    "a neighbour": ("192.168.77.9", True),
    "behind a gateway": ("198.51.100.9", False),
    "nowhere": ("203.0.113.9", False),
    "ourselves": ("192.168.77.1", False),
    "on another link": ("192.168.88.9", False),
    "a host route around": ("192.168.77.66", False),
    "a rule leads around": ("192.168.77.67", False),
    "an IPv6 gateway": ("192.168.77.68", False),
    "thrown away": ("192.168.77.69", False),
    "a host route without a gateway": ("203.0.113.77", True),
    "an IPv6 neighbour": ("fd77::9", True),
    "behind an IPv6 gateway": ("fd99::9", False),
    "IPv6 nowhere": ("2001:db8::9", False),
    "IPv6 ourselves": ("fd77::1", False),
    # Without a link it names nobody.
    "IPv6 link-local": ("fe80::9", False),
}


@pytest.mark.parametrize("case", REACHED)
def test_on_the_link_is_what_the_kernel_routes_there_without_a_gateway(host: Host, case: str) -> None:
    for command in (
        "ip addr add 192.168.88.1/24 dev far",
        "ip route add 192.168.77.66 via 192.168.77.254",
        "ip route add 192.168.77.67 via 192.168.77.254 table 100",
        "ip rule add to 192.168.77.67 lookup 100",
        "ip route add 192.168.77.68 via inet6 fd77::254 dev eth0",
        "ip route add blackhole 192.168.77.69",
        "ip route add 203.0.113.77 dev eth0",
        "ip addr add fe80::1/64 dev eth0 nodad",
    ):
        host.run(command)
    address, reached = REACHED[case]
    assert host.kernel.on_link("eth0")(ip_address(address)) is reached


def test_the_answer_follows_the_routes_and_the_link(host: Host) -> None:
    on_link = host.kernel.on_link("eth0")
    peer = IPv4Address("192.168.77.9")
    assert on_link(peer)
    host.run("ip route add 192.168.77.9 via 192.168.77.254")
    assert not on_link(peer)
    host.run("ip route del 192.168.77.9")
    assert on_link(peer)
    host.run("ip link set eth0 name eth5")
    assert host.kernel.on_link("eth5")(peer)
    host.run("ip link del eth5")
    assert not on_link(peer)
    # Another link of the name, with another index.
    host.run("ip link add eth0 type bridge")
    host.run("ip addr add 192.168.77.1/24 dev eth0")
    host.run("ip link set eth0 up")
    assert on_link(peer)


# ---- direct routing


def test_a_peer_on_the_link_has_a_direct_route_and_nothing_else(host: Host) -> None:
    host.settle(PEER)
    assert host.routes() == ["10.244.2.0/24 via 192.168.77.2 dev eth0 proto 241"]
    assert host.routes("fd00:10:244:2::/64") == [
        "fd00:10:244:2::/64 via fd77::2 dev eth0 proto 241 metric 1024 pref medium"
    ]
    for device in ("flannel.1", "flannel-v6.1"):
        assert host.shown(f"ip neigh show dev {device} nud permanent") == []
        assert host.shown(f"bridge fdb show dev {device}") == []


AROUND = {4: "ip route {} 192.168.77.2 via 192.168.77.254", 6: "ip -6 route {} fd77::2 via fd77::254"}


@pytest.mark.parametrize("version", [4, 6])
def test_a_peer_changes_its_way_with_the_hosts_routes(host: Host, version: int) -> None:
    """There and back without a moment in which its subnet is routed nowhere."""
    straight, tunnel = (DIRECT, TUNNEL) if version == 4 else (DIRECT6, TUNNEL6)
    host.settle(PEER)
    links = frozenset(host.backend.devices)
    with closing(host.ns.call(lambda: Monitor(links, frozenset({"eth0"})))) as monitor:
        host.run(AROUND[version].format("add"))
        there = host.settle(PEER)
        # Deleted at last, so that everything before it has been told.
        mark = Address("flannel.1", "10.244.1.0/32")
        host.run("ip addr del 10.244.1.0/32 dev flannel.1")
        changes = told(monitor, Change(True, "flannel.1", mark))
        assert Change(False, tunnel.link, tunnel) in changes
        assert not [c for c in changes if c.gone and isinstance(c.entry, Route) and c.entry.dst == tunnel.dst]
        assert there[tunnel.key] == tunnel
        host.run(AROUND[version].format("del"))
        back = host.settle(PEER)
    assert back[straight.key] == straight
    assert len(host.routes(tunnel.dst)) == 1


def test_a_direct_peer_that_moves_has_one_route(host: Host) -> None:
    host.settle(PEER)
    attrs = replace(PEER.attrs, public_ip=IPv4Address("192.168.77.10"), public_ipv6=IPv6Address("fd77::10"))
    host.settle(replace(PEER, attrs=attrs))
    assert host.routes() == ["10.244.2.0/24 via 192.168.77.10 dev eth0 proto 241"]
    [line] = host.routes("fd00:10:244:2::/64")
    assert " via fd77::10 " in line


def test_a_stale_direct_route_is_dropped_even_after_the_option_is_off(host: Host) -> None:
    other = lease(3)
    host.settle(PEER, other)
    host.run("ip route add 10.244.77.0/24 via 192.168.77.9 dev eth0")
    host.settle(other)
    assert host.routes() == host.routes("fd00:10:244:2::/64") == []
    host.configure('"DirectRouting": false')
    host.settle()
    assert host.routes("10.244.3.0/24") == host.routes("fd00:10:244:3::/64") == []
    assert host.routes("10.244.77.0/24") == ["10.244.77.0/24 via 192.168.77.9 dev eth0"]


def test_a_direct_route_of_the_last_link_is_dropped_too(host: Host) -> None:
    """The external interface is another one since the last start."""
    host.run("ip addr add 192.168.88.1/24 dev far")
    host.run("ip route add 10.244.9.0/24 via 192.168.88.9 dev far proto 241")
    host.settle(PEER)
    assert host.routes("10.244.9.0/24") == []


@pytest.mark.parametrize("keys", ['"DirectRouting": true', '"DirectRouting": false'])
def test_the_routes_of_hostgw_and_of_upstream_are_taken_over(host: Host, keys: str) -> None:
    host.run("ip route add 10.244.2.0/24 via 192.168.77.2 dev eth0")
    host.run("ip -6 route add fd00:10:244:2::/64 via fd77::2 dev eth0")
    host.configure(keys)
    host.settle(PEER)
    assert len(host.routes()) == len(host.routes("fd00:10:244:2::/64")) == 1


def test_dropping_a_direct_route_leaves_one_of_somebody_else(host: Host) -> None:
    host.settle(PEER)
    host.run("ip route replace 10.244.2.0/24 via 192.168.77.99 dev eth0")
    host.run("ip -6 route replace fd00:10:244:2::/64 via fd77::99 dev eth0")
    assert host.drop(DIRECT, DIRECT6) == []
    assert host.routes() == ["10.244.2.0/24 via 192.168.77.99 dev eth0"]
    assert len(host.routes("fd00:10:244:2::/64")) == 1


# ---- one route, one next hop

BEFORE = {
    "nothing": (),
    "another gateway": ("add {p} via fd00:10:244:2::7 dev flannel-v6.1 onlink",),
    "host-gw": ("add {p} via fd77::2 dev eth0",),
    "two gateways": ("add {p} via fd77::2 dev eth0", "append {p} via fd77::3 dev eth0"),
    "a gateway beside ours": (
        "add {p} via fd00:10:244:2:: dev flannel-v6.1 onlink",
        "append {p} via fd00:10:244:2::9 dev flannel-v6.1 onlink",
    ),
    "no gateway": ("add {p} dev flannel-v6.1",),
    "no gateway, elsewhere": ("add {p} dev eth0",),
    "a blackhole": ("add blackhole {p}",),
    "unreachable": ("add unreachable {p}",),
    "a nexthop object": ("add {p} nhid 7",),
    # The kernel refuses an on-link gateway that a route leads elsewhere.
    "a wider route around": ("add fd00::/8 via fd77::254 dev eth0",),
    "both": ("add fd00::/8 via fd77::254 dev eth0", "add {p} via fd77::2 dev eth0"),
}


@pytest.mark.parametrize("wanted", [TUNNEL6, DIRECT6], ids=["tunnel", "direct"])
@pytest.mark.parametrize("case", BEFORE)
def test_an_ipv6_route_has_one_next_hop_whatever_was_there(host: Host, case: str, wanted: Route) -> None:
    assert host.reach(host.wanted()) == []
    host.run("ip nexthop add id 7 via fd77::9 dev eth0")
    for command in BEFORE[case]:
        host.run(f"ip -6 route {command.format(p=wanted.dst)}")
    assert host.put(wanted) == []
    [line] = host.routes(wanted.dst)
    assert line.startswith(f"{wanted.dst} via {wanted.via} dev {wanted.link} ")
    assert host.snapshot()[wanted.key] == wanted
    assert host.put(wanted) == []
    assert host.routes(wanted.dst) == [line]


def test_thousands_of_ipv6_routes_in_the_way_of_a_wider_one(host: Host) -> None:
    assert host.reach(host.wanted()) == []
    host.run("ip -6 route add fd00::/8 via fd77::254 dev eth0")
    subnets = [f"fd00:10:244:{n:x}::" for n in range(2, 1002)]
    routes = [Route("flannel-v6.1", f"{s}/64", s, onlink=True, metric=1024) for s in subnets]
    assert host.put(*routes) == []
    assert {e for e in host.snapshot().values() if isinstance(e, Route)} == set(routes)


def test_a_route_that_cannot_be_had_leaves_nothing_half_done(host: Host) -> None:
    assert host.reach(host.wanted()) == []
    bad = TUNNEL6._replace(via="ff02::1")
    [refused] = host.put(bad, TUNNEL)
    assert (refused.operation.entry, refused.errno) == (bad, errno.EINVAL)
    assert host.routes(bad.dst) == []
    assert len(host.routes()) == 1


def test_ipv6_addresses_do_not_wait_for_proof(host: Host) -> None:
    host.settle()
    [address] = host.shown("ip -6 -o addr show dev flannel-v6.1 scope global")
    assert " fd00:10:244:1::/128 " in address and " nodad " in address
    # Proof takes the kernel a second at least.
    assert wait_for(lambda: host.run("ip -6 addr show tentative scope global") == "") < 0.9


def test_an_address_that_upstream_added_is_taken_as_it_is(host: Host) -> None:
    host.settle()
    host.run("ip -6 addr del fd00:10:244:1::/128 dev flannel-v6.1")
    host.run("ip -6 addr add fd00:10:244:1::/128 dev flannel-v6.1")
    assert plan(host.wanted(), host.snapshot()) == []


def test_a_kernel_that_filters_nothing_shows_the_same(host: Host) -> None:
    """One without strict checking sends whole tables."""
    Cni.up(host)
    with_holes(host)
    host.settle(PEER, lease(3))
    for command in (
        "ip route add 10.244.9.0/24 via 192.168.77.9 dev eth0",
        "ip route add 10.244.8.0/24 dev flannel.1 scope link",
        "ip neigh add 10.244.9.0 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
        "ip route add blackhole 10.245.0.0/16",
        "ip route add 10.244.1.0/24 via 192.168.77.9 table 100 proto 241",
    ):
        host.run(command)
    scope = holes(host)[0]
    before = host.kernel.snapshot(scope)
    host.kernel._socket.setsockopt(270, 12, 0)  # SOL_NETLINK, NETLINK_GET_STRICT_CHK
    assert host.kernel.snapshot(scope) == before
    assert len(before) == 4 + 2 + 4 + 1


# ---- forwarding database


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_two_nodes_with_one_mac_do_not_take_turns(host: Host, order: tuple[int, int]) -> None:
    host.configure('"DirectRouting": false')
    twins = {number: lease(number, "02:00:00:00:00:77") for number in (2, 3)}
    host.settle(*(twins[number] for number in order))
    fdb = "02:00:00:00:00:77 dst 192.168.77.2 self permanent"
    assert host.shown("bridge fdb show dev flannel.1") == [fdb]
    host.settle(twins[3])
    assert host.shown("bridge fdb show dev flannel.1") == [fdb.replace("77.2", "77.3")]


def test_a_mac_of_many_has_several_places_and_all_are_dropped(host: Host) -> None:
    host.settle()
    for mac in ("00:00:00:00:00:00", "33:33:00:00:00:01"):
        for last in (8, 9):
            host.run(f"bridge fdb append {mac} dev flannel.1 dst 192.168.77.{last} self permanent")
    assert len([e for e in host.snapshot().values() if isinstance(e, FdbEntry)]) == 4
    host.settle()
    assert host.shown("bridge fdb show dev flannel.1") == []


# ---- blackholes


class Cni:
    """The pods' bridge, as the CNI plugin makes it."""

    @staticmethod
    def up(host: Host) -> None:
        host.run("ip link add cni0 type bridge")
        host.run("ip addr add 10.244.1.1/24 dev cni0")
        host.run("ip addr add fd00:10:244:1::1/64 dev cni0 nodad")
        host.run("ip link set cni0 up")


HOLES = (Blackhole("10.244.1.0/24"), Blackhole("fd00:10:244:1::/64"))


def holes(host: Host) -> tuple[Scope, list[Entry]]:
    """What the flag adds to the scope and to what is wanted."""
    made = blackholes(host.config, OWN)
    return host.scope._replace(blackholes=tuple(hole.dst for hole in made)), list(made)


def with_holes(host: Host) -> list[Refused]:
    scope, made = holes(host)
    wanted = {**host.wanted(), **state(made)}
    refused = host.kernel.apply(plan(wanted, host.kernel.snapshot(scope)))
    assert plan(wanted, host.kernel.snapshot(scope)) == []
    return refused


def found_by_upstream(host: Host) -> list[tuple[str, int]]:
    """What a Go flanneld would look for: blackhole routes of the main table, by destination."""
    return [
        (route.get("dst"), route["dst_len"])
        for family in (2, 10)
        for route in host.pyroute2(lambda ipr, f=family: ipr.get_routes(family=f, table=254, type=6))  # type: ignore[misc]
    ]


def test_blackholes_catch_what_no_better_route_takes(host: Host) -> None:
    assert with_holes(host) == []
    assert host.routes("10.244.1.0/24") == ["blackhole 10.244.1.0/24 metric 2147483647"]
    assert host.routes("fd00:10:244:1::/64") == [
        "blackhole fd00:10:244:1::/64 dev lo metric 2147483647 pref medium"
    ]
    assert found_by_upstream(host) == [("10.244.1.0", 24), ("fd00:10:244:1::", 64)]
    on_link = host.kernel.route_to
    assert on_link("10.244.1.7") is on_link("fd00:10:244:1::7") is None


@pytest.mark.parametrize("first", ["bridge", "blackhole"])
def test_the_pods_bridge_and_the_blackhole_stand_side_by_side(host: Host, first: str) -> None:
    steps: list[Callable[[], object]] = [lambda: Cni.up(host), lambda: with_holes(host)]
    for step in steps if first == "bridge" else reversed(steps):
        step()
    bridge = host.index("cni0")
    for address in ("10.244.1.7", "fd00:10:244:1::7"):
        route = host.kernel.route_to(address)
        assert route is not None and route.ifindex == bridge
    assert host.routes("10.244.1.0/24") == [
        "10.244.1.0/24 dev cni0 proto kernel scope link src 10.244.1.1",
        "blackhole 10.244.1.0/24 metric 2147483647",
    ]
    assert len(host.routes("fd00:10:244:1::/64")) == 2
    host.run("ip link del cni0")
    assert host.kernel.route_to("10.244.1.7") is None
    assert with_holes(host) == []


def test_upstreams_blackhole_gives_way_before_it_can_bury_the_bridge(host: Host) -> None:
    """Of two IPv4 routes with the same prefix and metric the older wins: upstream's, against the bridge."""
    host.run("ip route add blackhole 10.244.1.0/24")
    host.run("ip -6 route add blackhole fd00:10:244:1::/64")
    assert with_holes(host) == []
    assert len(found_by_upstream(host)) == 2
    Cni.up(host)
    route = host.kernel.route_to("10.244.1.7")
    assert route is not None and route.ifindex == host.index("cni0")


def test_other_blackholes_are_not_touched_and_without_the_flag_none_is(host: Host) -> None:
    others = ("10.244.0.0/16", "10.244.1.0/25", "10.244.2.0/24", "fd00:10:244::/48")
    for prefix in others:
        host.run(f"ip {'-6' if ':' in prefix else '-4'} route add blackhole {prefix}")
    host.run("ip route add blackhole 10.244.1.0/24 table 100")
    assert with_holes(host) == []
    host.settle()
    assert len(found_by_upstream(host)) == len(others) + 2
    assert host.shown("ip route show table 100") == ["blackhole 10.244.1.0/24"]
    assert host.drop(*HOLES) == []
    assert host.drop(*HOLES) == []
    assert len(found_by_upstream(host)) == len(others)


def test_an_ipv6_blackhole_is_dropped_beside_a_route_of_the_same_metric(host: Host) -> None:
    host.settle()
    host.run("ip -6 route add fd00:10:244:1::/64 via fd77::9 dev eth0 metric 2147483647")
    host.run("ip -6 route append blackhole fd00:10:244:1::/64 metric 2147483647")
    assert host.drop(HOLES[1]) == []
    [line] = host.routes("fd00:10:244:1::/64")
    assert " via fd77::9 " in line


@pytest.mark.parametrize("hole", HOLES, ids=["IPv4", "IPv6"])
def test_a_deleted_blackhole_is_told(host: Host, hole: Blackhole) -> None:
    with_holes(host)
    with closing(host.ns.call(lambda: Monitor(frozenset(host.backend.devices)))) as monitor:
        family = "-6" if ":" in hole.dst else "-4"
        host.run(f"ip {family} route del blackhole {hole.dst} metric {hole.metric}")
        told(monitor, Change(True, "", hole))


# ---- checksum offload


def offload(host: Host, device: str) -> bool:
    """As ethtool's own netlink family tells it."""

    def asked() -> bool:
        with Ethtool() as reader:
            return bool(reader.get_features(device).features["tx-checksum-ip-generic"].enable)

    return host.ns.call(asked)


def switch(host: Host, device: str, on: bool) -> None:
    def asked() -> None:
        with Ethtool() as writer:
            features = writer.get_features(device)
            features.features["tx-checksum-ip-generic"].enable = on
            writer.set_features(device, features)

    host.ns.call(asked)


def test_the_offload_is_switched_off_and_kept_off(host: Host) -> None:
    host.settle()
    assert offload(host, "flannel.1")
    host.configure('"TxChecksumOffload": "off"')
    host.settle()
    assert not offload(host, "flannel.1") and not offload(host, "flannel-v6.1")
    with closing(host.ns.call(lambda: Monitor(frozenset(host.backend.devices)))) as monitor:
        switch(host, "flannel.1", True)
        told(monitor, Change(False, "flannel.1", None))
    index = host.index("flannel.1")
    host.settle()
    assert not offload(host, "flannel.1")
    assert host.index("flannel.1") == index
    host.configure('"TxChecksumOffload": "on"')
    host.settle()
    assert offload(host, "flannel.1") and offload(host, "flannel-v6.1")


def test_a_new_device_has_it_off_at_once(host: Host) -> None:
    host.configure('"TxChecksumOffload": "off"')
    host.settle()
    assert not offload(host, "flannel.1")


def test_what_an_operator_switched_off_stays_off_unless_asked_for(host: Host) -> None:
    """As upstream's documentation tells him to, by a udev rule."""
    host.settle()
    switch(host, "flannel.1", False)
    host.settle()
    assert not offload(host, "flannel.1")


def test_a_link_without_the_offload_is_no_error(host: Host) -> None:
    sock = host.kernel._control
    ethtool.set_tx_checksum(sock, "lo", False)
    assert ethtool.tx_checksum(sock, "lo") is True
    with pytest.raises(OSError, match="No such device"):
        ethtool.tx_checksum(sock, "eth7")
    with pytest.raises(OSError, match="No such device"):
        ethtool.set_tx_checksum(sock, "eth7", True)


def refusing(number: int) -> Callable[..., int]:
    def refuse(*_args: object) -> int:
        raise OSError(number, "no")

    return refuse


@pytest.mark.parametrize("wanted", ["on", "off"])
def test_a_link_that_cannot_tell_is_as_wanted(
    host: Host, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.configure(f'"TxChecksumOffload": "{wanted}"')
    monkeypatch.setattr(ethtool, "_call", refusing(errno.EOPNOTSUPP))
    host.settle()


def test_an_offload_that_must_not_be_touched_is_a_refusal(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.configure('"TxChecksumOffload": "off"')
    monkeypatch.setattr(ethtool, "_call", refusing(errno.EPERM))
    refused = host.reach(state([e for e in host.wanted().values() if isinstance(e, Link)]))
    assert {(r.errno, r.operation.verb) for r in refused} == {(errno.EPERM, "put")}
    with pytest.raises(KernelError, match="checksum offload of flannel"):
        host.snapshot()


# ---- the underlay


@pytest.fixture
def monitor(host: Host) -> Iterator[Monitor]:
    host.settle(PEER)
    quiet(host)
    links, underlay = frozenset(host.backend.devices), frozenset({"eth0"})
    with closing(host.ns.call(lambda: Monitor(links, underlay))) as made:
        yield made


UNDERLAY = {
    "MTU": ("ip link set eth0 mtu 1400", Change(False, "eth0", None)),
    "down": ("ip link set eth0 down", Change(False, "eth0", None)),
    "deleted": ("ip link del eth0", Change(True, "eth0", None)),
    "renamed": ("ip link set eth0 name eth9", Change(True, "eth0", None)),
    "new address": (
        "ip addr add 192.168.77.99/24 dev eth0",
        Change(False, "eth0", Address("eth0", "192.168.77.99/24")),
    ),
    "address gone": (
        "ip addr del 192.168.77.1/24 dev eth0",
        Change(True, "eth0", Address("eth0", "192.168.77.1/24")),
    ),
    "IPv6 address gone": (
        "ip addr del fd77::1/64 dev eth0",
        Change(True, "eth0", Address("eth0", "fd77::1/64")),
    ),
    "link-local address": (
        "ip addr add fe80::7/64 dev eth0",
        Change(False, "eth0", Address("eth0", "fe80::7/64")),
    ),
    "route added": (
        "ip route add 192.168.77.2 via 192.168.77.254",
        Change(False, "eth0", Route("eth0", "192.168.77.2/32", "192.168.77.254")),
    ),
    "route gone": (
        "ip route del 198.51.100.0/24",
        Change(True, "eth0", Route("eth0", "198.51.100.0/24", "192.168.77.254")),
    ),
    "the kernel's own route gone": (
        "ip route del 192.168.77.0/24",
        Change(True, "eth0", Route("eth0", "192.168.77.0/24", "")),
    ),
    "direct route gone": ("ip route del 10.244.2.0/24", Change(True, "eth0", DIRECT)),
    "direct route taken over": (
        "ip route replace 10.244.2.0/24 via 192.168.77.9",
        Change(False, "eth0", Route("eth0", "10.244.2.0/24", "192.168.77.9")),
    ),
    "IPv6 direct route gone": ("ip -6 route del fd00:10:244:2::/64", Change(True, "eth0", DIRECT6)),
}


@pytest.mark.parametrize("what", UNDERLAY)
def test_a_change_of_the_underlay_is_told(host: Host, monitor: Monitor, what: str) -> None:
    command, change = UNDERLAY[what]
    host.run(command)
    assert change in told(monitor, change)


def test_an_underlay_that_comes_back_is_watched_again(host: Host, monitor: Monitor) -> None:
    host.run("ip link set eth0 name eth9")
    told(monitor, Change(True, "eth0", None))
    host.run("ip link add eth0 type bridge")
    told(monitor, Change(False, "eth0", None))
    host.run("ip addr add 192.168.99.1/24 dev eth0")
    told(monitor, Change(False, "eth0", Address("eth0", "192.168.99.1/24")))


def test_neighbours_and_noise_of_the_underlay_are_not_told(host: Host, monitor: Monitor) -> None:
    waited: list[list[Change] | None] = []
    reader = threading.Thread(target=lambda: waited.append(monitor.read()))
    reader.start()
    for command in (
        "ip neigh add 192.168.77.9 lladdr 02:00:00:00:00:99 dev eth0 nud permanent",
        "ip neigh replace 192.168.77.9 lladdr 02:00:00:00:00:98 dev eth0 nud stale",
        "ip neigh del 192.168.77.9 dev eth0",
        "ip neigh add fd77::9 lladdr 02:00:00:00:00:99 dev eth0 nud reachable",
        # Told by the kernel like a change of the MTU, and none of ours.
        "ip link set eth0 txqueuelen 500",
        "ip link set eth0 alias uplink",
        "ip link set eth0 promisc on",
        "ip link add br0 type bridge",
        "ip link set eth0 master br0",
        "ip link set eth0 nomaster",
        "ip route add blackhole 203.0.113.0/24",
        "ip route add 203.0.113.7 via 192.168.77.254 table 100",
    ):
        host.run(command)
    mark = Address("eth0", "192.168.77.199/32")
    host.run("ip addr add 192.168.77.199/32 dev eth0")
    reader.join(5)
    assert waited == [[Change(False, "eth0", mark)]]


def test_without_an_underlay_nothing_of_it_is_told(host: Host) -> None:
    host.settle(PEER)
    quiet(host)
    with closing(host.ns.call(lambda: Monitor(frozenset(host.backend.devices)))) as monitor:
        for command, _ in list(UNDERLAY.values())[:2]:
            host.run(command)
        host.run("ip addr del 10.244.1.0/32 dev flannel.1")
        mark = Change(True, "flannel.1", Address("flannel.1", "10.244.1.0/32"))
        assert {change.link for change in told(monitor, mark)} == {"flannel.1"}
