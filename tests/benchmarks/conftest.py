"""Fixtures: the compiled driver, and a target."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.load import Load
from tests.benchmarks.tunnels import Commands
from tests.integration.programs import require

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Compiled once a test run; skipped where there is no C compiler, which CI must have."""
    require("cc")
    return Load(tmp_path_factory.mktemp("load"))


@pytest.fixture
def target(load: Load) -> Iterator[str]:
    """The address of a target."""
    with load.start("target") as running:
        yield f"127.0.0.1:{running.first['port']}"


@pytest.fixture
def forwarding() -> Callable[..., Commands]:
    """Makes the command lines of a tunnel that only forwards, with a fault if one is named."""

    def make(name: str = "fake-ws", fault: str = "", **others: str) -> Commands:
        program = f"{shlex.quote(sys.executable)} -m tests.benchmarks.forwarder"
        commands = {
            "server": f"{program} server {{server_port}}",
            "client": f"{program} client {{listen_port}} {{target_port}} '{fault}' {{server_port}}",
        }
        return Commands(name, **(commands | others))

    return make
