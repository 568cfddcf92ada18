"""VLANs of the bridge plugin, on a kernel that has them: Debian's, in a VM.

guest: the frozen plugins behind the shim (no daemon, so the cold path), the Go plugins beside them, and
iproute2, which tells what the kernel has. Go's 1.1.1 knows `vlan` only; where it knows the keys, its state is
the measure, and elsewhere upstream's source is (plugins/main/bridge/bridge.go, `setupVeth`).
"""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import vm
from tests.lab.net import Lab, program
from tests.lab.vm import Guest, Member

OURS, GO = vm.REPOSITORY / "dist" / "cni-bin", Path("/usr/lib/cni")
# VLAN 4095 is reserved (IEEE 802.1Q, table 9-2): each kernel refuses it, with VLAN filtering or without.
REFUSED = """
import sys
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from cni.errors import CniError
from cni.local import LocalHost
from cni.plugins.bridgeport import ensure_vlan_link
from cni.plugins.links import find
host = LocalHost(print, {})
conf = SimpleNamespace(vlan=4095, preserve_default_vlan=True)
try:
    ensure_vlan_link(host, conf, find(host.route, "br0"))
except CniError as exc:
    print(exc)
"""
MODULES = ("bridge", "veth")  # no nf_tables: a DEL without ipMasq has to succeed there as well
MEMORY_MB = "512"  # the initramfs with the frozen interpreter and the Go plugins stays in memory
CALL_S = 120.0  # an emulated processor starts an interpreter twice

Json = dict[str, Any]
Vlans = dict[int, tuple[str, ...]]

DEFAULT, ACCESS = ("Egress Untagged",), ("PVID", "Egress Untagged")
TRUNK = [{"minID": 200, "maxID": 203}, {"id": 101}]
TAGGED: Vlans = {101: (), 200: (), 201: (), 202: (), 203: ()}
VLANS_OF: list[tuple[Json, Vlans | None]] = [
    ({"vlan": 100, "preserveDefaultVlan": True}, {1: DEFAULT, 100: ACCESS}),
    ({"vlan": 100, "preserveDefaultVlan": False}, {100: ACCESS}),
    ({"vlan": 100}, {100: ACCESS}),
    ({"vlanTrunk": TRUNK}, {1: ACCESS, **TAGGED}),
    ({"vlanTrunk": TRUNK, "vlan": 100}, {100: ACCESS, **TAGGED}),
    ({"vlanTrunk": TRUNK, "vlan": 100, "preserveDefaultVlan": True}, {1: DEFAULT, 100: ACCESS, **TAGGED}),
    ({"vlanTrunk": TRUNK, "preserveDefaultVlan": True}, {1: ACCESS, **TAGGED}),
    ({"vlanTrunk": []}, {1: ACCESS}),
    ({"preserveDefaultVlan": False}, None),  # no VLAN is asked for: the bridge does not filter
]
LAYER_3 = {
    "isGateway": True,
    "isDefaultGateway": True,
    "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd09::/64"}]]},
}


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A guest with the plugins in /ours and /go and the modules of a bridge."""
    directory = tmp_path_factory.mktemp("vlan")
    made = vm.image()
    # The kernel unpacks what follows the first archive over it, and QEMU takes the last of two arguments.
    initrd = directory / "initrd"
    initrd.write_bytes(made.initrd.read_bytes() + vm.archive(_members(made.kernel.name)))
    with Lab(directory / "lab", f"pfl{os.getpid()}v-") as lab:  # beside the labs of single tests
        lab.create(0)
        larger = ("-initrd", str(initrd), "-m", MEMORY_MB)
        booted = Guest.boot(lab, lab.add_pod("host"), "vlan", larger)
        booted.run("while read -r module; do insmod $module; done </vlan.modules")
        yield booted


def _members(kernel: str) -> list[Member]:
    """What this guest has besides those of other tests."""
    tree = vm.KERNEL / "lib" / "modules" / kernel.removeprefix("vmlinuz-")
    order = vm.load_order((tree / "modules.dep").read_text(), (tree / "modules.builtin").read_text(), MODULES)
    inside = {f"modules/{Path(path).name}": tree / path for path in order}
    files = {
        **{f"ours/{path.relative_to(OURS)}": path for path in OURS.rglob("*") if path.is_file()},
        **{f"go/{name}": GO / name for name in ("bridge", "host-local")},
        **{f"usr/sbin/{name}": Path(program(name)) for name in ("ip", "bridge")},
        "vlan.sh": vm.SCRIPTS / "vlan.sh",
    }
    libraries = [library for source in files.values() for library in _libraries(source)]
    files |= {path.removeprefix("/"): Path(path) for path in libraries if not path.startswith(str(OURS))}
    files |= inside
    names = "".join(f"/{path}\n" for path in inside)
    directories = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    return [
        *(Member(path, stat.S_IFDIR | 0o755) for path in sorted(directories)),
        *(Member(path, stat.S_IFREG | 0o755, source.read_bytes()) for path, source in files.items()),
        Member("ours/bridge", stat.S_IFLNK | 0o777, b"flannel"),
        Member("vlan.modules", stat.S_IFREG | 0o644, names.encode()),
    ]


def _libraries(executable: Path) -> list[str]:
    listing = subprocess.run([program("ldd"), executable], capture_output=True, text=True, check=False)
    return re.findall(r"(/\S+) \(0x", listing.stdout)  # none of a static one, or of another file


class Seen:
    """What one life of a pod showed; `names` are its result's interfaces, `after` is "add" or "del"."""

    def __init__(self, told: Json) -> None:
        self.told = told
        self.result: Json = told["ADD"]["said"]
        self.names = [one["name"] for one in self.result["interfaces"]]
        self._roles = {"br0": "bridge", "br0.100": "gateway", self.names[1]: "pod's port"}
        for link in told["after_add"]["links"]:
            if link.get("link") == "br0.100":
                self._roles[link["ifname"]] = "gateway's port"

    def vlans(self, after: str) -> dict[str, Vlans]:
        """The VLANs of the bridge and its ports, by what they are for."""
        return {
            self._roles[port["ifname"]]: dict(_spread(port["vlans"]))
            for port in self.told[f"after_{after}"]["vlans"]
        }

    def links(self, after: str) -> dict[str, Json]:
        """What matters of all links of the host but `lo`, by what they are for."""
        return {
            self._roles.get(link["ifname"], link["ifname"]): _plain(link)
            for link in self.told[f"after_{after}"]["links"]
            if link["ifname"] != "lo"
        }

    @property
    def inside(self) -> Json:
        """The pod's end after ADD."""
        return next(_plain(link) for link in self.told["after_add"]["inside"] if link["ifname"] == "eth0")


def _spread(vlans: list[Json]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """`bridge` may show neighbouring VLANs as one range."""
    for one in vlans:
        for vlan in range(one["vlan"], int(one.get("vlanEnd") or one["vlan"]) + 1):
            yield vlan, tuple(one.get("flags", ()))


def _plain(link: Json) -> Json:
    addresses = [
        f"{one['local']}/{one['prefixlen']} {one['scope']} {one.get('broadcast')}"
        for one in link["addr_info"]
        if one["scope"] != "link"
    ]
    data = link.get("linkinfo", {}).get("info_data", {})
    return {
        "addresses": sorted(addresses),
        "up": "UP" in link["flags"],
        "mtu": link["mtu"],
        "master": link.get("master"),
        "vlan_filtering": data.get("vlan_filtering"),
    }


def live(guest: Guest, folder: str, **keys: object) -> Seen:
    """Add a pod with these keys of the netconf, and delete it."""
    netconf = {"cniVersion": "1.0.0", "name": "vlan", "type": "bridge", "bridge": "br0", **keys}
    encoded = base64.b64encode(json.dumps(netconf).encode()).decode()
    told = json.loads(guest.run(f"echo {encoded} | base64 -d | sh /vlan.sh {folder}", CALL_S))
    assert told["ADD"]["status"] == 0, told["ADD"]
    assert told["DEL"] == {"status": 0, "said": ""}
    return Seen(told)


def test_access_port_is_as_upstreams(guest: Guest) -> None:
    ours, go = (live(guest, folder, vlan=100, preserveDefaultVlan=True) for folder in ("/ours", "/go"))

    assert ours.vlans("add") == {"bridge": {1: ACCESS}, "pod's port": {1: DEFAULT, 100: ACCESS}}
    assert ours.vlans("add") == go.vlans("add")
    assert ours.links("add")["bridge"]["vlan_filtering"] == 1
    assert ours.links("add") == go.links("add")
    assert ours.inside == go.inside
    assert ours.vlans("del") == {"bridge": {1: ACCESS}} == go.vlans("del")
    assert ours.links("del") == go.links("del")


@pytest.mark.parametrize(("keys", "expected"), VLANS_OF, ids=[json.dumps(keys) for keys, _ in VLANS_OF])
def test_port_has_the_vlans_of_the_netconf(guest: Guest, keys: Json, expected: Vlans | None) -> None:
    seen = live(guest, "/ours", **keys)

    assert seen.vlans("add")["pod's port"] == (expected or {1: ACCESS})
    assert seen.links("add")["bridge"]["vlan_filtering"] == (0 if expected is None else 1)
    assert len(seen.names) == 3
    assert seen.inside["up"]
    assert set(seen.links("del")) == {"bridge"}
    assert seen.vlans("del") == {"bridge": {1: ACCESS}}


def test_gateway_of_a_vlan_is_as_upstreams_and_answers(guest: Guest) -> None:
    keys = {"vlan": 100, "preserveDefaultVlan": True, **LAYER_3}
    ours, go = (live(guest, folder, **keys) for folder in ("/ours", "/go"))

    assert len(ours.names) == 4 and ours.names[3] == "br0.100"
    assert "sandbox" not in ours.result["interfaces"][3]
    shown = [link for link in ours.told["after_add"]["links"] if link["ifname"] == "br0.100"]
    assert ours.result["interfaces"][3]["mac"] == shown[0]["address"]
    gateway = ours.links("add")["gateway"]
    assert gateway["addresses"] == ["10.9.0.1/24 global 10.9.0.255", "fd09::1/64 global None"]
    assert gateway["up"]
    assert ours.links("add")["bridge"]["addresses"] == []
    assert ours.told["after_add"]["reached"] == {"10.9.0.1": True, "fd09::1": True}
    assert {key: ours.result[key] for key in ("ips", "routes")} == {
        key: go.result[key] for key in ("ips", "routes")
    }

    port = {1: DEFAULT, 100: ACCESS}
    assert ours.vlans("add") == {"bridge": {1: ACCESS}, "pod's port": port, "gateway's port": port}
    assert ours.vlans("add") == go.vlans("add")
    assert ours.links("add") == go.links("add")
    assert ours.inside == go.inside

    # The gateway stays for other pods, as upstream's does; of the pod nothing does.
    assert set(ours.links("del")) == {"bridge", "gateway", "gateway's port"}
    assert ours.vlans("del") == go.vlans("del") == {"bridge": {1: ACCESS}, "gateway's port": port}
    assert ours.links("del") == go.links("del")
    assert ours.told["after_add"]["leases"].split() == ["10.9.0.2", "fd09::2"]
    assert ours.told["after_del"]["leases"] == ""


def test_gateway_of_a_vlan_loses_the_default_one_with_its_pods(guest: Guest) -> None:
    seen = live(guest, "/ours", vlan=100, preserveDefaultVlan=False, **LAYER_3)

    assert seen.vlans("add") == {
        "bridge": {1: ACCESS},
        "pod's port": {100: ACCESS},
        "gateway's port": {100: ACCESS},
    }
    assert seen.told["after_add"]["reached"] == {"10.9.0.1": True, "fd09::1": True}


def test_gateway_that_gets_no_vlan_is_not_left_behind(lab_of: Callable[[int], Lab]) -> None:
    lab = lab_of(0)
    netns = lab.add_pod("half")
    lab.ip(netns, "link add br0 type bridge", "link set br0 up")

    said = lab.run(netns, sys.executable, "-c", REFUSED, str(vm.REPOSITORY))

    assert "failed to setup vlan tag on interface" in said
    assert {link["ifname"] for link in lab.show(netns, "ip", "link")} == {"lo", "br0"}
