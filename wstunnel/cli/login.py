"""`wstunnel login`: keep a login URL as a profile."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import click

from wstunnel.cli import options, reports
from wstunnel.errors import LocalError, UsageError

if TYPE_CHECKING:
    from types import FrameType

LINE_CHARACTERS = 16 * 1024
"""Most that is read as a URL: the longest request head that a server takes."""


@click.command(
    epilog="""\b
    Examples:
      wstunnel login                        asks for the URL, and does not show it
      wstunnel login 'wss://TOKEN@tunnel.example.org/#sha256=PIN'
      wstunnel login --profile work - < url.txt

    Arguments stand in the process list while the command runs; without one, nobody sees the URL.
    """
)
@click.argument("url", required=False)
@options.profile
@options.verbosity
def login(url: str | None, profile: str | None) -> int:
    """Save the login URL from `wstunnel invite`.

    Without URL, or with `-`, it is read from standard input.
    """
    from wstunnel.auth import URL_GRAMMAR, parse_login_url
    from wstunnel.profiles import DEFAULT_PROFILE, URL_VARIABLE, save_profile

    text = _read() if url in (None, "-") else url
    if not text:
        raise UsageError("no login URL was given", grammar=URL_GRAMMAR)
    login_url = parse_login_url(text)
    login_url.require_token()
    name = DEFAULT_PROFILE if profile is None else profile
    path = save_profile(name, login_url, os.environ)
    reports.tell(f"Saved {login_url} as profile {name} in {path} (mode 0600).")
    if name == DEFAULT_PROFILE and os.environ.get(URL_VARIABLE, "").strip():
        reports.warn(f"{URL_VARIABLE} is set, and `wstunnel client` takes it before this profile")
    flag = "" if name == DEFAULT_PROFILE else f"--profile {name} "
    reports.tell(f"Next: wstunnel client {flag}-L 5432:db:5432")
    return 0


def _read() -> str:
    """The first line of stdin; on a terminal it is asked for and not shown."""
    if sys.stdin is None:  # descriptor 0 was closed
        raise LocalError("standard input is closed, so the login URL cannot be read")
    if sys.stdin.isatty():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _leave)
        prompted = click.prompt("Login URL (not shown)", hide_input=True, default="", show_default=False, err=True)
        return str(prompted).strip()
    try:
        return sys.stdin.readline(LINE_CHARACTERS).strip()
    except UnicodeDecodeError:
        raise UsageError("standard input holds no text") from None
    except OSError as error:
        raise LocalError(f"cannot read standard input: {error.strerror}") from error


def _leave(number: int, _frame: FrameType | None) -> None:
    """Leave as the signal would have it, but with `finally` clauses: they give the terminal its echo back."""
    sys.exit(128 + number)
