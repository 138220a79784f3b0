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
    """Every fault with the loops it was planted in, then whatever came out wrong, and the
    totals."""
    singles = result.of("fault")
    if singles:
        table = Table("fault", "found in", box=None, pad_edge=False)
        for ids in dict.fromkeys(row.ids for row in singles):
            rows = [row for row in singles if row.ids == ids]
            right = all(_is_right(row, result.causes) for row in rows)
            table.add_row(
                f"{_MARKS[right]} {ids[0]}", ", ".join(_place(row, result) for row in rows)
            )
        console.print(table)
    for name, reason in result.skipped.items():
        console.print(f"[yellow]–[/] {name}: {escape(reason)}")
    for row in result.without_effect:
        said = f"{' and '.join(row.without_effect)} changes nothing that is recorded there"
        console.print(f"[yellow]–[/] {_name(row)}: {said}: not counted")
    for row in result.rows:
        if problems := _problems(row, result.causes):
            console.print(f"{_MARKS[False]} {_name(row)}: {escape('; '.join(problems))}")
    console.print(_totals(result))
    for missed in result.missed:
        console.print(f"[red]missed:[/] {missed}")


_MARKS = {True: "[green]✓[/]", False: "[red]✗[/]"}


def _is_right(row: Row, causes: bool) -> bool:
    return not _problems(row, causes)


def _place(row: Row, result: Result) -> str:
    return row.loop if _is_right(row, result.causes) else f"[red]not {row.loop}[/]"


def _name(row: Row) -> str:
    what = " + ".join(row.ids) or f"sound {escape(row.config)}"
    return f"{what} in {row.loop}"


def _problems(row: Row, causes: bool) -> list[str]:
    """What is wrong with a trial's diagnosis, in words."""
    said = "; ".join((*(f"{one.stage}: {one.said}" for one in row.findings), *row.unexplained))
    if not row.ids:
        if row.raised:
            return [f"raised {row.raised}"]
        return [f"called broken: {said}"] if row.broken else []
    found = []
    if row.without_effect:
        pass
    elif not row.stage_right:
        wanted = " and ".join(stages[0] for stages in row.expected)
        found.append(f"wanted {wanted}, blamed {', '.join(row.blamed) or 'nothing'}")
    elif not row.detected:
        found.append(f"shown as one that {row.findings[0].severity}")
    if causes and row.wrong:
        found.append(f"wrongly proved {', '.join(row.wrong)}")
    if causes and row.kind == "fault" and not row.cause_right:
        found.append("its cause was not proved")
    return [*found, said] if found and said else found


def _totals(result: Result) -> str:
    totals = result.to_json()
    causes = f" and {totals['cause_right']} causes" if result.causes else ""
    return (
        f"{totals['run']} of {totals['planned']} trials: "
        f"{totals['faults']} faults planted {totals['injected']} times: "
        f"{totals['detected']} detected, {totals['stage_right']} stages{causes} right; "
        f"{totals['pairs']} pairs: both stages named in {totals['pairs_right']}, "
        f"{totals['pairs_without_effect']} more of which one fault has no effect; "
        f"{totals['clean_runs']} sound runs: {totals['false_alarms']} false alarms; "
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
