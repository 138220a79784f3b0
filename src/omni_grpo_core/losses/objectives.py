"""The losses by name: what each token contributes, and what the sum is divided by.

Notation as in :mod:`~omni_grpo_core.losses.policy_loss`. A new loss is a row of :data:`LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from omni_grpo_core.losses import LossConfig, LossType

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to this before exp: not far above, values and gradients overflow."""
_LOG_OF_LEAST = -18.420680743952367  # log(1e-8), the least sequence ratio of vespo


@dataclass(frozen=True, slots=True, eq=False)
class TokenTerms:
    """What an objective is computed from, each (N, C) and harmless outside ``mask``. ``weights``:
    the rollout correction's, 1 without one."""

    logprobs: Tensor
    ratio: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor


def clipped(config: LossConfig, token: TokenTerms) -> Tensor:
    """``w min(min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)``."""
    ratio = token.ratio if config.delta is None else token.ratio.clamp(max=config.delta)
    bounded = token.ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
    surrogate = torch.minimum(ratio * token.advantages, bounded * token.advantages)
    return surrogate * token.weights


def clipped_weight(config: LossConfig, token: TokenTerms) -> Tensor:
    """``w sg[clip(r, 1 - epsilon_low, 1 + epsilon_high)] A log pi``: every token keeps a gradient
    (CISPO, arXiv 2506.13585, eq. 4)."""
    bounded = token.ratio.clamp(1 - config.epsilon_low, 1 + config.epsilon_high).detach()
    return bounded * token.advantages * token.logprobs * token.weights


def soft_gate(config: LossConfig, token: TokenTerms) -> Tensor:
    """``w 4/tau sigmoid(tau (r - 1)) A``, with a temperature ``tau`` for positive advantages and
    one for others: the gradient fades with the distance from 1 instead of ending at a bound
    (SAPO, arXiv 2511.20347, eq. 5 and 6)."""
    tau = torch.where(
        token.advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg
    )
    gate = torch.sigmoid(tau * (token.ratio - 1)) * 4 / tau
    return gate * token.advantages * token.weights


def gamma_weight(config: LossConfig, token: TokenTerms) -> Tensor:
    """``sg[phi(W)] A log pi`` with ``phi(W) = W^k exp(lambda (1 - W))`` of the sequence's ratio
    ``W = prod_t w_t r_t``, so that the rollout correction is inside; ``k`` and ``lambda`` by the
    advantage's sign (VESPO, arXiv 2602.10693)."""
    with torch.no_grad():
        # TRL's bounds: the weight of a token that was masked out is 0, its logarithm infinite
        weights = token.weights.log().clamp(_LOG_OF_LEAST, LOG_RATIO_LIMIT)
        log_ratio = torch.where(token.mask, token.ratio.log() + weights, 0.0).sum(-1, keepdim=True)
        phi = gamma(config, log_ratio, token.advantages >= 0)
    return phi * token.advantages * token.logprobs


def gamma(config: LossConfig, log_ratio: Tensor, positive: Tensor) -> Tensor:
    """vespo's ``phi`` of sequences' log-ratios; ``positive``: where the advantage is 0 or more."""
    log_ratio = log_ratio.clamp(_LOG_OF_LEAST, LOG_RATIO_LIMIT)
    k = torch.where(positive, config.vespo_k_pos, config.vespo_k_neg)
    decay = torch.where(positive, config.vespo_lambda_pos, config.vespo_lambda_neg)
    return torch.exp(k * log_ratio + decay * (1 - log_ratio.exp()))


class StepSize(Protocol):
    """How many completions and tokens are in the loss of a whole step."""

    @property
    def sequences(self) -> int: ...

    @property
    def tokens(self) -> int: ...


def per_sequence(config: LossConfig, losses: Tensor, mask: Tensor, of: StepSize) -> Tensor:
    """``1/N sum_i 1/|o_i| sum_t l_it``."""
    return (losses.sum(-1) / mask.sum(-1).clamp(min=1)).sum() / of.sequences


def per_token(config: LossConfig, losses: Tensor, mask: Tensor, of: StepSize) -> Tensor:
    """``1/(sum_i |o_i|) sum_i sum_t l_it``."""
    return losses.sum() / of.tokens


def per_length(config: LossConfig, losses: Tensor, mask: Tensor, of: StepSize) -> Tensor:
    """``1/(N max_completion_length) sum_i sum_t l_it``."""
    return losses.sum() / (of.sequences * (config.max_completion_length or 1))


def summed(config: LossConfig, losses: Tensor, mask: Tensor, of: StepSize) -> Tensor:
    """``1/N sum_i sum_t l_it``."""
    return losses.sum() / of.sequences


@dataclass(frozen=True, slots=True)
class Loss:
    """``objective``: what is maximised, (N, C). ``divided``: the loss of a step from per-token
    losses, 0 outside the mask. ``bounds``: what a ratio outside of them loses: its ``"gradient"``,
    or a part of its ``"weight"``; ``None``: there are none."""

    objective: Callable[[LossConfig, TokenTerms], Tensor]
    divided: Callable[[LossConfig, Tensor, Tensor, StepSize], Tensor]
    bounds: Literal["gradient", "weight"] | None = "gradient"


LOSSES: Mapping[LossType, Loss] = {
    "grpo": Loss(clipped, per_sequence),
    "bnpo": Loss(clipped, per_token),
    "dr_grpo": Loss(clipped, per_length),
    "dapo": Loss(clipped, per_token),
    "gspo": Loss(clipped, per_sequence),
    "luspo": Loss(clipped, summed),
    "cispo": Loss(clipped_weight, per_token, "weight"),
    "sapo": Loss(soft_gate, per_sequence, None),
    "vespo": Loss(gamma_weight, per_token, None),
}
"""Every loss by its name in a configuration."""


def on_policy_enough(
    config: LossConfig, logprobs: Tensor, sampled: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """bool, (N, C): all but the tokens of negative advantage of a sequence that the policy has left
    behind, ``1/|o_i| sum_t log(mu(o_it) / pi_theta(o_it)) > off_policy_mask_threshold``
    (DeepSeek-V3.2, arXiv 2512.02556, eq. 9). ``sampled``: logprobs under ``mu``, which sampled.

    >>> config = LossConfig(off_policy_mask_threshold=0.5)
    >>> now, then = torch.full((2, 2), -2.0), torch.tensor([[-1.0, -1.0], [-2.0, -1.2]])
    >>> given = torch.full((2, 2), -1.0), torch.ones((2, 2), dtype=torch.bool)
    >>> on_policy_enough(config, now, then, *given).tolist()  # means of 1 and of 0.4
    [[False, False], [True, True]]
    """
    gaps = torch.where(mask, sampled.detach().to(logprobs) - logprobs.detach(), 0.0)
    mean = gaps.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    limit = config.off_policy_mask_threshold
    return (advantages >= 0) | (mean <= (float("inf") if limit is None else limit))
