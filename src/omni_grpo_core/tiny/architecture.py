"""The tiny model's architecture and the checkpoint folder around its weights.

A real ``Qwen2_5OmniThinkerForConditionalGeneration`` with a few hundred thousand parameters. The
folder's files are written by hand, not by ``save_pretrained``: no version's own save can be read by
all of transformers 4.52 to 5.23 (a 5.x save loads in 4.57 with default rope sections and nothing
said; a 4.57 processor save does not load back at all).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from omni_grpo_core.media_config import MediaConfig
from omni_grpo_core.tiny.clips import SIZE
from omni_grpo_core.tiny.tokenizer import write_tokenizer

AUDIO_SECONDS = 8
"""Whisper features are padded to this; longer audio would be cut."""
MEDIA_LIMITS = MediaConfig(
    fps=4.0, min_frames=4, max_frames=16, min_pixels=SIZE * SIZE, max_pixels=SIZE * SIZE
)
"""What the media stage is to do for this checkpoint: 4 frames a second, 4 tokens a frame pair."""

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_HIDDEN = 64


def thinker_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """``config.json``. head_dim is 64 / 2 = 32, the least that vLLM's CPU attention takes, and
    mrope_section sums to half of it."""
    ids = tokenizer.token_to_id
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    return {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "model_type": "qwen2_5_omni_thinker",
        "torch_dtype": "float32",
        "initializer_range": 0.06,
        "tie_word_embeddings": False,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "audio_token_index": ids("<|AUDIO|>"),
        "image_token_index": ids("<|IMAGE|>"),
        "video_token_index": ids("<|VIDEO|>"),
        "audio_start_token_id": ids("<|audio_bos|>"),
        "audio_end_token_id": ids("<|audio_eos|>"),
        # not a declared field in every version, but generation reads it in all
        "vision_start_token_id": ids("<|vision_bos|>"),
        "vision_end_token_id": ids("<|vision_eos|>"),
        "user_token_id": tokenizer.encode("user").ids[0],
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": _HIDDEN,
            "intermediate_size": 2 * _HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "max_window_layers": 3,
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.06,
            "use_cache": True,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "pad_token_id": ids("<|endoftext|>"),
            # 4.x reads the first two, 5.x the third
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "default", **rope},
            "rope_parameters": {"rope_theta": 10000.0, **rope},
        },
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_heads": 2,
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 25,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "hidden_act": "silu",
            "out_hidden_size": _HIDDEN,
            "initializer_range": 0.06,
        },
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "num_mel_bins": 128,
            "d_model": 48,
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 96,
            "max_source_positions": AUDIO_SECONDS * 50,
            "n_window": 100,
            "output_dim": _HIDDEN,
            "activation_function": "gelu",
            "initializer_range": 0.06,
        },
    }


def processor_files(
    *, min_pixels: int, max_pixels: int, audio_seconds: int
) -> dict[str, dict[str, Any]]:
    """Preprocessing as Qwen2.5-Omni publishes it (``preprocessor_config.json`` of its checkpoints),
    but for the limits: by file name, what the image, video and audio halves of the processor read.

    ``min_pixels``, ``max_pixels``: area of a frame or image. ``audio_seconds``: Whisper features
    are padded to this.
    """
    vision = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "resample": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "processor_class": "Qwen2_5OmniProcessor",
    }
    hearing = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": audio_seconds,
        "n_samples": audio_seconds * 16000,
        "nb_max_frames": audio_seconds * 100,
        "padding_side": "right",
        "padding_value": 0.0,
        "dither": 0.0,
        "return_attention_mask": True,
    }
    return {
        # one file, two readers: image processor and feature extractor each take their own keys
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            **vision,
            **hearing,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor",
            **vision,
        },
    }


def write_folder(folder: Path, tokenizer: Tokenizer) -> None:
    """Every file of the checkpoint but the weights."""
    write_tokenizer(tokenizer, folder)
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    for name, content in {
        "config.json": thinker_config(tokenizer),
        "generation_config.json": {
            "do_sample": False,
            # the model config's eos is no fallback for this one
            "eos_token_id": [end, pad],
            "pad_token_id": pad,
        },
        **processor_files(
            min_pixels=SIZE * SIZE, max_pixels=SIZE * SIZE, audio_seconds=AUDIO_SECONDS
        ),
        "omni_grpo.json": {
            "media": {k: v for k, v in asdict(MEDIA_LIMITS).items() if v is not None},
            "max_new_tokens": 64,
            # what the recipe reaches on clips it never saw, with room for one slip
            "min_format": 1.0,
            "min_accuracy": 0.95,
        },
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
