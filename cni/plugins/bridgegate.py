"""The host as the pods' gateway: addresses on the bridge, and forwarding."""

from __future__ import annotations

from cni.errors import INTERNAL, CniError
from cni.net import rtlink
from cni.plugins.bridgeport import ensure_vlan_link
from cni.plugins.links import EEXIST, addresses, ensure, expect, ports
from cni.spec.address import Cidr, parse_cidr, parse_ip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Host
    from cni.net.rtlink import LinkState
    from cni.plugins.bridgeconf import BridgeConf
    from cni.spec import gojson

FORWARDING = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}


class Gateway:
    """The gateway of one pod's networks. `port` is that pod's, a port of `bridge`."""

    __slots__ = ("_bridge", "_conf", "_host", "_link", "_port")

    def __init__(self, host: Host, conf: BridgeConf, bridge: LinkState, port: LinkState) -> None:
        """Raises CniError if the interface of the VLAN cannot be made."""
        self._host = host
        self._conf = conf
        self._bridge = bridge
        self._port = port
        self._link = ensure_vlan_link(host, conf, bridge) if conf.vlan else bridge

    @property
    def vlan_link(self) -> LinkState | None:
        """The interface that has the addresses, if that is not the bridge."""
        return self._link if self._conf.vlan else None

    def set_up(self, ips: list[gojson.Object]) -> None:
        """Put the gateways of `ips` on the link, IPv4 first, and switch forwarding on. Raises CniError."""
        wanted = [gateway_of(ip) for ip in ips]
        for family, setting in FORWARDING.items():
            mine = [cidr for cidr in wanted if cidr.family == family]
            if mine:
                self._ensure_addresses(family, mine)
                ensure(self._host.sysctl(setting), "1", "enable forwarding")

    @property
    def _failed(self) -> str:
        where = "vlan interface for bridge with addr" if self._conf.vlan else "bridge addr"
        return f"failed to set {where}"

    def _ensure_addresses(self, family: int, wanted: list[Cidr]) -> None:
        present = [one.cidr for one in addresses(self._host.route, family, self._link)]
        for cidr in wanted:
            if cidr in present:
                continue
            clashes = [one for one in present if family == 4 or _overlap(one, cidr)]
            if clashes:
                self._replace(clashes, cidr)
                present = [one for one in present if one not in clashes]
            self._add(cidr)

    def _add(self, cidr: Cidr) -> None:
        link, detect = self._link, self._conf.detect_duplicates
        # Its MAC is set to what it is: a bridge that nobody gave one changes it as ports come and go.
        added, pinned = self._host.route.transact(
            [
                rtlink.add_address(link.ifindex, cidr, detect_duplicates=detect),
                rtlink.set_link(link.ifindex, mac=link.mac),
            ]
        )
        if added.errno not in (0, EEXIST):
            hint = self._why_no_ipv6() if cidr.family == 6 else ""
            text = f'{self._failed}: could not add IP address to "{link.name}": {added.reason}{hint}'
            raise CniError(INTERNAL, text)
        expect(pinned, f"{self._failed}: could not set bridge's mac")

    def _replace(self, clashes: list[Cidr], wanted: Cidr) -> None:
        """Remove addresses that `wanted` cannot stand beside: if so asked, or if no other pod needs them."""
        name, listed = self._link.name, ", ".join(map(str, clashes))
        others = [one for one in ports(self._host.route, self._bridge) if one.name != self._port.name]
        if others and not self._conf.force_address:
            text = f'{self._failed}: "{name}" already has an IP address different from {wanted}'
            details = (
                f"it has {listed}, and {len(others)} ports of other pods; "
                f"stop those pods, or set forceAddress, or delete {name}"
            )
            raise CniError(INTERNAL, text, details)
        self._host.note(f"bridge: {wanted} takes the place of {listed} on {name}")
        for clash in clashes:
            answer = self._host.route.request(*rtlink.drop_address(self._link.ifindex, clash))
            expect(answer, f'{self._failed}: could not remove IP address from "{name}"')

    def _why_no_ipv6(self) -> str:
        name = self._link.name
        try:
            disabled = self._host.sysctl(f"ipv6/conf/{name}/disable_ipv6").read() == "1"
        except OSError:
            return "; this host has no IPv6"
        return f"; IPv6 is switched off: sysctl net.ipv6.conf.{name}.disable_ipv6=0" if disabled else ""


def gateway_of(ip: gojson.Object) -> Cidr:
    """The gateway of one of a result's `ips`, with the prefix length of its network."""
    family, value = parse_ip(str(ip["gateway"]))
    return Cidr(family, value, parse_cidr(str(ip["address"])).prefix)


def _overlap(one: Cidr, other: Cidr) -> bool:
    prefix = min(one.prefix, other.prefix)
    return Cidr(6, one.value, prefix).network() == Cidr(6, other.value, prefix).network()
