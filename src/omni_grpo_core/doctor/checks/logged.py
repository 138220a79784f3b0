"""What is recorded with a loss: its settings, its passes and its logged metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from omni_grpo_core.doctor.evidence import Case, Evidence, Look
from omni_grpo_core.doctor.recompute_loss import Parts, beta_of, parts_of, policy_terms
from omni_grpo_core.doctor.rollouts import losses_of
from omni_grpo_core.losses.objectives import LOSSES
from omni_grpo_core.trace.calls import LossSeen


def look_at_reference(case: Case) -> Iterable[Evidence]:
    """A KL term that is not in the settings."""
    for at, one in enumerate(losses_of(case)):
        beta = beta_of(one.loss.settings)
        if beta == 0 and one.loss.ref_logprobs is not None:
            yield Evidence(
                "loss",
                "reference-unasked",
                f"loss {at}: beta is 0 in the settings, but reference logprobs were computed",
                values={"beta": beta},
            )


def look_at_metrics(case: Case) -> Iterable[Evidence]:
    """Logged clip rates and KL, compared with what their names promise."""
    step = [one.loss for one in losses_of(case)]
    for at, loss in enumerate(step):
        parts = parts_of(loss, step)
        if parts is None:
            continue
        yield from _clip_rate(at, loss, parts)
        kl = next((v for k, v in loss.metrics.items() if k in ("kl", "mean_kl")), None)
        if kl is not None and kl < -1e-6:
            yield Evidence(
                "loss",
                "kl-negative",
                f"loss {at}: the logged KL is {kl:.3g}; its estimate exp(d) - d - 1 cannot be "
                "below 0",
                values={"kl": kl},
            )


def _clip_rate(at: int, loss: LossSeen, parts: Parts) -> Iterator[Evidence]:
    logged = loss.metrics.get("clip_ratio", loss.metrics.get("clip_ratio/region_mean"))
    terms = policy_terms(parts)
    level = loss.settings.get("importance_sampling_level") or parts.config.ratio_level
    bounds = LOSSES[parts.config.loss_type].bounds
    if logged is None or terms is None or (level, bounds) != ("token", "gradient"):
        return
    ratio = torch.where(parts.mask, parts.logprobs - parts.old, 0.0).exp()
    advantage = parts.advantages
    advantage = advantage[:, None].expand(ratio.shape) if advantage.ndim == 1 else advantage
    low, high = ratio < 1 - parts.config.epsilon_low, ratio > 1 + parts.config.epsilon_high
    positive, negative = advantage > 0, advantage < 0
    rates = {
        "right": (low & negative) | (high & positive),
        "other": (low & positive) | (high & negative),
        "any": low | high,
        "low": low & negative,
        "high": high & positive,
    }
    counted = parts.mask.double()
    mean = {k: float((v * counted).sum() / counted.sum().clamp(min=1)) for k, v in rates.items()}
    fits = {k for k, v in mean.items() if abs(v - logged) <= 1e-5}
    if not fits or "right" in fits:
        return
    yield Evidence(
        "loss",
        "clip-rate-differs",
        f"loss {at}: the logged clip rate is {logged:.4g}; clipping removes the gradient of "
        f"{mean['right']:.4g} of its tokens, and {mean['other']:.4g} are outside the range on the "
        "side where it does not apply",
        values={"logged": logged, "counts": sorted(fits), **mean},
    )


LOOKS: tuple[Look, ...] = (look_at_reference, look_at_metrics)
