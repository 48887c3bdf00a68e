"""Reverse forwards: places at the server, links that are parked for them, and targets that only the client knows."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.roles import (  # lines, make_world and raises are fixtures
    FakeDialler,
    LogLines,
    NamedSocket,
    World,
    application,
    connecting,
    exchange,
    free_port,
    lines,
    make_world,
    raises,
    reset_code,
    serving,
    targets,
    until,
)
from tests.test_resumption import finish, left_nothing
from tests.test_server import SESSION, Peer, hello, identify, opening
from wstunnel import limits, reverse_server
from wstunnel import server as server_module
from wstunnel.client_session import ClientSession
from wstunnel.endpoints import unix
from wstunnel.errors import LocalError, NetworkError, ServerRefusedError, StreamError
from wstunnel.forwards import parse_reverse
from wstunnel.ingress import Wanted
from wstunnel.policy import parse_listen_rule
from wstunnel.pool import SURPLUS_SECONDS
from wstunnel.reverse_client import RETRY_SECONDS
from wstunnel.server import TAKE_OVER_SECONDS, Server
from wstunnel.server_session import REVERSE_LINKS, ServerSession
from wstunnel.stream import Stream
from wstunnel.wire.frames import FrameDecoder, Opcode, encode_frame
from wstunnel.wire.messages import (
    FEATURES,
    VERSION,
    AnyMessage,
    Bye,
    Detached,
    Gone,
    Hello,
    Listen,
    Listening,
    Message,
    Need,
    Open,
    Opened,
    Ping,
    Reset,
    Unlisten,
    Welcome,
    decode,
    encode,
)
from wstunnel.wire.states import Exchange

__all__ = ["lines", "make_world", "raises"]

Make = Callable[..., World]
AWAY = NetworkError("tcp", "cannot connect to 127.0.0.1:8080: refused")
CUTS = pytest.mark.parametrize("cut", ["cut", "cut_near", "cut_far"])
WEB = "8080:web:80"
ANY = ["*:*"]


async def up(make_world: Make, *specs: str, **options: Any) -> World:
    """A world whose client has these reverse forwards, and all of its links."""
    world = await make_world(**({"reverse": specs or [WEB], "allow_listen": ANY} | options)).warm()
    assert len(world.session.reverse.parked) == REVERSE_LINKS
    return world


async def arrived(world: World, data: bytes = b"") -> tuple[NamedSocket, Stream, Stream, NamedSocket]:
    """A stream that the server opened: application, its end there, its end at the client, target."""
    app = world.arrive(data)
    await world.settle()
    far = list(world.far_session.streams.values())[-1]
    assert far.state.opened
    return app, far, world.session.streams[far.state.id], world.targets[-1]


def parked(session: ClientSession) -> int:
    return len(session.reverse.parked)


def raw(role: Any = "control", session: str = SESSION, **changes: Any) -> Hello:
    return hello(role, session=session, **({"features": list(FEATURES)} | changes))


def place(session: ServerSession, forward_id: str = "1") -> reverse_server.Place:
    return session.reverse._by_id[forward_id]


def restless(client: ClientSession) -> None:
    """Links are old enough not to count as failed dials."""
    for link in client.links:
        link.created -= 10


class TestListen:
    async def test_the_server_listens_and_the_client_says_where(self, make_world: Make, lines: LogLines) -> None:
        world = await up(make_world, WEB, "[::1]:9090:web:90")
        assert sorted(world.listeners) == ["127.0.0.1:8080", "[::1]:9090"]
        assert lines("listening 127.0.0.1:8080 at the server -> tcp:web:80", "client")
        assert lines("listening [::1]:9090 at the server -> tcp:web:90", "client")
        said = lines("listening for a client", "server")
        assert [line["address"] for line in said] == ["127.0.0.1:8080", "[::1]:9090"]

    async def test_port_0_reports_the_port(self, make_world: Make, lines: LogLines) -> None:
        await up(make_world, "0:web:80")
        assert lines("listening 127.0.0.1:40000 at the server -> tcp:web:80")

    async def test_two_of_port_0_are_two_places(self, make_world: Make, lines: LogLines) -> None:
        world = await up(make_world, "0:web:80", "0:web:81")
        assert len(world.listeners) == len(world.far_session.reverse) == 2

    async def test_both_addresses_are_named(self, make_world: Make, lines: LogLines) -> None:
        await up(make_world, "*:8080:web:80")
        assert lines("listening 0.0.0.0:8080, [::]:8080 at the server -> tcp:web:80")

    async def test_without_a_rule_it_is_forbidden(self, make_world: Make, lines: LogLines) -> None:
        world = await make_world(reverse=[WEB]).warm()
        assert not world.listeners and not parked(world.session)
        (line,) = lines(
            "the server does not listen for -R: the server does not allow listening on 127.0.0.1:8080; its operator"
            " can, with --allow-listen 127.0.0.1:8080"
        )
        assert line["retry"] == "no"
        (refused,) = lines("listening refused", "server")
        assert refused["principal"] == "alice"

    async def test_one_that_is_forbidden_leaves_the_others_alone(self, make_world: Make) -> None:
        world = await up(make_world, "80:web:80", WEB, allow_listen=["8080"])
        assert list(world.listeners) == ["127.0.0.1:8080"]
        assert world.session.reverse.failure is None

    @pytest.mark.parametrize("options", [{"exit_on_failure": True}, {"only": True}])
    async def test_a_client_that_is_of_no_use_ends(
        self, make_world: Make, options: dict[str, bool], raises: Callable[..., Any]
    ) -> None:
        world = make_world()
        session = world.make_client(WEB, **options)
        with raises(ServerRefusedError, "the server does not listen for -R 127.0.0.1:8080 -> tcp:web:80"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.keep_links)
                await world.settle()

    async def test_one_of_several_does_not_end_the_client(self, make_world: Make) -> None:
        world = make_world(allow_listen=["8080"])
        session = world.make_client("80:web:80", WEB, only=True)
        world.nursery.start_soon(session.keep_links)
        await world.settle()
        assert session.reverse.failure is None

    async def test_an_address_in_use_is_retried_and_the_others_go_on(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world(reverse=[WEB, "9090:web:90"], allow_listen=ANY)
        (taken,) = world.listen(parse_reverse(WEB)[0])
        world.run()
        await trio.sleep(1)
        assert "127.0.0.1:9090" in world.listeners
        said = lines("the server does not listen for -R: cannot listen on 127.0.0.1:8080: the port is in use")
        assert [line["retry"] for line in said] == ["yes"]
        await trio.sleep(3 * (RETRY_SECONDS + 1))
        assert len(lines("listening refused", "server")) == 4
        said = [line for line in lines.all() if "listening refused" in line]
        assert [line.split()[0] for line in said] == ["WARNING", "DEBUG", "DEBUG", "DEBUG"], "asked again it is no news"
        assert len(lines("the server does not listen for -R: cannot listen on 127.0.0.1:8080: the port is in use")) == 1
        taken.close()
        await trio.sleep(RETRY_SECONDS + 1)
        assert lines("listening 127.0.0.1:8080 at the server -> tcp:web:80")
        await trio.sleep(3 * RETRY_SECONDS)
        assert len(lines("listening for a client")) == 2, "what is there is not asked for again"

    async def test_a_refusal_is_news_when_it_is_another_one(self, make_world: Make, lines: LogLines) -> None:
        world = make_world(allow_listen=["8080"])
        peer = Peer(world)
        one, two = (Listen(forward="f", bind=f"tcp:127.0.0.1:{port}") for port in (80, 81))
        await peer.send(raw(), one, one, two, one)
        await peer.send(Listen(forward="f", bind="tcp:127.0.0.1:8080"), Unlisten(forward="f"), one)
        said = [line.split()[0] for line in lines.all() if "listening refused" in line]
        assert said == ["WARNING", "DEBUG", "WARNING", "WARNING", "WARNING"]

    async def test_so_many_refusals_are_remembered(self, make_world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reverse_server, "FORWARDS", 3)
        world = make_world()
        await Peer(world).send(raw(), *(Listen(forward=str(number), bind="tcp:127.0.0.1:80") for number in range(9)))
        assert list(world.far_session.reverse._refused) == ["6", "7", "8"]

    async def test_repeated_it_is_the_same_place(self, make_world: Make) -> None:
        world = make_world(allow_listen=ANY)
        peer = Peer(world)
        listen = Listen(forward="f", bind="tcp:127.0.0.1:8080")
        answers = await peer.send(raw(), listen, listen)
        assert [each for each in answers if isinstance(each, Listening)] == [
            Listening(forward="f", address="127.0.0.1:8080")
        ] * 2
        assert len(world.listeners) == len(world.far_session.reverse) == 1

    async def test_two_forwards_of_a_client_do_not_take_it_from_each_other(self, make_world: Make) -> None:
        world = make_world(allow_listen=ANY)
        peer = Peer(world)
        await peer.send(raw(), Listen(forward="f", bind="tcp:127.0.0.1:8080"))
        assert await peer.send(Listen(forward="g", bind="socks:127.0.0.1:8080")) == [
            Listening(
                forward="g",
                code="in-use",
                message="cannot listen on 127.0.0.1:8080: another forward of this client has it",
            )
        ]
        assert list(world.far_session.reverse._by_id) == ["f"]

    async def test_unlisten(self, make_world: Make, lines: LogLines) -> None:
        world = make_world(allow_listen=ANY)
        peer = Peer(world)
        answers = await peer.send(raw(), Listen(forward="f", bind="tcp:127.0.0.1:8080"))
        assert Need(links=REVERSE_LINKS) in answers
        assert await peer.send(Unlisten(forward="g")) == []
        assert await peer.send(Unlisten(forward="f")) == [Need(links=0)]
        assert world.listeners["127.0.0.1:8080"].closed
        assert lines("no longer listening for a client")
        assert not world.server.places._places
        answers = await peer.send(Listen(forward="h", bind="tcp:127.0.0.1:8080"))
        assert answers == [Listening(forward="h", address="127.0.0.1:8080"), Need(links=REVERSE_LINKS)]

    @pytest.mark.parametrize(
        "bind",
        ["", "tcp", "tcp:", "tcp:80", "tcp:127.0.0.1:80000", "tcp:db:80", "tcp:127.0.0.1:80-90", "sctp:127.0.0.1:80",
         "unix:x", "unix:", "unix:/x;mode=9", "127.0.0.1:80", "x" * 1024, "[" * 200],
    )  # fmt: skip
    async def test_what_is_no_place_is_forbidden(self, make_world: Make, bind: str) -> None:
        world = make_world(allow_listen=["*:*", "unix:/*"])
        peer = Peer(world)
        answers = await peer.send(raw(), Listen(forward="f", bind=bind))
        (refused,) = [each for each in answers if isinstance(each, Listening)]
        assert (refused.code, refused.address) == ("forbidden", "") and refused.message
        assert not world.listeners and peer.closed is None

    async def test_a_user_may_have_so_many_sockets_over_all_sessions(self, make_world: Make) -> None:
        world = make_world(allow_listen=ANY)
        world.server.places.most = 3
        principal = world.server.principal("alice")
        one, two = Peer(world), Peer(world)
        await one.send(raw(session="1" * 22), *(Listen(forward=str(n), bind=f"tcp:127.0.0.1:{n}") for n in (1, 2)))
        full = "the server listens on 3 sockets for one user at most"
        answers = await two.send(raw(session="2" * 22), *(Listen(forward=str(n), bind=f"tcp:*:{n}") for n in (3, 4)))
        assert [each for each in answers if isinstance(each, Listening)] == [
            Listening(forward="3", address="0.0.0.0:3, [::]:3"),
            Listening(forward="4", code="in-use", message=full),
        ]
        assert principal.listening == 4 and len(world.listeners) == 4
        assert await two.send(Listen(forward="5", bind="tcp:127.0.0.1:1")) == [
            Listening(forward="5", address="127.0.0.1:1")  # taken over: no new one
        ]
        bob = Peer(world, "bob")
        answers = await bob.send(raw(session="3" * 22), Listen(forward="1", bind="tcp:127.0.0.1:9"))
        assert Listening(forward="1", address="127.0.0.1:9") in answers
        await two.send(Unlisten(forward="3"))
        assert await two.send(Listen(forward="4", bind="tcp:*:4")) == [
            Listening(forward="4", address="0.0.0.0:4, [::]:4")
        ]
        await one.send(Bye())
        await two.send(Bye())
        assert principal.listening == 0 and world.server.principal("bob").listening == 1

    async def test_they_are_a_small_part_of_the_descriptors_and_count_as_streams(self, make_world: Make) -> None:
        world = make_world(allow_listen=ANY)
        make = partial(Server, world._config, world.server_reactor, world.nursery, [], None)
        assert [make(descriptors=count).places.most for count in (256, 1_000_000)] == [16, 2048]
        world.server._descriptors = 10
        peer = Peer(world)
        await peer.send(raw(), *(Listen(forward=str(n), bind=f"tcp:127.0.0.1:{n}") for n in (1, 2, 3)))
        stranger = [Peer(world) for _ in range(2)]
        for number, each in enumerate(stranger):
            answers = await each.send(raw("forward"), opening(number))
            full = Reset(n=1, code="limit", message="too many streams")
            assert (full in answers) is (number == 1)

    async def test_a_client_may_have_so_many(self, make_world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reverse_server, "FORWARDS", 2)
        world = make_world(allow_listen=ANY)
        peer = Peer(world)
        answers = await peer.send(
            raw(), *(Listen(forward=str(number), bind=f"tcp:127.0.0.1:{number}") for number in (1, 2, 3))
        )
        codes = {each.forward: each.code for each in answers if isinstance(each, Listening)}
        assert codes == {"1": "", "2": "", "3": "forbidden"}
        await peer.send(Unlisten(forward="1"))
        assert await peer.send(Listen(forward="3", bind="tcp:127.0.0.1:3")) == [
            Listening(forward="3", address="127.0.0.1:3")
        ]

    async def test_a_flood_is_answered_or_ends_its_link(self, make_world: Make) -> None:
        world = make_world(allow_listen=ANY)
        peer = Peer(world)
        many = [Listen(forward=str(number), bind="tcp:10.0.0.1:99999") for number in range(2000)]
        answers = await peer.send(raw(), *many)
        assert len([each for each in answers if isinstance(each, Listening)]) == len(many)
        peer.link.sock.outgoing.room = 0  # type: ignore[union-attr]  # it reads no more
        await peer.send(*many)
        peer.link.sock.outgoing.room = None  # type: ignore[union-attr]
        await peer.receive()
        assert peer.closed == (1008, "too many control messages queued: the peer does not read")

    async def test_a_place_that_could_not_be_watched_is_closed(
        self, make_world: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world = make_world(allow_listen=ANY)
        adopt, full = world.server_reactor.adopt, []

        def second_fails(handler: Any, sock: Any, *args: Any, **options: Any) -> None:
            if sock in world.listeners.values():
                full.append(sock)
                if len(full) == 2:
                    raise LocalError("too many files")
            adopt(handler, sock, *args, **options)

        monkeypatch.setattr(world.server_reactor, "adopt", second_fails)
        answers = await Peer(world).send(raw(), Listen(forward="f", bind="tcp:*:8080"))
        assert Listening(forward="f", code="in-use", message="too many files") in answers
        assert all(listener.closed for listener in world.listeners.values())
        assert not world.server.places._places and not world.far_session.reverse


class TestFeature:
    async def test_a_server_without_it_is_refused(
        self, make_world: Make, monkeypatch: pytest.MonkeyPatch, raises: Callable[..., Any]
    ) -> None:
        monkeypatch.setattr(server_module, "FEATURES", ("resume", "drain"))
        world = make_world()
        session = world.make_client(WEB)
        with raises(ServerRefusedError, "the server is too old for -R: update it"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.keep_links)
                await world.settle()
        assert not world.listeners

    async def test_a_client_without_forwards_does_not_need_it(
        self, make_world: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server_module, "FEATURES", ("resume", "drain"))
        world = await make_world().warm()
        assert world.session.reverse.failure is None and not parked(world.session)

    @pytest.mark.parametrize("message", [Listen(forward="f", bind="tcp:127.0.0.1:1"), Unlisten(forward="f")])
    async def test_a_client_that_did_not_list_it_may_not_use_it(self, make_world: Make, message: Message) -> None:
        world = make_world(allow_listen=ANY)
        peer = Peer(world)
        await peer.send(raw(features=["resume"]), message)
        assert peer.closed == (1002, f"{type(message).__name__.lower()} without the feature `reverse`")
        assert not world.listeners


class TestNeed:
    async def test_four_are_parked_at_first(self, make_world: Make) -> None:
        world = await up(make_world)
        assert world.session.reverse.need == len(world.far_session.ingress.idle) == REVERSE_LINKS
        assert {link.protocol.role for link in world.session.reverse.parked} == {"reverse"}

    async def test_what_was_taken_is_refilled(self, make_world: Make) -> None:
        world = await up(make_world)
        before = set(world.session.reverse.parked)
        app, far, near, target = await arrived(world)
        assert near.link in before
        assert parked(world.session) == len(world.far_session.ingress.idle) == REVERSE_LINKS
        await finish(world, app, near, far, target)
        assert parked(world.session) == REVERSE_LINKS + 1, "the link is parked again"

    async def test_it_grows_with_demand_and_shrinks_after_it(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(reverse=[WEB], allow_listen=ANY)
        world.run()
        await trio.sleep(3)
        for _ in range(20):
            world.arrive(b"x").shutdown(socket.SHUT_WR)
        await trio.sleep(3)
        assert len(world.dialled) == 20
        assert 10 < world.session.reverse.need <= 20
        assert parked(world.session) >= world.session.reverse.need
        for target in world.targets:
            target.shutdown(socket.SHUT_WR)
        await trio.sleep(1)
        kept = list(world.session.reverse.parked)
        assert len(kept) >= 20
        await trio.sleep(3 * SURPLUS_SECONDS)
        assert world.session.reverse.need == REVERSE_LINKS
        assert parked(world.session) == len(world.far_session.ingress.idle) == REVERSE_LINKS

    async def test_the_server_closes_those_parked_longest_while_others_are_used(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        """It takes the last, so the first are those that nobody needs."""
        world = make_world(reverse=[WEB], allow_listen=ANY)
        world.run()
        await trio.sleep(3)
        session, far = world.session, world.far_session
        far.ingress.demand._peak = 9.0
        far._tell_need()
        await trio.sleep(3)
        assert len(far.ingress.idle) > REVERSE_LINKS + 1
        hot = list(far.ingress.idle)[-5:]
        for _ in range(80):
            for link in hot:
                link.idle_since = trio.current_time()
            await trio.sleep(1)
        assert set(far.ingress.idle) == set(hot)
        await trio.sleep(80)
        assert parked(session) == len(far.ingress.idle) == REVERSE_LINKS

    async def test_the_client_closes_none_since_an_open_may_be_on_its_way(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(reverse=[WEB], allow_listen=ANY)
        world.run()
        await trio.sleep(3)
        world.far_session.ingress.surplus = lambda *_: []  # type: ignore[method-assign]
        world.session.reverse.need = 1
        await trio.sleep(3 * SURPLUS_SECONDS)
        assert parked(world.session) == REVERSE_LINKS

    async def test_without_a_control_link_nothing_is_needed(self, make_world: Make) -> None:
        world = await up(make_world)
        world.session.reverse.need = 500
        assert world.session._control is not None
        world.cut(world.session._control)
        world.client_reactor.turn_all()
        assert world.session.reverse.need == 0

    async def test_no_more_are_dialled_at_once_than_of_the_others(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(reverse=[WEB], allow_listen=ANY)
        world.run()
        await trio.sleep(3)
        world.dialler.seconds, world.dialler.most = 1.0, 0
        world.session.reverse.need = 200
        for _ in range(20):
            world.session._changed.set()
            await trio.sleep(0.01)
        assert world.dialler.most <= limits.DIALS_AT_ONCE

    async def test_a_flood_of_it_is_capped(self, make_world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "PRINCIPAL_LINKS", 30)
        world = await up(make_world)
        control = world.far_session._control
        assert control is not None
        for number in range(200):
            control.send(Need(links=limits.NUMBER_MAX - number))
        await world.settle()
        assert world.session.reverse.need == 30
        assert len(world.session.links) <= 30
        assert world.dialler.most <= limits.DIALS_AT_ONCE

    async def test_what_the_client_has_descriptors_for_is_the_most(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        """Those for the links' streams are spared, and a control link that was lost comes back."""
        world = make_world(reverse=[WEB], allow_listen=ANY)
        world.session.descriptors = 40
        world.run()
        await trio.sleep(3)
        for _ in range(2):
            control = world.far_session._control
            assert control is not None
            control.send(Need(links=500))
            await trio.sleep(0.5)
            assert world.session.reverse.need == 18
            assert len(world.session.links) == 18 and parked(world.session) == 18 - 1 - world.session._least
            assert world.session._control is not None
            world.cut(world.session._control)
            await trio.sleep(0.5)
        assert len(world.session.links) <= 18

    async def test_what_the_server_would_not_accept_needs_no_link(self, make_world: Make) -> None:
        world = await up(make_world)
        world.far_session.most_accepted = 3
        await arrived(world)
        await arrived(world)
        world.far_session._tell_need()
        await world.settle()
        assert world.session.reverse.need == 1

    async def test_it_means_nothing_to_a_client_without_forwards(self, make_world: Make) -> None:
        world = await make_world().warm()
        links = len(world.session.links)
        world.far_session._control.send(Need(links=50))  # type: ignore[union-attr]
        await world.settle()
        assert len(world.session.links) == links

    async def test_a_new_control_link_is_told_again(self, make_world: Make) -> None:
        world = await up(make_world)
        world.session.reverse.need = 0
        restless(world.session)
        world.cut(world.session._control)  # type: ignore[arg-type]
        await world.settle()
        assert world.session.reverse.need == REVERSE_LINKS

    async def test_a_parked_link_that_is_lost_is_replaced(self, make_world: Make) -> None:
        world = await up(make_world)
        restless(world.session)
        for link in list(world.session.reverse.parked)[:2]:
            world.cut(link)
        await world.settle()
        assert parked(world.session) == len(world.far_session.ingress.idle) == REVERSE_LINKS


class TestStreams:
    async def test_open_and_early_data_go_out_in_one_write(self, make_world: Make) -> None:
        world = await up(make_world)
        link = list(world.far_session.ingress.idle)[-1]
        sock: Any = link.sock
        sock.writes.clear()
        world.arrive(b"early")
        world.server_reactor.turn_all()
        assert len(sock.writes) == 1
        assert b'"type":"open"' in sock.writes[0] and b'"forward":"1"' in sock.writes[0]
        assert sock.writes[0].endswith(b"early")
        assert b"web" not in sock.writes[0], "the server does not know the target"

    async def test_bytes_and_ends_both_ways(self, make_world: Make, lines: LogLines) -> None:
        world = await up(make_world)
        app, far, near, target = await arrived(world, b"hello")
        assert world.read(target) == b"hello"
        assert world.dialled == ["tcp:web:80"] and near.target == "tcp:web:80"
        target.send(b"hi")
        target.shutdown(socket.SHUT_WR)
        await world.settle()
        assert world.read(app) == b"hi" and app.incoming.end_arrived
        app.send(b"and more")
        await world.settle()
        assert world.read(target) == b"and more", "half-closed"
        app.shutdown(socket.SHUT_WR)
        await world.settle()
        assert target.incoming.end_arrived
        assert near.outcome == far.outcome == ("finished", "")
        left_nothing(world)
        (opened,) = lines("stream opened", "client")
        assert opened["application"].startswith("192.0.2.1:")
        assert opened["target"] == "tcp:web:80" and "bind" not in opened
        for text in ("stream opened", "stream ended"):
            (line,) = lines(text, "server")
            assert line["bind"] == "127.0.0.1:8080", "the server knows no target, but where it was accepted"
            assert "target" not in line

    @pytest.mark.parametrize("closer", ["app", "target"])
    async def test_a_reset_reaches_the_other_end(self, make_world: Make, closer: str) -> None:
        world = await up(make_world)
        app, _far, _near, target = await arrived(world)
        one, other = (app, target) if closer == "app" else (target, app)
        one.linger_reset = True
        one.close()
        await world.settle()
        assert other.reset_by_peer
        left_nothing(world)

    async def test_a_target_that_refuses_resets_the_application(self, make_world: Make, lines: LogLines) -> None:
        from wstunnel.errors import StreamError

        world = await up(make_world)
        world.refusal = StreamError("refused", "connection refused")
        app = world.arrive(b"x")
        await world.settle()
        assert app.reset_by_peer
        left_nothing(world)
        (refused,) = lines("stream refused", "server")
        assert (refused["reason"], refused["detail"]) == ("refused", "connection refused")
        assert refused["bind"] == "127.0.0.1:8080" and "target" not in refused

    async def test_its_lines_say_where_it_came_in_also_once_nobody_listens(
        self, make_world: Make, lines: LogLines
    ) -> None:
        world = await up(make_world)
        app, _far, _near, target = await arrived(world)
        world.far_session.reverse.unlisten("1")
        app.shutdown(socket.SHUT_WR)
        target.shutdown(socket.SHUT_WR)
        await world.settle()
        (ended,) = lines("stream ended", "server")
        assert ended["bind"] == "127.0.0.1:8080"

    async def test_a_connection_waits_for_a_link(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(reverse=[WEB], allow_listen=ANY)
        world.run()
        await trio.sleep(3)
        world.dialler.error = AWAY
        for link in list(world.session.reverse.parked):
            link.lose("cut")
        await trio.sleep(0.5)
        app = world.arrive(b"early")
        await trio.sleep(limits.OPEN_WAIT_SECONDS - 5)
        assert len(world.far_session.ingress.waiting) == 1 and not app.reset_by_peer
        assert world.session.reverse.need == REVERSE_LINKS + 1, "one more than is parked"
        world.dialler.error = None
        await trio.sleep(3)
        assert world.read(world.targets[-1]) == b"early"

    async def test_those_that_wait_are_counted_over_all_sessions_of_the_user(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        """And half of what the user may have stays free of them."""
        world = make_world(allow_listen=ANY)
        world.server._descriptors = 48  # 22 streams, 11 of them of reverse forwards
        world.nursery.start_soon(world.pump)
        peers = [Peer(world) for _ in range(3)]
        for number, peer in enumerate(peers, 1):
            await peer.send(raw(session=str(number) * 22), Listen(forward="f", bind=f"tcp:127.0.0.1:{number}"))
        apps = [world.arrive(name=f"127.0.0.1:{number}") for number in (1, 2, 3) for _ in range(6)]
        await trio.sleep(0.1)
        principal = world.server.principal("alice")
        assert (principal.waiting, principal.sockets) == (11, 11 + 3)
        assert [app.reset_by_peer for app in apps].count(True) == len(apps) - 11
        links = [Peer(world) for _ in range(9)]
        for number, each in enumerate(links):
            answers = await each.send(raw("forward", session="1" * 22), opening(number))
            assert (Reset(n=1, code="limit", message="too many streams") in answers) is (number == 8)
        await trio.sleep(limits.OPEN_WAIT_SECONDS)
        assert principal.waiting == principal.accepted == 0 and all(app.reset_by_peer for app in apps)

    async def test_streams_that_were_accepted_count_like_those_that_wait(self, make_world: Make) -> None:
        world = await up(make_world)
        world.far_session.most_accepted = 2
        first, second, third = [world.arrive(b"x") for _ in range(3)]
        await world.settle()
        assert [app.reset_by_peer for app in (first, second, third)] == [False, False, True]
        assert world.far_session.principal.accepted == 2
        await world.stream(b"the owner's")
        assert world.far_session.principal.accepted == 2 and world.far_session.principal.streams == 3

    async def test_and_is_reset_when_none_comes_in_time(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world(reverse=[WEB], allow_listen=ANY)
        world.run()
        await trio.sleep(3)
        world.dialler.error = AWAY
        world.cut_all()
        await trio.sleep(0.1)
        app = world.arrive(b"early")
        await trio.sleep(limits.OPEN_WAIT_SECONDS - 0.2)
        assert not app.reset_by_peer
        await trio.sleep(0.4)
        assert app.reset_by_peer
        said = [line for line in lines.all() if "connection reset: no link to the other end in time" in line]
        assert len(said) == 1 and said[0].startswith("WARNING wstunnel.server ")
        assert "bind=127.0.0.1:8080" in said[0] and "target=" not in said[0]

    async def test_the_principals_streams_are_counted_over_all_sessions(
        self, make_world: Make, lines: LogLines
    ) -> None:
        world = await up(make_world)
        await arrived(world)
        world.far_session.most_streams = 2
        world.far_session.principal.streams += 1  # of another session
        app = world.arrive()
        await world.settle()
        assert app.reset_by_peer
        assert lines("connection reset: too many streams or too much memory held", "server")

    @pytest.mark.parametrize(
        ("spec", "name", "header"),
        [
            ("8080:web:80;proxy=v1", "127.0.0.1:8080", b"PROXY TCP4 192.0.2.1 127.0.0.1 %d 8080\r\n"),
            ("*:8080:web:80;proxy=v1", "0.0.0.0:8080", b"PROXY TCP4 192.0.2.1 0.0.0.0 %d 8080\r\n"),
        ],
    )
    async def test_the_target_is_told_who_connects(self, make_world: Make, spec: str, name: str, header: bytes) -> None:
        world = await up(make_world, spec)
        app = world.arrive(b"hello", name)
        await world.settle()
        peer: Any = app.peer
        assert world.read(world.targets[-1]) == header % peer.getpeername()[1] + b"hello"

    async def test_which_of_two_addresses_it_was(self, make_world: Make) -> None:
        world = make_world(reverse=["localhost:8080:web:80"])
        (asked,) = world.session.reverse._asked.values()
        assert asked.accepted_at("[2001:db8::1]:5") == "[::1]:8080", "before `listening` came"
        asked.address = "127.0.0.1:8081, [::1]:8081"
        assert asked.accepted_at("[2001:db8::1]:5") == "[::1]:8081"
        assert asked.accepted_at("192.0.2.1:5") == "127.0.0.1:8081"
        assert asked.accepted_at("unix:uid=0,pid=1") == "127.0.0.1:8081"
        asked.address = "/run/x.sock"
        assert asked.accepted_at("[2001:db8::1]:5") == "/run/x.sock"


class TestResumption:
    @CUTS
    async def test_no_byte_is_lost(self, make_world: Make, cut: str) -> None:
        world = await up(make_world)
        restless(world.session)
        app, far, near, target = await arrived(world, b"hello")
        old = near.link
        world.read(target)
        app.send(b"under way")
        target.send(b"way back")
        world.move()
        world.server_reactor.turn_all()
        world.client_reactor.turn_all()
        getattr(world, cut)(old)
        await world.settle()
        assert near.link is not None and near.link is not old
        assert near.link.protocol.role == "forward", "streams that the server opened are resumed on forward links"
        assert far.link is world.far_link(near.link)
        assert (world.read(target), world.read(app)) == (b"under way", b"way back")
        assert world.dialled == ["tcp:web:80"]
        await finish(world, app, near, far, target)

    async def test_when_all_links_are_cut_at_once(self, make_world: Make) -> None:
        world = await up(make_world)
        streams = [await arrived(world, b"%d" % number) for number in range(3)]
        restless(world.session)
        for app, _, _, target in streams:
            app.send(b"there")
            target.send(b"back")
        world.server_reactor.turn_all()
        world.cut_all()
        await world.settle()
        assert [world.read(target) for _, _, _, target in streams] == [b"0there", b"1there", b"2there"]
        assert [world.read(app) for app, _, _, _ in streams] == [b"back"] * 3
        assert parked(world.session) == REVERSE_LINKS
        assert len(world.listeners) == 1 and not world.listeners["127.0.0.1:8080"].closed
        assert (await arrived(world, b"new"))[1].link is not None

    async def test_large_amounts_over_many_cuts(self, make_world: Make) -> None:
        world = await up(make_world)
        app, far, near, target = await arrived(world)
        one, two = os.urandom(400_000), os.urandom(300_000)
        app.send(one)
        target.send(two)
        got, back = b"", b""
        for cut in ("cut", "cut_near", "cut_far") * 4:
            for _ in range(9):
                world.move()
                world.server_reactor.turn_all()
                world.client_reactor.turn_all()
                got, back = got + world.read(target), back + world.read(app)
            restless(world.session)
            if near.link is not None and far.link is not None:
                getattr(world, cut)(near.link)
            await world.settle()
            got, back = got + world.read(target), back + world.read(app)
        assert (got, back) == (one, two)
        with trio.fail_after(20):
            while near.link is None or near.link.protocol.state is not Exchange.BUSY:
                await trio.sleep(0.02)  # having lost many links in vain it waits a little for the next one
                await world.settle()
        await finish(world, app, near, far, target)

    async def test_an_open_that_was_lost_is_opened_afresh(self, make_world: Make) -> None:
        world = await up(make_world)
        restless(world.session)
        world.arrive(b"early")
        world.server_reactor.turn_all()
        (far,) = world.far_session.streams.values()
        first = far.state.id
        assert far.link is not None
        link = next(link for link in world.session.reverse.parked if world.far_link(link) is far.link)
        world.cut(link)
        await world.settle()
        assert far.state.id != first and far.state.opened
        assert world.read(world.targets[-1]) == b"early"
        assert world.dialled == ["tcp:web:80"]
        assert first in world.session.principal.tombstones, "the client refuses the first id from now on"

    async def test_an_open_that_was_held_back_dials_nothing(self, make_world: Make) -> None:
        """A proxy held it; meanwhile the stream was opened afresh. Both ends of the link live on."""
        world = await up(make_world)
        restless(world.session)
        world.arrive(b"early")
        held_link = list(world.far_session.ingress.idle)[-1]
        held: Any = held_link.sock
        near_link = next(link for link in world.session.reverse.parked if world.far_link(link) is held_link)
        world.server_reactor.turn_all()
        frames = bytes(held.outgoing.sent)
        assert b'"type":"open"' in frames
        held.outgoing.sent.clear()
        held_link.lose("cut at the server's end")
        held.outgoing.ended = held.outgoing.end_arrived = False
        await world.settle()
        assert world.dialled == ["tcp:web:80"]
        near_link._process(frames)
        assert near_link.stream is not None
        assert near_link.stream.reason == ("forbidden", "this stream id was used before")
        await world.settle()
        assert world.dialled == ["tcp:web:80"]

    @pytest.mark.parametrize("told", [True, False])
    async def test_nor_is_its_refusal_told_on_another_link(self, make_world: Make, told: bool) -> None:
        """The server's stream still has that id when the client's answer is slow to come: it would be reset."""
        world = await up(make_world)
        restless(world.session)
        app = world.arrive(b"early")
        held_link = list(world.far_session.ingress.idle)[-1]
        held: Any = held_link.sock
        near_link = next(link for link in world.session.reverse.parked if world.far_link(link) is held_link)
        world.server_reactor.turn_all()
        frames = bytes(held.outgoing.sent)
        held.outgoing.sent.clear()
        held_link.lose("cut at the server's end")
        held.outgoing.ended = held.outgoing.end_arrived = False
        control: Any = world.session._control.sock  # type: ignore[union-attr]
        world.server_reactor.turn_all()
        world.move()
        control.outgoing.room = 0 if told else None  # the client's answer is under way, or has yet to be given
        if told:
            world.client_reactor.turn_all()
        else:
            (far,) = world.far_session.streams.values()
            world.session._unknown[far.state.id] = None
        near_link._process(frames)
        (near,) = world.session.streams.values()
        assert near.reason == ("forbidden", "this stream id was used before")
        near_link.lose("cut at the client's end, too")
        assert near.outcome is not None and not world.session._recovery
        control.outgoing.room = None
        await world.settle()
        assert world.read(world.targets[-1]) == b"early" and not app.reset_by_peer
        assert world.dialled == ["tcp:web:80"]

    async def test_with_nobody_parked_it_is_opened_afresh_when_there_is_a_link(self, make_world: Make) -> None:
        world = await up(make_world)
        restless(world.session)
        world.arrive(b"early")
        world.server_reactor.turn_all()
        (far,) = world.far_session.streams.values()
        world.dialler.error = AWAY
        for link in [*world.session.reverse.parked]:
            world.cut(link)
        await world.settle()
        assert list(world.far_session.ingress.reopening) == [far]
        assert world.session.reverse.need == REVERSE_LINKS + 1
        world.dialler.error = None
        world.session._absence.retry_at = 0
        world.session._absence.ended()
        world.session._changed.set()
        await world.settle()
        assert world.read(world.targets[-1]) == b"early"
        assert not world.far_session.ingress.reopening

    async def test_a_stream_that_ends_before_it_was_opened_afresh_is_forgotten(self, make_world: Make) -> None:
        world = await up(make_world)
        restless(world.session)
        app = world.arrive(b"early")
        world.server_reactor.turn_all()
        world.dialler.error = AWAY
        for link in [*world.session.reverse.parked]:
            world.cut(link)
        await world.settle()
        app.linger_reset = True
        app.close()
        await world.settle()
        assert not world.far_session.ingress.reopening and not world.far_session.streams
        left_nothing(world)

    @pytest.mark.parametrize("lives", [True, False])
    async def test_a_target_that_is_reached_while_resume_is_not_answered(self, make_world: Make, lives: bool) -> None:
        """Nothing may be sent for the stream meanwhile: the server may not have it any more."""
        world = await up(make_world)
        restless(world.session)
        world.gate = trio.Event()
        app = world.arrive(b"early")
        await world.settle()
        (near,) = world.session.streams.values()
        (far,) = world.far_session.streams.values()
        world.dialler.error = AWAY
        world.cut_all()
        await world.settle()
        if not lives:
            app.linger_reset = True
            app.close()
            await world.settle()
            assert far.outcome == ("reset", "connection reset")
        world.dialler.error = None
        world.session._absence.ended()
        world.session._changed.set()
        while near.link is None:
            await wait_all_tasks_blocked()
            world.client_reactor.turn_all()
            if near.link is None:
                world.move()
                world.server_reactor.turn_all()
        link = near.link
        assert link.protocol.state is Exchange.RESUMING
        sock: Any = link.sock
        world.gate.set()
        before = len(sock.writes)
        for _ in range(5):
            await wait_all_tasks_blocked()
        world.client_reactor.turn_all()
        assert near.state.opened and len(sock.writes) == before
        await world.settle()
        assert link.sock is not None and link.close_code is None, "no protocol error"
        if lives:
            assert far.state.opened and far.address == "10.0.0.5:5432"
            assert world.read(world.targets[-1]) == b"early"
            world.targets[-1].send(b"back")
            await world.settle()
            assert world.read(app) == b"back"
        else:
            assert world.targets[-1].reset_by_peer
            left_nothing(world)

    async def test_a_stream_whose_client_is_another_process_is_lost(self, make_world: Make) -> None:
        """The server was started anew: it does not know the stream, and the client must not open it afresh."""
        world = await up(make_world)
        app, _, near, target = await arrived(world)
        restless(world.session)
        world.make_server()
        world.listeners.clear()
        world.cut_all()
        await world.settle()
        assert near.outcome == ("lost", "the peer does not know the stream any more")
        assert target.reset_by_peer and app.reset_by_peer is False
        assert "127.0.0.1:8080" in world.listeners, "asked again"


class TestPlace:
    """What is listened on outlives the links, and is released in the end."""

    async def away(self, make_world: Make, **options: Any) -> World:
        world = make_world(reverse=[WEB], allow_listen=ANY, **options)
        world.run()
        await trio.sleep(3)
        world.dialler.error = AWAY
        world.cut_all()
        await trio.sleep(0.1)
        assert not world.far_session.links
        return world

    async def test_it_is_kept_for_the_resume_window(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = await self.away(make_world, resume_window=100)
        listener = world.listeners["127.0.0.1:8080"]
        await trio.sleep(98)
        assert not listener.closed
        await trio.sleep(3)
        assert listener.closed
        assert not world.server._sessions and not world.server.places._places
        assert lines("client gone", "server")

    async def test_streams_do_not_lengthen_it(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(reverse=[WEB], allow_listen=ANY, resume_window=100)
        world.run()
        await trio.sleep(3)
        app, other = world.arrive(b"x"), world.arrive(b"y")
        await trio.sleep(1)
        assert len(world.dialled) == 2
        world.dialler.error = AWAY
        world.cut_all()
        await trio.sleep(50)
        other.linger_reset = True
        other.close()
        await trio.sleep(1)
        assert len(world.far_session.streams) == 1
        await trio.sleep(48)
        assert not world.listeners["127.0.0.1:8080"].closed and not app.reset_by_peer
        await trio.sleep(3)
        assert world.listeners["127.0.0.1:8080"].closed and app.reset_by_peer
        assert not world.server._sessions

    async def test_a_link_in_time_keeps_it(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = await self.away(make_world, resume_window=100)
        for _ in range(3):
            await trio.sleep(60)
            world.dialler.error = None
            await trio.sleep(20)
            assert world.far_session.links
            world.dialler.error = AWAY
            world.cut_all()
        await trio.sleep(98)
        assert not world.listeners["127.0.0.1:8080"].closed
        await trio.sleep(3)
        assert world.listeners["127.0.0.1:8080"].closed

    async def test_sleep_does_not_count(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = await self.away(make_world, resume_window=100)
        await trio.sleep(90)
        world.suspended = 1000.0
        await trio.sleep(98)
        assert not world.listeners["127.0.0.1:8080"].closed
        await trio.sleep(4)
        assert world.listeners["127.0.0.1:8080"].closed

    async def test_without_resumption_it_goes_with_the_last_link(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(reverse=[WEB], allow_listen=ANY, resume_window=0)
        world.run()
        await trio.sleep(3)
        world.dialler.error = AWAY
        world.cut_all()
        await trio.sleep(0.1)
        assert world.listeners["127.0.0.1:8080"].closed and not world.server._sessions

    async def test_connections_that_come_meanwhile_wait(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = await self.away(make_world)
        apps = [world.arrive(b"%d" % number) for number in range(3)]
        await trio.sleep(4)
        assert len(world.far_session.ingress.waiting) == 3
        world.dialler.error = None
        await trio.sleep(5)
        assert sorted(world.read(target) for target in world.targets) == [b"0", b"1", b"2"]
        assert not any(app.reset_by_peer for app in apps)

    async def test_bye_releases_it_at_once(self, make_world: Make) -> None:
        world = await up(make_world)
        app, _, _, target = await arrived(world)
        world.session.stop()
        await world.settle()
        assert world.listeners["127.0.0.1:8080"].closed
        assert not world.server._sessions and not world.server.places._places
        assert app.reset_by_peer and target.reset_by_peer

    async def test_the_servers_end_releases_it(self, make_world: Make) -> None:
        world = await up(make_world)
        world.server.stop()
        await world.settle()
        assert world.listeners["127.0.0.1:8080"].closed
        assert world.server.gone.is_set()


class TestTakeOver:
    """The user's next session has the place; nobody who connects notices."""

    async def next(self, world: World, *specs: str, user: str = "alice") -> ClientSession:
        session = world.make_client(*(specs or [WEB]), dialler=FakeDialler(world, user=user))
        world.nursery.start_soon(session.keep_links)
        await world.settle()
        restless(session)
        return session

    async def test_from_one_that_was_killed(self, make_world: Make, lines: LogLines) -> None:
        world = await up(make_world)
        first = world.session
        listener = world.listeners["127.0.0.1:8080"]
        first._stopping = True  # killed: it dials no more
        world.cut_all()
        await world.settle()
        app = world.arrive(b"waits")
        await world.settle()
        second = await self.next(world)
        assert world.listeners["127.0.0.1:8080"] is listener and not listener.closed
        assert world.read(world.targets[-1]) == b"waits" and not app.reset_by_peer
        (stream,) = second.streams.values()
        assert stream.target == "tcp:web:80"
        (session,) = world.server._sessions.values()
        assert session.id == second.id and place(session).owner is session.reverse
        assert lines("session displaced by the user's next one")

    async def test_what_waits_names_the_next_ones_forward(self, make_world: Make) -> None:
        world = await up(make_world)
        world.session._stopping = True
        world.cut_all()
        await world.settle()
        world.arrive(b"waits")
        await world.settle()
        second = await self.next(world, "9090:other:90", "8080:web:81")
        assert [stream.target for stream in second.streams.values()] == ["tcp:web:81"]
        assert world.read(world.targets[-1]) == b"waits"

    async def test_what_is_not_taken_over_ends_soon(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(reverse=[WEB, "9090:web:90"], allow_listen=ANY)
        world.run()
        await trio.sleep(3)
        world.arrive(b"x")
        await trio.sleep(1)
        (near,) = world.session.streams.values()
        world.session._stopping = True
        world.cut_all()
        await trio.sleep(1)
        second = world.make_client(WEB)
        world.nursery.start_soon(second.keep_links)
        await trio.sleep(TAKE_OVER_SECONDS - 0.5)
        assert not world.listeners["127.0.0.1:9090"].closed
        await trio.sleep(1)
        assert world.listeners["127.0.0.1:9090"].closed
        assert not world.listeners["127.0.0.1:8080"].closed
        (session,) = world.server._sessions.values()
        assert session.id == second.id and near.state.id not in session.streams

    async def test_one_that_comes_back_at_once_is_not_displaced(
        self, make_world: Make, autojump_clock: MockClock
    ) -> None:
        world = make_world(reverse=[WEB], allow_listen=ANY)
        world.run()
        await trio.sleep(3)
        world.dialler.error = AWAY
        world.cut_all()
        await trio.sleep(0.01)
        second = world.make_client()
        world.nursery.start_soon(second.keep_links)
        await trio.sleep(0.1)
        world.dialler.error = None
        await trio.sleep(TAKE_OVER_SECONDS * 2)
        assert len(world.server._sessions) == 2
        assert not world.listeners["127.0.0.1:8080"].closed

    async def test_from_one_that_lives(self, make_world: Make, lines: LogLines) -> None:
        world = await up(make_world)
        app, far, near, target = await arrived(world)
        listener = world.listeners["127.0.0.1:8080"]
        second = await self.next(world)
        assert not listener.closed and world.listeners["127.0.0.1:8080"] is listener
        (line,) = lines("the server does not listen for -R: another client of the same user has it now")
        assert line["retry"] == "no"
        assert world.session.reverse.need == 0
        world.arrive(b"new")
        await world.settle()
        assert len(second.streams) == 1 and len(world.session.streams) == 1
        app.send(b"goes on")
        await world.settle()
        assert world.read(target) == b"goes on", "streams that are there stay where they are"
        assert far.link is not None and near.link is not None

    async def test_who_lost_it_does_not_ask_for_it_again(self, make_world: Make, autojump_clock: MockClock) -> None:
        world = make_world(reverse=[WEB, "9090:web:90"], allow_listen=ANY)
        world.run()
        await trio.sleep(3)
        second = world.make_client(WEB)
        world.nursery.start_soon(second.keep_links)
        await trio.sleep(3 * RETRY_SECONDS)
        world.cut_all()
        await trio.sleep(3 * RETRY_SECONDS)
        sessions = {session.id: session for session in world.server._sessions.values()}
        assert list(sessions[world.session.id].reverse._by_id) == ["2"]
        assert list(sessions[second.id].reverse._by_id) == ["1"]

    async def test_who_lost_all_stays_all_the_same(self, make_world: Make) -> None:
        """A unit that is started again on failure would take it back, and so on for ever."""
        world = make_world(allow_listen=ANY)
        first = world.make_client(WEB, only=True)
        world.nursery.start_soon(first.keep_links)
        await world.settle()
        world.arrive(b"x")
        await world.settle()
        await self.next(world)
        assert first.reverse._asked["1"].taken
        assert first.reverse.failure is None and len(first.streams) == 1
        first.reverse.answered(Listening(forward="1", code="forbidden", message="no"), 0.0)
        assert isinstance(first.reverse.failure, ServerRefusedError)

    async def test_unless_it_is_to_end_then_and_it_says_goodbye(
        self, tmp_path: Path, raises: Callable[..., Any]
    ) -> None:
        async with serving(tmp_path, allow_listen=(parse_listen_rule("*:*"),)) as server:
            reverse = parse_reverse(f"{free_port()}:127.0.0.1:1")
            with raises(LocalError, "another client"):
                async with connecting(server.url, reverse_forwards=reverse, exit_on_forward_failure=True) as client:
                    await until(lambda: parked(client.session) == REVERSE_LINKS)
                    (session,) = server.server._sessions.values()
                    session.taken_over("1")  # it keeps the place: without a goodbye for the resume window
                    await trio.sleep_forever()
            await until(lambda: not server.server._sessions)

    async def test_an_application_that_has_yet_to_name_its_target_goes_along(self, tmp_path: Path) -> None:
        port = free_port()
        async with targets() as hosts, serving(tmp_path, allow_listen=(parse_listen_rule("*:*"),)) as server:
            echo = await hosts.echo()
            reverse = parse_reverse(f"{port}")
            async with connecting(server.url, "0:127.0.0.1:1", reverse_forwards=reverse) as one:
                await until(lambda: parked(one.session) == REVERSE_LINKS)
                app = await trio.open_tcp_stream("127.0.0.1", port)
                await app.send_all(b"\x05\x01\x00")
                assert await app.receive_some(2) == b"\x05\x00"
                async with connecting(server.url, reverse_forwards=reverse) as two:
                    await until(lambda: parked(two.session) == REVERSE_LINKS)
                    one.shutdown.set()
                    await until(lambda: len(server.server._sessions) == 1)
                    await app.send_all(b"\x05\x01\x00\x01\x7f\x00\x00\x01" + echo.to_bytes(2, "big"))
                    with trio.fail_after(limits.OPEN_WAIT_SECONDS / 2):
                        assert (await app.receive_some(100))[:2] == b"\x05\x00"
                    await app.send_all(b"hello")
                    assert await app.receive_some(100) == b"hello"
                    assert len(two.session.streams) == 1
                    await app.aclose()

    async def test_but_not_to_a_target_that_it_does_not_name(self, make_world: Make) -> None:
        world = await up(make_world, "8080")
        held = place(world.far_session)
        assert held.way() == (world.far_session.ingress, "1")
        await self.next(world)
        with pytest.raises(StreamError, match="the next client listens here for a target of its own"):
            held.way()

    async def test_nor_when_it_has_named_another_and_waits(self, make_world: Make) -> None:
        world = await up(make_world, "8080")
        world.session._stopping = True
        world.cut_all()
        await world.settle()
        ingress = world.far_session.ingress
        flow = ingress.make_flow("udp:dns:53", "192.0.2.1:6", forward="1", receive=lambda _: True)
        ingress.accepted(Wanted(flow.target, flow.peer, forward="1", flow=flow))
        errors: list[StreamError] = []

        async def ask() -> None:
            try:
                await ingress.connect("tcp:db:5432", "192.0.2.1:5", forward="1")
            except StreamError as error:
                errors.append(error)

        world.nursery.start_soon(ask)
        await world.settle()
        assert len(ingress.waiting) == 2
        await self.next(world)
        assert [error.code for error in errors] == ["unreachable"]
        assert flow.outcome is not None and flow.outcome[0] == "unreachable"
        assert not world.dialled

    @pytest.mark.parametrize("mode", ["666", "600"])
    async def test_a_files_permissions_are_as_the_new_one_asks(self, tmp_path: Path, mode: str) -> None:
        path = tmp_path / "x.sock"
        async with (
            serving(tmp_path, allow_listen=(parse_listen_rule(f"unix:{path}"),)) as server,
            connecting(server.url, reverse_forwards=parse_reverse(f"{path}:web:80;mode=640")) as one,
        ):
            await until(lambda: parked(one.session) == REVERSE_LINKS)
            assert oct(path.stat().st_mode & 0o777) == "0o640"
            async with connecting(server.url, reverse_forwards=parse_reverse(f"{path}:web:80;mode={mode}")) as two:
                await until(lambda: parked(two.session) == REVERSE_LINKS)
                assert oct(path.stat().st_mode & 0o777) == f"0o{mode}"
                assert one.session.reverse._asked["1"].taken

    async def test_permissions_that_cannot_be_changed_are_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(file: unix.SocketFile, mode: int) -> None:
            raise LocalError(f"cannot listen on {file.path} with mode {mode:o}: Operation not permitted")

        monkeypatch.setattr(unix.SocketFile, "permit", refuse)
        path = tmp_path / "x.sock"
        async with (
            serving(tmp_path, allow_listen=(parse_listen_rule(f"unix:{path}"),)) as server,
            connecting(server.url, reverse_forwards=parse_reverse(f"{path}:web:80")) as one,
        ):
            await until(lambda: parked(one.session) == REVERSE_LINKS)
            async with connecting(server.url, reverse_forwards=parse_reverse(f"{path}:web:80;mode=666")) as two:
                (asked,) = two.session.reverse._asked.values()
                await until(lambda: asked.refused)
                assert asked.refused == f"cannot listen on {path} with mode 666: Operation not permitted"
                assert asked.retry_at is not None and not one.session.reverse._asked["1"].taken

    async def test_another_user_is_told_that_it_is_in_use(
        self, make_world: Make, autojump_clock: MockClock, lines: LogLines
    ) -> None:
        world = make_world(reverse=[WEB], allow_listen=ANY, resume_window=100)
        world.run()
        await trio.sleep(3)
        other = world.make_client(WEB, dialler=FakeDialler(world, user="bob"))
        world.nursery.start_soon(other.keep_links)

        async def sweep() -> None:
            while True:
                await trio.sleep(1)
                other.sweep(trio.current_time())

        world.nursery.start_soon(sweep)
        await trio.sleep(3 * RETRY_SECONDS)
        assert len(lines("the server does not listen for -R: cannot listen on 127.0.0.1:8080: the port is in use")) == 1
        assert len(world.server.places._places) == 1
        world.session._stopping = True
        world.cut_all()
        await trio.sleep(90)
        assert [line["principal"] for line in lines("listening for a client")] == ["alice"]
        await trio.sleep(30)
        assert [line["principal"] for line in lines("listening for a client")] == ["alice", "bob"]

    async def test_it_may_become_a_proxy(self, make_world: Make) -> None:
        world = await up(make_world)
        await self.next(world, "8080")
        (session,) = [each for each in world.server._sessions.values() if each.id != world.session.id]
        assert place(session).forward.speaks == ("socks",)
        assert not world.listeners["127.0.0.1:8080"].closed

    async def test_port_0_is_nobodys_to_take(self, make_world: Make) -> None:
        world = await up(make_world, "0:web:80")
        await self.next(world, "0:web:80")
        assert len(world.listeners) == 2
        assert not any(listener.closed for listener in world.listeners.values())


class FakeServer:
    """A server's ends of all of a client's links, free to break every rule. It has greeted, and says no more."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.dialler.greets = False
        self.decoders: dict[NamedSocket, FrameDecoder] = {}
        self.got: dict[NamedSocket, list[AnyMessage]] = {}
        self.by_role: dict[str, list[NamedSocket]] = {}

    async def settle(self) -> None:
        """Greet those who are new, until there are none."""
        greeted = True
        while greeted:
            greeted = False
            await self.world.settle()
            for _, sock in self.world.dialler.ends:
                decoder = self.decoders.setdefault(sock, FrameDecoder(masked=True))
                data = bytes(sock.incoming.arrived)
                sock.incoming.arrived.clear()
                for opcode, payload, _ in decoder.feed(data):
                    if opcode != Opcode.TEXT:
                        continue
                    message = decode(bytes(payload))
                    self.got.setdefault(sock, []).append(message)
                    if isinstance(message, Hello):
                        self.by_role.setdefault(message.role, []).append(sock)
                        self.send(
                            sock,
                            Welcome(
                                version=VERSION, server="s" * 22, boot="b" * 22, resume_window=300, features=[*FEATURES]
                            ),
                        )
                        greeted = True

    def send(self, sock: NamedSocket, *parts: Message) -> None:
        for part in parts:
            sock.send(encode_frame(Opcode.TEXT, encode(part)))

    @property
    def control(self) -> NamedSocket:
        return self.by_role["control"][0]

    async def answer(self, sock: NamedSocket, *parts: Message) -> list[AnyMessage]:
        self.got[sock] = []
        self.send(sock, *parts)
        await self.settle()
        return [message for message in self.got[sock] if not isinstance(message, Ping)]


class TestSeizedServer:
    """A server that somebody has taken over reaches nothing that the user did not name."""

    async def seize(self, make_world: Make, *specs: str) -> tuple[World, FakeServer]:
        world = make_world(reverse=specs or [WEB])
        server = FakeServer(world)
        world.nursery.start_soon(world.session.keep_links)
        await server.settle()
        server.send(server.control, Need(links=2))
        await server.settle()
        assert len(server.by_role["reverse"]) == 2
        return world, server

    async def test_the_client_says_only_where_to_listen(self, make_world: Make) -> None:
        _, server = await self.seize(make_world, WEB, "*:1080", "/run/x.sock:web:80;mode=660")
        assert [message for message in server.got[server.control] if isinstance(message, Listen)] == [
            Listen(forward="1", bind="tcp:127.0.0.1:8080"),
            Listen(forward="2", bind="socks:*:1080"),
            Listen(forward="3", bind="unix:/run/x.sock;mode=660"),
        ]

    async def test_only_the_forwards_own_target_is_dialled(self, make_world: Make) -> None:
        world, server = await self.seize(make_world)
        sock = server.by_role["reverse"][0]
        opening = Open(n=1, stream=identify(1), forward="1", target="tcp:intranet:22", peer="192.0.2.9:1")
        assert await server.answer(sock, opening) == [Opened(n=1, address="10.0.0.5:5432")]
        assert world.dialled == ["tcp:web:80"]

    @pytest.mark.parametrize("forward", ["", "0", "2", "01", "x" * 64])
    async def test_a_forward_that_is_none_is_forbidden(self, make_world: Make, forward: str) -> None:
        world, server = await self.seize(make_world)
        sock = server.by_role["reverse"][0]
        opening = Open(n=1, stream=identify(1), forward=forward, target="tcp:intranet:22")
        assert await server.answer(sock, opening) == [Reset(n=1, code="forbidden", message="no such forward")]
        assert not world.dialled

    @pytest.mark.parametrize(
        "target",
        ["tcp:169.254.169.254:80", "tcp:[::ffff:169.254.169.254]:80", "tcp:[fd00:ec2::254]:80", "unix:/run/docker.sock",
         "tcp:168.63.129.16:80", "", "nonsense", "tcp:web"],
    )  # fmt: skip
    async def test_a_dynamic_forward_has_the_default_policy(self, make_world: Make, target: str) -> None:
        world, server = await self.seize(make_world, "1080")
        sock = server.by_role["reverse"][0]
        (refused,) = await server.answer(sock, Open(n=1, stream=identify(1), forward="1", target=target))
        assert isinstance(refused, Reset) and refused.code == "forbidden"
        assert not world.dialled

    async def test_a_dynamic_forward_dials_what_the_application_named(self, make_world: Make) -> None:
        world, server = await self.seize(make_world, "1080")
        sock = server.by_role["reverse"][0]
        opening = Open(n=1, stream=identify(1), forward="1", target="tcp:127.0.0.1:22")
        assert await server.answer(sock, opening) == [Opened(n=1, address="10.0.0.5:5432")]
        assert world.dialled == ["tcp:127.0.0.1:22"]

    @pytest.mark.parametrize("role", ["forward", "control"])
    async def test_open_on_another_link_ends_that_link(self, make_world: Make, role: str) -> None:
        world, server = await self.seize(make_world)
        sock = server.by_role[role][0]
        lost: Any = sock.peer
        await server.answer(sock, Open(n=1, stream=identify(1), forward="1"))
        assert not world.dialled
        assert all(link.sock is not lost or link._closing_at is not None for link in world.session.links)

    async def test_open_with_the_id_of_a_live_stream_ends_its_link(self, make_world: Make) -> None:
        world, server = await self.seize(make_world)
        one, two = server.by_role["reverse"][:2]
        await server.answer(one, Open(n=1, stream=identify(1), forward="1"))
        await server.answer(two, Open(n=1, stream=identify(1), forward="1"))
        assert world.dialled == ["tcp:web:80"]
        assert len(world.session.streams) == 1

    async def test_an_id_that_the_client_did_not_know_is_refused_later(self, make_world: Make) -> None:
        world, server = await self.seize(make_world)
        assert await server.answer(server.control, Detached(streams=[identify(1)])) == [
            Gone(outcome="unknown", stream=identify(1))
        ]
        sock = server.by_role["reverse"][0]
        assert await server.answer(sock, Open(n=1, stream=identify(1), forward="1")) == [
            Reset(n=1, code="forbidden", message="this stream id was used before")
        ]
        assert not world.dialled

    async def test_with_no_memory_left_it_is_told_so(self, make_world: Make) -> None:
        world, server = await self.seize(make_world)
        budget = world.session.principal.budget
        budget.charge(budget.capacity * 3 // 4 + 1)
        (refused,) = await server.answer(server.by_role["reverse"][0], Open(n=1, stream=identify(1), forward="1"))
        assert isinstance(refused, Reset) and refused.code == "limit"

    async def test_listening_for_what_was_not_asked_is_ignored(self, make_world: Make, lines: LogLines) -> None:
        world, server = await self.seize(make_world)
        assert (
            await server.answer(
                server.control,
                Listening(forward="9", address="127.0.0.1:1"),
                Listening(forward="", code="forbidden", message="no"),
            )
            == []
        )
        assert world.session.reverse.failure is None
        assert not lines("listening 127.0.0.1:1 at the server -> tcp:web:80")

    async def test_what_it_says_is_escaped_in_the_log(self, make_world: Make, lines: LogLines) -> None:
        _, server = await self.seize(make_world)
        await server.answer(
            server.control,
            Listening(forward="1", address="\x1b[2J\n"),
            Listening(forward="1", code="x", message="\x1b[2J\n"),
        )
        said = [line for line in lines.all() if "-R" in line or "at the server" in line]
        assert len(said) == 2 and not any("\x1b" in line or "\n" in line for line in said)


class TestRawClient:
    async def test_bye_with_a_place(self, make_world: Make) -> None:
        world = make_world(allow_listen=ANY)
        peer = Peer(world)
        await peer.send(raw(), Listen(forward="f", bind="tcp:127.0.0.1:8080"))
        await peer.send(Bye())
        assert peer.closed == (1000, "the client said goodbye")
        assert world.listeners["127.0.0.1:8080"].closed

    async def test_what_waits_for_a_link_is_opened_as_soon_as_it_is_welcomed(self, make_world: Make) -> None:
        world = make_world(allow_listen=ANY)
        control = Peer(world)
        await control.send(raw(), Listen(forward="f", bind="tcp:127.0.0.1:8080"))
        world.arrive(b"early")
        assert await control.receive() == [Need(links=REVERSE_LINKS + 1)]
        link = Peer(world)
        welcome, opening = await link.send(raw("reverse"))
        assert isinstance(welcome, Welcome) and isinstance(opening, Open)
        assert (opening.forward, opening.target, link.data) == ("f", "", b"early")
        assert opening.peer.startswith("192.0.2.1:")

    async def test_unlisten_leaves_streams_alone(self, make_world: Make) -> None:
        world = make_world(allow_listen=ANY)
        control, link = Peer(world), Peer(world)
        await control.send(raw(), Listen(forward="f", bind="tcp:127.0.0.1:8080"))
        await link.send(raw("reverse"))
        app = world.arrive(b"early")
        assert await link.receive()
        await control.send(Unlisten(forward="f"))
        assert not app.reset_by_peer
        await link.send(Opened(n=1, address="a"))
        app.send(b"more")
        await link.receive()
        assert link.data == b"earlymore"


def allowing(*rules: str) -> dict[str, Any]:
    return {"allow_listen": tuple(map(parse_listen_rule, rules))}


class TestOverLoopback:
    """Real sockets: bytes, ends, a Unix socket, a proxy, and a place that is released."""

    async def test_tcp(self, tmp_path: Path, lines: LogLines) -> None:
        async with targets() as egress, serving(tmp_path, **allowing("*:*")) as server:
            echo = await egress.echo()
            specs = parse_reverse(f"0:127.0.0.1:{echo}")
            async with connecting(server.url, reverse_forwards=specs) as client:
                await until(lambda: parked(client.session) == REVERSE_LINKS)
                (session,) = server.sessions()
                port = int(place(session).name.rpartition(":")[2])
                assert await exchange(port, b"x" * 1_000_000) == b"x" * 1_000_000
            await until(lambda: not server.sessions())
            with pytest.raises(OSError):
                await application(port)

    async def test_streams_survive_cuts(self, tmp_path: Path) -> None:
        data = os.urandom(3_000_000)
        async with targets() as egress, serving(tmp_path, **allowing("*:*")) as server:
            echo = await egress.echo()
            specs = parse_reverse(f"0:127.0.0.1:{echo}")
            async with connecting(server.url, reverse_forwards=specs) as client:
                await until(lambda: parked(client.session) == REVERSE_LINKS)
                port = int(place(server.sessions()[0]).name.rpartition(":")[2])
                got = b""
                async with await application(port) as app, trio.open_nursery() as nursery:

                    async def send() -> None:
                        await app.send_all(data)
                        await app.send_eof()

                    nursery.start_soon(send)
                    with trio.fail_after(30):
                        async for chunk in app:
                            before, got = len(got) // 1_000_000, got + chunk
                            if len(got) // 1_000_000 > before:
                                for link in list(client.session.links):
                                    link.lose("cut")
                assert got == data

    async def test_a_unix_socket_at_the_server(self, tmp_path: Path) -> None:
        path = tmp_path / "place.sock"
        async with targets() as egress, serving(tmp_path, **allowing(f"unix:{tmp_path}/*.sock")) as server:
            echo = await egress.echo()
            specs = parse_reverse(f"{path}:127.0.0.1:{echo};mode=660")
            async with connecting(server.url, reverse_forwards=specs) as client:
                await until(lambda: parked(client.session) == REVERSE_LINKS)
                assert path.stat().st_mode & 0o777 == 0o660
                with trio.fail_after(10):
                    async with await trio.open_unix_socket(str(path)) as stream:
                        await stream.send_all(b"hello")
                        assert await stream.receive_some() == b"hello"
            await until(lambda: not path.exists())

    async def test_a_socks_proxy_at_the_server(self, tmp_path: Path) -> None:
        async with targets() as egress, serving(tmp_path, **allowing("*:*")) as server:
            echo = await egress.echo()
            async with connecting(server.url, reverse_forwards=parse_reverse("0")) as client:
                await until(lambda: parked(client.session) == REVERSE_LINKS)
                port = int(place(server.sessions()[0]).name.rpartition(":")[2])
                with trio.fail_after(10):
                    async with await application(port) as app:
                        await app.send_all(b"\x05\x01\x00")
                        assert await app.receive_some() == b"\x05\x00"
                        await app.send_all(b"\x05\x01\x00\x01\x7f\0\0\1" + echo.to_bytes(2, "big") + b"early")
                        got = b""
                        while not got.endswith(b"early"):
                            chunk = await app.receive_some()
                            assert chunk
                            got += chunk
                        assert got[:2] == b"\x05\x00"
                    async with await application(port) as app:
                        await app.send_all(b"\x05\x01\x00\x05\x01\x00\x01\xa9\xfe\xa9\xfe\x00\x50")
                        got = b""
                        while len(got) < 4:
                            chunk = await app.receive_some()
                            assert chunk
                            got += chunk
                        assert got[2:4] == b"\x05\x02", "not allowed by ruleset"

    async def test_one_that_is_in_use(self, tmp_path: Path, lines: LogLines) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            async with targets() as egress, serving(tmp_path, **allowing("*:*")) as server:
                echo = await egress.echo()
                specs = parse_reverse(f"{port}:127.0.0.1:{echo}") + parse_reverse(f"0:127.0.0.1:{echo}")
                async with connecting(server.url, reverse_forwards=specs) as client:
                    await until(lambda: parked(client.session) == REVERSE_LINKS)
                    (session,) = server.sessions()
                    free = int(place(session, "2").name.rpartition(":")[2])
                    assert await exchange(free) == b"ping"
                    assert list(session.reverse._by_id) == ["2"]

    async def test_a_target_that_refuses(self, tmp_path: Path) -> None:
        port = free_port()
        specs = parse_reverse(f"0:127.0.0.1:{port}")
        async with (
            serving(tmp_path, **allowing("*:*")) as server,
            connecting(server.url, reverse_forwards=specs) as client,
        ):
            await until(lambda: parked(client.session) == REVERSE_LINKS)
            listening = int(place(server.sessions()[0]).name.rpartition(":")[2])
            stream = await application(listening)
            assert await reset_code(stream) == "reset"
            await stream.aclose()
