"""The PROXY header: of a connection that was accepted here, and of one that the other end accepted."""

from __future__ import annotations

import socket
from typing import Literal

import pytest

from tests.roles import tcp_pair
from wstunnel.endpoints import proxy_header
from wstunnel.wire.proxy_protocol import ProxyHeader


@pytest.mark.parametrize("version", [1, 2])
def test_the_target_learns_who_connected(version: Literal[1, 2]) -> None:
    accepted, client = tcp_pair()
    with accepted, client:
        header = ProxyHeader()
        assert header.feed(proxy_header.of_socket(version, accepted)) == b""
        assert header.source == client.getsockname()
        assert header.destination == accepted.getsockname()


@pytest.mark.parametrize("version", [1, 2])
def test_of_a_unix_socket_nothing_is_claimed(version: Literal[1, 2]) -> None:
    near, far = socket.socketpair()
    with near, far:
        header = ProxyHeader()
        assert header.feed(proxy_header.of_socket(version, near)) == b""
        assert (header.version, header.source) == (version, None)


def test_of_a_connection_that_is_gone_nothing_is_claimed() -> None:
    sock = socket.socket()
    sock.close()
    assert proxy_header.of_socket(1, sock) == b"PROXY UNKNOWN\r\n"


@pytest.mark.parametrize(
    ("source", "destination", "line"),
    [
        ("192.0.2.1:5000", "127.0.0.1:80", b"PROXY TCP4 192.0.2.1 127.0.0.1 5000 80\r\n"),
        ("[2001:db8::1]:5000", "[::1]:80", b"PROXY TCP6 2001:db8::1 ::1 5000 80\r\n"),
        ("unix:uid=0,pid=1", "127.0.0.1:80", b"PROXY UNKNOWN\r\n"),
        ("", "127.0.0.1:80", b"PROXY UNKNOWN\r\n"),
        ("name.example:5000", "127.0.0.1:80", b"PROXY UNKNOWN\r\n"),
        ("192.0.2.1:5000\r\nPROXY", "127.0.0.1:80", b"PROXY UNKNOWN\r\n"),
        ("192.0.2.1:5000", "0.0.0.0:80, [::]:80", b"PROXY UNKNOWN\r\n"),
    ],
)
def test_of_names_that_the_other_end_gave(source: str, destination: str, line: bytes) -> None:
    assert proxy_header.of_names(1, source, destination) == line
