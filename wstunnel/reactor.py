"""The selector inside one Trio task: it calls a handler when its socket can be read or written.

Trio decides who lives, the reactor moves the bytes. A socket that only carries bytes any more is handed over with
`adopt`; from then on plain functions (`on_readable`, `on_writable`) are called for it, which never wait, do a bounded
piece of work, and share one read buffer. There are two drivers: `EpollReactor` for Linux, and `TaskReactor`, with one
small Trio task a direction, for all the rest.

Work goes in batches. A batch is what the selector reported plus what `again` asked for, each handler once; it is served
whole before the next one is collected, so every ready socket gets its turn. A turn is the time between two looks at the
other Trio tasks; when it is up, the rest of the batch is kept and goes first in the next turn. A batch is keyed by
handler and never by descriptor number, since other tasks close and open descriptors between turns.

Alarms (`at`) are not part of a turn. Where `run` waits in Trio's place its wait ends for the earliest of them; else a
second task waits for that, since a wait through Trio with a time-out costs more than both.

Everything here belongs to the thread that runs Trio.
"""

from __future__ import annotations

import errno
import heapq
import logging
import math
import os
import select
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import trio

from wstunnel import limits, trio_loop
from wstunnel.errors import LocalError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from wstunnel.trio_loop import TrioLoop

# The numbers of epoll, written out: `select` has the names on Linux only, and both drivers use them.
READ = 1
WRITE = 4
_AGAIN = 2  # EPOLLPRI, which is never asked for: marks what `again` queued
_BROKEN = 8 | 16  # EPOLLERR | EPOLLHUP: reported whether asked for or not
_EDGE = 1 << 31  # EPOLLET

BATCHES = 8
"""Batches in one turn while events keep coming. A pass through Trio costs 20 µs and a poll less than one; more than
this gained nothing, and the other tasks should not wait for the whole of TURN_SECONDS while little happens."""

PATIENCE_SECONDS = 24 * 3600.0
"""Longest wait in Trio's place, as Trio's own."""

KEPT_BYTES = 2 * limits.MIB
"""A block of this size, freed once, has glibc's malloc keep up to twice as much free memory at the heap's end, and map
no smaller block on its own (mallopt(3), M_MMAP_THRESHOLD). What a frame needs, masked and joined, would otherwise be
given back and faulted in anew for each: 96 page faults for a frame of 256 KiB."""

_logger = logging.getLogger(__name__)


class Handler:
    """One socket on the reactor. Subclasses call `super().__init__()` and keep equality by identity.

    The callbacks never wait and do a bounded piece of work; what is left over is asked for with `Reactor.again`. A call
    may find nothing to do: `BlockingIOError` and `ssl.SSLWantReadError` are no failures.

    Attributes:
        sock: the socket, non-blocking; None before `adopt` and after `drop` or `release`.
        fd: its descriptor; -1 whenever `sock` is None.
        mask: what is wanted, of READ and WRITE; changed only through `Reactor.want`.
        reactor: where it was adopted; set by `adopt`, and stays after `drop`.
    """

    __slots__ = ("fd", "mask", "reactor", "sock")

    sock: socket.socket | None
    fd: int
    mask: int
    reactor: Reactor

    def __init__(self) -> None:
        self.sock = None
        self.fd = -1
        self.mask = 0

    def on_readable(self) -> None:
        """READ is wanted, and there are bytes, an EOF or an error to be read, or `again` or `adopt` asked for it.

        After an EOF READ must not stay wanted: an EOF is readable for ever.
        """
        raise NotImplementedError

    def on_writable(self) -> None:
        """WRITE is wanted, and there is room, or an error that the next write will raise."""
        raise NotImplementedError

    def on_hangup(self) -> None:
        """The connection broke (reset, or closed both ways) while nothing was wanted.

        Called once for each change to an empty mask. Only `EpollReactor` can see it; see `TaskReactor`.
        """
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """`error` escaped from a callback. Must drop what belongs to this handler, and nothing else.

        An exception from here is logged, and the reactor drops the handler.
        """
        raise NotImplementedError


class Reactor(ABC):
    """Calls the handlers of many sockets from one Trio task. `make_reactor` picks the driver.

    `adopt`, `want`, `again`, `later`, `at`, `drop` and `release` may be called from callbacks and from any Trio task;
    none of them runs a callback before it returns. Sockets may be adopted before `run`; they are served once it runs.

    Args:
        clock: seconds, for the length of a turn only.

    Attributes:
        scratch: the read buffer that all handlers share, SCRATCH_BYTES long. What is in it is gone once the callback
            returns.
        reports_hangups: whether `on_hangup` is ever called; if not, the owner polls sockets with an empty mask.
    """

    reports_hangups = True

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        bytes(KEPT_BYTES)  # mapped, never touched, and freed
        self.scratch = memoryview(bytearray(limits.SCRATCH_BYTES))
        self._clock = clock
        self._now: float | None = None
        self._handlers: dict[int, Handler] = {}  # by descriptor
        self._queue: dict[Handler, int] = {}  # events of the next batch that no selector will report
        self._batch: dict[Handler, int] = {}  # events of this batch; a drop sets them to 0, since it is being iterated
        self._rest: Iterator[tuple[Handler, int]] | None = None  # where in the batch the turn was cut
        self._later: list[Callable[[], None]] = []
        self._owed: set[Handler] = set()  # get their on_readable, asked for by `again`, once READ is wanted
        self._hung_up: set[Handler] = set()  # on_hangup was called since the mask became empty
        self._alarms: list[tuple[float, int, Callable[[], None]]] = []  # a heap; numbers keep equal times in order
        self._alarm_number = 0
        self._nap: trio.CancelScope | None = None  # its deadline is the earliest alarm
        self._waiting = False
        self._started = False
        self._stopped = False
        self._trio: TrioLoop | None = None  # waits in its place
        self._time: Callable[[], float] = trio.current_time

    @property
    def now(self) -> float:
        """`trio.current_time()` at the start of this turn or pass over the alarms: a cheap clock. Else exact."""
        return self._time() if self._now is None else self._now

    @staticmethod
    def spent() -> float:
        """Seconds of processor time that this thread has used: for callbacks that pace themselves."""
        return time.thread_time()

    def adopt(self, handler: Handler, sock: socket.socket, mask: int = READ, *, look: bool = True) -> None:
        """Take `sock` over: it becomes non-blocking, and only `drop` closes it.

        After the reactor has stopped the socket is closed at once, and `handler.fd` stays -1.

        Args:
            handler: of the socket.
            sock: open, and its timeout as Python knows it (`gettimeout`) is that of the descriptor.
            mask: what is wanted, of READ and WRITE.
            look: `on_readable` runs once in the next turn, or else when READ is first wanted, whatever the selector
                says: bytes may be waiting inside OpenSSL. False for a plain socket, of which the selector knows all.

        Raises:
            RuntimeError: `handler` is on a reactor already.
            ValueError: `sock` is closed.
            LocalError: the selector refuses the descriptor (a regular file, too many watches). In all three cases
                nothing has changed, and the caller still owns `sock`.
        """
        if handler.fd >= 0:
            raise RuntimeError(f"{handler!r} is on a reactor already (descriptor {handler.fd})")
        handler.reactor = self
        if self._stopped:
            _close(sock)
            return
        fd = sock.fileno()
        if fd < 0:
            raise ValueError(f"cannot adopt a closed socket for {handler!r}")
        handler.mask = mask
        handler.fd = fd
        try:
            self._watch(handler)
        except OSError as error:
            handler.mask, handler.fd = 0, -1
            raise LocalError(_refused(fd, error)) from error
        if sock.gettimeout() != 0.0:  # 0.0 says that it is done: a system call less
            sock.setblocking(False)
        handler.sock = sock
        self._handlers[fd] = handler
        if look:
            self.again(handler)

    def want(self, handler: Handler, mask: int) -> None:
        """Change what `handler` waits for: READ, WRITE, both or 0. Does nothing once it was dropped."""
        old = handler.mask
        if mask == old or handler.fd < 0:
            return
        handler.mask = mask
        self._change(handler, old)
        if not mask:
            self._hung_up.discard(handler)
        elif mask & READ and handler in self._owed:
            self._owed.discard(handler)
            self.again(handler)

    def again(self, handler: Handler) -> None:
        """Run `on_readable` in the next batch, without waiting for the selector.

        For a TLS socket whose decrypted bytes no selector sees, and for work that was cut short. While READ is not
        wanted the call is owed: it runs when READ is wanted again. Does nothing once `handler` was dropped.
        """
        if handler.mask & READ:
            self._queue[handler] = self._queue.get(handler, 0) | _AGAIN
            if self._waiting:
                self._wake()
        elif handler.fd >= 0:
            self._owed.add(handler)

    def later(self, function: Callable[[], None]) -> None:
        """Run `function` once: at the end of this batch or turn, or of the next one when called from outside.

        For gathering what many callbacks ask for. It never waits and is short: the turn's length does not cut it. An
        exception from it is logged. After the reactor has stopped it is not run.
        """
        if self._stopped:
            return
        self._later.append(function)
        if self._waiting:
            self._wake()

    def at(self, when: float, function: Callable[[], None]) -> None:
        """Run `function` once when `trio.current_time()` is `when`, or a little later; outside of any turn.

        Exact to Trio's timers, and in order of `when`; those of equal times in the order of the calls. It cannot be
        cancelled: `function` looks whether it is still wanted, and is held until then. It never waits and is short; it
        may call everything that a callback may, and callbacks of handlers as well. An exception from it is logged.
        Before `run` it waits for it; after the reactor has stopped it is not run.

        Raises:
            ValueError: `when` is NaN.
        """
        if math.isnan(when):  # it has no place in a heap, and all that is behind it would never run
            raise ValueError(f"no time to run {function!r} at: {when}")
        if self._stopped:
            return
        self._alarm_number += 1
        heapq.heappush(self._alarms, (when, self._alarm_number, function))
        if self._nap is not None and when < self._nap.deadline:
            self._nap.deadline = when

    def drop(self, handler: Handler) -> None:
        """Take `handler` off and close its socket at once; nothing is called for it any more. May be repeated."""
        if handler.fd >= 0:
            _close(self._take(handler))

    def release(self, handler: Handler) -> socket.socket:
        """Take `handler` off without closing: the caller owns the (non-blocking) socket that is returned.

        Raises:
            RuntimeError: `handler` is on no reactor.
        """
        if handler.fd < 0:
            raise RuntimeError(f"{handler!r} is on no reactor: nothing to release")
        return self._take(handler)

    @abstractmethod
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then drop every handler, which closes every socket, without waiting for anything.

        Once in a reactor's life. Only what is no `Exception` escapes from a callback (KeyboardInterrupt); it ends the
        reactor in the same way.

        Raises:
            RuntimeError: it has run before.
            OSError: the process has no descriptor left for the selector's own use.
        """

    @abstractmethod
    def _watch(self, handler: Handler) -> None:
        """Start waiting for `handler.mask`. Raises OSError if the descriptor cannot be watched."""

    @abstractmethod
    def _change(self, handler: Handler, old: int) -> None:
        """Wait for `handler.mask`, which was `old`."""

    @abstractmethod
    def _unwatch(self, handler: Handler, fd: int) -> None:
        """Stop waiting for anything on `fd`, which is still open."""

    @abstractmethod
    def _poll(self, batch: dict[Handler, int]) -> None:
        """Add to `batch` what the selector has to report right now."""

    @abstractmethod
    def _wake(self) -> None:
        """End the wait of `run`. Called only while `_waiting`."""

    def _start(self) -> None:
        if self._started:
            raise RuntimeError("a reactor runs once: make a new one")
        self._started = True

    def _stop(self) -> None:
        self._stopped = True
        self._waiting = False
        self._now = None
        for handler in list(self._handlers.values()):
            self.drop(handler)
        self._rest = None
        self._batch.clear()
        self._later.clear()
        self._alarms.clear()

    def _take(self, handler: Handler) -> socket.socket:
        fd, sock = handler.fd, handler.sock
        assert sock is not None  # fd >= 0 says so
        handler.fd, handler.mask, handler.sock = -1, 0, None
        self._queue.pop(handler, None)
        if handler in self._batch:
            self._batch[handler] = 0
        self._owed.discard(handler)
        self._hung_up.discard(handler)
        # If somebody closed the socket, against the rule, the number may be another handler's by now.
        if self._handlers.get(fd) is handler:
            del self._handlers[fd]
            self._unwatch(handler, fd)
        return sock

    @property
    def _busy(self) -> bool:
        return self._rest is not None or bool(self._queue or self._later)

    def _turn(self) -> bool:
        """Serve what there is. Returns whether there was anything."""
        self._now = self._time()
        end = self._clock() + limits.TURN_SECONDS
        served = False
        try:
            for _ in range(BATCHES):
                if self._rest is None:
                    # The batch that was served and emptied becomes the queue: the data path makes no dictionary.
                    self._batch, self._queue = self._queue, self._batch
                    self._poll(self._batch)
                    if not self._batch and not self._later:
                        return served
                    self._rest = iter(self._batch.items())
                served = True
                within = self._serve(self._rest, end)
                self._run_later()
                if not within or (self._trio is not None and not self._queue):
                    break
        finally:
            self._now = None
        return served

    def _serve(self, rest: Iterator[tuple[Handler, int]], end: float) -> bool:
        """Call the handlers of the batch until `end` by the clock. Returns whether there is time left."""
        clock = self._clock
        # Masks are looked at before each call, not before the batch: any callback may have changed any of them.
        for handler, events in rest:
            self._call(handler, events)
            if clock() >= end:
                return False
        self._rest = None
        self._batch.clear()  # now, not at the next event: it holds handlers that were dropped
        return True

    def _call(self, handler: Handler, events: int) -> None:
        try:
            if events & _BROKEN:
                events = self._broken(handler, events)
            if events & (READ | _AGAIN):
                if handler.mask & READ:
                    handler.on_readable()
                elif events & _AGAIN and handler.fd >= 0:
                    self._owed.add(handler)
            if events & WRITE and handler.mask & WRITE:
                handler.on_writable()
        except Exception as error:  # one handler's fault must not touch another's socket
            self._fail(handler, error)

    def _broken(self, handler: Handler, events: int) -> int:
        """Turn ERR and HUP into the one call that will find out what is wrong. Returns the events that remain."""
        if handler.mask:
            return events | (handler.mask & READ or WRITE)
        if handler.fd >= 0 and handler not in self._hung_up:
            self._hung_up.add(handler)
            handler.on_hangup()
        return events

    def _fail(self, handler: Handler, error: Exception) -> None:
        try:
            handler.fail(error)
        except Exception:
            _logger.exception("%r failed on %r, and so did its fail(): dropped", handler, error)
            self.drop(handler)

    def _run_later(self) -> None:
        # What these add waits for the next batch: a function that puts itself back must not hold the turn.
        if self._later:
            functions, self._later = self._later, []
            for function in functions:
                try:
                    function()
                except Exception:
                    _logger.exception("%r, put off to the end of the turn, failed", function)

    async def _run_alarms(self) -> None:
        """Run what `at` was given, until cancelled. Beside `run`, in the same nursery."""
        while True:
            # Not an Event: to move the deadline of a scope costs less than to wake a task that only sleeps again.
            with trio.CancelScope(deadline=self._alarms[0][0] if self._alarms else math.inf) as self._nap:
                await trio.sleep_forever()
            self._run_due()

    def _run_due(self) -> None:
        # What these add waits for the next pass, even if it is due: see `_run_later`. So does what exceeds a turn.
        alarms, clock, last = self._alarms, self._clock, self._alarm_number
        self._now = now = self._time()
        end = clock() + limits.TURN_SECONDS
        try:
            while alarms and alarms[0][0] <= now and alarms[0][1] <= last:
                function = heapq.heappop(alarms)[2]
                try:
                    function()
                except Exception:
                    _logger.exception("%r, put off to its time, failed", function)
                if clock() >= end:
                    return
        finally:
            self._now = None


class EpollReactor(Reactor):
    """One level-triggered epoll object, itself awaited by Trio when there is nothing to do. Linux.

    With an empty mask a socket is registered edge-triggered: level-triggered it would report HUP for ever, and an
    unregistered one would hide a reset.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock)
        self._epoll = select.epoll()
        self._bell = -1
        self._found: list[tuple[int, int]] | None = None  # by the wait; what `_poll` would find
        self._trio_ready = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._start()
        try:
            # An eventfd is the cheapest way out of the wait: a cancel scope costs something for every wait, this only
            # for those that are ended by it. Edge-triggered, so nobody has to read it.
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._epoll.register(self._bell, READ | _EDGE)
        except BaseException:
            self._stop()
            raise
        async with trio.open_nursery() as nursery:
            try:
                self._trio = await trio_loop.find()
                if self._trio is not None and not self._waits_for(self._trio):
                    self._trio = None
                task_status.started()
                if self._trio is None:
                    nursery.start_soon(self._run_alarms)
                    await self._serve_through_trio()
                else:
                    await self._serve_in_place_of(self._trio)
            finally:
                self._stop()  # here and not behind the nursery, whose end is another pass through Trio
                if self._trio is not None:
                    trio.lowlevel.remove_instrument(self._trio)

    def _waits_for(self, loop: TrioLoop) -> bool:
        """Have Trio's selector end our wait. False if it cannot be watched (too many watches of this user)."""
        try:
            self._epoll.register(loop.fd, READ)
        except OSError:
            trio.lowlevel.remove_instrument(loop)
            return False
        return True

    async def _serve_through_trio(self) -> None:
        while True:
            if self._busy:
                await trio.lowlevel.checkpoint()
            else:
                self._waiting = True
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                self._waiting = False
            self._turn()

    async def _serve_in_place_of(self, loop: TrioLoop) -> None:
        """Wait here while no other task can run: see `trio_loop`."""
        self._time = time = loop.time
        poll, handlers, alarms = self._epoll.poll, self._handlers, self._alarms
        idle = False
        while True:
            await loop.step_aside(idle=idle)
            self._trio_ready = False
            if alarms and alarms[0][0] <= time():
                self._run_due()
            idle = (self._busy or loop.due() <= time()) and not self._turn()
            # `_busy` is written out: this is asked before each wait.
            while not (self._trio_ready or self._queue or self._later or self._rest):
                due, now = loop.due(), time()
                if due <= now:
                    break
                if alarms and alarms[0][0] < due:
                    due = alarms[0][0]
                    if due <= now:
                        self._run_due()
                        due = now
                # Not longer than Trio would: epoll takes at most 2^31 ms, 25 days, and some deadline may be later.
                found = poll(due - now if due < now + PATIENCE_SECONDS else PATIENCE_SECONDS)
                if len(found) == 1 and (handler := handlers.get(found[0][0])) is not None:
                    # A whole turn: most are of one event, and need no batch.
                    self._now = time()
                    self._call(handler, found[0][1])
                    if self._later:
                        self._run_later()
                    self._now = None
                else:
                    self._found = found
                    self._turn()

    def _stop(self) -> None:
        super()._stop()
        self._epoll.close()
        if self._bell >= 0:
            os.close(self._bell)

    def _watch(self, handler: Handler) -> None:
        self._epoll.register(handler.fd, handler.mask or _EDGE)

    def _change(self, handler: Handler, old: int) -> None:
        self._epoll.modify(handler.fd, handler.mask or _EDGE)

    def _unwatch(self, handler: Handler, fd: int) -> None:
        # Not left to the close that follows: a child process that holds a copy would keep the registration alive.
        try:
            self._epoll.unregister(fd)
        except OSError:
            pass  # closed by somebody else: there is nothing left to take off

    def _poll(self, batch: dict[Handler, int]) -> None:
        handlers = self._handlers
        if self._found is None:
            found = self._epoll.poll(0)
        else:
            found, self._found = self._found, None
        for fd, events in found:
            handler = handlers.get(fd)
            if handler is not None:
                batch[handler] = batch.get(handler, 0) | events
            elif self._trio is not None and fd == self._trio.fd:
                self._trio_ready = True  # None otherwise is the bell

    def _wake(self) -> None:
        self._waiting = False  # once is enough
        os.eventfd_write(self._bell, 1)


class TaskReactor(Reactor):
    """One small Trio task for each direction that is wanted, for Windows and macOS. Several times dearer an event.

    The tasks only report; the same turns as with epoll do the work. A connection that breaks while nothing is wanted
    cannot be seen here, so `on_hangup` is never called: the sweep polls such sockets.
    """

    reports_hangups = False

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(clock)
        self._nursery: trio.Nursery | None = None
        self._watches: dict[tuple[Handler, int], trio.CancelScope] = {}
        self._idle = trio.lowlevel.ParkingLot()
        self._served = trio.lowlevel.ParkingLot()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._start()
        async with trio.open_nursery() as self._nursery:
            try:
                self._watch_all()
                self._nursery.start_soon(self._run_alarms)
                task_status.started()
                while True:
                    if self._busy:
                        await trio.lowlevel.checkpoint()
                    else:
                        self._waiting = True
                        await self._idle.park()
                    self._turn()
                    if self._rest is None:
                        self._served.unpark_all()
            finally:
                self._stop()

    def _watch_all(self) -> None:  # a loop in `run` would hold its last handler for ever
        for handler in self._handlers.values():
            self._change(handler, 0)

    def _watch(self, handler: Handler) -> None:
        self._change(handler, 0)

    def _change(self, handler: Handler, old: int) -> None:
        if self._nursery is None:
            return
        for bit in (READ, WRITE):
            if handler.mask & ~old & bit:
                scope = self._watches[handler, bit] = trio.CancelScope()
                self._nursery.start_soon(self._report, handler, bit, scope)
            elif old & ~handler.mask & bit:
                self._watches.pop((handler, bit)).cancel()

    def _unwatch(self, handler: Handler, fd: int) -> None:
        for bit in (READ, WRITE):
            scope = self._watches.pop((handler, bit), None)
            if scope is not None:
                scope.cancel()  # Trio forgets the descriptor within this call, so it may be closed now

    async def _report(self, handler: Handler, bit: int, scope: trio.CancelScope) -> None:
        wait = trio.lowlevel.wait_readable if bit == READ else trio.lowlevel.wait_writable
        with scope:
            while not scope.cancel_called:
                try:
                    await wait(handler.fd)
                except OSError as error:  # not a descriptor that can be waited for
                    self._fail(handler, error)
                    return
                # It may have been withdrawn after Trio saw the event and before this task came to run.
                if not scope.cancel_called:
                    self._queue[handler] = self._queue.get(handler, 0) | bit
                    if self._waiting:
                        self._wake()
                    await self._served.park()

    def _poll(self, batch: dict[Handler, int]) -> None:
        pass  # the tasks have put it there

    def _wake(self) -> None:
        self._waiting = False
        self._idle.unpark()


def make_reactor() -> Reactor:
    """A reactor of the best kind that this system has. Not running yet: `await nursery.start(reactor.run)`.

    Raises:
        OSError: the process has no descriptor left for the selector.
    """
    return EpollReactor() if hasattr(select, "epoll") else TaskReactor()


def _close(sock: socket.socket) -> None:
    try:
        sock.close()
    except OSError:
        pass  # the descriptor is gone all the same, and what was lost on it was lost before


def _refused(fd: int, error: OSError) -> str:
    match error.errno:
        case errno.EPERM:
            advice = "it is a file or a directory, and only sockets, pipes and terminals can be waited for"
        case errno.ENOSPC:
            advice = "the user's watches are used up, raise the sysctl fs.epoll.max_user_watches"
        case _:
            advice = error.strerror or "no reason given"
    return f"cannot wait for descriptor {fd}: {advice}"
