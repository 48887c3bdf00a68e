"""websockify's server at the far end of `-L PORT:ws-raw`."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from .process import Process, wait_until
from .programs import accepts, install
from .sockets import Listener, read_exactly, read_to_end, reset, unused_port
from .tunnel import COMMAND, Client, environment

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

WEBSOCKIFY = "websockify==0.13.0"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where websockify is, without what its tokens and numpy need."""
    tree = tmp_path_factory.mktemp("websockify")
    install(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tree, WEBSOCKIFY)
    return tree


@contextmanager
def websockify(package: Path, directory: Path, *arguments: str) -> Iterator[int]:
    """A server; `arguments` begin with where it leads to, unless tokens say that. Yields its port."""
    port = unused_port()
    argv = [sys.executable, "-m", "websockify", f"127.0.0.1:{port}", *arguments]
    env = environment(directory, PYTHONPATH=str(package))
    with Process("websockify", argv, directory=directory, env=env, exit_codes=(0, 1, -15)) as process:
        wait_until(lambda: not process.running or accepts(port), "websockify to listen")
        assert process.running, process.tail()
        yield port


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as made:
        yield made


@pytest.fixture
def client(package: Path, tmp_path: Path, listener: Listener) -> Iterator[Client]:
    """One with a forward to a websockify that leads to the listener."""
    with websockify(package, tmp_path, listener.address) as port:
        url = f"ws://127.0.0.1:{port}/websockify"
        with Client(tmp_path, url, [], arguments=["-L", "0:ws-raw"]) as running:
            yield running


def _connect(client: Client) -> socket.socket:
    import socket

    port = int(client.wait_for_line(r"listening 127\.0\.0\.1:(\d+) -> ws-raw")[1])
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def test_bytes_both_ways_and_the_targets_end(client: Client, listener: Listener) -> None:
    up, down = os.urandom(3_000_000), os.urandom(3_000_000)
    with _connect(client) as application, listener.accept() as target:
        sender = threading.Thread(target=application.sendall, args=(up,))
        sender.start()
        assert read_exactly(target, len(up)) == up
        sender.join()
        sender = threading.Thread(target=lambda: (target.sendall(down), target.close()))
        sender.start()
        assert read_to_end(application) == down
        sender.join()
    client.wait_for_line('raw connection ended .*sent=3000000 received=3000000.*detail="closed by the server: 1000')


def test_the_applications_end(client: Client, listener: Listener) -> None:
    with _connect(client) as application, listener.accept() as target:
        application.sendall(b"last words")
        application.close()
        assert read_to_end(target) == b"last words"
    client.wait_for_line('raw connection ended .*detail="closed by the application')


def test_the_targets_reset_is_none_of_the_tunnels_ends(client: Client, listener: Listener) -> None:
    """websockify takes a reset for an exception of its own: what its client sees must not be a clean end."""
    with _connect(client) as application, listener.accept() as target:
        target.sendall(b"some")
        assert read_exactly(application, 4) == b"some"
        reset(target)
        with pytest.raises(ConnectionResetError):
            read_to_end(application)
    client.wait_for_line("raw connection ended .*reason=lost")


def test_a_target_that_refuses(package: Path, tmp_path: Path) -> None:
    """websockify says so only after the upgrade, with a Close 1011."""
    with (
        websockify(package, tmp_path, f"127.0.0.1:{unused_port()}") as port,
        Client(tmp_path, f"ws://127.0.0.1:{port}/", [], arguments=["-L", "0:ws-raw"]) as client,
        _connect(client) as application,
        pytest.raises(ConnectionResetError),
    ):
        read_to_end(application)
    assert "closed by the server: 1011 Failed to connect to downstream server" in client.stderr


@pytest.mark.parametrize("known", [True, False])
def test_a_target_by_token_with_a_password(package: Path, tmp_path: Path, listener: Listener, known: bool) -> None:
    """Both as websockify wants them: the token in the query, and Basic authentication."""
    (tmp_path / "tokens").write_text(f"db: {listener.address}\n")
    flags = ["--token-plugin", "TokenFile", "--token-source", str(tmp_path / "tokens")]
    flags += ["--auth-plugin", "BasicHTTPAuth", "--auth-source", "ann:hunter22"]
    basic = base64.b64encode(b"ann:hunter22" if known else b"ann:wrong").decode()
    forward = ["-L", "0:ws-raw", "--header", f"Authorization: Basic {basic}"]
    with (
        websockify(package, tmp_path, *flags) as port,
        Client(tmp_path, f"ws://127.0.0.1:{port}/?token=db", [], arguments=forward) as client,
        _connect(client) as application,
    ):
        if known:
            with listener.accept() as target:
                target.sendall(b"let in")
                assert read_exactly(application, 6) == b"let in"
        else:
            with pytest.raises(ConnectionResetError):
                read_to_end(application)
            client.wait_for_line("connection reset: the endpoint was not reached.*40[13]")
        assert "token=db" not in client.stderr
        assert basic not in client.stderr


def test_a_forward_to_the_tunnel_needs_a_token(tmp_path: Path) -> None:
    env = environment(tmp_path, WSTUNNEL_URL="ws://127.0.0.1:1/")
    command = [*COMMAND, "client", "-L", "0:ws-raw", "-L", "0:127.0.0.1:1"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "no token" in done.stderr
