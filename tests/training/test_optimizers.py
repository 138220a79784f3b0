"""How weights in half precision learn, and that saved states hold all of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_runs import log, short

from omni_grpo_core.core.policy import load_policy
from omni_grpo_core.training.config import OptimizerConfig, OptimizerName, TrainedWeights
from omni_grpo_core.training.host_gradients import HostGradients
from omni_grpo_core.training.loop import train
from omni_grpo_core.training.optimizers import MasterAdamW, make_optimizer, set_rate


def test_updates_too_small_for_a_weight_add_up_in_its_master() -> None:
    """AdamW moves a weight by its rate when the gradient never changes: by 0.001 here. Below 1,
    bfloat16 has 255/256 = 0.99609375 next: 0.999 rounds back to 1, 0.998 does not."""
    weight, alone = (nn.Parameter(torch.ones(1, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = MasterAdamW([weight], lr=1e-3, weight_decay=0.0, fused=False)
    rounded = torch.optim.AdamW([alone], lr=1e-3, weight_decay=0.0)
    found = []
    for _ in range(2):
        weight.grad = torch.full_like(weight, 4.0)
        alone.grad = weight.grad.clone()
        optimizer.step()
        rounded.step()
        found.append(float(weight.detach()))
    assert found == [1.0, 0.99609375]
    assert float(alone.detach()) == 1.0
    # eps of 1e-8 beside a gradient of 4, and float32
    assert float(optimizer.state[weight]["master"]) == pytest.approx(0.998, abs=1e-6)


def test_a_master_s_state_is_loaded_as_it_was_saved() -> None:
    """torch casts loaded state to the weights' dtype: the master would be rounded."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=1e-3, fused=False)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    other = MasterAdamW([weight], lr=1e-3, fused=False)
    other.load_state_dict(optimizer.state_dict())
    before, after = (one.state[weight] for one in (optimizer, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert float(after["master"]) != 1.0


# --------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("float32", "adafactor"),
        ("float32", "adamw_8bit"),
        ("bfloat16_master", "adamw"),
        ("bfloat16_stochastic", "adamw_8bit"),
    ],
)
def test_a_resumed_run_equals_one_that_was_never_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: TrainedWeights, name: OptimizerName
) -> None:
    """Masters, eight-bit moments and the draws of stochastic rounding included; although it goes on
    with gradients that are offloaded, and come back a few at a time."""
    few = partial(HostGradients, at_once=2**16)
    monkeypatch.setattr("omni_grpo_core.training.run.HostGradients", few)
    if name == "adamw_8bit":
        pytest.importorskip("torchao")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    plan = OptimizerConfig(lr=1e-3, name=name)
    config = short(whole, precision="bfloat16", trained_weights=how, optimizer=plan, keep=3)
    # eager, the same arithmetic: compiling it for each shape takes minutes on a CPU
    with torch.compiler.set_stance("force_eager"):
        train(config)
        shutil.copytree(whole, cut)
        shutil.rmtree(cut / "state" / "000003")
        shutil.rmtree(cut / "state" / "000002")
        train(replace(config, out=str(cut), offload_gradients=True))
    assert log(cut) == log(whole)
    found, wanted = (load_policy(out / "model").model.state_dict() for out in (cut, whole))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    start = load_policy(config.checkpoint).model.state_dict()
    moved = [key for key in start if not torch.equal(start[key].bfloat16(), wanted[key].bfloat16())]
    assert len(moved) > 50


def test_the_optimizer_is_the_configured_one(tmp_path: Path) -> None:
    weight = [nn.Parameter(torch.ones(2, 2))]
    given: list[tuple[dict[str, Any], type]] = [
        ({}, torch.optim.AdamW),
        ({"precision": "bfloat16", "trained_weights": "bfloat16_master"}, MasterAdamW),
        ({"optimizer": OptimizerConfig(name="adafactor")}, torch.optim.Adafactor),
    ]
    for changes, kind in given:
        optimizer = make_optimizer(short(tmp_path, **changes), weight)
        assert type(optimizer) is kind
        set_rate(optimizer, 0.5)
        assert optimizer.param_groups[0]["lr"] == 0.5
