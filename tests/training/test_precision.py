"""Half precision: the guard's drift limit depends on the precision, and separates faults from
rounding in both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_runs import log, short

from omni_grpo_core.core import rollout
from omni_grpo_core.tolerances import DRIFT
from omni_grpo_core.training.config import GuardConfig, TrainConfig
from omni_grpo_core.training.loop import train


def half(out: Path, **changes: Any) -> TrainConfig:
    config = short(
        out, steps=1, precision="bfloat16", guard=GuardConfig(garbage=1.0, patience=9), **changes
    )
    return replace(
        config, settings=replace(config.settings, max_new_tokens=56, temperature=2.0, group_size=4)
    )


def test_half_precision_passes_the_preflight_and_stays_within_its_own_limit(tmp_path: Path) -> None:
    """Frozen towers are stored in bfloat16. Rounding shifts a logprob by more than float32's limit,
    and by less than a sixth of its own."""
    out = tmp_path / "run"
    result = train(half(out, freeze=("image", "video", "audio")))
    assert (result.status, result.findings) == ("finished", ())
    (line,) = log(out)
    assert DRIFT["float32"] < line["drift_max"] < DRIFT["bfloat16"]


def test_half_precision_still_catches_a_wrong_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``gen.temperature``: sampled at 2.6, scored at 2."""
    right = rollout.rollout

    def wrong(*given: Any, **options: Any) -> Any:
        return right(*given, **options | {"temperature": 1.3 * options["temperature"]})

    monkeypatch.setattr("omni_grpo_core.training.run.rollout", wrong)
    result = train(half(tmp_path / "run"))
    assert result.status == "stopped"
    assert [finding.name for finding in result.findings] == ["sampling and scoring disagree"]


@pytest.mark.parametrize(
    ("precision", "drift", "limit"),
    [("float32", None, 1e-3), ("bfloat16", None, 0.5), ("bfloat16", 0.25, 0.25)],
)
def test_the_limit_by_precision_and_by_hand(
    tmp_path: Path, precision: Any, drift: float | None, limit: float
) -> None:
    config = replace(short(tmp_path), precision=precision, guard=GuardConfig(drift=drift))
    assert config.drift_limit == limit
