"""The netconf of the portmap plugin, and the forwarded ports of a node as values.

A `Claim` is one port of the node that one attachment asks for, in one address family. From all claims of a
family follows what the packet filter has to hold: `winners`, as of several claims to one port the newest is
in force and the others wait, and `hairpins`, the sources whose answers would not come back through the node.

Source: CNI 1.1.0, CONVENTIONS.md, "portMappings"; upstream portmap's keys, checks and texts.
"""

from __future__ import annotations

from cni.errors import INTERNAL, INVALID_CONFIG, CniError
from cni.spec import gojson, result
from cni.spec.address import Cidr, format_ip, parse_cidr, parse_ip
from cni.spec.digest import digits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from cni.spec.request import Request

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
NO_LINK = "-"

_DEFAULT_MARK_BIT = 13  # Kubernetes uses 14 and 15, Calico 16 to 31
_LOCALHOST = 0x7F000001
_HIGHEST_PORT = 65535
_INT64 = 2**63 - 1
_FORMS = (("0.1.0", "0.2.0"), ("0.3.0", "0.3.1", "0.4.0"), ("1.0.0", "1.1.0"))
# With links, order and mark the comment of a claim stays below the 128 bytes that `nft` accepts.
_LONGEST_NAME, _LONGEST_ID, _LONGEST_IFNAME = 16, 64, 15
_NAMES = {number: name for name, number in PROTOCOLS.items()}


class Mapping:
    """One entry of `portMappings`. `host_ip` is (family, integer), None if the entry names none."""

    __slots__ = ("container_port", "host_ip", "host_port", "protocol")

    def __init__(self, entry: object) -> None:
        """Raises gojson.GoJsonError for wrong types. Ports are not checked yet."""
        if entry is None:
            entry = {}
        if not isinstance(entry, dict):
            raise gojson.GoJsonError(f"portMappings must hold objects, found {gojson.kind(entry)}")
        self.host_port = gojson.integer(entry, "hostPort", 0, -_INT64, _INT64) or 0
        self.container_port = gojson.integer(entry, "containerPort", 0, -_INT64, _INT64) or 0
        self.protocol = gojson.typed(entry, "protocol", str, "")
        self.host_ip = gojson.typed(entry, "hostIP", str, "")

    def check(self) -> None:
        """Raise CniError: 999 with upstream's texts, 7 for what upstream leaves to iptables to refuse."""
        if self.container_port <= 0:
            raise _failed(f"Invalid container port number: {self.container_port}")
        if self.host_port <= 0:
            raise _failed(f"Invalid host port number: {self.host_port}")
        for kind, number in (("container", self.container_port), ("host", self.host_port)):
            if number > _HIGHEST_PORT:
                raise _wrong(f"{kind} port {number} is above {_HIGHEST_PORT}")
        if self.protocol.lower() not in PROTOCOLS:
            raise _wrong(f'protocol "{self.protocol}" is not one of {", ".join(PROTOCOLS)}')
        if self.host_ip:
            try:
                parse_ip(self.host_ip)
            except ValueError:
                raise _wrong(f'hostIP "{self.host_ip}" is not an IP address') from None


class PortMapConf:
    """What stdin says, checked. `addresses` holds the container's first IPv4 and first IPv6 address.

    `prev_result` is None if there is none; `conditions` holds the words of conditionsV4 and conditionsV6, by
    key, where there are any.
    """

    __slots__ = ("addresses", "conditions", "mappings", "mark_bit", "masq_all", "name", "prev_result", "snat")

    def __init__(self, request: Request) -> None:
        """Raises CniError 999 with upstream's texts, and 7 where upstream has none of its own."""
        try:
            self._read(request.config)
        except gojson.GoJsonError as exc:
            raise _failed(f"failed to parse network configuration: {exc}") from None
        try:
            self.prev_result = previous_result(request.config, request.version)
        except result.ResultError as exc:
            raise _failed(f"could not parse prevResult: {exc}") from None
        self._check(request.config)
        self.addresses = _container_addresses(self.prev_result, request.ifname)

    def _read(self, config: gojson.Object) -> None:
        self.name = gojson.typed(config, "name", str, "")
        self.snat = gojson.typed(config, "snat", bool, True)
        self.masq_all = gojson.typed(config, "masqAll", bool, False)
        bit = gojson.integer(config, "markMasqBit", None, -_INT64, _INT64)
        self.mark_bit = _DEFAULT_MARK_BIT if bit is None else bit
        self.conditions = {
            name: words for name in ("conditionsV4", "conditionsV6") if (words := _strings(config, name))
        }
        runtime: gojson.Object = gojson.typed(config, "runtimeConfig", dict, {})
        self.mappings = [Mapping(entry) for entry in gojson.typed(runtime, "portMappings", list, [])]
        gojson.typed(config, "backend", str, "")
        gojson.typed(config, "externalSetMarkChain", str, "")
        gojson.typed(config, "prevResult", dict, {})

    def _check(self, config: gojson.Object) -> None:
        external = gojson.member(config, "externalSetMarkChain") is not None
        if external and gojson.member(config, "markMasqBit") is not None:
            raise _failed("Cannot specify externalSetMarkChain and markMasqBit")
        if not 0 <= self.mark_bit <= 31:
            raise _failed("MasqMarkBit must be between 0 and 31")
        self._check_backend(gojson.member(config, "backend"), external)
        for mapping in self.mappings:
            mapping.check()

    def _check_backend(self, backend: object, external: bool) -> None:
        """As upstream, where `backend` names one; it chooses nothing here, as there is only one."""
        if backend is None:
            return
        wrong = "nftables" if backend == "iptables" else "iptables"
        foreign = ["externalSetMarkChain"] if external and wrong == "iptables" else []
        # An iptables match begins with an option, which none of nftables does.
        foreign += [
            name
            for name, words in self.conditions.items()
            if words[0] and words[0].startswith("-") == (wrong == "iptables")
        ]
        if foreign:
            text = f"{backend} backend was requested but configuration contains"
            raise _failed(f"{text} {wrong}-specific options [{' '.join(foreign)}]")
        if backend not in ("iptables", "nftables"):
            raise _failed(f"unrecognized backend {gojson.dumps(backend)}")


def previous_result(config: gojson.Object, wanted: str) -> gojson.Object | None:
    """prevResult of a netconf of version `wanted`, parsed; None without one.

    Raises result.ResultError with upstream's texts: it must be of the netconf's own family of versions.
    """
    record = gojson.member(config, "prevResult")
    if record is None:
        return None
    try:
        if not isinstance(record, dict):
            raise result.ResultError(f"expected an object, found {gojson.kind(record)}")
        form = next((form for form in _FORMS if wanted in form), ())
        declared = gojson.typed(record, "cniVersion", str, "") or wanted
        if declared not in form:
            text = f"result type supports [{' '.join(form)}] but unmarshalled CNIVersion is"
            raise result.ResultError(f"{text} {gojson.dumps(declared)}")
        return result.parse(record, wanted)
    except ValueError as exc:
        text = str(exc).removeprefix("failed to unmarshal raw result: ")
        raise result.ResultError(f"could not parse prevResult: {text}") from None


def _container_addresses(prev_result: gojson.Object | None, ifname: str) -> list[Cidr]:
    """The first address of each family that is not known to belong to another interface."""
    if prev_result is None:
        return []
    modern = result.convert(prev_result, "1.0.0")
    interfaces = result.interfaces(modern)
    found: dict[int, Cidr] = {}
    for one in gojson.typed(modern, "ips", list, []):
        cidr, index = parse_cidr(one["address"]), one.get("interface")
        if index is not None and 0 <= index < len(interfaces):
            owner = interfaces[index]
            if owner["name"] != ifname or not owner.get("sandbox"):
                continue
        found.setdefault(cidr.family, cidr)
    return [found[family] for family in sorted(found)]


def host_interfaces(prev_result: gojson.Object) -> list[str]:
    """The names of the interfaces that prevResult lists outside of the container."""
    return [str(one["name"]) for one in result.interfaces(prev_result) if not one.get("sandbox")]


# ---- claims


class Owner:
    """An attachment, and the host end of its link (`veth`, NO_LINK if it is not known).

    What is too long for the packet filter's comment, or not ASCII, is kept as a hash.
    """

    __slots__ = ("container_id", "ifname", "network", "veth")

    def __init__(self, network: str, container_id: str, ifname: str, veth: str = NO_LINK) -> None:
        self.network = _word(network, _LONGEST_NAME)
        self.container_id = _word(container_id, _LONGEST_ID)
        self.ifname = _word(ifname, _LONGEST_IFNAME)
        self.veth = veth

    def same_attachment(self, other: Owner) -> bool:
        """Whether it is the same interface of the same container in the same network."""
        return self.key == other.key

    @property
    def key(self) -> tuple[str, str, str]:
        return self.network, self.container_id, self.ifname

    @property
    def comment_start(self) -> str:
        """What the comments of the attachment's claims begin with."""
        return f"{self.network} {self.container_id} {self.ifname} "


class Claim:
    """A port of the node, asked for by an attachment.

    `host` is an address of the node, None for all of them; `address` the container's, with the prefix that
    snat's sources have (0: all sources), or None as `source_prefix` without snat. `order` grows with time
    among claims to the same port.
    """

    __slots__ = (
        *("address", "container_port", "family", "host", "host_port", "mark_bit", "order", "owner"),
        *("protocol", "source_prefix"),
    )

    def __init__(
        self,
        owner: Owner,
        port: tuple[int | None, int, int],
        target: tuple[int, int, int],
        order: int = 0,
        source_prefix: int | None = None,
        mark_bit: int = _DEFAULT_MARK_BIT,
    ) -> None:
        """`port` is (host, protocol, host port), `target` (family, address, container port)."""
        self.owner = owner
        self.host, self.protocol, self.host_port = port
        self.family, self.address, self.container_port = target
        self.order = order
        self.source_prefix = source_prefix
        self.mark_bit = mark_bit

    @property
    def port(self) -> tuple[int | None, int, int]:
        """What only one claim can have."""
        return self.host, self.protocol, self.host_port

    @property
    def target(self) -> tuple[int, int, int]:
        return self.family, self.address, self.container_port

    @property
    def comment(self) -> str:
        """All that the element of the packet filter does not say by itself; see `read_claim`."""
        masquerade = "-" if self.source_prefix is None else f"{self.source_prefix}/{self.mark_bit}"
        return f"{self.owner.comment_start}{self.owner.veth} {self.order} {masquerade}"

    def __str__(self) -> str:
        host = "*" if self.host is None else format_ip(self.family, self.host)
        target = f"{format_ip(self.family, self.address)} port {self.container_port}"
        return f"{_NAMES.get(self.protocol, self.protocol)} port {self.host_port} of {host} to {target}"


def read_claim(port: tuple[int | None, int, int], target: tuple[int, int, int], comment: str) -> Claim | None:
    """The claim behind an element of the packet filter; None if somebody else made it."""
    words = comment.split(" ")
    if len(words) != 6 or not words[4].isdecimal():
        return None
    network, container_id, ifname, veth, order, masquerade = words
    if not 0 < len(veth) <= _LONGEST_IFNAME:
        return None
    prefix, slash, bit = masquerade.partition("/")
    if slash and not (prefix.isdecimal() and bit.isdecimal()):
        return None
    owner = Owner(network, container_id, ifname, veth)
    if slash:
        return Claim(owner, port, target, int(order), int(prefix), int(bit))
    return Claim(owner, port, target, int(order))


def claims_of(conf: PortMapConf, owner: Owner, family: int) -> list[Claim]:
    """What an attachment asks for in one family; of entries for the same port the first counts."""
    cidr = next((cidr for cidr in conf.addresses if cidr.family == family), None)
    if cidr is None:
        return []
    prefix = (0 if conf.masq_all else cidr.prefix) if conf.snat else None
    found: dict[tuple[int | None, int, int], Claim] = {}
    for mapping in conf.mappings:
        host = parse_ip(mapping.host_ip) if mapping.host_ip else (family, 0)
        if host[0] == family:
            port = (host[1] or None, PROTOCOLS[mapping.protocol.lower()], mapping.host_port)
            target = (family, cidr.value, mapping.container_port)
            found.setdefault(port, Claim(owner, port, target, 0, prefix, conf.mark_bit))
    return list(found.values())


def newer_than(claims: Iterable[Claim], new: list[Claim]) -> list[Claim]:
    """`claims` and then `new`, which are made the newest of their ports."""
    old = list(claims)
    highest: dict[tuple[int | None, int, int], int] = {}
    for claim in old:
        highest[claim.port] = max(claim.order, highest.get(claim.port, 0))
    for claim in new:
        claim.order = highest.get(claim.port, 0) + 1
    return old + new


def winners(claims: Iterable[Claim]) -> dict[tuple[int | None, int, int], Claim]:
    """The claim in force for each port: the newest, as upstream documents ("last-write-wins")."""
    found: dict[tuple[int | None, int, int], Claim] = {}
    for claim in claims:
        rival = found.get(claim.port)
        if rival is None or claim.order >= rival.order:
            found[claim.port] = claim
    return found


def hairpins(claims: Iterable[Claim]) -> dict[tuple[int, int], set[tuple[int, int, int]]]:
    """The sources that are masqueraded on their way to a forwarded port.

    By (prefix length, mark bit) the (network, protocol, port) triples. That is what the container's subnet
    and, in IPv4, the node itself as 127.0.0.1 sends: the answers would go straight to the sender, or nowhere.
    """
    found: dict[tuple[int, int], set[tuple[int, int, int]]] = {}
    for claim in claims:
        if claim.source_prefix is None:
            continue
        network = Cidr(claim.family, claim.address, claim.source_prefix).network()
        sources = [network]
        if claim.family == 4 and claim.source_prefix:
            sources.append(Cidr(4, _LOCALHOST, 32))
        for source in sources:
            triples = found.setdefault((source.prefix, claim.mark_bit), set())
            triples.add((source.value, claim.protocol, claim.host_port))
    return found


def _word(text: str, longest: int) -> str:
    if text.isascii() and len(text) <= longest:
        return text
    return digits(text, longest)


def _strings(config: gojson.Object, name: str) -> list[str]:
    words = gojson.typed(config, name, list, [])
    for word in words:
        if word is not None and not isinstance(word, str):
            raise gojson.GoJsonError(f"{name} must hold strings, found {gojson.kind(word)}")
    return [word or "" for word in words]


def _failed(text: str) -> CniError:
    return CniError(INTERNAL, f"failed to parse config: {text}")


def _wrong(text: str) -> CniError:
    return CniError(INVALID_CONFIG, f"portMappings: {text}")
