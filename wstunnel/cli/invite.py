"""`wstunnel invite`: a new token for a user, as one login URL on stdout."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wstunnel.cli import options, reports
from wstunnel.errors import LocalError, UsageError

if TYPE_CHECKING:
    from wstunnel.auth import LoginUrl


PUBLIC_URL_GRAMMAR = "wss://HOST[:PORT][/PATH][#sha256=PIN], or ws://…"


def _parse_host(text: str) -> tuple[str, int | None]:
    from wstunnel.auth import parse_host_port

    if "://" in text:
        raise UsageError("this is a URL: give it to --url", text=text, grammar="HOST[:PORT], or --url wss://HOST/")
    return parse_host_port(text)


def _parse_public_url(text: str) -> LoginUrl:
    from wstunnel.auth import parse_login_url

    try:
        url = parse_login_url(text)
    except UsageError as error:
        raise UsageError(error.message, text=error.text, position=error.position, grammar=PUBLIC_URL_GRAMMAR) from None
    if url.token is not None:
        raise UsageError(
            "this URL has a token, and invite makes a new one: leave it out", text=str(url), grammar=PUBLIC_URL_GRAMMAR
        )
    if url.query:
        raise UsageError("a login URL has no query: leave it out", text=str(url), grammar=PUBLIC_URL_GRAMMAR)
    return url


@click.command(
    epilog="""\b
    Examples:
      wstunnel invite --host tunnel.example.org
      wstunnel invite alice --host tunnel.example.org:8443
      wstunnel invite --url wss://tunnel.example.org/tunnel/    # behind a proxy that ends TLS
      wstunnel invite --host tunnel.example.org | ssh laptop wstunnel login

    A running server lets the new token in at once. Only its hash is kept here: the URL cannot be shown again.
    """
)
@click.argument("name", default="default")
@click.option(
    "--host",
    type=options.Parsed("HOST[:PORT]", _parse_host),
    help="How clients reach the server.  [default: this machine's name, and the server's port]",
)
@click.option(
    "--url",
    type=options.Parsed("URL", _parse_public_url),
    help="How clients reach the proxy in front of the server: wss://HOST[:PORT][/PATH], in place of all that the server"
    " says of itself.",
)
@options.state_dir
@options.verbosity
@click.pass_context
def invite(
    ctx: click.Context, *, name: str, host: tuple[str, int | None] | None, url: LoginUrl | None, state_dir: Path | None
) -> int:
    """Make a token for a user and print the login URL.

    NAME is `default` unless given. The URL is a secret: whoever has it can use the tunnel.
    """
    from wstunnel.auth import Users
    from wstunnel.state import ANNOUNCEMENT_NAME, read_announcement, state_directory

    if host is not None and url is not None:
        raise click.UsageError("--host is a part of --url: give one of them", ctx)
    if sys.stdout is None:  # descriptor 1 was closed: the token would be made, and nobody would see it
        raise LocalError("standard output is closed, so the login URL could not be shown: no token was made")
    directory = state_directory(state_dir, os.environ)
    if url is None and read_announcement(directory) is None:
        reports.warn(
            f"no server has run with {directory} yet ({ANNOUNCEMENT_NAME} is missing), so the URL says port 443 unless"
            " --host does, and holds no pin: start the server first, or pass the --state-dir that it has"
        )
    made = invitation(directory, name, url or host or _parse_host(socket.gethostname()))
    try:
        reports.say(made.reveal())
    except BaseException as error:  # nobody saw it, so it must not stay valid
        Users(directory).remove_token(name, made.require_token())
        if isinstance(error, LocalError):
            raise LocalError(f"{error}; the login URL was not shown, so its token was taken back") from error
        raise
    if sys.stdout.isatty() and sys.stderr.isatty():
        reports.tell(
            "On the client machine: wstunnel login, and paste this URL. It is shown only once, and is a secret."
        )
    return 0


def invitation(directory: Path, name: str, where: LoginUrl | tuple[str, int | None]) -> LoginUrl:
    """Make a token for a user, and the URL that goes with it.

    Args:
        directory: the server's state directory.
        name: the user.
        where: the URL but for the token; or host and port for it, and the rest is what the server last announced: the
            port, too, if it is None, and 443 if nothing was announced.

    Raises:
        UsageError: not a user's name.
        LocalError: the state directory cannot be read or written by this user, or the port is not known. No token was
            made.
    """
    from wstunnel.auth import LoginUrl, Token, Users

    url = where if isinstance(where, LoginUrl) else _announced(directory, *where)
    token = Token.new()
    Users(directory).add_token(name, token)
    return replace(url, token=token)


def _announced(directory: Path, host: str, port: int | None) -> LoginUrl:
    from wstunnel.auth import LoginUrl
    from wstunnel.state import Announcement, read_announcement

    said = read_announcement(directory) or Announcement(scheme="wss", port=443, path="/")
    port = port or said.port
    if port is None:
        raise LocalError(
            "the server listens on a Unix socket only, so its URL cannot be known: say how clients reach the proxy in"
            " front of it, as in --url wss://tunnel.example.org/ (or, if that proxy passes TLS on, --host HOST:PORT)"
        )
    return LoginUrl(said.scheme, host, port, said.path, None, said.pins)
