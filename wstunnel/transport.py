"""A socket with or without TLS while Trio drives it: from accept or dial to the moment the reactor takes it over."""

from __future__ import annotations

import socket
import ssl
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from wstunnel.limits import LINGER_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

DISCARD_BYTES: Final = 64 * 1024
"""Read at once and thrown away while lingering."""
SKIM_BYTES: Final = 4 * 1024
"""Looked at at once before TLS: a PROXY header and what is behind it."""

_Result = TypeVar("_Result")


class Transport:
    """One connected stream socket, plain or TLS.

    Order of calls: `skim` if need be, `handshake` once (it does nothing without TLS), then `receive` and `send`, then
    either `detach`, which hands the socket over, or `finish` or `close`. One task at a time. After `close` or `detach`
    every call but `close` raises `trio.ClosedResourceError`.

    What the socket raises (`OSError`, `ssl.SSLError`) comes up as it is; the caller translates, see
    `tls.translate_tls_error`.

    Args:
        sock: a connected socket. Owned by this object from now on, and made non-blocking.
        context: `None` for a plain connection.
        server_side: whether this end accepts the handshake.
        server_hostname: client: the name to ask for and, as the context says, to verify.
    """

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext | None = None,
        server_side: bool = False,
        server_hostname: str | None = None,
    ) -> None:
        self._socket: socket.socket | None = sock
        self._context = context
        self._server_side = server_side
        self._server_hostname = server_hostname
        self._send_cut = False
        self._ready = context is None
        sock.setblocking(False)

    @property
    def tls(self) -> ssl.SSLSocket | None:
        """The TLS socket after `handshake`, for `tls.verify_pins`; `None` on a plain connection, or when it is gone."""
        return self._socket if isinstance(self._socket, ssl.SSLSocket) else None

    async def handshake(self) -> None:
        """Do the TLS handshake; a mere checkpoint without TLS. The caller sets the deadline.

        After an error or cancellation the transport can only be closed.

        Raises:
            ssl.SSLError, OSError: it failed, or the peer has gone.
            ValueError: `server_hostname` is missing or no name, which the caller should have known.
        """
        sock = self._open()
        if self._context is None:
            await trio.lowlevel.checkpoint()
            return
        # A peer that is gone is noticed here: wrap_socket takes the descriptor away from `sock` before it notices, and
        # (in CPython 3.11.7) leaves it to the garbage collector.
        sock.getpeername()
        try:
            wrapped = self._context.wrap_socket(
                sock,
                server_side=self._server_side,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=True,
                server_hostname=self._server_hostname,
            )
        except BaseException:
            self._socket = None
            sock.close()
            raise
        self._socket = wrapped
        await self._retry(wrapped.do_handshake, trio.lowlevel.wait_readable)
        self._ready = True

    async def skim(self, take: Callable[[bytes], int]) -> bool:
        """Wait for bytes that come before `handshake`, and let `take` have them; what it leaves, TLS will read.

        Args:
            take: gets the first `SKIM_BYTES` at most of what waits, and returns how many of them it has used. When it
                wants more than there are it uses all. What it raises comes up; nothing is taken then.

        Returns:
            False at the end of the connection, `take` not called.

        Raises:
            OSError: the connection broke.
        """
        sock = self._open()
        data = await self._retry(lambda: sock.recv(SKIM_BYTES, socket.MSG_PEEK), trio.lowlevel.wait_readable)
        if not data:
            return False
        used = take(data)
        while used:  # they are here: it does not wait
            used -= len(sock.recv(used))
        return True

    async def receive(self, max_bytes: int) -> bytes:
        """Wait for bytes: 1 to `max_bytes` of them, or `b""` at the end (with or without TLS's close_notify).

        Cancellation loses nothing: it comes before anything is read.

        Raises:
            ssl.SSLError, OSError: the connection broke.
        """
        sock = self._open()
        try:
            return await self._retry(lambda: sock.recv(max_bytes), trio.lowlevel.wait_readable)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, waiting for room as often as needed.

        When it is cancelled, a part may have been sent, and with TLS a record begun: then nothing can follow it, and
        further calls raise `trio.BrokenResourceError`.

        Raises:
            ssl.SSLError, OSError: the connection broke; a part may have been sent.
        """
        sock = self._open()
        if self._send_cut:
            raise trio.BrokenResourceError("an earlier send was cut short")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._send_cut = True
        with memoryview(data).cast("B") as view:
            done = 0
            while done < len(view):
                # OpenSSL wants a write that it could not finish again with the same bytes: `rest` does not change.
                with view[done:] as rest:
                    done += await self._retry(partial(sock.send, rest), trio.lowlevel.wait_writable)
        self._send_cut = False

    def detach(self) -> socket.socket | ssl.SSLSocket:
        """Hand the non-blocking socket over and forget it. With TLS, bytes may wait inside OpenSSL: read first."""
        sock = self._open()
        self._socket = None
        return sock

    async def finish(self, seconds: float = LINGER_SECONDS) -> None:
        """Close so that the peer gets what was sent: say the end, read and discard to the peer's end, then close.

        Closing with input unread would send a reset, which destroys what the peer has not read yet. Waits `seconds` at
        most; closed in any case, also when cancelled. Errors no longer matter and are not raised.
        """
        sock = self._open()
        try:
            with trio.move_on_after(seconds):
                self._say_goodbye(sock)
                # The plain socket's own method: SSLSocket's also forgets the TLS state.
                socket.socket.shutdown(sock, socket.SHUT_WR)
                # Likewise past TLS: what comes is thrown away, and OpenSSL calls data after a close_notify an error.
                discard = partial(socket.socket.recv, sock, DISCARD_BYTES)
                while await self._retry(discard, trio.lowlevel.wait_readable):
                    pass
        except OSError:
            pass  # The peer has reset the connection: that is an end, too.
        finally:
            self._shut()

    def close(self) -> None:
        """Close at once. A task that waits in here gets `trio.ClosedResourceError`. May be called again."""
        if self._socket is not None:
            self._say_goodbye(self._socket)
        self._shut()

    def _shut(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            trio.lowlevel.notify_closing(sock)
            sock.close()

    def _say_goodbye(self, sock: socket.socket) -> None:
        # RFC 8446 §6.1: "Each party MUST send a 'close_notify' alert before closing its write side of the connection".
        if isinstance(sock, ssl.SSLSocket) and self._ready:
            try:
                sock.unwrap()
            except (OSError, ValueError):
                pass  # Sent, and the peer's own has not come yet (SSLWantRead); or no peer, no room, a send cut short.

    def _open(self) -> socket.socket:
        if self._socket is None:
            raise trio.ClosedResourceError("this transport was closed or detached")
        return self._socket

    async def _retry(self, call: Callable[[], _Result], wait: Callable[[socket.socket], Awaitable[None]]) -> _Result:
        """Call until it does not say that it would block. Cancellation comes only before a call.

        TLS says itself what it waits for, since a read may have to write and the other way round; plain sockets do not.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            sock = self._open()
            try:
                result = call()
            except BlockingIOError:
                await wait(sock)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(sock)
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return result
