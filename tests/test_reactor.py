"""The reactor, both drivers: what is called, when, how often, and that every socket is closed in the end."""

from __future__ import annotations

import errno
import gc
import itertools
import logging
import os
import platform
import select
import socket
import ssl
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING

import pytest
import trio
import trustme
from trio.lowlevel import checkpoint
from trio.testing import MockClock, wait_all_tasks_blocked

from wstunnel import limits
from wstunnel import reactor as reactor_module
from wstunnel.errors import LocalError
from wstunnel.reactor import READ, WRITE, EpollReactor, Handler, Reactor, TaskReactor, make_reactor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ERR, HUP, IN, OUT = 8, 16, 1, 4  # epoll's; not in `select` everywhere
needs_epoll = pytest.mark.skipif(not hasattr(select, "epoll"), reason="this system has no epoll")
EPOLL = pytest.param(EpollReactor, marks=needs_epoll, id="epoll")
TASK = pytest.param(TaskReactor, id="task")


class Recorder(Handler):
    """Writes down what is called, and then does what the test has set."""

    def __init__(self, name: str = "it", log: list[str] | None = None) -> None:
        super().__init__()
        self.name = name
        self.log: list[str] = [] if log is None else log
        self.errors: list[Exception] = []
        self.read: Callable[[], object] = lambda: None
        self.write: Callable[[], object] = lambda: None

    def on_readable(self) -> None:
        self.log.append(f"{self.name} readable")
        self.read()

    def on_writable(self) -> None:
        self.log.append(f"{self.name} writable")
        self.write()

    def on_hangup(self) -> None:
        self.log.append(f"{self.name} hangup")

    def fail(self, error: Exception) -> None:
        self.log.append(f"{self.name} fail")
        self.errors.append(error)
        self.reactor.drop(self)

    def drain(self) -> bytes:
        """Read once into the scratch buffer; b"" at EOF and when there is nothing."""
        assert self.sock is not None
        try:
            return bytes(self.reactor.scratch[: self.sock.recv_into(self.reactor.scratch)])
        except BlockingIOError:
            return b""


class FakeClock:
    """The clock that cuts turns, in the test's hands."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class CountingEpoll:
    """Passes everything on to the epoll object of `reactor`, and counts."""

    def __init__(self, reactor: EpollReactor) -> None:
        self.epoll = reactor._epoll
        self.polls = 0
        self.changes = 0
        reactor._epoll = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> object:
        return getattr(self.epoll, name)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        self.polls += 1
        return self.epoll.poll(timeout)

    def modify(self, fd: int, events: int) -> None:
        self.changes += 1
        self.epoll.modify(fd, events)


class Spied:
    """Passes everything on to a socket, and writes down the calls of `setblocking`."""

    def __init__(self, sock: socket.socket, calls: list[bool]) -> None:
        self.sock, self.calls = sock, calls

    def __getattr__(self, name: str) -> object:
        return getattr(self.sock, name)

    def setblocking(self, flag: bool) -> None:
        self.calls.append(flag)
        self.sock.setblocking(flag)


@pytest.fixture(params=[EPOLL, TASK])
def driver(request: pytest.FixtureRequest) -> type[Reactor]:
    return request.param


@pytest.fixture
async def reactor(driver: type[Reactor], nursery: trio.Nursery) -> Reactor:
    reactor = driver()
    await nursery.start(reactor.run)
    return reactor


@pytest.fixture
def pair() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    made: list[socket.socket] = []

    def make() -> tuple[socket.socket, socket.socket]:
        made.extend(socket.socketpair())
        return made[-2], made[-1]

    yield make
    for sock in made:
        sock.close()


async def settle() -> None:
    """Until the reactor has nothing to do. The sockets are pairs on this machine: what was sent is there at once."""
    await wait_all_tasks_blocked()


def fill(sock: socket.socket) -> None:
    """Write until there is no more room."""
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            sock.send(bytes(65536))


def drain(sock: socket.socket) -> None:
    """Read all that is there."""
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            sock.recv(65536)


def after_each_turn(reactor: Reactor, act: Callable[[], object]) -> None:
    """Call `act` where other Trio tasks would run: right after a turn, and outside of it."""
    turn = reactor._turn

    def turn_and_act() -> None:
        turn()
        act()

    reactor._turn = turn_and_act  # type: ignore[method-assign]


async def passes(count: int) -> None:
    """Let every other task run `count` times."""
    for _ in range(count):
        await checkpoint()


class TestAdopt:
    async def test_readable_runs_once_without_data(self, reactor, pair):
        handler = Recorder()
        reactor.adopt(handler, pair()[0])
        assert handler.log == [], "adopt must not call back before it returns"
        await settle()
        assert handler.log == ["it readable"]

    async def test_without_a_look_only_the_selector_says_when(self, reactor, pair):
        idle, early, late = Recorder("idle"), Recorder("early"), Recorder("late")
        (near, far), (second, second_far) = pair(), pair()
        far.send(b"before")
        early.read, late.read = early.drain, late.drain
        reactor.adopt(idle, pair()[0], look=False)
        reactor.adopt(early, near, look=False)
        reactor.adopt(late, second, 0, look=False)
        reactor.want(late, READ)
        await settle()
        assert (idle.log, early.log, late.log) == ([], ["early readable"], [])
        second_far.send(b"after")
        await settle()
        assert (idle.log, late.log) == ([], ["late readable"])

    async def test_a_socket_that_does_not_block_is_not_told_again(self, reactor, pair):
        for seconds, told in ((None, 1), (5.0, 1), (0.0, 0)):
            near = pair()[0]
            near.settimeout(seconds)
            calls = []
            sock = Spied(near, calls)
            reactor.adopt(Recorder(), sock)
            assert len(calls) == told
            assert not os.get_blocking(near.fileno())

    async def test_without_read_it_waits_until_read_is_wanted(self, reactor, pair):
        handler = Recorder()
        reactor.adopt(handler, pair()[0], 0)
        await settle()
        assert handler.log == []
        reactor.want(handler, READ)
        await settle()
        assert handler.log == ["it readable"]
        reactor.want(handler, 0)
        reactor.want(handler, READ)
        await settle()
        assert handler.log == ["it readable"], "it is owed once"

    async def test_attributes(self, reactor, pair):
        handler, (near, _) = Recorder(), pair()
        assert (handler.sock, handler.fd, handler.mask) == (None, -1, 0)
        reactor.adopt(handler, near, READ | WRITE)
        assert (handler.sock, handler.fd, handler.mask, handler.reactor) == (near, near.fileno(), READ | WRITE, reactor)
        assert near.gettimeout() == 0, "a blocking socket would stop the whole process"

    async def test_before_run(self, driver, pair, nursery):
        reactor, reader, writer = driver(), Recorder("r"), Recorder("w")
        (near, far), (other, _) = pair(), pair()
        reactor.adopt(reader, near)
        reactor.adopt(writer, other, 0)
        reactor.want(writer, WRITE)
        reader.read = reader.drain
        writer.write = lambda: reactor.want(writer, 0)
        far.send(b"early")
        await nursery.start(reactor.run)
        await settle()
        assert sorted(reader.log + writer.log) == ["r readable", "w writable"]

    async def test_twice_is_refused(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        reactor.adopt(handler, near)
        with pytest.raises(RuntimeError, match="on a reactor already"):
            reactor.adopt(handler, far)
        assert handler.sock is near
        assert far.fileno() >= 0

    async def test_closed_socket_is_refused(self, reactor, pair):
        handler, (near, _) = Recorder(), pair()
        near.close()
        with pytest.raises(ValueError, match="closed socket"):
            reactor.adopt(handler, near)
        assert handler.fd == -1

    async def test_again_after_drop(self, reactor, pair):
        handler = Recorder()
        reactor.adopt(handler, pair()[0])
        reactor.drop(handler)
        reactor.adopt(handler, pair()[0])
        await settle()
        assert handler.log == ["it readable"]

    @needs_epoll
    async def test_a_regular_file_is_refused_and_stays_the_callers(self, tmp_path):
        reactor, handler = EpollReactor(), Recorder()
        with file_as_socket(tmp_path / "file") as sock:
            with pytest.raises(LocalError, match=r"descriptor \d+: it is a file or a directory"):
                reactor.adopt(handler, sock)
            assert (handler.fd, handler.mask, handler.sock) == (-1, 0, None)
            os.fstat(sock.fileno())

    @needs_epoll
    @pytest.mark.parametrize(
        ("number", "said"), [(errno.ENOSPC, "max_user_watches"), (errno.ENOMEM, "allocate memory")]
    )
    async def test_other_refusals_say_what_to_do(self, pair, number, said):
        class Full:
            def register(self, fd: int, events: int) -> None:
                raise OSError(number, os.strerror(number))

        reactor, (near, _) = EpollReactor(), pair()
        reactor._epoll = Full()
        with pytest.raises(LocalError, match=said):
            reactor.adopt(Recorder(), near)
        assert near.fileno() >= 0

    async def test_tasks_learn_later_that_a_file_cannot_be_awaited(self, tmp_path, nursery, pair):
        reactor, handler, other = TaskReactor(), Recorder(), Recorder("other")
        await nursery.start(reactor.run)
        with file_as_socket(tmp_path / "file") as sock:
            handler.read = lambda: None
            reactor.adopt(handler, sock)
            await settle()
            assert isinstance(handler.errors[0], OSError)
            assert handler.fd == -1
        reactor.adopt(other, pair()[0])
        await settle()
        assert other.log == ["other readable"], "the reactor lives on"


def file_as_socket(path: Path) -> socket.socket:
    """A socket object whose descriptor is a regular file, as from `connect < file`."""
    sock = socket.socket()
    with path.open("w+b") as file:
        os.dup2(file.fileno(), sock.fileno(), inheritable=False)
    return sock


class TestReadiness:
    async def test_data_makes_it_readable_until_all_is_read(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        received = []
        handler.read = lambda: received.append(near.recv(2))
        far.send(b"abcdef")
        reactor.adopt(handler, near)
        handler.fail = lambda error: reactor.want(handler, 0)  # BlockingIOError: all of it was read
        await settle()
        assert b"".join(received) == b"abcdef"

    async def test_scratch_is_one_writable_buffer(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        received = []
        handler.read = lambda: received.append(handler.drain())
        reactor.adopt(handler, near)
        await settle()
        far.send(b"hello")
        await settle()
        assert received == [b"", b"hello"]
        assert len(reactor.scratch) == limits.SCRATCH_BYTES
        assert not reactor.scratch.readonly

    async def test_eof_is_readable(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        handler.read = lambda: handler.log.append(repr(near.recv(9))) if len(handler.log) > 1 else None
        reactor.adopt(handler, near)
        await settle()
        far.shutdown(socket.SHUT_WR)
        while len(handler.log) < 3:
            await checkpoint()
        reactor.drop(handler)
        assert handler.log[:3] == ["it readable", "it readable", "b''"]

    async def test_writable_only_while_wanted(self, reactor, pair):
        handler = Recorder()
        handler.write = lambda: reactor.want(handler, READ) if len(handler.log) == 3 else None
        reactor.adopt(handler, pair()[0], WRITE)
        await settle()
        assert handler.log == ["it writable"] * 3 + ["it readable"], "adopt's readable is owed until READ is wanted"

    async def test_full_socket_becomes_writable_when_the_peer_reads(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        fill(near)
        handler.write = lambda: reactor.want(handler, 0)
        reactor.adopt(handler, near, WRITE)
        await settle()
        assert handler.log == []
        drain(far)
        await settle()
        assert handler.log == ["it writable"]

    async def test_interest_withdrawn_between_the_two_calls_of_one_event(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        far.send(b"x")
        handler.read = lambda: reactor.want(handler, 0)
        reactor.adopt(handler, near, READ | WRITE)
        await settle()
        assert handler.log == ["it readable"]

    async def test_interest_withdrawn_by_another_handler(self, reactor, pair):
        log: list[str] = []
        handlers = [Recorder("a", log), Recorder("b", log)]

        def first_one_silences_the_other() -> None:
            for handler in handlers:
                reactor.want(handler, 0)

        for handler in handlers:
            near, far = pair()
            far.send(b"x")
            handler.read = first_one_silences_the_other
            reactor.adopt(handler, near)
        await settle()
        assert len(log) == 1

    async def test_want_is_no_change_when_equal_and_nothing_after_drop(self, reactor, pair):
        handler = Recorder()
        reactor.adopt(handler, pair()[0])
        reactor.want(handler, READ)
        reactor.drop(handler)
        reactor.want(handler, READ | WRITE)
        reactor.again(handler)
        assert handler.mask == 0
        await settle()
        assert handler.log == []

    @needs_epoll
    async def test_want_costs_a_call_to_the_kernel_only_for_a_change(self, pair):
        reactor, handler = EpollReactor(), Recorder()
        reactor.adopt(handler, pair()[0])
        epoll = CountingEpoll(reactor)
        reactor.want(handler, READ)
        assert epoll.changes == 0
        reactor.want(handler, READ | WRITE)
        reactor.want(handler, READ | WRITE)
        assert epoll.changes == 1

    async def test_withdrawn_and_wanted_again_at_once(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        reactor.adopt(handler, near)
        await settle()
        handler.log.clear()
        handler.read = handler.drain
        far.send(b"x")
        for mask in (0, READ, READ | WRITE, READ, 0, READ):
            reactor.want(handler, mask)
        await settle()
        assert handler.log == ["it readable"]

    @pytest.mark.parametrize("ticks", range(4))
    async def test_withdrawn_while_the_event_is_on_its_way(self, reactor, pair, ticks):
        """Whatever stage the report of the event has reached."""
        handler, (near, far) = Recorder(), pair()
        reactor.adopt(handler, near)
        await settle()
        handler.log.clear()
        handler.read = handler.drain
        far.send(b"x")
        await passes(ticks)
        before = len(handler.log)
        reactor.want(handler, 0)
        await settle()
        assert len(handler.log) == before
        far.send(b"y")
        reactor.want(handler, READ)
        await settle()
        assert len(handler.log) == before + 1

    async def test_replaced_while_trio_is_about_to_run_the_task_that_reports(self, pair, nursery):
        """The old socket's event is not the new one's, even for the same handler."""
        reactor, handler = TaskReactor(), Recorder()
        socks = [pair() for _ in range(2)]
        for near, _ in socks:
            fill(near)
        await nursery.start(reactor.run)
        reactor.adopt(handler, socks[0][0], WRITE)
        await settle()

        class ReplaceJustBeforeTheReport(trio.abc.Instrument):
            def before_task_step(self, task: trio.lowlevel.Task) -> None:
                if handler.sock is socks[0][0] and task.name.endswith("_report"):
                    reactor.drop(handler)
                    reactor.adopt(handler, socks[1][0], WRITE)

        trio.lowlevel.add_instrument(ReplaceJustBeforeTheReport())
        drain(socks[0][1])
        await settle()
        assert handler.sock is socks[1][0]
        assert handler.log == []
        handler.write = lambda: reactor.want(handler, 0)
        drain(socks[1][1])
        await settle()
        assert handler.log == ["it writable"]


class TestTrouble:
    """ERR and HUP go where the next call will find out what is wrong."""

    async def test_reset_with_read_wanted_is_readable(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        reactor.adopt(handler, near, READ)
        await settle()
        near.send(b"never read")
        handler.read = lambda: near.recv(1)
        far.close()
        await settle()
        assert handler.log[1:] == ["it readable", "it fail"]
        assert isinstance(handler.errors[0], ConnectionResetError)

    async def test_reset_with_both_wanted_is_readable_first(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        fill(near)
        reactor.adopt(handler, near, READ | WRITE)
        await settle()
        handler.read = lambda: near.recv(1)
        far.close()
        await settle()
        assert handler.log == ["it readable", "it readable", "it fail"]

    async def test_reset_with_write_wanted_is_writable(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        fill(near)
        reactor.adopt(handler, near, WRITE)
        await settle()
        handler.write = lambda: near.send(b"x")
        far.close()
        await settle()
        assert handler.log == ["it writable", "it fail"]

    @needs_epoll
    @pytest.mark.parametrize(
        ("mask", "events", "called"),
        [
            (READ, ERR, ["it readable"]),
            (READ, HUP, ["it readable"]),
            (WRITE, ERR, ["it writable"]),
            (WRITE, HUP | IN, ["it writable"]),
            (READ | WRITE, ERR | HUP, ["it readable"]),
            (READ | WRITE, HUP | OUT, ["it readable", "it writable"]),
            (0, ERR, ["it hangup"]),
            (0, HUP | IN | OUT, ["it hangup"]),
        ],
    )
    async def test_table_of_events(self, pair, mask, events, called):
        class Reports:
            def __init__(self, epoll: select.epoll) -> None:
                self.register, self.modify, self.unregister = epoll.register, epoll.modify, epoll.unregister

            def poll(self, timeout: float) -> list[tuple[int, int]]:
                return [(handler.fd, events)]

        reactor, handler = EpollReactor(FakeClock()), Recorder()
        reactor.adopt(handler, pair()[0], mask)
        reactor._queue.clear()
        reactor._epoll = Reports(reactor._epoll)
        # One batch, as `run` would do it.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reactor_module, "BATCHES", 1)
            reactor._turn()
        assert handler.log == called

    @needs_epoll
    async def test_hangup_is_reported_once_for_each_empty_mask_and_does_not_spin(self, pair, nursery):
        reactor, handler = EpollReactor(), Recorder()
        epoll = CountingEpoll(reactor)
        await nursery.start(reactor.run)
        near, far = pair()
        reactor.adopt(handler, near, 0)
        await settle()
        assert handler.log == []
        far.close()
        await passes(50)
        assert handler.log == ["it hangup"]
        assert epoll.polls < 10, "a level-triggered HUP would be polled in every pass"
        handler.read = lambda: reactor.want(handler, 0)
        reactor.want(handler, READ)
        await passes(50)
        assert handler.log == ["it hangup", "it readable", "it hangup"]
        assert epoll.polls < 20

    @needs_epoll
    async def test_hangup_is_told_once_though_the_kernel_reports_more_edges(self, nursery):
        reactor, handler = EpollReactor(), Recorder()
        await nursery.start(reactor.run)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            far = socket.create_connection(listener.getsockname())
            near = listener.accept()[0]
        reactor.adopt(handler, near, 0)
        far.shutdown(socket.SHUT_WR)
        near.shutdown(socket.SHUT_WR)  # HUP: closed both ways
        await settle()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        await settle()
        reactor._epoll.modify(handler.fd, select.EPOLLET)  # one edge more, for certain
        await settle()
        assert handler.log == ["it hangup"]

    @needs_epoll
    async def test_a_hangup_that_drops_its_handler(self, pair, nursery):
        reactor, handler = EpollReactor(), Recorder()
        handler.on_hangup = lambda: reactor.drop(handler)
        await nursery.start(reactor.run)
        near, far = pair()
        reactor.adopt(handler, near, 0)
        far.close()
        await settle()
        assert near.fileno() == -1

    async def test_tasks_cannot_see_a_hangup(self, pair, nursery):
        reactor, handler = TaskReactor(), Recorder()
        await nursery.start(reactor.run)
        near, far = pair()
        reactor.adopt(handler, near, 0)
        far.close()
        await settle()
        assert handler.log == []
        reactor.want(handler, READ)
        handler.read = lambda: reactor.drop(handler)
        await settle()
        assert handler.log == ["it readable"]


class TestAgain:
    async def test_from_another_task_while_the_reactor_waits(self, reactor, pair):
        handler = Recorder()
        reactor.adopt(handler, pair()[0])
        await settle()
        handler.log.clear()
        reactor.again(handler)
        reactor.again(handler)
        assert handler.log == []
        await settle()
        assert handler.log == ["it readable"]

    async def test_from_the_callback_is_not_nested(self, reactor, pair):
        handler, depth, deepest = Recorder(), 0, 0

        def read() -> None:
            nonlocal depth, deepest
            depth += 1
            deepest = max(deepest, depth)
            if len(handler.log) < 20:
                reactor.again(handler)
            depth -= 1

        handler.read = read
        reactor.adopt(handler, pair()[0])
        await settle()
        assert (len(handler.log), deepest) == (20, 1)

    async def test_is_owed_while_read_is_not_wanted(self, reactor, pair):
        """What OpenSSL holds would otherwise stay there: no selector reports it."""
        handler = Recorder()
        reactor.adopt(handler, pair()[0])
        await settle()
        handler.log.clear()
        reactor.want(handler, WRITE)
        handler.write = lambda: reactor.want(handler, 0)
        reactor.again(handler)
        await settle()
        assert handler.log == ["it writable"]
        reactor.want(handler, READ)
        await settle()
        assert handler.log == ["it writable", "it readable"]

    async def test_is_owed_when_read_is_withdrawn_after_it(self, reactor, pair):
        handler = Recorder()
        reactor.adopt(handler, pair()[0])
        await settle()
        handler.log.clear()
        reactor.again(handler)
        reactor.want(handler, 0)
        await settle()
        assert handler.log == []
        reactor.want(handler, READ)
        await settle()
        assert handler.log == ["it readable"]

    @needs_epoll
    async def test_with_an_event_of_the_selector_it_is_one_call_a_batch(self, nursery, pair):
        reactor, handler, (near, far) = EpollReactor(), Recorder(), pair()
        await nursery.start(reactor.run)
        reactor.adopt(handler, near)
        await settle()
        handler.log.clear()
        far.send(b"x")
        handler.read = handler.drain
        reactor.again(handler)
        await settle()
        assert handler.log == ["it readable"]

    async def test_other_tasks_run_beside_one_that_never_ends(self, driver, pair, nursery):
        """The clock stands still: the number of batches bounds the turn."""
        reactor, handler = driver(FakeClock()), Recorder()
        await nursery.start(reactor.run)
        handler.read = lambda: reactor.again(handler)
        reactor.adopt(handler, pair()[0])
        await passes(10)
        assert 5 <= len(handler.log) <= 10 * reactor_module.BATCHES

    async def test_decrypted_bytes_that_no_selector_sees(self, reactor, pair):
        near, far = await tls_pair(*pair())
        handler, received = Recorder(), bytearray()

        def read() -> None:
            try:
                received.extend(near.recv(1000))
            except ssl.SSLWantReadError:
                return
            reactor.again(handler)  # the budget of this call is 1000 bytes; the record has more

        handler.read = read
        with far:
            far.sendall(bytes(16384))
            reactor.adopt(handler, near)
            await settle()
        assert len(received) == 16384

    @needs_epoll
    async def test_the_alarm_rings_only_for_a_waiting_reactor(self, pair, nursery, monkeypatch):
        rings = []
        ring = os.eventfd_write
        monkeypatch.setattr(os, "eventfd_write", lambda fd, value: (rings.append(fd), ring(fd, value)))
        reactor, handler = EpollReactor(), Recorder()
        await nursery.start(reactor.run)
        await settle()
        reactor.adopt(handler, pair()[0])
        reactor.again(handler)
        reactor.later(lambda: None)
        assert len(rings) == 1
        handler.read = lambda: reactor.again(handler) if len(handler.log) < 5 else reactor.later(lambda: None)
        await settle()
        assert len(handler.log) == 5
        assert len(rings) == 1


async def tls_pair(near: socket.socket, far: socket.socket) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("test.example").configure_cert(server)
    authority.configure_trust(client)
    secure_near = server.wrap_socket(near, server_side=True, do_handshake_on_connect=False)
    secure_far = client.wrap_socket(far, server_hostname="test.example", do_handshake_on_connect=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, secure_near.do_handshake)
        nursery.start_soon(trio.to_thread.run_sync, secure_far.do_handshake)
    return secure_near, secure_far


class TestLater:
    async def test_runs_once_at_the_end_of_the_batch(self, reactor, pair):
        log: list[str] = []
        for name in "abc":
            near, _ = pair()
            handler = Recorder(name, log)
            handler.read = lambda: reactor.later(lambda: log.append("later"))
            reactor.adopt(handler, near)
        await settle()
        assert log == ["a readable", "b readable", "c readable", "later", "later", "later"]

    async def test_from_another_task_while_the_reactor_waits(self, reactor):
        log: list[str] = []
        await settle()
        reactor.later(lambda: log.append("later"))
        assert log == []
        await settle()
        assert log == ["later"]

    async def test_one_that_puts_itself_back_does_not_hold_the_turn(self, driver, nursery):
        reactor, count = driver(FakeClock()), 0
        await nursery.start(reactor.run)

        def back() -> None:
            nonlocal count
            count += 1
            reactor.later(back)

        reactor.later(back)
        await passes(10)
        assert 5 <= count <= 10 * reactor_module.BATCHES

    async def test_an_error_is_logged_and_stops_nothing(self, reactor, caplog):
        log: list[str] = []

        def broken() -> None:
            raise ValueError("no good")

        reactor.later(broken)
        reactor.later(lambda: log.append("next"))
        await settle()
        reactor.later(lambda: log.append("after"))
        await settle()
        assert log == ["next", "after"]
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "no good" in caplog.text

    async def test_runs_though_the_turn_was_cut(self, driver, pair, nursery):
        clock, log = FakeClock(), []
        reactor = driver(clock)
        for name in "ab":
            handler = Recorder(name, log)

            def slow() -> None:
                clock.seconds += 1
                reactor.later(lambda: log.append("later"))

            handler.read = slow
            reactor.adopt(handler, pair()[0])
        await nursery.start(reactor.run)
        await settle()
        assert log == ["a readable", "later", "b readable", "later"]


class TestAt:
    async def test_runs_once_at_its_time(self, driver, nursery, autojump_clock):
        reactor, times = await alarmed(driver, nursery)
        start = trio.current_time()
        reactor.at(start + 15, lambda: times.append(trio.current_time() - start))
        await trio.sleep(14.999)
        assert times == []
        await trio.sleep(100)
        assert times == [pytest.approx(15)]
        assert times[0] >= 15, "the function would find that it is too early"

    async def test_in_order_of_time_and_then_of_the_calls(self, driver, nursery, autojump_clock):
        reactor, times = await alarmed(driver, nursery)
        start = trio.current_time()
        for number, seconds in enumerate([5, 3, 9, 3, 1, 5]):
            reactor.at(start + seconds, lambda number=number: times.append((number, trio.current_time() - start)))
        await trio.sleep(10)
        assert times == [(4, 1), (1, 3), (3, 3), (0, 5), (5, 5), (2, 9)]

    async def test_an_earlier_one_is_not_held_up(self, driver, nursery, autojump_clock):
        """Set at different moments: from a task, from a callback, from an alarm."""
        reactor, times = await alarmed(driver, nursery)
        start = trio.current_time()

        def note() -> None:
            times.append(trio.current_time() - start)

        reactor.at(start + 60, note)
        await settle()
        reactor.at(start + 30, note)
        reactor.at(start + 40, note)
        reactor.later(lambda: reactor.at(start + 20, note))
        reactor.at(start + 5, lambda: reactor.at(start + 10, note))
        await trio.sleep(100)
        assert times == [10, 20, 30, 40, 60]

    async def test_what_is_past_runs_soon_and_not_at_once(self, driver, nursery):
        reactor, log = await alarmed(driver, nursery)
        reactor.at(trio.current_time() - 5, lambda: log.append("past"))
        reactor.at(float("-inf"), lambda: log.append("long past"))
        assert log == []
        await settle()
        assert log == ["long past", "past"]

    async def test_before_run(self, driver, nursery, autojump_clock):
        reactor, log = driver(), []
        reactor.at(trio.current_time() + 2, lambda: log.append("two"))
        reactor.at(trio.current_time() + 1, lambda: log.append("one"))
        await trio.sleep(5)
        assert log == []
        await nursery.start(reactor.run)
        reactor.at(
            trio.current_time(), lambda: log.append("three")
        )  # before the alarms' task has run for the first time
        await settle()
        assert log == ["one", "two", "three"]

    async def test_outside_of_any_turn_though_a_batch_is_cut(self, driver, pair, nursery):
        """It may call a handler itself: two callbacks at once would share the scratch buffer."""
        clock, depths, depth = FakeClock(), [], 0
        reactor, handlers, enough = driver(clock), [Recorder(), Recorder()], trio.Event()
        turn = reactor._turn

        def counted() -> None:
            nonlocal depth
            depth += 1
            turn()
            depth -= 1

        def alarm() -> None:
            depths.append(depth)
            handlers[0].on_readable()
            if len(depths) < 5:
                reactor.at(0, alarm)
            else:
                enough.set()

        def slow(handler: Recorder) -> None:
            clock.seconds += 1
            if not enough.is_set():
                reactor.again(handler)

        reactor._turn = counted
        for handler in handlers:
            handler.read = lambda handler=handler: slow(handler)
            reactor.adopt(handler, pair()[0])
        reactor.at(0, alarm)
        await nursery.start(reactor.run)
        await enough.wait()
        assert depths == [0] * 5

    async def test_it_may_do_all_that_a_callback_may(self, reactor, pair):
        handler, gone, (near, far), (other, _) = Recorder(), Recorder("gone"), pair(), pair()
        reactor.adopt(gone, other)
        await settle()

        def alarm() -> None:
            reactor.drop(gone)
            reactor.adopt(handler, near, 0)
            reactor.want(handler, READ)
            reactor.again(handler)
            reactor.later(lambda: handler.log.append("later"))
            handler.on_readable()

        handler.read = handler.drain
        reactor.at(trio.current_time(), alarm)
        await settle()
        assert handler.log == ["it readable", "it readable", "later"]
        assert gone.fd == -1
        far.send(b"x")
        await settle()
        assert handler.log[-1] == "it readable"

    async def test_now_is_exact(self, driver, nursery, autojump_clock):
        reactor, times = await alarmed(driver, nursery)
        when = trio.current_time() + 7
        reactor.at(when, lambda: times.append(reactor.now))
        await trio.sleep(8)
        assert times == [when]

    async def test_an_error_is_logged_and_stops_nothing(self, reactor, caplog):
        log: list[str] = []

        def broken() -> None:
            raise ValueError("no good")

        reactor.at(0, broken)
        reactor.at(0, lambda: log.append("next"))
        await settle()
        reactor.at(0, lambda: log.append("after"))
        await settle()
        assert log == ["next", "after"]
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "no good" in caplog.text

    async def test_what_is_no_exception_ends_the_reactor_and_closes_everything(self, driver, pair):
        class Stop(BaseException):
            pass

        def fault() -> None:
            raise Stop

        reactor, handler, (near, _) = driver(), Recorder(), pair()
        reactor.adopt(handler, near)
        reactor.at(0, fault)
        with pytest.raises(BaseExceptionGroup) as caught:
            await reactor.run()
        assert caught.value.split(Stop)[1] is None
        assert near.fileno() == -1

    async def test_one_that_puts_itself_back_does_not_stop_the_others(self, driver, pair, nursery):
        reactor, count, handler = driver(FakeClock()), 0, Recorder()
        await nursery.start(reactor.run)

        def back() -> None:
            nonlocal count
            count += 1
            reactor.at(0, back)

        reactor.at(0, back)
        reactor.adopt(handler, pair()[0])
        await passes(20)
        assert 2 <= count <= 20
        assert handler.log == ["it readable"]

    async def test_many_that_are_due_at_once_let_others_run(self, driver, nursery):
        clock, log = FakeClock(), []
        reactor = driver(clock)
        await nursery.start(reactor.run)

        def slow(number: int) -> None:
            clock.seconds += limits.TURN_SECONDS * 0.4
            log.append(number)

        for number in range(12):
            reactor.at(0, lambda number=number: slow(number))
        seen = []
        while len(log) < 12:
            await checkpoint()
            seen.append(len(log))
        assert set(seen) <= {0, 3, 6, 9, 12}
        assert max(later - before for before, later in itertools.pairwise([0, *seen])) <= 6
        assert log == list(range(12))

    async def test_nothing_runs_after_the_end(self, driver, autojump_clock):
        reactor, log = driver(), []
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            now = trio.current_time()
            reactor.at(now + 1, lambda: log.append("too late"))
            reactor.at(now, lambda: log.append("due, and cancelled"))
            nursery.cancel_scope.cancel()
        reactor.at(now, lambda: log.append("after the end"))
        assert reactor._alarms == []
        await trio.sleep(5)
        assert "too late" not in log
        assert "after the end" not in log

    @pytest.mark.parametrize("order", range(10))  # Trio shuffles the tasks of a pass
    async def test_due_in_the_pass_in_which_the_reactor_ends(self, driver, pair, order, autojump_clock):
        """Whichever task comes first, no alarm sees a reactor that has stopped."""
        reactor, handler, stopped = driver(), Recorder(), []
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            reactor.adopt(handler, pair()[0])
            nursery.cancel_scope.deadline = trio.current_time() + 1
            reactor.at(trio.current_time() + 1, lambda: stopped.append(reactor._stopped))
        assert stopped in ([], [False])
        assert handler.fd == -1

    async def test_it_is_held_until_it_ran_and_no_longer(self, driver, nursery, autojump_clock):
        reactor, handler = driver(), Recorder()
        await nursery.start(reactor.run)
        reactor.at(trio.current_time() + 1, handler.on_hangup)
        kept = weakref.ref(handler)
        del handler
        await trio.sleep(0.5)
        gc.collect()
        assert kept() is not None
        await trio.sleep(2)
        gc.collect()
        assert kept() is None

    async def test_nothing_is_planned_when_all_have_run(self, reactor):
        reactor.at(trio.current_time() + 1000, lambda: None)
        await settle()
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline <= 1000
        reactor.at(trio.current_time(), lambda: None)
        await settle()
        assert 900 < trio.lowlevel.current_statistics().seconds_to_next_deadline <= 1000

    @needs_epoll
    async def test_setting_one_wakes_nobody(self, nursery):
        reactor = EpollReactor()
        epoll = CountingEpoll(reactor)
        await nursery.start(reactor.run)
        await settle()
        before = epoll.polls
        for seconds in (30, 20, 40):
            reactor.at(trio.current_time() + seconds, lambda: None)
        await passes(20)
        assert epoll.polls == before

    async def test_no_time_at_all(self, reactor):
        with pytest.raises(ValueError, match="at: nan"):
            reactor.at(float("nan"), lambda: None)
        log: list[str] = []
        reactor.at(float("inf"), lambda: log.append("never"))
        reactor.at(0, lambda: log.append("now"))
        await settle()
        assert log == ["now"]


async def alarmed(driver: type[Reactor], nursery: trio.Nursery) -> tuple[Reactor, list]:
    """A reactor that runs by the test's clock (fixtures have one of their own), and a list to note things in."""
    reactor = driver()
    await nursery.start(reactor.run)
    return reactor, []


class TestDrop:
    async def test_closes_at_once_and_may_be_repeated(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        reactor.adopt(handler, near, READ | WRITE)
        reactor.drop(handler)
        reactor.drop(handler)
        assert (handler.sock, handler.fd, handler.mask) == (None, -1, 0)
        assert near.fileno() == -1
        assert far.recv(1) == b""
        await settle()
        assert handler.log == []

    async def test_of_one_that_was_never_adopted(self, reactor):
        reactor.drop(Recorder())

    async def test_from_its_own_callback_ends_its_event(self, reactor, pair):
        handler, (near, _) = Recorder(), pair()
        handler.read = lambda: reactor.drop(handler)
        reactor.adopt(handler, near, READ | WRITE)
        await settle()
        assert "it readable" in handler.log
        assert handler.log[-1] == "it readable"

    async def test_during_the_batch_skips_the_rest_and_spares_the_next_owner_of_the_number(self, reactor, pair):
        log: list[str] = []
        new, (new_near, _) = Recorder("new", log), pair()
        handlers = [Recorder("old", log), Recorder("old", log)]

        def first_one_replaces_the_other(me: Recorder) -> None:
            other = handlers[1 - handlers.index(me)]
            number = other.fd
            reactor.drop(other)
            os.dup2(new_near.fileno(), number)
            reactor.adopt(new, socket.socket(fileno=number))
            reactor.later(lambda: log.append("batch ends"))
            me.read = me.drain

        for handler in handlers:
            near, far = pair()
            far.send(b"x")
            handler.read = lambda handler=handler: first_one_replaces_the_other(handler)
            reactor.adopt(handler, near)
        await settle()
        log = log[: log.index("new readable") + 1]
        assert log.count("old readable") in {1, 2}
        assert log.index("batch ends") < log.index("new readable")
        assert [handler.fd >= 0 for handler in handlers].count(True) == 1

    async def test_between_the_turns_of_one_batch(self, driver, pair, nursery):
        """Another Trio task drops what is still to come, and opens a socket that gets the number."""
        clock, log = FakeClock(), []
        reactor = driver(clock)
        first, second = Recorder("a", log), Recorder("b", log)
        new, (new_near, _) = Recorder("new", log), pair()

        def replace_the_second() -> None:
            if second.fd >= 0:
                number = second.fd
                reactor.drop(second)
                os.dup2(new_near.fileno(), number)
                reactor.adopt(new, socket.socket(fileno=number))
                reactor.want(new, 0)
                reactor.later(lambda: log.append("batch ends"))
                reactor.later(lambda: reactor.want(new, READ))

        after_each_turn(reactor, replace_the_second)
        for handler in (first, second):
            handler.read = lambda: setattr(clock, "seconds", clock.seconds + 1)
            reactor.adopt(handler, pair()[0])
        await nursery.start(reactor.run)
        await settle()
        assert log == ["a readable", "batch ends", "new readable"]

    async def test_adopted_anew_between_the_turns_of_one_batch(self, driver, pair, nursery):
        """The events of its old socket are not the new one's."""
        clock, log, replaced = FakeClock(), [], []
        reactor = driver(clock)
        first, second = Recorder("a", log), Recorder("b", log)

        def replace_the_second() -> None:
            if not replaced:
                reactor.drop(second)
                reactor.adopt(second, pair()[0], READ)
                reactor.later(lambda: log.append("batch ends"))
                replaced.append(second)

        after_each_turn(reactor, replace_the_second)
        for handler in (first, second):
            handler.read = lambda: setattr(clock, "seconds", clock.seconds + 1)
            reactor.adopt(handler, pair()[0])
        await nursery.start(reactor.run)
        await settle()
        assert log == ["a readable", "batch ends", "b readable"]

    @needs_epoll
    async def test_of_a_socket_that_somebody_else_closed(self, pair):
        reactor, handler, (near, _) = EpollReactor(), Recorder(), pair()
        reactor.adopt(handler, near)
        near.close()
        reactor.drop(handler)
        assert handler.fd == -1

    @needs_epoll
    async def test_of_a_socket_whose_number_is_another_handlers_by_now(self, pair, nursery):
        reactor, handler, new = EpollReactor(), Recorder(), Recorder("new")
        (near, _), (new_near, far) = pair(), pair()
        reactor.adopt(handler, near)
        number = near.fileno()
        near.close()
        os.dup2(new_near.fileno(), number)
        reactor.adopt(new, socket.socket(fileno=number))
        reactor.drop(handler)
        await nursery.start(reactor.run)
        await settle()
        new.read = new.drain
        far.send(b"x")
        await settle()
        assert new.log == ["new readable"] * 2

    @pytest.mark.parametrize("turns", [0, 1])
    async def test_the_reactor_keeps_no_reference(self, driver, pair, nursery, turns, monkeypatch):
        monkeypatch.setattr(reactor_module, "BATCHES", 1)
        reactor, handler = driver(), Recorder()
        reactor.adopt(handler, pair()[0])
        if turns:
            handler.read = lambda it=handler: reactor.drop(it)
            await nursery.start(reactor.run)
            await settle()
        else:
            reactor.drop(handler)
        kept = weakref.ref(handler)
        del handler
        gc.collect()
        assert kept() is None

    async def test_an_error_from_close_is_swallowed(self, reactor, pair):
        class Stubborn(socket.socket):
            def close(self) -> None:
                super().close()
                raise OSError(errno.EIO, "input/output error")

        handler, (near, _) = Recorder(), pair()
        reactor.adopt(handler, Stubborn(fileno=near.detach()))
        reactor.drop(handler)
        assert handler.fd == -1


class TestRelease:
    async def test_gives_the_socket_back_open_and_unwatched(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        reactor.adopt(handler, near, READ | WRITE)
        assert reactor.release(handler) is near
        assert (handler.sock, handler.fd, handler.mask) == (None, -1, 0)
        far.send(b"for the caller")
        await settle()
        assert handler.log == []
        assert near.recv(99) == b"for the caller"
        reactor.adopt(Recorder(), near)

    async def test_of_one_that_is_not_adopted(self, reactor):
        with pytest.raises(RuntimeError, match="nothing to release"):
            reactor.release(Recorder())


class TestErrors:
    @pytest.mark.parametrize("callback", ["on_readable", "on_writable", pytest.param("on_hangup", marks=needs_epoll)])
    async def test_an_exception_goes_to_the_handlers_own_fail_only(self, callback, pair, nursery):
        reactor = make_reactor() if callback == "on_hangup" else TaskReactor()
        await nursery.start(reactor.run)
        broken, good = Recorder("broken"), Recorder("good")
        error = ValueError("a target's reset")

        def fault() -> None:
            raise error

        setattr(broken, callback, fault)
        near, far = pair()
        reactor.adopt(broken, near, {"on_readable": READ, "on_writable": WRITE, "on_hangup": 0}[callback])
        far.close()
        other, _ = pair()
        reactor.adopt(good, other)
        await settle()
        assert broken.errors == [error]
        assert near.fileno() == -1
        reactor.again(good)
        await settle()
        assert good.log == ["good readable"] * 2
        assert good.fd == other.fileno()

    async def test_a_failed_read_is_not_followed_by_a_write(self, reactor, pair):
        handler, (near, far) = Recorder(), pair()
        far.send(b"x")

        def fault() -> None:
            raise ValueError("no good")

        handler.read = fault
        handler.fail = lambda error: handler.log.append("failed") or reactor.later(lambda: reactor.drop(handler))
        reactor.adopt(handler, near, READ)
        reactor.want(handler, READ | WRITE)
        await settle()
        assert handler.log[-2:] == ["it readable", "failed"]

    async def test_an_exception_from_fail_is_logged_and_the_handler_dropped(self, reactor, pair, caplog):
        handler, good, (near, _) = Recorder(), Recorder("good"), pair()

        def fault(error: Exception | None = None) -> None:
            raise ValueError("no good at all") from error

        handler.read = handler.fail = fault
        reactor.adopt(handler, near)
        reactor.adopt(good, pair()[0])
        await settle()
        assert near.fileno() == -1
        assert good.log == ["good readable"]
        assert "no good at all" in caplog.text

    async def test_the_base_class_does_nothing_for_its_subclass(self):
        handler = Handler()
        for callback in (handler.on_readable, handler.on_writable, handler.on_hangup):
            with pytest.raises(NotImplementedError):
                callback()
        with pytest.raises(NotImplementedError):
            handler.fail(ValueError())

    async def test_what_is_no_exception_ends_the_reactor_and_closes_everything(self, driver, pair):
        class Stop(BaseException):
            pass

        def fault() -> None:
            raise Stop

        reactor, handler, (near, _) = driver(), Recorder(), pair()
        handler.read = fault
        reactor.adopt(handler, near)
        with pytest.raises(BaseException) as caught:  # Trio may put it in a group
            await reactor.run()
        assert caught.type is Stop or caught.value.split(Stop)[1] is None
        assert near.fileno() == -1


class TestFairness:
    async def test_64_always_ready_sockets_each_get_their_turn(self, driver, pair, nursery):
        """The slow handlers let only three of them into a turn."""
        clock, enough = FakeClock(), trio.Event()
        reactor = driver(clock)
        counts = dict.fromkeys(range(64), 0)
        for number in counts:
            handler, (near, far) = Recorder(str(number)), pair()
            far.send(b"never read")

            def slow(number: int = number) -> None:
                clock.seconds += limits.TURN_SECONDS * (0.2 + number % 3 * 0.3)
                counts[number] += 1
                if sum(counts.values()) >= 64 * 10:
                    enough.set()

            handler.read = slow
            reactor.adopt(handler, near)
        await nursery.start(reactor.run)
        await enough.wait()
        mean = sum(counts.values()) / 64
        assert mean / 2 <= min(counts.values())
        assert max(counts.values()) <= mean * 2

    async def test_one_that_always_asks_for_more_gets_no_more_than_the_others(self, driver, pair, nursery):
        reactor, enough = driver(FakeClock()), trio.Event()
        greedy, modest = Recorder("greedy"), Recorder("modest")
        for handler in (greedy, modest):
            near, far = pair()
            far.send(b"never read")
            reactor.adopt(handler, near)
        greedy.read = lambda: reactor.again(greedy)
        modest.read = lambda: enough.set() if len(modest.log) == 50 else None
        await nursery.start(reactor.run)
        await enough.wait()
        # A socket that only the selector reports takes two more passes through Trio where tasks do the reporting.
        assert len(greedy.log) <= (2 if driver is EpollReactor else 4 * reactor_module.BATCHES) * 50

    async def test_a_turn_ends_when_its_time_is_up_and_the_rest_goes_first(self, driver, pair, nursery):
        clock, log = FakeClock(), []
        reactor = driver(clock)
        for number in range(9):
            handler = Recorder(str(number), log)

            def slow() -> None:
                clock.seconds += limits.TURN_SECONDS * 0.4

            handler.read = slow
            reactor.adopt(handler, pair()[0])
        latecomer, turns = Recorder("latecomer", log), []

        def note() -> None:
            turns.append(len(log))
            if len(turns) == 1:
                reactor.adopt(latecomer, pair()[0])

        after_each_turn(reactor, note)
        await nursery.start(reactor.run)
        await settle()
        assert turns[:3] == [3, 6, 9]
        assert log == [f"{number} readable" for number in range(9)] + ["latecomer readable"]


class TestIdle:
    @needs_epoll
    async def test_no_poll_while_nothing_happens(self, pair, nursery):
        reactor = EpollReactor()
        epoll = CountingEpoll(reactor)
        await nursery.start(reactor.run)
        for mask in (0, READ):
            reactor.adopt(Recorder(), pair()[0], mask)
        await settle()
        before = epoll.polls
        await passes(50)
        assert epoll.polls == before

    async def test_nothing_is_planned_for_later(self, reactor, pair):
        reactor.adopt(Recorder(), pair()[0])
        await settle()
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")


class TestNow:
    async def test_is_the_start_of_the_turn_inside_and_exact_outside(self, driver, pair):
        clock = MockClock()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                reactor, handler, seen = driver(), Recorder(), []
                await nursery.start(reactor.run)

                def read() -> None:
                    before = reactor.now
                    clock.jump(5)
                    seen.append((before, reactor.now))

                handler.read = read
                clock.jump(1)
                assert reactor.now == trio.current_time()
                expected = trio.current_time()
                reactor.adopt(handler, pair()[0])
                await settle()
                assert seen == [(expected, expected)]
                assert reactor.now == trio.current_time() == expected + 5
                nursery.cancel_scope.cancel()

        # A run of its own: the clock must be the test's.
        await trio.to_thread.run_sync(lambda: trio.run(main, clock=clock))


class TestEnd:
    async def test_cancellation_closes_every_socket_and_leaves_no_descriptor(self, driver, pair):
        gc.collect()
        nears, fars = zip(*(pair() for _ in range(10)), strict=True)
        before = descriptors()
        reactor = driver()
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            for number, near in enumerate(nears):
                reactor.adopt(Recorder(), near, number % 2 and READ)
            reactor.later(lambda: None)
            nursery.cancel_scope.cancel()
        assert [near.fileno() for near in nears] == [-1] * 10
        assert [far.recv(1) for far in fars] == [b""] * 10
        assert descriptors() == before - 10

    async def test_cancelled_in_the_middle_of_a_batch(self, driver, pair):
        clock = FakeClock()
        reactor, handlers = driver(clock), [Recorder(), Recorder()]
        async with trio.open_nursery() as nursery:
            after_each_turn(reactor, nursery.cancel_scope.cancel)
            for handler in handlers:
                handler.read = lambda: setattr(clock, "seconds", clock.seconds + 1)
                reactor.adopt(handler, pair()[0])
            await nursery.start(reactor.run)
        assert sum(len(handler.log) for handler in handlers) == 1
        assert [handler.fd for handler in handlers] == [-1, -1]

    async def test_after_the_end_a_socket_is_closed_at_once(self, driver, pair):
        reactor, handler, (near, _) = driver(), Recorder(), pair()
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            nursery.cancel_scope.cancel()
        reactor.adopt(handler, near)
        assert near.fileno() == -1
        assert (handler.sock, handler.fd, handler.reactor) == (None, -1, reactor)
        reactor.want(handler, READ)
        reactor.again(handler)
        reactor.later(lambda: pytest.fail("a stopped reactor runs nothing"))
        reactor.drop(handler)
        assert not reactor._later
        assert not reactor._queue

    async def test_runs_once(self, reactor):
        with pytest.raises(RuntimeError, match="runs once"):
            await reactor.run()

    @needs_epoll
    async def test_no_descriptor_left_for_the_alarm(self, pair, monkeypatch):
        def full(value: int, flags: int) -> int:
            raise OSError(errno.EMFILE, "too many open files")

        monkeypatch.setattr(os, "eventfd", full)
        reactor, handler, (near, _) = EpollReactor(), Recorder(), pair()
        reactor.adopt(handler, near)
        with pytest.raises(OSError, match="too many"):
            await reactor.run()
        assert near.fileno() == -1


def descriptors() -> int:
    """How many this process has open; the sockets that are closed count by their absence."""
    return sum(1 for number in range(1024) if is_open(number))


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


class TestMakeReactor:
    @needs_epoll
    def test_epoll_where_there_is_one(self):
        assert type(make_reactor()) is EpollReactor

    def test_tasks_elsewhere(self, monkeypatch):
        monkeypatch.delattr(select, "epoll", raising=False)
        assert type(make_reactor()) is TaskReactor


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how malloc gives memory back is glibc's own affair")
def test_what_frames_need_is_not_given_back_to_the_kernel_for_each() -> None:
    """In a process of its own: what this one has freed before decides what its malloc keeps."""
    program = """
import resource, sys
from wstunnel import limits
from wstunnel.reactor import make_reactor
from wstunnel.wire.masking import apply_mask

make_reactor()
data = memoryview(bytearray(limits.FRAME_BYTES))
def frame():
    return len(b"".join([b"header", apply_mask(data, b"1234")]))
for _ in range(10):
    frame()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    frame()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    faults = int(done.stdout)
    assert faults < 100, f"{faults} page faults for 100 frames"
