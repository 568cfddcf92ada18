"""The forwarded ports of a node in the packet filter: one nf_tables table for each address family.

    map ports        protocol . port              -> address . port    forwarded on all addresses of the node
    map host_ports   address . protocol . port    -> address . port    on one of them
    set waiting      both sides                   claims to a port that a newer claim has
    set hairpin_24_13   source . protocol . port   masqueraded; prefix length of the source, bit of the mark

    prerouting, output   to an address of this node: jump mapped
    mapped               a source in hairpin_*: mark;  dnat by host_ports;  dnat by ports
    postrouting          the mark: masquerade

Elements of the first three carry a comment that says whose they are (`portmapconf.read_claim`): the table is
all the memory there is. An element without such a comment, or of hairpin_* with one, is somebody else's, and
is left alone unless its port is asked for. The masquerade is upstream's for iptables: that of the container's
subnet, not of its address alone, and only of what was sent to a forwarded port.
"""

from __future__ import annotations

import sys

from cni.net import nft, nftexpr
from cni.net.nft import Element, Hook, Table, Transaction
from cni.net.nftexpr import INET_PROTO, INET_SERVICE, IPV4_ADDR, IPV6_ADDR, META_MARK, REG
from cni.plugins.portmapconf import Claim, hairpins, read_claim, winners

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni.net.nlsocket import NetlinkSocket
    from cni.plugins.portmapconf import Owner
    from cni.spec.address import Cidr

TABLE_NAME = "flannel_hostport"
_PORTS, _HOST_PORTS, _WAITING, _HAIRPIN = "ports", "host_ports", "waiting", "hairpin"
_CLAIMED = (_PORTS, _HOST_PORTS, _WAITING)
_MAPPED = "mapped"
_HOOKS = {
    "prerouting": Hook("nat", nft.PREROUTING, nft.DSTNAT),
    "output": Hook("nat", nft.OUTPUT, nft.DSTNAT),
    "postrouting": Hook("nat", nft.POSTROUTING, nft.SRCNAT),
}
_CHAINS = (_MAPPED, *_HOOKS)


class PortTable:
    """The table of one family (4 or 6) as it was when this object was made. Raises KernelError."""

    __slots__ = ("_address_bytes", "_address_type", "_rules", "_sets", "claims", "family", "table")

    def __init__(self, socket: NetlinkSocket, family: int) -> None:
        self.family = family
        self.table = port_table(family)
        self._address_bytes = 4 if family == 4 else 16
        self._address_type = IPV4_ADDR if family == 4 else IPV6_ADDR
        self._sets = {
            name: {one.key: one for one in nft.elements(socket, self.table, name)}
            for name in nft.set_names(socket, self.table)
            if name in _CLAIMED or _hairpin(name)
        }
        rules = nft.rules(socket, self.table) if self._sets else []
        rules = [rule for rule in rules if rule.chain in _CHAINS]
        self._rules = sorted(((rule.chain, rule.comment) for rule in rules), key=_chain)
        self.claims: list[Claim] = list(self._read_claims())

    def change(self, transaction: Transaction, claims: list[Claim]) -> None:
        """Add to `transaction` all that makes the table hold `claims`, and nothing else."""
        wanted = self._elements(claims)
        if not self._sets and not claims:
            return
        if self._rules != self._wanted_rules(wanted) or not wanted.keys() <= self._sets.keys():
            self._build(transaction, wanted)
        for name in {**self._sets, **wanted}:
            have, want = self._sets.get(name, {}), wanted.get(name, {})
            gone = [
                one
                for key, one in have.items()
                if not _same(want.get(key), one) and (key in want or self._is_ours(name, one))
            ]
            new = [one for key, one in want.items() if not _same(have.get(key), one)]
            transaction.delete_elements(self.table, name, gone)
            transaction.add_elements(self.table, name, new)

    def intact(self, claims: list[Claim]) -> bool:
        """Whether the rules are there, and the masquerade of some claims."""
        wanted = self._elements(claims)
        masquerades = all(
            wanted[name].keys() <= self._sets.get(name, {}).keys()
            for name in wanted
            if name.startswith(_HAIRPIN)
        )
        return masquerades and self._rules == self._wanted_rules({})

    # ---- elements

    def _read_claims(self) -> Iterable[Claim]:
        for name in _CLAIMED:
            for element in self._sets.get(name, {}).values():
                claim = self._claim(name, element)
                if claim is not None:
                    yield claim

    def _is_ours(self, name: str, element: Element) -> bool:
        return self._claim(name, element) is not None if name in _CLAIMED else not element.comment

    def _claim(self, name: str, element: Element) -> Claim | None:
        if not element.comment:
            return None
        size, raw = self._address_bytes, element.key + element.data
        host = 0
        if name != _PORTS:
            host, raw = int.from_bytes(raw[:size], "big"), raw[size:]
        port = (host or None, raw[0], int.from_bytes(raw[4:6], "big"))
        address, raw = int.from_bytes(raw[8 : 8 + size], "big"), raw[8 + size :]
        target = (self.family, address, int.from_bytes(raw[:2], "big"))
        return read_claim(port, target, element.comment)

    def _elements(self, claims: list[Claim]) -> dict[str, dict[bytes, Element]]:
        """What each set has to hold, by key."""
        found: dict[str, dict[bytes, Element]] = {_PORTS: {}, _HOST_PORTS: {}, _WAITING: {}}
        in_force = winners(claims)
        for claim in claims:
            name, element = self._element(claim, waits=in_force[claim.port] is not claim)
            found[name][element.key] = element
        for (prefix, bit), sources in hairpins(claims).items():
            elements = [
                Element(nftexpr.key(self._address(source), bytes((protocol,)), nftexpr.port(port)))
                for source, protocol, port in sources
            ]
            found[f"{_HAIRPIN}_{prefix}_{bit}"] = {one.key: one for one in elements}
        return found

    def _element(self, claim: Claim, *, waits: bool) -> tuple[str, Element]:
        """The set, and the element in it, that stands for a claim."""
        port = bytes((claim.protocol,)), nftexpr.port(claim.host_port)
        target = self._address(claim.address), nftexpr.port(claim.container_port)
        if waits:
            key = nftexpr.key(self._address(claim.host or 0), *port, *target)
            return _WAITING, Element(key, comment=claim.comment)
        data = nftexpr.key(*target)
        if claim.host is None:
            return _PORTS, Element(nftexpr.key(*port), data, claim.comment)
        return _HOST_PORTS, Element(nftexpr.key(self._address(claim.host), *port), data, claim.comment)

    def _address(self, number: int) -> bytes:
        return nftexpr.address(self.family, number)

    # ---- sets, chains and rules

    def _build(self, transaction: Transaction, wanted: dict[str, dict[bytes, Element]]) -> None:
        """Make what is missing, and all rules anew."""
        table, address = self.table, self._address_type
        target = nftexpr.concatenation(address, INET_SERVICE)
        port = nftexpr.concatenation(INET_PROTO, INET_SERVICE)
        host_port = nftexpr.concatenation(address, INET_PROTO, INET_SERVICE)
        transaction.add_table(table)
        transaction.add_set(table, _PORTS, port, target)
        transaction.add_set(table, _HOST_PORTS, host_port, target)
        both = nftexpr.concatenation(address, INET_PROTO, INET_SERVICE, address, INET_SERVICE)
        transaction.add_set(table, _WAITING, both)
        for prefix, bit in self._hairpins(wanted):
            transaction.add_set(table, f"{_HAIRPIN}_{prefix}_{bit}", host_port)
        for chain in (_MAPPED, *_HOOKS):
            transaction.add_chain(table, chain, _HOOKS.get(chain))
            transaction.flush_chain(table, chain)
        for chain, comment, expressions in self._all_rules(wanted):
            transaction.add_rule(table, chain, expressions, comment)

    def _wanted_rules(self, wanted: dict[str, dict[bytes, Element]]) -> list[tuple[str, str]]:
        return sorted(((chain, comment) for chain, comment, _ in self._all_rules(wanted)), key=_chain)

    def _all_rules(self, wanted: dict[str, dict[bytes, Element]]) -> list[tuple[str, str, list[bytes]]]:
        """Chain, comment and expressions of every rule, those of one chain in order.

        Rules are known again by their comments: with an expression that changes, its comment has to change.
        """
        pairs = self._hairpins(wanted)
        width = self._address_bytes // 4
        key = [nftexpr.load_l4_protocol(REG), nftexpr.load_destination_port(REG + 1)]
        host_key = [
            nftexpr.load_address(self.family, "daddr"),
            nftexpr.load_l4_protocol(REG + width),
            nftexpr.load_destination_port(REG + width + 1),
        ]
        dnat = nftexpr.dnat(self.family, REG, REG + width)
        local = [*nftexpr.fib_local_destination(), nftexpr.jump(_MAPPED)]
        rules = [(_MAPPED, f"mark /{prefix} {1 << bit:#x}", self._mark(prefix, bit)) for prefix, bit in pairs]
        rules.append((_MAPPED, "one address", [*host_key, nftexpr.lookup(_HOST_PORTS, into=REG), dnat]))
        rules.append((_MAPPED, "all addresses", [*key, nftexpr.lookup(_PORTS, into=REG), dnat]))
        rules.append(("prerouting", "to this node", local))
        rules.append(("output", "to this node", local))
        for bit in sorted({bit for _, bit in pairs}):
            rules.append(("postrouting", f"masquerade {1 << bit:#x}", _masquerade(bit)))
        return rules

    def _hairpins(self, wanted: dict[str, dict[bytes, Element]]) -> list[tuple[int, int]]:
        """Prefix length and bit of each set of sources that there is or has to be, longest prefix first."""
        found = {_hairpin(name) for name in (*self._sets, *wanted)}
        return sorted((one for one in found if one), reverse=True)

    def _mark(self, prefix: int, bit: int) -> list[bytes]:
        bits = 8 * self._address_bytes
        mask = ((1 << bits) - (1 << bits - prefix)).to_bytes(self._address_bytes, "big")
        width = self._address_bytes // 4
        one = _host_order(1 << bit)
        return [
            nftexpr.load_address(self.family, "saddr"),
            nftexpr.bitwise(mask, bytes(len(mask))),
            nftexpr.load_l4_protocol(REG + width),
            nftexpr.load_destination_port(REG + width + 1),
            nftexpr.lookup(f"{_HAIRPIN}_{prefix}_{bit}"),
            nftexpr.meta(META_MARK),
            nftexpr.bitwise(_host_order(~(1 << bit) & 0xFFFFFFFF), one),
            nftexpr.set_meta(META_MARK),
        ]


def port_table(family: int) -> Table:
    return Table(nft.IP if family == 4 else nft.IP6, TABLE_NAME)


def mentions(socket: NetlinkSocket, owner: Owner, addresses: Iterable[Cidr] = ()) -> bool:
    """Whether there may be claims of an attachment, or such as lead to one of some addresses.

    Quick, however many claims of others there are, if there are none. Raises KernelError.
    """
    sets = [(port_table(family), name) for family in (4, 6) for name in _CLAIMED]
    parts = [nftexpr.address(one.family, one.value) for one in addresses]
    return nft.any_element_with(socket, sets, [owner.comment_start.encode(), *parts])


def _hairpin(name: str) -> tuple[int, int] | None:
    """Prefix length and bit of a set of masqueraded sources; None for what is none of ours."""
    kind, _, numbers = name.partition("_")
    prefix, _, bit = numbers.partition("_")
    if kind != _HAIRPIN or not (prefix.isdecimal() and bit.isdecimal()):
        return None
    return int(prefix), int(bit)


def _chain(rule: tuple[str, str]) -> str:
    return rule[0]


def _masquerade(bit: int) -> list[bytes]:
    none = bytes(4)
    return [
        nftexpr.meta(META_MARK),
        nftexpr.bitwise(_host_order(1 << bit), none),
        nftexpr.compare(nftexpr.NEQ, none),
        nftexpr.masquerade(),
    ]


def _host_order(mark: int) -> bytes:
    return mark.to_bytes(4, sys.byteorder)


def _same(one: Element | None, other: Element) -> bool:
    return one is not None and (one.data, one.comment) == (other.data, other.comment)
