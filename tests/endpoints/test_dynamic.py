"""SOCKS and HTTP proxies in front of a tunnel: what the application is told, and when."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from wstunnel import limits
from wstunnel.endpoints.dynamic import DynamicForwards
from wstunnel.errors import StreamError
from wstunnel.forwards import Forward

SOCKS = Forward("127.0.0.1", 1080, speaks=("socks",))
HTTP = Forward("127.0.0.1", 1080, speaks=("http",))
BOTH = Forward("127.0.0.1", 1080, speaks=("socks", "http"))
CONNECT_5 = b"\x05\x01\x00" + b"\x05\x01\x00\x03\x02db" + (5432).to_bytes(2, "big")
GET = b"GET http://web/ HTTP/1.1\r\nHost: web\r\n\r\n"
POST = b"POST http://web/ HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes"
OPENED_5 = b"\x05\x00" + b"\x05\x00\x00\x01" + bytes(6)


class FakeStream:
    """What `begin` was given."""

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.early = b""
        self.resets: list[tuple[str, str]] = []
        self.inbound = SimpleNamespace(total=None)

    def begin(self, _reactor: object, sock: socket.socket, early: bytes = b"") -> None:
        self.sock, self.early = sock, early

    def reset(self, code: str, message: str) -> None:
        self.resets.append((code, message))
        if self.sock is not None:
            self.sock.close()

    def answer(self, data: bytes, *, end: bool = True) -> None:
        """The origin's answer; `end`: and its EOF."""
        assert self.sock is not None
        self.sock.sendall(data)
        if end:
            self.inbound.total = len(data)
            self.sock.shutdown(socket.SHUT_WR)

    def request(self) -> bytes:
        """What has come of the body by now; with a `.` behind it if that is all."""
        assert self.sock is not None
        data = b""
        try:
            while more := self.sock.recv(65536):
                data += more
        except BlockingIOError:
            return data
        return data + b"."


class FakeIngress:
    """Opens what it is asked for, once `gate` is set, unless there is an `error`."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.gate.set()
        self.error: StreamError | None = None
        self.asked: list[tuple[str, str]] = []
        self.streams: list[FakeStream] = []
        self.flows_refused = ""

    async def connect(self, target: str, _peer: str, *, forward: str = "") -> FakeStream:
        self.asked.append((target, forward))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.streams.append(FakeStream())
        return self.streams[-1]


class World:
    def __init__(self, nursery: trio.Nursery, **options: Any) -> None:
        self.ingress = FakeIngress()
        self.dynamic = DynamicForwards(None, nursery, **options)  # type: ignore[arg-type]
        self.applications: list[Application] = []

    def connect(self, forward: Forward, forward_id: str = "", principal: str = "") -> Application:
        """An application connects. Returns its end."""
        near, far = socket.socketpair()
        near.setblocking(False)
        self.dynamic.accepted(near, forward, lambda: (self.ingress, forward_id), principal=principal)  # type: ignore[arg-type, return-value]
        far.setblocking(False)
        self.applications.append(Application(far))
        return self.applications[-1]

    def close(self) -> None:
        for application in self.applications:
            application.close()
        for stream in self.ingress.streams:
            if stream.sock is not None:
                stream.sock.close()


class Application:
    """The application's end of its connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = trio.socket.from_stdlib_socket(sock)

    async def send_all(self, data: bytes) -> None:
        while data:
            data = data[await self._sock.send(data) :]

    async def receive_some(self, size: int) -> bytes:
        return await self._sock.recv(size)

    def nothing(self) -> bool:
        """Whether nothing has come."""
        with socket.fromfd(self._sock.fileno(), self._sock.family, self._sock.type) as same:
            same.setblocking(False)
            try:
                return not same.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return True

    def close(self) -> None:
        self._sock.close()

    def shutdown(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    async def ask(self, data: bytes, size: int) -> bytes:
        await self.send_all(data)
        return await self.read(size)

    async def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size and (more := await self.receive_some(size - len(data))):
            data += more
        return data

    async def read_all(self) -> bytes:
        data = b""
        while more := await self.receive_some(65536):
            data += more
        return data


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        world = World(nursery, **options)
        try:
            yield world
            await wait_all_tasks_blocked()  # what was answered has been handed over
        finally:
            world.close()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[World, Application]]:
    """An application at an HTTP proxy over TCP, where a reset can be seen."""
    async with serving() as world:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            far = socket.create_connection(listener.getsockname())
            near, _address = listener.accept()
        near.setblocking(False)
        world.dynamic.accepted(near, HTTP, lambda: (world.ingress, ""))  # type: ignore[arg-type, return-value]
        far.setblocking(False)
        world.applications.append(Application(far))
        yield world, world.applications[-1]


def no_descriptor(*_: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


class TestSocks:
    async def test_success_is_said_only_when_the_target_has_accepted(self) -> None:
        async with serving() as world:
            world.ingress.gate = trio.Event()
            application = world.connect(SOCKS)
            await application.send_all(CONNECT_5)
            assert await application.read(2) == b"\x05\x00"
            await wait_all_tasks_blocked()
            assert world.ingress.asked == [("tcp:db:5432", "")]
            assert application.nothing()
            world.ingress.gate.set()
            assert await application.read(10) == OPENED_5[2:]
            await wait_all_tasks_blocked()
            assert world.ingress.streams[0].sock is not None

    async def test_early_data_goes_on(self) -> None:
        async with serving() as world:
            application = world.connect(SOCKS)
            await application.send_all(CONNECT_5 + b"early")
            assert await application.read(len(OPENED_5)) == OPENED_5
            await wait_all_tasks_blocked()
            assert world.ingress.streams[0].early == b"early"

    @pytest.mark.parametrize(
        ("code", "reply"),
        [("refused", 5), ("forbidden", 2), ("name-not-found", 4), ("unreachable", 4), ("timeout", 6), ("limit", 1)],
    )
    async def test_a_refusal_is_the_true_one(self, code: str, reply: int) -> None:
        async with serving() as world:
            world.ingress.error = StreamError(code, "no")
            application = world.connect(SOCKS)
            await application.send_all(CONNECT_5)
            assert (await application.read_all())[2:4] == bytes((5, reply))

    @pytest.mark.parametrize("command", [2, 3])
    async def test_bind_and_udp_to_a_peer_without_are_told_that_they_are_not_served(self, command: int) -> None:
        """What UDP ASSOCIATE does otherwise: test_udp.py."""
        async with serving() as world:
            world.ingress.flows_refused = "the server is too old for UDP"
            application = world.connect(SOCKS)
            await application.send_all(bytes((5, 1, 0, 5, command, 0, 1)) + bytes(6))
            assert (await application.read_all())[2:4] == b"\x05\x07"
            assert world.ingress.asked == []

    async def test_socks_4a(self) -> None:
        async with serving() as world:
            application = world.connect(SOCKS)
            await application.send_all(b"\x04\x01\x15\x38\0\0\0\x01me\0db\0")
            assert (await application.read(8))[:2] == b"\0\x5a"
            assert world.ingress.asked == [("tcp:db:5432", "")]

    async def test_an_application_that_has_gone_takes_its_stream_along(self) -> None:
        async with serving() as world:
            world.ingress.gate = trio.Event()
            application = world.connect(SOCKS)
            await application.send_all(CONNECT_5)
            await wait_all_tasks_blocked()
            application.close()
            world.ingress.gate.set()
            await wait_all_tasks_blocked()
            assert world.ingress.streams[0].resets == [("reset", "the application went away")]

    async def test_a_password_is_asked_for_and_judged(self) -> None:
        async with serving(authenticate=lambda user, password: (user, password) == (b"me", b"secret")) as world:
            for password, verdict in ((b"secret", 0), (b"wrong", 1)):
                application = world.connect(SOCKS)
                login = b"\x01\x02me" + bytes((len(password),)) + password
                await application.send_all(b"\x05\x02\x00\x02" + login)
                assert await application.read(2) == b"\x05\x02"
                answer = await application.read(2)
                assert (answer[0], bool(answer[1])) == (1, bool(verdict))
            assert world.ingress.asked == []

    async def test_the_forward_of_a_reverse_link_is_named(self) -> None:
        async with serving() as world:
            await world.connect(SOCKS, "7").send_all(CONNECT_5)
            await wait_all_tasks_blocked()
            assert world.ingress.asked == [("tcp:db:5432", "7")]


class TestHttp:
    async def test_connect(self) -> None:
        async with serving() as world:
            application = world.connect(HTTP)
            await application.send_all(b"CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\nearly")
            assert await application.read(39) == b"HTTP/1.1 200 Connection established\r\n\r\n"
            await wait_all_tasks_blocked()
            assert world.ingress.streams[0].early == b"early"

    @pytest.mark.parametrize(
        ("code", "status"), [("refused", 502), ("timeout", 504), ("forbidden", 403), ("name-not-found", 502)]
    )
    async def test_a_refusal_has_its_status_and_says_why(self, code: str, status: int) -> None:
        async with serving() as world:
            world.ingress.error = StreamError(code, "that is why")
            application = world.connect(HTTP)
            await application.send_all(b"CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\n")
            answer = await application.read_all()
            assert answer.startswith(f"HTTP/1.1 {status} ".encode())
            assert b"that is why" in answer

    async def test_a_request_goes_to_its_origin_and_the_next_one_does_not(self) -> None:
        async with serving() as world:
            application = world.connect(HTTP)
            await application.send_all(
                b"POST http://web/path HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\nabc"
                b"GET http://other/ HTTP/1.1\r\nHost: other\r\nCookie: secret\r\n\r\n"
            )
            await wait_all_tasks_blocked()
            assert world.ingress.asked == [("tcp:web:80", "")]
            (stream,) = world.ingress.streams
            assert stream.early.startswith(b"POST /path HTTP/1.1\r\n")
            assert stream.request() == b"abc.", "an origin that would wait for another request is told of the end"
            stream.answer(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nbody")
            assert (await application.read_all()).endswith(b"\r\n\r\nbody")

    async def test_the_next_request_after_the_answer_ends_the_connection(self, autojump_clock: MockClock) -> None:
        async with serving() as world:
            application, stream = await self.ask(world, GET)
            assert stream.request() == b""
            stream.answer(ANSWER, end=False)
            assert await application.read(len(ANSWER)) == ANSWER
            await application.send_all(b"GET http://other/ HTTP/1.1\r\nHost: other\r\n\r\n")
            await wait_all_tasks_blocked()
            assert stream.request() == b".", "an origin that ends then has said all"
            assert application.nothing() and not stream.resets
            assert await application.read_all() == b"", "one that does not is not waited for"
            assert stream.resets
            assert trio.current_time() == pytest.approx(limits.LINGER_SECONDS)

    async def test_but_not_before_the_answer_is_there(self, autojump_clock: MockClock) -> None:
        """Two requests at once: the origin takes its time, and so does the application."""
        async with serving() as world:
            application, stream = await self.ask(world, GET + GET)
            await trio.sleep(3 * limits.LINGER_SECONDS)
            assert application.nothing() and not stream.resets
            stream.answer(ANSWER + bytes(100_000), end=False)
            await trio.sleep(0.6 * limits.LINGER_SECONDS)
            stream.answer(b"more", end=False)
            assert (await application.read_all())[-5:] == b"\0more"
            assert stream.resets

    @pytest.mark.parametrize("split", [0, 1])
    async def test_an_empty_line_behind_the_body_is_no_next_request(self, split: int) -> None:
        async with serving() as world:
            application, stream = await self.ask(world, POST + b"abc" + b"\r\n"[:split])
            await application.send_all(b"\r\n"[split:])
            await wait_all_tasks_blocked()
            assert stream.request() == b"abc"

    async def test_an_application_that_leaves_after_its_request_is_noticed(self) -> None:
        async with serving() as world:
            application, stream = await self.ask(world, POST + b"abc")
            assert stream.request() == b"abc"
            application.shutdown()
            await wait_all_tasks_blocked()
            assert stream.request() == b"."
            stream.answer(ANSWER)
            assert await application.read_all() == ANSWER, "it may only have said its end"

    @pytest.mark.parametrize("request_", [GET, POST + b"a"], ids=["all read", "a part of the body unread"])
    async def test_a_reset_of_the_origin_is_one_for_the_application(self, request_: bytes) -> None:
        async with connected() as (world, application):
            await application.send_all(request_)
            await wait_all_tasks_blocked()
            (stream,) = world.ingress.streams
            stream.answer(ANSWER, end=False)
            assert await application.read(len(ANSWER)) == ANSWER
            stream.reset("reset", "connection reset")
            with pytest.raises(ConnectionResetError):
                await application.read_all()

    async def test_an_end_that_came_before_the_reset_is_an_end(self) -> None:
        """The origin did not want all of the body: what it says is whole."""
        async with connected() as (world, application):
            await application.send_all(POST + b"a")
            await wait_all_tasks_blocked()
            (stream,) = world.ingress.streams
            stream.answer(ANSWER)
            stream.reset("reset", "connection reset")  # with the body unread: the pair's end is no EOF
            assert await application.read_all() == ANSWER

    async def test_an_origin_that_is_gone_has_still_answered(self) -> None:
        async with serving() as world:
            application, stream = await self.ask(world, POST + b"a")
            assert stream.request() == b"a"
            parts = [bytes(100_000)] * 3  # more than the application's socket holds
            for part in parts:
                stream.answer(part, end=False)
                await wait_all_tasks_blocked()
            stream.inbound.total = 300_000
            stream.reset("reset", "connection reset")
            await application.send_all(b"bc")  # nobody takes that any more
            await wait_all_tasks_blocked()
            assert len(await application.read_all()) == 300_000

    @pytest.mark.parametrize("early", [False, True])
    async def test_a_body_that_breaks_its_framing_costs_only_its_connection(self, early: bool) -> None:
        chunked = b"POST http://web/ HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with serving() as world:
            application, stream = await self.ask(world, chunked + b"zz\r\n" * early)
            if not early:
                await application.send_all(b"1\r\na\r\nzz\r\n")
            assert (await application.read_all()).startswith(b"HTTP/1.1 400 ")
            assert stream.resets == [("reset", "the application broke the rules of HTTP")]
            assert await world.connect(BOTH).ask(CONNECT_5, len(OPENED_5)) == OPENED_5

    async def test_without_descriptors_the_stream_is_reset_and_the_application_told(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving() as world:
            application = world.connect(HTTP)
            with monkeypatch.context() as patch:
                patch.setattr(socket, "socketpair", no_descriptor)
                await application.send_all(GET)
                answer = await application.read_all()
            assert answer.startswith(b"HTTP/1.1 503 ") and b"Too many open files" in answer
            assert [code for code, _ in world.ingress.streams[0].resets] == ["limit"]

    async def ask(self, world: World, request: bytes) -> tuple[Application, FakeStream]:
        """An application's request, and the stream that was opened for it."""
        application = world.connect(HTTP)
        await application.send_all(request)
        await wait_all_tasks_blocked()
        return application, world.ingress.streams[-1]

    async def test_what_is_no_request_to_a_proxy_is_told_so(self) -> None:
        async with serving() as world:
            application = world.connect(HTTP)
            await application.send_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await application.read_all()).startswith(b"HTTP/1.1 400 ")

    async def test_a_password_is_asked_for(self) -> None:
        async with serving(authenticate=lambda *_: False) as world:
            application = world.connect(HTTP)
            await application.send_all(b"CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\n")
            answer = await application.read_all()
            assert answer.startswith(b"HTTP/1.1 407 ") and b"Proxy-Authenticate: Basic" in answer


class TestBoth:
    async def test_the_first_byte_tells_them_apart(self) -> None:
        async with serving() as world:
            first, second = world.connect(BOTH), world.connect(BOTH)
            await first.send_all(CONNECT_5)
            assert await first.read(len(OPENED_5)) == OPENED_5
            await second.send_all(b"CONNECT db:5432 HTTP/1.1\r\nHost: db:5432\r\n\r\n")
            assert (await second.read(39)).startswith(b"HTTP/1.1 200 ")

    async def test_each_speaks_only_what_was_asked_for(self) -> None:
        async with serving() as world:
            application = world.connect(SOCKS)
            await application.send_all(b"CONNECT db:5432 HTTP/1.1\r\n\r\n")
            assert await application.read_all() == b""
            application = world.connect(HTTP)
            await application.send_all(CONNECT_5)
            assert (await application.read_all()).startswith(b"HTTP/1.1 400 ")
            assert world.ingress.asked == []


class TestIdleApplications:
    @pytest.mark.parametrize("sent", [b"", b"\x05", b"CONNECT db"])
    async def test_one_that_says_no_more_is_dropped_in_time(self, autojump_clock: MockClock, sent: bytes) -> None:
        async with serving() as world:
            application = world.connect(BOTH)
            if sent:
                await application.send_all(sent)
            assert await application.read_all() == b""
            assert trio.current_time() == pytest.approx(limits.HANDSHAKE_SECONDS)

    async def test_too_many_drop_the_oldest(self, autojump_clock: MockClock) -> None:
        async with serving(most=2) as world:
            applications = [world.connect(BOTH) for _ in range(3)]
            assert await applications[0].read_all() == b""
            assert trio.current_time() == 0
            await applications[2].send_all(CONNECT_5)
            assert await applications[2].read(len(OPENED_5)) == OPENED_5

    async def test_each_principal_has_its_own_count(self, autojump_clock: MockClock) -> None:
        async with serving(most=2) as world:
            first = world.connect(BOTH, principal="ann")
            for _ in range(5):
                world.connect(BOTH, principal="eve")
            assert await first.ask(CONNECT_5, len(OPENED_5)) == OPENED_5

    async def test_without_descriptors_whoever_has_most_gives_one_back(self, autojump_clock: MockClock) -> None:
        async with serving() as world:
            world.dynamic.drop_oldest()
            first = world.connect(BOTH, principal="ann")
            second, third = (world.connect(BOTH, principal="eve") for _ in range(2))
            world.dynamic.drop_oldest()
            assert await second.read_all() == b""
            assert trio.current_time() == 0
            for application in (first, third):
                assert await application.ask(CONNECT_5, len(OPENED_5)) == OPENED_5
            await wait_all_tasks_blocked()
            world.dynamic.drop_oldest()
            assert not world.dynamic._negotiating

    async def test_a_fault_of_ours_costs_only_its_connection(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with serving() as world:
            with monkeypatch.context() as patch:
                patch.setattr(FakeIngress, "connect", lambda *_, **__: 1 / 0)
                assert await world.connect(BOTH).ask(CONNECT_5, 99) == OPENED_5[:2]
            assert [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]
            assert await world.connect(BOTH).ask(CONNECT_5, len(OPENED_5)) == OPENED_5

    async def test_those_that_wait_for_their_target_are_not_idle(self) -> None:
        async with serving(most=1) as world:
            world.ingress.gate = trio.Event()
            first = world.connect(BOTH)
            await first.send_all(CONNECT_5)
            await wait_all_tasks_blocked()
            world.connect(BOTH)
            await wait_all_tasks_blocked()
            world.ingress.gate.set()
            assert await first.read(len(OPENED_5)) == OPENED_5
