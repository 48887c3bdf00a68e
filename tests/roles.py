"""Both roles in the test's own process: over loopback with real sockets, or in memory where time is the point."""

from __future__ import annotations

import errno
import heapq
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.memory import MemoryReactor, MemorySocket
from tests.ports import unused_port
from wstunnel import client as client_module
from wstunnel import egress as egress_module
from wstunnel import limits, reverse_server
from wstunnel import server as server_module
from wstunnel.absence import YOUNG_SECONDS
from wstunnel.auth import LoginUrl, Token, Users, parse_login_url
from wstunnel.client_session import ClientSession
from wstunnel.config import ClientConfig, ServerConfig
from wstunnel.dial import _permitted_family
from wstunnel.egress import Egress
from wstunnel.endpoints.listeners import Bound
from wstunnel.errors import LocalError, StreamError, WstunnelError
from wstunnel.forwards import Forward, parse_forward, parse_reverse
from wstunnel.link import Link
from wstunnel.policy import Policy, parse_listen_rule
from wstunnel.reverse_client import ReverseForwards
from wstunnel.server import Server
from wstunnel.server_session import ServerSession
from wstunnel.state import read_announcement
from wstunnel.stream import Stream
from wstunnel.targets import Target, join_host_port
from wstunnel.wire.protocol import LinkProtocol

SECONDS = 45.0
"""Longest wait for anything that must come."""


# --- the log --------------------------------------------------------------------------------------------------------


class LogLines:
    """What the roles logged, with the fields apart."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __call__(self, text: str, logger: str = "") -> list[dict[str, Any]]:
        """The fields of each line with this message, of one role or of all."""
        return [
            record.msg.fields  # type: ignore[attr-defined]
            for record in self._caplog.records
            if getattr(record.msg, "text", None) == text and record.name.endswith(logger)
        ]

    def all(self) -> list[str]:
        """Level and text of each line."""
        return [f"{record.levelname} {record.name} {record.getMessage()}" for record in self._caplog.records]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> LogLines:
    monkeypatch.setattr(logging.getLogger("wstunnel"), "propagate", True)
    caplog.set_level(logging.DEBUG, "wstunnel")
    return LogLines(caplog)


# --- real sockets ---------------------------------------------------------------------------------------------------


@dataclass
class RunningServer:
    """A server in this process. Its internals are there to be counted."""

    server: Server
    addresses: list[str]
    state_dir: Path
    token: str
    shutdown: trio.Event

    @property
    def port(self) -> int:
        return int(self.addresses[0].rsplit(":", 1)[1])

    @property
    def url(self) -> LoginUrl:
        """The login URL, with the pin that the server announced."""
        announced = read_announcement(self.state_dir)
        assert announced is not None
        return LoginUrl(announced.scheme, "127.0.0.1", self.port, "/", Token.parse(self.token), announced.pins)

    def sessions(self) -> list[Any]:
        return list(self.server._sessions.values())

    def links(self) -> int:
        return sum(len(session.links) for session in self.sessions())


@dataclass
class RunningClient:
    """A client in this process."""

    session: ClientSession
    addresses: list[str]
    shutdown: trio.Event

    @property
    def ports(self) -> list[int]:
        return [int(address.rsplit(":", 1)[1]) for address in self.addresses]

    @property
    def idle(self) -> int:
        return len(self.session.ingress.idle)


def invite(state_dir: Path, name: str = "alice") -> str:
    """A new user's token."""
    token = Token.new()
    Users(state_dir).add_token(name, token)
    return token.reveal()


@asynccontextmanager
async def serving(state_dir: Path, *, plain: bool = True, **changes: Any) -> AsyncIterator[RunningServer]:
    """A server on a free port of 127.0.0.1 with one user, `alice`; stopped in good order at the end."""
    token = invite(state_dir)
    config = ServerConfig(**({"port": 0, "bind": ("127.0.0.1",), "plain": plain, "state_dir": state_dir} | changes))
    made: list[Server] = []

    class Recorded(Server):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    shutdown = trio.Event()

    async def run(task_status: trio.TaskStatus[list[str]]) -> None:
        await server_module.run(config, shutdown=shutdown, task_status=task_status)

    async with trio.open_nursery() as nursery:
        with mock.patch.object(server_module, "Server", Recorded):
            addresses = await nursery.start(run)
        yield RunningServer(made[0], addresses, state_dir, token, shutdown)
        shutdown.set()
        nursery.cancel_scope.deadline = trio.current_time() + SECONDS


def forwards(*specs: str) -> tuple[Forward, ...]:
    return tuple(forward for spec in specs for forward in parse_forward(spec))


@asynccontextmanager
async def connecting(url: LoginUrl, *specs: str, **changes: Any) -> AsyncIterator[RunningClient]:
    """A client with these local forwards; stopped in good order at the end."""
    config = ClientConfig(**({"url": url, "local_forwards": forwards(*specs), "idle_links": 2} | changes))
    made: list[ClientSession] = []

    class Recorded(ClientSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    shutdown = trio.Event()

    async def run(task_status: trio.TaskStatus[list[str]]) -> None:
        await client_module.run(config, shutdown=shutdown, task_status=task_status)

    async with trio.open_nursery() as nursery:
        with mock.patch.object(client_module, "ClientSession", Recorded):
            addresses = await nursery.start(run)
        yield RunningClient(made[0], addresses, shutdown)
        shutdown.set()
        nursery.cancel_scope.deadline = trio.current_time() + SECONDS


async def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait for what must become true."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.002)


async def ready(client: RunningClient) -> None:
    """Wait for the pool to be as full as it is kept."""
    await until(lambda: client.idle >= client.session._least and client.session._control is not None)


def free_port() -> int:
    """A port on which nothing listens."""
    return unused_port()


class Targets:
    """Servers for the egress to dial."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.resets = 0
        self.ends = 0
        self.accepted = 0

    async def listen(self, handler: Callable[[trio.SocketStream], Awaitable[None]], host: str = "127.0.0.1") -> int:
        """Serve connections; a reset in `handler` is counted, as is its orderly return. Returns the port."""

        async def counted(stream: trio.SocketStream) -> None:
            self.accepted += 1
            try:
                await handler(stream)
                self.ends += 1
            except (trio.BrokenResourceError, ConnectionResetError):
                self.resets += 1

        listeners = await self._nursery.start(
            lambda task_status: trio.serve_tcp(counted, 0, host=host, task_status=task_status)
        )
        return int(listeners[0].socket.getsockname()[1])

    async def echo(self, host: str = "127.0.0.1") -> int:
        async def handler(stream: trio.SocketStream) -> None:
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()

        return await self.listen(handler, host)


@asynccontextmanager
async def targets() -> AsyncIterator[Targets]:
    async with trio.open_nursery() as nursery:
        yield Targets(nursery)
        nursery.cancel_scope.cancel()


async def application(port: int, host: str = "127.0.0.1") -> trio.SocketStream:
    """An application's connection to a forward."""
    return await trio.open_tcp_stream(host, port)


async def exchange(port: int, data: bytes = b"ping", host: str = "127.0.0.1") -> bytes:
    """Connect, send, say the end, read to the end."""
    with trio.fail_after(SECONDS):
        async with await application(port, host) as stream:
            await stream.send_all(data)
            await stream.send_eof()
            return b"".join([chunk async for chunk in stream])


async def reset_code(stream: trio.SocketStream) -> str:
    """How the connection ends: `reset` or `end`."""
    with trio.fail_after(SECONDS):
        try:
            async for _ in stream:
                pass
        except trio.BrokenResourceError as error:
            assert isinstance(error.__cause__, ConnectionResetError)
            return "reset"
    return "end"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def unwrapped(group: BaseException) -> BaseException:
    """The one exception inside of groups."""
    while isinstance(group, BaseExceptionGroup):
        assert len(group.exceptions) == 1, group.exceptions
        group = group.exceptions[0]
    return group


@pytest.fixture
def raises() -> Callable[..., Any]:
    """Like `pytest.raises`, through Trio's exception groups."""

    class Raises:
        def __init__(self, expected: type[WstunnelError], match: str = "") -> None:
            self.expected, self.match = expected, match
            self.error: Any = None

        def __enter__(self) -> Raises:
            return self

        def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
            assert error is not None, f"{self.expected.__name__} was not raised"
            self.error = unwrapped(error)
            if not isinstance(self.error, self.expected):
                return False
            assert self.match in str(self.error)
            return True

    return Raises


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection on loopback, non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    one.setblocking(False)
    two.setblocking(False)
    return one, two


def abort(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# --- memory ---------------------------------------------------------------------------------------------------------


class NamedSocket(MemorySocket):
    """Has addresses; remembers what was written, call by call."""

    family = socket.AF_INET  # type: ignore[assignment]

    def __init__(self, *pipes: Any) -> None:
        super().__init__(*pipes)
        self.writes: list[bytes] = []

    def getpeername(self) -> tuple[str, int]:
        return "192.0.2.1", self._fd

    def send(self, data: bytes | memoryview) -> int:
        count = super().send(data)
        self.writes.append(bytes(data[:count]))
        return count


class ClockedReactor(MemoryReactor):
    """The memory reactor by Trio's clock."""

    @property
    def now(self) -> float:  # type: ignore[override]
        return trio.current_time()

    @now.setter
    def now(self, _value: float) -> None:
        pass

    def _run_later(self) -> None:
        """Not after each handler: `turn_all` does it at the end of a batch, as the real one does."""

    def _run_due(self) -> bool:
        """Alarms whose time has come, those apart that are set meanwhile."""
        due = []
        while self._alarms and self._alarms[0][0] <= self.now:
            due.append(heapq.heappop(self._alarms)[2])
        for function in due:
            function()
        return bool(due)

    def turn_all(self) -> bool:
        """Everything that can be done without another byte arriving."""
        busy = False
        while True:
            busy |= self._run_due()
            handlers = self.ready()
            functions, self._later = self._later, []
            if not handlers and not functions:
                return busy
            busy = True
            for handler in handlers:
                if handler.sock is not None:
                    self.turn(handler)
            for function in functions:
                function()


@dataclass
class FakeDialler:
    """Connects a client session to a `Server` in memory.

    `error` fails every dial, after `seconds`; `greets` False: the server end is left to the test, in `ends`.
    """

    world: World
    seconds: float = 0.0
    error: Exception | None = None
    greets: bool = True
    leftover: bytes = b""
    user: str = "alice"
    url: LoginUrl = field(default_factory=lambda: parse_login_url("ws://127.0.0.1:8080/"))
    begun: list[float] = field(default_factory=list)
    under_way: int = 0
    most: int = 0
    ends: list[tuple[NamedSocket, NamedSocket]] = field(default_factory=list)

    async def dial(self) -> tuple[Any, bytes]:
        self.begun.append(trio.current_time())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await trio.sleep(self.seconds)
        finally:
            self.under_way -= 1
        if self.error is not None:
            raise self.error
        near, far = self.world.pair()
        self.ends.append((near, far))
        if self.greets:
            self.world.serve(far, self.user)
        return near, self.leftover

    def failed(self, _error: Exception) -> None:
        """There is but one server."""


class MemoryListener:
    """A socket that listens, in memory: `World.arrive` connects to it."""

    family = socket.AF_INET

    def __init__(self, name: str) -> None:
        MemorySocket._number += 1
        self._fd = MemorySocket._number
        self.name = name
        self.closed = False
        self.reset_by_peer = False
        self.backlog: list[NamedSocket] = []

    def fileno(self) -> int:
        return -1 if self.closed else self._fd

    def getsockname(self) -> tuple[str, int]:
        host, _, port = self.name.rpartition(":")
        return host, int(port)

    def readable(self) -> bool:
        return bool(self.backlog)

    def writable(self) -> bool:
        return False

    def accept(self) -> tuple[NamedSocket, tuple[str, int]]:
        assert not self.closed
        if not self.backlog:
            raise BlockingIOError(errno.EAGAIN, "again")
        sock = self.backlog.pop(0)
        return sock, sock.getpeername()

    def close(self) -> None:
        self.closed = True


class World:
    """A client session and a server whose links are memory; `settle` lets everything happen that now can.

    `targets` holds the other ends of what the server dialled; `refusal` refuses its dials, `dial_seconds` delays them,
    as does `gate` until it is set. Both ends' CLOCK_BOOTTIME is Trio's clock and `suspended` seconds.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        idle_links: int = 2,
        random: Callable[[], float] | None = None,
        resume_window: int = limits.RESUME_WINDOW_SECONDS,
        max_resume_window: int = limits.MAX_RESUME_WINDOW_SECONDS,
        reverse: Sequence[str] = (),
        allow_listen: Sequence[str] = (),
    ) -> None:
        self.nursery = nursery
        self.client_reactor = ClockedReactor()
        self.server_reactor = ClockedReactor()
        self._config = ServerConfig(
            state_dir=Path("/nonexistent"),
            max_resume_window=max_resume_window,
            allow_listen=tuple(map(parse_listen_rule, allow_listen)),
        )
        self.server = self.make_server()
        self.listeners: dict[str, MemoryListener] = {}
        self.dialler = FakeDialler(self)
        self.session = self.make_client(
            *reverse, dialler=self.dialler, idle_links=idle_links, resume_window=resume_window, random=random
        )
        self.sockets: list[tuple[NamedSocket, NamedSocket]] = []
        self.targets: list[NamedSocket] = []
        self.dialled: list[str] = []
        self.refusal: StreamError | None = None
        self.dial_seconds = 0.0
        self.gate: trio.Event | None = None
        self.suspended = 0.0

    def make_client(
        self,
        *reverse: str,
        dialler: FakeDialler | None = None,
        idle_links: int = 2,
        resume_window: int = limits.RESUME_WINDOW_SECONDS,
        random: Callable[[], float] | None = None,
        **options: bool,
    ) -> ClientSession:
        """A client with these reverse forwards. `run` and `warm` are for the world's first one only."""
        session = ClientSession(
            dialler or FakeDialler(self),  # type: ignore[arg-type]
            self.client_reactor,  # type: ignore[arg-type]
            idle_links=idle_links,
            resume_window=resume_window,
            reverse=ReverseForwards([forward for spec in reverse for forward in parse_reverse(spec)], **options),
            random_float=random or (lambda: 1.0),
        )
        session.egress = Egress(self.client_reactor, self.nursery)  # type: ignore[arg-type]
        return session

    def boottime(self) -> float:
        return trio.current_time() + self.suspended

    def make_server(self) -> Server:
        """A server that remembers nothing. Links that are dialled from now on go to the last one."""
        self.server_reactor = ClockedReactor()
        self.server = Server(self._config, self.server_reactor, self.nursery, [], None)  # type: ignore[arg-type]
        return self.server

    def pair(self) -> tuple[NamedSocket, NamedSocket]:
        near, far = NamedSocket.pair()
        assert isinstance(near, NamedSocket) and isinstance(far, NamedSocket)
        self.sockets.append((near, far))
        return near, far

    def serve(self, sock: NamedSocket, user: str = "alice") -> Link:
        """The server's end of a link, as after its handshake."""
        link = Link(LinkProtocol("server"), self.server, peer="192.0.2.7:1", now=trio.current_time())
        self.server._greeting[link] = user
        link.start(self.server_reactor, sock)  # type: ignore[arg-type]
        return link

    async def dial_target(
        self, target: Target, policy: Policy, *, limiter: object, sources: object, begun: None
    ) -> tuple[Any, str]:
        _permitted_family(target, policy)
        self.dialled.append(str(target))
        assert isinstance(limiter, trio.CapacityLimiter)
        await trio.sleep(self.dial_seconds)
        if self.gate is not None:
            await self.gate.wait()
        if self.refusal is not None:
            raise self.refusal
        near, far = self.pair()
        self.targets.append(far)
        return near, "10.0.0.5:5432"

    def connect(self, data: bytes = b"", spec: str = "5432:db:5432") -> NamedSocket:
        """An application connects and has sent `data` already. Returns its end."""
        near, far = self.pair()
        far.send(data)
        far.outgoing.move(len(data))
        self.session.accepted(near, forwards(spec)[0])  # type: ignore[arg-type]
        return far

    def listen(self, forward: Forward) -> list[Bound]:
        """What reverse forwards listen on at the server."""
        names = [join_host_port(address, forward.port or 40000 + len(self.listeners)) for address in forward.addresses]
        if used := [name for name in names if name in self.listeners and not self.listeners[name].closed]:
            raise LocalError(f"cannot listen on {used[0]}: the port is in use")
        self.listeners |= {name: MemoryListener(name) for name in names}
        return [Bound(self.listeners[name], name) for name in names]  # type: ignore[arg-type]

    def arrive(self, data: bytes = b"", name: str = "127.0.0.1:8080") -> NamedSocket:
        """An application connects to a reverse forward, and has sent `data` already. Returns its end."""
        near, far = self.pair()
        far.send(data)
        far.outgoing.move(len(data))
        self.listeners[name].backlog.append(near)
        return far

    def read(self, sock: NamedSocket) -> bytes:
        """All that an application or a target can read now."""
        pipe = sock.incoming
        pipe.move(len(pipe.sent))
        data = bytes(pipe.arrived)
        pipe.arrived.clear()
        return data

    def move(self) -> bool:
        """What was written arrives."""
        moved = False
        for one, two in self.sockets:
            for pipe in (one.outgoing, two.outgoing):
                if pipe.sent or (pipe.ended and not pipe.end_arrived):
                    pipe.move(len(pipe.sent))
                    moved = True
        return moved

    async def settle(self) -> None:
        """Move bytes and turn both reactors until nothing more happens at this time."""
        while True:
            await wait_all_tasks_blocked()
            busy = self.client_reactor.turn_all() | self.server_reactor.turn_all()
            if not self.move() and not busy:
                return

    # --- streams and cuts ---------------------------------------------------------------------------------------------

    async def warm(self) -> World:
        """Start the client's dialling, and nothing that goes by the clock: `settle` moves everything."""
        self.nursery.start_soon(self.session.keep_links)
        await self.settle()
        assert self.idle >= self.session._least and self.session._control is not None
        for link in self.session.links:
            link.created -= YOUNG_SECONDS  # no test has that second
        return self

    @property
    def far_session(self) -> ServerSession:
        """The client's session at the server."""
        (session,) = self.server._sessions.values()
        return session

    def near_stream(self, number: int = -1) -> Stream:
        return list(self.session.streams.values())[number]

    def far_stream(self, near: Stream | None = None) -> Stream:
        """The same stream at the server."""
        return self.far_session.streams[(near or self.near_stream()).state.id]

    async def stream(self, data: bytes = b"") -> tuple[NamedSocket, Stream, Stream, NamedSocket]:
        """A stream that was opened: its application's socket, its two ends, its target's socket."""
        application = self.connect(data)
        await self.settle()
        near = self.near_stream()
        assert near.state.opened
        return application, near, self.far_stream(near), self.targets[-1]

    def far_link(self, link: Link) -> Link:
        """The server's end of a client's link."""
        sock: Any = link.sock
        (far,) = [
            handler
            for handler in self.server_reactor.handlers
            if isinstance(handler, Link) and handler.sock is sock.peer
        ]
        return far

    def freeze(self, link: Link) -> tuple[NamedSocket, NamedSocket]:
        """A black hole: what is on the way is gone, nothing arrives any more, not even an end. Returns its sockets."""
        sock: Any = link.sock
        ends = sock, sock.peer
        self.sockets = [pair for pair in self.sockets if sock not in pair]
        for end in ends:
            end.outgoing.sent.clear()
            end.outgoing.arrived.clear()
        return ends

    def cut(self, link: Link) -> None:
        """The connection is reset under both ends; what is on the way is gone. They notice in their next turn."""
        for end in self.freeze(link):
            end.reset_by_peer = True

    def cut_all(self) -> None:
        """All links at once, as when the network changes."""
        for link in list(self.session.links):
            self.cut(link)

    def cut_near(self, link: Link) -> None:
        """Only the client's end notices that the connection is gone."""
        self.freeze(link)
        link.lose("cut")

    def cut_far(self, link: Link) -> None:
        """Only the server's end notices."""
        far = self.far_link(link)
        self.freeze(link)
        far.lose("cut")

    async def pump(self, step: float = 0.01) -> None:
        """A task that keeps everything moving as the clock goes on."""
        while True:
            while self.client_reactor.turn_all() | self.server_reactor.turn_all() | self.move():
                await trio.lowlevel.checkpoint()
            await trio.sleep(step)

    def run(self) -> None:
        """Start the client's tasks, the server's sweep and the pump."""
        self.nursery.start_soon(self.session.keep_links)
        self.nursery.start_soon(client_module._sweep, self.session)
        self.nursery.start_soon(self.server.sweep_forever)
        self.nursery.start_soon(self.pump)

    @property
    def idle(self) -> int:
        return len(self.session.ingress.idle)


@pytest.fixture
def make_world(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    def make(**options: Any) -> World:
        world = World(nursery, **options)
        monkeypatch.setattr(egress_module, "begin_dial", lambda *_: None)
        monkeypatch.setattr(egress_module, "dial_target", world.dial_target)
        monkeypatch.setattr(reverse_server, "listen", world.listen)
        # The machine's own clock runs on while a test's stands still: that would look like a suspend.
        monkeypatch.setattr(server_module, "boottime", world.boottime)
        monkeypatch.setattr(client_module, "boottime", world.boottime)
        return world

    return make


class Refusing:
    """A getaddrinfo or accept that fails once, twice, ... and then works."""

    def __init__(self, real: Callable[..., Any], codes: Sequence[int]) -> None:
        self._real = real
        self._codes: Iterator[int] = iter(codes)
        self.failed = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        code = next(self._codes, None)
        if code is not None:
            self.failed += 1
            raise OSError(code, os.strerror(code), errno.errorcode[code])
        return self._real(*args, **options)
