"""`wstunnel demo`: the whole thing as processes of this machine, over TLS: transfers, cut and verified, and timings."""

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
    from wstunnel.cli.demo_processes import Child, Processes
    from wstunnel.cli.demo_relay import Cut

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

    Starts server, clients and a target, sends 256 MiB each way over TLS, resets all connections half-way through each,
    and verifies what arrived. Then it measures latency and opens. Takes some seconds, needs neither root nor a network,
    and leaves nothing behind.
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
        tunnels = await _started(processes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(processes.watch)
            progress = Progress()
            cut, direct = (Load(("127.0.0.1", port), progress) for port in (tunnels.cut, tunnels.direct))
            try:
                await _measure(plan, cut, direct, tunnels.relay, progress)
            finally:
                progress.stopped = True
            nursery.cancel_scope.cancel()


@dataclass(frozen=True)
class Tunnels:
    """The ports of two clients of one server, both of which lead to the target.

    Attributes:
        relay: carries the links of the first client, and cuts them when told to.
        cut: port of the client behind it.
        direct: port of the other client, which latency and opens are measured with: the relay would add to them.
    """

    relay: Child
    cut: int
    direct: int


async def _started(processes: Processes) -> Tunnels:
    """Start target, server, relay and clients."""
    from wstunnel.cli.invite import invitation
    from wstunnel.state import read_announcement

    def printed_port(child: Child) -> int | None:
        text = child.stdout
        return int(text.split()[-1]) if text.endswith("\n") else None

    def client(name: str, port: int | None) -> Child:
        # Each as a user of its own: a user's next client displaces one that has no connection.
        url = invitation(state, name, ("127.0.0.1", port)).reveal()
        arguments = ("client", "-L", to_target)
        return processes.start(name, "wstunnel.cli.demo_child", *arguments, environment={"WSTUNNEL_URL": url})

    reports.say("starting target, server, two clients and a relay, each a process of its own")
    target = processes.start("target", "wstunnel.cli.demo_target")
    state: Path = processes.directory / "server"
    flags = ("--bind", "127.0.0.1", "--port", "0", "--state-dir", str(state))
    server = processes.start("server", "wstunnel.cli.demo_child", "server", *flags)
    to_target = f"0:127.0.0.1:{await processes.ready(target, partial(printed_port, target))}"
    announcement = await processes.ready(server, partial(read_announcement, state))
    relay = processes.start("relay", "wstunnel.cli.demo_relay", str(announcement.port))
    direct = client("direct-client", None)
    cut = client("client", await processes.ready(relay, partial(printed_port, relay)))
    ports = [await processes.ready(child, partial(listening_port, child)) for child in (cut, direct)]
    return Tunnels(relay, *ports)


def listening_port(client: Child) -> int | None:
    """Where a client listens, as soon as it has said so."""
    return announced_port(client.stderr)


def announced_port(log: str) -> int | None:
    """The port in the client's line `listening 127.0.0.1:PORT -> …`, once that line is complete."""
    import re

    found = re.search(r"listening 127\.0\.0\.1:(\d+) -> .*\n", log)
    return int(found[1]) if found else None


async def _measure(plan: Plan, cut: Load, direct: Load, relay: Child, progress: Progress) -> None:
    from wstunnel.cli import demo_screen
    from wstunnel.errors import LocalError

    for load in (cut, direct):
        await _in_thread("the first stream", load.first_echo)
    up = await _transferred("up", plan.transfer_bytes, cut.upload, relay, progress)
    down = await _transferred("down", plan.transfer_bytes, cut.download, relay, progress)
    if not (up[0].verified and down[0].verified):
        raise LocalError("what arrived is not what was sent: please report this")
    latency = await _in_thread("latency", partial(direct.latency, plan.round_trips))
    opens = await _in_thread("opens", partial(direct.opens_a_second, plan.opens_seconds))
    demo_screen.report_summary(up, down, latency, opens)


async def _transferred(
    label: str, total: int, transfer: Callable[[int], Transfer], relay: Child, progress: Progress
) -> tuple[Transfer, Cut]:
    """Carry out a transfer, have all connections cut half-way, show how far it is, then the digests.

    Raises:
        LocalError: the stream was lost, or there was no cut that it could have been lost in.
    """
    import trio

    from wstunnel.cli import demo_screen
    from wstunnel.cli.demo_relay import parse_cuts
    from wstunnel.errors import LocalError

    def latest() -> Cut | None:
        return cuts[-1] if len(cuts := parse_cuts(relay.stdout)) > before else None

    async def draw() -> None:
        while True:
            display.show(progress.done, latest())
            await trio.sleep(DRAW_SECONDS)

    before = len(parse_cuts(relay.stdout))
    progress.done = 0
    relay.tell(str(total // 2))
    with demo_screen.ProgressDisplay(label, total) as display:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(draw)
            try:
                done = await _in_thread(label, partial(transfer, total))
            except LocalError as error:
                if (cut := latest()) is None or cut.pause is not None:
                    raise
                raise LocalError(f"the stream did not outlive the cut of its connection: {error}") from error
            nursery.cancel_scope.cancel()
        cut = latest()
        display.show(total, cut)
    demo_screen.report_transfer(label, done)
    if cut is None or not cut.carrying:
        raise LocalError(f"the connection of the stream was not cut ({label}), so this shows nothing: please report it")
    if cut.pause is None:
        raise LocalError(f"after the cut no data came over a new connection ({label}): please report this")
    return done, cut


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
