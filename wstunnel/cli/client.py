"""`wstunnel client`: flags to a ClientConfig, then the role."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from wstunnel import limits
from wstunnel.cli import options, reports
from wstunnel.errors import UsageError

if TYPE_CHECKING:
    from wstunnel.auth import LoginUrl
    from wstunnel.forwards import Forward

IDLE_LINKS_MAX = 64
"""Most warm links: what the pool grows to by itself under load."""


def _parse_forward(text: str) -> tuple[Forward, ...]:
    from wstunnel.forwards import parse_forward

    return parse_forward(text)


@click.command(
    epilog="""\b
    Examples:
      wstunnel client -L 5432:db:5432            # then: psql -h localhost
      wstunnel client -L 8080:intranet:80 -L 2222:localhost:22
      wstunnel client -L '[::1]:8000-8010:web:8000-8010' --profile work

    The URL comes from the argument, else --profile, else WSTUNNEL_URL, else the profile that `wstunnel login` saved.
    """
)
@click.argument("url", required=False)
@click.option(
    "-L",
    "local_forwards",
    type=options.Parsed("SPEC", _parse_forward),
    multiple=True,
    help="Listen here and connect there: [BIND:]PORT:HOST:HOSTPORT, seen from the server. May be repeated.",
)
@options.profile
@click.option(
    "--ca", type=options.FILE, metavar="FILE", help="Trust these certificate authorities (PEM), not the system's."
)
@click.option(
    "--pin", "pins", type=options.PIN, multiple=True, help="Trust this server key (and only pins). May be repeated."
)
@click.option(
    "--idle-links",
    type=click.IntRange(1, IDLE_LINKS_MAX),
    default=limits.IDLE_LINKS,
    show_default=True,
    metavar="N",
    help="Connections kept ready, so that a new stream costs one round trip.",
)
@click.option(
    "--resume-window",
    type=options.DURATION,
    default=f"{limits.RESUME_WINDOW_SECONDS // 60}m",
    show_default=True,
    help="How long a stream whose connection broke is kept; 0 not at all. The server may grant less.",
)
@click.option("--exit-on-forward-failure", is_flag=True, help="Exit when a forward cannot listen.")
@options.logging
@click.pass_context
def client(
    ctx: click.Context,
    *,
    url: str | None,
    local_forwards: tuple[tuple[Forward, ...], ...],
    profile: str | None,
    ca: Path | None,
    pins: tuple[bytes, ...],
    idle_links: int,
    resume_window: int,
    exit_on_forward_failure: bool,
    log_format: Literal["text", "json"],
) -> int:
    """Forward local ports through a server."""
    if not local_forwards:
        raise UsageError(
            "nothing to forward: give at least one -L", grammar="-L [BIND:]PORT:HOST:HOSTPORT, as in -L 5432:db:5432"
        )

    from wstunnel import logs, profiles
    from wstunnel.cli import running
    from wstunnel.client import run
    from wstunnel.config import ClientConfig

    logs.configure(verbosity=reports.verbosity(ctx), format=log_format, environ=os.environ)
    login_url = profiles.client_url(url, os.environ, profile)
    login_url.require_token()
    _check_trust(login_url, ca, pins)
    if url is not None:
        logs.logger("cli").warning(
            "the token is among this command's arguments, where every user of this machine can read it:"
            " keep the URL with `wstunnel login`, or set WSTUNNEL_URL"
        )
    config = ClientConfig(
        url=login_url,
        local_forwards=tuple(forward for forwards in local_forwards for forward in forwards),
        ca=ca,
        pins=pins,
        idle_links=idle_links,
        resume_window=resume_window,
        exit_on_forward_failure=exit_on_forward_failure,
    )
    return running.run(partial(run, config), {signal.SIGTERM: 0, signal.SIGINT: 130})


def _check_trust(url: LoginUrl, ca: Path | None, pins: tuple[bytes, ...]) -> None:
    """Refuse flags that could not do what they promise, and warn of a token that goes out in clear."""
    from wstunnel import logs

    log = logs.logger("cli")
    if url.scheme == "ws":
        flag = "--pin" if pins else "--ca" if ca is not None else None
        if flag is not None:
            raise UsageError(
                f"{flag} does nothing with a ws:// URL, which has no TLS: the token would go out in clear;"
                f" use a wss:// URL, or leave {flag} out"
            )
        if not _is_loopback(url.host):
            log.warning(
                "ws:// is not encrypted: everybody on the way can read the token and all data; use wss://",
                host=url.host,
            )
    elif ca is not None and (pins or url.pins):
        log.warning("--ca is not used: the server's key is pinned, and then the pin alone decides", ca=ca)


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost" or host.lower().rstrip(".").endswith(".localhost")
