"""wire/credit.py: when to ack, how windows grow, and what the budgets allow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wstunnel.limits import KIB, MIB, WINDOW_FIRST, WINDOW_FLOOR, WINDOW_MAX
from wstunnel.wire.credit import ROUND_TRIP_FLOOR, Budget, ReceiveWindow

NOW = 1000.0  # monotonic seconds, as they are on a machine that has run for a while
ROUND_TRIP = 0.08
PLENTY = 1 << 40
reproducible = settings(derandomize=True, deadline=None)


def budget_at(level: float) -> Budget:
    budget = Budget(1000)
    budget.charge(int(1000 * level))
    return budget


class TestBudget:
    def test_counts_what_is_held(self) -> None:
        budget = Budget(1000)
        assert (budget.held, budget.level(), budget.room()) == (0, 0.0, 875)
        budget.charge(300)
        assert (budget.held, budget.level(), budget.room()) == (300, 0.3, 575)
        budget.charge(-100)
        assert (budget.held, budget.level(), budget.room()) == (200, 0.2, 675)

    def test_the_process_holds_what_its_principals_hold(self) -> None:
        process = Budget(1000)
        first, second = Budget(500, process), Budget(800, process)
        first.charge(100)
        second.charge(200)
        assert process.held == 300
        first.charge(-100)
        assert (first.held, second.held, process.held) == (0, 200, 200)

    def test_the_fuller_one_counts(self) -> None:
        process = Budget(1000)
        first, second = Budget(500, process), Budget(900, process)
        first.charge(100)
        assert (first.level(), first.room()) == (0.2, 338)
        second.charge(700)
        assert (first.level(), first.room()) == (0.8, 75), "an eighth is left for what peers were granted"
        assert (second.level(), second.room()) == (0.8, 75)
        first.charge(250)  # more than there is room for: a receiver always takes what it granted
        assert (first.level(), first.room()) == (1.05, 0)

    @pytest.mark.parametrize(
        ("level", "growing", "admitting", "exhausted"),
        [
            (0.0, True, True, False),
            (0.499, True, True, False),
            (0.5, False, True, False),
            (0.749, False, True, False),
            (0.75, False, False, False),
            (0.999, False, False, False),
            (1.0, False, False, True),
            (1.5, False, False, True),
        ],
    )
    def test_50_75_and_100_percent(self, level: float, growing: bool, admitting: bool, exhausted: bool) -> None:
        alone = budget_at(level)
        under_a_full_process = Budget(PLENTY, budget_at(level))
        for budget in (alone, under_a_full_process):
            assert budget.growing() is growing
            assert budget.admitting() is admitting
            assert budget.exhausted() is exhausted


class TestDue:
    """Acks go out at a quarter of the window last sent. Never one per read."""

    def test_a_quarter_of_the_first_window(self) -> None:
        window = ReceiveWindow()
        assert (window.size, window.limit, window.acked) == (256 * KIB, 256 * KIB, 0)
        assert not window.due(0)
        assert not window.due(64 * KIB - 1)
        assert window.due(64 * KIB)

    def test_counted_from_the_last_ack(self) -> None:
        window = ReceiveWindow()
        assert window.grant(64 * KIB, NOW, ROUND_TRIP, Budget(PLENTY)) == 320 * KIB
        assert window.acked == 64 * KIB
        assert not window.due(64 * KIB)
        assert not window.due(128 * KIB - 1)
        assert window.due(128 * KIB)

    def test_of_the_window_sent_not_of_the_one_wanted(self) -> None:
        """The sender knows only what it was sent: with a larger window in mind it would wait for an ack for ever."""
        window = ReceiveWindow()
        window.size = WINDOW_MAX
        assert window.due(64 * KIB)
        window.grant(64 * KIB, NOW, ROUND_TRIP, Budget(PLENTY))
        assert not window.due(4 * MIB + 64 * KIB - 1)
        assert window.due(4 * MIB + 64 * KIB)

    def test_shrunk_windows_are_still_acked_by_what_was_sent(self) -> None:
        window = ReceiveWindow(1 * MIB)
        full = budget_at(0.9)
        assert window.grant(256 * KIB, NOW, ROUND_TRIP, full) == 1 * MIB  # not less than before
        assert not window.due(256 * KIB + 192 * KIB - 1)
        assert window.due(256 * KIB + 192 * KIB)


def consume(window: ReceiveWindow, size: int, *, seconds: float, start: float, budget: Budget | None = None) -> float:
    """The application takes `size` bytes evenly over `seconds`, acked as soon as due. Returns the time after it."""
    pieces = 64
    consumed = window.acked
    for piece in range(1, pieces + 1):
        reached = consumed + size * piece // pieces
        if window.due(reached):
            window.grant(reached, start + seconds * piece / pieces, ROUND_TRIP, budget or Budget(PLENTY))
    return start + seconds


class TestGrowth:
    """Doubles when a window was consumed within four minimum round trips, from 256 KiB up to 16 MiB."""

    def test_the_first_window_doubles_too(self) -> None:
        """A window, and what came before the first ack, in half a round trip."""
        window = ReceiveWindow()
        consume(window, 3 * WINDOW_FIRST // 2, seconds=ROUND_TRIP / 2, start=NOW)
        assert window.size == 2 * WINDOW_FIRST

    def test_a_burst_after_silence_doubles_too(self) -> None:
        window = ReceiveWindow()
        consume(window, WINDOW_FIRST // 4, seconds=ROUND_TRIP, start=NOW)
        consume(window, 3 * WINDOW_FIRST // 2, seconds=ROUND_TRIP / 2, start=NOW + 60)
        assert window.size == 2 * WINDOW_FIRST

    def test_doubles_up_to_16_mib(self) -> None:
        window = ReceiveWindow()
        now, sizes = NOW, [window.size]
        for _ in range(1000):
            now = consume(window, window.size // 4, seconds=ROUND_TRIP / 4, start=now)
            sizes += [window.size] if window.size != sizes[-1] else []
        assert sizes == [WINDOW_FIRST << power for power in range(7)]
        assert sizes[-1] == WINDOW_MAX == 16 * MIB

    def test_never_by_more_than_double_a_window(self) -> None:
        window = ReceiveWindow()
        for size in range(0, 8 * MIB, 16 * KIB):
            before = window.size
            window.grant(size, NOW, ROUND_TRIP, Budget(PLENTY))
            assert window.size in (before, 2 * before)
            assert window.size <= max(WINDOW_FIRST, 2 * size)

    def test_stays_when_the_application_is_slower(self) -> None:
        window = ReceiveWindow()
        now = NOW
        for _ in range(20):
            now = consume(window, WINDOW_FIRST, seconds=4.5 * ROUND_TRIP, start=now)
        assert window.size == WINDOW_FIRST

    def test_just_within_four_round_trips(self) -> None:
        window = ReceiveWindow()
        now = NOW
        for _ in range(3):
            now = consume(window, WINDOW_FIRST, seconds=3.9 * ROUND_TRIP, start=now)
        assert window.size == 2 * WINDOW_FIRST

    def test_though_each_window_waits_for_what_was_lost(self) -> None:
        """A round trip for the bytes and two for what TCP sends again: with less patience a lossy path never grows."""
        window = ReceiveWindow()
        now = NOW
        for _ in range(20):
            now = consume(window, window.size, seconds=3 * ROUND_TRIP, start=now)
        assert window.size == WINDOW_MAX

    @pytest.mark.parametrize(("seconds", "grown"), [(0.5, True), (0.5 + 2**-10, False)])
    def test_four_round_trips_exactly(self, seconds: float, grown: bool) -> None:
        window = ReceiveWindow()
        window.grant(WINDOW_FIRST, NOW, 0.125, Budget(PLENTY))
        window.grant(2 * WINDOW_FIRST, NOW + seconds, 0.125, Budget(PLENTY))
        assert (window.size > WINDOW_FIRST) is grown

    def test_below_a_turn_of_the_loop_every_round_trip_counts_as_one(self) -> None:
        for round_trip in (0.0, 1e-6, ROUND_TRIP_FLOOR):
            window = ReceiveWindow()
            for step in range(1, 13):  # three windows, each in 4 turns of 1.9 ms
                window.grant(step * 64 * KIB, NOW + step * 0.0019, round_trip, Budget(PLENTY))
            assert window.size == 2 * WINDOW_FIRST

    def test_the_origin_of_the_clock_does_not_matter(self) -> None:
        """0.0 is not the time at which a stream began."""
        sizes = []
        for origin in (0.0, NOW, 1e6):
            window = ReceiveWindow()
            for step in range(1, 5):
                window.grant(step * 64 * KIB, origin + step * 0.03, ROUND_TRIP, Budget(PLENTY))
            sizes.append(window.size)
        assert len(set(sizes)) == 1

    @pytest.mark.parametrize("level", [0.5, 0.7])
    def test_stops_at_half_the_budget(self, level: float) -> None:
        window = ReceiveWindow()
        now = NOW
        for _ in range(5):
            now = consume(window, WINDOW_FIRST, seconds=ROUND_TRIP, start=now, budget=budget_at(level))
        assert window.size == WINDOW_FIRST

    def test_goes_on_when_there_is_room_again(self) -> None:
        window = ReceiveWindow()
        now = NOW
        for level in (0.6, 0.6, 0.4):
            now = consume(window, WINDOW_FIRST, seconds=ROUND_TRIP, start=now, budget=budget_at(level))
        assert window.size == 2 * WINDOW_FIRST

    @pytest.mark.parametrize("level", [0.75, 1.0, 2.0])
    def test_shrinks_when_no_stream_may_open_but_never_below_64_kib(self, level: float) -> None:
        window = ReceiveWindow(1 * MIB)
        sizes = []
        for step in range(1, 8):
            window.grant(step, NOW, ROUND_TRIP, budget_at(level))
            sizes.append(window.size)
        assert sizes == [512 * KIB, 256 * KIB, 128 * KIB, *[64 * KIB] * 4]
        assert WINDOW_FLOOR == 64 * KIB

    def test_the_floor_is_not_passed_from_an_odd_size(self) -> None:
        window = ReceiveWindow(WINDOW_FLOOR + 2)
        window.grant(1, NOW, ROUND_TRIP, budget_at(0.8))
        assert window.size == WINDOW_FLOOR

    def test_a_window_below_the_floor_is_left_alone(self) -> None:
        window = ReceiveWindow(1000)
        window.grant(1, NOW, ROUND_TRIP, budget_at(0.8))
        assert window.size == 1000


class TestLimit:
    steps = st.lists(
        st.tuples(
            st.integers(0, 4 * MIB),  # consumed since
            st.floats(0, 10),  # seconds since
            st.floats(0, 1),  # round trip
            st.floats(0, 1.5),  # budget
        ),
        max_size=60,
    )

    @given(st.sampled_from([64 * KIB, WINDOW_FIRST, WINDOW_MAX]), steps)
    @reproducible
    def test_never_falls(self, size: int, steps: list[tuple[int, float, float, float]]) -> None:
        window = ReceiveWindow(size)
        consumed, now, limit = 0, NOW, window.limit
        for more, seconds, round_trip, level in steps:
            consumed = min(consumed + more, limit)  # a receiver cannot consume what it did not let come
            now += seconds
            granted = window.grant(consumed, now, round_trip, budget_at(level))
            assert granted == window.limit >= limit
            assert granted - consumed >= WINDOW_FLOOR  # never below 64 KiB
            assert granted - consumed <= WINDOW_MAX
            assert WINDOW_FLOOR <= window.size <= WINDOW_MAX
            assert window.acked == consumed
            limit = granted

    @given(st.sampled_from([64 * KIB, WINDOW_FIRST, WINDOW_MAX]), steps)
    @reproducible
    def test_a_sender_at_its_limit_is_always_acked(
        self, size: int, steps: list[tuple[int, float, float, float]]
    ) -> None:
        """Whatever was granted: once all of it was consumed an ack is due, or both ends would wait."""
        window = ReceiveWindow(size)
        now = NOW
        for more, seconds, round_trip, level in steps:
            now += seconds
            assert window.due(window.limit)
            window.grant(min(window.acked + more, window.limit), now, round_trip, budget_at(level))


class TestRestate:
    """A stream that moves to another link says again what it granted."""

    def test_consumed_is_as_good_as_acked(self) -> None:
        window = ReceiveWindow(100)
        assert window.due(60)
        assert window.restate(60) == 160
        assert (window.acked, window.limit, window.size) == (60, 160, 100)
        assert not window.due(60)
        assert window.due(85)

    def test_never_falls(self) -> None:
        window = ReceiveWindow(100)
        window.size = 10
        assert window.restate(5) == 100
        assert window.restate(95) == 105

    def test_another_link_is_another_path_nothing_grows_across_it(self) -> None:
        """The time without a link says nothing of the path: a window that was consumed around it does not count."""
        budget = Budget(1 << 40)
        window = ReceiveWindow(100)
        window.grant(0, 1.0, 1.0, budget)
        window.restate(50)
        window.grant(100, 1.5, 1.0, budget)
        window.grant(150, 1.6, 1.0, budget)
        assert window.size == 100
        window.grant(250, 1.7, 1.0, budget)
        assert window.size == 200
