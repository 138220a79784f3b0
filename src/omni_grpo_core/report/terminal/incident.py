"""The replayed incident, for a person and for a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from omni_grpo_core.doctor.diagnose import to_json as diagnosis_json
from omni_grpo_core.faults.incident import Replay
from omni_grpo_core.faults.incident_rows import Answer, RowFinding
from omni_grpo_core.faults.installed import (
    cache_is_dropped,
    cache_is_repaired,
    kept,
    transformers_version,
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
    """What the installed transformers does with checkpointing while generating, as measured."""
    found = f"{replay.well_formed} of {len(replay.texts)} completions well formed"
    if cache_is_dropped():
        library = f"transformers {transformers_version()}"
        if replay.raised:
            stop = f"generate stops at the second token with {replay.raised}"
            return f"{library} drops the cache while checkpointing: {stop}"
        harm = "drops the cache while checkpointing: the model sees one token and nothing else"
        return f"{library} {harm}; {found}"
    harm = "sampling in train mode with checkpointing on does no harm here (4.53 to 5.23 drop it)"
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
    """Completions and rewards of the training, then each row of the incident with its answer."""
    console.print(Text("the script that works says", style="dim"), Text(replay.good[0]))
    for text, reward in list(zip(replay.texts, replay.rewards, strict=True))[:_SHOWN]:
        said = (text, "red" if replay.garbage else "")
        told = Text.assemble((f"training, reward {reward:.2f}: ", "dim"), said)
        console.print(told)
    console.print(Text(f"rewards: {' '.join(f'{r:.2f}' for r in replay.rewards)}"))
    console.print(Text(behaviour(replay), style="bold"))
    table = Table("", "in the incident", "", "here", show_lines=True, expand=True)
    for row in rows:
        name, style = _STYLES[row.answer]
        table.add_row(str(row.row), Text(row.told), Text(name, style=style), Text(row.found))
    console.print(table)
