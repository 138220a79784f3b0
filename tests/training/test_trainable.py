"""Which weights learn, at what rate, and what the reference is."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_runs import log, saved, short

from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.forward import completion_logits
from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.training.config import LoraConfig, OptimizerConfig, Tower, learning_rate
from omni_grpo_core.training.loop import train
from omni_grpo_core.training.memory import learning_sizes, thinker_shapes
from omni_grpo_core.training.trainable import (
    adapter_off,
    add_lora,
    choose_trainable,
    lora_layers,
    merged_weights,
)
from omni_grpo_core.types import Batch

PREFIX = {
    "visual": ("image", "video"), "audio_tower": ("audio",), "model": ("text",),
    "lm_head": ("text",),
}  # fmt: skip


@pytest.fixture
def own(policy: Policy) -> Policy:
    """A copy whose weights a test may change."""
    return replace(policy, model=copy.deepcopy(policy.model))


@pytest.mark.parametrize(
    "freeze", [(), ("audio",), ("image", "video"), ("image", "video", "audio"), ("text",)]
)
def test_what_is_frozen_is_what_was_named(
    own: Policy, tmp_path: Path, freeze: tuple[Tower, ...]
) -> None:
    """``step.frozen-wrong``, for every weight of the model."""
    assert choose_trainable(own, short(tmp_path, freeze=freeze), _plain) is None
    for name, parameter in own.model.named_parameters():
        towers = PREFIX[published_name(name).partition(".")[0]]
        assert parameter.requires_grad == (not set(towers) & set(freeze)), name


def test_frozen_towers_keep_every_bit_in_training(tmp_path: Path, policy: Policy) -> None:
    out = tmp_path / "run"
    config = short(out, steps=1, freeze=("image", "video", "audio"))
    assert train(config).status == "finished"
    found, start = load_policy(out / "model").model.state_dict(), policy.model.state_dict()
    moved = {
        published_name(name)
        for name, weight in start.items()
        if not torch.equal(found[name], weight)
    }
    assert not [name for name in moved if name.startswith(("visual.", "audio_tower."))]
    assert "lm_head.weight" in moved
    assert {f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)} <= moved


def test_half_precision_rounds_only_what_does_not_learn(own: Policy, tmp_path: Path) -> None:
    choose_trainable(own, short(tmp_path, freeze=("audio",), precision="bfloat16"), _plain)
    for name, parameter in own.model.named_parameters():
        frozen = published_name(name).startswith("audio_tower.")
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name


# --------------------------------------------------------------------------- lora


def scores(policy: Policy, batch: Batch) -> torch.Tensor:
    ids = torch.full((len(batch.rows), 3), 5)
    with torch.no_grad():
        return completion_logits(policy, batch, ids, torch.ones_like(ids))


@pytest.mark.parametrize(
    ("family", "each"), [("policy mixed", 7), ("qwen3_policy qwen3_mixed", 4)], ids=["dense", "moe"]
)
def test_the_adapter_off_is_the_policy_as_it_was_and_merged_is_the_adapter_on(
    request: pytest.FixtureRequest, family: str, each: int
) -> None:
    """Every linear layer of three text layers. Given a mixture as a whole, PEFT also adapted the
    experts, which are one tensor, and the audio tower: the model that was written had no experts.
    """
    policy, mixed = map(request.getfixturevalue, family.split())
    own = replace(policy, model=copy.deepcopy(policy.model))
    before = scores(policy, mixed)
    add_lora(own.model, LoraConfig(rank=2), seed=0)
    learning = {published_name(name) for name, p in own.model.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name and name.startswith("model.layers.") for name in learning)
    assert len(lora_layers(own.model)) == 3 * each
    estimated = learning_sizes(thinker_shapes(Path(own.checkpoint)), (), LoraConfig(rank=2))
    assert sum(p.numel() for p in own.model.parameters() if p.requires_grad) == sum(estimated)
    # the second factor starts at 0, and the layer's own product comes first
    assert torch.equal(scores(own, mixed), before)
    with torch.no_grad():
        for name, parameter in own.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    moved = scores(own, mixed)
    assert (moved - before).abs().max() > 0.1
    with adapter_off(own.model):
        assert torch.equal(scores(own, mixed), before)
    assert torch.equal(scores(own, mixed), moved), "on again"
    merged = replace(policy, model=copy.deepcopy(policy.model))
    merged.model.load_state_dict(merged_weights(own.model))
    # (W + BA) x instead of W x + B A x: float32 sums in another order
    torch.testing.assert_close(scores(merged, mixed), moved, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["up_proj", "q_norm", "experts", "input_layernorm"])
def test_what_takes_no_adapter_is_refused(qwen3_policy: Policy, name: str) -> None:
    """In a mixture the layers of its experts and these themselves; norms."""
    own = replace(qwen3_policy, model=copy.deepcopy(qwen3_policy.model))
    with pytest.raises(ConfigError, match=rf"lora: target_modules: found {name} .*print\(model\)"):
        add_lora(own.model, LoraConfig(target_modules=(name,)), seed=0)


def test_the_adapter_is_back_on_after_an_error(own: Policy) -> None:
    add_lora(own.model, LoraConfig(rank=1), seed=0)
    with pytest.raises(KeyError), adapter_off(own.model):
        raise KeyError
    assert not any(layer.disable_adapters for layer in lora_layers(own.model))


# --------------------------------------------------------------------------- the schedule


def test_every_update_is_made_at_its_own_rate(tmp_path: Path) -> None:
    """Three steps of two updates: 1/2 and 2/2 of warm-up, then 1, 3/4, 1/2, 1/4 of 1e-3."""
    out = tmp_path / "run"
    plan = OptimizerConfig(lr=1e-3, schedule="linear", warmup_steps=2)
    train(short(out, steps=3, iterations=2, keep=3, optimizer=plan))
    last = [learning_rate(plan, update, 6) for update in (1, 3, 5)]
    assert last == pytest.approx([1e-3, 0.75e-3, 0.25e-3], rel=1e-12)
    assert [line["lr"] for line in log(out)] == last
    for step, rate in enumerate(last, start=1):
        assert saved(out, step)["optimizer"]["param_groups"][0]["lr"] == rate


def _plain() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)
