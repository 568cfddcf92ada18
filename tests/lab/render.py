"""Tables and the drawing of a lab's topology, as plain text of at most `WIDTH` columns. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

WIDTH = 100

GAP = "  "
BOX = 32  # columns of a node's box, edges included: three of them and two gaps are WIDTH
PER_ROW = 3
LABEL = 10


@dataclass(frozen=True, slots=True)
class PodView:
    """One pod, as the reader meets it."""

    name: str
    node: str
    address: str
    mac: str
    host_veth: str


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node: underlay address, VTEP, pod bridge. Addresses are text, `gateway` with its prefix length."""

    name: str
    address: str
    vtep: str
    vtep_address: str
    vtep_mac: str
    transport: str
    bridge: str
    gateway: str
    pods: tuple[PodView, ...]


def clip(text: str, width: int) -> str:
    """`text` in at most `width` columns; what had to be cut ends in an ellipsis."""
    return text if len(text) <= width else text[: width - 1] + "…"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Left-aligned columns under upper-case headings; the widest columns are clipped until all fit."""
    cells = [[heading.upper() for heading in headings], *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while len(GAP) * len(widths) + sum(widths) > WIDTH:
        widest = widths.index(max(widths))
        widths[widest] -= 1
    return "\n".join(
        "".join(
            GAP + clip(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in cells
    )


def topology(outside: Sequence[str], underlay: str, nodes: Sequence[NodeView]) -> str:
    """Draw the outside host on top, the underlay's switch under it, and the nodes with their pods below.

    `outside` are the addresses of the outside host, `underlay` names the network between the nodes.
    """
    lines = _outside(outside)
    uplink: tuple[int, ...] = (WIDTH // 2,)
    for start in range(0, len(nodes), PER_ROW):
        row = nodes[start : start + PER_ROW]
        left = (WIDTH - len(row) * BOX - (len(row) - 1) * len(GAP)) // 2
        taps = tuple(left + i * (BOX + len(GAP)) + BOX // 2 for i in range(len(row)))
        lines += [_switch(underlay, uplink, taps), _marks(" ", dict.fromkeys(taps, "│"))]
        lines += _side_by_side([_node(node) for node in row], left)
        uplink = ()
    return "\n".join(line.rstrip() for line in lines)


def _outside(addresses: Sequence[str]) -> list[str]:
    text = clip(f" outside  {'  '.join(addresses)} ", WIDTH - 4)
    left = WIDTH // 2 - len(text) // 2 - 1
    bottom = list("─" * len(text))
    bottom[WIDTH // 2 - left - 1] = "┬"
    return [" " * left + line for line in (f"┌{'─' * len(text)}┐", f"│{text}│", f"└{''.join(bottom)}┘")]


def _switch(label: str, above: Sequence[int], below: Sequence[int]) -> str:
    joints = dict.fromkeys(above, "╧") | {tap: "╪" if tap in above else "╤" for tap in below}
    bar = _marks("═", joints)
    text = f" {clip(label, BOX - 4)} "
    # Taps are half a box from the edges and more than a box apart, so there is always such a place.
    at = next(
        at for at in range(2, WIDTH) if not any(at - 1 <= column <= at + len(text) for column in joints)
    )
    return bar[:at] + text + bar[at + len(text) :]


def _marks(fill: str, marks: dict[int, str]) -> str:
    return "".join(marks.get(column, fill) for column in range(WIDTH))


def _node(node: NodeView) -> list[str]:
    inner = BOX - 4
    pods = [
        f" {'└' if i == len(node.pods) else '├'}─ {clip(pod.name, LABEL - 4).ljust(LABEL - 4)}{pod.address}"
        for i, pod in enumerate(node.pods, 1)
    ]
    lines = [
        node.name,
        f"{'eth0'.ljust(LABEL)}{node.address}",
        f" ║ {node.transport}",
        f"{f'{node.vtep} '.ljust(LABEL)}{node.vtep_address}",
        f" │{' ' * (LABEL - 2)}{node.vtep_mac}",
        f"{node.bridge.ljust(LABEL)}{node.gateway}",
        *pods,
    ]
    half = BOX // 2
    return [
        f"┌{'─' * (half - 1)}┴{'─' * (BOX - half - 2)}┐",
        *(f"│ {clip(line, inner).ljust(inner)} │" for line in lines),
    ]


def _side_by_side(boxes: Sequence[Sequence[str]], left: int) -> list[str]:
    """Boxes without bottom edges, made equally high and closed."""
    blank = f"│{' ' * (BOX - 2)}│"
    rows = [GAP.join(row) for row in zip_longest(*boxes, fillvalue=blank)]
    rows.append(GAP.join([f"└{'─' * (BOX - 2)}┘"] * len(boxes)))
    return [" " * left + row for row in rows]
