"""Sockets that take datagrams: each source is a flow of its own, and what comes back goes to it.

A socket that is bound to all addresses learns from the kernel which one was asked (IP_PKTINFO, ip(7)), and answers from
that: from another a client would not take it.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Generic, TypeVar

from wstunnel import limits, logs, sockets
from wstunnel.endpoints import tcp
from wstunnel.errors import LocalError, StreamError
from wstunnel.flow import READ_BYTES, READ_DATAGRAMS, Flow
from wstunnel.flows import REFUSED
from wstunnel.ingress import Ingress, Wanted, Way
from wstunnel.reactor import Handler, Reactor
from wstunnel.targets import join_host_port
from wstunnel.wire.datagrams import HEADER_BYTES

REFUSED_SECONDS = 1.0
"""After a refusal: for so long the source's datagrams are dropped, else each of them would ask again."""

_LINUX_IP_PKTINFO = 8  # linux/in.h; `socket` has no name for it before Python 3.14
_PKTINFO_4 = struct.Struct("=i4s4s")  # index, the address that was asked, the destination in the header
_PKTINFO_6 = struct.Struct("=16si")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_PKTINFO_6.size) if hasattr(socket, "CMSG_SPACE") else 0

_log = logs.logger("udp")
Key = TypeVar("Key", bound=Hashable)


class FlowTable(Generic[Key]):
    """The flows of one socket, by what tells them apart.

    Args:
        way: opens them.
        begin: asked of a key that has no flow: the target, as canonical text, and the source's name; None: there is to
            be none.
        reply: sends a datagram that came back, given the flow's key; returns whether the socket took it.

    Attributes:
        most: flows at a time; beyond it the one that was idle longest ends. Those whose end the peer has yet to confirm
            do not count.
    """

    def __init__(
        self,
        way: Way,
        begin: Callable[[Key], tuple[str, str] | None],
        reply: Callable[[Key, bytes | memoryview], bool],
    ) -> None:
        self.most = limits.LISTENER_FLOWS
        self._way = way
        self._ends_of = begin
        self._reply = reply
        self._flows: OrderedDict[Key, Flow] = OrderedDict()  # the one that was idle longest first
        self._refused: dict[Key, float] = {}  # and until when
        self._written: dict[Flow, None] = {}  # since the last flush

    def __len__(self) -> int:
        return len(self._flows)

    def find(self, key: Key) -> Flow | None:
        """The flow of that key."""
        return self._flows.get(key)

    def send(self, key: Key, datagram: bytes) -> None:
        """Send a datagram on its flow, which begins with it if there is none; goes out with `flush`."""
        flow = self._flows.get(key)
        if flow is None:
            self._begin(key, datagram)
        else:
            self._flows.move_to_end(key)
            flow.send(datagram)
            self._written[flow] = None

    def _begin(self, key: Key, datagram: bytes) -> None:
        try:
            ingress, forward = self._way()
        except StreamError as error:
            _log.debug("datagram dropped", reason=str(error))
            return
        if ingress.flows_refused or self._is_refused(key, ingress.now):
            return
        ends = self._ends_of(key)
        if ends is None:
            return
        if len(self._flows) >= self.most and not self._make_room():
            return
        target, peer = ends
        flow = ingress.make_flow(target, peer, forward=forward, receive=partial(self._receive, key))
        flow.when_ending = partial(self._ended, key)
        self._flows[key] = flow
        flow.send(datagram)
        ingress.accepted(Wanted(flow.target, flow.peer, forward=flow.forward, flow=flow))

    def _make_room(self) -> bool:
        """End the flow that was idle longest. False if that waits for a link: one more in its place helps nobody."""
        key, oldest = next(iter(self._flows.items()))
        if oldest.link is None:
            return False
        oldest.when_ending = None  # its source was not refused: with its next datagram it is the newest
        self._forget(key, oldest)
        oldest.reset("limit", "too many flows: the one that was idle longest ends")
        return True

    def _forget(self, key: Key, flow: Flow) -> None:
        del self._flows[key]
        self._written.pop(flow, None)

    def _is_refused(self, key: Key, now: float) -> bool:
        until = self._refused.get(key)
        if until is None:
            return False
        if now < until:
            return True
        del self._refused[key]
        return False

    def _receive(self, key: Key, data: bytes | memoryview) -> bool:
        self._flows.move_to_end(key)
        return self._reply(key, data)

    def _ended(self, key: Key, flow: Flow) -> None:
        """The next datagram of that key begins another."""
        self._forget(key, flow)
        assert flow.reason is not None
        if flow.reason[0] in REFUSED:
            if len(self._refused) >= self.most:
                del self._refused[next(iter(self._refused))]
            self._refused[key] = flow.reactor.now + REFUSED_SECONDS

    def flush(self) -> None:
        """Write what `send` has queued, each link once."""
        written, self._written = self._written, {}
        for flow in written:
            if flow.link is not None:
                flow.link.flush()

    def close(self, reason: str) -> None:
        """End all flows."""
        for flow in list(self._flows.values()):
            flow.reset("shutdown", reason)
        self._refused.clear()

    def hand_over(self, ingress: Ingress, forward: str) -> None:
        """From now on another session opens the flows. Those that there are end: its links do not carry them."""
        self.close("another client of the same user has it now")
        self._way = lambda: (ingress, forward)


class UdpListener(Handler):
    """Takes datagrams on the reactor, until it is dropped or closed.

    Args:
        sock: bound; the reactor's from `start` on.
        ingress: opens flows.
        target: what they lead to, canonical text; on `reverse` links the client knows, and this is empty.
        forward: on `reverse` links, the forward's id.
    """

    __slots__ = ("_flows", "_pktinfo", "_sock", "_target")

    def __init__(self, sock: socket.socket, ingress: Ingress, *, target: str = "", forward: str = "") -> None:
        super().__init__()
        self._sock = sock
        self._target = target
        self._flows: FlowTable[tuple[Any, bytes]] = FlowTable(lambda: (ingress, forward), self._begin, self._reply)
        self._pktinfo = _ask_destination(sock)
        sockets.widen(sock)

    @property
    def flows(self) -> FlowTable[tuple[Any, bytes]]:
        """Of this socket, by the source's address and the address that it asked."""
        return self._flows

    def start(self, reactor: Reactor) -> None:
        """Take datagrams from now on.

        Raises:
            LocalError: the reactor cannot watch the socket; it is closed.
        """
        try:
            reactor.adopt(self, self._sock, look=False)
        except LocalError:
            self._sock.close()
            raise

    def stop(self, reason: str) -> None:
        """Take no more, and end all flows."""
        if self.sock is not None:
            self.reactor.drop(self)
        self._flows.close(reason)

    def on_readable(self) -> None:
        room = READ_BYTES
        sock, scratch = self.sock, self.reactor.scratch
        assert sock is not None
        flows = self._flows
        try:
            for _ in range(READ_DATAGRAMS):
                asked = b""
                if self._pktinfo is None:
                    size, address = sock.recvfrom_into(scratch)
                else:
                    size, ancillary, _flags, address = sock.recvmsg_into([scratch], _ANCILLARY_BYTES)
                    asked = _destination(ancillary)
                flows.send((address, asked), bytes(scratch[:size]))
                room -= size + HEADER_BYTES
                if room <= 0:
                    break
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            # Of an earlier reply, which its receiver did not want (ICMP): no concern of the other sources.
            _log.debug("a datagram could not be sent or taken", reason=str(error))
        flows.flush()

    def _begin(self, key: tuple[Any, bytes]) -> tuple[str, str]:
        address, _asked = key
        return self._target, join_host_port(address[0], address[1])

    def _reply(self, key: tuple[Any, bytes], data: bytes | memoryview) -> bool:
        sock = self.sock
        if sock is None:
            return False
        address, asked = key
        try:
            if asked and self._pktinfo is not None:
                sock.sendmsg([data], [(*self._pktinfo, asked)], 0, address)
            else:
                sock.sendto(data, address)
        except OSError:
            return False  # no room, too long for the way, or what an earlier one met with: it is lost, as may happen
        return True

    def on_writable(self) -> None:
        """Never: what the socket does not take at once is lost."""

    def on_hangup(self) -> None:
        """Never: reading is always wanted."""

    def fail(self, error: Exception) -> None:
        """One datagram's fault. The socket goes on with the next."""
        _log.exception("fault in our own code", address="" if self.sock is None else tcp.local_name(self.sock))


def _ask_destination(sock: socket.socket) -> tuple[int, int] | None:
    """Have the kernel say which address each datagram went to. Returns how a reply says the same; None: no need."""
    if sys.platform != "linux" or sock.getsockname()[0] not in ("0.0.0.0", "::"):  # noqa: S104  # a comparison
        return None
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _LINUX_IP_PKTINFO, 1)
        return socket.IPPROTO_IP, _LINUX_IP_PKTINFO
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO


def _destination(ancillary: list[tuple[int, int, bytes]]) -> bytes:
    """What a reply must carry to come from the address that was asked; empty if the kernel did not say."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _LINUX_IP_PKTINFO and len(data) >= _PKTINFO_4.size:
            _index, asked, _header = _PKTINFO_4.unpack_from(data)
            return _PKTINFO_4.pack(0, asked, bytes(4))  # the route decides on the interface
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO and len(data) >= _PKTINFO_6.size:
            address, index = _PKTINFO_6.unpack_from(data)
            if address[0] == 0xFF:
                return b""  # asked of a group (RFC 4291 §2.7: none "must" be a source): the route decides
            return _PKTINFO_6.pack(address, index if address[:2] == b"\xfe\x80" else 0)
    return b""
