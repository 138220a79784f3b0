"""Advantages, recomputed from their rewards and groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from omni_grpo_core.doctor.evidence import Case, note_missing
from omni_grpo_core.doctor.rollouts import RolloutRecord, rollouts, whole_groups
from omni_grpo_core.tolerances import EQUAL_RECORDED_REWARDS


def whole_rollouts(case: Case) -> Iterator[RolloutRecord]:
    """Rollouts whose advantages can be recomputed from what this process saw."""
    for rollout in rollouts(case):
        if rollout.advantage is not None and not whole_groups(case, rollout.advantage):
            note_missing(
                case, "groups are spread over processes: their advantages were not recomputed"
            )
            continue
        yield rollout


def reward_table(rollout: RolloutRecord) -> Tensor | None:
    """Each function's reward for each completion, (functions, N), NaN where it returned None."""
    lengths = {len(call.values) for call in rollout.rewards}
    if len(lengths) != 1 or 0 in lengths:
        return None
    return torch.tensor(
        [[math.nan if v is None else v for v in call.values] for call in rollout.rewards],
        dtype=torch.float64,
    )


def recomputed(
    rewards: Tensor, group_ids: Sequence[str], scale: str, unbiased: bool = True
) -> Tensor:
    """As :mod:`omni_grpo_core.losses.advantages`, with either standard deviation."""
    values = torch.zeros_like(rewards)
    whole = rewards.std(unbiased=unbiased) if len(rewards) > 1 else torch.tensor(0.0)
    for name in dict.fromkeys(group_ids):
        members = torch.tensor([group == name for group in group_ids])
        own = rewards[members]
        if len(own) < 2 or float(own.max() - own.min()) <= EQUAL_RECORDED_REWARDS:
            continue
        divisor = {"group": own.std(unbiased=unbiased), "batch": whole}.get(
            scale, torch.tensor(1.0)
        )
        values[members] = (own - own.mean()) / (divisor + (1e-4 if scale != "none" else 0))
    return values


def fits(values: Tensor, wanted: Tensor) -> bool:
    """Equal up to the epsilon in the divisor, which trainers choose; a row of 0 fits only a reward
    at the mean of its group."""
    known = ~values.isnan()
    values, wanted = values[known], wanted[known]
    if not len(values):
        return True
    size = max(float(wanted.abs().max()), float(values.abs().max()), 1e-3)
    return bool(((values - wanted).abs() <= 0.02 * size).all())


def listed(values: Tensor) -> str:
    shown = ", ".join(f"{float(v):.3g}" for v in values[:8])
    return f"[{shown}{', …' if len(values) > 8 else ''}]"
