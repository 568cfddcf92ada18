"""Taking one address of a range set, in the store that is held for it.

Source: upstream host-local, order of the checks and texts.

Decision: an attachment that has an address of the set is refused another one also when it wishes for a
certain one, which upstream lets pass.
"""

from __future__ import annotations

from cni.ipam.config import address_text
from cni.ipam.store import attachment_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cni.ipam.ranges import Address, Occupied, Range, RangeSet
    from cni.ipam.store import Held


class Refused(Exception):
    """A set gives no address; the text is upstream's."""


class NothingFree(Refused):
    """Since others have them all."""


def take_one(
    held: Held,
    index: int,
    one: RangeSet,
    wish: Address | None,
    owner: bytes,
    is_squatted: Callable[[Address], bool],
) -> tuple[Address, Range]:
    """Reserve the wanted address, or else the next one of the set. Raises Refused, StoreFault.

    `is_squatted` says of an address without a reservation whether somebody has it all the same.
    """
    taken = held.holdings.taken[one.family]
    if wish is None:
        _refuse_second(held, one, owner)
        candidates = one.candidates(taken, held.last(index))
    else:
        candidates = _wished(held, one, wish, owner)
    for value, home in candidates:
        address = (one.family, value)
        if is_squatted(address):
            continue
        if not held.take(address, owner):
            continue  # the name is taken by something that is no reservation, as a directory
        try:
            held.remember(index, address)
        except OSError:
            held.free(address, owner)
            raise
        return address, home
    if wish is None:
        raise NothingFree(f"no IP addresses available in range set: {one}")
    raise NothingFree(f"requested IP address {address_text(wish)} is not available in range set {one}")


def _wished(held: Held, one: RangeSet, wish: Address, owner: bytes) -> Iterator[tuple[int, Range]]:
    """The wanted address, if it is free; raises Refused."""
    if one.is_gateway(wish):
        raise Refused(f"requested ip {address_text(wish)} is subnet's gateway")
    home = one.range_of(wish)
    if home is not None and wish[1] not in held.holdings.taken[one.family]:
        _refuse_second(held, one, owner)
        yield wish[1], home


def _refuse_second(held: Held, one: RangeSet, owner: bytes) -> None:
    """Raise Refused if the owner has an address of the set."""
    mine = next((address for address in held.holdings.addresses(owner) if address in one), None)
    if mine is not None:
        text = f"{address_text(mine)} has been allocated to {attachment_of(owner)[0]}"
        raise Refused(f"{text}, duplicate allocation is not allowed")


def has_free(one: RangeSet, taken: Occupied) -> bool:
    """Whether the set has an address left."""
    return next(one.candidates(taken, None), None) is not None
