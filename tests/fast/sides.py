"""Plain and fast scoring of the same tokens, and how far apart they are."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.fast.scoring import Kernel, packed_scores
from omni_grpo_core.training.config import LoraConfig
from omni_grpo_core.training.step import Scores, plain_scores, scoring
from omni_grpo_core.training.trainable import add_lora
from omni_grpo_core.types import Batch

TEMPERATURE = 1.5
"""The shipped policies are confident: at 1 nearly every logprob of a likely token is 0."""
LOGPROB = 1e-4
"""The issue's. Sums of float32 in another order: 2e-5 at most was measured, on random tokens, whose
logprobs are -30 and below."""
GRADIENT = 1e-3
"""The issue's, relative, for each parameter; 2e-5 at most was measured."""
FLOOR = 1e-5
"""Of the largest parameter's gradient: what a smaller one is compared with. The gradient of a key's
bias is 0, because a softmax does not see it: only rounding is there, 1e-7 of the largest."""


class Tokens(NamedTuple):
    """Right-padded completions, (N, C), and the weights of a loss that is linear in logprobs."""

    ids: Tensor
    mask: Tensor
    weights: Tensor


def ragged(policy: Policy, lengths: list[int], seed: int = 0) -> Tokens:
    """Any tokens that may be sampled, of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    allowed = (~policy.suppressed).nonzero()[:, 0].cpu()
    shape = len(lengths), max(lengths)
    ids = allowed[torch.randint(len(allowed), shape, generator=generator)]
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    return Tokens(ids, mask, torch.randn(shape, generator=generator))


def with_adapters(family: tiny.FamilyName) -> Policy:
    """The shipped policy with adapters that change it: as they begin, half of them get no
    gradient."""
    policy = load_policy(tiny.checkpoint_dir(family))
    add_lora(policy.model, LoraConfig(rank=2), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return policy


def plain(policy: Policy) -> Scores:
    return partial(plain_scores, policy)


def packed(policy: Policy, kernel: Kernel = "merged") -> Scores:
    return partial(packed_scores, policy, kernel=kernel)


class Scored(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    gradients: dict[str, Tensor]


def scored(
    policy: Policy, side: Scores, batch: Batch, tokens: Tokens, *, checkpointing: bool = False
) -> Scored:
    """Forward and backward pass, as the step makes them."""
    model = policy.model
    model.zero_grad(set_to_none=True)
    with scoring(model, checkpointing=checkpointing):
        found = side(batch, tokens.ids, tokens.mask, temperature=TEMPERATURE)
    # outside, where gradient checkpointing must run the layers as they ran before
    torch.autograd.backward((found.logprobs * tokens.weights).sum())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Scored(found.logprobs.detach(), found.entropy, gradients)


def apart(found: Scored, want: Scored) -> tuple[float, float]:
    """The largest difference of a logprob, and of a parameter's gradient, relative."""
    assert found.gradients.keys() == want.gradients.keys()
    norms = {name: float(gradient.norm()) for name, gradient in want.gradients.items()}
    floor = FLOOR * max(norms.values())
    worst = max(
        float((found.gradients[name] - gradient).norm()) / max(norms[name], floor)
        for name, gradient in want.gradients.items()
    )
    return float((found.logprobs - want.logprobs).abs().max()), worst


def assert_parity(found: Scored, want: Scored) -> None:
    logprob, gradient = apart(found, want)
    assert logprob <= LOGPROB
    assert gradient <= GRADIENT
    # entropies of at most log V = 7.6, in float32
    assert float((found.entropy - want.entropy).abs().max()) <= LOGPROB
