"""Which of a client's streams without a link goes on next, and on which link: decisions without I/O."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from wstunnel import limits

if TYPE_CHECKING:
    from wstunnel.stream import Stream

FRUITLESS_FREE = 3
"""Links that a stream may lose at once, without having got anywhere, before it waits for the next one."""
FRUITLESS_SECONDS = 0.1
"""The first such wait; each one doubles it."""
AT_ONCE_SECONDS = 1.0
"""A link that carried the stream for longer was not lost at once."""


class _Case:
    """One stream's attempts so far."""

    __slots__ = ("afresh", "fruitless", "not_before", "progress", "tried")

    def __init__(self) -> None:
        self.afresh = False
        self.fruitless = 0
        self.not_before = -math.inf
        self.progress = -1
        self.tried = -math.inf


class Recovery:
    """Streams that wait for a link, first come first served. Times are monotonic seconds."""

    __slots__ = ("_cases", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[Stream, None] = {}
        self._cases: dict[Stream, _Case] = {}  # also of streams that go on: was it in vain?

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, stream: Stream, now: float) -> float:
        """The stream lost its link. Returns when it may be tried: a stream that loses every link as soon as it is on
        it, and gets nowhere, must not spin.
        """
        case = self._cases.setdefault(stream, _Case())
        progress = stream.state.progress()
        if progress != case.progress or now - case.tried >= AT_ONCE_SECONDS:
            case.fruitless = 0
        case.progress, case.afresh = progress, False
        if case.fruitless >= FRUITLESS_FREE:
            doublings = min(case.fruitless - FRUITLESS_FREE, 30)
            case.not_before = now + min(FRUITLESS_SECONDS * 2**doublings, limits.BACKOFF_MAX_SECONDS)
        else:
            case.not_before = now
        case.fruitless += 1
        self._waiting[stream] = None
        return case.not_before

    def add_afresh(self, stream: Stream) -> None:
        """The server never heard of the stream: it is to be opened again, under another id."""
        self._cases.setdefault(stream, _Case()).afresh = True
        self._waiting[stream] = None

    def ready(self, now: float) -> int:
        """How many streams may be tried now."""
        return sum(now >= self._cases[stream].not_before for stream in self._waiting)

    def next(self, heard: float, now: float) -> Stream | None:
        """The stream that has waited longest, of those that may be tried now, on a link that was heard at `heard`.

        A stream whose last link fell silent trusts only links that were heard after that.
        """
        for stream in self._waiting:
            if heard > stream.proof_after and now >= self._cases[stream].not_before:
                return stream
        return None

    def take(self, stream: Stream, now: float) -> bool:
        """It is tried now. Returns whether it is to be opened afresh."""
        del self._waiting[stream]
        case = self._cases[stream]
        case.tried = now
        return case.afresh

    def forget(self, stream: Stream) -> None:
        """The stream ended."""
        self._waiting.pop(stream, None)
        self._cases.pop(stream, None)
