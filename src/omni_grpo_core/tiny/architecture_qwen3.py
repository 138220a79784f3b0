"""The tiny model of the second family.

A real ``Qwen3OmniMoeThinkerForConditionalGeneration`` with what sets it off from the first family:
experts, vision taken in at several depths, norms of queries and keys, interleaved rope sections,
audio in chunks of a second, patches of 16.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from omni_grpo_core.core.family import QWEN3_OMNI
from omni_grpo_core.tiny.architecture import Optics

QWEN3_OPTICS = Optics("Qwen3OmniMoeProcessor", 16, QWEN3_OMNI.image_mean, QWEN3_OMNI.image_std)
_HIDDEN = 64
_EXPERT = 48


def thinker_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """``config.json``. head_dim is 64 / 2 = 32; of its 16 frequencies heights and widths take
    every third each, five times."""
    ids = tokenizer.token_to_id
    rope = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return {
        "architectures": ["Qwen3OmniMoeThinkerForConditionalGeneration"],
        "model_type": "qwen3_omni_moe_thinker",
        "torch_dtype": "float32",
        "initializer_range": 0.06,
        "tie_word_embeddings": False,
        "position_id_per_seconds": 13,
        "seconds_per_chunk": 2,
        "audio_token_id": ids("<|audio_pad|>"),
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "audio_start_token_id": ids("<|audio_start|>"),
        "audio_end_token_id": ids("<|audio_end|>"),
        # not declared fields in every version, but positions are computed from them in all
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "user_token_id": tokenizer.encode("user").ids[0],
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
        "text_config": {
            "model_type": "qwen3_omni_moe_text",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": _HIDDEN,
            "intermediate_size": 2 * _HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.06,
            "use_cache": True,
            "tie_word_embeddings": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": _EXPERT,
            "norm_topk_prob": True,
            "output_router_logits": False,
            "pad_token_id": ids("<|endoftext|>"),
            # 4.x reads the first two, 5.x the third
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "default", **rope},
            "rope_parameters": {"rope_theta": 10000.0, **rope},
        },
        "vision_config": {
            "model_type": "qwen3_omni_moe_vision_encoder",
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_heads": 2,
            "in_channels": 3,
            "patch_size": QWEN3_OPTICS.patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
            "hidden_act": "gelu_pytorch_tanh",
            "out_hidden_size": _HIDDEN,
            "initializer_range": 0.06,
        },
        "audio_config": {
            "model_type": "qwen3_omni_moe_audio_encoder",
            "num_mel_bins": 128,
            "d_model": 48,
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 96,
            "downsample_hidden_size": 16,
            # a chunk has 13 positions
            "max_source_positions": 16,
            # 4.57 has 50 written out where it counts tokens
            "n_window": 50,
            "n_window_infer": 800,
            "output_dim": _HIDDEN,
            "activation_function": "gelu",
            "initializer_range": 0.06,
        },
    }


def published_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of the published checkpoints, which 4.57 has in its modules and 5.x
    translates on loading: an expert's three matrices apart, where 5.x keeps all experts in two.

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
