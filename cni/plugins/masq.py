"""Masquerading of what a pod sends to places outside its subnet (`ipMasq`).

    table inet flannel_cni
        set ip-10.1.17.0-24     the masqueraded pods of a subnet, by address; the comment tells whose it is
        chain postrouting       multicast is left alone; then for each subnet
                                ip saddr @ip-10.1.17.0-24 ip daddr != 10.1.17.0/24 masquerade

Decision: an element of a set per pod, where upstream has a rule or a chain: a packet costs the same with 110
pods as with one, and ADD is one small transaction in which no process is started. Upstream has no sets for
fear of a race: "delete the address, but only if it is still that container's". Here the kernel refuses the
deletion if anything has changed since the comment was read, and it is read again.

A comment begins with upstream's hashes of network, interface and container, and names the host's end of the
veth: an element of which that link is gone is dropped by `sweep`, whatever became of its DEL.

Upstream's rules, of all its backends and ages, are removed by every DEL, as it may have added the container.
Those of the backend `iptables` are made here as well, on demand, as upstream makes them.

Source: containernetworking/plugins, pkg/ip/ipmasq_*_linux.go.
"""

from __future__ import annotations

from cni.errors import INTERNAL, CniError
from cni.net import nft
from cni.net import nftexpr as expr
from cni.net.nlsocket import ProtocolMissing
from cni.plugins import xtables
from cni.spec import gojson
from cni.spec.address import Cidr, format_ip, parse_cidr
from cni.spec.digest import digits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cni.host import Host
    from cni.net.nlsocket import NetlinkSocket

TABLE = nft.Table(nft.INET, "flannel_cni")
CHAIN = "postrouting"
_MULTICAST = {4: Cidr(4, 0xE0000000, 4), 6: Cidr(6, 0xFF << 120, 8)}
_LEFT_ALONE = [f"multicast {network}" for network in _MULTICAST.values()]
_LONGEST_IFNAME = 15
_UPSTREAM_TABLE, _UPSTREAM_CHAIN = nft.Table(nft.INET, "cni_plugins_masquerade"), "masq_checks"


def add(
    host: Host,
    network: str,
    container_id: str,
    ifname: str,
    veth: str,
    addresses: Sequence[Cidr],
    backend: str = "",
) -> None:
    """Masquerade `addresses` (each with the prefix length of its subnet) of one attachment.

    `network` is the name of the CNI network, `veth` the host's end; `backend` is the netconf's
    `ipMasqBackend`. What is there already is no error; an address of somebody else's becomes this one's.
    Raises NftRefused, KernelError, and CniError 999 for an unknown backend or if iptables fails.
    """
    if backend == "iptables":
        _add_by_iptables(host, network, container_id, addresses)
    elif backend in ("", "nftables"):
        comment = _comment(network, container_id, ifname, veth)
        if _add_to_sets(host.netfilter, addresses, comment):
            # Where the sets are the rules are as well, unless somebody has emptied the chain. A refusal takes
            # the kernel 15 ms (nf_tables_abort), which is why a daemon's sweep keeps the sets.
            networks = {address.network() for address in addresses}
            host.afterwards(lambda: nft.retry(lambda: _complete(host.netfilter, networks)))
        else:
            nft.retry(lambda: _add(host.netfilter, addresses, comment))
    else:
        raise CniError(INTERNAL, f"unknown ipmasq backend {gojson.dumps(backend)}")


def remove(
    host: Host, network: str, container_id: str, ifname: str, addresses: Sequence[Cidr] | None = None
) -> None:
    """Remove what `add`, or upstream, set up for one attachment; nothing there is no error.

    Without `addresses`, or if one of them is not (or no longer) this attachment's, they are found by their
    comments, which takes longer on a node of many pods. Raises KernelError (NftRefused) and CniError as
    `add`.
    """
    chain, identity = iptables_chain(network, container_id), _identity(network, container_id, ifname)
    # Mostly there is nothing of all this, which one question settles.
    queries = [nft.table_query(TABLE), nft.table_query(_UPSTREAM_TABLE)]
    queries += xtables.chain_queries("nat", [chain])
    try:
        ours, upstreams, *chains = nft.present(host.netfilter, queries)
        if ours:
            nft.retry(lambda: _remove(host.netfilter, identity, addresses))
        if upstreams:
            nft.retry(lambda: _remove_upstream(host.netfilter, identity))
    except ProtocolMissing:
        chains = []  # a DEL has to succeed there as well
    xtables.remove_chains(host, "nat", [chain], ["POSTROUTING"], may_be_native=any(chains))


def check(
    host: Host,
    network: str,
    container_id: str,
    ifname: str,
    addresses: Sequence[Cidr],
    backend: str = "",
) -> None:
    """Raise CniError 999 unless each address is masqueraded, by our rules or upstream's.

    Those of another backend than `backend` will do, as the configuration may have changed since the ADD.
    """
    if _has_upstreams(host.netfilter, _identity(network, container_id, ifname)):
        return
    ours = _masqueraded(host.netfilter, _identity(network, container_id, ifname), addresses)
    chain = iptables_chain(network, container_id)
    for address in addresses:
        if address not in ours and not xtables.is_reached(host, address.family, "nat", chain, "POSTROUTING"):
            raise CniError(INTERNAL, f"Masquerade rules for {address} on interface {ifname} not found")


def sweep(host: Host, live: Callable[[str], bool], *, keep_sets: bool = False) -> int:
    """Drop the addresses whose host veth is gone, and what is then empty; returns how many addresses.

    `live` tells of an interface of the host, by name, whether it exists. What names none is left alone. With
    `keep_sets` sets may become empty, as for a pod to come that would have to wait for new ones.
    """
    known_or_live = asked_once(live)
    try:
        return nft.retry(lambda: _sweep(host.netfilter, known_or_live, keep_sets))
    except ProtocolMissing:
        return 0


def asked_once(live: Callable[[str], bool]) -> Callable[[str], bool]:
    """`live`, which is asked only once for each name.

    A node on which pods come and go lets a sweep pass only if it asks nothing twice.
    """
    known: dict[str, bool] = {}

    def known_or_live(veth: str) -> bool:
        if veth not in known:
            known[veth] = live(veth)
        return known[veth]

    return known_or_live


def iptables_chain(network: str, container_id: str) -> str:
    """Name of upstream's chain of a container."""
    return f"CNI-{digits(network + container_id, 24)}"


# --- our table


def _add_to_sets(socket: NetlinkSocket, addresses: Sequence[Cidr], comment: str) -> bool:
    """Add the addresses to sets that are there; False if that is refused, and then nothing was done.

    As where a set is not there, or has one of the addresses, perhaps of a pod that is gone.
    """
    change = nft.Transaction()
    for address in addresses:
        element = nft.Element(_key(address), comment=comment)
        change.add_elements(TABLE, _set_name(address.network()), [element], new=True)
    try:
        change.commit(socket)
    except nft.NftRefused:
        return False
    return True


def _complete(socket: NetlinkSocket, networks: set[Cidr]) -> None:
    _completion(socket, networks).commit(socket)


def _add(socket: NetlinkSocket, addresses: Sequence[Cidr], comment: str) -> None:
    change = _completion(socket, {address.network() for address in addresses})
    for address in addresses:
        element = nft.Element(_key(address), comment=comment)
        change.replace_elements(TABLE, _set_name(address.network()), [element])
    change.commit(socket)


def _completion(socket: NetlinkSocket, networks: set[Cidr]) -> nft.Transaction:
    """What is needed for elements of `networks`: nothing if the rules are there, else all rules anew.

    Nobody changes a rule and leaves its comment, so comments are what is compared.
    """
    present = [rule.comment for rule in nft.rules(socket, TABLE, CHAIN)]
    if present[:2] == _LEFT_ALONE and {_rule_comment(network) for network in networks} <= set(present):
        return nft.Transaction()
    # Guarded, as another process may add a subnet of its own at this moment.
    change = nft.Transaction(nft.generation(socket))
    networks = networks | set(_sets(socket).values())
    change.add_table(TABLE)
    change.add_chain(TABLE, CHAIN, nft.Hook("nat", nft.POSTROUTING, nft.SRCNAT))
    change.flush_chain(TABLE, CHAIN)
    for multicast, comment in zip(_MULTICAST.values(), _LEFT_ALONE, strict=True):
        change.add_rule(TABLE, CHAIN, _leave_alone(multicast), comment)
    for network in sorted(networks, key=str):
        change.add_set(TABLE, _set_name(network), expr.IPV4_ADDR if network.family == 4 else expr.IPV6_ADDR)
        change.add_rule(TABLE, CHAIN, _masquerade(network), _rule_comment(network))
    return change


def _masqueraded(socket: NetlinkSocket, identity: str, addresses: Sequence[Cidr]) -> set[Cidr]:
    """Which addresses have their rules and, as an attachment's own, are in a set."""
    places = [(_set_name(address.network()), _key(address)) for address in addresses]
    comments = [rule.comment for rule in nft.rules(socket, TABLE, CHAIN)]
    if comments[: len(_LEFT_ALONE)] != _LEFT_ALONE:
        return set()
    return {
        address
        for address, one in zip(addresses, nft.find_elements(socket, TABLE, places), strict=True)
        if one and one.comment.startswith(identity) and _rule_comment(address.network()) in comments
    }


def _leave_alone(multicast: Cidr) -> list[bytes]:
    return [*expr.is_family(multicast.family), *expr.in_network("daddr", multicast), expr.return_()]


def _masquerade(network: Cidr) -> list[bytes]:
    return [
        *expr.is_family(network.family),
        expr.load_address(network.family, "saddr"),
        expr.lookup(_set_name(network)),
        *expr.in_network("daddr", network, expr.NEQ),
        expr.masquerade(),
    ]


def _remove(socket: NetlinkSocket, identity: str, addresses: Sequence[Cidr] | None) -> None:
    change = nft.Transaction(nft.generation(socket))
    found = _at(socket, identity, addresses or ())
    if not addresses or len(found) < len(addresses):
        found = [(name, one) for name in _sets(socket) for one in nft.elements(socket, TABLE, name, identity)]
    for name, one in found:
        change.delete_elements(TABLE, name, [one])
    change.commit(socket)


def _at(socket: NetlinkSocket, identity: str, addresses: Sequence[Cidr]) -> list[tuple[str, nft.Element]]:
    """Set and element of each address that is an attachment's."""
    places = [(_set_name(address.network()), _key(address)) for address in addresses]
    elements = nft.find_elements(socket, TABLE, places)
    found = [(name, one) for (name, _), one in zip(places, elements, strict=True) if one is not None]
    return [(name, one) for name, one in found if one.comment.startswith(identity)]


def _sweep(socket: NetlinkSocket, live: Callable[[str], bool], keep_sets: bool) -> int:
    # Guarded, as a set must not go while an ADD relies on it.
    change = nft.Transaction(nft.generation(socket))
    sets = _sets(socket)
    empty, dropped = [], 0
    for name in sets:
        elements = nft.elements(socket, TABLE, name)
        dead = [one for one in elements if _is_dead(one, live)]
        dropped += len(dead)
        if len(dead) == len(elements) and not keep_sets:
            empty.append(name)
        else:
            change.delete_elements(TABLE, name, dead)
    if sets and len(empty) == len(sets):
        change.delete_table(TABLE)
    elif empty:
        comments = {_rule_comment(sets[name]) for name in empty}
        for rule in nft.rules(socket, TABLE, CHAIN):
            if rule.comment in comments:
                change.delete_rule(TABLE, rule)
        for name in empty:
            change.delete_set(TABLE, name)
    change.commit(socket)
    return dropped


def _is_dead(element: nft.Element, live: Callable[[str], bool]) -> bool:
    veth = _veth(element.comment)
    # Else somebody else made it.
    return 0 < len(veth.encode()) <= _LONGEST_IFNAME and not live(veth)


def _set_name(network: Cidr) -> str:
    # nft takes no colon in a name.
    ip = "ip" if network.family == 4 else "ip6"
    return f"{ip}-{format_ip(network.family, network.value).replace(':', '_')}-{network.prefix}"


def _sets(socket: NetlinkSocket) -> dict[str, Cidr]:
    """Our sets, and the subnet of each; those that somebody else put into the table are left out."""
    found = {}
    for name in nft.set_names(socket, TABLE):
        try:
            found[name] = _network(name)
        except ValueError:
            continue
    return found


def _network(set_name: str) -> Cidr:
    _, address, prefix = set_name.split("-")
    return parse_cidr(f"{address.replace('_', ':')}/{prefix}")


def _rule_comment(network: Cidr) -> str:
    return f"pods of {network}"


def _key(address: Cidr) -> bytes:
    return expr.address(address.family, address.value)


def _comment(network: str, container_id: str, ifname: str, veth: str) -> str:
    identity = _identity(network, container_id, ifname)
    whole = f"{identity}, host: {veth}, if: {ifname}, net: {network}, id: {container_id}".replace('"', "")
    return whole.encode("utf-8", "replace")[: expr.LONGEST_COMMENT].decode("utf-8", "ignore")


def _veth(comment: str) -> str:
    return comment.partition(", host: ")[2].partition(", ")[0]


def _identity(network: str, container_id: str, ifname: str) -> str:
    """The start of the comments of an attachment, upstream's and ours."""
    return f"{digits(network, 16)}-{digits(f'{ifname}:{container_id}', 16)}"


# --- upstream's rules


def _remove_upstream(socket: NetlinkSocket, identity: str) -> None:
    change = nft.Transaction()
    for rule in nft.rules(socket, _UPSTREAM_TABLE, _UPSTREAM_CHAIN):
        if rule.comment.startswith(identity):
            change.delete_rule(_UPSTREAM_TABLE, rule)
    change.commit(socket)


def _has_upstreams(socket: NetlinkSocket, identity: str) -> bool:
    rules = nft.rules(socket, _UPSTREAM_TABLE, _UPSTREAM_CHAIN)
    return any(rule.comment.startswith(identity) for rule in rules)


def _add_by_iptables(host: Host, network: str, container_id: str, addresses: Sequence[Cidr]) -> None:
    chain = iptables_chain(network, container_id)
    comment = f'-m comment --comment "{_quoted(network, container_id)}"'
    # A rule is appended whether it is there or not.
    xtables.remove_chains(host, "nat", [chain], ["POSTROUTING"])
    for family, multicast in _MULTICAST.items():
        mine = [address for address in addresses if address.family == family]
        if not mine:
            continue
        lines = ["*nat", f":{chain} - [0:0]"]
        lines += [
            f"-A {chain} -d {one} {comment} -j ACCEPT" for one in dict.fromkeys(map(Cidr.network, mine))
        ]
        lines.append(f"-A {chain} ! -d {multicast} {comment} -j MASQUERADE")
        lines += [f"-A POSTROUTING -s {format_ip(family, one.value)} {comment} -j {chain}" for one in mine]
        xtables.restore(family, "\n".join([*lines, "COMMIT", ""]))


def _quoted(network: str, container_id: str) -> str:
    comment = f"name: {gojson.dumps(network)} id: {gojson.dumps(container_id)}"
    return comment.replace("\\", "\\\\").replace('"', '\\"')
