"""A campaign and the replayed incident on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from omni_grpo_core.doctor.diagnose import to_json as diagnosis_json
from omni_grpo_core.faults.campaign import Result, Row
from omni_grpo_core.faults.fault import (
    cache_is_dropped,
    cache_is_repaired,
    kept,
    transformers_version,
)
from omni_grpo_core.faults.incident import Replay
from omni_grpo_core.faults.incident_rows import Answer, RowFinding


def print_result(console: Console, result: Result) -> None:
    """Every fault, the pairs and clean loops that came out wrong, and the totals."""
    singles = result.of("fault")
    if singles:
        table = Table("fault", "blamed", "cause", box=None, pad_edge=False)
        for row in singles:
            table.add_row(_mark(row, result.causes), _blamed(row), _cause(row))
        console.print(table)
    for name, reason in result.skipped.items():
        console.print(f"[yellow]–[/] {name}: {escape(reason)}")
    for row in result.of("pair"):
        if not row.stage_right:
            wanted = " and ".join(row.stages)
            console.print(f"[red]✗[/] {' + '.join(row.ids)}: {wanted}; blamed {_blamed(row)}")
    for row in result.false_alarms:
        output = row.raised or " ".join(row.said)
        console.print(f"[red]✗[/] clean {escape(row.config)}: {_blamed(row)}; {escape(output)}")
    console.print(_totals(result))
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


def _totals(result: Result) -> str:
    totals = result.to_json()
    causes = f" and {totals['cause_right']} causes" if result.causes else ""
    return (
        f"{totals['injected']} faults: {totals['detected']} detected, "
        f"{totals['stage_right']} stages{causes} right; "
        f"{totals['pairs']} pairs: both stages named in {totals['pairs_right']}; "
        f"{totals['clean_runs']} clean loops: {totals['false_alarms']} false alarms; "
        f"{totals['seconds']:.0f} s"
    )


_SHOWN = 3
_STYLES: dict[Answer, tuple[str, str]] = {
    "broken": ("✗ broken", "bold red"),
    "caught": ("✓ caught", "green"),
    "cleared": ("✓ cleared", "green"),
    "shown": ("✓ shown", "green"),
    "missed": ("? missed", "bold yellow"),
}


def behaviour(replay: Replay) -> str:
    """What the installed transformers does when generating with checkpointing, as measured."""
    found = f"{replay.well_formed} of {len(replay.texts)} completions well formed"
    if cache_is_dropped():
        library = f"transformers {transformers_version()}"
        if replay.raised:
            stop = f"generate stops at the second token with {replay.raised}"
            return f"{library} drops the cache while checkpointing: {stop}"
        harm = "drops the cache while checkpointing: the model sees a single token"
        return f"{library} {harm}; {found}"
    harm = "sampling in train mode with checkpointing is harmless here (4.53 to 5.23 drop it)"
    return f"{kept()}; {harm}; {found}"


def to_json(replay: Replay, rows: Sequence[RowFinding]) -> dict[str, Any]:
    """``transformers``, ``cache_dropped``, ``repaired``, ``raised``, ``garbage``, ``rewards``,
    ``completions``, ``good``, ``diagnosis`` and the 21 ``rows``."""
    return {
        "transformers": str(transformers_version()),
        "cache_dropped": cache_is_dropped(),
        "repaired": cache_is_repaired(),
        "behaviour": behaviour(replay),
        "raised": replay.raised,
        "garbage": replay.garbage,
        "well_formed": replay.well_formed,
        "rewards": list(replay.rewards),
        "completions": list(replay.texts),
        "good": {"completions": list(replay.good), "right": list(replay.right)},
        "diagnosis": diagnosis_json(replay.verdict),
        "rows": [row.to_json() for row in rows],
    }


def print_incident(console: Console, replay: Replay, rows: Sequence[RowFinding]) -> None:
    """Completions and rewards of the training, then each row of the incident with its outcome."""
    console.print(Text("the working script answers", style="dim"), Text(replay.good[0]))
    for text, reward in list(zip(replay.texts, replay.rewards, strict=True))[:_SHOWN]:
        completion = (text, "red" if replay.garbage else "")
        console.print(Text.assemble((f"training, reward {reward:.2f}: ", "dim"), completion))
    console.print(Text(f"rewards: {' '.join(f'{r:.2f}' for r in replay.rewards)}"))
    console.print(Text(behaviour(replay), style="bold"))
    table = Table("", "in the incident", "", "here", show_lines=True, expand=True)
    for row in rows:
        name, style = _STYLES[row.answer]
        table.add_row(str(row.row), Text(row.told), Text(name, style=style), Text(row.found))
    console.print(table)
