"""Datagram flows: from a listener's socket over a link to the target's, and back; in memory, by Trio's clock."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.datagrams import MemoryDatagrams
from tests.roles import LogLines, World, lines, make_world  # lines and make_world are fixtures
from tests.test_resumption import left_nothing
from wstunnel import egress as egress_module
from wstunnel import flows as flows_module
from wstunnel import limits, reverse_server
from wstunnel import server as server_module
from wstunnel import server_session as server_session_module
from wstunnel.dial import Begun, _permitted_family
from wstunnel.egress import REFUSAL_SECONDS
from wstunnel.endpoints.listeners import Bound
from wstunnel.endpoints.udp import REFUSED_SECONDS, UdpListener
from wstunnel.errors import LocalError, StreamError
from wstunnel.flow import READ_DATAGRAMS, DialledFlow, Flow
from wstunnel.flows import LOG_LINES, REFUSAL_LINES
from wstunnel.forwards import Forward
from wstunnel.ingress import FLOW_TURN, Wanted
from wstunnel.policy import Policy, parse_rule
from wstunnel.stream import Stream
from wstunnel.targets import Target, address_family
from wstunnel.wire.datagrams import HEADER_BYTES
from wstunnel.wire.messages import FEATURES, Hello
from wstunnel.wire.states import Exchange

__all__ = ["lines", "make_world"]

TARGET = "udp:127.0.0.1:53"
ONE, TWO = ("192.0.2.1", 5001), ("192.0.2.2", 5002)
OLD = tuple(name for name in FEATURES if name != "udp")


class Datagrams:
    """A world with a UDP forward.

    Attributes:
        sock: what the forward listens on.
        listener: on it.
        targets: the sockets that the egress has made, in order.
        resolve: what resolves names, as the last dial was told.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.sock = MemoryDatagrams()
        self.targets: list[MemoryDatagrams] = []
        self.resolve: Any = None
        self.listener: UdpListener

    def begin_dial(self, target: Target, policy: Policy, sources: object) -> Begun | None:
        family = _permitted_family(target, policy)
        if target.kind != "udp" or family is None:
            return None
        self.world.dialled.append(str(target))
        if self.world.refusal is not None:
            raise self.world.refusal
        self.targets.append(MemoryDatagrams())
        return Begun(self.targets[-1], (target.host, target.port), True)  # type: ignore[arg-type]

    async def dial_target(self, target: Target, policy: Policy, **options: Any) -> tuple[Any, str]:
        self.resolve = options.pop("resolve", None)
        sock, address = await self.world.dial_target(target, policy, **options)
        if target.kind != "udp":
            return sock, address
        self.targets.append(MemoryDatagrams())
        return self.targets[-1], "10.0.0.5:53"

    def listen(self, target: str = TARGET) -> None:
        self.listener = UdpListener(self.sock, self.world.session.ingress, target=target)  # type: ignore[arg-type]
        self.listener.start(self.world.client_reactor)  # type: ignore[arg-type]

    async def arrive(self, *datagrams: bytes, source: tuple[str, int] = ONE) -> None:
        self.sock.arrive(*datagrams, source=source)
        await self.world.settle()

    @property
    def near(self) -> list[Flow]:
        """The client's flows."""
        return list(self.world.session.flows._flows.values())

    @property
    def far(self) -> list[Flow]:
        """The server's."""
        return list(self.world.far_session.flows._flows.values())

    def left_nothing(self) -> None:
        assert not self.near
        assert not self.far
        assert self.world.session.principal.streams == self.world.far_session.principal.streams == 0
        assert self.world.session.principal.budget.held == self.world.far_session.principal.budget.held == 0
        assert all(target.closed for target in self.targets)
        for session in (self.world.session, self.world.far_session):
            for link in session.links:
                assert link.stream is None
                assert link.protocol.state is Exchange.IDLE


Make = Callable[..., Datagrams]


@pytest.fixture
def make(make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> Make:
    def make(**options: Any) -> Datagrams:
        datagrams = Datagrams(make_world(**options))
        monkeypatch.setattr(egress_module, "begin_dial", datagrams.begin_dial)
        monkeypatch.setattr(egress_module, "dial_target", datagrams.dial_target)
        return datagrams

    return make


async def warm(make: Make, target: str = TARGET, **options: Any) -> Datagrams:
    datagrams = make(**options)
    await datagrams.world.warm()
    datagrams.listen(target)
    return datagrams


class TestThereAndBack:
    async def test_each_datagram_arrives_whole(self, make: Make, lines: LogLines) -> None:
        it = await warm(make)
        await it.arrive(b"one", b"", b"three")
        (target,) = it.targets
        assert target.take() == [b"one", b"", b"three"]
        assert it.world.dialled == [TARGET]
        target.arrive(b"ONE", b"")
        await it.world.settle()
        assert it.sock.sent == [(b"ONE", ONE, []), (b"", ONE, [])]
        for role in ("client", "server"):
            (opened,) = lines("flow opened", role)
            assert opened["target"] == TARGET
            assert opened["address"] == "127.0.0.1:53"
        assert lines("flow opened", "server")[0]["application"] == "192.0.2.1:5001"
        assert lines("flow opened", "client")[0]["peer"] == "192.0.2.1:5001"

    async def test_open_and_the_first_datagrams_are_one_write(self, make: Make) -> None:
        it = await warm(make)
        link = list(it.world.session.ingress.idle)[-1]
        sock: Any = link.sock
        sock.writes.clear()
        it.sock.arrive(*[bytes([number]) * 100 for number in range(30)], source=ONE)
        it.world.client_reactor.turn(it.listener)
        assert len(sock.writes) <= 2  # `open` with the first, the rest together
        await it.world.settle()
        (target,) = it.targets
        assert len(target.take()) == 30
        sock.writes.clear()
        it.sock.arrive(*[bytes(100)] * 30, source=ONE)
        it.world.client_reactor.turn(it.listener)
        assert len(sock.writes) == 1

    async def test_each_source_has_its_flow(self, make: Make) -> None:
        it = await warm(make)
        it.sock.arrive(b"a", source=ONE)
        it.sock.arrive(b"b", source=TWO)
        await it.arrive(b"c", source=ONE)
        first, second = sorted(it.targets, key=lambda target: target.sent)
        assert (first.take(), second.take()) == ([b"a", b"c"], [b"b"])
        second.arrive(b"for two")
        first.arrive(b"for one")
        await it.world.settle()
        assert sorted(it.sock.sent, key=str) == [(b"for one", ONE, []), (b"for two", TWO, [])]

    async def test_a_turn_reads_no_more_than_the_queue_holds(self, make: Make) -> None:
        it = await warm(make)
        many = [number.to_bytes(2, "big") + bytes(1398) for number in range(200)]
        await it.arrive(*many)
        assert it.targets[0].take() == many
        it.targets[0].arrive(*many)
        await it.world.settle()
        assert it.sock.take() == many
        assert it.near[0].lost() == it.far[0].lost() == 0

    async def test_a_turn_reads_few_however_small_they_are(self, make: Make) -> None:
        it = await warm(make)
        await it.arrive(b"first")
        it.sock.arrive(*[b""] * 1000, source=ONE)
        it.targets[0].arrive(*[b""] * 1000)
        it.world.client_reactor.turn(it.listener)
        it.world.server_reactor.turn(it.far[0])
        assert len(it.sock.arrived) == len(it.targets[0].arrived) == 1000 - READ_DATAGRAMS
        await it.world.settle()
        assert len(it.targets[0].take()) == len(it.sock.take()) + 1 == 1001

    async def test_one_that_is_too_long_is_lost_and_nothing_else(self, make: Make, lines: LogLines) -> None:
        """Over IPv6 there are such."""
        it = await warm(make)
        for reactor in (it.world.client_reactor, it.world.server_reactor):
            reactor.scratch = memoryview(bytearray(limits.SCRATCH_BYTES))
        await it.arrive(b"one")
        link = it.near[0].link
        long = [bytes(limits.DATAGRAM_BYTES + 1), bytes(limits.DATAGRAM_BYTES + 20)]
        await it.arrive(*long, b"two")
        it.targets[0].arrive(*long, b"back")
        await it.world.settle()
        assert it.targets[0].take() == [b"one", b"two"]
        assert it.sock.take() == [b"back"]
        assert it.near[0].link is link
        assert it.near[0].lost() == it.far[0].lost() == 2
        assert not lines("fault in our own code")

    async def test_a_full_socket_loses_datagrams_and_nothing_else(self, make: Make, lines: LogLines) -> None:
        it = await warm(make)
        await it.arrive(b"first")
        (target,) = it.targets
        target.full = it.sock.full = True
        await it.arrive(b"lost")
        target.arrive(b"lost, too")
        await it.world.settle()
        target.full = it.sock.full = False
        await it.arrive(b"second")
        target.arrive(b"back")
        await it.world.settle()
        assert target.take() == [b"first", b"second"]
        assert it.sock.take() == [b"back"]
        it.world.session.close(1000, "done")
        await it.world.settle()
        assert [line["dropped"] for line in lines("flow ended")] == [1, 1]
        assert lines("flow ended", "client")[0]["sent"] == 3
        assert lines("flow ended", "client")[0]["received"] == 2

    async def test_a_link_that_is_full_drops_the_oldest(self, make: Make) -> None:
        it = await warm(make)
        await it.arrive(b"first")
        (flow,) = it.near
        link: Any = flow.link
        link.sock.outgoing.room = 100
        many = [number.to_bytes(2, "big") + bytes(998) for number in range(100)]
        await it.arrive(*many)
        assert link.blocked
        assert it.world.session.principal.budget.held <= limits.DATAGRAM_QUEUE_BYTES
        assert flow.lost() > 0
        link.sock.outgoing.room = None
        await it.world.settle()
        _, *got = it.targets[0].take()
        assert len(got) == 100 - flow.lost()
        assert got[-1] == many[-1]
        assert it.world.session.principal.budget.held == 0


class TestBeforeTheTargetIsThere:
    async def test_datagrams_wait_while_the_name_resolves(self, make: Make) -> None:
        it = await warm(make, "udp:db:53")
        it.world.gate = trio.Event()
        await it.arrive(b"one", b"two")
        await it.arrive(b"three")
        assert not it.targets
        it.world.gate.set()
        await it.world.settle()
        assert it.targets[0].take() == [b"one", b"two", b"three"]
        assert it.near[0].address == "10.0.0.5:53"

    async def test_at_most_64_kib_of_them(self, make: Make) -> None:
        it = await warm(make, "udp:db:53")
        it.world.gate = trio.Event()
        many = [number.to_bytes(2, "big") + bytes(998) for number in range(100)]
        await it.arrive(*many)
        it.world.gate.set()
        await it.world.settle()
        fits = limits.DATAGRAM_QUEUE_BYTES // (1000 + HEADER_BYTES)
        assert it.targets[0].take() == many[-fits:]
        assert it.far[0].lost() == 100 - fits
        assert it.world.far_session.principal.budget.held == 0

    async def test_a_flow_that_ends_meanwhile_has_no_socket(self, make: Make) -> None:
        it = await warm(make, "udp:db:53")
        it.world.gate = trio.Event()
        await it.arrive(b"one")
        it.near[0].reset("idle", "")
        await it.world.settle()
        it.world.gate.set()
        await it.world.settle()
        assert not it.targets
        it.left_nothing()

    async def test_a_socket_that_comes_too_late_is_closed(self, make: Make) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        flow = it.far[0]
        assert isinstance(flow, DialledFlow)
        it.near[0].reset("idle", "")
        await it.world.settle()
        late: Any = MemoryDatagrams()
        flow.connected(it.world.server_reactor, late, "127.0.0.1:53")  # type: ignore[arg-type]
        assert late.closed

    async def test_a_socket_that_cannot_be_watched(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        it = await warm(make)

        def refuse(*_: object, **__: object) -> None:
            raise LocalError("too many watches")

        monkeypatch.setattr(it.world.server_reactor, "adopt", refuse)
        await it.arrive(b"one")
        it.left_nothing()

    async def test_they_wait_for_a_link(self, make: Make) -> None:
        it = make()
        it.listen()
        await it.arrive(b"one", b"two")
        assert len(it.near) == 1
        await it.world.warm()
        assert it.targets[0].take() == [b"one", b"two"]

    async def test_not_for_ever(self, make: Make, mock_clock: MockClock, lines: LogLines) -> None:
        it = make()
        it.listen()
        await it.arrive(b"one")
        mock_clock.jump(limits.OPEN_WAIT_SECONDS)
        await it.world.settle()
        assert not it.near
        assert it.world.session.principal.budget.held == 0
        (line,) = lines("flow refused")
        assert (line["reason"], line["detail"]) == ("unreachable", "no link to the other end in time")
        await it.world.warm()
        assert not it.targets

    async def test_nor_longer_beside_a_stream_that_came_later(self, make: Make, mock_clock: MockClock) -> None:
        it = make()
        it.listen()
        await it.arrive(b"x")
        mock_clock.jump(limits.OPEN_WAIT_SECONDS / 2)
        it.world.connect(b"hello")
        await it.world.settle()
        assert len(it.world.session.ingress.waiting) == 2
        mock_clock.jump(limits.OPEN_WAIT_SECONDS / 2)
        await it.world.settle()
        assert not it.near and len(it.world.session.ingress.waiting) == 1
        mock_clock.jump(limits.OPEN_WAIT_SECONDS / 2)
        await it.world.settle()
        assert not it.world.session.ingress.waiting and it.world.session.principal.waiting == 0

    async def test_one_that_ended_while_it_waited_is_passed_over(self, make: Make) -> None:
        it = make()
        it.listen()
        it.sock.arrive(b"two", source=TWO)
        await it.arrive(b"one")
        it.near[0].reset("idle", "")
        await it.world.warm()
        assert [target.take() for target in it.targets] == [[b"one"]]


class TestEnds:
    async def test_idle_flows_end_and_their_link_is_used_again(
        self, make: Make, mock_clock: MockClock, lines: LogLines
    ) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        link = it.near[0].link
        mock_clock.jump(limits.UDP_IDLE_SECONDS - 1)
        it.world.session.sweep(trio.current_time())
        await it.world.settle()
        assert it.near
        mock_clock.jump(1)
        it.world.session.sweep(trio.current_time())
        await it.world.settle()
        it.left_nothing()
        assert [line["reason"] for line in lines("flow ended")] == ["idle", "idle"]
        assert link in it.world.session.ingress.idle
        await it.arrive(b"two")
        assert it.near[0].link is link
        assert it.targets[1].take() == [b"two"]

    @pytest.mark.parametrize("direction", ["there", "back"])
    async def test_a_datagram_keeps_it(self, make: Make, mock_clock: MockClock, direction: str) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        await it.arrive(b"one", source=TWO)
        for _ in range(3):
            mock_clock.jump(40)
            if direction == "there":
                await it.arrive(b"more")
            else:
                it.targets[0].arrive(b"more")
                await it.world.settle()
            it.world.session.sweep(trio.current_time())
            it.world.far_session.sweep(trio.current_time())
            await it.world.settle()
        assert [flow.peer for flow in it.near] == ["192.0.2.1:5001"]
        assert len(it.far) == 1

    async def test_the_servers_time(self, make: Make, mock_clock: MockClock) -> None:
        it = await warm(make)
        it.world.far_session.flows.timeout = 5
        await it.arrive(b"one")
        mock_clock.jump(5)
        it.world.far_session.sweep(trio.current_time())
        await it.world.settle()
        it.left_nothing()

    async def test_one_that_is_not_answered_stands_in_nobodys_way(self, make: Make, mock_clock: MockClock) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        await it.arrive(b"two", source=TWO)
        first = it.near[0]
        assert first.link is not None
        it.world.freeze(first.link)
        mock_clock.jump(limits.UDP_IDLE_SECONDS)
        for _ in range(2):
            it.world.session.sweep(trio.current_time())
            await it.world.settle()
        assert it.near == [first]
        await it.arrive(b"again")
        assert it.targets[2].take() == [b"again"], "the next datagram does not wait for the answer"
        first.link.lose("cut")
        await it.arrive(b"and again")
        assert it.targets[2].take() == [b"and again"]
        assert len(it.near) == 1

    async def test_what_comes_for_one_that_ends_is_held_by_nobody(self, make: Make) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        flow = it.far[0]
        assert isinstance(flow, DialledFlow)
        link: Any = flow.link
        link.sock.outgoing.room = 0
        it.targets[0].arrive(bytes(1000))
        it.world.server_reactor.turn(flow)
        flow.reset("idle", "")  # which the connection does not take
        await it.arrive(b"late", b"later")
        assert flow.lost() >= 2
        link.sock.outgoing.room = None
        await it.world.settle()
        it.left_nothing()

    async def test_a_flow_dies_with_its_link(self, make: Make, lines: LogLines) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        link = it.near[0].link
        assert link is not None
        it.world.cut(link)
        await it.world.settle()
        it.left_nothing()
        assert [line["reason"] for line in lines("flow ended")] == ["lost", "lost"]
        assert not it.world.session._detached
        await it.arrive(b"two")
        assert it.targets[1].take() == [b"two"]

    @pytest.mark.parametrize("call", ["receive", "send"])
    async def test_nobody_listens(self, make: Make, mock_clock: MockClock, lines: LogLines, call: str) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        it.targets[0].error = errno.ECONNREFUSED
        if call == "send":
            it.world.server_reactor.handlers.pop(it.far[0])  # nobody reads
            await it.arrive(b"two")
        await it.world.settle()
        it.left_nothing()
        for line in lines("flow ended"):
            assert (line["reason"], line["detail"]) == (
                "refused",
                "the target refused a datagram: nobody listens there",
            )
        await it.arrive(b"too soon")
        assert len(it.targets) == 1
        mock_clock.jump(REFUSED_SECONDS)
        await it.arrive(b"again")
        assert it.targets[1].take() == [b"again"]

    async def test_the_names_other_addresses_are_tried_next(
        self, make: Make, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        it = await warm(make, "udp:localhost:53")
        answers = [(0, 0, 0, "", ("10.0.0.5", 53)), (0, 0, 0, "", ("::1", 53, 0, 0)), (0, 0, 0, "", ("10.0.0.6", 53))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **_: list(answers))

        async def order(datagram: bytes) -> list[str]:
            mock_clock.jump(REFUSED_SECONDS)
            await it.arrive(datagram)
            return [answer[4][0] for answer in it.resolve("localhost", 53)]

        assert await order(b"one") == ["10.0.0.5", "::1", "10.0.0.6"]
        it.targets[0].error = errno.ECONNREFUSED
        await it.world.settle()
        assert await order(b"two") == ["::1", "10.0.0.6", "10.0.0.5"]
        (flow,) = it.far
        flow.address = "[::1]:53"
        it.targets[1].error = errno.EHOSTUNREACH
        await it.world.settle()
        assert await order(b"three") == ["10.0.0.6", "10.0.0.5", "::1"]
        it.targets[2].error = errno.ECONNREFUSED  # 10.0.0.5 again: ::1 has had longer to come back
        await it.world.settle()
        assert await order(b"four") == ["10.0.0.6", "::1", "10.0.0.5"]
        it.near[0].reset("refused", "the peer says so")
        await it.world.settle()
        assert await order(b"five") == ["10.0.0.6", "::1", "10.0.0.5"]

    async def test_not_so_many_addresses_are_remembered(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(egress_module, "REFUSALS", 2)
        egress = (await warm(make)).world.server.egress
        for address in ("10.0.0.1:53", "10.0.0.2:53", "10.0.0.1:53", "10.0.0.3:53"):
            egress._note_refusal(address)
        assert list(egress._refusals) == ["10.0.0.1:53", "10.0.0.3:53"]

    async def test_they_are_not_remembered_for_ever(self, make: Make, mock_clock: MockClock) -> None:
        egress = (await warm(make)).world.server.egress
        egress._note_refusal("10.0.0.1:53")
        egress._note_refusal("10.0.0.2:53")
        mock_clock.jump(REFUSAL_SECONDS / 2)
        egress._note_refusal("10.0.0.1:53")
        assert egress._lately_refusing() == ("10.0.0.2:53", "10.0.0.1:53")
        mock_clock.jump(REFUSAL_SECONDS / 2)
        assert egress._lately_refusing() == ("10.0.0.1:53",)
        mock_clock.jump(REFUSAL_SECONDS / 2)
        assert egress._lately_refusing() == ()
        assert not egress._refusals

    async def test_replies_before_the_refusal_arrive(self, make: Make) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        it.targets[0].arrive(b"reply")
        it.world.server_reactor.turn(it.far[0])
        it.targets[0].error = errno.ECONNREFUSED
        await it.world.settle()
        assert it.sock.take() == [b"reply"]

    async def test_no_way_to_the_target(self, make: Make, lines: LogLines) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        it.targets[0].error = errno.EHOSTUNREACH
        await it.world.settle()
        assert [line["reason"] for line in lines("flow ended")] == ["unreachable"] * 2

    @pytest.mark.parametrize("code", [errno.EMSGSIZE, errno.ENOBUFS, errno.EPERM])
    async def test_a_datagram_that_cannot_be_sent_ends_nothing(self, make: Make, code: int) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        (target,) = it.targets
        it.world.server_reactor.handlers.pop(it.far[0])
        target.error = code
        await it.arrive(b"two")
        await it.arrive(b"three")
        assert target.take() == [b"one", b"three"]
        assert it.far[0].lost() == 1

    async def test_an_error_on_the_listener_is_nobodys(self, make: Make) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        it.sock.error = errno.ECONNREFUSED
        await it.arrive(b"two")
        assert it.targets[0].take() == [b"one", b"two"]
        it.sock.error = errno.ECONNREFUSED
        it.targets[0].arrive(b"ONE")
        it.world.server_reactor.turn(it.far[0])
        await it.world.settle()
        assert len(it.near) == 1

    async def test_the_client_stops(self, make: Make, lines: LogLines) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        await it.arrive(b"two", source=TWO)
        far = it.world.far_session
        it.world.session.stop()
        await it.world.settle()
        assert not it.near
        assert not far.flows
        assert all(target.closed for target in it.targets)
        assert {line["reason"] for line in lines("flow ended")} == {"shutdown"}

    async def test_a_fault_of_ours_ends_that_flow_only(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        await it.arrive(b"two", source=TWO)
        it.far[0].fail(ZeroDivisionError())
        await it.world.settle()
        assert [flow.peer for flow in it.near] == ["192.0.2.2:5002"]
        monkeypatch.setattr(it.listener._flows, "send", lambda *_: 1 // 0)
        it.sock.arrive(b"x")
        try:
            it.listener.on_readable()
        except ZeroDivisionError as error:
            it.listener.fail(error)
        monkeypatch.undo()
        assert not it.sock.closed

    async def test_the_listener_stops(self, make: Make) -> None:
        it = await warm(make)
        await it.arrive(b"one")
        flow = it.near[0]
        it.listener.stop("no more")
        assert it.sock.closed
        assert not flow.deliver(b"late")
        await it.world.settle()
        it.left_nothing()
        it.listener.stop("twice")


class TestLimits:
    async def test_the_flow_that_was_idle_longest_ends(self, make: Make, lines: LogLines) -> None:
        it = await warm(make)
        it.listener.flows.most = 3
        for port in range(3):
            await it.arrive(b"x", source=("192.0.2.1", port))
        await it.arrive(b"y", source=("192.0.2.1", 0))  # so 1 is the oldest
        it.targets[1].arrive(b"reply")  # and now 2
        await it.world.settle()
        await it.arrive(b"x", source=("192.0.2.1", 7))
        assert [flow.peer.split(":")[1] for flow in it.near] == ["0", "1", "7"]
        assert lines("flow ended", "client")[0]["reason"] == "limit"
        assert len(it.listener.flows) == len(it.far) == 3
        await it.arrive(b"at once", source=("192.0.2.1", 2))
        assert it.targets[-1].take() == [b"at once"], "it was not refused: it goes on as the newest"

    async def test_however_many_come_at_once(self, make: Make) -> None:
        """All in one turn: no reset has been answered yet."""
        it = await warm(make)
        it.listener.flows.most = 3
        for port in range(3):
            await it.arrive(b"x", source=("192.0.2.1", port))
        for port in range(100, 300):
            it.sock.arrive(b"y", source=("192.0.2.1", port))
        while it.sock.arrived:
            it.world.client_reactor.turn(it.listener)
            assert len(it.listener.flows) == 3
        assert len(it.near) <= 2 * 3 + it.world.session._least
        assert len(it.world.session.ingress.waiting) <= 3
        await it.world.settle()
        assert len(it.listener.flows) == len(it.near) == len(it.far) == 3

    async def test_a_stream_does_not_wait_behind_them(self, make: Make) -> None:
        """Whoever can send datagrams from many ports must not keep connections out."""
        it = await warm(make)
        ingress = it.world.session.ingress
        first, second, *_ = list(ingress.idle)
        ingress.idle.clear()
        for port in range(20):
            it.sock.arrive(b"x", source=("192.0.2.1", port))
        it.world.client_reactor.turn(it.listener)
        it.world.connect(b"hello")
        assert len(ingress.waiting) == 21
        ingress.offer(first)
        ingress.offer(second)
        assert isinstance(first.stream, Stream)
        assert isinstance(second.stream, Flow)
        assert second.stream.peer == "192.0.2.1:0"

    async def test_nor_do_they_wait_behind_streams_for_ever(self, make: Make) -> None:
        """Every eighth link is for those that wait. One that ended meanwhile uses up no turn."""
        it = await warm(make, idle_links=FLOW_TURN + 1)
        ingress = it.world.session.ingress
        links = list(ingress.idle)
        ingress.idle.clear()
        assert len(links) >= FLOW_TURN + 1
        for port in range(3):
            it.sock.arrive(b"x", source=("192.0.2.1", port))
        it.world.client_reactor.turn(it.listener)
        it.near[0].reset("idle", "nobody waits for it")
        for _ in range(FLOW_TURN + 2):
            it.world.connect(b"hello")
        for link in links:
            ingress.offer(link)
        served = [isinstance(link.stream, Flow) for link in links]
        assert served[: FLOW_TURN + 1] == [False] * (FLOW_TURN - 1) + [True, False]
        assert it.world.session.principal.waiting == FLOW_TURN + 2 - served.count(False)

    async def test_while_they_wait_for_links_nobody_takes_a_place(self, make: Make) -> None:
        it = make()
        it.listen()
        it.listener.flows.most = 3
        for port in range(1000):
            await it.arrive(b"x", source=("192.0.2.1", port))
        assert len(it.world.session.ingress.waiting) == len(it.near) == 3
        await it.world.warm()
        assert len(it.far) == 3

    @pytest.mark.parametrize("most", ["most_streams", "most_accepted"])
    async def test_they_count_like_streams(self, make: Make, lines: LogLines, most: str) -> None:
        it = await warm(make)
        setattr(it.world.session, most, 2)
        for port in range(4):
            await it.arrive(b"x", source=("192.0.2.1", port))
        assert it.world.far_session.principal.streams == len(it.near) == 2
        assert {line["reason"] for line in lines("flow refused")} == {"limit"}

    async def test_the_server_counts_them_too(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, lines: LogLines
    ) -> None:
        it = await warm(make)
        monkeypatch.setattr(it.world.server, "share", lambda most: min(most, 1))
        await it.arrive(b"x")
        await it.arrive(b"x", source=TWO)
        assert len(it.near) == 1
        assert lines("flow refused", "client")[0]["detail"] == "too many streams"

    async def test_refused_sources_are_remembered_for_a_while_and_not_all(self, make: Make) -> None:
        it = await warm(make)
        it.listener.flows.most = 3
        it.world.refusal = StreamError("unreachable", "no way")
        for port in range(10):
            await it.arrive(b"x", source=("192.0.2.1", port))
        assert len(it.listener.flows._refused) == 3
        assert len(it.world.dialled) == 10
        await it.arrive(b"x", source=("192.0.2.1", 9))
        assert len(it.world.dialled) == 10


class TestLog:
    async def test_only_so_many_lines_a_second(self, make: Make, lines: LogLines) -> None:
        it = await warm(make)
        it.world.refusal = StreamError("unreachable", "no way")
        for port in range(REFUSAL_LINES + 20):
            await it.arrive(b"x", source=("192.0.2.1", port))
        for role, session in (("client", it.world.session), ("server", it.world.far_session)):
            assert len(lines("flow refused", role)) == REFUSAL_LINES
            session.sweep(trio.current_time())
            (line,) = lines("more flows than the log tells of", role)
            assert (line["refused"], line["reasons"], line["last_target"]) == (20, "unreachable 20", TARGET)
            assert "last_policy" not in line
        await it.arrive(b"x", source=("192.0.2.2", 1))
        assert len(lines("flow refused", "client")) == REFUSAL_LINES + 1
        it.world.session.sweep(trio.current_time())
        assert len(lines("more flows than the log tells of", "client")) == 1

    async def test_many_that_open_do_not_hide_a_refusal(
        self, make: Make, lines: LogLines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(flows_module, "LOG_LINES", 2)
        it = await warm(make)
        for port in range(4):
            await it.arrive(b"x", source=("192.0.2.1", port))
        it.world.refusal = StreamError("unreachable", "no way")
        await it.arrive(b"x", source=TWO)
        for role in ("client", "server"):
            assert [line["detail"] for line in lines("flow refused", role)] == ["no way"]
        it.world.session.sweep(trio.current_time())
        (line,) = lines("more flows than the log tells of", "client")
        assert line["opened"] == 2 and "reasons" not in line

    async def test_refusals_without_a_line_are_counted_by_code_and_the_last_is_told(
        self, make: Make, lines: LogLines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(flows_module, "REFUSAL_LINES", 1)
        it = await warm(make)
        for port, code in enumerate(("refused", "unreachable", "limit", "unreachable", "forbidden")):
            it.world.refusal = StreamError(code, "no")
            it.world.refusal.add_note(f"rule {port}")
            await it.arrive(b"x", source=("192.0.2.1", port))
        it.world.far_session.sweep(trio.current_time())
        (line,) = lines("more flows than the log tells of", "server")
        assert (line["refused"], line["reasons"]) == (4, "forbidden 1, limit 1, unreachable 2")
        assert (line["last_target"], line["last_policy"]) == (TARGET, "rule 4")

    async def test_at_the_end_of_the_session(self, make: Make, lines: LogLines) -> None:
        it = await warm(make)
        for port in range(LOG_LINES - 10):
            await it.arrive(b"x", source=("192.0.2.1", port))
        it.world.session.close(1000, "done")
        await it.world.settle()
        assert len(lines("flow ended", "client")) == 10
        (line,) = lines("more flows than the log tells of", "client")
        assert (line["ended"], line.get("opened")) == (LOG_LINES - 20, None)

    async def test_after_it_there_are_none(self, make: Make, lines: LogLines) -> None:
        it = await warm(make)
        it.world.session.stop()
        await it.world.settle()
        await it.arrive(b"x")
        assert not it.near
        assert not lines("flow refused")


class TestRefusals:
    @pytest.mark.parametrize("target", ["udp:169.254.169.254:53", "udp:10.0.0.1:53"])
    async def test_the_policy(self, make: Make, lines: LogLines, target: str) -> None:
        it = await warm(make, target)
        it.world.server.policy = Policy(
            [parse_rule("udp:127.0.0.1:53"), parse_rule("tcp:*:*")], own_sockets=[], is_local=lambda _: False
        )
        await it.arrive(b"one")
        assert not it.world.dialled
        (line,) = lines("flow refused", "client")
        assert line["reason"] == "forbidden"
        assert "policy" in lines("flow refused", "server")[0]
        it.left_nothing()

    async def test_a_target_that_is_none(self, make: Make, lines: LogLines) -> None:
        it = await warm(make, "udp:nowhere")
        await it.arrive(b"one")
        assert lines("flow refused", "client")[0]["detail"].startswith("not a target")
        it.left_nothing()

    async def test_a_server_that_knows_no_udp(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, lines: LogLines
    ) -> None:
        monkeypatch.setattr(server_module, "FEATURES", OLD)
        it = make()
        it.listen()
        it.world.session.udp_forwards = True
        await it.arrive(b"one")
        await it.world.warm()
        await it.arrive(b"two", source=TWO)
        assert not it.near
        assert not it.far
        assert not it.world.dialled
        assert len(lines("the server is too old for UDP: update it", "client")) == 1
        assert lines("flow refused", "client")[0]["reason"] == "forbidden"
        monkeypatch.setattr(server_module, "FEATURES", FEATURES)
        it.world.session.links.copy().pop().lose("cut")  # another link is dialled, which says better
        await it.world.settle()
        await it.arrive(b"three", source=TWO)
        assert it.targets[0].take() == [b"three"]

    async def test_a_client_that_knows_no_udp(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, lines: LogLines
    ) -> None:
        monkeypatch.setattr(server_session_module, "FEATURES", OLD)
        it = await warm(make)
        await it.arrive(b"one")
        assert lines("stream refused", "server")[0]["reason"] == "forbidden"
        assert not it.world.dialled
        it.left_nothing()


class TestReverse:
    """`-R 5353:127.0.0.1:53/udp`: the server takes datagrams, the client sends them on."""

    SPEC = "5353:127.0.0.1:53/udp"

    async def warm(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> Datagrams:
        it = make(reverse=[self.SPEC], allow_listen=["5353"])

        def listen(forward: Forward) -> list[Bound]:
            assert forward.udp
            return [Bound(it.sock, "127.0.0.1:5353")]  # type: ignore[arg-type]

        monkeypatch.setattr(reverse_server, "listen", listen)
        await it.world.warm()
        await it.world.settle()
        return it

    async def test_there_and_back(self, make: Make, monkeypatch: pytest.MonkeyPatch, lines: LogLines) -> None:
        it = await self.warm(make, monkeypatch)
        await it.arrive(b"one", b"two")
        assert it.world.dialled == [TARGET]
        assert it.targets[0].take() == [b"one", b"two"]
        it.targets[0].arrive(b"ONE")
        await it.world.settle()
        assert it.sock.sent == [(b"ONE", ONE, [])]
        assert lines("flow opened", "client")[0]["application"] == "192.0.2.1:5001"

    async def test_the_clients_target_and_no_other(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server that was taken over names another."""
        it = await self.warm(make, monkeypatch)
        (place,) = it.world.far_session.reverse._by_id.values()
        (acceptor,) = place.acceptors
        assert isinstance(acceptor, UdpListener)
        acceptor._target = "udp:10.0.0.1:1"
        await it.arrive(b"one")
        assert it.world.dialled == [TARGET]

    async def test_an_unknown_forward(self, make: Make, monkeypatch: pytest.MonkeyPatch, lines: LogLines) -> None:
        it = await self.warm(make, monkeypatch)
        (place,) = it.world.far_session.reverse._by_id.values()
        (acceptor,) = place.acceptors
        assert isinstance(acceptor, UdpListener)
        ingress = it.world.far_session.ingress
        acceptor._flows._way = lambda: (ingress, "7")
        await it.arrive(b"one")
        assert not it.world.dialled
        assert lines("flow refused", "server")[0]["detail"] == "no such forward"

    async def test_unlisten_ends_the_flows(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        it = await self.warm(make, monkeypatch)
        await it.arrive(b"one")
        it.world.far_session.reverse.unlisten("1")
        await it.world.settle()
        assert it.sock.closed
        it.left_nothing()

    async def test_the_next_session_takes_over(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        it = await self.warm(make, monkeypatch)
        await it.arrive(b"one")
        first = it.far[0]
        other = it.world.make_client(self.SPEC)
        it.world.nursery.start_soon(other.keep_links)
        await it.world.settle()
        assert first.outcome is not None
        assert not it.sock.closed
        await it.arrive(b"two")
        assert len(other.flows) == 1
        assert it.targets[1].take() == [b"two"]
        assert not it.near

    async def test_what_waits_for_a_link_is_not_taken_over(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        it = await self.warm(make, monkeypatch)
        for link in list(it.world.far_session.links):
            if link.protocol.role == "reverse":
                link.close(1000, "none is left")
        it.sock.arrive(b"one")
        it.world.server_reactor.turn(next(iter(it.world.far_session.reverse._by_id.values())).acceptors[0])
        (flow,) = it.far
        assert flow.link is None
        far = it.world.far_session
        place = next(iter(far.reverse._by_id.values()))
        # As when the other session asks for it, all in one step.
        made: Any = server_session_module.ServerSession(
            "o" * 22, far.principal, it.world.server, Hello(version=1, session="o" * 22, role="control")
        )
        far.reverse.hand_over(place, made.reverse, "1", place.forward)
        assert flow.outcome == ("shutdown", "another client of the same user has it now")
        assert not made.ingress.waiting

    async def test_nor_what_a_relays_application_has_sent(self, make: Make) -> None:
        """It would name the forward as the first session does."""
        world = make(reverse=["8080"], allow_listen=["8080"]).world
        await world.warm()
        await world.settle()
        far = world.far_session
        far.ingress.idle.clear()
        flow = far.ingress.make_flow("udp:dns:53", "192.0.2.1:6", forward="1", receive=lambda _: True)
        far.ingress.accepted(Wanted(flow.target, flow.peer, forward="1", flow=flow))
        place = next(iter(far.reverse._by_id.values()))
        made: Any = server_session_module.ServerSession(
            "o" * 22, far.principal, world.server, Hello(version=1, session="o" * 22, role="control")
        )
        far.reverse.hand_over(place, made.reverse, "2", place.forward)
        assert flow.outcome == ("shutdown", "another client of the same user has it now")
        assert not made.ingress.waiting

    async def test_a_server_that_knows_no_udp(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, lines: LogLines
    ) -> None:
        monkeypatch.setattr(server_module, "FEATURES", OLD)
        it = make(reverse=[self.SPEC, "8080:127.0.0.1:80"], allow_listen=["*"])
        await it.world.warm()
        await it.world.settle()
        (line,) = lines("the server does not listen for -R: the server is too old for UDP: update it")
        assert line["retry"] == "no"
        assert len(it.world.far_session.reverse) == 1

    async def test_a_client_that_knows_no_udp(
        self, make: Make, monkeypatch: pytest.MonkeyPatch, lines: LogLines
    ) -> None:
        monkeypatch.setattr(server_session_module, "FEATURES", OLD)
        it = make(reverse=[self.SPEC], allow_listen=["*"])
        await it.world.warm()
        await it.world.settle()
        assert lines("listening refused", "server")
        assert not it.world.far_session.reverse


class TestAnything:
    """Whatever comes in whatever order: the table holds what lives, nothing is held for what does not."""

    @pytest.mark.parametrize("seed", range(20))
    async def test_at_random(self, make: Make, mock_clock: MockClock, lines: LogLines, seed: int) -> None:
        self.random = random.Random(seed)
        self.clock = mock_clock
        it = await warm(make, "udp:db:53" if seed % 2 else TARGET)
        it.listener.flows.most = 5
        it.world.far_session.flows.timeout = 70
        for _ in range(150):
            self.step(it)
            if self.random.random() < 0.7:
                await it.world.settle()
            else:
                it.world.client_reactor.turn_all()
            self.check(it)
        await self.calm(it)
        self.left_nothing(it, lines)
        await it.arrive(b"at last")
        assert it.targets[-1].take() == [b"at last"]

    def step(self, it: Datagrams) -> None:
        choose = self.random.choice
        links = [flow.link for flow in it.near if flow.link is not None] + list(it.world.session.ingress.idle)
        open_targets = [target for target in it.targets if not target.closed]
        what = self.random.random()
        if what < 0.45:
            size = choose([0, 1, 100, 1400, 4000])
            it.sock.arrive(*[bytes(size)] * choose([1, 2, 90]), source=("192.0.2.1", choose(range(9))))
        elif what < 0.6 and open_targets:
            choose(open_targets).arrive(*[bytes(choose([0, 10, 3000]))] * choose([1, 2, 90]))
        elif what < 0.68 and open_targets:
            choose(open_targets).error = choose([errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EMSGSIZE])
        elif what < 0.73 and links:
            it.world.cut(choose(links))
        elif what < 0.76 and links:
            it.world.freeze(choose(links))
        elif what < 0.82 and links:
            sock: Any = choose(links).sock
            if sock is not None:
                choose([sock, sock.peer]).outgoing.room = choose([0, 7, 5000, None])
        elif what < 0.88:
            self.clock.jump(choose([0.5, 1, 5, 30, 61]))
        elif what < 0.94:
            self.sweep(it)
        elif what < 0.97 and it.far:
            choose(it.far).reset("limit", "")
        elif it.near:
            choose(it.near).reset("idle", "")

    def sweep(self, it: Datagrams) -> None:
        for session in (it.world.session, *it.world.server._sessions.values()):
            session.sweep(trio.current_time())

    def check(self, it: Datagrams) -> None:
        table = it.listener.flows
        assert len(table) <= table.most >= len(table._refused)
        assert set(table._flows.values()) == {flow for flow in it.near if flow.reason is None}
        principal = it.world.session.principal
        assert principal.streams == principal.accepted == len(it.near)
        held = sum(flow.state.queue._held + len(flow.state._arriving or b"") for flow in it.near)
        assert principal.budget.held == held

    async def calm(self, it: Datagrams) -> None:
        for pair in it.world.sockets:
            for sock in pair:
                sock.outgoing.room = None
        await it.world.settle()
        for _ in range(30):
            self.clock.jump(10)
            await it.world.settle()
            self.sweep(it)
            await it.world.settle()

    def left_nothing(self, it: Datagrams, lines: LogLines) -> None:
        assert not it.near
        assert not it.listener.flows._flows
        for session in (it.world.session, *it.world.server._sessions.values()):
            assert not session.flows
            assert session.principal.budget.held == session.principal.streams == 0
        assert all(target.closed for target in it.targets)
        assert not lines("fault in our own code")


async def test_nothing_is_left(make: Make, autojump_clock: MockClock) -> None:
    it = make()
    it.listen("udp:db:53")
    it.world.run()
    it.sock.arrive(b"one")
    with trio.fail_after(5):
        while not it.targets:
            await trio.sleep(0.01)
    assert address_family("db") is None
    it.targets[0].arrive(b"ONE")
    await trio.sleep(1)
    assert it.sock.take() == [b"ONE"]
    await trio.sleep(limits.UDP_IDLE_SECONDS + 2)
    it.left_nothing()
    left_nothing(it.world)
