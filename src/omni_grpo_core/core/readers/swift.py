"""ms-swift's rows: ``messages`` with marks, ``images``, ``videos``, ``audios``, ``solution``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_grpo_core.core.readers.chat import role_and_content, sample_of
from omni_grpo_core.core.readers.row import Format
from omni_grpo_core.core.rows import DataRow
from omni_grpo_core.types import Sample


def read(row: DataRow, sample_id: str, root: Path | None) -> Sample:
    return sample_of(row, sample_id, root, role_and_content(row, "messages"))


def has_parts(values: Mapping[str, Any]) -> bool:
    """Whether a message's content is a list, as in OpenAI's rows, not a text with marks."""
    messages = values.get("messages")
    return isinstance(messages, list) and any(
        isinstance(one, Mapping) and isinstance(one.get("content"), list) for one in messages
    )


FORMAT = Format("swift", "ms-swift", (("messages",),), read, lambda values: not has_parts(values))
