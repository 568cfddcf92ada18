"""IPv6 beside IPv4, and alone: real daemons from the source tree, real CNI plugins, real traffic.

outside (world) ── switch ──┬── node1: eth0, flannel.1, flannel-v6.1, cni0 ── pods
                            ├── node2
                            └── node3
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import pytest

from cni.errors import ConfigError
from cni.net.kernel import NetlinkKernel
from flanneld import iface, startup
from flanneld.config import parse_netconf, validate
from flanneld.lease import Attributes, parse_subnet_key
from flanneld.subnet.etcd import EtcdManager
from tests.e2e.etcd_server import EtcdServer
from tests.lab import net, traffic
from tests.lab.cluster import Cluster
from tests.lab.net import DUAL, IPV6, Lab, LabError, wait_for
from tests.lab.node import (
    ETCD_PREFIX,
    REPOSITORY,
    SOURCE,
    Node,
    Pod,
    Store,
    etcd_store,
    etcdctl,
    source_plugins,
    sqlite_store,
)
from tests.netns.firewall_fixtures import Namespace, namespace

Clusters = Callable[..., Cluster]
Network = IPv4Network | IPv6Network

NETWORK, NETWORK6 = IPv4Network("10.244.0.0/16"), IPv6Network("fd00:10:244::/48")
VXLAN = {"Backend": {"Type": "vxlan"}}
ONLY4: dict[str, object] = {"Network": str(NETWORK), **VXLAN}
ONLY6: dict[str, object] = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": str(NETWORK6), **VXLAN}
BOTH: dict[str, object] = {"EnableIPv6": True, "IPv6Network": str(NETWORK6), **ONLY4}

REPAIR_S = 1.0
FAMILIES = pytest.mark.parametrize("version", [4, 6])
# The bridge's gateway address is proven unique before it answers; only the first pod of a node waits for it.
SETTLE_S = 5.0


# ---- what a node shows


def device_of(version: int) -> str:
    return "flannel.1" if version == 4 else "flannel-v6.1"


def shown(node: Node, *argv: str) -> list[str]:
    """The lines of a command without what the kernel numbers; none if it fails for want of a device."""
    try:
        lines = node.lab.run(node.netns, *argv).splitlines()
    except LabError as exc:
        if "annot find device" not in str(exc) and "does not exist" not in str(exc):
            raise
        return []
    return sorted(re.sub(r"^\d+: ", "", line).strip() for line in lines if line.strip())


def overlay(node: Node, version: int) -> dict[str, list[str]]:
    """One family's device and tables as iproute2 shows them, without link-local addresses."""
    device, family = device_of(version), f"-{version}"
    words = {
        "link": ("ip", "-d", "link", "show", device),
        "address": ("ip", family, "-o", "addr", "show", "dev", device, "scope", "global"),
        "routes": ("ip", family, "route", "show", "dev", device),
        "neighbours": ("ip", family, "neigh", "show", "dev", device, "nud", "permanent"),
        "fdb": ("bridge", "fdb", "show", "dev", device),
    }
    return {
        what: [line for line in shown(node, *argv) if "fe80::" not in line] for what, argv in words.items()
    }


def rules(node: Node, version: int, kind: str) -> list[list[str]]:
    """Masquerade and forward rules of one family: the line that leads to them, then theirs, in order."""
    program = "iptables" if version == 4 else "ip6tables"
    if kind == "nftables":
        table = ["ip" if version == 4 else "ip6", f"flannel-ipv{version}"]
        text = node.lab.run(node.netns, "nft", "list", "table", *table)
        chains = re.findall(r"\tchain (\w+) \{\n(.*?)\n\t\}", text, re.DOTALL)
        found = {name: [line.strip() for line in body.split("\n")] for name, body in chains}
        return [found["postrtg"], found["forward"]]

    def lines(table: str, hook: str, chain: str) -> list[str]:
        listing = node.lab.run(node.netns, program, "-t", table, "-S").splitlines()
        jumps = [line for line in listing if line.startswith(f"-A {hook} ") and chain in line]
        return [*jumps, *(line for line in listing if line.startswith(f"-A {chain} "))]

    return [lines("nat", "POSTROUTING", "FLANNEL-POSTRTG"), lines("filter", "FORWARD", "FLANNEL-FWD")]


def expected_rules(version: int, network: Network, subnet: Network, kind: str) -> list[list[str]]:
    """flannel's, to the letter (for nftables as `nft` prints them)."""
    multicast = "224.0.0.0/4" if version == 4 else "ff00::/8"
    if kind == "nftables":
        ip = "ip" if version == 4 else "ip6"
        return [
            [
                'comment "chain to manage traffic masquerading by flannel"',
                "type nat hook postrouting priority srcnat; policy accept;",
                "meta mark 0x00004000 return",
                f"{ip} saddr {subnet} {ip} daddr {network} return",
                f"{ip} saddr {network} {ip} daddr {subnet} return",
                f"{ip} saddr != {subnet} {ip} daddr {network} return",
                f"{ip} saddr {network} {ip} daddr != {multicast} masquerade fully-random",
                f"{ip} saddr != {network} {ip} daddr {network} masquerade fully-random",
            ],
            [
                'comment "chain to accept flannel traffic"',
                "type filter hook forward priority filter; policy accept;",
                f"{ip} saddr {network} accept",
                f"{ip} daddr {network} accept",
            ],
        ]
    masq = '-m comment --comment "flanneld masq" -j'
    chain = "-A FLANNEL-POSTRTG"
    forward = '-m comment --comment "flanneld forward" -j'
    return [
        [
            f"-A POSTROUTING {masq} FLANNEL-POSTRTG",
            f"{chain} -m mark --mark 0x4000/0x4000 {masq} RETURN",
            f"{chain} -s {subnet} -d {network} {masq} RETURN",
            f"{chain} -s {network} -d {subnet} {masq} RETURN",
            f"{chain} ! -s {network} -d {subnet} {masq} RETURN",
            f"{chain} -s {network} ! -d {multicast} {masq} MASQUERADE --random-fully",
            f"{chain} ! -s {network} -d {network} {masq} MASQUERADE --random-fully",
        ],
        [
            f"-A FORWARD {forward} FLANNEL-FWD",
            f"-A FLANNEL-FWD -s {network} {forward} ACCEPT",
            f"-A FLANNEL-FWD -d {network} {forward} ACCEPT",
        ],
    ]


def subnet_of(node: Node, version: int) -> Network:
    return node.subnet if version == 4 else node.subnet6


def key_of(node: Node) -> str:
    """The lease's name, from the subnets that the node has."""
    return "&".join(f"{subnet.network_address}-{subnet.prefixlen}" for subnet in node.subnets)


def subnet_file(node: Node) -> str:
    """What the file must be, given the addresses in it."""
    families = {4: ("", NETWORK), 6: ("IPV6_", NETWORK6)}
    lines = []
    for subnet in node.subnets:
        infix, network = families[subnet.version]
        first_host = f"{subnet.network_address + 1}/{subnet.prefixlen}"
        lines += [f"FLANNEL_{infix}NETWORK={network}", f"FLANNEL_{infix}SUBNET={first_host}"]
    return "\n".join([*lines, "FLANNEL_MTU=1450", "FLANNEL_IPMASQ=true", ""])


def stored(cluster: Cluster) -> dict[str, dict[str, object]]:
    """The store's leases: the value by key."""
    if cluster.store.place.startswith("http"):
        words = ("get", "--prefix", f"{ETCD_PREFIX}/subnets/")
        lines = etcdctl(cluster.lab, *words, endpoint=cluster.store.place).splitlines()
        rows = list(zip(lines[::2], lines[1::2], strict=True))
    else:
        with closing(sqlite3.connect(cluster.store.place)) as db:
            rows = db.execute("SELECT key, attributes FROM lease").fetchall()
    return {key.rpartition("/")[2]: json.loads(value) for key, value in rows}


def configure(cluster: Cluster, network: dict[str, object]) -> None:
    """Change the network configuration, as the operator does."""
    if cluster.store.place.startswith("http"):
        etcdctl(
            cluster.lab,
            "put",
            f"{ETCD_PREFIX}/config",
            json.dumps(network),
            endpoint=cluster.store.place,
        )
    else:
        (cluster.lab.directory / "net-conf.json").write_text(json.dumps(network))


def restart(cluster: Cluster, *nodes: Node) -> None:
    for node in nodes:
        node.stop()
        cluster.start(node)


def address_of(pod: Pod, version: int) -> str:
    return pod.endpoint.address if version == 4 else pod.endpoint.address6


def ping(pod: Pod | Node, *words: str) -> bool:
    """Whether `ping` succeeds from there."""
    try:
        pod_lab(pod).run(pod.netns, "ping", "-nq", *words)
    except LabError as exc:
        if "exit status 1" not in str(exc):
            raise
        return False
    return True


def pod_lab(pod: Pod | Node) -> Lab:
    return pod.node.lab if isinstance(pod, Pod) else pod.lab


def wait_reachable(source: Pod | Node, address: str) -> None:
    """Wait until the address answers, as a fresh IPv6 bridge may take two seconds to do."""
    wait_for(lambda: ping(source, "-c1", "-W1", address), SETTLE_S, f"answer from {address}")


# ---- one cluster of both families, for many looks at it


@dataclass(frozen=True, slots=True)
class Mesh:
    """Three nodes that know each other, and a pod on each of the first two."""

    cluster: Cluster
    rules: str
    near: Pod
    far: Pod

    @property
    def lab(self) -> Lab:
        return self.cluster.lab

    @property
    def nodes(self) -> list[Node]:
        return self.cluster.nodes


WITH_IPTABLES, WITH_NFTABLES = "sqlite and iptables", "etcd over IPv6 and nftables"


@pytest.fixture(scope="module", params=[WITH_IPTABLES, WITH_NFTABLES])
def mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    kind = request.param.rpartition(" ")[2]
    network = {**BOTH, "EnableNFTables": kind == "nftables"}
    # Another prefix than that of the labs of single tests: both exist at once.
    with Lab(tmp_path_factory.mktemp("mesh"), f"pfl{os.getpid()}mesh-") as lab:
        lab.create(3, DUAL)
        if request.param.startswith("etcd"):
            store = etcd_store(lab, network, net.SWITCH6.ip)
        else:
            store = sqlite_store(lab, network)
        cluster = Cluster(lab, store, SOURCE)
        cluster.start()
        plugins = source_plugins(lab)
        near, far = (node.add_pod(f"on-{node.name}", plugins) for node in cluster.nodes[:2])
        wait_reachable(near, far.endpoint.address6)
        yield Mesh(cluster, kind, near, far)


def test_leases_and_subnet_files(mesh: Mesh) -> None:
    assert set(stored(mesh.cluster)) == {key_of(node) for node in mesh.nodes}
    for node in mesh.nodes:
        assert re.fullmatch(r"10\.244\.\d+\.0-24&fd00:10:244:[0-9a-f]+::-64", key_of(node))
        assert node.subnet_file.read_bytes().decode() == subnet_file(node)
        macs = {
            version: shown(node, "cat", f"/sys/class/net/{device_of(version)}/address")[0]
            for version in (4, 6)
        }
        value = stored(mesh.cluster)[key_of(node)]
        assert json.dumps(value, separators=(",", ":")) == (
            f'{{"PublicIP":"{node.address}","PublicIPv6":"{node.address6}","BackendType":"vxlan",'
            f'"BackendData":{{"VNI":1,"VtepMAC":"{macs[4]}"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{macs[6]}"}}}}'
        )


@FAMILIES
def test_the_device_is_upstreams(mesh: Mesh, version: int) -> None:
    """Flannel asks for an MTU of 1450 in IPv6 too; the kernel leaves room for the longer outer header."""
    node = mesh.nodes[0]
    found = overlay(node, version)
    local, mtu = (node.address, 1450) if version == 4 else (node.address6, 1430)
    link = " ".join(found["link"])
    assert (
        f"vxlan id 1 local {local} dev eth0 srcport 0 0 dstport 8472 nolearning ttl auto ageing 300"
        " udpcsum noudp6zerocsumtx noudp6zerocsumrx " in link
    )
    assert f" mtu {mtu} qdisc noqueue " in link
    assert "qlen" not in link
    subnet = subnet_of(node, version)
    assert len(found["address"]) == 1
    assert f" {subnet.network_address}/{subnet.max_prefixlen} scope global " in found["address"][0]
    if version == 6:
        accept_ra = node.lab.run(node.netns, "cat", "/proc/sys/net/ipv6/conf/flannel-v6.1/accept_ra")
        assert accept_ra.strip() == "0"


@FAMILIES
def test_each_peer_has_a_route_a_neighbour_and_an_fdb_entry(mesh: Mesh, version: int) -> None:
    leases = stored(mesh.cluster)
    infix = "" if version == 4 else "V6"
    for node in mesh.nodes:
        routes, neighbours, fdb = [], [], []
        for peer in mesh.nodes:
            if peer is node:
                continue
            subnet = subnet_of(peer, version)
            data = leases[key_of(peer)][f"Backend{infix}Data"]
            assert isinstance(data, dict)
            metric = "" if version == 4 else "metric 1024 "
            routes.append(f"{subnet} via {subnet.network_address} {metric}onlink")
            neighbours.append(f"{subnet.network_address} lladdr {data['VtepMAC']} PERMANENT")
            public_ip = peer.address if version == 4 else peer.address6
            fdb.append(f"{data['VtepMAC']} dst {public_ip} self permanent")
        found = overlay(node, version)
        shown_routes = [line.removesuffix(" pref medium") for line in found["routes"] if " via " in line]
        assert shown_routes == sorted(routes)
        assert (found["neighbours"], found["fdb"]) == (sorted(neighbours), sorted(fdb))


@FAMILIES
def test_the_rules_are_upstreams(mesh: Mesh, version: int) -> None:
    network = NETWORK if version == 4 else NETWORK6
    for node in mesh.nodes:
        expected = expected_rules(version, network, subnet_of(node, version), mesh.rules)
        assert rules(node, version, mesh.rules) == expected


@FAMILIES
def test_pods_and_nodes_reach_pods_of_other_nodes(mesh: Mesh, version: int) -> None:
    for source, target in ((mesh.near, mesh.far), (mesh.far, mesh.near), (mesh.nodes[2], mesh.far)):
        assert ping(source, "-c2", "-i0.02", "-W1", address_of(target, version))


@FAMILIES
def test_pods_keep_their_address_among_pods_and_have_the_nodes_outside(mesh: Mesh, version: int) -> None:
    lab = mesh.lab
    servers = [traffic.answering(lab, netns, 9000 + version, "x") for netns in (lab.outside, mesh.far.netns)]
    for server in servers:
        server.wait_text("listening")
    world, node = {
        4: (net.WORLD, mesh.nodes[0].address),
        6: (net.WORLD6, mesh.nodes[0].address6),
    }[version]
    try:
        assert traffic.ask(lab, mesh.near.netns, str(world), 9000 + version).peer == str(node)
        seen = traffic.ask(lab, mesh.near.netns, address_of(mesh.far, version), 9000 + version).peer
        assert seen == address_of(mesh.near, version)
    finally:
        for server in servers:
            server.end()


@FAMILIES
def test_a_stream_and_packets_of_every_size_pass(mesh: Mesh, version: int) -> None:
    """In IPv6 the tunnel carries 20 bytes less than the pods' MTU: the pod is told, and then fits."""
    source, target = mesh.near, address_of(mesh.far, version)
    assert traffic.transfer(mesh.lab, source, mesh.far, 5_000_000, address=target).size_bytes == 5_000_000
    header = 28 if version == 4 else 48
    path_mtu = 1450 if version == 4 else 1430
    assert ping(source, "-c1", "-W1", "-Mdo", f"-s{path_mtu - header}", target)
    assert ping(source, "-c1", "-W1", "-s4000", target)
    if version == 6:
        # Each end's first large packet is lost, for it is what makes the node tell of the path's MTU.
        assert ping(source, "-c3", "-i0.1", "-W1", f"-s{1450 - header}", target)
        assert "mtu 1430" in mesh.lab.run(source.netns, "ip", "-6", "route", "get", target)
    world = net.WORLD if version == 4 else net.WORLD6
    assert ping(source, "-c1", "-W1", "-Mdo", f"-s{1450 - header}", str(world))


# With nftables it is not so: an accept in one base chain does not overrule the policy of another.
@FAMILIES
@pytest.mark.parametrize("mesh", [WITH_IPTABLES], indirect=True, scope="module")
def test_pods_pass_a_host_that_forwards_nothing_else(mesh: Mesh, version: int) -> None:
    """As on a node where Docker has set the policy."""
    program = "iptables" if version == 4 else "ip6tables"
    node = mesh.nodes[0]
    node.lab.run(node.netns, program, "-P", "FORWARD", "DROP")
    try:
        assert ping(mesh.near, "-c2", "-i0.02", "-W1", address_of(mesh.far, version))
    finally:
        node.lab.run(node.netns, program, "-P", "FORWARD", "ACCEPT")


def test_the_delegate_serves_both_families_and_leaves_nothing(mesh: Mesh) -> None:
    node, lab = mesh.nodes[0], mesh.lab
    plugins = source_plugins(lab)
    runtime = node.runtime(plugins)
    before = node.reservations()
    pod = node.add_pod("both", plugins)
    v4, v6 = pod.endpoint.addresses
    assert set(node.reservations()) == {*before, v4, v6}
    routes = [shown(node, "ip", "-n", pod.netns, f"-{version}", "route") for version in (4, 6)]
    for family, subnet, network in (
        (routes[0], node.subnet, NETWORK),
        (routes[1], node.subnet6, NETWORK6),
    ):
        gateway = subnet.network_address + 1
        assert any(line.startswith(f"default via {gateway} dev eth0") for line in family)
        assert any(line.startswith(f"{network} via {gateway} dev eth0") for line in family)
    assert "mtu 1450" in shown(node, "ip", "-n", pod.netns, "link", "show", "eth0")[0]

    runtime.check(pod.attachment)
    lab.ip(pod.netns, f"addr del {v6}/64 dev eth0")
    with pytest.raises(LabError, match=re.escape(v6)):
        runtime.check(pod.attachment)

    runtime.delete(pod.attachment)
    runtime.delete(pod.attachment)
    assert node.reservations() == before
    assert pod.endpoint.host_veth not in "".join(shown(node, "ip", "link"))


def test_del_without_scratch_file_and_subnet_file_releases_both_addresses(mesh: Mesh) -> None:
    node = mesh.nodes[1]
    plugins = source_plugins(mesh.lab)
    before = node.reservations()
    pod = node.add_pod("lost", plugins)
    assert len(node.reservations()) == len(before) + 2
    for file in (node.directory / "cni-flannel").glob(f"{pod.attachment.container_id}*"):
        file.unlink()
    hidden = node.subnet_file.rename(node.directory / "hidden.env")
    node.runtime(plugins).delete(pod.attachment)
    hidden.rename(node.subnet_file)
    assert node.reservations() == before


@FAMILIES
def test_a_pod_reaches_itself_through_its_nodes_port(mesh: Mesh, version: int) -> None:
    """Hairpin: out of the bridge's port and in by the same one."""
    node, lab = mesh.nodes[1], mesh.lab
    plugins = source_plugins(lab)
    mapping = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}
    pod = node.add_pod(f"hairpin{version}", plugins, mapping)
    server = traffic.answering(lab, pod.netns, 80, "itself")
    server.wait_text("listening")
    where = node.address if version == 4 else node.address6
    try:
        wait_reachable(mesh.near, address_of(pod, version))
        assert traffic.ask(lab, pod.netns, str(where), 8080).name == "itself"
        # And from the outside, to the same port.
        assert traffic.ask(lab, lab.outside, str(where), 8080).name == "itself"
    finally:
        server.end()
        node.runtime(plugins).delete(pod.attachment)


DAMAGE: dict[str, Sequence[str]] = {
    "device deleted": ("link del flannel-v6.1",),
    "both devices deleted": ("link del flannel-v6.1", "link del flannel.1"),
    # A device that goes down, or is too small for IPv6, loses addresses and routes, unlike in IPv4.
    "device down": ("link set flannel-v6.1 down",),
    "MTU too small for IPv6": ("link set flannel-v6.1 mtu 1200",),
    "MAC changed": ("link set flannel-v6.1 address 02:11:22:33:44:55",),
    "addresses flushed": ("addr flush dev flannel-v6.1",),
    "another address": ("addr add fd00:10:244:99::1/64 dev flannel-v6.1",),
    "route deleted": ("route del {route} dev flannel-v6.1",),
    "route replaced": ("route replace {route} via fd00:10:244:77:: dev flannel-v6.1 onlink",),
    "better route": ("route add {route} via fd00:10:244:77:: dev flannel-v6.1 onlink metric 5",),
    "neighbours flushed": ("neigh flush dev flannel-v6.1 nud permanent",),
    "stale entries": (
        "route add fd00:10:244:fa::/64 via fd00:10:244:fa:: dev flannel-v6.1 onlink",
        "neigh add fd00:10:244:fa:: lladdr 02:00:00:00:00:fa dev flannel-v6.1 nud permanent",
    ),
}


def test_whatever_is_damaged_in_ipv6_is_back_within_a_second(mesh: Mesh) -> None:
    node = mesh.nodes[0]
    intact, intact4 = overlay(node, 6), overlay(node, 4)
    mac, _, destination = intact["fdb"][0].split()[:3]

    def damage(lines: Sequence[str]) -> None:
        mesh.lab.ip(node.netns, *(line.format(route=mesh.nodes[1].subnet6) for line in lines))

    took = {}
    for what, lines in DAMAGE.items():
        damage(lines)
        took[what] = repaired(node, intact, what)
    mesh.lab.run(node.netns, "bridge", "fdb", "del", mac, "dev", "flannel-v6.1", "dst", destination)
    took["FDB entry deleted"] = repaired(node, intact, "FDB entry deleted")
    print({what: f"{seconds * 1000:.0f} ms" for what, seconds in took.items()})
    assert max(took.values()) < REPAIR_S, took
    assert overlay(node, 4) == intact4
    assert ping(mesh.near, "-c1", "-W1", mesh.far.endpoint.address6)


def repaired(node: Node, intact: dict[str, list[str]], what: str) -> float:
    """Wait until the IPv6 overlay is as before; how long that took, in seconds."""
    began = time.monotonic()
    wait_for(lambda: overlay(node, 6) == intact, 5.0, f"repair after: {what}", node.log)
    return time.monotonic() - began


# ---- IPv6 alone


def test_ipv6_alone(cluster_of: Clusters) -> None:
    """From the moment of boot, when the kernel still proves that nobody else has the node's address."""
    cluster = cluster_of(2, "sqlite", ONLY6, IPV6, SOURCE)
    lab = cluster.lab
    node = cluster.nodes[0]
    as_at_boot(node)
    cluster.start()
    assert "tentative" in " ".join(addresses(node, "eth0"))
    for each in cluster.nodes:
        assert each.subnet_file.read_text() == subnet_file(each)
        assert not overlay(each, 4)["link"]
        expected = expected_rules(6, NETWORK6, each.subnet6, "iptables")
        assert rules(each, 6, "iptables") == expected
        assert rules(each, 4, "iptables") == [[], []]
    leases = stored(cluster)
    assert set(leases) == {key_of(each) for each in cluster.nodes}
    assert list(leases[key_of(node)]) == ["PublicIP", "PublicIPv6", "BackendType", "BackendV6Data"]
    assert (leases[key_of(node)]["PublicIP"], leases[key_of(node)]["PublicIPv6"]) == ("0.0.0.0", "fd77::11")

    near, far = (each.add_pod(f"on-{each.name}", source_plugins(lab)) for each in cluster.nodes)
    assert near.endpoint.addresses == (near.endpoint.address6,)
    assert near.endpoint.gateway == str(node.subnet6.network_address + 1)
    wait_reachable(near, far.endpoint.address6)
    wait_reachable(far, near.endpoint.address6)
    traffic.answering(lab, lab.outside, 9000, "world").wait_text("listening")
    assert traffic.ask(lab, near.netns, str(net.WORLD6), 9000).peer == str(node.address6)
    assert "tentative" not in " ".join(addresses(node, "eth0"))


def as_at_boot(node: Node) -> None:
    """Give the node its IPv6 address anew, so that it is tentative for some two seconds."""
    lab, netns = node.lab, node.netns
    lab.run(netns, "sysctl", "-qw", "net.ipv6.conf.eth0.dad_transmits=2")
    address = f"{node.address6}/64 dev eth0"
    lab.ip(netns, f"addr del {address}", f"addr add {address}", f"route replace ::/0 via {net.OUTSIDE6}")


def addresses(node: Node, link: str) -> list[str]:
    return shown(node, "ip", "-6", "-o", "addr", "show", "dev", link)


def test_etcd_cannot_hold_ipv6_alone_and_says_so(cluster_of: Clusters) -> None:
    cluster = cluster_of(1, "etcd", ONLY6, DUAL, SOURCE)
    node = cluster.nodes[0]
    node.start(SOURCE, cluster.store)
    node.daemon.popen.wait(10)
    assert node.daemon.popen.returncode == 1
    last = node.log.read_text().splitlines()[-1]
    assert f"{ETCD_PREFIX}/config" in last
    assert "EnableIPv4 is false" in last
    assert "enable IPv4 or use the Kubernetes subnet manager" in last
    assert not node.subnet_file.exists()
    assert not overlay(node, 6)["link"]


# ---- the same subnets again


@pytest.mark.parametrize(
    ("network", "families", "kept"),
    [
        pytest.param(BOTH, DUAL, "subnet.env", id="dual stack, subnet.env"),
        pytest.param(BOTH, DUAL, "state.json", id="dual stack, state.json"),
        pytest.param(ONLY6, IPV6, "subnet.env", id="IPv6 alone, subnet.env"),
        pytest.param(ONLY6, IPV6, "state.json", id="IPv6 alone, state.json"),
    ],
)
def test_a_store_that_lost_everything_moves_no_subnet(
    cluster_of: Clusters, network: dict[str, object], families: Sequence[int], kept: str
) -> None:
    """Either file that the node keeps is enough."""
    cluster = cluster_of(1, "sqlite", network, families, SOURCE)
    node = cluster.nodes[0]
    cluster.start()
    state = node.directory / "state.json"
    wait_for(state.exists, 5.0, str(state), node.log)
    text = node.subnet_file.read_text()
    node.stop()
    for file in Path(cluster.lab.directory).glob("leases.db*"):
        file.unlink()
    (state if kept == "subnet.env" else node.subnet_file).unlink()
    cluster.start()
    assert node.subnet_file.read_text() == text
    assert set(stored(cluster)) == {key_of(node)}


# ---- IPv6 switched on and off, node by node


@pytest.mark.parametrize("store", ["sqlite", "etcd"])
def test_nodes_change_family_one_by_one_while_pods_talk(cluster_of: Clusters, store: str) -> None:
    """Two of three nodes get IPv6 and give it up again; node3 stays as it was, and all work together."""
    cluster = cluster_of(3, store, ONLY4, DUAL, SOURCE)
    lab = cluster.lab
    cluster.start()
    plugins = source_plugins(lab)
    changing, still = cluster.nodes[:2], cluster.nodes[2]
    pods = [node.add_pod(f"on-{node.name}", plugins) for node in cluster.nodes]
    before = {node.name: node.subnet for node in cluster.nodes}
    pinging = [steady_ping(pods[2], pods[0]), steady_ping(pods[0], pods[1])]

    configure(cluster, BOTH)
    for node in changing:
        restart(cluster, node)
        wait_for(lambda: set(stored(cluster)) == keys(cluster), 3.0, "only the new lease", node.log)
        assert "&fd00:10:244:" in key_of(node)
        assert node.subnet_file.read_text() == subnet_file(node)
        assert rules(node, 6, "iptables") == expected_rules(6, NETWORK6, node.subnet6, "iptables")
    cluster.wait_meshed(*cluster.nodes)
    assert len(overlay(changing[0], 6)["fdb"]) == len(overlay(changing[1], 6)["fdb"]) == 1
    assert not overlay(still, 6)["link"]
    assert {node.name: node.subnet for node in cluster.nodes} == before
    fresh = [node.add_pod(f"new-on-{node.name}", plugins) for node in changing]
    wait_reachable(fresh[0], fresh[1].endpoint.address6)

    configure(cluster, ONLY4)
    for node in changing:
        restart(cluster, node)
        wait_for(lambda: set(stored(cluster)) == keys(cluster), 3.0, "only the new lease", node.log)
        assert "&" not in key_of(node)
        assert node.subnet_file.read_text() == subnet_file(node)
        assert rules(node, 6, "iptables") == [[], []]
    cluster.wait_meshed(*cluster.nodes)
    assert {node.name: node.subnet for node in cluster.nodes} == before
    node4 = changing[0].add_pod("old-style", plugins)
    assert node4.endpoint.addresses == (node4.endpoint.address,)
    for source in (*pods[1:], *fresh[1:]):
        assert ping(source, "-c1", "-W1", node4.endpoint.address)
    # What the CNI plugins gave while there was IPv6 they take back.
    for pod in (*fresh, node4):
        pod.node.runtime(plugins).delete(pod.attachment)
        assert not any(":" in address for address in pod.node.reservations())
    for finish in pinging:
        sent, received = finish()
        print(f"store={store} pings sent={sent} received={received}")
        # Peers write the entries of a lease that changes its key anew, in about a millisecond.
        assert sent > 100
        assert received >= sent - 5


def keys(cluster: Cluster) -> set[str]:
    return {key_of(node) for node in cluster.nodes}


def steady_ping(source: Pod, target: Pod) -> Callable[[], tuple[int, int]]:
    """Ping every 10 ms; the returned function ends it: (sent, received)."""
    words = ["ping", "-n", "-i", "0.01", target.endpoint.address]
    process = source.node.lab.spawn(source.netns, f"ping-{source.name}", words)
    process.wait_text("icmp_seq=3 ")

    def finish() -> tuple[int, int]:
        os.kill(process.popen.pid, signal.SIGINT)
        process.popen.wait(5)
        summary = next(x for x in process.log.read_text().splitlines() if "packets transmitted" in x)
        return int(summary.split()[0]), int(summary.split()[3])

    return finish


@pytest.mark.parametrize("gone", [4, 6])
def test_a_family_that_is_switched_off_leaves_nothing(cluster_of: Clusters, gone: int) -> None:
    cluster = cluster_of(1, "sqlite", BOTH, DUAL, SOURCE)
    node = cluster.nodes[0]
    cluster.start()
    kept = {version: overlay(node, version) for version in (4, 6)}
    configure(cluster, ONLY6 if gone == 4 else ONLY4)
    restart(cluster, node)
    stays = 6 if gone == 4 else 4
    assert overlay(node, stays) == kept[stays]
    assert rules(node, gone, "iptables") == [[], []]
    wait_for(lambda: not overlay(node, gone)["link"], 2.0, f"end of {device_of(gone)}", node.log)


# ---- peers that publish what this node cannot use


def lease_text(number: int, **changes: object) -> tuple[str, str]:
    """Key and value of a dual-stack peer's lease in etcd; a change to None leaves the member out."""
    mac = f"02:00:00:00:{number:02x}"
    value: dict[str, object] = {
        "PublicIP": f"192.168.77.{number}",
        "PublicIPv6": f"fd77::{number}",
        "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": f"{mac}:04"},
        "BackendV6Data": {"VNI": 1, "VtepMAC": f"{mac}:06"},
    }
    value |= changes
    members = {name: member for name, member in value.items() if member is not None}
    return f"10.244.{number}.0-24&fd00:10:244:{number}::-64", json.dumps(members, separators=(",", ":"))


PEERS: dict[int, dict[str, object]] = {
    201: {},
    202: {"BackendV6Data": None},
    203: {"BackendV6Data": "rubbish"},
    204: {"BackendV6Data": {"VNI": 1, "VtepMAC": ""}},
    205: {"PublicIPv6": None},
}


def test_peers_of_every_kind_harm_neither_an_ipv4_node_nor_a_dual_stack_one(cluster_of: Clusters) -> None:
    """Where upstream's node without IPv6 ends in a panic: a peer with IPv6 data."""
    cluster = cluster_of(1, "etcd", {**ONLY4, "SubnetMax": "10.244.99.0"}, DUAL, SOURCE)
    node = cluster.nodes[0]
    for number, changes in PEERS.items():
        key, value = lease_text(number, **changes)
        etcdctl(cluster.lab, "put", f"{ETCD_PREFIX}/subnets/{key}", value)
    cluster.start()
    v4 = {f"10.244.{number}.0/24" for number in PEERS}
    wait_for(lambda: routed(node, 4) == v4, 5.0, f"routes to {v4}", node.log)
    assert not overlay(node, 6)["link"]

    configure(cluster, {**BOTH, "SubnetMax": "10.244.99.0"})
    restart(cluster, node)
    wait_for(lambda: routed(node, 6) == {"fd00:10:244:201::/64"}, 5.0, "the one IPv6 route", node.log)
    assert routed(node, 4) == v4
    found = overlay(node, 6)
    assert found["neighbours"] == ["fd00:10:244:201:: lladdr 02:00:00:00:c9:06 PERMANENT"]
    assert found["fdb"] == ["02:00:00:00:c9:06 dst fd77::201 self permanent"]
    node.daemon.require_running()


def test_a_peer_whose_ipv6_subnet_is_of_another_network_keeps_its_ipv4(cluster_of: Clusters) -> None:
    """The operator gives the cluster another IPv6 network, and the nodes follow one by one."""
    cluster = cluster_of(1, "etcd", {**BOTH, "SubnetMax": "10.244.99.0"}, DUAL, SOURCE)
    node = cluster.nodes[0]
    key, value = lease_text(201)
    elsewhere = key.replace("fd00:10:244:", "fd00:99:99:")
    etcdctl(cluster.lab, "put", f"{ETCD_PREFIX}/subnets/{elsewhere}", value)
    cluster.start()
    wait_for(lambda: routed(node, 4) == {"10.244.201.0/24"}, 3.0, "the IPv4 route", node.log)
    assert routed(node, 6) == set()


def routed(node: Node, version: int) -> set[str]:
    """The subnets that the node reaches through its tunnel."""
    return {line.split()[0] for line in overlay(node, version)["routes"] if " via " in line}


# ---- two nodes that choose at the same moment


def test_two_nodes_that_choose_one_subnet_at_once_do_not_both_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In dual stack their keys differ as soon as their other subnets do."""
    config = validate(parse_netconf(json.dumps(BOTH), "test"), "test")
    attrs = Attributes(IPv4Address("192.168.77.11"), IPv6Address("fd77::11"))
    rivals: list[str] = []
    with (
        EtcdServer(tmp_path / "data") as server,
        closing(EtcdManager([server.endpoint], ETCD_PREFIX)) as manager,
    ):
        call = manager._client.call

        def outrun(name: str, request: Any, *args: Any) -> Any:
            """Others take our IPv4 subnet, and then our IPv6 subnet, between our look and our write."""
            if name == "txn" and len(rivals) < 2:
                key = request.success[-2].request_put.key.decode()
                v4, _, v6 = key.rpartition("/")[2].partition("&")
                pair = (v4, "fd00:10:244:fff0::-64") if not rivals else ("10.244.254.0-24", v6)
                rivals.append("&".join(pair))
                server.etcdctl("put", f"{ETCD_PREFIX}/subnets/{rivals[-1]}", lease_text(201)[1])
            return call(name, request, *args)

        monkeypatch.setattr(manager._client, "call", outrun)
        got = manager.acquire(config, attrs, None)
        names = server.etcdctl("get", "--prefix", "--keys-only", ETCD_PREFIX).split()
        assert len(server.etcdctl("lease", "list").splitlines()) == 2  # a heading, and ours
    assert {name.rpartition("/")[2] for name in names} == {got.key, *rivals}
    assert len(rivals) == 2
    for rival in rivals:
        v4, v6 = parse_subnet_key(rival)
        assert got.subnet and got.subnet6 and v6
        assert not (got.subnet.overlaps(v4) or got.subnet6.overlaps(v6))


# ---- which interface and address


def test_the_flags_choose_an_ipv6_address(cluster_of: Clusters) -> None:
    cluster = cluster_of(1, "sqlite", BOTH, DUAL, SOURCE)
    node = cluster.nodes[0]
    v4, v6 = str(node.address), str(node.address6)
    both = f"{v4} and {v6}"
    wanted: list[tuple[dict[str, object], list[str], tuple[str, str] | str]] = [
        (ONLY6, [], (v6, v6)),
        (ONLY6, [f"--iface={v6}"], (v6, v6)),
        (ONLY6, ["--iface=eth0", "--public-ipv6=2001:db8:99::1"], (v6, "2001:db8:99::1")),
        (ONLY6, ["--public-ipv6=2001:db8:99::1"], "a NATed public IP needs --iface as well"),
        (BOTH, [], (both, both)),
        (BOTH, [f"--public-ipv6={v6}"], (both, both)),
        (BOTH, [f"--iface={v4}", "--public-ipv6=2001:db8:99::1"], "is on eth0, --public-ipv6=2001:db8:99::1"),
        (BOTH, ["--iface=eth0", "--public-ipv6=2001:db8:99::1"], (both, f"{v4} and 2001:db8:99::1")),
        (BOTH, [f"--iface={v6}"], "an IPv6 address in dual stack needs --public-ipv6 as well"),
        (BOTH, [f"--iface={v6}", f"--public-ipv6={v6}"], (both, both)),
        (BOTH, [f"--iface-can-reach={net.OUTSIDE6}"], (both, both)),
        (BOTH, ["--iface-regex=^fd77:|^192"], (both, both)),
    ]
    for network, flags, expected in wanted:
        configure(cluster, network)
        assert chosen(node, cluster.store, *flags) == expected, flags
    told = stored(cluster)[key_of(node)]
    assert (told["PublicIP"], told["PublicIPv6"]) == (v4, v6)


def chosen(node: Node, store: Store, *flags: str) -> tuple[str, str] | str:
    """The addresses that a daemon with these flags takes, and those it tells peers; or why it refuses."""
    own = (f"--subnet-file={node.subnet_file}", f"--state-dir={node.directory}", "--cni-socket=")
    argv = [*SOURCE, *own, *store.flags, *flags]
    process = node.lab.spawn(node.netns, "chosen", argv, cwd=REPOSITORY)

    def said() -> str:
        return process.log.read_bytes()[process.begins :].decode()

    wait_for(
        lambda: "Wrote subnet file" in said() or process.popen.poll() is not None, 10.0, "end", process.log
    )
    process.end()
    found = re.search(r"with address (.*), MTU .*; peers are told (.*)", said())
    if found is None:
        refusal = re.search(r"no external interface: (.*?)\. Interfaces here", said())
        assert refusal is not None, said()
        return next((x for x in REFUSALS if x in refusal[1]), refusal[1])
    return found[1], found[2]


REFUSALS = (
    "a NATed public IP needs --iface as well",
    "is on eth0, --public-ipv6=2001:db8:99::1",
    "an IPv6 address in dual stack needs --public-ipv6 as well",
)


@pytest.fixture
def link() -> Iterator[Namespace]:
    """A namespace with eth0, whose other end, `far`, has fd99::dd; addresses are proven in a moment."""
    with namespace() as ns:
        ns.run("ip link add eth0 type veth peer name far")
        for sysctl, value in (("dad_transmits", 1), ("router_solicitation_delay", 0), ("use_tempaddr", 2)):
            ns.sysctl(f"net.ipv6.conf.eth0.{sysctl}", value)
        ns.sysctl("net.ipv6.neigh.eth0.retrans_time_ms", 100)
        ns.run("ip addr add fd99::dd/64 dev far nodad")
        ns.run("ip link set far up")
        ns.run("ip link set eth0 up")
        wait_for(lambda: settled(ns), 5.0, "link-local address")
        yield ns


def settled(ns: Namespace) -> bool:
    """Whether every address of eth0 is proven, or found to be somebody else's."""
    found = ns.run("ip -6 -o addr show dev eth0").splitlines()
    return bool(found) and not any("tentative" in x and "dadfailed" not in x for x in found)


def choice(ns: Namespace) -> str:
    """The IPv6 address chosen on eth0."""

    def look() -> iface.Host:
        with closing(NetlinkKernel()) as kernel:
            return startup.look_at_host(kernel)

    wanted = iface.Wanted(iface=("eth0",), ipv4=False, ipv6=True)
    return str(iface.select(ns.call(look), wanted).address6)


def test_the_address_is_chosen_by_what_the_kernel_says_of_it(link: Namespace) -> None:
    """The kernel lists the newest address first; each step adds one that must, or must not, be preferred."""
    assert choice(link).startswith("fe80::")

    link.run("ip addr add fd99::a/64 dev eth0 valid_lft 3600 preferred_lft 0")
    wait_for(lambda: settled(link), 5.0, "proof of fd99::a")
    assert "deprecated" in link.run("ip -6 addr show dev eth0")
    assert choice(link).startswith("fe80::")

    link.run("ip addr add fd99::b/64 dev eth0 valid_lft 3600 preferred_lft 3600 mngtmpaddr")
    wait_for(lambda: "temporary" in link.run("ip -6 addr show dev eth0"), 5.0, "temporary address")
    wait_for(lambda: settled(link), 5.0, "proof of the temporary address")
    assert choice(link) == "fd99::b"

    link.run("ip addr add fd99::c/64 dev eth0")
    wait_for(lambda: settled(link), 5.0, "proof of fd99::c")
    assert choice(link) == "fd99::c"

    link.run("ip addr add fd99::dd/64 dev eth0")
    wait_for(lambda: "dadfailed" in link.run("ip -6 addr show dev eth0"), 5.0, "detection of a duplicate")
    assert choice(link) == "fd99::c"

    # Two global addresses: the newer, from the first moment on, so that a later start chooses the same.
    link.sysctl("net.ipv6.conf.eth0.dad_transmits", 5)
    link.run("ip addr add fd99::e/64 dev eth0")
    assert "tentative" in link.run("ip -6 addr show dev eth0 to fd99::e")
    assert choice(link) == "fd99::e"
    wait_for(lambda: settled(link), 5.0, "proof of fd99::e")
    assert choice(link) == "fd99::e"


def test_a_link_with_a_duplicate_address_alone_is_refused(link: Namespace) -> None:
    link.sysctl("net.ipv6.conf.eth0.addr_gen_mode", 1)
    link.run("ip -6 addr flush dev eth0")
    link.run("ip addr add fd99::dd/64 dev eth0")
    wait_for(lambda: "dadfailed" in link.run("ip -6 addr show dev eth0"), 5.0, "detection of a duplicate")
    with pytest.raises(
        ConfigError, match=r"eth0 .* has no usable IPv6 address; another host has fd99::dd too"
    ):
        choice(link)


def test_link_local_addresses_alone_carry_the_tunnel(cluster_of: Clusters) -> None:
    cluster = cluster_of(2, "sqlite", BOTH, DUAL, SOURCE)
    for node in cluster.nodes:
        cluster.lab.ip(node.netns, f"addr del {node.address6}/64 dev eth0")
    cluster.start()
    near, far = (node.add_pod(f"on-{node.name}", source_plugins(cluster.lab)) for node in cluster.nodes)
    assert all(str(lease["PublicIPv6"]).startswith("fe80::") for lease in stored(cluster).values())
    wait_reachable(near, far.endpoint.address6)


# ---- probes


@pytest.mark.parametrize("where", ["127.0.0.1", "::1"])
def test_probes_are_answered_in_both_families(cluster_of: Clusters, where: str) -> None:
    """kubelet asks at the node's address, which may be IPv6; upstream's 0.0.0.0 listens on both."""
    cluster = cluster_of(1, "sqlite", BOTH, DUAL, SOURCE)
    node = cluster.nodes[0]
    node.start(SOURCE, cluster.store, "--healthz-port=8081")
    node.wait_written()
    url = f"http://[{where}]:8081/healthz" if ":" in where else f"http://{where}:8081/healthz"
    assert node.lab.run(node.netns, "curl", "-sS", url) == "flanneld is running"
