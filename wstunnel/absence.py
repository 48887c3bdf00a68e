"""Whether the server is away, when to try it again, and what of it is worth a line: decisions without I/O."""

from __future__ import annotations

import math
from collections.abc import Callable

from wstunnel.pool import Backoff

YOUNG_SECONDS = 1.0
"""A link that is lost this soon counts as a failed dial: dialling again at once would be a storm."""
WAITING_RETRY_SECONDS = 2.0
"""Longest pause between dials while an application waits, which it does for 10 s."""
SHORT_SAID_SECONDS = 600.0
"""Between two lines that no more links can be had: some dials may succeed in between, so it may come and go."""

LOST = "lost the server, trying again"
UNREACHED = "cannot reach the server, trying again"
SHORT = "cannot dial another link, trying again"
"""Links live: the server is there. It has no room, this machine has no descriptor, or the network has just gone."""


class Absence:
    """Times are monotonic seconds.

    Args:
        random: floats in [0, 1), for the back-off.

    Attributes:
        away: no dial has succeeded since one failed; links that were dialled before may live.
        retry_at: when to dial next while it is away.
        settled: False after a link died young, until the server proves to be of use.
        welcomed: it has been there at least once.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._backoff = Backoff(random)
        self._said = False
        self._short_said_at = -math.inf
        self._useful_at = -math.inf
        self.away = False
        self.retry_at = -math.inf
        self.settled = True
        self.welcomed = False

    def failed(self, now: float, *, linked: bool = False) -> str | None:
        """A dial failed. Many that fail together cost one step of the back-off.

        Args:
            now: monotonic seconds.
            linked: other links live, as far as anybody knows.

        Returns:
            None if this one adds nothing; else what to say: a line, or nothing.
        """
        if self.away and now < self.retry_at:
            return None
        self.retry_at = now + self._backoff.failed()
        again, self.away = self.away, True
        if self._said:
            return ""
        if linked and self.welcomed:
            # Not at once: of a server that dies the port may be closed a moment before the last link is.
            if not again or now - self._short_said_at < SHORT_SAID_SECONDS:
                return ""
            self._short_said_at = now
            return SHORT
        self._said = True
        return LOST if self.welcomed else UNREACHED

    def ended(self) -> None:
        """A dial has succeeded. Whether the server stays is another question: see `back`."""
        self.away = False

    def hurry(self, now: float) -> None:
        """An application waits."""
        self.retry_at = min(self.retry_at, now + WAITING_RETRY_SECONDS)

    def died(self, created: float, now: float) -> bool:
        """A link that was greeted at the server is gone. Returns whether that counts as a failed dial.

        It does if the link was young and no stream got on since it was made.
        """
        if now - created >= YOUNG_SECONDS or self._useful_at >= created:
            return False
        self.settled = False
        return True

    def useful(self, now: float) -> bool:
        """A stream was opened, or went on. Returns whether the server has settled with it."""
        self._useful_at = now
        return self.settle()

    def settle(self) -> bool:
        """A link has lived for a while. Returns whether that changes anything."""
        settled, self.settled = self.settled, True
        return not settled

    def back(self) -> str | None:
        """The server is there, and stays. Returns what to say: `connected`, `connected again`, or nothing."""
        self._backoff.succeeded()
        line = None
        if self._said or not self.welcomed:
            line = "connected again" if self.welcomed else "connected"
        self._said = False
        self.welcomed = True
        return line
