"""Which weights learn, in which precision, and what scores the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.lora import adapter_off, add_lora, freeze
from omni_grpo_core.training.step import MicroBatch, Scorer

Reference = Callable[[MicroBatch], Tensor]
"""Logprobs of a micro-batch's completions under the reference, (N, C), without gradient."""


def choose_trainable(
    policy: Policy, config: TrainConfig, autocast: Callable[[], AbstractContextManager[Any]]
) -> Reference | None:
    """Freeze what is not to learn, add adapters, and give the reference: ``None`` at beta 0.

    The reference is the policy as it stands now: with adapters the same weights with the adapter
    off, else a copy. In bfloat16, frozen weights are stored in it; learning ones stay float32,
    because an update of 1e-6 of a weight is lost in three digits.
    """
    model = policy.model
    if config.loss.beta > 0 and config.lora is None:
        scored_by = replace(policy, model=copy.deepcopy(model).requires_grad_(False).eval())
    else:
        scored_by = policy
    if config.lora is None:
        freeze(model, config.freeze)
    else:
        add_lora(model, config.lora, config.seed)
    if config.precision == "bfloat16":
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    if config.loss.beta == 0:
        return None
    scorer = Scorer(scored_by, config.settings.temperature)

    def reference(micro: MicroBatch) -> Tensor:
        plain = nullcontext() if config.lora is None else adapter_off(model)
        with torch.no_grad(), autocast(), plain:
            logprobs: Tensor = scorer(micro.batch, micro.ids, micro.mask)[0]
        return logprobs.float()

    return reference
