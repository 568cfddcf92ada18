"""The demo's tables and drawing: everything is shown, straight, and within the width of a terminal."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lab.render import WIDTH, NodeView, PodView, clip, table, topology

UNDERLAY = "underlay 192.168.77.0/24"
OUTSIDE = ["192.168.77.1", "203.0.113.1"]

CELL = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=60)


def node(number: int, pods: int) -> NodeView:
    name = f"node{number}"
    return NodeView(
        name=name,
        address=f"192.168.77.{10 + number}",
        vtep="flannel.1",
        vtep_address=f"10.244.{number}.0",
        vtep_mac=f"c6:d2:32:6f:8f:{number:02x}",
        transport="VXLAN, UDP 8472, VNI 1",
        bridge="cni0",
        gateway=f"10.244.{number}.1/24",
        pods=tuple(
            PodView(
                f"pod{number}{'abcdef'[i]}", name, f"10.244.{number}.{2 + i}", "0a:58:0a:f4:01:02", "veth1"
            )
            for i in range(pods)
        ),
    )


def column(line: str, character: str) -> list[int]:
    return [match.start() for match in re.finditer(character, line)]


def test_table_puts_every_cell_under_its_heading() -> None:
    text = table(("node", "public IP"), [("node1", "192.168.77.11"), ("a-longer-node", "-")])
    assert text.splitlines() == [
        "  NODE           PUBLIC IP",
        "  node1          192.168.77.11",
        "  a-longer-node  -",
    ]


def test_table_without_rows_is_its_headings() -> None:
    assert table(("a", "b"), []) == "  A  B"


def test_table_refuses_a_row_of_another_length() -> None:
    with pytest.raises(ValueError, match="zip"):
        table(("a", "b"), [("only one",)])


def test_only_the_widest_column_is_clipped() -> None:
    lines = table(("name", "text"), [("short", "x" * 200)]).splitlines()
    assert lines[1].startswith("  short  xxx")
    assert lines[1].endswith("x…")
    assert len(lines[1]) == WIDTH


@given(st.lists(st.tuples(CELL, CELL, CELL, CELL), max_size=6))
def test_table_fits_and_starts_each_column_at_one_place(rows: list[tuple[str, ...]]) -> None:
    headings = ("one", "two", "three", "four")
    head, *body = table(headings, rows).split("\n")
    starts = [head.index(heading.upper()) for heading in headings]
    assert len(body) == len(rows)
    for line, row in zip(body, rows, strict=True):
        assert len(line) <= WIDTH
        for start, end, cell in zip(starts, [*starts[1:], WIDTH + 2], row, strict=True):
            assert line[start:end].rstrip() == clip(cell, end - start - 2)


@given(st.text(max_size=50), st.integers(1, 50))
def test_clip_keeps_what_fits_and_marks_what_does_not(text: str, width: int) -> None:
    clipped = clip(text, width)
    assert len(clipped) <= width
    assert clipped == text or (clipped[-1] == "…" and text.startswith(clipped[:-1]))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_topology_shows_every_value_within_the_width(count: int) -> None:
    nodes = [node(i + 1, pods=i % 4) for i in range(count)]
    drawing = topology(OUTSIDE, UNDERLAY, nodes)
    assert max(map(len, drawing.splitlines())) <= WIDTH
    for view in nodes:
        for value in (view.name, view.address, view.vtep_address, view.vtep_mac, view.gateway):
            assert re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", drawing), value
        for pod in view.pods:
            assert re.search(rf"─ {pod.name} +{re.escape(pod.address)} ", drawing), pod
    assert drawing.count("flannel.1") == drawing.count("cni0") == count
    assert UNDERLAY in drawing
    assert all(address in drawing for address in OUTSIDE)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_topology_joins_each_box_to_the_switch(count: int) -> None:
    lines = topology(OUTSIDE, UNDERLAY, [node(i + 1, pods=2) for i in range(count)]).splitlines()
    bars = [i for i, line in enumerate(lines) if "═" in line]
    assert len(bars) == (count + 2) // 3
    for bar in bars:
        taps = column(lines[bar], "[╤╪]")
        assert taps == column(lines[bar + 1], "│")
        assert taps == column(lines[bar + 2], "┴")
    assert column(lines[bars[0]], "[╧╪]") == column(lines[bars[0] - 1], "┬")


def test_boxes_of_nodes_with_different_pods_end_on_one_line() -> None:
    lines = topology(OUTSIDE, UNDERLAY, [node(1, pods=0), node(2, pods=3), node(3, pods=1)]).splitlines()
    bottom = lines[-1]
    edges = sorted(column(bottom, "└") + column(bottom, "┘"))
    assert len(edges) == 6
    for line in lines[-4:-1]:
        assert set(edges) <= set(column(line, "│"))


def test_long_values_are_clipped_inside_their_box() -> None:
    pods = (PodView("a-pod-with-a-long-name", "n", "10.244.100.200", "", ""),)
    long = NodeView(
        "n" * 50, "1.2.3.4", "flannel.4096", "10.1.0.0", "m" * 40, "t" * 40, "cni0", "g" * 40, pods
    )
    lines = topology(OUTSIDE, UNDERLAY, [long]).splitlines()
    assert {len(line) for line in lines[-9:]} == {len(lines[-1])}
    assert "10.244.100.200" in lines[-2]
