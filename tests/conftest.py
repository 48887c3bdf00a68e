"""Options of the whole suite. They must stand here: pytest reads those of deeper directories too late."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos-seeds",
        type=int,
        default=1,
        metavar="N",
        help="run each test of tests/chaos with N seeds (default 1, about four minutes; 20 take over an hour)",
    )
    parser.addoption(
        "--model-runs",
        type=int,
        default=1000,
        metavar="N",
        help="play so many random schedules in tests/test_model.py (default 1000, ten seconds)",
    )
