"""`python -m wstunnel.cli.demo_relay PORT`: stands between the demo's client and its server, and breaks connections.

It forwards what comes to `PORT` of 127.0.0.1, whole until it is told otherwise. A number of bytes, as a line on stdin,
is an order: when it has forwarded so many more, both ways and all connections together, it resets every connection,
and drops what it had just read. It goes on accepting. The end of stdin ends it. On stdout it says, a line each:

    listening PORT
    cut CONNECTIONS CARRYING     so many were reset; so many of them had carried a stream's data since the order
    on SECONDS                   after the cut data flows again, on a connection that was made since
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import sys
import time
from dataclasses import dataclass

from wstunnel import sockets
from wstunnel.cli.demo_child import ORPHANED

READ_BYTES = 256 * 1024
CARRYING_BYTES = 64 * 1024
"""A connection that moved more than this carries a stream: handshakes, pings and acks are far less."""
BACKLOG = 128
_UNARMED = 1 << 62


@dataclass(frozen=True)
class Cut:
    """What became of one order.

    Attributes:
        connections: how many were reset.
        carrying: how many of them carried a stream's data.
        pause: seconds until data flowed again; None if it does not yet.
    """

    connections: int
    carrying: int
    pause: float | None


def parse_cuts(text: str) -> list[Cut]:
    """The cuts that a relay's stdout tells of, in their order. An incomplete line counts as not written."""
    cuts: list[Cut] = []
    for line in text.splitlines(keepends=True):
        if found := re.fullmatch(r"cut (\d+) (\d+)\n", line):
            cuts.append(Cut(int(found[1]), int(found[2]), None))
        elif found := re.fullmatch(r"on (\d+\.\d+)\n", line):
            cuts[-1] = Cut(cuts[-1].connections, cuts[-1].carrying, float(found[1]))
    return cuts


class _Connection:
    """Two sockets. What was read at one side and not taken by the other waits in `pending`, and reading with it."""

    __slots__ = ("closed", "ended", "masks", "moved", "pending", "sockets")

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.sockets = (client, server)
        self.pending = [b"", b""]  # by the side that it was read at, as is `ended`
        self.ended = [False, False]
        self.masks = [0, 0]
        self.moved = 0
        self.closed = False

    def wanted(self, side: int) -> int:
        """What the selector is to tell of the socket at this side."""
        read = not self.ended[side] and not self.pending[side]
        return selectors.EVENT_READ * read | selectors.EVENT_WRITE * bool(self.pending[1 - side])


class Relay:
    """All connections, in one loop. A context manager; leaving it resets what is left.

    Args:
        port: of 127.0.0.1, where connections go on to.
        orders: a descriptor to read orders from; whoever made it closes it.
    """

    def __init__(self, port: int, orders: int) -> None:
        self._server = ("127.0.0.1", port)
        self._orders = orders
        self._order = b""
        self._left = _UNARMED  # bytes until the cut
        self._cut_at: float | None = None  # monotonic; None unless data has not flowed again yet
        self._connections: set[_Connection] = set()
        self._scratch = memoryview(bytearray(READ_BYTES))
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(orders, selectors.EVENT_READ)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for connection in list(self._connections):
            self._close(connection, reset=True)
        self._selector.close()

    def run(self) -> None:
        """Forward until the orders end."""
        _say(f"listening {self._listener.getsockname()[1]}")
        while True:
            for key, mask in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj == self._orders:
                    if not self._obey(os.read(self._orders, 64)):
                        return
                else:
                    connection, side = key.data
                    self._serve(connection, side, mask)

    def _obey(self, data: bytes) -> bool:
        *complete, self._order = (self._order + data).split(b"\n")
        for order in complete:
            self._left = int(order)
            for connection in self._connections:
                connection.moved = 0
        return bool(data)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._server)  # on loopback that waits for nobody
        except OSError:
            sockets.reset(client)
            return
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(client, server)
        self._connections.add(connection)
        self._update(connection)

    def _serve(self, connection: _Connection, side: int, mask: int) -> None:
        if connection.closed:  # by an earlier event of the same batch
            return
        try:
            if mask & selectors.EVENT_WRITE:
                waiting = connection.pending[1 - side]
                connection.pending[1 - side] = waiting[_sent(connection.sockets[side], waiting) :]
            if mask & selectors.EVENT_READ:
                self._forward(connection, side)
        except OSError:
            self._close(connection, reset=True)  # what one end did, the other sees
        else:
            self._update(connection)

    def _forward(self, connection: _Connection, side: int) -> None:
        sink = connection.sockets[1 - side]
        try:
            count = connection.sockets[side].recv_into(self._scratch)
        except BlockingIOError:
            return
        if not count:
            connection.ended[side] = True
            if all(connection.ended):
                self._close(connection, reset=False)
            else:
                sink.shutdown(socket.SHUT_WR)
            return
        connection.moved += count
        self._left -= count
        if self._left <= 0:
            self._cut()
            return
        if self._cut_at is not None and connection.moved > CARRYING_BYTES:
            # Said before it is passed on: whoever has got all data finds it written.
            _say(f"on {time.monotonic() - self._cut_at:.3f}")
            self._cut_at = None
        data = self._scratch[:count]
        connection.pending[side] = bytes(data[_sent(sink, data) :])

    def _cut(self) -> None:
        self._left = _UNARMED
        carrying = sum(connection.moved > CARRYING_BYTES for connection in self._connections)
        _say(f"cut {len(self._connections)} {carrying}")
        self._cut_at = time.monotonic()
        for connection in list(self._connections):
            self._close(connection, reset=True)

    def _update(self, connection: _Connection) -> None:
        """Ask the selector for what the connection can use now."""
        if connection.closed:
            return
        for side, sock in enumerate(connection.sockets):
            mask, before = connection.wanted(side), connection.masks[side]
            connection.masks[side] = mask
            if mask == before:
                continue
            if not before:
                self._selector.register(sock, mask, (connection, side))
            elif mask:
                self._selector.modify(sock, mask, (connection, side))
            else:
                self._selector.unregister(sock)

    def _close(self, connection: _Connection, *, reset: bool) -> None:
        connection.closed = True
        self._connections.discard(connection)
        for sock, mask in zip(connection.sockets, connection.masks, strict=True):
            if mask:
                self._selector.unregister(sock)
            if reset:
                sockets.reset(sock)
            else:
                sock.close()


def _sent(sock: socket.socket, data: memoryview | bytes) -> int:
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  # the demo reads it


def main(arguments: list[str]) -> int:
    """Relay until stdin ends, which it does when the demo's process does. Returns the exit code."""
    with Relay(int(arguments[0]), sys.stdin.fileno()) as relay:
        relay.run()
    return ORPHANED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
