"""Reservations of an earlier boot: the containers are gone, their DEL may never come, and ranges fill up.

Such a reservation is freed when three things hold, and never for its age alone:

  - its file is older than this boot, also by the clock that this boot's first ADD saw
  - the result that the runtime saved for the attachment (libcni's cache) names no namespace that still exists
  - nobody whom whoever runs us can ask has the address; where nobody can be asked, the runtime's saved result
    must be there and say that the namespace is gone

The first ADD of a boot looks, and an ADD that finds no address left. That the boot has had its first ADD is
kept beside the network's directory, under a name that no network has: `<dataDir>/.flannel-boot-<network>`
holds the boot's ID and its begin by the clock of that time, in nanoseconds since 1970.

A clock that is set after the first ADD cannot make that ADD's boot look like an earlier one: both begins are
known then, and the earlier one counts.
"""

from __future__ import annotations

import os
import time

from cni.ipam.store import attachment_of
from cni.spec import gojson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cni.host import Files
    from cni.ipam.config import Place
    from cni.ipam.store import Held

RESULTS = "/var/lib/cni/results"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_ANY_NETNS = "/proc/self/ns/net"
_LARGEST_RESULT_BYTES = 4 << 20
_LARGEST_MARK_BYTES = 256


class Boot:
    """A boot: its ID, and when it began by the wall clock (ns since 1970)."""

    __slots__ = ("began", "identity")

    def __init__(self, identity: str, began: int) -> None:
        self.identity = identity
        self.began = began


def this_boot() -> Boot:
    """Raises OSError."""
    with open(_BOOT_ID, encoding="ascii") as file:
        identity = file.read().strip()
    return Boot(
        identity, time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    )


class Reclaimer:
    """Frees what earlier boots left in one store. `note` gets a line for each address that is freed.

    `in_use` says which of some addresses somebody has; None where that cannot be asked.
    `results` is the directory of libcni's saved results.
    """

    __slots__ = ("_boot", "_files", "_in_use", "_note", "_place", "_results")

    def __init__(
        self,
        files: Files,
        note: Callable[[str], None],
        place: Place,
        in_use: Callable[[list[str]], set[str]] | None = None,
        results: str = RESULTS,
        boot: Callable[[], Boot] = this_boot,
    ) -> None:
        self._files = files
        self._note = note
        self._place = place
        self._in_use = in_use
        self._results = results
        self._boot = boot

    def at_first_add(self, held: Held) -> None:
        """Free what can be freed, once in each boot."""
        try:
            boot = self._boot()
            mark = self._mark()
            if mark is None or mark.identity != boot.identity:
                self._sweep(held, boot.began)
                self._leave_mark(boot)
        except OSError as exc:
            self._note(f"host-local: cannot look for reservations of an earlier boot: {exc}")

    def when_exhausted(self, held: Held) -> bool:
        """Free what can be freed; whether anything was."""
        try:
            boot = self._boot()
            mark = self._mark()
            began = [boot.began] + ([mark.began] if mark and mark.identity == boot.identity else [])
            return self._sweep(held, min(began))
        except OSError as exc:
            self._note(f"host-local: cannot look for reservations of an earlier boot: {exc}")
            return False

    def _sweep(self, held: Held, before: int) -> bool:
        """Free the reservations whose files are older than `before`, if nobody uses them."""
        old = {}
        for name, owner in held.holdings.reservations():
            modified = held.modified(name)
            if modified is not None and modified < before and self._may_go(owner):
                old[name] = owner
        if old and self._in_use is not None:
            addresses = {name: name.rpartition("/")[2] for name in old}
            used = self._in_use(list(addresses.values()))
            old = {name: owner for name, owner in old.items() if addresses[name] not in used}
        freed = False
        for name, owner in old.items():
            if held.remove(name):
                freed = True
                container_id, ifname = attachment_of(owner)
                whose = f"{container_id or 'nobody'} {ifname}".rstrip()
                store = self._place.store
                self._note(
                    f"host-local: freed {name} in {store}: reserved before this boot for {whose}, not in use"
                )
        return freed

    def _may_go(self, owner: bytes) -> bool:
        """Whether the runtime's saved result does not speak against it."""
        namespaces = self._namespaces(*attachment_of(owner))
        if any(self._exists(path) for path in namespaces):
            return False
        return self._in_use is not None or bool(namespaces)

    def _namespaces(self, container_id: str, ifname: str) -> set[str]:
        """Paths of the namespaces that the runtime's saved result names; none if it cannot be read."""
        path = f"{self._results}/{self._place.network}-{container_id}-{ifname}"
        try:
            record = gojson.load_object(self._files.read(path, _LARGEST_RESULT_BYTES))
            found = {gojson.typed(record, "netns", str, "")}
            # Older libcni leaves the path out, but the result has it.
            made = gojson.typed(record, "result", dict, {})
            for one in gojson.typed(made, "interfaces", list, []):
                if isinstance(one, dict):
                    found.add(gojson.typed(one, "sandbox", str, ""))
        except (OSError, gojson.GoJsonError):
            return set()
        return found - {""}

    def _exists(self, path: str) -> bool:
        """Whether a namespace is there. When in doubt, it is."""
        directory, _, name = path.rpartition("/")
        try:
            with self._files.directory(directory or "/") as found:
                return found.stat(name).st_dev == os.stat(_ANY_NETNS).st_dev
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def _mark(self) -> Boot | None:
        """The boot that had its first ADD; None if there was none or it cannot be told."""
        try:
            text = self._files.read(self._mark_path(), _LARGEST_MARK_BYTES).decode("ascii")
            identity, began = text.split()
            return Boot(identity, int(began))
        except (FileNotFoundError, ValueError):
            return None

    def _leave_mark(self, boot: Boot) -> None:
        with self._files.directory(self._place.data_dir) as directory:
            name = os.path.basename(self._mark_path())
            file = directory.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                os.write(file, f"{boot.identity} {boot.began}\n".encode())
            finally:
                os.close(file)

    def _mark_path(self) -> str:
        return f"{self._place.data_dir.rstrip('/')}/.flannel-boot-{self._place.network}"
