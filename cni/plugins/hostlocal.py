"""The host-local IPAM plugin: addresses from ranges of this node, reserved by files.

    ADD     one address of each range set, reserved for the container's interface
    DEL     every file of the attachment removed
    CHECK   does the attachment hold an address?
    STATUS  is the configuration valid, can the store be written?
    GC      every reservation removed that the runtime no longer knows

The store is upstream's to the byte, so both can work in one directory at the same time.

Decision: where upstream loses something, we do not. A failed ADD releases what it reserved itself and
nothing else: an ADD of what is attached already fails, and leaves that alone. DEL needs no valid ranges.

Source: CNI 1.1.0, "Section 4: Plugin Delegation"; upstream containernetworking/plugins.
"""

from __future__ import annotations

import errno
import os

from cni.errors import INTERNAL, NOT_AVAILABLE, CniError
from cni.ipam.allocate import NothingFree, Refused, take_one
from cni.ipam.config import ARGUMENTS, IpamConfig, Place, address_text, count_sets, resolver
from cni.ipam.reclaim import RESULTS, Reclaimer
from cni.ipam.store import Held, Store, StoreFault, attachment_of, bare_owner, owner_of
from cni.plugins.about import about
from cni.spec import args, gojson, result
from cni.spec.address import parse_cidr
from cni.spec.netconf import NetConf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from cni.host import Host
    from cni.ipam.index import Indexes
    from cni.ipam.ranges import Address, Range, RangeSet
    from cni.ipam.store import View
    from cni.spec.address import Cidr
    from cni.spec.request import Request

    Report = Callable[[str, int, int, int], None]

    class AddressUsers(Protocol):
        """Those who may have an address, as the kernel knows them."""

        def have(self, addresses: list[str]) -> set[str]:
            """Those of the addresses that somebody has; all of them when that cannot be told."""

        def are_known_to_have(self, address: Address) -> bool:
            """Whether somebody has this one; asked for each address that is given, so it must cost little."""


_STORE_MODE = 0o755
_LARGEST_RESOLV_CONF_BYTES = 1 << 20
_NEARLY_FULL = 0.9


class HostLocal:
    """The plugin.

    `indexes` spares the reading of whole stores, for who lives longer than one call. `report` is told after
    each ADD, for each range set: network, index of the set, addresses in use, addresses in all; without it a
    set that is nearly used up is noted. `users` are asked whether somebody has an address, and `results` is
    where the runtime saves results: both count before a reservation of an earlier boot goes.
    """

    __slots__ = ("_host", "_indexes", "_parsed", "_report", "_results", "_users")

    def __init__(
        self,
        host: Host,
        indexes: Indexes | None = None,
        report: Report | None = None,
        users: AddressUsers | None = None,
        results: str = RESULTS,
    ) -> None:
        self._host = host
        self._indexes = host.indexes if indexes is None else indexes
        self._report = host.report if report is None else report
        self._users = users
        self._results = results
        self._parsed: tuple[Request, IpamConfig] | None = None

    @property
    def about(self) -> str:
        return about("host-local")

    def owns_netns(self, path: str) -> bool:
        """Whether `path` is the namespace that the runtime itself runs in."""
        return self._host.shares_netns(path)

    def add(self, request: Request) -> gojson.Object:
        """Reserve an address of each range set; the result in the requested version. Raises CniError 999."""
        config = self._config(request)
        dns = self._resolver(config.resolv_conf)
        owner = owner_of(request.container_id, request.ifname)
        try:
            with self._store(config.place) as store:
                found = self._allocate(store, config, owner)
        except OSError as exc:
            raise CniError(INTERNAL, _words(exc)) from None
        record: gojson.Object = {
            "cniVersion": "1.0.0",
            "ips": [
                {
                    "address": f"{address_text(address)}/{one.subnet.prefix}",
                    "gateway": address_text(one.gateway),
                }
                for address, one in found
            ],
        }
        if config.routes:
            record["routes"] = config.routes
        if dns:
            record["dns"] = dns
        try:
            return result.convert(record, config.version)
        except result.ResultError as exc:
            raise CniError(INTERNAL, str(exc)) from None

    def gateways(self, request: Request) -> list[Cidr]:
        """The gateway of each set that has just one; raises CniError 999."""
        return self._config(request).gateways

    def _config(self, request: Request) -> IpamConfig:
        if self._parsed is None or self._parsed[0] is not request:
            cni_args = args.relevant(request.environment.get("CNI_ARGS", ""), ARGUMENTS)
            self._parsed = request, self._host.known(_config, request.stdin, cni_args)
        return self._parsed[1]

    def undo(self, request: Request, made: gojson.Object) -> None:
        """Release the addresses in `made`, this request's result, and no others. Raises CniError 999."""
        owner = owner_of(request.container_id, request.ifname)
        current = result.convert(made, "1.0.0")
        texts = [str(one["address"]) for one in gojson.typed(current, "ips", list, [])]
        try:
            with self._existing(_place(request).store) as store, store.held() as held:
                for cidr in map(parse_cidr, texts):
                    held.free((cidr.family, cidr.value), owner)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise CniError(INTERNAL, _words(exc)) from None

    def delete(self, request: Request) -> None:
        """Release what the attachment holds; a repeated DEL succeeds. Raises CniError 999."""
        place = _place(request)
        owner = owner_of(request.container_id, request.ifname)
        try:
            with self._existing(place.store) as store, store.held() as held:
                # Upstream looks once for each set, and for files of very old versions when it finds no other.
                if not held.release(owner) or count_sets(request.config) > 1:
                    held.release(bare_owner(owner))
        except FileNotFoundError:
            return  # nothing was ever reserved in this network
        except OSError as exc:
            raise CniError(INTERNAL, _words(exc)) from None

    def check(self, request: Request) -> None:
        """Raise CniError 999 unless the attachment holds an address."""
        if not self.holds(self._config(request).place.store, request):
            text = f"host-local: Failed to find address added by container {request.container_id}"
            raise CniError(INTERNAL, text)

    def holds(self, path: str, request: Request) -> bool:
        """Whether the attachment holds an address in the store at `path`; raises CniError 999."""
        owner = owner_of(request.container_id, request.ifname)
        view = self._view(path)
        try:
            if view is not None:
                with self._host.files.directory(path) as directory:
                    known = view.glance(directory)
                if known is not None:
                    return known.has(owner)
            with self._existing(path) as store, store.held() as held:
                return held.holdings.has(owner)
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise CniError(INTERNAL, _words(exc)) from None

    def status(self, request: Request) -> None:
        """Raise CniError unless an ADD could work; code 50 if the store is at fault.

        That no address is left is told by metrics and notes: a runtime that hears 50 reports its whole node
        as not ready, and the pods that have the addresses would be driven out.
        """
        config = self._config(request)
        self._resolver(config.resolv_conf)
        try:
            with self._existing(config.place.store):
                self._check_writable(config.place.store)
        except (FileNotFoundError, NotADirectoryError):
            self._check_creatable(config.place.store)
        except OSError as exc:
            raise CniError(NOT_AVAILABLE, _words(exc)) from None

    def gc(self, request: Request) -> None:
        """Free what no attachment in the runtime's list holds; nothing without a list. Raises CniError."""
        place = _place(request)
        try:
            valid = NetConf(request.config).valid_attachments
            if valid is None:
                return
            with self._existing(place.store) as store, store.held() as held:
                self._collect(place, held, valid)
        except gojson.GoJsonError as exc:
            raise CniError(INTERNAL, f"json: {exc}") from None
        except FileNotFoundError:
            return
        except OSError as exc:
            raise CniError(INTERNAL, _words(exc)) from None

    def _collect(self, place: Place, held: Held, valid: frozenset[tuple[str, str]]) -> None:
        live_containers = {container_id for container_id, _ in valid}
        for name, owner in held.holdings.reservations():
            container_id, ifname = attachment_of(owner)
            # Very old files do not tell the interface.
            live = (container_id, ifname) in valid if ifname else container_id in live_containers
            if not live and held.remove(name):
                whose = f"{container_id or 'nobody'} {ifname}".rstrip()
                why = f"{whose} is no valid attachment"
                self._host.note(f"host-local: freed {name} in {place.store}: {why}")

    def _check_creatable(self, path: str) -> None:
        """Raise CniError 50 unless the missing directory can be made."""
        parent = path.rstrip("/").rpartition("/")[0] or "/"
        try:
            self._check_writable(parent)
        except FileNotFoundError:
            self._check_creatable(parent)
        except OSError as exc:
            raise CniError(NOT_AVAILABLE, str(StoreFault("mkdir", path, exc))) from None

    def _check_writable(self, path: str) -> None:
        """Raise OSError unless files can be made in the directory: one without a name is."""
        with self._host.files.directory(path) as directory:
            try:
                os.close(directory.open(".", os.O_WRONLY | os.O_TMPFILE))
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:  # not every file system can; ADD will tell
                    raise StoreFault("write", path, exc) from None

    def _store(self, place: Place) -> Store:
        """The store, made if need be."""
        try:
            directory = self._host.files.directory(place.store, _STORE_MODE)
        except OSError as exc:
            raise StoreFault("mkdir", place.store, exc) from None
        return Store(directory, self._view(place.store))

    def _existing(self, path: str) -> Store:
        """The store; raises FileNotFoundError if there is none."""
        return Store(self._host.files.directory(path), self._view(path))

    def _view(self, path: str) -> View | None:
        return None if self._indexes is None else self._indexes.of(path)

    def _resolver(self, path: str) -> gojson.Object:
        if not path:
            return {}
        try:
            return resolver(
                self._host.files.read(path, _LARGEST_RESOLV_CONF_BYTES).decode("utf-8", "replace")
            )
        except OSError as exc:
            verb = "read" if exc.errno == errno.EISDIR else "open"
            raise CniError(INTERNAL, str(StoreFault(verb, path, exc))) from None

    def _allocate(self, store: Store, config: IpamConfig, owner: bytes) -> list[tuple[Address, Range]]:
        """An address of each set with its range; if one cannot be had, the others are released."""
        wishes = list(config.requested)
        made: list[tuple[Address, Range]] = []
        with store.held() as held:
            self._look_back(config.place, held)
            try:
                for index, one in enumerate(config.sets):
                    wish = next((address for address in wishes if address in one), None)
                    if wish is not None:
                        wishes.remove(wish)
                    made.append(self._take(config.place, held, index, one, wish, owner))
                    used = one.used(held.holdings.taken[one.family])
                    self._tell(config.place.network, index, one, used)
                _refuse_unplaced(wishes)
            except BaseException:
                for address, _ in made:
                    held.free(address, owner)
                raise
        return made

    def _take(
        self, place: Place, held: Held, index: int, one: RangeSet, wish: Address | None, owner: bytes
    ) -> tuple[Address, Range]:
        """An address of one set with its range. Raises CniError, StoreFault."""
        try:
            try:
                return take_one(held, index, one, wish, owner, self._is_squatted)
            except NothingFree:
                if not self._reclaimer(place).when_exhausted(held):
                    raise
                return take_one(held, index, one, wish, owner, self._is_squatted)
        except Refused as exc:
            raise CniError(INTERNAL, f"failed to allocate for range {index}: {exc}") from None

    def _is_squatted(self, address: Address) -> bool:
        """Whether somebody has an address that is free by this store: podman's, say, which has its own."""
        if self._users is None or not self._users.are_known_to_have(address):
            return False
        text = address_text(address)
        self._host.note(f"host-local: {text} is not reserved here, yet somebody answers for it; passed over")
        return True

    def _look_back(self, place: Place, held: Held) -> None:
        """See to what earlier boots left, if this is the boot's first ADD."""
        view = self._view(place.store)
        if view is None or not view.settled:
            self._reclaimer(place).at_first_add(held)
        if view is not None:
            view.settled = True

    def _reclaimer(self, place: Place) -> Reclaimer:
        in_use = None if self._users is None else self._users.have
        return Reclaimer(self._host.files, self._host.note, place, in_use, self._results)

    def _tell(self, network: str, index: int, one: RangeSet, used: int) -> None:
        if self._report is not None:
            self._report(network, index, used, one.size)
        elif used >= _NEARLY_FULL * one.size:
            many = f"{used} of {one.size} addresses of range set {one}"
            self._host.note(f"host-local: network {network}: {many} are in use")


def _refuse_unplaced(wishes: list[Address]) -> None:
    if wishes:
        texts = " ".join(map(address_text, wishes))
        raise CniError(INTERNAL, f"failed to allocate all requested IPs: {texts}")


def _place(request: Request) -> Place:
    try:
        return Place(request.config)
    except gojson.GoJsonError as exc:
        raise CniError(INTERNAL, f"json: {exc}") from None


def _config(stdin: bytes, cni_args: str) -> IpamConfig:
    try:
        return IpamConfig(gojson.load_object(stdin), cni_args)
    except gojson.GoJsonError as exc:
        raise CniError(INTERNAL, f"json: {exc}") from None


def _words(exc: OSError) -> str:
    return str(exc) if isinstance(exc, StoreFault) else f"the store of host-local: {exc}"
