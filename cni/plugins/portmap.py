"""The portmap plugin: ports of the node that are forwarded to a container.

Keys, checks and results are those of upstream's `portmap`, its traffic is treated the same way, and DEL also
removes what upstream's left for the container. Every change is one transaction of the packet filter, and no
process is started.

Decision: the newest of several containers with one port has it, as upstream documents. Once that one is
gone, the one before it has the port again.

Decision: ADD drops the ports that lead to addresses of its own container, and every call that changes ports
drops those of containers whose link is gone: whatever the runtime forgot to detach, no port leads to a
container that did not ask. A call for a container without ports reads none but its own.

Decision: `backend` and `externalSetMarkChain` are accepted and change nothing, as what they choose between
has the same effect. `conditionsV4` and `conditionsV6` are matches in the words of iptables or nft, which
nothing here reads; to leave them out would open a port that is meant to be closed, so ADD refuses them.

Source: containernetworking/plugins, plugins/meta/portmap; CNI 1.1.0.
"""

from __future__ import annotations

import struct

from cni.errors import INTERNAL, INVALID_CONFIG, NOT_AVAILABLE, CniError, KernelError
from cni.net import conntrack, nft, rtlink
from cni.net.nlmsg import attr
from cni.net.nlsocket import NetlinkSocket, ProtocolMissing
from cni.plugins import xtables
from cni.plugins.about import about
from cni.plugins.links import NamespaceLock
from cni.plugins.portmapconf import (
    NO_LINK,
    Claim,
    Owner,
    PortMapConf,
    claims_of,
    host_interfaces,
    newer_than,
    winners,
)
from cni.plugins.portmaptable import PortTable, mentions, port_table
from cni.spec import gojson, result
from cni.spec.digest import digits
from cni.spec.netconf import NetConf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.host import Host
    from cni.spec.address import Cidr
    from cni.spec.request import Request

    Keep = Callable[[Claim], bool]

_FAMILIES = (4, 6)
_ROUTE_TO = struct.Struct("=BBxxxxxxI")  # struct rtmsg of a question for the way to one address
_RTA_DST = 1
# What upstream made: chains of the iptables table `nat`, and chains of its own nf_tables tables.
_UPSTREAM_PARENTS = ("CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-SNAT")
_UPSTREAM_TABLES = (nft.Table(nft.IP, "cni_hostport"), nft.Table(nft.IP6, "cni_hostport"))


class Portmap:
    """The plugin, for one call."""

    __slots__ = ("_host",)

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def about(self) -> str:
        return about("portmap")

    def owns_netns(self, path: str) -> bool:
        """Whether `path` is the namespace of the runtime itself; False if it cannot be told."""
        return self._host.shares_netns(path)

    def add(self, request: Request) -> gojson.Object:
        """Forward the ports; prevResult is the result. Raises CniError, and then nothing is forwarded."""
        conf = PortMapConf(request)
        if conf.prev_result is None:
            raise CniError(INTERNAL, "must be called as chained plugin")
        if conf.mappings:
            _refuse_conditions(conf)
        try:
            self._forward(request, conf, conf.prev_result)
        except ProtocolMissing as exc:
            if conf.mappings:
                raise CniError(INTERNAL, f"port mappings need nf_tables in the kernel: {exc}") from None
        except KernelError as exc:
            raise CniError(INTERNAL, f"unable to set up port mappings: {exc}") from None
        return result.convert(conf.prev_result, request.version)

    def delete(self, request: Request) -> None:
        """Forward the container's ports no more, neither ours nor upstream's. Raises CniError.

        The netconf is not checked: what could not be added has to be deletable.
        """
        name = gojson.typed(request.config, "name", str, "")
        attachment = Owner(name, request.container_id, request.ifname)
        try:
            self._release(attachment)
            _remove_upstream(self._host, name, request.container_id)
        except KernelError as exc:
            raise CniError(INTERNAL, f"unable to remove port mappings: {exc}") from None

    def check(self, request: Request) -> None:
        """Whether every port of the netconf leads to the container of prevResult. Raises CniError."""
        conf = PortMapConf(request)
        if conf.prev_result is None:
            raise CniError(INTERNAL, "Required prevResult missing")
        if not conf.mappings:
            return
        owner = Owner(conf.name, request.container_id, request.ifname)
        try:
            if _upstream_holds(self._host, conf.name, request.container_id):
                return
            for family in _FAMILIES:
                _check(PortTable(self._host.netfilter, family), claims_of(conf, owner, family))
        except KernelError as exc:
            raise CniError(INTERNAL, f"unable to check port mappings: {exc}") from None

    def status(self, request: Request) -> None:
        """Whether ADD could work. Raises CniError, 50 if the kernel's nf_tables cannot be used."""
        _refuse_conditions(PortMapConf(request))
        try:
            nft.generation(self._host.netfilter)
        except KernelError as exc:
            raise CniError(NOT_AVAILABLE, str(exc)) from None

    def gc(self, request: Request) -> None:
        """Drop the ports of attachments to this network that the runtime no longer knows."""
        try:
            conf = NetConf(request.config)
        except gojson.GoJsonError as exc:
            raise CniError(INTERNAL, f"failed to parse network configuration: {exc}") from None
        if conf.valid_attachments is None:
            return
        valid = {Owner(conf.name, *attachment).key for attachment in conf.valid_attachments}
        network = Owner(conf.name, "", "").network
        try:
            self._update(lambda claim: claim.owner.network != network or claim.owner.key in valid)
        except ProtocolMissing:
            return
        except KernelError as exc:
            raise CniError(INTERNAL, f"unable to remove port mappings: {exc}") from None

    def _forward(self, request: Request, conf: PortMapConf, prev_result: gojson.Object) -> None:
        veth = _host_veth(self._host.route, prev_result) if conf.mappings else NO_LINK
        owner = Owner(conf.name, request.container_id, request.ifname, veth)
        if not conf.mappings and not mentions(self._host.netfilter, owner, conf.addresses):
            return
        new = {family: claims_of(conf, owner, family) for family in _FAMILIES}
        if conf.snat and new[4]:
            self._let_localhost_out(conf.addresses[0])
        own = {(cidr.family, cidr.value) for cidr in conf.addresses}

        def keep(claim: Claim) -> bool:
            return not claim.owner.same_attachment(owner) and (claim.family, claim.address) not in own

        self._update(keep, new)

    def _release(self, attachment: Owner) -> None:
        try:
            if mentions(self._host.netfilter, attachment):
                self._update(lambda claim: not claim.owner.same_attachment(attachment))
        except ProtocolMissing:
            return  # a DEL has to succeed there as well

    def _update(self, keep: Keep, new: dict[int, list[Claim]] | None = None) -> None:
        """`update`, and drop what belongs to links that are gone."""
        route = self._host.route
        known: dict[str, bool] = {}

        def is_there(link: str) -> bool:
            if link not in known:
                known[link] = route.request(*rtlink.get_link(link)).errno == 0
            return known[link]

        update(self._host, lambda claim: keep(claim) and _lives(claim, is_there), new)

    def _let_localhost_out(self, address: Cidr) -> None:
        """Let what the node sends from 127.0.0.1 leave by the link that leads to the container.

        It is masqueraded only after it was routed, and the kernel takes it for a Martian until then.
        """
        route = self._host.route
        body = _ROUTE_TO.pack(rtlink.FAMILIES[4], 32, 0) + attr(_RTA_DST, address.value.to_bytes(4, "big"))
        answer = route.request(rtlink.RTM_GETROUTE, 0, body)
        if not answer.messages:
            return
        answer = route.request(*rtlink.get_link(ifindex=rtlink.RouteState(answer.messages[0].body).ifindex))
        if not answer.messages:
            return
        name = rtlink.LinkState(answer.messages[0].body).name
        try:
            self._host.sysctl(f"ipv4/conf/{name}/route_localnet").ensure("1")
        except OSError as exc:
            reason = (exc.strerror or str(exc)).lower()
            raise CniError(INTERNAL, f"unable to enable route_localnet: {name}: {reason}") from None


def sweep(host: Host, live: Callable[[str], bool]) -> int:
    """Drop the ports of containers whose host link is not `live`; how many. Raises KernelError.

    Claims made without knowing the link stay.
    """
    try:
        return update(host, lambda claim: _lives(claim, live))
    except ProtocolMissing:
        return 0


def update(host: Host, keep: Keep, new: dict[int, list[Claim]] | None = None) -> int:
    """Drop the claims that are not to be kept and add the `new` ones of each family, in one transaction.

    Then forget the UDP connections of ports that lead elsewhere now. Returns how many claims were dropped;
    raises KernelError, and then nothing was changed.
    """
    new = new or {}
    socket = host.netfilter
    if not any(new.values()) and not any(
        nft.present(socket, [nft.table_query(port_table(family)) for family in _FAMILIES])
    ):
        return 0
    dropped = 0
    changed: list[Claim] = []
    change = nft.Transaction()
    with NamespaceLock():
        for family in _FAMILIES:
            table = PortTable(socket, family)
            kept = [claim for claim in table.claims if keep(claim)]
            dropped += len(table.claims) - len(kept)
            claims = newer_than(kept, new.get(family, []))
            table.change(change, claims)
            changed += _moved(table.claims, claims)
        if dropped:
            # Of a call that is killed from here on nobody would know the flows to a container that is gone.
            _forget_connections(host, changed)
        change.commit(socket)
    _forget_connections(host, changed)
    return dropped


def _moved(before: list[Claim], after: list[Claim]) -> list[Claim]:
    """A claim for each port that leads elsewhere than before."""
    old, new = winners(before), winners(after)
    return [
        claim
        for port, claim in {**old, **new}.items()
        if port not in old or port not in new or old[port].target != new[port].target
    ]


def _forget_connections(host: Host, changed: list[Claim]) -> None:
    """Packets of a UDP flow that the kernel knows would go on to where they went before."""
    udp = [claim for claim in changed if claim.protocol == conntrack.UDP]
    for family in _FAMILIES:
        destinations = {(claim.host_port, claim.host) for claim in udp if claim.family == family}
        try:
            conntrack.delete_flows(host.netfilter, family, conntrack.UDP, destinations)
        except KernelError as exc:
            host.note(f"portmap: cannot forget connections of {len(destinations)} ports: {exc}")


def _lives(claim: Claim, live: Callable[[str], bool]) -> bool:
    return claim.owner.veth == NO_LINK or live(claim.owner.veth)


def _refuse_conditions(conf: PortMapConf) -> None:
    if conf.conditions:
        names = " and ".join(conf.conditions)
        text = f"{names} cannot be used: remove them, or run upstream's portmap for this network"
        raise CniError(INVALID_CONFIG, text)


def _host_veth(route: NetlinkSocket, prev_result: gojson.Object) -> str:
    """The host end of the container's link, of what prevResult lists outside of the container."""
    for name in host_interfaces(prev_result):
        answer = route.request(*rtlink.get_link(name))
        if answer.messages and rtlink.LinkState(answer.messages[0].body).kind == "veth":
            return name
    return NO_LINK


def _check(table: PortTable, wanted: list[Claim]) -> None:
    in_force = winners(table.claims)
    for claim in wanted:
        found = in_force.get(claim.port)
        if found is None:
            raise CniError(INTERNAL, f"port mapping is missing: {claim}")
        if not found.owner.same_attachment(claim.owner):
            text = f"port mapping has been taken over by container {found.owner.container_id}: {found}"
            raise CniError(INTERNAL, text)
        if found.target != claim.target or found.source_prefix != claim.source_prefix:
            raise CniError(INTERNAL, f"port mapping differs: {claim} is wanted, found {found}")
    if wanted and not table.intact(wanted):
        raise CniError(INTERNAL, f"rules of port mappings are missing in table {table.table}")


# ---- what upstream's plugin left


def _upstream_chain(prefix: str, network: str, container_id: str) -> str:
    return f"CNI-{prefix}-{digits(network + container_id, 21)}"


def _upstream_holds(host: Host, network: str, container_id: str) -> bool:
    """Whether the container's ports are forwarded by rules that upstream's portmap made."""
    chain = _upstream_chain("DN", network, container_id)
    nat = [nft.chain_query(nft.Table(family, "nat"), chain) for family in (nft.IP, nft.IP6)]
    if any(nft.present(host.netfilter, nat)):
        return True
    return any(rules for _, rules in _upstream_rules(host.netfilter, container_id))


def _upstream_rules(socket: NetlinkSocket, container_id: str) -> list[tuple[nft.Table, list[nft.Rule]]]:
    """The rules that upstream's nftables backend made for a container, by table."""
    there = nft.present(socket, [nft.table_query(table) for table in _UPSTREAM_TABLES])
    return [
        (table, [rule for rule in nft.rules(socket, table) if rule.comment == container_id])
        for table, exists in zip(_UPSTREAM_TABLES, there, strict=True)
        if exists
    ]


def _remove_upstream(host: Host, network: str, container_id: str) -> None:
    chains = [_upstream_chain(prefix, network, container_id) for prefix in ("DN", "SN")]
    xtables.remove_chains(host, "nat", chains, _UPSTREAM_PARENTS)

    def remove_rules() -> None:
        change = nft.Transaction()
        for table, rules in _upstream_rules(host.netfilter, container_id):
            for rule in rules:
                change.delete_rule(table, rule)
        change.commit(host.netfilter)

    try:
        nft.retry(remove_rules)
    except ProtocolMissing:
        return
