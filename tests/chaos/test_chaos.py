"""Every workload, over ws and wss, while the relay breaks its connections: no stream is lost, no byte is wrong.

With `--chaos-seeds N` each runs N times, each time with other faults and data. A failure names its seed; the same seed
makes the same faults, though not at the same bytes.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.integration.process import wait_until
from tests.integration.sockets import Listener
from tests.integration.tunnel import Client, Server

from .relay import Relay
from .workloads import WORKLOADS, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from .relay import Counts
    from .workloads import Enough

    Workload = Callable[[Place, int, Enough], None]

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Mix:
    """Faults that come together.

    Attributes:
        seconds: from one to the next, in the mean.
        kinds: in random order, each once before one comes again.
        hits: how many of them must have ended connections with data on them before a workload may end.
        patience: seconds for which one waits until data flows again.
    """

    seconds: float
    kinds: tuple[str, ...]
    hits: int
    patience: float = 0.0

    def is_enough(self, counts: Counts) -> bool:
        """Whether there were so many hits, and something of every kind."""
        return counts.hits >= self.hits and all(counts.faults[kind] for kind in self.kinds)


MIXES = {
    "cuts": Mix(0.6, ("rst", "fin", "half"), hits=4),
    # A black hole may go unnoticed for 25 s, by the end that only receives and whose control link is in it too. Without
    # patience the next ones hit whatever is dialled meanwhile, and nothing flows for minutes.
    "outages": Mix(1.5, ("outage", "freeze", "black_hole", "fin"), hits=2, patience=30.0),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(1, metafunc.config.getoption("chaos_seeds") + 1))


@pytest.fixture(scope="module", params=["wss", "ws"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), plain=request.param == "ws") as running:
        yield running


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.__name__)
def test_workload(server: Server, workload: Workload, mix: str, seed: int, tmp_path: Path) -> None:
    faults = MIXES[mix]
    with (
        Listener() as listener,
        Relay(server.port, tmp_path, seed=seed) as relay,
        Client(tmp_path, server.invitation.changed(port=relay.port), [listener.address]) as client,
        Place(client.port(listener.address), listener) as place,
    ):
        wait_until(lambda: relay.counts().open > 1, "warm links")
        try:
            with _enough(faults, relay) as enough:
                workload(place, seed, enough)
        except (OSError, AssertionError) as error:
            raise AssertionError(
                f"{workload.__name__} under {mix}, seed {seed}: {error!r}; {relay.counts()}; server: {server.tail()}"
            ) from error
        assert faults.is_enough(relay.counts())
        assert server.running
        assert client.running


@contextmanager
def _enough(faults: Mix, relay: Relay) -> Iterator[Enough]:
    """While the context lasts: these faults until there were enough; then the event is set and all streams can end."""
    enough, over = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS) and not faults.is_enough(relay.counts()):
            pass
        relay.calm()
        enough.set()

    thread = threading.Thread(target=watch)
    with relay.faults(faults.seconds, *faults.kinds, patience=faults.patience):
        thread.start()
        try:
            yield enough
        finally:
            over.set()
            thread.join()
