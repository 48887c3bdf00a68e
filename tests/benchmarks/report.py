"""The results of a benchmark run as a page: `python -m tests.benchmarks.report RESULTS.json [--directory DIRECTORY]`.

Writes `results.md` (goals, a table a transport, machine, versions, commands), `results.svg` (the plot) and
`results.json` (the results as given, absolute paths cut to their last part) into the directory, `docs/benchmarks`
unless given. Ratios are ours divided by the peer's of the same round, then the median and the range of those. The
goals are in `GOALS` and are judged by the median.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.plot import plot
from tests.benchmarks.results import (
    DIRECT,
    OURS,
    TRANSPORTS,
    Measure,
    Results,
    ResultsError,
    Summary,
    maker,
    ratios,
    read,
    summary,
    transport,
    without_directories,
    without_transport,
)

ROOT = Path(__file__).parents[2]
HOLDS, FALLS_SHORT, NOT_MEASURED = "holds", "falls short", "not measured"
MARKS = {HOLDS: "✓", FALLS_SHORT: "✗", NOT_MEASURED: "–"}
TITLES = {"ws": "Over `ws`", "wss": "Over `wss` (TLS)"}
PICTURE = "![A panel a measure, a bar a tunnel; the tables have the numbers](results.svg)"
ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class Goal:
    """What a measure should reach: `bound` times the peer's of the same round, or, without a peer, `bound` in `unit`.

    It is meant for every transport in `transports`; with `once` it is enough that one of them was measured.
    """

    measure: str
    comparison: str  # ≥ or ≤
    bound: float
    peer: str | None = None
    unit: str = ""
    transports: tuple[str, ...] = TRANSPORTS
    once: bool = False

    def __str__(self) -> str:
        bound = f"{float(self.bound)} × {self.peer}" if self.peer else f"{self.bound:g} {self.unit}"
        return f"{self.comparison} {bound}"

    def met_by(self, value: float) -> bool:
        return value >= self.bound if self.comparison == "≥" else value <= self.bound


GOALS = (
    *(Goal(way, "≥", 1.0, peer="erebe") for way in ("bulk_up", "bulk_down")),
    *(Goal(way, "≥", 4.0, peer="chisel", transports=("ws",)) for way in ("bulk_up", "bulk_down")),
    *(Goal(way, "≤", 1.2, peer="erebe") for way in ("cpu_up", "cpu_down")),
    Goal("echo_p50", "≤", 1.15, peer="erebe"),
    Goal("echo_p50", "≤", 0.65, peer="chisel"),
    Goal("echo_50", "≥", 1.0, peer="erebe"),
    Goal("opens", "≥", 1.0, peer="erebe"),
    *(Goal(side, "≤", 12, unit="KB", transports=("ws",)) for side in ("idle_client_kb", "idle_server_kb")),
    *(Goal(side, "≤", 40, unit="KB", transports=("wss",)) for side in ("idle_client_kb", "idle_server_kb")),
    # 145 MB is 16 KB a stream: what `ws` may take, and less than half of what a stream over `wss` may.
    *(Goal(side, "≤", 145, unit="MB", transports=("ws",)) for side in ("idle_9000_client_mb", "idle_9000_server_mb")),
    Goal("idle_9000_cpu", "≤", 2, unit="% of a core", once=True),
    # 1.1 and 1.15 round trips of 80 ms.
    *(Goal(open_, "≤", 88, unit="ms") for open_ in ("first_byte_80ms", "ten_at_once_80ms")),
    Goal("echo_beside_bulk_80ms_p95", "≤", 92, unit="ms"),
    *(Goal(bulk, "≥", 1.0, peer=peer) for bulk in ("bulk_80ms", "bulk_80ms_loss1") for peer in ("erebe", "chisel")),
    Goal("start_version", "≤", 0.15, unit="s", once=True),
    Goal("start_server_ready", "≤", 0.5, unit="s", once=True),
)


@dataclass(frozen=True)
class Verdict:
    """A goal for one transport: its outcome, and the figure or ratio reached, `None` if there is none."""

    goal: Goal
    transport: str
    outcome: str
    reached: Summary | None


# --- judging --------------------------------------------------------------------------------------------------------


def verdicts(results: Results) -> list[Verdict]:
    """Every goal for every transport that it is meant for. `ResultsError` if its measure is in another unit."""
    found = []
    for goal in GOALS:
        measure = results.measures.get(goal.measure)
        if measure and goal.unit and measure.unit != goal.unit:
            raise ResultsError(f"measure {goal.measure!r} is in {measure.unit!r}, its goal in {goal.unit!r}")
        measured = [way for way in goal.transports if measure and f"{OURS}-{way}" in measure.values]
        meant = (measured or goal.transports[:1]) if goal.once else goal.transports
        found += [judge(goal, way, measure) for way in meant]
    return found


def judge(goal: Goal, way: str, measure: Measure | None) -> Verdict:
    """Where ours failed in every round the goal is not met, unless the machine could not measure it at all (then the
    error begins with "not measured:"); without anything to compare with nothing can be said."""
    ours = measure.values.get(f"{OURS}-{way}") if measure else None
    if measure is None or ours is None:
        return Verdict(goal, way, NOT_MEASURED, None)
    if summary(ours) is None:
        impossible = measure.errors.get(f"{OURS}-{way}", "").startswith(f"{NOT_MEASURED}:")
        return Verdict(goal, way, NOT_MEASURED if impossible else FALLS_SHORT, None)
    compared = measure.values.get(f"{goal.peer}-{way}", (None,) * len(ours)) if goal.peer else None
    reached = summary(ours if compared is None else ratios(ours, compared))
    if reached is None:
        return Verdict(goal, way, NOT_MEASURED, None)
    return Verdict(goal, way, HOLDS if goal.met_by(reached.median) else FALLS_SHORT, reached)


# --- the page -------------------------------------------------------------------------------------------------------


def page(results: Results) -> str:
    """All of results.md."""
    judged = verdicts(results)
    tables = [text for way in TRANSPORTS if (text := table(results, judged, way))]
    return (
        "\n\n".join([taken(results), goals(results, judged), PICTURE, *tables, *footnotes(results), setting(results)])
        + "\n"
    )


def taken(results: Results) -> str:
    rounds = f"{results.rounds} rounds" if results.rounds > 1 else "one round"
    return (
        f"Taken on {results.date}, {rounds}. A cell has the median and, in brackets, the lowest and the highest;"
        f" ÷ is ours divided by the peer's of the same round."
    )


def goals(results: Results, judged: list[Verdict]) -> str:
    """How many goals hold, and each that does not."""
    count = {outcome: sum(verdict.outcome == outcome for verdict in judged) for outcome in MARKS}
    lines = [
        f"**{count[HOLDS]} of {len(judged)} goals hold**, {count[FALLS_SHORT]} fall short,"
        f" {count[NOT_MEASURED]} not measured."
    ]
    for outcome, head in ((FALLS_SHORT, "Those that fall short:"), (NOT_MEASURED, "Those that were not measured:")):
        if count[outcome]:
            lines += ["", head, ""]
            lines += [f"- {told(verdict, results)}" for verdict in judged if verdict.outcome == outcome]
    return "\n".join(lines)


def told(verdict: Verdict, results: Results) -> str:
    goal = verdict.goal
    measure = results.measures.get(goal.measure)
    title = escaped(measure.title) if measure else f"`{goal.measure}`"
    text = f"{title}, `{verdict.transport}`: goal {goal}"
    if verdict.outcome == FALLS_SHORT:
        text += f", reached {verdict.reached}" if verdict.reached else ", failed in every round"
    return text


def table(results: Results, judged: list[Verdict], way: str) -> str:
    """A row a measure: every tunnel over this transport, ours divided by each peer, the goals. Empty without a row."""
    columns = [tunnel for tunnel in results.tunnels if transport(tunnel) in (way, None)]
    ours = f"{OURS}-{way}"
    peers = [tunnel for tunnel in columns if transport(tunnel) and tunnel != ours]
    measures = [
        measure
        for measure in results.measures.values()
        if any(tunnel in measure.values for tunnel in columns if transport(tunnel))
    ]
    if not measures:
        return ""
    head = ["", *(column(tunnel) for tunnel in columns), *(f"÷ {without_transport(peer)}" for peer in peers), "goal"]
    lines = [row(head), row(["---", *["---:"] * (len(head) - 2), "---"])]
    for measure in measures:
        cells = [f"{escaped(measure.title)}, {escaped(measure.unit)}"]
        cells += [cell(measure, tunnel) for tunnel in columns]
        cells += [ratio(measure, ours, peer) for peer in peers]
        mine = [verdict for verdict in judged if (verdict.goal.measure, verdict.transport) == (measure.name, way)]
        cells.append("<br>".join(f"{verdict.goal}: {MARKS[verdict.outcome]} {verdict.outcome}" for verdict in mine))
        lines.append(row(cells))
    return "\n".join([f"### {TITLES[way]}", "", *lines])


def column(tunnel: str) -> str:
    return "no tunnel" if tunnel == DIRECT else f"**{OURS}**" if maker(tunnel) == OURS else without_transport(tunnel)


def cell(measure: Measure, tunnel: str) -> str:
    """A tunnel's figure, with a note if a round failed; a dash if it was not measured."""
    if tunnel not in measure.values:
        return "–"
    note = f" [^{label(measure, tunnel)}]" if measure.failures(tunnel) else ""
    return f"{summary(measure.values[tunnel]) or 'failed'}{note}"


def ratio(measure: Measure, ours: str, peer: str) -> str:
    if not {ours, peer} <= measure.values.keys():
        return "–"
    found = summary(ratios(measure.values[ours], measure.values[peer]))
    return str(found) if found else "–"


def footnotes(results: Results) -> list[str]:
    """One for each tunnel that failed at a measure: in how many rounds, and why."""
    found = []
    for measure in results.measures.values():
        for tunnel in results.tunnels:
            if tunnel in measure.values and (failures := measure.failures(tunnel)):
                rounds = "every round" if failures == results.rounds else f"{failures} of {results.rounds} rounds"
                why = quoted(measure.errors[tunnel]) if tunnel in measure.errors else "no reason was recorded"
                name = f"`{tunnel}`, {escaped(measure.title)}"
                found.append(f"[^{label(measure, tunnel)}]: {name}: failed in {rounds}: {why}")
    return found


def label(measure: Measure, tunnel: str) -> str:
    return f"{measure.name}-{tunnel}"


def setting(results: Results) -> str:
    """The machine, the versions and the commands."""
    names = {
        "cpu": "processor",
        "memory_gib": "memory, GiB",
        "os": "system",
        "tcp_congestion_control": "congestion control",
    }
    lines = ["### Machine and versions", "", row(["", ""]), row(["---", "---"])]
    lines += [row([names.get(key, key), escaped(str(value))]) for key, value in results.machine.items()]
    lines += [row([escaped(name), escaped(str(version))]) for name, version in results.versions.items()]
    lines += ["", "### Commands", "", "Directories are left out.", "", "```text", f"$ {results.command}"]
    for tunnel, commands in results.commands.items():
        if any(commands):
            lines += ["", f"# {tunnel}", *(f"$ {command}" for command in commands if command)]
    return "\n".join([*lines, "```"])


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """Text in a table's cell: on one line, and its marks meant as they are."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{character}" if character in "\\`*_[]|" else character for character in text)


def quoted(text: str) -> str:
    """Any text as code, on one line, cut where it gets long."""
    text = " ".join(text.replace("`", "'").split()) or "no reason was recorded"
    return f"`{text[:ERROR_CHARACTERS]}{'…' if len(text) > ERROR_CHARACTERS else ''}`"


# --- the command ----------------------------------------------------------------------------------------------------


def write(source: Path, directory: Path) -> None:
    """Write the three files. `ValueError` (`ResultsError` is one) writes none of them; `OSError` if one cannot be."""
    document = without_directories(json.loads(source.read_text(encoding="utf-8")))
    results = read(document)
    texts = {
        "results.md": page(results),
        "results.svg": plot(results),
        "results.json": json.dumps(document, indent=1, ensure_ascii=False) + "\n",
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 1 with a line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("--directory", type=Path, default=ROOT / "docs" / "benchmarks")
    parsed = parser.parse_args(arguments)
    try:
        write(parsed.results, parsed.directory)
    except (OSError, ValueError) as error:
        print(f"{parsed.results}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
