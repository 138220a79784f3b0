"""The settings of a training run, read and refused before torch is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.grpo.config import LossConfig, RolloutCorrection, Scale
from omni_grpo_core.rewards.compose import Component, Composition, Gate
from omni_grpo_core.rewards.load import load_reward
from omni_grpo_core.settings import Settings, load_settings
from omni_grpo_core.strict import merge, read_mapping

Schedule = Literal["constant", "linear", "cosine"]
Tower = Literal["image", "video", "audio", "text"]

FOREIGN: Mapping[str, str] = {
    "use_cache": "nothing to set: generation always has its cache and scoring never; with gradient "
    "checkpointing, transformers drops the cache and generates garbage",
    "num_generations": "settings: group_size",
    "max_prompt_length": "settings: max_prompt_length",
    "max_completion_length": "settings: max_new_tokens",
    "per_device_train_batch_size": "micro_batch_size, the completions of one scoring forward",
    "gradient_accumulation_steps": "batch_size, the completions of one optimizer step: it is cut "
    "into micro-batches without changing the loss",
    "use_audio_in_video": "settings: audio_in_video",
    "reward_funcs": "rewards",
    "learning_rate": "optimizer: lr",
}
"""Keys of other trainers, and what is meant by them here."""


@dataclass(frozen=True, slots=True)
class RewardEntry:
    """One reward of the composition; ``gate``: ``"format >= 1"`` lets it count only there."""

    weight: float = 1.0
    gate: str | None = None


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
    token's logprob between sampling and scoring, nats, before any update. ``preflight``: run every
    stage check of ``omni-grpo check`` on the first step's samples."""

    patience: int = 5
    garbage: float = 0.5
    drift: float = 1e-3
    preflight: bool = True


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A run. ``batch_size``: completions of one optimizer step, over all processes.
    ``micro_batch_size``: completions of one scoring forward; neither it nor the number of processes
    changes the loss. ``iterations``: optimizer steps on each rollout. ``freeze``: towers that do
    not learn. ``precision``: ``bfloat16`` runs forwards under autocast; trained weights stay
    float32. ``save_every``, ``eval_every``: steps; 0 is never (the last step is always saved).
    ``eval_data``: rows on which accuracy is measured, greedy and sampled.
    """

    checkpoint: str = ""
    data: str = ""
    out: str = ""
    processor: str | None = None
    root: str | None = None
    eval_data: str | None = None
    settings: Settings = field(default_factory=Settings)
    rewards: Mapping[str, RewardEntry] = field(default_factory=dict)
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
    precision: Literal["float32", "bfloat16"] = "float32"
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

    def composition(self) -> Composition:
        """The reward. Raises ``ConfigError`` for what is unknown or contradicts itself."""
        return Composition(
            [
                Component(
                    load_reward(name), entry.weight, Gate.read(entry.gate) if entry.gate else None
                )
                for name, entry in self.rewards.items()
            ]
        )


def load_train_config(path: Path) -> tuple[TrainConfig, tuple[str, ...]]:
    """Read and check a run's YAML or JSON; paths in it start from its own folder.

    ``settings`` go over the checkpoint's own ``omni_grpo.json``. Returns the configuration and
    warnings. Raises ``ConfigError``.
    """
    values = read_mapping(path)
    for key in values:
        if key in FOREIGN:
            raise ConfigError(str(path), got=f"key {key!r}", want=FOREIGN[key], fix="use that")
    here = path.absolute().parent
    places = ("checkpoint", "data", "out", "processor", "root", "eval_data")
    placed = {
        key: str(here / value) if key in places and isinstance(value, str) and value else value
        for key, value in values.items()
    }
    own = Settings()
    if isinstance(placed.get("checkpoint"), str):
        own = load_settings(Path(str(placed["checkpoint"])))
    config: TrainConfig = merge(replace(TrainConfig(), settings=own), placed, str(path))
    return config, check_config(config, world=int(os.environ.get("WORLD_SIZE", "1")))


def check_config(config: TrainConfig, *, world: int = 1) -> tuple[str, ...]:
    """What can be known without loading anything: returns warnings, raises ``ConfigError``."""
    _check_places(config)
    if not config.rewards:
        raise _bad("rewards", "none", "at least one, such as 'accuracy: {}'", "name them")
    config.composition()
    group = config.settings.group_size
    if group < 2:
        raise _bad("settings: group_size", str(group), "2 or more",
                   "an advantage compares the answers of one group")  # fmt: skip
    if config.batch_size < group or config.batch_size % group:
        raise _bad("batch_size", str(config.batch_size), f"a multiple of group_size {group}",
                   f"try {max(1, round(config.batch_size / group)) * group}")  # fmt: skip
    if config.prompts % world:
        raise _bad(
            "batch_size",
            f"{config.prompts} groups on {world} processes",
            "as many groups on each",
            f"try {world * group * -(-config.prompts // world)}",
        )
    micro = config.micro_batch_size
    if micro < 1 or (micro % group and group % micro):
        raise _bad("micro_batch_size", str(micro), f"a divisor or a multiple of group_size {group}",
                   f"try {group}")  # fmt: skip
    if not config.settings.temperature > 0:
        raise _bad("settings: temperature", f"{config.settings.temperature:g}", "above 0",
                   "greedy answers of a group are all the same")  # fmt: skip
    _check_numbers(config)
    _check_trained(config)
    warnings = []
    if group == 2 and config.scale == "group":
        warnings.append(
            "group_size 2 with scale 'group': every advantage is +1, -1 or 0, however much the two "
            "rewards differ; take a larger group, or scale 'none'"
        )
    return tuple(warnings)


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


def _check_places(config: TrainConfig) -> None:
    for key in ("checkpoint", "data", "out"):
        if not getattr(config, key):
            raise _bad(key, "nothing", "a path", f"add '{key}: …'")
    if not (Path(config.checkpoint) / "config.json").is_file():
        raise _bad("checkpoint", config.checkpoint, "a folder with a config.json", "correct it")
    for key in ("data", "eval_data", "root", "processor"):
        path = getattr(config, key)
        if path and not Path(path).exists():
            raise _bad(key, f"{path}, which is not there", "an existing path", "correct it")
    out = Path(config.out)
    above = next(folder for folder in (out, *out.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise _bad("out", config.out, "a folder that can be written to", f"see {above}")


def _check_numbers(config: TrainConfig) -> None:
    plan = config.optimizer
    limits: tuple[tuple[str, float, bool, str], ...] = (
        ("steps", config.steps, config.steps >= 1, "1 or more"),
        ("iterations", config.iterations, config.iterations >= 1, "1 or more"),
        ("save_every", config.save_every, config.save_every >= 0, "0 or more"),
        ("eval_every", config.eval_every, config.eval_every >= 0, "0 or more"),
        ("keep", config.keep, config.keep >= 1, "1 or more"),
        ("optimizer: lr", plan.lr, 0 < plan.lr < 1, "between 0 and 1"),
        ("optimizer: weight_decay", plan.weight_decay, plan.weight_decay >= 0, "0 or more"),
        ("optimizer: max_grad_norm", plan.max_grad_norm, plan.max_grad_norm > 0, "above 0"),
        ("optimizer: final", plan.final, 0 <= plan.final <= 1, "0 to 1"),
        ("optimizer: warmup_steps", plan.warmup_steps, plan.warmup_steps >= 0, "0 or more"),
        ("guard: patience", config.guard.patience, config.guard.patience >= 1, "1 or more"),
        ("guard: garbage", config.guard.garbage, 0 < config.guard.garbage <= 1, "0 to 1, above 0"),
        ("guard: drift", config.guard.drift, config.guard.drift > 0, "above 0"),
        ("settings: max_new_tokens", config.settings.max_new_tokens,
         config.settings.max_new_tokens >= 1, "1 or more"),
    )  # fmt: skip
    for item, got, ok, want in limits:
        if not ok:
            raise _bad(item, f"{got:g}", want, "correct it")
    if len(plan.betas) != 2 or not all(0 <= beta < 1 for beta in plan.betas):
        raise _bad("optimizer: betas", str(list(plan.betas)), "two, each from 0 to 1", "correct it")
    if config.eval_every and not config.eval_data:
        raise _bad("eval_every", f"{config.eval_every} without eval_data", "rows to measure on",
                   "name them, or leave eval_every out")  # fmt: skip
    if config.loss.loss_type == "dr_grpo" and (
        config.loss.max_completion_length != config.settings.max_new_tokens
    ):
        raise _bad(
            "loss: max_completion_length",
            str(config.loss.max_completion_length),
            f"settings: max_new_tokens, {config.settings.max_new_tokens}",
            "dr_grpo divides by the cap of a completion",
        )


def _check_trained(config: TrainConfig) -> None:
    if set(config.freeze) >= {"image", "video", "audio", "text"}:
        raise _bad("freeze", "everything", "something left to train", "leave one out")
    if ("image" in config.freeze) != ("video" in config.freeze):
        raise _bad("freeze", ", ".join(config.freeze), "image and video, or neither",
                   "one tower sees both")  # fmt: skip
    if config.lora is not None and config.freeze:
        raise _bad("freeze", f"{', '.join(config.freeze)} with lora", "one of the two",
                   "with lora everything but the adapter is frozen")  # fmt: skip
    if config.lora is not None and (config.lora.rank < 1 or not config.lora.target_modules):
        raise _bad("lora", f"rank {config.lora.rank}, {len(config.lora.target_modules)} targets",
                   "rank 1 or more, and targets", "correct it")  # fmt: skip


def _bad(item: str, got: str, want: str, fix: str) -> ConfigError:
    return ConfigError(item, got=got, want=want, fix=fix)


def as_values(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return asdict(config)
