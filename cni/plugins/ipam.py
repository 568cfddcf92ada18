"""Calling an IPAM plugin: our own host-local in this process, any other as an executable.

Source: CNI 1.1.0, "Section 4: Plugin Delegation".
"""

from __future__ import annotations

from cni.errors import INTERNAL, CniError
from cni.plugins import delegate
from cni.plugins.hostlocal import HostLocal
from cni.spec import result, version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni.host import Host
    from cni.plugins.hostlocal import AddressUsers
    from cni.spec import gojson
    from cni.spec.address import Cidr
    from cni.spec.request import Request

_BUILT_IN = "host-local"


class Ipam:
    """The IPAM plugin `kind` of one request, which it gets just as it came."""

    __slots__ = ("_built_in", "_host", "_kind", "_path", "_request")

    def __init__(self, host: Host, kind: str, request: Request, users: AddressUsers | None = None) -> None:
        """Raises CniError if there is no such plugin, Declined where it cannot be executed.

        `users` are those who may have an address that no reservation, or one of an earlier boot, tells of.
        """
        self._host = host
        self._kind = kind
        self._request = request
        self._built_in = HostLocal(host, users=users) if kind == _BUILT_IN else None
        self._path = "" if self._built_in else host.find_program(kind, request.path)

    def add(self) -> gojson.Object:
        """The result in its current form; raises CniError."""
        if self._built_in is not None:
            made = self._built_in.add(self._request)
        else:
            made = self._parse(self._run("ADD"))
        return result.convert(made, "1.0.0")

    def gateways(self) -> list[Cidr]:
        """The gateways of the addresses that an ADD may give, as far as they can be told before. CniError."""
        return [] if self._built_in is None else self._built_in.gateways(self._request)

    def undo(self, made: gojson.Object) -> None:
        """Take back an ADD that gave `made`; raises CniError."""
        if self._built_in is not None:
            self._built_in.undo(self._request, made)
        else:
            self._run("DEL")

    def delete(self) -> None:
        """Release what the attachment holds; raises CniError."""
        if self._built_in is not None:
            self._built_in.delete(self._request)
        else:
            self._run("DEL")

    def check(self) -> None:
        """Raises CniError if the attachment holds nothing."""
        if self._built_in is not None:
            self._built_in.check(self._request)
        else:
            self._run("CHECK")

    def status(self) -> None:
        """Raises CniError if it could not serve an ADD."""
        if self._built_in is not None:
            self._built_in.status(self._request)
        else:
            self._run("STATUS")

    def gc(self) -> None:
        """Release what no valid attachment holds; raises CniError."""
        if self._built_in is not None:
            self._built_in.gc(self._request)
        else:
            self._run("GC")

    def _parse(self, stdout: bytes) -> gojson.Object:
        try:
            return result.parse(stdout, self._request.version or version.ABSENT)
        except result.ResultError as exc:
            raise CniError(INTERNAL, str(exc)) from None

    def _run(self, command: str) -> bytes:
        environment = {**self._request.environment, "CNI_COMMAND": command}
        return delegate.execute(self._host, self._kind, self._path, environment, self._request.stdin)
