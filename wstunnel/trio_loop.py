"""Trio's own event loop, as far as a task must know it to wait in its place.

To wait through Trio costs a pass through its scheduler for each event, 20 to 40 µs. A task that blocks in a selector of
its own saves that, and is no worse a neighbour than Trio's own wait, as long as it blocks only while no other task can
run, wakes when the next deadline is due, and has Trio's selector among what it waits for: signals, threads and all
other tasks' sockets make that one readable.

The selector and the deadlines are no documented API. So `find` says None when anything is not as it was in the versions
that this was written for, and its caller waits through Trio.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.lowlevel import Task

ASIDE_SECONDS = 0.001
"""How long the caller sleeps in Trio for those who wait until all tasks are blocked. Only tests do."""


class TrioLoop(trio.abc.Instrument):
    """The loop that runs the caller, a task.

    Attributes:
        fd: Trio's selector: readable when a socket, a thread or a signal has something for one of its tasks.
        time: `trio.current_time`, at half of its cost.
    """

    def __init__(self, runner: Any, task: Any, fd: int) -> None:
        self.fd = fd
        self.time: Callable[[], float] = runner.clock.current_time
        self._runner = runner
        self._task = task
        # Not Trio's queue: that is emptied into a batch before the first task of it runs.
        self._due: set[Task] = set()

    def task_scheduled(self, task: Task) -> None:
        """Trio's: it will run."""
        self._due.add(task)

    def before_task_step(self, task: Task) -> None:
        """Trio's: it runs now."""
        self._due.discard(task)

    def due(self) -> float:
        """When another task is due, if nothing happens before: -infinity when one can run now, infinity for never."""
        # A cancellation is not scheduled for the task that runs: it meets it when it next waits in Trio.
        if self._due or self._runner.waiting_for_idle or self._task._cancel_status.effectively_cancelled:
            return -math.inf
        deadline: float = self._runner.deadlines.next_deadline()
        return deadline

    async def step_aside(self, *, idle: bool) -> None:
        """Let all other tasks run that can. `idle`: the caller found nothing to do."""
        if idle and self._runner.waiting_for_idle:
            # `trio.testing.wait_all_tasks_blocked` must see the caller blocked, in Trio, for its longest cushion.
            cushion: float = self._runner.waiting_for_idle.keys()[-1][0]
            await trio.sleep(cushion + ASIDE_SECONDS)
        else:
            await trio.lowlevel.checkpoint()


async def find() -> TrioLoop | None:
    """The loop that runs this task; None where nobody can wait in its place.

    It is for one task, which calls `trio.lowlevel.remove_instrument` with it when it is done.
    """
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT, SystemClock  # may fail: see above

        runner = GLOBAL_RUN_CONTEXT.runner
        if not isinstance(runner.clock, SystemClock) or runner.is_guest:
            return None  # a mock clock jumps when all tasks are blocked in Trio; a guest's host waits elsewhere
        if any(isinstance(instrument, TrioLoop) for instrument in runner.instruments["_all"]):
            return None  # two would each find the other one due, and never wait
        loop = TrioLoop(runner, GLOBAL_RUN_CONTEXT.task, runner.io_manager._epoll.fileno())
        loop.due() - loop.time()  # both are numbers
    except (ImportError, AttributeError, LookupError, TypeError):
        return None
    trio.lowlevel.add_instrument(loop)
    try:
        for _ in range(2):  # by then all that was scheduled unseen has run
            await trio.lowlevel.checkpoint()
    except BaseException:
        trio.lowlevel.remove_instrument(loop)
        raise
    return loop
