"""How long the path lets a connection be silent: several links at a time, each silent for another time.

    silent   |---- 2 s ----| ping: lives          |------- 5 s -------| closed after 5.0 s, or no answer: dead
    keepalive|---- 13 s ---- ping ---- 13 s ---- ping ...                 as `wstunnel client` does it
    lively   | ping 1 s ping 1 s ping ...                                 dies only if it is not silence that kills

So it takes as long as the longest silence, and less if the path is found to close connections before that: which two
of them say, since one may end for a reason of its own. The next one is asked at once for that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from wstunnel import limits
from wstunnel.check_link import CheckLink, ClosedByPeerError
from wstunnel.check_report import Step, duration
from wstunnel.errors import NetworkError, WstunnelError

SILENCES: Final = (
    2, 5, 10, 14, 20, 30, 45, 60, 90, 120, 180, 240, 300, 420, 600, 900, 1200, 1500, 1800, 2400, 3000, 3600,
)  # fmt: skip
"""Seconds that are tried: the timeouts that proxies and NATs have by default, and one just above our keepalive."""
LIVELY_SECONDS: Final = 1.0
OTHERS_SECONDS: Final = 2.0
"""When the path closed one connection, the others that are silent for as long go within this: they began together."""
GRACE_SECONDS: Final = 30
"""Asked of the server beyond the longest silence, for the ping after it."""

Connect = Callable[[int], Awaitable[tuple[CheckLink, int]]]
"""Makes one link that was pinged just now. Called with the seconds for which the server is asked to be quiet; returns
the link and what it granted. Raises WstunnelError."""


@dataclass(frozen=True, slots=True)
class Silence:
    """What became of one silent link.

    Args:
        seconds: of silence that were wanted.
        lived: it answered afterwards.
        ended: after how many seconds the connection was closed; None if it lived, or went without a word.
        how: what was seen at the end.
    """

    seconds: float
    lived: bool
    ended: float | None = None
    how: str = ""

    @property
    def at_most(self) -> float:
        """If it did not live: the path's timeout is not longer."""
        return self.seconds if self.ended is None else self.ended


def silences(longest: float) -> list[float]:
    """The silences to try, the shortest first: some of SILENCES, and the longest one asked for."""
    return [*(float(seconds) for seconds in SILENCES if seconds < longest), float(longest)]


def is_contradicted(dead: Silence, found: list[Silence]) -> bool:
    """Whether another connection lived for longer: then it was not silence that ended this one."""
    return any(each.lived and each.seconds > dead.at_most for each in found)


def bounds(found: list[Silence]) -> tuple[float, Silence | None]:
    """What the path's idle timeout is between: the longest silence that lived, and the first one that did not."""
    dead = min(
        (each for each in found if not each.lived and not is_contradicted(each, found)),
        key=lambda each: each.at_most,
        default=None,
    )
    lived = [each.seconds for each in found if each.lived and (dead is None or each.seconds <= dead.at_most)]
    return max(lived, default=0.0), dead


def is_settled(found: list[Silence], waiting: set[float]) -> bool:
    """Whether what still waits cannot change `bounds`; one that did not live is not believed as long as others wait."""
    _, dead = bounds(found)
    agreed = sum(not each.lived and not is_contradicted(each, found) for each in found) > 1
    return not waiting or (dead is not None and agreed and min(waiting) >= dead.at_most)


class Idle:
    """One measurement, as long as `longest` and PONG_WITHIN_SECONDS at most: `run` it, then ask for its `steps`.

    Args:
        connect: makes links.
        longest: seconds of silence, at least 1.
    """

    def __init__(self, connect: Connect, longest: float) -> None:
        self._connect = connect
        self._longest = longest
        self._found: list[Silence] = []
        self._problems: list[str] = []
        self._waiting: set[float] = set()
        self._asleep: dict[float, trio.CancelScope] = {}  # of those, the links that say nothing now
        self._granted = float(longest)
        self._kept: tuple[float, str | None] | None = None
        self._settled = trio.Event()
        self._lively_ended: str | None = None
        self._complete = False

    async def run(self) -> None:
        """Measure. When it is cancelled, `steps` has what was found until then.

        Raises:
            WstunnelError: not even the first link could be made.
        """
        self._waiting = set(silences(self._longest))
        lively, granted = await self._connect(int(self._longest) + GRACE_SECONDS)
        self._granted = float(granted or limits.PING_AFTER_SECONDS)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._live, lively)
                nursery.start_soon(self._keep)
                for seconds in sorted(self._waiting):
                    nursery.start_soon(self._be_silent, seconds)
                await self._settled.wait()
                nursery.cancel_scope.cancel()
            await self._ask_at_the_end(lively)
            self._complete = True
        finally:
            await lively.close()

    def steps(self) -> list[Step]:
        """`keepalive` (if there was the time for one) and `idle`; none if nothing was found before it ended early."""
        if not self._complete and not self._found:
            return []
        steps = [self._idle_step()]
        if self._kept is not None:
            steps.insert(0, self._keepalive_step(*self._kept))
        return steps

    async def _ask_at_the_end(self, lively: CheckLink) -> None:
        if self._lively_ended is None:
            try:
                await lively.ping()
            except NetworkError as error:
                self._lively_ended = str(error)

    async def _live(self, link: CheckLink) -> None:
        try:
            while True:
                await link.silence(LIVELY_SECONDS)
                await link.ping()
        except NetworkError as error:
            self._lively_ended = str(error)

    async def _keep(self) -> None:
        """A link with wstunnel's own keepalive."""
        try:
            link, _ = await self._connect(int(limits.CLIENT_PING_AFTER_SECONDS) + GRACE_SECONDS)
        except WstunnelError:
            return  # the silent ones say so
        began = trio.current_time()
        try:
            while True:
                await link.silence(limits.CLIENT_PING_AFTER_SECONDS)
                await link.ping()
                self._kept = trio.current_time() - began, None
        except NetworkError as error:
            self._kept = trio.current_time() - began, str(error)
        finally:
            await link.close()

    async def _be_silent(self, seconds: float) -> None:
        found = None
        try:
            # The server pings by itself when it was not told to be quiet: what is longer cannot be measured then.
            if seconds < self._granted:
                found = await self._silence(seconds)
        finally:
            self._waiting.discard(seconds)
            if found is not None:
                self._found.append(found)
            if is_settled(self._found, self._waiting):
                self._settled.set()
        if found is not None and not found.lived:
            await self._doubt(found)

    async def _doubt(self, dead: Silence) -> None:
        """Ask the next link at once: if it lives, silence was not the reason."""
        if dead.ended is not None:
            await trio.sleep(OTHERS_SECONDS)
        if self._asleep:
            self._asleep[min(self._asleep)].cancel()

    async def _silence(self, wanted: float) -> Silence | None:
        """None if the link could not be made, or did not stay silent."""
        seconds = wanted
        try:
            link, _ = await self._connect(int(self._longest) + GRACE_SECONDS)
        except WstunnelError as error:
            self._problems.append(str(error))
            return None
        began = trio.current_time()
        try:
            with trio.CancelScope() as self._asleep[wanted]:
                await link.silence(wanted)
            if self._asleep.pop(wanted).cancelled_caught:
                seconds = trio.current_time() - began
            if link.disturbed:
                return None
            await link.ping()
            return Silence(seconds, lived=True)
        except ClosedByPeerError as error:
            after = trio.current_time() - began
            # Closed only when the ping came: the path had forgotten the connection, at some time before.
            return Silence(seconds, lived=False, ended=after if after < seconds else None, how=str(error))
        except NetworkError as error:
            return Silence(seconds, lived=False, how=str(error))
        finally:
            self._asleep.pop(wanted, None)
            await link.close()

    # --- what it means ------------------------------------------------------------------------------------------------

    def _keepalive_step(self, seconds: float, error: str | None) -> Step:
        every = limits.CLIENT_PING_AFTER_SECONDS
        evidence = {"keepalive": every, "seconds": round(seconds, 1), "error": error}
        if error is None:
            text = f"a connection with wstunnel's keepalive of {duration(every)} lived for {duration(seconds)}"
            return Step("keepalive", True, text, evidence)
        text = f"a connection with wstunnel's keepalive of {duration(every)} ended after {duration(seconds)}: {error}"
        return Step("keepalive", False, text, evidence, _RAISE)

    def _idle_step(self) -> Step:
        at_least, dead = bounds(self._found)
        for each in self._found:
            if not each.lived and is_contradicted(each, self._found):
                text = f"a connection ended after {duration(each.at_most)}, and one that was silent for longer lived"
                self._problems.append(f"{text}: {each.how}")
        evidence: dict[str, Any] = {
            "at_least": at_least,
            "at_most": None if dead is None else round(dead.at_most, 1),
            "how": None if dead is None else dead.how,
            "keepalive": limits.CLIENT_PING_AFTER_SECONDS,
            "silences": [
                {"seconds": each.seconds, "lived": each.lived, "ended": each.ended and round(each.ended, 1)}
                for each in sorted(self._found, key=lambda each: each.seconds)
            ],
            "problems": sorted(set(self._problems)),
        }
        if self._lively_ended is not None:
            text = f"a connection that was not silent ended, too, so nothing is known of silence: {self._lively_ended}"
            return Step("idle", False, text, evidence, "look at the server's log and this machine's network; try again")
        if not self._found:
            problem = f": {self._problems[0]}" if self._problems else ""
            return Step("idle", False, f"nothing could be measured{problem}", evidence, "try again, with another time")
        if dead is None:
            return self._no_limit(at_least, evidence)
        enough = at_least > limits.CLIENT_PING_AFTER_SECONDS
        if dead.ended is not None:
            when = f"after {duration(dead.ended)}"
        elif at_least:
            when = f"after between {duration(at_least)} and {duration(dead.seconds)}"
        else:
            when = f"after less than {duration(dead.seconds)}"
        text = (
            f"the path closes a silent connection {when} ({dead.how}); wstunnel's keepalive of "
            f"{duration(limits.CLIENT_PING_AFTER_SECONDS)} is {'enough' if enough else 'not enough'}"
        )
        return Step("idle", enough, text, evidence, None if enough else _RAISE)

    def _no_limit(self, at_least: float, evidence: dict[str, Any]) -> Step:
        text = f"silent connections lived for {duration(at_least)}: the path has no idle timeout up to there"
        if at_least < self._longest:
            why = "not all of them could be made and left silent"
            if not self._complete:
                why = "it was interrupted"
            elif self._granted <= self._longest:
                why = "the server pings by itself after that"
            return Step("idle", True, f"{text}; longer silences could not be measured, since {why}", evidence)
        return Step("idle", True, text, evidence)


_RAISE = (
    f"raise the idle timeout of the proxy, load balancer or NAT on the way above {limits.PING_AFTER_SECONDS:.0f} s "
    "(nginx: proxy_read_timeout; HAProxy: timeout client, server and tunnel). Until then streams go on over new "
    "connections and lose no byte, but wait for each of them"
)
