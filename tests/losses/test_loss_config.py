from __future__ import annotations

from typing import Any, get_args

import pytest

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.losses import LossConfig, LossType
from omni_grpo_core.losses.objectives import LOSSES


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"loss_type": "ppo"}, "loss_type"),
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"epsilon_low": -0.1}, "epsilon_low"),
        ({"epsilon_low": 1.1}, "epsilon_low"),
        ({"epsilon_high": -0.1}, "epsilon_high"),
        ({"epsilon_high": float("nan")}, "epsilon_high"),
        ({"beta": -0.1}, "beta"),
        ({"delta": 1.2}, "delta"),
        ({"delta": 4.0, "loss_type": "cispo"}, "delta"),
        ({"delta": 4.0, "loss_type": "sapo"}, "delta"),
        ({"delta": 4.0, "loss_type": "vespo"}, "delta"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos"),
        ({"sapo_temperature_neg": float("nan")}, "sapo_temperature_neg"),
        ({"vespo_k_neg": -1.0}, "vespo_k_neg"),
        ({"vespo_lambda_pos": 0.0}, "vespo_lambda_pos"),
        ({"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"loss_type": "dr_grpo", "max_completion_length": 0}, "max_completion_length"),
        ({"max_completion_length": 8}, "max_completion_length"),
        ({"beta": 0.1, "kl_estimator": "k1"}, "expected gradient of 0"),
    ],
)
def test_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LossConfig(**settings)


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_only_gspo_and_luspo_have_sequence_ratios(loss_type: LossType) -> None:
    length = 8 if loss_type == "dr_grpo" else None
    level = LossConfig(loss_type=loss_type, max_completion_length=length).ratio_level
    assert level == ("sequence" if loss_type in ("gspo", "luspo") else "token")


def test_every_name_has_its_loss() -> None:
    assert set(LOSSES) == set(get_args(LossType))
