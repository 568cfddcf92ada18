"""subnet.env as the CNI plugin reads it; vectors of upstream's tests among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cni import errors
from cni.errors import CniError
from cni.local import LocalFiles
from cni.plugins import subnetenv

V4 = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
V6 = "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
TWO = V4.replace("10.1.0.0/16", "10.1.0.0/16,192.168.0.0/16,10.1.0.0/16")


def shape(text: str) -> tuple[list[str], list[str], int, bool]:
    env = subnetenv.parse(text)
    return [str(one) for one in env.networks], [str(one) for one in env.subnets], env.mtu, env.ipmasq


@pytest.mark.parametrize(
    ("text", "networks", "subnets"),
    [
        (V4, ["10.1.0.0/16"], ["10.1.17.0/24"]),
        (V6, ["fc00::/48"], ["fc00::/64"]),
        (V6 + V4, ["10.1.0.0/16", "fc00::/48"], ["10.1.17.0/24", "fc00::/64"]),
        (TWO, ["10.1.0.0/16", "192.168.0.0/16"], ["10.1.17.0/24"]),
        (V4.replace("10.1.0.0/16", "10.1.9.9/16,10.1.0.0/16"), ["10.1.0.0/16"], ["10.1.17.0/24"]),
        (V4 + "FLANNEL_SUBNET=10.1.18.1/24\n", ["10.1.0.0/16"], ["10.1.18.0/24"]),
        # Families are not checked against the keys' names, nor against each other.
        (V4.replace("10.1.0.0/16", "fc00::/48"), ["fc00::/48"], ["10.1.17.0/24"]),
    ],
)
def test_networks_and_subnets(text: str, networks: list[str], subnets: list[str]) -> None:
    assert shape(text) == (networks, subnets, 1472, True)


@pytest.mark.parametrize(
    "text",
    [
        V4.replace("\n", "\r\n"),
        V4.rstrip("\n"),
        f"# comment\n\n{V4}foo=bar\nFLANNEL_OTHER\nexport FLANNEL_MTU=1\n FLANNEL_MTU=2\n",
    ],
)
def test_line_ends_and_foreign_lines_do_not_matter(text: str) -> None:
    assert shape(text) == shape(V4)


@pytest.mark.parametrize(
    ("value", "ipmasq"),
    [("true", True), ("TRUE", False), ("1", False), ("", False), ("false", False), ("true ", False)],
)
def test_only_the_exact_word_true_is_true(value: str, ipmasq: bool) -> None:
    assert subnetenv.parse(V4.replace("IPMASQ=true", f"IPMASQ={value}")).ipmasq is ipmasq


@pytest.mark.parametrize(("value", "mtu"), [("0", 0), ("0001450", 1450), ("4294967295", 4294967295)])
def test_mtu_is_an_unsigned_number_of_32_bits(value: str, mtu: int) -> None:
    assert subnetenv.parse(V4.replace("MTU=1472", f"MTU={value}")).mtu == mtu


ALL_KEYS = (
    "missing FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, "
    "FLANNEL_MTU, FLANNEL_IPMASQ"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("foo=bar", ALL_KEYS),
        ("", ALL_KEYS),
        (V4.replace("FLANNEL_MTU=1472\n", ""), "is missing FLANNEL_MTU."),
        (V4.replace("FLANNEL_SUBNET", "X"), "is missing FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET."),
        (V4[: V4.index("=true")], "is half-written: FLANNEL_IPMASQ has no '='"),
        ("FLANNEL_NETWORK\n" + V4, "is half-written: FLANNEL_NETWORK has no '='"),
        (V4.replace("17.1/24", "17.1"), "has a bad FLANNEL_SUBNET: invalid CIDR address: 10.1.17.1."),
        (V4.replace("10.1.0.0/16", ""), "has a bad FLANNEL_NETWORK: invalid CIDR address: ."),
        (V4.replace("10.1.0.0/16", "10.1.0.0/16, 10.2.0.0/16"), "invalid CIDR address:  10.2.0.0/16."),
        (V4.replace("1472", "abc"), 'strconv.ParseUint: parsing "abc": invalid syntax.'),
        (V4.replace("1472", ""), 'strconv.ParseUint: parsing "": invalid syntax.'),
        (V4.replace("1472", "-1"), 'strconv.ParseUint: parsing "-1": invalid syntax.'),
        (V4.replace("1472", "4294967296"), 'parsing "4294967296": value out of range.'),
        (V4.replace("1472", "9" * 5000), "value out of range."),
    ],
)
def test_a_bad_file_means_try_again_later(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(text)
    with pytest.raises(CniError) as caught:
        subnetenv.load(LocalFiles(), str(path))
    assert caught.value.code == errors.TRY_AGAIN_LATER
    assert caught.value.msg.startswith(f"failed to load flannel 'subnet.env' file: {path} ")
    assert reason in caught.value.msg
    assert "flanneld writes this file" in caught.value.msg and "\n" not in caught.value.msg


def test_a_missing_file_means_try_again_later(tmp_path: Path) -> None:
    with pytest.raises(CniError) as caught:
        subnetenv.load(LocalFiles(), f"{tmp_path}/subnet.env")
    assert caught.value.code == errors.TRY_AGAIN_LATER
    assert f"open {tmp_path}/subnet.env: no such file or directory" in caught.value.msg


def test_an_empty_path_is_a_bad_netconf() -> None:
    with pytest.raises(CniError, match="subnetFile is empty") as caught:
        subnetenv.load(LocalFiles(), "")
    assert caught.value.code == errors.INVALID_CONFIG


def test_a_good_file_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(V4)
    assert subnetenv.load(LocalFiles(), str(path)).mtu == 1472
