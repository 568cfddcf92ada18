"""A node with pods, each a network namespace, and a runtime's calls of CNI plugins between them.

The plugin under test is `python -m cni`, or the executable that PFL_CNI_PLUGIN names.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GO_PLUGINS = "/usr/lib/cni"
ROOT = Path(__file__).parents[2]
PREFIX = f"pfl{os.getpid()}"
SUBNET_ENV = (
    "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
)
DUAL_STACK = f"FLANNEL_IPV6_NETWORK=fd00:1::/48\nFLANNEL_IPV6_SUBNET=fd00:1:0:17::1/64\n{SUBNET_ENV}"

FROZEN_PLUGIN = ROOT / "dist" / "cni-bin" / "flannel"

_COUNTER = itertools.count()


def plugin_command() -> list[str]:
    """How the plugin under test is started."""
    executable = os.environ.get("PFL_CNI_PLUGIN")
    return [executable] if executable else [sys.executable, "-m", "cni"]


def wait_for(predicate: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return as soon as `predicate` holds; raises AssertionError when it never does."""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < deadline, f"{predicate} did not hold within {timeout_s} s"
        time.sleep(0.02)


class Namespace:
    """A network namespace with its loopback up."""

    def __init__(self, purpose: str) -> None:
        self.name = f"{PREFIX}-{purpose}{next(_COUNTER)}"
        self.path = f"/run/netns/{self.name}"
        subprocess.run(["ip", "netns", "add", self.name], check=True, timeout=30)
        self.run("ip link set lo up")

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=True, timeout=30)

    def wrap(self, argv: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *argv]

    def run(self, command: str) -> str:
        """The output of a command (split at spaces) that must succeed."""
        return subprocess.run(
            self.wrap(command.split()), capture_output=True, text=True, check=True, timeout=30
        ).stdout

    def succeeds(self, command: str) -> bool:
        done = subprocess.run(self.wrap(command.split()), capture_output=True, check=False, timeout=30)
        return done.returncode == 0

    def ip(self, arguments: str) -> list[dict[str, Any]]:
        """The output of `ip -json`."""
        found: list[dict[str, Any]] = json.loads(self.run(f"ip -json {arguments}") or "[]")
        return found

    def links(self) -> list[str]:
        return sorted(link["ifname"] for link in self.ip("link"))

    def addresses(self, ifname: str) -> list[str]:
        """The global addresses of a link with their prefix lengths."""
        found = [one for link in self.ip(f"address show dev {ifname}") for one in link["addr_info"]]
        return [f"{one['local']}/{one['prefixlen']}" for one in found if one["scope"] == "global"]


class Node:
    """A node's namespace, its files under `root`, and the calls that a runtime makes there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "flannel"
        self.store = root / "networks" / "cbr0"
        self.netns = Namespace("node")
        self._namespaces = [self.netns]
        self.path = GO_PLUGINS
        self.mode = "auto"
        (root / "subnet.env").write_text(SUBNET_ENV)

    def namespace(self, purpose: str = "pod") -> Namespace:
        namespace = Namespace(purpose)
        self._namespaces.append(namespace)
        return namespace

    def forget(self, namespace: Namespace) -> None:
        """Remove a namespace before the node goes."""
        self._namespaces.remove(namespace)
        namespace.remove()

    def close(self) -> None:
        for namespace in reversed(self._namespaces):
            namespace.remove()

    def conf(self, version: str, **extra: object) -> dict[str, object]:
        """flannel's netconf; `delegate` is that of flannel's manifest for Kubernetes."""
        own: dict[str, object] = {} if self.mode == "auto" else {"delegateMode": self.mode}
        return {
            **own,
            "cniVersion": version,
            "name": "cbr0",
            "type": "flannel",
            "subnetFile": f"{self.root}/subnet.env",
            "dataDir": str(self.data),
            "delegate": {"hairpinMode": True, "isDefaultGateway": True},
            "ipam": {"dataDir": f"{self.root}/networks"},
            **extra,
        }

    def run(
        self, argv: list[str], environment: Mapping[str, str], stdin: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a plugin in the node's namespace, with no variable of ours but PATH."""
        done = subprocess.run(
            self.netns.wrap(argv),
            input=stdin,
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def output(self, argv: list[str], environment: Mapping[str, str], stdin: str) -> str:
        """stdout of a plugin that must succeed."""
        done = self.run(argv, environment, stdin)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def execute(
        self, argv: list[str], command: str, environment: Mapping[str, str], stdin: str
    ) -> tuple[int, Any]:
        """Exit status of a plugin, and its stdout, which must be one document or empty."""
        done = self.run(argv, {"CNI_COMMAND": command, "CNI_PATH": self.path, **environment}, stdin)
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def call(
        self,
        command: str,
        container_id: str,
        netns: Namespace | None,
        *,
        ifname: str = "eth0",
        version: str = "1.0.0",
        **extra: object,
    ) -> Any:
        """The result, the error object, or None."""
        environment = attachment(container_id, netns, ifname)
        stdin = json.dumps(self.conf(version, **extra))
        code, document = self.execute(plugin_command(), command, environment, stdin)
        assert code == (1 if "code" in (document or {}) else 0), document
        return document

    def reservations(self) -> dict[str, str]:
        """What host-local holds: address to content."""
        if not self.store.exists():
            return {}
        files = [one for one in self.store.iterdir() if one.name[0].isalnum() and one.name[0] != "l"]
        return {one.name: one.read_bytes().decode() for one in files}

    def scratch(self) -> dict[str, str]:
        if not self.data.exists():
            return {}
        return {one.name: one.read_text() for one in sorted(self.data.iterdir())}

    def veths(self) -> list[str]:
        """The host ends of the pods' links."""
        return [name for name in self.netns.links() if name.startswith("veth")]

    def clean(self) -> bool:
        """Whether no trace of any pod is left."""
        return (self.veths(), self.reservations(), self.scratch()) == ([], {}, {})


def attachment(container_id: str, netns: Namespace | None, ifname: str = "eth0") -> dict[str, str]:
    """The variables of an attachment; without namespace as after its end."""
    path = netns.path if netns is not None else ""
    return {"CNI_CONTAINERID": container_id, "CNI_NETNS": path, "CNI_IFNAME": ifname}


@contextmanager
def new_node(root: Path) -> Iterator[Node]:
    """A node for one test; whatever happens, its namespaces are removed."""
    node = Node(root)
    try:
        yield node
    finally:
        node.close()
        left = [name for name in os.listdir("/run/netns") if name.startswith(f"{PREFIX}-")]
        assert left == []


def pings(netns: Namespace, address: str) -> bool:
    return netns.succeeds(f"ping -c 1 -W 2 {address}")


@contextmanager
def http_server(netns: Namespace, port: int, directory: Path) -> Iterator[None]:
    """A web server in a namespace; accepts connections when the context is entered."""
    argv = [sys.executable, "-m", "http.server", str(port), "--directory", str(directory)]
    server = subprocess.Popen(netns.wrap(argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: f":{port} " in netns.run("ss -Hltn"))
        yield
    finally:
        server.terminate()
        server.wait(timeout=10)
