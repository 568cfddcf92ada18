"""What a kubelet and its runtime do with the pod of a DaemonSet, small: volumes, environment, containers.

Decision: runc with a configuration made here from the manifest. A container has the mounts of its manifest
and the capabilities that its manifest adds, and not one more: a cluster's runtime adds a dozen of its own, so
what works here works there. As everywhere without `privileged`, /proc/sys is read-only; no process gains
privileges.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tests.lab.net import Process, child_of, program

Json = dict[str, Any]

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
COMMAND_S = 60.0

# What containerd and CRI-O give every container.
_PROC_HIDDEN = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"]
_PROC_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_FILE_SYSTEMS: list[Json] = [
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev"]},
    {
        "destination": "/sys",
        "type": "sysfs",
        "source": "sysfs",
        "options": ["nosuid", "noexec", "nodev", "ro"],
    },
]


class ContainerError(Exception):
    """A container ended with a failure; the message holds what it wrote."""


def read_manifest(path: Path) -> dict[str, Json]:
    """The objects of a manifest by their kind; each kind must come once."""
    objects = [one for one in yaml.safe_load_all(path.read_text()) if one]
    kinds = {str(one["kind"]): one for one in objects}
    assert len(kinds) == len(objects), "two objects of one kind"
    return kinds


def unpack(archive: Path, rootfs: Path) -> Json:
    """Unpack an OCI archive with one image into `rootfs`, layer by layer; return the image's `config`."""
    with tarfile.open(archive) as blobs:

        def blob(digest: str) -> bytes:
            member = blobs.extractfile(f"blobs/{digest.replace(':', '/')}")
            assert member is not None, digest
            return member.read()

        index = blobs.extractfile("index.json")
        assert index is not None
        (only,) = json.load(index)["manifests"]
        manifest = json.loads(blob(only["digest"]))
        rootfs.mkdir()
        for layer in manifest["layers"]:
            _apply(gzip.decompress(blob(layer["digest"])), rootfs)
        config: Json = json.loads(blob(manifest["config"]["digest"]))["config"]
        return config


def _apply(layer: bytes, rootfs: Path) -> None:
    """OCI image specification, "Applying Changesets"; of the whiteouts only those of one file."""
    listing = subprocess.run(
        ["tar", "--list"], input=layer, capture_output=True, check=True, timeout=COMMAND_S
    )
    for name in map(PurePosixPath, listing.stdout.decode().splitlines()):
        if name.name.startswith(".wh."):
            assert name.name != ".wh..wh..opq", "an opaque whiteout is not expected here"
            gone = rootfs / name.with_name(name.name.removeprefix(".wh."))
            shutil.rmtree(gone) if gone.is_dir() and not gone.is_symlink() else gone.unlink()
    subprocess.run(
        ["tar", "--extract", "--exclude=.wh.*", f"--directory={rootfs}"],
        input=layer,
        check=True,
        timeout=COMMAND_S,
    )


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a kubelet knows beside the node: ConfigMaps by name; every pod's variables and account folder."""

    config_maps: Mapping[str, Mapping[str, str]]
    environment: Mapping[str, str]
    service_account: Path


class Kubelet:
    """Runs the pod of a DaemonSet on one node.

    `netns` is the node's network namespace, `host` the folder that stands for its root file system, `rootfs`
    an unpacked image, which all containers of the node share, and `image` that image's configuration.
    """

    def __init__(
        self, node: str, netns: str, host: Path, rootfs: Path, image: Json, pod_spec: Json, cluster: Cluster
    ) -> None:
        self.node = node
        self.netns = netns
        self.host = host
        self.rootfs = rootfs
        self.image = image
        self.spec = pod_spec
        self.cluster = cluster
        self._bundles = host.parent / f"{host.name}.pod"
        self._bundles.mkdir()
        self._runc = [program("runc"), "--root", str(self._bundles / "runc")]
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def run_init_containers(self) -> None:
        """Run the init containers, each to its end, in their order; raises ContainerError if one fails."""
        for container in self.spec["initContainers"]:
            self.run(container)

    def run(self, container: Json) -> str:
        """Run one container to its end and return what it wrote; raises ContainerError."""
        name = self._bundle(container)
        done = subprocess.run(
            [*self._runc, "run", "--bundle", str(self._bundles / name), name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=COMMAND_S,
        )
        if done.returncode:
            raise ContainerError(f"{container['name']} ended with status {done.returncode}: {done.stdout}")
        return done.stdout

    def start(self, container: Json) -> Process:
        """Start a container that stays; `close` ends it if nobody did."""
        name = self._bundle(container)
        log = self._bundles / f"{name}.log"
        argv = [*self._runc, "run", "--bundle", str(self._bundles / name), name]
        with log.open("ab") as out:
            popen = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            self._started[name] = popen
        return Process(popen, log, child_of(popen.pid, f"{container['name']} on {self.node}"))

    def pid(self) -> int:
        """The process of the container that was started last, as the host counts."""
        state = [*self._runc, "state", list(self._started)[-1]]
        said = subprocess.run(state, capture_output=True, text=True, check=True, timeout=30)
        return int(json.loads(said.stdout)["pid"])

    def close(self) -> None:
        """End what still runs; runc, which waits for it, then removes its traces."""
        for name, popen in self._started.items():
            if popen.poll() is None:
                subprocess.run([*self._runc, "kill", name, "KILL"], check=True, timeout=30)
                popen.wait(timeout=30)

    def _bundle(self, container: Json) -> str:
        """Write runc's configuration of a container; return its name, which is also the folder's."""
        name = f"{self.netns}-{container['name']}-{sum(1 for _ in self._bundles.iterdir())}"
        context = container.get("securityContext", {})
        assert not context.get("privileged")
        capabilities = [f"CAP_{one}" for one in context.get("capabilities", {}).get("add", [])]
        config = {
            "ociVersion": "1.0.2",
            "process": {
                "args": [*container["command"], *container.get("args", [])],
                "env": [*self.image["Env"], *self._environment(container)],
                "cwd": "/",
                "user": {"uid": 0, "gid": 0},
                "noNewPrivileges": True,
                "capabilities": {kind: capabilities for kind in ("bounding", "effective", "permitted")},
            },
            "root": {"path": str(self.rootfs), "readonly": bool(context.get("readOnlyRootFilesystem"))},
            "hostname": self.node,
            "mounts": [*_FILE_SYSTEMS, *self._given(), *map(self._mount, container["volumeMounts"])],
            "linux": {
                "cgroupsPath": f"/{name}",
                "resources": {"devices": [{"allow": False, "access": "rwm"}]},
                # hostNetwork: the network of the node, here a namespace.
                "namespaces": [
                    {"type": "network", "path": f"/run/netns/{self.netns}"},
                    *({"type": kind} for kind in ("pid", "ipc", "uts", "mount")),
                ],
                "maskedPaths": _PROC_HIDDEN,
                "readonlyPaths": _PROC_READ_ONLY,
            },
        }
        (self._bundles / name).mkdir()
        (self._bundles / name / "config.json").write_text(json.dumps(config))
        return name

    def _environment(self, container: Json) -> list[str]:
        fields = {
            "metadata.name": "kube-flannel-ds-x7k2p",
            "metadata.namespace": "kube-flannel",
            "spec.nodeName": self.node,
        }
        found = dict(self.cluster.environment)
        for one in container.get("env", []):
            found[one["name"]] = (
                one["value"] if "value" in one else fields[one["valueFrom"]["fieldRef"]["fieldPath"]]
            )
        return [f"{name}={value}" for name, value in found.items()]

    def _mount(self, wanted: Json) -> Json:
        (volume,) = [one for one in self.spec["volumes"] if one["name"] == wanted["name"]]
        if "configMap" in volume:
            return _bind(self._config_map(volume), wanted["mountPath"], "ro")
        return _bind(self._host_path(volume["hostPath"]), wanted["mountPath"], "rw")

    def _host_path(self, host_path: Json) -> Path:
        path = self.host / str(host_path["path"]).lstrip("/")
        if host_path.get("type") == "FileOrCreate":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            path.mkdir(parents=True, exist_ok=True)
        return path

    def _config_map(self, volume: Json) -> Path:
        """A ConfigMap as a folder; each key is a symbolic link through another, as kubelet leaves it."""
        name = volume["configMap"]["name"]
        folder = self._bundles / f"{name}.volume"
        if not folder.exists():
            data = folder / "..2026_01_05_08_00_00.123456789"
            data.mkdir(parents=True)
            (folder / "..data").symlink_to(data.name)
            for key, text in self.cluster.config_maps[name].items():
                (data / key).write_text(text)
                (folder / key).symlink_to(f"..data/{key}")
        return folder

    def _given(self) -> list[Json]:
        """What every pod of a node's network is given: the names of the node, and the service account.

        The name server is the one of the cluster, which nobody reaches before there is a network.
        """
        for name, text in (("hosts", "127.0.0.1 localhost\n"), ("resolv.conf", "nameserver 10.96.0.10\n")):
            (self._bundles / name).write_text(text)
        return [
            _bind(self._bundles / "hosts", "/etc/hosts", "rw"),
            _bind(self._bundles / "resolv.conf", "/etc/resolv.conf", "rw"),
            _bind(self.cluster.service_account, SERVICE_ACCOUNT, "ro"),
        ]


def _bind(source: Path, destination: str, access: str) -> Json:
    options = ["rbind", "rprivate", access]
    return {"destination": destination, "type": "bind", "source": str(source), "options": options}
