"""wire/tombstones.py: which ids are remembered, for how long, and what is told of them."""

from __future__ import annotations

from wstunnel.limits import PRINCIPAL_TOMBSTONES
from wstunnel.wire.messages import Gone
from wstunnel.wire.tombstones import FINISHED, UNKNOWN, Crowd, Tombstone, Tombstones

WINDOW = 300.0


def held(stones: Tombstones, *ids: str) -> list[str]:
    return [stream_id for stream_id in ids if stream_id in stones]


def test_remembers_what_was_added() -> None:
    stones = Tombstones(WINDOW)
    assert len(stones) == 0
    assert "a" not in stones
    stones.add("a", FINISHED, 1.0)
    assert "a" in stones
    assert "b" not in stones
    assert len(stones) == 1


def test_tells_the_truth_as_often_as_it_is_asked() -> None:
    stones = Tombstones(WINDOW)
    refused = Tombstone("reset", "refused", "connection refused")
    stones.add("a", FINISHED, 1.0)
    stones.add("b", refused, 1.0)
    stones.add("c", UNKNOWN, 1.0)
    for _ in range(3):
        assert stones.find("a") == FINISHED
        assert stones.find("b") == refused
        assert stones.find("c") == UNKNOWN
        assert stones.find("d") is None
    assert held(stones, *"abcd") == ["a", "b", "c"]


def test_speaks_the_words_of_gone() -> None:
    for stone in (FINISHED, UNKNOWN, Tombstone("stale"), Tombstone("reset", "idle", "why")):
        message = Gone(n=1, outcome=stone.outcome, code=stone.code, message=stone.message)
        assert (message.outcome, message.code, message.message) == stone
    assert (FINISHED.outcome, UNKNOWN.outcome) == ("finished", "unknown")


def test_the_last_word_counts() -> None:
    stones = Tombstones(WINDOW)
    stones.add("a", UNKNOWN, 1.0)
    stones.add("a", Tombstone("reset", "forbidden"), 2.0)
    assert stones.find("a") == Tombstone("reset", "forbidden")
    assert len(stones) == 1


def test_goes_with_the_next_open_on_its_link() -> None:
    stones = Tombstones(WINDOW)
    stones.add("a", FINISHED, 1.0)
    stones.add("b", FINISHED, 1.0)
    stones.forget("a")
    assert held(stones, "a", "b") == ["b"]
    stones.forget("a")
    stones.forget(None)
    assert held(stones, "a", "b") == ["b"]


def test_goes_after_the_resume_window() -> None:
    stones = Tombstones(WINDOW)
    stones.add("a", FINISHED, 1000.0)
    stones.add("b", FINISHED, 1001.0)
    stones.add("c", FINISHED, 1002.0)
    stones.sweep(1000.0 + WINDOW - 0.001)
    assert held(stones, "a", "b", "c") == ["a", "b", "c"]
    stones.sweep(1001.0 + WINDOW)
    assert held(stones, "a", "b", "c") == ["c"]
    stones.sweep(1002.0 + WINDOW)
    assert len(stones) == 0
    stones.sweep(9999.0)


def test_added_again_it_lasts_anew() -> None:
    stones = Tombstones(10.0)
    stones.add("a", FINISHED, 0.0)
    stones.add("b", FINISHED, 1.0)
    stones.add("a", FINISHED, 5.0)
    assert len(stones) == 2
    stones.sweep(11.0)
    assert held(stones, "a", "b") == ["a"]
    stones.sweep(15.0)
    assert len(stones) == 0


def test_bounded_the_oldest_goes() -> None:
    stones = Tombstones(WINDOW, capacity=3)
    for number in range(5):
        stones.add(str(number), FINISHED, float(number))
        assert len(stones) <= 3
    assert held(stones, *"01234") == ["2", "3", "4"]
    stones.add("2", FINISHED, 6.0)  # not a fourth one
    assert held(stones, *"01234") == ["2", "3", "4"]
    stones.add("5", FINISHED, 7.0)
    assert held(stones, *"012345") == ["2", "4", "5"]


def test_bounded_per_principal_unless_told() -> None:
    stones = Tombstones(WINDOW)
    for number in range(PRINCIPAL_TOMBSTONES + 10):
        stones.add(str(number), FINISHED, 0.0)
    assert len(stones) == PRINCIPAL_TOMBSTONES
    assert "9" not in stones
    assert "10" in stones


class TestCrowd:
    """What all principals may have together."""

    def test_counts_those_of_all(self) -> None:
        crowd = Crowd(10)
        one, other = Tombstones(10.0, crowd=crowd), Tombstones(10.0, crowd=crowd)
        one.add("a", FINISHED, 0.0)
        other.add("a", FINISHED, 1.0)
        other.add("b", FINISHED, 2.0)
        assert crowd.count == 3
        other.add("b", FINISHED, 3.0)
        other.forget("a")
        other.forget("a")
        assert crowd.count == 2
        one.sweep(10.0)
        assert (crowd.count, len(one), len(other)) == (1, 0, 1)

    def test_full_everybody_gives_up_their_own_oldest(self) -> None:
        crowd = Crowd(4)
        one, other = Tombstones(WINDOW, crowd=crowd), Tombstones(WINDOW, crowd=crowd)
        for number, stream_id in enumerate("abc"):
            one.add(stream_id, FINISHED, float(number))
        other.add("x", FINISHED, 3.0)
        one.add("d", FINISHED, 4.0)
        other.add("y", FINISHED, 5.0)
        assert held(one, *"abcd") == ["b", "c", "d"]
        assert held(other, *"xy") == ["y"]
        assert crowd.count == 4

    def test_full_of_others_one_still_gets_in(self) -> None:
        """Who has none to give up: one more for each principal is the bound, and no lie about a stream."""
        crowd = Crowd(2)
        one, other = Tombstones(WINDOW, crowd=crowd), Tombstones(WINDOW, crowd=crowd)
        one.add("a", FINISHED, 0.0)
        one.add("b", FINISHED, 0.0)
        other.add("x", FINISHED, 1.0)
        assert held(other, "x") == ["x"]
        other.add("y", FINISHED, 1.0)
        assert held(other, "x", "y") == ["y"]
        assert crowd.count == 3
