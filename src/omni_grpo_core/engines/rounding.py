"""How far two correct ways of computing the same policy may be apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.engines.sides import Sampled, Sides

DRAWS = 2
"""Times that it is measured: the largest of some hundred logprobs varies."""


def rounding(sides: Sides, sampled: Sampled) -> float:
    """Largest change of a token's logprob, nats, where every layer rounds otherwise. It depends on
    the weights far more than on the kernels: some amplify it a hundredfold."""
    gap, worst = sampled.gap, 0.0
    for seed in range(DRAWS):
        with rounded_otherwise(sides.policy.model, seed):
            other = sides.gap(sampled.inputs, sampled.tokens, sampled.temperature)
        worst = max(worst, float((other - gap).abs().max()))
    return worst


@contextmanager
def rounded_otherwise(model: Any, seed: int) -> Iterator[None]:
    """Every innermost module's output, times 1 plus at most its dtype's precision at random: what
    kernels do that sum in another order or keep intermediate values in another register."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)

    def changed(_module: Any, _inputs: Any, output: Any) -> Any:
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            return None
        noise = torch.rand(output.shape, generator=generator, device=output.device) * 2 - 1
        return output * (1 + torch.finfo(output.dtype).eps * noise).to(output.dtype)

    leaves = (module for module in model.modules() if not list(module.children()))
    hooks = [module.register_forward_hook(changed) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
