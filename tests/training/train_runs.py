"""Short training runs on the shipped checkpoint, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from omni_grpo_core import tiny
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.training.config import GuardConfig, OptimizerConfig, RewardEntry, TrainConfig


def short(out: Path, **changes: Any) -> TrainConfig:
    """Three steps of two groups of four, on a reward that any policy earns in part; at a high
    temperature, so that the answers of a group differ."""
    settings = replace(
        load_settings(tiny.checkpoint_dir()), group_size=4, max_new_tokens=8, temperature=3.0
    )
    base = TrainConfig(
        checkpoint=str(tiny.checkpoint_dir()),
        data=str(tiny.data_file()),
        out=str(out),
        settings=settings,
        rewards={"toy_rewards:early_letters": RewardEntry()},
        steps=3,
        batch_size=8,
        micro_batch_size=4,
        optimizer=OptimizerConfig(lr=1e-3),
        save_every=1,
        # a policy limited to 8 tokens always reaches the limit
        guard=GuardConfig(preflight=False, patience=99, garbage=1.0),
        trackers=(),
    )
    return replace(base, **changes)


def log(out: Path) -> list[dict[str, Any]]:
    """The log, without what depends on the clock, or on what else a device holds."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    costs = ("seconds", "memory/")
    return [{k: v for k, v in line.items() if not k.startswith(costs)} for line in lines]


def moments(out: Path, step: int) -> Mapping[int, torch.Tensor]:
    """AdamW's first moments after the first step: a tenth of its gradients."""
    state = saved(out, step)["optimizer"]
    return {key: entry["exp_avg"] for key, entry in state["state"].items()}


def saved(out: Path, step: int) -> Any:
    """A state that one process saved, with the weights that learn and the optimizer's state."""
    return torch.load(out / "state" / f"{step:06d}" / "part-1-of-1.bin", weights_only=True)
