"""websocat as client of a plain endpoint, and as server at the far end of `-L PORT:ws-raw`.

No package of Debian 12 has it: `install_websocat.sh DIR` beside this file makes DIR/bin/websocat, for PATH.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from .plain import Endpoints, endpoints
from .process import Process, wait_until
from .programs import finish, require
from .sockets import LISTEN, SECONDS, Listener, local_states, read_exactly, read_to_end, reset, unused_port
from .tunnel import Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(180)]

SIZE = 3_000_000
BINARY = ["--binary", "--protocol", "binary"]


@pytest.fixture(scope="module")
def websocat() -> str:
    return require("websocat")


@pytest.fixture(scope="module")
def served(websocat: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    with endpoints(tmp_path_factory.mktemp("server")) as running:
        yield running
        assert running.token not in running.server.stderr


def client(websocat: str, served: Endpoints, path: str, *addresses: str) -> list[str]:
    """The how-to page's command line; `addresses` are what it copies from, in place of its input and output."""
    return [websocat, *BINARY, f"--header=Authorization: Bearer {served.token}", *addresses, served.url(path)]


def both_ways(application: socket.socket, target: socket.socket) -> None:
    """Megabytes up, then down."""
    for sender, receiver in ((application, target), (target, application)):
        data = os.urandom(SIZE)
        thread = threading.Thread(target=sender.sendall, args=(data,))
        thread.start()
        assert read_exactly(receiver, SIZE) == data
        thread.join()


class TestClient:
    def test_standard_input_and_output_and_their_end(self, websocat: str, served: Endpoints) -> None:
        command = client(websocat, served, "/listener")
        with (
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running,
            served.listener.accept() as target,
        ):
            assert running.stdin and running.stdout
            target.settimeout(SECONDS)
            target.sendall(b"unasked")
            assert running.stdout.read(7) == b"unasked"
            up, down = os.urandom(SIZE), os.urandom(SIZE)
            thread = threading.Thread(target=target.sendall, args=(down,))
            thread.start()
            assert running.stdout.read(SIZE) == down
            thread.join()
            thread = threading.Thread(target=_write_and_close, args=(running, up))
            thread.start()
            # A WebSocket has no half-close: its input's end is a Close 1000, after everything.
            assert read_to_end(target) == up
            thread.join()
            assert running.wait(SECONDS) == 0
        served.server.wait_for_line('endpoint ended .*reason=finished detail="closed by the client')

    def test_the_targets_end(self, websocat: str, served: Endpoints) -> None:
        # Without the flag it would wait for the end of its input, too.
        command = [*client(websocat, served, "/listener"), "--exit-on-eof"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
            assert running.stdout
            data = os.urandom(SIZE)
            with served.listener.accept() as target:
                target.sendall(data)
            assert running.stdout.read() == data
            assert running.wait(SECONDS) == 0
        served.server.wait_for_line('endpoint ended .*reason=finished detail="closed by the target')

    def test_a_port_of_its_own(self, websocat: str, served: Endpoints, tmp_path: Path) -> None:
        """As on the how-to page: each connection to it is a WebSocket of its own."""
        port = unused_port()
        command = client(websocat, served, "/listener", f"tcp-l:127.0.0.1:{port}")
        with running(command, port, tmp_path):
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as application:
                    with served.listener.accept() as target:
                        both_ways(application, target)
                    assert application.recv(1) == b""

    def test_refusals(self, websocat: str, served: Endpoints) -> None:
        command = client(websocat, served, "/refusing")
        assert b"502 Bad Gateway" in finish(*command, expect=1).stderr
        command = [part.replace(served.token, "x" * 43) for part in client(websocat, served, "/listener")]
        assert b"401 Unauthorized" in finish(*command, expect=1).stderr


@contextmanager
def running(command: list[str], port: int, directory: Path) -> Iterator[None]:
    """websocat, once it listens."""
    with Process("websocat", command, directory=directory, exit_codes=(0, -15)) as process:
        # Not by connecting: it would go on to its target for that.
        wait_until(lambda: not process.running or LISTEN in local_states(port), "websocat to listen")
        assert process.running, process.tail()
        yield


def _write_and_close(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin
    with process.stdin as pipe:
        pipe.write(data)


class TestServer:
    @pytest.fixture
    def listener(self) -> Iterator[Listener]:
        with Listener() as made:
            yield made

    @pytest.fixture
    def forward(self, websocat: str, listener: Listener, tmp_path: Path) -> Iterator[tuple[Client, int]]:
        """A client whose forward leads through websocat to the listener, and the forward's port."""
        port = unused_port()
        command = [websocat, "--binary", f"ws-l:127.0.0.1:{port}", f"tcp:{listener.address}"]
        with (
            running(command, port, tmp_path),
            Client(tmp_path, f"ws://127.0.0.1:{port}/", [], arguments=["-L", "0:ws-raw"]) as made,
        ):
            yield made, int(made.wait_for_line(r"listening 127\.0\.0\.1:(\d+) -> ws-raw")[1])

    def test_both_ways_and_the_targets_end(self, forward: tuple[Client, int], listener: Listener) -> None:
        with socket.create_connection(("127.0.0.1", forward[1]), timeout=SECONDS) as application:
            with listener.accept() as target:
                both_ways(application, target)
            assert application.recv(1) == b""
        forward[0].wait_for_line(rf"raw connection ended .*sent={SIZE} received={SIZE} .*reason=finished")

    def test_the_applications_end(self, forward: tuple[Client, int], listener: Listener) -> None:
        with listener_pair(forward[1], listener) as (application, target):
            data = os.urandom(SIZE)
            thread = threading.Thread(target=lambda: (application.sendall(data), application.shutdown(socket.SHUT_WR)))
            thread.start()
            assert read_to_end(target) == data
            thread.join()

    def test_the_targets_reset(self, forward: tuple[Client, int], listener: Listener) -> None:
        """Whatever websocat makes of it, the tunnel's client goes on."""
        with socket.create_connection(("127.0.0.1", forward[1]), timeout=SECONDS) as application:
            reset(listener.accept())
            try:
                assert application.recv(1) == b""
            except ConnectionResetError:
                pass  # the truth
        with listener_pair(forward[1], listener) as (application, target):
            both_ways(application, target)


@contextmanager
def listener_pair(port: int, listener: Listener) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as application, listener.accept() as target:
        yield application, target
