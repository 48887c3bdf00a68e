"""`wstunnel demo`: server, client and target as processes of this machine, over TLS; transfers verified, then timed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from wstunnel.cli import options, reports

if TYPE_CHECKING:
    from pathlib import Path

    import trio

    from wstunnel.cli.demo_load import Load, Progress, Transfer
    from wstunnel.cli.demo_processes import Processes

T = TypeVar("T")

MIB = 1 << 20
DRAW_SECONDS = 0.05
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@dataclass(frozen=True)
class Plan:
    """How much the demo does."""

    transfer_bytes: int = 256 * MIB
    round_trips: int = 2000
    opens_seconds: float = 1.0


@click.command(
    epilog="""\b
    Example:
      wstunnel demo
    """
)
@options.verbosity
def demo() -> int:
    """Show the whole thing at work on this machine.

    Starts server, client and a target, sends 256 MiB each way over TLS and verifies them, then measures latency and
    opens. Takes some seconds, needs neither root nor a network, and leaves nothing behind.
    """
    return run(Plan())


def run(plan: Plan) -> int:
    """Carry out the plan and return the exit code. Raises as `running.run` does."""
    from wstunnel.cli import running

    return running.run(partial(_role, plan), EXIT_CODES)


async def _role(plan: Plan, *, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> None:
    import trio

    async def stop() -> None:
        await shutdown.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop)
        task_status.started()
        await _demonstrate(plan)
        nursery.cancel_scope.cancel()


async def _demonstrate(plan: Plan) -> None:
    import trio

    from wstunnel.cli.demo_load import Load, Progress
    from wstunnel.cli.demo_processes import Processes

    async with Processes() as processes:
        port = await _started(processes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(processes.watch)
            progress = Progress()
            try:
                await _measure(plan, Load(("127.0.0.1", port), progress), progress)
            finally:
                progress.stopped = True
            nursery.cancel_scope.cancel()


async def _started(processes: Processes) -> int:
    """Start target, server and client, and return the port that leads to the target."""
    from wstunnel.cli.demo_processes import Child
    from wstunnel.cli.invite import invitation
    from wstunnel.state import read_announcement

    def target_port(child: Child) -> int | None:
        text = child.stdout
        return int(text) if text.endswith("\n") else None

    reports.say("starting target, server and client, each a process of its own")
    target = processes.start("target", "wstunnel.cli.demo_target")
    state: Path = processes.directory / "server"
    flags = ("--bind", "127.0.0.1", "--port", "0", "--state-dir", str(state))
    server = processes.start("server", "wstunnel.cli.demo_child", "server", *flags)
    to_target = f"0:127.0.0.1:{await processes.ready(target, partial(target_port, target))}"
    await processes.ready(server, partial(read_announcement, state))
    url = invitation(state, "demo", ("127.0.0.1", None)).reveal()
    client = processes.start(
        "client", "wstunnel.cli.demo_child", "client", "-L", to_target, environment={"WSTUNNEL_URL": url}
    )
    return await processes.ready(client, lambda: announced_port(client.stderr))


def announced_port(log: str) -> int | None:
    """The port in the client's line `listening 127.0.0.1:PORT -> …`, once that line is complete."""
    import re

    found = re.search(r"listening 127\.0\.0\.1:(\d+) -> .*\n", log)
    return int(found[1]) if found else None


async def _measure(plan: Plan, load: Load, progress: Progress) -> None:
    from wstunnel.cli import demo_screen
    from wstunnel.errors import LocalError

    await _in_thread("the first stream", load.first_echo)
    up = await _shown("up", plan.transfer_bytes, load.upload, progress)
    down = await _shown("down", plan.transfer_bytes, load.download, progress)
    if not (up.verified and down.verified):
        raise LocalError("what arrived is not what was sent: please report this")
    latency = await _in_thread("latency", partial(load.latency, plan.round_trips))
    opens = await _in_thread("opens", partial(load.opens_a_second, plan.opens_seconds))
    demo_screen.report_summary(up, down, latency, opens)


async def _shown(label: str, total: int, transfer: Callable[[int], Transfer], progress: Progress) -> Transfer:
    """Carry out a transfer and show how far it is, then the digests."""
    import trio

    from wstunnel.cli import demo_screen

    async def draw() -> None:
        while True:
            display.show(progress.done)
            await trio.sleep(DRAW_SECONDS)

    progress.done = 0
    with demo_screen.ProgressDisplay(label, total) as display:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(draw)
            done = await _in_thread(label, partial(transfer, total))
            nursery.cancel_scope.cancel()
        display.show(total)
    demo_screen.report_transfer(label, done)
    return done


async def _in_thread(what: str, work: Callable[[], T]) -> T:
    """Run blocking work. When cancelled it is left to end by itself, which it does as soon as its stream breaks."""
    import trio

    from wstunnel.cli.demo_processes import POLL_SECONDS
    from wstunnel.errors import LocalError

    try:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)
    except (OSError, EOFError) as error:
        await trio.sleep(10 * POLL_SECONDS)  # if a process died, the watch says so, which says more than this
        raise LocalError(f"the demo failed ({what}): {error}") from error
