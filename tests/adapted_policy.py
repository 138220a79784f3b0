"""A policy with adapters, as tests of rollout engines need it."""

from __future__ import annotations

import torch

from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.tiny import checkpoint_dir
from omni_grpo_core.training.config import LoraConfig
from omni_grpo_core.training.trainable import add_lora


def adapted(size: float) -> Policy:
    """``size``: of the adapters' second factors. At the start of a run they are 0, after some steps
    about 0.1."""
    policy, generator = load_policy(checkpoint_dir()), torch.Generator().manual_seed(0)
    add_lora(policy.model, LoraConfig(rank=4), seed=0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size, generator=generator)
    return policy
