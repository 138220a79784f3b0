"""A data set on the terminal: what it holds, and the rows that a run could not use."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from omni_grpo_core.report import shortened
from omni_grpo_core.report.data_words import counted, finding_counts, tokens_line, verdict_line
from omni_grpo_core.training.data_check import DataReport

_SHOWN = 20
"""Findings shown; ``--json`` and ``--html`` have more."""


def print_data(console: Console, report: DataReport) -> None:
    """The counts, the token line, the findings, and the verdict last."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
    table.add_row("format", escape(counted(report.formats)))
    table.add_row("problem type", escape(counted(report.problem_types)))
    table.add_row("media", escape(counted(report.media)))
    if report.dialogues:
        table.add_row("turns", f"{report.dialogues} with earlier turns or a system message")
    if report.repeated:
        table.add_row("repeated", f"{len(report.repeated)} rows repeat another")
    if report.tokens:
        table.add_row("prompt tokens", escape(tokens_line(report.tokens)))
    console.print(table)
    for one in report.findings[:_SHOWN]:
        line = f"{one.origin}: found {one.got}, wanted {one.want}; {one.fix}"
        console.print(f"[red]{one.kind}[/] {escape(shortened(line, 400))}", highlight=False,
                      soft_wrap=True)  # fmt: skip
    if len(report.findings) > _SHOWN:
        console.print(f"… and {len(report.findings) - _SHOWN} more: {finding_counts(report)}")
    colour = "green" if report.ok else "red"
    console.print(f"[{colour}]{escape(verdict_line(report))}[/]", highlight=False, soft_wrap=True)
