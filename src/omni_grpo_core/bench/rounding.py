"""Whether a difference in bfloat16 is rounding: each way against the plain one in float32.

The weights are bfloat16 numbers, so that the same model can be run in float32. A way that computes
something else is further from that than the plain step in bfloat16, and further than the plain step
from itself when each completion is scored alone instead of in a padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from omni_grpo_core.bench.shapes import Setting, make_batch
from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.fast.step import FastStep
from omni_grpo_core.training.step import Scores, plain_scores, scoring
from omni_grpo_core.types import Batch, Row

Side = Literal["plain", "alone", "fast"]
"""``plain``: a padded batch of all completions. ``alone``: the plain step, one completion at a
time. ``fast``: the packed row."""


class _Passes(NamedTuple):
    """Logprobs of all sampled tokens, (tokens,), and the gradient of every trained parameter."""

    logprobs: Tensor
    gradients: list[Tensor]


def rounding(policy: Policy, setting: Setting, *, checkpointing: bool = True) -> dict[str, Any]:
    """Errors of each :data:`Side`, in nats and relative to a parameter's gradient; ``times_plain``:
    its root mean square error over the plain one's, and the same for each parameter's gradient.
    ``apart``: from the plain one, in nats.

    Completions are ragged: from half of ``setting.tokens`` to all.
    """
    dtype = policy.model.dtype
    rounding = _Rounding(policy, setting, checkpointing)
    _cast(policy, torch.float32)
    exact = rounding.passes("plain")
    _cast(policy, dtype)
    sides: tuple[Side, ...] = ("plain", "alone", "fast")
    logprobs: dict[Side, Tensor] = {}
    errors: dict[Side, Tensor] = {}
    for side in sides:
        found = rounding.passes(side)
        logprobs[side] = found.logprobs
        errors[side] = _apart(found.gradients, exact.gradients)
    norms = torch.tensor([float(gradient.norm()) for gradient in exact.gradients])
    nats = {side: (logprobs[side] - exact.logprobs).abs() for side in sides}
    apart = {side: (logprobs[side] - logprobs["plain"]).abs() for side in sides}
    return {
        "tokens": exact.logprobs.numel(),
        "parameters": len(norms),
        "sides": {
            side: {
                "nats": {**_spread(nats[side]), "rms": _rms(nats[side])},
                "apart": _spread(apart[side]),
                "gradient": _spread(errors[side] / norms.clamp_min(1e-30)),
                "times_plain": {
                    "nats": _rms(nats[side]) / max(_rms(nats["plain"]), 1e-30),
                    "gradient": _spread(errors[side] / errors["plain"].clamp_min(1e-30)),
                },
            }
            for side in sides
        },
    }


class _Rounding:
    def __init__(self, policy: Policy, setting: Setting, checkpointing: bool) -> None:
        self.policy, self.group, self.checkpointing = policy, setting.group, checkpointing
        self.batch = make_batch(policy, setting)
        generator = torch.Generator().manual_seed(0)
        allowed = (~policy.suppressed).nonzero()[:, 0].cpu()
        shape = setting.completions, setting.tokens
        self.ids = allowed[torch.randint(len(allowed), shape, generator=generator)]
        shortest = -(-setting.tokens // 2)
        lengths = torch.randint(shortest, setting.tokens + 1, shape[:1], generator=generator)
        self.mask = torch.arange(setting.tokens) < lengths[:, None]
        self.advantages = torch.randn(shape[0], 1, generator=generator)

    def passes(self, side: Side) -> _Passes:
        plain: Scores = partial(plain_scores, self.policy)
        scores = FastStep(self.policy).scores if side == "fast" else plain
        rows = self.batch.rows
        if side == "alone":
            parts = [
                self._pass(scores, [rows[at // self.group]], slice(at, at + 1))
                for at in range(len(self.ids))
            ]
        else:
            parts = [self._pass(scores, rows, slice(None))]
        learning = [p for p in self.policy.model.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
        self.policy.model.zero_grad(set_to_none=True)
        return _Passes(torch.cat(parts), gradients)

    def _pass(self, scores: Scores, rows: Sequence[Row], at: slice) -> Tensor:
        """Logprobs, (tokens,); its gradients are added to those that are there."""
        batch: Batch = collate(rows, self.policy.pad_token_id)
        ids, mask = self.ids[at], self.mask[at]
        length = int(mask.sum(1).max())
        ids, mask = ids[:, :length], mask[:, :length]
        with scoring(self.policy.model, checkpointing=self.checkpointing):
            found = scores(batch, ids, mask, temperature=1.0).logprobs
            weights = (self.advantages[at] * mask).to(found.device)
            torch.autograd.backward(-(found * weights).sum() / self.mask.sum())
        return found.detach()[mask.to(found.device)].float().cpu()


def _cast(policy: Policy, dtype: torch.dtype) -> None:
    """Parameters alone: rotary frequencies are float32 in every model."""
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.to(dtype)


def _apart(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
    """Norm of each parameter's error."""
    pairs = zip(found, exact, strict=True)
    return torch.tensor([float((one.float() - other).norm()) for one, other in pairs])


def _rms(errors: Tensor) -> float:
    return float(errors.double().square().mean().sqrt())


def _spread(errors: Tensor) -> dict[str, float]:
    return {
        "mean": float(errors.mean()),
        "median": float(errors.median()),
        "p99": float(errors.float().quantile(0.99)),
        "max": float(errors.max()),
    }
