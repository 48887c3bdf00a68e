"""The end that dials: under a policy, in its time, with what goes before the stream's own bytes."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.roles import ClockedReactor, NamedSocket
from wstunnel import egress as egress_module
from wstunnel.dial import Begun
from wstunnel.egress import RESOLVER_THREADS, Egress
from wstunnel.errors import StreamError
from wstunnel.policy import Policy
from wstunnel.targets import Target, parse_target

POLICY = Policy((), own_sockets=(), is_local=lambda _address: False)
TARGET = parse_target("tcp:10.0.0.5:5432")


class FakeStream:
    """What a stream was told."""

    def __init__(self) -> None:
        self.outcome: tuple[str, str] | None = None
        self.reason: tuple[str, str] | None = None
        self.dialling: trio.CancelScope | None = None
        self.note = ""
        self.application = "192.0.2.9:4000"
        self.got: tuple[Any, str] | None = None
        self.fault: Exception | None = None

    def connected(self, _reactor: object, sock: Any, address: str) -> None:
        self.got = sock, address

    def reset(self, code: str, message: str) -> None:
        self.reason = (code, message)

    def fail(self, error: Exception) -> None:
        self.fault = error


class Scene:
    """An egress whose dials are the test's: `begin` and `finish` are what they come to."""

    def __init__(self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reactor = ClockedReactor()
        self.egress = Egress(self.reactor, nursery)  # type: ignore[arg-type]
        near, far = NamedSocket.pair()
        assert isinstance(near, NamedSocket) and isinstance(far, NamedSocket)
        self.near, self.far = near, far
        self.begin: Begun | Exception | None = None
        self.finish: Exception | None = None
        self.seconds = 0.0
        self.asked: list[tuple[str, Target, Policy]] = []
        self.handed: Begun | None = None
        self.limiter: trio.CapacityLimiter | None = None
        self.cancelled = 0
        monkeypatch.setattr(egress_module, "begin_dial", self._begin)
        monkeypatch.setattr(egress_module, "dial_target", self._dial)

    def done(self, done: bool = True) -> Begun:
        return Begun(self.near, ("10.0.0.5", 5432), done=done)  # type: ignore[arg-type]

    def _begin(self, target: Target, policy: Policy, sources: object) -> Begun | None:
        self.asked.append(("begin", target, policy))
        if isinstance(self.begin, Exception):
            raise self.begin
        return self.begin

    async def _dial(
        self, target: Target, policy: Policy, *, limiter: trio.CapacityLimiter, sources: object, begun: Begun | None
    ) -> tuple[Any, str]:
        self.asked.append(("dial", target, policy))
        self.handed, self.limiter = begun, limiter
        try:
            await trio.sleep(self.seconds)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        if self.finish is not None:
            raise self.finish
        return self.near, "10.0.0.5:5432"

    def dial(self, stream: FakeStream | None = None, **options: Any) -> FakeStream:
        stream = stream or FakeStream()
        self.egress.dial(stream, TARGET, POLICY, **({"principal": "alice"} | options))  # type: ignore[arg-type]
        return stream

    async def settle(self) -> None:
        self.reactor.turn_all()
        await wait_all_tasks_blocked()


@pytest.fixture
def scene(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(nursery, monkeypatch)


class TestDial:
    async def test_what_needs_no_wait_needs_no_task(self, scene: Scene) -> None:
        scene.begin = scene.done()
        stream = scene.dial()
        assert stream.got is None and not scene.asked, "not in the read that brought `open`"
        scene.reactor.turn_all()
        assert stream.got == (scene.near, "10.0.0.5:5432")
        assert stream.dialling is None
        assert scene.asked == [("begin", TARGET, POLICY)]

    async def test_what_takes_time_is_a_task(self, scene: Scene, autojump_clock: MockClock) -> None:
        scene.begin, scene.seconds = scene.done(False), 1
        stream = scene.dial()
        await scene.settle()
        assert stream.got is None and stream.dialling is not None
        assert scene.handed is scene.begin, "the attempt goes on"
        await trio.sleep(1.1)
        assert stream.got == (scene.near, "10.0.0.5:5432")

    @pytest.mark.parametrize("ended", ["outcome", "reason"])
    async def test_nobody_wants_it_any_more(self, scene: Scene, ended: str) -> None:
        stream = FakeStream()
        scene.dial(stream)
        setattr(stream, ended, ("reset", ""))
        await scene.settle()
        assert not scene.asked

    async def test_it_is_given_up(self, scene: Scene) -> None:
        scene.seconds = 100
        stream = scene.dial()
        await scene.settle()
        assert stream.dialling is not None
        stream.dialling.cancel()
        await scene.settle()
        assert scene.cancelled == 1 and stream.got is None and stream.reason is None and stream.fault is None

    @pytest.mark.parametrize("when", ["begin", "finish"])
    async def test_a_refusal_is_the_streams_reset_and_the_note_for_the_log(self, scene: Scene, when: str) -> None:
        error = StreamError("forbidden", "the server's policy does not allow it")
        error.add_note("in full")
        setattr(scene, when, error)
        stream = scene.dial()
        await scene.settle()
        assert stream.reason == ("forbidden", "the server's policy does not allow it")
        assert stream.note == "in full" and stream.got is None

    @pytest.mark.parametrize("when", ["begin", "finish"])
    async def test_a_fault_of_ours_is_that_streams(self, scene: Scene, when: str) -> None:
        setattr(scene, when, KeyError("a fault"))
        stream = scene.dial()
        other = FakeStream()
        await scene.settle()
        assert isinstance(stream.fault, KeyError) and stream.reason is None
        scene.begin, scene.finish = scene.done(), None
        scene.dial(other)
        await scene.settle()
        assert other.got is not None


class TestLimiter:
    async def test_each_principal_has_its_own_threads(self, scene: Scene) -> None:
        limiter = scene.egress.limiter
        assert limiter("alice") is limiter("alice") is not limiter("bob")
        assert limiter("alice").total_tokens == RESOLVER_THREADS
        scene.dial(principal="bob")
        await scene.settle()
        assert scene.limiter is limiter("bob")


class TestPrelude:
    async def test_it_goes_before_everything(self, scene: Scene) -> None:
        scene.begin = scene.done()
        stream = scene.dial(prelude=lambda stream: b"PROXY " + stream.application.encode())
        order = []
        stream.connected = lambda *_: order.append(bytes(scene.near.outgoing.sent))  # type: ignore[method-assign]
        await scene.settle()
        assert order == [b"PROXY 192.0.2.9:4000"]

    async def test_a_target_that_is_gone_already_is_the_streams_to_notice(self, scene: Scene) -> None:
        scene.begin = scene.done()

        def broken(_data: bytes) -> int:
            raise OSError(errno.EPIPE, "broken pipe")

        scene.near.send = broken  # type: ignore[method-assign]
        stream = scene.dial(prelude=lambda _stream: b"PROXY")
        await scene.settle()
        assert stream.got is not None and stream.fault is None

    async def test_a_fault_in_it_is_that_streams(self, scene: Scene) -> None:
        scene.begin = scene.done()

        def fault(_stream: object) -> bytes:
            raise ValueError("no address")

        stream = scene.dial(prelude=fault)
        await scene.settle()
        assert isinstance(stream.fault, ValueError) and stream.got is None
