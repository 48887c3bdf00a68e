"""wire/connect.py: what a proxy may answer to CONNECT. Each answer whole and byte by byte."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wstunnel import limits
from wstunnel.errors import NetworkError
from wstunnel.wire.connect import ConnectRequest

OPEN = b"HTTP/1.1 200 Connection established\r\n\r\n"


def refusal(answer: bytes, pieces: int = 1 << 20, *, credentials: tuple[str, str] | None = None) -> str:
    """What is said of an answer behind which the proxy closes."""
    connect = ConnectRequest("tunnel.example.org", 443, credentials=credentials)
    with pytest.raises(NetworkError) as caught:
        for start in range(0, len(answer), pieces):
            assert not connect.feed(answer[start : start + pieces])
        connect.eof()
    assert caught.value.layer == "proxy"
    return str(caught.value)


class TestRequest:
    def test_rfc_9110_9_3_6(self) -> None:
        connect = ConnectRequest("tunnel.example.org", 443, agent="wstunnel/1")
        assert connect.request() == (
            b"CONNECT tunnel.example.org:443 HTTP/1.1\r\nHost: tunnel.example.org:443\r\nUser-Agent: wstunnel/1\r\n\r\n"
        )

    def test_an_ipv6_address_stands_in_brackets(self) -> None:
        assert ConnectRequest("::1", 80).request() == b"CONNECT [::1]:80 HTTP/1.1\r\nHost: [::1]:80\r\n\r\n"

    def test_basic_authentication_in_utf_8(self) -> None:
        request = ConnectRequest("h", 1, credentials=("Jörg", "p:w")).request()
        field = next(line for line in request.split(b"\r\n") if line.startswith(b"Proxy-Authorization: Basic "))
        assert base64.b64decode(field.rsplit(b" ", 1)[1]).decode() == "Jörg:p:w"


@pytest.mark.parametrize("pieces", [1 << 20, 1])
class TestOpen:
    @pytest.mark.parametrize(
        "answer",
        [
            OPEN,
            b"HTTP/1.0 200 OK\r\nProxy-agent: tinyproxy\r\n\r\n",
            b"HTTP/1.1 200\r\nContent-Length: 10\r\n\r\n",  # to be ignored, RFC 9110 §9.3.6
            b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length:many\r\nVia: x\r\nCONTENT-LENGTH: 1\r\nContent-Length:\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n" + OPEN,
        ],
    )
    def test_2xx(self, answer: bytes, pieces: int) -> None:
        connect = ConnectRequest("h", 1)
        seen = [connect.feed(answer[start : start + pieces]) for start in range(0, len(answer), pieces)]
        assert seen == [False] * (len(seen) - 1) + [True]
        assert not connect.refused


def test_bytes_behind_the_answer_are_nobodys() -> None:
    with pytest.raises(NetworkError, match="sent bytes behind its answer"):
        ConnectRequest("h", 1).feed(OPEN + b"x")


@pytest.mark.parametrize("pieces", [1 << 20, 1])
class TestRefusals:
    @pytest.mark.parametrize(
        ("answer", "texts"),
        [
            (
                b'HTTP/1.1 407 Auth\r\nProxy-Authenticate: Basic realm="a, b"\r\nContent-Length: 0\r\n\r\n',
                ("wants user and password (407: Auth)", "http://USER:PASSWORD@HOST:PORT"),
            ),
            (
                b"HTTP/1.1 407 Auth\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n\r\n",
                ("wants Negotiate or NTLM authentication (407: Auth)", "cntlm"),
            ),
            (
                b'HTTP/1.1 407 x\r\nProxy-Authenticate: Negotiate, Basic realm="x", charset="UTF-8"\r\n\r\n',
                ("wants user and password",),
            ),
            (b"HTTP/1.1 407 x\r\n\r\n", ("wants user and password",)),
            (
                b"HTTP/1.1 403 Filtered\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
                ("does not allow tunnel.example.org:443 (403: Filtered)", "port 443"),
            ),
            (
                b"HTTP/1.1 403 Forbidden\r\nContent-Length: 14\r\n\r\nnot this host\n",
                ("(403: not this host)",),
            ),
            (
                b"HTTP/1.1 503 Service Unavailable\r\nX-Squid-Error: ERR_CONNECT_FAIL 111\r\n\r\n<html>",
                ("could not reach tunnel.example.org:443 (503: Service Unavailable: ERR_CONNECT_FAIL 111)",),
            ),
            (
                b"HTTP/1.1 502 Bad\r\nProxy-Status: p; error=dns_error\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"5\r\nno na\r\n3\r\nme\n\r\n0\r\n\r\n",
                ("(502: no name: p; error=dns_error)",),
            ),
            (b"HTTP/1.1 504 \r\n\r\n", ("could not reach tunnel.example.org:443 (504)",)),
            (b"HTTP/1.1 405 No\r\n\r\n", ("does not do CONNECT (405: No)",)),
            (b"HTTP/1.1 500 Unable to connect\r\n\r\n", ("failed to connect", "500: Unable to connect")),
            (b"HTTP/1.1 302 Login\r\nLocation: http://portal/\r\n\r\n", ("refused to connect", "(302: Login)")),
            (b"HTTP/1.1 101 Switching\r\n\r\n", ("refused to connect", "(101: Switching)")),
            (b"HTTP/1.1 403 \x1b[31mred\r\n\r\n", ("malformed HTTP head: byte 0x1b",)),
            (b"HTTP/1.1 403 x\r\nContent-Length: many\r\n\r\n", ("malformed HTTP head",)),
            (b"HTTP/1.1 403 x\r\n\r\n\x1b[31mred", (r"403: \x1b[31mred",)),
        ],
    )
    def test_with_the_proxys_own_words(self, answer: bytes, texts: tuple[str, ...], pieces: int) -> None:
        said = refusal(answer, pieces)
        for text in texts:
            assert text in said

    @pytest.mark.parametrize("status", [b"407", b"401"])
    def test_credentials_that_are_refused(self, status: bytes, pieces: int) -> None:
        answer = b"HTTP/1.1 " + status + b' No\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n'
        said = refusal(answer, pieces, credentials=("ann", "hunter2"))
        assert "the proxy refused user and password" in said
        assert "hunter2" not in said

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            (b"", "closed the connection without an answer"),
            (b"HTTP/1.1 20", "closed the connection in the middle of its answer"),
            (b"\x15\x03\x01\x00\x02\x02\x46", "write https:// in its URL"),
            (b"SSH-2.0-OpenSSH\r\n", "the proxy answered something that is not HTTP"),
            (b"\x05\x00", "the proxy answered something that is not HTTP"),
            (b"HTTP/2.0 200 OK\r\n\r\n", "the proxy answered 'HTTP/2.0 200', which is not HTTP/1.1"),
            (OPEN.replace(b"\r\n", b"\n"), "a line feed without a carriage return"),
            (b"HTTP/1.1 200 x\r\nA: " + b"a" * limits.HEAD_BYTES, "it is longer than 16384 bytes"),
        ],
    )
    def test_what_is_no_answer(self, answer: bytes, text: str, pieces: int) -> None:
        assert text in refusal(answer, pieces)


def test_a_refusal_is_seen_before_its_words_end() -> None:
    connect = ConnectRequest("h", 1)
    assert not connect.feed(b"HTTP/1.1 403 No\r\nContent-Length: 100\r\n\r\nbecause")
    assert connect.refused
    with pytest.raises(NetworkError, match="because"):
        connect.eof()


def test_a_refusals_words_are_bounded() -> None:
    connect = ConnectRequest("h", 1)
    with pytest.raises(NetworkError) as caught:
        for _ in range(100):
            assert not connect.feed((b"HTTP/1.1 403 No\r\n\r\n" if not connect.refused else b"") + b"x" * 1000)
    assert len(str(caught.value)) < 500


@given(st.lists(st.binary(max_size=40)), st.sampled_from([b"", b"HTTP/1.1 ", b"HTTP/1.1 200 ", b"HTTP/1.0 407 x\r\n"]))
def test_garbage(parts: list[bytes], start: bytes) -> None:
    connect = ConnectRequest("h", 1)
    try:
        for part in [start, *parts]:
            if connect.feed(part):
                return
        connect.eof()
    except NetworkError as error:
        assert error.layer == "proxy"
