"""Flags that several commands share, and the types of flags that have a grammar."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import click

from wstunnel.cli import reports
from wstunnel.errors import UsageError

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])

BIND_GRAMMAR = "an IP address such as 127.0.0.1 or ::1"
DURATION_GRAMMAR = "seconds, or a number with s, m, h or d, such as 90, 5m or 1h30m"
DURATION_SECONDS_MAX = 7 * 86400
"""Longest time that a flag takes: a week. A stream that waits longer waits for nobody."""
PATH_GRAMMAR = "an absolute path such as / or /tunnel, without spaces, '?' or '#'"


class Parsed(click.ParamType[T], Generic[T]):
    """A flag whose value has a grammar. An error names the flag, points at the part at fault and shows the grammar.

    Args:
        name: the metavar, such as `SPEC`.
        parse: text to value; raises UsageError. What it needs is imported when it is called, not before.
    """

    def __init__(self, name: str, parse: Callable[[str], T]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> T:
        try:
            return self._parse(value)
        except UsageError as error:
            flag = f"{param.opts[0]}: " if isinstance(param, click.Option) else ""
            raise UsageError(
                f"{flag}{error.message}", text=error.text, position=error.position, grammar=error.grammar
            ) from None

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


def parse_bind(text: str) -> str:
    """An address to listen on, as the system writes it: `[::1]` and `::1` are the same.

    Raises:
        UsageError: not an IP address.
    """
    import ipaddress  # 2 ms, which `--help` need not wait

    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        raise UsageError("not an IP address", text=text, grammar=BIND_GRAMMAR) from None


def parse_path(text: str) -> str:
    """The path of the server's URL.

    Raises:
        UsageError: it does not begin with a slash, or holds what a request line cannot.
    """
    if not text.startswith("/"):
        raise UsageError("a path begins with '/'", text=text, grammar=PATH_GRAMMAR)
    wrong = re.search(r"[^!$-;=@-Z_a-z~]|%(?![0-9A-Fa-f]{2})", text)  # RFC 3986 §3.3: pchar and "/"
    if wrong:
        raise UsageError("not a character of a URL's path", text=text, position=wrong.start(), grammar=PATH_GRAMMAR)
    return text


def parse_duration(text: str) -> int:
    """A time in whole seconds, 0 to a week, as systemd and Go write it: `300`, `5m`, `1h30m`.

    Raises:
        UsageError: not such a time.
    """
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
    total, position = 0, 0
    for part in re.finditer(r"(\d{1,9})([smhd]?)", text, re.ASCII):
        if part.start() != position:
            break
        position = part.end()
        total += int(part[1]) * units[part[2]]
        if not part[2]:
            break
    if position != len(text) or not text:
        raise UsageError("not a time", text=text, position=position, grammar=DURATION_GRAMMAR)
    if total > DURATION_SECONDS_MAX:
        raise UsageError("longer than a week", text=text, position=0, grammar=DURATION_GRAMMAR)
    return total


def _parse_pin(text: str) -> bytes:
    from wstunnel.auth import parse_pin

    return parse_pin(text)


# click's own look at a file would make an unreadable one a mistake in usage: whoever opens it says it better.
FILE = click.Path(readable=False, path_type=Path)
DIRECTORY = click.Path(readable=False, path_type=Path)
BIND = Parsed("ADDR", parse_bind)
PATH = Parsed("PATH", parse_path)
DURATION = Parsed("TIME", parse_duration)
PIN = Parsed("SHA256", _parse_pin)


def state_dir(command: Command) -> Command:
    """Add `--state-dir`."""
    return click.option(
        "--state-dir",
        type=DIRECTORY,
        metavar="DIR",
        help="Where certificate and users are kept.  [default: $STATE_DIRECTORY, else wstunnel in the XDG state home]",
    )(command)


def profile(command: Command) -> Command:
    """Add `--profile`; the command gets `None` where it was not given."""
    return click.option("--profile", metavar="NAME", help="Which saved login URL.  [default: default]")(command)


def verbosity(command: Command) -> Command:
    """Add `-v` and `-q`, which every command has; what they ask for is `reports.verbosity`."""
    command = click.option("-q", "--quiet", count=True, expose_value=False, callback=_quieter, help="Say less.")(
        command
    )
    return click.option(
        "-v", "--verbose", count=True, expose_value=False, callback=_louder, help="Say more; twice for everything."
    )(command)


def logging(command: Command) -> Command:
    """Add `-v`, `-q` and `--log-format`, for commands that keep a log; the command gets `log_format`."""
    return verbosity(
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            is_eager=True,  # so that a mistake in another flag is told in this format too
            callback=_remember_format,
            help="How to log.",
        )(command)
    )


def _remember_format(ctx: click.Context, _param: click.Parameter, value: str) -> str:
    ctx.meta[reports.LOG_FORMAT] = value
    return value


def _louder(ctx: click.Context, _param: click.Parameter, value: int) -> None:
    ctx.meta[reports.VERBOSITY] = reports.verbosity(ctx) + value


def _quieter(ctx: click.Context, _param: click.Parameter, value: int) -> None:
    ctx.meta[reports.VERBOSITY] = reports.verbosity(ctx) - value
