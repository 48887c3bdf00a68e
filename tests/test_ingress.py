"""Streams that are wanted, and the idle links that carry them. Those of reverse forwards: tests/test_reverse.py."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.roles import LogLines, NamedSocket, World, lines, make_world  # lines and make_world are fixtures
from tests.test_resumption import left_nothing
from wstunnel import limits
from wstunnel.errors import NetworkError, StreamError
from wstunnel.ingress import Ingress, Wanted
from wstunnel.link import Link
from wstunnel.stream import Stream
from wstunnel.wire.messages import Drain

__all__ = ["lines", "make_world"]

Make = Callable[..., World]
AWAY = NetworkError("tcp", "cannot connect to 127.0.0.1:8080: refused")
TARGET = "tcp:db:5432"


class Asking:
    """A task that waits for `connect`."""

    def __init__(self, world: World, ingress: Ingress | None = None) -> None:
        self.stream: Stream | None = None
        self.error: StreamError | None = None
        self.scope = trio.CancelScope()
        world.nursery.start_soon(self._run, ingress or world.session.ingress)

    async def _run(self, ingress: Ingress) -> None:
        with self.scope:
            try:
                self.stream = await ingress.connect(TARGET, "192.0.2.1:5")
            except StreamError as error:
                self.error = error


def application(world: World, data: bytes = b"") -> tuple[NamedSocket, NamedSocket]:
    near, far = world.pair()
    far.send(data)
    far.outgoing.move(len(data))
    return near, far


class TestConnect:
    """For an application that is told the outcome before its bytes go anywhere."""

    async def test_the_stream_is_there_once_the_target_was_reached(self, make_world: Make) -> None:
        world = await make_world().warm()
        world.gate = trio.Event()
        asking = Asking(world)
        await world.settle()
        assert asking.stream is None and world.dialled == [TARGET]
        world.gate.set()
        await world.settle()
        stream = asking.stream
        assert stream is not None and stream.address == "10.0.0.5:5432" and stream.outcome is None
        near, far = application(world, b" and the rest")
        stream.begin(world.client_reactor, near, b"early")  # type: ignore[arg-type]
        await world.settle()
        assert world.read(world.targets[0]) == b"early and the rest"
        world.targets[0].send(b"back")
        await world.settle()
        assert world.read(far) == b"back"

    async def test_what_the_target_says_first_waits_for_the_application(self, make_world: Make) -> None:
        world = await make_world().warm()
        asking = Asking(world)
        await world.settle()
        world.targets[0].send(b"220 hello")
        world.targets[0].shutdown(socket.SHUT_WR)
        await world.settle()
        near, far = application(world)
        assert asking.stream is not None
        asking.stream.begin(world.client_reactor, near)  # type: ignore[arg-type]
        await world.settle()
        assert world.read(far) == b"220 hello" and far.incoming.end_arrived

    @pytest.mark.parametrize("code", ["refused", "forbidden", "name-not-found"])
    async def test_a_refusal_is_told(self, make_world: Make, code: str) -> None:
        world = await make_world().warm()
        world.refusal = StreamError(code, "no")
        asking = Asking(world)
        await world.settle()
        assert asking.error is not None and (asking.error.code, str(asking.error)) == (code, "no")
        left_nothing(world)

    async def test_no_link_in_time(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world()
        world.dialler.error = AWAY
        world.run()
        await trio.sleep(1)
        asking = Asking(world)
        await trio.sleep(limits.OPEN_WAIT_SECONDS - 0.1)
        assert asking.error is None
        await trio.sleep(0.2)
        assert asking.error is not None and asking.error.code == "unreachable"
        assert str(asking.error).startswith("no link to the other end in time")

    async def test_too_many(self, make_world: Make) -> None:
        world = await make_world().warm()
        world.session.most_streams = 0
        asking = Asking(world)
        await world.settle()
        assert asking.error is not None and asking.error.code == "limit"

    async def test_lost_on_the_way(self, make_world: Make) -> None:
        world = await make_world(resume_window=0).warm()
        world.gate = trio.Event()
        asking = Asking(world)
        await world.settle()
        world.cut(world.near_stream().link)  # type: ignore[arg-type]
        await world.settle()
        assert asking.error is not None and asking.error.code == "lost"

    async def test_a_cut_before_the_answer_makes_no_difference(self, make_world: Make) -> None:
        world = await make_world().warm()
        world.gate = trio.Event()
        asking = Asking(world)
        await world.settle()
        world.cut(world.near_stream().link)  # type: ignore[arg-type]
        await world.settle()
        world.gate.set()
        await world.settle()
        assert asking.stream is not None and asking.stream.link is not None
        assert world.dialled == [TARGET]

    async def test_it_is_stopped(self, make_world: Make) -> None:
        world = make_world()
        asking = Asking(world)
        await world.settle()
        world.session.ingress.stop()
        await world.settle()
        assert asking.error is not None and asking.error.code == "shutdown"
        left_nothing(world)


class TestGivenUp:
    """The application went away while it waited."""

    async def test_for_a_link(self, make_world: Make) -> None:
        world = make_world()
        asking = Asking(world)
        await world.settle()
        assert len(world.session.ingress.waiting) == world.session.principal.waiting == 1
        asking.scope.cancel()
        await world.settle()
        assert not world.session.ingress.waiting
        left_nothing(world)

    async def test_for_the_target(self, make_world: Make) -> None:
        world = await make_world().warm()
        world.gate = trio.Event()
        asking = Asking(world)
        await world.settle()
        asking.scope.cancel()
        await world.settle()
        left_nothing(world)
        assert not world.targets, "the dial was given up"

    async def test_for_a_link_that_another_session_has_meanwhile(self, make_world: Make) -> None:
        """A place was taken over, and what waited for it."""
        world = make_world()
        other = world.make_client()
        asking = Asking(world)
        await world.settle()
        (wanted,) = world.session.ingress.withdraw("")
        left_nothing(world)
        other.ingress.accepted(wanted)
        assert len(other.ingress.waiting) == other.principal.waiting == 1
        asking.scope.cancel()
        await world.settle()
        assert not other.ingress.waiting

    async def test_for_the_target_of_another_session(self, make_world: Make) -> None:
        world = make_world()
        other = world.make_client()
        world.gate = trio.Event()
        asking = Asking(world)
        await world.settle()
        (wanted,) = world.session.ingress.withdraw("")
        other.ingress.accepted(wanted)
        world.nursery.start_soon(other.keep_links)
        await world.settle()
        assert len(other.streams) == 1
        asking.scope.cancel()
        await world.settle()
        assert not other.streams


class TestCallbacks:
    async def test_of_a_stream(self, make_world: Make) -> None:
        world = await make_world().warm()
        said: list[tuple[str, object]] = []
        near, far = application(world, b"x")
        world.session.ingress.accepted(
            Wanted(
                TARGET,
                "192.0.2.1:5",
                near,  # type: ignore[arg-type]
                early=b"PROXY ",
                decided=lambda stream: said.append(("decided", stream.outcome)),
                ended=lambda stream: said.append(("ended", stream.outcome)),
                dropped=lambda code, _message: said.append(("dropped", code)),
            )
        )
        await world.settle()
        assert world.read(world.targets[0]) == b"PROXY x", "what is said first goes first"
        assert said == [("decided", None)]
        far.shutdown(socket.SHUT_WR)
        world.targets[0].shutdown(socket.SHUT_WR)
        await world.settle()
        assert said == [("decided", None), ("ended", ("finished", ""))]

    async def test_of_one_that_was_refused(self, make_world: Make) -> None:
        world = await make_world().warm()
        world.refusal = StreamError("refused", "no")
        said: list[tuple[str, object]] = []
        near, _far = application(world)
        world.session.ingress.accepted(
            Wanted(
                TARGET,
                "192.0.2.1:5",
                near,  # type: ignore[arg-type]
                decided=lambda stream: said.append(("decided", stream.outcome)),
                ended=lambda stream: said.append(("ended", stream.outcome)),
            )
        )
        await world.settle()
        assert said == [("decided", ("refused", "no")), ("ended", ("refused", "no"))]


class TestOrder:
    async def test_streams_to_be_opened_afresh_go_before_those_that_wait(self, make_world: Make) -> None:
        world = await make_world(reverse=["8080:web:80"], allow_listen=["*:*"]).warm()
        ingress = world.far_session.ingress
        links = list(ingress.idle)
        ingress.idle.clear()
        apps = [world.arrive(b"%d" % number) for number in range(3)]
        world.server_reactor.turn_all()
        assert len(ingress.waiting) == 3
        # Two of them had a link, and lost it with their `open`.
        lost = []
        for link in links[:2]:
            ingress.offer(link)
            world.server_reactor.turn_all()
        for link in links[:2]:
            stream = link.stream
            assert stream is not None
            link.sock.outgoing.sent.clear()  # type: ignore[union-attr]
            link.stream = stream.link = None
            stream.state.link_lost()
            world.far_session.stream_detached(stream)
            assert world.far_session.stream_unknown(stream)
            lost.append(stream)
        assert list(ingress.reopening) == lost
        assert ingress.offer(links[2])
        assert ingress.offer(links[3])
        assert (links[2].stream, links[3].stream) == tuple(lost), "in the order in which they were lost"
        assert len(ingress.waiting) == 1 and not any(app.reset_by_peer for app in apps)

    async def test_the_link_that_was_used_last_is_taken(self, make_world: Make) -> None:
        world = await make_world(idle_links=3).warm()
        last = list(world.session.ingress.idle)[-1]
        world.connect(b"x")
        assert world.near_stream().link is last

    async def test_links_that_may_take_none_are_passed_over(self, make_world: Make) -> None:
        world = await make_world(idle_links=3).warm()
        ingress = world.session.ingress
        first, second, third = ingress.idle
        third.close(1000, "surplus")
        ingress._owner.usable = lambda link: link is not second  # type: ignore[attr-defined]
        world.connect(b"x")
        assert world.near_stream().link is first and not ingress.idle

    async def test_links_of_a_server_that_is_going_are_not_used(self, make_world: Make) -> None:
        world = await make_world().warm()
        world.dialler.error = AWAY
        world.far_session._control.send(Drain(deadline=1))  # type: ignore[union-attr]
        await world.settle()
        world.connect(b"x")
        await world.settle()
        assert not world.dialled and len(world.session.ingress.waiting) == 1


class TestWithdraw:
    async def test_only_what_waits_for_that_forward(self, make_world: Make) -> None:
        world = make_world()
        ingress = world.session.ingress
        for forward in ("1", "2", "1"):
            near, _ = application(world)
            ingress.accepted(Wanted("", "192.0.2.1:5", near, forward=forward))  # type: ignore[arg-type]
        assert [wanted.forward for wanted in ingress.withdraw("1")] == ["1", "1"]
        assert [wanted.forward for wanted in ingress.waiting] == ["2"]
        assert ingress.withdraw("3") == []


class TestSurplus:
    async def test_those_idle_longest_go_and_only_after_a_while(self, make_world: Make) -> None:
        world = await make_world(idle_links=4).warm()
        ingress = world.session.ingress
        links = list(ingress.idle)
        for number, link in enumerate(links):
            link.idle_since = number
        ingress.demand.least = 1
        assert ingress.surplus(10.0, 60.0) == []
        assert ingress.surplus(61.5, 60.0) == links[:2]
        assert list(ingress.idle) == links[2:]
        assert ingress.surplus(1000.0, 60.0) == [links[2]]
        assert ingress.surplus(1000.0, 60.0) == [], "the least are kept"


class TestStop:
    async def test_what_waits_is_reset_without_a_word(self, make_world: Make, lines: LogLines) -> None:
        world = make_world()
        far = world.connect(b"x")
        said: list[Any] = []
        world.session.ingress.accepted(Wanted(TARGET, "p", dropped=lambda *args: said.append(args)))
        world.session.ingress.stop()
        assert far.reset_by_peer
        assert said == [("shutdown", "it is stopping")]
        assert not [line for line in lines.all() if "connection reset" in line]
        assert not world.session.ingress.idle and not world.session.ingress.waiting


class TestExpiry:
    async def test_each_in_its_own_time(self, make_world: Make, autojump_clock: MockClock, lines: LogLines) -> None:
        world = make_world()
        world.nursery.start_soon(world.pump)
        ends = []
        for _ in range(3):
            ends.append(world.connect())
            await trio.sleep(1)
        await trio.sleep(limits.OPEN_WAIT_SECONDS - 3 + 0.1)
        for late in (1, 2, 3):
            assert [end.reset_by_peer for end in ends] == [number < late for number in range(3)]
            await trio.sleep(1)
        assert len([line for line in lines.all() if "connection reset: no link to the other end in time" in line]) == 3

    async def test_what_was_served_is_not_dropped(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world()
        world.dialler.error = AWAY
        world.run()
        first = world.connect(b"1")
        await trio.sleep(limits.OPEN_WAIT_SECONDS - 3)
        world.dialler.error = None
        await trio.sleep(limits.OPEN_WAIT_SECONDS)
        assert not first.reset_by_peer and world.read(world.targets[0]) == b"1"


async def test_an_idle_link_is_kept(make_world: Make) -> None:
    world = await make_world().warm()
    link: Link = next(iter(world.session.ingress.idle))
    del world.session.ingress.idle[link]
    assert world.session.ingress.offer(link) is False
    assert link in world.session.ingress.idle


class TestStopped:
    async def test_what_still_comes_is_dropped_at_once(self, make_world: Make) -> None:
        """A negotiation that outlives its session: nothing would look after what it adds."""
        world = await make_world().warm()
        ingress = world.session.ingress
        ingress.stop()
        asking = Asking(world)
        near, far = application(world)
        ingress.accepted(Wanted(TARGET, "192.0.2.1:5", near))  # type: ignore[arg-type]
        await world.settle()
        assert asking.error is not None and asking.error.code == "shutdown"
        assert far.reset_by_peer
        assert not ingress.waiting and not world.dialled
