"""The suite itself."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent


@pytest.mark.parametrize(
    ("marker", "directory"), [("programs", "integration"), ("chaos", "chaos"), ("conformance", "conformance")]
)
def test_slow_tests_are_where_ci_looks_for_them(marker: str, directory: str) -> None:
    """It collects those of a marker from one directory: a test elsewhere would never run."""
    marked = [path for path in ROOT.rglob("*.py") if f"mark.{marker}" in path.read_text(encoding="utf-8")]
    assert marked
    assert [path for path in marked if not path.is_relative_to(ROOT / directory)] == []
