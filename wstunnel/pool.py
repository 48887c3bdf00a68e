"""How many links to keep and when to dial again: decisions without I/O."""

from __future__ import annotations

from collections.abc import Callable

from wstunnel import limits

PEAK_DECAY = 0.9
"""A second: a burst of 60 opens asks for more links than the least for about a quarter of a minute."""
IDLE_LINKS_MAX = 64
"""However many opens the last burst had: more idle links than this cost both ends more than they save."""
SURPLUS_SECONDS = 60.0
"""An idle link beyond the wanted number is closed after this long."""


class Demand:
    """How many links should be idle: the least, or what the recent peak of opens a second asks for.

    Args:
        least: links that are always kept ready.
    """

    def __init__(self, least: int) -> None:
        self.least = least
        self._opens = 0
        self._peak = 0.0

    def opened(self) -> None:
        """A link was taken."""
        self._opens += 1

    def second(self) -> None:
        """A second went by."""
        self._peak = max(float(self._opens), self._peak * PEAK_DECAY)
        self._opens = 0

    def wanted(self) -> int:
        """Idle links to keep."""
        return max(self.least, min(IDLE_LINKS_MAX, round(self._peak)))


def links_to_dial(*, wanted: int, idle: int, waiting: int, dialling: int, total: int, most: int) -> int:
    """How many dials to start now.

    Args:
        wanted: idle links to keep.
        idle: links that are ready.
        waiting: links that are needed now, for which none of the idle ones will do.
        dialling: dials under way.
        total: links in all.
        most: links to have.
    """
    missing = max(wanted - idle, 0) + waiting - dialling
    return max(0, min(missing, limits.DIALS_AT_ONCE - dialling, most - total - dialling))


class Backoff:
    """Delays between failed attempts: doubling from 0.2 s to 15 s, each drawn from 0 to itself (full jitter).

    Args:
        random: returns a float in [0, 1).
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random
        self._ceiling = limits.BACKOFF_FIRST_SECONDS

    def failed(self) -> float:
        """Seconds to wait before the next attempt."""
        delay = self._random() * self._ceiling
        self._ceiling = min(2 * self._ceiling, limits.BACKOFF_MAX_SECONDS)
        return delay

    def succeeded(self) -> None:
        """Start over with the first delay."""
        self._ceiling = limits.BACKOFF_FIRST_SECONDS
