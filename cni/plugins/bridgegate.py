"""The host as the pods' gateway: addresses on the bridge, and forwarding."""

from __future__ import annotations

from cni.errors import INTERNAL, CniError
from cni.net import rtlink
from cni.net.rtlink import LinkState
from cni.plugins.bridgeport import KnownBridge, ensure_vlan_link
from cni.plugins.links import EEXIST, NamespaceLock, addresses, ensure, expect, ports
from cni.spec.address import Cidr, parse_cidr, parse_ip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Host
    from cni.plugins.bridgeconf import BridgeConf
    from cni.spec import gojson

FORWARDING = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}


class Gateway:
    """The gateway of one pod's networks."""

    __slots__ = ("_bridge", "_conf", "_forwarding", "_host", "_known", "_link", "_present")

    def __init__(
        self, host: Host, conf: BridgeConf, bridge: LinkState, known: KnownBridge | None = None
    ) -> None:
        """What is `known` of the bridge is yet to be confirmed. Raises CniError."""
        self._host = host
        self._conf = conf
        self._bridge = bridge
        self._link = ensure_vlan_link(host, conf, bridge) if conf.vlan else bridge
        self._known = known
        self._present: dict[int, list[Cidr]] = {}
        self._forwarding: set[int] = set()  # families for which it is on

    @property
    def vlan_link(self) -> LinkState | None:
        """The interface that has the addresses, if that is not the bridge."""
        return self._link if self._conf.vlan else None

    def set_up(self, wanted: list[Cidr], own_port: str = "") -> None:
        """Put gateways on the link, IPv4 first, and switch forwarding on; repeated it costs nothing.

        `own_port` is the port of the pod itself, once it is there. Raises CniError.
        """
        if self._known is not None and self._known.gateways.issuperset(wanted):
            return
        for family, setting in FORWARDING.items():
            mine = [cidr for cidr in wanted if cidr.family == family]
            missing = [cidr for cidr in mine if cidr not in self._addresses(family)]
            for cidr in missing:
                self._put(cidr, own_port)
            if mine and family not in self._forwarding:
                ensure(self._host.sysctl(setting), "1", "enable forwarding")
                self._forwarding.add(family)

    def learned(self, gateways: list[Cidr]) -> KnownBridge:
        """What the next pod's ADD need not find out: those gateways, which are set up."""
        return KnownBridge(self._link, frozenset(gateways))

    def set_up_again(self, wanted: list[Cidr], own_port: str) -> None:
        """`set_up` that takes nothing for known."""
        self._known = None
        self._present.clear()
        self._forwarding.clear()
        self.set_up(wanted, own_port)

    @property
    def _failed(self) -> str:
        where = "vlan interface for bridge with addr" if self._conf.vlan else "bridge addr"
        return f"failed to set {where}"

    def _addresses(self, family: int) -> list[Cidr]:
        """What the link had when it was last looked at."""
        if family not in self._present:
            found = addresses(self._host.route, family, self._link)
            self._present[family] = [one.cidr for one in found]
        return self._present[family]

    def _put(self, cidr: Cidr, own_port: str) -> None:
        """Give the link an address, in the place of those that it cannot stand beside."""
        self._present.pop(cidr.family, None)  # of what is known some may be left out
        if not self._clashes(cidr):
            self._add(cidr)
            return
        # Of pods that start together on a new subnet the first replaces the address, before any is a port.
        with NamespaceLock():
            self._present.pop(cidr.family)
            clashes = self._clashes(cidr)
            if clashes:
                self._replace(clashes, cidr, own_port)
            if cidr not in self._addresses(cidr.family):
                self._add(cidr)

    def _clashes(self, wanted: Cidr) -> list[Cidr]:
        """The addresses that `wanted` cannot stand beside: any of IPv4, those of IPv6 that overlap."""
        present = self._addresses(wanted.family)
        if wanted in present:
            return []
        return [one for one in present if wanted.family == 4 or _overlap(one, wanted)]

    def _replace(self, clashes: list[Cidr], wanted: Cidr, own_port: str) -> None:
        """Remove addresses that are in the way: if it was asked for, or no other pod needs them."""
        name, listed = self._link.name, ", ".join(map(str, clashes))
        mine = {own_port, *self._vlan_port()}
        others = [one for one in ports(self._host.route, self._bridge) if one.name not in mine]
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
            self._present[wanted.family].remove(clash)

    def _vlan_port(self) -> list[str]:
        """The other end of the VLAN's interface, which is a port as well."""
        if not self._conf.vlan:
            return []
        answer = self._host.route.request(*rtlink.get_link(ifindex=self._link.peer))
        return [LinkState(message.body).name for message in answer.messages]

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
        self._addresses(cidr.family).append(cidr)

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
