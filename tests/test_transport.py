"""transport.py: plain sockets and real TLS, with the reader slow, the peer gone, and the task cancelled."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
import trustme

from wstunnel import tls
from wstunnel.transport import Transport

BIG = os.urandom(1 << 20) * 8
"""More than all kernel buffers of a connection on loopback or of a socket pair."""

Pair = tuple[Transport, Transport]


class Contexts:
    def __init__(self) -> None:
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost")
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self.server)
        self.client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(self.client)


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    return Contexts()


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    return one, two


def transports(contexts: Contexts | None, pair: Callable[[], tuple[socket.socket, socket.socket]]) -> Pair:
    one, two = pair()
    if contexts is None:
        return Transport(one), Transport(two)
    return (
        Transport(one, contexts.client, server_hostname="localhost"),
        Transport(two, contexts.server, server_side=True),
    )


@pytest.fixture(params=["plain-unix", "plain-tcp", "tls-unix", "tls-tcp"])
async def pair(request: pytest.FixtureRequest, contexts: Contexts) -> Pair:
    kind, family = request.param.split("-")
    made = transports(contexts if kind == "tls" else None, tcp_pair if family == "tcp" else unix_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made[0].handshake)
        nursery.start_soon(made[1].handshake)
    return made


async def receive_exactly(transport: Transport, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = await transport.receive(min(65536, count - len(data)))
        assert chunk, f"end after {len(data)} of {count} bytes"
        data += chunk
    return bytes(data)


def reset(transport: Transport) -> None:
    raw = transport.detach()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def shut(pair: Pair) -> None:
    pair[0].close()
    pair[1].close()


class TestBytes:
    async def test_arrive_both_ways(self, pair: Pair) -> None:
        one, two = pair
        await one.send(b"hello")
        assert await receive_exactly(two, 5) == b"hello"
        await two.send(bytearray(b"wor"))
        await two.send(memoryview(b"ld"))
        await two.send(b"")
        assert await receive_exactly(one, 5) == b"world"
        shut(pair)

    async def test_receive_gives_at_most_what_was_asked_for(self, pair: Pair) -> None:
        one, two = pair
        await one.send(b"abcdef")
        assert [await two.receive(2) for _ in range(3)] == [b"ab", b"cd", b"ef"]
        shut(pair)

    async def test_a_big_send_waits_for_a_slow_reader(self, pair: Pair) -> None:
        one, two = pair
        sent = trio.Event()

        async def sending() -> None:
            await one.send(BIG)
            sent.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sending)
            await trio.testing.wait_all_tasks_blocked()
            assert not sent.is_set()
            assert await receive_exactly(two, len(BIG)) == BIG
        assert sent.is_set()
        await one.send(b"after")
        assert await receive_exactly(two, 5) == b"after"
        shut(pair)

    async def test_big_sends_both_ways_at_once(self, pair: Pair) -> None:
        one, two = pair
        async with trio.open_nursery() as nursery:
            for here, there in ((one, two), (two, one)):
                nursery.start_soon(here.send, BIG)
                await trio.testing.wait_all_tasks_blocked()
                assert await receive_exactly(there, len(BIG)) == BIG
        shut(pair)

    async def test_the_end_is_empty_bytes(self, pair: Pair) -> None:
        one, two = pair
        await one.send(b"last")
        one.close()
        assert await receive_exactly(two, 4) == b"last"
        assert await two.receive(10) == b""
        assert await two.receive(10) == b""
        two.close()

    async def test_an_end_without_close_notify_is_the_end_too(self, contexts: Contexts) -> None:
        one, two = transports(contexts, unix_pair)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.handshake)
            nursery.start_soon(two.handshake)
        one.detach().close()
        assert await two.receive(10) == b""
        two.close()

    @pytest.mark.parametrize("error", [ssl.SSLZeroReturnError, ssl.SSLEOFError])
    async def test_openssls_ends_are_the_end(self, error: type[ssl.SSLError]) -> None:
        """Which of its errors an end is depends on the version of OpenSSL."""

        class Ending(socket.socket):
            def recv(self, *_: object) -> bytes:
                raise error

        one, two = socket.socketpair()
        transport = Transport(Ending(fileno=one.detach()))
        assert await transport.receive(10) == b""
        transport.close()
        two.close()

    async def test_a_reset_comes_up_as_it_is(self) -> None:
        one, two = transports(None, tcp_pair)
        reset(one)
        with pytest.raises(ConnectionResetError):
            await two.receive(10)
        with pytest.raises(BrokenPipeError):
            await two.send(b"x")
        two.close()

    async def test_a_reset_under_tls_is_an_error_or_the_end(self, contexts: Contexts) -> None:
        """CPython took ECONNRESET for an end before gh-115627 (3.11.9, 3.12.3)."""
        one, two = transports(contexts, tcp_pair)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.handshake)
            nursery.start_soon(two.handshake)
        reset(one)
        try:
            assert await two.receive(10) == b""
        except ConnectionResetError:
            pass
        with pytest.raises(OSError):  # EOF or EPIPE, by version
            await two.send(b"x" * 100_000)
        two.close()


class TestHandshake:
    async def test_tls_shows_the_peers_certificate(self, contexts: Contexts) -> None:
        one, two = transports(contexts, unix_pair)
        assert one.tls is None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.handshake)
            nursery.start_soon(two.handshake)
        assert one.tls is not None
        certificate = one.tls.getpeercert(binary_form=True)
        assert certificate is not None
        tls.verify_pins(one.tls, (tls.public_key_pin(certificate),))
        shut((one, two))
        assert one.tls is None

    async def test_plain_has_none(self) -> None:
        pair = transports(None, unix_pair)
        await pair[0].handshake()
        assert pair[0].tls is None
        shut(pair)

    async def test_a_wrong_name_comes_up_as_it_is(self, contexts: Contexts) -> None:
        one, two = unix_pair()
        client = Transport(one, contexts.client, server_hostname="elsewhere")
        server = Transport(two, contexts.server, server_side=True)

        async def serving() -> None:
            with pytest.raises(ssl.SSLError):
                await server.handshake()
                await server.receive(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serving)
            with pytest.raises(ssl.SSLCertVerificationError):
                await client.handshake()
            # Before the handshake's end there is no close_notify to send.
            client.close()
        server.close()

    async def test_cancelled_while_the_peer_is_silent(self, contexts: Contexts, autojump_clock: object) -> None:
        one, two = unix_pair()
        transport = Transport(one, contexts.client, server_hostname="localhost")
        with trio.move_on_after(10) as scope:
            await transport.handshake()
        assert scope.cancelled_caught
        transport.close()
        two.settimeout(5)
        assert two.recv(1) == b"\x16"  # a ClientHello was sent
        two.close()

    async def test_a_peer_that_has_reset_the_connection(self, contexts: Contexts) -> None:
        one, two = tcp_pair()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
        transport = Transport(two, contexts.server, server_side=True)
        with pytest.raises(OSError):
            await transport.handshake()
        transport.close()
        transport.close()

    async def test_without_the_name_that_the_context_wants(self, contexts: Contexts) -> None:
        one, two = unix_pair()
        transport, peer = Transport(one, contexts.client), Transport(two)
        with pytest.raises(ValueError, match="check_hostname requires server_hostname"):
            await transport.handshake()
        assert await peer.receive(1) == b""
        shut((transport, peer))

    async def test_a_big_flight_waits_for_the_reader(self, contexts: Contexts) -> None:
        """The server's certificates do not fit into its socket's buffer: the handshake waits to write."""
        authority = trustme.CA()
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*(f"name{number}.example" for number in range(500)), "localhost").configure_cert(server)
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(client)
        one, two = unix_pair()
        two.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        waited: list[socket.socket] = []
        accepting = Transport(two, server, server_side=True)
        dialling = Transport(one, client, server_hostname="localhost")
        real = trio.lowlevel.wait_writable

        async def counted(sock: socket.socket) -> None:
            waited.append(sock)
            await real(sock)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trio.lowlevel, "wait_writable", counted)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accepting.handshake)
                nursery.start_soon(dialling.handshake)
        assert waited
        shut((accepting, dialling))


class TestSkim:
    """What comes before TLS, such as a PROXY header."""

    @pytest.mark.parametrize("pair", [unix_pair, tcp_pair])
    async def test_what_is_not_taken_is_left_to_tls(self, contexts: Contexts, pair: Callable[[], Any]) -> None:
        one, two = pair()
        one.send(b"header")
        client = Transport(one, contexts.client, server_hostname="localhost")
        server = Transport(two, contexts.server, server_side=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.handshake)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert await server.skim(lambda data: 4 if data.startswith(b"header\x16") else 0)
            assert await server.skim(lambda data: 2 if data.startswith(b"er\x16") else 0)
            await server.handshake()
        await client.send(b"x")
        assert await server.receive(10) == b"x"
        client.close()
        server.close()

    async def test_the_end(self) -> None:
        one, two = tcp_pair()
        one.close()
        assert not await Transport(two).skim(len)
        two.close()

    async def test_a_fault_takes_nothing(self) -> None:
        one, two = tcp_pair()
        transport = Transport(two)
        one.send(b"abc")

        def take(data: bytes) -> int:
            raise ValueError("not this")

        with pytest.raises(ValueError, match="not this"):
            await transport.skim(take)
        assert await transport.receive(10) == b"abc"
        one.close()
        transport.close()


class TestCancellation:
    async def test_receive_loses_nothing(self, pair: Pair, autojump_clock: object) -> None:
        one, two = pair
        with trio.move_on_after(1) as scope:
            await two.receive(10)
        assert scope.cancelled_caught
        await one.send(b"kept")
        with trio.CancelScope() as scope:
            scope.cancel()
            await two.receive(10)
        assert scope.cancelled_caught
        assert await receive_exactly(two, 4) == b"kept"
        shut(pair)

    async def test_send_cut_short_ends_sending(self, pair: Pair) -> None:
        one, two = pair
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.send, BIG)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        with pytest.raises(trio.BrokenResourceError, match="an earlier send was cut short"):
            await one.send(b"x")
        await two.send(b"still readable")
        assert await receive_exactly(one, 14) == b"still readable"
        shut(pair)

    async def test_send_cancelled_before_the_start_changes_nothing(self, pair: Pair) -> None:
        one, two = pair
        with trio.CancelScope() as scope:
            scope.cancel()
            await one.send(b"never")
        assert scope.cancelled_caught
        await one.send(b"x")
        assert await two.receive(10) == b"x"
        shut(pair)

    async def test_every_call_is_a_checkpoint(self, pair: Pair) -> None:
        one, two = pair
        with trio.testing.assert_checkpoints():
            await one.send(b"x")
        with trio.testing.assert_checkpoints():
            await two.receive(1)
        shut(pair)


class TestTheEnd:
    async def test_close_wakes_who_waits(self, pair: Pair) -> None:
        one, two = pair

        async def receiving() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await one.receive(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receiving)
            await trio.testing.wait_all_tasks_blocked()
            one.close()
        two.close()

    async def test_closed_means_closed(self, pair: Pair) -> None:
        one, two = pair
        one.close()
        one.close()
        for call in (one.handshake, lambda: one.receive(1), lambda: one.send(b"x"), one.finish):
            with pytest.raises(trio.ClosedResourceError):
                await call()
        with pytest.raises(trio.ClosedResourceError):
            one.detach()
        two.close()

    async def test_detach_hands_the_socket_over(self, pair: Pair) -> None:
        one, two = pair
        await one.send(b"before")
        assert await receive_exactly(two, 6) == b"before"
        encrypted = one.tls is not None
        raw = one.detach()
        assert isinstance(raw, ssl.SSLSocket) == encrypted
        assert not raw.getblocking()
        with pytest.raises(trio.ClosedResourceError):
            await one.receive(1)
        one.close()
        assert raw.send(b"after") == 5
        assert await receive_exactly(two, 5) == b"after"
        raw.close()
        two.close()

    async def test_finish_saves_what_was_sent_from_unread_input(self, pair: Pair) -> None:
        """A plain close would reset the connection here, and the reply would be lost."""
        one, two = pair
        await one.send(b"a request that nobody reads" * 1000)
        await two.send(b"the reply")

        async def reading() -> None:
            await trio.testing.wait_all_tasks_blocked()
            await one.send(b"and more of it")
            assert await receive_exactly(one, 9) == b"the reply"
            assert await one.receive(10) == b""
            one.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading)
            await two.finish(1000)
        with pytest.raises(trio.ClosedResourceError):
            two.detach()

    @pytest.mark.parametrize("ending", ["close", "finish"])
    async def test_a_tls_peer_sees_that_the_end_is_meant(self, contexts: Contexts, ending: str) -> None:
        one, two = transports(contexts, unix_pair)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.handshake)
            nursery.start_soon(two.handshake)
        strict = one.detach()
        assert isinstance(strict, ssl.SSLSocket)
        strict.suppress_ragged_eofs = False  # type: ignore[attr-defined]  # documented for wrap_socket only
        if ending == "close":
            two.close()
        else:
            await two.finish(0)
        assert strict.recv(1) == b""
        strict.close()

    async def test_a_tls_peer_sees_that_a_cut_is_not_meant(self, contexts: Contexts) -> None:
        one, two = transports(contexts, unix_pair)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.handshake)
            nursery.start_soon(two.handshake)
        strict = one.detach()
        assert isinstance(strict, ssl.SSLSocket)
        strict.suppress_ragged_eofs = False  # type: ignore[attr-defined]  # documented for wrap_socket only
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(two.send, BIG)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        two.close()
        with pytest.raises(ssl.SSLError, match="EOF"):
            while True:
                assert strict.recv(65536)
        strict.close()

    async def test_finish_waits_only_so_long(self, pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
        one, two = pair
        before = trio.current_time()
        await two.finish(7)
        assert trio.current_time() - before == pytest.approx(7)
        assert await one.receive(1) == b""
        one.close()

    async def test_finish_closes_when_cancelled(self, pair: Pair) -> None:
        one, two = pair
        with trio.CancelScope() as scope:
            scope.cancel()
            await two.finish()
        assert scope.cancelled_caught
        assert await one.receive(1) == b""
        one.close()

    async def test_finish_with_a_peer_that_is_gone(self) -> None:
        one, two = transports(None, tcp_pair)
        reset(one)
        await two.finish()
        with pytest.raises(trio.ClosedResourceError):
            two.detach()

    async def test_the_descriptor_is_closed_once(self, pair: Pair) -> None:
        one, two = pair
        raw = one._socket
        assert raw is not None
        descriptor = raw.fileno()
        one.close()
        with pytest.raises(OSError) as caught:
            os.fstat(descriptor)
        assert caught.value.errno == errno.EBADF
        two.close()
