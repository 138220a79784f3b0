"""A Qwen2.5-Omni thinker of the 7B's full shape with random weights, created on the device.

Nothing is downloaded. It tests memory and parity at full size, and is the negative control of the
degeneration gate, which it must fail.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from omni_grpo_core.core.family import family_of
from omni_grpo_core.core.policy import Policy, policy_around
from omni_grpo_core.tiny.realvocab import build_processor


def config_7b() -> Qwen2_5OmniThinkerConfig:
    """Qwen2.5-Omni-7B's thinker: the library's defaults, except where the published checkpoint's
    ``config.json`` differs."""
    return Qwen2_5OmniThinkerConfig(
        text_config={
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
            "max_position_embeddings": 32768,
        },
        vision_config={"hidden_size": 1280, "out_hidden_size": 3584},
        audio_config={"output_dim": 3584},
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )


def random_7b(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Policy:
    """17.5 GB in bfloat16. ``folder``: for the processor's files."""
    processor = build_processor(folder)
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = Qwen2_5OmniThinkerForConditionalGeneration(config_7b())
    finally:
        torch.set_default_dtype(default)
    model.generation_config.eos_token_id = [151645, 151643]
    return policy_around(
        model.eval(), processor, family_of("qwen2_5_omni_thinker", "random"), "random 7B"
    )
