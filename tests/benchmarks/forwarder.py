"""A tunnel of no use, for tests of the benchmark: `python -m tests.benchmarks.forwarder ROLE PORT [TO_PORT [FAULT]]`.

The `server` only listens, the `client` forwards each connection to TO_PORT of this machine, without the server. FAULT:
`flip` changes a byte and `lose` leaves one out, each way; `deaf` accepts and does nothing.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

FAULTY_PIECE = 3
"""Which piece that it reads is changed: later than an echo's first."""


def pump(source: socket.socket, sink: socket.socket, fault: str) -> None:
    """Carry one direction to its end."""
    with contextlib.suppress(OSError):  # the other direction ended both
        number = 0
        while data := source.recv(65536):
            number += 1
            if number == FAULTY_PIECE and fault == "flip":
                data = data[:-1] + bytes([data[-1] ^ 1])
            elif number == FAULTY_PIECE and fault == "lose":
                data = data[:-1]
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def carry(near: socket.socket, to: int, fault: str) -> None:
    """Carry one connection, both ways."""
    with near, socket.create_connection(("127.0.0.1", to)) as far:
        back = threading.Thread(target=pump, args=(far, near, fault), daemon=True)
        back.start()
        pump(near, far, fault)
        back.join()


def main(role: str, port: str, to: str = "0", fault: str = "", *_: str) -> None:
    """Run for ever."""
    kept = []
    with socket.create_server(("127.0.0.1", int(port)), backlog=512) as listener:
        while True:
            near, _ = listener.accept()
            if role == "server" or fault == "deaf":
                kept.append(near)
            else:
                threading.Thread(target=carry, args=(near, int(to), fault), daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
