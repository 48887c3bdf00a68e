"""Plain endpoints, sans I/O: a WebSocket whose messages are nothing but a stream of bytes.

What is asked and how, at the server, on the heads of `http1`:

    upgrade = accept_plain(request, path="/db", origins=["https://app.example.org"])   # or HandshakeError
    token = offered_token(request)                                                     # None: 401
    answer = handshake.accept_response(upgrade)

Then the frames, at either end. Where a message ends has no meaning, in neither direction:

    for payload in protocol.receive(data): to_target(payload)
    to_client(protocol.control()), to_client(protocol.header(len(payload)) + payload)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from wstunnel.errors import HandshakeError, ProtocolError
from wstunnel.wire.frames import CloseCode, FrameDecoder, Opcode, encode_close, encode_frame, encode_header, parse_close
from wstunnel.wire.handshake import Upgrade, accept, bearer_token
from wstunnel.wire.http1 import Request
from wstunnel.wire.masking import MaskKeys

SUBPROTOCOL = "binary"
"""websockify's name for bytes in binary messages."""
BEARER = "bearer."
"""A subprotocol that begins so carries a token: the one field of the handshake that a browser's page can set."""
HEADER_BYTES = 14
"""Longest header of a frame, with the key of one that is masked."""
KEY_BYTES = 4
NO_STATUS = 1005
"""RFC 6455 §7.1.5: the peer's Close frame had no code."""


def accept_plain(request: Request, *, path: str, origins: Collection[str]) -> Upgrade:
    """Judge an upgrade request at a plain endpoint. Authentication is next: `offered_token`.

    `binary` is spoken if it was offered; else the answer names no subprotocol, whatever was offered.

    Args:
        request: a head from `http1.RequestReader`.
        path: the endpoint's.
        origins: as for `handshake.accept`.

    Raises:
        HandshakeError: as `handshake.accept`.
    """
    upgrade = accept(request, path=path, subprotocols=(), origins=origins)
    offered = request.elements("sec-websocket-protocol")
    return replace(upgrade, subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)


def offered_token(request: Request) -> str | None:
    """The token of `Authorization: Bearer TOKEN` or of an offered subprotocol `bearer.TOKEN`, not yet checked.

    Returns:
        The token; `None` when there is none: then answer 401.

    Raises:
        HandshakeError: 400 for a malformed field, and for more than one token: which one counted would be a guess.
    """
    header = bearer_token(request)
    tokens = [] if header is None else [header]
    offered = request.elements("sec-websocket-protocol")
    tokens += [subprotocol[len(BEARER) :] for subprotocol in offered if subprotocol.startswith(BEARER)]
    if len(tokens) > 1:
        raise HandshakeError(400, "the request has several tokens")
    return tokens[0] if tokens else None


class PlainProtocol:
    """The frames of one connection, at one of its ends.

    Args:
        text: take the bytes of text messages as those of binary ones; otherwise a text message is an error.
        keys: of masking, at the client; None at the server.

    Attributes:
        closing: our Close frame was asked for: no data may follow.
        close_code: of the peer's Close frame (1005: it had none), `None` until that came.
        close_reason: its words.
        midway: the peer's last message has begun and not ended.
        masks: the payload behind a `header` must be masked with that header's last KEY_BYTES.
    """

    __slots__ = (
        "_close", "_decoder", "_keys", "_ping", "_pong", "_text", "close_code", "close_reason", "closing", "masks",
        "midway",
    )  # fmt: skip

    def __init__(self, *, text: bool, keys: MaskKeys | None = None) -> None:
        self._text = text
        self._keys = keys
        self.masks = keys is not None
        self._decoder = FrameDecoder(masked=keys is None)
        self._ping = False
        self._pong: bytes | None = None
        self._close = b""
        self.closing = False
        self.close_code: int | None = None
        self.close_reason = ""
        self.midway = False

    def receive(self, data: bytes | memoryview) -> Iterator[bytes | memoryview]:
        """Decode what arrived. To be run to its end; then look at `close_code`, and send what `control` has.

        The peer's Close frame is answered here (RFC 6455 §5.5.1), unless ours was first.

        Args:
            data: any number of bytes, in any split.

        Yields:
            payload, never empty; unmasked copies, so they stay good.

        Raises:
            ProtocolError: the peer broke RFC 6455, or sent text that is not wanted (1003). All that was right before
                it was yielded. The caller closes with the error's code.
        """
        for opcode, payload, last in self._decoder.feed(data):
            if opcode is Opcode.BINARY or (opcode is Opcode.TEXT and self._text):
                self.midway = not last
                if payload:
                    yield payload
            elif opcode is Opcode.TEXT:
                raise ProtocolError("this endpoint takes binary messages only", CloseCode.UNSUPPORTED)
            elif opcode is Opcode.PING:
                # §5.5.3: whoever has not answered earlier pings yet "MAY elect to send a Pong frame for only the most
                # recently processed Ping frame". So a flood of them is held in 125 bytes.
                self._pong = bytes(payload)
            elif opcode is Opcode.CLOSE:
                self.close_code, self.close_reason = parse_close(payload)
                self.close(None if self.close_code == NO_STATUS else self.close_code)

    def ping(self) -> None:
        """Ask whether the peer is there, and show proxies that the connection is in use."""
        self._ping = True

    def close(self, code: int | None, reason: str = "") -> None:
        """Send a Close frame behind everything else; only the first call counts."""
        if not self.closing:
            self.closing = True
            self._close = encode_close(code, reason, key=self._key())

    def control(self) -> bytes:
        """The control frames to send now, before any further data; each is given once. Empty: there is none."""
        frames = b""
        if self._pong is not None:
            if self._close or not self.closing:  # §5.5.1: nothing may follow our Close
                frames = encode_frame(Opcode.PONG, self._pong, key=self._key())
            self._pong = None
        if self._ping:
            if not self.closing:
                frames += encode_frame(Opcode.PING, b"", key=self._key())
            self._ping = False
        frames += self._close
        self._close = b""
        return frames

    def header(self, length: int) -> bytes:
        """What goes before `length` bytes of data: at most HEADER_BYTES. Not once `closing`."""
        return encode_header(Opcode.BINARY, length, key=self._key())

    def _key(self) -> bytes | None:
        return None if self._keys is None else self._keys.next()
