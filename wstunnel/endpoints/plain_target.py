"""The target's side of a plain endpoint's connection: bytes, an end, or a reset."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from wstunnel import limits, sockets
from wstunnel.endpoints.plain_side import QUEUE_BYTES, Side
from wstunnel.reactor import READ, WRITE
from wstunnel.wire.buffer import OffsetBuffer
from wstunnel.wire.plain import HEADER_BYTES

if TYPE_CHECKING:
    from wstunnel.endpoints.plain import PlainConnection

_UNIX: socket.AddressFamily | None = getattr(socket, "AF_UNIX", None)
WRITE_TURNS = 4
"""Writes of the queue for one event: a fast target must not keep the reactor to itself."""


class TargetSide(Side):
    """The raw end of a `PlainConnection`.

    Attributes:
        queue: from the client, not yet taken.
        discarding: the client hears no more; what comes is read and thrown away, so that the target is not held up.
    """

    __slots__ = (
        "_breaking", "_deadline", "_ended", "_failed", "_finishing", "_progress_at", "_shut", "_unsent", "discarding",
        "queue",
    )  # fmt: skip

    def __init__(self, connection: PlainConnection, *, now: float) -> None:
        super().__init__(connection)
        self.queue = OffsetBuffer()
        self.discarding = False
        self._ended = False  # its EOF came
        self._failed = False  # it takes no more
        self._finishing = False  # it gets our EOF behind the queue
        self._breaking = False  # or rather a reset
        self._shut = False  # it has got it
        self._progress_at = now
        self._deadline = now  # of the lingering; moved on while anything is yet to be delivered
        self._unsent = 0  # what the kernel held at the last sweep

    @property
    def resettable(self) -> bool:
        """Whether its connection can be reset: a Unix socket's end always looks like an orderly one."""
        return self.sock is not None and self.sock.family != _UNIX

    def refresh(self, *, may_read: bool) -> None:
        """Ask the reactor for what is wanted."""
        if self.sock is not None:
            mask = READ if may_read and not self._ended else 0
            self.reactor.want(self, mask | WRITE if len(self.queue) else mask)

    def read(self) -> None:
        if self.sock is None or self._ended:
            return
        client = self.connection.client
        # What others took since `refresh` may have been the last room.
        if not self.discarding and not (client.ready() and self.connection.principal.budget.room()):
            return
        scratch = self.reactor.scratch[HEADER_BYTES:]
        try:
            size = self.sock.recv_into(scratch, len(scratch) if self.discarding else client.read_size())
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._broke(error)
            return
        if not size:
            self._ended = True
            if self._failed:
                self.drop(reset=True)
                self.connection.target_broke("connection reset")
            else:
                self._drop_if_done()
                self.connection.target_ended()
        elif not self.discarding:
            client.send(size)

    def deliver(self, data: bytes | memoryview) -> None:
        """To the target as far as it takes it at once, else into the queue."""
        if self.sock is None or self._failed:
            return
        if not len(self.queue):
            self._progress_at = self.reactor.now
            try:
                data = data[self.sock.send(data) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self._takes_no_more(error)
                return
        if len(data):
            self.queue.append(data)

    def write(self) -> None:
        for _ in range(WRITE_TURNS):
            if self.sock is None or not len(self.queue):
                break
            view = self.queue.view(self.queue.start, QUEUE_BYTES)
            try:
                sent = self.sock.send(view)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                del view
                self._takes_no_more(error)
                return
            whole = sent == len(view)
            del view
            self.queue.release(self.queue.start + sent)
            self._progress_at = self.reactor.now
            if not whole:
                break
        if self._finishing:
            self.finish()

    def finish(self, *, reset: bool = False) -> None:
        """Say EOF behind the queue. Close at the target's, or LINGER_SECONDS after its kernel acked all.

        Args:
            reset: say no EOF, and then reset: the lingering is the target's time to read what a reset may destroy. A
                Unix socket is told EOF all the same.
        """
        if not self._finishing:
            self._finishing = self.discarding = True
            self._progress_at = self.reactor.now
        self._breaking = self._breaking or (reset and self.resettable)
        if self.sock is None or self._shut or len(self.queue):
            return
        self._deadline = self.reactor.now + limits.LINGER_SECONDS
        if self._breaking:
            return  # the sweep goes on
        self._shut = True
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._broke(error)
            return
        self._drop_if_done()

    def _drop_if_done(self) -> None:
        if self._ended and self._shut:
            self.drop()

    def _takes_no_more(self, error: OSError) -> None:
        """A write failed. What the target sent before may still be read: it is broken off behind that."""
        self._failed = True
        self.queue.release(self.queue.end)
        if self._ended or self._finishing:
            self._broke(error)

    def _broke(self, error: OSError) -> None:
        self.drop(reset=True)
        if error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
            self.connection.target_broke("connection reset")
        else:
            self.connection.target_broke(f"the {self.connection.near}'s connection failed: {error.strerror or error}")

    def drop(self, *, reset: bool = False) -> None:
        """Close the socket now, with a TCP reset if it is no orderly end."""
        self.queue.release(self.queue.end)
        if self.sock is not None:
            if reset:
                sockets.reset_on_close(self.sock)
            self.reactor.drop(self)

    def hung_up(self) -> None:
        """Nothing to do: what it sent before is still to be read, and the read behind it tells the same."""

    def sweep(self, now: float) -> None:
        """Nobody waits for ever for a target that the client has left."""
        if self.sock is None or not self._finishing:
            return
        # To close early can destroy what the kernel has yet to send, also without a reset of ours: a target that says
        # anything after that draws one. Where it cannot be known what the kernel holds, the lingering has to do.
        unsent = sockets.unsent(self.sock) or 0
        if unsent < self._unsent:
            self._progress_at = now
        self._unsent = unsent
        if unsent or len(self.queue):
            self._deadline = now + limits.LINGER_SECONDS
            if now - self._progress_at > limits.STALLED_SECONDS:
                self.drop(reset=not self._shut)
        elif now >= self._deadline:
            self.drop(reset=self._breaking)
