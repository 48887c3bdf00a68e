"""outages.py: one line when streams lose their links, one when it is over, and true counts."""

from __future__ import annotations

import pytest

from wstunnel.outages import CALM_SECONDS, Outages

NOW = 1000.0


def calm(outages: Outages, now: float) -> str | None:
    """The last stream stopped waiting at `now`, and nothing happens for as long as it takes to believe it."""
    assert outages.report(0, now) is None
    assert outages.report(0, now + CALM_SECONDS - 0.01) is None
    return outages.report(0, now + CALM_SECONDS)


def begun(streams: int) -> Outages:
    outages = Outages()
    for _ in range(streams):
        outages.cut(NOW)
    return outages


def test_nothing_to_say() -> None:
    outages = Outages()
    assert outages.over
    assert outages.report(0, NOW) is None
    assert (outages.cuts, outages.resumptions, outages.replayed) == (0, 0, 0)


@pytest.mark.parametrize(
    ("streams", "line"), [(1, "1 stream lost its link, resuming"), (3, "3 streams lost their link, resuming")]
)
def test_said_once_when_it_begins(streams: int, line: str) -> None:
    outages = begun(streams)
    assert not outages.over
    assert outages.report(streams, NOW) == line
    assert outages.report(streams, NOW + 1) is None
    outages.cut(NOW + 2)
    assert outages.report(streams + 1, NOW + 2) is None
    assert not outages.over


@pytest.mark.parametrize(
    ("streams", "line"),
    [(1, "1 stream resumed after 4.2 s, 0 bytes lost"), (2, "2 streams resumed after 4.2 s, 0 bytes lost")],
)
def test_said_once_when_it_is_over(streams: int, line: str) -> None:
    outages = begun(streams)
    outages.report(streams, NOW)
    for number in range(streams):
        outages.resumed(str(number), 100)
        outages.resumed(str(number), 100)  # cut once more meanwhile: still one stream
    assert calm(outages, NOW + 4.21) == line
    assert outages.over
    assert outages.report(0, NOW + 5) is None


def test_over_before_the_beginning_was_said() -> None:
    outages = begun(1)
    outages.resumed("2", 0)
    assert calm(outages, NOW + 0.04) == "1 stream resumed after 0.0 s, 0 bytes lost"


def test_not_over_while_one_is_left() -> None:
    outages = begun(2)
    outages.report(2, NOW)
    outages.resumed("3", 0)
    assert outages.report(1, NOW + 1) is None
    outages.resumed("4", 0)
    assert calm(outages, NOW + 2) == "2 streams resumed after 2.0 s, 0 bytes lost"


@pytest.mark.parametrize(
    ("lost", "line"),
    [
        (1, "1 stream could not be resumed and was reset"),
        (2, "2 streams could not be resumed and were reset"),
    ],
)
def test_those_that_were_given_up(lost: int, line: str) -> None:
    outages = begun(lost + 1)
    outages.resumed("5", 0)
    for _ in range(lost):
        outages.lost()
    assert calm(outages, NOW + 300) == f"1 stream resumed after 300.0 s, 0 bytes lost; {line}"
    for _ in range(lost):
        outages.cut(NOW + 400)
        outages.lost()
    assert calm(outages, NOW + 700) == line


def test_ended_otherwise_there_is_nothing_to_say() -> None:
    """The peer's reset, or `finished`: neither resumed nor lost."""
    outages = begun(1)
    assert calm(outages, NOW + 1) is None
    assert outages.over


def test_a_second_one_is_counted_from_its_own_beginning() -> None:
    outages = begun(3)
    for _ in range(3):
        outages.resumed("6", 10)
    calm(outages, NOW + 1)
    outages.cut(NOW + 100)
    assert outages.report(1, NOW + 100) == "1 stream lost its link, resuming"
    outages.resumed("7", 5)
    assert calm(outages, NOW + 102) == "1 stream resumed after 2.0 s, 0 bytes lost"
    assert (outages.cuts, outages.resumptions, outages.replayed) == (4, 4, 35)


def test_a_stream_that_is_cut_again_in_the_same_outage_does_not_move_its_beginning() -> None:
    outages = begun(1)
    outages.cut(NOW + 5)
    outages.resumed("8", 0)
    assert calm(outages, NOW + 10) == "1 stream resumed after 10.0 s, 0 bytes lost"


def test_a_network_that_flaps_is_one_outage() -> None:
    outages = begun(1)
    assert outages.report(1, NOW) is not None
    for number in range(20):
        outages.resumed("1", 0)
        assert outages.report(0, NOW + number) is None
        outages.cut(NOW + number + 0.5)
        assert outages.report(1, NOW + number + 0.5) is None
    outages.resumed("1", 0)
    assert calm(outages, NOW + 30) == "1 stream resumed after 30.0 s, 0 bytes lost"


def test_the_beginning_is_when_the_link_was_last_heard() -> None:
    outages = Outages()
    outages.cut(NOW)
    outages.cut(NOW - 8)
    outages.resumed("1", 0)
    assert calm(outages, NOW + 0.1) == "1 stream resumed after 8.1 s, 0 bytes lost"


def test_the_end_of_the_session_waits_for_nothing() -> None:
    outages = begun(1)
    outages.lost()
    assert outages.report(0, NOW + 5, final=True) == "1 stream could not be resumed and was reset"
