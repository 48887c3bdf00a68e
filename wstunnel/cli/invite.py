"""`wstunnel invite`: a new token for a user, as one login URL on stdout."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from wstunnel.cli import options, reports
from wstunnel.errors import LocalError

if TYPE_CHECKING:
    from wstunnel.auth import LoginUrl


def _parse_host(text: str) -> tuple[str, int | None]:
    from wstunnel.auth import parse_host_port

    return parse_host_port(text)


@click.command(
    epilog="""\b
    Examples:
      wstunnel invite --host tunnel.example.org
      wstunnel invite alice --host tunnel.example.org:8443
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
@options.state_dir
@options.verbosity
def invite(name: str, host: tuple[str, int | None] | None, state_dir: Path | None) -> int:
    """Make a token for a user and print the login URL.

    NAME is `default` unless given. The URL is a secret: whoever has it can use the tunnel.
    """
    from wstunnel.state import ANNOUNCEMENT_NAME, read_announcement, state_directory

    if sys.stdout is None:  # descriptor 1 was closed: the token would be made, and nobody would see it
        raise LocalError("standard output is closed, so the login URL could not be shown: no token was made")
    directory = state_directory(state_dir, os.environ)
    if read_announcement(directory) is None:
        reports.warn(
            f"no server has run with {directory} yet ({ANNOUNCEMENT_NAME} is missing), so the URL says port 443 unless"
            " --host does, and holds no pin: start the server first, or pass the --state-dir that it has"
        )
    reports.say(invitation(directory, name, host or _parse_host(socket.gethostname())).reveal())
    if sys.stdout.isatty() and sys.stderr.isatty():
        reports.tell(
            "On the client machine: wstunnel login, and paste this URL. It is shown only once, and is a secret."
        )
    return 0


def invitation(directory: Path, name: str, host: tuple[str, int | None]) -> LoginUrl:
    """Make a token for a user, and the URL that goes with it.

    Args:
        directory: the server's state directory.
        name: the user.
        host: host and port for the URL; without a port, the one that the server last announced, else 443.

    Raises:
        UsageError: not a user's name.
        LocalError: the state directory cannot be read or written by this user.
    """
    from wstunnel.auth import LoginUrl, Token, Users
    from wstunnel.state import Announcement, read_announcement

    said = read_announcement(directory) or Announcement(scheme="wss", port=443, path="/")
    token = Token.new()
    Users(directory).add_token(name, token)
    return LoginUrl(said.scheme, host[0], said.port if host[1] is None else host[1], said.path, token, said.pins)
