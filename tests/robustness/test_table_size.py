"""The table of bad input is as large as promised, and its case names are unique."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path

LEAST = 300

FILES = sorted(
    path.stem for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)
)


def test_the_table_is_large_enough_and_names_are_unique() -> None:
    found = 0
    for name in FILES:
        names = Counter(str(case) for case in getattr(import_module(name), "CASES", ()))
        assert [case for case, times in names.items() if times > 1] == [], name
        found += names.total()
    assert found >= LEAST
