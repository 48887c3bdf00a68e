"""Ports for whoever must name one before somebody listens there."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

LOWEST = 10_000
"""Services that a machine has anyway mostly stand below."""
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_random = random.SystemRandom()  # not the one that Hypothesis seeds: runs side by side would take the same ports
_given: set[int] = set()


def unused_port() -> int:
    """A port of 127.0.0.1, for TCP and UDP, on which nothing listens.

    It stays so: the kernel gives the ports of its ephemeral range to whoever asks for any, at any moment, and as source
    of any connection; so this one is from below that. Each is given once, and only by one of pytest's workers.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = [port for port in range(LOWEST + worker, _end(), workers) if port not in _given]
    while True:
        port = ports.pop(_random.randrange(len(ports)))
        _given.add(port)
        if _is_free(port):
            return port


def _end() -> int:
    try:
        lowest_ephemeral = int(_EPHEMERAL.read_text(encoding="ascii").split()[0])
    except OSError:
        lowest_ephemeral = 32768  # no Linux: there it mostly begins higher
    # Where it begins very low nothing is sure, and any port is as good as another.
    return lowest_ephemeral if lowest_ephemeral > 2 * LOWEST else 32768


def _is_free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(type=kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True
