"""`wstunnel connect`: standard input and output as one stream."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import click

from wstunnel import limits
from wstunnel.cli import options, reach, reports
from wstunnel.errors import UsageError

if TYPE_CHECKING:
    from wstunnel.targets import Target


def _parse_target(text: str) -> Target:
    from wstunnel.targets import parse_target

    target = parse_target(text)
    if target.kind == "udp":
        raise UsageError("standard input is a stream of bytes, which UDP has not", text=text, position=0)
    return target


@click.command(
    epilog="""\b
    Examples:
      ssh -o ProxyCommand='wstunnel connect %h:%p' user@host
      wstunnel connect db:5432 < request > reply
      wstunnel connect unix:/run/docker.sock

    The end of standard input is passed on, and the answer still read: as nc -N does.
    """
)
@click.argument("target", type=options.Parsed("TARGET", _parse_target))
@click.argument("urls", metavar="[URL]...", nargs=-1)
@reach.flags
@click.option(
    "--resume-window",
    type=options.DURATION,
    default=f"{limits.RESUME_WINDOW_SECONDS // 60}m",
    show_default=True,
    help="How long the stream is kept when its connection broke; 0 not at all. The server may grant less.",
)
@options.logging
@click.pass_context
def connect(
    ctx: click.Context,
    /,
    *,
    target: Target,
    urls: tuple[str, ...],
    resume_window: int,
    log_format: Literal["text", "json"],
    **server: Any,
) -> int:
    """Connect standard input and output to TARGET.

    TARGET is [tcp:]HOST:PORT or unix:/PATH, as the server reaches it.
    """
    from wstunnel import logs
    from wstunnel.cli import running
    from wstunnel.connect import run

    # What happens is the application's to say: only what is wrong is told, unless more is asked for.
    logs.configure(verbosity=reports.verbosity(ctx) - 1, format=log_format, environ=os.environ)
    config = reach.configure(urls, idle_links=0, resume_window=resume_window, **server)
    return running.run(partial(run, config, target), {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129})
