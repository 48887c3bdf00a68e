"""front.py, and the server behind it: PROXY headers, X-Forwarded-For and Forwarded, Unix sockets."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.roles import LogLines, descriptors, invite, lines, serving, tcp_pair, until  # lines is a fixture
from tests.test_server import Stranger, hello, text, upgrade
from wstunnel import limits, tls
from wstunnel import server as server_module
from wstunnel.config import ServerConfig
from wstunnel.endpoints import unix
from wstunnel.errors import LocalError, ProtocolError, UsageError
from wstunnel.front import Front, Peer, Source, parse_source
from wstunnel.policy import parse_rule
from wstunnel.server import Server
from wstunnel.state import Announcement, read_announcement
from wstunnel.targets import parse_target
from wstunnel.transport import SKIM_BYTES, Transport
from wstunnel.wire.http1 import Request
from wstunnel.wire.messages import Welcome
from wstunnel.wire.proxy_protocol import encode as proxy_header

__all__ = ["lines"]

CLIENT, PROXY, OTHER = "203.0.113.7", "10.0.0.5", "10.0.0.6"
SOURCE, DESTINATION = (CLIENT, 51234), ("198.51.100.1", 443)


def sources(*texts: str) -> list[Source]:
    return [parse_source(text) for text in texts]


class TestParseSource:
    @pytest.mark.parametrize(
        ("text", "source"),
        [
            ("127.0.0.1", "127.0.0.1/32"), ("10.0.0.0/8", "10.0.0.0/8"), ("::1", "::1/128"), ("[::1]", "::1/128"),
            ("[fd00::/8]", "fd00::/8"), ("0.0.0.0/0", "0.0.0.0/0"), ("unix", "None"), ("unix:", "None"),
            ("::ffff:10.0.0.5", "10.0.0.5/32"), ("::ffff:10.0.0.0/104", "10.0.0.0/8"), ("::/0", "::/0"),
        ],
    )  # fmt: skip
    def test_what_it_is(self, text: str, source: str) -> None:
        assert str(parse_source(text)) == source

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("10.0.0.1/8", r"bits are set beyond the prefix; meant is 10\.0\.0\.0/8\?"),
            ("proxy.example.org", "neither an IP address nor a network"),
            ("", "neither"), ("*", "neither"), ("10.0.0.0/33", "neither"), ("127.0.0.1:80", "neither"),
            ("unix:/run/x", "neither"), ("[::1", "neither"),
        ],
    )  # fmt: skip
    def test_what_it_is_not(self, text: str, words: str) -> None:
        with pytest.raises(UsageError, match=words) as caught:
            parse_source(text)
        assert caught.value.grammar == "an IP address, a network such as 10.0.0.0/8, or unix"


def request(**fields: str | Sequence[str]) -> Request:
    headers = [
        (name.replace("_", "-"), value)
        for name, values in fields.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    return Request("GET", "/", tuple(headers))


class TestBelieve:
    """The nearest hop that is not a trusted proxy itself."""

    def believed(self, trusted: Sequence[str], own: str | None, **fields: str | Sequence[str]) -> str:
        peer = Peer(own, "own:1")
        Front(trusted=sources(*trusted)).believe(peer, request(**fields))
        return peer.name

    @pytest.mark.parametrize(
        ("fields", "name"),
        [
            ({"x_forwarded_for": CLIENT}, CLIENT),
            ({"x_forwarded_for": f"{CLIENT}:5000"}, f"{CLIENT}:5000"),
            ({"x_forwarded_for": "2001:db8::7"}, "2001:db8::7"),
            ({"x_forwarded_for": "[2001:db8::7]:5000"}, "[2001:db8::7]:5000"),
            ({"x_forwarded_for": f"::ffff:{CLIENT}"}, CLIENT),
            # Whatever the client wrote stands to the left of its own address.
            ({"x_forwarded_for": f"127.0.0.1, 8.8.8.8, {CLIENT}"}, CLIENT),
            ({"x_forwarded_for": ["8.8.8.8", CLIENT]}, CLIENT),
            ({"x_forwarded_for": f"8.8.8.8, {CLIENT}, {OTHER}"}, CLIENT),
            ({"x_forwarded_for": f"unknown, {CLIENT}"}, CLIENT),
            # All are proxies: the one farthest away is whom we know.
            ({"x_forwarded_for": f"10.9.9.9, {OTHER}"}, "10.9.9.9"),
            ({"forwarded": f"for={CLIENT}"}, CLIENT),
            ({"forwarded": f'for=8.8.8.8, for="{CLIENT}:5000";proto=https, for={OTHER}'}, f"{CLIENT}:5000"),
        ],
    )  # fmt: skip
    def test_a_trusted_proxy(self, fields: dict[str, str], name: str) -> None:
        assert self.believed(["10.0.0.0/8"], PROXY, **fields) == name

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({}, None),
            ({"x_forwarded_for": ""}, None),
            ({"x_forwarded_for": CLIENT, "forwarded": f"for={CLIENT}"}, "both X-Forwarded-For and Forwarded came"),
            ({"x_forwarded_for": "example.org"}, "neither an address nor unknown"),
            ({"x_forwarded_for": f"{CLIENT}, x"}, "neither an address nor unknown"),
            # Malformed by the client alone: that it could make us doubt the proxy is no harm.
            ({"x_forwarded_for": f"x, {CLIENT}"}, "neither an address nor unknown"),
            ({"x_forwarded_for": f"{CLIENT}, unknown"}, "its client is unknown"),
            ({"forwarded": f"for={CLIENT}, for=_hidden"}, "its client is unknown"),
            ({"forwarded": f"for={CLIENT}, proto=https"}, "its client is unknown"),
            ({"forwarded": CLIENT}, "no list of `name=value` parts"),
        ],
    )  # fmt: skip
    def test_nothing_to_rely_upon(self, fields: dict[str, str], reason: str | None, lines: LogLines) -> None:
        assert self.believed(["10.0.0.0/8"], PROXY, **fields) == "own:1"
        said = lines("the proxy's word is not taken")
        assert [line["peer"] for line in said] == ([] if reason is None else ["own:1"])
        assert all(reason is not None and reason in line["reason"] for line in said)

    @pytest.mark.parametrize(
        ("trusted", "own", "believed"),
        [
            ([], PROXY, False), (["10.0.0.6"], PROXY, False), (["unix"], PROXY, False), (["::/0"], PROXY, False),
            (["0.0.0.0/0"], "", False), (["unix", "0.0.0.0/0"], None, False), (["0.0.0.0/0"], "::1", False),
            (["10.0.0.5"], PROXY, True), (["10.0.0.5"], f"::ffff:{PROXY}", True), (["unix"], "", True),
            (["192.0.2.0/24", "10.0.0.4/31"], PROXY, True), (["fe80::/10"], "fe80::1%eth0", True),
        ],
    )  # fmt: skip
    def test_who_is_trusted(self, trusted: list[str], own: str | None, believed: bool) -> None:
        assert self.believed(trusted, own, x_forwarded_for=CLIENT) == (CLIENT if believed else "own:1")


class TestPeer:
    def test_of_a_socket(self) -> None:
        one, two = tcp_pair()
        assert Peer.of(one, "x") == Peer("127.0.0.1", "x")
        two.close()
        one.close()
        assert Peer.of(one, "") == Peer(None, "")
        one, two = socket.socketpair()
        assert Peer.of(one, "unix:uid=0,pid=1") == Peer("", "unix:uid=0,pid=1")
        one.close()
        two.close()


class TestGreet:
    """The header goes to the front, every byte behind it stays in the socket."""

    async def greet(self, *pieces: bytes, listed: str = "127.0.0.1", rest: bytes = b"") -> tuple[bool, Peer]:
        near, far = tcp_pair()
        transport = Transport(far)
        peer = Peer.of(far, "127.0.0.1:1")
        outcome: list[bool] = []

        async def run() -> None:
            outcome.append(await Front(sources(listed)).greet(transport, peer))

        try:
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(run)
                    for piece in pieces:
                        near.send(piece)
                        await wait_all_tasks_blocked(0.002)
                    near.shutdown(socket.SHUT_WR)
                received = b""
                while data := await transport.receive(65536):
                    received += data
            assert received == rest
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            transport.close()
            near.close()
        return outcome[0], peer

    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("rest", [b"", b"G", b"\x16\x03\x01" + bytes(2 * SKIM_BYTES)], ids=["none", "one", "many"])
    async def test_whole(self, version: Any, rest: bytes) -> None:
        header = proxy_header(version, SOURCE, DESTINATION)
        assert await self.greet(header + rest, rest=rest) == (True, Peer(CLIENT, f"{CLIENT}:51234"))

    @pytest.mark.parametrize("version", [1, 2])
    async def test_byte_by_byte(self, version: Any) -> None:
        header = proxy_header(version, ("2001:db8::7", 5000), ("2001:db8::1", 443))
        pieces = [bytes([byte]) for byte in header + b"GET"]
        assert await self.greet(*pieces, rest=b"GET") == (True, Peer("2001:db8::7", "[2001:db8::7]:5000"))

    async def test_a_long_one(self) -> None:
        """Longer than what is looked at at once: 4,096 bytes of what a proxy says of the TLS it has ended."""
        header = bytearray(proxy_header(2, SOURCE, DESTINATION))
        header[14:16] = (4096).to_bytes(2, "big")
        header += b"\x20" + (4096 - 12 - 3).to_bytes(2, "big") + bytes(4096 - 12 - 3)
        assert await self.greet(bytes(header) + b"GET", rest=b"GET") == (True, Peer(CLIENT, f"{CLIENT}:51234"))

    @pytest.mark.parametrize("version", [1, 2])
    async def test_one_that_says_nothing(self, version: Any) -> None:
        assert await self.greet(proxy_header(version, None, None)) == (True, Peer("127.0.0.1", "127.0.0.1:1"))

    async def test_of_a_stranger_nothing_is_looked_at(self) -> None:
        header = proxy_header(1, SOURCE, DESTINATION)
        greeted = await self.greet(header, listed="10.0.0.0/8", rest=header)
        assert greeted == (True, Peer("127.0.0.1", "127.0.0.1:1"))

    async def test_a_health_check(self) -> None:
        assert (await self.greet())[0] is False

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            (b"GET / HTTP/1.1\r\n", "HTTP or another text protocol came"),
            (b"\x16\x03\x01\x02\x00", "TLS came"),
            (b"\x00", "something else came"),
            (b"PROXY TCP4 203.0.113.7 198.51.100.1", "ends in its middle"),
            (b"PROXY TCP4 203.0.113.7 x 1 1\r\n", "no|not"),
            (proxy_header(2, SOURCE, DESTINATION)[:20], "ends in its middle"),
        ],
    )
    async def test_what_is_none(self, said: bytes, words: str) -> None:
        with pytest.raises(ProtocolError, match=words):
            await self.greet(said)


# --- the server -----------------------------------------------------------------------------------------------------


def forwarded_upgrade(token: str | None, *fields: str) -> bytes:
    return upgrade(token).replace(b"\r\n\r\n", "".join(f"\r\n{field}" for field in (*fields, "", "")).encode())


class TestServer:
    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("plain", [True, False])
    async def test_a_proxy_header_before_tls(self, tmp_path: Path, version: Any, plain: bool, lines: LogLines) -> None:
        async with serving(tmp_path, plain=plain, proxy_protocol=sources("127.0.0.0/8")) as server:
            stranger = await Stranger.connect(server.port)
            await stranger.send(proxy_header(version, SOURCE, DESTINATION))
            if not plain:
                context = tls.client_context(None, server.url.pins)
                stranger.stream = trio.SSLStream(stranger.stream, context, server_hostname="127.0.0.1")
            assert await stranger.upgrade(server.token) == 101
            await stranger.send(text(hello("control")))
            while not stranger.messages:
                await stranger.receive()
            assert isinstance(stranger.messages[0], Welcome)
            await stranger.close()
        assert [line["peer"] for line in lines("client connected")] == [f"{CLIENT}:51234"]

    async def test_without_the_header(self, tmp_path: Path, lines: LogLines) -> None:
        async with serving(tmp_path, proxy_protocol=sources("127.0.0.1")) as server:
            stranger = await Stranger.connect(server.port)
            await stranger.send(upgrade(server.token))
            try:
                assert not await stranger.stream.receive_some(1)  # no answer
            except trio.BrokenResourceError:  # reset, since the request was not read
                pass
            await stranger.close()
            await until(lambda: lines("connection closed"))
            health_check = await Stranger.connect(server.port)
            await health_check.close()
            await until(lambda: not server.server._handshakes)
        (line,) = lines("connection closed")
        assert line["peer"].startswith("127.0.0.1:")
        assert line["reason"].startswith("a PROXY header was expected and HTTP or another text protocol came")

    async def test_those_that_are_not_listed_need_none(self, tmp_path: Path, lines: LogLines) -> None:
        async with serving(tmp_path, proxy_protocol=sources("127.0.0.2", "unix")) as server:
            stranger = await Stranger.connect(server.port)
            assert await stranger.upgrade(None) == 401
            await stranger.close()
            stranger = await Stranger.connect(server.port)
            await stranger.send(proxy_header(1, SOURCE, DESTINATION))
            assert await stranger.upgrade(None) == 400
            await stranger.close()
        assert all(line["peer"].startswith("127.0.0.1:") for line in lines("connection refused"))

    @pytest.mark.parametrize("said", [b"", b"PROXY TCP4 "])
    async def test_a_header_that_does_not_come(
        self, tmp_path: Path, nursery: trio.Nursery, mock_clock: MockClock, lines: LogLines, said: bytes
    ) -> None:
        reactor: Any = None
        config = ServerConfig(state_dir=tmp_path, proxy_protocol=tuple(sources("127.0.0.1")))
        server = Server(config, reactor, nursery, [], None)
        near, far = tcp_pair()
        server.accepted(far)
        near.send(said)
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(limits.HANDSHAKE_SECONDS - 0.1)
        await wait_all_tasks_blocked(0.01)
        assert server._handshakes
        mock_clock.jump(0.2)
        await wait_all_tasks_blocked(0.01)
        assert not server._handshakes
        assert near.recv(1000) == b""
        near.close()
        (line,) = lines("connection closed")
        assert line["reason"].startswith("a PROXY header was expected and did not come in time")

    async def test_forwarded_for(self, tmp_path: Path, lines: LogLines) -> None:
        async with serving(tmp_path, trust_proxy=sources("127.0.0.1")) as server:
            for field in (f"X-Forwarded-For: 8.8.8.8, {CLIENT}", f'Forwarded: for="{CLIENT}:5000"', "Via: 1.1 x"):
                stranger = await Stranger.connect(server.port)
                await stranger.send(forwarded_upgrade(None, field))
                assert await stranger.answer() == 401
                await stranger.close()
        first, second, third = [line["peer"] for line in lines("connection refused")]
        assert (first, second, third[:10]) == (CLIENT, f"{CLIENT}:5000", "127.0.0.1:")

    async def test_nobody_is_trusted_unless_listed(self, tmp_path: Path, lines: LogLines) -> None:
        async with serving(tmp_path) as server:
            stranger = await Stranger.connect(server.port)
            await stranger.send(forwarded_upgrade(None, f"X-Forwarded-For: {CLIENT}", f"Forwarded: for={CLIENT}"))
            assert await stranger.answer() == 401
            await stranger.close()
        (line,) = lines("connection refused")
        assert line["peer"].startswith("127.0.0.1:")

    async def test_the_address_of_a_proxy_header_is_the_one_that_is_looked_up_among_the_trusted(
        self, tmp_path: Path, lines: LogLines
    ) -> None:
        config: dict[str, Any] = {"proxy_protocol": sources("127.0.0.1"), "trust_proxy": sources(PROXY)}
        async with serving(tmp_path, **config) as server:
            for source in (PROXY, OTHER):
                stranger = await Stranger.connect(server.port)
                await stranger.send(proxy_header(2, (source, 1), DESTINATION))
                await stranger.send(forwarded_upgrade(None, f"X-Forwarded-For: {CLIENT}"))
                assert await stranger.answer() == 401
                await stranger.close()
        assert [line["peer"] for line in lines("connection refused")] == [CLIENT, f"{OTHER}:1"]

    async def test_plain_endpoints_see_the_real_peer_too(self, tmp_path: Path, lines: LogLines) -> None:
        from wstunnel.plain_endpoints import parse_endpoint

        endpoints = (parse_endpoint("/db=127.0.0.1:1"),)
        async with serving(tmp_path, trust_proxy=sources("127.0.0.1"), endpoints=endpoints) as server:
            stranger = await Stranger.connect(server.port)
            head = forwarded_upgrade(server.token, f"X-Forwarded-For: {CLIENT}")
            await stranger.send(head.replace(b"GET / ", b"GET /db ").replace(b"wstunnel.1", b"binary"))
            assert await stranger.answer() == 502
            await stranger.close()
        assert [line["peer"] for line in lines("endpoint's target not reached")] == [CLIENT]


class TestUnixSocket:
    async def connect(self, path: Path) -> Stranger:
        return Stranger(await trio.open_unix_socket(path))

    async def test_alone(self, tmp_path: Path, lines: LogLines) -> None:
        path = tmp_path / "s"
        async with serving(tmp_path / "state", bind=(), bind_unix=((str(path), 0o640),)) as server:
            assert server.addresses == [f"unix:{path}"]
            assert stat.S_IMODE(path.stat().st_mode) == 0o640
            assert read_announcement(tmp_path / "state") == Announcement(scheme="ws", port=None, path="/")
            stranger = await self.connect(path)
            assert await stranger.upgrade(server.token) == 101
            await stranger.send(text(hello("control")))
            while not stranger.messages:
                await stranger.receive()
            await stranger.close()
        assert not path.exists()
        assert f"INFO wstunnel.server listening unix:{path}" in lines.all()
        (line,) = lines("client connected")
        assert line["peer"] == f"unix:uid={os.getuid()},pid={os.getpid()}"

    async def test_beside_tcp_and_over_tls(self, tmp_path: Path) -> None:
        files = ((str(tmp_path / "a"), 0o600), (str(tmp_path / "b"), 0o666))
        async with serving(tmp_path / "state", plain=False, bind_unix=files) as server:
            assert server.addresses[1:] == [f"unix:{tmp_path}/a", f"unix:{tmp_path}/b"]
            announced = read_announcement(tmp_path / "state")
            assert announced is not None
            assert announced.port == server.port > 0
            context = tls.client_context(None, announced.pins)
            for path in ("a", "b"):
                stranger = await self.connect(tmp_path / path)
                stranger.stream = trio.SSLStream(stranger.stream, context, server_hostname="x")
                assert await stranger.upgrade(server.token) == 101
                await stranger.close()
            stranger = await Stranger.connect(server.port, context)
            assert await stranger.upgrade(server.token) == 101
            await stranger.close()

    async def test_who_is_behind_a_proxy_on_it(self, tmp_path: Path, lines: LogLines) -> None:
        path = tmp_path / "s"
        here = sources("unix")
        async with serving(
            tmp_path / "state", bind=(), bind_unix=((str(path), 0o600),), proxy_protocol=here, trust_proxy=here
        ):
            for head in (proxy_header(1, None, None), proxy_header(2, SOURCE, DESTINATION)):
                stranger = await self.connect(path)
                await stranger.send(head + forwarded_upgrade(None, "X-Forwarded-For: 192.0.2.1"))
                assert await stranger.answer() == 401
                await stranger.close()
        assert [line["peer"] for line in lines("connection refused")] == ["192.0.2.1", f"{CLIENT}:51234"]

    async def test_a_stale_one_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(path))
        async with serving(tmp_path / "state", bind=(), bind_unix=((str(path), 0o600),)) as server:
            stranger = await self.connect(path)
            assert await stranger.upgrade(server.token) == 101
            await stranger.close()
        assert not path.exists()

    async def test_one_in_use_leaves_nothing_open_and_announces_nothing(self, tmp_path: Path) -> None:
        invite(tmp_path / "state")
        path = tmp_path / "s"
        config = ServerConfig(
            port=0, bind=("127.0.0.1",), plain=True, state_dir=tmp_path / "state",
            bind_unix=((str(tmp_path / "first"), 0o600), (str(path), 0o600)),
        )  # fmt: skip
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            before = descriptors()
            with pytest.raises(LocalError, match="another program listens there"):
                await server_module.run(config, shutdown=trio.Event())
            assert descriptors() == before
        assert path.exists()
        assert not (tmp_path / "first").exists()
        assert read_announcement(tmp_path / "state") is None

    async def test_a_successor_s_file_is_not_removed(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        async with serving(tmp_path / "state", bind=(), bind_unix=((str(path), 0o600),)) as server:
            path.unlink()
            with socket.socket(socket.AF_UNIX) as successor:
                successor.bind(str(path))
                server.shutdown.set()
                await server.server.gone.wait()
        assert path.exists()

    async def test_it_is_removed_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the second time it may be a successor's, with the same number."""
        removed: list[str] = []
        monkeypatch.setattr(unix.SocketFile, "remove", lambda file: removed.append(file.path))
        async with serving(tmp_path / "state", bind=(), bind_unix=((str(tmp_path / "s"), 0o600),)):
            assert removed == []
        assert removed == [str(tmp_path / "s")]

    async def test_cancelling_removes_it(self, tmp_path: Path) -> None:
        path = tmp_path / "s"
        with trio.CancelScope() as scope:
            async with serving(tmp_path / "state", bind=(), bind_unix=((str(path), 0o600),)):
                scope.cancel()
                await trio.lowlevel.checkpoint()
        assert not path.exists()

    async def test_clients_cannot_open_it(self, tmp_path: Path) -> None:
        """Through it they would come as the proxy does, and be believed."""
        (tmp_path / "link").symlink_to(tmp_path / "s")
        rules = (parse_rule(f"unix:{tmp_path}/*"),)
        async with serving(
            tmp_path / "state", bind=(), bind_unix=((str(tmp_path / "s"), 0o600),), allow=rules
        ) as server:
            refusal = server.server.policy.refusal
            assert (
                refusal(parse_target("tcp:127.0.0.1:80"), "127.0.0.1")
                == "no --allow rule matches tcp:127.0.0.1:80 at 127.0.0.1"
            )
            for name, refused in (("s", True), ("link", True), ("other", False)):
                reason = refusal(parse_target(f"unix:{tmp_path}/{name}"), "")
                assert reason == (f"unix:{tmp_path}/{name} is a socket of this server itself" if refused else None)
