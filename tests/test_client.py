"""client.py: the pool of links, the back-off, applications' connections; in memory where time is the point."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.roles import (  # lines, make_world and raises are fixtures
    LogLines,
    World,
    application,
    connecting,
    descriptors,
    exchange,
    forwards,
    free_port,
    lines,
    make_world,
    raises,
    ready,
    reset_code,
    serving,
    targets,
    until,
)
from wstunnel import client as client_module
from wstunnel import limits
from wstunnel.absence import WAITING_RETRY_SECONDS
from wstunnel.auth import LoginUrl, Token
from wstunnel.config import ClientConfig
from wstunnel.endpoints import tcp
from wstunnel.errors import (
    LocalError,
    NetworkError,
    ProtocolError,
    ServerRefusedError,
    StreamError,
    TrustError,
    UsageError,
)
from wstunnel.forwards import parse_dynamic
from wstunnel.pool import IDLE_LINKS_MAX, SURPLUS_SECONDS
from wstunnel.wire.frames import encode_close
from wstunnel.wire.messages import VERSION, Bye, Hello, Welcome, decode
from wstunnel.wire.protocol import LinkProtocol

__all__ = ["lines", "make_world", "raises"]

Make = Callable[..., World]
AWAY = NetworkError("tcp", "cannot connect to 127.0.0.1:8080: refused")


def messages(*writes: bytes) -> list[str]:
    """The types of the messages in what a client wrote, `data` for binary frames."""
    seen: list[str] = []
    position = 0
    data = b"".join(writes)
    while position < len(data):
        opcode, size = data[position] & 15, data[position + 1] & 127
        position += 2
        if size == 126:
            size = int.from_bytes(data[position : position + 2], "big")
            position += 2
        key, masked = data[position : position + 4], data[position + 4 : position + 4 + size]
        position += 4 + size
        payload = bytes(byte ^ key[i % 4] for i, byte in enumerate(masked))
        seen.append(
            type(decode(payload)).__name__.lower() if opcode == 1 else {2: "data", 8: "close", 9: "ping"}[opcode]
        )
    return seen


class TestOneRoundTrip:
    """With a warm link the target's answer to an application's first bytes is one round trip away."""

    async def warm(self, make_world: Make) -> World:
        world = make_world(idle_links=2)
        world.nursery.start_soon(world.session.keep_links)
        await world.settle()
        assert world.idle == 2
        return world

    async def test_half_a_trip_there_and_half_a_trip_back(self, make_world: Make) -> None:
        world = await self.warm(make_world)
        far = world.connect(b"ping")
        world.client_reactor.turn_all()
        assert world.move()  # the one trip there
        world.server_reactor.turn_all()
        await wait_all_tasks_blocked()  # the dial
        assert world.dialled == ["tcp:db:5432"]
        world.server_reactor.turn_all()
        (target,) = world.targets
        assert bytes(target.incoming.sent) == b"ping"
        target.send(b"pong")
        target.outgoing.move(4)
        world.server_reactor.turn_all()
        world.move()  # the one trip back
        world.client_reactor.turn_all()
        assert bytes(far.incoming.sent) == b"pong"

    async def test_open_and_early_data_go_out_in_one_write(self, make_world: Make) -> None:
        world = await self.warm(make_world)
        link = list(world.session.ingress.idle)[-1]
        sock: Any = link.sock
        sock.writes.clear()
        world.connect(b"early")
        # Nothing was awaited.
        world.client_reactor.turn_all()
        assert [messages(write) for write in sock.writes] == [["open", "data"]]

    async def test_open_does_not_wait_for_early_data(self, make_world: Make) -> None:
        world = await self.warm(make_world)
        sock: Any = list(world.session.ingress.idle)[-1].sock
        sock.writes.clear()
        world.connect()
        world.client_reactor.turn_all()
        assert [messages(write) for write in sock.writes] == [["open"]]

    async def test_a_link_dialled_for_a_waiting_connection_opens_without_its_welcome(self, make_world: Make) -> None:
        world = await self.warm(make_world)
        world.dialler.greets = False
        for _ in range(3):
            world.connect(b"early")
        await wait_all_tasks_blocked()
        world.client_reactor.turn_all()
        dialled = [[messages(write) for write in near.writes] for near, _ in world.dialler.ends[3:]]
        (opened,) = [writes for writes in dialled if "open" in writes[0]]
        assert opened == [["hello", "open", "data"]]


class TestWarmLinks:
    async def test_all_are_idle_within_a_second(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=limits.IDLE_LINKS)
        world.dialler.seconds = 0.2
        world.run()
        await trio.sleep(1)
        assert world.idle >= limits.IDLE_LINKS
        assert world.session._control is not None
        assert world.dialler.most <= limits.DIALS_AT_ONCE

    async def test_the_first_goes_alone_so_that_a_refusal_is_one(
        self, make_world: Make, autojump_clock: MockClock, raises: Any
    ) -> None:
        world = make_world(idle_links=12)
        world.dialler.error = ServerRefusedError("the server refused the token (401)")
        with raises(ServerRefusedError, "refused the token"):
            await world.session.keep_links()
        assert len(world.dialler.begun) == 1

    async def test_they_are_refilled_as_they_are_taken(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=4)
        world.run()
        await trio.sleep(1)
        assert world.idle == 4
        for _ in range(3):
            world.connect()
        assert world.idle == 1
        await trio.sleep(0.1)
        assert world.idle == 4
        assert len(world.session.links) == 4 + 3 + 1

    async def test_a_link_is_used_again_after_its_stream(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=1)
        world.run()
        await trio.sleep(1)
        (link,) = world.session.ingress.idle
        for n in (1, 2, 3):
            before = len(world.session.links)
            del world.session.ingress.idle[link]
            world.session.ingress.idle[link] = None  # on top
            far = world.connect(b"x")
            assert link not in world.session.ingress.idle
            await trio.sleep(0.1)
            world.targets[-1].shutdown(socket.SHUT_WR)
            far.shutdown(socket.SHUT_WR)
            await trio.sleep(0.1)
            assert link in world.session.ingress.idle
            assert link.protocol.n == n
            assert len(world.session.links) <= before + 1
        assert len(world.dialled) == 3
        assert not world.session.streams

    async def test_the_recent_peak_asks_for_more_up_to_64(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=2)
        world.run()
        await trio.sleep(1.5)
        for _ in range(100):
            world.connect()
        await trio.sleep(1.5)
        assert world.idle == IDLE_LINKS_MAX
        assert len(world.dialled) == 100

    async def test_surplus_links_close_after_a_minute(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=2)
        world.run()
        await trio.sleep(1.5)
        ends = [world.connect() for _ in range(20)]
        await trio.sleep(1.5)
        for end in ends:
            end.shutdown(socket.SHUT_WR)
        for target in world.targets:
            target.shutdown(socket.SHUT_WR)
        await trio.sleep(1)
        assert world.idle >= 38
        # The peak has decayed, and a minute is not over.
        await trio.sleep(SURPLUS_SECONDS - 5)
        assert world.idle >= 38
        await trio.sleep(10)
        assert world.idle == 2
        await trio.sleep(30)
        assert (world.idle, len(world.session.links)) == (2, 3)
        assert world.session._control is not None

    async def test_a_control_link_lost_beside_a_dial_is_replaced(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(idle_links=2)
        world.run()
        await trio.sleep(5)
        control = world.session._control
        assert control is not None
        world.dialler.seconds = 0.2
        world.connect()  # a forward link is being dialled
        await trio.sleep(0.1)
        assert world.dialler.under_way == 1
        control.lose("cut")
        await trio.sleep(1)
        assert world.session._control is not None
        assert world.idle == 2

    async def test_the_server_may_advise_fewer(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=5)
        world.run()
        await trio.sleep(1)
        link = world.session._control
        assert link is not None
        welcome = Welcome(version=VERSION, server="s" * 22, boot="b" * 22, idle_links=3)
        world.session.message(link, welcome)
        assert world.session.ingress.demand.wanted() == 3
        world.session.message(link, Welcome(version=VERSION, server="s" * 22, boot="b" * 22, idle_links=9))
        assert world.session.ingress.demand.wanted() == 5

    async def test_an_unexpected_message_closes_its_link_only(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(idle_links=2)
        world.run()
        await trio.sleep(2)
        link, other = world.session.ingress.idle
        for server_link in next(iter(world.server._sessions.values())).links:
            if server_link.sock.peer is link.sock:
                server_link.send(Hello(version=VERSION, session="s" * 22, role="forward"))
        await trio.sleep(0.2)
        assert link not in world.session.links
        assert other in world.session.links
        with pytest.raises(ProtocolError, match="bye is not expected here"):
            world.session.message(other, Bye())

    async def test_a_closing_link_is_given_to_nobody(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=2)
        world.run()
        await trio.sleep(2)
        # The server's close frame has come and its end of TCP has not: until then the link is not lost.
        link = list(world.session.ingress.idle)[-1]
        assert link.sock is not None
        far: Any = link.sock.peer  # type: ignore[attr-defined]
        link._process(encode_close(1001, "going"))
        far.outgoing.room = 0
        end = world.connect(b"x")
        await trio.sleep(0.2)
        assert not end.reset_by_peer
        assert world.dialled == ["tcp:db:5432"]

    async def test_a_link_that_came_with_its_close_is_given_to_nobody(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world(idle_links=1)
        world.dialler.greets = False
        world.dialler.leftover = encode_close(1001, "full")
        world.run()
        world.connect(b"x")
        await trio.sleep(1.05)
        assert len(world.session.ingress.waiting) == 1
        world.dialler.leftover = b""
        world.dialler.greets = True
        await trio.sleep(30 if world.session._absence.retry_at > trio.current_time() + 5 else 5)
        assert world.dialled == ["tcp:db:5432"]

    async def test_bytes_behind_the_head_are_handled_before_the_link_is_used(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(idle_links=1)
        welcome = LinkProtocol("server")
        welcome.send(Welcome(version=VERSION, server="s" * 22, boot="b" * 22))
        world.dialler.greets = False
        world.dialler.leftover = b"".join(welcome.pull(1000, 0.0, 0.0))  # type: ignore[arg-type]
        world.run()
        await trio.sleep(0.5)
        assert world.idle == 1
        assert next(iter(world.session.ingress.idle)).protocol.greeted


class TestBackoff:
    async def test_doubles_with_full_jitter_up_to_its_ceiling(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        draws = iter([0.5, 1.0, 0.25, *[1.0] * 20])
        world = make_world(random=lambda: next(draws))
        world.dialler.error = AWAY
        world.run()
        await trio.sleep(60)
        begun = world.dialler.begun
        delays = [round(later - earlier, 6) for earlier, later in itertools.pairwise(begun)]
        assert delays[:9] == [0.1, 0.4, 0.2, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]

    async def test_starts_over_once_the_server_is_back(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world()
        world.dialler.error = AWAY
        world.run()
        await trio.sleep(10)
        world.dialler.error = None
        await trio.sleep(15)
        assert world.idle == 2
        world.dialler.error = AWAY
        for link in list(world.session.links):
            link.lose("cut")
        world.dialler.begun.clear()
        await trio.sleep(1)
        begun = world.dialler.begun
        # All dials at once fail at once, then one goes after the first delay.
        later = [round(at - begun[0], 3) for at in begun if at > begun[0]]
        assert later[:2] == [0.2, 0.6]

    async def test_dials_that_fail_together_cost_one_step(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=12)
        world.run()
        await trio.sleep(2)
        world.dialler.error = AWAY
        world.dialler.seconds = 0.05
        for link in list(world.session.links):
            link.lose("cut")
        world.dialler.begun.clear()
        await trio.sleep(0.01)
        assert len(world.dialler.begun) == limits.DIALS_AT_ONCE
        await trio.sleep(0.5)
        assert world.session._absence._backoff._ceiling == pytest.approx(4 * limits.BACKOFF_FIRST_SECONDS)
        assert len(world.dialler.begun) == limits.DIALS_AT_ONCE + 1  # the next after 0.05 + 0.2 s, then after 0.4 s

    async def test_one_dial_at_a_time_finds_out_whether_the_server_is_back(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(idle_links=12)
        world.dialler.error = AWAY
        world.dialler.seconds = 3
        world.run()
        await trio.sleep(60)
        assert world.dialler.most == 1
        # A link that was accepted and not yet welcomed: nothing else is dialled meanwhile.
        world.dialler.error = None
        world.dialler.greets = False
        world.dialler.seconds = 0.1
        await trio.sleep(15)
        count = len(world.dialler.begun)
        await trio.sleep(5)
        assert len(world.dialler.begun) == count
        # Without a welcome it is given up, and the next one comes.
        world.dialler.greets = True
        await trio.sleep(35)
        assert world.idle == 12

    async def test_a_server_that_closes_young_links_is_not_stormed(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(idle_links=12)
        world.dialler.greets = False

        async def close_all() -> None:
            while True:
                for _near, far in world.dialler.ends:
                    far.shutdown(socket.SHUT_WR) if not far.outgoing.ended else None
                await trio.sleep(0.01)

        world.nursery.start_soon(close_all)
        world.run()
        await trio.sleep(10)
        assert 3 <= len(world.dialler.begun) <= 10

    async def test_while_an_application_waits_the_pauses_are_two_seconds_at_most(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        """It waits for 10 s: a back-off of 15 would be its end."""
        world = make_world()
        world.dialler.error = AWAY
        world.run()
        await trio.sleep(35)
        begun = world.dialler.begun
        assert begun[-1] - begun[-2] > 8, "nobody waits"
        await trio.sleep(begun[-1] + 1 - trio.current_time() if begun[-1] + 1 > trio.current_time() else 0)
        count = len(begun)
        world.connect(b"x")
        waited = trio.current_time()
        await trio.sleep(9)
        assert begun[count] - waited <= WAITING_RETRY_SECONDS + 0.1
        gaps = [later - earlier for earlier, later in itertools.pairwise(begun[count:])]
        assert len(gaps) >= 3 and max(gaps) <= WAITING_RETRY_SECONDS + 0.1
        world.dialler.error = None
        await trio.sleep(WAITING_RETRY_SECONDS)
        await trio.sleep(30)
        assert world.idle == 2

    async def test_after_links_that_died_young_only_needed_ones_are_dialled_until_one_has_lived(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(idle_links=12)
        world.run()
        await trio.sleep(2)
        assert world.session._absence.settled
        for link in list(world.session.links):
            world.cut(link)
        await trio.sleep(0.05)
        for link in list(world.session.links):  # young ones
            world.cut(link)
        world.dialler.begun.clear()
        await trio.sleep(0.6)
        assert not world.session._absence.settled
        assert len(world.dialler.begun) <= 2, "a control link, and nobody waits"
        world.connect(b"x")
        await trio.sleep(0.1)
        assert world.dialled == ["tcp:db:5432"]
        await trio.sleep(2)
        assert world.session._absence.settled and world.idle == 12

    async def test_never_more_than_8_dials_at_once(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=40)
        world.dialler.seconds = 0.1
        world.run()
        for _ in range(30):
            world.connect()
        await trio.sleep(3)
        assert world.dialler.most == limits.DIALS_AT_ONCE
        assert world.idle >= 40


class TestWaiting:
    async def test_a_connection_waits_ten_seconds_for_a_link_then_is_reset(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world()
        world.dialler.error = AWAY
        world.run()
        await trio.sleep(3.3)
        first = world.connect(b"x")
        await trio.sleep(2)
        second = world.connect(b"x")
        await trio.sleep(limits.OPEN_WAIT_SECONDS - 2.1)
        assert not first.reset_by_peer
        await trio.sleep(0.2)
        assert (first.reset_by_peer, second.reset_by_peer) == (True, False)
        await trio.sleep(2)
        assert second.reset_by_peer
        said = lines(f"connection reset: no link to the other end in time: {AWAY}")
        assert [line["target"] for line in said] == ["tcp:db:5432"] * 2
        assert said[0]["peer"].startswith("192.0.2.1:")

    async def test_those_who_wait_are_served_first_come_first_served(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world()
        world.dialler.error = AWAY
        world.run()
        await trio.sleep(1)
        for port in (1, 2, 3):
            world.connect(b"x", spec=f"{port}:db:{port}")
        await trio.sleep(0.5)
        world.dialler.error = None
        await trio.sleep(5)
        assert [stream.target for stream in world.session.streams.values()] == ["tcp:db:1", "tcp:db:2", "tcp:db:3"]

    async def test_too_many_are_reset_at_once(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world()
        world.session.most_streams = 3
        world.run()
        await trio.sleep(1)
        world.connect()
        world.connect()
        await trio.sleep(0.5)
        world.dialler.error = AWAY
        for link in list(world.session.ingress.idle):
            link.lose("cut")
        waiting = world.connect()
        refused = world.connect()
        assert (waiting.reset_by_peer, refused.reset_by_peer) == (False, True)
        assert len(lines("connection reset: too many streams or too much memory held")) == 1

    async def test_at_three_quarters_of_the_budget_they_are_reset(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world()
        world.run()
        await trio.sleep(1)
        budget = world.session.principal.budget
        budget.charge(budget.capacity * 3 // 4 + 1)
        assert world.connect().reset_by_peer
        budget.charge(-(budget.capacity * 3 // 4 + 1))
        assert not world.connect().reset_by_peer

    @pytest.mark.parametrize(
        "code", ["refused", "unreachable", "timeout", "name-not-found", "forbidden", "limit", "internal"]
    )
    async def test_a_refused_target_resets_at_once_and_is_told_apart(
        self, make_world: Make, lines: LogLines, code: str
    ) -> None:
        world = make_world()
        world.nursery.start_soon(world.session.keep_links)
        await world.settle()
        world.refusal = StreamError(code, f"cannot connect: {code}")
        far = world.connect(b"early")
        await world.settle()
        assert far.reset_by_peer
        (line,) = lines("stream refused", "client")
        assert (line["reason"], line["target"]) == (code, "tcp:db:5432")
        assert not lines("stream opened")
        assert not lines("stream ended")
        assert not world.session.streams
        assert world.idle == len(world.session.links) - 1  # the link is used again


class TestStopping:
    async def test_nothing_is_dialled_any_more(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=12)
        world.run()
        await trio.sleep(2)
        count = len(world.dialler.begun)
        world.session.stop()
        await world.session.gone.wait()
        await trio.sleep(5)
        assert len(world.dialler.begun) == count
        assert not world.session.links
        assert not world.server._sessions

    async def test_a_dial_that_ends_then_is_given_up(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(idle_links=2)
        world.dialler.seconds = 0.3
        world.run()
        await trio.sleep(0.4)
        assert world.dialler.under_way == 2
        world.session.stop()
        await trio.sleep(1)
        assert world.dialler.under_way == 0
        assert not world.session.links
        assert world.session.gone.is_set()
        assert all(near.closed for near, _ in world.dialler.ends)

    async def test_a_failure_while_stopping_is_nobodys_concern(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world(idle_links=2)
        world.run()
        await trio.sleep(2)
        world.session.stop()
        await trio.sleep(2)
        assert [line for line in lines.all() if "WARNING" in line] == []

    async def test_bye_goes_out_on_the_control_link(self, make_world: Make) -> None:
        world = make_world()
        world.nursery.start_soon(world.session.keep_links)
        await world.settle()
        control: Any = world.session._control
        sock = control.sock
        sock.writes.clear()
        world.session.stop()
        assert messages(*sock.writes) == ["bye", "close"]

    async def test_those_who_wait_are_reset(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world()
        world.dialler.error = AWAY
        world.run()
        await trio.sleep(1)
        far = world.connect()
        world.session.stop()
        assert far.reset_by_peer

    async def test_who_comes_then_is_reset(self, make_world: Make) -> None:
        world = make_world()
        world.nursery.start_soon(world.session.keep_links)
        await world.settle()
        world.session.stop()
        assert world.connect().reset_by_peer


class TestMessagesOfTheLog:
    async def test_away_is_said_once_and_back_once(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world()
        world.dialler.error = AWAY
        world.run()
        await trio.sleep(40)
        (line,) = lines("cannot reach the server, trying again")
        assert line == {"layer": "tcp", "reason": str(AWAY)}
        world.dialler.error = None
        await trio.sleep(20)
        assert len(lines("connected")) == 1
        world.dialler.error = AWAY
        for link in list(world.session.links):
            link.lose("cut")
        await trio.sleep(40)
        assert len(lines("lost the server, trying again")) == 1
        world.dialler.error = None
        await trio.sleep(20)
        assert len(lines("connected again")) == 1
        assert len(lines("connected")) == 1
        assert len(lines("cannot reach the server, trying again")) == 1

    async def test_a_link_that_is_replaced_in_time_is_no_absence(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world()
        world.run()
        await trio.sleep(5)
        for link in list(world.session.links):
            link.lose("cut")
        await trio.sleep(5)
        assert world.idle == 2
        assert not lines("lost the server, trying again")
        assert not lines("connected again")

    async def test_a_server_with_links_is_not_lost_when_another_cannot_be_dialled(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world()
        world.run()
        await trio.sleep(5)
        world.dialler.error = error = NetworkError("tcp", "cannot connect: too many open files")
        links = list(world.session.links)
        links[-1].lose("cut")
        await trio.sleep(40)
        assert lines("cannot dial another link, trying again") == [{"layer": "tcp", "reason": str(error)}]
        world.dialler.error = None
        await trio.sleep(20)
        assert world.idle == 2
        assert not lines("lost the server, trying again") and not lines("connected again")
        world.dialler.error = AWAY
        for link in list(world.session.links)[1:]:
            link.lose("cut")
        await trio.sleep(5)
        assert not lines("lost the server, trying again")
        for link in list(world.session.links):
            link.lose("cut")
        await trio.sleep(40)
        assert len(lines("lost the server, trying again")) == 1, "the last one is gone"
        assert len(lines("cannot dial another link, trying again")) == 1


class TestTrust:
    async def test_at_first_it_ends_the_client(self, make_world: Make, autojump_clock: MockClock, raises: Any) -> None:
        world = make_world()
        world.dialler.error = TrustError("another key")
        with raises(TrustError, "another key"):
            await world.session.keep_links()

    async def test_later_it_is_an_absence(self, make_world: Make, autojump_clock: MockClock, lines: LogLines) -> None:
        world = make_world()
        world.run()
        await trio.sleep(2)
        world.dialler.error = TrustError("a captive portal")
        for link in list(world.session.links):
            link.lose("cut")
        await trio.sleep(5)
        assert lines("lost the server, trying again") == [{"layer": "tls", "reason": "a captive portal"}]
        world.dialler.error = None
        await trio.sleep(20)
        assert world.idle == 2


class TestVersion:
    async def test_a_welcome_of_another_version_ends_the_client(
        self, make_world: Make, autojump_clock: MockClock, raises: Any
    ) -> None:
        world = make_world()
        protocol = LinkProtocol("server")
        protocol.send(Welcome(version=VERSION + 1, server="s" * 22, boot="b" * 22))
        world.dialler.greets = False
        world.dialler.leftover = b"".join(protocol.pull(1000, 0.0, 0.0))  # type: ignore[arg-type]
        with raises(ServerRefusedError, "update the older one") as caught:
            await world.session.keep_links()
        assert caught.error.exit_code == 3
        assert str(caught.error).startswith(f"the server speaks version {VERSION + 1} of the tunnel protocol")


# --- the whole role, over loopback ----------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["plain", "tls"])
def plain(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class TestRun:
    async def test_bytes_both_ways(self, tmp_path: Path, plain: bool, lines: LogLines) -> None:
        async with targets() as egress, serving(tmp_path, plain=plain) as server:
            port = await egress.echo()
            async with connecting(server.url, f"0:127.0.0.1:{port}") as client:
                assert await exchange(client.ports[0], b"x" * 300_000) == b"x" * 300_000
                await until(lambda: lines("stream ended", "client") and lines("stream ended", "server"))
        for role in ("client", "server"):
            (opened,) = lines("stream opened", role)
            (ended,) = lines("stream ended", role)
            assert (opened["target"], opened["address"]) == (f"tcp:127.0.0.1:{port}", f"127.0.0.1:{port}")
            assert opened["stream"] == ended["stream"]
            assert (ended["sent"], ended["received"]) == (300_000, 300_000)
            assert ended["reason"] == "finished"
            assert ended["seconds"] >= 0
            assert ended["principal"] == opened["principal"] == ("local" if role == "client" else "alice")
            assert ended["peer"] == opened["peer"]
            assert ended["peer"].startswith("127.0.0.1:")
        assert client.session.id not in "".join(lines.all())

    async def test_several_forwards_a_range_and_ipv6(self, tmp_path: Path, lines: LogLines) -> None:
        async with targets() as egress, serving(tmp_path) as server:
            four, six = await egress.echo(), await egress.echo("::1")
            low = free_port()
            specs = (f"0:127.0.0.1:{four}", f"[::1]:0:[::1]:{six}", f"{low}-{low}:127.0.0.1:{four}-{four}")
            async with connecting(server.url, *specs) as client:
                assert await exchange(client.ports[0], b"one") == b"one"
                assert await exchange(client.ports[1], b"two", host="::1") == b"two"
                assert await exchange(low, b"three") == b"three"
        announced = [line for line in lines.all() if "wstunnel.client" in line and "listening" in line]
        assert announced == [
            f"INFO wstunnel.client listening 127.0.0.1:{client.ports[0]} -> tcp:127.0.0.1:{four}",
            f"INFO wstunnel.client listening [::1]:{client.ports[1]} -> tcp:[::1]:{six}",
            f"INFO wstunnel.client listening 127.0.0.1:{low} -> tcp:127.0.0.1:{four}",
        ]

    async def test_localhost_listens_on_both_with_one_port(self, tmp_path: Path) -> None:
        async with targets() as egress, serving(tmp_path) as server:
            port = await egress.echo()
            async with connecting(server.url, f"localhost:0:127.0.0.1:{port}") as client:
                assert [address.rsplit(":", 1)[0] for address in client.addresses] == ["127.0.0.1", "[::1]"]
                assert len(set(client.ports)) == 1
                assert await exchange(client.ports[1], b"x", host="::1") == b"x"

    async def test_server_away_at_the_start(self, tmp_path: Path, lines: LogLines) -> None:
        port = free_port()
        async with targets() as egress:
            target = await egress.echo()
            url = LoginUrl("ws", "127.0.0.1", port, "/", Token.new())
            async with connecting(url, f"0:127.0.0.1:{target}", idle_links=1) as client:
                await until(lambda: lines("cannot reach the server, trying again"))
                async with serving(tmp_path, port=port) as server:
                    # The client's own token, as if it had been invited before.
                    from wstunnel.auth import Users

                    assert url.token is not None
                    Users(server.state_dir).add_token("alice", url.token)
                    assert await exchange(client.ports[0], b"x") == b"x"
                    await ready(client)
                    client.shutdown.set()
        assert len(lines("cannot reach the server, trying again")) == 1
        assert len(lines("connected")) == 1

    async def test_server_restarted(self, tmp_path: Path, plain: bool, lines: LogLines) -> None:
        port = free_port()
        async with targets() as egress:
            target = await egress.echo()
            async with serving(tmp_path, port=port, plain=plain) as server:
                url = server.url
                async with trio.open_nursery() as nursery:
                    started = trio.Event()
                    stop = trio.Event()
                    clients: list[Any] = []

                    async def hold() -> None:
                        async with connecting(url, f"0:127.0.0.1:{target}") as client:
                            clients.append(client)
                            started.set()
                            await stop.wait()

                    nursery.start_soon(hold)
                    await started.wait()
                    await ready(clients[0])
                    assert await exchange(clients[0].ports[0]) == b"ping"
                    await until(
                        lambda: all(trio.current_time() - link.created > 1 for link in clients[0].session.links)
                    )
                    server.shutdown.set()
                    await until(lambda: lines("lost the server, trying again"))
                    async with serving(tmp_path, port=port, plain=plain) as second:
                        from wstunnel.auth import Users

                        assert url.token is not None
                        Users(second.state_dir).add_token("alice", url.token)
                        await until(lambda: lines("connected again"))
                        assert await exchange(clients[0].ports[0]) == b"ping"
                        stop.set()
        assert len(lines("connected again")) == 1

    async def test_wrong_token(self, tmp_path: Path, plain: bool, raises: Any, lines: LogLines) -> None:
        async with serving(tmp_path, plain=plain) as server:
            wrong = LoginUrl(server.url.scheme, "127.0.0.1", server.port, "/", Token.new(), server.url.pins)
            with raises(ServerRefusedError, "`wstunnel login`") as caught:
                async with connecting(wrong, "0:127.0.0.1:1"):
                    await trio.sleep_forever()
            assert caught.error.exit_code == 3
            assert not server.sessions()
            await until(lambda: lines("connection refused", "server"))
        assert [line["status"] for line in lines("connection refused", "server")] == [401]

    async def test_wrong_pin(self, tmp_path: Path, raises: Any, lines: LogLines) -> None:
        async with serving(tmp_path, plain=False) as server:
            url = LoginUrl("wss", "127.0.0.1", server.port, "/", server.url.token, (bytes(32),))
            with raises(TrustError, "the server's key is not the one in the login URL"):
                async with connecting(url, "0:127.0.0.1:1"):
                    await trio.sleep_forever()
            assert not server.sessions()

    async def test_pins_of_the_configuration_replace_the_urls(self, tmp_path: Path, raises: Any) -> None:
        async with serving(tmp_path, plain=False) as server:
            with raises(TrustError):
                async with connecting(server.url, "0:127.0.0.1:1", pins=(bytes(32),)):
                    await trio.sleep_forever()

    async def test_untrusted_certificate(self, tmp_path: Path, raises: Any) -> None:
        async with serving(tmp_path, plain=False) as server:
            url = LoginUrl("wss", "127.0.0.1", server.port, "/", server.url.token)
            with raises(TrustError, "did not prove who it is"):
                async with connecting(url, "0:127.0.0.1:1"):
                    await trio.sleep_forever()

    async def test_a_url_without_a_token(self, raises: Any) -> None:
        with raises(UsageError, "no token"):
            await client_module.run(
                ClientConfig(url=LoginUrl("ws", "127.0.0.1", 1), local_forwards=forwards("0:db:1")),
                shutdown=trio.Event(),
            )


class TestBinding:
    URL = LoginUrl("ws", "127.0.0.1", 1, "/", Token.new())

    async def run(self, *specs: str, **changes: Any) -> None:
        config = ClientConfig(url=self.URL, local_forwards=forwards(*specs), **changes)
        await client_module.run(config, shutdown=trio.Event())

    async def test_a_single_forward_that_cannot_bind_ends_it(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(LocalError, match=f"^cannot listen on 127.0.0.1:{port}: the port is in use"):
                await self.run(f"{port}:db:1")

    async def test_others_go_on_without_it(self, tmp_path: Path, lines: LogLines) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            async with targets() as egress, serving(tmp_path) as server:
                echo = await egress.echo()
                async with connecting(server.url, f"{port}:db:1", f"0:127.0.0.1:{echo}") as client:
                    assert len(client.addresses) == 1
                    assert await exchange(client.ports[0], b"x") == b"x"
        (line,) = [line for line in lines.all() if line.startswith("ERROR")]
        assert f"cannot listen on 127.0.0.1:{port}" in line

    async def test_unless_asked_to_give_up(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            before = descriptors()
            with pytest.raises(LocalError, match="in use"):
                await self.run("0:db:1", f"{port}:db:1", exit_on_forward_failure=True)
            assert descriptors() == before

    async def test_none_of_several(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(LocalError, match="none of the forwards could be set up"):
                await self.run(f"{port}:db:1", f"{port}:db:2")

    async def test_a_second_address_that_cannot_listen_leaves_nothing_open(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = tcp.activate

        def activate(listener: socket.socket) -> None:
            if listener.family == socket.AF_INET6:
                raise LocalError("in use since")
            real(listener)

        monkeypatch.setattr(tcp, "activate", activate)
        before = descriptors()
        with pytest.raises(LocalError, match="in use since"):
            await self.run("localhost:0:db:1")
        assert descriptors() == before

    async def test_an_unreadable_ca_is_said_before_anything_listens(self, tmp_path: Path) -> None:
        url = LoginUrl("wss", "127.0.0.1", 1, "/", Token.new())
        config = ClientConfig(url=url, local_forwards=forwards("0:db:1"), ca=tmp_path / "none.pem")
        with pytest.raises(LocalError, match=r"none\.pem"):
            await client_module.run(config, shutdown=trio.Event())


class TestApplicationsThatSayNothing:
    """At `-D` and `--http-proxy`, where connections are negotiated with first."""

    SOCKS = parse_dynamic("0", "socks")

    async def test_they_take_a_sixteenth_of_the_descriptors_at_most(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client_module.descriptors, "raise_limit", lambda: 2 * limits.HANDSHAKES_DIVISOR)
        async with serving(tmp_path) as server, connecting(server.url, local_forwards=(self.SOCKS,)) as client:
            silent = []
            for _ in range(3):
                silent.append(await application(client.ports[0]))
                await wait_all_tasks_blocked(0.01)
            with trio.fail_after(20):
                assert await silent[0].receive_some() == b""
            await silent[1].send_all(b"\x05\x01\x00")
            assert await silent[1].receive_some(2) == b"\x05\x00"
            for each in silent:
                await each.aclose()

    def test_links_take_their_part_at_most(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(client_module.descriptors, "raise_limit", lambda: 100)
        config = ClientConfig(url=LoginUrl("ws", "127.0.0.1", 1, "/", Token.new()))
        session, _ = client_module.make_session(config)
        assert session._most_links() == 46

    async def test_one_goes_when_no_descriptor_is_left(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        exhausted: list[Callable[[], None]] = []
        real = tcp.Listener

        def listener(sock: socket.socket, accepted: Any, given: Callable[[], None]) -> tcp.Listener:
            exhausted.append(given)
            return real(sock, accepted, given)

        async with serving(tmp_path) as server:
            monkeypatch.setattr(tcp, "Listener", listener)
            async with connecting(server.url, local_forwards=(self.SOCKS,)) as client:
                silent = await application(client.ports[0])
                await wait_all_tasks_blocked(0.01)
                exhausted[0]()
                with trio.fail_after(20):
                    assert await silent.receive_some() == b""
                await silent.aclose()


class TestRefusedTargets:
    async def test_each_is_told_apart_and_resets_the_connection(self, tmp_path: Path, lines: LogLines) -> None:
        closed = free_port()
        async with targets() as egress, serving(tmp_path) as server:
            echo = await egress.echo()
            specs = (
                f"0:127.0.0.1:{closed}", f"0:127.0.0.1:{server.port}", "0:169.254.169.254:80",
                "0:does-not-exist.invalid:80", f"0:127.0.0.1:{echo}",
            )  # fmt: skip
            async with connecting(server.url, *specs) as client:
                await ready(client)
                for port in client.ports[:4]:
                    async with await application(port) as stream:
                        assert await reset_code(stream) == "reset"
                assert await exchange(client.ports[4]) == b"ping"
                assert not client.session.streams
        refused = {line["target"]: line["reason"] for line in lines("stream refused", "client")}
        assert refused == {
            f"tcp:127.0.0.1:{closed}": "refused", f"tcp:127.0.0.1:{server.port}": "forbidden",
            "tcp:169.254.169.254:80": "forbidden", "tcp:does-not-exist.invalid:80": "name-not-found",
        }  # fmt: skip
        # What the policy says stays in the server's log.
        forbidden = [line for line in lines("stream refused", "server") if line["reason"] == "forbidden"]
        assert [line["target"] for line in forbidden] == [f"tcp:127.0.0.1:{server.port}", "tcp:169.254.169.254:80"]
        assert all(line["principal"] == "alice" and line["policy"] for line in forbidden)


class TestEnd:
    async def test_shutdown_with_streams_open(self, tmp_path: Path, plain: bool, lines: LogLines) -> None:
        async with targets() as egress, serving(tmp_path, plain=plain) as server:
            port = await egress.echo()
            async with connecting(server.url, f"0:127.0.0.1:{port}", idle_links=4) as client:
                streams = [await application(client.ports[0]) for _ in range(10)]
                for stream in streams:
                    await stream.send_all(b"x")
                    assert await stream.receive_some(1) == b"x"
                client.shutdown.set()
                for stream in streams:
                    assert await reset_code(stream) == "reset"
                    await stream.aclose()
            await until(lambda: not server.sessions())
            await until(lambda: egress.resets == 10)
            assert egress.ends == 0
            assert not server.server._greeting
        assert len(lines("client gone", "server")) == 1
        assert {line["reason"] for line in lines("stream ended", "client")} == {"shutdown"}

    async def test_shutdown_while_the_server_is_away(self) -> None:
        url = LoginUrl("ws", "127.0.0.1", free_port(), "/", Token.new())
        async with connecting(url, "0:127.0.0.1:1") as client:
            stream = await application(client.ports[0])
            await until(lambda: client.session.ingress.waiting)
            client.shutdown.set()
            assert await reset_code(stream) == "reset"
            await stream.aclose()

    async def test_a_server_that_does_not_answer_the_close_holds_it_two_seconds(
        self, mock_clock: MockClock, nursery: trio.Nursery
    ) -> None:
        mute = await nursery.start(
            lambda task_status: trio.serve_tcp(mute_server, 0, host="127.0.0.1", task_status=task_status)
        )
        url = LoginUrl("ws", "127.0.0.1", mute[0].socket.getsockname()[1], "/", Token.new())
        shutdown, done = trio.Event(), trio.Event()
        config = ClientConfig(url=url, local_forwards=forwards("0:127.0.0.1:1"), idle_links=1)

        async def run() -> None:
            await client_module.run(config, shutdown=shutdown)
            done.set()

        nursery.start_soon(run)
        await wait_all_tasks_blocked(0.1)
        shutdown.set()
        await wait_all_tasks_blocked(0.05)
        assert not done.is_set()
        mock_clock.jump(2 * limits.LINGER_SECONDS)
        await wait_all_tasks_blocked(0.05)
        assert done.is_set()
        nursery.cancel_scope.cancel()

    @pytest.mark.parametrize(("away", "window"), [(False, 300), (False, 0), (True, 300)])
    async def test_cancelling_leaves_no_descriptor(self, tmp_path: Path, away: bool, window: int) -> None:
        """Nobody said goodbye: the server keeps its ends of the streams for the window, the client keeps nothing."""
        async with targets() as egress, serving(tmp_path) as server:
            port = await egress.echo()
            url = server.url if not away else LoginUrl("ws", "127.0.0.1", free_port(), "/", Token.new())
            near: list[trio.SocketStream] = []
            before = descriptors()
            with trio.CancelScope() as scope:
                async with connecting(url, f"0:127.0.0.1:{port}", resume_window=window) as client:
                    near += [await application(client.ports[0]) for _ in range(5)]
                    if away:
                        await until(lambda: len(client.session.ingress.waiting) == 5)
                    else:
                        await until(
                            lambda: (
                                len(client.session.streams) == 5
                                and all(stream.state.opened for stream in client.session.streams.values())
                            )
                        )
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            for stream in near:
                await stream.aclose()
            await until(lambda: not server.links())
            if window and not away:
                (session,) = server.sessions()
                assert len(session._detached) == len(session.streams) == 5
                await until(lambda: descriptors() == before + 2 * 5)  # to the targets, which are in this process, too
                session.close(1000, "enough")
            await until(lambda: not server.sessions() and descriptors() == before)


async def mute_server(stream: trio.SocketStream) -> None:
    """Upgrades, welcomes, and then neither reads nor closes."""
    from tests.test_dialler import switching

    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += await stream.receive_some(65536)
    protocol = LinkProtocol("server")
    protocol.send(Welcome(version=VERSION, server="s" * 22, boot="b" * 22))
    await stream.send_all(switching(head) + b"".join(protocol.pull(1000, 0.0, 0.0)))  # type: ignore[arg-type]
    await trio.sleep_forever()


class TestNothingIsLeft:
    @pytest.mark.timeout(240)
    async def test_2000_connections_in_a_row(self, tmp_path: Path) -> None:
        async with targets() as egress, serving(tmp_path) as server:
            port = await egress.echo()
            async with connecting(server.url, f"0:127.0.0.1:{port}", idle_links=4) as client:
                await ready(client)
                for _ in range(20):
                    assert await exchange(client.ports[0]) == b"ping"
                await until(lambda: not client.session.streams and not server.sessions()[0].streams)
                # Warm: what follows may add links up to the peak that the pool allows, nothing else.
                tasks = trio.lowlevel.current_statistics().tasks_living
                base = descriptors() - 2 * len(client.session.links)
                for _ in range(1980):
                    assert await exchange(client.ports[0]) == b"ping"
                await until(
                    lambda: (
                        not client.session.streams
                        and not server.sessions()[0].streams
                        and trio.lowlevel.current_statistics().tasks_living <= tasks
                        and descriptors() - 2 * len(client.session.links) == base
                    )
                )
                (session,) = server.sessions()
                assert len(client.session.links) == len(session.links) <= IDLE_LINKS_MAX + 2
                assert egress.accepted == 2000
                assert not client.session.ingress.waiting
                assert not client.session._moved
                assert not client.session._half_closed
                assert client.session.principal.budget.held == session.principal.budget.held == 0
                assert len(session.principal.tombstones) <= len(session.links)
