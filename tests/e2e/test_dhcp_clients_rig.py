"""Every DHCP client of the lab against dnsmasq: what each says it got is what the server was told to give.

namespace "server": srv0 10.67.0.1/24, dnsmasq ── veth ── eth0: namespace "client"
namespace "server": br0 10.67.0.1/24, dnsmasq ── tap0 ── iPXE in QEMU
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path

import pytest

from tests.lab.clients import Acquired, Client, Networkd, dhclient, dhcpcd, plug, route_bytes, udhcpc
from tests.lab.dnsmasq import dnsmasq
from tests.lab.ipxe import Ipxe
from tests.lab.net import Lab, LabError, Process, child_of, running, wait_for

MAC = "02:11:22:33:44:55"
T1_S = 4
LEASE = (
    "--dhcp-range=10.67.0.20,10.67.0.20,255.255.255.0,120",
    "--dhcp-option=option:mtu,1430",
    "--dhcp-option=option:router,10.67.0.1",
    "--dhcp-option=option:dns-server,10.67.0.1,10.67.0.2",
    "--dhcp-option=option:domain-search,a.example,b.example",
    "--dhcp-option=option:classless-static-route,192.0.2.1/32,0.0.0.0,0.0.0.0/0,192.0.2.1",
    f"--dhcp-option=option:T1,{T1_S}",
    "--dhcp-option=option:T2,60",
)
LEASE6 = (
    "--enable-ra",
    "--dhcp-range=fd67::20,fd67::20,64,120",
    "--dhcp-option=option6:dns-server,[fd67::1]",
    "--dhcp-option=option6:domain-search,a.example",
)
EXPECTED = Acquired(
    address=IPv4Interface("10.67.0.20/24"),
    mtu_bytes=1430,
    routers=(IPv4Address("10.67.0.1"),),
    static_routes=route_bytes(bytes((32, 192, 0, 2, 1, 0, 0, 0, 0, 0, 192, 0, 2, 1))),
    dns=(IPv4Address("10.67.0.1"), IPv4Address("10.67.0.2")),
    search=("a.example", "b.example"),
    lease_s=120,
    server_id="10.67.0.1",
    reported={},
)


@dataclass(frozen=True, slots=True)
class Wire:
    """A lab with a server and the namespace for a client."""

    lab: Lab
    netns: str
    client: str
    server: Process

    def messages(self) -> list[str]:
        """The kinds of DHCP messages in the server's log, in their order."""
        words = (word for line in self.server.log.read_text().splitlines() for word in line.split())
        return [word.partition("(")[0] for word in words if word.startswith("DHCP") and "(" in word]


@pytest.fixture
def wire(lab_of: Callable[[int], Lab]) -> Wire:
    lab = lab_of(0)
    netns, client = lab.add_pod("server"), lab.add_pod("client")
    plug(lab, netns, client, "srv0", MAC)
    lab.ip(netns, "addr add 10.67.0.1/24 dev srv0", "addr add 192.0.2.1/32 dev srv0")
    lab.ip(netns, "addr add fd67::1/64 dev srv0 nodad")
    return Wire(lab, netns, client, dnsmasq(lab, netns, "srv0", (*LEASE, *LEASE6)))


Make = Callable[[Lab, str], Client]
CLIENTS: dict[str, Make] = {"udhcpc": udhcpc, "dhclient": dhclient, "dhcpcd": dhcpcd, "networkd": Networkd}


@pytest.mark.parametrize("kind", CLIENTS)
def test_client_acquires_renews_and_releases(wire: Wire, kind: str) -> None:
    before = host_files()
    client = CLIENTS[kind](wire.lab, wire.client)
    acquired = client.acquire()
    assert acquired == EXPECTED, acquired.reported
    assert "DHCPNAK" not in wire.messages()

    (link,) = wire.lab.show(wire.client, "ip", "-4", "addr", "show", "eth0")
    assert [item["local"] for item in link["addr_info"]] == ["10.67.0.20"]
    assert mtus(wire) == {1430}
    wire.lab.run(wire.client, "ping", "-nqc1", "-w2", "192.0.2.1")

    acknowledged = wire.messages().count("DHCPACK")
    assert client.renew() == EXPECTED
    assert wire.messages().count("DHCPACK") > acknowledged
    assert wire.messages().count("DHCPDISCOVER") == 1

    client.release()
    if kind != "networkd":  # whose RELEASE has no server identifier
        wait_released(wire, client)
    client.stop()
    wait_for(lambda: processes(wire) == [], 2.0, f"end of every process of {kind}")
    assert host_files() == before


@pytest.mark.parametrize("kind", ["dhclient", "dhcpcd"])
def test_client_started_again_asks_for_its_last_address_and_takes_a_refusal(wire: Wire, kind: str) -> None:
    client = CLIENTS[kind](wire.lab, wire.client)
    client.acquire()
    client.stop()
    assert "DHCPRELEASE" not in wire.messages()
    assert client.acquire() == EXPECTED
    assert wire.messages().count("DHCPDISCOVER") == 1
    client.stop()

    wire.server.end()
    (wire.lab.directory / f"{wire.server.child.what}.leases").unlink()
    dnsmasq(
        wire.lab, wire.netns, "srv0", ("--dhcp-range=10.67.0.30,10.67.0.30,255.255.255.0,120", *LEASE[1:])
    )
    assert client.acquire() == replace(EXPECTED, address=IPv4Interface("10.67.0.30/24"))
    assert wire.messages().count("DHCPNAK") == 1

    left = [child_of(int(pid), kind) for pid in processes(wire)]
    assert left
    wire.lab.destroy()
    wait_for(lambda: not any(map(running, left)), 2.0, f"end of every process of {kind}")


def test_dhcpcd_gets_an_ipv6_address_and_its_router(wire: Wire) -> None:
    client = dhcpcd(wire.lab, wire.client, version=6)
    acquired = client.acquire()
    assert acquired.address == IPv6Interface("fd67::20/128")
    assert acquired.dns == (IPv6Address("fd67::1"),)
    assert acquired.search == ("a.example",)
    assert acquired.lease_s == 120
    (route,) = wire.lab.show(wire.client, "ip", "-6", "route", "show", "default")
    assert route["gateway"].startswith("fe80::")
    assert client.renew() == acquired
    client.release()
    wait_released(wire, client)


def test_ipxe_acquires(lab_of: Callable[[int], Lab]) -> None:
    lab = lab_of(0)
    netns = lab.add_pod("server")
    lab.ip(
        netns,
        "link add br0 type bridge stp_state 0 forward_delay 0",
        "addr add 10.67.0.1/24 dev br0",
        "link set br0 up",
        "tuntap add mode tap tap0",
        "link set tap0 master br0 up",
    )
    boot = ("--dhcp-option=option:bootfile-name,pxelinux.0", "--dhcp-option=option:tftp-server,boot.example")
    dnsmasq(lab, netns, "br0", (*LEASE, *boot))
    card = (
        *("-netdev", "tap,id=net0,ifname=tap0,script=no,downscript=no"),
        *("-device", f"virtio-net-pci,netdev=net0,mac={MAC}"),
    )
    client: Ipxe = Ipxe(lab, netns, "rom", card)
    acquired = client.acquire()
    assert acquired == replace(EXPECTED, static_routes=()), acquired.reported
    assert acquired.reported["67:string"] == "pxelinux.0"
    assert acquired.reported["66:string"] == "boot.example"
    with pytest.raises(LabError, match="has no renewal"):
        client.renew()
    client.stop()


def test_client_without_a_server_is_told_with_its_log(lab_of: Callable[[int], Lab]) -> None:
    lab = lab_of(0)
    netns, alone = lab.add_pod("server"), lab.add_pod("client")
    plug(lab, netns, alone, "srv0", MAC)
    client = udhcpc(lab, alone)
    with pytest.raises(LabError, match="no bound from udhcpc") as caught:
        client.acquire(timeout_s=2)
    assert "broadcasting discover" in caught.value.logs[0].read_text()


def wait_released(wire: Wire, client: Client) -> None:
    """Wait until the server has heard of the release."""
    logs = (wire.server.log, client.log)
    wait_for(lambda: "DHCPRELEASE" in wire.messages(), 5.0, "release at the server", *logs)


def mtus(wire: Wire) -> set[int]:
    """The MTU of the client's interface, or those that its routes have instead."""
    routes = wire.lab.show(wire.client, "ip", "-4", "route", "show", "dev", "eth0")
    (link,) = wire.lab.show(wire.client, "ip", "link", "show", "eth0")
    found = {metric["mtu"] for route in routes for metric in route.get("metrics", [])}
    return found or {link["mtu"]}


def processes(wire: Wire) -> list[str]:
    """PIDs of the processes left in the client's namespace."""
    return wire.lab.run(wire.netns, "ip", "netns", "pids", wire.client).split()


def host_files() -> dict[str, bytes | list[str]]:
    """What a client could damage on the host: its resolver, its name, the leases of its own clients."""
    files: dict[str, bytes | list[str]] = {name: Path(name).read_bytes() for name in HOST_FILES}
    return files | {"leases": sorted(path.name for path in Path("/var/lib/dhcpcd").iterdir())}


HOST_FILES = ("/etc/resolv.conf", "/etc/hostname", "/proc/sys/kernel/hostname")
