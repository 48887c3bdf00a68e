"""What became of streams that ended: a late `resume` is told the truth, and an `open` that a proxy held back does not
dial again.
"""

from __future__ import annotations

from typing import NamedTuple

from wstunnel.limits import PRINCIPAL_TOMBSTONES, TOMBSTONES
from wstunnel.wire.messages import Outcome


class Tombstone(NamedTuple):
    """How a stream ended, in the words of `gone`."""

    outcome: Outcome
    code: str = ""
    message: str = ""


UNKNOWN = Tombstone("unknown")
FINISHED = Tombstone("finished")


class Crowd:
    """How many tombstones there are in all, of every principal."""

    __slots__ = ("capacity", "count")

    def __init__(self, capacity: int = TOMBSTONES) -> None:
        self.capacity = capacity
        self.count = 0


class Tombstones:
    """Finished and refused ids of one principal.

    One goes when the peer opens again on the same link (`forget`), else after `seconds` (`sweep`); beyond `capacity`,
    or beyond what all principals may have together, the oldest goes.

    Args:
        seconds: the longest resume window of any stream.
        capacity: for this principal.
        crowd: counts those of all principals.
    """

    __slots__ = ("_capacity", "_crowd", "_seconds", "_stones")

    def __init__(self, seconds: float, capacity: int = PRINCIPAL_TOMBSTONES, crowd: Crowd | None = None) -> None:
        self._capacity = capacity
        self._seconds = seconds
        self._crowd = Crowd() if crowd is None else crowd
        self._stones: dict[str, tuple[float, Tombstone]] = {}

    def __len__(self) -> int:
        return len(self._stones)

    def __contains__(self, stream_id: object) -> bool:
        return stream_id in self._stones

    def find(self, stream_id: str) -> Tombstone | None:
        """How that stream ended; None if nothing is known of it. Asking does not use the memory up."""
        found = self._stones.get(stream_id)
        return None if found is None else found[1]

    def add(self, stream_id: str, stone: Tombstone, now: float) -> None:
        """Remember an id; `now` is monotonic seconds and never less than before."""
        self.forget(stream_id)
        full = len(self._stones) >= self._capacity or self._crowd.count >= self._crowd.capacity
        if full and self._stones:
            self.forget(next(iter(self._stones)))
        self._stones[stream_id] = now + self._seconds, stone
        self._crowd.count += 1

    def forget(self, stream_id: str | None) -> None:
        """The peer went on on that stream's link: it will not ask for it again."""
        if stream_id is not None and self._stones.pop(stream_id, None) is not None:
            self._crowd.count -= 1

    def sweep(self, now: float) -> None:
        """Drop those whose time is over."""
        stale = []
        for stream_id, (until, _stone) in self._stones.items():
            if until > now:
                break
            stale.append(stream_id)
        for stream_id in stale:
            self.forget(stream_id)
