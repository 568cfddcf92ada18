"""A virtual machine in a pod: the pod's interface handed over by `virt-launcher`, a real guest behind it."""

from __future__ import annotations

from pathlib import Path

from tests.lab import vm
from tests.lab.clients import Acquired, acquired_from_line
from tests.lab.net import LabError, Process, wait_for
from tests.lab.node import REPOSITORY, Pod
from tests.lab.vm import Guest

LAUNCHER = (str(REPOSITORY / "dist" / "bin" / "virt-launcher"),)
LEASE_S = 10
DNS = "10.96.0.10"


class Machine:
    """One pod's machine. `state` is what would be the pod's private emptyDir."""

    def __init__(self, pod: Pod, binding: str, lease_s: int = LEASE_S) -> None:
        self.pod = pod
        self.binding = binding
        self.lease_s = lease_s
        self.lab = pod.node.lab
        self.state: Path = self.lab.directory / f"vm-state-{pod.name}"
        self._launcher: Process | None = None
        self._guest: Guest | None = None

    @property
    def launcher(self) -> Process:
        """The running launcher; raises LabError before the first `hand_over`."""
        if self._launcher is None:
            raise LabError(f"no launcher was started for {self.pod.name}")
        return self._launcher

    @property
    def guest(self) -> Guest:
        """The running guest; raises LabError before `boot`."""
        if self._guest is None:
            raise LabError(f"no machine was booted in {self.pod.name}")
        return self._guest

    def command(self, *words: str) -> list[str]:
        """A call of virt-launcher for this pod."""
        return [*LAUNCHER, f"--state-dir={self.state}", *words]

    def hand_over(self) -> None:
        """Start `virt-launcher run` (again) in the pod, and wait until it serves."""
        log = self.lab.directory / f"launcher-{self.pod.name}.log"
        begins = log.read_text().count(" serving ") if log.exists() else 0
        wishes = (
            f"--binding={self.binding}",
            f"--lease-seconds={self.lease_s}",
            f"--hostname={self.pod.name}",
            f"--dns={DNS}",
            "--search=default.svc.cluster.local",
            "--search=cluster.local",
            "--qemu-args",
        )
        argv = self.command("run", *wishes)
        self._launcher = self.lab.spawn(self.pod.netns, f"launcher-{self.pod.name}", argv)
        self._wait_serving(log, begins + 1)

    def _wait_serving(self, log: Path, count: int) -> None:
        def serving() -> bool:
            if log.read_text().count(" serving ") >= count:
                return True
            self.launcher.require_running()
            return False

        wait_for(serving, 10.0, f"service of virt-launcher in {self.pod.name}", log)

    def kill_launcher(self) -> None:
        """kill -9."""
        self.launcher.popen.kill()
        self.launcher.popen.wait(5)

    @property
    def qemu_arguments(self) -> list[str]:
        """What virt-launcher says QEMU needs."""
        lines = [line for line in self.launcher.log.read_text().splitlines() if line.startswith("-netdev")]
        return lines[-1].split()

    def boot(self) -> Guest:
        """Start the guest; returns when its shell answers."""
        self._guest = Guest.boot(self.lab, self.pod.netns, self.pod.name, self.qemu_arguments)
        return self._guest

    def acquire(self) -> Acquired:
        """Have the guest ask for its address; what it was told."""
        self.guest.run(vm.UDHCPC)
        return acquired_from_line(self.guest.wait_text("DHCP bound"))

    def wait_renewed(self, count: int) -> Acquired:
        """Wait until the guest has renewed so many times."""
        return acquired_from_line(self.guest.wait_text("DHCP renew", self.lease_s * 2.0, count))

    def restore(self) -> None:
        """Give the pod its interface back."""
        self.launcher.end()
        self.lab.run(self.pod.netns, *self.command("restore"))
