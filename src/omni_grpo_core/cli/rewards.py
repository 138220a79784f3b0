"""``omni-grpo rewards``: put reward functions to the test, ours or anyone's."""

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

app = cli.group("Reward functions: can garbage earn them?")


@app.command("test")
def conformance(
    functions: Annotated[
        list[str],
        typer.Argument(
            metavar="FUNCTION...",
            help="module:function with TRL's signature, or one of ours: format, accuracy, …",
        ),
    ],
    floor: Annotated[float, typer.Option(help="What garbage may earn at most.")] = 0.0,
    top: Annotated[float, typer.Option(help="What gold must earn.")] = 1.0,
    as_json: cli.Json = False,
) -> None:
    """Garbage earns the floor, gold the top, tricks nothing; rows do not touch each other.

    Exit code 1 with the failing cases, 2 when a function cannot be loaded.
    """
    from omni_grpo_core.rewards.conformance import run
    from omni_grpo_core.rewards.load import load_reward

    # a module beside the user is found as with `python -m`
    sys.path.insert(0, "")
    # foreign code may print; stdout is for the report alone
    with redirect_stdout(sys.stderr):
        loaded = {name: load_reward(name) for name in functions}
        report = run(loaded, floor=floor, top=top)
    cli.answer(as_json, report.to_json(), shown=lambda console: _print(console, report))
    raise typer.Exit(0 if report.ok else 1)


def _print(console: Console, report: ConformanceReport) -> None:
    from rich.table import Table

    table = Table("function", "cases", "failures", "verdict", title="Can garbage earn it?")
    for function in report.functions:
        failures = sum(failure.function == function.name for failure in report.failures)
        verdict = "[green]pass" if function.ok else "[red]fail"
        table.add_row(function.name, str(report.cases), str(failures), verdict)
    console.print(table)
    for function in report.functions:
        if not function.ok:
            console.print(_failures(function.name, report))


def _failures(name: str, report: ConformanceReport) -> Table:
    """A function's failures; the same one on several problem types is one line."""
    from rich.markup import escape
    from rich.table import Table

    alike: dict[tuple[str, str, str], list[Failure]] = {}
    for failure in report.failures:
        if failure.function == name:
            case = failure.case.rpartition(": ")[2]
            alike.setdefault((failure.check, case, failure.got), []).append(failure)
    table = Table("check", "case", "times", "got", "want", title=f"Failures of {escape(name)}")
    for (check, case, got), failures in alike.items():
        # foreign text is not markup
        table.add_row(check, case, str(len(failures)), escape(got), escape(failures[0].want))
    return table
