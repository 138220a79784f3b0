"""From rewards to a gradient: advantages, log-probabilities, loss and metrics, as pure functions of
tensors; this module has their settings, and rejects meaningless ones.

It does not need torch: a training configuration is checked before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from omni_grpo_core.errors import ConfigError

KlEstimator = Literal["k1", "k2", "k3"]
Scale = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "luspo", "vespo"]


@dataclass(frozen=True, slots=True)
class LossConfig:
    """What :func:`~omni_grpo_core.losses.policy_loss.policy_loss` computes.

    Raises ``ConfigError`` for a meaningless value.

    >>> LossConfig(loss_type="gspo", epsilon_low=3e-4, epsilon_high=4e-4).ratio_level
    'sequence'
    """

    loss_type: LossType = "dapo"
    """Which equation of :mod:`~omni_grpo_core.losses.policy_loss`."""
    epsilon_low: float = 0.2
    """The ratio is clipped to ``[1 - epsilon_low, 1 + epsilon_high]``. The papers' values: 0.2
    (GRPO, DAPO), 3e-4 (GSPO, whose sequence ratios stay that close to 1); for CISPO 1.0, that is,
    no lower bound."""
    epsilon_high: float = 0.2
    """The papers' values: 0.2 (GRPO), 0.28 (DAPO), 4e-4 (GSPO); for CISPO it must be tuned (TRL's
    ``epsilon_high`` for CISPO is the bound itself: 1 + this)."""
    delta: float | None = None
    """Upper bound of the ratio where the advantage is negative, which plain clipping leaves
    unbounded (two-sided clipping, INTELLECT-2, arXiv 2505.07291); ``None``: no bound."""
    beta: float = 0.0
    """Weight of the KL to the reference; at 0 there is no reference."""
    kl_estimator: KlEstimator = "k3"
    """See :func:`~omni_grpo_core.losses.policy_loss.token_kl`."""
    kl_weighted: bool = False
    """Multiply each KL term by the policy ratio, gradient included, which makes the expected
    gradient of k1 and k3 that of the KL (DeepSeek-V3.2, arXiv 2512.02556)."""
    sapo_temperature_pos: float = 1.0
    """For sapo: how fast the gradient fades as the ratio leaves 1, for positive advantages."""
    sapo_temperature_neg: float = 1.05
    """For sapo: likewise for other advantages, whose gradients spread over the vocabulary."""
    vespo_k_pos: float = 2.0
    """For vespo: power of the sequence's ratio, which lowers the weight below 1; advantages of 0 or
    more."""
    vespo_lambda_pos: float = 3.0
    """For vespo: decay with the sequence's ratio, which lowers the weight above 1; likewise."""
    vespo_k_neg: float = 3.0
    """For vespo: as ``vespo_k_pos``, for negative advantages."""
    vespo_lambda_neg: float = 2.0
    """For vespo: as ``vespo_lambda_pos``, for negative advantages."""
    off_policy_mask_threshold: float | None = None
    """Completions of negative advantage are left out of the policy's term where their tokens have,
    on average, lost more than this since they were sampled, nats (DeepSeek-V3.2, arXiv 2512.02556,
    eq. 9, there ``delta``); ``None``: none is."""
    max_completion_length: int | None = None
    """The constant length, in tokens, that dr_grpo divides by; no other loss has one."""

    def __post_init__(self) -> None:
        _one_of("loss_type", self.loss_type, get_args(LossType))
        _one_of("kl_estimator", self.kl_estimator, get_args(KlEstimator))
        _within("epsilon_low", self.epsilon_low, 0 <= self.epsilon_low <= 1, "0 to 1")
        _within("epsilon_high", self.epsilon_high, self.epsilon_high >= 0, "at least 0")
        _within("beta", self.beta, self.beta >= 0, "at least 0 (a negative one rewards drifting)")
        if self.delta is not None:
            self._check_delta(self.delta)
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_lambda_pos",
                     "vespo_lambda_neg", "off_policy_mask_threshold"):  # fmt: skip
            value = getattr(self, name)
            _within(name, value, value is None or value > 0, "above 0")
        for name in ("vespo_k_pos", "vespo_k_neg"):
            _within(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        if (self.loss_type == "dr_grpo") != (self.max_completion_length is not None):
            raise ConfigError(
                "max_completion_length",
                got=f"{self.max_completion_length} with loss_type {self.loss_type!r}",
                want="a length with dr_grpo, none with any other loss",
                fix="set it for dr_grpo only: no other loss divides by a constant length",
            )
        if self.max_completion_length is not None:
            _within(
                "max_completion_length",
                self.max_completion_length,
                self.max_completion_length >= 1,
                "at least 1",
            )
        if self.beta > 0 and self.kl_estimator == "k1" and not self.kl_weighted:
            raise ConfigError(
                "kl_estimator",
                got="'k1' with kl_weighted false",
                want="'k1' with kl_weighted true, or 'k2' or 'k3'",
                fix="change one: plain k1 has an expected gradient of 0 and adds only noise",
            )

    @property
    def ratio_level(self) -> Literal["token", "sequence"]:
        """Whether each token or each sequence has one ratio."""
        return "sequence" if self.loss_type in ("gspo", "luspo") else "token"

    def _check_delta(self, delta: float) -> None:
        if self.loss_type in ("cispo", "sapo", "vespo"):
            raise ConfigError(
                "delta",
                got=f"{delta} with {self.loss_type}",
                want="none",
                fix="remove it: this loss bounds the ratio for advantages of any sign",
            )
        _within("delta", delta, delta > 1 + self.epsilon_high, "above 1 + epsilon_high")


@dataclass(frozen=True, slots=True)
class RolloutCorrection:
    """How the ratio of the trainer's to the rollout engine's probabilities weights a token.

    Raises ``ConfigError`` unless ``0 <= low < 1 < high``: a ratio of 1, where engine and trainer
    agree, must give a weight of 1.
    """

    level: Literal["token", "sequence"] = "sequence"
    """The ratio of each token, or the product over the sequence, which is the exact weight of a
    completion; with ``mode`` this is TRL's ``sequence_mask`` and so on."""
    mode: Literal["truncate", "mask"] = "mask"
    """Ratios outside ``[low, high]`` are clamped to the bound (``truncate``) or get weight 0
    (``mask``)."""
    low: float = 0.0
    """Lower bound of the ratio."""
    high: float = 3.0
    """Upper bound of the ratio."""

    def __post_init__(self) -> None:
        for name, allowed in (("level", ("token", "sequence")), ("mode", ("truncate", "mask"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"rollout correction {name}",
                    got=repr(getattr(self, name)),
                    want=f"one of {allowed}",
                    fix="correct it",
                )
        if not 0 <= self.low < 1 < self.high:
            raise ConfigError(
                "rollout correction bounds",
                got=f"low {self.low}, high {self.high}",
                want="0 <= low < 1 < high",
                fix="bound the ratio around 1",
            )


def _one_of(item: str, got: str, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ConfigError(item, got=repr(got), want=f"one of {allowed}", fix="correct it")


def _within(item: str, got: float, ok: bool, want: str) -> None:
    if not ok:
        raise ConfigError(item, got=str(got), want=want, fix="correct it")
