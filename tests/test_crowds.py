"""Many streams, links and clients at once: nobody stampedes, nobody waits for long, nobody pays for another."""

from __future__ import annotations

import secrets
import socket
from collections import Counter

import pytest
import trio
from trio.testing import MockClock

from tests.roles import LogLines, World, lines, make_world
from tests.test_resumption import Make
from tests.test_server import Peer
from wstunnel import limits
from wstunnel.client import _sweep
from wstunnel.client_session import ClientSession
from wstunnel.errors import NetworkError, ProtocolError
from wstunnel.forwards import parse_forward
from wstunnel.wire.credit import Budget
from wstunnel.wire.messages import VERSION, Detached, Hello, Resume

__all__ = ["lines", "make_world"]  # fixtures, seen from here

AWAY = NetworkError("tcp", "refused")


async def surplus(world: World, count: int = 30) -> None:
    """A burst of opens that ended again: more idle links than are wanted."""
    apps = [world.connect(b"x") for _ in range(count)]
    await world.settle()
    for app, target in zip(apps, world.targets, strict=True):
        app.shutdown(socket.SHUT_WR)
        target.shutdown(socket.SHUT_WR)
    await world.settle()
    await trio.sleep(20)  # the peak fades
    assert not world.session.streams
    assert world.idle > world.session.ingress.demand.wanted()


class TestDials:
    async def test_no_storm_when_the_server_goes_just_after_it_came_back(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        """Several dials hang and fail one after the other while one succeeds; then the server goes for good."""
        world = make_world(idle_links=8)
        world.nursery.start_soon(world.session.keep_links)
        world.nursery.start_soon(world.pump)
        await trio.sleep(3)
        succeed = world.dialler.dial
        begun: list[float] = []
        hanging = {1: 1.0, 2: 2.0, 3: 4.0, 4: 8.0, 5: 16.0, 6: 17.0, 7: 17.5}

        async def dial() -> object:
            number = len(begun) + 1
            begun.append(trio.current_time())
            await trio.sleep(hanging.get(number, 0.01))
            if number == 6:
                return await succeed()
            raise AWAY

        world.dialler.dial = dial
        world.cut_all()
        await trio.sleep(20)
        assert len(begun) > 6
        assert max(Counter(int(when) for when in begun).values()) <= 2 * limits.DIALS_AT_ONCE

    async def test_a_control_link_is_dialled_though_idle_links_are_many(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(idle_links=12)
        world.run()
        await trio.sleep(2)
        await surplus(world)
        assert world.session._control is not None
        world.cut(world.session._control)
        await trio.sleep(1)
        assert world.session._control is not None

    async def test_idle_links_that_nobody_has_heard_of_are_not_relied_on(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(idle_links=12)
        world.run()
        await trio.sleep(2)
        await surplus(world)
        app = world.connect(b"hello")
        await trio.sleep(0.5)
        near = world.near_stream()
        old = near.link
        for link in list(world.session.links):
            world.freeze(link)
        app.send(b"more")
        await trio.sleep(9)
        assert near.link is not None and near.link is not old
        assert near not in world.session._detached

    async def test_none_for_a_server_that_drains_but_still_accepts(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(idle_links=12)
        world.run()
        await trio.sleep(2)
        world.dialler.seconds = 0.02
        before = len(world.dialler.begun)
        world.far_session.drain()
        await trio.sleep(2)
        assert len(world.dialler.begun) - before <= 3 * limits.DIALS_AT_ONCE


async def test_a_thousand_streams_are_told_of_at_once(make_world: Make, autojump_clock: MockClock) -> None:
    """Only the server hears of the cut, and the streams are idle: the client learns it from `detached` alone."""
    count = 1000
    world = make_world(idle_links=2)
    world.run()
    await trio.sleep(2)
    for _ in range(count):
        world.connect(b"x")
    while len(world.session.streams) < count or not all(s.state.opened for s in world.session.streams.values()):
        await trio.sleep(0.1)
    for stream in list(world.far_session.streams.values()):
        assert stream.link is not None
        sock = stream.link.sock
        world.sockets = [pair for pair in world.sockets if sock not in pair]
        stream.link.lose("cut")
    await trio.sleep(2)
    assert not world.far_session._detached


async def test_uploads_during_an_outage_do_not_use_the_budget_up(make_world: Make, autojump_clock: MockClock) -> None:
    world = make_world()
    principal = world.session.principal
    principal.budget = Budget(2 * limits.MIB, principal.budget.parent)  # what 1,000 streams do to theirs, 16 do to this
    world.run()
    await trio.sleep(2)
    apps = []
    for _ in range(16):
        apps.append(world.connect(b"x"))
        await trio.sleep(0.1)
    await trio.sleep(1)
    world.dialler.error = AWAY
    world.cut_all()
    for app in apps:
        app.send(bytes(300_000))
    await trio.sleep(10)
    world.dialler.error = None
    await trio.sleep(20)
    assert len(world.session.streams) == 16


async def test_a_server_cannot_fill_the_clients_memory_with_detached(make_world: Make) -> None:
    world = await make_world().warm()
    with pytest.raises(ProtocolError) as caught:
        for _ in range(2 * limits.PRINCIPAL_STREAMS // 256):
            world.session._server_detached(Detached(streams=[secrets.token_urlsafe(16) for _ in range(256)]))
    assert caught.value.code == 1008
    assert len(world.session._unknown) <= limits.PRINCIPAL_STREAMS


async def test_asking_for_another_sessions_stream_changes_nothing(make_world: Make) -> None:
    world = await make_world().warm()
    _app, near, far, _target = await world.stream(b"hello")
    for user, session in (("bob", world.session.id), ("alice", secrets.token_urlsafe(16))):
        hello = Hello(version=VERSION, session=session, role="forward", features=["resume"])
        resume = Resume(n=1, stream=near.state.id, epoch=1, received=0, consumed=0, limit=limits.WINDOW_FIRST)
        answers = await Peer(world, user).send(hello, resume)
        assert "unknown" in [getattr(answer, "outcome", None) for answer in answers]
    world.cut(near.link)
    await world.settle()
    assert near.link is not None
    assert near.outcome is far.outcome is None


async def test_one_machine_that_is_back_first_leaves_the_others_streams_alone(
    make_world: Make, autojump_clock: MockClock
) -> None:
    """Two clients of one user behind a proxy that restarts."""
    world = make_world()
    world.run()
    other = ClientSession(world.dialler, world.client_reactor, idle_links=2, random_float=lambda: 1.0)
    world.nursery.start_soon(other.keep_links)
    world.nursery.start_soon(_sweep, other)
    await trio.sleep(3)
    for session in (world.session, other):
        near, _far = world.pair()
        session.accepted(near, parse_forward("5432:db:5432")[0])
    await trio.sleep(1)
    for session in (world.session, other):
        for link in list(session.links):
            world.cut(link)
    await trio.sleep(10)
    assert (len(world.session.streams), len(other.streams)) == (1, 1)


async def test_a_crowd_beyond_the_ceiling_is_one_line(
    make_world: Make,
    lines: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "PRINCIPAL_DETACHED", 20)
    world = await make_world().warm()
    for _ in range(120):
        world.connect(b"x")
    await world.settle()
    world.dialler.error = AWAY
    world.cut_all()
    await world.settle()
    (said,) = lines("too many streams without a link: the oldest were reset", "client")
    assert said["count"] == 100
