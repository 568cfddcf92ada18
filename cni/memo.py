"""What pure functions made of the same arguments before: the pods of a network come with the same netconf.

A daemon keeps one. The plugin's own process has no use for it, as it serves one call.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

# Of a node's networks there are a few, and what is made of each is some kilobytes. What is larger, or comes
# with each pod in another form, as prevResult does, is not worth the room.
_MOST, _LARGEST_BYTES = 256, 1 << 14
_ANOTHER_EACH_TIME = b'"prevResult"'


class Memo:
    """Usable from any thread. What it gives is shared: nobody may change it."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], object] = {}

    def __len__(self) -> int:
        return len(self._known)

    def known(self, make: Callable[..., T], *arguments: bytes | str) -> T:
        """`make(*arguments)`; raises what that raises, each time anew."""
        key = (make, *arguments)
        found = self._known.get(key)
        if found is None:
            found = make(*arguments)
            if sum(map(len, arguments)) <= _LARGEST_BYTES and not any(map(_is_unique, arguments)):
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known[key] = found
        return found  # type: ignore[return-value]  # made by `make`, now or before


def _is_unique(argument: bytes | str) -> bool:
    return isinstance(argument, bytes) and _ANOTHER_EACH_TIME in argument
