"""The VM rig by itself: a real guest, served by dnsmasq, on a bridge of one namespace.

namespace "host": br0 10.66.0.1/24, dnsmasq ── tap0 ── [ QEMU: guest's eth0 ]
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import vm
from tests.lab.clients import acquired_from_line
from tests.lab.dnsmasq import dnsmasq
from tests.lab.net import Child, Lab, LabError, Record, namespaces, running
from tests.lab.vm import Guest, Member

MAC = "02:11:22:33:44:55"
NETWORK_CARD = (
    *("-netdev", "tap,id=net0,ifname=tap0,script=no,downscript=no"),
    *("-device", f"virtio-net-pci,netdev=net0,mac={MAC}"),
)
LEASE = (
    "--dhcp-range=10.66.0.20,10.66.0.20,255.255.255.0,120",
    "--dhcp-option=option:mtu,1430",
    "--dhcp-option=option:router,10.66.0.1",
    "--dhcp-option=option:dns-server,10.66.0.1,10.66.0.2",
    "--dhcp-option=option:domain-search,a.example,b.example",
    "--dhcp-option=option:classless-static-route,192.0.2.1/32,0.0.0.0,0.0.0.0/0,192.0.2.1",
    *("--enable-ra", "--dhcp-range=fd66::20,fd66::20,64,120", "--dhcp-option=option6:dns-server,[fd66::1]"),
)


@pytest.fixture
def host(lab_of: Callable[[int], Lab]) -> tuple[Lab, str]:
    """A namespace with the bridge, the tap and the server."""
    lab = lab_of(0)
    netns = lab.add_pod("host")
    lab.ip(
        netns,
        "link add br0 type bridge stp_state 0 forward_delay 0",
        "addr add 10.66.0.1/24 dev br0",
        "addr add 192.0.2.1/32 dev br0",
        "addr add fd66::1/64 dev br0 nodad",
        "link set br0 up",
        "tuntap add mode tap tap0",
        "link set tap0 master br0 up",
    )
    dnsmasq(lab, netns, "br0", LEASE)
    return lab, netns


def test_guest_gets_its_lease_reaches_the_namespace_and_is_reached(host: tuple[Lab, str]) -> None:
    lab, netns = host
    began = time.monotonic()
    guest = Guest.boot(lab, netns, "one", NETWORK_CARD)
    print(f"\nguest ready after {time.monotonic() - began:.2f} s")

    guest.run(vm.UDHCPC)
    line = guest.wait_text("DHCP bound")
    acquired = acquired_from_line(line)
    print(line)

    assert str(acquired.address) == "10.66.0.20/24"
    assert acquired.mtu_bytes == 1430
    assert [str(server) for server in acquired.dns] == ["10.66.0.1", "10.66.0.2"]
    assert acquired.search == ("a.example", "b.example")
    assert [str(route) for route in acquired.static_routes] == ["192.0.2.1/32", "0.0.0.0/0 via 192.0.2.1"]
    assert acquired.lease_s == 120
    assert acquired.server_id == "10.66.0.1"

    assert "mtu 1430" in guest.run("ip link show eth0")
    assert "link/ether " + MAC in guest.run("ip link show eth0")
    assert "default via 192.0.2.1 dev eth0" in guest.run("ip route")
    assert guest.run("cat /etc/resolv.conf").split() == [
        *("search", "a.example", "b.example", "nameserver", "10.66.0.1", "nameserver", "10.66.0.2")
    ]
    assert "0% packet loss" in guest.run("ping -c 3 -i 0.1 192.0.2.1")
    guest.run("mkdir /www && echo served by a guest >/www/index.html && httpd -h /www")
    assert lab.run(netns, "curl", "-sS", "http://10.66.0.20/index.html") == "served by a guest\n"

    guest.run("kill -USR1 $(pidof udhcpc)")
    assert acquired_from_line(guest.wait_text("DHCP renew")) == acquired


def test_guest_gets_an_ipv6_address_and_a_default_route(host: tuple[Lab, str]) -> None:
    lab, netns = host
    guest = Guest.boot(lab, netns, "six", NETWORK_CARD)
    guest.run(vm.DHCPCD6)
    assert "ip=fd66::20" in guest.wait_text("DHCP6 BOUND6")
    assert "default via fe80::" in guest.run("ip -6 route")
    assert guest.run("cat /etc/resolv.conf") == "nameserver fd66::1\n"
    assert "0% packet loss" in guest.run("ping -6 -c 3 -i 0.1 fd66::1")


def test_commands_are_told_apart_from_each_other_and_from_the_kernel(host: tuple[Lab, str]) -> None:
    lab, netns = host
    guest = Guest.boot(lab, netns, "one", NETWORK_CARD)
    noise = "dmesg -n 8; i=0; while [ $i -lt 2000 ]; do echo noise $i >/dev/kmsg; i=$((i+1)); done"
    guest.run(f"({noise}) &")
    for number in range(30):
        assert guest.run(f"echo {number}; echo 'a  b' $HOME") == f"{number}\na  b /\n"
    guest.wait_text("noise 1999")
    assert guest.run("dd if=/dev/zero bs=1000 count=100 2>/dev/null | tr '\\0' x") == "x" * 100_000

    with pytest.raises(LabError, match="exit status 3: some words"):
        guest.run("echo some words; exit 3")
    with pytest.raises(LabError, match="exit status 137"):
        guest.run("sleep 60", timeout_s=1)
    assert guest.run("echo goes on") == "goes on\n"


def test_a_guest_that_ends_is_told_with_its_console(host: tuple[Lab, str]) -> None:
    lab, netns = host
    guest = Guest.boot(lab, netns, "one", NETWORK_CARD)
    guest.run("(sleep 0.2; echo c >/proc/sysrq-trigger) &")
    with pytest.raises(LabError, match="vm-one ended") as caught:
        guest.wait_text("never said")
    assert any("sysrq triggered crash" in log.read_text() for log in caught.value.logs)


def test_everything_is_ended_and_removed(host: tuple[Lab, str]) -> None:
    lab, netns = host
    stopped = Guest.boot(lab, netns, "one", NETWORK_CARD)
    stopped.stop()
    assert stopped.process.popen.poll() is not None

    left = Guest.boot(lab, netns, "two", NETWORK_CARD)
    record = Record.load(lab.directory)
    assert record is not None
    children: tuple[Child, ...] = record.children
    assert running(left.process.child)
    lab.destroy()
    assert not any(map(running, children))
    assert namespaces(lab.prefix) == []


def test_initramfs_is_built_once_for_a_content(tmp_path: Path) -> None:
    first = vm.image(tmp_path)
    identity = first.initrd.stat().st_mtime_ns
    assert vm.image(tmp_path) == first
    assert first.initrd.stat().st_mtime_ns == identity
    assert [path.name for path in tmp_path.iterdir()] == [first.initrd.name]


def test_cpio_reads_what_is_packed(tmp_path: Path, lab_of: Callable[[int], Lab]) -> None:
    members = [
        Member("etc", stat.S_IFDIR | 0o755),
        Member("etc/odd", stat.S_IFREG | 0o640, b"abc"),
        Member("etc/empty", stat.S_IFREG | 0o600),
        Member("link", stat.S_IFLNK | 0o777, b"etc/odd"),
    ]
    packed = tmp_path / "packed"
    packed.write_bytes(vm.archive(members))
    lab = lab_of(0)
    (tmp_path / "out").mkdir()
    lab.run(lab.outside, "sh", "-c", f"cd {tmp_path}/out && busybox cpio -id <{packed}")
    assert (tmp_path / "out" / "link").read_bytes() == b"abc"
    assert (tmp_path / "out" / "etc" / "empty").read_bytes() == b""
    assert stat.S_IMODE((tmp_path / "out" / "etc" / "odd").stat().st_mode) == 0o640


def test_modules_are_loaded_after_those_they_need() -> None:
    dependencies = "kernel/a.ko.xz: kernel/b.ko kernel/c-d.ko\nkernel/b.ko: kernel/c-d.ko\nkernel/c-d.ko:\n"
    assert vm.load_order(dependencies, "kernel/e-f.ko\n", ["c_d", "a", "e_f"]) == [
        *("kernel/c-d.ko", "kernel/b.ko", "kernel/a.ko.xz")
    ]
    with pytest.raises(LabError, match="module g: neither in"):
        vm.load_order(dependencies, "", ["g"])
