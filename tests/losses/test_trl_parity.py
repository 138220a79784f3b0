"""Advantages, losses and gradients compared with TRL's own code, on the same random numbers.

TRL's methods run unbound on a stand-in that has the attributes they read; what a model would have
computed is passed in. All in float64: 1e-9 leaves six digits for another order of summation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_grpo_core.losses import LossConfig, RolloutCorrection
from omni_grpo_core.losses.advantages import Scale, gdpo_advantages, group_advantages
from omni_grpo_core.losses.metrics import loss_metrics
from omni_grpo_core.losses.policy_loss import (
    Totals,
    policy_loss,
    rollout_weights,
)

TOLERANCE = 1e-9
ROWS, WIDTH, CAP = 6, 7, 16
LENGTHS = (7, 1, 4, 5, 7, 2)
MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def trl_trainer() -> Any:
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def numbers(seed: int) -> dict[str, Tensor]:
    """Logprobs with ratios on both sides of every bound used below."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    logprobs = normal(1.0, ROWS, WIDTH) - 2
    return {
        "logprobs": logprobs,
        "old": logprobs + normal(0.6, ROWS, WIDTH),
        "ref": logprobs + normal(0.4, ROWS, WIDTH),
        "advantages": normal(1.0, ROWS),
        "token_advantages": normal(1.0, ROWS, WIDTH),
        "entropy": normal(1.0, ROWS, WIDTH).abs(),
    }


def trl_loss(
    trainer: Any,
    data: dict[str, Tensor],
    logprobs: Tensor,
    *,
    advantages: Tensor,
    loss_type: str,
    level: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.3,
    delta: float | None = None,
    beta: float = 0.0,
    kl_weighted: bool = False,
    weights: Tensor | None = None,
    off_policy: float | None = None,
) -> tuple[Tensor, dict[str, list[float]]]:
    """``GRPOTrainer._compute_loss`` on one micro-batch that is the whole step."""
    metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kw: (logprobs, data["entropy"], None),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=kl_weighted,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
        ),
        get_gamma_weights=getattr(trainer, "get_gamma_weights", None),
        get_off_policy_mask=getattr(trainer, "get_off_policy_mask", None),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=off_policy,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        current_gradient_accumulation_steps=1,
        max_completion_length=CAP,
        _entropy_bonus_enabled=False,
        _metrics=metrics,
    )
    ids = torch.zeros((ROWS, WIDTH), dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": MASK.long(),
        "advantages": advantages,
        "old_per_token_logps": data["old"],
        "ref_per_token_logps": data["ref"],
        "importance_sampling_ratio": weights,
        # what sampled, other than the policy before its first update
        "sampling_per_token_logps": data["ref"],
        "num_items_in_batch": MASK.sum(),
    }
    return trainer._compute_loss(stand_in, None, inputs), metrics["train"]


def both(
    trainer: Any, config: LossConfig, seed: int, *, per_token: bool = False, weighted: bool = False
) -> None:
    data = numbers(seed)
    advantages = data["token_advantages"] if per_token else data["advantages"]
    weights = None
    if weighted:
        # 1 beside the tokens, as both projects' corrections leave it
        weights = torch.where(MASK, data["old"].sub(data["ref"]).exp().clamp(max=1.5), 1.0)
    ours, theirs = (data["logprobs"].clone().requires_grad_() for _ in range(2))
    sequence = config.ratio_level == "sequence"
    their_loss, _ = trl_loss(
        trainer,
        data,
        theirs,
        advantages=advantages,
        loss_type="grpo" if config.loss_type == "gspo" else config.loss_type,
        level="sequence" if sequence else "token",
        epsilon_low=config.epsilon_low,
        # TRL's bound for cispo is the ratio itself
        epsilon_high=config.epsilon_high + (config.loss_type == "cispo"),
        delta=config.delta,
        beta=config.beta,
        kl_weighted=config.kl_weighted,
        weights=weights,
        off_policy=config.off_policy_mask_threshold,
    )
    our_loss = policy_loss(
        config,
        logprobs=ours,
        old_logprobs=data["old"],
        advantages=advantages,
        mask=MASK,
        totals=Totals.of(MASK),
        ref_logprobs=data["ref"] if config.beta else None,
        rollout_weights=weights,
        rollout_logprobs=data["ref"],
    )
    same(our_loss.detach(), their_loss.detach())
    our_loss.backward()  # type: ignore[no-untyped-call]
    their_loss.backward()  # type: ignore[no-untyped-call]
    assert ours.grad is not None
    assert theirs.grad is not None
    same(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 0.01


LOSSES: tuple[dict[str, Any], ...] = (
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dapo"},
    {"loss_type": "dr_grpo", "max_completion_length": CAP},
    {"loss_type": "gspo"},
    # epsilon_low 1: TRL's cispo has no lower bound
    {"loss_type": "cispo", "epsilon_low": 1.0},
    {"loss_type": "sapo"},
    {"loss_type": "luspo"},
    {"loss_type": "vespo"},
)
loss_types = pytest.mark.parametrize("settings", LOSSES, ids=lambda s: s["loss_type"])


@loss_types
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient(trl_trainer: Any, settings: dict[str, Any], seed: int) -> None:
    both(trl_trainer, LossConfig(**{"epsilon_high": 0.3} | settings), seed)


@loss_types
@pytest.mark.parametrize("kl_weighted", [False, True])
def test_with_kl(trl_trainer: Any, settings: dict[str, Any], kl_weighted: bool) -> None:
    both(trl_trainer, LossConfig(beta=0.25, kl_weighted=kl_weighted, **settings), seed=3)


@loss_types
def test_with_rollout_weights(trl_trainer: Any, settings: dict[str, Any]) -> None:
    both(trl_trainer, LossConfig(beta=0.25, **settings), seed=4, weighted=True)


@loss_types
@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_off_policy_sequence_mask(trl_trainer: Any, settings: dict[str, Any], beta: float) -> None:
    """Some sequences of negative advantage are beyond 0.1 nats, and their KL still counts."""
    data = numbers(11)
    gaps = torch.where(MASK, data["ref"] - data["logprobs"], 0.0).sum(-1) / MASK.sum(-1)
    masked = (gaps > 0.1) & (data["advantages"] < 0)
    assert 0 < int(masked.sum()) < int((data["advantages"] < 0).sum())
    both(trl_trainer, LossConfig(beta=beta, off_policy_mask_threshold=0.1, **settings), seed=11)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "gspo", "luspo"])
def test_two_sided(trl_trainer: Any, loss_type: Any) -> None:
    both(trl_trainer, LossConfig(loss_type=loss_type, delta=1.4), seed=5)


@pytest.mark.parametrize(
    "settings",
    [s for s in LOSSES if s["loss_type"] not in ("gspo", "luspo")],
    ids=lambda s: s["loss_type"],
)
def test_token_level_advantages(trl_trainer: Any, settings: dict[str, Any]) -> None:
    """Not gspo and luspo: TRL applies every token's advantage to the whole sequence's ratio, we
    follow the paper's GSPO-token. If advantages are equal along a row the two agree: see
    ``test_loss_and_gradient``."""
    both(trl_trainer, LossConfig(**settings), seed=6, per_token=True)


def test_clip_rates_and_kl(trl_trainer: Any) -> None:
    data = numbers(9)
    _, theirs = trl_loss(
        trl_trainer,
        data,
        data["logprobs"],
        advantages=data["advantages"],
        loss_type="dapo",
        epsilon_high=0.2,
        beta=0.1,
    )
    ours = loss_metrics(
        LossConfig(),
        logprobs=data["logprobs"],
        old_logprobs=data["old"],
        advantages=data["advantages"],
        mask=MASK,
        entropy=data["entropy"],
        ref_logprobs=data["ref"],
    ).values()
    # TRL counts clipped tokens in float32
    assert ours["clip_low"] == pytest.approx(theirs["clip_ratio/low_mean"][0], abs=1e-6)
    assert ours["clip_high"] == pytest.approx(theirs["clip_ratio/high_mean"][0], abs=1e-6)
    assert ours["kl"] == pytest.approx(theirs["kl"][0], abs=1e-6)
    assert ours["entropy"] == pytest.approx(theirs["entropy"][0], abs=1e-6)
    assert theirs["clip_ratio/low_mean"][0] > 0
    assert theirs["clip_ratio/high_mean"][0] > 0


def trl_scored(
    trainer: Any,
    rewards: Sequence[float | tuple[float | None, ...] | None],
    group_size: int,
    *,
    weights: tuple[float, ...] = (1.0,),
    aggregation: str = "sum_then_normalize",
    scale: str = "group",
    old: Tensor | None = None,
    rollout: Tensor | None = None,
    mode: str = "token_truncate",
) -> dict[str, Tensor]:
    """``GRPOTrainer._generate_and_score_completions`` with generation and rewards passed in."""
    count = len(rewards)
    lengths = LENGTHS if rollout is not None else (1,) * count
    rows = [row if isinstance(row, tuple) else (row,) for row in rewards]
    scores = torch.tensor(
        [[float("nan") if r is None else r for r in row] for row in rows], dtype=torch.float64
    )
    sampled = None
    if rollout is not None:
        sampled = [row[:n].tolist() for row, n in zip(rollout, lengths, strict=True)]
    ids = [[1] * n for n in lengths]
    generate: Callable[[Any], Any] = lambda prompts: (  # noqa: E731
        [[1]] * count,
        ids,
        None,
        [""] * count,
        sampled,
        {},
        None,
        None,
    )
    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", process_index=0, gather=lambda x: x),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        environment_factories=None,
        environments=None,
        tools=None,
        _generate=generate,
        _calculate_rewards=lambda *args: scores,
        _get_per_token_logps_and_entropies=lambda *args, **kw: (old, None, None),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        args=SimpleNamespace(
            per_device_train_batch_size=count,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        num_iterations=1,
        num_generations=group_size,
        use_vllm=rollout is not None,
        vllm_importance_sampling_correction=rollout is not None,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=0.5,
        vllm_importance_sampling_clip_max=2.0,
        beta=0.0,
        multi_objective_aggregation=aggregation,
        reward_weights=torch.tensor(weights, dtype=torch.float64),
        reward_funcs=["reward"] * len(weights),
        reward_func_names=["reward"] * len(weights),
        scale_rewards=scale,
        log_multimodal=False,
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    inputs = [{"prompt": "p"}] * count
    # TRL rounds the n / (n - 1) of its standard deviation, and the engine's logprobs, to the
    # default dtype: with float32 it is off by 3e-8
    torch.set_default_dtype(torch.float64)
    try:
        scored: dict[str, Tensor] = trainer._generate_and_score_completions(stand_in, inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    return scored


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "rewards",
    [
        [0.1, 1.3, 0.7, 0.2, 2.0, 1.1, 0.0, 0.5, 0.25, 1.0, 1.0, 0.0],
        [0.1, None, 0.7, 0.2, 2.0, 1.1, None, 0.5, 0.25, 1.0, 1.0, None],
        [0.1, 1.3, 0.7, 0.2, 0.5, 0.5, 0.5, 0.5, 0.25, 1.0, 1.0, 0.0],
    ],
    ids=["scored", "unscored", "zero-variance"],
)
def test_advantages(trl_trainer: Any, rewards: list[float | None], scale: Scale) -> None:
    theirs = trl_scored(trl_trainer, rewards, 4, scale=scale)["advantages"]
    ours = group_advantages(rewards, [row // 4 for row in range(12)], scale)
    same(ours.values, theirs)


def test_gdpo(trl_trainer: Any) -> None:
    """Three groups of four; one reward is flat in a group, two leave completions unscored."""
    right: list[float | None] = [0, 1, 1, 0, 1, 1, 1, 1, 0, None, 1, 0]
    short: list[float | None] = [3, 9, 4, 7, 2, 8, 5, 5, None, None, 6, 1]
    theirs = trl_scored(
        trl_trainer, [*zip(right, short, strict=True)], 4,
        weights=(2.0, 0.5), aggregation="normalize_then_sum",
    )["advantages"]  # fmt: skip
    ours = gdpo_advantages(
        {"right": right, "short": short},
        {"right": 2.0, "short": 0.5},
        [row // 4 for row in range(12)],
    )
    same(ours.values, theirs)
    assert ours.usable.tolist() == [row != 9 for row in range(12)]


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_rollout_weights(trl_trainer: Any, level: Any, mode: Any) -> None:
    data = numbers(8)
    rollout = data["old"] - data["ref"] + data["logprobs"]
    theirs = trl_scored(
        trl_trainer, [0.0, 1.0] * 3, 2, old=data["old"], rollout=rollout, mode=f"{level}_{mode}"
    )["importance_sampling_ratio"]
    ours = rollout_weights(
        data["old"], rollout, MASK, RolloutCorrection(level, mode, low=0.5, high=2.0)
    )
    same(ours[MASK], theirs.expand(ROWS, WIDTH)[MASK])
    assert len(set(ours[MASK].tolist())) > 2
