"""Fixtures: a tunnel of real processes, over TLS and plain."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from .sockets import Listener
from .tunnel import Client, Server

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator


@dataclass
class Route:
    """One listener that is reached directly and through the tunnel; its sockets are closed with the test."""

    server: Server
    client: Client
    listener: Listener
    open_sockets: ExitStack = field(default_factory=ExitStack)

    def connect(self) -> socket.socket:
        """An application's connection; the target has not accepted yet."""
        return self.open_sockets.enter_context(self.client.connect(self.listener.address))

    def accept(self) -> socket.socket:
        """The target's end of the oldest connection that it has not accepted yet."""
        return self.open_sockets.enter_context(self.listener.accept())

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A new stream's two ends: the application's socket and the target's."""
        app = self.connect()
        return app, self.accept()


@pytest.fixture(scope="module", params=["tls", "plain"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests of a module, once over TLS and once plain."""
    with Server(tmp_path_factory.mktemp("server"), plain=request.param == "plain") as running:
        yield running


@pytest.fixture(scope="module")
def standing(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Listener]]:
    """A client for all tests of a module, and the listener that it leads to: so links are used again and again."""
    directory = tmp_path_factory.mktemp("client")
    with Listener() as listener, Client(directory, server.invitation.url, [listener.address]) as client:
        yield client, listener


@pytest.fixture
def route(server: Server, standing: tuple[Client, Listener]) -> Iterator[Route]:
    """The standing client's route, with nothing of an earlier test on it."""
    client, listener = standing
    listener.drain()
    opened = Route(server, client, listener)
    with opened.open_sockets:
        yield opened
    print(server.tail())
    print(client.tail())
    assert server.running
    assert client.running
