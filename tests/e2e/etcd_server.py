"""A real etcd for tests: one member, on free loopback ports or inside a network namespace."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.lab.net import wait_for

START_LIMIT_S, STOP_LIMIT_S = 15.0, 5.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a server and of its clients; with `ask_client` the server wants a client's certificate."""

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path
    ask_client: bool = False


class EtcdServer:
    """One etcd over `data_dir`, which survives `stop`, `kill` and a new `start` on the same ports.

    Without `netns` the ports are chosen from the free ones on `listen_ip`; inside a namespace they are
    2379 and 2380. Its log is `<data_dir>.log`.
    """

    def __init__(
        self,
        data_dir: Path,
        listen_ip: str = "127.0.0.1",
        netns: str | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._log = data_dir.with_name(f"{data_dir.name}.log")
        self._enter = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
        self._tls = tls
        client, peer = (2379, 2380) if netns else _free_ports(listen_ip)
        self.endpoint = f"{'https' if tls else 'http'}://{listen_ip}:{client}"
        self._peer = f"http://{listen_ip}:{peer}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> EtcdServer:
        """Start and wait until it answers; raises RuntimeError with the end of its log if it does not."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log)
        limit = time.monotonic() + START_LIMIT_S
        while self._process.poll() is None and time.monotonic() < limit:
            if self._healthy():
                return self
        self.kill()
        raise RuntimeError(f"etcd did not start: {self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End it in order, if it runs."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would, if it runs."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze it: connections stay, nothing answers. Returns when its last thread has stopped."""
        os.kill(self._pid(), signal.SIGSTOP)
        wait_for(lambda: set(self._thread_states()) == {"T"}, STOP_LIMIT_S, "standstill of etcd", self._log)

    def resume(self) -> None:
        os.kill(self._pid(), signal.SIGCONT)

    def etcdctl(self, *words: str, user: str = "", stdin: str = "") -> str:
        """Run one etcdctl command (as `name:password` if given) and return what it prints."""
        command = [*self._etcdctl(), *(["--user", user] if user else []), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, input=stdin).stdout

    def __enter__(self) -> EtcdServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _pid(self) -> int:
        if self._process is None:
            raise RuntimeError("etcd does not run")
        return self._process.pid

    def _thread_states(self) -> list[str]:
        files = Path(f"/proc/{self._pid()}/task").glob("*/stat")
        return [file.read_text().rpartition(")")[2].split()[0] for file in files]

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.send_signal(signal.SIGCONT)
            self._process.wait()
            self._process = None

    def _command(self) -> list[str]:
        command = [
            *self._enter,
            shutil.which("etcd") or "etcd",
            "--name=test",
            f"--data-dir={self._data_dir}",
            f"--listen-client-urls={self.endpoint}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={self._peer}",
            f"--initial-advertise-peer-urls={self._peer}",
            f"--initial-cluster=test={self._peer}",
            "--heartbeat-interval=20",
            "--election-timeout=200",
        ]
        if self._tls:
            command += [f"--cert-file={self._tls.cert}", f"--key-file={self._tls.key}"]
            if self._tls.ask_client:
                command += ["--client-cert-auth", f"--trusted-ca-file={self._tls.ca}"]
        return command

    def _etcdctl(self) -> list[str]:
        command = [*self._enter, shutil.which("etcdctl") or "etcdctl", f"--endpoints={self.endpoint}"]
        if self._tls:
            command.append(f"--cacert={self._tls.ca}")
            command += [f"--cert={self._tls.client_cert}", f"--key={self._tls.client_key}"]
        return command

    def _healthy(self) -> bool:
        command = [*self._etcdctl(), "--dial-timeout=1s", "--command-timeout=1s", "endpoint", "health"]
        done = subprocess.run(command, check=False, capture_output=True)
        return (
            done.returncode == 0 or b"user name is empty" in done.stderr
        )  # an answer, once users are required


def _free_ports(listen_ip: str) -> tuple[int, int]:
    """Two ports that are free now, held at once so that they differ."""
    with socket.socket() as one, socket.socket() as two:
        one.bind((listen_ip, 0))
        two.bind((listen_ip, 0))
        return one.getsockname()[1], two.getsockname()[1]
