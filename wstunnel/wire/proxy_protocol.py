"""HAProxy's PROXY protocol, versions 1 and 2: how a proxy tells the next one whose connection it passes on.

    send(encode(2, ("192.0.2.1", 51234), ("198.51.100.7", 443)))        # before the connection's first byte

    header = ProxyHeader()
    rest = header.feed(received)        # None while more bytes are needed
    header.source                       # ("192.0.2.1", 51234), or None: keep the connection's own

The text is https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt, cited by section. A header is believed by
whoever reads it: the caller must know that the peer is a proxy. Type-length-values (§2.2) are skipped, the checksum
PP2_TYPE_CRC32C among them: TCP and TLS have checked the bytes already.
"""

from __future__ import annotations

import re
from typing import Literal

from wstunnel.errors import ProtocolError
from wstunnel.wire.addresses import IPV4_BYTES, IPV6_BYTES, PORT_MAX, pack_address, unpack_address

Endpoint = tuple[str, int]
"""An IP address in its usual form without brackets, and a port from 0 to 65535."""

LINE_BYTES = 107
"""§2.1: the longest line of version 1, with CR and LF."""
BLOCK_BYTES = 4096
"""What follows the fixed 16 bytes of version 2. Certificates' names and the like take some hundred bytes."""

_NAME_1 = b"PROXY"
_SIGNATURE_2 = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED_BYTES = 16
_LOCAL, _PROXY = 0, 1
_TCP_4, _TCP_6 = 0x11, 0x21
_ADDRESS_BYTES = {0x1: 12, 0x2: 36, 0x3: 216}  # by family: IPv4, IPv6, Unix; 0x0 is "unspecified"
_FAMILY_MAX, _TRANSPORT_MAX = 3, 2
_TLS_HANDSHAKE = 0x16
_PORT = rb"(0|[1-9][0-9]{0,4})"
_LINE = re.compile(rb"PROXY (TCP4|TCP6) ([0-9a-fA-F:.]+) ([0-9a-fA-F:.]+) " + _PORT + b" " + _PORT)


# --- out ------------------------------------------------------------------------------------------------------------


def encode(version: Literal[1, 2], source: Endpoint | None, destination: Endpoint | None) -> bytes:
    """The header for a connection that came from `source` to `destination`.

    Args:
        version: 1 is a line of text, 2 is binary.
        source: `None` if it is not known, or is no IP address (a Unix socket's).
        destination: the same. If either is `None` the header says that nothing is known: `UNKNOWN`, or `LOCAL` in
            version 2. An IPv4 address beside an IPv6 one goes as an IPv4-mapped one, since both have one family.

    Raises:
        ValueError: an endpoint's host is no IP address, or its port no port.
    """
    if source is None or destination is None:
        return b"PROXY UNKNOWN\r\n" if version == 1 else _SIGNATURE_2 + bytes((0x20 | _LOCAL, 0, 0, 0))
    hosts = [_packed(host) for host, _ in (source, destination)]
    if len(hosts[0]) != len(hosts[1]):
        hosts = [host if len(host) > IPV4_BYTES else bytes(10) + b"\xff\xff" + host for host in hosts]
    for _, port in (source, destination):
        if not 0 <= port <= PORT_MAX:
            raise ValueError(f"{port} is no port")
    four = len(hosts[0]) == IPV4_BYTES
    if version == 1:
        kind = "TCP4" if four else "TCP6"
        return f"PROXY {kind} {_text(hosts[0])} {_text(hosts[1])} {source[1]} {destination[1]}\r\n".encode("ascii")
    block = b"".join(hosts) + b"".join(port.to_bytes(2, "big") for _, port in (source, destination))
    fixed = _SIGNATURE_2 + bytes((0x20 | _PROXY, _TCP_4 if four else _TCP_6))
    return fixed + len(block).to_bytes(2, "big") + block


def _packed(host: str) -> bytes:
    packed = pack_address(host)
    if packed is None:
        raise ValueError("a PROXY header carries IP addresses only")
    return packed


def _text(packed: bytes) -> str:
    text = unpack_address(packed)
    # §2.1 has IPv6 in hexadecimal groups only, without the dotted form of an IPv4 address inside.
    return packed.hex(":", 2) if ":" in text and "." in text else text


# --- in -------------------------------------------------------------------------------------------------------------


class ProxyHeader:
    """Reads the header that opens a connection, either version, in any split. Holds at most BLOCK_BYTES + 16 bytes."""

    def __init__(self) -> None:
        self.version: Literal[1, 2] | None = None
        """The header's version, once it is whole."""
        self.source: Endpoint | None = None
        """Who connected to the proxy. `None`: it does not say (UNKNOWN, LOCAL, a Unix socket, datagrams), and the
        connection's own address stays."""
        self.destination: Endpoint | None = None
        """What they connected to; `None` together with `source`."""
        self._buffer = bytearray()
        self._error: str | None = None

    def feed(self, data: bytes) -> bytes | None:
        """Take more bytes from the proxy.

        Returns:
            `None` while the header is not whole; then what came behind it. Later calls return `data` as it is.

        Raises:
            ProtocolError: this is no PROXY header, or a wrong one: close the connection without an answer. §2: "The
                receiver [...] MUST not try to guess whether the protocol header is present or not." It repeats itself
                when more is fed.
        """
        if self._error is not None:
            raise ProtocolError(self._error)
        if self.version is not None:
            return data
        self._buffer += data
        try:
            end = self._read()
        except ProtocolError as error:
            self._error = str(error)
            self._buffer.clear()
            raise
        if end is None:
            return None
        rest = bytes(self._buffer[end:])
        self._buffer.clear()
        return rest

    def _read(self) -> int | None:
        """Look at what came; where the header ends, `None` while it is not whole."""
        buffer = self._buffer
        if not buffer:
            return None
        signature = _NAME_1 if buffer[0] == _NAME_1[0] else _SIGNATURE_2
        for byte, wanted in zip(buffer, signature, strict=False):
            if byte != wanted:
                # By its first byte: what came later may not have been in the same piece.
                raise ProtocolError(_blame(buffer[0]))
        return self._read_line() if signature is _NAME_1 else self._read_block()

    def _read_line(self) -> int | None:
        """§2.1: `PROXY TCP4 192.168.0.1 192.168.0.11 56324 443` and CR LF."""
        buffer = self._buffer
        line_feed = buffer.find(b"\n", 0, LINE_BYTES)
        if line_feed < 0:
            if len(buffer) >= LINE_BYTES:
                raise ProtocolError(f"a PROXY header whose line is longer than {LINE_BYTES} bytes")
            return None
        if buffer[line_feed - 1] != ord("\r"):
            raise ProtocolError("a PROXY header whose line does not end in CR LF")
        line = bytes(buffer[: line_feed - 1])
        # §2.1: for "UNKNOWN", "the receiver must ignore anything presented before the CRLF is found".
        if line != b"PROXY UNKNOWN" and not line.startswith(b"PROXY UNKNOWN "):
            self.source, self.destination = _parse_line(line)
        self.version = 1
        return line_feed + 1

    def _read_block(self) -> int | None:
        """§2.2: the signature, version and command, family and transport, length; addresses; type-length-values."""
        buffer = self._buffer
        if len(buffer) < _FIXED_BYTES:
            return None
        version, command = divmod(buffer[12], 16)
        family, transport = divmod(buffer[13], 16)
        size = int.from_bytes(buffer[14:_FIXED_BYTES], "big")
        if version != 2:
            raise ProtocolError(f"version {version} of the PROXY protocol's binary header, where 2 is the only one")
        if command not in (_LOCAL, _PROXY):
            raise ProtocolError(f"command {command} in a PROXY header")
        if size > BLOCK_BYTES:
            raise ProtocolError(f"a PROXY header of {size} bytes, of which at most {BLOCK_BYTES} are read")
        # §2.2: with LOCAL "the receiver must accept this connection as valid and must use the real connection
        # endpoints and discard the protocol block including the family which is ignored".
        if command == _PROXY:
            if family > _FAMILY_MAX or transport > _TRANSPORT_MAX:
                raise ProtocolError(f"address family and transport 0x{buffer[13]:02x} in a PROXY header")
            if size < _ADDRESS_BYTES.get(family, 0):
                raise ProtocolError(f"a PROXY header of {size} bytes has no room for its addresses")
        end = _FIXED_BYTES + size
        if len(buffer) < end:
            return None
        if command == _PROXY and buffer[13] in (_TCP_4, _TCP_6):
            length = (_ADDRESS_BYTES[family] - 4) // 2
            ports = _FIXED_BYTES + 2 * length
            self.source = (
                unpack_address(bytes(buffer[_FIXED_BYTES : _FIXED_BYTES + length])),
                int.from_bytes(buffer[ports : ports + 2], "big"),
            )
            self.destination = (
                unpack_address(bytes(buffer[_FIXED_BYTES + length : ports])),
                int.from_bytes(buffer[ports + 2 : ports + 4], "big"),
            )
        self.version = 2
        return end


def _parse_line(line: bytes) -> list[Endpoint]:
    """The two endpoints of a line that has some."""
    found = _LINE.fullmatch(line)
    if found is None:
        raise ProtocolError("a PROXY header that is not `PROXY TCP4|TCP6 SOURCE DESTINATION PORT PORT`")
    size = IPV4_BYTES if found[1] == b"TCP4" else IPV6_BYTES
    endpoints = []
    for text, port in ((found[2], int(found[4])), (found[3], int(found[5]))):
        host = pack_address(text.decode("ascii"))
        if host is None or len(host) != size or port > PORT_MAX:
            raise ProtocolError(f"a PROXY header with what is no address of {found[1].decode('ascii')}, or no port")
        endpoints.append((unpack_address(host), port))
    return endpoints


def _blame(first: int) -> str:
    came = "something else"
    if first == _TLS_HANDSHAKE:
        came = "TLS"
    elif ord("A") <= first & 0xDF <= ord("Z"):
        came = "HTTP or another text protocol"
    return f"a PROXY header was expected and {came} came: the proxy must be told to send it, and others kept away"
