"""The least a step can take on a device: its operations at the speed of a large matrix product, and
for decoding its weights, read once a token at the speed of a copy.

Left out, so that it is rather too low: the towers' attention and merger, keys and values that
decoding reads, everything elementwise, the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omni_grpo_core.bench.measure import Speed
from omni_grpo_core.bench.shapes import Setting
from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.types import Batch


def floor(
    policy: Policy, batch: Batch, setting: Setting, speed: Speed, *, checkpointing: bool
) -> dict[str, float]:
    """Seconds of each part. An update is three passes' worth of operations over each prompt once
    and every completion, four with gradient checkpointing, which is asked to compute one twice. The
    first token of a completion is the prefill's; each later one waits for the weights, or for the
    operations of all rows where these take longer."""
    sizes = _sizes(policy)
    prompts = [len(row.input_ids) for row in batch.rows]
    one_pass = {
        "prefill": sum(_operations(policy, sizes, prompt, 0, 0) for prompt in prompts)
        + 2 * sizes["head"] * len(prompts),
        "scoring": sum(
            _operations(policy, sizes, prompt, setting.group, setting.tokens) for prompt in prompts
        )
        + 2 * sizes["head"] * setting.completions * setting.tokens,
    }
    seconds = {part: operations / speed.operations for part, operations in one_pass.items()}
    weights = sizes["layers"] + sizes["head"]
    token = max(
        weights * policy.model.dtype.itemsize / speed.bytes,
        2 * weights * setting.completions / speed.operations,
    )
    return {
        "towers": 2 * _tower_work(sizes, batch) / speed.operations,
        "prefill": seconds["prefill"],
        "decode": (setting.tokens - 1) * token,
        "scoring": seconds["scoring"],
        "update": (4 if checkpointing else 3) * seconds["scoring"],
    }


def _sizes(policy: Policy) -> Mapping[str, int]:
    """Weights that every token goes through, by part."""
    found = dict.fromkeys(("layers", "head", "vision", "audio"), 0)
    for name, parameter in policy.model.named_parameters():
        name = published_name(name)
        for part, prefix in (
            ("layers", "model.layers."), ("head", "lm_head."),
            ("vision", "visual.blocks."), ("audio", "audio_tower.layers."),
        ):  # fmt: skip
            if name.startswith(prefix):
                found[part] += parameter.numel()
    return found


def _operations(
    policy: Policy, sizes: Mapping[str, int], prompt: int, copies: int, tokens: int
) -> float:
    """Of the text model's layers in one pass over a prompt and its completions."""
    config: Any = policy.model.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    pairs = prompt**2 / 2 + copies * (prompt * tokens + tokens**2 / 2)
    attention = 4 * width * pairs * config.num_hidden_layers
    return float(2 * sizes["layers"] * (prompt + copies * tokens) + attention)


def _tower_work(sizes: Mapping[str, int], batch: Batch) -> float:
    """Weights times the patches and the sound's frames that go through them (two of mel make one
    in the tower)."""
    patches = sum(
        len(batch.tensors[key])
        for key in ("pixel_values", "pixel_values_videos")
        if key in batch.tensors
    )
    mask = batch.tensors.get("feature_attention_mask")
    frames = 0 if mask is None else int(mask.sum()) // 2
    return float(sizes["vision"] * patches + sizes["audio"] * frames)
