"""Which proxy leads out of the client's network: proxy URLs, the environment's variables, and NO_PROXY.

    http://proxy.example.org:3128               HTTP CONNECT
    http://USER:PASSWORD@proxy.example.org      with Basic authentication; %XX for what a URL cannot hold
    https://proxy.example.org                   the same, and TLS to the proxy itself
    socks5://localhost:1080                     SOCKS5; this machine resolves the server's name
    socks5h://localhost:1080                    SOCKS5; the proxy resolves it

The port is 80 for `http`, 443 for `https`, 1080 for `socks5` and `socks5h`, unless given.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, cast, get_args
from urllib.parse import unquote_to_bytes

from wstunnel.auth import parse_host_port
from wstunnel.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from wstunnel.auth import LoginUrl

Scheme = Literal["http", "https", "socks5", "socks5h"]

PROXY_GRAMMAR: Final = "http|https|socks5|socks5h://[USER:PASSWORD@]HOST[:PORT], or none"
DEFAULT_PORTS: Final[Mapping[str, int]] = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}
SOCKS_FIELD_BYTES: Final = 255
"""RFC 1929 §2: the length of user and of password is one octet."""
# In this order, as curl: small letters first. Only those for http: a CGI's environment holds a request's field `Proxy`
# as HTTP_PROXY, so whoever asks could choose the proxy.
_VARIABLES: Final[Mapping[str, tuple[str, ...]]] = {
    "wss": ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"),
    "ws": ("http_proxy", "all_proxy", "ALL_PROXY"),
}
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BRACKETED: Final = re.compile(r"\[[0-9a-f:.]*(?:%[^]:]*)?\](?=[:/]|$)", re.IGNORECASE)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class ProxyUrl:
    """One proxy. Neither `str()` nor `repr()` shows user or password.

    Args:
        scheme: how it is spoken to.
        host: a name in ASCII, or an address without brackets.
        port: 1 to 65535.
        user: percent-decoded; None where the URL has none.
        password: the same; empty where only a user is given.
    """

    scheme: Scheme
    host: str
    port: int
    user: str | None = field(default=None, repr=False)
    password: str = field(default="", repr=False)

    @property
    def authority(self) -> str:
        """`HOST:PORT`, brackets around IPv6: how messages name the proxy."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_socks(self) -> bool:
        return self.scheme in ("socks5", "socks5h")

    def __str__(self) -> str:
        return f"{self.scheme}://{'' if self.user is None else '***@'}{self.authority}"


@dataclass(frozen=True, slots=True)
class Proxies:
    """Which proxy for which server; without arguments there is none for any.

    Args:
        wss: the proxy for `wss` servers.
        ws: the one for `ws` servers.
        bypass: servers that are dialled directly, as NO_PROXY lists them.
    """

    wss: ProxyUrl | None = None
    ws: ProxyUrl | None = None
    bypass: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], schemes: Collection[str]) -> Proxies:
        """What `HTTPS_PROXY`, `http_proxy`, `ALL_PROXY` and `NO_PROXY` say.

        Args:
            environ: the environment of the process.
            schemes: `wss`, `ws`: those of the servers. Variables that are for none of them are not looked at.

        Raises:
            UsageError: names the variable that is malformed.
        """
        found = {scheme: _from_variables(environ, names) for scheme, names in _VARIABLES.items() if scheme in schemes}
        bypass = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
        return cls(found.get("wss"), found.get("ws"), bypass)

    def choose(self, server: LoginUrl) -> ProxyUrl | None:
        """The proxy for this server; None to dial it directly."""
        proxy = self.wss if server.scheme == "wss" else self.ws
        return None if proxy is None or bypasses(self.bypass, server.host, server.port) else proxy


def parse_proxy(text: str) -> Proxies:
    """The value of `--proxy`: a proxy for every server, or `none`.

    Raises:
        UsageError: with a caret; user and password are masked.
    """
    if text == "none":
        return Proxies()
    proxy = parse_proxy_url(text)
    return Proxies(proxy, proxy)


def parse_proxy_url(text: str) -> ProxyUrl:
    """Read a proxy's URL.

    Raises:
        UsageError: with a caret at the part at fault; whatever may be user or password is masked.
    """
    try:
        return _proxy_url(text)
    except UsageError as error:
        masked, position = _masked(text, error.position)
        # `from None`: the first error's text shows the password.
        raise UsageError(error.message, text=masked, position=position, grammar=PROXY_GRAMMAR) from None


def _proxy_url(text: str) -> ProxyUrl:
    name, separator, _ = text.partition("://")
    if not separator:
        raise UsageError("a proxy's URL begins with http://, https://, socks5:// or socks5h://")
    scheme = name.lower()
    if scheme in ("socks4", "socks4a", "socks"):
        raise UsageError("SOCKS4 is not supported: use socks5:// or socks5h://")
    if scheme not in get_args(Scheme):
        raise UsageError("not a kind of proxy that is supported")
    start = len(name) + 3
    at = text.rfind("@")
    if at < 0:
        at = start - 1
        user, password = None, ""
    else:
        user, password = _credentials(text[start:at], start, socks=scheme.startswith("socks"))
    end = text.find("/", at + 1)
    end = len(text) if end < 0 else end
    if text[end:] not in ("", "/"):
        raise UsageError("a proxy's URL has no path", position=end)
    try:
        host, port = parse_host_port(text[at + 1 : end])
    except UsageError as error:
        raise UsageError(error.message, position=at + 1 + error.position) from None
    return ProxyUrl(cast("Scheme", scheme), host, DEFAULT_PORTS[scheme] if port is None else port, user, password)


def _credentials(text: str, start: int, *, socks: bool) -> tuple[str, str]:
    encoded_user, colon, encoded_password = text.partition(":")
    user = _decoded(encoded_user, start)
    password = _decoded(encoded_password, start + len(encoded_user) + len(colon))
    if not user:
        raise UsageError("the user is missing before the @", position=start)
    if ":" in user and not socks:
        # RFC 7617 §2: "a user-id containing a colon character is invalid".
        raise UsageError("a user may not hold a colon", position=start)
    if socks:
        # RFC 1929 §2: both are 1 to 255 octets; it names no encoding.
        if not password:
            raise UsageError("SOCKS5 wants a password with the user: USER:PASSWORD@", position=start)
        if not (user + password).isascii() or max(len(user), len(password)) > SOCKS_FIELD_BYTES:
            raise UsageError(
                f"user and password of a SOCKS5 proxy are ASCII, of at most {SOCKS_FIELD_BYTES} characters",
                position=start,
            )
    return user, password


def _decoded(text: str, position: int) -> str:
    wrong = re.search(r"%(?![0-9A-Fa-f]{2})", text)
    if wrong:
        raise UsageError("a % is followed by two hex digits: write the sign itself as %25", position=position)
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise UsageError("user and password are UTF-8", position=position) from None
    if _CONTROL.search(decoded):
        raise UsageError("user and password hold no control characters", position=position)
    return decoded


def _masked(text: str, position: int) -> tuple[str, int]:
    """The text without what may be user and password, and the position in it."""
    scheme = _SCHEME.match(text)
    start = scheme.end() if scheme else 0
    end = text.rfind("@")
    if end < start:
        # `http://user:password` without the rest: what stands where the port should be is perhaps the password.
        host = _BRACKETED.match(text, start)
        colon = text.find(":", host.end() if host else start)
        if colon < 0 or re.fullmatch(r"[0-9]{1,5}/?", text[colon + 1 :]):
            return text, position
        start, end = colon + 1, len(text)
    shown = text[:start] + "***" + text[end:]
    if position <= start:
        return shown, position
    return shown, start if position < end else position - (end - start) + len("***")


def variable_set(environ: Mapping[str, str], scheme: str) -> str | None:
    """The variable of the environment that names the proxy for servers of a scheme; None if none does."""
    return next((name for name in _VARIABLES[scheme] if environ.get(name, "").strip()), None)


def _from_variables(environ: Mapping[str, str], names: Collection[str]) -> ProxyUrl | None:
    for name in names:
        text = environ.get(name, "").strip()
        if not text:
            continue
        try:
            # As everybody reads these variables: without a scheme it is an HTTP proxy.
            return parse_proxy_url(text if "://" in text else f"http://{text}")
        except UsageError as error:
            raise UsageError(
                f"in {name}: {error.message} (`--proxy none` does not look at it)",
                text=error.text,
                position=error.position,
                grammar=error.grammar,
            ) from None
    return None


# --- NO_PROXY -------------------------------------------------------------------------------------------------------


def bypasses(listed: str, host: str, port: int) -> bool:
    """Whether NO_PROXY lists a server. As curl reads it, and `HOST:PORT` besides.

    Args:
        listed: entries between commas or white space: `*` (alone) for every server; a name for itself and for all names
            below it, with or without a dot before it; an address; a network as `10.0.0.0/8`; each but `*` and networks
            with `:PORT`, for that port alone.
        host: a name, or an address without brackets.
        port: of the server.
    """
    if listed.strip() == "*":
        return True
    return any(_matches(entry.lower(), host.lower().rstrip("."), port) for entry in re.split(r"[\s,]+", listed))


def _matches(entry: str, host: str, port: int) -> bool:
    from ipaddress import ip_address, ip_network

    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(\d{1,5}))?", entry)
    plain = re.fullmatch(r"([^:]*):(\d{1,5})", entry)
    found = bracketed or plain
    if found:
        entry = found[1]
        if found[2] is not None and int(found[2]) != port:
            return False
    entry = entry.strip(".") if ":" not in entry else entry
    if not entry:
        return False
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host == entry or host.endswith("." + entry)
    try:
        # A network's bits beyond its prefix do not matter, as in curl.
        return address in ip_network(entry, strict=False) if "/" in entry else address == ip_address(entry)
    except (ValueError, TypeError):
        return False
