"""host-local beside upstream's own: same calls, same answers, same files; both in one directory; a kill."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni.handler import handle
from cni.ipam.index import Indexes
from cni.local import LocalHost
from cni.plugins.hostlocal import HostLocal
from cni.spec.request import Request

GO_PLUGIN = "/usr/lib/cni/host-local"
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not os.path.exists(GO_PLUGIN), reason="upstream's host-local is not installed"
)

Answer = tuple[int, Any]
Call = Callable[..., Answer]


def environment(command: str, container: str, ifname: str, args: str) -> dict[str, str]:
    return {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": "/run/netns/none",
        "CNI_IFNAME": ifname,
        "CNI_PATH": "/usr/lib/cni",
        "CNI_ARGS": args,
    }


def decoded(code: int, stdout: bytes) -> Answer:
    """The answer as 1.1.1 and 1.9 agree on it: the older one prints an empty dns."""
    answer = json.loads(stdout) if stdout else None
    if answer and not answer.get("dns", True):
        del answer["dns"]
    return code, answer


class Go:
    """Upstream's plugin, executed."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def __call__(
        self, command: str, conf: dict[str, Any], container: str = "c1", ifname: str = "eth0", args: str = ""
    ) -> Answer:
        done = subprocess.run(
            [GO_PLUGIN],
            input=json.dumps(conf).replace("DATA", str(self.data)).encode(),
            env=environment(command, container, ifname, args),
            capture_output=True,
            timeout=30,
            check=False,
        )
        return decoded(done.returncode, done.stdout)


class Ours:
    """Our plugin in this process, with an index or without."""

    def __init__(self, data: Path, indexes: Indexes | None = None) -> None:
        self.data = data
        self.notes: list[str] = []
        self._indexes = indexes

    def __call__(
        self, command: str, conf: dict[str, Any], container: str = "c1", ifname: str = "eth0", args: str = ""
    ) -> Answer:
        variables = environment(command, container, ifname, args)
        stdin = json.dumps(conf).replace("DATA", str(self.data)).encode()
        host = LocalHost(self.notes.append, variables)
        response = handle(Request(variables, stdin), HostLocal(host, self._indexes))
        assert "Traceback" not in response.stderr, response.stderr
        return decoded(response.exit_code, response.stdout)


@contextmanager
def ours_at(data: Path, indexed: bool) -> Iterator[Ours]:
    indexes = Indexes() if indexed else None
    yield Ours(data, indexes)
    if indexes is not None:
        indexes.close()


def conf(version: str = "1.0.0", top: dict[str, Any] | None = None, **ipam: Any) -> dict[str, Any]:
    """A netconf; "DATA" stands for the directory of whoever runs it."""
    return {
        "cniVersion": version,
        "name": "net",
        "ipam": {"type": "host-local", "dataDir": "DATA", **ipam},
        **(top or {}),
    }


def tree(data: Path) -> dict[str, bytes]:
    """The files of a store, without the mark that is ours."""
    store = data / "net"
    return {str(one.relative_to(store)): one.read_bytes() for one in store.rglob("*") if one.is_file()}


SMALL = "10.0.0.0/29"
RANGES: dict[str, dict[str, Any]] = {
    "no set": {},
    "no set, a start": {"rangeStart": "10.0.0.3"},
    "a null list": {"ranges": None},
    "an empty set": {"ranges": [[]]},
    "a null set": {"ranges": [None]},
    "a range without a subnet": {"ranges": [[{}]]},
    "a null range": {"ranges": [[None]]},
    "an empty subnet": {"subnet": ""},
    "a null subnet": {"subnet": None},
    "no CIDR": {"subnet": "10.0.0.0"},
    "a zone": {"subnet": "fe80::%1/64"},
    "31 bits": {"subnet": "10.1.2.0/31"},
    "32 bits": {"subnet": "10.1.2.0/32"},
    "127 bits": {"subnet": "fd00::/127"},
    "128 bits": {"subnet": "fd00::/128"},
    "30 bits": {"subnet": "10.1.2.0/30"},
    "126 bits": {"subnet": "fd00::/126"},
    "host bits": {"subnet": "10.1.2.3/24"},
    "host bits, all": {"subnet": "10.1.2.3/0"},
    "host bits, IPv6": {"subnet": "fd00::1/64"},
    "a mapped subnet": {"subnet": "::ffff:10.0.0.0/120"},
    "a mapped subnet, small": {"subnet": "::ffff:10.0.0.0/127"},
    "start before the subnet": {"subnet": SMALL, "rangeStart": "9.255.255.255"},
    "start is the network": {"subnet": SMALL, "rangeStart": "10.0.0.0"},
    "start of the other family": {"subnet": SMALL, "rangeStart": "fd00::1"},
    "start mapped": {"subnet": SMALL, "rangeStart": "::ffff:10.0.0.3"},
    "start is no address": {"subnet": SMALL, "rangeStart": "junk"},
    "end behind the subnet": {"subnet": SMALL, "rangeEnd": "10.0.0.8"},
    "end is the network": {"subnet": SMALL, "rangeEnd": "10.0.0.0"},
    "end is the broadcast address": {"subnet": SMALL, "rangeStart": "10.0.0.7", "rangeEnd": "10.0.0.7"},
    "end before start": {"subnet": SMALL, "rangeStart": "10.0.0.6", "rangeEnd": "10.0.0.3"},
    "end of the other family": {"subnet": SMALL, "rangeEnd": "fd00::9"},
    "gateway inside": {"subnet": SMALL, "gateway": "10.0.0.2"},
    "gateway outside": {"subnet": SMALL, "gateway": "10.9.0.1"},
    "gateway of the other family": {"subnet": SMALL, "gateway": "fd00::1"},
    "gateway empty": {"subnet": SMALL, "gateway": ""},
    "gateway no address": {"subnet": SMALL, "gateway": "10.0.0.256"},
    "leading zeros": {"subnet": SMALL, "gateway": "10.0.0.01"},
    "families mixed": {"ranges": [[{"subnet": SMALL}, {"subnet": "fd00::/64"}]]},
    "overlap in a set": {
        "ranges": [[{"subnet": "10.1.2.0/24"}, {"subnet": "10.1.2.0/25"}]],
    },
    "touching ends": {
        "ranges": [[{"subnet": SMALL, "rangeEnd": "10.0.0.3"}, {"subnet": SMALL, "rangeStart": "10.0.0.3"}]],
    },
    "side by side": {
        "ranges": [[{"subnet": SMALL, "rangeEnd": "10.0.0.2"}, {"subnet": SMALL, "rangeStart": "10.0.0.3"}]],
    },
    "overlap of sets": {"ranges": [[{"subnet": SMALL}], [{"subnet": "fd00::/64"}], [{"subnet": SMALL}]]},
    "single and sets": {"subnet": SMALL, "ranges": [[{"subnet": "fd00::/64"}], [{"subnet": "10.2.0.0/29"}]]},
    "keys in capitals": {"SUBNET": SMALL, "RangeStart": "10.0.0.4"},
    "routes": {"subnet": SMALL, "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1"}, {"dst": "1.2.3.4/8"}]},
    "a broken route": {"subnet": SMALL, "routes": [{"dst": "junk"}]},
    "resolvConf is missing": {"subnet": SMALL, "resolvConf": "/nonexistent/resolv.conf"},
    "resolvConf is a directory": {"subnet": SMALL, "resolvConf": "/tmp"},
    "resolvConf": {"subnet": SMALL, "resolvConf": "DATA/resolv.conf"},
}
RESOLV_CONF = """# a comment
; another
nameserver 192.0.2.1 192.0.2.9
nameserver
 domain a.example
domain b.example
search x.example y.example
search z.example
options ndots:5 rotate
sortlist 10.0.0.0
"""


@pytest.mark.parametrize("case", RANGES)
@pytest.mark.parametrize("version", ["0.2.0", "0.4.0", "1.0.0"])
def test_the_same_answer_for(case: str, version: str, tmp_path: Path) -> None:
    go, ours = Go(tmp_path / "go"), Ours(tmp_path / "ours")
    for one in (go, ours):
        one.data.mkdir()
        (one.data / "resolv.conf").write_text(RESOLV_CONF)
    given_conf = conf(version, **RANGES[case])
    assert ours("ADD", given_conf) == go("ADD", given_conf)
    assert tree(ours.data) == tree(go.data)


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "an argument": ("IP=10.0.0.4", {}),
    "an argument with a prefix": ("IP=10.0.0.4/16", {}),
    "an argument, mapped": ("IP=::ffff:10.0.0.4", {}),
    "an argument, empty": ("IP=", {}),
    "an argument twice": ("IP=10.0.0.4;IP=10.0.0.5", {}),
    "an argument, no address": ("IP=junk", {}),
    "an argument, no prefix": ("IP=10.0.0.4/33", {}),
    "an argument in small letters": ("ip=10.0.0.4", {}),
    "an unknown argument": ("K8S_POD_NAME=x", {}),
    "an unknown argument, ignored": ("IgnoreUnknown=1;K8S_POD_NAME=x;IP=10.0.0.5", {}),
    "no pair": ("IP=10.0.0.4;", {}),
    "a pair too many": ("IP=10.0.0.4=5", {}),
    "args": ("", {"args": {"cni": {"ips": ["10.0.0.4"]}}}),
    "args with a prefix, twice": ("", {"args": {"cni": {"ips": ["10.0.0.4/24", "10.0.0.4"]}}}),
    "args, no address": ("", {"args": {"cni": {"ips": ["junk"]}}}),
    "args, empty": ("", {"args": {"cni": {"ips": [""]}}}),
    "args, null": ("", {"args": {"cni": None}}),
    "runtime": ("", {"runtimeConfig": {"ips": ["10.0.0.4/29"]}}),
    "runtime, no address": ("", {"runtimeConfig": {"ips": ["junk"]}}),
    "both families": ("IP=fd00::9", {"runtimeConfig": {"ips": ["10.0.0.4"]}}),
    "a gateway": ("", {"runtimeConfig": {"ips": ["10.0.0.1"]}}),
    "the network": ("", {"runtimeConfig": {"ips": ["10.0.0.0"]}}),
    "outside": ("", {"runtimeConfig": {"ips": ["10.0.0.9"]}}),
    "taken": ("IP=10.0.0.3", {}),
    "taken, IPv6 first of all": ("", {"args": {"cni": {"ips": ["fd00::3"]}}}),
    "ranges of the runtime": (
        "IP=10.2.0.4",
        {"runtimeConfig": {"ipRanges": [[{"subnet": "10.2.0.0/29"}]], "ips": ["10.0.0.6"]}},
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_the_same_answer_to_the_request_of(case: str, tmp_path: Path) -> None:
    args, top = REQUESTS[case]
    go, ours = Go(tmp_path / "go"), Ours(tmp_path / "ours")
    given_conf = conf(top=top, ranges=[[{"subnet": SMALL}], [{"subnet": "fd00::/64"}]])
    other = conf(ranges=[[{"subnet": SMALL}], [{"subnet": "fd00::/64"}]])
    for one in (go, ours):
        one("ADD", other, "before")
        one("ADD", other, "holder")
    assert ours("ADD", given_conf, args=args) == go("ADD", given_conf, args=args)
    assert tree(ours.data) == tree(go.data)


def test_requests_that_fit_in_one_set_are_placed_one_and_refused_together(tmp_path: Path) -> None:
    go, ours = Go(tmp_path / "go"), Ours(tmp_path / "ours")
    wanted = conf(top={"args": {"cni": {"ips": ["10.0.0.3", "10.0.0.4"]}}}, subnet=SMALL)
    for one in (go, ours):  # which of the two is left over is chance in Go
        code, answer = one("ADD", wanted)
        assert code == 1 and answer["code"] == 999
        assert answer["msg"].rpartition(" ")[0] == "failed to allocate all requested IPs:"
        assert set(tree(one.data)) == {"lock", "last_reserved_ip.0"}


FILES: dict[str, dict[str, bytes]] = {
    "the last one is garbage": {"last_reserved_ip.0": b"garbage"},
    "the last one has a line break": {"last_reserved_ip.0": b"10.0.0.4\n"},
    "the last one is outside": {"last_reserved_ip.0": b"10.9.0.4"},
    "the last one is the end": {"last_reserved_ip.0": b"10.0.0.6"},
    "the last one is all that is free": {
        **{f"10.0.0.{n}": b"other\r\neth0" for n in (2, 3, 4, 6)},
        "last_reserved_ip.0": b"10.0.0.5",
    },
    "all in use": {f"10.0.0.{n}": b"other\r\neth0" for n in range(2, 7)},
    "an old file of the container": {"10.0.0.4": b"c1"},
    "an old file and a new one": {"10.0.0.4": b"c1", "10.0.0.3": b"c1\r\neth0"},
    "only a line feed": {"10.0.0.4": b"c1\neth0"},
    "blanks around": {"10.0.0.4": b"  c1\r\neth0\r\n"},
    "another interface": {"10.0.0.4": b"c1\r\neth1"},
    "a foreign file": {"backup": b"c1\r\neth0", "10.0.0.2.old": b"c1"},
    "in a directory": {"below/10.0.0.4": b"c1\r\neth0"},
    "in a directory, of another network": {"below/172.16.0.4": b"c1\r\neth0"},
    "a directory is in the way": {"10.0.0.2/file": b"x"},
    "empty": {"10.0.0.2": b""},
    "of the other family": {"fd00::4": b"c1\r\neth0"},
    "another spelling": {"FD00::2": b"x\r\neth0", "::ffff:10.0.0.2": b"c1\r\neth0"},
}
SETS: dict[str, list[list[dict[str, str]]]] = {
    "one set": [[{"subnet": SMALL}]],
    "two sets": [[{"subnet": "fd00::/64"}], [{"subnet": SMALL}]],
}
# Upstream's failed ADD frees what an earlier one holds; ours does not, and has a test of its own.
HELD = ("an old file and a new one", "blanks around", "in a directory", "another spelling")
TRAPS = [(case, "two sets") for case in HELD]


@pytest.mark.parametrize("indexed", [False, True], ids=["scanning", "indexed"])
@pytest.mark.parametrize(
    ("case", "sets"), [one for one in itertools.product(FILES, SETS) if one not in TRAPS]
)
def test_the_same_with_files_that_are_there(case: str, sets: str, indexed: bool, tmp_path: Path) -> None:
    go = Go(tmp_path / "go")
    given_conf = conf(ranges=SETS[sets])
    with ours_at(tmp_path / "ours", indexed) as ours:
        if indexed:
            ours("ADD", given_conf, "early")
            ours("DEL", given_conf, "early")
            (tmp_path / "ours" / "net" / "last_reserved_ip.0").unlink()
            (tmp_path / "ours" / "net" / "last_reserved_ip.1").unlink(missing_ok=True)
        for data in (go.data, ours.data):
            for name, content in FILES[case].items():
                path = data / "net" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        for command in ("CHECK", "ADD", "CHECK", "ADD", "DEL", "CHECK", "DEL"):
            assert ours(command, given_conf) == go(command, given_conf), command
            expected = tree(go.data)
            if command != "CHECK":
                assert tree(ours.data) == expected, command


def test_a_failed_add_releases_what_it_took_and_nothing_else(tmp_path: Path) -> None:
    ours = Ours(tmp_path)
    one_set = conf(ranges=[[{"subnet": SMALL}]])
    two_sets = conf(ranges=[[{"subnet": "10.7.0.0/29"}], [{"subnet": SMALL}]])
    code, first = ours("ADD", one_set)
    assert code == 0 and first["ips"][0]["address"] == "10.0.0.2/29"
    code, answer = ours("ADD", two_sets)
    duplicate = "10.0.0.2 has been allocated to c1, duplicate allocation is not allowed"
    assert (code, answer["msg"]) == (1, f"failed to allocate for range 1: {duplicate}")
    assert tree(tmp_path)["10.0.0.2"] == b"c1\r\neth0"
    assert "10.7.0.2" not in tree(tmp_path)


def test_a_second_add_with_a_wish_is_refused_too(tmp_path: Path) -> None:
    ours = Ours(tmp_path)
    ours("ADD", conf(subnet=SMALL))
    code, answer = ours("ADD", conf(subnet=SMALL), args="IP=10.0.0.5")
    assert (code, answer["code"]) == (1, 999)
    assert "10.0.0.2 has been allocated to c1" in answer["msg"]
    assert {"10.0.0.2", "lock", "last_reserved_ip.0"} == set(tree(tmp_path))


@pytest.mark.parametrize("sets", [[[{"subnet": "junk"}]], [[{"subnet": "10.0.0.1/29"}]], [], "x"])
def test_del_needs_no_valid_ranges(sets: object, tmp_path: Path) -> None:
    ours = Ours(tmp_path)
    ours("ADD", conf(subnet=SMALL))
    assert ours("DEL", conf(ranges=sets), args="junk") == (0, None)
    assert set(tree(tmp_path)) == {"lock", "last_reserved_ip.0"}


def test_del_and_gc_of_a_network_that_never_was_leave_nothing(tmp_path: Path) -> None:
    ours = Ours(tmp_path)
    assert ours("DEL", conf(subnet=SMALL)) == (0, None)
    assert ours("GC", conf("1.1.0", subnet=SMALL, top={"cni.dev/valid-attachments": []})) == (0, None)
    assert list(tmp_path.iterdir()) == []


def test_the_files_are_private_and_the_directory_is_not(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        Ours(tmp_path / "a" / "b")("ADD", conf(subnet=SMALL))
    finally:
        os.umask(before)
    modes = {one.name: oct(one.stat().st_mode & 0o7777) for one in (tmp_path / "a").rglob("*")}
    assert modes.pop(next(name for name in modes if name.startswith(".flannel-boot-"))) == "0o600"
    assert modes == {
        "b": "0o755",
        "net": "0o755",
        "lock": "0o750",
        "10.0.0.2": "0o600",
        "last_reserved_ip.0": "0o600",
    }


CUTS = st.lists(st.integers(1, 15), min_size=2, max_size=6, unique=True).map(sorted)
STEP = st.tuples(st.sampled_from(["ADD", "ADD", "DEL"]), st.sampled_from(["c1", "c2", "c3", "c4", "c5"]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=CUTS,
    gateway=st.one_of(st.none(), st.integers(0, 17)),
    steps=st.lists(STEP, min_size=1, max_size=16),
    order=st.randoms(),
    indexed=st.booleans(),
)
def test_any_course_of_events_is_the_same(
    cuts: list[int],
    gateway: int | None,
    steps: list[tuple[str, str]],
    order: random.Random,
    indexed: bool,
    tmp_path: Path,
) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    # One gateway for all: where they differ, upstream hands out the gateway of another range, and we do not.
    extra = {} if gateway is None else {"gateway": f"10.0.0.{gateway}"}
    ranges = [
        {"subnet": "10.0.0.0/28", "rangeStart": f"10.0.0.{first}", "rangeEnd": f"10.0.0.{last}", **extra}
        for first, last in zip(cuts[::2], cuts[1::2], strict=False)
    ]
    order.shuffle(ranges)
    go, given_conf = Go(tmp_path / "go"), conf(ranges=[ranges])
    with ours_at(tmp_path / "ours", indexed) as ours:
        for command, container in steps:
            assert ours(command, given_conf, container) == go(command, given_conf, container)
            if (go.data / "net" / "last_reserved_ip.0").exists():
                assert tree(ours.data) == tree(go.data)


# ---- both in one directory

WORKER = """
import os, sys
from tests.netns.test_hostlocal import conf, ours_at, work
from pathlib import Path
data, number, indexed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "indexed"
with ours_at(data, indexed) as ours:
    print("\\n".join(work(ours, number, int(sys.argv[4]))))
"""
SUBNET = "10.3.0.0/24"
KEPT = 5


def work(plugin: Call, number: int, rounds: int) -> list[str]:
    """ADD and DEL in turns; address, container and interface of each attachment that is kept, and faults."""
    held: list[tuple[str, str, str]] = []
    found = []
    both = conf(ranges=[[{"subnet": SUBNET}], [{"subnet": "fd00::/112"}]])
    for turn in range(rounds):
        container = f"w{number}-{turn}"
        code, answer = plugin("ADD", both, container)
        if code:
            found.append(f"fault {answer['msg']}")
            continue
        held += [(one["address"].partition("/")[0], container, "eth0") for one in answer["ips"]]
        if len(held) > 2 * KEPT:
            old = held[0][1]
            code, answer = plugin("DEL", both, old)
            if code:
                found.append(f"fault {answer['msg']}")
            held = held[2:]
    return found + [" ".join(one) for one in held]


def start_worker(data: Path, number: int, mode: str, rounds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(data), str(number), mode, str(rounds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_twenty_four_at_once_give_no_address_twice_and_lose_none(tmp_path: Path) -> None:
    rounds = 15
    processes = [start_worker(tmp_path, n, "indexed" if n % 2 else "scanning", rounds) for n in range(12)]
    go_lines: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: go_lines.extend(work(Go(tmp_path), n, rounds)))
        for n in range(12, 24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = list(go_lines)
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        lines += output.splitlines()
    assert [line for line in lines if line.startswith("fault")] == []
    kept = {line.split()[0]: line.split()[1:] for line in lines}
    assert len(kept) == len(lines) == 24 * KEPT * 2
    expected = {address: "\r\n".join(owner).encode() for address, owner in kept.items()}
    found = {name: data for name, data in tree(tmp_path).items() if name[0] != "l"}
    assert found == expected


def test_the_index_follows_what_upstream_does_without_another_scan(tmp_path: Path) -> None:
    indexes = Indexes()
    go, ours = Go(tmp_path), Ours(tmp_path, indexes)
    given_conf = conf(subnet=SMALL)
    index = indexes.of(str(tmp_path / "net"))
    for turn in range(12):
        code, answer = go("ADD", given_conf, "g")
        assert code == 0, answer
        code, answer = ours("ADD", given_conf, "o")
        assert code == 0, answer
        assert set(tree(tmp_path).values()) >= {b"g\r\neth0", b"o\r\neth0"}
        assert ours("ADD", given_conf, "g")[0] == 1, "ours has not seen what upstream reserved"
        for plugin, container in ((ours, "g"), (go, "o")) if turn % 2 else ((go, "g"), (ours, "o")):
            assert plugin("DEL", given_conf, container) == (0, None)
        assert set(tree(tmp_path)) == {"lock", "last_reserved_ip.0"}
    assert index.scans == 1
    indexes.close()


# ---- sizes

OPENED: list[str] = []
COUNTING = threading.local()


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("open", "os.scandir", "os.listdir") and getattr(COUNTING, "on", False):
        OPENED.append(f"{event} {arguments[0]}")


sys.addaudithook(_count)


def opened_by(action: Callable[[], object]) -> int:
    """How many files and directories an action opens."""
    OPENED.clear()
    COUNTING.on = True
    try:
        action()
    finally:
        COUNTING.on = False
    return len(OPENED)


def fill(store: Path, count: int) -> None:
    """`count` reservations, from 10.0.0.2 on."""
    store.mkdir(parents=True, exist_ok=True)
    for number in range(2, count + 2):
        name = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        (store / name).write_bytes(f"{number:064x}\r\neth0".encode())


def test_sixty_five_thousand_reservations_cost_what_ten_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given_conf = conf(subnet="10.0.0.0/15")
    opens: dict[int, list[int]] = {}
    times: dict[int, list[float]] = {}
    for count in (10, 65_000):
        data = tmp_path / str(count)
        fill(data / "net", count)
        with ours_at(data, indexed=True) as ours:
            assert ours("ADD", given_conf, "first")[0] == 0  # reads the store, once
            opens[count], times[count] = [], []
            for turn in range(50):
                for command in ("ADD", "DEL"):
                    start = time.perf_counter()
                    opens[count].append(opened_by(lambda: ours(command, given_conf, f"c{turn}")))  # noqa: B023
                    times[count].append(time.perf_counter() - start)
            assert len(tree(data)) == count + 3
        shutil.rmtree(data)
    assert opens[10] == opens[65_000]
    assert opens[10][-2:] == [3, 1], OPENED
    with capsys.disabled():
        for count, taken in times.items():
            print(
                f"\n{count} reservations: {sorted(taken)[len(taken) // 2] * 1e6:.0f} us a call, median",
                end="",
            )
        print(f", {opens[10][-2:]} opened")


def test_the_next_free_address_is_found_behind_sixty_five_thousand_used_ones(tmp_path: Path) -> None:
    fill(tmp_path / "net", 65_000)
    with ours_at(tmp_path, indexed=True) as ours:
        assert ours("ADD", conf(subnet="10.0.0.0/15"), "first")[0] == 0
        (tmp_path / "net" / "last_reserved_ip.0").unlink()
        made: list[Answer] = []
        opened = opened_by(lambda: made.append(ours("ADD", conf(subnet="10.0.0.0/15"), "second")))
        assert made[0][1]["ips"][0]["address"] == "10.0.253.235/15"
        assert opened <= 6, OPENED
    shutil.rmtree(tmp_path)


# ---- killed halfway


def test_a_kill_at_any_moment_leaves_a_store_that_works(tmp_path: Path) -> None:
    given_conf = conf(subnet="10.3.0.0/24")
    rng = random.Random(4)
    for turn in range(8):
        process = start_worker(tmp_path, turn, "scanning" if turn % 2 else "indexed", 100_000)
        deadline = time.monotonic() + 30
        while not any(f"w{turn}-".encode() in one for one in tree(tmp_path).values()):
            assert time.monotonic() < deadline and process.poll() is None
        time.sleep(rng.random() * 0.02)  # the moment of the kill is what is varied
        process.send_signal(signal.SIGKILL)
        process.communicate()
        files = {name: data for name, data in tree(tmp_path).items() if name[0] != "l"}
        torn = [
            data for data in files.values() if not data.startswith(b"w") or not data.endswith(b"\r\neth0")
        ]
        assert torn in ([], [b""]), "more than the file that was being made is not whole"
        ours, go = Ours(tmp_path), Go(tmp_path)
        for plugin in (ours, go):  # nobody waits for the dead one's lock
            assert plugin("ADD", given_conf, "alive")[0] == 0
            assert plugin("DEL", given_conf, "alive") == (0, None)
        gone = conf("1.1.0", subnet="10.3.0.0/24", top={"cni.dev/valid-attachments": []})
        assert ours("GC", gone) == (0, None)
        assert {name for name in tree(tmp_path) if name[0] != "l"} == set()
