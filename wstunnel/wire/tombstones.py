"""Ids of streams that ended: an `open` that a proxy held back must not dial again."""

from __future__ import annotations

from wstunnel.limits import PRINCIPAL_TOMBSTONES, TOMBSTONE_SECONDS


class Tombstones:
    """Finished and refused ids of one principal.

    One goes when the peer opens again on the same link (`forget`), else after `seconds` (`sweep`); beyond `capacity`
    the oldest goes.
    """

    __slots__ = ("_capacity", "_seconds", "_stones")

    def __init__(self, capacity: int = PRINCIPAL_TOMBSTONES, seconds: float = TOMBSTONE_SECONDS) -> None:
        self._capacity = capacity
        self._seconds = seconds
        self._stones: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._stones)

    def __contains__(self, stream_id: object) -> bool:
        return stream_id in self._stones

    def add(self, stream_id: str, now: float) -> None:
        """Remember an id; `now` is monotonic seconds and never less than before."""
        self._stones.pop(stream_id, None)
        if len(self._stones) >= self._capacity:
            del self._stones[next(iter(self._stones))]
        self._stones[stream_id] = now + self._seconds

    def forget(self, stream_id: str | None) -> None:
        """The peer went on on that stream's link: it will not ask for it again."""
        if stream_id is not None:
            self._stones.pop(stream_id, None)

    def sweep(self, now: float) -> None:
        """Drop those whose time is over."""
        stale = []
        for stream_id, until in self._stones.items():
            if until > now:
                break
            stale.append(stream_id)
        for stream_id in stale:
            del self._stones[stream_id]
