"""The benchmark of datagrams counts what it sends."""

from __future__ import annotations

import pytest

from tests.benchmarks.datagrams import measure


@pytest.mark.parametrize("way", ["direct", "ws"])
def test_what_is_sent_is_counted(way: str) -> None:
    result = measure(way, rate=500, seconds=0.4, size=1420)
    assert result.way == way
    assert result.sent == 200
    assert result.received + result.lost == result.sent
    assert result.received > 100
    assert 0 < result.delay_median <= result.delay_99
