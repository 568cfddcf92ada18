"""A machine of its own for the CNI plugins: network and mount namespace, two pods, a call by either path.

A process that makes a World sees its files read only from then on, but for an empty /run and /var/lib: a path
that a mutated netconf names harms nobody. All worlds have the same paths, so that answers can be compared.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import stat
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cni.errors import CniError
from cni.handler import Response, failure, handle
from cni.local import DESCRIPTORS, LocalHost
from cni.net import nft, rtlink
from cni.net.netns import enter as enter_netns
from cni.net.nlsocket import NETFILTER, ROUTE, NetlinkSocket
from cni.net.rtlink import LinkState
from cni.plugins import masq, registry
from cni.plugins.portmaptable import port_table
from cni.spec.request import Request, check_environment
from tests.fuzz.cni_inputs import BASE, PODS, Step, clear
from tests.fuzz.shim_rig import BITS
from tests.netns.cniserver_fixtures import HEADER, HELLO, MAGIC, VERSION, Connection

SOCKET = "/run/cni.sock"
TIMEOUT_S = 20
_ROOT = Path(__file__).parents[2]
_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_BRIDGE_NAT = nft.Table(nft.BRIDGE, "nat")
_TABLES = (masq.TABLE, port_table(4), port_table(6), _BRIDGE_NAT)
_FAKE = f"""#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
cat {BASE}/answer
grep -q msg {BASE}/answer && exit 1
exit 0
"""
_RANDOM = re.compile(rb"veth[0-9a-f]{8}|(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
_libc = ctypes.CDLL(None, use_errno=True)


class Said(NamedTuple):
    """What a call gave. `path` is warm, cold, shim or process."""

    code: int
    stdout: bytes
    stderr: str
    path: str


class State(NamedTuple):
    """What attachments may leave: links but bridges, by namespace; files with their content; elements."""

    links: frozenset[str]
    files: dict[str, str]
    nft: frozenset[str]


def _must(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _mount(source: str, target: str, kind: str, flags: int = 0) -> None:
    _must(_libc.mount(source.encode(), target.encode(), kind.encode(), flags, None))


class World:
    """The machine; made once in a process, which must have one thread."""

    def __init__(self) -> None:
        _must(_libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS))
        _mount("none", "/", "none", _MS_REC | _MS_PRIVATE)
        attributes = struct.pack("=QQQQ", _READ_ONLY, 0, 0, 0)
        _must(_libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes)))
        _mount("proc", "/proc", "proc")
        for place in ("/run", "/var/lib"):
            _mount("tmpfs", place, "tmpfs")
        os.mkdir("/run/netns")
        os.chdir("/")  # as runtimes do, and as the daemon takes a relative path
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=30)
        self._route, self._netfilter = NetlinkSocket(ROUTE), NetlinkSocket(NETFILTER)
        self._pods = {_inode(path): pod for path, pod in ((path, Pod(path)) for path in PODS)}
        self._own = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._root = os.open("/", os.O_PATH | os.O_DIRECTORY)
        self._outside = Pod("")
        self._names: list[str] = []
        self._plain: set[str] = set()
        self._generation = -1
        self._elements: frozenset[str] = frozenset()
        self.notes: list[str] = []
        self.reset()

    def reset(self) -> None:
        """No links, no tables, no files but the plugin `fake`."""
        # Interfaces of VLANs go with their bridge.
        for link in self._dump():
            if link.name != "lo":
                self._route.request(17, 0, struct.pack("=BxHiII", 0, 0, link.ifindex, 0, 0))
        for pod in self._pods.values():
            pod.clean()
        if self._nft():
            subprocess.run(["nft", "flush", "ruleset"], check=True, timeout=30)
        self.clear_files()

    def clear_files(self) -> None:
        """Every file but those that the world itself needs."""
        for place in (BASE, "/run/flannel", "/var/lib/cni"):
            clear(place)
        os.makedirs(f"{BASE}/bin")
        for name, content in (("bin/fake", _FAKE), ("plain", ""), ("resolv.conf", "nameserver 10.96.0.10\n")):
            with open(f"{BASE}/{name}", "w") as file:
                file.write(content)
        os.chmod(f"{BASE}/bin/fake", 0o700)
        os.symlink("loop", f"{BASE}/loop")

    def _dump(self) -> list[LinkState]:
        return [LinkState(message.body) for message in self._route.dump(*rtlink.get_links())]

    def state(self) -> State:
        """What there is now."""
        node = self._outside.names()
        if node != self._names:  # what the kernel tells of links takes the lock that all who change one hold
            self._plain = {link.name for link in self._dump() if link.kind not in ("bridge", "vlan")}
            self._names = node
        names = {f"node {name}" for name in self._plain}
        for number, pod in enumerate(self._pods.values()):
            names |= {f"pod{number} {name}" for name in pod.names()}
        return State(frozenset(names), _files(), self._nft())

    def _nft(self) -> frozenset[str]:
        generation = nft.generation(self._netfilter)
        if generation != self._generation:
            self._elements = frozenset(self._read_nft())
            self._generation = generation
        return self._elements

    def _read_nft(self) -> list[str]:
        socket, found = self._netfilter, []
        there = nft.present(socket, [nft.table_query(table) for table in _TABLES])
        for table in (table for table, exists in zip(_TABLES, there, strict=True) if exists):
            for name in nft.set_names(socket, table):
                found += [f"{table} {name} {one.key.hex()}" for one in nft.elements(socket, table, name)]
            if table is _BRIDGE_NAT:
                found += [
                    f"{table} chain {name}" for name in nft.chain_names(socket, table) if name.islower()
                ]
        return found

    # ---- calls

    def cold(self, step: Step, stdin: bytes) -> Said:
        """As `cni.__main__` does it, with what the shim hands to it."""
        given = step.environment
        self.notes.clear()
        if given.get("CNI_COMMAND", "") in ("", "VERSION"):
            stdin = b""
        else:
            try:
                check_environment(given)
            except CniError as exc:
                return _said(failure(exc), "cold")
        opened, error = self._opened(given.get("CNI_NETNS", ""))
        passed = dict(zip(BITS, (os.dup(self._own), os.dup(self._root), *opened), strict=False))
        words = [f"{name}={number}" for name, number in passed.items()]
        make = registry.find(step.plugin)
        assert make is not None
        handed = " ".join((*words, f"error={error}"))
        host = LocalHost(self.notes.append, {**given, DESCRIPTORS: handed})
        try:
            return _said(handle(Request(given, stdin), make(host)), "cold")
        finally:
            if host._netns is not None:
                host._netns[1].route.close()  # it has adopted that one
                del passed["route"]
            for number in passed.values():
                os.close(number)

    def warm(self, step: Step, stdin: bytes) -> Said | None:
        """By the daemon, as the shim does it; None if it declines."""
        given = step.environment
        if given.get("CNI_COMMAND", "") in ("", "VERSION"):
            stdin = b""
        opened, error = self._opened(given.get("CNI_NETNS", ""))
        descriptors = [self._own, self._root, *opened]
        variables = b"".join(os.fsencode(f"{key}={value}") + b"\0" for key, value in given.items())
        texts = step.plugin.encode(), variables, stdin
        mask = (1 << len(descriptors)) - 1
        head = HEADER.pack(MAGIC, mask, error, *map(len, texts), TIMEOUT_S * 1000, VERSION)
        try:
            with Connection(Path(SOCKET)) as connection:
                connection.send(b"".join((head, *texts)), descriptors)
                assert connection.hello() == HELLO
                reply = connection.reply(to_the_end=False)
        finally:
            for number in opened:
                os.close(number)
        assert reply is not None, "the daemon hung up"
        if reply.kind:
            return None
        return Said(reply.exit_status, reply.stdout, reply.stderr.decode(), "warm")

    def process(self, argv: list[str], step: Step, stdin: bytes, path: str) -> Said:
        """By a process: the shim, or the plugin itself."""
        own = {"FLANNEL_CNI_SOCKET": SOCKET, "PATH": os.environ["PATH"], "PYTHONPATH": str(_ROOT)}
        if path == "process":
            own["FLANNEL_CNI_PLUGIN"] = step.plugin
        done = subprocess.run(
            [step.plugin, *argv[1:]],
            executable=argv[0],
            input=stdin,
            env={**own, **step.environment},
            capture_output=True,
            check=False,
            cwd="/",
            timeout=TIMEOUT_S,
        )
        return Said(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"), path)

    def _opened(self, path: str) -> tuple[list[int], int]:
        """Descriptors of a container's namespace, and why there are none: as the shim's open_netns."""
        if not path:
            return [], 0
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as exc:
            return [], exc.errno or errno.EIO
        found = os.fstat(descriptor)
        inode = found.st_dev, found.st_ino
        if inode == _inode("/proc/self/ns/net"):
            return [descriptor, *self._outside.opened()], 0
        if inode in self._pods:
            return [descriptor, *self._pods[inode].opened()], 0
        os.close(descriptor)
        pseudo = (os.stat("/proc").st_dev, os.stat("/proc/self/ns/net").st_dev)
        return [], errno.EINVAL if found.st_dev in pseudo else -1


class Pod:
    """A namespace, mounted at `path`, and a thread that lives in it; without path that of this process."""

    def __init__(self, path: str) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._path = path
        self._kept: list[int] = self._thread.submit(self._begin).result()

    def _begin(self) -> list[int]:
        if self._path:
            _must(_libc.unshare(_CLONE_NEWNET))
            with open(self._path, "w"):
                _mount("/proc/thread-self/ns/net", self._path, "none", _MS_BIND)
            enter_netns(Path(self._path))
        self._route = NetlinkSocket(ROUTE)
        devices = os.open("/proc/thread-self/net/dev", os.O_RDONLY)
        self._devices = os.fdopen(devices, encoding="utf-8", errors="backslashreplace")
        kept = {
            "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).detach(),
            "settings": lambda: os.open("/proc/sys/net/ipv6/conf", os.O_PATH | os.O_DIRECTORY),
        }
        return [kept[name]() for name in BITS if name in kept]

    def opened(self) -> list[int]:
        """Route socket and what else goes with a request; the caller closes them."""
        fresh = self._thread.submit(_route_socket).result()
        return [fresh, *map(os.dup, self._kept)]

    def names(self) -> list[str]:
        """The names of its links."""
        self._devices.seek(0)
        return [line.rpartition(":")[0].strip() for line in self._devices.readlines()[2:]]

    def clean(self) -> None:
        """No links but lo."""
        for message in self._route.dump(*rtlink.get_links()):
            link = LinkState(message.body)
            if link.name != "lo":
                self._route.request(17, 0, struct.pack("=BxHiII", 0, 0, link.ifindex, 0, 0))


def _route_socket() -> int:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, ROUTE).detach()


def _inode(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _said(response: Response, path: str) -> Said:
    return Said(response.exit_code, response.stdout, response.stderr, path)


def normal(data: bytes) -> bytes:
    """Without what is made up anew in each call."""
    return _RANDOM.sub(b"RANDOM", data)


def _files() -> dict[str, str]:
    """Every file below the places where plugins write, with its kind or content."""
    found: dict[str, str] = {}
    left = [BASE, "/var/lib/cni", "/run/flannel"]
    while left:
        path = left.pop()
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            continue
        shown = f"{mode & 0o777:o} "
        if stat.S_ISDIR(mode):
            left += [f"{path}/{name}" for name in os.listdir(path)]
            found[path] = f"{shown}directory"
        elif stat.S_ISLNK(mode):
            found[path] = f"{shown}-> {os.readlink(path)}"
        else:
            with open(path, "rb") as file:
                found[path] = shown + file.read().decode("latin-1")
    return found
