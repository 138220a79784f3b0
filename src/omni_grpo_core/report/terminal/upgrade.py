"""The trial of an upgrade on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from omni_grpo_core.golden.bisect import Change
from omni_grpo_core.golden.results import FINE
from omni_grpo_core.golden.upgrade_report import Review, UpgradeReport
from omni_grpo_core.report import shortened, visible
from omni_grpo_core.report.terminal.golden import painted
from omni_grpo_core.report.upgrade_words import (
    StageRow,
    behaviour_rows,
    packages_line,
    pins_title,
    review_commands,
    review_groups,
    shipped,
    stage_rows,
    title_of,
)

_COLOURS = {"safe": "green", "drift": "yellow", "harmful": "red"}
_LONGEST = 160
"""Characters of a stage's reason; the page has all of it."""


def print_upgrade(console: Console, report: UpgradeReport) -> None:
    """The verdict; the stages that moved, then the behaviour, for a new checkpoint the other way
    round; then the goldens to review and the pins."""
    colour = _COLOURS[report.verdict]
    _say(console, f"[bold {colour}]{report.verdict.upper()}[/]: {_text(report.why)}")
    if report.packages:
        _say(console, f"[dim]{_text(packages_line(report))}[/]")
    if report.already:
        _say(console, "Before the upgrade, stored goldens differ already:")
        _print_reviews(console, report.already, also="")
    parts: list[Callable[[], None]] = [
        lambda: _print_changes(console, report),
        lambda: _print_behaviour(console, report),
    ]
    for part in reversed(parts) if report.checkpoint else parts:
        part()
    _print_review(console, report)
    if report.pins:
        _say(console, f"\n{pins_title(report)}:")
        for pin in report.pins:
            _say(console, f"  {_text(pin)}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _text(text: str) -> str:
    return escape(visible(text))


def _print_changes(console: Console, report: UpgradeReport) -> None:
    shown: list[list[StageRow]] = []
    for change in report.changes:
        rows = [row for row in stage_rows(change) if row.verdict not in FINE]
        _print_change(console, change, rows, again=bool(rows) and rows in shown)
        shown.append(rows)
    if len(report.changes) > 1:
        for stage, by in report.moved.items():
            _say(console, f"{stage}: moved by {' and '.join(by)}")


def _print_change(
    console: Console, change: Change, rows: Sequence[StageRow], *, again: bool
) -> None:
    title = f"\n[bold]{title_of(change)}[/]: {painted(change.verdict)}"
    if change.failed:
        _say(console, f"{title}, {_text(change.failed)}")
        return
    first = f", first stage {change.first}" if change.first else ""
    _say(console, f"{title}{first}")
    if again:
        _say(console, "  the same as by one of them alone")
    for row in () if again else rows:
        number = f"{row.cases} case" + "s" * (row.cases != 1)
        origin = "" if row.origin == "none" else f" ({row.origin})"
        _say(console, f"  {row.stage}: {painted(row.verdict)}{origin} in {number}")
        _say(console, f"    {_text(shortened(row.reason, _LONGEST))}")


def _print_behaviour(console: Console, report: UpgradeReport) -> None:
    _say(console, "")
    title = f"Behaviour on {report.before.rows} rows, greedy"
    table = Table("", "before", "after", title=title)
    for row in behaviour_rows(report.before, report.after):
        colour = {"worse": "red", "better": "green", "": "default"}[row.change]
        table.add_row(row.name, row.before, f"[{colour}]{row.after}[/]")
    console.print(table)


def _print_reviews(
    console: Console, found: list[Review], also: str = ", as before the upgrade"
) -> None:
    for group in review_groups(found):
        first = f", first stage {group.first}" if group.first else ""
        already = also if group.already else ""
        cases = _text(", ".join(group.cases))
        _say(console, f"  {painted(group.verdict)}{first}{already}: {cases}")


def _print_review(console: Console, report: UpgradeReport) -> None:
    if not report.review:
        return
    _say(console, "\nGoldens that would need review:")
    _print_reviews(console, report.review)
    if shipped(report):
        _say(console, "They come with omni-grpo-core: its releases bring new ones.")
    for command in review_commands(report):
        _say(console, f"  {_text(command)}")
