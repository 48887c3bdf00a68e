"""The demo's relay: what it forwards, and what it cuts."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.cli.conftest import Program
from wstunnel.cli import demo_relay
from wstunnel.cli.demo_relay import CARRYING_BYTES, Cut, Relay, parse_cuts
from wstunnel.cli.demo_target import receive_exactly

Said = Callable[[], str]
MUCH = CARRYING_BYTES + 1


class Standing:
    """A relay in a thread of its own, in front of a listener that the test accepts from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said: queue.Queue[str] = queue.Queue()
        monkeypatch.setattr(demo_relay, "_say", said.put)
        self.said: Said = lambda: said.get(timeout=30)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(10)
        orders, self._orders = os.pipe()
        self._thread = threading.Thread(target=self._run, args=(orders,), daemon=True)
        self._thread.start()
        word, port = self.said().split()
        assert word == "listening"
        self.port = int(port)
        self._sockets: list[socket.socket] = [self.server]

    def _run(self, orders: int) -> None:
        with Relay(self.server.getsockname()[1], orders) as relay:
            relay.run()
        os.close(orders)

    def order(self, text: str) -> None:
        os.write(self._orders, text.encode())

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A connection through the relay: the client's end and the server's."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        self._sockets.append(client)
        server, _ = self.server.accept()
        server.settimeout(10)
        self._sockets.append(server)
        return client, server

    def end(self) -> None:
        os.close(self._orders)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standing]:
    relay = Standing(monkeypatch)
    yield relay
    if relay._thread.is_alive():
        relay.end()
    relay.close()


def is_reset(sock: socket.socket) -> bool:
    """Whether a connection ends in a reset, and not in an EOF."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


def obeyed(standing: Standing, sock: socket.socket, peer: socket.socket) -> None:
    """Orders are read before what comes behind them on a connection only if they are seen in one batch: wait."""
    sock.sendall(b"!")
    receive_exactly(peer, 1)
    sock.sendall(b"!")
    receive_exactly(peer, 1)


def test_forwards_both_ways_and_each_end_by_itself(standing: Standing) -> None:
    client, server = standing.connect()
    client.sendall(b"hello")
    assert receive_exactly(server, 5) == b"hello"
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    server.sendall(b"still here")
    assert receive_exactly(client, 10) == b"still here"
    server.close()
    assert client.recv(1) == b""


def test_a_reader_that_waits_loses_nothing(standing: Standing) -> None:
    """More than all buffers on the way hold, so it must wait, too."""
    client, server = standing.connect()
    payload = os.urandom(1 << 20) * 32
    sender = threading.Thread(target=client.sendall, args=(payload,), daemon=True)
    sender.start()
    other, other_server = standing.connect()  # which is not held up
    other.sendall(b"x")
    assert receive_exactly(other_server, 1) == b"x"
    assert receive_exactly(server, len(payload)) == payload
    sender.join(10)
    assert not sender.is_alive()


@pytest.mark.parametrize("side", [0, 1])
def test_a_reset_goes_through(standing: Standing, side: int) -> None:
    ends = standing.connect()
    ends[side].sendall(b"x")
    receive_exactly(ends[1 - side], 1)
    demo_relay.sockets.reset(ends[side])
    assert is_reset(ends[1 - side])


def test_a_server_that_is_away_is_a_reset(standing: Standing) -> None:
    standing.server.close()
    address = ("127.0.0.1", standing.port)
    # The reset may come before connect() has returned, or after.
    with pytest.raises(ConnectionResetError), socket.create_connection(address, timeout=30) as client:
        client.recv(1)


def test_a_cut_resets_all_and_is_told(standing: Standing) -> None:
    pairs = [standing.connect() for _ in range(3)]
    client, server = pairs[0]
    client.sendall(bytes(2 * MUCH))  # before the order: counts for nothing
    receive_exactly(server, 2 * MUCH)
    standing.order(f"{2 * MUCH}\n")
    obeyed(standing, client, server)
    pairs[1][0].sendall(b"x")
    receive_exactly(pairs[1][1], 1)
    server.sendall(bytes(2 * MUCH))
    assert standing.said() == "cut 3 1"
    for pair in pairs:
        assert is_reset(pair[0])
        assert is_reset(pair[1])


def test_an_idle_connection_carries_nothing(standing: Standing) -> None:
    client, server = standing.connect()
    standing.order("1000\n")
    obeyed(standing, client, server)
    client.sendall(bytes(1000))
    assert standing.said() == "cut 1 0"


def test_what_flows_again_is_told_once(standing: Standing) -> None:
    client, server = standing.connect()
    standing.order("10\n")
    obeyed(standing, client, server)
    client.sendall(bytes(10))
    assert standing.said() == "cut 1 0"
    for _ in range(2):
        client, server = standing.connect()
        client.sendall(bytes(MUCH))
        receive_exactly(server, MUCH)
    word, seconds = standing.said().split()
    assert word == "on"
    assert 0 <= float(seconds) < 60
    standing.order("10\n")  # the next order finds it ready
    obeyed(standing, client, server)
    client.sendall(bytes(10))
    assert standing.said() == "cut 2 0"


def test_an_order_in_pieces(standing: Standing) -> None:
    client, server = standing.connect()
    standing.order("1")
    obeyed(standing, client, server)
    standing.order("0\n")
    obeyed(standing, client, server)
    client.sendall(bytes(10))
    assert standing.said() == "cut 1 0"


def test_it_ends_with_its_orders(standing: Standing) -> None:
    client, server = standing.connect()
    standing.end()
    assert is_reset(client)
    assert is_reset(server)


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("", []),
        ("listening 4711\n", []),
        ("listening 4711\ncut 14 1", []),
        ("listening 4711\ncut 14 1\n", [Cut(14, 1, None)]),
        ("cut 14 1\non 0.2", [Cut(14, 1, None)]),
        ("cut 14 1\non 0.213\n", [Cut(14, 1, 0.213)]),
        ("cut 14 1\non 0.213\ncut 13 0\n", [Cut(14, 1, 0.213), Cut(13, 0, None)]),
    ],
)
def test_parse_cuts(text: str, cuts: list[Cut]) -> None:
    assert parse_cuts(text) == cuts


def test_the_program_prints_its_port_and_ends_with_its_stdin(program: Program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = program("-m", "wstunnel.cli.demo_relay", str(server.getsockname()[1]), stdin=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdin is not None
        word, port = process.stdout.readline().split()
        assert word == "listening"
        with socket.create_connection(("127.0.0.1", int(port)), timeout=30) as client:
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"x")
                assert receive_exactly(accepted, 1) == b"x"
        process.stdin.close()
        assert process.wait(30) == 1
