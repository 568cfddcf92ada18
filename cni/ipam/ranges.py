"""Ranges of addresses, sets of them, and the order in which a set hands its addresses out.

A set gives one address per attachment. It is a wheel: the search begins behind the address that was handed
out last and goes once round, so that a released address rests as long as possible.

Source: upstream host-local, checks, their order and their texts.

Decision: upstream skips the gateway of the range that the search is in; we skip every gateway of the set,
which is the same unless a range holds the gateway of another one, and that one belongs to the bridge.
"""

from __future__ import annotations

from cni.spec.address import Cidr, format_ip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Address = tuple[int, int]  # family (4 or 6) and the address as an integer

_BLOCK_BITS = 4096


class RangeError(ValueError):
    """A range or a set of ranges that nothing can be allocated from; the text is upstream's."""


class Range:
    """The addresses `first` to `last` of one family, both included, in `subnet`. `gateway` may be outside."""

    __slots__ = ("first", "gateway", "last", "subnet")

    def __init__(
        self, subnet: Cidr, first: Address | None, last: Address | None, gateway: Address | None
    ) -> None:
        """None takes the default; raises RangeError."""
        network = subnet.network()
        bits = 32 if subnet.family == 4 else 128
        if subnet.prefix > bits - 2:
            raise RangeError(f"Network {subnet} too small to allocate from")
        if subnet != network:
            text = (
                f"Network has host bits set. For a subnet mask of length {subnet.prefix} the network address"
            )
            raise RangeError(f"{text} is {format_ip(network.family, network.value)}")
        self.subnet = subnet
        low = subnet.value + 1
        # The last address of an IPv4 subnet is its broadcast address; IPv6 has none.
        high = (subnet.value | (1 << bits - subnet.prefix) - 1) - (subnet.family == 4)
        self.gateway = gateway or (subnet.family, low)
        self.first = low if first is None else self._inside("RangeStart", first, 0, last)
        self.last = high if last is None else self._inside("RangeEnd", last, self.first, None)

    def _inside(self, what: str, address: Address, low: int, high: Address | None) -> int:
        family, value = address
        inside = Cidr(family, value, self.subnet.prefix).network() == self.subnet
        if not inside or value < low or (high is not None and value > high[1]):
            raise RangeError(f"{what} {format_ip(family, value)} not in network {self.subnet}")
        return value

    def __contains__(self, address: Address) -> bool:
        return address[0] == self.subnet.family and self.first <= address[1] <= self.last

    def __str__(self) -> str:
        return f"{format_ip(self.subnet.family, self.first)}-{format_ip(self.subnet.family, self.last)}"

    def overlaps(self, other: Range) -> bool:
        """Whether an address is in both."""
        same = self.subnet.family == other.subnet.family
        return same and self.first <= other.last and other.first <= self.last


class RangeSet:
    """Ranges of one family, in the order in which they are used up."""

    __slots__ = ("_gateways", "_inner_gateways", "family", "ranges", "size")

    def __init__(self, ranges: Sequence[Range]) -> None:
        """Raises RangeError. `size` is how many addresses the set can hand out."""
        if not ranges:
            raise RangeError("empty range set")
        self.family = ranges[0].subnet.family
        if any(one.subnet.family != self.family for one in ranges):
            raise RangeError("mixed address families")
        for index, one in enumerate(ranges):
            for other in ranges[index + 1 :]:
                if one.overlaps(other):
                    raise RangeError(f"subnets {one} and {other} overlap")
        self.ranges = tuple(ranges)
        self._gateways = {one.gateway[1] for one in ranges if one.gateway[0] == self.family}
        self._inner_gateways = [value for value in self._gateways if (self.family, value) in self]
        self.size = sum(one.last - one.first + 1 for one in ranges) - len(self._inner_gateways)

    def __str__(self) -> str:
        return ",".join(str(one) for one in self.ranges)

    def __contains__(self, address: Address) -> bool:
        return self.range_of(address) is not None

    def range_of(self, address: Address) -> Range | None:
        """The range that holds the address."""
        for one in self.ranges:
            if address in one:
                return one
        return None

    def is_gateway(self, address: Address) -> bool:
        """Whether the address is the gateway of one of the ranges."""
        return address[0] == self.family and address[1] in self._gateways

    def overlaps(self, other: RangeSet) -> bool:
        """Whether an address is in both."""
        return any(one.overlaps(two) for one in self.ranges for two in other.ranges)

    def used(self, taken: Occupied) -> int:
        """How many of these are taken."""
        gateways = [value for value in self._inner_gateways if value in taken]
        return sum([taken.count(one.first, one.last) for one in self.ranges]) - len(gateways)

    def candidates(self, taken: Occupied, last: Address | None) -> Iterator[tuple[int, Range]]:
        """Every free address with its range, beginning behind `last`, or at the start if that is elsewhere.

        Addresses that are added to `taken` meanwhile are passed over.
        """
        for low, high, one in self._wheel(last):
            value = taken.first_free(low, high)
            while value is not None:
                if value not in self._gateways:
                    yield value, one
                value = taken.first_free(value + 1, high)

    def _wheel(self, last: Address | None) -> Iterator[tuple[int, int, Range]]:
        """Once round the set in runs of addresses: first, last, range."""
        home = None if last is None else self.range_of(last)
        if last is None or home is None:
            for one in self.ranges:
                yield one.first, one.last, one
            return
        index = self.ranges.index(home)
        yield last[1] + 1, home.last, home
        for one in self.ranges[index + 1 :] + self.ranges[:index]:
            yield one.first, one.last, one
        yield home.first, last[1], home


class Occupied:
    """A set of addresses of one family that finds the first gap in a run of any length quickly."""

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}

    def add(self, value: int) -> None:
        block, bit = divmod(value, _BLOCK_BITS)
        self._blocks[block] = self._blocks.get(block, 0) | 1 << bit

    def discard(self, value: int) -> None:
        block, bit = divmod(value, _BLOCK_BITS)
        left = self._blocks.get(block, 0) & ~(1 << bit)
        if left:
            self._blocks[block] = left
        else:
            self._blocks.pop(block, None)

    def __contains__(self, value: int) -> bool:
        block, bit = divmod(value, _BLOCK_BITS)
        return bool(self._blocks.get(block, 0) >> bit & 1)

    def first_free(self, low: int, high: int) -> int | None:
        """The first address from `low` to `high`, both included, that is not in the set."""
        value = low
        while value <= high:
            block, bit = divmod(value, _BLOCK_BITS)
            gaps = ~(self._blocks.get(block, 0) >> bit)
            value += (gaps & -gaps).bit_length() - 1
            if value // _BLOCK_BITS == block:
                return value if value <= high else None
        return None

    def count(self, low: int, high: int) -> int:
        """How many addresses from `low` to `high` are in the set."""
        total = 0
        for block, bits in self._blocks.items():
            start, end = block * _BLOCK_BITS, (block + 1) * _BLOCK_BITS - 1
            if start < low:
                bits = bits >> low - start << low - start
            if end > high:
                bits &= (1 << max(0, high - start + 1)) - 1
            total += bits.bit_count()
        return total
