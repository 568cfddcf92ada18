"""The daemon's end of the warm path: real sockets and namespaces, a client that plays the shim."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from cni.errors import ConfigError
from flanneld import cniserver, cnisocket
from tests.lab.cluster import Cluster
from tests.lab.net import wait_for as lab_wait_for
from tests.lab.node import SOURCE
from tests.netns.cni_fixtures import Namespace, wait_for
from tests.netns.cniserver_fixtures import (
    HEADER,
    HOST_ROOT,
    MAGIC,
    NETNS,
    OF_CONTAINER,
    OWN,
    REQUEST_S,
    SETTINGS,
    VERSION,
    Connection,
    Container,
    Reply,
    Server,
    Shim,
    find,
    packed,
)

CAPABILITIES = 1 << 12 | 1 << 13


@contextmanager
def namespaces(*purposes: str) -> Iterator[list[Namespace]]:
    made: list[Namespace] = []
    try:
        for purpose in purposes:
            made.append(Namespace(purpose))
        yield made
    finally:
        for each in made:
            each.remove()


@pytest.fixture
def node() -> Iterator[Namespace]:
    with namespaces("node") as [made]:
        yield made


@pytest.fixture
def container() -> Iterator[Container]:
    with namespaces("pod") as [made], closing(Container(made)) as opened:
        yield opened


@pytest.fixture
def server(node: Namespace, tmp_path: Path) -> Iterator[Server]:
    with Server(node, tmp_path / "run" / "cni.sock") as started:
        yield started


@pytest.fixture(autouse=True)
def _run_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()


@pytest.fixture
def shim(node: Namespace, server: Server) -> Iterator[Shim]:
    with closing(Shim(node, server.path)) as made:
        yield made


# ---- one call


def test_a_call_reaches_the_plugin_and_its_answer_comes_back(
    shim: Shim, container: Container, server: Server
) -> None:
    reply = shim.call("echo", container, filling=1 << 20)
    assert reply.said["CNI_NETNS"] == container.path
    assert (reply.said["CNI_CONTAINERID"], reply.said["CNI_IFNAME"]) == ("c1", "eth0")
    assert reply.said["stdin"] > 1 << 20
    assert reply.stderr == b""
    wait_for(lambda: "CNI ADD flannel of c1 eth0: ok after " in server.said())


def test_errors_are_answers(shim: Shim, server: Server) -> None:
    error = shim.call("echo", command="DO").error
    assert error == {"code": 4, "msg": "unknown CNI_COMMAND: DO"}
    crash = shim.call("crash", command="DEL")
    assert crash.error["code"] == 999
    assert b"ValueError: a bug" in crash.stderr
    assert shim.call("echo", command="DEL").exit_status == 0
    wait_for(lambda: "CNI DO flannel of c1 eth0 failed with code 4" in server.said())


def test_what_is_not_for_the_daemon_is_declined(shim: Shim, container: Container, server: Server) -> None:
    assert shim.call("decline", container).declined
    assert shim.call("execute", container).declined
    assert shim.call("echo", container, name="macvlan").declined
    for why in ("not today", "plugin bridge would have to be executed", "there is no such plugin"):
        assert f"is left to the plugin: {why}" in server.said()


def test_a_runtime_of_another_network_namespace_is_declined(server: Server, container: Container) -> None:
    with namespaces("other") as [other], closing(Shim(other, server.path)) as stranger:
        assert stranger.call("echo", container).declined
    assert "the runtime lives in another network namespace" in server.said()


def test_the_containers_namespace(shim: Shim, container: Container) -> None:
    found = os.stat(container.path)
    assert shim.call("netns", container).said == [found.st_dev, found.st_ino]
    missing = 'failed to open netns "{0}": failed to Statfs "{0}": no such file or directory'
    assert shim.call("netns").said == [
        "NetnsMissing",
        missing.format("/gone"),
    ]
    assert shim.call("netns", container, path="/elsewhere").said == [found.st_dev, found.st_ino]
    kind, text = shim.call("netns", path="/etc/passwd", netns_error=-1).said
    assert (kind, 'unknown FS magic on "/etc/passwd"' in text) == ("NetnsInvalid", True)
    kind, text = shim.call("netns", path="/secret", netns_error=13).said
    assert (kind, "permission denied" in text) == ("NetnsInvalid", True)


def test_the_daemons_own_namespace_as_a_containers_is_refused(
    shim: Shim, node: Namespace, server: Server
) -> None:
    with closing(Container(node)) as own:
        assert shim.call("echo", own).error["code"] == 8


def test_settings_of_container_and_host(
    shim: Shim, node: Namespace, container: Container, server: Server
) -> None:
    node.run("sysctl -qw net.ipv6.conf.lo.hop_limit=63 net.ipv4.ip_default_ttl=99")
    assert shim.call("sysctls", container).said == ["128", "33", "63", "99"]


def test_a_step_after_the_answer_may_add_another(shim: Shim, server: Server) -> None:
    assert shim.call("note_later").said == "done"
    wait_for(lambda: "noted at last" in server.said())


def test_ipv6_is_switched_on_in_a_container(node: Namespace, tmp_path: Path) -> None:
    """By the real bridge plugin, which finds out in the middle of an ADD."""
    path = tmp_path / "run" / "cni.sock"
    ranges = [[{"subnet": "10.99.1.0/24"}], [{"subnet": "fd00:99::/64"}]]
    routes = [{"dst": "fd00::/16"}]
    ipam = {"type": "host-local", "dataDir": str(tmp_path), "ranges": ranges, "routes": routes}
    with (
        Server(node, path, str(path), "real"),
        closing(Shim(node, path)) as shim,
        namespaces("pod") as [pod],
    ):
        for name in ("lo", "all", "default"):
            pod.run(f"sysctl -qw net.ipv6.conf.{name}.disable_ipv6=1")
        with closing(Container(pod)) as container:
            reply = shim.call("", container, name="bridge", isGateway=True, ipam=ipam)
        assert (reply.exit_status, len(json.loads(reply.stdout)["ips"])) == (0, 2)
        assert "fd00:99::2/64" in pod.run("ip -6 address show dev eth0")
        assert "fd00::/16 via fd00:99::1" in pod.run("ip -6 route show dev eth0")
        assert pod.run("sysctl -n net.ipv6.conf.lo.disable_ipv6") == "0\n"


def test_what_can_wait_is_done_after_the_answer(
    shim: Shim, container: Container, server: Server, tmp_path: Path
) -> None:
    """Written, synced, closed, counted, logged."""
    (tmp_path / "text").write_text("text")
    assert shim.call("netns", container).exit_status == 0
    before = server.descriptors()
    trace = tmp_path / "trace"
    calls = "sendto,fsync,write,close"
    argv = ["strace", "-f", "-y", "-s", "300", f"--trace={calls}", "-o", str(trace), "-p", str(server.pid)]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as tracer:
        wait_for(lambda: "TracerPid:\t0" not in Path(f"/proc/{server.pid}/status").read_text())
        wait_for(lambda: all_traced(server.pid))
        made = shim.call("files", make=str(tmp_path / "made"), read=str(tmp_path / "text"))
        assert made.said[1] == "text"
        wait_for(lambda: "fsync" in trace.read_text())
        wait_for(lambda: server.descriptors() <= before)
        tracer.send_signal(signal.SIGINT)
    lines = trace.read_text().splitlines()
    answered = next(n for n, line in enumerate(lines) if "sendto" in line and "said" in line)
    written = [n for n, line in enumerate(lines) if "write(" in line and "/made/new" in line]
    synced = [n for n, line in enumerate(lines) if "fsync(" in line and "/made/new" in line]
    closed = [n for n, line in enumerate(lines) if "close(" in line and "/run/netns/" in line]
    logged = [n for n, line in enumerate(lines) if "write(2<" in line and "CNI ADD" in line]
    assert len(written) == len(synced) == len(closed) == len(logged) == 1, lines
    assert written[0] < answered < min(synced + closed + logged)


def all_in_state(pid: int, state: str) -> bool:
    threads = Path(f"/proc/{pid}/task").glob("*/status")
    return all(f"State:\t{state}" in status.read_text() for status in threads)


def all_traced(pid: int) -> bool:
    threads = list(Path(f"/proc/{pid}/task").glob("*/status"))
    return all("TracerPid:\t0" not in one.read_text() for one in threads)


# ---- files


def test_files_are_those_below_the_runtimes_root(node: Namespace, server: Server, tmp_path: Path) -> None:
    root, link = tmp_path / "root", f"{node.name}-link"
    (root / "real").mkdir(parents=True)
    (root / "etc").mkdir()
    (root / link).symlink_to("/real")  # absolute: of the runtime's root, not ours
    (root / "etc" / "env").symlink_to("../../../../real/text")  # ".." stops at that root
    (root / "real" / "text").write_text("inside")
    before = os.umask(0o022)
    with closing(Shim(node, server.path, str(root))) as shim:
        reply = shim.call("files", make=f"/{link}/a/b", read="/etc/env")
    os.umask(before)
    assert reply.said == [f"/{link}/a/b", "insi"]
    made = root / "real" / "a" / "b"
    assert (made / "new").read_text() == "written"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (made, made.parent)] == [0o750, 0o750]
    assert not Path(f"/{link}").exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/file/a", "Not a directory"),
        ("/nowhere/a", "No such file or directory"),
        ("/a\0b", "Invalid argument"),
        ("", "No such file or directory"),
        ("/" + 1200 * "d/" + 2000 * "e", "File name too long"),
        ("/proc/self/cwd/x", "Too many levels of symbolic links"),
    ],
)
def test_directories_that_cannot_be_made(shim: Shim, tmp_path: Path, path: str, reason: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_text("")
    (root / "nowhere").symlink_to("/absent/too/deep")
    place = path if path.startswith("/proc") or not path else f"{root}{path}"
    if path == "/nowhere/a":
        place = f"{root}/nowhere/a"
    reply = shim.call("files", make=place, read="/x")
    assert reason in reply.error["msg"]
    assert sorted(one.name for one in root.iterdir() if one.name != "d") == ["file", "nowhere"]


def test_a_pipe_does_not_hold_a_call_up(shim: Shim, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert shim.call("files", make=str(tmp_path / "m"), read=str(tmp_path / "fifo")).said[1] == ""


# ---- links


def test_a_deleted_link_is_gone_at_once_and_the_kernel_tidies_up_later(
    shim: Shim, container: Container
) -> None:
    *seen, absent = shim.call("unlink", container, times=30).said
    assert [code for code, _, _ in seen] == [0] * 30
    assert not any(any(left) for _, left, _ in seen)
    assert absent[0] == 19  # ENODEV
    # The acknowledgement takes 16 to 20 ms.
    assert statistics.median(took_ms for _, _, took_ms in seen) < 8


def test_a_link_can_be_deleted_from_the_hosts_side(shim: Shim, container: Container) -> None:
    assert shim.call("unlink_of_the_host", container).said == [0, False]


def test_what_is_said_about_the_other_end_fills_no_socket_of_the_host(
    node: Namespace, container: Container, tmp_path: Path
) -> None:
    """With ports left to the kernel, the host's socket has the container's, and 200 notices fill it."""
    with Server(node, tmp_path / "run" / "cni.sock") as server, closing(Shim(node, server.path)) as shim:
        for _ in range(8):
            with closing(Container(_namespace_of(container))) as again:
                assert shim.call("unlink", again, times=100).said[-1][0] == 19
        names, *rows = (line.split() for line in node.run("cat /proc/net/netlink").splitlines())
        sockets = [dict(zip(names, row, strict=True)) for row in rows]
        assert any(one["Eth"] == "0" and int(one["Pid"]) >= 0xC0000000 for one in sockets)
        assert [one for one in sockets if one["Rmem"] != "0" or one["Drops"] != "0"] == []


def _namespace_of(container: Container) -> Namespace:
    found = Namespace.__new__(Namespace)
    found.name, found.path = Path(container.path).name, container.path
    return found


# ---- many calls


def test_calls_of_one_container_take_turns_and_others_do_not_wait(
    shim: Shim, tmp_path: Path, server: Server
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with ExitStack() as stack:
        a = stack.enter_context(shim.begun("hold", place=str(first)))
        wait_for(tmp_path.joinpath("first.begun").exists)
        b = stack.enter_context(shim.begun("hold", place=str(second)))
        assert shim.call("echo", container_id="c2").exit_status == 0
        assert shim.call("echo", command="STATUS", container_id="").exit_status == 1
        assert not tmp_path.joinpath("second.begun").exists()
        first.touch()
        assert answer(a).said == "let go"
        wait_for(tmp_path.joinpath("second.begun").exists)
        second.touch()
        assert answer(b).said == "let go"


def answer(connection: Connection, to_the_end: bool = True) -> Reply:
    reply = connection.reply(to_the_end)
    assert reply is not None
    return reply


def test_who_has_given_up_waiting_for_a_turn_is_not_served(
    shim: Shim, tmp_path: Path, server: Server
) -> None:
    first, never = tmp_path / "first", tmp_path / "never"
    with ExitStack() as stack:
        a = stack.enter_context(shim.begun("hold", place=str(first)))
        wait_for(tmp_path.joinpath("first.begun").exists)
        began = time.monotonic()
        assert shim.call("hold", place=str(never), patience_ms=50).declined
        # The shim itself has given up by then, and says so: it must not do it beside the first.
        assert time.monotonic() - began > 1
        with shim.begun("hold", place=str(never)) as connection:
            assert connection.hello()  # killed by the runtime while it waits
        first.touch()
        assert answer(a).said == "let go"
    wait_for(lambda: server.said().count("the runtime has given up waiting") == 2)
    assert not tmp_path.joinpath("never.begun").exists()


def test_a_runtime_that_does_not_wait_for_the_answer(shim: Shim, tmp_path: Path, server: Server) -> None:
    place = tmp_path / "place"
    with shim.begun("hold", place=str(place)):
        wait_for(tmp_path.joinpath("place.begun").exists)
    place.touch()
    wait_for(lambda: "the runtime did not wait for the answer (ok)" in server.said())
    assert shim.call("echo").exit_status == 0


def test_two_hundred_calls_at_once(shim: Shim, server: Server) -> None:
    start = threading.Barrier(200)

    def one(number: int) -> str:
        start.wait()
        found: str = shim.call("echo", container_id=f"c{number}").said["CNI_CONTAINERID"]
        return found

    with ThreadPoolExecutor(200) as threads:
        found = list(threads.map(one, range(200)))
    assert found == [f"c{number}" for number in range(200)]


def test_who_has_gone_before_the_hello_is_not_served(shim: Shim, server: Server, tmp_path: Path) -> None:
    """The plugin does it by itself then; both would be too many."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        wait_for(lambda: all_in_state(server.pid, "T"))
        with shim.begun("hold", place=str(tmp_path / "place")) as connection:
            connection.socket.shutdown(socket.SHUT_RDWR)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert shim.call("echo").exit_status == 0
    assert server.end() == 0  # which waits for all that was begun
    assert not tmp_path.joinpath("place.begun").exists()


def test_clients_that_send_nothing_hold_up_nobody_else(shim: Shim, server: Server) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(Connection(server.path)) for _ in range(10)]
        for each in slow:
            each.send(MAGIC)
        began = time.monotonic()
        assert shim.call("echo").exit_status == 0
        assert time.monotonic() - began < REQUEST_S / 4
        # Neither a request that comes in drops nor one that comes late has more time than any other.
        dripping, late = slow[:2]
        with ThreadPoolExecutor(1) as thread:
            dripped = thread.submit(drip, dripping, shim.prepared("echo")[4:])
            time.sleep(REQUEST_S * 0.75)
            late.send(b"x")
            assert answer(late).declined
            assert time.monotonic() - began < REQUEST_S * 1.4
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                dripped.result()
        assert time.monotonic() - began < REQUEST_S * 2
        assert [each.reply() for each in slow[2:]] == [Reply(1, 0, b"", b"")] * 8


def drip(connection: Connection, data: bytes) -> None:
    for byte in data:
        connection.send(bytes([byte]))
        time.sleep(0.3)


def test_nothing_piles_up(shim: Shim, container: Container, server: Server) -> None:
    def burst(calls: int) -> None:
        with ThreadPoolExecutor(8) as threads:
            for each in threads.map(
                lambda n: shim.call("netns", container, container_id=f"{calls}-{n}", filling=n % 7 << 12),
                range(calls),
            ):
                assert each.exit_status == 0

    burst(1000)
    wait_for(lambda: server.descriptors() < 100)
    descriptors, resident = server.descriptors(), server.resident_bytes()
    burst(4000)
    wait_for(lambda: server.descriptors() <= descriptors)
    assert server.resident_bytes() - resident < 2 << 20


# ---- requests that are none


def changed(**more: int) -> bytes:
    """A header in which something is wrong, with nothing behind it."""
    fields = {
        "mask": OWN | HOST_ROOT,
        "error": 0,
        "name": 0,
        "env": 0,
        "stdin": 0,
        "version": VERSION,
        **more,
    }
    order = ("mask", "error", "name", "env", "stdin")
    return HEADER.pack(MAGIC, *(fields[key] for key in order), 1000, fields["version"])


def put(descriptors: list[int], place: int, other: int) -> list[int]:
    """With another one at a place: a descriptor, or (below 2) the one at another place."""
    return [*descriptors[:place], descriptors[other] if other < 2 else other, *descriptors[place + 1 :]]


Build = Callable[[Shim, Container], tuple[bytes, list[int]]]
FULL = OWN | HOST_ROOT | OF_CONTAINER
BROKEN: dict[str, Build] = {
    "garbage": lambda s, c: (b"GET / HTTP/1.0\r\n\r\n" * 9, s.descriptors(c)),
    "half a header": lambda s, c: (changed()[:20], s.descriptors(None)),
    "a reserved field": lambda s, c: (changed(version=1), s.descriptors(None)),
    "too long": lambda s, c: (changed(stdin=(4 << 20) + 1), s.descriptors(None)),
    "lengths that overflow": lambda s, c: (changed(name=2**32 - 1, env=2**32 - 1), s.descriptors(None)),
    "less than announced": lambda s, c: (s.prepared("echo", c)[:-1], s.descriptors(c)),
    "more than announced": lambda s, c: (s.prepared("echo", c) + b"x", s.descriptors(c)),
    "no descriptors": lambda s, c: (s.prepared("echo", c), []),
    "one too few": lambda s, c: (s.prepared("echo", c), s.descriptors(c)[:-1]),
    "one too many": lambda s, c: (s.prepared("echo", c), s.descriptors(c) + s.descriptors(None)[:1]),
    "far too many": lambda s, c: (s.prepared("echo", c), s.descriptors(c) * 30),
    "another order": lambda s, c: (s.prepared("echo", c), s.descriptors(c)[::-1]),
    "no root directory": lambda s, c: (changed(mask=OWN), s.descriptors(None)[:1]),
    "unknown bit": lambda s, c: (changed(mask=FULL | 1 << 6), s.descriptors(c)),
    "a namespace and no sockets": lambda s, c: (changed(mask=OWN | HOST_ROOT | NETNS), s.descriptors(c)[:3]),
    "settings alone": lambda s, c: (changed(mask=OWN | HOST_ROOT | SETTINGS), s.descriptors(c)[:3]),
    "namespace and error": lambda s, c: (changed(mask=FULL, error=2), s.descriptors(c)),
    "an error that is none": lambda s, c: (changed(error=-2), s.descriptors(None)),
    "a variable without end": lambda s, c: (changed(env=3) + b"A=b", s.descriptors(None)),
    "a variable without a value": lambda s, c: (changed(env=4) + b"ABC\0", s.descriptors(None)),
    "a path and no namespace": lambda s, c: (s.prepared("echo", netns_error=0), s.descriptors(None)),
    "a namespace and no path": lambda s, c: (packed({}, b"", FULL), s.descriptors(c)),
    "a file as root": lambda s, c: (s.prepared("echo"), [s.descriptors(c)[0], s.descriptors(c)[3]]),
    "a directory as namespace": lambda s, c: (s.prepared("echo"), s.descriptors(c)[1:2] * 2),
    "a directory as the container": lambda s, c: (s.prepared("echo", c), put(s.descriptors(c), 2, 1)),
    "a directory as socket": lambda s, c: (s.prepared("echo", c), put(s.descriptors(c), 3, 1)),
    "a namespace as settings": lambda s, c: (s.prepared("echo", c), put(s.descriptors(c), 4, 0)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_request_is_declined(case: str, shim: Shim, container: Container, server: Server) -> None:
    data, descriptors = BROKEN[case](shim, container)
    with Connection(server.path) as connection:
        connection.send(data, descriptors)
        connection.socket.shutdown(socket.SHUT_WR)
        assert answer(connection).declined
    assert "A request for the CNI plugin is refused: " in server.said()
    assert "Traceback" not in server.said()


def test_thousands_of_broken_requests_leave_no_descriptor(
    shim: Shim, container: Container, server: Server
) -> None:
    chance = random.Random(5)
    builders = list(BROKEN.values())
    assert shim.call("netns", container).exit_status == 0
    wait_for(lambda: server.descriptors() < 40)
    before = server.descriptors()

    def one(seed: int) -> None:
        data, descriptors = builders[seed % len(builders)](shim, container)
        cut = chance.randrange(len(data) + 1) if seed % 3 else len(data)
        with Connection(server.path) as connection:
            try:
                connection.send(data[:cut] or b"F", descriptors)
                connection.send(data[cut:] or b"F", descriptors)  # more of them, where none belong
            except (BrokenPipeError, ConnectionResetError):
                return
            if seed % 5:
                with suppress(OSError):  # it may have hung up
                    connection.socket.shutdown(socket.SHUT_WR)
                connection.hello()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(one, range(4000))) == [None] * 4000
    assert shim.call("netns", container).exit_status == 0
    wait_for(lambda: server.descriptors() <= before)
    said = server.said()
    assert "Traceback" not in said
    assert said.count("A request for the CNI plugin is refused: ") == 1  # within a minute


def test_without_room_for_descriptors_a_call_is_declined_and_later_ones_are_served(
    shim: Shim, container: Container, server: Server
) -> None:
    def limit(files: int) -> None:
        argv = ["prlimit", f"--pid={server.pid}", f"--nofile={files}:4096"]
        subprocess.run(argv, check=True, timeout=30)

    limit(3)  # threads that wait in accept(2) have the numbers already
    with Connection(server.path) as connection:
        connection.send(shim.prepared("echo", container), shim.descriptors(container))
        assert answer(connection).declined
    with Connection(server.path) as waiting:
        wait_for(lambda: "Cannot accept CNI calls: " in server.said())
        limit(4096)
        waiting.send(shim.prepared("echo"), shim.descriptors(None))
        assert answer(waiting).exit_status == 0
    assert shim.call("netns", container).exit_status == 0


# ---- who may connect


def test_only_root_is_greeted(server: Server, node: Namespace) -> None:
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(10);"
        "s.connect(sys.argv[1]); print(s.recv(8))"
    )
    drop = ["setpriv", "--reuid=65534", "--clear-groups"]
    able = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [*drop, *words, "/usr/bin/python3", "-c", script, str(server.path)]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30, cwd="/")

    assert "PermissionError" in run().stderr
    assert run(*able).stdout == "b''\n"
    assert run(*able).stdout == "b''\n"
    said = server.said()
    assert said.count("of user 65534 may not call the CNI plugin here") == 1


# ---- the socket's file, start and end


def test_the_socket_is_roots_alone_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen at each moment of its making: after bind, after listen, before and after the renaming."""
    path = tmp_path / "new" / "cni.sock"
    modes: list[int] = []

    def look() -> None:
        modes.extend(stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir())

    class Watched(socket.socket):
        def bind(self, address: str) -> None:  # type: ignore[override]
            super().bind(address)
            look()

        def listen(self, backlog: int = 0, /) -> None:
            assert not path.exists()
            super().listen(backlog)
            look()

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        place = cnisocket.Place(str(path))
    finally:
        os.umask(before)
    look()
    assert modes == [0o600] * 3
    assert [one.name for one in path.parent.iterdir()] == ["cni.sock"]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    place.close()
    assert list(path.parent.iterdir()) == []


def test_places_where_no_socket_can_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    places = {
        f"File exists: {file}": f"{file}/cni.sock",
        "No such file or directory": "/proc/flannel/cni.sock",
        "too long for a socket, 107 fit": f"{tmp_path}/{'x' * 108}/s",
        "there is something that is no socket": str(file),
    }
    for reason, path in places.items():
        with pytest.raises(ConfigError, match=f"--cni-socket={path}: .*{reason}"):
            cniserver.CniServer(path, find)
    assert file.read_text() == "precious"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError):
        cniserver.CniServer(str(file), find)
    assert len(os.listdir("/proc/self/fd")) == before


def test_of_two_servers_the_first_keeps_the_path(server: Server, shim: Shim) -> None:
    inode = server.path.stat().st_ino
    with pytest.raises(ConfigError, match="another process listens there"):
        cnisocket_of(server.path)
    assert server.path.stat().st_ino == inode
    assert shim.call("echo").exit_status == 0
    # A path that was taken over is not this server's to remove.
    os.rename(server.path, server.path.with_name("old"))
    server.path.write_text("somebody else's")
    assert server.end() == 0
    assert server.path.read_text() == "somebody else's"


def cnisocket_of(path: Path) -> None:
    cniserver.CniServer(str(path), find).close()


def test_a_busy_server_with_a_full_backlog_is_alive_too(server: Server, tmp_path: Path) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with ExitStack() as stack:
            for _ in range(1100):
                probe = stack.enter_context(socket.socket(socket.AF_UNIX))
                probe.setblocking(False)
                try:
                    probe.connect(str(server.path))
                except BlockingIOError:
                    break
            else:
                pytest.fail("the backlog has no end")
            with pytest.raises(ConfigError, match="another process listens there"):
                cnisocket_of(server.path)
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_stop_finishes_what_was_begun_and_begins_nothing(
    shim: Shim, server: Server, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    with ExitStack() as stack:
        begun = stack.enter_context(shim.begun("hold", place=str(place)))
        wait_for(tmp_path.joinpath("place.begun").exists)
        queued = stack.enter_context(shim.begun("hold", place=str(tmp_path / "never")))
        silent = stack.enter_context(Connection(server.path))
        half = stack.enter_context(Connection(server.path))
        half.send(shim.prepared("echo")[:50], shim.descriptors(None))
        server.terminate()
        wait_for(lambda: not server.path.exists())
        assert silent.reply() is None
        assert answer(half).declined
        with pytest.raises(FileNotFoundError):
            Connection(server.path)
        assert server.process.poll() is None
        place.touch()
        assert answer(begun).said == "let go"
        assert answer(queued).declined
    assert server.process.wait(10) == 0
    assert not tmp_path.joinpath("never.begun").exists()
    assert "Traceback" not in server.said()


def test_who_was_not_served_at_a_stop_sees_the_end(node: Namespace, server: Server, shim: Shim) -> None:
    """All threads are busy with callers that send nothing; a stop does not wait for these."""
    with ExitStack() as stack:
        silent = [stack.enter_context(Connection(server.path)) for _ in range(16)]
        for each in silent:
            each.send(MAGIC)
        wait_for(lambda: all(each.unread() == 0 for each in silent))
        waiting = [stack.enter_context(Connection(server.path)) for _ in range(50)]
        began = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - began < REQUEST_S
        assert all(answer(each).declined for each in silent)
        assert {each._read(100) for each in waiting} == {b""}


def test_a_server_that_was_killed_is_followed_by_another(
    node: Namespace, server: Server, shim: Shim, tmp_path: Path
) -> None:
    with shim.begun("hold", place=str(tmp_path / "place")) as connection:
        wait_for(tmp_path.joinpath("place.begun").exists)
        server.process.kill()
        assert connection.reply() is None
    server.process.wait(10)
    assert server.path.exists()
    with pytest.raises(ConnectionRefusedError):
        Connection(server.path)
    with Server(node, server.path) as second:
        assert shim.call("echo").exit_status == 0
        assert second.end() == 0
    assert not server.path.exists()


def test_restarts_under_load_lose_no_call(node: Namespace, server: Server, shim: Shim) -> None:
    """Each call is answered, declined, or ends before the hello: then the plugin does it by itself."""
    ended = threading.Event()
    outcomes: list[str] = []

    def calls(number: int) -> None:
        while not ended.is_set():
            try:
                with Connection(server.path) as connection:
                    try:
                        connection.send(
                            shim.prepared("echo", container_id=f"c{number}"), shim.descriptors(None)
                        )
                    except (BrokenPipeError, ConnectionResetError):
                        outcomes.append("not sent")
                        continue
                    if not connection.hello():
                        outcomes.append("not begun")
                        continue
                    reply = connection.reply()
                    outcomes.append("lost" if reply is None else "declined" if reply.declined else "answered")
            except (FileNotFoundError, ConnectionRefusedError):
                outcomes.append("nobody there")
                ended.wait(0.01)

    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(calls, number) for number in range(8)]
        for _ in range(3):
            goal = outcomes.count("answered") + 100
            wait_for(lambda: outcomes.count("answered") >= goal)  # noqa: B023 - called at once
            assert server.end() == 0
            server = Server(node, server.path)
        ended.set()
        assert [each.result(10) for each in running] == [None] * 8
    with server:
        assert server.end() == 0
    assert set(outcomes) <= {"answered", "declined", "not begun", "not sent", "nobody there"}


# ---- the daemon


def test_a_daemon_with_two_capabilities_and_files_of_its_own(
    node: Namespace, container: Container, tmp_path: Path
) -> None:
    """As in the pod of flannel's manifest: read-only settings, a file system that is not the runtime's."""
    socket_path = tmp_path / "run" / "cni.sock"
    private, state = tmp_path / "runtime", tmp_path / "state"
    private.mkdir()
    state.mkdir()
    (private / "text").write_text("inside")
    flags = [
        f"--cni-socket={socket_path}",
        f"--subnet-file={state}/subnet.env",
        f"--state-dir={state}",
        f"--net-config-path={state}/none",
        "--iface=up0",
        "--iptables-forward-rules=false",
    ]
    node.run("ip link add up0 type veth peer name up1")
    node.run("ip addr add 192.0.2.1/24 dev up0")
    node.run("ip link set up0 up")
    confine = (
        f"mount -t tmpfs t {private} && mount --bind /proc/sys /proc/sys && "
        "mount -o remount,bind,ro /proc/sys && "
        'exec setpriv --bounding-set -all,+net_admin,+net_raw --inh-caps -all "$@"'
    )
    inside = ["unshare", "--mount", "sh", "-c", confine, "sh"]
    node.run("sysctl -qw net.ipv4.ip_forward=0")
    with (
        Server(node, socket_path, "flanneld", *flags, inside=inside) as server,
        closing(Shim(node, socket_path)) as shim,
    ):
        wait_for((state / "subnet.env").exists)
        status = Path(f"/proc/{server.pid}/status").read_text()
        assert int(status.partition("CapEff:")[2].split()[0], 16) == CAPABILITIES
        assert not Path(f"/proc/{server.pid}/root{private}/text").exists()
        made = shim.call("files", make=f"{private}/deep/er", read=f"{private}/text")
        assert made.said == [f"{private}/deep/er", "insi"]
        assert (private / "deep" / "er" / "new").read_text() == "written"
        assert shim.call("sysctls", container).said[:2] == ["128", "33"]
        assert shim.call("write_sysctl").said == "1"
        assert node.run("sysctl -n net.ipv4.ip_forward") == "1\n"
        *seen, _absent = shim.call("unlink", container, times=5).said
        assert [(code, left) for code, left, _ in seen] == [(0, [False, False])] * 5
        assert shim.call("netns", container).said[1] == os.stat(container.path).st_ino
        assert server.end() == 0, server.said()
    assert not socket_path.exists()


def test_a_daemon_whose_socket_cannot_be_made_goes_on(
    cluster_of: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = cluster_of(1, command=SOURCE)
    node = cluster.nodes[0]
    node.start(SOURCE, cluster.store, f"--cni-socket={tmp_path}/{'x' * 108}")
    node.wait_subnet()
    errors = [line for line in node.log.read_text().splitlines() if line.startswith("E")]
    assert len(errors) == 1
    assert "CNI calls are left to the plugin, where each takes longer: cannot make --cni-socket=" in errors[0]
    node.daemon.require_running()


def test_the_socket_outlives_a_start_over(cluster_of: Callable[..., Cluster]) -> None:
    cluster = cluster_of(1, command=SOURCE)
    node = cluster.nodes[0]
    node.start(SOURCE, cluster.store)
    node.wait_subnet()
    inode = node.cni_socket.stat().st_ino
    node.lab.ip(
        node.netns,
        f"addr del {node.address}/24 dev eth0",
        "addr add 192.168.77.111/24 dev eth0",
        "route replace default via 192.168.77.1",
    )
    lab_wait_for(lambda: node.log.read_text().count("flannel is ready") == 2, 15.0, "second start", node.log)
    assert node.cni_socket.stat().st_ino == inode
    with Connection(node.cni_socket) as connection:
        connection.send(bytes(32))
        assert answer(connection).declined
    node.stop()
    assert not node.cni_socket.exists()
