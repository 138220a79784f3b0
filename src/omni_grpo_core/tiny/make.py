"""What a tiny checkpoint consists of, by family, and the folder around its weights.

The folder's files are written here, not by ``save_pretrained``: no version saves what all of
transformers 4.52 to 5.23 can read (a 5.x save silently loads in 4.57 with default rope sections; a
4.57 processor save does not load back at all).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from omni_grpo_core.core.family import QWEN2_5_OMNI, QWEN3_OMNI, Family
from omni_grpo_core.core.media_config import MediaConfig
from omni_grpo_core.tiny import FamilyName, architecture, architecture_qwen3
from omni_grpo_core.tiny.architecture import AUDIO_SECONDS, processor_files
from omni_grpo_core.tiny.tokenizer import QWEN2_5_WORDING, QWEN3_WORDING, Wording, write_tokenizer


@dataclass(frozen=True, slots=True)
class Make:
    """One family's tiny checkpoint.

    ``patch_size``: side length in pixels. ``config``: tokenizer -> ``config.json``. ``published``:
    weights -> weights by the names to save them under.
    """

    family: Family
    wording: Wording
    patch_size: int
    config: Callable[[Tokenizer], dict[str, Any]]
    published: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict

    @property
    def size(self) -> int:
        """Side length in pixels of the model's input: 4 x 4 patches, so 4 tokens per frame pair."""
        return 4 * self.patch_size

    @property
    def config_class(self) -> str:
        """Name of the class in transformers."""
        return self.family.thinker_class.replace("ForConditionalGeneration", "Config")

    @property
    def media(self) -> MediaConfig:
        """Configuration of the media stage: 4 frames per second, all of one size."""
        area = self.size * self.size
        return MediaConfig(fps=4.0, min_frames=4, max_frames=16, min_pixels=area, max_pixels=area)


QWEN2_5 = Make(QWEN2_5_OMNI, QWEN2_5_WORDING, 14, architecture.thinker_config)
QWEN3 = Make(
    QWEN3_OMNI,
    QWEN3_WORDING,
    architecture_qwen3.PATCH_SIZE,
    architecture_qwen3.thinker_config,
    architecture_qwen3.published_names,
)
MAKES: dict[FamilyName, Make] = {"qwen2.5": QWEN2_5, "qwen3": QWEN3}


def make_of(family: Family) -> Make:
    """The make of this family.

    >>> make_of(QWEN3_OMNI).size
    64
    """
    return next(make for make in MAKES.values() if make.family == family)


def write_folder(folder: Path, tokenizer: Tokenizer, make: Make) -> None:
    """Write every file of the checkpoint except the weights."""
    write_tokenizer(tokenizer, folder, make.wording)
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    area = make.size * make.size
    for name, content in {
        "config.json": make.config(tokenizer),
        "generation_config.json": {
            "do_sample": False,
            # the model config's eos is not a fallback for this one
            "eos_token_id": [end, pad],
            "pad_token_id": pad,
        },
        **processor_files(make.family, make.patch_size, (area, area), AUDIO_SECONDS),
        "omni_grpo.json": {
            "media": {k: v for k, v in asdict(make.media).items() if v is not None},
            "max_new_tokens": 64,
            # what the recipe reaches on held-out clips, with room for one mistake
            "min_format": 1.0,
            "min_accuracy": 0.95,
        },
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
