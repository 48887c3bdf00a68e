"""wire/frames.py: every branch, every split, and the `websockets` library as oracle for both roles."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import websockets.frames as oracle
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from websockets.protocol import CLIENT, SERVER, Protocol

from wstunnel.errors import ProtocolError
from wstunnel.wire.frames import (
    CloseCode,
    FrameDecoder,
    MaskKeys,
    Opcode,
    apply_mask_python,
    encode_close,
    encode_frame,
    encode_header,
    encode_pair,
    parse_close,
)

KEY = bytes.fromhex("37fa213d")
BOTH_ROLES = pytest.mark.parametrize("masked", [True, False], ids=["from-client", "from-server"])
EVERY_CODE = range(1 << 16)
VALID_CODES = {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)}
reproducible = settings(derandomize=True, deadline=None)

Piece = tuple[int, bytes, bool]


def encode(opcode: int, payload: bytes = b"", *, masked: bool, fin: bool = True) -> bytes:
    return encode_frame(opcode, payload, fin=fin, key=KEY if masked else None)


def raw(first: int, length: bytes, payload: bytes = b"", *, masked: bool) -> bytes:
    """A frame with header bytes as given, legal or not; `length` holds all of the length's bytes."""
    if not masked:
        return bytes([first]) + length + payload
    return bytes([first, length[0] | 0x80]) + length[1:] + KEY + apply_mask_python(payload, KEY)


def decode(decoder: FrameDecoder, *chunks: bytes) -> list[Piece]:
    return [(opcode, bytes(payload), end) for chunk in chunks for opcode, payload, end in decoder.feed(chunk)]


def whole(pieces: list[Piece]) -> list[tuple[int, bytes]]:
    """What the pieces add up to: control frames and whole messages, in the order in which they ended."""
    units: list[tuple[int, bytes]] = []
    opcode, payload = None, b""
    for piece_opcode, piece, end in pieces:
        if piece_opcode >= Opcode.CLOSE:
            assert end
            units.append((piece_opcode, piece))
            continue
        assert opcode in {None, piece_opcode}
        assert piece or end, "an empty piece that says nothing"
        opcode, payload = piece_opcode, payload + piece
        if end:
            units.append((opcode, payload))
            opcode, payload = None, b""
    return units


def one_by_one(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


def drain(decoder: FrameDecoder, chunks: list[bytes]) -> tuple[list[tuple[int, bytes]], ProtocolError | None]:
    """Everything that `chunks` yield as whole units, and the error that ended it."""
    pieces: list[Piece] = []
    try:
        for chunk in chunks:
            for opcode, payload, end in decoder.feed(chunk):
                pieces.append((opcode, bytes(payload), end))
    except ProtocolError as error:
        return whole(pieces), error
    return whole(pieces), None


@dataclass(frozen=True)
class Frame:
    opcode: int
    payload: bytes
    fin: bool = True


@st.composite
def traffic(draw: st.DrawFn) -> tuple[list[Frame], list[tuple[int, bytes]]]:
    """Frames that a peer may send, and what they add up to: fragmented messages with control frames in between."""
    sizes = st.one_of(st.integers(0, 20), st.sampled_from([125, 126, 127, 65535, 65536]))
    control = st.builds(Frame, st.sampled_from([Opcode.PING, Opcode.PONG]), st.binary(max_size=125))
    sent: list[Frame] = []
    expected: list[tuple[int, bytes]] = []

    def maybe_control() -> None:
        for frame in draw(st.lists(control, max_size=1)):
            sent.append(frame)
            expected.append((frame.opcode, frame.payload))

    for _ in range(draw(st.integers(0, 5))):
        maybe_control()
        if draw(st.booleans()):
            opcode: int = Opcode.TEXT
            message = draw(st.text(max_size=40)).encode()
        else:
            opcode = Opcode.BINARY
            size = draw(sizes)
            message = (draw(st.binary(min_size=1, max_size=9)) * size)[:size]
        cuts = sorted(draw(st.lists(st.integers(0, len(message)), max_size=3)))
        bounds = [0, *cuts, len(message)]
        for index, (start, stop) in enumerate(pairwise(bounds)):
            if index:
                maybe_control()
            fin = index == len(bounds) - 2
            sent.append(Frame(opcode if index == 0 else Opcode.CONTINUATION, message[start:stop], fin))
        expected.append((opcode, message))
    if draw(st.booleans()):
        payload = draw(st.sampled_from([b"", b"\x03\xe8", struct.pack("!H", 4999) + "fertig ✓".encode()]))
        sent.append(Frame(Opcode.CLOSE, payload))
        expected.append((Opcode.CLOSE, payload))
    return sent, expected


def split(data: bytes, draw: st.DataObject) -> list[bytes]:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=12), "cuts"))
    bounds = [0, *cuts, len(data)]
    return [data[start:stop] for start, stop in pairwise(bounds)]


class TestSection52Header:
    @pytest.mark.parametrize(
        ("length", "header"),
        [
            (0, "8200"),
            (125, "827d"),
            (126, "827e007e"),
            (65535, "827effff"),
            (65536, "827f0000000000010000"),
            ((1 << 63) - 1, "827f7fffffffffffffff"),
        ],
    )
    def test_the_length_takes_the_fewest_bytes(self, length: int, header: str) -> None:
        expected = bytes.fromhex(header)
        assert encode_header(Opcode.BINARY, length) == expected
        masked = bytearray(expected) + KEY
        masked[1] |= 0x80
        assert encode_header(Opcode.BINARY, length, key=KEY) == masked

    def test_a_fragment_that_is_not_the_last_has_no_fin(self) -> None:
        assert encode_header(Opcode.TEXT, 3, fin=False) == b"\x01\x03"
        assert encode_header(Opcode.CONTINUATION, 3, fin=False) == b"\x00\x03"
        assert encode_header(Opcode.CONTINUATION, 3) == b"\x80\x03"

    @pytest.mark.parametrize("opcode", [Opcode.CLOSE, Opcode.PING, Opcode.PONG])
    def test_control_frames_are_short_and_whole(self, opcode: Opcode) -> None:
        assert len(encode_frame(opcode, bytes(125))) == 127
        with pytest.raises(ValueError, match="control frame"):
            encode_header(opcode, 126)
        with pytest.raises(ValueError, match="control frame"):
            encode_header(opcode, 0, fin=False)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_the_examples_of_section_5_7(self, kind: type) -> None:
        assert encode_frame(Opcode.TEXT, kind(b"Hello")) == bytes.fromhex("810548656c6c6f")
        assert encode_frame(Opcode.TEXT, kind(b"Hello"), key=KEY) == bytes.fromhex("818537fa213d7f9f4d5158")
        assert encode_frame(Opcode.TEXT, kind(b"Hel"), fin=False) == bytes.fromhex("010348656c")
        assert encode_frame(Opcode.CONTINUATION, kind(b"lo")) == bytes.fromhex("80026c6f")
        assert encode_frame(Opcode.PING, kind(b"Hello")) == bytes.fromhex("890548656c6c6f")
        assert encode_frame(Opcode.BINARY, kind(bytes(256))) == bytes.fromhex("827e0100") + bytes(256)
        assert encode_frame(Opcode.BINARY, kind(bytes(65536))) == bytes.fromhex("827f0000000000010000") + bytes(65536)


class TestSection551Close:
    @pytest.mark.parametrize("key", [None, KEY])
    def test_what_is_encoded_is_decoded(self, key: bytes | None) -> None:
        for code in [*CloseCode, 1014, 3000, 4999]:
            decoder = FrameDecoder(masked=key is not None)
            ((opcode, payload, end),) = decode(decoder, encode_close(code, "größer", key=key))
            assert (opcode, end) == (Opcode.CLOSE, True)
            assert parse_close(payload) == (code, "größer")
            assert decoder.closed

    def test_no_code(self) -> None:
        assert encode_close(None) == b"\x88\x00"
        assert encode_close(None, key=KEY) == b"\x88\x80" + KEY
        assert parse_close(b"") == (1005, "")
        with pytest.raises(ValueError, match="reason without a code"):
            encode_close(None, "why")

    def test_which_codes_may_be_sent(self) -> None:
        sendable = set()
        for code in EVERY_CODE:
            try:
                encode_close(code)
            except ValueError as error:
                assert str(code) in str(error)
            else:
                sendable.add(code)
        assert sendable == VALID_CODES

    def test_which_codes_may_be_received(self) -> None:
        received = set()
        for code in EVERY_CODE:
            try:
                assert parse_close(struct.pack("!H", code)) == (code, "")
            except ProtocolError as error:
                assert error.code == 1002
                assert str(code) in str(error)
            else:
                received.add(code)
        assert received == VALID_CODES

    @pytest.mark.parametrize("code", [-1, 0, 65536, 1 << 20])
    def test_numbers_that_are_no_codes(self, code: int) -> None:
        with pytest.raises(ValueError, match="may not be sent"):
            encode_close(code)

    @pytest.mark.parametrize(
        ("reason", "sent"),
        [
            ("x" * 123, "x" * 123),
            ("x" * 124, "x" * 123),
            ("x" * 122 + "é", "x" * 122),
            ("x" * 121 + "é" + "y", "x" * 121 + "é"),
            ("x" * 120 + "😀", "x" * 120),
            ("x" * 119 + "😀😀", "x" * 119 + "😀"),
            ("file \udcff", "file ?"),
        ],
    )
    def test_a_long_reason_is_cut_after_a_whole_character(self, reason: str, sent: str) -> None:
        frame = encode_close(1002, reason)
        assert len(frame) <= 127
        assert parse_close(frame[2:]) == (1002, sent)

    def test_wrong_payloads(self) -> None:
        with pytest.raises(ProtocolError, match="1 byte") as caught:
            parse_close(b"\x03")
        assert caught.value.code == 1002
        with pytest.raises(ProtocolError, match="UTF-8") as caught:
            parse_close(b"\x03\xe8\xc3")
        assert caught.value.code == 1007

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_any_buffer_is_parsed(self, kind: type) -> None:
        assert parse_close(kind(b"\x03\xe8bye")) == (1000, "bye")

    @BOTH_ROLES
    def test_nothing_is_decoded_after_it(self, masked: bool) -> None:
        decoder = FrameDecoder(masked=masked)
        ping = encode(Opcode.PING, b"p", masked=masked)
        close = encode(Opcode.CLOSE, b"\x03\xe8", masked=masked)
        assert not decoder.closed
        assert decode(decoder, ping + close + ping + b"\xff\xff garbage", ping, b"\xff") == [
            (Opcode.PING, b"p", True),
            (Opcode.CLOSE, b"\x03\xe8", True),
        ]
        assert decoder.closed

    @BOTH_ROLES
    def test_inside_a_fragmented_message(self, masked: bool) -> None:
        decoder = FrameDecoder(masked=masked)
        start = encode(Opcode.BINARY, b"abc", masked=masked, fin=False)
        assert decode(decoder, start + encode(Opcode.CLOSE, masked=masked)) == [
            (Opcode.BINARY, b"abc", False),
            (Opcode.CLOSE, b"", True),
        ]
        assert decoder.closed


LENGTHS = [0, 1, 2, 124, 125, 126, 127, 128, 65534, 65535, 65536, 65537, 200_000]


class TestStreaming:
    @BOTH_ROLES
    @pytest.mark.parametrize("length", LENGTHS)
    def test_whole_messages_with_something_behind(self, masked: bool, length: int) -> None:
        payload = bytes(index & 0xFF for index in range(length))
        data = encode(Opcode.BINARY, payload, masked=masked)
        tail = encode(Opcode.PING, masked=masked)
        expected = [(Opcode.BINARY, payload, True)]
        assert decode(FrameDecoder(masked=masked), data) == expected
        assert decode(FrameDecoder(masked=masked), data * 3) == expected * 3
        assert decode(FrameDecoder(masked=masked), data + tail) == [*expected, (Opcode.PING, b"", True)]

    @BOTH_ROLES
    @pytest.mark.parametrize("length", LENGTHS)
    def test_cut_in_two_anywhere(self, masked: bool, length: int) -> None:
        payload = bytes(index & 0xFF for index in range(length))
        data = encode(Opcode.BINARY, payload, masked=masked)
        cuts = range(len(data) + 1) if length < 200 else [*range(20), 126, 127, 140, 65536, len(data) - 1]
        for cut in cuts:
            pieces = decode(FrameDecoder(masked=masked), data[:cut], data[cut:])
            assert whole(pieces) == [(Opcode.BINARY, payload)], cut
            assert len(pieces) <= 2

    @BOTH_ROLES
    def test_the_payload_goes_on_as_it_arrives(self, masked: bool) -> None:
        """A frame of 2^62 bytes is no problem: it is never gathered."""
        decoder = FrameDecoder(masked=masked)
        header = encode_header(Opcode.BINARY, 1 << 62, key=KEY if masked else None)
        assert decode(decoder, header) == []
        sent = b""
        for chunk in [b"a", b"bcd", b"efghi", b"", b"jklmnopqrs", bytes(70_000)]:
            key = KEY[len(sent) % 4 :] + KEY[: len(sent) % 4]
            wire = apply_mask_python(chunk, key) if masked else chunk
            assert decode(decoder, wire) == ([(Opcode.BINARY, chunk, False)] if chunk else [])
            sent += chunk

    def test_unmasked_payload_is_a_view_not_a_copy(self) -> None:
        buffer = bytearray(encode_frame(Opcode.BINARY, b"whole") + encode_frame(Opcode.BINARY, b"cut")[:-1])
        seen = []
        for _, payload, end in FrameDecoder(masked=False).feed(memoryview(buffer)):
            assert isinstance(payload, memoryview)
            assert payload.obj is buffer
            seen.append((bytes(payload), end))
        assert seen == [(b"whole", True), (b"cu", False)]

    @BOTH_ROLES
    def test_opcodes_are_opcodes(self, masked: bool) -> None:
        data = b"".join(
            encode(opcode, masked=masked) for opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.PONG, Opcode.CLOSE)
        )
        seen = [opcode for opcode, _, _ in FrameDecoder(masked=masked).feed(data)]
        assert all(isinstance(opcode, Opcode) for opcode in seen)
        assert seen == [Opcode.TEXT, Opcode.BINARY, Opcode.PONG, Opcode.CLOSE]

    @BOTH_ROLES
    def test_empty_input(self, masked: bool) -> None:
        decoder = FrameDecoder(masked=masked)
        assert decode(decoder, b"", b"") == []
        data = encode(Opcode.BINARY, b"x", masked=masked)
        assert whole(decode(decoder, data[:1], b"", data[1:-1], b"", data[-1:], b"")) == [(Opcode.BINARY, b"x")]

    @given(traffic(), st.booleans(), st.data())
    @reproducible
    def test_any_traffic_in_any_split(
        self, sent: tuple[list[Frame], list[tuple[int, bytes]]], masked: bool, data: st.DataObject
    ) -> None:
        wire = b"".join(encode(f.opcode, f.payload, masked=masked, fin=f.fin) for f in sent[0])
        assert whole(decode(FrameDecoder(masked=masked), wire)) == sent[1]
        assert whole(decode(FrameDecoder(masked=masked), *split(wire, data))) == sent[1]
        if len(wire) < 2000:
            assert whole(decode(FrameDecoder(masked=masked), *one_by_one(wire))) == sent[1]


class TestWhole:
    """One BINARY frame and nothing else, in a short cut: `feed` is the oracle."""

    @BOTH_ROLES
    @pytest.mark.parametrize("length", [*range(130), 255, 256, 1024, (1 << 16) - 1])
    def test_every_length(self, masked: bool, length: int) -> None:
        payload = bytes(i % 251 for i in range(length))
        got = FrameDecoder(masked=masked).whole(memoryview(encode(Opcode.BINARY, payload, masked=masked)))
        assert got is not None
        assert bytes(got) == payload

    @BOTH_ROLES
    def test_nothing_else(self, masked: bool) -> None:
        short = encode(Opcode.BINARY, b"x" * 9, masked=masked)
        wrong = [
            *(short[:size] for size in range(len(short))),
            short + b"\x82",
            short + short,
            *(encode(Opcode.BINARY, bytes(200), masked=masked)[:size] for size in range(207 if masked else 203)),
            encode(Opcode.BINARY, bytes(200), masked=masked) + b"\x82",
            encode(Opcode.BINARY, bytes(1 << 16), masked=masked),
            encode(Opcode.BINARY, b"x" * 9, masked=masked, fin=False),
            encode(Opcode.BINARY, b"x" * 9, masked=not masked),
            *(encode(opcode, b"x" * 9, masked=masked) for opcode in Opcode if opcode is not Opcode.BINARY),
            *(bytes([short[0] | reserved]) + short[1:] for reserved in (0x40, 0x20, 0x10)),
            raw(0x82, b"\x7e\x00\x09", b"x" * 9, masked=masked),  # a length that is not in the fewest bytes
            *(
                bytes([0x82, second]) + b"abc"[:size]
                for second in range(256)
                for size in range(4)
                if masked or second != size
            ),
        ]
        for data in wrong:
            assert FrameDecoder(masked=masked).whole(memoryview(data)) is None

    @BOTH_ROLES
    @pytest.mark.parametrize(
        "before",
        ["header", "payload", "fragment", "close", "error"],
    )
    def test_only_between_messages(self, masked: bool, before: str) -> None:
        short = encode(Opcode.BINARY, b"abc", masked=masked)
        begun = {
            "header": short[:1],
            "payload": short[:-1],
            "fragment": encode(Opcode.TEXT, b"abc", masked=masked, fin=False),
            "close": encode(Opcode.CLOSE, masked=masked),
            "error": b"\xff\xff",
        }[before]
        decoder = FrameDecoder(masked=masked)
        drain(decoder, [begun])
        assert decoder.whole(memoryview(short)) is None

    @given(
        st.booleans(),
        traffic(),
        st.one_of(st.none(), st.integers(0, 200)),
        st.data(),
    )
    @reproducible
    def test_as_feed_or_not_at_all(
        self,
        masked: bool,
        sent: tuple[list[Frame], list[tuple[int, bytes]]],
        cut: int | None,
        data: st.DataObject,
    ) -> None:
        """After any traffic, whole or cut anywhere, and whatever comes behind."""
        wire = b"".join(encode(f.opcode, f.payload, masked=masked, fin=f.fin) for f in sent[0])
        wire = wire[:cut]
        payload = data.draw(st.binary(max_size=140)) * data.draw(st.sampled_from([1, 1, 10]))
        frame = bytearray(encode(Opcode.BINARY, payload, masked=masked))
        frame[0] = data.draw(st.sampled_from([0x82, 0x82, 0x82, 0x02, 0xC2, 0x80, 0x81, 0x89]))
        piece = bytes(frame) + data.draw(st.sampled_from([b"", b"", b"\x82", encode(Opcode.PING, masked=masked)]))
        one, other = FrameDecoder(masked=masked), FrameDecoder(masked=masked)
        assert drain(one, [wire])[0] == drain(other, [wire])[0]
        got = one.whole(memoryview(piece))
        if got is not None:
            assert drain(other, [piece]) == ([(Opcode.BINARY, bytes(got))], None)
        rest = [encode(Opcode.PONG, b"p", masked=masked), encode(Opcode.BINARY, b"next", masked=masked)]
        rest = rest if got is not None else [piece, *rest]
        (units, error), (expected, oracle_error) = drain(one, rest), drain(other, rest)
        assert units == expected
        assert str(error) == str(oracle_error)


class TestSection54Fragmentation:
    @BOTH_ROLES
    @pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY])
    def test_continuations_carry_the_opcode_of_their_message(self, masked: bool, opcode: Opcode) -> None:
        data = (
            encode(opcode, b"ab", masked=masked, fin=False)
            + encode(Opcode.CONTINUATION, b"cd", masked=masked, fin=False)
            + encode(Opcode.PING, b"now", masked=masked)
            + encode(Opcode.CONTINUATION, b"ef", masked=masked)
            + encode(Opcode.BINARY, b"next", masked=masked)
        )
        assert decode(FrameDecoder(masked=masked), data) == [
            (opcode, b"ab", False),
            (opcode, b"cd", False),
            (Opcode.PING, b"now", True),
            (opcode, b"ef", True),
            (Opcode.BINARY, b"next", True),
        ]

    @BOTH_ROLES
    @pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY])
    def test_empty_fragments(self, masked: bool, opcode: Opcode) -> None:
        """Only the last says something: that the message has ended."""
        data = (
            encode(opcode, b"", masked=masked, fin=False)
            + encode(Opcode.CONTINUATION, b"", masked=masked, fin=False)
            + encode(Opcode.CONTINUATION, b"x", masked=masked, fin=False)
            + encode(Opcode.CONTINUATION, b"", masked=masked)
            + encode(opcode, b"", masked=masked)
        )
        expected = [(opcode, b"x", False), (opcode, b"", True), (opcode, b"", True)]
        assert decode(FrameDecoder(masked=masked), data) == expected
        assert decode(FrameDecoder(masked=masked), *one_by_one(data)) == expected


def bad_frames() -> list[tuple[str, int, bytes, bytes, str]]:
    """(name, first byte, length bytes, payload, message) of frames that are wrong wherever no message is open."""
    cases: list[tuple[str, int, bytes, bytes, str]] = [
        ("rsv1", 0xC2, b"\x00", b"", "reserved bits"),
        ("rsv2", 0xA2, b"\x00", b"", "reserved bits"),
        ("rsv3", 0x92, b"\x00", b"", "reserved bits"),
        ("rsv in ping", 0xD9, b"\x00", b"", "reserved bits"),
        ("continuation", 0x80, b"\x01", b"x", "no message is open"),
        ("continuation, more to come", 0x00, b"\x01", b"x", "no message is open"),
        ("16-bit length of 0", 0x82, b"\x7e\x00\x00", b"", "length 0 not encoded in the fewest"),
        ("16-bit length of 125", 0x82, b"\x7e\x00\x7d", bytes(125), "length 125 not encoded in the fewest"),
        ("64-bit length of 0", 0x82, b"\x7f" + bytes(8), b"", "length 0 not encoded in the fewest"),
        ("64-bit length of 126", 0x82, b"\x7f" + bytes(7) + b"\x7e", bytes(126), "length 126 not encoded"),
        ("64-bit length of 65535", 0x82, b"\x7f" + bytes(6) + b"\xff\xff", bytes(65535), "length 65535 not encoded"),
        ("64-bit length with its top bit", 0x82, b"\x7f\x80" + bytes(7), b"", r"2\^63"),
        ("text, 64-bit length with its top bit", 0x81, b"\x7f" + b"\xff" * 8, b"", r"2\^63"),
        ("close of 1 byte", 0x88, b"\x01", b"\x03", "1 byte of payload"),
        ("close with 1006", 0x88, b"\x02", b"\x03\xee", "code 1006"),
        ("close with 0", 0x88, b"\x02", b"\x00\x00", "code 0"),
    ]
    for code in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        cases.append((f"opcode {code}", 0x80 | code, b"\x00", b"", f"reserved opcode {code}"))
        cases.append((f"opcode {code}, no fin", code, b"\x00", b"", f"reserved opcode {code}"))
    for code in (8, 9, 10):
        cases.append((f"control {code} fragmented", code, b"\x00", b"", "fragmented control"))
        cases.append((f"control {code} of 126", 0x80 | code, b"\x7e\x00\x7e", bytes(126), "more than 125"))
        cases.append((f"control {code} of 65536", 0x80 | code, b"\x7f" + bytes(5) + b"\x01\0\0", b"", "more than 125"))
    return cases


BAD = bad_frames()


class TestErrors:
    @staticmethod
    def check(
        decoder: FrameDecoder, chunks: list[bytes], before: Sequence[tuple[int, bytes]], match: str, code: int
    ) -> None:
        units, error = drain(decoder, chunks)
        assert units == before
        assert error is not None, "accepted"
        assert re.search(match, str(error)), str(error)
        assert error.code == code
        assert not decoder.closed
        valid = encode(Opcode.PING, masked=True) + encode(Opcode.PING, masked=False)
        assert decode(decoder, valid) == [], "a failed connection is not processed further"

    @BOTH_ROLES
    @pytest.mark.parametrize(("first", "length", "payload", "match"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
    def test_wrong_frames(self, masked: bool, first: int, length: bytes, payload: bytes, match: str) -> None:
        bad = raw(first, length, payload, masked=masked)
        good = encode(Opcode.BINARY, b"good", masked=masked) + encode(Opcode.PING, b"p", masked=masked)
        before = [(Opcode.BINARY, b"good"), (Opcode.PING, b"p")]
        for prefix, units in ((b"", []), (good, before)):
            self.check(FrameDecoder(masked=masked), [prefix + bad], units, match, 1002)
            self.check(FrameDecoder(masked=masked), one_by_one(prefix + bad), units, match, 1002)
            self.check(FrameDecoder(masked=masked), [prefix + bad + good * 7000], units, match, 1002)

    @BOTH_ROLES
    def test_masked_when_it_must_not_be_and_the_other_way_round(self, masked: bool) -> None:
        match = "client is not masked" if masked else "server is masked"
        for opcode in Opcode:
            bad = encode(opcode, b"", masked=not masked)
            self.check(FrameDecoder(masked=masked), [bad], [], match, 1002)
            self.check(FrameDecoder(masked=masked), one_by_one(bad), [], match, 1002)
            good = encode(Opcode.BINARY, b"x" * 200, masked=masked)
            self.check(FrameDecoder(masked=masked), [good + bad + good], [(2, b"x" * 200)], match, 1002)

    @BOTH_ROLES
    @pytest.mark.parametrize("opcode", [Opcode.TEXT, Opcode.BINARY])
    @pytest.mark.parametrize("fin", [True, False])
    def test_a_new_message_inside_a_fragmented_one(self, masked: bool, opcode: Opcode, fin: bool) -> None:
        start = encode(Opcode.BINARY, b"ab", masked=masked, fin=False)
        bad = encode(opcode, b"cd", masked=masked, fin=fin)
        for chunks in ([start + bad + start], one_by_one(start + bad)):
            self.check(FrameDecoder(masked=masked), chunks, [], "before the fragmented one has ended", 1002)

    @BOTH_ROLES
    def test_a_continuation_after_the_message_has_ended(self, masked: bool) -> None:
        message = encode(Opcode.TEXT, b"a", masked=masked, fin=False) + encode(Opcode.CONTINUATION, b"b", masked=masked)
        bad = encode(Opcode.CONTINUATION, b"c", masked=masked)
        for chunks in ([message + bad], one_by_one(message + bad)):
            self.check(FrameDecoder(masked=masked), chunks, [(1, b"ab")], "no message is open", 1002)

    @BOTH_ROLES
    def test_a_close_reason_that_is_not_utf8(self, masked: bool) -> None:
        bad = encode(Opcode.CLOSE, b"\x03\xe8\xff", masked=masked)
        for chunks in ([bad], one_by_one(bad)):
            self.check(FrameDecoder(masked=masked), chunks, [], "reason that is not UTF-8", 1007)

    @BOTH_ROLES
    def test_wrong_headers_fail_before_their_payload(self, masked: bool) -> None:
        """The second byte is enough for what it says; the length is checked before any of it comes."""
        for bad in (b"\xc2\xff", b"\x83\x80", b"\x09\x80", b"\x89\xfe", b"\x80\x80"):
            header = bytes([bad[0], bad[1] if masked else bad[1] & 0x7F])
            assert drain(FrameDecoder(masked=masked), [header])[1] is not None
        mask = 0x80 if masked else 0
        assert drain(FrameDecoder(masked=masked), [bytes([0x82, mask | 126, 0, 125])])[1] is not None
        assert drain(FrameDecoder(masked=masked), [bytes([0x82, mask | 127, 0x80]) + bytes(7)])[1] is not None


class TestSection81Utf8:
    # RFC 3629 §4, as ranges of the second byte; the later ones are 80-BF.
    @staticmethod
    def may_begin(data: bytes) -> bool:
        """Whether `data` is the beginning of one UTF-8 character (or all of it), by the grammar of RFC 3629 §4."""
        tail = r"[\x80-\xBF]"
        grammar = [
            r"[\x00-\x7F]",
            r"[\xC2-\xDF]" + tail,
            r"\xE0[\xA0-\xBF]" + tail,
            r"[\xE1-\xEC\xEE\xEF]" + tail + tail,
            r"\xED[\x80-\x9F]" + tail,
            r"\xF0[\x90-\xBF]" + tail + tail,
            r"[\xF1-\xF3]" + tail + tail + tail,
            r"\xF4[\x80-\x8F]" + tail + tail,
        ]
        # The shortest way to ask for a prefix: complete it with tails that fit every second byte's range in turn.
        text = data.decode("latin-1")
        endings = ["", *(second + rest for second in "\x80\x90\xa0" for rest in ("", "\x80", "\x80\x80"))]
        return any(re.fullmatch(rule, text + ending, re.DOTALL) for rule in grammar for ending in endings)

    @BOTH_ROLES
    def test_fails_at_the_first_byte_that_cannot_be_right(self, masked: bool) -> None:
        bounds = bytes.fromhex("007f808f909fa0bfc0c1c2dfe0e1ecedeeeff0f1f3f4f5ff")
        header = encode_header(Opcode.TEXT, 8, key=bytes(4) if masked else None)

        def accepted(data: bytes) -> bool:
            return drain(FrameDecoder(masked=masked), [header, *one_by_one(data)])[1] is None

        def explore(prefix: bytes, choices: bytes) -> int:
            count = 0
            for octet in choices:
                data = prefix + bytes([octet])
                right = self.may_begin(data)
                assert accepted(data) is right, data.hex()
                assert (drain(FrameDecoder(masked=masked), [header + data])[1] is None) is right, data.hex()
                count += 1
                if right and len(data) < 4 and data[0] >= 0x80:
                    try:
                        data.decode()
                    except UnicodeDecodeError:
                        count += explore(data, bounds)
            return count

        assert explore(b"", bytes(range(256))) > 5000

    @BOTH_ROLES
    @pytest.mark.parametrize("text", [b"\xc3", b"a\xe2\x82", b"\xf0\x9f\x98"])
    def test_a_message_may_not_end_within_a_character(self, masked: bool, text: bytes) -> None:
        good = encode(Opcode.TEXT, "ok ✓".encode(), masked=masked)
        for bad in (
            encode(Opcode.TEXT, text, masked=masked),
            encode(Opcode.TEXT, text, masked=masked, fin=False) + encode(Opcode.CONTINUATION, masked=masked),
        ):
            for chunks in ([good + bad + good], one_by_one(good + bad)):
                units, error = drain(FrameDecoder(masked=masked), chunks)
                assert units == [(Opcode.TEXT, "ok ✓".encode())]
                assert error is not None
                assert error.code == 1007

    @BOTH_ROLES
    def test_a_fragment_may_end_within_a_character_and_control_frames_do_not_disturb(self, masked: bool) -> None:
        text = "é€😀".encode()
        parts = one_by_one(text)
        data = encode(Opcode.TEXT, b"", masked=masked, fin=False)
        for part in parts:
            data += encode(Opcode.CONTINUATION, part, masked=masked, fin=False)
            data += encode(Opcode.PING, b"\xff", masked=masked)
        data += encode(Opcode.CONTINUATION, masked=masked)
        units = whole(decode(FrameDecoder(masked=masked), data))
        assert units == [*[(Opcode.PING, b"\xff")] * len(parts), (Opcode.TEXT, text)]

    @BOTH_ROLES
    def test_each_message_is_checked_on_its_own(self, masked: bool) -> None:
        decoder = FrameDecoder(masked=masked)
        assert whole(decode(decoder, encode(Opcode.TEXT, b"\xc3\xa9", masked=masked) * 3)) == [(1, b"\xc3\xa9")] * 3
        with pytest.raises(ProtocolError, match="not valid UTF-8"):
            decode(decoder, encode(Opcode.TEXT, b"\xa9", masked=masked))

    @BOTH_ROLES
    def test_binary_is_not_checked(self, masked: bool) -> None:
        data = encode(Opcode.BINARY, b"\xff", masked=masked, fin=False) + encode(0, b"\xc0", masked=masked)
        assert whole(decode(FrameDecoder(masked=masked), data)) == [(Opcode.BINARY, b"\xff\xc0")]

    @BOTH_ROLES
    def test_fragments_before_the_bad_byte_were_yielded(self, masked: bool) -> None:
        data = encode(Opcode.TEXT, b"abc", masked=masked, fin=False) + encode(0, b"d\xff", masked=masked)
        seen = []
        with pytest.raises(ProtocolError) as caught:
            for opcode, payload, end in FrameDecoder(masked=masked).feed(data):
                seen.append((opcode, bytes(payload), end))
        assert seen == [(Opcode.TEXT, b"abc", False)]
        assert caught.value.code == 1007


class TestOracle:
    """The `websockets` library on the other side."""

    @given(traffic(), st.booleans(), st.data())
    @reproducible
    def test_we_decode_what_it_encodes(
        self, sent: tuple[list[Frame], list[tuple[int, bytes]]], masked: bool, data: st.DataObject
    ) -> None:
        peer = Protocol(CLIENT if masked else SERVER)
        for frame in sent[0]:
            match frame.opcode:
                case Opcode.CONTINUATION:
                    peer.send_continuation(frame.payload, frame.fin)
                case Opcode.TEXT:
                    peer.send_text(frame.payload, frame.fin)
                case Opcode.BINARY:
                    peer.send_binary(frame.payload, frame.fin)
                case Opcode.PING:
                    peer.send_ping(frame.payload)
                case Opcode.PONG:
                    peer.send_pong(frame.payload)
                case Opcode.CLOSE:
                    code, reason = parse_close(frame.payload)
                    peer.send_close(None if code == 1005 else code, reason)
        wire = b"".join(peer.data_to_send())
        assert whole(decode(FrameDecoder(masked=masked), *split(wire, data))) == sent[1]

    @given(traffic(), st.booleans(), st.binary(min_size=4, max_size=4), st.data())
    @reproducible
    def test_it_decodes_what_we_encode(
        self, sent: tuple[list[Frame], list[tuple[int, bytes]]], masked: bool, key: bytes, data: st.DataObject
    ) -> None:
        wire = b"".join(encode_frame(f.opcode, f.payload, fin=f.fin, key=key if masked else None) for f in sent[0])
        peer = Protocol(SERVER if masked else CLIENT)
        for chunk in split(wire, data):
            if chunk:
                peer.receive_data(chunk)
        assert peer.parser_exc is None
        events = [event for event in peer.events_received() if isinstance(event, oracle.Frame)]
        assert [Frame(int(e.opcode), bytes(e.data), e.fin) for e in events] == [
            Frame(int(f.opcode), f.payload, f.fin) for f in sent[0]
        ]

    @given(
        st.lists(
            st.tuples(
                st.one_of(st.integers(0, 255), st.sampled_from([0x00, 0x02, 0x80, 0x82, 0x88, 0x89, 0x8A])),
                st.one_of(
                    st.binary(max_size=8), st.sampled_from([b"\x03\xe8", b"\x03\xed", b"\x13\x87ok", b"\x03\xe8\xff"])
                ),
                st.sampled_from([True] * 9 + [False]),
            ),
            max_size=6,
        ),
        st.booleans(),
        st.data(),
    )
    @settings(derandomize=True, deadline=None, max_examples=400)
    def test_both_refuse_the_same(self, sent: list[tuple[int, bytes, bool]], masked: bool, data: st.DataObject) -> None:
        # It checks text only above this layer, and refuses a close inside a message, which RFC 6455 allows.
        assume(all(first & 0x0F != Opcode.TEXT for first, _, _ in sent))
        wire = b"".join(
            raw(first, bytes([len(payload)]), payload, masked=masked if right else not masked)
            for first, payload, right in sent
        )
        peer = Protocol(SERVER if masked else CLIENT)
        if wire:
            peer.receive_data(wire)
        assume("incomplete fragmented message" not in str(peer.parser_exc))
        events = [event for event in peer.events_received() if isinstance(event, oracle.Frame)]
        decoder = FrameDecoder(masked=masked)
        units, error = drain(decoder, split(wire, data))
        controls = [(int(e.opcode), bytes(e.data)) for e in events if e.opcode >= Opcode.CLOSE]
        assert [unit for unit in units if unit[0] >= Opcode.CLOSE] == controls
        assert decoder.closed is any(opcode == Opcode.CLOSE for opcode, _ in controls)
        assert (error is None) is (peer.parser_exc is None)
        if error is not None:
            assert peer.close_sent is not None
            if "may not be sent" in str(error):
                # It looks at a close reason first, at the code later.
                assert peer.close_sent.code in {1002, 1007}
            else:
                assert error.code == peer.close_sent.code


class TestPair:
    """The short way for an empty PING or PONG and a short text behind it: all or nothing, and nothing is decoded."""

    @staticmethod
    def pair(opcode: int, text: bytes, *, masked: bool) -> bytes:
        return encode_pair(opcode, text, MaskKeys(lambda size: KEY * (size // 4)) if masked else None)

    @BOTH_ROLES
    @pytest.mark.parametrize("opcode", [Opcode.PING, Opcode.PONG])
    @pytest.mark.parametrize("size", [0, 1, 26, 125])
    def test_is_the_two_frames(self, size: int, opcode: Opcode, masked: bool) -> None:
        text = b"x" * size
        data = self.pair(opcode, text, masked=masked)
        assert data == encode(opcode, masked=masked) + encode(Opcode.TEXT, text, masked=masked)
        assert FrameDecoder(masked=masked).pair(memoryview(data)) == (opcode, text)

    def test_every_frame_has_a_key_of_its_own(self) -> None:
        data = encode_pair(Opcode.PING, b"abc", MaskKeys(lambda size: bytes(number % 256 for number in range(size))))
        assert sorted([data[2:6], data[8:12]]) == [bytes(range(4)), bytes(range(4, 8))]

    @BOTH_ROLES
    def test_all_else_is_left_alone(self, masked: bool) -> None:
        right = self.pair(Opcode.PING, b"abc", masked=masked)
        long = encode(Opcode.PING, masked=masked) + encode(Opcode.TEXT, bytes(126), masked=masked)
        others = [
            encode(opcode, first, masked=masked) + encode(then, b"abc", masked=masked, fin=fin)
            for opcode, first, then, fin in (
                (Opcode.CLOSE, b"", Opcode.TEXT, True),
                (Opcode.TEXT, b"", Opcode.TEXT, True),
                (Opcode.PING, b"x", Opcode.TEXT, True),
                (Opcode.PING, b"", Opcode.BINARY, True),
                (Opcode.PING, b"", Opcode.TEXT, False),
            )
        ]
        bits = [bytes([*right[:at], right[at] ^ bit, *right[at + 1 :]]) for at in (0, 1) for bit in (0x10, 0x40, 0x80)]
        other_role = self.pair(Opcode.PING, b"abc", masked=not masked)
        for data in [right[:size] for size in range(len(right))] + [right + b"x", long, other_role, *others, *bits]:
            assert FrameDecoder(masked=masked).pair(memoryview(data)) is None, data

    @BOTH_ROLES
    @pytest.mark.parametrize(
        "before", ["part of a header", "part of a payload", "a fragmented message", "a close", "an error"]
    )
    def test_not_in_the_middle_of_something(self, before: str, masked: bool) -> None:
        decoder = FrameDecoder(masked=masked)
        binary = encode(Opcode.BINARY, b"abc", masked=masked)
        first = {
            "part of a header": binary[:1],
            "part of a payload": binary[:-1],
            "a fragmented message": encode(Opcode.TEXT, b"abc", masked=masked, fin=False),
            "a close": encode(Opcode.CLOSE, masked=masked),
            "an error": b"\xff\xff",
        }[before]
        try:
            decode(decoder, first)
        except ProtocolError:
            assert before == "an error"
        assert decoder.pair(memoryview(self.pair(Opcode.PING, b"abc", masked=masked))) is None
