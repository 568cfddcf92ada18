"""Two bridge plugins, Go's and ours, called in a node as a runtime or flannel calls them.

Go's (Debian's 1.1.1) is the reference: a test that both pass is known to describe bridge, not our idea of it.
What the kernel, the packet filter and the disk hold is read with iproute2, nft, iptables-save and open(2).
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.netns.cni_fixtures import GO_PLUGINS, Namespace, Node, attachment, new_node, wait_for

Document = dict[str, Any]

V4 = [{"subnet": "10.1.17.0/24"}]
V6 = [{"subnet": "fd00:1:0:17::/64"}]
RANGES = {"v4": [V4], "v6": [V6], "dual": [V4, V6]}
ADDRESSES = {"v4": ["10.1.17.2/24"], "v6": ["fd00:1:0:17::2/64"]}
ADDRESSES["dual"] = ADDRESSES["v4"] + ADDRESSES["v6"]
GATEWAYS = {"v4": ["10.1.17.1/24"], "v6": ["fd00:1:0:17::1/64"]}
GATEWAYS["dual"] = GATEWAYS["v4"] + GATEWAYS["v6"]

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
WITH_CHECK = ("0.4.0", "1.0.0", "1.1.0")

# A pod's address, alone or in a rule; chains and comments of a pod.
_OF_PODS = re.compile(
    r"\b10\.1\.17\.[1-9]\d*\b|fd00:1:0:17::[1-9a-f]|CNI-\w+|macspoofchk-[\w-]+|cni-br-iface"
)


class Subject:
    """A bridge plugin: how it is started and the spec versions that it knows."""

    def __init__(self, name: str, versions: tuple[str, ...]) -> None:
        self.name = name
        self.versions = versions

    def __repr__(self) -> str:
        return self.name

    def command(self, root: Path) -> list[str]:
        """The program; `root` is a directory for what that takes."""
        if self.name == "go":
            return [f"{GO_PLUGINS}/bridge"]
        executable = os.environ.get("PFL_CNI_PLUGIN")
        if not executable:
            return [sys.executable, "-m", "cni"]
        # The shim goes by the name that it is called by.
        link = root / "plugins" / "bridge"
        link.parent.mkdir(exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(executable)
        return [str(link)]

    def environment(self) -> dict[str, str]:
        return {} if self.name == "go" else {"FLANNEL_CNI_PLUGIN": "bridge"}


GO = Subject("go", VERSIONS[:-1])
OURS = Subject("ours", VERSIONS)
BOTH = (GO, OURS)
EACH_VERSION = [
    pytest.param(subject, version, id=f"{subject}-{version}")
    for subject in BOTH
    for version in subject.versions
]
EACH_WITH_CHECK = [one for one in EACH_VERSION if one.values[1] in WITH_CHECK]


class Rig:
    """A node and the calls of one plugin in it; `pod` is the namespace of container c1."""

    def __init__(self, node: Node, subject: Subject) -> None:
        self.node = node
        self.host = node.netns
        self.subject = subject
        self.pod = node.namespace()
        # Else an IPv6 address of the bridge is of no use for two seconds, as nobody waits for it.
        for scope in ("all", "default"):
            self.host.run(f"sysctl -qw net.ipv6.conf.{scope}.accept_dad=0")

    def conf(self, family: str = "v4", version: str = "1.0.0", **keys: object) -> Document:
        """A netconf like those that flannel generates; a key given as None is left out."""
        conf = {
            "cniVersion": version,
            "name": "cbr0",
            "type": "bridge",
            "isGateway": True,
            "ipam": self.ipam(RANGES[family]),
            **keys,
        }
        return {key: value for key, value in conf.items() if value is not None}

    def ipam(self, ranges: object, **keys: object) -> Document:
        return {"type": "host-local", "dataDir": f"{self.node.root}/networks", "ranges": ranges, **keys}

    def call(
        self,
        command: str,
        conf: object,
        container: str = "c1",
        *,
        netns: Namespace | str | None = None,
        ifname: str = "eth0",
        args: str = "",
        by: Subject | None = None,
    ) -> Any:
        """The result, the error object, or None. `netns` is the pod unless another one or a path is given."""
        subject = by or self.subject
        where = self.pod if netns is None else netns
        environment = attachment(container, None, ifname)
        environment["CNI_NETNS"] = where if isinstance(where, str) else where.path
        environment.update(subject.environment(), CNI_ARGS=args)
        stdin = conf if isinstance(conf, str) else json.dumps(conf)
        argv = subject.command(self.node.root)
        code, document = self.node.execute(argv, command, environment, stdin)
        assert code == (1 if "code" in (document or {}) else 0), document
        return document

    def printed(self, conf: Document, by: Subject, pod: Namespace) -> str:
        """What an ADD of container c1 prints."""
        environment = {
            "CNI_COMMAND": "ADD",
            "CNI_PATH": GO_PLUGINS,
            **attachment("c1", pod),
            **by.environment(),
        }
        return self.node.output(by.command(self.node.root), environment, json.dumps(conf))

    def add(self, conf: Document, container: str = "c1", **how: Any) -> Document:
        """The result of an ADD that must succeed."""
        result: Document = self.call("ADD", conf, container, **how)
        assert "code" not in result, result
        return result

    def refused(self, command: str, conf: object, container: str = "c1", **how: Any) -> Document:
        """The error object of a call that must fail."""
        error: Document = self.call(command, conf, container, **how)
        assert error and "code" in error, error
        return error

    def delete(self, conf: object, container: str = "c1", **how: Any) -> None:
        """A DEL that must succeed, and say nothing."""
        assert self.call("DEL", conf, container, **how) is None

    def check(self, conf: Document, result: Document, container: str = "c1", **how: Any) -> Any:
        """None, or the error object of a CHECK."""
        return self.call("CHECK", {**conf, "prevResult": result}, container, **how)

    def veth(self) -> str:
        """The host end, if there is one pod only."""
        (name,) = self.node.veths()
        return name

    def link(self, name: str, netns: Namespace | None = None) -> Document:
        (link,) = (netns or self.host).ip(f"-details link show dev {name}")
        return link

    def port(self, name: str) -> Document:
        """What bridge(8) knows of a bridge's port."""
        (port,) = json.loads(self.host.run(f"bridge -json -details link show dev {name}"))
        return dict(port)

    def sysctl(self, name: str, netns: Namespace | None = None) -> str:
        return (netns or self.host).run(f"cat /proc/sys/net/{name}").strip()

    def routes(self, netns: Namespace | None = None) -> list[Document]:
        """Every route that no address brought along: of all tables, both families."""
        where = netns or self.pod
        found = where.ip("-4 -details route show table all") + where.ip("-6 -details route show table all")
        return [one for one in found if one.get("protocol") != "kernel"]

    def firewall(self) -> str:
        return firewall(self.host)

    def traces(self) -> list[str]:
        return traces(self.node)


def firewall(netns: Namespace) -> str:
    """Everything that the packet filter holds, as one text."""
    return "".join(netns.run(one) for one in ("nft -j list ruleset", "iptables-save", "ip6tables-save"))


def traces(node: Node) -> list[str]:
    """What is left of pods in a node: links, reservations, files, rules and elements."""
    found = [f"link {name}" for name in node.veths()]
    found += [f"address {name}" for name in node.reservations()]
    found += [f"file {name}" for name in node.scratch()]
    return found + sorted({f"rule with {mark}" for mark in _OF_PODS.findall(firewall(node.netns))})


@contextmanager
def new_rig(root: Path, subject: Subject) -> Iterator[Rig]:
    """A rig for one test; whatever happens, its namespaces are removed."""
    with new_node(root) as node:
        yield Rig(node, subject)


def masquerades(rig: Rig, address: str) -> bool:
    """Whether the packet filter names the address: in a rule for it, or as an element of a set."""
    return f'"{address}"' in rig.host.run("nft -j list ruleset")


@contextmanager
def outside(rig: Rig) -> Iterator[Namespace]:
    """A machine beyond the node, 192.0.2.2 and 2001:db8::2, that has no route to the pods."""
    machine = rig.node.namespace("out")
    rig.host.run(f"ip link add up0 type veth peer name eth0 netns {machine.name}")
    for netns, device, last in ((rig.host, "up0", 1), (machine, "eth0", 2)):
        netns.run(f"ip address add 192.0.2.{last}/24 dev {device}")
        netns.run(f"ip address add 2001:db8::{last}/64 dev {device} nodad")
        netns.run(f"ip link set {device} up")
    wait_for(lambda: rig.link("up0")["operstate"] == "UP")
    yield machine


def normal_text(text: str, pod: Namespace) -> str:
    """What a plugin printed, without what is random or of one test."""
    text = re.sub(r"veth[0-9a-f]{8}", "VETH", text.replace(pod.path, "NETNS"))
    return re.sub(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", "MAC", text)


def changed(document: Document, path: str, value: object) -> Document:
    """A copy of a document with one value, named as `interfaces.2.mac`, replaced."""
    made = copy.deepcopy(document)
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    at: Any = made
    for key in way:
        at = at[key]
    at[last] = value
    return made


def text_of(error: Document) -> str:
    """The message of an error object that has nothing but the usual code and a message."""
    assert error.keys() == {"code", "msg"} and error["code"] == 999, error
    return str(error["msg"])


def reset(rig: Rig) -> None:
    """Have the next ADD get the first address again."""
    for file in rig.node.store.iterdir():
        file.unlink()
