"""Dynamic forwards: the application names its target, in SOCKS or as to an HTTP proxy, and is told the truth about it.

Each negotiation is a task with a deadline. Once the target was reached the connection goes to the reactor like any
other; only the body of a plain HTTP request is still looked at on its way, since what follows it is not the target's.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import trio

from wstunnel import limits, logs, sockets
from wstunnel.endpoints import tcp
from wstunnel.endpoints.socks_udp import ASSOCIATIONS, PRINCIPAL_ASSOCIATIONS, Association
from wstunnel.errors import HandshakeError, LocalError, ProtocolError, StreamError, UsageError
from wstunnel.forwards import Forward
from wstunnel.ingress import Way
from wstunnel.reactor import Reactor
from wstunnel.stream import Stream
from wstunnel.targets import join_host_port, parse_target
from wstunnel.transport import Transport
from wstunnel.wire import http_proxy, socks
from wstunnel.wire.http_proxy import HttpProxyServer, ProxyRequest
from wstunnel.wire.socks import Command, SocksRequest, SocksServer

Authenticate = Callable[[bytes, bytes], bool]
"""Is this user and password right?"""

SILENT_SECONDS = 60
"""When the kernel begins to ask whether a client that has a relay for datagrams is still there: it says nothing more on
its connection, and without an end of that the relay would stay for ever."""

_log = logs.logger("dynamic")


class DynamicForwards:
    """Negotiates with applications, and opens the streams that they ask for.

    Args:
        reactor: where the connections go.
        nursery: where the negotiations run.
        authenticate: judges user and password, which applications then must give; None: none are asked for.
        most: negotiations of one principal at a time; beyond it their oldest is dropped, so that idle connections lock
            nobody out.
    """

    def __init__(
        self,
        reactor: Reactor,
        nursery: trio.Nursery,
        *,
        authenticate: Authenticate | None = None,
        most: int = limits.HANDSHAKES,
    ) -> None:
        self._reactor = reactor
        self._nursery = nursery
        self._authenticate = authenticate
        self._most = most
        self._negotiating: dict[str, dict[trio.CancelScope, None]] = {}  # by principal, the oldest first
        self._associations: dict[Association, str] = {}  # and whose

    def accepted(self, sock: socket.socket, forward: Forward, way: Way, *, principal: str = "") -> None:
        """Serve an application's connection, which is owned from now on.

        Args:
            sock: non-blocking.
            forward: says what is spoken.
            way: asked once the application has named its target.
            principal: whose forward it is, where there are several.
        """
        if len(self._negotiating.get(principal, ())) >= self._most:
            self._drop(principal)
        scope = trio.CancelScope()
        self._negotiating.setdefault(principal, {})[scope] = None
        decided = partial(self._decided, principal, scope)
        associate = partial(self._associate, sock, way, principal)
        serve = partial(self._serve, sock, forward, way, scope=scope, decided=decided, associate=associate)
        self._nursery.start_soon(serve)

    def drop_oldest(self) -> None:
        """No descriptor is left: the principal that has most negotiations loses the one that began first."""
        if self._negotiating:
            self._drop(max(self._negotiating, key=lambda principal: len(self._negotiating[principal])))

    def _drop(self, principal: str) -> None:
        oldest = next(iter(self._negotiating.get(principal, ())), None)
        if oldest is not None:
            self._decided(principal, oldest)
            oldest.cancel()

    def _decided(self, principal: str, scope: trio.CancelScope) -> None:
        """It negotiates no more. May be repeated."""
        scopes = self._negotiating.get(principal, {})
        scopes.pop(scope, None)
        if not scopes:
            self._negotiating.pop(principal, None)

    def _associate(self, sock: socket.socket, way: Way, principal: str, port: int) -> Association:
        """A relay for datagrams.

        Raises:
            StreamError: the other end can carry none, or there is no way any more.
            LocalError: there are too many.
            OSError: the application has gone.
        """
        ingress, _forward_id = way()
        if ingress.flows_refused:
            raise StreamError("command-not-supported", ingress.flows_refused)
        if len(self._associations) >= min(ASSOCIATIONS, self._most):
            raise LocalError("too many relays for datagrams")
        if principal and list(self._associations.values()).count(principal) >= PRINCIPAL_ASSOCIATIONS:
            raise LocalError("too many relays for datagrams of this user")
        association = Association(self._reactor, way, near=sock.getsockname(), far=sock.getpeername(), port=port)
        sockets.ask_when_silent(sock, SILENT_SECONDS)
        self._associations[association] = principal
        return association

    def _dissolve(self, association: Association) -> None:
        del self._associations[association]
        association.stop("the application went away")

    async def _serve(
        self,
        sock: socket.socket,
        forward: Forward,
        way: Way,
        *,
        scope: trio.CancelScope,
        decided: Callable[[], None],
        associate: Callable[[int], Association],
    ) -> None:
        peer = tcp.peer_name(sock)
        transport = Transport(sock)
        application = _Application(
            transport,
            peer,
            connect=partial(_connect, way),
            associate=associate,
            dissolve=self._dissolve,
            reactor=self._reactor,
            authenticate=self._authenticate,
        )
        try:
            with scope:
                with trio.move_on_after(limits.HANDSHAKE_SECONDS) as deadline:
                    await application.read(forward.speaks)
                if deadline.cancelled_caught:
                    _log.debug("no request in time", peer=peer)
                    return
                decided()
                await application.serve()
        except OSError as error:
            _log.debug("connection failed in its negotiation", peer=peer, reason=str(error))
        except (ProtocolError, HandshakeError) as error:
            _log.warning("request refused", peer=peer, reason=str(error))
        except Exception:
            # That connection only: the next one has not done anything wrong.
            _log.exception("fault in our own code", peer=peer)
        finally:
            decided()
            transport.close()


async def _connect(way: Way, target: str, peer: str) -> Stream:
    ingress, forward_id = way()
    return await ingress.connect(target, peer, forward=forward_id)


class _Application:
    """One connection until its stream has it."""

    def __init__(
        self,
        transport: Transport,
        peer: str,
        *,
        connect: Callable[[str, str], Awaitable[Stream]],
        associate: Callable[[int], Association],
        dissolve: Callable[[Association], None],
        reactor: Reactor,
        authenticate: Authenticate | None,
    ) -> None:
        self._transport = transport
        self._peer = peer
        self._connect = connect
        self._associate = associate
        self._dissolve = dissolve
        self._reactor = reactor
        self._socks = SocksServer(authenticate)
        self._http = HttpProxyServer(authenticate)
        self._request: SocksRequest | ProxyRequest | None = None
        self._fault: HandshakeError | None = None  # of the request's body
        self._answered = 0  # bytes of the origin
        self._silent_since = math.inf  # when the origin was last waited for
        self._next_came = False  # a second request did, after the answer

    async def read(self, speaks: tuple[str, ...]) -> None:
        """Until the request is whole.

        Raises:
            ProtocolError, HandshakeError: it is none that is served here, which the application was told.
            OSError: the connection broke.
        """
        speech: str | None = None
        while self._request is None:
            data = await self._transport.receive(limits.HEAD_BYTES)
            if not data:
                raise ConnectionAbortedError("the application went away before its request")
            if speech is None:
                speech = socks.sniff(data[0])
                if speech not in speaks:
                    speech = speaks[0]  # whose parser says what is wrong
            await (self._feed_socks if speech == "socks" else self._feed_http)(data)

    async def _feed_socks(self, data: bytes) -> None:
        try:
            answer = self._socks.feed(data)
        except ProtocolError:
            await self._refuse(self._socks.refusal)
            raise
        if answer:
            await self._transport.send(answer)
        self._request = self._socks.request

    async def _feed_http(self, data: bytes) -> None:
        try:
            self._request = self._http.feed(data)
        except HandshakeError as error:
            await self._refuse(http_proxy.refusal(error))
            raise

    async def serve(self) -> None:
        """Open the stream, answer, and hand the connection over."""
        request = self._request
        assert request is not None
        if isinstance(request, SocksRequest):
            await self._serve_socks(request)
        else:
            await self._serve_http(request)

    async def _open(self, host: str, port: int) -> Stream:
        try:
            target = parse_target(f"tcp:{join_host_port(host, port)}")
        except UsageError as error:
            raise StreamError("forbidden", f"not a target: {error.message}") from error
        return await self._connect(str(target), self._peer)

    async def _serve_socks(self, request: SocksRequest) -> None:
        if request.command is Command.UDP_ASSOCIATE:
            await self._serve_datagrams(request)
            return
        try:
            stream = await self._open(request.host, request.port)
        except StreamError as error:
            await self._refuse(socks.reply(request, error.code))
            return
        await self._answer(stream, socks.reply(request, "opened"), self._socks.leftover)

    async def _serve_datagrams(self, request: SocksRequest) -> None:
        """RFC 1928 §7: "A UDP association terminates when the TCP connection that the UDP ASSOCIATE request arrived on
        terminates."
        """
        try:
            association = self._associate(request.port)
        except StreamError as error:
            await self._refuse(socks.reply(request, error.code))
            return
        except LocalError as error:
            _log.warning("no relay for datagrams", peer=self._peer, reason=str(error))
            await self._refuse(socks.reply(request, "limit"))
            return
        try:
            await self._transport.send(socks.reply(request, "opened", *association.address))
            while await self._transport.receive(limits.READ_FIRST_BYTES):
                pass  # nothing is due on this connection any more
        finally:
            self._dissolve(association)

    async def _serve_http(self, request: ProxyRequest) -> None:
        try:
            stream = await self._open(request.host, request.port)
        except StreamError as error:
            await self._refuse(http_proxy.refusal(http_proxy.failure(error.code, str(error))))
            return
        if request.method == "CONNECT":
            await self._answer(stream, http_proxy.ESTABLISHED, self._http.leftover)
        else:
            await self._forward(stream, request)

    async def _answer(self, stream: Stream, answer: bytes, early: bytes) -> None:
        """The target accepted: only now the application is told so."""
        try:
            await self._transport.send(answer)
        except BaseException:
            stream.reset("reset", "the application went away")
            raise
        stream.begin(self._reactor, self._transport.detach(), early)

    async def _forward(self, stream: Stream, request: ProxyRequest) -> None:
        """One request and its response. A second request on this connection might be for another target."""
        try:
            near, far = socket.socketpair()
        except OSError as error:
            why = f"the proxy has no sockets left: {error.strerror}"
            stream.reset("limit", why)
            _log.warning("request refused", peer=self._peer, reason=why)
            await self._refuse(http_proxy.refusal(http_proxy.failure("limit", why)))
            return
        near.setblocking(False)
        stream.begin(self._reactor, near, request.head)
        pair = Transport(far)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_body, stream, request, pair, far)
                while data := await self._receive_answer(pair):
                    self._answered += len(data)
                    await self._transport.send(data)
                nursery.cancel_scope.cancel()
            if self._answered == stream.inbound.total or self._next_came:
                await self._transport.finish()
            elif self._fault is not None and not self._answered:
                await self._refuse(http_proxy.refusal(self._fault))
            else:
                # The pair cannot carry the stream's reset, and its end is not that of the answer.
                sockets.reset(self._transport.detach())
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as group:
            raise ConnectionAbortedError("the connection broke") from group
        finally:
            pair.close()

    async def _send_body(self, stream: Stream, request: ProxyRequest, pair: Transport, far: socket.socket) -> None:
        """The body, and the end of what the application has to say: `far` is what `pair` sends on."""
        data = self._http.leftover
        while True:
            try:
                body = request.body.feed(data)
            except HandshakeError as error:
                _log.warning("request refused", peer=self._peer, reason=str(error))
                self._fault = error
                stream.reset("reset", "the application broke the rules of HTTP")
                return
            try:
                if body:
                    await pair.send(body)
            except OSError:
                return  # the stream is over: what the origin has said before is still to be read
            if data[len(body) :].strip(b"\r\n"):  # RFC 9112 §2.2: an empty line behind the body is no request
                # The application has its answer and asks again, since the origin keeps its connection all the same.
                # It would wait in vain; once this one has ended it tries again on another.
                far.shutdown(socket.SHUT_WR)
                await self._silence()
                self._next_came = True
                stream.reset("reset", "the answer was over")
                return
            data = await self._transport.receive(limits.READ_FIRST_BYTES)
            if not data and request.body.complete:
                far.shutdown(socket.SHUT_WR)
                return
            if not data:
                pair.close()
                return

    async def _receive_answer(self, pair: Transport) -> bytes:
        """The next bytes, or none: also when the stream was reset and left a part of the body unread."""
        self._silent_since = trio.current_time()
        try:
            return await pair.receive(limits.READ_FIRST_BYTES)
        except ConnectionResetError:
            return b""
        finally:
            self._silent_since = math.inf

    async def _silence(self) -> None:
        """Until the origin has begun to answer, and then said nothing for LINGER_SECONDS though it could."""
        while True:
            silent = trio.current_time() - self._silent_since
            if self._answered and silent >= limits.LINGER_SECONDS:
                return
            await trio.sleep(limits.LINGER_SECONDS / 4)

    async def _refuse(self, answer: bytes) -> None:
        with trio.move_on_after(limits.LINGER_SECONDS), suppress(OSError):
            if answer:
                await self._transport.send(answer)
            await self._transport.finish()
