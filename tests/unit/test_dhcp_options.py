"""Values of DHCP options: the bytes other servers and the RFCs write, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.dhcp import options

DEFAULT = "0.0.0.0/0"


def routes(text: str) -> list[options.ClasslessRoute]:
    """`10.0.0.0/8 via 10.1.1.1; 224.0.0.0/4` as routes."""
    found: list[options.ClasslessRoute] = []
    for part in filter(None, text.split("; ")):
        network, _, router = part.partition(" via ")
        found.append((IPv4Network(network), IPv4Address(router) if router else None))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("224.0.0.0/4; 192.168.1.0/24 via 192.168.2.1", "04e000000000 18c0a801c0a80201"),
        # The order of the kernel is kept but for the default route, which comes last.
        (
            "0.0.0.0/0 via 10.129.0.1; 10.128.0.0/14; 224.0.0.0/4",
            "0e0a8000000000 04e000000000 000a810001",
        ),
        # Calico: the router is outside of the subnet, so the host route to it comes first.
        ("0.0.0.0/0 via 169.254.1.1; 169.254.1.1/32", "20a9fe010100000000 00a9fe0101"),
        (
            "0.0.0.0/0 via 169.254.1.1; 10.0.0.0/8 via 169.254.1.1; 169.254.1.1/32 via 0.0.0.0",
            "20a9fe010100000000 080aa9fe0101 00a9fe0101",
        ),
        ("0.0.0.0/0 via 10.244.1.1; 10.244.0.0/16 via 10.244.1.1", "100af40af40101 000af40101"),
        (
            "0.0.0.0/0 via 10.222.222.254; 192.168.1.0/24 via 10.222.222.254; 10.222.0.0/16",
            "18c0a8010adedefe 100ade00000000 000adedefe",
        ),
        # A host route through a router needs the router first, and is no better than others.
        ("10.0.0.0/8 via 10.1.1.1; 10.1.1.7/32 via 10.1.1.1", "080a0a010101 200a0101070a010101"),
        ("", ""),
        ("0.0.0.0/0 via 10.229.0.1", "000ae50001"),
        ("0.0.0.0/1 via 10.229.0.1", "01000ae50001"),
        ("10.0.0.0/8 via 10.229.0.1", "080a0ae50001"),
        ("10.128.0.0/9 via 10.229.0.1", "090a800ae50001"),
        ("10.229.0.0/16 via 10.229.0.1", "100ae50ae50001"),
        ("10.229.0.0/17 via 10.229.0.1", "110ae5000ae50001"),
        ("10.229.0.0/24 via 10.229.0.1", "180ae5000ae50001"),
        ("10.229.0.128/25 via 10.229.0.1", "190ae500800ae50001"),
        ("10.229.0.128/32 via 10.229.0.1", "200ae500800ae50001"),
    ],
)
def test_classless_routes(text: str, expected: str) -> None:
    assert options.classless_routes(routes(text)) == bytes.fromhex(expected)


def decode_routes(raw: bytes) -> list[options.ClasslessRoute]:
    """RFC 3442, "Classless Route Option Format", read as a client does; host bits must be zero."""
    found: list[options.ClasslessRoute] = []
    while raw:
        width, octets = raw[0], (raw[0] + 7) // 8
        network = IPv4Network((raw[1 : 1 + octets].ljust(4, b"\0"), width))
        router = IPv4Address(raw[1 + octets : 5 + octets])
        found.append((network, router if int(router) else None))
        raw = raw[5 + octets :]
    return found


networks = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 32)).map(
    lambda pair: IPv4Network(pair, strict=False)
)
routers = st.integers(0x01000000, 0xDFFFFFFF).map(IPv4Address)


@given(st.lists(st.tuples(networks, st.none() | routers), max_size=12))
def test_routes_read_back_with_links_first_and_defaults_last(given: list[options.ClasslessRoute]) -> None:
    found = decode_routes(options.classless_routes(given))
    hosts = [r for r in given if r[0].prefixlen == 32 and r[1] is None]
    defaults = [r for r in given if r[0].prefixlen == 0]
    others = [r for r in given if r not in hosts and r not in defaults]
    assert found == hosts + others + defaults


CLUSTER = ("default.svc.cluster.local", "svc.cluster.local", "cluster.local")


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        (("foo.com", "foo.local"), "03666f6f03636f6d00 03666f6f056c6f63616c00"),
        (CLUSTER, "0764656661756c740373766307636c7573746572056c6f63616c00 c008 c00c"),
        # RFC 3397 section 2 prints these two names.
        (("eng.apple.com", "marketing.apple.com"), "03656e67056170706c6503636f6d00 096d61726b6574696e67c004"),
        (("example.com", "example.com"), "076578616d706c6503636f6d00 c000"),
        ((), ""),
    ],
)
def test_search_list(search: tuple[str, ...], expected: str) -> None:
    assert options.search_list(search) == bytes.fromhex(expected)


def decode_names(raw: bytes) -> list[str]:
    """RFC 1035 section 4.1.4, without the limits that a careful reader has."""

    def name(at: int) -> tuple[list[str], int]:
        if raw[at] >= 0xC0:
            target = int.from_bytes(raw[at : at + 2], "big") & 0x3FFF
            assert target < at, "a pointer that does not point back"
            return name(target)[0], at + 2
        if raw[at] == 0:
            return [], at + 1
        stop = at + 1 + raw[at]
        rest, end = name(stop)
        return [raw[at + 1 : stop].decode("ascii"), *rest], end

    found, at = [], 0
    while at < len(raw):
        labels, at = name(at)
        found.append(".".join(labels))
    return found


labels = st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
domains = st.lists(labels, min_size=1, max_size=6).map(".".join)


@given(st.lists(domains, max_size=10))
def test_search_lists_read_back(names: list[str]) -> None:
    assert options.valid_search_domains(names) == (tuple(names), ())
    assert decode_names(options.search_list(names)) == names


def test_a_search_list_beyond_the_reach_of_pointers_reads_back() -> None:
    names = [f"{'x' * 60}{i:03}.{'y' * 60}{i:03}.example" for i in range(200)] * 2
    raw = options.search_list(names)
    assert len(raw) > 0x4000
    assert decode_names(raw) == names


@pytest.mark.parametrize(
    "name",
    [
        "local",
        "a_b.com",
        "_tcp.example.com",
        "x" * 63 + ".com",
        "example.default.svc.cluster.local",
        ".".join(["x" * 49] * 5) + ".abc",
    ],
)
def test_search_domains_that_are_sent(name: str) -> None:
    assert options.search_domain(name) == name
    assert options.search_domain(name.upper()) == name
    # The dot of the root must not become a second terminator.
    assert options.search_domain(f"{name}.") == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "foo..com", ".foo.com", "foo,com", "-foo.com", "foo.com-", "foo-.com", "foo com"),
        *("x" * 64 + ".com", "foo." + "x" * 64, ".".join(["x" * 49] * 5) + ".abcd", "10.0.0.1", "DHCP.1"),
        *(
            "foo.com\n",
            "fo\no.com",
            "foo.com\0",
            "f\u00f6\u00f6.com",
            "foo.c\u0131m",
            "\u0661.com",
            "\u212a.com",
        ),
    ],
)
def test_search_domains_that_are_dropped(name: str) -> None:
    with pytest.raises(ValueError, match="search domain") as caught:
        options.search_domain(name)
    assert repr(name) in str(caught.value)
    good, dropped = options.valid_search_domains(("One.example.", name, "two.example"))
    assert (good, dropped) == (("one.example", "two.example"), (name,))


def test_the_domain_name_is_the_longest_of_the_search_list() -> None:
    search = (
        "pix3ob5ymm5jbsjessf0o4e84uvij588rz23iz0o.com",
        "3wg5xngig6vzfqjww4kocnky3c9dqjpwkewzlwpf.com",
        "t4lanpt7z4ix58nvxl4d.com",
        "14wg5xngig6vzfqjww4kocnky3c9dqjpwkewzlwpf.com",
        "4wg5xngig6vzfqjww4kocnky3c9dqjpwkewzlwpf.com",
    )
    assert options.domain_name(search) == b"14wg5xngig6vzfqjww4kocnky3c9dqjpwkewzlwpf.com"
    assert options.domain_name(("bb.example", "aa.example", "c.example")) == b"bb.example"
    assert options.domain_name(()) == b""


def test_addresses_have_four_bytes_each() -> None:
    assert options.routers([IPv4Address("192.168.2.1")]) == bytes.fromhex("c0a80201")
    ntp = [IPv4Address("192.168.2.2"), IPv4Address("192.168.2.3")]
    assert options.ntp_servers(ntp) == bytes.fromhex("c0a80202c0a80203")
    assert options.domain_servers([IPv4Address("10.96.0.10")]) == bytes.fromhex("0a60000a")
    assert options.domain_servers([]) == options.routers([]) == options.ntp_servers([]) == b""
    assert options.server_id(IPv4Address("169.254.75.10")) == bytes.fromhex("a9fe4b0a")
    assert options.server_id(IPv4Address("169.254.75.86")) == bytes.fromhex("a9fe4b56")


@pytest.mark.parametrize(
    ("address", "mask", "broadcast"),
    [
        ("10.244.1.7/24", "ffffff00", "0af401ff"),
        ("10.222.222.1/30", "fffffffc", "0adede03"),
        ("10.0.0.0/31", "fffffffe", ""),
        ("10.244.1.7/32", "ffffffff", ""),
    ],
)
def test_mask_and_broadcast_address(address: str, mask: str, broadcast: str) -> None:
    assert options.subnet_mask(IPv4Interface(address)) == bytes.fromhex(mask)
    assert options.broadcast_address(IPv4Interface(address)) == bytes.fromhex(broadcast)


@pytest.mark.parametrize(
    ("mtu", "expected"),
    [(1500, "05dc"), (1450, "05aa"), (1410, "0582"), (1480, "05c8"), (9000, "2328"), (68, "0044")],
)
def test_mtu(mtu: int, expected: str) -> None:
    assert options.interface_mtu(mtu) == bytes.fromhex(expected)


@given(st.integers(options.MIN_LEASE_S, options.INFINITE_LEASE_S - 1))
def test_times_rise_to_the_lease(lease_s: int) -> None:
    t1, t2, lease = (
        int.from_bytes(of(lease_s), "big")
        for of in (options.renewal_time, options.rebinding_time, options.lease_time)
    )
    assert 0 < t1 < t2 < lease == lease_s
    assert abs(t1 - lease * 0.5) <= 1 and abs(t2 - lease * 0.875) <= 1


def test_lease_times() -> None:
    assert options.lease_time(999 * 86400) == bytes.fromhex("05250a80")
    assert options.lease_time(options.INFINITE_LEASE_S) == b"\xff" * 4
    assert options.renewal_time(options.INFINITE_LEASE_S) == b""
    assert options.rebinding_time(options.INFINITE_LEASE_S) == b""


def test_texts_have_no_terminator() -> None:
    assert options.tftp_server_name("tftp.kubevirt.io") == b"tftp.kubevirt.io"
    assert options.boot_file_name("config") == b"config"
    assert options.host_name("vm1.default.svc") == b"vm1.default.svc"
    assert options.private_option(240, "private.options.kubevirt.io") == b"private.options.kubevirt.io"
    assert options.private_option(224, "ü") == b"\xc3\xbc"
    assert options.private_option(254, "0x0A0b00") == b"\x0a\x0b\x00"


@pytest.mark.parametrize(
    "text", ["de:ad:00:00:be:af", "DE:AD:00:00:BE:AF", "de-ad-00-00-be-af", "DE-AD-00-00-be-af"]
)
def test_mac_addresses(text: str) -> None:
    assert options.mac_address(text) == bytes.fromhex("dead0000beaf")


SIX = cast(IPv4Address, IPv6Address("2001:db8::1"))
REFUSED: dict[str, tuple[Callable[[], object], str, str]] = {
    "MAC": (lambda: options.mac_address("abcd"), "abcd", "six hexadecimal octets"),
    "MAC of 8 octets": (lambda: options.mac_address("02:00:00:00:00:00:00:01"), "02:00", "six"),
    "MAC, mixed": (lambda: options.mac_address("02:00-00:00:00:01"), "02:00-00", "six"),
    "MAC, newline": (lambda: options.mac_address("02:00:00:00:00:01\n"), "\\n", "six"),
    "MAC, multicast": (lambda: options.mac_address("01:00:5e:00:00:01"), "01:00:5e", "unicast"),
    "MAC, zero": (lambda: options.mac_address("00:00:00:00:00:00"), "00:00", "zero"),
    "MTU, small": (lambda: options.interface_mtu(67), "67", "68 to 65535"),
    "MTU, large": (lambda: options.interface_mtu(65536), "65536", "68 to 65535"),
    "lease, short": (lambda: options.lease_time(3), "3", "4 to 4294967295"),
    "lease, long": (lambda: options.lease_time(2**32), "4294967296", "4 to 4294967295"),
    "DNS, IPv6": (lambda: options.domain_servers([SIX]), "2001:db8::1", "IPv4"),
    "router, none": (lambda: options.routers([IPv4Address(0)]), "0.0.0.0", "unicast"),
    "NTP, multicast": (lambda: options.ntp_servers([IPv4Address("224.0.1.1")]), "224.0.1.1", "unicast"),
    "server id": (lambda: options.server_id(IPv4Address("255.255.255.255")), "server id 255", "unicast"),
    "route": (lambda: options.classless_routes([(IPv4Network("10.0.0.0/8"), SIX)]), "10.0.0.0/8", "IPv4"),
    "hostname, empty": (lambda: options.host_name(""), "''", "1 to 63"),
    "hostname, underscore": (lambda: options.host_name("a_b"), "'a_b'", "letters, digits"),
    "hostname, hyphen": (lambda: options.host_name("vm1-.x"), "'vm1-.x'", "inner hyphens"),
    "hostname, label": (lambda: options.host_name("x" * 64), "x" * 64, "1 to 63"),
    "hostname, long": (lambda: options.host_name(".".join(["x"] * 128)), "x.x", "253"),
    "hostname, dot": (lambda: options.host_name("vm1."), "'vm1.'", "labels"),
    "TFTP server": (lambda: options.tftp_server_name("a b"), "'a b'", "printable"),
    "boot file, empty": (lambda: options.boot_file_name(""), "boot file ''", "1 to 255"),
    "boot file, zero": (lambda: options.boot_file_name("a\0"), "boot file", "printable"),
    "boot file, long": (lambda: options.boot_file_name("x" * 256), "xxx", "255"),
    "private, low": (lambda: options.private_option(223, "x"), "223", "224 to 254"),
    "private, high": (lambda: options.private_option(255, "x"), "255", "224 to 254"),
    "private, empty": (lambda: options.private_option(240, ""), "240", "value"),
    "private, odd": (lambda: options.private_option(240, "0x123"), "0x123", "even number"),
    "private, no digits": (lambda: options.private_option(240, "0x"), "0x", "hexadecimal"),
    "private, blanks": (lambda: options.private_option(240, "0x01 02"), "0x01 02", "hexadecimal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_the_value_and_the_rule(case: str) -> None:
    call, value, rule = REFUSED[case]
    with pytest.raises(ValueError, match="must") as caught:
        call()
    text = str(caught.value)
    assert value in text and rule in text and "\n" not in text
