"""The daemon as built, on nodes of a lab: what it repairs, what it survives, what it leaves alone."""

from __future__ import annotations

import os
import random
import shlex
import signal
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.cluster import Cluster
from tests.lab.net import Lab, LabError, Process, wait_for
from tests.lab.node import CNI_BIN, FROZEN, UPSTREAM_CNI_BIN, Node, etcdctl

Clusters = Callable[..., Cluster]
PLUGINS = (CNI_BIN, UPSTREAM_CNI_BIN)
REPAIR_S = 1.0


def overlay(node: Node) -> dict[str, list[str]]:
    """The node's overlay as iproute2 shows it, without what the kernel numbers anew."""
    lab, netns = node.lab, node.netns
    words = {
        "link": ("ip", "-d", "link", "show", "flannel.1"),
        "address": ("ip", "-4", "-o", "addr", "show", "flannel.1"),
        "routes": ("ip", "route", "show", "dev", "flannel.1"),
        "neighbours": ("ip", "neigh", "show", "dev", "flannel.1", "nud", "permanent"),
        "fdb": ("bridge", "fdb", "show", "dev", "flannel.1"),
    }
    found = {}
    for what, argv in words.items():
        try:
            text = lab.run(netns, *argv)
        except LabError:
            text = ""
        found[what] = sorted(line.partition(": ")[2] or line for line in text.splitlines() if line.strip())
    return found


def batch(node: Node, tool: str, *lines: str) -> None:
    """Run lines of `ip` or `bridge` in one process, faster than the daemon can answer the first."""
    if tool == "ip":
        node.lab.ip(node.netns, *lines)
        return
    for line in lines:
        node.lab.run(node.netns, tool, *line.split())


def while_stopped(node: Node, *lines: str) -> None:
    """Run lines of `ip` while the daemon cannot answer to the first before the last is done."""
    os.kill(node.daemon.popen.pid, signal.SIGSTOP)
    batch(node, "ip", *lines)
    os.kill(node.daemon.popen.pid, signal.SIGCONT)


DAMAGE: dict[str, Callable[[Node], None]] = {
    "device deleted": lambda node: batch(node, "ip", "link del flannel.1"),
    "device down": lambda node: batch(node, "ip", "link set flannel.1 down"),
    "MTU changed": lambda node: batch(node, "ip", "link set flannel.1 mtu 1300"),
    "MAC changed": lambda node: batch(node, "ip", "link set flannel.1 address 02:11:22:33:44:55"),
    "address deleted": lambda node: batch(node, "ip", "addr flush dev flannel.1 scope global"),
    "routes flushed": lambda node: batch(node, "ip", "route flush dev flannel.1"),
    "neighbours flushed": lambda node: batch(node, "ip", "neigh flush dev flannel.1 nud permanent"),
    "FDB flushed": lambda node: batch(
        node,
        "bridge",
        *(f"fdb del {line.split()[0]} dev flannel.1 dst {line.split()[2]}" for line in overlay(node)["fdb"]),
    ),
    "wrong VNI": lambda node: while_stopped(
        node,
        "link del flannel.1",
        "link add flannel.1 type vxlan id 7 dev eth0 dstport 8472 nolearning",
    ),
    "stale entries": lambda node: batch(
        node,
        "ip",
        "route add 10.244.250.0/24 via 10.244.250.0 dev flannel.1 onlink",
        "neigh add 10.244.250.0 lladdr 02:00:00:00:00:fa dev flannel.1 nud permanent",
    ),
}


def test_whatever_is_damaged_is_back_within_a_second(cluster_of: Clusters) -> None:
    cluster = cluster_of(3)
    cluster.start()
    node = cluster.nodes[0]
    intact = overlay(node)
    assert len(intact["routes"]) == len(intact["neighbours"]) == len(intact["fdb"]) == 2
    took = {}
    for what, damage in DAMAGE.items():
        damage(node)
        began = time.monotonic()
        wait_for(lambda: overlay(node) == intact, 5.0, f"repair after: {what}", node.log)
        took[what] = time.monotonic() - began
    print({what: f"{seconds * 1000:.0f} ms" for what, seconds in took.items()})
    assert max(took.values()) < REPAIR_S, took


def test_firewall_and_subnet_file_are_put_back(cluster_of: Clusters) -> None:
    cluster = cluster_of(2)
    cluster.start()
    node = cluster.nodes[0]

    def rules() -> list[str]:
        return [
            line
            for table in ("nat", "filter")
            for line in node.lab.run(node.netns, "iptables", "-t", table, "-S").splitlines()
            if "FLANNEL" in line
        ]

    intact, text = rules(), node.subnet_file.read_text()
    assert any("MASQUERADE --random-fully" in line for line in intact)
    node.lab.run(node.netns, "iptables", "-t", "nat", "-F")
    jump = next(line for line in intact if line.startswith("-A FORWARD"))
    node.lab.run(node.netns, "iptables", *shlex.split(jump.replace("-A", "-D", 1)))
    node.subnet_file.unlink()
    wait_for(lambda: sorted(rules()) == sorted(intact), 5.0, "repair of the firewall", node.log)
    wait_for(node.subnet_file.exists, 5.0, "a new subnet file", node.log)
    assert node.subnet_file.read_text() == text


def steady_ping(cluster: Cluster) -> Callable[[], tuple[int, int]]:
    """Ping between pods of the first two nodes; the returned function ends it: (sent, received)."""
    lab = cluster.lab
    near = cluster.nodes[0].add_pod("near", PLUGINS)
    far = cluster.nodes[1].add_pod("far", PLUGINS)
    process = lab.spawn(near.netns, "ping", ["ping", "-n", "-i", "0.02", far.endpoint.address])
    process.wait_text("icmp_seq=3 ")

    def finish() -> tuple[int, int]:
        os.kill(process.popen.pid, signal.SIGINT)
        process.popen.wait(5)
        summary = next(x for x in process.log.read_text().splitlines() if "packets transmitted" in x)
        sent, received = summary.split()[0], summary.split()[3]
        return int(sent), int(received)

    return finish


@pytest.mark.parametrize("store", ["sqlite", "etcd"])
def test_killed_at_any_moment_it_comes_back_and_pods_keep_talking(cluster_of: Clusters, store: str) -> None:
    cluster = cluster_of(2, store)
    cluster.start()
    node = cluster.nodes[0]
    intact = overlay(node)
    finish = steady_ping(cluster)
    rng = random.Random(20)
    for _ in range(12):
        kill(node)
        node.start(FROZEN, cluster.store)
        # From before the first statement to well after the subnet file: a start takes some 0.3 s.
        delay_s = rng.uniform(0.0, 0.5)
        with pytest.raises(LabError):
            wait_for(lambda: False, delay_s, "the moment to kill")
    kill(node)
    cluster.start(node)
    wait_for(lambda: overlay(node) == intact, 2.0, "the same overlay as before", node.log)
    sent, received = finish()
    print(f"store={store} pings sent={sent} received={received}")
    assert received >= sent - 1  # the last one may be in flight when ping is told to end
    assert sent > 50


def kill(node: Node) -> None:
    """kill -9."""
    node.daemon.popen.kill()
    node.daemon.popen.wait(5)


def forget(cluster: Cluster, key: str) -> None:
    """Take a lease out of the store, as its owner's expiry would."""
    if cluster.store.place.startswith("http"):
        etcdctl(cluster.lab, "del", f"/coreos.com/network/subnets/{key}")
        return
    with sqlite3.connect(cluster.store.place) as db:
        db.execute("DELETE FROM lease WHERE key = ?", (key,))
    db.close()


def key_of(node: Node) -> str:
    return f"{node.subnet.network_address}-{node.subnet.prefixlen}"


@pytest.mark.parametrize("store", ["sqlite", "etcd"])
def test_peers_that_left_while_it_was_down_are_dropped_at_its_start(cluster_of: Clusters, store: str) -> None:
    cluster = cluster_of(3, store)
    cluster.start()
    node, stays, leaves = cluster.nodes
    kill(node)
    leaves.stop()
    forget(cluster, key_of(leaves))
    before = overlay(node)
    assert any(str(leaves.subnet) in line for line in before["routes"])  # the crash took nothing away
    node.start(FROZEN, cluster.store)
    node.wait_subnet()
    gone = str(leaves.subnet)
    wait_for(lambda: not any(gone in line for line in overlay(node)["routes"]), 2.0, "removal", node.log)
    after = overlay(node)
    assert [len(after[what]) for what in ("routes", "neighbours", "fdb")] == [1, 1, 1]
    assert str(stays.subnet) in after["routes"][0]
    assert after["link"] == before["link"]  # the device was adopted, with its MAC


@pytest.mark.parametrize("store", ["sqlite", "etcd"])
def test_a_peer_that_leaves_is_dropped_while_it_runs(cluster_of: Clusters, store: str) -> None:
    cluster = cluster_of(3, store)
    cluster.start()
    leaves = cluster.nodes[2]
    leaves.stop()
    forget(cluster, key_of(leaves))
    for node in cluster.nodes[:2]:
        wait_for(lambda: len(overlay(node)["routes"]) == 1, 2.0, "removal of the peer", node.log)  # noqa: B023


@pytest.mark.parametrize("store", ["sqlite", "etcd"])
def test_own_lease_taken_away_is_written_again(cluster_of: Clusters, store: str) -> None:
    cluster = cluster_of(2, store)
    cluster.start()
    node, other = cluster.nodes
    subnet = node.subnet
    forget(cluster, key_of(node))
    wait_for(lambda: "writing it again" in node.log.read_text(), 3.0, "notice of the loss", node.log)
    wait_for(lambda: str(subnet) in str(overlay(other)["routes"]), 3.0, "the route back", other.log)
    node.daemon.require_running()
    assert node.subnet == subnet


def test_stopping_leaves_the_data_path_and_says_goodbye(cluster_of: Clusters) -> None:
    cluster = cluster_of(2)
    cluster.start()
    node = cluster.nodes[0]
    before, rules = overlay(node), node.lab.run(node.netns, "iptables", "-t", "nat", "-S")
    began = time.monotonic()
    os.kill(node.daemon.popen.pid, signal.SIGTERM)
    assert node.daemon.popen.wait(5) == 0
    assert time.monotonic() - began < 2.0
    assert "Exiting cleanly..." in node.log.read_text()
    assert overlay(node) == before
    assert node.lab.run(node.netns, "iptables", "-t", "nat", "-S") == rules
    assert node.subnet_file.exists()


def test_device_of_a_predecessor_is_adopted_with_its_mac(cluster_of: Clusters) -> None:
    cluster = cluster_of(2)
    node = cluster.nodes[0]
    node.lab.ip(
        node.netns,
        "link add flannel.1 address 02:42:00:00:00:07 mtu 1450 txqueuelen 0 "
        f"type vxlan id 1 local {node.address} dev eth0 dstport 8472 nolearning",
        "link set flannel.1 up",
    )
    index = node.lab.show(node.netns, "ip", "link", "show", "flannel.1")[0]["ifindex"]
    cluster.start()
    link = node.lab.show(node.netns, "ip", "link", "show", "flannel.1")[0]
    assert (link["ifindex"], link["address"]) == (index, "02:42:00:00:00:07")
    assert any("02:42:00:00:00:07" in line for line in overlay(cluster.nodes[1])["fdb"])


def test_mac_outlives_the_device(cluster_of: Clusters) -> None:
    """As after a reboot: no device, but the lease is still in the store."""
    cluster = cluster_of(2)
    cluster.start()
    node = cluster.nodes[0]
    before = overlay(node)
    kill(node)
    node.lab.ip(node.netns, "link del flannel.1")
    cluster.start(node)
    wait_for(lambda: overlay(node) == before, 2.0, "the same overlay", node.log)


def test_store_away_at_start_and_later(cluster_of: Clusters) -> None:
    cluster = cluster_of(2, "etcd")
    etcd = cluster.lab._processes[0]
    assert etcd.child.what == "etcd"
    cluster.start()
    node = cluster.nodes[0]
    finish = steady_ping(cluster)
    kill(node)
    os.kill(etcd.popen.pid, signal.SIGSTOP)
    try:
        node.start(FROZEN, cluster.store)
        wait_for(
            lambda: "Waiting for the store" in tail(node), 15.0, "notice that the store is away", node.log
        )
        assert len(overlay(node)["routes"]) == 1
    finally:
        os.kill(etcd.popen.pid, signal.SIGCONT)
    wait_for(lambda: "flannel is ready" in tail(node), 15.0, "start after the store came back", node.log)
    assert tail(node).count("Waiting for the store") <= 2  # said once per change of state

    os.kill(etcd.popen.pid, signal.SIGKILL)
    etcd.popen.wait(5)
    wait_for(lambda: "The store is away" in tail(node), 15.0, "notice that the store died", node.log)
    # The overlay is still kept in order, without any store.
    batch(node, "ip", "route flush dev flannel.1")
    wait_for(lambda: len(overlay(node)["routes"]) == 1, REPAIR_S, "repair without a store", node.log)
    sent, received = finish()
    print(f"pings while the store was stopped and dead: sent={sent} received={received}")
    # The flushed route may have cost a packet or two until it was back.
    assert received >= sent - 5


def tail(node: Node) -> str:
    """The log since the last start."""
    text = node.log.read_text()
    return text[text.rindex("Starting flanneld") :] if "Starting flanneld" in text else ""


def test_systemd_is_told(lab_of: Callable[[int], Lab], tmp_path: Path) -> None:
    lab = lab_of(1)
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(10)
        argv = ["env", f"NOTIFY_SOCKET={path}", *FROZEN, *own_flags(tmp_path)]
        lab.spawn(lab.netns("node1"), "flanneld", argv)
        assert sock.recv(100) == b"READY=1"
        assert (tmp_path / "subnet.env").exists()


def own_flags(directory: Path) -> list[str]:
    return [
        f"--subnet-file={directory / 'subnet.env'}",
        f"--state-dir={directory / 'state'}",
        f"--net-config-path={directory / 'net-conf.json'}",
        f"--cni-socket={directory / 'cni.sock'}",
    ]


def test_without_any_configuration_it_uses_the_default_network_and_says_so(
    lab_of: Callable[[int], Lab], tmp_path: Path
) -> None:
    lab = lab_of(1)
    process = lab.spawn(lab.netns("node1"), "flanneld", [*FROZEN, *own_flags(tmp_path)])
    process.wait_text("flannel is ready")
    said = process.log.read_text()
    assert f"{tmp_path / 'net-conf.json'} does not exist" in said
    assert "FLANNEL_NETWORK=10.244.0.0/16\n" in (tmp_path / "subnet.env").read_text()
    assert (tmp_path / "state" / "leases.db").exists()
    assert "the default route leaves by it" in said


def run(lab: Lab, *argv: str) -> Process:
    """Run a program on node1 to its end."""
    (lab.directory / "program.log").unlink(missing_ok=True)
    process = lab.spawn(lab.netns("node1"), "program", argv)
    process.popen.wait(20)
    return process


def state_of_node1(lab: Lab) -> list[str]:
    """Links, addresses, routes and firewall of node1."""
    netns = lab.netns("node1")
    words = ("ip -o link", "ip -4 -o addr", "ip route", "iptables-save", "nft list ruleset")
    lines = [line for argv in words for line in lab.run(netns, *argv.split()).splitlines()]
    return [line for line in lines if not line.startswith("#")]


REFUSALS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "network too small": (
        '{"Network": "10.244.0.0/29", "Backend": {"Type": "vxlan"}}',
        [],
        ("net-conf.json", "10.244.0.0/29", "too small"),
    ),
    "network overlaps the underlay": (
        '{"Network": "192.168.0.0/16", "Backend": {"Type": "vxlan"}}',
        [],
        ("192.168.0.0/16", "192.168.77.0/24", "eth0", "choose another Network"),
    ),
    "network overlaps a route of the host": (
        '{"Network": "10.99.0.0/16", "SubnetLen": 24, "SubnetMin": "10.99.1.0", "SubnetMax": "10.99.1.0", '
        '"Backend": {"Type": "vxlan"}}',
        [],
        ("10.99.0.0/16", "10.99.7.0/24", "lo", "ip route del"),
    ),
    "unknown backend": (
        '{"Network": "10.244.0.0/16", "Backend": {"Type": "vlxan"}}',
        [],
        ("'vlxan'", "use vxlan"),
    ),
    "no backend type": ('{"Network": "10.244.0.0/16", "Backend": {}}', [], ("Backend", "use vxlan")),
    "backend of later work": (
        '{"Network": "10.244.0.0/16", "Backend": {"Type": "wireguard"}}',
        [],
        ("wireguard", "not available"),
    ),
    "broken JSON": ('{"Network": "10.244.0.0/16",', [], ("net-conf.json",)),
    "wrong type": ('{"Network": 10}', [], ("net-conf.json", "Network", "10")),
    "VNI out of range": (
        '{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "VNI": 99999999}}',
        [],
        ("VNI", "99999999", "16777215"),
    ),
    "MTU too small": (
        '{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "MTU": 100}}',
        [],
        ("100", "MTU", "68"),
    ),
    "no such interface": ("", ["--iface=nope0"], ("--iface=nope0", "no interface has this name", "eth0")),
    "address of nobody": ("", ["--public-ip=1.2.3.4"], ("--public-ip=1.2.3.4", "--iface")),
    "margin out of range": ("", ["--subnet-lease-renew-margin=1440"], ("1440", "1439")),
    "kubernetes without a node": ("", ["--kube-subnet-mgr"], ("NODE_NAME", "POD_NAME", "POD_NAMESPACE")),
    "half a key pair": (
        "",
        ["--etcd-endpoints=https://127.0.0.1:1", "--etcd-keyfile=/nonexistent"],
        ("--etcd-certfile",),
    ),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """One node with a route that the host needs for itself; refused starts change nothing."""
    with Lab(tmp_path_factory.mktemp("bare") / "lab", f"pfl{os.getpid()}b-") as lab:
        lab.create(1)
        lab.ip(lab.netns("node1"), "route add 10.99.7.0/24 dev lo")
        yield lab


@pytest.mark.parametrize("case", REFUSALS)
def test_a_start_that_cannot_succeed_is_refused_in_one_line(bare: Lab, tmp_path: Path, case: str) -> None:
    netconf, flags, words = REFUSALS[case]
    if netconf:
        (tmp_path / "net-conf.json").write_text(netconf)
    before = state_of_node1(bare)
    process = run(bare, *FROZEN, *own_flags(tmp_path), *flags)
    said = process.log.read_text()
    assert process.popen.returncode == 1, said
    errors = [line for line in said.splitlines() if line.startswith("E")]
    assert len(errors) == 1, said
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in said
    assert state_of_node1(bare) == before
    assert not (tmp_path / "subnet.env").exists()


def last_error(process: Process) -> str:
    return [line for line in process.log.read_text().splitlines() if line.startswith("E")][-1]


def test_port_in_use_is_refused_and_leaves_no_device(bare: Lab, tmp_path: Path) -> None:
    program = """if True:
        import signal, socket
        holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        holder.bind(("", 8472))
        print("held", flush=True)
        signal.pause()
    """
    squatter = bare.spawn(bare.netns("node1"), "squatter", ["/usr/bin/python3", "-c", program])
    squatter.wait_text("held")
    before = state_of_node1(bare)
    process = run(bare, *FROZEN, *own_flags(tmp_path))
    squatter.end()
    assert process.popen.returncode == 1
    assert "UDP port is taken" in last_error(process)
    assert state_of_node1(bare) == before


def test_no_permission_names_the_capability(bare: Lab, tmp_path: Path) -> None:
    before = state_of_node1(bare)
    process = run(
        bare, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", *FROZEN, *own_flags(tmp_path)
    )
    assert process.popen.returncode == 1
    assert "CAP_NET_ADMIN" in last_error(process)
    assert state_of_node1(bare) == before


def test_a_foreign_link_of_that_name_is_not_touched(bare: Lab, tmp_path: Path) -> None:
    bare.ip(bare.netns("node1"), "link add flannel.1 type bridge")
    try:
        before = state_of_node1(bare)
        process = run(bare, *FROZEN, *own_flags(tmp_path))
        assert process.popen.returncode == 1
        assert "not vxlan" in last_error(process)
        assert state_of_node1(bare) == before
    finally:
        bare.ip(bare.netns("node1"), "link del flannel.1")


def test_second_daemon_is_refused_and_names_the_first(cluster_of: Clusters, tmp_path: Path) -> None:
    cluster = cluster_of(2)
    cluster.start()
    node, elsewhere = cluster.nodes
    pid = node.daemon.popen.pid
    # The same subnet file, from another namespace.
    process = cluster.lab.spawn(
        elsewhere.netns, "second-file", [*FROZEN, *own_flags(tmp_path), f"--subnet-file={node.subnet_file}"]
    )
    assert process.popen.wait(10) == 1
    assert f"PID {pid}" in last_error(process)
    assert str(node.subnet_file) in last_error(process)
    # The same device, with a subnet file of its own.
    process = cluster.lab.spawn(node.netns, "second-device", [*FROZEN, *own_flags(tmp_path)])
    assert process.popen.wait(10) == 1
    assert f"PID {pid}" in last_error(process)
    assert "flannel.1" in last_error(process)
    node.daemon.require_running()


def test_version_help_and_mistakes_on_the_command_line(bare: Lab) -> None:
    version = run(bare, *FROZEN, "--version")
    assert (version.popen.returncode, version.log.read_text().splitlines()[-1]) == (0, "0.1.0")
    for flag in ("--help", "--no-such-flag"):
        process = run(bare, *FROZEN, flag)
        assert process.popen.returncode == 0
        assert "Usage: " in process.log.read_text()


def test_variables_stand_in_for_flags(bare: Lab, tmp_path: Path) -> None:
    process = bare.spawn(
        bare.netns("node1"),
        "by-environment",
        [
            "env",
            f"FLANNELD_SUBNET_FILE={tmp_path / 'from-env.env'}",
            "FLANNELD_IFACE=eth0",
            "FLANNELD_IP_MASQ=maybe",
            *FROZEN,
            f"--state-dir={tmp_path / 'state'}",
            f"--net-config-path={tmp_path / 'none'}",
            f"--cni-socket={tmp_path / 'cni.sock'}",
        ],
    )
    process.wait_text("flannel is ready")
    process.end()
    assert "FLANNEL_IPMASQ=false\n" in (tmp_path / "from-env.env").read_text()
    assert 'FLANNELD_IP_MASQ "maybe" is ignored' in process.log.read_text()
    bare.ip(bare.netns("node1"), "link del flannel.1")


def test_nftables_mode(cluster_of: Clusters) -> None:
    network = {"Network": "10.244.0.0/16", "EnableNFTables": True, "Backend": {"Type": "vxlan"}}
    cluster = cluster_of(2, "sqlite", network)
    cluster.start()
    node = cluster.nodes[0]
    chain = node.lab.run(node.netns, "nft", "list", "chain", "ip", "flannel-ipv4", "postrtg")
    assert "masquerade fully-random" in chain
    assert str(node.subnet) in chain
    assert "FLANNEL" not in node.lab.run(node.netns, "iptables-save")


def test_programs_run_without_any_python_on_the_path(lab_of: Callable[[int], Lab], tmp_path: Path) -> None:
    lab = lab_of(1)
    empty = tmp_path / "empty"
    empty.mkdir()
    bare_environment = ["env", "-i", f"PATH={empty}"]
    daemon = lab.spawn(
        lab.netns("node1"), "flanneld", [*bare_environment, *FROZEN, *own_flags(tmp_path), "--ip-masq"]
    )
    daemon.wait_text("flannel is ready")
    ctl = str(Path(FROZEN[0]).with_name("flannelctl"))
    state = f"--state-dir={tmp_path / 'state'}"
    wait_for((tmp_path / "state" / "state.json").exists, 5.0, "the node's state")
    assert "192.168.77.11" in lab.run(lab.netns("node1"), *bare_environment, ctl, "get", "leases", state)


def probe(node: Node, path: str) -> str:
    """Status code and body that the health server of a node gives."""
    return node.lab.run(node.netns, "curl", "-s", "-w", " %{http_code}", f"http://127.0.0.1:8081{path}")


def test_probes_tell_running_from_ready(cluster_of: Clusters) -> None:
    cluster = cluster_of(1, "etcd")
    node = cluster.nodes[0]
    etcd = cluster.lab._processes[0]
    os.kill(etcd.popen.pid, signal.SIGSTOP)
    node.start(FROZEN, cluster.store, "--healthz-port=8081")
    node.daemon.wait_text("Waiting for the store")
    assert probe(node, "/healthz") == "flanneld is running 200"
    answer = probe(node, "/readyz")
    assert answer.startswith("flanneld is not ready yet\nwaiting for the store (reading the network config")
    assert answer.endswith(" 503")
    os.kill(etcd.popen.pid, signal.SIGCONT)
    wait_for(lambda: probe(node, "/readyz") == "flanneld is ready 200", 10.0, "readiness", node.log)
    assert probe(node, "/nothing").endswith("404")


def test_port_of_the_probes_in_use(bare: Lab, tmp_path: Path) -> None:
    process = run(bare, *FROZEN, *own_flags(tmp_path), "--healthz-ip=192.0.2.1", "--healthz-port=8081")
    assert process.popen.returncode == 1
    assert "--healthz-ip=192.0.2.1" in last_error(process)


def test_direct_routing_needs_no_tunnel_where_there_is_no_gateway(cluster_of: Clusters) -> None:
    """Two nodes on one link reach each other directly; with a gateway in between, through the tunnel."""
    network = {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "DirectRouting": True}}
    cluster = cluster_of(2, "sqlite", network)
    cluster.start()
    node, other = cluster.nodes
    near, far = node.add_pod("near", PLUGINS), other.add_pod("far", PLUGINS)

    def route() -> str:
        return node.lab.run(node.netns, "ip", "route", "show", str(other.subnet)).strip()

    assert route().startswith(f"{other.subnet} via {other.address} dev eth0")
    assert overlay(node)["fdb"] == overlay(node)["neighbours"] == []
    node.lab.run(near.netns, "ping", "-n", "-c2", "-i0.1", "-W2", far.endpoint.address)
    node.lab.ip(node.netns, f"route del {other.subnet}")
    wait_for(lambda: "dev eth0" in route(), 2.0, "the direct route back", node.log)
    node.lab.ip(node.netns, f"route add {other.address}/32 via 192.168.77.2")
    wait_for(lambda: "dev flannel.1 onlink" in route(), 5.0, "the tunnel", node.log)
    assert len(overlay(node)["fdb"]) == len(overlay(node)["neighbours"]) == 1
    node.lab.ip(node.netns, f"route del {other.address}/32 via 192.168.77.2")
    wait_for(lambda: "dev eth0" in route(), 5.0, "the direct route", node.log)
    wait_for(lambda: overlay(node)["fdb"] == [], 2.0, "no tunnel any more", node.log)


def test_blackhole_route_beside_the_bridge(cluster_of: Clusters) -> None:
    cluster = cluster_of(2)
    node, other = cluster.nodes
    node.start(FROZEN, cluster.store, "--ip-blackhole-route", "--iptables-resync=1")
    cluster.start(other)
    node.wait_subnet()
    cluster.wait_meshed(node)

    def blackhole() -> str:
        return node.lab.run(node.netns, "ip", "route", "show", "type", "blackhole").strip()

    wait_for(lambda: blackhole().startswith(f"blackhole {node.subnet} "), 5.0, "the route", node.log)
    near, far = node.add_pod("near", PLUGINS), other.add_pod("far", PLUGINS)
    node.lab.run(far.netns, "ping", "-n", "-c2", "-i0.1", "-W2", near.endpoint.address)
    assert blackhole().startswith(f"blackhole {node.subnet} ")
    node.lab.ip(node.netns, f"route flush {node.subnet} type blackhole")
    wait_for(lambda: blackhole().startswith(f"blackhole {node.subnet} "), 2.0, "the repair", node.log)
