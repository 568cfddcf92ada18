"""DHCPv6 messages and options: known bytes, parse after encode, and what broken bytes are called."""

from __future__ import annotations

from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import ConfigError
from launcher.ipv6.packet import (
    IA_CODES,
    Code,
    Ia,
    IaAddress,
    Kind,
    Malformed,
    Message,
    Option,
    Status,
    addresses_option,
    duid_ll,
    duid_mac,
    encode_name,
    encode_search,
    format_mac,
    fqdn_option,
    ntp_option,
    parse_ia,
    parse_mac,
    parse_message,
    parse_options,
    status_option,
)
from tests.unit.capture import tcpdump, udp

SECONDS = st.integers(0, 0xFFFFFFFF)
OPTIONS = st.builds(Option, st.integers(0, 0xFFFF), st.binary(max_size=40))
ADDRESSES = st.builds(IaAddress, st.ip_addresses(v=6), SECONDS, SECONDS)
MESSAGES = st.builds(
    Message,
    st.sampled_from([kind for kind in Kind if kind < Kind.RELAY_FORW]),
    st.binary(min_size=3, max_size=3),
    st.lists(OPTIONS, max_size=8).map(tuple),
)


@st.composite
def identity_associations(draw: st.DrawFn) -> Ia:
    code = draw(st.sampled_from(IA_CODES))
    timers = (0, 0) if code == Code.IA_TA else (draw(SECONDS), draw(SECONDS))
    addresses = () if code == Code.IA_PD else tuple(draw(st.lists(ADDRESSES, max_size=4)))
    foreign = OPTIONS.filter(lambda option: code == Code.IA_PD or option.code != Code.IA_ADDRESS)
    others = draw(st.lists(foreign | st.just(Option(Code.STATUS, b"\0\0")), max_size=4))
    return Ia(code, draw(SECONDS), *timers, addresses, tuple(others))


# --- bytes that are known ---------------------------------------------------------------------------


def test_ia_na_of_upstream() -> None:
    ia = Ia(Code.IA_NA, 1, addresses=(IaAddress(IPv6Address("fd10:0:2::2"), 86_313_600, 86_313_600),))
    assert ia.option().encode() == bytes.fromhex(
        "00 03 00 28 00 00 00 01 00 00 00 00 00 00 00 00 00 05 00 18 fd 10 00 00 00 02 00 00 00 00 00 00"
        "00 00 00 02 05 25 0a 80 05 25 0a 80"
    )


def test_server_duid_of_the_masquerade_bridge() -> None:
    assert duid_ll("02:00:00:00:00:00") == bytes.fromhex("00 03 00 01 02 00 00 00 00 00")


@pytest.mark.parametrize(
    ("option", "wire"),
    [
        (status_option(Status.NOT_ON_LINK, "no"), "00 0d 00 04 00 04 6e 6f"),
        (addresses_option(Code.DNS_SERVERS, [IPv6Address("::1")]), "00 17 00 10" + "00" * 15 + "01"),
        # RFC 5908 section 4: a container with one suboption.
        (ntp_option(IPv6Address("::1")), "00 38 00 14 00 01 00 10" + "00" * 15 + "01"),
    ],
)
def test_options(option: Option, wire: str) -> None:
    assert option.encode() == bytes.fromhex(wire)


@pytest.mark.parametrize(
    ("received", "hostname", "wire"),
    [
        ("00 00", "vm1", "04 03 76 6d 31"),  # N; one label is partial, without the zero
        ("01 00", "vm1", "06 03 76 6d 31"),  # wanted S: O says that it is overridden
        ("04 00", "vm1.example.com", "04 03 76 6d 31 07 65 78 61 6d 70 6c 65 03 63 6f 6d 00"),
        ("", "VM1", "04 03 76 6d 31"),
    ],
)
def test_fqdn_answers_what_the_client_wants_with_no_updates(received: str, hostname: str, wire: str) -> None:
    assert fqdn_option(bytes.fromhex(received), hostname) == Option(Code.CLIENT_FQDN, bytes.fromhex(wire))


def test_an_independent_decoder_reads_every_option() -> None:
    address = IaAddress(IPv6Address("fd10:0:2::2"), 3600, 7200)
    message = Message(
        Kind.REPLY,
        b"\x11\x22\x33",
        (
            Option(Code.CLIENT_ID, duid_ll("0a:58:0a:f4:01:07")),
            Option(Code.SERVER_ID, duid_ll("02:00:00:00:00:00")),
            Option(Code.RAPID_COMMIT, b""),
            Ia(Code.IA_NA, 7, 1800, 2880, (address,)).option(),
            Ia(Code.IA_TA, 8, options=(status_option(Status.NO_ADDRS_AVAIL, "none"),)).option(),
            Ia(Code.IA_PD, 9, options=(status_option(Status.NO_PREFIX_AVAIL, "none"),)).option(),
            addresses_option(Code.DNS_SERVERS, [IPv6Address("fd00::53"), IPv6Address("fd00::54")]),
            Option(Code.DOMAIN_LIST, encode_search("foo.com") + encode_search("foo.local")),
            addresses_option(Code.SNTP_SERVERS, [IPv6Address("fd00::123")]),
            ntp_option(IPv6Address("fd00::123")),
            fqdn_option(b"\x01", "vm1"),
        ),
    )
    text = tcpdump(udp(message.encode(), "fe80::1", "fe80::2", (547, 546)))
    assert text.endswith(
        "[udp sum ok] dhcp6 reply (xid=112233 (client-ID hwaddr type 1 0a580af40107) "
        "(server-ID hwaddr type 1 020000000000) (rapid-commit) "
        "(IA_NA IAID:7 T1:1800 T2:2880 (IA_ADDR fd10:0:2::2 pltime:3600 vltime:7200)) "
        "(IA_TA IAID:8 (status-code NoAddrsAvail)) "
        "(IA_PD IAID:9 T1:0 T2:0 (status-code NoPrefixAvail)) "
        "(DNS-server fd00::53 fd00::54) (DNS-search-list foo.com. foo.local.) "
        "(SNTP-servers fd00::123) (NTP-server subopt:1 fd00::123) (Client-FQDN))"
    )


# --- parsing ----------------------------------------------------------------------------------------


@given(MESSAGES)
def test_a_message_is_what_was_encoded(message: Message) -> None:
    assert parse_message(message.encode()) == message


@given(identity_associations())
def test_an_identity_association_is_what_was_encoded(ia: Ia) -> None:
    option = ia.option()
    assert parse_options(option.encode()) == (option,)
    assert parse_ia(ia.code, option.data) == ia


def test_addresses_in_an_ia_pd_are_not_looked_at() -> None:
    stray = Option(Code.IA_ADDRESS, b"short")
    ia = Ia(Code.IA_PD, 1, options=(stray,))
    assert parse_ia(Code.IA_PD, ia.option().data) == ia


@given(st.binary(max_size=200))
def test_any_bytes_parse_to_what_encodes_to_them_or_are_malformed(data: bytes) -> None:
    message = parse_message(data)
    assert isinstance(message, Malformed) or message.encode() == data


@given(st.sampled_from(IA_CODES), st.binary(max_size=120))
def test_any_value_of_an_identity_association_parses_or_is_malformed(code: Code, data: bytes) -> None:
    ia = parse_ia(code, data)
    assert isinstance(ia, Malformed) or ia.option().data[:4] == data[:4]


@given(MESSAGES.filter(lambda message: bool(message.options)), st.data())
def test_a_message_cut_within_an_option_is_malformed(message: Message, data: st.DataObject) -> None:
    wire = message.encode()
    last = len(message.options[-1].encode())
    cut = data.draw(st.integers(len(wire) - last + 1, len(wire) - 1))
    assert isinstance(parse_message(wire[:cut]), Malformed)


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        ("", "0 bytes: a message has at least 4"),
        ("01 11 22", "3 bytes: a message has at least 4"),
        ("00 11 22 33", "unknown message type 0"),
        ("0e 11 22 33", "unknown message type 14"),
        ("0c 00" + "00" * 32, "RELAY_FORW: no relay stands between this server and its client"),
        ("0d 00" + "00" * 32, "RELAY_REPL: no relay stands between this server and its client"),
        ("01 11 22 33 00 01 00", "3 stray bytes after the last option"),
        ("01 11 22 33 00 01 00 05 aa", "option 1 claims 5 bytes, 1 are left"),
    ],
)
def test_a_broken_message_names_the_fault(wire: str, reason: str) -> None:
    assert parse_message(bytes.fromhex(wire)) == Malformed(reason)


@pytest.mark.parametrize(
    ("code", "wire", "reason"),
    [
        (Code.IA_NA, "00" * 11, "IA_NA of 11 bytes, it has at least 12"),
        (Code.IA_TA, "00" * 3, "IA_TA of 3 bytes, it has at least 4"),
        (Code.IA_PD, "00" * 11, "IA_PD of 11 bytes, it has at least 12"),
        (Code.IA_NA, "00" * 12 + "00 05", "IA_NA: 2 stray bytes after the last option"),
        (
            Code.IA_TA,
            "00" * 4 + "00 05 00 17" + "00" * 23,
            "IA_TA: address of 23 bytes, it has at least 24",
        ),
    ],
)
def test_a_broken_identity_association_names_the_fault(code: Code, wire: str, reason: str) -> None:
    assert parse_ia(code, bytes.fromhex(wire)) == Malformed(reason)


# --- DUIDs and MACs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duid", "mac"),
    [
        ("00 03 00 01 0a 58 0a f4 01 07", "0a:58:0a:f4:01:07"),
        ("00 01 00 01 2b c4 2d 5a 0a 58 0a f4 01 07", "0a:58:0a:f4:01:07"),
        ("00 03 00 06 0a 58 0a f4 01 07", None),  # another hardware type
        ("00 03 00 01 0a 58 0a f4 01", None),
        ("00 01 00 01 2b c4 2d 5a 0a 58 0a f4 01 07 00", None),
        ("00 02 00 01 0a 58 0a f4 01 07", None),  # of a vendor
        ("00 04" + "11" * 16, None),  # UUID
        ("", None),
    ],
)
def test_the_mac_in_a_duid(duid: str, mac: str | None) -> None:
    found = duid_mac(bytes.fromhex(duid))
    assert (format_mac(found) if found else None) == mac


@given(st.binary(max_size=20))
def test_any_duid_holds_a_mac_or_none(duid: bytes) -> None:
    mac = duid_mac(duid)
    assert mac is None or (len(mac) == 6 and duid.endswith(mac))


@pytest.mark.parametrize(
    "text", ["de:ad:00:00:be:af", "DE:AD:00:00:BE:AF", "de-ad-00-00-be-af", "DE-AD-00-00-BE-AF"]
)
def test_every_form_of_a_mac(text: str) -> None:
    assert format_mac(parse_mac(text)) == "de:ad:00:00:be:af"


@pytest.mark.parametrize(
    "text",
    ["", "abcd", "de:ad:00:00:be", "de:ad:00:00:be:af:00:01", "de:ad-00:00:be:af", "dg:ad:00:00:be:af"],
)
def test_what_is_no_mac_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^MAC {text!r} is not valid"):
        parse_mac(text)


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("foo.com", b"\x03foo\x03com\0"),
        ("svc.cluster.local", b"\x03svc\x07cluster\x05local\0"),
        ("example.com.", b"\x07example\x03com\0"),  # upstream wrote a second zero
        ("LoCaL", b"\x05local\0"),
        ("a_b.com", b"\x03a_b\x03com\0"),
        ("x" * 63 + ".com", b"\x3f" + b"x" * 63 + b"\x03com\0"),
    ],
)
def test_names(name: str, wire: bytes) -> None:
    assert encode_search(name) == wire


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "foo..com",
        "foo,com",
        "-foo.com",
        "foo.com-",
        "x" * 64,
        "foo.com\n",
        "fü.com",
        "10.1.2.3",
        "a.1",
    ],
)
def test_bad_search_domains_are_named(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        encode_search(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_length_of_a_name_ends_at_255_bytes() -> None:
    labels = ["x" * 63] * 3
    assert len(encode_name(".".join([*labels, "y" * 61]))) == 255
    with pytest.raises(ConfigError, match="has 256 bytes, at most 255 fit"):
        encode_name(".".join([*labels, "y" * 62]))


def test_a_host_may_be_called_by_a_number() -> None:
    assert encode_name("42") == b"\x0242\0"
