"""The opening handshake, both roles: against the RFC's example, against `websockets`, against liars and proxies."""

from __future__ import annotations

import base64

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.http11 import Request as PeerRequest
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from wstunnel import limits
from wstunnel.errors import HandshakeError, NetworkError, ServerRefusedError, UsageError, WstunnelError
from wstunnel.wire.handshake import ClientUpgrade, Upgrade, accept, accept_response, bearer_token, refusal
from wstunnel.wire.http1 import Request, RequestReader

# RFC 6455 §1.3
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
KEY_BYTES = b"the sample nonce"
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="

FIELDS = (
    ("host", "example.org"),
    ("upgrade", "websocket"),
    ("connection", "Upgrade"),
    ("sec-websocket-key", KEY),
    ("sec-websocket-version", "13"),
    ("sec-websocket-protocol", "wstunnel.1"),
)


def request(*extra: tuple[str, str], without: str = "", method: str = "GET", target: str = "/") -> Request:
    return Request(method, target, tuple(field for field in FIELDS if field[0] != without) + extra)


def judge(asked: Request, origins: tuple[str, ...] = ()) -> Upgrade:
    return accept(asked, path="/", subprotocols=["wstunnel.1"], origins=origins)


def refused(asked: Request, origins: tuple[str, ...] = ()) -> HandshakeError:
    with pytest.raises(HandshakeError) as caught:
        judge(asked, origins)
    return caught.value


class TestAccept:
    """RFC 6455 §4.2.1."""

    def test_takes_what_the_rfc_describes(self) -> None:
        asked = request()
        assert judge(asked) == Upgrade(KEY, "wstunnel.1", asked)

    def test_case_and_company_do_not_matter(self) -> None:
        asked = request(("upgrade", "h2c, WebSocket"), ("connection", "keep-alive, UPGRADE"), without="upgrade")
        assert judge(asked).key == KEY

    def test_the_repr_shows_no_token(self) -> None:
        assert "sesame" not in repr(judge(request(("authorization", "Bearer sesame"))))

    @pytest.mark.parametrize("method", ["POST", "get", "HEAD", "CONNECT"])
    def test_405_for_other_methods(self, method: str) -> None:
        error = refused(request(method=method))
        assert (error.status, error.headers) == (405, (("Allow", "GET"),))

    @pytest.mark.parametrize("target", ["/x", "//", "*", "/%2F", "host:1", "/../"])
    def test_404_for_other_paths(self, target: str) -> None:
        error = refused(request(target=target))
        assert (error.status, error.headers) == (404, ())

    @pytest.mark.parametrize("target", ["/", "/?a=b", "http://example.org?/x"])
    def test_the_query_string_is_no_part_of_the_path(self, target: str) -> None:
        assert judge(request(target=target)).subprotocol == "wstunnel.1"

    @pytest.mark.parametrize(
        ("without", "extra"),
        [
            ("upgrade", ()),
            ("upgrade", (("upgrade", "h2c"),)),
            ("connection", ()),
            ("connection", (("connection", "keep-alive"),)),
        ],
    )
    def test_426_for_no_upgrade(self, without: str, extra: tuple[tuple[str, str], ...]) -> None:
        error = refused(request(*extra, without=without))
        assert (error.status, error.headers) == (426, (("Upgrade", "websocket"),))

    def test_a_browser_is_told_what_this_is(self) -> None:
        error = refused(Request("GET", "/", (("host", "example.org"),)))
        assert error.status == 426
        assert "this is a wstunnel server" in str(error)

    @pytest.mark.parametrize("extra", [(), ("8",), ("13", "13"), ("8, 13",), ("013",)])
    def test_426_for_other_versions(self, extra: tuple[str, ...]) -> None:
        fields = [("sec-websocket-version", version) for version in extra]
        error = refused(request(*fields, without="sec-websocket-version"))
        assert error.status == 426
        assert ("Sec-WebSocket-Version", "13") in error.headers

    @pytest.mark.parametrize(
        "keys",
        [(), (KEY, KEY), ("",), (KEY[:-1],), ("A" * 24,), ("A" * 20 + "====",), (KEY + "\n",), ("!" * 22 + "==",)],
    )
    def test_400_for_a_bad_key(self, keys: tuple[str, ...]) -> None:
        fields = [("sec-websocket-key", key) for key in keys]
        error = refused(request(*fields, without="sec-websocket-key"))
        assert error.status == 400
        assert "Sec-WebSocket-Key" in str(error)

    @settings(deadline=None)
    @given(st.binary(min_size=16, max_size=16))
    def test_every_key_is_good(self, key: bytes) -> None:
        text = base64.b64encode(key).decode()
        assert judge(request(("sec-websocket-key", text), without="sec-websocket-key")).key == text

    @pytest.mark.parametrize("offered", [(), ("chat",), ("wstunnel.2, chat",), ("WSTUNNEL.1",), ("xwstunnel.1",)])
    def test_400_without_a_common_subprotocol(self, offered: tuple[str, ...]) -> None:
        fields = [("sec-websocket-protocol", name) for name in offered]
        asked = request(*fields, without="sec-websocket-protocol")
        with pytest.raises(HandshakeError, match=r"subprotocol.*wstunnel\.1, wstunnel\.0") as caught:
            accept(asked, path="/", subprotocols=["wstunnel.1", "wstunnel.0"])
        assert caught.value.status == 400

    def test_the_servers_favourite_subprotocol_wins(self) -> None:
        asked = request(("sec-websocket-protocol", "a,b"), ("sec-websocket-protocol", "c"))
        assert accept(asked, path="/", subprotocols=["x", "c", "a"]).subprotocol == "c"

    def test_none_is_needed_where_none_is_spoken(self) -> None:
        assert accept(request(), path="/", subprotocols=[]).subprotocol is None


class TestOrigin:
    """RFC 6455 §10.2, RFC 6454 §4."""

    def test_403_unless_listed(self) -> None:
        assert refused(request(("origin", "https://evil.example"))).status == 403
        assert refused(request(("origin", "https://evil.example")), ("https://good.example",)).status == 403

    @pytest.mark.parametrize(
        ("sent", "listed"),
        [
            ("https://a.example", "https://a.example"),
            ("https://a.example", "https://a.example/"),
            ("https://a.example", "HTTPS://A.Example:443"),
            ("https://a.example:443", "https://a.example"),
            ("http://a.example", "http://a.example:80/"),
            ("http://[::1]:8080", "http://[::1]:8080"),
            ("http://[::ffff:7f00:1]:8080", "http://[::ffff:127.0.0.1]:8080"),
            ("http://[::ffff:127.0.0.1]:8080", "http://[::ffff:7f00:1]:8080"),
            ("http://[0:0::1]", "http://[::1]"),
            ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ],
    )
    def test_the_same_origin(self, sent: str, listed: str) -> None:
        assert judge(request(("origin", sent)), ("https://other.example", listed)).key == KEY

    @pytest.mark.parametrize(
        ("sent", "listed"),
        [
            ("http://a.example", "https://a.example"),
            ("https://a.example:8443", "https://a.example"),
            ("http://a.example:443", "https://a.example"),
            ("https://a.example.evil.example", "https://a.example"),
            ("https://xa.example", "https://a.example"),
            ("https://a.example/path", "https://a.example"),
            ("http://[::ffff:7f00:1]", "http://127.0.0.1"),
            ("http://[::ffff:7f00:1]", "http://[::ffff:127.0.0.2]"),
            ("http://[1:2]", "http://[1:2]"),
            ("https://a.example@evil.example", "https://a.example"),
            ("https://evil.example, https://a.example", "https://a.example"),
            ("null", "null"),
            ("", ""),
            ("*", "*"),
            ("https://a.example", "nonsense"),
        ],
    )
    def test_another_origin(self, sent: str, listed: str) -> None:
        assert refused(request(("origin", sent)), (listed,)).status == 403

    def test_400_for_several(self) -> None:
        asked = request(("origin", "https://a.example"), ("origin", "https://a.example"))
        assert refused(asked, ("https://a.example",)).status == 400


class TestBearerToken:
    """RFC 6750 §2.1."""

    @pytest.mark.parametrize("value", ["Bearer abc-._~+/9==", "bearer abc-._~+/9==", "BEARER   abc-._~+/9=="])
    def test_the_token(self, value: str) -> None:
        assert bearer_token(request(("authorization", value))) == "abc-._~+/9=="

    def test_none(self) -> None:
        assert bearer_token(request()) is None
        assert bearer_token(request(("authorization", "Basic YTpi"))) is None
        assert bearer_token(request(("authorization", ""))) is None

    @pytest.mark.parametrize("value", ["Bearer", "Bearer  ", "Bearer s\xe9same", "Bearer sesame b", "Bearer =sesame"])
    def test_400_when_malformed_without_saying_the_token(self, value: str) -> None:
        with pytest.raises(HandshakeError) as caught:
            bearer_token(request(("authorization", value)))
        assert caught.value.status == 400
        assert "same" not in str(caught.value)

    def test_400_for_several(self) -> None:
        with pytest.raises(HandshakeError, match="several") as caught:
            bearer_token(request(("authorization", "Bearer a"), ("authorization", "Bearer a")))
        assert caught.value.status == 400


class TestAnswers:
    def test_the_101_of_the_rfc(self) -> None:
        assert accept_response(Upgrade(KEY, "wstunnel.1", request())) == (
            b"HTTP/1.1 101 Switching Protocols\r\n"
            b"Upgrade: websocket\r\n"
            b"Connection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + ACCEPT.encode() + b"\r\n"
            b"Sec-WebSocket-Protocol: wstunnel.1\r\n"
            b"\r\n"
        )

    def test_the_101_without_subprotocol(self) -> None:
        assert b"Protocol:" not in accept_response(Upgrade(KEY, None, request()))

    @staticmethod
    def parsed(answer: bytes) -> tuple[h11.Response, bytes]:
        """What h11, knowing nothing of us, makes of it."""
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
        client.send(h11.EndOfMessage())
        client.receive_data(answer)
        client.receive_data(b"")
        head, body = client.next_event(), b""
        assert isinstance(head, h11.Response)
        while isinstance(event := client.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        assert isinstance(client.next_event(), h11.ConnectionClosed)
        return head, body

    def test_a_refusal(self) -> None:
        assert refusal(HandshakeError(401, "no token", (("WWW-Authenticate", 'Bearer realm="wstunnel"'),))) == (
            b"HTTP/1.1 401 Unauthorized\r\n"
            b"Connection: close\r\n"
            b"Content-Type: text/plain; charset=utf-8\r\n"
            b"X-Content-Type-Options: nosniff\r\n"
            b"Cache-Control: no-store\r\n"
            b"Content-Length: 9\r\n"
            b'WWW-Authenticate: Bearer realm="wstunnel"\r\n'
            b"\r\n"
            b"no token\n"
        )

    def test_a_refusal_with_upgrade_says_so_in_connection(self) -> None:
        head, _ = self.parsed(refusal(refused(request(without="upgrade"))))
        assert (b"connection", b"close, Upgrade") in list(head.headers)
        assert (b"upgrade", b"websocket") in list(head.headers)

    def test_length_counts_bytes(self) -> None:
        head, body = self.parsed(refusal(HandshakeError(499, "n\xf6 \N{SNOWMAN} \udcff")))
        assert head.status_code == 499
        assert head.reason == b"Refused"
        assert body == "n\xf6 \N{SNOWMAN} ?\n".encode()

    @pytest.mark.parametrize(
        "evil", ["a\r\nSet-Cookie: b", "a\nSet-Cookie: b", "a\rSet-Cookie: b", "a\x00b", "\u010d\u010a"]
    )
    def test_no_field_brings_in_another(self, evil: str) -> None:
        head, body = self.parsed(refusal(HandshakeError(400, "x\r\n\r\ny", (("Location", evil),))))
        assert len(head.headers) == 6
        assert b"set-cookie" not in dict(head.headers)
        assert body == b"x\r\n\r\ny\n"
        assert b"\r\nSet-Cookie" not in refusal(HandshakeError(400, "x", ((evil, "x"),)))


# --- the client -----------------------------------------------------------------------------------------------------

GOOD = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Accept": ACCEPT,
    "Sec-WebSocket-Protocol": "wstunnel.1",
}


def client(
    *headers: tuple[str, str], subprotocol: str | None = "wstunnel.1", host: str = "h:1", path: str = "/x"
) -> ClientUpgrade:
    return ClientUpgrade(host, path, KEY_BYTES, subprotocol, headers)


def answer(status: str = "101 Switching Protocols", fields: dict[str, str] | None = None, body: bytes = b"") -> bytes:
    lines = [f"{name}: {value}\r\n" for name, value in (GOOD if fields is None else fields).items()]
    return f"HTTP/1.1 {status}\r\n{''.join(lines)}\r\n".encode("latin-1") + body


def failure(data: bytes, *, eof: bool = False) -> WstunnelError:
    """What `data` raises; the same when it comes byte by byte."""
    caught: list[WstunnelError] = []
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        upgrade = client()
        with pytest.raises(WstunnelError) as info:
            for piece in pieces:
                assert not upgrade.feed(piece)
            assert eof, "not refused by itself"
            upgrade.eof()
        caught.append(info.value)
    assert type(caught[0]) is type(caught[1])
    assert str(caught[0]) == str(caught[1])
    assert str(caught[0]).isprintable()
    return caught[0]


class TestClientRequest:
    """RFC 6455 §4.1."""

    def test_the_bytes(self) -> None:
        assert client(("Authorization", "Bearer t"), ("X-Tab", "a\tb")).request() == (
            b"GET /x HTTP/1.1\r\n"
            b"Host: h:1\r\n"
            b"Upgrade: websocket\r\n"
            b"Connection: Upgrade\r\n"
            b"Sec-WebSocket-Key: " + KEY.encode() + b"\r\n"
            b"Sec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Protocol: wstunnel.1\r\n"
            b"Authorization: Bearer t\r\n"
            b"X-Tab: a\tb\r\n"
            b"\r\n"
        )

    def test_no_subprotocol(self) -> None:
        assert b"Sec-WebSocket-Protocol" not in client(subprotocol=None).request()

    def test_a_given_host_replaces_ours(self) -> None:
        sent = client(("hOsT", "front.example")).request()
        assert b"\r\nHost: front.example\r\n" in sent
        assert sent.lower().count(b"host:") == 1
        assert b"h:1" not in sent

    @pytest.mark.parametrize("hosts", [("a", "b"), ("a\r\nX: y",), ("a b",), ("",), ("a/b",)])
    def test_bad_hosts(self, hosts: tuple[str, ...]) -> None:
        with pytest.raises(UsageError, match="Host"):
            client(*[("Host", host) for host in hosts]).request()
        with pytest.raises(UsageError, match="Host"):
            client(host=hosts[0] if len(hosts) == 1 else "a, b").request()

    @pytest.mark.parametrize(
        "name",
        [
            "Upgrade",
            "connection",
            "Sec-WebSocket-Key",
            "SEC-WEBSOCKET-EXTENSIONS",
            "Content-Length",
            "transfer-encoding",
        ],
    )
    def test_the_handshakes_own_fields_cannot_be_set(self, name: str) -> None:
        with pytest.raises(UsageError, match=f"'{name}' belongs to the handshake"):
            client((name, "x")).request()

    @pytest.mark.parametrize(
        "evil", ["sesame\r\nX: y", "sesame\ny", "sesame\r", "sesame\x00", "s\xe9same", "\N{SNOWMAN}same"]
    )
    def test_no_injection_by_value_and_no_value_in_the_message(self, evil: str) -> None:
        with pytest.raises(UsageError, match="the header 'Authorization'") as caught:
            client(("Authorization", evil)).request()
        assert "same" not in str(caught.value)
        with pytest.raises(UsageError, match="'Sec-WebSocket-Protocol'"):
            client(subprotocol=evil).request()

    @pytest.mark.parametrize("name", ["", "a b", "a:", "a\r\nb", "Host\r\n", "Upgrade ", "\xe9", "\x00"])
    def test_no_injection_by_name(self, name: str) -> None:
        with pytest.raises(UsageError, match="header name"):
            client((name, "x")).request()

    @pytest.mark.parametrize("path", ["", "x", "/a b", "/a\r\nX: y", "/#a", "/\xe9", "/\x7f", "/a\n"])
    def test_no_injection_by_path(self, path: str) -> None:
        with pytest.raises(UsageError, match="path"):
            client(path=path).request()

    def test_a_key_has_16_bytes(self) -> None:
        with pytest.raises(ValueError, match="16 bytes, not 15"):
            ClientUpgrade("h", "/", b"x" * 15, None)


class TestClientUpgraded:
    @pytest.mark.parametrize("trailing", [b"", b"\x81\x00", b"\r\n\r\nHTTP/1.1 400 x\r\n\r\n"])
    @pytest.mark.parametrize("size", [1, 5, 1000])
    def test_whole_and_in_pieces_with_trailing_bytes(self, size: int, trailing: bytes) -> None:
        upgrade = client()
        data = answer()
        results = [upgrade.feed(data[i : i + size]) for i in range(0, len(data), size)]
        assert results == [False] * (len(results) - 1) + [True]
        assert upgrade.leftover == b""
        assert upgrade.feed(trailing)
        assert upgrade.leftover == trailing
        whole = client()
        assert whole.feed(data + trailing)
        assert whole.leftover == trailing

    def test_case_does_not_matter_and_interim_answers_neither(self) -> None:
        fields = {**GOOD, "Upgrade": "WebSocket", "Connection": "keep-alive, upgrade", "Sec-WebSocket-Extensions": ""}
        assert client().feed(b"HTTP/1.1 100 Continue\r\n\r\n" + answer(fields=fields))

    def test_no_subprotocol(self) -> None:
        fields = {name: value for name, value in GOOD.items() if not name.endswith("Protocol")}
        assert client(subprotocol=None).feed(answer(fields=fields))
        with pytest.raises(NetworkError, match=r"chose the subprotocol 'wstunnel\.1', not none"):
            client(subprotocol=None).feed(answer())

    @pytest.mark.parametrize(
        ("name", "value", "wrong"),
        [
            ("Upgrade", None, "Upgrade: websocket"),
            ("Upgrade", "h2c", "Upgrade: websocket"),
            ("Upgrade", "websocket, h2c", "Upgrade: websocket"),
            ("Connection", None, "Connection: Upgrade"),
            ("Connection", "close", "Connection: Upgrade"),
            ("Sec-WebSocket-Accept", None, "Sec-WebSocket-Accept"),
            ("Sec-WebSocket-Accept", KEY, "Sec-WebSocket-Accept"),
            ("Sec-WebSocket-Accept", ACCEPT.lower(), "Sec-WebSocket-Accept"),
            ("Sec-WebSocket-Extensions", "permessage-deflate", "extensions"),
            ("Sec-WebSocket-Protocol", None, "chose no subprotocol, not wstunnel.1"),
            ("Sec-WebSocket-Protocol", "chat\x9b", r"chose the subprotocol 'chat\\x9b', not wstunnel.1"),
            ("Sec-WebSocket-Protocol", "wstunnel.1, wstunnel.1", "chose the subprotocol"),
        ],
    )
    def test_a_101_that_is_none(self, name: str, value: str | None, wrong: str) -> None:
        fields = {key: text for key, text in GOOD.items() if key != name} | ({} if value is None else {name: value})
        error = failure(answer(fields=fields))
        assert isinstance(error, NetworkError)
        assert error.layer == "websocket"
        assert wrong in str(error)
        assert "a proxy on the way may have altered it" in str(error)


class TestClientOfAPlainEndpoint:
    def made(self) -> ClientUpgrade:
        return ClientUpgrade("h", "/db", KEY_BYTES, "binary", endpoint=True)

    def test_the_subprotocol_may_be_left_out(self) -> None:
        without = {name: value for name, value in GOOD.items() if name.lower() != "sec-websocket-protocol"}
        assert self.made().feed(answer(fields=without))
        assert self.made().feed(answer(fields=GOOD | {"Sec-WebSocket-Protocol": "binary"}))
        with pytest.raises(NetworkError, match=r"chose the subprotocol 'wstunnel\.1', not binary"):
            self.made().feed(answer(fields=GOOD | {"Sec-WebSocket-Protocol": "wstunnel.1"}))

    @pytest.mark.parametrize(
        ("status", "said"),
        [
            ("401 Unauthorized", "another token, or one at all (401: no)"),
            ("404 Not Found", "no plain endpoint at path '/db' on that server (404)"),
            ("502 Bad Gateway", "the endpoint's target could not be reached (502: no)"),
            ("503 Service Unavailable", "has no room or cannot reach the target (503: no): its log says more"),
            ("504 Gateway Timeout", "could not be reached (504: no)"),
            ("403 Forbidden", "the server refused (403: no)"),
        ],
    )
    def test_refusals_are_not_those_of_a_tunnel(self, status: str, said: str) -> None:
        with pytest.raises(ServerRefusedError) as refused:
            self.made().feed(answer(status, {"Content-Length": "2"}, b"no"))
        assert said in str(refused.value)


class TestClientRefused:
    @pytest.mark.parametrize(
        ("status", "said"),
        [
            ("401 Unauthorized", "refused the token (401): ask its operator for a new login URL (`wstunnel invite`)"),
            ("403 Forbidden", "the server refused (403: not you): ask"),
            ("404 Not Found", "no tunnel at path '/x' on that server (404): check the path in the URL"),
        ],
    )
    def test_the_server_said_no(self, status: str, said: str) -> None:
        error = failure(answer(status, {"Content-Length": "8"}, b"not you\n"))
        assert isinstance(error, ServerRefusedError)
        assert said in str(error)

    @pytest.mark.parametrize(
        ("status", "said"),
        [
            ("200 OK", "ordinary web server; it does not pass WebSocket upgrades on (200: hello)"),
            ("204 No Content", "ordinary web server; it does not pass WebSocket upgrades on (204: No Content)"),
            ("301 Moved", "no WebSocket upgrade (301: hello)"),
            ("400 Bad Request", "did not understand the request (400: hello)"),
            ("407 Proxy Authentication Required", "a proxy on the way wants credentials (407: hello)"),
            ("408 Request Timeout", "waited too long for the request (408: hello)"),
            ("418 I'm a teapot", "no WebSocket upgrade (418: hello)"),
            ("426 Upgrade Required", "a proxy on the way may have removed it"),
            ("429 Too Many Requests", "too many requests (429: hello)"),
            ("500 Internal Server Error", "failed (500: hello): its log says more"),
            ("502 Bad Gateway", "the proxy in front of the server could not reach it (502: hello)"),
            ("503 Service Unavailable", "the server, or a proxy in front of it, has no room now (503: hello)"),
            ("504 Gateway Timeout", "the proxy in front of the server could not reach it (504: hello)"),
            ("999 What", "failed (999: hello)"),
        ],
    )
    def test_the_way_is_blocked(self, status: str, said: str) -> None:
        body = b"" if status.startswith("204") else b"hello"
        error = failure(answer(status, {"Content-Length": str(len(body))}, body))
        assert isinstance(error, NetworkError)
        assert error.layer == "http"
        assert said in str(error)

    def test_a_redirection_names_where_to(self) -> None:
        error = failure(answer("302 Found", {"Location": "wss://new.example/\x9b", "Content-Length": "0"}))
        assert isinstance(error, NetworkError)
        assert r"sent us on to wss://new.example/\x9b (302)" in str(error)

    def test_another_version_of_the_protocol(self) -> None:
        with pytest.raises(HandshakeError) as caught:
            accept(request(), path="/", subprotocols=["wstunnel.9"])
        error = failure(refusal(caught.value))
        assert isinstance(error, ServerRefusedError)
        assert "does not speak wstunnel.1 (400: no subprotocol in common: this server speaks wstunnel.9)" in str(error)

    @pytest.mark.parametrize(
        ("body", "shown"),
        [
            (b"", "(403: Reason)"),
            (b"\r\n \n  second \nthird", "(403: second)"),
            (b"<html>\n<title>403</title>", "(403: Reason)"),
            (b"\x1b[31mred\xff \xe2\x80\xae", r"(403: \x1b[31mred\xff \u202e)"),
            ("n\xf6".encode(), "(403: n\xf6)"),
            (b"a" * 200, f"(403: {'a' * 200})"),
            (b"a" * 201, f"(403: {'a' * 197}...)"),
            (b"\x00" * 4000, "..."),
        ],
    )
    def test_what_is_shown_of_the_body(self, body: bytes, shown: str) -> None:
        message = str(failure(answer("403 Reason", {"Content-Length": str(len(body))}, body)))
        assert shown in message
        assert len(message) < 300
        assert shown in str(failure(answer("403 Reason", {}, body), eof=True))

    def test_nothing_to_show(self) -> None:
        assert "the server refused (403): ask" in str(failure(answer("403 ", {"Content-Length": "0"})))

    def test_chunks_are_unwrapped(self) -> None:
        body = b"3\r\nnot\r\n4;x=y\r\n you\r\n0\r\n\r\n"
        assert "(403: not you)" in str(failure(answer("403 .", {"Transfer-Encoding": "chunked"}, body)))

    def test_bad_chunks_end_the_body(self) -> None:
        body = b"3\r\nnot\r\nzz\r\n"
        assert "(403: not)" in str(failure(answer("403 .", {"Transfer-Encoding": "chunked"}, body)))

    def test_the_body_is_read_up_to_a_limit(self) -> None:
        upgrade = client()
        assert not upgrade.feed(answer("403 .", {"Content-Length": "1000000"}, b"no\n"))
        assert not upgrade.feed(b"x" * (limits.REFUSAL_BODY_BYTES - 4))
        with pytest.raises(ServerRefusedError, match=r"\(403: no\)"):
            upgrade.feed(b"x" * 1000)
        with pytest.raises(ServerRefusedError, match=r"\(403: no\)"):
            upgrade.feed(b"x" * 1_000_000)
        assert upgrade._body is not None
        assert len(upgrade._body._bytes) == limits.REFUSAL_BODY_BYTES

    def test_a_body_that_is_cut_short_is_shown_as_far_as_it_came(self) -> None:
        assert "(403: not)" in str(failure(answer("403 .", {"Content-Length": "100"}, b"not"), eof=True))

    def test_no_bytes_are_no_end(self) -> None:
        upgrade = client()
        assert not upgrade.feed(answer("403 .", {}, b"not"))
        assert not upgrade.feed(b"")
        assert not upgrade.feed(b" you")
        with pytest.raises(ServerRefusedError, match=r"\(403: not you\)"):
            upgrade.eof()

    def test_http_1_0(self) -> None:
        error = failure(b"HTTP/1.0 503 Down\r\n\r\n<html>", eof=True)
        assert "(503: Down)" in str(error)

    @pytest.mark.parametrize(("data", "when"), [(b"", "without an answer"), (b"HTTP/1.1 1", "in the middle")])
    def test_the_server_closes_before_it_answers(self, data: bytes, when: str) -> None:
        error = failure(data, eof=True)
        assert isinstance(error, NetworkError)
        assert error.layer == "http"
        assert f"the server closed the connection during the handshake, {when}" in str(error)

    def test_what_is_no_http(self) -> None:
        with pytest.raises(NetworkError, match="not HTTP: b'SSH-2"):
            client().feed(b"SSH-2.0-OpenSSH_9.6\r\n")


# --- both ends, and strangers ---------------------------------------------------------------------------------------


def read(data: bytes) -> Request:
    asked = RequestReader().feed(data)
    assert asked is not None
    return asked


def test_both_roles_meet() -> None:
    ours = ClientUpgrade("h", "/t?q=1", KEY_BYTES, "wstunnel.1", (("Authorization", "Bearer sesame"),))
    asked = read(ours.request())
    upgrade = accept(asked, path="/t", subprotocols=["wstunnel.1"])
    assert bearer_token(asked) == "sesame"
    assert ours.feed(accept_response(upgrade) + b"\x81\x00")
    assert ours.leftover == b"\x81\x00"


def test_websockets_as_client() -> None:
    peer = ClientProtocol(parse_uri("ws://example.org/"), subprotocols=[Subprotocol("wstunnel.1")], origin=None)
    peer.send_request(peer.connect())
    upgrade = judge(read(b"".join(peer.data_to_send())))
    peer.receive_data(accept_response(upgrade))
    assert peer.handshake_exc is None
    assert peer.subprotocol == "wstunnel.1"


def test_websockets_as_server() -> None:
    peer = ServerProtocol(subprotocols=[Subprotocol("wstunnel.1")])
    ours = client(("User-Agent", "x"))
    peer.receive_data(ours.request())
    (asked,) = peer.events_received()
    assert isinstance(asked, PeerRequest)
    peer.send_response(peer.accept(asked))
    assert peer.handshake_exc is None
    assert ours.feed(b"".join(peer.data_to_send()))


def test_websockets_as_server_that_refuses() -> None:
    peer = ServerProtocol(subprotocols=[Subprotocol("other")])
    ours = client()
    peer.receive_data(ours.request())
    (asked,) = peer.events_received()
    assert isinstance(asked, PeerRequest)
    peer.send_response(peer.accept(asked))
    with pytest.raises(ServerRefusedError, match=r"does not speak wstunnel\.1"):
        ours.feed(b"".join(peer.data_to_send()))


HEADS = [
    *[answer(), answer("403 No", {"Content-Length": "3"}, b"abc"), answer("200 OK", {}, b"<html>\n")],
    answer("502 Bad", {"Transfer-Encoding": "chunked"}, b"3\r\nabc\r\n0\r\n\r\n"),
]
NOISE = [
    b"\r\n",
    b"\n",
    b"\x00",
    b"Content-Length: 9\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"0\r\n\r\n",
    b"\xff",
    b"403",
]


@settings(deadline=None)
@given(st.data())
def test_whatever_a_server_sends_ends_in_declared_errors(draw: st.DataObject) -> None:
    data = draw.draw(st.sampled_from(HEADS))
    for _ in range(draw.draw(st.integers(0, 3))):
        at = draw.draw(st.integers(0, len(data)))
        data = data[:at] + draw.draw(st.sampled_from(NOISE)) + data[at + draw.draw(st.integers(0, 3)) :]
    cut = draw.draw(st.integers(0, len(data)))
    upgrade = client()
    try:
        if upgrade.feed(data[:cut]) or upgrade.feed(data[cut:]):
            assert upgrade.leftover == data[len(data) - len(upgrade.leftover) :]
            assert f"Sec-WebSocket-Accept: {ACCEPT}".encode() in data
            return
        upgrade.eof()
    except (NetworkError, ServerRefusedError) as error:
        assert str(error).isprintable()


FIELD_NAMES = [
    "host",
    "origin",
    "upgrade",
    "connection",
    "authorization",
    "sec-websocket-key",
    "sec-websocket-protocol",
]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(FIELD_NAMES), st.text(st.characters(max_codepoint=255)))),
    st.sampled_from(["", *FIELD_NAMES]),
)
def test_whatever_a_client_sends_is_accepted_rightly_or_refused(extra: list[tuple[str, str]], without: str) -> None:
    asked = request(*extra, without=without)
    try:
        upgrade = judge(asked)
        bearer_token(asked)
    except HandshakeError as error:
        assert error.status in (400, 403, 426)
        assert refusal(error).count(b"\r\n\r\n") == 1
    else:
        assert asked.values("sec-websocket-key") == [upgrade.key]
        assert upgrade.subprotocol == "wstunnel.1"
        assert not asked.values("origin")
