"""The tiny model of the first family, and the preprocessing that both share.

A real ``Qwen2_5OmniThinkerForConditionalGeneration`` with a few hundred thousand parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from omni_grpo_core.core.family import QWEN2_5_OMNI

AUDIO_SECONDS = 8
"""Whisper features are padded to this; longer audio would be cut."""
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


@dataclass(frozen=True, slots=True)
class Optics:
    """How a family's processor cuts and normalises pictures."""

    processor_class: str
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


QWEN2_5_OPTICS = Optics("Qwen2_5OmniProcessor", 14, QWEN2_5_OMNI.image_mean, QWEN2_5_OMNI.image_std)


def processor_files(
    *, min_pixels: int, max_pixels: int, audio_seconds: int, optics: Optics = QWEN2_5_OPTICS
) -> dict[str, dict[str, Any]]:
    """Preprocessing as Qwen2.5-Omni publishes it (``preprocessor_config.json`` of its checkpoints),
    but for the limits: by file name, what the image, video and audio halves of the processor read.

    ``min_pixels``, ``max_pixels``: area of a frame or image. ``audio_seconds``: Whisper features
    are padded or cut to this.
    """
    vision = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(optics.mean),
        "image_std": list(optics.std),
        "resample": 3,
        "patch_size": optics.patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "processor_class": optics.processor_class,
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
