"""Stores that can be hurt: the same faults for each kind, so that the daemon's answer can be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from ipaddress import IPv4Network
from typing import Protocol

from tests.e2e.etcd_server import EtcdServer
from tests.kube.cluster import flags_of, register
from tests.kube.control import KubeServer
from tests.lab.net import SWITCH, Lab
from tests.lab.node import ETCD_PREFIX, Node, Store


class HurtStore(Protocol):
    """A store of leases on the lab's switch."""

    notices_silence: bool
    """Whether a daemon finds out within seconds that a frozen server does not answer."""

    def flags(self, node: Node) -> Store:
        """How this node's daemon reaches it."""
        ...

    def start(self) -> None: ...

    def kill(self) -> None:
        """End it as a crash would."""
        ...

    def pause(self) -> None:
        """Freeze it: connections stay, nothing answers."""
        ...

    def resume(self) -> None: ...

    def lose_data(self) -> None:
        """While it is down: all leases are gone (what the operator or the control plane restores is not)."""
        ...

    def forget_history(self) -> None:
        """No watch can go on from what it saw last."""
        ...

    def hang_up(self) -> None:
        """End all connections."""
        ...

    def forget(self, node: Node) -> None:
        """The node's lease is gone."""
        ...

    def holds(self, node: Node) -> bool:
        """Whether the node's lease is there, with its subnet."""
        ...

    def join(self, number: int) -> IPv4Network:
        """A peer with this number, which does not exist, appears; returns its subnet."""
        ...

    def close(self) -> None: ...


def peer_attributes(number: int) -> dict[str, str]:
    """Public IP and backend data of a peer that does not exist."""
    mac = f"02:00:00:00:99:{number:02x}"
    return {"public_ip": f"192.168.77.{200 + number}", "data": f'{{"VNI":1,"VtepMAC":"{mac}"}}'}


def key_of(node: Node) -> str:
    return f"{ETCD_PREFIX}/subnets/{node.subnet.network_address}-{node.subnet.prefixlen}"


class HurtEtcd:
    """A real etcd."""

    notices_silence = True  # gRPC pings

    def __init__(self, lab: Lab, network: Mapping[str, object]) -> None:
        self._data = lab.directory / "etcd"
        self._network = network
        self._server = EtcdServer(self._data, str(SWITCH.ip), netns=lab.switch)
        self.start()
        self._configure()

    def _configure(self) -> None:
        self._server.etcdctl("put", f"{ETCD_PREFIX}/config", json.dumps(self._network))

    def flags(self, node: Node) -> Store:
        return Store((f"--etcd-endpoints={self._server.endpoint}",), self._server.endpoint)

    def start(self) -> None:
        empty = not self._data.exists()
        self._server.start()
        if empty:
            self._configure()

    def kill(self) -> None:
        self._server.kill()

    def pause(self) -> None:
        self._server.pause()

    def resume(self) -> None:
        self._server.resume()

    def lose_data(self) -> None:
        shutil.rmtree(self._data)

    def forget_history(self) -> None:
        status = json.loads(self._server.etcdctl("endpoint", "status", "-w", "json"))
        self._server.etcdctl("compact", str(status[0]["Status"]["header"]["revision"]))

    def hang_up(self) -> None:
        raise NotImplementedError("etcd has no switch for that")

    def forget(self, node: Node) -> None:
        self._server.etcdctl("del", key_of(node))

    def holds(self, node: Node) -> bool:
        return str(node.address) in self._server.etcdctl("get", key_of(node))

    def join(self, number: int) -> IPv4Network:
        peer = peer_attributes(number)
        value = (
            f'{{"PublicIP":"{peer["public_ip"]}","PublicIPv6":null,'
            f'"BackendType":"vxlan","BackendData":{peer["data"]}}}'
        )
        subnet = IPv4Network(f"10.244.{200 + number}.0/24")
        self._server.etcdctl("put", f"{ETCD_PREFIX}/subnets/10.244.{200 + number}.0-24", value)
        return subnet

    def close(self) -> None:
        self._server.kill()


class HurtKube:
    """The double of the Kubernetes API server."""

    notices_silence = False  # only when two bookmarks are missing, which come once a minute

    def __init__(self, lab: Lab, network: Mapping[str, object]) -> None:
        self._lab, self._network = lab, network
        self._server = KubeServer(lab.directory / "kube", lab).start()
        self._control = self._server.control
        register(self._control, lab, network)
        self._flags = flags_of(lab, self._server, network)
        self._lost = False

    def flags(self, node: Node) -> Store:
        return self._flags

    def start(self) -> None:
        self._server.start(lose_data=self._lost)
        if self._lost:
            # The kubelets register again, and the controller-manager gives what their flags ask for.
            register(self._control, self._lab, self._network)
        self._lost = False

    def kill(self) -> None:
        self._server.kill()

    def pause(self) -> None:
        self._server.pause()

    def resume(self) -> None:
        self._server.resume()

    def lose_data(self) -> None:
        self._lost = True

    def forget_history(self) -> None:
        self._control.compact()

    def hang_up(self) -> None:
        self._control.close_connections()

    def forget(self, node: Node) -> None:
        annotations = self._control.annotations(node.name)
        flannel = [key for key in annotations if key.startswith("flannel.alpha.coreos.com/")]
        self._control.set_annotations(node.name, {}, remove=flannel)

    def holds(self, node: Node) -> bool:
        annotations = self._control.annotations(node.name)
        return annotations.get("flannel.alpha.coreos.com/public-ip") == str(node.address)

    def join(self, number: int) -> IPv4Network:
        peer = peer_attributes(number)
        subnet = IPv4Network(f"10.244.{200 + number}.0/24")
        values = {
            "backend-data": peer["data"],
            "backend-type": "vxlan",
            "kube-subnet-manager": "true",
            "public-ip": peer["public_ip"],
        }
        annotations = {f"flannel.alpha.coreos.com/{key}": value for key, value in values.items()}
        self._control.add_node(f"joined{number}", str(subnet), annotations=annotations)
        return subnet

    def close(self) -> None:
        self._server.kill()
