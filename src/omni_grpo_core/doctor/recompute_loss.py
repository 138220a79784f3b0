"""A noted loss in the project's own terms, for the metrics that were logged with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.errors import OmniGrpoError
from omni_grpo_core.losses import LossConfig, LossType
from omni_grpo_core.losses.objectives import LOSSES
from omni_grpo_core.losses.policy_loss import token_losses
from omni_grpo_core.trace.calls import LossSeen

_BETAS = ("beta", "kl_coef", "kl_beta")
_DEFAULT_EPSILON = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """One loss in the project's own terms. ``mask``: bool, (N, C). ``whole``: masks of all losses
    of the optimizer step, including this one's."""

    config: LossConfig
    beta: float
    logprobs: Tensor
    old: Tensor
    reference: Tensor | None
    advantages: Tensor
    mask: Tensor
    whole: tuple[Tensor, ...]


def parts_of(loss: LossSeen, step: Sequence[LossSeen]) -> Parts | None:
    """``None`` where an input of the loss was not recorded."""
    logprobs, advantages = loss.logprobs, loss.advantages
    if logprobs is None or advantages is None or logprobs.ndim != 2:
        return None
    if advantages.shape == (len(logprobs), 1):
        advantages = advantages[:, 0]
    mask = torch.ones(logprobs.shape) if loss.mask is None else loss.mask
    if mask.shape != logprobs.shape or advantages.ndim not in (1, 2):
        return None
    named = str(loss.settings.get("loss_type", "")).lower()
    kind = next((name for name in LOSSES if name == named), None)
    if kind is None:
        return None
    others = tuple(o.mask.bool() for o in step if o.mask is not None)
    new = logprobs.double()
    return Parts(
        config=_config(loss.settings, kind),
        beta=beta_of(loss.settings) or 0.0,
        logprobs=new,
        old=new if loss.old_logprobs is None else loss.old_logprobs.double(),
        reference=None if loss.ref_logprobs is None else loss.ref_logprobs.double(),
        advantages=advantages.double(),
        mask=mask.bool(),
        whole=others or (mask.bool(),),
    )


def beta_of(settings: Mapping[str, Any]) -> float | None:
    """Weight of the KL term under any of its names in the settings; ``None`` if not set."""
    for name in _BETAS:
        if isinstance(settings.get(name), int | float):
            return float(settings[name])
    return None


def _config(settings: Mapping[str, Any], kind: LossType) -> LossConfig:
    low = settings.get("epsilon_low", settings.get("epsilon"))
    low = _DEFAULT_EPSILON if low is None else float(low)
    high = settings.get("epsilon_high")
    high = low if high is None else float(high)
    delta = settings.get("delta") if LOSSES[kind].bounds == "gradient" else None
    length = int(settings.get("max_completion_length") or 1)
    return LossConfig(
        loss_type=kind,
        epsilon_low=low,
        # some settings give cispo's upper bound itself, 1 + epsilon_high
        epsilon_high=max(high - 1, 0.0) if kind == "cispo" and high > 1 else high,
        delta=None if delta is None else float(delta),
        max_completion_length=length if kind == "dr_grpo" else None,
    )


def policy_terms(parts: Parts) -> Tensor | None:
    """Token losses without the KL term, (N, C); ``None`` where advantages do not fit the tokens."""
    try:
        return token_losses(
            parts.config,
            logprobs=parts.logprobs,
            old_logprobs=parts.old,
            advantages=parts.advantages,
            mask=parts.mask,
        )
    except OmniGrpoError:
        return None
