"""Plain blocking sockets for both ends of a tunnelled stream: the application's and the target's."""

from __future__ import annotations

import hashlib
import selectors
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.ports import unused_port  # noqa: F401  # others take it from here with their sockets

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 60.0
"""For any one blocking call, before the test fails."""


class Listener:
    """A target: listens on a free port of 127.0.0.1. Accepts when the test says so, not before."""

    def __init__(self, backlog: int = 512) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self._socket.settimeout(SECONDS)
        self.port: int = self._socket.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def accept(self) -> socket.socket:
        connection, _ = self._socket.accept()
        connection.settimeout(SECONDS)
        return connection

    def drain(self) -> None:
        """Close every connection that nobody accepted: a test that failed may leave some."""
        self._socket.setblocking(False)
        try:
            while True:
                self._socket.accept()[0].close()
        except BlockingIOError:
            self._socket.settimeout(SECONDS)


class Echo:
    """A target that answers every byte with itself and a FIN with a FIN, any number of connections, in one thread."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="echo")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.close()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        """A direct connection."""
        host, _, port = self.address.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=SECONDS)

    def _run(self) -> None:
        connections: set[socket.socket] = set()
        with self._listener, self._woken, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    connection = key.fileobj
                    assert isinstance(connection, socket.socket)
                    if connection is self._woken:
                        for one in connections:
                            one.close()
                        return
                    if connection is self._listener:
                        accepted, _ = connection.accept()
                        accepted.settimeout(SECONDS)
                        connections.add(accepted)
                        selector.register(accepted, selectors.EVENT_READ)
                    elif not self._answer(connection):
                        selector.unregister(connection)
                        connections.remove(connection)
                        connection.close()

    @staticmethod
    def _answer(connection: socket.socket) -> bool:
        """Whether the connection goes on."""
        try:
            data = connection.recv(65536)
            connection.sendall(data)
        except OSError:
            return False
        return bool(data)


@dataclass
class Refusing:
    """An address that refuses connections, and goes on doing so: bound, never listening."""

    address: str
    _socket: socket.socket

    @classmethod
    def bind(cls) -> Refusing:
        bound = socket.socket()
        bound.bind(("127.0.0.1", 0))
        return cls(f"127.0.0.1:{bound.getsockname()[1]}", bound)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


LISTEN, CLOSE_WAIT = "0A", "08"
"""States of TCP as proc(5) writes them (include/net/tcp_states.h)."""


def local_states(port: int) -> set[str]:
    """The states of the sockets that have this port of 127.0.0.1: to see what listens without connecting to it."""
    return _states(1, port)


def remote_states(port: int) -> set[str]:
    """The states of the sockets that are connected to this port of 127.0.0.1."""
    return _states(2, port)


def _states(column: int, port: int) -> set[str]:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
    return {row[3] for row in rows if row[column] == f"0100007F:{port:04X}"}


def pattern(size: int, seed: int = 0) -> bytes:
    """`size` bytes in which each place can be told from every other, so that a shift or a repeat shows."""
    block = b"".join(hashlib.sha256(struct.pack("!II", seed, index)).digest() for index in range(2048))
    whole, rest = divmod(size, len(block))
    return b"".join(struct.pack("!I", turn) + block[4:] for turn in range(whole)) + block[:rest]


def read_exactly(connection: socket.socket, size: int) -> bytes:
    """Raises AssertionError if the stream ends before `size` bytes."""
    parts = []
    missing = size
    while missing:
        data = connection.recv(min(missing, 1 << 18))
        assert data, f"the stream ended {missing} of {size} bytes early"
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def chunks(connection: socket.socket) -> Iterator[bytes]:
    """What comes, up to a clean end. A reset raises ConnectionResetError."""
    while data := connection.recv(1 << 18):
        yield data


def read_to_end(connection: socket.socket) -> bytes:
    """Everything up to a clean end. A reset raises ConnectionResetError."""
    return b"".join(chunks(connection))


def read_until_over(connection: socket.socket) -> bytes:
    """Everything up to the end, clean or by reset."""
    parts = []
    try:
        while data := connection.recv(1 << 18):
            parts.append(data)
    except ConnectionResetError:
        pass  # the caller asked for the bytes before it
    return b"".join(parts)


def reset(connection: socket.socket) -> None:
    """Close with RST, as a program that crashed or a socket with SO_LINGER 0 does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def send_until_blocked(connection: socket.socket, data: bytes, *, at_most: int, quiet: float = 1.5) -> int:
    """Send `data` over and over until nothing has been taken for `quiet` seconds.

    Returns:
        the bytes taken.

    Raises:
        AssertionError: `at_most` bytes were taken and it still was not blocked.
    """
    sent = 0
    timeout = connection.gettimeout()
    connection.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_WRITE)
        while selector.select(quiet):
            sent += connection.send(data[sent % len(data) :])
            assert sent <= at_most, f"{sent} bytes were taken though nobody reads"
    connection.settimeout(timeout)
    return sent
