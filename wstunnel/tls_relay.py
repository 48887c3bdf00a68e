"""TLS in TLS: a plain socket for the reactor, whose bytes two Trio tasks carry through an outer TLS connection.

The reactor wants one socket with a descriptor, and the server's TLS on it. With TLS to a proxy there is another TLS
around that. A pair of Unix sockets stands between: one end is the reactor's, the other is pumped here. That costs a
copy each way and `trio.SSLStream`, which is two to three times as dear as TLS on the reactor: only who has such a proxy
pays.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from wstunnel import limits, sockets

RELAY_BYTES = 64 * limits.KIB
"""Read at once, and asked of the kernel for each direction of the pair: no control message overtakes what is there."""
_ANY_NUMBER = 2**31 - 1
_ENDS = (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, OSError)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, non-blocking: the reactor's end and the relay's."""
    near, far = socket.socketpair()
    for sock in (near, far):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RELAY_BYTES)
    return near, far


class Relays:
    """The tasks that relay. They live as long as their connections, so somebody must run this who lives longer."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until it is cancelled, which cuts every connection that is relayed. Started at once."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def start(self, far: socket.socket, outer: trio.SSLStream[trio.SocketStream]) -> None:
        """Begin to relay; see `relay`.

        Raises:
            RuntimeError: it does not run; nothing was taken over.
        """
        if self._nursery is None:
            raise RuntimeError("the relays do not run")
        self._nursery.start_soon(relay, far, outer)


async def relay(far: socket.socket, outer: trio.SSLStream[trio.SocketStream]) -> None:
    """Carry bytes both ways until both have ended, or one has and the other has had LINGER_SECONDS; then close both.

    A connection of the proxy that breaks ends the near end as well. Raises nothing but `trio.Cancelled`.

    Args:
        far: the relay's end of `pair`. Owned from now on, as is `outer`.
        outer: after its handshake.
    """
    inner = trio.SocketStream(trio.socket.from_stdlib_socket(far))
    plain = outer.transport_stream.socket
    # What the link would set on a socket of its own.
    with _borrowed(plain) as sock:
        sockets.limit_unsent(sock, RELAY_BYTES)
        sockets.give_up_after(sock, limits.STALLED_SECONDS)
    try:
        async with trio.open_nursery() as nursery:

            async def outward() -> None:
                try:
                    while data := await inner.receive_some(RELAY_BYTES):
                        await outer.send_all(data)
                except _ENDS:
                    nursery.cancel_scope.cancel()  # nothing can follow on either side
                linger()

            async def inward() -> None:
                try:
                    while data := await outer.receive_some(RELAY_BYTES):
                        await inner.send_all(data)
                    await inner.send_eof()
                except _ENDS:
                    nursery.cancel_scope.cancel()
                linger()

            def linger() -> None:
                # TLS has no half-close that Trio knows. Who said the end waits for the other's last bytes only.
                deadline = trio.current_time() + limits.LINGER_SECONDS
                nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, deadline)

            nursery.start_soon(outward)
            nursery.start_soon(inward)
    finally:
        inner.socket.close()
        await _say_goodbye(outer)
        plain.close()


async def _say_goodbye(outer: trio.SSLStream[trio.SocketStream]) -> None:
    """RFC 8446 §6.1: a close_notify MUST go before the end. Waits for nothing, not for the proxy's own either."""
    outer.transport_stream = _Hurried(outer.transport_stream.socket)  # type: ignore[assignment]  # has what is used
    with trio.CancelScope(shield=True):
        try:
            # OpenSSL calls data after a close_notify an error, and Trio keeps the alert then.
            with suppress(trio.WouldBlock):
                while await outer.receive_some(RELAY_BYTES):
                    pass
            with suppress(trio.WouldBlock):  # it went, and the proxy's own has not come
                await outer.unwrap()
        except _ENDS:
            pass  # no proxy; or a send was cut short, and nothing can follow it


class _Hurried:
    """A stream that takes and gives what it can at once."""

    def __init__(self, plain: trio.socket.SocketType) -> None:
        self._plain = plain

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        with _borrowed(self._plain) as sock:
            sockets.limit_unsent(sock, _ANY_NUMBER)  # or what waits would keep it out
            sock.send(data)

    @staticmethod
    async def receive_some() -> bytes:
        await trio.lowlevel.checkpoint()
        raise trio.WouldBlock


@contextmanager
def _borrowed(plain: trio.socket.SocketType) -> Iterator[socket.socket]:
    """Trio's socket as one of the standard library."""
    sock = socket.socket(fileno=plain.fileno())
    try:
        sock.setblocking(False)
        yield sock
    finally:
        sock.detach()
