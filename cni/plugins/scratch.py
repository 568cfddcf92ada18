"""What an attachment leaves on disk: flannel's scratch files, and host-local's reservations (read only).

A scratch file holds the delegate's configuration of ADD time, byte for byte, for the DEL to come:

    <dataDir>/<container ID>              as upstream flannel, so that it can tear down our attachments
    <dataDir>/<container ID>@<ifname>     the same bytes, ours: a container can have several interfaces

'@' occurs in no container ID. We prefer the second file; the first alone was written by upstream. When both
kinds exist, the first always equals one of the second.

Decision: each file is written under a temporary name, synced and renamed, and the directory synced, so that
neither a crash nor a power loss leaves half a file (flannel #1662). That costs three syncs per ADD.
"""

from __future__ import annotations

import os

from cni.errors import INTERNAL, INVALID_CONFIG, CniError
from cni.spec.request import is_name

_LARGEST_RESERVATION_BYTES = 4096  # a container ID and an interface name; the file's name is an address
_RESERVATION_SEPARATOR = "\r\n"


class Scratch:
    """The scratch files of one data directory. Every method raises CniError 999 when the disk refuses."""

    __slots__ = ("_directory",)

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def save(self, container_id: str, ifname: str, data: bytes) -> None:
        """Write both files of an attachment; makes the directory (0700) if need be."""
        if not self._directory:
            raise CniError(
                INVALID_CONFIG, "dataDir is empty, it must be the directory of flannel's scratch files"
            )
        try:
            _make_directories(self._directory)
            self._place(f"{container_id}@{ifname}", data)
            self._place(container_id, data)
            self._sync_directory()
        except OSError as exc:
            raise self._refused("write", container_id, exc) from None

    def load(self, container_id: str, ifname: str) -> bytes | None:
        """The saved bytes of an attachment, None if there are none."""
        try:
            own = self._read(f"{container_id}@{ifname}")
            if own is not None:
                return own
            # With files of other interfaces about, the plain file belongs to one of those.
            return None if self._siblings(container_id) else self._read(container_id)
        except OSError as exc:
            raise self._refused("read", container_id, exc) from None

    def remove(self, container_id: str, ifname: str) -> None:
        """Forget an attachment; the plain file passes on to another interface of the container, if any."""
        try:
            self._unlink(f"{container_id}@{ifname}")
            others = [self._read(name) for name in self._siblings(container_id)]
            heirs = [data for data in others if data is not None]
            if not heirs:
                self._unlink(container_id)
            elif self._read(container_id) not in heirs:
                self._place(container_id, heirs[0])
                self._sync_directory()
        except OSError as exc:
            raise self._refused("remove", container_id, exc) from None

    def saved(self) -> list[tuple[str, str, bytes]]:
        """Every attachment as (container ID, interface name, bytes).

        The name is empty for a container of which only the plain file exists.
        """
        found = []
        try:
            names = self._names()
            with_ifname = {name.partition("@")[0] for name in names if "@" in name}
            for name in names:
                container_id, _, ifname = name.partition("@")
                data = self._read(name) if ifname or container_id not in with_ifname else None
                if data is not None:
                    found.append((container_id, ifname, data))
        except OSError as exc:
            raise self._refused("read", "", exc) from None
        return found

    def _names(self) -> list[str]:
        try:
            names = os.listdir(self._directory or ".")
        except FileNotFoundError:
            return []
        return sorted(name for name in names if is_name(name.partition("@")[0]))

    def _siblings(self, container_id: str) -> list[str]:
        return [name for name in self._names() if name.startswith(f"{container_id}@")]

    def _read(self, name: str) -> bytes | None:
        try:
            with open(f"{self._directory}/{name}", "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _unlink(self, name: str) -> None:
        try:
            os.unlink(f"{self._directory}/{name}")
        except FileNotFoundError:
            return

    def _place(self, name: str, data: bytes) -> None:
        # The leading dot keeps the temporary name apart from every container ID.
        temporary = f"{self._directory}/.{os.getpid():x}-{os.urandom(8).hex()}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.rename(temporary, f"{self._directory}/{name}")
        except OSError:
            os.unlink(temporary)
            raise

    def _sync_directory(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _refused(self, verb: str, name: str, exc: OSError) -> CniError:
        reason = (exc.strerror or str(exc)).lower()
        return CniError(INTERNAL, f"cannot {verb} the scratch file {self._directory}/{name}: {reason}")


def _make_directories(path: str) -> None:
    """`mkdir -p` that gives every missing level mode 0700, which os.makedirs does for the last one only."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path.rstrip("/"))
    if parent:
        _make_directories(parent)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):  # else: made by another pod's ADD at this moment
            raise


def reservations(store: str) -> list[tuple[str, str]]:
    """The (container ID, interface name) pairs for which host-local holds addresses in `store`.

    The name is empty in files of very old versions. A store that cannot be read has none.
    """
    found = []
    try:
        names = os.listdir(store)
    except OSError:
        return []
    for name in names:
        if name == "lock" or name.startswith("last_reserved_ip."):
            continue
        try:
            with open(f"{store}/{name}", "rb") as file:
                text = file.read(_LARGEST_RESERVATION_BYTES).decode("utf-8", "replace").strip()
        except OSError:
            continue  # released at this moment, or a directory: no reservation
        container_id, _, ifname = text.partition(_RESERVATION_SEPARATOR)
        found.append((container_id, ifname))
    return found
