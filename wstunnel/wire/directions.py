"""The two directions of a stream, seen from one end: offsets, credit, what is held.

Each direction counts its payload bytes from 0. Its EOF takes one offset of its own, as FIN does in TCP: an ack of
total + 1 says that the end was delivered.
"""

from __future__ import annotations

from wstunnel.errors import ProtocolError, StreamError
from wstunnel.limits import SEND_MAX, WINDOW_FIRST
from wstunnel.wire.buffer import OffsetBuffer
from wstunnel.wire.credit import Budget, ReceiveWindow
from wstunnel.wire.states import HALF, Half, HalfEvent


class Outbound:
    """From our application to the peer.

    Attributes:
        replay: the bytes from `base` (acked by the peer) to `end` (read from our application).
        cursor: offset of the next byte to go onto the link.
        limit: offset up to which the peer lets us send.
        total: length of the direction once the application ended it, else None.
        state: `Half.ENDED` once our `eof` went out, `Half.DONE` once it was acked.
    """

    __slots__ = ("budget", "cursor", "discarded", "limit", "replay", "state", "total")

    def __init__(self, budget: Budget, limit: int = WINDOW_FIRST) -> None:
        self.budget = budget
        self.replay = OffsetBuffer()
        self.cursor = 0
        self.discarded = False
        self.limit = limit
        self.total: int | None = None
        self.state = Half.OPEN

    def room(self) -> int:
        """How many bytes may be read from the application now."""
        if self.total is not None:
            return 0
        replay = self.replay
        room = self.limit - replay.end
        if room > (most := replay.start + SEND_MAX - replay.end):  # comparisons: min() costs three times as much
            room = most
        if room <= 0:
            return 0
        return room if room < (left := self.budget.room()) else left

    def queued(self) -> int:
        """Bytes that were read and are not on the link yet."""
        return self.replay.end - self.cursor

    def append(self, data: bytes | memoryview) -> None:
        """Bytes that were read from the application; at most `room()`."""
        self.replay.append(data)
        self.budget.charge(len(data))

    def carry(self, data: bytes | memoryview) -> bool:
        """`append` it and `take` it, whole. False if other bytes have to go first; then nothing was done."""
        replay = self.replay
        if self.cursor != replay.end:
            return False
        replay.append(data)
        self.cursor = replay.end
        self.budget.charge(len(data))
        return True

    def adopt(self, data: memoryview) -> memoryview:
        """As `append`, without a copy; see `OffsetBuffer.adopt`."""
        self.budget.charge(len(data))
        return self.replay.adopt(data)

    def end(self) -> None:
        """The application sent its EOF."""
        self.total = self.replay.end

    def take(self, limit: int) -> memoryview | None:
        """The next bytes for the link, at most `limit`, and moves the cursor over them; None when there are none."""
        if self.cursor == self.replay.end:
            return None
        view = self.replay.view(self.cursor, limit)
        self.cursor += len(view)
        return view

    def eof_due(self) -> bool:
        """Whether all bytes are on the link and `eof` is not."""
        return self.cursor == self.total and self.state is Half.OPEN and not self.discarded

    def eof_sent(self) -> int:
        """Note that `eof` goes onto the link; returns its total."""
        assert self.total is not None
        self.state = HALF[self.state, HalfEvent.EOF]
        return self.total

    def acknowledge(self, consumed: int, limit: int) -> None:
        """Apply the peer's `ack`.

        Raises:
            ProtocolError: it goes back, or acks what was not sent.
        """
        sent = self.cursor if self.state is Half.OPEN else self.cursor + 1
        base = self.replay.start if self.state is not Half.DONE else sent
        if consumed > sent:
            raise ProtocolError(f"ack of {consumed}, only {sent} were sent")
        if consumed < base and not self.discarded:
            raise ProtocolError(f"ack went back from {base} to {consumed}")
        if limit < self.limit:
            raise ProtocolError(f"limit fell from {self.limit} to {limit}")
        self.limit = limit
        if self.state is Half.ENDED and consumed == sent:
            self.state = HALF[self.state, HalfEvent.EOF_ACK]
        released = min(consumed, self.replay.end)
        if released > self.replay.start:
            self.budget.charge(self.replay.start - released)
            self.replay.release(released)

    def link_lost(self) -> None:
        """The link is gone: what was on it may not have arrived."""
        self.state = HALF[self.state, HalfEvent.EOF_LOST]

    def resume(self, received: int, consumed: int, limit: int) -> int:
        """Go on behind what the peer has, on another link.

        Args:
            received: bytes in order in the peer's hands, + 1 after EOF.
            consumed, limit: as in an `ack`.

        Returns:
            how many bytes go onto a link for the second time.

        Raises:
            StreamError: these offsets cannot be; the stream has to be reset. Nothing has changed.
        """
        end = self.replay.end if self.total is None else self.total + 1
        base = end if self.state is Half.DONE else self.replay.start
        if not base <= consumed <= received <= end or limit < self.limit:
            raise StreamError(
                "lost", f"cannot go on from {received} ({consumed} consumed, limit {limit}): {base} to {end} are held"
            )
        before = self.cursor
        self.cursor = min(received, self.replay.end)
        if self.state is Half.OPEN and received > self.cursor:
            self.state = HALF[self.state, HalfEvent.EOF]
        self.acknowledge(consumed, limit)
        return max(before - self.cursor, 0)

    def restart(self) -> int:
        """Send everything again, as a stream of another id: the peer never answered. Returns how many bytes that is."""
        before, self.cursor = self.cursor, self.replay.start
        return before - self.cursor

    def discard(self) -> None:
        """Forget the bytes held: the stream is reset. Acks of what is on the link may still come; no EOF goes out."""
        self.discarded = True
        self.budget.charge(-len(self.replay))
        self.replay.restart(self.cursor)


class Inbound:
    """From the peer to our application.

    Attributes:
        inbox: what arrived and was not taken by the application yet.
        received: bytes in order in our hands, + 1 after EOF.
        consumed: bytes taken by the application, + 1 after it was given the EOF.
        total: length of the direction once the peer ended it, else None.
        state: `Half.ENDED` once the peer's `eof` came, `Half.DONE` once the ack that covers it is on the link.
    """

    __slots__ = ("budget", "consumed", "inbox", "received", "restated", "state", "total", "window")

    def __init__(self, budget: Budget, window: int = WINDOW_FIRST) -> None:
        self.budget = budget
        self.inbox = OffsetBuffer()
        self.received = 0
        self.consumed = 0
        self.restated = 0  # `consumed` of the last `resume` or `resumed`
        self.total: int | None = None
        self.state = Half.OPEN
        self.window = ReceiveWindow(window)

    def arrived(self, size: int) -> None:
        """`size` bytes came from the link. They must be consumed or stored next.

        Raises:
            ProtocolError: they pass the limit that was granted, or follow the EOF.
        """
        if self.total is not None:
            raise ProtocolError(f"data after eof at {self.total}")
        received = self.received + size
        if received > self.window.limit:
            raise ProtocolError(f"data up to {received} passes the limit {self.window.limit}")
        self.received = received

    def ended(self, total: int) -> None:
        """The peer's `eof`.

        Raises:
            ProtocolError: a second one, or its total is not what arrived.
        """
        if self.total is not None:
            raise ProtocolError("second eof")
        if total != self.received:
            raise ProtocolError(f"eof at {total}, but {self.received} bytes arrived")
        self.total = total
        self.received = total + 1
        self.state = HALF[self.state, HalfEvent.EOF]

    def store(self, data: bytes | memoryview) -> None:
        """Keep bytes that arrived and that the application did not take at once."""
        self.inbox.append(data)
        self.budget.charge(len(data))

    def waiting(self, limit: int) -> memoryview | None:
        """The next bytes for the application, at most `limit`; None when the inbox is empty."""
        inbox = self.inbox
        return inbox.view(inbox.start, limit) if inbox.end > inbox.start else None

    def passed(self, size: int) -> None:
        """The application took `size` bytes that were never stored; the inbox is empty."""
        self.consumed = consumed = self.consumed + size
        inbox = self.inbox
        inbox.start = inbox.end = consumed  # `restart`, where there is nothing to forget

    def taken(self, size: int) -> None:
        """The application took `size` bytes of the inbox."""
        self.budget.charge(-size)
        self.consumed += size
        self.inbox.release(self.inbox.start + size)

    def at_end(self) -> bool:
        """Whether the application has every byte and is to be given the EOF now."""
        return self.total is not None and self.consumed == self.total

    def end_delivered(self) -> None:
        """The application was given the EOF."""
        assert self.at_end()
        self.consumed += 1

    def ack_due(self) -> bool:
        """Whether an ack should go out without waiting for the sweep: the EOF is acked at once."""
        consumed, window = self.consumed, self.window
        if consumed == window.acked:
            return False
        return window.due(consumed) or (self.total is not None and consumed > self.total)

    def grant(self, now: float, round_trip: float) -> tuple[int, int]:
        """`consumed` and `limit` of an ack that goes onto the link now."""
        limit = self.window.grant(self.consumed, now, round_trip, self.budget)
        if self.state is Half.ENDED and self.total is not None and self.consumed > self.total:
            self.state = HALF[self.state, HalfEvent.EOF_ACK]
        return self.consumed, limit

    def link_lost(self) -> None:
        """The link is gone: the last ack may not have arrived."""
        self.state = HALF[self.state, HalfEvent.ACK_LOST]

    def restate(self) -> tuple[int, int, int]:
        """`received`, `consumed` and `limit` for `resume` or `resumed`: earlier messages that said so may be lost."""
        self.restated = self.consumed
        return self.received, self.consumed, self.window.restate(self.consumed)

    def confirmed(self) -> None:
        """What was restated is as good as an ack on the link: the peer has it, or it goes ahead of everything else."""
        if self.state is Half.ENDED and self.total is not None and self.restated > self.total:
            self.state = HALF[self.state, HalfEvent.EOF_ACK]

    def discard(self) -> None:
        """Forget the bytes held: the stream was reset."""
        self.budget.charge(-len(self.inbox))
        self.inbox.release(self.inbox.end)
