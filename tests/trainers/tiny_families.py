"""Tiny models with random weights of families without a reference, on the shipped tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from omni_grpo_core import tiny

_OWN_NAMES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_INSTRUCT = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
_TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None,
}  # fmt: skip
_IDS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
_OWN_IDS = {
    "image_token_id": "<|IMAGE|>", "video_token_id": "<|VIDEO|>",
    "vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>",
}  # fmt: skip


def _qwen2_vl() -> tuple[Any, Any]:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    return _vision(Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, vision)


def _qwen2_5_vl() -> tuple[Any, Any]:
    """Its marks are those of Qwen2.5-Omni, which only its template names."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )

    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 64, "fullatt_block_indexes": [1],
    }  # fmt: skip
    kinds = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)
    return _vision(*kinds, vision, _tokenizer("qwen2.5"), _OWN_NAMES, _OWN_IDS)


def _qwen3_vl() -> tuple[Any, Any]:
    """A patch of 16, embeddings of the tower added to three layers, interleaved positions."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 64,
    }  # fmt: skip
    kinds = (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor)
    return _vision(*kinds, vision, patch=16, head_dim=32)


def _vision(
    config: Any,
    model: Any,
    processor: Any,
    vision: Mapping[str, Any],
    tokenizer: Any = None,
    template: str = "",
    ids: Mapping[str, str] = _IDS,
    patch: int = 14,
    **text: Any,
) -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    tokenizer = tokenizer or _tokenizer("qwen3")
    sizes = {"patch_size": patch, "min_pixels": (2 * patch) ** 2, "max_pixels": (4 * patch) ** 2}
    videos = Qwen3VLVideoProcessor if patch == 16 else Qwen2VLVideoProcessor
    made = processor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=videos(patch_size=patch),
        chat_template=template or tokenizer.chat_template,
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    settings = config(
        text_config=_text(tokenizer) | {"rope_parameters": rope, **text},
        vision_config=dict(vision),
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )
    return _built(model, settings, tokenizer), made


def _qwen2() -> tuple[Any, Any]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = _tokenizer("qwen2.5")
    return _built(Qwen2ForCausalLM, Qwen2Config(**_text(tokenizer)), tokenizer), tokenizer


def _llama() -> tuple[Any, Any]:
    """Its prompts are no ChatML."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer("qwen2.5")
    tokenizer.chat_template = _INSTRUCT
    return _built(LlamaForCausalLM, LlamaConfig(**_text(tokenizer)), tokenizer), tokenizer


def _text(tokenizer: Any) -> dict[str, Any]:
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {**_TEXT, **ends, "vocab_size": len(tokenizer)}


def _tokenizer(family: Any) -> Any:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny.checkpoint_dir(family))
    processor.tokenizer.chat_template = processor.chat_template
    return processor.tokenizer


def _built(kind: Any, config: Any, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


FAMILIES: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    "Qwen2-VL": _qwen2_vl,
    "Qwen2.5-VL": _qwen2_5_vl,
    "Qwen3-VL": _qwen3_vl,
    "Qwen2": _qwen2,
    "Llama": _llama,
}
"""Model and processor, or tokenizer, by family."""
