"""What is counted and said of streams that lose their links: one line when it begins, one when it is over."""

from __future__ import annotations

CALM_SECONDS = 1.0
"""An outage is over when no stream has waited for so long: a network that flaps is one outage, not one a second."""


class Outages:
    """The outages of one session, one at a time: from the first stream without a link until none is left.

    Attributes:
        cuts: streams that lost a link, since the session began.
        resumptions: streams that went on, since the session began.
        replayed: bytes that were sent again, since the session began.
    """

    __slots__ = ("_calm_since", "_lost", "_resumed", "_said", "_since", "cuts", "replayed", "resumptions")

    def __init__(self) -> None:
        self.cuts = 0
        self.resumptions = 0
        self.replayed = 0
        self._since: float | None = None
        self._calm_since: float | None = None
        self._said = False
        self._resumed: set[str] = set()  # each once, however often it went on
        self._lost = 0

    def cut(self, since: float) -> None:
        """A stream lost its link, which was last heard of at `since` (monotonic seconds)."""
        self.cuts += 1
        self._calm_since = None
        self._since = since if self._since is None else min(self._since, since)

    def resumed(self, stream: str, replayed: int) -> None:
        """A stream, named by its id, went on; `replayed` bytes are sent again."""
        self.resumptions += 1
        self.replayed += replayed
        self._resumed.add(stream)

    def lost(self) -> None:
        """A stream was given up for want of a link."""
        self._lost += 1

    def report(self, waiting: int, now: float, *, final: bool = False) -> str | None:
        """The line to log now, if any.

        Args:
            waiting: streams that have no link.
            now: monotonic seconds.
            final: the session ends: no more streams can be cut.
        """
        if self._since is None:
            return None
        if waiting:
            self._calm_since = None
            if self._said:
                return None
            self._said = True
            return f"{_streams(waiting)} lost {'its' if waiting == 1 else 'their'} link, resuming"
        if self._calm_since is None:
            self._calm_since = now
        if now - self._calm_since < CALM_SECONDS and not final:
            return None
        took = self._calm_since - self._since
        self._calm_since = None
        resumed, lost = len(self._resumed), self._lost
        self._since, self._said, self._resumed, self._lost = None, False, set(), 0
        parts = []
        if resumed:
            parts.append(f"{_streams(resumed)} resumed after {took:.1f} s, 0 bytes lost")
        if lost:
            parts.append(f"{_streams(lost)} could not be resumed and {'was' if lost == 1 else 'were'} reset")
        return "; ".join(parts) or None

    @property
    def over(self) -> bool:
        """Whether no outage goes on."""
        return self._since is None


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"
