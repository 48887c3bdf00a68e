"""Whether the server is away, and what is said of it."""

from __future__ import annotations

from wstunnel import limits
from wstunnel.absence import LOST, SHORT, SHORT_SAID_SECONDS, UNREACHED, WAITING_RETRY_SECONDS, YOUNG_SECONDS, Absence


def absence() -> Absence:
    return Absence(lambda: 0.5)


def test_failures_together_cost_one_step_and_are_one_line() -> None:
    server = absence()
    assert server.failed(10.0) == UNREACHED
    assert (server.away, server.retry_at) == (True, 10.0 + limits.BACKOFF_FIRST_SECONDS / 2)
    assert server.failed(10.0) is None
    assert server.failed(server.retry_at) == "", "the same absence: no second line"
    assert server.retry_at == 10.1 + limits.BACKOFF_FIRST_SECONDS


def test_back_says_so_after_an_absence_only() -> None:
    server = absence()
    assert server.back() == "connected"
    assert server.back() is None
    assert server.failed(0.0) == LOST
    assert server.back() == "connected again"
    server.failed(100.0)
    assert server.retry_at == 100.0 + limits.BACKOFF_FIRST_SECONDS / 2, "the delays start over"


def test_who_still_has_links_has_not_lost_the_server() -> None:
    server = absence()
    assert server.failed(0.0, linked=True) == UNREACHED, "it is not known yet"
    server.ended()
    server.back()
    assert server.failed(100.0, linked=True) == "", "it may be about to lose the others, too"
    assert server.away, "it is tried again with the same pauses"
    assert server.failed(server.retry_at, linked=True) == SHORT
    assert server.failed(server.retry_at, linked=True) == ""
    server.ended()
    assert server.back() is None, "it was there all the time"
    assert server.failed(200.0, linked=True) == "", "it may come and go with every dial"
    assert server.failed(server.retry_at, linked=False) == LOST, "now it is gone"
    assert server.failed(server.retry_at, linked=True) == ""
    server.ended()
    assert server.back() == "connected again"
    assert server.failed(200.0 + SHORT_SAID_SECONDS, linked=True) == ""
    assert server.failed(server.retry_at, linked=True) == SHORT


def test_an_application_that_waits_is_not_kept_for_the_whole_delay() -> None:
    server = Absence(lambda: 0.99)
    for _ in range(12):
        server.failed(server.retry_at if server.away else 0.0)
    now = server.retry_at - limits.BACKOFF_MAX_SECONDS * 0.9
    server.hurry(now)
    assert server.retry_at == now + WAITING_RETRY_SECONDS
    server.hurry(now + 1)
    assert server.retry_at == now + WAITING_RETRY_SECONDS, "it never gets later"


def test_a_young_link_counts_as_a_failed_dial_unless_the_server_was_of_use() -> None:
    server = absence()
    assert not server.died(0.0, YOUNG_SECONDS)
    assert server.settled
    assert server.died(0.0, YOUNG_SECONDS / 2)
    assert not server.settled
    assert server.useful(1.0), "that changes it"
    assert server.settled
    assert not server.useful(1.1)
    assert not server.died(1.0, 1.2), "a stream went on since that link was made"
    assert server.died(1.15, 1.2), "none did since this one was"


def test_a_link_that_lives_settles_it() -> None:
    server = absence()
    server.died(0.0, 0.1)
    assert server.settle()
    assert not server.settle()
