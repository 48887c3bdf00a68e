"""The only `trio.run`: a role from start to orderly stop, and signals as its exit codes."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import trio

from wstunnel import limits
from wstunnel.cli.reports import UnexpectedError, unwrapped
from wstunnel.errors import WstunnelError

if TYPE_CHECKING:
    from types import FrameType

LEAVE_SECONDS = 0.4
"""Kept back from STOP_SECONDS for the cancelled role's `finally` clauses and the interpreter's own end."""
GARBAGE_THRESHOLDS = (700, 10, 100)
"""For `gc.set_threshold`: Python's own, but full collections a tenth as often. With 9,000 streams one stops everything
for 0.15 s, and it finds next to nothing: streams and links leave no cycles."""
SIGNALS_BEFORE_FORCE = 2
"""The first signal asks, the second cancels, any further one leaves without another word."""


class Role(Protocol):
    """Runs until it is done or `shutdown` is set, then closes everything in good order and returns.

    An integer that it returns is the exit code, unless a signal came. What it tells `task_status` is not used.
    """

    async def __call__(self, *, shutdown: trio.Event, task_status: trio.TaskStatus[Any]) -> int | None: ...


def run(role: Role, exit_codes: Mapping[signal.Signals, int]) -> int:
    """Run a role to its end. Must be called in the main thread.

    The first signal sets the role's `shutdown`, and gives it a little less than `limits.STOP_SECONDS`; then, or at a
    second signal, it is cancelled. A third leaves the process at once.

    Args:
        role: see `Role`.
        exit_codes: the signals to obey, each with the code to exit with when it was the first. SIGHUP is not among
            them where it is ignored already.

    Returns:
        The exit code.

    Raises:
        WstunnelError: the role failed; taken out of any exception group.
        click.exceptions.Exit: stdout's reader has gone.
        UnexpectedError: the role raised something else: a bug, with the exception as its cause.
    """
    # Trio leaves a handler alone that is not Python's own. This one covers the moments before and after the receiver,
    # when nothing is open: raising there would end inside Trio's own machinery.
    before = signal.signal(signal.SIGINT, _leave)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup: whoever started it means it to outlive the terminal
        exit_codes = {number: code for number, code in exit_codes.items() if number != signal.SIGHUP}
    thresholds = gc.get_threshold()
    # 30,000 objects of the modules, which never go, need not be looked at again: 11 ms of every full collection.
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    gc.enable()  # `main` turned it off
    try:
        return trio.run(_supervised, role, exit_codes)
    except Exception as error:
        found = unwrapped(error)
        if isinstance(found, WstunnelError) or type(found).__module__.startswith("click."):
            raise found from None
        raise UnexpectedError(str(found)) from found
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        signal.signal(signal.SIGINT, before)


async def _supervised(role: Role, exit_codes: Mapping[signal.Signals, int]) -> int:
    shutdown = trio.Event()
    scope = trio.CancelScope()
    received: list[int] = []

    async def obey() -> None:
        async for number in arrivals:
            received.append(number)
            if len(received) > SIGNALS_BEFORE_FORCE:
                os._exit(128 + number)
            if len(received) == SIGNALS_BEFORE_FORCE:
                scope.cancel()
                continue
            shutdown.set()
            scope.deadline = trio.current_time() + limits.STOP_SECONDS - LEAVE_SECONDS

    result: int | None = None
    with trio.open_signal_receiver(*exit_codes) as arrivals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey)
            with scope:
                result = await role(shutdown=shutdown, task_status=trio.TASK_STATUS_IGNORED)
            nursery.cancel_scope.cancel()
    if received:
        return exit_codes[signal.Signals(received[0])]
    return result or 0


def _leave(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)
