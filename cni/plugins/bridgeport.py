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
    random_name,
    try_write,
)
from cni.spec import gojson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Host, Netns
    from cni.net.nlmsg import Request as Message
    from cni.net.nlsocket import Answer
    from cni.plugins.bridgeconf import BridgeConf

_NAME_TRIES = 10
_DEFAULT_VLAN = 1
_NO_MAC = "00:00:00:00:00:00"
_PORT_UP_S, _FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.55, 0.001, 0.05


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


def plug(host: Host, conf: BridgeConf, bridge: LinkState, netns: Netns, ifname: str, mac: str) -> LinkState:
    """Make the veth pair; returns its host end, a port of the bridge. Leaves nothing behind when it fails."""
    name, port = _make_pair(host, conf, bridge, netns, ifname, mac)
    try:
        if port is None:  # a kernel before 6.1 does not tell
            port = must_find(host.route, name, f'failed to lookup "{name}"')
        try_write(host.sysctl(f"ipv6/conf/{name}/accept_ra"), "0")
        _tag(host, conf, port, conf.trunk)
    except (CniError, KernelError):
        host.delete_link(host.route, name)
        raise
    return port


def _make_pair(
    host: Host, conf: BridgeConf, bridge: LinkState, netns: Netns, ifname: str, mac: str
) -> tuple[str, LinkState | None]:
    for _number in range(_NAME_TRIES):
        name = random_name()
        steps = [
            rtlink.make_veth(name, random_mac(), ifname, mac, conf.mtu, bridge.ifindex, netns.descriptor)
        ]
        if conf.hairpin or conf.isolated:
            steps.append(rtlink.set_port(name, conf.hairpin, conf.isolated))
        made, *rest, after = host.route.transact([*steps, rtlink.get_link(ifindex=bridge.ifindex)])
        if made.errno == 0:
            refused = next((answer for answer in rest if answer.errno), None)
            if refused is not None:
                host.delete_link(host.route, name)
                raise CniError(INTERNAL, f"failed to setup hairpin mode for {name}: {refused.reason}")
            _pin_mac(host, bridge, after)
            return name, LinkState(made.messages[0].body) if made.messages else None
        if made.errno != EEXIST:
            raise CniError(INTERNAL, f"failed to make veth pair: {made.reason}")
        if find(netns.route, ifname) is not None:
            text = f'container veth name ("{ifname}") peer provided ("{name}") already exists'
            raise CniError(INTERNAL, text)
    raise CniError(INTERNAL, f"failed to make veth pair: no free name in {_NAME_TRIES} tries")


def _pin_mac(host: Host, bridge: LinkState, after: Answer) -> None:
    """Give the bridge back the MAC that it had before the port came: it is one that nobody had given it.

    Pods that know the gateway by it would have to learn another with each port that comes or goes.
    """
    if any(rtlink.mac_of(message.body) != bridge.mac for message in after.messages):
        pinned = host.route.request(*rtlink.set_link(bridge.ifindex, mac=bridge.mac))
        expect(pinned, "could not set bridge's mac")


def _tag(host: Host, conf: BridgeConf, port: LinkState, trunk: tuple[int, ...]) -> None:
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
    port = random_name()
    wanted = rtlink.make_veth(port, random_mac(), name, random_mac(), bridge.mtu, bridge.ifindex, None)
    answer = host.route.request(*wanted)
    if answer.errno not in (0, EEXIST):
        raise CniError(INTERNAL, f"{failed}: {answer.reason}")
    if answer.errno == 0:
        try:
            _tag(host, conf, must_find(host.route, port, failed), ())
        except (CniError, KernelError):  # the next pod would take it for a gateway in the VLAN
            host.delete_link(host.route, port)
            raise
    found = must_find(host.route, name, failed)
    expect(host.route.request(*rtlink.set_link(found.ifindex, up=True)), f'failed to up "{name}"')
    return found


def await_port(host: Host, port: LinkState) -> None:
    """Return once the port is up; the kernel needs a moment at most, and mostly none."""
    deadline, pause = time.monotonic() + _PORT_UP_S, _FIRST_PAUSE_S
    while True:
        answer = host.route.request(*rtlink.get_link(ifindex=port.ifindex))
        expect(answer, f'failed to lookup "{port.name}"')
        if any(rtlink.is_oper_up(message.body) for message in answer.messages):
            return
        if time.monotonic() > deadline:
            raise CniError(INTERNAL, "bridge port in error state: down")
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_S)
