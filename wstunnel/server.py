"""The server's role: listen, authenticate, serve links, dial targets."""

from __future__ import annotations

import os
import secrets
import socket
import ssl
from datetime import UTC, datetime
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from wstunnel import descriptors, limits, logs, systemd, tls, validity
from wstunnel.auth import Users
from wstunnel.config import ServerConfig
from wstunnel.dial import is_local_address, source_addresses
from wstunnel.egress import Egress
from wstunnel.endpoints import tcp, unix
from wstunnel.endpoints.dynamic import DynamicForwards
from wstunnel.endpoints.listeners import Bound
from wstunnel.errors import HandshakeError, LocalError, ProtocolError
from wstunnel.front import NO_HEADER, Front, Peer
from wstunnel.link import Link
from wstunnel.liveness import Sleep, boottime
from wstunnel.plain_server import PlainServer
from wstunnel.policy import Policy
from wstunnel.reactor import Reactor, make_reactor
from wstunnel.reverse_server import Place, Places
from wstunnel.server_session import ServerSession
from wstunnel.session import Principal
from wstunnel.state import Announcement, Claim, write_announcement
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
    from wstunnel.flow import DialledFlow
    from wstunnel.stream import Stream

_log = logs.logger("server")

TAKE_OVER_SECONDS = 2.0
"""For a user's next session to ask for the places that the last one left."""
DISPLACED = "the user's next session has begun"
KEEPALIVE_ADVICE = int(limits.PING_AFTER_SECONDS)
QUIET_SECONDS = 7200
"""Longest silence that a client may ask for (`hello.quiet`): so long a link whose client is gone may stay."""


class Server:
    """Everything that one running server holds. Owner of links that have not said `hello` yet.

    Args:
        config: what to do.
        reactor: where sockets live.
        nursery: where dials run.
        listeners: what is bound; clients cannot open it.
        context: TLS, or None for `--plain`.
        descriptors: how many sockets the process may have.
    """

    def __init__(
        self,
        config: ServerConfig,
        reactor: Reactor,
        nursery: trio.Nursery,
        listeners: list[Bound],
        context: ssl.SSLContext | None,
        *,
        descriptors: int = 2 * limits.PRINCIPAL_LINKS,
    ) -> None:
        self.reactor = reactor
        self.nursery = nursery
        files = [bound.file for bound in listeners if bound.file is not None]
        self.policy = Policy(
            config.allow,
            own_sockets=[bound.sock.getsockname()[:2] for bound in listeners if bound.file is None],
            is_local=is_local_address,
            is_own_path=lambda path: any(file.is_at(path) for file in files),
        )
        self.users = Users(config.state_dir)
        self.egress = Egress(reactor, nursery, source_addresses(config.sources))
        self.places = Places(
            config.allow_listen, most=min(limits.PRINCIPAL_LISTENING, descriptors // limits.LISTENING_DIVISOR)
        )
        self.plain = PlainServer(config, self)
        self.gone = trio.Event()
        self.max_resume_window = config.max_resume_window
        self.udp_timeout = config.udp_timeout
        self._config = config
        self._front = Front(config.proxy_protocol, config.trust_proxy)
        self._context = context
        self._descriptors = descriptors
        self.dynamic = DynamicForwards(reactor, nursery, most=self._most_handshakes())
        self._id = secrets.token_urlsafe(16)
        self._boot = secrets.token_urlsafe(16)
        self._budget = Budget(limits.PROCESS_BYTES)
        self._crowd = Crowd()
        self._principals: dict[str, Principal] = {}
        self._sessions: dict[tuple[str, str], ServerSession] = {}
        self._greeting: dict[Link, str] = {}  # links before hello, and their principal's name
        self._handshakes: dict[trio.CancelScope, None] = {}
        self._stopping = False

    # --- connections --------------------------------------------------------------------------------------------------

    def accepted(self, sock: socket.socket) -> None:
        """A new connection: its handshake runs as a task of its own."""
        scope = trio.CancelScope()
        self._count(scope)
        self.nursery.start_soon(self._handshake, sock, scope)

    def _count(self, scope: trio.CancelScope) -> None:
        """Among the handshakes, at the expense of the oldest if there are too many."""
        if scope not in self._handshakes:
            while len(self._handshakes) >= self._most_handshakes():
                self._drop_handshake()
            self._handshakes[scope] = None

    def drop_oldest(self) -> None:
        """No descriptor is left: what only connected, here or at a reverse forward that is a proxy, gives some back."""
        self._drop_handshake()
        self.dynamic.drop_oldest()

    def _drop_handshake(self) -> None:
        """Strangers who only connect must not lock users out: the handshake that began first goes."""
        if self._handshakes:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.cancel()

    def _most_handshakes(self) -> int:
        return descriptors.most_handshakes(self._descriptors)

    def share(self, most: int) -> int:
        """`most`, or one principal's part of the descriptors if that is less."""
        return min(most, int(self._descriptors * limits.PRINCIPAL_SHARE))

    async def _handshake(self, sock: socket.socket, scope: trio.CancelScope) -> None:
        peer = Peer.of(sock, tcp.peer_name(sock))
        transport = Transport(sock, self._context, server_side=True)
        try:
            with scope:
                await self._answer(transport, peer, scope)
        except (ssl.SSLError, OSError, trio.BrokenResourceError) as error:
            _log.debug("connection failed in its handshake", peer=peer.name, reason=str(error))
        finally:
            self._handshakes.pop(scope, None)
            transport.close()

    async def _answer(self, transport: Transport, peer: Peer, scope: trio.CancelScope) -> None:
        """Upgrade, or refuse. A refusal lingers, and counts as a handshake until it is over."""
        refusal: HandshakeError | None = None
        unannounced: str | None = NO_HEADER
        secured = False
        with trio.move_on_after(limits.HANDSHAKE_SECONDS) as deadline:
            try:
                if not await self._front.greet(transport, peer):
                    return
                unannounced = None
                await transport.handshake()
                secured = True
                await self._upgrade(transport, RequestReader(), peer, deadline, scope)
            except HandshakeError as error:
                refusal = error
            except ProtocolError as error:
                unannounced = str(error)
        if unannounced is not None:
            # No answer: in which protocol it would be, nobody knows.
            _log.warning("connection closed", peer=peer.name, reason=unannounced)
            return
        if deadline.cancelled_caught:
            refusal = HandshakeError(408, "the request did not arrive in time")
        if refusal is not None:
            _log.warning("connection refused", peer=peer.name, status=refusal.status, reason=str(refusal))
            if secured:
                await self._refuse(transport, refusal, scope)

    async def _upgrade(
        self,
        transport: Transport,
        reader: RequestReader,
        peer: Peer,
        deadline: trio.CancelScope,
        scope: trio.CancelScope,
    ) -> None:
        request = None
        while request is None:
            data = await transport.receive(limits.HEAD_BYTES)
            if not data:
                return
            request = reader.feed(data)
        self._front.believe(peer, request)
        endpoint = self.plain.find(request.path)
        if endpoint is not None:
            await self.plain.serve(
                endpoint, transport, request, reader=reader, peer=peer.name, deadline=deadline,
                known=partial(self._handshakes.pop, scope, None),
            )  # fmt: skip
            return
        upgrade = handshake.accept(request, path=self._config.path, subprotocols=(SUBPROTOCOL,))
        token = handshake.bearer_token(request) or ""
        try:
            name = self.users.authenticate(token)
        except LocalError as error:
            _log.error("the users cannot be read", reason=str(error))
            raise HandshakeError(503, handshake.TRY_AGAIN_LATER) from error
        if name is None:
            raise HandshakeError(401, "no valid token", (("WWW-Authenticate", 'Bearer realm="wstunnel"'),))
        if self.links_of(name) >= self.share(limits.PRINCIPAL_LINKS):
            raise HandshakeError(503, handshake.TOO_MANY_LINKS)
        await transport.send(handshake.accept_response(upgrade))
        link = Link(LinkProtocol("server"), self, peer=peer.name, now=self.reactor.now)
        self._greeting[link] = name
        link.start(self.reactor, transport.detach(), reader.leftover)

    def links_of(self, name: str) -> int:
        """A user's links, those included that have not said hello yet."""
        principal = self._principals.get(name)
        return (0 if principal is None else principal.links) + sum(user == name for user in self._greeting.values())

    def principal(self, name: str) -> Principal:
        """Who was authenticated by that name, since the server started or now for the first time."""
        principal = self._principals.get(name)
        if principal is None:
            principal = Principal(
                name,
                self._budget,
                self._principals,
                remember=max(self.max_resume_window, limits.RESUME_WINDOW_SECONDS),
                crowd=self._crowd,
            )
        return principal

    async def _refuse(self, transport: Transport, error: HandshakeError, scope: trio.CancelScope) -> None:
        with trio.move_on_after(limits.LINGER_SECONDS):
            await transport.send(handshake.refusal(error))
            self._count(scope)  # again, if it was a user whose target could not be reached
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
        principal = self.principal(name)
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
        quiet = min(message.quiet, QUIET_SECONDS)
        if quiet > limits.PING_AFTER_SECONDS:
            link.leave_alone(quiet)
        link.protocol.send(self._welcome(known=known, resume_window=int(session.resume_window), quiet=quiet))
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
                if isinstance(other, ServerSession) and other.reverse:
                    # Not at once: the next session is about to take its places over, without a gap.
                    self.reactor.at(self.reactor.now + TAKE_OVER_SECONDS, partial(_end_displaced, other))
                else:
                    other.close(1000, DISPLACED)

    def _welcome(self, *, known: bool, resume_window: int = 0, quiet: int = 0) -> Welcome:
        return Welcome(
            version=VERSION,
            server=self._id,
            boot=self._boot,
            known=known,
            resume_window=resume_window,
            keepalive=KEEPALIVE_ADVICE,
            features=list(FEATURES),
            quiet=quiet,
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

    def dial(self, principal: Principal, stream: Stream | DialledFlow, target: Target) -> None:
        """Connect a new stream or flow to its target."""
        self.egress.dial(stream, target, self.policy, principal=principal.name)

    def negotiate(self, place: Place, sock: socket.socket) -> None:
        """An application at a reverse forward that is a proxy."""
        self.dynamic.accepted(sock, place.forward, place.way, principal=place.principal.name)

    def forget(self, session: ServerSession) -> None:
        """The session has neither links nor streams any more."""
        if self._sessions.pop((session.principal.name, session.id), None) is None:
            return
        session.leave()
        _log.info(
            "client gone", **session.describe(), cuts=session.outages.cuts, resumptions=session.outages.resumptions
        )
        self._check_gone()

    def plain_gone(self) -> None:
        """A plain endpoint's connection ended."""
        self._check_gone()

    def _check_gone(self) -> None:
        if self._stopping and not (self._sessions or self._greeting or self.plain.connections):
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
                self.plain.woke(now)
            for link in list(self._greeting):
                link.sweep(now)
            for session in list(self._sessions.values()):
                session.sweep(now)
            self.plain.sweep(now)
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
        self.plain.stop()
        self._check_gone()


def _end_displaced(session: ServerSession) -> None:
    if not session.links:
        session.close(1000, DISPLACED)


def _tls(config: ServerConfig) -> tuple[ssl.SSLContext | None, tuple[bytes, ...]]:
    """The context, and the pin for invitations when the certificate is our own."""
    if config.plain:
        return None, ()
    if config.cert is not None and config.key is not None:
        context = tls.server_context(config.cert, config.key)
        _warn_of_dates(config.cert)
        return context, ()
    cert, key = tls.ensure_certificate(config.state_dir, names=(socket.gethostname(),))
    return tls.server_context(cert, key), (tls.certificate_pin(cert),)


def _warn_of_dates(cert: Path) -> None:
    try:
        trouble = validity.trouble(tls.first_certificate(cert), datetime.now(UTC))
    except (ValueError, LocalError):
        return  # OpenSSL has read it, in a form that certificates no longer have: clients will say
    if trouble is not None:
        _log.warning(f"the certificate {trouble}", file=cert)


def _warn_exposed(config: ServerConfig, addresses: tuple[str, ...]) -> None:
    if all(ip_address(address).is_loopback for address in addresses):
        return
    if config.plain:
        _log.warning(
            "--plain on an address that others reach: tokens travel in the clear unless a proxy in front ends TLS",
            bind=" ".join(addresses),
        )
    if config.endpoints and config.endpoint_auth == "none":
        _log.warning(
            "--endpoint-auth none on an address that others reach: whoever reaches it may use every endpoint",
            bind=" ".join(addresses),
        )


def _bind(config: ServerConfig, addresses: tuple[str, ...], listeners: list[Bound]) -> None:
    """Bind everything, TCP first, appending to `listeners`, which the caller closes, also when this fails.

    Raises:
        LocalError: in use, not permitted, no such address, no such directory.
    """
    if addresses:
        sockets = tcp.bind_all(addresses, config.port, lenient=not config.bind)
        listeners += [Bound(sock, tcp.local_name(sock)) for sock in sockets]
    for path, mode in config.bind_unix:
        sock, file = unix.bind(path, mode)
        listeners.append(Bound(sock, f"unix:{path}", file))


async def run(
    config: ServerConfig, *, shutdown: trio.Event, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
) -> None:
    """The server, until `shutdown` is set; then it closes everything within 2 × LINGER_SECONDS and returns.

    It binds, makes its certificate, writes its announcement, and only then listens: but on Unix sockets at once.

    Args:
        config: what to do.
        shutdown: set by the caller to end it in good order; cancelling ends it at once.
        task_status: started with the addresses once it listens.

    Raises:
        LocalError: a port in use, no permission, an unreadable file.
    """
    available = descriptors.raise_limit()
    addresses = config.bind
    if not addresses and not config.bind_unix:
        addresses = ("0.0.0.0", "::")  # noqa: S104  # the documented default
    listeners: list[Bound] = []
    claim: Claim | None = None
    try:
        _bind(config, addresses, listeners)
        context, pins = _tls(config)
        port = listeners[0].sock.getsockname()[1] if addresses else None
        claim = Claim(config.state_dir, port)
        if claim.other is not None:
            _log.warning(
                "another server runs with this state directory, and `wstunnel invite` names this one from now on:"
                " give each its own --state-dir, or name the other one by `wstunnel invite --url`",
                other=claim.other, directory=config.state_dir,
            )  # fmt: skip
        write_announcement(
            config.state_dir,
            Announcement(scheme="ws" if config.plain else "wss", port=port, path=config.path, pins=pins),
        )
        for listener in listeners:
            tcp.activate(listener.sock)
    except BaseException:
        for listener in listeners:
            listener.close()
        if claim is not None:
            claim.release()
        raise
    _warn_exposed(config, addresses)
    try:
        await _serve(config, listeners, context, claim, available=available, shutdown=shutdown, task_status=task_status)
    finally:
        for listener in listeners:  # those that the reactor had not taken over
            listener.close()
        claim.release()


async def _serve(
    config: ServerConfig,
    listeners: list[Bound],
    context: ssl.SSLContext | None,
    claim: Claim,
    *,
    available: int,
    shutdown: trio.Event,
    task_status: trio.TaskStatus[list[str]],
) -> None:
    async with trio.open_nursery() as nursery:
        reactor = make_reactor()
        await nursery.start(reactor.run)
        server = Server(config, reactor, nursery, listeners, context, descriptors=available)
        names = [listener.name for listener in listeners]
        accepting = [tcp.Listener(listener.sock, server.accepted, server.drop_oldest) for listener in listeners]
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
        claim.release()
        for listener in listeners:
            listener.unlink()
        listeners.clear()  # once is enough: by now another server may have the path
        for acceptor in accepting:
            reactor.drop(acceptor)
        server.stop()
        await server.gone.wait()
        nursery.cancel_scope.cancel()


def _state_flag(directory: Path) -> str:
    from wstunnel.state import state_directory

    return "" if directory == state_directory(None, os.environ) else f" --state-dir {directory}"
