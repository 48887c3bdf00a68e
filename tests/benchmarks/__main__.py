"""How fast a tunnel is, beside its peers: `python -m tests.benchmarks [--peer NAME 'SERVER COMMAND' 'CLIENT COMMAND']`.

Every tunnel is given by two command lines, ours too; see `tunnels.py` for the placeholders. For example:

    python -m tests.benchmarks --output results.json --peer other-ws \\
        'other server --port {server_port}' \\
        'other client --listen {listen_port} --to {target_host}:{target_port} ws://{server_host}:{server_port}'

Measures are taken in rounds, tunnel after tunnel within each, and `direct` without any tunnel: by so much are driver
and target no bottleneck. A tunnel that fails a measure has `null` there, and what it said under `errors`. A name that
ends in -ws or -wss is compared with ours of that transport. `python -m tests.benchmarks.report` makes the page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.benchmarks.load import Load, LoadError
from tests.benchmarks.measures import MEASURES, PROBES, Bench, Probe, Stage
from tests.benchmarks.stages import StageError, Surroundings, Tunnels, surround
from tests.benchmarks.tunnels import DIRECT, Commands, TunnelError, ours

FAILURES = (LoadError, TunnelError, OSError, subprocess.SubprocessError)
VERIFIED_BYTES = 64 << 20


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; wrong ones exit 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", nargs=3, action="append", default=[], metavar=("NAME", "SERVER", "CLIENT"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", metavar="MEASURE,…", help=", ".join(MEASURES))
    parser.add_argument("--ours", choices=("ws", "wss", "both", "none"), default="both")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a transfer takes, roughly")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1 or chosen.seconds <= 0:
        parser.error("--rounds and --seconds are more than 0")
    wanted = [name for name in chosen.only.split(",") if name]
    if unknown := [name for name in wanted if name not in MEASURES]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(MEASURES)}")
    chosen.probes = [probe for probe in PROBES if not wanted or set(wanted) & set(probe.names)]
    transports = {"both": ("ws", "wss"), "none": ()}.get(chosen.ours, (chosen.ours,))
    chosen.tunnels = {}
    try:
        for commands in [*map(ours, transports), *(Commands(*peer) for peer in chosen.peer)]:
            if commands.name in chosen.tunnels:
                parser.error(f"there are two tunnels {commands.name!r}")
            chosen.tunnels[commands.name] = commands
    except ValueError as error:
        parser.error(str(error))
    return chosen


class Figures:
    """What was measured so far, in the shape of the JSON document."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self.measures: dict[str, dict[str, Any]] = {}

    def expect(self, probe: Probe, tunnels: Sequence[str]) -> None:
        for name in probe.names:
            if not (name.startswith("cpu_") and tunnels == [DIRECT]):
                self.measures.setdefault(name, asdict(MEASURES[name]) | {"values": {}, "errors": {}})

    def take(self, number: int, tunnel: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            measure = self.measures[name]
            measure["values"].setdefault(tunnel, [None] * self._rounds)[number] = value
            print(f"round {number + 1}  {tunnel:<16} {name:<28} {value:>12,.4g} {measure['unit']}", flush=True)

    def fail(self, number: int, tunnel: str, probe: Probe, error: str) -> None:
        for name in probe.names:
            if tunnel == DIRECT and name.startswith("cpu_"):
                continue  # there is no process whose CPU time it could be
            measure = self.measures[name]
            measure["values"].setdefault(tunnel, [None] * self._rounds)
            measure["errors"][tunnel] = error
        print(f"round {number + 1}  {tunnel:<16} {', '.join(probe.names)}: FAILED: {error}", flush=True)


class Run:
    """All stages of a run, one after the other."""

    def __init__(self, chosen: argparse.Namespace, load: Load, directory: Path) -> None:
        self._chosen = chosen
        self._load = load
        self._directory = directory
        self.figures = Figures(chosen.rounds)
        self._verified: set[str] = set()

    def stage(self, stage: Stage) -> None:
        """Measure what belongs to a stage: round by round, probe by probe, tunnel by tunnel."""
        probes = [probe for probe in self._chosen.probes if probe.stage is stage]
        if not probes:
            return
        with ExitStack() as stack:
            try:
                around = surround(stage, self._load, self._directory / stage.name.lower(), stack)
            except StageError as error:
                for probe in probes:
                    for tunnel in self._names(probe):
                        self.figures.fail(0, tunnel, probe, f"not measured: {error}")
                return
            tunnels = stack.enter_context(
                Tunnels(self._chosen.tunnels, self._load, around, self._directory / f"{stage.name.lower()}-tunnels")
            )
            for number in range(self._chosen.rounds):
                for probe in probes:
                    names = self._names(probe)
                    turn = number % max(1, len(names))
                    for name in names[turn:] + names[:turn]:  # nobody is always first
                        self._measure(number, name, probe, tunnels, around)

    def _names(self, probe: Probe) -> list[str]:
        names = [*([DIRECT] if probe.direct else []), *self._chosen.tunnels]
        self.figures.expect(probe, names)
        return names

    def _measure(self, number: int, name: str, probe: Probe, tunnels: Tunnels, around: Surroundings) -> None:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self._directory)))
            bench = Bench(self._load, self._chosen.seconds, directory, self._chosen.tunnels.get(name), path=around.path)
            try:
                if probe.stage is Stage.FRESH:
                    bench.tunnel = tunnels.fresh(name, stack)
                elif probe.stage is not Stage.START:
                    bench.tunnel = tunnels.standing(name)
                if probe.stage is Stage.LOOPBACK:
                    self._verify(bench)
                self.figures.take(number, name, probe.measure(bench))
            except FAILURES as error:
                if _asked_to_leave:  # what ends then fails, and must not hide why
                    sys.exit(128 + _asked_to_leave[0])
                self.figures.fail(number, name, probe, str(error))
                tunnels.forget(name)

    def _verify(self, bench: Bench) -> None:
        """Whoever loses or changes a byte is not measured."""
        if bench.through.name not in self._verified:
            for way in ("up", "down"):
                bench.drive("bulk", "--direction", way, "--bytes", VERIFIED_BYTES, "--verify")
            self._verified.add(bench.through.name)


# --- where and with what --------------------------------------------------------------------------------------------


def said(command: Sequence[str]) -> str:
    """The first line that a command prints, or why it prints none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return next(iter((done.stdout or done.stderr).strip().splitlines()), "unknown")


def machine() -> dict[str, Any]:
    """The machine's processor, memory and system."""
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line.partition(":")[2].strip() for line in processor.splitlines() if "model name" in line), "unknown")
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="ascii").strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "os": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
        "tcp_congestion_control": congestion,
    }


def document(run: Run, chosen: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """The whole result, for `--output`."""
    from ssl import OPENSSL_VERSION

    versions = {"python": platform.python_version(), "openssl": OPENSSL_VERSION, "cc": said(["cc", "--version"])}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions | {name: said(tunnel.version_command) for name, tunnel in chosen.tunnels.items()},
        "commands": {name: [tunnel.server, tunnel.client] for name, tunnel in chosen.tunnels.items()},
        "command": shlex.join(["python", "-m", "tests.benchmarks", *arguments]),
        "rounds": chosen.rounds,
        "measures": run.figures.measures,
    }


_asked_to_leave: list[int] = []
"""The signal that did."""


def _leave(number: int, _: object) -> None:
    _asked_to_leave.append(number)
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # not another time while everything is put away
    sys.exit(128 + number)


def main(arguments: Sequence[str]) -> int:
    """Run it all. Returns 1 if anything failed, else 0."""
    chosen = options(arguments)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for every tunnel alike
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wstunnel-benchmark-") as directory:
        run = Run(chosen, Load(Path(directory)), Path(directory))
        for stage in Stage:
            run.stage(stage)
            if chosen.output:  # after each stage: a run takes long, and may be stopped
                text = json.dumps(document(run, chosen, arguments), indent=1, ensure_ascii=False)
                chosen.output.write_text(text + "\n", encoding="utf-8")
    failed = [name for name, measure in run.figures.measures.items() if measure["errors"]]
    print(f"took {time.monotonic() - begun:.0f} s" + (f"; failed in part: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # in order: every process that was started ends
        signal.signal(number, _leave)
    sys.exit(main(sys.argv[1:]))
