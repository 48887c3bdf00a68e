"""Who really connects, when a proxy stands in front of the server.

    SOURCE = ADDR | CIDR | unix         127.0.0.1   10.0.0.0/8   [fd00::/8]   unix: whoever comes by a Unix socket

    front = Front(proxy_protocol=[parse_source("10.0.0.5")], trusted=[parse_source("unix")])
    peer = Peer.of(sock, tcp.peer_name(sock))
    await front.greet(transport, peer)          # a listed proxy's PROXY header, before TLS
    front.believe(peer, request)                # a trusted proxy's X-Forwarded-For or Forwarded

Both are believed of listed proxies only, since anybody can write them. A PROXY header comes first, so the address that
it gives is the one that `believe` looks for among the trusted proxies.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING

from wstunnel import logs
from wstunnel.errors import ProtocolError, UsageError
from wstunnel.targets import join_host_port
from wstunnel.wire.addresses import unmapped, unmapped_network
from wstunnel.wire.forwarded import Hop, forwarded, x_forwarded_for
from wstunnel.wire.proxy_protocol import ProxyHeader

if TYPE_CHECKING:
    from wstunnel.transport import Transport
    from wstunnel.wire.http1 import Request

Source = IPv4Network | IPv6Network | None
"""Where a proxy connects from: its addresses, or None for Unix sockets."""

GRAMMAR = "an IP address, a network such as 10.0.0.0/8, or unix"
NO_HEADER = "a PROXY header was expected and did not come in time: the proxy must be told to send it"

_log = logs.logger("front")


def parse_source(text: str) -> Source:
    """Read a SOURCE.

    Raises:
        UsageError: it does not follow the grammar, or the network has bits beyond its prefix.
    """
    if text in ("unix", "unix:"):
        return None
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        network = ip_network(bare)
    except ValueError as error:
        if "host bits" in str(error):
            right = ip_network(bare, strict=False)
            raise UsageError(f"bits are set beyond the prefix; meant is {right}?", text=text, grammar=GRAMMAR) from None
        raise UsageError("neither an IP address nor a network", text=text, grammar=GRAMMAR) from None
    return unmapped_network(network)


@dataclass(slots=True)
class Peer:
    """Who is at the other end of a connection, as far as it is known by now.

    Args:
        host: an IP address without brackets; empty on a Unix socket; None once the connection is gone.
        name: as logs have it: host and port, the host alone if no port is known, or the Unix socket's user and process.
    """

    host: str | None
    name: str

    @classmethod
    def of(cls, sock: socket.socket, name: str) -> Peer:
        """The end that the kernel knows."""
        try:
            address = sock.getpeername()
        except OSError:
            return cls(None, name)
        return cls(str(address[0]) if isinstance(address, tuple) else "", name)

    def become(self, host: str, port: int | None) -> None:
        """It is somebody else, as a proxy says."""
        self.host = str(unmapped(ip_address(host)))
        self.name = self.host if port is None else join_host_port(self.host, port)


class Front:
    """Which proxies stand in front of this server, and what they say.

    Args:
        proxy_protocol: whose connections begin with a PROXY header, all of them.
        trusted: whose X-Forwarded-For and Forwarded fields are believed.
    """

    def __init__(self, proxy_protocol: Sequence[Source] = (), trusted: Sequence[Source] = ()) -> None:
        self._proxy_protocol = tuple(proxy_protocol)
        self._trusted = tuple(trusted)

    async def greet(self, transport: Transport, peer: Peer) -> bool:
        """Read the PROXY header that a listed proxy begins with; of any other peer nothing is looked at.

        The caller sets the deadline. What comes behind the header stays in the socket, for TLS.

        Returns:
            False: the proxy closed the connection without a byte, as health checks do.

        Raises:
            ProtocolError: something else came: close without an answer.
            OSError: the connection broke.
        """
        if not _holds(self._proxy_protocol, peer.host):
            return True
        header = ProxyHeader()
        whole = False
        heard = False

        def take(data: bytes) -> int:
            nonlocal whole, heard
            heard = True
            rest = header.feed(data)
            whole = rest is not None
            return len(data) - len(rest or b"")

        while not whole:
            if not await transport.skim(take):
                if heard:
                    raise ProtocolError("a PROXY header that ends in its middle")
                return False
        if header.source is not None:
            peer.become(*header.source)
        return True

    def believe(self, peer: Peer, request: Request) -> None:
        """Let a trusted proxy say who its client is: the nearest hop that is not a trusted proxy itself.

        Where it says nothing, or what cannot be relied upon, the peer stays who it is.
        """
        if not _holds(self._trusted, peer.host):
            return
        try:
            hop = self._nearest(request)
        except ProtocolError as error:
            _log.debug("the proxy's word is not taken", peer=peer.name, reason=str(error))
            return
        if hop is not None and hop.host is not None:
            peer.become(hop.host, hop.port)

    def _nearest(self, request: Request) -> Hop | None:
        """From the right, since everything to the left of the first stranger is that stranger's word."""
        readers: dict[str, Callable[[Sequence[str]], list[Hop]]] = {
            "x-forwarded-for": x_forwarded_for,
            "forwarded": forwarded,
        }
        given = {name: fields for name in readers if (fields := request.values(name))}
        if len(given) > 1:
            # Which of them the proxy wrote, and which its client, nobody can tell.
            raise ProtocolError("both X-Forwarded-For and Forwarded came: have the proxy remove one of them")
        for name, fields in given.items():
            hops = readers[name](fields)
            for hop in reversed(hops):
                if not _holds(self._trusted, hop.host):
                    if hop.host is None:
                        raise ProtocolError("it says that its client is unknown")
                    return hop
            return hops[0] if hops else None
        return None


def _holds(sources: tuple[Source, ...], host: str | None) -> bool:
    if not sources or host is None:
        return False
    if not host:
        return None in sources
    address = unmapped(ip_address(host))  # a dual-stack proxy's IPv4 clients are IPv4 clients
    return any(source is not None and address in source for source in sources)
