"""endpoints/tcp.py: binding, listening, accepting, and what goes wrong with each."""

from __future__ import annotations

import errno
import os
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
        sock = tcp.bind("::", 0)
        kept.append(sock)
        kept.append(tcp.bind("0.0.0.0", sock.getsockname()[1]))
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


class FakeListener:
    """A listener whose accepts are scripted: errno, or a socket. It is readable while anything is left."""

    def __init__(self, *script: int | socket.socket) -> None:
        self.script = list(script)
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.closed = False

    def fileno(self) -> int:
        return self.sock.fileno()

    def getsockname(self) -> Any:
        return self.sock.getsockname()

    def accept(self) -> tuple[socket.socket, Any]:
        if not self.script:
            raise BlockingIOError(errno.EAGAIN, "again")
        step = self.script.pop(0)
        if isinstance(step, int):
            raise OSError(step, os.strerror(step))
        return step, None

    def close(self) -> None:
        self.closed = True
        self.sock.close()


class TestAccept:
    @pytest.fixture
    def always_readable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def wait_readable(listener: FakeListener) -> None:
            if listener.script:
                await trio.lowlevel.checkpoint()
            else:
                await trio.sleep_forever()

        monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)

    async def accept(self, listener: Any, nursery: trio.Nursery) -> list[tuple[float, socket.socket]]:
        got: list[tuple[float, socket.socket]] = []
        nursery.start_soon(tcp.accept_forever, listener, lambda sock: got.append((trio.current_time(), sock)))
        return got

    async def test_connections_arrive_ready_for_use(self, nursery: trio.Nursery) -> None:
        listener = tcp.bind("127.0.0.1", 0)
        tcp.activate(listener)
        address = listener.getsockname()
        got = await self.accept(listener, nursery)
        near = [await trio.open_tcp_stream(*address) for _ in range(3)]
        while len(got) < 3:
            await trio.sleep(0.001)
        for _, sock in got:
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            sock.close()
        for stream in near:
            await stream.aclose()

    async def test_cancelling_closes_the_listener(self) -> None:
        listener = tcp.bind("127.0.0.1", 0)
        tcp.activate(listener)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tcp.accept_forever, listener, lambda sock: None)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert listener.fileno() == -1

    @pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
    async def test_survives_a_lack_of_descriptors_and_says_so_once(
        self,
        always_readable: None,
        autojump_clock: MockClock,
        lines: LogLines,
        code: int,
    ) -> None:
        one, two = tcp_pair()
        listener = FakeListener(code, code, code, one)
        async with trio.open_nursery() as nursery:
            got = await self.accept(listener, nursery)
            await trio.sleep(3 * tcp.RETRY_SECONDS - 0.01)
            assert not got
            await trio.sleep(0.02)
            assert [sock for _, sock in got] == [one]
            (said,) = lines("cannot accept connections")
            assert said == {"address": tcp.local_name(listener.sock), "reason": os.strerror(code)}
            nursery.cancel_scope.cancel()
        one.close()
        two.close()
        assert listener.closed

    async def test_it_is_said_again_after_it_has_worked(
        self,
        always_readable: None,
        autojump_clock: MockClock,
        lines: LogLines,
    ) -> None:
        pairs = [tcp_pair(), tcp_pair()]
        listener = FakeListener(errno.EMFILE, pairs[0][0], errno.EAGAIN, errno.EMFILE, pairs[1][0])
        async with trio.open_nursery() as nursery:
            got = await self.accept(listener, nursery)
            await trio.sleep(1)
            assert len(got) == 2
            nursery.cancel_scope.cancel()
        assert len(lines("cannot accept connections")) == 2
        for pair in pairs:
            pair[0].close()
            pair[1].close()

    async def test_a_connection_that_was_aborted_before_is_nobodys_loss(
        self,
        always_readable: None,
        autojump_clock: MockClock,
        lines: LogLines,
    ) -> None:
        one, two = tcp_pair()
        listener = FakeListener(errno.ECONNABORTED, errno.EPROTO, one)
        async with trio.open_nursery() as nursery:
            got = await self.accept(listener, nursery)
            await trio.sleep(0.01)
            assert [sock for _, sock in got] == [one]
            nursery.cancel_scope.cancel()
        assert not lines.all()
        one.close()
        two.close()

    async def test_a_connection_that_cannot_be_set_up_is_closed(
        self, always_readable: None, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Broken:
            closed = False

            def setblocking(self, _blocking: bool) -> None:
                pass

            def setsockopt(self, *_: object) -> None:
                raise OSError(errno.EINVAL, "Invalid argument")  # macOS, for a peer that has gone

            def close(self) -> None:
                self.closed = True

        broken: Any = Broken()
        one, two = tcp_pair()
        listener = FakeListener(broken, one)
        async with trio.open_nursery() as nursery:
            got = await self.accept(listener, nursery)
            await trio.sleep(0.01)
            assert [sock for _, sock in got] == [one]
            nursery.cancel_scope.cancel()
        assert broken.closed
        one.close()
        two.close()

    async def test_a_crowd_does_not_keep_other_tasks_waiting(
        self, always_readable: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Connection:
            def setblocking(self, _blocking: bool) -> None:
                pass

            def setsockopt(self, *_: object) -> None:
                pass

        crowd: list[Any] = [Connection() for _ in range(3 * tcp.BATCH)]
        listener = FakeListener(*crowd)
        most = seen = 0
        async with trio.open_nursery() as nursery:
            got = await self.accept(listener, nursery)
            while len(got) < len(crowd):
                await trio.lowlevel.checkpoint()
                most, seen = max(most, len(got) - seen), len(got)
            nursery.cancel_scope.cancel()
        assert most == tcp.BATCH
