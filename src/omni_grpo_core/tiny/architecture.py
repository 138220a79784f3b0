"""The tiny model of the first family, and the preprocessing that both families share.

A real ``Qwen2_5OmniThinkerForConditionalGeneration`` with a few hundred thousand parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from omni_grpo_core.core.family import QWEN2_5_OMNI, Family

AUDIO_SECONDS = 8
"""Whisper features are padded to this; longer audio would be truncated."""
_HIDDEN = 64


def thinker_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """``config.json``. head_dim is 64 / 2 = 32, the minimum of vLLM's CPU attention, and
    mrope_section sums to half of it."""
    return shared_config(
        tokenizer,
        "qwen2_5_omni",
        {"rope_type": "default", "mrope_section": [4, 6, 6]},
        thinker={
            "architectures": [QWEN2_5_OMNI.thinker_class],
            "position_id_per_seconds": 25,
            "audio_token_index": "<|AUDIO|>",
            "image_token_index": "<|IMAGE|>",
            "video_token_index": "<|VIDEO|>",
            "audio_start_token_id": "<|audio_bos|>",
            "audio_end_token_id": "<|audio_eos|>",
            "vision_start_token_id": "<|vision_bos|>",
            "vision_end_token_id": "<|vision_eos|>",
        },
        text={"max_window_layers": 3, "use_sliding_window": False},
        vision={
            "in_chans": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "tokens_per_second": 25,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "hidden_act": "silu",
        },
        audio={"max_source_positions": AUDIO_SECONDS * 50, "n_window": 100},
    )


def shared_config(
    tokenizer: Tokenizer, name: str, rope: Mapping[str, Any], **own: Mapping[str, Any]
) -> dict[str, Any]:
    """``config.json`` of the family ``name``: what all tiny models share, and the family's ``own``
    values by part (thinker, text, vision, audio). Tokens are replaced by their ids."""
    ids = tokenizer.token_to_id
    thinker = {k: ids(v) if str(v).startswith("<|") else v for k, v in own["thinker"].items()}
    part = {"initializer_range": 0.06}
    return {
        "model_type": f"{name}_thinker",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "seconds_per_chunk": 2,
        # not declared in every version, but read by generation and positions in all
        **thinker,
        **part,
        "user_token_id": tokenizer.encode("user").ids[0],
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
        "text_config": {
            "model_type": f"{name}_text",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": _HIDDEN,
            "intermediate_size": 2 * _HIDDEN,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "use_cache": True,
            "tie_word_embeddings": False,
            "pad_token_id": ids("<|endoftext|>"),
            # 4.x reads the first two, 5.x the third
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "default", **rope},
            "rope_parameters": {"rope_theta": 10000.0, **rope},
            **part,
            **own["text"],
        },
        "vision_config": {
            "model_type": f"{name}_vision_encoder",
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_heads": 2,
            "in_channels": 3,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": _HIDDEN,
            **part,
            **own["vision"],
        },
        "audio_config": {
            "model_type": f"{name}_audio_encoder",
            "num_mel_bins": 128,
            "d_model": 48,
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 96,
            "output_dim": _HIDDEN,
            "activation_function": "gelu",
            **part,
            **own["audio"],
        },
    }


def processor_files(
    family: Family, patch_size: int, pixels: tuple[int, int], audio_seconds: int
) -> dict[str, dict[str, Any]]:
    """Preprocessing as the family publishes it (``preprocessor_config.json`` of its checkpoints),
    except for the limits: by file name, what the processor's image, video and audio parts read.

    ``pixels``: least and most of a frame or image. ``audio_seconds``: Whisper features are padded
    or truncated to this.
    """
    least, most = pixels
    vision = {
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(family.image_mean),
        "image_std": list(family.image_std),
        "resample": 3,
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": least,
        "max_pixels": most,
        "size": {"shortest_edge": least, "longest_edge": most},
        "processor_class": family.processor_class,
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
