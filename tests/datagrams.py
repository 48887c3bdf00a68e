"""UDP sockets in memory: a test brings each datagram, and looks at what was sent."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from typing import Any

from tests.memory import MemorySocket

Ancillary = list[tuple[int, int, bytes]]


class MemoryDatagrams:
    """A UDP socket. `error` fails the next call once; while `full` nothing can be sent.

    Attributes:
        arrived: what can be received: datagram, source, ancillary data.
        sent: what was sent: datagram, destination (None: what it is connected to), ancillary data.
    """

    family = socket.AF_INET

    def __init__(self, name: tuple[str, int] = ("127.0.0.1", 5353)) -> None:
        MemorySocket._number += 1
        self._fd = MemorySocket._number
        self.name = name
        self.arrived: deque[tuple[bytes, Any, Ancillary]] = deque()
        self.sent: list[tuple[bytes, Any, Ancillary]] = []
        self.options: dict[tuple[int, int], Any] = {}
        self.error: int | None = None
        self.full = False
        self.closed = False
        self.reset_by_peer = False

    def arrive(self, *datagrams: bytes, source: Any = ("192.0.2.1", 5000), ancillary: Ancillary | None = None) -> None:
        self.arrived += [(datagram, source, ancillary or []) for datagram in datagrams]

    def take(self) -> list[bytes]:
        """What was sent since the last call."""
        sent, self.sent = self.sent, []
        return [datagram for datagram, _, _ in sent]

    def fileno(self) -> int:
        return -1 if self.closed else self._fd

    def getsockname(self) -> tuple[str, int]:
        return self.name

    def setblocking(self, _blocking: bool) -> None:
        pass

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        self.options[level, option] = value

    def readable(self) -> bool:
        return bool(self.arrived) or self.error is not None

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    def recvmsg_into(self, buffers: list[memoryview], _ancillary: int) -> tuple[int, Ancillary, int, Any]:
        self._check()
        if not self.arrived:
            raise BlockingIOError(errno.EAGAIN, "again")
        datagram, source, ancillary = self.arrived.popleft()
        size = min(len(datagram), len(buffers[0]))
        buffers[0][:size] = datagram[:size]
        return size, ancillary, 0, source

    def recvfrom_into(self, buffer: memoryview) -> tuple[int, Any]:
        size, _, _, source = self.recvmsg_into([buffer], 0)
        return size, source

    def recv_into(self, buffer: memoryview) -> int:
        return self.recvfrom_into(buffer)[0]

    def sendmsg(self, buffers: list[bytes], ancillary: Ancillary, _flags: int, address: Any) -> int:
        self._check()
        if self.full:
            raise BlockingIOError(errno.EAGAIN, "again")
        datagram = b"".join(buffers)
        self.sent.append((datagram, address, ancillary))
        return len(datagram)

    def sendto(self, datagram: bytes, address: Any) -> int:
        return self.sendmsg([datagram], [], 0, address)

    def send(self, datagram: bytes) -> int:
        return self.sendmsg([datagram], [], 0, None)

    def _check(self) -> None:
        assert not self.closed
        if self.error is not None:
            code, self.error = self.error, None
            raise OSError(code, os.strerror(code))
