"""descriptors.py: the soft limit goes up to the hard one."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from wstunnel.descriptors import raise_limit


@pytest.fixture
def limit() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_is_raised_to_the_hard_one(limit: tuple[int, int]) -> None:
    _soft, hard = limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_it_may_be_there_already(limit: tuple[int, int]) -> None:
    _soft, hard = limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


@pytest.mark.parametrize("error", [ValueError("not allowed"), OSError(1, "not permitted")])
def test_a_system_that_refuses_is_left_as_it_is(
    limit: tuple[int, int], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit
