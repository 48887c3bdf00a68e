"""One stream between standard input and output and a target: `wstunnel connect`, as ssh's ProxyCommand."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import trio

from wstunnel.client import close_session, make_session, serve_session
from wstunnel.endpoints.stdio import Stdio
from wstunnel.errors import LocalError, ServerRefusedError, StreamError
from wstunnel.ingress import Wanted
from wstunnel.stream import Stream

if TYPE_CHECKING:
    from wstunnel.config import ClientConfig
    from wstunnel.targets import Target


async def run(
    config: ClientConfig,
    target: Target,
    *,
    source: int = 0,
    sink: int = 1,
    shutdown: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Carry `source` to the target and what it answers to `sink`, until both directions have ended or `shutdown`.

    Args:
        config: the server; its forwards are not looked at.
        target: what the server dials.
        source: a descriptor to read, to its end.
        sink: a descriptor to write; closed at the end unless the stream failed, see `Stdio`.
        shutdown: set by the caller to end it early.
        task_status: started when the stream was asked for.

    Raises:
        ServerRefusedError: the server refused the credentials, or its policy the target.
        StreamError: the target refused, or the stream was reset.
        LocalError: `source` could not be read, or `sink` not written.
        TrustError: the server could not prove who it is.
    """
    session, relays = make_session(config)
    session.tells_refusals = True  # by the error that is raised
    stdio = Stdio(source, sink)
    outcome: list[tuple[str, str]] = []
    over = trio.Event()

    def finish(code: str, message: str) -> None:
        outcome.append((code, message))
        stdio.over(failed=code != "finished")
        over.set()

    def ended(stream: Stream) -> None:
        assert stream.outcome is not None
        finish(*stream.outcome)

    async def leave_early() -> None:
        await shutdown.wait()
        over.set()

    async def leave_unread() -> None:
        await stdio.failed.wait()
        finish("reset", "standard input could not be read")

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_session, session, relays)
            nursery.start_soon(leave_early)
            nursery.start_soon(leave_unread)
            stdio.start()
            session.ingress.accepted(Wanted(str(target), "stdio", stdio.sock, ended=ended, dropped=finish))
            task_status.started()
            await over.wait()
            if not shutdown.is_set() and outcome[0][0] == "finished":
                await stdio.ended.wait()  # what was delivered to the socket still has to be written
            stdio.close()
            await close_session(session, nursery)
    finally:
        session.ingress.stop()
        stdio.close()
    if not shutdown.is_set():
        _judge(target, *outcome[0], stdio.broken, stdio.unread)


def _judge(target: Target, code: str, message: str, broken: OSError | None, unread: OSError | None) -> None:
    if unread is not None:
        raise LocalError(f"cannot read standard input: {unread.strerror}")
    if broken is not None and broken.errno != errno.EPIPE:
        raise LocalError(f"cannot write standard output: {broken.strerror}")
    if broken is None and code == "forbidden":
        raise ServerRefusedError(message)
    if broken is None and code != "finished":
        raise StreamError(code, f"{target}: {message}" if code == "reset" else message)
