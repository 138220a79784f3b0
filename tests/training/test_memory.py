from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from train_runs import short

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.training.config import LoraConfig, TrainConfig
from omni_grpo_core.training.loop import train
from omni_grpo_core.training.memory import Estimate, check_memory, estimate, thinker_shapes

TEXT = {
    "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 10, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 20,
}  # fmt: skip
SHAPES = {"model.layers.0.mlp.up_proj.weight": (10, 8), "visual.x.weight": (4, 5)}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """4 completions per step, 2 per micro-batch, of 5 tokens each."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": TEXT}))
    return TrainConfig(
        checkpoint=str(tmp_path),
        settings=Settings(group_size=2, max_new_tokens=5),
        batch_size=4,
        micro_batch_size=2,
    )


def test_the_formula_by_hand(config: TrainConfig) -> None:
    """100 parameters, the largest of 80. A cache of 4 x (7 + 5) tokens, each 2 layers x 2 x 1 head
    x 4 numbers of 4 bytes. Activations of 2 x 12 tokens x 2 layers x (6 x 8 + 3 x 10) numbers; 2 x
    5 x 20 logits and their gradient."""
    found = estimate(config, SHAPES, 7, world=1)
    assert found == Estimate(
        weights=400, optimizer=800, reference=0, rollout=4 * 12 * 2 * 2 * 4 * 4,
        gradients=400 + 320, scoring=4 * (2 * 12 * 2 * 78 + 2 * 200),
    )  # fmt: skip
    assert found.peak == 400 + 800 + 720 + 16_576


def test_saving_memory_lowers_the_estimate_s_part(config: TrainConfig) -> None:
    plain = estimate(config, SHAPES, 7, world=1)
    frozen = estimate(replace(config, freeze=("image", "video")), SHAPES, 7, world=1)
    assert (frozen.weights, frozen.optimizer, frozen.gradients) == (400, 640, 640)
    half = estimate(replace(config, freeze=("image",), precision="bfloat16"), SHAPES, 7, world=1)
    assert (half.weights, half.rollout) == (2 * 20 + 4 * 80, plain.rollout // 2)
    assert (half.casts, plain.casts) == (2 * 80, 0)
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
    assert found.whole == 400, "sampling gathers them"


def write_header(folder: Path) -> None:
    shapes = {f"thinker.{name}": shape for name, shape in SHAPES.items()}
    shapes["talker.huge.weight"] = (10**4, 10**4)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    body = json.dumps(header)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(body)) + body.encode())
    os.truncate(path, 8 + len(body) + end)  # sparse


def test_too_little_is_refused_and_enough_is_not(config: TrainConfig) -> None:
    write_header(Path(config.checkpoint))
    assert thinker_shapes(Path(config.checkpoint)) == SHAPES
    check_memory(config, 7, world=1, memory=18_496)
    check_memory(config, 7, world=1, memory=None)
    with pytest.raises(ConfigError, match=r"memory: found at least .* GiB needed .*scoring"):
        check_memory(config, 7, world=1, memory=18_495)
    with pytest.raises(ConfigError, match="2 processes"):
        check_memory(config, 7, world=2, memory=18_496)


def test_weights_pass_through_the_machine_s_memory(config: TrainConfig) -> None:
    """Each process loads 100 parameters in float32 before they go to its device."""
    write_header(Path(config.checkpoint))
    cuda = replace(config, device="cuda")
    check_memory(cuda, 7, world=2, memory=None, host=800)
    with pytest.raises(ConfigError, match=r"memory of the machine: found .*2 processes"):
        check_memory(cuda, 7, world=2, memory=None, host=799)
    check_memory(config, 7, world=2, memory=None, host=799)


def shapes_7b() -> dict[str, tuple[int, ...]]:
    """The text model of Qwen2.5-Omni-7B, from its published config only."""
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (3584, 3584), "self_attn.q_proj.bias": (3584,),
        "self_attn.k_proj.weight": (512, 3584), "self_attn.k_proj.bias": (512,),
        "self_attn.v_proj.weight": (512, 3584), "self_attn.v_proj.bias": (512,),
        "self_attn.o_proj.weight": (3584, 3584),
        "mlp.gate_proj.weight": (18944, 3584), "mlp.up_proj.weight": (18944, 3584),
        "mlp.down_proj.weight": (3584, 18944),
        "input_layernorm.weight": (3584,), "post_attention_layernorm.weight": (3584,),
    }  # fmt: skip
    layers = {f"model.layers.{at}.{n}": s for at in range(28) for n, s in layer.items()}
    ends = {"model.embed_tokens.weight": (152064, 3584), "lm_head.weight": (152064, 3584)}
    return {**layers, **ends, "model.norm.weight": (3584,)}


TEXT_7B = {
    "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064,
    "num_attention_heads": 28, "num_key_value_heads": 4,
}  # fmt: skip
P_7B = 7_615_616_512
LARGEST_7B = 4 * 152064 * 3584
MATRICES_7B = P_7B - 152064 * 3584 - 28 * (3 * 3584 + 2 * 512) - 3584
A100, H200 = 81_559 * 2**20, 143_771 * 2**20
"""80 and 141 GB, as reported by nvidia-smi."""


@pytest.fixture
def seven(tmp_path: Path) -> TrainConfig:
    """One group of 8, 256 tokens, the completions scored two at a time."""
    (tmp_path / "config.json").write_text(json.dumps({"thinker_config": {"text_config": TEXT_7B}}))
    return TrainConfig(
        checkpoint=str(tmp_path),
        settings=Settings(group_size=8, max_new_tokens=256),
        batch_size=8,
        micro_batch_size=2,
        gradient_checkpointing=True,
        device="cuda",
    )


def test_all_weights_of_a_7b_by_hand(seven: TrainConfig) -> None:
    """It was accepted on 80 and on 141 GB, ran for minutes, and failed at its first optimizer
    step: the moments do not exist before, and the optimizer held another copy besides them.

    Prompt 768 and completion 256 are 1024 tokens. 8 caches of 28 layers x 2 x 4 heads x 128; 2
    sequences of 28 layers x 3584; 2 x 256 x 152064 logits and their gradient. Two gradients of the
    head exist for a moment: the second micro-batch's, and the one it is added to.
    """
    shapes = shapes_7b()
    assert sum(map(math.prod, shapes.values())) == P_7B
    full = estimate(seven, shapes, 768, world=1)
    assert full == Estimate(
        weights=4 * P_7B,
        optimizer=8 * P_7B,
        reference=0,
        rollout=4 * 8 * 1024 * 28 * 2 * 4 * 128,
        gradients=4 * P_7B + LARGEST_7B,
        scoring=4 * (2 * 1024 * 28 * 3584 + 2 * 2 * 256 * 152064),
        runtime=2**29,
    )
    assert full.peak == 2**29 + 16 * P_7B + LARGEST_7B + full.scoring == 126_011_662_336
    assert A100 < full.peak < H200
    half = estimate(replace(seven, precision="bfloat16"), shapes, 768, world=1)
    assert (half.casts, half.scoring) == (2 * MATRICES_7B, full.scoring // 2)
    assert half.peak == full.peak - half.scoring + half.casts == 139_429_765_120
    kl = estimate(replace(seven, loss=LossConfig(beta=0.1)), shapes, 768, world=1)
    assert kl.peak == full.peak + 4 * P_7B > H200
    lora = replace(seven, lora=LoraConfig(rank=16), precision="bfloat16")
    assert estimate(lora, shapes, 768, world=1).peak < A100 // 4


@pytest.mark.parametrize(
    ("changes", "memory", "advice"),
    [
        ({}, A100, "for optimizer and gradients use lora or freeze; for weights shard"),
        ({"loss": LossConfig(beta=0.1)}, H200, "for reference use lora, or loss: beta 0"),
        ({"micro_batch_size": 8, "gradient_checkpointing": False}, H200, "lower micro_batch_size"),
        ({"batch_size": 8 * 200}, H200, "for rollout lower batch_size"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(
    seven: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    memory: int,
    advice: str,
) -> None:
    monkeypatch.setattr("omni_grpo_core.training.memory.thinker_shapes", lambda folder: shapes_7b())
    config = replace(seven, **changes)
    with pytest.raises(ConfigError) as caught:
        check_memory(config, 768, world=1, memory=memory)
    assert advice in caught.value.fix
    # 97 % of a CUDA device is usable
    enough = math.ceil(estimate(config, shapes_7b(), 768, world=1).peak / 0.97)
    check_memory(config, 768, world=1, memory=enough)
    with pytest.raises(ConfigError, match="memory"):
        check_memory(config, 768, world=1, memory=enough - 2)


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


# --------------------------------------------------------------------------- out of memory


@pytest.fixture
def another_process() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
MACHINE = OSError(errno.ENOMEM, "Cannot allocate memory")


@pytest.mark.usefixtures("another_process")
@pytest.mark.parametrize(
    ("stage", "where", "error", "held", "fix"),
    [
        ("loading", "transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained",
         CUDA, (0, 0), "use lora"),
        ("sampling", "omni_grpo_core.training.loop.rollout", CUDA, (1, 0), "lower batch_size"),
        ("reference", "omni_grpo_core.training.trainable.Scorer.forward", CPU, (1, 0),
         "loss: beta 0"),
        ("update", "omni_grpo_core.training.step.policy_loss", CPU, (1, 0),
         "lower micro_batch_size"),
        ("optimizer", "torch.optim.AdamW.step", MemoryError(), (1, 0), "adamw_8bit"),
        ("saving", "torch.save", MACHINE, (1, 2), "memory of the machine"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)  # fmt: skip
def test_out_of_memory_is_one_message_with_the_stage_and_what_was_in_use(
    tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch,
    stage: str, where: str, error: Exception, held: tuple[int, int], fix: str,
) -> None:  # fmt: skip
    """``held``: float32 numbers of each weight in weights and in optimizer: none before loading,
    two moments after an update."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(where, fail)
    out = tmp_path / "run"
    loss = LossConfig(beta=0.1 if stage == "reference" else 0.0)
    with pytest.raises(ConfigError) as caught:
        train(short(out, steps=1, batch_size=4, loss=loss))
    assert caught.value.item == f"memory, {stage}"
    size = 4 * sum(p.numel() for p in policy.model.parameters()) / 2**30
    weights, moments = held
    assert f"in use, GiB: weights {weights * size:.3g}, " in caught.value.got
    assert f"optimizer {moments * size:.2g}" in caught.value.got
    assert fix in caught.value.fix
    # nothing before its first step is logged, no half of a state after it
    left = {"config.json", "log.jsonl", "state"} if stage == "saving" else set()
    assert {path.name for path in out.rglob("*")} == left
