"""The log line of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omni_grpo_core.losses.metrics import Metrics
from omni_grpo_core.rewards import health
from omni_grpo_core.training.step import Update


def step_record(
    step: int, rewards: health.Step, rollout: Metrics, updates: Sequence[Update]
) -> dict[str, Any]:
    """Name to number, ``None`` where nothing was counted. ``reward``: mean total of the scored
    completions; ``reward/NAME``: of each reward. Values of the second and later iterations on the
    same rollout have ``/1``, ``/2`` … behind their names."""
    record: dict[str, Any] = {"step": step, "reward": _mean(rewards.totals)}
    record |= {f"reward/{name}": _mean(column) for name, column in rewards.scores.items()}
    record |= rollout.values()
    for at, update in enumerate(updates):
        suffix = f"/{at}" if at else ""
        values = {"loss": update.loss, "grad_norm": update.grad_norm, **update.metrics.values()}
        record |= {f"{name}{suffix}": value for name, value in values.items()}
    return record


def _mean(values: Sequence[float | None]) -> float | None:
    scored = [value for value in values if value is not None]
    return sum(scored) / len(scored) if scored else None
