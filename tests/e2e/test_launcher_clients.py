"""Real DHCP clients in place of a machine, each against virt-launcher.

namespace "gw": cni0 10.244.1.1, fd00:1::1 ── eth0 of namespace "pod": k6t-eth0 ── tap0
                                    (a veth) ── eth0: namespace "client", or (a tap) iPXE in QEMU
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path

import pytest
import yaml

from tests.lab.clients import Acquired, Client, Networkd, StaticRoute, dhclient, dhcpcd, plug, udhcpc
from tests.lab.ipxe import Ipxe
from tests.lab.machine import LAUNCHER
from tests.lab.net import Lab, Process
from tests.lab.node import REPOSITORY

MAC = "0a:58:0a:f4:01:07"
LEASE_S = 12
GATEWAY = IPv4Address("10.244.1.1")
WISHES = (
    f"--lease-seconds={LEASE_S}",
    "--hostname=vm1",
    *("--dns=10.96.0.10", "--dns=fd00:96::a"),
    *("--search=default.svc.cluster.local", "--search=cluster.local"),
)
EXPECTED = Acquired(
    address=IPv4Interface("10.244.1.7/24"),
    mtu_bytes=1450,
    routers=(GATEWAY,),
    static_routes=(
        StaticRoute(IPv4Interface("10.244.0.0/16").network, GATEWAY),
        StaticRoute(IPv4Interface("0.0.0.0/0").network, GATEWAY),
    ),
    dns=(IPv4Address("10.96.0.10"),),
    search=("default.svc.cluster.local", "cluster.local"),
    lease_s=LEASE_S,
    server_id="169.254.75.10",
    reported={},
)


@dataclass(slots=True)
class Pod:
    """A pod's namespace, its gateway, and where the client is."""

    lab: Lab
    netns: str
    gateway: str
    client: str
    state: Path
    server: Process | None = None

    def launcher(self, *words: str) -> str:
        return self.lab.run(self.netns, *LAUNCHER, f"--state-dir={self.state}", *words)

    def address(self, *addresses: str) -> None:
        """What a CNI plugin does."""
        self.lab.ip(
            self.netns,
            "addr flush dev eth0 scope global",
            *(f"addr add {address} dev eth0 {'nodad' * (':' in address)}" for address in addresses),
            *(f"route replace {dst} via {GATEWAY}" for dst in ("default", "10.244.0.0/16")),
            "route replace default via fd00:1::1",
        )

    def hand_over(self, *wishes: str, tap: bool = False) -> None:
        """Prepare and serve, with the client's cable in the tap's place unless the tap is wanted."""
        self.launcher("prepare", *WISHES, *wishes)
        if not tap:
            self.lab.ip(self.netns, "link del tap0")
            plug(self.lab, self.netns, self.client, "tap0", MAC)
            self.lab.ip(self.netns, "link set tap0 mtu 1450 master k6t-eth0")
        self.server = self.lab.spawn(
            self.netns, f"serve-{len(wishes)}{tap}", [*LAUNCHER, f"--state-dir={self.state}", "serve"]
        )
        self.server.wait_text("serving")


@pytest.fixture
def pod(lab_of: Callable[[int], Lab]) -> Pod:
    lab = lab_of(0)
    netns, gateway, client = (lab.add_pod(name) for name in ("pod", "gw", "client"))
    lab.ip(
        gateway,
        "link add cni0 type bridge stp_state 0 forward_delay 0",
        f"addr add {GATEWAY}/24 dev cni0",
        "addr add fd00:1::1/64 dev cni0 nodad",
        "link set cni0 up",
        f"link add v0 mtu 1450 type veth peer name eth0 mtu 1450 address {MAC} netns {netns}",
        "link set v0 master cni0 up",
    )
    lab.ip(netns, "link set eth0 up")
    made = Pod(lab, netns, gateway, client, lab.directory / "state")
    made.address("10.244.1.7/24", "fd00:1::7/64")
    return made


CLIENTS: dict[str, Callable[[Lab, str], Client]] = {
    "udhcpc": udhcpc,
    "dhclient": dhclient,
    "dhcpcd": dhcpcd,
    "networkd": Networkd,
}


@pytest.mark.parametrize("kind", CLIENTS)
def test_client_gets_the_pods_address_renews_and_talks(pod: Pod, kind: str) -> None:
    pod.hand_over()
    client = CLIENTS[kind](pod.lab, pod.client)
    acquired = client.acquire()
    assert acquired == EXPECTED, acquired.reported
    pod.lab.run(pod.client, "ping", "-nqc1", "-w3", str(GATEWAY))
    pod.lab.run(pod.gateway, "ping", "-nqc1", "-w3", "10.244.1.7")
    assert client.renew() == EXPECTED
    client.release()
    client.stop()


@pytest.mark.parametrize("kind", ["dhclient", "dhcpcd"])
def test_client_that_had_another_address_is_refused_it(pod: Pod, kind: str) -> None:
    """As a guest whose pod was replaced: INIT-REBOOT with the old address, NAK, and the new one."""
    pod.hand_over()
    client = CLIENTS[kind](pod.lab, pod.client)
    client.acquire()
    client.stop()
    assert pod.server is not None
    pod.server.end()
    pod.lab.ip(pod.netns, "link del tap0")
    pod.launcher("restore")
    pod.address("10.244.1.9/24", "fd00:1::9/64")
    pod.hand_over("--hostname=vm1")
    assert client.acquire() == replace(EXPECTED, address=IPv4Interface("10.244.1.9/24"))
    assert "NAK" in pod.server.log.read_text()
    client.stop()


@pytest.mark.parametrize("binding", ["bridge", "masquerade"])
def test_dhcpcd_gets_the_ipv6_address_and_a_default_route(pod: Pod, binding: str) -> None:
    pod.hand_over(f"--binding={binding}")
    pod.lab.run(pod.gateway, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
    client = dhcpcd(pod.lab, pod.client, version=6)
    acquired = client.acquire()
    bridge = binding == "bridge"
    assert acquired.address == IPv6Interface("fd00:1::7/128" if bridge else "fd10:0:2::2/128")
    assert acquired.dns == (IPv6Address("fd00:96::a"),)
    assert acquired.search == EXPECTED.search
    (route,) = pod.lab.show(pod.client, "ip", "-6", "route", "show", "default")
    assert route["gateway"].startswith("fe80::")
    pod.lab.run(pod.client, "ping", "-nqc2", "-w5", "fd00:1::1")
    if bridge:
        pod.lab.run(pod.gateway, "ping", "-nqc1", "-w3", "fd00:1::7")
    # Through the router, not only to it.
    pod.lab.ip(pod.gateway, "addr add fd99::1/128 dev lo")
    pod.lab.run(pod.client, "ping", "-nqc2", "-w5", "fd99::1")
    assert client.renew() == acquired
    client.stop()


def test_ipxe_rom_gets_its_address_and_what_to_boot(pod: Pod) -> None:
    pod.hand_over("--boot-file=pxelinux.0", "--tftp-server=10.244.1.1", tap=True)
    card = f"virtio-net-pci,netdev=net0,mac={MAC}"
    arguments = ("-netdev", "tap,id=net0,ifname=tap0,script=no,downscript=no", "-device", card)
    rom = Ipxe(pod.lab, pod.netns, "rom", arguments)
    acquired = rom.acquire()
    assert acquired.address == EXPECTED.address
    assert acquired.routers == EXPECTED.routers
    told = rom.settings(["filename", "next-server"])
    assert told == {"filename": "pxelinux.0", "next-server": "10.244.1.1"}
    rom.stop()


MANIFEST_CAPABILITIES = ("net_admin", "net_raw", "net_bind_service", "setuid", "setgid")


def as_in_the_manifest(*argv: str) -> list[str]:
    """Run as the pod of packaging/vm-pod.yaml would: those capabilities alone, /proc/sys read-only."""
    kept = ",".join(f"+{name}" for name in MANIFEST_CAPABILITIES)
    mounts = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys"
    return [
        *("unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh"),
        *("setpriv", f"--bounding-set=-all,{kept}", "--inh-caps=-all", "--no-new-privs", *argv),
    ]


def test_manifest_names_these_capabilities() -> None:
    pod = yaml.safe_load((REPOSITORY / "packaging" / "vm-pod.yaml").read_text())
    launcher = next(c for c in pod["spec"]["containers"] if c["name"] == "launcher")
    security = launcher["securityContext"]
    assert security["capabilities"]["drop"] == ["ALL"]
    assert [name.lower() for name in security["capabilities"]["add"]] == list(MANIFEST_CAPABILITIES)
    (private,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == "private")
    assert private["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("binding", ["bridge", "masquerade"])
def test_the_manifests_capabilities_are_enough(pod: Pod, binding: str) -> None:
    if binding == "masquerade":
        # Forwarding is the one thing that such a pod cannot switch on itself.
        settings = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        pod.lab.run(pod.netns, "sysctl", "-qw", *settings)
    argv = as_in_the_manifest(
        *LAUNCHER, f"--state-dir={pod.state}", "run", *WISHES, f"--binding={binding}", "--qemu-args"
    )
    server = pod.lab.spawn(pod.netns, "run", argv)
    server.wait_text("serving")
    assert "-netdev tap,id=net-default,ifname=tap0" in server.log.read_text()
    pod.lab.ip(pod.netns, "link del tap0")
    server.end()
    plug(pod.lab, pod.netns, pod.client, "tap0", MAC)
    pod.lab.ip(pod.netns, "link set tap0 mtu 1450 master k6t-eth0")
    serve = as_in_the_manifest(*LAUNCHER, f"--state-dir={pod.state}", "serve")
    pod.lab.spawn(pod.netns, "serve", serve).wait_text("serving")
    acquired = udhcpc(pod.lab, pod.client).acquire()
    if binding == "bridge":
        assert acquired == EXPECTED
    else:
        assert acquired.address == IPv4Interface("10.0.2.2/24")
        assert "route_localnet" in server.log.read_text()  # what was not to be had is said
        pod.lab.run(pod.client, "ping", "-nqc1", "-w3", str(GATEWAY))
