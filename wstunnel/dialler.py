"""One authenticated WebSocket connection to the server: TCP, TLS, HTTP upgrade."""

from __future__ import annotations

import os
import socket
import ssl

import trio

from wstunnel import __version__, limits, tls
from wstunnel.auth import LoginUrl
from wstunnel.dial import dial_server
from wstunnel.errors import NetworkError
from wstunnel.transport import Transport
from wstunnel.wire.handshake import ClientUpgrade
from wstunnel.wire.messages import SUBPROTOCOL

AGENT = f"wstunnel/{__version__}"


class Dialler:
    """Dials a login URL again and again.

    Args:
        url: with a token.
        context: for `wss`; None for `ws`.
        pins: SHA-256 of public keys, one of which the server must show; empty means the context verifies.
        headers: more HTTP header fields.

    Raises:
        UsageError: the URL has no token.
    """

    def __init__(
        self,
        url: LoginUrl,
        context: ssl.SSLContext | None,
        *,
        pins: tuple[bytes, ...] = (),
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.url = url
        self._context = context
        self._pins = pins
        self._token = url.require_token()
        self._headers = headers

    async def dial(self) -> tuple[socket.socket, bytes]:
        """Connect, check who answers, and only then send the token.

        Returns:
            the connection after the 101, non-blocking and owned by the caller; and bytes that came behind the head.

        Raises:
            TrustError: the server did not prove who it is.
            ServerRefusedError: it refused the credentials or the protocol.
            NetworkError: it was not reached, or something else answered.
        """
        url = self.url
        upgrade = ClientUpgrade(
            host=url.authority,
            path=url.path,
            key=os.urandom(16),
            subprotocol=SUBPROTOCOL,
            headers=(("Authorization", f"Bearer {self._token.reveal()}"), ("User-Agent", AGENT), *self._headers),
        )
        answered = False
        layer, stage = "tcp", f"cannot connect to {url.authority}: no answer"
        with trio.move_on_after(limits.HANDSHAKE_SECONDS):
            sock = await dial_server(url.host, url.port)
            layer, stage = "tls", f"{url.authority} did not finish the TLS handshake"
            transport = Transport(sock, self._context, server_side=False, server_hostname=url.host)
            try:
                await self._secure(transport)
                layer, stage = "http", f"{url.authority} did not finish the handshake"
                await transport.send(upgrade.request())
                while not upgrade.feed(data := await transport.receive(limits.HEAD_BYTES)):
                    answered = True
                    if not data:
                        upgrade.eof()
                return transport.detach(), upgrade.leftover
            except OSError as error:  # ssl.SSLError is one
                hint = "; it may speak TLS: try wss://" if url.scheme == "ws" and not answered else ""
                reason = error.strerror or error
                raise NetworkError(
                    "http", f"the connection to {url.authority} broke during the handshake: {reason}{hint}"
                ) from error
            finally:
                transport.close()
        if answered:
            upgrade.eof()  # a refusal whose body never ended
        raise NetworkError(layer, f"{stage} within {limits.HANDSHAKE_SECONDS:.0f} s")

    async def _secure(self, transport: Transport) -> None:
        """TLS, and proof of who it is, before the token leaves."""
        try:
            await transport.handshake()
        except OSError as error:
            raise tls.translate_tls_error(error, self.url.authority) from error
        if transport.tls is not None:
            tls.verify_pins(transport.tls, self._pins)
