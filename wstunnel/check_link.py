"""One link for `check`: a Trio task speaks the tunnel protocol over a transport, without reactor and streams."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from typing import TypeVar

import trio

from wstunnel.dialler import AGENT
from wstunnel.errors import NetworkError, ProtocolError, WstunnelError
from wstunnel.limits import HANDSHAKE_SECONDS, KIB, LINGER_SECONDS, MAX_RESUME_WINDOW_SECONDS, PONG_WITHIN_SECONDS
from wstunnel.logs import escape
from wstunnel.transport import Transport
from wstunnel.wire.frames import MaskKeys
from wstunnel.wire.messages import FEATURES, VERSION, AnyMessage, Hello, Pong, Welcome
from wstunnel.wire.protocol import LinkProtocol, PeerClosed

_READ_BYTES = 16 * KIB
_PULL_BYTES = 16 * KIB

_Found = TypeVar("_Found")


class ClosedByPeerError(NetworkError):
    """The connection ended. `code` is that of the close frame, None where none came."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__("tunnel", message)
        self.code = code


class CheckLink:
    """A `forward` link on which nothing is opened. Used by one task at a time; `close` it in any case.

    Its role is not `control`: that would end what the user's real client left behind for a moment.

    Args:
        sock: as `ServerDialler.dial` returned it; owned from now on.
        leftover: likewise.

    Attributes:
        disturbed: the server sent something by itself since this was set back.
    """

    def __init__(self, sock: socket.socket, leftover: bytes) -> None:
        self.disturbed = False
        self._transport = Transport(sock)
        self._protocol = LinkProtocol("client", keys=MaskKeys(secrets.token_bytes), role="forward")
        self._leftover = leftover
        self._number = 0

    async def greet(self, session: str, *, quiet: int = 0) -> Welcome:
        """`hello`, and the server's answer.

        Args:
            session: id of this check's session.
            quiet: seconds of silence for which the server is not to ask by itself.

        Raises:
            NetworkError: `tunnel`: no answer in time, or not the right one.
            ClosedByPeerError: the server closed instead.
        """
        with trio.move_on_after(HANDSHAKE_SECONDS):
            hello = Hello(
                version=VERSION, session=session, role="forward", agent=f"{AGENT} check", quiet=quiet,
                resume_window=MAX_RESUME_WINDOW_SECONDS, features=list(FEATURES),
            )  # fmt: skip
            self._protocol.send(hello)
            await self._flush()
            return await self._receive(lambda message: message if isinstance(message, Welcome) else None)
        raise NetworkError("tunnel", f"the server did not answer `hello` within {HANDSHAKE_SECONDS:.0f} s")

    async def ping(self, within: float = PONG_WITHIN_SECONDS) -> float:
        """Ask whether the other end is there. Returns the round trip in seconds.

        Raises:
            NetworkError: `tunnel`: no answer within so many seconds.
            ClosedByPeerError: the connection ended.
        """
        self._number += 1
        number, began = self._number, trio.current_time()
        with trio.move_on_after(within):
            self._protocol.ping(number)
            await self._flush()
            await self._receive(lambda message: (isinstance(message, Pong) and message.number == number) or None)
            return trio.current_time() - began
        raise NetworkError("tunnel", f"a ping was not answered within {within:.0f} s")

    async def silence(self, seconds: float) -> None:
        """Send nothing for so long, unless the server asks.

        Raises:
            ClosedByPeerError: the connection ended meanwhile.
            NetworkError: `tunnel`.
        """
        self.disturbed = False
        with trio.move_on_after(seconds):
            await self._receive(self._note)

    def _note(self, _message: AnyMessage) -> None:
        self.disturbed = True

    async def close(self) -> None:
        """Say goodbye and close, within LINGER_SECONDS, also when cancelled."""
        with trio.move_on_after(LINGER_SECONDS) as scope:
            scope.shield = True
            try:
                self._protocol.close(1000, "checked")
                await self._flush()
                while await self._transport.receive(_READ_BYTES):
                    pass  # RFC 6455 §7.1.1: the server closes the connection first
            except (WstunnelError, OSError, trio.ClosedResourceError):
                pass  # it has gone before
        self._transport.close()

    async def _receive(self, wanted: Callable[[AnyMessage], _Found | None]) -> _Found:
        """Read until a message is wanted."""
        while True:
            data, self._leftover = self._leftover, b""
            try:
                data = data or await self._transport.receive(_READ_BYTES)
            except OSError as error:
                raise ClosedByPeerError(f"the connection broke: {error.strerror or error}") from error
            if not data:
                raise ClosedByPeerError("the connection was closed")
            found = self._decode(data, wanted)
            await self._flush()  # a pong, perhaps
            if found is not None:
                return found

    def _decode(self, data: bytes, wanted: Callable[[AnyMessage], _Found | None]) -> _Found | None:
        found = None
        try:
            for event in self._protocol.receive(data):
                if isinstance(event, PeerClosed):
                    if found is not None:
                        break  # the answer came first, and says more
                    reason = f": {escape(event.reason)}" if event.reason else ""
                    raise ClosedByPeerError(f"the server closed the link ({event.code}{reason})", event.code)
                if not isinstance(event, bytes | memoryview | bytearray) and found is None:
                    found = wanted(event)
        except ProtocolError as error:
            raise NetworkError("tunnel", f"what came is not the tunnel protocol: {escape(str(error))}") from error
        return found

    async def _flush(self) -> None:
        try:
            while buffers := self._protocol.pull(_PULL_BYTES, trio.current_time(), 0.0):
                await self._transport.send(b"".join(buffers))
        except OSError as error:
            raise ClosedByPeerError(f"the connection broke: {error.strerror or error}") from error
        except trio.BrokenResourceError as error:  # a ping that was cancelled half-way
            raise ClosedByPeerError(f"the connection cannot be used any more: {error}") from error
