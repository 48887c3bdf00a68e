"""HTTP as Docker speaks it, over Unix sockets: curl, a stream of chunks, a connection that is taken over."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import socketserver
import subprocess
import threading
from typing import TYPE_CHECKING, Self

import pytest

from .programs import finish, make_file, require
from .sockets import SECONDS, read_to_end
from .ways import ways

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

SIZE = 20_000_000


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine  # type: ignore[assignment]

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        """Chunks, each as soon as the test asks for it: as `docker logs --follow` gets them."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(3):
            assert self.server.next_chunk.acquire(timeout=SECONDS)
            line = b"line %d\n" % number
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def do_PUT(self) -> None:
        """As `docker load`."""
        digest = hashlib.sha256(self.rfile.read(int(self.headers["Content-Length"]))).hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(digest)))
        self.end_headers()
        self.wfile.write(digest)

    def do_POST(self) -> None:
        """As `docker attach`: bytes both ways from the 101 on; the input's end is not the output's."""
        self.send_response(101, "UPGRADED")
        self.send_header("Connection", "Upgrade")
        self.send_header("Upgrade", "tcp")
        self.end_headers()
        self.wfile.write(b"unasked\n")
        self.wfile.flush()
        data = self.rfile.read()
        self.wfile.write(hashlib.sha256(data).hexdigest().encode() + data[::-1])
        self.close_connection = True


class Engine(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A server on a Unix socket, in threads of its own."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Handler)
        self.next_chunk = threading.Semaphore(0)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join(SECONDS)
        self.server_close()


Way = tuple[Engine, str]


@pytest.fixture(scope="module", params=["-L", "-R"])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    """The engine, and the path of the socket that leads to it."""
    directory = tmp_path_factory.mktemp("unix")
    here, there = directory / "here.sock", directory / "there.sock"
    allow = ["--allow", f"unix:{there}", "--allow-listen", f"unix:{directory}/*"]
    with (
        Engine(there) as engine,
        ways(directory, request.param, f"{here}:{there};mode=600", server_arguments=allow) as running,
    ):
        running.client.wait_for_line(rf"listening {here}.* -> unix:{there}")
        assert here.stat().st_mode & 0o777 == 0o600
        yield engine, str(here)
    assert not here.exists()


def curl(path: str, *arguments: str | Path) -> list[str]:
    return [require("curl"), "--disable", "-sSf", "-N", "--unix-socket", path, *map(str, arguments)]


def test_a_stream_of_chunks_comes_as_it_is_sent(way: Way) -> None:
    engine, path = way
    with subprocess.Popen(curl(path, "http://engine/logs?follow=1"), stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        for number in range(3):
            engine.next_chunk.release()
            assert follower.stdout.readline() == b"line %d\n" % number
        assert follower.stdout.read() == b""
    assert follower.returncode == 0


def test_an_upload(way: Way, tmp_path: Path) -> None:
    _, path = way
    image = tmp_path / "image"
    digest = make_file(image, SIZE)
    assert finish(*curl(path, "-T", image, "http://engine/image")).stdout.decode() == digest
    image.unlink()


def test_many_at_once(way: Way) -> None:
    _, path = way
    urls = [part for number in range(40) for part in ("-T", "/etc/hostname", f"http://engine/{number}")]
    done = finish(*curl(path, "--parallel", "--parallel-max", "40", *urls))
    assert len(done.stdout) == 40 * 64


def test_a_connection_that_is_taken_over_and_half_closed(way: Way) -> None:
    _, path = way
    data = os.urandom(SIZE)
    with socket.socket(socket.AF_UNIX) as attached:
        attached.settimeout(SECONDS)
        attached.connect(path)
        attached.sendall(b"POST /attach HTTP/1.1\r\nHost: engine\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        head = b""
        while not head.endswith(b"unasked\n"):
            head += attached.recv(1024)
        assert head.startswith(b"HTTP/1.1 101 UPGRADED\r\n")
        attached.sendall(data)
        attached.shutdown(socket.SHUT_WR)
        assert read_to_end(attached) == hashlib.sha256(data).hexdigest().encode() + data[::-1]
