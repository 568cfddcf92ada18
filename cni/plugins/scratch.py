"""What an attachment leaves on disk: flannel's scratch files, and host-local's reservations (read only).

A scratch file holds the delegate's configuration of ADD time, byte for byte, for the DEL to come:

    <dataDir>/<container ID>              as upstream flannel, so that it can tear down our attachments
    <dataDir>/<container ID>@<ifname>     the same bytes, ours: a container can have several interfaces

'@' occurs in no container ID. We prefer the second file; the first alone was written by upstream. When both
kinds exist, the first always equals one of the second.

Decision: the daemon writes the first file when the runtime has its answer, before all else that comes then.
Ours is there from the start, so only upstream's DEL would miss the other one: within that millisecond, after
a kill in it, or if the disk is full by then, which is logged.

Decision: each file is written under a temporary name, synced and renamed, and the directory synced, so that
neither a crash nor a power loss leaves half a file (flannel #1662). The daemon syncs after it has answered:
a power loss within those milliseconds may leave an empty file, of a container that is gone as well then.
"""

from __future__ import annotations

import os

from cni.errors import INTERNAL, INVALID_CONFIG, CniError
from cni.spec.request import is_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Directory, Files, Host

_CHUNK_BYTES = 1 << 16
_LARGEST_RESERVATION_BYTES = 4096  # a container ID and an interface name; the file's name is an address
_RESERVATION_SEPARATOR = "\r\n"


class Scratch:
    """The scratch files of one data directory. Every method raises CniError 999 when the disk refuses.

    A context manager: the directory is opened once, for as long as this is used, or `complete` is awaited.
    """

    __slots__ = ("_awaited", "_directory", "_has_left", "_host", "_path")

    def __init__(self, host: Host, path: str) -> None:
        self._host = host
        self._path = path
        self._directory: Directory | None = None
        self._awaited = 0
        self._has_left = False

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._has_left = True
        if self._directory is not None and not self._awaited:
            self._directory.__exit__()
            self._directory = None

    def save(self, container_id: str, ifname: str, data: bytes) -> None:
        """Write both files of an attachment; makes the directory (0700) if need be."""
        self.begin(container_id, ifname, data)
        self.complete(container_id, ifname, data)

    def begin(self, container_id: str, ifname: str, data: bytes) -> None:
        """Write our file of an attachment; makes the directory (0700) if need be. `complete` must follow.

        That may be when the context is left: by then the path may lead elsewhere, with the runtime gone.
        """
        if not self._path:
            raise CniError(
                INVALID_CONFIG, "dataDir is empty, it must be the directory of flannel's scratch files"
            )
        try:
            self._place(self._open(make=True), f"{container_id}@{ifname}", ifname, data)
        except OSError as exc:
            raise self._refused("write", container_id, exc) from None
        self._awaited += 1

    def complete(self, container_id: str, ifname: str, data: bytes) -> None:
        """Write upstream's file as well, unless the attachment is gone again, or was saved anew."""
        own = f"{container_id}@{ifname}"
        try:
            directory = self._open()
            if _read(directory, own) == data:
                self._place(directory, container_id, ifname, data)
                if _read(directory, own) is None:  # the cold path has removed both meanwhile
                    _unlink(directory, container_id)
                self._sync(directory)
        except OSError as exc:
            raise self._refused("write", container_id, exc) from None
        finally:
            self._awaited -= 1
            if self._has_left:
                self.__exit__()

    def load(self, container_id: str, ifname: str) -> bytes | None:
        """The saved bytes of an attachment, None if there are none."""
        try:
            directory = self._open()
            own = _read(directory, f"{container_id}@{ifname}")
            if own is not None:
                return own
            plain = _read(directory, container_id)
            # With files of other interfaces about, the plain file belongs to one of those.
            return None if plain is None or _heirs(directory, container_id) else plain
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise self._refused("read", container_id, exc) from None

    def remove(self, container_id: str, ifname: str) -> None:
        """Forget an attachment; the plain file passes on to another interface of the container, if any."""
        own = f"{container_id}@{ifname}"
        try:
            directory = self._open()
            self._remove_unfinished(directory, container_id, ifname)
            _unlink(directory, own)
            heirs = _heirs(directory, container_id)
            if not heirs:
                _unlink(directory, container_id)
            elif _read(directory, container_id) not in heirs:
                self._place(directory, container_id, ifname, heirs[0])
                self._sync(directory)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise self._refused("remove", container_id, exc) from None

    def remove_unfinished(self, container_id: str, ifname: str) -> None:
        """Remove what a writer that was killed had begun, where nothing is saved of the attachment."""
        try:
            self._remove_unfinished(self._open(), container_id, ifname)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise self._refused("remove", container_id, exc) from None

    def _remove_unfinished(self, directory: Directory, container_id: str, ifname: str) -> None:
        for name in (container_id, f"{container_id}@{ifname}"):
            _unlink(directory, _temporary(name, ifname))

    def saved(self) -> list[tuple[str, str, bytes]]:
        """Every attachment as (container ID, interface name, bytes).

        The name is empty for a container of which only the plain file exists.
        """
        found: list[tuple[str, str, bytes]] = []
        with_ifname: set[str] = set()
        try:
            directory = self._open()
            names = [name for name in directory.names() if is_name(name.partition("@")[0])]
            # Those of interfaces first: a container's plain file is one of them again.
            for name in sorted(names, key=lambda name: "@" not in name):
                container_id, _, ifname = name.partition("@")
                if ifname or container_id not in with_ifname:
                    try:
                        data = _read(directory, name)
                    except IsADirectoryError:  # somebody else's
                        continue
                    if data is not None:
                        found.append((container_id, ifname, data))
                        with_ifname.add(container_id)
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise self._refused("read", "", exc) from None
        return sorted(found)

    def _open(self, make: bool = False) -> Directory:
        if self._directory is None:
            self._directory = self._host.files.directory(self._path or ".", 0o700 if make else None)
        return self._directory

    def _sync(self, directory: Directory) -> None:
        self._host.sync(directory.open(".", os.O_RDONLY | os.O_DIRECTORY))

    def _place(self, directory: Directory, name: str, ifname: str, data: bytes) -> None:
        temporary = _temporary(name, ifname)
        descriptor = directory.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            try:
                _write(descriptor, data)
            finally:
                self._host.sync(descriptor)
            directory.rename(temporary, name)
        except OSError:
            directory.unlink(temporary)
            raise

    def _refused(self, verb: str, name: str, exc: OSError) -> CniError:
        reason = (exc.strerror or str(exc)).lower()
        return CniError(INTERNAL, f"cannot {verb} the scratch file {self._path}/{name}: {reason}")


def _temporary(name: str, ifname: str) -> str:
    """The name of a file that is being written on behalf of one interface.

    No container's ID begins with a dot; and it is found again if the writer is killed.
    """
    return f".{name} {ifname}"


def _siblings(names: list[str], container_id: str) -> list[str]:
    """Those of the names that are of interfaces of the container."""
    prefix = f"{container_id}@"
    return sorted(name for name in names if name.startswith(prefix))


def _heirs(directory: Directory, container_id: str) -> list[bytes]:
    """What is saved of interfaces of the container; somebody's directory of such a name is none of them."""
    found = []
    for name in _siblings(directory.names(), container_id):
        try:
            data = _read(directory, name)
        except IsADirectoryError:
            continue
        if data is not None:
            found.append(data)
    return found


def _read(directory: Directory, name: str) -> bytes | None:
    try:
        descriptor = directory.open(name, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        data = bytearray()
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            data += chunk
            if len(chunk) < _CHUNK_BYTES:  # the end, without asking once more
                break
    finally:
        os.close(descriptor)
    return bytes(data)


def _write(descriptor: int, data: bytes) -> None:
    # Python's own files cost three system calls more.
    while data:
        data = data[os.write(descriptor, data) :]


def _unlink(directory: Directory, name: str) -> None:
    try:
        directory.unlink(name)
    except FileNotFoundError:
        return


def reservations(files: Files, store: str) -> list[tuple[str, str]]:
    """The (container ID, interface name) pairs for which host-local holds addresses in `store`.

    The name is empty in files of very old versions. A store that cannot be read has none.
    """
    found = []
    try:
        with files.directory(store) as directory:
            for name in directory.names():
                if name == "lock" or name.startswith("last_reserved_ip."):
                    continue
                try:
                    content = _read(directory, name)
                except OSError:
                    continue  # a directory: no reservation
                if content is None:
                    continue  # released at this moment
                text = content[:_LARGEST_RESERVATION_BYTES].decode("utf-8", "replace").strip()
                container_id, _, ifname = text.partition(_RESERVATION_SEPARATOR)
                found.append((container_id, ifname))
    except OSError:
        return []
    return found
