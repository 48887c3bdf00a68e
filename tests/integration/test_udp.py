"""UDP through the tunnel: dig against dnsmasq, iperf3, and both through `-R`."""

from __future__ import annotations

import json
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from .process import Process, wait_until
from .programs import finish, require
from .sockets import unused_port
from .tunnel import Client, Server, environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.programs, pytest.mark.timeout(120)]

RATE = "1M"
"""Of iperf3, in bits a second: so few that a machine may stand still for half a second and loses nothing."""
TEXT = "x" * 200


@contextmanager
def dnsmasq(directory: Path) -> Iterator[int]:
    """A DNS server that knows some names under `.test`, and asks nobody else. Yields its port."""
    program = require("dnsmasq")
    directory.mkdir()
    port = unused_port()
    argv = [
        program, "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", f"--port={port}",
        "--listen-address=127.0.0.1", "--bind-interfaces", f"--pid-file={directory}/pid", "--log-facility=-",
        "--address=/one.test/192.0.2.1", "--address=/six.test/2001:db8::6", "--edns-packet-max=4096",
        *(f"--txt-record=long.test,{number}{TEXT}" for number in range(12)),
    ]  # fmt: skip
    with Process("dnsmasq", argv, directory=directory, env=environment(directory)) as server:
        wait_until(lambda: not server.running or _answers(port), "dnsmasq")
        assert server.running, server.tail()
        yield port


def _answers(port: int) -> bool:
    done = subprocess.run(
        [require("dig"), "+short", "+tries=1", "+time=1", "-p", str(port), "@127.0.0.1", "one.test"],
        capture_output=True,
        timeout=30,
    )
    return done.stdout == b"192.0.2.1\n"


@contextmanager
def iperf3(directory: Path) -> Iterator[int]:
    program = require("iperf3")
    directory.mkdir()
    port = unused_port()
    argv = [program, "--server", "--bind", "127.0.0.1", "--port", str(port), "--forceflush"]
    with Process("iperf3", argv, directory=directory, env=environment(directory), exit_codes=(0, 1)) as server:
        wait_until(lambda: not server.running or "Server listening" in server.stdout, "iperf3")
        yield port


@contextmanager
def tunnel(directory: Path, transport: str, *arguments: str, server: tuple[str, ...] = ()) -> Iterator[Client]:
    for name in ("server", "client"):
        (directory / name).mkdir()
    with (
        Server(directory / "server", plain=transport == "plain", arguments=server) as far,
        Client(directory / "client", far.invitation.url, (), arguments=arguments) as client,
    ):
        yield client


def local_port(client: Client, kind: str, target: int) -> int:
    return int(client.wait_for_line(rf"listening 127\.0\.0\.1:(\d+) -> {kind}:127\.0\.0\.1:{target}(\s|$)")[1])


def dig(port: int, *question: str) -> list[str]:
    done = finish(require("dig"), "+short", "+tries=3", "+time=5", "-p", str(port), "@127.0.0.1", *question)
    return done.stdout.decode().split("\n")[:-1]


@pytest.mark.parametrize("transport", ["tls", "plain"])
def test_dig(tmp_path: Path, transport: str) -> None:
    with dnsmasq(tmp_path / "dns") as dns, tunnel(tmp_path, transport, "-L", f"0:127.0.0.1:{dns}/udp") as client:
        port = local_port(client, "udp", dns)
        assert dig(port, "one.test") == ["192.0.2.1"]
        assert dig(port, "AAAA", "six.test") == ["2001:db8::6"]
        assert dig(port, "nothing.example.org") == []
        # More than 2 KB in one datagram, and no second try over TCP.
        answer = dig(port, "+bufsize=4096", "+ignore", "TXT", "long.test")
        assert sorted(answer) == sorted(f'"{number}{TEXT}"' for number in range(12))


def test_dig_at_the_server(tmp_path: Path) -> None:
    """`-R`: a resolver on the client's side, asked on the server's."""
    port = unused_port()
    forward = ("-R", f"{port}:127.0.0.1:{{dns}}/udp")
    with dnsmasq(tmp_path / "dns") as dns:
        arguments = [part.format(dns=dns) for part in forward]
        with tunnel(tmp_path, "plain", *arguments, server=("--allow-listen", str(port))) as client:
            client.wait_for_line(rf"listening 127\.0\.0\.1:{port} at the server -> udp:127\.0\.0\.1:{dns}")
            assert dig(port, "one.test") == ["192.0.2.1"]


@pytest.mark.parametrize("direction", ["up", "down"])
def test_iperf3(tmp_path: Path, direction: str) -> None:
    """It speaks TCP to control, and UDP for the test, to one port number: so both are forwarded from one."""
    port = unused_port()
    with iperf3(tmp_path / "iperf3") as target:
        specs = ("-L", f"{port}:127.0.0.1:{target}", "-L", f"{port}:127.0.0.1:{target}/udp")
        with tunnel(tmp_path, "plain", *specs) as client:
            local_port(client, "udp", target)
            command = ["--client", "127.0.0.1", "--port", str(port), "--udp", "--bitrate", RATE, "--time", "4"]
            command += ["--length", "1420", "--json", *(["--reverse"] if direction == "down" else [])]
            said = json.loads(finish(require("iperf3"), *command).stdout)
    assert "error" not in said, said
    total = said["end"]["sum"]
    assert total["packets"] > 200
    assert total["lost_percent"] < 5
