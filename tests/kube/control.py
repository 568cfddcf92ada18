"""Driving the double from a test: `KubeServer` is the process, `Control` what the test tells it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.kube.commands import socket_path
from tests.kube.faults import DROP, GONE, REFUSE, RESET, SLOW, STALL, Seen
from tests.kube.objects import fat_node, node, pod
from tests.lab.net import SWITCH, Lab

Json = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[2]
START_LIMIT_S = 20.0
CALL_LIMIT_S = 120.0
LAB_PORT = 6443

STRATEGIC = "application/strategic-merge-patch+json"


class Refused(Exception):
    """The API refused a request made through the control channel; `status` is its answer."""

    def __init__(self, status: Json) -> None:
        super().__init__(f"{status['code']}: {status['message']}")
        self.status = status


@dataclass(frozen=True, slots=True)
class Control:
    """The control channel of the server that runs on `directory`. Every method returns when it is done.

    Changes to nodes go through the API's own code (validation, conflicts, events), as the administrator.
    Verbs are those of RBAC: get, list, watch, create, update, patch, delete; none given means all.
    """

    directory: Path

    # Objects

    def add_node(
        self,
        name: str,
        *pod_cidrs: str,
        annotations: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        address: str = "",
        fat: bool = False,
    ) -> Json:
        """Create a Ready node; without `pod_cidrs` it waits for one, as before the controller's work."""
        made = (fat_node if fat else node)(name, pod_cidrs, annotations, labels, address)
        return self.request("POST", "/api/v1/nodes", made)

    def set_pod_cidrs(self, name: str, *pod_cidrs: str) -> Json:
        """Assign podCIDRs to a node that has none; the API refuses a second time (delete the node)."""
        return self._patch(name, {"spec": {"podCIDR": pod_cidrs[0], "podCIDRs": list(pod_cidrs)}})

    def delete_node(self, name: str) -> None:
        self.request("DELETE", f"/api/v1/nodes/{name}")

    def get_node(self, name: str) -> Json:
        return self.request("GET", f"/api/v1/nodes/{name}")

    def nodes(self) -> list[Json]:
        """All nodes, in order of names."""
        found: list[Json] = self.request("GET", "/api/v1/nodes")["items"]
        return found

    def annotations(self, name: str) -> dict[str, str]:
        found: dict[str, str] = self.get_node(name)["metadata"].get("annotations", {})
        return found

    def set_annotations(self, name: str, values: Mapping[str, str], remove: Sequence[str] = ()) -> Json:
        changed: Json = {**values, **dict.fromkeys(remove)}
        return self._patch(name, {"metadata": {"annotations": changed}})

    def set_condition(self, name: str, kind: str, status: str, reason: str = "", message: str = "") -> Json:
        """Set one condition with the time of now, as its owner would: `kind` is Ready, MemoryPressure, ..."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        condition = {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": moment,
            "lastTransitionTime": moment,
        }
        return self._patch(name, {"status": {"conditions": [condition]}}, "/status")

    def heartbeat(self, name: str) -> Json:
        """What a kubelet writes every five minutes: no lease changes by it. `name` has a Ready condition."""
        return self.set_condition(name, "Ready", "True", "KubeletReady", "kubelet is posting ready status")

    def add_pod(self, namespace: str, name: str, node_name: str = "") -> Json:
        return self.request("POST", f"/api/v1/namespaces/{namespace}/pods", pod(namespace, name, node_name))

    def fill(
        self,
        count: int,
        fat: bool = False,
        first: int = 0,
        annotated: bool = True,
        subnet: str = "",
        address: str = "",
    ) -> int:
        """Create `count` nodes at once (`objects.peers`); return the version after the last."""
        return int(
            self._do(
                "fill", count=count, fat=fat, first=first, annotated=annotated, subnet=subnet, address=address
            )
        )

    def request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        content_type: str = "application/json",
        query: Mapping[str, str] | None = None,
        admin: bool = True,
    ) -> Json:
        """Any request but a watch, past network, faults and counts; raises Refused."""
        answer = self._do(
            "request",
            method=method,
            path=path,
            query=dict(query or {}),
            body=body,
            content_type=content_type,
            admin=admin,
        )
        if answer["code"] >= 400:
            raise Refused(answer["body"])
        found: Json = answer["body"]
        return found

    def _patch(self, name: str, body: Json, subresource: str = "") -> Json:
        return self.request("PATCH", f"/api/v1/nodes/{name}{subresource}", body, STRATEGIC)

    # Faults; each lasts until `clear`, or for `count` requests

    def drop(self, *verbs: str, count: int | None = None) -> None:
        """Close the connection without an answer."""
        self._fault(DROP, verbs, count)

    def stall(self, *verbs: str, count: int | None = None) -> None:
        """Take requests and never answer; open watches fall silent too if `watch` is meant."""
        self._fault(STALL, verbs, count)

    def reset(self, *verbs: str, count: int | None = None) -> None:
        """Reset the connection in the middle of the answer, a watch in the middle of its next line."""
        self._fault(RESET, verbs, count)

    def slow(
        self, *verbs: str, delay_s: float = 0.0, bytes_per_s: float = 0.0, count: int | None = None
    ) -> None:
        """Wait `delay_s` before each answer or watch line, and send at most so many bytes a second."""
        self._fault(SLOW, verbs, count, delay_s=delay_s, bytes_per_s=bytes_per_s)

    def too_many(
        self, *verbs: str, retry_after_s: int = 1, plain: bool = False, count: int | None = None
    ) -> None:
        """429 with Retry-After: a Status, or (`plain`) text as from priority and fairness."""
        self._fault(REFUSE, verbs, count, code=429, retry_after_s=retry_after_s, plain=plain)

    def fail(self, *verbs: str, code: int = 500, count: int | None = None) -> None:
        """500, 503 or 504 with a Status."""
        self._fault(REFUSE, verbs, count, code=code)

    def gone(self, *verbs: str, count: int | None = None) -> None:
        """410 Expired: as the ERROR event of a new watch (the default), or to lists."""
        self._fault(GONE, verbs or ("watch",), count)

    def clear(self) -> None:
        """End all of the faults above."""
        self._do("clear")

    def _fault(self, kind: str, verbs: Sequence[str], count: int | None, **more: object) -> None:
        self._do("fault", kind=kind, verbs=list(verbs), left=count, **more)

    # Credentials and rights

    def expire_token(self, replace: bool = True) -> None:
        """Refuse flannel's token; with `replace` the token file has a new one when this returns."""
        self._do("expire_token", replace=replace)

    def forbid(self, verb: str, resource: str) -> None:
        """Take a right from flannel: `forbid("list", "nodes")`, `forbid("patch", "nodes/status")`."""
        self._do("set_rule", verb=verb, resource=resource, granted=False)

    def allow(self, verb: str, resource: str) -> None:
        self._do("set_rule", verb=verb, resource=resource, granted=True)

    def wrong_ca(self, on: bool = True) -> None:
        """Show new connections a certificate of another CA; open ones go on (`close_connections`)."""
        self._do("wrong_ca", on=on)

    # Watches and versions

    def close_connections(self) -> int:
        """Cut every open connection; return how many."""
        return int(self._do("close_connections"))

    def end_watches(self) -> int:
        """End every open watch in order, as at its timeout; return how many."""
        return int(self._do("end_watches"))

    def compact(self) -> int:
        """Make every version known so far too old (by a new one, which is returned)."""
        return int(self._do("compact"))

    def advance(self, count: int = 1) -> int:
        """Count the version up without touching nodes, as all the rest of a cluster does; return it."""
        return int(self._do("advance", count=count))

    def bookmark(self) -> None:
        """Send a bookmark now, to each watch that takes them."""
        self._do("bookmark")

    def version(self) -> int:
        return int(self._do("version"))

    def watches(self) -> list[int]:
        """For each open watch the version that it began after."""
        return list(self._do("watches"))

    # What the clients did

    def counts(self) -> Counter[str]:
        """Requests since the start or `forget`: `{"list nodes": 1, "patch nodes/status": 2, ...}`."""
        return Counter(self._do("counts"))

    def seen(self) -> list[Seen]:
        """The same requests in their order."""
        return [Seen(**each) for each in self._do("seen")]

    def forget(self) -> None:
        """Begin to count anew."""
        self._do("forget")

    def _do(self, name: str, **arguments: object) -> Any:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(CALL_LIMIT_S)
            with socket_path(self.directory) as path:
                connection.connect(path)
            connection.sendall(json.dumps({"do": name, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as answers:
                line = answers.readline()
        if not line:
            raise ConnectionError(f"{name}: the server ended before it answered")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(f"{name}: {answer['error']}")
        return answer["result"]


class KubeServer:
    """One API server on `directory`; certificates, tokens and (unless lost) objects survive a restart.

    Without a lab it listens on a port of 127.0.0.1 that was free at the first start; with one on
    SWITCH, port 6443, in the switch's namespace. As a context manager it starts, and ends with the block.
    """

    def __init__(
        self, directory: Path, lab: Lab | None = None, bookmark_s: float = 60.0, window: int = 10_000
    ) -> None:
        self.directory = directory
        self.control = Control(directory)
        self.kubeconfig = directory / "kubeconfig"
        self.admin_kubeconfig = directory / "admin.kubeconfig"
        self.service_account = directory / "serviceaccount"
        self.ca = directory / "ca.crt"
        self.log = lab.directory / "kube.log" if lab else directory / "server.log"
        self._lab = lab
        self._listen = f"{SWITCH.ip}:{LAB_PORT}" if lab else "127.0.0.1:0"
        self._options = [f"--bookmark-s={bookmark_s}", f"--window={window}"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return (self.directory / "url").read_text()

    @property
    def address(self) -> tuple[str, int]:
        """IP address and port."""
        host, _, port = self.url.removeprefix("https://").rpartition(":")
        return host, int(port)

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a pod finds the server in-cluster."""
        host, port = self.address
        return {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": str(port)}

    def start(self, lose_data: bool = False) -> Self:
        """Start (again) and wait until it answers; raises RuntimeError with its log if it does not.

        With `lose_data` it begins with no objects and small versions, as after the loss of etcd's disk.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if lose_data:
            (self.directory / "objects.journal").unlink(missing_ok=True)
        self._process = self._spawn()
        limit = time.monotonic() + START_LIMIT_S
        while self._process.poll() is None and time.monotonic() < limit:
            with suppress(OSError):
                self.control.version()
                self._listen = ":".join(map(str, self.address))
                return self
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"the API double did not start: {self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End it in order, if it runs."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would, if it runs."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze it: connections stay, nothing answers, `control` neither. Returns when it stands still."""
        os.kill(self._pid(), signal.SIGSTOP)
        while any(state != "T" for state in self._thread_states()):
            time.sleep(0.001)

    def resume(self) -> None:
        os.kill(self._pid(), signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.kube", f"--listen={self._listen}", f"--dir={self.directory}"]
        command += self._options
        if self._lab is not None:
            return self._lab.spawn(self._lab.switch, "kube", command, cwd=REPOSITORY).popen
        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the API double does not run")
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
