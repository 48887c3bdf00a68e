"""Options of the whole suite. They must stand here: pytest reads those of deeper directories too late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

# A busy machine is no failure. (With CI=true Hypothesis has no deadline anyway.)
settings.register_profile("patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

UNMEASURED = (
    "tests/benchmarks/",
    "tests/chaos/",
    "tests/conformance/",
    "tests/integration/",
    "tests/test_client.py::TestBackoff",
    "tests/test_client.py::TestNothingIsLeft",
    "tests/test_client.py::TestWarmLinks",
    "tests/test_crowds.py",
    "tests/test_data_path.py::TestMemory",
    "tests/test_data_path.py::test_64_bulk_streams",
    "tests/test_data_path.py::test_many_streams",
    "tests/test_docs.py",
    "tests/test_map.py",
    "tests/test_model_mutations.py",
    "tests/test_reverse.py::TestNeed",
    "tests/test_reverse.py::TestPlace",
)
"""Tests that take long, or have the package run in other processes, and reach hardly a line that no others reach.
Coverage is not measured in them: it would make them three times as long.
"""


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith(UNMEASURED):
            item.add_marker(pytest.mark.no_cover)  # of pytest-cov


@pytest.fixture(autouse=True)
def through_trio(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reactors wait through Trio, as they do where its loop is not known: tests say when by waiting until all tasks are
    blocked. Real processes and `test_trio_loop.py` (marker `in_place`) wait in Trio's place.
    """

    async def find() -> None:
        """There is none."""

    # Not the fixture `monkeypatch`: asked for by every test, it would be undone after all other fixtures' ends.
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("in_place") is None:
            patch.setattr("wstunnel.trio_loop.find", find)
        yield
