"""What an attachment leaves on disk: flannel's scratch files, and host-local's reservations (read only).

A scratch file holds the delegate's configuration of ADD time, byte for byte, for the DEL to come:

    <dataDir>/<container ID>              as upstream flannel, so that it can tear down our attachments
    <dataDir>/<container ID>@<ifname>     the same bytes, ours: a container can have several interfaces

'@' occurs in no container ID. We prefer the second file; the first alone was written by upstream. When both
kinds exist, the first always equals one of the second.

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

_LARGEST_RESERVATION_BYTES = 4096  # a container ID and an interface name; the file's name is an address
_RESERVATION_SEPARATOR = "\r\n"


class Scratch:
    """The scratch files of one data directory. Every method raises CniError 999 when the disk refuses."""

    __slots__ = ("_host", "_path")

    def __init__(self, host: Host, path: str) -> None:
        self._host = host
        self._path = path

    def save(self, container_id: str, ifname: str, data: bytes) -> None:
        """Write both files of an attachment; makes the directory (0700) if need be."""
        if not self._path:
            raise CniError(
                INVALID_CONFIG, "dataDir is empty, it must be the directory of flannel's scratch files"
            )
        try:
            with self._host.files.directory(self._path, 0o700) as directory:
                self._place(directory, f"{container_id}@{ifname}", ifname, data)
                self._place(directory, container_id, ifname, data)
                self._sync_directory(directory)
        except OSError as exc:
            raise self._refused("write", container_id, exc) from None

    def load(self, container_id: str, ifname: str) -> bytes | None:
        """The saved bytes of an attachment, None if there are none."""
        try:
            with self._host.files.directory(self._path or ".") as directory:
                own = _read(directory, f"{container_id}@{ifname}")
                if own is not None:
                    return own
                plain = _read(directory, container_id)
                # With files of other interfaces about, the plain file belongs to one of those.
                return None if plain is None or _siblings(directory, container_id) else plain
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise self._refused("read", container_id, exc) from None

    def remove(self, container_id: str, ifname: str) -> None:
        """Forget an attachment; the plain file passes on to another interface of the container, if any."""
        try:
            with self._host.files.directory(self._path or ".") as directory:
                for name in (container_id, f"{container_id}@{ifname}"):
                    _unlink(directory, _temporary(name, ifname))
                _unlink(directory, f"{container_id}@{ifname}")
                others = [_read(directory, name) for name in _siblings(directory, container_id)]
                heirs = [data for data in others if data is not None]
                if not heirs:
                    _unlink(directory, container_id)
                elif _read(directory, container_id) not in heirs:
                    self._place(directory, container_id, ifname, heirs[0])
                    self._sync_directory(directory)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise self._refused("remove", container_id, exc) from None

    def saved(self) -> list[tuple[str, str, bytes]]:
        """Every attachment as (container ID, interface name, bytes).

        The name is empty for a container of which only the plain file exists.
        """
        found = []
        try:
            with self._host.files.directory(self._path or ".") as directory:
                names = _names(directory)
                with_ifname = {name.partition("@")[0] for name in names if "@" in name}
                for name in names:
                    container_id, _, ifname = name.partition("@")
                    data = _read(directory, name) if ifname or container_id not in with_ifname else None
                    if data is not None:
                        found.append((container_id, ifname, data))
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise self._refused("read", "", exc) from None
        return found

    def _place(self, directory: Directory, name: str, ifname: str, data: bytes) -> None:
        temporary = f"{directory.at}/{_temporary(name, ifname)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try:
                _write(descriptor, data)
                self._host.sync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, f"{directory.at}/{name}")
        except OSError:
            os.unlink(temporary)
            raise

    def _sync_directory(self, directory: Directory) -> None:
        descriptor = os.open(directory.at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._host.sync(descriptor)
        finally:
            os.close(descriptor)

    def _refused(self, verb: str, name: str, exc: OSError) -> CniError:
        reason = (exc.strerror or str(exc)).lower()
        return CniError(INTERNAL, f"cannot {verb} the scratch file {self._path}/{name}: {reason}")


def _temporary(name: str, ifname: str) -> str:
    """The name of a file that is being written on behalf of one interface.

    No container's ID begins with a dot; and it is found again if the writer is killed.
    """
    return f".{name} {ifname}"


def _names(directory: Directory) -> list[str]:
    return sorted(name for name in os.listdir(directory.at) if is_name(name.partition("@")[0]))


def _siblings(directory: Directory, container_id: str) -> list[str]:
    return [name for name in _names(directory) if name.startswith(f"{container_id}@")]


def _read(directory: Directory, name: str) -> bytes | None:
    try:
        with open(f"{directory.at}/{name}", "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _write(descriptor: int, data: bytes) -> None:
    # Python's own files cost three system calls more.
    while data:
        data = data[os.write(descriptor, data) :]


def _unlink(directory: Directory, name: str) -> None:
    try:
        os.unlink(f"{directory.at}/{name}")
    except FileNotFoundError:
        return


def reservations(files: Files, store: str) -> list[tuple[str, str]]:
    """The (container ID, interface name) pairs for which host-local holds addresses in `store`.

    The name is empty in files of very old versions. A store that cannot be read has none.
    """
    found = []
    try:
        with files.directory(store) as directory:
            for name in os.listdir(directory.at):
                if name == "lock" or name.startswith("last_reserved_ip."):
                    continue
                try:
                    with open(f"{directory.at}/{name}", "rb") as file:
                        content = file.read(_LARGEST_RESERVATION_BYTES)
                except OSError:
                    continue  # released at this moment, or a directory: no reservation
                text = content.decode("utf-8", "replace").strip()
                container_id, _, ifname = text.partition(_RESERVATION_SEPARATOR)
                found.append((container_id, ifname))
    except OSError:
        return []
    return found
