"""Streams of every way in while all connections of the tunnel are cut again and again: not a byte is lost."""

from __future__ import annotations

import subprocess
import threading
import time
from functools import partial
from typing import IO, TYPE_CHECKING

import pytest

from tests.chaos.relay import Relay

from .programs import require
from .sockets import Echo, pattern
from .tunnel import COMMAND, Client, Server, environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(240)]

CUTS = ("rst", "fin", "half")
EVERY_SECONDS = 0.8
PATIENCE_SECONDS = 5.0
"""So long a cut waits for data to flow: else a slow machine is cut again before it has recovered."""
HITS = 4
"""Cuts of links with data on them, until the input ends."""
PIECE = 200_000
PIECE_SECONDS = 0.04
"""Between two pieces: what comes back is kept until it is over."""
SECONDS = 180.0


class Cut:
    """A tunnel behind a relay, and command lines that lead to `echo` through it."""

    def __init__(self, directory: Path, echo: Echo, relay: Relay, client: Client, url: str) -> None:
        self.relay = relay
        self._directory = directory
        self._echo = echo.address
        self._client = client
        self._url = url

    def command(self, way: str) -> list[str]:
        host, _, port = self._echo.rpartition(":")
        if way == "connect":
            return [*COMMAND, "connect", self._echo]
        nc = [require("nc"), "-N"]
        if way == "-R":
            return [*nc, "127.0.0.1", self._port(rf"at the server -> tcp:{self._echo}")]
        if way == "-L":
            return [*nc, "127.0.0.1", self._port(rf"-> tcp:{self._echo}")]
        version, whither = ("5", "SOCKS") if way == "-D" else ("connect", "HTTP")
        return [*nc, "-X", version, "-x", f"127.0.0.1:{self._port(f'-> {whither} proxy')}", host, port]

    def _port(self, rest: str) -> str:
        return self._client.wait_for_line(rf"listening 127\.0\.0\.1:(\d+) {rest}$")[1]

    @property
    def environment(self) -> dict[str, str]:
        return environment(self._directory, WSTUNNEL_URL=self._url)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cut]:
    directory = tmp_path_factory.mktemp("cut")
    with (
        Echo() as echo,
        Server(directory, plain=False, arguments=["--allow-listen", "*"]) as server,
        Relay(server.port, directory, seed=6) as relay,
    ):
        url = server.invitation.changed(port=relay.port)
        forward = f"0:{echo.address}"
        arguments = ["-L", forward, "-R", forward, "-D", "0", "--http-proxy", "0"]
        with Client(directory, url, [], arguments=arguments) as client:
            yield Cut(directory, echo, relay, client, url)
        assert "reason=reset" not in server.stderr


@pytest.mark.parametrize("way", ["-L", "-R", "-D", "--http-proxy", "connect"])
def test_every_byte_and_then_the_end(cut: Cut, way: str) -> None:
    command = cut.command(way)
    before = cut.relay.counts().hits
    pieces: list[bytes] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cut.environment
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        enough = partial(_were_enough, cut.relay, before + HITS)
        writer = threading.Thread(target=_write, args=(process.stdin, pieces, enough))
        with cut.relay.faults(EVERY_SECONDS, *CUTS, scope="all", patience=PATIENCE_SECONDS):
            writer.start()
            back = process.stdout.read()
            writer.join()
        timer.cancel()
        said = process.stderr.read()
    assert back == b"".join(pieces), f"{len(back)} bytes came back: {said!r}"
    assert process.returncode == 0, said
    assert _were_enough(cut.relay, before + HITS)


def _were_enough(relay: Relay, hits: int) -> bool:
    return relay.counts().hits >= hits


def _write(pipe: IO[bytes], pieces: list[bytes], enough: Callable[[], bool]) -> None:
    """Piece by piece, each kept in `pieces`, then the end."""
    try:
        with pipe:
            while not enough():
                pieces.append(pattern(PIECE, seed=len(pieces)))
                pipe.write(pieces[-1])
                time.sleep(PIECE_SECONDS)
    except BrokenPipeError:
        pass  # what came back tells
