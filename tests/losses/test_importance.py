from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from omni_grpo_core.errors import ConfigError, TrainError
from omni_grpo_core.losses import RolloutCorrection
from omni_grpo_core.losses.policy_loss import rollout_weights, token_kl

MASK = torch.tensor([[True, True, False], [True, True, True]])
RATIOS = torch.tensor([[4, 0.5, 9], [0.25, 1, 1]], dtype=torch.float64)
ENGINE = torch.full((2, 3), -3.0, dtype=torch.float64)


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        ("token", "truncate", [[3, 0.5, 1], [0.4, 1, 1]]),
        ("token", "mask", [[0, 0.5, 1], [0, 1, 1]]),
        # the products are 2 (the 9 is outside the mask) and 1/4
        ("sequence", "truncate", [[2, 2, 1], [0.4, 0.4, 0.4]]),
        ("sequence", "mask", [[2, 2, 1], [0, 0, 0]]),
    ],
)
def test_by_hand(level: Any, mode: Any, expected: list[list[float]]) -> None:
    correction = RolloutCorrection(level, mode, low=0.4, high=3)
    found = rollout_weights(ENGINE + RATIOS.log(), ENGINE, MASK, correction)
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)  # rounding of exp(log(x))


def test_no_gradient_and_no_leak_from_outside_the_mask() -> None:
    old = torch.where(MASK, ENGINE, torch.nan).requires_grad_()
    found = rollout_weights(old, ENGINE, MASK, RolloutCorrection())
    assert found.tolist() == [[1.0] * 3] * 2
    assert not found.requires_grad


def test_an_engine_that_cannot_score_a_token_is_named() -> None:
    engine = torch.where(torch.tensor([[False] * 3, [False, False, True]]), torch.nan, ENGINE)
    with pytest.raises(TrainError, match="rollout logprobs, completion 1, token 2"):
        rollout_weights(ENGINE, engine, MASK, RolloutCorrection())


@pytest.mark.parametrize(
    "settings",
    [
        {"level": "batch"},
        {"mode": "clip"},
        {"low": -0.1},
        {"low": 1.0},
        {"high": 1.0},
        {"high": math.nan},
    ],
)
def test_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RolloutCorrection(**settings)


def test_kl_estimators_over_a_whole_distribution() -> None:
    """Weighted by the policy's own probabilities, k1 and k3 are the KL: here ln(2) / 4."""
    policy = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    reference = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64)
    for estimator in ("k1", "k3"):
        values = token_kl(policy.log(), reference.log(), estimator)
        # float64 rounding
        assert (policy * values).sum().item() == pytest.approx(math.log(2) / 4, abs=1e-12)


def test_kl_of_equal_policies_is_zero_and_gives_the_reference_no_gradient() -> None:
    reference = ENGINE.clone().requires_grad_()
    for estimator in ("k1", "k2", "k3"):
        policy = ENGINE.clone().requires_grad_()
        values = token_kl(policy, reference, estimator)
        assert values.abs().max() == 0
        values.sum().backward()  # type: ignore[no-untyped-call]
    assert reference.grad is None
    with pytest.raises(TrainError, match="reference logprobs"):
        token_kl(ENGINE, ENGINE[:1], "k3")
