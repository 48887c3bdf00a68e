"""The report: tables, ratios, goals and the command."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import report
from tests.benchmarks.measures import MEASURES
from tests.benchmarks.report import FALLS_SHORT, GOALS, HOLDS, NOT_MEASURED, Goal, escaped, main, page, quoted, verdicts
from tests.benchmarks.results import ResultsError, read
from tests.benchmarks.test_results import DOCUMENT

BENCHMARKS_PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "index.md"


def a_measure(values: dict[str, list[float | None]], *, unit: str = "GB/s", **errors: str) -> dict[str, Any]:
    named = {tunnel.replace("_", "-"): error for tunnel, error in errors.items()}
    return {"title": "A title", "unit": unit, "better": "higher", "values": values, "errors": named}


def a_document(**measures: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(DOCUMENT) | {"measures": measures}


def outcome(goal: Goal, way: str, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.setattr(report, "GOALS", (goal,))
    [found] = [verdict for verdict in verdicts(read(document)) if verdict.transport == way]
    return found.outcome, str(found.reached)


def lines_of(document: dict[str, Any]) -> list[str]:
    return page(read(document)).splitlines()


# --- goals ----------------------------------------------------------------------------------------------------------

ERE = Goal("bulk_up", "≥", 1.0, peer="erebe")


def test_a_goal_holds_by_the_median_of_the_rounds_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ratios 0.5, 1, 3. The medians alone, 2 and 4, would say 0.5.
    document = a_document(bulk_up=a_measure({"ours-ws": [1.0, 4.0, 3.0], "erebe-ws": [2.0, 4.0, 1.0]}))
    assert outcome(ERE, "ws", document, monkeypatch) == (HOLDS, "1.00 (0.50–3.00)")


def test_a_goal_that_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    document = a_document(bulk_up=a_measure({"ours-ws": [1.0, 3.9, 3.0], "erebe-ws": [2.0, 4.0, 1.0]}))
    assert outcome(ERE, "ws", document, monkeypatch) == (FALLS_SHORT, "0.975 (0.500–3.000)")


def test_a_goal_of_the_other_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    goal = Goal("echo_p50", "≤", 1.15, peer="erebe")
    values: dict[str, list[float | None]] = {"ours-wss": [115.0, 115.0, 90.0], "erebe-wss": [100.0] * 3}
    assert outcome(goal, "wss", a_document(echo_p50=a_measure(values)), monkeypatch)[0] == HOLDS
    values["ours-wss"] = [116.0, 116.0, 90.0]
    assert outcome(goal, "wss", a_document(echo_p50=a_measure(values)), monkeypatch)[0] == FALLS_SHORT


def test_an_absolute_goal_needs_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    goal = Goal("first_byte_80ms", "≤", 88, unit="ms")
    for value, expected in ((88.0, HOLDS), (88.1, FALLS_SHORT)):
        document = a_document(first_byte_80ms=a_measure({"ours-ws": [value] * 3}, unit="ms"))
        assert outcome(goal, "ws", document, monkeypatch)[0] == expected


def test_a_peer_over_another_transport_or_in_a_variant_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, list[float | None]] = {
        "ours-wss": [9.0] * 3,
        "erebe-ws": [1.0] * 3,
        "erebe-wss-pool": [1.0] * 3,
    }
    assert outcome(ERE, "wss", a_document(bulk_up=a_measure(values)), monkeypatch)[0] == NOT_MEASURED


def test_ours_that_failed_throughout_falls_short_and_the_peers_failure_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there, gone = [1.0] * 3, [None] * 3
    for ours, peer, expected in ((gone, there, FALLS_SHORT), (there, gone, NOT_MEASURED), (gone, gone, FALLS_SHORT)):
        document = a_document(bulk_up=a_measure({"ours-ws": [*ours], "erebe-ws": [*peer]}))
        assert outcome(ERE, "ws", document, monkeypatch) == (expected, "None")


def test_what_the_machine_could_not_measure_is_not_held_against_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    error = "not measured: network namespaces need root"
    document = a_document(bulk_up=a_measure({"ours-ws": [None] * 3, "erebe-ws": [None] * 3}, ours_ws=error))
    assert outcome(ERE, "ws", document, monkeypatch) == (NOT_MEASURED, "None")


def test_a_measure_that_is_absent_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    document = a_document(opens=a_measure({"ours-ws": [1.0] * 3}))
    assert outcome(ERE, "ws", document, monkeypatch)[0] == NOT_MEASURED


def test_a_goal_for_once_is_judged_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "GOALS", (Goal("start_version", "≤", 0.15, unit="s", once=True),))
    document = a_document(start_version=a_measure({"ours-wss": [0.1] * 3}, unit="s"))
    assert [(verdict.transport, verdict.outcome) for verdict in verdicts(read(document))] == [("wss", HOLDS)]
    absent = a_document(opens=a_measure({"ours-ws": [1.0] * 3}))
    assert [verdict.outcome for verdict in verdicts(read(absent))] == [NOT_MEASURED]


def test_a_figure_in_another_unit_than_its_goal_is_refused() -> None:
    with pytest.raises(ResultsError, match="'first_byte_80ms' is in 's', its goal in 'ms'"):
        verdicts(read(a_document(first_byte_80ms=a_measure({"ours-ws": [0.08] * 3}, unit="s"))))


def test_every_goal_says_what_it_compares_with() -> None:
    for goal in GOALS:
        assert goal.comparison in ("≥", "≤")
        assert bool(goal.peer) != bool(goal.unit)
    assert len({(goal.measure, goal.peer, way) for goal in GOALS for way in goal.transports}) == sum(
        len(goal.transports) for goal in GOALS
    )


def test_every_goal_is_of_a_measure_in_its_unit() -> None:
    for goal in GOALS:
        assert goal.peer or MEASURES[goal.measure].unit == goal.unit
        assert (goal.comparison == "≥") == (MEASURES[goal.measure].better == "higher")


def test_the_page_explains_every_measure_and_no_other() -> None:
    text = BENCHMARKS_PAGE.read_text().partition("## What is measured")[2].partition("\n## ")[0]
    names = [cell for line in text.splitlines() if line.startswith("| `") for cell in line.split(" | ")[:1]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(names))) == sorted(MEASURES)


# --- the page -------------------------------------------------------------------------------------------------------


def test_a_table_a_transport() -> None:
    assert [line for line in lines_of(DOCUMENT) if line.startswith("### Over")] == [
        "### Over `ws`",
        "### Over `wss` (TLS)",
    ]
    lines = [line for line in lines_of(DOCUMENT) if line.startswith(("|  | no tunnel", "| Bulk"))]
    assert lines == [
        "|  | no tunnel | **ours** | chisel | erebe | ÷ chisel | ÷ erebe | goal |",
        "| Bulk, up, GB/s | 5.50 (5.00–6.00) | 1.50 (1.00–2.00) | 0.250 (0.250–0.500) | 2.00 (1.00–4.00)"
        " | 4.00 (3.00–8.00) | 0.500 (0.375–2.000)"
        " | ≥ 1.0 × erebe: ✗ falls short<br>≥ 4.0 × chisel: ✓ holds |",
        "|  | no tunnel | **ours** | erebe-pool | erebe | ÷ erebe-pool | ÷ erebe | goal |",
        "| Bulk, up, GB/s | 5.50 (5.00–6.00) | 2.00 (1.00–3.00) [^bulk_up-ours-wss] | 2.00 (2.00–2.00)"
        " | failed [^bulk_up-erebe-wss] | 1.00 (0.50–1.50) | – | ≥ 1.0 × erebe: – not measured |",
    ]


def test_every_row_has_as_many_cells() -> None:
    found = page(read(a_document(**DOCUMENT["measures"], opens=a_measure({"ours-ws": [1.0] * 3}))))
    for text in found.split("### Over")[1:]:
        rows = [line for line in text.partition("\n\n")[2].partition("\n\n")[0].splitlines() if line.startswith("|")]
        assert len(rows) >= 3
        assert len({line.count(" | ") for line in rows}) == 1


def test_a_failure_has_a_note_with_its_reason() -> None:
    text = page(read(DOCUMENT))
    assert "[^bulk_up-ours-wss]: `ours-wss`, Bulk, up: failed in 1 of 3 rounds: `timed out`\n" in text
    assert "[^bulk_up-erebe-wss]: `erebe-wss`, Bulk, up: failed in every round: `refused`\n" in text
    silent = page(read(a_document(opens=a_measure({"ours-ws": [1.0, None, 2.0]}))))
    assert "failed in 1 of 3 rounds: no reason was recorded\n" in silent


def test_notes_and_their_marks_agree() -> None:
    text = page(read(DOCUMENT))
    notes = re.findall(r"^\[\^([\w-]+)\]:", text, re.MULTILINE)
    assert sorted(notes) == sorted(set(re.findall(r" \[\^([\w-]+)\] ", text)))


def test_the_summary_counts_and_lists_what_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    chisel = Goal("bulk_up", "≥", 4.0, peer="chisel", transports=("ws",))
    monkeypatch.setattr(report, "GOALS", (ERE, chisel, Goal("opens", "≥", 1.0, peer="erebe", transports=("ws",))))
    lines = lines_of(DOCUMENT)
    assert "**1 of 4 goals hold**, 1 fall short, 2 not measured." in lines
    assert [line for line in lines if line.startswith("- ")] == [
        "- Bulk, up, `ws`: goal ≥ 1.0 × erebe, reached 0.500 (0.375–2.000)",
        "- Bulk, up, `wss`: goal ≥ 1.0 × erebe",
        "- `opens`, `ws`: goal ≥ 1.0 × erebe",
    ]


def test_ours_that_failed_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "GOALS", (ERE,))
    lines = lines_of(a_document(bulk_up=a_measure({"ours-ws": [None] * 3, "erebe-ws": [1.0] * 3}, ours_ws="crashed")))
    assert "- A title, `ws`: goal ≥ 1.0 × erebe, failed in every round" in lines


def test_machine_versions_and_commands() -> None:
    lines = lines_of(DOCUMENT)
    for line in (
        "| processor | A processor |",
        "| memory, GiB | 7.8 |",
        "| erebe | 10.6.2 |",
        "$ python -m tests.benchmarks --rounds 3",
        "# ours-ws",
        "$ wstunnel client -L 'a b'",
    ):
        assert line in lines
    assert "# direct" not in lines


def test_text_from_outside_stays_in_its_cell() -> None:
    assert escaped("a|b\n<c> *d* & `e`") == r"a\|b &lt;c> \*d\* &amp; \`e\`"
    assert quoted("a\n`b`") == "`a 'b'`"
    assert quoted(" \n") == "`no reason was recorded`"
    assert quoted("x" * 300) == f"`{'x' * 200}…`"


# --- the command ----------------------------------------------------------------------------------------------------


def test_writes_the_three_files(tmp_path: Path) -> None:
    source, directory = tmp_path / "r.json", tmp_path / "docs" / "benchmarks"
    source.write_text(json.dumps(DOCUMENT | {"command": "/opt/x/python -m tests.benchmarks"}))
    assert main([str(source), "--directory", str(directory)]) == 0
    assert sorted(path.name for path in directory.iterdir()) == ["results.json", "results.md", "results.svg"]
    assert json.loads((directory / "results.json").read_text()) == DOCUMENT | {"command": "python -m tests.benchmarks"}
    assert "](results.svg)" in (directory / "results.md").read_text()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert main([str(directory / "results.json"), "--directory", str(directory)]) == 0  # again, from its own copy
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff"])
def test_what_cannot_be_read_is_said_and_nothing_is_written(
    text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "r.json"
    if text is not None:
        source.write_bytes(text.encode("latin-1"))
    assert main([str(source), "--directory", str(tmp_path / "docs")]) == 1
    assert capsys.readouterr().err.startswith(f"{source}: ")
    assert not (tmp_path / "docs").exists()
