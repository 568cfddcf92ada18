"""The nf_tables codec against the kernel, with `nft` as an independent reader and writer."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from cni.errors import KernelError
from cni.net import nft, nftexpr
from cni.net.nft import Element, Hook, NftRefused, Table, Transaction
from cni.net.nftexpr import REG
from cni.net.nlsocket import NETFILTER, NetlinkSocket
from cni.spec.address import parse_cidr, parse_ip
from tests.netns.firewall_fixtures import Namespace, namespace

T = TypeVar("T")

TABLE = Table(nft.INET, "t")
PORT = nftexpr.concatenation(nftexpr.INET_PROTO, nftexpr.INET_SERVICE)
TARGET = nftexpr.concatenation(nftexpr.IPV4_ADDR, nftexpr.INET_SERVICE)

LISTING = """\
table inet t {
	set pods {
		type ipv4_addr
		elements = { 10.1.17.5 comment "a pod" }
	}

	set pods6 {
		type ipv6_addr
		elements = { fd00:1::5 comment "a pod" }
	}

	map verdicts {
		type inet_proto . inet_service : verdict
		elements = { tcp . 80 comment "web" : jump other }
	}

	map ports {
		type inet_proto . inet_service : ipv4_addr . inet_service
		elements = { udp . 53 : 10.1.17.5 . 5353 }
	}

	chain other {
	}

	chain in {
		type nat hook prerouting priority dstnat; policy accept;
		meta mark set 0x00002000
		meta l4proto . th dport vmap @verdicts
		meta nfproto ipv4 fib daddr type local dnat ip to meta l4proto . th dport map @ports
	}

	chain out {
		type nat hook postrouting priority srcnat; policy accept;
		ip daddr 224.0.0.0/4 return comment "multicast"
		ip saddr @pods ip daddr != 10.1.17.0/24 masquerade
		ip6 saddr != @pods6 ip6 daddr fd00:1::7 counter accept
		iifname "veth1" jump other
		ip saddr 10.1.17.0/24 drop
	}
}
"""


@pytest.fixture(scope="module")
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


@pytest.fixture
def do(ns: Namespace) -> Iterator[Callable[[Callable[[NetlinkSocket], T]], T]]:
    """Call a function with a netfilter socket of an empty packet filter."""
    ns.run("nft flush ruleset")

    def call(function: Callable[[NetlinkSocket], T]) -> T:
        def inside() -> T:
            socket = NetlinkSocket(NETFILTER)
            try:
                return function(socket)
            finally:
                socket.close()

        return ns.call(inside)

    return call  # type: ignore[return-value]


Do = Callable[[Callable[[NetlinkSocket], T]], T]


def address(text: str) -> bytes:
    return nftexpr.address(*parse_ip(text))


def commit(*steps: Callable[[Transaction], None]) -> Callable[[NetlinkSocket], None]:
    def run(socket: NetlinkSocket) -> None:
        change = Transaction()
        for step in steps:
            step(change)
        change.commit(socket)

    return run


def with_set(change: Transaction) -> None:
    change.add_table(TABLE)
    change.add_set(TABLE, "pods", nftexpr.IPV4_ADDR)


def everything(change: Transaction) -> None:
    with_set(change)
    change.add_set(TABLE, "pods6", nftexpr.IPV6_ADDR)
    change.add_set(TABLE, "verdicts", PORT, nftexpr.VERDICT)
    change.add_set(TABLE, "ports", PORT, TARGET)
    change.add_chain(TABLE, "other")
    change.add_chain(TABLE, "in", Hook("nat", nft.PREROUTING, nft.DSTNAT))
    change.add_chain(TABLE, "out", Hook("nat", nft.POSTROUTING, nft.SRCNAT))
    change.add_elements(TABLE, "pods", [Element(address("10.1.17.5"), comment="a pod")])
    change.add_elements(TABLE, "pods6", [Element(address("fd00:1::5"), comment="a pod")])
    web = nftexpr.key(b"\x06", nftexpr.port(80))
    change.add_elements(TABLE, "verdicts", [Element(web, comment="web", jump="other")])
    target = nftexpr.key(address("10.1.17.5"), nftexpr.port(5353))
    change.add_elements(TABLE, "ports", [Element(nftexpr.key(b"\x11", nftexpr.port(53)), target)])
    rules_in(change)
    rules_out(change)


def rules_in(change: Transaction) -> None:
    port = [nftexpr.load_l4_protocol(), nftexpr.load_destination_port(REG + 1)]
    mark = (0x2000).to_bytes(4, sys.byteorder)
    dnat = [nftexpr.lookup("ports", into=REG), nftexpr.dnat(4, REG, REG + 1)]
    change.add_rule(TABLE, "in", [*port, nftexpr.lookup("verdicts", into=0)])
    change.add_rule(TABLE, "in", [*nftexpr.is_family(4), *nftexpr.fib_local_destination(), *port, *dnat])
    change.add_rule(TABLE, "in", [nftexpr.immediate(mark), nftexpr.set_meta(nftexpr.META_MARK)], first=True)


def rules_out(change: Transaction) -> None:
    multicast = nftexpr.in_network("daddr", parse_cidr("224.0.0.0/4"))
    change.add_rule(TABLE, "out", [*nftexpr.is_family(4), *multicast, nftexpr.return_()], "multicast")
    pod = [nftexpr.load_address(4, "saddr"), nftexpr.lookup("pods")]
    outside = nftexpr.in_network("daddr", parse_cidr("10.1.17.9/24"), nftexpr.NEQ)
    change.add_rule(TABLE, "out", [*nftexpr.is_family(4), *pod, *outside, nftexpr.masquerade()])
    no_pod = [nftexpr.load_address(6, "saddr"), nftexpr.lookup("pods6", invert=True)]
    one = nftexpr.in_network("daddr", parse_cidr("fd00:1::7/128"))
    last = [nftexpr.counter(), nftexpr.accept()]
    change.add_rule(TABLE, "out", [*nftexpr.is_family(6), *no_pod, *one, *last])
    port = [nftexpr.meta(nftexpr.META_IIFNAME), nftexpr.compare(nftexpr.EQ, nftexpr.ifname("veth1"))]
    change.add_rule(TABLE, "out", [*port, nftexpr.jump("other")])
    masked = [
        nftexpr.load_address(4, "saddr"),
        nftexpr.bitwise(address("255.255.255.0"), bytes(4)),
        nftexpr.compare(nftexpr.EQ, address("10.1.17.0")),
    ]
    change.add_rule(TABLE, "out", [*nftexpr.is_family(4), *masked, nftexpr.drop()])


def test_nft_lists_what_was_encoded(ns: Namespace, do: Do[None]) -> None:
    do(commit(everything))
    listed = ns.run("nft --stateless list ruleset")
    assert listed == LISTING
    ns.run("nft flush ruleset")
    ns.run("nft -f -", listed)
    assert ns.run("nft --stateless list ruleset") == LISTING


def test_what_nft_wrote_is_read(ns: Namespace, do: Do[object]) -> None:
    ns.run("nft -f -", LISTING)

    def read(socket: NetlinkSocket) -> None:
        assert sorted(nft.chain_names(socket, TABLE)) == ["in", "other", "out"]
        assert sorted(nft.set_names(socket, TABLE)) == ["pods", "pods6", "ports", "verdicts"]
        rules = nft.rules(socket, TABLE, "out")
        assert [(rule.comment, rule.jump) for rule in rules] == [
            ("multicast", ""),
            ("", ""),
            ("", ""),
            ("", "other"),
            ("", ""),
        ]
        assert {rule.chain for rule in nft.rules(socket, TABLE)} == {"in", "out"}
        (pod,) = nft.elements(socket, TABLE, "pods")
        assert (pod.key, pod.comment) == (address("10.1.17.5"), "a pod")
        (web,) = nft.elements(socket, TABLE, "verdicts")
        assert (web.key, web.jump, web.comment) == (b"\6\0\0\0\0\x50\0\0", "other", "web")
        (dns,) = nft.elements(socket, TABLE, "ports")
        assert dns.data == address("10.1.17.5") + (5353).to_bytes(2, "big") + b"\0\0"
        found = nft.find_elements(
            socket, TABLE, [("pods", pod.key), ("pods", address("10.1.17.6")), ("gone", pod.key)]
        )
        assert [one and one.comment for one in found] == ["a pod", None, None]

    do(read)


def test_what_does_not_exist_lists_as_nothing(do: Do[object]) -> None:
    absent = Table(nft.BRIDGE, "absent")

    def read(socket: NetlinkSocket) -> list[object]:
        queries = [nft.table_query(absent), nft.chain_query(absent, "c"), nft.set_query(absent, "s")]
        return [
            *nft.present(socket, queries),
            *(nft.rules(socket, absent, "c"), nft.chain_names(socket, absent)),
            *(nft.set_names(socket, absent), nft.elements(socket, absent, "s")),
            nft.find_elements(socket, absent, [("s", b"1234")]),
        ]

    assert do(read) == [False, False, False, [], [], [], [], [None]]


def test_present(do: Do[object]) -> None:
    do(commit(everything))
    other = Table(nft.IP, "t")
    queries = [
        *(nft.table_query(TABLE), nft.table_query(other), nft.chain_query(TABLE, "other")),
        *(nft.chain_query(TABLE, "others"), nft.set_query(TABLE, "pods"), nft.set_query(TABLE, "pod")),
    ]
    assert do(lambda socket: nft.present(socket, queries)) == [True, False, True, False, True, False]


def test_a_refused_transaction_has_done_nothing(ns: Namespace, do: Do[object]) -> None:
    do(commit(everything))
    before = ns.run("nft list ruleset")
    with pytest.raises(
        NftRefused, match=r"^cannot delete chain inet t other: device or resource busy"
    ) as refused:
        do(
            commit(
                lambda change: change.add_chain(TABLE, "new"),
                lambda change: change.delete_chain(TABLE, "other"),
                lambda change: change.delete_chain(TABLE, "gone"),
            )
        )
    assert refused.value.errno == errno.EBUSY
    assert ns.run("nft list ruleset") == before


def test_the_socket_is_of_use_after_a_refusal(do: Do[object]) -> None:
    def run(socket: NetlinkSocket) -> list[bool]:
        for number in (errno.ENOENT, errno.ENOENT):
            with pytest.raises(NftRefused) as refused:
                commit(lambda change: change.delete_table(TABLE))(socket)
            assert refused.value.errno == number
        commit(everything)(socket)
        return nft.present(socket, [nft.table_query(TABLE)])

    assert do(run) == [True]


def test_deletions(ns: Namespace, do: Do[object]) -> None:
    do(commit(everything))
    rules = do(lambda socket: nft.rules(socket, TABLE, "out"))
    (to_other,) = [rule for rule in rules if rule.jump == "other"]  # type: ignore[attr-defined]
    do(
        commit(
            lambda change: change.delete_rule(TABLE, to_other),
            lambda change: change.delete_elements(TABLE, "verdicts", [Element(b"\6\0\0\0\0\x50\0\0")]),
            lambda change: change.delete_chain(TABLE, "other"),
            lambda change: change.flush_chain(TABLE, "in"),
            lambda change: change.delete_set(TABLE, "verdicts"),
            lambda change: change.delete_elements(TABLE, "pods", [Element(address("10.1.17.5"))]),
        )
    )
    listed = ns.run("nft list ruleset")
    assert "other" not in listed and "verdicts" not in listed and "dnat" not in listed
    assert "10.1.17.5 comment" not in listed and "masquerade" in listed


def test_adding_again_changes_nothing(ns: Namespace, do: Do[object]) -> None:
    do(commit(everything))
    before = ns.run("nft list ruleset")
    do(
        commit(
            with_set,
            lambda change: change.add_set(TABLE, "ports", PORT, TARGET),
            lambda change: change.add_chain(TABLE, "in", Hook("nat", nft.PREROUTING, nft.DSTNAT)),
            lambda change: change.add_elements(TABLE, "pods", [Element(address("10.1.17.5"), comment="b")]),
        )
    )
    assert ns.run("nft list ruleset") == before


def test_replaced_elements_have_the_new_comment(do: Do[object]) -> None:
    do(commit(with_set))
    for comment in ("first", "second"):
        do(
            commit(
                lambda change, comment=comment: change.replace_elements(  # type: ignore[misc]
                    TABLE, "pods", [Element(address("10.1.17.5"), comment=comment)]
                )
            )
        )
        found = do(lambda socket: nft.elements(socket, TABLE, "pods"))
        assert [one.comment for one in found] == [comment]  # type: ignore[attr-defined]


def test_elements_by_the_start_of_their_comments(do: Do[object]) -> None:
    pods = {"pod a": 1, "a pod": 2, "pod": 3, "": 4}
    elements = [Element(n.to_bytes(4, "big"), comment=comment) for comment, n in pods.items()]
    do(commit(with_set, lambda change: change.add_elements(TABLE, "pods", elements)))
    found = do(lambda socket: nft.elements(socket, TABLE, "pods", "pod"))
    assert sorted(one.comment for one in found) == ["pod", "pod a"]  # type: ignore[attr-defined]


def test_thousands_of_elements(ns: Namespace, do: Do[object]) -> None:
    pods = [Element((0x0A010000 + n).to_bytes(4, "big"), comment="x" * 128) for n in range(1000)]
    do(commit(with_set, lambda change: change.add_elements(TABLE, "pods", pods)))
    found = do(lambda socket: nft.elements(socket, TABLE, "pods"))
    assert {one.key for one in found} == {one.key for one in pods}  # type: ignore[attr-defined]
    do(commit(lambda change: change.delete_elements(TABLE, "pods", pods)))
    assert "elements" not in ns.run("nft list ruleset")


def test_a_comment_of_the_greatest_length_is_one_that_nft_takes(ns: Namespace, do: Do[object]) -> None:
    longest = "x" * nftexpr.LONGEST_COMMENT
    one = Element(address("10.1.17.5"), comment=longest)
    do(commit(with_set, lambda change: change.add_elements(TABLE, "pods", [one])))
    listed = ns.run("nft list ruleset")
    assert longest in listed
    ns.run("nft flush ruleset")
    ns.run("nft -f -", listed)
    with pytest.raises(ValueError, match="comment longer than 128 bytes"):
        nftexpr.element_comment(longest + "x")


def test_a_guarded_transaction_is_refused_after_any_other(ns: Namespace, do: Do[object]) -> None:
    def run(socket: NetlinkSocket) -> tuple[bool, bool]:
        first = Transaction(nft.generation(socket))
        first.add_table(TABLE)
        late = Transaction(nft.generation(socket))
        late.add_table(Table(nft.IP, "late"))
        first.commit(socket)
        with pytest.raises(NftRefused, match="cannot change the packet filter") as refused:
            late.commit(socket)
        assert refused.value.errno == errno.ERESTART
        there = nft.present(socket, [nft.table_query(TABLE), nft.table_query(Table(nft.IP, "late"))])
        return there[0], there[1]

    assert do(run) == (True, False)


def test_retry_counts_on_many_threads(ns: Namespace, do: Do[object]) -> None:
    """Each thread adds an element whose key is one more than the highest: only guarded ones add up."""
    do(commit(with_set))

    def add_next() -> None:
        socket = NetlinkSocket(NETFILTER)

        def attempt() -> None:
            change = Transaction(nft.generation(socket))
            keys = [int.from_bytes(one.key, "big") for one in nft.elements(socket, TABLE, "pods")]
            change.add_elements(TABLE, "pods", [Element((max(keys, default=0) + 1).to_bytes(4, "big"))])
            change.commit(socket)

        for _ in range(20):
            nft.retry(attempt)
        socket.close()

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(ns.call, add_next) for _ in range(4)]:
            done.result()
    found = do(lambda socket: nft.elements(socket, TABLE, "pods"))
    assert sorted(int.from_bytes(one.key, "big") for one in found) == list(range(1, 81))  # type: ignore[attr-defined]


def test_retry_gives_up_on_what_no_repetition_mends(do: Do[object]) -> None:
    attempts = []

    def run(socket: NetlinkSocket) -> None:
        def attempt() -> None:
            attempts.append(1)
            commit(lambda change: change.add_chain(TABLE, "x" * 1000))(socket)

        nft.retry(attempt)

    with pytest.raises(NftRefused, match="cannot add chain inet t xxx"):
        do(run)
    assert len(attempts) == 1


def test_without_permission(ns: Namespace) -> None:
    def run() -> None:
        socket = NetlinkSocket(NETFILTER)
        try:
            with pytest.raises(
                NftRefused, match=r"^cannot change the packet filter .*not permitted"
            ) as refused:
                commit(everything)(socket)
            assert refused.value.errno == errno.EPERM
            with pytest.raises(KernelError, match="not permitted"):
                nft.present(socket, [nft.table_query(TABLE)])
        finally:
            socket.close()

    ns.call_beside_privileged_children(run)


# --- many


def test_a_transaction_larger_than_the_send_buffer(do: Do[int]) -> None:
    def run(socket: NetlinkSocket) -> int:
        commit(with_set)(socket)
        pods = [Element(n.to_bytes(4, "big"), comment="c" * 100) for n in range(8000)]
        commit(lambda change: change.add_elements(TABLE, "pods", pods))(socket)
        return len(nft.elements(socket, TABLE, "pods"))

    assert do(run) == 8000


def test_a_user_namespace_may_send_what_its_limit_lets_it() -> None:
    """There the buffer cannot be forced; half of this fits into the default one."""
    program = """if True:
        from cni.net import nft, nftexpr, nlsocket
        socket = nlsocket.NetlinkSocket(nlsocket.NETFILTER)
        change, table = nft.Transaction(), nft.Table(nft.INET, "t")
        change.add_table(table)
        change.add_set(table, "pods", nftexpr.IPV4_ADDR)
        pods = [nft.Element(n.to_bytes(4, "big"), comment="c" * 100) for n in range(2000)]
        change.add_elements(table, "pods", pods)
        change.commit(socket)
        print(len(nft.elements(socket, table, "pods")))
    """
    # Root without a mapping has every capability but that over the machine.
    command = ["unshare", "--user", "--map-root-user", "--net", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (done.stdout, done.stderr) == ("2000\n", "")


def test_an_element_is_looked_for_without_decoding(do: Do[object], monkeypatch: pytest.MonkeyPatch) -> None:
    do(commit(everything))
    sets = [(TABLE, "gone"), (TABLE, "pods"), (TABLE, "ports")]

    def read(socket: NetlinkSocket) -> list[bool]:
        parts = [b"a pod", address("10.1.17.5"), b"web", address("10.1.17.6")]
        found = [nft.any_element_with(socket, sets, [part]) for part in parts]
        return [
            *found,
            nft.any_element_with(socket, sets, parts),
            nft.any_element_with(socket, sets[:1], parts),
        ]

    monkeypatch.setattr(nft, "_decode", None)
    assert do(read) == [True, True, False, False, True, False]
