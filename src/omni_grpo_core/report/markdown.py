"""A golden check as Markdown, for a pull request comment or a job summary.

Text from models and data goes into code spans, where GitHub's Markdown interprets no markup, HTML,
links or mentions.
"""

from __future__ import annotations

import re
from pathlib import Path

from omni_grpo_core.golden.commands import advice, new_cases
from omni_grpo_core.golden.results import FINE, CaseResult, GoldenReport
from omni_grpo_core.report import shortened, visible

_MOST_CASES = 60
"""Table rows, divergent cases first: a comment holds at most 65,536 characters."""
_LONGEST = 300


def golden_markdown(report: GoldenReport) -> str:
    """Verdict and first divergent stage, overall and per case, and what to do.

    At most 60 cases are shown, divergent ones first; those that only lack goldens share a line.
    """
    diverged = [case for case in report.cases if case.verdict not in (*FINE, "new")]
    fine = [case for case in report.cases if case.verdict in FINE]
    shown = [*diverged, *fine][:_MOST_CASES]
    first = f"First divergent stage: {code(report.first)}. " if report.first else ""
    mark = "✅" if report.verdict in FINE else "❌"
    lines = [
        f"### {mark} Goldens for {code(report.platform)}: {report.verdict}",
        "",
        f"{first}{len(fine)} of {len(report.cases)} cases match.",
    ]
    if report.new:
        lines += ["", f"New: {new_cases(report, code)}."]
    if shown:
        head = "| case | verdict | first divergent stage | what differs |"
        lines += ["", head, "|---|---|---|---|", *map(_row, shown)]
    hidden = len(diverged) + len(fine) - len(shown)
    if hidden:
        lines += ["", f"{hidden} more cases not shown."]
    versions = {key: pair for case in report.cases for key, pair in case.versions.items()}
    if versions:
        lines += ["", "Changed since the goldens were recorded:", ""]
        lines += [
            f"- {code(key)}: {code(was)} → {code(now)}" for key, (was, now) in versions.items()
        ]
    if diverged:
        lines += ["", f"What to do: {advice(diverged[0], Path(report.folder), report.options)}."]
    return "\n".join([*lines, ""])


def _row(case: CaseResult) -> str:
    what = "" if case.verdict == "exact" else code(case.reason)
    return f"| {code(case.case)} | {case.verdict} | {code(case.first or '')} | {what} |"


def code(text: str) -> str:
    """``text`` as a code span that is safe in a table cell: on one line, without the bar that would
    end the cell.

    >>> print(code("a|b"), code("`x`"))
    `a│b` `` `x` ``
    """
    shown = shortened(visible(text), _LONGEST).replace("|", "│")
    shown = re.sub(r"\s*\n\s*", " ⏎ ", shown).strip()
    if not shown:
        return ""
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
