"""SOCKS5's UDP ASSOCIATE (RFC 1928 §7): a socket for one client, whose datagrams each name where they go.

It lives as long as the connection that asked for it. Each destination is a flow of its own.
"""

from __future__ import annotations

import socket
from typing import Any

from wstunnel import logs, sockets
from wstunnel.endpoints.udp import FlowTable
from wstunnel.errors import LocalError, ProtocolError, UsageError
from wstunnel.flow import READ_BYTES, READ_DATAGRAMS
from wstunnel.ingress import Way
from wstunnel.reactor import Handler, Reactor
from wstunnel.targets import address_family, join_host_port, parse_target
from wstunnel.wire import socks
from wstunnel.wire.datagrams import HEADER_BYTES

ASSOCIATIONS = 256
"""At a time, for all proxies of a process: each holds two descriptors. More are refused."""
PRINCIPAL_ASSOCIATIONS = 64
"""The same for one user of a server, so that the proxies of others have some, too."""

_log = logs.logger("udp")
Destination = tuple[str, int]


class Association(Handler):
    """One client's relay.

    Args:
        reactor: where its socket lives.
        way: opens flows, and is asked for each: the place may be taken over.
        near: the address that the client's connection came to, as `getsockname` gives it.
        far: the client's own, as `getpeername` gives it.
        port: the one that the client says it will send from; 0: that of its first datagram.

    Attributes:
        address: where it takes datagrams: host and port.
        dropped: datagrams that came from others, or were none of SOCKS5's.

    Raises:
        LocalError: no descriptor is left.
    """

    __slots__ = ("_client", "_flows", "_headers", "_host", "_port", "address", "dropped")

    def __init__(self, reactor: Reactor, way: Way, *, near: Any, far: Any, port: int) -> None:
        super().__init__()
        self._host = far[0]
        self._port = port
        self._client: Any = None
        self._headers: dict[Destination, bytes] = {}
        self._flows: FlowTable[Destination] = FlowTable(way, self._begin, self._reply)
        self.dropped = 0
        try:
            sock = socket.socket(socket.AF_INET6 if ":" in near[0] else socket.AF_INET, socket.SOCK_DGRAM)
        except OSError as error:
            raise LocalError(f"no socket for datagrams: {error.strerror}") from error
        try:
            sock.setblocking(False)
            sock.bind((near[0], 0, *near[2:]))
            self.address: tuple[str, int] = sock.getsockname()[:2]
            sockets.widen(sock)
            reactor.adopt(self, sock, look=False)
        except OSError as error:
            sock.close()
            raise LocalError(f"cannot take datagrams on {near[0]}: {error.strerror}") from error
        except LocalError:
            sock.close()
            raise

    def stop(self, reason: str) -> None:
        """Take no more, and end all flows."""
        self.reactor.drop(self)
        self._flows.close(reason)

    def on_readable(self) -> None:
        sock, scratch = self.sock, self.reactor.scratch
        assert sock is not None
        room = READ_BYTES
        try:
            for _ in range(READ_DATAGRAMS):
                size, address = sock.recvfrom_into(scratch)
                self._take(address, bytes(scratch[:size]))
                room -= size + HEADER_BYTES
                if room <= 0:
                    break
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            _log.debug("a datagram could not be sent or taken", reason=str(error))
        self._flows.flush()

    def _take(self, address: Any, datagram: bytes) -> None:
        """RFC 1928 §7: the relay "MUST drop any datagrams arriving from any source IP address other than" the client's.

        The port is its, too, from its first good datagram on: others may run programs on the client's machine.
        """
        if address[0] != self._host or self._port not in (0, address[1]):
            self.dropped += 1
            return
        try:
            host, port, payload = socks.parse_udp(datagram)
        except ProtocolError as error:
            self.dropped += 1
            _log.debug("datagram dropped", reason=str(error))
            return
        self._client, self._port = address, address[1]
        self._flows.send((host, port), payload)

    def _begin(self, key: Destination) -> tuple[str, str] | None:
        try:
            target = parse_target(f"udp:{join_host_port(*key)}")
        except UsageError as error:
            _log.debug("datagram dropped", reason=error.message)
            return None
        self._headers.pop(key, None)  # what an earlier flow of this name led to
        return str(target), join_host_port(self._host, self._port)

    def _reply(self, key: Destination, data: bytes | memoryview) -> bool:
        header = self._headers.get(key)
        if header is None:
            if len(self._headers) > self._flows.most:
                self._headers.clear()
            header = self._headers[key] = self._header(key)
        if self.sock is None:
            return False
        try:
            self.sock.sendmsg([header, data], [], 0, self._client)
        except OSError:
            return False  # no room, or too long with its header: it is lost, as may happen
        return True

    def _header(self, key: Destination) -> bytes:
        """Before each reply from this destination: the address that a name led to, once it is known."""
        flow = self._flows.find(key)
        host, port = key
        if address_family(host) is None and flow is not None:
            found = flow.address.rpartition(":")[0].strip("[]")
            host = found if address_family(found) is not None else host
        return socks.udp_header(host, port)

    def on_writable(self) -> None:
        """Never: what the socket does not take at once is lost."""

    def on_hangup(self) -> None:
        """Never: reading is always wanted."""

    def fail(self, error: Exception) -> None:
        """One datagram's fault. The socket goes on with the next."""
        _log.exception("fault in our own code", address=join_host_port(*self.address))
