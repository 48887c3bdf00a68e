"""What is measured: a function a measure, or one for several that come from the same transfer.

Each takes a `Bench`, which has a tunnel that works, and returns one round's values by the measures' names. Units and
titles are in `MEASURES`; where the tunnel has to be and of what age, in `PROBES`.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.benchmarks.load import Load, LoadError, Running
from tests.benchmarks.tunnels import LOOPBACK, Commands, Program, Tunnel, TunnelError, fill
from tests.integration.sockets import unused_port
from tests.integration.tunnel import environment

WARM_SECONDS = 0.3
"""Of bulk before bulk is measured; also says how much to send so that it takes `seconds`."""
REWARM_SECONDS = 2.0
"""For warm connections to be back before the next opens over the slow path."""
SETTLE_SECONDS = 3.0
"""For memory to be what it will stay, and for what follows a start or an open to be over."""
IDLE_CPU_SECONDS = 10.0
IDLE_BEFORE, IDLE_MORE = 500, 1000
START_SECONDS = 20.0
RATE_SHARE_LOSS = 2.0
"""With loss a transfer takes this many times as long: its rate varies more."""
HTTP_AT_ONCE = 8
OPENS_AT_ONCE = 10
FIRSTS = 5
TENS = 3


class Stage(Enum):
    """Where and when a measure is taken."""

    LOOPBACK = "through a tunnel that stands for all rounds, on loopback"
    HTTP = "the same, in front of nginx"
    FRESH = "through a tunnel that was started for it"
    WIDE = "through a tunnel that stands for all rounds, over 80 ms"
    START = "by starting processes"


@dataclass
class Bench:
    """What a measure needs.

    Args:
        seconds: that a transfer should take.
        commands: of the tunnel, `None` where there is none.
        directory: for files of this measure.
        path: the wide-area path, in its stage.
    """

    load: Load
    seconds: float
    directory: Path
    commands: Commands | None
    tunnel: Tunnel | None = None
    path: Running | None = None

    @property
    def through(self) -> Tunnel:
        assert self.tunnel is not None
        return self.tunnel

    @property
    def has_processes(self) -> bool:
        return self.commands is not None

    def drive(self, *arguments: str | float) -> Mapping[str, float]:
        """Run the driver against the tunnel. `LoadError` if a stream failed."""
        command, *rest = arguments
        return self.load.run(command, "--to", self.through.address, *rest, namespace=self.through.near)


@dataclass(frozen=True)
class Measure:
    """A figure: what it is called, its unit, and whether more or less is better."""

    title: str
    unit: str
    better: str


MEASURES = {
    "bulk_up": Measure("Bulk, client to server", "GB/s", "higher"),
    "bulk_down": Measure("Bulk, server to client", "GB/s", "higher"),
    "cpu_up": Measure("CPU for bulk up, both sides added", "s/GB", "lower"),
    "cpu_down": Measure("CPU for bulk down, both sides added", "s/GB", "lower"),
    "echo_p50": Measure("Echo of 64 bytes, median", "µs", "lower"),
    "echo_p95": Measure("Echo of 64 bytes, 95th percentile", "µs", "lower"),
    "echo_50": Measure("50 echoing streams", "/s", "higher"),
    "opens": Measure("Open, echo, close, one after the other", "/s", "higher"),
    "opens_10": Measure("Open, echo, close, ten at once", "/s", "higher"),
    "http_requests": Measure(f"HTTP requests without keep-alive through nginx, {HTTP_AT_ONCE} at once", "/s", "higher"),
    "idle_client_kb": Measure("Memory an idle stream, of 1,000 after the first 500, client", "KB", "lower"),
    "idle_server_kb": Measure("Memory an idle stream, of 1,000 after the first 500, server", "KB", "lower"),
    "idle_9000_client_mb": Measure("Memory with 9,000 idle streams, client", "MB", "lower"),
    "idle_9000_server_mb": Measure("Memory with 9,000 idle streams, server", "MB", "lower"),
    "idle_9000_cpu": Measure("CPU with 9,000 idle streams, the busier side", "% of a core", "lower"),
    "first_byte_80ms": Measure("Connect and first echoed byte over 80 ms", "ms", "lower"),
    "ten_at_once_80ms": Measure("The slowest of ten at once over 80 ms", "ms", "lower"),
    "echo_beside_bulk_80ms_p95": Measure(
        "Echo beside a bulk stream over 80 ms, 95th percentile, the slower way", "ms", "lower"
    ),
    "bulk_beside_echo_80ms": Measure("That bulk stream, the slower way", "MB/s", "higher"),
    "bulk_80ms": Measure("Bulk over 80 ms, the slower way", "MB/s", "higher"),
    "bulk_80ms_up": Measure("Bulk over 80 ms, client to server", "MB/s", "higher"),
    "bulk_80ms_down": Measure("Bulk over 80 ms, server to client", "MB/s", "higher"),
    "bulk_80ms_loss1": Measure("Bulk over 80 ms with 1 % loss, the slower way", "MB/s", "higher"),
    "bulk_80ms_loss1_up": Measure("Bulk over 80 ms with 1 % loss, client to server", "MB/s", "higher"),
    "bulk_80ms_loss1_down": Measure("Bulk over 80 ms with 1 % loss, server to client", "MB/s", "higher"),
    "start_version": Measure("--version", "s", "lower"),
    "start_server_ready": Measure("Server accepts after its start", "s", "lower"),
}


# --- on loopback ----------------------------------------------------------------------------------------------------


def _bulk(bench: Bench, way: str) -> dict[str, float]:
    warm = bench.drive("bulk", "--direction", way, "--seconds", WARM_SECONDS)
    if not warm["bytes"]:
        raise LoadError(f"bulk {way}: nothing arrived within {WARM_SECONDS:g} s")
    size = max(1 << 20, int(warm["bytes"] / warm["seconds"] * bench.seconds))
    before = bench.through.cpu() if bench.has_processes else 0.0
    done = bench.drive("bulk", "--direction", way, "--bytes", size)
    gigabytes = done["bytes"] / 1e9
    values = {f"bulk_{way}": gigabytes / done["seconds"]}
    if bench.has_processes:
        values[f"cpu_{way}"] = (bench.through.cpu() - before) / gigabytes
    return values


def bulk_up(bench: Bench) -> dict[str, float]:
    return _bulk(bench, "up")


def bulk_down(bench: Bench) -> dict[str, float]:
    return _bulk(bench, "down")


def echo(bench: Bench) -> dict[str, float]:
    took = bench.drive("echo", "--count", max(100, int(bench.seconds * 5000)))
    return {"echo_p50": took["p50_us"], "echo_p95": took["p95_us"]}


def echo_50(bench: Bench) -> dict[str, float]:
    done = bench.drive("streams", "--streams", 50, "--seconds", bench.seconds)
    return {"echo_50": done["messages"] / done["seconds"]}


def opens(bench: Bench) -> dict[str, float]:
    done = bench.drive("opens", "--seconds", bench.seconds)
    return {"opens": done["opens"] / done["seconds"]}


def opens_10(bench: Bench) -> dict[str, float]:
    done = bench.drive("opens", "--seconds", bench.seconds, "--at-once", OPENS_AT_ONCE)
    return {"opens_10": done["opens"] / done["seconds"]}


def http_requests(bench: Bench) -> dict[str, float]:
    done = bench.drive("opens", "--seconds", bench.seconds, "--at-once", HTTP_AT_ONCE, "--get", "/page")
    return {"http_requests": done["opens"] / done["seconds"]}


# --- idle -----------------------------------------------------------------------------------------------------------


def _hold(bench: Bench, streams: int) -> Running:
    tunnel = bench.through
    return bench.load.start("hold", "--to", tunnel.address, "--streams", streams, namespace=tunnel.near)


def _check_held(held: Running) -> None:
    if lost := held.finish()["lost"]:
        raise LoadError(f"hold: {lost} streams were closed meanwhile")


def idle_1000(bench: Bench) -> dict[str, float]:
    sides = {"idle_client_kb": bench.through.client, "idle_server_kb": bench.through.server}
    # The first ones fill what the start left free, and are no measure of those that follow.
    with _hold(bench, IDLE_BEFORE) as first:
        time.sleep(SETTLE_SECONDS)
        before = {name: side.memory() for name, side in sides.items()}
        with _hold(bench, IDLE_MORE) as held:
            time.sleep(SETTLE_SECONDS)
            values = {name: (side.memory() - before[name]) / IDLE_MORE / 1e3 for name, side in sides.items()}
            if min(values.values()) <= 0:
                raise LoadError("memory shrank meanwhile: it says nothing about a stream")
            _check_held(held)
        _check_held(first)
    return values


def idle_9000(bench: Bench) -> dict[str, float]:
    client, server = bench.through.client, bench.through.server
    with _hold(bench, 9000) as held:
        time.sleep(SETTLE_SECONDS)
        before = client.cpu(), server.cpu()
        begun = time.monotonic()
        time.sleep(IDLE_CPU_SECONDS)
        busier = max(client.cpu() - before[0], server.cpu() - before[1])
        values = {
            "idle_9000_cpu": 100 * busier / (time.monotonic() - begun),
            "idle_9000_client_mb": client.memory() / 1e6,
            "idle_9000_server_mb": server.memory() / 1e6,
        }
        _check_held(held)
    return values


# --- over 80 ms -----------------------------------------------------------------------------------------------------


def first_byte_80ms(bench: Bench) -> dict[str, float]:
    taken = []
    for _ in range(FIRSTS):
        time.sleep(REWARM_SECONDS / 4)
        taken.append(bench.drive("first")["max_us"] / 1e3)
    return {"first_byte_80ms": statistics.median(taken)}


def ten_at_once_80ms(bench: Bench) -> dict[str, float]:
    taken = []
    for _ in range(TENS):
        time.sleep(REWARM_SECONDS)
        taken.append(bench.drive("first", "--count", 10)["max_us"] / 1e3)
    return {"ten_at_once_80ms": statistics.median(taken)}


def echo_beside_bulk_80ms(bench: Bench) -> dict[str, float]:
    ways = [bench.drive("beside", "--direction", way, "--seconds", bench.seconds) for way in ("up", "down")]
    return {
        "echo_beside_bulk_80ms_p95": max(way["p95_us"] for way in ways) / 1e3,
        "bulk_beside_echo_80ms": min(way["bulk_bytes_per_second"] for way in ways) / 1e6,
    }


def _bulk_over(bench: Bench, name: str, seconds: float) -> dict[str, float]:
    values = {}
    for way in ("up", "down"):
        done = bench.drive("bulk", "--direction", way, "--seconds", seconds)
        values[f"{name}_{way}"] = done["bytes"] / 1e6 / done["seconds"]
    return {name: min(values.values())} | values


def bulk_80ms(bench: Bench) -> dict[str, float]:
    return _bulk_over(bench, "bulk_80ms", 2 * bench.seconds)


def bulk_80ms_loss1(bench: Bench) -> dict[str, float]:
    assert bench.path is not None
    bench.path.tell("loss 1")
    try:
        return _bulk_over(bench, "bulk_80ms_loss1", 2 * bench.seconds * RATE_SHARE_LOSS)
    finally:
        bench.path.tell("loss 0")


# --- starting -------------------------------------------------------------------------------------------------------


def start_version(bench: Bench) -> dict[str, float]:
    assert bench.commands is not None
    begun = time.monotonic()
    done = subprocess.run(
        bench.commands.version_command,
        env=environment(bench.directory),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    took = time.monotonic() - begun
    if done.returncode:
        raise TunnelError(f"--version: exit code {done.returncode}: {done.stderr.strip()}")
    return {"start_version": took}


def start_server_ready(bench: Bench) -> dict[str, float]:
    """From a state directory that is empty: the first start makes whatever it needs."""
    assert bench.commands is not None
    state = bench.directory / "state"
    state.mkdir()
    place, port = LOOPBACK, unused_port()
    values: dict[str, str | int] = {"server_host": place.server_host, "server_port": port, "state": str(state)}
    command = fill(bench.commands.server, values)
    with ExitStack() as stack:
        begun = time.monotonic()
        server = stack.enter_context(
            Program(f"{bench.commands.name}'s server", command, bench.directory / "server.log", bench.directory)
        )
        while time.monotonic() < begun + START_SECONDS:
            with socket.socket() as probe:
                if probe.connect_ex((place.server_host, port)) == 0:
                    return {"start_server_ready": time.monotonic() - begun}
            server.check()
            time.sleep(0.001)
        raise TunnelError(f"{server.what} does not accept: {server.tail()}")


@dataclass(frozen=True)
class Probe:
    """A function that measures, and the names of what it returns.

    Args:
        direct: measured without a tunnel too.
    """

    names: tuple[str, ...]
    measure: Callable[[Bench], dict[str, float]]
    stage: Stage
    direct: bool = True


PROBES = (
    Probe(("bulk_up", "cpu_up"), bulk_up, Stage.LOOPBACK),
    Probe(("bulk_down", "cpu_down"), bulk_down, Stage.LOOPBACK),
    Probe(("echo_p50", "echo_p95"), echo, Stage.LOOPBACK),
    Probe(("echo_50",), echo_50, Stage.LOOPBACK),
    Probe(("opens",), opens, Stage.LOOPBACK),
    Probe(("opens_10",), opens_10, Stage.LOOPBACK),
    Probe(("http_requests",), http_requests, Stage.HTTP),
    Probe(("idle_client_kb", "idle_server_kb"), idle_1000, Stage.FRESH, direct=False),
    Probe(("idle_9000_client_mb", "idle_9000_server_mb", "idle_9000_cpu"), idle_9000, Stage.FRESH, direct=False),
    Probe(("first_byte_80ms",), first_byte_80ms, Stage.WIDE),
    Probe(("ten_at_once_80ms",), ten_at_once_80ms, Stage.WIDE),
    Probe(("echo_beside_bulk_80ms_p95", "bulk_beside_echo_80ms"), echo_beside_bulk_80ms, Stage.WIDE),
    Probe(("bulk_80ms", "bulk_80ms_up", "bulk_80ms_down"), bulk_80ms, Stage.WIDE),
    Probe(("bulk_80ms_loss1", "bulk_80ms_loss1_up", "bulk_80ms_loss1_down"), bulk_80ms_loss1, Stage.WIDE),
    Probe(("start_version",), start_version, Stage.START, direct=False),
    Probe(("start_server_ready",), start_server_ready, Stage.START, direct=False),
)
