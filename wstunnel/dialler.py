"""One authenticated WebSocket connection to the server: TCP, a proxy perhaps, TLS, HTTP upgrade."""

from __future__ import annotations

import os
import socket
import ssl
from typing import Protocol

import trio

from wstunnel import __version__, limits, tls
from wstunnel.auth import LoginUrl
from wstunnel.dial import DialServer, dial_server
from wstunnel.errors import NetworkError
from wstunnel.issuer import issuer_shown
from wstunnel.proxy_tunnel import ProxyTunnel, Stage
from wstunnel.transport import Transport
from wstunnel.wire import plain
from wstunnel.wire.handshake import ClientUpgrade
from wstunnel.wire.http1 import Response
from wstunnel.wire.messages import SUBPROTOCOL

AGENT = f"wstunnel/{__version__}"


class Dialler(Protocol):
    """What a session asks for its links: one server's, or several servers' in turn (`failover`)."""

    @property
    def url(self) -> LoginUrl:
        """Of the server that is dialled now."""

    async def dial(self) -> tuple[socket.socket, bytes]:
        """See `ServerDialler.dial`."""

    def failed(self, error: NetworkError) -> None:
        """A server that was connected to is of no use: it is stopping, or it closes its links at once."""


class Watch(Protocol):
    """Is told how far each dial has come, with the evidence. What it raises ends the dial."""

    def opened(self) -> None:
        """The way to the server is open: connected, through the proxy if there is one."""

    def secured(self, peer: ssl.SSLSocket | None, error: Exception | None) -> None:
        """The TLS handshake is over; pins are looked at after this.

        Args:
            peer: the socket, for as long as this call lasts; None without TLS, or when it is gone.
            error: why the handshake failed.
        """

    def answered(self, response: Response) -> None:
        """The head of the answer to the upgrade, whatever it says."""


class ServerDialler:
    """Dials one login URL again and again.

    Args:
        url: with a token; for a plain endpoint it may have none.
        context: for `wss`; None for `ws`.
        pins: SHA-256 of public keys, one of which the server must show; empty means the context verifies.
        headers: more HTTP header fields; one may be Host.
        server_name: the name that TLS asks for and verifies; None: the URL's host.
        family: AF_INET or AF_INET6: only such addresses are dialled, of the server or of the proxy. None: of both.
        proxy: opens the way to the server; None dials it directly.
        endpoint: the URL is a plain endpoint's, not a tunnel's.
        dial: connects to the server, as `dial_server` does; None is that itself. `proxy` has one of its own.
        watch: is told how far each dial comes.

    Attributes:
        url: of the server that is dialled.

    Raises:
        UsageError: the URL has no token and needs one.
    """

    def __init__(
        self,
        url: LoginUrl,
        context: ssl.SSLContext | None,
        *,
        pins: tuple[bytes, ...] = (),
        headers: tuple[tuple[str, str], ...] = (),
        server_name: str | None = None,
        family: socket.AddressFamily | None = None,
        proxy: ProxyTunnel | None = None,
        endpoint: bool = False,
        dial: DialServer | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.url = url
        self._dial = dial
        self._watch = watch
        self._context = context
        self._pins = pins
        self._endpoint = endpoint
        self._token = url.token if endpoint else url.require_token()
        own = () if any(name.lower() == "user-agent" for name, _ in headers) else (("User-Agent", AGENT),)
        self._headers = (*own, *headers)
        self._server_name = server_name or url.host
        self._family = family
        self._proxy = proxy

    async def dial(self) -> tuple[socket.socket, bytes]:
        """Connect, check who answers, and only then send the token.

        Returns:
            the connection after the 101, non-blocking and owned by the caller; and bytes that came behind the head.

        Raises:
            TrustError: the server did not prove who it is.
            ServerRefusedError: it refused the credentials or the protocol.
            NetworkError: `proxy` if a proxy on the way is at fault; it was not reached, or something else answered.
        """
        url = self.url
        authorization = () if self._token is None else (("Authorization", f"Bearer {self._token.reveal()}"),)
        upgrade = ClientUpgrade(
            host=url.authority,
            path=url.resource,
            key=os.urandom(16),
            subprotocol=plain.SUBPROTOCOL if self._endpoint else SUBPROTOCOL,
            headers=(*authorization, *self._headers),
            endpoint=self._endpoint,
        )
        answered = False
        stage = Stage("tcp", f"cannot connect to {url.authority}: no answer")
        with trio.move_on_after(limits.HANDSHAKE_SECONDS):
            if self._proxy is None:
                sock = await (self._dial or dial_server)(url.host, url.port, family=self._family)
            else:
                sock = await self._proxy.open(url.host, url.port, stage)
            transport = Transport(sock, self._context, server_side=False, server_hostname=self._server_name)
            try:
                if self._watch is not None:
                    self._watch.opened()
                stage.set("tls", f"{url.authority} did not finish the TLS handshake")
                await self._secure(transport)
                stage.set("http", f"{url.authority} did not finish the handshake")
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
                if self._watch is not None and upgrade.response is not None:
                    self._watch.answered(upgrade.response)
        if answered:
            upgrade.eof()  # a refusal whose body never ended
        raise NetworkError(stage.layer, f"{stage.text} within {limits.HANDSHAKE_SECONDS:.0f} s")

    def failed(self, error: NetworkError) -> None:
        """There is no other server to turn to."""

    async def _secure(self, transport: Transport) -> None:
        """TLS, and proof of who it is, before the token leaves."""
        try:
            await transport.handshake()
        except OSError as error:
            if self._watch is not None:
                self._watch.secured(transport.tls, error)
            issuer = issuer_shown(transport.tls)
            raise tls.translate_tls_error(error, self.url.authority, issuer=issuer) from error
        if self._watch is not None:
            self._watch.secured(transport.tls, None)
        if transport.tls is not None:
            tls.verify_pins(transport.tls, self._pins)
