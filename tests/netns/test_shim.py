"""The shim against a daemon that keeps to the protocol, one that does not, and none.

`call(...).report` asserts that the cold plugin, and only it, answered; `undo` that it was told to undo.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import pty
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cni.local import LocalHost
from cni.net import nlmsg
from cni.net.nlsocket import NetlinkSocket
from tests.fuzz import shim as fuzz
from tests.fuzz import shim_rig as rig
from tests.fuzz.shim_rig import DECLINED, HELLO, Daemon, Incomplete, Outcome, Request, answering, call
from tests.netns.cni_fixtures import Namespace

SIOCGSKNS = 0x894C
SCM_BYTES = 256
NOBODY = 65534
COMMANDS_SAFE_TO_REPEAT = ("DEL", "CHECK", "STATUS", "GC", "VERSION")
RESULT = b'{\n    "cniVersion": "1.0.0"\n}'


class Node:
    """A shim with its cold plugin, and a place for a daemon's socket."""

    def __init__(self, folder: Path, shim: Path) -> None:
        self.folder = folder
        self.shim = shim
        self.socket = folder / "cni.sock"

    def environment(self, command: str = "ADD", **extra: str) -> dict[str, str]:
        return {
            "PATH": "/usr/bin:/bin",
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": "c1",
            "CNI_IFNAME": "eth0",
            "FLANNEL_CNI_SOCKET": str(self.socket),
            **extra,
        }

    def call(
        self, command: str = "ADD", stdin: bytes = b"{}", argv0: str | None = None, **extra: str
    ) -> Outcome:
        return call([self.shim], self.environment(command, **extra), stdin, argv0)

    def serve(self, behaviour: Callable[[socket.socket], object]) -> Daemon:
        self.socket.unlink(missing_ok=True)
        return Daemon(self.socket, behaviour)

    def request(self, command: str = "ADD", stdin: bytes = b"{}", **extra: str) -> Request:
        """What a daemon gets for a call; the caller closes it."""
        requests: list[Request] = []
        with self.serve(answering(rig.reply(), requests)):
            assert self.call(command, stdin, **extra) == Outcome(0, b"", b"")
        return requests[0]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    rig.install_report(folder)
    return rig.build(folder, *rig.RELEASE)


@pytest.fixture
def node(tmp_path: Path, shim: Path) -> Node:
    return Node(tmp_path, shim)


@pytest.fixture
def pod() -> Iterator[Namespace]:
    namespace = Namespace("shim")
    yield namespace
    namespace.remove()


def inode(path: str | int) -> int:
    return os.stat(path).st_ino


def netns_of(descriptor: int) -> int:
    """The inode of the network namespace that a socket belongs to."""
    namespace = fcntl.ioctl(descriptor, SIOCGSKNS, 0)
    try:
        return inode(namespace)
    finally:
        os.close(namespace)


# --- a daemon that does its work -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "stdout", "stderr"), [(0, RESULT, b""), (1, b"{}", b"why"), (255, b"", b"x")]
)
def test_the_daemons_answer_is_the_plugins(node: Node, code: int, stdout: bytes, stderr: bytes) -> None:
    with node.serve(answering(rig.reply(stdout, stderr, code))):
        assert node.call() == Outcome(code, stdout, stderr)


def test_a_request_holds_name_cni_variables_and_stdin(node: Node) -> None:
    request = node.request(
        stdin=b'{"name": "n"}', CNI_ARGS="A=1;B=2", CNI_EMPTY="", FLANNEL_CNI_TIMEOUT_MS="7000"
    )
    request.close()
    assert request.name == b"flannel"
    assert sorted(request.environment) == [
        b"CNI_ARGS=A=1;B=2",
        b"CNI_COMMAND=ADD",
        b"CNI_CONTAINERID=c1",
        b"CNI_EMPTY=",
        b"CNI_IFNAME=eth0",
    ]
    assert request.stdin == b'{"name": "n"}'
    assert (request.netns_error, request.deadline_ms) == (0, 7000)
    assert list(request.descriptors) == ["own", "root"]


@pytest.mark.parametrize(
    ("argv0", "name"),
    [("/opt/cni/bin/bridge", b"bridge"), ("portmap", b"portmap"), ("", b"flannel"), ("a/", b"flannel")],
)
def test_the_name_is_that_of_the_call(node: Node, argv0: str, name: bytes) -> None:
    requests: list[Request] = []
    with node.serve(answering(rig.reply(), requests)):
        node.call(argv0=argv0)
    requests[0].close()
    assert requests[0].name == name
    node.socket.unlink()
    assert node.call(argv0=argv0).report["name"] == name.decode()


@pytest.mark.parametrize("timeout", ["", "0", "-5", "1e3", "99999999999999999999", "5 ", "x"])
def test_a_senseless_timeout_is_the_default(node: Node, timeout: str) -> None:
    request = node.request(FLANNEL_CNI_TIMEOUT_MS=timeout)
    request.close()
    assert request.deadline_ms == 60000


@pytest.mark.parametrize("command", ["", "VERSION"])
def test_stdin_is_left_alone_where_none_is_expected(node: Node, command: str) -> None:
    ours, theirs = os.pipe()  # with nobody who ends it
    seen: list[Request] = []
    with node.serve(answering(rig.reply(b"v"), seen)):
        done = subprocess.run(
            [node.shim],
            env=node.environment(command),
            stdin=ours,
            stdout=subprocess.PIPE,
            check=False,
            timeout=10,
        )
    os.close(theirs)
    os.close(ours)
    seen[0].close()
    assert (done.returncode, done.stdout, seen[0].stdin) == (0, b"v", b"")


def test_descriptors_belong_to_the_container(node: Node, pod: Namespace) -> None:
    pod.run("ip link add pfl-a type veth peer name pfl-b")
    request = node.request(CNI_NETNS=pod.path)
    try:
        given = request.descriptors
        assert list(given) == list(rig.BITS) and request.netns_error == 0
        assert inode(given["netns"]) == inode(pod.path)
        assert inode(given["own"]) == inode("/proc/self/ns/net") != inode(pod.path)
        assert os.path.samestat(os.fstat(given["root"]), os.stat("/"))
        assert netns_of(given["route"]) == inode(pod.path)
        route = NetlinkSocket(0, os.dup(given["route"]))
        found = route.dump(18, bytes(16))
        route.close()
        names = {nlmsg.attrs(link.body, 16)[3].rstrip(b"\0").decode() for link in found}
        assert names == set(pod.links()) >= {"lo", "pfl-a", "pfl-b"}
    finally:
        request.close()


def test_sysctls_are_the_containers(node: Node, pod: Namespace) -> None:
    host = Path("/proc/sys/net/ipv6/conf/lo/hop_limit").read_text()
    pod.run("sysctl -qw net.ipv6.conf.lo.hop_limit=78")
    request = node.request(CNI_NETNS=pod.path)
    try:
        pod.run("ip link add pfl-late type veth peer name pfl-later")  # after the directory was opened
        settings = Path(f"/proc/self/fd/{request.descriptors['settings']}")
        assert (settings / "lo/hop_limit").read_text() == "78\n" != host
        (settings / "pfl-late/hop_limit").write_text("79")
        assert pod.run("sysctl -n net.ipv6.conf.pfl-late.hop_limit") == "79\n"
    finally:
        request.close()
    assert Path("/proc/sys/net/ipv6/conf/lo/hop_limit").read_text() == host


def test_the_cold_path_takes_nothing_from_a_shim_of_another_build(pod: Namespace) -> None:
    with open("/dev/null") as other:
        left = " ".join(
            f"{name}={other.fileno()}" for name in ("own", "root", "netns", "route", "ipv4", "ipv6")
        )
        host = LocalHost(print, {"CNI_NETNS": pod.path, "FLANNEL_CNI_FDS": f"{left} error=0"})
        opened = host.netns(pod.path)
    assert opened.identity[1] == inode(pod.path)
    assert opened.ipv6_setting("lo", "disable_ipv6").read() == "0"
    opened.route.close()
    for number in (opened.descriptor, opened.settings):
        assert number is not None
        os.close(number)


def test_a_netns_that_is_none_is_told_as_an_error(node: Node, tmp_path: Path) -> None:
    plain, fifo = tmp_path / "file", tmp_path / "fifo"
    plain.touch()
    os.mkfifo(fifo)
    for path, error in {
        str(tmp_path / "missing"): 2,
        str(plain / "below"): 20,
        str(plain): -1,
        str(fifo): -1,
        "/proc/self/stat": 22,
        "/proc/self/ns/mnt": 22,
        "": 0,
    }.items():
        request = node.request("DEL", CNI_NETNS=path)
        request.close()
        assert (request.netns_error, list(request.descriptors)) == (error, ["own", "root"]), path


def test_the_daemon_may_read_slowly(node: Node) -> None:
    stdin = os.urandom(1 << 20)
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = rig.receive(connection, 3001, lambda: time.sleep(0.0005))
        request.close()
        seen.append(request.stdin)
        for byte in HELLO:
            connection.sendall(bytes([byte]))
        for byte in rig.reply(b"out", b"err", 3):
            connection.sendall(bytes([byte]))

    with node.serve(serve):
        assert node.call(stdin=stdin, CNI_NETNS="/proc/self/ns/net") == Outcome(3, b"out", b"err")
    assert seen == [stdin]


def test_the_largest_request_is_served_and_one_byte_more_is_not(node: Node) -> None:
    request = node.request()
    request.close()
    rest = len(request.name) + sum(len(one) + 1 for one in request.environment)
    stdin = bytes(range(256)) * (rig.LARGEST // 256)
    largest = node.request(stdin=stdin[rest:])
    largest.close()
    assert largest.stdin == stdin[rest:]

    def serve(connection: socket.socket) -> None:
        connection.sendall(HELLO)
        with pytest.raises(Incomplete) as raised:
            rig.receive(connection)
        assert raised.value.args == (b"",)

    for more in (stdin[rest - 1 :], stdin * 3):
        with node.serve(serve):
            report = node.call(stdin=more).report
        assert report["stdin"].encode("latin-1") == more and report["stdin_kind"].startswith("/memfd:")


def test_an_environment_that_is_too_long_goes_to_the_cold_path(node: Node) -> None:
    environment = node.environment() | {f"CNI_{n}": "x" * 131000 for n in range(33)}
    _soft, hard = resource.getrlimit(resource.RLIMIT_STACK)

    def widen() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, hard))

    with node.serve(hello_and_nothing):
        done = subprocess.run(
            [node.shim],
            env=environment,
            input=b"{}",
            stdout=subprocess.PIPE,
            check=False,
            timeout=30,
            preexec_fn=widen,
        )
    report = Outcome(done.returncode, done.stdout, b"").report
    assert report["stdin"] == "{}" and len(report["environment"]["CNI_32"]) == 131000


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 5 << 20])
def test_a_long_answer_comes_through(node: Node, size: int) -> None:
    stdout = os.urandom(size)
    with node.serve(answering(rig.reply(stdout, b"e" * 70000, 9))):
        assert node.call() == Outcome(9, stdout, b"e" * 70000)


def test_a_stdout_that_would_block_is_waited_for(node: Node) -> None:
    answer = os.urandom(3 << 20)
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with node.serve(answering(rig.reply(answer))):
        process = subprocess.Popen(
            [node.shim], env=node.environment(), stdin=subprocess.DEVNULL, stdout=theirs
        )
        os.close(theirs)
        with open(ours, "rb", buffering=0) as stdout:
            found = b""
            while chunk := stdout.read(10_000):
                found += chunk
        assert process.wait(20) == 0
    assert found == answer


def test_a_result_that_nobody_reads_is_a_failure_not_a_signal(node: Node) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with node.serve(answering(rig.reply(RESULT))):
        done = subprocess.run(
            [node.shim], env=node.environment(), input=b"{}", stdout=theirs, check=False, timeout=20
        )
    node.socket.unlink()
    os.close(theirs)
    assert done.returncode == 1


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_streams_lend_their_numbers_to_nothing(
    node: Node, pod: Namespace, closed: tuple[int, ...]
) -> None:
    seen: list[Request] = []

    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    def run() -> tuple[int, bytes]:
        done = subprocess.run(
            [node.shim],
            env=node.environment(CNI_NETNS=pod.path),
            input=None if 0 in closed else b"{}",
            capture_output=True,
            check=False,
            timeout=20,
            preexec_fn=close,
        )
        return done.returncode, done.stdout

    with node.serve(answering(rig.reply(b"out", b"err"), seen)):
        assert run() == (0, b"" if 1 in closed else b"out")
    seen[0].close()
    assert list(seen[0].descriptors) == list(rig.BITS)
    assert seen[0].stdin == (b"" if 0 in closed else b"{}")
    node.socket.unlink()
    code, stdout = run()
    assert code == 0
    if 1 not in closed:
        fds = json.loads(stdout)["fds"]
        assert all(fds[str(number)] == "/dev/null" for number in closed)


# --- a daemon that is not to be trusted, or absent -------------------------------------------------------


def hello_and_nothing(connection: socket.socket) -> None:
    """Greet, and see the shim go without a byte."""
    with suppress(BrokenPipeError):
        connection.sendall(HELLO)
    assert rig.gone(connection)


def test_without_a_daemon_the_cold_plugin_gets_everything(node: Node, pod: Namespace) -> None:
    outcome = node.call(
        stdin=b'{"a": 1}', CNI_NETNS=pod.path, OTHER="x", FLANNEL_CNI_UNDO="1", FLANNEL_CNI_FDS="own=9"
    )
    report = outcome.report
    environment = report["environment"]
    assert not outcome.undo, "a variable of somebody else"
    assert report["stdin"] == '{"a": 1}'
    assert report["name"] == environment["FLANNEL_CNI_PLUGIN"] == "flannel"
    assert environment["OTHER"] == "x" and environment["CNI_NETNS"] == pod.path
    assert report["netns"] == inode("/proc/self/ns/net"), "the shim did not come back from the container"
    given = dict(word.split("=") for word in environment["FLANNEL_CNI_FDS"].split())
    assert given.pop("error") == "0" and list(given) == list(rig.BITS)
    named = {name: report["fds"][number] for name, number in given.items()}
    assert named["own"] == f"net:[{report['netns']}]" and named["netns"] == pod.path
    assert (named["root"], named["settings"]) == ("/", "/proc/sys/net/ipv6/conf")
    assert named["route"].startswith("socket:")
    assert set(report["fds"]) - {"0", "1", "2"} <= set(given.values()) | {spare(report["fds"])}, (
        "one too many"
    )


def spare(fds: dict[str, str]) -> str:
    """The number that the report's own listing of descriptors used."""
    return max(fds, key=int)


def test_the_cold_plugins_socket_is_the_containers(node: Node, pod: Namespace, tmp_path: Path) -> None:
    script = tmp_path / "flannel-lib" / "flannel"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable} -IS\nimport fcntl, os\n"
        "given = dict(word.split('=') for word in os.environ['FLANNEL_CNI_FDS'].split())\n"
        f"print(os.fstat(fcntl.ioctl(int(given['route']), {SIOCGSKNS}, 0)).st_ino)\n"
    )
    script.chmod(0o755)
    copy = tmp_path / "flannel"
    copy.write_bytes(node.shim.read_bytes())
    copy.chmod(0o755)
    outcome = call([copy], node.environment(CNI_NETNS=pod.path))
    assert outcome == Outcome(0, f"{inode(pod.path)}\n".encode(), b"")


def test_a_missing_netns_is_told_to_the_cold_plugin(node: Node, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, error in {"missing": 2, "file": -1}.items():
        given = node.call("DEL", CNI_NETNS=str(tmp_path / path)).report["environment"]["FLANNEL_CNI_FDS"]
        assert [word.split("=")[0] for word in given.split()] == ["own", "root", "error"]
        assert given.endswith(f"error={error}")


def test_every_socket_that_cannot_be_had_leads_to_the_cold_path(node: Node) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(node.socket))
    stale.close()
    for path in ("", "/nonexistent/cni.sock", "/" + "x" * 300, str(node.socket), "/etc/passwd"):
        report = node.call(FLANNEL_CNI_SOCKET=path).report
        assert report["stdin"] == "{}" and not report["stdin_kind"].startswith("/memfd:"), "read for nothing"


def test_a_listener_that_is_not_root_gets_nothing(node: Node, pod: Namespace, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    script = (
        "import os, socket, struct, sys\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen(4)\n"
        "print('listening', flush=True)\n"
        "connection, _ = listener.accept()\n"
        f"try:\n    connection.sendall({HELLO!r})\n"
        "except BrokenPipeError:\n    pass\n"
        "try:\n    got = connection.recvmsg(100000, 256)[:2]\n"
        "except ConnectionResetError:\n    got = b'', []\n"
        "print(got, flush=True)\n"
    )
    listener = subprocess.Popen(
        [sys.executable, "-IS", "-c", script, str(node.socket)], stdout=subprocess.PIPE, text=True
    )
    assert listener.stdout is not None
    with listener.stdout as said:
        assert said.readline() == "listening\n"
        assert node.call(CNI_NETNS=pod.path).report["stdin"] == "{}"
        assert said.readline() == "(b'', [])\n"
    assert listener.wait(10) == 0


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        HELLO[:7],
        b"XCNI" + HELLO[4:],
        struct.pack("=4sHH", b"FCNI", 0, 0),
        struct.pack("=4sHH", b"FCNI", 1, 0),
        struct.pack("=4sHH", b"FCNI", 2, 0),
        struct.pack("=4sHH", b"FCNI", 4, 0),
        struct.pack("=4sHH", b"FCNI", 512, 0),
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_a_daemon_that_does_not_greet_as_agreed_is_left(node: Node, greeting: bytes, early: bool) -> None:
    """Early is how version 1 did it."""

    def serve(connection: socket.socket) -> None:
        if early:
            connection.sendall(greeting)
        rig.receive(connection).close()
        if not early:
            connection.sendall(greeting)
        connection.shutdown(socket.SHUT_WR)
        assert rig.gone(connection)

    with node.serve(serve):
        outcome = node.call()
    assert outcome.report["stdin"] == "{}" and not outcome.undo


def test_a_daemon_that_hangs_before_it_greets_is_left(node: Node) -> None:
    """... and so is one that greets byte by byte: the wait is for the whole."""

    def hang(connection: socket.socket) -> None:
        rig.receive(connection).close()
        assert rig.gone(connection)

    def drip(connection: socket.socket) -> None:
        rig.receive(connection).close()
        for byte in HELLO[:3]:
            connection.sendall(bytes([byte]))
            time.sleep(0.08)
        assert rig.gone(connection)

    for behaviour in (hang, drip):
        with node.serve(behaviour):
            started = time.monotonic()
            outcome = node.call(FLANNEL_CNI_TIMEOUT_MS="300")
            spent = time.monotonic() - started
        assert not outcome.undo and 0.3 <= spent < 2


def test_who_is_left_can_no_longer_say_hello(node: Node) -> None:
    said = threading.Event()

    def serve(connection: socket.socket) -> None:
        rig.receive(connection).close()
        assert rig.gone(connection)
        with pytest.raises(BrokenPipeError):
            connection.sendall(HELLO)
        said.set()

    with node.serve(serve):
        assert not node.call(FLANNEL_CNI_TIMEOUT_MS="200").undo
    assert said.is_set()


def test_a_hello_in_the_last_moment_counts(node: Node) -> None:
    """The daemon has begun then: the shim neither waits for it any longer nor does it itself."""

    def serve(connection: socket.socket) -> None:
        rig.receive(connection).close()
        time.sleep(0.5)  # the shim, which strace holds up, has given up waiting by now
        connection.sendall(HELLO)

    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=shutdown:delay_enter=1000000"]
    with node.serve(serve):
        outcome = call([*strace, node.shim], node.environment(FLANNEL_CNI_TIMEOUT_MS="200"))
    assert outcome.error == f"flanneld at {node.socket} said hello too late"


def test_a_full_backlog_is_waited_for_and_left(node: Node) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(node.socket))
        listener.listen(0)
        queued = [socket.socket(socket.AF_UNIX)]
        queued[0].connect(str(node.socket))
        started = time.monotonic()
        assert not node.call().undo
        assert 2 <= time.monotonic() - started < 4.5
        started = time.monotonic()
        assert not node.call(FLANNEL_CNI_TIMEOUT_MS="200").undo
        assert 0.2 <= time.monotonic() - started < 1.8

        def take() -> None:
            for _ in range(2):
                connection, _address = listener.accept()
                with connection:
                    serve_late(connection)

        queued[0].close()
        thread = threading.Timer(0.4, take)
        thread.start()
        assert node.call() == Outcome(0, b"late", b"")
        thread.join(10)


def serve_late(connection: socket.socket) -> None:
    try:
        answering(rig.reply(b"late"))(connection)
    except (BrokenPipeError, ConnectionResetError, Incomplete):
        return  # the connection that only filled the queue


def broken(after: Callable[[socket.socket], object]) -> Callable[[socket.socket], None]:
    """A daemon that takes the whole request, and then does `after`."""

    def serve(connection: socket.socket) -> None:
        rig.receive(connection).close()
        connection.sendall(HELLO)
        after(connection)

    return serve


BREAKS: dict[str, Callable[[socket.socket], object]] = {
    "nothing": lambda _: None,
    "part of the header": lambda connection: connection.sendall(rig.reply(b"x")[:19]),
    "no text": lambda connection: connection.sendall(rig.reply(b"x")[:20]),
    "part of stdout": lambda connection: connection.sendall(rig.reply(RESULT, b"err", out=4000)),
    "part of stderr": lambda connection: connection.sendall(rig.reply(RESULT, b"err", err=4)),
    "part of a long text": lambda connection: connection.sendall(rig.reply(b"x" * 100_000, out=100_001)),
    "another magic": lambda connection: connection.sendall(b"X" + rig.reply(RESULT)[1:]),
    "another kind": lambda connection: connection.sendall(rig.reply(RESULT, kind=2)),
    "no exit status": lambda connection: connection.sendall(rig.reply(RESULT, code=256)),
    "too long a stdout": lambda connection: connection.sendall(rig.reply(RESULT, out=(64 << 20) + 1)),
    "too long a stderr": lambda connection: connection.sendall(rig.reply(RESULT, err=0xFFFFFFFF)),
}


@pytest.mark.parametrize("how", BREAKS)
def test_an_add_that_was_broken_off_is_undone_first(node: Node, how: str) -> None:
    with node.serve(broken(BREAKS[how])):
        outcome = node.call("ADD", stdin=b'{"x": 1}', CNI_NETNS="/proc/self/ns/net")
    assert outcome.undo and outcome.report["stdin"] == '{"x": 1}'
    assert outcome.report["stdin_kind"].startswith("/memfd:")


@pytest.mark.parametrize("command", COMMANDS_SAFE_TO_REPEAT)
def test_what_may_be_repeated_is(node: Node, command: str) -> None:
    with node.serve(broken(BREAKS["part of stdout"])):
        assert not node.call(command, FLANNEL_CNI_UNDO="1").undo


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_what_was_declined_needs_no_undoing(node: Node, command: str) -> None:
    with node.serve(answering(DECLINED)):
        outcome = node.call(command, stdin=b"[]")
    assert not outcome.undo and outcome.report["stdin"] == "[]"


def test_a_request_that_was_not_taken_as_a_whole_needs_no_undoing(node: Node) -> None:
    def half(connection: socket.socket) -> None:
        connection.sendall(HELLO)
        connection.recv(1000)

    with node.serve(half):
        outcome = node.call(stdin=bytes(1 << 20))
    assert not outcome.undo and outcome.report["stdin"] == "\0" * (1 << 20)


def test_a_request_that_is_taken_too_slowly_needs_no_undoing(node: Node) -> None:
    """The deadline is that of the whole request, whatever is read in between."""
    done = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.sendall(HELLO)
        while not done.wait(0.05):
            connection.recv(20_000)

    with node.serve(serve):
        started = time.monotonic()
        outcome = node.call(stdin=bytes(3 << 20), FLANNEL_CNI_TIMEOUT_MS="400")
        spent = time.monotonic() - started
        done.set()
    assert not outcome.undo and 0.4 <= spent < 3


def test_the_deadline_is_that_of_the_whole_answer(node: Node) -> None:
    answer = rig.reply(RESULT * 10, b"err")
    gone = threading.Event()

    def drip(connection: socket.socket) -> None:
        for byte in answer:
            if gone.wait(0.02):
                return
            connection.sendall(bytes([byte]))

    def wait(connection: socket.socket) -> None:
        assert gone.wait(20) and rig.gone(connection)

    for after in (wait, drip):
        gone.clear()
        with node.serve(broken(after)):
            started = time.monotonic()
            outcome = node.call(FLANNEL_CNI_TIMEOUT_MS="300")
            spent = time.monotonic() - started
            gone.set()
        assert outcome.error == f"flanneld at {node.socket} did not answer within 300 ms"
        assert 0.3 <= spent < 2


def test_a_terminal_as_stdin_is_not_for_the_daemon(node: Node) -> None:
    master, slave = pty.openpty()
    with node.serve(lambda _: pytest.fail("it was asked")) as daemon:
        done = subprocess.run(
            [node.shim], env=node.environment(), stdin=slave, stdout=subprocess.PIPE, check=False, timeout=10
        )
    os.close(slave)
    os.close(master)
    assert Outcome(done.returncode, done.stdout, b"").report["stdin_kind"].startswith("/dev/pts")
    assert daemon.served == 0


def test_a_stdin_that_cannot_be_read_is_the_cold_plugins_affair(node: Node, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    with node.serve(hello_and_nothing):
        done = subprocess.run(
            [node.shim], env=node.environment(), stdin=folder, capture_output=True, check=False
        )
    os.close(folder)
    assert b"Is a directory" in done.stderr or b"is a directory" in done.stderr


def test_a_stdin_that_would_block_is_waited_for(node: Node) -> None:
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)

    def write() -> None:
        os.write(theirs, b"{ }")
        os.close(theirs)

    threading.Timer(0.2, write).start()
    seen: list[Request] = []
    with node.serve(answering(rig.reply(), seen)):
        done = subprocess.run([node.shim], env=node.environment(), stdin=ours, check=False, timeout=10)
    os.close(ours)
    seen[0].close()
    assert done.returncode == 0 and seen[0].stdin == b"{ }"


def test_without_a_cold_plugin_there_is_error_11(node: Node, tmp_path: Path) -> None:
    folder = tmp_path / 'a"b\\c\x01é'
    folder.mkdir()
    alone = folder / "flannel"
    alone.write_bytes(node.shim.read_bytes())
    alone.chmod(0o755)
    path = '/x"\\\n\x7f\x02é'
    message = call([alone], node.environment(FLANNEL_CNI_SOCKET=path)).error
    shown = str(folder).replace("é", "��")
    assert message == (
        f"cannot start {shown}/flannel-lib/flannel: No such file or directory; "
        f'flanneld at /x"\\\n\x7f\x02�� did not serve the call: No such file or directory'
    )
    with node.serve(answering(DECLINED)):
        message = call([alone], node.environment()).error
    assert message.endswith(f"; flanneld at {node.socket} did not serve the call: it declined")


def test_it_hands_nothing_else_to_the_daemon(node: Node, pod: Namespace) -> None:
    """One message has all descriptors, and they come with its first byte."""
    seen: list[tuple[int, int]] = []

    def serve(connection: socket.socket) -> None:
        connection.sendall(HELLO)
        while True:
            data, ancillary, _flags, _address = connection.recvmsg(1000, SCM_BYTES)
            fds = array.array("i")
            for _level, _kind, content in ancillary:
                fds.frombytes(content)
            for descriptor in fds:
                os.close(descriptor)
            seen.append((len(data), len(fds)))
            if len(data) < 1000:
                connection.sendall(rig.reply())
                return

    with node.serve(serve):
        assert node.call(stdin=bytes(100_010), CNI_NETNS=pod.path).code == 0
    assert seen[0] == (1000, 5) and not any(count for _size, count in seen[1:])


# --- memory, and what nobody thought of ------------------------------------------------------------------


@pytest.fixture(scope="module")
def debug_node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    folder = tmp_path_factory.mktemp("valgrind")
    rig.install_report(folder)
    return Node(folder, rig.build(folder, *rig.WARNINGS, "-g", "-O1"))


@pytest.mark.parametrize(
    "path",
    ["answer", "long answer", "declined", "no daemon", "old daemon", "late", "alone", "long stdin", *BREAKS],
)
def test_valgrind_finds_nothing(debug_node: Node, pod: Namespace, tmp_path: Path, path: str) -> None:
    behaviours: dict[str, Callable[[socket.socket], object]] = {
        "answer": answering(rig.reply(RESULT, b"err")),
        "long answer": answering(rig.reply(b"x" * 200_000, b"err")),
        "declined": answering(DECLINED),
        "old daemon": lambda connection: connection.sendall(struct.pack("=4sHH", b"FCNI", 1, 0)),
        "late": broken(rig.gone),
        "long stdin": hello_and_nothing,
        **{name: broken(after) for name, after in BREAKS.items()},
    }
    log = tmp_path / "valgrind.log"
    shim = debug_node.shim
    if path == "alone":
        shim = tmp_path / "flannel"
        shim.write_bytes(debug_node.shim.read_bytes())
        shim.chmod(0o755)
    command: list[str | Path] = [
        "/usr/bin/valgrind",
        "-q",
        "--leak-check=full",
        "--show-leak-kinds=definite",
        f"--log-file={log}",
        shim,
    ]
    stdin = bytes((4 << 20) + 5) if path == "long stdin" else b"{}"
    environment = debug_node.environment(CNI_NETNS=pod.path)
    if path == "late":
        environment["FLANNEL_CNI_TIMEOUT_MS"] = "1500"
    behaviour = behaviours.get(path)
    if behaviour is None:
        debug_node.socket.unlink(missing_ok=True)
        outcome = call(command, environment, stdin)
    else:
        with debug_node.serve(behaviour):
            outcome = call(command, environment, stdin)
    if path in ("answer", "long answer"):
        assert outcome.code == 0 and outcome.stderr == b"err"
    elif path in ("late", "alone"):
        assert outcome.error
    else:
        assert outcome.undo is (path in BREAKS)
    assert log.read_text() == ""


@pytest.mark.parametrize("sanitized", [False, True])
def test_whatever_it_gets_it_gives_one_answer(tmp_path: Path, sanitized: bool) -> None:
    found = fuzz.run(500 if sanitized else 2500, 5, tmp_path, sanitized)
    assert found.keys() == {"answer", "cold", "undo", "error"}
