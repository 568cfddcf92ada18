"""dnsmasq as a DHCP server in a namespace: the known good peer of the clients, and of our own server."""

from __future__ import annotations

from collections.abc import Sequence

from tests.lab.net import Lab, Process, program

READY = "sockets bound exclusively to interface"


def dnsmasq(lab: Lab, netns: str, interface: str, flags: Sequence[str]) -> Process:
    """Start a server on `interface` that knows what `flags` say, and return when it listens.

    It has no DNS and reads none of the host's files; its log tells every message and option.
    """
    name = f"dnsmasq-{netns}-{interface}"
    argv = [
        program("dnsmasq"),
        "--conf-file=/dev/null",
        "--keep-in-foreground",
        "--port=0",
        f"--interface={interface}",
        "--bind-interfaces",
        "--no-ping",
        "--dhcp-authoritative",
        "--user=root",
        "--log-facility=-",
        "--log-dhcp",
        "--pid-file=",
        f"--dhcp-leasefile={lab.directory / name}.leases",
        *flags,
    ]
    process = lab.spawn(netns, name, argv)
    process.wait_text(READY)
    return process
