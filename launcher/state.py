"""What was planned, on disk: a launcher that is killed at any instruction and started again goes on with it.

The file `state.json` in the state directory (a tmpfs of the pod) is written before the first change to the
namespace, so a namespace that we changed always has its file. It names the namespace and the boot it belongs
to: the file of another pod, or of this pod before the node went down, is detected and not half-believed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

from cni.errors import ConfigError
from cni.net.podlinks import Sysctl
from launcher import settings as settings_
from launcher.binding import NAMESPACE_SYSCTLS
from launcher.discover import PodInterface, PodRoute
from launcher.settings import Settings

FORMAT = 1
_LARGEST = 1 << 20
NAME = "state.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
# What JSON of another shape, or with values that cannot be, ends in.
_BROKEN = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, ConfigError)


@dataclass(frozen=True, slots=True)
class Place:
    """Which namespace of which boot a state belongs to."""

    device: int
    inode: int
    boot: str


@dataclass(frozen=True, slots=True)
class State:
    """All from which the plan follows: the pod's interface as it was found, and what was asked for.

    `before` are the settings below /proc/sys as they were.
    """

    place: Place
    settings: Settings
    pod: PodInterface
    before: tuple[Sysctl, ...]


def boot_id() -> str:
    """The kernel's name for this boot."""
    return _BOOT.read_text(encoding="ascii").strip()


def save(directory: Path, state: State) -> None:
    """Write the file, atomically and for our user alone; raises ConfigError if that cannot be done."""
    text = json.dumps(_to_json(state), indent=1) + "\n"
    temporary = directory / f".{NAME}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_ours(directory)
        descriptor = os.open(temporary, flags, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, 0o600)  # one that was there already keeps its mode
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / NAME)
    except OSError as exc:
        raise ConfigError(f"--state-dir={directory}: cannot write {NAME}: {exc.strerror}") from exc


def load(directory: Path, place: Place) -> State | None:
    """The state of this namespace, None without a file. Raises ConfigError for a foreign or broken one."""
    path = directory / NAME
    try:
        _require_ours(directory)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, encoding="utf-8") as file:
            _require_ours(path, file.fileno())
            text = file.read(_LARGEST)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    try:
        state = _from_json(json.loads(text))
    except _BROKEN as exc:
        raise ConfigError(
            f"{path} was not written by this version of virt-launcher ({exc!r}); "
            "take the interface back with the version that wrote it, or start the pod anew"
        ) from None
    if state.place != place:
        what = "another boot of this node" if state.place.boot != place.boot else "another network namespace"
        raise ConfigError(
            f"{path} belongs to {what}; "
            "give each pod a --state-dir of its own (an emptyDir), or remove the file"
        )
    return state


def _require_ours(path: Path, descriptor: int | None = None) -> None:
    """Raise ConfigError unless only we can have written there: what it says is done as root."""
    found = os.stat(path if descriptor is None else descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{path} belongs to user {found.st_uid} with mode {found.st_mode & 0o7777:04o}: "
            f"it must belong to user {os.geteuid()} and be writable for no other"
        )


def remove(directory: Path) -> None:
    """Forget the state; nothing happens if there is none."""
    (directory / NAME).unlink(missing_ok=True)


def _to_json(state: State) -> dict[str, object]:
    pod = state.pod
    return {
        "format": FORMAT,
        "netns": [state.place.device, state.place.inode],
        "boot": state.place.boot,
        "settings": settings_.to_json(state.settings),
        "pod": {
            "name": pod.name,
            "ifindex": pod.ifindex,
            "mac": pod.mac,
            "mtu": pod.mtu,
            "addresses": [str(address) for address in pod.addresses],
            "routes": [
                {
                    "dst": str(route.dst),
                    "via": str(route.via) if route.via else "",
                    "metric": route.metric,
                    "onlink": route.onlink,
                    "connected": route.connected,
                }
                for route in pod.routes
            ],
        },
        "before": [{"path": setting.path, "value": setting.value} for setting in state.before],
    }


def _from_json(record: Any) -> State:
    """Any: this is the constructor that checks what JSON brings."""
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r} is not {FORMAT}")
    device, inode = record["netns"]
    settings = settings_.from_json(record["settings"])
    settings.check()
    pod = record["pod"]
    return State(
        place=Place(int(device), int(inode), str(record["boot"])),
        settings=settings,
        pod=PodInterface(
            name=str(pod["name"]),
            ifindex=int(pod["ifindex"]),
            mac=str(pod["mac"]),
            mtu=int(pod["mtu"]),
            addresses=tuple(ip_interface(text) for text in pod["addresses"]),
            routes=tuple(
                PodRoute(
                    dst=ip_network(route["dst"]),
                    via=ip_address(route["via"]) if route["via"] else None,
                    metric=int(route["metric"]),
                    onlink=bool(route["onlink"]),
                    connected=bool(route["connected"]),
                )
                for route in pod["routes"]
            ),
        ),
        before=tuple(_setting(entry) for entry in record["before"]),
    )


def _setting(entry: Any) -> Sysctl:
    path, value = str(entry["path"]), str(entry["value"])
    if path not in NAMESPACE_SYSCTLS or not value.isdecimal():
        raise ValueError(f"{path}={value} is no setting of ours")
    return Sysctl(path, value)
