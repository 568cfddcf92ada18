"""The netconf of the flannel plugin: what stdin holds, checked for type.

Source: CNI 1.1.0, "Plugin configuration objects", and upstream flannel's keys.
"""

from __future__ import annotations

from cni.spec import gojson

SUBNET_FILE = "/run/flannel/subnet.env"
DATA_DIR = "/var/lib/cni/flannel"
HOST_LOCAL_DIR = "/var/lib/cni/networks"

VALID_ATTACHMENTS = ("cni.dev/valid-attachments", "cni.dev/attachments")


class NetConf:
    """The keys that flannel looks at. `ipam` and `runtime_config` are None when absent."""

    __slots__ = (
        "data_dir",
        "delegate",
        "delegate_mode",
        "ipam",
        "name",
        "prev_result",
        "runtime_config",
        "subnet_file",
        "valid_attachments",
        "version",
    )

    def __init__(self, record: gojson.Object) -> None:
        """Raises gojson.GoJsonError when a key has the wrong type."""
        self.name = gojson.typed(record, "name", str, "")
        self.version = gojson.typed(record, "cniVersion", str, "")
        self.subnet_file = gojson.typed(record, "subnetFile", str, SUBNET_FILE)
        self.data_dir = gojson.typed(record, "dataDir", str, DATA_DIR)
        self.delegate: gojson.Object = gojson.typed(record, "delegate", dict, {})
        self.delegate_mode = gojson.typed(record, "delegateMode", str, "auto")
        self.ipam = _optional_object(record, "ipam")
        self.runtime_config = _optional_object(record, "runtimeConfig")
        self.prev_result = _optional_object(record, "prevResult")
        self.valid_attachments = _attachments(record)
        gojson.typed(record, "type", str, "")
        _optional_object(record, "dns")
        for name, value in gojson.typed(record, "capabilities", dict, {}).items():
            if value is not None and not isinstance(value, bool):
                raise gojson.GoJsonError(
                    f"capabilities.{name} must be true or false, found {gojson.kind(value)}"
                )

    @property
    def store(self) -> str:
        """Where host-local keeps the reservations of this network; empty if another IPAM plugin is used."""
        ipam = self.ipam or {}
        if ipam.get("type", "host-local") != "host-local":
            return ""
        data_dir = ipam.get("dataDir")
        base = data_dir if isinstance(data_dir, str) and data_dir else HOST_LOCAL_DIR
        return f"{base.rstrip('/')}/{self.name}"


def _optional_object(record: gojson.Object, name: str) -> gojson.Object | None:
    if gojson.member(record, name) is None:
        return None
    found: gojson.Object = gojson.typed(record, name, dict, {})
    return found


def _attachments(record: gojson.Object) -> frozenset[tuple[str, str]] | None:
    """The (container ID, interface name) pairs that GC must leave alone; None if the runtime sent no list."""
    key = next((name for name in VALID_ATTACHMENTS if gojson.member(record, name) is not None), None)
    if key is None:
        return None
    pairs = set()
    for entry in gojson.typed(record, key, list, []):
        if not isinstance(entry, dict):
            raise gojson.GoJsonError(f"{key} must hold objects, found {gojson.kind(entry)}")
        pairs.add((gojson.typed(entry, "containerID", str, ""), gojson.typed(entry, "ifname", str, "")))
    return frozenset(pairs)
