"""wire/plain.py: who may open a plain endpoint, and its frames."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel.errors import HandshakeError, ProtocolError
from wstunnel.wire.frames import FrameDecoder, Opcode, encode_close, encode_frame
from wstunnel.wire.http1 import Request
from wstunnel.wire.masking import MaskKeys, apply_mask
from wstunnel.wire.plain import HEADER_BYTES, KEY_BYTES, PlainProtocol, accept_plain, offered_token

KEY = base64.b64encode(bytes(16)).decode()
MASK = b"\x9a\x01\x7f\xc3"
TOKEN = "t" * 43


def request(*headers: tuple[str, str], target: str = "/db") -> Request:
    fixed = (
        ("host", "a.example"),
        ("upgrade", "websocket"),
        ("connection", "Upgrade"),
        ("sec-websocket-key", KEY),
        ("sec-websocket-version", "13"),
    )
    return Request("GET", target, (*fixed, *headers))


def frame(opcode: Opcode, payload: bytes = b"", *, fin: bool = True) -> bytes:
    return encode_frame(opcode, payload, fin=fin, key=MASK)


class TestRequest:
    @pytest.mark.parametrize(
        ("offered", "chosen"),
        [
            ([], None),
            (["binary"], "binary"),
            (["base64, binary"], "binary"),
            ([f"bearer.{TOKEN}", "binary"], "binary"),
            ([f"bearer.{TOKEN}"], None),
            (["Binary"], None),
            (["wstunnel.1"], None),
        ],
    )
    def test_subprotocol(self, offered: list[str], chosen: str | None) -> None:
        fields = [("sec-websocket-protocol", text) for text in offered]
        assert accept_plain(request(*fields), path="/db", origins=()).subprotocol == chosen

    def test_origins(self) -> None:
        asked = request(("origin", "https://App.example:443"))
        assert accept_plain(asked, path="/db", origins=("https://app.example",)).key == KEY
        with pytest.raises(HandshakeError) as refused:
            accept_plain(asked, path="/db", origins=("https://other.example",))
        assert refused.value.status == 403

    def test_the_query_is_not_looked_at(self) -> None:
        assert accept_plain(request(target="/db?x=1"), path="/db", origins=()).key == KEY

    @pytest.mark.parametrize(
        ("fields", "token"),
        [
            ([], None),
            ([("authorization", f"Bearer {TOKEN}")], TOKEN),
            ([("sec-websocket-protocol", f"binary, bearer.{TOKEN}")], TOKEN),
            ([("sec-websocket-protocol", f"bearer.{TOKEN}"), ("authorization", "Basic YTpi")], TOKEN),
            ([("sec-websocket-protocol", "bearer.")], ""),
            ([("sec-websocket-protocol", "binary")], None),
        ],
    )
    def test_token(self, fields: list[tuple[str, str]], token: str | None) -> None:
        assert offered_token(request(*fields)) == token

    @pytest.mark.parametrize(
        "fields",
        [
            [("authorization", f"Bearer {TOKEN}"), ("sec-websocket-protocol", f"bearer.{TOKEN}")],
            [("sec-websocket-protocol", f"bearer.{TOKEN}, bearer.{TOKEN}")],
            [("sec-websocket-protocol", "bearer.a"), ("sec-websocket-protocol", "bearer.b")],
            [("authorization", "Bearer")],
        ],
    )
    def test_more_than_one_token_or_a_malformed_one(self, fields: list[tuple[str, str]]) -> None:
        with pytest.raises(HandshakeError) as refused:
            offered_token(request(*fields))
        assert refused.value.status == 400
        assert TOKEN not in str(refused.value)


class TestFrames:
    STREAM = (
        frame(Opcode.BINARY, b"one", fin=False)
        + frame(Opcode.PING, b"p")
        + frame(Opcode.CONTINUATION, b" two", fin=False)
        + frame(Opcode.CONTINUATION)
        + frame(Opcode.BINARY)
        + frame(Opcode.PONG, b"unasked")
        + frame(Opcode.BINARY, b" three" * 100)
        + encode_close(4001, "bye", key=MASK)
    )

    @given(st.lists(st.integers(0, len(STREAM)), max_size=8).map(sorted))
    def test_any_split(self, cuts: list[int]) -> None:
        protocol = PlainProtocol(text=False)
        payload, control = b"", b""
        for start, stop in zip([0, *cuts], [*cuts, len(self.STREAM)], strict=True):
            pieces = [bytes(piece) for piece in protocol.receive(self.STREAM[start:stop])]
            assert all(pieces)
            payload += b"".join(pieces)
            control += protocol.control()
        assert payload == b"one two" + b" three" * 100
        assert control == encode_frame(Opcode.PONG, b"p") + encode_close(4001)
        assert (protocol.close_code, protocol.close_reason) == (4001, "bye")
        assert protocol.closing

    @given(st.binary(max_size=200), st.booleans())
    def test_anything_is_decoded_or_a_protocol_error(self, data: bytes, text: bool) -> None:
        protocol = PlainProtocol(text=text)
        try:
            for payload in protocol.receive(data):
                assert payload
        except ProtocolError as error:
            assert error.code in (1002, 1003, 1007)

    def test_text(self) -> None:
        assert list(PlainProtocol(text=True).receive(frame(Opcode.TEXT, b"words"))) == [b"words"]
        protocol = PlainProtocol(text=False)
        received = protocol.receive(frame(Opcode.BINARY, b"good") + frame(Opcode.TEXT, b"words"))
        assert next(received) == b"good"
        with pytest.raises(ProtocolError) as caught:
            next(received)
        assert caught.value.code == 1003

    def test_a_flood_of_pings_is_answered_once(self) -> None:
        protocol = PlainProtocol(text=False)
        assert not list(protocol.receive(b"".join(frame(Opcode.PING, b"%d" % number) for number in range(1000))))
        assert protocol.control() == encode_frame(Opcode.PONG, b"999")
        assert protocol.control() == b""

    def test_a_ping_of_ours(self) -> None:
        protocol = PlainProtocol(text=False)
        protocol.ping()
        assert protocol.control() == encode_frame(Opcode.PING, b"")
        assert protocol.control() == b""

    def test_a_close_without_a_code_is_answered_by_one(self) -> None:
        protocol = PlainProtocol(text=False)
        assert not list(protocol.receive(frame(Opcode.CLOSE)))
        assert protocol.close_code == 1005
        assert protocol.control() == encode_close(None)

    def test_our_close_goes_behind_a_pong_and_only_once(self) -> None:
        protocol = PlainProtocol(text=False)
        assert not list(protocol.receive(frame(Opcode.PING, b"x")))
        protocol.close(1000, "first")
        protocol.close(1011, "second")
        assert protocol.control() == encode_frame(Opcode.PONG, b"x") + encode_close(1000, "first")

    def test_nothing_follows_our_close(self) -> None:
        protocol = PlainProtocol(text=False)
        protocol.close(1000)
        assert protocol.control() == encode_close(1000)
        assert not list(protocol.receive(frame(Opcode.PING, b"x")))
        protocol.ping()
        assert protocol.control() == b""
        assert list(protocol.receive(frame(Opcode.BINARY, b"still read"))) == [b"still read"]
        assert not list(protocol.receive(encode_close(1001, key=MASK)))
        assert protocol.close_code == 1001
        assert protocol.control() == b""

    @pytest.mark.parametrize("length", [1, 125, 126, 65535, 65536])
    def test_header(self, length: int) -> None:
        header = PlainProtocol(text=False).header(length)
        assert len(header) <= HEADER_BYTES
        ((opcode, payload, last),) = FrameDecoder(masked=False).feed(header + bytes(length))
        assert (opcode, len(payload), last) == (Opcode.BINARY, length, True)


class TestAtTheClient:
    """RFC 6455 §5.1: its frames are masked, the server's are not."""

    KEYS = b"".join(bytes([number, 7, 8, 9]) for number in range(256)) * 4

    def made(self) -> PlainProtocol:
        return PlainProtocol(text=True, keys=MaskKeys(lambda size: self.KEYS[:size]))

    @pytest.mark.parametrize("length", [1, 125, 126, 65535, 65536])
    def test_data(self, length: int) -> None:
        protocol = self.made()
        assert protocol.masks
        header = protocol.header(length)
        assert len(header) <= HEADER_BYTES
        key = header[-KEY_BYTES:]
        assert key == self.KEYS[:4]
        ((opcode, payload, last),) = FrameDecoder(masked=True).feed(header + apply_mask(b"x" * length, key))
        assert (opcode, bytes(payload), last) == (Opcode.BINARY, b"x" * length, True)
        assert protocol.header(length)[-KEY_BYTES:] == self.KEYS[4:8], "every frame has its own"

    def test_control(self) -> None:
        protocol = self.made()
        assert not list(protocol.receive(encode_frame(Opcode.PING, b"there?")))
        protocol.ping()
        protocol.close(1000, "bye")
        frames = list(FrameDecoder(masked=True).feed(protocol.control()))
        assert [(opcode, bytes(payload)) for opcode, payload, _ in frames] == [
            (Opcode.PONG, b"there?"),
            (Opcode.CLOSE, b"\x03\xe8bye"),
        ]

    def test_what_a_server_sends(self) -> None:
        protocol = self.made()
        received = protocol.receive(encode_frame(Opcode.BINARY, b"one") + encode_frame(Opcode.TEXT, b"two"))
        assert list(received) == [b"one", b"two"]
        with pytest.raises(ProtocolError, match="masked"):
            list(protocol.receive(frame(Opcode.BINARY, b"three")))
