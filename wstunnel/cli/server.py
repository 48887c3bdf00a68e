"""`wstunnel server`: flags to a ServerConfig, then the role."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from wstunnel import limits
from wstunnel.cli import options, reports

if TYPE_CHECKING:
    from wstunnel.policy import Rule


def _parse_rule(text: str) -> Rule:
    from wstunnel.policy import parse_rule

    return parse_rule(text)


@click.command(
    epilog="""\b
    Examples:
      wstunnel server --port 443
      wstunnel server --cert fullchain.pem --key privkey.pem
      wstunnel server --allow db:5432 --allow '10.0.0.0/8:*'
      wstunnel server --plain --bind 127.0.0.1 --port 8080    # behind nginx

    Then `wstunnel invite` on the same machine prints the URL for a client.
    """
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=443,
    show_default=True,
    metavar="PORT",
    help="Port to listen on; 0 picks a free one.",
)
@click.option(
    "--bind",
    type=options.BIND,
    multiple=True,
    help="Address to listen on; may be repeated.  [default: all, IPv4 and IPv6]",
)
@click.option("--path", type=options.PATH, default="/", show_default=True, help="Path of the server's URL.")
@click.option("--plain", is_flag=True, help="No TLS: for use behind a proxy that ends TLS, or on loopback.")
@click.option(
    "--cert", type=options.FILE, metavar="FILE", help="Certificate chain (PEM).  [default: one made on the first start]"
)
@click.option("--key", type=options.FILE, metavar="FILE", help="Its private key (PEM).")
@click.option(
    "--allow",
    type=options.Parsed("RULE", _parse_rule),
    multiple=True,
    help="What clients may open: [tcp:]HOST|CIDR|*:PORT|LOW-HIGH|*. May be repeated; the first one replaces the"
    " default, which is everything but link-local, multicast and cloud metadata addresses.",
)
@click.option(
    "--max-resume-window",
    type=options.DURATION,
    default=f"{limits.MAX_RESUME_WINDOW_SECONDS // 3600}h",
    show_default=True,
    help="How long at most a stream whose connection broke is kept for its client; 0 not at all.",
)
@options.state_dir
@options.logging
@click.pass_context
def server(
    ctx: click.Context,
    *,
    port: int,
    bind: tuple[str, ...],
    path: str,
    plain: bool,
    cert: Path | None,
    key: Path | None,
    allow: tuple[Rule, ...],
    max_resume_window: int,
    state_dir: Path | None,
    log_format: Literal["text", "json"],
) -> int:
    """Listen for clients and connect their streams."""
    if (cert is None) != (key is None):
        given, missing = ("--cert", "--key") if key is None else ("--key", "--cert")
        raise click.UsageError(
            f"{given} needs {missing}: give both, or neither for a certificate made by wstunnel", ctx
        )
    if plain and cert is not None:
        raise click.UsageError("--plain speaks no TLS, so it does not go with --cert and --key", ctx)

    from wstunnel import logs
    from wstunnel.cli import running
    from wstunnel.config import ServerConfig
    from wstunnel.server import run
    from wstunnel.state import state_directory

    logs.configure(verbosity=reports.verbosity(ctx), format=log_format, environ=os.environ)
    config = ServerConfig(
        port=port,
        bind=tuple(dict.fromkeys(bind)),
        path=path,
        plain=plain,
        cert=cert,
        key=key,
        allow=allow,
        max_resume_window=max_resume_window,
        state_dir=state_directory(state_dir, os.environ),
    )
    return running.run(partial(run, config), {signal.SIGTERM: 0, signal.SIGINT: 0})
