"""The server's side of SOCKS5 (RFC 1928, RFC 1929), SOCKS4 and 4a: bytes in, a `SocksRequest` out; and the UDP header.

    socks = SocksServer(authenticate=None)
    while socks.request is None:
        send(socks.feed(received))          # on ProtocolError: send(socks.refusal) and close
    ...                                     # dial socks.request.host and .port
    send(reply(socks.request, "opened", address, port))         # or a reset code, and close
    early = socks.leftover                  # what the client sent behind its request

The success reply goes out only after the target accepted: a refusal can then be told in SOCKS' own words.

GSSAPI and BIND are not served. SOCKS4 has no password, so it is refused where one is demanded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from wstunnel.errors import ProtocolError
from wstunnel.wire.addresses import IPV4_BYTES, IPV6_BYTES, PORT_MAX, pack_address, parse_host, unpack_address

Authenticate = Callable[[bytes, bytes], bool]
"""Is this user and password right? The caller compares in constant time."""

SOCKS4_TEXT_BYTES = 255
"""User id and name of a SOCKS4 request, which the protocol does not bound: what SOCKS5 can carry in a field."""

_VERSION_4, _VERSION_5 = 4, 5
_LOGIN_VERSION = 1  # RFC 1929 §2
_NO_LOGIN, _LOGIN, _NO_METHOD = 0x00, 0x02, 0xFF  # RFC 1928 §3
_CONNECT, _BIND, _UDP_ASSOCIATE = 1, 2, 3
_IPV4, _NAME, _IPV6 = 1, 3, 4
_ADDRESS_BYTES = {_IPV4: IPV4_BYTES, _IPV6: IPV6_BYTES}
_FIELD_BYTES = 255
_TLS_HANDSHAKE = 0x16

_FAILURE, _NO_SUCH_HOST, _NO_SUCH_COMMAND, _NO_SUCH_ADDRESS_TYPE = 1, 4, 7, 8
_REPLY_5 = {
    "opened": 0,
    "forbidden": 2,
    "unreachable": 4,  # whether the network or the host is, 3 or 4, nobody knows this far from the target
    "name-not-found": _NO_SUCH_HOST,
    "refused": 5,
    # RFC 1928 §6 has no "timed out". "TTL expired" is what Tor and Dante say for it, so that clients can tell it from
    # an unreachable host.
    "timeout": 6,
    "command-not-supported": _NO_SUCH_COMMAND,
}
_GRANTED_4, _REJECTED_4 = 90, 91


def sniff(first_byte: int) -> Literal["socks", "http"] | None:
    """What a client begins to speak, for a port that serves both: every HTTP method begins with a letter."""
    if first_byte in (_VERSION_4, _VERSION_5):
        return "socks"
    return "http" if ord("A") <= first_byte & 0xDF <= ord("Z") else None


class Command(Enum):
    """What a client asks for."""

    CONNECT = "connect"
    UDP_ASSOCIATE = "udp-associate"


@dataclass(frozen=True, slots=True)
class SocksRequest:
    """What a client wants, checked.

    Args:
        version: 4 (4a included) or 5.
        command: UDP_ASSOCIATE with version 5 only.
        host: a lower-case name, or an address in its usual form without brackets. For UDP_ASSOCIATE where the client
            says that it will send from; all zeros when it does not know.
        port: 1 to 65535; for UDP_ASSOCIATE also 0.
    """

    version: Literal[4, 5]
    command: Command
    host: str
    port: int


class SocksServer:
    """One client's negotiation, fed in any split. At most one message, 520 bytes, is held before there is a request.

    Args:
        authenticate: judges user and password (RFC 1929), which clients then must give. `None`: none are asked for.
    """

    def __init__(self, authenticate: Authenticate | None = None) -> None:
        self.request: SocksRequest | None = None
        """The request, once it is whole."""
        self.leftover = b""
        """Bytes that came behind the request; empty until there is one."""
        self.refusal = b""
        """After a ProtocolError: what is still to be sent before the connection is closed; often empty."""
        self._authenticate = authenticate
        self._buffer = bytearray()
        self._out = bytearray()
        self._step: Callable[[SocksServer], bool] = SocksServer._read_version
        self._error: str | None = None

    def feed(self, data: bytes) -> bytes:
        """Take more bytes from the client; look at `request` after each call. More behind it is added to `leftover`.

        Returns:
            What is to be sent now, often nothing. It may come together with `request`.

        Raises:
            ProtocolError: this is no SOCKS, or something that is not served, or the password was wrong: send
                `refusal` and close. It repeats itself when more is fed.
        """
        if self._error is not None:
            raise ProtocolError(self._error)
        if self.request is not None:
            self.leftover += data
            return b""
        self._buffer += data
        try:
            while self._step(self):
                if self.request is not None:
                    self.leftover = bytes(self._buffer)
                    self._buffer.clear()
                    break
        except ProtocolError as error:
            self._error = str(error)
            self.refusal = bytes(self._out)
            self._buffer.clear()
            raise
        out = bytes(self._out)
        self._out.clear()
        return out

    # Each step reads one message from the start of the buffer: false while it is not whole.

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _read_version(self) -> bool:
        if not self._buffer:
            return False
        version = self._buffer[0]
        if version == _VERSION_5:
            self._step = SocksServer._read_methods
        elif version == _VERSION_4:
            self._step = SocksServer._read_request_4
        elif sniff(version) == "http":
            raise ProtocolError(f"the client spoke no SOCKS but HTTP, to judge by its first byte {chr(version)!r}")
        elif version == _TLS_HANDSHAKE:
            raise ProtocolError("the client spoke TLS, and this port speaks plain SOCKS")
        else:
            raise ProtocolError(f"the client spoke no SOCKS4 or SOCKS5: its first byte is 0x{version:02x}")
        return True

    def _read_methods(self) -> bool:
        """RFC 1928 §3: VER, NMETHODS, METHODS."""
        buffer = self._buffer
        if len(buffer) < 2 or len(buffer) < 2 + buffer[1]:
            return False
        methods = self._take(2 + buffer[1])[2:]
        wanted = _NO_LOGIN if self._authenticate is None else _LOGIN
        if wanted not in methods:
            # RFC 1928 §3: "If the selected METHOD is X'FF', none of the methods listed by the client are acceptable,
            # and the client MUST close the connection."
            self._out += bytes((_VERSION_5, _NO_METHOD))
            raise ProtocolError(
                "the client offers no way to go without a password"
                if self._authenticate is None
                else "the client offers no user name and password, which are demanded here"
            )
        self._out += bytes((_VERSION_5, wanted))
        self._step = SocksServer._read_request_5 if self._authenticate is None else SocksServer._read_login
        return True

    def _read_login(self) -> bool:
        """RFC 1929 §2: VER, ULEN, UNAME, PLEN, PASSWD. Empty ones are left to the judge: curl sends them."""
        buffer = self._buffer
        if buffer and buffer[0] != _LOGIN_VERSION:
            raise ProtocolError(f"version {buffer[0]} of SOCKS5's password message, where 1 is the only one")
        if len(buffer) < 2 or len(buffer) < 3 + buffer[1]:
            return False
        password_begin = 3 + buffer[1]
        password_bytes = buffer[password_begin - 1]
        if len(buffer) < password_begin + password_bytes:
            return False
        message = self._take(password_begin + password_bytes)
        assert self._authenticate is not None
        if not self._authenticate(message[2 : password_begin - 1], message[password_begin:]):
            self._out += bytes((_LOGIN_VERSION, 1))
            raise ProtocolError("wrong user name or password")
        self._out += bytes((_LOGIN_VERSION, 0))
        self._step = SocksServer._read_request_5
        return True

    def _read_request_5(self) -> bool:
        """RFC 1928 §4: VER, CMD, RSV, ATYP, DST.ADDR, DST.PORT. What is reserved is not looked at."""
        buffer = self._buffer
        if buffer and buffer[0] != _VERSION_5:
            raise self._refused_5(_FAILURE, f"version {buffer[0]} in a SOCKS5 request")
        if len(buffer) < 5:
            return False
        kind = buffer[3]
        if kind != _NAME and kind not in _ADDRESS_BYTES:
            raise self._refused_5(_NO_SUCH_ADDRESS_TYPE, f"address type {kind} is none of SOCKS5's")
        begin = 5 if kind == _NAME else 4
        end = begin + (buffer[4] if kind == _NAME else _ADDRESS_BYTES[kind])
        if len(buffer) < end + 2:
            return False
        message = self._take(end + 2)
        if message[1] not in (_CONNECT, _UDP_ASSOCIATE):
            name = "BIND" if message[1] == _BIND else f"command {message[1]}"
            raise self._refused_5(_NO_SUCH_COMMAND, f"SOCKS5's {name} is not served")
        command = Command.CONNECT if message[1] == _CONNECT else Command.UDP_ASSOCIATE
        host = _read_host(kind, message[begin:end])
        if host is None:
            raise self._refused_5(_NO_SUCH_HOST, "what stands for the name of a host is none")
        port = int.from_bytes(message[end:], "big")
        if port == 0 and command is Command.CONNECT:
            raise self._refused_5(_FAILURE, "nothing can be reached at port 0")
        self.request = SocksRequest(5, command, host, port)
        return True

    def _refused_5(self, code: int, what: str) -> ProtocolError:
        self._out += _reply_5(code, "", 0)
        return ProtocolError(what)

    def _read_request_4(self) -> bool:
        """VN, CD, DSTPORT, DSTIP, USERID, NUL; with 4a a name and another NUL. The user id proves nothing."""
        buffer = self._buffer
        user_end = self._text_end(8, "user id")
        if user_end is None:
            return False
        # SOCKS4a: "a 0.0.0.x with nonzero x, an inadmissible destination address", says that a name follows.
        named = not any(buffer[4:7]) and buffer[7] != 0
        name_end = self._text_end(user_end + 1, "name") if named else user_end
        if name_end is None:
            return False
        message = self._take(name_end + 1)
        if self._authenticate is not None:
            raise self._refused_4("a password is demanded here, and SOCKS4 has none: use SOCKS5")
        if message[1] != _CONNECT:
            name = "BIND" if message[1] == _BIND else f"command {message[1]}"
            raise self._refused_4(f"SOCKS4's {name} is not served")
        host = _read_host(_NAME, message[user_end + 1 : name_end]) if named else unpack_address(message[4:8])
        if host is None:
            raise self._refused_4("what stands for the name of a host is none")
        port = int.from_bytes(message[2:4], "big")
        if port == 0:
            raise self._refused_4("nothing can be reached at port 0")
        self.request = SocksRequest(4, Command.CONNECT, host, port)
        return True

    def _text_end(self, begin: int, what: str) -> int | None:
        """The index of the NUL behind the text at `begin`; `None` if it has not come."""
        end = self._buffer.find(0, begin, begin + SOCKS4_TEXT_BYTES + 1)
        if end >= 0:
            return end
        if len(self._buffer) > begin + SOCKS4_TEXT_BYTES:
            raise self._refused_4(f"the {what} of a SOCKS4 request is longer than {SOCKS4_TEXT_BYTES} bytes")
        return None

    def _refused_4(self, what: str) -> ProtocolError:
        self._out += _reply_4(_REJECTED_4, "", 0)
        return ProtocolError(what)


def _read_host(kind: int, field: bytes) -> str | None:
    if kind != _NAME:
        return unpack_address(field)
    return parse_host(field.decode("latin-1"))  # what is not ASCII is no name


# --- replies --------------------------------------------------------------------------------------------------------


def reply(request: SocksRequest, code: str, address: str = "", port: int = 0) -> bytes:
    """The answer to a request; after any other than `opened` the caller closes the connection.

    Args:
        request: what is answered.
        code: `opened`, or a reset code of docs/reference/protocol.md; those that SOCKS has no word for, unknown ones
            too, are its general failure.
        address: where the target was reached from, or for UDP_ASSOCIATE where datagrams are taken: an IP address
            without brackets. Anything else becomes all zeros: hardly a client reads it, and some choke on a name.
        port: 0 to 65535, in the same place.
    """
    if request.version == _VERSION_4:
        return _reply_4(_GRANTED_4 if code == "opened" else _REJECTED_4, address, port)
    return _reply_5(_REPLY_5.get(code, _FAILURE), address, port)


def _reply_5(code: int, address: str, port: int) -> bytes:
    packed = pack_address(address) or bytes(IPV4_BYTES)
    kind = _IPV4 if len(packed) == IPV4_BYTES else _IPV6
    return bytes((_VERSION_5, code, 0, kind)) + packed + port.to_bytes(2, "big")


def _reply_4(code: int, address: str, port: int) -> bytes:
    packed = pack_address(address) or b""
    if len(packed) != IPV4_BYTES:
        packed, port = bytes(IPV4_BYTES), 0
    return bytes((0, code)) + port.to_bytes(2, "big") + packed


# --- datagrams ------------------------------------------------------------------------------------------------------


class UdpPacket(NamedTuple):
    """A datagram between a client and its relay: where the payload goes, or came from."""

    host: str
    port: int
    payload: bytes


def parse_udp(datagram: bytes) -> UdpPacket:
    """Take apart what a client sent to its relay (RFC 1928 §7): RSV, FRAG, ATYP, DST.ADDR, DST.PORT, DATA.

    Raises:
        ProtocolError: drop it. It is cut short, goes to no host or to port 0, or is a fragment. RFC 1928 §7:
            "Implementation of fragmentation is optional; an implementation that does not support fragmentation MUST
            drop any datagram whose FRAG field is other than X'00'."
    """
    if len(datagram) < 5:
        raise ProtocolError("a datagram shorter than the header of SOCKS5")
    if datagram[2]:
        raise ProtocolError("a fragment of a datagram: fragmentation is not served")
    kind = datagram[3]
    if kind != _NAME and kind not in _ADDRESS_BYTES:
        raise ProtocolError(f"address type {kind} is none of SOCKS5's")
    begin = 5 if kind == _NAME else 4
    end = begin + (datagram[4] if kind == _NAME else _ADDRESS_BYTES[kind])
    if len(datagram) < end + 2:
        raise ProtocolError("a datagram shorter than the header of SOCKS5")
    host = _read_host(kind, datagram[begin:end])
    port = int.from_bytes(datagram[end : end + 2], "big")
    if host is None or port == 0:
        raise ProtocolError("a datagram to what is no host, or to port 0")
    return UdpPacket(host, port, datagram[end + 2 :])


def udp_header(host: str, port: int) -> bytes:
    """What stands before each payload that comes from `host` and `port`; a flow needs it only once.

    Args:
        host: a name, or an IP address without brackets.
        port: 0 to 65535.

    Raises:
        ValueError: `host` is longer than the 255 bytes of ASCII that fit in, or the port is none.
    """
    if not 0 <= port <= PORT_MAX:
        raise ValueError(f"{port} is no port")
    packed = pack_address(host)
    if packed is None:
        name = host.encode("ascii")  # UnicodeEncodeError is a ValueError
        if len(name) > _FIELD_BYTES:
            raise ValueError(f"a name of {len(name)} bytes, where {_FIELD_BYTES} fit in")
        address = bytes((_NAME, len(name))) + name
    else:
        address = bytes((_IPV4 if len(packed) == IPV4_BYTES else _IPV6,)) + packed
    return b"\0\0\0" + address + port.to_bytes(2, "big")


def build_udp(host: str, port: int, payload: bytes) -> bytes:
    """The datagram for a client: `payload` behind its `udp_header`, and errors as there."""
    return udp_header(host, port) + payload
