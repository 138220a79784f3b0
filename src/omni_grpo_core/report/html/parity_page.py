"""A comparison of two input paths as one HTML page, with both sides' tokens as ribbons."""

from __future__ import annotations

from omni_grpo_core.parity.results import ParityReport, RowResult, smallest
from omni_grpo_core.report.html import render
from omni_grpo_core.report.html.golden_page import FOR_A_CASE
from omni_grpo_core.report.parity_words import RIGHT, VERDICT, versions_line

MOST_ROWS = 24
"""Rows shown in full: of each cause the smallest first; every row is in the table."""


def parity_page(report: ParityReport) -> str:
    """The page for ``report``: verdict, every row, every cause, and rows with their ribbons."""
    return render(
        "parity_page.html.j2",
        report=report,
        fine=sum(row.verdict in ("equal", "within") for row in report.rows),
        verdict_words=VERDICT,
        right={key: words.format(a=report.a, b=report.b) for key, words in RIGHT.items()},
        causes=[(name, rows, smallest(rows)) for name, rows in report.causes()],
        shown=_shown(report),
        versions=versions_line(report),
        ribbons=FOR_A_CASE["ribbons"],
        span_changes=FOR_A_CASE["span_changes"],
    )


def _shown(report: ParityReport) -> list[RowResult]:
    ordered = [*(smallest(rows) for _, rows in report.causes()), *report.rows]
    by_id = {row.sample_id: row for row in ordered if row.verdict in ("differs", "failed")}
    return list(by_id.values())[:MOST_ROWS]
