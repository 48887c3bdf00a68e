"""Ways in and out besides `-L`: a server that allows them all, its client, and `wstunnel connect`."""

from __future__ import annotations

import shlex
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .sockets import SECONDS
from .tunnel import COMMAND, Client, Server, environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@dataclass
class Ways:
    """A running server and its client."""

    server: Server
    client: Client
    directory: Path
    url: str

    def port(self, whither: str) -> int:
        """The port of 127.0.0.1, here or at the server, that was announced as leading there (a regular expression)."""
        return int(self.client.wait_for_line(rf"listening 127\.0\.0\.1:(\d+)( at the server)? -> {whither}(\s|$)")[1])

    def dial(self, whither: str) -> socket.socket:
        """A connection to that port."""
        return socket.create_connection(("127.0.0.1", self.port(whither)), timeout=SECONDS)

    def connect(self, target: str) -> list[str]:
        """The command line of `wstunnel connect`; it wants `environment`."""
        return [*COMMAND, "connect", target]

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.directory, WSTUNNEL_URL=self.url)

    @property
    def proxy_command(self) -> list[str]:
        """For ssh, scp and, joined, for git."""
        return ["-o", f"ProxyCommand={shlex.join(COMMAND)} connect %h:%p"]


@contextmanager
def ways(
    directory: Path,
    *arguments: str,
    server_arguments: Sequence[str] = (),
    plain: bool = False,
    relay: int | None = None,
) -> Iterator[Ways]:
    """Run both.

    Args:
        directory: for logs and state.
        arguments: the client's forwards, and more of its command line.
        server_arguments: more of the server's.
        plain: without TLS.
        relay: the port that the client dials instead of the server's.
    """
    allow = ["--allow-listen", "*", *server_arguments]
    with Server(directory, plain=plain, arguments=allow) as server:
        url = server.invitation.url if relay is None else server.invitation.changed(port=relay)
        with Client(directory, url, [], arguments=arguments) as client:
            yield Ways(server, client, directory, url)
