"""Three optimizer steps of a small model, whose gradients stay on the device or leave it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from omni_grpo_core.losses import LossConfig
from omni_grpo_core.training.host_gradients import HostGradients
from omni_grpo_core.training.micro_batches import MicroBatch
from omni_grpo_core.training.optimizers import MasterAdamW
from omni_grpo_core.training.step import SingleProcess, StepPlan, Update, optimize
from omni_grpo_core.types import Batch

PLAN = StepPlan(LossConfig(), None, iterations=2, max_grad_norm=0.01, gradient_checkpointing=False)
ROWS, TOKENS, VOCABULARY = 6, 5, 12


class Small(nn.Module):
    """A weight that is used twice, one that only rows with token 0 reach, one that none does."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.seldom = nn.Parameter(torch.ones(8))
        self.never = nn.Parameter(torch.ones(3))
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.to(device, dtype)

    def forward(self, batch: Batch, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        ids = ids.to(self.never.device)
        hidden = torch.tanh(self.mix(self.embed(ids)))
        if bool((ids == 0).any()):
            hidden = hidden * self.seldom
        logprobs = self.head(self.mix(hidden)).float().log_softmax(-1)
        return logprobs.gather(-1, ids[..., None])[..., 0], torch.zeros(
            ids.shape, device=ids.device
        )


def window(parts: int) -> list[MicroBatch]:
    """Token 0 is in the first row alone."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (ROWS, TOKENS))
    ids[0, 0] = 0
    mask = torch.ones_like(ids, dtype=torch.bool)
    advantages, sampled = torch.randn(ROWS), torch.full((ROWS, TOKENS), -2.0)
    fields = [tensor.chunk(parts) for tensor in (ids, mask, mask, advantages, sampled)]
    return [MicroBatch(cast(Batch, None), *one) for one in zip(*fields, strict=True)]


class Ran(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: list[Tensor]
    states: list[Any]


OPTIMIZERS = ("adamw", "adafactor", "master")


def make_optimizer(name: str, learning: list[nn.Parameter]) -> torch.optim.Optimizer:
    fused = learning[0].is_cuda
    if name == "adafactor":
        return torch.optim.Adafactor(learning, lr=0.01, foreach=False)
    kind = MasterAdamW if name == "master" else torch.optim.AdamW
    return kind(learning, lr=0.01, fused=fused)


def three_steps(
    name: str,
    parts: int,
    host_of: Callable[[list[nn.Parameter]], HostGradients] | None = None,
    device: str = "cpu",
) -> Ran:
    """``host_of``: makes where the gradients are, if not on the device. Two updates on each window
    of ``parts`` micro-batches."""
    torch.manual_seed(0)
    model = Small(torch.bfloat16 if name == "master" else torch.float32, device)
    learning = [*model.parameters()]
    optimizer, updates = make_optimizer(name, learning), list[Update]()
    host = None if host_of is None else host_of(learning)

    def may_step(update: Update) -> bool:
        assert host is None or all(p.grad is None for p in learning)
        return True

    with nullcontext() if host is None else host.attached():
        for _ in range(3):
            updates += optimize(
                PLAN, SingleProcess(), model, model, optimizer, window(parts),
                may_step=may_step, host=host,
            )  # fmt: skip
    assert len(updates) == 6
    assert all(update.stepped for update in updates)
    return Ran(
        [update.loss for update in updates],
        [update.grad_norm for update in updates],
        [weight.detach().clone() for weight in learning],
        [{k: v.tolist() for k, v in optimizer.state[weight].items()} for weight in learning],
    )


def small_blocks(learning: list[nn.Parameter]) -> HostGradients:
    """Few wait on the device, and two come back together."""
    return HostGradients(learning, outstanding=300, at_once=300)


def same(found: Ran, wanted: Ran) -> bool:
    weights = zip(found.weights, wanted.weights, strict=True)
    return (
        found[:2] == wanted[:2]
        and found.states == wanted.states
        and all(torch.equal(one, other) for one, other in weights)
    )
