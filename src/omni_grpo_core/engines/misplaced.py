"""Positions that an engine may have computed in place of the batch's, with the same ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.forward import positions
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.types import Batch, Positions

_SECONDS = "video_second_per_grid"


def other_positions(policy: Policy, batch: Batch) -> Iterator[tuple[str, Positions]]:
    """Each with the words for it; none for a batch without media."""
    if not any(row.spans for row in batch.rows):
        return
    true = positions(policy, batch)
    plain = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0).to(true.position_ids.dtype)
    yield (
        "where every token counts one on, as in text",
        Positions(plain.expand(3, -1, -1), torch.zeros_like(true.deltas)),
    )
    if any(_SECONDS in row.tensors for row in batch.rows):
        rows = [
            replace(row, tensors={**row.tensors, _SECONDS: torch.ones_like(row.tensors[_SECONDS])})
            if _SECONDS in row.tensors
            else row
            for row in batch.rows
        ]
        whole = positions(policy, collate(rows, policy.pad_token_id))
        yield "where a temporal patch lasts 1 s, whatever the clip's frame rate", whole
