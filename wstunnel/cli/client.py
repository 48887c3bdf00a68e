"""`wstunnel client`: flags to a ClientConfig, then the role."""

from __future__ import annotations

import os
import signal
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from wstunnel import limits
from wstunnel.cli import options, reach, reports
from wstunnel.errors import LocalError, UsageError

if TYPE_CHECKING:
    from wstunnel.config import ClientConfig
    from wstunnel.forwards import Forward

LOGIN_BYTES = 255
"""RFC 1929 §2: most in a user's name, and in a password."""
IDLE_LINKS_MAX = 64
"""Most warm links: what the pool grows to by itself under load."""


def _parse_forward(text: str) -> tuple[Forward, ...]:
    from wstunnel.forwards import parse_forward

    return parse_forward(text)


def _parse_reverse(text: str) -> tuple[Forward, ...]:
    from wstunnel.forwards import parse_reverse

    return parse_reverse(text)


def _parse_socks(text: str) -> Forward:
    from wstunnel.forwards import parse_dynamic

    return parse_dynamic(text, "socks")


def _parse_http_proxy(text: str) -> Forward:
    from wstunnel.forwards import parse_dynamic

    return parse_dynamic(text, "http")


def _read_login(path: Path | None) -> tuple[bytes, bytes] | None:
    """The user and the password in a file of one line, `USER:PASSWORD`.

    Raises:
        LocalError: it cannot be read.
        UsageError: that is not what is in it.
    """
    if path is None:
        return None
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise LocalError(f"--dynamic-login: cannot read {path}: {error.strerror}") from error
    user, colon, password = lines[0].partition(b":") if lines else (b"", b"", b"")
    if not (user and colon and password) or max(len(user), len(password)) > LOGIN_BYTES:
        raise UsageError(f"--dynamic-login: the first line of {path} is not USER:PASSWORD, each of 1 to 255 bytes")
    return user, password


def _warn_of_open_proxies(config: ClientConfig) -> None:
    """Say which proxies anybody may use who reaches their port: that is seldom meant."""
    from wstunnel import logs

    log = logs.logger("cli")
    for forward in config.reverse_forwards:
        if forward.speaks and not all(map(reach.is_loopback, forward.addresses)):
            log.warning("whoever reaches this port of the server can go out through this machine", forward=str(forward))
    for forward in config.local_forwards:
        if forward.speaks and config.dynamic_login is None and not all(map(reach.is_loopback, forward.addresses)):
            log.warning(
                "whoever reaches this port can use the proxy: --dynamic-login asks for a password", forward=str(forward)
            )


@click.command(
    epilog="""\b
    Examples:
      wstunnel client -L 5432:db:5432            # then: psql -h localhost
      wstunnel client -L 8080:intranet:80 -L 2222:localhost:22
      wstunnel client -D 1080                    # then: curl -x socks5h://localhost:1080 ...
      wstunnel client -R 8080:localhost:3000     # the server's port 8080 leads here
      wstunnel client -L '[::1]:8000-8010:web:8000-8010' --profile work

    The URL comes from the argument, else --profile, else WSTUNNEL_URL, else the profile that `wstunnel login` saved.
    Of several URLs the next one is used while those before it are away.
    """
)
@click.argument("urls", metavar="[URL]...", nargs=-1)
@click.option(
    "-L",
    "local_forwards",
    type=options.Parsed("SPEC", _parse_forward),
    multiple=True,
    help="Listen here and connect there: [BIND:]PORT:HOST:HOSTPORT[/udp], seen from the server. May be repeated.",
)
@click.option(
    "-R",
    "reverse_forwards",
    type=options.Parsed("SPEC", _parse_reverse),
    multiple=True,
    help="Listen at the server and connect from here: [BIND:]PORT:HOST:HOSTPORT[/udp]; [BIND:]PORT alone is a SOCKS"
    " proxy there. The server must allow it (--allow-listen). May be repeated.",
)
@click.option(
    "-D",
    "socks_proxies",
    type=options.Parsed("[BIND:]PORT", _parse_socks),
    multiple=True,
    help="Listen here as a SOCKS proxy; the server connects to what applications ask for. May be repeated.",
)
@click.option(
    "--http-proxy",
    "http_proxies",
    type=options.Parsed("[BIND:]PORT", _parse_http_proxy),
    multiple=True,
    help="Listen here as an HTTP proxy; on a port of -D too, both are served there. May be repeated.",
)
@click.option(
    "--dynamic-login",
    type=options.FILE,
    metavar="FILE",
    help="Ask applications at -D and --http-proxy for the USER:PASSWORD in this file.",
)
@reach.flags
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
@options.udp_timeout
@click.option("--exit-on-forward-failure", is_flag=True, help="Exit when a forward cannot listen.")
@options.logging
@click.pass_context
def client(
    ctx: click.Context,
    /,
    *,
    urls: tuple[str, ...],
    local_forwards: tuple[tuple[Forward, ...], ...],
    reverse_forwards: tuple[tuple[Forward, ...], ...],
    socks_proxies: tuple[Forward, ...],
    http_proxies: tuple[Forward, ...],
    dynamic_login: Path | None,
    idle_links: int,
    resume_window: int,
    udp_timeout: int,
    exit_on_forward_failure: bool,
    log_format: Literal["text", "json"],
    **server: Any,
) -> int:
    """Forward ports through a server, in both directions."""
    if not (local_forwards or reverse_forwards or socks_proxies or http_proxies):
        raise UsageError(
            "nothing to forward: give at least one -L, -R, -D or --http-proxy",
            grammar="-L [BIND:]PORT:HOST:HOSTPORT, as in -L 5432:db:5432",
        )

    if dynamic_login is not None and not (socks_proxies or http_proxies):
        raise UsageError("--dynamic-login is for -D and --http-proxy, and there is neither: -R has no login")

    from wstunnel import logs
    from wstunnel.cli import running
    from wstunnel.client import run
    from wstunnel.forwards import merge_dynamic

    logs.configure(verbosity=reports.verbosity(ctx), format=log_format, environ=os.environ)
    config = reach.configure(
        urls,
        local_forwards=(*chain.from_iterable(local_forwards), *merge_dynamic((*socks_proxies, *http_proxies))),
        reverse_forwards=tuple(chain.from_iterable(reverse_forwards)),
        dynamic_login=_read_login(dynamic_login),
        idle_links=idle_links,
        resume_window=resume_window,
        udp_timeout=udp_timeout,
        exit_on_forward_failure=exit_on_forward_failure,
        **server,
    )
    _warn_of_open_proxies(config)
    return running.run(partial(run, config), {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGHUP: 129})
