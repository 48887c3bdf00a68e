"""A stream that loses its link and goes on on another one: two ends, the bytes between them, and a cut anywhere."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.test_protocol import (
    ID,
    PLENTY,
    SPLITS,
    WELCOME,
    End,
    Pair,
    Side,
    detached,
    feed,
    new_link,
    open_stream,
    pull,
    pull_once,
    read_back,
    refuses,
    wire,
)
from wstunnel.errors import StreamError
from wstunnel.limits import WINDOW_FIRST
from wstunnel.wire.credit import Budget
from wstunnel.wire.messages import Ack, Eof, Gone, LinkRole, Message, Open, Opened, Ping, Pong, Reset, Resume, Resumed
from wstunnel.wire.protocol import LinkProtocol, PeerClosed, StreamState
from wstunnel.wire.states import Exchange, Half
from wstunnel.wire.tombstones import FINISHED, UNKNOWN, Tombstone

ROLES = pytest.mark.parametrize("role", ["forward", "reverse"])
TARGET = "10.0.0.5:5432"


def ready(size: int | None = None, role: LinkRole = "forward", *, window: int = WINDOW_FIRST) -> Pair:
    """A stream that has carried `early` one way and `late` the other; the next writes are lost if it is cut."""
    pair = Pair(size, role, window=window)
    pair.open()
    pair.client.write(b"early")
    pair.server.write(b"late")
    pair.run()
    assert (pair.client.read, pair.server.read) == (b"late", b"early")
    return pair


def resumed(end: End) -> Resumed:
    found = [event for event in end.events if isinstance(event, Resumed)]
    return found[-1]


def resume(end: End) -> Resume:
    found = [event for event in end.events if isinstance(event, Resume)]
    return found[-1]


def both_end(pair: Pair) -> None:
    pair.client.end()
    pair.server.end()
    pair.run()
    assert pair.client.ended
    assert pair.server.ended
    pair.assert_idle(1)


class TestNothingIsLost:
    @SPLITS
    @ROLES
    def test_it_goes_on_where_it_was(self, size: int | None, role: LinkRole) -> None:
        """Also a stream that the server opened: it goes on on a `forward` link."""
        pair = ready(size, role)
        pair.client.write(b" lost one way")
        pair.server.write(b" lost the other")
        pair.write(pair.client)
        pair.write(pair.server)
        pair.cut()
        pair.client.write(b", and written without a link")
        pair.resume()
        assert pair.server.read == b"early lost one way, and written without a link"
        assert pair.client.read == b"late lost the other"
        pair.client.write(b".")
        both_end(pair)
        assert pair.server.read[-1:] == b"."
        assert pair.client.budget.held == pair.server.budget.held == 0

    def test_what_arrived_is_not_sent_again(self) -> None:
        pair = ready()
        pair.client.write(b"0123456789")
        pair.write(pair.client, 4)
        pair.write(pair.client, 4)
        pair.under_way[pair.client].pop()
        pair.arrive(pair.server)
        pair.cut()
        pair.resume()
        assert pair.server.read == b"early0123456789"
        assert resumed(pair.client).received == 9
        assert b"".join(item for item in feed_back(pair.client, pair) if isinstance(item, bytes)) == b"456789"
        assert pair.client.stream is not None
        assert pair.client.stream.replayed == 4  # 6789 goes out for the first time

    def test_each_side_says_all_that_may_have_been_lost(self) -> None:
        pair = ready()
        pair.server.reading = False
        pair.client.write(b"xyz")
        pair.run()
        pair.cut()
        pair.resume()
        assert pair.texts(pair.client)[0] == Resume(
            n=1, stream=ID, epoch=1, received=4, consumed=4, limit=4 + WINDOW_FIRST
        )
        assert pair.texts(pair.server)[0] == Resumed(n=1, received=8, consumed=5, limit=5 + WINDOW_FIRST, opened=TARGET)
        assert pair.server.stream is not None
        assert pair.server.stream.epoch == 1

    def test_what_was_received_and_not_consumed_stays_in_the_replay_buffer(self) -> None:
        pair = ready()
        pair.server.reading = False
        pair.client.write(b"xyz")
        pair.run()
        pair.cut()
        pair.resume()
        assert pair.client.stream is not None
        outbound = pair.client.stream.outbound
        assert (outbound.replay.start, outbound.cursor, outbound.replay.end) == (5, 8, 8)
        assert pair.client.stream.replayed == 0
        pair.cut()
        pair.resume()  # once more, and nothing moves
        assert (outbound.replay.start, outbound.cursor) == (5, 8)
        pair.server.take()
        assert pair.server.read == b"earlyxyz"

    def test_lost_acks_and_limits_are_made_up_for(self) -> None:
        pair = ready(window=100)
        pair.client.write(bytes(95))
        pair.run()
        pair.write(pair.server)
        pair.cut()  # with every ack since the first window
        pair.resume()
        assert pair.client.stream is not None
        outbound = pair.client.stream.outbound
        assert (outbound.replay.start, outbound.limit, outbound.room()) == (100, 200, 100)
        pair.client.write(bytes(100))
        pair.run()
        assert len(pair.server.read) == 200

    def test_a_cut_between_resume_and_resumed(self) -> None:
        pair = ready()
        pair.client.write(b"1")
        pair.cut()
        pair.client.resume()
        pair.write(pair.client)
        pair.arrive(pair.server)
        pair.write(pair.server)
        pair.cut()
        pair.resume()
        assert resume(pair.server).epoch == 2
        assert pair.server.read == b"early1"
        both_end(pair)

    def test_a_link_carries_another_stream_after_it(self) -> None:
        pair = ready()
        pair.cut()
        pair.resume()
        both_end(pair)
        pair.client.open()
        pair.run()
        assert pair.server.events[-1] == Open(n=2, stream=ID, target="tcp:db:5432", forward="f", peer="127.0.0.1:9")


def feed_back(end: End, pair: Pair) -> list[object]:
    """All that an end wrote on the link, data too."""
    return list(read_back(end.protocol.side, bytes(pair.sent[end])))


class TestOpened:
    """`opened` is carried by `resume` and `resumed` of the egress, once the target was reached."""

    @ROLES
    def test_lost(self, role: LinkRole) -> None:
        pair = Pair(role=role)
        pair.run()
        pair.ingress.open()
        pair.run()
        pair.egress.protocol.opened(TARGET)
        pair.egress.write(b"banner")
        pair.write(pair.egress)
        pair.cut()
        pair.resume()
        assert pair.ingress.stream is not None
        assert pair.ingress.stream.opened
        assert pair.ingress.read == b"banner"
        told: Resume | Resumed = resumed(pair.client) if role == "forward" else resume(pair.server)
        assert told.opened == TARGET

    @ROLES
    def test_reached_while_detached(self, role: LinkRole) -> None:
        pair = Pair(role=role)
        pair.run()
        pair.ingress.open()
        pair.run()
        pair.cut()
        assert pair.egress.stream is not None
        pair.egress.stream.opened = True
        pair.resume()
        assert pair.ingress.stream is not None
        assert pair.ingress.stream.opened

    @ROLES
    def test_reached_after_it(self, role: LinkRole) -> None:
        pair = Pair(role=role)
        pair.run()
        pair.ingress.open()
        pair.run()
        pair.cut()
        pair.resume()
        assert pair.ingress.stream is not None
        assert not pair.ingress.stream.opened
        pair.egress.protocol.opened(TARGET)
        pair.egress.write(b"banner")
        pair.run()
        assert pair.ingress.events[-1] == Opened(n=1, address=TARGET)
        assert pair.ingress.read == b"banner"

    def test_an_empty_address_says_it_too(self) -> None:
        protocol = new_link("client")
        stream = detached()
        stream.opened = False
        protocol.resume(stream, opened=None)
        feed(protocol, Resumed(n=1, received=0, consumed=0, limit=WINDOW_FIRST, opened=""))
        assert stream.opened


class TestEnds:
    """EOF takes one offset of its own: whether it arrived, and was delivered, is told by `received` and `consumed`."""

    def test_not_received_it_goes_out_again(self) -> None:
        pair = ready()
        pair.client.write(b"!")
        pair.client.end()
        pair.write(pair.client)
        pair.cut()
        pair.resume()
        assert Eof(n=1, total=6) in pair.texts(pair.client)
        assert (pair.server.read, pair.server.ended) == (b"early!", True)

    def test_received_and_not_delivered_it_does_not(self) -> None:
        pair = ready()
        pair.server.reading = False
        pair.client.write(b"!")
        pair.client.end()
        pair.run()
        pair.cut()
        pair.resume()
        assert resumed(pair.client).received == 7
        assert [type(item) for item in pair.texts(pair.client)] == [Resume]
        assert pair.client.stream is not None
        assert pair.client.stream.outbound.state is Half.ENDED
        pair.server.reading = True
        pair.server.take()
        pair.run()
        assert pair.client.stream.outbound.state is Half.DONE

    def test_delivered_but_the_ack_was_lost(self) -> None:
        pair = ready()
        pair.client.end()
        pair.write(pair.client)
        pair.arrive(pair.server)
        pair.write(pair.server)
        pair.cut()
        assert pair.client.stream is not None
        assert pair.client.stream.outbound.state is Half.OPEN
        pair.resume()
        assert resumed(pair.client).consumed == 6
        assert [type(item) for item in pair.texts(pair.client)] == [Resume]
        assert [type(item) for item in pair.texts(pair.server)] == [Resumed]  # which is as good as the ack
        assert pair.client.stream.outbound.state is Half.DONE
        pair.server.end()
        pair.run()
        pair.assert_idle(1)

    def test_acked_it_stays_so(self) -> None:
        pair = ready()
        pair.client.end()
        pair.run()
        assert pair.client.stream is not None
        assert pair.client.stream.outbound.state is Half.DONE
        pair.cut()
        assert pair.client.stream.outbound.state is Half.DONE
        pair.resume()
        assert [type(item) for item in pair.texts(pair.client)] == [Resume]
        pair.server.write(b"r")
        pair.server.end()
        pair.run()
        assert pair.client.read == b"later"
        pair.assert_idle(1)

    @pytest.mark.parametrize("by_client", [True, False], ids=["client", "server"])
    def test_only_the_last_ack_lacked(self, by_client: bool) -> None:
        pair = ready()
        last, first = (pair.client, pair.server) if by_client else (pair.server, pair.client)
        first.end()
        pair.run()
        last.end()
        pair.write(last)
        pair.arrive(first)
        pair.write(first)
        pair.cut()
        pair.resume()
        assert [type(item) for item in pair.texts(pair.client)] == [Resume]
        assert [type(item) for item in pair.texts(pair.server)] == [Resumed]
        pair.assert_idle(1)

    def test_both_ends_lost(self) -> None:
        pair = ready()
        pair.client.end()
        pair.server.end()
        pair.write(pair.client)
        pair.write(pair.server)
        pair.cut()
        pair.resume()
        assert pair.client.ended
        assert pair.server.ended
        pair.assert_idle(1)


class TestBetweenResumeAndResumed:
    """Nothing is sent for the stream."""

    def waiting(self) -> LinkProtocol:
        protocol = new_link("client")
        stream = detached(sent=b"abc", queued=b"def")
        stream.inbound.arrived(5)
        stream.inbound.passed(5)
        protocol.resume(stream, opened=None)
        assert [type(item) for item in pull(protocol)] == [Resume]
        assert protocol.state is Exchange.RESUMING
        return protocol

    def test_no_data_no_ack_no_end(self) -> None:
        protocol = self.waiting()
        assert protocol.stream is not None
        protocol.stream.ack_wanted = True
        protocol.stream.outbound.append(b"ghi")
        protocol.stream.outbound.end()
        assert pull(protocol) == []
        feed(protocol, Resumed(n=1, received=2, consumed=1, limit=WINDOW_FIRST, opened=TARGET))
        assert [item for item in pull(protocol) if not isinstance(item, Ack)] == [b"cdefghi", Eof(n=1, total=9)]

    def test_no_reset(self) -> None:
        protocol = self.waiting()
        assert protocol.stream is not None
        protocol.stream.reset_wanted = ("idle", "why")
        assert pull(protocol) == []

    def test_pings_go_on(self) -> None:
        protocol = self.waiting()
        assert feed(protocol, Ping(number=3)) == [Ping(number=3)]
        assert pull(protocol) == [Pong(number=3)]

    def test_data_may_not_come(self) -> None:
        protocol = self.waiting()
        assert refuses(protocol, wire(protocol, b"x")) == "data while resuming"

    def test_the_answer_and_data_in_one_write(self) -> None:
        protocol = self.waiting()
        message = Resumed(n=1, received=3, consumed=3, limit=WINDOW_FIRST, opened=TARGET)
        assert feed(protocol, message, b"x", Eof(n=1, total=6)) == [message, b"x", Eof(n=1, total=6)]

    def test_the_peer_closes(self) -> None:
        protocol = self.waiting()
        protocol.close(1000, "")
        assert (protocol.state, protocol.stream) == (Exchange.CLOSED, None)
        assert pull(protocol) == [PeerClosed(1000, "")]


# --- what cannot be --------------------------------------------------------------------------------------------------

# The stream below has sent 6 bytes, of which 2 were acked: base 2, end 6.
OUTSIDE = [
    ({"received": 1, "consumed": 1}, "below the base: these bytes are gone"),
    ({"received": 7, "consumed": 2}, "beyond the end"),
    ({"received": 4, "consumed": 5}, "consumed beyond received"),
    ({"received": 4, "consumed": 1}, "consumed goes back"),
    ({"received": 4, "consumed": 2, "limit": WINDOW_FIRST - 1}, "the limit falls"),
]
WRONG = pytest.mark.parametrize("offsets", [offsets for offsets, _ in OUTSIDE], ids=[why for _, why in OUTSIDE])


def halfway(*, egress: bool, ended: bool = False) -> StreamState:
    stream = detached(egress=egress, sent=b"abcd", queued=b"ef", ended=ended)
    stream.outbound.acknowledge(2, WINDOW_FIRST)
    return stream


class TestOffsetsThatCannotBe:
    @WRONG
    def test_in_resume(self, offsets: dict[str, int]) -> None:
        """The server resets the stream and says so; the link is idle again, and nothing has changed."""
        protocol, stream = new_link("server"), halfway(egress=True)
        message = Resume(n=1, stream=ID, epoch=5, **{"limit": WINDOW_FIRST, **offsets})
        assert list(protocol.receive(wire(protocol, message))) == [message]
        held = stream.outbound.budget.held
        with pytest.raises(StreamError) as raised:
            protocol.resumed(stream, message, opened=None)
        assert raised.value.code == "lost"
        assert pull(protocol) == []
        assert (stream.epoch, stream.replayed, stream.outbound.cursor, stream.outbound.budget.held) == (1, 0, 4, held)
        protocol.gone(Tombstone("reset", raised.value.code, "why"))
        assert pull(protocol) == [Gone(n=1, outcome="reset", code="lost", message="why")]
        assert (protocol.state, protocol.stream) == (Exchange.IDLE, None)
        open_stream(protocol)
        assert protocol.n == 2

    @WRONG
    def test_in_resumed(self, offsets: dict[str, int]) -> None:
        """The client resets the stream: no data before it, and the link is used again once that was answered."""
        protocol, stream = new_link("client"), halfway(egress=False)
        protocol.resume(stream, opened=None)
        pull(protocol)
        feed(protocol, Resumed(n=1, opened=TARGET, **{"limit": WINDOW_FIRST, **offsets}))
        sent = pull(protocol)
        assert [type(item) for item in sent] == [Reset]
        assert sent[0].code == "lost"
        assert protocol.state is Exchange.RESETTING
        assert stream.outbound.budget.held == 0
        feed(protocol, Reset(n=1, code="lost"))
        assert protocol.state is Exchange.IDLE

    @pytest.mark.parametrize("received", [2, 6])
    def test_the_ends_of_what_is_held_are_right(self, received: int) -> None:
        protocol, stream = new_link("client"), halfway(egress=False)
        protocol.resume(stream, opened=None)
        pull(protocol)
        feed(protocol, Resumed(n=1, received=received, consumed=2, limit=WINDOW_FIRST, opened=TARGET))
        assert pull(protocol) == ([b"cdef"] if received == 2 else [])
        assert stream.reset_wanted is None

    @pytest.mark.parametrize(("received", "right"), [(6, True), (7, True), (8, False)])
    def test_the_end_of_a_direction_is_one_more(self, received: int, right: bool) -> None:
        protocol, stream = new_link("client"), halfway(egress=False)
        stream.outbound.end()
        protocol.resume(stream, opened=None)
        pull(protocol)
        feed(protocol, Resumed(n=1, received=received, consumed=2, limit=WINDOW_FIRST, opened=TARGET))
        assert (stream.reset_wanted is None) is right
        if right:
            assert pull(protocol) == ([Eof(n=1, total=6)] if received == 6 else [])

    @pytest.mark.parametrize(("received", "consumed"), [(6, 6), (7, 6)])
    def test_an_end_that_was_acked_cannot_be_unacked(self, received: int, consumed: int) -> None:
        stream = detached(sent=b"abcdef", ended=True)
        stream.outbound.eof_sent()
        stream.outbound.acknowledge(7, WINDOW_FIRST)
        stream.link_lost()
        assert stream.outbound.state is Half.DONE
        with pytest.raises(StreamError, match="cannot go on"):
            stream.outbound.resume(received, consumed, WINDOW_FIRST)
        assert stream.outbound.resume(7, 7, WINDOW_FIRST) == 0


class TestPendingReset:
    """A reset that was not answered, or could not be sent, goes out after `resumed`, and nothing queued before it."""

    @SPLITS
    def test_wanted_without_a_link(self, size: int | None) -> None:
        pair = ready(size)
        pair.client.write(b"lost")
        pair.write(pair.client)
        pair.cut()
        pair.client.write(b"queued")
        pair.client.reset("idle")
        pair.resume()
        assert pair.server.resets == pair.client.resets == ["idle"]
        assert pair.server.read == b"early"
        assert [type(item) for item in pair.texts(pair.client)] == [Resume, Reset]
        pair.assert_idle(1)

    @SPLITS
    @pytest.mark.parametrize("arrived", [False, True])
    def test_not_answered(self, size: int | None, arrived: bool) -> None:
        pair = ready(size)
        pair.client.reset("idle")
        pair.write(pair.client)
        if arrived:
            pair.arrive(pair.server)  # the server ended it, and its answer is lost
        pair.cut()
        pair.client.resume()
        pair.write(pair.client)
        if arrived:
            pair.server.answer = lambda message: pair.server.protocol.gone(Tombstone("reset", "idle"))  # type: ignore[method-assign]
            pair.run()
            assert pair.client.events[-1] == Gone(n=1, outcome="reset", code="idle")
        else:
            pair.run()
            assert pair.server.resets == ["idle"]
            assert pair.client.resets == ["idle"]
        pair.assert_idle(1)

    def test_with_an_end_that_was_lost(self) -> None:
        pair = ready()
        pair.client.end()
        pair.write(pair.client)
        pair.cut()
        pair.client.reset("idle")
        pair.resume()
        assert not pair.server.ended
        assert pair.server.resets == ["idle"]
        pair.assert_idle(1)

    def test_of_a_stream_that_both_ends_are_done_with(self) -> None:
        """Only acks were lost: after `resumed` both sides are silent, and nothing is left to reset."""
        pair = ready()
        pair.client.end()
        pair.server.end()
        pair.write(pair.client)
        pair.write(pair.server)
        pair.arrive(pair.client)
        pair.arrive(pair.server)
        pair.cut()
        pair.client.reset("reset")  # the application's socket failed after both ends
        pair.resume()
        pair.assert_idle(1)


class TestGone:
    @pytest.mark.parametrize("stone", [FINISHED, UNKNOWN, Tombstone("stale"), Tombstone("reset", "timeout", "why")])
    def test_the_link_is_idle_again_at_both_ends(self, stone: Tombstone) -> None:
        pair = ready()
        pair.cut()
        pair.server.answer = lambda message: pair.server.protocol.gone(stone)  # type: ignore[method-assign]
        pair.resume()
        assert pair.client.events[-1] == Gone(n=1, outcome=stone.outcome, code=stone.code, message=stone.message)
        pair.assert_idle(1)
        pair.client.open()
        pair.run()
        assert isinstance(pair.server.events[-1], Open)
        assert pair.server.protocol.n == 2

    def test_a_long_message_is_cut(self) -> None:
        protocol = new_link("server")
        message = Resume(n=1, stream=ID, epoch=1, received=0, consumed=0, limit=WINDOW_FIRST)
        assert list(protocol.receive(wire(protocol, message))) == [message]
        protocol.gone(Tombstone("reset", "internal", "x" * 2000))
        assert pull(protocol) == [Gone(n=1, outcome="reset", code="internal", message="x" * 1024)]

    def test_on_the_control_link_it_names_the_stream(self) -> None:
        protocol = new_link("server", "control")
        message = Gone(stream=ID, outcome="unknown")
        assert feed(protocol, message) == [message]
        assert protocol.state is Exchange.IDLE


def resumed_elsewhere(stream: StreamState, *, received: int) -> None:
    """Cut the stream's link, and have the server answer on another that it has so many bytes, all of them consumed."""
    stream.link_lost()
    stream.epoch = 1
    protocol = new_link("client")
    protocol.resume(stream, opened=None)
    pull(protocol)
    feed(protocol, Resumed(n=1, received=received, consumed=received, limit=WINDOW_FIRST))


class TestAfresh:
    """A stream that was never answered is opened again under another id, with all its bytes."""

    def test_all_bytes_again(self) -> None:
        protocol = new_link("client")
        stream = open_stream(protocol, answered=False)
        stream.outbound.append(b"early data")
        stream.outbound.end()
        assert pull(protocol) == [b"early data", Eof(n=1, total=10)]
        stream.link_lost()
        assert stream.unanswered()
        stream.epoch = 1
        protocol = new_link("client")
        protocol.resume(stream, opened=None)
        pull(protocol)
        feed(protocol, Gone(n=1, outcome="unknown"))
        stream.id = "A" * 22
        stream.outbound.restart()
        protocol.open(stream, target="tcp:db:5432")
        assert pull(protocol) == [
            Open(n=2, stream="A" * 22, target="tcp:db:5432"), b"early data", Eof(n=2, total=10),
        ]  # fmt: skip

    @pytest.mark.parametrize("heard", ["opened", "ack", "resumed"])
    def test_not_once_anything_was_heard_of_the_egress(self, heard: str) -> None:
        protocol = new_link("client")
        stream = open_stream(protocol, answered=False)
        stream.outbound.append(b"abc")
        pull(protocol)
        assert stream.unanswered()
        if heard == "opened":
            feed(protocol, Opened(n=1))
        elif heard == "ack":
            feed(protocol, Ack(n=1, consumed=1, limit=WINDOW_FIRST))
        else:
            resumed_elsewhere(stream, received=1)
        assert not stream.unanswered()

    def test_not_once_it_was_resumed_though_nothing_had_arrived(self) -> None:
        """A server that says `unknown` after that has forgotten the stream; the target was dialled all the same."""
        protocol = new_link("client")
        stream = open_stream(protocol, answered=False)
        resumed_elsewhere(stream, received=0)
        assert not stream.unanswered()

    def test_never_by_the_egress(self) -> None:
        assert not StreamState(ID, egress=True, budget=Budget(PLENTY)).unanswered()


class TestProgress:
    def test_grows_with_what_arrives_here_or_there(self) -> None:
        pair = ready()
        assert pair.client.stream is not None
        seen = [pair.client.stream.progress()]
        pair.cut()
        seen.append(pair.client.stream.progress())
        pair.client.write(b"abc")
        seen.append(pair.client.stream.progress())
        pair.resume()
        seen.append(pair.client.stream.progress())
        pair.client.stream.ack_wanted = True
        pair.server.write(b"d")
        pair.server.stream.ack_wanted = True  # type: ignore[union-attr]
        pair.run()
        seen.append(pair.client.stream.progress())
        assert seen[0] == seen[1] == seen[2] <= seen[3] < seen[4]


class TestExpecting:
    """`expecting`: something was pulled that the peer must react to."""

    def quiet(self, side: Side = "client") -> LinkProtocol:
        protocol = new_link(side)
        open_stream(protocol)
        protocol.expecting = False
        return protocol

    def test_open_and_resume(self) -> None:
        protocol = new_link("client")
        assert not protocol.expecting
        protocol.open(detached(), target="tcp:db:1")
        assert protocol.expecting
        protocol = new_link("client")
        protocol.resume(detached(), opened=None)
        assert protocol.expecting

    def test_resumed(self) -> None:
        protocol = new_link("server")
        feed(protocol, Resume(n=1, stream=ID, epoch=1, received=0, consumed=0, limit=WINDOW_FIRST))
        assert protocol.expecting

    @pytest.mark.parametrize("side", ["client", "server"])
    def test_data_end_and_reset(self, side: Side) -> None:
        for action in ("data", "end", "reset"):
            protocol = self.quiet(side)
            assert protocol.stream is not None
            if action == "data":
                protocol.stream.outbound.append(b"x")
            elif action == "end":
                protocol.stream.outbound.end()
            else:
                protocol.stream.reset_wanted = ("reset", "")
            assert not protocol.expecting  # not before it is pulled
            assert pull(protocol)
            assert protocol.expecting, action

    def test_not_what_needs_no_answer(self) -> None:
        for message in (Ping(number=1), Pong(number=1)):
            protocol = self.quiet()
            protocol.send(message)
            pull(protocol)
            assert not protocol.expecting
        protocol = self.quiet()
        assert protocol.stream is not None
        protocol.stream.ack_wanted = True
        protocol.ping(1)
        assert len(pull(protocol)) == 3
        assert not protocol.expecting
        feed(protocol, Reset(n=1, code="x"))
        assert pull(protocol) == [Reset(n=1, code="x")]
        assert not protocol.expecting


class TestLaterMessages:
    def test_those_of_the_exchange_before_are_ignored_on_the_link_that_resumed(self) -> None:
        protocol = new_link("client")
        protocol.resume(detached(sent=b"abc"), opened=None)
        pull(protocol)
        late: list[Message] = [Resumed(n=1, received=0, consumed=0, limit=WINDOW_FIRST, opened="")]
        feed(protocol, *late)
        feed(protocol, Reset(n=1, code="x"))
        pull(protocol)
        protocol.resume(detached(sent=b"abc"), opened=None)
        pull(protocol)
        assert feed(protocol, *late, Ack(n=1, consumed=9, limit=0), Eof(n=1, total=7), Opened(n=1)) == []
        assert protocol.state is Exchange.RESUMING

    def test_welcome_after_resume_is_an_error(self) -> None:
        protocol = new_link("client")
        protocol.resume(detached(), opened=None)
        pull(protocol)
        assert refuses(protocol, wire(protocol, WELCOME)) == "welcome while resuming"


# --- cuts anywhere ---------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "send", "arrive", "end", "sweep", "cut", "resume", "read"]),
        st.booleans(),
        st.integers(1, 40),
    ),
    max_size=150,
)


class TestCutsAnywhere:
    """What an application reads is always a prefix of what the other wrote, and a clean end comes with all of it."""

    @given(STEPS, st.sampled_from([None, 1, 7]), st.sampled_from(["forward", "reverse"]), st.sampled_from([5, 64]))
    @settings(derandomize=True, deadline=None, max_examples=300)
    def test_no_byte_lost_doubled_or_reordered(
        self, steps: list[tuple[str, bool, int]], size: int | None, role: LinkRole, window: int
    ) -> None:
        pair = Pair(size, role, window=window)
        pair.open()
        written = {pair.client: bytearray(), pair.server: bytearray()}
        for action, by_client, amount in steps:
            end, peer = (pair.client, pair.server) if by_client else (pair.server, pair.client)
            self.act(pair, end, action, amount, written[end])
            assert written[peer].startswith(end.read)
            assert not end.ended or end.read == written[peer]
        for end in (pair.client, pair.server):
            end.reading = True
            if end.stream.outbound.total is None:
                end.end()
        if pair.client.protocol.stream is not None:
            pair.run()
        if not (pair.client.ended and pair.server.ended):
            pair.cut()
            for end in (pair.client, pair.server):
                end.take()
            pair.resume()
        for end, peer in ((pair.client, pair.server), (pair.server, pair.client)):
            assert end.read == written[peer]
            assert end.ended
            assert end.protocol.state is Exchange.IDLE
            assert end.budget.held == 0
            assert end.resets == []

    @staticmethod
    def act(pair: Pair, end: End, action: str, amount: int, written: bytearray) -> None:
        stream = end.stream
        assert stream is not None
        over = pair.client.protocol.state is Exchange.IDLE
        if action == "write":
            data = bytes((len(written) + n) % 251 for n in range(min(amount, stream.outbound.room())))
            if data:
                end.write(data)
                written.extend(data)
        elif action == "send":
            pair.write(end, amount)
        elif action == "arrive":
            pair.arrive(end, amount)
        elif action == "end" and amount > 30 and stream.outbound.total is None:
            end.end()
        elif action == "sweep":
            stream.ack_wanted = True
        elif action == "read":
            end.reading = amount % 2 == 0
            if end.reading:
                end.take()
        elif action == "cut" and pair.client.protocol.stream is not None:
            pair.cut()
            if amount % 3:
                pair.client.resume()
        elif action == "resume" and over and not (pair.client.ended and pair.server.ended):
            pair.client.resume()


class TestPulling:
    def test_an_exchange_that_is_over_with_resumed_is_over_at_once(self) -> None:
        """The link's owner looks at the state before anything is pulled."""
        protocol, stream = new_link("server"), detached(egress=True)
        stream.outbound.end()
        stream.inbound.ended(0)
        stream.inbound.end_delivered()
        message = Resume(n=1, stream=ID, epoch=2, received=1, consumed=1, limit=WINDOW_FIRST)
        assert list(protocol.receive(wire(protocol, message))) == [message]
        protocol.resumed(stream, message, opened=TARGET)
        assert (protocol.state, protocol.stream) == (Exchange.IDLE, None)
        assert pull(protocol) == [Resumed(n=1, received=1, consumed=1, limit=1 + WINDOW_FIRST, opened=TARGET)]

    def test_resumed_goes_ahead_of_what_follows_it(self) -> None:
        protocol, stream = new_link("server"), detached(egress=True, sent=b"abc", queued=b"def", ended=True)
        message = Resume(n=1, stream=ID, epoch=2, received=1, consumed=0, limit=WINDOW_FIRST)
        assert list(protocol.receive(wire(protocol, message))) == [message]
        protocol.resumed(stream, message, opened=TARGET)
        first = pull_once(protocol, 2)
        assert [type(item) for item in first] == [Resumed, bytes]
        assert first[1] == b"bc"
        assert pull(protocol) == [b"def", Eof(n=1, total=6)]
        assert (stream.replayed, stream.epoch) == (2, 2)
