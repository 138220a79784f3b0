"""A data set as one HTML page: what it holds, and the rows that a run could not use."""

from __future__ import annotations

from omni_grpo_core.report import shortened
from omni_grpo_core.report.data_words import tokens_line, verdict_line
from omni_grpo_core.report.html import render
from omni_grpo_core.training.data_check import DataReport

MOST_FINDINGS = 500


def data_page(report: DataReport) -> str:
    """The page for ``report``: verdict, counts, the largest prompts, findings, repeated rows."""
    return render(
        "data_page.html.j2",
        report=report,
        verdict=verdict_line(report),
        tokens="" if report.tokens is None else tokens_line(report.tokens),
        counts=(
            ("Format", report.formats),
            ("Problem type", report.problem_types),
            ("Media", report.media),
        ),
        findings=report.findings[:MOST_FINDINGS],
        repeated=report.repeated[:MOST_FINDINGS],
        short=lambda text: shortened(text, 300),
    )
