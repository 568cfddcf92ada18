"""JSON as Go's encoding/json reads and writes it.

Our peers are Go programs, so what they accept and print is the contract: member names of a record
match without regard to case and the last one wins, `null` leaves the default, NaN and trailing
data are errors, numbers in free-form objects are 64-bit floats, and the writer sorts the keys of
maps, adds no spaces and escapes `<`, `>` and `&`.

Decision: the C scanner behind the standard library's `json` is used directly. `import json` costs 8 ms
(it loads `re` and `enum`), more than the rest of a CNI plugin's start; it is imported only to word an error.
"""

from __future__ import annotations

from _json import encode_basestring, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

Object = dict[str, object]

_ABSENT = object()


class GoJsonError(ValueError):
    """The text is no JSON as Go reads it, or a member has the wrong type."""


class Number(float):
    """A JSON number: a float64 as Go's `interface{}` holds it, which remembers how it was written."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        if number in (float("inf"), float("-inf")):
            raise GoJsonError(f"number {text} is out of range of a 64-bit float")
        number.text = text
        return number

    def __reduce__(self) -> tuple[type[Number], tuple[str]]:
        return Number, (self.text,)


def _constant(word: str) -> object:
    raise GoJsonError(f"{word} is not JSON")


class Record(dict[str, object]):
    """An object as it was read. It knows its members by their folded names as long as nobody changes it."""

    __slots__ = ("folded",)
    folded: Object | None

    def __setitem__(self, name: str, value: object) -> None:
        self.folded = None
        super().__setitem__(name, value)


def _in_order(pairs: list[tuple[str, object]]) -> Object:
    """A dict whose order is that of each key's last appearance, so that "last one wins" can be told."""
    found = dict(pairs)
    if len(found) < len(pairs):
        found = {}
        for key, value in pairs:
            found.pop(key, None)
            found[key] = value
    record = Record(found)
    record.folded = {_fold(key): value for key, value in found.items() if value is not None}
    return record


class _Rules:
    """What `json.JSONDecoder` hands to its scanner."""

    strict = True
    object_hook = None
    object_pairs_hook = staticmethod(_in_order)
    parse_float = Number
    parse_int = Number
    parse_constant = staticmethod(_constant)
    memo: dict[str, str] = {}  # noqa: RUF012 - the scanner's own table of keys, emptied after each document


_scan = make_scanner(_Rules)  # type: ignore[arg-type]  # any object with these attributes does
_BLANK = " \t\r\n"


def loads(data: bytes | str) -> object:
    """Parse one JSON document; raises GoJsonError. Invalid UTF-8 becomes U+FFFD, as in Go."""
    text = (data.decode("utf-8", "replace") if isinstance(data, bytes) else data).lstrip(_BLANK)
    try:
        value, end = _scan(text, 0)
        if "\\ud" in text or "\\uD" in text:
            value = _whole(value)
    except GoJsonError:
        raise
    except RecursionError:
        raise GoJsonError("nested too deeply") from None
    except (ValueError, StopIteration, SystemError):
        # The bare scanner knows that the text is wrong, but cannot say so without the `json` package.
        raise GoJsonError(_complaint(text)) from None
    if text[end:].strip(_BLANK):
        raise GoJsonError(f"data after the top-level value: {text[end:].strip(_BLANK)[:40]!r}")
    return value


def _whole(value: object) -> object:
    """`value` with U+FFFD in the place of each half of a surrogate pair, as Go reads it."""
    match value:
        case str():
            return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in value)
        case list():
            return [_whole(one) for one in value]
        case dict():
            return _in_order([(str(_whole(key)), _whole(one)) for key, one in value.items()])
    return value


def _complaint(text: str) -> str:
    """Why `text`, which the scanner refused, is no JSON."""
    import json

    if not text:
        return "unexpected end of JSON input"
    try:
        json.loads(text)
    except ValueError as exc:
        return str(exc)
    return "not JSON"


def load_object(data: bytes | str) -> Object:
    """Parse one JSON object (or `null`, which counts as an empty one); raises GoJsonError."""
    value = loads(data)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise GoJsonError(f"expected a JSON object, found {kind(value)}")
    return value


def kind(value: object) -> str:
    """What Go calls the JSON type of `value`, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
        case _:
            return f"number {value.text}" if isinstance(value, Number) else "number"


def member(record: Object, name: str) -> object:
    """The value of a record's member: any case, the last one that is not null, else None."""
    if isinstance(record, Record) and record.folded is not None:
        return record.folded.get(_folded.get(name) or _fold(name))
    found: object = None
    length = len(name)
    for key, value in record.items():
        # Folding replaces letter by letter; most keys are told apart by their length.
        if len(key) == length and value is not None and (key == name or _fold(key) == _fold(name)):
            found = value
    return found


def having(record: Object, name: str, value: object) -> Object:
    """A record with a member set, in the place of any of that name; the other members are shared."""
    folded = _fold(name)
    return _in_order([*((key, one) for key, one in record.items() if _fold(key) != folded), (name, value)])


def has(record: Object, name: str) -> bool:
    """Whether the member was written at all, even as null."""
    folded = _fold(name)
    return any(_fold(key) == folded for key in record)


def _fold(name: str) -> str:
    """Go's simple case folding, as far as ASCII letters take part in it (Kelvin sign, long s)."""
    return name.lower().replace("\u017f", "s")


# Of the members that each call looks for.
_folded = {name: _fold(name) for name in ("cniVersion", "name", "ipam", "prevResult")}


def typed(record: Object, name: str, wanted: type[T], default: T) -> T:
    """The member as `wanted` (bool, str, list or dict); absent or null gives the default."""
    value = member(record, name)
    if value is None:
        return default
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        raise GoJsonError(f"{name} must be {_WORDS[wanted]}, found {kind(value)}")
    return value


def integer(record: Object, name: str, default: int | None, low: int, high: int) -> int | None:
    """The member as an integer from low to high; as in Go, `1450.0` and `"1450"` are errors."""
    value = member(record, name)
    if value is None:
        return default
    text = value.text if isinstance(value, Number) else ""
    if not text.lstrip("-").isdigit() or not low <= int(text) <= high:
        found = _string(value) if isinstance(value, str) else kind(value)
        raise GoJsonError(f"{name} must be an integer from {low} to {high}, found {found}")
    return int(text)


_WORDS: dict[type, str] = {bool: "true or false", str: "a string", list: "an array", dict: "an object"}

# What stands for itself; most texts hold nothing else.
_PLAIN = frozenset(map(chr, range(0x20, 0x7F))) - frozenset('"\\<>&')
# Go's encoder escapes these so that JSON can stand inside HTML and JavaScript.
_ESCAPES = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def _string(text: str) -> str:
    if _PLAIN.issuperset(text):
        return f'"{text}"'
    if text.isascii():
        return encode_basestring(text).translate(_ESCAPES)
    # A lone surrogate has no UTF-8 form; Go writes the replacement character.
    cleaned = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    return encode_basestring(cleaned).translate(_ESCAPES)


def _number(value: float) -> str:
    """A float as Go prints it: shortest digits, exponent form below 1e-6 and from 1e21 on."""
    if isinstance(value, int):
        return str(value)
    if value == 0:
        return "-0" if str(float(value)).startswith("-") else "0"
    mantissa, _, exponent = f"{float(value)!r}e0".partition("e")
    exponent = exponent.removesuffix("e0")
    digits = mantissa.lstrip("-").replace(".", "")
    point = len(mantissa.lstrip("-").partition(".")[0]) + int(exponent or 0)
    stripped = digits.lstrip("0")
    point -= len(digits) - len(stripped)
    digits = stripped.rstrip("0") or "0"
    sign = "-" if value < 0 else ""
    if abs(value) < 1e-6 or abs(value) >= 1e21:
        fraction = f".{digits[1:]}" if len(digits) > 1 else ""
        power = point - 1
        return f"{sign}{digits[0]}{fraction}e{'-' if power < 0 else '+'}{abs(power):02d}".replace("e-0", "e-")
    if point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    if point >= len(digits):
        return sign + digits + "0" * (point - len(digits))
    return f"{sign}{digits[:point]}.{digits[point:]}"


def dumps(value: object, indent: str = "", sort: bool = True) -> str:
    """Write `value` as Go does: compact, or broken into lines when `indent` is given.

    `sort` orders the members of every object by name, as Go does for maps; without it they keep the
    order of the dict, as the fields of a Go struct do. Raises GoJsonError for what is nested too deeply.
    """
    try:
        return _write(value, indent, sort, "\n" if indent else "")
    except RecursionError:
        raise GoJsonError("nested too deeply") from None


def _write(value: object, indent: str, sort: bool, newline: str) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, dict):
        if not value:
            return "{}"
        colon, inner = ": " if indent else ":", newline + indent
        members = [
            f"{_string(name)}{colon}"
            f"{_string(one) if type(one := value[name]) is str else _write(one, indent, sort, inner)}"
            for name in (sorted(value) if sort else value)
        ]
        return f"{{{inner}{f',{inner}'.join(members)}{newline}}}"
    if isinstance(value, list | tuple):
        if not value:
            return "[]"
        inner = newline + indent
        return f"[{inner}{f',{inner}'.join([_write(one, indent, sort, inner) for one in value])}{newline}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _number(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
