"""The CNI protocol short of IO: a request and a plugin give a response.

The executable calls this in its own process; a daemon can call the same function for a request that it was
handed. The checks, their order and their texts are those of the Go library's skel package, with one
exception: that the container's namespace is the plugin's own is noticed before the command runs, not after;
ADD is then refused, and DEL served as that of a container whose namespace is gone.

Source: CNI 1.1.0, "Section 2: Execution Protocol".
"""

from __future__ import annotations

from cni.errors import (
    DECODING_FAILURE,
    INCOMPATIBLE_VERSION,
    INTERNAL,
    INVALID_ENVIRONMENT,
    INVALID_NETNS,
    CniError,
    Declined,
)
from cni.spec import gojson, request, result, version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from cni.spec.request import Request

    class Plugin(Protocol):
        """What a CNI plugin does. Each method raises CniError; all but `add` may be repeated."""

        @property
        def about(self) -> str:
            """Name, version and platform in one line."""

        def owns_netns(self, path: str) -> bool:
            """Whether `path` is the namespace that the plugin itself runs in."""

        def add(self, request: Request) -> gojson.Object:
            """Attach the container; the result in the version that the request asks for."""

        def delete(self, request: Request) -> None:
            """Detach the container; its namespace may be gone."""

        def check(self, request: Request) -> None:
            """Check that the attachment is as prevResult says."""

        def status(self, request: Request) -> None:
            """Check that ADD could work."""

        def gc(self, request: Request) -> None:
            """Free what no valid attachment owns."""


_COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS")
# Commands that came after 0.1.0, and the version that a netconf must declare for them.
_SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}


class Response:
    """What goes to the runtime: exit status, stdout and stderr."""

    __slots__ = ("exit_code", "stderr", "stdout")

    def __init__(self, exit_code: int, stdout: bytes, stderr: str = "") -> None:
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr


def handle(req: Request, plugin: Plugin) -> Response:
    """Serve one request; raises nothing but Declined, which a daemon's host may raise."""
    if not req.command:
        versions = ", ".join(version.SUPPORTED)
        return Response(0, b"", f"{plugin.about}\nCNI protocol versions supported: {versions}\n")
    try:
        return Response(0, _serve(req, plugin))
    except CniError as exc:
        return failure(exc)
    except Declined:
        raise
    except Exception as exc:  # noqa: BLE001 - the one place where our own bugs surface
        import traceback

        text = f"flannel: internal error: {type(exc).__name__}: {exc}"
        return Response(1, failure(CniError(INTERNAL, text)).stdout, traceback.format_exc())


def failure(exc: CniError) -> Response:
    """The response that carries an error object, printed as the Go plugins do: without cniVersion."""
    record: gojson.Object = {"code": exc.code, "msg": exc.msg}
    if exc.details:
        record["details"] = exc.details
    return Response(1, gojson.dumps(record, indent="    ", sort=False).encode())


def _serve(req: Request, plugin: Plugin) -> bytes:
    """stdout of a command that succeeded; raises CniError."""
    command = req.command
    request.check_environment(req.environment)
    if command == "VERSION":
        return version.document()
    request.check_network_name(req)
    if command not in _COMMANDS:
        raise CniError(INVALID_ENVIRONMENT, f"unknown CNI_COMMAND: {command}")
    _check_versions(req)
    if command in ("ADD", "DEL") and _names_own_netns(req, plugin):
        if command == "ADD":
            text = "plugin's netns and netns from CNI_NETNS should not be the same"
            raise CniError(INVALID_NETNS, text)
        # /proc/PID/ns/net of a process that has taken the number over: the container's namespace is gone.
        req = req.for_attachment("DEL", req.container_id, req.ifname)
    match command:
        case "ADD":
            return result.write(plugin.add(req))
        case "DEL":
            plugin.delete(req)
        case "CHECK":
            plugin.check(req)
        case "GC":
            plugin.gc(req)
        case "STATUS":
            plugin.status(req)
    return b""


def _check_versions(req: Request) -> None:
    """The netconf's version must know the command, and must be one of ours."""
    wanted = req.version
    since = _SINCE.get(req.command)
    if since is not None:
        try:
            known = version.at_least(wanted, since)
            reachable = any(version.at_least(ours, wanted) for ours in version.SUPPORTED)
        except ValueError as exc:
            raise CniError(DECODING_FAILURE, str(exc)) from None
        if not known:
            raise CniError(INCOMPATIBLE_VERSION, f"config version does not allow {req.command}")
        if not reachable:
            raise CniError(INCOMPATIBLE_VERSION, f"plugin version does not allow {req.command}")
    version.check_supported(wanted)


def _names_own_netns(req: Request, plugin: Plugin) -> bool:
    netns = req.netns
    return bool(netns) and not req.may_share_netns and plugin.owns_netns(netns)
