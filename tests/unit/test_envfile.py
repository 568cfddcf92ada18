"""subnet.env: the text upstream writes, what a reader makes of it, and all-or-nothing replacement."""

import os
import threading
import time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import ConfigError
from flanneld.config import NetConf
from flanneld.lease import Attributes, Lease
from flanneld.subnet.envfile import Previous, cidr_list, parse, render, write

V4, V6 = IPv4Network("10.244.0.0/16"), IPv6Network("fd00:10:244::/48")
SUBNET, SUBNET6 = IPv4Network("10.244.1.0/24"), IPv6Network("fd00:10:244:1::/64")


def lease(subnet: IPv4Network | None = SUBNET, subnet6: IPv6Network | None = SUBNET6) -> Lease:
    return Lease(subnet, subnet6, Attributes())


# --- writing ----------------------------------------------------------------------------------------


def test_render_ipv4() -> None:
    assert render(NetConf(network=V4, ipv6_network=V6), lease(), 1450, True) == (
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    )


def test_render_ipv6() -> None:
    conf = NetConf(ipv6_network=V6, enable_ipv4=False, enable_ipv6=True)
    assert render(conf, lease(subnet=None), 1430, False) == (
        "FLANNEL_IPV6_NETWORK=fd00:10:244::/48\nFLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n"
        "FLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n"
    )


def test_render_dual_stack() -> None:
    conf = NetConf(network=V4, ipv6_network=V6, enable_ipv6=True)
    assert render(conf, lease(), 1430, False) == (
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n"
        "FLANNEL_IPV6_NETWORK=fd00:10:244::/48\nFLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n"
        "FLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n"
    )


@pytest.mark.parametrize(
    ("subnet", "text"),
    [
        ("FD00:0:0:1::/64", "fd00:0:0:1::1/64"),
        ("2001:db8:0:0:1:0:0:0/80", "2001:db8::1:0:0:1/80"),
        ("2001:db8:0:1:1:1:1:0/112", "2001:db8:0:1:1:1:1:1/112"),
    ],
)
def test_ipv6_text_is_that_of_rfc_5952(subnet: str, text: str) -> None:
    conf = NetConf(ipv6_network=V6, enable_ipv4=False, enable_ipv6=True)
    assert f"FLANNEL_IPV6_SUBNET={text}\n" in render(conf, lease(None, IPv6Network(subnet)), 1450, False)


@pytest.mark.parametrize(
    ("conf", "held", "words"),
    [
        (NetConf(), lease(), "Network is not set"),
        (NetConf(network=V4), lease(subnet=None), "no IPv4 subnet"),
        (NetConf(network=V4, enable_ipv6=True), lease(), "IPv6Network is not set"),
        (NetConf(network=V4, enable_ipv6=True, ipv6_network=V6), lease(subnet6=None), "no IPv6 subnet"),
        (NetConf(network=V4), lease(subnet=IPv4Network("255.255.255.255/32")), "/31 or wider"),
    ],
)
def test_render_refuses_half_a_family(conf: NetConf, held: Lease, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        render(conf, held, 1450, False)


def test_write_ignores_the_umask_and_makes_the_directories(tmp_path: Path) -> None:
    target = tmp_path / "run" / "flannel" / "subnet.env"
    old = os.umask(0)
    try:
        write(target, "A=1\n")
        os.umask(0o077)
        write(str(target), "A=2\n")
    finally:
        os.umask(old)
    assert target.read_text() == "A=2\n"
    assert target.stat().st_mode & 0o7777 == 0o644
    assert [d.stat().st_mode & 0o7777 for d in (target.parent, target.parent.parent)] == [0o755, 0o755]
    assert os.listdir(target.parent) == ["subnet.env"]


def test_write_to_a_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("subnet.env", "A=1\n")
    assert (tmp_path / "subnet.env").read_text() == "A=1\n"


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "subnet.env"
    target.mkdir()
    with pytest.raises(ConfigError, match=rf"subnet file {target} .*: Is a directory") as caught:
        write(target, "A=1\n")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["subnet.env"]


def test_write_below_a_file_names_the_cause(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory"):
        write(tmp_path / "file" / "flannel" / "subnet.env", "A=1\n")


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """One writer, one reader at once: every read is one of the two texts, whole."""
    target = tmp_path / "subnet.env"
    texts = {"A=1\n" * 5000, "B=2\n" * 7000}
    write(target, min(texts))
    stop, seen = threading.Event(), set[str]()

    def read() -> None:
        while not stop.is_set():
            seen.add(target.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    end = time.monotonic() + 30
    rounds = 0
    while rounds < 20 or (len(seen) < 2 and time.monotonic() < end):
        rounds += 1
        for text in texts:
            write(target, text)
    stop.set()
    reader.join()
    assert seen == texts


# --- reading ----------------------------------------------------------------------------------------


def test_upstream_lists() -> None:
    networks, findings = cidr_list("FLANNEL_SUBNET", "10.244.1.0/24,not-a-cidr,10.244.2.0/24", IPv4Network)
    assert networks == (IPv4Network("10.244.1.0/24"), IPv4Network("10.244.2.0/24"))
    assert len(findings) == 1
    assert "FLANNEL_SUBNET entry 'not-a-cidr'" in findings[0]
    networks6, findings = cidr_list("FLANNEL_IPV6_SUBNET", "fd00::/64,not-a-cidr,fd01::/64", IPv6Network)
    assert networks6 == (IPv6Network("fd00::/64"), IPv6Network("fd01::/64"))
    assert len(findings) == 1


@pytest.mark.parametrize("key", ["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"])
def test_upstream_single_reader(key: str) -> None:
    found = parse(f"{key}=not-a-cidr\n")
    assert (found.subnet, found.ipv6_subnet) == (None, None)
    assert len(found.findings) == 1


def test_two_good_entries_count_as_none() -> None:
    found = parse("FLANNEL_NETWORK=10.1.0.0/16,10.2.0.0/16\nFLANNEL_SUBNET=10.1.1.1/24\n")
    assert found.network is None
    assert found.subnet == IPv4Network("10.1.1.0/24")
    assert "found 2" in found.findings[0]


def test_one_good_entry_among_bad_ones_counts() -> None:
    found = parse("FLANNEL_SUBNET=x,10.5.72.1/24,fd00::/64\n")
    assert found.subnet == IPv4Network("10.5.72.0/24")
    assert len(found.findings) == 2


@pytest.mark.parametrize(
    "text",
    [
        "FLANNEL_SUBNET=10.5.72.1/24",
        "FLANNEL_SUBNET=10.5.72.1/24\r\n",
        "# comment\n\n  export FLANNEL_SUBNET = 10.5.72.1/24  # of this node\n",
        'export\tFLANNEL_SUBNET="10.5.72.1/24" # quoted\n',
        "FLANNEL_SUBNET='10.5.72.1/24'\nOTHER=\nEMPTY=''\n",
        "FLANNEL_SUBNET=1.2.3.4/8\nFLANNEL_SUBNET=10.5.72.1/24\n",
    ],
)
def test_dotenv_syntax(text: str) -> None:
    expected = Previous(subnet=IPv4Network("10.5.72.0/24"))
    assert parse(text) == expected
    assert parse(text.encode()) == expected


@pytest.mark.parametrize(
    "line", ["FLANNEL_SUBNET", 'FLANNEL_SUBNET="10.1.1.1/24', "FLANNEL-SUBNET=1", "FLANNEL_SUBNET='1' 2"]
)
def test_a_bad_line_is_told_and_skipped(line: str) -> None:
    found = parse(f"FLANNEL_NETWORK=10.1.0.0/16\n{line}\n")
    assert found.network == IPv4Network("10.1.0.0/16")
    assert found.subnet is None
    assert found.findings[0].startswith("line 2 ")


def test_nothing_to_read() -> None:
    assert parse("") == Previous()
    assert parse("FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n") == Previous()


NETWORKS = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    st.integers(0, 2**32 - 1).map(IPv4Address),
    st.integers(1, 31),
)
NETWORKS6 = st.builds(
    lambda address, length: IPv6Network((address, length), strict=False),
    st.integers(0, 2**128 - 1).map(IPv6Address),
    st.integers(1, 127),
)


@given(
    v4=st.none() | st.tuples(NETWORKS, NETWORKS),
    v6=st.none() | st.tuples(NETWORKS6, NETWORKS6),
    mtu=st.integers(68, 65535),
    ip_masq=st.booleans(),
)
def test_parse_after_render_is_identity(
    v4: tuple[IPv4Network, IPv4Network] | None,
    v6: tuple[IPv6Network, IPv6Network] | None,
    mtu: int,
    ip_masq: bool,
) -> None:
    network, subnet = v4 or (None, None)
    network6, subnet6 = v6 or (None, None)
    conf = NetConf(
        network=network, ipv6_network=network6, enable_ipv4=v4 is not None, enable_ipv6=v6 is not None
    )
    text = render(conf, lease(subnet, subnet6), mtu, ip_masq)
    assert parse(text) == Previous(network, subnet, network6, subnet6)
    assert text.endswith(f"\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={str(ip_masq).lower()}\n"[not (v4 or v6) :])


@given(st.text() | st.binary())
def test_reading_never_fails(text: str | bytes) -> None:
    assert all("\n" not in finding for finding in parse(text).findings)
