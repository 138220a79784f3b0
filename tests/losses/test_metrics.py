from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from omni_grpo_core.losses import LossConfig
from omni_grpo_core.losses.advantages import group_advantages
from omni_grpo_core.losses.metrics import Mean, Metrics, advantage_metrics, loss_metrics

MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])
RATIOS = torch.tensor([[0.5, 1.5, 1, 8], [0.5, 1.5, 8, 8]], dtype=torch.float64)
"""Row 0 has advantage 1, row 1 advantage -1; the 8s of row 1 are padding."""


def measured(config: LossConfig, rows: slice = slice(None), **changes: Any) -> Metrics:
    arguments: dict[str, Any] = {
        "logprobs": RATIOS.log(),
        "old_logprobs": torch.zeros_like(RATIOS),
        "advantages": torch.tensor([1.0, -1.0]),
        "mask": MASK,
        "entropy": torch.where(MASK, 2.0, torch.nan).double(),
        "ref_logprobs": RATIOS.log() - 1,
        **changes,
    }
    return loss_metrics(config, **{name: x[rows] for name, x in arguments.items()})


def test_clip_rates_count_the_active_bound_only() -> None:
    """Active: in row 0 the upper bound (1.5 and 8 exceed it), in row 1 the lower (0.5 is below)."""
    found = measured(LossConfig(kl_estimator="k2", delta=1.4)).means
    assert found["clip_high"] == Mean(2, 6)
    assert found["clip_low"] == Mean(1, 6)
    assert found["clip_delta"] == Mean(1, 6)  # row 1's 1.5, which plain clipping leaves unbounded


def test_cispo_bounds_both_sides_but_no_zero_advantages() -> None:
    config = LossConfig(loss_type="cispo", kl_estimator="k2")
    assert measured(config).means["clip_high"] == Mean(3, 6)
    assert measured(config).means["clip_low"] == Mean(2, 6)
    silent = measured(config, advantages=torch.zeros(2)).means
    assert silent["clip_high"] == silent["clip_low"] == Mean(0, 6)


def test_token_means() -> None:
    found = measured(LossConfig(kl_estimator="k2"))
    values = found.values()
    assert values["entropy"] == 2.0
    assert values["kl"] == pytest.approx(0.5, abs=1e-12)  # half of 1 squared; float64 rounding
    assert values["ratio"] == pytest.approx((0.5 + 1.5 + 1 + 8 + 0.5 + 1.5) / 6, abs=1e-12)
    assert values["ratio_max"] == pytest.approx(8, abs=1e-12)


def test_gspo_counts_sequences() -> None:
    """s = (6)^(1/4) = 1.565 and (3/4)^(1/2) = 0.866: one of two clipped on each side."""
    found = measured(LossConfig(loss_type="gspo", epsilon_low=0.1, epsilon_high=0.1)).means
    assert found["clip_high"].count == found["clip_low"].count == found["ratio"].count == 2
    assert found["clip_high"].value == pytest.approx(0.5, abs=1e-12)  # float64: 4 times 1/4
    assert found["clip_low"].value == pytest.approx(0.5, abs=1e-12)
    assert found["ratio"].value == pytest.approx((6**0.25 + 0.75**0.5) / 2, abs=1e-12)
    assert found["kl"].count == 6


def test_parts_add_up_to_the_whole() -> None:
    """Means of means do not: the entropies 2 and 5 of 4 and 2 tokens have mean 3, not 3.5."""
    entropy = torch.tensor([[2.0] * 4, [5.0] * 4], dtype=torch.float64)
    config = LossConfig()
    parts = [measured(config, slice(at, at + 1), entropy=entropy) for at in (0, 1)]
    whole = measured(config, entropy=entropy)
    assert Metrics.sum(parts).values() == pytest.approx(whole.values(), abs=1e-12)
    assert whole.values()["entropy"] == 3.0
    assert pickle.loads(pickle.dumps(whole)) == whole


def test_nothing_counted_is_not_zero() -> None:
    nothing = measured(LossConfig(), mask=torch.zeros_like(MASK))
    assert set(nothing.values().values()) == {None}
    assert nothing.peaks == {}
    assert Metrics.sum([]).values() == {}


def test_zero_variance_rate_is_over_groups_that_have_a_variance() -> None:
    rewards, ids = [1, 1, 0, 1, 2, 3, None, 3], ["a", "a", "b", "b", "c", "c", "d", "d"]
    found = group_advantages(rewards, ids, "group")
    assert advantage_metrics(found).means == {
        "zero_variance_rate": Mean(1, 3),
        "unscored_rate": Mean(1, 8),
    }
