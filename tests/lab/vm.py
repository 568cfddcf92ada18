"""A real VM in a namespace of the lab: QEMU without KVM, Debian's cloud kernel, busybox as its whole system.

It has two serial ports. The first is the console: the kernel's messages, the guest's own lines and, after
Enter, a shell for a person (`socat - UNIX-CONNECT:<lab>/vm-<name>.tty`). The second carries what `Guest.run`
asks and what comes back.

Decision: commands do not travel on the console. A message of the kernel can stand in the middle of any line
there, and no framing repairs what it tore apart.

Decision: nothing here stays connected or reads in the background. QEMU itself writes the console to a file,
and each command is one connection; so a guest lives as long as its lab, not as long as a Python object.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import lzma
import math
import os
import re
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

from tests.lab.net import COMMAND_S, Lab, LabError, Process, program, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build" / "guest"
KERNEL = BUILD / "kernel"
SCRIPTS = Path(__file__).with_name("guest")

# A guest's DHCP client in the background, with every option that the script tells about.
UDHCPC = "udhcpc -i eth0 -s /dhcp.script -O mtu -O staticroutes -O search -O ntpsrv -O tftp -O bootfile"
DHCPCD6 = "dhcpcd -6 -f /dev/null -c /dhcp6.script -o dhcp6_name_servers -o dhcp6_domain_search eth0"

MODULES = ("virtio_pci", "virtio_net", "af_packet", "ipv6")
MEMORY_MB = 128
READY = "guest ready"
BOOT_S = 60.0

# Without boot messages, CPU mitigations and timer calibration an emulated machine starts sooner.
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check tsc=reliable"

# KVM is never asked for: where /dev/kvm is there but does not work, QEMU would hang.
QEMU = ("qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-nodefaults", "-no-user-config", "-no-reboot")


@dataclass(frozen=True, slots=True)
class Image:
    """What QEMU boots."""

    kernel: Path
    initrd: Path


@dataclass(frozen=True, slots=True)
class Member:
    """A file, directory or symbolic link (its target is `data`) of an initramfs."""

    path: str
    mode: int
    data: bytes = b""


def archive(members: Sequence[Member]) -> bytes:
    """Pack an initramfs in cpio's "newc" format; the same members give the same bytes."""
    packed = bytearray()
    for number, member in enumerate([*members, Member("TRAILER!!!", 0)], 1):
        name = member.path.encode() + b"\0"
        fields = (number, member.mode, 0, 0, 1, 0, len(member.data), 0, 0, 0, 0, len(name), 0)
        packed += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        packed += bytes(-len(packed) % 4) + member.data
        packed += bytes(-len(packed) % 4)
    return bytes(packed)


def load_order(dependencies: str, builtin: str, wanted: Sequence[str]) -> list[str]:
    """Paths of the `wanted` modules and all they need, each after those it needs.

    `dependencies` and `builtin` are the texts of modules.dep and modules.builtin. Raises LabError for a
    module that the kernel does not have.
    """
    needs: dict[str, tuple[str, list[str]]] = {}
    for line in dependencies.splitlines():
        path, _, rest = line.partition(":")
        needs[_module(path)] = path, rest.split()
    inside = {_module(path) for path in builtin.splitlines()}
    order: dict[str, None] = {}
    for name in wanted:
        if name in inside:
            continue
        if name not in needs:
            raise LabError(
                f"module {name}: neither in modules.dep nor in modules.builtin of the guest's kernel"
            )
        own, others = needs[name]
        order |= dict.fromkeys([*reversed(others), own])
    return list(order)


def _module(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def image(directory: Path = BUILD) -> Image:
    """The cloud kernel that `make guest-kernel` unpacked and an initramfs for it, which is built if need be.

    The name of the initramfs holds the kernel's version and the hash of its content.
    """
    kernel = _kernel()
    version = kernel.name.removeprefix("vmlinuz-")
    packed = archive([*_system(), *_modules(KERNEL / "lib" / "modules" / version)])
    initrd = directory / f"initrd-{version}-{hashlib.sha256(packed).hexdigest()[:16]}"
    if not initrd.exists():
        directory.mkdir(parents=True, exist_ok=True)
        temporary = initrd.with_name(f"{initrd.name}.{os.getpid()}")  # another test may build the same one
        temporary.write_bytes(packed)
        temporary.replace(initrd)
    return Image(kernel, initrd)


def _kernel() -> Path:
    kernels = sorted((KERNEL / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise LabError(f"{KERNEL}/boot/vmlinuz-*: no such file; get it first: make guest-kernel")
    return kernels[-1]


def _system() -> Iterator[Member]:
    """All that is not the kernel's: busybox, dhcpcd with its libraries, and our scripts."""
    for directory in (
        "bin",
        "dev",
        "etc",
        "lib",
        "lib64",
        "modules",
        "proc",
        "run",
        "sbin",
        "sys",
        "tmp",
        "var",
    ):
        yield Member(directory, stat.S_IFDIR | 0o755)
    yield Member("bin/busybox", stat.S_IFREG | 0o755, Path(program("busybox")).read_bytes())
    dhcpcd = program("dhcpcd")
    yield Member("sbin/dhcpcd", stat.S_IFREG | 0o755, Path(dhcpcd).read_bytes())
    yield from _libraries(dhcpcd)
    yield Member("etc/passwd", stat.S_IFREG | 0o644, b"root:x:0:0:root:/:/bin/sh\n")
    for script in ("init", "dhcp.script", "dhcp6.script"):
        yield Member(script, stat.S_IFREG | 0o755, (SCRIPTS / script).read_bytes())


def _libraries(executable: str) -> Iterator[Member]:
    """The shared libraries of a program, where its loader looks for them."""
    made: set[str] = {"lib", "lib64"}
    listing = subprocess.run([program("ldd"), executable], capture_output=True, text=True, check=True).stdout
    for path in re.findall(r"(/\S+) \(0x", listing):
        for parent in reversed(Path(path).relative_to("/").parents):
            if str(parent) not in made | {"."}:
                made.add(str(parent))
                yield Member(str(parent), stat.S_IFDIR | 0o755)
        yield Member(path.removeprefix("/"), stat.S_IFREG | 0o755, Path(path).read_bytes())


def _modules(tree: Path) -> Iterator[Member]:
    """The kernel modules of the guest, unpacked, and `order`, which names them as they are to be loaded."""
    dependencies, builtin = (tree / "modules.dep").read_text(), (tree / "modules.builtin").read_text()
    names = []
    for path in load_order(dependencies, builtin, MODULES):
        names.append(f"{_module(path)}.ko")
        content = (tree / path).read_bytes()
        if path.endswith(".xz"):
            content = lzma.decompress(content)
        yield Member(f"modules/{names[-1]}", stat.S_IFREG | 0o644, content)
    yield Member("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in names).encode())


def serial_port(name: str, path: Path, log: Path | None = None) -> tuple[str, ...]:
    """QEMU's arguments for its next serial port: a socket that listens, and a file of all that came out."""
    record = f",logfile={log}" if log else ""
    return (
        "-chardev",
        f"socket,id={name},path={path},server=on,wait=off{record}",
        "-serial",
        f"chardev:{name}",
    )


class Dialog:
    """A connection to a serial port of QEMU. LabError if what is awaited does not come before `deadline`."""

    def __init__(self, connection: socket.socket, port: Path, deadline: float) -> None:
        self._connection = connection
        self._port = port
        self._deadline = deadline

    def ask(self, request: bytes, end: bytes) -> bytes:
        """Send `request` and return what comes back, up to and with `end`."""
        answer = bytearray()
        try:
            self._connection.sendall(request)
            while not answer.endswith(end):
                self._connection.settimeout(max(self._deadline - time.monotonic(), 0.001))
                if not (piece := self._connection.recv(1 << 16)):
                    raise LabError(f"{self._port}: QEMU closed the serial port")
                answer += piece
        except OSError as exc:
            said = bytes(answer[-80:])
            raise LabError(f"{self._port}: {request[:80]!r} got {said!r} and not {end!r}: {exc}") from exc
        return bytes(answer)


@contextlib.contextmanager
def dialog(port: Path, timeout_s: float) -> Iterator[Dialog]:
    """Connect to a serial port for a dialog that ends after `timeout_s` seconds at most."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(port))
        except OSError as exc:
            raise LabError(f"{port}: QEMU does not listen: {exc}") from exc
        yield Dialog(connection, port, time.monotonic() + timeout_s)


class Guest:
    """A running VM. The lab ends it, if `stop` does not."""

    def __init__(self, lab: Lab, name: str, process: Process) -> None:
        self.name = name
        self.process = process
        self.console = lab.directory / f"vm-{name}.console"
        self._commands = lab.directory / f"vm-{name}.commands"
        self._numbers = count(1)

    @classmethod
    def boot(
        cls, lab: Lab, netns: str, name: str, qemu_network_args: Sequence[str], append: str = ""
    ) -> Self:
        """Start a VM in `netns` and return when its shell answers; the first network card is its eth0.

        `append` goes to the kernel's command line. Raises LabError if QEMU ends, or after `BOOT_S` seconds.
        """
        made = image()
        console = lab.directory / f"vm-{name}.console"
        argv = [
            *(program(QEMU[0]), *QEMU[1:], "-display", "none", "-m", str(MEMORY_MB)),
            *("-kernel", str(made.kernel), "-initrd", str(made.initrd)),
            *("-append", f"{KERNEL_ARGUMENTS} {append}".strip()),
            # The kernel is at hand: the cards need no boot ROM, which would ask for an address itself.
            *("-global", "virtio-net-pci.romfile="),
            *serial_port("tty", console.with_suffix(".tty"), console),
            *serial_port("commands", console.with_suffix(".commands")),
            *qemu_network_args,
        ]
        guest = cls(lab, name, lab.spawn(netns, f"vm-{name}", argv))
        guest.wait_text(READY, BOOT_S)
        return guest

    def console_lines(self) -> list[str]:
        """Every line that the console has shown so far, as a whole."""
        try:
            text = self.console.read_text(errors="replace")
        except FileNotFoundError:
            return []
        return [line.rstrip() for line in text[: text.rfind("\n") + 1].splitlines()]

    def wait_text(self, text: str, timeout_s: float = COMMAND_S, count: int = 1) -> str:
        """Wait until `count` lines of the console hold `text` and return the last of these.

        Raises LabError after `timeout_s` seconds or when the guest has ended.
        """
        found: list[str] = []
        logs = (self.console, self.process.log)

        def seen() -> bool:
            status = self.process.popen.poll()  # before the look at the console, whose end may be new
            found[:] = [line for line in self.console_lines() if text in line]
            if len(found) < count and status is not None:
                raise LabError(f"{self.process.child.what} ended with status {status}", *logs)
            return len(found) >= count

        wait_for(seen, timeout_s, f"{text!r} on the console of {self.name}", *logs)
        return found[count - 1]

    def run(self, command: str, timeout_s: float = COMMAND_S) -> str:
        """Run a shell command in the guest and return its stdout and stderr.

        What it leaves in the background goes on; its later output is lost unless it goes to /dev/console.
        Raises LabError if the exit status is not 0, or with the status 137 after `timeout_s` seconds.
        """
        number = next(self._numbers)
        encoded = base64.b64encode(command.encode()).decode()
        request = f"{number} {math.ceil(timeout_s)} {encoded}\n".encode()
        with dialog(self._commands, timeout_s + COMMAND_S) as port:
            answer = port.ask(request, b"\n").decode()
        told, status, *words = answer.split()
        output = base64.b64decode("".join(words)).decode(errors="replace")
        if int(told) != number:
            raise LabError(f"{self.name}: answer {told} to command {number} ({command})", self.console)
        if int(status):
            said = " ".join(output.split())
            raise LabError(f"{self.name}: {command}: exit status {status}: {said}", self.console)
        return output

    def stop(self) -> None:
        """Switch the guest off, as if its power failed."""
        self.process.end()
