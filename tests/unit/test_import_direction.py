"""Which module may import which: read from the syntax trees, so that an unused branch counts too."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cni", "flanneld", "launcher")

# Same input, same output: no clock, no environment, no socket, no file, no process, no logging.
PURE = frozenset(
    {
        "cni",
        "cni.errors",
        "cni.handler",
        "cni.ipam.config",
        "cni.ipam.ranges",
        "cni.net",
        "cni.net.entries",
        "cni.net.fake",
        "cni.net.netlink",
        "cni.net.nftexpr",
        "cni.net.nlmsg",
        "cni.net.plan",
        "cni.net.podlinks",
        "cni.net.rtlink",
        "cni.net.ruleset",
        "cni.plugins.bridgeconf",
        "cni.plugins.portmapconf",
        "cni.spec",
        "cni.spec.address",
        "cni.spec.args",
        "cni.spec.digest",
        "cni.spec.gojson",
        "cni.spec.netconf",
        "cni.spec.request",
        "cni.spec.result",
        "cni.spec.version",
        "flanneld",
        "flanneld.backend",
        "flanneld.backend.protocol",
        "flanneld.backend.vxlan",
        "flanneld.config",
        "flanneld.iface",
        "flanneld.lease",
        "flanneld.masquerade",
        "flanneld.overlap",
        "flanneld.subnet.allocate",
        "flanneld.subnet.manager",
        "flanneld.subnet.nodes",
        "flanneld.subnet.proxy",
        "flanneld.table",
        "launcher",
        "launcher.binding",
        "launcher.dhcp",
        "launcher.dhcp.options",
        "launcher.dhcp.packet",
        "launcher.dhcp.server",
        "launcher.discover",
        "launcher.domain",
        "launcher.host",
        "launcher.ipv6",
        "launcher.ipv6.advert",
        "launcher.ipv6.packet",
        "launcher.ipv6.server",
        "launcher.nat",
        "launcher.resolv",
        "launcher.settings",
        "launcher.wire",
    }
)
# What opens sockets, files or processes, reads the clock or the environment, or logs.
IMPURE_LIBRARY = frozenset(
    {
        *("asyncio", "fcntl", "glob", "http", "logging", "multiprocessing", "os", "pathlib", "select"),
        *("selectors", "shutil", "signal", "socket", "socketserver", "sqlite3", "ssl", "subprocess"),
        *("syslog", "tempfile", "time", "urllib"),
    }
)
# The codec takes AF_INET, AF_INET6 and inet_pton from `socket`; it opens none.
ALLOWED = {("cni.net.netlink", "socket"): frozenset({"AF_INET", "AF_INET6", "inet_ntop", "inet_pton"})}
# Each foreign library is imported in these modules and nowhere else.
LIBRARIES: Mapping[str, frozenset[str]] = {
    "pyroute2": frozenset(),
    "netaddr": frozenset(),
    "etcd3": frozenset({"flanneld.subnet.etcd"}),
    "grpc": frozenset({"flanneld.subnet.etcd"}),
    "lightkube": frozenset({"flanneld.subnet.kubeapi"}),
    "httpx2": frozenset({"flanneld.subnet.kubeapi"}),
    "msgspec": frozenset({"flanneld.subnet.kubeapi"}),
    "prometheus_client": frozenset({"flanneld.metrics"}),
    "click": frozenset({"flanneld.ctl", "launcher.__main__"}),
    "yaml": frozenset({"flanneld.ctl", "flanneld.subnet.kubeapi", "launcher.__main__"}),
}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Every name that an import statement or an import call reaches, dotted: `cni.net.kernel.Change`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            argument = node.args[0] if node.args else None
            # A name that is computed could be anything, so it counts as a violation of its own.
            yield str(argument.value) if isinstance(argument, ast.Constant) else "<computed>"


def resolve(target: str, modules: frozenset[str]) -> str:
    """The module of ours that `target` names: the longest part of it that is one."""
    while target not in modules and "." in target:
        target = target.rpartition(".")[0]
    return target


def violations(root: Path) -> list[str]:
    """Every import below `root` that goes the wrong way, as `module -> target: why`."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    modules = frozenset(module_name(path, root) for path in paths)
    found = []
    for path in paths:
        module = module_name(path, root)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for target in imports(tree, module, path.name == "__init__.py"):
            why = refusal(module, target, modules)
            if not why and module in PURE and target.split(".")[0] == "socket":
                used = uses_of(tree, "socket") - ALLOWED.get((module, "socket"), frozenset())
                why = f"a pure module uses {', '.join(sorted(used))}" if used else ""
            if why:
                found.append(f"{module} -> {target}: {why}")
    return found


def uses_of(tree: ast.AST, name: str) -> frozenset[str]:
    """Attributes taken from the module `name`, however it is spelled."""
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == name
        for alias in node.names
    }
    renamed = {
        f"{name} as {alias.asname}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == name and alias.asname
    }
    return frozenset(attributes | imported | renamed)


def refusal(module: str, target: str, modules: frozenset[str]) -> str:
    """Why `module` must not import `target`; empty if it may."""
    own, top = module.split(".")[0], target.split(".")[0]
    if top in ("tests", "packaging", "<computed>"):
        return "product code imports only named modules of its own"
    if top in PACKAGES and top != own and (own == "cni" or top != "cni"):
        return f"{own} must not import {top}"
    if top in LIBRARIES and module not in LIBRARIES[top]:
        return f"{top} belongs to {', '.join(sorted(LIBRARIES[top])) or 'the tests alone'}"
    if module not in PURE:
        return ""
    if top in PACKAGES:
        real = resolve(target, modules)
        return "" if real in PURE else f"a pure module must not import {real}, which is not listed as pure"
    if top in IMPURE_LIBRARY and (module, top) not in ALLOWED:
        return f"a pure module must not import {top}"
    return ""


def test_every_import_goes_the_allowed_way() -> None:
    assert violations(ROOT) == []


def test_the_lists_name_modules_that_exist() -> None:
    modules = {module_name(path, ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert set(PURE) - modules == set()
    assert {module for where in LIBRARIES.values() for module in where} - modules == set()


def plant(root: Path, module: str, source: str) -> None:
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


PLANTED: dict[str, tuple[str, str, str]] = {
    "cni to flanneld": ("cni.handler", "import flanneld.lease", "cni must not import flanneld"),
    "cni to launcher": ("cni.handler", "from launcher import dhcp", "cni must not import launcher"),
    "flanneld to launcher": ("flanneld.daemon", "import launcher", "flanneld must not import launcher"),
    "launcher to flanneld": ("launcher.plan", "from flanneld.lease import Lease", "must not import flanneld"),
    "inside a function": ("cni.errors", "def f():\n    import flanneld", "cni must not import flanneld"),
    "for a type only": ("cni.errors", "if TYPE_CHECKING:\n    import flanneld.lease", "must not import"),
    "by a call": ("cni.errors", "import_module('flanneld')", "cni must not import flanneld"),
    "by a computed name": ("cni.errors", "__import__('flan' + 'neld')", "named modules"),
    "tests": ("flanneld.daemon", "from tests.lab import node", "named modules of its own"),
    "pyroute2": ("cni.net.kernel", "from pyroute2 import IPRoute", "the tests alone"),
    "etcd3": ("flanneld.subnet.sqlite", "import etcd3.etcdrpc as rpc", "belongs to flanneld.subnet.etcd"),
    "grpc": ("flanneld.daemon", "import grpc", "belongs to flanneld.subnet.etcd"),
    "lightkube": ("flanneld.subnet.kube", "import lightkube", "belongs to flanneld.subnet.kubeapi"),
    "prometheus": ("flanneld.reconcile", "import prometheus_client", "belongs to flanneld.metrics"),
    "click": ("flanneld.view", "import click", "belongs to flanneld.ctl"),
    "yaml": ("flanneld.config", "import yaml", "belongs to flanneld.ctl"),
    "pure to a socket": ("flanneld.lease", "import socket", "must not import socket"),
    "pure to a process": ("flanneld.config", "from subprocess import run", "must not import subprocess"),
    "pure to the log": ("flanneld.iface", "import logging", "must not import logging"),
    "pure to IO": ("cni.net.plan", "from cni.net import kernel", "cni.net.kernel, which is not listed"),
    "pure to IO, a name of it": ("flanneld.lease", "from cni.net.kernel import Change", "cni.net.kernel"),
    "pure to IO, relative": ("cni.net.plan", "from . import kernel", "cni.net.kernel"),
    "pure to IO, two up": ("flanneld.backend.vxlan", "from ..log import logger", "flanneld.log"),
    "the codec to a socket": (
        "cni.net.netlink",
        "import socket\nsocket.socket()",
        "a pure module uses socket",
    ),
    "the codec to a renamed socket": ("cni.net.netlink", "import socket as s\ns.socket()", "socket as s"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_the_check_finds_what_is_planted(case: str, tmp_path: Path) -> None:
    module, source, why = PLANTED[case]
    for package in PACKAGES:
        plant(tmp_path, f"{package}.__init__", "")
    plant(tmp_path, "cni.net.kernel", "class Change: ...")
    plant(tmp_path, "flanneld.log", "logger = 1")
    plant(tmp_path, module, source)
    [found] = violations(tmp_path)
    assert found.startswith(f"{module} -> ")
    assert why in found


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    plant(tmp_path, "cni.net.entries", "from typing import NamedTuple")
    plant(tmp_path, "cni.net.netlink", "import socket\nfamily = socket.AF_INET")
    plant(tmp_path, "cni.net.plan", "from .entries import Entry\nfrom cni.net import entries")
    plant(tmp_path, "flanneld.ctl", "import click, yaml\nfrom cni.net.plan import plan")
    plant(tmp_path, "flanneld.subnet.etcd", "import etcd3\nimport grpc")
    plant(tmp_path, "launcher.__init__", "import cni.net.plan")
    assert violations(tmp_path) == []
