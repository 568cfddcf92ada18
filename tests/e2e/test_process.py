"""The daemon as a process, run from source: exit codes, signals, variables, log lines.

Each runs in a network namespace of its own, which has no link but `lo` unless a lab is built.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import pytest

from tests.e2e.etcd_server import EtcdServer
from tests.lab.net import ENVIRONMENT, Lab, wait_for
from tests.lab.node import REPOSITORY, SOURCE, Node, Store, etcd_store, etcdctl

ALONE = ("unshare", "--net")
# In a mount namespace of its own the files that br_netfilter makes can be hidden.
NO_BRIDGE_FILTER = (*ALONE, "--mount", "sh", "-c", 'mount -t tmpfs t /proc/sys/net/bridge && exec "$@"', "sh")
LINE = re.compile(r"([IWE])\d{4} \d\d:\d\d:\d\d\.\d{6} [ \d]{6}\d \w+\.py:\d+\] .+")
NOBODY = "--etcd-endpoints=http://127.0.0.1:1"
NFT = '"Network": "10.244.0.0/16", "EnableNFTables": true'


def flanneld(
    directory: Path, *flags: str, inside: tuple[str, ...] = ALONE, environ: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start it with all its files in `directory`; stdout and stderr are pipes."""
    files = (
        f"--subnet-file={directory / 'subnet.env'}",
        f"--state-dir={directory / 'state'}",
        f"--net-config-path={directory / 'net-conf.json'}",
        f"--cni-socket={directory / 'cni.sock'}",
    )
    return subprocess.Popen(
        [*inside, *SOURCE, *files, *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**ENVIRONMENT, **(environ or {})},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit code and lines on stderr; nothing is ever printed on stdout."""
    out, err = process.communicate(timeout=30)
    assert out == ""
    return process.returncode, err.splitlines()


class Waiting(NamedTuple):
    """A daemon that waits for its store, and the lines that it logged until then."""

    process: subprocess.Popen[str]
    said: list[str]


class Waits(Protocol):
    def __call__(self, *flags: str, environ: Mapping[str, str] | None = None) -> Waiting: ...


@pytest.fixture
def waits(tmp_path: Path) -> Iterator[Waits]:
    """Start a daemon whose store does not answer, and return once it says that it waits."""
    processes: list[subprocess.Popen[str]] = []

    def start(*flags: str, environ: Mapping[str, str] | None = None) -> Waiting:
        process = flanneld(tmp_path, NOBODY, *flags, environ=environ)
        processes.append(process)
        assert process.stderr is not None
        said: list[str] = []
        while not said or "Waiting for the store" not in said[-1]:
            line = process.stderr.readline()
            assert line, said
            said.append(line.rstrip("\n"))
        return Waiting(process, said)

    yield start
    for process in processes:
        process.kill()
        process.communicate()


# ---- exit code 0


def test_the_version_is_told_before_variables_are_read(tmp_path: Path) -> None:
    process = flanneld(tmp_path, "--version", environ={"FLANNELD_HEALTHZ_PORT": "bad", "FLANNELD_V": "bad"})
    assert ended(process) == (0, ["0.1.0"])


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("-h", []),
        ("--help", []),
        ("--no-such-flag", ["flag provided but not defined: -no-such-flag"]),
        ("--ip-masq=maybe", ['invalid boolean value "maybe" for -ip-masq: parse error']),
        ("--healthz-port=http", ['invalid value "http" for flag -healthz-port: parse error']),
        ("--public-ip", ["flag needs an argument: -public-ip"]),
    ],
)
def test_help_and_mistakes_on_the_command_line(tmp_path: Path, flag: str, complaint: list[str]) -> None:
    code, lines = ended(flanneld(tmp_path, flag))
    assert code == 0
    assert lines[: len(complaint)] == complaint
    usage = lines[len(complaint) :]
    assert re.fullmatch(r"Usage: \S+ \[OPTION\]\.\.\.", usage[0])
    assert "  -subnet-lease-renew-margin int" in usage


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_for_its_store(waits: Waits, number: signal.Signals) -> None:
    process = waits().process
    process.send_signal(number)
    code, lines = ended(process)
    assert code == 0
    assert lines[-1].endswith("] Exiting cleanly...")


# ---- exit code 1


REFUSALS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "renew margin too small": ("", ("--subnet-lease-renew-margin=0",), ALONE, ("margin is 0", "1439")),
    "renew margin too large": ("", ("--subnet-lease-renew-margin=1440",), ALONE, ("margin is 1440", "1439")),
    "half a key pair": ("", (NOBODY, "--etcd-keyfile=/x"), ALONE, ("--etcd-keyfile=/x", "--etcd-certfile")),
    "no endpoint": ("", ("--etcd-endpoints=nonsense",), ALONE, ("--etcd-endpoints", "'nonsense'")),
    "no IP family": ('{"EnableIPv4": false}', (), ALONE, ("EnableIPv4", "EnableIPv6", "net-conf.json")),
    "no br_netfilter": ("", (), NO_BRIDGE_FILTER, ("bridge-nf-call-iptables", "modprobe br_netfilter")),
    "no br_netfilter for IPv6": (
        '{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/48", "Backend": {"Type": "vxlan"}}',
        (),
        NO_BRIDGE_FILTER,
        ("bridge-nf-call-ip6tables", "modprobe br_netfilter"),
    ),
    "nftables need no br_netfilter": (
        f'{{{NFT}, "Backend": {{"Type": "vxlan"}}}}',
        (),
        NO_BRIDGE_FILTER,
        ("no IPv4 default route",),
    ),
    "no such interface": (
        f'{{{NFT}, "Backend": {{"Type": "vxlan"}}}}',
        ("--iface=nope0", "--iface-regex=^nope", "--iface-can-reach=192.0.2.1"),
        ALONE,
        ("--iface=nope0", "--iface-regex=^nope", "--iface-can-reach=192.0.2.1"),
    ),
    "unknown backend": (
        f'{{{NFT}, "Backend": {{"Type": "vlxan"}}}}',
        ("--iface=lo", "--public-ip=192.0.2.1"),
        (*ALONE, "sh", "-c", 'ip addr add 192.0.2.1/24 dev lo && exec "$@"', "sh"),
        ("'vlxan'", "net"),
    ),
    "backend without a type": (
        f'{{{NFT}, "Backend": {{}}}}',
        ("--iface=lo",),
        (*ALONE, "sh", "-c", 'ip addr add 192.0.2.1/24 dev lo && exec "$@"', "sh"),
        ("Backend",),
    ),
    "address of the probes is not here": (
        "",
        ("--healthz-ip=192.0.2.1", "--healthz-port=8081"),
        (*ALONE, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"),
        ("--healthz-ip=192.0.2.1", "--healthz-port=8081"),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_start_that_cannot_succeed(tmp_path: Path, case: str) -> None:
    netconf, flags, inside, words = REFUSALS[case]
    if netconf:
        (tmp_path / "net-conf.json").write_text(netconf)
    code, lines = ended(flanneld(tmp_path, *flags, inside=inside))
    assert code == 1, lines
    assert all(LINE.fullmatch(line) for line in lines), lines
    errors = [line for line in lines if line.startswith("E")]
    assert len(errors) == 1, lines
    assert all(word in errors[0] for word in words), errors[0]
    assert not (tmp_path / "subnet.env").exists()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[tuple[EtcdServer, tuple[str, ...]]]:
    """An etcd in a namespace, and the words that run a program in there."""
    name = f"pfl{os.getpid()}-proc"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        with EtcdServer(tmp_path / "etcd", netns=name) as server:
            yield server, ("nsenter", f"--net=/run/netns/{name}")
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_a_wrong_configuration_in_etcd(tmp_path: Path, etcd: tuple[EtcdServer, tuple[str, ...]]) -> None:
    server, inside = etcd
    server.etcdctl("put", "/coreos.com/network/config", '{"Network": "10.244.0.0/29"}')
    code, lines = ended(flanneld(tmp_path, f"--etcd-endpoints={server.endpoint}", inside=inside))
    assert code == 1
    assert "/coreos.com/network/config" in lines[-1]
    assert "10.244.0.0/29" in lines[-1]


# ---- ended by a signal


def fill(process: subprocess.Popen[str]) -> None:
    """Fill the pipe that is the process's stderr, so that the next line it logs blocks it."""
    # Opened anew: the flag that makes writes fail instead of block belongs to the open file.
    pipe = os.open(f"/proc/{process.pid}/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    try:
        while True:
            os.write(pipe, b"x")
    except BlockingIOError:
        return
    finally:
        os.close(pipe)


def catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def blocked_in_write(process: subprocess.Popen[str]) -> bool:
    return Path(f"/proc/{process.pid}/wchan").read_text().startswith(("pipe_write", "anon_pipe_write"))


def test_a_second_signal_kills(waits: Waits) -> None:
    process = waits().process
    assert catches(process, signal.SIGTERM)
    fill(process)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: not catches(process, signal.SIGTERM), 10.0, "end of the handler")
    wait_for(lambda: blocked_in_write(process), 10.0, "process that hangs at its last words")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM


def test_a_signal_before_it_is_prepared_kills(tmp_path: Path) -> None:
    """It hangs at its first words, which are about a variable."""
    program = 'import os, signal; signal.raise_signal(signal.SIGSTOP); os.execvp("{0}", {1})'
    words = [*SOURCE, NOBODY, "--cni-socket="]
    inside = (*ALONE, SOURCE[0], "-c", program.format(words[0], words))
    process = flanneld(tmp_path, inside=inside, environ={"FLANNELD_IP_MASQ": "maybe"})
    wait_for(lambda: " T " in Path(f"/proc/{process.pid}/stat").read_text(), 10.0, "process that waits")
    fill(process)
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: blocked_in_write(process), 10.0, "process that hangs at its first words")
    assert not catches(process, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.communicate()


# ---- variables and the log


def test_variables(waits: Waits) -> None:
    lines = waits(
        "--iptables-resync=7",
        "--etcd-password=s3cret",
        environ={
            "FLANNELD_IPTABLES_RESYNC": "9",
            "FLANNELD_ETCD_PREFIX": "/from-variable",
            "FLANNELD_SUBNET_LEASE_RENEW_MARGIN": "",
            "FLANNELD_IFACE": "a,b",
            "FLANNELD_IP_MASQ": "maybe",
            "FLANNELD_VERSION": "true",
            "FLANNELD_NO_SUCH_FLAG": "1",
        },
    ).said
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert "s3cret" not in "".join(lines)
    assert sum(line.startswith("W") and "FLANNELD_" in line for line in lines) == 1
    assert 'FLANNELD_IP_MASQ "maybe" is ignored' in lines[0]
    [options] = [line for line in lines if "Starting flanneld" in line]
    for word in (
        "iptables-resync=7",
        'etcd-prefix="/from-variable"',
        "subnet-lease-renew-margin=60",
        'iface=["a,b"]',
        "ip-masq=false",
        'etcd-password="***"',
    ):
        assert f" {word}" in options


def line_of(module: str, text: str) -> str:
    """`module.py:N` of the line of the program that logs `text`."""
    source = (REPOSITORY / "flanneld" / f"{module}.py").read_text().splitlines()
    [number] = [n for n, line in enumerate(source, 1) if text in line]
    return f"{module}.py:{number}"


def start(node: Node, store: Store, *flags: str) -> None:
    """Start it from source, and return when it says (again) that it is ready."""
    before = node.log.read_text().count("flannel is ready") if node.log.exists() else 0
    node.start(SOURCE, store, *flags)
    wait_for(lambda: node.log.read_text().count("flannel is ready") > before, 20.0, "readiness", node.log)


SAID = [
    "Found network config - Backend type: vxlan",
    "Wrote subnet file to ",
    "Running backend.",
    "flannel is ready",
    "Exiting cleanly...",
]


def test_words_that_people_look_for(lab_of: Callable[[int], Lab]) -> None:
    lab = lab_of(1)
    store = etcd_store(lab, {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}})
    node = Node(lab, "node1")
    start(node, store)
    os.kill(node.daemon.popen.pid, signal.SIGINT)
    assert node.daemon.popen.wait(10) == 0
    first = node.log.read_text()
    assert "Created subnet manager: Etcd Local Manager with Previous Subnet: None" in first
    places = [first.find(text) for text in SAID]
    assert -1 not in places
    assert places == sorted(places)
    assert all(LINE.fullmatch(line) for line in first.splitlines()), first

    subnet = node.subnet
    start(node, store)
    again = node.log.read_text().removeprefix(first)
    assert f"Created subnet manager: Etcd Local Manager with Previous Subnet: {subnet}" in again
    assert node.subnet == subnet


def test_verbosity_by_file_and_a_stack_trace(lab_of: Callable[[int], Lab]) -> None:
    lab = lab_of(1)
    store = etcd_store(lab, {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}})
    place = line_of("__main__", '"Starting flanneld')
    node = Node(lab, "node1")
    start(node, store, "--vmodule=etcd=2", f"--log_backtrace_at={place}")
    value = '{"PublicIP":"192.168.77.99","PublicIPv6":null,"BackendType":"vxlan"}'
    etcdctl(lab, "put", "/coreos.com/network/subnets/10.244.250.0-24", value)
    node.daemon.wait_text("lease-written key=10.244.250.0-24")
    lines = node.log.read_text().splitlines()
    [at] = [number for number, line in enumerate(lines) if f" {place}] Starting flanneld" in line]
    assert lines[at + 1].startswith('  File "')
    assert not any(re.search(r" reconcile\.py:\d+\] put ", line) for line in lines)  # that would be -v=4
