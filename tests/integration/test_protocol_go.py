"""`wstunnel.1` as somebody else speaks it: clients in Go that were written from docs/reference/protocol.md alone.

One package has the protocol, with resumption; it runs on golang.org/x/net/websocket and on github.com/coder/websocket.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.chaos.relay import Relay

from .programs import finish, install, require
from .sockets import Echo, Listener, Refusing, pattern, read_to_end, send_until_blocked
from .tunnel import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.programs, pytest.mark.timeout(300)]

CLIENTS = Path(__file__).parent / "clients"
LIBRARIES = ("xnet", "coder")
FOR_SHORT = "-ldflags=-w"
"""Without what a debugger would need: linking takes half the time."""

SIZE = 1 << 20
SECONDS = 60.0

CUT_SIZE = 12_000_000
CUT_PIECE = 200_000
CUT_PIECE_SECONDS = 0.04
"""Between two pieces: else a fast machine is done before it is cut."""

each_library = pytest.mark.parametrize("library", LIBRARIES)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("go")
    shutil.copytree(CLIENTS, tree, dirs_exist_ok=True)
    return tree


@pytest.fixture(scope="module")
def programs(tree: Path) -> Path:
    """The directory of the programs."""
    directory = tree / "programs"
    directory.mkdir()
    install(require("go"), "build", "-o", directory, "./nc", "./tunnel", cwd=tree, within=280)
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), plain=True, arguments=["-v"]) as running:
        yield running
        reasons = re.findall(r"link lost .*reason=(.*)", running.stderr)
        assert set(reasons) == {'"closed by the peer: 1000"'}


def test_the_code_is_as_go_likes_it(tree: Path) -> None:
    go = require("go")
    assert finish(require("gofmt"), "-l", tree).stdout == b""
    finish(go, "vet", "./...", cwd=tree, within=280)


def test_against_a_server_that_plays_the_page(tree: Path) -> None:
    """What a real server cannot be brought to do: cuts at every place, odd answers, frames of every kind."""
    command = [require("go"), "test", FOR_SHORT, "-count=1", "-parallel=16", "./sockets", "./wstunnel"]
    finish(*command, cwd=tree, within=280)


def carry(programs: Path, library: str, server: Server, *targets: str, size: int = SIZE) -> list[str]:
    """One stream to each target, one after the other."""
    done = finish(programs / "tunnel", library, str(size), *targets, within=SECONDS, env=login(server.invitation.url))
    return done.stdout.decode().splitlines()


def login(url: str) -> dict[str, str]:
    return dict(os.environ) | {"WSTUNNEL_URL": url}


@each_library
def test_one_mebibyte_and_the_end_both_ways(programs: Path, library: str, server: Server) -> None:
    with Echo() as echo:
        assert carry(programs, library, server, f"tcp:{echo.address}") == ["echoed"]
        server.wait_for_line(rf"stream ended .*target=tcp:{echo.address} sent={SIZE} received={SIZE} .*reason=finished")


@each_library
def test_refusals_have_their_codes_and_the_link_is_used_again(programs: Path, library: str, server: Server) -> None:
    with Echo() as echo, Refusing.bind() as refusing:
        targets = {
            refusing.address: "reset refused",
            echo.address: "echoed",
            "name.invalid:1": "reset name-not-found",
            "169.254.169.254:80": "reset forbidden",
            "not a target": "reset forbidden",
            f"abandon:{echo.address}": "reset shutdown",
            f"tcp:{echo.address}": "echoed",
        }
        assert carry(programs, library, server, *targets) == list(targets.values())
        server.wait_for_line(rf"stream ended .*target={echo.address} .*reason=shutdown")
        streams = re.findall(
            rf"stream .*target=(?:{refusing.address}|(?:tcp:)?{echo.address}) .*peer=(\S+)", server.stderr
        )
        assert len(streams) >= 4
        assert len(set(streams)) == 1, "more than one link"


@each_library
def test_nothing_at_all(programs: Path, library: str, server: Server) -> None:
    with Echo() as echo:
        assert carry(programs, library, server, echo.address, size=0) == ["echoed"]


@contextmanager
def nc(programs: Path, library: str, url: str, target: str) -> Iterator[subprocess.Popen[bytes]]:
    """`nc`, which carries its standard input and output. It is killed in time, so that no read of the test hangs."""
    argv = [str(programs / "nc"), "-library", library, *target.rsplit(":", 1)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=login(url)
    ) as process:
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


@each_library
def test_half_close_from_here(programs: Path, library: str, server: Server) -> None:
    """The target says its 5 MB only when it has seen the end."""
    answer = pattern(5_000_000)
    with Listener() as listener, nc(programs, library, server.invitation.url, listener.address) as process:
        assert process.stdin and process.stdout
        with listener.accept() as target:
            process.stdin.write(b"question")
            process.stdin.close()
            assert read_to_end(target) == b"question"
            writer = threading.Thread(target=target.sendall, args=(answer,))
            writer.start()
            assert process.stdout.read(len(answer)) == answer
            writer.join()
        assert process.stdout.read() == b""
        assert process.wait() == 0


@each_library
def test_half_close_from_there(programs: Path, library: str, server: Server) -> None:
    """The target has said its end before it hears anything."""
    question = pattern(5_000_000)
    with (
        Listener() as listener,
        nc(programs, library, server.invitation.url, listener.address) as process,
        listener.accept() as target,
    ):
        assert process.stdin and process.stdout
        target.sendall(b"banner")
        target.shutdown(1)
        assert process.stdout.read() == b"banner"
        writer = threading.Thread(target=process.communicate, args=(question,))
        writer.start()
        assert read_to_end(target) == question
        writer.join()
        assert process.returncode == 0


@each_library
def test_nobody_reads_and_then_all_is_there(programs: Path, library: str, server: Server) -> None:
    """Credit, both ways: a sender stops, and no link is closed for what came beyond a limit."""
    piece = pattern(65536)
    with (
        Listener() as listener,
        nc(programs, library, server.invitation.url, listener.address) as process,
        listener.accept() as target,
    ):
        assert process.stdin and process.stdout
        down = send_until_blocked(target, piece, at_most=64 << 20, quiet=0.3)
        assert down > 1 << 18, "less than the window that every stream has"
        up = write_until_blocked(process.stdin.fileno(), piece, at_most=64 << 20, quiet=0.3)
        assert up > 1 << 18
        target.shutdown(1)
        assert process.stdout.read() == repeated(piece, down)
        process.stdin.close()
        assert read_to_end(target) == repeated(piece, up)
        assert process.wait() == 0


def write_until_blocked(descriptor: int, piece: bytes, *, at_most: int, quiet: float) -> int:
    """As `send_until_blocked`, for a pipe."""
    written = 0
    last = time.monotonic()
    os.set_blocking(descriptor, False)
    while time.monotonic() - last < quiet:
        try:
            written += os.write(descriptor, piece[written % len(piece) :])
            last = time.monotonic()
        except BlockingIOError:
            time.sleep(0.02)
        assert written <= at_most, f"{written} bytes were taken though nobody reads"
    os.set_blocking(descriptor, True)
    return written


def repeated(piece: bytes, size: int) -> bytes:
    return (piece * (size // len(piece) + 1))[:size]


@each_library
def test_refusals_are_printed(programs: Path, library: str, server: Server) -> None:
    url = server.invitation.url
    with Refusing.bind() as refusing:
        assert re.fullmatch("nc: refused: .*connection refused\n", says(programs, library, url, refusing.address))
    assert says(programs, library, url, "name.invalid:1").startswith("nc: name-not-found: ")
    wrong = server.invitation.changed(token="A" * 43)
    assert says(programs, library, wrong, "name.invalid:1") == "nc: the server refused: 401 no valid token\n"


def says(programs: Path, library: str, url: str, target: str) -> str:
    """What `nc` says when there is no such stream."""
    with nc(programs, library, url, target) as process:
        out, err = process.communicate(b"early data")
    assert (process.returncode, out) == (1, b"")
    return err.decode()


def test_every_byte_while_all_links_are_cut(programs: Path, tmp_path: Path) -> None:
    """With both libraries at once, over TLS with the key pinned."""
    data = pattern(CUT_SIZE, seed=7)
    with Echo() as echo, Server(tmp_path, plain=False) as server, Relay(server.port, tmp_path, seed=7) as relay:
        url = server.invitation.changed(port=relay.port)
        assert says(programs, "xnet", url.partition("#")[0], "127.0.0.1:1").startswith("nc: tls: ")
        pinned = server.invitation.changed(pin="#sha256=" + "A" * 43)
        assert says(programs, "xnet", pinned, "127.0.0.1:1") == "nc: the server's key is none of the pinned ones\n"
        back: dict[str, bytes] = {}
        codes: dict[str, int] = {}

        def through(library: str) -> None:
            with nc(programs, library, url, echo.address) as process:
                writer = threading.Thread(target=write_slowly, args=(process, data))
                writer.start()
                assert process.stdout
                back[library] = process.stdout.read()
                writer.join()
                codes[library] = process.wait()

        threads = [threading.Thread(target=through, args=(library,)) for library in LIBRARIES]
        with relay.faults(0.5, "rst", "fin", "half", scope="all"):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        hits = relay.counts().hits
        for library in LIBRARIES:
            assert back[library] == data, f"{library}: {len(back[library])} bytes came back"
            assert codes[library] == 0
        ended = re.findall(r"stream ended .* sent=(\d+) received=(\d+) .*reason=(\w+)", server.stderr)
        assert ended == [(str(CUT_SIZE), str(CUT_SIZE), "finished")] * 2
        assert hits >= 3


def write_slowly(process: subprocess.Popen[bytes], data: bytes) -> None:
    """In pieces, then the end."""
    assert process.stdin
    try:
        with process.stdin as pipe:
            for start in range(0, len(data), CUT_PIECE):
                pipe.write(data[start : start + CUT_PIECE])
                time.sleep(CUT_PIECE_SECONDS)
    except BrokenPipeError:
        pass  # what came back tells
