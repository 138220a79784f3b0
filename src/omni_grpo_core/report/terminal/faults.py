"""A campaign on a terminal: one line a fault, then what was missed."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from omni_grpo_core.faults.campaign import Result, Row


def print_result(console: Console, result: Result) -> None:
    """Faults, pairs and clean loops that came out wrong, and the sums."""
    alone = result.of("fault")
    if alone:
        table = Table("fault", "blamed", "cause", box=None, pad_edge=False)
        for row in alone:
            table.add_row(_mark(row, result.causes), _blamed(row), _cause(row))
        console.print(table)
    for name, reason in result.skipped.items():
        console.print(f"[yellow]–[/] {name}: {escape(reason)}")
    for row in result.of("pair"):
        if not row.stage_right:
            wanted = " and ".join(row.stages)
            console.print(f"[red]✗[/] {' + '.join(row.ids)}: {wanted}; blamed {_blamed(row)}")
    for row in result.false_alarms:
        said = row.raised or " ".join(row.said)
        console.print(f"[red]✗[/] clean {escape(row.config)}: {_blamed(row)}; {escape(said)}")
    console.print(_sums(result))
    for missed in result.missed:
        console.print(f"[red]missed:[/] {missed}")


def _mark(row: Row, causes: bool) -> str:
    right = row.stage_right and (row.cause_right or not causes)
    return f"{'[green]✓[/]' if right else '[red]✗[/]'} {row.ids[0]}"


def _blamed(row: Row) -> str:
    return ", ".join(row.blamed) or "nothing"


def _cause(row: Row) -> str:
    named = row.causes[0] if row.causes else ""
    return "" if row.cause_right else escape(named or "-")


def _sums(result: Result) -> str:
    told = result.to_json()
    causes = f" and {told['cause_right']} causes" if result.causes else ""
    return (
        f"{told['injected']} faults: {told['detected']} detected, "
        f"{told['stage_right']} stages{causes} right; "
        f"{told['pairs']} pairs: both stages named in {told['pairs_right']}; "
        f"{told['clean_runs']} clean loops: {told['false_alarms']} false alarms; "
        f"{told['seconds']:.0f} s"
    )
