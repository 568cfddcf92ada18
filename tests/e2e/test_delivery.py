"""What is delivered, as a cluster takes it: the image, and the pod of kube-flannel.yml on each node.

outside ── switch (br0), with the API ──┬── node1: the manifest's containers ── pods
                                        └── node2: the manifest's containers ── pods

Each node has a folder for its files (/run, /opt, /etc, /var/lib); its runtime calls the CNI plugins in a
mount namespace where these are at their usual places. So plugin, conflist and paths are the delivered ones.

The API server is the double of tests/kube, on the switch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.kubelet import Cluster, Json, Kubelet, read_manifest, unpack
from tests.kube.control import KubeServer
from tests.lab import traffic
from tests.lab.cni import Attachment, Endpoint, Runtime
from tests.lab.net import ENVIRONMENT, Lab, LabError, Process, program, wait_for
from tests.lab.node import REPOSITORY, UPSTREAM_CNI_BIN

MANIFEST = read_manifest(REPOSITORY / "packaging" / "kube-flannel.yml")
POD_SPEC: Json = MANIFEST["DaemonSet"]["spec"]["template"]["spec"]
FLANNEL: Json = POD_SPEC["containers"][0]
CONFIG: dict[str, str] = MANIFEST["ConfigMap"]["data"]

CAP_NET_ADMIN, CAP_NET_RAW = 1 << 12, 1 << 13
READY_S = 30.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Json]:
    """The image unpacked, and its configuration. PFL_IMAGE names another archive than `make image`'s."""
    archive = os.environ.get("PFL_IMAGE")
    if archive is None:
        archive = "dist/image/flannel.tar"
        # Built anew if it is older than the sources; the environment that runs this test stays as it is.
        subprocess.run(["make", "-s", "-o", ".venv/.done", archive], cwd=REPOSITORY, check=True)
    rootfs = tmp_path_factory.mktemp("image") / "rootfs"
    return rootfs, unpack(REPOSITORY / archive, rootfs)


class Machine:
    """A node of the lab with a kubelet, and a runtime that finds the node's files at their usual places."""

    def __init__(self, lab: Lab, name: str, image: tuple[Path, Json], kube: KubeServer) -> None:
        self.lab = lab
        self.kube = kube
        self.netns = lab.netns(name)
        self.host = lab.directory / f"{name}.host"
        for folder in ("run/netns", "opt", "var/lib", "netns"):
            (self.host / folder).mkdir(parents=True)
        config_maps = {MANIFEST["ConfigMap"]["metadata"]["name"]: CONFIG}
        cluster = Cluster(config_maps, kube.environment, kube.service_account)
        self.kubelet = Kubelet(name, self.netns, self.host, *image, POD_SPEC, cluster)
        # Namespaces that are made later must be seen below /run/netns, hence a slave and no private copy.
        mounts = [
            f"mount --rbind /run/netns {self.host}/netns",
            f"mount --bind {self.host}/run /run",
            f"mount --rbind {self.host}/netns /run/netns",
            f"mount --bind {self.host}/opt /opt",
            f"mount --bind {self.host}/var/lib /var/lib",
            "echo ready",
            "exec sleep infinity",
        ]
        argv = [program("unshare"), "--mount", "--propagation=slave", "sh", "-c", " && ".join(mounts)]
        files = lab.spawn(self.netns, f"files-{name}", argv)
        files.wait_text("ready")
        self._entering = f"nsenter --target {files.child.pid} --mount --net"

    def start(self) -> Process:
        """Start the container of the manifest and wait until its probes succeed."""
        process = self.kubelet.start(FLANNEL)
        for probe in ("livenessProbe", "readinessProbe"):
            self.wait_probe(probe, process)
        return process

    def wait_probe(self, probe: str, process: Process) -> None:
        def succeeds() -> bool:
            process.require_running()
            return self.probe(probe) == 200

        wait_for(succeeds, READY_S, f"success of the {probe} on {self.kubelet.node}", process.log)

    def probe(self, probe: str) -> int:
        """The HTTP status that kubelet's probe sees, 0 if nobody answers."""
        get = FLANNEL[probe]["httpGet"]
        (port,) = [one["containerPort"] for one in FLANNEL["ports"] if one["name"] == get["port"]]
        url = f"http://127.0.0.1:{port}{get['path']}"
        with contextlib.suppress(LabError):
            words = ["--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--max-time", "5"]
            return int(self.lab.run(self.netns, program("curl"), *words, url))
        return 0

    def path(self, path: str) -> Path:
        """A file of the node."""
        return self.host / path.lstrip("/")

    @property
    def conflist(self) -> Json:
        found: Json = json.loads(self.path("/etc/cni/net.d/10-flannel.conflist").read_text())
        return found

    @property
    def subnet_env(self) -> dict[str, str]:
        return dict(line.split("=") for line in self.path("/run/flannel/subnet.env").read_text().splitlines())

    def runtime(self) -> Runtime:
        """A runtime with the installed conflist."""
        return Runtime(self.conflist, [self.shims()], self.host / "cni-cache", self.netns)

    def shims(self) -> Path:
        """A folder of programs that start the plugins among the node's files, ours in front of upstream's."""
        shims = self.host / "runtime"
        shims.mkdir(exist_ok=True)
        for plugin, folder in (("flannel", "/opt/cni/bin"), ("portmap", str(UPSTREAM_CNI_BIN))):
            shim = shims / plugin
            path = f"/opt/cni/bin:{UPSTREAM_CNI_BIN}"
            shim.write_text(f"#!/bin/sh\nCNI_PATH={path} exec {self._entering} {folder}/{plugin}\n")
            shim.chmod(0o755)
        return shims

    def add_pod(self, name: str) -> tuple[Attachment, Endpoint]:
        """Make a pod and attach it to the network."""
        netns = self.lab.add_pod(name)
        attachment = Attachment(container_id=netns, netns=f"/run/netns/{netns}")
        return attachment, Endpoint.of(self.runtime().add(attachment))

    def ping(self, source: Attachment, target: Endpoint) -> None:
        """Ping from a pod of this node, whatever node `target` is on; raises LabError."""
        traffic.ping(self.lab, source.container_id, target.address)


@pytest.fixture
def machines_of(
    lab_of: Callable[[int], Lab], image: tuple[Path, Json], tmp_path: Path
) -> Iterator[Callable[[int], list[Machine]]]:
    """Make so many nodes with their kubelets; nothing of the manifest was started yet."""
    with contextlib.ExitStack() as stack:

        def make(nodes: int) -> list[Machine]:
            lab = lab_of(nodes)
            kube = stack.enter_context(KubeServer(tmp_path / "kube", lab))
            machines = []
            for number, (name, address) in enumerate(lab.nodes.items(), 1):
                kube.control.add_node(name, f"10.244.{number}.0/24", address=str(address))
                machines.append(Machine(lab, name, image, kube))
                stack.callback(machines[-1].kubelet.close)
            return machines

        yield make


# ---- the image


def test_image_holds_the_programs_and_no_more(image: tuple[Path, Json]) -> None:
    rootfs, config = image
    assert config["Entrypoint"] == ["/opt/bin/flanneld"]
    for program_ in ("flanneld", "flannelctl", "install-conf", "install-cni-plugin", "mk-docker-opts.sh"):
        assert os.access(rootfs / "opt/bin" / program_, os.X_OK)
    for tool in ("nft", "ip", "iptables", "ip6tables-restore", "xtables-legacy-multi", "xtables-nft-multi"):
        assert os.access(rootfs / "usr/sbin" / tool, os.X_OK) or os.access(rootfs / "usr/bin" / tool, os.X_OK)
    assert (rootfs / "etc/ssl/certs/ca-certificates.crt").stat().st_size > 0
    executables = {
        one.name
        for folder in ("usr/bin", "usr/sbin", "usr/local/bin", "opt/bin")
        for one in (rootfs / folder).iterdir()
    }
    assert not [name for name in executables if name.startswith(("python", "pip", "gcc", "cc"))]
    # Where the packages came from is nobody's business.
    assert not [one for one in (rootfs / "etc/apt").rglob("*") if one.is_file() and "://" in one.read_text()]
    assert not (rootfs / "src").exists() and not (rootfs / "image").exists()


def test_image_uses_iptables_in_the_mode_of_the_host(machines_of: Callable[[int], list[Machine]]) -> None:
    """kubelet's chains tell the mode: those of table mangle, of nft before those of legacy."""
    (machine,) = machines_of(1)

    def modes() -> set[str]:
        container = {**FLANNEL, "name": "modes", "command": ["/bin/sh", "-c"]}
        programs = "iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore"
        container["args"] = [f"for program in {programs}; do $program --version; done"]
        lines = machine.kubelet.run(container).splitlines()
        assert [line.split()[0] for line in lines] == programs.split()
        return {line.split()[2] for line in lines}

    def chain(mode: str, family: str, name: str) -> None:
        machine.lab.run(machine.netns, f"{family}-{mode}", "-w", "-t", "mangle", "-N", name)

    assert modes() == {"(nf_tables)"}
    chain("legacy", "iptables", "SOMETHING-ELSE")
    assert modes() == {"(nf_tables)"}
    chain("legacy", "ip6tables", "KUBE-KUBELET-CANARY")
    assert modes() == {"(legacy)"}
    chain("nft", "iptables", "KUBE-IPTABLES-HINT")
    assert modes() == {"(nf_tables)"}


def test_asking_for_the_mode_leaves_the_host_as_it_is(machines_of: Callable[[int], list[Machine]]) -> None:
    (machine,) = machines_of(1)
    container = {**FLANNEL, "name": "asking", "command": ["/usr/sbin/iptables"], "args": ["-t", "nat", "-S"]}
    machine.kubelet.run(container)
    tables = machine.lab.run(
        machine.netns, "sh", "-c", "cat /proc/net/ip_tables_names /proc/net/ip6_tables_names"
    )
    assert tables == ""


# ---- the manifest


def test_the_pods_of_the_manifest_make_a_network(machines_of: Callable[[int], list[Machine]]) -> None:
    machines = machines_of(2)
    for machine in machines:
        machine.kubelet.run_init_containers()
        conflist = machine.path("/etc/cni/net.d/10-flannel.conflist")
        assert conflist.read_text() == CONFIG["cni-conf.json"]
        assert stat.S_IMODE(conflist.stat().st_mode) == 0o644
    for machine in machines:
        machine.start()
        assert machine.subnet_env["FLANNEL_NETWORK"] == "10.244.0.0/16"
        assert machine.subnet_env["FLANNEL_IPMASQ"] == "true"
        rules = machine.lab.run(machine.netns, "iptables-save")
        assert '-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG\n' in rules
        assert '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD\n' in rules
    source, _ = machines[0].add_pod("source")
    target, endpoint = machines[1].add_pod("target")
    assert endpoint.address == "10.244.2.2"
    machines[0].ping(source, endpoint)
    machines[1].runtime().delete(target)
    assert machines[1].runtime().add(target)


def test_the_account_of_the_manifest_is_enough(machines_of: Callable[[int], list[Machine]]) -> None:
    """The double grants what the ClusterRole grants; the node's name comes without a request."""
    (machine,) = machines_of(1)
    machine.start()
    control = machine.kube.control

    def network_unavailable() -> list[str]:
        conditions = control.get_node("node1")["status"]["conditions"]
        return [one["status"] for one in conditions if one["type"] == "NetworkUnavailable"]

    wait_for(lambda: network_unavailable() == ["False"], READY_S, "condition NetworkUnavailable=False")
    prefix = "flannel.alpha.coreos.com/"
    annotations = control.annotations("node1")
    assert annotations[f"{prefix}kube-subnet-manager"] == "true"
    assert annotations[f"{prefix}public-ip"] == "192.168.77.11"
    rules = MANIFEST["ClusterRole"]["rules"]
    granted = {f"{verb} {one}" for rule in rules for one in rule["resources"] for verb in rule["verbs"]}
    assert set(control.counts()) <= granted - {"get pods"}


def test_a_node_that_boots_while_the_api_is_away(machines_of: Callable[[int], list[Machine]]) -> None:
    """What is in the manifest's folder /var/lib/flannel is all that is left after a boot."""
    machines = machines_of(2)
    for machine in machines:
        machine.kubelet.run_init_containers()
    daemons = [machine.start() for machine in machines]
    state = machines[0].path("/var/lib/flannel")
    wait_for(
        lambda: any("10.244.2.0" in one.read_text() for one in state.iterdir()), READY_S, f"node2 in {state}"
    )
    before = machines[0].subnet_env
    daemons[0].popen.terminate()
    assert daemons[0].popen.wait(timeout=10) == 0
    machines[0].kube.kill()
    shutil.rmtree(machines[0].path("/run/flannel"))
    machines[0].lab.ip(machines[0].netns, "link delete flannel.1")
    machines[0].kubelet.run_init_containers()
    machines[0].start()
    assert machines[0].subnet_env == before
    source, _ = machines[0].add_pod("source")
    _, endpoint = machines[1].add_pod("target")
    machines[0].ping(source, endpoint)


def test_the_container_runs_with_what_the_manifest_gives_it(
    machines_of: Callable[[int], list[Machine]],
) -> None:
    """Two capabilities, no way to more, nothing writable but its mounts; and nothing in its log about it."""
    (machine,) = machines_of(1)
    daemon = machine.start()
    process = Path(f"/proc/{machine.kubelet.pid()}")
    fields = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    for kind in ("CapBnd", "CapEff", "CapPrm"):
        assert int(fields[kind], 16) == CAP_NET_ADMIN | CAP_NET_RAW
    assert fields["NoNewPrivs"] == "1"
    options = {line.split()[4]: line.split()[5] for line in (process / "mountinfo").read_text().splitlines()}
    assert options["/"].startswith("ro,") and options["/proc/sys"].startswith("ro,")
    log = daemon.log.read_text()
    assert not re.search(r"^[WEF]\d{4} ", log, re.MULTILINE), log


def test_no_start_waits_for_a_name_server(machines_of: Callable[[int], list[Machine]]) -> None:
    """The cluster's name server needs the network that is being made; a question to it takes 10 s here."""
    (machine,) = machines_of(1)
    before = time.monotonic()
    machine.start()
    assert time.monotonic() - before < 8.0


def test_the_network_stays_while_a_pod_is_replaced(machines_of: Callable[[int], list[Machine]]) -> None:
    machines = machines_of(2)
    for machine in machines:
        machine.kubelet.run_init_containers()
    daemons = [machine.start() for machine in machines]
    source, _ = machines[0].add_pod("source")
    _, endpoint = machines[1].add_pod("target")
    before = machines[1].subnet_env
    plugin = machines[1].path("/opt/cni/bin/flannel").readlink()
    daemons[1].popen.terminate()
    assert daemons[1].popen.wait(timeout=10) == 0
    machines[0].ping(source, endpoint)
    machines[1].kubelet.run_init_containers()
    assert machines[1].path("/opt/cni/bin/flannel").readlink() == plugin
    machines[1].start()
    assert machines[1].subnet_env == before
    machines[0].ping(source, endpoint)


# ---- an upgrade of the plugin


@pytest.fixture
def generations(image: tuple[Path, Json]) -> Iterator[Callable[[], str]]:
    """Make the plugin in the image another one with each call, as an upgrade does."""
    mark = image[0] / "opt" / "cni-bin" / "flannel-lib" / "generation"
    numbers = itertools.count()

    def make() -> str:
        mark.write_text(f"{next(numbers)}\n")
        return mark.read_text()

    yield make
    mark.unlink(missing_ok=True)


def installed_generation(machine: Machine) -> str:
    program_ = machine.path("/opt/cni/bin/flannel").resolve()
    return (program_.parent / "flannel-lib" / "generation").read_text()


def test_no_call_fails_while_the_plugin_is_upgraded(
    machines_of: Callable[[int], list[Machine]], generations: Callable[[], str]
) -> None:
    (machine,) = machines_of(1)
    machine.kubelet.run_init_containers()
    machine.start()
    enough = threading.Event()

    def add_pods() -> int:
        added = 0
        while not enough.is_set():
            machine.add_pod(f"pod{added}")
            added += 1
        return added

    with ThreadPoolExecutor(1) as workers:
        adding = workers.submit(add_pods)
        try:
            for _ in range(6):
                generation = generations()
                machine.kubelet.run_init_containers()
                assert installed_generation(machine) == generation
        finally:
            enough.set()
        # At least one for each upgrade, or the test has shown nothing.
        assert adding.result(timeout=60) >= 6


def test_a_call_that_runs_outlives_two_upgrades(
    machines_of: Callable[[int], list[Machine]], generations: Callable[[], str]
) -> None:
    """The cold path waits for its configuration on stdin; most of its modules are loaded only afterwards."""
    (machine,) = machines_of(1)
    machine.kubelet.run_init_containers()
    machine.start()
    netns = machine.lab.add_pod("pod")
    attachment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": netns,
        "CNI_NETNS": f"/run/netns/{netns}",
        "CNI_IFNAME": "eth0",
        "FLANNEL_CNI_SOCKET": "",
    }
    conflist = machine.conflist
    netconf = {**conflist["plugins"][0], "name": conflist["name"], "cniVersion": conflist["cniVersion"]}
    with subprocess.Popen(
        [machine.shims() / "flannel"],
        env={**ENVIRONMENT, **attachment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as call:
        maps = Path(f"/proc/{call.pid}/maps")
        wait_for(
            lambda: "_json" in maps.read_text() or "libpython" in maps.read_text(), 10.0, "the interpreter"
        )
        for _ in range(2):
            generations()
            machine.kubelet.run_init_containers()
        answer, _ = call.communicate(json.dumps(netconf), timeout=30)
    assert call.returncode == 0, answer
    assert Endpoint.of(json.loads(answer)).address


# ---- Docker's options


def test_docker_is_not_started_on_a_subnet_that_lies_elsewhere(lab_of: Callable[[int], Lab]) -> None:
    lab = lab_of(1)
    netns, output = lab.netns("node1"), lab.directory / "docker.env"
    (lab.directory / "subnet.env").write_text("FLANNEL_SUBNET=10.1.74.1/24\n")
    script = REPOSITORY / "packaging" / "mk-docker-opts.sh"
    words = ["sh", str(script), "-f", f"{lab.directory}/subnet.env", "-d", str(output), "-i"]
    lab.ip(netns, "route add 10.1.0.0/16 via 192.168.77.1", "route add 10.1.74.0/24 dev eth0")
    lab.run(netns, *words)
    output.unlink()
    lab.ip(netns, "route replace 10.1.74.0/24 via 192.168.77.1")
    with pytest.raises(LabError, match=r"exit status 1: .*10\.1\.74\.0/24 via 192\.168\.77\.1"):
        lab.run(netns, *words)
    assert output.read_text() == 'DOCKER_OPT_BIP="--bip=10.1.74.1/24"\n'
