"""How soon a link that leads nowhere is noticed: `python -m tests.benchmarks.black_hole [ROUNDS]`.

A relay between client and server goes on accepting bytes and passes none on, for all connections that it has; nobody is
told, and new connections work. With data flowing: the time until the next byte of an echo is back. Idle: the time until
the client says that the stream lost its link. The bounds are those that are promised; one that is passed exits 1.
"""

from __future__ import annotations

import contextlib
import io
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.chaos.relay import Relay
from tests.integration.sockets import Listener
from tests.integration.tunnel import Client, Server

FLOWING_SECONDS = 9.0
IDLE_SECONDS = 26.0
PIECE_BYTES = 1024
PAUSE_SECONDS = 0.02
SETTLE_SECONDS = 3.0


def echo(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the round is over
        while data := sock.recv(65536):
            sock.sendall(data)


def send_for_ever(sock: socket.socket, stopped: threading.Event) -> None:
    while not stopped.wait(PAUSE_SECONDS):
        sock.sendall(bytes(PIECE_BYTES))


def flowing(app: socket.socket, relay: Relay) -> float:
    """Seconds from the black hole to the next byte behind it."""
    stopped = threading.Event()
    sender = threading.Thread(target=send_for_ever, args=(app, stopped))
    sender.start()
    try:
        settle = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < settle:
            app.recv(65536)
        relay.fault("black_hole")
        begun = last = time.monotonic()
        while True:  # what was under way still comes; then nothing does, and that is what is measured
            app.recv(65536)
            now = time.monotonic()
            if now - last > 1.0:
                return now - begun
            last = now
    finally:
        stopped.set()
        sender.join()


def idle(client: Client, relay: Relay) -> float:
    """Seconds from the black hole to the line in the client's log."""
    time.sleep(SETTLE_SECONDS)
    before = len(client.stderr)
    relay.fault("black_hole")
    begun = time.monotonic()
    client.wait_for_line(r"lost (its|their) link", within=2 * IDLE_SECONDS, after=before)
    return time.monotonic() - begun


def main(rounds: int) -> int:
    """Run it all, a line a round. Returns the exit code."""
    with (
        contextlib.redirect_stdout(io.StringIO()),  # the processes' logs, which only a failing test wants
        tempfile.TemporaryDirectory() as directory,
        Listener() as listener,
        Server(Path(directory), plain=True) as server,
        Relay(server.port, Path(directory)) as relay,
        Client(Path(directory), server.invitation.changed(port=relay.port), [listener.address]) as client,
    ):
        worst = {"flowing": 0.0, "idle": 0.0}
        for number in range(rounds):
            with client.connect(listener.address, within=60) as app, listener.accept() as target:
                threading.Thread(target=echo, args=(target,), daemon=True).start()
                took = {"flowing": flowing(app, relay), "idle": idle(client, relay)}
            for name, seconds in took.items():
                worst[name] = max(worst[name], seconds)
            print(
                f"round {number + 1}: data flowing {took['flowing']:.1f} s, idle {took['idle']:.1f} s",
                file=sys.__stdout__,
                flush=True,
            )
    print(
        f"worst: data flowing {worst['flowing']:.1f} s (promised {FLOWING_SECONDS:g}),"
        f" idle {worst['idle']:.1f} s (promised {IDLE_SECONDS:g})"
    )
    return int(worst["flowing"] > FLOWING_SECONDS or worst["idle"] > IDLE_SECONDS)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
