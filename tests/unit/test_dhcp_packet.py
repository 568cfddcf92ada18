"""The DHCP message on the wire: what is written reads back as it was, and garbage ends quietly."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.dhcp.packet import (
    BOOT_REPLY,
    BOOT_REQUEST,
    MAX_DATAGRAM,
    MIN_DATAGRAM,
    Malformed,
    Message,
    MessageType,
    build,
    fit,
    parse,
)

MAC = bytes.fromhex("0a580af40107")
COOKIE = bytes.fromhex("63825363")
# A request up to the options, field by field (RFC 2131 figure 1).
HEADER = (
    bytes.fromhex("01 01 06 03")  # op htype hlen hops
    + bytes.fromhex("11223344")  # xid
    + bytes.fromhex("0a00 8000")  # secs flags
    + bytes.fromhex("0af40107 0af40108 0af40109 0af4010a")  # ciaddr yiaddr siaddr giaddr
    + MAC.ljust(16, b"\0")  # chaddr
    + b"boot.example".ljust(64, b"\0")  # sname
    + b"pxelinux.0".ljust(128, b"\0")  # file
    + COOKIE
)
DISCOVER = b"\x35\x01\x01"


def options_of(raw: bytes) -> dict[int, bytes]:
    message = parse(raw)
    assert isinstance(message, Message), message
    return dict(message.options)


def test_every_field_has_its_place() -> None:
    message = Message(
        op=BOOT_REQUEST,
        xid=0x11223344,
        chaddr=MAC,
        options={53: b"\x01", 61: b"\x01" + MAC},
        htype=1,
        hops=3,
        secs=0x0A00,
        flags=0x8000,
        ciaddr=IPv4Address("10.244.1.7"),
        yiaddr=IPv4Address("10.244.1.8"),
        siaddr=IPv4Address("10.244.1.9"),
        giaddr=IPv4Address("10.244.1.10"),
        sname=b"boot.example",
        file=b"pxelinux.0",
    )
    datagram = HEADER + DISCOVER + b"\x3d\x07\x01" + MAC + b"\xff"
    assert build(message) == datagram.ljust(300, b"\0")
    assert parse(datagram) == message
    assert message.kind is MessageType.DISCOVER


BARE = Message(BOOT_REQUEST, 1, MAC, {53: b"\x01"})


def changed(at: int, value: str) -> bytes:
    """A sound DISCOVER but for some bytes."""
    raw, new = build(BARE), bytes.fromhex(value)
    return raw[:at] + new + raw[at + len(new) :]


def carrying(options: str, file: str = "") -> bytes:
    """A sound header with these options, and perhaps more of them in `file`."""
    return changed(108, file)[:240] + bytes.fromhex(options)


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"", "0 bytes; a message has 240 to 4096"),
        (build(BARE)[:239], "239 bytes"),
        (build(BARE).ljust(MAX_DATAGRAM + 1, b"\0"), "4097 bytes"),
        (changed(0, "02"), "op is 2, not 1"),
        (changed(0, "00"), "op is 0, not 1"),
        (changed(2, "11"), "hlen is 17, more than 16"),
        (changed(236, "63825364"), "magic cookie is 63825364"),
        (carrying("000000ff"), "no option 53"),
        (carrying(""), "no option 53"),
        (carrying("ff350101"), "no option 53"),
        (carrying("350101 350103"), "option 53 has 2 bytes, not 1"),
        (carrying("3500"), "option 53 has 0 bytes, not 1"),
        (carrying("350100"), "option 53 is 0, an unknown message type"),
        (carrying("350109"), "option 53 is 9, an unknown"),
        (carrying("350101 3203010203"), "option 50 has 3 bytes, not 4"),
        (carrying("350101 36050102030405"), "option 54 has 5 bytes, not 4"),
        (carrying("350101 390102"), "option 57 has 1 bytes, not 2"),
        (carrying("350101 340104"), "option 52"),
        (carrying("350101 3400"), "option 52"),
        (carrying("350101 340101 ff", "340101 ff"), "option 52 within an overloaded field"),
        (carrying("350101 0c0200"), "option 12 runs past the end"),
        (carrying("350101 0c"), "option 12 runs past the end"),
        (carrying("350101 340101 ff", "0cff"), "option 12 runs past the end"),
    ],
)
def test_what_is_no_message(datagram: bytes, reason: str) -> None:
    found = parse(datagram)
    assert isinstance(found, Malformed)
    assert reason in found.reason


@given(st.binary(max_size=700))
def test_no_bytes_raise(raw: bytes) -> None:
    for datagram in (raw, HEADER + raw, HEADER + DISCOVER + raw, carrying("340103") + raw):
        assert isinstance(parse(datagram), Message | Malformed)


def test_pads_and_a_missing_end_are_no_fault() -> None:
    assert options_of(HEADER + b"\0\0" + DISCOVER + b"\0\x0c\x01x\0") == {53: b"\x01", 12: b"x"}
    # What follows the end is not read.
    assert options_of(HEADER + DISCOVER + b"\xff\x0c\xff") == {53: b"\x01"}
    assert options_of(HEADER + DISCOVER + b"\x50\x00\xff") == {53: b"\x01", 80: b""}


def test_options_of_one_code_are_one_value() -> None:
    """RFC 3396 section 5: in the order options, file, sname, whatever lies between them."""
    raw = bytearray(HEADER + b"\x77\x02ab" + DISCOVER + b"\x34\x01\x03\x77\x02cd\xff")
    raw[108:236] = b"\x77\x02ef\xff".ljust(128, b"\0")
    raw[44:108] = b"\x77\x02gh\x0c\x01x\xff".ljust(64, b"\0")
    message = parse(bytes(raw))
    assert isinstance(message, Message)
    assert message.options == {53: b"\x01", 119: b"abcdefgh", 12: b"x"}
    assert (message.sname, message.file) == (b"", b"")


@pytest.mark.parametrize(("overload", "sname", "file"), [(1, b"boot.example", b""), (2, b"", b"pxelinux.0")])
def test_a_field_without_options_keeps_its_text(overload: int, sname: bytes, file: bytes) -> None:
    raw = bytearray(HEADER + DISCOVER + bytes((52, 1, overload, 255)))
    at = 108 if overload == 1 else 44
    raw[at : at + 4] = b"\x0c\x01x\xff"
    message = parse(bytes(raw))
    assert isinstance(message, Message)
    assert (message.sname, message.file, message.options[12]) == (sname, file, b"x")


def test_a_long_value_is_split() -> None:
    value = bytes(range(256)) * 2
    raw = build(replace(BARE, options={53: b"\x01", 121: value}))
    at = 243
    assert raw[at : at + 2] == b"\x79\xff" and raw[at + 2 : at + 257] == value[:255]
    assert raw[at + 257 : at + 259] == b"\x79\xff" and raw[at + 259 : at + 514] == value[255:510]
    assert raw[at + 514 :] == b"\x79\x02" + value[510:] + b"\xff"


def test_the_order_of_options_is_fixed() -> None:
    codes = (82, 121, 3, 1, 51, 61, 54, 53)
    raw = build(replace(BARE, options={code: bytes((5,) * (1 if code == 53 else 4)) for code in codes}))
    assert list(options_of(raw)) == [53, 54, 51, 1, 3, 61, 121, 82]


def test_what_cannot_be_written_raises() -> None:
    with pytest.raises(ValueError, match="longer than its field"):
        build(replace(BARE, sname=b"x" * 65))
    with pytest.raises(ValueError, match="longer than its field"):
        build(replace(BARE, chaddr=bytes(17)))
    with pytest.raises(ValueError, match="do not fit into 4096 bytes"):
        build(replace(BARE, options={53: b"\x01", 12: bytes(4096)}))


address = st.integers(0, 2**32 - 1).map(IPv4Address)
text = st.binary(max_size=63).map(lambda raw: raw.replace(b"\0", b""))
SIZES = {50: 4, 54: 4, 57: 2}


@st.composite
def some_options(draw: st.DrawFn, longest: int = 600) -> dict[int, bytes]:
    codes = draw(st.lists(st.integers(1, 254).filter(lambda code: code not in (52, 53)), max_size=6))
    values = {
        code: draw(st.binary(min_size=SIZES.get(code, 0), max_size=SIZES.get(code, longest)))
        for code in dict.fromkeys(codes)
    }
    return {53: bytes((draw(st.sampled_from(MessageType)),))} | values


messages = st.builds(
    Message,
    op=st.sampled_from((BOOT_REQUEST, BOOT_REPLY)),
    xid=st.integers(0, 2**32 - 1),
    chaddr=st.binary(max_size=16),
    options=some_options(),
    htype=st.integers(0, 255),
    hops=st.integers(0, 255),
    secs=st.integers(0, 65535),
    flags=st.integers(0, 65535),
    ciaddr=address,
    yiaddr=address,
    siaddr=address,
    giaddr=address,
    sname=text,
    file=text,
)


@given(messages)
def test_what_is_written_reads_back(message: Message) -> None:
    datagram = build(message)
    assert len(datagram) >= MIN_DATAGRAM
    assert parse(datagram, message.op) == message


@given(messages, some_options(longest=140), st.integers(MIN_DATAGRAM, 800), st.booleans())
def test_a_limit_costs_whole_options_and_nothing_else(
    message: Message, options: dict[int, bytes], limit: int, bare: bool
) -> None:
    message = replace(message, options=options)
    if bare:
        message = replace(message, sname=b"", file=b"")
    datagram, left_out = fit(message, limit)
    assert len(datagram) <= limit
    kept = {code: value for code, value in options.items() if code not in left_out}
    assert parse(datagram, message.op) == replace(message, options=kept)
    # Left out means that it would not have fitted beside those before it, not even in the options' own area.
    size = 0
    for code, value in options.items():
        size += 0 if code in left_out else 2 + len(value)
        assert code not in left_out or size + 2 + len(value) > limit - 241 - 3


def test_spare_fields_are_used_before_anything_is_left_out() -> None:
    values = {121: b"a" * 48, 119: b"b" * 125, 15: b"c" * 61, 12: b"d"}
    reply = Message(BOOT_REPLY, 1, MAC, {53: b"\x05", **values})
    # 304 bytes: 63 for options, 3 of them for option 53 and 3 for option 52.
    datagram, left_out = fit(reply, 304)
    assert left_out == ()
    assert datagram[240:249] == b"\x35\x01\x05\x0c\x01d\x34\x01\x03"
    assert datagram[108:110] == b"\x77\x7d" and datagram[235] == 255
    assert datagram[44:46] == b"\x0f\x3d" and datagram[107] == 255
    assert parse(datagram, BOOT_REPLY) == reply
    # A boot file is more use where it is, and a NAK leaves both fields alone (RFC 2131 table 3).
    assert fit(replace(reply, file=b"pxelinux.0"), 304)[1] == (119, 15)
    assert fit(replace(reply, options={53: b"\x06", **values}), 304)[1] == (119, 15)
    # Each field ends with an end option of its own (RFC 2131 section 4.1), so 128 bytes do not go into 128.
    assert fit(replace(reply, options={53: b"\x05", 119: b"b" * 126}), 304)[1] == (119,)
