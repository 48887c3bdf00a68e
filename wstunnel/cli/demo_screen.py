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
    from wstunnel.cli.demo_relay import Cut

MIB = 1 << 20
STEPS = 4
"""Lines of progress for a transfer where there is no terminal: one each 25 %."""
LABEL = 20
BAR = 26
"""Characters of the bar: with what is said beside it the line fits into 80."""
NEXT = """
Between two machines:
  there   wstunnel server --port 443
          wstunnel invite --host THAT-MACHINE
  here    wstunnel login 'wss://...'
          wstunnel client -L 5432:db:5432      then: psql -h localhost"""


class ProgressDisplay:
    """The progress of one transfer, and its cut: a bar on a terminal, else a line each 25 %. A context manager.

    Args:
        label: the direction.
        total: bytes.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._shown = 0
        self._cut: Cut | None = None
        self._bar = click.progressbar(
            length=total, label=f"{label:<5}", show_eta=False, width=BAR, item_show_func=self._beside
        )
        self._terminal = sys.stdout is not None and sys.stdout.isatty()  # None: descriptor 1 was closed

    def __enter__(self) -> ProgressDisplay:
        if self._terminal:
            self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            self._bar.__exit__(kind, error, trace)  # brings the cursor back
            if self._cut is not None and kind is None:
                self._say_cut(self._cut)

    def show(self, done: int, cut: Cut | None) -> None:
        """Show that `done` bytes are through, and what is known of the cut."""
        if self._terminal:
            news, self._cut = cut != self._cut, cut
            self._bar.update(done - self._shown)
            self._shown = done
            if news:
                self._bar.render_progress()  # while nothing moves an update draws nothing
            return
        if cut is not None and cut.pause is not None and self._cut is None:
            self._steps(min(done, self._total // 2))
            self._cut = cut
            self._say_cut(cut)
        self._steps(done)

    def _steps(self, done: int) -> None:
        while self._shown < done * STEPS // self._total:
            self._shown += 1
            percent = 100 * self._shown // STEPS
            reports.say(f"{self._label:<5} {percent:>3} %  {self._total * percent // 100 / MIB:>4.0f} MiB")

    def _beside(self, _item: int | None) -> str | None:
        if self._cut is None:
            return None
        after = " ..." if self._cut.pause is None else f", on after {self._cut.pause:.2f} s"
        return f"cut {self._cut.connections} links{after}"

    def _say_cut(self, cut: Cut) -> None:
        after = "not gone on" if cut.pause is None else f"went on after {cut.pause:.2f} s"
        reports.say(
            f"{self._label:<5} cut {cut.connections} connections at {self._total // 2 / MIB:.0f} MiB ... {after}"
        )


def report_transfer(label: str, transfer: Transfer) -> None:
    """Both digests, each computed where the bytes were, and whether they agree."""
    verdict = "verified" if transfer.verified else "DIFFERENT"
    reports.say(f"{label:<5} sent    SHA-256 {transfer.sent.hex()}")
    reports.say(f"{label:<5} arrived SHA-256 {transfer.arrived.hex()}  {verdict}")


def report_summary(up: tuple[Transfer, Cut], down: tuple[Transfer, Cut], latency: Latency, opens: float) -> None:
    """The table, and what to try next. Both transfers were cut, went on, and are verified."""
    pauses = [cut.pause or 0.0 for _, cut in (up, down)]
    connections = " and ".join(str(cut.connections) for _, cut in (up, down))
    rows = (
        ("throughput up", _throughput(up[0], pauses[0])),
        ("throughput down", _throughput(down[0], pauses[1])),
        (
            "pause after a cut",
            f"{pauses[0]:.2f} s up, {pauses[1]:.2f} s down  ({connections} reset, nothing lost)",
        ),
        (f"echo of {ECHO_BYTES} bytes", f"{latency.p50 * 1e6:,.0f} µs p50, {latency.p99 * 1e6:,.0f} µs p99"),
        ("opens", f"{opens:,.0f} a second  (open, echo, close, one after another)"),
    )
    reports.say("")
    for name, value in rows:
        reports.say(f"{name:<{LABEL}}{value}")
    reports.say(NEXT)


def _throughput(transfer: Transfer, pause: float) -> str:
    seconds = transfer.seconds - pause
    rate = transfer.count / 1e6 / seconds
    return f"{rate:,.0f} MB/s  ({transfer.count // MIB} MiB in {seconds:.2f} s, through the relay, the pause apart)"
