"""VXLAN (RFC 7348): pod packets travel inside UDP between the nodes' external interfaces.

How a packet travels. A pod on this node sends to 10.244.2.7. The route of the peer's subnet says
`10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink`: the next hop is the peer's VTEP, whose address
is the subnet's own network address, which no pod can have. The permanent neighbour entry gives that
address the peer's VTEP MAC, so no ARP is ever sent. The device's forwarding database maps the MAC to
the peer's public IP, so nothing is flooded or learned. The kernel wraps the frame in UDP to port 8472
of that address; the peer's device unwraps it and routes it to its bridge.

Which tables grow. One route, one neighbour and one FDB entry for each peer, all permanent: with N
nodes 3(N-1) entries and no entry per pod. All routes share one device, and the kernel keeps the
routes of a device in one hash chain, so inserting them is more than linear in N.

Direct routing. A peer whose public IP is reached over the external interface without a gateway needs no
tunnel: with `DirectRouting` its subnet is routed to that address, and it has neither neighbour nor FDB
entry. Asked afresh for each peer at each pass, so that a peer changes its way when the host's routes do.

What was not chosen. One link per peer grows interfaces instead of entries. A multicast group needs
an underlay that carries multicast. L2MISS/L3MISS with a daemon that answers, as flannel once did,
puts a user process into the path of the first packet; with permanent entries the data path works
while the daemon is down. Nexthop objects would make the insertion linear (10,000 routes in 0.2 s instead
of 1.4), but the kernel deletes no IPv4 route that uses one by its gateway and link, as upstream asks for
it: it answers ESRCH, and upstream tries for most of a minute.

Decision: direct routes carry a protocol number of our own. They stand on a link that is not ours, beside
routes that an operator may have made into the same network with the same words, and only so can a stale
one be told from his. Upstream replaces and deletes a route whatever its number.

Names, attributes and entries are upstream's to the byte (pkg/backend/vxlan), so that this daemon
adopts the device and the peers' entries of its predecessor and can be followed by it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import ClassVar

from cni.errors import ConfigError, InternalError
from cni.net.entries import Address, Entry, FdbEntry, Link, Neighbour, NetState, Route, Vxlan
from cni.net.netlink import address_text
from cni.net.plan import Scope
from cni.spec import gojson
from flanneld.backend.protocol import existing_links
from flanneld.config import NetConf
from flanneld.iface import ExternalInterface
from flanneld.lease import Attributes, Lease

OVERHEAD_BYTES = 50  # RFC 7348 section 5: outer IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14
_IPV6_OVERHEAD_BYTES = 70  # the same over IPv6, whose header has 40; upstream publishes 50 all the same
DEFAULT_PORT = 8472  # what the Linux kernel uses when none is given; IANA's 4789 came later
_IPV6_METRIC = 1024  # the kernel's default for IPv6 routes, shown where IPv4 shows none

_ETHERNET_MIN_MTU = 68
_IPV6_MIN_MTU = 1280  # RFC 8200 section 5

_LONGEST_NAME = 15  # IFNAMSIZ - 1

_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}\Z")

# `netfilter: nat: never update the UDP checksum when it's 0` (Guillaume Nault, Linux 5.7) by stable series.
_NAT_FIXED = {(4, 14): 181, (4, 19): 123, (5, 4): 41, (5, 6): 13}
_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")

OnLink = Callable[[IPv4Address | IPv6Address], bool]


def never(_address: IPv4Address | IPv6Address) -> bool:
    """No peer is reached directly."""
    return False


@dataclass(frozen=True, slots=True)
class VxlanBackend:
    """One VXLAN device for each enabled address family; `mac` of the links is filled in by the lease.

    `on_link` says whether an address is reached over the external interface without a gateway.
    """

    v4: Link | None
    v6: Link | None
    mtu: int
    external: str
    on_link: OnLink = never
    tx_checksum: bool | None = None

    kind: ClassVar[str] = "vxlan"

    @classmethod
    def from_config(
        cls,
        config: NetConf,
        external: ExternalInterface,
        source: str,
        *,
        on_link: OnLink = never,
        release: str = "",
    ) -> VxlanBackend:
        """Read the backend's keys; raises ConfigError.

        `release` is the kernel's (`uname -r`), for TxChecksumOffload; `on_link` is asked with DirectRouting.
        """
        keys = dict(config.backend)
        try:
            vni = gojson.integer(keys, "VNI", 1, 0, (1 << 24) - 1)
            port = gojson.integer(keys, "Port", 0, 0, 65535) or DEFAULT_PORT
            outer_mtu = gojson.integer(keys, "MTU", external.mtu, 0, 65535) or 0
            gbp = gojson.typed(keys, "GBP", bool, False)
            learning = gojson.typed(keys, "Learning", bool, False)
            direct = gojson.typed(keys, "DirectRouting", bool, False)
            offload = gojson.typed(keys, "TxChecksumOffload", str, "auto")
        except gojson.GoJsonError as exc:
            raise ConfigError(f"{source}: Backend.{exc}") from None
        tx_checksum = _tx_checksum(offload, release, source)
        mtu = outer_mtu - OVERHEAD_BYTES
        smallest = _IPV6_MIN_MTU if config.enable_ipv6 else _ETHERNET_MIN_MTU
        if mtu < smallest:
            raise ConfigError(
                f"{source}: an outer MTU of {outer_mtu} leaves {mtu} bytes for pods, which need at least "
                f"{smallest}; raise Backend.MTU or the MTU of {external.name}"
            )

        def device(name: str, local: IPv4Address | IPv6Address) -> Link:
            # The kernel lowers an MTU that the underlay cannot carry, and refuses to raise it again:
            # a device that asked for more would differ from what is wanted for ever.
            overhead = OVERHEAD_BYTES if local.version == 4 else _IPV6_OVERHEAD_BYTES
            fitting = min(mtu, max(external.mtu - overhead, _ETHERNET_MIN_MTU))
            if len(name) > _LONGEST_NAME:
                raise ConfigError(
                    f"{source}: Backend.VNI is {vni}: {name} is too long for a device's name; "
                    f"the highest that fits is 9999999, with IPv6 9999"
                )
            if local.version == 6 and fitting < _IPV6_MIN_MTU:
                raise ConfigError(
                    f"{source}: the MTU of {external.name}, {external.mtu}, leaves {fitting} bytes for "
                    f"{name}, and IPv6 needs {_IPV6_MIN_MTU}; raise it to {_IPV6_MIN_MTU + overhead}"
                )
            vxlan = Vxlan(vni or 0, port, str(local), external.name, gbp, learning)
            return Link(name, fitting, "", True, vxlan, tx_checksum)

        public_ip, public_ipv6 = external.public_ip, external.public_ipv6
        return cls(
            v4=device(f"flannel.{vni}", public_ip) if config.enable_ipv4 and public_ip else None,
            v6=device(f"flannel-v6.{vni}", public_ipv6) if config.enable_ipv6 and public_ipv6 else None,
            mtu=mtu,
            external=external.name,
            on_link=on_link if direct else never,
            tx_checksum=tx_checksum,
        )

    def _links(self) -> Iterator[tuple[int, Link]]:
        if self.v4:
            yield 4, self.v4
        if self.v6:
            yield 6, self.v6

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(link.name for _, link in self._links())

    @property
    def follows_routes(self) -> bool:
        return self.on_link is not never

    def scope(self, config: NetConf) -> Scope:
        """Both families' devices, so that nothing stays of one that is switched off."""
        number = self.devices[0].rpartition(".")[2]
        networks = tuple(str(n) for n in (config.network, config.ipv6_network) if n is not None)
        return Scope((f"flannel.{number}", f"flannel-v6.{number}"), networks, tx_checksum=self.tx_checksum)

    def attributes(self, stored: Lease | None, existing: NetState) -> Attributes:
        links = existing_links(existing)
        data: dict[int, str] = {}
        for version, device in self._links():
            have = links.get(device.name)
            published = _mac(stored.attrs, version) if stored else ""
            mac = have.mac if have and device.same_device(have) else published or _random_mac()
            data[version] = gojson.dumps({"VNI": device.vxlan.vni, "VtepMAC": mac}, sort=False)
        return Attributes(
            public_ip=IPv4Address(self.v4.vxlan.local) if self.v4 else None,
            public_ipv6=IPv6Address(self.v6.vxlan.local) if self.v6 else None,
            backend_type=self.kind,
            backend_data=data.get(4, ""),
            backend_v6_data=data.get(6, ""),
        )

    def base(self, own: Lease) -> Iterator[Entry]:
        for version, device in self._links():
            subnet = own.subnet if version == 4 else own.subnet6
            mac = _mac(own.attrs, version)
            if subnet is None or not mac:
                raise InternalError(f"own lease {own.key} has no IPv{version} subnet or no VTEP MAC")
            yield device._replace(mac=mac)
            yield Address(device.name, f"{subnet.network_address}/{subnet.max_prefixlen}")

    def peer(self, peer: Lease) -> Iterator[Entry]:
        if peer.attrs.backend_type != self.kind:
            return
        for version, device in self._links():
            subnet = peer.subnet if version == 4 else peer.subnet6
            public_ip = peer.attrs.public_ip if version == 4 else peer.attrs.public_ipv6
            mac = _mac(peer.attrs, version)
            # A Windows node publishes an empty MAC first and the real one later; until then it has no VTEP.
            if subnet is None or public_ip is None or not mac:
                continue
            vtep = address_text(subnet.network_address.packed)
            dst, gateway = f"{vtep}/{subnet.prefixlen}", address_text(public_ip.packed)
            metric = _IPV6_METRIC if version == 6 else 0
            if self.on_link(public_ip):
                yield Route(self.external, dst, gateway, metric=metric, marked=True)
                continue
            yield Neighbour(device.name, vtep, mac)
            yield FdbEntry(device.name, mac, gateway)
            yield Route(device.name, dst, vtep, onlink=True, metric=metric)


def _tx_checksum(offload: str, release: str, source: str) -> bool | None:
    """What the key TxChecksumOffload asks for; None leaves the device as it is. Raises ConfigError."""
    wanted: dict[str, bool | None] = {
        "auto": False if breaks_checksums(release) else None,
        "on": True,
        "off": False,
    }
    if offload not in wanted:
        raise ConfigError(
            f"{source}: Backend.TxChecksumOffload is {gojson.dumps(offload)}: "
            f'it must be "auto", "on" or "off"'
        )
    return wanted[offload]


def breaks_checksums(release: str) -> bool:
    """Whether a kernel sends tunnelled packets with a wrong checksum once NAT has touched them.

    `release` as `uname -r` prints it. Fixed in Linux 5.7 and in 5.6.13, 5.4.41, 4.19.123 and 4.14.181.

    Decision: a distribution's own fix does not show in the release (`5.4.0-42-generic` has it), so such a
    kernel counts as broken: without the offload packets cost more, with it they may not arrive.
    """
    found = _RELEASE.match(release)
    if found is None:
        return False
    major, minor, patch = (int(part or 0) for part in found.groups())
    fixed = _NAT_FIXED.get((major, minor))
    return (major, minor) < (5, 7) and (fixed is None or patch < fixed)


def _mac(attrs: Attributes, version: int) -> str:
    """The VTEP MAC that a lease publishes for a family, empty if there is none or it is no unicast MAC."""
    return _mac_of(attrs.backend_data if version == 4 else attrs.backend_v6_data)


# Every pass asks for the same texts, one for each peer and family.
@lru_cache(maxsize=1 << 16)
def _mac_of(text: str) -> str:
    try:
        mac = gojson.typed(gojson.load_object(text or "{}"), "VtepMAC", str, "").lower()
    except gojson.GoJsonError:
        return ""
    unicast = _MAC.match(mac) and not int(mac[:2], 16) & 1
    # All zeros would be the device's default destination: one bad peer would get everybody's stray frames.
    return mac if unicast and mac.strip("0:") else ""


def _random_mac() -> str:
    """A locally administered unicast MAC, made as upstream makes it."""
    raw = bytearray(secrets.token_bytes(6))
    raw[0] = (raw[0] & 0xFE) | 0x02
    return raw.hex(":")
