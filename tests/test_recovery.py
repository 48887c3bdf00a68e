"""Which stream goes on next, and when."""

from __future__ import annotations

import math
from typing import Any

import pytest

from wstunnel import limits
from wstunnel.recovery import AT_ONCE_SECONDS, FRUITLESS_FREE, FRUITLESS_SECONDS, Recovery


class FakeStream:
    """As much of a stream as is looked at."""

    def __init__(self) -> None:
        self.proof_after = -math.inf
        self.done = 0
        self.state = self

    def progress(self) -> int:
        return self.done


def streams(count: int) -> list[Any]:
    return [FakeStream() for _ in range(count)]


def test_first_come_first_served() -> None:
    recovery = Recovery()
    one, two = streams(2)
    assert (recovery.add(one, 1.0), recovery.add(two, 2.0)) == (1.0, 2.0)
    assert len(recovery) == 2
    assert recovery.next(0.0, 2.0) is one
    assert not recovery.take(one, 2.0)
    assert recovery.next(0.0, 2.0) is two
    recovery.forget(two)
    assert recovery.next(0.0, 2.0) is None
    assert not recovery


def test_a_link_must_have_been_heard_since_the_last_one_fell_silent() -> None:
    recovery = Recovery()
    silent, other = streams(2)
    silent.proof_after = 10.0
    recovery.add(silent, 18.0)
    assert recovery.next(10.0, 18.0) is None
    assert recovery.next(10.1, 18.0) is silent
    recovery.add(other, 18.0)
    assert recovery.next(10.0, 18.0) is other, "one that may not go does not hold up the next"


def test_a_stream_that_gets_nowhere_waits_longer_and_longer() -> None:
    recovery = Recovery()
    (stream,) = streams(1)
    now, waits = 0.0, []
    for _ in range(FRUITLESS_FREE + 9):
        not_before = recovery.add(stream, now)
        waits.append(not_before - now)
        if not_before > now:
            assert recovery.next(now, not_before - 0.001) is None
        assert recovery.next(now, not_before) is stream
        now = not_before
        recovery.take(stream, now)  # and lost again at once
    doubling = [min(FRUITLESS_SECONDS * 2**n, limits.BACKOFF_MAX_SECONDS) for n in range(9)]
    assert waits == pytest.approx([0.0] * FRUITLESS_FREE + doubling)
    assert waits[-1] == pytest.approx(limits.BACKOFF_MAX_SECONDS)


def test_progress_or_a_link_that_lasted_starts_over() -> None:
    for progress, lasted in ((1, 0.0), (0, AT_ONCE_SECONDS)):
        recovery = Recovery()
        (stream,) = streams(1)
        for _ in range(FRUITLESS_FREE):
            recovery.add(stream, 0.0)
            recovery.take(stream, 0.0)
        stream.done += progress
        assert recovery.add(stream, lasted) == lasted


def test_afresh_is_told_once() -> None:
    recovery = Recovery()
    (stream,) = streams(1)
    recovery.add(stream, 0.0)
    recovery.take(stream, 0.0)
    recovery.add_afresh(stream)
    assert len(recovery) == 1
    assert recovery.take(stream, 0.0)
    recovery.add(stream, 1.0)
    assert not recovery.take(stream, 1.0), "it was opened; from then on it is resumed like any other"


def test_what_ended_is_forgotten_whole() -> None:
    recovery = Recovery()
    (stream,) = streams(1)
    for _ in range(FRUITLESS_FREE + 1):
        recovery.add(stream, 0.0)
    recovery.forget(stream)
    recovery.forget(stream)
    assert recovery.add(stream, 0.0) == 0.0
