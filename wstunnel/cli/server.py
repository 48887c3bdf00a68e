"""`wstunnel server`: flags to a ServerConfig, then the role."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from click.core import ParameterSource

from wstunnel import limits
from wstunnel.cli import options, reports

if TYPE_CHECKING:
    from wstunnel.front import Source
    from wstunnel.plain_endpoints import Endpoint
    from wstunnel.policy import ListenRule, Rule


def _parse_rule(text: str) -> Rule:
    from wstunnel.policy import parse_rule

    return parse_rule(text)


def _parse_listen_rule(text: str) -> ListenRule:
    from wstunnel.policy import parse_listen_rule

    return parse_listen_rule(text)


def _parse_endpoint(text: str) -> Endpoint:
    from wstunnel.plain_endpoints import parse_endpoint

    return parse_endpoint(text)


def _parse_source(text: str) -> Source:
    from wstunnel.front import parse_source

    return parse_source(text)


def _parse_origin(text: str) -> str:
    from wstunnel.plain_endpoints import parse_origin

    return parse_origin(text)


def _check_endpoints(ctx: click.Context, path: str, endpoints: tuple[Endpoint, ...]) -> None:
    """One path leads to one thing.

    Raises:
        click.UsageError: it does not.
    """
    taken = {path: "the tunnel's (--path)"}
    for endpoint in endpoints:
        if endpoint.path in taken:
            raise click.UsageError(f"--endpoint: the path {endpoint.path} is {taken[endpoint.path]} already", ctx)
        taken[endpoint.path] = "an endpoint's"


SOURCE = options.Parsed("SOURCE", _parse_source)


@click.command(
    epilog="""\b
    Examples:
      wstunnel server --port 443
      wstunnel server --cert fullchain.pem --key privkey.pem
      wstunnel server --allow db:5432 --allow '10.0.0.0/8:*'
      wstunnel server --plain --bind 127.0.0.1 --port 8080 --trust-proxy 127.0.0.1    # behind nginx
      wstunnel server --endpoint /db=db:5432 --allow-origin https://app.example.org

    Then `wstunnel invite` on the same machine prints the URL for a client.
    """
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=443,
    show_default=True,
    metavar="PORT",
    help="TCP port to listen on; 0 picks a free one.",
)
@click.option(
    "--bind",
    type=options.BIND,
    multiple=True,
    help="Address to listen on, or unix:/PATH[;mode=600]; may be repeated.  [default: all, IPv4 and IPv6]",
)
@click.option(
    "--proxy-protocol",
    type=SOURCE,
    multiple=True,
    help="Connections from here (ADDR, CIDR or unix) begin with a PROXY header, version 1 or 2; may be repeated.",
)
@click.option(
    "--trust-proxy",
    type=SOURCE,
    multiple=True,
    help="Believe X-Forwarded-For or Forwarded from here (ADDR, CIDR or unix); may be repeated.  [default: nobody]",
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
    help="What clients may open: [tcp:|udp:]HOST|CIDR|*:PORT|LOW-HIGH|*. May be repeated; the first one replaces the"
    " default, which is everything but link-local, multicast and cloud metadata addresses.",
)
@click.option(
    "--max-resume-window",
    type=options.DURATION,
    default=f"{limits.MAX_RESUME_WINDOW_SECONDS // 3600}h",
    show_default=True,
    help="How long at most a stream whose connection broke is kept for its client; 0 not at all.",
)
@options.udp_timeout
@click.option(
    "--source",
    "sources",
    type=options.Parsed("ADDR", options.parse_address),
    multiple=True,
    help="Address of this machine that connections to targets come from; one IPv4, one IPv6.  [default: the kernel's]",
)
@click.option(
    "--allow-listen",
    type=options.Parsed("RULE", _parse_listen_rule),
    multiple=True,
    help="Let clients listen here with -R: [ADDR:]PORT|LOW-HIGH|*, ADDR 127.0.0.1 unless given; may be repeated."
    "  [default: nowhere]",
)
@click.option(
    "--endpoint",
    "endpoints",
    type=options.Parsed("PATH=TARGET", _parse_endpoint),
    multiple=True,
    help="Make each WebSocket at PATH a raw connection to TARGET, for browsers and other WebSocket clients;"
    " may be repeated. --allow does not apply to it.",
)
@click.option(
    "--endpoint-auth",
    type=click.Choice(["token", "none"]),
    default="token",
    show_default=True,
    help="Who may use the endpoints: users with a token, or anyone who reaches the server.",
)
@click.option("--endpoint-text", is_flag=True, help="Take text messages at endpoints as well as binary ones.")
@click.option(
    "--allow-origin",
    "allow_origins",
    type=options.Parsed("ORIGIN", _parse_origin),
    multiple=True,
    help="Let web pages of this origin (https://app.example.org) use the endpoints; may be repeated.  [default: none]",
)
@options.state_dir
@options.logging
@click.pass_context
def server(
    ctx: click.Context,
    *,
    port: int,
    bind: tuple[str | tuple[str, int], ...],
    proxy_protocol: tuple[Source, ...],
    trust_proxy: tuple[Source, ...],
    path: str,
    plain: bool,
    cert: Path | None,
    key: Path | None,
    allow: tuple[Rule, ...],
    allow_listen: tuple[ListenRule, ...],
    sources: tuple[str, ...],
    max_resume_window: int,
    udp_timeout: int,
    endpoints: tuple[Endpoint, ...],
    endpoint_auth: Literal["token", "none"],
    endpoint_text: bool,
    allow_origins: tuple[str, ...],
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
    _check_endpoints(ctx, path, endpoints)
    addresses = tuple(dict.fromkeys(place for place in bind if isinstance(place, str)))
    files = tuple(place for place in bind if not isinstance(place, str))
    if len({path for path, _ in files}) < len(files):
        raise click.UsageError("--bind: one Unix socket is named twice", ctx)
    if not endpoints:
        auth = endpoint_auth != "token"
        unused = {"--endpoint-auth": auth, "--endpoint-text": endpoint_text, "--allow-origin": bool(allow_origins)}
        flag = next((flag for flag, given in unused.items() if given), None)
        if flag is not None:
            raise click.UsageError(f"{flag} is for endpoints, and there is none: give --endpoint too", ctx)
    if files and not addresses and ctx.get_parameter_source("port") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--port is for TCP, and --bind names Unix sockets only: leave it out", ctx)

    from wstunnel import logs
    from wstunnel.cli import running
    from wstunnel.config import ServerConfig
    from wstunnel.server import run
    from wstunnel.state import state_directory

    logs.configure(verbosity=reports.verbosity(ctx), format=log_format, environ=os.environ)
    config = ServerConfig(
        port=port,
        bind=addresses,
        bind_unix=files,
        proxy_protocol=proxy_protocol,
        trust_proxy=trust_proxy,
        path=path,
        plain=plain,
        cert=cert,
        key=key,
        allow=allow,
        allow_listen=allow_listen,
        sources=sources,
        max_resume_window=max_resume_window,
        udp_timeout=udp_timeout,
        endpoints=endpoints,
        endpoint_auth=endpoint_auth,
        endpoint_text=endpoint_text,
        allow_origins=allow_origins,
        state_dir=state_directory(state_dir, os.environ),
    )
    return running.run(partial(run, config), {signal.SIGTERM: 0, signal.SIGINT: 0})
