"""One stream at one end, between its local socket and its link, in memory. The test drives the peer's protocol."""

from __future__ import annotations

import errno

import pytest
import trio

from tests.memory import MemoryReactor, MemorySocket
from tests.test_link import End, Wire, abort, close_write, hang_up, identify, read, write
from wstunnel import limits
from wstunnel.errors import LocalError
from wstunnel.reactor import READ, WRITE
from wstunnel.stream import WRITE_TURNS
from wstunnel.wire.messages import Ack, Eof, Open, Opened, Reset
from wstunnel.wire.states import Exchange, Half

BOTH = pytest.mark.parametrize("side", ["client", "server"])


def acks(wire: Wire) -> list[Ack]:
    return [message for message in wire.messages() if isinstance(message, Ack)]


class TestStart:
    def test_ingress_sends_open_and_early_data_before_opened_comes(self):
        wire = Wire("client")
        application, local = MemorySocket.pair()
        write(application, b"early")
        stream = wire.end.make_stream(identify(1), egress=False, target="tcp:db:1", peer="someone")
        stream.link = wire.link
        wire.link.attach(stream)
        wire.link.open(stream.state, target="tcp:db:1", peer="someone")
        stream.start(wire.reactor, local)
        wire.link.flush()
        wire.run()
        assert wire.got == [Open(n=1, stream=identify(1), target="tcp:db:1", peer="someone"), b"early"]
        assert wire.end.reached == []
        wire.peer.opened("192.0.2.7:1")
        wire.run()
        assert wire.end.reached == [stream]
        assert stream.address == "192.0.2.7:1"

    def test_egress_says_opened_before_it_sends_anything(self):
        wire = Wire()
        wire.begin()
        wire.run()
        (stream,) = wire.end.accepted
        application, local = MemorySocket.pair()
        write(application, b"banner")
        stream.connected(wire.reactor, local, "192.0.2.7:1")
        wire.run()
        assert wire.got == [Opened(n=1, address="192.0.2.7:1"), b"banner"]
        assert wire.end.reached == [stream]

    def test_what_came_while_dialling_is_delivered_with_its_end(self):
        wire = Wire()
        wire.begin(early=b"early")
        wire.state.outbound.end()
        wire.run()
        (stream,) = wire.end.accepted
        assert len(stream.inbound.inbox) == 5
        application, local = MemorySocket.pair()
        stream.connected(wire.reactor, local, "address")
        assert read(application) == b"early"
        assert local.outgoing.ended
        wire.run()
        assert Ack(n=1, consumed=6, limit=6 + wire.end.window) in wire.got

    def test_a_dial_that_ends_after_the_stream_closes_its_socket(self):
        wire = Wire()
        wire.begin()
        wire.run()
        (stream,) = wire.end.accepted
        stream.dialling = trio.CancelScope()
        scope = stream.dialling
        wire.state.reset_wanted = ("reset", "gone")
        wire.run()
        assert scope.cancel_called
        assert stream.outcome == ("reset", "gone")
        application, local = MemorySocket.pair()
        stream.connected(wire.reactor, local, "address")
        assert local.closed
        assert application.reset_by_peer  # to the target, too, it was no orderly end
        assert wire.end.reached == []

    def test_a_dial_that_ends_while_the_reset_is_unanswered_says_nothing(self):
        wire = Wire()
        wire.begin()
        wire.run()
        (stream,) = wire.end.accepted
        stream.reset("idle", "enough")
        _application, local = MemorySocket.pair()
        stream.connected(wire.reactor, local, "address")
        assert local.closed
        wire.run()
        assert wire.got == [Reset(n=1, code="idle", message="enough")]

    def test_a_socket_that_cannot_be_watched_resets_the_stream(self, monkeypatch):
        wire = Wire()
        wire.begin()
        wire.run()
        (stream,) = wire.end.accepted
        _application, local = MemorySocket.pair()

        def refuse(handler: object, sock: object, *, look: bool) -> None:
            raise LocalError("cannot wait for descriptor 7")

        monkeypatch.setattr(wire.reactor, "adopt", refuse)
        stream.connected(wire.reactor, local, "address")
        assert local.closed
        wire.run()
        assert stream.outcome == ("limit", "cannot wait for descriptor 7")

    def test_without_a_link_it_reads_up_to_the_limit_of_the_peer(self):
        """What the peer gave credit for can be read now as well as later; the rest stays in the kernel."""
        reactor = MemoryReactor()
        end = End(reactor, window=1000)
        stream = end.make_stream(identify(1), egress=True, target="t", peer="p")
        application, local = MemorySocket.pair()
        write(application, bytes(1500))
        stream.connected(reactor, local, "address")
        assert stream.state.opened
        reactor.turn(stream)
        assert stream.outbound.replay.end == 1000
        assert stream.mask == 0
        assert len(local.incoming.arrived) == 500
        stream.reset("reset", "gone")
        assert stream.outcome == ("reset", "gone")
        assert application.reset_by_peer


class TestData:
    @BOTH
    def test_both_ways(self, side):
        wire = Wire(side)
        _stream, application = wire.open()
        write(application, b"ping")
        wire.run()
        assert wire.data() == b"ping"
        wire.state.outbound.append(b"pong")
        wire.run()
        assert read(application) == b"pong"

    def test_an_application_that_does_not_read_fills_the_inbox_and_gets_all_of_it_later(self):
        wire = Wire()
        stream, application = wire.open(room=10)
        sent = bytes(range(256)) * 64
        wire.state.outbound.append(sent)
        wire.run()
        assert len(stream.inbound.inbox) == len(sent) - 10
        assert stream.mask == READ | WRITE
        got = read(application)
        while len(got) < len(sent):
            stream.sock.outgoing.room += 3000
            wire.run()
            got += read(application)
        assert got == sent
        assert stream.mask == READ
        assert stream.inbound.inbox.end == stream.inbound.consumed

    def test_one_event_writes_an_inbox_a_few_times_only(self, monkeypatch):
        """A fast reader must not keep the reactor to itself."""
        wire = Wire(end=End(MemoryReactor(), window=4 * limits.MIB))
        stream, _application = wire.open(room=0)
        block = bytes(limits.BLOCK_BYTES)
        for _ in range(WRITE_TURNS + 2):
            stream.inbound.arrived(len(block))
            stream.inbound.store(block)
        stream.sock.outgoing.room = None
        wire.link.flush()
        stream.on_writable()
        assert len(stream.inbound.inbox) == 2 * len(block)
        wire.run()
        assert not len(stream.inbound.inbox)

    def test_a_full_socket_ends_the_event(self):
        wire = Wire()
        stream, _application = wire.open(room=0)
        wire.state.outbound.append(b"abc")
        wire.run()
        stream.on_writable()
        assert len(stream.inbound.inbox) == 3

    def test_reading_stops_at_the_limit_and_goes_on_with_credit(self):
        wire = Wire("client", end=End(MemoryReactor(), window=100))
        wire.consuming = False
        stream, application = wire.open()
        write(application, bytes(250))
        wire.run()
        assert len(wire.data()) == 100
        assert stream.mask == 0
        wire.state.inbound.taken(100)
        wire.consuming = True
        wire.run()
        assert len(wire.data()) == 250
        assert stream.mask == READ

    def test_nothing_to_read_is_no_end(self):
        wire = Wire()
        stream, _application = wire.open()
        stream.on_readable()
        assert stream.outbound.total is None
        assert stream.mask == READ

    def test_while_the_link_takes_nothing_bytes_are_queued(self):
        wire = Wire("client")
        stream, application = wire.open()
        wire.near.outgoing.room = 0
        for _ in range(2):
            write(application, b"12345")
            wire.run()
        assert wire.link.blocked
        assert stream.outbound.queued() == 5
        wire.near.outgoing.room = None
        wire.run()
        assert wire.data() == b"1234512345"


class TestEnds:
    @BOTH
    def test_each_direction_ends_on_its_own(self, side):
        wire = Wire(side)
        stream, application = wire.open()
        write(application, b"request")
        close_write(application)
        wire.run()
        assert wire.got[-1] == Eof(n=1, total=7)
        assert stream.mask == 0
        wire.state.outbound.append(b"reply")
        wire.run()
        assert read(application) == b"reply"
        assert stream.outcome is None
        wire.state.outbound.end()
        wire.run()
        assert stream.outcome == ("finished", "")
        assert application.incoming.ended and not application.reset_by_peer
        assert wire.link.protocol.state is wire.peer.state is Exchange.IDLE
        assert wire.end.idled[-1] is wire.link
        assert wire.link.last_id == identify(1)
        assert not wire.end.streams

    @BOTH
    def test_the_peer_ends_first(self, side):
        wire = Wire(side)
        stream, application = wire.open()
        wire.state.outbound.append(b"all")
        wire.state.outbound.end()
        wire.run()
        assert read(application) == b"all"
        assert application.incoming.ended
        write(application, b"still")
        wire.run()
        assert wire.data() == b"still"
        close_write(application)
        wire.run()
        assert stream.outcome == ("finished", "")

    def test_the_application_gets_the_end_behind_the_last_byte(self):
        wire = Wire()
        stream, application = wire.open(room=2)
        wire.state.outbound.append(b"abcd")
        wire.state.outbound.end()
        wire.run()
        assert not stream.sock.outgoing.ended
        stream.sock.outgoing.room = None
        wire.run()
        assert read(application) == b"abcd"
        assert application.incoming.ended

    @pytest.mark.parametrize("ended", [False, True])
    def test_an_application_that_is_gone_when_it_is_told_the_end(self, ended):
        """shutdown() fails after a TCP reset only. What the application sent goes to the peer to its end, then that."""
        wire = Wire()
        wire.consuming = False
        stream, application = wire.open()
        write(application, b"last words")
        stream.sock.shutdown = failing(errno.ENOTCONN)
        if ended:
            close_write(application)
            wire.run()
        wire.state.outbound.end()
        close_write(application)
        wire.run()
        takes_all_and_is_told_of_the_reset(wire, stream, b"last words")

    def test_the_application_resets(self):
        wire = Wire()
        stream, application = wire.open()
        write(application, b"before")
        abort(application)
        wire.run()
        assert wire.data() == b"before"
        assert wire.got[-1] == Reset(n=1, code="reset", message="connection reset")
        assert stream.outcome == ("reset", "connection reset")
        assert wire.link.protocol.state is Exchange.IDLE

    def test_another_failure_of_the_applications_connection_is_named(self):
        wire = Wire()
        stream, _application = wire.open()

        def fail(buffer: memoryview, size: int = 0) -> int:
            raise OSError(errno.ETIMEDOUT, "Connection timed out")

        stream.sock.recv_into = fail
        stream.on_readable()
        wire.run()
        assert stream.outcome == ("reset", "local connection failed: Connection timed out")

    def test_the_peer_resets(self):
        """The application gets what its socket still takes, then a reset."""
        wire = Wire()
        stream, application = wire.open(room=0)
        wire.state.outbound.append(b"abcdef")
        wire.run()
        stream.sock.outgoing.room = 4
        wire.state.reset_wanted = ("reset", "gone")
        wire.carry_in()
        wire.reactor.turn(wire.link)
        assert read(application) == b"abcd"
        assert application.reset_by_peer
        assert stream.outcome == ("reset", "gone")
        assert wire.end.principal.budget.held == 0

    def test_a_reset_of_ours_is_over_when_it_is_answered(self):
        wire = Wire()
        stream, application = wire.open()
        stream.reset("idle", "enough")
        stream.reset("other", "ignored")
        assert application.reset_by_peer
        assert stream.outcome is None
        wire.run()
        assert wire.got == [Reset(n=1, code="idle", message="enough")]
        assert stream.outcome == ("idle", "enough")
        stream.reset("later", "ignored")
        stream.link_lost("ignored")
        assert stream.outcome == ("idle", "enough")

    def test_a_reset_throws_the_inbox_away_and_later_data_too(self):
        wire = Wire("client")
        stream, application = wire.open(room=0)
        wire.state.outbound.append(b"abc")
        wire.run()
        wire.near.outgoing.room = 0
        write(application, b"x")
        wire.run()
        assert wire.link.blocked
        stream.reset("idle", "enough")
        wire.state.outbound.append(b"more")
        wire.run()
        assert wire.end.principal.budget.held == 1
        wire.near.outgoing.room = None
        wire.run()
        assert wire.end.principal.budget.held == 0
        assert wire.got == [b"x", Reset(n=1, code="idle", message="enough")]

    def test_nothing_is_sent_once_both_ends_have_sent_and_acked_all(self):
        """Only the last ack lacks: a reset can change nothing any more, and must not be sent."""
        wire = Wire()
        stream, application = wire.open()
        wire.consuming = False
        close_write(application)
        wire.state.outbound.end()
        wire.run()
        assert stream.outbound.state is Half.ENDED and stream.inbound.state is Half.DONE
        stream.reset("shutdown", "we go")
        wire.run()
        assert not any(isinstance(message, Reset) for message in wire.messages())
        wire.state.inbound.end_delivered()
        wire.run()
        assert stream.outcome == ("finished", "")

    def test_a_refusal(self):
        wire = Wire("client")
        application, local = MemorySocket.pair()
        stream = wire.end.make_stream(identify(1), egress=False, target="t", peer="p")
        stream.link = wire.link
        wire.link.attach(stream)
        wire.link.open(stream.state, target="t", peer="p")
        stream.start(wire.reactor, local)
        wire.link.flush()
        wire.run()
        wire.state.reset_wanted = ("refused", "connection refused")
        wire.run()
        assert stream.outcome == ("refused", "connection refused")
        assert application.reset_by_peer
        assert wire.end.reached == []

    def test_a_link_that_is_lost(self):
        wire = Wire()
        stream, application = wire.open()
        hang_up(wire.far)
        wire.run()
        assert stream.outcome == ("lost", "connection closed without a close frame")
        assert application.reset_by_peer
        assert stream.link is None

    def test_a_socket_that_takes_no_option_any_more_is_closed_all_the_same(self):
        wire = Wire()
        stream, _application = wire.open()
        sock = stream.sock
        sock.setsockopt = lambda *args: failing(errno.EINVAL)(0)
        stream.reset("idle", "enough")
        assert sock.closed

    def test_an_exception_in_our_own_code(self):
        wire = Wire()
        stream, application = wire.open()
        stream.fail(ValueError("secret"))
        wire.run()
        assert wire.got == [Reset(n=1, code="internal", message="internal error: ValueError")]
        assert application.reset_by_peer
        wire.open(2)


def takes_all_and_is_told_of_the_reset(wire, stream, data):
    """The peer, which had not read yet, takes what the application sent and its end; the reset comes only then."""
    assert stream.outcome is None
    wire.state.inbound.taken(len(data))
    wire.state.inbound.end_delivered()
    wire.state.ack_wanted = True
    wire.run()
    assert wire.data() == data
    assert stream.outcome == ("reset", "connection reset")
    assert wire.got[-1] == Reset(n=1, code="reset", message="connection reset")


def failing(number: int):
    def fail(how: int) -> None:
        raise OSError(number, "failed")

    return fail


class TestFailedWrites:
    """The application takes no more. The tests of the order (consume, read to the end, reset) are in
    test_data_path.py."""

    def test_while_the_inbox_is_written(self):
        wire = Wire()
        stream, application = wire.open(room=0)
        wire.state.outbound.append(b"abcdef")
        wire.run()
        write(application, b"bye")
        stream.sock.send = lambda data: failing(errno.EPIPE)(0)
        stream.on_writable()
        assert not len(stream.inbound.inbox)
        assert wire.end.principal.budget.held == 0
        assert stream.outcome is None
        wire.run()
        assert wire.data() == b"bye"
        close_write(application)
        wire.run()
        assert stream.outcome == ("reset", "connection reset")

    def test_when_the_application_had_ended_and_all_was_taken_the_reset_goes_at_once(self):
        wire = Wire()
        stream, application = wire.open()
        close_write(application)
        wire.run()
        stream.sock.send = lambda data: failing(errno.EPIPE)(0)
        wire.state.outbound.append(b"x")
        wire.run()
        assert stream.outcome == ("reset", "connection reset")
        assert wire.got[-1] == Reset(n=1, code="reset", message="connection reset")

    @pytest.mark.parametrize("first", ["ours", "theirs"])
    def test_two_ends_do_not_hide_what_was_lost(self, first):
        """The application took no more and ended, and so did the peer: who sent in vain is told."""
        wire = Wire()
        stream, application = wire.open()
        wire.consuming = False
        write(application, b"reply")
        stream.sock.send = lambda data: failing(errno.EPIPE)(0)
        wire.state.outbound.append(b"in vain")
        for end in ("ours", "theirs") if first == "ours" else ("theirs", "ours"):
            if end == "ours":
                close_write(application)
            else:
                wire.state.outbound.end()
            wire.run()
            wire.link.sweep(wire.reactor.now + 1.0)
            wire.run()
        takes_all_and_is_told_of_the_reset(wire, stream, b"reply")

    def test_a_read_that_fails_afterwards_is_the_end_of_it(self):
        wire = Wire()
        stream, application = wire.open()
        stream.sock.send = lambda data: failing(errno.EPIPE)(0)
        wire.state.outbound.append(b"x")
        wire.run()
        assert stream.outcome is None
        abort(application)
        wire.run()
        assert stream.outcome == ("reset", "connection reset")


class TestHangup:
    def test_the_normal_end_of_both_directions_is_no_failure(self):
        wire = Wire()
        stream, _application = wire.open()
        stream.on_hangup()
        assert stream.reason is None

    def test_a_reset_is(self):
        wire = Wire()
        stream, application = wire.open()
        application.linger_reset = True
        application.close()
        stream.on_hangup()
        wire.run()
        assert stream.outcome == ("reset", "connection reset")

    def test_after_the_socket_was_dropped_it_is_nothing(self):
        wire = Wire()
        stream, _application = wire.open()
        stream.reset("idle", "enough")
        stream.on_hangup()
        stream.refresh()
        assert stream.reason == ("idle", "enough")


class TestAcks:
    def test_when_a_quarter_of_the_window_was_consumed_and_not_before(self):
        wire = Wire(end=End(MemoryReactor(), window=1000))
        _stream, _application = wire.open()
        wire.state.outbound.append(bytes(249))
        wire.run()
        assert acks(wire) == []
        wire.state.outbound.append(bytes(1))
        wire.run()
        assert [ack.consumed for ack in acks(wire)] == [250]

    def test_what_was_not_consumed_is_not_acked(self):
        wire = Wire(end=End(MemoryReactor(), window=1000))
        stream, _application = wire.open(room=100)
        wire.state.outbound.append(bytes(800))
        wire.run()
        assert acks(wire) == []
        stream.sock.outgoing.room = 200
        wire.run()
        assert [ack.consumed for ack in acks(wire)] == [300]
