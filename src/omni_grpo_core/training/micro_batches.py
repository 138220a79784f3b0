"""A rollout as micro-batches: completions that are scored together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.completions import stack_completions
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.losses.spans import PartialAdvantage, token_advantages
from omni_grpo_core.types import Batch, Rollout


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Completions that are scored together, equally many for each row of ``batch``.

    ``ids``, ``rollout_logprobs``: (N, C). ``mask``: bool, (N, C), tokens that were sampled.
    ``in_loss``: bool, (N, C), those that count: all of a row or none. ``advantages``: (N,), or
    (N, C) if partial rewards act on some of the tokens.
    """

    batch: Batch
    ids: Tensor
    mask: Tensor
    in_loss: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor


def make_micro_batches(
    policy: Policy,
    batch: Batch,
    rolled: Rollout,
    advantages: Tensor,
    kept: Tensor,
    size: int,
    partial: Sequence[PartialAdvantage] = (),
    *,
    most: int | None = None,
) -> tuple[MicroBatch, ...]:
    """A rollout as micro-batches of up to ``size`` completions, in order.

    ``advantages``: (N,); ``kept``: bool, (N,), completions that count in the loss; others stay as
    fully masked rows, so that all processes have equally many micro-batches. ``partial``: added to
    the advantages on their spans. ``most``: completions of one prompt on the process that has most,
    if the groups are spread over several; by default the rollout's.
    """
    group = rolled.group_size
    parts = []
    for start, stop in _cuts(len(batch.rows), group, most or group, size):
        counts = start < stop
        stop = max(stop, start + 1)
        rows = batch.rows[start // group : -(-stop // group)]
        stacked = stack_completions(
            rolled.completions[start:stop],
            pad_id=policy.pad_token_id,
            eos_ids=policy.eos_token_ids,
        )
        own = advantages[start:stop]
        if partial:
            slices = [
                PartialAdvantage(part.name, part.values[start:stop], part.spans[start:stop])
                for part in partial
            ]
            own = token_advantages(own, stacked.mask, slices)
        parts.append(
            MicroBatch(
                batch=collate(rows, policy.pad_token_id),
                ids=stacked.ids,
                mask=stacked.mask,
                in_loss=stacked.mask & kept[start:stop, None] & counts,
                advantages=own,
                rollout_logprobs=stacked.logprobs,
            )
        )
    return tuple(parts)


def _cuts(rows: int, group: int, most: int, size: int) -> list[tuple[int, int]]:
    """Where each micro-batch begins and ends among the completions: whole groups or parts of one,
    as many on every process. Where ``group`` is too small for its parts, some are empty.

    >>> _cuts(3, 2, 2, 4), _cuts(1, 4, 4, 2), _cuts(1, 1, 2, 1)
    ([(0, 4), (4, 6)], [(0, 2), (2, 4)], [(0, 0), (0, 1)])
    """
    if size >= most:
        edges = [*range(0, rows, size // most), rows]
        return [(group * one, group * other) for one, other in pairwise(edges)]
    parts = -(-most // size)
    edges = [group * at // parts for at in range(parts + 1)]
    return [(group * row + a, group * row + b) for row in range(rows) for a, b in pairwise(edges)]
