"""plain_endpoints.py: the grammar of --endpoint and --allow-origin."""

from __future__ import annotations

import pytest

from wstunnel.errors import UsageError
from wstunnel.plain_endpoints import GRAMMAR, ORIGIN_GRAMMAR, Endpoint, parse_endpoint, parse_origin
from wstunnel.targets import parse_target


@pytest.mark.parametrize(
    ("text", "path", "target"),
    [
        ("/db=tcp:127.0.0.1:5432", "/db", "tcp:127.0.0.1:5432"),
        ("/db=DB.example:5432", "/db", "tcp:db.example:5432"),
        ("/=[::1]:5900", "/", "tcp:[::1]:5900"),
        ("/a/b%3Dc=unix:/run/x=y.sock", "/a/b%3Dc", "unix:/run/x=y.sock"),
    ],
)
def test_endpoints(text: str, path: str, target: str) -> None:
    endpoint = parse_endpoint(text)
    assert endpoint == Endpoint(path, parse_target(target))
    assert parse_endpoint(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 0, "the path begins with '/'"),
        ("db=a:1", 0, "the path begins with '/'"),
        ("/db", 3, "'=' and the target are missing"),
        ("/d b=a:1", 2, "not a character of a URL's path"),
        ("/d?b=a:1", 2, "not a character of a URL's path"),
        ("/d%zz=a:1", 2, "not a character of a URL's path"),
        ("/db=", 4, "the host and the port are missing"),
        ("/db=a", 5, "the port is missing"),
        ("/db=a:0", 6, "a port is a number from 1 to 65535"),
        ("/db=::1:5", 4, "an IPv6 address goes in brackets"),
        ("/db=unix:run", 9, "the path of a socket starts with '/'"),
        ("/db=udp:a:53", 4, "an endpoint is a stream of bytes, which UDP has not"),
    ],
)
def test_what_is_no_endpoint(text: str, position: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint(text)
    assert (caught.value.message, caught.value.position) == (message, position)
    assert (caught.value.text, caught.value.grammar) == (text, GRAMMAR)


def test_an_endpoint_that_is_too_long() -> None:
    with pytest.raises(UsageError, match="too long"):
        parse_endpoint("/" + "a" * 2000)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://app.example.org", "https://app.example.org"),
        ("HTTPS://App.Example.ORG/", "https://app.example.org"),
        ("https://app.example.org:443", "https://app.example.org"),
        ("http://app.example.org:80/", "http://app.example.org"),
        ("http://app.example.org:443", "http://app.example.org:443"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://127.0.0.1:3000", "http://127.0.0.1:3000"),
        ("http://[0:0::1]", "http://[::1]"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
        ("http://[::ffff:127.0.0.1]:3000", "http://[::ffff:7f00:1]:3000"),
        ("http://[::FFFF:7F00:1]:3000", "http://[::ffff:7f00:1]:3000"),
        ("http://[::127.0.0.1]", "http://[::7f00:1]"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("chrome-extension://abcdefghijklmnop", "chrome-extension://abcdefghijklmnop"),
    ],
)
def test_origins(text: str, origin: str) -> None:
    assert parse_origin(text) == origin


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("*", 0, "every page would be let in: name the origins one by one"),
        ("null", 0, "every page would be let in: name the origins one by one"),
        ("", 0, "an origin begins with a scheme and '://'"),
        ("app.example.org", 15, "an origin begins with a scheme and '://'"),
        ("https:app.example.org", 5, "an origin begins with a scheme and '://'"),
        ("https://", 8, "the host is missing"),
        ("https://a.example/app", 17, "an origin has no path: what follows the host and the port goes"),
        ("https://a.example//", 17, "an origin has no path: what follows the host and the port goes"),
        ("https://a.example?x", 17, "an origin has no path: what follows the host and the port goes"),
        ("https://a.example#", 17, "an origin has no path: what follows the host and the port goes"),
        ("https://user@a.example", 12, "'@' cannot stand in a host name"),
        ("https://*.example", 8, "'*' cannot stand in a host name"),
        ("https://a.example:", 18, "the port is missing"),
        ("https://a.example:70000", 18, "a port is a number from 1 to 65535"),
        ("https://[::1", 8, "the bracket is not closed"),
        ("http://127.1:80", 7, "browsers write such an address as four numbers: 127.0.0.1"),
        ("http://010.0.0.1", 7, "browsers write such an address as four numbers: 127.0.0.1"),
        ("http://a.0x7F", 7, "browsers write such an address as four numbers: 127.0.0.1"),
    ],
)
def test_what_is_no_origin(text: str, position: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_origin(text)
    assert (caught.value.message, caught.value.position) == (message, position)
    assert (caught.value.text, caught.value.grammar) == (text, ORIGIN_GRAMMAR)
