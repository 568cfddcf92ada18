"""The SQLite store by itself: the file, other processes, damage, a full disk, time. See also e2e."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from threading import Event

import pytest

from cni.errors import ConfigError, StoreUnavailable
from flanneld.config import NetConf, parse_netconf, validate
from flanneld.lease import Attributes, Change, Lease, Snapshot
from flanneld.subnet import sqlite
from flanneld.subnet.sqlite import SqliteManager

OWN = Attributes(IPv4Address("1.2.3.4"))


def conf(text: str = '{"Network": "10.3.0.0/16"}') -> NetConf:
    return validate(parse_netconf(text, "test"), "test")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "flannel" / "leases.db"


@pytest.fixture
def manager(path: Path) -> SqliteManager:
    return SqliteManager(path, path.with_name("net-conf.json"))


def test_the_file_is_ours_alone(manager: SqliteManager, path: Path) -> None:
    manager.acquire(conf(), OWN, None)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]
    updates = manager.watch(Event())
    next(updates)
    manager.acquire(conf(), OWN, None)
    beside = [found for found in path.parent.iterdir() if found != path]
    assert beside  # the write-ahead log
    assert all(found.stat().st_mode & 0o077 == 0 for found in beside)


def test_processes_that_start_together_agree(path: Path) -> None:
    """None of them finds the file when it starts."""
    program = (
        "import sys; from ipaddress import IPv4Address; from flanneld.lease import Attributes;"
        "from flanneld.subnet.sqlite import SqliteManager; from flanneld.config import *;"
        "conf = validate(parse_netconf(sys.argv[2], 'test'), 'test');"
        "sys.stdin.read();"
        "lease = SqliteManager(sys.argv[1], '').acquire(conf, Attributes(IPv4Address(sys.argv[3])), None);"
        "print(lease.key)"
    )
    netconf = '{"Network": "10.3.0.0/20", "SubnetLen": 24, "SubnetMin": "10.3.1.0", "SubnetMax": "10.3.8.0"}'
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path), netconf, f"1.1.1.{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for node in nodes:
        assert node.stdin is not None
        node.stdin.close()
    got = set()
    for node in nodes:
        assert node.stdout is not None
        with node.stdout as output:
            got.add(output.read().strip())
        assert node.wait(20) == 0
    assert got == {f"10.3.{number}.0-24" for number in range(1, 9)}


def foreign_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE lease (key TEXT)")


def newer_database(path: Path) -> None:
    SqliteManager(path, "").stored(IPv4Address("1.2.3.4"))
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")


def damaged_lease(path: Path) -> None:
    SqliteManager(path, "").acquire(conf(), OWN, None)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE lease SET attributes = '{'")


def damaged_pages(path: Path) -> None:
    manager = SqliteManager(path, "")
    for number in range(60):
        manager.acquire(conf(), Attributes(IPv4Address(f"1.1.1.{number}")), None)
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_text("just a text\n" * 100), "not a database"),
        (lambda path: path.write_bytes(b""), "no lease database"),
        (foreign_database, "no lease database"),
        (newer_database, "version 2"),
        (damaged_pages, "malformed"),
    ],
    ids=["text", "empty", "foreign", "newer", "damaged pages"],
)
def test_a_file_that_we_cannot_use_stays_as_it_is(tmp_path: Path, spoil: object, said: str) -> None:
    path = tmp_path / "leases.db"
    assert callable(spoil)
    spoil(path)
    before = path.read_bytes()
    manager = SqliteManager(path, "")
    for attempt in (
        lambda: manager.acquire(conf(), OWN, None),
        lambda: manager.stored(IPv4Address("1.2.3.4")),
        lambda: next(manager.watch(Event())),
    ):
        with pytest.raises(ConfigError, match=rf"{path} .*{said}.*move (it|the file) away"):
            attempt()
    assert path.read_bytes() == before


def test_a_row_that_cannot_be_read_is_passed_over_but_for_those_who_choose_a_subnet(tmp_path: Path) -> None:
    path = tmp_path / "leases.db"
    damaged_lease(path)
    manager = SqliteManager(path, "")
    assert next(manager.watch(Event())) == Snapshot(())
    assert manager.stored(IPv4Address("1.2.3.4")) is None
    with pytest.raises(ConfigError, match=r"lease 10\.3\."):
        manager.acquire(conf(), OWN, None)


def test_a_locked_file_is_not_available(
    manager: SqliteManager, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = manager.acquire(conf(), OWN, None)
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_S", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match=rf"{path} .*locked"):
            manager.renew(lease)
        assert manager.stored(IPv4Address("1.2.3.4")) == lease  # readers do not wait for writers
        other.execute("ROLLBACK")
    assert manager.renew(lease).key == lease.key


def test_a_full_disk_is_not_available_and_loses_nothing(manager: SqliteManager, path: Path) -> None:
    """A limit on the size of files stands in for the disk: the kernel refuses the write all the same."""
    lease = manager.acquire(conf(), OWN, None)
    program = (
        "import resource, sys; from ipaddress import IPv4Address; from flanneld.lease import Attributes;"
        "from flanneld.subnet.sqlite import SqliteManager; from flanneld.config import *;"
        "from cni.errors import StoreUnavailable;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "conf = validate(parse_netconf('{\"Network\": \"10.3.0.0/16\"}', 'test'), 'test')\n"
        "try: SqliteManager(sys.argv[1], '').acquire(conf, Attributes(IPv4Address('5.5.5.5')), None)\n"
        "except StoreUnavailable as exc: print(exc)"
    )
    for place in (path, path.with_name("new.db")):
        command = [sys.executable, "-c", program, str(place)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert said.startswith(f"the lease database {place} cannot be used now: ")
    assert not [name for name in os.listdir(path.parent) if "new.db" in name]
    assert manager.stored(IPv4Address("1.2.3.4")) == lease
    assert manager.stored(IPv4Address("5.5.5.5")) is None


def test_a_place_that_cannot_be_written_is_not_available(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot make the lease database"):
        SqliteManager(tmp_path / "file" / "leases.db", "").acquire(conf(), OWN, None)


def test_a_watch_notices_that_the_file_was_replaced(manager: SqliteManager, path: Path) -> None:
    manager.acquire(conf(), OWN, None)
    updates = manager.watch(Event())
    next(updates)
    for found in list(path.parent.iterdir()):
        found.unlink()
    with pytest.raises(StoreUnavailable, match="removed or replaced"):
        next(updates)
    assert next(manager.watch(Event())) == Snapshot(())


def test_a_day_passes(path: Path) -> None:
    now = [1_700_000_000.0]
    manager = SqliteManager(path, "", lambda: now[0])
    lease = manager.acquire(conf(), OWN, None)
    assert lease.expires_s == now[0] + 86400
    updates = manager.watch(Event())
    assert next(updates) == Snapshot((lease,))
    now[0] += 86399
    assert manager.stored(IPv4Address("1.2.3.4")) == lease
    now[0] += 1
    assert manager.stored(IPv4Address("1.2.3.4")) is None
    assert next(updates) == (Change(lease.key, None),)
    one = conf(
        '{"Network": "10.3.0.0/22", "SubnetLen": 24, "SubnetMin": "10.3.1.0", "SubnetMax": "10.3.1.0"}'
    )
    first = manager.acquire(one, Attributes(IPv4Address("7.7.7.7")), None)
    manager.acquire(conf('{"Network": "10.4.0.0/16"}'), Attributes(IPv4Address("8.8.8.8")), None)
    now[0] += 86400
    assert manager.acquire(one, OWN, None).key == first.key
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT public_ip FROM lease").fetchall() == [("1.2.3.4",)]  # none are left lying


def test_ipv6_alone(manager: SqliteManager) -> None:
    v6 = conf('{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:3::/48"}')
    attrs = Attributes(None, IPv6Address("fd01::1"))
    lease = manager.acquire(v6, attrs, None)
    assert lease.subnet is None and lease.subnet6 is not None
    assert manager.acquire(v6, attrs, None).key == lease.key
    renewed = manager.renew(lease)
    assert renewed.key == lease.key
    assert next(manager.watch(Event())) == Snapshot((renewed,))
    assert manager.acquire(v6, Attributes(None, IPv6Address("fd01::2")), lease).key != lease.key


def test_diff_of_equal_views_is_empty_and_applies_in_order() -> None:
    def lease(key: int, revision: int) -> Lease:
        network = conf(f'{{"Network": "10.{key}.0.0/24"}}').network
        return Lease(network, None, OWN, revision=revision)

    known = {"a": lease(1, 1), "b": lease(2, 2), "c": lease(3, 3)}
    assert sqlite.diff(known, dict(known)) == ()
    current = {"b": lease(2, 2), "a": lease(1, 4), "d": lease(4, 5)}
    assert sqlite.diff(known, current) == (
        Change("c", None),
        Change("a", lease(1, 4)),
        Change("d", lease(4, 5)),
    )


def test_the_configuration_comes_from_the_file(
    manager: SqliteManager, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    built_in = manager.network_config()
    assert "net-conf.json does not exist: using the default network" in caplog.text
    assert (str(built_in.network), built_in.subnet_len, built_in.backend_type) == (
        "10.244.0.0/16",
        24,
        "vxlan",
    )
    file = path.with_name("net-conf.json")
    file.parent.mkdir(parents=True)
    file.write_text('{"network": "10.9.0.0/16", "Backend": {"Type": "host-gw"}}')
    config = manager.network_config()
    assert (str(config.network), config.backend_type, config.subnet_len) == ("10.9.0.0/16", "host-gw", 24)
    assert len(caplog.records) == 1
    file.write_text('{"Network": ')
    with pytest.raises(ConfigError, match=str(file)):
        manager.network_config()
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match=f"cannot read the network configuration {file}: "):
        manager.network_config()


def test_the_name_shows_the_file(manager: SqliteManager, path: Path) -> None:
    assert manager.name == f"SQLite Local Manager at {path}"


def test_a_row_is_decoded_when_it_is_new_or_another(path: Path) -> None:
    """At each step of a start, and at each change, all rows are read; those of 5,000 peers take long."""
    decoded: list[None] = []
    netconf = path.with_name("net-conf.json")
    manager = SqliteManager(path, netconf, give_way=lambda: decoded.append(None))
    others = SqliteManager(path, netconf)
    mine = manager.acquire(conf(), OWN, None)
    peers = [IPv4Address(f"9.9.9.{number}") for number in range(10)]
    for peer in peers:
        others.acquire(conf(), Attributes(peer), None)
    assert manager.stored(peers[3]) is not None
    assert len(decoded) == 11
    again = others.acquire(conf(), Attributes(peers[3], backend_type="udp"), None)
    assert manager.stored(peers[3]) == again
    assert manager.renew(mine).key == mine.key
    assert len(decoded) == 12
