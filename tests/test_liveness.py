"""Liveness as timelines: what happens when, and what is decided when."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wstunnel import limits, liveness
from wstunnel.liveness import Liveness, Sleep, Verdict

PING, STALLED, DEAD = "PING", "STALLED", "DEAD"
START = 1000.0
EMPTY = 0


@dataclass
class Link:
    """A link whose owner does all that it must: checks at `due`, and reports events. Times count from START.

    Attributes:
        events: (seconds, what), with what one of received, sent, pinged, woke.
        queue: bytes in the send queue at a given time.
        taken_after: seconds from a verdict that asks for a ping until the kernel takes it; None for never.
        checks_late: seconds by which a check comes after `due`, by the number of the check.
    """

    events: Sequence[tuple[float, str]] = ()
    queue: Callable[[float], int | None] = lambda _: EMPTY
    taken_after: float | None = 0.0
    round_trip: float = 0.05
    checks_late: Callable[[int], float] = lambda _: 0.0
    gaps: list[float] = field(default_factory=list)  # seconds between two events or checks, a check being the second

    def run(self, until: float = 100.0) -> list[tuple[float, str]]:
        """Every verdict but FINE, and when."""
        link, now, count = Liveness(START), START, 0
        verdicts: list[tuple[float, str]] = []
        self.gaps.clear()
        events = sorted((START + seconds, number, what) for number, (seconds, what) in enumerate(self.events))
        while now <= START + until:
            due = link.due(self.round_trip)
            check = max(now, due + self.checks_late(count))
            if events and events[0][0] <= check:
                now, _, what = events.pop(0)
                getattr(link, what)(now)
                continue
            if check > START + until:
                break
            self.gaps.append(check - now)
            now, count = check, count + 1
            verdict = link.check(now, self.round_trip, self.queue(now - START), now - due)
            if verdict is Verdict.FINE:
                assert link.due(self.round_trip) > now, "the owner would check for ever"
                continue
            verdicts.append((round(now - START, 6), verdict.name))
            if verdict is Verdict.DEAD:
                break
            if self.taken_after is not None:
                events = sorted([*events, (now + self.taken_after, -count, "pinged")])
        return verdicts


def falls_until(end: float) -> Callable[[float], int]:
    """100 kbit/s out of a full buffer until `end`; then it stands still."""
    return lambda seconds: int(1_000_000 - 12_500 * min(seconds, end))


def every(period: float, what: str, start: float, end: float) -> list[tuple[float, str]]:
    return [(start + period * number, what) for number in range(int((end - start) / period))]


TIMELINES = {
    "idle": (Link(), [(15, PING), (25, DEAD)]),
    "idle, the peer answers": (
        Link([(15.1, "received"), (30.2, "received")]),
        [(15, PING), (30, PING), (45, PING), (55, DEAD)],  # at whole ticks of 0.25 s, early rather than late
    ),
    "any byte answers, also the last moment": (Link([(24.9, "received")]), [(15, PING), (39.75, PING), (49.75, DEAD)]),
    "data in a black hole": (Link([(0, "sent")]), [(3, STALLED), (8, DEAD)]),
    "the first of the data counts": (
        Link([(0.5, "sent"), (1, "sent"), (2.9, "sent"), (3, "sent")]),
        [(3.5, STALLED), (8.5, DEAD)],
    ),
    "a byte answers all data": (
        Link([(0, "sent"), (2, "received"), (2.5, "sent")]),
        [(5.5, STALLED), (10.5, DEAD)],
    ),
    "data before the last byte is not awaited": (Link([(0, "sent"), (2, "received")]), [(17, PING), (27, DEAD)]),
    "answered after STALLED": (
        Link([(0, "sent"), (7.9, "received"), (8, "sent")]),
        [(3, STALLED), (11, STALLED), (16, DEAD)],
    ),
    "a long path": (Link([(0, "sent")], round_trip=2.0), [(8, STALLED), (13, DEAD)]),
    "data while a ping for silence is out: 5 s are earlier": (
        Link([(16, "sent")]),
        [(15, PING), (19, STALLED), (24, DEAD)],
    ),
    "data while a ping for silence is out: its own deadline is earlier": (
        Link([(18, "sent")]),
        [(15, PING), (21, STALLED), (25, DEAD)],
    ),
    "data too late to matter": (Link([(23, "sent")]), [(15, PING), (25, DEAD)]),
    "a ping that is taken late": (Link(taken_after=4), [(15, PING), (29, DEAD)]),
    "a ping for progress that is taken late": (Link([(0, "sent")], taken_after=4), [(3, STALLED), (12, DEAD)]),
    "the ping for silence is taken after STALLED": (
        Link([(14, "sent")], taken_after=3),
        [(15, PING), (17, STALLED), (23, DEAD)],
    ),
    "the second ping leaves the clock of the first alone": (
        Link([(16, "sent"), (23, "pinged")]),
        [(15, PING), (19, STALLED), (24, DEAD)],
    ),
    "each ping has a clock of its own": (
        Link([(16, "received")], taken_after=4),
        [(15, PING), (31, PING), (45, DEAD)],
    ),
    "falls before and after the ping is taken": (
        Link(taken_after=0.3, queue=lambda seconds: 9 - (seconds > 15.7) - (seconds > 16.1)),  # one look, at 16.25
        [(15, PING), (26.25, DEAD)],
    ),
    "an old ping that is taken when nothing is outstanding": (
        Link([(16, "received"), (17, "pinged")], taken_after=None, queue=lambda _: 9),
        [(15, PING), (31, PING), (41, DEAD)],
    ),
    "a ping that is never taken, of an empty queue": (
        Link(taken_after=None),
        [(15, PING), (15 + limits.STALLED_SECONDS, DEAD)],
    ),
    "a ping that is never taken, of an unknown queue": (
        Link([(0, "sent")], taken_after=None, queue=lambda _: None),
        [(3, STALLED), (3 + limits.STALLED_SECONDS, DEAD)],
    ),
    "a ping that is never taken, of a queue that stands still": (
        Link(taken_after=None, queue=lambda _: 500_000),
        [(15, PING), (25, DEAD)],
    ),
    "bulk data in a black hole: the kernel is full and takes no ping": (
        Link([(0, "sent")], taken_after=None, queue=lambda _: 4_000_000),
        [(3, STALLED), (8, DEAD)],
    ),
    "the kernel is full later": (
        Link([(0, "sent")], taken_after=None, queue=lambda seconds: 0 if seconds < 9.5 else 700),
        [(3, STALLED), (15, DEAD)],
    ),
    "the same after PING": (
        Link([(16, "sent")], taken_after=None, queue=lambda _: 4_000_000),
        [(15, PING), (19, STALLED), (24, DEAD)],
    ),
    "a queue that falls without the ping": (
        Link([(0, "sent")], taken_after=None, queue=falls_until(20)),
        [(3, STALLED), (25, DEAD)],
    ),
    "a queue that falls stops the clock of a ping": (
        Link([(0, "sent")], queue=falls_until(20)),
        [(3, STALLED), (25, DEAD)],
    ),
    "the clock of a ping goes on where it stopped": (
        Link([(0, "sent")], queue=lambda seconds: int(max(0, seconds - 5) % 10)),  # falls at 15 s alone, and at 25 s
        [(3, STALLED), (8, DEAD)],
    ),
    "one fall costs one look": (
        Link(queue=lambda seconds: 9 if seconds < 17.5 else 8),
        [(15, PING), (26, DEAD)],
    ),
    "a queue that rises does not stop it": (Link(queue=lambda seconds: int(seconds * 100)), [(15, PING), (25, DEAD)]),
    "late where it would be dead": (
        Link(checks_late=lambda count: 1.1 if count == 10 else 0.0),  # the checks: 15, 16, ... 24, 26.1
        [(15, PING), (26.1, PING), (36.1, DEAD)],
    ),
    "late, not by much": (
        Link(checks_late=lambda count: 0.9 if count == 10 else 0.0),
        [(15, PING), (25.9, DEAD)],
    ),
    "late for the ping only": (Link(checks_late=lambda count: 0.0 if count else 5.0), [(20, PING), (30, DEAD)]),
    "late where it would be dead of missing progress": (
        Link([(0, "sent")], checks_late=lambda count: 20.0 if count == 2 else 0.0),
        [(3, STALLED), (25, PING), (30, DEAD)],
    ),
    "late without a ping that was taken": (
        Link(taken_after=None, queue=lambda _: 9, checks_late=lambda count: 60.0 if count == 1 else 0.0),
        [(15, PING), (76, PING), (86, DEAD)],
    ),
    "woke while idle": (Link([(7, "woke")]), [(7, PING), (17, DEAD)]),
    "woke, and old bytes were in the kernel": (Link([(7, "woke"), (7, "received")]), [(7, PING), (17, DEAD)]),
    "woke while a ping was out": (Link([(24, "woke")]), [(15, PING), (24, PING), (34, DEAD)]),
    "woke with data on its way": (
        Link([(1, "sent"), (2, "woke")]),
        [(2, PING), (5, STALLED), (10, DEAD)],
    ),
    "woke after STALLED": (
        Link([(1, "sent"), (8.5, "woke")]),
        [(4, STALLED), (8.5, PING), (11.5, STALLED), (16.5, DEAD)],
    ),
}


@pytest.mark.parametrize("name", TIMELINES)
def test_timeline(name: str) -> None:
    link, expected = TIMELINES[name]
    assert link.run() == expected


def test_the_client_asks_while_the_server_still_waits() -> None:
    """With a round trip of a second, which only puts off what the server would ask: it never does."""
    client = Liveness(START, limits.CLIENT_PING_AFTER_SECONDS)
    server = Liveness(START + 1.0)
    now = START + 1.0
    for _ in range(20):
        now = client.due(0.0)
        assert client.check(now, 0.0, EMPTY, 0.0) is Verdict.PING
        client.pinged(now)
        assert server.due(0.0) > now + 0.5
        server.received(now + 0.5)
        client.received(now + 1.0)


@given(st.floats(0.0, 1e6), st.sampled_from([limits.PING_AFTER_SECONDS, limits.CLIENT_PING_AFTER_SECONDS]))
def test_silence_is_asked_about_at_a_whole_tick_and_never_late(heard: float, ping_after: float) -> None:
    link = Liveness(heard, ping_after)
    due = link.due(0.0)
    assert due % liveness.TICK_SECONDS == 0
    assert heard + ping_after - liveness.TICK_SECONDS < due <= heard + ping_after
    assert link.check(due - 0.001, 0.0, EMPTY, 0.0) is Verdict.FINE
    assert link.check(due, 0.0, EMPTY, 0.0) is Verdict.PING
    assert due + limits.PONG_WITHIN_SECONDS <= heard + 25


def test_links_that_fell_silent_within_a_tick_are_asked_at_the_same_time() -> None:
    assert len({Liveness(START + number / 1000).due(0.0) for number in range(250)}) == 1


def test_quiet_until_something_is_awaited() -> None:
    link = Liveness(START)
    assert link.quiet
    link.sent(START + 1)
    assert not link.quiet
    link.received(START + 2)
    assert link.quiet
    assert link.check(START + 17, 0.0, EMPTY, 0.0) is Verdict.PING
    assert not link.quiet


def test_a_slow_link_with_full_buffers_lives() -> None:
    """100 kbit/s: the ping waits behind a megabyte for 80 s, then it is answered."""
    link = Link([(0, "sent"), (79.5, "received")], queue=falls_until(79), taken_after=6)
    assert link.run(until=90) == [(3, STALLED)]


def test_while_a_ping_is_outstanding_the_queue_is_looked_at_each_second() -> None:
    link = Link(queue=falls_until(50))
    link.run()
    assert link.gaps[0] == 15
    assert max(link.gaps[1:]) <= 1
    assert len(link.gaps) < 60


def test_an_idle_link_costs_one_check_in_15_seconds() -> None:
    link = Link([*every(1.0, "received", 0, 58.0)])
    assert link.run(60) == []
    assert link.gaps == []


def test_received_only_puts_off_what_is_due() -> None:
    link = Liveness(START)
    assert link.due(0.0) == START + 15
    link.received(START + 1)
    assert link.due(0.0) == START + 16
    link.sent(START + 2)
    assert link.due(0.0) == START + 5
    assert link.due(1.0) == START + 6
    link.received(START + 3)
    assert link.due(0.0) == START + 18


def test_after_a_sleep_a_check_is_due_at_once() -> None:
    link = Liveness(START)
    link.sent(START + 1)
    link.woke(START + 2)
    assert link.due(0.0) == START + 2
    assert link.check(START + 2, 0.0, EMPTY, 0.0) is Verdict.PING
    assert link.due(0.0) == START + 3


def test_a_link_is_small() -> None:
    assert not hasattr(Liveness(START), "__dict__")


seconds_small = st.floats(0.0, 2.9)
moves = st.lists(
    st.tuples(seconds_small, st.sampled_from(["received", "sent", "pinged", "woke", "check", "late"])), max_size=60
)


@given(moves, st.lists(st.none() | st.integers(0, 3), min_size=1), st.floats(0.0, 10.0))
def test_a_link_that_is_heard_every_2_9_seconds_is_never_dead(
    moves: list[tuple[float, str]], queues: list[int | None], round_trip: float
) -> None:
    """At whatever moments the checks come, and whatever else is reported."""
    link, now, heard = Liveness(START), START, START
    for number, (wait, what) in enumerate(moves):
        now = min(now + wait, heard + 2.9)
        if what == "received" or now == heard + 2.9:
            heard = now
            link.received(now)
        elif what in ("check", "late"):
            late = 0.0 if what == "check" else 5.0
            verdict = link.check(now, round_trip, queues[number % len(queues)], late)
            assert verdict in (Verdict.FINE, Verdict.PING), (verdict, now - START)
        else:
            getattr(link, what)(now)


@given(
    sent=st.none() | st.floats(0.0, 14.0),
    more=st.lists(st.floats(0.0, 30.0), max_size=5),
    queue=st.integers(1, 10_000_000),
    grows=st.integers(0, 1000),
    taken_after=st.none() | st.just(0.0),
    round_trip=st.floats(0.0, 0.7),
    late=st.lists(st.floats(0.0, 0.2), min_size=1),
)
@example(sent=0.0, more=[], queue=1, grows=0, taken_after=None, round_trip=0.7, late=[0.0])
@example(sent=None, more=[], queue=1, grows=0, taken_after=None, round_trip=0.7, late=[0.2])
def test_a_link_that_is_not_heard_is_dead_in_time(
    *,
    sent: float | None,
    more: list[float],
    queue: int,
    grows: int,
    taken_after: float | None,
    round_trip: float,
    late: list[float],
) -> None:
    """Whether or not the kernel takes the ping; the queue never falls."""
    events = [] if sent is None else [(sent, "sent"), *((sent + wait, "sent") for wait in more)]
    link = Link(
        events,
        queue=lambda seconds: queue + int(grows * seconds),
        taken_after=taken_after,
        round_trip=round_trip,
        checks_late=lambda count: late[count % len(late)],
    )
    verdicts = link.run()
    when, last = verdicts[-1]
    assert last == DEAD
    limit = 25 if sent is None else min(25, sent + 8)
    assert limit - 1e-5 <= when <= limit + 1, "neither late nor before its time"
    assert [name for _, name in verdicts].count(STALLED) <= 1
    assert [name for _, name in verdicts].count(PING) <= 1


class TestSleep:
    @pytest.mark.parametrize(
        ("monotonic", "boottime", "slept"),
        [
            (1.0, 1.0, False),
            (1.3, 1.3, False),
            (5.0, 5.0, False),  # overloaded, perhaps
            (5.1, 5.1, True),  # SIGSTOP
            (600.0, 600.0, True),
            (1.0, 2.0, False),
            (1.0, 2.1, True),  # suspended
            (0.1, 3600.0, True),
            (1.0, 0.0, False),  # no CLOCK_BOOTTIME worth the name
        ],
    )
    def test_table(self, monotonic: float, boottime: float, slept: bool) -> None:
        sleep = Sleep(START, 5 * START)
        assert sleep.slept(START + monotonic, 5 * START + boottime) is slept

    def test_is_told_once(self) -> None:
        sleep = Sleep(START, START)
        assert sleep.slept(START + 10, START + 500)
        assert not sleep.slept(START + 11, START + 501)
        assert sleep.slept(START + 12, START + 900)

    def test_small_differences_do_not_add_up(self) -> None:
        sleep = Sleep(START, START)
        assert not any(sleep.slept(START + number, START + number * 1.5) for number in range(1, 20))


class TestBoottime:
    def test_runs_with_the_monotonic_clock(self) -> None:
        before = time.monotonic()
        first = liveness.boottime()
        second = liveness.boottime()
        assert before <= first <= second, "it counts from the boot, or from later if nothing was suspended"

    def test_is_the_systems(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.platform", "linux")
        monkeypatch.setattr(time, "CLOCK_BOOTTIME", 7, raising=False)
        monkeypatch.setattr(time, "clock_gettime", lambda clock: 1234.5 if clock == 7 else 0.0, raising=False)
        assert liveness.boottime() == 1234.5

    def test_falls_back_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: 77.0)
        with monkeypatch.context() as patch:
            patch.setattr("sys.platform", "win32")
            assert liveness.boottime() == 77.0

        def refuse(_clock: int) -> float:
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(time, "clock_gettime", refuse, raising=False)
        monkeypatch.setattr("sys.platform", "linux")
        assert liveness.boottime() == 77.0
