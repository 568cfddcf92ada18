"""Leases in an SQLite file: the store of one machine, shared by every flanneld on it.

Nothing has to be installed or started, so this is the default when neither Kubernetes nor etcd is
asked for: trying things out, labs with namespaces as nodes, CI. Semantics are those of the etcd
store: leases of 24 h, one per public IP, a snapshot and then changes.

Decision: the file is complete before it has its name (made aside, then linked into place), so that
processes that start together never see half a schema, and a file that we did not make is never
written to. It must be on a local file system: SQLite's WAL needs shared memory.

Decision: a connection per operation. Operations are rare (a start, a renewal a day) and may come from
any thread; opening costs about a millisecond and leaves no state to guard.

Decision: `watch` polls. SQLite tells no other process of a commit, but `PRAGMA data_version` is one
read of shared memory (some 10 microseconds with the check that the file is still the same one), so
that seven polls a second cost less than a ten-thousandth of a core.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from random import SystemRandom
from threading import Event

from cni.errors import ConfigError, StoreUnavailable
from flanneld.config import DEFAULT_NETCONF, NetConf, parse_netconf, validate
from flanneld.lease import Attributes, Change, Lease, Snapshot, Update
from flanneld.subnet import allocate
from flanneld.subnet.manager import LEASE_TTL_S

log = logging.getLogger("flanneld")

POLL_S = 0.15
BUSY_TIMEOUT_S = 5.0

APPLICATION_ID = 0x666C6E6C  # "flnl": tells our file from any other SQLite file
SCHEMA_VERSION = 1
_SCHEMA = """
    CREATE TABLE counter (revision INTEGER NOT NULL);
    INSERT INTO counter VALUES (0);
    CREATE TABLE lease (
        key TEXT PRIMARY KEY,
        subnet TEXT,
        subnet6 TEXT,
        public_ip TEXT NOT NULL UNIQUE,
        attributes TEXT NOT NULL,
        expires_s REAL NOT NULL,
        revision INTEGER NOT NULL
    );
"""


_Row = tuple[str | None, str | None, str, float, int]


class SqliteManager:
    """Subnet manager over the file `db_path`, which is made (with its directory) when missing.

    `give_way` is called before each lease that is decoded, of which there may be thousands.
    """

    def __init__(
        self,
        db_path: Path | str,
        net_config_path: Path | str,
        clock: Callable[[], float] = time.time,
        give_way: Callable[[], None] = lambda: None,
    ) -> None:
        self._db_path = Path(db_path).absolute()
        self._net_config_path = Path(net_config_path)
        self._clock = clock
        self._rng = SystemRandom()
        self._closed = Event()
        self._reported: set[str] = set()
        self._give_way = give_way
        self._decoded: dict[_Row, Lease] = {}

    @property
    def name(self) -> str:
        return f"SQLite Local Manager at {self._db_path}"

    def network_config(self) -> NetConf:
        """The validated content of the net-conf file, or the built-in network when there is no such file."""
        text: str | bytes = DEFAULT_NETCONF
        source = str(self._net_config_path)
        try:
            text = self._net_config_path.read_bytes()
        except FileNotFoundError:
            source = "the built-in network configuration"
            log.info(
                "%s does not exist: using the default network %s", self._net_config_path, DEFAULT_NETCONF
            )
        except OSError as exc:
            raise ConfigError(f"cannot read the network configuration {source}: {exc.strerror}") from exc
        return validate(parse_netconf(text, source), source)

    def public_ips(self) -> tuple[str, str]:
        """Nothing: only Kubernetes keeps addresses of nodes for the operator."""
        return "", ""

    def stored(self, public_ip: IPv4Address | IPv6Address) -> Lease | None:
        """The lease in force of this public IP."""
        with self._connection() as db:
            leases = self._leases(db)
        return next((lease for lease in leases.values() if allocate.holds(lease, public_ip)), None)

    def acquire(self, config: NetConf, attrs: Attributes, previous: Lease | None) -> Lease:
        """Take or take over a lease in one transaction, so that no race can be lost."""
        with self._transaction() as db:
            leases = tuple(self._leases(db, strict=True).values())
            decision = allocate.choose(config, leases, allocate.owner(attrs), previous, self._rng)
            match decision:
                case allocate.Keep(lease):
                    lease = replace(lease, attrs=attrs)
                case allocate.Create(subnet, subnet6, drop, note):
                    lease = Lease(subnet, subnet6, attrs)
                    db.executemany("DELETE FROM lease WHERE key = ?", [(old.key,) for old in drop])
                    if note:
                        log.warning("previous-subnet-unused store=%s reason=%s", self._db_path, note)
            return self._put(db, lease)

    def renew(self, lease: Lease) -> Lease:
        """Write the lease again with a new expiration; one that is gone is made again if still free."""
        with self._transaction() as db:
            allocate.require_ours(lease, self._leases(db).values(), str(self._db_path))
            return self._put(db, lease)

    def complete(self, lease: Lease) -> None:
        """Nothing: nobody asks this store whether the node is up."""

    def watch(self, stop: Event) -> Iterator[Update]:
        """Yield a snapshot, then changes at most `POLL_S` seconds old; expired leases count as removed."""
        with closing(self._connect()) as db:
            identity = self._identity()
            version, leases = self._read(db)
            yield Snapshot(tuple(leases.values()))
            while not (stop.wait(POLL_S) or self._closed.is_set()):
                if self._identity() != identity:
                    raise StoreUnavailable(f"the lease database {self._db_path} was removed or replaced")
                if self._unchanged(db, version, leases.values()):
                    continue
                known = leases
                version, leases = self._read(db)
                changes = diff(known, leases)
                if changes:
                    yield changes

    def close(self) -> None:
        """End every running `watch`."""
        self._closed.set()

    def _identity(self) -> tuple[int, int]:
        try:
            found = os.stat(self._db_path)
        except OSError:
            return 0, 0
        return found.st_dev, found.st_ino

    def _unchanged(self, db: sqlite3.Connection, version: int, leases: Iterable[Lease]) -> bool:
        with _explained(self._db_path):
            if _pragma(db, "data_version") != version:
                return False
        now = self._clock()
        return all(lease.expires_s > now for lease in leases)

    def _read(self, db: sqlite3.Connection) -> tuple[int, dict[str, Lease]]:
        """The version first: a commit between the two reads is then seen twice, never missed."""
        with _explained(self._db_path):
            version = _pragma(db, "data_version")
            return version, self._leases(db)

    def _leases(self, db: sqlite3.Connection, strict: bool = False) -> dict[str, Lease]:
        """The leases in force by key, oldest first.

        A row that cannot be read is reported and passed over; with `strict`, for those who choose a subnet
        and must know which are taken, it raises ConfigError. Rows of the last time are not decoded again.
        """
        rows = db.execute(
            "SELECT subnet, subnet6, attributes, expires_s, revision FROM lease"
            " WHERE expires_s > ? ORDER BY revision",
            (self._clock(),),
        )
        read = self._lease if strict else self._readable
        known, decoded = self._decoded, dict[_Row, Lease]()
        for row in rows:
            lease = known.get(row) or read(row)
            if lease is not None:
                decoded[row] = lease
        self._decoded = decoded
        return {lease.key: lease for lease in decoded.values()}

    def _readable(self, row: _Row) -> Lease | None:
        """The lease of a row, None for one that cannot be read: it is reported once, the others count on."""
        try:
            return self._lease(row)
        except ConfigError as exc:
            if str(exc) not in self._reported:
                self._reported.add(str(exc))
                log.warning("%s; the lease is passed over", exc)
            return None

    def _lease(self, row: _Row) -> Lease:
        subnet, subnet6, attributes, expires_s, revision = row
        self._give_way()
        try:
            return Lease(
                IPv4Network(subnet) if subnet else None,
                IPv6Network(subnet6) if subnet6 else None,
                Attributes.decode(attributes),
                expires_s,
                revision,
            )
        except ValueError as exc:
            raise _damaged(self._db_path, f"lease {subnet or subnet6}: {exc}") from exc

    def _put(self, db: sqlite3.Connection, lease: Lease) -> Lease:
        (revision,) = db.execute("UPDATE counter SET revision = revision + 1 RETURNING revision").fetchone()
        lease = replace(lease, expires_s=self._clock() + LEASE_TTL_S, revision=revision)
        db.execute(
            "INSERT OR REPLACE INTO lease VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                lease.key,
                str(lease.subnet) if lease.subnet else None,
                str(lease.subnet6) if lease.subnet6 else None,
                str(allocate.owner(lease.attrs)),
                lease.attrs.encode(),
                lease.expires_s,
                lease.revision,
            ),
        )
        return lease

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction without expired leases; an error inside leaves the file as it was."""
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("DELETE FROM lease WHERE expires_s <= ?", (self._clock(),))
            yield db
            db.execute("COMMIT")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with closing(self._connect()) as db, _explained(self._db_path):
            yield db

    def _connect(self) -> sqlite3.Connection:
        """Open the file, making it if missing; raises ConfigError if it is not ours."""
        if not self._db_path.exists():
            _create(self._db_path)
        with _explained(self._db_path):
            db = sqlite3.connect(
                f"{self._db_path.as_uri()}?mode=rw",
                uri=True,
                timeout=BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,  # a watch may be ended by another thread than the one that began it
            )
            try:
                self._check(db)
            except BaseException:
                db.close()
                raise
            return db

    def _check(self, db: sqlite3.Connection) -> None:
        found, version = _pragma(db, "application_id"), _pragma(db, "user_version")
        if found != APPLICATION_ID:
            raise _damaged(self._db_path, "it is no lease database")
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"the lease database {self._db_path} has version {version}, this program reads"
                f" {SCHEMA_VERSION}; run the program that wrote it, or move the file away"
            )


def diff(known: Mapping[str, Lease], current: Mapping[str, Lease]) -> tuple[Change, ...]:
    """What turns `known` into `current`: first the leases that are gone, then those written, oldest first."""
    gone = [Change(key, None) for key in known if key not in current]
    written = [
        Change(key, lease)
        for key, lease in current.items()
        if key not in known or known[key].revision != lease.revision
    ]
    return (*gone, *written)


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _damaged(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be used as lease database: {what}; move it away or choose another path"
        " (a new file is made, nodes take their previous subnets again)"
    )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    try:
        yield
    except sqlite3.OperationalError as exc:
        raise StoreUnavailable(f"the lease database {path} cannot be used now: {exc}") from exc
    except sqlite3.DatabaseError as exc:
        raise _damaged(path, str(exc)) from exc


def _create(path: Path) -> None:
    """Make an empty lease database, mode 0600; another process may be first, then its file stays."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            with _explained(path), closing(sqlite3.connect(name, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                db.executescript(_SCHEMA)
            with suppress(FileExistsError):
                os.link(name, path)
        finally:
            os.unlink(name)
    except OSError as exc:
        raise StoreUnavailable(f"cannot make the lease database {path}: {exc.strerror}") from exc
