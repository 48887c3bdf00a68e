"""Plain endpoints under test: a server that leads to an echo and to a listener, and how clients get in."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .sockets import Echo, Listener, Refusing
from .tunnel import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass
class Endpoints:
    """A server with three endpoints: `/echo`, `/listener` (accepts when the test says so), `/refusing`."""

    server: Server
    listener: Listener

    @property
    def token(self) -> str:
        return self.server.invitation.token

    def url(self, path: str) -> str:
        """What a client dials."""
        return f"{self.server.invitation.scheme}://127.0.0.1:{self.server.port}{path}"


@contextmanager
def endpoints(directory: Path, *arguments: str, plain: bool = True) -> Iterator[Endpoints]:
    """Run such a server, with more of the command line (more endpoints, perhaps)."""
    with Echo() as echo, Listener() as listener, Refusing.bind() as refusing:
        leads = {"/echo": echo, "/listener": listener, "/refusing": refusing}
        flags = [part for path, target in leads.items() for part in ("--endpoint", f"{path}={target.address}")]
        with Server(directory, plain=plain, arguments=[*flags, *arguments]) as server:
            yield Endpoints(server, listener)
