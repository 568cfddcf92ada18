"""Versions of the CNI specification: which we speak, and how they compare."""

from __future__ import annotations

from cni.errors import INCOMPATIBLE_VERSION, CniError
from cni.spec import gojson

SUPPORTED = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
CURRENT = "1.1.0"
ABSENT = "0.1.0"  # what a netconf without cniVersion means


def parse(version: str) -> tuple[int, int, int]:
    """The version as numbers, for ordering: one to three parts, missing parts 0, empty means 0.1.0.

    Raises ValueError. That a version is supported is another question: its text must be in `SUPPORTED`.
    """
    if not version:
        version = ABSENT
    parts = version.split(".")
    if len(parts) > 3:
        raise ValueError(f"invalid version {gojson.dumps(version)}: too many parts")
    numbers = []
    for name, part in zip(("major", "minor", "micro"), parts, strict=False):
        if not (part.isascii() and part.removeprefix("-").removeprefix("+").isdigit()):
            raise ValueError(f"failed to convert {name} version part {gojson.dumps(part)}: invalid syntax")
        numbers.append(int(part))
    major, minor, micro = (*numbers, 0, 0)[:3]
    return major, minor, micro


def at_least(version: str, floor: str) -> bool:
    """Whether `version` is `floor` or newer; raises ValueError."""
    return parse(version) >= parse(floor)


def check_supported(version: str) -> None:
    """Raise CniError 1 unless `version` is exactly one of ours."""
    if version not in SUPPORTED:
        ours = " ".join(f'"{one}"' for one in SUPPORTED)
        raise CniError(
            INCOMPATIBLE_VERSION,
            "incompatible CNI versions",
            f"config is {gojson.dumps(version)}, plugin supports [{ours}]",
        )


def best_below(offered: list[str], ceiling: str) -> str | None:
    """The highest of `offered` that we speak too and that is lower than `ceiling`, if there is one."""
    try:
        limit = parse(ceiling)
    except ValueError:
        return None
    return next((one for one in reversed(SUPPORTED) if one in offered and parse(one) < limit), None)


def document() -> bytes:
    """The answer to VERSION, as the reference library prints it."""
    record: gojson.Object = {"cniVersion": CURRENT, "supportedVersions": list(SUPPORTED)}
    return gojson.dumps(record, sort=False).encode() + b"\n"
