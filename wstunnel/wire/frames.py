"""RFC 6455 frames, both roles: bytes in, pieces of messages out, and back. No I/O, no extensions.

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-+-+-+-+-------+-+-------------+-------------------------------+
    |F|R|R|R| opcode|M| length 0-125| 126: 16 bits, 127: 64 bits … |
    |I|S|S|S|       |A| or 126, 127 | … then the 4-byte key if MASK |
    |N|V|V|V|       |S|             | … then the payload            |
    +-+-+-+-+-------+-+-------------+-------------------------------+

    81 05 48 65 6c 6c 6f                 "Hello", a whole text message, unmasked
    81 85 37 fa 21 3d 7f 9f 4d 51 58     the same, masked

A frame's payload is handed on as it arrives and never gathered, whatever its length; only control frames, which have
at most 125 bytes, are kept until they are whole. This is the hot path: each byte of the tunnel passes here.
"""

from __future__ import annotations

import codecs
import enum
from struct import Struct
from typing import TYPE_CHECKING, Final, TypeAlias

from wstunnel import limits
from wstunnel.errors import ProtocolError
from wstunnel.wire.masking import MaskKeys, apply_mask, apply_mask_python

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CloseCode",
    "FrameDecoder",
    "MaskKeys",
    "Opcode",
    "apply_mask",
    "apply_mask_python",
    "encode_close",
    "encode_data",
    "encode_frame",
    "encode_header",
    "encode_pair",
    "parse_close",
]

Bytes: TypeAlias = bytes | bytearray | memoryview


class Opcode(enum.IntEnum):
    """RFC 6455 §11.8. The rest of 0 to 15 is reserved. 8 and above are control frames (§5.5)."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class CloseCode(enum.IntEnum):
    """The close codes that this package sends (RFC 6455 §7.4.1). Peers may send others: see `parse_close`."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED = 1003
    INVALID_DATA = 1007
    POLICY = 1008
    TOO_BIG = 1009
    INTERNAL = 1011


_SENDABLE_CLOSE_CODES: Final = (
    # §7.4.1. 1004 is reserved; 1005, 1006 and 1015 "MUST NOT be set as a status code in a Close control frame".
    range(1000, 1004),
    # §7.4.1 up to 1011; 1012 to 1014 were registered with IANA later (§11.7). 1016 to 2999 are not defined yet.
    range(1007, 1015),
    # §7.4.2: 3000-3999 for libraries and frameworks, 4000-4999 for private use.
    range(3000, 5000),
)
# §7.1.5: "If this Close control frame contains no status code, _The WebSocket Connection Close Code_ is [...] 1005."
_NO_STATUS: Final = 1005

_OPCODES: Final[dict[int, Opcode]] = {opcode.value: opcode for opcode in Opcode}
_TEXT: Final = Opcode.TEXT
_BINARY: Final = Opcode.BINARY
_CONTROL: Final = 0x8  # this opcode and those above; module names: looking into an enumeration is slower
_FIN: Final = 0x80
_RESERVED: Final = 0x70
_OPCODE: Final = 0x0F
_MASK: Final = 0x80
_LENGTH: Final = 0x7F
_LENGTH_16: Final = 126
_LENGTH_64: Final = 127
_HEADER_BYTES: Final = 14
_KEY_BYTES: Final = 4
_BINARY_FIN: Final = _FIN | Opcode.BINARY
_TEXT_FIN: Final = _FIN | Opcode.TEXT
_PING_OR_PONG: Final = frozenset((_FIN | Opcode.PING, _FIN | Opcode.PONG))
_CLOSE_REASON_BYTES: Final = limits.CONTROL_PAYLOAD_BYTES - 2

_U16: Final = Struct("!H")
_U64: Final = Struct("!Q")
_KEY: Final = Struct("4s")
_HEADER_7: Final = Struct("!BB")
_HEADER_16: Final = Struct("!BBH")
_HEADER_64: Final = Struct("!BBQ")


# --- frames out -----------------------------------------------------------------------------------------------------


def encode_header(opcode: int, length: int, *, fin: bool = True, key: bytes | None = None) -> bytes:
    """A frame's header; the payload, masked with `key` if there is one, must follow it.

    Args:
        opcode: an `Opcode`.
        length: of the payload, in bytes.
        fin: whether the frame ends its message.
        key: the 4-byte masking key that a client must use (RFC 6455 §5.1), `None` at a server.

    Returns:
        2 to 14 bytes, `key` included.

    Raises:
        ValueError: a control frame that is too long or not final.
    """
    first = opcode | _FIN if fin else opcode
    mask = 0 if key is None else _MASK
    if opcode >= _CONTROL and (length > limits.CONTROL_PAYLOAD_BYTES or not fin):
        # §5.5: control frames "MUST have a payload length of 125 bytes or less and MUST NOT be fragmented".
        raise ValueError("a control frame has at most 125 bytes of payload and is final")
    # §5.2: "the minimal number of bytes MUST be used to encode the length".
    if length < _LENGTH_16:
        header = _HEADER_7.pack(first, mask | length)
    elif length < 1 << 16:
        header = _HEADER_16.pack(first, mask | _LENGTH_16, length)
    else:
        header = _HEADER_64.pack(first, mask | _LENGTH_64, length)
    return header if key is None else header + key


_SHORT_CLEAR: Final = [encode_header(Opcode.BINARY, size) for size in range(_LENGTH_16)]
_SHORT_MASKED: Final = [encode_header(Opcode.BINARY, size, key=b"") for size in range(_LENGTH_16)]


def encode_data(payload: Bytes, key: bytes | None) -> bytes:
    """As `encode_frame(Opcode.BINARY, payload, key=key)`, faster if there are fewer than 126 bytes."""
    size = len(payload)
    if size >= _LENGTH_16:
        return encode_frame(_BINARY, payload, key=key)
    if key is None:
        return _SHORT_CLEAR[size] + payload
    return _SHORT_MASKED[size] + key + apply_mask(payload, key)


def encode_frame(opcode: int, payload: Bytes, *, fin: bool = True, key: bytes | None = None) -> bytes:
    """One whole frame: `encode_header` (same arguments and errors) and the payload after it, masked if need be."""
    header = encode_header(opcode, len(payload), fin=fin, key=key)
    return header + (payload if key is None else apply_mask(payload, key))


def encode_pair(opcode: int, text: bytes, keys: MaskKeys | None) -> bytes:
    """An empty control frame and a TEXT frame in one piece: a `ping` or `pong`, and what proxies take for one.

    Args:
        opcode: PING or PONG.
        text: fewer than 126 bytes.
        keys: of masking, at a client; None at a server.
    """
    if keys is None:
        return b"%c\x00\x81%c%s" % (_FIN | opcode, len(text), text)
    empty, key = keys.next(), keys.next()  # §5.3: a fresh one for every frame
    return b"%c\x80%s\x81%c%s%s" % (_FIN | opcode, empty, _MASK | len(text), key, apply_mask(text, key))


def encode_close(code: int | None, reason: str = "", *, key: bytes | None = None) -> bytes:
    """A Close frame (RFC 6455 §5.5.1).

    Args:
        code: the status code, or `None` for a frame without one (and then without a reason).
        reason: for a person; cut to 123 bytes of UTF-8 at the end of a character.
        key: as for `encode_header`.

    Raises:
        ValueError: a code that may not be sent (§7.4), or a reason without a code.
    """
    if code is None:
        if reason:
            raise ValueError("a close frame has no reason without a code")
        return encode_frame(Opcode.CLOSE, b"", key=key)
    if not _is_sendable(code):
        raise ValueError(f"close code {code} may not be sent")
    # A reason may quote a file name with surrogate escapes: an error message must not fail over that.
    text = reason.encode("utf-8", "replace")
    if len(text) > _CLOSE_REASON_BYTES:
        text = text[:_CLOSE_REASON_BYTES].decode("utf-8", "ignore").encode()
    return encode_frame(Opcode.CLOSE, _U16.pack(code) + text, key=key)


# --- frames in ------------------------------------------------------------------------------------------------------


def parse_close(payload: Bytes) -> tuple[int, str]:
    """The code and the reason in the payload of a Close frame; 1005 (RFC 6455 §7.1.5) and "" if it is empty.

    Raises:
        ProtocolError: 1 byte, or a code that may not be sent (1002); a reason that is not UTF-8 (1007).
    """
    if not payload:
        return _NO_STATUS, ""
    if len(payload) == 1:
        # §5.5.1: "the first two bytes of the body MUST be a 2-byte unsigned integer".
        raise ProtocolError("close frame with 1 byte of payload: expected none, or a code of 2 bytes")
    (code,) = _U16.unpack_from(payload)
    if not _is_sendable(code):
        raise ProtocolError(f"close frame with code {code}, which may not be sent")
    try:
        # §5.5.1: "the body MAY contain UTF-8-encoded data with value /reason/".
        return code, str(payload[2:], "utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("close frame with a reason that is not UTF-8", CloseCode.INVALID_DATA) from None


def _is_sendable(code: int) -> bool:
    """Whether a close code may stand in a Close frame (§7.4)."""
    return any(code in codes for codes in _SENDABLE_CLOSE_CODES)


class FrameDecoder:
    """Turns the bytes of one direction of a WebSocket connection into pieces of messages.

    Feed it all that comes after the HTTP head, in any split. After the peer's Close frame, and after an error, whatever
    else arrives is ignored.

    Args:
        masked: the peer is a client, so that its frames MUST be masked; `False`: it is a server, and they MUST NOT be.
    """

    __slots__ = (
        "_closed",
        "_control",
        "_ended",
        "_fin",
        "_head",
        "_in_frame",
        "_key",
        "_left",
        "_masked",
        "_message",
        "_opcode",
        "_utf8",
    )

    def __init__(self, *, masked: bool) -> None:
        self._masked = masked
        self._closed = False
        self._ended = False  # closed, or failed
        self._head = b""  # of a header that has not arrived whole: at most 13 bytes
        self._message: Opcode | None = None  # opcode of the fragmented message that is open
        # The frame whose header has arrived, but not all of its payload:
        self._in_frame = False
        self._opcode = Opcode.CONTINUATION  # of the message, if it is a data frame
        self._fin = False
        self._left = 0  # bytes of payload still to come
        self._key = b""  # rotated so that it begins at the next byte
        self._control = bytearray()  # payload of a control frame so far
        # §8.1. Strict: surrogates, overlong forms and code points above U+10FFFF fail.
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    @property
    def closed(self) -> bool:
        """Whether the peer's Close frame was decoded."""
        return self._closed

    def whole(self, data: memoryview) -> bytes | memoryview | None:
        """The payload, if `data` is one whole BINARY frame of less than 64 KiB and nothing else; else None.

        What an interactive stream sends, without the cost of a generator. After None nothing has been decoded: `feed`.
        """
        size = len(data)
        if size < 2 or data[0] != _BINARY_FIN:
            return None
        if self._in_frame or self._head or self._message is not None or self._ended:
            return None
        start = 6 if self._masked else 2
        length = data[1] - _MASK if self._masked else data[1]
        if length == _LENGTH_16 and size > 4:
            length = data[2] << 8 | data[3]
            if length < _LENGTH_16:
                return None
            start += 2
        elif not 0 <= length < _LENGTH_16:
            return None
        if start + length != size:
            return None
        return apply_mask(data[start:], _KEY.unpack_from(data, start - 4)[0]) if self._masked else data[start:]

    def pair(self, data: memoryview) -> tuple[int, bytes] | None:
        """The opcode and the text, if `data` is what `encode_pair` makes, from first to last byte; else None.

        Nothing has been decoded either way: the text is not yet known to be UTF-8, and `feed` is still to be called
        unless the caller makes do with this.
        """
        if self._in_frame or self._head or self._message is not None or self._ended:
            return None
        size = len(data)
        start = 12 if self._masked else 4
        if not start <= size < start + _LENGTH_16:
            return None
        first = data[0]
        if first not in _PING_OR_PONG:
            return None
        text = start >> 1  # two frames with headers of the same size, the first of them empty
        mask = _MASK if self._masked else 0
        if data[1] != mask or data[text] != _TEXT_FIN or data[text + 1] != mask | size - start:
            return None
        payload = data[start:]
        return first & _OPCODE, apply_mask(payload, bytes(data[start - 4 : start])) if mask else bytes(payload)

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[Opcode, bytes | memoryview, bool]]:
        """Decode what has arrived.

        A generator, to be run to its end before the next call. Nothing is decoded before it is asked for.

        Args:
            data: any number of bytes. They must not change until the generator has ended.

        Yields:
            `(opcode, payload, end_of_message)`. For data the opcode is that of the message (TEXT or BINARY, in
            continuation frames too), the payload is the part that is here, unmasked, and `end_of_message` is `True`
            on the last piece of the last frame. A piece is empty only if it is the last. It may be a view into
            `data`, good until the generator goes on. PING, PONG and CLOSE come whole, with `True`, also between the
            pieces of a message; what CLOSE carries is valid for `parse_close`.

        Raises:
            ProtocolError: the peer broke RFC 6455. All that is right before it was yielded; `code` is 1007 for TEXT
                that is not UTF-8 (raised at the first byte that cannot be right; the piece around it is not yielded)
                and 1002 for all else. The caller must fail the connection (§7.1.7): send a Close with the code, close.
        """
        if self._ended:
            # §5.5.1: after a Close frame no data may be sent, and §7.1.7: a failed connection is not processed further.
            return
        view = memoryview(data)
        end = len(view)
        position = self._finish_header(view) if self._head else 0
        text, binary, unpack_16, unpack_key, unmask = _TEXT, _BINARY, _U16.unpack_from, _KEY.unpack_from, apply_mask
        key_bytes = _KEY_BYTES if self._masked else 0
        # The first two bytes of a final BINARY frame, masked as it must be, less its 7-bit length.
        fast = (_FIN | binary) << 8 | (_MASK if key_bytes else 0)
        while True:
            if not self._in_frame:
                # The fast path: whole messages in one frame, all of it here, BINARY or ASCII. All else: the long way.
                while end - position >= 2 + key_bytes and self._message is None:
                    length = unpack_16(view, position)[0] - fast
                    opcode = binary
                    if length < 0:
                        opcode = text  # whose number is the one before
                        length += 1 << 8
                    if 0 <= length < _LENGTH_16:
                        start = position + 2 + key_bytes
                    elif length == _LENGTH_16 and end - position > _LENGTH_16:
                        length = unpack_16(view, position + 2)[0]
                        start = position + 4 + key_bytes
                        if length < _LENGTH_16:
                            break
                    elif length == _LENGTH_64 and end - position >= 1 << 16:
                        length = _U64.unpack_from(view, position + 2)[0]
                        start = position + 10 + key_bytes
                        if length < 1 << 16:
                            break
                    else:
                        break
                    stop = start + length
                    if stop > end:
                        break
                    payload: bytes | memoryview = view[start:stop]
                    if key_bytes:
                        payload = unmask(payload, unpack_key(view, start - key_bytes)[0])
                    if opcode is text and not bytes(payload).isascii():
                        break
                    position = stop
                    yield opcode, payload, True
                if position == end:
                    return
                position = self._begin_header(view, position)
                if not self._in_frame:
                    return
            stop = min(end, position + self._left)
            if position == stop and self._left:
                return
            piece = self._take(view[position:stop])
            position = stop
            if piece is not None:
                yield piece
                if self._ended:
                    return

    def _begin_header(self, view: memoryview, position: int) -> int:
        """Read the header that begins at `position`, or keep what there is of it. Returns the position after it."""
        size = self._read_header(view[position : position + _HEADER_BYTES])
        if not size:
            self._head = bytes(view[position:])
            return len(view)
        return position + size

    def _finish_header(self, view: memoryview) -> int:
        """Read the header whose first bytes came earlier. Returns the position in `view` after it."""
        known = len(self._head)
        head = self._head + view[: _HEADER_BYTES - known]
        size = self._read_header(memoryview(head))
        if not size:
            self._head = head
            return len(view)
        self._head = b""
        return size - known

    def _read_header(self, head: memoryview) -> int:
        """Begin the frame whose header `head` starts with. Returns the header's bytes, 0 if some are missing."""
        if len(head) < 2:
            return 0
        first, second = head[0], head[1]
        opcode = self._check_header(first, second)
        length = second & _LENGTH
        size = 2
        if length >= _LENGTH_16:
            size, unpack = (4, _U16) if length == _LENGTH_16 else (10, _U64)
            if len(head) < size:
                return 0
            (length,) = unpack.unpack_from(head, 2)
            if length >> 63:
                # §5.2: "the most significant bit MUST be 0".
                raise self._failure("frame length of 2^63 bytes or more")
            if length < (_LENGTH_16 if size == 4 else 1 << 16):
                # §5.2: "the minimal number of bytes MUST be used to encode the length".
                raise self._failure(f"frame length {length} not encoded in the fewest bytes")
        if self._masked:
            if len(head) < size + _KEY_BYTES:
                return 0
            self._key = bytes(head[size : size + _KEY_BYTES])
            size += _KEY_BYTES
        self._opcode = opcode
        self._fin = first >= _FIN
        self._left = length
        self._in_frame = True
        return size

    def _check_header(self, first: int, second: int) -> Opcode:
        """Raise `ProtocolError` unless a frame may begin with these two bytes here. Returns its message's opcode."""
        if first & _RESERVED:
            # §5.2: RSV1 to RSV3 "MUST be 0 unless an extension is negotiated that defines meanings for" other values.
            raise self._failure("reserved bits are set, but no extension was negotiated")
        opcode = _OPCODES.get(first & _OPCODE)
        if opcode is None:
            # §5.2: "If an unknown opcode is received, the receiving endpoint MUST _Fail the WebSocket Connection_."
            raise self._failure(f"reserved opcode {first & _OPCODE}")
        if (second >= _MASK) is not self._masked:
            # §5.1: "The server MUST close the connection upon receiving a frame that is not masked."
            # §5.1: "A client MUST close a connection if it detects a masked frame."
            raise self._failure(f"frame from a {'client is not' if self._masked else 'server is'} masked")
        if opcode >= _CONTROL:
            # §5.5: control frames "MUST have a payload length of 125 bytes or less and MUST NOT be fragmented".
            if first < _FIN:
                raise self._failure("fragmented control frame")
            if second & _LENGTH > limits.CONTROL_PAYLOAD_BYTES:
                raise self._failure("control frame with more than 125 bytes of payload")
            return opcode
        if not opcode:
            # §5.4: a fragmented message begins with "a single frame with the FIN bit clear and an opcode other than 0".
            if self._message is None:
                raise self._failure("continuation frame, but no message is open")
            return self._message
        if self._message is not None:
            # §5.4: "The fragments of one message MUST NOT be interleaved between the fragments of another message".
            raise self._failure("new message begun before the fragmented one has ended")
        return opcode

    def _take(self, piece: memoryview) -> tuple[Opcode, bytes | memoryview, bool] | None:
        """The next bytes of the frame's payload. Returns what to yield, if anything."""
        size = len(piece)
        self._left -= size
        last = not self._left
        self._in_frame = not last
        opcode = self._opcode
        payload: bytes | memoryview = piece
        if self._masked:
            payload = apply_mask(piece, self._key)
            turn = size % _KEY_BYTES
            self._key = self._key[turn:] + self._key[:turn]
        if opcode >= _CONTROL:
            return self._take_control(payload, last)
        end_of_message = last and self._fin
        if opcode is _TEXT and not self._goes_on_as_utf8(payload, end_of_message):
            # §8.1: "When an endpoint is to interpret a byte stream as UTF-8 but finds that the byte stream is not, in
            # fact, a valid UTF-8 stream, that endpoint MUST _Fail the WebSocket Connection_."
            raise self._failure("text message is not valid UTF-8", CloseCode.INVALID_DATA)
        if last:
            self._message = None if self._fin else opcode
        return (opcode, payload, end_of_message) if size or end_of_message else None

    def _goes_on_as_utf8(self, payload: bytes | memoryview, end_of_message: bool) -> bool:
        """Whether the open text message may go on with `payload`, and end there if it does."""
        try:
            self._utf8.decode(payload, end_of_message)
        except UnicodeDecodeError:
            return False
        # A fragment may end within a character (§5.6: only "the whole message MUST contain valid UTF-8"). Python then
        # waits for the third byte of what can only be a surrogate, which RFC 3629 §3 prohibits.
        kept = b"" if end_of_message else self._utf8.getstate()[0]
        return not (kept[:1] == b"\xed" and kept[1:] >= b"\xa0")

    def _take_control(self, payload: bytes | memoryview, last: bool) -> tuple[Opcode, bytes, bool] | None:
        """The next bytes of a control frame. Returns the whole of it once it is there."""
        self._control += payload
        if not last:
            return None
        whole = bytes(self._control)
        self._control.clear()
        if self._opcode is Opcode.CLOSE:
            self._ended = True
            parse_close(whole)
            self._closed = True
        return self._opcode, whole, True

    def _failure(self, message: str, code: CloseCode = CloseCode.PROTOCOL_ERROR) -> ProtocolError:
        """The error to raise. From here on nothing is decoded."""
        self._ended = True
        return ProtocolError(message, code)
