"""One WebSocket on the reactor: frames in, frames out. Never waits; the reader never waits for a local socket."""

from __future__ import annotations

import errno
import math
import socket
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from wstunnel import limits, logs, sockets
from wstunnel.errors import LocalError, ProtocolError
from wstunnel.liveness import STALL_SECONDS, Liveness, Verdict
from wstunnel.pace import FLOOR_BYTES, Pace
from wstunnel.reactor import READ, WRITE, Handler, Reactor
from wstunnel.wire.datagrams import DatagramState
from wstunnel.wire.messages import Ack, AnyMessage, Eof, Gone, Message, Opened, Ping, Pong, Reset, Resume, Resumed
from wstunnel.wire.protocol import Buffer, LinkProtocol, PeerClosed, StreamState
from wstunnel.wire.states import Exchange

if TYPE_CHECKING:
    from wstunnel.flow import Flow
    from wstunnel.stream import Stream

FLUSH_BYTES = 1024 * 1024
"""Most that one event writes: a peer that reads as fast as we write must not keep the reactor to itself."""
NOTSENT_LOWAT = 512 * 1024
"""Unsent bytes that the kernel takes on a link, so that control messages do not queue behind megabytes. One frame: with
less the kernel takes large ones in parts, and the rest is copied."""
DATAGRAMS_LOWAT = limits.DATAGRAM_QUEUE_BYTES
"""The same while the link carries datagrams: what the kernel holds back cannot be dropped any more, only come late. At
2 Mbit/s with twice as much to send they were 2.4 s late with the other, and are 0.6 s with this."""
SHORT_BYTES = FLOOR_BYTES + 8
"""A read of no more may be one data frame of at most FLOOR_BYTES: most are, on an interactive stream."""
RECORD_BYTES = 16 * limits.KIB
"""RFC 8446 §5.1: most plaintext in a TLS record."""
UNGREETED_SECONDS = 1.0
"""When to look again at a link that fell silent before the greeting: it cannot be asked, the sweep ends it."""


_log = logs.logger("link")
# Module names: before Python 3.12 looking into an enumeration costs as much as a call.
_IDLE, _RESETTING, _RESUMING = Exchange.IDLE, Exchange.RESETTING, Exchange.RESUMING


class LinkOwner(Protocol):
    """Who a link belongs to: before `hello` the server's greeter, then a session."""

    def message(self, link: Link, message: AnyMessage) -> None:
        """A message that is not about the stream on the link: hello, welcome, open, resume, detached, drain, bye."""

    def idle(self, link: Link) -> None:
        """The exchange ended: the link may carry another stream."""

    def lost(self, link: Link, reason: str) -> None:
        """The connection is gone, its stream was told. Called once."""

    def stalled(self, link: Link) -> None:
        """Data was sent and nothing comes back: the link may be dead, which its `ping` will tell in some seconds."""


class Link(Handler):
    """One WebSocket connection after its HTTP handshake.

    Args:
        protocol: its state, sans I/O.
        owner: see `LinkOwner`.
        peer: the other end's address, for logs.
        now: monotonic seconds.

    Attributes:
        stream: what it carries, a stream or a datagram flow; stays until a reset of it was answered.
        round_trip: the smallest measured, in seconds; 0 until then.
        idle_since: when it last became idle.
        close_code: of the peer's close frame; None until it came.
        last_id: id of the last stream that ended on it (its tombstone goes at the next open).
    """

    __slots__ = (
        "_alarm_at", "_asked_at", "_close_reason", "_closing_at", "_liveness", "_pending", "_ping_at",
        "_ping_number", "_ping_pulled", "_ping_queued", "_progress_at", "_read_size", "_read_wants_write",
        "_shut", "_tls", "_write_pace", "_write_wants_read", "close_code", "created", "idle_since", "last_id",
        "last_received", "owner", "peer", "protocol", "round_trip", "stream",
    )  # fmt: skip

    def __init__(self, protocol: LinkProtocol, owner: LinkOwner, *, peer: str, now: float) -> None:
        super().__init__()
        self.protocol = protocol
        self.owner = owner
        self.peer = peer
        self.stream: Stream | Flow | None = None
        self.round_trip = 0.0
        self.created = self.last_received = self.idle_since = now
        self.last_id: str | None = None
        self._tls = False
        self._pending: memoryview | None = None
        self._read_wants_write = False
        self._write_wants_read = False
        self.close_code: int | None = None
        self._close_reason = ""
        self._read_size = limits.READ_FIRST_BYTES
        self._progress_at = now
        client = protocol.side == "client"
        self._liveness = Liveness(now, limits.CLIENT_PING_AFTER_SECONDS if client else limits.PING_AFTER_SECONDS)
        self._write_pace = Pace()
        self._alarm_at = math.inf
        self._ping_queued = False
        self._ping_pulled = False
        self._ping_at: float | None = None
        self._ping_number = 0
        self._closing_at: float | None = None
        self._asked_at: float | None = None
        self._shut = False

    def start(self, reactor: Reactor, sock: socket.socket, leftover: bytes = b"") -> None:
        """Take over the connection; `leftover` are bytes that were read behind the HTTP head."""
        self._tls = isinstance(sock, ssl.SSLSocket)
        sockets.limit_unsent(sock, DATAGRAMS_LOWAT if self._carries_datagrams() else NOTSENT_LOWAT)
        sockets.give_up_after(sock, limits.STALLED_SECONDS)
        try:
            reactor.adopt(self, sock)
        except LocalError as error:
            sock.close()
            self._detach(str(error))
            self.owner.lost(self, str(error))
            return
        self._arm()
        try:
            if leftover and self.sock is not None:
                self._process(memoryview(leftover))
            else:
                self.flush()
        except Exception as error:
            self.fail(error)

    # --- in -----------------------------------------------------------------------------------------------------------

    def on_readable(self) -> None:
        size = self._read_tls() if self._tls else self._read_plain()
        if size and self.sock is not None:
            self.last_received = now = self.reactor.now
            self._liveness.received(now)
            if self._pending is not None:
                self._await_answer()  # a full connection has data under way, though nothing more fits in
            if size < limits.READ_FLOOR_BYTES:
                self._process(self.reactor.scratch[:size])
            else:
                before = self.reactor.spent()
                self._process(self.reactor.scratch[:size])
                self._pace(self.reactor.spent() - before)
        if self._write_wants_read:
            self.flush()  # whatever was read, be it only TLS's own

    def _pace(self, took: float) -> None:
        """Read less at once where many tiny frames take long, more where few large ones do not: a turn is short."""
        if took > limits.TURN_SECONDS:
            self._read_size = max(self._read_size // 4, limits.READ_FLOOR_BYTES)
        elif took < limits.TURN_SECONDS / 4 and self._read_size < limits.SCRATCH_BYTES:
            self._read_size *= 2

    def _read_plain(self) -> int:
        assert self.sock is not None
        scratch = self.reactor.scratch
        try:
            size = self.sock.recv_into(scratch, min(self._read_size, len(scratch)))
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._broke(error)
            return 0
        if not size:
            self._ended()
        return size

    def _read_tls(self) -> int:
        """Read records until OpenSSL has no more: it holds decrypted bytes that no selector sees.

        What is still encrypted is the kernel's: OpenSSL, which does not read ahead unless told to, takes a record only
        when it is asked for its bytes.
        """
        assert self.sock is not None
        scratch = self.reactor.scratch
        filled = 0
        room = min(self._read_size, len(scratch))
        self._read_wants_write = False
        try:
            while filled < room:
                size = self.sock.recv_into(scratch[filled:room] if filled else scratch, room - filled)
                if not size:
                    break
                filled += size
                if size < RECORD_BYTES and not self.sock.pending():  # type: ignore[attr-defined]  # an SSLSocket's
                    # Not bulk, and nothing is left inside OpenSSL. To ask for more would mostly be answered by an
                    # exception, which costs as much as the rest of a small message.
                    return filled
            # Full: there may be more inside OpenSSL. At the end of the stream: the next read tells it again.
            self.reactor.again(self)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            self._read_wants_write = True
            self._want()
        except OSError as error:
            if not filled:
                self._broke(error)
                return 0
            self.reactor.again(self)  # the error comes again once what was read is handled
        else:
            if not filled:
                self._ended()
        return filled

    def _ended(self) -> None:
        if self.close_code is not None:
            self.lose(f"closed by the peer: {self.close_code} {self._close_reason}".rstrip())
        elif self.protocol.close_sent:
            self.lose("closed")
        else:
            self.lose("connection closed without a close frame")

    def _process(self, data: memoryview) -> None:
        if self._shut or self._closing_at is not None:
            # After a protocol error the decoder is out of step; after our close frame only the peer's matters.
            self._await_close(data)
            return
        protocol = self.protocol
        try:
            if len(data) <= SHORT_BYTES and self._process_short(data):
                return
            for event in protocol.receive(data):
                if isinstance(event, memoryview | bytes):
                    self.stream.deliver(event)  # type: ignore[union-attr]  # data comes only while a stream is attached
                else:
                    self._event(event)
                if self.sock is None:
                    return
        except ProtocolError as error:
            self.close(error.code, str(error))
            return
        self.flush()

    def _process_short(self, data: memoryview) -> bool:
        """The short way for what most reads are. False: nothing was done.

        Raises:
            ProtocolError: the peer broke a rule.
        """
        protocol = self.protocol
        payload = protocol.receive_data(data)
        if payload is not None:
            # Nothing else has changed that anybody waits for.
            if not self.stream.deliver(payload) or protocol.ack_due():  # type: ignore[union-attr]  # it has data
                self.flush()
            return True
        message = protocol.receive_ping(data)
        if message is None:
            return False
        if type(message) is Ping:
            self.flush()
        else:
            self._answered(message.number)
        return True

    def _await_close(self, data: memoryview) -> None:
        if self._shut:
            return
        try:
            for event in self.protocol.receive(data):
                if isinstance(event, PeerClosed):
                    self.flush()
        except ProtocolError:
            self._shut = True

    def _event(self, event: AnyMessage | PeerClosed) -> None:
        stream = self.stream
        if isinstance(event, Ack):
            assert stream is not None
            if self.protocol.state is Exchange.IDLE:
                self._free()
            else:
                stream.acked()  # type: ignore[union-attr]  # in an exchange of a flow EXPECTED lets none of these through
        elif isinstance(event, Opened):
            assert stream is not None
            stream.opened(event.address)
        elif isinstance(event, Eof):
            assert stream is not None
            stream.ended()  # type: ignore[union-attr]
        elif isinstance(event, Reset):
            if stream is not None:
                stream.was_reset(event.code, event.message)
            self._free()
        elif isinstance(event, Resumed):
            assert stream is not None
            self._asked_at = None
            stream.resumed(event.opened)  # type: ignore[union-attr]
            if self.protocol.state is Exchange.IDLE:
                self._free()
        elif isinstance(event, Gone) and stream is not None:
            self._release()
            stream.gone(event.outcome, event.code, event.message)  # type: ignore[union-attr]
            self.owner.idle(self)
        elif isinstance(event, Pong):
            self._answered(event.number)
        elif isinstance(event, PeerClosed):
            self.close_code, self._close_reason = event.code, event.reason
            self._closing_at = self.reactor.now + limits.LINGER_SECONDS
            self._detach(f"link closed by the peer: {event.code} {event.reason}".rstrip())
        elif not isinstance(event, Ping):
            self.owner.message(self, event)

    def _answered(self, number: int) -> None:
        """`pong` came."""
        if self._ping_at is not None and number == self._ping_number:
            self.measure(self._ping_at)
            self._ping_at = None

    def measure(self, since: float) -> None:
        """Something sent at `since` (monotonic seconds) was answered now: a round trip."""
        took = max(self.reactor.now - since, 1e-6)
        self.round_trip = min(self.round_trip, took) if self.round_trip else took

    # --- out ----------------------------------------------------------------------------------------------------------

    def on_writable(self) -> None:
        if self._read_wants_write:
            self.on_readable()
        if self.sock is not None:
            self.flush()

    @property
    def blocked(self) -> bool:
        """The connection takes no more: bytes of a frame that was begun wait for it."""
        return self._pending is not None

    def carry(self, data: memoryview) -> bool:
        """Send a few bytes that the stream has just read, the short way. False: nothing was done, see `flush`.

        Args:
            data: at most FLOOR_BYTES, and not all that the stream has room for.
        """
        if self._pending is not None:
            return False
        frame = self.protocol.carry(data)
        if frame is None:
            return False
        assert self.sock is not None
        try:
            sent = self.sock.send(frame)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            sent = 0
        except OSError as error:
            self._broke(error)
            return True
        if sent != len(frame):
            self._took_part(memoryview(frame), sent)
            self.flush()
            return True
        if self._liveness.unanswered is None:
            self._await_answer()
        self.protocol.expecting = False
        return True

    def flush(self) -> None:
        """Write what there is to write, as far as the connection takes it now."""
        if self.sock is None:
            return
        budget = FLUSH_BYTES
        more = False
        protocol = self.protocol
        while self._pending is None or self._write_pending():
            if budget <= 0:
                more = True
                break
            self._ping_pulled |= self._ping_queued
            self._ping_queued = False
            buffers = protocol.pull(self._write_pace.frame, self.reactor.now, self.round_trip)
            if not buffers:
                break
            budget -= self._write(buffers)
            if self.sock is None:
                return
            if protocol.drained and self._pending is None:
                break
        if self.sock is None:
            return
        stream = self.stream
        if stream is not None:
            state = protocol.state
            if state is _IDLE:
                self._free()
            else:
                if (state is _RESETTING or state is _RESUMING) and self._asked_at is None:
                    self._asked_at = self.reactor.now
                stream.refresh()
        if self._pending is None and not more:
            self._write_pace.idle()
        self._want(more)
        if self._closing_at is not None and self._pending is None:
            self._finish_close()

    def _want(self, more: bool = False) -> None:
        waiting = self._pending is not None and not self._write_wants_read
        mask = READ | WRITE if waiting or more or self._read_wants_write else READ
        if mask != self.mask:
            self.reactor.want(self, mask)

    def _write(self, buffers: Sequence[Buffer]) -> int:
        """Send buffers whole; what the connection does not take waits in `_pending`, contiguous. Returns their size."""
        sock = self.sock
        assert sock is not None
        if self._tls:
            return self._write_tls(b"".join(buffers))
        try:
            if len(buffers) == 1:
                size = len(buffers[0])
                sent = sock.send(buffers[0])
            else:
                size = sum(map(len, buffers))
                sent = sock.sendmsg(buffers)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._broke(error)
            return size
        if sent == size:
            self._write_pace.took(size)
            self._taken()
        else:
            # A copy: the views belong to a replay buffer that goes on growing.
            self._took_part(memoryview(b"".join(buffers)), sent)
        return size

    def _took_part(self, data: memoryview, sent: int) -> None:
        """Of `data` the connection took the first `sent` bytes, perhaps none, and takes no more now."""
        self._pending = data[sent:]
        self._progress_at = self.reactor.now
        if sent:
            self._await_answer()
        self._write_pace.full(self.reactor.now)

    def _write_tls(self, data: bytes) -> int:
        self._pending = memoryview(data)
        self._progress_at = self.reactor.now
        if self._write_pending():
            self._write_pace.took(len(data))
        else:
            self._write_pace.full(self.reactor.now)
        return len(data)

    def _taken(self) -> None:
        """All that was pulled is with the kernel now: the clocks that wait for answers run from here."""
        if self._ping_pulled:
            self._ping_pulled = False
            self._liveness.pinged(self.reactor.now)
            self._arm()
        if self.protocol.expecting:
            self._await_answer()
            self.protocol.expecting = False

    def _await_answer(self) -> None:
        """The kernel has something that the peer must react to, or a part of it."""
        if self.protocol.expecting:
            now = self.reactor.now
            self._liveness.sent(now)
            if self._alarm_at > now + STALL_SECONDS:
                self._arm()

    def _write_pending(self) -> bool:
        """Go on with the frame that was begun; True once it is out.

        After SSLWantWriteError the next write must begin with the same bytes.
        """
        assert self.sock is not None
        pending = self._pending
        assert pending is not None
        self._write_wants_read = False
        try:
            while True:
                sent = self.sock.send(pending)
                self._write_pace.drained(sent, self.reactor.now)
                if sent == len(pending):
                    self._pending = None
                    self._taken()
                    return True
                pending = pending[sent:]
                self._progress_at = self.reactor.now
                self._await_answer()
                if not self._tls:
                    break
        except ssl.SSLWantReadError:
            # It goes on with the flush that follows every read. To wait for room, which there is, would spin.
            self._write_wants_read = True
        except (BlockingIOError, InterruptedError, ssl.SSLWantWriteError):
            pass
        except OSError as error:
            self._broke(error)
            return False
        self._pending = pending
        return False

    # --- life ---------------------------------------------------------------------------------------------------------

    def attach(self, stream: Stream | Flow) -> None:
        """The link carries `stream` now; the protocol's exchange has begun or begins next."""
        self.stream = stream
        stream.link = self
        self._asked_at = None
        if self.sock is not None and self._carries_datagrams():
            sockets.limit_unsent(self.sock, DATAGRAMS_LOWAT)

    def _carries_datagrams(self) -> bool:
        return self.stream is not None and isinstance(self.stream.state, DatagramState)

    def _free(self) -> None:
        """The exchange is over on both sides."""
        stream = self._release()
        if stream is not None:
            self.last_id = stream.state.id
            stream.finished()
        self.owner.idle(self)

    def _release(self) -> Stream | Flow | None:
        """The link carries nothing any more. Returns what it carried."""
        if self.sock is not None and self._carries_datagrams():
            sockets.limit_unsent(self.sock, NOTSENT_LOWAT)
        stream, self.stream = self.stream, None
        self._asked_at = None
        self.idle_since = self.reactor.now
        if stream is not None:
            stream.link = None
        return stream

    def _detach(self, reason: str) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.link = None
            stream.link_lost(reason)

    def send(self, message: Message) -> None:
        """Send a control message. A peer that does not read has the link closed."""
        try:
            self.protocol.send(message)
        except ProtocolError as error:
            self.close(error.code, str(error))
        else:
            self.flush()

    def open(self, state: StreamState | DatagramState, *, target: str, peer: str, forward: str = "") -> None:
        """Begin an exchange on this idle link; goes out with the next flush."""
        try:
            self.protocol.open(state, target=target, peer=peer, forward=forward)
        except ProtocolError as error:
            self.close(error.code, str(error))

    def resume(self, stream: Stream) -> None:
        """Client: go on with a stream on this idle link. Its epoch was raised."""
        self.attach(stream)
        try:
            self.protocol.resume(stream.state, opened=stream.dialled())
        except ProtocolError as error:
            self.close(error.code, str(error))
        else:
            self.flush()

    def resumed(self, stream: Stream, message: Resume) -> None:
        """Server: the stream goes on here, as `message` asks; goes out with the next flush.

        Raises:
            StreamError: it cannot; nothing has changed.
            ProtocolError: the peer does not read.
        """
        self.protocol.resumed(stream.state, message, opened=stream.dialled())
        self.attach(stream)
        stream.resumed(message.opened)

    def give_up_stream(self, reason: str) -> None:
        """The stream goes on elsewhere. It is detached before anything else, then the link is closed."""
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.link = None
            stream.state.link_lost()  # type: ignore[union-attr]  # a flow goes on nowhere
        self.close(1000, reason)

    def opened(self, address: str) -> None:
        """Tell the peer that the target was reached; goes out with the next flush."""
        try:
            self.protocol.opened(address)
        except ProtocolError as error:
            self.close(error.code, str(error))

    def ping(self) -> None:
        """Send a `ping` message, and a ping frame for proxies that count only those."""
        self._ping_number += 1
        self._ping_at = self.reactor.now
        self._ping_queued = True
        try:
            self.protocol.ping(self._ping_number)
        except ProtocolError as error:
            self.close(error.code, str(error))
        else:
            self.flush()

    def sweep(self, now: float) -> None:
        """Once a second: deadlines that need not be exact."""
        if self._closing_at is not None:
            if now >= self._closing_at:
                self.lose("closed")
        elif self._pending is not None and now - self._progress_at > limits.STALLED_SECONDS:
            self.lose(f"the peer took nothing for {now - self._progress_at:.0f} s", silent=True)
        elif not self.protocol.greeted:
            if now - self.created > limits.HANDSHAKE_SECONDS:
                self.close(1002, "no hello in time" if self.protocol.side == "server" else "no welcome in time")
        elif self._asked_at is not None and now - self._asked_at > limits.PONG_WITHIN_SECONDS:
            self.close(1002, f"{self.protocol.state.value} was not answered")

    def _arm(self) -> None:
        """See to it that `_look` is called in time. An alarm that was set for later stays, and does nothing."""
        due = self._liveness.due(self.round_trip)
        if due < self._alarm_at:
            self._alarm_at = due
            self.reactor.at(due, self._look)

    def _look(self) -> None:
        """Is the link alive? Exact to the deadlines of `liveness`, unlike the sweep."""
        now = self.reactor.now
        if now < self._alarm_at or self.sock is None or self._closing_at is not None:
            return
        late, self._alarm_at = now - self._alarm_at, math.inf
        due = self._liveness.due(self.round_trip)
        if due > now:  # something came meanwhile
            self._alarm_at = due
            self.reactor.at(due, self._look)
            return
        try:
            if self._ping_at is not None:
                self.on_readable()  # what came in time counts, though nobody had the time to read it
            if self.sock is not None and self._closing_at is None:
                self._judge(now, late)
        except Exception as error:
            self.fail(error)

    def _judge(self, now: float, late: float) -> None:
        if not self.protocol.greeted:
            self._alarm_at = now + UNGREETED_SECONDS
            self.reactor.at(self._alarm_at, self._look)
            return
        assert self.sock is not None
        unsent = 0 if self._liveness.quiet and self._pending is None else sockets.unsent(self.sock)
        verdict = self._liveness.check(now, self.round_trip, unsent, late)
        if verdict is Verdict.DEAD:
            self.lose(f"no answer for {now - self.last_received:.0f} s", silent=True)
            return
        if verdict is not Verdict.FINE:
            self.ping()
        if verdict is Verdict.STALLED:
            self.owner.stalled(self)
        self._arm()

    def leave_alone(self, seconds: float) -> None:
        """Ask the peer only after so long a silence: it measures the path, see `Hello`."""
        self._liveness.leave_alone(seconds)  # an alarm that comes too early does nothing

    @property
    def stalled(self) -> bool:
        """Whether it has just been asked why data is not answered."""
        return self._liveness.stalled

    def woke(self, now: float) -> None:
        """The machine or the process slept: ask anew whether the other end is there."""
        self._liveness.woke(now)
        self._arm()

    def close(self, code: int, reason: str = "") -> None:
        """Start the closing handshake (RFC 6455 §7.1.2); its stream is told that the link is gone."""
        if self.sock is None or self._closing_at is not None:
            return
        self.protocol.close(code, reason)
        self._closing_at = self.reactor.now + limits.LINGER_SECONDS
        self._detach(reason or "link closed")
        self.flush()

    def _finish_close(self) -> None:
        """Our close frame is out. The server ends TCP first (§7.1.1), then reads to EOF.

        Closing with unread input would send a TCP reset that destroys what was sent.
        """
        protocol = self.protocol
        if self.sock is None or self._shut or not protocol.close_sent:
            return
        if protocol.side == "server" and protocol.close_received:
            self._shut = True
            try:
                if sockets.end_writing(self.sock):
                    self._tls = False
            except OSError as error:
                self._broke(error)

    def lose(self, reason: str, *, silent: bool = False) -> None:
        """The connection is gone: close the socket, tell the stream, then the owner. Idempotent.

        `silent`: nobody said so, it only fell silent, and so may have others that nobody has looked at since.
        """
        if self.sock is None:
            return
        self.reactor.drop(self)
        self.protocol.close_sent = True
        self._pending = None
        if self.stream is not None:
            self.stream.proof_after = self.last_received if silent else -math.inf
        self._detach(reason)
        self.owner.lost(self, reason)

    def _broke(self, error: OSError) -> None:
        if self.close_code is not None or self.protocol.close_sent:
            self._ended()  # both have said goodbye, or we have: how TCP and TLS end then does not matter
            return
        self.lose(f"connection failed: {error.strerror or error}", silent=error.errno == errno.ETIMEDOUT)

    def on_hangup(self) -> None:
        self.lose("connection failed")  # pragma: no cover  # a link always wants to read

    def fail(self, error: Exception) -> None:
        """An exception in our own code: this link only."""
        _log.exception("fault in our own code", peer=self.peer)
        self.lose(f"internal error: {error!r}")
