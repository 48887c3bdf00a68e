"""Forwards to a plain endpoint (`ws-raw`): each application's connection is a WebSocket of its own.

No tunnel protocol, so none of what needs one: a connection that breaks is lost, and there is no half-close.

    the application's EOF                       Close 1000, behind all of its data; what still comes is delivered
    the application's reset                     Close 1011
    the server's Close 1000, or without code    the application's EOF, behind all of the server's data
    any other Close, or no Close at all         a reset, behind all that came, unless the application's EOF came before
    this client stops                           Close 1011, and a reset
    the server is not reached, or refuses       the application's connection is reset
"""

from __future__ import annotations

import os
import socket

import trio

from wstunnel import limits, logs, sockets
from wstunnel.dialler import Dialler
from wstunnel.endpoints.plain import PlainConnection
from wstunnel.endpoints.tcp import peer_name
from wstunnel.errors import NetworkError, ServerRefusedError
from wstunnel.reactor import Reactor
from wstunnel.session import Principal
from wstunnel.wire.frames import CloseCode
from wstunnel.wire.masking import MaskKeys
from wstunnel.wire.plain import NO_STATUS

_log = logs.logger("raw")


class RawConnection(PlainConnection):
    """A `PlainConnection` seen from its client: the application stands at the raw end."""

    log = _log
    kind = "raw connection"
    far = "server"
    near = "application"
    orderly = frozenset({CloseCode.NORMAL, NO_STATUS})  # a server says 1001 when it is stopped: that was not all

    def _describe(self) -> dict[str, object]:
        return {"server": f"{self._where['address']}{self.endpoint}", "peer": self._where["peer"]}


class RawForwards:
    """All connections of a client's `ws-raw` forwards.

    Args:
        reactor: carries them.
        nursery: for the dials.
        dialler: of the URL, as a plain endpoint.
        principal: whose memory they hold.

    Attributes:
        connections: those that were dialled.
        gone: set once all have ended after `stop`.
    """

    def __init__(self, reactor: Reactor, nursery: trio.Nursery, dialler: Dialler, principal: Principal) -> None:
        self.reactor = reactor
        self.connections: dict[RawConnection, None] = {}
        self.gone = trio.Event()
        self._nursery = nursery
        self._dialler = dialler
        self._principal = principal
        self._keys = MaskKeys(os.urandom)
        self._dialling: dict[trio.CancelScope, None] = {}
        self._stopping = False

    def accepted(self, sock: socket.socket) -> None:
        """Carry an application's connection. Takes the socket over."""
        if self._stopping:
            sockets.reset(sock)
        elif (
            len(self.connections) + len(self._dialling) >= limits.PRINCIPAL_STREAMS
            or not self._principal.budget.admitting()
        ):
            _log.warning("connection reset: too many connections or too much memory held", peer=peer_name(sock))
            sockets.reset(sock)
        else:
            scope = trio.CancelScope()
            self._dialling[scope] = None
            self._nursery.start_soon(self._carry, sock, scope)

    async def _carry(self, sock: socket.socket, scope: trio.CancelScope) -> None:
        taken = False
        try:
            with scope:
                websocket, leftover = await self._dialler.dial()
                taken = True
                self._start(websocket, sock, leftover)
        except (NetworkError, ServerRefusedError) as error:
            _log.warning("connection reset: the endpoint was not reached", peer=peer_name(sock), reason=str(error))
        finally:
            del self._dialling[scope]
            if not taken:
                sockets.reset(sock)
            self._check_gone()

    def _start(self, websocket: socket.socket, sock: socket.socket, leftover: bytes) -> None:
        url = self._dialler.url
        connection = RawConnection(
            self, self._principal, endpoint=url.path, target="ws-raw", peer=peer_name(sock), address=url.authority,
            text=True, keys=self._keys,
        )  # fmt: skip
        self.connections[connection] = None
        connection.start(websocket, sock, leftover)

    def plain_ended(self, connection: PlainConnection) -> None:
        """See `PlainOwner`."""
        assert isinstance(connection, RawConnection)
        self.connections.pop(connection, None)
        self._check_gone()

    def _check_gone(self) -> None:
        if self._stopping and not self.connections and not self._dialling:
            self.gone.set()

    def sweep(self, now: float) -> None:
        """Once a second."""
        for connection in list(self.connections):
            connection.sweep(now)

    def woke(self, now: float) -> None:
        """The machine or the process slept."""
        for connection in self.connections:
            connection.woke(now)

    def stop(self) -> None:
        """Close all, and dial no more."""
        self._stopping = True
        for scope in list(self._dialling):
            scope.cancel()
        for connection in list(self.connections):
            # Not 1001, which endpoints take for an end: what the application had yet to say is lost.
            connection.close(CloseCode.INTERNAL, "the client is stopping")
        self._check_gone()
