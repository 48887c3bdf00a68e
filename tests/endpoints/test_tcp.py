"""endpoints/tcp.py: binding, listening, accepting, and what goes wrong with each."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests import roles
from tests.roles import LogLines, abort, descriptors, tcp_pair
from wstunnel.endpoints import tcp
from wstunnel.errors import LocalError
from wstunnel.reactor import EpollReactor, Reactor, TaskReactor, make_reactor

lines = roles.lines  # the fixture


@pytest.fixture
def kept() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    yield sockets
    for sock in sockets:
        sock.close()


class FailingSocket(socket.socket):
    """Cannot bind: each address in `codes` fails with its errno."""

    codes: dict[str, int] = {}  # noqa: RUF012  # set by each test

    def bind(self, address: Any) -> None:
        code = self.codes.get(address[0])
        if code is not None:
            raise OSError(code, os.strerror(code))
        super().bind(address)


@pytest.fixture
def fail_bind(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, int]], None]:
    def fail(codes: dict[str, int]) -> None:
        monkeypatch.setattr(FailingSocket, "codes", codes)
        monkeypatch.setattr(tcp.socket, "socket", FailingSocket)

    return fail


class TestBind:
    def test_port_0_picks_one_and_nothing_listens_yet(self, kept: list[socket.socket]) -> None:
        sock = tcp.bind("127.0.0.1", 0)
        kept.append(sock)
        host, port = sock.getsockname()
        assert host == "127.0.0.1"
        assert port > 0
        assert not sock.getblocking()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=5)

    def test_ipv6_does_not_take_the_ipv4_port(self, kept: list[socket.socket]) -> None:
        for _ in range(20):  # which port is free for IPv6 is another's for IPv4 now and then
            sock = tcp.bind("::", 0)
            kept.append(sock)
            try:
                kept.append(tcp.bind("0.0.0.0", sock.getsockname()[1]))
            except LocalError:
                continue
            break
        assert kept[-1].family == socket.AF_INET
        assert tcp.local_name(sock) == f"[::]:{sock.getsockname()[1]}"

    def test_a_port_whose_connections_still_linger_can_be_bound_again(self, kept: list[socket.socket]) -> None:
        listener = tcp.bind("127.0.0.1", 0)
        tcp.activate(listener)
        address = listener.getsockname()
        with socket.create_connection(address) as near:
            listener.setblocking(True)
            far, _ = listener.accept()
            far.close()  # closed first: TIME_WAIT stays at this end
            assert near.recv(1) == b""
        listener.close()
        kept.append(tcp.bind(*address))

    def test_in_use(self, kept: list[socket.socket]) -> None:
        sock = tcp.bind("127.0.0.1", 0)
        kept.append(sock)
        tcp.activate(sock)
        before = descriptors()
        with pytest.raises(LocalError, match=rf"^cannot listen on {tcp.local_name(sock)}: the port is in use; stop"):
            tcp.bind("127.0.0.1", sock.getsockname()[1])
        assert descriptors() == before

    def test_in_use_since_it_was_bound(self, kept: list[socket.socket]) -> None:
        # With SO_REUSEADDR two sockets may be bound; the second to listen finds out.
        first = tcp.bind("127.0.0.1", 0)
        second = tcp.bind("127.0.0.1", first.getsockname()[1])
        kept += [first, second]
        tcp.activate(first)
        with pytest.raises(LocalError, match=r"the port is in use; stop what uses it \(ss -ltnp\) or choose another$"):
            tcp.activate(second)

    def test_not_an_address_of_this_machine(self) -> None:
        before = descriptors()
        with pytest.raises(LocalError, match=r"^cannot listen on 192\.0\.2\.1:80: this machine has no such address$"):
            tcp.bind("192.0.2.1", 80)
        assert descriptors() == before

    def test_no_permission_names_the_ways_out(self, fail_bind: Callable[[dict[str, int]], None]) -> None:
        fail_bind({"127.0.0.1": errno.EACCES})
        with pytest.raises(
            LocalError, match=r"^cannot listen on 127\.0\.0\.1:443: no permission .*CAP_NET_BIND_SERVICE"
        ):
            tcp.bind("127.0.0.1", 443)

    def test_anything_else_is_said_in_the_systems_words(self, fail_bind: Callable[[dict[str, int]], None]) -> None:
        fail_bind({"::1": errno.ENOBUFS})
        with pytest.raises(LocalError, match=r"^cannot listen on \[::1\]:80: No buffer space available$"):
            tcp.bind("::1", 80)

    def test_not_an_address_at_all(self) -> None:
        with pytest.raises(LocalError, match=r"^cannot listen on 127\.0\.0\.256:80: "):
            tcp.bind("127.0.0.256", 80)

    def test_a_missing_family_is_for_the_caller_to_judge(self, fail_bind: Callable[[dict[str, int]], None]) -> None:
        fail_bind({"::1": errno.EAFNOSUPPORT})
        with pytest.raises(OSError, match="not supported"):
            tcp.bind("::1", 80)


class TestBindAll:
    def test_both_families_get_the_same_port(self, kept: list[socket.socket]) -> None:
        kept += tcp.bind_all(("127.0.0.1", "::1"), 0, lenient=True)
        first, second = kept
        assert first.getsockname()[1] == second.getsockname()[1]

    @pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
    def test_one_of_two_families_may_be_missing(
        self, kept: list[socket.socket], fail_bind: Callable[[dict[str, int]], None], code: int
    ) -> None:
        fail_bind({"::": code})
        kept += tcp.bind_all(("0.0.0.0", "::"), 0, lenient=True)
        assert [sock.family for sock in kept] == [socket.AF_INET]

    @pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
    def test_but_not_all(self, fail_bind: Callable[[dict[str, int]], None], code: int) -> None:
        fail_bind({"0.0.0.0": code, "::": code})
        with pytest.raises(LocalError, match=r"^cannot listen on 0\.0\.0\.0, ::: "):
            tcp.bind_all(("0.0.0.0", "::"), 80, lenient=True)

    def test_nor_the_only_one(self, fail_bind: Callable[[dict[str, int]], None]) -> None:
        fail_bind({"::1": errno.EADDRNOTAVAIL})
        with pytest.raises(LocalError, match=r"\[::1\]:80: this machine has no such address"):
            tcp.bind_all(("::1",), 80, lenient=False)

    @pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
    def test_nor_one_that_was_named(self, fail_bind: Callable[[dict[str, int]], None], code: int) -> None:
        """`--bind 127.0.0.1 --bind ADDR`: an address that somebody asked for is not left out in silence."""
        fail_bind({"::1": code})
        with pytest.raises(LocalError):
            tcp.bind_all(("127.0.0.1", "::1"), 0, lenient=False)

    def test_a_failure_leaves_none_open(self, fail_bind: Callable[[dict[str, int]], None]) -> None:
        fail_bind({"::1": errno.EADDRINUSE})
        before = descriptors()
        with pytest.raises(LocalError, match="in use"):
            tcp.bind_all(("127.0.0.1", "::1"), 0, lenient=True)
        assert descriptors() == before


class TestNames:
    def test_of_both_ends(self) -> None:
        one, two = tcp_pair()
        assert tcp.peer_name(one) == tcp.local_name(two)
        assert tcp.peer_name(two).startswith("127.0.0.1:")
        abort(one)
        two.close()

    def test_of_an_end_that_has_gone(self) -> None:
        with socket.socket() as sock:
            assert tcp.peer_name(sock) == ""


class ScriptedListener(socket.socket):
    """A real listener whose accepts are scripted: errno, or a socket. It is readable while anything is left.

    One connection that nobody accepts keeps it readable for the selector.
    """

    def __init__(self, *script: Any) -> None:
        super().__init__()
        self.script = list(script)
        self.attempts = 0
        self.bind(("127.0.0.1", 0))
        self.listen()
        self.waiting = socket.create_connection(self.getsockname())

    def accept(self) -> tuple[socket.socket, Any]:
        self.attempts += 1
        if not self.script:
            super().accept()[0].close()  # readable no more
            raise BlockingIOError(errno.EAGAIN, "again")
        step = self.script.pop(0)
        if isinstance(step, int):
            raise OSError(step, os.strerror(step))
        return step, None

    def close(self) -> None:
        self.waiting.close()
        super().close()


Accepted = list[tuple[float, socket.socket]]


class TestListener:
    @pytest.fixture(params=["epoll", "task"])
    async def reactor(self, request: pytest.FixtureRequest, nursery: trio.Nursery) -> Reactor:
        if request.param == "epoll" and not hasattr(select, "epoll"):
            pytest.skip("this system has no epoll")
        reactor = EpollReactor() if request.param == "epoll" else TaskReactor()
        await nursery.start(reactor.run)
        return reactor

    @pytest.fixture
    def pairs(self, kept: list[socket.socket]) -> list[tuple[socket.socket, socket.socket]]:
        made = [tcp_pair(), tcp_pair()]
        for pair in made:
            kept += pair
        return made

    def start(self, reactor: Reactor, listener: socket.socket, **options: Any) -> tuple[tcp.Listener, Accepted]:
        got: Accepted = []
        acceptor = tcp.Listener(listener, lambda sock: got.append((trio.current_time(), sock)), **options)
        acceptor.start(reactor)
        return acceptor, got

    async def test_connections_arrive_ready_for_use(self, reactor: Reactor, kept: list[socket.socket]) -> None:
        listener = tcp.bind("127.0.0.1", 0)
        tcp.activate(listener)
        address = listener.getsockname()
        _, got = self.start(reactor, listener)
        for count in range(1, 4):
            kept.append(socket.create_connection(address))
            with trio.fail_after(10):
                while len(got) < count:
                    await trio.sleep(0.001)
        assert sorted(sock.getpeername() for _, sock in got) == sorted(sock.getsockname() for sock in kept)
        for _, sock in got:
            kept.append(sock)
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    async def test_those_that_came_before_it_started_are_accepted_at_once(
        self, reactor: Reactor, kept: list[socket.socket]
    ) -> None:
        listener = tcp.bind("127.0.0.1", 0)
        tcp.activate(listener)
        kept += [socket.create_connection(listener.getsockname()) for _ in range(3)]
        _, got = self.start(reactor, listener)
        await wait_all_tasks_blocked()
        assert len(got) == 3
        kept += [sock for _, sock in got]

    async def test_dropping_it_closes_the_listener(self, reactor: Reactor) -> None:
        listener = tcp.bind("127.0.0.1", 0)
        tcp.activate(listener)
        address = listener.getsockname()
        acceptor, _ = self.start(reactor, listener)
        await wait_all_tasks_blocked()
        reactor.drop(acceptor)
        assert listener.fileno() == -1
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)

    async def test_the_end_of_the_reactor_closes_the_listener(self) -> None:
        reactor = make_reactor()
        listener = tcp.bind("127.0.0.1", 0)
        tcp.activate(listener)
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run)
            self.start(reactor, listener)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert listener.fileno() == -1

    async def test_a_listener_that_cannot_be_watched_is_closed(
        self, reactor: Reactor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_handler: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(reactor, "_watch", refuse)
        listener = tcp.bind("127.0.0.1", 0)
        with pytest.raises(LocalError, match="max_user_watches"):
            self.start(reactor, listener)
        assert listener.fileno() == -1

    @pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
    async def test_survives_a_lack_of_descriptors_and_says_so_once(
        self,
        autojump_clock: MockClock,
        reactor: Reactor,
        pairs: list[tuple[socket.socket, socket.socket]],
        lines: LogLines,
        code: int,
    ) -> None:
        listener = ScriptedListener(code, code, code, pairs[0][0])
        given_back: list[float] = []
        _, got = self.start(reactor, listener, exhausted=lambda: given_back.append(trio.current_time()))
        began = trio.current_time()
        await trio.sleep(3 * tcp.RETRY_SECONDS - 0.01)
        assert not got
        assert listener.attempts == 3, "it waits, though the connection in the backlog is readable for ever"
        await trio.sleep(0.02)
        assert [sock for _, sock in got] == [pairs[0][0]]
        assert given_back == pytest.approx([began + step * tcp.RETRY_SECONDS for step in range(3)])
        (said,) = lines("cannot accept connections")
        assert said == {"address": tcp.local_name(listener), "reason": os.strerror(code)}

    async def test_it_is_said_again_after_it_has_worked(
        self,
        autojump_clock: MockClock,
        reactor: Reactor,
        pairs: list[tuple[socket.socket, socket.socket]],
        lines: LogLines,
    ) -> None:
        listener = ScriptedListener(errno.EMFILE, pairs[0][0], errno.EAGAIN, errno.EMFILE, pairs[1][0])
        _, got = self.start(reactor, listener)
        await trio.sleep(1)
        assert [sock for _, sock in got] == [pairs[0][0], pairs[1][0]]
        assert len(lines("cannot accept connections")) == 2

    async def test_dropped_while_it_waits_for_a_descriptor(
        self, autojump_clock: MockClock, reactor: Reactor, lines: LogLines
    ) -> None:
        listener = ScriptedListener(errno.EMFILE, errno.EMFILE)
        acceptor, got = self.start(reactor, listener)
        await trio.sleep(tcp.RETRY_SECONDS / 2)
        reactor.drop(acceptor)
        await trio.sleep(1)
        assert (listener.attempts, got) == (1, [])
        assert len(lines.all()) == 1

    async def test_it_waits_too_when_giving_back_a_descriptor_fails(
        self,
        autojump_clock: MockClock,
        reactor: Reactor,
        pairs: list[tuple[socket.socket, socket.socket]],
        lines: LogLines,
    ) -> None:
        """A fault there must not make it try again in a loop, which would keep the reactor from all else."""

        def fault() -> None:
            raise KeyError("a fault")

        listener = ScriptedListener(errno.EMFILE, errno.EMFILE, pairs[0][0])
        _, got = self.start(reactor, listener, exhausted=fault)
        await trio.sleep(1.5 * tcp.RETRY_SECONDS)
        assert listener.attempts == 2
        assert len(lines("accepting has failed")) == 2
        await trio.sleep(tcp.RETRY_SECONDS)
        assert [sock for _, sock in got] == [pairs[0][0]]

    async def test_a_connection_that_was_aborted_before_is_nobodys_loss(
        self, reactor: Reactor, pairs: list[tuple[socket.socket, socket.socket]], lines: LogLines
    ) -> None:
        _, got = self.start(reactor, ScriptedListener(errno.ECONNABORTED, errno.EPROTO, pairs[0][0]))
        await wait_all_tasks_blocked()
        assert [sock for _, sock in got] == [pairs[0][0]]
        assert not lines.all()

    async def test_a_connection_that_cannot_be_set_up_is_closed(
        self, reactor: Reactor, pairs: list[tuple[socket.socket, socket.socket]]
    ) -> None:
        class Broken:
            closed = False

            def setblocking(self, _blocking: bool) -> None:
                pass

            def setsockopt(self, *_: object) -> None:
                raise OSError(errno.EINVAL, "Invalid argument")  # macOS, for a peer that has gone

            def close(self) -> None:
                self.closed = True

        broken = Broken()
        _, got = self.start(reactor, ScriptedListener(broken, pairs[0][0]))
        await wait_all_tasks_blocked()
        assert [sock for _, sock in got] == [pairs[0][0]]
        assert broken.closed

    async def test_a_fault_of_ours_concerns_that_connection_only(
        self, reactor: Reactor, pairs: list[tuple[socket.socket, socket.socket]], lines: LogLines
    ) -> None:
        (bad, _), (good, _) = pairs
        got: list[socket.socket] = []

        def accepted(sock: socket.socket) -> None:
            if sock is bad:
                raise KeyError("a fault")
            got.append(sock)

        listener = ScriptedListener(bad, good)
        tcp.Listener(listener, accepted).start(reactor)
        await wait_all_tasks_blocked()
        assert got == [good]
        (said,) = lines("fault in our own code")
        assert said["address"] == tcp.local_name(listener)
        assert bad.fileno() >= 0, "it may be on the reactor already, which alone closes what it has"

    async def test_a_crowd_does_not_keep_others_waiting(self, reactor: Reactor) -> None:
        class Connection:
            def setblocking(self, _blocking: bool) -> None:
                pass

            def setsockopt(self, *_: object) -> None:
                pass

        class Counted(tcp.Listener):
            def on_readable(self) -> None:
                super().on_readable()
                counts.append(len(got))

        counts: list[int] = []
        got: list[socket.socket] = []
        crowd = [Connection() for _ in range(3 * tcp.BATCH)]
        Counted(ScriptedListener(*crowd), got.append).start(reactor)
        await wait_all_tasks_blocked()
        assert counts == [tcp.BATCH, 2 * tcp.BATCH, 3 * tcp.BATCH, 3 * tcp.BATCH]
