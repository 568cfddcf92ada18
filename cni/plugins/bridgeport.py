"""The bridge, and the veth pair between it and a container."""

from __future__ import annotations

import time

from cni.errors import INTERNAL, CniError, KernelError
from cni.net import rtlink
from cni.net.rtlink import LinkState
from cni.plugins.links import (
    EEXIST,
    carry_out,
    expect,
    find,
    must_find,
    random_mac,
    random_port,
    try_write,
)
from cni.spec import gojson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Host, Netns
    from cni.net.nlmsg import Request as Message
    from cni.net.nlsocket import Answer
    from cni.plugins.bridgeconf import BridgeConf
    from cni.spec.address import Cidr

_NAME_TRIES = 10
_DEFAULT_VLAN = 1
_NO_MAC = "00:00:00:00:00:00"
_PORT_UP_S, _FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 0.001, 0.05


class Port:
    """The host's end of a veth pair, and the index of the other one."""

    __slots__ = ("ifindex", "mac", "name", "peer")

    def __init__(self, name: str, mac: str, ifindex: int, peer: int) -> None:
        self.name = name
        self.mac = mac
        self.ifindex = ifindex
        self.peer = peer


class Changed(Exception):
    """The bridge is not what it was for the last pod; nothing of this one is left."""


class KnownBridge:
    """A bridge as the last pod's ADD left it, with the gateways on it; their families are forwarded.

    The next ADD does not ask for all that again, and then make its veth pair: it makes it, and has the kernel
    confirm the rest in the same message.
    """

    __slots__ = ("gateways", "link", "questions")

    def __init__(self, link: LinkState, gateways: frozenset[Cidr]) -> None:
        self.link = link
        self.gateways = gateways
        # Give the bridge addresses that it has: what the kernel refuses is there.
        self.questions: list[Message] = [rtlink.add_address(link.ifindex, cidr) for cidr in gateways]

    def confirm(self, host: Host, answers: list[Answer], after: Answer) -> None:
        """Raise Changed unless all is as it was, by the answers to the questions and one about the link."""
        is_same = any([rtlink.is_still(message.body, self.link) for message in after.messages])
        if is_same and all([one.errno == EEXIST for one in answers]):
            return
        missing = [cidr for cidr, one in zip(self.gateways, answers, strict=True) if one.errno == 0]
        # Whether they may stand beside what else is there is yet to be seen.
        host.route.transact([rtlink.drop_address(self.link.ifindex, cidr) for cidr in missing])
        raise Changed


def ensure_bridge(host: Host, conf: BridgeConf) -> LinkState:
    """The bridge, made if need be; of one that was there the attributes are left as they are."""
    failed = f"failed to create bridge {gojson.dumps(conf.bridge)}"
    bridge = find(host.route, conf.bridge)
    if bridge is None:
        wanted = rtlink.make_bridge(conf.bridge, random_mac(), conf.mtu, conf.vlan_filtering)
        answer = host.route.request(*wanted)
        if answer.errno not in (0, EEXIST):  # another pod's ADD makes it at this moment
            raise CniError(INTERNAL, f'{failed}: could not add "{conf.bridge}": {answer.reason}')
        bridge = must_find(host.route, conf.bridge, f'{failed}: could not lookup "{conf.bridge}"')
        # Routes of this link are ours to give.
        try_write(host.sysctl(f"ipv6/conf/{conf.bridge}/accept_ra"), "0")
    if bridge.kind != "bridge":
        raise CniError(INTERNAL, f'{failed}: "{conf.bridge}" already exists but is not a bridge')
    mac = random_mac() if bridge.mac == _NO_MAC else ""
    if mac or conf.promiscuous or not bridge.up:
        bridge.mac = mac or bridge.mac
        change = rtlink.set_link(bridge.ifindex, up=True, mac=mac, promiscuous=conf.promiscuous)
        expect(host.route.request(*change), failed)
    return bridge


def plug(
    host: Host,
    conf: BridgeConf,
    bridge: LinkState,
    netns: Netns,
    ifname: str,
    mac: str,
    known: KnownBridge | None,
) -> Port:
    """Make the veth pair; returns its host end, a port of the bridge. Leaves nothing behind when it fails.

    `ifname` and `mac` are the container's. Raises CniError, KernelError, and Changed if the bridge is no
    longer what is `known` of it.
    """
    has_flags = conf.hairpin or conf.isolated
    for _number in range(_NAME_TRIES):
        name, port_mac = random_port()
        steps = [rtlink.make_veth(name, port_mac, ifname, mac, conf.mtu, bridge.ifindex, netns.descriptor)]
        if has_flags:
            steps.append(rtlink.set_port(name, conf.hairpin, conf.isolated))
        if known is not None:
            steps += known.questions
        made, *rest, after = host.route.transact([*steps, rtlink.get_link(ifindex=bridge.ifindex)])
        flags, answers = rest[:has_flags], rest[has_flags:]
        try:
            if known is not None:
                known.confirm(host, answers, after)
            if made.errno == 0:
                port = _port(host, name, port_mac, made, f'failed to lookup "{name}"')
                _set_up(host, conf, port, flags)
                if known is None:  # else its MAC was confirmed
                    _pin_mac(host, bridge, after)
                return port
        except (CniError, KernelError, Changed):
            if made.errno == 0:
                host.delete_link(host.route, name)
            raise
        if made.errno != EEXIST:
            raise CniError(INTERNAL, f"failed to make veth pair: {made.reason}")
        if find(netns.route, ifname) is not None:
            text = f'container veth name ("{ifname}") peer provided ("{name}") already exists'
            raise CniError(INTERNAL, text)
    raise CniError(INTERNAL, f"failed to make veth pair: no free name in {_NAME_TRIES} tries")


def _port(host: Host, name: str, mac: str, made: Answer, failed: str) -> Port:
    """The host's end of the pair that was made; the error that it is gone begins with `failed`."""
    if made.messages:
        return Port(name, mac, *rtlink.ends_of(made.messages[0].body))
    # A kernel before 6.1 does not tell.
    found = must_find(host.route, name, failed)
    return Port(name, mac, found.ifindex, found.peer)


def _set_up(host: Host, conf: BridgeConf, port: Port, flags: list[Answer]) -> None:
    """What a port has besides: its flags, by the answer that they were given, VLANs, and no routes."""
    for answer in flags:
        expect(answer, f"failed to setup hairpin mode for {port.name}")
    _tag(host, conf, port, conf.trunk)
    host.afterwards(lambda: try_write(host.sysctl(f"ipv6/conf/{port.name}/accept_ra"), "0"))


def _pin_mac(host: Host, bridge: LinkState, after: Answer) -> None:
    """Give the bridge back the MAC that it had before the port came: it is one that nobody had given it.

    Pods that know the gateway by it would have to learn another with each port that comes or goes.
    """
    if any(rtlink.mac_of(message.body) != bridge.mac for message in after.messages):
        pinned = host.route.request(*rtlink.set_link(bridge.ifindex, mac=bridge.mac))
        expect(pinned, "could not set bridge's mac")


def _tag(host: Host, conf: BridgeConf, port: Port, trunk: tuple[int, ...]) -> None:
    """The VLANs of a port, as upstream: untagged in `vlan`, tagged in those of the trunk."""
    if not conf.vlan and not trunk:
        return
    steps: list[Message] = []
    if not conf.preserve_default_vlan:
        tables = [rtlink.read_vlans(message.body) for message in host.route.dump(*rtlink.get_vlans())]
        has = [vlan for ifindex, vlans in tables if ifindex == port.ifindex for vlan in vlans]
        steps += [rtlink.drop_vlan(port.ifindex, vlan) for vlan in has]
    texts = [f'failed to remove default vlan on interface "{port.name}"'] * len(steps)
    if conf.vlan:
        steps.append(rtlink.add_vlan(port.ifindex, conf.vlan, untagged=True))
    steps += [rtlink.add_vlan(port.ifindex, vlan, untagged=False) for vlan in trunk]
    if not conf.vlan:
        # What comes without a tag would be dropped otherwise.
        steps.append(rtlink.add_vlan(port.ifindex, _DEFAULT_VLAN, untagged=True))
    texts += [f'failed to setup vlan tag on interface "{port.name}"'] * (len(steps) - len(texts))
    carry_out(host.route, steps, texts)


def ensure_vlan_link(host: Host, conf: BridgeConf, bridge: LinkState) -> LinkState:
    """The host's interface in the VLAN: a veth whose other end is a port of the bridge."""
    name = f"{bridge.name}.{conf.vlan}"
    found = find(host.route, name)
    if found is not None:
        return found
    failed = f'failed to create vlan interface: faild to create vlan gateway "{name}"'
    port, mac = random_port()
    wanted = rtlink.make_veth(port, mac, name, random_mac(), bridge.mtu, bridge.ifindex, None)
    answer = host.route.request(*wanted)
    if answer.errno not in (0, EEXIST):
        raise CniError(INTERNAL, f"{failed}: {answer.reason}")
    if answer.errno == 0:
        try:
            _tag(host, conf, _port(host, port, mac, answer, failed), ())
        except (CniError, KernelError):  # the next pod would take it for a gateway in the VLAN
            host.delete_link(host.route, port)
            raise
    found = must_find(host.route, name, failed)
    expect(host.route.request(*rtlink.set_link(found.ifindex, up=True)), f'failed to up "{name}"')
    return found


def await_port(host: Host, port: Port) -> None:
    """Return once the port is up, or gone; the kernel needs a moment at most, and mostly none.

    Raises CniError if it does not come up. (Somebody may have taken the pod's end down by now.)
    """
    deadline, pause = time.monotonic() + _PORT_UP_S, _FIRST_PAUSE_S
    while True:
        answer = host.route.request(*rtlink.get_link(ifindex=port.ifindex))
        if answer.errno or any(rtlink.is_oper_up(message.body) for message in answer.messages):
            return
        if time.monotonic() > deadline:
            raise CniError(INTERNAL, f"bridge port in error state: down: {port.name}")
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_S)
