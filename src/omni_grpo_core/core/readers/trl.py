"""TRL's rows: ``prompt``, messages or text, with ``image(s)``, ``video(s)``, ``audio(s)`` and the
gold under ``solution``, ``answer`` or ``completion``."""

from __future__ import annotations

from pathlib import Path

from omni_grpo_core.core.readers.chat import role_and_content, sample_of
from omni_grpo_core.core.readers.row import Format
from omni_grpo_core.core.rows import DataRow
from omni_grpo_core.types import Sample


def read(row: DataRow, sample_id: str, root: Path | None) -> Sample:
    prompt = row.values.get("prompt")
    if isinstance(prompt, str) and not prompt.lstrip().startswith(('[{"role"', '[{"content"')):
        return sample_of(row, sample_id, root, [("user", row.text("prompt"))])
    return sample_of(row, sample_id, root, role_and_content(row, "prompt"))


FORMAT = Format(
    "trl", "TRL", (("prompt",),), read, lambda values: values.get("reward_model") is None
)
