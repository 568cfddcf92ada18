"""One daemon for each subnet file, and one for each device of a network namespace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from cni.errors import ConfigError
from flanneld.locks import lock_devices, lock_subnet_file
from tests.netns.firewall_fixtures import Namespace, namespace

# What another process does: take the lock, say so (or why not), hold it until standard input ends.
HOLD_FILE = "from flanneld.locks import lock_subnet_file; held = lock_subnet_file(Path(sys.argv[1]))"
HOLD_DEVICES = "from flanneld.locks import lock_devices; held = lock_devices(sys.argv[1:])"
PROGRAM = """
import os, socket, sys
from pathlib import Path
try:
    {take}
except Exception as exc:
    print(exc, flush=True)
    sys.exit(1)
print("held", flush=True)
sys.stdin.read()
"""
LISTEN = "held = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); held.bind('\\0' + sys.argv[1])"


class Holder:
    """A process that holds a lock, or says why it could not take it."""

    def __init__(self, take: str, arguments: Sequence[str], user: int | None = None) -> None:
        # A checkout below /root, with the virtual environment in it, is out of another user's reach.
        python = sys.executable if user is None else "/usr/bin/python3"
        self.process = subprocess.Popen(
            [python, "-c", PROGRAM.format(take=take), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=user,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().strip()

    @property
    def pid(self) -> int:
        return self.process.pid

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        with self.process:
            self.process.wait(10)


Start = Callable[..., Holder]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a holder; whatever still runs after the test is killed."""
    with ExitStack() as stack:

        def make(take: str, *arguments: str, user: int | None = None) -> Holder:
            holder = Holder(take, arguments, user)
            stack.callback(holder.end)
            return holder

        yield make


@pytest.fixture
def ns() -> Iterator[Namespace]:
    with namespace() as made:
        yield made


def refusal(take: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        take()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the subnet file


def test_a_second_daemon_on_a_subnet_file_is_refused_and_told_the_first(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "run" / "flannel" / "subnet.env"
    first = start(HOLD_FILE, str(path))
    assert first.said == "held"
    text = refusal(lambda: lock_subnet_file(path))
    for word in (f"PID {first.pid})", str(path), "--subnet-file"):
        assert word in text
    # A refused attempt harms neither the lock nor what it says.
    assert refusal(lambda: lock_subnet_file(path)) == text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_subnet_file_is_free_when_its_daemon_is_dead(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "subnet.env"
    first = start(HOLD_FILE, str(path))
    first.end(number)
    second = start(HOLD_FILE, str(path))
    assert second.said == "held"
    # The PID is the second one's alone, though the file was there before.
    assert f"(PID {second.pid})" in refusal(lambda: lock_subnet_file(path))


def test_other_subnet_files_are_other_daemons(start: Start, tmp_path: Path) -> None:
    assert start(HOLD_FILE, str(tmp_path / "a.env")).said == "held"
    assert start(HOLD_FILE, str(tmp_path / "b.env")).said == "held"


def test_the_lock_leaves_the_subnet_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text("FLANNEL_MTU=1450\n")
    descriptor = lock_subnet_file(path)
    assert path.read_text() == "FLANNEL_MTU=1450\n"
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".subnet.env.lock").symlink_to(victim)
    assert str(tmp_path / ".subnet.env.lock") in refusal(lambda: lock_subnet_file(tmp_path / "subnet.env"))
    assert victim.read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(lambda: lock_subnet_file(tmp_path / "file" / "subnet.env"))
    assert "--subnet-file" in text


# ---- devices


def claim(ns: Namespace, *devices: str) -> list[socket.socket]:
    return ns.call(lambda: lock_devices(devices))


def test_a_second_daemon_on_a_device_is_refused_and_told_the_first(start: Start, ns: Namespace) -> None:
    first = ns.call(lambda: start(HOLD_DEVICES, "flannel.1"))
    assert first.said == "held"
    text = refusal(lambda: claim(ns, "flannel.1"))
    for word in (f"(PID {first.pid})", "flannel.1", "network namespace", "Backend.VNI"):
        assert word in text


def test_the_first_is_told_however_often_one_asks(start: Start, ns: Namespace) -> None:
    """A service manager restarts a refused daemon again and again."""
    first = ns.call(lambda: start(HOLD_DEVICES, "flannel.1"))
    for _ in range(20):
        assert f"(PID {first.pid})" in refusal(lambda: claim(ns, "flannel.1"))


def test_a_device_is_free_when_its_daemon_is_dead(start: Start, ns: Namespace) -> None:
    first = ns.call(lambda: start(HOLD_DEVICES, "flannel.1", "flannel-v6.1"))
    first.end(signal.SIGKILL)
    claims = claim(ns, "flannel.1", "flannel-v6.1")
    assert len(claims) == 2
    for held in claims:
        held.close()


def test_a_refusal_leaves_the_other_devices_free(start: Start, ns: Namespace) -> None:
    ns.call(lambda: start(HOLD_DEVICES, "flannel-v6.1"))
    assert "flannel-v6.1" in refusal(lambda: claim(ns, "flannel.1", "flannel-v6.1"))
    [held] = claim(ns, "flannel.1")
    held.close()


def test_namespaces_and_devices_are_side_by_side(start: Start, ns: Namespace) -> None:
    with namespace() as other:
        assert ns.call(lambda: start(HOLD_DEVICES, "flannel.1")).said == "held"
        assert ns.call(lambda: start(HOLD_DEVICES, "flannel.7")).said == "held"
        assert other.call(lambda: start(HOLD_DEVICES, "flannel.1")).said == "held"
        assert "flannel.1" in refusal(lambda: claim(other, "flannel.1"))


NOBODY = 65534


@pytest.mark.parametrize("listens", ["", "; held.listen()"], ids=["silent", "listening"])
def test_a_user_who_is_not_root_cannot_keep_the_daemon_from_starting(
    start: Start, ns: Namespace, listens: str, caplog: pytest.LogCaptureFixture
) -> None:
    squatter = ns.call(lambda: start(LISTEN + listens, "flanneld/flannel.1", user=NOBODY))
    assert squatter.said == "held"
    assert claim(ns, "flannel.1") == []
    [record] = caplog.records
    assert (record.levelname, "flannel.1" in record.getMessage()) == ("WARNING", True)


def test_a_name_that_becomes_free_meanwhile_is_claimed(ns: Namespace) -> None:
    """The holder of a name that does not listen may be ending, or not have begun yet."""
    ending = ns.call(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    ending.bind("\0flanneld/flannel.1")
    timer = threading.Timer(0.1, ending.close)
    timer.start()
    [held] = claim(ns, "flannel.1")
    timer.join()
    held.close()
