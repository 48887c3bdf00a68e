"""How many datagrams are lost at a steady rate, tunnelled and directly: `python -m tests.benchmarks.datagrams`.

Sender, receiver, client and server are processes of their own. Each datagram has the number of the one that it is. The
sender keeps to the rate in bursts of a millisecond; the receiver counts what comes until nothing does for a second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import struct
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tests.integration.tunnel import Client, Server

QUIET_SECONDS = 1.0
"""Silence after which the receiver counts."""
HEAD = struct.Struct("!Id")
TICK_SECONDS = 0.001
BUFFER_BYTES = 4 << 20
"""Asked of the kernel for the receiver: its own losses are not the tunnel's."""


@dataclass(frozen=True)
class Result:
    """What became of the datagrams. Delays are in milliseconds, one way; `*_cpu` is processor seconds meanwhile."""

    way: str
    sent: int
    received: int
    lost: int
    lost_percent: float
    seconds: float
    delay_median: float
    delay_99: float
    client_cpu: float
    server_cpu: float


def receive(port: Connection, result: Connection) -> None:
    """Count what comes to a port, whose number goes to `port`; then tell how many and their delays."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        sock.bind(("127.0.0.1", 0))
        port.send(sock.getsockname()[1])
        seen: set[int] = set()
        delays: list[float] = []
        sock.settimeout(30)
        try:
            while True:
                data = sock.recv(70_000)
                number, when = HEAD.unpack_from(data)
                if number not in seen:
                    seen.add(number)
                    delays.append(time.monotonic() - when)
                sock.settimeout(QUIET_SECONDS)
        except TimeoutError:
            pass
        result.send((len(seen), sorted(delays)))


def send(port: int, rate: int, seconds: float, size: int, result: Connection) -> None:
    """Send at a steady rate; tell how many it were and in what time."""
    rest = bytes(size - HEAD.size)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        begin = time.monotonic()
        number, total = 0, int(rate * seconds)
        while number < total:
            now = time.monotonic()
            due = min(int((now - begin) * rate), total)
            while number < due:
                try:
                    sock.send(HEAD.pack(number, time.monotonic()) + rest)
                except ConnectionRefusedError:
                    pass  # of an earlier one
                number += 1
            time.sleep(max(begin + (number + 1) / rate - time.monotonic(), TICK_SECONDS))
        result.send((number, time.monotonic() - begin))


def cpu(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(way: str, *, rate: int, seconds: float, size: int) -> Result:
    """One run: `direct`, `ws` or `wss`."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        port_here, port_there = context.Pipe()
        got_here, got_there = context.Pipe()
        sent_here, sent_there = context.Pipe()
        receiver = context.Process(target=receive, args=(port_there, got_there), daemon=True)
        receiver.start()
        stack.callback(receiver.kill)
        port: int = port_here.recv()
        processes: list[int] = []
        if way != "direct":
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for name in ("server", "client"):
                (directory / name).mkdir()
            server = stack.enter_context(Server(directory / "server", plain=way == "ws"))
            arguments = ("-L", f"0:127.0.0.1:{port}/udp")
            client = stack.enter_context(Client(directory / "client", server.invitation.url, (), arguments=arguments))
            port = int(client.wait_for_line(r"listening 127\.0\.0\.1:(\d+) -> udp:")[1])
            client.wait_for_line("connected")
            processes = [client.pid, server.pid]
            time.sleep(1)  # for the pool to be as full as it is kept
        before = [cpu(pid) for pid in processes]
        sender = context.Process(target=send, args=(port, rate, seconds, size, sent_there), daemon=True)
        sender.start()
        stack.callback(sender.kill)
        sent, took = sent_here.recv()
        received, delays = got_here.recv()
        lost = sent - received
        used = [round(cpu(pid) - past, 2) for pid, past in zip(processes, before, strict=True)] or [0.0, 0.0]
        return Result(
            way, sent, received, lost, round(100 * lost / sent, 3), round(took, 3),
            *(round(1000 * delays[int(len(delays) * part)], 3) if delays else -1.0 for part in (0.5, 0.99)), *used,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=20_000, help="datagrams a second")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--size", type=int, default=1420, help="bytes in each: WireGuard's, unless given")
    parser.add_argument("ways", nargs="*", default=["direct", "ws", "wss"], help="direct, ws, wss")
    options = parser.parse_args()
    for way in options.ways:
        result = measure(way, rate=options.rate, seconds=options.seconds, size=options.size)
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
