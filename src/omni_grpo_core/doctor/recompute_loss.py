"""A recorded loss recomputed from its inputs, rightly and with each known mistake.

float64 throughout: the remaining difference is the trainer's own rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.errors import OmniGrpoError
from omni_grpo_core.losses import LossConfig, LossType
from omni_grpo_core.losses.policy_loss import token_kl, token_losses
from omni_grpo_core.tolerances import LOSS
from omni_grpo_core.trace.calls import LossSeen

_TYPES: Mapping[str, LossType] = {
    "grpo": "grpo", "bnpo": "bnpo", "dr_grpo": "dr_grpo", "dapo": "dapo", "gspo": "gspo",
    "cispo": "cispo",
}  # fmt: skip
_BETAS = ("beta", "kl_coef", "kl_beta")
_DEFAULT_EPSILON = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """One loss in the project's own terms. ``mask``: bool, (N, C). ``whole``: masks of all losses
    of the optimizer step, including this one's. ``configured_parts``: micro-batches per step by
    the settings."""

    config: LossConfig
    beta: float
    logprobs: Tensor
    old: Tensor
    reference: Tensor | None
    advantages: Tensor
    mask: Tensor
    whole: tuple[Tensor, ...]
    configured_parts: int


@dataclass(frozen=True, slots=True)
class RecomputedLoss:
    """A loss as one way of computing it gives. ``size``: mean of its tokens' absolute terms, to
    which rounding is proportional."""

    way: str
    value: float
    size: float

    def fits(self, loss: float) -> bool:
        return math.isfinite(loss) and LOSS.allows(loss, self.value, self.size)


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
    kind = _TYPES.get(str(loss.settings.get("loss_type", "")).lower())
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
        configured_parts=_configured_parts(loss.settings) or len(others) or 1,
    )


def _configured_parts(settings: Mapping[str, Any]) -> int:
    value = settings.get("gradient_accumulation_steps")
    return value if isinstance(value, int) and value > 0 else 0


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
    delta = settings.get("delta")
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


def kl_terms(parts: Parts) -> Tensor | None:
    """k3 estimates, (N, C), 0 outside the mask; ``None`` without a reference."""
    if parts.reference is None or parts.reference.shape != parts.logprobs.shape:
        return None
    kl = token_kl(
        torch.where(parts.mask, parts.logprobs, 0.0),
        torch.where(parts.mask, parts.reference, 0.0),
        "k3",
    )
    return torch.where(parts.mask, kl, 0.0)


def reductions(parts: Parts, terms: Tensor) -> Iterator[RecomputedLoss]:
    """Token losses reduced by every rule that is right for the loss type: the share of the step, or
    the micro-batch's own mean where that is equal or where the trainer divides later."""
    mask = parts.mask.double()
    lengths = mask.sum(1).clamp(min=1)
    per_row = terms.sum(1) / lengths
    rows_of_step = sum(len(m) for m in parts.whole)
    live_rows = sum(int(m.any(1).sum()) for m in parts.whole)
    tokens_of_step = max(sum(int(m.sum()) for m in parts.whole), 1)
    count = len(parts.whole)
    own = len(terms)
    values: dict[str, Tensor]
    match parts.config.loss_type:
        case "grpo" | "gspo":
            values = {
                "share": per_row.sum() / rows_of_step,
                "live": per_row.sum() / max(live_rows, 1),
                "own": per_row.sum() / own,
                "split": per_row.sum() / own / count,
            }
        case "dr_grpo":
            width = parts.config.max_completion_length or 1
            values = {
                "share": terms.sum() / (rows_of_step * width),
                "own": terms.sum() / (own * width),
                "split": terms.sum() / (own * width) / count,
            }
        case "bnpo":
            # some trainers average over the micro-batch
            values = {
                "share": terms.sum() / tokens_of_step,
                "own": terms.sum() / mask.sum().clamp(min=1),
                "split": terms.sum() / mask.sum().clamp(min=1) / count,
            }
        case _:
            values = {"share": terms.sum() / tokens_of_step}
    size = float(terms.abs().sum() / mask.sum().clamp(min=1)) + 1e-3
    for way, value in values.items():
        yield RecomputedLoss(way, float(value), size)
    if parts.configured_parts != count:
        # a wrong number of micro-batches is reported for the step
        yield RecomputedLoss(
            "configured", float(values["share"]) * count / parts.configured_parts, size
        )


def right_ways(parts: Parts) -> list[RecomputedLoss]:
    """The loss by its settings."""
    terms = policy_terms(parts)
    if terms is None:
        return []
    kl = kl_terms(parts)
    if kl is not None and parts.beta:
        terms = terms + parts.beta * kl
    return list(reductions(parts, terms))


def wrong_ways(parts: Parts) -> Iterator[RecomputedLoss]:
    """The loss with each known mistake, named."""
    terms, kl = policy_terms(parts), kl_terms(parts)
    if terms is not None:
        with_kl = terms if kl is None or not parts.beta else terms + parts.beta * kl
        yield from _named("sign", reductions(parts, -terms if kl is None else with_kl - 2 * terms))
        if kl is not None and parts.beta:
            yield from _named("kl-sign", reductions(parts, terms - parts.beta * kl))
            yield from _named("kl-left-out", reductions(parts, terms))
            other = _reversed_kl(parts)
            yield from _named("kl-sign", reductions(parts, terms + parts.beta * other))
        for kind in ("dapo", "grpo", "bnpo"):
            fake = replace(
                parts, config=replace(parts.config, loss_type=kind, max_completion_length=None)
            )
            yield from _named("normaliser", reductions(fake, with_kl))
        size = float(with_kl.abs().mean()) + 1e-3
        mask = parts.mask.double()
        yield RecomputedLoss("normaliser", float(with_kl.sum() / mask.sum().clamp(min=1)), size)
        yield RecomputedLoss("normaliser", float(with_kl.sum() / mask.numel()), size)
        yield RecomputedLoss("normaliser", float(with_kl.sum()), size)
        yield RecomputedLoss("normaliser", float(with_kl.sum(1).mean()), size)
    rows, width = parts.logprobs.shape
    if parts.advantages.ndim == 1 and len(parts.advantages) == width:
        across = parts.advantages[None, :].expand(rows, width)
        crossed = replace(parts, advantages=across)
        made = policy_terms(crossed)
        if made is not None:
            made = made if kl is None else made + parts.beta * kl
            yield from _named("broadcast", reductions(crossed, made))


def _reversed_kl(parts: Parts) -> Tensor:
    flipped = replace(parts, logprobs=parts.reference, reference=parts.logprobs)  # type: ignore[arg-type]
    found = kl_terms(flipped)
    return torch.zeros_like(parts.logprobs) if found is None else found


def _named(way: str, made: Iterator[RecomputedLoss]) -> Iterator[RecomputedLoss]:
    return (replace(one, way=way) for one in made)


def hidden_beta(parts: Parts, loss: float) -> float | None:
    """The KL weight that explains a loss, if any: the loss minus its policy term is a positive
    multiple of the mean KL, both reduced by one rule of the loss type."""
    terms, kl = policy_terms(parts), kl_terms(parts)
    if terms is None or kl is None:
        return None
    for plain, weight in zip(reductions(parts, terms), reductions(parts, kl), strict=True):
        if weight.value > 1e-9 and not plain.fits(loss):
            return (loss - plain.value) / weight.value
    return None
