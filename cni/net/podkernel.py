"""`Kernel` for a pod's namespace: its interface, bridges, taps, addresses, routes and settings.

The protocol is the daemon's: a snapshot of what is there, operations to apply, refusals as data. There
are a dozen operations per pod, so each is sent and answered on its own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET, AF_INET6

from cni.net import netlink, podlinks
from cni.net.entries import Address, Entry, NetState, state
from cni.net.kernel import NetlinkKernel, as_route
from cni.net.plan import Operation, Refused
from cni.net.podlinks import POD_NIC, Bridge, Foreign, Nic, PodLink, PodScope, Sysctl, Tap

_SYS = Path("/proc/sys")

# linux/if_tun.h
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER, _TUNSETGROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_TUN_EXCL = 0x2, 0x100, 0x1000, 0x4000, 0x8000


class PodKernel:
    """The pod's namespace, which must be the calling thread's. Not to be shared between threads.

    `nic` is the index of the pod's interface if that is to be touched, else 0; taps belong to `owner`
    (user and group).
    """

    def __init__(self, nic: int, owner: int) -> None:
        self._netlink = NetlinkKernel()
        self._nic = nic
        self._owner = owner

    def close(self) -> None:
        self._netlink.close()

    def links(self) -> list[PodLink]:
        """Every link of the namespace."""
        return self._netlink.dump(podlinks.get_links(), netlink.RTM_NEWLINK, podlinks.read_link)

    def snapshot(self, scope: PodScope) -> NetState:
        """The entries in `scope`; addresses and routes of the pod's interface are those of `POD_NIC`."""
        links = self.links()
        names = {link.ifindex: link.name for link in links}
        ours = {
            link.ifindex: POD_NIC if link.ifindex == scope.nic else link.name
            for link in links
            if link.ifindex == scope.nic or link.name in scope.links
        }
        entries: list[Entry] = [_as_entry(link, names, scope.nic) for link in links if link.ifindex in ours]
        entries += [
            Address(ours[a.ifindex], f"{a.address}/{a.length}")
            for a in self._netlink.addresses()
            if a.ifindex in ours and _ours(a.address)
        ]
        for family in (AF_INET, AF_INET6) if scope.nic else ():
            entries += [
                as_route(route, POD_NIC)
                for route in self._netlink.routes(family, scope.nic)
                if route.protocol not in (netlink.RTPROT_KERNEL, netlink.RTPROT_RA)
            ]
        entries += [Sysctl(path, value) for path in scope.sysctls if (value := read_sysctl(path)) is not None]
        return state(entries)

    def apply(self, operations: Sequence[Operation]) -> list[Refused]:
        """Carry the operations out in order; after a refusal the rest is still tried."""
        refused = []
        for operation in operations:
            number, text = self._carry_out(operation)
            if number:
                refused.append(Refused(operation, number, text or os.strerror(number)))
        return refused

    def _carry_out(self, operation: Operation) -> tuple[int, str]:
        entry = operation.entry
        links = {link.name: link for link in self.links()}
        nic = next((link for link in links.values() if link.ifindex == self._nic), None)
        if nic is None and self._nic:
            return errno.ENODEV, f"the pod's interface (index {self._nic}) is gone"
        try:
            if operation.verb == "drop":
                return self._drop(entry, links, nic)
            return self._put(entry, links, nic)
        except OSError as exc:
            return exc.errno or errno.EIO, exc.strerror or str(exc)

    def _put(self, entry: Entry, links: dict[str, PodLink], nic: PodLink | None) -> tuple[int, str]:
        have = links.get(entry.link)
        match entry:
            case Nic() if nic is not None:
                return self._shape_nic(entry, links, nic)
            case Bridge():
                return self._put_bridge(entry, have)
            case Tap():
                return self._put_tap(entry, have, links)
            case Sysctl():
                (_SYS / entry.path).write_text(entry.value, encoding="ascii")
                return 0, ""
            case _:
                indexes = _indexes(links, nic)
                if entry.link not in indexes:
                    return errno.ENODEV, f"no link named {entry.link}"
                return self._netlink.request(*netlink.put(entry, indexes))

    def _drop(self, entry: Entry, links: dict[str, PodLink], nic: PodLink | None) -> tuple[int, str]:
        if isinstance(entry, (Nic, Sysctl, Foreign)):
            return 0, ""
        if isinstance(entry, (Bridge, Tap)):
            have = links.get(entry.name)
            if have is None or have == nic:
                return 0, ""
            return self._netlink.request(*podlinks.delete(have.ifindex))
        indexes = _indexes(links, nic)
        if entry.link not in indexes:
            return 0, ""
        number, text = self._netlink.request(*netlink.drop(entry, indexes))
        return (0, "") if number in (errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL) else (number, text)

    def _put_bridge(self, bridge: Bridge, have: PodLink | None) -> tuple[int, str]:
        if have is not None and have.kind != "bridge":
            return errno.EEXIST, f"{bridge.name} exists and is a {have.kind or 'plain'} link, not a bridge"
        if have is None:
            number, text = self._netlink.request(*podlinks.make_bridge(bridge))
            if number:
                return number, text
            have = next(link for link in self.links() if link.name == bridge.name)
        wanted = podlinks.change(have.ifindex, mac=bridge.mac, mtu=bridge.mtu, up=bridge.up, arp=bridge.arp)
        return self._netlink.request(*wanted)

    def _shape_nic(self, wanted: Nic, links: dict[str, PodLink], nic: PodLink) -> tuple[int, str]:
        """Rename, readdress and connect the pod's interface; it must be down for the first two."""
        steps = []
        if (nic.name, nic.mac) != (wanted.name, wanted.mac):
            if nic.up:
                steps.append(podlinks.change(nic.ifindex, up=False))
            steps.append(podlinks.change(nic.ifindex, name=wanted.name, mac=wanted.mac))
        master = 0
        if wanted.master:
            if wanted.master not in links:
                return errno.ENODEV, f"no bridge named {wanted.master}"
            master = links[wanted.master].ifindex
        if nic.master != master:
            steps.append(podlinks.change(nic.ifindex, master=master))
        if master:
            steps.append(podlinks.set_learning(nic.ifindex, wanted.learning))
        steps.append(podlinks.change(nic.ifindex, up=wanted.up))
        for step in steps:
            number, text = self._netlink.request(*step)
            if number:
                return number, text
        return 0, ""

    def _put_tap(self, tap: Tap, have: PodLink | None, links: dict[str, PodLink]) -> tuple[int, str]:
        if have is not None and have.kind != "tun":
            return errno.EEXIST, f"{tap.name} exists and is a {have.kind or 'plain'} link, not a tap"
        if have is not None and have.multi_queue != tap.multi_queue:
            number, text = self._netlink.request(*podlinks.delete(have.ifindex))
            if number:
                return number, text
            have = None
        if have is None:
            _make_tap(tap, self._owner)
            have = next(link for link in self.links() if link.name == tap.name)
        master = links[tap.master].ifindex if tap.master in links else 0
        if tap.master and not master:
            return errno.ENODEV, f"no bridge named {tap.master}"
        return self._netlink.request(*podlinks.change(have.ifindex, mtu=tap.mtu, master=master, up=tap.up))


def _as_entry(link: PodLink, names: dict[int, str], nic: int) -> Entry:
    master = names.get(link.master, "")
    if link.ifindex == nic:
        return Nic(link.ifindex, link.name, link.mac, link.up, master, link.learning)
    if link.kind == "bridge":
        return Bridge(link.name, link.mac, link.mtu, link.up, link.arp)
    if link.kind == "tun":
        return Tap(link.name, link.mtu, master, link.up, link.multi_queue)
    return Foreign(link.name, link.kind)


def _indexes(links: dict[str, PodLink], nic: PodLink | None) -> dict[str, int]:
    found = {name: link.ifindex for name, link in links.items()}
    return found | ({POD_NIC: nic.ifindex} if nic else {})


def _ours(address: str) -> bool:
    """IPv6 link-local addresses are the kernel's own affair; 169.254.0.0/16 is not."""
    parsed = ip_address(address)
    return parsed.version == 4 or not parsed.is_link_local


def read_sysctl(path: str) -> str | None:
    """A setting's value, None if the kernel has no such setting (here)."""
    with contextlib.suppress(OSError):
        return (_SYS / path).read_text(encoding="ascii").strip()
    return None


def _make_tap(tap: Tap, owner: int) -> None:
    """Make a persistent tap that QEMU can attach to; raises OSError."""
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
    flags |= _IFF_MULTI_QUEUE if tap.multi_queue else _IFF_TUN_EXCL
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", tap.name.encode(), flags))
        fcntl.ioctl(descriptor, _TUNSETOWNER, owner)
        fcntl.ioctl(descriptor, _TUNSETGROUP, owner)
        fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
    finally:
        os.close(descriptor)
