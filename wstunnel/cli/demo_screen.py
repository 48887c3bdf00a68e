"""What the demo prints on stdout: progress, digests, a table, and what to try next."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

import click

from wstunnel.cli import reports
from wstunnel.cli.demo_load import ECHO_BYTES

if TYPE_CHECKING:
    from wstunnel.cli.demo_load import Latency, Transfer

MIB = 1 << 20
STEPS = 4
"""Lines of progress for a transfer where there is no terminal: one each 25 %."""
LABEL = 20
NEXT = """
Between two machines:
  there   wstunnel server --port 443
          wstunnel invite --host THAT-MACHINE
  here    wstunnel login 'wss://...'
          wstunnel client -L 5432:db:5432      then: psql -h localhost"""


class ProgressDisplay:
    """The progress of one transfer: a bar on a terminal, else a line each 25 %. A context manager.

    Args:
        label: the direction.
        total: bytes.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._shown = 0
        self._bar = click.progressbar(length=total, label=f"{label:<5}", show_eta=False)
        self._terminal = sys.stdout.isatty()

    def __enter__(self) -> ProgressDisplay:
        if self._terminal:
            self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            self._bar.__exit__(kind, error, trace)  # brings the cursor back

    def show(self, done: int) -> None:
        """Show that `done` bytes are through."""
        if self._terminal:
            self._bar.update(done - self._shown)
            self._shown = done
            return
        while self._shown < done * STEPS // self._total:
            self._shown += 1
            percent = 100 * self._shown // STEPS
            reports.say(f"{self._label:<5} {percent:>3} %  {self._total * percent // 100 / MIB:>4.0f} MiB")


def report_transfer(label: str, transfer: Transfer) -> None:
    """Both digests, each computed where the bytes were, and whether they agree."""
    verdict = "verified" if transfer.verified else "DIFFERENT"
    reports.say(f"{label:<5} sent    SHA-256 {transfer.sent.hex()}")
    reports.say(f"{label:<5} arrived SHA-256 {transfer.arrived.hex()}  {verdict}")


def report_summary(up: Transfer, down: Transfer, latency: Latency, opens: float) -> None:
    """The table, and what to try next."""
    rows = (
        ("throughput up", f"{up.megabytes_a_second:,.0f} MB/s  ({up.count // MIB} MiB in {up.seconds:.2f} s)"),
        ("throughput down", f"{down.megabytes_a_second:,.0f} MB/s  ({down.count // MIB} MiB in {down.seconds:.2f} s)"),
        (f"echo of {ECHO_BYTES} bytes", f"{latency.p50 * 1e6:,.0f} µs p50, {latency.p99 * 1e6:,.0f} µs p99"),
        ("opens", f"{opens:,.0f} a second  (open, echo, close, one after another)"),
    )
    reports.say("")
    for name, value in rows:
        reports.say(f"{name:<{LABEL}}{value}")
    reports.say(NEXT)
