"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from omni_grpo_core.losses import Aggregation, LossConfig, RolloutCorrection, Scale
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.rewards.call import RewardFunction
from omni_grpo_core.rewards.compose import Component, Composition, Gate
from omni_grpo_core.rewards.endpoint import Endpoint
from omni_grpo_core.rewards.load import BY_JUDGE, load_reward
from omni_grpo_core.tolerances import DRIFT, ENGINE

Precision = Literal["float32", "bfloat16"]
TrainedWeights = Literal["float32", "bfloat16_master", "bfloat16_stochastic"]
OptimizerName = Literal["adamw", "adamw_8bit", "adafactor"]
SectionName = Literal["context", "think", "answer"]
Schedule = Literal["constant", "linear", "cosine"]
Tower = Literal["image", "video", "audio", "text"]
Fast = Literal["auto", "on", "off"]
RolloutBy = Literal["own", "vllm"]

TOWER_PREFIX: Mapping[Tower, tuple[str, ...]] = {
    "image": ("visual.",),
    "video": ("visual.",),
    "audio": ("audio_tower.",),
    "text": ("model.", "lm_head."),
}
"""Prefixes of a thinker's parameters, by tower."""

OPTIMIZERS: Mapping[TrainedWeights, tuple[OptimizerName, ...]] = {
    "float32": ("adamw", "adamw_8bit", "adafactor"),
    "bfloat16_master": ("adamw",),
    "bfloat16_stochastic": ("adamw_8bit",),
}
"""What can update weights that are stored so. A bfloat16 weight needs an optimizer that does not
round each update to nothing. Second moments in bfloat16 would never fall again: a thousandth of
them, which is what ``betas`` of 0.999 change in a step, is less than they can resolve."""


@dataclass(frozen=True, slots=True)
class RewardEntry:
    """One reward of the composition."""

    weight: float = 1.0
    """Weight of its scores in the total, above 0."""
    gate: str | None = None
    """``"format >= 1"``: it counts only where that holds; ``None``: always."""
    span: SectionName | None = None
    """The section that it judges. Such a partial reward is not part of the total: its own
    advantage, times ``weight``, is added on the tokens of that section."""


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """The optimizer and its schedule, which counts optimizer steps."""

    name: OptimizerName = "adamw"
    """``adamw``: torch's, fused on CUDA; two float32 moments. ``adamw_8bit``: torchao's, moments in
    eight bits (arXiv 2110.02861), extra ``low-memory``. ``adafactor``: torch's (arXiv 1804.04235),
    row and column sums in place of second moments, no first ones; its ``lr`` is relative to each
    weight's root mean square."""
    lr: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's two betas; ``adafactor`` has none."""
    weight_decay: float = 0.0
    """Decoupled."""
    max_grad_norm: float = 1.0
    """The norm to which gradients are clipped."""
    schedule: Schedule = "constant"
    """``linear`` and ``cosine`` fall to ``final`` of ``lr`` at the last step."""
    warmup_steps: int = 0
    """Steps in which the rate rises linearly to ``lr``."""
    final: float = 0.0
    """Fraction of ``lr`` at the last step."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) on linear layers of the text model, by peft; the rest of
    the model is frozen and, with the adapters off, is the reference. There is no dropout: the
    policy that is scored must be the one that sampled."""

    rank: int = 16
    """Rank of the adapters' matrices."""
    alpha: int = 32
    """The adapters' output is scaled by ``alpha / rank``."""
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Names of the linear layers that get an adapter; in a mixture, its experts get none."""


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """When a run is stopped."""

    patience: int = 5
    """Number of consecutive steps that a reward may be dead."""
    garbage: float = 0.5
    """Share of degenerate completions in one step that stops the run."""
    drift: float | None = None
    """Largest difference of a token's logprob between sampling and scoring, nats, before any
    update; ``None``: the default of the precision (``tolerances.DRIFT``)."""
    preflight: bool = True
    """Run every stage check of ``omni-grpo check`` on the first step's samples."""


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """The rollout engine of a run."""

    place: Literal["process", "inside"] = "process"
    """``process``: vLLM in a process of its own, which is started again if it is killed or hangs;
    ``inside``: in the trainer's, without copies of the media, and lost with it."""
    url: str | None = None
    """Of a server that runs already (``python -m omni_grpo_core.engines.server``) on this machine,
    instead of a process that the run starts."""
    seconds: float = 600.0
    """How long a call may take before the engine counts as hung."""
    lora: Literal["merged", "adapter"] = "merged"
    """How adapters reach the engine: ``merged`` into the weights, all of which are sent before each
    rollout, or as an ``adapter`` that vLLM applies, which alone is sent after the first time."""
    prove_every: int = 50
    """Steps between two proofs that engine and trainer agree; one is before the first step, and one
    with the first weights that learned something."""
    max_model_len: int = 4096
    """Most tokens of a prompt and its completion."""
    max_num_seqs: int = 64
    """Completions that are sampled at a time."""
    memory: float = 0.4
    """Share of a GPU's memory for the engine's weights and key-value cache."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A training run."""

    checkpoint: str = ""
    """Folder of the policy that is trained."""
    data: str = ""
    """Rows to train on: a file, a folder of ``datasets``, or ``hub:NAME``."""
    data_format: str | None = None
    """Row format of ``data`` and ``eval_data``, by name; ``None``: as each row's keys show."""
    out: str = ""
    """Folder of the run: log, traces, states and the model."""
    processor: str | None = None
    """Folder of the processor; ``None``: the checkpoint."""
    root: str | None = None
    """Folder that the rows' media paths are relative to; ``None``: that of the data."""
    eval_data: str | None = None
    """Rows on which accuracy is measured, greedy and sampled; ``None``: never."""
    settings: Settings = field(default_factory=Settings)
    """Settings of each pass: media, lengths, group size, temperature."""
    rewards: Mapping[str, RewardEntry] = field(default_factory=dict)
    """By name: that of a shipped reward, or ``module:function``."""
    judge: Endpoint | None = None
    """The endpoint that the rewards ``context`` and ``reasoning`` call."""
    steps: int = 100
    """Rollouts in the run."""
    batch_size: int = 48
    """Completions per optimizer step, over all processes."""
    micro_batch_size: int = 8
    """Completions per scoring forward; neither it nor the number of processes changes the loss."""
    iterations: int = 1
    """Optimizer steps on each rollout."""
    scale: Scale = "group"
    """What advantages are divided by, see :mod:`~omni_grpo_core.losses.advantages`."""
    aggregation: Aggregation = "sum_then_normalize"
    """How several rewards become one advantage: of their weighted mean, or
    (``normalize_then_sum``, GDPO) each compared within its groups before they are added up, see
    :func:`~omni_grpo_core.losses.advantages.gdpo_advantages`."""
    drop_zero_variance: bool = False
    """Leave groups without a signal out of the loss (DAPO's dynamic sampling)."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The policy loss."""
    correction: RolloutCorrection | None = None
    """For a rollout whose probabilities are not the trainer's; ``None``: no correction."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule."""
    lora: LoraConfig | None = None
    """Adapters to train instead of the weights; ``None`` trains the weights."""
    freeze: tuple[Tower, ...] = ()
    """Towers that do not learn."""
    fast: Fast = "auto"
    """The step that computes what a group shares once, in packed rows. ``auto``: on a CUDA device
    where nothing speaks against it; ``on``: or an error; ``off``: the plain step, to compare."""
    rollout: RolloutBy = "own"
    """What samples the completions: the policy itself, or vLLM, on the same media and weights."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """How vLLM runs, with rollout: vllm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    offload_gradients: bool = False
    """Keep gradients in the host's memory: they leave the device as they are made, and come back a
    part at a time for the optimizer (as in ZeRO-Offload, arXiv 2101.06840). The same numbers; one
    process."""
    precision: Precision = "float32"
    """``bfloat16`` runs forwards under autocast, and stores what does not learn in bfloat16."""
    trained_weights: TrainedWeights = "float32"
    """How trained weights are stored, other than ``float32`` with precision ``bfloat16`` only.
    ``bfloat16_master``: bfloat16, with a float32 copy in the optimizer (arXiv 1710.03740).
    ``bfloat16_stochastic``: bfloat16 alone; an update is rounded up or down at random, so that
    small ones are not lost (arXiv 2010.06192), by ``optimizer: name: adamw_8bit``."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The device of the run."""
    seed: int = 0
    """Seed of rollouts and of the order of rows."""
    full_determinism: bool = False
    """Gradients by kernels that always add up in the same order: on a GPU too a resumed run equals
    one that was never interrupted, bit by bit. Slower."""
    save_every: int = 50
    """Steps between saved states; 0: never (the last step is always saved)."""
    keep: int = 2
    """How many of the newest saved states are kept."""
    eval_every: int = 0
    """Steps between measurements on ``eval_data``; 0: never."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """When the run is stopped."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go besides the log, by Accelerate's names."""

    @property
    def prompts(self) -> int:
        """Groups per optimizer step, over all processes."""
        return self.batch_size // self.settings.group_size

    @property
    def loaded_as(self) -> Precision:
        """The dtype of the weights as they are loaded, which is that of most of them in the run."""
        if self.lora is None and self.trained_weights == "float32":
            return "float32"
        return self.precision

    @property
    def storage(self) -> str:
        """How weights are stored and updated, in words."""
        learning = "adapters" if self.lora is not None else "what learns"
        how = {
            "float32": "float32",
            "bfloat16_master": "bfloat16 with float32 masters",
            "bfloat16_stochastic": "bfloat16 with stochastic rounding",
        }[self.trained_weights]
        return f"{learning} {how}, updated by {self.optimizer.name}; all else {self.precision}"

    @property
    def drift_limit(self) -> float:
        """The largest difference between sampling and scoring that the guard accepts, nats."""
        if self.guard.drift is not None:
            return self.guard.drift
        foreign = self.rollout == "vllm" and self.precision == "bfloat16"
        return ENGINE["bfloat16"].worst if foreign else DRIFT[self.precision]

    def composition(self, load: Callable[[str], RewardFunction] | None = None) -> Composition:
        """The reward; ``load`` replaces the function that loads each by its name. Raises
        ``ConfigError`` for what is unknown or contradicts itself."""
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
