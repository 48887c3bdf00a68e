"""Heads: each reader whole, byte by byte, with trailing bytes; every way to be wrong; nothing but declared errors."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wstunnel import limits
from wstunnel.errors import HandshakeError, NetworkError
from wstunnel.wire import http1
from wstunnel.wire.http1 import Request, RequestReader, Response, ResponseReader

GET = (
    b"GET /tunnel?x=1 HTTP/1.1\r\n"
    b"Host: example.org:8443\r\n"
    b"Upgrade: websocket\r\n"
    b"Connection: keep-alive, Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    b"Sec-WebSocket-Version: 13\r\n"
    b"X-Empty:\r\n"
    b"X-Padded: \t caf\xe9 au lait\t \r\n"
    b"\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
FRAMES = b"\x82\x85\r\n\r\n\x00\n\r\x16GET / HTTP/9.9\r\n\r\n"  # would be wrong anywhere in a head


def parts(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def read_request(pieces: list[bytes]) -> tuple[Request | None, bytes]:
    reader = RequestReader()
    request = None
    for piece in pieces:
        request = reader.feed(piece)
    return request, reader.leftover


def read_response(pieces: list[bytes]) -> tuple[Response | None, bytes]:
    reader = ResponseReader()
    response = None
    for piece in pieces:
        response = reader.feed(piece)
    return response, reader.leftover


def refused(head: bytes) -> HandshakeError:
    """The error for `head`, which must come with its last byte and not before, and the same for the whole."""
    reader = RequestReader()
    for index in range(len(head) - 1):
        assert reader.feed(head[index : index + 1]) is None, f"accepted {head[: index + 1]!r}"
    with pytest.raises(HandshakeError) as late:
        reader.feed(head[-1:])
    with pytest.raises(HandshakeError) as whole:
        RequestReader().feed(head + b" and whatever\r\n\r\n")
    assert (late.value.status, str(late.value)) == (whole.value.status, str(whole.value))
    with pytest.raises(HandshakeError, match="^" + re.escape(str(late.value)) + "$"):
        reader.feed(b"\r\n\r\n")  # stays refused
    assert reader.leftover == b""
    return late.value


def with_fields(*fields: bytes) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


class TestRequest:
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
    @pytest.mark.parametrize("trailing", [b"", b"\x82", FRAMES])
    def test_whole_and_in_pieces_with_trailing_bytes(self, size: int, trailing: bytes) -> None:
        request, leftover = read_request(parts(GET + trailing, size))
        assert request == Request(
            "GET",
            "/tunnel?x=1",
            (
                ("host", "example.org:8443"),
                ("upgrade", "websocket"),
                ("connection", "keep-alive, Upgrade"),
                ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
                ("sec-websocket-version", "13"),
                ("x-empty", ""),
                ("x-padded", "caf\xe9 au lait"),
            ),
        )
        assert leftover == trailing

    def test_no_bytes_change_nothing(self) -> None:
        assert read_request([b"", GET[:10], b"", GET[10:-1], b"", GET[-1:]])[0] is not None
        assert RequestReader().feed(b"") is None

    def test_more_after_the_head_is_kept(self) -> None:
        reader = RequestReader()
        first = reader.feed(GET + b"a")
        assert reader.feed(b"bc") is first
        assert reader.leftover == b"abc"

    def test_a_plain_request_with_a_body_is_a_request(self) -> None:
        request, leftover = read_request([with_fields(b"Content-Length: 3") + b"abc"])
        assert request is not None
        assert request.value("Content-Length") == "3"
        assert leftover == b"abc"

    def test_other_methods_and_targets(self) -> None:
        request, _ = read_request([b"M-SEARCH * HTTP/1.1\r\nHost:\r\n\r\n"])
        assert request == Request("M-SEARCH", "*", (("host", ""),))

    def test_the_repr_shows_no_field(self) -> None:
        request, _ = read_request([with_fields(b"Authorization: Bearer sesame")])
        assert "sesame" not in repr(request)
        assert request is not None
        assert request.value("authorization") == "Bearer sesame"

    @pytest.mark.parametrize(
        ("target", "path"),
        [
            ("/", "/"),
            ("/a/b?c=/d?e", "/a/b"),
            ("/a%2Fb//.", "/a%2Fb//."),
            ("http://host/a?b", "/a"),
            ("HTTPS://host:1/a", "/a"),
            ("ws://host", "/"),
            ("http://host?/x", "/"),
            ("*", ""),
            ("host:443", ""),
            ("ftp://host/a", ""),
            ("http:///a", ""),
        ],
    )
    def test_path(self, target: str, path: str) -> None:
        assert Request("GET", target, ()).path == path


class TestFields:
    message = Request("GET", "/", (("a", "One, two,,\tTHREE"), ("b", "x"), ("a", "four"), ("c", "")))

    def test_values(self) -> None:
        assert self.message.values("A") == ["One, two,,\tTHREE", "four"]
        assert self.message.values("d") == []

    def test_value_joins_repeated_fields(self) -> None:
        assert self.message.value("b") == "x"
        assert self.message.value("a") == "One, two,,\tTHREE, four"
        assert self.message.value("c") == ""
        assert self.message.value("d") is None

    def test_elements_and_tokens(self) -> None:
        assert self.message.elements("a") == ["One", "two", "THREE", "four"]
        assert self.message.tokens("a") == ["one", "two", "three", "four"]
        assert self.message.tokens("c") == []


class TestRequestRefused:
    """Each text is wrong with its last byte: it is refused then, at once."""

    @pytest.mark.parametrize(
        ("head", "what"),
        [
            # RFC 9112 §3
            (b"\r", "byte 0x0d in the method"),
            (b"\n", "line feed without"),
            (b" ", "byte 0x20 in the method"),
            (b"\x00", "byte 0x00 in the method"),
            (b"\x80", "byte 0x80 in the method"),
            (b"{", "byte 0x7b in the method"),
            (b"GET\t", "byte 0x09 in the method"),
            (b"GET\r", "byte 0x0d in the method"),
            (b"GET  ", "byte 0x20 in the request target"),
            (b"GET /\r", "byte 0x0d in the request target"),  # HTTP/0.9
            (b"GET /\n", "line feed without"),
            (b"GET /\xc3", "byte 0xc3 in the request target"),
            (b"GET /\x7f", "byte 0x7f in the request target"),
            (b"GET /\t", "byte 0x09 in the request target"),
            (b"GET / h", "byte 0x68 in the HTTP version"),
            (b"GET / \r", "byte 0x0d in the HTTP version"),
            (b"GET / HTTP/1\r", "byte 0x0d in the HTTP version"),
            (b"GET / HTTP/x", "byte 0x78 in the HTTP version"),
            (b"GET / HTTP/1.1 ", "byte 0x20 in the HTTP version"),
            (b"GET / HTTP/1.12", "byte 0x32 in the HTTP version"),
            (b"GET / HTTP/1.1\n", "line feed without"),
            (b"GET / HTTP/1.1\rH", "carriage return without"),
            (b"GET / HTTP/1.1\r\r", "carriage return without"),
            (b"GET /a b", "byte 0x62 in the HTTP version"),
        ],
    )
    def test_request_line(self, head: bytes, what: str) -> None:
        error = refused(head)
        assert error.status == 400
        assert what in str(error)

    @pytest.mark.parametrize(
        ("fields", "what"),
        [
            (b" ", "folded header line"),  # RFC 9112 §2.2: before the first field
            (b"Host: a\r\n ", "folded header line"),  # RFC 9112 §5.2
            (b"Host: a\r\n\t", "folded header line"),
            (b"Host ", "white space between a field name and its colon"),  # RFC 9112 §5.1
            (b"Transfer-Encoding\t", "white space between a field name and its colon"),
            (b":", "byte 0x3a in the field name"),
            (b"Host\r", "byte 0x0d in the field name"),
            (b"Host\n", "line feed without"),
            (b"H\x00", "byte 0x00 in the field name"),
            (b"H(", "byte 0x28 in the field name"),
            (b"H\xe9", "byte 0xe9 in the field name"),
            (b"Host: a\n", "line feed without"),
            (b"Host: a\r\n\n", "line feed without"),
            (b"Host: a\rX", "carriage return without"),
            (b"Host: a\r\n\rX", "carriage return without"),
            (b"Host: a\x00", "byte 0x00 in the field value"),
            (b"Host: \x0b", "byte 0x0b in the field value"),
            (b"Host: a\x1b", "byte 0x1b in the field value"),
            (b"Host: a\x7f", "byte 0x7f in the field value"),
        ],
    )
    def test_field_lines(self, fields: bytes, what: str) -> None:
        error = refused(b"GET / HTTP/1.1\r\n" + fields)
        assert error.status == 400
        assert what in str(error)

    @pytest.mark.parametrize(
        ("before", "good"),
        [
            (b"G", rb"[-!#$%&'*+.^_`|~0-9A-Za-z ]"),
            (b"GET /", rb"[!-~ ]"),
            (b"GET / HTTP/1.1\r\nX", rb"[-!#$%&'*+.^_`|~0-9A-Za-z:]"),
            (b"GET / HTTP/1.1\r\nX:", rb"[\t\r -~\x80-\xff]"),
            (b"GET / HTTP/1.1\r\nX: y", rb"[\t\r -~\x80-\xff]"),
        ],
    )
    def test_every_byte_in_every_place(self, before: bytes, good: bytes) -> None:
        for byte in range(256):
            reader = RequestReader()
            assert reader.feed(before) is None
            if re.fullmatch(good, bytes([byte])):
                assert reader.feed(bytes([byte])) is None
            else:
                with pytest.raises(HandshakeError):
                    reader.feed(bytes([byte]))

    @pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/3.0"])
    def test_505_for_another_version(self, version: bytes) -> None:
        error = refused(b"GET / " + version)
        assert error.status == 505
        assert version.decode() in str(error)

    def test_505_for_the_preface_of_http2(self) -> None:
        with pytest.raises(HandshakeError, match=r"not HTTP/2\.0") as caught:
            RequestReader().feed(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert caught.value.status == 505

    def test_tls_on_a_plain_port(self) -> None:
        error = refused(b"\x16")
        assert error.status == 400
        assert "this port speaks plain HTTP, the client spoke TLS" in str(error)
        with pytest.raises(HandshakeError, match="spoke TLS"):
            RequestReader().feed(bytes.fromhex("1603010200010001fc0303"))

    @pytest.mark.parametrize(
        ("head", "what"),
        [
            (b"GET / HTTP/1.1\r\n\r\n", "Host"),
            (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", "Host"),
            (b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\nhOST: b\r\n\r\n", "Host"),
            (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", "no host"),
            (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", "no host"),
            (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", "no host"),
            (b"GET / HTTP/1.1\r\nHost: user@a\r\n\r\n", "no host"),
            (b"GET / HTTP/1.1\r\nHost: a:123456\r\n\r\n", "no host"),
            (b"GET / HTTP/1.1\r\nHost: ::1\r\n\r\n", "no host"),
            (with_fields(b"Upgrade: websocket", b"Content-Length: 0"), "content-length not allowed"),
            (with_fields(b"Upgrade: websocket", b"Content-Length: 5"), "content-length not allowed"),
            (with_fields(b"Transfer-Encoding: chunked", b"Upgrade: websocket"), "transfer-encoding not allowed"),
            (with_fields(b"Connection: close, uPgrade", b"Content-Length: 5"), "content-length not allowed"),
            (with_fields(b"Connection: Upgrade", b"Transfer-Encoding: chunked"), "transfer-encoding not allowed"),
            (with_fields(b"Upgrade: h2c", b"Transfer-Encoding: gzip"), "Transfer-Encoding"),
            (with_fields(b"Upgrade: h2c", b"Transfer-Encoding: chunked\t,identity"), "Transfer-Encoding"),
            (with_fields(b"Content-Length: 5", b"Transfer-Encoding: chunked"), "transfer-encoding and content-length"),
            (with_fields(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), "Transfer-Encoding"),
            (with_fields(b"Content-Length: 5", b"Content-Length: 6"), "Content-Length"),
            (with_fields(b"Content-Length: 5, 6"), "Content-Length"),
            (with_fields(b"Content-Length: +5"), "Content-Length"),
            (with_fields(b"Content-Length: -1"), "Content-Length"),
            (with_fields(b"Content-Length: " + b"9" * 40), "Content-Length"),
        ],
    )
    def test_what_spans_several_fields(self, head: bytes, what: str) -> None:
        error = refused(head)
        assert error.status == 400
        assert what in str(error)

    @pytest.mark.parametrize("host", [b"a", b"a.b-c_d", b"127.0.0.1:80", b"[::1]", b"[fe80::1%25eth0]:443", b"a:", b""])
    def test_hosts_that_are_hosts(self, host: bytes) -> None:
        request, _ = read_request([b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"])
        assert request is not None
        assert request.values("host") == [host.decode()]

    def test_messages_quote_nothing_that_a_terminal_would_obey(self) -> None:
        with pytest.raises(HandshakeError) as caught:
            RequestReader().feed(with_fields(b"Content-Length: \xff\x9b31m"))
        assert str(caught.value).isprintable()


class TestLimits:
    @staticmethod
    def head_of(size: int) -> bytes:
        head = b"GET / HTTP/1.1\r\nHost: a\r\nX: \r\n\r\n"
        return head.replace(b"X: ", b"X: " + b"x" * (size - len(head)))

    @pytest.mark.parametrize("size", [1, 1000, 100_000])
    def test_the_largest_head(self, size: int) -> None:
        head = self.head_of(limits.HEAD_BYTES)
        request, leftover = read_request(parts(head + FRAMES, size))
        assert request is not None
        assert leftover == FRAMES

    def test_431_with_the_first_byte_too_many(self) -> None:
        head = self.head_of(limits.HEAD_BYTES + 1)
        error = refused(head[:-1])
        assert error.status == 431
        assert str(limits.HEAD_BYTES) in str(error)

    @pytest.mark.parametrize("line", [b"G" * 40_000, b"GET /" + b"a" * 40_000])
    def test_414_for_the_first_line_alone(self, line: bytes) -> None:
        error = refused(line[: limits.HEAD_BYTES])
        assert error.status == 414
        with pytest.raises(HandshakeError) as caught:
            RequestReader().feed(line)
        assert caught.value.status == 414

    def test_414_when_the_version_does_not_fit(self) -> None:
        line = b"GET /" + b"a" * (limits.HEAD_BYTES - 10) + b" HTTP/1.1\r\n"
        assert refused(line[: limits.HEAD_BYTES]).status == 414

    def test_the_most_fields(self) -> None:
        fields = [b"X%d: y" % index for index in range(limits.HEAD_FIELDS - 1)]  # and Host
        request, _ = read_request([with_fields(*fields)])
        assert request is not None
        assert len(request.headers) == limits.HEAD_FIELDS
        error = refused(with_fields(*fields)[:-2] + b"Y:")
        assert error.status == 431
        assert f"more than {limits.HEAD_FIELDS}" in str(error)

    def test_memory_is_bounded_after_a_refusal(self) -> None:
        reader = RequestReader()
        for _ in range(100):
            with pytest.raises(HandshakeError):
                reader.feed(b"\x16" * limits.HEAD_BYTES)
        assert len(reader._buffer) <= limits.HEAD_BYTES

    @pytest.mark.parametrize("size", [1, 10, 100_000])
    def test_every_byte_is_looked_at_once(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        looked_at = 0

        def counting(run: Callable[..., int]) -> Callable[..., int]:
            def counted(reader: RequestReader, *args: object) -> int:
                nonlocal looked_at
                begin = reader._position
                end = run(reader, *args)
                looked_at += end - begin + 1
                return end

            return counted

        monkeypatch.setattr(RequestReader, "_end_of_run", counting(RequestReader._end_of_run))
        head = self.head_of(limits.HEAD_BYTES)
        assert read_request(parts(head, size))[0] is not None
        assert looked_at <= 2 * len(head)

    def test_the_scan_begins_where_the_last_one_stopped(self) -> None:
        reader = RequestReader()
        reader.feed(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 1000)
        at = reader._position
        assert at == len(reader._buffer)
        reader._buffer[at - 500] = 0  # was found good already: nobody looks again
        assert reader.feed(b"x") is None
        assert reader._position == at + 1


class TestResponse:
    @pytest.mark.parametrize("size", [1, 2, 5, 10_000])
    @pytest.mark.parametrize("trailing", [b"", b"\x81", FRAMES])
    def test_whole_and_in_pieces_with_trailing_bytes(self, size: int, trailing: bytes) -> None:
        response, leftover = read_response(parts(SWITCH + trailing, size))
        assert response == Response(101, "Switching Protocols", (("upgrade", "websocket"), ("connection", "Upgrade")))
        assert leftover == trailing

    @pytest.mark.parametrize(
        ("head", "response"),
        [
            (b"HTTP/1.1 200\r\n\r\n", Response(200, "", ())),
            (b"HTTP/1.1 200 \r\n\r\n", Response(200, "", ())),
            (b"HTTP/1.0 503 Not \xe9 now\t.\r\nX:y\r\n\r\n", Response(503, "Not \xe9 now\t.", (("x", "y"),))),
            (b"HTTP/1.1 999 ?\r\n\r\n", Response(999, "?", ())),
        ],
    )
    def test_status_lines(self, head: bytes, response: Response) -> None:
        assert read_response(parts(head, 1)) == (response, b"")
        assert read_response([head + b"body"]) == (response, b"body")

    @pytest.mark.parametrize("size", [1, 3, 10_000])
    def test_interim_answers_are_skipped(self, size: int) -> None:
        interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n"
        response, leftover = read_response(parts(interim + SWITCH + b"x", size))
        assert response is not None
        assert (response.status, leftover) == (101, b"x")
        assert len(response.headers) == 2

    def test_interim_answers_share_the_limit(self) -> None:
        with pytest.raises(NetworkError, match=f"longer than {limits.HEAD_BYTES} bytes"):
            ResponseReader().feed(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)

    def test_fields_are_counted_for_each_answer(self) -> None:
        interim = b"HTTP/1.1 103 .\r\n" + b"X: y\r\n" * 40 + b"\r\n"
        assert read_response([interim + interim + SWITCH])[0] is not None


class TestResponseRefused:
    @staticmethod
    def fault(data: bytes) -> str:
        with pytest.raises(NetworkError) as caught:
            ResponseReader().feed(data)
        assert caught.value.layer == "http"
        with pytest.raises(NetworkError):
            read_response(parts(data, 1))
        return str(caught.value)

    @pytest.mark.parametrize(
        ("data", "shown"),
        [
            (b"SSH-2.0-OpenSSH", "not HTTP: b'SSH-2.0-OpenSSH': check"),
            (b"220 mail ESMTP\r\n", r"not HTTP: b'220 mail ESMTP\r\n': check"),
            (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00", r"not HTTP: b'\x00\x00\x12\x04"),
            (b"HTTP/1.1 2x0 OK\r\n", r"not HTTP: b'HTTP/1.1 2x0 OK\r\n'"),
            (b"HTTP/1.1 2000\r\n", "not HTTP"),
            (b"HTTP/1.1 200\n", "not HTTP"),
            (b"HTTP/1.1  200", "not HTTP"),
            (b"\r\nHTTP/1.1 200", "not HTTP"),
            (b"\x15\x03\x01\x00\x02\x02\x46", "answered in TLS on this port: use a wss:// URL"),
            (b"HTTP/2.0 200 OK\r\n\r\n", "answered 'HTTP/2.0 200', which is not HTTP/1.1"),
            (b"HTTP/1.0 101 Switching Protocols\r\n\r\n", "answered 'HTTP/1.0 101', which is not HTTP/1.1"),
            (b"HTTP/1.1 099 Low\r\n\r\n", "malformed HTTP head"),
            (b"HTTP/1.1 200 O\x00K\r\n", "malformed HTTP head: byte 0x00 in the reason phrase"),
            (b"HTTP/1.1 200 OK\n", "malformed HTTP head: a line feed without"),
            (b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n", "malformed HTTP head: a folded header line"),
            (b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n", "malformed HTTP head: white space between"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "malformed HTTP head: conflicting"),
            (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 65, "more than 64 header fields"),
            (b"HTTP/1.1 200 " + b"x" * limits.HEAD_BYTES, f"longer than {limits.HEAD_BYTES} bytes"),
        ],
    )
    def test_says_what_came_instead(self, data: bytes, shown: str) -> None:
        assert shown in self.fault(data)

    @pytest.mark.parametrize("data", [b"\x9b" * 500, b"z" * 500, b"'\"" * 300])
    def test_what_came_is_escaped_and_cut(self, data: bytes) -> None:
        message = self.fault(data)
        shown = message.removeprefix("the server answered something that is not HTTP: ").partition(": check")[0]
        assert message.isprintable()
        assert len(shown) == 60
        assert shown.endswith("...")

    def test_garbage_after_an_interim_answer_is_shown(self) -> None:
        assert "b'garbage'" in self.fault(b"HTTP/1.1 100 Continue\r\n\r\ngarbage")


# --- fuzz -----------------------------------------------------------------------------------------------------------

PIECES = [
    *[b"\r\n", b"\r\n\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\x00", b"\x16", b"\x7f", b"\xff", b",", b"\r\n "],
    *[
        b"GET",
        b"POST",
        b"/",
        b"*",
        b"HTTP/1.1",
        b"HTTP/1.0",
        b"HTTP/2.0",
        b"101",
        b"200",
        b"100",
        b"HTTP/1.1 100 .\r\n\r\n",
    ],
    *[b"Host: a\r\n", b"Host : a\r\n", b"Upgrade: websocket\r\n", b"Connection: Upgrade\r\n", b"X: y\r\n" * 70],
    *[b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding:\x0bchunked\r\n", b"a" * 9000],
]


@st.composite
def mutated(draw: st.DrawFn, valid: list[bytes]) -> bytes:
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, len(data)))
        removed = draw(st.sampled_from([0, 0, 1, 2, 20]))
        data = data[:begin] + draw(st.sampled_from(PIECES) | st.binary(max_size=3)) + data[begin + removed :]
    return data + draw(st.sampled_from([b"", FRAMES, b"\r\n\r\n"]))


def anything(*valid: bytes) -> st.SearchStrategy[bytes]:
    return mutated(list(valid)) | st.binary(max_size=300) | st.lists(st.sampled_from(PIECES)).map(b"".join)


def cuts(draw: st.DataObject, data: bytes) -> list[bytes]:
    at = sorted(draw.draw(st.sets(st.integers(0, len(data)), max_size=8)))
    return [data[begin:end] for begin, end in zip([0, *at], [*at, len(data)], strict=True)]


def assert_strict(raw: bytes, first_line: bytes) -> list[tuple[bytes, bytes]]:
    """The policy once more, written the slow and obvious way."""
    assert len(raw) <= limits.HEAD_BYTES
    assert raw.endswith(b"\r\n\r\n")
    assert raw.count(b"\r\n\r\n") == 1
    first, *lines = raw[:-4].split(b"\r\n")
    assert re.fullmatch(first_line, first)
    assert len(lines) <= limits.HEAD_FIELDS
    fields = []
    for line in lines:
        assert not re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", line)
        name, colon, value = line.partition(b":")
        assert colon
        assert re.fullmatch(rb"[-!#$%&'*+.^_`|~\w]+", name)
        fields.append((name.lower(), value.strip(b" \t")))
    return fields


@settings(deadline=None)
@given(anything(GET, with_fields(), with_fields(b"Content-Length: 5")), st.data())
def test_requests_are_strict_or_refused_however_they_are_cut(data: bytes, draw: st.DataObject) -> None:
    outcomes: list[object] = []
    for pieces in ([data], parts(data, 1) if len(data) < 2000 else parts(data, 999), cuts(draw, data)):
        try:
            request, leftover = read_request(pieces)
        except HandshakeError as error:
            assert error.status in (400, 414, 431, 505)
            assert str(error).isprintable()
            outcomes.append((error.status, str(error)))
            continue
        outcomes.append((request, leftover))
        if request is None:
            assert len(data) < limits.HEAD_BYTES
            continue
        assert data.endswith(leftover)
        fields = assert_strict(data[: len(data) - len(leftover)], rb"[!-~]+ [!-~]+ HTTP/1\.1")
        names = [name for name, _ in fields]
        assert names.count(b"host") == 1
        body = {b"content-length", b"transfer-encoding"} & set(names)
        assert len(body) < 2
        assert not (body and b"upgrade" in names)
        assert [name.decode() for name, _ in fields] == [name for name, _ in request.headers]
    assert outcomes[0] == outcomes[1] == outcomes[2]


@settings(deadline=None)
@given(anything(SWITCH, b"HTTP/1.0 502 Bad Gateway\r\nContent-Length: 5\r\n\r\nhello"), st.data())
def test_responses_are_strict_or_refused_however_they_are_cut(data: bytes, draw: st.DataObject) -> None:
    outcomes: list[object] = []
    for pieces in ([data], parts(data, 1) if len(data) < 2000 else parts(data, 999), cuts(draw, data)):
        try:
            response, leftover = read_response(pieces)
        except NetworkError as error:
            assert error.layer == "http"
            assert str(error).isprintable()
            outcomes.append("refused")
            continue
        outcomes.append((response, leftover))
        if response is None:
            assert len(data) < limits.HEAD_BYTES
            continue
        raw = data[: len(data) - len(leftover)]
        raw = raw[raw[:-4].rfind(b"\r\n\r\n") + 4 if raw[:-4].rfind(b"\r\n\r\n") >= 0 else 0 :]
        fields = assert_strict(raw, rb"HTTP/1\.[01] [1-9][0-9][0-9]( [\t\x20-\x7e\x80-\xff]*)?")
        assert response.status == 101 or response.status >= 200
        assert {name.decode() for name, _ in fields} == {name for name, _ in response.headers}
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_every_step_but_the_end_has_a_rule() -> None:
    assert set(http1._TABLE) == set(http1._Step) - {http1._Step.DONE}
