"""The server's role: listen, authenticate, serve links, dial targets."""

from __future__ import annotations

import os
import secrets
import socket
import ssl
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from wstunnel import descriptors, limits, logs, systemd, tls
from wstunnel.auth import Users
from wstunnel.config import ServerConfig
from wstunnel.dial import Begun, begin_dial, dial_target, is_local_address
from wstunnel.endpoints import tcp
from wstunnel.errors import HandshakeError, LocalError, ProtocolError, StreamError
from wstunnel.link import Link
from wstunnel.liveness import Sleep, boottime
from wstunnel.policy import Policy
from wstunnel.reactor import Reactor, make_reactor
from wstunnel.server_session import ServerSession
from wstunnel.session import Principal
from wstunnel.state import Announcement, write_announcement
from wstunnel.targets import Target
from wstunnel.transport import Transport
from wstunnel.wire import handshake
from wstunnel.wire.credit import Budget
from wstunnel.wire.http1 import RequestReader
from wstunnel.wire.messages import (
    FEATURES,
    SUBPROTOCOL,
    VERSION,
    AnyMessage,
    Hello,
    Welcome,
)
from wstunnel.wire.protocol import LinkProtocol
from wstunnel.wire.tombstones import Crowd

if TYPE_CHECKING:
    from wstunnel.stream import Stream

_log = logs.logger("server")

RESOLVER_THREADS = 8
"""Names that one principal resolves at once: slow names of one user must not stop the others."""
KEEPALIVE_ADVICE = int(limits.PING_AFTER_SECONDS)


class Server:
    """Everything that one running server holds. Owner of links that have not said `hello` yet.

    Args:
        config: what to do.
        reactor: where sockets live.
        nursery: where dials run.
        listeners: bound sockets; their addresses are closed to clients.
        context: TLS, or None for `--plain`.
        descriptors: how many sockets the process may have.
    """

    def __init__(
        self,
        config: ServerConfig,
        reactor: Reactor,
        nursery: trio.Nursery,
        listeners: list[socket.socket],
        context: ssl.SSLContext | None,
        *,
        descriptors: int = 2 * limits.PRINCIPAL_LINKS,
    ) -> None:
        self.reactor = reactor
        self.nursery = nursery
        own = [sock.getsockname()[:2] for sock in listeners]
        self.policy = Policy(config.allow, own_sockets=own, is_local=is_local_address)
        self.users = Users(config.state_dir)
        self.gone = trio.Event()
        self.max_resume_window = config.max_resume_window
        self._config = config
        self._context = context
        self._descriptors = descriptors
        self._id = secrets.token_urlsafe(16)
        self._boot = secrets.token_urlsafe(16)
        self._budget = Budget(limits.PROCESS_BYTES)
        self._crowd = Crowd()
        self._principals: dict[str, Principal] = {}
        self._limiters: dict[str, trio.CapacityLimiter] = {}
        self._sessions: dict[tuple[str, str], ServerSession] = {}
        self._greeting: dict[Link, str] = {}  # links before hello, and their principal's name
        self._handshakes: dict[trio.CancelScope, None] = {}
        self._stopping = False

    # --- connections --------------------------------------------------------------------------------------------------

    def accepted(self, sock: socket.socket) -> None:
        """A new connection: its handshake runs as a task of its own."""
        if len(self._handshakes) >= min(limits.HANDSHAKES, self._descriptors // limits.HANDSHAKES_DIVISOR):
            self.drop_oldest()
        scope = trio.CancelScope()
        self._handshakes[scope] = None
        self.nursery.start_soon(self._handshake, sock, scope)

    def drop_oldest(self) -> None:
        """Strangers who only connect must not lock users out: the handshake that began first goes."""
        if self._handshakes:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cancel()

    def share(self, most: int) -> int:
        """`most`, or one principal's part of the descriptors if that is less."""
        return min(most, int(self._descriptors * limits.PRINCIPAL_SHARE))

    async def _handshake(self, sock: socket.socket, scope: trio.CancelScope) -> None:
        peer = tcp.peer_name(sock)
        transport = Transport(sock, self._context, server_side=True)
        try:
            with scope:
                await self._answer(transport, peer)
        except (ssl.SSLError, OSError, trio.BrokenResourceError) as error:
            _log.debug("connection failed in its handshake", peer=peer, reason=str(error))
        finally:
            self._handshakes.pop(scope, None)
            transport.close()

    async def _answer(self, transport: Transport, peer: str) -> None:
        """Upgrade, or refuse. A refusal lingers, and counts as a handshake until it is over."""
        refusal: HandshakeError | None = None
        secured = False
        with trio.move_on_after(limits.HANDSHAKE_SECONDS) as deadline:
            try:
                await transport.handshake()
                secured = True
                await self._upgrade(transport, RequestReader(), peer)
            except HandshakeError as error:
                refusal = error
        if deadline.cancelled_caught:
            refusal = HandshakeError(408, "the request did not arrive in time")
        if refusal is not None:
            _log.warning("connection refused", peer=peer, status=refusal.status, reason=str(refusal))
            if secured:
                await self._refuse(transport, refusal)

    async def _upgrade(self, transport: Transport, reader: RequestReader, peer: str) -> None:
        request = None
        while request is None:
            data = await transport.receive(limits.HEAD_BYTES)
            if not data:
                return
            request = reader.feed(data)
        upgrade = handshake.accept(request, path=self._config.path, subprotocols=(SUBPROTOCOL,))
        token = handshake.bearer_token(request) or ""
        try:
            name = self.users.authenticate(token)
        except LocalError as error:
            _log.error("the users cannot be read", reason=str(error))
            raise HandshakeError(503, "try again later") from error
        if name is None:
            raise HandshakeError(401, "no valid token", (("WWW-Authenticate", 'Bearer realm="wstunnel"'),))
        if self._links_of(name) >= self.share(limits.PRINCIPAL_LINKS):
            raise HandshakeError(503, "too many links")
        await transport.send(handshake.accept_response(upgrade))
        link = Link(LinkProtocol("server"), self, peer=peer, now=self.reactor.now)
        self._greeting[link] = name
        link.start(self.reactor, transport.detach(), reader.leftover)

    def _links_of(self, name: str) -> int:
        """A user's links, those included that have not said hello yet."""
        principal = self._principals.get(name)
        return (0 if principal is None else principal.links) + sum(user == name for user in self._greeting.values())

    @staticmethod
    async def _refuse(transport: Transport, error: HandshakeError) -> None:
        with trio.move_on_after(limits.LINGER_SECONDS):
            await transport.send(handshake.refusal(error))
            await transport.finish()

    # --- links before hello -------------------------------------------------------------------------------------------

    def message(self, link: Link, message: AnyMessage) -> None:
        """`hello`: the link joins its session."""
        assert isinstance(message, Hello)  # the protocol lets nothing else through before it
        name = self._greeting[link]
        if self._stopping:
            raise ProtocolError("the server is stopping", 1001)
        if message.version != VERSION:
            link.protocol.send(self._welcome(known=False))  # it says which version would do
            _log.warning("client refused", peer=link.peer, principal=name, version=message.version)
            raise ProtocolError(f"version {message.version} is not spoken here, only {VERSION}", 1008)
        if message.role == "reverse":
            raise ProtocolError("reverse links are not offered", 1008)
        principal = self._principals.get(name)
        if principal is None:
            principal = Principal(
                name,
                self._budget,
                self._principals,
                remember=max(self.max_resume_window, limits.RESUME_WINDOW_SECONDS),
                crowd=self._crowd,
            )
        session = self._sessions.get((name, message.session))
        known = session is not None
        if session is None:
            session = self._sessions[name, message.session] = ServerSession(message.session, principal, self, message)
            _log.info(
                "client connected",
                principal=name,
                peer=link.peer,
                agent=message.agent,
                session=logs.hash_id(session.id),
            )
        del self._greeting[link]
        session.adopt_link(link)
        link.protocol.send(self._welcome(known=known, resume_window=int(session.resume_window)))
        session.welcomed(link)
        if message.role == "control" and not session.settled:
            session.settled = True
            self._displace(session)
        link.ping()  # its round trip is wanted for the windows

    def _displace(self, session: ServerSession) -> None:
        """A client that was killed cannot say goodbye: what it left ends when its user is back with another one."""
        for other in list(session.principal.sessions):
            if other is not session and not other.links:
                _log.info("session displaced by the user's next one", **other.describe())
                other.close(1000, "the user's next session has begun")

    def _welcome(self, *, known: bool, resume_window: int = 0) -> Welcome:
        return Welcome(
            version=VERSION,
            server=self._id,
            boot=self._boot,
            known=known,
            resume_window=resume_window,
            keepalive=KEEPALIVE_ADVICE,
            features=list(FEATURES),
        )

    def idle(self, link: Link) -> None:
        """Never: a link without a session carries nothing."""

    def stalled(self, link: Link) -> None:
        """Never: a link is not asked before it was greeted."""

    def lost(self, link: Link, reason: str) -> None:
        """A link went before it said hello."""
        self._greeting.pop(link, None)
        _log.debug("link lost before hello", peer=link.peer, reason=reason)
        self._check_gone()

    # --- life ---------------------------------------------------------------------------------------------------------

    def dial(self, principal: Principal, stream: Stream, target: Target) -> None:
        """Connect a new stream to its target; what takes time is a task of its own, which `stream.dialling` cancels.

        Not before the end of the reactor's batch: the link that brought `open` is still being read.
        """
        self.reactor.later(partial(self._dial, principal, stream, target))

    def _dial(self, principal: Principal, stream: Stream, target: Target) -> None:
        if stream.outcome is not None or stream.reason is not None:
            return  # it was reset in the same read: nobody wants the target any more
        try:
            begun = begin_dial(target, self.policy)
        except Exception as error:
            _refuse_target(stream, error)
            return
        if begun is not None and begun.done:
            self._connected(stream, begun.sock, begun.address)
        else:
            stream.dialling = trio.CancelScope()
            self.nursery.start_soon(self._await_dial, principal, stream, stream.dialling, target, begun)

    async def _await_dial(
        self, principal: Principal, stream: Stream, scope: trio.CancelScope, target: Target, begun: Begun | None
    ) -> None:
        with scope:
            try:
                sock, address = await dial_target(target, self.policy, limiter=self.limiter(principal), begun=begun)
            except Exception as error:
                _refuse_target(stream, error)
                return
            self._connected(stream, sock, address)

    def _connected(self, stream: Stream, sock: socket.socket, address: str) -> None:
        try:
            stream.connected(self.reactor, sock, address)
        except Exception as error:
            stream.fail(error)

    def limiter(self, principal: Principal) -> trio.CapacityLimiter:
        """Bounds the principal's threads that resolve names."""
        limiter = self._limiters.get(principal.name)
        if limiter is None:
            limiter = self._limiters[principal.name] = trio.CapacityLimiter(RESOLVER_THREADS)
        return limiter

    def forget(self, session: ServerSession) -> None:
        """The session has neither links nor streams any more."""
        if self._sessions.pop((session.principal.name, session.id), None) is None:
            return
        session.leave()
        _log.info(
            "client gone", **session.describe(), cuts=session.outages.cuts, resumptions=session.outages.resumptions
        )
        self._check_gone()

    def _check_gone(self) -> None:
        if self._stopping and not self._sessions and not self._greeting:
            self.gone.set()

    async def sweep_forever(self) -> None:
        """Once a second, every session and every link."""
        sleep = Sleep(trio.current_time(), boottime())
        while True:
            await trio.sleep(limits.SWEEP_SECONDS)
            now = self.reactor.now
            if sleep.slept(now, boottime()):
                for session in self._sessions.values():
                    session.woke(now)
            for link in list(self._greeting):
                link.sweep(now)
            for session in list(self._sessions.values()):
                session.sweep(now)
            for principal in self._principals.values():
                principal.tombstones.sweep(now)

    def stop(self) -> None:
        """Close everything in good order; `gone` is set once it is."""
        self._stopping = True
        for scope in self._handshakes:
            scope.cancel()
        for link in list(self._greeting):
            link.close(1001, "the server is stopping")
        for session in list(self._sessions.values()):
            session.drain()
            session.close(1001, "the server is stopping")
        self._check_gone()


def _refuse_target(stream: Stream, error: Exception) -> None:
    """The dial failed: for a reason that the client is told, or by our own fault, which ends this stream only."""
    if not isinstance(error, StreamError):
        stream.fail(error)
        return
    stream.note = " ".join(getattr(error, "__notes__", ()))
    stream.reset(error.code, str(error))


def _tls(config: ServerConfig) -> tuple[ssl.SSLContext | None, tuple[bytes, ...]]:
    """The context, and the pin for invitations when the certificate is our own."""
    if config.plain:
        return None, ()
    if config.cert is not None and config.key is not None:
        return tls.server_context(config.cert, config.key), ()
    cert, key = tls.ensure_certificate(config.state_dir, names=(socket.gethostname(),))
    return tls.server_context(cert, key), (tls.certificate_pin(cert),)


def _warn_plain(config: ServerConfig, addresses: tuple[str, ...]) -> None:
    if config.plain and not all(ip_address(address).is_loopback for address in addresses):
        _log.warning(
            "--plain on an address that others reach: tokens travel in the clear unless a proxy in front ends TLS",
            bind=" ".join(addresses),
        )


async def run(
    config: ServerConfig, *, shutdown: trio.Event, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
) -> None:
    """The server, until `shutdown` is set; then it closes everything within 2 × LINGER_SECONDS and returns.

    It binds, makes its certificate, writes its announcement, and only then listens.

    Args:
        config: what to do.
        shutdown: set by the caller to end it in good order; cancelling ends it at once.
        task_status: started with the addresses once it listens.

    Raises:
        LocalError: a port in use, no permission, an unreadable file.
    """
    available = descriptors.raise_limit()
    addresses = config.bind or ("0.0.0.0", "::")  # noqa: S104  # the documented default
    listeners = tcp.bind_all(addresses, config.port, lenient=not config.bind)
    try:
        context, pins = _tls(config)
        port = listeners[0].getsockname()[1]
        write_announcement(
            config.state_dir,
            Announcement(scheme="ws" if config.plain else "wss", port=port, path=config.path, pins=pins),
        )
        for listener in listeners:
            tcp.activate(listener)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    _warn_plain(config, addresses)
    try:
        await _serve(config, listeners, context, available=available, shutdown=shutdown, task_status=task_status)
    finally:
        for listener in listeners:  # those that the reactor had not taken over
            listener.close()


async def _serve(
    config: ServerConfig,
    listeners: list[socket.socket],
    context: ssl.SSLContext | None,
    *,
    available: int,
    shutdown: trio.Event,
    task_status: trio.TaskStatus[list[str]],
) -> None:
    async with trio.open_nursery() as nursery:
        reactor = make_reactor()
        await nursery.start(reactor.run)
        server = Server(config, reactor, nursery, listeners, context, descriptors=available)
        names = [tcp.local_name(listener) for listener in listeners]
        accepting = [tcp.Listener(listener, server.accepted, server.drop_oldest) for listener in listeners]
        for acceptor in accepting:
            acceptor.start(reactor)
        nursery.start_soon(server.sweep_forever)
        for name in names:
            _log.announce(f"listening {name}")
        if server.users.empty():
            _log.warning(
                f"no users yet: `wstunnel invite{_state_flag(config.state_dir)}` makes one and prints its login URL"
            )
        systemd.notify("READY=1", f"STATUS=listening on {', '.join(names)}", environ=os.environ)
        task_status.started(names)
        await shutdown.wait()
        systemd.notify("STOPPING=1", environ=os.environ)
        nursery.cancel_scope.deadline = trio.current_time() + 2 * limits.LINGER_SECONDS
        for acceptor in accepting:
            reactor.drop(acceptor)
        server.stop()
        await server.gone.wait()
        nursery.cancel_scope.cancel()


def _state_flag(directory: Path) -> str:
    from wstunnel.state import state_directory

    return "" if directory == state_directory(None, os.environ) else f" --state-dir {directory}"
