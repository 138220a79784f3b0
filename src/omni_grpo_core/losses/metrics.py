"""A step's metrics, as sums and counts that add up over micro-batches and ranks.

A mean of means is wrong if micro-batches differ in length, so nothing is divided until
:attr:`Mean.value` is read: ``total = part_1 + part_2 + ...`` over everything, ranks included (the
parts are plain numbers: gather them as objects), then ``total.values()``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_grpo_core.losses import LossConfig
from omni_grpo_core.losses.advantages import Advantages
from omni_grpo_core.losses.objectives import LOSSES
from omni_grpo_core.losses.policy_loss import policy_ratio, token_kl
from omni_grpo_core.losses.shapes import expand_advantages, require_mask, require_shape
from omni_grpo_core.types import Completion


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean that has not been divided yet.

    >>> (Mean(3.0, 2) + Mean(5.0, 2)).value, Mean(0.0, 0).value
    (2.0, None)
    """

    total: float
    count: int

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float | None:
        """``None`` if nothing was counted: the mean of no tokens is not 0."""
        return self.total / self.count if self.count else None


@dataclass(frozen=True, slots=True)
class Metrics:
    """``means`` and ``peaks`` (largest values) by name; names are disjoint.

    >>> a = Metrics({"kl": Mean(1.0, 1)}, {"ratio_max": 1.5})
    >>> b = Metrics({"kl": Mean(2.0, 3), "cap_rate": Mean(0.0, 2)}, {"ratio_max": 1.25})
    >>> (a + b).values()
    {'kl': 0.75, 'cap_rate': 0.0, 'ratio_max': 1.5}
    """

    means: Mapping[str, Mean]
    peaks: Mapping[str, float]

    def __add__(self, other: Metrics) -> Metrics:
        means = dict(self.means)
        for name, mean in other.means.items():
            means[name] = means[name] + mean if name in means else mean
        peaks = dict(self.peaks)
        for name, peak in other.peaks.items():
            held = peaks.get(name, peak)
            peaks[name] = held if held > peak or math.isnan(held) else peak  # max() loses a NaN
        return Metrics(means, peaks)

    @classmethod
    def sum(cls, parts: Iterable[Metrics]) -> Metrics:
        """The sum of all parts."""
        total = cls({}, {})
        for part in parts:
            total += part
        return total

    def values(self) -> dict[str, float | None]:
        """Name to number, for a log line."""
        return {name: mean.value for name, mean in self.means.items()} | dict(self.peaks)


def loss_metrics(
    config: LossConfig,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    entropy: Tensor,
    ref_logprobs: Tensor | None = None,
) -> Metrics:
    """``clip_low``, ``clip_high``, ``clip_delta`` (if there is a delta), ``ratio``, ``entropy``,
    ``kl`` (if there is a reference) and ``ratio_max`` of one micro-batch; no clip rates for losses
    without bounds (sapo, vespo). Arguments as for
    :func:`~omni_grpo_core.losses.policy_loss.policy_loss`; ``entropy``: (N, C).

    Clip rates count ratios whose gradient the bound *removes*: below the lower bound where the
    advantage is negative, above the upper one where it is positive, above ``delta`` where it is
    negative; for the other sign the bound has no effect. CISPO's bounds apply for both signs (and
    scale the gradient instead of stopping it). A token with advantage 0 is never clipped. Rates and
    ``ratio`` are per token of the loss; per sequence for gspo and luspo. ``entropy`` and ``kl`` are
    always per token. Raises ``TrainError`` for shapes that differ.
    """
    require_shape("entropy", entropy, require_mask("mask", mask))
    with torch.no_grad():
        bounds = LOSSES[config.loss_type].bounds
        ratio = policy_ratio(config, logprobs, old_logprobs, mask)
        advantage = expand_advantages(advantages, logprobs)
        counted, count = mask.to(ratio.dtype), mask.sum()
        tokens = count
        if config.ratio_level == "sequence":
            # each sequence counts once: its equal columns share a weight of 1
            counted = counted / mask.sum(-1, keepdim=True).clamp(min=1)
            count = mask.any(-1).sum()
        below, above = ratio < 1 - config.epsilon_low, ratio > 1 + config.epsilon_high
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        if bounds is not None:
            either = bounds == "weight"
            low = below & ((advantage != 0) if either else (advantage < 0))
            high = above & ((advantage != 0) if either else (advantage > 0))
            sums |= {"clip_low": (low * counted, count), "clip_high": (high * counted, count)}
        sums |= {
            "ratio": (torch.where(mask, ratio, 0.0) * counted, count),
            "entropy": (torch.where(mask, entropy, 0.0), tokens),
        }
        if config.delta is not None:
            sums["clip_delta"] = ((ratio > config.delta) & (advantage < 0)) * counted, count
        if ref_logprobs is not None:
            kl = token_kl(logprobs, ref_logprobs, config.kl_estimator)
            sums["kl"] = (torch.where(mask, kl, 0.0), tokens)
        # one transfer from the device, in float64: float32 sums over many tokens lose digits
        peak = torch.where(mask, ratio, 0.0).max().double()
        flat = [x.sum(dtype=torch.float64) for pair in sums.values() for x in pair]
        *numbers, largest = torch.stack([*flat, peak]).tolist()
    means = {name: Mean(numbers[2 * at], int(numbers[2 * at + 1])) for at, name in enumerate(sums)}
    return Metrics(means, {"ratio_max": largest} if means["ratio"].count else {})


def rollout_metrics(completions: Sequence[Completion]) -> Metrics:
    """``completion_length`` in tokens and ``cap_rate``, the share that reached the length limit
    before an eos, per completion.

    >>> done = Completion("g", 0, (5, 2), "a", "stop", (-0.1, -0.1))
    >>> cut = Completion("g", 1, (5, 5, 5, 5), "aaaa", "length", (-0.1,) * 4)
    >>> rollout_metrics([done, cut]).values()
    {'completion_length': 3.0, 'cap_rate': 0.5}
    """
    count = len(completions)
    length = sum(len(completion.token_ids) for completion in completions)
    capped = sum(completion.finish_reason == "length" for completion in completions)
    return Metrics({"completion_length": Mean(length, count), "cap_rate": Mean(capped, count)}, {})


def advantage_metrics(advantages: Advantages) -> Metrics:
    """``zero_variance_rate`` per group with two scored rows or more (with fewer there is no
    variance), and ``unscored_rate`` per completion.

    Advantages are computed from the rewards of all ranks, so count them on one rank only.
    """
    counted = [group for group in advantages.groups if group.status != "too-few"]
    flat = sum(group.status == "zero-variance" for group in counted)
    unscored = sum(group.unscored for group in advantages.groups)
    return Metrics(
        {
            "zero_variance_rate": Mean(flat, len(counted)),
            "unscored_rate": Mean(unscored, len(advantages.usable)),
        },
        {},
    )
