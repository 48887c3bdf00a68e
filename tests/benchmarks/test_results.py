"""Results: what is read, what is refused, and the arithmetic."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from tests.benchmarks.results import (
    Results,
    ResultsError,
    Summary,
    maker,
    ratios,
    read,
    rounded,
    summary,
    transport,
    without_directories,
    without_transport,
)

DOCUMENT: dict[str, Any] = {
    "date": "2026-11-23T02:10:00+00:00",
    "machine": {"cpu": "A processor", "cores": 2, "memory_gib": 7.8, "kernel": "6.18", "os": "Debian 12"},
    "versions": {"erebe": "10.6.2", "chisel": "1.11.5"},
    "commands": {"direct": [], "ours-ws": ["wstunnel server", ["wstunnel", "client", "-L", "a b"]]},
    "command": "python -m tests.benchmarks --rounds 3",
    "rounds": 3,
    "measures": {
        "bulk_up": {
            "title": "Bulk, up",
            "unit": "GB/s",
            "better": "higher",
            "values": {
                "chisel-ws": [0.25, 0.25, 0.5],
                "erebe-wss-pool": [2.0, 2.0, 2.0],
                "erebe-ws": [2.0, 1.0, 4.0],
                "ours-wss": [1.0, None, 3.0],
                "direct": [5.0, 6.0, 5.5],
                "ours-ws": [1.0, 2.0, 1.5],
            },
            "errors": {"ours-wss": "timed out", "erebe-wss": "refused"},
        }
    },
}


def changed(**fields: Any) -> dict[str, Any]:
    """The document with the measure's fields changed."""
    document = copy.deepcopy(DOCUMENT)
    document["measures"]["bulk_up"] |= fields
    return document


def results() -> Results:
    return read(copy.deepcopy(DOCUMENT))


class TestNames:
    def test_parts(self) -> None:
        assert [maker(name) for name in ("direct", "ours-ws", "erebe-wss-pool")] == ["direct", "ours", "erebe"]
        assert [transport(name) for name in ("direct", "ours-ws", "erebe-wss-pool", "ssh-x")] == [
            None,
            "ws",
            "wss",
            None,
        ]
        assert [without_transport(name) for name in ("direct", "erebe-wss-pool", "ssh-x")] == [
            "direct",
            "erebe-pool",
            "ssh-x",
        ]

    def test_order(self) -> None:
        assert results().tunnels == [
            "direct",
            "ours-ws",
            "chisel-ws",
            "erebe-ws",
            "ours-wss",
            "erebe-wss-pool",
            "erebe-wss",
        ]


class TestNumbers:
    def test_summary_is_of_the_rounds_that_succeeded(self) -> None:
        assert summary([3.0, None, 1.0, 2.0]) == Summary(2.0, 1.0, 3.0, 3)
        assert summary([None, None]) is None

    def test_ratios_are_per_round(self) -> None:
        assert ratios([1.0, 2.0, None, 4.0, 5.0], [2.0, 1.0, 1.0, None, 0.0]) == (0.5, 2.0, None, None, None)

    def test_the_median_of_the_ratios_is_not_the_ratio_of_the_medians(self) -> None:
        found = summary(ratios([1.0, 2.0, 3.0], [2.0, 1.0, 6.0]))
        assert found == Summary(0.5, 0.5, 2.0, 3)

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (Summary(1.2345, 1.1, 1.306, 5), "1.23 (1.10–1.31)"),
            (Summary(12.345, 9.0, 13.0, 5), "12.3 (9.0–13.0)"),
            (Summary(164321, 98765, 170000, 5), "164,000 (99,000–170,000)"),
            (Summary(0.00331, 0.0028, 0.004, 5), "0.0033 (0.0028–0.0040)"),
            (Summary(0, 0, 0, 5), "0 (0–0)"),
            (Summary(0, 0, 0.5, 5), "0.000 (0.000–0.500)"),
        ],
    )
    def test_three_digits(self, value: Summary, shown: str) -> None:
        assert str(value) == shown

    def test_rounded(self) -> None:
        assert [rounded(1234.5, places) for places in (-2, 0, 1)] == ["1,200", "1,234", "1,234.5"]


class TestReading:
    def test_all_of_it(self) -> None:
        found = results()
        assert (found.date, found.rounds) == ("2026-11-23", 3)
        assert found.commands == {"direct": (), "ours-ws": ("wstunnel server", "wstunnel client -L 'a b'")}
        measure = found.measures["bulk_up"]
        assert (measure.title, measure.unit, measure.better) == ("Bulk, up", "GB/s", "higher")
        assert measure.values["ours-wss"] == (1.0, None, 3.0)
        assert measure.failures("ours-wss") == 1

    def test_an_error_without_values_is_a_failure_in_every_round(self) -> None:
        assert results().measures["bulk_up"].failures("erebe-wss") == 3

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ([], "the document is not a table"),
            ({}, "rounds is None"),
            (DOCUMENT | {"rounds": 0}, "rounds is 0"),
            (DOCUMENT | {"rounds": True}, "rounds is True"),
            (DOCUMENT | {"measures": {}}, "no measures"),
            (DOCUMENT | {"measures": {"Bulk up": {}}}, "'Bulk up': a name is"),
            (DOCUMENT | {"measures": {"bulk_up": 1}}, "'bulk_up' is not a table"),
            (DOCUMENT | {"date": "yesterday"}, "date is 'yesterday'"),
            (DOCUMENT | {"commands": None}, "commands is None"),
            (changed(better="faster"), "better is 'faster'"),
            (changed(title=None), "title is None"),
            (changed(values={"a-ws": [1.0, 2.0]}), "a-ws: not a list of 3 values"),
            (changed(values={"a-ws": 1.0}), "a-ws: not a list of 3 values"),
            (changed(values={"a-ws": [1.0, 2.0, "3"]}), "'3' is neither a number"),
            (changed(values={"a-ws": [1.0, 2.0, True]}), "True is neither a number"),
            (changed(values={"a-ws": [1.0, 2.0, -1]}), "-1 is neither a number"),
            (changed(values={"a-ws": [1.0, 2.0, math.nan]}), "nan is neither a number"),
            (changed(values={"a|b": [1.0, 2.0, 3.0]}), r"'a\|b' is not a tunnel's name"),
        ],
    )
    def test_refused(self, document: Any, message: str) -> None:
        with pytest.raises(ResultsError, match=message):
            read(document)

    @pytest.mark.parametrize(
        ("text", "left"),
        [
            ("/opt/peers/bin/chisel server --key /tmp/a/key.pem", "chisel server --key key.pem"),
            ("open: '/tmp/x/y.sock' (/a/b)", "open: 'y.sock' (b)"),
            ("--peer=/opt/peer/bin", "--peer=bin"),
            ("ws://127.0.0.1:80/path/x wss://h/a/b", "ws://127.0.0.1:80/path/x wss://h/a/b"),
            ("/path > /dev/null; a/b/c; MB/s; 1 / 2 / 3", "/path > /dev/null; a/b/c; MB/s; 1 / 2 / 3"),
        ],
    )
    def test_directories_are_left_out(self, text: str, left: str) -> None:
        assert without_directories({"a": [text, 1, None]}) == {"a": [left, 1, None]}
