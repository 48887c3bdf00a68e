"""The demo's load: blocking sockets in one worker thread, so that nothing but the tunnel is measured."""

from __future__ import annotations

import hashlib
import socket
import statistics
import time
from dataclasses import dataclass, field

from wstunnel.cli import demo_target
from wstunnel.errors import LocalError

STALL_SECONDS = 10.0
"""A transfer that moves nothing for this long has failed."""
ECHO_BYTES = 64


@dataclass
class Progress:
    """How far the worker is. Written by the worker, read by whoever draws it."""

    done: int = 0
    stopped: bool = False
    """Set by the reader: the worker ends at its next block."""


@dataclass(frozen=True)
class Transfer:
    """One verified direction.

    Attributes:
        sent: SHA-256 of what was sent, computed by the sending process.
        arrived: SHA-256 of what arrived, computed by the receiving process.
    """

    count: int
    seconds: float
    sent: bytes
    arrived: bytes

    @property
    def verified(self) -> bool:
        return self.sent == self.arrived


@dataclass(frozen=True)
class Latency:
    """Round trips of ECHO_BYTES on one open stream, in seconds."""

    round_trips: list[float] = field(repr=False)

    @property
    def p50(self) -> float:
        return statistics.median(self.round_trips)

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.round_trips, n=100)[98]


class Load:
    """The measurements, each on streams of its own through the forward at `address`.

    Every method blocks and raises OSError or EOFError when the stream breaks.

    Args:
        address: where the client listens.
        progress: moved on by transfers.
    """

    def __init__(self, address: tuple[str, int], progress: Progress) -> None:
        self._address = address
        self._progress = progress

    def _connect(self, service: bytes) -> socket.socket:
        connection = socket.create_connection(self._address, timeout=STALL_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(service)
        return connection

    def _moved(self, count: int) -> None:
        self._progress.done += count
        if self._progress.stopped:
            raise LocalError("the demo was stopped")

    def first_echo(self) -> None:
        """One round trip, so that nothing later waits for the first link."""
        with self._connect(demo_target.ECHO) as connection:
            connection.sendall(b"hello")
            demo_target.receive_exactly(connection, 5)

    def upload(self, total: int) -> Transfer:
        """Send `total` bytes, close the sending side, and read the digest that the target answers with."""
        digest = hashlib.sha256()
        with self._connect(demo_target.UPLOAD) as connection:
            start = time.perf_counter()
            for block in demo_target.blocks(total):
                digest.update(block)
                connection.sendall(block)
                self._moved(len(block))
            connection.shutdown(socket.SHUT_WR)
            arrived = demo_target.receive_exactly(connection, demo_target.DIGEST_BYTES)
            return Transfer(total, time.perf_counter() - start, digest.digest(), arrived)

    def download(self, total: int) -> Transfer:
        """Ask for `total` bytes and read them, then the digest of what the target sent."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(demo_target.BLOCK_BYTES))
        with self._connect(demo_target.DOWNLOAD) as connection:
            start = time.perf_counter()
            connection.sendall(total.to_bytes(demo_target.COUNTER_BYTES, "big"))
            left = total
            while left:
                count = connection.recv_into(buffer, min(left, len(buffer)))
                if not count:
                    raise EOFError(f"the stream ended {left} bytes early")
                digest.update(buffer[:count])
                left -= count
                self._moved(count)
            sent = demo_target.receive_exactly(connection, demo_target.DIGEST_BYTES)
            return Transfer(total, time.perf_counter() - start, sent, digest.digest())

    def latency(self, round_trips: int) -> Latency:
        """Echo ECHO_BYTES, one after another, on one stream."""
        payload = bytes(ECHO_BYTES)
        times = []
        with self._connect(demo_target.ECHO) as connection:
            for _ in range(round_trips):
                start = time.perf_counter()
                connection.sendall(payload)
                demo_target.receive_exactly(connection, ECHO_BYTES)
                times.append(time.perf_counter() - start)
                self._moved(0)
        return Latency(times)

    def opens_a_second(self, seconds: float) -> float:
        """Open a stream, echo once, close it; one after another for `seconds`."""
        payload = bytes(ECHO_BYTES)
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            with self._connect(demo_target.ECHO + payload) as connection:
                demo_target.receive_exactly(connection, ECHO_BYTES)
            count += 1
            self._moved(0)
        return count / elapsed
