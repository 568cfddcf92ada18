"""The portmap plugin with real packets: a client, a node, and pods that Go's bridge plugin attached."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cni.errors import CniError
from cni.local import LocalHost
from cni.net import conntrack, nft, nlsocket
from cni.plugins import portmap
from cni.plugins.portmap import Portmap
from cni.spec.request import Request
from tests.netns import firewall_fixtures
from tests.netns.cni_fixtures import (
    GO_PLUGINS,
    Namespace,
    Node,
    attachment,
    new_node,
    plugin_command,
    wait_for,
)

NODE = {4: "192.0.2.1", 6: "2001:db8:1::1"}
SECOND = {4: "192.0.2.11", 6: "2001:db8:1::11"}
CLIENT = {4: "192.0.2.2", 6: "2001:db8:1::2"}
GATEWAY = {4: "10.1.17.1", 6: "fd00:1:0:17::1"}
SUBNETS = ("10.1.17.0/24", "fd00:1:0:17::/64")
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
TABLES = {4: "ip flannel_hostport", 6: "ip6 flannel_hostport"}
WAIT_S = 3.0

T = TypeVar("T")

Entry = Mapping[str, object]


class Machine:
    """A node with a client beside it; calls of the plugin on it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.client = node.namespace("client")
        name = self.client.name
        node.netns.run(f"ip link add eth0 type veth peer name eth0 netns {name}")
        for where, addresses in ((node.netns, (NODE, SECOND)), (self.client, (CLIENT,))):
            for address in addresses:
                where.run(f"ip address add {address[4]}/24 dev eth0")
                where.run(f"ip address add {address[6]}/64 dev eth0 nodad")
            where.run("ip link set eth0 up")

    def pod(self, name: str, **bridge: object) -> Pod:
        return Pod(self, name, **bridge)

    def call(
        self, command: str, container_id: str, netns: Namespace | None, conf: Mapping[str, object]
    ) -> Any:
        """The plugin under test: its result or error object, or None."""
        environment = {**attachment(container_id, netns), "FLANNEL_CNI_PLUGIN": "portmap"}
        code, document = self.node.execute(plugin_command(), command, environment, json.dumps(conf))
        assert code == (1 if "code" in (document or {}) else 0), document
        return document

    def go(self, plugin: str, command: str, pod: Pod, conf: Mapping[str, object]) -> Any:
        code, document = self.node.execute(
            [f"{GO_PLUGINS}/{plugin}"], command, attachment(pod.id, pod.netns), json.dumps(conf)
        )
        assert code == 0, document
        return document

    def elements(self, family: int = 4) -> dict[str, list[Any]]:
        """What `nft` lists in each set and map of the plugin's table."""
        done = self.node.netns.wrap(["nft", "-j", "list", "table", *TABLES[family].split()])
        listing = json.loads(subprocess.run(done, capture_output=True, check=True, timeout=30).stdout)
        found = [one.get("set") or one.get("map") for one in listing["nftables"]]
        return {one["name"]: one["elem"] for one in found if one and "elem" in one}

    def local(self) -> firewall_fixtures.Namespace:
        return firewall_fixtures.Namespace(self.node.netns.name)


class Pod:
    """A container attached by Go's bridge; `id` is its container ID."""

    def __init__(self, machine: Machine, name: str, **bridge: object) -> None:
        self.machine = machine
        self.id = name
        self.netns = machine.node.namespace(name)
        self.conf: dict[str, object] = {
            "cniVersion": "1.0.0",
            "name": "cbr0",
            "type": "bridge",
            "bridge": "cni0",
            "isDefaultGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": f"{machine.node.root}/networks",
                "ranges": [[{"subnet": subnet}] for subnet in SUBNETS],
            },
            **bridge,
        }
        self.result = machine.go("bridge", "ADD", self, self.conf)
        del self.result["dns"]  # is empty, and left out by newer plugins
        node = machine.node.netns
        wait_for(lambda: "tentative" not in node.run("ip -6 address show dev cni0"))
        found = [one["address"].partition("/")[0] for one in self.result["ips"]]
        self.address = {4: found[0], 6: found[1]}

    def portmap(self, entries: Sequence[Entry], **extra: object) -> dict[str, object]:
        """portmap's netconf for ADD."""
        return {
            "cniVersion": "1.0.0",
            "name": "cbr0",
            "type": "portmap",
            "runtimeConfig": {"portMappings": list(entries)},
            "prevResult": self.result,
            **extra,
        }

    def add(self, *entries: Entry, **extra: object) -> Any:
        return self.machine.call("ADD", self.id, self.netns, self.portmap(entries, **extra))

    def check(self, *entries: Entry, **extra: object) -> Any:
        return self.machine.call("CHECK", self.id, self.netns, self.portmap(entries, **extra))

    def delete(self, **extra: object) -> Any:
        """DEL as after the end of the container: no namespace, no mappings, no prevResult."""
        return self.machine.call("DEL", self.id, None, {"cniVersion": "1.0.0", "name": "cbr0", **extra})

    def detach(self) -> None:
        """The pod's link and address go, and portmap is not told."""
        self.machine.go("bridge", "DEL", self, self.conf)


def entry(host: int, container: int, protocol: str = "tcp", host_ip: str = "") -> dict[str, object]:
    found: dict[str, object] = {"hostPort": host, "containerPort": container, "protocol": protocol}
    return {**found, "hostIP": host_ip} if host_ip else found


def inside(netns: Namespace, make: Callable[[], socket.socket]) -> socket.socket:
    return firewall_fixtures.Namespace(netns.name).call(make)


def open_socket(netns: Namespace, protocol: str, family: int) -> socket.socket:
    made = inside(netns, lambda: socket.socket(FAMILIES[family], KINDS[protocol]))
    made.settimeout(WAIT_S)
    return made


def serve(
    netns: Namespace, port: int, protocol: str = "tcp", family: int = 4, address: str = ""
) -> socket.socket:
    """A server's socket in a namespace, on one or all of its addresses."""
    made = open_socket(netns, protocol, family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == 6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((address or ("0.0.0.0" if family == 4 else "::"), port))
        if protocol == "tcp":
            made.listen()
    except OSError:
        made.close()
        raise
    return made


def seen_from(
    sender: Namespace, address: str, port: int, server: socket.socket, protocol: str = "tcp"
) -> str:
    """The sender's address as the server sees it, after a question and an answer went through."""
    family = 6 if ":" in address else 4
    with open_socket(sender, protocol, family) as client:
        client.connect((address, port))
        return exchange(client, server, protocol)


def exchange(client: socket.socket, server: socket.socket, protocol: str) -> str:
    client.send(b"question")
    if protocol == "tcp":
        connection, peer = server.accept()
        with connection:
            connection.settimeout(WAIT_S)
            assert connection.recv(100) == b"question"
            connection.send(b"answer")
            assert client.recv(100) == b"answer"
    else:
        question, peer = server.recvfrom(100)
        assert question == b"question"
        server.sendto(b"answer", peer)
        assert client.recv(100) == b"answer"
    return str(peer[0])


def is_free(machine: Machine, address: str, port: int) -> bool:
    """Whether what the client sends to a port of the node reaches the node itself."""
    family = 6 if ":" in address else 4
    with serve(machine.node.netns, port, family=family) as server:
        try:
            return seen_from(machine.client, address, port, server) == CLIENT[family]
        except OSError:  # refused by, or lost on the way to, whatever else it leads to
            return False


def flows_to(port: int) -> list[list[str]]:
    """The flows to a port in the thread's namespace, without their timers."""
    lines = Path("/proc/thread-self/net/nf_conntrack").read_text().splitlines()
    return [[word for word in line.split() if "=" in word] for line in lines if f"dport={port}" in line]


def inside_plugin(machine: Machine, function: Callable[[LocalHost], T]) -> T:
    """Call a function of the plugin's in this process, in a thread in the node's namespace."""

    def call() -> T:
        host = LocalHost(lambda _: None, {})
        try:
            return function(host)
        finally:
            for opened in (host._netfilter, host._route):
                if opened is not None:
                    opened.close()

    return machine.local().call(call)


def request(command: str, pod: Pod, *entries: Entry, **extra: object) -> Request:
    environment = {"CNI_COMMAND": command, **attachment(pod.id, pod.netns)}
    return Request(environment, json.dumps(pod.portmap(entries, **extra)).encode())


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with new_node(tmp_path) as node:
        yield Machine(node)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_client_outside_reaches_the_pod_and_is_seen_as_itself(
    machine: Machine, protocol: str, family: int
) -> None:
    pod = machine.pod("c1")
    machine.client.run(f"ip -{family} route add default via {NODE[family]}")
    assert pod.add(entry(8080, 80, protocol)) == pod.result
    with serve(pod.netns, 80, protocol, family) as server:
        assert seen_from(machine.client, NODE[family], 8080, server, protocol) == CLIENT[family]
        assert seen_from(machine.client, SECOND[family], 8080, server, protocol) == CLIENT[family]
    # Only for the node's own addresses: what passes through goes where it wants to.
    with serve(pod.netns, 8080, protocol, family) as server:
        assert seen_from(machine.client, pod.address[family], 8080, server, protocol) == CLIENT[family]


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_node_reaches_the_pod_by_its_own_addresses(machine: Machine, protocol: str) -> None:
    pod = machine.pod("c1")
    pod.add(entry(8080, 80, protocol))
    node = machine.node.netns
    for family in (4, 6):
        with serve(pod.netns, 80, protocol, family) as server:
            assert seen_from(node, NODE[family], 8080, server, protocol) == NODE[family]
            if family == 4:
                assert seen_from(node, "127.0.0.1", 8080, server, protocol) == GATEWAY[4]
    assert node.run("sysctl -n net.ipv4.conf.cni0.route_localnet").strip() == "1"


@pytest.mark.parametrize("masquerade", [False, True])
@pytest.mark.parametrize("family", [4, 6])
def test_pods_of_the_subnet_reach_the_port_as_the_gateway(
    machine: Machine, family: int, masquerade: bool
) -> None:
    """Also beside the bridge plugin's own masquerade, which lets the subnet's packets through unchanged."""
    pod, neighbour = machine.pod("c1", ipMasq=masquerade), machine.pod("c2", ipMasq=masquerade)
    pod.add(entry(8080, 80))
    with serve(pod.netns, 80, family=family) as server:
        assert seen_from(pod.netns, NODE[family], 8080, server) == GATEWAY[family]
        assert seen_from(neighbour.netns, NODE[family], 8080, server) == GATEWAY[family]
        # Not by a forwarded port, so nothing is rewritten.
        address = pod.address[family]
        assert seen_from(neighbour.netns, address, 80, server) == neighbour.address[family]


def test_without_snat_no_source_is_rewritten(machine: Machine) -> None:
    pod, neighbour = machine.pod("c1"), machine.pod("c2")
    pod.add(entry(8080, 80), snat=False)
    # Else the packet filter sees what the bridge passes on, and puts the answers right.
    machine.node.netns.run("sysctl -q -w net.bridge.bridge-nf-call-iptables=0")
    assert machine.node.netns.run("sysctl -n net.ipv4.conf.cni0.route_localnet").strip() == "0"
    with serve(pod.netns, 80) as server:
        machine.client.run(f"ip route add {SUBNETS[0]} via {NODE[4]}")
        assert seen_from(machine.client, NODE[4], 8080, server) == CLIENT[4]
        # The answer goes straight to the neighbour, who never asked that address.
        with open_socket(neighbour.netns, "tcp", 4) as client:
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.connect((NODE[4], 8080))


@pytest.mark.parametrize("bit", [None, 3])
def test_masq_all_hides_every_source(machine: Machine, bit: int | None) -> None:
    pod = machine.pod("c1")
    extra = {} if bit is None else {"markMasqBit": bit}
    pod.add(entry(8080, 80), masqAll=True, **extra)
    for family in (4, 6):
        with serve(pod.netns, 80, family=family) as server:
            assert seen_from(machine.client, NODE[family], 8080, server) == GATEWAY[family]
    with serve(pod.netns, 80) as server:
        assert seen_from(machine.node.netns, "127.0.0.1", 8080, server) == GATEWAY[4]


def test_a_host_ip_restricts_the_port_to_that_address(machine: Machine) -> None:
    one, other, both = machine.pod("c1"), machine.pod("c2"), machine.pod("c3")
    one.add(entry(8080, 80, host_ip=NODE[4]), entry(8081, 80, host_ip=NODE[6]))
    other.add(entry(8080, 80, host_ip=SECOND[4]))
    both.add(entry(8090, 80, host_ip="0.0.0.0"), entry(8091, 80, host_ip="::"))
    with serve(one.netns, 80) as first, serve(other.netns, 80) as second:
        seen_from(machine.client, NODE[4], 8080, first)
        seen_from(machine.client, SECOND[4], 8080, second)
    with serve(one.netns, 80, family=6) as first:
        seen_from(machine.client, NODE[6], 8081, first)
    with serve(both.netns, 80) as third:
        seen_from(machine.client, SECOND[4], 8090, third)
    with serve(both.netns, 80, family=6) as third:
        seen_from(machine.client, SECOND[6], 8091, third)
    assert is_free(machine, SECOND[6], 8081)
    assert is_free(machine, NODE[4], 8081)
    assert is_free(machine, NODE[6], 8090)
    assert is_free(machine, NODE[4], 8091)


def test_an_address_of_its_own_goes_before_all_addresses(machine: Machine) -> None:
    everywhere, here = machine.pod("c1"), machine.pod("c2")
    here.add(entry(8080, 80, host_ip=SECOND[4]))
    everywhere.add(entry(8080, 80))
    with serve(everywhere.netns, 80) as first, serve(here.netns, 80) as second:
        seen_from(machine.client, NODE[4], 8080, first)
        seen_from(machine.client, SECOND[4], 8080, second)


def test_ports_go_when_the_container_goes(machine: Machine) -> None:
    first, second = machine.pod("c1"), machine.pod("c2")
    first.add(entry(8080, 80), entry(8081, 81))
    second.add(entry(8082, 80))
    assert first.delete() is None
    assert first.delete() is None
    assert is_free(machine, NODE[4], 8080)
    assert is_free(machine, NODE[6], 8081)
    with serve(second.netns, 80) as server:
        seen_from(machine.client, NODE[4], 8082, server)
    assert second.delete() is None
    assert machine.elements(4) == machine.elements(6) == {}


def test_the_newest_container_has_a_port_and_leaves_it_to_the_one_before(machine: Machine) -> None:
    pods = [machine.pod(f"c{number}") for number in range(3)]
    for pod in pods:
        pod.add(entry(8080, 80))
    with serve(pods[0].netns, 80) as first, serve(pods[1].netns, 80) as second:
        with serve(pods[2].netns, 80) as third:
            seen_from(machine.client, NODE[4], 8080, third)
        pods[2].delete()
        seen_from(machine.client, NODE[4], 8080, second)
        # One that waits may go as well, and an ADD may be repeated.
        pods[0].delete()
        seen_from(machine.client, NODE[4], 8080, second)
        pods[0].add(entry(8080, 80))
        seen_from(machine.client, NODE[4], 8080, first)
        pods[0].add(entry(8080, 80), entry(8081, 80))
        pods[1].delete()
        seen_from(machine.client, NODE[4], 8081, first)
        seen_from(machine.client, NODE[4], 8080, first)
    pods[0].delete()
    assert machine.elements() == {}


@pytest.mark.parametrize("family", [4, 6])
def test_a_udp_flow_follows_the_port(machine: Machine, family: int) -> None:
    one, other = machine.pod("c1"), machine.pod("c2")
    with (
        serve(one.netns, 53, "udp", family) as first,
        serve(other.netns, 53, "udp", family) as second,
        serve(machine.node.netns, 5353, "udp", family, NODE[family]) as node,
        open_socket(machine.client, "udp", family) as client,
    ):
        client.connect((NODE[family], 5353))
        exchange(client, node, "udp")
        one.add(entry(5353, 53, "udp"))
        exchange(client, first, "udp")
        other.add(entry(5353, 53, "udp", host_ip=NODE[family]))
        exchange(client, second, "udp")
        other.delete()
        exchange(client, first, "udp")
        other.add(entry(5353, 53, "udp"))
        exchange(client, second, "udp")
        other.delete()
        exchange(client, first, "udp")
        one.delete()
        exchange(client, node, "udp")


def test_a_udp_flow_to_another_port_is_left_alone(machine: Machine) -> None:
    one, other = machine.pod("c1"), machine.pod("c2")
    one.add(entry(5353, 53, "udp"))
    with serve(one.netns, 53, "udp") as server, open_socket(machine.client, "udp", 4) as client:
        client.connect((NODE[4], 5353))
        exchange(client, server, "udp")
        before = machine.local().call(lambda: flows_to(5353))
        assert len(before) == 1
        other.add(entry(5354, 53, "udp"))
        one.add(entry(5353, 53, "udp"), entry(8080, 80))
        assert machine.local().call(lambda: flows_to(5353)) == before


def test_sctp_is_forwarded_by_its_number(machine: Machine) -> None:
    """There is no SCTP socket in this kernel, so the packet filter's own listing has to do."""
    pod = machine.pod("c1")
    pod.add(entry(9000, 90, "SCTP"))
    [(key, target)] = machine.elements()["ports"]
    assert key["elem"]["val"] == {"concat": ["sctp", 9000]}
    assert target == {"concat": [pod.address[4], 90]}


# ---- what is stale


@pytest.mark.parametrize("listed", [True, False])
def test_no_port_leads_to_a_container_that_is_gone(machine: Machine, listed: bool) -> None:
    """The runtime forgot portmap's DEL; the address is given to a container that asks for no port.

    Without the host's end of the link in prevResult, the address is all that can tell.
    """
    gone, other = machine.pod("c1"), machine.pod("c2")
    if not listed:
        gone.result["interfaces"][1]["name"] = "veth-unknown"
    gone.add(entry(8080, 80))
    other.add(entry(8081, 80))
    gone.detach()
    (machine.node.root / "networks" / "cbr0" / "last_reserved_ip.0").write_text("10.1.17.1")
    (machine.node.root / "networks" / "cbr0" / "last_reserved_ip.1").write_text("fd00:1:0:17::1")
    heir = machine.pod("c3")
    assert heir.address == gone.address
    assert heir.add() == heir.result
    assert is_free(machine, NODE[4], 8080)
    assert is_free(machine, NODE[6], 8080)
    with serve(other.netns, 80) as server:
        seen_from(machine.client, NODE[4], 8081, server)


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_any_call_drops_ports_of_links_that_are_gone(machine: Machine, command: str) -> None:
    gone, other = machine.pod("c1"), machine.pod("c2")
    gone.add(entry(8080, 80))
    other.add(entry(8081, 80))
    machine.node.forget(gone.netns)
    # The kernel takes its time to remove what was in a namespace.
    wait_for(lambda: gone.result["interfaces"][1]["name"] not in machine.node.netns.links())
    if command == "ADD":
        assert other.add(entry(8081, 80)) == other.result
    else:
        assert other.delete() is None
    assert is_free(machine, NODE[4], 8080)
    assert len(machine.elements().get("ports", [])) == (1 if command == "ADD" else 0)


def test_sweep_drops_what_is_not_live(machine: Machine) -> None:
    one, other = machine.pod("c1"), machine.pod("c2")
    one.add(entry(8080, 80), entry(8081, 80))
    other.add(entry(8082, 80))
    asked: set[str] = set()
    survivor: str = other.result["interfaces"][1]["name"]

    def live(link: str) -> bool:
        asked.add(link)
        return link == survivor

    def sweep() -> int:
        return inside_plugin(machine, lambda host: portmap.sweep(host, live))

    assert sweep() == 4  # two ports, each in both families
    assert asked == {pod.result["interfaces"][1]["name"] for pod in (one, other)}
    assert sweep() == 0
    with serve(other.netns, 80) as server:
        seen_from(machine.client, NODE[4], 8082, server)
    assert is_free(machine, NODE[4], 8080)


def test_gc_drops_attachments_of_its_network_that_are_not_valid(machine: Machine) -> None:
    valid, invalid, foreign = machine.pod("c1"), machine.pod("c2"), machine.pod("c3")
    valid.add(entry(8080, 80))
    invalid.add(entry(8081, 80))
    foreign.add(entry(8082, 80), name="other")
    conf = {"cniVersion": "1.1.0", "name": "cbr0", "type": "portmap"}
    assert machine.call("GC", "", None, conf) is None
    assert len(machine.elements()["ports"]) == 3
    attachments = [{"containerID": "c1", "ifname": "eth0"}]
    assert machine.call("GC", "", None, {**conf, "cni.dev/valid-attachments": attachments}) is None
    assert is_free(machine, NODE[4], 8081)
    with serve(valid.netns, 80) as server:
        seen_from(machine.client, NODE[4], 8080, server)
    with serve(foreign.netns, 80) as server:
        seen_from(machine.client, NODE[4], 8082, server)


def test_a_rule_that_somebody_removed_is_made_anew(machine: Machine) -> None:
    pod, other = machine.pod("c1"), machine.pod("c2")
    pod.add(entry(8080, 80))
    node = machine.node.netns
    damages = ("delete table ip6 flannel_hostport", "flush chain ip flannel_hostport mapped")
    for damage in damages:
        node.run(f"nft {damage}")
        assert pod.check(entry(8080, 80))["code"] == 999
        pod.add(entry(8080, 80))
        assert pod.check(entry(8080, 80)) is None
    # The call of any other container will do, where the claims are still there.
    node.run(f"nft {damages[1]}")
    other.add(entry(8081, 80))
    assert pod.check(entry(8080, 80)) is None
    node.run("nft delete set ip flannel_hostport waiting")
    assert "code" not in other.add(entry(8080, 80))
    other.delete()
    assert pod.check(entry(8080, 80)) is None
    for family in (4, 6):
        with serve(pod.netns, 80, family=family) as server:
            seen_from(machine.client, NODE[family], 8080, server)
    first = node.run("nft -s list ruleset")
    pod.add(entry(8080, 80))
    assert node.run("nft -s list ruleset") == first


def test_what_somebody_else_put_into_the_table_is_left_alone(machine: Machine) -> None:
    pod, other = machine.pod("c1"), machine.pod("c2")
    pod.add(entry(8080, 80))
    script = """
        add element ip flannel_hostport ports { tcp . 9000 : 10.9.9.9 . 90 }
        add element ip flannel_hostport ports { tcp . 9001 comment "a b c  1 -" : 10.9.9.9 . 90 }
        add element ip flannel_hostport ports { tcp . 9002 comment "something" : 10.9.9.9 . 90 }
        add element ip flannel_hostport hairpin_24_13 { 10.9.9.0 . tcp . 90 comment "something" }
        add set ip flannel_hostport hairpin_of_mine { type ipv4_addr; }
        add element ip flannel_hostport hairpin_of_mine { 10.9.9.9 }
        add set ip flannel_hostport mine { type ipv4_addr; }
        add element ip flannel_hostport mine { 10.9.9.9 }
        add chain ip flannel_hostport mine
        add rule ip flannel_hostport mine tcp dport 90 accept
    """
    command = machine.node.netns.wrap(["nft", "-f", "-"])
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False, timeout=30)
    assert done.stderr == ""

    def live(link: str) -> bool:
        assert link == pod.result["interfaces"][1]["name"], "the kernel would refuse another as no name"
        return False

    assert inside_plugin(machine, lambda host: portmap.sweep(host, live)) == 2
    left = {name: len(elements) for name, elements in machine.elements().items()}
    assert left == {"ports": 3, "hairpin_24_13": 1, "hairpin_of_mine": 1, "mine": 1}
    assert "tcp dport 90 accept" in machine.node.netns.run("nft list chain ip flannel_hostport mine")
    # Whoever asks for such a port gets it.
    other.add(entry(9000, 80), entry(9001, 80))
    with serve(other.netns, 80) as server:
        seen_from(machine.client, NODE[4], 9000, server)
        seen_from(machine.client, NODE[4], 9001, server)
    assert other.check(entry(9000, 80), entry(9001, 80)) is None
    before = machine.node.netns.run("nft list ruleset")
    assert other.add(entry(9000, 80), entry(9001, 80)) == other.result
    assert machine.node.netns.run("nft list ruleset") == before


# ---- what is slow, or cannot be


def test_thousands_of_ports(machine: Machine) -> None:
    pod = machine.pod("c1")
    ports = [entry(10000 + number, 80, "udp" if number % 2 else "tcp") for number in range(2000)]
    assert pod.add(*ports) == pod.result
    assert {family: len(machine.elements(family)["ports"]) for family in (4, 6)} == {4: 2000, 6: 2000}
    assert pod.delete() is None
    assert machine.elements() == {}


def test_flows_to_many_ports_are_read_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = machine.pod("c1")
    ports = [entry(5000 + number, 53, "udp") for number in range(20)]
    dumps = []
    dump = nlsocket.NetlinkSocket.dump

    def counted(socket: nlsocket.NetlinkSocket, kind: int, body: bytes) -> list[Any]:
        dumps.append(kind >> 8)
        return dump(socket, kind, body)

    monkeypatch.setattr(nlsocket.NetlinkSocket, "dump", counted)
    inside_plugin(machine, lambda host: Portmap(host).add(request("ADD", pod, *ports)))
    assert dumps.count(conntrack._SUBSYSTEM) == 2, "once for each family"


def test_a_container_without_ports_does_not_read_those_of_others(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod, other = machine.pod("c1"), machine.pod("c2")
    other.add(entry(8080, 80), entry(8081, 80, host_ip=NODE[4]))
    before = machine.elements()
    monkeypatch.setattr(nft, "_decode", None)
    assert inside_plugin(machine, lambda host: Portmap(host).add(request("ADD", pod))) == pod.result
    inside_plugin(machine, lambda host: Portmap(host).delete(request("DEL", pod)))
    assert machine.elements() == before


@pytest.mark.parametrize("changed", [{}, {"hostIP": NODE[4]}])
def test_a_container_that_wants_its_ports_no_more_loses_them(
    machine: Machine, changed: Mapping[str, str]
) -> None:
    pod, other = machine.pod("c1"), machine.pod("c2")
    other.add({**entry(8080, 80), **changed})
    pod.add({**entry(8080, 80), **changed})
    other.add({**entry(8080, 80), **changed})  # and now pod's claim waits
    assert pod.add() == pod.result
    other.delete()
    assert machine.elements() == {}


def test_flows_are_forgotten_though_del_is_killed_at_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as the ports are gone nobody knows any more which flows led to the container."""
    pod = machine.pod("c1")
    pod.add(entry(5353, 53, "udp"))
    with serve(pod.netns, 53, "udp") as server, open_socket(machine.client, "udp", 4) as client:
        client.connect((NODE[4], 5353))
        exchange(client, server, "udp")
    assert len(machine.local().call(lambda: flows_to(5353))) == 1
    commit = nft.Transaction.commit

    def killed(change: nft.Transaction, socket: nlsocket.NetlinkSocket) -> None:
        commit(change, socket)
        if len(change):
            raise KeyboardInterrupt

    monkeypatch.setattr(nft.Transaction, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        inside_plugin(machine, lambda host: Portmap(host).delete(request("DEL", pod)))
    assert machine.elements() == {}
    assert machine.local().call(lambda: flows_to(5353)) == []


@pytest.mark.parametrize("protocol", [nlsocket.ROUTE, 31])
def test_a_kernel_without_nf_tables(machine: Machine, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Route netlink knows nothing of it, and there is no protocol 31."""
    pod = machine.pod("c1")
    monkeypatch.setattr("cni.local.NETFILTER", protocol)

    def call(function: Callable[[Portmap], T]) -> T:
        return inside_plugin(machine, lambda host: function(Portmap(host)))

    assert call(lambda plugin: plugin.add(request("ADD", pod))) == pod.result
    call(lambda plugin: plugin.delete(request("DEL", pod)))
    valid = {"cniVersion": "1.1.0", "cni.dev/valid-attachments": []}
    call(lambda plugin: plugin.gc(request("GC", pod, **valid)))
    assert inside_plugin(machine, lambda host: portmap.sweep(host, lambda _: False)) == 0
    with pytest.raises(CniError, match=r"^port mappings need nf_tables in the kernel: "):
        call(lambda plugin: plugin.add(request("ADD", pod, entry(8080, 80))))


# ---- CHECK, STATUS


def test_check_compares_every_port(machine: Machine) -> None:
    pod, rival = machine.pod("c1"), machine.pod("c2")
    entries = [entry(8080, 80), entry(8081, 81, host_ip=NODE[4]), entry(53, 53, "udp")]
    pod.add(*entries)
    assert pod.check(*entries) is None
    assert pod.check() is None
    assert "differs" in pod.check(entry(8080, 8000))["msg"]
    assert "differs" in pod.check(*entries, snat=False)["msg"]
    assert pod.check(*entries, entry(9999, 9))["msg"] == (
        f"port mapping is missing: tcp port 9999 of * to {pod.address[4]} port 9"
    )
    node = machine.node.netns
    node.run("nft delete element ip flannel_hostport hairpin_24_13 {10.1.17.0 . tcp . 8080}")
    assert "ip flannel_hostport" in pod.check(*entries)["msg"]
    pod.add(*entries)
    assert pod.check(*entries) is None
    rival.add(entry(8080, 80))
    assert "taken over by container c2" in pod.check(*entries)["msg"]
    rival.delete()
    assert pod.check(*entries) is None
    pod.delete()
    assert "missing" in pod.check(*entries)["msg"]
    without = machine.call("CHECK", "c1", pod.netns, {"cniVersion": "1.0.0", "name": "cbr0"})
    assert without["msg"] == "Required prevResult missing"


def test_status(machine: Machine) -> None:
    conf = {"cniVersion": "1.1.0", "name": "cbr0", "type": "portmap"}
    assert machine.call("STATUS", "", None, conf) is None
    assert machine.call("STATUS", "", None, {**conf, "conditionsV4": ["-d", "192.0.2.9"]})["code"] == 7
    environment = {"CNI_COMMAND": "STATUS", "CNI_PATH": "/", "FLANNEL_CNI_PLUGIN": "portmap"}
    done = machine.local().call(
        lambda: subprocess.run(
            plugin_command(),
            input=json.dumps(conf).encode(),
            env={**os.environ, **environment},
            capture_output=True,
            check=False,
            timeout=30,
        ),
        privileged=False,
    )
    assert json.loads(done.stdout)["code"] == 50


def test_conditions_are_refused_where_a_port_is_wanted(machine: Machine) -> None:
    pod = machine.pod("c1")
    conditions = {"conditionsV4": ["!", "-d", "192.0.2.0/24"]}
    assert pod.add(**conditions) == pod.result
    refused = pod.add(entry(8080, 80), **conditions)
    assert (refused["code"], "conditionsV4" in refused["msg"]) == (7, True)
    assert is_free(machine, NODE[4], 8080)
    assert pod.delete(**conditions) is None


# ---- beside upstream's plugin


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0"])
def test_the_result_is_that_of_go(machine: Machine, version: str) -> None:
    pod = machine.pod("c1")
    pod.conf["cniVersion"] = version
    pod.detach()
    pod.result = machine.go("bridge", "ADD", pod, pod.conf)
    conf = json.dumps(pod.portmap([entry(8080, 80)], cniVersion=version))
    environment = {"CNI_COMMAND": "ADD", "CNI_PATH": "/", **attachment("c1", pod.netns)}
    expected = machine.node.output([f"{GO_PLUGINS}/portmap"], environment, conf)
    ours = machine.node.output(plugin_command(), {**environment, "FLANNEL_CNI_PLUGIN": "portmap"}, conf)
    assert ours == expected


def test_del_removes_what_go_added(machine: Machine) -> None:
    pod, other = machine.pod("c1"), machine.pod("c2")
    for one, port in ((pod, 8080), (other, 8081)):
        machine.go("portmap", "ADD", one, one.portmap([entry(port, 80)]))
    assert pod.check(entry(8080, 80)) is None
    assert pod.delete() is None
    node = machine.node.netns
    for program in ("iptables-save", "ip6tables-save"):
        saved = node.run(f"{program} -t nat")
        assert 'id: \\"c1\\"' not in saved
        assert pod.address[4] not in saved
        assert pod.address[6] not in saved
        assert saved.count("-j CNI-DN-") == 1
    assert is_free(machine, NODE[4], 8080)
    with serve(other.netns, 80) as server:
        seen_from(machine.client, NODE[4], 8081, server)
    machine.go("portmap", "DEL", other, other.portmap([entry(8081, 80)]))


def test_del_removes_rules_of_upstreams_nftables_backend(machine: Machine) -> None:
    """Written as upstream documents them; the plugin at hand is older than that backend."""
    pod = machine.pod("c1")
    node = machine.node.netns
    rules = "".join(
        f"""
        table {kind} cni_hostport {{
          chain hostports {{
            tcp dport 8080 dnat to {first} comment "c1"
            tcp dport 8081 dnat to {second} comment "c12"
          }}
          chain hostip_hostports {{ {kind} daddr {address} tcp dport 8082 dnat to {first} comment "c1"; }}
          chain masquerading {{
            type nat hook postrouting priority srcnat;
            {kind} saddr {address} {kind} daddr {address} masquerade comment "c1"
          }}
        }}
        """
        for kind, address, first, second in (
            ("ip", pod.address[4], f"{pod.address[4]}:80", f"{pod.address[4]}:81"),
            ("ip6", pod.address[6], f"[{pod.address[6]}]:80", f"[{pod.address[6]}]:81"),
        )
    )
    subprocess.run(node.wrap(["nft", "-f", "-"]), input=rules, text=True, check=True, timeout=30)
    assert pod.check(entry(8080, 80)) is None
    assert pod.delete() is None
    left = node.run("nft list ruleset")
    assert left.count('comment "c12"') == 2
    assert 'comment "c1"' not in left


def test_what_gos_del_leaves_of_ours_goes_with_the_link(machine: Machine) -> None:
    pod, other = machine.pod("c1"), machine.pod("c2")
    pod.add(entry(8080, 80))
    machine.go("portmap", "DEL", pod, pod.portmap([entry(8080, 80)]))
    with serve(pod.netns, 80) as server:
        seen_from(machine.client, NODE[4], 8080, server)
    pod.detach()
    other.add(entry(8081, 80))
    assert is_free(machine, NODE[4], 8080)
    assert other.delete() is None
    assert machine.elements() == {}


# ---- many at once


def test_calls_at_once_lose_nothing(machine: Machine) -> None:
    pod = machine.pod("c0")
    count = 24

    def call(command: str, number: int) -> Any:
        conf = pod.portmap([entry(9000 + number, 80), entry(8080, 80)])
        address = {"interface": 2, "address": f"10.1.17.{100 + number}/24"}
        conf["prevResult"] = {**pod.result, "ips": [address]}
        return machine.call(command, f"x{number}", pod.netns, conf)

    with ThreadPoolExecutor(count) as pool:
        added = list(pool.map(lambda number: call("ADD", number), range(count)))
        assert all("code" not in one for one in added), added
        elements = machine.elements()
        assert len(elements["ports"]) == count + 1
        assert len(elements["waiting"]) == count - 1
        assert list(pool.map(lambda number: call("DEL", number), range(count))) == [None] * count
    assert machine.elements() == {}
