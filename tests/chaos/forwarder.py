"""The relay's own process: forwards TCP and breaks it on purpose. Started by `relay.Relay`; needs nothing but Python.

    python forwarder.py --upstream PORT [--seed N] [--rate BYTES]

It says `forwarding PORT control PORT` on stderr once both accept. The control port speaks lines, each answered by one:

    fault KIND [all|one|busy] [SECONDS]     do it now; answered with the number of connections it hit
    every SECONDS PATIENCE all|any KIND…    faults of these kinds in random order, SECONDS apart in the mean, each up
                                            to PATIENCE seconds later if data does not flow, on all connections, or on
                                            all as often as on one
    calm                                    no more of that
    counts                                  what happened so far, as JSON
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import selectors
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

READ_BYTES = 256 * 1024
SHAPED_BUFFER_BYTES = 4096
"""Kernel buffers on a shaped path, which the kernel doubles: what waits must wait at its sender, not in here."""
SHAPED_READ_BYTES = 1460
TICK_SECONDS = 0.02
"""How often a shaped path gets its next bytes, and how closely deadlines are kept."""
BUSY_BYTES = 8192
"""A connection counts as busy only beyond this: less is its own TLS and HTTP handshake."""
BUSY_SECONDS = 0.5
"""... and only when its last byte is no older."""
PATIENCE_STEP_SECONDS = 0.1
"""How often a fault that waits for data to flow looks again."""
TEAR_SECONDS = 0.2
"""`fin` waits this long for a read to cut in two."""
LINGER_SECONDS = 1.0
"""After our FIN: what still arrives is read and dropped, since closing with unread input would send a reset."""
BLACK_HOLE_SECONDS = 90.0
"""Then both ends of a black hole are reset: the tunnel should have noticed long before."""
FREEZE_SECONDS = 0.2
HALF_SECONDS = (1.0, 3.0)
REFUSE_SECONDS = (0.3, 2.0)

CUTS = ("rst", "fin", "half", "black_hole", "outage")
"""Kinds that end connections. `outage` resets them and refuses new ones for a while."""
KINDS = (*CUTS, "freeze", "refuse")
SCOPES = {"all": ("all",), "any": ("all", "all", "busy", "one")}

OPEN, CONNECTING, TEARING, STALLED, LINGERING, CLOSED = range(6)
NO_LINGER = struct.pack("ii", 1, 0)


class Way:
    """One direction of a connection."""

    __slots__ = ("ended", "index", "pending", "sink", "source")

    def __init__(self, index: int, source: socket.socket, sink: socket.socket) -> None:
        self.index = index  # 0 is towards the upstream
        self.source = source
        self.sink = sink
        self.pending = b""
        self.ended = False


class Connection:
    """Two sockets, and what has not been written yet to either."""

    __slots__ = ("last", "masks", "moved", "sockets", "starved", "state", "ways")

    def __init__(self, client: socket.socket, upstream: socket.socket) -> None:
        self.sockets = (client, upstream)
        self.ways = (Way(0, client, upstream), Way(1, upstream, client))
        self.masks = [0, 0]
        self.state = CONNECTING
        self.moved = 0
        self.last = 0.0
        self.starved = False

    def is_busy(self, now: float) -> bool:
        return self.moved > BUSY_BYTES and now - self.last < BUSY_SECONDS


class Forwarder:
    """All connections, in one loop."""

    def __init__(self, upstream: int, *, seed: int, rate: int | None) -> None:
        self._upstream = ("127.0.0.1", upstream)
        self._random = random.Random(seed)
        self._rate = rate
        self._tokens = [0.0, 0.0]
        self._selector = selectors.DefaultSelector()
        self._connections: dict[Connection, None] = {}  # in order of arrival, so that a seed means the same each time
        self._scratch = memoryview(bytearray(READ_BYTES))
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serials = itertools.count()
        self._schedule = 0
        self._lines: dict[socket.socket, bytes] = {}
        self.counts: dict[str, int] = {"accepted": 0, "refused": 0, "bytes": 0, "hits": 0}
        self.faults = dict.fromkeys(KINDS, 0)
        self.cut = dict.fromkeys(CUTS, 0)
        # Bound and never listening: keeps the port ours while `refuse` has the listener closed.
        self._holder = _bound(0)
        self.port: int = self._holder.getsockname()[1]
        self._listener: socket.socket | None = None
        self._listen()
        control = _bound(0)
        control.listen()
        self.control_port: int = control.getsockname()[1]
        self._selector.register(control, selectors.EVENT_READ, self._on_control)

    # --- the loop

    def run(self) -> None:
        """Forward until the process is ended."""
        refilled = time.monotonic()
        while True:
            timeout = None
            if self._timers:
                timeout = max(0.0, self._timers[0][0] - time.monotonic())
            if self._rate is not None and any(connection.starved for connection in self._connections):
                timeout = TICK_SECONDS if timeout is None else min(timeout, TICK_SECONDS)
            events = self._selector.select(timeout)
            now = time.monotonic()
            if self._rate is not None and now - refilled >= TICK_SECONDS:
                self._refill(now - refilled)
                refilled = now
            for key, mask in events:
                key.data(key.fileobj, mask)
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._serials), action))

    def _refill(self, seconds: float) -> None:
        assert self._rate is not None
        most = max(self._rate * 5 * TICK_SECONDS, SHAPED_READ_BYTES)
        self._tokens = [min(most, tokens + self._rate * seconds) for tokens in self._tokens]
        starved = [connection for connection in self._connections if connection.starved]
        self._random.shuffle(starved)  # else the oldest would take it all
        for connection in starved:
            connection.starved = False
            self._update(connection)

    # --- connections

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = _bound(self.port)
            if self._rate is not None:
                _shape(self._listener)
            self._listener.listen(1024)
            self._selector.register(self._listener, selectors.EVENT_READ, self._on_accept)

    def _on_accept(self, listener: socket.socket, _: int) -> None:
        try:
            client, _address = listener.accept()
        except OSError:  # it went away again
            return
        upstream = socket.socket()
        if self._rate is not None:
            _shape(upstream)
        for each in (client, upstream):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.counts["accepted"] += 1
        connection = Connection(client, upstream)
        self._connections[connection] = None
        upstream.connect_ex(self._upstream)  # how it went shows in the first call that is made on it
        self._update(connection)

    def _update(self, connection: Connection) -> None:
        """Ask the selector for what the connection can use now."""
        wanted = [0, 0]
        state = connection.state
        if state == CONNECTING:
            wanted[1] = selectors.EVENT_WRITE
        elif state in {OPEN, TEARING}:
            for way in connection.ways:
                if way.pending:
                    wanted[1 - way.index] |= selectors.EVENT_WRITE
                elif not way.ended and not connection.starved:
                    wanted[way.index] |= selectors.EVENT_READ
        elif state == LINGERING:
            for way in connection.ways:
                if not way.ended:
                    wanted[way.index] = selectors.EVENT_READ
        for side, mask in enumerate(wanted):
            old, sock = connection.masks[side], connection.sockets[side]
            if mask == old:
                continue
            connection.masks[side] = mask
            if not mask:
                self._selector.unregister(sock)
            elif old:
                self._selector.modify(sock, mask, self._handler(connection, side))
            else:
                self._selector.register(sock, mask, self._handler(connection, side))

    def _handler(self, connection: Connection, side: int) -> Callable[[socket.socket, int], None]:
        def handle(_: socket.socket, mask: int) -> None:
            # Whatever an earlier event of the same batch did to it is seen here: its mask says what is still wanted.
            mask &= connection.masks[side]
            try:
                if mask & selectors.EVENT_WRITE:
                    self._on_writable(connection, connection.ways[1 - side])
                if mask & connection.masks[side] & selectors.EVENT_READ:
                    self._on_readable(connection, connection.ways[side])
            except OSError:
                self._close(connection, reset=True)  # what one end did, the other sees

        return handle

    def _on_writable(self, connection: Connection, way: Way) -> None:
        if connection.state == CONNECTING:
            error = way.sink.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, "connect")
            connection.state = OPEN
        elif way.pending:
            try:
                way.pending = way.pending[way.sink.send(way.pending) :]
            except BlockingIOError:
                return
        self._update(connection)

    def _on_readable(self, connection: Connection, way: Way) -> None:
        size = READ_BYTES
        if self._rate is not None:
            size = min(SHAPED_READ_BYTES, int(self._tokens[way.index]))
            if size <= 0:
                connection.starved = True
                self._update(connection)
                return
        try:
            count = way.source.recv_into(self._scratch, size)
        except BlockingIOError:
            return
        if connection.state == LINGERING:
            way.ended = not count
            if all(each.ended for each in connection.ways):
                self._close(connection, reset=False)
            else:
                self._update(connection)
            return
        if not count:
            way.ended = True
            way.sink.shutdown(socket.SHUT_WR)
            if all(each.ended for each in connection.ways):
                self._close(connection, reset=False)
            else:
                self._update(connection)
            return
        self._tokens[way.index] -= count
        tearing = connection.state == TEARING
        if tearing:
            count = self._random.randrange(count)
        try:
            sent = way.sink.send(self._scratch[:count]) if count else 0
        except BlockingIOError:
            sent = 0
        self.counts["bytes"] += sent
        connection.moved += sent
        connection.last = time.monotonic()
        if tearing:
            self._finish(connection)
        elif sent < count:
            way.pending = bytes(self._scratch[sent:count])
            self.counts["bytes"] += count - sent
            self._update(connection)

    def _close(self, connection: Connection, *, reset: bool) -> None:
        if connection.state == CLOSED:
            return
        connection.state = CLOSED
        connection.starved = False
        self._update(connection)
        self._connections.pop(connection, None)
        for sock in connection.sockets:
            _close(sock, reset=reset)

    def _finish(self, connection: Connection) -> None:
        """FIN both ways. What waits here is lost, so that a message or TLS record ends in its middle."""
        if connection.state != TEARING:
            return
        connection.state = LINGERING
        for way in connection.ways:
            way.pending = b""
            way.ended = False
            try:
                way.source.shutdown(socket.SHUT_WR)
            except OSError:  # it is gone already
                way.ended = True
        self._connections.pop(connection, None)  # later faults have no part in it
        self._update(connection)
        self._later(LINGER_SECONDS, lambda: self._close(connection, reset=False))

    # --- faults

    def fault(self, kind: str, scope: str = "all", seconds: float | None = None) -> int:
        """Do it. Returns how many connections it hit."""
        now = time.monotonic()
        self.faults[kind] += 1
        print(f"{now:.3f} {kind} {scope}", file=sys.stderr)
        if kind == "freeze":
            hit = len(self._connections)
            time.sleep(FREEZE_SECONDS if seconds is None else seconds)
            return hit
        if kind == "refuse":
            self._refuse(self._random.uniform(*REFUSE_SECONDS) if seconds is None else seconds)
            return 0
        chosen = list(self._connections)
        if scope != "all" and chosen:
            busy = [connection for connection in chosen if connection.is_busy(now)]
            chosen = [self._random.choice(busy if busy and scope == "busy" else chosen)]
        if any(connection.is_busy(now) for connection in chosen):
            self.counts["hits"] += 1
        self.cut[kind] += len(chosen)
        for connection in chosen:
            self._cut(connection, kind, seconds)
        if kind == "outage":
            self._refuse(self._random.uniform(*REFUSE_SECONDS) if seconds is None else seconds)
        return len(chosen)

    def _cut(self, connection: Connection, kind: str, seconds: float | None) -> None:
        if kind in {"rst", "outage"}:
            self._close(connection, reset=True)
        elif kind == "fin":
            connection.state = TEARING
            self._later(TEAR_SECONDS, lambda: self._finish(connection))
        else:
            connection.state = STALLED
            self._connections.pop(connection, None)
            self._update(connection)
            if kind == "black_hole":
                self._later(BLACK_HOLE_SECONDS, lambda: self._close(connection, reset=True))
                return
            _close(connection.sockets[self._random.randrange(2)], reset=self._random.random() < 0.5)
            delay = self._random.uniform(*HALF_SECONDS) if seconds is None else seconds
            self._later(delay, lambda: self._close(connection, reset=True))

    def _refuse(self, seconds: float) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()  # whoever waits in its queue is reset
            self._listener = None
            self._later(seconds, self._listen)

    def every(self, seconds: float, patience: float, scopes: Sequence[str], kinds: list[str]) -> None:
        """Faults of these kinds in random order and at random times, until the next call."""
        self._schedule += 1
        serial = self._schedule

        deck: list[str] = []

        def plan() -> None:
            pause = self._random.uniform(0.5, 1.5) * seconds
            latest = time.monotonic() + pause + patience
            self._later(pause, lambda: strike(latest))

        def strike(latest: float) -> None:
            if serial != self._schedule or not kinds:
                return
            now = time.monotonic()
            if now < latest and not any(connection.is_busy(now) for connection in self._connections):
                self._later(PATIENCE_STEP_SECONDS, lambda: strike(latest))
                return
            if not deck:  # each comes once before one comes again: no kind is left out by chance
                deck.extend(self._random.sample(kinds, len(kinds)))
            self.fault(deck.pop(), self._random.choice(scopes))
            plan()

        plan()

    # --- control

    def _on_control(self, listener: socket.socket, _: int) -> None:
        control, _address = listener.accept()
        self._lines[control] = b""
        self._selector.register(control, selectors.EVENT_READ, self._on_line)

    def _on_line(self, control: socket.socket, _: int) -> None:
        try:
            data = control.recv(4096)
        except OSError:
            data = b""
        if not data:
            del self._lines[control]
            self._selector.unregister(control)
            control.close()
            return
        *lines, self._lines[control] = (self._lines[control] + data).split(b"\n")
        for line in lines:
            control.sendall(json.dumps(self._obey(line.decode().split())).encode() + b"\n")

    def _obey(self, words: list[str]) -> object:
        match words:
            case ["fault", kind, *rest] if kind in KINDS:
                return self.fault(kind, rest[0] if rest else "all", float(rest[1]) if len(rest) > 1 else None)
            case ["every", seconds, patience, scope, *kinds] if scope in SCOPES and set(kinds) <= set(KINDS):
                self.every(float(seconds), float(patience), SCOPES[scope], kinds)
                return "ok"
            case ["calm"]:
                self.every(0.0, 0.0, SCOPES["all"], [])
                return "ok"
            case ["counts"]:
                return {**self.counts, "open": len(self._connections), "faults": self.faults, "cut": self.cut}
            case _:
                return {"error": f"unknown command {words}"}


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _shape(sock: socket.socket) -> None:
    # On the listener it is inherited by what it accepts.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SHAPED_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SHAPED_BUFFER_BYTES)


def _close(sock: socket.socket, *, reset: bool) -> None:
    """Close it, if it is not closed yet."""
    if sock.fileno() >= 0:
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        sock.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=int, default=None, help="bytes a second each way, all connections together")
    options = parser.parse_args()
    forwarder = Forwarder(options.upstream, seed=options.seed, rate=options.rate)
    print(f"forwarding {forwarder.port} control {forwarder.control_port}", file=sys.stderr, flush=True)
    forwarder.run()


if __name__ == "__main__":
    main()
