"""iperf3's TCP tests through `-L` and `-R`: up, down, both ways at once, several streams; by its own count."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from .process import Process, wait_until
from .programs import finish, require
from .sockets import LISTEN, local_states, unused_port
from .ways import ways

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

MEGABYTES = 100


@dataclass
class Bench:
    """Where an iperf3 server will listen, and the port that leads there."""

    directory: Path
    direct: int
    port: int

    def run(self, *flags: str) -> dict[str, Any]:
        """One test, with a server of its own: one that is used again does not listen for a moment in between."""
        program = require("iperf3")
        argv = [program, "-s", "-1", "-B", "127.0.0.1", "-p", str(self.direct)]
        with Process("iperf3", argv, directory=self.directory) as server:
            wait_until(lambda: LISTEN in local_states(self.direct), "iperf3 to listen")
            done = finish(program, "-c", "127.0.0.1", "-p", str(self.port), "-J", *flags, within=60)
            assert server.wait() == 0
        end = json.loads(done.stdout)["end"]
        assert isinstance(end, dict)
        return end


@pytest.fixture(scope="module", params=["-L", "-R"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("iperf3")
    direct = unused_port()
    with ways(directory, request.param, f"0:127.0.0.1:{direct}") as running:
        yield Bench(directory, direct, running.port(rf"tcp:127\.0\.0\.1:{direct}"))


@pytest.mark.parametrize("flags", [[], ["-R"], ["-P", "4"], ["-R", "-P", "4"]], ids=" ".join)
def test_bytes(bench: Bench, flags: list[str]) -> None:
    end = bench.run("-n", f"{MEGABYTES}M", *flags)
    sent, received = end["sum_sent"]["bytes"], end["sum_received"]["bytes"]
    # Its end of the test is said on another connection, so that what is on its way then does not count: whole windows
    # of four streams, if the receiver is slow.
    assert sent >= MEGABYTES << 20
    assert 1 << 20 < received <= sent


def test_both_ways_at_once(bench: Bench) -> None:
    end = bench.run("-t", "2", "--bidir")
    assert end["sum_received"]["bytes"] > 100_000
    assert end["sum_received_bidir_reverse"]["bytes"] > 100_000
