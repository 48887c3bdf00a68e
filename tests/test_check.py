"""check*.py: each failure that is looked for, against scripted servers; the texts, the JSON, and what idle paths do."""

from __future__ import annotations

import json
import math
import re
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.roles import free_port, make_world
from tests.test_dialler import TOKEN, Certificates, FakeServer, switching, url
from tests.test_proxy_tunnel import GRANTED, Proxy, SocksProxy, pump
from tests.test_server import Peer, hello
from wstunnel import check_advice as advice
from wstunnel import limits, tls
from wstunnel.auth import LoginUrl
from wstunnel.check import OTHERS_SECONDS, Check, Surroundings, secrets_of
from wstunnel.check_idle import GRACE_SECONDS, SILENCES, Idle, Silence, bounds, is_settled, silences
from wstunnel.check_link import CheckLink, ClosedByPeerError
from wstunnel.check_report import HIDDEN, NAMES, Layout, Report, Step, duration
from wstunnel.cli.check import IDLE_SECONDS_MAX
from wstunnel.config import ClientConfig
from wstunnel.dial import Address, SocketAddress, connect_socket
from wstunnel.errors import NetworkError, WstunnelError
from wstunnel.route import Route, route_to
from wstunnel.server import QUIET_SECONDS
from wstunnel.tls_relay import Relays
from wstunnel.upstream import Proxies, parse_proxy
from wstunnel.wire.messages import FEATURES, Hello, Ping, Pong, Welcome
from wstunnel.wire.protocol import LinkProtocol, PeerClosed

__all__ = ["make_world"]

SERVER_ID, BOOT_ID = "a" * 22, "b" * 22
WELCOME = Welcome(version=1, server=SERVER_ID, boot=BOOT_ID, resume_window=3600, keepalive=15, features=list(FEATURES))
ANSWER = b"HTTP/1.1 %s\r\nServer: nginx/1.22\r\nVia: 1.1 corp\r\nContent-Length: 5\r\n%s\r\nbody\n"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


class TunnelServer(FakeServer):
    """Upgrades and speaks the tunnel protocol, as far as it is told to.

    Args:
        welcome: what answers `hello`: a message, raw bytes, a close (code, reason), or None for silence.
        pongs: how many pings are answered.
        late_ping: its own ping comes some time after its welcome.
    """

    def __init__(
        self,
        context: ssl.SSLContext | None = None,
        *,
        welcome: Welcome | bytes | tuple[int, str] | None = WELCOME,
        pongs: int = 1000,
        late_ping: bool = False,
    ) -> None:
        super().__init__(self._serve, context)
        self.welcome = welcome
        self.pongs = pongs
        self.late_ping = late_ping
        self.hellos: list[Hello] = []
        self.closed: list[PeerClosed] = []

    async def _serve(self, stream: Any) -> None:
        head = await self.read_head(stream)
        if not head:
            return  # the look at TCP
        await stream.send_all(switching(head))
        protocol = LinkProtocol("server")
        while data := await stream.receive_some(65536):
            for event in protocol.receive(data):
                if isinstance(event, Hello):
                    self.hellos.append(event)
                    if isinstance(self.welcome, Welcome):
                        protocol.send(self.welcome)
                        if self.late_ping:
                            for part in protocol.pull(65536, 0.0, 0.0):
                                await stream.send_all(part)
                            await trio.sleep(0.05)
                        protocol.ping(1)  # as the real one does
                    elif isinstance(self.welcome, bytes):
                        await stream.send_all(self.welcome)
                    elif self.welcome is not None:
                        protocol.close(*self.welcome)
                elif isinstance(event, Ping):
                    self.pongs -= 1
                    if self.pongs < 0:
                        protocol._pong_number = None
                elif isinstance(event, PeerClosed):
                    self.closed.append(event)
            for part in protocol.pull(65536, 0.0, 0.0):
                await stream.send_all(part)
            if self.closed and protocol.close_received:
                return


class Answering(FakeServer):
    """Answers each request with the same bytes, and closes."""

    def __init__(self, answer: bytes, context: ssl.SSLContext | None = None) -> None:
        super().__init__(self._answer, context)
        self.answer = answer

    async def _answer(self, stream: Any) -> None:
        if await self.read_head(stream):
            await stream.send_all(self.answer)


class Socks(FakeServer):
    """A SOCKS5 proxy that wants no authentication and does as it is asked."""

    def __init__(self) -> None:
        super().__init__(self._serve)

    async def _serve(self, stream: Any) -> None:
        if not await stream.receive_some(3):
            return  # the look at TCP
        await stream.send_all(b"\x05\x00")
        asked = await stream.receive_some(300)
        await stream.send_all(GRANTED)
        port = int.from_bytes(asked[-2:])
        async with await trio.open_tcp_stream("127.0.0.1", port) as far, trio.open_nursery() as nursery:
            nursery.start_soon(pump, stream, far)
            nursery.start_soon(pump, far, stream)


def resolving(*addresses: str) -> Callable[..., list[Any]]:
    """A resolver that has these addresses for every name."""

    def resolve(_host: str, port: int, **_options: Any) -> list[Any]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (ip, port, 0, 0))
            if ":" in ip
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
            for ip in addresses
        ]

    return resolve


def known_route(_ip: str) -> Route:
    return Route("10.0.0.7", "eth0", "10.0.0.1")


@pytest.fixture
def around(tmp_path: Path) -> Callable[..., Surroundings]:
    """Surroundings that are the same on every machine."""
    file = tmp_path / "resolv.conf"
    file.write_text("# a comment\nsearch example.org\nnameserver 10.0.0.53\nnameserver fd00::53\n")

    def make(**changes: Any) -> Surroundings:
        settings: dict[str, Any] = {"route": known_route, "resolver_file": file} | changes
        return Surroundings(**settings)

    return make


async def checked(
    server_url: LoginUrl, surroundings: Surroundings, *, idle: float | None = None, why: str = "why", **options: Any
) -> Report:
    """The report of one check that came to its end."""
    config = ClientConfig(url=server_url, **({"proxies": Proxies()} | options))
    report = Report("ws://server/", secrets_of(config, server_url))
    async with trio.open_nursery() as nursery:
        relays = Relays()
        await nursery.start(relays.run)
        await Check(
            config, server_url, why=why, report=report, relays=relays, idle=idle, surroundings=surroundings
        ).run()
        nursery.cancel_scope.cancel()
    assert report.finished
    whole(report)
    return report


def whole(report: Report) -> None:
    """What holds for every report: known names, each once, one object of JSON, no token; only the last may fail."""
    names = [step.step for step in report.steps]
    assert set(names) <= set(NAMES)
    assert len(set(names)) == len(names)
    found = json.loads(report.as_json())
    assert found["ok"] is report.ok
    assert {"ok", "url", "steps"} <= set(found) <= {"ok", "url", "steps", "interrupted"}
    for step in found["steps"]:
        assert set(step) == {"step", "ok", "text", "evidence", "next"}
        assert members(step["evidence"]) <= documented()[step["step"]]
        assert isinstance(step["ok"], bool) and isinstance(step["text"], str) and isinstance(step["evidence"], dict)
        assert step["next"] is None or isinstance(step["next"], str)
        assert step["ok"] or step["next"], "a failure says what to do"
        assert "\n" not in step["text"]
    text = "".join(Layout("utf-8").step(step) for step in report.steps)
    assert TOKEN.reveal() not in text + report.as_json()


PAGE = Path(__file__).parent.parent / "docs/how-to/find-out-what-is-in-the-way.md"


def documented() -> dict[str, set[str]]:
    """The members of `evidence`, by step, that the page promises to programs. Of members in members, all."""
    rows = re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    found = {step: set(re.findall(r"`([a-z_]+)`", text)) for step, text in rows}
    found["authentication"] = found["http"]
    return found


def members(value: Any) -> set[str]:
    """The names of all members, at any depth."""
    if isinstance(value, dict):
        return set(value).union(*map(members, value.values()))
    return set().union(*map(members, value)) if isinstance(value, list) else set()


def failure(report: Report) -> Step:
    """The one step that failed, which is the last."""
    assert [step.ok for step in report.steps[:-1]] == [True] * (len(report.steps) - 1)
    assert not report.steps[-1].ok
    assert not report.ok
    return report.steps[-1]


def named(report: Report, name: str) -> Step:
    (found,) = [step for step in report.steps if step.step == name]
    return found


class TestAllIsWell:
    async def test_golden_text(self, nursery: trio.Nursery, around: Any, mock_clock: MockClock) -> None:
        """Every time is 0: the clock stands still."""
        server: Any = await TunnelServer().start(nursery)
        report = await checked(url(server.port, host="tunnel.test"), around(resolve=resolving("127.0.0.1")))
        assert report.exit_code == 0
        layout = Layout("utf-8")
        shown = [layout.heading(report), *map(layout.step, report.steps), layout.summary(report)]
        assert "\n".join(shown).replace(str(server.port), "PORT") == (
            "ws://server/\n"
            "  ✓ name            tunnel.test is 127.0.0.1 (0.0 ms; resolver: system, nameserver 10.0.0.53 fd00::53)\n"
            "  ✓ route           IPv4 from 10.0.0.7 on eth0 by way of 10.0.0.1\n"
            "  ✓ proxy           none (why)\n"
            "  ✓ tcp             127.0.0.1:PORT 0.0 ms\n"
            "  ✓ tls             none: the URL begins with ws://\n"
            f"                    → {advice.PLAIN}\n"
            "  ✓ http            101 Switching Protocols (0.0 ms)\n"
            "  ✓ authentication  the server took the token\n"
            "  ✓ tunnel          wstunnel.1; features: resume drain reverse udp; streams without a connection are kept"
            " for up to 60 min; server ec7c494d, boot ad956c7d\n"
            "  ✓ round-trip      0.0 ms at least, 0.0 ms in the middle of 5\n"
            "all is well"
        )
        ascii_layout = Layout("ascii")
        assert ascii_layout.step(report.steps[0]).startswith("  ok   name            tunnel.test is")
        assert ascii_layout.step(named(report, "tls")).splitlines()[1] == f"{'':23}-> {advice.PLAIN}"

    async def test_evidence(self, nursery: trio.Nursery, around: Any, certificates: Certificates) -> None:
        server: Any = await TunnelServer(certificates.server).start(nursery)
        report = await checked(url(server.port, "wss"), around(), ca=certificates.ca)
        assert report.ok
        assert named(report, "name").evidence == {"host": "127.0.0.1", "resolver": None, "addresses": ["127.0.0.1"]}
        (entry,) = named(report, "route").evidence["routes"]
        assert entry == {
            "family": "IPv4", "to": "127.0.0.1", "local": "10.0.0.7", "interface": "eth0", "gateway": "10.0.0.1",
        }  # fmt: skip
        assert named(report, "proxy").evidence == {"proxy": None, "why": "why"}
        (entry,) = named(report, "tcp").evidence["addresses"]
        assert entry["address"] == f"127.0.0.1:{server.port}"
        assert entry["ok"] and 0 < entry["seconds"] < 10
        evidence = named(report, "tls").evidence
        assert (evidence["version"], evidence["trusted_by"]) == ("TLSv1.3", "ca")
        assert evidence["key"] == tls.pin_text(certificates.pin)
        assert "trustme" in evidence["issuer"]
        assert evidence["cipher"].startswith("TLS_")
        assert named(report, "http").evidence["status"] == 101
        evidence = named(report, "tunnel").evidence
        assert evidence["version"] == 1
        assert evidence["resume_window"] == 3600
        assert (len(evidence["server"]), len(evidence["boot"])) == (8, 8)
        evidence = named(report, "round-trip").evidence
        assert len(evidence["seconds"]) == 5
        assert evidence["min"] == min(evidence["seconds"])
        assert evidence["median"] == sorted(evidence["seconds"])[2]
        with trio.fail_after(10):
            while not server.closed:
                await trio.sleep(0.01)
        assert [event.code for event in server.closed] == [1000]
        (hello,) = server.hellos
        assert hello.role == "forward", "a control link would displace the user's real client"

    async def test_pin(self, nursery: trio.Nursery, around: Any, certificates: Certificates) -> None:
        server: Any = await TunnelServer(certificates.server).start(nursery)
        report = await checked(url(server.port, "wss"), around(), pins=(certificates.pin,))
        assert report.ok
        assert "its key is the pinned one" in named(report, "tls").text


class TestName:
    async def test_unknown(self, around: Any) -> None:
        def resolve(*_arguments: Any, **_options: Any) -> list[Any]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        report = await checked(url(9, host="nowhere.test"), around(resolve=resolve))
        step = failure(report)
        assert (step.step, step.next) == ("name", advice.NAME)
        assert "nowhere.test: no such name" in step.text
        assert "10.0.0.53" in step.text
        assert report.exit_code == 1

    async def test_a_resolver_that_does_not_answer(self, around: Any, autojump_clock: MockClock) -> None:
        free = threading.Event()

        def resolve(*_arguments: Any, **_options: Any) -> list[Any]:
            free.wait(30)
            return []

        step = failure(await checked(url(9, host="slow.test"), around(resolve=resolve)))
        free.set()
        assert step.step == "name"
        assert "no answer from the resolver within 10 s" in step.text

    async def test_the_other_family(self, around: Any) -> None:
        surroundings = around(resolve=resolving("10.0.0.5"))
        step = failure(await checked(url(9, host="four.test"), surroundings, ip_version=6))
        assert step.step == "name"
        assert "it has no IPv6 address" in step.text
        assert step.next is not None and step.next.startswith("-6 takes IPv6 addresses only: leave it out.")


class TestRoute:
    async def test_none(self, around: Any) -> None:
        def no_route(_ip: str) -> Route:
            raise OSError(101, "Network is unreachable")

        step = failure(await checked(url(9, host="10.0.0.5"), around(route=no_route)))
        assert (step.step, step.text, step.next) == ("route", "IPv4: network is unreachable", advice.NO_ROUTE)

    async def test_one_family_has_one(self, nursery: trio.Nursery, around: Any) -> None:
        def only_four(ip: str) -> Route:
            if ":" in ip:
                raise OSError(101, "Network is unreachable")
            return known_route(ip)

        async def connect(family: socket.AddressFamily, sockaddr: SocketAddress) -> socket.socket:
            if family == socket.AF_INET6:
                raise OSError(101, "Network is unreachable")
            return await connect_socket(family, sockaddr)

        server: Any = await TunnelServer().start(nursery)
        surroundings = around(route=only_four, connect=connect, resolve=resolving("fd00::5", "127.0.0.1"))
        report = await checked(url(server.port, host="both.test"), surroundings)
        assert report.ok
        assert named(report, "route").text.startswith("IPv6: network is unreachable; IPv4 from 10.0.0.7")
        step = named(report, "tcp")
        assert f"[fd00::5]:{server.port} network is unreachable" in step.text
        assert (step.ok, step.next) == (True, advice.TCP_SOME)

    def test_the_kernel_is_asked(self) -> None:
        way = route_to("127.0.0.1")
        assert (way.local, way.interface, way.gateway) == ("127.0.0.1", "lo", None)

    def test_the_kernel_has_none(self) -> None:
        with pytest.raises(OSError, match=r"nvalid|nreachable|not permitted|denied"):
            route_to("255.255.255.255")  # a broadcast address, which takes a flag that is not set


class TestTcp:
    async def test_refused(self, around: Any) -> None:
        port = free_port()
        report = await checked(url(port), around())
        step = failure(report)
        assert (step.step, step.next) == ("tcp", advice.TCP_REFUSED)
        assert step.text == f"127.0.0.1:{port} connection refused"
        assert [step.step for step in report.steps] == ["name", "route", "proxy", "tcp"]

    async def test_silence(self, around: Any, autojump_clock: MockClock) -> None:
        began = trio.current_time()

        async def connect(_family: Any, _sockaddr: Any) -> socket.socket:
            await trio.sleep_forever()
            raise AssertionError

        step = failure(await checked(url(9, host="10.0.0.5"), around(connect=connect)))
        assert (step.step, step.next) == ("tcp", advice.TCP_SILENT)
        assert step.text == "10.0.0.5:9 no answer in time"
        assert trio.current_time() - began == pytest.approx(limits.DIAL_SECONDS)

    async def test_an_address_that_refuses_the_second_time(self, nursery: trio.Nursery, around: Any) -> None:
        server: Any = await TunnelServer().start(nursery)
        calls: list[SocketAddress] = []

        async def connect(family: socket.AddressFamily, sockaddr: SocketAddress) -> socket.socket:
            calls.append(sockaddr)
            if len(calls) > 1:
                raise OSError(111, "Connection refused")
            return await connect_socket(family, sockaddr)

        surroundings = around(connect=connect, resolve=resolving("127.0.0.1"), resolver_file=Path("/nonexistent"))
        report = await checked(url(server.port, host="once.test"), surroundings)
        step = failure(report)
        assert (step.step, step.next) == ("tls", advice.AGAIN)
        assert "connection refused" in step.text
        assert named(report, "name").text.endswith("resolver: system)")

    async def test_other_addresses_are_waited_for_a_little(self, around: Any, autojump_clock: MockClock) -> None:
        async def connect(_family: socket.AddressFamily, sockaddr: SocketAddress) -> socket.socket:
            if sockaddr[0] == "10.0.0.5":
                await trio.sleep_forever()
            await trio.sleep(1)
            return socket.socket()

        report = Report("ws://two.test/")
        server_url = url(80, host="two.test")
        config = ClientConfig(url=server_url, proxies=Proxies())
        check = Check(
            config, server_url, why="why", report=report, relays=Relays(), surroundings=around(connect=connect)
        )
        began = trio.current_time()
        await check._tcp([Address(socket.AF_INET, ("10.0.0.4", 80)), Address(socket.AF_INET, ("10.0.0.5", 80))])
        assert trio.current_time() - began == pytest.approx(1 + OTHERS_SECONDS)
        (step,) = report.steps
        assert step.ok
        assert step.text == "10.0.0.4:80 1 s, 10.0.0.5:80 no answer in time"
        assert step.next == advice.TCP_SOME


class TestTls:
    async def test_a_wrong_pin_names_the_issuer(
        self, nursery: trio.Nursery, around: Any, certificates: Certificates
    ) -> None:
        server: Any = await TunnelServer(certificates.server).start(nursery)
        report = await checked(url(server.port, "wss"), around(), pins=(b"x" * 32,))
        step = failure(report)
        assert (step.step, step.next) == ("tls", advice.PIN_WRONG)
        assert tls.pin_text(certificates.pin) in step.text
        assert "was issued by" in step.text and "trustme" in step.text
        assert step.evidence["key"] == tls.pin_text(certificates.pin)
        assert not any(server.heads), "the token must not leave"
        assert report.exit_code == 1

    async def test_an_unknown_authority_is_named(
        self, nursery: trio.Nursery, around: Any, certificates: Certificates
    ) -> None:
        server: Any = await TunnelServer(certificates.server).start(nursery)
        step = failure(await checked(url(server.port, "wss"), around()))
        assert (step.step, step.next) == ("tls", advice.TRUST)
        assert "trustme" in step.text
        assert "trustme" in step.evidence["issuer"]
        assert not any(server.heads)

    async def test_no_tls_there(self, nursery: trio.Nursery, around: Any) -> None:
        server = await Answering(ANSWER % (b"400 Bad Request", b"")).start(nursery)
        server.read_head = lambda stream: stream.receive_some(1)  # type: ignore[method-assign]
        step = failure(await checked(url(server.port, "wss"), around(), pins=(b"x" * 32,)))
        assert (step.step, step.next) == ("tls", advice.TLS_OTHER)
        assert "does not speak TLS" in step.text

    async def test_an_authority_that_cannot_be_read(self, nursery: trio.Nursery, around: Any, tmp_path: Path) -> None:
        server: Any = await TunnelServer().start(nursery)
        step = failure(await checked(url(server.port, "wss"), around(), ca=tmp_path / "none.pem"))
        assert step.step == "tls"
        assert "none.pem" in step.text


class TestHttp:
    @pytest.mark.parametrize(
        ("status", "extra", "step", "then", "code"),
        [
            (b"200 OK", b"Content-Type: text/html\r\n", "http", "log-in page", 1),
            (b"302 Found", b"Location: http://portal.test/\r\n", "http", "log in with a browser", 1),
            (b"400 Bad Request", b"", "http", "took the upgrade out", 1),
            (b"401 Unauthorized", b"", "authentication", "wstunnel login", 3),
            (b"403 Forbidden", b"", "http", "ask its operator", 3),
            (b"404 Not Found", b"", "http", "--path", 1),
            (b"407 Proxy Authentication Required", b"", "http", "--proxy http://USER", 1),
            (b"418 Teapot", b"", "http", "check the URL", 1),
            (b"426 Upgrade Required", b"", "http", "took the upgrade out", 1),
            (b"505 HTTP Version Not Supported", b"", "http", "proxy_http_version", 1),
            (b"502 Bad Gateway", b"", "http", "see that the server runs", 1),
            (b"503 Service Unavailable", b"", "http", "the proxy in front of the server could not reach it", 1),
            (b"101 Switching Protocols", b"", "http", "a proxy on the way alters the answer", 1),
        ],
    )
    async def test_answers(
        self, nursery: trio.Nursery, around: Any, *, status: bytes, extra: bytes, step: str, then: str, code: int
    ) -> None:
        server = await Answering(ANSWER % (status, extra)).start(nursery)
        report = await checked(url(server.port), around())
        failed = failure(report)
        assert failed.step == step
        assert failed.next is not None and then in failed.next
        assert report.exit_code == code
        assert failed.evidence["status"] == int(status[:3])
        assert (failed.evidence["server"], failed.evidence["via"]) == ("nginx/1.22", "1.1 corp")
        shown = failed.text if step == "http" else named(report, "http").text
        assert "Server: nginx/1.22, Via: 1.1 corp" in shown
        if extra:
            assert failed.evidence.keys() & {"content_type", "location"}

    @pytest.mark.parametrize(
        ("body", "then"),
        [
            (b"too many links", advice.BUSY_LINKS),
            (b"try again later", advice.BUSY_USERS),
            (b"too many links here", advice.BUSY),
            (b"upstream connect error", advice.BUSY),
        ],
    )
    async def test_no_room_at_the_server_or_at_its_proxy(
        self, nursery: trio.Nursery, around: Any, body: bytes, then: str
    ) -> None:
        answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        server = await Answering(answer).start(nursery)
        step = failure(await checked(url(server.port), around()))
        assert (step.step, step.next) == ("http", then)
        assert f"(503: {body.decode()})" in step.text

    async def test_no_answer_at_all(self, nursery: trio.Nursery, around: Any) -> None:
        server = await Answering(b"").start(nursery)
        step = failure(await checked(url(server.port), around()))
        assert (step.step, step.next) == ("http", advice.NO_HTTP)
        assert "without an answer" in step.text

    async def test_another_subprotocol(self, nursery: trio.Nursery, around: Any) -> None:
        answer = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 24\r\n\r\nno subprotocol in common"
        server = await Answering(answer).start(nursery)
        report = await checked(url(server.port), around())
        step = failure(report)
        assert (step.step, step.next) == ("http", advice.VERSION)
        assert report.exit_code == 3, "as the client's own: the server refused the version"

    async def test_a_server_that_echoes_the_token(self, nursery: trio.Nursery, around: Any) -> None:
        token = TOKEN.reveal().encode()
        answer = b"HTTP/1.1 500 %b\r\nServer: %b s3cret\r\nContent-Length: 43\r\n\r\n%b" % (token, token, token)
        server = await Answering(answer).start(nursery)
        report = await checked(url(server.port), around(), headers=(("X-Gate", "s3cret"), ("Host", "a.test")))
        step = failure(report)
        assert step.evidence["server"] == f"{HIDDEN} {HIDDEN}"
        assert HIDDEN in step.text

    async def test_no_http_there(self, nursery: trio.Nursery, around: Any) -> None:
        server = await Answering(b"SSH-2.0-OpenSSH_9.2\r\n").start(nursery)
        step = failure(await checked(url(server.port), around()))
        assert (step.step, step.next) == ("http", advice.NO_HTTP)
        assert "SSH-2.0" in step.text


class TestProxy:
    async def test_through_one(self, nursery: trio.Nursery, around: Any) -> None:
        server: Any = await TunnelServer().start(nursery)
        proxy: Any = await Proxy().start(nursery)
        proxies = parse_proxy(f"http://ann:hunter22@127.0.0.1:{proxy.port}")
        report = await checked(url(server.port), around(), proxies=proxies, why="HTTPS_PROXY")
        assert report.ok
        assert [step.step for step in report.steps][:4] == ["name", "route", "tcp", "proxy"]
        step = named(report, "proxy")
        assert step.evidence["why"] == "HTTPS_PROXY"
        assert f"http://***@127.0.0.1:{proxy.port} (HTTPS_PROXY) opened the way" in step.text
        assert "hunter22" not in report.as_json()
        assert named(report, "tcp").evidence["addresses"][0]["address"] == f"127.0.0.1:{proxy.port}"

    async def test_one_that_refuses(self, nursery: trio.Nursery, around: Any) -> None:
        proxy: Any = await Proxy(answer=b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").start(nursery)
        proxies = parse_proxy(f"http://127.0.0.1:{proxy.port}")
        step = failure(await checked(url(9), around(), proxies=proxies, why="--proxy"))
        assert (step.step, step.next) == ("proxy", advice.PROXY_ANSWER)
        assert "does not allow 127.0.0.1:9" in step.text
        assert "--proxy" in step.text

    async def test_one_that_is_in_use_is_not_asked_for_when_tls_fails(self, nursery: trio.Nursery, around: Any) -> None:
        proxy: Any = await Proxy().start(nursery)
        server = await Answering(ANSWER % (b"400 Bad Request", b"")).start(nursery)
        server.read_head = lambda stream: stream.receive_some(1)  # type: ignore[method-assign]
        proxies = parse_proxy(f"http://127.0.0.1:{proxy.port}")
        step = failure(await checked(url(server.port, "wss"), around(), pins=(b"x" * 32,), proxies=proxies))
        assert (step.step, step.next) == ("tls", advice.TLS_BEHIND_PROXY)
        assert "give" not in advice.TLS_BEHIND_PROXY

    async def test_one_that_is_away(self, around: Any) -> None:
        proxies = parse_proxy(f"http://127.0.0.1:{free_port()}")
        step = failure(await checked(url(9), around(), proxies=proxies))
        assert (step.step, step.next) == ("tcp", advice.PROXY_REACH)
        assert "the proxy 127.0.0.1" in step.text

    async def test_one_that_is_not_trusted(
        self, nursery: trio.Nursery, around: Any, certificates: Certificates
    ) -> None:
        proxy: Any = await Proxy(certificates.server).start(nursery)
        proxies = parse_proxy(f"https://127.0.0.1:{proxy.port}")
        step = failure(await checked(url(9), around(), proxies=proxies))
        assert (step.step, step.next) == ("proxy", advice.PROXY_TRUST)

    async def test_an_echo_of_its_credentials(self, nursery: trio.Nursery, around: Any) -> None:
        answer = b"HTTP/1.1 407 No\r\nContent-Length: 40\r\n\r\nYW5uOmh1bnRlcjIy is no good, nor hunter22"
        proxy: Any = await Proxy(answer=answer).start(nursery)
        report = await checked(url(9), around(), proxies=parse_proxy(f"http://ann:hunter22@127.0.0.1:{proxy.port}"))
        step = failure(report)
        assert f"{HIDDEN} is no good" in step.text
        assert "YW5u" not in report.as_json() and "hunter22" not in report.as_json()

    async def test_its_name_is_unknown(self, around: Any) -> None:
        def resolve(*_: Any, **__: Any) -> list[Any]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        step = failure(await checked(url(9), around(resolve=resolve), proxies=parse_proxy("http://proxy.test:3128")))
        assert (step.step, step.next) == ("name", advice.PROXY_REACH)
        assert step.text.startswith("proxy.test, the proxy: ")

    async def test_through_tls(self, nursery: trio.Nursery, around: Any, certificates: Certificates) -> None:
        """TLS to the server in TLS to the proxy; what is shown is the server's."""
        server: Any = await TunnelServer(certificates.server).start(nursery)
        proxy: Any = await Proxy(certificates.server).start(nursery)
        proxies = parse_proxy(f"https://ann:hunter22@127.0.0.1:{proxy.port}")
        report = await checked(url(server.port, "wss"), around(), proxies=proxies, ca=certificates.ca, idle=1)
        assert report.ok, report.as_json()
        assert [step.step for step in report.steps] == [
            "name", "route", "tcp", "proxy", "tls", "http", "authentication", "tunnel", "round-trip", "idle",
        ]  # fmt: skip
        assert f"https://***@127.0.0.1:{proxy.port} (why) opened the way" in named(report, "proxy").text
        assert named(report, "tls").evidence["trusted_by"] == "ca"
        assert "hunter22" not in report.as_json()

    async def test_through_socks(self, nursery: trio.Nursery, around: Any) -> None:
        server: Any = await TunnelServer().start(nursery)
        proxy: Any = await Socks().start(nursery)
        report = await checked(url(server.port), around(), proxies=parse_proxy(f"socks5h://127.0.0.1:{proxy.port}"))
        assert report.ok, report.as_json()
        assert [step.step for step in report.steps][2:5] == ["tcp", "proxy", "tls"]
        assert named(report, "proxy").evidence["proxy"] == f"socks5h://127.0.0.1:{proxy.port}"

    @pytest.mark.parametrize(
        ("answers", "text"),
        [
            ((b"\x05\xff",), "it wants user and password"),
            ((b"\x05\x00", b"\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00"), "says that the connection was refused"),
            ((b"HTTP/1.1 400 Bad Request\r\n\r\n",), "something that is not SOCKS5"),
            ((b"",), "closed the connection without an answer"),
        ],
    )
    async def test_socks_that_refuses(
        self, nursery: trio.Nursery, around: Any, answers: tuple[bytes, ...], text: str
    ) -> None:
        proxy: Any = await SocksProxy(*answers).start(nursery)
        step = failure(await checked(url(9), around(), proxies=parse_proxy(f"socks5h://127.0.0.1:{proxy.port}")))
        assert (step.step, step.next) == ("proxy", advice.PROXY_ANSWER)
        assert text in step.text

    async def test_socks_whose_names_are_resolved_here(
        self, nursery: trio.Nursery, around: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def resolve(*_: Any, **__: Any) -> list[Any]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        proxy: Any = await SocksProxy().start(nursery)
        monkeypatch.setattr("wstunnel.proxy_tunnel.socket.getaddrinfo", resolve)
        where = url(9, host="tunnel.test")
        around = around(resolve=resolving("127.0.0.1"))
        step = failure(await checked(where, around, proxies=parse_proxy(f"socks5://127.0.0.1:{proxy.port}")))
        assert (step.step, step.next) == ("proxy", advice.PROXY_NAMES)


class TestTunnel:
    @pytest.mark.parametrize(
        ("welcome", "text", "then", "code"),
        [
            ((1008, "version 1 is not spoken here"), "1008: version 1 is not spoken here", advice.VERSION, 3),
            ((1001, "the server is stopping"), "1001: the server is stopping", advice.TUNNEL, 1),
            (Welcome(version=2, server=SERVER_ID, boot=BOOT_ID), "version 2 of the tunnel", advice.VERSION, 3),
            (b"\x81\x02{}", "not the tunnel protocol", advice.TUNNEL, 1),
            (b"\xff\xff\xff", "not the tunnel protocol", advice.TUNNEL, 1),
        ],
    )
    async def test_greetings(
        self, nursery: trio.Nursery, around: Any, *, welcome: Any, text: str, then: str, code: int
    ) -> None:
        server: Any = await TunnelServer(welcome=welcome).start(nursery)
        report = await checked(url(server.port), around())
        step = failure(report)
        assert (step.step, step.next) == ("tunnel", then)
        assert text in step.text
        assert report.exit_code == code
        assert [each.step for each in report.steps][-3:] == ["http", "authentication", "tunnel"]

    async def test_no_greeting(self, nursery: trio.Nursery, around: Any, mock_clock: MockClock) -> None:
        mock_clock.rate = 50.0
        server: Any = await TunnelServer(welcome=None).start(nursery)
        step = failure(await checked(url(server.port), around()))
        assert (step.step, step.next) == ("tunnel", advice.TUNNEL)
        assert "did not answer `hello` within 10 s" in step.text

    async def test_pings_that_stop(self, nursery: trio.Nursery, around: Any, mock_clock: MockClock) -> None:
        mock_clock.rate = 50.0
        server: Any = await TunnelServer(pongs=3).start(nursery)
        step = failure(await checked(url(server.port), around()))
        assert (step.step, step.next) == ("round-trip", advice.TUNNEL)
        assert len(step.evidence["seconds"]) == 3

    async def test_the_servers_pings_are_answered(self, nursery: trio.Nursery) -> None:
        near, far = socket.socketpair()
        link = CheckLink(near, b"")
        protocol = LinkProtocol("server")
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(far))
        answers: list[int] = []
        over = trio.Event()

        async def serve() -> None:
            while True:
                for event in protocol.receive(await stream.receive_some(4096)):
                    if isinstance(event, Hello):
                        protocol.send(WELCOME)
                        protocol.ping(7)
                    elif isinstance(event, Pong):
                        answers.append(event.number)
                    elif isinstance(event, PeerClosed):
                        over.set()
                        return
                for part in protocol.pull(4096, 0.0, 0.0):
                    await stream.send_all(part)

        nursery.start_soon(serve)
        await link.greet("s" * 22)
        await link.ping()
        await link.silence(0.01)
        assert not link.disturbed, "what came before the silence does not count"
        protocol.ping(8)
        for part in protocol.pull(4096, 0.0, 0.0):
            await stream.send_all(part)
        await link.silence(0.05)
        assert link.disturbed
        await link.close()
        with trio.fail_after(20):
            await over.wait()
        assert answers == [7, 8]
        await stream.aclose()

    async def test_closing_what_is_broken(self) -> None:
        near, far = socket.socketpair()
        link = CheckLink(near, b"")
        far.close()
        with pytest.raises(ClosedByPeerError, match="the connection broke"):
            await link.greet("s" * 22)
        await link.close()
        assert near.fileno() == -1

    async def test_the_end_and_a_reset_instead_of_a_welcome(self) -> None:
        near, far = socket.socketpair()
        far.shutdown(socket.SHUT_WR)
        link = CheckLink(near, b"")
        with pytest.raises(ClosedByPeerError, match="the connection was closed"):
            await link.greet("s" * 22)
        far.close()
        await link.close()
        near, far = socket.socketpair()
        link = CheckLink(near, b"")
        link._protocol.ping(1)
        await link._flush()
        far.close()  # with the ping unread, which makes it a reset
        with pytest.raises(ClosedByPeerError, match=r"the connection broke: Connection reset"):
            await link.silence(5)
        await link.close()

    async def test_after_a_ping_that_was_cut_short(self) -> None:
        near, far = socket.socketpair()
        link = CheckLink(near, b"")
        near.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                near.send(bytes(65536))
        with trio.move_on_after(0.01):
            await link.ping()
        with pytest.raises(ClosedByPeerError, match="cannot be used any more"):
            await link.ping()
        far.close()
        await link.close()

    async def test_a_goodbye_that_does_not_arrive(self) -> None:
        near, far = socket.socketpair()
        link = CheckLink(near, b"")
        far.close()
        await link.close()
        assert near.fileno() == -1


class TestInterrupted:
    async def test_what_is_known_is_told(self, nursery: trio.Nursery, around: Any) -> None:
        server: Any = await TunnelServer(welcome=None).start(nursery)
        server_url = url(server.port)
        config = ClientConfig(url=server_url, proxies=Proxies())
        told: list[str] = []
        report = Report("ws://server/", secrets_of(config, server_url), lambda step: told.append(step.step))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(
                    Check(config, server_url, why="why", report=report, relays=Relays(), surroundings=around()).run
                )
                while not server.hellos:
                    await trio.sleep(0.01)
                scope.cancel()
        assert told == ["name", "route", "proxy", "tcp", "tls", "http", "authentication"]
        assert not report.ok
        assert report.exit_code == 1
        assert json.loads(report.as_json())["interrupted"] is True
        assert Layout("utf-8").summary(report) == "interrupted"

    async def test_in_the_middle_of_a_dial(
        self, nursery: trio.Nursery, around: Any, certificates: Certificates
    ) -> None:
        reached = trio.Event()

        async def hold(stream: Any) -> None:
            await server.read_head(stream)
            if server.heads[-1]:
                reached.set()
                await trio.sleep_forever()

        server = await FakeServer(hold, certificates.server).start(nursery)
        server_url = url(server.port, "wss")
        config = ClientConfig(url=server_url, proxies=Proxies(), pins=(certificates.pin,))
        report = Report("wss://server/")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(
                    Check(config, server_url, why="why", report=report, relays=Relays(), surroundings=around()).run
                )
                await reached.wait()
                scope.cancel()
        assert [step.step for step in report.steps] == ["name", "route", "proxy", "tcp", "tls"]


class PathLink:
    """A link over a path with an idle timeout, in Trio's time. Stands where `CheckLink` does.

    Args:
        path: the path it goes over.
    """

    def __init__(self, path: Way) -> None:
        self.path = path
        self.disturbed = False
        self.last = trio.current_time()
        self.end = self.last + path.life
        self.closed = False

    def _gone_at(self) -> float:
        return min(self.last + self.path.timeout, self.end)

    async def silence(self, seconds: float) -> None:
        if seconds == self.path.doomed:
            self.end = trio.current_time() + 1.3
        self.disturbed = self.path.noise < seconds
        end = trio.current_time() + seconds
        if self.path.says_so and self._gone_at() < end:
            await trio.sleep_until(self._gone_at())
            raise ClosedByPeerError("the connection was closed")
        await trio.sleep_until(end)

    async def ping(self) -> float:
        if self._gone_at() <= trio.current_time():
            if self.path.says_so:
                raise ClosedByPeerError("the connection broke")
            await trio.sleep(limits.PONG_WITHIN_SECONDS)
            raise NetworkError("tunnel", "a ping was not answered within 10 s")
        await trio.sleep(0.02)
        self.last = trio.current_time()
        return 0.02

    async def close(self) -> None:
        self.closed = True


class Way:
    """What all links go over.

    Args:
        timeout: seconds of silence after which a link is gone.
        says_so: it is closed; else nothing is heard any more.
        life: seconds after which every link is gone.
        granted: seconds for which the server keeps quiet.
        noise: seconds after which the server is heard all the same.
        failing: dials that fail from this one on.
        doomed: the link that is to be silent for so long goes early, for a reason of its own.
    """

    def __init__(
        self,
        timeout: float = float("inf"),
        *,
        says_so: bool = True,
        life: float = float("inf"),
        granted: int = 3600,
        noise: float = float("inf"),
        failing: float = float("inf"),
        doomed: float | None = None,
    ) -> None:
        self.timeout, self.says_so, self.life = timeout, says_so, life
        self.granted, self.noise, self.failing = granted, noise, failing
        self.doomed = doomed
        self.asked: list[int] = []
        self.links: list[PathLink] = []

    async def connect(self, quiet: int) -> tuple[Any, int]:
        self.asked.append(quiet)
        await trio.lowlevel.checkpoint()
        if len(self.asked) > self.failing:
            raise NetworkError("tcp", "connection refused")
        self.links.append(PathLink(self))
        return self.links[-1], min(quiet, self.granted)

    async def measure(self, longest: float, *, within: float = math.inf) -> dict[str, Step]:
        idle = Idle(self.connect, longest)
        with trio.move_on_after(within):
            await idle.run()
        assert all(link.closed for link in self.links)
        steps = idle.steps()
        assert all(members(step.evidence) <= documented()[step.step] for step in steps)
        return {step.step: step for step in steps}


class TestIdle:
    async def test_no_timeout(self, autojump_clock: MockClock) -> None:
        path = Way()
        began = trio.current_time()
        steps = await path.measure(180)
        assert trio.current_time() - began == pytest.approx(180, abs=1)
        assert steps["idle"].ok
        assert "lived for 3 min" in steps["idle"].text
        assert steps["idle"].evidence["at_most"] is None
        assert steps["keepalive"].ok
        assert steps["keepalive"].evidence["seconds"] > 160
        assert min(path.asked) > 13
        assert path.asked[0] > 180, "the server keeps quiet for longer than that"

    @pytest.mark.parametrize("says_so", [True, False])
    @pytest.mark.parametrize(("timeout", "least", "most"), [(40, 30, 45), (60.5, 60, 90), (13.5, 10, 14)])
    async def test_a_timeout_is_found_between_two_silences(
        self, autojump_clock: MockClock, timeout: float, least: float, most: float, says_so: bool
    ) -> None:
        began = trio.current_time()
        steps = await Way(timeout, says_so=says_so).measure(180)
        step = steps["idle"]
        assert step.evidence["at_least"] == least
        if says_so:
            assert step.evidence["at_most"] == pytest.approx(timeout, abs=0.1)
            assert f"after {duration(timeout)}" in step.text
        else:
            assert step.evidence["at_most"] == most
            assert f"after between {duration(least)} and {duration(most)}" in step.text
        enough = least > 13
        assert step.ok is enough
        assert f"keepalive of 13 s is {'enough' if enough else 'not enough'}" in step.text
        assert (step.next is None) is enough
        asked = 1 if says_so else 2 * limits.PONG_WITHIN_SECONDS  # another one is asked, too
        assert trio.current_time() - began <= (timeout if says_so else most) + asked + 1, "no longer than it takes"
        if timeout > 13.5:
            assert steps["keepalive"].ok

    async def test_shorter_than_the_keepalive(self, autojump_clock: MockClock) -> None:
        steps = await Way(5.5).measure(8)
        step = steps["idle"]
        assert not step.ok
        assert "after 5.5 s" in step.text
        assert "not enough" in step.text
        assert step.next is not None and "15 s" in step.next
        assert step.evidence["at_least"] == 5

    async def test_shorter_than_the_shortest(self, autojump_clock: MockClock) -> None:
        step = (await Way(1.5, says_so=False).measure(8))["idle"]
        assert "after less than 2 s" in step.text

    async def test_a_path_that_ends_every_connection(self, autojump_clock: MockClock) -> None:
        step = (await Way(life=20.5).measure(60))["idle"]
        assert not step.ok
        assert "not silent ended, too" in step.text

    async def test_silent_death_of_every_connection(self, autojump_clock: MockClock) -> None:
        step = (await Way(life=20.5, says_so=False).measure(60))["idle"]
        assert not step.ok
        assert "not silent ended, too" in step.text

    async def test_a_death_that_the_lively_one_has_not_noticed_yet(self, autojump_clock: MockClock) -> None:
        step = (await Way(life=29.99, says_so=False).measure(60))["idle"]
        assert not step.ok
        assert "not silent ended, too" in step.text

    async def test_a_server_that_does_not_keep_quiet(self, autojump_clock: MockClock) -> None:
        """One of an earlier version grants nothing, and pings after 15 s."""
        began = trio.current_time()
        step = (await Way(granted=0, noise=15).measure(60))["idle"]
        assert step.ok
        assert step.evidence["at_least"] == 14
        assert "longer silences could not be measured, since the server pings by itself" in step.text
        assert trio.current_time() - began < 20

    async def test_noise_all_the_same(self, autojump_clock: MockClock) -> None:
        step = (await Way(noise=15).measure(20))["idle"]
        assert step.evidence["at_least"] == 14
        assert "since not all of them could be made and left silent" in step.text

    async def test_links_that_cannot_be_made(self, autojump_clock: MockClock) -> None:
        step = (await Way(failing=1).measure(20))["idle"]
        assert not step.ok
        assert step.text == "nothing could be measured: connection refused"
        with pytest.raises(WstunnelError):
            await Way(failing=0).measure(20)

    @pytest.mark.parametrize("says_so", [True, False])
    @pytest.mark.parametrize("doomed", [2, 20, 30])
    async def test_one_that_ends_for_a_reason_of_its_own(
        self, autojump_clock: MockClock, doomed: float, says_so: bool
    ) -> None:
        """The next one is asked at once, and lives: so it was not silence. It counts for as long as it was silent."""
        step = (await Way(doomed=doomed, says_so=says_so).measure(60))["idle"]
        assert step.ok, step.text
        assert (step.evidence["at_least"], step.evidence["at_most"]) == (60, None)
        (problem,) = step.evidence["problems"]
        assert "and one that was silent for longer lived" in problem

    @pytest.mark.parametrize("says_so", [True, False])
    async def test_one_that_ends_early_does_not_hide_the_timeout(
        self, autojump_clock: MockClock, says_so: bool
    ) -> None:
        evidence = (await Way(40, doomed=14, says_so=says_so).measure(180))["idle"].evidence
        least, most = (30, 40) if says_so else (24, 45)  # the next one was asked early
        assert evidence["at_least"] == pytest.approx(least, abs=0.1)
        assert evidence["at_most"] == pytest.approx(most, abs=0.1)

    async def test_interrupted(self, autojump_clock: MockClock) -> None:
        """What is known by then is told."""
        steps = await Way().measure(3600, within=31)
        assert list(steps) == ["keepalive", "idle"]
        assert steps["idle"].ok
        assert steps["idle"].evidence["at_least"] == 30
        assert "longer silences could not be measured, since it was interrupted" in steps["idle"].text
        assert await Way().measure(3600, within=1) == {}
        step = (await Way(5.5, says_so=False).measure(60, within=21))["idle"]
        assert (step.evidence["at_least"], step.evidence["at_most"]) == (5, 10)

    async def test_in_a_whole_check(self, nursery: trio.Nursery, around: Any) -> None:
        granting = Welcome(version=1, server=SERVER_ID, boot=BOOT_ID, quiet=100, features=list(FEATURES))
        server: Any = await TunnelServer(welcome=granting, late_ping=True).start(nursery)
        report = await checked(url(server.port), around(), idle=1)
        assert report.ok
        assert named(report, "idle").evidence["at_least"] == 1
        first, *others = server.hellos
        assert first.quiet == 0
        assert others and all(hello.quiet > 13 for hello in others)
        assert {hello.session for hello in server.hellos} == {first.session}

    async def test_a_server_that_goes_in_between(self, nursery: trio.Nursery, around: Any) -> None:
        server: Any = await TunnelServer().start(nursery)

        async def connect(family: socket.AddressFamily, sockaddr: SocketAddress) -> socket.socket:
            if server.hellos:
                raise OSError(111, "Connection refused")
            return await connect_socket(family, sockaddr)

        step = failure(await checked(url(server.port), around(connect=connect), idle=1))
        assert step.step == "idle"
        assert "connection refused" in step.text

    def test_which_silences(self) -> None:
        assert silences(1) == [1]
        assert silences(8) == [2, 5, 8]
        assert silences(14) == [2, 5, 10, 14]
        assert silences(IDLE_SECONDS_MAX)[-1] == IDLE_SECONDS_MAX == 3600
        assert IDLE_SECONDS_MAX + GRACE_SECONDS < QUIET_SECONDS, "the server grants what we ask for"
        assert list(SILENCES) == sorted(set(SILENCES))
        assert any(limits.CLIENT_PING_AFTER_SECONDS < each < limits.PING_AFTER_SECONDS for each in SILENCES)

    def test_bounds(self) -> None:
        lived = [Silence(2, True), Silence(5, True)]
        dead = Silence(10, False)
        assert bounds([]) == (0, None)
        assert bounds(lived) == (5, None)
        assert bounds([*lived, dead, Silence(30, False, ended=7.0)]) == (5, Silence(30, False, ended=7.0))
        assert bounds([*lived, Silence(4, False), Silence(3, False)]) == (5, None), "another lived longer"
        assert is_settled(lived, set())
        assert not is_settled(lived, {10})
        other = Silence(14, False)
        assert not is_settled([dead, other], {5})
        assert is_settled([dead, other], {20})
        assert not is_settled([dead], {20}), "one alone may have ended for another reason"
        assert is_settled([dead], set())


class TestReport:
    def test_nothing_fails_and_it_did_not_finish(self) -> None:
        report = Report("ws://x/")
        report.add(Step("name", True, "found"))
        assert (report.ok, report.exit_code) == (False, 1)
        report.finished = True
        assert (report.ok, report.exit_code) == (True, 0)
        report.add(Step("tcp", False, "refused", {}, "start it"))
        assert (report.ok, report.exit_code) == (False, 1)
        assert Layout("utf-8").step(report.steps[-1]) == f"  ✗ tcp{'':13}refused\n{'':20}→ start it"
        assert Layout("latin-1").step(report.steps[-1]) == f"  FAIL tcp{'':13}refused\n{'':23}-> start it"
        assert Layout("utf-8").summary(report) == "not well: tcp"
        report.refused = True
        assert report.exit_code == 3

    def test_secrets_are_hidden_wherever_they_are(self) -> None:
        report = Report("ws://x/", ("s3cret",))
        report.add(Step("http", True, "a s3cret", {"a": ["s3cret", {"b": "xs3cretx"}], "n": 1}, "no s3cret"))
        assert "s3cret" not in report.as_json()
        assert report.steps[0].evidence == {"a": [HIDDEN, {"b": f"x{HIDDEN}x"}], "n": 1}

    def test_what_an_encoding_cannot_say(self) -> None:
        assert "\\u540d" in Layout("ascii").step(Step("name", True, "名 …"))
        assert Layout("no-such-encoding").step(Step("name", True, "x")).startswith("  ok ")

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0.0004, "0.4 ms"), (0.012, "12 ms"), (1.25, "1.2 s"), (5.0, "5 s"), (5.04, "5 s"), (13, "13 s"), (45, "45 s"),
         (60, "60 s"), (90, "90 s"), (180, "3 min"), (200, "200 s")],
    )  # fmt: skip
    def test_durations(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text


class TestQuietServer:
    """`hello.quiet`: the server does not ping first for so long."""

    @pytest.mark.parametrize(("quiet", "granted"), [(0, 0), (10, 10), (100, 100), (10**6, 7200)])
    async def test_it_keeps_quiet(
        self, make_world: Callable[..., Any], mock_clock: MockClock, quiet: int, granted: int
    ) -> None:
        world = make_world()
        peer = Peer(world)
        (welcome,) = await peer.send(hello(quiet=quiet))
        assert isinstance(welcome, Welcome)
        assert welcome.quiet == granted

        async def count(seconds: float) -> int:
            """Pings that came when so much time had passed. None is answered."""
            mock_clock.jump(seconds)
            await world.settle()
            received = bytes(peer.near.incoming.arrived)
            peer.near.incoming.arrived.clear()
            return received.count(b'"type":"ping"')

        wait = max(granted, 15)
        peer.near.send(b"\x8a\x80\x00\x00\x00\x00")  # a pong that nobody asked for: some byte, then silence
        assert await count(0) == 0
        assert await count(wait - 1) == 0
        assert await count(1.5) == 1
