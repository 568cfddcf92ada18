"""podman as the runtime: containers on flannel networks, in a node that is one network namespace.

podman runs in a mount namespace of its own too, with fresh /run, /dev/shm and /var/lib, so that nothing of
the machine's own podman or CNI state is seen or touched. crun is not used: runc is what starts everywhere.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.cni_fixtures import (
    FROZEN_PLUGIN,
    GO_PLUGINS,
    ROOT,
    Namespace,
    Node,
    new_node,
    pings,
    plugin_command,
    wait_for,
)

BUSYBOX = "/bin/busybox"
FETCH = "curl --silent --max-time 5"
MOUNTS = (
    "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /dev/shm "
    "&& mount -t tmpfs tmpfs /var/lib && mkdir /run/lock && echo ready && exec sleep infinity"
)


class Podman:
    """podman on a node; every command runs in the namespaces that `holder` keeps open."""

    def __init__(self, node: Node, holder: int) -> None:
        self.node = node
        self._prefix = ["nsenter", "--target", str(holder), "--net", "--mount", "podman"]
        self._prefix += ["--root", "/var/lib/containers", "--runroot", "/run/containers"]
        self._prefix += ["--tmpdir", "/run/podman", "--runtime", "runc", "--storage-driver", "vfs"]
        self._environment = {**os.environ, "CONTAINERS_CONF": f"{node.root}/containers.conf"}

    def __call__(self, *arguments: str) -> str:
        """The output of a podman command that must succeed."""
        done = subprocess.run(
            [*self._prefix, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start(self, name: str, *options: str, text: str = "hello") -> None:
        """Run a container that serves `text` on port 80."""
        rootfs = self.node.root / f"rootfs-{name}"
        for directory in ("bin", "proc", "sys", "dev", "etc", "tmp", "www"):
            (rootfs / directory).mkdir(parents=True)
        shutil.copy(BUSYBOX, rootfs / "bin" / "busybox")
        (rootfs / "www" / "index.html").write_text(text)
        limits = ["--ulimit", "nofile=1000:1000", "--ulimit", "nproc=1000:1000"]
        command = ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"]
        self("run", "--detach", "--name", name, *limits, *options, "--rootfs", str(rootfs), *command)

    def address(self, name: str, network: str = "cbr0") -> str:
        networks = json.loads(self("inspect", name))[0]["NetworkSettings"]["Networks"]
        return str(networks[network]["IPAddress"])


def write_configuration(node: Node) -> None:
    """containers.conf, a directory with our plugin, and two flannel networks on bridges of their own."""
    plugins, networks = node.root / "plugins", node.root / "net.d"
    plugins.mkdir()
    networks.mkdir()
    flannel = plugins / "flannel"
    flannel.write_text(f"#!/bin/sh\ncd {ROOT} && exec {shlex.join(plugin_command())}\n")
    flannel.chmod(0o755)
    (node.root / "containers.conf").write_text(
        f'[network]\nnetwork_backend = "cni"\ncni_plugin_dirs = ["{plugins}", "{GO_PLUGINS}"]\n'
        f'network_config_dir = "{networks}"\n'
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
    )
    (node.root / "subnet2.env").write_text((node.root / "subnet.env").read_text().replace("10.1.", "10.2."))
    for name, env, bridge in (("cbr0", "subnet.env", "cni0"), ("cbr1", "subnet2.env", "cni1")):
        delegate = {"isDefaultGateway": name == "cbr0", "bridge": bridge}
        plugin = {**node.conf("1.0.0"), "subnetFile": f"{node.root}/{env}", "delegate": delegate}
        chain = [plugin, {"type": "portmap", "capabilities": {"portMappings": True}}]
        conflist = {"cniVersion": "1.0.0", "name": name, "plugins": chain}
        (networks / f"{name}.conflist").write_text(json.dumps(conflist))


@pytest.fixture
def podman(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Podman]:
    assert FROZEN_PLUGIN.exists(), "run `make build` first"
    monkeypatch.setenv("PFL_CNI_PLUGIN", str(FROZEN_PLUGIN))
    with new_node(tmp_path) as node:
        write_configuration(node)
        holder = subprocess.Popen(
            ["nsenter", f"--net={node.netns.path}", "unshare", "--mount", "sh", "-c", MOUNTS],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
            podman = Podman(node, holder.pid)
            try:
                yield podman
            finally:
                podman("rm", "--force", "--all", "--time", "0")
        finally:
            holder.kill()
            holder.communicate(timeout=10)


def reachable(node: Node, address: str, text: str = "hello") -> bool:
    fetch = f"{FETCH} http://{address}/"
    return pings(node.netns, address) and node.netns.succeeds(fetch) and node.netns.run(fetch) == text


def test_a_container_is_reachable_and_goes_away_cleanly(podman: Podman) -> None:
    node = podman.node
    podman.start("web", "--network", "cbr0")
    assert podman.address("web") == "10.1.17.2"
    assert list(node.reservations()) == ["10.1.17.2"]
    assert len(node.scratch()) == 2
    wait_for(lambda: reachable(node, "10.1.17.2"))
    podman("rm", "--force", "--time", "0", "web")
    assert node.clean()


def test_a_container_that_dies_is_cleaned_up_and_can_start_again(podman: Podman) -> None:
    node = podman.node
    podman.start("web", "--network", "cbr0")
    podman("kill", "--signal", "KILL", "web")
    wait_for(node.clean, timeout_s=30)
    podman("start", "web")
    wait_for(lambda: reachable(node, podman.address("web")))


def test_two_networks_of_one_container_are_kept_apart(podman: Podman) -> None:
    node = podman.node
    podman.start("web", "--network", "cbr0", "--network", "cbr1")
    assert (podman.address("web"), podman.address("web", "cbr1")) == ("10.1.17.2", "10.2.17.2")
    assert len(node.scratch()) == 3 and len(node.veths()) == 2
    wait_for(lambda: reachable(node, "10.1.17.2") and reachable(node, "10.2.17.2"))
    podman("network", "disconnect", "cbr1", "web")
    assert len(node.scratch()) == 2 and len(node.veths()) == 1
    assert reachable(node, "10.1.17.2")
    podman("rm", "--force", "--time", "0", "web")
    assert node.clean()
    assert [one.name for one in (node.root / "networks" / "cbr1").iterdir() if one.name[0] == "1"] == []


def test_a_published_port_leads_from_outside_to_the_container(podman: Podman) -> None:
    """outside 192.0.2.2 ---- 192.0.2.1 node, port 8080 ---- container 10.1.17.2, port 80"""
    node = podman.node
    outside: Namespace = node.namespace("outside")
    node.netns.run(f"ip link add out0 type veth peer name eth0 netns {outside.name}")
    for netns, link, address in ((node.netns, "out0", "192.0.2.1/24"), (outside, "eth0", "192.0.2.2/24")):
        netns.run(f"ip address add {address} dev {link}")
        netns.run(f"ip link set {link} up")
    podman.start("web", "--network", "cbr0", "--publish", "8080:80", text="published")
    wait_for(lambda: reachable(node, "10.1.17.2", "published"))
    assert outside.run(f"{FETCH} http://192.0.2.1:8080/") == "published"
    podman("rm", "--force", "--time", "0", "web")
    assert not outside.succeeds(f"{FETCH} http://192.0.2.1:8080/")
    assert node.clean()
