"""Credit: how much a receiver lets its peer send, and the budgets that bound what is held in all.

A window grows as TCP's receive buffer does: when a whole window was consumed within four minimum round trips, it was
the window that held the sender back. Not two: where packets are lost, each window waits a round trip or two for what is
sent again, and would never grow, which at 80 ms and 1 % loss cost five sixths of the throughput. What was granted is
never taken away: limits only rise.
"""

from __future__ import annotations

from wstunnel.limits import WINDOW_FIRST, WINDOW_FLOOR, WINDOW_MAX

GROWTH_ROUND_TRIPS = 4
ROUND_TRIP_FLOOR = 0.002
"""Seconds. On loopback a round trip is shorter than a turn of the event loop: windows would never grow there."""


class Budget:
    """Bytes held for a principal, or by the process (the `parent`).

    Args:
        capacity: bytes.
        parent: the budget that this one is part of.
    """

    __slots__ = ("_readable", "capacity", "held", "parent")

    def __init__(self, capacity: int, parent: Budget | None = None) -> None:
        self.capacity = capacity
        self._readable = capacity - capacity // 8
        self.held = 0
        self.parent = parent

    def charge(self, size: int) -> None:
        """`size` more bytes are held; negative gives back."""
        self.held += size
        if self.parent is not None:
            self.parent.held += size

    def level(self) -> float:
        """The fuller of this budget and its parent: 0 empty, 1 full."""
        own = self.held / self.capacity
        return own if self.parent is None else max(own, self.parent.held / self.parent.capacity)

    def room(self) -> int:
        """Bytes that may still be read from applications: up to 7/8. The rest is for what peers were granted, so that
        reading, which can wait, never makes the largest stream be reset.
        """
        room = self._readable - self.held
        parent = self.parent
        if parent is not None and parent._readable - parent.held < room:
            room = parent._readable - parent.held
        return room if room > 0 else 0

    def growing(self) -> bool:
        """Windows may grow: under 50 %."""
        return self.level() < 0.5

    def admitting(self) -> bool:
        """New streams may open: under 75 %."""
        return self.level() < 0.75

    def exhausted(self) -> bool:
        """The stream that holds most has to go: 100 %."""
        return self.level() >= 1


class ReceiveWindow:
    """What one direction's receiver granted.

    Attributes:
        size: bytes beyond `consumed` that the next grant allows.
        limit: the absolute offset up to which the peer may send; never falls.
        acked: `consumed` as last told to the peer.
    """

    __slots__ = ("_mark", "_mark_time", "acked", "limit", "size")

    def __init__(self, size: int = WINDOW_FIRST) -> None:
        self.size = size
        self.limit = size
        self.acked = 0
        self._mark = 0
        self._mark_time = float("-inf")

    def due(self, consumed: int) -> bool:
        """Whether an ack is worth a message: a quarter of the window last sent was consumed since."""
        return 4 * (consumed - self.acked) >= self.limit - self.acked

    def restate(self, consumed: int) -> int:
        """The limit to send along with `consumed` when the stream moves to another link."""
        self._mark, self._mark_time = consumed, float("-inf")
        self.acked = consumed
        self.limit = max(self.limit, consumed + self.size)
        return self.limit

    def grant(self, consumed: int, now: float, round_trip: float, budget: Budget) -> int:
        """The limit to send with an ack of `consumed`.

        Args:
            consumed: offset up to which the application took the bytes.
            now: a monotonic time in seconds.
            round_trip: the link's smallest, in seconds.
            budget: what the stream's principal holds.
        """
        within = now - self._mark_time <= GROWTH_ROUND_TRIPS * max(round_trip, ROUND_TRIP_FLOOR)
        if within and consumed - self._mark >= self.size:
            if budget.growing():
                self.size = min(2 * self.size, WINDOW_MAX)
            self._mark, self._mark_time = consumed, now
        elif not within:
            self._mark, self._mark_time = consumed, now
        if self.size > WINDOW_FLOOR and not budget.admitting():
            self.size = max(self.size // 2, WINDOW_FLOOR)
        self.acked = consumed
        self.limit = max(self.limit, consumed + self.size)
        return self.limit
