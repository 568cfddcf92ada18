"""flanneld: flags to values, wiring, signals."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event

from cni import __version__
from cni.errors import ConfigError, NetworkError
from cni.net.kernel import NetlinkKernel
from flanneld import flags, log, startup
from flanneld.config import NetConf
from flanneld.daemon import Daemon
from flanneld.flags import Options
from flanneld.locks import lock_devices, lock_subnet_file
from flanneld.log import logger


def _check_bridge_filter(config: NetConf) -> None:
    """Upstream's demand: with iptables, bridged traffic must be seen by it."""
    if config.enable_nftables:
        return
    for enabled, name in (
        (config.enable_ipv4, "bridge-nf-call-iptables"),
        (config.enable_ipv6, "bridge-nf-call-ip6tables"),
    ):
        path = f"/proc/sys/net/bridge/{name}"
        if enabled and not Path(path).exists():
            raise ConfigError(f"{path} does not exist: load the module with: modprobe br_netfilter")


def serve(options: Options, stop: Event, ready: Event) -> int:
    """The daemon from options to exit code; raises NetworkError when it cannot start."""
    lock = lock_subnet_file(Path(options.subnet_file))
    previous = startup.previous_lease(Path(options.subnet_file))
    manager = startup.subnet_manager(options, previous)
    logger.info("Created subnet manager: %s", manager.name)
    config = startup.until_available("reading the network configuration", manager.network_config, stop)
    _check_bridge_filter(config)
    kernel = NetlinkKernel()
    external = startup.external_interface(kernel, options, config)
    backend = startup.build_backend(config, external)
    claims = lock_devices(backend.devices)
    startup.check_underlay(kernel, config, external)
    existing = startup.check_devices(kernel, backend)
    own = startup.acquire(manager, backend, config, existing, previous, stop)
    peers = startup.until_available("reading leases", lambda: startup.peers(manager, own, stop), stop)
    startup.check_routes(kernel, config, external, own, peers)
    daemon = Daemon(options, manager, kernel, config, external, backend, own, stop, ready)
    daemon.prepare(startup.new_devices(backend, existing))
    try:
        return daemon.run()
    finally:
        for claim in claims:
            claim.close()
        os.close(lock)


def serve_with_probes(options: Options, stop: Event) -> int:
    """`serve`, with the health server beside it if one is asked for."""
    ready = Event()
    if options.healthz_port <= 0:
        return serve(options, stop, ready)
    # Imported only now: most of its weight is the standard library's HTTP server.
    from flanneld.health import HealthServer

    server = HealthServer(options.healthz_ip, options.healthz_port, ready)
    try:
        return serve(options, stop, ready)
    finally:
        server.close()


def run(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """`main` with the command line and the environment as values; returns the exit code."""
    try:
        parsed = flags.parse(argv[1:], environ)
    except flags.VersionAsked:
        print(__version__, file=sys.stderr)  # noqa: T201 - upstream prints it there
        return 0
    except flags.HelpAsked:
        sys.stderr.write(flags.usage(argv[0]))
        return 0
    except flags.FlagError as exc:
        # Exit 0 is upstream's behaviour for every mistake on the command line.
        sys.stderr.write(f"{exc}\n{flags.usage(argv[0])}")
        return 0
    options = parsed.options
    log.setup(options.v)
    for warning in parsed.warnings:
        logger.warning("%s", warning)
    stop = Event()

    def on_signal(_number: int, _frame: object) -> None:
        # A second signal of the kind ends the process at once, as upstream.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        flags.check_ranges(options)
        if refusal := flags.not_yet(options):
            raise ConfigError(refusal)
        logger.info("Starting flanneld %s: %s", __version__, options.redacted())
        return serve_with_probes(options, stop)
    except startup.Stopped:
        logger.info("Exiting cleanly...")
        return 0
    except NetworkError as exc:
        logger.error("%s", exc)
        return 1


def main() -> None:
    """Entry point of the executable."""
    sys.exit(run(sys.argv, os.environ))


if __name__ == "__main__":
    main()
