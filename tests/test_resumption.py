"""Streams that outlive their links: both roles with memory between them, and at the end over real sockets.

A cut is noticed by both ends, or by one of them only: then the other one's link is as silent as one behind a NAT that
forgot it. `World.settle` lets everything happen that needs no time; where time is the point, `autojump_clock` runs.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.roles import (  # lines and make_world are fixtures
    LogLines,
    NamedSocket,
    World,
    application,
    connecting,
    descriptors,
    lines,
    make_world,
    ready,
    serving,
    targets,
    until,
)
from tests.test_server import Peer, opening
from wstunnel import limits
from wstunnel.client_session import GONE_AT_ONCE
from wstunnel.errors import NetworkError, StreamError
from wstunnel.recovery import FRUITLESS_FREE, Recovery
from wstunnel.server_session import DETACHED_IDS
from wstunnel.stream import Stream
from wstunnel.wire.frames import encode_frame
from wstunnel.wire.messages import (
    VERSION,
    Detached,
    Gone,
    Hello,
    Open,
    Opened,
    Reset,
    Resume,
    Resumed,
    Welcome,
    encode,
)
from wstunnel.wire.protocol import LinkProtocol
from wstunnel.wire.tombstones import UNKNOWN

__all__ = ["lines", "make_world"]

Make = Callable[..., World]
AWAY = NetworkError("tcp", "cannot connect to 127.0.0.1:8080: refused")
CUTS = pytest.mark.parametrize("cut", ["cut", "cut_near", "cut_far"])


def abort(sock: NamedSocket) -> None:
    """An application or a target resets its connection."""
    sock.linger_reset = True
    sock.close()


async def finish(world: World, app: NamedSocket, near: Stream, far: Stream, target: NamedSocket) -> None:
    """Both directions still carry bytes; then both end, and nothing is left of the stream."""
    app.send(b"one more")
    target.send(b"and back")
    await world.settle()
    assert (world.read(target), world.read(app)) == (b"one more", b"and back")
    for sock in (app, target):
        sock.shutdown(socket.SHUT_WR)
        await world.settle()
    assert (app.incoming.ended, target.incoming.ended) == (True, True)
    assert near.outcome == far.outcome == ("finished", "")
    left_nothing(world)


def left_nothing(world: World) -> None:
    """No table has an entry for any stream, and no memory is charged for one."""
    for session in (world.session, *world.server._sessions.values()):
        assert not session.streams and not session._detached
        assert session.principal.detached == session.principal.streams == 0
        assert session.principal.accepted == session.principal.waiting == 0
        assert session.principal.budget.held == 0
    assert not world.session._recovery and not world.session._recovery._cases
    handlers = [*world.client_reactor.handlers, *world.server_reactor.handlers]
    assert not any(isinstance(handler, Stream) for handler in handlers)


class TestBytes:
    """No byte is lost, doubled or reordered, whoever notices the cut, and the stream is as good as before."""

    @CUTS
    async def test_of_a_silent_stream(self, make_world: Make, cut: str) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream(b"hello")
        old = near.link
        getattr(world, cut)(old)
        await world.settle()
        assert near.link is not None and near.link is not old
        assert far.link is world.far_link(near.link)
        assert (near.state.epoch, far.state.epoch) == (1, 1)
        assert world.read(target) == b"hello"
        assert world.dialled == ["tcp:db:5432"]
        await finish(world, app, near, far, target)

    @CUTS
    async def test_that_the_link_has_not_taken(self, make_world: Make, cut: str) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream()
        near.link.sock.outgoing.room = 700  # in the middle of a frame
        far.link.sock.outgoing.room = 300
        up, down = os.urandom(1500), os.urandom(1500)
        app.send(up)
        target.send(down)
        await world.settle()
        assert near.link.blocked and far.link.blocked
        getattr(world, cut)(near.link)
        await world.settle()
        assert (world.read(target), world.read(app)) == (up, down)
        await finish(world, app, near, far, target)

    @CUTS
    async def test_that_were_on_the_way(self, make_world: Make, cut: str) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream(b"first ")
        await world.settle()
        app.send(b"second ")
        target.send(b"reply")
        world.move()  # to the two ends, which write it
        world.client_reactor.turn_all()
        world.server_reactor.turn_all()
        assert near.link.sock.outgoing.sent and far.link.sock.outgoing.sent
        getattr(world, cut)(near.link)
        await world.settle()
        assert (world.read(target), world.read(app)) == (b"first second ", b"reply")
        assert world.session.outages.replayed == 7
        assert far.state.replayed == 5
        await finish(world, app, near, far, target)

    @CUTS
    async def test_that_arrived_and_whose_ack_is_lost(self, make_world: Make, cut: str) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream()
        app.send(bytes(10))
        await world.settle()
        world.far_session.sweep(1.0)  # acks, into the cut
        assert near.outbound.replay.start == 0
        getattr(world, cut)(near.link)
        await world.settle()
        assert near.outbound.replay.start == 10
        assert world.session.outages.replayed == 0
        assert world.read(target) == bytes(10)
        await finish(world, app, near, far, target)

    @CUTS
    async def test_that_wait_for_their_application(self, make_world: Make, cut: str) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream()
        near.sock.outgoing.room = 5
        far.sock.outgoing.room = 3
        app.send(b"0123456789")
        target.send(b"abcdefghij")
        await world.settle()
        assert (len(near.inbound.inbox), len(far.inbound.inbox)) == (5, 7)
        getattr(world, cut)(near.link)
        await world.settle()
        near.sock.outgoing.room = far.sock.outgoing.room = None
        await world.settle()
        assert (world.read(app), world.read(target)) == (b"abcdefghij", b"0123456789")
        assert world.session.outages.replayed == world.far_session.outages.replayed == 0
        await finish(world, app, near, far, target)

    async def test_that_are_written_meanwhile(self, make_world: Make, autojump_clock: MockClock) -> None:
        """Without a link reading goes on up to the peer's limit."""
        world = make_world()
        world.run()
        await trio.sleep(2)
        app = world.connect()
        await trio.sleep(1)
        (target,) = world.targets
        near, far = world.near_stream(), world.far_stream()
        world.dialler.error = AWAY
        world.cut_all()
        await trio.sleep(1)
        assert near.link is None and far.link is None
        up, down = os.urandom(300_000), os.urandom(300_000)
        app.send(up)
        target.send(down)
        app.shutdown(socket.SHUT_WR)
        await trio.sleep(1)
        assert near.outbound.replay.end == far.outbound.replay.end == limits.WINDOW_FIRST
        assert near.outcome is None and far.outcome is None
        world.dialler.error = None
        await trio.sleep(20)
        assert (world.read(target), world.read(app)) == (up, down)
        assert target.incoming.ended and not app.incoming.ended
        target.shutdown(socket.SHUT_WR)
        await trio.sleep(1)
        assert near.outcome == far.outcome == ("finished", "")
        left_nothing(world)

    @CUTS
    async def test_of_twenty_streams_and_twenty_cuts(self, make_world: Make, cut: str) -> None:
        world = await make_world().warm()
        streams = [await world.stream() for _ in range(20)]
        written = [bytearray() for _ in range(40)]
        received = [bytearray() for _ in range(40)]
        for turn in range(20):
            for number, (app, _near, _far, target) in enumerate(streams):
                for at, sock in ((2 * number, app), (2 * number + 1, target)):
                    piece = os.urandom(50)
                    sock.send(piece)
                    written[at] += piece
                if number == turn:
                    world.move()
                    world.client_reactor.turn_all()  # some have been written when the cut comes, some have not
            if turn % 2:
                world.move()
                world.server_reactor.turn_all()
            for _app, near, _far, _target in streams:
                assert near.link is not None
                getattr(world, cut)(near.link)
            await world.settle()
            for number, (app, _near, _far, target) in enumerate(streams):
                received[2 * number] += world.read(target)
                received[2 * number + 1] += world.read(app)
        assert received == written
        for app, near, far, target in streams:
            assert near.state.epoch >= 20 and near.outcome is None and far.outcome is None
            for sock in (app, target):
                sock.shutdown(socket.SHUT_WR)
        await world.settle()
        left_nothing(world)


class TestHalfClosed:
    @CUTS
    @pytest.mark.parametrize("arrived", [True, False])
    async def test_by_the_application(self, make_world: Make, cut: str, arrived: bool) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream(b"request")
        app.shutdown(socket.SHUT_WR)
        if arrived:
            await world.settle()
        else:
            world.move()
            world.client_reactor.turn_all()
        assert near.outbound.total == 7
        getattr(world, cut)(near.link)
        await world.settle()
        assert world.read(target) == b"request" and target.incoming.end_arrived
        target.send(b"reply")
        await world.settle()
        assert world.read(app) == b"reply" and not app.incoming.ended
        target.shutdown(socket.SHUT_WR)
        await world.settle()
        assert app.incoming.end_arrived
        assert near.outcome == far.outcome == ("finished", "")
        left_nothing(world)

    @CUTS
    @pytest.mark.parametrize("arrived", [True, False])
    async def test_by_the_target(self, make_world: Make, cut: str, arrived: bool) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream()
        target.send(b"banner")
        target.shutdown(socket.SHUT_WR)
        if arrived:
            await world.settle()
        else:
            world.move()
            world.server_reactor.turn_all()
        assert far.outbound.total == 6
        getattr(world, cut)(near.link)
        await world.settle()
        assert world.read(app) == b"banner" and app.incoming.end_arrived
        app.send(b"thanks")
        app.shutdown(socket.SHUT_WR)
        await world.settle()
        assert world.read(target) == b"thanks" and target.incoming.end_arrived
        assert near.outcome == far.outcome == ("finished", "")
        left_nothing(world)

    @CUTS
    async def test_the_servers_last_ack_is_lost(self, make_world: Make, cut: str, lines: LogLines) -> None:
        """`finished` is the answer, and here everything was delivered, too."""
        world = await make_world().warm()
        app, near, far, target = await world.stream(b"x")
        target.shutdown(socket.SHUT_WR)
        await world.settle()
        app.shutdown(socket.SHUT_WR)
        world.move()
        world.client_reactor.turn_all()
        world.move()
        link = near.link
        world.server_reactor.turn_all()
        assert far.outcome == ("finished", "") and near.outcome is None
        getattr(world, cut)(link)
        await world.settle()
        if cut == "cut_far":  # the server has nothing to ask for, and this client hears nothing: in time it asks itself
            assert near.outcome is None
            link.lose("no answer")
            await world.settle()
        assert near.outcome == ("finished", "")
        assert not app.reset_by_peer and not target.reset_by_peer
        assert [line["reason"] for line in lines("stream ended")] == ["finished", "finished"]
        left_nothing(world)

    @CUTS
    async def test_the_clients_last_ack_is_lost(self, make_world: Make, cut: str) -> None:
        """The server asks with `detached`; a client that has the stream no more says so."""
        world = await make_world().warm()
        app, near, far, target = await world.stream(b"x")
        app.shutdown(socket.SHUT_WR)
        await world.settle()
        target.shutdown(socket.SHUT_WR)
        world.move()
        world.server_reactor.turn_all()
        world.move()
        link = near.link
        world.client_reactor.turn_all()
        assert near.outcome == ("finished", "") and far.outcome is None
        far_link = far.link
        getattr(world, cut)(link)
        await world.settle()
        if cut == "cut_near":
            assert far.outcome is None
            far_link.lose("no answer")
            await world.settle()
        assert far.outcome == ("finished", "")
        assert not app.reset_by_peer and not target.reset_by_peer
        left_nothing(world)


class TestBeforeOpened:
    @CUTS
    async def test_while_the_dial_is_under_way(self, make_world: Make, cut: str) -> None:
        world = await make_world().warm()
        world.gate = trio.Event()
        app = world.connect(b"early")
        await world.settle()
        near, far = world.near_stream(), world.far_stream()
        getattr(world, cut)(near.link)
        await world.settle()
        assert near.link is not None and not near.state.opened
        assert far.link is not None and far.dialling is not None
        world.gate.set()
        await world.settle()
        assert near.state.opened and near.address == "10.0.0.5:5432"
        assert world.dialled == ["tcp:db:5432"], "one dial per connection"
        (target,) = world.targets
        assert world.read(target) == b"early"
        await finish(world, app, near, far, target)

    @CUTS
    async def test_when_the_answer_is_lost(self, make_world: Make, cut: str, lines: LogLines) -> None:
        world = await make_world().warm()
        world.gate = trio.Event()
        app = world.connect(b"early")
        await world.settle()
        near, far = world.near_stream(), world.far_stream()
        world.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        world.server_reactor.turn_all()
        assert far.state.opened and b'"opened"' in far.link.sock.outgoing.sent
        getattr(world, cut)(near.link)
        await world.settle()
        assert near.state.opened and near.address == "10.0.0.5:5432"
        assert len(lines("stream opened", "client")) == len(lines("stream opened", "server")) == 1
        assert world.read(world.targets[0]) == b"early"
        await finish(world, app, near, far, world.targets[0])

    @CUTS
    async def test_when_the_open_is_lost_it_is_opened_afresh(self, make_world: Make, cut: str) -> None:
        """Under another id: the old one may still be held back somewhere, and must never dial."""
        world = await make_world().warm()
        app = world.connect(b"early")
        world.client_reactor.turn_all()
        near = world.near_stream()
        old_id, old_link = near.state.id, near.link
        assert b"early" in near.outbound.replay.view(0, 100).tobytes()
        app.shutdown(socket.SHUT_WR)
        if cut == "cut_far":  # the server has never heard of it: only the client can notice
            world.freeze(old_link)
            old_link.lose("no answer")
        else:
            getattr(world, cut)(old_link)
        await world.settle()
        assert near.state.id != old_id and near.state.opened and near.state.epoch == 0
        assert world.dialled == ["tcp:db:5432"]
        (target,) = world.targets
        assert world.read(target) == b"early" and target.incoming.ended
        assert list(world.session.streams) == [near.state.id]
        stones = world.far_session.principal.tombstones
        assert stones.find(old_id) == UNKNOWN
        late = Peer(world)
        hello = Hello(version=VERSION, session=world.session.id, role="forward")
        answers = await late.send(hello, Open(n=1, stream=old_id, target="tcp:db:5432"))
        assert Reset(n=1, code="forbidden", message="this stream id was used before") in answers
        assert len(world.dialled) == 1
        target.send(b"reply")
        target.shutdown(socket.SHUT_WR)
        await world.settle()
        assert world.read(app) == b"reply"
        assert near.outcome == ("finished", "")

    async def test_one_that_was_opened_afresh_survives_the_next_cut(self, make_world: Make) -> None:
        world = await make_world().warm()
        app = world.connect(b"early")
        world.client_reactor.turn_all()
        near = world.near_stream()
        world.cut(near.link)
        await world.settle()
        (target,) = world.targets
        far = world.far_stream(near)
        world.cut(near.link)
        await world.settle()
        assert near.state.epoch == 1
        assert world.read(target) == b"early"
        await finish(world, app, near, far, target)
        assert world.session.outages.cuts == world.session.outages.resumptions == 2

    @pytest.mark.parametrize("refusal", [None, StreamError("refused", "db: connection refused")])
    async def test_the_dial_ends_while_there_is_no_link(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines, refusal: StreamError | None
    ) -> None:
        world = make_world()
        world.run()
        await trio.sleep(2)
        world.gate, world.refusal = trio.Event(), refusal
        app = world.connect(b"early")
        await trio.sleep(1)
        near, far = world.near_stream(), world.far_stream()
        world.dialler.error = AWAY
        world.cut_all()
        await trio.sleep(1)
        assert near.link is None and far.link is None
        world.gate.set()
        await trio.sleep(1)
        assert far.dialling is None
        if refusal is None:
            assert far.state.opened and not near.state.opened
            assert world.read(world.targets[0]) == b"early"
        else:
            assert far.outcome == ("refused", "db: connection refused")
        world.dialler.error = None
        await trio.sleep(20)
        if refusal is None:
            assert near.state.opened and near.address == "10.0.0.5:5432"
            world.targets[0].send(b"reply")
            await trio.sleep(1)
            assert world.read(app) == b"reply"
        else:
            assert near.outcome == ("refused", "db: connection refused")
            assert app.reset_by_peer
            assert [line["reason"] for line in lines("stream refused", "client")] == ["refused"]
            left_nothing(world)


def hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stream goes on, though links are there."""
    monkeypatch.setattr(Recovery, "next", lambda recovery, heard, now: None)


async def away(make_world: Make, **options: Any) -> tuple[World, NamedSocket, Stream, Stream, NamedSocket]:
    """A stream whose two ends have just lost all links, with a server that cannot be reached. Time must run."""
    world = make_world(**options)
    world.run()
    await trio.sleep(2)
    app = world.connect(b"hello")
    await trio.sleep(1)
    near, far = world.near_stream(), world.far_stream()
    assert world.read(world.targets[0]) == b"hello"
    world.dialler.error = AWAY
    world.cut_all()
    await trio.sleep(0.5)
    assert near.link is None and far.link is None and not world.session.links
    return world, app, near, far, world.targets[0]


class TestEndsWhileDetached:
    async def test_the_application_resets(self, make_world: Make, autojump_clock: MockClock) -> None:
        world, app, near, far, target = await away(make_world)
        app.send(b"nobody needs this")
        abort(app)
        await trio.sleep(1)
        assert near.reason == ("reset", "connection reset") and near.sock is None
        assert near.outcome is None, "the server has to be told"
        assert far.outcome is None
        world.dialler.error = None
        await trio.sleep(20)
        assert near.outcome == far.outcome == ("reset", "connection reset")
        assert target.reset_by_peer
        left_nothing(world)

    async def test_the_target_resets(self, make_world: Make, autojump_clock: MockClock) -> None:
        world, app, near, far, target = await away(make_world)
        abort(target)
        await trio.sleep(1)
        assert far.outcome == ("reset", "connection reset"), "whoever asks for it is told"
        assert near.outcome is None
        world.dialler.error = None
        await trio.sleep(20)
        assert near.outcome == ("reset", "connection reset")
        assert app.reset_by_peer
        left_nothing(world)

    async def test_both_reset(self, make_world: Make, autojump_clock: MockClock) -> None:
        world, app, near, far, target = await away(make_world)
        abort(app)
        abort(target)
        await trio.sleep(1)
        world.dialler.error = None
        await trio.sleep(20)
        assert near.outcome == far.outcome == ("reset", "connection reset")
        left_nothing(world)

    async def test_both_ends_after_the_window(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world, app, near, far, target = await away(make_world, resume_window=10)
        await trio.sleep(9)
        assert near.outcome is None and far.outcome is None
        assert not app.reset_by_peer and not target.reset_by_peer
        await trio.sleep(5)
        assert near.outcome == far.outcome == ("lost", "no link for 10 s")
        assert app.reset_by_peer and target.reset_by_peer
        assert len(lines("1 stream could not be resumed and was reset")) == 2
        assert len(lines("client gone")) == 1
        assert not world.server._sessions
        left_nothing(world)

    async def test_the_server_grants_less_than_the_client_asks_for(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world, _app, near, far, _target = await away(make_world, resume_window=10, max_resume_window=5)
        assert world.session.resume_window == world.far_session.resume_window == 5
        await trio.sleep(6)
        assert near.outcome == far.outcome == ("lost", "no link for 5 s")

    async def test_a_dial_under_way_is_given_up_at_the_end_of_the_window(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(resume_window=10)
        world.run()
        await trio.sleep(2)
        world.dial_seconds = 3600
        world.connect()
        await trio.sleep(1)
        far = world.far_stream()
        scope = far.dialling
        world.dialler.error = AWAY
        world.cut_all()
        await trio.sleep(9)
        assert scope is not None and not scope.cancel_called
        await trio.sleep(3)
        assert scope.cancel_called
        assert not world.targets
        left_nothing(world)

    async def test_the_client_stops(self, make_world: Make, autojump_clock: MockClock, lines: LogLines) -> None:
        world, app, near, _far, _target = await away(make_world)
        world.session.stop()
        assert near.outcome == ("shutdown", "the client is stopping")
        assert app.reset_by_peer
        assert not world.session._detached and not world.client_reactor.handlers

    async def test_the_server_stops(self, make_world: Make, autojump_clock: MockClock) -> None:
        world, _app, _near, far, target = await away(make_world)
        world.server.stop()
        assert far.outcome == ("shutdown", "the server is stopping")
        assert target.reset_by_peer
        assert world.server.gone.is_set()
        assert not world.server_reactor.handlers

    async def test_a_client_that_says_goodbye_ends_those_that_have_no_link(
        self, make_world: Make, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world = make_world()
        world.run()
        await trio.sleep(2)
        world.connect()
        await trio.sleep(1)
        near, far = world.near_stream(), world.far_stream()
        hold(monkeypatch)
        world.cut(near.link)
        await trio.sleep(1)
        assert far.link is None and near.link is None
        world.session.stop()
        await trio.sleep(1)
        assert far.outcome == ("shutdown", "the client said goodbye")
        assert world.targets[0].reset_by_peer
        assert not world.server._sessions

    async def test_the_one_that_has_waited_longest_goes_when_there_are_too_many(
        self, make_world: Make, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, lines: LogLines
    ) -> None:
        monkeypatch.setattr(limits, "PRINCIPAL_DETACHED", 2)
        world = make_world(idle_links=4)
        world.run()
        await trio.sleep(2)
        apps = []
        for _ in range(3):
            apps.append(world.connect())
            await trio.sleep(0.5)
        streams = list(world.session.streams.values())
        far_streams = [world.far_stream(stream) for stream in streams]
        hold(monkeypatch)
        for number in (1, 0, 2):
            world.cut(streams[number].link)
            await trio.sleep(0.1)
        why = ("limit", "too many streams without a link: the oldest is reset")
        assert [stream.outcome for stream in streams] == [None, why, None]
        assert [stream.outcome for stream in far_streams] == [None, why, None]
        assert [app.reset_by_peer for app in apps] == [False, True, False]
        for role in ("client", "server"):
            (line,) = lines("too many streams without a link: the oldest were reset", role)
            assert line["count"] == 1
        monkeypatch.undo()
        await trio.sleep(3)
        assert all(streams[number].link is not None for number in (0, 2))


class TestGone:
    async def test_a_server_that_came_back_without_memory(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        """`unknown` of another boot: reset at once, though it was never answered. It may have been dialled before."""
        world, app, near, _far, _target = await away(make_world)
        world.gate = trio.Event()
        world.dialler.error = None
        world.make_server()
        world.nursery.start_soon(world.server.sweep_forever)
        await until(lambda: lines("connected again"), 20)
        await trio.sleep(3)
        assert near.outcome == ("lost", "the peer does not know the stream any more")
        assert app.reset_by_peer
        assert len(world.dialled) == 1
        assert len(lines("1 stream could not be resumed and was reset", "client")) == 1

    async def test_unknown_of_another_boot_though_never_answered(self, make_world: Make) -> None:
        world = await make_world().warm()
        app = world.connect(b"early")
        world.client_reactor.turn_all()
        near = world.near_stream()
        world.make_server()
        world.cut_all()
        await world.settle()
        await until_settled(world, lambda: near.outcome)
        assert near.outcome == ("lost", "the peer does not know the stream any more")
        assert app.reset_by_peer
        assert world.dialled == []

    async def test_unknown_of_one_that_was_answered_is_not_opened_again(self, make_world: Make) -> None:
        world = await make_world().warm()
        app, near, far, _target = await world.stream(b"x")
        far.abandon("internal", "forgotten")
        world.far_session.principal.tombstones.forget(near.state.id)
        await world.settle()
        assert near.outcome == ("lost", "the peer does not know the stream any more")
        assert app.reset_by_peer and len(world.dialled) == 1
        left_nothing(world)

    async def test_reset_and_what_had_arrived_before_is_delivered(self, make_world: Make) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream()
        target.send(b"last words")
        near.sock.outgoing.room = 0
        await world.settle()
        near.sock.outgoing.room = None
        world.freeze(near.link)
        abort(target)
        far.link.lose("cut")
        world.server_reactor.turn_all()
        assert far.outcome == ("reset", "connection reset")
        near.link.lose("cut")
        await world.settle()
        assert near.outcome == ("reset", "connection reset")
        assert world.read(app) == b"last words" and app.reset_by_peer
        left_nothing(world)

    async def test_finished_is_a_reset_if_not_everything_was_delivered(self, make_world: Make) -> None:
        world = await make_world().warm()
        app, near, _far, _target = await world.stream()
        near.link.lose("cut")
        near.gone("finished", "", "")
        assert near.outcome == ("lost", "the peer does not know the stream any more")
        assert app.reset_by_peer

    async def test_stale_is_asked_again_with_a_higher_epoch(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world()
        world.run()
        await trio.sleep(2)
        app = world.connect(b"x")
        await trio.sleep(1)
        near, far = world.near_stream(), world.far_stream()
        far.state.epoch = 6  # a `resume` of a later epoch came first
        world.cut_near(near.link)
        await trio.sleep(0.05)
        assert near.state.epoch < 7, "it does not spin"
        assert far.outcome is None and far.state.epoch == 6
        await trio.sleep(10)
        assert near.state.epoch == far.state.epoch == 7
        assert near.link is not None and far.link is not None
        world.targets[0].send(b"y")
        await trio.sleep(1)
        assert world.read(app) == b"y"
        assert world.session.outages.cuts == world.session.outages.resumptions == 1

    async def test_the_answer_is_true_however_often_it_is_asked(self, make_world: Make) -> None:
        """Raw messages to the server. A tombstone goes only with the next stream of the link that it ended on."""
        world = make_world()
        peer, other = Peer(world), Peer(world)
        hello = Hello(version=VERSION, session="s" * 22, role="forward", features=["resume"])
        await peer.send(hello, opening(1))
        await peer.finish(1)
        await other.send(hello)

        def resume(n: int, number: int = 1, epoch: int = 1) -> Resume:
            return Resume(n=n, stream=f"{number:022d}", epoch=epoch, received=0, consumed=0, limit=limits.WINDOW_FIRST)

        for n in (1, 2, 3):
            assert await other.send(resume(n)) == [Gone(n=n, outcome="finished")]
        for n in (4, 5):
            assert await other.send(resume(n, 9)) == [Gone(n=n, outcome="unknown")]
        answers = await other.send(opening(9, n=6))
        assert answers[0] == Reset(n=6, code="forbidden", message="this stream id was used before")
        await peer.send(opening(2, n=2))
        await other.send(Reset(n=6, code="forbidden"))
        assert await other.send(resume(7)) == [Gone(n=7, outcome="unknown")], "its link went on: forgotten"
        # A link whose stream is resumed elsewhere is closed before the offsets are compared.
        (resumed,) = await other.send(resume(8, 2, epoch=3))
        assert isinstance(resumed, Resumed) and resumed.opened == "10.0.0.5:5432"
        await peer.receive()
        assert peer.closed == (1000, "its stream goes on on another link")
        third = Peer(world)
        await third.send(hello)
        for n, epoch in ((1, 3), (2, 2), (3, 1)):
            assert await third.send(resume(n, 2, epoch)) == [Gone(n=n, outcome="stale")]
        assert other.closed is None

    async def test_offsets_that_cannot_be(self, make_world: Make) -> None:
        world = make_world()
        peer, other = Peer(world), Peer(world)
        hello = Hello(version=VERSION, session="s" * 22, role="forward", features=["resume"])
        await peer.send(hello, opening(1))
        await other.send(hello)
        answers = await other.send(
            Resume(n=1, stream=f"{1:022d}", epoch=1, received=5, consumed=5, limit=limits.WINDOW_FIRST)
        )
        (gone,) = answers
        assert isinstance(gone, Gone) and (gone.outcome, gone.code) == ("reset", "lost")
        assert world.targets[0].reset_by_peer
        assert other.closed is None, "the link goes on"
        assert Opened(n=2, address="10.0.0.5:5432") in await other.send(opening(2, n=2))

    async def test_offsets_that_cannot_be_at_the_client(self, make_world: Make) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream(b"12345")
        far.inbound.received = far.inbound.consumed = 99
        far.inbound.inbox.restart(99)
        world.cut(near.link)
        await world.settle()
        assert near.outcome is not None and near.outcome[0] == "lost"
        assert far.outcome is not None and far.outcome[0] == "lost"
        assert app.reset_by_peer and target.reset_by_peer
        left_nothing(world)

    async def test_a_pending_reset_of_the_server_is_told(self, make_world: Make) -> None:
        """Its `reset` was lost with the link on which the client has not noticed anything."""
        world = await make_world().warm()
        app, near, far, _target = await world.stream()
        world.freeze(near.link)
        far.reset("idle", "half-closed and silent for an hour")
        assert far.outcome is None
        near.link.lose("cut")
        await world.settle()
        assert near.outcome == far.outcome == ("idle", "half-closed and silent for an hour")
        assert app.reset_by_peer
        left_nothing(world)

    async def test_a_pending_reset_of_the_client_is_sent_again(self, make_world: Make) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream()
        world.freeze(near.link)
        abort(app)
        world.client_reactor.turn_all()
        assert near.reason is not None and near.outcome is None
        near.link.lose("cut")
        await world.settle()
        assert near.outcome == far.outcome == ("reset", "connection reset")
        assert target.reset_by_peer
        left_nothing(world)


async def until_settled(world: World, condition: Callable[[], object]) -> None:
    """Settle until something that needs a moment of real time, such as a back-off."""
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.01)
            await world.settle()


class TestDetached:
    async def test_moves_the_stream_though_its_link_seems_alive(self, make_world: Make) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream(b"x")
        old = near.link
        world.cut_far(old)
        await world.settle()
        assert near.link is not old and far.link is not None
        assert old.protocol.close_sent
        assert world.session.outages.cuts == world.far_session.outages.cuts == 1
        assert world.read(target) == b"x"
        await finish(world, app, near, far, target)

    async def test_old_news_of_a_stream_that_was_resumed_since_moves_nothing(self, make_world: Make) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream(b"x")
        world.cut(near.link)
        await world.settle()
        link, control = near.link, world.session._control
        world.far_link(control).send(Detached(streams=[near.state.id], epochs=[0]))
        await world.settle()
        assert near.link is link and near.state.epoch == 1
        assert world.read(target) == b"x"
        await finish(world, app, near, far, target)

    async def test_what_the_client_does_not_have_is_reset(self, make_world: Make) -> None:
        world = await make_world().warm()
        _app, near, far, target = await world.stream(b"x")
        far_link = far.link
        world.freeze(near.link)
        near.abandon("limit", "too many")
        far_link.lose("cut")
        assert far.outcome is None
        await world.settle()
        assert far.outcome == ("lost", "the peer does not know the stream any more")
        assert target.reset_by_peer
        left_nothing(world)

    async def test_gone_of_a_stream_that_has_a_link_or_is_not_there_changes_nothing(self, make_world: Make) -> None:
        world = make_world()
        control, peer = Peer(world), Peer(world)
        hello = Hello(version=VERSION, session="s" * 22, role="control", features=["resume"])
        await control.send(hello)
        await peer.send(Hello(version=VERSION, session="s" * 22, role="forward"), opening(1))
        await control.send(*[Gone(stream=f"{number:022d}", outcome="unknown") for number in (1, 2)])
        assert not world.targets[0].reset_by_peer
        assert control.closed is None

    async def test_a_new_control_link_learns_of_all_of_them(self, make_world: Make) -> None:
        world = make_world()
        hello = Hello(version=VERSION, session="s" * 22, role="control", features=["resume"])
        peers = [Peer(world) for _ in range(3)]
        for number, peer in enumerate(peers):
            await peer.send(Hello(version=VERSION, session="s" * 22, role="forward", features=["resume"]))
            await peer.send(opening(number))
        for peer in peers:
            peer.near.close()
        await world.settle()
        for _ in range(2):
            control = Peer(world)
            answers = await control.send(hello)
            assert [message.streams for message in answers if isinstance(message, Detached)] == [
                [f"{number:022d}" for number in range(3)]
            ]
            assert next(message for message in answers if isinstance(message, Welcome)).known
            control.near.close()
            await world.settle()

    async def test_more_than_one_message_holds_come_with_the_sweeps(self, make_world: Make) -> None:
        world = make_world()
        hello = Hello(version=VERSION, session="s" * 22, role="control", features=["resume"])
        await (keeper := Peer(world)).send(
            Hello(version=VERSION, session="s" * 22, role="forward", features=["resume"])
        )
        session = world.far_session
        for number in range(1200):
            stream = session.make_stream(f"{number:022d}", egress=True, target="tcp:db:1", peer="p")
            assert session.stream_detached(stream)
        control = Peer(world)
        named: list[str] = []
        answers = await control.send(hello)
        for now in range(1, 1200 // DETACHED_IDS + 3):
            named += [one for message in answers if isinstance(message, Detached) for one in message.streams]
            session.sweep(trio.current_time() + now)
            answers = await control.receive()
        assert named == [f"{number:022d}" for number in range(1200)]
        assert answers == [] and keeper.closed is None

    async def test_the_client_answers_a_large_one_in_parts(self, make_world: Make) -> None:
        """A control link's queue is short: 512 answers at once would close it."""
        world = await make_world().warm()
        control = world.session._control
        ids = [f"{number:022d}" for number in range(DETACHED_IDS)]
        world.far_link(control).send(Detached(streams=ids))
        for now in range(1, 6):
            await world.settle()
            world.session.sweep(trio.current_time() + now / 1000)
        assert world.session._unknown == {} and len(ids) > GONE_AT_ONCE
        assert world.session._control is control and not control.protocol.close_sent

    async def test_the_users_next_session_displaces_what_a_killed_client_left(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world, _app, _near, far, target = await away(make_world)
        hello = Hello(version=VERSION, session="t" * 22, role="forward", features=["resume"])
        other = Peer(world, user="bob")
        other.near.send(encode_hello(Hello(version=VERSION, session="u" * 22, role="control")))
        forward = Peer(world)
        forward.near.send(encode_hello(hello))
        await trio.sleep(0.2)
        assert far.outcome is None, "another user's session, or one without a control link"
        control = Peer(world)
        control.near.send(encode_hello(Hello(version=VERSION, session="t" * 22, role="control")))
        await trio.sleep(0.2)
        assert far.outcome == ("shutdown", "the user's next session has begun")
        assert target.reset_by_peer
        (line,) = lines("session displaced by the user's next one")
        assert line["principal"] == "alice"
        assert len(world.server._sessions) == 2

    async def test_a_session_that_has_a_link_is_not_displaced(self, make_world: Make, lines: LogLines) -> None:
        world = await make_world().warm()
        app, near, far, target = await world.stream(b"x")
        await Peer(world).send(Hello(version=VERSION, session="t" * 22, role="control"))
        assert lines("session displaced by the user's next one") == []
        await world.settle()
        assert near.outcome is None and far.outcome is None
        app.send(b"y")
        await world.settle()
        assert world.read(target) == b"xy"


def encode_hello(hello: Hello) -> bytes:
    return encode_frame(1, encode(hello), key=b"1234")


class TestDrain:
    async def test_takes_no_stream_on_that_servers_links_and_says_one_line(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world()
        world.dialler.seconds = 0.05
        world.run()
        await trio.sleep(2)
        app = world.connect(b"x")
        await trio.sleep(2)
        near, (target,) = world.near_stream(), world.targets
        world.far_session.drain()
        await trio.sleep(0.02)
        assert world.idle == 0
        assert len(lines("the server is stopping", "client")) == 1
        waiting = world.connect(b"early")
        app.send(b"y")
        await trio.sleep(0.03)
        assert len(world.session.ingress.waiting) == 1 and len(world.dialled) == 1
        assert near.link is not None and world.read(target) == b"xy", "the streams that it has go on"
        # The next server takes over: what waited is served by it, what ran on the old one is reset.
        world.make_server()
        world.cut_all()
        await trio.sleep(1)
        assert not waiting.reset_by_peer
        assert len(world.dialled) == 2 and world.read(world.targets[1]) == b"early"
        assert near.outcome == ("lost", "the peer does not know the stream any more")
        assert app.reset_by_peer
        assert world.idle >= 2
        assert len(lines("the server is stopping", "client")) == 1

    async def test_the_server_says_it_when_it_stops(self, make_world: Make, lines: LogLines) -> None:
        world = await make_world().warm()
        _app, near, far, target = await world.stream(b"x")
        world.dialler.error = AWAY
        world.server.stop()
        await world.settle()
        assert len(lines("the server is stopping", "client")) == 1
        assert near.outcome == far.outcome == ("shutdown", "the server is stopping")
        assert target.reset_by_peer

    async def test_a_client_without_the_feature_is_not_told(self, make_world: Make) -> None:
        world = make_world()
        control = Peer(world)
        await control.send(Hello(version=VERSION, session="s" * 22, role="control", features=["resume"]))
        world.far_session.drain()
        assert await control.receive() == []
        told = Peer(world)
        await told.send(Hello(version=VERSION, session="t" * 22, role="control", features=["drain"]))
        for session in world.server._sessions.values():
            session.drain()
        assert [type(message).__name__ for message in await told.receive()] == ["Drain"]

    async def test_without_a_control_link_nobody_can_be_told(self, make_world: Make) -> None:
        world = make_world()
        peer = Peer(world)
        await peer.send(Hello(version=VERSION, session="s" * 22, role="forward", features=["drain"]))
        world.far_session.drain()
        assert await peer.receive() == []


class TestLog:
    async def test_one_line_when_it_begins_and_one_when_it_is_over(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world()
        world.run()
        await trio.sleep(2)
        apps = [world.connect(b"x") for _ in range(2)]
        await trio.sleep(1)
        begun = trio.current_time()
        world.dialler.error = AWAY
        world.cut_all()
        await trio.sleep(4)
        assert len(lines("2 streams lost their link, resuming")) == 2  # at both ends
        world.dialler.error = None
        streams = list(world.session.streams.values())
        await until(lambda: all(stream.state.epoch and stream.link for stream in streams), 30)
        took = trio.current_time() - begun
        await trio.sleep(3)
        (said,) = {line.split(" principal=")[0] for line in texts(world, lines, "client", " resumed after ")}
        match = re.fullmatch(r"INFO wstunnel.client 2 streams resumed after (\d+\.\d) s, 0 bytes lost", said)
        assert match is not None, said
        assert abs(float(match[1]) - took) < 0.3
        for session in (world.session, world.far_session):
            assert (session.outages.cuts, session.outages.resumptions, session.outages.replayed) == (2, 2, 0)
        assert not any(app.reset_by_peer for app in apps)
        assert len(lines("2 streams lost their link, resuming")) == 2

    async def test_counters_go_along(self, make_world: Make, mock_clock: MockClock, lines: LogLines) -> None:
        world = await make_world().warm()
        app, near, _far, _target = await world.stream()
        for _ in range(3):
            app.send(b"12345")
            world.move()
            world.client_reactor.turn_all()
            world.cut(near.link)
            await world.settle()
        assert (world.session.outages.cuts, world.session.outages.resumptions) == (3, 3)
        assert world.session.outages.replayed == 15
        world.session.stop()
        await world.settle()
        (said,) = texts(world, lines, "client", "1 stream resumed after 0.0 s, 0 bytes lost")
        assert said.endswith("cuts=3 resumptions=3 replayed=15")
        (gone,) = lines("client gone")
        assert (gone["cuts"], gone["resumptions"]) == (3, 3)


def texts(world: World, lines: LogLines, role: str, part: str) -> list[str]:
    return [line for line in lines.all() if f"wstunnel.{role} " in line and part in line]


class TestWithout:
    """A lost link resets its stream at once where one end does not resume."""

    @pytest.mark.parametrize("options", [{"resume_window": 0}, {"max_resume_window": 0}])
    async def test_a_window_of_0_at_either_end(
        self, make_world: Make, lines: LogLines, options: dict[str, int]
    ) -> None:
        world = await make_world(**options).warm()
        app, near, far, target = await world.stream(b"x")
        world.cut(near.link)
        await world.settle()
        assert near.outcome == far.outcome == ("lost", "connection failed: reset")
        assert app.reset_by_peer and target.reset_by_peer
        assert not [line for line in lines.all() if "lost its link" in line]
        left_nothing(world)

    async def test_a_client_without_the_feature(self, make_world: Make) -> None:
        world = make_world()
        peer = Peer(world)
        (welcome, *_) = await peer.send(Hello(version=VERSION, session="s" * 22, role="forward"), opening(1))
        assert isinstance(welcome, Welcome) and welcome.resume_window == 0
        peer.near.close()
        await world.settle()
        assert world.targets[0].reset_by_peer
        assert not world.server._sessions

    async def test_a_server_without_the_feature(self, make_world: Make) -> None:
        world = make_world(idle_links=1)
        world.dialler.greets = False
        world.nursery.start_soon(world.session.keep_links)
        for _ in range(3):
            await world.settle()
            for _near, far in world.dialler.ends:
                if not far.writes:
                    protocol = LinkProtocol("server")
                    protocol.send(Welcome(version=VERSION, server="v" * 22, boot="b" * 22, resume_window=300))
                    far.send(b"".join(protocol.pull(1000, 0.0, 0.0)))  # type: ignore[arg-type]
        await world.settle()
        app = world.connect(b"x")
        await world.settle()
        near = world.near_stream()
        world.cut(near.link)
        await world.settle()
        assert near.outcome is not None and near.outcome[0] == "lost"
        assert app.reset_by_peer

    async def test_a_server_that_comes_back_without_the_feature(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        """What waits for it ends with the next sweep, not after a window that it does not grant."""
        world, app, near, _far, _target = await away(make_world)
        world._config = type(world._config)(state_dir=Path("/nonexistent"), max_resume_window=0)
        world.make_server()
        world.dialler.error = None
        await until(lambda: world.session.links and near.outcome, 20)
        assert near.outcome is not None and near.outcome[0] == "lost"
        assert app.reset_by_peer


class TestSilence:
    """A black hole: the link is there, and nothing comes back."""

    async def test_the_stream_goes_on_on_a_link_that_was_heard_since(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        """All links of the pool are as silent as its own. A fresh one is dialled when data has waited for 3 s."""
        world = make_world(idle_links=4)
        world.run()
        await trio.sleep(5)
        app = world.connect(b"x")
        await trio.sleep(5)
        near, far = world.near_stream(), world.far_stream()
        silent = set(world.session.links)
        for link in silent:
            world.freeze(link)
        world.dialler.begun.clear()
        begun = trio.current_time()
        app.send(b"y")
        app.outgoing.move(1)
        await trio.sleep(2.9)
        assert world.dialler.begun == []
        await trio.sleep(0.2)
        assert len(world.dialler.begun) >= 1, "a fresh link meanwhile"
        assert near.link in silent
        await until(lambda: near.link is not None and near.link not in silent, 10)
        assert trio.current_time() - begun < 8.5
        await trio.sleep(0.5)
        assert world.read(world.targets[0]) == b"xy"
        assert world.session.outages.cuts == 1, "it went to a link that lives at the first try"
        assert near.outcome is None and far.outcome is None

    async def test_idle_links_that_answer_a_ping_are_as_good(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=2)
        world.run()
        await trio.sleep(5)
        app = world.connect(b"x")
        await trio.sleep(5)
        near = world.near_stream()
        idle = list(world.session.ingress.idle)
        silent = near.link
        world.freeze(silent)
        app.send(b"y")
        app.outgoing.move(1)
        await until(lambda: near.link is not silent and near.link is not None, 9)
        assert all(link.last_received > silent.last_received for link in idle)
        await trio.sleep(0.5)
        assert world.read(world.targets[0]) == b"xy"

    @pytest.mark.parametrize("silent", [True, False])
    async def test_links_that_were_not_heard_since_are_not_trusted(self, make_world: Make, silent: bool) -> None:
        """Silence may have hit them as well; a reset is that connection's own."""
        world = await make_world().warm()
        _app, near, _far, target = await world.stream(b"x")
        await world.settle()
        target.send(b"y")
        await world.settle()
        known = list(world.session.ingress.idle)
        assert known and all(link.last_received < near.link.last_received for link in known)
        world.freeze(near.link)
        near.link.lose("gone", silent=silent)
        await world.settle()
        assert near.link is not None
        assert (near.link in known) is not silent

    async def test_one_that_is_heard_again_asks_for_no_more_links(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        """It is heard after all others, and so none of them would seem to live."""
        world = make_world(idle_links=2)
        world.run()
        await trio.sleep(5)
        app = world.connect(b"x")
        await trio.sleep(5)
        near = world.near_stream()
        link = near.link
        link.sock.peer.outgoing.room = 0
        app.send(b"y")
        app.outgoing.move(1)
        await until(lambda: link in world.session._stalled, 5)
        world.dialler.begun.clear()
        link.sock.peer.outgoing.room = None
        await until(lambda: not link.stalled, 5)
        for _ in range(20):  # before the next sweep
            world.targets[0].send(b"z")
            await trio.sleep(0.01)
            assert not world.session._unproved()
        assert near.link is link

    async def test_an_idle_link_is_noticed_within_26_seconds_and_replaced(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(idle_links=3)
        world.run()
        await trio.sleep(5)
        silent = list(world.session.ingress.idle)[1]
        world.freeze(silent)
        await trio.sleep(26)
        assert silent not in world.session.links
        assert world.idle == 3


class TestPauses:
    async def test_a_stream_that_gets_nowhere_does_not_spin(
        self, make_world: Make, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world = make_world()
        world.run()
        await trio.sleep(2)
        app = world.connect(b"x")
        await trio.sleep(1)
        near = world.near_stream()
        tried: list[float] = []

        def refuse(link: Any, _message: Resume) -> None:
            tried.append(trio.current_time())
            link.lose("cut")

        session = world.far_session
        monkeypatch.setattr(session, "_resume", refuse)
        world.cut(near.link)
        await trio.sleep(2)
        assert FRUITLESS_FREE < len(tried) <= 9
        gaps = [later - earlier for earlier, later in itertools.pairwise(tried[FRUITLESS_FREE:])]
        assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(gaps)), gaps
        monkeypatch.undo()
        await trio.sleep(20)
        assert near.link is not None and near.outcome is None
        app.send(b"y")
        await trio.sleep(1)
        assert world.read(world.targets[0]) == b"xy"

    async def test_links_that_die_young_but_were_useful_are_no_failure(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        """Something on the way cuts every connection after half a second: the stream goes on, and nobody backs off."""
        world = make_world()
        world.run()
        await trio.sleep(2)
        app = world.connect(b"x")
        await trio.sleep(1)
        (target,) = world.targets
        received = b"x" if world.read(target) == b"x" else b""
        for number in range(20):
            world.cut_all()
            await trio.sleep(0.1)
            app.send(bytes([number]))
            await trio.sleep(0.4)
            received += world.read(target)
        assert received == b"x" + bytes(range(20))
        assert lines("lost the server, trying again") == []
        assert world.session.outages.cuts == world.session.outages.resumptions == 20

    async def test_links_that_die_young_and_were_of_no_use_are_one(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world()
        world.run()
        await trio.sleep(2)
        for _ in range(3):
            world.cut_all()
            await trio.sleep(0.3)
        assert len(lines("lost the server, trying again")) == 1
        assert not world.session._absence.settled
        await trio.sleep(10)
        assert world.session._absence.settled and world.idle == 2
        assert len(lines("connected again")) == 1

    async def test_all_links_lost_at_once_cost_no_back_off_while_the_server_is_there(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world(idle_links=12)
        world.run()
        await trio.sleep(5)
        for _ in range(10):
            world.connect(b"x")
        await trio.sleep(5)
        world.cut_all()
        await trio.sleep(0.5)
        streams = list(world.session.streams.values())
        assert len(streams) == 10 and all(stream.link is not None for stream in streams)
        assert world.session._absence._backoff._ceiling == limits.BACKOFF_FIRST_SECONDS
        assert world.dialler.most <= limits.DIALS_AT_ONCE
        assert lines("lost the server, trying again") == []


class TestSleep:
    async def test_of_the_machine_restarts_windows_and_pings_every_link(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        """CLOCK_MONOTONIC stands still meanwhile: only CLOCK_BOOTTIME tells."""
        world, _app, near, far, _target = await away(make_world, resume_window=10)
        await trio.sleep(8)
        world.suspended += 3600
        await trio.sleep(9)
        assert near.outcome is None and far.outcome is None
        await trio.sleep(4)
        assert near.outcome == far.outcome == ("lost", "no link for 10 s")
        world.dialler.error = None
        await trio.sleep(30)
        links = list(world.session.links)
        numbers = [link._ping_number for link in links]
        far_numbers = [world.far_link(link)._ping_number for link in links]
        world.suspended += 3600
        await trio.sleep(1.2)
        assert [link._ping_number for link in links] == [number + 1 for number in numbers]
        assert [world.far_link(link)._ping_number for link in links] == [number + 1 for number in far_numbers]

    async def test_of_the_process_is_nobodys_fault(self, make_world: Make, autojump_clock: MockClock) -> None:
        """SIGSTOP: CLOCK_MONOTONIC runs on, and no deadline that passed meanwhile counts."""
        world = make_world()
        world.run()
        await trio.sleep(2)
        app = world.connect(b"x")
        await trio.sleep(3)
        near = world.near_stream()
        links = set(world.session.links)
        app.send(b"y")
        autojump_clock.jump(100)
        await trio.sleep(5)
        assert links <= world.session.links
        assert near.link in links and near.state.epoch == 0
        assert world.read(world.targets[0]) == b"xy"


class TestRealSockets:
    async def test_bulk_through_cuts_of_either_end(self, tmp_path: Path) -> None:
        """8 MiB through an echo; every 256 KiB one end or the other drops the connection under it."""
        size = 8 * limits.MIB
        sent = os.urandom(size)
        async with targets() as egress, serving(tmp_path) as server:
            port = await egress.echo()
            async with connecting(server.url, f"0:127.0.0.1:{port}") as client:
                await ready(client)
                stream = await application(client.ports[0])
                received = bytearray()
                cuts = 0

                async def write() -> None:
                    await stream.send_all(sent)
                    await stream.send_eof()

                with trio.fail_after(60):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(write)
                        while chunk := await stream.receive_some(65536):
                            received += chunk
                            if len(received) // (256 * limits.KIB) > cuts:
                                session = client.session if cuts % 2 else server.sessions()[0]
                                ends = [one.link for one in session.streams.values() if one.link is not None]
                                if ends:
                                    ends[0].lose("cut by the test")
                                    cuts += 1
                await stream.aclose()
                assert cuts >= 20
                assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest()
                await until(lambda: not client.session.streams and not server.sessions()[0].streams)
                assert client.session.principal.budget.held == server.sessions()[0].principal.budget.held == 0
                assert egress.accepted == egress.ends == 1

    @pytest.mark.parametrize("how", ["shutdown", "cancel"])
    async def test_nothing_is_left_when_a_client_ends_whose_streams_have_no_link(
        self, tmp_path: Path, how: str
    ) -> None:
        before = descriptors()
        near: list[trio.SocketStream] = []
        async with targets() as egress:
            port = await egress.echo()
            with trio.CancelScope() as serving_scope:
                async with serving(tmp_path) as server:
                    url = server.url
                    with trio.CancelScope() as scope:
                        async with connecting(url, f"0:127.0.0.1:{port}") as client:
                            await ready(client)
                            near += [await application(client.ports[0]) for _ in range(5)]
                            streams = client.session.streams
                            await until(lambda: len(streams) == 5 and all(one.state.opened for one in streams.values()))
                            hold_down(client)

                            def bare() -> bool:
                                for link in list(client.session.links):  # those of dials that were under way, too
                                    link.lose("cut by the test")
                                return not server.links() and not client.session._dialling

                            await until(bare)
                            assert len(client.session._detached) == 5
                            assert len(server.sessions()[0]._detached) == 5
                            if how == "cancel":
                                scope.cancel()
                    for stream in near:
                        await stream.aclose()
                    if how == "cancel":
                        serving_scope.cancel()
                        await trio.lowlevel.checkpoint()
            await until(lambda: egress.resets + egress.ends == 5)
        await until(lambda: descriptors() == before)


def hold_down(client: Any) -> None:
    """No dial succeeds any more."""

    class Away:
        url = client.session._dialler.url

        async def dial(self) -> Any:
            raise AWAY

        def failed(self, _error: Exception) -> None:
            pass

    client.session._dialler = Away()
