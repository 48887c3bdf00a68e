"""The reactor in Trio's place: all that wakes Trio wakes it, it starves nobody, and it steps back where it must."""

from __future__ import annotations

import gc
import os
import queue
import select
import signal
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.test_reactor import Recorder
from wstunnel import trio_loop
from wstunnel.reactor import EpollReactor, TaskReactor
from wstunnel.trio_loop import TrioLoop

pytestmark = [
    pytest.mark.in_place,
    pytest.mark.skipif(not hasattr(select, "epoll"), reason="this system has no epoll"),
]

OVERSLEPT_SECONDS = 10.0
"""A wait that nothing ends: what should have was missed. Only a broken reactor takes so long."""


class WatchedEpoll:
    """Passes everything on to the epoll object of `reactor`, ends a wait that nothing else ends, and counts.

    Attributes:
        polls: how many there were.
        waits: how many could wait.
        overslept: how many waits only we have ended.
        waiting: set while it waits, for threads.
    """

    def __init__(self, reactor: EpollReactor) -> None:
        self.epoll = reactor._epoll
        self.polls = self.waits = self.overslept = 0
        self.waiting = threading.Event()
        reactor._epoll = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.epoll, name)

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        self.polls += 1
        assert self.polls < 100_000, "it spins, and no task runs that could end the test"
        if timeout == 0:
            return self.epoll.poll(0)
        self.waits += 1
        self.waiting.set()
        if timeout is not None and timeout <= OVERSLEPT_SECONDS:
            found = self.epoll.poll(timeout)
        else:
            if timeout is not None and timeout * 1000 >= 1 << 31:
                raise OverflowError("timeout is too large")  # as the real one says
            found = self.epoll.poll(OVERSLEPT_SECONDS)
            self.overslept += not found
        self.waiting.clear()
        return found

    def when_waiting(self, act: Callable[[], object]) -> threading.Thread:
        """Call `act` in a thread, once the reactor waits here."""

        def wait_and_act() -> None:
            assert self.waiting.wait(OVERSLEPT_SECONDS)
            act()

        thread = threading.Thread(target=wait_and_act)
        thread.start()
        return thread


@pytest.fixture
async def reactor(nursery: trio.Nursery) -> EpollReactor:
    reactor = EpollReactor()
    WatchedEpoll(reactor)
    await nursery.start(reactor.run)
    assert reactor._trio is not None
    return reactor


@pytest.fixture
async def epoll(reactor: EpollReactor) -> AsyncIterator[WatchedEpoll]:
    epoll: Any = reactor._epoll
    yield epoll
    assert not epoll.overslept


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        yield near, far


@pytest.fixture
def callback(
    reactor: EpollReactor, epoll: WatchedEpoll, pair: tuple[socket.socket, socket.socket]
) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Makes something happen in a handler's callback, once the reactor waits."""
    threads = []

    def call(act: Callable[[], object]) -> None:
        handler = Recorder()
        reactor.adopt(handler, pair[0])
        handler.read = lambda: act() if handler.drain() else None
        threads.append(epoll.when_waiting(lambda: pair[1].send(b"x")))

    yield call
    for thread in threads:
        thread.join()


class TestWakes:
    """What ends the wait. Each would last until OVERSLEPT_SECONDS if the reactor did not see it."""

    async def test_a_deadline(self, epoll: WatchedEpoll) -> None:
        for _ in range(3):
            await trio.sleep(0.01)
        assert epoll.waits >= 3, "the reactor was there"

    async def test_a_deadline_that_a_callback_brought_forward(
        self, epoll: WatchedEpoll, callback: Callable[[Callable[[], object]], None]
    ) -> None:
        with trio.CancelScope(deadline=trio.current_time() + 2 * OVERSLEPT_SECONDS) as scope:
            callback(lambda: setattr(scope, "deadline", trio.current_time() + 0.01))
            await trio.sleep_forever()
        assert scope.cancelled_caught

    async def test_a_deadline_that_is_very_far(self, epoll: WatchedEpoll) -> None:
        """epoll takes no more than 2^31 ms, which is 25 days."""
        token = trio.lowlevel.current_trio_token()
        with trio.move_on_after(100 * 24 * 3600) as scope:
            thread = epoll.when_waiting(lambda: trio.from_thread.run_sync(scope.cancel, trio_token=token))
            await trio.sleep_forever()
        thread.join()

    async def test_a_socket_of_a_task(self, epoll: WatchedEpoll, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        for _ in range(3):
            thread = epoll.when_waiting(lambda: far.send(b"x"))
            await trio.lowlevel.wait_readable(near)
            assert near.recv(9) == b"x"
            thread.join()

    async def test_what_a_thread_returns(self, epoll: WatchedEpoll) -> None:
        for number in range(3):
            assert await trio.to_thread.run_sync(lambda number=number: number) == number

    async def test_what_a_thread_asks_for(self, epoll: WatchedEpoll) -> None:
        token, event = trio.lowlevel.current_trio_token(), trio.Event()
        epoll.when_waiting(lambda: trio.from_thread.run_sync(event.set, trio_token=token))
        await event.wait()

    async def test_a_signal(self, epoll: WatchedEpoll) -> None:
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            thread = epoll.when_waiting(lambda: os.kill(os.getpid(), signal.SIGUSR1))
            async for number in signals:
                assert number == signal.SIGUSR1
                break
            thread.join()

    async def test_a_task_that_a_callback_starts(
        self, nursery: trio.Nursery, callback: Callable[[Callable[[], object]], None]
    ) -> None:
        event = trio.Event()

        async def task() -> None:
            await trio.lowlevel.checkpoint()
            event.set()

        callback(lambda: nursery.start_soon(task))
        await event.wait()

    async def test_an_event_that_a_callback_sets(self, callback: Callable[[Callable[[], object]], None]) -> None:
        event = trio.Event()
        callback(event.set)
        await event.wait()

    async def test_a_scope_that_a_callback_cancels(self, callback: Callable[[Callable[[], object]], None]) -> None:
        with trio.CancelScope() as scope:
            callback(scope.cancel)
            await trio.sleep_forever()
        assert scope.cancelled_caught

    async def test_alarms(self, reactor: EpollReactor, callback: Callable[[Callable[[], object]], None]) -> None:
        rung: list[str] = []
        event = trio.Event()
        reactor.at(trio.current_time() + 2 * OVERSLEPT_SECONDS, lambda: rung.append("never"))
        reactor.at(trio.current_time() + 0.01, lambda: rung.append("from a task"))

        def alarm() -> None:
            rung.append("from a callback")
            event.set()

        callback(lambda: reactor.at(trio.current_time() + 0.05, alarm))
        await event.wait()
        assert rung == ["from a task", "from a callback"]

    async def test_what_a_task_asks_of_the_reactor(
        self, reactor: EpollReactor, epoll: WatchedEpoll, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        """There is no bell for it: while a task runs the reactor does not wait."""
        handler, event = Recorder(), trio.Event()
        reactor.adopt(handler, pair[0])
        handler.read = event.set
        await event.wait()
        event = trio.Event()
        handler.read = event.set
        reactor.again(handler)
        await event.wait()
        event = trio.Event()
        reactor.later(event.set)
        await event.wait()


class TestOneEvent:
    """Most waits end with one event, which is served without a batch: all that a turn does is done for it, too."""

    async def test_now_is_exact_behind_it(
        self, reactor: EpollReactor, callback: Callable[[Callable[[], object]], None]
    ) -> None:
        served = trio.Event()
        callback(served.set)
        await served.wait()
        before = reactor.now
        time.sleep(0.001)
        assert reactor.now > before

    async def test_now_stands_still_while_it_is_served(
        self, reactor: EpollReactor, callback: Callable[[Callable[[], object]], None]
    ) -> None:
        seen: list[float] = []
        served = trio.Event()

        def look() -> None:
            seen.append(reactor.now)
            time.sleep(0.001)
            seen.append(reactor.now)
            served.set()

        callback(look)
        await served.wait()
        assert seen[0] == seen[1]

    async def test_again(
        self, reactor: EpollReactor, epoll: WatchedEpoll, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        """TLS holds bytes that no selector sees."""
        handler, done = Recorder(), trio.Event()

        def read() -> None:
            if handler.drain():
                reactor.again(handler)
            else:
                done.set()

        handler.read = read
        reactor.adopt(handler, pair[0], look=False)
        epoll.when_waiting(lambda: pair[1].send(b"x"))
        await done.wait()

    async def test_later_within_later(
        self, reactor: EpollReactor, callback: Callable[[Callable[[], object]], None]
    ) -> None:
        done = trio.Event()
        callback(lambda: reactor.later(lambda: reactor.later(done.set)))
        await done.wait()

    async def test_later_within_later_of_an_alarm(self, reactor: EpollReactor, epoll: WatchedEpoll) -> None:
        done = trio.Event()
        reactor.at(trio.current_time() + 0.01, lambda: reactor.later(lambda: reactor.later(done.set)))
        await done.wait()

    async def test_an_alarm_that_is_late_leaves_the_next_one_its_time(
        self, reactor: EpollReactor, callback: Callable[[Callable[[], object]], None]
    ) -> None:
        ran: list[int] = []
        done = trio.Event()

        def block() -> None:
            reactor.at(trio.current_time() + 0.001, lambda: ran.append(1))
            time.sleep(0.02)
            reactor.at(trio.current_time() + 0.05, lambda: (ran.append(2), done.set()))

        callback(block)
        await done.wait()
        assert ran == [1, 2]

    async def test_alarms_run_while_other_tasks_always_can(self, reactor: EpollReactor, epoll: WatchedEpoll) -> None:
        ran = trio.Event()
        reactor.at(trio.current_time() + 0.01, ran.set)
        for _ in range(1_000_000):
            await trio.lowlevel.checkpoint()
            if ran.is_set():
                return
        raise AssertionError("the alarm starved")

    async def test_now_is_exact_once_it_was_interrupted(self, pair: tuple[socket.socket, socket.socket]) -> None:
        reactor, handler = EpollReactor(), Recorder()

        def interrupt() -> None:
            raise KeyboardInterrupt

        handler.read = interrupt
        pair[1].send(b"x")
        with pytest.raises(BaseExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                await nursery.start(reactor.run)
                await trio.sleep(0.01)
                reactor.adopt(handler, pair[0], look=False)
        assert caught.group_contains(KeyboardInterrupt)
        before = reactor.now
        time.sleep(0.001)
        assert reactor.now > before


class TestEnd:
    @staticmethod
    def hears(loop: TrioLoop) -> bool:
        """Whether it is still an instrument; it is none afterwards."""
        try:
            trio.lowlevel.remove_instrument(loop)
        except KeyError:
            return False
        return True

    @pytest.mark.parametrize("who", ["task", "callback", "thread"])
    async def test_cancelled(self, who: str, pair: tuple[socket.socket, socket.socket]) -> None:
        reactor, handler = EpollReactor(), Recorder()
        epoll = WatchedEpoll(reactor)
        token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            loop = reactor._trio
            assert loop is not None
            reactor.adopt(handler, pair[0])
            cancel = nursery.cancel_scope.cancel
            if who == "task":
                cancel()
            elif who == "callback":
                handler.read = lambda: cancel() if handler.drain() else None
                epoll.when_waiting(lambda: pair[1].send(b"x"))
            else:
                epoll.when_waiting(lambda: trio.from_thread.run_sync(cancel, trio_token=token))
            await trio.sleep_forever()
        assert handler.fd == -1
        assert not self.hears(loop)
        assert not epoll.overslept

    async def test_cancelled_before_it_began(self) -> None:
        heard: list[TrioLoop] = []

        class Told(TrioLoop):
            def __init__(self, runner: Any, task: Any, fd: int) -> None:
                super().__init__(runner, task, fd)
                heard.append(self)

        with pytest.MonkeyPatch.context() as patch, trio.CancelScope() as scope:
            patch.setattr(trio_loop, "TrioLoop", Told)
            scope.cancel()
            await trio_loop.find()
        assert scope.cancelled_caught
        (loop,) = heard
        assert not self.hears(loop)

    async def test_cancelled_by_a_callback_with_nobody_else_in_the_scope(self) -> None:
        """The task that runs is not scheduled for its own cancellation: it must look before it waits."""
        with trio.fail_after(5), trio.CancelScope() as scope:
            reactor = EpollReactor()
            async with trio.open_nursery() as nursery:
                await nursery.start(reactor.run)
                reactor.at(trio.current_time() + 0.01, scope.cancel)
        assert scope.cancelled_caught

    async def test_trios_selector_cannot_be_watched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The user's watches are used up: it waits through Trio then."""
        made = TrioLoop.__init__
        monkeypatch.setattr(TrioLoop, "__init__", lambda self, runner, task, _: made(self, runner, task, 1 << 30))
        reactor = EpollReactor()
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            assert reactor._trio is None
            called = trio.Event()
            reactor.later(called.set)
            with trio.fail_after(5):
                await called.wait()
            nursery.cancel_scope.cancel()

    async def test_a_failure_in_the_nursery(self) -> None:
        reactor = EpollReactor()
        with pytest.raises(ExceptionGroup):
            async with trio.open_nursery() as nursery:
                await nursery.start(reactor.run)
                raise KeyError("a fault")
        assert reactor._trio is not None
        assert not self.hears(reactor._trio)

    async def test_tasks_that_ended_are_forgotten(self, reactor: EpollReactor) -> None:
        tasks: list[weakref.ref[trio.lowlevel.Task]] = []

        async def task() -> None:
            tasks.append(weakref.ref(trio.lowlevel.current_task()))
            await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(task)
            nursery.start_soon(trio.sleep_forever)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        gc.collect()
        assert len(tasks) == 20
        assert [ref() for ref in tasks] == [None] * 20
        assert reactor._trio is not None
        assert len(reactor._trio._due) <= 1, "the reactor itself, after the checkpoint of another"


class TestFairness:
    async def test_sockets_that_are_always_ready_starve_no_task(
        self, reactor: EpollReactor, epoll: WatchedEpoll, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        near, far = pair
        handler = Recorder()  # reads nothing: it is readable for ever
        reactor.adopt(handler, near)
        far.send(b"x")
        one, two = socket.socketpair()
        with one, two:
            one.setblocking(False)
            two.send(b"x")
            for _ in range(20):
                await trio.lowlevel.wait_readable(one)
                await trio.sleep(0.001)
                await trio.lowlevel.checkpoint()
                await trio.to_thread.run_sync(int)
        assert len(handler.log) > 20
        assert not epoll.overslept

    async def test_a_handler_that_is_never_done_starves_no_task(
        self, reactor: EpollReactor, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        handler = Recorder()
        handler.read = lambda: reactor.again(handler)
        reactor.adopt(handler, pair[0])
        for _ in range(20):
            await trio.sleep(0.001)
            await trio.to_thread.run_sync(int)
        assert len(handler.log) > 20

    async def test_a_task_that_never_sleeps_starves_no_socket(
        self, nursery: trio.Nursery, callback: Callable[[Callable[[], object]], None]
    ) -> None:
        async def busy() -> None:
            while True:
                await trio.lowlevel.checkpoint()

        event = trio.Event()
        callback(event.set)
        await trio.sleep(0.01)
        nursery.start_soon(busy)
        with trio.fail_after(OVERSLEPT_SECONDS):
            await event.wait()

    async def test_idle_it_waits(self, reactor: EpollReactor, epoll: WatchedEpoll) -> None:
        """A loop would poll thousands of times meanwhile."""
        token, event = trio.lowlevel.current_trio_token(), trio.Event()
        pause = threading.Event()

        def act() -> None:
            pause.wait(0.2)
            trio.from_thread.run_sync(event.set, trio_token=token)

        before = epoll.polls
        epoll.when_waiting(act)
        await event.wait()
        assert epoll.polls - before < 20

    async def test_idle_it_waits_with_deadlines_about(self, nursery: trio.Nursery, epoll: WatchedEpoll) -> None:
        nursery.start_soon(trio.sleep, 3600)
        before = epoll.polls
        for _ in range(10):
            await trio.sleep(0.01)
        assert epoll.polls - before < 100

    async def test_whoever_waits_until_all_are_blocked(
        self, reactor: EpollReactor, epoll: WatchedEpoll, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        """It is not kept waiting by a reactor that Trio does not know to wait; nor is the reactor by it."""
        near, far = pair
        handler = Recorder()
        reactor.adopt(handler, near)
        for cushion in (0, 0.01, 0.03):
            event = trio.Event()
            handler.read = lambda event=event: event.set() if handler.drain() else None
            before = epoll.polls
            with trio.fail_after(5):
                await wait_all_tasks_blocked(cushion)
            assert epoll.polls - before < 20
            thread = epoll.when_waiting(lambda: far.send(b"x"))
            await event.wait()
            thread.join()

    async def test_two_reactors(self, nursery: trio.Nursery, epoll: WatchedEpoll) -> None:
        """One of them waits through Trio: each would always find the other one due."""
        second = EpollReactor()
        await nursery.start(second.run)
        assert second._trio is None
        before = epoll.polls
        near, far = socket.socketpair()
        with far:
            handler, event = Recorder(), trio.Event()
            handler.read = lambda: event.set() if handler.drain() else None
            second.adopt(handler, near)
            await trio.sleep(0.1)
            assert epoll.polls - before < 50
            thread = epoll.when_waiting(lambda: far.send(b"x"))
            await event.wait()
            thread.join()


class TestFind:
    async def test_a_mock_clock_jumps_when_all_are_blocked(self, autojump_clock: MockClock) -> None:
        assert await trio_loop.find() is None
        reactor = EpollReactor()
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            await trio.sleep(3600)
            nursery.cancel_scope.cancel()

    def test_a_guest(self) -> None:
        async def main() -> object:
            return await trio_loop.find()

        calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        outcomes: list[Any] = []

        def done(outcome: Any) -> None:
            outcomes.append(outcome)
            calls.put(None)

        trio.lowlevel.start_guest_run(main, run_sync_soon_threadsafe=calls.put, done_callback=done)
        while (call := calls.get(timeout=OVERSLEPT_SECONDS)) is not None:
            call()
        assert outcomes[0].unwrap() is None

    @pytest.mark.parametrize(
        "missing", ["SystemClock", "runner", "is_guest", "io_manager", "_epoll", "deadlines", "instruments", "number"]
    )
    async def test_a_trio_of_another_make(self, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from trio._core import _run

        real: Any = _run.GLOBAL_RUN_CONTEXT.runner
        parts = {
            "clock": real.clock,
            "is_guest": False,
            "io_manager": SimpleNamespace(_epoll=real.io_manager._epoll),
            "deadlines": real.deadlines,
            "instruments": real.instruments,
            "waiting_for_idle": {},
        }
        if missing == "SystemClock":
            monkeypatch.delattr(_run, "SystemClock")
        elif missing == "_epoll":
            parts["io_manager"] = SimpleNamespace(_kqueue=None)
        elif missing == "number":
            parts["deadlines"] = SimpleNamespace(next_deadline=lambda: None)
        elif missing == "instruments":
            parts["instruments"] = {}
        else:
            parts.pop(missing, None)
        context = SimpleNamespace(task=trio.lowlevel.current_task())
        if missing != "runner":
            context.runner = SimpleNamespace(**parts)
        with monkeypatch.context() as patch:
            patch.setattr(_run, "GLOBAL_RUN_CONTEXT", context)
            coroutine = trio_loop.find()  # Trio itself cannot go on meanwhile, and need not
            with pytest.raises(StopIteration) as stopped:
                coroutine.send(None)
        assert stopped.value.value is None

    async def test_without_it_the_reactor_waits_through_trio(
        self, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        monkeypatch.delattr(trio._core._run, "SystemClock")
        reactor, handler = EpollReactor(), Recorder()
        await nursery.start(reactor.run)
        assert reactor._trio is None
        reactor.adopt(handler, pair[0])
        handler.read = handler.drain
        await wait_all_tasks_blocked()
        pair[1].send(b"x")
        await wait_all_tasks_blocked()
        assert len(handler.log) == 2

    async def test_task_reactors_never_do(self, nursery: trio.Nursery) -> None:
        reactor = TaskReactor()
        await nursery.start(reactor.run)
        assert reactor._trio is None
