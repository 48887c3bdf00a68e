"""raw.py: forwards whose connections are WebSockets of their own, to a plain endpoint."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.memory import MemoryReactor, MemorySocket
from tests.roles import SECONDS, LogLines, application, connecting, exchange, free_port, lines, serving, targets, until
from wstunnel import limits
from wstunnel.auth import LoginUrl, Token
from wstunnel.endpoints.plain import PlainConnection
from wstunnel.errors import LocalError, NetworkError, ServerRefusedError, UsageError
from wstunnel.plain_endpoints import parse_endpoint
from wstunnel.raw import RawConnection, RawForwards
from wstunnel.session import Principal
from wstunnel.wire.credit import Budget
from wstunnel.wire.frames import FrameDecoder, Opcode, encode_close, encode_frame, parse_close
from wstunnel.wire.masking import MaskKeys

__all__ = ["lines"]


class Joined:
    """A connection whose server and application are in the test's hands."""

    def __init__(self) -> None:
        self.reactor = MemoryReactor()
        self.ended: list[PlainConnection] = []
        self.principal = Principal("local", Budget(limits.PROCESS_BYTES), {})
        self.near, self.server = MemorySocket.pair()
        self.far, self.application = MemorySocket.pair()
        self.far.family = socket.AF_INET
        self._decoder = FrameDecoder(masked=True)
        self.data = b""
        self.pings = 0
        self.closed: tuple[int, str] | None = None
        self.connection = RawConnection(
            self,  # type: ignore[arg-type]  # its reactor is one in memory
            self.principal, endpoint="/db", target="ws-raw", peer="127.0.0.1:5", address="a.example", text=True,
            keys=MaskKeys(os.urandom),
        )  # fmt: skip
        self.connection.start(self.near, self.far)  # type: ignore[arg-type]  # in memory
        self.settle()

    def plain_ended(self, connection: PlainConnection) -> None:
        self.ended.append(connection)

    def settle(self) -> None:
        busy = True
        while busy:
            busy = False
            for sock in (self.server, self.near, self.application, self.far):
                pipe = sock.outgoing
                if pipe.sent or (pipe.ended and not pipe.end_arrived):
                    pipe.move(len(pipe.sent))
                    busy = True
            for handler in self.reactor.ready():
                if handler.sock is not None:
                    self.reactor.turn(handler)
                    busy = True
        arrived = self.server.incoming.arrived
        for opcode, payload, _ in self._decoder.feed(bytes(arrived)):
            assert self.closed is None, "nothing may follow a Close"
            if opcode is Opcode.BINARY:
                self.data += bytes(payload)
            elif opcode is Opcode.PING:
                self.pings += 1
            elif opcode is Opcode.CLOSE:
                self.closed = parse_close(bytes(payload))
        arrived.clear()

    def send(self, *frames: bytes) -> None:
        """From the server."""
        self.server.send(b"".join(frames))
        self.settle()

    def sweep(self, seconds: float = 1.0) -> None:
        self.reactor.advance(seconds)
        self.connection.sweep(self.reactor.now)
        self.settle()

    @property
    def at_application(self) -> bytes:
        return bytes(self.application.incoming.arrived)

    @property
    def application_sees(self) -> str:
        if self.application.reset_by_peer:
            return "reset"
        return "eof" if self.application.incoming.end_arrived else "open"

    @property
    def over(self) -> bool:
        assert self.ended in ([], [self.connection])
        if self.ended:
            assert not self.reactor.handlers
            assert self.principal.budget.held == 0
        return bool(self.ended)


@pytest.fixture
def joined() -> Joined:
    return Joined()


def data(payload: bytes) -> bytes:
    return encode_frame(Opcode.BINARY, payload)


class TestConnection:
    def test_bytes_both_ways(self, joined: Joined) -> None:
        up = os.urandom(300_000)
        joined.application.send(up)
        joined.settle()
        assert joined.data == up
        joined.send(data(b"one "), encode_frame(Opcode.TEXT, b"two"))
        assert joined.at_application == b"one two"

    def test_the_applications_eof(self, joined: Joined) -> None:
        joined.application.send(b"last words")
        joined.application.shutdown(socket.SHUT_WR)
        joined.settle()
        assert joined.data == b"last words"
        assert joined.closed == (1000, "the application has closed the connection")
        assert joined.application_sees == "open"
        joined.send(data(b"still under way"), encode_close(1000))
        assert joined.at_application == b"still under way"
        assert joined.application_sees == "eof"
        joined.server.close()
        joined.settle()
        assert joined.over
        assert joined.connection.outcome == ("finished", "closed by the application")

    @pytest.mark.parametrize("how", ["fin", "rst", "close 1011", "nothing"])
    def test_after_the_applications_eof_any_answer_is_an_end(self, joined: Joined, how: str) -> None:
        joined.application.shutdown(socket.SHUT_WR)
        joined.settle()
        if how == "fin":
            joined.server.close()
        elif how == "rst":
            joined.connection.client.hung_up()
        elif how == "close 1011":
            joined.send(encode_close(1011))
        joined.settle()
        for _ in range(4):
            joined.sweep()
        assert joined.application_sees == "eof"
        assert joined.over

    def test_the_closing_handshake_takes_as_long_as_data_comes(self, joined: Joined) -> None:
        joined.application.shutdown(socket.SHUT_WR)
        joined.settle()
        for number in range(10):
            joined.send(data(b"%d" % number))
            joined.sweep()
        assert joined.at_application == b"0123456789"
        joined.sweep()
        joined.sweep()
        assert joined.application_sees == "eof"

    @pytest.mark.parametrize("frame", [encode_close(1000, "done"), encode_close(None)])
    def test_the_server_closes(self, joined: Joined, frame: bytes) -> None:
        joined.send(data(b"all of it"), frame)
        assert joined.at_application == b"all of it"
        assert joined.application_sees == "eof"
        assert joined.closed is not None
        joined.server.close()
        joined.application.close()
        joined.settle()
        assert joined.over

    @pytest.mark.parametrize("code", [1001, 1011, 4000])
    def test_the_server_closes_for_another_reason(self, joined: Joined, code: int) -> None:
        joined.send(data(b"not all"), encode_close(code, "why"))
        assert (joined.at_application, joined.application_sees) == (b"not all", "open")
        assert joined.closed == (code, ""), "answered all the same"
        assert joined.connection.outcome == ("reset", f"closed by the server: {code} why")
        joined.server.close()
        joined.sweep(limits.LINGER_SECONDS)
        assert joined.application_sees == "reset"
        assert joined.over

    def test_the_servers_connection_ends_without_a_close(self, joined: Joined) -> None:
        joined.server.close()
        joined.settle()
        joined.sweep(limits.LINGER_SECONDS)
        assert joined.application_sees == "reset"
        assert joined.connection.outcome == ("lost", "connection closed without a close frame")
        assert joined.over

    def test_the_server_masks(self, joined: Joined) -> None:
        joined.send(encode_frame(Opcode.BINARY, b"x", key=b"1234"))
        assert joined.application_sees == "reset"
        assert joined.closed == (1002, "frame from a server is masked")

    def test_the_applications_reset(self, joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
        def reset(*_: object) -> int:
            raise ConnectionResetError(104, "Connection reset by peer")

        monkeypatch.setattr(joined.far, "recv_into", reset)
        joined.application.send(b"x")
        joined.settle()
        assert joined.closed == (1011, "the application's connection broke")

    def test_a_silent_server_is_asked_and_given_up(self, joined: Joined) -> None:
        while joined.application_sees == "open":
            joined.sweep()
            assert joined.reactor.now < 60
        assert joined.pings == 1
        assert joined.reactor.now >= limits.CLIENT_PING_AFTER_SECONDS + limits.PONG_WITHIN_SECONDS - 1
        assert joined.connection.outcome == ("lost", "the server answers no ping")

    def test_stopping_waits_for_nobody(self, joined: Joined) -> None:
        joined.connection.close(1011, "the client is stopping")
        joined.settle()
        assert joined.closed == (1011, "the client is stopping")
        assert joined.application_sees == "reset"
        joined.send(data(b"x"))
        joined.sweep()
        assert joined.over


def url(port: int, path: str = "/echo") -> LoginUrl:
    return LoginUrl("ws", "127.0.0.1", port, path)


class TestForwards:
    async def test_without_a_tunnel(self, tmp_path: Path, lines: LogLines) -> None:
        """A client with nothing else has no token and no links."""
        async with targets() as made:
            endpoint = parse_endpoint(f"/echo=127.0.0.1:{await made.echo()}")
            async with (
                serving(tmp_path, endpoints=(endpoint,), endpoint_auth="none") as server,
                connecting(url(server.port), "0:ws-raw") as client,
            ):
                up = os.urandom(3_000_000)
                async with await application(client.ports[0]) as stream:
                    with trio.fail_after(SECONDS):
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(stream.send_all, up)
                            back = b""
                            while len(back) < len(up):
                                back += await stream.receive_some()
                        assert back == up
                        await stream.send_eof()
                        assert await stream.receive_some() == b""
                assert not client.session.links
                assert server.links() == 0
                await until(lambda: lines("raw connection ended", "raw"))
        ended = lines("raw connection ended", "raw")[0]
        assert ended["server"] == f"127.0.0.1:{server.port}/echo"
        assert (ended["reason"], ended["sent"], ended["received"]) == ("finished", len(up), len(up))
        assert "principal" not in ended

    async def test_beside_the_tunnel_with_its_token_over_tls(self, tmp_path: Path) -> None:
        async with targets() as made:
            port = await made.echo()
            async with serving(
                tmp_path, plain=False, endpoints=(parse_endpoint(f"/=127.0.0.1:{port}"),), path="/t"
            ) as server:
                tunnel = LoginUrl("wss", "127.0.0.1", server.port, "/t", server.url.token, server.url.pins)
                async with connecting(tunnel, f"0:127.0.0.1:{port}") as client:
                    assert await exchange(client.ports[0]) == b"ping"
                endpoint = LoginUrl("wss", "127.0.0.1", server.port, "/", server.url.token, server.url.pins)
                async with connecting(endpoint, "0:ws-raw") as client, await application(client.ports[0]) as stream:
                    with trio.fail_after(SECONDS):
                        await stream.send_all(b"ping")
                        assert await stream.receive_some() == b"ping"

    @pytest.mark.parametrize(
        ("path", "said"),
        [("/none", "no plain endpoint at path '/none'"), ("/wants", "wants another token"), ("/refusing", "502")],
    )
    async def test_refusals_reset_the_connection(self, tmp_path: Path, lines: LogLines, path: str, said: str) -> None:
        none = path != "/wants"
        endpoint = parse_endpoint(f"{'/refusing' if none else path}=127.0.0.1:{free_port()}")
        async with (
            serving(tmp_path, endpoints=(endpoint,), endpoint_auth="none" if none else "token") as server,
            connecting(url(server.port, path), "0:ws-raw") as client,
        ):
            for _ in range(2):  # the client lives on
                with pytest.raises(trio.BrokenResourceError):
                    await exchange(client.ports[0])
        said_lines = lines("connection reset: the endpoint was not reached", "raw")
        assert len(said_lines) == 2
        assert said in said_lines[0]["reason"]

    async def test_the_server_is_away(self, lines: LogLines) -> None:
        async with connecting(url(free_port()), "0:ws-raw") as client:
            with pytest.raises(trio.BrokenResourceError):
                await exchange(client.ports[0])
        assert "refused" in lines("connection reset: the endpoint was not reached", "raw")[0]["reason"]

    async def test_the_server_stops(self, tmp_path: Path) -> None:
        async with targets() as made:
            endpoint = parse_endpoint(f"/echo=127.0.0.1:{await made.echo()}")
            async with (
                serving(tmp_path, endpoints=(endpoint,), endpoint_auth="none") as server,
                connecting(url(server.port), "0:ws-raw") as client,
                await application(client.ports[0]) as stream,
            ):
                with trio.fail_after(SECONDS):
                    await stream.send_all(b"ping")
                    assert await stream.receive_some() == b"ping"
                    server.shutdown.set()
                    with pytest.raises(trio.BrokenResourceError):
                        await stream.receive_some()

    async def test_the_client_stops_while_it_dials_and_while_it_carries(self, tmp_path: Path) -> None:
        async with targets() as made:
            endpoint = parse_endpoint(f"/echo=127.0.0.1:{await made.echo()}")
            with socket.create_server(("127.0.0.1", 0)) as silent:
                async with (
                    serving(tmp_path, endpoints=(endpoint,), endpoint_auth="none") as server,
                    connecting(url(server.port), "0:ws-raw") as client,
                    connecting(url(silent.getsockname()[1]), "0:ws-raw") as waiting,
                    await application(client.ports[0]) as stream,
                    await application(waiting.ports[0]) as other,
                ):
                    with trio.fail_after(SECONDS):
                        await stream.send_all(b"ping")
                        assert await stream.receive_some() == b"ping"
                        dialled, _ = await trio.to_thread.run_sync(silent.accept)
                        with dialled:  # which says nothing
                            client.shutdown.set()
                            waiting.shutdown.set()
                            for each in (stream, other):
                                with pytest.raises(trio.BrokenResourceError):
                                    await each.receive_some()

    async def test_a_url_without_a_token_where_one_is_needed(self) -> None:
        with pytest.RaisesGroup(UsageError, flatten_subgroups=True, allow_unwrapped=True):
            async with connecting(url(free_port()), "0:ws-raw", "0:127.0.0.1:80"):
                pass


class Failing:
    """A dialler."""

    url = url(1)

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def dial(self) -> tuple[socket.socket, bytes]:
        await trio.lowlevel.checkpoint()
        raise self._error

    def failed(self, error: NetworkError) -> None:
        raise AssertionError


class TestAccepted:
    def made(self, nursery: trio.Nursery, error: Exception) -> RawForwards:
        principal = Principal("local", Budget(limits.PROCESS_BYTES), {})
        return RawForwards(MemoryReactor(), nursery, Failing(error), principal)  # type: ignore[arg-type]  # in memory

    @pytest.mark.parametrize("error", [NetworkError("tcp", "away"), ServerRefusedError("no"), LocalError("full")])
    async def test_a_dial_that_fails_closes_the_socket(self, error: Exception) -> None:
        near, far = socket.socketpair()
        with far:
            if isinstance(error, LocalError):
                with pytest.RaisesGroup(LocalError):
                    async with trio.open_nursery() as nursery:
                        self.made(nursery, error).accepted(near)
            else:
                async with trio.open_nursery() as nursery:
                    self.made(nursery, error).accepted(near)
            assert near.fileno() == -1

    async def test_too_many(self, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, lines: LogLines) -> None:
        monkeypatch.setattr(limits, "PRINCIPAL_STREAMS", 0)
        near, far = socket.socketpair()
        with far:
            self.made(nursery, NetworkError("tcp", "away")).accepted(near)
            assert near.fileno() == -1
        assert lines("connection reset: too many connections or too much memory held", "raw")

    async def test_after_stop(self, nursery: trio.Nursery) -> None:
        raw = self.made(nursery, NetworkError("tcp", "away"))
        raw.stop()
        assert raw.gone.is_set()
        near, far = socket.socketpair()
        with far:
            raw.accepted(near)
            assert near.fileno() == -1

    async def test_stop_ends_a_dial(self, nursery: trio.Nursery) -> None:
        class Silent(Failing):
            async def dial(self) -> tuple[socket.socket, bytes]:
                await trio.sleep_forever()
                raise AssertionError

        principal = Principal("local", Budget(limits.PROCESS_BYTES), {})
        raw = RawForwards(MemoryReactor(), nursery, Silent(LocalError("")), principal)  # type: ignore[arg-type]
        near, far = socket.socketpair()
        with far:
            raw.accepted(near)
            await trio.testing.wait_all_tasks_blocked()
            assert not raw.gone.is_set()
            raw.stop()
            with trio.fail_after(SECONDS):
                await raw.gone.wait()
            assert near.fileno() == -1

    async def test_stopping_is_no_end_of_what_the_application_says(self, nursery: trio.Nursery, joined: Joined) -> None:
        """A 1001 would be one to the endpoint."""
        raw = self.made(nursery, NetworkError("tcp", "away"))
        raw.connections[joined.connection] = None
        raw.stop()
        joined.settle()
        assert joined.closed == (1011, "the client is stopping")
        assert joined.application_sees == "reset"

    async def test_connections_are_swept_and_told_of_sleep(self, nursery: trio.Nursery, joined: Joined) -> None:
        raw = self.made(nursery, NetworkError("tcp", "away"))
        raw.connections[joined.connection] = None
        raw.woke(joined.reactor.now)
        for _ in range(int(limits.PONG_WITHIN_SECONDS) + 3):
            joined.reactor.advance(1.0)
            raw.sweep(joined.reactor.now)
            joined.settle()
        assert joined.pings == 1, "asked at once, not after silence"
        assert joined.application_sees == "reset"


async def test_the_request(nursery: trio.Nursery, lines: LogLines) -> None:
    """`binary` is offered; a token goes along only if there is one, else what other programs want instead."""
    heads: list[str] = []

    async def answer(stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some()
        heads.append(head.decode())
        await stream.send_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    async with targets() as made:
        port = await made.listen(answer)
        basic = ("Authorization", "Basic YW5uOmh1bnRlcjIy")
        for token, query, headers in ((None, "token=hunter22", (basic,)), (Token.new(), "", ())):
            where = LoginUrl("ws", "127.0.0.1", port, "/x", token, query=query)
            async with connecting(where, "0:ws-raw", headers=headers) as client:
                with pytest.raises(trio.BrokenResourceError):
                    await exchange(client.ports[0])
            assert heads[-1].startswith(f"GET /x{query and '?'}{query} HTTP/1.1\r\n")
            assert "Sec-WebSocket-Protocol: binary\r\n" in heads[-1]
            (sent,) = [line for line in heads[-1].splitlines() if line.startswith("Authorization")]
            assert sent == f"Authorization: {basic[1] if token is None else f'Bearer {token.reveal()}'}"
            assert token is None or not any(token.reveal() in line for line in lines.all())
    assert "'/x'" in lines("connection reset: the endpoint was not reached", "raw")[0]["reason"]
    assert not any("hunter22" in line or basic[1] in line for line in lines.all())
