"""The server's side of an HTTP forward proxy (RFC 9110 §9.3.6, RFC 9112 §3.2.2): bytes in, one `ProxyRequest` out.

    proxy = HttpProxyServer(authenticate=None)
    request = proxy.feed(received)          # None while more bytes are needed; on HandshakeError: send(refusal(error))
    ...                                     # dial request.host and .port; on failure: send(refusal(failure(code, why)))
    CONNECT:        send(ESTABLISHED)       # then bytes go both ways, proxy.leftover first
    anything else:  target.send(request.head + request.body.feed(proxy.leftover)), the answer goes back as it comes

    GET http://example.org:8080/a?b HTTP/1.1   becomes   GET /a?b HTTP/1.1
    Host: whatever                                       Host: example.org:8080
    Proxy-Connection: keep-alive                         Connection: close

One connection serves one request: the origin is told to close, and says so to the client. That makes one connection
one stream, and answers pass untouched. No `Via` is added (RFC 9110 §7.6.3): servers stop compressing when they see it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import h11

from wstunnel import limits
from wstunnel.errors import HandshakeError, WstunnelError
from wstunnel.wire import handshake
from wstunnel.wire.addresses import PORT_MAX, parse_host
from wstunnel.wire.http1 import Request, RequestReader
from wstunnel.wire.http_body import ChunkedBody, EndlessBody, RequestBody, SizedBody

Authenticate = Callable[[bytes, bytes], bool]
"""Is this user and password right? The caller compares in constant time."""

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
"""The answer to CONNECT once the target accepted. RFC 9110 §9.3.6: without Transfer-Encoding and Content-Length."""

_DEFAULT_PORT = 80
_CHALLENGE = (("Proxy-Authenticate", 'Basic realm="wstunnel", charset="UTF-8"'),)  # RFC 7617 §2
_SOCKS_VERSIONS = (4, 5)
_TLS_HANDSHAKE = 0x16

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^][:@/?#]+)(?::([0-9]{0,5}))?")
_ABSOLUTE = re.compile(r"(?i:http)://([^/?#]*)(/[^?#]*)?(\?[^#]*)?")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

_STATUS = {"forbidden": 403, "timeout": 504, "limit": 503}
"""By reset code. The others, unknown ones too, are 502: refused, unreachable, name-not-found, internal."""

_HOP_BY_HOP = frozenset(
    # RFC 9110 §7.6.1, and the fields that are for this proxy alone. Transfer-Encoding stays, since the body does.
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "upgrade")
)
_NOT_OPTIONS = frozenset(("content-length", "host", "transfer-encoding"))


@dataclass(frozen=True, slots=True)
class ProxyRequest:
    """What a client wants of the proxy, checked.

    Args:
        method: `CONNECT`, or that of the request to be passed on.
        host: a lower-case name, or an address in its usual form without brackets.
        port: 1 to 65535.
        head: what the origin is to be sent before the body; empty for CONNECT. It may hold passwords.
        body: tells which of the client's bytes are the request's: only those may be passed on.
    """

    method: str
    host: str
    port: int
    head: bytes = field(repr=False)
    body: RequestBody = field(repr=False, compare=False)


class HttpProxyServer:
    """The one request of one connection, fed in any split. At most `limits.HEAD_BYTES` are held before it is whole.

    Args:
        authenticate: judges user and password (RFC 7617), which clients then must give. `None`: none are asked for.
    """

    def __init__(self, authenticate: Authenticate | None = None) -> None:
        self._authenticate = authenticate
        self._reader = _Reader()
        self._request: ProxyRequest | None = None

    @property
    def leftover(self) -> bytes:
        """Bytes that came behind the head: the body's first, early data, or what `request.body` drops."""
        return self._reader.leftover

    def feed(self, data: bytes) -> ProxyRequest | None:
        """Take more bytes from the client; none at all changes nothing.

        Returns:
            The request once its head is whole, else `None`. After that every call returns it again and adds to
            `leftover`.

        Raises:
            HandshakeError: what is to be answered with `refusal` before the connection is closed: 400 for what is
                malformed or no request to a proxy, 407 for a password that is missing or wrong, 414 and 431 for what
                is too long, 505 for another version of HTTP.
        """
        head = self._reader.feed(data)
        if head is not None and self._request is None:
            if self._authenticate is not None:
                _check_login(head, self._authenticate)
            self._request = _connect(head) if head.method == "CONNECT" else _forward(head, self._reader)
        return self._request


class _Reader(RequestReader):
    """Heads as strict as the tunnel's, and two things more: HTTP/1.0, and bodies beside an Upgrade that is dropped.

    ssh's usual `nc -X connect` and ApacheBench speak HTTP/1.0, without Host. Java offers h2c with every POST.
    """

    def __init__(self) -> None:
        super().__init__()
        self.version = ""
        """`1.0` or `1.1`."""
        self.names: list[str] = []
        """The fields' names as sent, in the order of `Request.headers`: some origins mind the case."""

    def _fault(self, status: int, what: str) -> WstunnelError:
        first = self._buffer[0]
        if first == _TLS_HANDSHAKE:
            return HandshakeError(400, "this HTTP proxy speaks plain HTTP, the client spoke TLS: use http:// for it")
        if first in _SOCKS_VERSIONS:
            return HandshakeError(400, f"this HTTP proxy speaks no SOCKS, the client spoke SOCKS{first}")
        return HandshakeError(status, f"bad request head: {what}")

    def _check_start(self, start: bytes) -> None:
        if start not in (b"HTTP/1.0", b"HTTP/1.1"):
            raise HandshakeError(505, f"this proxy speaks HTTP/1.1 and 1.0, not {start.decode('ascii')}")

    def _finish(self, head: bytes) -> Request:
        parser = h11.Connection(h11.SERVER, limits.HEAD_BYTES)
        parser.receive_data(head)
        try:
            event = cast("h11.Request", parser.next_event())
        except h11.RemoteProtocolError as error:
            raise HandshakeError(400, f"bad request head: {error}") from error
        self.version = event.http_version.decode("ascii")
        self.names = [name.decode("ascii") for name, _ in event.headers.raw_items()]
        headers = tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in event.headers)
        request = Request(event.method.decode("ascii"), event.target.decode("ascii"), headers)
        if request.values("transfer-encoding") and (request.values("content-length") or self.version == "1.0"):
            # The classic of smuggling (RFC 9112 §11.2); §6.1: a recipient of Transfer-Encoding in HTTP/1.0 "MUST treat
            # the message as if the framing is faulty".
            raise HandshakeError(400, "bad request head: transfer-encoding is not allowed here")
        return request


# --- judging --------------------------------------------------------------------------------------------------------


def _check_login(request: Request, authenticate: Authenticate) -> None:
    values = request.values("proxy-authorization")
    if not values:
        raise HandshakeError(407, "this proxy demands a user name and a password", _CHALLENGE)
    scheme, _, encoded = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != "basic":
        raise HandshakeError(407, "this proxy takes one Basic user name and password", _CHALLENGE)
    try:
        user, colon, password = base64.b64decode(encoded.strip(" "), validate=True).partition(b":")
    except ValueError:
        colon = b""
    if not colon:
        raise HandshakeError(407, "malformed Proxy-Authorization field: expected Basic and base64", _CHALLENGE)
    if not authenticate(user, password):
        raise HandshakeError(407, "wrong user name or password", _CHALLENGE)


def _connect(request: Request) -> ProxyRequest:
    host, port = _parse_authority(request.target)
    if port is None:
        # RFC 9110 §9.3.6: "A server MUST reject a CONNECT request that targets an empty or invalid port number".
        raise HandshakeError(400, "CONNECT is followed by HOST:PORT, and the port is missing")
    if request.values("transfer-encoding") or request.value("content-length") not in (None, "0"):
        raise HandshakeError(400, "a CONNECT request has no body")
    return ProxyRequest("CONNECT", host, port, b"", EndlessBody())


def _forward(request: Request, reader: _Reader) -> ProxyRequest:
    found = _ABSOLUTE.fullmatch(request.target)
    if found is None:
        raise HandshakeError(400, _blame(request.target))
    host, port = _parse_authority(found[1])
    port = port or _DEFAULT_PORT
    target = (found[2] or "/") + (found[3] or "")
    if request.method == "OPTIONS" and not found[2] and not found[3]:
        target = "*"  # RFC 9112 §3.2.4
    upgrade = _asks_for_websocket(request)
    # RFC 9112 §2.3 would have a proxy name its own version. The answer passes untouched, so it has to suit the client.
    lines = [f"{request.method} {target} HTTP/{reader.version}", f"Host: {_host_field(host, port)}"]
    lines += _end_to_end_fields(request, reader.names)
    options = ["close"]
    if "trailers" in request.tokens("te"):
        lines.append("TE: trailers")
        options.append("TE")
    if upgrade:
        lines.append("Upgrade: websocket")
        options.append("Upgrade")
    lines.append(f"Connection: {', '.join(options)}")
    head = "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")
    return ProxyRequest(request.method, host, port, head, _body(request, upgrade))


def _blame(target: str) -> str:
    """Why `target` is nothing that this proxy could pass on."""
    if target.startswith("/") or target == "*":
        return "this is a proxy, not a web server: it wants a whole http:// URL in the request, or CONNECT"
    found = _SCHEME.match(target)
    if found is not None and found[1].lower() == "https":
        return "https:// goes through this proxy with CONNECT only, so that nobody on the way can read it"
    if found is not None and found[1].lower() != "http":
        return f"this proxy passes on http:// only, not {found[1].lower()}://"
    return "bad request head: the target is no http:// URL"


def _parse_authority(text: str) -> tuple[str, int | None]:
    """HOST[:PORT]: the canonical host and the port, `None` without one."""
    found = _AUTHORITY.fullmatch(text)
    host = parse_host(found[1]) if found else None
    if found is None or host is None:
        # RFC 9110 §4.2.4: a password in a URL is an error when it comes from elsewhere. Not shown: it is a secret.
        what = "a user name or password stands where only HOST:PORT may" if "@" in text else "there is no host in it"
        raise HandshakeError(400, f"bad request target: {what}")
    if not found[2]:
        return host, None
    port = int(found[2])
    if not 1 <= port <= PORT_MAX:
        raise HandshakeError(400, f"bad request head: {port} is no port")
    return host, port


def _host_field(host: str, port: int) -> str:
    """RFC 9112 §3.2.2: a proxy "MUST ignore the received Host header field (if any) and instead replace it"."""
    name = f"[{host}]" if ":" in host else host
    return name if port == _DEFAULT_PORT else f"{name}:{port}"


def _end_to_end_fields(request: Request, names: list[str]) -> list[str]:
    """The field lines that go on, in their order: what Connection names ends here (RFC 9110 §7.6.1)."""
    options = set(request.tokens("connection"))
    if options & _NOT_OPTIONS:
        # Dropping these would change where the body ends, or whom the request is for.
        raise HandshakeError(400, "bad request head: a field that Connection may not name")
    dropped = options | _HOP_BY_HOP | {"host", "max-forwards"}
    lines = [
        f"{name}: {value}" for name, (key, value) in zip(names, request.headers, strict=True) if key not in dropped
    ]
    return lines + _max_forwards(request)


def _max_forwards(request: Request) -> list[str]:
    """RFC 9110 §7.6.2: counts proxies down, for the two methods that ask which proxies there are."""
    value = request.value("max-forwards")
    if value is None:
        return []
    if request.method in ("OPTIONS", "TRACE"):
        if not re.fullmatch("[0-9]{1,9}", value):
            raise HandshakeError(400, "bad request head: Max-Forwards is no number")
        if int(value) == 0:
            raise HandshakeError(400, f"Max-Forwards ends this {request.method} here, at a proxy that has no pages")
        value = str(int(value) - 1)
    return [f"Max-Forwards: {value}"]


def _asks_for_websocket(request: Request) -> bool:
    """Is the connection to become a WebSocket? Any other Upgrade would turn it into what the client cannot expect."""
    if request.tokens("upgrade") != ["websocket"] or "upgrade" not in request.tokens("connection"):
        return False
    if request.values("transfer-encoding") or request.value("content-length") not in (None, "0"):
        raise HandshakeError(400, "bad request head: a body beside an upgrade to WebSocket")
    return True


def _body(request: Request, upgrade: bool) -> RequestBody:
    if upgrade:
        return EndlessBody()
    if request.values("transfer-encoding"):
        return ChunkedBody()  # h11 has made sure that it is `chunked` alone
    return SizedBody(int(request.value("content-length") or "0"))


# --- answers --------------------------------------------------------------------------------------------------------


def failure(code: str, why: str) -> HandshakeError:
    """What a client is told when its target could not be reached.

    Args:
        code: a reset code of docs/reference/protocol.md.
        why: in words, for the person who sees the page.
    """
    return HandshakeError(_STATUS.get(code, 502), why)


def refusal(error: HandshakeError) -> bytes:
    """The whole answer to a request that goes nowhere: a status and a text that says why. The caller closes then."""
    return handshake.refusal(error)
