"""wire/tombstones.py: which ids are remembered, and for how long."""

from __future__ import annotations

from wstunnel.limits import PRINCIPAL_TOMBSTONES, TOMBSTONE_SECONDS
from wstunnel.wire.tombstones import Tombstones


def held(stones: Tombstones, *ids: str) -> list[str]:
    return [stream_id for stream_id in ids if stream_id in stones]


def test_remembers_what_was_added() -> None:
    stones = Tombstones()
    assert len(stones) == 0
    assert "a" not in stones
    stones.add("a", 1.0)
    assert "a" in stones
    assert "b" not in stones
    assert len(stones) == 1


def test_goes_with_the_next_open_on_its_link() -> None:
    stones = Tombstones()
    stones.add("a", 1.0)
    stones.add("b", 1.0)
    stones.forget("a")
    assert held(stones, "a", "b") == ["b"]
    stones.forget("a")
    stones.forget(None)
    assert held(stones, "a", "b") == ["b"]


def test_goes_after_the_resume_window() -> None:
    stones = Tombstones()
    stones.add("a", 1000.0)
    stones.add("b", 1001.0)
    stones.add("c", 1002.0)
    stones.sweep(1000.0 + TOMBSTONE_SECONDS - 0.001)
    assert held(stones, "a", "b", "c") == ["a", "b", "c"]
    stones.sweep(1001.0 + TOMBSTONE_SECONDS)
    assert held(stones, "a", "b", "c") == ["c"]
    stones.sweep(1002.0 + TOMBSTONE_SECONDS)
    assert len(stones) == 0
    stones.sweep(9999.0)


def test_the_window_can_be_set() -> None:
    stones = Tombstones(seconds=10.0)
    stones.add("a", 0.0)
    stones.sweep(9.9)
    assert "a" in stones
    stones.sweep(10.0)
    assert "a" not in stones


def test_added_again_it_lasts_anew() -> None:
    stones = Tombstones(seconds=10.0)
    stones.add("a", 0.0)
    stones.add("b", 1.0)
    stones.add("a", 5.0)
    assert len(stones) == 2
    stones.sweep(11.0)
    assert held(stones, "a", "b") == ["a"]
    stones.sweep(15.0)
    assert len(stones) == 0


def test_bounded_the_oldest_goes() -> None:
    stones = Tombstones(capacity=3)
    for number in range(5):
        stones.add(str(number), float(number))
        assert len(stones) <= 3
    assert held(stones, *"01234") == ["2", "3", "4"]
    stones.add("2", 6.0)  # not a fourth one
    assert held(stones, *"01234") == ["2", "3", "4"]
    stones.add("5", 7.0)
    assert held(stones, *"012345") == ["2", "4", "5"]


def test_bounded_per_principal_unless_told() -> None:
    stones = Tombstones()
    for number in range(PRINCIPAL_TOMBSTONES + 10):
        stones.add(str(number), 0.0)
    assert len(stones) == PRINCIPAL_TOMBSTONES
    assert "9" not in stones
    assert "10" in stones
