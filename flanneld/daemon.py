"""The running node: the threads that keep it as start-up made it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread

from cni.errors import ConfigError, KernelError, LeaseLost, NetworkError, StoreUnavailable
from cni.net.entries import Link
from cni.net.firewall import Iptables, Nftables
from cni.net.kernel import Monitor, NetlinkKernel
from cni.net.plan import Operation
from cni.net.ruleset import Firewall
from flanneld import notify, snapshot
from flanneld.backend.protocol import Backend
from flanneld.config import NetConf
from flanneld.flags import Options
from flanneld.iface import ExternalInterface
from flanneld.lease import Lease
from flanneld.log import OncePerChange, logger
from flanneld.masquerade import IPTABLES_CHAINS, NFT_TABLES, FamilyRanges, FirewallSpec, render
from flanneld.reconcile import Reconciler, WorkKey, explain
from flanneld.subnet import envfile
from flanneld.subnet.manager import SubnetManager
from flanneld.workqueue import MonotonicClock

FIREWALL: WorkKey = ("firewall",)
FILES: WorkKey = ("files",)

# A burst of lease changes writes the state file once.
_FILES_DELAY_S = 0.5
_WATCH_RETRY_FIRST_S, _WATCH_RETRY_LAST_S = 0.1, 5.0
_RENEW_RETRY_S = 60.0
_JOIN_S = 5.0


class Daemon:
    """The running node: what start-up chose, and the threads that keep it so."""

    def __init__(
        self,
        options: Options,
        manager: SubnetManager,
        kernel: NetlinkKernel,
        config: NetConf,
        external: ExternalInterface,
        backend: Backend,
        own: Lease,
        stop: Event,
        ready: Event,
    ) -> None:
        self.options = options
        self.manager = manager
        self.config = config
        self.external = external
        self.backend = backend
        self.own = own
        self.stop = stop
        self.ready = ready
        self.exit_code = 0
        self._renew_now = Event()
        self._firewall, other = _firewalls(config)
        self._other_firewall = other
        self._rules = render(_firewall_spec(options, config, own, self._firewall))
        self._envfile = envfile.render(config, own, backend.mtu, options.ip_masq)
        chores = {FIREWALL: self._check_firewall, FILES: self._write_files}
        self.reconciler = Reconciler(kernel, backend, config, own, MonotonicClock(), chores)
        self.reconciler.on_peers_programmed = self._peers_programmed

    # ---- start

    def prepare(self, fresh_devices: Sequence[str]) -> None:
        """Device, firewall, subnet file. Raises KernelError or ConfigError and leaves no new device."""
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

    def run(self) -> int:
        """Serve until stopped; returns the exit code. The data path is left as it is."""
        monitor = Monitor(frozenset(self.backend.devices))
        threads = [
            self._thread("reconcile", self.reconciler.run),
            self._thread("kernel-events", lambda: self._watch_kernel(monitor)),
            self._thread("leases", self._watch_leases),
            self._thread("renew", self._renew),
        ]
        self.reconciler.queue.add_after(FIREWALL, float(self.options.iptables_resync))
        self.reconciler.queue.add_after(FILES, _FILES_DELAY_S)
        logger.info("Running backend.")
        notify.ready(os.environ)
        self.stop.wait()
        self.reconciler.queue.shut_down()
        self._renew_now.set()
        monitor.wake()
        self.manager.close()
        for thread in threads:
            thread.join(_JOIN_S)
        logger.info("Exiting cleanly...")
        return self.exit_code

    def _thread(self, name: str, body: Callable[[], None]) -> Thread:
        def top() -> None:
            try:
                body()
            except Exception:  # noqa: BLE001 - a thread's top: the process must not live on half dead
                logger.exception("Thread %s failed", name)
                self._end(1)

        thread = Thread(target=top, name=name, daemon=True)
        thread.start()
        return thread

    def _end(self, code: int) -> None:
        self.exit_code = code
        self.stop.set()

    # ---- threads

    def _watch_kernel(self, monitor: Monitor) -> None:
        # What changed before the monitor listened is found by the first pass.
        while (changes := monitor.read()) is not None:
            self.reconciler.kernel_changes(changes)
        monitor.close()

    def _watch_leases(self) -> None:
        trouble, delay_s = OncePerChange(), _WATCH_RETRY_FIRST_S
        while not self.stop.is_set():
            try:
                for update in self.manager.watch(self.stop):
                    trouble.over("The store answers again; leases are watched")
                    delay_s = _WATCH_RETRY_FIRST_S
                    self.reconciler.lease_update(update)
                    self.reconciler.queue.add_after(FILES, _FILES_DELAY_S)
                    self._check_own_lease()
            except (StoreUnavailable, ConfigError) as exc:
                trouble.trouble(f"The store is away, the last known leases stay in force: {exc}")
                self.stop.wait(delay_s)
                delay_s = min(delay_s * 2, _WATCH_RETRY_LAST_S)

    def _check_own_lease(self) -> None:
        held = self.reconciler.leases.by_key.get(self.own.key)
        mine = (self.own.attrs.public_ip, self.own.attrs.public_ipv6)
        if held is None or (held.attrs.public_ip, held.attrs.public_ipv6) != mine:
            logger.warning("Our lease %s is gone from the store; writing it again", self.own.key)
            self._renew_now.set()

    def _renew(self) -> None:
        """Renew before the lease ends, or at once when it is seen to be gone."""
        lease, trouble = self.own, OncePerChange()
        margin_s = self.options.subnet_lease_renew_margin * 60.0
        wait_s: float | None = _until(lease, margin_s)
        while True:
            self._renew_now.wait(wait_s)
            self._renew_now.clear()
            if self.stop.is_set():
                return
            try:
                lease = self.manager.renew(lease)
            except LeaseLost as exc:
                logger.error("%s; restart flanneld to take a new lease", exc)
                self._end(1)
                return
            except (StoreUnavailable, ConfigError) as exc:
                trouble.trouble(f"Lease {lease.key} could not be renewed, trying again: {exc}")
                wait_s = _RENEW_RETRY_S
            else:
                trouble.over(f"Lease {lease.key} is renewed")
                wait_s = _until(lease, margin_s)

    # ---- chores of the work queue

    def _check_firewall(self) -> None:
        self.reconciler.queue.add_after(FIREWALL, float(max(1, self.options.iptables_resync)))
        if self._firewall.ensure(self._rules):
            logger.info("Firewall rules had changed and were put back")
        if _read(self.options.subnet_file) != self._envfile:
            envfile.write(self.options.subnet_file, self._envfile)
            logger.info("Subnet file %s had changed and was written again", self.options.subnet_file)

    def _write_files(self) -> None:
        node = snapshot.NodeState(
            pid=os.getpid(),
            written_s=time.time(),
            config=self.config,
            external=self.external,
            own=self.own,
            peers=tuple(self.reconciler.leases.peers(self.own)),
        )
        try:
            snapshot.write(Path(self.options.state_dir), node)
        except OSError as exc:
            raise ConfigError(
                f"cannot write the node's state to {exc.filename or self.options.state_dir}: {exc.strerror}"
            ) from exc

    def _peers_programmed(self) -> None:
        if not self.ready.is_set():
            self.ready.set()
            count = sum(1 for _ in self.reconciler.leases.peers(self.own))
            logger.info("flannel is ready: subnet %s, %d peers programmed", self.own.key, count)


def _until(lease: Lease, margin_s: float) -> float | None:
    """Seconds until the lease should be renewed; None for one that never ends."""
    return max(0.0, lease.expires_s - margin_s - time.time()) if lease.expires_s else None


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
