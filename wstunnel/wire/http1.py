"""HTTP/1.1 heads, read strictly (RFC 9112): bytes in, one `Request` or `Response` out, and the bytes behind it.

    reader = RequestReader()
    request = reader.feed(data)     # None while more bytes are needed
    frames = reader.leftover        # what came behind the head in the same bytes

A scanner goes over every byte once and stops at the first one that no valid head has in that place; its states stand
in `_TABLE`. Only a whole head that passed goes to h11, which takes it apart and checks what spans several fields.

h11 alone would accept bare line feeds, folded lines and control bytes. Two parsers that read those differently are
how requests are smuggled, so none of them gets through here.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar, cast

import h11

from wstunnel import limits
from wstunnel.errors import HandshakeError, NetworkError, WstunnelError

TOKEN = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
"""RFC 9110 §5.6.2: methods, field names, subprotocols."""
HOST = re.compile(r"(?:\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~%-]*)(?::[0-9]{0,5})?")
"""RFC 9110 §7.2: `uri-host [ ":" port ]`, without the punctuation that no real host name has."""
_ABSOLUTE_FORM = re.compile(r"(?i:https?|wss?)://[^/]+(/.*)?")
_SHOWN_CHARACTERS = 60


# --- what comes out -------------------------------------------------------------------------------------------------


class _Message:
    """The header fields of a head: lower-case names, values without the white space around them."""

    __slots__ = ()
    headers: tuple[tuple[str, str], ...]

    def values(self, name: str) -> list[str]:
        """The value of every field called `name` (any case), in the order of arrival."""
        name = name.lower()
        return [value for key, value in self.headers if key == name]

    def value(self, name: str) -> str | None:
        """All values of `name` joined by `, ` (RFC 9110 §5.3): a repeated field is never half seen. None if absent."""
        values = self.values(name)
        return ", ".join(values) if values else None

    def elements(self, name: str) -> list[str]:
        """The members of a comma-separated list (RFC 9110 §5.6.1), as sent, empty ones left out."""
        return [element for value in self.values(name) for part in value.split(",") if (element := part.strip(" \t"))]

    def tokens(self, name: str) -> list[str]:
        """`elements` in lower case, for lists whose members have no case: Connection, Upgrade."""
        return [element.lower() for element in self.elements(name)]


@dataclass(frozen=True, slots=True)
class Request(_Message):
    """A request head. The repr leaves the headers out: a token is among them.

    Args:
        method: as sent; methods have case.
        target: as sent, ASCII without spaces (RFC 9112 §3.2).
        headers: lower-case names, latin-1 values.
    """

    method: str
    target: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)

    @property
    def path(self) -> str:
        """The target's path as sent, without the query string; empty when it has none (`*`, `host:port`)."""
        target = self.target.partition("?")[0]
        if target.startswith("/"):
            return target
        # RFC 9112 §3.2.2: "a server MUST accept the absolute-form in requests even though most HTTP/1.1 clients will
        # only send the absolute-form in requests to proxies."
        absolute = _ABSOLUTE_FORM.fullmatch(target)
        return (absolute[1] or "/") if absolute else ""


@dataclass(frozen=True, slots=True)
class Response(_Message):
    """A response head.

    Args:
        status: 100 to 999.
        reason: the server's words, latin-1, not yet escaped; often empty.
        headers: lower-case names, latin-1 values.
    """

    status: int
    reason: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)


# --- the scanner ----------------------------------------------------------------------------------------------------

_HT, _LF, _CR, _SP, _COLON = b"\t\n\r :"
_TLS_ALERT, _TLS_HANDSHAKE = 0x15, 0x16


class _Step(Enum):
    """Where in a head the next byte stands. The value is what a message calls it."""

    METHOD = "method"
    TARGET = "request target"
    VERSION = "HTTP version"
    STATUS = "status line"
    REASON = "reason phrase"
    NAME = "field name"
    VALUE = "field value"
    LINE_FEED = "line end"
    LAST_LINE_FEED = "last line end"
    DONE = "end"


_REQUEST_LINE = (_Step.METHOD, _Step.TARGET, _Step.VERSION)


@dataclass(frozen=True, slots=True)
class _Rule:
    """One step: the bytes it goes over, and what ends it.

    Args:
        stop: finds the first byte that does not belong to the step.
        then: the byte that may stand there, and the step that it leads to.
        empty: the same when the step went over no byte at all.
        shape: instead of `stop`, the very bytes of the step; `0` stands for any digit.
    """

    stop: re.Pattern[bytes]
    then: Mapping[int, _Step] = field(default_factory=dict)
    empty: Mapping[int, _Step] = field(default_factory=dict)
    shape: bytes = b""


_NO_TCHAR = re.compile(rb"[^-!#$%&'*+.^_`|~0-9A-Za-z]")
_NO_VCHAR = re.compile(rb"[^\x21-\x7e]")
# RFC 9110 §5.5 lets a recipient keep control bytes in values; nothing that we talk to needs them.
_NO_TEXT = re.compile(rb"[^\t\x20-\x7e\x80-\xff]")
_ANY = re.compile(rb"[\x00-\xff]")
_END_OF_LINE = {_CR: _Step.LINE_FEED}

_TABLE: Mapping[_Step, _Rule] = {
    _Step.METHOD: _Rule(_NO_TCHAR, then={_SP: _Step.TARGET}),
    _Step.TARGET: _Rule(_NO_VCHAR, then={_SP: _Step.VERSION}),
    _Step.VERSION: _Rule(_ANY, shape=b"HTTP/0.0", then=_END_OF_LINE),
    # RFC 9112 §4 wants a space even before an empty reason; too many servers leave it out.
    _Step.STATUS: _Rule(_ANY, shape=b"HTTP/0.0 000", then={_SP: _Step.REASON, **_END_OF_LINE}),
    _Step.REASON: _Rule(_NO_TEXT, then=_END_OF_LINE, empty=_END_OF_LINE),
    _Step.LINE_FEED: _Rule(_ANY, empty={_LF: _Step.NAME}),
    _Step.NAME: _Rule(_NO_TCHAR, then={_COLON: _Step.VALUE}, empty={_CR: _Step.LAST_LINE_FEED}),
    _Step.VALUE: _Rule(_NO_TEXT, then=_END_OF_LINE, empty=_END_OF_LINE),
    _Step.LAST_LINE_FEED: _Rule(_ANY, empty={_LF: _Step.DONE}),
}

_DIGITS_AS_ZERO = bytes.maketrans(b"123456789", b"000000000")

_Head = TypeVar("_Head", Request, Response)


class _HeadReader(ABC, Generic[_Head]):
    """The scanner, blind to the role. What it reports depends on the bytes only, not on how they were cut.

    An error repeats itself when more is fed: the position stays before the byte at fault.
    """

    _first: _Step

    def __init__(self) -> None:
        self.leftover = b""
        """Bytes that came behind the head; empty until there is one."""
        self._head: _Head | None = None
        self._buffer = bytearray()
        self._position = 0  # the next byte to look at
        self._start(0)

    def _start(self, begin: int) -> None:
        self._begin = begin
        self._step_begin = begin
        self._step = self._first
        self._fields = 0

    def feed(self, data: bytes) -> _Head | None:
        """Take more bytes from the peer; none at all changes nothing.

        Returns:
            The head once it is whole, else `None`. After that every call returns it again and adds to `leftover`.

        Raises:
            HandshakeError, NetworkError: by role; see the class.
        """
        if self._head is not None:
            self.leftover += data
            return self._head
        room = limits.HEAD_BYTES - len(self._buffer)
        self._buffer += data[:room]
        while self._scan():
            self._head = self._finish(bytes(self._buffer[self._begin : self._position]))
            if self._head is not None:
                self.leftover = bytes(self._buffer[self._position :]) + data[room:]
                self._buffer.clear()
                return self._head
            self._start(self._position)
        if len(self._buffer) == limits.HEAD_BYTES:
            if self._step in _REQUEST_LINE:
                raise self._fault(414, f"its first line alone is longer than {limits.HEAD_BYTES} bytes")
            raise self._fault(431, f"it is longer than {limits.HEAD_BYTES} bytes")
        return None

    def _scan(self) -> bool:
        """Go over what came; true when the head is whole."""
        while self._step is not _Step.DONE:
            rule = _TABLE[self._step]
            self._position = self._end_of_shape(rule.shape) if rule.shape else self._end_of_run(rule.stop)
            if self._position == len(self._buffer):
                return False
            byte = self._buffer[self._position]
            step = (rule.then if self._position > self._step_begin else rule.empty).get(byte)
            if step is None:
                raise self._fault(400, self._blame(byte))
            if step is _Step.VALUE:
                if self._fields == limits.HEAD_FIELDS:
                    raise self._fault(431, f"it has more than {limits.HEAD_FIELDS} header fields")
                self._fields += 1
            self._position += 1
            self._step_begin = self._position
            self._step = step
        return True

    def _end_of_run(self, stop: re.Pattern[bytes]) -> int:
        found = stop.search(self._buffer, self._position)
        return found.start() if found else len(self._buffer)

    def _end_of_shape(self, shape: bytes) -> int:
        seen = bytes(self._buffer[self._step_begin : self._step_begin + len(shape)])
        for offset, (byte, wanted) in enumerate(zip(seen.translate(_DIGITS_AS_ZERO), shape, strict=False)):
            if byte != wanted:
                raise self._fault(400, self._blame(seen[offset]))
        if len(seen) == len(shape):
            self._check_start(seen)
        return self._step_begin + len(seen)

    def _blame(self, byte: int) -> str:
        if self._step in (_Step.LINE_FEED, _Step.LAST_LINE_FEED):
            return "a carriage return without a line feed behind it"
        if byte == _LF:
            return "a line feed without a carriage return before it"
        if self._step is _Step.NAME and byte in (_SP, _HT):
            # RFC 9112 §5.1: "A server MUST reject, with a response status code of 400 (Bad Request), any received
            # request message that contains whitespace between a header field name and colon." §5.2: a sender "MUST
            # NOT generate a message that includes line folding".
            folded = self._position == self._step_begin
            return "a folded header line" if folded else "white space between a field name and its colon"
        return f"byte 0x{byte:02x} in the {self._step.value}"

    @abstractmethod
    def _check_start(self, start: bytes) -> None:
        """Judge the version (and status) as soon as they are there: `HTTP/1.1` or `HTTP/1.1 200`."""

    @abstractmethod
    def _finish(self, head: bytes) -> _Head | None:
        """Parse a whole head; `None` to skip it and go on with the next."""

    @abstractmethod
    def _fault(self, status: int, what: str) -> WstunnelError:
        """The error of this role for a head that cannot be accepted."""


def _decoded(headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[str, str], ...]:
    return tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in headers)


# --- the two roles --------------------------------------------------------------------------------------------------


class RequestReader(_HeadReader[Request]):
    """The server's side: reads the one request of a connection.

    `feed` raises only `HandshakeError`: 400 for anything malformed, a Host that is missing, repeated or no host, a
    TLS handshake on a plain port, Transfer-Encoding or Content-Length on an upgrade, or both on any request; 414 and
    431 for what passes `limits.HEAD_BYTES` or `limits.HEAD_FIELDS`; 505 for HTTP versions other than 1.1.
    """

    _first = _Step.METHOD

    def _fault(self, status: int, what: str) -> WstunnelError:
        if self._buffer[0] == _TLS_HANDSHAKE:
            return HandshakeError(400, "this port speaks plain HTTP, the client spoke TLS: use a ws:// URL")
        return HandshakeError(status, f"bad request head: {what}")

    def _check_start(self, start: bytes) -> None:
        # The HTTP/2 connection preface begins with `PRI * HTTP/2.0` so that it ends here (RFC 9113 §3.4).
        if start != b"HTTP/1.1":
            raise HandshakeError(505, f"this port speaks HTTP/1.1, not {start.decode('ascii')}")

    def _finish(self, head: bytes) -> Request:
        parser = h11.Connection(h11.SERVER, limits.HEAD_BYTES)
        parser.receive_data(head)
        try:
            event = cast("h11.Request", parser.next_event())
        except h11.RemoteProtocolError as error:
            raise HandshakeError(400, f"bad request head: {error}") from error
        request = Request(event.method.decode("ascii"), event.target.decode("ascii"), _decoded(event.headers))
        if not HOST.fullmatch(request.value("host") or ""):
            raise HandshakeError(400, "bad request head: the Host field is no host")
        body = [name for name in ("transfer-encoding", "content-length") if request.values(name)]
        upgrade = request.values("upgrade") or "upgrade" in request.tokens("connection")
        if body and (upgrade or len(body) > 1):
            # A body behind an upgrade would be read as frames by one side and skipped by another; both lengths at once
            # are the classic of smuggling (RFC 9112 §11.2).
            raise HandshakeError(400, f"bad request head: {' and '.join(body)} not allowed here")
        return request


class ResponseReader(_HeadReader[Response]):
    """The client's side: reads the answer to the one request of a connection.

    Interim answers (1xx) are skipped, but for 101; with the answer they may take `limits.HEAD_BYTES`. HTTP/1.0 is
    accepted, since proxies refuse in it, but for 101.

    `feed` raises only `NetworkError("http", ...)`, which says what came instead.
    """

    _first = _Step.STATUS

    def _fault(self, status: int, what: str) -> WstunnelError:
        if self._step is not _Step.STATUS or status != 400:
            return NetworkError("http", f"the server answered with a malformed HTTP head: {what}")
        if self._buffer[0] == _TLS_ALERT:
            return NetworkError("http", "the server answered in TLS on this port: use a wss:// URL")
        shown = repr(bytes(self._buffer[self._begin : self._begin + _SHOWN_CHARACTERS]))
        if len(shown) > _SHOWN_CHARACTERS:
            shown = shown[: _SHOWN_CHARACTERS - 3] + "..."
        return NetworkError(
            "http", f"the server answered something that is not HTTP: {shown}: check host and port in the URL"
        )

    def _check_start(self, start: bytes) -> None:
        if not start.startswith((b"HTTP/1.0 ", b"HTTP/1.1 ")) or start == b"HTTP/1.0 101":
            raise NetworkError("http", f"the server answered {start.decode('ascii')!r}, which is not HTTP/1.1")

    def _finish(self, head: bytes) -> Response | None:
        parser = h11.Connection(h11.CLIENT, limits.HEAD_BYTES)
        # h11 takes a 101 only as the answer to a request for an upgrade.
        parser.send(h11.Request(method="GET", target="/", headers=[("Host", ""), ("Upgrade", "websocket")]))
        parser.receive_data(head)
        try:
            event = cast("h11.Response", parser.next_event())
        except h11.RemoteProtocolError as error:
            raise NetworkError("http", f"the server answered with a malformed HTTP head: {error}") from error
        if event.status_code < 200 and event.status_code != 101:
            return None
        return Response(event.status_code, event.reason.decode("latin-1"), _decoded(event.headers))
