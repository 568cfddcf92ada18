"""flanneld: flags to values, wiring, signals."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Event

from cni import __version__
from cni.errors import ConfigError, KernelError, NetworkError
from cni.net.kernel import NetlinkKernel
from flanneld import flags, log, snapshot, startup
from flanneld.cniserver import CniServer
from flanneld.cnisweep import Sweeper
from flanneld.daemon import Daemon, Outcome
from flanneld.flags import Options
from flanneld.health import HealthServer, Readiness
from flanneld.locks import lock_devices, lock_subnet_file
from flanneld.log import logger
from flanneld.precedence import Precedence
from flanneld.snapshot import NodeState

# A start that follows another so soon has to wait, each time longer.
_START_LIVED_S, _START_PAUSE_FIRST_S, _START_PAUSE_LAST_S = 60.0, 1.0, 60.0


class Termination:
    """The wish to end, and the event by which a daemon's threads hear of it: a new one for each daemon."""

    def __init__(self) -> None:
        self.asked = False
        self.stop = Event()

    def ask(self) -> None:
        """End the daemon that runs, and start no other."""
        self.asked = True
        self.stop.set()

    def fresh(self) -> Event:
        """The event for the next daemon, already set if the end was asked for meanwhile."""
        self.stop = Event()
        if self.asked:
            self.stop.set()
        return self.stop


def serve_once(
    options: Options,
    environ: Mapping[str, str],
    stop: Event,
    readiness: Readiness,
    before: NodeState | None,
    precedence: Precedence,
) -> tuple[Outcome, NodeState]:
    """One daemon from start to end, and what it knew then; raises NetworkError when it cannot start.

    `before` is what the one before it knew, None for the first of this process.
    """
    with ExitStack() as held:
        kernel = held.enter_context(closing(NetlinkKernel(precedence.give_way)))

        def origin(interface: str) -> str:
            return startup.origin(options, kernel, interface)

        def claim(devices: Sequence[str]) -> None:
            for lock in lock_devices(devices):
                held.enter_context(closing(lock))

        saved = before or snapshot.last_known(Path(options.state_dir), origin)
        previous = startup.previous_lease(Path(options.subnet_file), saved)
        manager = startup.subnet_manager(options, previous, environ, precedence.give_way)
        source = startup.Source(manager, saved, stop, readiness)
        try:
            start = startup.decide(options, kernel, source, previous, saved, claim)
        except BaseException:
            manager.close()
            raise
        daemon = Daemon(options, manager, kernel, start, stop, readiness)
        daemon.prepare()
        return daemon.run(), daemon.state()


def serve(
    options: Options, environ: Mapping[str, str], termination: Termination, readiness: Readiness
) -> int:
    """Daemons, one after the other, until one ends for good; returns the exit code.

    Once one has run, a start that fails is no reason to end: the network is there, and the reason may pass.
    """
    lock = lock_subnet_file(Path(options.subnet_file))
    known: NodeState | None = None
    pause_s = 0.0
    # Before the store answers: subnet.env, which the plugins work from, may be there from an earlier start.
    precedence = Precedence()
    cni_server, sweeper = serve_cni(options, precedence), sweep_cni(options)
    try:
        while True:
            began, stop = time.monotonic(), termination.fresh()
            try:
                outcome, known = serve_once(options, environ, stop, readiness, known, precedence)
                if outcome is not Outcome.START_OVER or termination.asked:
                    logger.info("Exiting cleanly...")
                    return max(0, outcome.value)
            except NetworkError as exc:
                if known is None:
                    raise
                logger.error("The node cannot be set up anew, and is tried again: %s", exc)
                readiness.waiting(str(exc))
            if time.monotonic() - began > _START_LIVED_S:
                pause_s = 0.0
            stop_pause = termination.fresh()
            stop_pause.wait(startup.spread(pause_s))
            pause_s = min(max(_START_PAUSE_FIRST_S, pause_s * 2), _START_PAUSE_LAST_S)
    finally:
        if cni_server is not None:
            cni_server.close()
        if sweeper is not None:
            sweeper.close()
        os.close(lock)


def serve_cni(options: Options, precedence: Precedence) -> CniServer | None:
    """The server of CNI calls, None if it is switched off or its socket cannot be made.

    That is no reason to end: the plugin then does the work itself.
    """
    if not options.cni_socket:
        return None
    try:
        return CniServer(options.cni_socket, precedence=precedence)
    except ConfigError as exc:
        logger.error("CNI calls are left to the plugin, where each takes longer: %s", exc)
        return None


def sweep_cni(options: Options) -> Sweeper | None:
    """What drops the firewall entries of pods that are gone, None if CNI is switched off or it cannot listen.

    It runs without the server too: the plugin makes the same entries by itself.
    """
    if not options.cni_socket:
        return None
    try:
        return Sweeper()
    except KernelError as exc:
        logger.error("Firewall entries of pods that are gone may stay: %s", exc)
        return None


def serve_with_probes(options: Options, environ: Mapping[str, str], termination: Termination) -> int:
    """`serve`, with the health server beside it if one is asked for."""
    readiness = Readiness()
    if options.healthz_port <= 0:
        return serve(options, environ, termination, readiness)
    server = HealthServer(options.healthz_ip, options.healthz_port, readiness)
    try:
        return serve(options, environ, termination, readiness)
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
    log.setup(options.v, options.vmodule, options.log_backtrace_at)
    for warning in parsed.warnings:
        logger.warning("%s", warning)
    termination = Termination()

    def on_signal(_number: int, _frame: object) -> None:
        # A second signal of the kind ends the process at once, as upstream.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        termination.ask()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    try:
        flags.check_ranges(options)
        logger.info("Starting flanneld %s: %s", __version__, options.redacted())
        return serve_with_probes(options, environ, termination)
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
