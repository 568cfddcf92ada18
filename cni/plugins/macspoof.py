"""Rules against forged sources (`macspoofchk`): a pod's port lets through frames of the pod's own MAC only.

    table bridge nat
        chain PREROUTING                        iifname <veth> jump cni-br-iface-<id>-<ifname>
        chain cni-br-iface-<id>-<ifname>        jump cni-br-iface-<id>-<ifname>-mac
        chain cni-br-iface-<id>-<ifname>-mac    ether saddr <MAC> return; drop

Chains, rules and comments are upstream's, so that either plugin removes what the other has made. Source:
containernetworking/plugins, pkg/link/spoofcheck.go.
"""

from __future__ import annotations

from cni.errors import INTERNAL, CniError
from cni.net import nft, nlmsg
from cni.net import nftexpr as expr
from cni.net.nlsocket import ProtocolMissing
from cni.plugins import masq

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.host import Host
    from cni.net.nlsocket import NetlinkSocket

_TABLE = nft.Table(nft.BRIDGE, "nat")
_BASE = "PREROUTING"
_CHAINS, _COMMENTS = "cni-br-iface-", "macspoofchk-"  # what those of ours begin with
_RULES_OF_MAC = 2
_MAC_OFFSET, _MAC_BYTES = 6, 6  # the source in an Ethernet header


def add(host: Host, container_id: str, ifname: str, veth: str, mac: str) -> None:
    """Let frames that come in by `veth`, the host's end, pass only from `mac` (as aa:bb:cc:dd:ee:ff).

    Rules of the same attachment that are there already are replaced. Raises NftRefused, KernelError.
    """
    nft.retry(lambda: _replace(host, container_id, ifname, (veth, mac)))


def remove(host: Host, container_id: str, ifname: str) -> None:
    """Remove the rules of an attachment; nothing there is no error. Raises NftRefused, KernelError."""
    try:
        nft.retry(lambda: _replace(host, container_id, ifname, None))
    except ProtocolMissing:
        return  # a DEL has to succeed there as well


def sweep(host: Host, live: Callable[[str], bool]) -> int:
    """Remove the rules, ours or upstream's, of ports that are gone; returns of how many.

    `live` tells of an interface of the host, by name, whether it exists. Raises NftRefused, KernelError.
    """
    known_or_live = masq.asked_once(live)
    try:
        return nft.retry(lambda: _sweep(host.netfilter, known_or_live))
    except ProtocolMissing:
        return 0


def check(host: Host, container_id: str, ifname: str, veth: str, mac: str) -> None:
    """Raise CniError 999 unless the rules of an attachment are there, for this port and this MAC."""
    chain = _chain(container_id, ifname)
    base, of_port, of_mac = (
        nft.rules(host.netfilter, _TABLE, name) for name in (_BASE, chain, f"{chain}-mac")
    )
    in_order = (
        any(rule.jump == chain and expr.ifname(veth) in rule.expressions for rule in base)
        and [rule.jump for rule in of_port] == [f"{chain}-mac"]
        and len(of_mac) == _RULES_OF_MAC
        and nlmsg.mac_bytes(mac) in of_mac[0].expressions
    )
    if not in_order:
        raise CniError(INTERNAL, f"Rules against MAC spoofing on {veth} (table {_TABLE}) not found")


def _replace(host: Host, container_id: str, ifname: str, port: tuple[str, str] | None) -> None:
    comment = _comment(container_id, ifname)
    chain = _chain(container_id, ifname)
    chains = [chain, f"{chain}-mac"]
    socket = host.netfilter
    there = nft.present(socket, [nft.chain_query(_TABLE, name) for name in chains])
    change = nft.Transaction()
    for rule in nft.rules(socket, _TABLE, _BASE):
        if rule.jump == chain:
            change.delete_rule(_TABLE, rule)
    present = [name for name, exists in zip(chains, there, strict=True) if exists]
    if port is None:
        _delete_chains(change, present)
    else:
        for name in present:
            change.flush_chain(_TABLE, name)
        _add_rules(change, chains, comment, *port)
    change.commit(socket)


def _sweep(socket: NetlinkSocket, live: Callable[[str], bool]) -> int:
    # Guarded, as a chain must not go while an ADD relies on it.
    change = nft.Transaction(nft.generation(socket))
    rules = [rule for rule in nft.rules(socket, _TABLE, _BASE) if _is_ours(rule)]
    dead = [rule for rule in rules if not live(expr.read_iifname(rule.expressions))]
    for rule in dead:
        change.delete_rule(_TABLE, rule)
    of_port = {rule.jump for rule in dead} - {rule.jump for rule in rules if rule not in dead}
    chains = [f"{chain}{end}" for chain in sorted(of_port) for end in ("", "-mac")]
    there = nft.present(socket, [nft.chain_query(_TABLE, name) for name in chains])
    _delete_chains(change, [name for name, exists in zip(chains, there, strict=True) if exists])
    change.commit(socket)
    return len(dead)


def _is_ours(rule: nft.Rule) -> bool:
    is_named = rule.comment.startswith(_COMMENTS) and rule.jump.startswith(_CHAINS)
    return is_named and expr.read_iifname(rule.expressions) != ""


def _delete_chains(change: nft.Transaction, names: list[str]) -> None:
    # Emptied first, as they lead to each other.
    for name in names:
        change.flush_chain(_TABLE, name)
    for name in names:
        change.delete_chain(_TABLE, name)


def _add_rules(change: nft.Transaction, chains: list[str], comment: str, veth: str, mac: str) -> None:
    of_port, of_mac = chains
    change.add_table(_TABLE)
    change.add_chain(_TABLE, _BASE, nft.Hook("filter", nft.PREROUTING, nft.BRIDGE_DSTNAT))
    for name in chains:
        change.add_chain(_TABLE, name)
    from_port = [expr.meta(expr.META_IIFNAME), expr.compare(expr.EQ, expr.ifname(veth))]
    from_mac = [
        expr.payload(expr.LINK_HEADER, _MAC_OFFSET, _MAC_BYTES),
        expr.compare(expr.EQ, nlmsg.mac_bytes(mac)),
    ]
    change.add_rule(_TABLE, _BASE, [*from_port, expr.jump(of_port)], comment)
    change.add_rule(_TABLE, of_port, [expr.jump(of_mac)], comment)
    change.add_rule(_TABLE, of_mac, [*from_mac, expr.return_()], comment)
    change.add_rule(_TABLE, of_mac, [expr.drop()], comment)


def _chain(container_id: str, ifname: str) -> str:
    # A name of an interface that is no UTF-8 would be read back as another one.
    return f"{_CHAINS}{container_id}-{ifname}".encode("utf-8", "replace").decode()


def _comment(container_id: str, ifname: str) -> str:
    # Upstream fails where nft does not take a comment of that length.
    whole = f"{_COMMENTS}{container_id}-{ifname}"
    return whole.encode("utf-8", "replace")[: expr.LONGEST_COMMENT].decode("utf-8", "ignore")
