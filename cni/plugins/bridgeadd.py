"""ADD of the bridge plugin, step by step, and the way back.

The order is upstream's: bridge, veth pair, rules against spoofing, address, container, gateway, masquerade.
Each netlink message that is left out or sent together with another is time off every pod's start:

    host        is there a bridge?   its addresses     both only if the last ADD does not know (`KnownBridge`)
    host        veth pair, up, port of the bridge, its flags; bridge and addresses are as they were?
    container   addresses, link up, routes: one batch
                then the answer
    host        the port's setting, forwarding; is the port up?
    container   the addresses announced

Decision: after the answer comes what nobody relies on within a millisecond, and what may be done beside the
next plugin of the chain. Both ends of the pair are up by then, and so is the port; but the kernel has not
told the bridge yet. Upstream waits for that, and fails when it does not come; here it is logged.
"""

from __future__ import annotations

import time

from cni.errors import INTERNAL, INVALID_CONFIG, CniError, KernelError
from cni.net import rtlink
from cni.net.rtlink import IFA_F_DADFAILED, IFA_F_TENTATIVE, AddressState
from cni.plugins.bridgegate import Gateway, gateway_of
from cni.plugins.bridgeport import Changed, await_port, ensure_bridge, plug
from cni.plugins.ipam import Ipam
from cni.plugins.links import carry_out, ensure, expect, find, objects, ports, put, random_mac, try_write
from cni.spec.address import Cidr, format_ip, parse_cidr, parse_ip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.host import Host, Netns
    from cni.ipam.ranges import Address
    from cni.net.nlmsg import Message as NetlinkMessage
    from cni.net.nlmsg import Request as Message
    from cni.net.rtlink import LinkState
    from cni.plugins.bridgeconf import BridgeConf
    from cni.plugins.bridgeport import KnownBridge, Port
    from cni.spec import gojson
    from cni.spec.request import Request

_SETTLE_S, _FIRST_PAUSE_S = 5.0, 0.001
_PROBE_S, _PROBES_S = 0.05, 0.5  # the pods' time to answer, and the time for all that are asked one by one


class Attachment:
    """One container's interface while it is made. `make` once; after a failure `undo`."""

    def __init__(self, host: Host, request: Request, conf: BridgeConf) -> None:
        """Raises CniError if the IPAM plugin is missing, Declined if it cannot be executed here."""
        self._host = host
        self._request = request
        self._conf = conf
        self._users = Users(host, conf.bridge)
        self._ipam = Ipam(host, conf.ipam_type, request, self._users) if conf.ipam_type else None
        self._gateway: Gateway | None = None
        self._veth = ""
        self._allotted: gojson.Object | None = None
        self._addresses: list[Cidr] = []
        self._rules: list[str] = []

    def make(self) -> gojson.Object:
        """Attach; the result in its current form. Raises CniError or KernelError."""
        known = self._known()
        if known is not None:
            try:
                return self._make(known.link, known)
            except Changed:
                self._host.bridges.pop(self._conf.bridge, None)
        return self._make(ensure_bridge(self._host, self._conf), None)

    def _known(self) -> KnownBridge | None:
        """What is known of the bridge, unless this ADD needs more of it."""
        conf = self._conf
        if self._ipam is None or conf.promiscuous or conf.vlan or not conf.gateway:
            return None
        return self._host.bridges.get(conf.bridge)

    def _make(self, bridge: LinkState, known: KnownBridge | None) -> gojson.Object:
        """Raises Changed if `known` is wrong, or not enough."""
        conf = self._conf
        netns = self._host.netns(self._request.netns)
        if self._ipam is not None and conf.gateway:
            gateways = self._ipam.gateways()
            conf.check_mtu(any([cidr.family == 6 for cidr in gateways]))
            if known is not None and not known.gateways.issuperset(gateways):
                raise Changed
            self._gateway = Gateway(self._host, conf, bridge, known)
            if known is None:
                self._gateway.set_up(gateways)
        mac = conf.mac or random_mac()
        port = plug(self._host, conf, bridge, netns, self._request.ifname, mac, known)
        self._veth = self._users.own_port = port.name
        self._users.link = bridge
        interfaces: list[gojson.Object] = [
            {"name": bridge.name, "mac": bridge.mac},
            {"name": port.name, "mac": port.mac},
            {"name": self._request.ifname, "mac": mac, "sandbox": self._request.netns},
        ]
        made: gojson.Object = {"cniVersion": "1.0.0", "interfaces": interfaces}
        if conf.mac_spoof_check:
            from cni.plugins import macspoof

            self._rules.append("macspoof")
            macspoof.add(self._host, self._request.container_id, self._request.ifname, port.name, mac)
        if self._ipam is not None:
            self._allotted = self._ipam.add()
            self._addresses = [parse_cidr(str(one["address"])) for one in objects(self._allotted, "ips")]
            made |= self._layer3(netns, port, interfaces)
        elif not conf.interface_down:
            name = self._request.ifname
            expect(netns.route.request(*rtlink.set_link(port.peer, up=True)), f'failed to set "{name}" up')
        self._host.afterwards(lambda: self._announce(bridge, netns, port, mac))
        dns = made.pop("dns", None)
        if conf.dns is not None:
            dns = conf.dns
        return {**made, "dns": dns} if dns else made

    def undo(self) -> None:
        """Take back what `make` has done so far; what fails is left to the DEL to come, and noted."""
        host, request = self._host, self._request
        if self._veth:
            self._try(lambda: host.delete_link(host.route, self._veth))
        if self._ipam is not None and self._allotted is not None:
            ipam, allotted = self._ipam, self._allotted
            self._try(lambda: ipam.undo(allotted))
        if "macspoof" in self._rules:
            from cni.plugins import macspoof

            self._try(lambda: macspoof.remove(host, request.container_id, request.ifname))
        if "masq" in self._rules:
            from cni.plugins import masq

            self._try(lambda: masq.remove(host, self._conf.name, request.container_id, request.ifname))

    def _try(self, step: Callable[[], object]) -> None:
        try:
            step()
        except (CniError, KernelError) as exc:
            self._host.note(f"bridge: undoing the failed ADD failed too, DEL will do it: {exc}")

    # ---- addresses and routes

    @property
    def _has_ipv6(self) -> bool:
        return any([cidr.family == 6 for cidr in self._addresses])

    def _layer3(self, netns: Netns, port: Port, interfaces: list[gojson.Object]) -> gojson.Object:
        """Configure what IPAM allotted; the members of the result that come of it."""
        conf, allotted = self._conf, self._allotted or {}
        if not self._addresses:
            raise CniError(INTERNAL, "IPAM plugin returned missing IP config")
        conf.check_mtu(self._has_ipv6)
        ips = [self._with_gateway(one) for one in objects(allotted, "ips")]
        routes = self._with_default_routes(objects(allotted, "routes"), ips)
        self._configure(netns, port.peer, ips, routes)
        if self._gateway is not None:
            gateways = [gateway_of(ip) for ip in ips]
            self._gateway.set_up(gateways, port.name)
            extra = self._gateway.vlan_link
            if extra is not None:
                interfaces.append({"name": extra.name, "mac": extra.mac})
            else:
                self._learn(self._gateway, gateways, port.name)
        if conf.masquerade:
            from cni.plugins import masq

            self._rules.append("masq")
            request = self._request
            masq.add(
                self._host,
                conf.name,
                request.container_id,
                request.ifname,
                port.name,
                self._addresses,
                conf.masquerade_backend,
            )
        made: gojson.Object = {"ips": ips}
        if routes:
            made["routes"] = routes
        if allotted.get("dns"):
            made["dns"] = allotted["dns"]
        return made

    def _learn(self, gateway: Gateway, gateways: list[Cidr], own_port: str) -> None:
        """Spare the next ADD what this one found out, or look after the answer whether it still holds.

        That is for what the kernel's confirmation leaves open: forwarding, an IPv6 address of another prefix
        length, an address that was there only because another ADD tried it.
        """
        bridges, name = self._host.bridges, self._conf.bridge
        if bridges.get(name) is None:
            bridges[name] = gateway.learned(gateways)
            return

        def look_again() -> None:
            try:
                gateway.set_up_again(gateways, own_port)
            except (CniError, KernelError):
                bridges.pop(name, None)
                raise

        self._host.afterwards(look_again)

    def _with_gateway(self, ip: gojson.Object) -> gojson.Object:
        """The address with the index of the container's interface, and a gateway if the bridge is one."""
        gateway = ip.get("gateway")
        if not gateway and self._conf.gateway:
            network = parse_cidr(str(ip["address"])).network()
            gateway = format_ip(network.family, network.value + 1)
        made: gojson.Object = {"interface": 2, "address": ip["address"]}
        return {**made, "gateway": gateway} if gateway else made

    def _with_default_routes(
        self, routes: list[gojson.Object], ips: list[gojson.Object]
    ) -> list[gojson.Object]:
        """The routes, and one to everywhere for each family that has none with a gateway, if so wanted."""
        if not self._conf.default_gateway:
            return routes
        made = list(routes)
        for ip in ips:
            anywhere = "::/0" if ":" in str(ip["address"]) else "0.0.0.0/0"
            if not any(route["dst"] == anywhere and route.get("gw") for route in made):
                made.append({"dst": anywhere, "gw": ip["gateway"]})
        return made

    def _configure(
        self, netns: Netns, ifindex: int, ips: list[gojson.Object], routes: list[gojson.Object]
    ) -> None:
        """Addresses, link up, routes: one batch, the settings before it."""
        ifname, detect = self._request.ifname, self._conf.detect_duplicates
        self._write_settings(netns)
        steps = [rtlink.add_address(ifindex, cidr, detect_duplicates=detect) for cidr in self._addresses]
        texts = [f'failed to add IP addr {ip["address"]} to "{ifname}"' for ip in ips]
        steps.append(rtlink.start(ifindex))
        texts.append(f'failed to set "{ifname}" UP')
        if detect and self._has_ipv6:
            self._carry_out(netns, steps, texts)
            self._settle(netns, ifindex)
            steps, texts = [], []
        for route, text in _route_steps(ifname, ifindex, ips, routes):
            steps.append(route)
            texts.append(text)
        self._carry_out(netns, steps, texts)

    def _carry_out(self, netns: Netns, steps: list[Message], texts: list[str]) -> None:
        """Send all at once. With IPv6 addresses what is refused is tried again with IPv6 switched on.

        That is mostly on, so nobody looks before.
        """
        answers = netns.route.transact(steps)
        refused = [place for place, answer in enumerate(answers) if answer.errno]
        if refused and self._has_ipv6:
            _enable_ipv6(netns, self._request.ifname)
            carry_out(netns.route, [steps[place] for place in refused], [texts[place] for place in refused])
        elif refused:
            expect(answers[refused[0]], texts[refused[0]])

    def _write_settings(self, netns: Netns) -> None:
        ifname = self._request.ifname
        if self._conf.detect_duplicates:
            try_write(netns.ipv6_setting(ifname, "enhanced_dad"), "1")
        try_write(netns.ipv6_setting(ifname, "accept_dad"), "1" if self._conf.detect_duplicates else "0")
        if not self._has_ipv6:
            return
        try_write(netns.ipv6_setting(ifname, "ndisc_notify"), "1")
        put(netns.ipv6_setting(ifname, "keep_addr_on_down"), "1", f"keep the addresses of {ifname}")
        _enable_ipv6(netns, "lo")

    def _settle(self, netns: Netns, ifindex: int) -> None:
        """Wait for the end of duplicate address detection; raises CniError with upstream's words."""
        name = self._request.ifname
        deadline, pause = time.monotonic() + _SETTLE_S, _FIRST_PAUSE_S
        while True:
            messages = netns.route.dump(*rtlink.get_addresses(6, ifindex))
            mine = [one for one in map(_address, messages) if one.ifindex == ifindex]
            failed = [one for one in mine if one.flags & IFA_F_DADFAILED]
            if failed:
                text = f'failed to settle addresses for "{name}": link {name} has address '
                raise CniError(INTERNAL, f"{text}{str(failed[0].cidr).partition('/')[0]} in DADFAILED state")
            if not any(one.flags & IFA_F_TENTATIVE for one in mine):
                return
            if time.monotonic() > deadline:
                text = f"link {name} still has tentative addresses after 10 seconds"
                raise CniError(INTERNAL, f'failed to settle addresses for "{name}": {text}')
            time.sleep(pause)
            pause = min(pause * 2, 0.02)

    def _announce(self, bridge: LinkState, netns: Netns, port: Port, mac: str) -> None:
        """Tell the other pods and the host which MAC the addresses, once others' perhaps, have now.

        All is up by then. That the port is, as the bridge sees it, the kernel finds out a moment later, or at
        once when it is asked.

        The kernel does that itself (gratuitous ARP, unsolicited neighbour advertisement) when a link gets a
        MAC, even the one that it has; but not all that it says when the link comes up passes the bridge.
        """
        if self._conf.interface_down:
            return
        await_port(self._host, port)
        now = netns.route.request(*rtlink.get_link(ifindex=port.peer))
        # The next plugin of the chain, or the pod, may have given it another.
        if not self._addresses or not any(rtlink.mac_of(message.body) == mac for message in now.messages):
            return
        netns.route.request(*rtlink.set_link(port.peer, mac=mac))
        known = [cidr for cidr in self._addresses if (cidr.family, cidr.value) in self._users.known]
        self._host.route.transact([rtlink.put_neighbour(bridge.ifindex, cidr, mac) for cidr in known])


class Users:
    """Who is there to have an address: the pods at a bridge.

    `own_port` is that of the pod to come, `link` the bridge. `known` are those of the addresses asked for,
    as (family, value), of which the host knows something.
    """

    __slots__ = ("_bridge", "_deadline", "_host", "known", "link", "own_port")

    def __init__(self, host: Host, bridge: str) -> None:
        self._host = host
        self._bridge = bridge
        self._deadline = 0.0
        self.own_port = ""
        self.link: LinkState | None = None
        self.known: set[tuple[int, int]] = set()

    def have(self, addresses: list[str]) -> set[str]:
        """Those that one of them has; all of them when that cannot be told."""
        bridge = find(self._host.route, self._bridge)
        if bridge is None or not any(port.name != self.own_port for port in ports(self._host.route, bridge)):
            return set()
        found = self._answering(bridge, addresses)
        return set(addresses) if found is None else found

    def are_known_to_have(self, address: Address) -> bool:
        """Whether the host has heard lately from somebody who has the address, and he still answers.

        A look at what the host knows costs next to nothing; nobody is asked unless there is reason to.
        """
        if self.link is None:
            return False
        known = self._host.route.request(*rtlink.get_neighbour(self.link.ifindex, Cidr(*address, 0)))
        if known.messages:
            self.known.add(address)
        if not any(rtlink.is_reached(message.body) for message in known.messages):
            return False
        now = time.monotonic()
        self._deadline = self._deadline or now + _PROBES_S
        return now < self._deadline and bool(self._answering(self.link, [format_ip(*address)]))

    def _answering(self, bridge: LinkState, addresses: list[str]) -> set[str] | None:
        from cni.net.probe import answering

        cidrs = {Cidr(*parse_ip(text), 0): text for text in addresses}
        try:
            return {cidrs[one] for one in answering(self._bridge, bridge.mac, list(cidrs), _PROBE_S)}
        except OSError as exc:
            self._host.note(f"bridge: cannot ask the pods at {self._bridge} for addresses: {exc.strerror}")
            return None


def _enable_ipv6(netns: Netns, ifname: str) -> None:
    ensure(netns.ipv6_setting(ifname, "disable_ipv6"), "0", f"enable IPv6 for interface {ifname}")


def _route_steps(
    ifname: str, ifindex: int, ips: list[gojson.Object], routes: list[gojson.Object]
) -> list[tuple[Message, str]]:
    """A message for each route that differs from those before it, and the words for its refusal."""
    first: dict[int, tuple[int, int]] = {}
    for ip in ips:
        if ip.get("gateway"):
            gateway = parse_ip(str(ip["gateway"]))
            first.setdefault(gateway[0], gateway)
    steps, seen = [], set()
    for route in routes:
        dst = parse_cidr(str(route["dst"])).network()
        via = parse_ip(str(route["gw"])) if route.get("gw") else first.get(dst.family)
        table, priority, scope = map(_number, map(route.get, ("table", "priority", "scope")))
        if not (0 <= priority < 1 << 32 and 0 <= table < 1 << 32 and 0 <= scope < 1 << 8):
            raise CniError(
                INVALID_CONFIG,
                f"route {route['dst']}: priority {priority} and table {table} must be from 0 to 4294967295, "
                f"scope {scope} from 0 to 255",
            )
        key = (dst, via, table, priority)
        if key in seen:
            continue
        seen.add(key)
        shown = "<nil>" if via is None else format_ip(*via)
        text = f"failed to add route '{route['dst']} via {shown} dev {ifname}'"
        steps.append((rtlink.add_route(ifindex, dst, via, priority, table, scope), text))
    return steps


def _address(message: NetlinkMessage) -> AddressState:
    return AddressState(message.body)


def _number(value: object) -> int:
    return int(value) if isinstance(value, int | float) else 0
