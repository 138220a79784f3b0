"""What a report of a data set says, on the terminal and in HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from omni_grpo_core.training.data_check import DataReport, TokenCounts


def counted(counts: Mapping[str, int]) -> str:
    """
    >>> counted({"video": 3, "text only": 1}), counted({})
    ('video 3, text only 1', 'none')
    """
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def tokens_line(tokens: TokenCounts) -> str:
    """
    >>> tokens_line(TokenCounts(20, 310.5, 900, (("rows.json:3", 900),), 32_768))
    'at least 20 to 900, median 310; largest rows.json:3; the model takes 32768'
    """
    return (
        f"at least {tokens.least} to {tokens.most}, median {tokens.median:.0f}; largest "
        f"{tokens.longest[0][0].rpartition('/')[2]}; the model takes {tokens.limit}"
    )


def finding_counts(report: DataReport) -> str:
    """The kinds of findings, most first."""
    counts = Counter(one.kind for one in report.findings)
    return counted(dict(counts.most_common()))


def verdict_line(report: DataReport) -> str:
    """One line: whether a run can use all rows."""
    noun = "row" if report.rows == 1 else "rows"
    if report.ok:
        return f"✓ all {report.rows} {noun} can be used"
    bad = len({one.origin for one in report.findings})
    return f"✗ {bad} of {report.rows} {noun} cannot be used as they are: {finding_counts(report)}"
