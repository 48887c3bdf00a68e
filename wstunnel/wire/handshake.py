"""The WebSocket opening handshake (RFC 6455 §4), both roles, on the heads of `http1`: what is asked, what is answered.

The server judges a request and answers with bytes:

    upgrade = accept(request, path="/", subprotocols=["wstunnel.1"])      # or HandshakeError
    answer = accept_response(upgrade)                                     # or refusal(error), then close

The client makes its request and is fed the answer:

    client = ClientUpgrade("host:443", "/", key, "wstunnel.1", headers=[("Authorization", "Bearer ...")])
    send(client.request())
    while not client.feed(received): ...                                  # client.eof() when the peer closes
    frames = client.leftover
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import NoReturn

import h11

from wstunnel import limits
from wstunnel.errors import HandshakeError, NetworkError, ServerRefusedError, UsageError, WstunnelError
from wstunnel.wire.addresses import pack_address, url_address
from wstunnel.wire.http1 import HOST, TOKEN, Request, Response, ResponseReader

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3
_VERSION = "13"
_KEY_BYTES = 16
_KEY = re.compile(r"[0-9A-Za-z+/]{22}==")  # every such text is base64 of 16 bytes
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CONTROL_BUT_TAB = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_SHOWN_CHARACTERS = 200


def _accept_value(key: str) -> str:
    """RFC 6455 §4.2.2, step 5.4: base64 of the SHA-1 of the key and the GUID."""
    digest = hashlib.sha1(key.encode("ascii") + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode("ascii")


# --- the server -----------------------------------------------------------------------------------------------------

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^/?#@:\[\]\s]+)(?::([0-9]{1,5}))?/?")
_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
TOO_MANY_LINKS = "too many links"
TRY_AGAIN_LATER = "try again later"
"""What this program's own server says with a 503; so a client knows its answer from a proxy's."""
_BEARER = re.compile(r"[0-9A-Za-z._~+/-]+=*")  # RFC 6750 §2.1, b64token
_REASONS = {status.value: status.phrase for status in HTTPStatus}
_GREETING = (
    "this is a wstunnel server: it carries TCP streams over WebSocket and has no pages to show; "
    "connect to it with `wstunnel client`"
)


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A request for a WebSocket that may be accepted.

    Args:
        key: the Sec-WebSocket-Key, valid.
        subprotocol: the one to speak; `None` if the server names none.
        request: the head it came in.
    """

    key: str
    subprotocol: str | None
    request: Request


def accept(request: Request, *, path: str, subprotocols: Sequence[str], origins: Collection[str] = ()) -> Upgrade:
    """Judge an upgrade request (RFC 6455 §4.2.1). Authentication is the caller's next step, see `bearer_token`.

    Args:
        request: a head from `http1.RequestReader`.
        path: the only path that is served; compared byte by byte, without the query string.
        subprotocols: what this server speaks, best first; the first one that was offered is taken. Empty: none is
            needed and none is answered.
        origins: what a browser's page may come from, as `scheme://host[:port]`. Clients that send no Origin, which
            all but browsers do, are not asked. `null` never matches: any sandboxed page has it.

    Raises:
        HandshakeError: 405 for a method other than GET, 404 for another path, 426 for no WebSocket upgrade or another
            version, 400 for a bad key, several Origin fields or unknown subprotocols, 403 for another origin.
    """
    if request.method != "GET":
        raise HandshakeError(405, "only GET is served here", (("Allow", "GET"),))
    if request.path != path:
        raise HandshakeError(404, "there is no tunnel at this path")
    if "websocket" not in request.tokens("upgrade") or "upgrade" not in request.tokens("connection"):
        raise HandshakeError(426, _GREETING, (("Upgrade", "websocket"),))
    if request.values("sec-websocket-version") != [_VERSION]:
        # RFC 6455 §4.4: an "appropriate HTTP error code (such as 426 Upgrade Required)" and the versions understood.
        headers = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", _VERSION))
        raise HandshakeError(426, f"this server speaks WebSocket version {_VERSION} only", headers)
    keys = request.values("sec-websocket-key")
    if len(keys) != 1 or not _KEY.fullmatch(keys[0]):
        raise HandshakeError(400, "the request needs one Sec-WebSocket-Key: base64 of 16 bytes")
    _check_origin(request.values("origin"), origins)
    return Upgrade(keys[0], _choose(request.elements("sec-websocket-protocol"), subprotocols), request)


def _check_origin(sent: list[str], origins: Collection[str]) -> None:
    if not sent:
        return
    if len(sent) > 1:
        raise HandshakeError(400, "the request has several Origin fields")
    origin = _parsed_origin(sent[0])
    if origin is None or origin not in {_parsed_origin(allowed) for allowed in origins}:
        raise HandshakeError(403, "web pages of this origin may not connect here")


def _parsed_origin(text: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port (RFC 6454 §4), `None` for what is no such origin."""
    found = _ORIGIN.fullmatch(text.lower())
    if found is None:
        return None
    scheme, host, port = found.groups()
    if host.startswith("["):
        packed = pack_address(host[1:-1])
        if packed is None:
            return None
        host = url_address(packed)
    return scheme, host, int(port) if port else _DEFAULT_PORTS.get(scheme)


def _choose(offered: list[str], spoken: Sequence[str]) -> str | None:
    if not spoken:
        return None
    for subprotocol in spoken:
        if subprotocol in offered:
            return subprotocol
    # `ClientUpgrade` finds the word "subprotocol" in this text and says that the versions differ.
    raise HandshakeError(400, f"no subprotocol in common: this server speaks {', '.join(spoken)}")


def bearer_token(request: Request) -> str | None:
    """The token of `Authorization: Bearer TOKEN` (RFC 6750 §2.1), not yet checked.

    Returns:
        The token; `None` when there is no Authorization field or it has another scheme: then answer 401.

    Raises:
        HandshakeError: 400 for several Authorization fields or a Bearer field without exactly one well-formed token.
    """
    values = request.values("authorization")
    if not values:
        return None
    if len(values) > 1:
        raise HandshakeError(400, "the request has several Authorization fields")
    scheme, _, token = values[0].partition(" ")
    if scheme.lower() != "bearer":
        return None
    token = token.lstrip(" ")  # RFC 9110 §11.4: 1*SP
    if not _BEARER.fullmatch(token):
        raise HandshakeError(400, "malformed Authorization field: expected `Bearer TOKEN`")
    return token


def accept_response(upgrade: Upgrade) -> bytes:
    """The 101 (RFC 6455 §4.2.2), without extensions. Frames may follow in the same write."""
    lines = [
        "HTTP/1.1 101 Switching Protocols",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Accept: {_accept_value(upgrade.key)}",
    ]
    if upgrade.subprotocol is not None:
        lines.append(f"Sec-WebSocket-Protocol: {upgrade.subprotocol}")
    return _head(lines)


def refusal(error: HandshakeError) -> bytes:
    """The whole answer to a head that is refused; the caller closes the connection after it.

    Never raises. Control characters in the error's headers become spaces, so no field can bring in another.
    """
    body = f"{error}\n".encode("utf-8", "replace")
    # RFC 9110 §7.8: "A sender of Upgrade MUST also send an "Upgrade" connection option".
    upgrade = any(name.lower() == "upgrade" for name, _ in error.headers)
    lines = [
        f"HTTP/1.1 {error.status} {_REASONS.get(error.status, 'Refused')}",
        "Connection: close, Upgrade" if upgrade else "Connection: close",
        "Content-Type: text/plain; charset=utf-8",
        "X-Content-Type-Options: nosniff",
        "Cache-Control: no-store",
        f"Content-Length: {len(body)}",
    ]
    lines += [_CONTROL.sub(" ", f"{name}: {value}") for name, value in error.headers]
    return _head(lines) + body


def _head(lines: list[str]) -> bytes:
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1", "replace")


# --- the client -----------------------------------------------------------------------------------------------------

_PATH = re.compile(r"/[!-\"$-~]*")  # RFC 6455 §3: no fragment
_OURS = {"upgrade", "connection", "content-length", "transfer-encoding"}


class ClientUpgrade:
    """One handshake on one connection. The caller dials, sends, receives and closes.

    Args:
        host: the Host field: a name or address (IPv6 in brackets), with the port unless it is the scheme's default.
        path: where the tunnel is, from `/` on, with a query string if need be.
        key: 16 fresh random bytes.
        subprotocol: the one to ask for, which the server must then speak; `None` to ask for none.
        headers: more fields, names in any case; one may be Host and takes the place of `host`. Not shown in any
            message: a token is among them.
        endpoint: it is a plain endpoint's, of whatever server, and no tunnel's: it need not choose the subprotocol, and
            refusals mean other things.

    Attributes:
        response: the head of the answer, whatever it says; None before it came.

    Raises:
        ValueError: `key` has another length.
    """

    def __init__(
        self,
        host: str,
        path: str,
        key: bytes,
        subprotocol: str | None,
        headers: Sequence[tuple[str, str]] = (),
        *,
        endpoint: bool = False,
    ) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a key has {_KEY_BYTES} bytes, not {len(key)}")
        self._host = host
        self._path = path
        self._key = base64.b64encode(key).decode("ascii")
        self._subprotocol = subprotocol
        self._headers = headers
        self._endpoint = endpoint
        self._reader = ResponseReader()
        self._heard = False
        self._body: RefusalBody | None = None
        self.response: Response | None = None

    @property
    def leftover(self) -> bytes:
        """Bytes behind the 101: the server's first frames, perhaps."""
        return self._reader.leftover

    def request(self) -> bytes:
        """The request to send (RFC 6455 §4.1).

        Raises:
            UsageError: the path or a field holds what may not stand there, a CR, LF or NUL for instance, or a field
                is one that the handshake itself sets.
        """
        if not _PATH.fullmatch(self._path):
            raise UsageError(
                f"the path {escaped(self._path)!r} cannot be sent: percent-encode it",
                grammar="/PATH in ASCII, without spaces and `#`",
            )
        hosts = [value for name, value in self._headers if name.lower() == "host"] or [self._host]
        if len(hosts) > 1 or not hosts[0] or not HOST.fullmatch(hosts[0]):
            raise UsageError(f"the Host field cannot be {escaped(', '.join(hosts))!r}", grammar="HOST[:PORT], once")
        lines = [
            f"GET {self._path} HTTP/1.1",
            f"Host: {hosts[0]}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {self._key}",
            f"Sec-WebSocket-Version: {_VERSION}",
        ]
        if self._subprotocol is not None:
            lines.append(_checked_field("Sec-WebSocket-Protocol", self._subprotocol))
        for name, value in self._headers:
            if name.lower() in _OURS or name.lower().startswith("sec-websocket-"):
                raise UsageError(f"the header {name!r} belongs to the handshake and cannot be set")
            if name.lower() != "host":
                lines.append(_checked_field(name, value))
        return _head(lines)

    def feed(self, data: bytes) -> bool:
        """Take what the server sent.

        Returns:
            True once upgraded: what is behind the 101 is in `leftover`. False: more bytes are needed.

        Raises:
            ServerRefusedError: 401, 403, 404, or 400 for the subprotocol. Trying again will not help.
            NetworkError: `http` for any other answer and for what is no HTTP; `websocket` for a 101 that breaks
                RFC 6455 §4.1.
        """
        self._heard = self._heard or bool(data)
        if self._body is None:
            response = self._reader.feed(data)
            if response is None:
                return False
            self.response = response
            if response.status == 101:
                self._check(response)
                return True
            self._body = RefusalBody(response)
            data = self._reader.leftover
        self._body.feed(data)
        if self._body.complete:
            raise self._refused(self._body)
        return False

    def eof(self) -> NoReturn:
        """The server closed, or the caller waits no longer, while `feed` returned False. Always raises.

        Raises:
            ServerRefusedError, NetworkError: as `feed` does, with as much of the answer as came; `http` if none came.
        """
        if self._body is not None:
            raise self._refused(self._body)
        when = "in the middle of its answer" if self._heard else "without an answer"
        raise NetworkError(
            "http",
            f"the server closed the connection during the handshake, {when}: check the port in the URL, and whether "
            "it is ws:// or wss:// there",
        )

    def _check(self, response: Response) -> None:
        """RFC 6455 §4.1: what the client "MUST validate" in the server's handshake."""
        subprotocol = response.value("sec-websocket-protocol")
        if response.tokens("upgrade") != ["websocket"]:
            wrong = "does not say `Upgrade: websocket`"
        elif "upgrade" not in response.tokens("connection"):
            wrong = "does not say `Connection: Upgrade`"
        elif response.value("sec-websocket-accept") != _accept_value(self._key):
            wrong = "has a wrong Sec-WebSocket-Accept, or none"
        elif response.elements("sec-websocket-extensions"):
            wrong = "has extensions, though none was offered"
        elif subprotocol != self._subprotocol and not (self._endpoint and subprotocol is None):
            chosen = "no subprotocol" if subprotocol is None else f"the subprotocol {escaped(subprotocol)!r}"
            wrong = f"chose {chosen}, not {self._subprotocol or 'none'}"
        else:
            return
        raise NetworkError(
            "websocket", f"the server's answer to the WebSocket upgrade {wrong}: a proxy on the way may have altered it"
        )

    def _refused(self, body: RefusalBody) -> WstunnelError:
        status = body.response.status
        line = body.first_line()
        said = f"{status}: {line}" if line else f"{status}"
        if self._endpoint and status in _ENDPOINT_MEANINGS:
            path = self._path.partition("?")[0]  # the rest may be a secret
            return ServerRefusedError(_ENDPOINT_MEANINGS[status].format(said=said, path=path))
        if status == 401:
            return ServerRefusedError(
                "the server refused the token (401): ask its operator for a new login URL (`wstunnel invite`), "
                "then `wstunnel login`"
            )
        if status == 403:
            return ServerRefusedError(f"the server refused ({said}): ask its operator to allow it")
        if status == 404:
            return ServerRefusedError(
                f"no tunnel at path {self._path!r} on that server (404): check the path in the URL"
            )
        if status == 400 and "subprotocol" in line.lower():
            return ServerRefusedError(
                f"the server does not speak {self._subprotocol or 'this'} ({said}): install versions of wstunnel on "
                "both sides that fit together"
            )
        location = body.response.value("location")
        if 300 <= status < 400 and location is not None:
            return NetworkError(
                "http", f"the server sent us on to {escaped(location)} ({status}): if that is right, put it in the URL"
            )
        return NetworkError("http", _meaning(status).format(said=said))


_ENDPOINT_UNREACHED = "the endpoint's target could not be reached ({said}), or the server behind a proxy"
_ENDPOINT_MEANINGS = {
    401: "the server wants another token, or one at all ({said}): check the URL",
    404: "no plain endpoint at path {path!r} on that server (404): check the path in the URL",
    502: _ENDPOINT_UNREACHED,
    503: "the server, or a proxy in front of it, has no room or cannot reach the target ({said}): its log says more",
    504: _ENDPOINT_UNREACHED,
}
_UNREACHED = "the proxy in front of the server could not reach it ({said}): check that the server runs"
_MEANINGS = {
    400: "the server, or a proxy on the way, did not understand the request ({said}): check scheme and port in the URL",
    407: "a proxy on the way wants credentials ({said}): ask the network's operator for them, or for a way past it",
    408: "the server, or a proxy on the way, waited too long for the request ({said}): try again",
    426: "the server saw no WebSocket upgrade ({said}): a proxy on the way may have removed it",
    429: "the server, or a proxy in front of it, had too many requests ({said}): try again later",
    502: _UNREACHED,
    503: "the server, or a proxy in front of it, has no room now ({said}): its log says more, if it runs",
    504: _UNREACHED,
}
_MEANING_2XX = (
    "something on the way answered as an ordinary web server; it does not pass WebSocket upgrades on ({said}): "
    "check host and path in the URL, and any proxy in front of the server"
)
_MEANING_5XX = "the server, or a proxy in front of it, failed ({said}): its log says more"
_MEANING_OTHER = "the answer was no WebSocket upgrade ({said}): check the URL, and any proxy on the way"


def _meaning(status: int) -> str:
    """What a refusal that the tunnel server need not have made means, and what to do."""
    if status < 300:
        return _MEANING_2XX
    return _MEANINGS.get(status, _MEANING_5XX if status >= 500 else _MEANING_OTHER)


class RefusalBody:
    """The first `limits.REFUSAL_BODY_BYTES` of the body behind a refusing head, unwrapped by h11."""

    def __init__(self, response: Response) -> None:
        self.response = response
        self.complete = False
        self._bytes = bytearray()
        self._parser = h11.Connection(h11.CLIENT)
        self._parser.send(h11.Request(method="GET", target="/", headers=[("Host", "")]))
        self._parser.send(h11.EndOfMessage())
        # The head has been read already; what frames the body is all that h11 needs of it.
        framing = [
            f"{name}: {value}" for name in ("Transfer-Encoding", "Content-Length") for value in response.values(name)
        ]
        self._parser.receive_data(_head([f"HTTP/1.1 {response.status} ", *framing]))

    def feed(self, data: bytes) -> None:
        if data and not self.complete:  # h11 takes no data for the end
            self._parser.receive_data(data)
        while not self.complete:
            try:
                event = self._parser.next_event()
            except h11.RemoteProtocolError:
                self.complete = True  # bad chunks: what came before them is all there is
                return
            if event is h11.NEED_DATA:
                return
            if isinstance(event, h11.Data):
                self._bytes += event.data[: limits.REFUSAL_BODY_BYTES - len(self._bytes)]
            self.complete = isinstance(event, h11.EndOfMessage) or len(self._bytes) == limits.REFUSAL_BODY_BYTES

    def first_line(self) -> str:
        """What to show of the answer: the body's first line, or the reason phrase if that is blank or HTML; escaped."""
        lines = self._bytes.decode("utf-8", "backslashreplace").splitlines()
        line = next((stripped for line in lines if (stripped := line.strip())), "")
        return escaped(self.response.reason if not line or line.startswith("<") else line)


def escaped(text: str) -> str:
    """A peer's text for a person's terminal: nothing unprintable, at most `_SHOWN_CHARACTERS`."""
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text[: _SHOWN_CHARACTERS + 1]
    )
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 3] + "..."


def _checked_field(name: str, value: str) -> str:
    # The value stays out of the messages: it may be a token.
    if not TOKEN.fullmatch(name):
        raise UsageError(f"the header name {escaped(name)!r} is none", grammar="'Name: value'")
    if _CONTROL_BUT_TAB.search(value):
        raise UsageError(
            f"the value of the header {name!r} holds a control character", grammar="'Name: value' in one line"
        )
    if not value.isascii():
        raise UsageError(f"the value of the header {name!r} is not ASCII", grammar="'Name: value' in ASCII")
    return f"{name}: {value}"
