"""Whether a link lives: decisions from what was heard, what was sent and what the clock says. No I/O, no clock.

Any byte that was received proves that a link lives. A link that is silent is asked with a `ping`:

    idle       a byte ... 15 s ... PING ............... 10 s ... DEAD      (13 s at the client, so that one end asks)
    data       a byte, data sent ... 3 s ... STALLED ... 5 s ... DEAD

A ping that waits in a long queue is not late, so its clock starts when the kernel took it, and stops while the send
queue falls: then the path works, however slowly. While the kernel does not even take the ping, a queue that stands
still tells the same as an answer that does not come: bulk data fills the queue long before anybody asks.

Whether the process or the whole machine slept is `Sleep`'s to say: no peer is to blame for that time.
"""

from __future__ import annotations

import enum
import math
import sys
import time

from wstunnel import limits

STALL_SECONDS = 3.0
"""Data unanswered for this long: ask. Acks come from a sweep a second; a TCP retransmission or two fits in between."""
STALL_ROUND_TRIPS = 4
"""The same on long paths, where 3 s may be one round trip through full buffers."""
STALL_ANSWER_SECONDS = 5.0
"""To answer the ping for missing progress: with the 3 s, streams are off a black hole in 8. A fresh link that was
dialled for nothing costs little, a stream that is moved for nothing costs a replay; hence the longer part is here."""
LOOK_SECONDS = 1.0
"""How often the send queue is looked at while a ping is unanswered."""
TICK_SECONDS = 0.25
"""Silence is asked about at whole ticks of the clock, so up to this much early: thousands of idle links then wake the
process, and its peer, for many of them at once, which is most of what a `ping` costs."""
LATE_SECONDS = 1.0
"""A check that comes this late says more about this machine than about the peer."""
GAP_SECONDS = 5.0
"""Between two calls of `Sleep.slept`, due each second: so long is no load, but SIGSTOP or a frozen virtual machine."""
SUSPENDED_SECONDS = 1.0
"""How far CLOCK_BOOTTIME must run ahead: more than rounding and clock discipline, less than any suspend worth it."""


class Verdict(enum.Enum):
    """What to do about a link now."""

    FINE = enum.auto()
    PING = enum.auto()
    """Send a `ping`: silence."""
    STALLED = enum.auto()
    """Send a `ping`: data is not answered. And dial a fresh link meanwhile."""
    DEAD = enum.auto()
    """Close it; nothing more is to be expected."""


class Liveness:
    """One link's clocks. The owner reports what happens and calls `check` whenever `due` says.

    All times are monotonic seconds of one clock. `received` and `sent` are called for each event of the data path.

    Args:
        now: the link counts as heard now.
        ping_after: seconds of silence after which PING is due, or up to TICK_SECONDS before.

    Attributes:
        unanswered: when the first thing was `sent` since a byte came; None if nothing was. Then `sent` need not be told
            of more.
    """

    __slots__ = ("_asked", "_heard", "_looked", "_ping_after", "_queue", "_since", "_taken", "_woken", "unanswered")

    def __init__(self, now: float, ping_after: float = limits.PING_AFTER_SECONDS) -> None:
        self._ping_after = ping_after
        self._heard = now  # the last byte
        self.unanswered: float | None = None  # the first `sent` since
        self._asked: Verdict | None = None  # why a ping is outstanding: PING, or STALLED which outlasts it
        self._woken = False
        # While a ping is outstanding:
        self._taken = False  # by the kernel
        self._since = now  # start of the clock that runs now, moved on by the time in which it stood still
        self._looked = now  # at the queue
        self._queue: int | None = None  # what was seen there

    def received(self, now: float) -> None:
        """Some byte came: the link lives, and nothing is awaited any more."""
        self._heard = now
        self.unanswered = None
        self._asked = None

    def sent(self, now: float) -> None:
        """The kernel took something that the peer must react to: stream data, open, resume, eof, reset."""
        if self.unanswered is None:
            self.unanswered = now

    def pinged(self, now: float) -> None:
        """The kernel took the ping that `check` asked for: its clock starts. Does nothing if none is outstanding.

        A second ping leaves the clock of the first alone.
        """
        if not self._taken:
            self._taken = True
            self._since = self._looked = now

    def woke(self, now: float) -> None:
        """The process or the machine slept: all clocks restart, and the next check says PING.

        Even if bytes come before it, since those may have waited in the kernel all the while.
        """
        self._heard = now
        if self.unanswered is not None:
            self.unanswered = now
        self._asked = None
        self._woken = True

    def leave_alone(self, seconds: float) -> None:
        """PING is due only after so long a silence: the peer asked for it. It may come up to TICK_SECONDS early."""
        self._ping_after = seconds

    @property
    def stalled(self) -> bool:
        """Whether data was not answered for long, and nothing came since."""
        return self._asked is Verdict.STALLED

    @property
    def quiet(self) -> bool:
        """Whether nothing is awaited: no answer to data, none to a ping. Then `check` need not know the send queue."""
        return self._asked is None and self.unanswered is None

    def due(self, round_trip: float) -> float:
        """When to call `check` next, if nothing is reported until then. After `woke` that is at once.

        `received` only puts it off, and need not be followed by a new timer; `sent`, `pinged` and `woke` may bring it
        forward.

        Args:
            round_trip: seconds; 0.0 while unknown.
        """
        if self._woken:
            return self._heard
        if self._asked is None:
            due = _tick(self._heard + self._ping_after)
        else:
            due = min(_tick(self._looked + LOOK_SECONDS), self._end())
        return min(due, self._stall(round_trip))

    def check(self, now: float, round_trip: float, unsent: int | None, late: float) -> Verdict:
        """Decide. PING and STALLED ask for a ping, once; `pinged` is to follow when the kernel took it.

        Read what the socket has before a check that may say DEAD: bytes may have come just in time.

        Args:
            now: the time.
            round_trip: seconds; 0.0 while unknown.
            unsent: bytes in the send queue (`sockets.unsent`); None where that cannot be known. 0 will do while the
                link is `quiet`: what may be in it then does not fill it.
            late: seconds since the time that `due` said.
        """
        if self._woken:
            self._woken = False
            return self._ask(Verdict.PING, now, unsent)
        if self._asked is not None:
            self._look(now, unsent)
            if now >= self._end():
                if late <= LATE_SECONDS:
                    return Verdict.DEAD
                self._since = now  # the answer had the time, but perhaps we had not
                return Verdict.PING
        if now >= self._stall(round_trip):
            return self._ask(Verdict.STALLED, now, unsent)
        if self._asked is None and now >= _tick(self._heard + self._ping_after):
            return self._ask(Verdict.PING, now, unsent)
        return Verdict.FINE

    def _ask(self, why: Verdict, now: float, unsent: int | None) -> Verdict:
        if self._asked is None or not self._taken:
            self._taken = False
            self._since = now
        else:  # the ping for silence is out, and its deadline holds if it is the earlier one
            self._since = min(now, self._since + limits.PONG_WITHIN_SECONDS - STALL_ANSWER_SECONDS)
        self._asked = why
        self._looked, self._queue = now, unsent
        return why

    def _stall(self, round_trip: float) -> float:
        """When data has waited too long; infinity if none waits, or if it was asked for already."""
        if self.unanswered is None or self._asked is Verdict.STALLED:
            return math.inf
        return self.unanswered + max(STALL_SECONDS, STALL_ROUND_TRIPS * round_trip)

    def _look(self, now: float, unsent: int | None) -> None:
        """Let the time since the last look not count if the queue fell."""
        fell = unsent is not None and self._queue is not None and unsent < self._queue
        if self._taken:
            if fell:
                self._since += now - self._looked
        elif fell or (unsent and not self._queue):  # one that was empty has not stood still before
            self._since = now
        self._looked, self._queue = now, unsent

    def _end(self) -> float:
        """When the link is dead, unless something changes."""
        if self._taken or self._queue:
            return self._since + (
                STALL_ANSWER_SECONDS if self._asked is Verdict.STALLED else limits.PONG_WITHIN_SECONDS
            )
        # No ping that could be answered, and no queue that could fall: only the bound for all writing is left.
        return self._since + limits.STALLED_SECONDS


def _tick(when: float) -> float:
    """The last whole tick up to `when`."""
    return when // TICK_SECONDS * TICK_SECONDS


class Sleep:
    """Notices that this process or machine slept, from two clocks that are read each second.

    Args:
        monotonic: CLOCK_MONOTONIC, seconds: stands still while the machine is suspended, runs on while the process is
            stopped.
        boottime: CLOCK_BOOTTIME, seconds: always runs. See `boottime`.
    """

    __slots__ = ("_boottime", "_monotonic")

    def __init__(self, monotonic: float, boottime: float) -> None:
        self._monotonic = monotonic
        self._boottime = boottime

    def slept(self, monotonic: float, boottime: float) -> bool:
        """Whether there was a sleep since the last call. To be called about once a second."""
        passed = monotonic - self._monotonic
        suspended = boottime - self._boottime - passed
        self._monotonic, self._boottime = monotonic, boottime
        return passed > GAP_SECONDS or suspended > SUSPENDED_SECONDS


def boottime() -> float:
    """CLOCK_BOOTTIME in seconds; where there is none, time.monotonic(), and suspends are not noticed."""
    if sys.platform == "linux":
        try:
            return time.clock_gettime(time.CLOCK_BOOTTIME)
        except OSError:
            pass  # not every sandbox that plays Linux has it
    return time.monotonic()
