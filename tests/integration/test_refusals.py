"""Targets that cannot be reached: the application is reset at once, and the client's log says which kind it was."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from .sockets import Echo, Refusing, read_exactly, unused_port
from .tunnel import Client, Server

if TYPE_CHECKING:
    from collections.abc import Iterator

FORBIDDEN = ("169.254.169.254:80", "168.63.129.16:80", "224.0.0.1:80", "[fe80::1]:80", "[fd00:ec2::254]:80")
NO_NAME = "no-such-host.invalid:80"  # RFC 6761 §6.4: no name below .invalid exists


@dataclass(frozen=True)
class Ways:
    """One client with a way to each of them."""

    client: Client
    good: str
    refusing: str
    later: str
    server: str

    def reset(self, target: str, *, after: bytes = b"") -> None:
        """An application's connection to `target` is reset."""
        with (
            pytest.raises((ConnectionResetError, BrokenPipeError)),
            self.client.connect(target) as app,  # which may see it already
        ):
            app.sendall(after)
            app.recv(1)

    def refused(self, target: str, code: str, *, after: bytes = b"") -> None:
        """It is reset, and one new line of the client's log names the kind, which is no deadline's, and the target."""
        logged = len(self.client.stderr)
        self.reset(target, after=after)
        self.client.wait_for_line(rf"(?=.*\b{code}\b)(?=.*{re.escape(target)})", after=logged)


@pytest.fixture(scope="module")
def ways(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    directory = tmp_path_factory.mktemp("client")
    later, itself = f"127.0.0.1:{unused_port()}", f"127.0.0.1:{server.port}"
    with Echo() as echo, Refusing.bind() as nobody:
        targets = [echo.address, nobody.address, later, itself, NO_NAME, *FORBIDDEN]
        with Client(directory, server.invitation.url, targets) as client:
            yield Ways(client, echo.address, nobody.address, later, itself)


def test_refused(ways: Ways) -> None:
    ways.refused(ways.refusing, "refused")


def test_refused_after_early_data(ways: Ways) -> None:
    ways.refused(ways.refusing, "refused", after=bytes(100_000))


@pytest.mark.parametrize("target", FORBIDDEN)
def test_forbidden(ways: Ways, target: str) -> None:
    ways.refused(target, "forbidden")


def test_the_way_back_into_the_server_is_forbidden(ways: Ways) -> None:
    ways.refused(ways.server, "forbidden")


def test_name_not_found(ways: Ways) -> None:
    ways.refused(NO_NAME, "name-not-found")


def test_refusals_do_not_disturb_others(ways: Ways) -> None:
    with ways.client.connect(ways.good) as good:
        for index in range(50):
            ways.reset(ways.refusing)
            good.sendall(b"%04d" % index)
            assert read_exactly(good, 4) == b"%04d" % index


def test_a_target_that_comes_up_later_is_reached(ways: Ways) -> None:
    ways.refused(ways.later, "refused")
    host, _, port = ways.later.rpartition(":")
    with socket.create_server((host, int(port))) as listener:
        listener.settimeout(30)
        with ways.client.connect(ways.later) as app, listener.accept()[0] as target:
            target.sendall(b"hello")
            assert read_exactly(app, 5) == b"hello"
