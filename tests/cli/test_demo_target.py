"""The demo's target and its load, against each other without a tunnel."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.cli.conftest import Program
from wstunnel.cli import demo_target
from wstunnel.cli.demo_load import Latency, Load, Progress, Transfer
from wstunnel.errors import LocalError

TOTAL = 3 * demo_target.BLOCK_BYTES + 8


@pytest.fixture
def target() -> Iterator[tuple[str, int]]:
    """A listener that the target's own accept loop serves, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=demo_target._work, args=(listener,), daemon=True)
    thread.start()
    yield listener.getsockname()
    # A thread in accept() keeps a closed listener: only a connection wakes it.


def test_blocks_differ_and_add_up() -> None:
    seen = [bytes(block) for block in demo_target.blocks(TOTAL)]
    assert [len(block) for block in seen] == [demo_target.BLOCK_BYTES] * 3 + [8]
    assert len(set(seen)) == 4


def test_upload(target: tuple[str, int]) -> None:
    progress = Progress()
    transfer = Load(target, progress).upload(TOTAL)
    assert transfer.verified
    assert transfer.count == progress.done == TOTAL
    assert transfer.seconds > 0


def test_download(target: tuple[str, int]) -> None:
    progress = Progress()
    transfer = Load(target, progress).download(TOTAL)
    assert transfer.verified
    assert transfer.count == progress.done == TOTAL


def test_echoes(target: tuple[str, int]) -> None:
    load = Load(target, Progress())
    load.first_echo()
    latency = load.latency(50)
    assert len(latency.round_trips) == 50
    assert 0 < latency.p50 <= latency.p99
    assert load.opens_a_second(0.05) > 0


def test_latency_quantiles() -> None:
    latency = Latency([number / 100 for number in range(1, 100)])
    assert (latency.p50, latency.p99) == (0.5, 0.99)


def test_a_difference_is_seen() -> None:
    assert not Transfer(1, 1.0, hashlib.sha256(b"a").digest(), hashlib.sha256(b"b").digest()).verified


@pytest.mark.parametrize("work", ["upload", "download"])
def test_the_reader_of_the_progress_can_stop_it(target: tuple[str, int], work: str) -> None:
    with pytest.raises(LocalError, match="stopped"):
        getattr(Load(target, Progress(stopped=True)), work)(TOTAL)


def peer_that_sends(data: bytes) -> tuple[str, int]:
    """A listener whose first connection gets `data` and then the end, after its whole request was read."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with listener, connection:
            demo_target.receive_exactly(connection, 9)  # closing with unread input would be a reset
            connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    address: tuple[str, int] = listener.getsockname()
    return address


def test_a_download_that_ends_early() -> None:
    with pytest.raises(EOFError, match="4 bytes early"):
        Load(peer_that_sends(b"1234"), Progress()).download(8)


def test_a_digest_that_ends_early() -> None:
    with pytest.raises(EOFError, match="after 2 of 32 bytes"):
        Load(peer_that_sends(b"12345678ab"), Progress()).download(8)


def test_an_unknown_service_is_closed(target: tuple[str, int]) -> None:
    with socket.create_connection(target, timeout=30) as connection:
        connection.sendall(b"?")
        assert connection.recv(1) == b""


def test_a_broken_connection_does_not_end_the_target(target: tuple[str, int]) -> None:
    with socket.create_connection(target, timeout=30) as connection:
        connection.sendall(demo_target.DOWNLOAD + b"\0")  # and no more of its eight bytes
    Load(target, Progress()).first_echo()


def test_the_program_prints_its_port_and_ends_with_its_stdin(program: Program) -> None:
    process = program("-m", "wstunnel.cli.demo_target", stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    Load(("127.0.0.1", int(process.stdout.readline())), Progress()).first_echo()
    process.stdin.close()
    assert process.wait(30) == 1
