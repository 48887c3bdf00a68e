"""plain_server.py: who gets to an endpoint's target, and what the rest is told. The whole server, over loopback."""

from __future__ import annotations

import base64
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.roles import LogLines, RunningServer, free_port, lines, serving, targets, until
from wstunnel import limits
from wstunnel import plain_server as module
from wstunnel.errors import LocalError, StreamError
from wstunnel.plain_endpoints import parse_endpoint
from wstunnel.plain_server import ANYONE
from wstunnel.policy import parse_rule
from wstunnel.wire.frames import FrameDecoder, Opcode, encode_frame, parse_close

__all__ = ["lines"]

MASK = b"abcd"
REQUEST = (
    "GET {path} HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n{fields}\r\n"
)


class Visitor:
    """A client that is free to ask for anything."""

    def __init__(self, stream: trio.SocketStream, head: str, rest: bytes) -> None:
        self.stream = stream
        self.status = int(head.split()[1])
        self.head = head
        self.body = rest
        self._decoder = FrameDecoder(masked=False)

    async def send(self, payload: bytes) -> None:
        await self.stream.send_all(encode_frame(Opcode.BINARY, payload, key=MASK))

    async def receive(self) -> tuple[Opcode, bytes]:
        """The next frame."""
        with trio.fail_after(10):
            while True:
                received, self.body = self.body, b""
                for opcode, payload, _ in self._decoder.feed(received):
                    return opcode, bytes(payload)
                self.body = await self.stream.receive_some(65536)
                assert self.body, "the connection ended"


@asynccontextmanager
async def visit(server: RunningServer, path: str, *fields: str, extra: bytes = b"") -> AsyncIterator[Visitor]:
    """Ask for an upgrade; `extra` goes behind the head."""
    key = base64.b64encode(bytes(16)).decode()
    asked = REQUEST.format(path=path, key=key, fields="".join(f"{field}\r\n" for field in fields))
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        with trio.fail_after(15):
            await stream.send_all(asked.encode() + extra)
            received = b""
            while b"\r\n\r\n" not in received:
                more = await stream.receive_some(65536)
                assert more, received
                received += more
        head, _, rest = received.partition(b"\r\n\r\n")
        yield Visitor(stream, head.decode(), rest)


def bearer(server: RunningServer) -> str:
    return f"Authorization: Bearer {server.token}"


def ends(*specs: str) -> dict[str, Any]:
    return {"endpoints": tuple(parse_endpoint(spec) for spec in specs)}


async def test_from_the_upgrade_to_the_targets_end(tmp_path: Path, lines: LogLines) -> None:
    async with targets() as there:
        port = await there.echo()
        async with serving(tmp_path, **ends(f"/e=127.0.0.1:{port}")) as server:
            protocols = f"Sec-WebSocket-Protocol: binary, bearer.{server.token}"
            early = encode_frame(Opcode.BINARY, b"early", key=MASK)
            async with visit(server, "/e?q=1", protocols, extra=early) as visitor:
                assert visitor.status == 101
                assert "Sec-WebSocket-Protocol: binary\r\n" in visitor.head + "\r\n"
                assert await visitor.receive() == (Opcode.BINARY, b"early")
                (principal,) = server.server._principals.values()
                assert (principal.name, principal.links, principal.streams) == ("alice", 1, 1)
                await visitor.stream.send_all(encode_frame(Opcode.CLOSE, b"\x03\xe8", key=MASK))
                opcode, payload = await visitor.receive()
                assert (opcode, parse_close(payload)) == (Opcode.CLOSE, (1000, ""))
            await until(lambda: not server.server.plain.connections)
            assert (principal.links, principal.streams) == (0, 0)
            assert not any(server.token in line for line in lines.all())
    assert lines("endpoint ended")[0]["reason"] == "finished"


async def test_unix_targets(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    async with serving(tmp_path / "state", **ends(f"/u=unix:{path}", f"/gone=unix:{tmp_path}/gone")) as server:
        async with visit(server, "/u", bearer(server)) as visitor:
            assert visitor.status == 101
            target, _ = await listener.accept()
            await visitor.send(b"over a file")
            assert await target.recv(100) == b"over a file"
            target.close()
            opcode, payload = await visitor.receive()
            assert (opcode, parse_close(payload)[0]) == (Opcode.CLOSE, 1000)
        async with visit(server, "/gone", bearer(server)) as visitor:
            assert visitor.status == 502
    listener.close()


async def test_who_is_refused_reaches_nothing(tmp_path: Path, lines: LogLines) -> None:
    async with targets() as there:
        port = await there.echo()
        origins = ("https://app.example", "http://localhost:3000")
        async with serving(tmp_path, **ends(f"/e=127.0.0.1:{port}"), allow_origins=origins) as server:
            valid = bearer(server)
            for path, fields, status in (
                ("/e", [], 401),
                ("/e", ["Authorization: Basic YTpi"], 401),
                ("/e", ["Authorization: Bearer " + "x" * 43], 401),
                ("/e", ["Sec-WebSocket-Protocol: binary, bearer." + "x" * 43], 401),
                ("/e", ["Sec-WebSocket-Protocol: bearer."], 401),
                ("/e", [valid, f"Sec-WebSocket-Protocol: bearer.{server.token}"], 400),
                ("/e", [valid, "Origin: https://evil.example"], 403),
                ("/e", [valid, "Origin: http://app.example"], 403),
                ("/e", [valid, "Origin: https://app.example:8443"], 403),
                ("/e", [valid, "Origin: null"], 403),
                ("/e/", [valid], 404),
                ("/E", [valid], 404),
            ):
                async with visit(server, path, *fields) as visitor:
                    assert visitor.status == status, (path, fields)
                    assert "Sec-WebSocket-Accept" not in visitor.head
            assert there.accepted == 0
            async with visit(server, "/e", valid, "Origin: HTTPS://App.Example:443/") as visitor:
                assert visitor.status == 101
            # The tunnel's own path is for no page, and an endpoint is no tunnel.
            async with visit(server, "/", valid, f"Origin: {origins[0]}", "Sec-WebSocket-Protocol: wstunnel.1") as one:
                assert one.status == 403
        assert not any(server.token in line for line in lines.all())


async def test_without_authentication(tmp_path: Path) -> None:
    async with targets() as there:
        port = await there.echo()
        async with serving(tmp_path, **ends(f"/e=127.0.0.1:{port}"), endpoint_auth="none") as server:
            async with visit(server, "/e", "Authorization: Bearer not a token") as visitor:
                assert visitor.status == 101
                assert list(server.server._principals) == [ANYONE]
            # Of the tunnel itself nothing is given away by it.
            async with visit(server, "/", "Sec-WebSocket-Protocol: wstunnel.1") as visitor:
                assert visitor.status == 401


async def test_the_policy_of_clients_does_not_apply(tmp_path: Path) -> None:
    async with targets() as there:
        port = await there.echo()
        rules = (parse_rule("db:5432"),)
        async with (
            serving(tmp_path, **ends(f"/e=localhost:{port}", f"/f=127.0.0.1:{port}"), allow=rules) as server,
            visit(server, "/e", bearer(server)) as by_name,
            visit(server, "/f", bearer(server)) as by_address,
        ):
            assert (by_name.status, by_address.status) == (101, 101)


@pytest.mark.parametrize(
    "case",
    [
        ("refused", 502, "the endpoint's target refused the connection"),
        ("name-not-found", 502, "the endpoint's target cannot be reached"),
        ("unreachable", 502, "the endpoint's target cannot be reached"),
        ("timeout", 504, "the endpoint's target did not answer in time"),
        ("limit", 503, "the server is out of resources, try again later"),
    ],
)
async def test_targets_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: LogLines, case: tuple[str, int, str]
) -> None:
    code, status, said = case

    async def dial(*_: object, **__: object) -> Any:
        raise StreamError(code, "cannot connect to tcp:10.0.0.5:1: for a reason")

    monkeypatch.setattr(module, "dial_target", dial)
    async with serving(tmp_path, **ends("/e=10.0.0.5:1")) as server:
        async with visit(server, "/e", bearer(server)) as visitor:
            assert visitor.status == status
            assert visitor.body.decode() == f"{said}\n", "the client need not know the address"
        (line,) = lines("endpoint's target not reached")
        assert line["reason"] == "cannot connect to tcp:10.0.0.5:1: for a reason"
        (principal,) = server.server._principals.values()
        assert (principal.links, principal.streams) == (0, 0)


async def test_a_refused_target(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, **ends(f"/e=127.0.0.1:{free_port()}")) as server,
        visit(server, "/e", bearer(server)) as visitor,
    ):
        assert visitor.status == 502


async def test_a_dial_has_its_own_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """The handshake's ten seconds are for the client's part: a slow target is 504 and not 408."""
    autojump_clock.autojump_threshold = 0.05  # real sockets need the time

    async def dial(*_: object, **__: object) -> Any:
        await trio.sleep(limits.DIAL_SECONDS + 5)
        raise StreamError("timeout", "no answer")

    monkeypatch.setattr(module, "dial_target", dial)
    async with serving(tmp_path, **ends("/e=10.0.0.5:1")) as server:
        stream = await ask(server, "/e")
        assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 504 ")
        await stream.aclose()


async def test_a_client_that_goes_while_its_target_is_dialled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dialling, go_on = trio.Event(), trio.Event()
    near, far = socket.socketpair()
    near.setblocking(False)

    async def dial(*_: object, **__: object) -> Any:
        dialling.set()
        await go_on.wait()
        return near, "there"

    monkeypatch.setattr(module, "dial_target", dial)
    async with serving(tmp_path, **ends("/e=10.0.0.5:1")) as server:
        stream = await ask(server, "/e")
        await dialling.wait()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()
        await trio.sleep(0.05)
        go_on.set()
        await until(lambda: near.fileno() < 0)
        (principal,) = server.server._principals.values()
        await until(lambda: (principal.links, principal.streams) == (0, 0))
    far.close()


async def ask(server: RunningServer, path: str) -> trio.SocketStream:
    """A request with a token, whose answer is not awaited."""
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    key = base64.b64encode(bytes(16)).decode()
    await stream.send_all(REQUEST.format(path=path, key=key, fields=f"{bearer(server)}\r\n").encode())
    return stream


class Dials:
    """Stands in place of `dial_target`: each waits to be told how it ends."""

    def __init__(self) -> None:
        self.begun = 0
        self.go_on = trio.Event()
        self.cancelled = 0

    async def __call__(self, *_: object, **__: object) -> Any:
        self.begun += 1
        try:
            await self.go_on.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        raise StreamError("refused", "connection refused")


async def test_strangers_do_not_cut_the_dials_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's dial is no handshake any more; its refusal, which lingers, is one again."""
    monkeypatch.setattr(limits, "HANDSHAKES", 2)
    dials = Dials()
    monkeypatch.setattr(module, "dial_target", dials)
    async with serving(tmp_path, **ends("/e=10.0.0.5:1")) as server:
        users = [await ask(server, "/e") for _ in range(4)]
        await until(lambda: dials.begun == 4)
        strangers = [await trio.open_tcp_stream("127.0.0.1", server.port) for _ in range(4)]
        for stranger in strangers[:2]:
            with trio.fail_after(20):
                assert await stranger.receive_some(1) == b"", "the oldest strangers go"
        assert dials.cancelled == 0
        assert len(server.server._handshakes) == 2
        dials.go_on.set()
        answers = []
        for user in users:
            with trio.fail_after(20):
                answers.append(await user.receive_some(1000))
        assert all(answer.startswith(b"HTTP/1.1 502 ") for answer in answers)
        for stranger in strangers[2:]:
            with trio.fail_after(20):
                assert await stranger.receive_some(1) == b"", "refusals that linger take their places"
        assert len(server.server._handshakes) <= 2
        for stream in (*users, *strangers):
            await stream.aclose()
        await until(lambda: not server.server._handshakes)


async def test_shutdown_while_dialling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dials = Dials()
    monkeypatch.setattr(module, "dial_target", dials)
    async with serving(tmp_path, **ends("/e=10.0.0.5:1")) as server:
        user = await ask(server, "/e")
        await until(lambda: dials.begun == 1)
        server.server.stop()
        await until(lambda: dials.cancelled == 1)
        with trio.fail_after(20):
            assert (await user.receive_some(1000)).startswith(b"HTTP/1.1 503 ")
        (principal,) = server.server._principals.values()
        assert (principal.links, principal.streams) == (0, 0)
        await user.aclose()


async def test_limits_of_a_principal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PRINCIPAL_LINKS", 2)
    async with targets() as there:
        port = await there.echo()
        async with serving(tmp_path, **ends(f"/e=127.0.0.1:{port}")) as server:
            async with visit(server, "/e", bearer(server)) as one, visit(server, "/e", bearer(server)) as two:
                assert (one.status, two.status) == (101, 101)
                async with visit(server, "/e", bearer(server)) as three:
                    assert three.status == 503
                async with visit(server, "/", bearer(server), "Sec-WebSocket-Protocol: wstunnel.1") as link:
                    assert link.status == 503, "an endpoint's connection counts as a link"
            await until(lambda: not server.server.plain.connections)
            monkeypatch.setattr(limits, "PRINCIPAL_STREAMS", 0)
            async with visit(server, "/e", bearer(server)) as visitor:
                assert visitor.status == 503
            monkeypatch.setattr(limits, "PRINCIPAL_STREAMS", 10)
            (principal,) = server.server._principals.values()
            principal.waiting = principal.listening = 5
            async with visit(server, "/e", bearer(server)) as visitor:
                assert visitor.status == 503
            principal.waiting = principal.listening = 0
            principal.budget.charge(limits.PRINCIPAL_BYTES)
            async with visit(server, "/e", bearer(server)) as visitor:
                assert visitor.status == 503


async def test_users_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, **ends("/e=10.0.0.5:1")) as server:

        def fail(_token: str) -> str:
            raise LocalError("not readable")

        monkeypatch.setattr(server.server.users, "authenticate", fail)
        async with visit(server, "/e", bearer(server)) as visitor:
            assert visitor.status == 503


async def test_shutdown(tmp_path: Path) -> None:
    async with targets() as there:
        port = await there.echo()
        async with serving(tmp_path, **ends(f"/e=127.0.0.1:{port}")) as server:
            async with visit(server, "/e", bearer(server)) as visitor:
                server.shutdown.set()
                opcode, payload = await visitor.receive()
                assert (opcode, parse_close(payload)) == (Opcode.CLOSE, (1001, "the server is stopping"))
                assert not server.server.gone.is_set()
                await visitor.stream.send_all(encode_frame(Opcode.CLOSE, payload, key=MASK))
            with trio.fail_after(20):
                await server.server.gone.wait()
        await until(lambda: there.resets == 1)


async def test_the_sweep_and_sleep_reach_the_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05
    suspended = 0.0
    monkeypatch.setattr("wstunnel.server.boottime", lambda: trio.current_time() + suspended)
    async with targets() as there:
        port = await there.echo()
        async with (
            serving(tmp_path, **ends(f"/e=127.0.0.1:{port}")) as server,
            visit(server, "/e", bearer(server)) as one,
        ):
            await trio.sleep(5)
            suspended = 600.0
            await trio.sleep(2)
            with trio.fail_after(1):  # not only after the 15 seconds of silence
                assert await one.receive() == (Opcode.PING, b""), "after a sleep it is asked at once"
            await trio.sleep(limits.PONG_WITHIN_SECONDS + 3)
            await until(lambda: not server.server.plain.connections)


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"bind": ("0.0.0.0",), "endpoint_auth": "none"}, True),
        ({"bind": ("127.0.0.1",), "endpoint_auth": "none"}, False),
        ({"bind": ("0.0.0.0",)}, False),
        ({"bind": ("0.0.0.0",), "endpoint_auth": "none", "endpoints": ()}, False),
    ],
)
async def test_a_warning_where_anyone_may_come_in(
    tmp_path: Path, lines: LogLines, changes: dict[str, Any], warned: bool
) -> None:
    async with serving(tmp_path, **{**ends("/e=10.0.0.5:1"), **changes}):
        pass
    assert any("--endpoint-auth none on an address that others reach" in line for line in lines.all()) is warned
