"""Which rows to show when there are too many: every kind of input before a second of a kind."""

from __future__ import annotations

from collections.abc import Sequence

from omni_grpo_core.types import Row


def kind_of(row: Row) -> tuple[str | bool, ...]:
    """How media reach the model in this row: audio mode, the modalities in token order, and
    whether an item comes in several chunks."""
    items = {(span.modality, span.item) for span in row.spans}
    modalities = dict.fromkeys(span.modality for span in row.spans)
    return (row.audio_in_video, len(row.spans) > len(items), *modalities)


def varied(rows: Sequence[Row], limit: int) -> tuple[int, ...]:
    """Indices of at most ``limit`` rows, ascending: the first of each kind, then the second …"""
    seen: dict[tuple[str | bool, ...], int] = {}
    turns = []
    for index, row in enumerate(rows):
        turn = seen.get(kind_of(row), 0)
        seen[kind_of(row)] = turn + 1
        turns.append((turn, index))
    return tuple(sorted(index for _, index in sorted(turns)[:limit]))
