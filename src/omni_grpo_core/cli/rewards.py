"""``omni-grpo rewards``: test reward functions, built-in or your own."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from omni_grpo_core import cli

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from omni_grpo_core.rewards.conformance import ConformanceReport, Failure

app = cli.group("Test reward functions: can garbage earn a reward?")


@app.command("test")
def conformance(
    functions: Annotated[
        list[str],
        typer.Argument(
            metavar="FUNCTION...",
            help="module:function with TRL's signature, module:maker(name=value) that makes one, "
            "or a built-in: format, accuracy, …",
        ),
    ],
    floor: Annotated[
        float | None, typer.Option(help="Highest score that garbage may earn.")
    ] = None,
    top: Annotated[
        float | None,
        typer.Option(help="Score that every gold must earn; by default 1, where any is paid."),
    ] = None,
    as_json: cli.Json = False,
) -> None:
    """Check that garbage earns the floor and gold the top.

    Also that tricks earn nothing, and rows are scored independently. A function is judged by its
    own kind: in the layout of completions that it reads, on the problem types that it pays, with
    the signs that it has. Exit code 1: a case failed. 2: a function cannot be loaded.
    """
    from omni_grpo_core.rewards.conformance import run
    from omni_grpo_core.rewards.load import load_reward

    # modules in the working directory are found, as with `python -m`
    sys.path.insert(0, "")
    # third-party code may print; stdout is for the report alone
    with redirect_stdout(sys.stderr):
        loaded = {name: load_reward(name) for name in functions}
        report = run(loaded, floor=floor, top=top)
    cli.answer(as_json, report.to_json(), shown=lambda console: _print(console, report))
    raise typer.Exit(0 if report.ok else 1)


def _print(console: Console, report: ConformanceReport) -> None:
    from rich.markup import escape
    from rich.table import Column, Table

    from omni_grpo_core.types import PROBLEM_TYPES

    columns = ("kind", "layout", "pays", "failures", "verdict")
    named = Column("function", overflow="fold")
    table = Table(named, *columns, title=f"Can garbage earn a reward? {report.cases} cases")
    for function in report.functions:
        failures = sum(failure.function == function.name for failure in report.failures)
        verdict = "[green]pass" if function.ok else "[red]fail"
        types = len(PROBLEM_TYPES)
        pays = f"all {types} types" if len(function.pays) == types else ", ".join(function.pays)
        row = (function.name, function.kind, function.layout, pays or "-", str(failures))
        table.add_row(*map(escape, row), verdict)
    console.print(table)
    for function in report.functions:
        if not function.ok:
            console.print(_failures(function.name, report))


def _failures(name: str, report: ConformanceReport) -> Table:
    """A function's failures, one row for the same failure on several problem types."""
    from rich.markup import escape
    from rich.table import Table

    alike: dict[tuple[str, str, str], list[Failure]] = {}
    for failure in report.failures:
        if failure.function == name:
            case = failure.case.rpartition(": ")[2]
            alike.setdefault((failure.check, case, failure.got), []).append(failure)
    table = Table("check", "case", "times", "got", "want", title=f"Failures of {escape(name)}")
    for (check, case, got), failures in alike.items():
        # third-party text is not markup
        table.add_row(check, case, str(len(failures)), escape(got), escape(failures[0].want))
    return table
