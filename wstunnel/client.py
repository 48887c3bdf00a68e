"""The client's role: listen for applications, and run the session that carries them."""

from __future__ import annotations

import os
import socket
from functools import partial

import trio

from wstunnel import descriptors, limits, logs, systemd, tls
from wstunnel.client_session import ClientSession
from wstunnel.config import ClientConfig
from wstunnel.dialler import Dialler
from wstunnel.endpoints import tcp
from wstunnel.errors import LocalError
from wstunnel.forwards import Forward
from wstunnel.liveness import Sleep, boottime
from wstunnel.reactor import make_reactor

_log = logs.logger("client")


def _bind(config: ClientConfig) -> list[tuple[socket.socket, Forward]]:
    """Listen for every forward. One that cannot is reported, and ends it all only if asked to, or if none could."""
    listening: list[tuple[socket.socket, Forward]] = []
    try:
        for forward in config.local_forwards:
            try:
                listening += [(sock, forward) for sock in _listen(forward)]
            except LocalError as error:
                if config.exit_on_forward_failure or len(config.local_forwards) == 1:
                    raise
                _log.error(str(error), forward=str(forward))
        if not listening:
            raise LocalError("none of the forwards could be set up")
    except BaseException:
        for sock, _ in listening:
            sock.close()
        raise
    return listening


def _listen(forward: Forward) -> list[socket.socket]:
    sockets = tcp.bind_all(forward.addresses, forward.port, lenient=len(forward.addresses) > 1)
    try:
        for sock in sockets:
            tcp.activate(sock)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    for sock in sockets:
        _log.announce(f"listening {tcp.local_name(sock)} -> {forward.target}")
    return sockets


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
    pins = config.pins or config.url.pins
    context = tls.client_context(config.ca, pins) if config.url.scheme == "wss" else None
    dialler = Dialler(config.url, context, pins=pins, headers=config.headers)
    descriptors.raise_limit()
    listening = _bind(config)
    reactor = make_reactor()
    session = ClientSession(dialler, reactor, idle_links=config.idle_links, resume_window=config.resume_window)
    try:
        await _serve(config, session, listening, shutdown, task_status)
    finally:
        session.drop_waiting()
        for sock, _ in listening:  # those that the reactor had not taken over
            sock.close()


async def _serve(
    config: ClientConfig,
    session: ClientSession,
    listening: list[tuple[socket.socket, Forward]],
    shutdown: trio.Event,
    task_status: trio.TaskStatus[list[str]],
) -> None:
    reactor = session.reactor
    async with trio.open_nursery() as nursery:
        await nursery.start(reactor.run)
        for sock, forward in listening:
            tcp.Listener(sock, partial(session.accepted, forward=forward)).start(reactor)
        nursery.start_soon(session.keep_links)
        nursery.start_soon(_sweep, session)
        systemd.notify("READY=1", f"STATUS=connecting to {config.url.authority}", environ=os.environ)
        task_status.started([tcp.local_name(sock) for sock, _ in listening])
        await shutdown.wait()
        systemd.notify("STOPPING=1", environ=os.environ)
        nursery.cancel_scope.deadline = trio.current_time() + 2 * limits.LINGER_SECONDS
        session.stop()
        if session.links:
            await session.gone.wait()
        nursery.cancel_scope.cancel()


async def _sweep(session: ClientSession) -> None:
    sleep = Sleep(trio.current_time(), boottime())
    while True:
        await trio.sleep(limits.SWEEP_SECONDS)
        now = session.reactor.now
        if sleep.slept(now, boottime()):
            session.woke(now)
        session.sweep(now)
