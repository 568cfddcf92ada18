"""CHECK of the bridge plugin: is what prevResult tells of still there, and set up as the netconf wants it?

Upstream's comparisons come first, in its order and words. Those that it lacks follow: port flags, link state,
MTU, the gateway's address and forwarding, rules. What a chained plugin may have changed is not looked at:
further addresses and routes, other rules, a smaller MTU of the container's end.
"""

from __future__ import annotations

from cni.errors import INTERNAL, CniError
from cni.net import rtlink
from cni.net.rtlink import LinkState, RouteState
from cni.plugins.bridgegate import FORWARDING, gateway_of
from cni.plugins.links import addresses, objects
from cni.spec import gojson, result, version
from cni.spec.address import Cidr, parse_cidr, parse_ip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Host, Netns
    from cni.net.nlsocket import NetlinkSocket
    from cni.plugins.bridgeconf import BridgeConf
    from cni.spec.request import Request


def check(host: Host, netns: Netns, request: Request, conf: BridgeConf) -> None:
    """Raises CniError 999 that names the first difference."""
    if conf.prev_result is None:
        raise CniError(INTERNAL, "Required prevResult missing")
    made = _parse_prev(conf, request.version)
    listed = result.interfaces(made)
    wanted_bridge = next((one for one in listed if one.get("name") == conf.bridge), {})
    wanted_link = result.interface(made, request.ifname, request.netns)
    bridge = _check_bridge(host, wanted_bridge, conf)
    if wanted_link is None:
        text = f"Sandbox in prevResult  doesn't match configured netns: {request.netns}"
        raise CniError(INTERNAL, text)
    link = _check_container_link(netns, wanted_link, conf)
    others = [one for one in listed if one.get("name") not in (conf.bridge, request.ifname)]
    port = _check_port(host, others, bridge, link, conf)
    cidrs = [parse_cidr(str(one["address"])) for one in objects(made, "ips")]
    routes = [RouteState(m.body) for family in (4, 6) for m in netns.route.dump(*rtlink.get_routes(family))]
    _check_addresses(netns, link, cidrs, routes)
    _check_routes(objects(made, "routes"), routes)
    _check_state(link, port, conf)
    if conf.gateway:
        _check_gateways(host, bridge, made, conf)
    if conf.masquerade:
        from cni.plugins import masq

        masq.check(host, conf.name, request.container_id, request.ifname, cidrs, conf.masquerade_backend)
    if conf.mac_spoof_check:
        from cni.plugins import macspoof

        macspoof.check(host, request.container_id, request.ifname, port.name, link.mac)


def _parse_prev(conf: BridgeConf, wanted: str) -> gojson.Object:
    try:
        known = result.parse(conf.prev_result or {}, wanted or version.ABSENT)
        result.check_family(str(known["cniVersion"]), wanted)
        return result.convert(known, "1.0.0")
    except result.ResultError as exc:
        raise CniError(INTERNAL, f"could not parse prevResult: {exc}") from None


def _find(route: NetlinkSocket, wanted: gojson.Object) -> LinkState:
    name = wanted.get("name")
    if not isinstance(name, str) or not name:
        raise CniError(INTERNAL, "Interface name missing ")
    answer = route.request(*rtlink.get_link(name))
    if not answer.messages:
        raise CniError(INTERNAL, f"Interface name {name} not found")
    return LinkState(answer.messages[0].body)


def _check_bridge(host: Host, wanted: gojson.Object, conf: BridgeConf) -> LinkState:
    bridge = _find(host.route, wanted)
    if wanted.get("sandbox"):
        raise CniError(INTERNAL, f"Interface {bridge.name} should not be in sandbox")
    if bridge.kind != "bridge":
        raise CniError(INTERNAL, f"Interface {bridge.name} does not have link type of bridge")
    if wanted.get("mac") not in (None, "", bridge.mac):
        text = f"Bridge interface {bridge.name} Mac doesn't match: {wanted['mac']}"
        raise CniError(INTERNAL, text)
    if bool(bridge.promiscuity) != conf.promiscuous:
        states = [str(state).lower() for state in (conf.promiscuous, bool(bridge.promiscuity))]
        text = f"Bridge interface {bridge.name} configured Promisc Mode {states[0]} "
        raise CniError(INTERNAL, f"{text}doesn't match current state: {states[1]} ")
    return bridge


def _check_container_link(netns: Netns, wanted: gojson.Object, conf: BridgeConf) -> LinkState:
    link = _find(netns.route, wanted)
    if link.kind != "veth":
        raise CniError(INTERNAL, f"Error: Container interface {link.name} not of type veth")
    if wanted.get("mac") not in (None, "", link.mac):
        text = f"Interface {link.name} Mac {wanted['mac']} doesn't match container Mac: {link.mac}"
        raise CniError(INTERNAL, text)
    return link


def _check_port(
    host: Host, listed: list[gojson.Object], bridge: LinkState, link: LinkState, conf: BridgeConf
) -> LinkState:
    """The host end of the container's link."""
    for wanted in listed:
        port = _find(host.route, wanted)
        if wanted.get("sandbox"):
            raise CniError(INTERNAL, f"Interface {port.name} should not be in sandbox")
        if port.kind != "veth" or port.ifindex != link.peer or link.ifindex != port.peer:
            continue
        if port.master != bridge.ifindex:
            continue
        if wanted.get("mac") not in (None, "", port.mac):
            text = f"Interface {port.name} Mac doesn't match: {wanted['mac']} not found"
            raise CniError(INTERNAL, text)
        return port
    raise CniError(INTERNAL, f"CNI veth created for bridge {conf.bridge} was not found")


def _check_addresses(netns: Netns, link: LinkState, wanted: list[Cidr], routes: list[RouteState]) -> None:
    present = [one.cidr for one in addresses(netns.route, 0, link)]
    for cidr in wanted:
        if cidr not in present:
            raise CniError(INTERNAL, f"Failed to match addr {cidr} on interface {link.name}")
        if not any(route.dst == cidr.network() for route in routes):
            text = f"Failed to find route for {cidr.network()} on interface {link.name}"
            raise CniError(INTERNAL, text)


def _check_routes(wanted: list[gojson.Object], routes: list[RouteState]) -> None:
    for one in wanted:
        dst = parse_cidr(str(one["dst"])).network()
        gateway = parse_ip(str(one["gw"])) if one.get("gw") else None
        table = one.get("table")
        if not any(
            route.dst == dst
            and gateway in (None, route.gateway)
            and (not isinstance(table, int | float) or int(table) in (0, route.table))
            for route in routes
        ):
            shown = f"{{Dst:{one['dst']} GW:{one.get('gw', '')}}}"
            raise CniError(INTERNAL, f"Expected Route {shown} not found in routing table")


def _check_state(link: LinkState, port: LinkState, conf: BridgeConf) -> None:
    """What upstream does not compare: flags of the port, MTU, whether the links are up."""
    for name, has, wanted in (
        ("hairpinMode", port.hairpin, conf.hairpin),
        ("portIsolation", port.isolated, conf.isolated),
    ):
        if has != wanted:
            states = [str(state).lower() for state in (wanted, has)]
            text = f"Interface {port.name} has {name} {states[1]}, configured is {states[0]}"
            raise CniError(INTERNAL, text)
    if conf.mtu and port.mtu != conf.mtu:
        raise CniError(INTERNAL, f"Interface {port.name} has MTU {port.mtu}, configured is {conf.mtu}")
    if conf.mtu and link.mtu > conf.mtu:
        raise CniError(INTERNAL, f"Interface {link.name} has MTU {link.mtu}, configured is {conf.mtu}")
    for one in (port,) if conf.interface_down else (port, link):
        if not one.up:
            raise CniError(INTERNAL, f"Interface {one.name} is down")


def _check_gateways(host: Host, bridge: LinkState, made: gojson.Object, conf: BridgeConf) -> None:
    """The gateway's addresses on the bridge (or the VLAN's interface), and forwarding."""
    link = _find(host.route, {"name": f"{bridge.name}.{conf.vlan}"}) if conf.vlan else bridge
    if not link.up:
        raise CniError(INTERNAL, f"Interface {link.name} is down")
    present = [one.cidr for one in addresses(host.route, 0, link)]
    for ip in objects(made, "ips"):
        if not ip.get("gateway"):
            continue
        wanted = gateway_of(ip)
        if wanted not in present:
            raise CniError(INTERNAL, f"Failed to match addr {wanted} on interface {link.name}")
        setting = host.sysctl(FORWARDING[wanted.family])
        try:
            value_now = setting.read()
        except OSError as exc:
            value_now = (exc.strerror or str(exc)).lower()
        if value_now == "0":
            raise CniError(INTERNAL, f"forwarding is off: {setting.name} is 0, must be 1")
