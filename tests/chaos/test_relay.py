"""The relay itself: it carries everything when left alone, and each fault is what its name says."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.integration.process import wait_until
from tests.integration.sockets import Listener, Refusing, chunks, pattern, read_exactly, reset

from .relay import Relay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.chaos

REPEATS = 20
"""Of a cut, to see that it is not always in the same place."""


class Line:
    """A relay, and connections through it."""

    def __init__(self, relay: Relay, listener: Listener, sockets: ExitStack) -> None:
        self.relay = relay
        self.listener = listener
        self.sockets = sockets

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of a new connection."""
        app = self.sockets.enter_context(_connect(self.relay.port))
        return app, self.sockets.enter_context(self.listener.accept())


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with Listener() as listener, Relay(listener.port, tmp_path, seed=1) as relay, ExitStack() as sockets:
        yield Line(relay, listener, sockets)


def _talk(app: socket.socket, target: socket.socket) -> None:
    for one, other in ((app, target), (target, app)):
        one.sendall(b"hello")
        assert read_exactly(other, 5) == b"hello"


def test_carries_everything_and_half_closes(line: Line) -> None:
    app, target = line.pair()
    data = pattern(50_000_000)
    sender = threading.Thread(target=app.sendall, args=(data,))
    sender.start()
    digest = hashlib.sha256(read_exactly(target, len(data))).digest()
    sender.join()
    assert digest == hashlib.sha256(data).digest()
    app.shutdown(socket.SHUT_WR)
    assert target.recv(1) == b""
    target.sendall(b"still here")
    assert read_exactly(app, 10) == b"still here"
    target.close()
    assert app.recv(1) == b""
    assert line.relay.counts().bytes == len(data) + 10
    wait_until(lambda: line.relay.counts().open == 0, "the connection to be forgotten")


def test_a_reset_goes_through(line: Line) -> None:
    app, target = line.pair()
    reset(app)
    with pytest.raises(ConnectionResetError):
        target.recv(1)


def test_rst(line: Line) -> None:
    ends = [*line.pair(), *line.pair()]
    assert line.relay.fault("rst") == 2
    for end in ends:
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    _talk(*line.pair())
    assert line.relay.counts().cut["rst"] == 2


def test_one_of_two(line: Line) -> None:
    first, second = line.pair(), line.pair()
    _talk(*first)
    _talk(*second)
    assert line.relay.fault("rst", "one") == 1
    assert line.relay.counts().open == 1


def test_fin_cuts_what_is_under_way(line: Line) -> None:
    lengths = set()
    for _ in range(REPEATS):
        app, target = line.pair()
        app.sendall(bytes(100_000))
        read_exactly(target, 100_000)
        assert line.relay.fault("fin") == 1
        app.sendall(bytes(1000))
        rest = b"".join(chunks(target))  # a FIN, not a reset
        assert len(rest) < 1000
        assert app.recv(1) == b""
        lengths.add(len(rest))
    assert len(lengths) > REPEATS // 2
    assert line.relay.counts().hits > REPEATS // 2  # all of them, unless the machine stands still


def test_fin_without_traffic(line: Line) -> None:
    ends = line.pair()
    line.relay.fault("fin")
    assert [end.recv(1) for end in ends] == [b"", b""]


def test_half_tells_one_end_first(line: Line) -> None:
    for _ in range(2):
        ends = line.pair()
        _talk(*ends)
        line.relay.fault("half", "all", 2.0)
        with ThreadPoolExecutor(2) as threads:
            first, second = sorted(threads.map(_ends_at, ends))
        assert second - first > 0.3  # unless the machine stands still meanwhile


def _ends_at(end: socket.socket) -> float:
    """When it ended, in whichever way."""
    try:
        assert end.recv(1) == b""
    except ConnectionResetError:
        pass  # that too is an end
    return time.monotonic()


def test_black_hole_spares_new_connections(line: Line) -> None:
    app, target = line.pair()
    _talk(app, target)
    assert line.relay.fault("black_hole") == 1
    app.sendall(b"lost")
    for end in (app, target):
        end.settimeout(0.5)
        with pytest.raises(TimeoutError):
            end.recv(1)
    app.close()
    with pytest.raises(TimeoutError):
        target.recv(1)
    _talk(*line.pair())


def test_freeze_loses_nothing(line: Line) -> None:
    app, target = line.pair()
    for _ in range(3):
        app.sendall(b"before")
        line.relay.fault("freeze")
        assert read_exactly(target, 6) == b"before"
    assert line.relay.counts().faults["freeze"] == 3


def test_refuse_and_outage(line: Line) -> None:
    app, target = line.pair()
    line.relay.fault("refuse", "all", 4.0)
    with pytest.raises(ConnectionRefusedError):
        _connect(line.relay.port)
    _talk(app, target)
    wait_until(lambda: _accepts(line.relay.port), "connections to be taken again")
    line.relay.fault("outage", "all", 4.0)
    with pytest.raises(ConnectionRefusedError):
        _connect(line.relay.port)
    with pytest.raises(ConnectionResetError):
        app.recv(1)
    wait_until(lambda: _accepts(line.relay.port), "connections to be taken again")


def _accepts(port: int) -> bool:
    try:
        _connect(port).close()
    except ConnectionRefusedError:
        return False
    return True


def test_nobody_upstream(tmp_path: Path) -> None:
    with (
        Refusing.bind() as nobody,
        Relay(int(nobody.address.rpartition(":")[2]), tmp_path) as relay,
        pytest.raises(ConnectionResetError),  # by connect itself, if the reset is as fast as that
        _connect(relay.port) as app,
    ):
        app.recv(1)


def test_schedule(line: Line) -> None:
    with line.relay.faults(0.02, "rst", "freeze"):
        wait_until(lambda: line.relay.counts().faults["rst"] > 5, "faults")
    before = line.relay.counts().faults
    assert {name for name, count in before.items() if count} == {"rst", "freeze"}
    app, target = line.pair()
    time.sleep(0.2)
    _talk(app, target)
    assert line.relay.counts().faults == before


def test_rate(tmp_path: Path) -> None:
    """A shaped path is never faster than it says, both directions are shaped, and little waits inside."""
    rate = 40_000
    with Listener() as listener, Relay(listener.port, tmp_path, rate=rate) as relay, ExitStack() as sockets:
        line = Line(relay, listener, sockets)
        app, target = line.pair()
        for sender, receiver in ((app, target), (target, app)):
            started = time.monotonic()
            thread = threading.Thread(target=sender.sendall, args=(bytes(rate),))
            thread.start()
            read_exactly(receiver, rate)
            assert time.monotonic() - started > 0.8
            thread.join()
