"""server.py and session.py: strangers, users, streams and limits; in memory where time is the point."""

from __future__ import annotations

import base64
import os
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trustme
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.roles import (  # lines, make_world and raises are fixtures
    LogLines,
    World,
    descriptors,
    invite,
    lines,
    make_world,
    raises,
    reset_code,
    serving,
    targets,
    tcp_pair,
    until,
)
from wstunnel import egress as egress_module
from wstunnel import limits, sockets, tls
from wstunnel import server as server_module
from wstunnel.auth import Token, Users
from wstunnel.config import ServerConfig
from wstunnel.dial import Begun
from wstunnel.endpoints import tcp
from wstunnel.errors import LocalError, ProtocolError, StreamError
from wstunnel.forwards import Forward
from wstunnel.reverse_server import Place
from wstunnel.server import Server
from wstunnel.state import read_announcement
from wstunnel.stream import Stream
from wstunnel.wire.frames import FrameDecoder, Opcode, encode_frame, parse_close
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
    Reset,
    Welcome,
    decode,
    encode,
)

__all__ = ["lines", "make_world", "raises"]

Make = Callable[..., World]
SESSION = "s" * 22


def identify(number: int) -> str:
    return f"{number:022d}"


def hello(role: Any = "forward", **changes: Any) -> Hello:
    return Hello(**({"version": VERSION, "session": SESSION, "role": role} | changes))


def text(message: Message) -> bytes:
    return encode_frame(Opcode.TEXT, encode(message), key=os.urandom(4))


def data(payload: bytes) -> bytes:
    return encode_frame(Opcode.BINARY, payload, key=os.urandom(4))


class Reader:
    """What came from a server: messages, data, the close frame; pings apart."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder(masked=False)
        self.messages: list[AnyMessage] = []
        self.data = b""
        self.closed: tuple[int, str] | None = None

    def feed(self, received: bytes) -> None:
        for opcode, payload, _last in self._decoder.feed(received):
            if opcode == Opcode.TEXT:
                message = decode(bytes(payload))
                if not isinstance(message, Ping):
                    self.messages.append(message)
            elif opcode == Opcode.BINARY:
                self.data += bytes(payload)
            elif opcode == Opcode.CLOSE:
                self.closed = parse_close(bytes(payload))

    def take(self) -> list[AnyMessage]:
        messages, self.messages = self.messages, []
        return messages


class Peer(Reader):
    """A client's end of a link in memory, free to break every rule."""

    def __init__(self, world: World, user: str = "alice") -> None:
        super().__init__()
        self.world = world
        self.near, far = world.pair()
        self.link = world.serve(far, user)

    async def send(self, *parts: Message | bytes) -> list[AnyMessage]:
        """Send all in one write; the messages that come back."""
        self.near.send(b"".join([part if isinstance(part, bytes) else text(part) for part in parts]))
        return await self.receive()

    async def receive(self) -> list[AnyMessage]:
        await self.world.settle()
        arrived = self.near.incoming.arrived
        self.feed(bytes(arrived))
        arrived.clear()
        return self.take()

    async def finish(self, n: int, sent: int = 0) -> None:
        """End a stream in good order; its target ends at once."""
        self.world.targets[-1].shutdown(socket.SHUT_WR)
        answers = await self.send(Eof(n=n, total=sent))
        (eof,) = [message for message in answers if isinstance(message, Eof)]
        await self.send(Ack(n=n, consumed=eof.total + 1, limit=eof.total + 1 + limits.WINDOW_FIRST))


def opening(number: int, n: int = 1, target: str = "tcp:db:5432", peer: str = "192.0.2.9:1") -> Open:
    return Open(n=n, stream=identify(number), target=target, peer=peer)


class TestGreeting:
    async def test_hello_open_and_early_data_before_the_welcome(self, make_world: Make) -> None:
        world = make_world()
        peer = Peer(world)
        answers = await peer.send(hello(), opening(1), data(b"early"))
        assert [type(answer) for answer in answers[:2]] == [Welcome, Opened]
        assert answers[1] == Opened(n=1, address="10.0.0.5:5432")
        assert bytes(world.targets[0].incoming.arrived) == b"early"
        world.targets[0].send(b"reply")
        await peer.receive()
        assert peer.data == b"reply"

    async def test_early_data_waits_for_a_slow_target(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world()
        world.dial_seconds = 5
        world.nursery.start_soon(world.pump)
        peer = Peer(world)
        peer.near.send(text(hello()) + text(opening(1)) + data(b"early"))
        await trio.sleep(4)
        assert not world.targets
        peer.near.send(data(b" bird"))
        await trio.sleep(2)
        assert bytes(world.targets[0].incoming.arrived) == b"early bird"

    async def test_welcome_says_who_answers_and_whether_the_session_was_known(self, make_world: Make) -> None:
        world = make_world()
        (first,) = await Peer(world).send(hello())
        (second,) = await Peer(world).send(hello("control"))
        assert isinstance(first, Welcome)
        assert isinstance(second, Welcome)
        assert (first.known, second.known) == (False, True)
        assert first.version == VERSION
        assert (first.server, first.boot) == (second.server, second.boot)
        assert first.keepalive == limits.PING_AFTER_SECONDS
        (session,) = world.server._sessions.values()
        assert len(session.links) == 2

    async def test_another_version_is_refused(self, make_world: Make) -> None:
        world = make_world()
        peer = Peer(world)
        (welcome,) = await peer.send(hello(version=VERSION + 1))
        assert welcome.version == VERSION  # says what would do
        assert peer.closed == (1008, f"version {VERSION + 1} is not spoken here, only {VERSION}")
        assert not world.server._sessions

    async def test_a_reverse_link_is_parked(self, make_world: Make) -> None:
        world = make_world()
        peer = Peer(world)
        (welcome,) = await peer.send(hello("reverse"))
        assert isinstance(welcome, Welcome)
        (session,) = world.server._sessions.values()
        assert list(session.ingress.idle) == [peer.link]

    async def test_who_says_nothing_is_closed_after_ten_seconds(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world()
        world.run()
        peer = Peer(world)
        await trio.sleep(limits.HANDSHAKE_SECONDS - 0.5)
        peer.feed(bytes(peer.near.incoming.arrived))
        assert peer.closed is None
        await trio.sleep(2)
        peer.feed(bytes(peer.near.incoming.arrived))
        assert peer.closed == (1002, "no hello in time")
        await trio.sleep(2)
        assert not world.server._greeting

    async def test_a_message_that_no_server_expects(self, make_world: Make) -> None:
        world = make_world()
        peer = Peer(world)
        await peer.send(hello())
        (session,) = world.server._sessions.values()
        with pytest.raises(ProtocolError, match="welcome is not expected here"):
            session.message(peer.link, Welcome(version=VERSION, server=SESSION, boot=SESSION))

    async def test_sessions_are_apart_and_so_are_principals(self, make_world: Make, lines: LogLines) -> None:
        world = make_world()
        peers = [Peer(world, user) for user in ("alice", "alice", "bob")]
        await peers[0].send(hello(session="a" * 22))
        await peers[1].send(hello(session="b" * 22))
        await peers[2].send(hello(session="a" * 22))
        assert len(world.server._sessions) == 3
        # One id in two principals' hands is two streams.
        for peer in (peers[0], peers[2]):
            assert Opened(n=1, address="10.0.0.5:5432") in await peer.send(opening(1))
        principals = world.server._principals
        assert {name: principal.streams for name, principal in principals.items()} == {"alice": 1, "bob": 1}
        assert {name: principal.links for name, principal in principals.items()} == {"alice": 2, "bob": 1}
        assert principals["alice"].budget is not principals["bob"].budget
        limiter = world.server.egress.limiter
        assert limiter("alice") is not limiter("bob")
        assert limiter("bob") is limiter("bob")
        await peers[2].send(Reset(n=1, code="reset"))
        await peers[2].send(opening(2, n=2))
        assert [line["principal"] for line in lines("stream opened")] == ["alice", "bob", "bob"]
        # Bob's finished id is no tombstone of alice's.
        assert Opened(n=1, address="10.0.0.5:5432") in await peers[1].send(opening(2))

    async def test_a_session_ends_with_its_last_link(self, make_world: Make, lines: LogLines) -> None:
        world = make_world()
        one, two = Peer(world), Peer(world)
        await one.send(hello(agent="test/1"))
        await two.send(hello("control"))
        one.near.close()
        await world.settle()
        assert len(world.server._sessions) == 1
        two.near.close()
        await world.settle()
        assert not world.server._sessions
        assert not world.server._principals["alice"].sessions
        assert world.server._principals["alice"].links == 0
        (connected,) = lines("client connected")
        (gone,) = lines("client gone")
        assert connected["session"] == gone["session"] != SESSION
        assert connected["agent"] == "test/1"

    async def test_bye_ends_the_session(self, make_world: Make) -> None:
        world = make_world()
        control, forward = Peer(world), Peer(world)
        await control.send(hello("control"))
        await forward.send(hello(), opening(1))
        await control.send(Bye())
        await forward.receive()
        assert control.closed == forward.closed == (1000, "the client said goodbye")
        assert world.targets[0].reset_by_peer
        for peer in (control, forward):
            peer.near.close()
        await world.settle()
        assert not world.server._sessions


class TestOpen:
    async def test_a_link_carries_one_stream_after_the_other(self, make_world: Make, lines: LogLines) -> None:
        world = make_world()
        peer = Peer(world)
        await peer.send(hello())
        for n in (1, 2, 3):
            answers = await peer.send(opening(n, n=n), data(b"abc"))
            assert Opened(n=n, address="10.0.0.5:5432") in answers
            await peer.finish(n, sent=3)
        assert len(lines("stream opened")) == 3
        ended = lines("stream ended")
        assert [(line["received"], line["sent"], line["reason"]) for line in ended] == [(3, 0, "finished")] * 3
        assert ended[0]["application"] == "192.0.2.9:1"  # as the client claims
        assert ended[0]["peer"] == peer.link.peer  # as it is
        assert not world.server._principals["alice"].streams

    async def test_an_id_that_was_used_is_never_dialled_again(self, make_world: Make, lines: LogLines) -> None:
        world = make_world()
        peer, other = Peer(world), Peer(world)
        await peer.send(hello(), opening(1))
        await peer.finish(1)
        await other.send(hello())
        answers = await other.send(opening(1))
        assert [message for message in answers if isinstance(message, Reset)] == [
            Reset(n=1, code="forbidden", message="this stream id was used before")
        ]
        assert len(world.dialled) == 1
        # The link goes on.
        await other.send(Reset(n=1, code="forbidden"))
        assert [line["reason"] for line in lines("stream refused")] == ["forbidden"]
        assert Opened(n=2, address="10.0.0.5:5432") in await other.send(opening(2, n=2))

    async def test_a_refused_id_is_not_dialled_later(self, make_world: Make) -> None:
        world = make_world()
        peer, other = Peer(world), Peer(world)
        await peer.send(hello(), opening(1, target="not a target"))
        await other.send(hello(), opening(1))
        assert not world.dialled

    async def test_a_tombstone_goes_at_the_next_open_of_its_link(self, make_world: Make) -> None:
        world = make_world()
        peer = Peer(world)
        await peer.send(hello(), opening(1))
        await peer.finish(1)
        tombstones = world.server._principals["alice"].tombstones
        assert identify(1) in tombstones
        await peer.send(opening(2, n=2))
        assert identify(1) not in tombstones

    @pytest.mark.parametrize(("longest", "remembered"), [(3600, 3600), (0, 300)])
    async def test_else_after_the_longest_window_of_any_stream(
        self, make_world: Make, autojump_clock: MockClock, longest: int, remembered: int
    ) -> None:
        world = make_world(max_resume_window=longest)
        world.nursery.start_soon(world.server.sweep_forever)
        peer = Peer(world)
        await peer.send(hello(), opening(1))
        await peer.finish(1)
        await trio.sleep(remembered - 2)
        assert identify(1) in world.server._principals["alice"].tombstones
        await trio.sleep(4)
        assert identify(1) not in world.server._principals["alice"].tombstones

    async def test_a_live_id_again_closes_that_link_only(self, make_world: Make) -> None:
        world = make_world()
        peer, other = Peer(world), Peer(world)
        await peer.send(hello(), opening(1), data(b"one"))
        await other.send(hello())
        await other.send(opening(1))
        assert other.closed == (1002, "open repeats the id of a live stream")
        assert len(world.dialled) == 1
        await peer.send(data(b" two"))
        assert peer.closed is None
        assert bytes(world.targets[0].incoming.arrived) == b"one two"

    @pytest.mark.parametrize("target", ["", "db", "db:0", "tcp:db:99999", "ftp:db:21", "tcp:[::1:80", "\x1b[2J:1"])
    async def test_what_is_no_target_is_forbidden(self, make_world: Make, target: str) -> None:
        world = make_world()
        peer = Peer(world)
        answers = await peer.send(hello(), opening(1, target=target))
        (reset,) = [message for message in answers if isinstance(message, Reset)]
        assert (reset.code, reset.message.split(":")[0]) == ("forbidden", "not a target")
        assert not world.dialled

    async def test_a_reset_stops_the_dial(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world()
        world.dial_seconds = 5
        world.nursery.start_soon(world.pump)
        peer = Peer(world)
        peer.near.send(text(hello()) + text(opening(1)))
        await trio.sleep(1)
        peer.near.send(text(Reset(n=1, code="reset")))
        await trio.sleep(6)
        assert world.dialled == ["tcp:db:5432"]
        assert not world.targets
        assert not world.server._principals["alice"].streams

    async def test_a_reset_in_the_same_read_comes_before_the_dial(
        self, make_world: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def too_late(*_: object) -> None:
            raise AssertionError("nobody wants the target any more")

        world = make_world()
        monkeypatch.setattr(egress_module, "begin_dial", too_late)
        await Peer(world).send(hello(), opening(1), Reset(n=1, code="reset"))
        assert not world.dialled
        assert not world.server._principals["alice"].streams

    @pytest.mark.parametrize(
        "refusal", [None, StreamError("refused", "cannot connect"), StreamError("forbidden", "no")]
    )
    async def test_what_needs_no_wait_is_dialled_at_once(
        self, make_world: Make, monkeypatch: pytest.MonkeyPatch, lines: LogLines, refusal: StreamError | None
    ) -> None:
        """Without a task: at the end of the batch that brought `open`."""
        world = make_world()
        near, far = world.pair()
        if refusal is not None:
            refusal.add_note("the reason in full")

        def begin(_target: object, policy: object, sources: object) -> Begun:
            assert policy is world.server.policy
            if refusal is not None:
                raise refusal
            return Begun(near, ("10.0.0.5", 5432), done=True)  # type: ignore[arg-type]

        def no_task(*_: object) -> None:
            raise AssertionError("a task costs more than the dial")

        monkeypatch.setattr(egress_module, "begin_dial", begin)
        monkeypatch.setattr(world.server.egress, "_await_dial", no_task)
        peer = Peer(world)
        answers = await peer.send(hello(), opening(1), data(b"early"))
        if refusal is None:
            assert Opened(n=1, address="10.0.0.5:5432") in answers
            assert bytes(far.incoming.arrived) == b"early"
        else:
            assert Reset(n=1, code=refusal.code, message=str(refusal)) in answers
            await peer.send(Reset(n=1, code="reset"))
            (refused,) = lines("stream refused")
            assert (refused["reason"], refused["policy"]) == (refusal.code, "the reason in full")

    async def test_what_is_under_way_is_handed_on(self, make_world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        world = make_world()
        near, far = world.pair()
        begun = Begun(near, ("10.0.0.5", 5432), done=False)  # type: ignore[arg-type]
        handed: list[Begun | None] = []

        async def go_on(*_: object, limiter: object, sources: object, begun: Begun | None) -> tuple[object, str]:
            handed.append(begun)
            await trio.lowlevel.checkpoint()
            return near, "10.0.0.5:5432"

        monkeypatch.setattr(egress_module, "begin_dial", lambda *_: begun)
        monkeypatch.setattr(egress_module, "dial_target", go_on)
        answers = await Peer(world).send(hello(), opening(1), data(b"early"))
        assert handed == [begun]
        assert Opened(n=1, address="10.0.0.5:5432") in answers
        assert bytes(far.incoming.arrived) == b"early"

    @pytest.mark.parametrize("where", ["connected", "begin_dial", "dial_target"])
    async def test_a_fault_of_ours_in_the_dial_or_after_it_is_that_streams_end(
        self, make_world: Make, monkeypatch: pytest.MonkeyPatch, lines: LogLines, where: str
    ) -> None:
        def fault(*_: object, **__: object) -> None:
            raise KeyError("a fault")

        world = make_world()
        monkeypatch.setattr(Stream if where == "connected" else egress_module, where, fault)
        peer = Peer(world)
        answers = await peer.send(hello(), opening(1))
        assert Reset(n=1, code="internal", message="internal error: KeyError") in answers
        assert peer.link.sock is not None
        assert lines("fault in our own code")

    async def test_the_end_of_a_link_stops_the_dial_and_resets_the_target(
        self, make_world: Make, lines: LogLines
    ) -> None:
        world = make_world()
        peer = Peer(world)
        await peer.send(hello(), opening(1))
        peer.near.close()
        await world.settle()
        assert world.targets[0].reset_by_peer
        (ended,) = lines("stream ended", "server")
        assert ended["reason"] == "lost"
        assert ended["detail"] == "connection closed without a close frame"


class TestLimits:
    async def test_streams_of_a_principal_over_all_sessions(
        self, make_world: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "PRINCIPAL_STREAMS", 2)
        world = make_world()
        peers = [Peer(world, user) for user in ("alice", "alice", "alice", "bob")]
        for number, peer in enumerate(peers):
            answers = await peer.send(hello(session=f"{number:022d}"), opening(number))
            resets = [message for message in answers if isinstance(message, Reset)]
            assert resets == ([Reset(n=1, code="limit", message="too many streams")] if number == 2 else [])
        # One goes, another may come.
        await peers[2].send(Reset(n=1, code="limit"))
        await peers[0].send(Reset(n=1, code="reset"))
        assert Opened(n=2, address="10.0.0.5:5432") in await peers[2].send(opening(9, n=2))

    @pytest.mark.parametrize(("descriptors", "streams"), [(10, 4), (100, 46), (1_000_000, 16384)])
    async def test_a_principal_gets_a_part_of_the_descriptors(
        self, make_world: Make, descriptors: int, streams: int
    ) -> None:
        """46 % for links and as many for streams' targets: others still get in."""
        world = make_world()
        world.server._descriptors = descriptors
        assert world.server.share(limits.PRINCIPAL_STREAMS) == streams
        assert world.server.share(3) == 3
        if streams > 10:
            return
        peers = [Peer(world) for _ in range(streams + 1)]
        for number, peer in enumerate(peers):
            answers = await peer.send(hello(), opening(number))
            full = Reset(n=1, code="limit", message="too many streams")
            assert (full in answers) is (number == streams)
        assert world.server.links_of("alice") == streams + 1, "links are refused before their upgrade"

    async def test_links_get_the_same_part(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: LogLines
    ) -> None:
        async with serving(tmp_path) as server:
            monkeypatch.setattr(server.server, "_descriptors", 5)
            monkeypatch.setattr(limits, "HANDSHAKES_DIVISOR", 1)
            held = []
            for status in (101, 101, 503):
                held.append(await Stranger.connect(server.port))
                assert await held[-1].upgrade(server.token) == status
            for one in held:
                await one.close()
        assert [line["reason"] for line in lines("connection refused")] == ["too many links"]

    async def test_at_three_quarters_of_the_budget_opens_get_limit(self, make_world: Make) -> None:
        world = make_world()
        peers = [Peer(world, user) for user in ("alice", "bob")]
        for peer in peers:
            await peer.send(hello())
        budget = world.server._principals["alice"].budget
        budget.charge(limits.PRINCIPAL_BYTES * 3 // 4 + 1)
        answers = await peers[0].send(opening(1))
        assert [message for message in answers if isinstance(message, Reset)] == [
            Reset(n=1, code="limit", message="too much memory is held")
        ]
        assert Opened(n=1, address="10.0.0.5:5432") in await peers[1].send(opening(1))
        budget.charge(-(limits.PRINCIPAL_BYTES * 3 // 4 + 1))
        await peers[0].send(Reset(n=1, code="limit"))
        assert Opened(n=2, address="10.0.0.5:5432") in await peers[0].send(opening(2, n=2))

    @pytest.mark.parametrize("who", ["alice", "everyone"])
    async def test_at_the_whole_budget_the_largest_stream_goes(
        self, make_world: Make, who: str, lines: LogLines
    ) -> None:
        world = make_world()
        peers = [Peer(world, user) for user in ("alice", "alice", "bob")]
        sizes = (3000, 9000, 20000)
        for number, (peer, size) in enumerate(zip(peers, sizes, strict=True)):
            await peer.send(hello(), opening(number))
            world.targets[number].incoming.room = 0
            await peer.send(data(bytes(size)))
        budget = world.server._principals["alice"].budget
        process = world.server._budget
        assert process.held >= sum(sizes)
        if who == "alice":
            budget.capacity = budget.held
        else:
            process.capacity = process.held
        await peers[0].send(data(b"one more"))
        gone = [target.reset_by_peer for target in world.targets]
        assert gone == ([False, True, False] if who == "alice" else [False, False, True])
        assert process.held < process.capacity
        for peer in peers:
            await peer.receive()
        assert [line["reason"] for line in lines("stream ended")] in ([], ["limit"])

    async def test_links_of_a_principal(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: LogLines) -> None:
        monkeypatch.setattr(limits, "PRINCIPAL_LINKS", 2)
        async with serving(tmp_path) as server:
            bob = invite(tmp_path, "bob")
            held = []
            for _ in range(2):
                held.append(await Stranger.connect(server.port))
                assert await held[-1].upgrade(server.token) == 101
            # These have not said hello, and count all the same.
            third = await Stranger.connect(server.port)
            assert await third.upgrade(server.token) == 503
            other = await Stranger.connect(server.port)
            assert await other.upgrade(bob) == 101
            for one in held:
                await one.send(text(hello()))
            await until(lambda: server.links() == 2)
            fourth = await Stranger.connect(server.port)
            assert await fourth.upgrade(server.token) == 503
            await held[0].close()
            await until(lambda: server.links() == 1)
            fifth = await Stranger.connect(server.port)
            assert await fifth.upgrade(server.token) == 101
            for one in (*held, third, fourth, fifth, other):
                await one.close()
        assert [line["reason"] for line in lines("connection refused")] == ["too many links"] * 2


# --- sweeps ---------------------------------------------------------------------------------------------------------


class TestSweeps:
    async def test_what_moved_is_acked_within_a_second(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world()
        peer = Peer(world)
        await peer.send(hello(), opening(1))
        await peer.send(data(b"abc"))
        assert not [message for message in await peer.receive() if isinstance(message, Ack)]
        world.nursery.start_soon(world.server.sweep_forever)
        await trio.sleep(1.1)
        acks = [message for message in await peer.receive() if isinstance(message, Ack)]
        assert acks == [Ack(n=1, consumed=3, limit=3 + limits.WINDOW_FIRST)]
        await trio.sleep(5)
        assert not [message for message in await peer.receive() if isinstance(message, Ack)]

    async def test_a_half_closed_stream_that_is_silent_for_an_hour_is_reset(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world()
        peer = Peer(world)
        await peer.send(hello(), opening(1))
        await peer.send(Eof(n=1, total=0))
        (session,) = world.server._sessions.values()
        for _ in range(int(limits.HALF_CLOSED_SECONDS) - 60):
            session._sweep_half_closed(trio.current_time()) if trio.current_time() % 30 < 1 else None
            await trio.sleep(1)
        assert session.streams
        # A byte the other way starts the hour anew.
        world.targets[0].send(b"x")
        await peer.receive()
        await peer.send(Ack(n=1, consumed=1, limit=1 + limits.WINDOW_FIRST))
        for _ in range(115):
            session._sweep_half_closed(trio.current_time())
            await trio.sleep(30)
        assert session.streams
        for _ in range(10):
            session._sweep_half_closed(trio.current_time())
            await trio.sleep(30)
        await peer.receive()
        await peer.send(Reset(n=1, code="idle"))
        assert [line["reason"] for line in lines("stream ended")] == ["idle"]

    async def test_an_open_stream_may_be_silent_for_days(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world()
        peer = Peer(world)
        await peer.send(hello(), opening(1))
        (session,) = world.server._sessions.values()
        for _ in range(48):
            session._sweep_half_closed(trio.current_time())
            await trio.sleep(3600)
        assert session.streams
        assert not session._half_closed

    async def test_half_closed_streams_are_looked_at_every_half_minute(
        self, make_world: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world = make_world()
        await Peer(world).send(hello())
        (session,) = world.server._sessions.values()
        looked: list[float] = []
        monkeypatch.setattr(session, "_sweep_half_closed", looked.append)
        for second in range(90):
            session.sweep(float(second))
        assert len(looked) == 3

    async def test_a_driver_that_reports_no_hangups_is_polled_for_them(self, make_world: Make) -> None:
        world = make_world()
        peer = Peer(world)
        await peer.send(hello(), opening(1))
        (session,) = world.server._sessions.values()
        (stream,) = session.streams.values()
        world.server_reactor.want(stream, 0)
        assert stream.sock is not None
        stream.sock.reset_by_peer = True  # type: ignore[attr-defined]
        session.sweep(trio.current_time())
        assert stream.reason is None
        world.server_reactor.reports_hangups = False
        session.sweep(trio.current_time())
        assert stream.reason == ("reset", "connection reset")

    async def test_a_stream_that_starved_is_looked_at_again(self, make_world: Make) -> None:
        world = make_world()
        peer = Peer(world)
        await peer.send(hello(), opening(1))
        budget = world.server._principals["alice"].budget
        (session,) = world.server._sessions.values()
        budget.charge(budget.capacity)
        session._relieving = True  # nothing to relieve: the test holds it all
        world.targets[0].send(b"waiting")
        await peer.receive()
        (stream,) = session.streams.values()
        stream.refresh()
        assert stream in session._starved
        await peer.receive()
        assert peer.data == b""
        budget.charge(-budget.capacity)
        session.sweep(trio.current_time())
        await peer.receive()
        assert peer.data == b"waiting"


# --- strangers ------------------------------------------------------------------------------------------------------


class Stranger(Reader):
    """A connection by hand to a server in this process."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.stream = stream
        self.head = b""

    @classmethod
    async def connect(cls, port: int, context: ssl.SSLContext | None = None) -> Stranger:
        stream: Any = await trio.open_tcp_stream("127.0.0.1", port)
        if context is not None:
            stream = trio.SSLStream(stream, context, server_hostname="127.0.0.1")
        return cls(stream)

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def answer(self) -> int:
        """The status of the answer; what is behind its head is kept for `receive`."""
        with trio.fail_after(20):
            while b"\r\n\r\n" not in self.head:
                received = await self.stream.receive_some(65536)
                if not received:
                    return 0
                self.head += received
        self.head, _, rest = self.head.partition(b"\r\n\r\n")
        if self.head.startswith(b"HTTP/1.1 101"):
            self.feed(rest)
        return int(self.head.split(b" ")[1])

    async def upgrade(self, token: str | None, path: str = "/") -> int:
        await self.send(upgrade(token, path))
        return await self.answer()

    async def receive(self) -> bool:
        """One more read; False at the end."""
        with trio.fail_after(20):
            received = await self.stream.receive_some(65536)
        self.feed(bytes(received))
        return bool(received)

    async def close(self) -> None:
        await trio.aclose_forcefully(self.stream)


def upgrade(token: str | None, path: str = "/") -> bytes:
    credentials = "" if token is None else f"Authorization: Bearer {token}\r\n"
    key = base64.b64encode(os.urandom(16)).decode()
    return (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
        f"Sec-WebSocket-Protocol: wstunnel.1\r\n{credentials}\r\n"
    ).encode()


class TestStrangers:
    @pytest.mark.parametrize("token", [None, "x", Token.new().reveal()], ids=["none", "malformed", "wrong"])
    async def test_401_and_nothing_else_for_who_has_no_token(
        self, tmp_path: Path, lines: LogLines, token: str | None
    ) -> None:
        async with serving(tmp_path) as server:
            stranger = await Stranger.connect(server.port)
            assert await stranger.upgrade(token) == 401
            assert b'WWW-Authenticate: Bearer realm="wstunnel"' in stranger.head
            assert not await stranger.receive()
            await stranger.close()
            assert not server.server._greeting
            assert not server.server._principals
            await until(lambda: not server.server._handshakes)
        (line,) = lines("connection refused")
        assert (line["status"], line["reason"]) == (401, "no valid token")
        assert token is None or token == "x" or token not in "".join(lines.all())

    async def test_another_path(self, tmp_path: Path) -> None:
        async with serving(tmp_path, path="/tunnel") as server:
            one, two = await Stranger.connect(server.port), await Stranger.connect(server.port)
            assert await one.upgrade(server.token) == 404
            assert await two.upgrade(server.token, "/tunnel") == 101
            await one.close()
            await two.close()

    @pytest.mark.parametrize("sent", [b"", b"GET / HT"])
    async def test_who_leaves_in_the_middle_is_forgotten(self, tmp_path: Path, sent: bytes, lines: LogLines) -> None:
        async with serving(tmp_path) as server:
            stranger = await Stranger.connect(server.port)
            await stranger.send(sent)
            await until(lambda: server.server._handshakes)
            await stranger.stream.send_eof()
            assert not await stranger.receive()
            await stranger.close()
            assert not server.server._handshakes
        assert not lines("connection refused")

    async def test_a_reset_in_the_middle_is_survived(self, tmp_path: Path, lines: LogLines) -> None:
        async with serving(tmp_path) as server:
            stranger = await Stranger.connect(server.port)
            await until(lambda: server.server._handshakes)
            sockets.reset(stranger.stream.socket._sock)
            await until(lambda: not server.server._handshakes)
            another = await Stranger.connect(server.port)
            assert await another.upgrade(server.token) == 101
            await another.close()
        assert len(lines("connection failed in its handshake")) == 1

    async def test_garbage_instead_of_tls(self, tmp_path: Path, lines: LogLines) -> None:
        async with serving(tmp_path, plain=False) as server:
            stranger = await Stranger.connect(server.port)
            await stranger.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            try:
                while chunk := await stranger.stream.receive_some(1000):
                    received += chunk
            except trio.BrokenResourceError:
                pass
            assert b"HTTP/1.1" not in received  # not a byte in the clear
            await stranger.close()
            another = await Stranger.connect(server.port, tls.client_context(None, (bytes(32),)))
            assert await another.upgrade(server.token) == 101
            await another.close()
            assert len(lines("connection failed in its handshake")) == 1

    async def test_a_token_counts_as_soon_as_it_is_in_the_file_and_no_longer(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as server:
            token = Token.new()
            for status in (401, 101, 401):
                stranger = await Stranger.connect(server.port)
                assert await stranger.upgrade(token.reveal()) == status
                await stranger.close()
                if status == 401:
                    Users(tmp_path).add_token("bob", token)
                else:
                    (tmp_path / "users" / "bob").write_text("# revoked\n")

    async def test_hello_and_open_by_hand_over_a_real_connection(self, tmp_path: Path) -> None:
        async with targets() as egress, serving(tmp_path) as server:
            port = await egress.echo()
            stranger = await Stranger.connect(server.port)
            first = text(hello()) + text(opening(1, target=f"tcp:127.0.0.1:{port}")) + data(b"early")
            await stranger.send(upgrade(server.token) + first)  # before the 101, even
            assert await stranger.answer() == 101
            while stranger.data != b"early":
                assert await stranger.receive()
            assert [type(message) for message in stranger.messages[:2]] == [Welcome, Opened]
            await stranger.close()

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ("udp:127.0.0.1:53", "a client without the feature `udp` cannot ask for datagrams"),
            ("unix:/run/x.sock", "the server's policy does not allow unix:/run/x.sock"),
        ],
    )
    async def test_other_kinds_of_targets_are_forbidden(self, tmp_path: Path, target: str, message: str) -> None:
        async with serving(tmp_path) as server:
            stranger = await Stranger.connect(server.port)
            await stranger.upgrade(server.token)
            await stranger.send(text(hello()) + text(opening(1, target=target)))
            while not any(isinstance(message, Reset) for message in stranger.messages):
                assert await stranger.receive()
            assert stranger.messages[-1] == Reset(n=1, code="forbidden", message=message)
            await stranger.close()


class TestCrowd:
    """HANDSHAKES at once, whatever strangers do with them."""

    async def gone(self, stranger: Stranger) -> bool:
        return await reset_code(stranger.stream) in ("reset", "end")

    async def test_the_oldest_goes_when_it_is_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "HANDSHAKES", 2)
        async with serving(tmp_path) as server:
            strangers = []
            for count in (1, 2, 2):
                strangers.append(await Stranger.connect(server.port))
                await until(lambda count=count: len(server.server._handshakes) == count)
                await wait_all_tasks_blocked(0.01)
            assert await self.gone(strangers[0])
            # A user gets in all the same, and the younger stranger is still there.
            assert await strangers[2].upgrade(server.token) == 101
            assert await strangers[1].upgrade(None) == 401
            for stranger in strangers:
                await stranger.close()

    async def test_they_take_a_sixteenth_of_the_descriptors_at_most(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving(tmp_path) as server:
            monkeypatch.setattr(server.server, "_descriptors", 2 * limits.HANDSHAKES_DIVISOR)
            strangers = []
            for count in (1, 2, 2):
                strangers.append(await Stranger.connect(server.port))
                await until(lambda count=count: len(server.server._handshakes) == count)
                await wait_all_tasks_blocked(0.01)
            assert await self.gone(strangers[0])
            for stranger in strangers:
                await stranger.close()

    async def test_so_do_negotiations_at_one_users_reverse_proxies_and_other_users_have_their_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server_module.descriptors, "raise_limit", lambda: 2 * limits.HANDSHAKES_DIVISOR)
        async with serving(tmp_path) as server:
            applications = [self.negotiate(server.server, name) for name in ("ann", "eve", "eve", "eve")]
            await wait_all_tasks_blocked(0.01)
            assert [self.is_open(each) for each in applications] == [True, False, True, True]
            for each in applications:
                each.close()

    async def test_without_descriptors_both_give_one_back(self, tmp_path: Path) -> None:
        async with serving(tmp_path) as server:
            strangers = [await Stranger.connect(server.port) for _ in range(2)]
            await until(lambda: len(server.server._handshakes) == 2)
            applications = [self.negotiate(server.server, "ann") for _ in range(2)]
            server.server.drop_oldest()
            assert await self.gone(strangers[0])
            await wait_all_tasks_blocked(0.01)
            assert [self.is_open(each) for each in applications] == [False, True]
            assert len(server.server._handshakes) == 1
            for stranger in strangers:
                await stranger.close()
            for each in applications:
                each.close()

    async def test_when_handshakes_are_too_many_no_negotiation_has_to_go(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "HANDSHAKES", 1)
        async with serving(tmp_path) as server:
            application = self.negotiate(server.server, "ann")
            strangers = []
            for _ in range(2):
                strangers.append(await Stranger.connect(server.port))
                await wait_all_tasks_blocked(0.01)
            assert await self.gone(strangers[0])
            assert self.is_open(application)
            for stranger in strangers:
                await stranger.close()
            application.close()

    def negotiate(self, server: Server, name: str) -> socket.socket:
        """An application that connects to a reverse SOCKS forward of this user, and says nothing. Returns its end."""
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        session = SimpleNamespace(principal=SimpleNamespace(name=name))
        owner: Any = SimpleNamespace(_session=session)
        server.negotiate(Place(owner, "1", Forward("127.0.0.1", 1080, speaks=("socks",)), []), near)
        return far

    def is_open(self, sock: socket.socket) -> bool:
        try:
            return bool(sock.recv(1))
        except BlockingIOError:
            return True

    async def test_refused_ones_that_linger_count_too(self, tmp_path: Path, mock_clock: MockClock) -> None:
        # The clock stands still, so a refused connection lingers until its other end closes.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "HANDSHAKES", 2)
            async with serving(tmp_path) as server:
                strangers = []
                for _ in range(3):
                    strangers.append(await Stranger.connect(server.port))
                    assert await strangers[-1].upgrade(None) == 401
                await wait_all_tasks_blocked(0.02)
                assert len(server.server._handshakes) == 2
                # Its socket is closed, not only forgotten: what is sent now is answered with a reset.
                await strangers[0].send(b"x")
                await wait_all_tasks_blocked(0.02)
                with pytest.raises(trio.BrokenResourceError):
                    await strangers[0].send(b"x")
                for stranger in strangers:
                    await stranger.close()
                await wait_all_tasks_blocked(0.02)
                server.shutdown.set()


class TestDeadline:
    """HANDSHAKE_SECONDS from accept to the end of the upgrade."""

    @pytest.fixture
    async def serve(self, tmp_path: Path, nursery: trio.Nursery, mock_clock: MockClock) -> Any:
        invite(tmp_path)
        pairs: list[tuple[socket.socket, socket.socket]] = []

        def make(context: ssl.SSLContext | None = None) -> tuple[Server, socket.socket]:
            reactor: Any = None
            server = Server(ServerConfig(state_dir=tmp_path), reactor, nursery, [], context)
            near, far = tcp_pair()
            pairs.append((near, far))
            server.accepted(far)
            return server, near

        yield make
        for near, far in pairs:
            near.close()
            assert far.fileno() == -1

    async def receive(self, sock: socket.socket) -> bytes:
        await wait_all_tasks_blocked(0.01)
        try:
            return sock.recv(65536)
        except BlockingIOError:
            return b"nothing"

    async def test_a_head_that_comes_a_byte_a_second(self, serve: Any, mock_clock: MockClock, lines: LogLines) -> None:
        server, near = serve()
        await wait_all_tasks_blocked()
        for byte in upgrade(None)[: int(limits.HANDSHAKE_SECONDS) - 1]:
            near.send(bytes([byte]))
            await wait_all_tasks_blocked(0.01)
            mock_clock.jump(1)
        assert await self.receive(near) == b"nothing"
        mock_clock.jump(1.1)
        answer = await self.receive(near)
        assert answer.startswith(b"HTTP/1.1 408 ")
        near.close()
        await wait_all_tasks_blocked(0.05)
        assert not server._handshakes
        (line,) = lines("connection refused")
        assert (line["status"], line["reason"]) == (408, "the request did not arrive in time")

    async def test_a_refusal_that_is_not_read_lingers_a_second(self, serve: Any, mock_clock: MockClock) -> None:
        server, near = serve()
        near.send(upgrade(None))
        assert (await self.receive(near)).startswith(b"HTTP/1.1 401 ")
        assert await self.receive(near) == b""
        assert len(server._handshakes) == 1
        mock_clock.jump(limits.LINGER_SECONDS + 0.1)
        await wait_all_tasks_blocked(0.01)
        assert not server._handshakes

    @pytest.mark.parametrize("said", [b"", b"\x16\x03\x01"])
    async def test_tls_is_part_of_it(
        self, serve: Any, mock_clock: MockClock, tmp_path: Path, said: bytes, lines: LogLines
    ) -> None:
        cert, key = tls.ensure_certificate(tmp_path, names=("localhost",))
        server, near = serve(tls.server_context(cert, key))
        near.send(said)
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(limits.HANDSHAKE_SECONDS - 0.1)
        assert await self.receive(near) == b"nothing"
        mock_clock.jump(0.2)
        # No HTTP where no TLS is.
        try:
            assert await self.receive(near) == b""
        except ConnectionResetError:
            pass
        assert not server._handshakes
        assert len(lines("connection refused")) == 1

    async def test_time_used_by_tls_is_not_given_again(
        self, serve: Any, mock_clock: MockClock, tmp_path: Path, nursery: trio.Nursery
    ) -> None:
        cert, key = tls.ensure_certificate(tmp_path, names=("localhost",))
        server, near = serve(tls.server_context(cert, key))
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(limits.HANDSHAKE_SECONDS - 1)
        stream = trio.SSLStream(
            trio.SocketStream(trio.socket.from_stdlib_socket(near.dup())),
            tls.client_context(None, (bytes(32),)),
            server_hostname="x",
        )
        await stream.do_handshake()
        await stream.send_all(b"GET / HT")
        await wait_all_tasks_blocked(0.01)
        assert server._handshakes
        mock_clock.jump(1.1)
        answer = await stream.receive_some(1000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        await trio.aclose_forcefully(stream)
        near.close()
        await wait_all_tasks_blocked(0.05)
        assert not server._handshakes


# --- the whole role -------------------------------------------------------------------------------------------------


class TestRun:
    @pytest.mark.parametrize("plain", [True, False])
    async def test_port_0_is_announced(self, tmp_path: Path, lines: LogLines, plain: bool) -> None:
        async with serving(tmp_path, plain=plain, path="/t") as server:
            announced = read_announcement(tmp_path)
            assert announced is not None
            assert (announced.scheme, announced.port, announced.path) == ("ws" if plain else "wss", server.port, "/t")
            assert len(announced.pins) == (0 if plain else 1)
            assert server.port > 0
        assert f"INFO wstunnel.server listening 127.0.0.1:{server.port}" in lines.all()

    async def test_a_certificate_of_ones_own_is_not_pinned(self, tmp_path: Path) -> None:
        cert, key = tls.ensure_certificate(tmp_path, names=("localhost",))
        async with serving(tmp_path, plain=False, cert=cert, key=key):
            announced = read_announcement(tmp_path)
            assert announced is not None
            assert (announced.scheme, announced.pins) == ("wss", ())

    async def test_a_second_one_with_the_same_state_warns_of_the_first(self, tmp_path: Path, lines: LogLines) -> None:
        def warned() -> list[str]:
            return [line for line in lines.all() if "another server runs with this state directory" in line]

        async with serving(tmp_path) as first:
            assert not warned()
            async with serving(tmp_path) as second:
                (line,) = warned()
                assert line.startswith("WARNING ") and f'other="pid {os.getpid()}, port {first.port}"' in line
                announced = read_announcement(tmp_path)
                assert announced is not None and announced.port == second.port
        before = descriptors()
        async with serving(tmp_path):
            assert len(warned()) == 1, "both are gone"
        assert descriptors() == before

    async def test_the_next_one_may_start_while_connections_of_the_last_end(
        self, tmp_path: Path, lines: LogLines
    ) -> None:
        async with serving(tmp_path) as first:
            stranger = await Stranger.connect(first.port)
            assert await stranger.upgrade(first.token) == 101
            first.server._check_gone = lambda: None  # type: ignore[method-assign]  # its last connection does not end
            first.shutdown.set()
            await until(lambda: first.server._stopping)
            async with serving(tmp_path):
                pass
            await stranger.stream.aclose()
            first.server.gone.set()
        assert not [line for line in lines.all() if "another server" in line]

    @pytest.mark.parametrize(("begins", "ends", "warning"), [
        (-10, -1, "expired on"), (1, 90, "is valid from"), (-80, 13.5, "expires in 13 days, on"), (-80, 15, None),
    ])  # fmt: skip
    async def test_the_dates_of_a_certificate_are_warned_of(
        self, tmp_path: Path, lines: LogLines, *, begins: int, ends: float, warning: str | None
    ) -> None:
        now = datetime.now(UTC)
        made = trustme.CA().issue_cert(
            "localhost", not_before=now + timedelta(days=begins), not_after=now + timedelta(days=ends)
        )
        made.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
        (tmp_path / "both.pem").chmod(0o600)
        async with serving(tmp_path, plain=False, cert=tmp_path / "both.pem", key=tmp_path / "both.pem"):
            pass
        warned = [line for line in lines.all() if line.startswith("WARNING ") and "the certificate" in line]
        assert len(warned) == (warning is not None)
        assert warning is None or f"the certificate {warning}" in warned[0]

    async def test_all_addresses_unless_told(self, tmp_path: Path) -> None:
        async with serving(tmp_path, bind=()) as server:
            assert server.addresses == [f"0.0.0.0:{server.port}", f"[::]:{server.port}"]
            with trio.fail_after(20):
                stream = await trio.open_tcp_stream("::1", server.port)
                await stream.aclose()

    @pytest.mark.parametrize(("bind", "plain", "warned"), [
        (("127.0.0.1", "::1"), True, 0), (("0.0.0.0",), True, 1), (("0.0.0.0",), False, 0),
    ])  # fmt: skip
    async def test_plain_where_others_reach_it_is_warned_of(
        self, tmp_path: Path, lines: LogLines, bind: tuple[str, ...], plain: bool, warned: int
    ) -> None:
        async with serving(tmp_path, plain=plain, bind=bind):
            pass
        assert len([line for line in lines.all() if "tokens travel in the clear" in line]) == warned

    @pytest.mark.parametrize("default", [True, False])
    async def test_a_server_without_users_says_how_to_make_one(
        self, tmp_path: Path, lines: LogLines, default: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("STATE_DIRECTORY", raising=False)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        directory = tmp_path / ("wstunnel" if default else "other")
        directory.mkdir()
        shutdown = trio.Event()
        shutdown.set()
        config = ServerConfig(port=0, bind=("127.0.0.1",), plain=True, state_dir=directory)
        await server_module.run(config, shutdown=shutdown)
        (line,) = [line for line in lines.all() if "no users yet" in line]
        flag = "" if default else f" --state-dir {directory}"
        assert f"`wstunnel invite{flag}` makes one" in line

    async def test_a_port_in_use_leaves_nothing_open_and_announces_nothing(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            config = ServerConfig(port=taken.getsockname()[1], bind=("127.0.0.1",), plain=True, state_dir=tmp_path)
            before = descriptors()
            with pytest.raises(LocalError, match="the port is in use"):
                await server_module.run(config, shutdown=trio.Event())
            assert descriptors() == before
        assert read_announcement(tmp_path) is None

    async def test_a_key_that_cannot_be_read_leaves_nothing_open(self, tmp_path: Path) -> None:
        config = ServerConfig(
            port=0, bind=("127.0.0.1",), cert=tmp_path / "no.pem", key=tmp_path / "no.key", state_dir=tmp_path
        )
        before = descriptors()
        with pytest.raises(LocalError, match=r"no\.(pem|key)"):
            await server_module.run(config, shutdown=trio.Event())
        assert descriptors() == before

    async def test_it_listens_only_once_everything_else_is_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[str] = []
        for name in ("bind_all", "activate"):
            real = getattr(tcp, name)
            monkeypatch.setattr(
                tcp,
                name,
                lambda *a, name=name, real=real, **k: events.append(name) or real(*a, **k),  # type: ignore[func-returns-value]
            )
        certificate, announce = tls.ensure_certificate, server_module.write_announcement
        monkeypatch.setattr(
            tls, "ensure_certificate", lambda *a, **k: events.append("certificate") or certificate(*a, **k)
        )
        monkeypatch.setattr(
            server_module, "write_announcement", lambda *a: events.append("announcement") or announce(*a)
        )
        async with serving(tmp_path, plain=False):
            assert events == ["bind_all", "certificate", "announcement", "activate"]


class TestEnd:
    async def test_streams_links_and_strangers_all_end(self, tmp_path: Path, lines: LogLines) -> None:
        async with targets() as egress:
            async with serving(tmp_path) as server:
                port = await egress.echo()
                busy, idle, silent, stranger = [await Stranger.connect(server.port) for _ in range(4)]
                for one in (busy, idle, silent):
                    assert await one.upgrade(server.token) == 101
                await idle.send(text(hello("control")))
                await busy.send(text(hello()) + text(opening(1, target=f"tcp:127.0.0.1:{port}")) + data(b"x"))
                while busy.data != b"x":
                    await busy.receive()
                await until(lambda: len(server.server._greeting) == 1 and len(server.server._handshakes) == 1)
                server.shutdown.set()
                for one in (busy, idle, silent):
                    while one.closed is None:
                        assert await one.receive()
                    assert one.closed == (1001, "the server is stopping")
                    await one.send(encode_frame(Opcode.CLOSE, b"\x03\xe9", key=bytes(4)))
                for one in (busy, idle, silent, stranger):
                    assert not await one.receive()
                    await one.close()
                await server.server.gone.wait()
            await until(lambda: egress.resets == 1)
            assert egress.ends == 0
        assert [line["reason"] for line in lines("stream ended")] == ["shutdown"]

    async def test_peers_that_do_not_answer_hold_it_two_seconds(
        self, tmp_path: Path, mock_clock: MockClock, nursery: trio.Nursery
    ) -> None:
        token = invite(tmp_path)
        shutdown, done = trio.Event(), trio.Event()
        config = ServerConfig(port=0, bind=("127.0.0.1",), plain=True, state_dir=tmp_path)

        async def run(task_status: trio.TaskStatus[list[str]]) -> None:
            await server_module.run(config, shutdown=shutdown, task_status=task_status)
            done.set()

        (address,) = await nursery.start(run)
        mute = await Stranger.connect(int(address.rsplit(":", 1)[1]))
        assert await mute.upgrade(token) == 101
        shutdown.set()
        await wait_all_tasks_blocked(0.05)
        assert not done.is_set()
        mock_clock.jump(2 * limits.LINGER_SECONDS)
        await wait_all_tasks_blocked(0.05)
        assert done.is_set()
        await mute.close()

    async def test_nobody_is_welcomed_any_more(self, make_world: Make) -> None:
        world = make_world()
        peer = Peer(world)
        late = Peer(world)
        await world.settle()
        world.server._stopping = True
        assert await late.send(hello()) == []
        assert late.closed == (1001, "the server is stopping")
        assert not world.server.gone.is_set()
        for one in (late, peer):
            one.near.close()
        await world.settle()
        assert world.server.gone.is_set()

    async def test_cancelling_leaves_no_descriptor(self, tmp_path: Path) -> None:
        async with targets() as egress:
            port = await egress.echo()
            before = descriptors()
            held: list[Stranger] = []
            with trio.CancelScope() as scope:
                async with serving(tmp_path) as server:
                    for number in range(3):
                        stranger = await Stranger.connect(server.port)
                        held.append(stranger)
                        await stranger.upgrade(server.token)
                        await stranger.send(text(hello()) + text(opening(number, target=f"tcp:127.0.0.1:{port}")))
                    held.append(await Stranger.connect(server.port))
                    await until(lambda: egress.accepted == 3 and server.server._handshakes)
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            for stranger in held:
                await stranger.close()
            await until(lambda: descriptors() == before)
