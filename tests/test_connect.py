"""`wstunnel connect` as a role: a real server in this process, pipes for standard input and output."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.roles import LogLines, RunningServer, free_port, lines, serving
from wstunnel import connect
from wstunnel.config import ClientConfig
from wstunnel.errors import LocalError, ServerRefusedError, StreamError, WstunnelError
from wstunnel.policy import parse_rule
from wstunnel.targets import parse_target

__all__ = ["lines"]


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


class Pipes:
    """Standard input and output of the role, and the ends that a user has."""

    def __init__(self) -> None:
        self.source, self.feed = os.pipe()
        self.drain, self.sink = os.pipe()

    def __enter__(self) -> Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self.source, self.feed, self.drain):
            try:
                os.close(descriptor)
            except OSError:
                pass

    def end(self) -> None:
        """The end of standard input."""
        os.close(self.feed)

    def read_all(self) -> bytes:
        data = b""
        while more := os.read(self.drain, 65536):
            data += more
        return data


async def run(server: RunningServer, pipes: Pipes, text: str, shutdown: trio.Event | None = None) -> None:
    """The role, with its error taken out of the groups of the nurseries."""
    config = ClientConfig(url=server.url, idle_links=0)
    try:
        await connect.run(
            config,
            parse_target(text),
            source=pipes.source,
            sink=pipes.sink,
            shutdown=trio.Event() if shutdown is None else shutdown,
        )
    except BaseExceptionGroup as group:
        found: BaseException = group
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        raise found from None


def address(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def reply(listener: socket.socket, answer: bytes = b"", *, reset: bool = False) -> bytes:
    """A target: reads to the end, then answers."""
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(20)
        data = b""
        while more := connection.recv(65536):
            data += more
        connection.sendall(answer)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    return data


async def test_the_end_of_input_is_passed_on_and_the_answer_still_read(tmp_path: Path, target: socket.socket) -> None:
    heard: list[bytes] = []

    async def listen() -> None:
        heard.append(await trio.to_thread.run_sync(reply, target, b"answer" * 100_000))

    with Pipes() as pipes, trio.fail_after(20):
        read: list[bytes] = []

        async def drain() -> None:
            read.append(await trio.to_thread.run_sync(pipes.read_all))

        async with serving(tmp_path) as server, trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            nursery.start_soon(drain)
            os.write(pipes.feed, b"request")
            pipes.end()
            await run(server, pipes, address(target))
    assert heard == [b"request"]
    assert read == [b"answer" * 100_000]


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ((), StreamError, "connection refused"),
        (("127.0.0.2:*",), ServerRefusedError, "policy does not allow"),
    ],
)
async def test_a_refusal_is_an_error_and_no_warning_beside_it(
    tmp_path: Path,
    target: socket.socket,
    lines: LogLines,
    *,
    rules: tuple[str, ...],
    error: type[WstunnelError],
    message: str,
) -> None:
    where = address(target)
    target.close()
    with Pipes() as pipes, trio.fail_after(20):
        async with serving(tmp_path, allow=tuple(map(parse_rule, rules))) as server:
            with pytest.raises(error, match=message):
                await run(server, pipes, where)
        os.close(pipes.sink)
    (line,) = [line for line in lines.all() if " wstunnel.client stream refused" in line]
    assert line.startswith("INFO "), "which -v shows"


async def test_a_reset_is_an_error_and_no_end(tmp_path: Path, target: socket.socket) -> None:
    with Pipes() as pipes, trio.fail_after(20):
        pipes.end()
        async with serving(tmp_path) as server, trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.to_thread.run_sync, partial(reply, target, reset=True)))
            with pytest.raises(StreamError, match=f"^tcp:{address(target)}: connection reset$"):
                await run(server, pipes, address(target))


async def test_a_signal_ends_it_without_an_error(tmp_path: Path, target: socket.socket) -> None:
    shutdown = trio.Event()
    with Pipes() as pipes, trio.fail_after(20):
        async with serving(tmp_path) as server, trio.open_nursery() as nursery:
            nursery.start_soon(run, server, pipes, address(target), shutdown)
            connection, _ = await trio.to_thread.run_sync(target.accept)
            shutdown.set()
        connection.close()
        pipes.end()


async def test_a_reader_that_went_away_is_no_error(tmp_path: Path, target: socket.socket) -> None:
    with Pipes() as pipes, trio.fail_after(20):
        os.close(pipes.drain)
        pipes.end()
        async with serving(tmp_path) as server, trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.to_thread.run_sync, partial(reply, target, b"x" * 100)))
            await run(server, pipes, address(target))


async def test_an_output_that_cannot_be_written_is_an_error(
    tmp_path: Path, target: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with Pipes() as pipes, trio.fail_after(20):
        os.close(pipes.sink)
        pipes.sink = os.open("/dev/full", os.O_WRONLY)
        pipes.end()
        async with serving(tmp_path) as server, trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.to_thread.run_sync, partial(reply, target, b"x" * 100)))
            with pytest.raises(LocalError, match="No space left"):
                await run(server, pipes, address(target))


async def test_the_output_does_not_end_before_the_reason_is_told(tmp_path: Path) -> None:
    """ssh takes the end of the output for all there is to know, and ends the program that was about to say why."""
    with Pipes() as pipes, trio.fail_after(20):
        async with serving(tmp_path) as server:
            with pytest.raises(StreamError, match="refused"):
                await run(server, pipes, f"127.0.0.1:{free_port()}")
            os.set_blocking(pipes.drain, False)
            for _ in range(100):
                await trio.sleep(0.001)
                with pytest.raises(BlockingIOError):
                    os.read(pipes.drain, 1)
        os.close(pipes.sink)


async def test_nobody_there_is_said_once_with_the_reason(
    tmp_path: Path, target: socket.socket, lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wstunnel import limits

    monkeypatch.setattr(limits, "OPEN_WAIT_SECONDS", 0.5)
    with Pipes() as pipes, trio.fail_after(20):
        async with serving(tmp_path) as server:
            gone: Any = server
        with pytest.raises(StreamError, match=r"no link to the other end in time: cannot connect .* refused"):
            await run(gone, pipes, address(target))
    (line,) = [line for line in lines.all() if "no link to the other end in time" in line]
    assert line.startswith("INFO ")


async def test_an_input_that_cannot_be_read_is_an_error_and_a_reset(
    tmp_path: Path, target: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target must not take what it has by then for all of it."""
    heard: list[bytes | OSError] = []
    halfway = threading.Event()
    reads: list[int] = []
    real = os.read

    def listen() -> None:
        target.settimeout(20)
        connection, _ = target.accept()
        with connection:
            connection.settimeout(20)
            heard.append(connection.recv(10))
            halfway.set()
            try:
                heard.append(connection.recv(10))
            except OSError as error:
                heard.append(error)

    with Pipes() as pipes, trio.fail_after(20):

        def read(descriptor: int, size: int) -> bytes:
            reads.append(descriptor)
            if descriptor == pipes.source and reads.count(descriptor) > 1:
                halfway.wait(20)
                raise OSError(errno.EIO, "Input/output error")
            return real(descriptor, size)

        monkeypatch.setattr(os, "read", read)
        async with serving(tmp_path) as server, trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, listen)
            os.write(pipes.feed, b"half")
            with pytest.raises(LocalError, match="cannot read standard input: Input/output error"):
                await run(server, pipes, address(target))
        pipes.end()
    assert heard[0] == b"half"
    assert isinstance(heard[1], ConnectionResetError)


async def test_an_input_that_cannot_be_read_at_all_is_an_error(tmp_path: Path, target: socket.socket) -> None:
    with Pipes() as pipes, trio.fail_after(20):
        os.close(pipes.source)
        pipes.source = os.open("/", os.O_RDONLY)
        async with serving(tmp_path) as server:
            with pytest.raises(LocalError, match="cannot read standard input: Is a directory"):
                await run(server, pipes, address(target))
        pipes.end()
