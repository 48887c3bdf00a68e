"""One tunnelled stream at one end: its local socket on the reactor, joined to the link that carries it."""

from __future__ import annotations

import errno
import math
import os
import socket
from typing import TYPE_CHECKING, Protocol

from wstunnel import limits, logs, sockets
from wstunnel.errors import LocalError
from wstunnel.pace import FLOOR_BYTES
from wstunnel.reactor import READ, WRITE, Handler, Reactor
from wstunnel.wire.buffer import SPARE_FROM_BYTES
from wstunnel.wire.protocol import StreamState
from wstunnel.wire.states import Exchange

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio

    from wstunnel.link import Link

WRITE_TURNS = 4
"""Writes of one inbox per event: a fast reader must not keep the reactor to itself."""


_log = logs.logger("stream")


class StreamOwner(Protocol):
    """The session.

    `resumes`: this end resumes streams. So a reset of a stream without a link waits for one, to be told; the other end
    ends the stream, and tells whoever asks for it.
    """

    reactor: Reactor
    resumes: bool

    def stream_opened(self, stream: Stream) -> None:
        """The target was reached."""

    def stream_ended(self, stream: Stream) -> None:
        """The stream is over; `stream.outcome` says how. Called once."""

    def stream_moved(self, stream: Stream) -> None:
        """Bytes arrived or were taken: the next sweep acks them if nothing else does."""

    def stream_starved(self, stream: Stream) -> None:
        """The budgets leave no room to read from the application: the next sweep tries again."""

    def stream_held(self) -> None:
        """Bytes were stored: the budgets may be exhausted."""

    def stream_detached(self, stream: Stream) -> bool:
        """The stream's link is gone. True: it is kept, and goes on on another link; False: it ends here."""

    def stream_resumed(self, stream: Stream) -> None:
        """It goes on on a new link."""

    def stream_unknown(self, stream: Stream) -> bool:
        """The peer knows nothing of the stream. True: it will be opened afresh; False: it ends here."""


class Stream(Handler):
    """A stream: `state` holds its offsets, `sock` its local socket (None while dialling, and once closed).

    Args:
        state: sans I/O.
        owner: the session.
        target: what the egress dials, canonical text.
        peer: who it came from: the application at the ingress, the link's other end at the egress.
        now: monotonic seconds.
        forward: on `reverse` links, the id of the forward that it belongs to; else empty.

    Attributes:
        decided: at the ingress: called once, when the target was reached or else when the stream is over.
        when_over: called when the stream is over.
        outcome: None while it lives, then (code, message); code `finished` for a clean end.
        bind: at the server, where the connection of a reverse forward was accepted; else empty.
        address: what the egress dialled.
        asked: at the client: boot id of the server that was last asked to resume it.
        boot: at the client: of the server that was asked to open it.
        proof_after: goes on only on a link that received something later than this: its last one fell silent then.
        application: at the egress, the application's address as the peer claims it.
        note: at the egress, why the policy forbade the target, for the log only.
        dialling: the cancel scope of the dial under way at the egress.
    """

    __slots__ = (
        "_announced", "_read_done", "_unsaid", "_write_failed", "address", "application", "asked", "bind", "boot",
        "created", "decided", "dialling", "forward", "inbound", "link", "note", "outbound", "outcome", "owner", "peer",
        "proof_after", "reason", "state", "target", "when_over",
    )  # fmt: skip

    def __init__(
        self, state: StreamState, owner: StreamOwner, *, target: str, peer: str, now: float, forward: str = ""
    ) -> None:
        super().__init__()
        self.state = state
        self.inbound = state.inbound
        self.outbound = state.outbound
        self.owner = owner
        self.target = target
        self.peer = peer
        self.forward = forward
        self.decided: Callable[[Stream], None] | None = None
        self.when_over: Callable[[Stream], None] | None = None
        self.bind = ""
        self.address = ""
        self.application = ""
        self.note = ""
        self.asked = ""
        self.boot = ""
        self.proof_after = -math.inf
        self.created = now
        self.link: Link | None = None
        self.outcome: tuple[str, str] | None = None
        self.reason: tuple[str, str] | None = None
        self.dialling: trio.CancelScope | None = None
        self._read_done = False
        self._write_failed = False
        self._announced = False
        self._unsaid = False

    # --- the local socket ---------------------------------------------------------------------------------------------

    def start(self, reactor: Reactor, sock: socket.socket) -> None:
        """Take over the connected, non-blocking socket. What came early from the peer is delivered."""
        if self.outcome is not None or self.reason is not None:
            sockets.reset(sock)
            return
        try:
            reactor.adopt(self, sock, look=False)
        except LocalError as error:
            sockets.reset(sock)
            self.reset("limit", str(error))
            return
        if len(self.inbound.inbox):
            self._drain()
        self._deliver_end()

    def begin(self, reactor: Reactor, sock: socket.socket, early: bytes = b"") -> None:
        """Ingress: take over the application's socket once the target was reached. `early` goes out before what it
        has to say."""
        if early and self.reason is None:
            self.outbound.append(early)
        self.start(reactor, sock)
        self.read_early()
        if self.link is not None:
            self.link.flush()

    def connected(self, reactor: Reactor, sock: socket.socket, address: str) -> None:
        """Egress: the dial succeeded."""
        self.dialling = None
        self.address = address
        if self.outcome is None and self.reason is None:
            self._announced = True
            if self.link is None:
                self.state.opened = True  # the peer learns of it when it resumes
            elif self.link.protocol.state is Exchange.RESUMING:
                # `resume` did not say so, and nothing may be sent for the stream before its answer.
                self.state.opened = self._unsaid = True
            else:
                self.link.opened(address)
            self.owner.stream_opened(self)
        self.start(reactor, sock)
        if self.link is not None:
            self.link.flush()

    def dialled(self) -> str | None:
        """At the egress, once the target was reached: its address."""
        return self.address if self.state.egress and self.state.opened else None

    def on_readable(self) -> None:
        outbound = self.outbound
        room = outbound.room()
        link = self.link
        if room <= 0 or self._read_done:
            self.refresh()
            return
        scratch = self.reactor.scratch
        assert self.sock is not None
        try:
            size = self.sock.recv_into(scratch, room if room < len(scratch) else 0)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._local_failed(error)
            return
        if size >= SPARE_FROM_BYTES:
            # What was read stays where it is, to be sent again if need be; the next one reads into another buffer.
            self.reactor.scratch = outbound.adopt(scratch[:size])
        elif size:
            if size <= FLOOR_BYTES and size < room and link is not None and link.carry(scratch[:size]):
                return  # and may go on reading: there is room left
            outbound.append(scratch[:size])
        else:
            outbound.end()
            self._read_done = True
        if link is None or link.blocked:
            self.refresh()
        else:
            link.flush()
        if self._write_failed:
            self._reset_when_delivered()

    def read_early(self) -> None:
        """Read what the application has sent by now; to be called once, after `start`."""
        if self.sock is not None:
            try:
                self.on_readable()
            except Exception as error:
                self.fail(error)

    def on_writable(self) -> None:
        self._drain()
        self._deliver_end()
        self.refresh()
        if self.link is not None:
            self.link.flush()

    def on_hangup(self) -> None:
        """ERR or HUP while neither direction is wanted: a reset while there is no credit, or the normal end of both."""
        if self.sock is None:
            return
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code and not self._write_failed:  # after a failed write it is known, and what was sent before is read first
            self._local_failed(OSError(code, os.strerror(code)))

    def fail(self, error: Exception) -> None:
        """An exception in our own code: this stream only."""
        _log.exception("fault in our own code", target=self.target)
        self.reset("internal", f"internal error: {type(error).__name__}")

    def refresh(self) -> None:
        """Ask the reactor for what the offsets allow now."""
        if self.sock is None:
            return
        mask = 0
        outbound = self.outbound
        # Without a link reading goes on up to the peer's limit.
        if not self._read_done and (self.link is None or outbound.queued() < limits.LINK_QUEUE_BYTES):
            if outbound.room() > 0:
                mask = READ
            elif outbound.limit > outbound.replay.end:
                self.owner.stream_starved(self)
        if self.inbound.inbox.end > self.inbound.inbox.start:
            mask |= WRITE
        if mask != self.mask:
            self.reactor.want(self, mask)

    def _local_failed(self, error: OSError) -> None:
        """The application's side is gone: what it sent before goes first, then the reset."""
        self._read_done = True
        if self._write_failed:
            # A Unix socket that was closed with input unread says so behind its last byte: that is its end.
            self._reset_when_delivered()
            self.refresh()
        elif error.errno in (errno.ECONNRESET, errno.EPIPE):
            self.reset("reset", "connection reset")
        else:
            self.reset("reset", f"local connection failed: {error.strerror or error}")

    # --- from the link ------------------------------------------------------------------------------------------------

    def deliver(self, data: bytes | memoryview) -> bool:
        """Stream data arrived: to the application as far as it takes it at once, else into the inbox.

        Returns whether it took all.
        """
        inbound = self.inbound
        self.owner.stream_moved(self)
        if self._write_failed or self.reason is not None:
            inbound.passed(len(data))
            return False
        inbox = inbound.inbox
        if inbox.end > inbox.start or self.sock is None:
            inbound.store(data)
            self.owner.stream_held()
            return False
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            inbound.passed(len(data))
            self._write_broke(error)
            return False
        if sent:
            inbound.passed(sent)
        if sent < len(data):
            inbound.store(data[sent:])
            self.owner.stream_held()
            return False
        return True

    def _drain(self) -> None:
        """The inbox to the application."""
        inbound = self.inbound
        for _ in range(WRITE_TURNS):
            view = inbound.waiting(limits.SCRATCH_BYTES)
            if view is None or self.sock is None:
                return
            try:
                sent = self.sock.send(view)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                del view
                self._write_broke(error)
                return
            partial = sent < len(view)
            del view
            inbound.taken(sent)
            self.owner.stream_moved(self)
            if partial:
                return

    def _deliver_end(self) -> None:
        """The application is given the EOF once it has all bytes."""
        inbound = self.inbound
        if not inbound.at_end() or (self.sock is None and self.reason is None):
            return
        if self._write_failed:
            return  # it has not: to ack the end would say that it has, and the reset that is due could not be sent
        if self.sock is not None:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError as error:  # it was reset: some of what it was sent before may have been lost
                self._write_broke(error)
                return
        inbound.end_delivered()

    def _write_broke(self, error: OSError) -> None:
        """The application takes no more. Go on consuming, read what it sent to its EOF, then reset: replies that were
        already sent are not lost."""
        self._write_failed = True
        inbound = self.inbound
        if len(inbound.inbox):
            inbound.taken(len(inbound.inbox))
            self.owner.stream_moved(self)
        if self._read_done:
            self._reset_when_delivered()

    def _reset_when_delivered(self) -> None:
        """After a failed write and the application's EOF: the reset waits until the peer took every byte."""
        if self._read_done and not len(self.outbound.replay):
            self.reset("reset", "connection reset")

    def acked(self) -> None:
        """The peer consumed bytes or granted more."""
        if self._write_failed:
            self._reset_when_delivered()
        self.refresh()

    def opened(self, address: str) -> None:
        """Ingress: the egress reached the target."""
        self.address = address
        self._announced = True
        self.owner.stream_opened(self)
        self._decide()

    def _decide(self) -> None:
        if self.decided is not None:
            decided, self.decided = self.decided, None
            decided(self)

    def ended(self) -> None:
        """The peer's EOF came."""
        self._deliver_end()

    # --- ends ---------------------------------------------------------------------------------------------------------

    def reset(self, code: str, message: str) -> None:
        """End both directions: the local socket now, with a TCP reset; the peer once it has the bytes queued before.

        Without a link, or when both ends have sent and acked all, nothing is sent. Idempotent.
        """
        if self.outcome is not None or self.reason is not None:
            return
        self.reason = (code, message)
        self._close_local(reset=True)
        inbound = self.inbound
        if len(inbound.inbox):
            inbound.taken(len(inbound.inbox))
        link = self.link
        if link is None:
            if self.owner.resumes:
                self.state.reset_wanted = (code, message)
            else:
                self._over(code, message)
        elif self.state.resettable():
            self.state.reset_wanted = (code, message)
            link.flush()
        # Else only the last ack lacks: the exchange ends by itself.

    def was_reset(self, code: str, message: str) -> None:
        """The peer's reset, or its answer to ours. The application gets what its socket still takes, then it."""
        if self.reason is None:
            self.reason = (code, message)
            self._drain()
        self._close_local(reset=True)

    def link_lost(self, reason: str) -> None:
        """The link is gone. The stream waits for another, if its owner keeps it; else it ends."""
        self.state.link_lost()
        self._unsaid = False  # the next `resume` says it
        if self.outcome is not None:
            return
        if not self.owner.stream_detached(self):
            self.abandon("lost", reason)
        elif self.reason is not None and not self.owner.resumes:
            self._over(*self.reason)
        else:
            self.refresh()

    def abandon(self, code: str, message: str) -> None:
        """End now, whatever the peer knows: the local socket is reset, a link that the stream is on is given up."""
        if self.link is not None:
            self.link.give_up_stream(message)
        if self.reason is None:
            self.reason = (code, message)
        self._close_local(reset=True)
        self._over(*self.reason)

    def resumed(self, address: str | None) -> None:
        """The stream goes on on its new link, with the next flush. `address`: what the egress dialled, if it did."""
        if self._unsaid:
            assert self.link is not None
            self._unsaid = False
            self.link.opened(self.address)
        if self.state.opened and not self._announced:
            self.opened(address or "")
        self.owner.stream_resumed(self)
        if self.reason is None and self.state.reset_wanted is not None:
            self.reset(*self.state.reset_wanted)  # the offsets could not be
        elif self._write_failed:
            self._reset_when_delivered()  # this may have been the ack that it waits for

    def gone(self, outcome: str, code: str, message: str) -> None:
        """The peer's answer to `resume`: the stream cannot go on. It has no link any more."""
        if self.reason is not None:
            self._over(*self.reason)  # all that we wanted was to say so
        elif outcome == "finished" and self._clean_here():
            self._over("finished", "")  # only the last ack lacked
        elif outcome == "reset":
            self.was_reset(code, message)
            self._over(code, message)
        elif outcome == "stale" and self.owner.stream_detached(self):
            pass  # an answer to an older `resume`: asked again with a higher epoch
        elif outcome != "unknown" or not self.owner.stream_unknown(self):
            self.abandon("lost", "the peer does not know the stream any more")

    def _clean_here(self) -> bool:
        """Whether our EOF was sent and the peer's was delivered."""
        outbound, inbound = self.outbound, self.inbound
        return outbound.total is not None and inbound.total is not None and inbound.consumed > inbound.total

    def finished(self) -> None:
        """The exchange on the link is over: cleanly unless there was a reset."""
        if self.reason is not None and not self._clean():
            self._over(*self.reason)
        else:
            self._over("finished", "")

    def _clean(self) -> bool:
        return self._clean_here() and not len(self.outbound.replay)

    def _over(self, code: str, message: str) -> None:
        if self.outcome is not None:
            return
        self.outcome = (code, message)
        self._close_local(reset=False)
        self.state.discard()
        self.owner.stream_ended(self)
        self._decide()
        if self.when_over is not None:
            self.when_over(self)

    def _close_local(self, *, reset: bool) -> None:
        self._read_done = True
        if self.dialling is not None:
            self.dialling.cancel()
            self.dialling = None
        if self.sock is None:
            return
        if reset:
            sockets.reset_on_close(self.sock)
        self.reactor.drop(self)
