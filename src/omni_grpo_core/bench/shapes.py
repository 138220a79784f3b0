"""What is measured: a model and its prompts. The tiny shipped one, or random weights of the size of
Qwen2.5-Omni-7B, made on the device; both with the shipped processor, so that nothing is fetched."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers

from omni_grpo_core import tiny
from omni_grpo_core.core.batch import collate, process_row, render
from omni_grpo_core.core.family import QWEN2_5_OMNI
from omni_grpo_core.core.policy import Policy, load_policy, policy_around
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io import device_memory
from omni_grpo_core.types import (
    AUDIO_SAMPLING_RATE,
    Audio,
    Batch,
    Conversation,
    Media,
    MediaPart,
    MediaRef,
    Message,
    Row,
    TextPart,
    Video,
)

Size = Literal["tiny", "7b"]
_AUDIO_SECONDS = 300
"""What the published feature extractor takes; the shipped one takes 8, a prompt of 900 tokens."""
_SIZES_7B: dict[str, dict[str, Any]] = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "initializer_range": 0.02,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "initializer_range": 0.02,
    },
    "audio_config": {
        "d_model": 1280,
        "encoder_layers": 32,
        "num_hidden_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "output_dim": 3584,
        "max_source_positions": 1500,
        "initializer_range": 0.02,
    },
}
"""Where the published 7B's thinker differs from the tiny one."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One measured step. ``groups`` prompts of about ``prompt`` tokens, two thirds of them video
    (frames of ``pixels`` squared) and with its sound; ``group`` completions of ``tokens`` each."""

    size: Size
    prompt: int
    pixels: int
    groups: int
    group: int
    tokens: int

    @property
    def completions(self) -> int:
        return self.groups * self.group


SETTINGS: dict[Size, Setting] = {
    "tiny": Setting("tiny", prompt=150, pixels=56, groups=2, group=4, tokens=24),
    "7b": Setting("7b", prompt=3457, pixels=336, groups=1, group=8, tokens=256),
}
ROUNDED: dict[Size, Setting] = {
    "tiny": replace(SETTINGS["tiny"], group=3, tokens=12),
    "7b": replace(SETTINGS["7b"], prompt=1500, groups=2, group=4, tokens=64),
}
"""Where the plain step in float32 takes seconds."""


def make_policy(
    size: Size, device: str, dtype: str, seed: int = 0, layers: int | None = None
) -> Policy:
    """Nothing ends a completion: each has as many tokens as the setting says. Towers are frozen, as
    trainers do. ``layers``: of the 7B's text model, by default all 28. Raises ``ConfigError`` if
    its weights and gradients do not fit on the device."""
    policy = load_policy(tiny.checkpoint_dir(), device=device, dtype=dtype)
    extractor = policy.processor.feature_extractor
    extractor.chunk_length = _AUDIO_SECONDS
    extractor.n_samples = _AUDIO_SECONDS * AUDIO_SAMPLING_RATE
    extractor.nb_max_frames = extractor.n_samples // extractor.hop_length
    if size == "7b":
        model = _random_7b(device, getattr(torch, dtype), seed, layers)
        policy = policy_around(model, policy.processor, QWEN2_5_OMNI, "random 7B")
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in ("visual.", "audio_tower.")))
    suppressed = policy.suppressed.clone()
    suppressed[list(policy.eos_token_ids)] = True
    return replace(policy, suppressed=suppressed)


def _random_7b(device: str, dtype: torch.dtype, seed: int, layers: int | None) -> Any:
    content = json.loads((tiny.checkpoint_dir() / "config.json").read_text(encoding="utf-8"))
    rope = {"rope_type": "default", "type": "default", "mrope_section": [16, 24, 24]}
    for part, sizes in _SIZES_7B.items():
        content[part] |= sizes
    if layers is not None:
        content["text_config"] |= {"num_hidden_layers": layers, "max_window_layers": layers}
    content["torch_dtype"] = str(dtype).removeprefix("torch.")
    content["text_config"] |= {
        "rope_theta": 1e6,
        "rope_scaling": rope,
        "rope_parameters": {"rope_theta": 1e6, **rope},
    }
    config = transformers.Qwen2_5OmniThinkerConfig.from_dict(content)
    config._attn_implementation = "sdpa"
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    with torch.device("meta"):
        entries = sum(parameter.numel() for parameter in thinker(config).parameters())
    _require_memory(2 * entries * dtype.itemsize, device)
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = thinker(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def _require_memory(needed: int, device: str) -> None:
    """A process that takes more of the machine's memory than there is is killed without a word."""
    free = device_memory(device)
    if free is not None and needed > free:
        raise ConfigError(
            "memory",
            got=f"{needed / 2**30:.3g} GiB of weights and gradients",
            want=f"no more than the {free / 2**30:.3g} GiB free on the {device}",
            fix="add --dtype bfloat16, use a larger device, or measure --size tiny",
        )


def make_batch(policy: Policy, setting: Setting) -> Batch:
    """One row a group, of slightly different lengths and with different noise for media."""
    rows = [_row(policy, setting, index) for index in range(setting.groups)]
    return collate(rows, policy.pad_token_id)


def _row(policy: Policy, setting: Setting, index: int) -> Row:
    per_pair = (setting.pixels // (2 * policy.patch_size)) ** 2
    frames = max(4, 2 * round(setting.prompt * 2 / 3 / per_pair))
    # 30 s of sound beside 32 frames of 336 pixels, as in the measurements before this one
    seconds = max(1.0, frames * 30 / 32 * per_pair / 144)
    generator = torch.Generator().manual_seed(index)
    shape = (frames, 3, setting.pixels, setting.pixels)
    noise = torch.randint(0, 256, shape, generator=generator)
    sound = 0.1 * torch.randn(int(seconds * AUDIO_SAMPLING_RATE), generator=generator)
    media = Media(
        f"prompt-{index}",
        images=(),
        videos=(Video(noise.float(), frames / seconds, frames / seconds, seconds),),
        audios=(Audio(sound, from_video=0),),
        decoder="noise",
    )
    bare = _processed(policy, media, "?")
    missing = setting.prompt - 5 * index - len(bare.input_ids)
    tokenizer = policy.processor.tokenizer
    word = len(tokenizer(" a" * 100)["input_ids"]) / 100
    return _processed(policy, media, " a" * max(1, int(missing / word)))


def _processed(policy: Policy, media: Media, text: str) -> Row:
    clip = MediaPart(MediaRef("video", "noise.mp4"))
    message = Message("user", (clip, TextPart(text)))
    conversation = Conversation(media.sample_id, (message,), "interleaved")
    prompt = render(conversation, policy.processor)
    return process_row(prompt, conversation, media, policy.processor, policy.family)
