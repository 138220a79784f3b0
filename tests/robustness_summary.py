"""Which cases of tests/robustness run by default, and how they ended.

All cases take two minutes of two cores. Every third case of each file runs in the default suite,
all of them with ``-m "slow or not slow"`` and in the slow environment.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

_EVERY = 3
TABLE = Path(__file__).parent / "robustness"


@pytest.hookimpl(tryfirst=True)  # before those marked slow are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[Path] = Counter()
    for item in items:
        if item.path.parent == TABLE and hasattr(item, "callspec"):
            if seen[item.path] % _EVERY:
                item.add_marker(pytest.mark.slow)
            seen[item.path] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    endings = Counter(
        str(value)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "robustness" and report.when == "call"
    )
    if not endings:
        return
    faults = {
        "tracebacks": endings["traceback"] + endings["exit 3"],
        "signals": sum(n for ending, n in endings.items() if ending.startswith("signal")),
        "hangs": endings["hang"],
        "half-written files": endings["half-written"],
    }
    codes = ", ".join(f"{n} {ending}" for ending, n in sorted(endings.items()))
    bad = ", ".join(f"{n} {name}" for name, n in faults.items())
    terminalreporter.write_line(f"robustness: {endings.total()} cases: {codes}; {bad}")
