"""What it costs that streams can be resumed, while nothing breaks.

    python -m tests.benchmarks.replay_cost [--plain] [--rounds N] [--mebibytes N]

Bulk from the application to the target through `wstunnel` and through `tests.benchmarks.without_replay`, in turns on
the same machine; one transfer of each is verified by SHA-256 before anything is measured. Prints throughput and the CPU
seconds a GB of client and server together, and the ratios of the medians: "with" divided by "without".
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

BUILDS = {"with": "wstunnel", "without": "tests.benchmarks.without_replay"}
SINK = """
import hashlib, socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
buffer = memoryview(bytearray(1 << 20))
while True:
    connection, _ = listener.accept()
    with connection:
        digest = hashlib.sha256() if connection.recv(1) == b"V" else None
        while count := connection.recv_into(buffer):
            if digest:
                digest.update(buffer[:count])
        connection.sendall(digest.digest() if digest else b"done")
"""
BLOCK = os.urandom(1 << 20)


@dataclass
class Tunnel:
    """One build's server and client, both running."""

    port: int
    pids: tuple[int, int]
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def start(module: str, directory: Path, target: int, stack: ExitStack, *, plain: bool) -> Tunnel:
    """Start server and client. They end with `stack`."""
    state = directory / module
    state.mkdir()

    def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", module, *arguments]
        child = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
        stack.callback(child.wait)
        stack.callback(child.terminate)
        return child

    flags = ["--plain"] if plain else []
    server = run("server", "--port", "0", "--bind", "127.0.0.1", "--state-dir", str(state), *flags)
    _port_of(server, r"listening 127\.0\.0\.1:(\d+)")
    invite = [sys.executable, "-m", "wstunnel", "invite", "--host", "127.0.0.1", "--state-dir", str(state)]
    url = subprocess.run(invite, check=True, capture_output=True, text=True).stdout.strip()
    client = run("client", "-L", f"0:127.0.0.1:{target}", WSTUNNEL_URL=url)
    port = _port_of(client, r"listening 127\.0\.0\.1:(\d+)")
    time.sleep(2)  # warm links
    return Tunnel(port, (client.pid, server.pid))


def _port_of(child: subprocess.Popen[str], pattern: str) -> int:
    assert child.stderr is not None
    for line in child.stderr:
        if found := re.search(pattern, line):
            return int(found[1])
    raise SystemExit(f"a process ended before it listened: {child.args}")


def cpu(pids: tuple[int, int]) -> float:
    """CPU seconds that the processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def transfer(tunnel: Tunnel, mebibytes: int, *, verify: bool = False) -> None:
    """Send, and wait until the target has it all. Appends to the tunnel's figures unless it verifies."""
    digest = hashlib.sha256()
    before, begun = cpu(tunnel.pids), time.monotonic()
    with socket.create_connection(("127.0.0.1", tunnel.port), timeout=60) as sock:
        sock.sendall(b"V" if verify else b"B")
        for number in range(mebibytes):
            block = number.to_bytes(8, "big") + BLOCK[8:] if verify else BLOCK
            if verify:
                digest.update(block)
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: sock.recv(64), b""))
    if verify:
        assert answer == digest.digest(), "what arrived is not what was sent"
        return
    assert answer == b"done", answer
    gigabytes = mebibytes * (1 << 20) / 1e9
    tunnel.rates.append(gigabytes / (time.monotonic() - begun))
    tunnel.seconds.append((cpu(tunnel.pids) - before) / gigabytes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plain", action="store_true", help="ws instead of wss")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mebibytes", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        sink = subprocess.Popen([sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True)
        stack.callback(sink.wait)
        stack.callback(sink.terminate)
        assert sink.stdout is not None
        target = int(sink.stdout.readline())
        tunnels = {
            name: start(module, Path(directory), target, stack, plain=options.plain) for name, module in BUILDS.items()
        }
        for tunnel in tunnels.values():
            transfer(tunnel, 64, verify=True)
        for _ in range(options.rounds):
            for tunnel in tunnels.values():
                transfer(tunnel, options.mebibytes)
    medians = {}
    for name, tunnel in tunnels.items():
        medians[name] = statistics.median(tunnel.rates), statistics.median(tunnel.seconds)
        print(f"{name:>8} replay: {medians[name][0]:.2f} GB/s, {medians[name][1]:.2f} CPU s/GB (client and server)")
    rate, seconds = (with_ / without for with_, without in zip(medians["with"], medians["without"], strict=True))
    print(f"   ratio: throughput {rate:.2f}, CPU {seconds:.2f}")


if __name__ == "__main__":
    main()
