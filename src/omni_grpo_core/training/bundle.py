"""What a training step leaves behind: a trace to inspect and replay, and a log line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.losses.advantages import Advantages
from omni_grpo_core.losses.metrics import Metrics
from omni_grpo_core.losses.spans import PartialAdvantage
from omni_grpo_core.pipeline.inputs import Inputs, header
from omni_grpo_core.rewards import health
from omni_grpo_core.rewards.compose import Composed
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.step import Update
from omni_grpo_core.types import Rollout, Stage, StageRecord, Trace


def step_trace(
    policy: Policy,
    config: TrainConfig,
    inputs: Inputs,
    rolled: Rollout,
    scored: Composed,
    advantages: Advantages,
    partial: Sequence[PartialAdvantage],
    record: Mapping[str, Any],
) -> Trace:
    """Stages of this process's part of a step. ``advantage`` holds the values of all processes
    (with partial rewards: under ``total``, and this process's partial ones beside it by name);
    ``loss`` the step's log line. Decoded media are left out: ``sample`` names their files."""
    values: dict[Stage, object] = {
        "sample": inputs.samples,
        "conversation": inputs.conversations,
        "text": inputs.prompts,
        "batch": inputs.batch,
        "completion": rolled,
        "parsed": tuple(parse(completion.text) for completion in rolled.completions),
        "reward": {**scored.scores, "total": scored.total},
        "advantage": {"total": advantages.values, **{part.name: part.values for part in partial}}
        if partial
        else advantages.values,
        "loss": {name: value for name, value in record.items() if value is not None},
    }
    stages = tuple(StageRecord(stage, value, (), 0.0) for stage, value in values.items())
    return Trace({**header(policy, config.settings), "seed": str(config.seed)}, stages)


def step_record(
    step: int, rewards: health.Step, rollout: Metrics, updates: Sequence[Update]
) -> dict[str, Any]:
    """Name to number, ``None`` where nothing was counted. ``reward``: mean total of the scored
    completions; ``reward/NAME``: mean of each reward. Names of values from the second and later
    iterations on the same rollout end in ``/1``, ``/2`` …"""
    record: dict[str, Any] = {"step": step, "reward": health.mean(rewards.totals)}
    record |= {f"reward/{name}": health.mean(column) for name, column in rewards.scores.items()}
    record |= rollout.values()
    for at, update in enumerate(updates):
        suffix = f"/{at}" if at else ""
        values = {"loss": update.loss, "grad_norm": update.grad_norm, **update.metrics.values()}
        record |= {f"{name}{suffix}": value for name, value in values.items()}
    return record
