"""The results of one run of the benchmark: read, checked, and reduced to medians, ranges and ratios.

A tunnel's name is `direct` (no tunnel), or who it is and the transport, `ours-ws`, `erebe-wss`, and for a peer perhaps
a variant behind it, `erebe-wss-pool`. Peers are compared with `ours` over the same transport; a name without a
transport is shown and compared with nothing.
"""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

TRANSPORTS = ("ws", "wss")
DIRECT = "direct"
OURS = "ours"
NAME = r"[a-z0-9_]+"
# An absolute path that begins a word, up to its last part; /dev is the same everywhere.
DIRECTORIES = re.compile(r"(?<![\w/:.~*-])/(?!dev/)(?:[^\s/'\"]+/)+(?=[^\s/'\"])")


class ResultsError(ValueError):
    """The document is not what the benchmark writes; the message says where."""


@dataclass(frozen=True)
class Summary:
    """The rounds of one figure that succeeded: median, lowest and highest."""

    median: float
    lowest: float
    highest: float
    rounds: int

    def __str__(self) -> str:
        places = decimals(self.median or self.highest)
        low, high = (rounded(value, places) for value in (self.lowest, self.highest))
        return f"{rounded(self.median, places)} ({low}–{high})"


@dataclass(frozen=True)
class Measure:
    """One measure: `values` has one a round for every tunnel, `None` where the round failed; `errors` says why."""

    name: str
    title: str
    unit: str
    better: str
    values: Mapping[str, tuple[float | None, ...]]
    errors: Mapping[str, str]

    def failures(self, tunnel: str) -> int:
        return self.values[tunnel].count(None)


@dataclass(frozen=True)
class Results:
    """A whole run, measures in the order in which they were taken."""

    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commands: Mapping[str, tuple[str, ...]]
    command: str
    rounds: int
    measures: Mapping[str, Measure]

    @property
    def tunnels(self) -> list[str]:
        """Every tunnel that has a value: no tunnel first, then by transport, ours before the peers."""
        names = dict.fromkeys(tunnel for measure in self.measures.values() for tunnel in measure.values)
        order = ["", *TRANSPORTS]
        return sorted(
            names,
            key=lambda name: (name != DIRECT, order.index(transport(name) or ""), maker(name) != OURS),
        )


def maker(tunnel: str) -> str:
    """Who it is: `erebe` of `erebe-wss-pool`."""
    return tunnel.partition("-")[0]


def transport(tunnel: str) -> str | None:
    """`ws` or `wss`; `None` if the name has neither."""
    parts = tunnel.split("-")[1:2]
    return parts[0] if parts and parts[0] in TRANSPORTS else None


def without_transport(tunnel: str) -> str:
    """The name among tunnels of one transport: `erebe-pool` of `erebe-wss-pool`."""
    first, *rest = tunnel.split("-")
    return "-".join([first, *(rest[1:] if transport(tunnel) else rest)])


# --- numbers --------------------------------------------------------------------------------------------------------


def summary(values: Iterable[float | None]) -> Summary | None:
    """Of the rounds that succeeded; `None` if there was none."""
    there = [value for value in values if value is not None]
    return Summary(statistics.median(there), min(there), max(there), len(there)) if there else None


def ratios(ours: Sequence[float | None], peer: Sequence[float | None]) -> tuple[float | None, ...]:
    """Ours divided by the peer's, round by round; `None` where either failed or the peer's is 0."""
    return tuple(None if a is None or not b else a / b for a, b in zip(ours, peer, strict=True))


def decimals(value: float) -> int:
    """Decimal places that leave three digits of `value` (below 0: tens, hundreds); at most 4."""
    return min(4, 2 - math.floor(math.log10(abs(value)))) if value else 0


def rounded(value: float, places: int) -> str:
    return f"{round(value, places):,.{max(0, places)}f}"


# --- reading --------------------------------------------------------------------------------------------------------


def without_directories(document: Any) -> Any:
    """The document, with every absolute path in its texts cut to its last part: where things lie on the machine that
    measured tells a reader nothing."""
    if isinstance(document, str):
        return DIRECTORIES.sub("", document)
    if isinstance(document, dict):
        return {key: without_directories(value) for key, value in document.items()}
    if isinstance(document, list):
        return [without_directories(value) for value in document]
    return document


def read(document: Any) -> Results:
    """Check a decoded results.json. `ResultsError` says what is wrong with it and where."""
    top = _table(document, "the document")
    rounds = _of(top, "rounds", int, "the document")
    if rounds < 1:
        raise ResultsError(f"rounds is {rounds}, not at least 1")
    measures = _of(top, "measures", dict, "the document")
    if not measures:
        raise ResultsError("there are no measures")
    return Results(
        date=_date(_of(top, "date", str, "the document")),
        machine=_of(top, "machine", dict, "the document"),
        versions=_of(top, "versions", dict, "the document"),
        commands={
            tunnel: tuple(_command(command) for command in commands)
            for tunnel, commands in _of(top, "commands", dict, "the document").items()
        },
        command=_command(top.get("command")),
        rounds=rounds,
        measures={name: _measure(name, measure, rounds) for name, measure in measures.items()},
    )


def _measure(name: str, document: Any, rounds: int) -> Measure:
    place = f"measure {name!r}"
    if not re.fullmatch(NAME, name):
        raise ResultsError(f"{place}: a name is of small letters, digits and _")
    table = _table(document, place)
    better = _of(table, "better", str, place)
    if better not in ("higher", "lower"):
        raise ResultsError(f"{place}: better is {better!r}, not 'higher' or 'lower'")
    errors = {tunnel: str(error) for tunnel, error in (table.get("errors") or {}).items()}
    given = _of(table, "values", dict, place)
    values = {tunnel: _values(series, rounds, f"{place}, {tunnel}") for tunnel, series in given.items()}
    for tunnel in errors:
        values.setdefault(tunnel, (None,) * rounds)
    for tunnel in values:
        if not re.fullmatch(rf"{NAME}(-{NAME})*", tunnel):
            raise ResultsError(f"{place}: {tunnel!r} is not a tunnel's name")
    return Measure(name, _of(table, "title", str, place), _of(table, "unit", str, place), better, values, errors)


def _values(series: Any, rounds: int, place: str) -> tuple[float | None, ...]:
    if not isinstance(series, list) or len(series) != rounds:
        raise ResultsError(f"{place}: not a list of {rounds} values, one a round")
    for value in series:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value) and value >= 0):
            raise ResultsError(f"{place}: {value!r} is neither a number of at least 0 nor null")
    return tuple(series)


def _command(command: Any) -> str:
    """A command as one line of text; given as that, as its arguments, or as null if there is none."""
    if isinstance(command, list):
        return shlex.join(str(argument) for argument in command)
    return "" if command is None else str(command)


def _date(text: str) -> str:
    """The day of an ISO 8601 time."""
    try:
        return datetime.fromisoformat(text).date().isoformat()
    except ValueError:
        raise ResultsError(f"date is {text!r}, not an ISO 8601 time") from None


def _table(document: Any, place: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ResultsError(f"{place} is not a table")
    return document


def _of(table: dict[str, Any], key: str, kind: type, place: str) -> Any:
    value = table.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ResultsError(f"{place}: {key} is {value!r}, not {kind.__name__}")
    return value
