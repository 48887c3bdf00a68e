"""Standard input and output as a stream's end: pipes, files, half-close, and a reader that goes away."""

from __future__ import annotations

import errno
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from wstunnel.endpoints.stdio import Stdio


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    """Source to read, its writing end, the reading end of the sink, and the sink."""
    source, feed = os.pipe()
    drain, sink = os.pipe()
    descriptors = [source, feed, drain, sink]
    yield descriptors
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError:
            pass


def read_all(sock: socket.socket) -> bytes:
    sock.setblocking(True)
    sock.settimeout(10)
    data = b""
    while more := sock.recv(65536):
        data += more
    return data


def stop(stdio: Stdio) -> None:
    stdio.close()
    for thread in stdio.threads:
        thread.join(10)


async def test_what_comes_in_goes_on_and_its_end_too(pipes: list[int]) -> None:
    source, feed, drain, sink = pipes
    stdio = Stdio(source, sink)
    stdio.start()
    os.write(feed, b"there")
    os.close(feed)
    with stdio.sock as sock:
        assert await trio.to_thread.run_sync(read_all, sock) == b"there"
        sock.sendall(b"back")  # the other direction goes on
        sock.shutdown(socket.SHUT_WR)
        stdio.over(failed=False)
        assert await trio.to_thread.run_sync(os.read, drain, 10) == b"back"
        assert await trio.to_thread.run_sync(os.read, drain, 10) == b"", "standard output is closed at the end"
        with trio.fail_after(10):
            await stdio.ended.wait()
    stop(stdio)
    pipes[:] = [source, drain]


async def test_it_has_not_ended_before_both_directions_have(pipes: list[int]) -> None:
    source, feed, drain, sink = pipes
    stdio = Stdio(source, sink)
    stdio.start()
    with stdio.sock as sock:
        sock.shutdown(socket.SHUT_WR)
        assert await trio.to_thread.run_sync(os.read, drain, 10) == b""
        assert not stdio.ended.is_set()
        os.write(feed, b"x")
        os.close(feed)
        assert await trio.to_thread.run_sync(read_all, sock) == b"x"
        with trio.fail_after(10):
            await stdio.ended.wait()
    stop(stdio)
    pipes[:] = [source, drain]


async def test_a_file_is_read_to_its_end(pipes: list[int], tmp_path: Path) -> None:
    content = os.urandom(1_000_000)
    (tmp_path / "in").write_bytes(content)
    file = os.open(tmp_path / "in", os.O_RDONLY)
    stdio = Stdio(file, pipes[3])
    stdio.start()
    with stdio.sock as sock:
        assert await trio.to_thread.run_sync(read_all, sock) == content
    stop(stdio)
    os.close(file)


async def test_a_terminal_need_not_end(pipes: list[int]) -> None:
    leader, terminal = pty.openpty()
    stdio = Stdio(terminal, pipes[3])
    stdio.start()
    with stdio.sock as sock:
        sock.shutdown(socket.SHUT_WR)
        with trio.fail_after(10):
            await stdio.ended.wait()
    os.close(leader)  # whoever reads the terminal is told of its end
    stop(stdio)
    os.close(terminal)


async def test_a_reader_that_went_away_resets_the_stream(pipes: list[int]) -> None:
    os.close(pipes[2])
    stdio = Stdio(pipes[0], pipes[3])
    stdio.start()
    with stdio.sock as sock:
        sock.sendall(b"x" * 10)
        os.close(pipes[1])
        with trio.fail_after(10):
            await stdio.ended.wait()
        assert stdio.broken is not None
        assert sock.recv(10) == b""
    stop(stdio)
    pipes[:] = [pipes[0]]


async def test_closing_lets_a_thread_that_writes_end(pipes: list[int]) -> None:
    stdio = Stdio(pipes[0], pipes[3])
    stdio.start()
    stdio.sock.close()
    stdio.close()
    os.close(pipes[1])
    with trio.fail_after(10):
        await stdio.ended.wait()
    stop(stdio)
    pipes[:] = [pipes[0], pipes[2]]


async def test_one_that_was_never_started_holds_nothing(pipes: list[int]) -> None:
    stdio = Stdio(pipes[0], pipes[3])
    stdio.sock.close()
    stdio.close()
    stdio.close()


async def test_what_others_have_made_non_blocking_is_waited_for(pipes: list[int]) -> None:
    """The flag belongs to the open file, which whoever started us may share."""
    source, feed, drain, sink = pipes
    for descriptor in (source, sink):
        os.set_blocking(descriptor, False)
    stdio = Stdio(source, sink)
    stdio.start()
    content = os.urandom(1_000_000)
    with stdio.sock as sock:
        sock.setblocking(True)
        sock.settimeout(10)
        sending = sock.dup()
        with trio.fail_after(10), sending:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, sending.sendall, content)
                got = b""
                while len(got) < len(content):
                    got += await trio.to_thread.run_sync(os.read, drain, 65536)
        assert got == content
        os.write(feed, b"there")
        os.close(feed)
        assert await trio.to_thread.run_sync(read_all, sock) == b"there"
        sock.shutdown(socket.SHUT_WR)
        stdio.over(failed=False)
        with trio.fail_after(10):
            await stdio.ended.wait()
    assert stdio.broken is None
    stop(stdio)
    pipes[:] = [source, drain]


async def test_a_source_that_cannot_be_read_is_said_and_is_no_end(pipes: list[int]) -> None:
    directory = os.open("/", os.O_RDONLY)
    stdio = Stdio(directory, pipes[3])
    stdio.start()
    with stdio.sock as sock:
        with trio.fail_after(10):
            await stdio.failed.wait()
        assert stdio.unread is not None and stdio.unread.errno == errno.EISDIR
        with pytest.raises(BlockingIOError):
            sock.recv(1)
    stop(stdio)
    os.close(directory)


async def test_a_terminal_that_is_gone_is_an_end(pipes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    leader, terminal = pty.openpty()
    real = os.read

    def read(descriptor: int, size: int) -> bytes:
        if descriptor == terminal:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, size)

    monkeypatch.setattr(os, "read", read)
    stdio = Stdio(terminal, pipes[3])
    stdio.start()
    with stdio.sock as sock:
        assert await trio.to_thread.run_sync(read_all, sock) == b""
    assert not stdio.failed.is_set() and stdio.unread is None
    stop(stdio)
    os.close(leader)
    os.close(terminal)


STANDARD_OUTPUT_ENDS = """
import os, socket, sys, trio
from wstunnel.endpoints.stdio import Stdio

async def main():
    stdio = Stdio(0, 1)
    stdio.start()
    with stdio.sock as sock:
        sock.shutdown(socket.SHUT_WR)
        stdio.over(failed=False)
        await stdio.ended.wait()
        near, far = socket.socketpair()
        with near, far:
            print(near.fileno() > 2, os.path.samestat(os.fstat(1), os.stat(os.devnull)), file=sys.stderr)
    stdio.close()

trio.run(main)
"""


def test_no_socket_becomes_standard_output_once_it_has_ended() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STANDARD_OUTPUT_ENDS], stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"True True\n")
