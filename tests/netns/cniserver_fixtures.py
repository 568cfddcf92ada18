"""The daemon's server of CNI calls as a process in a node's namespace, and a client that stands for the shim.

As a program, `python -m tests.netns.cniserver_fixtures SOCKET` serves a plugin whose netconf says what to do
(`Steps`); `... flanneld FLAGS` is flanneld with that plugin, and `... SOCKET bridge` serves the real ones.
"""

from __future__ import annotations

import array
import errno
import fcntl
import functools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from cni.errors import Declined
from cni.host import NetnsInvalid, NetnsMissing
from cni.net import netns, nlmsg, rtlink
from cni.plugins import registry
from cni.spec import gojson
from cni.spec.request import Request
from flanneld import __main__ as daemon
from flanneld import cniserver, log
from tests.netns.cni_fixtures import ROOT, Namespace, wait_for

if TYPE_CHECKING:
    from cni.host import Host

MAGIC = b"FCNI"
VERSION = 3
HELLO = struct.pack("=4sHH", MAGIC, VERSION, 0)
HEADER = struct.Struct("=4sIiIIIII")
REPLY = struct.Struct("=4sIIII")
OWN, HOST_ROOT, NETNS, ROUTE, SETTINGS = (1 << bit for bit in range(5))
OF_CONTAINER = NETNS | ROUTE | SETTINGS
TIMEOUT_S = 20.0
REQUEST_S = 2.0  # the served process waits no longer for a whole request


# ---- the plugin


class Steps:
    """A plugin that does what its netconf's `do` names, and whose result tells what came of it."""

    about = "steps"

    def __init__(self, host: Host) -> None:
        self._host = host

    def owns_netns(self, path: str) -> bool:
        return self._host.shares_netns(path)

    def add(self, request: Request) -> gojson.Object:
        action: Callable[[Request], object] = getattr(self, f"do_{request.config['do']}")
        return {"cniVersion": "1.0.0", "said": action(request)}

    def delete(self, request: Request) -> None:
        self.add(request)

    check = status = gc = delete

    def do_echo(self, request: Request) -> object:
        return {**request.environment, "stdin": len(request.stdin)}

    def do_hold(self, request: Request) -> object:
        """Say that it has begun, and wait to be let go."""
        place = Path(str(request.config["place"]))
        begun = place.with_name(f"{place.name}.begun")
        begun.write_text("")
        try:
            wait_for(place.exists, TIMEOUT_S)
        finally:
            begun.unlink()
        return "let go"

    def do_decline(self, _request: Request) -> object:
        raise Declined("not today")

    def do_execute(self, request: Request) -> object:
        return self._host.find_program("bridge", request.path)

    def do_crash(self, _request: Request) -> object:
        raise ValueError("a bug")

    def do_files(self, request: Request) -> object:
        """Make a directory, and a file in it; read another one."""
        with self._host.files.directory(str(request.config["make"]), 0o750) as made:
            descriptor = os.open(f"{made.at}/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, b"written")
            self._host.sync(descriptor)
            shown = made.path
        text = self._host.files.read(str(request.config["read"]), 4)
        return [shown, text.decode()]

    def do_sysctls(self, request: Request) -> object:
        """Double the container's hop limit, make it 33; both, the host's own, and the host's TTL."""
        ours = self._host.netns(request.netns).ipv6_setting("lo", "hop_limit")
        ours.write(str(2 * int(ours.read())))
        doubled = ours.read()
        ours.ensure("33")
        theirs = map(self._host.sysctl, ("ipv6/conf/lo/hop_limit", "ipv4/ip_default_ttl"))
        return [doubled, ours.read(), *(setting.read() for setting in theirs)]

    def do_note_later(self, _request: Request) -> object:
        """Have a step that comes after the answer add another one, which notes something."""
        self._host.afterwards(lambda: self._host.afterwards(lambda: self._host.note("noted at last")))
        return "done"

    def do_write_sysctl(self, _request: Request) -> object:
        try:
            self._host.sysctl("ipv4/ip_forward").ensure("1")
        except OSError as exc:
            return os.strerror(exc.errno or 0)
        return "1"

    def do_netns(self, request: Request) -> object:
        path = str(request.config.get("path", request.netns))
        try:
            device, inode = self._host.netns(path).identity
        except (NetnsMissing, NetnsInvalid) as exc:
            return [type(exc).__name__, exc.msg]
        return [device, inode]

    def do_unlink(self, request: Request) -> object:
        """Make veths from the host's namespace, delete them from the container's.

        Tells for each how long that took, and what could still be seen of it.
        """
        found = self._host.netns(request.netns)
        seen = []
        for number in range(int(float(str(request.config["times"])))):
            self._veth(f"v{number}", request.ifname, found.descriptor)
            began = time.monotonic()
            number_or_zero = self._host.delete_link(found.route, request.ifname)
            took_ms = (time.monotonic() - began) * 1000
            left = [self._sees(self._host.route, f"v{number}"), self._sees(found.route, request.ifname)]
            seen.append([number_or_zero, left, took_ms])
        seen.append([self._host.delete_link(found.route, request.ifname), [False, False], 0.0])
        return seen

    def do_unlink_of_the_host(self, request: Request) -> object:
        self._veth("h0", request.ifname, self._host.netns(request.netns).descriptor)
        code = self._host.delete_link(self._host.route, "h0")
        return [code, self._sees(self._host.netns(request.netns).route, request.ifname)]

    def _veth(self, name: str, peer: str, descriptor: int) -> None:
        head = bytes(16)
        far = nlmsg.attr(3, peer.encode() + b"\0") + nlmsg.attr(28, nlmsg.u32(descriptor))
        info = nlmsg.attr(1, b"veth\0") + nlmsg.attr(2, nlmsg.attr(1, head + far))
        body = head + nlmsg.attr(3, name.encode() + b"\0") + nlmsg.attr(18, info)
        answer = self._host.route.request(
            rtlink.RTM_NEWLINK, nlmsg.NLM_F_CREATE | nlmsg.NLM_F_EXCL | nlmsg.NLM_F_ECHO, body
        )
        assert answer.errno == 0, answer.reason

    def _sees(self, route: Any, name: str) -> bool:
        return bool(route.request(18, 0, bytes(16) + nlmsg.attr(3, name.encode() + b"\0")).errno == 0)


def find(name: str) -> type[Steps] | None:
    return Steps if name in ("flannel", "bridge", "host-local", "portmap", "loopback") else None


def program(argv: Sequence[str]) -> int:
    """Serve until SIGTERM."""
    os.chdir("/")  # so that a relative path is noticed
    if argv[0] == "flanneld":
        made_here = functools.partial(cniserver.CniServer, find=find)
        setattr(daemon, "CniServer", made_here)  # noqa: B010 - for mypy the name there is a class
        return daemon.run(argv, os.environ)
    cniserver._REQUEST_S = REQUEST_S
    log.setup(2)
    # Not a handler: the kernel may give the signal to another thread, and Python's main thread sleeps on.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    server = cniserver.CniServer(argv[0], registry.find if argv[1:] else find)
    signal.sigwait({signal.SIGTERM})
    server.close()
    return 0


class Server:
    """That program in a node's namespace."""

    def __init__(self, node: Namespace, path: Path, *words: str, inside: Sequence[str] = ()) -> None:
        self.path = path
        self.log = path.with_suffix(".log")
        argv = [*inside, sys.executable, "-m", "tests.netns.cniserver_fixtures", *(words or (str(path),))]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                node.wrap(argv), stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
        self.wait_answers()

    @property
    def pid(self) -> int:
        return self.process.pid  # `ip netns exec` and setpriv become what they start

    def wait_answers(self) -> None:
        def answers() -> bool:
            assert self.process.poll() is None, self.said()
            with suppress(OSError), Connection(self.path):
                return True
            return False

        wait_for(answers, TIMEOUT_S)

    def said(self) -> str:
        return self.log.read_text()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def terminate(self) -> None:
        self.process.terminate()

    def end(self) -> int:
        """Terminate it and wait; the exit status."""
        self.process.terminate()
        return self.process.wait(TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(TIMEOUT_S)


# ---- the shim's side


class Reply(NamedTuple):
    kind: int
    exit_status: int
    stdout: bytes
    stderr: bytes

    @property
    def said(self) -> Any:
        """What the plugin tells; it must have succeeded."""
        assert (self.kind, self.exit_status) == (0, 0), self
        return json.loads(self.stdout)["said"]

    @property
    def declined(self) -> bool:
        return self == (1, 0, b"", b"")

    @property
    def error(self) -> dict[str, Any]:
        assert (self.kind, self.exit_status) == (0, 1), self
        found: dict[str, Any] = json.loads(self.stdout)
        return found


class Connection:
    """A connection to the server, without a check of who it is. A context manager."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        self._greeted = False
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.socket.close()

    def hello(self) -> bytes:
        """What comes once the whole request is there; nothing if the connection ends before."""
        self._greeted = True
        return self._read(8)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        sent = self.socket.sendmsg([data], rights if descriptors else [])
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def unread(self) -> int:
        """How many bytes of what was sent the other end has not taken yet (SIOCOUTQ, unix(7))."""
        return int.from_bytes(fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def reply(self, to_the_end: bool = True) -> Reply | None:
        """None if the connection ends without one. The shim does not wait for the end of the connection."""
        if not self._greeted and not self.hello():
            return None
        head = self._read(REPLY.size)
        if not head:
            return None
        magic, kind, status, out, err = REPLY.unpack(head)
        assert magic == MAGIC
        reply = Reply(kind, status, self._read(out), self._read(err))
        assert not to_the_end or self._read(1) == b"", "more than it announced"
        return reply

    def _read(self, size: int) -> bytes:
        """Up to the end of the connection."""
        data = b""
        with suppress(ConnectionResetError):
            while len(data) < size and (chunk := self.socket.recv(size - len(data))):
                data += chunk
        return data


class Container:
    """A container's namespace and what the shim opens in it, in the order of the mask's bits."""

    def __init__(self, namespace: Namespace) -> None:
        self.path = namespace.path

        def opened() -> list[int]:
            netns.enter(Path(namespace.path))
            kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
            directory = os.O_PATH | os.O_DIRECTORY
            return [
                os.open(namespace.path, os.O_RDONLY),
                socket.socket(socket.AF_NETLINK, kind, 0).detach(),
                os.open("/proc/sys/net/ipv6/conf", directory),
            ]

        with ThreadPoolExecutor(1) as thread:  # it ends in the container's namespace
            self.descriptors = thread.submit(opened).result()

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


def packed(
    environment: dict[str, str],
    stdin: bytes,
    mask: int,
    *,
    name: str = "flannel",
    netns_error: int = 0,
    patience_ms: int = 60000,
) -> bytes:
    """A whole request."""
    block = b"".join(f"{key}={value}\0".encode() for key, value in environment.items())
    texts = name.encode(), block, stdin
    header = HEADER.pack(MAGIC, mask, netns_error, *map(len, texts), patience_ms, VERSION)
    return b"".join((header, *texts))


class Shim:
    """Calls from a runtime in a node's namespace, whose root directory is `root`."""

    def __init__(self, node: Namespace, path: Path, root: str = "/") -> None:
        self.path = path
        self._base = [os.open(node.path, os.O_RDONLY), os.open(root, os.O_PATH | os.O_DIRECTORY)]

    def close(self) -> None:
        for descriptor in self._base:
            os.close(descriptor)

    def descriptors(self, container: Container | None) -> list[int]:
        return [*self._base, *(container.descriptors if container else [])]

    def prepared(
        self,
        do: str,
        container: Container | None = None,
        *,
        command: str = "ADD",
        container_id: str = "c1",
        path: str = "/gone",
        name: str = "flannel",
        netns_error: int = errno.ENOENT,
        patience_ms: int = 60000,
        filling: int = 0,
        **conf: object,
    ) -> bytes:
        """A request for the plugin above, whose stdin is `filling` bytes longer than need be.

        Without a container `path` cannot be opened, for the reason `netns_error`.
        """
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": container.path if container else path,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/none",
        }
        stdin = json.dumps({"cniVersion": "1.0.0", "name": "net", "type": name, "do": do, **conf})
        mask = OWN | HOST_ROOT | (OF_CONTAINER if container else 0)
        padded = stdin.encode() + b" " * filling
        return packed(
            environment,
            padded,
            mask,
            name=name,
            netns_error=0 if container else netns_error,
            patience_ms=patience_ms,
        )

    def call(self, do: str, container: Container | None = None, **more: Any) -> Reply:
        """One call from request to reply."""
        with self.begun(do, container, **more) as connection:
            reply = connection.reply()
        assert reply is not None
        return reply

    @contextmanager
    def begun(self, do: str, container: Container | None = None, **more: Any) -> Iterator[Connection]:
        """A call that was sent."""
        with Connection(self.path) as connection:
            connection.send(self.prepared(do, container, **more), self.descriptors(container))
            yield connection


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
