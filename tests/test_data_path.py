"""The data path: two whole ends, and every trap of it with the test that fails when its handling is removed.

no await between a readable socket and the write     test_a_readable_socket_is_written_on_in_the_same_turn
no handler can wait                                  test_handlers_are_plain_functions
one scratch buffer, and nothing in it survives       test_every_read_goes_into_the_reactors_scratch,
                                                     test_nothing_survives_in_the_scratch
masking in C, checked                                tests/wire/test_masking.py
TLS: read until OpenSSL wants more                   TestTls.test_one_event_reads_until_openssl_has_no_more
TLS: `again` when the budget ends first              TestTls.test_bytes_left_inside_openssl_are_read_next,
                                                     TestTls.test_the_same_with_real_tls
TLS: a read that wants a write                       TestTls.test_a_read_that_wants_a_write
TLS: a write that wants a read                       TestTls.test_a_write_that_wants_a_read_waits_without_spinning,
                                                     TestTls.test_a_write_that_wanted_a_read_goes_on_whatever_came
TLS: the same bytes after SSLWantWriteError          TestTls.test_the_next_write_begins_with_the_same_bytes,
                                                     TestTls.test_bulk_both_ways_over_real_tls
an empty mask and HUP                                TestHangup; the reactor's part: tests/test_reactor.py TestTrouble
an error belongs to the socket whose call failed     TestErrors
the state is looked at again after each callback     TestErrors.test_a_link_that_a_callback_closed_handles_nothing_more;
                                                     on_readable is never nested: tests/test_reactor.py TestAgain
only `drop` closes, no number is reused in a batch   tests/test_reactor.py TestDrop
at most 2 ms a turn                                  tests/test_reactor.py TestFairness
accept survives EMFILE                               tests/endpoints/test_tcp.py
small frames are joined into blocks                  TestMemory.test_two_byte_frames_*
more than 256 KiB queued pauses local reads          TestMemory.test_a_link_that_takes_nothing_pauses_local_reads
cancellation takes every socket off                  TestEnd.test_cancelling_the_nursery_closes_every_socket
closing: flush, SHUT_WR, read to EOF at most 1 s     TestEnd.test_closing_*
closing TLS: close_notify before SHUT_WR             TestTls.test_a_close_notify_goes_before_the_end
adopting runs on_readable once                       TestAdopting
`connect < file`                                     tests/test_reactor.py TestAdopt
early data in the same read as `open`                TestAdopting.test_early_data_in_the_same_read_as_open_is_not_lost
control overtakes queued data                        test_control_overtakes_queued_data
little unsent in the kernel                          tests/test_link.py TestStart.test_the_kernel_keeps_little_*
the link's reader never waits for a local socket     test_a_link_is_read_though_its_application_takes_nothing
a failed local write                                 TestFailedWrite
half-closed and idle for an hour                     test_half_closed_and_idle_for_an_hour_is_reset
budgets at 50, 75 and 100 %                          TestBudgets
acks                                                 TestAcks
life of a link                                       TestLife
a slow reader slows nobody else                      test_a_slow_reader_holds_its_window_and_slows_nobody
fairness                                             test_64_bulk_streams_are_each_within_twice_the_mean
links are used again                                 test_many_streams_over_few_links
the second driver                                    `driver` runs the tests over real sockets with both
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import inspect
import os
import random
import socket
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
import trustme
from trio.testing import wait_all_tasks_blocked

from tests.memory import MemoryReactor, MemorySocket
from tests.model import World, installed
from tests.test_link import (
    HELLO,
    End,
    ScriptedTls,
    Wire,
    abort,
    close_write,
    hang_up,
    identify,
    read,
    want_read,
    want_write,
    write,
)  # fmt: skip
from wstunnel import limits, sockets
from wstunnel import link as link_module
from wstunnel import stream as stream_module
from wstunnel.link import Link
from wstunnel.reactor import READ, WRITE, EpollReactor, Reactor, TaskReactor, make_reactor
from wstunnel.session import HALF_CLOSED_SWEEPS
from wstunnel.stream import Stream
from wstunnel.wire.buffer import OffsetBuffer
from wstunnel.wire.frames import MaskKeys, Opcode, encode_close, encode_frame
from wstunnel.wire.messages import Ack, AnyMessage, Eof, Open, Ping, Pong, Reset, Welcome, encode
from wstunnel.wire.protocol import LinkProtocol, PeerClosed
from wstunnel.wire.states import Exchange

DRIVERS = [
    pytest.param(EpollReactor, id="epoll", marks=pytest.mark.skipif(not hasattr(os, "eventfd"), reason="no epoll")),
    pytest.param(TaskReactor, id="task"),
]


# --- two ends over real sockets ---------------------------------------------------------------------------------------


def tcp_pair(buffer: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets on loopback, non-blocking.

    Args:
        buffer: bytes for the kernel's buffers (it takes twice that), instead of as much as it likes.
    """
    with socket.socket() as listener:
        near = socket.socket()
        for sock in (listener, near) if buffer else ():  # what is accepted inherits the listener's
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        near.connect(listener.getsockname())
        far, _ = listener.accept()
    for sock in (near, far):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    client, server = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(client)
    authority.issue_cert("localhost").configure_cert(server)
    return client, server


def tls_pair(contexts: tuple[ssl.SSLContext, ssl.SSLContext], buffer: int | None = None) -> Any:
    """Client's and server's TLS sockets after their handshake."""
    near, far = tcp_pair(buffer)
    client = contexts[0].wrap_socket(near, server_hostname="localhost", do_handshake_on_connect=False)
    server = contexts[1].wrap_socket(far, server_side=True, do_handshake_on_connect=False)
    waiting = [client, server]
    while waiting:
        for sock in list(waiting):
            with contextlib.suppress(ssl.SSLWantReadError):
                sock.do_handshake()
                waiting.remove(sock)
    return client, server


class RealEnd(End):
    """One end: its targets are sockets that the test holds."""

    ends: Ends

    def message(self, link: Link, message: AnyMessage) -> None:
        super().message(link, message)
        if isinstance(message, Open):
            stream = self.accepted[-1]
            stream.dialling = trio.CancelScope()
            self.ends.nursery.start_soon(self._dial, stream, stream.dialling)

    async def _dial(self, stream: Stream, scope: trio.CancelScope) -> None:
        with scope:
            await trio.lowlevel.checkpoint()
            local, application = self.ends.pair()
            stream.connected(self.reactor, local, "target")
            self.ends.dialled[stream.state.id].send_nowait(application)

    def idle(self, link: Link) -> None:
        super().idle(link)
        if link.protocol.side == "client":
            self.ends.idle_links.append(link)


class Ends:
    """A client's and a server's end in one process, each on its own reactor, over TCP or TLS on loopback.

    Args:
        driver: of both reactors.
        window: first window of the streams.
        buffer, link_buffer: for the applications' sockets and for the links, see `tcp_pair`.
        contexts: for TLS on the links.
    """

    def __init__(
        self, nursery: trio.Nursery, driver: Callable[[], Reactor] = make_reactor, *,
        window: int = limits.WINDOW_FIRST, buffer: int | None = None, link_buffer: int | None = None,
        contexts: Any = None,
    ) -> None:  # fmt: skip
        self.nursery = nursery
        self.buffer = buffer
        self.link_buffer = link_buffer
        self.contexts = contexts
        self.client = RealEnd(driver(), window=window)
        self.server = RealEnd(driver(), window=window)
        self.client.ends = self.server.ends = self
        self.idle_links: list[Link] = []
        self.dialled: dict[str, trio.MemorySendChannel[socket.socket]] = {}
        self.applications: list[socket.socket] = []
        self.count = 0
        self._keys = MaskKeys(os.urandom)

    async def start(self) -> None:
        for end in (self.client, self.server):
            await self.nursery.start(end.reactor.run)

    def add_link(self) -> tuple[Link, Link]:
        """A connection, ready for a stream."""
        near, far = tls_pair(self.contexts, self.link_buffer) if self.contexts else tcp_pair(self.link_buffer)
        client = Link(LinkProtocol("client", keys=self._keys, role="forward"), self.client, peer="s", now=0.0)
        server = Link(LinkProtocol("server"), self.server, peer="c", now=0.0)
        for end, link in ((self.client, client), (self.server, server)):
            link.created = link.last_received = end.reactor.now
            end.adopt_link(link)
        client.protocol.send(HELLO)
        client.start(self.client.reactor, near)
        server.start(self.server.reactor, far)
        self.idle_links.append(client)
        return client, server

    def connect(self) -> tuple[Stream, socket.socket, trio.MemoryReceiveChannel[socket.socket]]:
        """An application connects: the stream, its socket, and where the target's will come."""
        if not self.idle_links:
            self.add_link()
        link = self.idle_links.pop()
        self.count += 1
        stream_id = identify(self.count)
        self.dialled[stream_id], target = trio.open_memory_channel[socket.socket](1)
        local, application = self.pair()
        stream = self.client.make_stream(stream_id, egress=False, target="t", peer="p")
        stream.link = link
        link.attach(stream)
        link.open(stream.state, target="t", peer="p")
        stream.start(self.client.reactor, local)
        link.flush()
        return stream, application, target

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """An end's socket and its application's, which `close` closes."""
        local, application = tcp_pair(self.buffer)
        self.applications.append(application)
        return local, application

    def close(self) -> None:
        while self.applications:
            self.applications.pop().close()

    async def open(self) -> tuple[Stream, trio.SocketStream, trio.SocketStream]:
        """A stream through both ends, and the applications' ends of it."""
        stream, application, target = self.connect()
        dialled = await target.receive()
        return stream, stream_of(application), stream_of(dialled)


def stream_of(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> Callable[[], Reactor]:
    return request.param


def stuff(sock: socket.socket | None) -> None:
    """Write until the kernel takes no more."""
    assert sock is not None
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))


MakeEnds = Callable[..., Awaitable[Ends]]


@pytest.fixture
async def make_ends(nursery: trio.Nursery) -> AsyncIterator[MakeEnds]:
    """Makes started `Ends`; the applications' sockets are closed after the test."""
    made: list[Ends] = []

    async def make(driver: Callable[[], Reactor] = make_reactor, **options: Any) -> Ends:
        made.append(Ends(nursery, driver, **options))
        await made[-1].start()
        return made[-1]

    yield make
    for ends in made:
        ends.close()


@pytest.fixture
async def ends(driver: Callable[[], Reactor], make_ends: MakeEnds) -> Ends:
    return await make_ends(driver)


async def until(condition: Callable[[], object]) -> None:
    """Let everything else run until it holds; pytest's time-out ends a wait for ever."""
    while not condition():
        await trio.lowlevel.checkpoint()


async def send_all_and_end(stream: trio.SocketStream, data: bytes) -> None:
    await stream.send_all(data)
    await stream.send_eof()


async def receive_all(stream: trio.SocketStream) -> bytes:
    received = bytearray()
    async for piece in stream:
        received += piece
    return bytes(received)


async def exchange(one: trio.SocketStream, other: trio.SocketStream, data: bytes) -> None:
    """`data` both ways at once, to the end; what arrives must be it."""
    results: list[bytes] = []

    async def take(stream: trio.SocketStream) -> None:
        results.append(hashlib.sha256(await receive_all(stream)).digest())

    async with trio.open_nursery() as nursery:
        for stream in (one, other):
            nursery.start_soon(send_all_and_end, stream, data)
            nursery.start_soon(take, stream)
    assert results == [hashlib.sha256(data).digest()] * 2


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


# --- one way down -----------------------------------------------------------------------------------------------------


async def test_a_readable_socket_is_written_on_in_the_same_turn(make_ends: MakeEnds) -> None:
    """Two turns, one of each reactor and no `await` between them, carry a byte from one application to the other."""
    ends = await make_ends()
    _stream, application, target_channel = ends.connect()
    target = await target_channel.receive()
    await wait_all_tasks_blocked()
    application.send(b"ping")
    ends.client.reactor._turn()
    ends.server.reactor._turn()
    assert target.recv(99) == b"ping"
    target.send(b"pong")
    ends.server.reactor._turn()
    ends.client.reactor._turn()
    assert application.recv(99) == b"pong"
    for sock in (application, target):
        sock.close()


def test_handlers_are_plain_functions() -> None:
    for module in (link_module, stream_module):
        for _, kind in inspect.getmembers(module, inspect.isclass):
            for name, function in inspect.getmembers(kind, inspect.isfunction):
                if function.__module__ == module.__name__:
                    assert not inspect.iscoroutinefunction(function), name
                    assert not inspect.isasyncgenfunction(function), name


@pytest.fixture
def world() -> Iterator[World]:
    with installed():
        yield World(5, idle_links=1)


def test_every_read_goes_into_the_reactors_scratch(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    buffers = []
    scratches = {id(reactor.scratch.obj) for reactor in world.reactors.values()}
    original = MemorySocket.recv_into

    def recv_into(self: MemorySocket, buffer: memoryview, size: int = 0) -> int:
        buffers.append(id(buffer.obj))
        return original(self, buffer, size)

    monkeypatch.setattr(MemorySocket, "recv_into", recv_into)
    for _ in range(5):
        world.open(noise(300), noise(200), room=40)
    world.settle()
    world.finish()
    assert set(buffers) == scratches
    assert len(buffers) > 50


def test_nothing_survives_in_the_scratch(world: World) -> None:
    """It is overwritten after every callback; inboxes, replay buffers and half-written frames are full meanwhile."""
    for _ in range(4):
        world.open(noise(400), noise(300), room=3)
    for _ in range(3000):
        moves = world.moves(world.chance.randint(1, 50))
        world.do(world.chance.choice(moves) if moves else (world.tick, 0.2))
        for reactor in world.reactors.values():
            reactor.scratch[:] = b"\xee" * len(reactor.scratch)
        world.check()
    world.settle()
    world.finish()


def test_control_overtakes_queued_data() -> None:
    """A ping and a pong go before the data that was read before them; a frame begun is finished."""
    wire = Wire("client", end=End(MemoryReactor(), window=4 * limits.MIB))
    _stream, application = wire.open()
    wire.near.outgoing.room = 100
    for _ in range(2):
        write(application, bytes(4096))
        wire.turn()
    assert wire.link.blocked
    wire.link.ping()
    wire.put(encode_frame(Opcode.TEXT, encode(Ping(number=7))))
    wire.turn()
    wire.near.outgoing.room = None
    wire.run()
    first = next(index for index, piece in enumerate(wire.got) if not isinstance(piece, bytes))
    assert wire.got[first : first + 2] == [Ping(number=1), Pong(number=7)]
    assert sum(len(piece) for piece in wire.got[:first]) == 4096
    assert sum(len(piece) for piece in wire.got[first + 2 :]) == 4096


def test_a_link_is_read_though_its_application_takes_nothing() -> None:
    """Or an echo server and a client that writes before it reads would deadlock: the acks queue behind the data."""
    wire = Wire("client", end=End(MemoryReactor(), window=1000))
    stream, application = wire.open(room=0)
    wire.state.outbound.append(bytes(800))
    wire.run()
    write(application, noise(5000))
    wire.run()
    assert wire.data() == noise(5000)
    assert len(stream.inbound.inbox) == 800


# --- TLS --------------------------------------------------------------------------------------------------------------


class TestTls:
    def test_one_event_reads_until_openssl_has_no_more(self) -> None:
        """Records are 100 bytes here; after the first read the selector sees nothing of the rest."""
        wire = Wire(tls=True)
        _stream, application = wire.open()
        wire.near.record = 100
        wire.state.outbound.append(noise(2000))
        wire.carry_in()
        wire.reactor.turn(wire.link)
        assert read(application) == noise(2000)
        assert not wire.near.inside

    def test_bytes_left_inside_openssl_are_read_next(self) -> None:
        wire = Wire(tls=True)
        _stream, application = wire.open()
        size = 3 * len(wire.reactor.scratch) + 5
        wire.state.outbound.append(noise(size))
        wire.carry_in()
        wire.reactor.turn(wire.link)
        assert len(wire.near.inside) > 2 * len(wire.reactor.scratch), "one event does a bounded piece of work"
        assert not wire.near.readable()
        wire.run()
        assert read(application) == noise(size)

    async def test_the_same_with_real_tls(
        self, contexts: Any, driver: Callable[[], Reactor], make_ends: MakeEnds
    ) -> None:
        """One record of 16 KiB, read in pieces of 1,000 bytes."""
        ends = await make_ends(driver, contexts=contexts)
        ends.server.reactor.scratch = memoryview(bytearray(1000))
        _stream, application, target = await ends.open()
        await application.send_all(noise(16000))
        received = b""
        while len(received) < 16000:
            received += await target.receive_some()
        assert received == noise(16000)
        await application.aclose()
        await target.aclose()

    def test_a_read_that_wants_a_write(self) -> None:
        wire = Wire(tls=True)
        wire.near.reads = [want_write()]
        wire.put(encode_frame(Opcode.TEXT, encode(Ping(number=3)), key=wire.key))
        wire.near.outgoing.room = 0  # so that nothing calls on_writable yet
        wire.reactor.turn(wire.link)
        wire.near.incoming.arrived, arrived = bytearray(), wire.near.incoming.arrived
        assert wire.link.mask & WRITE
        wire.near.inside += arrived  # only the write will tell: the selector sees nothing to read
        wire.near.outgoing.room = None
        wire.run()
        assert wire.got == [Pong(number=3)]
        assert wire.link.mask == READ

    def test_a_read_that_wants_a_write_keeps_waiting_for_it_beside_other_writes(self) -> None:
        wire = Wire(tls=True)
        wire.near.reads = [want_write()]
        wire.link.on_readable()
        wire.link.ping()
        assert wire.link.mask == READ | WRITE
        wire.run()
        assert wire.link.mask == READ

    def test_a_write_that_wants_a_read_waits_without_spinning(self) -> None:
        wire = Wire(tls=True)
        wire.near.writes = [want_read()] * 2  # a flush tries twice
        wire.link.ping()
        assert wire.link.blocked
        assert wire.link.mask == READ, "there is room to write: waiting for it would spin"
        calls = len(wire.near.offered)
        wire.run()
        assert len(wire.near.offered) == calls
        wire.put(encode_frame(Opcode.TEXT, encode(Ping(number=3)), key=wire.key))
        wire.run()
        assert wire.got == [Ping(number=1), Pong(number=3)]
        assert not wire.link.blocked

    def test_a_write_that_wanted_a_read_goes_on_whatever_came(self) -> None:
        """A key update, say, of which the link sees no byte."""
        wire = Wire(tls=True)
        wire.near.writes = [want_read()] * 2  # a flush tries twice
        wire.link.ping()
        wire.near.reads = [want_read()]
        wire.link.on_readable()
        wire.run()
        assert wire.got == [Ping(number=1)]

    def test_a_close_frame_that_wants_a_read_goes_on_whatever_came(self) -> None:
        wire = Wire(tls=True)
        wire.near.writes = [want_read()] * 2  # a flush tries twice
        wire.link.close(1001, "going")
        wire.put(encode_frame(Opcode.TEXT, encode(Ping(number=3)), key=wire.key))
        wire.reactor.turn(wire.link)
        wire.carry_out()
        assert wire.got == [PeerClosed(1001, "going")]

    def test_the_next_write_begins_with_the_same_bytes(self) -> None:
        wire = Wire("client", tls=True)
        _stream, application = wire.open()
        wire.near.offered.clear()
        wire.near.writes = [want_write(), want_write(), want_write()]
        write(application, noise(3000))
        wire.reactor.turn(wire.link.stream)
        begun = wire.near.offered[0]
        # Control would overtake, more data would join, and the replay buffer moves: none may touch what was begun.
        wire.link.ping()
        write(application, noise(2000))
        wire.reactor.turn(wire.link.stream)
        wire.link.flush()
        for offered in wire.near.offered[1:4]:
            assert offered[: len(begun)] == begun
        wire.run()
        assert wire.data() == noise(3000) + noise(2000)
        assert Ping(number=1) in wire.got

    async def test_bulk_both_ways_over_real_tls(
        self, contexts: Any, driver: Callable[[], Reactor], make_ends: MakeEnds
    ) -> None:
        """Both directions full: OpenSSL itself refuses a write that is not the one it began ("bad write retry")."""
        ends = await make_ends(driver, contexts=contexts, window=4 * limits.MIB, link_buffer=32 * 1024)
        blocked = 0
        original = Link._write_pending

        def counting(link: Link) -> bool:
            nonlocal blocked
            done = original(link)
            blocked += not done
            return done

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Link, "_write_pending", counting)
            for _ in range(2):
                _stream, application, target = await ends.open()
                await exchange(application, target, noise(6 * limits.MIB))
        assert blocked, "no write ever had to wait: this test shows nothing"
        assert ends.client.losses == ends.server.losses == []

    async def test_closing_with_real_tls_reaches_both_ends(
        self, contexts: Any, driver: Callable[[], Reactor], make_ends: MakeEnds
    ) -> None:
        ends = await make_ends(driver, contexts=contexts)
        client, _server = ends.add_link()
        await wait_all_tasks_blocked()
        client.close(1000, "done")
        await until(lambda: not ends.client.links and not ends.server.links)
        assert ends.client.losses == ["closed"]
        assert ends.server.losses == ["closed by the peer: 1000 done"]

    async def test_a_close_notify_goes_before_the_end(
        self, contexts: Any, driver: Callable[[], Reactor], nursery: trio.Nursery
    ) -> None:
        """RFC 8446 §6.1. Without one the peer's TLS takes the end for an attack, and says so with an alert."""
        reactor = driver()
        await nursery.start(reactor.run)
        near, far = tls_pair(contexts)
        near.suppress_ragged_eofs = False
        end = End(reactor)
        link = Link(LinkProtocol("server"), end, peer="p", now=reactor.now)
        end.adopt_link(link)
        link.start(reactor, far)
        near.send(encode_close(1000, key=b"\1\2\3\4"))
        await until(lambda: link.protocol.close_received)
        assert near.recv(99) == encode_close(1000)
        assert near.recv(99) == b""
        near.close()
        await until(lambda: not end.links)
        assert end.losses == ["closed by the peer: 1000"]

    async def test_a_peer_that_ends_tls_with_its_close_frame(
        self, contexts: Any, driver: Callable[[], Reactor], nursery: trio.Nursery
    ) -> None:
        """Its close_notify was read already when ours goes: then TLS is over, and the socket goes on without it."""
        reactor = driver()
        await nursery.start(reactor.run)
        near, far = tls_pair(contexts)
        end = End(reactor)
        link = Link(LinkProtocol("server"), end, peer="p", now=reactor.now)
        end.adopt_link(link)
        near.send(encode_close(1000, key=b"\1\2\3\4"))
        with contextlib.suppress(ssl.SSLWantReadError):
            near.unwrap()
        link.start(reactor, far)
        await until(lambda: link.protocol.close_received)
        await wait_all_tasks_blocked()
        assert end.losses == [], "the end has not come"
        with socket.socket(fileno=near.detach()) as raw:
            raw.recv(9999)  # what came is read: closing sends no reset
        await until(lambda: not end.links)
        assert end.losses == ["closed by the peer: 1000"]


# --- errors -----------------------------------------------------------------------------------------------------------


class TestHangup:
    async def test_a_stream_without_credit_whose_application_resets_is_noticed(
        self, driver: Callable[[], Reactor], make_ends: MakeEnds
    ) -> None:
        """Nothing is wanted of its socket then: an edge tells it with epoll, elsewhere the sweep looks."""
        ends = await make_ends(driver, window=1000)
        stream, application, target_channel = ends.connect()
        target = await target_channel.receive()
        await wait_all_tasks_blocked()
        stuff(ends.server.accepted[0].sock)
        application.send(bytes(3000))
        await wait_all_tasks_blocked()
        assert stream.mask == 0 and stream.outbound.room() == 0
        sockets.reset_on_close(application)
        application.close()
        await wait_all_tasks_blocked()
        for end in (ends.client, ends.server):
            end.sweep(end.reactor.now)
        await wait_all_tasks_blocked()
        assert ends.client.outcomes == {identify(1): ("reset", "connection reset")}
        assert ends.server.outcomes == {identify(1): ("reset", "connection reset")}
        assert ends.client.losses == []
        target.close()


class TestErrors:
    def test_a_targets_reset_while_the_link_delivers_does_not_kill_the_link(self) -> None:
        wire = Wire()
        stream, application = wire.open()
        abort(application)
        wire.state.outbound.append(b"to nobody")
        wire.carry_in()
        wire.reactor.turn(wire.link)  # the link's callback meets the stream's error
        assert wire.end.losses == []
        wire.run()
        assert stream.outcome == ("reset", "connection reset")
        assert wire.link.protocol.state is wire.peer.state is Exchange.IDLE
        _stream, second = wire.open(2)
        wire.state.outbound.append(b"next")
        wire.run()
        assert read(second) == b"next"

    async def test_the_same_over_real_sockets(self, ends: Ends) -> None:
        _stream, application, target = await ends.open()
        sockets.reset_on_close(target)
        await target.aclose()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await application.send_all(bytes(1000))
        await application.aclose()
        _stream, application, target = await ends.open()
        await exchange(application, target, b"the link lives")
        assert ends.client.losses == ends.server.losses == []
        assert len(ends.client.links) == 1

    def test_an_error_on_the_link_met_by_a_streams_read_belongs_to_the_link(self) -> None:
        end = End(MemoryReactor())
        first, second = Wire("client", end=end), Wire("client", end=end)
        stream, application = first.open()
        abort(first.far)
        write(application, b"x")
        end.reactor.turn(stream)  # the stream's callback meets the link's error
        assert end.losses == ["connection failed: reset"]
        assert stream.outcome == ("lost", "connection failed: reset")
        second.open(2)

    @pytest.mark.parametrize("callback", ["on_readable", "on_writable"])
    async def test_an_exception_in_a_streams_handler_ends_that_stream_only(
        self, ends: Ends, callback: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good, good_application, good_target = await ends.open()
        bad, bad_application, bad_target = await ends.open()
        original = getattr(Stream, callback)

        def fault(stream: Stream) -> None:
            if stream is bad:
                raise ValueError("our bug")
            original(stream)

        monkeypatch.setattr(Stream, callback, fault)
        if callback == "on_writable":
            stuff(bad.sock)
            await bad_target.send_all(b"to be written when there is room")
            await until(lambda: bad.mask & WRITE)
        else:
            await bad_application.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await bad_application.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await bad_target.receive_some()
        await until(lambda: ends.client.outcomes)
        assert ends.client.outcomes == {bad.state.id: ("internal", "internal error: ValueError")}
        await exchange(good_application, good_target, b"others live")
        await until(lambda: good.outcome)
        assert good.outcome == ("finished", "")
        assert ends.client.losses == []
        for stream in (bad_application, bad_target):
            await stream.aclose()

    async def test_an_exception_in_a_links_handler_ends_that_link_only(
        self, ends: Ends, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _good, good_application, good_target = await ends.open()
        bad, bad_application, bad_target = await ends.open()
        broken = bad.link
        original = Link.on_readable

        def fault(link: Link) -> None:
            if link is broken:
                raise ValueError("our bug")
            original(link)

        monkeypatch.setattr(Link, "on_readable", fault)
        await bad_target.send_all(b"x")
        for stream in (bad_application, bad_target):
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            await stream.aclose()
        assert ends.client.losses == ["internal error: ValueError('our bug')"]
        await exchange(good_application, good_target, b"others live")

    def test_a_link_that_a_callback_closed_handles_nothing_more(self) -> None:
        """`deliver` meets the end of the link by writing to it; the same read holds another message."""
        wire = Wire()
        _stream, _application = wire.open()
        original = wire.link.stream.deliver
        delivered = []

        def deliver(data: bytes | memoryview) -> None:
            delivered.append(bytes(data))
            original(data)
            wire.link.lose("connection failed: gone")

        stream = wire.link.stream
        wire.link.stream = None

        class Proxy:
            def __getattr__(self, name: str) -> Any:
                return deliver if name == "deliver" else getattr(stream, name)

        wire.link.stream = Proxy()  # type: ignore[assignment]
        for piece in (b"first", b"second"):
            wire.put(encode_frame(Opcode.BINARY, piece, key=wire.key))
        wire.reactor.turn(wire.link)
        assert delivered == [b"first"]
        assert wire.end.losses == ["connection failed: gone"]


# --- memory -----------------------------------------------------------------------------------------------------------


class TestMemory:
    SIZE = 64 * 1024

    @pytest.fixture
    def heap(self) -> Iterator[Callable[[], int]]:
        gc.collect()
        tracemalloc.start()
        yield lambda: tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()

    def test_two_byte_frames_into_an_inbox_that_nobody_reads(self, heap: Callable[[], int]) -> None:
        wire = Wire()
        stream, _application = wire.open(room=0)
        frames = encode_frame(Opcode.BINARY, b"ab", key=wire.key) * 512
        wire.put(frames)
        wire.run()
        before = heap()
        for _ in range(self.SIZE // 1024):
            wire.put(frames)
            wire.run()
        assert len(stream.inbound.inbox) == self.SIZE + 1024
        assert heap() - before < 4 * self.SIZE

    def test_two_byte_reads_into_a_replay_buffer_that_nobody_acks(self, heap: Callable[[], int]) -> None:
        wire = Wire("client")
        wire.consuming = False
        stream, _application = wire.open()
        before = heap()
        for _ in range(self.SIZE // 2):
            stream.outbound.append(b"ab")
            stream.outbound.take(limits.FRAME_BYTES)
        assert len(stream.outbound.replay) == self.SIZE
        assert heap() - before < 4 * self.SIZE

    def test_two_byte_pieces_in_a_buffer(self, heap: Callable[[], int]) -> None:
        buffer = OffsetBuffer()
        before = heap()
        for _ in range(self.SIZE // 2):
            buffer.append(b"ab")
        assert heap() - before < 4 * self.SIZE

    def test_a_link_that_takes_nothing_pauses_local_reads(self) -> None:
        wire = Wire("client", end=End(MemoryReactor(), window=4 * limits.MIB))
        stream, application = wire.open()
        wire.near.outgoing.room = 0
        data = noise(2 * limits.MIB)
        write(application, data)
        wire.run()
        queued = stream.outbound.queued()
        assert limits.LINK_QUEUE_BYTES <= queued < limits.LINK_QUEUE_BYTES + len(wire.reactor.scratch)
        assert not stream.mask & READ
        assert stream.outbound.room() > 0, "it is the queue that stops it, not the window"
        wire.near.outgoing.room = None
        wire.run()
        assert wire.data() == data
        assert stream.mask & READ


# --- adopting ---------------------------------------------------------------------------------------------------------


class TestAdopting:
    def test_data_that_is_there_already_is_read(self) -> None:
        """What the selector would not tell: bytes that the handshake left inside OpenSSL. The socket itself is told."""
        wire = Wire(greet=False, start=False, tls=True)
        wire.near.inside += encode_frame(Opcode.TEXT, encode(HELLO), key=wire.key)
        assert not wire.near.readable()
        wire.link.start(wire.reactor, wire.near)
        wire.run()
        assert [type(event) for event in wire.got] == [Welcome]

    async def test_the_same_with_real_tls(
        self, contexts: Any, driver: Callable[[], Reactor], nursery: trio.Nursery
    ) -> None:
        """`hello` comes in one record with the end of the HTTP head, which was read by somebody else."""
        reactor = driver()
        await nursery.start(reactor.run)
        near, far = tls_pair(contexts)
        hello = encode_frame(Opcode.TEXT, encode(HELLO), key=b"\1\2\3\4")
        near.send(b"head" + hello)
        await trio.lowlevel.wait_readable(far)
        assert far.recv(4) == b"head"
        end = End(reactor)
        link = Link(LinkProtocol("server"), end, peer="p", now=reactor.now)
        end.adopt_link(link)
        link.start(reactor, far)
        await wait_all_tasks_blocked()
        assert end.messages == [HELLO]
        near.close()

    async def test_what_an_application_wrote_before_is_read(self, ends: Ends) -> None:
        ends.add_link()
        local, application = ends.pair()
        application.send(b"before anybody listened")
        stream = ends.client.make_stream(identify(1), egress=False, target="t", peer="p")
        ends.dialled[identify(1)], channel = trio.open_memory_channel[socket.socket](1)
        link = ends.idle_links.pop()
        stream.link = link
        link.attach(stream)
        link.open(stream.state, target="t", peer="p")
        stream.start(ends.client.reactor, local)
        link.flush()
        target = stream_of(await channel.receive())
        assert await target.receive_some() == b"before anybody listened"
        await target.aclose()
        application.close()

    def test_early_data_in_the_same_read_as_open_is_not_lost(self) -> None:
        """The stream is registered in the call that reads its `open`, long before a dial could end."""
        wire = Wire()
        wire.begin(early=b"early data")
        wire.state.outbound.end()
        wire.carry_in()
        wire.reactor.turn(wire.link)
        assert wire.link.stream is wire.end.accepted[0]
        assert wire.end.losses == []
        application, local = MemorySocket.pair()
        wire.end.accepted[0].connected(wire.reactor, local, "target")
        assert read(application) == b"early data"
        assert application.incoming.ended

    async def test_hello_open_and_early_data_in_one_write(self, ends: Ends) -> None:
        """Nothing has read from either link yet: all three are there when the server's is adopted."""
        local, application = ends.pair()
        application.send(b"early")
        client, server = tcp_pair()
        link = Link(LinkProtocol("client", keys=MaskKeys(os.urandom), role="forward"), ends.client, peer="s", now=0.0)
        ends.client.adopt_link(link)
        link.protocol.send(HELLO)
        stream = ends.client.make_stream(identify(1), egress=False, target="t", peer="p")
        ends.dialled[identify(1)], channel = trio.open_memory_channel[socket.socket](1)
        stream.link = link
        link.attach(stream)
        link.open(stream.state, target="t", peer="p")
        stream.start(ends.client.reactor, local)
        stream.outbound.append(application_bytes := local.recv(99))
        link.start(ends.client.reactor, client)
        ends.client.reactor.again(stream)
        accepted = Link(LinkProtocol("server"), ends.server, peer="c", now=0.0)
        accepted.created = accepted.last_received = link.last_received = ends.server.reactor.now
        ends.server.adopt_link(accepted)
        accepted.start(ends.server.reactor, server)
        target = stream_of(await channel.receive())
        assert await target.receive_some() == application_bytes == b"early"
        await target.aclose()
        application.close()


# --- ends -------------------------------------------------------------------------------------------------------------


class TestFailedWrite:
    """The application (or target) takes no more, but what it sent before must reach the peer."""

    def broken(self) -> tuple[Wire, Stream, MemorySocket]:
        wire = Wire("client", end=End(MemoryReactor(), window=10_000))
        wire.consuming = False
        stream, application = wire.open(room=4)
        write(application, b"a reply that was sent before")
        wire.state.outbound.append(b"12345678")
        wire.run()

        def fail(data: bytes | memoryview) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        stream.sock.send = fail  # type: ignore[method-assign]
        wire.reactor.want(stream, READ | WRITE)
        stream.on_writable()
        return wire, stream, application

    def test_goes_on_consuming(self) -> None:
        wire, stream, _application = self.broken()
        assert stream.inbound.consumed == 8 and not len(stream.inbound.inbox)
        for _ in range(10):
            wire.state.outbound.append(bytes(2500))
            wire.run()
        assert stream.inbound.consumed == 8 + 25_000, "three windows: credit went on"
        assert stream.reason is None
        assert wire.end.principal.budget.held == len(stream.outbound.replay)

    def test_reads_the_local_socket_to_its_end(self) -> None:
        wire, stream, application = self.broken()
        write(application, b", and one after")
        wire.run()
        assert wire.data() == b"a reply that was sent before, and one after"
        assert stream.reason is None, "the application has not ended"

    def test_resets_only_after_the_peer_acked_everything(self) -> None:
        wire, stream, application = self.broken()
        close_write(application)
        wire.run()
        assert wire.messages()[-1] == Eof(n=1, total=28)
        assert stream.reason is None
        wire.state.inbound.taken(27)
        wire.state.ack_wanted = True
        wire.run()
        assert stream.reason is None
        wire.state.inbound.taken(1)
        wire.state.ack_wanted = True
        wire.run()
        assert stream.outcome == ("reset", "connection reset")
        assert wire.messages()[-1] == Reset(n=1, code="reset", message="connection reset")
        assert wire.data() == b"a reply that was sent before"

    def test_a_write_that_fails_while_the_link_delivers(self) -> None:
        wire = Wire("client", end=End(MemoryReactor(), window=10_000))
        stream, application = wire.open()

        def fail(data: bytes | memoryview) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        stream.sock.send = fail  # type: ignore[method-assign]
        for _ in range(10):
            wire.state.outbound.append(bytes(2500))
            wire.run()
        assert stream.inbound.consumed == 25_000
        write(application, b"last words")
        wire.run()
        assert wire.data() == b"last words"
        close_write(application)
        wire.run()
        assert stream.outcome == ("reset", "connection reset")

    def test_a_read_that_fails_afterwards_counts_as_the_end(self) -> None:
        """A Unix socket whose other end was closed without reading all gives ECONNRESET behind the last byte."""
        wire, stream, application = self.broken()
        hang_up(application)
        assert application.incoming.sent, "not all was read"
        wire.run()
        assert wire.data() == b"a reply that was sent before"
        assert stream.reason is None and stream.mask == 0
        wire.state.inbound.taken(28)
        wire.state.ack_wanted = True
        wire.run()
        assert stream.outcome == ("reset", "connection reset")

    def test_a_hangup_afterwards_does_not_end_it_while_there_is_no_credit(self) -> None:
        wire, stream, application = self.broken()
        write(application, bytes(12_000))
        wire.run()
        assert stream.mask == 0 and stream.outbound.room() == 0
        hang_up(application)
        wire.run()
        assert stream.reason is None
        wire.state.inbound.taken(10_000)
        wire.run()
        assert len(wire.data()) == 28 + 12_000
        wire.state.inbound.taken(2028)
        wire.state.ack_wanted = True
        wire.run()
        assert stream.outcome == ("reset", "connection reset")

    async def test_with_real_sockets_a_reply_is_not_lost(self, ends: Ends) -> None:
        """A server that answers at once and closes without reading the request, as HTTP servers do with 413."""
        _stream, application, target = await ends.open()
        await target.send_all(b"413 too large")
        await target.send_eof()
        with contextlib.suppress(trio.BrokenResourceError):
            await application.send_all(bytes(100_000))
        assert await application.receive_some() == b"413 too large"
        await target.aclose()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await application.send_all(bytes(100_000))
        await application.aclose()
        assert ends.client.losses == []


def test_half_closed_and_idle_for_an_hour_is_reset() -> None:
    wire = Wire()
    stream, application = wire.open()
    close_write(application)
    wire.run()

    def sweep(now: float) -> None:
        wire.reactor.now = now
        for _ in range(HALF_CLOSED_SWEEPS):
            wire.end.sweep(now)
            wire.run()

    sweep(10.0)
    sweep(9.0 + limits.HALF_CLOSED_SECONDS)
    assert stream.outcome is None
    sweep(10.0 + limits.HALF_CLOSED_SECONDS)
    assert stream.outcome == ("idle", "half-closed and silent for an hour")
    assert wire.got[-1] == Reset(n=1, code="idle", message="half-closed and silent for an hour")
    assert application.reset_by_peer


class TestEnd:
    def test_closing_flushes_first(self) -> None:
        """The close frame goes behind what was begun; SHUT_WR behind the close frame."""
        wire = Wire()
        _stream, application = wire.open()
        wire.near.outgoing.room = 50
        write(application, noise(4000))
        wire.run()
        wire.link.close(1001, "going")
        assert not wire.near.outgoing.ended
        wire.near.outgoing.room = None
        wire.run()
        assert wire.data() == noise(4000)
        assert wire.messages() == [PeerClosed(1001, "going")]
        assert wire.near.outgoing.ended

    def test_closing_reads_to_the_end_for_a_second_at_most(self) -> None:
        wire = Wire()
        wire.link.close(1001, "going")
        wire.run()
        assert wire.near.outgoing.ended
        for _ in range(3):
            wire.put(b"unread")
            wire.turn()
        assert not wire.near.incoming.arrived
        assert not wire.near.closed, "closing with unread input would send a reset that destroys what was sent"
        wire.link.sweep(limits.LINGER_SECONDS - 0.01)
        assert not wire.near.closed
        wire.link.sweep(limits.LINGER_SECONDS)
        assert wire.near.closed
        assert wire.end.losses == ["closed"]

    def test_closing_lets_go_at_once_when_the_peer_ends(self) -> None:
        wire = Wire()
        wire.link.close(1001, "going")
        wire.run()
        hang_up(wire.far)
        wire.turn()
        assert wire.near.closed

    async def test_cancelling_the_nursery_closes_every_socket(self, driver: Callable[[], Reactor]) -> None:
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        outside: list[socket.socket] = []
        async with trio.open_nursery() as nursery:
            ends = Ends(nursery, driver)
            await ends.start()
            for _ in range(10):
                _stream, application, target = ends.connect()
                outside += [application, await target.receive()]
            _stream, application, _target = ends.connect()  # its dial is under way
            outside.append(application)
            nursery.cancel_scope.cancel()
        gc.collect()
        mine = [sock for sock in outside if sock.fileno() >= 0]
        assert len(os.listdir("/proc/self/fd")) == before + len(mine)
        for sock in mine:
            sock.close()
        assert len(os.listdir("/proc/self/fd")) == before
        for end in (ends.client, ends.server):
            assert all(link.sock is None for link in end.links)
            assert all(stream.sock is None for stream in end.streams.values())


# --- budgets, acks, life ----------------------------------------------------------------------------------------------


class TestBudgets:
    def transfer(self, wire: Wire, size: int) -> list[Ack]:
        for _ in range(size // 1000):
            wire.state.outbound.append(bytes(1000))
            wire.run()
        return [message for message in wire.messages() if isinstance(message, Ack)]

    @pytest.mark.parametrize(("held", "grows"), [(0.49, True), (0.5, False)])
    def test_at_50_percent_windows_stop_growing(self, held: float, grows: bool) -> None:
        end = End(MemoryReactor(), window=10_000, capacity=10_000_000)
        wire = Wire(end=end)
        wire.open()
        end.principal.budget.charge(int(held * 10_000_000))
        last = self.transfer(wire, 40_000)[-1]
        assert (last.limit - last.consumed > 10_000) == grows

    @pytest.mark.parametrize(("held", "shrinks"), [(0.74, False), (0.75, True)])
    def test_at_75_percent_windows_shrink_to_the_floor(self, held: float, shrinks: bool) -> None:
        """And opens are refused: tests/test_session.py TestBudgets."""
        end = End(MemoryReactor(), window=2 * limits.WINDOW_FLOOR, capacity=10_000_000)
        wire = Wire(end=end)
        wire.open()
        end.principal.budget.charge(int(held * 10_000_000))
        last = self.transfer(wire, 600_000)[-1]
        assert last.limit - last.consumed == (limits.WINDOW_FLOOR if shrinks else 2 * limits.WINDOW_FLOOR)

    def test_at_100_percent_the_largest_stream_is_reset(self) -> None:
        end = End(MemoryReactor(), window=100_000, capacity=100_000)
        wires = [Wire(end=end) for _ in range(3)]
        streams = []
        for number, (wire, size) in enumerate(zip(wires, (20_000, 50_000, 29_000), strict=True), 1):
            stream, _application = wire.open(number, room=0)
            wire.state.outbound.append(bytes(size))
            wire.run()
            streams.append(stream)
        assert end.principal.budget.held == 99_000
        wires[2].state.outbound.append(bytes(1000))
        wires[2].run()
        assert end.principal.budget.held == 50_000
        wires[1].run()
        assert end.outcomes == {identify(2): ("limit", "too much memory is held: the largest stream is reset")}
        assert wires[1].link.protocol.state is Exchange.IDLE, "its link lives"
        assert not end.losses

    def test_a_stream_that_is_starved_goes_on_after_the_sweep(self) -> None:
        end = End(MemoryReactor(), window=100_000, capacity=100_000)
        wire, hog = Wire("client", end=end), Wire("client", end=end)
        stream, application = wire.open()
        wire.consuming = False
        end.principal.budget.charge(100_000)  # all of it, elsewhere
        write(application, b"wait for it")
        wire.run()
        assert wire.data() == b""
        assert stream.mask == 0, "readable for ever, and no room: to want it would spin"
        end.sweep(1.0)
        wire.run()
        assert wire.data() == b""
        end.principal.budget.charge(-100_000)
        wire.run()
        assert wire.data() == b""
        end.sweep(2.0)
        wire.run()
        assert wire.data() == b"wait for it"
        assert hog.link.sock is not None


class TestAcks:
    def wire(self) -> Wire:
        wire = Wire(end=End(MemoryReactor(), window=8000))
        wire.open()
        return wire

    def acks(self, wire: Wire) -> list[int]:
        return [message.consumed for message in wire.messages() if isinstance(message, Ack)]

    def send(self, wire: Wire, size: int) -> None:
        wire.state.outbound.append(bytes(size))
        wire.run()

    def test_one_at_a_quarter_of_the_window_and_never_one_per_read(self) -> None:
        wire = self.wire()
        for _ in range(80):
            self.send(wire, 100)
        assert self.acks(wire) == [2000, 4000, 6000, 8000]

    def test_the_end_is_acked_at_once(self) -> None:
        wire = self.wire()
        self.send(wire, 10)
        wire.state.outbound.end()
        wire.run()
        assert self.acks(wire) == [11]

    def test_the_sweep_acks_what_moved_and_only_that(self) -> None:
        wire = self.wire()
        self.send(wire, 10)
        wire.end.sweep(1.0)
        wire.run()
        assert self.acks(wire) == [10]
        wire.end.sweep(2.0)
        wire.run()
        assert self.acks(wire) == [10]

    def test_the_sweep_acks_what_was_consumed_long_after_it_arrived(self) -> None:
        wire = Wire(end=End(MemoryReactor(), window=8000))
        stream, _application = wire.open(room=0)
        self.send(wire, 10)
        wire.end.sweep(1.0)
        wire.run()
        assert self.acks(wire) == [0]
        stream.sock.outgoing.room = 10
        wire.run()
        assert self.acks(wire) == [0]
        wire.end.sweep(2.0)
        wire.run()
        assert self.acks(wire) == [0, 10]

    def test_the_sweep_acks_what_a_failed_write_threw_away(self) -> None:
        wire = Wire(end=End(MemoryReactor(), window=8000))
        stream, _application = wire.open(room=0)
        self.send(wire, 10)
        wire.end.sweep(1.0)

        def fail(data: bytes | memoryview) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        stream.sock.send = fail
        stream.on_writable()
        wire.end.sweep(2.0)
        wire.run()
        assert self.acks(wire) == [0, 10]


class TestLife:
    def test_ping_after_15_seconds_of_silence_and_dead_10_seconds_after_it(self) -> None:
        wire = Wire()
        _stream, application = wire.open()
        wire.reactor.advance(limits.PING_AFTER_SECONDS - 0.001)
        assert not wire.near.outgoing.sent
        wire.reactor.advance(0.001)
        assert b'"ping"' in wire.near.outgoing.sent
        wire.reactor.advance(limits.PONG_WITHIN_SECONDS - 0.001)
        assert wire.end.losses == []
        wire.reactor.advance(0.001)
        assert wire.end.losses == ["no answer for 25 s"]
        assert application.reset_by_peer

    @pytest.mark.parametrize("proof", [b"\x8a", b"\x8a\x80\1\2\3\4"])
    def test_any_byte_proves_life(self, proof: bytes) -> None:
        """Be it a piece of a frame."""
        wire = Wire()
        wire.reactor.advance(20.0)  # asked after 15
        wire.put(proof)
        wire.turn()
        wire.reactor.advance(14.9)
        assert wire.near.outgoing.sent.count(b'"ping"') == 1
        wire.reactor.advance(0.2)  # silent for 15 s again
        assert wire.near.outgoing.sent.count(b'"ping"') == 2
        wire.reactor.advance(9.8)
        assert wire.end.losses == []
        assert wire.link.sock is not None
        wire.reactor.advance(0.2)
        assert wire.end.losses == ["no answer for 25 s"]

    def test_an_unanswered_reset_closes_the_link_after_10_seconds(self) -> None:
        wire = Wire()
        stream, _application = wire.open()
        stream.reset("reset", "gone")
        wire.carry_out()
        wire.reactor.now = 10.0
        wire.link.sweep(10.0)
        assert not wire.link.protocol.close_sent
        wire.reactor.now = 10.1
        wire.link.sweep(10.1)
        pipe = wire.near.outgoing
        assert b"resetting was not answered" in pipe.sent
        assert stream.outcome == ("reset", "gone")

    def test_hello_has_a_deadline(self) -> None:
        wire = Wire(greet=False)
        wire.link.sweep(10.0)
        assert not wire.link.protocol.close_sent
        wire.link.sweep(10.1)
        assert b"no hello in time" in wire.near.outgoing.sent


# --- many streams -----------------------------------------------------------------------------------------------------


def held(end: End) -> int:
    """Bytes that an end really holds for its streams."""
    return sum(len(stream.outbound.replay) + len(stream.inbound.inbox) for stream in end.streams.values())


async def test_a_slow_reader_holds_its_window_and_slows_nobody(
    driver: Callable[[], Reactor], make_ends: MakeEnds
) -> None:
    """Default windows. The kernel's own buffers are kept small, so that it is the tunnel that has to hold."""
    ends = await make_ends(driver, buffer=16 * 1024)
    slow, slow_application, slow_target = await ends.open()
    _quick, application, target = await ends.open()
    written = 0

    async def write_for_ever() -> None:
        nonlocal written
        while True:
            written += await slow_application.socket.send(bytes(8192))

    async with trio.open_nursery() as inner:
        inner.start_soon(write_for_ever)
        data = noise(64 * 1024)
        for _ in range(20):  # the quick one goes on beside it
            inner.start_soon(application.send_all, data)
            received = b""
            while len(received) < len(data):
                received += await target.receive_some()
            assert received == data
        far = ends.server.streams[slow.state.id]
        await until(lambda: slow.outbound.room() == 0 and far.inbound.received == slow.outbound.limit)
        inner.cancel_scope.cancel()
    most = {end: held(end) for end in (ends.client, ends.server)}
    for end, size in most.items():
        assert size == end.principal.budget.held
    window = limits.WINDOW_FIRST
    assert written > window, "it was stopped by something other than the window"
    assert far.inbound.window.size == window
    assert window // 2 < len(far.inbound.inbox) <= window
    assert window // 2 < len(slow.outbound.replay) <= window
    # The quick one's last bytes may wait for their ack: less than a quarter of a window.
    assert most[ends.client] <= window + window // 4
    assert most[ends.server] <= window
    assert written < 2 * window + 4 * 64 * 1024, "the rest is in the kernel's buffers"
    async with trio.open_nursery() as inner:
        inner.start_soon(slow_application.aclose)
        assert len(await receive_all(slow_target)) == written
    for stream in (slow_target, application, target):
        await stream.aclose()


async def test_64_bulk_streams_are_each_within_twice_the_mean(
    driver: Callable[[], Reactor], make_ends: MakeEnds
) -> None:
    """In the long run: how soon each one's window grows is a matter of luck on a busy machine."""
    ends = await make_ends(driver)
    count, total, most = 64, 64 * limits.MIB, 512 * limits.MIB
    block = bytes(256 * 1024)
    received = [0] * count
    looked_at = 0
    enough = trio.Event()
    pairs = []
    for _ in range(count):
        _stream, application, target = await ends.open()
        pairs.append((application, target))

    async def write_for_ever(stream: trio.SocketStream) -> None:
        while True:
            await stream.send_all(block)

    def are_fair() -> bool:
        mean = sum(received) / count
        return mean / 2 <= min(received) and max(received) <= mean * 2

    async def count_bytes(index: int, stream: trio.SocketStream) -> None:
        nonlocal looked_at
        while True:
            received[index] += len(await stream.receive_some(256 * 1024))
            if sum(received) - looked_at >= total:
                looked_at = sum(received)
                if are_fair() or looked_at >= most:
                    enough.set()

    async with trio.open_nursery() as inner:
        for index, (application, target) in enumerate(pairs):
            inner.start_soon(write_for_ever, application)
            inner.start_soon(count_bytes, index, target)
        await enough.wait()
        assert are_fair(), received
        inner.cancel_scope.cancel()
    for pair in pairs:
        for stream in pair:
            await stream.aclose()


async def test_many_streams_over_few_links(ends: Ends) -> None:
    """300 streams in a row, three at a time: three links carry them all, and nothing is left of them."""
    for _ in range(3):
        ends.add_link()
    await wait_all_tasks_blocked()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                _stream, application, target = await ends.open()
                nursery.start_soon(exchange, application, target, b"x" * 100)
        await until(lambda: len(ends.idle_links) == 3 and not ends.server.streams)
        ends.close()
        for channel in ends.dialled.values():
            channel.close()
        ends.dialled.clear()
    assert len(ends.client.links) == len(ends.server.links) == 3
    assert sum(link.protocol.n for link in ends.client.links) == 300
    assert not ends.client.streams and not ends.server.streams
    assert held(ends.client) == held(ends.server) == 0
    assert ends.client.principal.budget.held == ends.server.principal.budget.held == 0
    assert set(ends.client.outcomes.values()) == {("finished", "")}
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_scripted_socket_passes_for_tls() -> None:
    """All of TestTls rests on it."""
    wire = Wire(tls=True)
    assert isinstance(wire.near, ssl.SSLSocket) and type(wire.near) is ScriptedTls
    wire.near.writes = [want_write()] * 2
    wire.link.ping()
    assert wire.link.blocked
