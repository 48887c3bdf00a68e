"""Plain endpoints of a server, and the browsers' pages that may use them: the grammar of their flags.

    ENDPOINT = PATH=TARGET                  --endpoint
    /db=tcp:127.0.0.1:5432                  each WebSocket at /db is a TCP connection to that port
    /docker=unix:/run/docker.sock
    /vnc=[::1]:5900                         without a kind it is TCP

The first `=` splits; one in the path itself is written `%3D`, as it then must be in the URL.

    ORIGIN = SCHEME://HOST[:PORT][/]        --allow-origin
    https://app.example.org
    http://localhost:3000
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wstunnel.errors import UsageError
from wstunnel.targets import GRAMMAR as TARGET_GRAMMAR
from wstunnel.targets import (
    Part,
    Target,
    address_family,
    join_host_port,
    parse_host,
    parse_port,
    parse_target,
    split_host_port,
)
from wstunnel.wire.addresses import pack_address, url_address

GRAMMAR = "/PATH=[tcp:]HOST:PORT or /PATH=unix:/SOCKET, as in /db=tcp:127.0.0.1:5432"
ORIGIN_GRAMMAR = "SCHEME://HOST[:PORT] as a browser sends it, without a path: https://app.example.org"

_NOT_IN_A_PATH = re.compile(r"[^!$-;=@-Z_a-z~]|%(?![0-9A-Fa-f]{2})")  # RFC 3986 §3.3: pchar and "/"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")  # RFC 3986 §3.1
_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")  # URL Standard, "ends in a number": IPv4, or nothing
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One path of the server at which each WebSocket is a raw connection.

    Args:
        path: as in the request line, without a query; compared byte by byte.
        target: `tcp` or `unix`.
    """

    path: str
    target: Target

    def __str__(self) -> str:
        return f"{self.path}={self.target}"


def parse_endpoint(text: str) -> Endpoint:
    """Read an ENDPOINT.

    Raises:
        UsageError: it does not follow the grammar; `position` points at the part at fault.
    """
    part = Part.whole(text, GRAMMAR)
    if not text.startswith("/"):
        raise part.error("the path begins with '/'")
    path, equals, target_text = text.partition("=")
    if not equals:
        raise part.error("'=' and the target are missing", len(text))
    if found := _NOT_IN_A_PATH.search(path):
        raise part.error("not a character of a URL's path", found.start())
    start = len(path) + 1
    try:
        target = parse_target(target_text)
    except UsageError as error:
        grammar = error.grammar if error.grammar != TARGET_GRAMMAR else GRAMMAR
        raise UsageError(error.message, text=text, position=start + error.position, grammar=grammar) from None
    if target.kind == "udp":
        raise part.error("an endpoint is a stream of bytes, which UDP has not", start)
    return Endpoint(path, target)


def parse_origin(text: str) -> str:
    """Read an ORIGIN.

    Returns:
        it as browsers write it: lower case, an international name as A-labels, no default port, no final slash.

    Raises:
        UsageError: it does not follow the grammar; `position` points at the part at fault.
    """
    part = Part.whole(text, ORIGIN_GRAMMAR)
    if text in ("*", "null"):
        raise part.error("every page would be let in: name the origins one by one")
    scheme = _SCHEME.match(text)
    if scheme is None or not text.startswith("://", scheme.end()):
        raise part.error("an origin begins with a scheme and '://'", scheme.end() if scheme else 0)
    rest = part.cut(scheme.end() + 3)
    value = rest.value
    end = re.search(r"[/?#]|$", value)
    assert end is not None
    if end.group() and value[end.start() :] != "/":
        raise rest.error("an origin has no path: what follows the host and the port goes", end.start())
    host, port = split_host_port(rest.cut(0, end.start()))
    name = parse_host(host)
    if _NUMERIC.fullmatch(name) and address_family(name) is None:
        raise host.error("browsers write such an address as four numbers: 127.0.0.1")
    packed = pack_address(name) if ":" in name else None
    if packed is not None:
        name = url_address(packed)
    number = None if port is None else parse_port(port)
    kind = scheme[0].lower()
    if number is None or number == _DEFAULT_PORTS.get(kind):
        return f"{kind}://[{name}]" if ":" in name else f"{kind}://{name}"
    return f"{kind}://{join_host_port(name, number)}"
