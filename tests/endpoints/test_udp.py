"""endpoints/udp.py and endpoints/socks_udp.py on real sockets: addresses, errors of the kernel, SOCKS5's relay."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.datagrams import MemoryDatagrams
from tests.roles import (
    LogLines,
    RunningClient,
    connecting,
    descriptors,
    free_port,
    invite,
    lines,
    ready,
    serving,
    until,
)
from wstunnel import client as client_module
from wstunnel import server as server_module
from wstunnel import sockets
from wstunnel.auth import Token
from wstunnel.endpoints import dynamic, tcp
from wstunnel.endpoints.listeners import listen
from wstunnel.endpoints.udp import UdpListener, _destination
from wstunnel.errors import LocalError
from wstunnel.forwards import parse_dynamic, parse_forward, parse_reverse
from wstunnel.link import DATAGRAMS_LOWAT, NOTSENT_LOWAT
from wstunnel.policy import parse_listen_rule, parse_rule
from wstunnel.wire import socks

__all__ = ["lines"]

SECONDS = 10.0
HAS_IPV6 = False

with suppress(OSError, LocalError), tcp.bind("::1", 0):
    HAS_IPV6 = True
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")
Address = tuple[str, int]


class Echo:
    """A UDP server that answers in capitals. `peers` are the addresses that it saw."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = trio.socket.socket(family, socket.SOCK_DGRAM)
        self.host = host
        self.port = 0
        self.peers: dict[Any, None] = {}

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        with self.sock:
            await self.sock.bind((self.host, 0))
            self.port = self.sock.getsockname()[1]
            task_status.started()
            while True:
                data, address = await self.sock.recvfrom(70_000)
                self.peers[address] = None
                await self.sock.sendto(data.upper(), address)


@asynccontextmanager
async def echo(host: str = "127.0.0.1") -> AsyncIterator[Echo]:
    server = Echo(host)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        yield server
        nursery.cancel_scope.cancel()


async def ask(port: int, data: bytes = b"ping", host: str = "127.0.0.1", *, seconds: float = SECONDS) -> bytes:
    """Send one datagram from a connected socket, which hears only from the address that it asked."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with trio.socket.socket(family, socket.SOCK_DGRAM) as sock, trio.fail_after(seconds):
        await sock.connect((host, port))
        await sock.send(data)
        return await sock.recv(70_000)


class TestForwards:
    async def test_datagrams_of_every_size(self, tmp_path: Path) -> None:
        async with echo() as target, serving(tmp_path) as server:
            specs = f"0:127.0.0.1:{target.port}/udp", f"0:localhost:{target.port}/udp"
            async with connecting(server.url, *specs) as client:
                for port in client.ports:
                    for size in (0, 1, 125, 126, 1420, 9000, 65_507):
                        assert await ask(port, b"x" * size) == b"X" * size
                assert len(target.peers) == 14  # each source is a flow of its own
                assert len(client.session.flows) == 14
            await until(lambda: not server.sessions())

    async def test_nothing_is_left(self, tmp_path: Path) -> None:
        async with echo() as target, serving(tmp_path) as server:
            before = descriptors()
            async with connecting(server.url, f"0:127.0.0.1:{target.port}/udp") as client:
                for _ in range(5):
                    await ask(client.ports[0])
            await until(lambda: descriptors() <= before)

    @pytest.mark.parametrize("bind", ["*", "0.0.0.0"])
    async def test_answers_come_from_the_address_that_was_asked(self, tmp_path: Path, bind: str) -> None:
        async with (
            echo() as target,
            serving(tmp_path) as server,
            connecting(server.url, f"{bind}:0:127.0.0.1:{target.port}/udp") as client,
        ):
            assert await ask(client.ports[0], host="127.0.0.2") == b"PING"
            assert await ask(client.ports[0], host="127.0.0.1") == b"PING"

    @needs_ipv6
    async def test_ipv6(self, tmp_path: Path) -> None:
        async with echo("::1") as target, serving(tmp_path) as server:
            spec = f"0:[::1]:{target.port}/udp"
            async with connecting(server.url, f"[::1]:{spec}", f"*:{spec}", f"localhost:{spec}") as client:
                assert len(client.ports) == 5
                for address in client.addresses:
                    if address.startswith("["):
                        assert await ask(int(address.rsplit(":", 1)[1]), host="::1") == b"PING"

    @needs_ipv6
    async def test_one_that_only_ipv6_can_carry(self, tmp_path: Path, lines: LogLines) -> None:
        """More than the protocol has room for: it is lost, and its flow goes on."""
        async with (
            echo("::1") as target,
            serving(tmp_path) as server,
            connecting(server.url, f"[::1]:0:[::1]:{target.port}/udp") as client,
        ):
            with trio.socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock, trio.fail_after(SECONDS):
                await sock.connect(("::1", client.ports[0]))
                for size in (65_507, 65_508, 65_527, 3):
                    await sock.send(b"x" * size)
                    if size <= 65_507:
                        assert await sock.recv(70_000) == b"X" * size
            (flow,) = client.session.flows._flows.values()
            assert flow.lost() == 2
            assert not lines("fault in our own code")

    async def test_nobody_listens_and_then_somebody_does(self, tmp_path: Path, lines: LogLines) -> None:
        port = free_port()
        async with serving(tmp_path) as server, connecting(server.url, f"0:127.0.0.1:{port}/udp") as client:
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                await sock.connect(("127.0.0.1", client.ports[0]))
                await sock.send(b"one")
                await until(lambda: lines("flow ended", "client"))
                assert lines("flow ended", "client")[0]["reason"] == "refused"
                with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as late:
                    await late.bind(("127.0.0.1", port))
                    with trio.fail_after(SECONDS):
                        data = b""
                        while data != b"again":
                            await sock.send(b"again")
                            with trio.move_on_after(0.2):
                                data = await late.recv(100)

    @pytest.mark.skipif(sys.platform != "linux", reason="an option of Linux")
    async def test_the_kernel_holds_back_little(self, tmp_path: Path) -> None:
        """What it has taken can be dropped no more: behind a slow path it would be seconds late."""
        unsent = socket.IPPROTO_TCP, sockets._LINUX_TCP_NOTSENT_LOWAT
        async with (
            echo() as target,
            serving(tmp_path) as server,
            connecting(server.url, f"0:127.0.0.1:{target.port}/udp", idle_links=0) as client,
        ):
            for _ in range(2):  # a link that was dialled for the flow, and one that was idle
                assert await ask(client.ports[0]) == b"PING"
                flows = [*client.session.flows._flows.values(), *server.sessions()[0].flows._flows.values()]
                held = [flow.link.sock for flow in flows if flow.link is not None]
                assert [sock.getsockopt(*unsent) for sock in held] == [DATAGRAMS_LOWAT] * 2
                flows[0].reset("idle", "")
                await until(lambda: not client.session.flows and not server.sessions()[0].flows)
                assert [sock.getsockopt(*unsent) for sock in held] == [NOTSENT_LOWAT] * 2

    async def test_a_policy_for_udp(self, tmp_path: Path, lines: LogLines) -> None:
        async with echo() as target:
            allow = (parse_rule(f"udp:localhost:{target.port}"), parse_rule("tcp:*:*"))
            async with serving(tmp_path, allow=allow) as server:
                specs = f"0:localhost:{target.port}/udp", f"0:127.0.0.1:{target.port}/udp"
                async with connecting(server.url, *specs) as client:
                    assert await ask(client.ports[0]) == b"PING"
                    with pytest.raises(trio.TooSlowError):
                        await ask(client.ports[1], seconds=0.3)
                    assert lines("flow refused", "client")[0]["reason"] == "forbidden"
                    assert len(target.peers) == 1

    async def test_what_the_flags_say_is_what_the_sessions_keep(self, tmp_path: Path) -> None:
        async with (
            serving(tmp_path, udp_timeout=7) as server,
            connecting(server.url, "0:127.0.0.1:9/udp", udp_timeout=5) as client,
        ):
            await ready(client)
            assert client.session.flows.timeout == 5
            assert [session.flows.timeout for session in server.sessions()] == [7]

    async def test_a_port_in_use(self) -> None:
        (one,) = listen(parse_forward("0:a:1/udp")[0])
        port = one.sock.getsockname()[1]
        try:
            with pytest.raises(LocalError, match=r"port is in use; stop what uses it \(ss -lunp\)"):
                listen(parse_forward(f"{port}:a:1/udp")[0])
        finally:
            one.close()


class TestReverse:
    async def test_from_the_server_to_the_client(self, tmp_path: Path, lines: LogLines) -> None:
        port = free_port()
        async with echo() as target, serving(tmp_path, allow_listen=(parse_listen_rule("*"),)) as server:
            reverse = parse_reverse(f"{port}:127.0.0.1:{target.port}/udp")
            async with connecting(server.url, reverse_forwards=reverse):
                await until(lambda: lines("listening for a client", "server"))
                assert await ask(port, b"x" * 65_507) == b"X" * 65_507
                assert await ask(port) == b"PING"
            await until(lambda: not server.sessions())
            with pytest.raises((ConnectionRefusedError, trio.TooSlowError)):
                await ask(port, seconds=0.3)


# --- SOCKS ----------------------------------------------------------------------------------------------------------


class Relay:
    """A SOCKS5 client that has asked for a relay."""

    def __init__(self, control: trio.SocketStream, relay: Address, family: int) -> None:
        self.control = control
        self.relay = relay
        self.sock = trio.socket.socket(family, socket.SOCK_DGRAM)

    async def send(self, host: str, port: int, payload: bytes) -> None:
        await self.sock.sendto(socks.build_udp(host, port, payload), self.relay)

    async def receive(self, seconds: float = SECONDS) -> socks.UdpPacket:
        with trio.fail_after(seconds):
            return socks.parse_udp(await self.sock.recv(70_000))


async def associate(proxy: int, host: str = "127.0.0.1", *, port: int = 0) -> tuple[trio.SocketStream, int, Address]:
    """Ask for a relay. Returns the connection, the reply's code and its address."""
    stream = await trio.open_tcp_stream(host, proxy)
    await stream.send_all(b"\5\1\0")
    assert await stream.receive_some(2) == b"\5\0"
    await stream.send_all(b"\5\3\0\1" + bytes(4) + port.to_bytes(2, "big"))
    with trio.fail_after(SECONDS):
        head = await stream.receive_some(4)
        packed = await stream.receive_some(4 if head[3] == 1 else 16)
        number = await stream.receive_some(2)
    family = socket.AF_INET if head[3] == 1 else socket.AF_INET6
    return stream, head[1], (socket.inet_ntop(family, packed), int.from_bytes(number, "big"))


@asynccontextmanager
async def relay(proxy: int, host: str = "127.0.0.1") -> AsyncIterator[Relay]:
    control, code, address = await associate(proxy, host)
    assert code == 0
    assert address[0] == host
    found = Relay(control, address, socket.AF_INET6 if ":" in host else socket.AF_INET)
    async with control:
        await found.sock.bind((host, 0))
        yield found
    found.sock.close()


@asynccontextmanager
async def proxying(tmp_path: Path, bind: str = "0", **changes: Any) -> AsyncIterator[RunningClient]:
    async with (
        serving(tmp_path, **changes) as server,
        connecting(server.url, local_forwards=(parse_dynamic(bind, "socks"),)) as client,
    ):
        await ready(client)
        yield client


class TestSocks:
    async def test_each_destination_is_a_flow(self, tmp_path: Path) -> None:
        async with echo() as one, echo() as two, proxying(tmp_path) as client, relay(client.ports[0]) as it:
            for target in (one, two, one):
                await it.send("127.0.0.1", target.port, b"hello")
                assert await it.receive() == ("127.0.0.1", target.port, b"HELLO")
            assert len(client.session.flows) == 2
            assert len(one.peers) == 1

    async def test_a_name_is_answered_by_the_address_that_it_led_to(self, tmp_path: Path) -> None:
        async with echo() as target, proxying(tmp_path) as client, relay(client.ports[0]) as it:
            await it.send("localhost", target.port, b"hello")
            host, port, payload = await it.receive()
            assert host in ("127.0.0.1", "::1")
            assert (port, payload) == (target.port, b"HELLO")

    @needs_ipv6
    async def test_ipv6(self, tmp_path: Path) -> None:
        async with echo("::1") as target, proxying(tmp_path, "[::1]:0") as client, relay(client.ports[0], "::1") as it:
            await it.send("::1", target.port, b"hello")
            assert await it.receive() == ("::1", target.port, b"HELLO")

    async def test_it_ends_with_the_connection(self, tmp_path: Path, lines: LogLines) -> None:
        async with echo() as target, proxying(tmp_path) as client:
            async with relay(client.ports[0]) as it:
                await it.send("127.0.0.1", target.port, b"hello")
                await it.receive()
            await until(lambda: not client.session.flows)
            with pytest.raises(ConnectionRefusedError):
                await ask(it.relay[1])
            assert lines("flow ended", "client")[0]["reason"] == "shutdown"

    async def test_only_the_client_is_served(self, tmp_path: Path) -> None:
        async with echo() as target, proxying(tmp_path, "*:0") as client, relay(client.ports[0]) as it:
            packet = socks.build_udp("127.0.0.1", target.port, b"strange")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                stranger.bind(("127.0.0.9", 0))
                stranger.sendto(packet, it.relay)
                await it.send("127.0.0.1", target.port, b"hello")
                assert (await it.receive()).payload == b"HELLO"
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as neighbour:
                    neighbour.sendto(packet, it.relay)  # the same machine, another port
                    await it.send("127.0.0.1", target.port, b"again")
                    assert (await it.receive()).payload == b"AGAIN"
            assert len(client.session.flows) == 1
            (flow,) = client.session.flows._flows.values()
            assert flow.state.sent == 2

    async def test_the_port_that_was_asked_for(self, tmp_path: Path) -> None:
        async with echo() as target, proxying(tmp_path) as client:
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as right:
                await right.bind(("127.0.0.1", 0))
                control, code, address = await associate(client.ports[0], port=right.getsockname()[1])
                assert code == 0
                packet = socks.build_udp("127.0.0.1", target.port, b"hello")
                async with control:
                    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wrong:
                        await wrong.sendto(packet, address)
                    await right.sendto(packet, address)
                    with trio.fail_after(SECONDS):
                        assert socks.parse_udp(await right.recv(100)).payload == b"HELLO"
                assert len(target.peers) == 1

    async def test_its_port_is_that_of_its_first_good_datagram(self, tmp_path: Path) -> None:
        async with echo() as target, proxying(tmp_path) as client, relay(client.ports[0]) as it:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as neighbour:
                neighbour.bind(("127.0.0.1", 0))
                neighbour.sendto(b"garbage", it.relay)
            await it.send("127.0.0.1", target.port, b"hello")
            assert (await it.receive()).payload == b"HELLO"

    async def test_a_name_that_leads_elsewhere_later(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = "127.0.0.1"
        real = socket.getaddrinfo

        def resolve(host: str, *args: Any, **options: Any) -> Any:
            return real(found if host == "db.test" else host, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        async with echo() as one, proxying(tmp_path) as client, relay(client.ports[0]) as it:
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two:
                await two.bind(("127.0.0.2", one.port))
                await it.send("db.test", one.port, b"hello")
                assert await it.receive() == ("127.0.0.1", one.port, b"HELLO")
                (flow,) = client.session.flows._flows.values()
                flow.reset("idle", "")
                await until(lambda: not client.session.flows)
                found = "127.0.0.2"
                await it.send("db.test", one.port, b"hello")
                with trio.fail_after(SECONDS):
                    _, address = await two.recvfrom(100)
                    await two.sendto(b"two", address)
                assert await it.receive() == ("127.0.0.2", one.port, b"two")

    async def test_fragments_and_garbage_are_dropped(self, tmp_path: Path) -> None:
        async with echo() as target, proxying(tmp_path) as client, relay(client.ports[0]) as it:
            good = socks.build_udp("127.0.0.1", target.port, b"hello")
            for bad in (b"", b"\0", b"\0\0\1" + good[3:], good[:6], b"\0\0\0\7" + good[4:], socks.udp_header("a", 0)):
                await it.sock.sendto(bad, it.relay)
            await it.sock.sendto(good, it.relay)
            assert (await it.receive()).payload == b"HELLO"
            assert len(target.peers) == 1

    async def test_what_the_server_forbids_is_silence(self, tmp_path: Path, lines: LogLines) -> None:
        async with proxying(tmp_path) as client, relay(client.ports[0]) as it:
            await it.send("169.254.169.254", 53, b"hello")
            await until(lambda: lines("flow refused", "client"))
            assert lines("flow refused", "client")[0]["reason"] == "forbidden"
            with pytest.raises(trio.TooSlowError):
                await it.receive(0.1)

    async def test_a_reply_that_is_too_long_with_its_header(self, tmp_path: Path) -> None:
        async with echo() as target, proxying(tmp_path) as client, relay(client.ports[0]) as it:
            await it.send("127.0.0.1", target.port, b"first")
            await it.receive()
            (peer,) = target.peers
            await target.sock.sendto(bytes(65_507), peer)
            await it.send("127.0.0.1", target.port, b"second")
            assert (await it.receive()).payload == b"SECOND"
            (flow,) = client.session.flows._flows.values()
            assert flow.lost() == 1

    async def test_there_are_not_more_than_some(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dynamic, "ASSOCIATIONS", 1)
        async with proxying(tmp_path) as client:
            async with relay(client.ports[0]):
                control, code, _ = await associate(client.ports[0])
                assert code == 1
                await control.aclose()
            code = 1
            with trio.fail_after(SECONDS):
                while code:  # until the first one's end was noticed
                    control, code, _ = await associate(client.ports[0])
                    await control.aclose()

    async def test_no_user_of_a_server_has_them_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: LogLines
    ) -> None:
        monkeypatch.setattr(dynamic, "PRINCIPAL_ASSOCIATIONS", 1)
        one, two = free_port(), free_port()
        async with serving(tmp_path, allow_listen=(parse_listen_rule("*"),)) as server:
            other = replace(server.url, token=Token.parse(invite(tmp_path, "bob")))
            async with (
                connecting(server.url, reverse_forwards=parse_reverse(str(one))),
                connecting(other, reverse_forwards=parse_reverse(str(two))),
            ):
                await until(lambda: len(lines("listening for a client", "server")) == 2)
                async with relay(one), relay(two):
                    control, code, _ = await associate(one)
                    assert code == 1
                    await control.aclose()
                    assert [line["reason"] for line in lines("no relay for datagrams")] == [
                        "too many relays for datagrams of this user"
                    ]

    async def test_who_is_silent_is_asked_whether_he_is_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A machine that was switched off says no end."""
        asked: list[tuple[Any, int]] = []
        monkeypatch.setattr(
            sockets, "ask_when_silent", lambda sock, seconds: asked.append((sock.getpeername(), seconds))
        )
        async with proxying(tmp_path) as client, relay(client.ports[0]) as it:
            assert asked == [(it.control.socket.getsockname(), dynamic.SILENT_SECONDS)]

    async def test_a_server_that_knows_no_udp(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server_module, "FEATURES", ("resume", "drain", "reverse"))
        async with proxying(tmp_path) as client:
            control, code, _ = await associate(client.ports[0])
            assert code == 7  # command not supported
            await control.aclose()

    async def test_at_the_server(self, tmp_path: Path, lines: LogLines) -> None:
        """`-R PORT` is a SOCKS proxy at the server: datagrams go out from the client."""
        port = free_port()
        async with (
            echo() as target,
            serving(tmp_path, allow_listen=(parse_listen_rule("*"),)) as server,
            connecting(server.url, reverse_forwards=parse_reverse(str(port))) as client,
        ):
            await until(lambda: lines("listening for a client", "server"))
            async with relay(port) as it:
                await it.send("127.0.0.1", target.port, b"hello")
                assert await it.receive() == ("127.0.0.1", target.port, b"HELLO")
                (flow,) = client.session.flows._flows.values()
                assert flow.state.egress

    async def test_the_place_is_taken_over(self, tmp_path: Path, lines: LogLines) -> None:
        """By the same user's next client: the relays of the first one's applications go on with it."""
        reverse = parse_reverse(str(free_port()))
        async with (
            echo() as target,
            serving(tmp_path, allow_listen=(parse_listen_rule("*"),)) as server,
            connecting(server.url, reverse_forwards=reverse) as one,
        ):
            await until(lambda: lines("listening for a client", "server"))
            async with relay(reverse[0].port) as it:
                await it.send("127.0.0.1", target.port, b"hello")
                assert (await it.receive()).payload == b"HELLO"
                async with connecting(server.url, reverse_forwards=reverse) as two:
                    await until(lambda: len(lines("listening for a client", "server")) == 2)
                    one.shutdown.set()
                    await until(lambda: not one.session.flows and len(server.sessions()) == 1)
                    await it.send("127.0.0.1", target.port, b"again")
                    assert (await it.receive()).payload == b"AGAIN"
                    assert len(two.session.flows) == 1


class TestDestination:
    """What the kernel says of a datagram's destination, for the reply."""

    def test_ipv4(self) -> None:
        asked = socket.inet_aton("192.0.2.7")
        data = struct.pack("=i4s4s", 3, asked, b"\xff" * 4)
        assert _destination([(socket.SOL_SOCKET, 1, b"x"), (socket.IPPROTO_IP, 8, data)]) == struct.pack(
            "=i4s4s", 0, asked, bytes(4)
        )

    def test_of_a_group(self) -> None:
        """No source may be one: a reply from it would not be sent."""
        packed = socket.inet_pton(socket.AF_INET6, "ff02::1")
        assert _destination([(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16si", packed, 3))]) == b""

    @pytest.mark.parametrize(("address", "index"), [("2001:db8::7", 0), ("fe80::7", 3)])
    def test_ipv6(self, address: str, index: int) -> None:
        packed = socket.inet_pton(socket.AF_INET6, address)
        said = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16si", packed, 3))]
        assert _destination(said) == struct.pack("=16si", packed, index)

    @pytest.mark.parametrize("said", [[], [(socket.IPPROTO_IP, 8, b"short")]])
    def test_nothing_was_said(self, said: list[tuple[int, int, bytes]]) -> None:
        assert _destination(said) == b""

    def test_only_where_all_addresses_are_bound(self) -> None:
        class Ingress:
            flows_refused = ""

        one, all_of_them = MemoryDatagrams(), MemoryDatagrams(("0.0.0.0", 53))
        UdpListener(one, Ingress())  # type: ignore[arg-type]
        UdpListener(all_of_them, Ingress())  # type: ignore[arg-type]
        assert (socket.IPPROTO_IP, 8) not in one.options
        assert all_of_them.options[socket.IPPROTO_IP, 8] == 1


def test_the_roles_listen_with_it() -> None:
    assert client_module.UdpListener is UdpListener
