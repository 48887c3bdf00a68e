"""The client's side of a plain endpoint's connection: a WebSocket, after its HTTP handshake.

Where this process is the client itself (`raw`), the server stands at the other end of it: then read "server" for
"client" and "application" for "target" here.
"""

from __future__ import annotations

import errno
import ssl
from typing import TYPE_CHECKING

from wstunnel import limits, sockets
from wstunnel.endpoints.plain_side import QUEUE_BYTES, Side
from wstunnel.errors import ProtocolError
from wstunnel.liveness import Liveness, Verdict
from wstunnel.pace import Pace
from wstunnel.reactor import READ, WRITE
from wstunnel.wire.masking import MaskKeys, apply_mask
from wstunnel.wire.plain import HEADER_BYTES, KEY_BYTES, PlainProtocol

if TYPE_CHECKING:
    from wstunnel.endpoints.plain import PlainConnection


class ClientSide(Side):
    """The WebSocket's end of a `PlainConnection`.

    Attributes:
        secure: it is TLS.
        sent, received: bytes of payload.
    """

    __slots__ = (
        "_asked", "_closing_at", "_heard", "_moved_at", "_pace", "_pending", "_progress_at", "_protocol", "_read_size",
        "_read_wants_write", "_seen", "_shut", "_write_wants_read", "liveness", "received", "secure", "sent",
    )  # fmt: skip

    def __init__(self, connection: PlainConnection, *, text: bool, keys: MaskKeys | None, now: float) -> None:
        super().__init__(connection)
        self.secure = False
        self.sent = 0
        self.received = 0
        self.liveness = Liveness(now, limits.PING_AFTER_SECONDS if keys is None else limits.CLIENT_PING_AFTER_SECONDS)
        self._protocol = PlainProtocol(text=text, keys=keys)
        self._pending: memoryview | None = None  # bytes of frames that were begun
        self._pace = Pace()
        self._read_size = limits.READ_FIRST_BYTES
        self._read_wants_write = False
        self._write_wants_read = False
        self._asked = False  # a ping is queued that the kernel has not taken
        self._progress_at = now
        self._heard = True  # the client is listened to: it has neither said goodbye nor broken the rules
        self._shut = False  # our end was said (FIN)
        self._closing_at: float | None = None
        self._seen: tuple[int | None, int] = (None, 0)  # what `_moves` saw last
        self._moved_at = now  # when that was new

    def waiting(self) -> int:
        """Bytes that the client has yet to take."""
        return 0 if self._pending is None else len(self._pending)

    def ready(self) -> bool:
        """Whether it takes more data."""
        return self.sock is not None and self._pending is None and not self._protocol.closing

    def refresh(self, *, may_read: bool) -> None:
        """Ask the reactor for what is wanted; after the closing handshake began everything is read, to the end."""
        if self.sock is None:
            return
        mask = READ if may_read or self._write_wants_read or not self._heard else 0
        if (self._pending is not None and not self._write_wants_read) or self._read_wants_write:
            mask |= WRITE
        self.reactor.want(self, mask)

    # --- in -----------------------------------------------------------------------------------------------------------

    def read(self) -> None:
        size = self._read()
        if size and self.sock is not None:
            self.liveness.received(self.reactor.now)
            before = self.reactor.spent()
            self.process(self.reactor.scratch[:size])
            self._adjust(self.reactor.spent() - before)
        if self._write_wants_read:
            self.flush()

    def _read(self) -> int:
        sock = self.sock
        if sock is None:
            return 0
        self._read_wants_write = False
        scratch = self.reactor.scratch
        # Without room each connection takes a little, to see whether the target does: all together that is not much.
        most = self._read_size if self.connection.principal.budget.room() else limits.READ_FLOOR_BYTES
        try:
            size = sock.recv_into(scratch, min(most, len(scratch)))
        except ssl.SSLWantWriteError:
            self._read_wants_write = True
            return 0
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError):
            return 0
        except OSError as error:
            self._broke(error)
            return 0
        if not size:
            self._ended()
        elif self.secure and sock.pending():  # type: ignore[attr-defined]  # an SSLSocket's
            self.reactor.again(self)  # no selector sees what OpenSSL holds
        return size

    def _adjust(self, took: float) -> None:
        """Read less at once where many tiny frames take long, more where few large ones do not: a turn is short."""
        if took > limits.TURN_SECONDS:
            self._read_size = max(self._read_size // 4, limits.READ_FLOOR_BYTES)
        elif took < limits.TURN_SECONDS / 4 and self._read_size < QUEUE_BYTES:
            self._read_size *= 2

    def _ended(self) -> None:
        """TCP's end, or TLS's."""
        said_nothing = self._heard
        self.drop()
        if said_nothing:
            self.connection.client_left("connection closed without a close frame")

    def process(self, data: bytes | memoryview) -> None:
        """Decode, and hand on what is for the target."""
        if not self._heard:
            return
        protocol = self._protocol
        pieces = []
        try:
            for payload in protocol.receive(data):
                pieces.append(payload)  # noqa: PERF402  # what came before an error counts
        except ProtocolError as error:
            self._deliver(pieces)
            self._heard = False
            self.connection.client_failed(str(error))
            self.close(error.code, str(error))
            return
        self._deliver(pieces)
        if protocol.close_code is not None:
            self._heard = False
            self._begin_linger()
            self.connection.client_closed(protocol.close_code, protocol.close_reason, midway=protocol.midway)
        self.flush()

    def _deliver(self, pieces: list[bytes | memoryview]) -> None:
        if pieces:
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            self.received += len(data)
            self.connection.target.deliver(data)

    # --- out ----------------------------------------------------------------------------------------------------------

    def read_size(self) -> int:
        """How much to read from the target for the next frame: one that was begun holds up all that is urgent."""
        return min(self._pace.frame, QUEUE_BYTES)

    def send(self, size: int) -> None:
        """Send `size` bytes that stand in the reactor's scratch buffer behind HEADER_BYTES of room. Only if `ready`."""
        self.sent += size
        header = self._protocol.header(size)
        start = HEADER_BYTES - len(header)
        scratch = self.reactor.scratch
        scratch[start:HEADER_BYTES] = header
        if self._protocol.masks:
            payload = scratch[HEADER_BYTES : HEADER_BYTES + size]
            payload[:] = apply_mask(payload, header[-KEY_BYTES:])
        self._put(scratch[start : HEADER_BYTES + size])
        if self._pending is None:
            self._pace.took(size)
            self.flush()
        else:
            self._pace.full(self.reactor.now)

    def write(self) -> None:
        if self._read_wants_write:
            self.read()
        self.flush()
        if self._pending is None:
            self._pace.idle()

    def flush(self) -> None:
        """Write what waits, then the control frames, as far as the connection takes it."""
        if self.sock is None:
            return
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._put(pending)
        while self._pending is None and (frames := self._protocol.control()):
            self._put(memoryview(frames))
        if self._pending is not None or self.sock is None:
            return
        if self._asked:
            self._asked = False
            self.liveness.pinged(self.reactor.now)
        if self._protocol.closing:
            self._finish_close()

    def _put(self, data: memoryview) -> None:
        """Write; what the connection does not take is kept."""
        sock = self.sock
        assert sock is not None
        self._write_wants_read = False
        total = len(data)
        try:
            while len(data):
                data = data[sock.send(data) :]
                if not self.secure:
                    break
        except ssl.SSLWantReadError:
            self._write_wants_read = True  # goes on behind the next read: to wait for room, which there is, would spin
        except (BlockingIOError, InterruptedError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            self._broke(error)
            return
        now = self.reactor.now
        if len(data) < total:
            self._progress_at = now
            self._pace.drained(total - len(data), now)
        if len(data):
            # A copy unless it is one: the scratch buffer is everybody's. OpenSSL wants the same bytes again.
            self._pending = data if isinstance(data.obj, bytes) else memoryview(bytes(data))

    # --- ends ---------------------------------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake, or go on with one that has begun."""
        if self.sock is None:
            return
        self._protocol.close(code, reason)
        self._begin_linger()
        self.flush()

    def _begin_linger(self) -> None:
        if self._closing_at is None:
            self._closing_at = self.reactor.now + limits.LINGER_SECONDS
            self._moves(self.reactor.now)  # the first look: what moves from now on is seen by the next

    def _finish_close(self) -> None:
        """Our Close frame is out. RFC 6455 §7.1.1: the server ends TCP first, once both frames went.

        What still comes is read to its end: closing with input unread would be a reset, which destroys what was sent.
        """
        if self._shut or self._heard or self.sock is None:
            return
        self._shut = True
        try:
            if sockets.end_writing(self.sock):
                self.secure = False
        except OSError as error:
            self._broke(error)

    def drop(self) -> None:
        """Close the socket now."""
        if self.sock is not None:
            self.reactor.drop(self)
        self._pending = None

    def _broke(self, error: OSError) -> None:
        heard = self._heard
        self.drop()
        if heard:
            self.connection.client_left(f"connection failed: {error.strerror or error}")

    def hung_up(self) -> None:
        self._broke(OSError(errno.ECONNRESET, "connection reset"))

    def sweep(self, now: float, late: float) -> None:
        """The closing handshake, a client that takes nothing, and one that says nothing."""
        if self.sock is None:
            return
        if self._closing_at is not None:
            if now >= self._closing_at and not (self.connection.patient and self._moves(now)):
                self._ended()
        elif self._pending is not None and now - self._progress_at > limits.STALLED_SECONDS:
            self.connection.client_left(f"the {self.connection.far} took nothing for {now - self._progress_at:.0f} s")
        else:
            self._look(now, late)

    def _moves(self, now: float) -> bool:
        """Whether anything came for the target, or went to the client, since the last look; or is yet to go.

        To close now could destroy what the client has yet to take: its next byte would draw a reset. A slow one takes
        it in steps that are seconds apart, since TCP tells of room only when there is much of it.
        """
        unsent = sockets.unsent(self.sock) if self.sock is not None else None
        seen = (unsent, self.received if self.connection.target.sock is not None else 0)
        if seen != self._seen:
            self._seen, self._moved_at = seen, now
            return True
        waits = bool(unsent) or self._pending is not None
        return waits and now - max(self._moved_at, self._progress_at) <= limits.STALLED_SECONDS

    def _look(self, now: float, late: float) -> None:
        if not self.mask & READ:
            # The target holds the client up, so its pong could not be read. It is asked all the same: proxies count.
            if now >= self.liveness.due(0.0):
                self.liveness.received(now)
                self._ask()
            return
        if now < self.liveness.due(0.0):
            return
        self.read()  # what came in time counts, though nobody had the time to read it
        if self.sock is None or self._closing_at is not None:
            return
        verdict = self.liveness.check(now, 0.0, sockets.unsent(self.sock), late)
        if verdict is Verdict.DEAD:
            self.connection.client_left(f"the {self.connection.far} answers no ping")
        elif verdict is not Verdict.FINE:
            self._ask()

    def _ask(self) -> None:
        self._asked = True
        self._protocol.ping()
        self.flush()
