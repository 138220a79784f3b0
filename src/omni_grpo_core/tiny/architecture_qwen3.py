"""The tiny model of the second family.

A real ``Qwen3OmniMoeThinkerForConditionalGeneration`` with what distinguishes it from the first
family: experts, vision features added at several depths, normed queries and keys, interleaved rope
sections, audio in chunks of a second, patches of 16.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from omni_grpo_core.core.family import QWEN3_OMNI
from omni_grpo_core.tiny.architecture import shared_config

PATCH_SIZE = 16


def thinker_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """``config.json``. head_dim is 64 / 2 = 32; of its 16 frequencies, height and width each take
    every third, five times."""
    return shared_config(
        tokenizer,
        "qwen3_omni_moe",
        {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        thinker={
            "architectures": [QWEN3_OMNI.thinker_class],
            "position_id_per_seconds": 13,
            "audio_token_id": "<|audio_pad|>",
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "audio_start_token_id": "<|audio_start|>",
            "audio_end_token_id": "<|audio_end|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        text={
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "output_router_logits": False,
        },
        vision={
            "patch_size": PATCH_SIZE,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "hidden_act": "gelu_pytorch_tanh",
        },
        audio={
            "downsample_hidden_size": 16,
            # a chunk has 13 positions
            "max_source_positions": 16,
            # 4.57 hard-codes 50 where it counts tokens
            "n_window": 50,
            "n_window_infer": 800,
        },
    )


def published_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of the published checkpoints, which 4.57 uses in its modules and 5.x
    converts on loading: three matrices per expert, where 5.x keeps all experts in two.

    >>> fused = {"mlp.experts.gate_up_proj": torch.zeros(2, 6, 4), "norm.weight": torch.ones(4)}
    >>> {name: tuple(value.shape) for name, value in published_names(fused).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'mlp.experts.0.gate_proj.weight': (3, 4), 'mlp.experts.0.up_proj.weight': (3, 4),
     'mlp.experts.1.gate_proj.weight': (3, 4), 'mlp.experts.1.up_proj.weight': (3, 4),
     'norm.weight': (4,)}
    """
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        stem, _, last = name.rpartition(".")
        if not stem.endswith(".experts") or last not in ("gate_up_proj", "down_proj"):
            named[name] = value
            continue
        halves = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        for number, expert in enumerate(value):
            for half, part in zip(halves, torch.chunk(expert, len(halves)), strict=True):
                named[f"{stem}.{number}.{half}.weight"] = part.contiguous()
    return named
