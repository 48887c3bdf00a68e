"""SOCKS: each message whole, byte by byte, in random splits; each refusal with its reply; no errors but its own."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel.errors import ProtocolError
from wstunnel.wire import socks
from wstunnel.wire.socks import Command, SocksRequest, SocksServer, UdpPacket, reply, sniff

BUFFER_BYTES = 520
V4 = b"\x01\xc0\x00\x02\x01\x01\xbb"
V6 = b"\x04\x20\x01\x0d\xb8" + bytes(11) + b"\x01\x00\x16"
NAME = b"\x03\x0bExample.org\x00\x50"
LOGIN = b"\x01\x03bob\x06sesame"


def judge(user: bytes, password: bytes) -> bool:
    return (user, password) == (b"bob", b"sesame")


def run(data: bytes, sizes: list[int], *, login: bool = False) -> tuple[SocksServer, bytes, str | None]:
    """Feed `data` cut into `sizes`, then the rest: the machine, all that it said, and its error."""
    server = SocksServer(judge if login else None)
    said = b""
    position = 0
    for size in [*sizes, len(data)]:
        try:
            said += server.feed(data[position : position + size])
        except ProtocolError as error:
            with pytest.raises(ProtocolError, match=f"^{re.escape(str(error))}$"):
                server.feed(b"\x05\x01\x00")
            assert server.request is None
            return server, said + server.refusal, str(error)
        assert len(server._buffer) < BUFFER_BYTES
        assert server.request is None or not server._buffer
        position += size
    return server, said, None


def all_ways(data: bytes, *, login: bool = False) -> tuple[SocksRequest | None, bytes, str | None]:
    """The request, everything said and the error: the same whole and byte by byte."""
    whole, said, error = run(data, [], login=login)
    single, said_late, error_late = run(data, [1] * len(data), login=login)
    assert (whole.request, said, error) == (single.request, said_late, error_late)
    if whole.request:
        assert whole.leftover == single.leftover
    return whole.request, said, error


class TestSocks5:
    @pytest.mark.parametrize(
        ("address", "host", "port"),
        [
            (V4, "192.0.2.1", 443),
            (V6, "2001:db8::1", 22),
            (NAME, "example.org", 80),
            (b"\x03\x03::1\x00\x01", "::1", 1),
            (b"\x03\x051.2.3\xff\xff", "1.2.3", 65535),
        ],
    )
    @pytest.mark.parametrize("early", [b"", b"\x16\x03\x01", b"\x05\x01\x00"])
    def test_connect(self, address: bytes, host: str, port: int, early: bytes) -> None:
        data = b"\x05\x02\x00\x01\x05\x01\x00" + address
        assert all_ways(data + early) == (SocksRequest(5, Command.CONNECT, host, port), b"\x05\x00", None)
        for cut in range(len(data)):
            server, _, _ = run(data[:cut], [])
            assert server.request is None
        server, _, _ = run(data + early, [])
        assert server.leftover == early
        assert server.feed(b"more") == b""
        assert server.leftover == early + b"more"

    def test_what_is_said_and_when(self) -> None:
        server = SocksServer(judge)
        assert server.feed(b"") == b""
        assert server.feed(b"\x05\x01") == b""
        assert server.feed(b"\x02") == b"\x05\x02"
        assert server.feed(LOGIN[:-1]) == b""
        assert server.feed(LOGIN[-1:]) == b"\x01\x00"
        assert server.feed(b"\x05\x01\x00" + V4) == b""
        assert server.request is not None
        assert server.refusal == b""

    def test_udp_associate(self) -> None:
        request, _, _ = all_ways(b"\x05\x01\x00\x05\x03\x00\x01" + bytes(6))
        assert request == SocksRequest(5, Command.UDP_ASSOCIATE, "0.0.0.0", 0)

    def test_reserved_is_not_looked_at(self) -> None:
        request, _, _ = all_ways(b"\x05\x01\x00\x05\x01\xff" + V4)
        assert request is not None

    @pytest.mark.parametrize(
        ("command", "address", "code", "error"),
        [
            (b"\x02", V4, 7, "BIND is not served"),
            (b"\x00", V4, 7, "command 0 is not served"),
            (b"\x7f", NAME, 7, "command 127 is not served"),
            (b"\x01", b"\x02\x00\x00\x00", 8, "address type 2"),
            (b"\x01", b"\x00\x00\x00\x00", 8, "address type 0"),
            (b"\x01", b"\x05\x00\x00\x00", 8, "address type 5"),
            (b"\x01", b"\x03\x00\x00\x50", 4, "none"),
            (b"\x01", b"\x03\x03a b\x00\x50", 4, "none"),
            (b"\x01", b"\x03\x02\xc3\xa4\x00\x50", 4, "none"),
            (b"\x03", b"\x03\x00\x00\x00", 4, "none"),
            (b"\x01", V4[:-2] + b"\0\0", 1, "port 0"),
        ],
    )
    def test_refused(self, command: bytes, address: bytes, code: int, error: str) -> None:
        request, said, message = all_ways(b"\x05\x01\x00\x05" + command + b"\x00" + address)
        assert request is None
        assert said == b"\x05\x00\x05" + bytes((code, 0, 1)) + bytes(6)
        assert message is not None
        assert error in message

    def test_another_version_in_the_request(self) -> None:
        request, said, message = all_ways(b"\x05\x01\x00\x04\x01")
        assert (request, said) == (None, b"\x05\x00\x05\x01\x00\x01" + bytes(6))
        assert message == "version 4 in a SOCKS5 request"

    @pytest.mark.parametrize("size", [0, 1, 255])
    def test_the_longest_fields(self, size: int) -> None:
        login = bytes((1, size)) + b"u" * size + bytes((size,)) + b"p" * size
        seen = []

        def remember(user: bytes, password: bytes) -> bool:
            seen.append((user, password))
            return True

        server = SocksServer(remember)
        greeting = b"\x05\xff" + bytes(254) + b"\x02"
        assert server.feed(greeting + login + b"\x05\x01\x00" + V4) == b"\x05\x02\x01\x00"
        assert seen == [(b"u" * size, b"p" * size)]
        assert server.request is not None

    def test_a_long_name(self) -> None:
        name = (b"a" * 49 + b".") * 5 + b"abc"
        request, _, _ = all_ways(b"\x05\x01\x00\x05\x01\x00\x03" + bytes((len(name),)) + name + b"\x00\x50")
        assert request is not None
        assert request.host == name.decode()


class TestMethods:
    """RFC 1928 §3, RFC 1929."""

    @pytest.mark.parametrize("methods", [b"", b"\x02", b"\x01\x02\x80", b"\xff"])
    def test_none_acceptable(self, methods: bytes) -> None:
        request, said, message = all_ways(b"\x05" + bytes((len(methods),)) + methods)
        assert (request, said) == (None, b"\x05\xff")
        assert message == "the client offers no way to go without a password"

    @pytest.mark.parametrize("methods", [b"", b"\x00", b"\x00\x01"])
    def test_a_password_is_demanded(self, methods: bytes) -> None:
        request, said, message = all_ways(b"\x05" + bytes((len(methods),)) + methods, login=True)
        assert (request, said) == (None, b"\x05\xff")
        assert message == "the client offers no user name and password, which are demanded here"

    def test_right(self) -> None:
        request, said, _ = all_ways(b"\x05\x02\x00\x02" + LOGIN + b"\x05\x01\x00" + V4 + b"x", login=True)
        assert said == b"\x05\x02\x01\x00"
        assert request == SocksRequest(5, Command.CONNECT, "192.0.2.1", 443)

    @pytest.mark.parametrize("login", [b"\x01\x03bob\x00", b"\x01\x00\x06sesame", b"\x01\x03bob\x06sesamE"])
    def test_wrong(self, login: bytes) -> None:
        request, said, message = all_ways(b"\x05\x01\x02" + login + b"\x05\x01\x00" + V4, login=True)
        assert (request, said) == (None, b"\x05\x02\x01\x01")
        assert message == "wrong user name or password"

    def test_another_version(self) -> None:
        request, said, message = all_ways(b"\x05\x01\x02\x05\x03bob\x06sesame", login=True)
        assert (request, said) == (None, b"\x05\x02")
        assert message == "version 5 of SOCKS5's password message, where 1 is the only one"


class TestSocks4:
    @pytest.mark.parametrize(
        ("data", "host"),
        [
            (b"\x04\x01\x01\xbb\xc0\x00\x02\x01\x00", "192.0.2.1"),
            (b"\x04\x01\x01\xbb\xc0\x00\x02\x01bob\x00", "192.0.2.1"),
            (b"\x04\x01\x01\xbb\x00\x00\x00\x00bob\x00", "0.0.0.0"),
            (b"\x04\x01\x01\xbb\x00\x00\x00\x01bob\x00Example.org\x00", "example.org"),
            (b"\x04\x01\x01\xbb\x00\x00\x00\xff\x00::1\x00", "::1"),
            (b"\x04\x01\x01\xbb\x00\x00\x01\x01\x00", "0.0.1.1"),
            (b"\x04\x01\x01\xbb\x01\x02\x03\x04" + b"u" * 255 + b"\x00", "1.2.3.4"),
        ],
    )
    @pytest.mark.parametrize("early", [b"", b"\x00early"])
    def test_connect(self, data: bytes, host: str, early: bytes) -> None:
        assert all_ways(data + early) == (SocksRequest(4, Command.CONNECT, host, 443), b"", None)
        assert run(data + early, [])[0].leftover == early
        for cut in range(len(data)):
            assert run(data[:cut], [])[0].request is None

    @pytest.mark.parametrize(
        ("data", "error"),
        [
            (b"\x04\x02\x01\xbb\xc0\x00\x02\x01\x00", "SOCKS4's BIND is not served"),
            (b"\x04\x03\x01\xbb\xc0\x00\x02\x01\x00", "SOCKS4's command 3 is not served"),
            (b"\x04\x01\x00\x00\xc0\x00\x02\x01\x00", "nothing can be reached at port 0"),
            (b"\x04\x01\x01\xbb\x00\x00\x00\x01\x00\x00", "what stands for the name of a host is none"),
            (b"\x04\x01\x01\xbb\x00\x00\x00\x01\x00a b\x00", "what stands for the name of a host is none"),
            (b"\x04\x01\x01\xbb\x01\x02\x03\x04" + b"u" * 256, "the user id of a SOCKS4 request is longer than 255"),
            (b"\x04\x01\x01\xbb\0\0\0\x01u\0" + b"n" * 256, "the name of a SOCKS4 request is longer than 255 bytes"),
        ],
    )
    def test_refused(self, data: bytes, error: str) -> None:
        request, said, message = all_ways(data)
        assert (request, said) == (None, b"\x00\x5b" + bytes(6))
        assert message is not None
        assert message.startswith(error)

    def test_where_a_password_is_demanded(self) -> None:
        request, said, message = all_ways(b"\x04\x01\x01\xbb\xc0\x00\x02\x01bob\x00", login=True)
        assert (request, said) == (None, b"\x00\x5b" + bytes(6))
        assert message is not None
        assert "use SOCKS5" in message


class TestNoSocks:
    @pytest.mark.parametrize(
        ("data", "error"),
        [
            (b"GET / HTTP/1.1\r\n", "HTTP, to judge by its first byte 'G'"),
            (b"POST", "'P'"),
            (b"CONNECT a:1", "'C'"),
            (b"\x16\x03\x01", "TLS"),
            (b"\x00", "0x00"),
            (b"\x06", "0x06"),
            (b"\xc7", "0xc7"),
        ],
    )
    def test_what_it_was(self, data: bytes, error: str) -> None:
        request, said, message = all_ways(data)
        assert (request, said) == (None, b"")
        assert message is not None
        assert error in message

    def test_sniff(self) -> None:
        letters = {ord(c) for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"}
        for byte in range(256):
            expected = "socks" if byte in (4, 5) else "http" if byte in letters else None
            assert sniff(byte) == expected


class TestReplies:
    five = SocksRequest(5, Command.CONNECT, "a", 1)
    four = SocksRequest(4, Command.CONNECT, "a", 1)

    @pytest.mark.parametrize(
        ("code", "number"),
        [
            *(("opened", 0), ("internal", 1), ("limit", 1), ("lost", 1), ("made up", 1), ("forbidden", 2)),
            *(("unreachable", 4), ("name-not-found", 4), ("refused", 5), ("timeout", 6)),
        ],
    )
    def test_codes(self, code: str, number: int) -> None:
        assert reply(self.five, code) == bytes((5, number, 0, 1)) + bytes(6)
        assert reply(self.four, code) == bytes((0, 91 if number else 90)) + bytes(6)

    def test_bound_addresses(self) -> None:
        assert reply(self.five, "opened", "192.0.2.1", 443) == b"\x05\x00\x00" + V4
        assert reply(self.five, "opened", "2001:db8::1", 22) == b"\x05\x00\x00" + V6
        assert reply(self.five, "opened", "example.org", 80) == b"\x05\x00\x00\x01" + bytes(4) + b"\x00\x50"
        assert reply(self.four, "opened", "192.0.2.1", 443) == b"\x00\x5a\x01\xbb\xc0\x00\x02\x01"
        assert reply(self.four, "opened", "::1", 443) == b"\x00\x5a" + bytes(6)


class TestDatagrams:
    """RFC 1928 §7."""

    @pytest.mark.parametrize("payload", [b"", b"x", bytes(65507)])
    @pytest.mark.parametrize(
        ("address", "host", "port"), [(V4, "192.0.2.1", 443), (V6, "2001:db8::1", 22), (NAME, "example.org", 80)]
    )
    def test_there_and_back(self, address: bytes, host: str, port: int, payload: bytes) -> None:
        assert socks.parse_udp(b"\0\0\0" + address + payload) == UdpPacket(host, port, payload)
        built = socks.build_udp(host, port, payload)
        assert built.lower() == (b"\0\0\0" + address + payload).lower()
        assert socks.parse_udp(built) == UdpPacket(host, port, payload)
        for cut in range(len(address) + 3):
            with pytest.raises(ProtocolError, match="shorter"):
                socks.parse_udp(built[:cut])

    @pytest.mark.parametrize(
        ("datagram", "error"),
        [
            (b"\0\0\x01" + V4, "fragment"),
            (b"\0\0\x80" + V4, "fragment"),
            (b"\0\0\0\x02\x00\x00\x00\x00", "address type 2"),
            (b"\0\0\0" + V4[:-2] + b"\0\0", "port 0"),
            (b"\0\0\0\x03\x00\x00\x50", "no host"),
            (b"\0\0\0\x03\x01/\x00\x50", "no host"),
        ],
    )
    def test_dropped(self, datagram: bytes, error: str) -> None:
        with pytest.raises(ProtocolError, match=error):
            socks.parse_udp(datagram)

    def test_what_fits_in_a_header(self) -> None:
        assert socks.udp_header("a" * 255, 1) == b"\0\0\0\x03\xff" + b"a" * 255 + b"\0\x01"
        for host, port in (("a" * 256, 1), ("b\xfccher", 1), ("a", -1), ("a", 65536)):
            with pytest.raises(ValueError, match=r"."):
                socks.udp_header(host, port)

    @given(st.binary(max_size=40))
    def test_nothing_but_its_own_errors(self, datagram: bytes) -> None:
        for data in (datagram, b"\0\0\0" + datagram):
            try:
                packet = socks.parse_udp(data)
            except ProtocolError:
                continue
            assert data.endswith(packet.payload)
            assert socks.parse_udp(socks.build_udp(*packet)) == packet


PIECES = st.sampled_from(
    [
        *(b"\x05", b"\x04", b"\x01", b"\x02", b"\x00", b"\x05\x01\x00", b"\x05\x02\x00\x02", LOGIN, b"\x05\x01\x00"),
        *(V4, V6, NAME, b"\x04\x01\x01\xbb\x00\x00\x00\x01", b"bob\x00", b"example.org\x00", bytes(300), b"x" * 300),
    ]
)


class TestAnything:
    @given(
        st.lists(PIECES | st.binary(max_size=8), max_size=8).map(b"".join), st.lists(st.integers(0, 20)), st.booleans()
    )
    def test_any_bytes_in_any_split(self, data: bytes, sizes: list[int], login: bool) -> None:
        whole, said, error = run(data, [], login=login)
        split, said_split, error_split = run(data, sizes, login=login)
        assert (whole.request, said, error) == (split.request, said_split, error_split)
        assert whole.leftover == split.leftover
        if whole.request:
            assert data.endswith(whole.leftover)
            assert len(data) - len(whole.leftover) < 3 * BUFFER_BYTES
            assert whole.request.port or whole.request.command is Command.UDP_ASSOCIATE
