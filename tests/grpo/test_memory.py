from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from omni_grpo_core import tiny
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.grpo.config import LossConfig
from omni_grpo_core.grpo.memory import (
    Estimate,
    check_memory,
    device_memory,
    estimate,
    thinker_shapes,
)
from omni_grpo_core.grpo.train_config import LoraConfig, TrainConfig
from omni_grpo_core.policy import Policy
from omni_grpo_core.settings import Settings

TEXT = {
    "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 10, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 20,
}  # fmt: skip
SHAPES = {"model.layers.0.mlp.up_proj.weight": (10, 8), "visual.x.weight": (4, 5)}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """4 completions a step, 2 a micro-batch, of 5 tokens each."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": TEXT}))
    return TrainConfig(
        checkpoint=str(tmp_path),
        settings=Settings(group_size=2, max_new_tokens=5),
        batch_size=4,
        micro_batch_size=2,
    )


def test_the_formula_by_hand(config: TrainConfig) -> None:
    """100 parameters. A cache of 4 x (7 + 5) tokens, each 2 layers x 2 x 1 head x 4 numbers of 4
    bytes. Activations of 2 x 12 tokens x 2 layers x (6 x 8 + 3 x 10) numbers; 2 x 5 x 20 logits and
    their gradient."""
    found = estimate(config, SHAPES, 7, world=1)
    assert found == Estimate(
        weights=400, optimizer=800, reference=0, rollout=4 * 12 * 2 * 2 * 4 * 4, gradients=400,
        scoring=4 * (2 * 12 * 2 * 78 + 2 * 200),
    )  # fmt: skip
    assert found.peak == 400 + 800 + 400 + 16_576


def test_what_saves_memory_lowers_its_part(config: TrainConfig) -> None:
    plain = estimate(config, SHAPES, 7, world=1)
    frozen = estimate(replace(config, freeze=("image", "video")), SHAPES, 7, world=1)
    assert (frozen.weights, frozen.optimizer, frozen.gradients) == (400, 640, 320)
    half = estimate(replace(config, freeze=("image",), precision="bfloat16"), SHAPES, 7, world=1)
    assert (half.weights, half.rollout) == (2 * 20 + 4 * 80, plain.rollout // 2)
    lora = estimate(replace(config, lora=LoraConfig(rank=1)), SHAPES, 7, world=1)
    assert (lora.weights, lora.optimizer) == (400 + 4 * 18, 8 * 18)
    saving = estimate(replace(config, gradient_checkpointing=True), SHAPES, 7, world=1)
    assert saving.scoring == 4 * (2 * 12 * 2 * 8 + 2 * 200)
    assert estimate(config, SHAPES, 7, world=2).rollout == plain.rollout // 2
    kl = replace(config, loss=LossConfig(beta=0.1))
    assert estimate(kl, SHAPES, 7, world=1).reference == 400
    assert estimate(replace(kl, lora=LoraConfig(rank=1)), SHAPES, 7, world=1).reference == 0


def test_sharding_shares_weights_and_moments(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = estimate(config, SHAPES, 7, world=2)
    assert (found.weights, found.optimizer, found.gradients) == (200, 400, 200)


def test_too_little_is_refused_and_enough_is_not(config: TrainConfig) -> None:
    header = {name: {"dtype": "F32", "shape": shape} for name, shape in SHAPES.items()}
    header["talker.huge.weight"] = {"dtype": "F32", "shape": (10**9, 10**9)}
    body = json.dumps({f"thinker.{n}" if n in SHAPES else n: e for n, e in header.items()})
    path = Path(config.checkpoint) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(body)) + body.encode())
    assert thinker_shapes(Path(config.checkpoint)) == SHAPES
    check_memory(config, 7, world=1, memory=18_176)
    check_memory(config, 7, world=1, memory=None)
    with pytest.raises(ConfigError, match=r"memory: found .* GiB needed at the least .*scoring"):
        check_memory(config, 7, world=1, memory=18_175)
    with pytest.raises(ConfigError, match="2 processes"):
        check_memory(config, 7, world=2, memory=18_176)


def test_shapes_are_those_of_the_model_that_is_loaded(policy: Policy) -> None:
    found = thinker_shapes(tiny.checkpoint_dir())
    loaded = {name: tuple(p.shape) for name, p in policy.model.named_parameters()}
    assert sum(map(len, found)) > 0
    assert sorted(found.values()) == sorted(loaded.values())


def test_a_mixture_counts_the_experts_that_a_token_visits(config: TrainConfig) -> None:
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 3}
    path = Path(config.checkpoint) / "config.json"
    path.write_text(json.dumps({"thinker_config": {"text_config": {**TEXT, **experts}}}))
    found = estimate(config, SHAPES, 7, world=1)
    assert found.scoring == 4 * (2 * 12 * 2 * (48 + 18) + 2 * 200)


def test_the_memory_of_this_machine_is_known() -> None:
    found = device_memory("cpu")
    assert found is not None
    assert 2**28 < found < 2**50
