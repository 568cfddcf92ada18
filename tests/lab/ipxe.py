"""iPXE, the boot ROM that QEMU gives its network cards, as a DHCP client: a machine with nothing else.

It is driven as a person would: Ctrl-B gives its command line on the serial console. It asks for no
option 121 and knows no renewal and no release.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

from tests.lab.clients import ACQUIRE_S, Acquired
from tests.lab.net import Lab, LabError, Process, program, wait_for
from tests.lab.vm import QEMU, dialog, serial_port

BANNER = "Press Ctrl-B for the iPXE command line"
CTRL_B = b"\x02"
PROMPT = b"iPXE> "
BOOT_S = 30.0
DIALOG_S = 20.0
KEYS = 8  # the BIOS holds 15 keys that iPXE has not read, and loses those after them

# The settings that `acquire` reads, with the types that make iPXE print what is easy to read. Those of a
# row are asked for at once; a row with its command must fit a line of the console.
SETTINGS = (
    ("ip", "netmask", "26:uint16", "51:uint32", "54:ipv4"),
    ("3:hexraw", "6:hexraw", "119:hexraw", "next-server"),
    ("12:string", "15:string", "66:string", "67:string"),
)

_ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|\x1bc|\r|\n")


class Ipxe:
    """A VM without kernel and disk, stopped at iPXE's command line.

    `qemu_network_args` must leave the card's ROM as it is by default: QEMU adapts only that one to the
    card's PCI number, and the BIOS passes over a ROM with another.
    """

    def __init__(self, lab: Lab, netns: str, name: str, qemu_network_args: Sequence[str]) -> None:
        self._lab, self._netns, self._name = lab, netns, name
        self._arguments = qemu_network_args
        self.console = lab.directory / f"ipxe-{name}.console"
        self._port = self.console.with_suffix(".tty")
        self._process: Process | None = None

    @property
    def log(self) -> Path:
        """What the machine showed."""
        return self.console

    @property
    def process(self) -> Process:
        """The running machine; raises LabError before the first `acquire`."""
        if self._process is None:
            raise LabError(f"iPXE {self._name} was not started")
        return self._process

    def acquire(self, timeout_s: float = ACQUIRE_S) -> Acquired:
        """See `Client`. The address is iPXE's own; nothing else uses it."""
        self._boot()
        # The command `dhcp` would also wait 15 s for a router of IPv6.
        said = self.ask("ifconf -c dhcp net0", timeout_s)
        if not said.endswith(" ok"):
            raise LabError(f"iPXE {self._name}: {said}", self.console)
        reported: dict[str, str] = {}
        for row in SETTINGS:
            reported |= self.settings(row)
        return Acquired(
            address=IPv4Interface(f"{reported['ip']}/{reported['netmask']}"),
            mtu_bytes=int(reported["26:uint16"], 0) if reported["26:uint16"] else None,
            routers=_addresses(reported["3:hexraw"]),
            static_routes=(),
            dns=_addresses(reported["6:hexraw"]),
            search=_names(bytes.fromhex(reported["119:hexraw"])),
            lease_s=int(reported["51:uint32"], 0) if reported["51:uint32"] else None,
            server_id=reported["54:ipv4"],
            reported=reported,
        )

    def renew(self, timeout_s: float = ACQUIRE_S) -> Acquired:
        """Not in iPXE: raises LabError."""
        raise LabError(f"iPXE {self._name}: it has no renewal")

    def release(self, timeout_s: float = ACQUIRE_S) -> None:
        """Not in iPXE: raises LabError."""
        raise LabError(f"iPXE {self._name}: it has no release")

    def stop(self) -> None:
        """See `Client`."""
        self.process.end()

    def ask(self, command: str, timeout_s: float = DIALOG_S) -> str:
        """What iPXE says to a command, lines put together: it breaks them at 80 columns."""
        with dialog(self._port, timeout_s) as console:
            for keys in (command[i : i + KEYS].encode() for i in range(0, len(command), KEYS)):
                console.ask(keys, keys)
            said = console.ask(b"\r", PROMPT)
        return _plain(said).removesuffix(PROMPT.decode()).strip()

    def settings(self, names: Sequence[str]) -> dict[str, str]:
        """What iPXE got for its settings, or option numbers with a type as in `66:string`; "" if nothing."""
        said = self.ask(f"echo [{','.join(f'${{{name}}}' for name in names)}]")
        return dict(zip(names, said.strip("[]").split(","), strict=True))

    def _boot(self) -> None:
        argv = [
            *(program(QEMU[0]), *QEMU[1:], "-nographic", "-m", "64", "-boot", "n"),
            *serial_port("tty", self._port, self.console),
            *self._arguments,
        ]
        self._process = self._lab.spawn(self._netns, f"ipxe-{self._name}", argv)

        def shown() -> bool:
            self.process.require_running()
            return self.console.exists() and BANNER in _plain(self.console.read_bytes())

        wait_for(shown, BOOT_S, f"{BANNER!r} from iPXE {self._name}", self.console, self.process.log)
        with dialog(self._port, DIALOG_S) as console:
            console.ask(CTRL_B, PROMPT)


def _plain(shown: bytes) -> str:
    return _ESCAPE.sub(b"", shown).decode(errors="replace")


def _addresses(digits: str) -> tuple[IPv4Address, ...]:
    data = bytes.fromhex(digits)
    return tuple(IPv4Address(data[i : i + 4]) for i in range(0, len(data), 4))


def _names(data: bytes) -> tuple[str, ...]:
    """The names of option 119 (RFC 3397): labels, each name closed by 0 or by a pointer into the option."""
    names, position = [], 0
    while position < len(data):
        labels, at, end = [], position, 0
        while size := data[at]:
            if size >= 0xC0:
                end, at = end or at + 2, (size & 0x3F) << 8 | data[at + 1]
                continue
            labels.append(data[at + 1 : at + 1 + size].decode())
            at += 1 + size
        names.append(".".join(labels))
        position = end or at + 1
    return tuple(names)
