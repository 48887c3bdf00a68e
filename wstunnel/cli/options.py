"""Flags that several commands share, and the types of flags that have a grammar."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from wstunnel import limits
from wstunnel.cli import reports
from wstunnel.errors import UsageError

if TYPE_CHECKING:
    from wstunnel.upstream import Proxies

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])

BIND_GRAMMAR = "an IP address such as 127.0.0.1 or ::1 (the port goes to --port), or unix:/PATH[;mode=600]"
SOCKET_MODE = 0o600
"""Of a Unix socket for whose file nothing else is said: its owner's alone, and root's."""
DURATION_GRAMMAR = "seconds, or a number with s, m, h or d, such as 90, 5m or 1h30m"
DURATION_SECONDS_MAX = 7 * 86400
"""Longest time that a flag takes: a week. A stream that waits longer waits for nobody."""
HEADER_GRAMMAR = "'Name: value', as in 'X-Team: blue' or 'Host: tunnel.example.org'"
HANDSHAKE_HEADERS = frozenset({"upgrade", "connection", "content-length", "transfer-encoding"})
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


def parse_bind(text: str) -> str | tuple[str, int]:
    """An address to listen on, as the system writes it: `[::1]` and `::1` are the same.

    Returns:
        the address without brackets, or the path of a Unix socket and the mode of its file.

    Raises:
        UsageError: neither an IP address nor a Unix socket.
    """
    return _parse_socket(text) if text.startswith("unix:") else parse_address(text, BIND_GRAMMAR)


def parse_address(text: str, grammar: str = "an IP address such as 192.0.2.1 or 2001:db8::1") -> str:
    """An IP address, in brackets or not; returned without them.

    Raises:
        UsageError: it is none.
    """
    import ipaddress  # 2 ms, which `--help` need not wait

    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        with_port = re.fullmatch(r"(?:[0-9.]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)", text)
        raise UsageError(
            "an address without a port is wanted here" if with_port else "not an IP address",
            text=text, position=with_port.start(1) if with_port else 0, grammar=grammar,
        ) from None  # fmt: skip


def _parse_socket(text: str) -> tuple[str, int]:
    from wstunnel.targets import Part, parse_unix_path

    whole = Part.whole(text, BIND_GRAMMAR)
    end = text.find(";") if ";" in text else len(text)
    path = parse_unix_path(whole.cut(len("unix:"), end))
    mode = re.fullmatch(r";mode=0?([0-7]{3})|", text[end:])
    if mode is None:
        raise whole.error("after ';' comes mode=600 or another one of three octal digits", end + 1)
    return path, int(mode[1], 8) if mode[1] else SOCKET_MODE


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


def parse_duration_of_some(text: str) -> int:
    """As `parse_duration`, 1 second at least.

    Raises:
        UsageError: not such a time.
    """
    seconds = parse_duration(text)
    if not seconds:
        raise UsageError("one second at least", text=text, position=0, grammar=DURATION_GRAMMAR)
    return seconds


def parse_header(text: str) -> tuple[str, str]:
    """A header field of the upgrade request, `Name: value`.

    Raises:
        UsageError: not such a field, or one that is the handshake's own. The message shows the name only.
    """
    name, colon, value = text.partition(":")
    value = value.strip(" \t")
    if not colon:
        raise UsageError("a colon is missing behind the name", grammar=HEADER_GRAMMAR)
    if not re.fullmatch(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+", name):  # RFC 9110 §5.6.2
        raise UsageError("not a name of a header field", text=name, grammar=HEADER_GRAMMAR)
    if re.search(r"[^\t\x20-\x7e]", value):
        raise UsageError(f"the value of {name} has a control character, or is not ASCII", grammar=HEADER_GRAMMAR)
    if name.lower() in HANDSHAKE_HEADERS or name.lower().startswith("sec-websocket-"):
        raise UsageError(f"{name} belongs to the handshake and cannot be set", grammar=HEADER_GRAMMAR)
    if name.lower() == "host" and not re.fullmatch(r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+)(?::[0-9]{1,5})?", value):
        raise UsageError("not a host", text=value, grammar="Host: HOST[:PORT]")
    return name, value


def parse_name(text: str) -> str:
    """A server's name for TLS, as `--sni` takes it: a host without port or brackets.

    Raises:
        UsageError: not a name, nor an address.
    """
    from wstunnel.auth import parse_host_port

    if with_port := re.fullmatch(r"(?:[^:\[\]]+|\[.*\])(:[0-9]+)", text):
        raise UsageError(
            "a name without a port is wanted here",
            text=text, position=with_port.start(1), grammar="a host name, without a port",
        )  # fmt: skip
    bare = f"[{text}]" if ":" in text else text
    try:
        return parse_host_port(bare)[0]
    except UsageError as error:
        raise UsageError(error.message, text=text, grammar="a host name, without a port") from None


def _parse_proxy(text: str) -> Proxies:
    from wstunnel.upstream import parse_proxy

    return parse_proxy(text)


def _parse_pin(text: str) -> bytes:
    from wstunnel.auth import parse_pin

    return parse_pin(text)


def _parse_profile(text: str) -> str:
    from wstunnel.auth import check_user_name

    check_user_name(text)
    return text


# click's own look at a file would make an unreadable one a mistake in usage: whoever opens it says it better.
FILE = click.Path(readable=False, path_type=Path)
DIRECTORY = click.Path(readable=False, path_type=Path)
BIND = Parsed("ADDR", parse_bind)
PATH = Parsed("PATH", parse_path)
DURATION = Parsed("TIME", parse_duration)
DURATION_OF_SOME = Parsed("TIME", parse_duration_of_some)
PIN = Parsed("SHA256", _parse_pin)
HEADER = Parsed("'NAME: VALUE'", parse_header)
NAME = Parsed("NAME", parse_name)
PROXY = Parsed("URL|none", _parse_proxy)
PROFILE = Parsed("NAME", _parse_profile)


def state_dir(command: Command) -> Command:
    """Add `--state-dir`."""
    return click.option(
        "--state-dir",
        type=DIRECTORY,
        metavar="DIR",
        help="Where certificate and users are kept.  [default: $STATE_DIRECTORY, else wstunnel in the XDG state home]",
    )(command)


def udp_timeout(command: Command) -> Command:
    """Add `--udp-timeout`."""
    return click.option(
        "--udp-timeout",
        type=DURATION_OF_SOME,
        default=f"{limits.UDP_IDLE_SECONDS}s",
        show_default=True,
        help="How long a flow of UDP datagrams is kept after the last one.",
    )(command)


def profile(command: Command) -> Command:
    """Add `--profile`; the command gets `None` where it was not given."""
    return click.option("--profile", type=PROFILE, help="Which saved login URL.  [default: default]")(command)


def way_out(command: Command) -> Command:
    """Add the flags by which a server is reached: `--proxy`, `--header`, `--sni`, `-4` and `-6`.

    The command gets `proxies` (None where the environment decides), `headers`, `server_name` and `ip_version`.
    """
    for option in (
        click.option("-6", "ip_version", flag_value=6, type=int, help="Dial IPv6 addresses only."),
        click.option("-4", "ip_version", flag_value=4, type=int, help="Dial IPv4 addresses only."),
        click.option(
            "--sni", "server_name", type=NAME, help="The name that TLS asks for and verifies, if not the URL's host."
        ),
        click.option(
            "--header",
            "headers",
            type=HEADER,
            multiple=True,
            help="Send this header field with the upgrade; Host takes the place of the URL's. May be repeated.",
        ),
        click.option(
            "--proxy",
            "proxies",
            type=PROXY,
            help="Go through this proxy: http, https, socks5 or socks5h://[USER:PASSWORD@]HOST[:PORT]."
            "  [default: HTTPS_PROXY, http_proxy, ALL_PROXY, less NO_PROXY]",
        ),
    ):
        command = option(command)
    return command


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
