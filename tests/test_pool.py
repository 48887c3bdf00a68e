"""pool.py: how many links to keep, when to dial, how long to wait after a failure."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wstunnel import limits
from wstunnel.pool import IDLE_LINKS_MAX, Backoff, Demand, links_to_dial


def seconds(demand: Demand, *opens: int) -> list[int]:
    """The number wanted after each second with so many opens."""
    wanted = []
    for count in opens:
        for _ in range(count):
            demand.opened()
        demand.second()
        wanted.append(demand.wanted())
    return wanted


class TestDemand:
    def test_the_least_from_the_start(self) -> None:
        assert Demand(12).wanted() == 12
        assert Demand(0).wanted() == 0

    def test_opens_count_when_their_second_is_over(self) -> None:
        demand = Demand(2)
        for _ in range(5):
            demand.opened()
        assert demand.wanted() == 2
        demand.second()
        assert demand.wanted() == 5

    def test_a_peak_fades(self) -> None:
        assert seconds(Demand(2), 40, 0, 0, 1) == [40, 36, 32, 29]

    def test_a_higher_peak_counts_at_once_a_lower_one_does_not(self) -> None:
        assert seconds(Demand(2), 10, 20, 15) == [10, 20, 18]

    def test_each_second_is_counted_alone(self) -> None:
        assert seconds(Demand(1), 10, 10, 10) == [10, 10, 10]

    def test_a_burst_of_60_is_felt_for_a_quarter_of_a_minute(self) -> None:
        wanted = seconds(Demand(limits.IDLE_LINKS), 60, *[0] * 30)
        assert all(number > limits.IDLE_LINKS for number in wanted[:15])
        assert all(number == limits.IDLE_LINKS for number in wanted[16:])

    def test_never_more_than_64_however_many_opens(self) -> None:
        assert seconds(Demand(12), 1000, 0) == [IDLE_LINKS_MAX, IDLE_LINKS_MAX]
        assert IDLE_LINKS_MAX == 64

    def test_what_was_asked_for_explicitly_is_kept(self) -> None:
        assert seconds(Demand(100), 1000) == [100]


class TestLinksToDial:
    @staticmethod
    def dials(*, wanted: int = 0, idle: int = 0, waiting: int = 0, dialling: int = 0, total: int = 0) -> int:
        most = limits.PRINCIPAL_LINKS
        return links_to_dial(wanted=wanted, idle=idle, waiting=waiting, dialling=dialling, total=total, most=most)

    def test_what_is_missing(self) -> None:
        assert self.dials() == 0
        assert self.dials(wanted=3) == 3
        assert self.dials(wanted=3, idle=1, total=1) == 2
        assert self.dials(wanted=3, idle=1, dialling=1, total=1) == 1
        assert self.dials(wanted=3, idle=3, total=3) == 0

    def test_waiting_connections_come_on_top(self) -> None:
        assert self.dials(wanted=3, waiting=2) == 5
        assert self.dials(wanted=3, waiting=2, dialling=3) == 2

    def test_links_that_carry_streams_do_not_count(self) -> None:
        assert self.dials(wanted=3, total=500) == 3

    def test_surplus_dials_nothing(self) -> None:
        assert self.dials(wanted=3, idle=9, total=9) == 0

    def test_no_stampede(self) -> None:
        assert self.dials(wanted=64) == limits.DIALS_AT_ONCE
        assert self.dials(wanted=64, dialling=5) == limits.DIALS_AT_ONCE - 5
        assert self.dials(wanted=64, dialling=limits.DIALS_AT_ONCE) == 0
        assert self.dials(wanted=64, dialling=limits.DIALS_AT_ONCE + 3) == 0

    def test_no_more_than_the_server_allows(self) -> None:
        assert self.dials(wanted=5, total=limits.PRINCIPAL_LINKS) == 0
        assert self.dials(wanted=5, total=limits.PRINCIPAL_LINKS - 2) == 2
        assert self.dials(wanted=5, dialling=1, total=limits.PRINCIPAL_LINKS - 2) == 1
        assert self.dials(wanted=5, total=limits.PRINCIPAL_LINKS + 1) == 0

    def test_no_more_than_there_are_descriptors_for(self) -> None:
        assert links_to_dial(wanted=5, idle=0, waiting=9, dialling=1, total=3, most=6) == 2

    @given(*[st.integers(0, 100)] * 4)
    @settings(derandomize=True, deadline=None)
    def test_dialling_again_and_again_ends_at_what_is_wanted(
        self, wanted: int, idle: int, waiting: int, dialling: int
    ) -> None:
        for _ in range(100):
            idle += dialling
            served = min(idle, waiting)
            idle, waiting = idle - served, waiting - served
            dialling = links_to_dial(wanted=wanted, idle=idle, waiting=waiting, dialling=0, total=idle, most=1000)
            assert 0 <= dialling <= limits.DIALS_AT_ONCE
        assert waiting == 0
        assert dialling == 0
        assert idle >= wanted


class TestBackoff:
    def test_doubles_up_to_the_most(self) -> None:
        backoff = Backoff(lambda: 1.0)
        delays = [backoff.failed() for _ in range(10)]
        assert delays == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0, 15.0])

    def test_starts_over_after_a_success(self) -> None:
        backoff = Backoff(lambda: 1.0)
        backoff.succeeded()
        assert [backoff.failed() for _ in range(3)] == pytest.approx([0.2, 0.4, 0.8])
        backoff.succeeded()
        assert [backoff.failed() for _ in range(2)] == pytest.approx([0.2, 0.4])

    def test_full_jitter(self) -> None:
        """Drawn from 0 to the ceiling, each anew; what was drawn does not shorten the next ceiling."""
        drawn = itertools.cycle([0.0, 0.5, 0.25])
        backoff = Backoff(lambda: next(drawn))
        delays = [backoff.failed() for _ in range(9)]
        assert delays == pytest.approx([0.0, 0.2, 0.2, 0.0, 1.6, 1.6, 0.0, 7.5, 3.75])
