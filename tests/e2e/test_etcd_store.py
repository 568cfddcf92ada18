"""The etcd store against a real etcd: flannel's keys and values to the byte, and everything that breaks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from cni.errors import ConfigError, LeaseLost, OutOfSubnets, StoreUnavailable
from flanneld.config import NetConf, parse_netconf, validate
from flanneld.flags import Options
from flanneld.lease import Attributes, Change, Lease, LeaseSet, Snapshot
from flanneld.subnet import etcd
from flanneld.subnet.etcd import EtcdManager
from tests.e2e.etcd_server import EtcdServer, TlsFiles
from tests.e2e.watching import Watching, wait_for

VXLAN = (
    '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
    '"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
)
PEER = '{"PublicIP":"1.1.1.1","PublicIPv6":null,"BackendType":"host-gw"}'
OWN_IP = IPv4Address("1.2.3.4")
OWN = Attributes(OWN_IP)


def conf(text: str) -> NetConf:
    return validate(parse_netconf(text, "test"), "test")


CONF = conf('{"Network": "10.3.0.0/16", "SubnetMin": "10.3.1.0", "SubnetMax": "10.3.25.0"}')


class Keys:
    """One prefix in etcd, written and read with etcdctl, the way upstream's Go client would."""

    def __init__(self, server: EtcdServer) -> None:
        self.server = server
        self.prefix = f"/{uuid.uuid4()}/network"
        self._open = ExitStack()

    def manager(self, **extra: Any) -> EtcdManager:
        return self._open.enter_context(closing(EtcdManager([self.server.endpoint], self.prefix, **extra)))

    def close(self) -> None:
        self._open.close()

    def put(self, name: str, value: str) -> None:
        """Without an etcd lease; the value goes through stdin and so may have any size."""
        self.server.etcdctl("put", f"{self.prefix}/{name}", stdin=value)

    def create(self, name: str, value: str, ttl_s: int = 86400) -> None:
        """Exactly what upstream does: grant, then a transaction on version 0."""
        granted = self.server.etcdctl("lease", "grant", str(ttl_s)).split()[1]
        quoted = json.dumps(value)
        transaction = (
            f'ver("{self.prefix}/{name}") = "0"\n\nput --lease={granted} {self.prefix}/{name} {quoted}\n\n\n'
        )
        assert self.server.etcdctl("txn", stdin=transaction).startswith("SUCCESS")

    def read(self, name: str) -> dict[str, Any] | None:
        found = json.loads(self.server.etcdctl("get", f"{self.prefix}/{name}", "-w", "json"))
        return found["kvs"][0] if "kvs" in found else None

    def text(self, name: str) -> str:
        found = self.read(name)
        assert found is not None, f"{name} does not exist"
        return b64decode(found["value"]).decode()

    def lease_of(self, name: str) -> int:
        found = self.read(name)
        assert found is not None, f"{name} does not exist"
        return int(found.get("lease", 0))

    def leases(self) -> set[int]:
        """Every etcd lease that there is."""
        return {int(word, 16) for word in self.server.etcdctl("lease", "list").splitlines()[1:]}

    def ttl_s(self, etcd_lease: int) -> tuple[int, Sequence[str]]:
        shown = json.loads(
            self.server.etcdctl("lease", "timetolive", "--keys", f"{etcd_lease:x}", "-w", "json")
        )
        return shown["ttl"], [b64decode(key).decode() for key in shown["keys"] or []]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd") / "data") as running:
        yield running


@pytest.fixture
def keys(server: EtcdServer) -> Iterator[Keys]:
    found = Keys(server)
    yield found
    found.close()


@pytest.fixture
def own_keys(tmp_path: Path) -> Iterator[Keys]:
    """A server of the test's own, to be ill-treated."""
    with EtcdServer(tmp_path / "data") as running:
        found = Keys(running)
        yield found
        found.close()


# Keys and values


@pytest.mark.parametrize(
    ("network", "attrs", "name", "value"),
    [
        (
            '{"Network": "10.1.4.0/22", "SubnetLen": 24, "SubnetMin": "10.1.5.0", "SubnetMax": "10.1.5.0"}',
            OWN,
            "subnets/10.1.5.0-24",
            '{"PublicIP":"1.2.3.4","PublicIPv6":null}',
        ),
        (
            '{"Network": "10.5.32.0/20", "SubnetMin": "10.5.34.0", "SubnetMax": "10.5.34.0"}',
            Attributes(
                IPv4Address("192.168.64.3"), None, "vxlan", '{"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}'
            ),
            "subnets/10.5.34.0-24",
            VXLAN,
        ),
        (
            '{"Network": "10.12.12.0/22", "SubnetLen": 24,'
            '"SubnetMin": "10.12.13.0", "SubnetMax": "10.12.13.0",'
            '"EnableIPv6": true, "IPv6Network": "fd00:12::/32", "IPv6SubnetLen": 56,'
            '"IPv6SubnetMin": "fd00:12:13::", "IPv6SubnetMax": "fd00:12:13::"}',
            Attributes(
                IPv4Address("1.2.3.4"),
                IPv6Address("fd01::4"),
                "vxlan",
                '{"VNI":1}',
                '{"VNI":1,"VtepMAC":"m"}',
            ),
            "subnets/10.12.13.0-24&fd00:12:13::-56",
            '{"PublicIP":"1.2.3.4","PublicIPv6":"fd01::4","BackendType":"vxlan","BackendData":{"VNI":1},'
            '"BackendV6Data":{"VNI":1,"VtepMAC":"m"}}',
        ),
    ],
    ids=["public IP only", "vxlan", "dual stack"],
)
def test_keys_and_values_are_flannels(
    keys: Keys, network: str, attrs: Attributes, name: str, value: str
) -> None:
    keys.manager().acquire(conf(network), attrs, None)
    assert keys.text(name) == value


def test_a_lease_lives_a_day_and_each_renewal_has_a_new_etcd_lease(keys: Keys) -> None:
    manager = keys.manager()
    lease = manager.acquire(CONF, OWN, None)
    name = f"subnets/{lease.key}"
    first = keys.lease_of(name)
    ttl_s, attached = keys.ttl_s(first)
    assert 86390 <= ttl_s <= 86400
    assert attached == [f"{keys.prefix}/{name}"]

    manager.renew(lease)
    second = keys.lease_of(name)
    assert second not in (first, 0)
    assert 86390 <= keys.ttl_s(second)[0] <= 86400
    assert keys.ttl_s(first)[1] == []
    assert keys.text(name) == OWN.encode()


def test_a_lease_that_upstream_made_is_ours_if_it_has_our_public_ip(keys: Keys) -> None:
    keys.create("subnets/10.3.9.0-24", VXLAN)
    manager = keys.manager()
    mac = '{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}'
    stored = manager.stored(IPv4Address("192.168.64.3"))
    assert stored is not None
    assert stored.attrs == Attributes(IPv4Address("192.168.64.3"), None, "vxlan", mac)
    got = manager.acquire(CONF, Attributes(IPv4Address("192.168.64.3"), None, "vxlan", '{"VNI":7}'), None)
    assert got.key == "10.3.9.0-24"
    assert keys.text("subnets/10.3.9.0-24") == VXLAN.replace(mac, '{"VNI":7}')


@pytest.mark.parametrize(
    ("value", "attrs"),
    [
        (VXLAN, ("192.168.64.3", None, "vxlan", '{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}', "")),
        ('{"publicip":"1.1.1.1","PUBLICIPV6":null,"backendtype":"udp"}', ("1.1.1.1", None, "udp", "", "")),
        ('{"PublicIP":"1.1.1.1"}', ("1.1.1.1", None, "", "", "")),
        (
            '{"PublicIP":"1.1.1.1","BackendType":"vxlan","BackendData":null}',
            ("1.1.1.1", None, "vxlan", "", ""),
        ),
        ('{"PublicIP":"0.0.0.0","PublicIPv6":"fd01::1"}', (None, "fd01::1", "", "", "")),
        ('{"PublicIPv6":"fd01::1","Unknown":[1]}', (None, "fd01::1", "", "", "")),
        (' {"PublicIP" : "1.1.1.1" , "BackendData":[]} ', ("1.1.1.1", None, "", "[]", "")),
    ],
)
def test_values_that_upstream_reads_are_read(
    keys: Keys, value: str, attrs: tuple[str | None, str | None, str, str, str]
) -> None:
    keys.create("subnets/10.3.9.0-24", value)
    public_ip, public_ipv6, *rest = attrs
    expected = Attributes(
        IPv4Address(public_ip) if public_ip else None,
        IPv6Address(public_ipv6) if public_ipv6 else None,
        *rest,
    )
    with Watching(keys.manager()) as watching:
        assert {key: lease.attrs for key, lease in watching.leases.items()} == {"10.3.9.0-24": expected}


GARBAGE = {
    "subnets/nonsense": PEER,
    "subnets/10.12.13.300-24": PEER,
    "subnets/10.12.13.0-32": PEER,
    "subnets/10.12.13.0-24hi": PEER,
    "subnets/10.3.10.0-24": "{",
    "subnets/10.3.11.0-24": "[]",
    "subnets/10.3.12.0-24": '{"PublicIP":null}',
    "subnets/10.3.13.0-24": '{"PublicIP":"300.1.1.1"}',
    "subnets/10.3.14.0-24": '{"PublicIP":"1.1.1.1","BackendData":' + "[" * 700 + "]" * 700 + "}",
    "subnets/10.3.15.0-24": "not json",
    "subnets/10.3.16.0-24": '{"PublicIP":7}',
}


def test_garbage_is_skipped_and_reported_once(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    keys.create("subnets/10.3.5.0-24", PEER)
    for name, value in GARBAGE.items():
        keys.put(name, value)
    keys.put("subnetsX/10.3.20.0-24", PEER)
    keys.put("subnets", PEER)
    manager = keys.manager()
    for _ in range(2):
        updates = manager.watch(Event())
        snapshot = next(updates)
        assert isinstance(snapshot, Snapshot)
        assert [lease.key for lease in snapshot.leases] == ["10.3.5.0-24"]
    reports = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(reports) == len(GARBAGE)
    for name in GARBAGE:
        assert sum(f"{name}'" in report for report in reports) == 1


def test_garbage_written_under_a_watch_removes_nobody(keys: Keys) -> None:
    keys.create("subnets/10.3.5.0-24", PEER)
    with Watching(keys.manager()) as watching:
        keys.put("subnets/nonsense", "x")
        keys.put("subnets/10.3.5.0-24", "{")
        keys.server.etcdctl("del", f"{keys.prefix}/subnets/nonsense")
        keys.create("subnets/10.3.6.0-24", PEER)
        watching.wait_until(lambda now: "10.3.6.0-24" in now)
        assert set(watching.leases) == {"10.3.5.0-24", "10.3.6.0-24"}
        assert watching.leases["10.3.5.0-24"].attrs.public_ip == IPv4Address("1.1.1.1")
        assert watching.snapshots == 1
        assert watching.error is None


def test_the_subnet_of_an_unreadable_value_is_not_given_away(keys: Keys) -> None:
    keys.put("subnets/10.3.1.0-24", "{")
    two = conf('{"Network": "10.3.0.0/16", "SubnetMin": "10.3.1.0", "SubnetMax": "10.3.2.0"}')
    manager = keys.manager()
    assert manager.acquire(two, OWN, None).key == "10.3.2.0-24"
    with pytest.raises(OutOfSubnets):
        manager.acquire(two, Attributes(IPv4Address("1.2.3.5")), None)


def test_slashes_collapse(server: EtcdServer) -> None:
    keys = Keys(server)
    prefix = f"/{keys.prefix}//"
    keys.put("config", '{"Network": "10.9.0.0/16"}')
    with closing(EtcdManager([server.endpoint], prefix)) as manager:
        lease = manager.acquire(manager.network_config(), OWN, None)
    assert keys.text(f"subnets/{lease.key}") == OWN.encode()


@pytest.mark.parametrize(
    ("prefix", "name", "key"),
    [
        ("/coreos.com/network", "config", "/coreos.com/network/config"),
        ("//coreos.com//network/", "config", "/coreos.com/network/config"),
        ("coreos.com/network", "config", "coreos.com/network/config"),
        ("/a/./b/../c", "config", "/a/c/config"),
        ("/", "config", "/config"),
        ("", "config", "config"),
    ],
)
def test_paths_are_joined_as_in_go(prefix: str, name: str, key: str) -> None:
    assert etcd.join(prefix, name) == key


def test_a_reservation_stays_a_reservation(keys: Keys) -> None:
    keys.put("subnets/10.3.20.0-24", '{"PublicIP":"1.2.3.4"}')
    manager = keys.manager()
    lease = manager.acquire(CONF, OWN, None)
    assert (lease.key, lease.expires_s) == ("10.3.20.0-24", 0)
    assert keys.lease_of("subnets/10.3.20.0-24") == 0
    assert keys.text("subnets/10.3.20.0-24") == OWN.encode()
    assert manager.renew(lease).expires_s == 0
    assert keys.lease_of("subnets/10.3.20.0-24") == 0


def test_more_leases_than_one_default_grpc_message_holds(keys: Keys) -> None:
    padding = "x" * 1_200_000
    for number in range(1, 5):
        keys.put(f"subnets/10.3.{number}.0-24", f'{{"PublicIP":"1.1.1.{number}","BackendData":"{padding}"}}')
    with Watching(keys.manager()) as watching:
        assert len(watching.leases) == 4


# The configuration


def test_a_missing_config_is_waited_for(keys: Keys) -> None:
    manager = keys.manager()
    with pytest.raises(StoreUnavailable, match=rf"{keys.prefix}/config does not exist .* etcdctl .* put"):
        manager.network_config()
    keys.put("config", '{"network": "10.3.0.0/16", "Backend": {"Type": "host-gw"}}')
    got = manager.network_config()
    assert (str(got.network), got.subnet_len, str(got.subnet_min)) == ("10.3.0.0/16", 24, "10.3.1.0")
    keys.put("config", '{"Network": ')
    with pytest.raises(ConfigError, match=f"{keys.prefix}/config"):
        manager.network_config()


def test_ipv6_alone_is_refused(keys: Keys) -> None:
    v6 = conf('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/48"}')
    with pytest.raises(ConfigError, match="EnableIPv4"):
        keys.manager().acquire(v6, Attributes(None, IPv6Address("fd01::1")), None)


def test_the_name_shows_the_previous_subnet(keys: Keys) -> None:
    previous = Lease(IPv4Network("10.3.7.0/24"), IPv6Network("fd00::/64"), Attributes())
    assert keys.manager().name == "Etcd Local Manager with Previous Subnet: None"
    assert keys.manager(previous=previous).name == "Etcd Local Manager with Previous Subnet: 10.3.7.0/24"


# Upstream's vectors for watches, one lease and all of them, and for renewal


def test_the_key_and_value_of_a_lease_under_the_default_prefix(own_keys: Keys) -> None:
    server = own_keys.server
    with closing(EtcdManager([server.endpoint], Options().etcd_prefix)) as manager:
        with pytest.raises(StoreUnavailable, match=r"/coreos\.com/network/config does not exist"):
            manager.network_config()
        one = '{ "Network": "10.1.0.0/16", "SubnetMin": "10.1.5.0", "SubnetMax": "10.1.5.0" }'
        server.etcdctl("put", "/coreos.com/network/config", one)
        manager.acquire(manager.network_config(), OWN, None)
    assert server.etcdctl("get", "--prefix", "/coreos.com/network/subnets").splitlines() == [
        "/coreos.com/network/subnets/10.1.5.0-24",
        '{"PublicIP":"1.2.3.4","PublicIPv6":null}',
    ]


def test_each_event_is_a_batch_of_one_and_own_ones_are_no_peers(keys: Keys) -> None:
    keys.create("subnets/10.3.5.0-24", PEER)
    manager = keys.manager()
    own = manager.acquire(CONF, OWN, None)
    updates = manager.watch(Event())
    known = LeaseSet().fold(next(updates))
    assert [lease.key for lease in known.peers(own)] == ["10.3.5.0-24"]

    keys.create("subnets/10.3.77.0-24", PEER, ttl_s=1)
    added = next(updates)
    assert isinstance(added, tuple)
    assert [(change.key, change.lease is not None) for change in added] == [("10.3.77.0-24", True)]
    assert next(updates) == (Change("10.3.77.0-24", None),)  # etcd ended it

    renewed = manager.renew(own)
    written = next(updates)
    assert isinstance(written, tuple)
    assert [(change.key, change.lease and change.lease.revision) for change in written] == [
        (own.key, renewed.revision)
    ]
    assert [lease.key for lease in known.fold(written).peers(own)] == ["10.3.5.0-24"]
    keys.server.etcdctl("del", f"{keys.prefix}/subnets/{own.key}")
    assert next(updates) == (Change(own.key, None),)


def revision_of(server: EtcdServer) -> int:
    return int(json.loads(server.etcdctl("get", "x", "-w", "json"))["header"]["revision"])


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_own_lease_gone_before_a_compaction_is_missed_in_the_snapshot(own_keys: Keys, restart: bool) -> None:
    keys = own_keys
    keys.create("subnets/10.3.5.0-24", PEER)
    manager = keys.manager()
    own = manager.acquire(CONF, OWN, None)
    updates = manager.watch(Event())
    assert own.key in LeaseSet().fold(next(updates)).by_key
    keys.server.etcdctl("del", f"{keys.prefix}/subnets/{own.key}")
    other = "10.3.6.0-24" if own.key != "10.3.6.0-24" else "10.3.7.0-24"  # ours is drawn by lot
    keys.create(f"subnets/{other}", PEER)
    keys.server.etcdctl("compact", str(revision_of(keys.server)))
    if restart:
        keys.server.kill()
        keys.server.start()
    again = next(updates)
    assert isinstance(again, Snapshot)
    assert {lease.key for lease in again.leases} == {"10.3.5.0-24", other}
    assert manager.renew(own).key == own.key
    live = next(updates)
    assert isinstance(live, tuple)
    assert [change.key for change in live] == [own.key]


def test_a_watch_whose_receiver_is_busy_can_be_cancelled(keys: Keys) -> None:
    manager, stop = keys.manager(), Event()
    updates = manager.watch(stop)
    next(updates)
    keys.create("subnets/10.3.5.0-24", PEER)
    assert next(updates)
    for number in range(20):
        keys.put("subnets/10.3.5.0-24", PEER.replace("1.1.1.1", f"1.1.1.{number}"))
    began = time.monotonic()
    stop.set()
    assert list(updates) == []
    assert time.monotonic() - began < 1


# Trouble


def test_a_store_that_lost_its_data_is_filled_again(own_keys: Keys) -> None:
    keys = own_keys
    manager = keys.manager()
    lease = manager.acquire(CONF, OWN, None)
    with Watching(manager) as watching:
        keys.server.kill()
        watching.thread.join(5)
    shutil.rmtree(keys.server._data_dir)
    keys.server.start()
    assert manager.stored(OWN_IP) is None
    with Watching(manager) as watching:
        assert watching.leases == {}
        again = manager.renew(lease)
        watching.wait_until(lambda now: lease.key in now)
    assert (again.key, again.attrs) == (lease.key, lease.attrs)
    assert keys.text(f"subnets/{lease.key}") == OWN.encode()


def test_a_compacted_history_gives_a_snapshot_and_goes_on(keys: Keys) -> None:
    """The watch is opened after the snapshot was taken in; the history it asks for is gone by then."""
    keys.create("subnets/10.3.5.0-24", PEER)
    updates = keys.manager().watch(Event())
    assert isinstance(next(updates), Snapshot)
    keys.server.etcdctl("del", f"{keys.prefix}/subnets/10.3.5.0-24")
    keys.create("subnets/10.3.6.0-24", PEER)
    keys.server.etcdctl("compact", str(revision_of(keys.server)))
    again = next(updates)
    assert isinstance(again, Snapshot)
    assert [lease.key for lease in again.leases] == ["10.3.6.0-24"]
    keys.create("subnets/10.3.7.0-24", PEER)
    live = next(updates)
    assert isinstance(live, tuple)
    assert [change.key for change in live] == ["10.3.7.0-24"]


def test_a_watch_silent_for_too_long_is_read_anew(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd, "SILENCE_S", 0.2)
    with Watching(keys.manager()) as watching:
        wait_for(lambda: watching.snapshots == 2)
        keys.create("subnets/10.3.6.0-24", PEER)
        watching.wait_until(lambda now: "10.3.6.0-24" in now)
        assert watching.error is None


def test_kill_and_restart(own_keys: Keys) -> None:
    keys = own_keys
    manager = keys.manager()
    lease = manager.acquire(CONF, OWN, None)
    with Watching(manager) as watching:
        keys.server.kill()
        watching.thread.join(5)
        assert isinstance(watching.error, StoreUnavailable)
    with pytest.raises(StoreUnavailable, match=f"etcd at {keys.server.endpoint} does not answer"):
        manager.renew(lease)
    keys.server.start()
    with Watching(manager) as watching:
        assert set(watching.leases) == {lease.key}
        keys.create("subnets/10.3.77.0-24", PEER)
        watching.wait_until(lambda now: "10.3.77.0-24" in now)
    assert manager.acquire(CONF, OWN, None).key == lease.key


def test_a_frozen_etcd_is_noticed_and_left_for_the_next(own_keys: Keys, server: EtcdServer) -> None:
    """Connections stay open and nothing answers: calls have a deadline, the watch has its keepalive."""
    prefix = own_keys.prefix
    own_keys.create("subnets/10.3.5.0-24", PEER)
    with (
        closing(EtcdManager([own_keys.server.endpoint], prefix)) as watcher,
        closing(EtcdManager([own_keys.server.endpoint], prefix)) as alone,
        closing(EtcdManager([own_keys.server.endpoint, server.endpoint], prefix)) as both,
        Watching(watcher) as watching,
    ):
        assert "10.3.5.0-24" in watching.leases
        assert alone.stored(OWN_IP) is None and both.stored(OWN_IP) is None
        own_keys.server.pause()
        began = time.monotonic()
        stopping = Event()
        threading.Timer(0.5, stopping.set).start()
        assert list(alone.watch(stopping)) == []
        assert time.monotonic() - began < 1.5

        with pytest.raises(StoreUnavailable, match="does not answer"):
            alone.stored(OWN_IP)
        assert time.monotonic() - began < 1.5 + etcd.CALL_DEADLINE_S + 1
        assert both.acquire(CONF, OWN, None).subnet
        quick = time.monotonic()
        assert both.stored(OWN_IP) is not None
        assert time.monotonic() - quick < 1

        watching.thread.join(12)
        assert isinstance(watching.error, StoreUnavailable)
        own_keys.server.resume()
        assert alone.stored(IPv4Address("1.1.1.1")) is not None


def test_a_dead_first_endpoint_is_passed_over(keys: Keys) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with closing(EtcdManager([dead, keys.server.endpoint], keys.prefix)) as manager:
            lease = manager.acquire(CONF, OWN, None)
            with Watching(manager) as watching:
                assert set(watching.leases) == {lease.key}
                keys.create("subnets/10.3.77.0-24", PEER)
                watching.wait_until(lambda now: "10.3.77.0-24" in now)
                assert watching.error is None
        with (
            closing(EtcdManager([dead, dead], keys.prefix)) as hopeless,
            pytest.raises(StoreUnavailable, match=f"{dead},{dead} does not answer"),
        ):
            hopeless.stored(OWN_IP)


class Proxy:
    """Passes TCP to etcd; from `deafen` on, answers are swallowed while requests still arrive."""

    def __init__(self, endpoint: str) -> None:
        self._target = endpoint.removeprefix("http://").split(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._deaf = Event()
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def deafen(self) -> None:
        self._deaf.set()

    def close(self) -> None:
        for one in self._sockets:
            with one:
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # its peer was faster
        for thread in self._threads:
            thread.join(5)

    def _spawn(self, work: Any, *args: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        try:
            while True:
                client, _ = self._listener.accept()
                target = socket.create_connection((self._target[0], int(self._target[1])))
                self._sockets += [client, target]
                self._spawn(self._pump, client, target, Event())
                self._spawn(self._pump, target, client, self._deaf)
        except OSError:
            return  # closed

    def _pump(self, source: socket.socket, sink: socket.socket, deaf: Event) -> None:
        try:
            while data := source.recv(65536):
                if not deaf.is_set():
                    sink.sendall(data)
        except OSError:
            return  # closed


@pytest.mark.parametrize("what", ["create", "renew"])
def test_a_write_without_an_answer_is_recognised(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The first endpoint applies the write, its answer is lost; on the second a race seems to be lost."""
    monkeypatch.setattr(etcd, "CALL_DEADLINE_S", 1.0)
    sent: list[str] = []
    with (
        closing(Proxy(keys.server.endpoint)) as proxy,
        closing(EtcdManager([proxy.endpoint, keys.server.endpoint], keys.prefix)) as manager,
    ):
        lease = manager.acquire(CONF, OWN, None) if what == "renew" else None
        call = manager._client.call

        def spy(name: str, *args: Any) -> Any:
            sent.append(name)
            if name == "txn":
                proxy.deafen()
            return call(name, *args)

        monkeypatch.setattr(manager._client, "call", spy)
        got = manager.renew(lease) if lease else manager.acquire(CONF, OWN, None)
    assert sent == ["range", "grant", "txn"]
    found = keys.read(f"subnets/{got.key}")
    assert found is not None
    assert found["mod_revision"] == got.revision
    assert keys.ttl_s(found["lease"])[0] > 86000


def test_a_lost_race_leaves_no_etcd_lease_behind(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    one = conf('{"Network": "10.3.0.0/16", "SubnetMin": "10.3.1.0", "SubnetMax": "10.3.2.0"}')
    before = keys.leases()
    manager = keys.manager()
    call = manager._client.call
    taken: list[str] = []

    def outrun(name: str, request: Any, *args: Any) -> Any:
        """Another node takes the very subnet between our look and our write, once."""
        if name == "txn" and not taken:
            taken.append(request.success[-1].request_put.key.decode().removeprefix(keys.prefix + "/"))
            keys.put(taken[0], PEER)
        return call(name, request, *args)

    monkeypatch.setattr(manager._client, "call", outrun)
    got = manager.acquire(one, OWN, None)
    assert f"subnets/{got.key}" != taken[0]
    assert keys.text(taken[0]) == PEER
    assert keys.leases() - before == {keys.lease_of(f"subnets/{got.key}")}


def test_close_ends_calls_and_later_ones_fail(keys: Keys) -> None:
    manager = keys.manager()
    assert manager.stored(OWN_IP) is None
    manager.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        manager.stored(OWN_IP)
    assert list(manager.watch(Event())) == []


# Who may speak to etcd


def test_users_and_stale_tokens(own_keys: Keys) -> None:
    server, prefix = own_keys.server, own_keys.prefix
    for name in ("root", "flannel"):
        server.etcdctl("user", "add", f"{name}:secret-{name}")
        server.etcdctl("role", "add", name)
        server.etcdctl("user", "grant-role", name, name)
    server.etcdctl("role", "grant-permission", "flannel", "readwrite", "--prefix=true", prefix)

    def manager(user: str = "", secret: str = "", prefix: str = prefix) -> EtcdManager:
        return EtcdManager([server.endpoint], prefix, username=user, password=secret)

    with closing(manager("flannel", "secret-flannel")) as early:
        assert early.stored(OWN_IP) is None
        server.etcdctl("auth", "enable")
        lease = early.acquire(CONF, OWN, None)
        with Watching(early) as watching:
            assert set(watching.leases) == {lease.key}
        server.kill()
        server.start()  # tokens do not survive that
        assert early.renew(lease).key == lease.key
    with closing(manager()) as nobody, pytest.raises(StoreUnavailable, match="user name is empty"):
        nobody.stored(OWN_IP)
    with (
        closing(manager("flannel", "secret-wrong")) as wrong,
        pytest.raises(StoreUnavailable, match="--etcd-password") as refused,
    ):
        wrong.stored(OWN_IP)
    assert "secret-wrong" not in str(refused.value)
    with (
        closing(manager("flannel", "secret-flannel", "/elsewhere")) as astray,
        pytest.raises(StoreUnavailable, match="permission denied"),
    ):
        astray.stored(OWN_IP)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """A CA, a server certificate for 127.0.0.1 and a client certificate."""
    folder = tmp_path_factory.mktemp("tls")

    def make(name: str, *more: str) -> None:
        command = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ]
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-days", "2"]
        subprocess.run([*command, *files, *more], check=True, capture_output=True, cwd=folder)

    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
    make("ca")
    make("other")
    make("server", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
    make("client", *signed)
    return TlsFiles(
        folder / "ca.pem",
        folder / "server.pem",
        folder / "server.key",
        folder / "client.pem",
        folder / "client.key",
        ask_client=True,
    )


def test_tls(tmp_path: Path, tls: TlsFiles) -> None:
    pair: dict[str, Any] = {"certfile": str(tls.client_cert), "keyfile": str(tls.client_key)}
    with EtcdServer(tmp_path / "data", tls=tls) as server:
        bare = server.endpoint.removeprefix("https://")
        for endpoint in (server.endpoint, bare):
            with closing(EtcdManager([endpoint], "/tls", cafile=str(tls.ca), **pair)) as manager:
                lease = manager.acquire(CONF, OWN, None)
                with Watching(manager) as watching:
                    assert set(watching.leases) == {lease.key}
        refused: list[tuple[str, dict[str, Any]]] = [
            (server.endpoint, {"cafile": str(tls.ca)}),
            (server.endpoint, {"cafile": str(tls.ca.with_name("other.pem")), **pair}),
            (f"http://{bare}", {"cafile": str(tls.ca), **pair}),
        ]
        for endpoint, files in refused:
            with (
                closing(EtcdManager([endpoint], "/tls", **files)) as manager,
                pytest.raises(StoreUnavailable, match="does not answer"),
            ):
                manager.stored(OWN_IP)


def test_a_ca_alone_is_used(tmp_path: Path, tls: TlsFiles) -> None:
    """Upstream ignores it, and then trusts nobody."""
    plain = TlsFiles(tls.ca, tls.cert, tls.key, tls.client_cert, tls.client_key)
    with (
        EtcdServer(tmp_path / "data", tls=plain) as server,
        closing(EtcdManager([server.endpoint], "/tls", cafile=str(tls.ca))) as manager,
    ):
        assert manager.acquire(CONF, OWN, None).subnet


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"keyfile": "client.key"}, "--etcd-keyfile=.*client.key is given without --etcd-certfile"),
        ({"certfile": "client.pem"}, "--etcd-certfile=.*client.pem is given without --etcd-keyfile"),
        ({"cafile": "missing.pem"}, "missing.pem"),
        ({"cafile": "client.key"}, "client.key"),
        ({"certfile": "client.pem", "keyfile": "server.key"}, "server.key"),
    ],
)
def test_tls_files_that_cannot_be_right(tls: TlsFiles, files: dict[str, str], said: str) -> None:
    paths: dict[str, Any] = {name: str(tls.ca.with_name(file)) for name, file in files.items()}
    with pytest.raises(ConfigError, match=said):
        EtcdManager(["https://127.0.0.1:2379"], "/tls", **paths)


@pytest.mark.parametrize(
    "endpoint",
    ["", "http://", "http://host", "ftp://host:1", "host:port", "http://host:2379/path", "host:99999"],
)
def test_endpoints_that_cannot_be_right(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--etcd-endpoints"):
        EtcdManager([endpoint], "/p")
    with pytest.raises(ConfigError, match="--etcd-endpoints"):
        EtcdManager([], "/p")


def test_a_server_inside_a_namespace(tmp_path: Path) -> None:
    """The test server's own promise: it listens in there, and not here."""
    name = f"pfl{os.getpid()}-etcd"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        with EtcdServer(tmp_path / "data", netns=name) as inside:
            inside.etcdctl("put", "key", "value")
            assert inside.etcdctl("get", "key", "--print-value-only") == "value\n"
            with (
                closing(EtcdManager([inside.endpoint], "/p")) as outside,
                pytest.raises(StoreUnavailable, match="does not answer"),
            ):
                outside.stored(OWN_IP)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def test_a_lease_taken_over_by_upstream_is_lost(keys: Keys) -> None:
    manager = keys.manager()
    lease = manager.acquire(CONF, OWN, None)
    keys.server.etcdctl("del", f"{keys.prefix}/subnets/{lease.key}")
    keys.create(f"subnets/{lease.key}", VXLAN)
    with pytest.raises(LeaseLost, match=r"belongs to 192\.168\.64\.3"):
        manager.renew(lease)
    assert keys.text(f"subnets/{lease.key}") == VXLAN
    wait_for(lambda: manager.stored(OWN_IP) is None)
