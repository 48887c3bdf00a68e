"""dialler.py: TCP, TLS and the upgrade, against servers that do it right and servers that do not."""

from __future__ import annotations

import base64
import errno
import hashlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.roles import descriptors, free_port, tcp_pair
from wstunnel import dialler as dialler_module
from wstunnel import limits, sockets, tls
from wstunnel.auth import LoginUrl, Token, parse_login_url
from wstunnel.dialler import AGENT, ServerDialler
from wstunnel.errors import NetworkError, ServerRefusedError, TrustError, UsageError

TOKEN = Token.new()
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3

Handler = Callable[[Any], Awaitable[None]]


class FakeServer:
    """Answers each connection with `handler`; keeps what it read."""

    def __init__(self, handler: Handler, context: ssl.SSLContext | None = None) -> None:
        self.handler = handler
        self.context = context
        self.port = 0
        self.heads: list[bytes] = []
        self.tls_failures = 0

    async def start(self, nursery: trio.Nursery) -> FakeServer:
        async def serve(stream: trio.SocketStream) -> None:
            served: Any = stream if self.context is None else trio.SSLStream(stream, self.context, server_side=True)
            try:
                await self.handler(served)
            except trio.BrokenResourceError:
                self.tls_failures += 1

        listeners = await nursery.start(
            lambda task_status: trio.serve_tcp(serve, 0, host="127.0.0.1", task_status=task_status)
        )
        self.port = listeners[0].socket.getsockname()[1]
        return self

    async def read_head(self, stream: Any) -> bytes:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = await stream.receive_some(65536)
            if not data:
                break
            head += data
        self.heads.append(head)
        return head


def switching(head: bytes, *, subprotocol: str = "wstunnel.1") -> bytes:
    """The right answer to an upgrade."""
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
    accept = base64.b64encode(hashlib.sha1(fields[b"Sec-WebSocket-Key"] + GUID).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
        + accept + b"\r\nSec-WebSocket-Protocol: " + subprotocol.encode() + b"\r\n\r\n"
    )  # fmt: skip


class Accepting(FakeServer):
    """A server that upgrades, then holds the connection; `extra` comes behind the 101."""

    def __init__(self, context: ssl.SSLContext | None = None, *, extra: bytes = b"", pieces: int = 1 << 20) -> None:
        super().__init__(self._accept, context)
        self.extra = extra
        self.pieces = pieces

    async def _accept(self, stream: Any) -> None:
        head = await self.read_head(stream)
        if not head:
            return
        answer = switching(head) + self.extra
        for start in range(0, len(answer), self.pieces):
            await stream.send_all(answer[start : start + self.pieces])
            await trio.lowlevel.checkpoint()
        await stream.receive_some(1)


class Answering(FakeServer):
    """A server that answers with `answer`, then closes, or holds the connection."""

    def __init__(self, answer: bytes, *, hold: bool = False) -> None:
        super().__init__(self._answer)
        self.answer = answer
        self.hold = hold

    async def _answer(self, stream: Any) -> None:
        await self.read_head(stream)
        await stream.send_all(self.answer)
        if self.hold:
            await stream.receive_some(1)


class Certificates:
    def __init__(self, directory: Path) -> None:
        self.authority = trustme.CA()
        certificate = self.authority.issue_cert("localhost", "127.0.0.1")
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self.server)
        self.ca = directory / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        leaf = directory / "leaf.pem"
        certificate.cert_chain_pems[0].write_to_path(str(leaf))
        self.pin = tls.certificate_pin(leaf)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def url(port: int, scheme: Any = "ws", path: str = "/", host: str = "127.0.0.1") -> LoginUrl:
    return LoginUrl(scheme, host, port, path, TOKEN)


class TestRequest:
    async def test_path_token_agent_and_headers_of_ones_own(self, nursery: trio.Nursery) -> None:
        server = await Accepting().start(nursery)
        dialler = ServerDialler(url(server.port, path="/t"), None, headers=(("X-Team", "blue"),))
        sock, leftover = await dialler.dial()
        sock.close()
        assert leftover == b""
        first, *fields = server.heads[0].decode().rstrip().split("\r\n")
        assert first == "GET /t HTTP/1.1"
        assert {
            f"Host: 127.0.0.1:{server.port}", "Sec-WebSocket-Protocol: wstunnel.1",
            f"Authorization: Bearer {TOKEN.reveal()}", f"User-Agent: {AGENT}", "X-Team: blue",
        } <= set(fields)  # fmt: skip

    async def test_each_dial_has_a_key_of_its_own(self, nursery: trio.Nursery) -> None:
        server = await Accepting().start(nursery)
        dialler = ServerDialler(url(server.port), None)
        for _ in range(2):
            (await dialler.dial())[0].close()
        keys = {line for head in server.heads for line in head.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Key")}
        assert len(keys) == 2

    def test_a_url_without_a_token_is_refused_before_anything(self) -> None:
        with pytest.raises(UsageError, match="no token"):
            ServerDialler(parse_login_url("ws://127.0.0.1/"), None)


class TestWay:
    async def test_a_host_of_ones_own(self, nursery: trio.Nursery) -> None:
        server = await Accepting().start(nursery)
        headers = (("Host", "other.example.org"), ("user-agent", "mine"))
        (await ServerDialler(url(server.port), None, headers=headers).dial())[0].close()
        fields = server.heads[0].decode().split("\r\n")[1:]
        assert [field for field in fields if field.startswith("Host:")] == ["Host: other.example.org"]
        assert [field for field in fields if field.lower().startswith("user-agent:")] == ["user-agent: mine"]

    async def test_a_name_of_ones_own_is_asked_for_and_verified(
        self, nursery: trio.Nursery, certificates: Certificates
    ) -> None:
        asked: list[str | None] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificates.authority.issue_cert("elsewhere.example").configure_cert(context)
        context.sni_callback = lambda _socket, name, _context: asked.append(name)
        server = await Accepting(context).start(nursery)
        client = tls.client_context(certificates.ca, ())
        (await ServerDialler(url(server.port, "wss"), client, server_name="elsewhere.example").dial())[0].close()
        assert asked == ["elsewhere.example"]
        with pytest.raises(TrustError):
            await ServerDialler(url(server.port, "wss"), client, server_name="another.example").dial()
        with pytest.raises(TrustError):
            await ServerDialler(url(server.port, "wss"), client).dial()

    @pytest.mark.parametrize(("family", "kind"), [(socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6")])
    async def test_one_family_only(
        self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, family: socket.AddressFamily, kind: str
    ) -> None:
        dialled: list[str] = []

        async def connect(_family: object, sockaddr: tuple[str, int]) -> socket.socket:
            dialled.append(sockaddr[0])
            raise ConnectionRefusedError(errno.ECONNREFUSED, "no")

        def resolve(*_: object, **__: object) -> Any:
            return [(family, 0, 0, "", (host, 1)) for family, host in addresses]

        addresses = [(socket.AF_INET6, "fd00::1"), (socket.AF_INET, "10.0.0.1")]
        defaults = {"family": None, "limiter": None, "resolve": resolve, "connect": connect}
        monkeypatch.setattr("wstunnel.dial.dial_server.__kwdefaults__", defaults)
        with pytest.raises(NetworkError):
            await ServerDialler(url(80, host="both.example"), None, family=family).dial()
        assert dialled == [host for one, host in addresses if one == family]
        addresses = [one for one in addresses if one[0] != family]
        with pytest.raises(NetworkError, match=f"it has no {kind} address") as caught:
            await ServerDialler(url(80, host="one.example"), None, family=family).dial()
        assert caught.value.layer == "name"

    async def test_it_knows_no_other_server(self) -> None:
        ServerDialler(url(80), None).failed(NetworkError("tunnel", "x"))

    async def test_who_issued_what_is_not_trusted(self, nursery: trio.Nursery, certificates: Certificates) -> None:
        server = await Accepting(certificates.server).start(nursery)
        with pytest.raises(TrustError, match='It was issued by "trustme'):
            await ServerDialler(url(server.port, "wss"), tls.client_context(None, ())).dial()


class TestConnection:
    async def test_the_socket_is_handed_over_ready(self, nursery: trio.Nursery) -> None:
        server = await Accepting().start(nursery)
        sock, _ = await ServerDialler(url(server.port), None).dial()
        assert not sock.getblocking()
        assert sock.getpeername() == ("127.0.0.1", server.port)
        sock.close()

    @pytest.mark.parametrize("pieces", [1 << 20, 7])
    async def test_bytes_behind_the_head_are_kept(self, nursery: trio.Nursery, pieces: int) -> None:
        server = await Accepting(extra=b"\x81\x02{}", pieces=pieces).start(nursery)
        sock, leftover = await ServerDialler(url(server.port), None).dial()
        while len(leftover) < 4:
            await trio.lowlevel.wait_readable(sock)
            leftover += sock.recv(100)
        assert leftover == b"\x81\x02{}"
        sock.close()

    async def test_over_tls(self, nursery: trio.Nursery, certificates: Certificates) -> None:
        server = await Accepting(certificates.server).start(nursery)
        context = tls.client_context(certificates.ca, ())
        sock, _ = await ServerDialler(url(server.port, "wss"), context).dial()
        assert isinstance(sock, ssl.SSLSocket)
        sock.close()

    async def test_with_a_pin_the_pin_alone_decides(self, nursery: trio.Nursery, certificates: Certificates) -> None:
        server = await Accepting(certificates.server).start(nursery)
        pins = (bytes(32), certificates.pin)
        sock, _ = await ServerDialler(url(server.port, "wss"), tls.client_context(None, pins), pins=pins).dial()
        sock.close()


class TestTrust:
    """Who cannot prove who it is never sees the token: not a byte of HTTP."""

    async def impostor(self, nursery: trio.Nursery, context: ssl.SSLContext) -> tuple[FakeServer, list[bytes]]:
        heard: list[bytes] = []

        async def listen(stream: Any) -> None:
            while data := await stream.receive_some(65536):
                heard.append(data)

        return await FakeServer(listen, context).start(nursery), heard

    async def test_wrong_pin(self, nursery: trio.Nursery, certificates: Certificates) -> None:
        server, heard = await self.impostor(nursery, certificates.server)
        pins = (bytes(32),)
        before = descriptors()
        with pytest.raises(TrustError, match="the server's key is not the one in the login URL") as caught:
            await ServerDialler(url(server.port, "wss"), tls.client_context(None, pins), pins=pins).dial()
        assert tls.pin_text(certificates.pin) in str(caught.value)
        await wait_all_tasks_blocked(0.05)
        assert not heard
        assert descriptors() <= before

    async def test_untrusted_certificate(
        self, nursery: trio.Nursery, certificates: Certificates, tmp_path: Path
    ) -> None:
        other = tmp_path / "other.pem"
        trustme.CA().cert_pem.write_to_path(str(other))
        server, heard = await self.impostor(nursery, certificates.server)
        with pytest.raises(TrustError, match=rf"^127\.0\.0\.1:{server.port} did not prove who it is"):
            await ServerDialler(url(server.port, "wss"), tls.client_context(other, ())).dial()
        await wait_all_tasks_blocked(0.05)
        assert not heard

    async def test_certificate_of_another_name(self, nursery: trio.Nursery, certificates: Certificates) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificates.authority.issue_cert("elsewhere.example").configure_cert(context)
        server, heard = await self.impostor(nursery, context)
        with pytest.raises(TrustError):
            await ServerDialler(url(server.port, "wss"), tls.client_context(certificates.ca, ())).dial()
        await wait_all_tasks_blocked(0.05)
        assert not heard

    async def test_the_listener_of_these_tests_would_hear_a_request(
        self, nursery: trio.Nursery, certificates: Certificates
    ) -> None:
        server, heard = await self.impostor(nursery, certificates.server)
        dialler = ServerDialler(url(server.port, "wss"), tls.client_context(certificates.ca, ()))
        with trio.move_on_after(0.3):
            await dialler.dial()
        assert TOKEN.reveal().encode() in b"".join(heard)


class TestRefusals:
    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "(`wstunnel invite`), then `wstunnel login`"),
            (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nno\n", "ask its operator to allow it"),
            (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "check the path in the URL"),
        ],
    )  # fmt: skip
    async def test_for_good(self, nursery: trio.Nursery, answer: bytes, text: str) -> None:
        server = await Answering(answer).start(nursery)
        with pytest.raises(ServerRefusedError) as caught:
            await ServerDialler(url(server.port), None).dial()
        assert text in str(caught.value)
        assert caught.value.exit_code == 3

    async def test_whose_body_ends_with_the_connection(self, nursery: trio.Nursery) -> None:
        server = await Answering(b"HTTP/1.1 401 Unauthorized\r\n\r\nwho are you").start(nursery)
        with pytest.raises(ServerRefusedError, match="refused the token"):
            await ServerDialler(url(server.port), None).dial()

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "503"),
            (b"SSH-2.0-OpenSSH_9.9\r\n", "HTTP"),
            (b"", "without an answer"),
            (b"HTTP/1.1 10", "in the middle of its answer"),
        ],
    )
    async def test_for_now(self, nursery: trio.Nursery, answer: bytes, text: str) -> None:
        server = await Answering(answer).start(nursery)
        with pytest.raises(NetworkError) as caught:
            await ServerDialler(url(server.port), None).dial()
        assert (caught.value.layer, text in str(caught.value)) == ("http", True), caught.value

    async def test_another_subprotocol_is_no_tunnel(self, nursery: trio.Nursery) -> None:
        async def answer(stream: Any) -> None:
            await stream.send_all(switching(await server.read_head(stream), subprotocol="wstunnel.9"))

        server = await FakeServer(answer).start(nursery)
        with pytest.raises(NetworkError, match=r"wstunnel\.9") as caught:
            await ServerDialler(url(server.port), None).dial()
        assert caught.value.layer == "websocket"


class TestLayers:
    """A failure names the layer at fault."""

    async def test_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(
            "wstunnel.dial.dial_server.__kwdefaults__", {"limiter": None, "resolve": unknown, "connect": None}
        )
        with pytest.raises(NetworkError, match="nowhere") as caught:
            await ServerDialler(url(80, host="nowhere.invalid"), None).dial()
        assert caught.value.layer == "name"

    async def test_tcp(self) -> None:
        port = free_port()
        with pytest.raises(NetworkError, match=f"cannot connect to 127.0.0.1:{port}") as caught:
            await ServerDialler(url(port), None).dial()
        assert caught.value.layer == "tcp"

    async def test_tls(self, nursery: trio.Nursery) -> None:
        server = await Answering(b"HTTP/1.1 400 Bad Request\r\n\r\n").start(nursery)

        async def answer_at_once(stream: Any) -> None:
            await stream.receive_some(10)
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        server.handler = answer_at_once
        with pytest.raises(NetworkError, match="did you mean ws://") as caught:
            await ServerDialler(
                url(server.port, "wss"), tls.client_context(None, (bytes(32),)), pins=(bytes(32),)
            ).dial()
        assert caught.value.layer == "tls"
        assert not isinstance(caught.value, TrustError)

    async def test_a_connection_that_is_reset(self, nursery: trio.Nursery) -> None:
        async def abort(stream: trio.SocketStream) -> None:
            await stream.receive_some(10)
            sockets.reset_on_close(stream.socket._sock)
            stream.socket.close()

        server = await FakeServer(abort).start(nursery)
        with pytest.raises(NetworkError) as caught:
            await ServerDialler(url(server.port), None).dial()
        assert (caught.value.layer, str(caught.value)) == (
            "http",
            f"the connection to 127.0.0.1:{server.port} broke during the handshake: Connection reset by peer;"
            " it may speak TLS: try wss://",
        )

    async def test_tls_that_breaks_after_its_handshake(self, nursery: trio.Nursery, certificates: Certificates) -> None:
        async def scribble(stream: Any) -> None:
            await stream.receive_some(10)
            await stream.transport_stream.send_all(b"this is no record of TLS")

        server = await FakeServer(scribble, certificates.server).start(nursery)
        with pytest.raises(NetworkError, match="broke during the handshake: ") as caught:
            await ServerDialler(url(server.port, "wss"), tls.client_context(certificates.ca, ())).dial()
        assert caught.value.layer == "http"
        assert "wss" not in str(caught.value)


class TestDeadline:
    """HANDSHAKE_SECONDS from the first packet to the 101, whatever takes so long."""

    async def fails(self, clock: MockClock, dialler: ServerDialler) -> NetworkError:
        caught: list[NetworkError] = []

        async def dial() -> None:
            with pytest.raises(NetworkError) as error:
                await dialler.dial()
            caught.append(error.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            await wait_all_tasks_blocked(0.01)
            clock.jump(limits.HANDSHAKE_SECONDS - 0.1)
            await wait_all_tasks_blocked(0.01)
            assert not caught
            clock.jump(0.2)
        return caught[0]

    @pytest.fixture
    def connection(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The dialler's connection is made already; this is the server's end."""
        near, far = tcp_pair()

        async def dial_server(*_: object, **__: object) -> socket.socket:
            return near

        monkeypatch.setattr(dialler_module, "dial_server", dial_server)
        yield far
        far.close()
        assert near.fileno() == -1

    async def test_a_network_that_swallows_packets(
        self, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def connect(*_: object) -> socket.socket:
            await trio.sleep_forever()
            raise AssertionError

        monkeypatch.setattr(
            "wstunnel.dial.dial_server.__kwdefaults__",
            {"limiter": None, "resolve": socket.getaddrinfo, "connect": connect},
        )
        error = await self.fails(mock_clock, ServerDialler(url(8080), None))
        assert (error.layer, str(error)) == ("tcp", "cannot connect to 127.0.0.1:8080: no answer within 10 s")

    async def test_a_server_that_does_not_shake_hands(self, mock_clock: MockClock, connection: socket.socket) -> None:
        error = await self.fails(mock_clock, ServerDialler(url(443, "wss"), tls.client_context(None, ())))
        assert (error.layer, str(error)) == ("tls", "127.0.0.1 did not finish the TLS handshake within 10 s")

    async def test_a_server_that_does_not_answer(self, mock_clock: MockClock, connection: socket.socket) -> None:
        error = await self.fails(mock_clock, ServerDialler(url(8080), None))
        assert (error.layer, str(error)) == ("http", "127.0.0.1:8080 did not finish the handshake within 10 s")

    async def test_a_server_that_stops_in_its_answer(self, mock_clock: MockClock, connection: socket.socket) -> None:
        connection.send(b"HTTP/1.1 101 Switching")
        error = await self.fails(mock_clock, ServerDialler(url(8080), None))
        assert error.layer == "http"
        assert "in the middle of its answer" in str(error)

    async def test_a_refusal_whose_body_never_ends_is_a_refusal(
        self, mock_clock: MockClock, connection: socket.socket
    ) -> None:
        connection.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 100\r\n\r\nno")
        with pytest.raises(BaseExceptionGroup) as group:
            await self.fails(mock_clock, ServerDialler(url(8080), None))
        assert group.group_contains(ServerRefusedError, match="refused the token")

    async def test_a_watch_that_ends_the_dial_leaves_nothing_open(self, connection: socket.socket) -> None:
        class Ending:
            def opened(self) -> None:
                raise RuntimeError("enough seen")

        dialler = ServerDialler(url(443), None, watch=Ending())  # type: ignore[arg-type]  # no more is called
        with pytest.raises(RuntimeError, match="enough seen") as caught:
            await dialler.dial()
        assert caught.value.__traceback__ is not None, "which keeps whatever the dial left open"
        assert connection.recv(1) == b""

    async def test_cancelling_leaves_nothing_open(self, connection: socket.socket) -> None:
        with trio.move_on_after(0.01) as scope:
            await ServerDialler(url(8080), None).dial()
        assert scope.cancelled_caught
