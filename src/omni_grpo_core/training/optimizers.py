"""The optimizer of a run, by its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from omni_grpo_core.io.extras import extra
from omni_grpo_core.training.config import TrainConfig


def make_optimizer(config: TrainConfig, learning: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Raises ``MissingExtra`` for ``adamw_8bit`` without torchao."""
    plan, how = config.optimizer, config.trained_weights
    settings: dict[str, Any] = {"lr": plan.lr, "weight_decay": plan.weight_decay}
    if plan.name == "adafactor":
        # all weights at once would need another copy of them
        return torch.optim.Adafactor(learning, foreach=False, **settings)
    settings["betas"] = (plan.betas[0], plan.betas[1])
    if plan.name == "adamw_8bit":
        with extra("low-memory"):
            from torchao.optim import AdamW8bit
        rounding = how == "bfloat16_stochastic"
        eight_bit: torch.optim.Optimizer = AdamW8bit(
            learning, bf16_stochastic_round=rounding, **settings
        )
        return eight_bit
    kind = MasterAdamW if how == "bfloat16_master" else torch.optim.AdamW
    # the default on CUDA holds another copy of all weights during its step
    return kind(learning, fused=config.device == "cuda", **settings)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """torchao compiles its step for a rate that is a tensor, which a saved state makes one of the
    CPU: so it is one always."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(rate) if isinstance(group["lr"], Tensor) else rate


class MasterAdamW(torch.optim.AdamW):
    """AdamW for bfloat16 weights, whose eight bits an update of 1e-6 of them would not change: it
    updates float32 copies, which are part of its state, and rounds them into the weights (arXiv
    1710.03740, section 3.1). Weights are taken one by one, so that one gradient at a time is
    converted."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_of(weight, group)

    def _step_of(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["master"] = weight.to(torch.float32, copy=True)
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
            state["step"] = torch.zeros((), device=weight.device if group["fused"] else "cpu")
        adamw(
            [state["master"]], [weight.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]],  # type: ignore[union-attr]
            [], [state["step"]], fused=group["fused"], foreach=False, amsgrad=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        weight.copy_(state["master"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch casts what it loads to the weights' dtype: master and moments are put in again."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for weight, key in zip(weights, keys, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step":
                    self.state[weight][name] = value.to(weight.device)
