"""The trial of an upgrade as one HTML page: a verdict, what moved, and the behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_grpo_core.golden.results import CaseResult, GoldenReport
from omni_grpo_core.golden.upgrade_report import UpgradeReport
from omni_grpo_core.report.html import render
from omni_grpo_core.report.html.golden_page import FOR_A_CASE, MOST_CASES
from omni_grpo_core.report.upgrade_words import (
    behaviour_rows,
    packages_line,
    pins_title,
    review_commands,
    review_groups,
    shipped,
    stage_rows,
    title_of,
)


def upgrade_page(report: UpgradeReport) -> str:
    """The page for ``report``: verdict, pins and goldens to review; then each change's stages and
    the behaviour, for a new checkpoint the behaviour first. Details are folded."""
    changes = [
        (change, title_of(change), stage_rows(change), _golden(change.report))
        for change in report.changes
    ]
    tried = [packages_line(report), f"checkpoint {report.checkpoint}" if report.checkpoint else ""]
    return render(
        "upgrade_page.html.j2",
        **{
            **FOR_A_CASE,
            "report": report,
            "what": ", ".join(filter(None, tried)),
            "changes": changes,
            "behaviour": behaviour_rows(report.before, report.after),
            "review": review_groups(report.review),
            "pins_title": pins_title(report),
            "commands_after": review_commands(report),
            "shipped": shipped(report),
            # a comparison of two runs: there is nothing to accept or to reject
            "commands": _no_commands,
            "open": (),
            "most_cases": MOST_CASES,
        },
    )


def _golden(report: Mapping[str, Any]) -> GoldenReport | None:
    """The check's report; ``None`` if the suite did not run."""
    return GoldenReport.from_json(report) if report["cases"] else None


def _no_commands(case: CaseResult) -> list[str]:
    return []
