"""Command line and FLANNELD_* variables, with the syntax of Go's `flag` package.

`-x` and `--x` are the same flag, a value follows after `=` or as the next word (of a bool only after
`=`), and the first word that is no flag ends the flags; what is left is ignored. A flag on the
command line wins over its variable, and that over the default.

Decision: a variable with a bad value leaves the default in force. Go's own setters store zero before
they report the error, so that upstream would go on with, say, the forward rules switched off.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from cni.errors import ConfigError

_BOOLS = {
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}

# Go's integer literals: an underscore only between digits or after the base prefix, a leading zero for octal.
_INT = re.compile(
    r"([+-]?)(?:0[xX](?P<x>(?:_?[0-9a-fA-F])+)|0[bB](?P<b>(?:_?[01])+)|0[oO]?(?P<o>(?:_?[0-7])+)"
    r"|(?P<d>0|[1-9](?:_?[0-9])*))"
)
_BASES = {"x": 16, "b": 2, "o": 8, "d": 10}
_DECIMAL = re.compile(r"[+-]?[0-9]+")


class FlagError(ConfigError):
    """The command line is no flag syntax, or a flag is unknown or has a bad value; the text is Go's."""


class HelpAsked(Exception):
    """`-h` or `--help` was met."""


class VersionAsked(Exception):
    """`--version` was given, and the rest of the command line is right."""


def _bool(text: str) -> bool:
    if text not in _BOOLS:
        raise ValueError("parse error")
    return _BOOLS[text]


def _in_range(digits: str, base: int, bits: int) -> int:
    try:
        number = int(digits, base)
    except ValueError:  # the pattern has passed, so it is Python's limit on the number of digits
        raise ValueError("value out of range") from None
    if not -(2 ** (bits - 1)) <= number < 2 ** (bits - 1):
        raise ValueError("value out of range")
    return number


def _int(text: str) -> int:
    """Go's `ParseInt` with base 0 and 64 bits."""
    match = _INT.fullmatch(text)
    if match is None or match.lastgroup is None:
        raise ValueError("parse error")
    return _in_range(match[1] + match[match.lastgroup].lstrip("_"), _BASES[match.lastgroup], 64)


def _level(text: str) -> int:
    """The log library's own flag type: base 10 and 32 bits."""
    if _DECIMAL.fullmatch(text) is None:
        raise ValueError("parse error")
    return _in_range(text, 10, 32)


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _modules(text: str) -> tuple[tuple[str, int], ...]:
    """klog's `pattern=N,...`; level 0 raises nothing and is left out."""
    found = []
    for part in filter(None, text.split(",")):
        pattern, equals, level = part.partition("=")
        if not (pattern and equals and _DECIMAL.fullmatch(level)):
            raise ValueError("syntax error: expect comma-separated list of filename=N")
        found.append((pattern, _not_negative(level, "vmodule level")))
    return tuple((pattern, level) for pattern, level in found if level)


def _place(text: str) -> str:
    """klog's `file.go:234`, in one spelling; line 0 is no place."""
    if not text:
        return ""
    file, colon, line = text.partition(":")
    if "." not in file or not (colon and _DECIMAL.fullmatch(line)):
        raise ValueError("syntax error: expect file.go:234")
    number = _not_negative(line, "line")
    return f"{file}:{number}" if number else ""


def _not_negative(digits: str, what: str) -> int:
    number = _in_range(digits, 10, 32)
    if number < 0:
        raise ValueError(f"negative value for {what}")
    return number


@dataclass(frozen=True, slots=True)
class _Kind:
    """A type of flag: how usage names it, what a good value is, and how to read one."""

    word: str
    right: str
    read: Callable[[str], object]


_TEXT = _Kind("string", "any text", str)
_COMMAS = _Kind("string", "a comma list", _split)
_EACH = _Kind("value", "any text", str)
_INTEGER = _Kind("int", "a whole number", _int)
_LEVEL = _Kind("value", "a decimal number", _level)
_MODULES = _Kind("value", "a comma list of pattern=N", _modules)
_PLACE = _Kind("value", "file.py:N", _place)
_SWITCH = _Kind("", "true or false", _bool)


def _flag(kind: _Kind, usage: str, name: str = "") -> dict[str, object]:
    return {"kind": kind, "usage": usage, "name": name}


class Store(Enum):
    """Where leases are kept."""

    KUBERNETES = "kubernetes"
    ETCD = "etcd"
    SQLITE = "sqlite"


@dataclass(frozen=True, slots=True)
class Options:
    """Every flag's value; the field is the flag's name with underscores. Defaults are upstream's."""

    etcd_endpoints: tuple[str, ...] = field(
        default=("http://127.0.0.1:4001", "http://127.0.0.1:2379"),
        metadata=_flag(_COMMAS, "comma-separated endpoints; giving any selects etcd as the store"),
    )
    etcd_prefix: str = field(
        default="/coreos.com/network", metadata=_flag(_TEXT, "prefix of the keys in etcd")
    )
    etcd_keyfile: str = field(default="", metadata=_flag(_TEXT, "PEM file with the client's key for etcd"))
    etcd_certfile: str = field(
        default="", metadata=_flag(_TEXT, "PEM file with the client's certificate for etcd")
    )
    etcd_cafile: str = field(
        default="", metadata=_flag(_TEXT, "PEM file with the certificate authority of etcd")
    )
    etcd_username: str = field(default="", metadata=_flag(_TEXT, "user name for etcd"))
    etcd_password: str = field(default="", metadata=_flag(_TEXT, "password for etcd"))
    iface: tuple[str, ...] = field(
        default=(),
        metadata=_flag(
            _EACH,
            "name or address of the interface between nodes; may be repeated, tried in order",
        ),
    )
    iface_regex: tuple[str, ...] = field(
        default=(),
        metadata=_flag(
            _EACH,
            "regular expression on addresses and names of interfaces; may be repeated, tried after --iface",
        ),
    )
    iface_can_reach: str = field(
        default="",
        metadata=_flag(_TEXT, "address whose route names the interface; tried after --iface-regex"),
    )
    subnet_file: str = field(
        default="/run/flannel/subnet.env", metadata=_flag(_TEXT, "file that tells the CNI plugin the subnet")
    )
    public_ip: str = field(default="", metadata=_flag(_TEXT, "IPv4 address at which peers reach this node"))
    public_ipv6: str = field(default="", metadata=_flag(_TEXT, "IPv6 address at which peers reach this node"))
    subnet_lease_renew_margin: int = field(
        default=60,
        metadata=_flag(
            _INTEGER, "minutes before a lease ends at which it is renewed, from 1 to 1439; etcd only"
        ),
    )
    ip_masq: bool = field(
        default=False, metadata=_flag(_SWITCH, "masquerade traffic that leaves the network")
    )
    ip_masq_fully_random_disable: bool = field(
        default=False, metadata=_flag(_SWITCH, "masquerade without fully random source ports")
    )
    kube_subnet_mgr: bool = field(
        default=False, metadata=_flag(_SWITCH, "take the subnet from the Kubernetes API")
    )
    kube_api_url: str = field(
        default="", metadata=_flag(_TEXT, "URL of the Kubernetes API server; not needed in a pod")
    )
    kube_annotation_prefix: str = field(
        default="flannel.alpha.coreos.com", metadata=_flag(_TEXT, "prefix of the annotations on nodes")
    )
    kubeconfig_file: str = field(default="", metadata=_flag(_TEXT, "kubeconfig file; not needed in a pod"))
    version: bool = field(default=False, metadata=_flag(_SWITCH, "print the version and exit"))
    healthz_ip: str = field(
        default="0.0.0.0",  # noqa: S104 - upstream's default
        metadata=_flag(_TEXT, "address of the health server"),
    )
    healthz_port: int = field(
        default=0, metadata=_flag(_INTEGER, "port of the health server; 0 switches it off")
    )
    iptables_resync: int = field(
        default=5, metadata=_flag(_INTEGER, "seconds between checks of the firewall rules")
    )
    iptables_forward_rules: bool = field(
        default=True, metadata=_flag(_SWITCH, "accept forwarded traffic of the network in the firewall")
    )
    ip_blackhole_route: bool = field(
        default=False,
        metadata=_flag(_SWITCH, "drop traffic to addresses of this node's subnet that are free"),
    )
    net_config_path: str = field(
        default="/etc/kube-flannel/net-conf.json",
        metadata=_flag(_TEXT, "file with the network configuration"),
    )
    set_node_network_unavailable: bool = field(
        default=True, metadata=_flag(_SWITCH, "clear the node's NetworkUnavailable condition when up")
    )
    v: int = field(
        default=0,
        metadata=_flag(_LEVEL, "verbosity of the log; 2 adds changes of leases, 4 operations on the kernel"),
    )
    vmodule: tuple[tuple[str, int], ...] = field(
        default=(),
        metadata=_flag(
            _MODULES, "verbosity by source file, as comma-separated pattern=N: reconcile=4,etc*=2"
        ),
    )
    log_backtrace_at: str = field(
        default="",
        metadata=_flag(
            _PLACE, "file:N of a line that logs: a stack trace follows what it logs", "log_backtrace_at"
        ),
    )
    lease_db: str = field(
        default="",
        metadata=_flag(_TEXT, "database of the embedded store; empty means leases.db in --state-dir"),
    )
    state_dir: str = field(
        default="/var/lib/flannel", metadata=_flag(_TEXT, "directory for what must outlive a restart")
    )
    cni_socket: str = field(
        default="/run/flannel/cni.sock",
        metadata=_flag(
            _TEXT, "socket at which calls of the CNI plugin are served; empty leaves them to the plugin"
        ),
    )
    etcd_asked: bool = False
    """Whether --etcd-endpoints was given, by flag or variable, even with its default."""

    @property
    def store(self) -> Store:
        """Kubernetes if asked for, else etcd if endpoints were given, else the embedded SQLite."""
        if self.kube_subnet_mgr:
            return Store.KUBERNETES
        return Store.ETCD if self.etcd_asked else Store.SQLITE

    @property
    def lease_db_path(self) -> str:
        """The embedded store's file."""
        return self.lease_db or f"{self.state_dir.rstrip('/')}/leases.db"

    def redacted(self) -> str:
        """Every flag as `name=JSON`, on one line for the log, passwords replaced."""
        return " ".join(f"{f.name}={_loggable(f, getattr(self, f.attribute))}" for f in _FLAGS.values())


@dataclass(frozen=True, slots=True)
class _Flag:
    name: str
    attribute: str
    kind: _Kind
    default: object
    usage: str

    @property
    def variable(self) -> str:
        return "FLANNELD_" + self.name.upper().replace("-", "_")


def _table() -> dict[str, _Flag]:
    """The flags by name, in the order of their names, as Go visits them."""
    found = (
        _Flag(
            name=f.metadata["name"] or f.name.replace("_", "-"),
            attribute=f.name,
            kind=f.metadata["kind"],
            default=f.default,
            usage=f.metadata["usage"],
        )
        for f in fields(Options)
        if f.metadata
    )
    return {flag.name: flag for flag in sorted(found, key=lambda flag: flag.name)}


_FLAGS = _table()
_URL_PASSWORD = re.compile(r"^((?:[^/@]*://)?[^/:@]*):[^/]*@")


def _loggable(flag: _Flag, value: object) -> str:
    if flag.name == "etcd-password" and value:
        return '"***"'
    if flag.name == "etcd-endpoints" and isinstance(value, tuple):
        value = [_without_password(url) for url in value]
    if flag.name == "kube-api-url" and isinstance(value, str):
        value = _without_password(value)
    return json.dumps(value)


def _without_password(url: str) -> str:
    return _URL_PASSWORD.sub(r"\1:***@", url)


@dataclass(frozen=True, slots=True)
class Parsed:
    """The options, and a line for the log about each variable that was ignored."""

    options: Options
    warnings: tuple[str, ...]


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Parsed:
    """Read the words after the program's name, then FLANNELD_* for the flags not among them.

    Raises FlagError, HelpAsked or VersionAsked, whichever is met first; the variables are then not read.
    """
    # Any: a value has the type of its flag's field, because the flag's kind made it.
    values: dict[str, Any] = {}
    for flag, text in _words(argv):
        try:
            _set(values, flag, text)
        except ValueError as exc:
            what = "boolean value" if flag.kind is _SWITCH else "value"
            where = f"for -{flag.name}" if flag.kind is _SWITCH else f"for flag -{flag.name}"
            raise FlagError(f"invalid {what} {_quoted(text)} {where}: {exc}") from None
    if values.get("version"):
        raise VersionAsked
    warnings = _from_environment(values, environ)
    return Parsed(Options(**values, etcd_asked="etcd_endpoints" in values), tuple(warnings))


def _words(argv: Sequence[str]) -> Iterator[tuple[_Flag, str]]:
    """Each flag with its value's text; one word at a time, so that the first error counts."""
    rest = deque(argv)
    while rest:
        word = rest.popleft()
        if len(word) < 2 or word[0] != "-" or word == "--":
            return
        name, equals, text = word.removeprefix("-").removeprefix("-").partition("=")
        if not name or name.startswith("-"):
            raise FlagError(f"bad flag syntax: {_one_line(word)}")
        flag = _FLAGS.get(name)
        if flag is None and name in ("h", "help"):
            raise HelpAsked
        if flag is None:
            raise FlagError(f"flag provided but not defined: -{_one_line(name)}")
        if not equals and flag.kind is _SWITCH:
            text = "true"
        elif not equals:
            if not rest:
                raise FlagError(f"flag needs an argument: -{name}")
            text = rest.popleft()
        yield flag, text


def _set(values: dict[str, Any], flag: _Flag, text: str) -> None:
    value = flag.kind.read(text)
    repeatable = isinstance(flag.default, tuple) and flag.kind is _EACH
    values[flag.attribute] = (*values.get(flag.attribute, ()), value) if repeatable else value


def _from_environment(values: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Add what only a variable gives (an empty one gives nothing); return the complaints."""
    warnings = []
    for flag in _FLAGS.values():
        text = environ.get(flag.variable, "")
        if not text or flag.attribute in values or flag.name == "version":
            continue
        try:
            _set(values, flag, text)
        except ValueError as exc:
            warnings.append(
                f"{flag.variable} {_quoted(text)} is ignored ({exc}): it must be {flag.kind.right}; "
                f"--{flag.name} stays {_shown(flag.default) or 'unset'}"
            )
    return warnings


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _one_line(word: str) -> str:
    return word if word.isprintable() else _quoted(word)


def _shown(default: object) -> str:
    match default:
        case bool():
            return "true" if default else "false"
        case tuple():
            return ",".join(default)
        case _:
            return str(default)


def usage(program: str) -> str:
    """The help text: flags by name, each with its default unless that is zero or empty, as Go lists them."""
    lines = [f"Usage: {program} [OPTION]..."]
    for flag in _FLAGS.values():
        lines.append(f"  -{flag.name} {flag.kind.word}".rstrip())
        default = _shown(flag.default)
        if flag.kind.word == "string":
            default = _quoted(default)
        suffix = f" (default {default})" if flag.default else ""
        lines.append(f"    \t{flag.usage}{suffix}")
    return "\n".join(lines) + "\n"


def check_ranges(options: Options) -> None:
    """Raise ConfigError if a value is of the right type and yet of no use, as upstream does at start."""
    margin = options.subnet_lease_renew_margin
    if not 1 <= margin <= 1439:
        raise ConfigError(
            f"--subnet-lease-renew-margin is {margin}: it must be from 1 to 1439 minutes, "
            f"for a lease lasts 1440"
        )
