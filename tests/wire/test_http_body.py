"""Where a body ends: whole, byte by byte, in random splits; what follows it never goes on; every way to be wrong."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel.errors import HandshakeError
from wstunnel.limits import HEAD_BYTES
from wstunnel.wire.http_body import ChunkedBody, EndlessBody, RequestBody, SizedBody

SMUGGLED = b"GET http://elsewhere/ HTTP/1.1\r\nCookie: secret\r\n\r\n"
CHUNKED = b'5\r\nab\r\nc\r\n00A ; x="y"\r\n0123456789\r\n0;last\r\nX-Trailer: 1\r\nX-Other: 2\r\n\r\n'


def run(body: RequestBody, data: bytes, sizes: list[int]) -> tuple[bytes, bool, str | None]:
    """What goes on of `data` cut into `sizes` and the rest, whether the body is complete, and the error."""
    passed = b""
    position = 0
    for size in [*sizes, len(data)]:
        try:
            passed += body.feed(data[position : position + size])
        except HandshakeError as error:
            assert error.status == 400
            with pytest.raises(HandshakeError) as again:
                body.feed(b"0\r\n\r\n")
            assert str(again.value) == str(error)
            return passed, body.complete, str(error)
        position += size
    return passed, body.complete, None


class TestEndless:
    def test_everything_goes_on(self) -> None:
        assert run(EndlessBody(), CHUNKED + SMUGGLED, [3, 1]) == (CHUNKED + SMUGGLED, False, None)


class TestSized:
    @pytest.mark.parametrize("sizes", [[], [1] * 8, [3], [5], [0, 2]])
    def test_as_much_as_was_said(self, sizes: list[int]) -> None:
        assert run(SizedBody(5), b"abcde" + SMUGGLED, sizes) == (b"abcde", True, None)
        assert run(SizedBody(5), b"abcd", sizes) == (b"abcd", False, None)
        assert run(SizedBody(0), SMUGGLED, sizes) == (b"", True, None)


class TestChunked:
    @pytest.mark.parametrize("body", [CHUNKED, b"0\r\n\r\n", b"1\r\nx\r\n0\r\n\r\n", b"0\t\r\na:b\r\n\r\n"])
    @pytest.mark.parametrize("behind", [b"", SMUGGLED, b"0\r\n\r\n"])
    def test_whole_and_in_pieces(self, body: bytes, behind: bytes) -> None:
        data = body + behind
        assert run(ChunkedBody(), data, []) == (body, True, None)
        assert run(ChunkedBody(), data, [1] * len(data)) == (body, True, None)
        for cut in range(len(body)):
            assert run(ChunkedBody(), body[:cut], []) == (body[:cut], False, None)

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            (b"\r\n", "no size"),
            (b"g\r\n", "no size"),
            (b"-1\r\n", "no size"),
            (b"0x1\r\n", "no size"),
            (b" 1\r\n", "no size"),
            (b"1 x\r\n", "no size"),
            (b"1;\x00\r\n", "no size"),
            (b"1" * 16 + b"\r\n", "no size"),
            (b"1\n", "CR LF"),
            (b"1\r\r\n", "CR LF"),
            (b"1\r;\r\n", "CR LF"),
            (b"1\r\nxx\r\n", "longer than its size"),
            (b"1\r\nx\n", "CR LF"),
            (b"1\r\nx0\r\n", "longer than its size"),
            (b"0\r\na: b\n\r\n", "CR LF"),
            (b"1;" + b"x" * HEAD_BYTES, "longer than 16384 bytes"),
            (b"0\r\n" + b"x: y\r\n" * 3000, "longer than 16384 bytes"),
        ],
    )
    def test_wrong(self, data: bytes, error: str) -> None:
        _, complete, message = run(ChunkedBody(), data, [])
        passed, complete_late, message_late = run(ChunkedBody(), data, [1] * len(data))
        assert message is not None
        assert error in message
        assert message == message_late
        assert not complete
        assert not complete_late
        assert data.startswith(passed)

    def test_what_is_held(self) -> None:
        body = ChunkedBody()
        body.feed(b"fffff\r\n" + bytes(500_000))
        assert not body._line
        body = ChunkedBody()
        body.feed(b"1;" + b"x" * (HEAD_BYTES - 2))
        assert len(body._line) == HEAD_BYTES

    @given(
        st.lists(st.binary(min_size=1, max_size=300), max_size=5),
        st.lists(st.integers(0, 50)),
        st.binary(max_size=20),
    )
    def test_as_h11_writes_it(self, chunks: list[bytes], sizes: list[int], behind: bytes) -> None:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="POST", target="/", headers=[("Host", "a"), ("Transfer-Encoding", "chunked")]))
        sent = b"".join(client.send(h11.Data(data=chunk)) or b"" for chunk in chunks)
        sent += client.send(h11.EndOfMessage(headers=[("X-Trailer", "1")])) or b""
        assert run(ChunkedBody(), sent + behind, sizes) == (sent, True, None)

    @given(
        st.lists(
            st.sampled_from([b"0", b"1", b"5", b"a", b"\r\n", b"\r", b"\n", b";x", b" ", b"x", b"0\r\n", b"x: y\r\n"]),
            max_size=20,
        ).map(b"".join),
        st.lists(st.integers(0, 10)),
    )
    def test_any_bytes_in_any_split(self, data: bytes, sizes: list[int]) -> None:
        passed, complete, error = run(ChunkedBody(), data, [])
        passed_split, complete_split, error_split = run(ChunkedBody(), data, sizes)
        assert (complete, error) == (complete_split, error_split)
        assert data.startswith(passed_split)
        if error is None:
            assert passed == passed_split
