"""The reservations of a network on disk, in upstream host-local's format:

    <dataDir>/<network>/
        lock                   flock(2); empty
        10.244.1.2             the address is reserved, whatever the content; "<container ID>\\r\\n<ifname>"
        last_reserved_ip.0     the address that range set 0 handed out last; no line break

Very old files hold the container ID alone. Nothing is synced or renamed: a file is whole when its
creator lets go of the lock, and what a killed creator leaves is a reservation with a part of an owner.

Decision: a store can be given an index (`cni.ipam.index`), which knows the reservations without a scan.
"""

from __future__ import annotations

import errno
import fcntl
import os

from cni.ipam.ranges import Occupied
from cni.spec.address import format_ip, parse_ip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from cni.host import Directory
    from cni.ipam.ranges import Address

    class View(Protocol):
        """What knows the reservations of a store without reading all of them.

        `settled`: this boot's first ADD in the store is known to be over.
        """

        settled: bool

        def holdings(self, directory: Directory) -> Holdings:
            """The reservations now. The caller holds the store's lock. Raises OSError."""

        def glance(self, directory: Directory) -> Holdings | None:
            """The same without the lock, to be looked at only; None if it cannot be told. Raises OSError."""


LOCK = "lock"
LAST = "last_reserved_ip."
_SEPARATOR = b"\r\n"
_BLANK = b" \t\n\v\f\r"
_LARGEST_BYTES = 1 << 17  # a container ID, as long as a variable can be, and the name of an interface


class StoreFault(OSError):
    """The disk refused; the text is as Go words it, with the path as the netconf names it."""

    def __init__(self, verb: str, path: str, exc: OSError) -> None:
        super().__init__(exc.errno, f"{verb} {path}: {(exc.strerror or str(exc)).lower()}")

    def __str__(self) -> str:
        return str(self.strerror)


def owner_of(container_id: str, ifname: str) -> bytes:
    """The content of the files of an attachment."""
    return os.fsencode(container_id).strip(_BLANK) + _SEPARATOR + os.fsencode(ifname)


def attachment_of(owner: bytes) -> tuple[str, str]:
    """Container ID and interface name of a file's content; the name is empty in very old files."""
    container_id, _, ifname = owner.partition(_SEPARATOR)
    return os.fsdecode(container_id), os.fsdecode(ifname)


def bare_owner(owner: bytes) -> bytes:
    """The content that very old versions wrote for the container of `owner`."""
    return owner.partition(_SEPARATOR)[0]


class Holdings:
    """What is reserved: file names (paths below the store) with their owners, and the addresses by family.

    `flat`: the store holds nothing but regular files. `last`: the address that a range set handed out last,
    by the name of its file, as far as it is known. `written`: names of files that were written by who keeps
    this, until what the kernel tells of that was heard.
    """

    __slots__ = ("_by_owner", "_owners", "flat", "last", "taken", "written")

    def __init__(self) -> None:
        self._owners: dict[str, bytes] = {}
        self._by_owner: dict[bytes, tuple[str, ...]] = {}
        self.taken = {4: Occupied(), 6: Occupied()}
        self.flat = True
        self.last: dict[str, Address] = {}
        self.written: set[str] = set()

    def __len__(self) -> int:
        return len(self._owners)

    def put(self, name: str, owner: bytes, address: Address | None = None) -> None:
        """A file of that name is there; `address` is what it is named after, for who knows it."""
        known = self._owners.get(name)
        if known == owner:
            return
        if known is not None:
            self.drop(name)
        self._owners[name] = owner
        self._by_owner[owner] = (*self._by_owner.get(owner, ()), name)
        address = address or _reserved(name)
        if address is not None:
            self.taken[address[0]].add(address[1])

    def drop(self, name: str) -> None:
        """A file of that name is not there."""
        owner = self._owners.pop(name, None)
        if owner is None:
            return
        left = tuple(one for one in self._by_owner.pop(owner) if one != name)
        if left:
            self._by_owner[owner] = left
        address = _reserved(name)
        if address is not None:
            self.taken[address[0]].discard(address[1])

    def names(self, owner: bytes) -> list[str]:
        """The files of an owner, in the order in which upstream finds them."""
        return sorted(self._by_owner.get(owner, ()))

    def has(self, owner: bytes) -> bool:
        """Whether there is anything of an owner, also in very old files."""
        return bool(self._by_owner.get(owner) or self._by_owner.get(bare_owner(owner)))

    def addresses(self, owner: bytes) -> list[Address]:
        """The addresses of an owner, those of very old files with the bare container ID among them."""
        names = self.names(owner) + self.names(bare_owner(owner))
        return [one for one in (_address(name) for name in sorted(names)) if one is not None]

    def reservations(self) -> list[tuple[str, bytes]]:
        """Every address file with its owner."""
        return [(name, owner) for name, owner in self._owners.items() if _address(name) is not None]


class Store:
    """One network's directory, which it closes. `held` takes the lock for one step of a command."""

    __slots__ = ("_lock", "_view", "directory")

    def __init__(self, directory: Directory, view: View | None = None) -> None:
        """Raises StoreFault if there is no lock file and none can be made."""
        self.directory = directory
        self._view = view
        try:
            self._lock = directory.open(LOCK, os.O_RDONLY | os.O_CREAT, 0o750)
        except OSError as exc:
            directory.__exit__()
            raise StoreFault("open", f"{directory.path}/{LOCK}", exc) from None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._lock)
        self.directory.__exit__()

    def held(self) -> Held:
        """`with store.held() as held:` excludes every other user of the store, upstream's plugin included."""
        return Held(self.directory, self._lock, self._view)


class Held:
    """The store while its lock is held. `holdings` is exact, and is kept so by the methods."""

    __slots__ = ("_directory", "_lock", "_view", "holdings")

    holdings: Holdings

    def __init__(self, directory: Directory, lock: int, view: View | None) -> None:
        self._directory = directory
        self._lock = lock
        self._view = view

    def __enter__(self) -> Held:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self.holdings = (
                scan(self._directory) if self._view is None else self._view.holdings(self._directory)
            )
        except BaseException:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def take(self, address: Address, owner: bytes) -> bool:
        """Reserve an address; False if somebody has it. Raises StoreFault, and then has reserved nothing."""
        name = format_ip(*address)
        try:
            file, is_named = self._open_new(name)
        except FileExistsError:
            return False
        except OSError as exc:
            raise StoreFault("open", f"{self._directory.path}/{name}", exc) from None
        try:
            _write_all(file, owner)
            if not is_named:
                self._directory.link_open(file, name)
        except FileExistsError:
            return False
        except OSError as exc:
            if is_named:
                self._directory.unlink(name)
            raise StoreFault("write", f"{self._directory.path}/{name}", exc) from None
        finally:
            os.close(file)
        # Of an IPv6 address the name may be that of an IPv4 one (RFC 4291, section 2.5.5.2).
        self.holdings.put(name, owner, address if address[0] == 4 else None)
        self.holdings.written.add(name)
        return True

    def _open_new(self, name: str) -> tuple[int, bool]:
        """A file that gets its name when it has its content: who is killed in between leaves nothing.

        Not every file system has files without a name; there it has its name at once (True), as upstream's.
        """
        try:
            return self._directory.open(".", os.O_RDWR | os.O_TMPFILE), False
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
        return self._directory.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL), True

    def last(self, set_index: int) -> Address | None:
        """The address that a range set handed out last; None if that is not known."""
        name = f"{LAST}{set_index}"
        known = self.holdings.last.get(name)
        if known is not None:
            return known
        try:
            return _address(_read(self._directory, name).decode("ascii", "replace"))
        except OSError:
            return None

    def remember(self, set_index: int, address: Address) -> None:
        """Make `address` the one that the set handed out last; raises StoreFault."""
        name, text = f"{LAST}{set_index}", format_ip(*address).encode()
        before = self.holdings.last.get(name)
        may_be_longer = before is None or len(format_ip(*before)) > len(text)
        try:
            file = self._directory.open(name, os.O_WRONLY | os.O_CREAT)
            try:
                # Written over and cut, not emptied first, which costs ext4 two hundred microseconds.
                _write_all(file, text)
                if may_be_longer and os.fstat(file).st_size != len(text):
                    os.ftruncate(file, len(text))
            finally:
                os.close(file)
        except OSError as exc:
            raise StoreFault("open", f"{self._directory.path}/{name}", exc) from None
        self.holdings.last[name] = address
        self.holdings.written.add(name)

    def modified(self, name: str) -> int | None:
        """When a file was written last, in ns since 1970; None if that cannot be told."""
        try:
            return self._directory.stat(name).st_mtime_ns
        except OSError:
            return None

    def release(self, owner: bytes) -> bool:
        """Remove every file with that content; False if there was none. What cannot be removed stays."""
        return any([self.remove(name) for name in self.holdings.names(owner)])

    def free(self, address: Address, owner: bytes) -> bool:
        """Remove the reservation of an address if it is the owner's."""
        name = format_ip(*address)
        return name in self.holdings.names(owner) and self.remove(name)

    def remove(self, name: str) -> bool:
        """Remove a file; False if that cannot be done."""
        try:
            self._directory.unlink(name)
        except FileNotFoundError:
            self.holdings.drop(name)
            return False
        except OSError:
            return False
        self.holdings.drop(name)
        return True


def scan(directory: Directory) -> Holdings:
    """The reservations as the files say, also in directories below; unreadable ones have no owner."""
    found = Holdings()
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(f"{directory.at}/{below}") as entries:
                listed = list(entries)
        except OSError as exc:
            if not below:
                raise StoreFault("open", directory.path, exc) from None
            continue  # upstream passes over it too
        for entry in listed:
            name = below + entry.name
            if entry.is_dir(follow_symlinks=False):
                pending.append(f"{name}/")
            owner = read_owner(directory, name) if is_reservation(name) else None
            found.flat = found.flat and entry.is_file(follow_symlinks=False)
            if owner is not None:
                found.put(name, owner)
    return found


def is_reservation(name: str) -> bool:
    """Whether a file of the store can belong to an attachment."""
    return name != LOCK and not name.startswith(LAST)


def read_owner(directory: Directory, name: str) -> bytes | None:
    """The owner in a file; empty if it cannot be read, None if there is no such file or it is a directory."""
    try:
        return _read(directory, name).strip(_BLANK)
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError:
        return b""


def _read(directory: Directory, name: str) -> bytes:
    # O_NONBLOCK: somebody's pipe must not stop us.
    file = directory.open(name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(file, _LARGEST_BYTES)
    finally:
        os.close(file)


def _write_all(file: int, data: bytes) -> None:
    if os.write(file, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _address(name: str) -> Address | None:
    """The address that a file is named after."""
    try:
        return parse_ip(name.rpartition("/")[2])
    except ValueError:
        return None


def _reserved(name: str) -> Address | None:
    """The address that nobody else gets while there is a file of that name.

    That is the name which the kernel would be asked to create, not another spelling of the address.
    """
    address = _address(name)
    return address if address is not None and format_ip(*address) == name else None
