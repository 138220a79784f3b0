"""Correction for a rollout engine whose probabilities differ from the trainer's.

The engine samples from mu, the trainer believes in pi_old: same weights, other kernels, other
precision. Weighting the loss by pi_old / mu makes it unbiased again; the weight is cut, because a
few tokens would otherwise rule the step (truncated importance sampling), or tokens beyond the
bounds are left out (masked importance sampling). No gradient passes through it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_grpo_core.losses.config import RolloutCorrection
from omni_grpo_core.losses.policy_loss import LOG_RATIO_LIMIT
from omni_grpo_core.losses.shapes import require_logprobs, require_mask

__all__ = ["RolloutCorrection", "rollout_weights"]


def rollout_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, correction: RolloutCorrection
) -> Tensor:
    """pi_old / mu, bounded, (N, C), without gradient; 1 where ``mask`` is False.

    ``old_logprobs``: the trainer's, before the first update on this rollout; ``rollout_logprobs``:
    the engine's, at the same temperature; both (N, C). A sequence's weight stands in all its
    columns. Raises ``TrainError`` for shapes, dtypes or values that cannot be logprobs.

    >>> import math
    >>> old = torch.log(torch.tensor([[0.8, 0.2]], dtype=torch.float64))
    >>> engine = torch.log(torch.tensor([[0.2, 0.4]], dtype=torch.float64))  # ratios 4 and 1/2
    >>> mask = torch.tensor([[True, True]])
    >>> [[round(x, 9) for x in rollout_weights(old, engine, mask, c)[0].tolist()] for c in (
    ...     RolloutCorrection("token", "truncate"), RolloutCorrection("token", "mask"),
    ...     RolloutCorrection("sequence", "truncate"))]
    [[3.0, 0.5], [0.0, 0.5], [2.0, 2.0]]
    """
    require_mask("mask", mask)
    require_logprobs("old logprobs", old_logprobs, mask)
    require_logprobs("rollout logprobs", rollout_logprobs, mask)
    with torch.no_grad():
        log_ratio = torch.where(mask, old_logprobs - rollout_logprobs.to(old_logprobs), 0.0)
        if correction.level == "sequence":
            log_ratio = log_ratio.sum(-1, keepdim=True).expand(mask.shape)
        ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        if correction.mode == "truncate":
            ratio = ratio.clamp(correction.low, correction.high)
        else:
            within = (ratio >= correction.low) & (ratio <= correction.high)
            ratio = torch.where(within, ratio, 0.0)
        return torch.where(mask, ratio, 1.0)
