"""How large the frames on a link may be: a frame that was begun is finished, and control messages wait for it."""

from __future__ import annotations

from wstunnel import limits

FRAME_SECONDS = 0.25
"""Longest that a frame keeps the connection: what control messages, acks and pings may be late on a slow path."""
FIRST_BYTES = 16 * limits.KIB
"""Before anything was measured: 1.3 s at 100 kbit/s, once."""
FLOOR_BYTES = limits.KIB
"""Below it headers and masking keys cost more than they save."""


class Pace:
    """Follows how fast one connection takes bytes. Times are monotonic seconds.

    Attributes:
        frame: most payload bytes for the next frame.
    """

    __slots__ = ("_bytes", "_since", "frame")

    def __init__(self) -> None:
        self.frame = FIRST_BYTES
        self._since: float | None = None  # when the connection began to be full
        self._bytes = 0  # taken since then

    def took(self, size: int) -> None:
        """A frame of `size` bytes was taken at once. Not full now: doubling, as TCP's own slow start does."""
        if size >= self.frame:
            self.frame = min(2 * self.frame, limits.FRAME_BYTES)

    def full(self, now: float) -> None:
        """The connection took less than it was offered."""
        if self._since is None:
            self._since, self._bytes = now, 0

    def drained(self, size: int, now: float) -> None:
        """It took `size` bytes that had waited."""
        if self._since is None:
            return
        self._bytes += size
        passed = now - self._since
        if passed >= FRAME_SECONDS:
            self.frame = max(FLOOR_BYTES, min(int(self._bytes / passed * FRAME_SECONDS), limits.FRAME_BYTES))
            self._since, self._bytes = now, 0

    def idle(self) -> None:
        """Nothing waits any more: from here on it is not the connection that is slow."""
        self._since = None
