"""verl's rows: ``prompt``, messages with marks, ``images``, ``videos``, ``audios`` and
``reward_model`` with the ``ground_truth``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omni_grpo_core.core.readers.chat import role_and_content, sample_of
from omni_grpo_core.core.readers.row import Format
from omni_grpo_core.core.rows import DataRow, short
from omni_grpo_core.types import Sample


def read(row: DataRow, sample_id: str, root: Path | None) -> Sample:
    reward = row.values.get("reward_model")
    gold = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    if gold is None:
        row.fail(f"reward_model {short(reward)}", "a mapping with 'ground_truth'")
    return sample_of(row, sample_id, root, role_and_content(row, "prompt"), gold=gold)


FORMAT = Format("verl", "verl", (("prompt",), ("reward_model",)), read)
