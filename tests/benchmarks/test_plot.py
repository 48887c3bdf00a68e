"""The plot: well-formed, one bar a figure, as long as it should be."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.benchmarks.plot import MARGIN, TITLE_LINE, WIDTH, plot
from tests.benchmarks.results import read
from tests.benchmarks.test_results import DOCUMENT

SVG = "{http://www.w3.org/2000/svg}"


def drawn(document: dict[str, Any]) -> ET.Element:
    return ET.fromstring(plot(read(copy.deepcopy(document))))  # noqa: S314  # our own


def bars(root: ET.Element) -> dict[str, float]:
    """Every bar's width by its title."""
    return {
        (bar.findtext(f"{SVG}title") or "").partition(":")[0]: float(bar.attrib["width"])
        for bar in root.iter(f"{SVG}rect")
        if bar.get("class") == "bar"
    }


def texts(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_one_bar_and_one_range_a_figure() -> None:
    root = drawn(DOCUMENT)
    assert set(bars(root)) == {"no tunnel", "ours-ws", "chisel-ws", "erebe-ws", "ours-wss", "erebe-wss-pool"}
    ranges = [path for path in root.iter(f"{SVG}path") if path.get("class") == "range"]
    assert len(ranges) == 6
    assert "failed" in texts(root)  # erebe-wss
    assert texts(root).count("erebe-wss") == 1


def test_a_bar_is_as_long_as_its_median() -> None:
    found = bars(drawn(DOCUMENT))
    for name, median in (("no tunnel", 5.5), ("ours-ws", 1.5), ("ours-wss", 2.0), ("chisel-ws", 0.25)):
        assert found[name] == pytest.approx(found["erebe-ws"] * median / 2.0, abs=0.2)


def test_a_range_goes_from_the_lowest_to_the_highest() -> None:
    root = drawn(DOCUMENT)
    [panel] = [group for group in root.iter(f"{SVG}g") if group.get("id") == "plot-bulk_up"]
    zero = float(next(panel.iter(f"{SVG}line")).attrib["x1"])
    first = next(path.attrib["d"] for path in panel.iter(f"{SVG}path") if path.get("class") == "range")
    left, right = (float(number) for number in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", first).groups())  # type: ignore[union-attr]
    unit = bars(root)["no tunnel"] / 5.5
    assert left - zero == pytest.approx(5.0 * unit, abs=0.2)
    assert right - zero == pytest.approx(6.0 * unit, abs=0.2)


def test_it_can_be_read_without_being_seen() -> None:
    root = drawn(DOCUMENT)
    assert root.attrib["role"] == "img"
    ids = {element.get("id") for element in root.iter()}
    assert set(root.attrib["aria-labelledby"].split()) <= ids
    assert root.findtext(f"{SVG}title")
    assert root.findtext(f"{SVG}desc")
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert "Bulk, up: GB/s, higher is better" in titles
    assert "ours-wss: 2.00 (1.00–3.00) GB/s, 1 of 3 rounds failed" in titles


def test_a_round_that_failed_is_marked_and_the_mark_explained() -> None:
    found = texts(drawn(DOCUMENT))
    assert "2.00*" in found
    assert any("*: not every round succeeded" in text for text in found)
    whole = copy.deepcopy(DOCUMENT)
    whole["measures"]["bulk_up"] |= {"values": {"ours-ws": [1.0] * 3}, "errors": {}}
    assert not any("*" in text for text in texts(drawn(whole)))


def test_panels_do_not_overlap_and_all_is_inside() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["measures"] |= {
        f"m{number}": copy.deepcopy(DOCUMENT["measures"]["bulk_up"]) | {"title": f"Measure {number} <&>"}
        for number in range(4)
    }
    root = drawn(document)
    height = float(root.attrib["height"])
    assert root.attrib["viewBox"] == f"0 0 {WIDTH} {root.attrib['height']}"
    panels = [group for group in root.iter(f"{SVG}g") if group.get("class") == "panel"]
    assert len(panels) == 5
    places = []
    for panel in panels:
        rows = list(panel.iter(f"{SVG}text"))
        places.append((float(rows[0].attrib["x"]), [float(text.attrib["y"]) for text in rows]))
    for column in {x for x, _ in places}:
        for (_, above), (_, below) in pairwise([place for place in places if place[0] == column]):
            assert max(above) < min(below)
    for text in root.iter(f"{SVG}text"):
        assert MARGIN <= float(text.attrib["x"]) <= WIDTH - MARGIN
        assert 0 < float(text.attrib["y"]) <= height - MARGIN


def test_a_long_title_takes_more_lines_and_the_panel_more_room() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["measures"]["bulk_up"]["title"] = "Echo beside a bulk stream over 80 ms, 95th percentile, the slower way"
    root = drawn(document)
    assert "Echo beside a bulk stream over 80 ms, 95th" in texts(root)
    assert "percentile, the slower way" in texts(root)
    assert float(root.attrib["height"]) == float(drawn(DOCUMENT).attrib["height"]) + TITLE_LINE


def test_figures_that_are_all_zero_or_absent_divide_nothing() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["measures"]["bulk_up"] |= {"values": {"ours-ws": [0.0] * 3, "erebe-ws": [None] * 3}}
    assert bars(drawn(document)) == {"ours-ws": 0.0}
