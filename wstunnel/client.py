"""The client's role: listen for applications, and run the session that carries them."""

from __future__ import annotations

import hmac
import os
import socket
from collections.abc import Callable
from functools import partial

import trio

from wstunnel import descriptors, limits, logs, systemd
from wstunnel.client_session import ClientSession
from wstunnel.config import ClientConfig
from wstunnel.egress import Egress
from wstunnel.endpoints import tcp
from wstunnel.endpoints.dynamic import Authenticate, DynamicForwards
from wstunnel.endpoints.listeners import Bound, listen
from wstunnel.endpoints.udp import UdpListener
from wstunnel.errors import LocalError
from wstunnel.failover import make_dialler
from wstunnel.forwards import Forward
from wstunnel.liveness import Sleep, boottime
from wstunnel.raw import RawForwards
from wstunnel.reactor import make_reactor
from wstunnel.reverse_client import ReverseForwards
from wstunnel.tls_relay import Relays

_log = logs.logger("client")


def _bind(config: ClientConfig) -> list[tuple[Bound, Forward]]:
    """Listen for every forward. One that cannot is reported, and ends it all only if asked to, or if none could."""
    listening: list[tuple[Bound, Forward]] = []
    forwards = config.local_forwards
    try:
        for forward in forwards:
            try:
                bound = listen(forward)
            except LocalError as error:
                if config.exit_on_forward_failure or len(forwards) + len(config.reverse_forwards) == 1:
                    raise
                _log.error(str(error), forward=str(forward))
                continue
            listening += [(each, forward) for each in bound]
            for each in bound:
                _log.announce(f"listening {each.name} -> {forward.whither}")
        if forwards and not listening and not config.reverse_forwards:
            raise LocalError("none of the forwards could be set up")
    except BaseException:
        for each, _ in listening:
            each.close()
        raise
    return listening


async def run(
    config: ClientConfig, *, shutdown: trio.Event, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
) -> None:
    """The client, until `shutdown` is set; then it closes everything within LINGER_SECONDS and returns.

    Args:
        config: what to do.
        shutdown: set by the caller to end it in good order; cancelling ends it at once.
        task_status: started with the local addresses once all forwards listen.

    Raises:
        LocalError: a forward could not be set up (see `exit_on_forward_failure`), or a file could not be read.
        ServerRefusedError: the server refused the credentials, or speaks another version.
        TrustError: the server could not prove who it is.
    """
    listening = _bind(config)
    try:
        reverse = ReverseForwards(
            config.reverse_forwards, exit_on_failure=config.exit_on_forward_failure, only=not listening
        )
        session, relays = make_session(config, reverse=reverse)
        try:
            await _serve(config, session, listening, shutdown, task_status, relays=relays)
        finally:
            session.ingress.stop()
    finally:
        for bound, _ in listening:  # the reactor has closed those that it had taken over
            bound.close()


def make_session(config: ClientConfig, *, reverse: ReverseForwards | None = None) -> tuple[ClientSession, Relays]:
    """A session that `serve_session` runs, and what it needs for proxies that are spoken to in TLS.

    Raises:
        LocalError: `ca` could not be read, or a library is missing.
        UsageError: a URL has no token.
    """
    relays = Relays()
    dialler = make_dialler(config, relays, endpoint=not config.tunnelled)
    session = ClientSession(
        dialler,
        make_reactor(),
        idle_links=config.idle_links,
        resume_window=config.resume_window,
        reverse=reverse,
        descriptors=descriptors.raise_limit(),
    )
    session.flows.timeout = config.udp_timeout
    dialler.streams_wait = lambda: bool(session.streams)
    return session, relays


async def serve_session(
    session: ClientSession,
    relays: Relays,
    *,
    tunnelled: bool = True,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep a session's links, for ever, or none unless `tunnelled`. Started once its reactor runs.

    Raises:
        ServerRefusedError, TrustError: see `ClientSession.keep_links`.
    """
    async with trio.open_nursery() as nursery:
        await nursery.start(session.reactor.run)
        await nursery.start(relays.run)
        session.egress = Egress(session.reactor, nursery)
        if tunnelled:
            nursery.start_soon(_keep_links, session)
        nursery.start_soon(_sweep, session)
        task_status.started()


async def _keep_links(session: ClientSession) -> None:
    """An error ends the client, but not before the server was told: it would keep its streams and places for it."""
    try:
        await session.keep_links()
    except Exception:
        # Shielded, or who closes the session meanwhile would never see the error.
        with trio.move_on_after(limits.LINGER_SECONDS, shield=True):
            session.stop()
            if session.links:
                await session.gone.wait()
        raise


async def close_session(session: ClientSession, nursery: trio.Nursery) -> None:
    """Say goodbye to the server, and end the nursery that runs the session: at the latest after 2 × LINGER_SECONDS."""
    nursery.cancel_scope.deadline = trio.current_time() + 2 * limits.LINGER_SECONDS
    session.stop()
    if session.links:
        await session.gone.wait()
    nursery.cancel_scope.cancel()


async def _serve(
    config: ClientConfig,
    session: ClientSession,
    listening: list[tuple[Bound, Forward]],
    shutdown: trio.Event,
    task_status: trio.TaskStatus[list[str]],
    *,
    relays: Relays,
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_session, session, relays, tunnelled=config.tunnelled))
        raw: RawForwards | None = None
        if any(forward.raw for forward in config.local_forwards):
            raw = RawForwards(session.reactor, nursery, make_dialler(config, relays, endpoint=True), session.principal)
            nursery.start_soon(_sweep, raw)
        most = descriptors.most_handshakes(session.descriptors)
        dynamic = DynamicForwards(session.reactor, nursery, authenticate=_judge(config.dynamic_login), most=most)
        for bound, forward in listening:
            if forward.udp:
                session.udp_forwards = True
                UdpListener(bound.sock, session.ingress, target=str(forward.target)).start(session.reactor)
                continue
            accepted: Callable[[socket.socket], None]
            if raw is not None and forward.raw:
                accepted = raw.accepted
            elif forward.speaks:
                accepted = partial(dynamic.accepted, forward=forward, way=lambda: (session.ingress, ""))
            else:
                accepted = partial(session.accepted, forward=forward)
            tcp.Listener(bound.sock, accepted, dynamic.drop_oldest).start(session.reactor)
        systemd.notify("READY=1", f"STATUS=connecting to {config.url.authority}", environ=os.environ)
        task_status.started([bound.name for bound, _ in listening])
        await shutdown.wait()
        systemd.notify("STOPPING=1", environ=os.environ)
        if raw is not None:
            raw.stop()
            with trio.move_on_after(limits.LINGER_SECONDS):
                await raw.gone.wait()
        await close_session(session, nursery)


def _judge(login: tuple[bytes, bytes] | None) -> Authenticate | None:
    """Compares in constant time, for all that the user's name or the password have in common with the right ones."""
    if login is None:
        return None

    def judge(user: bytes, password: bytes) -> bool:
        right_user = hmac.compare_digest(user, login[0])
        return hmac.compare_digest(password, login[1]) and right_user

    return judge


async def _sweep(session: ClientSession | RawForwards) -> None:
    sleep = Sleep(trio.current_time(), boottime())
    while True:
        await trio.sleep(limits.SWEEP_SECONDS)
        now = session.reactor.now
        if sleep.slept(now, boottime()):
            session.woke(now)
        session.sweep(now)
