"""Dialling: real sockets on loopback where the socket is the point, a fake network where time is."""

from __future__ import annotations

import errno
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.ports import unused_port
from wstunnel import dial, limits
from wstunnel.dial import (
    Begun,
    SocketAddress,
    begin_dial,
    connect_socket,
    dial_server,
    dial_target,
    is_local_address,
    source_addresses,
)
from wstunnel.errors import LocalError, NetworkError, StreamError, UsageError
from wstunnel.policy import Policy, parse_rule
from wstunnel.targets import Target, join_host_port, parse_target

OPEN = Policy([], own_sockets=[], is_local=lambda ip: False)


def rules(*texts: str) -> Policy:
    return Policy([parse_rule(text) for text in texts], own_sockets=[], is_local=lambda ip: False)


def answer(*ips: str, port: int = 80) -> list[tuple[object, object, object, object, object]]:
    """What getaddrinfo would return."""
    return [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (ip, port, 0, 0))
        if ":" in ip
        else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
        for ip in ips
    ]


class Resolver:
    """Answers each question with the next of `answers`, the last one again and again; counts the questions."""

    def __init__(self, *answers: Sequence[str] | BaseException) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int, **options: object) -> list[tuple[object, object, object, object, object]]:
        assert options == {"type": socket.SOCK_STREAM, "proto": socket.IPPROTO_TCP}
        self.asked.append((host, port))
        now = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(now, BaseException):
            raise now
        return answer(*now, port=port)


def unresolved(*_: object, **__: object) -> list[tuple[object, object, object, object, object]]:
    raise AssertionError("nothing is to be resolved here")


class Network:
    """A fake `connect`. `plan` has for each address the seconds it takes and the errno it ends with (0: connected)."""

    def __init__(self, clock: MockClock, plan: dict[str, tuple[float, int]]) -> None:
        self.clock = clock
        self.plan = plan
        self.begun: list[tuple[float, str]] = []
        self.cancelled: list[str] = []
        self.made: list[socket.socket] = []
        self.others: list[socket.socket] = []

    async def __call__(self, family: socket.AddressFamily, sockaddr: SocketAddress) -> socket.socket:
        assert trio.lowlevel.current_clock() is self.clock, "the test itself has to take mock_clock"
        # Only now may the clock jump: while the resolver's thread works, Trio sees nothing but waiting tasks.
        self.clock.autojump_threshold = 0
        ip = sockaddr[0]
        assert family == (socket.AF_INET6 if ":" in ip else socket.AF_INET)
        self.begun.append((round(trio.current_time(), 3), ip))
        seconds, error = self.plan[ip]
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.cancelled.append(ip)
            raise
        if error:
            raise OSError(error, os.strerror(error))
        ours, other = socket.socketpair()
        self.made.append(ours)
        self.others.append(other)
        return ours

    @property
    def open(self) -> int:
        return sum(sock.fileno() >= 0 for sock in self.made)

    def close(self) -> None:
        for sock in self.made + self.others:
            sock.close()


MakeNetwork = Callable[..., Network]


@pytest.fixture
def network(mock_clock: MockClock) -> Iterator[MakeNetwork]:
    made: list[Network] = []

    def make(**plan: tuple[float, int]) -> Network:
        made.append(Network(mock_clock, {ADDRESSES[name]: step for name, step in plan.items()}))
        return made[-1]

    yield make
    for each in made:
        each.close()


ADDRESSES = {"a4": "10.0.0.1", "b4": "10.0.0.2", "c4": "10.0.0.3", "a6": "fd00::1", "b6": "fd00::2"}
FOREVER = (1e6, 0)


def of(*names: str) -> list[str]:
    return [ADDRESSES[name] for name in names]


async def dial_name(
    net: Network, *names: str, policy: Policy = OPEN, resolve: Resolver | None = None
) -> tuple[socket.socket, str]:
    return await dial_target(
        parse_target("db:80"), policy, limiter=None, resolve=resolve or Resolver(of(*names)), connect=net
    )


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.fixture
def full_listener() -> Iterator[tuple[str, int]]:
    """A port on which connections hang: the accept queue is full, so Linux drops each SYN."""
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        address = ("127.0.0.1", sock.getsockname()[1])
        sock.listen(0)
        fillers = []
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(address)
            fillers.append(filler)
        yield address
        for filler in fillers:
            filler.close()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class Slow(socket.socket):
    """Connects on loopback, but says that it is under way; SO_ERROR is `late_error`."""

    late_error = 0

    def connect_ex(self, address: object, /) -> int:
        super().connect_ex(address)  # type: ignore[arg-type]
        return errno.EINPROGRESS

    def getsockopt(self, level: int, name: int, *rest: object) -> object:  # type: ignore[override]
        return self.late_error if name == socket.SO_ERROR else super().getsockopt(level, name, *rest)


class Selfish(socket.socket):
    """Is given the very port that it connects to as its own."""

    def connect_ex(self, address: object, /) -> int:
        if not self.getsockname()[1]:
            self.bind(address)  # type: ignore[arg-type]
        return super().connect_ex(address)  # type: ignore[arg-type]


def none_left(*_: object) -> socket.socket:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class TestRealSockets:
    async def test_a_literal(self, listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
        def too_dear(*_: object, **__: object) -> None:
            raise AssertionError("neither threads nor nurseries for one literal address")

        monkeypatch.setattr(trio, "open_nursery", too_dear)
        monkeypatch.setattr(trio.to_thread, "run_sync", too_dear)
        port = listener.getsockname()[1]
        sock, dialled = await dial_target(
            parse_target(f"127.0.0.1:{port}"), OPEN, limiter=trio.CapacityLimiter(1), resolve=unresolved
        )
        with sock:
            assert dialled == f"127.0.0.1:{port}"
            assert isinstance(sock, socket.socket)
            assert not sock.getblocking()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            accepted, peer = listener.accept()
            with accepted:
                assert peer == sock.getsockname()
                accepted.send(b"hello")
                await trio.lowlevel.wait_readable(sock)
                assert sock.recv(9) == b"hello"

    @pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
    async def test_an_ipv6_literal(self) -> None:
        try:
            listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        except OSError:
            pytest.skip("no IPv6 loopback here")
        with listener:
            port = listener.getsockname()[1]
            sock, dialled = await dial_target(parse_target(f"[0::1]:{port}"), OPEN, limiter=None, resolve=unresolved)
            sock.close()
            assert dialled == f"[::1]:{port}"

    async def test_a_name_by_the_system_resolver(self, listener: socket.socket) -> None:
        port = listener.getsockname()[1]
        sock, dialled = await dial_target(parse_target(f"localhost:{port}"), OPEN, limiter=trio.CapacityLimiter(1))
        sock.close()
        assert dialled == f"127.0.0.1:{port}"

    @pytest.mark.parametrize("host", ["127.1", "0x7f.1", "2130706433", "0177.0.0.1"])
    async def test_numeric_oddities_are_judged_by_the_address_they_mean(
        self, listener: socket.socket, host: str
    ) -> None:
        port = listener.getsockname()[1]
        target = parse_target(f"{host}:{port}")
        own = Policy([], own_sockets=[("0.0.0.0", port)], is_local=lambda ip: False)
        for policy in (own, rules("10.0.0.0/8:*")):
            with pytest.raises(StreamError) as caught:
                await dial_target(target, policy, limiter=None)
            assert caught.value.code == "forbidden"
        sock, dialled = await dial_target(target, OPEN, limiter=None)
        sock.close()
        assert dialled == f"127.0.0.1:{port}"

    async def test_refused(self) -> None:
        port = unused_port()
        before = descriptors()
        with pytest.raises(StreamError) as caught:
            await dial_target(parse_target(f"127.0.0.1:{port}"), OPEN, limiter=None)
        assert caught.value.code == "refused"
        assert str(caught.value) == f"cannot connect to tcp:127.0.0.1:{port}: connection refused"
        assert descriptors() == before

    async def test_an_answer_that_takes_its_time(self, full_listener: tuple[str, int]) -> None:
        target = parse_target(join_host_port(*full_listener))
        with trio.move_on_after(0.05) as scope:
            await dial_target(target, OPEN, limiter=None)
        assert scope.cancelled_caught, "a connection that is under way is not taken for one that was made"

    @pytest.mark.parametrize(("late_error", "code"), [(0, None), (errno.EHOSTUNREACH, "unreachable")])
    async def test_the_answer_comes_by_the_selector(
        self, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, late_error: int, code: str | None
    ) -> None:
        monkeypatch.setattr(Slow, "late_error", late_error)
        monkeypatch.setattr(socket, "socket", Slow)
        before = descriptors()
        target = parse_target(join_host_port(*listener.getsockname()))
        if code is None:
            sock, _ = await dial_target(target, OPEN, limiter=None)
            sock.close()
        else:
            with pytest.raises(StreamError) as caught:
                await dial_target(target, OPEN, limiter=None)
            assert caught.value.code == code
        assert descriptors() == before

    async def test_a_name_whose_first_address_refuses(self, listener: socket.socket) -> None:
        port = listener.getsockname()[1]
        before = descriptors()
        sock, dialled = await dial_target(
            parse_target(f"db:{port}"), OPEN, limiter=None, resolve=Resolver(["127.0.0.9", "127.0.0.1"])
        )
        sock.close()
        assert dialled == f"127.0.0.1:{port}"
        assert descriptors() == before

    @pytest.mark.parametrize("ips", [None, ["127.0.0.1"], ["127.0.0.1", "127.0.0.2", "127.0.0.1"]])
    async def test_cancelled_half_way_leaks_nothing(
        self, full_listener: tuple[str, int], ips: list[str] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        host, port = full_listener
        waiting = 0
        wait_writable = trio.lowlevel.wait_writable

        async def counted(sock: socket.socket) -> None:
            nonlocal waiting
            waiting += 1
            await wait_writable(sock)

        monkeypatch.setattr(trio.lowlevel, "wait_writable", counted)
        monkeypatch.setattr(dial, "STAGGER_SECONDS", 0)
        resolve = Resolver(ips) if ips else unresolved
        # The thread of the resolver and Trio's own descriptors are there before we count.
        await trio.to_thread.run_sync(int)
        before = descriptors()
        async with trio.open_nursery() as nursery:
            target = parse_target(f"{'db' if ips else host}:{port}")

            async def dialling() -> None:
                await dial_target(target, OPEN, limiter=None, resolve=resolve)

            nursery.start_soon(dialling)
            while waiting < len(set(ips or [host])):
                await trio.sleep(0.001)
            assert descriptors() == before + waiting
            nursery.cancel_scope.cancel()
        assert descriptors() == before

    async def test_cancelled_when_connected_is_a_reset_for_the_target(self, listener: socket.socket) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await connect_socket(socket.AF_INET, listener.getsockname())
        assert scope.cancelled_caught
        accepted, _ = listener.accept()
        with accepted, pytest.raises(ConnectionResetError):
            accepted.recv(1)

    async def test_out_of_descriptors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "socket", none_left)
        with pytest.raises(StreamError, match="too many open files") as caught:
            await dial_target(parse_target("127.0.0.1:80"), OPEN, limiter=None)
        assert caught.value.code == "limit"

    async def test_a_socket_that_connected_to_itself_is_a_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        port = unused_port()
        monkeypatch.setattr(socket, "socket", Selfish)
        before = descriptors()
        with pytest.raises(ConnectionRefusedError):
            await connect_socket(socket.AF_INET, ("127.0.0.1", port))
        assert descriptors() == before

    async def test_an_error_of_connect_itself(self) -> None:
        before = descriptors()
        with pytest.raises(OSError) as caught:
            await connect_socket(socket.AF_INET, ("255.255.255.255", 80))
        assert caught.value.errno in (errno.EACCES, errno.ENETUNREACH)
        assert descriptors() == before


async def not_again(*_: object) -> socket.socket:
    raise AssertionError("it was begun already")


class TestBeginDial:
    """The first system calls at once, and what takes time handed on to `dial_target`."""

    @staticmethod
    async def go_on(begun: Begun, target: str) -> tuple[socket.socket, str]:
        return await dial_target(
            parse_target(target), OPEN, limiter=None, resolve=unresolved, connect=not_again, begun=begun
        )

    @pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
    async def test_connected_at_once(self, ip: str) -> None:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        try:
            listener = socket.create_server((ip, 0), family=family)
        except OSError:
            pytest.skip(f"this machine has no {ip}")
        with listener:
            port = listener.getsockname()[1]
            target = join_host_port(ip, port)
            begun = begin_dial(parse_target(target), OPEN)
            assert begun is not None
            with begun.sock:
                assert begun.done
                assert begun.address == target
                assert begun.sock.family == family
                assert not begun.sock.getblocking()
                assert begun.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                accepted, peer = listener.accept()
                with accepted:
                    assert peer == begun.sock.getsockname()
                assert await self.go_on(begun, target) == (begun.sock, target)

    def test_refused(self) -> None:
        port = unused_port()
        before = descriptors()
        with pytest.raises(StreamError) as caught:
            begin_dial(parse_target(f"127.0.0.1:{port}"), OPEN)
        assert caught.value.code == "refused"
        assert str(caught.value) == f"cannot connect to tcp:127.0.0.1:{port}: connection refused"
        assert descriptors() == before

    @pytest.mark.parametrize(
        ("target", "policy"),
        [
            ("udp:127.0.0.1:53", rules("tcp:*:*")),
            ("udp:169.254.169.254:53", OPEN),
            ("unix:/run/x", OPEN),
            ("unix:/run/x", rules("unix:/run/y", "*:*")),
            ("169.254.169.254:80", OPEN),
            ("[::ffff:169.254.169.254]:80", OPEN),
            ("127.0.0.1:80", rules("10.0.0.0/8:*")),
            ("127.0.0.1:80", Policy([], own_sockets=[("0.0.0.0", 80)], is_local=lambda ip: False)),
            ("db:80", rules("a:80")),
        ],
    )
    async def test_the_policy_is_asked_first_and_says_what_dial_target_says(
        self, target: str, policy: Policy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_sockets(*_: object) -> None:
            raise AssertionError("no socket for what is forbidden")

        monkeypatch.setattr(socket, "socket", no_sockets)
        with pytest.raises(StreamError) as caught:
            begin_dial(parse_target(target), policy)
        with pytest.raises(StreamError) as other:
            await dial_target(parse_target(target), policy, limiter=None, resolve=unresolved)
        assert caught.value.code == other.value.code == "forbidden"
        assert str(caught.value) == str(other.value)
        assert getattr(caught.value, "__notes__", []) == getattr(other.value, "__notes__", [])

    @pytest.mark.parametrize("host", ["db", "localhost", "127.1", "2130706433"])
    def test_a_name_has_to_be_resolved(self, host: str) -> None:
        before = descriptors()
        assert begin_dial(parse_target(f"{host}:80"), OPEN) is None
        assert descriptors() == before

    @pytest.mark.parametrize(("late_error", "code"), [(0, None), (errno.EHOSTUNREACH, "unreachable")])
    async def test_the_answer_comes_by_the_selector(
        self, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, late_error: int, code: str | None
    ) -> None:
        monkeypatch.setattr(Slow, "late_error", late_error)
        monkeypatch.setattr(socket, "socket", Slow)
        target = join_host_port(*listener.getsockname())
        begun = begin_dial(parse_target(target), OPEN)
        assert begun is not None
        assert not begun.done
        if code is None:
            assert await self.go_on(begun, target) == (begun.sock, target)
            begun.sock.close()
        else:
            with pytest.raises(StreamError, match=f"cannot connect to tcp:{target}: ") as caught:
                await self.go_on(begun, target)
            assert caught.value.code == code
            assert begun.sock.fileno() == -1

    async def test_no_answer(self, full_listener: tuple[str, int], autojump_clock: MockClock) -> None:
        target = join_host_port(*full_listener)
        begun = begin_dial(parse_target(target), OPEN)
        assert begun is not None
        assert not begun.done
        began = trio.current_time()
        with pytest.raises(StreamError, match=rf"no answer within {limits.DIAL_SECONDS:g} seconds") as caught:
            await self.go_on(begun, target)
        assert caught.value.code == "timeout"
        assert trio.current_time() - began == pytest.approx(limits.DIAL_SECONDS)
        assert begun.sock.fileno() == -1

    async def test_cancelled_while_it_is_under_way(self, full_listener: tuple[str, int]) -> None:
        target = join_host_port(*full_listener)
        begun = begin_dial(parse_target(target), OPEN)
        assert begun is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.go_on, begun, target)
            await wait_all_tasks_blocked()
            assert begun.sock.fileno() >= 0
            nursery.cancel_scope.cancel()
        assert begun.sock.fileno() == -1

    async def test_cancelled_before_the_task_ran(self, full_listener: tuple[str, int]) -> None:
        target = join_host_port(*full_listener)
        begun = begin_dial(parse_target(target), OPEN)
        assert begun is not None
        with trio.CancelScope() as scope:
            scope.cancel()
            await self.go_on(begun, target)
        assert scope.cancelled_caught
        assert begun.sock.fileno() == -1

    async def test_cancelled_when_connected_is_a_reset_for_the_target(self, listener: socket.socket) -> None:
        target = join_host_port(*listener.getsockname())
        begun = begin_dial(parse_target(target), OPEN)
        assert begun is not None
        with trio.CancelScope() as scope:
            scope.cancel()
            await self.go_on(begun, target)
        assert scope.cancelled_caught
        accepted, _ = listener.accept()
        with accepted, pytest.raises(ConnectionResetError):
            accepted.recv(1)

    def test_a_socket_that_connected_to_itself_is_a_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        port = unused_port()
        monkeypatch.setattr(socket, "socket", Selfish)
        before = descriptors()
        with pytest.raises(StreamError) as caught:
            begin_dial(parse_target(f"127.0.0.1:{port}"), OPEN)
        assert caught.value.code == "refused"
        assert descriptors() == before

    async def test_nor_later(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Simultaneous open may end while it is waited for, too."""

        class Both(Selfish, Slow):
            pass

        port = unused_port()
        monkeypatch.setattr(socket, "socket", Both)
        begun = begin_dial(parse_target(f"127.0.0.1:{port}"), OPEN)
        assert begun is not None
        with pytest.raises(StreamError) as caught:
            await self.go_on(begun, f"127.0.0.1:{port}")
        assert caught.value.code == "refused"
        assert begun.sock.fileno() == -1

    def test_out_of_descriptors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "socket", none_left)
        with pytest.raises(StreamError, match="too many open files") as caught:
            begin_dial(parse_target("127.0.0.1:80"), OPEN)
        assert caught.value.code == "limit"

    def test_an_error_of_connect_itself(self) -> None:
        before = descriptors()
        with pytest.raises(StreamError) as caught:
            begin_dial(parse_target("255.255.255.255:80"), rules("255.255.255.255:80"))
        assert caught.value.code in ("unreachable", "forbidden")
        assert descriptors() == before


class TestPolicy:
    @pytest.mark.parametrize("target", ["udp:db:53", "udp:127.0.0.1:53"])
    async def test_rules_for_tcp_are_not_for_udp(self, target: str) -> None:
        with pytest.raises(StreamError, match="the server's policy does not allow udp:") as caught:
            await dial_target(parse_target(target), rules("tcp:*:*", "unix:/run/x"), limiter=None, resolve=unresolved)
        assert caught.value.code == "forbidden"

    @pytest.mark.parametrize(
        "target",
        [
            "169.254.169.254:80",
            "[::ffff:169.254.169.254]:80",
            "[64:ff9b::169.254.169.254]:80",
            "[2002:a9fe:a9fe::]:80",
            "[fd00:ec2::254]:80",
        ],
    )
    async def test_forbidden_literals_are_not_dialled(
        self, mock_clock: MockClock, network: MakeNetwork, target: str
    ) -> None:
        net = network()
        with pytest.raises(StreamError) as caught:
            await dial_target(parse_target(target), OPEN, limiter=None, resolve=unresolved, connect=net)
        assert caught.value.code == "forbidden"
        assert str(caught.value) == f"the server's policy does not allow {parse_target(target)}"
        assert "metadata" in caught.value.__notes__[0]
        assert net.begun == []

    async def test_a_hopeless_name_is_not_even_resolved(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network()
        with pytest.raises(StreamError) as caught:
            await dial_target(parse_target("db:80"), rules("a:80"), limiter=None, resolve=unresolved, connect=net)
        assert caught.value.code == "forbidden"
        assert caught.value.__notes__ == ["no --allow rule matches tcp:db:80, whatever it resolves to"]

    @pytest.mark.parametrize(
        "ip", ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fe80::1", "224.0.0.1"]
    )
    @pytest.mark.parametrize("policy", [OPEN, rules("db:80")], ids=["default", "named"])
    async def test_a_name_that_resolves_to_a_forbidden_address(
        self, mock_clock: MockClock, network: MakeNetwork, ip: str, policy: Policy
    ) -> None:
        net = network()
        with pytest.raises(StreamError) as caught:
            await dial_name(net, policy=policy, resolve=Resolver([ip]))
        assert caught.value.code == "forbidden"
        assert str(caught.value) == "the server's policy does not allow tcp:db:80"
        assert ip in caught.value.__notes__[0]
        assert ip not in str(caught.value)
        assert net.begun == []

    async def test_only_the_permitted_addresses_are_dialled(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a4=(0, 0))
        resolve = Resolver(["169.254.169.254", "::ffff:169.254.169.254", "10.0.0.1", "fe80::1"])
        _, dialled = await dial_name(net, resolve=resolve)
        assert dialled == "10.0.0.1:80"
        assert net.begun == [(0, "10.0.0.1")]

    async def test_addresses_decide_where_names_do_not(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(b4=(0, 0))
        _, dialled = await dial_name(net, "a4", "b4", "a6", policy=rules("10.0.0.2/31:80"))
        assert dialled == "10.0.0.2:80"

    async def test_rebinding_a_name_changes_nothing(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a4=(0, errno.ECONNREFUSED), b4=(0, 0))
        resolve = Resolver(of("a4", "b4"), ["169.254.169.254"])
        _, dialled = await dial_name(net, resolve=resolve)
        assert resolve.asked == [("db", 80)], "asked once: what was checked is what is dialled"
        assert dialled == "10.0.0.2:80"
        assert [ip for _, ip in net.begun] == of("a4", "b4")


class TestHappyEyeballs:
    """RFC 8305 §4 and §5."""

    async def test_families_take_turns_and_attempts_begin_250_ms_apart(
        self, mock_clock: MockClock, network: MakeNetwork
    ) -> None:
        net = network(a6=FOREVER, b6=FOREVER, a4=FOREVER, b4=FOREVER, c4=(0.1, 0))
        _, dialled = await dial_name(net, "a6", "b6", "a4", "b4", "c4")
        assert net.begun == [
            (0.0, "fd00::1"),
            (0.25, "10.0.0.1"),
            (0.5, "fd00::2"),
            (0.75, "10.0.0.2"),
            (1.0, "10.0.0.3"),
        ]
        assert dialled == "10.0.0.3:80"
        assert sorted(net.cancelled) == sorted(of("a6", "b6", "a4", "b4"))
        assert trio.current_time() == pytest.approx(1.1)

    async def test_the_resolvers_first_choice_is_first(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a4=FOREVER, b4=FOREVER, a6=(0, 0))
        assert (await dial_name(net, "a4", "b4", "a6"))[1] == "[fd00::1]:80"
        assert [ip for _, ip in net.begun] == of("a4", "a6")

    async def test_a_slow_first_choice_may_still_win(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a6=(0.3, 0), a4=(0.2, 0))
        assert (await dial_name(net, "a6", "a4"))[1] == "[fd00::1]:80"
        assert net.cancelled == of("a4")

    async def test_a_failure_begins_the_next_attempt_at_once(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a6=(0.1, errno.ENETUNREACH), a4=(0.05, errno.ECONNREFUSED), b4=(0, 0))
        assert (await dial_name(net, "a6", "a4", "b4"))[1] == "10.0.0.2:80"
        assert [begun for begun, _ in net.begun] == [0, 0.1, 0.15]

    async def test_the_failure_of_an_older_attempt_counts_too(
        self, mock_clock: MockClock, network: MakeNetwork
    ) -> None:
        net = network(a6=(0.3, errno.ENETUNREACH), a4=FOREVER, b4=(0, 0))
        await dial_name(net, "a6", "a4", "b4")
        assert [begun for begun, _ in net.begun] == [0, 0.25, 0.3]

    async def test_two_at_once_leave_one_open(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a6=(0.5, 0), a4=(0.25, 0))
        sock, _ = await dial_name(net, "a6", "a4")
        assert net.open == 1
        assert sock.fileno() >= 0

    async def test_a_loser_that_connects_all_the_same_is_closed(
        self, mock_clock: MockClock, network: MakeNetwork
    ) -> None:
        net = network(a6=(0.3, 0), a4=(0.05, 0))

        async def deaf(family: socket.AddressFamily, sockaddr: SocketAddress) -> socket.socket:
            with trio.CancelScope(shield=True):
                sock = await net(family, sockaddr)
            return sock  # noqa: RET504  # mypy takes a return inside the scope for one that may not happen

        await dial_target(parse_target("db:80"), OPEN, limiter=None, resolve=Resolver(of("a6", "a4")), connect=deaf)
        assert len(net.made) == 2
        assert net.open == 1

    async def test_cancelled_between_victory_and_the_end_of_the_losers(
        self, mock_clock: MockClock, network: MakeNetwork
    ) -> None:
        net = network(a6=(5, 0), a4=(0.05, 0))

        async def stubborn_loser(family: socket.AddressFamily, sockaddr: SocketAddress) -> socket.socket:
            with trio.CancelScope(shield=sockaddr[0] == ADDRESSES["a6"]):
                sock = await net(family, sockaddr)
            return sock  # noqa: RET504  # mypy takes a return inside the scope for one that may not happen

        with trio.move_on_after(1) as scope:
            await dial_target(
                parse_target("db:80"), OPEN, limiter=None, resolve=Resolver(of("a6", "a4")), connect=stubborn_loser
            )
        assert scope.cancelled_caught
        assert len(net.made) == 2
        assert net.open == 0

    async def test_each_address_once_and_not_too_many(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        many = [f"10.1.0.{number}" for number in range(100)]
        net = network()
        net.plan = dict.fromkeys(many, (0.0, errno.ECONNREFUSED))
        with pytest.raises(StreamError):
            await dial_name(net, resolve=Resolver([*many[:3], *many]))
        assert [ip for _, ip in net.begun] == many[: dial.ADDRESSES]


class TestFailures:
    @pytest.mark.parametrize(
        ("number", "code"),
        [
            (errno.ECONNREFUSED, "refused"),
            (errno.ECONNRESET, "refused"),
            (errno.ETIMEDOUT, "timeout"),
            (errno.EHOSTUNREACH, "unreachable"),
            (errno.ENETUNREACH, "unreachable"),
            (errno.ENETDOWN, "unreachable"),
            (errno.EADDRNOTAVAIL, "unreachable"),
            (errno.EAFNOSUPPORT, "unreachable"),
            (errno.EACCES, "unreachable"),
            (errno.EMFILE, "limit"),
            (errno.ENFILE, "limit"),
            (errno.EIO, "internal"),
        ],
    )
    async def test_errno_to_code(self, mock_clock: MockClock, network: MakeNetwork, number: int, code: str) -> None:
        net = network(a4=(0, number))
        with pytest.raises(StreamError) as caught:
            await dial_target(parse_target("10.0.0.1:80"), OPEN, limiter=None, connect=net)
        assert caught.value.code == code
        reason = os.strerror(number)
        assert str(caught.value) == f"cannot connect to tcp:10.0.0.1:80: {reason[0].lower()}{reason[1:]}"

    async def test_an_error_without_a_number(self) -> None:
        async def odd(family: socket.AddressFamily, sockaddr: SocketAddress) -> socket.socket:
            raise OSError

        with pytest.raises(StreamError, match="unknown error") as caught:
            await dial_target(parse_target("10.0.0.1:80"), OPEN, limiter=None, connect=odd)
        assert caught.value.code == "internal"

    @pytest.mark.parametrize(
        ("numbers", "code"),
        [
            ((errno.EHOSTUNREACH, errno.ECONNREFUSED, errno.ETIMEDOUT), "refused"),
            ((errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.EIO), "timeout"),
            ((errno.EIO, errno.EHOSTUNREACH, errno.EHOSTUNREACH), "unreachable"),
            ((errno.EHOSTUNREACH, errno.EMFILE, errno.EMFILE), "limit"),
        ],
    )
    async def test_the_most_telling_of_several_wins(
        self, mock_clock: MockClock, network: MakeNetwork, numbers: tuple[int, int, int], code: str
    ) -> None:
        net = network(a4=(0, numbers[0]), b4=(0, numbers[1]), c4=(0, numbers[2]))
        with pytest.raises(StreamError) as caught:
            await dial_name(net, "a4", "b4", "c4")
        assert caught.value.code == code
        reasons = str(caught.value).removeprefix("cannot connect to tcp:db:80: ").split("; ")
        assert len(reasons) == len(set(numbers))

    async def test_reasons_are_listed_once_the_telling_one_first(
        self, mock_clock: MockClock, network: MakeNetwork
    ) -> None:
        net = network(a6=(0, errno.ENETUNREACH), b6=(0, errno.ENETUNREACH), a4=(0, errno.ECONNREFUSED))
        with pytest.raises(StreamError) as caught:
            await dial_name(net, "a6", "b6", "a4")
        assert str(caught.value) == "cannot connect to tcp:db:80: connection refused; network is unreachable"

    async def test_the_deadline(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a4=FOREVER)
        with pytest.raises(StreamError, match=r"10\.0\.0\.1:80: no answer within 10 seconds") as caught:
            await dial_target(parse_target("10.0.0.1:80"), OPEN, limiter=None, connect=net)
        assert caught.value.code == "timeout"
        assert trio.current_time() == pytest.approx(limits.DIAL_SECONDS)

    async def test_the_deadline_while_some_have_failed(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a4=FOREVER, a6=(0, errno.ENETUNREACH), b4=FOREVER)
        with pytest.raises(StreamError, match="80: no answer within 10 seconds; network is unreachable") as caught:
            await dial_name(net, "a6", "a4", "b4")
        assert caught.value.code == "timeout"
        assert trio.current_time() == pytest.approx(limits.DIAL_SECONDS)

    async def test_callers_cancellation_is_not_a_timeout(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a4=FOREVER)
        with trio.move_on_after(1) as scope:
            await dial_target(parse_target("10.0.0.1:80"), OPEN, limiter=None, connect=net)
        assert scope.cancelled_caught


class TestNames:
    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (socket.gaierror(socket.EAI_NONAME, "x"), "name-not-found", "db: no such name, or it has no address"),
            (socket.gaierror(socket.EAI_NODATA, "x"), "name-not-found", "db: no such name, or it has no address"),
            (socket.gaierror(socket.EAI_FAIL, "x"), "name-not-found", "db: no such name, or it has no address"),
            (socket.gaierror(socket.EAI_AGAIN, "x"), "name-not-found", "db: temporary failure in name resolution"),
            (UnicodeError("label too long"), "name-not-found", "db: no such name, or it has no address"),
            (socket.gaierror(socket.EAI_MEMORY, "Memory"), "internal", "db: name resolution failed (memory)"),
            (OSError(errno.EMFILE, "Too many"), "limit", "db: name resolution failed (too many)"),
            (RuntimeError("can't start new thread"), "limit", "db: name resolution failed (can't start new thread)"),
        ],
    )
    async def test_failures(self, error: BaseException, code: str, message: str) -> None:
        with pytest.raises(StreamError) as caught:
            await dial_target(parse_target("db:80"), OPEN, limiter=None, resolve=Resolver(error))
        assert (caught.value.code, str(caught.value)) == (code, message)

    async def test_a_name_without_usable_addresses(self) -> None:
        def other_family(*_: object, **__: object) -> list[tuple[object, object, object, object, object]]:
            return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", "/x")]

        with pytest.raises(StreamError) as caught:
            await dial_target(parse_target("db:80"), OPEN, limiter=None, resolve=other_family)
        assert caught.value.code == "name-not-found"

    async def test_a_slow_resolver_ends_at_the_deadline_and_keeps_its_place(self, autojump_clock: MockClock) -> None:
        limiter = trio.CapacityLimiter(1)
        go_on = threading.Event()
        ended = threading.Event()

        def slow(*_: object, **__: object) -> list[tuple[object, object, object, object, object]]:
            go_on.wait(30)
            ended.set()
            return answer("10.0.0.1")

        try:
            with pytest.raises(StreamError, match="no answer within 10 seconds") as caught:
                await dial_target(parse_target("db:80"), OPEN, limiter=limiter, resolve=slow)
            assert caught.value.code == "timeout"
            assert trio.current_time() == pytest.approx(limits.DIAL_SECONDS)
            assert limiter.borrowed_tokens == 1
            # The next one of this principal waits for that place, within its own deadline.
            with pytest.raises(StreamError) as caught:
                await dial_target(parse_target("db2:80"), OPEN, limiter=limiter, resolve=unresolved)
            assert caught.value.code == "timeout"
        finally:
            go_on.set()
            assert ended.wait(30)


class TestServer:
    async def test_by_name_past_a_dead_address(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a6=FOREVER, a4=(0, 0))
        resolve = Resolver(of("a6", "a4"))
        sock = await dial_server("tunnel.example", 443, resolve=resolve, connect=net)
        assert sock is net.made[0]
        assert net.begun == [(0.0, "fd00::1"), (0.25, "10.0.0.1")]
        assert resolve.asked == [("tunnel.example", 443)]

    async def test_by_literal(self, listener: socket.socket) -> None:
        with await dial_server(*listener.getsockname(), resolve=unresolved) as sock:
            assert sock.getpeername() == listener.getsockname()
            assert not sock.getblocking()

    async def test_no_policy(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network()
        net.plan["169.254.0.1"] = (0, 0)
        await dial_server("169.254.0.1", 443, connect=net)

    async def test_name_failure(self) -> None:
        with pytest.raises(NetworkError) as caught:
            await dial_server("nowhere", 443, resolve=Resolver(socket.gaierror(socket.EAI_NONAME, "x")))
        assert caught.value.layer == "name"
        assert str(caught.value) == "cannot connect to nowhere:443: no such name, or it has no address"

    async def test_tcp_failure(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a6=(0, errno.ECONNREFUSED))
        with pytest.raises(NetworkError) as caught:
            await dial_server("fd00::1", 443, connect=net)
        assert caught.value.layer == "tcp"
        assert str(caught.value) == "cannot connect to [fd00::1]:443: connection refused"

    async def test_deadline(self, mock_clock: MockClock, network: MakeNetwork) -> None:
        net = network(a4=FOREVER)
        with pytest.raises(NetworkError, match="no answer within 10 seconds"):
            await dial_server("10.0.0.1", 443, connect=net)


class TestLocalAddresses:
    @pytest.mark.parametrize(
        ("ip", "expected"),
        [("127.0.0.1", True), ("127.1.2.3", True), ("192.0.2.1", False), ("2001:db8::1", False), ("8.8.8.8", False)],
    )
    @pytest.mark.parametrize("netlink", [True, False])
    def test_known_ones(self, ip: str, expected: bool, netlink: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not netlink:
            monkeypatch.delattr(socket, "AF_NETLINK")
        assert is_local_address(ip) is expected

    def test_when_in_doubt_yes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "socket", none_left)
        assert is_local_address("192.0.2.1")


class TestSources:
    """Where connections to targets come from."""

    @pytest.fixture
    def listener(self) -> Iterator[socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield listener

    def test_one_of_a_family(self) -> None:
        assert source_addresses(()) == {}
        assert source_addresses(("127.0.0.2",)) == {socket.AF_INET: "127.0.0.2"}
        with pytest.raises(UsageError, match="of one family"):
            source_addresses(("127.0.0.2", "127.0.0.3"))

    def test_it_must_be_this_machines(self) -> None:
        with pytest.raises(LocalError, match=r"cannot come from 192\.0\.2\.77: "):
            source_addresses(("192.0.2.77",))

    @pytest.mark.parametrize("named", [True, False])
    async def test_tcp(self, listener: socket.socket, named: bool) -> None:
        sources = source_addresses(("127.0.0.2",))
        target = Target("tcp", "name" if named else "127.0.0.1", listener.getsockname()[1], "")
        if named:
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", listener.getsockname())]
            sock, _ = await dial_target(target, OPEN, limiter=None, resolve=lambda *_, **__: found, sources=sources)
        else:
            begun = begin_dial(target, OPEN, sources)
            assert begun is not None
            sock = await begun.finish()
        with sock, listener.accept()[0] as accepted:
            assert accepted.getpeername()[0] == "127.0.0.2"

    async def test_udp(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            target.bind(("127.0.0.1", 0))
            begun = begin_dial(
                Target("udp", "127.0.0.1", target.getsockname()[1], ""), OPEN, source_addresses(("127.0.0.2",))
            )
            assert begun is not None
            with begun.sock as sock:
                sock.send(b"x")
                assert target.recvfrom(10)[1][0] == "127.0.0.2"

    async def test_the_other_family_is_left_to_the_kernel(self, listener: socket.socket) -> None:
        begun = begin_dial(
            Target("tcp", "127.0.0.1", listener.getsockname()[1], ""), OPEN, {socket.AF_INET6: "2001:db8::1"}
        )
        assert begun is not None
        with await begun.finish(), listener.accept()[0] as accepted:
            assert accepted.getpeername()[0] == "127.0.0.1"

    async def test_what_cannot_be_bound_any_more_is_unreachable(self, listener: socket.socket) -> None:
        target = Target("tcp", "127.0.0.1", listener.getsockname()[1], "")
        with pytest.raises(StreamError) as caught:
            begin_dial(target, OPEN, {socket.AF_INET: "192.0.2.77"})
        assert caught.value.code == "unreachable"
