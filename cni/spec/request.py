"""One call of a CNI plugin: the runtime's environment and stdin as a value, and their checks.

Source: CNI 1.1.0, "Parameters"; order and texts of the checks are those of the Go library's skel package.
"""

from __future__ import annotations

from cni.errors import DECODING_FAILURE, INVALID_CONFIG, INVALID_ENVIRONMENT, CniError
from cni.spec import gojson, version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# (variable, commands that need it) in the order in which they are read and reported.
_REQUIRED = (
    ("CNI_CONTAINERID", ("ADD", "CHECK", "DEL")),
    ("CNI_NETNS", ("ADD", "CHECK")),
    ("CNI_IFNAME", ("ADD", "CHECK", "DEL")),
    ("CNI_PATH", ("ADD", "CHECK", "DEL", "GC", "STATUS")),
)
_ALPHANUMERIC = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_NAME_CHARACTERS = _ALPHANUMERIC | frozenset("_.-")
_LONGEST_IFNAME_BYTES = 15  # the kernel's IFNAMSIZ less the final NUL


class Request:
    """A plugin call. stdin is not parsed, by `load`, before `config` is asked for, which nobody changes."""

    __slots__ = ("_config", "_load", "_stdin", "_version", "environment")

    def __init__(
        self,
        environment: Mapping[str, str],
        stdin: bytes,
        load: Callable[[bytes], gojson.Object] = gojson.load_object,
    ) -> None:
        self.environment = environment
        self._stdin: bytes | None = stdin
        self._load = load
        self._config: gojson.Object | None = None
        self._version = ""

    @property
    def stdin(self) -> bytes:
        if self._stdin is None:
            self._stdin = gojson.dumps(self.config).encode()
        return self._stdin

    @property
    def command(self) -> str:
        return self.environment.get("CNI_COMMAND", "")

    @property
    def container_id(self) -> str:
        return self.environment.get("CNI_CONTAINERID", "")

    @property
    def netns(self) -> str:
        """Path of the container's network namespace; may be empty for DEL."""
        return self.environment.get("CNI_NETNS", "")

    @property
    def ifname(self) -> str:
        return self.environment.get("CNI_IFNAME", "")

    @property
    def path(self) -> list[str]:
        """The directories in which delegates are looked for."""
        return self.environment.get("CNI_PATH", "").split(":")

    @property
    def may_share_netns(self) -> bool:
        """Whether the runtime says that the container may live in the plugin's own namespace."""
        override = self.environment.get("CNI_NETNS_OVERRIDE", "")
        return override == "1" or override.lower() == "true"

    @property
    def config(self) -> gojson.Object:
        """stdin as a JSON object; raises gojson.GoJsonError."""
        if self._config is None:
            self._config = self._load(self.stdin)
        return self._config

    @property
    def version(self) -> str:
        """The netconf's cniVersion, 0.1.0 if it has none; raises CniError 6."""
        if not self._version:
            try:
                self._version = gojson.typed(self.config, "cniVersion", str, "") or version.ABSENT
            except gojson.GoJsonError as exc:
                raise CniError(DECODING_FAILURE, f"decoding version from network config: {exc}") from None
        return self._version

    def for_attachment(self, command: str, container_id: str, ifname: str) -> Request:
        """The request of an attachment whose namespace is gone, on the runtime's behalf."""
        changed = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container_id,
            "CNI_IFNAME": ifname,
            "CNI_NETNS": "",
        }
        return Request({**self.environment, **changed}, self.stdin, self._load)

    def having(self, name: str, value: object) -> Request:
        """The same request with a member of its netconf set; raises gojson.GoJsonError."""
        made = Request(self.environment, b"", self._load)
        made._stdin, made._config = None, gojson.having(self.config, name, value)
        return made


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise CniError 4 unless all variables that the command needs are there and well formed."""
    command = environment.get("CNI_COMMAND", "")
    missing = [] if command else ["CNI_COMMAND"]
    for name, commands in _REQUIRED:
        if command not in commands:
            continue
        value = environment.get(name, "")
        if not value:
            missing.append(name)
        elif name == "CNI_CONTAINERID":
            _check_container_id(value)
        elif name == "CNI_IFNAME":
            _check_ifname(value)
    if missing:
        raise CniError(INVALID_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")


def check_network_name(request: Request) -> None:
    """Raise CniError 6 or 7 unless stdin is a JSON object with a proper network name."""
    try:
        name = gojson.typed(request.config, "name", str, "")
    except gojson.GoJsonError as exc:
        raise CniError(DECODING_FAILURE, f"error unmarshall network config: {exc}") from None
    if not name:
        raise CniError(INVALID_CONFIG, "missing network name")
    if not is_name(name):
        raise CniError(INVALID_CONFIG, "invalid characters found in network name", name)


def is_name(text: str) -> bool:
    """Whether `text` can be a container ID or network name (so also: one harmless file name)."""
    return bool(text) and text[0] in _ALPHANUMERIC and _NAME_CHARACTERS.issuperset(text)


def _check_container_id(container_id: str) -> None:
    if not is_name(container_id):
        raise CniError(INVALID_ENVIRONMENT, "invalid characters in containerID", container_id)


def _check_ifname(ifname: str) -> None:
    if len(ifname) <= _LONGEST_IFNAME_BYTES and ifname.isascii() and ifname.isalnum():
        return
    if len(ifname.encode("utf-8", "surrogateescape")) > _LONGEST_IFNAME_BYTES:
        details = "interface name should be less than 16 characters"
        raise CniError(INVALID_ENVIRONMENT, "interface name is too long", details)
    if ifname in (".", ".."):
        raise CniError(INVALID_ENVIRONMENT, "interface name is . or ..")
    if any(c in "/:" or _is_space(c) for c in ifname):
        raise CniError(INVALID_ENVIRONMENT, "interface name contains / or : or whitespace characters")


def _is_space(character: str) -> bool:
    """Unicode's White_Space, as in Go; Python also counts the four separators U+001C to U+001F."""
    return character.isspace() and not "\x1c" <= character <= "\x1f"
