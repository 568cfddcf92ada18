"""virt-launcher: hand a pod's interface to a virtual machine, and tell the machine its address."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from cni import __version__
from cni.errors import ConfigError, NetworkError
from cni.net import netns
from launcher import handover, log, resolv
from launcher.binding import MASQUERADE_NETWORK, MASQUERADE_NETWORK6
from launcher.dhcp.options import valid_search_domains
from launcher.dhcp.server import DEFAULT_LEASE_S
from launcher.discover import network_status, primary
from launcher.handover import Pod
from launcher.log import logger
from launcher.nat import Port
from launcher.serve import Sockets, Wake, drop_privileges, serve
from launcher.settings import MAX_USER, Settings

STATE_DIR = "/var/run/kubevirt-private/network"
QEMU_USER = 107
NOBODY = 65534
BINDINGS = ["bridge", "masquerade"]
FORMATS = ["table", "json", "yaml"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Where:
    """Options of the program as a whole."""

    state_dir: Path
    force: bool


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="virt-launcher")
@click.option("--netns", "path", type=click.Path(path_type=Path), help="Work in this network namespace.")
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(STATE_DIR),
    show_default=True,
    help="Where the plan is kept: a private emptyDir of the pod.",
)
@click.option("--force", is_flag=True, help="Work in the node's own namespace too.")
@click.option("-v", "--verbose", is_flag=True, help="Log each operation.")
@click.pass_context
def cli(context: click.Context, path: Path | None, state_dir: Path, force: bool, verbose: bool) -> None:
    """Hand a pod's interface to a virtual machine, and tell the machine its address."""
    log.setup(verbose)
    if path is not None:
        netns.enter(path)
    context.obj = Where(state_dir, force)


def plan_options(command: F) -> F:
    """The options that make a plan."""
    options = [
        click.option("--interface", default="", help="Default: the interface with the default route."),
        click.option(
            "--network-status", default="", help="The pod's annotation: names the primary interface."
        ),
        click.option("--binding", type=click.Choice(BINDINGS), default="bridge", show_default=True),
        click.option("--queues", type=int, default=1, show_default=True, help="Queues of the tap."),
        click.option("--mtu", type=int, default=0, help="Default: the pod interface's."),
        click.option("--mac", default="", help="The machine's MAC. Default: the pod interface's."),
        click.option("--hostname", default="", help="Default: the pod's."),
        click.option("--subdomain", default="", help="The pod's subdomain, put in front of the search list."),
        click.option("--dns", multiple=True, help="Name server; may be repeated. Default: resolv.conf."),
        click.option("--search", multiple=True, help="Search domain; may be repeated. Default: resolv.conf."),
        click.option("--ntp", multiple=True, help="Time server address; may be repeated."),
        click.option("--private-option", multiple=True, metavar="N=VALUE", help="224 to 254, text or 0xHEX."),
        click.option("--boot-file", default="", help="Boot file name (option 67)."),
        click.option("--tftp-server", default="", help="TFTP server (option 66)."),
        click.option("--lease-seconds", type=int, default=DEFAULT_LEASE_S, show_default=True),
        click.option("--port", multiple=True, metavar="N[/PROTOCOL]", help="Masquerade: pass on only these."),
        click.option(
            "--network", default=str(MASQUERADE_NETWORK), show_default=True, help="Masquerade: IPv4."
        ),
        click.option("--network6", default=str(MASQUERADE_NETWORK6), show_default=True, help="And IPv6."),
        click.option("--tap-owner", type=int, default=QEMU_USER, show_default=True, help="Who runs QEMU."),
        click.option("--domain-xml", default="", metavar="FILE|-", help="Write libvirt's interface element."),
        click.option("--qemu-args", is_flag=True, help="Print QEMU's arguments."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _settings(given: dict[str, Any], is_primary: bool) -> Settings:
    """The options as settings, resolv.conf and host name filled in; raises ConfigError.

    `is_primary`: the interface is the pod's first one, whose tap is called tap0.
    """
    resolver = resolv.parse(_read("/etc/resolv.conf"))
    search = resolv.with_subdomain(given["search"] or _usable(resolver.search), given["subdomain"])
    settings = Settings(
        binding=given["binding"],
        primary=is_primary,
        queues=given["queues"],
        mtu=given["mtu"],
        mac=given["mac"],
        hostname=given["hostname"] or os.uname().nodename.partition(".")[0],
        dns=given["dns"] or tuple(str(server) for server in (*resolver.ipv4, *resolver.ipv6)),
        search=search,
        ntp=given["ntp"],
        private=_private_options(given["private_option"]),
        boot_file=given["boot_file"],
        tftp_server=given["tftp_server"],
        lease_s=given["lease_seconds"],
        ports=tuple(_port(text) for text in given["port"]),
        network=given["network"],
        network6=given["network6"],
        owner=given["tap_owner"],
    )
    settings.check()
    return settings


def _usable(search: tuple[str, ...]) -> tuple[str, ...]:
    """What the cluster wrote into resolv.conf is no mistake of the user's: odd words are left out."""
    good, dropped = valid_search_domains(search)
    for name in dropped:
        logger.warning("resolv.conf: %r is no search domain that a guest would take; left out", name)
    return good


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _private_options(texts: tuple[str, ...]) -> dict[int, str]:
    found: dict[int, str] = {}
    for code, value in map(_private, texts):
        if code in found:
            raise ConfigError(f"--private-option={code}={value}: option {code} is given already")
        found[code] = value
    return found


def _private(text: str) -> tuple[int, str]:
    code, equals, value = text.partition("=")
    if not equals or not code.isdecimal():
        raise ConfigError(f"--private-option={text}: write N=VALUE, N from 224 to 254")
    return int(code), value


def _port(text: str) -> Port:
    number, _, protocol = text.partition("/")
    if not number.isdecimal() or not 1 <= int(number) <= 65535 or protocol not in ("", "tcp", "udp", "sctp"):
        raise ConfigError(f"--port={text}: write a port from 1 to 65535, with /tcp, /udp or /sctp if need be")
    return Port(int(number), protocol or "tcp")


def _planned(where: Where, given: dict[str, Any]) -> Pod:
    handover.refuse_host(where.force)
    _check_writable(given["domain_xml"])
    # Read in any case: what the annotation says must be right, also where it is not needed.
    named = primary(network_status(given["network_status"])) if given["network_status"] else ""
    interface = given["interface"] or named
    settings = _settings(given, not interface or interface == (named or "eth0"))
    known = handover.recall(where.state_dir)
    if known is None:
        return handover.look(interface, settings)
    if interface not in ("", known.state.pod.name):
        raise ConfigError(
            f"--state-dir={where.state_dir} belongs to {known.state.pod.name}; give {interface} another one"
        )
    return handover.with_settings(known, settings)


def _check_writable(xml: str) -> None:
    if xml not in ("", "-") and not os.access(Path(xml).parent, os.W_OK):
        raise ConfigError(f"--domain-xml={xml}: cannot write a file there")


def _replace(path: Path, text: str) -> None:
    """Put a new file in the place of whatever has that name: a link there is not followed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        os.fchmod(file.fileno(), 0o644)
    Path(temporary).replace(path)


def _output(pod: Pod, xml: str, arguments: bool) -> None:
    if not xml and not arguments:
        return
    # Imported only when asked for: a restarted launcher should answer its guest at once.
    from launcher import domain

    guest = domain.GuestInterface(
        tap=pod.handover.names.tap,
        mac=pod.state.settings.mac or pod.handover.guest_mac,
        mtu=pod.handover.mtu,
        queues=pod.state.settings.queues if pod.state.settings.queues > 1 else 0,
    )
    if xml == "-":
        click.echo(domain.interface_xml(guest))
    elif xml:
        _replace(Path(xml), domain.interface_xml(guest) + "\n")
    if arguments:
        click.echo(" ".join(domain.qemu_arguments(guest)))


@cli.command()
@plan_options
@click.option("--dry-run", is_flag=True, help="Print what would be done.")
@click.pass_obj
def prepare(where: Where, /, dry_run: bool, **given: Any) -> None:
    """Discover the pod's interface, plan the hand-over and carry it out."""
    pod = _planned(where, given)
    if dry_run:
        for operation in handover.operations(pod):
            click.echo(handover.describe(operation))
        click.echo(pod.nat, nl=False)
    else:
        _prepare(where, pod)
    _output(pod, given["domain_xml"], given["qemu_args"])


def _prepare(where: Where, pod: Pod) -> None:
    count = handover.apply(pod, where.state_dir)
    guest = pod.handover.guest4 or pod.handover.guest6 or "no address"
    logger.info(
        "%s is handed over (%s binding, %d operations): the machine gets %s on %s",
        pod.state.pod.name,
        pod.handover.binding,
        count,
        guest,
        pod.handover.names.tap,
    )


@cli.command(name="serve")
@click.option(
    "--user", type=click.IntRange(0, MAX_USER), default=NOBODY, show_default=True, help="Serve as this user."
)
@click.pass_obj
def serve_command(where: Where, user: int) -> None:
    """Answer the machine's DHCP and router questions, in the foreground."""
    handover.refuse_host(where.force)
    pod = handover.recall(where.state_dir)
    if pod is None:
        raise ConfigError(f"--state-dir={where.state_dir}: nothing is handed over yet; run prepare first")
    _serve(pod, user)


def _serve(pod: Pod, user: int) -> None:
    wake = Wake()
    signal.signal(signal.SIGTERM, wake)
    signal.signal(signal.SIGINT, wake)
    plan = pod.handover
    sockets = Sockets(plan.names.bridge, plan.names.tap, kernel_has_address=plan.binding == "masquerade")
    drop_privileges(user)
    host = handover.host(pod)
    logger.info("serving %s on %s", plan.guest4 or plan.guest6 or "nothing", plan.names.tap)
    serve(host, sockets, wake)
    logger.info("stopped")


@cli.command()
@plan_options
@click.option(
    "--user", type=click.IntRange(0, MAX_USER), default=NOBODY, show_default=True, help="Serve as this user."
)
@click.pass_obj
def run(where: Where, /, user: int, **given: Any) -> None:
    """Prepare, then serve."""
    pod = _planned(where, given)
    _prepare(where, pod)
    _output(pod, given["domain_xml"], given["qemu_args"])
    _serve(pod, user)


@cli.command()
@click.option(
    "-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", show_default=True
)
@click.pass_obj
def show(where: Where, output: str) -> None:
    """Show what is handed over, and what of the plan is still to do."""
    pod = handover.recall(where.state_dir)
    if pod is None:
        raise ConfigError(f"--state-dir={where.state_dir}: nothing is handed over")
    left = [handover.describe(operation) for operation in handover.operations(pod)]
    found, plan = pod.state.pod, pod.handover
    record = {
        "interface": found.name,
        "binding": plan.binding,
        "podAddresses": [str(address) for address in found.addresses],
        "podMAC": found.mac,
        "guestAddress": str(plan.guest4 or ""),
        "guestIPv6Address": str(plan.guest6 or ""),
        "guestMAC": pod.state.settings.mac or plan.guest_mac,
        "server": str(plan.server4.ip) if plan.server4 else "",
        "mtu": plan.mtu,
        "bridge": plan.names.bridge,
        "tap": plan.names.tap,
        "leftToDo": left,
    }
    if output == "json":
        click.echo(json.dumps(record, indent=2))
    elif output == "yaml":
        import yaml

        click.echo(yaml.safe_dump(record, sort_keys=False), nl=False)
    else:
        width = max(map(len, record))
        for name, value in record.items():
            text = ", ".join(value) if isinstance(value, list) else str(value)
            click.echo(f"{name.ljust(width)}  {text or '-'}")


@cli.command()
@click.pass_obj
def restore(where: Where) -> None:
    """Give the pod its interface back, as it was found."""
    handover.refuse_host(where.force)
    pod = handover.recall(where.state_dir)
    if pod is None:
        raise ConfigError(f"--state-dir={where.state_dir}: nothing is handed over")
    count = handover.restore(pod, where.state_dir)
    logger.info("%s is the pod's again (%d operations)", pod.state.pod.name, count)


def main() -> None:
    """Entry point: 0 done, 1 it could not be done, 2 a value or the place is wrong."""
    try:
        cli.main(prog_name="virt-launcher", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except click.Abort:
        sys.exit(130)
    except ConfigError as exc:
        click.echo(f"virt-launcher: {exc}", err=True)
        sys.exit(2)
    except NetworkError as exc:
        click.echo(f"virt-launcher: {exc}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
