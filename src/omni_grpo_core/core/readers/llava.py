"""LLaVA's rows: ``conversations`` of ``from`` and ``value`` with marks, and ``image``, ``video`` or
``audio``. The last answer is the gold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omni_grpo_core.core.readers.chat import sample_of
from omni_grpo_core.core.readers.row import Format
from omni_grpo_core.core.rows import DataRow, short
from omni_grpo_core.types import Sample


def read(row: DataRow, sample_id: str, root: Path | None) -> Sample:
    turns = row.values.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(one, Mapping) for one in turns):
        row.fail(f"conversations {short(turns)}", "a list of messages with 'from' and 'value'")
    messages = [(one.get("from"), one.get("value")) for one in turns]
    return sample_of(row, sample_id, root, messages)


FORMAT = Format("llava", "LLaVA", (("conversations",),), read)
