"""Sockets, a reactor and a Trio without a system underneath: every byte and every task moves when a test says so."""

from __future__ import annotations

import errno
import heapq
import math
import socket
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

from wstunnel.reactor import READ, WRITE, Handler


class Pipe:
    """One direction between two memory sockets."""

    def __init__(self) -> None:
        self.sent = bytearray()  # written, on its way
        self.arrived = bytearray()  # may be read
        self.ended = False  # the writer sent FIN
        self.end_arrived = False
        self.room: int | None = None  # bytes that the writer may still send; None: any number

    def move(self, size: int) -> None:
        """Let up to `size` bytes arrive, and the end behind the last one."""
        self.arrived += self.sent[:size]
        del self.sent[:size]
        if self.ended and not self.sent:
            self.end_arrived = True


class MemorySocket:
    """One end of a connection; non-blocking. What was closed with a reset makes the other end fail."""

    family = socket.AF_UNIX
    _number = 1000

    def __init__(self, incoming: Pipe, outgoing: Pipe) -> None:
        MemorySocket._number += 1
        self._fd = MemorySocket._number
        self.incoming = incoming
        self.outgoing = outgoing
        self.closed = False
        self.linger_reset = False
        self.reset_by_peer = False
        self.peer: MemorySocket

    @classmethod
    def pair(cls) -> tuple[MemorySocket, MemorySocket]:
        first, second = Pipe(), Pipe()
        left, right = cls(first, second), cls(second, first)
        left.peer, right.peer = right, left
        return left, right

    def fileno(self) -> int:
        return -1 if self.closed else self._fd

    def setblocking(self, _blocking: bool) -> None:
        pass

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            self.linger_reset = True

    def getsockopt(self, _level: int, _option: int) -> int:
        return errno.ECONNRESET if self.reset_by_peer else 0

    def recv_into(self, buffer: memoryview, size: int = 0) -> int:
        assert not self.closed
        arrived = self.incoming.arrived
        if arrived:
            count = min(len(arrived), size or len(buffer), len(buffer))
            buffer[:count] = arrived[:count]
            del arrived[:count]
            return count
        if self.reset_by_peer:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        if self.incoming.end_arrived:
            return 0
        raise BlockingIOError(errno.EAGAIN, "again")

    def send(self, data: bytes | memoryview) -> int:
        assert not self.closed
        if self.reset_by_peer:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        assert not self.outgoing.ended
        count = len(data)
        if self.outgoing.room is not None:
            count = min(count, self.outgoing.room)
            if not count:
                raise BlockingIOError(errno.EAGAIN, "again")
            self.outgoing.room -= count
        self.outgoing.sent += data[:count]
        return count

    def sendmsg(self, buffers: list[bytes | memoryview]) -> int:
        return self.send(b"".join(buffers))

    def shutdown(self, _how: int) -> None:
        if self.reset_by_peer:
            raise OSError(errno.ENOTCONN, "not connected")
        self.outgoing.ended = True

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.outgoing.ended = True
        if self.linger_reset or self.incoming.arrived or self.incoming.sent:
            self.peer.reset_by_peer = True

    def readable(self) -> bool:
        return bool(self.incoming.arrived) or self.incoming.end_arrived or self.reset_by_peer

    def writable(self) -> bool:
        return self.outgoing.room is None or self.outgoing.room > 0 or self.reset_by_peer


class MemoryReactor:
    """The reactor's interface; `turn` calls one handler when the test wants it."""

    reports_hangups = True

    def __init__(self) -> None:
        self.scratch = memoryview(bytearray(4096))
        self.now = 0.0
        self.handlers: dict[Handler, None] = {}
        self._again: dict[Handler, None] = {}
        self._hung_up: set[Handler] = set()  # on_hangup was called since the mask became empty
        self._later: list[Callable[[], None]] = []
        self._alarms: list[tuple[float, int, Callable[[], None]]] = []
        self._alarm_number = 0

    @staticmethod
    def spent() -> float:
        return 0.0

    def adopt(self, handler: Handler, sock: Any, mask: int = READ, *, look: bool = True) -> None:
        handler.sock, handler.fd, handler.mask, handler.reactor = sock, sock.fileno(), mask, self  # type: ignore[assignment]
        self.handlers[handler] = None
        if look:
            self._again[handler] = None

    def want(self, handler: Handler, mask: int) -> None:
        if handler.sock is not None and mask != handler.mask:
            handler.mask = mask
            self._hung_up.discard(handler)

    def again(self, handler: Handler) -> None:
        self._again[handler] = None

    def later(self, function: Callable[[], None]) -> None:
        self._later.append(function)

    def at(self, when: float, function: Callable[[], None]) -> None:
        self._alarm_number += 1
        heapq.heappush(self._alarms, (when, self._alarm_number, function))

    def advance(self, seconds: float) -> None:
        """Let time pass, and run in order what is due: each at its own time, so that `now` is what it asked for."""
        end = self.now + seconds
        while self._alarms and self._alarms[0][0] <= end:
            when, _, function = heapq.heappop(self._alarms)
            self.now = max(self.now, when)
            function()
            self._run_later()
        self.now = end

    def drop(self, handler: Handler) -> None:
        sock, handler.sock, handler.fd, handler.mask = handler.sock, None, -1, 0
        self.handlers.pop(handler, None)
        self._again.pop(handler, None)
        self._hung_up.discard(handler)
        if sock is not None:
            sock.close()

    def ready(self) -> list[Handler]:
        """Handlers for whom something can be done."""
        return [handler for handler in self.handlers if self._events(handler)]

    def _events(self, handler: Handler) -> int:
        sock: Any = handler.sock
        events = 0
        if handler.mask & READ and (sock.readable() or handler in self._again):
            events |= READ
        if handler.mask & WRITE and sock.writable():
            events |= WRITE
        if not handler.mask and sock.reset_by_peer and handler not in self._hung_up:
            events |= 8
        return events

    def turn(self, handler: Handler) -> None:
        """Call what the handler's events ask for, as the reactor does."""
        events = self._events(handler)
        self._again.pop(handler, None)
        if events & 8:
            self._hung_up.add(handler)
            handler.on_hangup()
        if events & READ and handler.mask & READ:
            handler.on_readable()
        if events & WRITE and handler.mask & WRITE:
            handler.on_writable()
        self._run_later()

    def _run_later(self) -> None:
        functions, self._later = self._later, []
        for function in functions:
            function()


class Cancelled(BaseException):
    """Raised in a task whose scope was cancelled, or is past its deadline."""

    def __init__(self, scope: MemoryScope) -> None:
        self.scope = scope


class _Wait:
    """What a task waits for: an event, a time, or for ever."""

    __slots__ = ("event", "until")

    def __init__(self, event: MemoryEvent | None = None, until: float = math.inf) -> None:
        self.event = event
        self.until = until

    def __await__(self) -> Generator[_Wait, None, None]:
        yield self


class MemoryEvent:
    __slots__ = ("_flag",)

    def __init__(self) -> None:
        self._flag = False

    def set(self) -> None:
        self._flag = True

    def is_set(self) -> bool:
        return self._flag

    async def wait(self) -> None:
        if not self._flag:
            await _Wait(self)


class MemoryScope:
    def __init__(self, trio: MemoryTrio, deadline: float = math.inf) -> None:
        self._trio = trio
        self._task: _Task | None = None
        self.deadline = deadline
        self.cancel_called = False
        self.cancelled_caught = False

    def cancel(self) -> None:
        self.cancel_called = True

    def __enter__(self) -> MemoryScope:
        self._task = self._trio.current
        assert self._task is not None
        self._task.scopes.append(self)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        assert self._task is not None
        self._task.scopes.remove(self)
        self.cancelled_caught = isinstance(error, Cancelled) and error.scope is self
        return self.cancelled_caught


class MemoryNursery:
    def __init__(self, trio: MemoryTrio) -> None:
        self._trio = trio

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        self._trio.spawn(function(*args))

    async def __aenter__(self) -> MemoryNursery:
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            await _Wait()


class _Task:
    __slots__ = ("coroutine", "scopes", "wait")

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.coroutine = coroutine
        self.scopes: list[MemoryScope] = []
        self.wait: _Wait | None = None


class MemoryTrio:
    """As much of Trio as the roles use, without a system or a clock: stands where a module has `trio`.

    Tasks go on when `run` is called and what they wait for is there.

    Args:
        current_time: monotonic seconds.
    """

    Event = MemoryEvent

    def __init__(self, current_time: Callable[[], float]) -> None:
        self.current_time = current_time
        self.current: _Task | None = None
        self.tasks: list[_Task] = []

    def CancelScope(self) -> MemoryScope:
        return MemoryScope(self)

    def move_on_at(self, deadline: float) -> MemoryScope:
        return MemoryScope(self, deadline)

    def open_nursery(self) -> MemoryNursery:
        return MemoryNursery(self)

    @staticmethod
    def CapacityLimiter(total: int) -> int:
        return total

    def sleep(self, seconds: float) -> Awaitable[None]:
        return _Wait(until=self.current_time() + seconds)

    @staticmethod
    def sleep_until(when: float) -> Awaitable[None]:
        return _Wait(until=when)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(_Task(coroutine))

    def run(self) -> None:
        """Let every task go on that can, until none can."""
        now = self.current_time()
        busy = True
        while busy:
            busy = False
            for task in self.tasks[:]:
                wait = task.wait
                cancelled = None
                for scope in task.scopes:
                    if scope.cancel_called or scope.deadline <= now:
                        cancelled = scope
                        break
                if (
                    cancelled is None
                    and wait is not None
                    and wait.until > now
                    and (wait.event is None or not wait.event._flag)
                ):
                    continue
                busy = True
                self.current = task
                try:
                    if cancelled is not None and wait is not None:
                        task.wait = task.coroutine.throw(Cancelled(cancelled))
                    else:
                        task.wait = task.coroutine.send(None)
                except StopIteration:
                    self.tasks.remove(task)
                finally:
                    self.current = None

    def close(self) -> None:
        """Drop all tasks."""
        for task in self.tasks:
            task.coroutine.close()
        self.tasks.clear()
