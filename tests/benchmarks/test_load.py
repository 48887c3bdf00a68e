"""The driver and the target: they move the right bytes, and notice wrong ones."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks import forwarder
from tests.benchmarks.load import Load, LoadError, Running
from tests.benchmarks.measures import Stage
from tests.benchmarks.stages import ROUND_TRIP_MS, StageError, Surroundings, surround
from tests.integration.sockets import Refusing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 3_000_001
"""Of no round number, and more than fits any buffer on the way."""


@pytest.fixture
def faulty(target: str) -> Iterator[Callable[[str], str]]:
    """A connection in front of the target that has a fault. Yields a function from the fault to an address."""
    stack = ExitStack()

    def make(fault: str) -> str:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def serve() -> None:
            near, _ = listener.accept()
            forwarder.carry(near, int(target.rpartition(":")[2]), fault)

        thread = threading.Thread(target=serve)
        stack.callback(thread.join, 10)
        thread.start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    with stack:
        yield make


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("verify", [[], ["--verify"]])
class TestBulk:
    def test_all_bytes_arrive(self, load: Load, target: str, way: str, verify: list[str]) -> None:
        done = load.run("bulk", "--to", target, "--direction", way, "--bytes", SIZE, *verify)
        assert done["bytes"] == SIZE
        assert done["seconds"] > 0

    def test_for_a_time(self, load: Load, target: str, way: str, verify: list[str]) -> None:
        done = load.run("bulk", "--to", target, "--direction", way, "--seconds", 0.2, *verify)
        assert done["bytes"] > 0
        assert done["seconds"] > 0

    def test_a_connection_in_the_way_changes_nothing(
        self, load: Load, faulty: Callable[[str], str], way: str, verify: list[str]
    ) -> None:
        done = load.run("bulk", "--to", faulty(""), "--direction", way, "--bytes", SIZE, *verify)
        assert done["bytes"] == SIZE


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("fault", ["flip", "lose"])
def test_a_wrong_byte_is_noticed(load: Load, faulty: Callable[[str], str], way: str, fault: str) -> None:
    with pytest.raises(LoadError, match="what arrived is not what was sent"):
        load.run("bulk", "--to", faulty(fault), "--direction", way, "--bytes", SIZE, "--verify")


class TestStreams:
    def test_echo(self, load: Load, target: str) -> None:
        took = load.run("echo", "--to", target, "--count", 50)
        assert took["count"] == 50
        assert 0 < took["p50_us"] <= took["p95_us"] <= took["p99_us"] <= took["max_us"]

    def test_many_echoing(self, load: Load, target: str) -> None:
        done = load.run("streams", "--to", target, "--streams", 5, "--seconds", 0.1)
        assert done["messages"] > 5

    @pytest.mark.parametrize("at_once", [1, 7])
    def test_opens(self, load: Load, target: str, at_once: int) -> None:
        done = load.run("opens", "--to", target, "--seconds", 0.1, "--at-once", at_once)
        assert done["opens"] >= at_once

    def test_ten_at_once(self, load: Load, target: str) -> None:
        assert load.run("first", "--to", target, "--count", 10)["count"] == 10

    @pytest.mark.parametrize("way", ["up", "down"])
    def test_echo_beside_bulk(self, load: Load, target: str, way: str) -> None:
        took = load.run("beside", "--to", target, "--direction", way, "--seconds", 0.1)
        assert took["count"] == 10
        assert took["bulk_bytes_per_second"] > 0

    @pytest.mark.parametrize("streams", [1, 200])
    def test_holding(self, load: Load, target: str, streams: int) -> None:
        with load.start("hold", "--to", target, "--streams", streams) as held:
            assert held.first["streams"] == streams
            assert held.finish() == {"lost": 0}

    def test_held_streams_that_are_lost_are_counted(self, load: Load) -> None:
        with ExitStack() as stack:
            started = stack.enter_context(load.start("target"))
            held = stack.enter_context(load.start("hold", "--to", f"127.0.0.1:{started.first['port']}", "--streams", 3))
            started.__exit__(None, None, None)
            assert held.finish() == {"lost": 3}


class TestFailures:
    def test_nothing_listens(self, load: Load) -> None:
        with Refusing.bind() as nobody:
            for command in ("echo", "opens", "first"):
                with pytest.raises(LoadError, match="refused"):
                    load.run(command, "--to", nobody.address, "--seconds", 1)

    def test_not_ready_in_time(self, load: Load) -> None:
        with Refusing.bind() as nobody, pytest.raises(LoadError, match="no stream worked in time"):
            load.run("ready", "--to", nobody.address, "--seconds", 0.1)

    @pytest.mark.parametrize("command", ["echo", "opens", "first", "bulk --bytes 100 --direction down"])
    def test_streams_that_end_early(self, load: Load, command: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve() -> None:
                with closing(listener.accept()[0]) as near:
                    near.recv(65536)

            thread = threading.Thread(target=serve)
            thread.start()
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            with pytest.raises(LoadError, match="ended"):
                load.run(*command.split(), "--to", address, "--seconds", 1)
            thread.join()

    @pytest.mark.parametrize("at_once", [1, 2])
    def test_a_page_that_is_not_there(self, load: Load, at_once: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def serve() -> None:
                with closing(listener.accept()[0]) as near:
                    assert near.recv(65536).startswith(b"GET /page HTTP/1.1\r\n")
                    near.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n")

            thread = threading.Thread(target=serve)
            thread.start()
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            with pytest.raises(LoadError, match="not HTTP 200"):
                load.run("opens", "--to", address, "--seconds", 1, "--at-once", at_once, "--get", "/page")
            thread.join()

    def test_no_such_command(self, load: Load) -> None:
        with pytest.raises(LoadError, match="no such command"):
            load.run("dance")


def path_of(around: Surroundings) -> Running:
    assert around.path is not None
    return around.path


class TestPath:
    """The slow path between two network namespaces."""

    @pytest.fixture
    def around(self, load: Load, tmp_path: Path) -> Iterator[Surroundings]:
        if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
            pytest.skip("network namespaces and TUN devices need root and /dev/net/tun")
        with ExitStack() as stack:
            try:
                surroundings = surround(Stage.WIDE, load, tmp_path / "wide", stack)
            except StageError as error:
                pytest.skip(f"no network namespaces here: {error}")
            yield surroundings

    def test_its_delay(self, load: Load, around: Surroundings) -> None:
        """A connect and an echo are two round trips, and none is ever shorter."""
        took = load.run("first", "--to", around.direct, namespace=around.place.near)
        assert took["max_us"] / 1e3 >= 2 * ROUND_TRIP_MS

    def test_bytes_cross_it_also_with_loss(self, load: Load, around: Surroundings) -> None:
        path_of(around).tell("loss 3")
        for way in ("up", "down"):
            done = load.run(
                "bulk", "--to", around.direct, "--direction", way, "--bytes", 300_000, "--verify",
                namespace=around.place.near,
            )  # fmt: skip
            assert done["bytes"] == 300_000
        counts = path_of(around).tell("loss 0")
        assert min(counts[way]["lost"] for way in ("there", "back")) > 0

    def test_nothing_crosses_when_all_is_lost(self, load: Load, around: Surroundings) -> None:
        path_of(around).tell("loss 100")
        with pytest.raises(LoadError, match="no stream worked in time"):
            load.run("ready", "--to", around.direct, "--seconds", 0.2, namespace=around.place.near)
