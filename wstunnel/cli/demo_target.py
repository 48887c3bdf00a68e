"""`python -m wstunnel.cli.demo_target`: what the demo's streams lead to. Prints its port, serves until stdin closes.

One service for each connection, chosen by its first byte:

    U            upload: reads to EOF, answers with the SHA-256 of what arrived (32 bytes)
    D + 8 bytes  download: sends that many bytes (big-endian), then their SHA-256 (32 bytes)
    E            echo: sends back what comes, until EOF
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator

from wstunnel.cli.demo_child import leave_with_parent

UPLOAD, DOWNLOAD, ECHO = b"U", b"D", b"E"
BLOCK_BYTES = 1 << 20
"""A block of a transfer: large enough that Python costs nothing beside the copying and hashing."""
COUNTER_BYTES = 8
DIGEST_BYTES = 32
BACKLOG = 128
WORKERS = 4
"""Threads that accept, started beforehand so that an open is not measured with the start of a thread."""


def blocks(total: int) -> Iterator[memoryview]:
    """`total` bytes (a multiple of 8) in blocks that all differ: one random block with a changing counter in front.

    Every block is the same buffer. It must be used up before the next one is asked for.
    """
    buffer = bytearray(os.urandom(BLOCK_BYTES))
    view = memoryview(buffer)
    for number, start in enumerate(range(0, total, BLOCK_BYTES)):
        buffer[:COUNTER_BYTES] = number.to_bytes(COUNTER_BYTES, "big")
        yield view[: min(BLOCK_BYTES, total - start)]


def receive_exactly(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes.

    Raises:
        EOFError: the connection ended before.
        OSError: it broke.
    """
    received = bytearray()
    while len(received) < count:
        chunk = connection.recv(count - len(received))
        if not chunk:
            raise EOFError(f"the stream ended after {len(received)} of {count} bytes")
        received += chunk
    return bytes(received)


def serve(connection: socket.socket) -> None:
    """One connection, to its end. Closes it."""
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        service = connection.recv(1)
        if service == UPLOAD:
            _take(connection)
        elif service == DOWNLOAD:
            _give(connection, int.from_bytes(receive_exactly(connection, COUNTER_BYTES), "big"))
        elif service == ECHO:
            while chunk := connection.recv(BLOCK_BYTES):
                connection.sendall(chunk)


def _take(connection: socket.socket) -> None:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while count := connection.recv_into(buffer):
        digest.update(buffer[:count])
    connection.sendall(digest.digest())


def _give(connection: socket.socket, total: int) -> None:
    digest = hashlib.sha256()
    for block in blocks(total):
        digest.update(block)
        connection.sendall(block)
    connection.sendall(digest.digest())


def _work(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        try:
            serve(connection)
        except (OSError, EOFError):
            pass  # this connection's end only: the demo at its other end says what broke


def main() -> None:
    """Listen on a free port of 127.0.0.1 and print its number. Ends with the process that holds stdin's other end."""
    leave_with_parent()
    listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    print(listener.getsockname()[1], flush=True)  # noqa: T201  # the demo reads it
    workers = [threading.Thread(target=_work, args=(listener,), daemon=True) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
