"""Where the body of an HTTP/1.1 request ends (RFC 9112 §6), without changing a byte of it.

A proxy that serves one request a connection must not pass on what follows the body: it may be a request to another
host, with that host's cookies in it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

from wstunnel import limits
from wstunnel.errors import HandshakeError


class RequestBody(ABC):
    """Tells the bytes of a body from those behind it."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Has the last byte been fed? What comes then is not this request's."""

    @abstractmethod
    def feed(self, data: bytes) -> bytes:
        """Take bytes that came from the client.

        Returns:
            Those that belong to the body, as they are, for the origin; the rest is dropped. They never wait here.

        Raises:
            HandshakeError: 400, the body breaks its framing: close both connections. It repeats itself.
        """


class EndlessBody(RequestBody):
    """No body but a tunnel: everything belongs to it."""

    @property
    def complete(self) -> bool:
        return False

    def feed(self, data: bytes) -> bytes:
        return data


class SizedBody(RequestBody):
    """RFC 9112 §6.2.

    Args:
        size: Content-Length, in bytes; 0 when there is none, since a request without one has no body (§6.3).
    """

    def __init__(self, size: int) -> None:
        self._left = size

    @property
    def complete(self) -> bool:
        return self._left == 0

    def feed(self, data: bytes) -> bytes:
        taken = data[: self._left]
        self._left -= len(taken)
        return taken


_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[\t ]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_LINE_BYTES = limits.HEAD_BYTES
"""A size line with its extensions, and all trailers together."""


class ChunkedBody(RequestBody):
    """RFC 9112 §7.1: chunks, the last of them empty, then trailers and an empty line. Lines end in CR LF only.

    Only a line that has not ended is held, and that as a copy: its bytes were passed on already.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._data = 0  # bytes left of a chunk's data
        self._trailers = -1  # bytes of them so far; -1 before the last chunk
        self._behind_data = False  # the next line is the empty one behind a chunk's data
        self._complete = False
        self._error = ""

    @property
    def complete(self) -> bool:
        return self._complete

    def feed(self, data: bytes) -> bytes:
        if self._error:
            raise HandshakeError(400, self._error)
        try:
            return data[: self._end(data)]
        except HandshakeError as error:
            self._error = str(error)
            self._line.clear()
            raise

    def _end(self, data: bytes) -> int:
        """How many bytes of `data` are the body's."""
        position = 0
        while position < len(data) and not self._complete:
            if self._data:
                step = min(self._data, len(data) - position)
                self._data -= step
                position += step
                continue
            line_feed = data.find(b"\n", position)
            end = len(data) if line_feed < 0 else line_feed + 1
            self._line += data[position:end]
            if len(self._line) + max(self._trailers, 0) > _LINE_BYTES:
                raise HandshakeError(400, f"a line of the chunked body is longer than {_LINE_BYTES} bytes")
            position = end
            if line_feed >= 0:
                line = bytes(self._line)
                self._line.clear()
                self._read_line(line)
        return position

    def _read_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            raise HandshakeError(400, "a line of the chunked body does not end in CR LF")
        if self._trailers >= 0:
            self._trailers += len(line)
            self._complete = line == b"\r\n"
        elif self._behind_data:
            if line != b"\r\n":
                raise HandshakeError(400, "a chunk of the body is longer than its size")
            self._behind_data = False
        else:
            found = _SIZE.fullmatch(line[:-2])
            if found is None:
                raise HandshakeError(400, "a chunk of the body has no size")
            self._data = int(found[1], 16)
            self._behind_data = self._data > 0
            if not self._data:
                self._trailers = 0
