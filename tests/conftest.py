"""Options of the whole suite. They must stand here: pytest reads those of deeper directories too late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


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
