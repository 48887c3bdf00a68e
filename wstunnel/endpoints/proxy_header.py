"""The PROXY header that tells a target who is really connecting."""

from __future__ import annotations

import socket
from typing import Literal

from wstunnel.errors import UsageError
from wstunnel.targets import address_family, parse_host_port
from wstunnel.wire.proxy_protocol import Endpoint, encode


def of_socket(version: Literal[1, 2], sock: socket.socket) -> bytes:
    """The header for a connection that was accepted here. Of a Unix socket's application nothing is said."""
    try:
        return encode(version, _endpoint(sock.getpeername()), _endpoint(sock.getsockname()))
    except OSError:  # it is gone already
        return encode(version, None, None)


def of_names(version: Literal[1, 2], source: str, destination: str) -> bytes:
    """The header for a connection that the other end of the tunnel accepted, from `192.0.2.1:5000` as it says."""
    return encode(version, _parse(source), _parse(destination))


def _endpoint(address: object) -> Endpoint | None:
    return (address[0], address[1]) if isinstance(address, tuple) else None


def _parse(text: str) -> Endpoint | None:
    try:
        host, port = parse_host_port(text)
    except UsageError:
        return None
    return None if address_family(host) is None else (host, port)
