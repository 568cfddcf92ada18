"""A real `flanneld` on each node of a lab, the store its leases live in, and its CNI configuration."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

from tests.lab.cni import Attachment, Endpoint, Json, Runtime
from tests.lab.net import SWITCH, Lab, LabError, Process, program, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]

# The daemon as built, and as it runs from the source tree (with REPOSITORY as working directory).
FROZEN = (str(REPOSITORY / "dist" / "bin" / "flanneld"),)
SOURCE = (sys.executable, "-m", "flanneld")

CNI_BIN = REPOSITORY / "dist" / "cni-bin"
UPSTREAM_CNI_BIN = Path("/usr/lib/cni")

ETCD_PREFIX = "/coreos.com/network"
READY_S = 20.0


def source_plugins(lab: Lab) -> tuple[Path, Path]:
    """A CNI path whose `flannel` runs from the source tree, with upstream's plugins behind it."""
    folder = lab.directory / "cni-bin"
    folder.mkdir(exist_ok=True)
    plugin = folder / "flannel"
    plugin.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m cni "$@"\n')
    plugin.chmod(0o755)
    return folder, UPSTREAM_CNI_BIN


@dataclass(frozen=True, slots=True)
class Store:
    """Where leases live: the flags that tell `flanneld`, and a word for the reader."""

    flags: tuple[str, ...]
    place: str


def sqlite_store(lab: Lab, network_config: Mapping[str, object]) -> Store:
    """One SQLite file for all nodes; the network configuration is a file beside it."""
    config = lab.directory / "net-conf.json"
    config.write_text(json.dumps(network_config))
    database = lab.directory / "leases.db"
    return Store((f"--lease-db={database}", f"--net-config-path={config}"), str(database))


def etcd_store(
    lab: Lab, network_config: Mapping[str, object], address: IPv4Address | IPv6Address = SWITCH.ip
) -> Store:
    """Start etcd on this address of the underlay's switch and write the network configuration into it."""
    endpoint, peer = _url(address, 2379), _url(address, 2380)
    process = lab.spawn(
        lab.switch,
        "etcd",
        [
            program("etcd"),
            "--name=lab",
            f"--data-dir={lab.directory / 'etcd'}",
            f"--listen-client-urls={endpoint}",
            f"--advertise-client-urls={endpoint}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=lab={peer}",
        ],
    )
    process.wait_text("ready to serve client requests")
    etcdctl(lab, "put", f"{ETCD_PREFIX}/config", json.dumps(network_config), endpoint=endpoint)
    return Store((f"--etcd-endpoints={endpoint}",), endpoint)


def etcdctl(lab: Lab, *words: str, endpoint: str = "") -> str:
    """Run etcdctl against the lab's etcd, which may have an `endpoint` of its own, and return its stdout."""
    where = f"--endpoints={endpoint or _url(SWITCH.ip, 2379)}"
    return lab.run(lab.switch, "env", "ETCDCTL_API=3", program("etcdctl"), where, *words)


def _url(address: IPv4Address | IPv6Address, port: int) -> str:
    return f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"


@dataclass(frozen=True, slots=True)
class Pod:
    """A namespace that a node's CNI plugins have attached to the network."""

    name: str
    node: Node
    netns: str
    attachment: Attachment
    endpoint: Endpoint


class Node:
    """One node: its namespace, its `flanneld` and the directory that stands for its /run and /var/lib."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab = lab
        self.name = name
        self.netns = lab.netns(name)
        self.address = lab.nodes[name]
        self.address6 = lab.nodes6[name]
        self.directory = lab.directory / name
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self.subnet_file = self.directory / "subnet.env"
        self.cni_socket = self.directory / "cni.sock"
        self.log = lab.directory / f"flanneld-{name}.log"
        self._daemon: Process | None = None
        self._stale: tuple[int, int] | None = None

    @property
    def daemon(self) -> Process:
        """The running daemon; raises LabError before the first `start`."""
        if self._daemon is None:
            raise LabError(f"flanneld was not started on {self.name}")
        return self._daemon

    def start(self, command: Sequence[str], store: Store, *flags: str) -> None:
        """Start `flanneld` (again); `wait_subnet` tells when it is ready."""
        self._stale = self._subnet_file_identity()
        own = (
            f"--subnet-file={self.subnet_file}",
            f"--state-dir={self.directory}",
            f"--cni-socket={self.cni_socket}",
            "--iface=eth0",
            "--ip-masq",
        )
        argv = ["env", f"NODE_NAME={self.name}", *command, *own, *store.flags, *flags]
        self._daemon = self.lab.spawn(self.netns, f"flanneld-{self.name}", argv, cwd=REPOSITORY)

    def stop(self) -> None:
        """Terminate the daemon and wait for its end."""
        self.daemon.end()

    def wait_subnet(self, timeout_s: float = READY_S) -> IPv4Network:
        """Wait until this start of the daemon has written subnet.env; return the node's IPv4 subnet."""
        self.wait_written(timeout_s)
        return self.subnet

    def wait_written(self, timeout_s: float = READY_S) -> None:
        """Wait until this start of the daemon has written subnet.env."""

        def written() -> bool:
            if self._subnet_file_identity() in (None, self._stale):
                self.daemon.require_running()
                return False
            return True

        wait_for(written, timeout_s, f"{self.subnet_file} from flanneld on {self.name}", self.log)

    def wait_routes(self, subnets: Iterable[IPv4Network | IPv6Network], timeout_s: float = READY_S) -> None:
        """Wait until the node's main tables have a route to each of these peers' subnets."""
        wanted = {str(subnet) for subnet in subnets}
        families = ["-6" if ":" in subnet else "-4" for subnet in wanted]

        def routed() -> bool:
            self.daemon.require_running()
            tables = (self.lab.show(self.netns, "ip", family, "route") for family in sorted(set(families)))
            return wanted <= {route["dst"] for table in tables for route in table}

        wait_for(routed, timeout_s, f"routes to {', '.join(sorted(wanted))} on {self.name}", self.log)

    @property
    def environment(self) -> dict[str, str]:
        """The keys and values of subnet.env."""
        lines = self.subnet_file.read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    @property
    def subnet(self) -> IPv4Network:
        """The node's pod subnet, from subnet.env."""
        return IPv4Network(self.environment["FLANNEL_SUBNET"], strict=False)

    @property
    def subnet6(self) -> IPv6Network:
        """The node's IPv6 pod subnet, from subnet.env."""
        return IPv6Network(self.environment["FLANNEL_IPV6_SUBNET"], strict=False)

    @property
    def subnets(self) -> list[IPv4Network | IPv6Network]:
        """The node's pod subnets of every family that subnet.env has, IPv4 first."""
        found: list[IPv4Network | IPv6Network] = []
        if "FLANNEL_SUBNET" in self.environment:
            found.append(self.subnet)
        if "FLANNEL_IPV6_SUBNET" in self.environment:
            found.append(self.subnet6)
        return found

    def conflist(self) -> Json:
        """The stock flannel conflist, with every path inside the node's directory.

        CNI 1.0.0, since older releases of `bridge` that are still shipped stop there.
        """
        flannel: Json = {
            "type": "flannel",
            "subnetFile": str(self.subnet_file),
            "dataDir": str(self.directory / "cni-flannel"),
            "ipam": {"dataDir": str(self.directory / "cni-networks")},
            "delegate": {"hairpinMode": True, "isDefaultGateway": True},
        }
        portmap: Json = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"name": "cbr0", "cniVersion": "1.0.0", "plugins": [flannel, portmap]}

    def runtime(self, cni_path: Sequence[Path]) -> Runtime:
        """A container runtime on this node."""
        cache = self.directory / "cni-cache"
        return Runtime(self.conflist(), cni_path, cache, self.netns, self.cni_socket)

    def add_pod(self, name: str, cni_path: Sequence[Path], *port_mappings: Json) -> Pod:
        """Make a pod and ADD it to the network; each port mapping is {hostPort, containerPort, protocol}."""
        netns = self.lab.add_pod(name)
        attachment = Attachment(
            container_id=netns,
            netns=f"/run/netns/{netns}",
            capability_args={"portMappings": list(port_mappings)} if port_mappings else {},
        )
        result = self.runtime(cni_path).add(attachment)
        return Pod(name, self, netns, attachment, Endpoint.of(result))

    def reservations(self) -> list[str]:
        """The addresses that host-local's store holds now, IPv4 first."""
        store = self.directory / "cni-networks" / "cbr0"
        held = [path.name for path in store.iterdir()] if store.exists() else []
        return sorted(name for name in held if name.count(".") == 3 and name[0].isdigit()) + sorted(
            name for name in held if ":" in name
        )

    def _subnet_file_identity(self) -> tuple[int, int] | None:
        try:
            stat = self.subnet_file.stat()
        except FileNotFoundError:
            return None
        return stat.st_ino, stat.st_mtime_ns
