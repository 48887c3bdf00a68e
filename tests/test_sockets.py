"""Options of connected sockets."""

from __future__ import annotations

import errno
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import trustme

from tests.roles import tcp_pair
from wstunnel import sockets

linux = pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux")


class TestReset:
    def test_reset_is_no_orderly_end(self) -> None:
        one, two = tcp_pair()
        sockets.reset(one)
        assert one.fileno() == -1
        two.setblocking(True)
        with pytest.raises(ConnectionResetError):
            two.recv(1)
        two.close()

    def test_a_dead_socket_is_closed_all_the_same(self) -> None:
        class Dead:
            closed = False

            def setsockopt(self, *_: object) -> None:
                raise OSError(errno.EINVAL, "Invalid argument")

            def close(self) -> None:
                self.closed = True

        dead: Any = Dead()
        sockets.reset(dead)
        assert dead.closed


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, two = tcp_pair()
    with one, two:
        yield one, two


@pytest.fixture
def others() -> Iterator[dict[str, socket.socket]]:
    """Sockets that know nothing of TCP."""
    one, two = socket.socketpair()
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    closed = socket.socket()
    closed.close()
    with one, two, datagrams:
        yield {"unix": one, "udp": datagrams, "closed": closed}


def fill(sock: socket.socket) -> int:
    """Write until there is no more room. Returns how much it was."""
    size = 0
    try:
        while True:
            size += sock.send(bytes(65536))
    except (BlockingIOError, ssl.SSLWantWriteError):
        return size


@linux
class TestUnsent:
    def test_a_full_queue_shrinks_while_the_peer_reads(self, pair: tuple[socket.socket, socket.socket]) -> None:
        one, two = pair
        two.settimeout(10)
        assert sockets.unsent(one) == 0
        written = fill(one)
        full = sockets.unsent(one)
        assert full is not None
        assert 0 < full <= written
        read, seen = 0, [full]
        while read < written:
            read += len(two.recv(256 * 1024))
            left = sockets.unsent(one)
            assert left is not None
            seen.append(left)
        assert seen == sorted(seen, reverse=True)
        assert len(set(seen)) > 2, "it falls step by step"
        assert wait_until_empty(one)

    def test_it_stands_still_while_the_peer_does_not_read(self, pair: tuple[socket.socket, socket.socket]) -> None:
        one, _ = pair
        fill(one)
        wait_until_steady(one)
        assert sockets.unsent(one) == sockets.unsent(one) != 0

    def test_of_a_tls_socket_it_counts_what_is_encrypted(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = secure(*pair)
        with near, far:
            near.setblocking(False)
            # The peer's tickets or ours may still be on their way.
            assert wait_until_empty(near)
            written = fill(near)
            full = sockets.unsent(near)
            assert full is not None
            assert full > 0
            far.settimeout(10)
            read = 0
            while read < written // 2:
                read += len(far.recv(65536))
            half = sockets.unsent(near)
            assert half is not None
            assert half < full

    def test_of_what_is_not_connected(self, others: dict[str, socket.socket]) -> None:
        assert sockets.unsent(others["unix"]) == 0
        assert sockets.unsent(others["closed"]) is None
        with socket.create_server(("127.0.0.1", 0)) as listener:
            assert sockets.unsent(listener) is None


def test_unsent_is_not_known_elsewhere(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert sockets.unsent(pair[0]) is None


def wait_until_empty(sock: socket.socket) -> bool:
    """The last acknowledgement comes when the other kernel sends it: at once on loopback, but not within the call."""
    pause = threading.Event()
    return any(sockets.unsent(sock) == 0 or pause.wait(0.01) for _ in range(1000))


def wait_until_steady(sock: socket.socket) -> None:
    pause, last = threading.Event(), -1
    while (size := sockets.unsent(sock)) != last:
        last = -1 if size is None else size
        pause.wait(0.3)


def secure(near: socket.socket, far: socket.socket) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("test.example").configure_cert(server)
    authority.configure_trust(client)
    for sock in (near, far):
        sock.settimeout(10)
    secure_near = server.wrap_socket(near, server_side=True, do_handshake_on_connect=False)
    secure_far = client.wrap_socket(far, server_hostname="test.example", do_handshake_on_connect=False)
    thread = threading.Thread(target=secure_far.do_handshake)
    thread.start()
    secure_near.do_handshake()
    thread.join()
    return secure_near, secure_far


class TestGiveUpAfter:
    @linux
    @pytest.mark.parametrize(("seconds", "milliseconds"), [(30, 30_000), (1.5, 1500), (0.0001, 1), (0, 1)])
    def test_sets_milliseconds(
        self, pair: tuple[socket.socket, socket.socket], seconds: float, milliseconds: int
    ) -> None:
        sockets.give_up_after(pair[0], seconds)
        assert pair[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == milliseconds

    @linux
    def test_the_connection_breaks(self, pair: tuple[socket.socket, socket.socket]) -> None:
        """Also when the peer's kernel still answers, but has no more room."""
        one, _ = pair
        sockets.give_up_after(one, 0.3)
        fill(one)
        one.settimeout(20)
        with pytest.raises(TimeoutError) as caught:
            one.recv(1)
        assert caught.value.errno == errno.ETIMEDOUT

    def test_nothing_elsewhere(
        self, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
        sockets.give_up_after(pair[0], 30)
        if option is not None:
            assert pair[0].getsockopt(socket.IPPROTO_TCP, option) == 0

    def test_nothing_where_there_is_no_tcp(self, others: dict[str, socket.socket]) -> None:
        for sock in others.values():
            sockets.give_up_after(sock, 30)


class TestLimitUnsent:
    @linux
    @pytest.mark.parametrize("named", [True, False])
    def test_sets_bytes(
        self, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, named: bool
    ) -> None:
        """Also with a Python that has no name for it."""
        if not named:
            monkeypatch.delattr(socket, "TCP_NOTSENT_LOWAT", raising=False)
        sockets.limit_unsent(pair[0], 123_456)
        assert pair[0].getsockopt(socket.IPPROTO_TCP, 25) == 123_456

    @linux
    def test_the_queue_stays_short(self) -> None:
        sizes = []
        for limited in (True, False):
            one, two = tcp_pair()
            with one, two:
                if limited:
                    sockets.limit_unsent(one, 16 * 1024)
                sizes.append(fill(one))
        assert sizes[0] < sizes[1]

    def test_another_systems_number_is_not_guessed(
        self, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        monkeypatch.setattr(sockets, "_set_tcp", lambda *arguments: asked.append(arguments))
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.delattr(socket, "TCP_NOTSENT_LOWAT", raising=False)
        sockets.limit_unsent(pair[0], 1000)
        assert asked == []

    def test_nothing_where_there_is_no_tcp(self, others: dict[str, socket.socket]) -> None:
        for sock in others.values():
            sockets.limit_unsent(sock, 1000)


class TestAskWhenSilent:
    @linux
    def test_sets_seconds(self, pair: tuple[socket.socket, socket.socket]) -> None:
        sockets.ask_when_silent(pair[0], 60)
        assert pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert pair[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60

    @pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")
    def test_where_there_is_no_tcp(self) -> None:
        near, far = socket.socketpair()
        sockets.ask_when_silent(near, 60)
        near.close()
        far.close()
        sockets.ask_when_silent(near, 60)


class TestWiden:
    def test_past_the_systems_limit_if_it_lets_us(self) -> None:
        asked: list[int] = []

        class Datagrams:
            def setsockopt(self, level: int, option: int, value: int) -> None:
                assert (level, value) == (socket.SOL_SOCKET, sockets.DATAGRAMS_BYTES)
                asked.append(option)
                if option in refused:
                    raise PermissionError(errno.EPERM, "not you")

        forced = [33] if sys.platform == "linux" else []
        refused: list[int] = []
        sockets.widen(Datagrams())  # type: ignore[arg-type]
        assert asked == (forced or [socket.SO_RCVBUF])
        asked.clear()
        refused = [33]
        sockets.widen(Datagrams())  # type: ignore[arg-type]
        assert asked == [*forced, socket.SO_RCVBUF]
        refused.append(socket.SO_RCVBUF)
        sockets.widen(Datagrams())  # type: ignore[arg-type]
