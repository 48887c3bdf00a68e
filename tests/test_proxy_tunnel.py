"""proxy_tunnel.py and tls_relay.py: the way to the server through scripted proxies, on loopback."""

from __future__ import annotations

import builtins
import gc
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.roles import descriptors, free_port
from tests.test_dialler import TOKEN, Accepting, Certificates, FakeServer, url
from wstunnel import limits, proxy_tunnel, tls
from wstunnel.dialler import AGENT, ServerDialler
from wstunnel.errors import LocalError, NetworkError, TrustError
from wstunnel.proxy_tunnel import REFUSAL_SECONDS, ProxyTunnel, Stage, check_socks
from wstunnel.tls_relay import Relays
from wstunnel.upstream import ProxyUrl, parse_proxy_url

OPEN = b"HTTP/1.1 200 Connection established\r\n\r\n"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


async def pump(source: Any, sink: Any) -> None:
    try:
        while data := await source.receive_some(65536):
            await sink.send_all(data)
        await sink.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError, AttributeError):
        await sink.aclose()  # TLS cannot half-close


class Proxy(FakeServer):
    """An HTTP proxy that does as it is asked; `heard` is what the client said behind the CONNECT."""

    def __init__(self, context: ssl.SSLContext | None = None, *, answer: bytes = OPEN, pieces: int = 1 << 20) -> None:
        super().__init__(self._serve, context)
        self.answer = answer
        self.pieces = pieces
        self.streams: list[Any] = []

    async def _serve(self, stream: Any) -> None:
        head = await self.read_head(stream)
        if not head:
            return
        self.streams.append(stream)
        host, _, port = head.split(b" ")[1].decode().rpartition(":")
        for start in range(0, len(self.answer), self.pieces):
            await stream.send_all(self.answer[start : start + self.pieces])
            await trio.lowlevel.checkpoint()
        if not self.answer.startswith(b"HTTP/1.1 200"):
            return
        async with await trio.open_tcp_stream(host.strip("[]"), int(port)) as far, trio.open_nursery() as nursery:
            nursery.start_soon(pump, stream, far)
            nursery.start_soon(pump, far, stream)

    def url(self, user_info: str = "") -> ProxyUrl:
        return parse_proxy_url(f"{'https' if self.context else 'http'}://{user_info}127.0.0.1:{self.port}")


@asynccontextmanager
async def relaying() -> AsyncIterator[Relays]:
    async with trio.open_nursery() as nursery:
        relays = Relays()
        await nursery.start(relays.run)
        yield relays
        nursery.cancel_scope.cancel()


async def fails(tunnel: ProxyTunnel, host: str = "127.0.0.1", port: int = 443) -> NetworkError:
    before = descriptors()
    with pytest.raises(NetworkError) as caught:
        await tunnel.open(host, port, Stage("tcp", "x"))
    gc.collect()
    assert descriptors() <= before + 2  # the proxy's end may not have noticed yet
    return caught.value


class TestHttp:
    @pytest.mark.parametrize("pieces", [1 << 20, 1])
    async def test_plain(self, nursery: trio.Nursery, pieces: int) -> None:
        server = await Accepting().start(nursery)
        proxy = await Proxy(pieces=pieces).start(nursery)
        tunnel = ProxyTunnel(proxy.url("ann:hunter2@"), agent=AGENT)  # type: ignore[attr-defined]
        sock, _ = await ServerDialler(url(server.port), None, proxy=tunnel).dial()
        sock.close()
        first, *fields = proxy.heads[0].decode().split("\r\n")
        assert first == f"CONNECT 127.0.0.1:{server.port} HTTP/1.1"
        assert f"User-Agent: {AGENT}" in fields
        assert "Proxy-Authorization: Basic YW5uOmh1bnRlcjI=" in fields
        assert not any("Authorization: Bearer" in field for field in fields)
        assert f"Authorization: Bearer {TOKEN.reveal()}".encode() in server.heads[0]
        assert b"Proxy-Authorization" not in server.heads[0]

    async def test_tls_with_the_server(self, nursery: trio.Nursery, certificates: Certificates) -> None:
        server = await Accepting(certificates.server).start(nursery)
        proxy: Any = await Proxy().start(nursery)
        context = tls.client_context(None, (certificates.pin,))
        dialler = ServerDialler(
            url(server.port, "wss"), context, pins=(certificates.pin,), proxy=ProxyTunnel(proxy.url())
        )
        sock, _ = await dialler.dial()
        assert isinstance(sock, ssl.SSLSocket)
        sock.close()

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (b"HTTP/1.1 407 Who\r\nContent-Length: 0\r\n\r\n", "wants user and password"),
            (b"HTTP/1.1 403 No\r\n\r\n", "does not allow 127.0.0.1:443"),
            (b"", "closed the connection without an answer"),
            (b"nonsense\r\n", "not HTTP"),
            (OPEN + b"x", "bytes behind its answer"),
        ],
    )
    async def test_refusals(self, nursery: trio.Nursery, answer: bytes, text: str) -> None:
        async def serve(stream: Any) -> None:
            await proxy.read_head(stream)
            await stream.send_all(answer)

        proxy = await FakeServer(serve).start(nursery)
        error = await fails(ProxyTunnel(ProxyUrl("http", "127.0.0.1", proxy.port)))
        assert (error.layer, text in str(error)) == ("proxy", True), error

    async def test_nobody_listens(self) -> None:
        port = free_port()
        error = await fails(ProxyTunnel(ProxyUrl("http", "127.0.0.1", port, "ann", "hunter2")))
        assert (error.layer, str(error)) == (
            "proxy",
            f"cannot connect to the proxy 127.0.0.1:{port}: connection refused",
        )

    async def test_a_reset(self, nursery: trio.Nursery) -> None:
        async def abort(stream: Any) -> None:
            await stream.receive_some(10)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await stream.aclose()

        proxy = await FakeServer(abort).start(nursery)
        error = await fails(ProxyTunnel(ProxyUrl("http", "127.0.0.1", proxy.port)))
        assert (error.layer, "broke: Connection reset" in str(error)) == ("proxy", True), error

    async def test_the_other_family_is_not_dialled(self, nursery: trio.Nursery) -> None:
        proxy: Any = await Proxy().start(nursery)
        tunnel = ProxyTunnel(proxy.url(), family=socket.AF_INET6)
        error = await fails(tunnel)
        assert (error.layer, "has no IPv6 address" in str(error)) == ("proxy", True), error

    async def test_a_proxy_that_hangs_is_named(self, nursery: trio.Nursery, mock_clock: MockClock) -> None:
        proxy = await FakeServer(lambda _stream: trio.sleep_forever()).start(nursery)
        dialler = ServerDialler(url(443), None, proxy=ProxyTunnel(ProxyUrl("http", "127.0.0.1", proxy.port)))
        caught: list[NetworkError] = []

        async def dial() -> None:
            with pytest.raises(NetworkError) as error:
                await dialler.dial()
            caught.append(error.value)

        async with trio.open_nursery() as inner:
            inner.start_soon(dial)
            await wait_all_tasks_blocked(0.05)
            mock_clock.jump(limits.HANDSHAKE_SECONDS + 0.1)
        assert (caught[0].layer, str(caught[0])) == (
            "proxy",
            f"the proxy 127.0.0.1:{proxy.port} did not answer within 10 s",
        )

    async def test_a_refusals_words_are_not_waited_for_long(self, nursery: trio.Nursery, mock_clock: MockClock) -> None:
        async def serve(stream: Any) -> None:
            await proxy.read_head(stream)
            await stream.send_all(b"HTTP/1.1 403 No\r\nContent-Length: 1000\r\n\r\nbecause\n")
            await trio.sleep_forever()

        proxy = await FakeServer(serve).start(nursery)
        caught: list[NetworkError] = []

        async def dial() -> None:
            caught.append(await fails(ProxyTunnel(ProxyUrl("http", "127.0.0.1", proxy.port))))

        async with trio.open_nursery() as inner:
            inner.start_soon(dial)
            await wait_all_tasks_blocked(0.05)
            assert not caught
            mock_clock.jump(REFUSAL_SECONDS + 0.1)
        assert "403: because" in str(caught[0])


class TestTlsToTheProxy:
    async def dialled(
        self, nursery: trio.Nursery, certificates: Certificates, relays: Relays, *, inner: bool
    ) -> tuple[Any, Any, Proxy]:
        server = await Accepting(certificates.server if inner else None).start(nursery)
        proxy: Any = await Proxy(certificates.server).start(nursery)
        context = tls.client_context(certificates.ca, ())
        tunnel = ProxyTunnel(proxy.url("ann:hunter2@"), context, relays)
        dialler = ServerDialler(url(server.port, "wss" if inner else "ws"), context if inner else None, proxy=tunnel)
        sock, _ = await dialler.dial()
        return sock, server, proxy

    @pytest.mark.parametrize("inner", [True, False])
    async def test_tls_in_tls(self, nursery: trio.Nursery, certificates: Certificates, inner: bool) -> None:
        async with relaying() as relays:
            sock, server, proxy = await self.dialled(nursery, certificates, relays, inner=inner)
            assert isinstance(sock, ssl.SSLSocket) is inner
            assert not sock.getblocking()
            assert b"Bearer" in server.heads[0]
            assert b"Proxy-Authorization: Basic" in proxy.heads[0]
            sock.close()

    async def test_megabytes_both_ways_and_both_ends(self, nursery: trio.Nursery, certificates: Certificates) -> None:
        size = 3_000_000
        got: list[int] = []

        async def serve(stream: Any) -> None:
            count = 0
            while count < size:
                count += len(await stream.receive_some(65536))
            got.append(count)
            await stream.send_all(bytes(size))
            await stream.aclose()

        server = await FakeServer(serve).start(nursery)
        proxy: Any = await Proxy(certificates.server).start(nursery)
        before = descriptors()
        async with relaying() as relays:
            tunnel = ProxyTunnel(proxy.url(), tls.client_context(certificates.ca, ()), relays)
            sock = await tunnel.open("127.0.0.1", server.port, Stage("tcp", "x"))
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
            await stream.send_all(bytes(size))
            received = 0
            while data := await stream.receive_some(65536):
                received += len(data)
            await stream.aclose()
            assert (got, received) == ([size], size)
            with trio.fail_after(20):
                while descriptors() > before:  # the relay ends by itself
                    await trio.sleep(0.01)

    async def test_a_connection_that_breaks_ends_the_near_end(
        self, nursery: trio.Nursery, certificates: Certificates
    ) -> None:
        async with relaying() as relays:
            sock, _, proxy = await self.dialled(nursery, certificates, relays, inner=False)
            transport = proxy.streams[0].transport_stream
            transport.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await transport.aclose()
            with trio.fail_after(20):
                await trio.lowlevel.wait_readable(sock)
            assert sock.recv(10) == b""
            sock.close()

    async def test_who_closes_is_not_waited_for_by_the_proxy(
        self, nursery: trio.Nursery, certificates: Certificates
    ) -> None:
        """A server that never ends: the relay does, LINGER_SECONDS after the near end."""
        server = await Accepting().start(nursery)
        proxy: Any = await Proxy(certificates.server).start(nursery)
        before = descriptors()
        async with relaying() as relays:
            tunnel = ProxyTunnel(proxy.url(), tls.client_context(certificates.ca, ()), relays)
            sock = await tunnel.open("127.0.0.1", server.port, Stage("tcp", "x"))
            sock.close()
            with trio.fail_after(limits.LINGER_SECONDS + 5):
                while descriptors() > before + 2:
                    await trio.sleep(0.02)

    async def test_to_cancel_the_relays_closes_everything(
        self, nursery: trio.Nursery, certificates: Certificates
    ) -> None:
        async with relaying() as relays:
            sock, _, _ = await self.dialled(nursery, certificates, relays, inner=False)
        assert sock.recv(10) == b""
        sock.close()

    @pytest.mark.parametrize("how", ["closed", "cancelled", "cancelled with input unread"])
    async def test_the_proxy_is_told_the_end_of_tls(
        self, nursery: trio.Nursery, certificates: Certificates, how: str
    ) -> None:
        """RFC 8446 §6.1. Trio says it only to who is not `https_compatible`, and then waits for the answer."""
        ended: list[type[BaseException] | bytes] = []
        over = trio.Event()

        async def serve(stream: Any) -> None:
            await proxy.read_head(stream)
            await stream.send_all(OPEN)
            for _ in range(400 if "unread" in how else 0):  # more records than the relay's pair holds
                await stream.send_all(bytes(100))
            try:
                ended.append(await stream.receive_some(10))
            except trio.BrokenResourceError as error:  # an end without close_notify
                ended.append(type(error))
            over.set()

        proxy = await FakeServer(serve, certificates.server).start(nursery)
        proxy_url = ProxyUrl("https", "127.0.0.1", proxy.port)
        with trio.fail_after(limits.LINGER_SECONDS + 5):
            async with relaying() as relays:
                tunnel = ProxyTunnel(proxy_url, tls.client_context(certificates.ca, ()), relays)
                sock = await tunnel.open("127.0.0.1", 443, Stage("tcp", "x"))
                if how == "closed":
                    sock.close()
                    await over.wait()
                await wait_all_tasks_blocked(0.02)
            await over.wait()
        sock.close()
        assert ended == [b""]

    async def test_behind_a_send_that_was_cut_short_nothing_is_said(
        self, nursery: trio.Nursery, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would stand in the middle of a record. And a proxy that takes nothing is not waited for."""
        said: list[bytes] = []

        async def send_all(_: object, data: bytes) -> None:
            said.append(data)

        monkeypatch.setattr("wstunnel.tls_relay._Hurried.send_all", send_all)
        proxy: Any = await Proxy(certificates.server).start(nursery)
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            async with relaying() as relays:
                tunnel = ProxyTunnel(proxy.url(), tls.client_context(certificates.ca, ()), relays)
                sock = await tunnel.open("127.0.0.1", deaf.getsockname()[1], Stage("tcp", "x"))
                with pytest.raises(BlockingIOError):
                    while True:
                        sock.sendall(bytes(65536))
                        await wait_all_tasks_blocked()
        sock.close()
        assert not said

    async def test_relays_that_do_not_run(self, nursery: trio.Nursery, certificates: Certificates) -> None:
        proxy: Any = await Proxy(certificates.server).start(nursery)
        server = await Accepting().start(nursery)
        tunnel = ProxyTunnel(proxy.url(), tls.client_context(certificates.ca, ()), Relays())
        before = descriptors()
        with pytest.raises(RuntimeError, match="do not run"):
            await tunnel.open("127.0.0.1", server.port, Stage("tcp", "x"))
        assert descriptors() <= before + 4  # the proxy's own

    async def test_an_untrusted_proxy_gets_no_credentials(
        self, nursery: trio.Nursery, certificates: Certificates
    ) -> None:
        proxy: Any = await Proxy(certificates.server).start(nursery)
        tunnel = ProxyTunnel(proxy.url("ann:hunter2@"), tls.client_context(None, ()), Relays())
        with pytest.raises(TrustError, match=rf"^the proxy 127\.0\.0\.1:{proxy.port} did not prove") as caught:
            await tunnel.open("127.0.0.1", 443, Stage("tcp", "x"))
        assert 'it was issued by "trustme' in str(caught.value)
        assert str(caught.value).endswith("If you trust that authority, name it with --ca")  # no pin is the proxy's
        await wait_all_tasks_blocked(0.05)
        assert not proxy.heads

    async def test_a_proxy_without_tls(self, nursery: trio.Nursery) -> None:
        async def serve(stream: Any) -> None:
            await stream.receive_some(10)
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        proxy = await FakeServer(serve).start(nursery)
        tunnel = ProxyTunnel(
            ProxyUrl("https", "127.0.0.1", proxy.port), tls.client_context(None, (bytes(32),)), Relays()
        )
        error = await fails(tunnel)
        assert (error.layer, "did you mean http:// in the proxy's URL" in str(error)) == ("proxy", True), error

    async def test_a_proxy_that_closes_in_tls(self, nursery: trio.Nursery, certificates: Certificates) -> None:
        async def serve(stream: Any) -> None:
            await stream.receive_some(10)

        proxy = await FakeServer(serve, certificates.server).start(nursery)
        tunnel = ProxyTunnel(
            ProxyUrl("https", "127.0.0.1", proxy.port), tls.client_context(certificates.ca, ()), Relays()
        )
        error = await fails(tunnel)
        assert (error.layer, "closed the connection without an answer" in str(error)) == ("proxy", True), error


class SocksProxy(FakeServer):
    """Speaks from a script: each answer goes out when the client has sent something."""

    def __init__(self, *answers: bytes) -> None:
        super().__init__(self._serve)
        self.answers = answers
        self.heard: list[bytes] = []

    async def _serve(self, stream: Any) -> None:
        for answer in self.answers:
            self.heard.append(await stream.receive_some(1000))
            if not answer:
                return
            for byte in answer:
                await stream.send_all(bytes([byte]))
                await trio.lowlevel.checkpoint()
        await stream.receive_some(1)

    def url(self, scheme: str = "socks5h", user_info: str = "") -> ProxyUrl:
        return parse_proxy_url(f"{scheme}://{user_info}127.0.0.1:{self.port}")


GRANTED = b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x50"


class TestSocks:
    async def open(self, proxy: Any, host: str = "tunnel.example.org", **changes: str) -> None:
        sock = await ProxyTunnel(proxy.url(**changes)).open(host, 443, Stage("tcp", "x"))
        assert not sock.getblocking()
        sock.close()

    async def test_the_proxy_resolves(self, nursery: trio.Nursery) -> None:
        proxy = await SocksProxy(b"\x05\x00", GRANTED).start(nursery)
        await self.open(proxy)
        assert proxy.heard == [b"\x05\x01\x00", b"\x05\x01\x00\x03\x12tunnel.example.org\x01\xbb"]  # type: ignore[attr-defined]

    async def test_this_machine_resolves(self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first address is not to be reached, the second is."""

        async def resolve(host: str, port: int) -> list[str]:
            assert (host, port) == ("tunnel.example.org", 443)
            return ["::1", "127.0.0.2"]

        monkeypatch.setattr(proxy_tunnel, "_resolve", resolve)
        answers = iter((b"\x05\x04\x00", GRANTED))
        proxy: Any = SocksProxy()

        async def serve(stream: Any) -> None:
            proxy.heard.append(await stream.receive_some(1000))
            await stream.send_all(b"\x05\x00")
            proxy.heard.append(await stream.receive_some(1000))
            await stream.send_all(next(answers))
            await stream.receive_some(1)

        proxy.handler = serve
        await proxy.start(nursery)
        await self.open(proxy, scheme="socks5")
        assert proxy.heard[1] == b"\x05\x01\x00\x04" + bytes(15) + b"\x01\x01\xbb"
        assert proxy.heard[3] == b"\x05\x01\x00\x01\x7f\x00\x00\x02\x01\xbb"

    async def test_a_name_that_this_machine_does_not_know(
        self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "x")

        monkeypatch.setattr(proxy_tunnel.socket, "getaddrinfo", unknown)
        error = await fails(ProxyTunnel(ProxyUrl("socks5", "127.0.0.1", 1)), "nowhere.invalid")
        assert (error.layer, "socks5h://" in str(error)) == ("name", True), error

    async def test_user_and_password(self, nursery: trio.Nursery) -> None:
        proxy: Any = await SocksProxy(b"\x05\x02", b"\x01\x00", GRANTED).start(nursery)
        await self.open(proxy, user_info="ann:hunter2@")
        assert proxy.heard[:2] == [b"\x05\x02\x00\x02", b"\x01\x03ann\x07hunter2"]

    @pytest.mark.parametrize(
        ("answers", "text"),
        [
            ((b"\x05\xff",), "wants user and password"),
            ((b"\x05\x02",), "wants user and password"),
            ((b"\x05\x00", b"\x05\x01\x00"), "asked for tunnel.example.org:443, failed"),
            ((b"\x05\x00", b"\x05\x02\x00"), "does not allow it"),
            ((b"\x05\x00", b"\x05\x05\x00"), "connection was refused"),
            ((b"\x05\x00", b"\x05\x08\x00"), "kind of address"),
            ((b"\x05\x00", b"\x05\x63\x00"), "not SOCKS5"),
            ((b"\x05\x00", b"\x05\x00\x00\x03\x01\xff\x00\x50"), "not SOCKS5"),
            ((b"HTTP/1.1 400 Bad Request\r\n",), "not SOCKS5: check scheme"),
            ((b"",), "closed the connection without an answer"),
            ((b"\x05\x00", b""), "closed the connection without an answer"),
        ],
    )
    async def test_refusals(self, nursery: trio.Nursery, answers: tuple[bytes, ...], text: str) -> None:
        proxy: Any = await SocksProxy(*answers).start(nursery)
        error = await fails(ProxyTunnel(proxy.url()), "tunnel.example.org")
        assert (error.layer, text in str(error)) == ("proxy", True), error

    @pytest.mark.parametrize(
        ("answers", "text"),
        [((b"\x05\x02", b"\x01\x01"), "refused user and password"), ((b"\x05\xff",), "other methods")],
    )
    async def test_refused_credentials(self, nursery: trio.Nursery, answers: tuple[bytes, ...], text: str) -> None:
        proxy: Any = await SocksProxy(*answers).start(nursery)
        error = await fails(ProxyTunnel(proxy.url(user_info="ann:hunter2@")))
        assert text in str(error)
        assert "hunter2" not in str(error)

    async def test_nobody_listens(self) -> None:
        error = await fails(ProxyTunnel(ProxyUrl("socks5h", "127.0.0.1", free_port())))
        assert (error.layer, "cannot connect to the proxy" in str(error)) == ("proxy", True)

    async def test_a_name_too_long_for_it(self, nursery: trio.Nursery) -> None:
        proxy: Any = await SocksProxy(b"\x05\x00", GRANTED).start(nursery)
        error = await fails(ProxyTunnel(proxy.url()), ".".join(["a" * 60] * 5))
        assert error.layer == "proxy"

    async def test_cancelling_closes(self, nursery: trio.Nursery) -> None:
        proxy: Any = await SocksProxy(b"\x05").start(nursery)
        with trio.move_on_after(0.05):
            await ProxyTunnel(proxy.url()).open("h", 1, Stage("tcp", "x"))
        gc.collect()  # a socket left open would warn

    def test_without_the_library_the_message_has_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check_socks()
        real: Callable[..., Any] = builtins.__import__

        def missing(name: str, *args: Any, **options: Any) -> Any:
            if name.startswith("python_socks"):
                raise ImportError(name)
            return real(name, *args, **options)

        monkeypatch.setattr(builtins, "__import__", missing)
        monkeypatch.delitem(sys.modules, "python_socks", raising=False)
        with pytest.raises(LocalError, match=r"pip install python-socks$"):
            check_socks()
