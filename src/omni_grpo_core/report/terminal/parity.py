"""A comparison of two input paths on the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from omni_grpo_core.parity.results import ParityReport, RowResult, smallest
from omni_grpo_core.report import shortened, visible
from omni_grpo_core.report.parity_words import RIGHT, VERDICT, versions_line

_LONGEST = 300


def print_parity(console: Console, report: ParityReport) -> None:
    """A line per row; each cause with its smallest row; the verdict last, where it is read."""
    console.print(_rows(report))
    for name, rows in report.causes():
        _cause(console, report, name, rows)
    console.print(_verdict(report))


def _rows(report: ParityReport) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("row", "", "first", "why"):
        table.add_column(column)
    for row in report.rows:
        fine = row.verdict in ("equal", "within")
        names = ", ".join(dict.fromkeys(cause.name for cause in row.causes))
        table.add_row(
            Text(visible(row.sample_id)),
            Text(VERDICT[row.verdict], style="green" if fine else "red"),
            row.stage,
            Text(names or ("" if fine else "unexplained")),
        )
    return table


def _cause(console: Console, report: ParityReport, name: str, rows: list[RowResult]) -> None:
    row = smallest(rows)
    number = f"{len(rows)} row" + "s" * (len(rows) != 1)
    lines = [Text(f"{name}: {number}, smallest {visible(row.sample_id)}", style="bold")]
    sentences = [cause.sentence for cause in row.causes if cause.name == name] or [row.sentence]
    lines += [Text(f"  {shortened(visible(s), _LONGEST)}") for s in sentences]
    if row.token is not None:
        token = row.token
        lines.append(Text(f"  first at token {token.index}"))
        for path, text, media in (
            (report.a, token.a, row.a_media),
            (report.b, token.b, row.b_media),
        ):
            lines.append(Text(f"    {visible(path)}: {shortened(visible(text), 80)} ({media})"))
    if row.right:
        lines.append(Text(f"  right: {RIGHT[row.right].format(a=report.a, b=report.b)}; {row.why}"))
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    console.print()


def _verdict(report: ParityReport) -> Panel:
    fine = sum(row.verdict in ("equal", "within") for row in report.rows)
    text = Text(f"{fine} of {len(report.rows)} rows alike, ids in {report.same_ids}")
    first = report.first
    if first is not None:
        text.append(f"\nfirst: {visible(first.sample_id)}, stage {first.stage}: ")
        text.append(shortened(visible(first.sentence), _LONGEST))
    text.append(f"\n{versions_line(report)}", style="dim")
    colour = "green" if report.equal else "red"
    mark = "✓" if report.equal else "✗"
    title = Text(f"{mark} {report.a} and {report.b}", style=f"bold {colour}")
    return Panel(text, title=title, title_align="left", border_style=colour)
