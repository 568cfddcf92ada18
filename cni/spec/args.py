"""CNI_ARGS, read as the Go library does: `KEY=value` pairs, separated by semicolons.

Source: CNI 1.1.0, "Parameters"; the Go library's LoadArgs.
"""

from __future__ import annotations

from cni.errors import INTERNAL, CniError
from cni.spec import gojson

_TRUE, _FALSE = ("1", "true"), ("0", "false")


def load(text: str, known: tuple[str, ...]) -> dict[str, str]:
    """The pairs whose key is in `known`; raises CniError 999 with the library's words.

    Others are an error unless IgnoreUnknown says that they are to be passed over.
    """
    found: dict[str, str] = {}
    unknown: list[str] = []
    ignore = False
    for pair in text.split(";") if text else ():
        key, equals, value = pair.partition("=")
        if not equals or "=" in value:
            raise CniError(INTERNAL, f"ARGS: invalid pair {gojson.dumps(pair)}")
        if key == "IgnoreUnknown":
            ignore = _boolean(key, value)
        elif key in known:
            found[key] = value
        else:
            unknown.append(pair)
    if unknown and not ignore:
        quoted = " ".join(gojson.dumps(pair) for pair in unknown)
        raise CniError(INTERNAL, f"ARGS: unknown args [{quoted}]")
    return found


def relevant(text: str, known: tuple[str, ...]) -> str:
    """`text` if it may say something of `known`, or may be wrong; else nothing, which says as much."""
    pairs = [pair.split("=") for pair in text.split(";")]
    try:
        found = dict(pairs)
    except ValueError:  # one of them is no pair
        return text
    is_plain = len(found) == len(pairs) and found.get("IgnoreUnknown") in _TRUE
    return "" if is_plain and found.keys().isdisjoint(known) else text


def _boolean(key: str, text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    pair = gojson.dumps(f"{key}={text}")
    reason = f"boolean unmarshal error: invalid input {text.lower()}"
    raise CniError(INTERNAL, f"ARGS: error parsing value of pair {pair}: {reason}")
