"""nf_tables over netlink: transactions and listings, without the program `nft`.

    table = Table(INET, "flannel_cni")
    change = Transaction()
    change.add_table(table)
    change.add_chain(table, "postrouting", Hook("nat", POSTROUTING, SRCNAT))
    change.add_set(table, "pods", nftexpr.IPV4_ADDR)
    change.add_rule(table, "postrouting", [...expressions of cni.net.nftexpr...], "a comment")
    change.add_elements(table, "pods", [Element(key, comment="a pod")])
    change.commit(host.netfilter)               all of it or nothing; raises NftRefused

Adding what is there already is no error, except for rules (one more of them). Deleting what is not there is
one (ENOENT). Maps are sets with a data type: `add_set(table, name, key_type, data_type)`; the data type of a
verdict map is VERDICT, and its elements have a `jump`.

A refused transaction takes 16 ms, as the kernel waits for all processors, and the others wait with it. Look
first, and leave refusals to what another process causes. Only that of a generation costs nothing.

`present` tells which of many things exist, in one system call; `chain_names`, `rules`, `set_names`,
`elements` and `find_elements` list. What does not exist lists as nothing. Raises KernelError. `retry` is for
changes that rest on such a list. `present` and `generation` raise NftMissing, a KernelError, where the kernel
has no nf_tables.

Decision: the kernel is spoken to here, not `nft`, as starting a process costs more than a pod's whole ADD.
The tables made this way are the plugins' own; the daemon's go through `cni.net.firewall`.

Layouts: linux/netfilter/nfnetlink.h and nf_tables.h. The kernel carries out a batch when it has its end, and
answers then: one message for each refused one, in order, and an acknowledgement for each that asks.
"""

from __future__ import annotations

import errno

from cni.errors import KernelError
from cni.net.nftexpr import (
    VERDICT,
    be32,
    element_comment,
    jump_verdict,
    nested,
    read_comment,
    read_jump,
    rule_comment,
    text,
    type_bytes,
    value,
)
from cni.net.nlmsg import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    attr,
    attr_list,
    attrs,
)
from cni.net.nlsocket import Answer, ProtocolMissing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import TypeVar

    from cni.net.nlmsg import Request
    from cni.net.nlsocket import NetlinkSocket

    T = TypeVar("T")

# Families, linux/netfilter.h.
INET, IP, BRIDGE, IP6 = 1, 2, 7, 10
_FAMILY_NAMES = {INET: "inet", IP: "ip", BRIDGE: "bridge", IP6: "ip6"}
# Hooks, and priorities as `nft` names them.
PREROUTING, OUTPUT, POSTROUTING = 0, 3, 4
DSTNAT, SRCNAT, BRIDGE_DSTNAT = -100, 100, -300

_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEWTABLE, _GETTABLE, _DELTABLE = 0, 1, 2
_NEWCHAIN, _GETCHAIN, _DELCHAIN = 3, 4, 5
_NEWRULE, _GETRULE, _DELRULE = 6, 7, 8
_NEWSET, _GETSET, _DELSET = 9, 10, 11
_NEWELEMENT, _GETELEMENT, _DELELEMENT = 12, 13, 14
_GETGENERATION = 16
_SET_IS_MAP = 8
_NFGENMSG_BYTES = 4
# Struct nfgenmsg of the messages around a batch: family, version, subsystem in network order.
_BATCH_HEADER = bytes((0, 0, 0, _SUBSYSTEM))
# The list of elements is one attribute, whose length is a 16-bit number.
_ELEMENTS_PER_MESSAGE = 150
_OVERTAKEN = (errno.ENOENT, errno.EEXIST, errno.EBUSY, errno.ERESTART)
_MOST_TRIES = 100  # each loss is somebody else's success
_MOST_REFUSALS = 4  # those that stop the others as well


class NftRefused(KernelError):
    """A transaction of which the kernel has done nothing; `errno` is that of the first refused operation."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.errno = number


class NftMissing(ProtocolMissing):
    """The kernel has no nf_tables, so that nothing can be in it either."""


class Table:
    """A table by family (INET, IP, IP6, BRIDGE) and name."""

    __slots__ = ("family", "name")

    def __init__(self, family: int, name: str) -> None:
        self.family = family
        self.name = name

    def __str__(self) -> str:
        return f"{_FAMILY_NAMES[self.family]} {self.name}"


class Hook:
    """Where a base chain is called from: type (`nat`, `filter`), hook number, priority. Policy: accept."""

    __slots__ = ("kind", "number", "priority")

    def __init__(self, kind: str, number: int, priority: int) -> None:
        self.kind = kind
        self.number = number
        self.priority = priority


class Element:
    """An element of a set: key; `data` for maps, or `jump` (a chain) for verdict maps; comment."""

    __slots__ = ("comment", "data", "jump", "key")

    def __init__(self, key: bytes, data: bytes = b"", comment: str = "", jump: str = "") -> None:
        self.key = key
        self.data = data
        self.comment = comment
        self.jump = jump


class Rule:
    """A rule as listed: its chain, handle, comment, and the chain that it jumps or goes to (or empty).

    `expressions` are the kernel's own encoding, which is ours but for what the kernel adds.
    """

    __slots__ = ("chain", "comment", "expressions", "handle")

    def __init__(self, chain: str, handle: int, comment: str, expressions: bytes) -> None:
        self.chain = chain
        self.handle = handle
        self.comment = comment
        self.expressions = expressions

    @property
    def jump(self) -> str:
        return read_jump(self.expressions)


class Transaction:
    """Operations that the kernel carries out all or none. For one `commit`.

    With `generation` (see the function) the kernel refuses it (ERESTART) when any other transaction was
    committed since.
    """

    __slots__ = ("_generation", "_labels", "_requests")

    def __init__(self, generation: int | None = None) -> None:
        self._generation = generation
        self._requests: list[Request] = []
        self._labels: list[tuple[str, Table, str]] = []

    def __len__(self) -> int:
        return len(self._requests)

    def add_table(self, table: Table) -> None:
        self._add("add table", table, "", _NEWTABLE, NLM_F_CREATE, attr(1, text(table.name)))

    def delete_table(self, table: Table) -> None:
        """Delete a table with all that is in it."""
        self._add("delete table", table, "", _DELTABLE, 0, attr(1, text(table.name)))

    def add_chain(self, table: Table, name: str, hook: Hook | None = None) -> None:
        """Add a chain; with `hook` a base chain, whose policy is set to accept if it is there already."""
        body = attr(1, text(table.name)) + attr(3, text(name))
        if hook is not None:
            body += nested(4, attr(1, be32(hook.number)), attr(2, be32(hook.priority)))
            body += attr(5, be32(1)) + attr(7, text(hook.kind))
        self._add("add chain", table, name, _NEWCHAIN, NLM_F_CREATE, body)

    def flush_chain(self, table: Table, name: str) -> None:
        """Delete the rules of a chain."""
        self._add("flush chain", table, name, _DELRULE, 0, attr(1, text(table.name)) + attr(2, text(name)))

    def delete_chain(self, table: Table, name: str) -> None:
        """Delete a chain that is empty and that no rule leads to."""
        self._add("delete chain", table, name, _DELCHAIN, 0, attr(1, text(table.name)) + attr(3, text(name)))

    def add_rule(
        self,
        table: Table,
        chain: str,
        expressions: Iterable[bytes],
        comment: str = "",
        *,
        first: bool = False,
    ) -> None:
        """Append a rule, or insert it as the first; the comment has at most 128 bytes, else ValueError."""
        body = attr(1, text(table.name)) + attr(2, text(chain)) + nested(4, *expressions)
        if comment:
            body += attr(7, rule_comment(comment))
        flags = NLM_F_CREATE | (0 if first else NLM_F_APPEND)
        self._add("add rule to chain", table, chain, _NEWRULE, flags, body)

    def delete_rule(self, table: Table, rule: Rule) -> None:
        body = attr(1, text(table.name)) + attr(2, text(rule.chain)) + attr(3, rule.handle.to_bytes(8, "big"))
        self._add("delete rule of chain", table, rule.chain, _DELRULE, 0, body)

    def add_set(self, table: Table, name: str, key_type: int, data_type: int | None = None) -> None:
        """Add a set, or a map if it has a data type (numbers of `nftexpr`, `nftexpr.concatenation`)."""
        body = attr(1, text(table.name)) + attr(2, text(name))
        body += attr(3, be32(0 if data_type is None else _SET_IS_MAP))
        body += attr(4, be32(key_type)) + attr(5, be32(type_bytes(key_type)))
        if data_type is not None:
            body += attr(6, be32(data_type))
            body += b"" if data_type == VERDICT else attr(7, be32(type_bytes(data_type)))
        # The kernel wants a number by which rules of this batch could name the set; ours name it by name.
        body += attr(10, be32(len(self._requests) + 1))
        self._add("add set", table, name, _NEWSET, NLM_F_CREATE, body)

    def delete_set(self, table: Table, name: str) -> None:
        """Delete a set, with its elements, that no rule uses."""
        self._add("delete set", table, name, _DELSET, 0, attr(1, text(table.name)) + attr(2, text(name)))

    def add_elements(
        self, table: Table, name: str, elements: Sequence[Element], *, new: bool = False
    ) -> None:
        """Add elements; comments have at most 128 bytes, else ValueError.

        A key that is there already stays as it is, with its own comment; if its datum differs, or it had to
        be `new`, the transaction is refused (EEXIST).
        """
        flags = NLM_F_CREATE | NLM_F_EXCL if new else NLM_F_CREATE
        self._elements("add element to set", table, name, _NEWELEMENT, flags, elements)

    def replace_elements(self, table: Table, name: str, elements: Sequence[Element]) -> None:
        """Add elements to a set (no map) in place of those of the same keys, if there are any."""
        # What is there cannot be deleted blindly, but it can be added.
        self.add_elements(table, name, elements)
        self.delete_elements(table, name, elements)
        self.add_elements(table, name, elements)

    def delete_elements(self, table: Table, name: str, elements: Sequence[Element]) -> None:
        """Delete elements; of each only the key counts."""
        bare = [Element(one.key) for one in elements]
        self._elements("delete element of set", table, name, _DELELEMENT, 0, bare)

    def commit(self, socket: NetlinkSocket) -> None:
        """Carry all of it out; raises NftRefused, and then nothing was. Nothing to do costs nothing."""
        if not self._requests:
            return
        for place, answer in _exchange(socket, self._requests, self._generation):
            if answer.errno:
                raise NftRefused(f"cannot {self._describe(place)}: {answer.reason}", answer.errno)

    def _describe(self, place: int) -> str:
        if place == 0:
            return "change the packet filter (nf_tables)"
        verb, table, name = self._labels[place - 1]
        return f"{verb} {table} {name}".rstrip()

    def _elements(
        self, verb: str, table: Table, name: str, kind: int, flags: int, elements: Sequence[Element]
    ) -> None:
        for start in range(0, len(elements), _ELEMENTS_PER_MESSAGE):
            part = elements[start : start + _ELEMENTS_PER_MESSAGE]
            body = attr(1, text(table.name)) + attr(2, text(name)) + nested(3, *map(_encode, part))
            self._add(verb, table, name, kind, flags, body)

    def _add(self, verb: str, table: Table, name: str, kind: int, flags: int, body: bytes) -> None:
        self._requests.append(_request(kind, flags, table.family, body))
        self._labels.append((verb, table, name))


def retry(attempt: Callable[[], T]) -> T:
    """Call `attempt`, again if its transaction was refused because another one came first.

    For what lists, then changes what it has listed: the generation was another, or something was gone, was
    there by now, or was in use. Raises NftRefused if that goes on.
    """
    tries = refusals = 0
    while True:
        try:
            return attempt()
        except NftRefused as exc:
            tries += 1
            refusals += exc.errno != errno.ERESTART
            if exc.errno not in _OVERTAKEN or tries == _MOST_TRIES or refusals == _MOST_REFUSALS:
                raise


# --- what to ask `present` for


def table_query(table: Table) -> Request:
    return _request(_GETTABLE, 0, table.family, attr(1, text(table.name)))


def chain_query(table: Table, name: str) -> Request:
    return _request(_GETCHAIN, 0, table.family, attr(1, text(table.name)) + attr(3, text(name)))


def set_query(table: Table, name: str) -> Request:
    return _request(_GETSET, 0, table.family, attr(1, text(table.name)) + attr(2, text(name)))


def present(socket: NetlinkSocket, queries: Sequence[Request]) -> list[bool]:
    """Which of some tables, chains and sets exist. Raises KernelError without permission."""
    return [_found(answer) for answer in socket.transact(queries)] if queries else []


# --- listings


def generation(socket: NetlinkSocket) -> int:
    """The number of the last transaction in this network namespace."""
    answer = socket.request(*_request(_GETGENERATION, 0, 0, b""))
    if not _found(answer):
        raise KernelError(f"cannot read the generation of the packet filter: {answer.reason}")
    return int.from_bytes(attrs(answer.messages[0].body, _NFGENMSG_BYTES)[1], "big")


def rules(socket: NetlinkSocket, table: Table, chain: str = "") -> list[Rule]:
    """The rules of a chain, or of all chains of a table, in order."""
    body = attr(1, text(table.name)) + (attr(2, text(chain)) if chain else b"")
    kind, _, body = _request(_GETRULE, 0, table.family, body)
    found = []
    for message in socket.dump(kind, body):
        rule = attrs(message.body, _NFGENMSG_BYTES)
        # Kernels before 4.7 list everything.
        if _text(rule[1]) == table.name and chain in ("", _text(rule[2])):
            handle = int.from_bytes(rule[3], "big")
            found.append(Rule(_text(rule[2]), handle, read_comment(rule.get(7, b"")), rule.get(4, b"")))
    return found


def chain_names(socket: NetlinkSocket, table: Table) -> list[str]:
    kind, _, body = _request(_GETCHAIN, 0, table.family, attr(1, text(table.name)))
    found = [attrs(message.body, _NFGENMSG_BYTES) for message in socket.dump(kind, body)]
    return [_text(one[3]) for one in found if _text(one[1]) == table.name]


def set_names(socket: NetlinkSocket, table: Table) -> list[str]:
    """The names of a table's sets and maps, those of rules (anonymous) included."""
    if not _found(socket.request(*table_query(table))):
        return []
    kind, _, body = _request(_GETSET, 0, table.family, attr(1, text(table.name)))
    return [_text(attrs(message.body, _NFGENMSG_BYTES)[2]) for message in socket.dump(kind, body)]


def elements(socket: NetlinkSocket, table: Table, name: str, comment_start: str = "") -> list[Element]:
    """The elements of a set, or only those whose comment begins with `comment_start`."""
    if not _found(socket.request(*set_query(table, name))):
        return []
    found = [one for body in _dumped(socket, table, name) for one in _decode(body, comment_start)]
    return [one for one in found if one.comment.startswith(comment_start)]


def any_element_with(
    socket: NetlinkSocket, sets: Sequence[tuple[Table, str]], parts: Sequence[bytes]
) -> bool:
    """Whether in any of some sets, of those that exist, there may be an element that holds one of `parts`.

    Nothing is decoded: quick where the answer is no, which is certain then; a yes may be a coincidence.
    """
    there = present(socket, [set_query(*one) for one in sets])
    bodies = (
        body for one, exists in zip(sets, there, strict=True) if exists for body in _dumped(socket, *one)
    )
    return any(part in body for body in bodies for part in parts)


def find_elements(
    socket: NetlinkSocket, table: Table, wanted: Sequence[tuple[str, bytes]]
) -> list[Element | None]:
    """Single elements, by (set, key), in one system call; None for those that are not there."""
    requests = []
    for name, key in wanted:
        body = attr(1, text(table.name)) + attr(2, text(name)) + nested(3, _encode(Element(key)))
        requests.append(_request(_GETELEMENT, 0, table.family, body))
    answers = socket.transact(requests) if requests else []
    return [_decode(answer.messages[0].body)[0] if _found(answer) else None for answer in answers]


def _dumped(socket: NetlinkSocket, table: Table, name: str) -> list[bytes]:
    kind, _, body = _request(_GETELEMENT, 0, table.family, attr(1, text(table.name)) + attr(2, text(name)))
    return [message.body for message in socket.dump(kind, body)]


def _request(kind: int, flags: int, family: int, body: bytes) -> Request:
    return _SUBSYSTEM << 8 | kind, flags, bytes((family, 0, 0, 0)) + body


def _found(answer: Answer) -> bool:
    if answer.errno in (errno.EINVAL, errno.EOPNOTSUPP):
        raise NftMissing(f"the kernel has no nf_tables: {answer.reason}")
    if answer.errno not in (0, errno.ENOENT):
        raise KernelError(f"cannot read the packet filter (nf_tables): {answer.reason}")
    return answer.errno == 0 and bool(answer.messages)


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode("utf-8", "replace")


def _encode(element: Element) -> bytes:
    parts = [nested(1, value(element.key))]
    if element.data:
        parts.append(nested(2, value(element.data)))
    elif element.jump:
        parts.append(nested(2, jump_verdict(element.jump)))
    if element.comment:
        parts.append(attr(6, element_comment(element.comment)))
    return nested(1, *parts)


def _decode(body: bytes, comment_part: str = "") -> list[Element]:
    """The elements of a message; those without `comment_part` somewhere are passed over at once."""
    wanted, found = comment_part.encode(), []
    for _, raw in attr_list(attrs(body, _NFGENMSG_BYTES).get(3, b"")):
        if wanted not in raw:
            continue
        one = attrs(raw)
        key, data = attrs(one.get(1, b"")), attrs(one.get(2, b""))
        chain = attrs(data.get(2, b"")).get(2, b"")
        comment = read_comment(one.get(6, b""))
        found.append(Element(key.get(1, b""), data.get(1, b""), comment, _text(chain)))
    return found


def _exchange(
    socket: NetlinkSocket, requests: Sequence[Request], generation: int | None
) -> list[tuple[int, Answer]]:
    """Send a batch; its answers by place, see `NetlinkSocket.batch`."""
    guard = b"" if generation is None else attr(1, be32(generation))
    begin, end = (_BATCH_BEGIN, 0, _BATCH_HEADER + guard), (_BATCH_END, 0, _BATCH_HEADER)
    return socket.batch(begin, requests, end)
