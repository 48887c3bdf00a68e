"""A WebSocket client by hand (RFC 6455, RFC 9112), free to break every rule. Shares no code with the package."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any, Self

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
SECONDS = 60.0


def upgrade_head(port: int, token: str, *, path: str = "/", drop: str = "", add: str = "") -> bytes:
    """A right request head for an upgrade.

    Args:
        port: of 127.0.0.1.
        token: the bearer token.
        path: the request target.
        drop: name of one field to leave out.
        add: whole extra lines, each with its CRLF.
    """
    fields = {
        "Host": f"127.0.0.1:{port}",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        "Sec-WebSocket-Protocol": "wstunnel.1",
        "Authorization": f"Bearer {token}",
    }
    lines = [f"{name}: {value}\r\n" for name, value in fields.items() if name.lower() != drop.lower()]
    return f"GET {path} HTTP/1.1\r\n{''.join(lines)}{add}\r\n".encode("latin-1")


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    """One frame (RFC 6455 §5.2). `reserved` is the three RSV bits as a number."""
    mask_bit = 0x80 if masked else 0
    first = (0x80 if fin else 0) | reserved << 4 | opcode
    if len(payload) < 126:
        header = struct.pack("!BB", first, mask_bit | len(payload))
    elif len(payload) < 65536:
        header = struct.pack("!BBH", first, mask_bit | 126, len(payload))
    else:
        header = struct.pack("!BBQ", first, mask_bit | 127, len(payload))
    return header + (mask(payload) if masked else payload)


def mask(payload: bytes) -> bytes:
    """A fresh key, and `payload` masked with it."""
    key = os.urandom(4)
    size = len(payload)
    stream = (key * (size // 4 + 1))[:size]
    return key + (int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")).to_bytes(size, "big")


def new_id() -> str:
    """128 random bits as 22 base64url characters."""
    return base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")


@dataclass(frozen=True)
class Head:
    """A response head."""

    status: int
    fields: dict[str, str]


class RawConnection:
    """One TCP connection to the server, with what was read and not yet used. Leaving its context closes it."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, size: int) -> bytes:
        """Raises AssertionError if the connection ends first."""
        while len(self._data) < size:
            self._more()
        data, self._data = self._data[:size], self._data[size:]
        return data

    def read_head(self) -> Head:
        """The response head; what follows it stays."""
        while b"\r\n\r\n" not in self._data:
            self._more()
        head, self._data = self._data.split(b"\r\n\r\n", 1)
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status = first.split(" ")[:2]
        assert version == "HTTP/1.1"
        pairs = (line.partition(":") for line in lines)
        return Head(int(status), {name.lower(): value.strip() for name, _, value in pairs})

    def read_to_end(self) -> bytes:
        """The rest, up to a clean end: a reset raises ConnectionResetError, so it is not taken for one."""
        while data := self.socket.recv(65536):
            self._data += data
        data, self._data = self._data, b""
        return data

    def _more(self) -> None:
        data = self.socket.recv(65536)
        assert data, f"the server closed after {self._data!r}"
        self._data += data


class RawLink(RawConnection):
    """A WebSocket to the server whose upgrade went right.

    Args:
        port: of a plain server on 127.0.0.1.
        token: a right one.
        role: if given, `hello` is sent and `welcome` read.
    """

    def __init__(self, port: int, token: str, *, role: str | None = "forward") -> None:
        super().__init__(port)
        try:
            self.send(upgrade_head(port, token))
            head = self.read_head()
            assert head.status == 101, head
            assert head.fields["sec-websocket-protocol"] == "wstunnel.1"
            if role is not None:
                self.send_message(**hello(role))
                assert self.read_message()["type"] == "welcome"
        except BaseException:
            self.socket.close()
            raise

    def send_message(self, **message: Any) -> None:
        self.send(frame(TEXT, json.dumps(message).encode()))

    def read_frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame, which must be final and unmasked, as all of a server's control is."""
        first, second = self.read(2)
        size = second & 0x7F
        assert not second & 0x80, "a server's frame is masked"
        if size == 126:
            (size,) = struct.unpack("!H", self.read(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self.read(8))
        return first & 0x0F, self.read(size)

    def read_frame_of_interest(self) -> tuple[int, bytes]:
        """The next frame that is no ping of either kind; `ping` messages are answered."""
        while True:
            opcode, payload = self.read_frame()
            if opcode == TEXT and (message := json.loads(payload))["type"] == "ping":
                self.send_message(type="pong", number=message["number"])
            elif opcode != PING:
                return opcode, payload

    def read_message(self) -> dict[str, Any]:
        """The next control message that is no `ping`."""
        opcode, payload = self.read_frame_of_interest()
        assert opcode == TEXT, f"opcode {opcode} with {payload!r}"
        message: dict[str, Any] = json.loads(payload)
        return message

    def read_data(self) -> bytes:
        """The payload of the next binary frame, whatever control comes before it."""
        opcode, payload = self.read_frame()
        while opcode != BINARY:
            assert opcode in (TEXT, PING), f"opcode {opcode} with {payload!r}"
            opcode, payload = self.read_frame()
        return payload

    def read_close(self) -> tuple[int, str]:
        """Code and reason of the close frame, whatever comes before it. The server then closes the connection."""
        while True:
            opcode, payload = self.read_frame()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big"), payload[2:].decode()

    def open(self, target: str, *, n: int = 1) -> str:
        """Open a stream and wait for `opened`. Returns the stream's id."""
        stream = new_id()
        self.send_message(type="open", n=n, stream=stream, target=target)
        while (message := self.read_message())["type"] != "opened":
            assert message["type"] == "ack", message
        assert message["n"] == n
        return stream


def hello(role: str = "forward", **changes: Any) -> dict[str, Any]:
    """A right `hello`, with `changes`."""
    return {"type": "hello", "version": 1, "session": new_id(), "role": role, "agent": "raw", "features": []} | changes
