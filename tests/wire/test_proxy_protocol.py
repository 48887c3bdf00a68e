"""PROXY protocol: what is sent, byte for byte; both versions read in any split; every way to be wrong."""

from __future__ import annotations

import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel.errors import ProtocolError
from wstunnel.wire.proxy_protocol import BLOCK_BYTES, LINE_BYTES, Endpoint, ProxyHeader, encode

FOUR = (("192.0.2.1", 51234), ("198.51.100.7", 443))
SIX = (("2001:db8::1", 51234), ("::1", 443))
SIGNATURE = b"\x0d\x0a\x0d\x0a\x00\x0d\x0aQUIT\x0a"
BLOCK_4 = b"\xc0\x00\x02\x01\xc6\x33\x64\x07\xc8\x22\x01\xbb"
BLOCK_6 = b"\x20\x01\x0d\xb8" + bytes(11) + b"\x01" + bytes(15) + b"\x01\xc8\x22\x01\xbb"
TLV = b"\x03\x00\x04\xde\xad\xbe\xef"  # PP2_TYPE_CRC32C, a wrong one
WORST = b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535".ljust(LINE_BYTES - 2, b" ") + b"\r\n"

Result = tuple[object, object, object, bytes]


def block(command: int, family: int, content: bytes, size: int | None = None) -> bytes:
    return SIGNATURE + bytes((command, family)) + (len(content) if size is None else size).to_bytes(2, "big") + content


def run(data: bytes, sizes: list[int]) -> Result | str:
    """Feed `data` cut into `sizes`, then the rest: what was read, with the bytes behind it; or the error."""
    header = ProxyHeader()
    position = 0
    rest = b""
    for size in [*sizes, len(data)]:
        piece = data[position : position + size]
        position += size
        try:
            behind = header.feed(piece)
        except ProtocolError as error:
            with pytest.raises(ProtocolError, match=f"^{re.escape(str(error))}$"):
                header.feed(b"PROXY UNKNOWN\r\n")
            assert (header.version, header.source, header.destination) == (None, None, None)
            return str(error)
        assert (behind is None) == (header.version is None)
        assert len(header._buffer) < BLOCK_BYTES + 16
        rest += behind or b""
    return header.version, header.source, header.destination, rest


def all_ways(data: bytes) -> Result | str:
    whole = run(data, [])
    assert run(data, [1] * len(data)) == whole
    return whole


class TestEncode:
    def test_version_1(self) -> None:
        assert encode(1, *FOUR) == b"PROXY TCP4 192.0.2.1 198.51.100.7 51234 443\r\n"
        assert encode(1, *SIX) == b"PROXY TCP6 2001:db8::1 ::1 51234 443\r\n"

    def test_version_2(self) -> None:
        assert encode(2, *FOUR) == block(0x21, 0x11, BLOCK_4)
        assert encode(2, *SIX) == block(0x21, 0x21, BLOCK_6)

    @pytest.mark.parametrize(("source", "destination"), [(None, None), (FOUR[0], None), (None, FOUR[1])])
    def test_nothing_is_known(self, source: Endpoint | None, destination: Endpoint | None) -> None:
        assert encode(1, source, destination) == b"PROXY UNKNOWN\r\n"
        assert encode(2, source, destination) == block(0x20, 0, b"")

    def test_mixed_families(self) -> None:
        mapped = "0000:0000:0000:0000:0000:ffff:c000:0201"
        assert encode(1, FOUR[0], SIX[1]) == f"PROXY TCP6 {mapped} ::1 51234 443\r\n".encode()
        content = bytes(10) + b"\xff\xff" + BLOCK_4[:4] + BLOCK_6[16:]
        assert encode(2, FOUR[0], SIX[1]) == block(0x21, 0x21, content)
        assert encode(2, SIX[0], FOUR[1])[12:14] == b"\x21\x21"

    @pytest.mark.parametrize("source", [("example.org", 1), ("", 1), ("1.2.3.4", -1), ("1.2.3.4", 65536)])
    def test_no_endpoint(self, source: Endpoint) -> None:
        for version in (1, 2):
            with pytest.raises(ValueError, match=r"IP addresses only|no port"):
                encode(version, source, FOUR[1])  # type: ignore[arg-type]

    @given(st.ip_addresses(), st.ip_addresses(), st.integers(0, 65535), st.integers(0, 65535), st.sampled_from([1, 2]))
    def test_is_read_back(
        self, source: object, destination: object, low: int, high: int, version: Literal[1, 2]
    ) -> None:
        data = encode(version, (str(source), low), (str(destination), high))
        assert len(data) <= LINE_BYTES
        header = ProxyHeader()
        assert header.feed(data + b"\r\n") == b"\r\n"
        assert header.source is not None
        assert header.destination is not None
        again = encode(version, header.source, header.destination)
        assert again == data
        assert (header.source[1], header.destination[1]) == (low, high)


class TestDecode:
    @pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1\r\n", SIGNATURE, b"\n"])
    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (b"PROXY TCP4 192.0.2.1 198.51.100.7 51234 443\r\n", (1, *FOUR)),
            (b"PROXY TCP6 2001:DB8:0::1 ::1 51234 443\r\n", (1, *SIX)),
            (b"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n", (1, ("0.0.0.0", 0), ("255.255.255.255", 65535))),
            (b"PROXY UNKNOWN\r\n", (1, None, None)),
            (b"PROXY UNKNOWN TCP4 1.2.3.4 \x00\xff\r\n", (1, None, None)),
            (WORST, (1, None, None)),
            (block(0x21, 0x11, BLOCK_4), (2, *FOUR)),
            (block(0x21, 0x21, BLOCK_6), (2, *SIX)),
            (block(0x21, 0x11, BLOCK_4 + TLV), (2, *FOUR)),
            (block(0x21, 0x21, BLOCK_6.ljust(BLOCK_BYTES, b"\x04")), (2, *SIX)),
            (block(0x20, 0x00, b""), (2, None, None)),
            (block(0x20, 0x11, BLOCK_4), (2, None, None)),
            (block(0x20, 0xFF, TLV), (2, None, None)),
            (block(0x21, 0x00, b""), (2, None, None)),
            (block(0x21, 0x00, TLV), (2, None, None)),
            (block(0x21, 0x10, BLOCK_4), (2, None, None)),
            (block(0x21, 0x12, BLOCK_4), (2, None, None)),
            (block(0x21, 0x22, BLOCK_6), (2, None, None)),
            (block(0x21, 0x31, bytes(216)), (2, None, None)),
        ],
    )
    def test_right(self, data: bytes, expected: tuple[object, ...], rest: bytes) -> None:
        assert all_ways(data + rest) == (*expected, rest)
        for cut in range(len(data)):
            assert run(data[:cut], [])[0] is None

    def test_later_bytes_are_passed_on(self) -> None:
        header = ProxyHeader()
        assert header.feed(b"") is None
        assert header.feed(b"PROXY UNKNOWN\r\na") == b"a"
        assert header.feed(b"PROXY") == b"PROXY"
        assert header.feed(b"") == b""

    @pytest.mark.parametrize(
        "line",
        [
            *("PROXY", "PROXY ", "PROXY TCP4", "PROXY UNKNOWNX", "PROXY unknown", "proxy UNKNOWN", "PROXY  TCP4"),
            *("PROXY TCP5 1.2.3.4 1.2.3.4 1 1", "PROXY TCP4 1.2.3.4 1.2.3.4 1", "PROXY TCP4 1.2.3.4 1.2.3.4 1 1 1"),
            *("PROXY TCP4 1.2.3.4 1.2.3.4  1 1", "PROXY TCP4 1.2.3.4 1.2.3.4 1 1 ", "PROXY TCP4 1.2.3.4\t1.2.3.4 1 1"),
            *("PROXY TCP4 1.2.3 1.2.3.4 1 1", "PROXY TCP4 1.2.3.4 1.2.3.256 1 1", "PROXY TCP4 01.2.3.4 1.2.3.4 1 1"),
            *("PROXY TCP4 ::1 ::1 1 1", "PROXY TCP6 1.2.3.4 1.2.3.4 1 1", "PROXY TCP6 ::1 1.2.3.4 1 1"),
            *("PROXY TCP6 [::1] ::1 1 1", "PROXY TCP6 ::1 fe80::1%1 1 1", "PROXY TCP6 :: ::g 1 1"),
            *(
                "PROXY TCP4 1.2.3.4 1.2.3.4 01 1",
                "PROXY TCP4 1.2.3.4 1.2.3.4 1 65536",
                "PROXY TCP4 1.2.3.4 1.2.3.4 1 -1",
            ),
            *("PROXY TCP4 1.2.3.4 1.2.3.4 1 100000", "PROXY TCP4 a b 1 1", "PROXY UNKNOWN" + "x" * 100),
        ],
    )
    def test_wrong_lines(self, line: str) -> None:
        assert isinstance(all_ways(line.encode() + b"\r\n"), str)

    def test_line_ends(self) -> None:
        assert all_ways(b"PROXY UNKNOWN\n") == "a PROXY header whose line does not end in CR LF"
        assert all_ways(b"PROXY UNKNOWN\r\r\nx") != all_ways(b"PROXY UNKNOWN\r\nx")
        too_long = "a PROXY header whose line is longer than 107 bytes"
        assert all_ways(b"PROXY UNKNOWN " + b"x" * 93) == too_long
        assert run(b"PROXY UNKNOWN " + b"x" * 92, [])[0] is None
        assert all_ways(WORST[:-2] + b"x\r\n") == too_long

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            (block(0x11, 0x11, BLOCK_4), "version 1 of"),
            (block(0x31, 0x11, BLOCK_4), "version 3 of"),
            (block(0x22, 0x11, BLOCK_4), "command 2 "),
            (block(0x21, 0x41, BLOCK_4), "0x41"),
            (block(0x21, 0x13, BLOCK_4), "0x13"),
            (block(0x21, 0x11, BLOCK_4[:-1]), "no room"),
            (block(0x21, 0x21, BLOCK_6[:-1]), "no room"),
            (block(0x21, 0x31, bytes(215)), "no room"),
            (block(0x21, 0x11, b"", 4097), "4097 bytes, of which at most 4096"),
            (block(0x20, 0x00, b"", 65535), "65535 bytes, of which at most 4096"),
            (SIGNATURE[:-1] + b"\r", "something else came"),
            (b"\r\n\r\nGET", "something else came"),
            (b"GET / HTTP/1.1\r\n", "HTTP or another text protocol came"),
            (b"POST / HTTP/1.1\r\n", "HTTP or another text protocol came"),
            (b"SSH-2.0", "HTTP or another text protocol came"),
            (b"\x16\x03\x01", "TLS came"),
            (b"\x00", "something else came"),
            (b"\xff", "something else came"),
        ],
    )
    def test_wrong_blocks_and_no_header_at_all(self, data: bytes, error: str) -> None:
        message = all_ways(data)
        assert isinstance(message, str)
        assert error in message


PIECES = st.sampled_from(
    [
        *(b"PROXY ", b"TCP4 ", b"TCP6 ", b"UNKNOWN", b"1.2.3.4 ", b"::1 ", b"1 ", b"65535", b"\r\n", b"\n", SIGNATURE),
        *(
            b"\x21\x11\x00\x0c",
            b"\x20\x00\x00\x00",
            b"\x21\x21\x00\x24",
            b"\x21\x00\x10\x00",
            BLOCK_4,
            BLOCK_6,
            bytes(4096),
        ),
    ]
)


class TestAnything:
    @given(st.lists(PIECES | st.binary(max_size=8), max_size=10).map(b"".join), st.lists(st.integers(0, 30)))
    def test_any_bytes_in_any_split(self, data: bytes, sizes: list[int]) -> None:
        whole = run(data, [])
        assert run(data, sizes) == whole
        if not isinstance(whole, str):
            assert data.endswith(whole[3])
