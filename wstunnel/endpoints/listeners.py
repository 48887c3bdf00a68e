"""What a forward listens on: one socket or two, bound, and listening unless they take datagrams."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from wstunnel.endpoints import tcp, unix
from wstunnel.forwards import Forward


@dataclass(frozen=True, slots=True)
class Bound:
    """A socket that listens.

    Attributes:
        sock: non-blocking; whoever has this closes it.
        name: where, as `127.0.0.1:5432` or a path.
        file: of a Unix socket.
    """

    sock: socket.socket
    name: str
    file: unix.SocketFile | None = None

    def unlink(self) -> None:
        """Remove the file, if there is one: connections find nobody from now on."""
        if self.file is not None:
            self.file.remove()

    def close(self) -> None:
        """Stop listening. May be repeated."""
        self.unlink()
        self.sock.close()


def listen(forward: Forward) -> list[Bound]:
    """Bind what the forward asks for, and listen. Of UDP that is all.

    Returns:
        one, or two for the two addresses of `*` and `localhost`, with one port.

    Raises:
        LocalError: in use, not permitted, no such address; nothing is left open.
    """
    if forward.path:
        sock, file = unix.bind(forward.path, forward.mode)
        bound = [Bound(sock, forward.path, file)]
    else:
        kind = socket.SOCK_DGRAM if forward.udp else socket.SOCK_STREAM
        sockets = tcp.bind_all(forward.addresses, forward.port, lenient=len(forward.addresses) > 1, kind=kind)
        bound = [Bound(sock, tcp.local_name(sock)) for sock in sockets]
    try:
        for each in [] if forward.udp else bound:
            tcp.activate(each.sock)
    except BaseException:
        for each in bound:
            each.close()
        raise
    return bound
