"""`nc -N` at both ends: each says its end when its input ends, and goes on reading."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import pytest

from .process import wait_until
from .programs import require
from .sockets import CLOSE_WAIT, LISTEN, SECONDS, local_states, read_to_end, remote_states, unused_port
from .ways import Ways, ways

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

SIZE = 5_000_000
WAYS = ["-L", "-R", "connect"]

Pipes = subprocess.Popen[bytes]


@contextmanager
def _running(command: list[str], env: dict[str, str] | None = None) -> Iterator[Pipes]:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@contextmanager
def target(port: int) -> Iterator[Pipes]:
    """nc that listens for one connection."""
    with _running([require("nc"), "-N", "-l", "127.0.0.1", str(port)]) as process:
        wait_until(lambda: LISTEN in local_states(port), "nc to listen")
        yield process


@pytest.fixture(scope="module")
def port() -> int:
    """Where the target is."""
    return unused_port()


@pytest.fixture(scope="module")
def running(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ways, dict[str, int]]]:
    """The tunnel, and the ports that lead there by `-L` and by `-R`."""
    forwards = [part for flag in ("-L", "-R") for part in (flag, f"0:127.0.0.1:{port}")]
    with ways(tmp_path_factory.mktemp("nc"), *forwards) as made:
        leads = rf" -> tcp:127\.0\.0\.1:{port}$"
        found = {
            "-L": made.client.wait_for_line(rf"listening 127\.0\.0\.1:(\d+){leads}"),
            "-R": made.client.wait_for_line(rf"listening 127\.0\.0\.1:(\d+) at the server{leads}"),
        }
        yield made, {flag: int(match[1]) for flag, match in found.items()}


@contextmanager
def application(running: tuple[Ways, dict[str, int]], way: str, port: int) -> Iterator[Pipes]:
    """nc, or `wstunnel connect` in its place."""
    made, ports = running
    if way == "connect":
        command = made.connect(f"127.0.0.1:{port}")
    else:
        command = [require("nc"), "-N", "127.0.0.1", str(ports[way])]
    with _running(command, env=made.environment) as process:
        yield process


@pytest.mark.parametrize("way", WAYS)
def test_the_application_ends_first(running: tuple[Ways, dict[str, int]], port: int, way: str) -> None:
    up, down = os.urandom(SIZE), os.urandom(SIZE)
    # Not nc: one that listens leaves when its peer has said its end, whatever it has still to send.
    with socket.create_server(("127.0.0.1", port)) as listener, application(running, way, port) as here:
        assert here.stdin and here.stdout
        with here.stdin as stdin:
            stdin.write(up)
        listener.settimeout(SECONDS)
        there, _ = listener.accept()
        with there:
            there.settimeout(SECONDS)
            assert read_to_end(there) == up
            sender = threading.Thread(target=there.sendall, args=(down,))
            sender.start()
            assert here.stdout.read(SIZE) == down
            sender.join()
        assert here.stdout.read() == b""
        assert here.wait(SECONDS) == 0


@pytest.mark.parametrize("way", WAYS)
def test_the_target_ends_first(running: tuple[Ways, dict[str, int]], port: int, way: str) -> None:
    up, down = os.urandom(SIZE), os.urandom(SIZE)
    _, ports = running
    with target(port) as there, application(running, way, port) as here:
        assert here.stdin and here.stdout and there.stdin and there.stdout
        sender = threading.Thread(target=_write_all, args=(there.stdin, down))
        sender.start()
        assert here.stdout.read(SIZE) == down
        sender.join()
        if way == "connect":
            assert here.stdout.read() == b""
        else:
            wait_until(lambda: CLOSE_WAIT in remote_states(ports[way]), "the target's end")
        sender = threading.Thread(target=_write_all, args=(here.stdin, up))
        sender.start()
        assert there.stdout.read() == up
        sender.join()
        assert (here.wait(SECONDS), there.wait(SECONDS)) == (0, 0)


@pytest.mark.parametrize("way", WAYS)
def test_both_ways_at_once(running: tuple[Ways, dict[str, int]], port: int, way: str) -> None:
    up, down = os.urandom(SIZE), os.urandom(SIZE)
    with target(port) as there, application(running, way, port) as here, ThreadPoolExecutor(4) as threads:
        assert here.stdin and here.stdout and there.stdin and there.stdout
        sent = threads.submit(here.stdin.write, up), threads.submit(_write_all, there.stdin, down)
        got = threads.submit(there.stdout.read)
        assert here.stdout.read(SIZE) == down
        for each in sent:
            each.result(SECONDS)
        here.stdin.close()
        assert got.result(SECONDS) == up
        assert (here.wait(SECONDS), there.wait(SECONDS)) == (0, 0)


def _write_all(pipe: IO[bytes], data: bytes) -> None:
    """And its end."""
    with pipe:
        pipe.write(data)
