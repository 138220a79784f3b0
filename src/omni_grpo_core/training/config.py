"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from omni_grpo_core.losses.config import LossConfig, RolloutCorrection, Scale
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.rewards.call import RewardFunction
from omni_grpo_core.rewards.compose import Component, Composition, Gate
from omni_grpo_core.rewards.endpoint import Endpoint
from omni_grpo_core.rewards.load import BY_JUDGE, load_reward

Precision = Literal["float32", "bfloat16"]
SectionName = Literal["context", "think", "answer"]
Schedule = Literal["constant", "linear", "cosine"]
Tower = Literal["image", "video", "audio", "text"]

DRIFT: Mapping[Precision, float] = {"float32": 1e-3, "bfloat16": 0.5}
"""Nats. Measured on the tiny checkpoint, 18 steps of 32 completions at temperatures 1 to 3: up to
2e-6 and 0.081; sampling at 1.3 times the temperature moves some token by more than 1."""

TOWER_PREFIX: Mapping[Tower, tuple[str, ...]] = {
    "image": ("visual.",),
    "video": ("visual.",),
    "audio": ("audio_tower.",),
    "text": ("model.", "lm_head."),
}
"""Parameters of a thinker by what they are for."""


@dataclass(frozen=True, slots=True)
class RewardEntry:
    """One reward of the composition; ``gate``: ``"format >= 1"`` lets it count only there.

    ``span``: the section that it judges. Such a partial reward is not in the total: its own
    advantage, times ``weight``, is added on the tokens of that section.
    """

    weight: float = 1.0
    gate: str | None = None
    span: SectionName | None = None


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW. ``warmup_steps`` and the schedule count optimizer steps; ``linear`` and ``cosine``
    fall to ``final`` of ``lr`` at the last one."""

    lr: float = 1e-6
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    final: float = 0.0


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) on linear layers of the text model, by peft; the rest of
    the model is frozen and, the adapter off, is the reference. There is no dropout: the policy that
    is scored must be the one that sampled."""

    rank: int = 16
    alpha: int = 32
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """When a run is stopped. ``patience``: steps in a row that a reward may be dead.
    ``garbage``: share of degenerate completions in one step. ``drift``: largest difference of a
    token's logprob between sampling and scoring, nats, before any update; ``None`` is the
    precision's own, :data:`DRIFT`. ``preflight``: run every stage check of ``omni-grpo check`` on
    the first step's samples, in float32."""

    patience: int = 5
    garbage: float = 0.5
    drift: float | None = None
    preflight: bool = True


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A run. ``batch_size``: completions of one optimizer step, over all processes.
    ``micro_batch_size``: completions of one scoring forward; neither it nor the number of processes
    changes the loss. ``iterations``: optimizer steps on each rollout. ``freeze``: towers that do
    not learn. ``precision``: ``bfloat16`` runs forwards under autocast; trained weights stay
    float32. ``save_every``, ``eval_every``: steps; 0 is never (the last step is always saved).
    ``eval_data``: rows on which accuracy is measured, greedy and sampled. ``judge``: the endpoint
    that the rewards ``context`` and ``reasoning`` ask.
    """

    checkpoint: str = ""
    data: str = ""
    out: str = ""
    processor: str | None = None
    root: str | None = None
    eval_data: str | None = None
    settings: Settings = field(default_factory=Settings)
    rewards: Mapping[str, RewardEntry] = field(default_factory=dict)
    judge: Endpoint | None = None
    steps: int = 100
    batch_size: int = 48
    micro_batch_size: int = 8
    iterations: int = 1
    scale: Scale = "group"
    drop_zero_variance: bool = False
    loss: LossConfig = field(default_factory=LossConfig)
    correction: RolloutCorrection | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig | None = None
    freeze: tuple[Tower, ...] = ()
    gradient_checkpointing: bool = False
    precision: Precision = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 0
    save_every: int = 50
    keep: int = 2
    eval_every: int = 0
    guard: GuardConfig = field(default_factory=GuardConfig)
    trackers: tuple[str, ...] = ("tensorboard",)

    @property
    def prompts(self) -> int:
        """Groups of one optimizer step, over all processes."""
        return self.batch_size // self.settings.group_size

    @property
    def drift_limit(self) -> float:
        """What the guard lets sampling and scoring differ by, nats."""
        return DRIFT[self.precision] if self.guard.drift is None else self.guard.drift

    def composition(self, load: Callable[[str], RewardFunction] | None = None) -> Composition:
        """The reward; ``load`` in the place of what loads each by its name. Raises ``ConfigError``
        for what is unknown or contradicts itself."""
        return Composition(
            [
                Component(
                    (load or self._load)(name),
                    entry.weight,
                    Gate.read(entry.gate) if entry.gate else None,
                    partial=entry.span is not None,
                )
                for name, entry in self.rewards.items()
            ]
        )

    def _load(self, name: str) -> RewardFunction:
        if self.judge is None or name not in BY_JUDGE:
            return load_reward(name)
        from omni_grpo_core.rewards.judge import Judge

        return load_reward(name, Judge(self.judge))


def learning_rate(config: OptimizerConfig, update: int, updates: int) -> float:
    """The rate of optimizer step ``update`` (from 0) of ``updates``.

    >>> plan = OptimizerConfig(lr=1.0, schedule="linear", warmup_steps=2)
    >>> [learning_rate(plan, at, 6) for at in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    done = (update - config.warmup_steps) / max(1, updates - config.warmup_steps)
    match config.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1 - done
        case "cosine":
            share = (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.final + (1 - config.final) * share)


def as_values(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return asdict(config)
