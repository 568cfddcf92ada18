"""packaging/kube-flannel.yml has upstream's names, keys, rights and mounts, and what is ours is beside them.

The expectations are upstream's manifest (Documentation/kube-flannel.yml of v0.28.9), written out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cni import __version__
from flanneld import flags
from flanneld.config import parse_netconf

Json = dict[str, Any]

PATH = Path(__file__).parents[2] / "packaging" / "kube-flannel.yml"
OBJECTS: list[Json] = list(yaml.safe_load_all(PATH.read_text()))
IMAGE = f"pyflannel/flannel:v{__version__}"


def find(kind: str) -> Json:
    (found,) = [one for one in OBJECTS if one["kind"] == kind]
    return found


def pod() -> Json:
    spec: Json = find("DaemonSet")["spec"]["template"]["spec"]
    return spec


def container(name: str) -> Json:
    (found,) = [one for one in pod()["initContainers"] + pod()["containers"] if one["name"] == name]
    assert isinstance(found, dict)
    return found


def mounts(name: str) -> dict[str, Json]:
    """What a container sees at each path: the volume without its name."""
    volumes = {one["name"]: one for one in pod()["volumes"]}
    found = {}
    for mount in container(name)["volumeMounts"]:
        assert set(mount) == {"name", "mountPath"}
        found[mount["mountPath"]] = {key: one for key, one in volumes[mount["name"]].items() if key != "name"}
    return found


@pytest.mark.parametrize(
    ("api", "kind", "name", "namespace", "labels"),
    [
        (
            "v1",
            "Namespace",
            "kube-flannel",
            None,
            {"k8s-app": "flannel", "pod-security.kubernetes.io/enforce": "privileged"},
        ),
        ("v1", "ServiceAccount", "flannel", "kube-flannel", {"k8s-app": "flannel"}),
        ("rbac.authorization.k8s.io/v1", "ClusterRole", "flannel", None, {"k8s-app": "flannel"}),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "flannel", None, {"k8s-app": "flannel"}),
        (
            "v1",
            "ConfigMap",
            "kube-flannel-cfg",
            "kube-flannel",
            {"tier": "node", "k8s-app": "flannel", "app": "flannel"},
        ),
        (
            "apps/v1",
            "DaemonSet",
            "kube-flannel-ds",
            "kube-flannel",
            {"tier": "node", "k8s-app": "flannel", "app": "flannel"},
        ),
    ],
)
def test_names_and_labels(
    api: str, kind: str, name: str, namespace: str | None, labels: dict[str, str]
) -> None:
    found = find(kind)
    metadata = {"name": name, "labels": labels} | ({"namespace": namespace} if namespace else {})
    assert (found["apiVersion"], found["metadata"]) == (api, metadata)
    assert len(OBJECTS) == 6


def test_rights() -> None:
    rules = {
        tuple(rule["resources"]): (rule["apiGroups"], rule["verbs"]) for rule in find("ClusterRole")["rules"]
    }
    assert rules == {
        ("pods",): ([""], ["get"]),
        ("nodes",): ([""], ["get", "list", "watch"]),
        ("nodes/status",): ([""], ["patch"]),
    }
    binding = find("ClusterRoleBinding")
    assert binding["roleRef"] == {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "ClusterRole",
        "name": "flannel",
    }
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "flannel", "namespace": "kube-flannel"}]


def test_configuration() -> None:
    data = find("ConfigMap")["data"]
    assert set(data) == {"cni-conf.json", "net-conf.json"}
    assert json.loads(data["cni-conf.json"]) == {
        "name": "cbr0",
        "cniVersion": "0.3.1",
        "plugins": [
            {"type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
    assert json.loads(data["net-conf.json"]) == {
        "Network": "10.244.0.0/16",
        "EnableNFTables": False,
        "Backend": {"Type": "vxlan"},
    }


def test_the_pods_are_upstreams() -> None:
    """A selector cannot be changed: `kubectl apply` over upstream's DaemonSet needs the same one."""
    spec = find("DaemonSet")["spec"]
    assert set(spec) == {"selector", "template"}
    assert spec["selector"] == {"matchLabels": {"app": "flannel"}}
    assert spec["template"]["metadata"] == {"labels": {"tier": "node", "app": "flannel"}}
    steps = {"initContainers", "containers", "volumes"}
    linux = {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [linux]}]}
    assert {key: value for key, value in pod().items() if key not in steps} == {
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}},
        "hostNetwork": True,
        "priorityClassName": "system-node-critical",
        "tolerations": [{"operator": "Exists", "effect": "NoSchedule"}],
        "serviceAccountName": "flannel",
    }
    assert [one["name"] for one in pod()["initContainers"]] == ["install-cni-plugin", "install-cni"]
    assert [one["name"] for one in pod()["containers"]] == ["kube-flannel"]
    assert {one["image"] for one in pod()["initContainers"] + pod()["containers"]} == {IMAGE}


def test_init_steps() -> None:
    plugin, conf = container("install-cni-plugin"), container("install-cni")
    # Upstream: cp -f /flannel /opt/cni/bin/flannel; our folder has the cold path besides.
    assert plugin["command"] + plugin["args"] == [
        "/opt/bin/install-cni-plugin",
        "/opt/cni-bin",
        "/opt/cni/bin/flannel",
    ]
    assert mounts("install-cni-plugin") == {"/opt/cni/bin": {"hostPath": {"path": "/opt/cni/bin"}}}
    assert conf["command"] + conf["args"] == [
        "/opt/bin/install-conf",
        "/etc/kube-flannel/cni-conf.json",
        "/etc/cni/net.d/10-flannel.conflist",
    ]
    assert mounts("install-cni") == {
        "/etc/cni/net.d": {"hostPath": {"path": "/etc/cni/net.d"}},
        "/etc/kube-flannel/": {"configMap": {"name": "kube-flannel-cfg"}},
    }
    for step in (plugin, conf):
        assert set(step) == {"name", "image", "command", "args", "volumeMounts"}


def test_the_daemon() -> None:
    found = container("kube-flannel")
    assert found["command"] + found["args"] == [
        "/opt/bin/flanneld",
        "--ip-masq",
        "--kube-subnet-mgr",
        "--healthz-port=8081",
    ]
    assert found["ports"] == [{"name": "healthz", "containerPort": 8081, "protocol": "TCP"}]
    assert found["livenessProbe"] == {
        "httpGet": {"path": "/healthz", "port": "healthz"},
        "initialDelaySeconds": 10,
        "periodSeconds": 30,
    }
    assert found["readinessProbe"] == {
        "httpGet": {"path": "/readyz", "port": "healthz"},
        "initialDelaySeconds": 5,
        "periodSeconds": 10,
    }
    assert found["resources"] == {"requests": {"cpu": "100m", "memory": "50Mi"}}
    # readOnlyRootFilesystem is ours.
    assert found["securityContext"] == {
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"add": ["NET_ADMIN", "NET_RAW"]},
    }


def test_the_daemons_environment() -> None:
    def field(path: str) -> Json:
        return {"valueFrom": {"fieldRef": {"fieldPath": path}}}

    variables = container("kube-flannel")["env"]
    found = {one["name"]: {key: value for key, value in one.items() if key != "name"} for one in variables}
    assert found == {
        "POD_NAME": field("metadata.name"),
        "POD_NAMESPACE": field("metadata.namespace"),
        "EVENT_QUEUE_DEPTH": {"value": "5000"},
        "CONT_WHEN_CACHE_NOT_READY": {"value": "false"},
        "NODE_NAME": field("spec.nodeName"),  # ours
    }


def test_the_daemons_mounts() -> None:
    assert mounts("kube-flannel") == {
        "/run/flannel": {"hostPath": {"path": "/run/flannel"}},
        "/etc/kube-flannel/": {"configMap": {"name": "kube-flannel-cfg"}},
        "/run/xtables.lock": {"hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"}},
        # Ours: the last known leases.
        "/var/lib/flannel": {"hostPath": {"path": "/var/lib/flannel", "type": "DirectoryOrCreate"}},
    }
    assert len(pod()["volumes"]) == len({one["name"] for one in pod()["volumes"]}) == 6


def test_the_daemon_takes_these_arguments() -> None:
    """Every path that the daemon uses by default is one that the manifest mounts."""
    options = flags.parse(container("kube-flannel")["args"], {}).options
    assert options.kube_subnet_mgr and options.ip_masq and options.healthz_port == 8081
    mounted = tuple(path.rstrip("/") for path in mounts("kube-flannel"))
    for path in (options.subnet_file, options.net_config_path, f"{options.state_dir}/x"):
        assert str(Path(path).parent) in mounted
    net_conf = parse_netconf(find("ConfigMap")["data"]["net-conf.json"], "net-conf.json")
    assert str(net_conf.network) == "10.244.0.0/16" and not net_conf.enable_nftables
