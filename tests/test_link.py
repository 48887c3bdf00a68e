"""One WebSocket on the reactor: reading, writing, life and death of its connection, in memory.

`Wire` is used by the tests of streams, sessions and the data path, too.
"""

from __future__ import annotations

import errno
import math
import os
import random
import socket
import ssl
from collections.abc import Callable
from typing import Any, Literal

import pytest
import trio

from tests.memory import MemoryReactor, MemorySocket, Pipe
from wstunnel import limits, logs
from wstunnel import link as link_module
from wstunnel.errors import LocalError, ProtocolError
from wstunnel.link import FLUSH_BYTES, NOTSENT_LOWAT, Link
from wstunnel.liveness import STALL_ANSWER_SECONDS, STALL_SECONDS
from wstunnel.pace import FLOOR_BYTES, FRAME_SECONDS
from wstunnel.reactor import READ, WRITE, make_reactor
from wstunnel.session import Principal, Session
from wstunnel.stream import Stream
from wstunnel.wire import messages
from wstunnel.wire.credit import Budget
from wstunnel.wire.frames import MaskKeys, Opcode, encode_frame, encode_pair
from wstunnel.wire.messages import (
    VERSION,
    Ack,
    AnyMessage,
    Bye,
    Eof,
    Hello,
    Message,
    Open,
    Opened,
    Ping,
    Pong,
    Reset,
    Resume,
    Welcome,
    encode,
)
from wstunnel.wire.protocol import LinkProtocol, PeerClosed, StreamState
from wstunnel.wire.states import Exchange

KIB = limits.KIB
EDGE = 0.001
"""Seconds before a deadline, and after it: sums of floats miss it by less."""
SESSION = "s" * 22
HELLO = Hello(version=VERSION, session=SESSION, role="forward")
WELCOME = Welcome(version=VERSION, server="v" * 22, boot="b" * 22)


def identify(number: int) -> str:
    """A stream's id."""
    return f"{number:022d}"


class End(Session):
    """A session that writes down what it is told, and accepts every stream without dialling."""

    def __init__(
        self, reactor: Any, *, window: int = limits.WINDOW_FIRST, name: str = "someone", capacity: int = 1 << 30,
        process: Budget | None = None, everyone: dict[str, Principal] | None = None,
    ) -> None:  # fmt: skip
        self.window = window
        principal = Principal(name, process or Budget(1 << 40), {} if everyone is None else everyone)
        principal.budget = Budget(capacity, principal.budget.parent)
        super().__init__(SESSION, principal, reactor, logs.logger("test"))
        self.messages: list[AnyMessage] = []
        self.idled: list[Link] = []
        self.stalls: list[Link] = []
        self.losses: list[str] = []
        self.accepted: list[Stream] = []
        self.reached: list[Stream] = []
        self.outcomes: dict[str, tuple[str, str]] = {}
        self.on_message: Callable[[Link, AnyMessage], None] = lambda link, message: None

    def message(self, link: Link, message: AnyMessage) -> None:
        self.messages.append(message)
        if isinstance(message, Hello):
            link.protocol.send(WELCOME)
        elif isinstance(message, Open):
            stream = self.make_stream(message.stream, egress=True, target=message.target, peer=message.peer)
            stream.link = link
            link.attach(stream)
            link.protocol.accept(stream.state)
            self.accepted.append(stream)
        elif not isinstance(message, Welcome):
            super().message(link, message)
        self.on_message(link, message)

    def idle(self, link: Link) -> None:
        super().idle(link)
        self.idled.append(link)

    def lost(self, link: Link, reason: str) -> None:
        super().lost(link, reason)
        self.losses.append(reason)

    def stalled(self, link: Link) -> None:
        super().stalled(link)
        self.stalls.append(link)

    def stream_opened(self, stream: Stream) -> None:
        super().stream_opened(stream)
        self.reached.append(stream)

    def stream_ended(self, stream: Stream) -> None:
        super().stream_ended(stream)
        assert stream.outcome is not None
        self.outcomes[stream.state.id] = stream.outcome


class ScriptedTls(MemorySocket):
    """What a link takes for an SSLSocket: bytes leave the selector's sight in records, and calls can be made to fail.

    Attributes:
        record: bytes that one read gives at most.
        reads, writes: errors for the next calls; None lets one through.
        offered: what each call of `send` was given.
    """

    record = 16384
    notified = False

    def __init__(self, incoming: Pipe, outgoing: Pipe) -> None:
        super().__init__(incoming, outgoing)
        self.reads: list[Exception | None] = []
        self.writes: list[Exception | None] = []
        self.offered: list[bytes] = []
        self.inside = bytearray()

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return ssl.SSLSocket

    def recv_into(self, buffer: memoryview, size: int = 0) -> int:
        if self.reads:
            error = self.reads.pop(0)
            if error is not None:
                raise error
        if self.incoming.arrived:
            self.inside += self.incoming.arrived
            self.incoming.arrived.clear()
        if self.inside:
            count = min(len(self.inside), self.record, size or len(buffer))
            buffer[:count] = self.inside[:count]
            del self.inside[:count]
            return count
        try:
            return super().recv_into(buffer, size)
        except BlockingIOError:
            raise ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "want read") from None

    def pending(self) -> int:
        return len(self.inside)

    def send(self, data: bytes | memoryview) -> int:
        self.offered.append(bytes(data))
        error = self.writes.pop(0) if self.writes else None
        if error is not None:
            raise error
        if self.outgoing.room is not None and self.outgoing.room < len(data):
            raise want_write()  # SSL_write takes all or nothing
        return super().send(data)

    def unwrap(self) -> None:
        """The peer's close_notify has come if `notified`."""
        if not self.notified:
            raise want_read()

    def sendmsg(self, buffers: list[bytes | memoryview]) -> int:
        raise NotImplementedError("sendmsg not allowed on instances of SSLSocket")


def want_write() -> ssl.SSLWantWriteError:
    return ssl.SSLWantWriteError(ssl.SSL_ERROR_WANT_WRITE, "want write")


def want_read() -> ssl.SSLWantReadError:
    return ssl.SSLWantReadError(ssl.SSL_ERROR_WANT_READ, "want read")


class Wire:
    """A link under test on a memory reactor; at the other end of its connection a protocol in the test's hands.

    Attributes:
        end: owns `link`.
        near, far: the connection's two sockets; `near` is the link's.
        peer: the protocol at the other end; `state` is its view of the stream.
        got: what the peer received: payloads as bytes, messages, `PeerClosed`.
        consuming: whether the peer's application reads.
    """

    def __init__(
        self, side: Literal["client", "server"] = "server", *, end: End | None = None, tls: bool = False,
        greet: bool = True, start: bool = True,
    ) -> None:  # fmt: skip
        self.reactor = MemoryReactor() if end is None else end.reactor
        self.end = End(self.reactor) if end is None else end
        inward, outward = Pipe(), Pipe()
        self.near = (ScriptedTls if tls else MemorySocket)(inward, outward)
        self.far = MemorySocket(outward, inward)
        self.near.peer, self.far.peer = self.far, self.near
        keys = MaskKeys(random.Random(7).randbytes)
        if side == "server":
            self.peer = LinkProtocol("client", keys=keys, role="forward")
            protocol = LinkProtocol("server")
        else:
            self.peer = LinkProtocol("server")
            protocol = LinkProtocol("client", keys=keys, role="forward")
        self.side = side
        self.link = Link(protocol, self.end, peer="192.0.2.1:5", now=self.reactor.now)
        self.end.adopt_link(self.link)
        self.state: StreamState | None = None
        self.got: list[Any] = []
        self.consuming = True
        if start:
            self.link.start(self.reactor, self.near)  # type: ignore[arg-type]
        if greet:
            self.greet()

    def greet(self) -> None:
        if self.side == "server":
            self.peer.send(HELLO)
            self.run()
        else:
            self.link.send(HELLO)
            self.run()
        assert self.link.protocol.state is self.peer.state is Exchange.IDLE
        self.got.clear()

    # --- the connection -----------------------------------------------------------------------------------------------

    def carry_in(self) -> bool:
        """What the peer has to say arrives; nobody has read it yet."""
        if self.far.closed or self.far.outgoing.ended:
            return False
        moved = False
        while buffers := self.peer.pull(limits.FRAME_BYTES, self.reactor.now, 0.0):
            self.put(b"".join(buffers))
            moved = True
        return moved

    def put(self, data: bytes) -> None:
        """Bytes of the peer's arrive."""
        self.far.outgoing.sent += data
        self.far.outgoing.move(len(data))

    def carry_out(self) -> bool:
        """What the link has written reaches the peer."""
        pipe = self.near.outgoing
        pipe.move(len(pipe.sent))
        data = bytes(pipe.arrived)
        pipe.arrived.clear()
        for event in self.peer.receive(data):
            self._received(event)
        return bool(data)

    def _received(self, event: Any) -> None:
        if isinstance(event, bytes | memoryview):
            self.got.append(bytes(event))
            assert self.state is not None
            if self.consuming:
                self.state.inbound.passed(len(event))
            else:
                self.state.inbound.store(event)
            return
        self.got.append(event)
        if isinstance(event, Open):
            self.state = StreamState(event.stream, egress=True, budget=Budget(1 << 40), window=self.end.window)
            self.peer.accept(self.state)
        elif isinstance(event, Hello):
            self.peer.send(WELCOME)
        elif isinstance(event, Eof) and self.consuming:
            assert self.state is not None
            self.state.inbound.end_delivered()

    def turn(self) -> bool:
        """One call for every handler that is ready."""
        ready = self.reactor.ready()
        for handler in ready:
            if handler.sock is not None:
                self.reactor.turn(handler)
        return bool(ready)

    def run(self) -> None:
        """Until nothing moves any more."""
        for _ in range(10_000):
            if not (self.carry_in() | self.turn() | self.carry_out()):
                return
        raise AssertionError("never quiet: somebody spins")

    def say(self, *messages: Message) -> None:
        """The peer sends messages, whatever its state, and all that follows happens."""
        for message in messages:
            self.put(encode_frame(Opcode.TEXT, encode(message), key=self.key))
        self.run()

    @property
    def key(self) -> bytes | None:
        return b"\1\2\3\4" if self.side == "server" else None

    # --- a stream -----------------------------------------------------------------------------------------------------

    def open(self, number: int = 1, *, room: int | None = None) -> tuple[Stream, MemorySocket]:
        """A stream on this idle link, opened by whoever may, with its application's socket.

        Args:
            number: of its id.
            room: bytes that the stream can write until the application reads.
        """
        application, local = MemorySocket.pair()
        local.outgoing.room = room
        if self.side == "client":
            stream = self.end.make_stream(identify(number), egress=False, target="tcp:db:1", peer="application")
            stream.link = self.link
            self.link.attach(stream)
            self.link.open(stream.state, target="tcp:db:1", peer="application")
            stream.start(self.reactor, local)  # type: ignore[arg-type]
            self.link.flush()
            self.run()
            self.peer.opened("192.0.2.7:1")
        else:
            self.begin(number)
            self.run()
            stream = self.end.accepted[-1]
            stream.connected(self.reactor, local, "192.0.2.7:1")  # type: ignore[arg-type]
        self.run()
        self.got.clear()
        return stream, application

    def begin(self, number: int = 1, early: bytes = b"") -> None:
        """The peer opens a stream; nothing is carried yet."""
        self.state = StreamState(identify(number), egress=False, budget=Budget(1 << 40), window=self.end.window)
        self.peer.open(self.state, target="tcp:db:1", peer="application")
        if early:
            self.state.outbound.append(early)

    def data(self) -> bytes:
        """All stream data that the peer received."""
        return b"".join(piece for piece in self.got if isinstance(piece, bytes))

    def messages(self) -> list[Any]:
        """All else that it received."""
        return [piece for piece in self.got if not isinstance(piece, bytes)]


def write(application: MemorySocket, data: bytes) -> None:
    """An application writes."""
    application.send(data)
    application.outgoing.move(len(data))


def close_write(application: MemorySocket) -> None:
    application.shutdown(socket.SHUT_WR)
    application.outgoing.move(0)


def abort(application: MemorySocket) -> None:
    """An application resets its connection."""
    application.linger_reset = True
    application.close()


def hang_up(sock: MemorySocket) -> None:
    """Close in good order; the end arrives."""
    sock.close()
    sock.outgoing.move(0)


def read(application: MemorySocket) -> bytes:
    """All that an application can read now."""
    pipe = application.incoming
    pipe.move(len(pipe.sent))
    data = bytes(pipe.arrived)
    pipe.arrived.clear()
    return data


class TestStart:
    def test_what_was_queued_before_goes_out_at_once(self):
        wire = Wire("client", greet=False, start=False)
        wire.link.protocol.send(HELLO)
        wire.link.start(wire.reactor, wire.near)
        assert wire.near.outgoing.sent
        wire.carry_out()
        assert wire.got == [HELLO]

    def test_bytes_that_came_with_the_http_head_are_handled_first(self):
        wire = Wire(greet=False, start=False)
        hello = encode_frame(Opcode.TEXT, encode(HELLO), key=wire.key)
        wire.link.start(wire.reactor, wire.near, hello)
        assert wire.end.messages == [HELLO]
        wire.carry_out()
        assert wire.got == [WELCOME]

    def test_a_socket_that_cannot_be_watched_loses_the_link_and_its_stream(self, monkeypatch):
        wire = Wire("client", greet=False, start=False)
        stream = wire.end.make_stream(identify(1), egress=False, target="t", peer="p")
        stream.link = wire.link
        wire.link.attach(stream)

        def refuse(handler: object, sock: object) -> None:
            raise LocalError("cannot wait for descriptor 7: no reason given")

        monkeypatch.setattr(wire.reactor, "adopt", refuse)
        wire.link.start(wire.reactor, wire.near, b"leftover")
        assert wire.near.closed
        assert wire.end.losses == ["cannot wait for descriptor 7: no reason given"]
        assert stream.outcome == ("lost", "cannot wait for descriptor 7: no reason given")
        assert not wire.end.links

    @pytest.mark.parametrize("leftover", [b"", b"x"])
    def test_a_fault_in_our_own_code_loses_it(self, leftover, monkeypatch):
        """It runs in the caller's task, outside of the reactor, which would have caught it."""
        wire = Wire(greet=False, start=False)

        def fault(*arguments: object) -> None:
            raise ValueError("our bug")

        monkeypatch.setattr(Link, "flush", fault)
        monkeypatch.setattr(Link, "_process", fault)
        wire.link.start(wire.reactor, wire.near, leftover)
        assert wire.near.closed
        assert wire.end.losses == ["internal error: ValueError('our bug')"]

    async def test_on_a_reactor_that_has_stopped_the_socket_is_closed(self):
        reactor = make_reactor()
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            nursery.cancel_scope.cancel()
        end = End(reactor)
        for leftover in (b"", b"x"):
            near, far = socket.socketpair()
            link = Link(LinkProtocol("server"), end, peer="", now=0.0)
            link.start(reactor, near, leftover)
            assert near.fileno() == -1
            assert link.sock is None
            far.close()
        link.flush()
        link.close(1000)
        link.lose("nothing to lose")
        assert end.losses == []

    async def test_the_kernel_keeps_little_unsent_on_tcp(self, nursery):
        reactor = make_reactor()
        await nursery.start(reactor.run)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
        Link(LinkProtocol("server"), End(reactor), peer="", now=0.0).start(reactor, near)
        assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == NOTSENT_LOWAT
        nursery.cancel_scope.cancel()

    def test_a_kernel_that_does_not_know_the_option_carries_the_link_too(self):
        wire = Wire(greet=False, start=False)
        wire.near.family = socket.AF_INET

        def unknown(level: int, option: int, value: int) -> None:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")

        wire.near.setsockopt = unknown
        wire.link.start(wire.reactor, wire.near)
        wire.greet()
        assert not wire.end.losses


class TestEnds:
    def test_end_of_the_connection_without_a_close_frame(self):
        wire = Wire()
        hang_up(wire.far)
        wire.run()
        assert wire.end.losses == ["connection closed without a close frame"]
        assert wire.near.closed
        assert not wire.reactor.handlers

    def test_a_reset_connection(self):
        wire = Wire()
        abort(wire.far)
        wire.run()
        assert wire.end.losses == ["connection failed: reset"]

    def test_a_reset_met_while_writing(self):
        wire = Wire()
        abort(wire.far)
        wire.link.ping()
        assert wire.end.losses == ["connection failed: reset"]

    def test_nothing_to_read_is_no_failure(self):
        wire = Wire()
        wire.link.on_readable()
        assert not wire.end.losses

    def test_losing_takes_the_stream_along_and_tells_the_owner_once(self):
        wire = Wire()
        stream, application = wire.open()
        wire.link.lose("first")
        wire.link.lose("second")
        assert wire.end.losses == ["first"]
        assert stream.outcome == ("lost", "first")
        assert application.reset_by_peer
        assert wire.link.stream is None
        wire.link.flush()

    def test_an_exception_in_our_own_code_ends_this_link_only(self):
        end = End(MemoryReactor())
        first, second = Wire(end=end), Wire(end=end)
        first.link.fail(ValueError("our bug"))
        assert end.losses == ["internal error: ValueError('our bug')"]
        assert end.links == {second.link}
        second.open()

    def test_the_owner_may_lose_the_link_in_the_middle_of_a_read(self):
        wire = Wire(greet=False)
        wire.end.on_message = lambda link, message: link.lose("enough")
        for message in (HELLO, Bye()):
            wire.put(encode_frame(Opcode.TEXT, encode(message), key=wire.key))
        wire.turn()
        assert wire.end.messages == [HELLO]
        assert wire.end.losses == ["enough"]


class TestMessages:
    def test_a_ping_is_answered(self):
        wire = Wire()
        wire.say(Ping(number=9))
        assert wire.got == [Pong(number=9)]

    def test_the_smallest_round_trip_is_kept(self):
        wire = Wire()
        for seconds in (0.5, 0.2, 0.3):
            wire.link.ping()
            wire.carry_out()
            wire.reactor.now += seconds
            wire.run()
        assert wire.link.round_trip == pytest.approx(0.2)

    def test_a_pong_that_nobody_asked_for_is_ignored(self):
        wire = Wire()
        wire.say(Pong(number=1))
        wire.link.ping()
        wire.carry_out()
        wire.peer._pong_number = None
        wire.say(Pong(number=77))
        assert wire.link.round_trip == 0
        assert not wire.end.losses

    def test_one_that_is_not_expected_is_1002(self):
        wire = Wire()
        wire.put(encode_frame(Opcode.TEXT, b'{"type":"need","links":4}', key=wire.key))
        wire.run()
        (closed,) = wire.got
        assert closed.code == 1002
        assert closed.reason == "need not from a server on its control link"

    def test_one_that_the_role_does_not_expect_is_1002(self):
        wire = Wire()
        wire.link.protocol.role = "control"
        wire.say(Bye())
        assert wire.got == [PeerClosed(1002, "bye is not expected here")]

    def test_garbage_is_1002_and_what_follows_is_not_handled(self):
        wire = Wire()
        wire.put(b"\xff" * 20)
        wire.turn()
        wire.say(Ping(number=1))
        assert [event.code for event in wire.got] == [1002]

    def test_a_pong_beyond_64_kib_of_unread_control_closes_with_1008(self):
        wire = Wire()
        wire.near.outgoing.room = 0
        wire.link.ping()
        for _ in range(limits.CONTROL_QUEUE_BYTES // 10):
            wire.link.ping()
        wire.near.outgoing.room = None
        wire.run()
        assert wire.got[-1] == PeerClosed(1008, "too many control messages queued: the peer does not read")

    @pytest.mark.parametrize("call", ["open", "opened"])
    def test_the_same_when_it_is_a_streams_message(self, call):
        wire = Wire("client" if call == "open" else "server")
        if call == "opened":
            wire.begin()
            wire.run()
        wire.near.outgoing.room = 0
        for _ in range(limits.CONTROL_QUEUE_BYTES):
            try:
                wire.link.protocol.send(Ping(number=1))
            except ProtocolError:
                break
        if call == "open":
            stream = wire.end.make_stream(identify(1), egress=False, target="t", peer="p")
            stream.link = wire.link
            wire.link.attach(stream)
            wire.link.open(stream.state, target="t", peer="p")
        else:
            (stream,) = wire.end.accepted
            wire.link.opened("address")
        assert stream.outcome == ("lost", "too many control messages queued: the peer does not read")


class TestTls:
    """The traps of non-blocking TLS are in test_data_path.py; here the rest."""

    def test_end_of_the_connection(self):
        wire = Wire(tls=True)
        hang_up(wire.far)
        wire.run()
        assert wire.end.losses == ["connection closed without a close frame"]

    def test_what_came_before_the_end_is_handled_first(self):
        wire = Wire(tls=True)
        wire.put(encode_frame(Opcode.TEXT, encode(Ping(number=3)), key=wire.key))
        wire.far.shutdown(socket.SHUT_WR)
        wire.far.outgoing.move(0)
        wire.turn()
        wire.carry_out()
        assert wire.got == [Pong(number=3)]
        wire.turn()
        assert wire.end.losses == ["connection closed without a close frame"]

    def test_an_error(self):
        wire = Wire(tls=True)
        wire.near.reads = [ssl.SSLError(1, "bad record mac")]
        wire.link.on_readable()
        assert wire.end.losses == ["connection failed: bad record mac"]

    def test_what_came_before_the_error_is_handled_first(self):
        wire = Wire(tls=True)
        error = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        wire.near.reads = [None, error, error]
        frame = encode_frame(Opcode.TEXT, encode(Ping(number=3)), key=wire.key)
        wire.near.record = len(frame)
        wire.put(frame + b"\x82")  # more is inside OpenSSL, so it is asked again
        wire.turn()
        wire.carry_out()
        assert wire.got == [Pong(number=3)]
        assert not wire.end.losses
        wire.turn()
        assert wire.end.losses == ["connection failed: Connection reset by peer"]

    def test_a_short_record_with_nothing_behind_it_is_one_read(self):
        """To ask again would be answered by an exception, which costs as much as the rest of a small message."""
        wire = Wire(tls=True)
        wire.near.reads = [None, RuntimeError("asked again")]
        wire.put(encode_frame(Opcode.TEXT, encode(Ping(number=3)), key=wire.key))
        wire.turn()
        wire.carry_out()
        assert wire.got == [Pong(number=3)]
        assert len(wire.near.reads) == 1

    def test_the_end_met_by_a_read_that_wanted_a_write(self):
        wire = Wire(tls=True)
        wire.near.reads = [want_write()]
        wire.link.on_readable()
        hang_up(wire.far)
        wire.link.on_writable()
        assert wire.end.losses == ["connection closed without a close frame"]

    def test_an_error_while_writing(self):
        wire = Wire(tls=True)
        wire.near.writes = [ssl.SSLError(1, "protocol is shutdown")]
        wire.link.ping()
        assert wire.end.losses == ["connection failed: protocol is shutdown"]

    def test_a_partial_write_goes_on_at_once(self):
        wire = Wire(tls=True)
        whole = wire.near.send
        wire.near.send = lambda data: whole(data[:7])
        wire.link.ping()
        assert not wire.link.blocked
        wire.run()
        assert Ping(number=1) in wire.got


class TestWriting:
    def test_a_frame_that_does_not_fit_waits_and_goes_on_where_it_stopped(self):
        wire = Wire("client")
        _stream, application = wire.open()
        for room in (0, 5, 3000):
            wire.near.outgoing.room = room
            write(application, b"a" * 5000)
            wire.run()
            assert wire.link.blocked
            assert wire.link.mask == READ | WRITE
            wire.near.outgoing.room = None
            wire.run()
            assert wire.link.mask == READ
        assert wire.data() == b"a" * 15000

    def test_a_frame_that_goes_on_and_fails(self):
        wire = Wire("client")
        _stream, application = wire.open()
        wire.near.outgoing.room = 5
        write(application, b"a" * 5000)
        wire.turn()
        assert wire.link.blocked
        abort(wire.far)
        wire.link.on_writable()
        assert wire.end.losses == ["connection failed: reset"]

    def test_a_gathered_write_that_fails(self):
        wire = Wire("client")
        _stream, application = wire.open()
        write(application, b"a" * 4096)
        abort(wire.far)
        stream = wire.link.stream
        wire.reactor.turn(stream)
        assert wire.end.losses == ["connection failed: reset"]
        assert stream.outcome == ("lost", "connection failed: reset")

    def test_one_event_writes_no_more_than_its_budget(self):
        """A peer that reads as fast as we write must not keep the reactor to itself."""
        end = End(MemoryReactor(), window=8 * limits.MIB)
        wire = Wire("client", end=end)
        stream, _application = wire.open()
        stream.outbound.append(bytes(4 * limits.MIB))
        wire.link.flush()
        written = len(wire.near.outgoing.sent)
        assert FLUSH_BYTES <= written < FLUSH_BYTES + limits.FRAME_BYTES + 100
        assert wire.link.mask == READ | WRITE
        wire.run()
        assert len(wire.data()) == 4 * limits.MIB
        assert wire.link.mask == READ


class TestCarry:
    """A few bytes, just read, go the short way."""

    @pytest.mark.parametrize("tls", [False, True])
    @pytest.mark.parametrize("side", ["client", "server"])
    def test_they_are_sent_and_kept(self, side, tls):
        wire = Wire(side, tls=tls)
        stream, application = wire.open()
        for number in range(50):
            write(application, b"%d" % number)
            wire.turn()
            assert not stream.outbound.queued()
        wire.run()
        sent = b"".join(b"%d" % number for number in range(50))
        assert wire.data() == sent
        assert bytes(stream.outbound.replay.view(0, 999)) == sent

    @pytest.mark.parametrize("tls", [False, True])
    @pytest.mark.parametrize("room", [0, 3])
    def test_a_connection_that_is_full(self, room, tls):
        wire = Wire("client", tls=tls)
        _stream, application = wire.open()
        wire.near.outgoing.room = room
        write(application, b"abc")
        wire.turn()
        assert wire.link.blocked
        assert wire.link.mask == READ | WRITE
        write(application, b"def")
        wire.turn()
        wire.near.outgoing.room = None
        wire.run()
        assert not wire.link.blocked
        assert wire.link.mask == READ
        assert wire.data() == b"abcdef"

    def test_tls_that_wants_to_read_first(self):
        wire = Wire("client", tls=True)
        _stream, application = wire.open()
        wire.near.writes = [want_read(), want_read()]
        write(application, b"abc")
        wire.turn()
        assert wire.link.blocked
        assert wire.link.mask == READ, "to wait for room, which there is, would spin"
        wire.put(encode_frame(Opcode.PING, b""))
        wire.run()
        assert wire.data() == b"abc"

    def test_a_write_that_fails(self):
        wire = Wire("client")
        stream, application = wire.open()
        write(application, b"abc")
        abort(wire.far)
        wire.reactor.turn(stream)
        assert wire.end.losses == ["connection failed: reset"]
        assert stream.outcome == ("lost", "connection failed: reset")

    def test_a_connection_that_breaks_keeps_them_once(self, monkeypatch):
        wire = Wire("client")
        stream, application = wire.open()
        monkeypatch.setattr(wire.end, "stream_detached", lambda stream: True)
        write(application, b"abc")
        abort(wire.far)
        wire.reactor.turn(stream)
        assert bytes(stream.outbound.replay.view(0, 99)) == b"abc"
        assert len(stream.outbound.replay) == 3

    def test_it_is_taken_for_few_bytes_only(self, monkeypatch):
        """No frame is longer than a slow connection can bear, and `flush` is what looks at that."""
        wire = Wire("client")
        _stream, application = wire.open()
        wire.link._write_pace.frame = FLOOR_BYTES
        flushed: list[int] = []
        flush = wire.link.flush
        monkeypatch.setattr(Link, "flush", lambda link: (flushed.append(1), flush())[1])
        for size, ways in ((1, 0), (FLOOR_BYTES, 0), (FLOOR_BYTES + 1, 1)):
            write(application, bytes(size))
            wire.turn()
            assert len(flushed) == ways, size
        wire.run()
        assert max(map(len, wire.got)) == FLOOR_BYTES

    def test_what_was_answered_is_awaited_no_more(self):
        wire = Wire("client")
        _stream, application = wire.open()
        write(application, b"abc")
        wire.turn()
        assert not wire.link.protocol.expecting
        assert not wire.link._liveness.quiet
        wire.carry_out()
        wire.peer.ping(1)
        wire.run()
        assert wire.link._liveness.quiet, "a pong asks for nothing"

    def test_a_connection_that_took_nothing_at_first_has_its_time(self):
        wire = Wire("client")
        _stream, application = wire.open()
        wire.reactor.now += limits.STALLED_SECONDS
        wire.near.outgoing.room = 0
        write(application, b"abc")
        wire.turn()
        wire.link.sweep(wire.reactor.now + 1.0)
        assert wire.end.losses == []
        wire.link.sweep(wire.reactor.now + limits.STALLED_SECONDS + 1.0)
        assert wire.end.losses == [f"the peer took nothing for {limits.STALLED_SECONDS + 1:.0f} s"]

    def test_the_last_of_the_credit(self):
        """It is not read on where there is no room: the mask says so at once."""
        wire = Wire("client", end=End(MemoryReactor(), window=8))
        wire.consuming = False
        stream, application = wire.open()
        write(application, b"12345678")
        wire.turn()
        assert stream.mask == 0
        wire.run()
        assert wire.data() == b"12345678"


class TestPace:
    """How much is read at once follows from how long it takes: a turn is short, whatever the frames are like."""

    @pytest.fixture
    def seconds(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """What handling one read takes, in the test's hands."""
        took, clock = [0.0], [0.0]

        def spent() -> float:
            clock[0] += took[0]
            return clock[0]

        monkeypatch.setattr(MemoryReactor, "spent", staticmethod(spent))
        return took

    @pytest.mark.parametrize("tls", [False, True])
    def test_slow_work_reads_less_down_to_a_floor_and_quick_work_more(self, seconds, tls):
        wire = Wire(tls=tls)
        wire.reactor.scratch = memoryview(bytearray(limits.SCRATCH_BYTES))
        _stream, application = wire.open()
        seconds[0] = 2 * limits.TURN_SECONDS
        for _ in range(9):
            wire.state.outbound.append(bytes(2 * limits.READ_FLOOR_BYTES))
            wire.run()
        wire.state.outbound.append(bytes(3 * limits.READ_FLOOR_BYTES))
        wire.carry_in()
        read(application)
        wire.reactor.turn(wire.link)
        assert 0 < len(read(application)) <= limits.READ_FLOOR_BYTES
        wire.run()
        seconds[0] = limits.TURN_SECONDS / 2  # neither slow nor quick
        wire.state.outbound.append(bytes(2 * limits.READ_FLOOR_BYTES))
        wire.run()
        assert wire.link._read_size == limits.READ_FLOOR_BYTES
        seconds[0] = 0.0
        for _ in range(30):
            wire.state.outbound.append(bytes(2 * limits.READ_FLOOR_BYTES))
            wire.run()
        assert wire.link._read_size == limits.SCRATCH_BYTES

    def test_little_is_not_worth_the_look_at_the_clock(self, monkeypatch):
        """A read below the floor could not be made smaller; on an interactive stream all reads are."""
        wire = Wire()
        _stream, application = wire.open()

        def spent() -> float:
            raise AssertionError("two system calls for a keystroke")

        monkeypatch.setattr(MemoryReactor, "spent", staticmethod(spent))
        wire.state.outbound.append(bytes(limits.READ_FLOOR_BYTES - 20))
        wire.run()
        assert len(read(application)) == limits.READ_FLOOR_BYTES - 20


def fails(code: int) -> Callable[..., int]:
    def call(*_arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    return call


def pass_time(wire: Wire, seconds: float) -> None:
    """Time passes, and alarms run; what the link wrote reaches the peer, whose answers do not come back yet."""
    wire.reactor.advance(seconds)
    wire.carry_out()


class TestLife:
    def sweep(self, wire: Wire, now: float) -> None:
        wire.reactor.now = now
        wire.link.sweep(now)
        wire.run()

    def test_a_peer_that_does_not_greet_is_closed(self):
        for side, reason in (("server", "no hello in time"), ("client", "no welcome in time")):
            wire = Wire(side, greet=False)
            self.sweep(wire, limits.HANDSHAKE_SECONDS)
            assert wire.got == []
            wire.peer.greeted = True
            self.sweep(wire, limits.HANDSHAKE_SECONDS + 0.1)
            assert PeerClosed(1002, reason) in wire.got

    def test_a_peer_that_takes_nothing_is_lost_though_it_sends(self):
        for tls in (False, True):
            wire = Wire("client", tls=tls)
            _stream, application = wire.open()
            wire.near.outgoing.room = 0
            write(application, b"nobody takes this")
            wire.run()
            for now in (limits.STALLED_SECONDS / 2, limits.STALLED_SECONDS):
                wire.reactor.now = now
                wire.say(Ping(number=1))
                wire.link.sweep(now)
                assert wire.end.losses == []
            wire.reactor.now = limits.STALLED_SECONDS + 1
            wire.link.sweep(wire.reactor.now)
            assert wire.end.losses == [f"the peer took nothing for {limits.STALLED_SECONDS + 1:.0f} s"]

    def test_a_peer_that_takes_a_little_is_not(self):
        wire = Wire("client")
        _stream, application = wire.open()
        wire.near.outgoing.room = 10
        write(application, bytes(3000))
        wire.run()
        for step in range(1, 5):
            wire.reactor.now = step * limits.STALLED_SECONDS
            wire.near.outgoing.room = 10
            wire.say(Ping(number=1))
            wire.link.sweep(wire.reactor.now)
        assert wire.link.blocked
        assert wire.end.losses == []

    def test_pings_go_only_into_silence(self):
        """15 s after the last byte, at the client after 13, not with the next sweep."""
        for side, after in (("server", limits.PING_AFTER_SECONDS), ("client", limits.CLIENT_PING_AFTER_SECONDS)):
            wire = Wire(side)
            for number in range(1, 4):
                wire.reactor.advance(number * after - EDGE - wire.reactor.now)
                wire.carry_out()
                assert wire.got == []
                pass_time(wire, EDGE)
                assert [type(message) for message in wire.got] == [Ping]
                wire.run()  # answered, and the time begins again
                wire.got.clear()

    def test_an_rfc_6455_ping_goes_along_for_proxies_that_count_only_those(self):
        wire = Wire()
        wire.link.ping()
        assert wire.near.outgoing.sent == b"\x89\x00" + encode_frame(Opcode.TEXT, encode(Ping(number=1)))

    def test_a_peer_that_takes_no_pings_is_closed(self):
        wire = Wire("client")
        wire.near.outgoing.room = 0
        wire.link.ping()
        for _ in range(limits.CONTROL_QUEUE_BYTES // 26 + 1):
            wire.link.ping()
        assert wire.link.protocol.close_sent
        wire.near.outgoing.room = None
        wire.run()
        assert [event for event in wire.got if isinstance(event, PeerClosed)] == [
            PeerClosed(1008, "too many control messages queued: the peer does not read")
        ]

    @pytest.mark.parametrize("side", ["client", "server"])
    @pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
    def test_an_exchange_of_pings_is_one_write_a_side(self, side, busy, monkeypatch):
        """What thousands of idle links cost: no JSON, no look at the send queue, no change of what is wanted."""
        wire = Wire(side)
        if busy:
            wire.open()
        wire.run()
        keys = MaskKeys(os.urandom) if side == "server" else None
        writes: list[bytes] = []
        alarms: list[float] = []
        send, at = wire.near.send, wire.reactor.at
        wire.near.send = lambda data: writes.append(bytes(data)) or send(data)
        monkeypatch.setattr(wire.reactor, "at", lambda when, call: alarms.append(when) or at(when, call))
        for module, name in ((link_module.sockets, "unsent"), (messages, "decode"), (messages, "encode")):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("too dear"))
        monkeypatch.setattr(wire.reactor, "want", lambda *_: pytest.fail("nothing else is wanted"))
        wire.reactor.advance(0.0)
        wire.put(encode_pair(Opcode.PING, b'{"type":"ping","number":7}', keys))
        wire.turn()
        assert len(writes) == 1
        assert alarms == []
        writes.clear()
        after = limits.CLIENT_PING_AFTER_SECONDS if side == "client" else limits.PING_AFTER_SECONDS
        wire.reactor.advance(after - EDGE)
        alarms.clear()  # those of what opened the link
        wire.reactor.advance(EDGE)
        assert len(writes) == 1
        assert len(alarms) == 1
        wire.reactor.advance(0.5)
        wire.put(encode_pair(Opcode.PONG, b'{"type":"pong","number":1}', keys))
        wire.turn()
        assert wire.link.round_trip == 0.5
        assert len(writes) == 1
        wire.reactor.advance(1.0)  # the look at an answer that has come
        assert len(alarms) == 2
        monkeypatch.undo()
        wire.carry_out()
        assert [message for message in wire.got if isinstance(message, Ping | Pong)] == [Pong(number=7), Ping(number=1)]

    def test_a_reset_that_is_not_answered_closes_the_link(self):
        wire = Wire()
        stream, _application = wire.open()
        stream.reset("reset", "gone")
        wire.carry_out()  # and the peer says nothing
        assert wire.link.protocol.state is Exchange.RESETTING
        wire.reactor.now = limits.PONG_WITHIN_SECONDS
        wire.link.sweep(wire.reactor.now)
        assert wire.end.losses == [] and wire.link.sock is not None
        assert not wire.link.protocol.close_sent
        wire.reactor.now += 0.1
        wire.link.sweep(wire.reactor.now)
        assert wire.link.protocol.close_sent
        assert stream.outcome == ("reset", "gone")

    def test_the_deadline_of_a_reset_does_not_outlive_its_answer(self):
        wire = Wire()
        stream, _application = wire.open()
        stream.reset("reset", "gone")
        wire.run()
        assert wire.link.protocol.state is Exchange.IDLE
        wire.open(2)
        self.sweep(wire, limits.PONG_WITHIN_SECONDS + 1)
        assert not wire.link.protocol.close_sent


class TestLiveness:
    """The clocks of `liveness`, as the reactor's alarms and the socket drive them."""

    def test_dead_ten_seconds_after_an_unanswered_ping(self):
        wire = Wire()
        pass_time(wire, limits.PING_AFTER_SECONDS + limits.PONG_WITHIN_SECONDS - EDGE)
        assert wire.end.losses == []
        pass_time(wire, 2 * EDGE)
        assert wire.end.losses == ["no answer for 25 s"]
        assert wire.end.stalls == [], "nothing was in flight"

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_data_in_flight_for_three_seconds_stalls_the_link_which_is_dead_five_later(self, side):
        wire = Wire(side)
        _stream, application = wire.open()
        wire.reactor.advance(1)
        write(application, b"x")
        wire.turn()
        pass_time(wire, STALL_SECONDS - EDGE)
        assert wire.end.stalls == []
        wire.got.clear()
        pass_time(wire, 2 * EDGE)
        assert wire.end.stalls == [wire.link]
        assert [type(message) for message in wire.got] == [Ping]
        pass_time(wire, STALL_ANSWER_SECONDS - 3 * EDGE)
        assert wire.end.losses == []
        pass_time(wire, 3 * EDGE)
        assert wire.end.losses == ["no answer for 9 s"]
        assert len(wire.end.stalls) == 1

    def test_a_long_path_is_given_four_round_trips(self):
        wire = Wire()
        _stream, application = wire.open()
        wire.link.round_trip = 2.0
        write(application, b"x")
        wire.turn()
        pass_time(wire, 8 - EDGE)
        assert wire.end.stalls == []
        pass_time(wire, 2 * EDGE)
        assert wire.end.stalls == [wire.link]

    def test_bytes_that_come_back_are_progress(self):
        wire = Wire()
        _stream, application = wire.open()
        for _ in range(10):
            write(application, b"x")
            wire.turn()
            pass_time(wire, STALL_SECONDS - EDGE)
            wire.put(b"\x8a\x80\1\2\3\4")
            wire.turn()
        assert wire.end.stalls == []

    def test_a_reply_that_waits_unread_at_the_deadline_saves_the_link(self):
        """Death needs a read that began after the deadline: perhaps it was we who had no time."""
        wire = Wire()
        pass_time(wire, 24.9)
        wire.put(b"\x8a")  # one byte of a frame
        pass_time(wire, 15.0)
        assert wire.end.losses == []
        wire.got.clear()
        pass_time(wire, 0.2)
        assert [type(message) for message in wire.got] == [Ping], "silent for 15 s since it was read"

    def test_an_end_that_waits_unread_at_the_deadline_is_what_it_is(self):
        wire = Wire()
        pass_time(wire, 24.9)
        hang_up(wire.far)
        pass_time(wire, 0.1)
        assert wire.end.losses == ["connection closed without a close frame"]

    def test_a_ping_behind_a_blocked_frame_is_not_late_before_it_is_written(self):
        wire = Wire()
        wire.near.outgoing.room = 0
        wire.put(encode_frame(Opcode.PING, b"", key=wire.key))  # its pong blocks, and asks for no answer itself
        wire.turn()
        assert wire.link.blocked
        pass_time(wire, 30)
        assert wire.got == [] and wire.end.losses == []
        wire.near.outgoing.room = None
        wire.turn()
        wire.carry_out()
        assert [type(message) for message in wire.got] == [Ping]
        pass_time(wire, limits.PONG_WITHIN_SECONDS - EDGE)
        assert wire.end.losses == []
        pass_time(wire, 2 * EDGE)
        assert wire.end.losses == ["no answer for 40 s"]

    def test_a_full_connection_whose_queue_stands_still_is_dead_in_time_though_nothing_is_awaited(self, monkeypatch):
        wire = Wire()
        wire.near.outgoing.room = 0
        wire.put(encode_frame(Opcode.PING, b"", key=wire.key))
        wire.turn()
        assert wire.link.blocked
        monkeypatch.setattr(link_module.sockets, "unsent", lambda _sock: 500_000)
        pass_time(wire, limits.PING_AFTER_SECONDS + limits.PONG_WITHIN_SECONDS)
        assert wire.end.losses == ["no answer for 25 s"]

    def test_an_alarm_that_comes_before_anything_is_due_does_not_look_at_the_queue(self, monkeypatch):
        wire = Wire()
        _stream, application = wire.open()
        wire.reactor.advance(limits.PING_AFTER_SECONDS - 1.0)
        wire.put(b"\x8a\x80\1\2\3\4")
        wire.turn()
        write(application, b"x")
        wire.turn()
        looks: list[float] = []
        monkeypatch.setattr(link_module.sockets, "unsent", lambda _sock: looks.append(wire.reactor.now))
        pass_time(wire, STALL_SECONDS)
        assert looks == [limits.PING_AFTER_SECONDS - 1.0 + STALL_SECONDS]

    @pytest.mark.parametrize("tls", [False, True])
    @pytest.mark.parametrize("size", [1, 2000, 4096], ids=["carried", "one-write", "gathered"])
    def test_data_behind_a_blocked_frame_is_not_in_flight(self, size, tls):
        wire = Wire(tls=tls)
        _stream, application = wire.open()
        wire.near.outgoing.room = 0
        write(application, bytes(size))
        wire.turn()
        assert wire.link.blocked
        pass_time(wire, STALL_SECONDS + 1)
        assert wire.end.stalls == []
        wire.near.outgoing.room = None
        wire.turn()
        pass_time(wire, STALL_SECONDS)
        assert wire.end.stalls == [wire.link]

    @pytest.mark.parametrize("size", [1, 2000, 4096], ids=["carried", "one-write", "gathered"])
    def test_a_part_of_a_frame_is_in_flight(self, size):
        wire = Wire()
        _stream, application = wire.open()
        wire.near.outgoing.room = 2
        write(application, bytes(size))
        wire.turn()
        assert wire.link.blocked
        pass_time(wire, STALL_SECONDS)
        assert wire.end.stalls == [wire.link]

    def test_after_a_sleep_it_is_asked_at_once(self):
        wire = Wire()
        wire.reactor.now = 5.0  # of those that it was awake
        wire.link.woke(5.0)
        wire.put(b"\x8a")  # may have waited in the kernel all the while
        wire.turn()
        assert wire.got == []
        pass_time(wire, 0)
        assert [type(message) for message in wire.got] == [Ping]
        pass_time(wire, limits.PONG_WITHIN_SECONDS - EDGE)
        assert wire.end.losses == []
        pass_time(wire, 2 * EDGE)
        assert len(wire.end.losses) == 1

    def test_before_the_greeting_nothing_is_asked(self):
        """No message may go then. The deadline of the greeting is the sweep's."""
        wire = Wire(greet=False)
        pass_time(wire, 60)
        assert wire.got == [] and wire.end.losses == []
        wire.greet()
        pass_time(wire, 1.1)
        wire.got.clear()
        pass_time(wire, limits.PING_AFTER_SECONDS)
        assert [type(message) for message in wire.got] == [Ping]

    def test_alarms_of_a_link_that_is_gone_do_nothing(self):
        wire = Wire()
        _stream, application = wire.open()
        write(application, b"x")
        wire.turn()
        wire.link.lose("cut")
        wire.near.outgoing.sent.clear()
        wire.reactor.advance(100)
        assert wire.end.losses == ["cut"]
        assert wire.end.stalls == []
        assert not wire.near.outgoing.sent

    @pytest.mark.parametrize(
        ("end", "silent"),
        [("time", True), ("timeout", True), ("timeout while writing", True), ("reset", False), ("end", False)],
    )
    def test_a_stream_is_told_whether_its_link_fell_silent(self, end, silent):
        """After silence it trusts only links that were heard since; a connection that was ended says so itself."""
        wire = Wire("client")
        wire.end.resume_window = 300.0
        stream, application = wire.open()
        wire.reactor.advance(1)
        wire.put(b"\x8a")
        wire.turn()
        if end == "time":
            wire.reactor.advance(60)
        elif end == "timeout":
            wire.near.recv_into = fails(errno.ETIMEDOUT)
            wire.put(b"x")
        elif end == "timeout while writing":
            wire.near.sendmsg = wire.near.send = fails(errno.ETIMEDOUT)
            write(application, b"x")
        elif end == "reset":
            wire.near.reset_by_peer = True
        else:
            hang_up(wire.far)
        wire.turn()
        assert len(wire.end.losses) == 1
        assert stream.outcome is None and stream.link is None
        assert stream.proof_after == (1.0 if silent else -math.inf)

    def test_a_link_in_its_closing_handshake_is_not_asked(self):
        wire = Wire()
        wire.link.close(1000, "done")
        wire.carry_out()
        wire.got.clear()
        pass_time(wire, 100)
        assert wire.got == [] and wire.end.losses == []

    def test_a_fault_of_ours_in_an_alarm_ends_that_link_only(self, monkeypatch):
        end = End(MemoryReactor())
        wire, other = Wire(end=end), Wire(end=end)

        def broken(*_arguments: object) -> None:
            raise ValueError("our bug")

        ping = Link.ping
        monkeypatch.setattr(Link, "ping", lambda link: broken() if link is wire.link else ping(link))
        wire.reactor.advance(limits.PING_AFTER_SECONDS)
        assert end.losses == ["internal error: ValueError('our bug')"]
        assert end.links == {other.link}

    def test_a_resume_that_is_not_answered_closes_the_link(self):
        wire = Wire("client")
        wire.end.resume_window = 300.0
        stream = wire.end.make_stream(identify(1), egress=False, target="tcp:db:1", peer="application")
        stream.state.epoch = 1
        wire.link.resume(stream)
        wire.carry_out()
        assert [type(message) for message in wire.got] == [Resume]
        assert wire.link.protocol.state is Exchange.RESUMING
        wire.reactor.now = limits.PONG_WITHIN_SECONDS
        wire.link.sweep(wire.reactor.now)
        assert not wire.link.protocol.close_sent
        wire.reactor.now += 0.1
        wire.link.sweep(wire.reactor.now)
        wire.carry_out()
        assert wire.got[-1] == PeerClosed(1002, "resuming was not answered")
        assert stream.outcome is None and stream.link is None


class TestFrames:
    """A frame that was begun is finished, so on a slow path it must be small."""

    def slow(self, wire: Wire, rate: int, seconds: float, step: float = 0.05) -> bytes:
        """What a connection that takes `rate` bytes a second takes meanwhile."""
        sent = bytearray()
        for _ in range(round(seconds / step)):
            wire.reactor.now += step
            wire.near.outgoing.room = round(rate * step)
            wire.turn()
            sent += wire.near.outgoing.sent
            wire.near.outgoing.sent.clear()
        return bytes(sent)

    @staticmethod
    def sizes(data: bytes) -> list[int]:
        """Payload lengths of the binary frames in what a server sent."""
        found, position = [], 0
        while position + 10 <= len(data):
            size, header = data[position + 1], 2
            if size == 126:
                size, header = int.from_bytes(data[position + 2 : position + 4], "big"), 4
            elif size == 127:
                size, header = int.from_bytes(data[position + 2 : position + 10], "big"), 10
            if data[position] & 15 == Opcode.BINARY:
                found.append(size)
            position += header + size
        return found

    RATE = 6000

    def blocked(self, size: int) -> Wire:
        """A link that has taken nothing of this much data yet."""
        wire = Wire()
        _stream, application = wire.open()
        wire.near.outgoing.room = 0
        write(application, bytes(size))
        for _ in range(size // len(wire.reactor.scratch) + 1):
            wire.turn()
        return wire

    def test_shrink_to_what_a_quarter_of_a_second_takes(self):
        wire = self.blocked(150_000)
        sizes = self.sizes(self.slow(wire, self.RATE, 20))
        limit = self.RATE * FRAME_SECONDS
        assert max(sizes[:2]) > 2 * limit, "nothing was known yet"
        assert len(sizes) > 20
        assert max(sizes[2:]) <= limit * 1.25

    def test_so_control_overtakes_queued_data_in_time(self):
        wire = self.blocked(150_000)
        self.slow(wire, self.RATE, 10)
        wire.put(encode_frame(Opcode.TEXT, encode(Ping(number=77)), key=wire.key))
        sent = self.slow(wire, self.RATE, 2 * FRAME_SECONDS)
        assert encode(Pong(number=77)) in sent

    def test_never_less_than_a_kibibyte(self):
        wire = self.blocked(50_000)
        sizes = self.sizes(self.slow(wire, 400, 200, step=0.5))
        assert max(sizes[3:]) == KIB

    def test_double_where_the_path_takes_everything(self):
        wire = self.blocked(250_000)
        wire.near.outgoing.room = None
        wire.turn()
        assert wire.link._write_pace.frame == 2 * 16 * KIB
        assert max(self.sizes(bytes(wire.near.outgoing.sent))) == 16 * KIB, "a block of the replay buffer"


class TestClosing:
    def test_we_begin(self):
        for side in ("server", "client"):
            wire = Wire(side)
            wire.link.close(1001, "going")
            wire.link.close(1000, "ignored")
            wire.carry_out()
            assert wire.got == [PeerClosed(1001, "going")]
            wire.carry_in()
            wire.turn()
            # RFC 6455 §7.1.1: the server ends the TCP connection first.
            assert wire.near.outgoing.ended == (side == "server")
            assert wire.end.losses == []
            hang_up(wire.far)
            wire.turn()
            assert wire.end.losses == ["closed"], "it only answered"

    def test_the_peer_begins(self):
        wire = Wire()
        stream, application = wire.open()
        wire.peer.close(1000, "done")
        wire.carry_in()
        wire.turn()
        assert stream.outcome == ("lost", "link closed by the peer: 1000 done")
        assert application.reset_by_peer
        wire.carry_out()
        assert wire.got == [PeerClosed(1000, "")]
        assert wire.near.outgoing.ended
        wire.near.shutdown = lambda how: pytest.fail("it was ended already")
        wire.link.flush()
        hang_up(wire.far)
        wire.turn()
        assert wire.end.losses == ["closed by the peer: 1000 done"]

    def test_the_peer_ends_the_connection_without_answering(self):
        wire = Wire()
        wire.link.close(1000)
        wire.far.incoming.sent.clear()  # read
        hang_up(wire.far)
        wire.turn()
        assert wire.end.losses == ["closed"]

    def test_an_end_that_cannot_be_sent(self):
        wire = Wire()

        def fail(how: int) -> None:
            raise OSError(errno.ENOTCONN, "not connected")

        wire.near.shutdown = fail
        wire.peer.close(1000)
        wire.carry_in()
        wire.turn()
        assert wire.end.losses == ["closed by the peer: 1000"], "it had ended the connection, and that in good order"

    def test_tls_that_was_ended_first(self, monkeypatch):
        """OpenSSL has errors for that, which say nothing new after a Close frame."""
        wire = Wire(tls=True)

        def end_writing(_sock: object) -> bool:
            raise ssl.SSLZeroReturnError(ssl.SSL_ERROR_ZERO_RETURN, "TLS/SSL connection has been closed")

        monkeypatch.setattr(link_module.sockets, "end_writing", end_writing)
        wire.peer.close(1000, "done")
        wire.carry_in()
        wire.turn()
        assert wire.end.losses == ["closed by the peer: 1000 done"]

    def test_data_under_way_when_we_closed_is_read_and_thrown_away(self):
        wire = Wire()
        _stream, application = wire.open()
        wire.link.close(1001, "going")
        wire.state.outbound.append(b"late")
        wire.carry_in()
        wire.turn()
        assert not wire.near.incoming.arrived
        assert read(application) == b""
        wire.run()
        assert not wire.end.losses

    def test_garbage_after_our_close_is_read_and_thrown_away(self):
        wire = Wire()
        wire.link.close(1001, "going")
        for _ in range(2):
            wire.put(b"\xff" * 9)
            wire.turn()
        assert not wire.near.incoming.arrived
        assert wire.end.losses == []
        wire.carry_out()
        hang_up(wire.far)
        wire.turn()
        assert wire.end.losses == ["closed"]

    def test_messages_after_our_close_are_not_acted_on(self):
        wire = Wire()
        wire.end.messages.clear()
        wire.link.close(1001, "going")
        wire.say(Ping(number=1), Ack(n=5, consumed=0, limit=0), Opened(n=5), Reset(n=5, code="x"), Eof(n=5, total=0))
        assert wire.end.messages == []
        assert [type(event) for event in wire.got] == [PeerClosed]
