"""What runs through the tunnel while it is cut: both ends of every stream, comparing all that passes.

A workload goes on until it is told that it had enough, then ends every stream in order. It fails on the first byte that
is missing, doubled or out of place, on an end that comes early, and on any reset.
"""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, Self

from tests.integration.sockets import chunks, read_exactly

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.integration.sockets import Listener

WAIT_SECONDS = 60.0
"""For any one blocking call. The longest pause that the tunnel may make: a black hole, 9 s; refused dials and their
back-off after it; and all of it once more, on a busy machine."""
PIECE_BYTES = 200_000
AT_ONCE = 50
SMALL_BYTES = 60_000
PACE_SECONDS = 0.002
"""Between two messages of a dialogue: many are still to come when the next cut does."""
REQUEST = struct.Struct("!IIQ")


class Enough(Protocol):
    """Tells a workload that it may end: `threading.Event`."""

    def is_set(self) -> bool: ...


class Place:
    """Where streams are made: an application connects, its target is accepted. Closes every socket with the context."""

    def __init__(self, port: int, listener: Listener) -> None:
        self._port = port
        self._listener = listener
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for sock in self._sockets:
            sock.close()

    def connect(self) -> socket.socket:
        """An application's new connection."""
        return self._kept(socket.create_connection(("127.0.0.1", self._port), timeout=WAIT_SECONDS))

    def accept(self) -> socket.socket:
        """The target's end of the oldest stream that was not accepted yet.

        Waits for it without end: it is the application at the other end that gives up.

        Raises:
            ConnectionAbortedError: `end` was called.
        """
        while not self._over:
            try:
                return self._kept(self._listener.accept())
            except TimeoutError:
                continue
        raise ConnectionAbortedError("another part of the workload has failed")

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of one new stream, when no other is being made."""
        app = self.connect()
        return app, self.accept()

    def end(self) -> None:
        """Wake everybody who waits on a socket: one of them has failed, the others need not go on."""
        with self._lock:
            self._over = True
            for sock in self._sockets:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it is closed or was never connected
        socket.create_connection(("127.0.0.1", self._listener.port), timeout=WAIT_SECONDS).close()  # wakes `accept`

    def forget(self, sock: socket.socket) -> None:
        """Close one that is done with."""
        with self._lock:
            self._sockets.remove(sock)
            sock.close()

    def _kept(self, sock: socket.socket) -> socket.socket:
        sock.settimeout(WAIT_SECONDS)
        with self._lock:
            self._sockets.append(sock)
            if self._over:
                sock.close()
                raise ConnectionAbortedError("another part of the workload has failed")
        return sock


@dataclass(frozen=True)
class Sum:
    """What one side sent or received in one direction."""

    size: int
    digest: str


class Source:
    """Endless random bytes in pieces of random sizes, the same for the same seed."""

    def __init__(self, seed: object) -> None:
        self._random = random.Random(repr(seed))
        self._block = self._random.randbytes(1 << 20)
        self._hash = hashlib.sha256()
        self._size = 0

    def piece(self, most: int = PIECE_BYTES) -> bytes:
        """The next one."""
        start = self._random.randrange(len(self._block) - most)
        # Few large, many small: a piece's size is drawn evenly on a logarithmic scale.
        piece = self._block[start : start + max(1, int(most ** self._random.random()))]
        self._hash.update(piece)
        self._size += len(piece)
        return piece

    def sum(self) -> Sum:
        """Of all pieces so far."""
        return Sum(self._size, self._hash.hexdigest())


def together(place: Place, *parts: Callable[[], object]) -> list[object]:
    """Run these at once, each in a thread, and wait for all. The first that fails ends the others and is raised."""
    failures: list[BaseException] = []

    def guarded(part: Callable[[], object]) -> object:
        try:
            return part()
        except BaseException as error:
            failures.append(error)
            place.end()
            raise

    with ThreadPoolExecutor(len(parts)) as threads:
        running = [threads.submit(guarded, part) for part in parts]
    if failures:
        raise failures[0]
    return [one.result() for one in running]


def send_until(sock: socket.socket, seed: object, enough: Enough) -> Sum:
    """Send pieces until it is enough, then end this direction."""
    source = Source(seed)
    while not enough.is_set():
        sock.sendall(source.piece())
    sock.shutdown(socket.SHUT_WR)
    return source.sum()


def receive(sock: socket.socket) -> Sum:
    """Everything up to a clean end."""
    digest, size = hashlib.sha256(), 0
    for data in chunks(sock):
        digest.update(data)
        size += len(data)
    return Sum(size, digest.hexdigest())


def echo(sock: socket.socket) -> Sum:
    """Send back whatever comes, and the end after all of it."""
    digest, size = hashlib.sha256(), 0
    for data in chunks(sock):
        sock.sendall(data)
        digest.update(data)
        size += len(data)
    sock.shutdown(socket.SHUT_WR)
    return Sum(size, digest.hexdigest())


def _nothing(sock: socket.socket) -> Sum:
    """End this direction at once."""
    sock.shutdown(socket.SHUT_WR)
    return Source(0).sum()


# --- the workloads --------------------------------------------------------------------------------------------------


def bulk_up(place: Place, seed: int, enough: Enough) -> None:
    """The application sends, the target reads."""
    app, target = place.pair()
    sent, nothing, received, back = together(
        place,
        lambda: send_until(app, seed, enough),
        lambda: _nothing(target),
        lambda: receive(target),
        lambda: receive(app),
    )
    assert received == sent
    assert back == nothing


def bulk_down(place: Place, seed: int, enough: Enough) -> None:
    """The target sends, the application reads."""
    app, target = place.pair()
    sent, received = together(place, lambda: send_until(target, seed, enough), lambda: receive(app))
    app.shutdown(socket.SHUT_WR)
    assert receive(target).size == 0
    assert received == sent


def echo_both_ways(place: Place, seed: int, enough: Enough) -> None:
    """The target echoes one stream at full speed; beside it the application echoes a slow dialogue."""
    app, target = place.pair()
    other_app, other_target = place.pair()
    sent, echoed, received, *_ = together(
        place,
        lambda: send_until(app, seed, enough),
        lambda: echo(target),
        lambda: receive(app),
        lambda: _dialogue(other_target, seed, enough),
        lambda: echo(other_app),
    )
    assert echoed == sent
    assert received == sent


def _dialogue(sock: socket.socket, seed: int, enough: Enough) -> None:
    """A message at a time, each answered before the next: nothing follows that would show that one was lost."""
    source = Source(("dialogue", seed))
    while not enough.is_set():
        piece = source.piece(2000)
        sock.sendall(piece)
        assert read_exactly(sock, len(piece)) == piece
        time.sleep(PACE_SECONDS)
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b"", "more than was sent"


def many_small(place: Place, seed: int, enough: Enough) -> None:
    """Fifty at a time, many in a row: a request and its end, then the reply and its end."""
    done = threading.Event()
    asked = Tally()
    answered = Tally()

    def accept() -> None:
        with ThreadPoolExecutor(AT_ONCE * 2) as threads:
            running = []
            while True:
                target = place.accept()
                if done.is_set():  # the last one only wakes us
                    break
                running.append(threads.submit(_answer, place, target, answered))
            for one in running:
                one.result()

    def ask_all() -> None:
        together(place, *(partial(_ask_many, place, (seed, index), enough, asked) for index in range(AT_ONCE)))
        done.set()
        place.connect()

    together(place, accept, ask_all)
    assert asked.count >= AT_ONCE
    assert answered.count == asked.count, "a target saw another number of streams than were opened"


class Tally:
    """A count that threads add to."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.count += 1


def _ask_many(place: Place, seed: object, enough: Enough, asked: Tally) -> None:
    chance = random.Random(repr(seed))
    while not enough.is_set():
        size, reply_size, number = (
            chance.randrange(SMALL_BYTES),
            chance.randrange(SMALL_BYTES),
            chance.getrandbits(64),
        )
        app = place.connect()
        app.sendall(REQUEST.pack(size, reply_size, number))
        app.sendall(_content(number, size))
        app.shutdown(socket.SHUT_WR)
        reply = b"".join(chunks(app))
        assert len(reply) == reply_size, f"a reply of {len(reply)} bytes, not {reply_size}"
        assert reply == _content(number + 1, reply_size)
        place.forget(app)
        asked.add()


def _answer(place: Place, target: socket.socket, answered: Tally) -> None:
    size, reply_size, number = REQUEST.unpack(read_exactly(target, REQUEST.size))
    content = b"".join(chunks(target))
    assert len(content) == size, f"a request of {len(content)} bytes, not {size}"
    assert content == _content(number, size)
    target.sendall(_content(number + 1, reply_size))
    answered.add()
    place.forget(target)


def _content(number: int, size: int) -> bytes:
    return random.Random(number).randbytes(size)


def half_closed(place: Place, seed: int, enough: Enough) -> None:
    """On one stream the application ends first and the target sends on for long; on another the other way round."""
    app, target = place.pair()
    together(
        place,
        lambda: _half_closed(place, app, target, (seed, "down"), enough),
        lambda: _half_closed(place, *reversed(place.pair()), (seed, "up"), enough),
    )


def _half_closed(place: Place, early: socket.socket, late: socket.socket, seed: object, enough: Enough) -> None:
    """`early` says something and ends; `late` hears the end, and only then begins."""
    source = Source((seed, "early"))
    for _ in range(20):
        early.sendall(source.piece())
    early.shutdown(socket.SHUT_WR)
    assert receive(late) == source.sum()
    sent, received = together(place, lambda: send_until(late, seed, enough), lambda: receive(early))
    assert received == sent


WORKLOADS = (bulk_up, bulk_down, echo_both_ways, many_small, half_closed)
