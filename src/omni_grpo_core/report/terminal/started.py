"""A new golden suite on the terminal: which rows and why, what was made of them, what is next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from omni_grpo_core.golden.choice import Choice
from omni_grpo_core.golden.commands import command
from omni_grpo_core.golden.starting import Plan, Started
from omni_grpo_core.report.html.words import passed_line

_LEFT_OUT = 12
"""Kinds named that found no place."""


def print_started(console: Console, plan: Plan, started: Started) -> None:
    """The verdict of ``check``, a line per case, the totals, and the next commands."""
    console.print(f"check: {passed_line(plan.check)}", highlight=False)
    for line in choice_lines(plan.choice):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_cases(started))
    for one in started.degenerate:
        line = f"[red]{one.case.name}: degenerate: {escape(one.degenerate)}[/]"
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_total(started), highlight=False, soft_wrap=True)
    for line in next_lines(started):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def choice_lines(choice: Choice) -> Iterator[str]:
    """What is in the data, and what of it was taken."""
    lengths = ", ".join(
        f"{name} {least}" if least == most else f"{name} {least}–{most}"
        for name, (least, most) in choice.lengths.items()
    )
    noun = "kind" if choice.kinds == 1 else "kinds"
    yield f"{choice.rows} rows of {choice.kinds} {noun}; estimated prompt tokens: {lengths}"
    if choice.left_out:
        named = [kind.words for kind in choice.left_out[:_LEFT_OUT]]
        more = len(choice.left_out) - len(named)
        yield (
            f"{len(choice.taken)} kinds taken, those that cover most; --cases {choice.kinds} takes "
            f"each. Left out: {'; '.join(named)}" + (f"; and {more} more" if more else "")
        )


def _cases(started: Started) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("case", no_wrap=True)
    table.add_column("rows")
    table.add_column("why")
    table.add_column("KB", justify="right")
    for one in started.cases:
        rows = ", ".join(map(str, one.case.rows))
        table.add_row(Text(one.case.name), rows, Text(one.case.why), f"{one.bytes / 1000:.0f}")
    return table


def _total(started: Started) -> str:
    if not started.written:
        return "[red]degenerate completions are not accepted: nothing was written[/]"
    cases = "1 case" if len(started.cases) == 1 else f"{len(started.cases)} cases"
    stages = sum(len(one.files) for one in started.cases)
    state = "accepted" if started.accepted else "pending review"
    return (
        f"{cases}, {stages} stages, {started.bytes / 1000:.0f} KB, {state} in "
        f"{escape(str(started.folder))}, {started.seconds:.1f} s"
    )


def next_lines(started: Started) -> Iterator[str]:
    """The commands that follow."""
    review, accept, check = (
        command(verb, started.folder, *more)
        for verb, more in (("review", ()), ("accept", ("--all",)), ("check", ()))
    )
    if not started.written:
        yield "do: find the cause (omni-grpo check shows completions), or leave out --accept"
    elif started.approval is None:
        yield f"next: {review}, then {accept}"
    elif started.approval.no_git:
        yield f"next: {check}"
    else:
        yield f"next: git add {shlex.quote(str(started.folder))}, commit; from then on {check}"
