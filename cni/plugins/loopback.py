"""The loopback plugin: brings `lo` of the container's namespace up.

Source: containernetworking/plugins 1.9, plugins/main/loopback; CNI 1.1.0.
"""

from __future__ import annotations

from cni.errors import INTERNAL, CniError, KernelError
from cni.host import NetnsInvalid, NetnsMissing
from cni.net import rtlink
from cni.plugins.about import about
from cni.plugins.portmapconf import previous_result
from cni.spec import gojson, result

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Host
    from cni.net.nlsocket import NetlinkSocket
    from cni.net.rtlink import AddressState
    from cni.spec.address import Cidr
    from cni.spec.request import Request

_LINK = "lo"  # whatever CNI_IFNAME says
_INDEX = 1  # of `lo`, in every namespace
_LOOPBACKS = {4: (0x7F << 24, 8), 6: (1, 128)}  # RFC 1122, 3.2.1.3 (g); RFC 4291, 2.5.3


class Loopback:
    """The plugin, for one call."""

    __slots__ = ("_host",)

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def about(self) -> str:
        return about("loopback")

    def owns_netns(self, path: str) -> bool:
        """Whether `path` is the namespace of the runtime itself; False if it cannot be told."""
        return self._host.shares_netns(path)

    def add(self, request: Request) -> gojson.Object:
        """Bring the link up; the result is prevResult, or else the link with its addresses.

        Raises CniError.
        """
        previous = _previous(request)
        route = self._host.netns(request.netns).route
        try:
            _transact(route, rtlink.set_link(_INDEX, up=True))
            addresses = _addresses(route)
        except KernelError as exc:
            raise CniError(INTERNAL, str(exc)) from None
        if previous is None:
            previous = _made(request.netns, addresses)
        try:
            return result.convert(previous, request.version)
        except result.ResultError as exc:
            raise CniError(INTERNAL, str(exc)) from None

    def delete(self, request: Request) -> None:
        """Bring the link down; without a namespace there is nothing to do. Raises CniError."""
        try:
            route = self._host.netns(request.netns).route
        except NetnsMissing:
            return
        except NetnsInvalid as exc:
            if not request.netns or exc.is_gone:
                return
            raise
        try:
            _transact(route, rtlink.set_down(_INDEX))
        except KernelError as exc:
            raise CniError(INTERNAL, str(exc)) from None

    def check(self, request: Request) -> None:
        """Raises CniError if the link is down."""
        _previous(request)
        route = self._host.netns(request.netns).route
        try:
            answer = route.request(*rtlink.get_link(ifindex=_INDEX))
        except KernelError as exc:
            raise CniError(INTERNAL, str(exc)) from None
        if not answer.messages or not rtlink.LinkState(answer.messages[0].body).up:
            raise CniError(INTERNAL, "loopback interface is down")

    def status(self, request: Request) -> None:
        """Always ready."""

    def gc(self, request: Request) -> None:
        """Nothing outlives the container's namespace."""


def _previous(request: Request) -> gojson.Object | None:
    try:
        return previous_result(request.config, request.version)
    except result.ResultError as exc:
        raise CniError(INTERNAL, f"failed to parse prevResult: {exc}") from None


def _transact(route: NetlinkSocket, change: tuple[int, int, bytes]) -> None:
    answer = route.request(*change)
    if answer.errno:
        raise CniError(INTERNAL, f'cannot change link "{_LINK}": {answer.reason}')


def _addresses(route: NetlinkSocket) -> list[Cidr]:
    """The first address of each family; raises CniError if any is no loopback address."""
    first: dict[int, Cidr] = {}
    for message in route.dump(*rtlink.get_addresses(0, _INDEX)):
        address: AddressState = rtlink.AddressState(message.body)
        if address.ifindex != _INDEX:
            continue  # of a kernel that lists all
        cidr = address.cidr
        network, prefix = _LOOPBACKS[cidr.family]
        bits = (32 if cidr.family == 4 else 128) - prefix
        if cidr.value >> bits != network >> bits:
            found = str(cidr).partition("/")[0]
            raise CniError(INTERNAL, f'loopback interface found with non-loopback address "{found}"')
        first.setdefault(cidr.family, cidr)
    return [first[family] for family in sorted(first)]


def _made(netns: str, addresses: list[Cidr]) -> gojson.Object:
    """The result in its current form."""
    made: gojson.Object = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": _LINK, "mac": "00:00:00:00:00:00", "sandbox": netns}],
    }
    if addresses:
        made["ips"] = [{"interface": 0, "address": str(cidr)} for cidr in addresses]
    return made
