"""Results as one SVG picture: a panel a measure, a bar a tunnel for the median, a line across it for the range."""

from __future__ import annotations

import textwrap
from xml.etree import ElementTree as ET

from tests.benchmarks.results import DIRECT, OURS, Measure, Results, decimals, maker, rounded, summary, transport

# Pixels. As wide as a page's text, so that nothing is scaled down there.
WIDTH = 760
MARGIN = 20
COLUMNS = 2
COLUMN_GAP = 32
PANEL_GAP = 22
PANEL_WIDTH = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * COLUMN_GAP) / COLUMNS
HEAD = 66
PANEL_HEAD = 40
TITLE_LINE = 16
TITLE_CHARACTERS = 44  # of a line; a panel holds them in the widest of the fonts
ROW = 18
BAR = 10
GROUP_GAP = 6
LABEL_WIDTH = 100
VALUE_WIDTH = 58

# A light card of its own, since a picture in a page does not know whether the page is dark.
CARD, EDGE = "#f4f5f7", "#d3d8de"
TEXT, MUTED = "#1c2530", "#55606c"
BARS = {"ours": "#2b6cd4", "peer": "#97a3b1", "direct": "#c9d1da"}
LEGEND = (("ours", "this wstunnel"), ("peer", "peers"), ("direct", "no tunnel"))
WHISKER = "#1c2530"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def plot(results: Results) -> str:
    """The whole picture, as the text of an SVG file."""
    panels = list(results.measures.values())
    heights = {measure.name: panel_height(measure, results.tunnels) for measure in panels}
    lines = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    tallest = [max(heights[measure.name] for measure in line) for line in lines]
    height = HEAD + sum(tallest) + PANEL_GAP * len(lines) + MARGIN - PANEL_GAP

    root = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height}",
            "width": str(WIDTH),
            "height": str(height),
            "role": "img",
            "aria-labelledby": "plot-title plot-description",
            "font-family": FONT,
            "font-size": "11",
        },
    )
    ET.SubElement(root, "title", {"id": "plot-title"}).text = "wstunnel and its peers, measured on one machine"
    ET.SubElement(root, "desc", {"id": "plot-description"}).text = (
        f"{len(panels)} measures, a panel each, with a horizontal bar a tunnel from zero to the median of"
        f" {results.rounds} rounds and a line from the lowest to the highest. The tables beside it have the numbers."
    )
    card = {"x": "0.5", "y": "0.5", "width": str(WIDTH - 1), "height": str(height - 1), "rx": "8"}
    ET.SubElement(root, "rect", {**card, "fill": CARD, "stroke": EDGE})
    draw_head(root, results)
    y: float = HEAD
    for line, line_height in zip(lines, tallest, strict=True):
        for column, measure in enumerate(line):
            draw_panel(root, measure, results.tunnels, MARGIN + column * (PANEL_WIDTH + COLUMN_GAP), y)
        y += line_height + PANEL_GAP
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def draw_head(root: ET.Element, results: Results) -> None:
    draw_text(root, "Measured on one machine, in turns", MARGIN, 28, size="15", weight="600")
    rounds = f"{results.rounds} rounds" if results.rounds > 1 else "one round"
    failed = any(measure.failures(tunnel) for measure in results.measures.values() for tunnel in measure.values)
    failures = " *: not every round succeeded." if failed else ""
    draw_text(root, f"Bar: median of {rounds}. Line: lowest to highest.{failures}", MARGIN, 46, fill=MUTED)
    x = WIDTH - MARGIN - 260.0
    for kind, label in LEGEND:
        swatch = {"x": number(x), "y": "18.5", "width": "10", "height": "10", "rx": "2", "fill": BARS[kind]}
        ET.SubElement(root, "rect", swatch)
        draw_text(root, label, x + 15, 27.5, fill=MUTED)
        x += 112 if kind == "ours" else 68


def draw_panel(root: ET.Element, measure: Measure, tunnels: list[str], x: float, y: float) -> None:
    """One measure, its upper left corner at (x, y). The bars begin at zero: their lengths can be compared."""
    panel = ET.SubElement(root, "g", {"class": "panel", "id": f"plot-{measure.name}"})
    unit = f"{measure.unit}, {measure.better} is better"
    ET.SubElement(panel, "title").text = f"{measure.title}: {unit}"
    for line in title_lines(measure):
        draw_text(panel, line, x, y + 11, size="12.5", weight="600")
        y += TITLE_LINE
    draw_text(panel, unit, x, y + 11, fill=MUTED)
    y += PANEL_HEAD - TITLE_LINE
    zero = x + LABEL_WIDTH
    room = PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH
    most = max((value for series in measure.values.values() for value in series if value is not None), default=0)
    scale = room / most if most else 0.0
    top = y
    for group in groups(measure, tunnels):
        for tunnel in group:
            draw_row(panel, measure, tunnel, zero=zero, top=top, scale=scale)
            top += ROW
        top += GROUP_GAP
    axis = {"x1": number(zero), "x2": number(zero), "y1": number(y), "y2": number(top - GROUP_GAP)}
    ET.SubElement(panel, "line", {**axis, "stroke": MUTED, "stroke-width": "1"})


def draw_row(panel: ET.Element, measure: Measure, tunnel: str, *, zero: float, top: float, scale: float) -> None:
    """One tunnel: name, bar, range and median; the word "failed" if no round succeeded."""
    kind = tunnel if tunnel == DIRECT else "ours" if maker(tunnel) == OURS else "peer"
    middle = top + ROW / 2
    label = "no tunnel" if tunnel == DIRECT else tunnel
    weight = "600" if kind == "ours" else "400"
    draw_text(panel, label, zero - 8, middle + 4, anchor="end", weight=weight)
    found = summary(measure.values[tunnel])
    if found is None:
        draw_text(panel, "failed", zero + 6, middle + 4, fill=MUTED, style="italic")
        return
    bar = ET.SubElement(
        panel,
        "rect",
        {
            "class": "bar",
            "x": number(zero),
            "y": number(middle - BAR / 2),
            "width": number(found.median * scale),
            "height": number(BAR),
            "fill": BARS[kind],
        },
    )
    failures = measure.failures(tunnel)
    failed = f", {failures} of {len(measure.values[tunnel])} rounds failed" if failures else ""
    ET.SubElement(bar, "title").text = f"{label}: {found} {measure.unit}{failed}"
    left, right = zero + found.lowest * scale, zero + found.highest * scale
    path = f"M{number(left)} {number(middle)}H{number(right)}"
    path += "".join(f"M{number(end)} {number(middle - 3)}v6" for end in (left, right))
    halo = {"d": path, "stroke": CARD, "stroke-width": "3", "stroke-opacity": "0.7", "fill": "none"}
    ET.SubElement(panel, "path", halo)
    ET.SubElement(
        panel, "path", {"class": "range", "d": path, "stroke": WHISKER, "stroke-width": "1.2", "fill": "none"}
    )
    value = rounded(found.median, decimals(found.median)) + ("*" if failures else "")
    edge = zero + PANEL_WIDTH - LABEL_WIDTH
    draw_text(panel, value, edge, middle + 4, anchor="end", weight=weight)


def groups(measure: Measure, tunnels: list[str]) -> list[list[str]]:
    """The measure's tunnels by transport: those that are compared stand together."""
    there = [tunnel for tunnel in tunnels if tunnel in measure.values]
    found: dict[str | None, list[str]] = {}
    for tunnel in there:
        found.setdefault(transport(tunnel), []).append(tunnel)
    return list(found.values())


def panel_height(measure: Measure, tunnels: list[str]) -> float:
    shown = groups(measure, tunnels)
    head = PANEL_HEAD + TITLE_LINE * (len(title_lines(measure)) - 1)
    return head + ROW * sum(map(len, shown)) + GROUP_GAP * max(0, len(shown) - 1)


def title_lines(measure: Measure) -> list[str]:
    return textwrap.wrap(measure.title, TITLE_CHARACTERS)


def draw_text(
    parent: ET.Element,
    text: str,
    x: float,
    y: float,
    *,
    size: str = "11",
    weight: str = "400",
    anchor: str = "start",
    fill: str = TEXT,
    style: str = "normal",
) -> None:
    look = {"font-size": size, "font-weight": weight, "text-anchor": anchor, "fill": fill, "font-style": style}
    usual = {"font-size": "11", "font-weight": "400", "text-anchor": "start", "font-style": "normal"}
    changed = {key: value for key, value in look.items() if usual.get(key) != value}
    ET.SubElement(parent, "text", {"x": number(x), "y": number(y), **changed}).text = text


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
