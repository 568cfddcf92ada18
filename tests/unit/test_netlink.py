"""Route netlink messages: what is written reads back as it was, and garbage ends quietly."""

from __future__ import annotations

import errno
import struct
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.net import netlink, nlmsg
from cni.net.entries import Address, Blackhole, Entry, FdbEntry, Link, Neighbour, Route, Vxlan
from cni.net.kernel import as_link, as_neighbour, as_route
from cni.net.nlmsg import Message

LINK, UNDERLAY = "flannel.1", "eth0"
INDEXES = {LINK: 7, UNDERLAY: 2}

macs = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))
v4 = st.ip_addresses(v=4).map(str)
v6 = st.ip_addresses(v=6).map(str)
addresses = st.one_of(v4, v6)
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789.-_", min_size=1, max_size=15)


@st.composite
def prefixes(draw: st.DrawFn, version: int) -> str:
    number = draw(st.integers(0, 2 ** (32 if version == 4 else 128) - 1))
    length = draw(st.integers(0, 32 if version == 4 else 128))
    address = IPv4Address(number) if version == 4 else IPv6Address(number)
    return str(ip_network((address, length), strict=False))


@st.composite
def links(draw: st.DrawFn) -> Link:
    vxlan = Vxlan(
        vni=draw(st.integers(0, (1 << 24) - 1)),
        port=draw(st.integers(0, 65535)),
        local=draw(addresses),
        underlay=UNDERLAY,
        gbp=draw(st.booleans()),
        learning=draw(st.booleans()),
    )
    mtu, up = draw(st.integers(0, (1 << 32) - 1)), draw(st.booleans())
    return Link(draw(names), mtu, draw(macs), up, vxlan)


@st.composite
def routes(draw: st.DrawFn) -> Route:
    version = draw(st.sampled_from((4, 6)))
    via = draw(st.one_of(st.just(""), v4 if version == 4 else v6))
    metric = draw(st.integers(0, (1 << 32) - 1))
    return Route(LINK, draw(prefixes(version)), via, draw(st.booleans()), metric, draw(st.booleans()))


neighbours = st.builds(Neighbour, st.just(LINK), addresses, macs)
fdb_entries = st.builds(FdbEntry, st.just(LINK), macs, addresses)
own_addresses = st.one_of(prefixes(4), prefixes(6)).map(lambda prefix: Address(LINK, prefix))
blackholes = st.builds(Blackhole, st.one_of(prefixes(4), prefixes(6)), st.integers(0, (1 << 32) - 1))
on_links: st.SearchStrategy[Entry] = st.one_of(links(), own_addresses, neighbours, fdb_entries, routes())
entries: st.SearchStrategy[Entry] = st.one_of(on_links, blackholes)


def sent(entry: Entry) -> Message:
    """The message that would create the entry, as the kernel gets it."""
    kind, flags, body = netlink.put(entry, {**INDEXES, entry.link: 7})
    [message] = nlmsg.messages(nlmsg.message(kind, flags, 1, body))
    return message


# ---- laws of encoding and decoding


@given(links())
def test_a_link_reads_back_as_it_was(link: Link) -> None:
    assert as_link(netlink.read_link(sent(link).body), {2: UNDERLAY}) == link


@given(own_addresses)
def test_an_address_reads_back_as_it_was(entry: Address) -> None:
    found = netlink.read_address(sent(entry).body)
    assert (found.ifindex, f"{found.address}/{found.length}") == (7, entry.address)


@given(neighbours)
def test_a_neighbour_reads_back_as_it_was(entry: Neighbour) -> None:
    found = netlink.read_neighbour(sent(entry).body)
    assert found.ifindex == 7
    assert as_neighbour(found, LINK) == entry


@given(fdb_entries)
def test_an_fdb_entry_reads_back_as_it_was(entry: FdbEntry) -> None:
    found = netlink.read_neighbour(sent(entry).body)
    assert found.ifindex == 7
    assert as_neighbour(found, LINK) == entry


@given(routes())
def test_a_route_reads_back_as_it_was(entry: Route) -> None:
    found = netlink.read_route(sent(entry).body)
    assert found.ifindex == 7
    assert (found.table, found.protocol, found.kind) == (254, 241 if entry.marked else 3, 1)
    assert as_route(found, LINK) == entry


@given(blackholes)
def test_a_blackhole_reads_back_as_it_was(entry: Blackhole) -> None:
    found = netlink.read_route(sent(entry).body)
    assert (found.table, found.protocol, found.kind) == (254, 3, netlink.RTN_BLACKHOLE)
    assert Blackhole(found.dst, found.metric) == entry


@given(addresses)
def test_addresses_are_written_as_python_writes_them(text: str) -> None:
    assert netlink.address_text(netlink.packed(text)) == text


@pytest.mark.parametrize(
    "text", ["::", "::1", "::102:304", "::ffff:102:304", "64:ff9b::102:304", "1:0:0:2::"]
)
def test_the_c_librarys_own_forms_are_not_ours(text: str) -> None:
    """Some of them end in an IPv4 address."""
    address = IPv6Address(text)
    assert netlink.address_text(address.packed) == str(address)


@given(entries)
def test_a_message_is_as_long_as_it_says_and_aligned(entry: Entry) -> None:
    kind, flags, body = netlink.put(entry, {**INDEXES, entry.link: 7})
    raw = nlmsg.message(kind, flags, 99, body)
    length, found_kind, found_flags, seq, pid = struct.unpack_from("=IHHII", raw)
    assert (length, found_kind, seq, pid) == (len(raw), kind, 99, 0)
    assert found_flags == flags | nlmsg.NLM_F_REQUEST
    assert len(raw) % 4 == 0


@given(entries)
def test_a_deletion_names_the_same_object(entry: Entry) -> None:
    kind, _flags, body = netlink.drop(entry, {**INDEXES, entry.link: 7})
    made, _, _ = netlink.put(entry, {**INDEXES, entry.link: 7})
    assert kind == made + 1
    match entry:
        case Link():
            assert netlink.read_link(body).ifindex == 7
        case Address():
            found = netlink.read_address(body)
            assert (found.ifindex, f"{found.address}/{found.length}") == (7, entry.address)
        case Neighbour() | FdbEntry():
            assert as_neighbour(netlink.read_neighbour(body), LINK) == entry
        case Route():
            route = netlink.read_route(body)
            assert (route.ifindex, route.dst, route.metric) == (7, entry.dst, entry.metric)
            # A route on a link of ours is named whoever made it, elsewhere none but ours.
            assert route.protocol == (netlink.RTPROT_FLANNEL if entry.marked else 0)
        case Blackhole():
            route = netlink.read_route(body)
            assert (route.kind, route.dst, route.metric) == (netlink.RTN_BLACKHOLE, entry.dst, entry.metric)


@given(on_links)
def test_an_unknown_link_is_named(entry: Entry) -> None:
    wanted = UNDERLAY if isinstance(entry, Link) else LINK
    with pytest.raises(KeyError) as caught:
        netlink.put(entry, {})
    assert caught.value.args == (wanted,)


def test_changing_a_link_sends_only_what_differs() -> None:
    have = netlink.LinkInfo(7, LINK, 1450, "02:00:00:00:00:01", True, "vxlan", None, 0)
    vxlan = Vxlan(1, 8472, "192.0.2.1", UNDERLAY)
    same = Link(LINK, 1450, "02:00:00:00:00:01", True, vxlan)
    # 3 IFLA_IFNAME, 4 IFLA_MTU, 1 IFLA_ADDRESS
    for link, present in (
        (same, {3}),
        (same._replace(mtu=1400), {3, 4}),
        (same._replace(mac="02:00:00:00:00:02"), {3, 1}),
        (same._replace(mac=""), {3}),
    ):
        kind, flags, body = netlink.put(link, INDEXES, have)
        assert (kind, flags) == (netlink.RTM_NEWLINK, 0)
        assert set(nlmsg.attrs(body, 16)) == present
        assert netlink.read_link(body).ifindex == 7


# ---- what only the kernel writes


def test_a_neighbour_that_is_not_permanent_is_no_entry() -> None:
    found = netlink.NeighbourInfo(2, 7, "10.244.2.0", "02:00:00:00:00:02", False, False)
    assert as_neighbour(found, LINK) is None


@pytest.mark.parametrize("flags", [0x04, 0x02])  # NTF_MASTER, NTF_SELF
def test_an_fdb_entry_that_mirrors_a_bridge_is_no_entry(flags: int) -> None:
    body = struct.pack("=BxxxiHBB", netlink.AF_BRIDGE, 7, netlink.NUD_PERMANENT, flags, 0)
    body += nlmsg.attr(2, nlmsg.mac_bytes("02:00:00:00:00:02")) + nlmsg.attr(9, nlmsg.u32(3))
    assert as_neighbour(netlink.read_neighbour(body), LINK) is None


def test_an_fdb_entry_of_another_table_is_no_entry() -> None:
    found = netlink.NeighbourInfo(netlink.AF_BRIDGE, 7, "192.0.2.2", "02:00:00:00:00:02", True, False)
    assert as_neighbour(found, LINK) is None


def test_an_ipv4_route_through_an_ipv6_gateway_has_a_gateway() -> None:
    body = sent(Route(LINK, "10.0.0.0/8", "")).body
    body += nlmsg.attr(18, struct.pack("=H", 10) + IPv6Address("fe80::1").packed)  # RTA_VIA
    assert netlink.read_route(body).via == "fe80::1"


@pytest.mark.parametrize("raw", [b"\xff\xfe", "höst".encode("latin-1"), b"a\xc3"])
def test_a_link_name_need_not_be_utf8(raw: bytes) -> None:
    """The kernel forbids only NUL, slash, colon and space in names."""
    body = struct.pack("=BxHiII", 0, 1, 9, 0, 0) + nlmsg.attr(3, raw + b"\0")
    found = netlink.read_link(body)
    assert found.ifindex == 9
    found.name.encode("utf-8")


# ---- errors

HEADER = struct.pack("=IHHII", 20, netlink.RTM_NEWROUTE, 5, 42, 0)


def answer(code: int, flags: int, echoed: bytes, tlvs: bytes = b"") -> Message:
    return Message(nlmsg.NLMSG_ERROR, flags, 42, struct.pack("=i", code) + echoed + tlvs)


def test_an_acknowledgement_is_errno_0() -> None:
    assert nlmsg.error(answer(0, nlmsg.NLM_F_CAPPED, HEADER)) == (0, "")


def test_an_error_without_words() -> None:
    assert nlmsg.error(answer(-errno.EEXIST, 0, HEADER + b"body")) == (errno.EEXIST, "")


WORDS = nlmsg.attr(1, b"Device does not exist\0")  # NLMSGERR_ATTR_MSG
OFFSET = nlmsg.attr(2, nlmsg.u32(28))  # NLMSGERR_ATTR_OFFS


@pytest.mark.parametrize("tlvs", [WORDS, OFFSET + WORDS, WORDS + OFFSET])
def test_the_kernels_own_words_are_found(tlvs: bytes) -> None:
    capped = nlmsg.NLM_F_CAPPED | nlmsg.NLM_F_ACK_TLVS
    expected = (errno.ENODEV, "Device does not exist")
    assert nlmsg.error(answer(-errno.ENODEV, capped, HEADER, tlvs)) == expected
    # An answer that is not capped repeats the whole request, padded, before the words.
    whole = struct.pack("=IHHII", 18, netlink.RTM_NEWROUTE, 5, 42, 0) + b"ab\0\0"
    assert nlmsg.error(answer(-errno.ENODEV, nlmsg.NLM_F_ACK_TLVS, whole, tlvs)) == expected


def test_words_that_are_no_utf8_do_not_hurt() -> None:
    capped = nlmsg.NLM_F_CAPPED | nlmsg.NLM_F_ACK_TLVS
    code, text = nlmsg.error(answer(-1, capped, HEADER, nlmsg.attr(1, b"\xff\0")))
    assert (code, text) == (1, "\ufffd")


# ---- what is cut off, and garbage


def fields(entry: Entry) -> tuple[int, int, int, bytes]:
    message = sent(entry)
    return message.kind, message.flags, message.seq, message.body


@given(st.lists(entries, min_size=1, max_size=4), st.data())
def test_a_cut_buffer_gives_the_messages_before_the_cut(found: list[Entry], data: st.DataObject) -> None:
    whole = [nlmsg.message(*fields(entry)) for entry in found]
    buffer = b"".join(whole)
    cut = data.draw(st.integers(0, len(buffer)))
    ends = [sum(map(len, whole[: n + 1])) for n in range(len(whole))]
    got = [message.body for message in nlmsg.messages(buffer[:cut])]
    assert got == [sent(entry).body for entry, end in zip(found, ends, strict=True) if end <= cut]


@given(st.binary(max_size=200))
def test_any_buffer_of_messages_ends(buffer: bytes) -> None:
    assert sum(16 + len(message.body) for message in nlmsg.messages(buffer)) <= len(buffer)


@given(st.binary(max_size=200), st.integers(0, 50))
def test_any_buffer_of_attributes_ends(buffer: bytes, offset: int) -> None:
    assert all(value in buffer for value in nlmsg.attrs(buffer, offset).values())


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=20), max_size=5), st.data())
def test_cut_attributes_are_those_before_the_cut(wanted: dict[int, bytes], data: st.DataObject) -> None:
    encoded = {kind: nlmsg.attr(kind, payload) for kind, payload in wanted.items()}
    buffer = b"".join(encoded.values())
    assert nlmsg.attrs(buffer) == wanted
    cut = data.draw(st.integers(0, len(buffer)))
    got = nlmsg.attrs(buffer[:cut])
    assert list(got.items()) == list(wanted.items())[: len(got)]


@given(st.integers(0, 0x3FFF), st.binary(max_size=8))
def test_the_flags_of_an_attribute_are_not_part_of_its_kind(kind: int, payload: bytes) -> None:
    for flag in (0x8000, 0x4000, 0xC000):
        assert nlmsg.attrs(nlmsg.attr(kind | flag, payload)) == {kind: payload}


@given(entries, st.data())
def test_a_length_of_zero_does_not_loop(entry: Entry, data: st.DataObject) -> None:
    raw = bytearray(nlmsg.message(*fields(entry)))
    short = data.draw(st.integers(0, 15))
    struct.pack_into("=I", raw, 0, short)
    assert list(nlmsg.messages(bytes(raw))) == []
    assert nlmsg.attrs(struct.pack("=HH", short % 4, 1) + bytes(raw)) == {}
