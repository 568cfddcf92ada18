"""mk-docker-opts.sh: upstream's vectors, and what it does with other files and words."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "packaging" / "mk-docker-opts.sh"
SUBNET_ENV = (
    "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
)
BIP, IPMASQ, MTU = (
    'DOCKER_OPT_BIP="--bip=10.1.74.1/24"',
    'DOCKER_OPT_IPMASQ="--ip-masq=true"',
    'DOCKER_OPT_MTU="--mtu=1472"',
)
ALL = '" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"'


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment}
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


@pytest.fixture
def subnet_env(tmp_path: Path) -> Path:
    path = tmp_path / "subnet.env"
    path.write_text(SUBNET_ENV)
    return path


def written(subnet_env: Path, *words: str, **environment: str) -> list[str]:
    """The lines that the script writes from `subnet_env`."""
    output = subnet_env.with_name("docker.env")
    done = run("-f", str(subnet_env), "-d", str(output), *words, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return output.read_text().splitlines()


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ((), [BIP, IPMASQ, MTU, f"DOCKER_OPTS={ALL}"]),
        (("-i",), [BIP, IPMASQ, MTU]),
        (("-c",), [f"DOCKER_OPTS={ALL}"]),
        (("-i", "-c"), [BIP, IPMASQ, MTU, f"DOCKER_OPTS={ALL}"]),
        (("-k", "CUSTOM_KEY"), [BIP, IPMASQ, MTU, f"CUSTOM_KEY={ALL}"]),
        (("-m",), [BIP, MTU, 'DOCKER_OPTS=" --bip=10.1.74.1/24 --mtu=1472"']),
    ],
)
def test_upstreams_vectors(subnet_env: Path, words: tuple[str, ...], lines: list[str]) -> None:
    assert written(subnet_env, *words) == lines


def test_docker_masquerades_only_where_flannel_does_not(subnet_env: Path) -> None:
    subnet_env.write_text(SUBNET_ENV.replace("false", "true"))
    assert written(subnet_env, "-i") == [BIP, 'DOCKER_OPT_IPMASQ="--ip-masq=false"', MTU]


def test_an_option_without_its_key_is_left_out(subnet_env: Path) -> None:
    subnet_env.write_text("FLANNEL_MTU=1472\n")
    assert written(subnet_env) == [MTU, 'DOCKER_OPTS=" --mtu=1472"']


def test_without_flannels_file_there_are_no_options(subnet_env: Path) -> None:
    subnet_env.unlink()
    assert written(subnet_env) == ['DOCKER_OPTS=""']


def test_what_the_key_held_before_stays_in_front(subnet_env: Path) -> None:
    assert written(subnet_env, "-c", DOCKER_OPTS="--debug") == [f'DOCKER_OPTS="--debug{ALL[1:]}']


def test_the_output_is_written_anew(subnet_env: Path) -> None:
    assert written(subnet_env, "-i") == written(subnet_env, "-i")


def test_a_file_in_the_working_directory(subnet_env: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(subnet_env.parent)
    assert written(Path("subnet.env"), "-i") == [BIP, IPMASQ, MTU]


def test_a_masquerade_value_that_is_none(subnet_env: Path) -> None:
    subnet_env.write_text(SUBNET_ENV.replace("false", "maybe"))
    done = run("-f", str(subnet_env), "-d", str(subnet_env.with_name("docker.env")))
    assert done.returncode == 1
    assert "FLANNEL_IPMASQ" in done.stderr and "maybe" in done.stderr


@pytest.mark.parametrize("words", [("-h",), ("-?",), ("-x",), ("-k",)])
def test_usage(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert "-f FLANNEL-ENV-FILE" in done.stderr


@pytest.mark.parametrize("key", ["", "9LIVES", "A B", "X;touch /tmp/x", "$(id)"])
def test_a_key_that_is_no_name(subnet_env: Path, key: str) -> None:
    output = subnet_env.with_name("docker.env")
    done = run("-f", str(subnet_env), "-d", str(output), "-k", key)
    assert done.returncode == 1
    assert repr(key) in done.stderr
    assert not output.exists()
