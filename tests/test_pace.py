"""pace.py: frames as large as the connection takes in a quarter of a second."""

from __future__ import annotations

import pytest

from wstunnel.limits import FRAME_BYTES, KIB
from wstunnel.pace import FIRST_BYTES, FLOOR_BYTES, FRAME_SECONDS, Pace

NOW = 1000.0


def slow(pace: Pace, rate: float, seconds: float, *, step: float = 0.05, now: float = NOW) -> float:
    """A full connection that takes `rate` bytes a second, a bit each `step`; returns when it is over."""
    pace.full(now)
    for _ in range(round(seconds / step)):
        now += step
        pace.drained(round(rate * step), now)
    return now


def test_begins_small() -> None:
    assert Pace().frame == FIRST_BYTES == 16 * KIB
    assert FRAME_SECONDS == 0.25


def test_doubles_with_every_full_frame_that_is_taken_at_once() -> None:
    pace = Pace()
    seen = []
    for _ in range(7):
        seen.append(pace.frame)
        pace.took(pace.frame)
    assert seen == [16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 512 * KIB]
    assert pace.frame == FRAME_BYTES


def test_a_frame_with_its_header_counts_as_full() -> None:
    pace = Pace()
    pace.took(FIRST_BYTES + 8)
    assert pace.frame == 2 * FIRST_BYTES


def test_smaller_frames_say_nothing_of_the_path() -> None:
    pace = Pace()
    for size in (1, 100, FIRST_BYTES - 1):
        pace.took(size)
    assert pace.frame == FIRST_BYTES


@pytest.mark.parametrize("rate", [12_500, 125_000, 500_000])
def test_a_frame_lasts_a_quarter_of_a_second_at_the_measured_rate(rate: int) -> None:
    pace = Pace()
    slow(pace, rate, 1.0)
    assert pace.frame / rate == pytest.approx(FRAME_SECONDS, rel=0.01)


def test_never_below_the_floor_nor_above_the_largest() -> None:
    pace = Pace()
    now = slow(pace, 100, 1.0)
    assert pace.frame == FLOOR_BYTES
    slow(pace, 100e6, 1.0, now=now)
    assert pace.frame == FRAME_BYTES


def test_follows_a_path_that_changes() -> None:
    pace = Pace()
    now = slow(pace, 500_000, 1.0)
    now = slow(pace, 20_000, 1.0, now=now)
    assert pace.frame == pytest.approx(5_000, rel=0.01)
    slow(pace, 500_000, 1.0, now=now)
    assert pace.frame == pytest.approx(125_000, rel=0.01)


def test_measures_over_a_quarter_of_a_second_at_least() -> None:
    """What a send buffer takes in one go is no rate."""
    pace = Pace()
    pace.full(NOW)
    pace.drained(1_000_000, NOW + 0.001)
    pace.drained(1_000_000, NOW + 0.2)
    assert pace.frame == FIRST_BYTES
    pace.drained(0, NOW + 0.25)
    assert pace.frame == FRAME_BYTES


def test_full_again_while_it_is_full_does_not_start_anew() -> None:
    pace = Pace()
    pace.full(NOW)
    pace.drained(10_000, NOW + 0.2)
    pace.full(NOW + 0.2)
    pace.drained(10_000, NOW + 0.4)
    assert pace.frame == 12_500


def test_time_with_nothing_to_send_does_not_count() -> None:
    pace = Pace()
    pace.full(NOW)
    pace.drained(50_000, NOW + 0.1)
    pace.idle()
    pace.drained(50_000, NOW + 60)  # nothing is measured
    assert pace.frame == FIRST_BYTES
    slow(pace, 200_000, 0.5, now=NOW + 100)
    assert pace.frame == pytest.approx(50_000, rel=0.01)


def test_grows_again_once_it_is_no_longer_full() -> None:
    pace = Pace()
    slow(pace, 20_000, 1.0)
    pace.idle()
    before = pace.frame
    pace.took(before)
    assert pace.frame == 2 * before
