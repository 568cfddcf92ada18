"""Real DHCP clients in a namespace of the lab, each with its own way to tell what it was given.

    client namespace: eth0 ── port: server namespace

Every client has its configuration, leases and scripts in a directory of the lab, and none of them sees
the host's /run, /var/lib or resolv.conf. `Acquired` is what the client itself understood, not what the
server says it sent; so it is evidence that the bytes were right.

| client | tells by | renewed by | lease kept for the next start |
|---|---|---|---|
| udhcpc | script | SIGUSR1 | no |
| dhclient | script | its own timer (T1) | yes |
| dhcpcd, v4 and v6 | script | SIGUSR1 | yes |
| systemd-networkd | file in /run/systemd/netif | its own timer (T1) | no, it releases |

iPXE, which is a boot ROM, is in `ipxe.py`.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    ip_address,
    ip_interface,
)
from pathlib import Path
from typing import Protocol

from tests.lab.net import Lab, LabError, Process, program, wait_for
from tests.lab.vm import SCRIPTS

ACQUIRE_S = 30.0
SIGNALS = 5
ON_LINK = "0.0.0.0"

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class StaticRoute:
    """One route of option 121; without a gateway the destination is on the link."""

    destination: IPv4Network
    gateway: IPv4Address | None

    def __str__(self) -> str:
        return f"{self.destination} via {self.gateway}" if self.gateway else str(self.destination)


@dataclass(frozen=True, slots=True)
class Acquired:
    """What a client was given. `server_id` is an address in DHCPv4, a DUID in DHCPv6, "" if none was told.

    `reported` is all that the client told, in its own words and not compared.
    """

    address: IPv4Interface | IPv6Interface
    mtu_bytes: int | None
    routers: tuple[Address, ...]
    static_routes: tuple[StaticRoute, ...]
    dns: tuple[Address, ...]
    search: tuple[str, ...]
    lease_s: int | None
    server_id: str
    reported: Mapping[str, str] = field(compare=False, repr=False)


class Client(Protocol):
    """One DHCP client on one interface. Its log is that of the process, with the client's own words."""

    @property
    def log(self) -> Path:
        """What the client printed."""
        ...

    def acquire(self, timeout_s: float = ACQUIRE_S) -> Acquired:
        """Start the client and wait until it has configured the interface; raises LabError if it does not."""
        ...

    def renew(self, timeout_s: float = ACQUIRE_S) -> Acquired:
        """Have the lease renewed, or wait until the client does so by itself; return what it was given."""
        ...

    def release(self, timeout_s: float = ACQUIRE_S) -> None:
        """Have the client give its lease back and wait until it says so."""
        ...

    def stop(self) -> None:
        """End the client; those that keep their lease for the next start do not release it."""
        ...


@dataclass(frozen=True, slots=True)
class Names:
    """How a client calls what it was given; "" for what it does not tell."""

    address: str
    prefix: str
    mtu: str
    routers: str
    routes: str
    dns: str
    search: str
    lease: str
    server: str


def _acquired(reported: Mapping[str, str], names: Names, routes: tuple[StaticRoute, ...]) -> Acquired:
    def numbers(name: str) -> int | None:
        return int(reported[name]) if reported.get(name) else None

    def words(name: str) -> list[str]:
        return reported.get(name, "").split()

    prefix = reported.get(names.prefix, "128" if ":" in reported[names.address] else "32")
    return Acquired(
        address=ip_interface(f"{reported[names.address]}/{prefix}"),
        mtu_bytes=numbers(names.mtu),
        routers=tuple(map(ip_address, words(names.routers))),
        static_routes=routes,
        dns=tuple(map(ip_address, words(names.dns))),
        search=tuple(word.rstrip(".") for word in words(names.search)),
        lease_s=numbers(names.lease),
        server_id=reported.get(names.server, ""),
        reported=reported,
    )


def route_pairs(words: Sequence[str]) -> tuple[StaticRoute, ...]:
    """Routes from destination and gateway in turn, as udhcpc and dhcpcd tell option 121."""
    if len(words) % 2:
        raise LabError(f"static routes {' '.join(words)}: not pairs of destination and gateway")
    return tuple(
        StaticRoute(IPv4Network(destination), None if gateway == ON_LINK else IPv4Address(gateway))
        for destination, gateway in zip(words[::2], words[1::2], strict=True)
    )


def route_bytes(data: bytes) -> tuple[StaticRoute, ...]:
    """Routes from the bytes of option 121 (RFC 3442), which dhclient and iPXE leave as they are."""
    words: list[str] = []
    while data:
        end = 1 + (data[0] + 7) // 8
        destination = IPv4Address(data[1:end].ljust(4, b"\0"))
        words += [f"{destination}/{data[0]}", str(IPv4Address(data[end : end + 4]))]
        data = data[end + 4 :]
    return route_pairs(words)


class Events:
    """What a client's script was told: one file with its environment for each call, in their order."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o755, parents=True)
        self.directory = directory
        self._seen = 0

    def script(self, text: str) -> Path:
        """Make an executable script of these shell lines, which then leaves its environment as an event."""
        path = self.directory / "script"
        record = f"event={shlex.quote(str(self.directory))}/$(date +%s%N)"
        path.write_text(
            f"#!/bin/sh\n{text}\n{record}\n"
            'reason=${reason:-$1} env -0 >"$event.tmp" && mv "$event.tmp" "$event.event"\n'
        )
        path.chmod(0o755)
        return path

    def forget(self) -> None:
        """Pass over what was told until now."""
        self._seen = len(self._files())

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("*.event"))

    def wait(self, process: Process, reasons: Collection[str], timeout_s: float) -> dict[str, str]:
        """The next event with one of these reasons; those before it are passed over.

        Raises LabError after `timeout_s` seconds, or when the client ends.
        """
        found: dict[str, str] = {}

        def told() -> bool:
            ended = process.popen.poll() is not None  # before the look at the events: the last may be its end
            for path in self._files()[self._seen :]:
                self._seen += 1
                pairs = path.read_text(errors="replace").split("\0")
                environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if environment.get("reason") in reasons:
                    found.update(environment)
                    return True
            if ended:
                process.require_running()
            return False

        what = f"{' or '.join(reasons)} from {process.child.what}"
        wait_for(told, timeout_s, what, process.log)
        return found


def _state(lab: Lab, kind: str, netns: str) -> Path:
    """The client's directory; another client of this kind in the same namespace has the same leases."""
    directory = lab.directory / f"{kind}-{netns}"
    directory.mkdir(mode=0o755, exist_ok=True)
    return directory


def _events(directory: Path) -> Events:
    return Events(directory / f"events{len(list(directory.glob('events*')))}")


_UDHCPC = Names("ip", "mask", "mtu", "router", "staticroutes", "dns", "search", "lease", "serverid")
_DHCLIENT = Names(
    address="new_ip_address",
    prefix="new_subnet_mask",
    mtu="new_interface_mtu",
    routers="new_routers",
    routes="new_classless_static_routes",
    dns="new_domain_name_servers",
    search="new_domain_search",
    lease="new_dhcp_lease_time",
    server="new_dhcp_server_identifier",
)
_DHCPCD6 = Names(
    address="new_dhcp6_ia_na1_ia_addr1",
    prefix="",
    mtu="",
    routers="",
    routes="",
    dns="new_dhcp6_name_servers",
    search="new_dhcp6_domain_search",
    lease="new_dhcp6_ia_na1_ia_addr1_vltime",
    server="new_dhcp6_server_id",
)
_NETWORKD = Names(
    address="ADDRESS",
    prefix="NETMASK",
    mtu="MTU",
    routers="ROUTER",
    routes="CLASSLESS_ROUTES",
    dns="DNS",
    search="DOMAIN_SEARCH_LIST",
    lease="LIFETIME",
    server="SERVER_ADDRESS",
)


def acquired_from_line(line: str) -> Acquired:
    """What a line "DHCP bound ip=... mask=..." of the guest's console says (see guest/dhcp.script)."""
    words = line[line.index("DHCP ") :].split()[2:]
    reported = {key: value.replace(",", " ") for key, _, value in (word.partition("=") for word in words)}
    return _acquired(reported, _UDHCPC, route_pairs(reported["staticroutes"].split()))


@dataclass(frozen=True, slots=True)
class Reasons:
    """What a client's script is told when the lease is there, was renewed, was given back.

    `settled` is what a client logs when it has also kept the lease for its next start, if that comes last.
    """

    bound: Collection[str]
    renewed: Collection[str]
    released: Collection[str]
    settled: str = ""


class ScriptClient:
    """A client that runs a script at each change; made by `udhcpc`, `dhclient` and `dhcpcd`."""

    def __init__(
        self,
        start: Callable[[], Process],
        events: Events,
        reasons: Reasons,
        understand: Callable[[Mapping[str, str]], Acquired],
        ask_renewal: Callable[[Process], object],
        ask_release: Callable[[Process], object],
    ) -> None:
        self._start = start
        self._events = events
        self._reasons = reasons
        self._understand = understand
        self._ask_renewal = ask_renewal
        self._ask_release = ask_release
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The running client; raises LabError before the first `acquire`."""
        if self._process is None:
            raise LabError(f"{self._events.directory}: this client was not started")
        return self._process

    @property
    def log(self) -> Path:
        """What the client printed."""
        return self.process.log

    @property
    def events(self) -> Events:
        """For what is not a lease: NAK, expiry."""
        return self._events

    def acquire(self, timeout_s: float = ACQUIRE_S) -> Acquired:
        """See `Client`."""
        bound_before = self._bound()
        self._events.forget()
        self._process = self._start()
        return self._given(self._reasons.bound, bound_before, timeout_s)

    def renew(self, timeout_s: float = ACQUIRE_S) -> Acquired:
        """See `Client`."""
        bound_before = self._bound()
        self._events.forget()
        self._ask_renewal(self.process)
        return self._given(self._reasons.renewed, bound_before, timeout_s)

    def release(self, timeout_s: float = ACQUIRE_S) -> None:
        """See `Client`."""
        self._events.forget()
        self._ask_release(self.process)
        self._events.wait(self.process, self._reasons.released, timeout_s)

    def stop(self) -> None:
        """See `Client`."""
        self.process.end()

    def _bound(self) -> int:
        return _count(self._process.log, self._reasons.settled) if self._process else 0

    def _given(self, reasons: Collection[str], bound_before: int, timeout_s: float) -> Acquired:
        acquired = self._understand(self._events.wait(self.process, reasons, timeout_s))
        if self._reasons.settled:
            wait_for(lambda: self._bound() > bound_before, timeout_s, self._reasons.settled, self.log)
        return acquired


def _signalling(signum: signal.Signals) -> Callable[[Process], None]:
    return lambda process: process.popen.send_signal(signum)


def _insisting(signum: signal.Signals) -> Callable[[Process], None]:
    """Send a signal until the log tells of it: dhcpcd may lose one that comes while it ends a script."""
    word = f"received {signum.name}"

    def ask(process: Process) -> None:
        before = _count(process.log, word)
        for _ in range(SIGNALS):
            process.popen.send_signal(signum)
            with contextlib.suppress(LabError):
                wait_for(lambda: _count(process.log, word) > before, 1.0, word)
                return
        raise LabError(f"{process.child.what} did not notice {SIGNALS} times {signum.name}", process.log)

    return ask


def _apply(directory: Path) -> str:
    """A shell command that runs guest/dhcp.script with its files in the client's directory."""
    files = f"RESOLV_CONF={directory}/resolv.conf DHCP_LOG={directory}/lines"
    return f"{files} {SCRIPTS}/dhcp.script"


def udhcpc(lab: Lab, netns: str, interface: str = "eth0", flags: Sequence[str] = ()) -> ScriptClient:
    """busybox's client. `flags` are its own: `-a` for an ARP probe, `-r ADDRESS`, `-x 0x3d:01...`, `-B`."""
    directory = _state(lab, "udhcpc", netns)
    events = _events(directory)
    script = events.script(f'{_apply(directory)} "$1"')
    asked = (f"-O{option}" for option in ("mtu", "staticroutes", "search", "ntpsrv", "tftp", "bootfile"))
    own = ("-f", "-i", interface, "-s", str(script), "-t10", "-T1", "-A1")
    argv = [program("busybox"), "udhcpc", *own, *asked, *flags]

    def understand(reported: Mapping[str, str]) -> Acquired:
        return _acquired(reported, _UDHCPC, route_pairs(reported.get("staticroutes", "").split()))

    return ScriptClient(
        start=lambda: lab.spawn(netns, f"udhcpc-{netns}", argv),
        events=events,
        reasons=Reasons(bound={"bound"}, renewed={"renew"}, released={"deconfig"}),
        understand=understand,
        ask_renewal=_signalling(signal.SIGUSR1),
        ask_release=_signalling(signal.SIGUSR2),
    )


# dhclient knows option 121 only when told; without retry and backoff it waits minutes between its tries.
_DHCLIENT_CONF = """
option classless-static-routes code 121 = array of unsigned integer 8;
request subnet-mask, broadcast-address, routers, domain-name, domain-name-servers, domain-search,
  host-name, interface-mtu, ntp-servers, tftp-server-name, bootfile-name, classless-static-routes;
timeout 30; retry 1; initial-interval 1; backoff-cutoff 2;
"""

# Like Debian's dhclient-script without its hooks: the address, the MTU and the routers of option 3.
_DHCLIENT_SCRIPT = """
export interface ip=$new_ip_address mask=$new_subnet_mask broadcast=$new_broadcast_address
export router=$new_routers mtu=$new_interface_mtu dns=$new_domain_name_servers search=$new_domain_search
case $reason in
BOUND | REBOOT | RENEW | REBIND) {apply} renew ;;
PREINIT | EXPIRE | FAIL | RELEASE | STOP) {apply} deconfig ;;
esac
"""


def dhclient(lab: Lab, netns: str, interface: str = "eth0", configuration: str = "") -> ScriptClient:
    """ISC's client. It cannot be told to renew: `renew` waits for T1, which the server should set short.

    `configuration` is added to its dhclient.conf, for instance `send dhcp-client-identifier 1:2:...;`.
    """
    directory = _state(lab, "dhclient", netns)
    events = _events(directory)
    script = events.script(_DHCLIENT_SCRIPT.format(apply=_apply(directory)))
    (directory / "conf").write_text(_DHCLIENT_CONF + configuration)
    (directory / "leases").touch()
    files = ("-cf", "conf", "-lf", "leases", "-pf", "pid")
    paths = [word if word.startswith("-") else str(directory / word) for word in files]
    own = [program("dhclient"), "-4", "-v", *paths, "-sf", str(script)]

    def understand(reported: Mapping[str, str]) -> Acquired:
        routes = bytes(map(int, reported.get(_DHCLIENT.routes, "").split()))
        return _acquired(reported, _DHCLIENT, route_bytes(routes))

    return ScriptClient(
        start=lambda: lab.spawn(netns, f"dhclient-{netns}", [*own, "-d", interface]),
        events=events,
        reasons=Reasons({"BOUND", "REBOOT"}, {"RENEW", "REBIND"}, {"RELEASE"}, settled="bound to "),
        understand=understand,
        ask_renewal=lambda process: process.require_running(),
        ask_release=lambda process: lab.run(netns, *own, "-r", interface),
    )


def _with_directories(mounts: Mapping[str, Path], argv: Sequence[str]) -> list[str]:
    """A command that sees an empty /run and these directories in place of the host's.

    `ip netns exec` has given it a mount namespace of its own.
    """
    lines = ["mount -t tmpfs tmpfs /run"]
    for target, source in mounts.items():
        source.mkdir(mode=0o755, exist_ok=True)
        lines += [f"mkdir -p {target}", f"mount --bind {source} {target}"]
    return ["/bin/sh", "-ec", "\n".join([*lines, 'exec "$@"']), "sh", *argv]


def dhcpcd(
    lab: Lab, netns: str, interface: str = "eth0", version: int = 4, flags: Sequence[str] = ()
) -> ScriptClient:
    """dhcpcd, for IPv4 or IPv6 alone; it probes an IPv4 address for 5 s before it uses it (RFC 5227).

    It keeps the link's MTU and gives that of option 26 to its routes. With IPv6 it waits for a router
    advertisement, and for the M flag in it, before it asks for an address; the router is none of DHCPv6's.
    """
    directory = _state(lab, f"dhcpcd{version}", netns)
    events = _events(directory)
    script = events.script("")
    names, six = (_DHCPCD6, "6") if version == 6 else (_DHCLIENT, "")
    asked = ("dhcp6_name_servers", "dhcp6_domain_search") if six else _DHCPCD_ASKS
    own = [program("dhcpcd"), f"-{version}", "-f", "/dev/null", "-c", str(script)]
    options = [word for option in asked for word in ("-o", option)]
    argv = _with_directories(
        {"/var/lib/dhcpcd": directory / "leases"}, [*own, "-B", "-d", *options, *flags, interface]
    )

    def understand(reported: Mapping[str, str]) -> Acquired:
        return _acquired(reported, names, route_pairs(reported.get(names.routes, "").split()))

    return ScriptClient(
        start=lambda: lab.spawn(netns, f"dhcpcd{version}-{netns}", argv),
        events=events,
        reasons=Reasons(
            bound={f"BOUND{six}", f"REBOOT{six}"},
            renewed={f"RENEW{six}", f"REBIND{six}"},
            released={f"STOP{six}", f"RELEASE{six}"},
        ),
        understand=understand,
        ask_renewal=_insisting(signal.SIGUSR1),
        ask_release=_insisting(signal.SIGALRM),
    )


_DHCPCD_ASKS = (
    *("subnet_mask", "routers", "domain_name_servers", "domain_name", "domain_search", "host_name"),
    *("interface_mtu", "classless_static_routes", "ntp_servers", "tftp_server_name", "bootfile_name"),
)

_NETWORK_FILE = """[Match]
Name={interface}
[Network]
DHCP=ipv4
LinkLocalAddressing=no
IPv6AcceptRA=no
[DHCPv4]
UseMTU=yes
UseDomains=yes
SendHostname=no
UseHostname=no
UseTimezone=no
"""


class Networkd:
    """systemd-networkd, alone: no udev, no D-Bus. It cannot be told to renew: `renew` waits for T1.

    With /sys read-only it takes links as they are instead of waiting for udev, as in a container.
    `configuration` is added to the [DHCPv4] section of its .network file.
    """

    def __init__(self, lab: Lab, netns: str, interface: str = "eth0", configuration: str = "") -> None:
        self._lab, self._netns, self._interface = lab, netns, interface
        self._directory = _state(lab, "networkd", netns) / "run"
        network = self._directory / "network"
        network.mkdir(mode=0o755, parents=True, exist_ok=True)
        file = network / "10-lab.network"
        file.write_text(_NETWORK_FILE.format(interface=interface) + configuration)
        script = (
            "mount -o remount,ro,bind /sys\n"
            "cd /run/systemd\nmkdir -p netif/leases netif/links netif/lldp\nchown -R systemd-network netif\n"
            "export SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console\n"
            "exec /usr/lib/systemd/systemd-networkd"
        )
        self._argv = _with_directories({"/run/systemd": self._directory}, ["/bin/sh", "-ec", script])
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The running client; raises LabError before the first `acquire`."""
        if self._process is None:
            raise LabError(f"{self._directory}: this client was not started")
        return self._process

    @property
    def log(self) -> Path:
        """What the client printed."""
        return self.process.log

    def acquire(self, timeout_s: float = ACQUIRE_S) -> Acquired:
        """See `Client`."""
        log = self._lab.directory / f"networkd-{self._netns}.log"
        before = _count(log, _CONFIGURED)
        self._process = self._lab.spawn(self._netns, f"networkd-{self._netns}", self._argv)
        return self._after(_CONFIGURED, before, timeout_s)

    def renew(self, timeout_s: float = ACQUIRE_S) -> Acquired:
        """See `Client`."""
        return self._after(_ACK, _count(self.log, _ACK), timeout_s)

    def release(self, timeout_s: float = ACQUIRE_S) -> None:
        """See `Client`. It releases as it ends, without option 54, for which dnsmasq ignores it."""
        before = _count(self.log, _RELEASE)
        self.stop()
        if _count(self.log, _RELEASE) == before:
            raise LabError("systemd-networkd ended and did not release its lease", self.log)

    def stop(self) -> None:
        """See `Client`."""
        self.process.end()

    def _after(self, text: str, count: int, timeout_s: float) -> Acquired:
        """What was acquired when the log holds `text` more than `count` times."""

        def told() -> bool:
            self.process.require_running()
            return _count(self.log, text) > count

        wait_for(told, timeout_s, f"{text!r} from systemd-networkd", self.log)
        index = self._lab.show(self._netns, "ip", "link", "show", self._interface)[0]["ifindex"]
        lines = (self._directory / "netif" / "leases" / str(index)).read_text().splitlines()
        reported = dict(line.split("=", 1) for line in lines if "=" in line)
        words = reported.get(_NETWORKD.routes, "").replace(",", " ").split()
        return _acquired(reported, _NETWORKD, route_pairs(words))


_CONFIGURED = "State changed: configuring -> configured"
_ACK = "DHCPv4 client: ACK"
_RELEASE = "DHCPv4 client: RELEASE"


def _count(log: Path, text: str) -> int:
    return log.read_text(errors="replace").count(text) if log.exists() else 0


def plug(lab: Lab, server: str, client: str, port: str, mac: str) -> None:
    """Join two namespaces by a veth: `port` in the server's, `eth0` with address `mac` in the client's."""
    lab.ip(
        server,
        f"link add {port} type veth peer name eth0 address {mac} netns {client}",
        f"link set {port} up",
    )
    lab.ip(client, "link set eth0 up")
