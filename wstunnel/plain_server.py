"""The server's plain endpoints: who may use them, what they lead to, and their connections.

A request at an endpoint's path is judged in this order: the upgrade and the page's origin, the token, the limits, the
target. The 101 goes out once the target was reached; whatever fails before that is an HTTP status.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Protocol

import trio

from wstunnel import limits, logs, sockets
from wstunnel.dial import dial_target
from wstunnel.endpoints.plain import PlainConnection
from wstunnel.errors import HandshakeError, LocalError, StreamError
from wstunnel.policy import Policy
from wstunnel.wire.frames import CloseCode
from wstunnel.wire.handshake import accept_response
from wstunnel.wire.plain import accept_plain, offered_token

if TYPE_CHECKING:
    from collections.abc import Callable

    from wstunnel.auth import Users
    from wstunnel.config import ServerConfig
    from wstunnel.egress import Egress
    from wstunnel.plain_endpoints import Endpoint
    from wstunnel.reactor import Reactor
    from wstunnel.session import Principal
    from wstunnel.targets import Target
    from wstunnel.transport import Transport
    from wstunnel.wire.http1 import Request, RequestReader

ANYONE = "(anyone)"
"""The principal of clients that are not asked who they are: no user can have this name."""

STOPPING = "the server is stopping"
_STATUS = {"timeout": 504, "limit": 503}
_MEANINGS = {
    "refused": "the endpoint's target refused the connection",
    "timeout": "the endpoint's target did not answer in time",
    "limit": "the server is out of resources, try again later",
}
_UNREACHED = "the endpoint's target cannot be reached"

_log = logs.logger("endpoint")


class Host(Protocol):
    """What the endpoints need of their server."""

    reactor: Reactor
    users: Users
    egress: Egress

    def principal(self, name: str) -> Principal:
        """Whom connections count for."""

    def share(self, most: int) -> int:
        """One principal's part of what the process has."""

    def links_of(self, name: str) -> int:
        """A user's links."""

    def plain_gone(self) -> None:
        """A connection ended."""


class PlainServer:
    """All plain endpoints of a server, and the connections at them.

    Args:
        config: which there are, and who may use them.
        host: the server.
    """

    def __init__(self, config: ServerConfig, host: Host) -> None:
        self.reactor = host.reactor
        self.connections: dict[PlainConnection, None] = {}
        self._dialling: dict[trio.CancelScope, None] = {}
        self._stopping = False
        self._config = config
        self._host = host
        self._endpoints = {endpoint.path: endpoint for endpoint in config.endpoints}
        self._policy = _OperatorsChoice()

    def find(self, path: str) -> Endpoint | None:
        """The endpoint at a request's path."""
        return self._endpoints.get(path)

    async def serve(
        self,
        endpoint: Endpoint,
        transport: Transport,
        request: Request,
        *,
        reader: RequestReader,
        peer: str,
        deadline: trio.CancelScope,
        known: Callable[[], object],
    ) -> None:
        """Answer one request; from the 101 on the connection lives on the reactor.

        Args:
            endpoint: from `find`.
            transport: the client's connection, handed over to the reactor if all goes well.
            request: its head.
            reader: has what came behind it.
            peer: the client's address, for the log.
            deadline: of the handshake; moved once the client is known, since a dial has its own time.
            known: is called then, too: from there on it counts for its principal, and not as a stranger's handshake.

        Raises:
            HandshakeError: the answer is no.
            OSError: the client's connection broke.
        """
        upgrade = accept_plain(request, path=endpoint.path, origins=self._config.allow_origins)
        principal = self._host.principal(self._authenticate(request))
        share = self._host.share
        if (
            self._host.links_of(principal.name) >= share(limits.PRINCIPAL_LINKS)
            or principal.sockets >= share(limits.PRINCIPAL_STREAMS)
            or not principal.budget.admitting()
        ):
            raise HandshakeError(503, "too many connections")
        deadline.deadline = trio.current_time() + limits.DIAL_SECONDS + limits.HANDSHAKE_SECONDS
        # Two sockets: it counts as a link and as a stream.
        principal.links += 1
        principal.streams += 1
        known()
        try:
            target, address = await self._dial(endpoint, principal, peer)
            try:
                await transport.send(accept_response(upgrade))
            except BaseException:
                sockets.reset(target)
                raise
            connection = PlainConnection(
                self, principal, endpoint=endpoint.path, target=str(endpoint.target), peer=peer, address=address,
                text=self._config.endpoint_text,
            )  # fmt: skip
        except BaseException:
            self._give_back(principal)
            raise
        self.connections[connection] = None
        connection.start(transport.detach(), target, reader.leftover)
        if self._stopping:  # since the answer was begun
            connection.close(CloseCode.GOING_AWAY, STOPPING)

    def _authenticate(self, request: Request) -> str:
        if self._config.endpoint_auth == "none":
            return ANYONE
        token = offered_token(request) or ""
        try:
            name = self._host.users.authenticate(token)
        except LocalError as error:
            _log.error("the users cannot be read", reason=str(error))
            raise HandshakeError(503, "try again later") from error
        if name is None:
            raise HandshakeError(401, "no valid token", (("WWW-Authenticate", 'Bearer realm="wstunnel"'),))
        return name

    async def _dial(self, endpoint: Endpoint, principal: Principal, peer: str) -> tuple[socket.socket, str]:
        """The client is told what kind of failure it was, the log which address and why."""
        egress = self._host.egress
        scope = trio.CancelScope()
        self._dialling[scope] = None
        try:
            with scope:
                return await dial_target(
                    endpoint.target, self._policy, limiter=egress.limiter(principal.name), sources=egress.sources
                )
            raise HandshakeError(503, STOPPING)
        except StreamError as error:
            _log.warning(
                "endpoint's target not reached",
                endpoint=endpoint.path, peer=peer, principal=principal.name, reason=str(error),
            )  # fmt: skip
            status, meaning = _STATUS.get(error.code, 502), _MEANINGS.get(error.code, _UNREACHED)
            raise HandshakeError(status, meaning) from error
        finally:
            del self._dialling[scope]

    def plain_ended(self, connection: PlainConnection) -> None:
        """See `PlainOwner`."""
        if connection in self.connections:
            del self.connections[connection]
            self._give_back(connection.principal)
            self._host.plain_gone()

    @staticmethod
    def _give_back(principal: Principal) -> None:
        principal.links -= 1
        principal.streams -= 1

    def sweep(self, now: float) -> None:
        """Once a second."""
        for connection in list(self.connections):
            connection.sweep(now)

    def woke(self, now: float) -> None:
        """The machine or the process slept."""
        for connection in self.connections:
            connection.woke(now)

    def stop(self) -> None:
        """Close all; they are gone when `connections` is empty."""
        self._stopping = True
        for scope in self._dialling:
            scope.cancel()
        for connection in list(self.connections):
            connection.close(CloseCode.GOING_AWAY, STOPPING)


class _OperatorsChoice(Policy):
    """An endpoint's target was named by who runs the server: `--allow`, which bounds clients, has no say in it."""

    def __init__(self) -> None:
        super().__init__((), own_sockets=(), is_local=lambda _ip: False)

    def refusal(self, target: Target, ip: str) -> None:
        """Nothing is refused."""
