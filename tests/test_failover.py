"""failover.py: which of several servers is dialled when."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.roles import LogLines, lines, tcp_pair
from tests.test_dialler import TOKEN
from wstunnel import failover
from wstunnel.auth import LoginUrl
from wstunnel.config import ClientConfig
from wstunnel.errors import LocalError, NetworkError, ServerRefusedError, TrustError
from wstunnel.failover import STAY_SECONDS, Failover, make_dialler
from wstunnel.tls_relay import Relays
from wstunnel.upstream import Proxies, ProxyUrl

__all__ = ["lines"]  # a fixture

AWAY = NetworkError("tcp", "nobody there")


class FakeServer:
    """A dialler whose dials fail with `error`, or succeed after `seconds`."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.url = LoginUrl("wss", name, 443, "/", TOKEN)
        self.error = error
        self.seconds = 0.0
        self.dials = 0
        self.far: list[socket.socket] = []

    async def dial(self) -> tuple[socket.socket, bytes]:
        self.dials += 1
        error = self.error
        await trio.sleep(self.seconds)
        if error is not None:
            raise error
        near, far = tcp_pair()
        self.far.append(far)
        return near, b""

    def close(self) -> None:
        for sock in self.far:
            sock.close()


@pytest.fixture
def servers() -> Any:
    made = [FakeServer(name) for name in ("a", "b", "c")]
    yield made
    for server in made:
        server.close()


def dials(servers: list[FakeServer]) -> list[int]:
    return [server.dials for server in servers]


async def test_the_first_that_is_there(servers: Any, lines: LogLines) -> None:
    servers[0].error = AWAY
    dialler = Failover(servers)
    assert dialler.url.host == "a"
    sock, _ = await dialler.dial()
    assert dialler.url.host == "b"
    again, _ = await dialler.dial()
    assert dials(servers) == [1, 2, 0]
    [line] = lines("trying the next server")
    assert (line["left"], line["server"]) == ("wss://***@a/", "wss://***@b/")
    sock.close()
    again.close()


async def test_one_round_and_then_the_error(servers: Any) -> None:
    for server in servers:
        server.error = AWAY
    dialler = Failover(servers)
    with pytest.raises(NetworkError, match="nobody there"):
        await dialler.dial()
    assert dials(servers) == [1, 1, 1]
    assert dialler.url.host == "a"


@pytest.mark.parametrize("count", [2, 3])
async def test_each_servers_reason_is_told_once(
    servers: Any, lines: LogLines, caplog: pytest.LogCaptureFixture, count: int
) -> None:
    caplog.set_level(logging.INFO, logger="wstunnel")
    for server in servers:
        server.error = NetworkError("tcp", f"{server.url.host} is away")
    dialler = Failover(servers[:count])
    for _ in range(3):
        with pytest.raises(NetworkError):
            await dialler.dial()
    told = [line["reason"] for line in lines("trying the next server")]
    assert told == [f"{server.url.host} is away" for server in servers[:count]]


async def test_only_the_first_of_many_rounds_is_told(servers: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="wstunnel")
    for server in servers:
        server.error = AWAY
    dialler = Failover(servers)
    for _ in range(3):
        with pytest.raises(NetworkError):
            await dialler.dial()
    assert len(caplog.records) == 3
    servers[0].error = None
    (await dialler.dial())[0].close()
    servers[0].error = AWAY
    servers[1].error = None
    (await dialler.dial())[0].close()
    assert len(caplog.records) == 4


async def test_it_stays_while_a_link_lives(servers: Any) -> None:
    dialler = Failover(servers)
    sock, _ = await dialler.dial()
    servers[0].error = AWAY
    with pytest.raises(NetworkError):
        await dialler.dial()
    dialler.failed(AWAY)
    assert (dialler.url.host, dials(servers)) == ("a", [2, 0, 0])
    sock.close()  # as the link does that had it
    other, _ = await dialler.dial()
    assert dialler.url.host == "b"
    other.close()


async def test_streams_that_only_it_can_resume_keep_it_for_a_while(servers: Any, mock_clock: MockClock) -> None:
    dialler = Failover(servers)
    dialler.streams_wait = lambda: True
    (await dialler.dial())[0].close()
    servers[0].error = AWAY
    servers[1].error = AWAY
    for _ in range(3):
        with pytest.raises(NetworkError):
            await dialler.dial()
        mock_clock.jump(STAY_SECONDS / 4)
    assert dials(servers) == [4, 0, 0]
    mock_clock.jump(STAY_SECONDS)
    sock, _ = await dialler.dial()  # past b, which has none of the streams and is not stayed with
    assert dialler.url.host == "c"
    sock.close()


async def test_when_its_time_is_over_each_dial_is_a_round(servers: Any, mock_clock: MockClock) -> None:
    dialler = Failover(servers)
    dialler.streams_wait = lambda: True
    (await dialler.dial())[0].close()
    for server in servers:
        server.error = AWAY
    with pytest.raises(NetworkError):
        await dialler.dial()
    mock_clock.jump(STAY_SECONDS)
    for _ in range(2):
        with pytest.raises(NetworkError):
            await dialler.dial()
    assert dials(servers) == [4, 2, 2]


async def test_dials_at_once_end_at_one_server(servers: Any, mock_clock: MockClock) -> None:
    """One is slow and gets through after another has moved on."""
    dialler = Failover(servers)
    got: list[socket.socket] = []

    async def dial() -> None:
        got.append((await dialler.dial())[0])

    async with trio.open_nursery() as nursery:
        servers[0].seconds = 2.0
        nursery.start_soon(dial)
        await wait_all_tasks_blocked()
        servers[0].seconds, servers[0].error = 1.0, AWAY
        for _ in range(3):
            nursery.start_soon(dial)
        await wait_all_tasks_blocked()
        mock_clock.jump(1.1)
        await wait_all_tasks_blocked()
        assert dialler.url.host == "b"
        mock_clock.jump(1.1)
    peers = {far.getsockname() for far in servers[1].far}
    assert len(got) == 4
    assert {sock.getpeername() for sock in got} <= peers
    assert dials(servers) == [4, 4, 0]
    for sock in got:
        sock.close()


async def test_a_refusal_is_no_absence(servers: Any) -> None:
    servers[0].error = ServerRefusedError("no")
    with pytest.raises(ServerRefusedError):
        await Failover(servers).dial()
    assert dials(servers) == [1, 0, 0]


@pytest.mark.parametrize("order", [0, 1])
async def test_who_cannot_prove_itself_ends_it_only_if_all_do(servers: Any, order: int) -> None:
    errors = [TrustError("who?"), AWAY, TrustError("who?")]
    for server, error in zip(servers, errors[order:] + errors[:order], strict=True):
        server.error = error
    with pytest.raises(NetworkError) as caught:
        await Failover(servers).dial()
    assert caught.value is AWAY
    for server in servers:
        server.error = TrustError("who?")
    with pytest.raises(TrustError):
        await Failover(servers).dial()


async def test_of_no_use(servers: Any) -> None:
    """It answers the upgrade, and ends the link at once."""
    dialler = Failover(servers)
    (await dialler.dial())[0].close()
    dialler.failed(AWAY)
    sock, _ = await dialler.dial()
    assert dialler.url.host == "b"
    sock.close()


async def test_one_server_is_never_left() -> None:
    server: Any = FakeServer("a", AWAY)
    dialler = Failover([server])
    with pytest.raises(NetworkError):
        await dialler.dial()
    dialler.failed(AWAY)
    assert (dialler.url.host, server.dials) == ("a", 1)


class TestConfiguration:
    A = LoginUrl("wss", "a", 443, "/", TOKEN, (bytes(32),))
    B = LoginUrl("ws", "b", 80, "/", TOKEN)

    def made(self, **changes: Any) -> list[Any]:
        return make_dialler(ClientConfig(url=self.A, fallbacks=(self.B,), **changes), Relays())._diallers

    def test_each_server_has_its_own(self) -> None:
        proxies = Proxies(wss=ProxyUrl("http", "p", 1), ws=ProxyUrl("https", "q", 2))
        a, b = self.made(proxies=proxies, server_name="n", ip_version=6)
        assert (a.url, b.url) == (self.A, self.B)
        assert (a._pins, b._pins) == ((bytes(32),), ())
        assert (a._context is None, b._context is None) == (False, True)
        assert (a._proxy.proxy.host, a._proxy.context) == ("p", None)
        assert b._proxy.proxy.host == "q"
        assert b._proxy.context.check_hostname  # pins are the server's
        assert a._server_name == "n"
        assert a._family is b._proxy.family is socket.AF_INET6

    def test_without_any(self) -> None:
        a, b = self.made(ip_version=4)
        assert a._proxy is b._proxy is None
        assert a._family is socket.AF_INET
        assert self.made()[0]._family is None

    def test_bypassed(self) -> None:
        a, b = self.made(proxies=Proxies(ProxyUrl("http", "p", 1), ProxyUrl("http", "p", 1), "a"))
        assert a._proxy is None
        assert b._proxy is not None

    def test_a_library_that_is_missing_is_told_at_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing() -> None:
            raise LocalError("pip install")

        monkeypatch.setattr(failover, "check_socks", missing)
        with pytest.raises(LocalError):
            self.made(proxies=Proxies(ProxyUrl("socks5", "p", 1)))
        assert self.made(proxies=Proxies())

    def test_a_ca_file_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(LocalError):
            self.made(ca=tmp_path / "x", proxies=Proxies(ws=ProxyUrl("https", "q", 2)))
