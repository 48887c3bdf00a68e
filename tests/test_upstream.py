"""upstream.py: proxy URLs, what the environment says, NO_PROXY."""

from __future__ import annotations

from typing import Any

import pytest

from wstunnel.auth import parse_login_url
from wstunnel.errors import UsageError
from wstunnel.upstream import PROXY_GRAMMAR, Proxies, ProxyUrl, bypasses, parse_proxy, parse_proxy_url

WSS = parse_login_url("wss://tunnel.example.org/")
WS = parse_login_url("ws://tunnel.example.org/")
ONE, TWO, THREE = (ProxyUrl("http", name, 80) for name in ("one", "two", "three"))


class TestUrl:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("http://proxy.example.org", ProxyUrl("http", "proxy.example.org", 80)),
            ("http://proxy:3128", ProxyUrl("http", "proxy", 3128)),
            ("HTTP://10.0.0.1:3128/", ProxyUrl("http", "10.0.0.1", 3128)),
            ("https://proxy", ProxyUrl("https", "proxy", 443)),
            ("socks5://[::1]", ProxyUrl("socks5", "::1", 1080)),
            ("socks5h://localhost:9050", ProxyUrl("socks5h", "localhost", 9050)),
            ("http://ann:secret@proxy", ProxyUrl("http", "proxy", 80, "ann", "secret")),
            ("http://ann@proxy", ProxyUrl("http", "proxy", 80, "ann", "")),
            ("http://ann:@proxy", ProxyUrl("http", "proxy", 80, "ann", "")),
            ("http://a%3Ab:c@proxy", None),
            ("socks5://a%3Ab:c@proxy", ProxyUrl("socks5", "proxy", 1080, "a:b", "c")),
            ("http://DOMAIN%5Cann:p%40%3a%2F%25@proxy", ProxyUrl("http", "proxy", 80, "DOMAIN\\ann", "p@:/%")),
            ("http://a:p@ss:word@proxy", ProxyUrl("http", "proxy", 80, "a", "p@ss:word")),
            ("http://J%C3%B6rg:%C3%A4@proxy", ProxyUrl("http", "proxy", 80, "Jörg", "ä")),
        ],
    )
    def test_what_it_means(self, text: str, expected: ProxyUrl | None) -> None:
        if expected is None:
            with pytest.raises(UsageError, match="colon"):
                parse_proxy_url(text)
        else:
            assert parse_proxy_url(text) == expected

    def test_none_is_no_proxy(self) -> None:
        assert parse_proxy("none") == Proxies()
        assert parse_proxy("http://one").choose(WSS) == ONE == parse_proxy("http://one").choose(WS)

    @pytest.mark.parametrize(
        ("text", "message", "caret"),
        [
            ("", "begins with http://", 0),
            ("proxy:3128", "begins with http://", 0),
            ("ftp://proxy", "not a kind of proxy", 0),
            ("socks4://proxy", "SOCKS4 is not supported", 0),
            ("http://", "the host is missing", 7),
            ("http://:80", "the host is missing", 7),
            ("http://proxy:0", "a port is a number", 13),
            ("http://proxy:99999", "a port is a number", 13),
            ("http://proxy/path", "no path", 12),
            ("http://pro xy", "not a host name", 7),
            ("http://[::1]:99999/", "a port is a number", 13),
            ("http://[fe80::1%eth0]/path", "no path", 21),
        ],
    )
    def test_mistakes(self, text: str, message: str, caret: int) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            parse_proxy_url(text)
        assert (caught.value.text, caught.value.position, caught.value.grammar) == (text, caret, PROXY_GRAMMAR)

    @pytest.mark.parametrize(
        ("text", "shown", "caret"),
        [
            ("http://ann:hunter2@", "http://***@", 11),
            ("http://ann:hunter2@proxy:x", "http://***@proxy:x", 17),
            ("http://ann:hunter%@proxy", "http://***@proxy", 7),
            ("http://:hunter2@proxy", "http://***@proxy", 7),
            ("http://ann:hunter%00@proxy", "http://***@proxy", 7),
            ("http://ann:hunter2%FF@proxy", "http://***@proxy", 7),
            ("http://ann:hunter2/x@y/z@pro xy", "http://***@pro xy", 11),
            ("http://ann:hunter2", "http://ann:***", 11),
            ("http://ann:hun]hunter2", "http://ann:***", 11),
            ("http://ann:a]hunter2:x", "http://ann:***", 7),
            ("http://ann:]hunter2/host", "http://ann:***", 11),
            ("http://[ann:hunter2]", "http://[ann:***", 8),
            ("http://[::1]:hunter2", "http://[::1]:***", 13),
            ("http://[::1]hunter2:x", "http://[:***", 9),
            ("//ann:]hunter2", "//ann:***", 0),
            ("ann:hunter2://x", "ann:***", 0),
            ("http://::1:80", "http://:***", 7),
            ("ftp://ann:hunter2@proxy", "ftp://***@proxy", 0),
            ("ann:hunter2@proxy", "***@proxy", 0),
            ("socks5://ann@proxy", "socks5://***@proxy", 9),
            ("socks5://ann:hunter2%C3%A4@proxy", "socks5://***@proxy", 9),
            (f"socks5://ann:hunter2{'x' * 255}@proxy", "socks5://***@proxy", 9),
        ],
    )
    def test_no_message_shows_a_password(self, text: str, shown: str, caret: int) -> None:
        with pytest.raises(UsageError) as caught:
            parse_proxy_url(text)
        assert (caught.value.text, caught.value.position) == (shown, caret)
        assert "hunter" not in str(caught.value)
        assert caught.value.__suppress_context__

    def test_neither_text_nor_repr_shows_user_or_password(self) -> None:
        proxy = parse_proxy_url("http://ann:hunter2@proxy:3128")
        assert str(proxy) == "http://***@proxy:3128"
        assert "ann" not in repr(Proxies(proxy, proxy))
        assert "hunter2" not in repr(Proxies(proxy, proxy))
        assert str(parse_proxy_url("socks5://[::1]")) == "socks5://[::1]:1080"


class TestEnvironment:
    def chosen(self, url: Any, **environ: str) -> ProxyUrl | None:
        return Proxies.from_environment(environ, {url.scheme}).choose(url)

    @pytest.mark.parametrize(
        ("environ", "wss", "ws"),
        [
            ({}, None, None),
            ({"HTTPS_PROXY": "http://one"}, ONE, None),
            ({"https_proxy": "one"}, ONE, None),
            ({"https_proxy": "http://one", "HTTPS_PROXY": "http://two", "ALL_PROXY": "http://three"}, ONE, None),
            ({"https_proxy": "", "HTTPS_PROXY": " http://two "}, TWO, None),
            ({"http_proxy": "http://one"}, None, ONE),
            ({"HTTP_PROXY": "http://one"}, None, None),  # a request's field `Proxy`, in CGI
            ({"all_proxy": "http://one", "ALL_PROXY": "http://two"}, ONE, ONE),
            ({"ALL_PROXY": "http://one", "http_proxy": "http://two"}, ONE, TWO),
            ({"HTTPS_PROXY": "http://one", "NO_PROXY": "example.org"}, None, None),
            ({"HTTPS_PROXY": "http://one", "no_proxy": "other", "NO_PROXY": "example.org"}, ONE, None),
        ],
    )
    def test_variables(self, environ: dict[str, str], wss: ProxyUrl | None, ws: ProxyUrl | None) -> None:
        if "ALL_PROXY" in environ and wss is ONE and ws is None:
            ws = THREE
        assert (self.chosen(WSS, **environ), self.chosen(WS, **environ)) == (wss, ws)

    def test_a_malformed_one_is_named_and_masked(self) -> None:
        with pytest.raises(UsageError, match="in HTTPS_PROXY: ") as caught:
            self.chosen(WSS, HTTPS_PROXY="http://ann:hunter2@pro xy")
        assert "hunter2" not in str(caught.value)
        assert "--proxy none" in str(caught.value)

    def test_what_is_for_other_servers_is_not_looked_at(self) -> None:
        assert self.chosen(WSS, http_proxy="socks4://x", HTTPS_PROXY="one", ALL_PROXY="nonsense://") == ONE

    def test_what_is_named_on_the_command_line_is_used_whatever_no_proxy_says(self) -> None:
        assert parse_proxy("http://one").choose(WSS) == ONE


class TestNoProxy:
    @pytest.mark.parametrize(
        ("listed", "host", "expected"),
        [
            # curl's manual: "local.com would match local.com, local.com:80, and www.local.com, but not
            # www.notlocal.com".
            ("local.com", "local.com", True),
            ("local.com", "www.local.com", True),
            ("local.com", "www.notlocal.com", False),
            ("local.com", "notlocal.com", False),
            (".local.com", "local.com", True),
            (".local.com", "www.local.com", True),
            ("Local.COM.", "www.LOCAL.com.", True),
            ("*", "anything", True),
            (" * ", "anything", True),
            ("*,x", "anything", False),
            ("*.local.com", "www.local.com", False),
            ("a, b c", "b", True),
            ("a, b c", "c", True),
            ("a,,b", "", False),
            ("", "a", False),
            (".", "a", False),
            ("192.168.0.1", "192.168.0.1", True),
            ("192.168.0.1", "192.168.0.11", False),
            ("192.168.0.0/16", "192.168.7.1", True),
            ("192.168.5.1/16", "192.168.7.1", True),
            ("192.168.0.0/16", "192.169.0.1", False),
            ("192.168.0.0/16", "fd00::1", False),
            ("10.0.0.0/8", "10.example.org", False),
            ("fd00::/8", "fd00::1", True),
            ("fd00::1", "fd00:0::1", True),
            ("[fd00::1]", "fd00::1", True),
            ("::1", "::2", False),
            ("0.0.1", "10.0.0.1", False),  # an address has no suffix
            ("1.0/99", "10.0.0.1", False),
            ("local.com:443", "www.local.com", True),
            ("local.com:80", "www.local.com", False),
            ("10.0.0.1:443", "10.0.0.1", True),
            ("10.0.0.1:80", "10.0.0.1", False),
            ("[fd00::1]:443", "fd00::1", True),
            ("[fd00::1]:80", "fd00::1", False),
            ("local.com:" + "4" * 5000, "local.com", False),  # int() takes 4,300 digits at most
            ("[fd00::1]:" + "4" * 5000, "fd00::1", False),
            ("fe80::1", "fe80::1%eth0", True),
        ],
    )  # fmt: skip
    def test_as_curl(self, listed: str, host: str, expected: bool) -> None:
        assert bypasses(listed, host, 443) is expected
