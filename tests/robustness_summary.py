"""How the cases of tests/robustness ended, counted at the end of the run."""

from __future__ import annotations

from collections import Counter
from typing import Any


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
