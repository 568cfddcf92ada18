"""What every store without a central allocator does: one suite over the SQLite file and a real etcd."""

from __future__ import annotations

import random
import sqlite3
import time
import uuid
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from threading import Event
from typing import Protocol

import pytest

from cni.errors import LeaseLost, OutOfSubnets
from flanneld.config import NetConf, parse_netconf, validate
from flanneld.lease import Attributes, Lease, Snapshot
from flanneld.subnet.etcd import EtcdManager
from flanneld.subnet.manager import LEASE_TTL_S, SubnetManager
from flanneld.subnet.sqlite import SqliteManager
from tests.e2e.etcd_server import EtcdServer
from tests.e2e.watching import Watching, wait_for


class Store(Protocol):
    """A store under test, and a way into it that does not use the code under test."""

    def manager(self) -> SubnetManager: ...

    def put(self, lease: Lease, ttl_s: int = 3600) -> None: ...

    def delete(self, key: str) -> None: ...

    def names(self) -> set[str]: ...

    def now(self) -> float: ...

    def pass_time(self, seconds: float) -> None: ...


class SqliteStore:
    """Time is a number here, so that a day can pass."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "state" / "leases.db"
        self._time = 1_700_000_000.0

    def manager(self) -> SubnetManager:
        return SqliteManager(self.path, self.path.with_name("net-conf.json"), self.now)

    def put(self, lease: Lease, ttl_s: int = 3600) -> None:
        with closing(sqlite3.connect(self.path)) as db, db:
            db.execute("UPDATE counter SET revision = revision + 1")
            db.execute(
                "INSERT OR REPLACE INTO lease SELECT ?, ?, ?, ?, ?, ?, revision FROM counter",
                (
                    lease.key,
                    lease.subnet and str(lease.subnet),
                    lease.subnet6 and str(lease.subnet6),
                    str(lease.attrs.public_ip),
                    lease.attrs.encode(),
                    self._time + ttl_s,
                ),
            )

    def delete(self, key: str) -> None:
        with closing(sqlite3.connect(self.path)) as db, db:
            db.execute("DELETE FROM lease WHERE key = ?", (key,))

    def names(self) -> set[str]:
        with closing(sqlite3.connect(self.path)) as db:
            return {key for (key,) in db.execute("SELECT key FROM lease WHERE expires_s > ?", (self._time,))}

    def now(self) -> float:
        return self._time

    def pass_time(self, seconds: float) -> None:
        self._time += seconds


class EtcdStore:
    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self._prefix = f"/{uuid.uuid4()}/network"

    def manager(self) -> SubnetManager:
        return EtcdManager([self._server.endpoint], self._prefix)

    def put(self, lease: Lease, ttl_s: int = 3600) -> None:
        granted = self._server.etcdctl("lease", "grant", str(ttl_s)).split()[1]
        key = f"{self._prefix}/subnets/{lease.key}"
        self._server.etcdctl("put", f"--lease={granted}", key, lease.attrs.encode())

    def delete(self, key: str) -> None:
        assert self._server.etcdctl("del", f"{self._prefix}/subnets/{key}") == "1\n"

    def names(self) -> set[str]:
        found = self._server.etcdctl("get", "--prefix", "--keys-only", f"{self._prefix}/subnets/")
        return {line.rpartition("/")[2] for line in found.split()}

    def now(self) -> float:
        return time.time()

    def pass_time(self, seconds: float) -> None:
        """Real time passes by itself."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd") / "data") as running:
        yield running


@pytest.fixture(params=["sqlite", "etcd"])
def store(request: pytest.FixtureRequest, server: EtcdServer, tmp_path: Path) -> Store:
    return SqliteStore(tmp_path) if request.param == "sqlite" else EtcdStore(server)


@pytest.fixture
def manager(store: Store) -> Iterator[SubnetManager]:
    """A manager over a store that holds the leases of upstream's tests."""
    opened = store.manager()
    opened.stored(IPv4Address("1.2.3.4"))  # makes the SQLite file
    for number, public_ip in {1: "1.1.1.1", 2: "1.1.1.2", 4: "1.1.1.4", 5: "1.1.1.5", 31: "1.1.1.31"}.items():
        store.put(lease(f"10.3.{number}.0/24", public_ip))
    yield opened
    opened.close()


def conf(network: str = "10.3.0.0/16", **extra: object) -> NetConf:
    keys = {"Network": f'"{network}"', **{key: str(value) for key, value in extra.items()}}
    text = "{" + ",".join(f'"{key}": {value}' for key, value in keys.items()) + "}"
    return validate(parse_netconf(text, "test"), "test")


CONF = conf(SubnetMin='"10.3.1.0"', SubnetMax='"10.3.25.0"')
OWN = IPv4Address("1.2.3.4")


def attrs(public_ip: str = "1.2.3.4", data: str = "") -> Attributes:
    return Attributes(IPv4Address(public_ip), backend_type="vxlan" if data else "", backend_data=data)


def lease(subnet: str, public_ip: str = "1.2.3.4") -> Lease:
    return Lease(IPv4Network(subnet), None, attrs(public_ip))


def test_acquire_takes_a_free_subnet_in_range_and_keeps_it(manager: SubnetManager, store: Store) -> None:
    before = store.now()
    first = manager.acquire(CONF, attrs(), None)
    assert first.subnet is not None and first.subnet.prefixlen == 24
    assert IPv4Address("10.3.1.0") <= first.subnet.network_address <= IPv4Address("10.3.25.0")
    assert first.key not in {"10.3.1.0-24", "10.3.2.0-24", "10.3.4.0-24", "10.3.5.0-24"}
    assert first.key in store.names()
    assert before + LEASE_TTL_S <= first.expires_s <= store.now() + LEASE_TTL_S

    again = store.manager().acquire(CONF, attrs(data='{"VNI":1}'), lease("10.3.20.0/24"))
    assert again.subnet == first.subnet
    assert again.attrs == attrs(data='{"VNI":1}')
    assert again.revision > first.revision
    stored = manager.stored(OWN)
    assert stored is not None
    assert (stored.key, stored.attrs) == (again.key, again.attrs)


def test_stored_knows_only_this_public_ip(manager: SubnetManager) -> None:
    assert manager.stored(OWN) is None
    found = manager.stored(IPv4Address("1.1.1.4"))
    assert found is not None
    assert found.key == "10.3.4.0-24"


def test_previous_subnet_is_taken_again(manager: SubnetManager) -> None:
    previous = Lease(IPv4Network("10.3.6.0/24"), None, Attributes())
    assert manager.acquire(CONF, attrs(), previous).key == "10.3.6.0-24"


@pytest.mark.parametrize(
    "previous",
    ["10.4.1.0/24", "10.3.26.0/24", "10.3.0.0/24", "10.3.6.0/25", "10.3.5.0/24"],
    ids=["other network", "above SubnetMax", "below SubnetMin", "other length", "held by another"],
)
def test_previous_subnet_is_not_taken(
    manager: SubnetManager, previous: str, caplog: pytest.LogCaptureFixture
) -> None:
    got = manager.acquire(CONF, attrs(), lease(previous))
    assert got.subnet != IPv4Network(previous)
    assert CONF.subnet_min and got.subnet and got.subnet.network_address >= CONF.subnet_min
    assert "previous-subnet-unused" in caplog.text


def test_a_changed_network_moves_the_lease(manager: SubnetManager, store: Store) -> None:
    old = manager.acquire(CONF, attrs(), None)
    new = manager.acquire(conf("10.4.0.0/16"), attrs(), old)
    assert new.subnet and new.subnet.subnet_of(IPv4Network("10.4.0.0/16"))
    assert old.key not in store.names()
    assert new.key in store.names()


def test_a_lease_outside_the_range_moves_into_it(manager: SubnetManager, store: Store) -> None:
    got = manager.acquire(CONF, attrs("1.1.1.31"), None)
    assert got.key != "10.3.31.0-24"
    assert "10.3.31.0-24" not in store.names()


def test_dual_stack(manager: SubnetManager, store: Store) -> None:
    both = conf("10.3.0.0/16", EnableIPv6="true", IPv6Network='"fd00:3::/48"')
    single = manager.acquire(CONF, attrs(), None)
    v6 = replace(attrs(), public_ipv6=IPv6Address("fd01::4"))
    got = manager.acquire(both, v6, single)
    assert got.subnet and got.subnet6 and got.subnet6.subnet_of(IPv6Network("fd00:3::/48"))
    assert got.key in store.names() and "&fd00:3:0:" in got.key
    assert single.key not in store.names()
    assert manager.acquire(both, v6, None).key == got.key


def test_twenty_nodes_at_once_get_twenty_subnets(manager: SubnetManager, store: Store) -> None:
    """21 subnets are free, so nearly every choice is contended."""

    def join(number: int) -> Lease:
        with closing(store.manager()) as node:
            return node.acquire(CONF, attrs(f"2.0.0.{number}"), None)

    with ThreadPoolExecutor(20) as nodes:
        got = list(nodes.map(join, range(1, 21)))
    assert len({one.key for one in got}) == 20
    assert {one.key for one in got} <= store.names() - {"10.3.31.0-24"}


def test_out_of_subnets_says_what_to_do(manager: SubnetManager) -> None:
    narrow = conf(SubnetMin='"10.3.1.0"', SubnetMax='"10.3.2.0"')
    with pytest.raises(
        OutOfSubnets, match=r"^no free subnet is left in 10\.3\.0\.0/16 \(SubnetLen 24 .* 5 leases\); widen"
    ):
        manager.acquire(narrow, attrs(), None)


def test_watch_sees_what_happens(manager: SubnetManager, store: Store) -> None:
    own = manager.acquire(CONF, attrs(), None)
    with Watching(store.manager()) as watching:
        assert isinstance(watching.updates[0], Snapshot)
        assert set(watching.leases) == store.names()
        assert own.key in watching.leases

        store.put(lease("10.3.77.0/24", "9.9.9.9"))
        watching.wait_until(lambda now: "10.3.77.0-24" in now)
        assert watching.leases["10.3.77.0-24"].attrs.public_ip == IPv4Address("9.9.9.9")

        store.delete("10.3.77.0-24")
        watching.wait_until(lambda now: "10.3.77.0-24" not in now)

        store.put(lease("10.3.78.0/24", "9.9.9.8"), ttl_s=1)
        watching.wait_until(lambda now: "10.3.78.0-24" in now)
        store.pass_time(2)
        watching.wait_until(lambda now: "10.3.78.0-24" not in now)

        assert watching.snapshots == 1
        assert set(watching.leases) == store.names()


def test_folding_a_watch_gives_what_is_stored(manager: SubnetManager, store: Store) -> None:
    rng = random.Random(7)
    with Watching(manager) as watching:
        for step in range(40):
            public_ip = f"3.0.0.{rng.randrange(6)}"
            match rng.randrange(4):
                case 0 if store.names():
                    store.delete(rng.choice(sorted(store.names())))
                case 1:
                    subnet = f"10.3.{100 + rng.randrange(9)}.0/24"
                    store.put(lease(subnet, f"4.0.{subnet.split('.')[2]}.1"))
                case _:
                    manager.acquire(CONF, attrs(public_ip, f'{{"VNI":{step}}}'), None)
        with Watching(store.manager()) as fresh:
            watching.wait_until(lambda now: now == fresh.leases)


def test_renew_extends_and_changes_nothing_else(manager: SubnetManager, store: Store) -> None:
    first = manager.acquire(CONF, attrs(data='{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}'), None)
    with Watching(store.manager()) as watching:
        store.pass_time(23 * 3600)
        before = store.now()
        renewed = manager.renew(first)
        watching.wait_until(lambda now: now[first.key].revision == renewed.revision)
        assert watching.leases[first.key].attrs == first.attrs
    assert (renewed.key, renewed.attrs) == (first.key, first.attrs)
    assert before + LEASE_TTL_S <= renewed.expires_s <= store.now() + LEASE_TTL_S


def test_renew_makes_a_lease_again_that_is_gone(manager: SubnetManager, store: Store) -> None:
    first = manager.acquire(CONF, attrs(), None)
    store.delete(first.key)
    assert manager.renew(first).key == first.key
    assert first.key in store.names()


def test_renew_of_a_lease_that_another_took_is_refused(manager: SubnetManager, store: Store) -> None:
    first = manager.acquire(CONF, attrs(), None)
    store.put(replace(first, attrs=attrs("7.7.7.7")))
    with pytest.raises(LeaseLost, match=rf"{first.key} .*belongs to 7\.7\.7\.7"):
        manager.renew(first)
    taken = manager.stored(IPv4Address("7.7.7.7"))
    assert taken is not None
    assert taken.key == first.key
    assert manager.acquire(CONF, attrs(), first).key != first.key


def test_renew_of_a_lost_lease_respects_a_wider_one(manager: SubnetManager, store: Store) -> None:
    first = manager.acquire(CONF, attrs(), lease("10.3.8.0/24"))
    store.delete(first.key)
    store.put(lease("10.3.8.0/22", "7.7.7.7"))
    with pytest.raises(LeaseLost, match=r"10\.3\.8\.0-22"):
        manager.renew(first)


def test_renew_of_a_lease_that_another_process_moved_is_refused(manager: SubnetManager, store: Store) -> None:
    first = manager.acquire(CONF, attrs(), None)
    moved = store.manager().acquire(conf("10.4.0.0/16"), attrs(), None)
    with pytest.raises(LeaseLost, match=rf"{moved.key} belongs to 1\.2\.3\.4"):
        manager.renew(first)
    assert first.key not in store.names()


@pytest.mark.parametrize("way", ["stop", "close"])
def test_a_silent_watch_ends_within_a_second(store: Store, way: str) -> None:
    manager = store.manager()
    with Watching(manager) as watching:
        began = time.monotonic()
        if way == "stop":
            watching.stop.set()
        else:
            manager.close()
        watching.thread.join(5)
        assert time.monotonic() - began < 1
        assert not watching.thread.is_alive()
        assert watching.error is None
    manager.close()


def test_an_abandoned_watch_leaves_nothing_behind(manager: SubnetManager, store: Store) -> None:
    updates = manager.watch(Event())
    next(updates)
    store.put(lease("10.3.79.0/24", "9.9.9.7"))
    next(updates)
    assert isinstance(updates, Generator)
    updates.close()
    assert manager.acquire(CONF, attrs(), None).subnet


def test_two_watches_see_the_same(manager: SubnetManager, store: Store) -> None:
    with Watching(manager) as one, Watching(store.manager()) as two:
        got = manager.acquire(CONF, attrs(), None)
        wait_for(lambda: got.key in one.leases and got.key in two.leases)
        assert one.leases == two.leases
