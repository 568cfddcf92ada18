"""The running node: the threads that keep it as start-up made it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from threading import Event, Thread

from cni.errors import ConfigError, KernelError, LeaseLost, NetworkError, StoreError
from cni.net.entries import Link, Route
from cni.net.firewall import Iptables, Nftables
from cni.net.kernel import Change, Monitor, NetlinkKernel
from cni.net.plan import Operation
from cni.net.ruleset import Firewall
from flanneld import iface, metrics, notify, snapshot, startup
from flanneld.backend.protocol import blackholes
from flanneld.config import NetConf
from flanneld.flags import Options
from flanneld.health import Readiness
from flanneld.iface import ExternalInterface
from flanneld.lease import Lease, Snapshot, Update
from flanneld.log import OncePerChange, logger
from flanneld.masquerade import IPTABLES_CHAINS, NFT_TABLES, FamilyRanges, FirewallSpec, render
from flanneld.reconcile import NETWORK, Reconciler, WorkKey, explain
from flanneld.startup import Start
from flanneld.subnet import envfile
from flanneld.subnet.manager import SubnetManager
from flanneld.workqueue import MonotonicClock

FIREWALL: WorkKey = ("firewall",)
FILES: WorkKey = ("files",)
EXTERNAL: WorkKey = ("external interface",)

# A burst of lease changes writes the state file once.
_FILES_DELAY_S, _FILES_AGAIN_S = 0.5, 3600.0
# A DHCP client that renews takes the address away and gives it back.
_EXTERNAL_SETTLE_S, _ADDRESS_GONE_S = 1.0, 4.0
_WATCH_RETRY_FIRST_S, _WATCH_RETRY_LAST_S = 0.1, 15.0
# A watch that ends sooner was no success: the next one waits longer.
_WATCH_LIVED_S = 60.0
_LEASE_RETRY_FIRST_S, _LEASE_RETRY_LAST_S = 1.0, 60.0
# Two nodes that each take the lease for theirs must not write it in turns as fast as they can: each time
# that somebody else has changed it we wait twice as long, until that has not happened for an hour.
_REWRITE_FIRST_S, _REWRITE_LAST_S, _REWRITE_FORGET_S = 5.0, 900.0, 3600.0
# A machine that slept does not count the sleep as waiting: look at the clock now and then.
_LEASE_LOOK_S = 600.0
_JOIN_S = 5.0


class Outcome(Enum):
    """Why a daemon ended; the value is the exit code, where the process is to end."""

    STOPPED = 0
    FAILED = 1
    START_OVER = -1


class Daemon:
    """The running node: what start-up chose, and the threads that keep it so."""

    def __init__(
        self,
        options: Options,
        manager: SubnetManager,
        kernel: NetlinkKernel,
        start: Start,
        stop: Event,
        readiness: Readiness,
    ) -> None:
        self.options = options
        self.manager = manager
        self.start = start
        self.config = start.config
        self.external = start.external
        self.backend = start.backend
        self.stop = stop
        self.readiness = readiness
        self.outcome = Outcome.STOPPED
        self._kernel = kernel
        self._restored = start.restored
        self._updates = start.updates
        self._lease_work = Event()
        self._renew_asked = False
        self._rewrite_from_s, self._rewrite_gap_s = 0.0, 0.0
        self._take(start.own)
        self._complete_due = True
        self._candidate: ExternalInterface | None = None
        self._firewall, self._other_firewall = _firewalls(start.config)
        self._rules = render(_firewall_spec(options, start.config, start.own, self._firewall))
        self._envfile = envfile.render(start.config, start.own, start.backend.mtu, options.ip_masq)
        chores = {
            FIREWALL: self._check_firewall,
            FILES: self._write_files,
            EXTERNAL: self._check_external,
        }
        self.reconciler = Reconciler(
            kernel,
            self.backend,
            self.config,
            self.own,
            MonotonicClock(),
            chores,
            blackholes(start.config, start.own) if options.ip_blackhole_route else (),
        )
        self.reconciler.on_peers_programmed = self._peers_programmed
        self.reconciler.on_network_refused = self._network_refused

    # ---- start

    def prepare(self) -> None:
        """Device, firewall, subnet file. Raises KernelError or ConfigError and leaves no new device."""
        fresh_devices = startup.new_devices(self.start)
        refused = self.reconciler.prepare()
        if refused:
            self._undo(fresh_devices)
            raise KernelError(explain(refused))
        try:
            self._set_up_firewall()
            envfile.write(self.options.subnet_file, self._envfile)
        except NetworkError:
            self._undo(fresh_devices)
            raise
        logger.info("Wrote subnet file to %s", self.options.subnet_file)

    def _undo(self, devices: Sequence[str]) -> None:
        kernel = NetlinkKernel()
        links = [entry for entry in self.reconciler.wanted.values() if isinstance(entry, Link)]
        kernel.apply([Operation("drop", link) for link in links if link.name in devices])
        kernel.close()

    def _set_up_firewall(self) -> None:
        """Upstream's rule: failing to masquerade ends the start, failing to forward is only logged."""
        try:
            self._other_firewall.remove()
            self._firewall.ensure(self._rules)
        except NetworkError as exc:
            if self.options.ip_masq:
                raise
            logger.error("Forward rules are not in place: %s", exc)

    def run(self) -> Outcome:
        """Serve until stopped; tells whether to start over. The data path is left as it is."""
        logger.info("Running backend.")
        monitor = Monitor(frozenset(self.backend.devices), frozenset({self.external.name}))
        if self.start.doubtful:
            self.reconciler.keep_doubtful(self.start.doubtful)
        if self._restored:
            metrics.RESTORED.set(1)
            self.reconciler.lease_update(Snapshot((self.own, *self.start.peers)))
        threads = [
            self._thread("reconcile", self.reconciler.run),
            self._thread("kernel-events", lambda: self._watch_kernel(monitor)),
            self._thread("leases", self._watch_leases),
            self._thread("own-lease", self._keep_own_lease),
        ]
        self.reconciler.queue.add_after(FIREWALL, float(self.options.iptables_resync))
        self.reconciler.queue.add_after(FILES, _FILES_DELAY_S)
        notify.ready(os.environ)
        self.stop.wait()
        self.reconciler.queue.shut_down()
        self._lease_work.set()
        monitor.wake()
        self.manager.close()
        for thread in threads:
            thread.join(_JOIN_S)
        return self.outcome

    def _thread(self, name: str, body: Callable[[], None]) -> Thread:
        def top() -> None:
            try:
                body()
            except Exception:  # noqa: BLE001 - a thread's top: the process must not live on half dead
                logger.exception("Thread %s failed", name)
                self._end(Outcome.FAILED)

        thread = Thread(target=top, name=name, daemon=True)
        thread.start()
        return thread

    def _end(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.stop.set()

    def _start_over(self, why: str) -> None:
        logger.warning("%s; setting the node up anew", why)
        metrics.STARTS_OVER.inc()
        self.readiness.waiting(f"setting the node up anew: {why}")
        self._end(Outcome.START_OVER)

    # ---- threads

    def _watch_kernel(self, monitor: Monitor) -> None:
        # What changed before the monitor listened is found by the first pass.
        while (changes := monitor.read()) is not None:
            ours = [change for change in changes if self._is_ours(change)]
            if not changes or any(self._moves_us(change) for change in changes):
                self.reconciler.queue.add_after(EXTERNAL, _EXTERNAL_SETTLE_S)
            if ours or not changes:
                self.reconciler.kernel_changes(ours)
        monitor.close()

    def _is_ours(self, change: Change) -> bool:
        """Whether a change may be one of an entry that we want or wrote."""
        if change.link != self.external.name:
            return True
        entry = change.entry
        return isinstance(entry, Route) and (entry.marked or entry.key in self.reconciler.wanted)

    def _moves_us(self, change: Change) -> bool:
        """Whether a change is one of the interface below the overlay that we may have to follow."""
        if change.link != self.external.name:
            return False
        # Routes of a busy router come and go by the thousand, and mean something to direct routing alone.
        return not isinstance(change.entry, Route) or (
            self.backend.follows_routes and not self._is_ours(change)
        )

    def _watch_leases(self) -> None:
        trouble, delay_s = OncePerChange(), _WATCH_RETRY_FIRST_S
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                if self._restored and not self._confirm():
                    return
                updates, self._updates = self._updates or self.manager.watch(self.stop), None
                for update in updates:
                    metrics.STORE_UP.set(1)
                    trouble.over("The store answers again; leases are watched")
                    self.reconciler.lease_update(update)
                    self.reconciler.queue.add_after(FILES, _FILES_DELAY_S)
                    if self._is_told_of(update):
                        self._check_own_lease()
            except (StoreError, ConfigError) as exc:
                metrics.STORE_UP.set(0)
                metrics.STORE_FAILURES.inc()
                trouble.trouble(f"The store is away, the last known leases stay in force: {exc}")
                if time.monotonic() - began > _WATCH_LIVED_S:
                    delay_s = _WATCH_RETRY_FIRST_S
                self.stop.wait(startup.spread(delay_s))
                delay_s = min(delay_s * 2, _WATCH_RETRY_LAST_S)

    def _is_told_of(self, update: Update) -> bool:
        """Whether an update says something about our own lease."""
        return isinstance(update, Snapshot) or any(change.key == self.own.key for change in update)

    def _confirm(self) -> bool:
        """Hold what was restored against the store; False if the node must start over."""
        config, public_ips = self.manager.network_config(), self.manager.public_ips()
        if not snapshot.same_config(config, self.config) or public_ips != self.start.public_ips:
            self._start_over("The configuration in the store is another than the one restored")
            return False
        public_ip = self.own.attrs.public_ip or self.own.attrs.public_ipv6
        known = self.manager.stored(public_ip) if public_ip else None
        lease = self.manager.acquire(self.config, self.own.attrs, self.own)
        if lease.key != self.own.key:
            self._start_over(f"The store gives us the lease {lease.key} where {self.own.key} was restored")
            return False
        if known is None:
            self.reconciler.keep_doubtful(self.start.peers)
        self._restored = 0.0
        self._take(lease)
        metrics.RESTORED.set(0)
        logger.info("The store answers: lease %s is confirmed", lease.key)
        self._say_ready()
        self._lease_work.set()
        return True

    def _check_own_lease(self) -> None:
        """Have our lease written again if the store does not say of us what we said."""
        held = self.reconciler.leases.by_key.get(self.own.key)
        if held is not None and held.attrs == self.own.attrs:
            return
        if held is None:
            # A node that was deleted and made again also lost what `complete` had told.
            self._complete_due = True
        if not self._renew_asked:
            self._renew_asked = True
            if held is None:
                logger.warning("Our lease %s is gone from the store; writing it again", self.own.key)
            else:
                self._give_way(held)
        self._lease_work.set()

    def _give_way(self, held: Lease) -> None:
        """Let longer and longer pass before we write over what somebody else wrote."""
        now = time.monotonic()
        if now > self._rewrite_from_s + _REWRITE_FORGET_S:
            self._rewrite_gap_s = 0.0
        self._rewrite_from_s = now + self._rewrite_gap_s
        logger.warning(
            "Our lease %s was changed to %s by somebody else, maybe another node with our public IP or name; "
            "writing it again as %s in %d s",
            self.own.key,
            held.attrs.encode(),
            self.own.attrs.encode(),
            self._rewrite_gap_s,
        )
        self._rewrite_gap_s = min(max(_REWRITE_FIRST_S, self._rewrite_gap_s * 2), _REWRITE_LAST_S)

    def _keep_own_lease(self) -> None:
        """Renew our lease in time or when it was seen to be gone or changed, and announce that we are up."""
        trouble, pause_s = OncePerChange(), _LEASE_RETRY_FIRST_S
        while self._wait_for_lease_work():
            try:
                self._do_lease_work()
            except LeaseLost as exc:
                self._start_over(str(exc))
            except (StoreError, ConfigError) as exc:
                trouble.trouble(f"Lease {self.own.key} could not be written, trying again: {exc}")
                # News of our own lease end the pause.
                self._lease_work.wait(startup.spread(pause_s))
                pause_s = min(pause_s * 2, _LEASE_RETRY_LAST_S)
                self._lease_work.set()
            else:
                trouble.over(f"Lease {self.own.key} is written")
                pause_s = _LEASE_RETRY_FIRST_S

    def _wait_for_lease_work(self) -> bool:
        """Wait until the lease is to be renewed or somebody set `_lease_work`; False when we are to stop."""
        due_s = math.inf if self._restored else self._until_renewal()
        self._lease_work.wait(min(due_s, _LEASE_LOOK_S))
        self._lease_work.clear()
        return not self.stop.is_set()

    def _do_lease_work(self) -> None:
        if self._restored:
            return
        if self._renew_asked or self._until_renewal() == 0.0:
            if self.stop.wait(max(0.0, self._rewrite_from_s - time.monotonic())):
                return
            self._take(self.manager.renew(self.own))
            self._renew_asked = False
        if self._complete_due and self.readiness.is_ready:
            self.manager.complete(self.own)
            self._complete_due = False

    def _take(self, lease: Lease) -> None:
        """Our lease as the store has it now; when it ends is held on a clock that nobody sets."""
        self.own = lease
        left_s = lease.expires_s - time.time() if lease.expires_s else math.inf
        self._renew_at_s = _uptime_s() + left_s - self.options.subnet_lease_renew_margin * 60.0
        if not self._restored:
            metrics.LEASE_WRITTEN.set_to_current_time()
        metrics.LEASE_EXPIRES.set(lease.expires_s)

    def _until_renewal(self) -> float:
        """Seconds until the lease should be renewed; infinite for one that never ends."""
        return max(0.0, self._renew_at_s - _uptime_s())

    # ---- chores of the work queue

    def _check_firewall(self) -> None:
        self.reconciler.queue.add_after(FIREWALL, float(max(1, self.options.iptables_resync)))
        if self._firewall.ensure(self._rules):
            metrics.FIREWALL_REPAIRS.inc()
            logger.info("Firewall rules had changed and were put back")
        if _read(self.options.subnet_file) != self._envfile:
            envfile.write(self.options.subnet_file, self._envfile)
            logger.info("Subnet file %s had changed and was written again", self.options.subnet_file)

    def _check_external(self) -> None:
        """Follow the external interface: its MTU, and its address once the one we told peers is gone.

        Runs on the worker's thread, which owns the kernel's socket. A choice that cannot be made now
        (the interface is away, has no address yet) is made again later; until then all stays as it is.
        """
        if self.reconciler.queue.num_requeues(NETWORK) or self.backend.follows_routes:
            # A device whose underlay came back is made again at once, not when the back-off has passed.
            self.reconciler.queue.forget(NETWORK)
            self.reconciler.queue.add(NETWORK)
        wanted = startup.wanted_interface(self.options, self.config, self.start.public_ips)
        found = iface.refresh(startup.look_at_host(self._kernel), wanted, self.external)
        if found == self.external:
            self._candidate = None
            return
        startup.build_backend(self._kernel, self.config, found)
        startup.check_underlay(self._kernel, self.config, found)
        moved = replace(found, mtu=self.external.mtu) != self.external
        if moved and self._candidate != found:
            # An address that is away for a moment is not given up for another one.
            self._candidate = found
            self.reconciler.queue.add_after(EXTERNAL, _ADDRESS_GONE_S)
            return
        self._start_over(f"The external interface changed from {self.external} to {found}")

    def state(self) -> snapshot.NodeState:
        """What this node knows now."""
        return snapshot.NodeState(
            pid=os.getpid(),
            written_s=self._restored or time.time(),
            origin=self.start.origin,
            public_ips=self.start.public_ips,
            config=self.config,
            external=self.external,
            own=self.own,
            peers=tuple(self.reconciler.leases.peers(self.own)),
            doubtful=self.reconciler.suspects,
        )

    def _write_files(self) -> None:
        self.reconciler.queue.add_after(FILES, _FILES_AGAIN_S)
        try:
            snapshot.write(Path(self.options.state_dir), self.state())
        except OSError as exc:
            raise ConfigError(
                f"cannot write the node's state to {exc.filename or self.options.state_dir}: {exc.strerror}"
            ) from exc

    def _network_refused(self, why: str) -> None:
        """Our own device cannot be had: the node serves nobody."""
        if not self.stop.is_set():
            self.readiness.waiting(why)

    def _peers_programmed(self) -> None:
        if not self.readiness.is_ready and not self.stop.is_set():
            self._say_ready()
            count = sum(1 for _ in self.reconciler.leases.peers(self.own))
            logger.info("flannel is ready: subnet %s, %d peers programmed", self.own.key, count)
            self._lease_work.set()

    def _say_ready(self) -> None:
        remark = ""
        if self._restored:
            moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self._restored))
            remark = f"restored from what was known at {moment}: the store is away"
        self.readiness.ready(remark)


def _uptime_s() -> float:
    """Seconds since boot, sleep included; no step of the wall clock changes it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _firewalls(config: NetConf) -> tuple[Firewall, Firewall]:
    """The firewall in use, and the one whose rules must go."""
    iptables, nftables = Iptables(IPTABLES_CHAINS), Nftables(NFT_TABLES)
    return (nftables, iptables) if config.enable_nftables else (iptables, nftables)


def _firewall_spec(options: Options, config: NetConf, own: Lease, firewall: Firewall) -> FirewallSpec:
    families = []
    if config.network is not None:
        families.append(FamilyRanges(config.network, own.subnet))
    if config.ipv6_network is not None:
        families.append(FamilyRanges(config.ipv6_network, own.subnet6))
    random_fully = (
        options.ip_masq and not options.ip_masq_fully_random_disable and firewall.supports_random_fully()
    )
    return FirewallSpec(options.ip_masq, options.iptables_forward_rules, random_fully, tuple(families))
