"""The HTTP proxy's requests: what goes on and what does not; each refusal; whole, byte by byte and in random splits."""

from __future__ import annotations

import base64

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel import limits
from wstunnel.errors import HandshakeError
from wstunnel.wire.http_body import ChunkedBody, EndlessBody, SizedBody
from wstunnel.wire.http_proxy import ESTABLISHED, HttpProxyServer, ProxyRequest, failure, refusal

BASIC = b"Proxy-Authorization: Basic " + base64.b64encode(b"bob:se:same")


def judge(user: bytes, password: bytes) -> bool:
    return (user, password) == (b"bob", b"se:same")


def request(line: bytes, *fields: bytes, host: bytes | None = b"whatever") -> bytes:
    lines = [line, *([] if host is None else [b"Host: " + host]), *fields]
    return b"".join(each + b"\r\n" for each in [*lines, b""])


def run(data: bytes, sizes: list[int], *, login: bool = False) -> tuple[ProxyRequest | None, bytes, tuple[int, str]]:
    """The request of `data` cut into `sizes` and the rest, what is left over, and status and words of the refusal."""
    server = HttpProxyServer(judge if login else None)
    found = None
    position = 0
    for size in [*sizes, len(data)]:
        try:
            found = server.feed(data[position : position + size])
        except HandshakeError as error:
            with pytest.raises(HandshakeError) as again:
                server.feed(b"\r\n\r\n")
            assert (again.value.status, str(again.value)) == (error.status, str(error))
            return None, b"", (error.status, str(error))
        assert len(server._reader._buffer) <= limits.HEAD_BYTES
        position += size
    return found, server.leftover, (0, "")


def accepted(data: bytes, *, login: bool = False) -> ProxyRequest:
    """The request of `data`, the same with bytes behind it, byte by byte, and with its last byte only."""
    whole, leftover, refused = run(data, [], login=login)
    assert whole is not None, refused
    assert leftover == b""
    for sizes in ([], [1] * len(data), [len(data)]):
        assert run(data + b"\x16early\r\n\r\n", sizes, login=login) == (whole, b"\x16early\r\n\r\n", (0, ""))
    assert run(data[:-1], [], login=login) == (None, b"", (0, ""))
    return whole


def refused(data: bytes, *, login: bool = False) -> tuple[int, str]:
    """Status and words for `data`, the same byte by byte."""
    found, _, error = run(data, [], login=login)
    assert found is None
    assert error[0]
    assert run(data, [1] * len(data), login=login)[2] == error
    return error


class TestConnect:
    """RFC 9110 §9.3.6."""

    @pytest.mark.parametrize(
        ("target", "host", "port"),
        [
            (b"example.org:443", "example.org", 443),
            (b"Example.ORG:1", "example.org", 1),
            (b"192.0.2.1:65535", "192.0.2.1", 65535),
            (b"[2001:DB8::1]:22", "2001:db8::1", 22),
        ],
    )
    def test_targets(self, target: bytes, host: str, port: int) -> None:
        found = accepted(request(b"CONNECT " + target + b" HTTP/1.1", b"Proxy-Connection: keep-alive"))
        assert found == ProxyRequest("CONNECT", host, port, b"", EndlessBody())
        assert isinstance(found.body, EndlessBody)

    def test_as_nc_sends_it(self) -> None:
        found = accepted(request(b"CONNECT example.org:22 HTTP/1.0", host=None))
        assert (found.host, found.port) == ("example.org", 22)

    def test_an_empty_body_is_none(self) -> None:
        assert accepted(request(b"CONNECT a:1 HTTP/1.1", b"Content-Length: 0")).port == 1

    @pytest.mark.parametrize(
        ("target", "error"),
        [
            (b"example.org", "the port is missing"),
            (b"example.org:", "the port is missing"),
            (b"example.org:0", "0 is no port"),
            (b"example.org:65536", "65536 is no port"),
            (b"example.org:100000", "no host"),
            (b"example.org:+80", "no host"),
            (b":443", "no host"),
            (b"::1:443", "no host"),
            (b"[::1:443", "no host"),
            (b"[1.2.3.4]:443", "no host"),
            (b"/path", "no host"),
            (b"http://example.org:80", "no host"),
            (b"user:word@example.org:80", "a user name or password"),
        ],
    )
    def test_wrong_targets(self, target: bytes, error: str) -> None:
        status, message = refused(request(b"CONNECT " + target + b" HTTP/1.1"))
        assert status == 400
        assert error in message
        assert "word@" not in message

    @pytest.mark.parametrize("field", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
    def test_a_body(self, field: bytes) -> None:
        assert refused(request(b"CONNECT a:1 HTTP/1.1", field)) == (400, "a CONNECT request has no body")

    def test_the_answer(self) -> None:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="CONNECT", target="a:1", headers=[("Host", "a:1")]))
        client.receive_data(ESTABLISHED + b"hi")
        response = client.next_event()
        assert isinstance(response, h11.Response)
        assert response.status_code == 200
        assert client.trailing_data == (b"hi", False)


class TestAbsoluteForm:
    """RFC 9112 §3.2.2."""

    @pytest.mark.parametrize(
        ("url", "host", "port", "target", "field"),
        [
            (b"http://example.org/", "example.org", 80, "/", "example.org"),
            (b"http://example.org", "example.org", 80, "/", "example.org"),
            (b"HTTP://Example.ORG:80/A?b", "example.org", 80, "/A?b", "example.org"),
            (b"http://example.org:/a", "example.org", 80, "/a", "example.org"),
            (b"http://example.org:8080/a/../b?c=http://d/?e", "example.org", 8080, "/a/../b?c=http://d/?e", ":8080"),
            (b"http://example.org?a/b", "example.org", 80, "/?a/b", "example.org"),
            (b"http://[2001:DB8::1]:8080/", "2001:db8::1", 8080, "/", "[2001:db8::1]:8080"),
            (b"http://[::1]/", "::1", 80, "/", "[::1]"),
            (b"http://192.0.2.1/", "192.0.2.1", 80, "/", "192.0.2.1"),
        ],
    )
    def test_urls(self, url: bytes, host: str, port: int, target: str, field: str) -> None:
        found = accepted(request(b"GET " + url + b" HTTP/1.1"))
        assert (found.method, found.host, found.port) == ("GET", host, port)
        field = f"{host}{field}" if field.startswith(":") else field
        assert found.head == f"GET {target} HTTP/1.1\r\nHost: {field}\r\nConnection: close\r\n\r\n".encode()

    def test_what_goes_on_and_what_does_not(self) -> None:
        found = accepted(
            request(
                b"GET http://a/ HTTP/1.1",
                b"User-Agent: caf\xe9",
                b"Connection: keep-alive, X-Mine , x-other",
                b"X-MINE: dropped",
                b"X-Other: dropped",
                b"Cookie: a=b",
                b"Cookie: c=d",
                b"Proxy-Connection: keep-alive",
                b"Proxy-Authorization: Basic secret",
                b"Keep-Alive: 300",
                b"TE: trailers, deflate;q=0.5",
                b"Upgrade: h2c",
                b"X-Empty:",
                b"Authorization: Bearer token",
                b"Max-Forwards: 0",
            )
        )
        assert found.head == (
            b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: caf\xe9\r\nCookie: a=b\r\nCookie: c=d\r\nX-Empty: \r\n"
            b"Authorization: Bearer token\r\nMax-Forwards: 0\r\nTE: trailers\r\nConnection: close, TE\r\n\r\n"
        )
        assert "token" not in repr(found)
        h11.Connection(h11.SERVER).receive_data(found.head)

    def test_te_without_trailers(self) -> None:
        found = accepted(request(b"GET http://a/ HTTP/1.1", b"TE: deflate", b"Connection: TE"))
        assert found.head == b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"

    @pytest.mark.parametrize("named", [b"Host", b"content-length", b"close, Transfer-Encoding"])
    def test_what_connection_may_not_name(self, named: bytes) -> None:
        status, message = refused(request(b"GET http://a/ HTTP/1.1", b"Connection: " + named))
        assert (status, message) == (400, "bad request head: a field that Connection may not name")

    def test_http_1_0(self) -> None:
        found = accepted(request(b"GET http://a/ HTTP/1.0", host=None))
        assert found.head == b"GET / HTTP/1.0\r\nHost: a\r\nConnection: close\r\n\r\n"

    @pytest.mark.parametrize(
        ("url", "error"),
        [
            (b"/", "this is a proxy, not a web server"),
            (b"*", "this is a proxy, not a web server"),
            (b"https://a/", "CONNECT only"),
            (b"HTTPS://a/", "CONNECT only"),
            (b"ftp://a/", "not ftp://"),
            (b"ws://a/", "not ws://"),
            (b"a:80", "no http:// URL"),
            (b"http:/a", "no http:// URL"),
            (b"http://a/#b", "no http:// URL"),
            (b"http:///a", "no host"),
            (b"http://?a", "no host"),
            (b"http://a:0/", "0 is no port"),
            (b"http://a:99999/", "99999 is no port"),
            (b"http://a%20b/", "no host"),
            (b"http://user:word@a/", "a user name or password"),
        ],
    )
    def test_wrong_urls(self, url: bytes, error: str) -> None:
        status, message = refused(request(b"GET " + url + b" HTTP/1.1"))
        assert status == 400
        assert error in message
        assert "word@" not in message

    def test_options(self) -> None:
        """RFC 9112 §3.2.4: an OPTIONS without a path is about the server as a whole."""
        assert accepted(request(b"OPTIONS http://a HTTP/1.1")).head.startswith(b"OPTIONS * HTTP/1.1\r\n")
        assert accepted(request(b"OPTIONS http://a/ HTTP/1.1")).head.startswith(b"OPTIONS / HTTP/1.1\r\n")
        assert accepted(request(b"OPTIONS http://a?b HTTP/1.1")).head.startswith(b"OPTIONS /?b HTTP/1.1\r\n")

    @pytest.mark.parametrize("method", [b"OPTIONS", b"TRACE"])
    def test_max_forwards(self, method: bytes) -> None:
        found = accepted(request(method + b" http://a/ HTTP/1.1", b"Max-Forwards: 10"))
        assert b"\r\nMax-Forwards: 9\r\n" in found.head
        for value, error in ((b"0", "ends this"), (b"x", "no number"), (b"-1", "no number"), (b"1, 2", "no number")):
            status, message = refused(request(method + b" http://a/ HTTP/1.1", b"Max-Forwards: " + value))
            assert status == 400
            assert error in message


class TestBodies:
    def test_none(self) -> None:
        found = accepted(request(b"GET http://a/ HTTP/1.1"))
        assert isinstance(found.body, SizedBody)
        assert found.body.feed(b"GET http://elsewhere/ HTTP/1.1") == b""

    def test_sized(self) -> None:
        server = HttpProxyServer()
        found = server.feed(request(b"POST http://a/ HTTP/1.1", b"Content-Length: 3", b"Expect: 100-continue") + b"ab")
        assert found is not None
        assert b"\r\nContent-Length: 3\r\nExpect: 100-continue\r\n" in found.head
        assert found.body.feed(server.leftover) == b"ab"
        assert found.body.feed(b"cGET ") == b"c"
        assert found.body.complete

    def test_chunked(self) -> None:
        found = accepted(request(b"POST http://a/ HTTP/1.1", b"transfer-encoding: Chunked"))
        assert b"\r\ntransfer-encoding: chunked\r\n" in found.head  # h11 writes its value in lower case
        assert isinstance(found.body, ChunkedBody)
        assert found.body.feed(b"1\r\nx\r\n0\r\n\r\nGET ") == b"1\r\nx\r\n0\r\n\r\n"

    def test_beside_an_upgrade_that_is_dropped(self) -> None:
        """As Java's HttpClient sends it."""
        found = accepted(
            request(
                b"POST http://a/ HTTP/1.1",
                b"Connection: Upgrade, HTTP2-Settings",
                b"Content-Length: 3",
                b"HTTP2-Settings: AAEAAEAA",
                b"Upgrade: h2c",
            )
        )
        assert found.head == b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"

    @pytest.mark.parametrize(
        ("line", "fields"),
        [
            (b"POST http://a/ HTTP/1.1", (b"Content-Length: 3", b"Transfer-Encoding: chunked")),
            (b"POST http://a/ HTTP/1.0", (b"Transfer-Encoding: chunked",)),
            (b"POST http://a/ HTTP/1.1", (b"Transfer-Encoding: gzip, chunked",)),
            (b"POST http://a/ HTTP/1.1", (b"Content-Length: 3", b"Content-Length: 4")),
            (b"POST http://a/ HTTP/1.1", (b"Content-Length: x",)),
        ],
    )
    def test_smuggling(self, line: bytes, fields: tuple[bytes, ...]) -> None:
        assert refused(request(line, *fields))[0] == 400


class TestWebSocket:
    FIELDS = (b"Upgrade: WebSocket", b"Connection: keep-alive, upgrade", b"Sec-WebSocket-Key: x")

    def test_goes_on(self) -> None:
        found = accepted(request(b"GET http://a/ws HTTP/1.1", *self.FIELDS))
        assert found.head == (
            b"GET /ws HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key: x\r\n"
            b"Upgrade: websocket\r\nConnection: close, Upgrade\r\n\r\n"
        )
        assert isinstance(found.body, EndlessBody)

    def test_not_asked_for_by_connection(self) -> None:
        found = accepted(request(b"GET http://a/ws HTTP/1.1", b"Upgrade: websocket"))
        assert b"pgrade" not in found.head
        assert isinstance(found.body, SizedBody)

    def test_with_a_body(self) -> None:
        assert accepted(request(b"GET http://a/ws HTTP/1.1", *self.FIELDS, b"Content-Length: 0"))
        for field in (b"Content-Length: 3", b"Transfer-Encoding: chunked"):
            status, message = refused(request(b"GET http://a/ws HTTP/1.1", *self.FIELDS, field))
            assert (status, message) == (400, "bad request head: a body beside an upgrade to WebSocket")


class TestLogin:
    """RFC 7617."""

    @pytest.mark.parametrize("line", [b"CONNECT a:1 HTTP/1.1", b"GET http://a:1/ HTTP/1.1"])
    def test_right(self, line: bytes) -> None:
        found = accepted(request(line, BASIC), login=True)
        assert (found.host, found.port) == ("a", 1)
        assert b"Basic" not in found.head
        assert accepted(request(line, BASIC.replace(b"Basic ", b"bASIC  ")), login=True)
        assert accepted(request(line, b"Proxy-Authorization: nonsense"))  # nobody asked for it

    @pytest.mark.parametrize(
        ("fields", "error"),
        [
            ((), "demands a user name and a password"),
            ((b"Authorization: " + BASIC.partition(b" ")[2],), "demands a user name and a password"),
            ((b"Proxy-Authorization: Bearer x",), "one Basic user name"),
            ((b"Proxy-Authorization:",), "one Basic user name"),
            ((BASIC, BASIC), "one Basic user name"),
            ((b"Proxy-Authorization: Basic",), "malformed"),
            ((b"Proxy-Authorization: Basic Ym9i",), "malformed"),
            ((BASIC + b"*",), "malformed"),
            ((b"Proxy-Authorization: Basic Ym9",), "malformed"),
            ((b"Proxy-Authorization: Basic caf\xe9",), "malformed"),
            ((b"Proxy-Authorization: Basic " + base64.b64encode(b"bob:wrong"),), "wrong user name or password"),
            ((b"Proxy-Authorization: Basic " + base64.b64encode(b":"),), "wrong user name or password"),
        ],
    )
    def test_wrong(self, fields: tuple[bytes, ...], error: str) -> None:
        data = request(b"CONNECT a:1 HTTP/1.1", *fields)
        status, message = refused(data, login=True)
        assert status == 407
        assert error in message
        with pytest.raises(HandshakeError) as caught:
            HttpProxyServer(judge).feed(data)
        answer = refusal(caught.value)
        assert answer.startswith(b"HTTP/1.1 407 Proxy Authentication Required\r\nConnection: close\r\n")
        assert b'\r\nProxy-Authenticate: Basic realm="wstunnel", charset="UTF-8"\r\n' in answer

    def test_comes_before_anything_is_said_of_the_target(self) -> None:
        assert refused(request(b"GET /nowhere HTTP/1.1"), login=True)[0] == 407


class TestNoProxyRequest:
    @pytest.mark.parametrize(
        ("data", "status", "error"),
        [
            (b"\x16\x03\x01\x02", 400, "the client spoke TLS: use http:// for it"),
            (b"\x05\x01\x00", 400, "spoke SOCKS5"),
            (b"\x04\x01\x00", 400, "spoke SOCKS4"),
            (b"\x00", 400, "byte 0x00"),
            (b"GET http://a/ HTTP/1.1\n", 400, "line feed without"),
            (b"GET http://a/ HTTP/1.1\r\nA : b\r\n", 400, "white space between"),
            (b"GET http://a/ HTTP/1.1\r\n\r\n", 400, "Host"),
            (b"GET http://a/ HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400, "Host"),
            (b"GET http://a/ HTTP/0.9\r\n", 505, "not HTTP/0.9"),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "not HTTP/2.0"),
            (b"GET http://a/" + b"x" * limits.HEAD_BYTES, 414, "first line"),
            (request(b"GET http://a/ HTTP/1.1", b"X: " + b"x" * limits.HEAD_BYTES), 431, "longer than"),
            (request(b"GET http://a/ HTTP/1.1", *[b"X: x"] * limits.HEAD_FIELDS), 431, "header fields"),
        ],
    )
    def test_refused(self, data: bytes, status: int, error: str) -> None:
        found, message = refused(data)
        assert found == status
        assert error in message


class TestAnswers:
    @pytest.mark.parametrize(
        ("code", "line"),
        [
            ("forbidden", b"403 Forbidden"),
            ("timeout", b"504 Gateway Timeout"),
            ("limit", b"503 Service Unavailable"),
            ("refused", b"502 Bad Gateway"),
            ("unreachable", b"502 Bad Gateway"),
            ("name-not-found", b"502 Bad Gateway"),
            ("internal", b"502 Bad Gateway"),
            ("made up", b"502 Bad Gateway"),
        ],
    )
    def test_a_target_that_could_not_be_reached(self, code: str, line: bytes) -> None:
        answer = refusal(failure(code, "db:5432: because of caf\xe9"))
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
        client.receive_data(answer)
        response = client.next_event()
        assert isinstance(response, h11.Response)
        assert answer.startswith(b"HTTP/1.1 " + line + b"\r\n")
        assert dict(response.headers)[b"content-type"] == b"text/plain; charset=utf-8"
        assert dict(response.headers)[b"connection"] == b"close"
        body = client.next_event()
        assert isinstance(body, h11.Data)
        assert bytes(body.data) == "db:5432: because of caf\xe9\n".encode()


PIECES = st.sampled_from(
    [
        *(b"GET ", b"CONNECT ", b"OPTIONS ", b"http://", b"https://", b"a", b"[::1]", b":80", b"/p", b"?q", b" ", b"@"),
        *(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"Host: a\r\n", b"\r\n", b"\r\n\r\n", b"Connection: upgrade, te\r\n"),
        *(b"Upgrade: websocket\r\n", b"TE: trailers\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n"),
        *(BASIC + b"\r\n", b"Max-Forwards: 1\r\n", b"X: \xff\r\n", b"Connection: x, host\r\n"),
        b"GET http://a:80/ HTTP/1.1\r\nHost: a\r\n",
    ]
)


class TestAnything:
    @given(
        st.lists(PIECES | st.binary(max_size=4), max_size=12).map(b"".join),
        st.lists(st.integers(0, 30)),
        st.booleans(),
    )
    def test_any_bytes_in_any_split(self, data: bytes, sizes: list[int], login: bool) -> None:
        whole = run(data, [], login=login)
        assert run(data, sizes, login=login) == whole
        found = whole[0]
        if found is None or found.method == "CONNECT":
            return
        # What goes on is one head, and means to h11 what was meant here.
        server = h11.Connection(h11.SERVER)
        server.receive_data(found.head)
        event = server.next_event()
        assert isinstance(event, h11.Request)
        assert event.target.startswith(b"/") or event.target == b"*"
        assert b"close" in dict(event.headers)[b"connection"]
        if isinstance(found.body, SizedBody) and found.body.complete:
            assert isinstance(server.next_event(), h11.EndOfMessage)
        assert not server.trailing_data[0]
